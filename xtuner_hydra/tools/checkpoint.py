"""`checkpoint list|verify|prune RUN`: what a run has saved, whether it is whole, and room for more.

RUN is a run directory, a directory of checkpoints, or (not for prune) one of them, step-N."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from xtuner_hydra import run_dir
from xtuner_hydra.checkpoint import retention
from xtuner_hydra.checkpoint.commit import MANIFEST, committed, damage, has_step_name, leftovers, numbered, remove, step_of
from xtuner_hydra.checkpoint.export import point_latest
from xtuner_hydra.config.schema import CheckpointConfig
from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, RefusedError
from xtuner_hydra.files import tree_size
from xtuner_hydra.results.run import load_run
from xtuner_hydra.tracking import jsonl
from xtuner_hydra.words import bytes_

COLUMNS = ("directory", "size", "saved", "eval/loss", "kept as", "state")


def main(argv: list[str]) -> int:
    """List, verify or prune; 1 where `verify` finds damage. Raises RefusedError for a directory that holds nothing of the kind."""
    args = _parser().parse_args(argv)
    shelves = find(args.run)
    if args.verb == "list":
        return show(shelves)
    if args.verb == "verify":
        return verify(shelves)
    return prune(shelves, keep=args.keep, damaged=args.damaged, dry_run=args.dry_run)


@dataclass(frozen=True)
class Shelf:
    """The step-N directories and the leftovers of interrupted saves in `parent`. run: whose they are, None for copies elsewhere.
    alone: one step-N was named, not all of them."""

    parent: Path
    found: list[Path]
    left: list[Path]
    run: Path | None
    alone: bool = False

    @property
    def is_exports(self) -> bool:
        return self.parent.name == "hf"

    def name(self, path: Path) -> str:
        """`path` as seen from the run."""
        return str(path.relative_to(self.run)) if self.run else path.name

    def reasons(self, whole: list[Path], config: CheckpointConfig) -> dict[Path, list[str]]:
        """Why each of `whole` stays; with an empty list it goes."""
        if self.is_exports:
            latest = os.path.realpath(self.parent / "latest")  # not the greatest number where a run went on from an earlier step
            return retention.reasons(whole, config.hf_keep, just_saved=self.parent / os.path.basename(latest))
        return retention.reasons(whole, config.keep, every=config.keep_every, best=config.keep_best)

    def losses(self) -> dict[Path, float]:
        """eval/loss after the step of each: as a checkpoint tells it itself; for an export as the run's rows do."""
        if self.is_exports:
            rows = jsonl.read(self.run / "metrics.jsonl") if self.run else []
            by_step = {row["train/step"]: row.get("eval/loss") for row in rows if "eval/loss" in row}
            losses = {path: by_step.get(step_of(path)) for path in self.found}
        else:
            losses = {path: retention.evaluated(path).get("eval/loss") for path in self.found}
        return {path: loss for path, loss in losses.items() if loss is not None}


def find(directory: Path) -> list[Shelf]:
    """What `directory` holds. Raises RefusedError where that is nothing."""
    path = Path(os.path.abspath(directory.expanduser()))
    if not path.is_dir():
        raise RefusedError(f"{directory}: no such directory")
    if has_step_name(path) and not run_dir.holds_run(path):
        return [Shelf(path.parent, [path], [], _run_of(path.parent), alone=True)]
    places = [(path / name, path) for name in ("checkpoints", "hf")] if run_dir.holds_run(path) else [(path, _run_of(path))]
    shelves = [Shelf(parent, numbered(parent), leftovers(parent), run) for parent, run in places]
    shelves = [shelf for shelf in shelves if shelf.found or shelf.left]
    if not shelves:
        raise RefusedError(f"{directory}: holds no checkpoint or export (checkpoints/step-N, hf/step-N)")
    return shelves


def show(shelves: list[Shelf]) -> int:
    """Print a table. Files are compared with the manifests by their sizes alone."""
    config = _config(shelves)
    rows: list[Sequence[str]] = [COLUMNS]
    for shelf in shelves:
        losses, why = shelf.losses(), shelf.reasons(committed(shelf.parent), config) if config else {}
        for path in shelf.found:
            loss = f"{losses[path]:.4f}" if path in losses else ""
            kept = (", ".join(why[path]) or "surplus") if path in why else ""
            rows.append((shelf.name(path), bytes_(tree_size(path)[1]), _saved(path), loss, kept, damage(path) or "whole"))
        rows += [(shelf.name(path), bytes_(tree_size(path)[1]), _saved(path), "", "", "left by an interrupted save") for path in shelf.left]
    print("\n".join(_aligned(rows)), flush=True)
    return EXIT_DONE


def verify(shelves: list[Shelf]) -> int:
    """Read everything and compare it with the checksums; a line a directory, then what to do about damaged ones."""
    code = EXIT_DONE
    for shelf in shelves:
        problems: dict[Path, str] = {}
        for path in shelf.found:
            if problem := damage(path, content=True):
                problems[path] = problem
            print(f"{shelf.name(path)}: {f'DAMAGED: {problem}' if problem else f'whole ({bytes_(tree_size(path)[1])})'}", flush=True)
        if problems:
            code = EXIT_FAILED
            print(_remedy(shelf, problems), flush=True)
    return code


