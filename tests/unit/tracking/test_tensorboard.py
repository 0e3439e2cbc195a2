"""Event files, read back by TensorBoard."""

import itertools
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.summary.writer import event_file_writer

from xtuner_hydra.app import App
from xtuner_hydra.tracking.tensorboard import TensorBoardTracker


@pytest.fixture(autouse=True)
def time_between_starts(monkeypatch):
    """A second before each start of a run: TensorBoard reads the files of one second in the order of a counter's text, 10 before 9."""
    starts = itertools.count()
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: time.time() + next(starts)))


def write(directory, start_step, losses, *, resolved=None, evaluations=None, state="completed"):
    tracker = TensorBoardTracker(directory, start_step, resolved or {})
    for step, loss in losses.items():
        tracker.log({"train/step": step, "train/loss": loss, "throughput/mfu": None})
    for step, loss in (evaluations or {}).items():
        tracker.log({"train/step": step, "eval/loss": loss})
    tracker.finish(state, 0)


def scalars(directory):
    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_its_own_reader_finds_every_value_by_step(tmp_path):
    write(tmp_path / "tb", 0, {1: 2.0, 2: 1.5})
    assert scalars(tmp_path / "tb") == {"train/loss": {1: 2.0, 2: 1.5}}


@pytest.mark.parametrize("later", [{}, {3: 1.0, 4: 0.5}, {4: 0.5}], ids=["nothing", "every step", "every second step"])
def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path, later):
    write(tmp_path / "tb", 0, {1: 2.0, 2: 1.5, 3: 9.0})
    write(tmp_path / "tb", 2, later)
    assert scalars(tmp_path / "tb") == {"train/loss": {1: 2.0, 2: 1.5, **later}}


def sessions(logdir):
    """What the HParams tab shows: columns of hyper-parameters and metrics; and by run its values, last metrics and status."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    runs.Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(logdir))))
    request = RequestContext()
    experiment = context.experiment_from_metadata(request, "", True, context.hparams_metadata(request, ""), [])
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=99, include_metrics=True, allowed_statuses=api_pb2.Status.values())
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    columns = {info.name for info in experiment.hparam_infos}, {info.name.tag for info in experiment.metric_infos}
    return columns, {
        group.name: (
            {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()},
            {metric.name.tag: metric.value for metric in group.metric_values},
            api_pb2.Status.Name(group.sessions[0].status),
        )
        for group in groups
    }


def resolved(*overrides):
    with App(overrides) as app:
        return asdict(app.compose(list(overrides)).config)


def test_the_hparams_tab_compares_runs_by_config_and_last_metrics(tmp_path):
    one, two = resolved("optimizer.lr=1e-4"), resolved("optimizer.lr=2e-4", "trainer.total_steps=5", "scheduler=linear")
    write(tmp_path / "one" / "tensorboard", 0, {1: 2.0, 2: 1.5}, resolved=one, evaluations={1: 3.0, 2: 2.5})
    write(tmp_path / "two" / "tensorboard", 0, {1: 2.0, 2: 1.0}, resolved=two, evaluations={2: 2.25}, state="failed")
    (hyperparameters, metrics), found = sessions(tmp_path)
    assert metrics == {"eval/loss", "train/loss", "throughput/e2e_tgs"}
    assert {"trainer.total_steps", "optimizer.lr", "data.pack_max_length"} <= hyperparameters  # though the first run has no total_steps
    assert not [name for name in hyperparameters if name.startswith(("tracking.", "checkpoint.", "sweep."))]
    values, last, status = found["one/tensorboard"]
    assert (values["optimizer.lr"], values["scheduler.name"], values["data.shuffle"]) == (1e-4, "cosine", True)
    assert values["optimizer.betas"] == "[0.9, 0.95]"
    assert "trainer.total_steps" not in values
    assert (last, status) == ({"train/loss": 1.5, "eval/loss": 2.5}, "STATUS_SUCCESS")
    values, last, status = found["two/tensorboard"]
    assert (values["optimizer.lr"], values["scheduler.name"], values["trainer.total_steps"]) == (2e-4, "linear", 5)
    assert (last, status) == ({"train/loss": 1.0, "eval/loss": 2.25}, "STATUS_UNKNOWN")


def test_a_resumed_run_is_one_session_with_its_last_metrics(tmp_path):
    config = resolved("optimizer.lr=1e-4")
    write(tmp_path / "run", 0, {1: 2.0, 2: 1.5, 3: 9.0}, resolved=config, evaluations={3: 9.0}, state="interrupted")
    write(tmp_path / "run", 2, {3: 1.0, 4: 0.5}, resolved=config, evaluations={4: 0.75})
    _, found = sessions(tmp_path)
    ((values, last, status),) = found.values()
    assert values["optimizer.lr"] == 1e-4
    assert (last, status) == ({"train/loss": 0.5, "eval/loss": 0.75}, "STATUS_SUCCESS")


def test_samples_are_texts_by_their_prompts_number(tmp_path):
    tracker = TensorBoardTracker(tmp_path / "tb", 0, {})
    for step in (1, 2):
        tracker.show([{"train/step": step, "prompt": f"q{number}", "text": f"*a*\n{step}"} for number in range(2)])
    tracker.finish("completed", 0)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/1/text_summary")]
    assert texts == [f"    q1\n    \n    *a*\n    {step}" for step in (1, 2)]
