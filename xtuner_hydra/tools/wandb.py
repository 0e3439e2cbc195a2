"""`wandb dashboard`: a W&B workspace made for these runs. `wandb sync`: push runs that were written offline."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_hydra import run_dir
from xtuner_hydra.config.schema import WandbConfig
from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, RefusedError
from xtuner_hydra.files import write_text
from xtuner_hydra.results import sweep
from xtuner_hydra.tracking.wandb import has_api_key

NAME = "xtuner_hydra"
LOGIN = "set WANDB_API_KEY or run `wandb login`"
DEFINITION = "wandb_dashboard.json"


def main(argv: list[str]) -> int:
    """Run `wandb VERB ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="xtuner-hydra wandb", description="What one does with W&B besides training.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    board = verbs.add_parser("dashboard", help="build the project's workspace; without a login, write its definition as JSON")
    board.add_argument("--project", default=WandbConfig.project, help="W&B project (%(default)s)")
    board.add_argument("--entity", help="W&B user or team; default: the account's")
    board.add_argument("--to", type=Path, metavar="FILE", help="write the definition to FILE, and push nothing")
    push = verbs.add_parser("sync", help="push the offline runs of run directories and sweeps")
    push.add_argument("directories", nargs="+", type=Path, metavar="RUN_OR_SWEEP")
    push.add_argument("--dry-run", action="store_true", help="list what would be pushed")
    args = parser.parse_args(argv)
    if args.verb == "dashboard":
        return dashboard(args.project, args.entity, args.to)
    return sync(args.directories, dry_run=args.dry_run)


# --- dashboard ---


def dashboard(project: str, entity: str | None, to: Path | None) -> int:
    """Push the workspace with a login, write its definition without one (or where `to` asks for it).

    Pushing is wandb-workspaces' documented `Workspace.save()`. It needs an account, so it has been tried against a server of our own only
    (tests/wandb_server.py), never against W&B's. Every push makes a new view of the project; W&B prints its address."""
    if to is None and has_api_key():
        _save(project, entity)
        return EXIT_DONE
    path = to or Path(DEFINITION)
    text = definition(project, entity or "")
    try:
        write_text(path, text)
    except OSError as error:
        raise RefusedError(f"--to {path}: cannot be written ({error.strerror}); choose another file with --to FILE") from None
    again = f"xtuner-hydra wandb dashboard --project {project}" + (f" --entity {entity}" if entity else "")
    print(f"{path}: the workspace's definition. To push it to W&B, {LOGIN}, then: {again}")
    return EXIT_DONE


def definition(project: str, entity: str) -> str:
    """The workspace as JSON: entity, project, name, and `spec`, W&B's own form of a view."""
    view = workspace(project, entity)._to_model()  # what `save` sends; there is no public way to have it without sending it
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps({"entity": entity, "project": project, "name": NAME, "spec": spec}, indent=2, ensure_ascii=False) + "\n"


def workspace(project: str, entity: str) -> Any:
    """The `wandb_workspaces.workspaces.Workspace`. Raises RefusedError where that package is not installed."""
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise RefusedError("wandb dashboard: needs wandb-workspaces; pip install 'xtuner-hydra[dashboards]'") from None
    sections = [
        ws.Section(
            name=name,
            panels=panels,
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns)),
            panel_settings=ws.SectionPanelSettings(x_axis="train/step"),
        )
        for name, columns, panels in _sections()
    ]
    settings = ws.WorkspaceSettings(x_axis="train/step", max_runs=50)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def _sections() -> list[tuple[str, int, list[Any]]]:
    """(name, panels side by side, panels) of every section, top to bottom. Metrics are those of README, "Metrics", and tracking/wandb.py."""
    import wandb_workspaces.reports.v2 as wr

    best, lr = wr.SummaryMetric("eval/best_loss"), wr.Config("optimizer.lr")
    tokens = "train/total_tokens"
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=lr, display_name="learning rate", log=True),
        wr.ParallelCoordinatesPlotColumn(metric=wr.Config("data.pack_max_length"), display_name="pack length"),
        wr.ParallelCoordinatesPlotColumn(metric=wr.Config("trainer.global_batch_size"), display_name="packs a step"),
        wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric("throughput/best_tgs"), display_name="tokens/s/device"),
        wr.ParallelCoordinatesPlotColumn(metric=best, display_name="best eval loss"),
    ]
    return [
        (
            "training",
            2,
            [
                _line("loss over steps", "train/loss"),
                _line("loss over tokens", "train/loss", x=tokens),  # jobs of other pack lengths and batch sizes compare here
                _line("learning rate", "train/lr"),
                _line("gradient norm", "train/grad_norm", log_y=True),
            ],
        ),
        (
            "evaluation",
            2,
            [
                _line("eval loss over steps", "eval/loss"),
                _line("eval loss over tokens", "eval/loss", x=tokens),
                _line("perplexity", "eval/perplexity", log_y=True),
            ],
        ),
        (
            "sweep comparison",
            2,
            [
                wr.ParallelCoordinatesPlot(title="what makes a low eval loss", columns=columns),
                wr.ScatterPlot(title="learning rate against best eval loss", x=lr, y=best, log_x=True),
                wr.BarPlot(title="best eval loss by sweep", metrics=["eval/best_loss"], groupby="Group", groupby_aggfunc="min"),
                wr.ParameterImportancePlot(with_respect_to="eval/best_loss"),
                wr.RunComparer(diff_only=True),
            ],
        ),
        (
            "throughput",
            2,
            [
                _line("tokens per second and device, within the step", "throughput/tgs"),
                _line("tokens per second and device, since the start", "throughput/e2e_tgs"),
                _line("seconds per step, and of them waiting for data", "throughput/step_time", "throughput/data_time"),
                _line("share of the device's peak", "throughput/mfu"),
                _line("pack utilisation", "throughput/pack_utilization"),
                _line("tokens a step", "train/tokens", "train/supervised_tokens"),
            ],
        ),
        ("memory", 2, [_line("peak memory, GB", "memory/max_gb"), _line("reserved memory, GB", "memory/reserved_gb")]),
    ]


def _line(title: str, *metrics: str, x: str = "train/step", log_y: bool | None = None) -> Any:
    import wandb_workspaces.reports.v2 as wr

    title_x = {"train/step": "step", "train/total_tokens": "tokens"}[x]
    return wr.LinePlot(title=title, x=x, y=list(metrics), title_x=title_x, log_y=log_y)


def _save(project: str, entity: str | None) -> None:
    """Push the workspace. Raises RefusedError with W&B's own words, whatever kind of error they come in."""
    board = workspace(project, entity or "")
    import wandb

    try:
        board.entity = board.entity or wandb.Api().default_entity or ""
        board.save()
    except Exception as error:
        raise RefusedError(f"wandb dashboard: W&B did not take it ({error}); --to FILE writes the definition without W&B") from None


# --- sync ---


@dataclass(frozen=True)
class Offline:
    """A run directory and its offline W&B parts not yet pushed, oldest first: a resumed run has several, which form one W&B run."""

    directory: Path
    parts: list[Path]
    running: bool


def sync(directories: Sequence[Path], *, dry_run: bool) -> int:
    """Push the offline runs of `directories`, a sweep's in the order of its jobs, one after another. Group, name and tags are in their files.

    Exit code 1 where one could not be pushed; the others are. Raises RefusedError for a directory that is neither a run's nor a sweep's, and
    without an API key."""
    found = [offline(run) for directory in directories for run in runs(directory)]
    if not dry_run and not has_api_key():
        raise RefusedError(f"wandb sync: there is no API key; {LOGIN}")
    for run in found:
        if run.running and run.parts:
            print(f"{run.directory}: still running, left out")
    ready = [run for run in found if run.parts and not run.running]
    if not ready:
        print("nothing offline to push")
        return EXIT_DONE
    if dry_run:
        print("\n".join(str(part) for run in ready for part in run.parts))
        return EXIT_DONE
    failed = 0
    for number, run in enumerate(ready, 1):
        pushed = push(run.parts)
        failed += not pushed
        print(f"{number}/{len(ready)} {run.directory}: {'pushed' if pushed else 'not pushed; the reason stands above'}", flush=True)
    return EXIT_FAILED if failed else EXIT_DONE


def runs(directory: Path) -> Iterator[Path]:
    """The run directories that `directory` stands for: itself, or a sweep's jobs in their order."""
    if run_dir.holds_run(directory):
        yield directory
    elif (directory / sweep.SWEEP_FILE).exists():
        for job in sweep.SweepPlan.load(directory).jobs:
            run_dir.refuse_stray(directory / job.name, home=directory)
            if run_dir.holds_run(directory / job.name):
                yield directory / job.name
    else:
        raise RefusedError(f"{directory}: neither a run's directory (config.yaml) nor a sweep's ({sweep.SWEEP_FILE})")


def offline(directory: Path) -> Offline:
    """What run directory `directory` has to push. W&B marks what it has pushed with a file `.synced`."""
    parts = sorted(directory.glob("wandb/offline-run-*/*.wandb"))  # their names begin with their time
    run_dir.refuse_stray(directory)
    for part in parts:
        run_dir.refuse_stray(part.parent, home=directory, trees=("files",))  # W&B would push what a link there points to
    running = run_dir.state(directory) == "running"
    return Offline(directory, [part.parent for part in parts if not _is_pushed(part)], running)


def push(parts: Sequence[Path]) -> bool:
    """Push the parts of one run with `wandb sync`, which says on the screen how it goes, and tries again for long where the server is silent.

    Its exit code is 0 even where it failed, so its marks tell whether it worked."""
    subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, parts)], stdin=subprocess.DEVNULL)
    return all(_is_pushed(file) for part in parts for file in part.glob("*.wandb"))


def _is_pushed(file: Path) -> bool:
    return file.with_name(f"{file.name}.synced").exists()
