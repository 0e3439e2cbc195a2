"""Scalars for TensorBoard, by step, and the config as hyper-parameters, so that its HParams tab compares runs by their last metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from xtuner_hydra.config.schema import Config
from xtuner_hydra.tracking.base import Row, Sample

COMPARED = ("model", "data", "optimizer", "scheduler", "trainer", "parallelism")
"""Groups whose values are hyper-parameters."""
HPARAM_METRICS = ("eval/loss", "train/loss", "throughput/e2e_tgs")
"""The scalars whose last values the HParams tab compares."""


class TensorBoardTracker:
    """Writes every metric of a row as a scalar at `train/step`, and `resolved`, the nested config, as the session's hyper-parameters."""

    required = False

    def __init__(self, directory: Path, start_step: int, resolved: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier process wrote after the step that this one continues from
        self.writer = SummaryWriter(directory, purge_step=start_step + 1 if directory.exists() else None)
        self._write("experiment", experiment=_experiment())
        self._write("session_start_info", session_start_info=_session_start(resolved))

    def log(self, row: Row) -> None:
        """Write the row's scalars; the file is flushed every two minutes and at the end."""
        for name, value in row.items():
            if name != "train/step" and value is not None:
                self.writer.add_scalar(name, value, row["train/step"])

    def show(self, samples: list[Sample]) -> None:
        """Write every answer as a text, by its prompt's number."""
        for number, sample in enumerate(samples):
            text = "\n".join(f"    {line}" for line in (sample["prompt"], "", *sample["text"].splitlines()))  # as it is, not as Markdown
            self.writer.add_text(f"samples/{number}", text, sample["train/step"])

    def finish(self, state: str, exit_code: int) -> None:
        """Flush and close. Only a completed run records its end: TensorBoard keeps the first record it reads, and a failed run may be resumed."""
        if state == "completed":
            from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

            end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
            self._write("session_end_info", session_end_info=end)
        self.writer.close()

    def _write(self, tag: str, **data: Any) -> None:
        """Write a record of the HParams plug-in into this run's own log directory (the writer's add_hparams would open another one)."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **data))
        value = Summary.Value(tag=f"_hparams_/{tag}", metadata=about, tensor=metadata.NULL_TENSOR)
        self.writer._get_file_writer().add_summary(Summary(value=[value]))


def hyperparameters() -> dict[str, type]:
    """Every key of the COMPARED groups by its type: float (also for whole numbers), bool, or str (also for paths and lists)."""
    return dict(_kinds())


def _kinds() -> Iterator[tuple[str, type]]:
    groups = get_type_hints(Config)
    for group in COMPARED:
        hints = get_type_hints(groups[group])
        for field in fields(groups[group]):
            hint = hints[field.name]
            kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)  # both of `int | None`
            yield f"{group}.{field.name}", bool if bool in kinds else float if {int, float} & set(kinds) else str


def _experiment() -> Any:
    """Every hyper-parameter that a run can have and the metrics: the same in every run, because TensorBoard takes the first run's for all."""
    from tensorboard.plugins.hparams import api_pb2

    types = {float: api_pb2.DATA_TYPE_FLOAT64, bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    return api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=types[kind]) for name, kind in hyperparameters().items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in HPARAM_METRICS],
    )


def _session_start(resolved: dict[str, Any]) -> Any:
    """This run's values; null ones are left out, which TensorBoard shows as empty."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, kind in hyperparameters().items():
        group, _, key = name.partition(".")
        value = resolved.get(group, {}).get(key)
        if value is None:
            continue
        if kind is bool:
            start.hparams[name].bool_value = value
        elif kind is float:
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    return start