def prune(shelves: list[Shelf], *, keep: int | None, damaged: bool, dry_run: bool) -> int:
    """Remove what the run's config (with `keep`: that many newest ones) does not keep, and leftovers; `damaged`: and damaged ones. What counts
    as whole has been read and compared with its checksums. Where none is whole, nothing goes.

    Raises RefusedError for a run that is running, a single step-N, and where neither a config nor `keep` tells what to keep."""
    if shelves[0].alone:
        raise RefusedError(f"checkpoint prune: {shelves[0].found[0]} is one of several; name its run, or the directory that it is in")
    for run in {shelf.run for shelf in shelves if shelf.run}:
        if run_dir.state(run) == "running":
            raise RefusedError(f"checkpoint prune: {run} is running, and removes by itself what its config does not keep; wait for its end")
    config = _config(shelves) or (CheckpointConfig() if keep else None)
    if config is None:
        raise RefusedError(f"checkpoint prune: {shelves[0].parent} belongs to no run whose config would say what to keep; add --keep N")
    config = replace(config, keep=keep, hf_keep=keep) if keep else config
    freed = [_prune(shelf, config, damaged=damaged, dry_run=dry_run) for shelf in shelves]
    print(f"{bytes_(sum(freed))} {'would be' if dry_run else 'are'} free again", flush=True)
    return EXIT_DONE


def _prune(shelf: Shelf, config: CheckpointConfig, *, damaged: bool, dry_run: bool) -> int:
    """Bytes that went."""
    problems = {path: damage(path, content=True) for path in shelf.found}
    whole = [path for path in shelf.found if problems[path] is None]
    why = shelf.reasons(whole, config)
    harmed = [path for path in shelf.found if problems[path] is not None]
    if not whole:
        print(f"{shelf.parent}: none is whole, so nothing is removed")
        return 0
    going = [(path, "left by an interrupted save") for path in shelf.left]
    going += [(path, "surplus") for path in whole if not why[path]]
    going += [(path, f"damaged: {problems[path]}") for path in harmed if damaged]
    freed = 0
    for path, reason in going:
        _, size = tree_size(path)
        if not dry_run:
            _remove(path)
        freed += size
        print(f"{'would remove' if dry_run else 'removed'} {shelf.name(path)} ({bytes_(size)}): {reason}", flush=True)
    for path in harmed if not damaged else []:
        print(f"left {shelf.name(path)}, damaged: {problems[path]}; add --damaged to remove it", flush=True)
    latest = shelf.parent / "latest"
    if not dry_run and latest.is_symlink() and not latest.exists():
        point_latest(next(path for path in reversed(whole) if why[path]))
    return freed


def _remove(path: Path) -> None:
    try:
        if has_step_name(path):
            remove(path)
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise RefusedError(f"checkpoint prune: {path} cannot be removed: {error.strerror}: {error.filename}") from None


def _remedy(shelf: Shelf, problems: dict[Path, str]) -> str:
    """What to do where `problems` were found."""
    owner = shelf.run or shelf.parent
    removal = f"remove what is damaged with: xtuner-hydra checkpoint prune {owner} --damaged"
    whole = [path for path in committed(shelf.parent) if path not in problems]
    if shelf.is_exports:
        again = f"write it anew with: xtuner-hydra export {owner} --to DIR --step {step_of(next(iter(problems)))}, if there is a checkpoint of it"
        return f"-> {again}" + (f"; {removal}" if whole else "")
    if whole:
        return f"-> checkpoint.resume=auto passes over it and goes on from another ({shelf.name(whole[-1])}); {removal}"
    return "-> no other is whole: bring it back from a copy, or start a new run in another directory"


def _run_of(parent: Path) -> Path | None:
    return parent.parent if parent.name in ("checkpoints", "hf") and run_dir.holds_run(parent.parent) else None


def _config(shelves: list[Shelf]) -> CheckpointConfig | None:
    """What the run keeps; None for copies that lie elsewhere."""
    run = shelves[0].run
    return load_run(run).config.checkpoint if run else None


def _saved(directory: Path) -> str:
    """When its manifest was written, which is the last of its files."""
    for path in (directory / MANIFEST, directory):
        try:
            return datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "minutes")
        except FileNotFoundError:
            continue
    return ""


def _aligned(rows: list[Sequence[str]]) -> list[str]:
    """Lines of a table: size and eval/loss to the right, a column that is empty but for its head left out."""
    columns = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in columns}
    right = {COLUMNS.index("size"), COLUMNS.index("eval/loss")}
    return ["  ".join(row[at].rjust(widths[at]) if at in right else row[at].ljust(widths[at]) for at in columns).rstrip() for row in rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtuner-hydra checkpoint", description="Look after what runs have saved.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    listed = verbs.add_parser(
        "list", help="checkpoints and exports: step, size, eval/loss, whether it is whole (by sizes) and why it stays"
    )
    verified = verbs.add_parser("verify", help="read everything and compare checksums; exit code 1 where something is damaged")
    pruned = verbs.add_parser("prune", help="remove what the run's config does not keep, and leftovers of interrupted saves")
    for verb, metavar in ((listed, "RUN_OR_CHECKPOINT"), (verified, "RUN_OR_CHECKPOINT"), (pruned, "RUN")):
        verb.add_argument("run", metavar=metavar, type=Path, help="the directory of a run, or of checkpoints (step-N)")
    pruned.add_argument(
        "--keep", type=_positive, metavar="N", help="newest checkpoints and exports to keep, instead of checkpoint.keep and hf_keep"
    )
    pruned.add_argument("--damaged", action="store_true", help="remove damaged ones too, where a whole one remains")
    pruned.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 must stay")
    return number
