"""What a run prints: log files for every rank, XTuner's lines on the first one's screen, and a progress bar if the screen is a terminal."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from xtuner_hydra.safe_text import LineFormatter, redact
from xtuner_hydra.tracking.base import Row, Sample

log = logging.getLogger("xtuner_hydra")


class ConsoleTracker:
    """Logs a line per row and moves the progress bar."""

    required = False

    def __init__(self, total_steps: int, start_step: int, aux_coef: float = 0.0) -> None:
        """aux_coef: the weight of `train/aux_loss` in the loss that is trained."""
        self.total_steps = total_steps
        self.aux_coef = aux_coef
        # disable=None: no bar where stderr is not a terminal
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr, disable=None)

    def log(self, row: Row) -> None:
        """Log the row."""
        if "eval/loss" in row:
            log.info(eval_line(row))
            return
        log.info(step_line(row, self.total_steps, self.aux_coef))
        self.bar.set_postfix_str(f"loss {row['train/loss']:.3f}", refresh=False)
        self.bar.update(int(row["train/step"] or 0) - self.bar.n)

    def show(self, samples: list[Sample]) -> None:
        """Log the prompts and answers."""
        for sample in samples:
            log.info(f"Sample after step {sample['train/step']}: {sample['prompt']!r} -> {sample['text']!r}")

    def finish(self, state: str, exit_code: int) -> None:
        """Leave the bar where it is."""
        self.bar.close()


def step_line(row: Row, total_steps: int, aux_coef: float = 0.0) -> str:
    """A step in the format of XTuner's log lines."""
    total_loss = (row["train/loss"] or 0) + aux_coef * (row.get("train/aux_loss") or 0)
    return (
        f"Step {row['train/step']}/{total_steps} data_time: {row['throughput/data_time']:.4f} lr: {row['train/lr']:.6f} "
        f"time: {row['throughput/step_time']:.4f} text_tokens: {row['train/tokens']:.1f} total_loss: {total_loss:.3f} "
        f"reduced_llm_loss: {row['train/loss']:.3f} max_memory: {row['memory/max_gb']:.2f} GB reserved_memory: {row['memory/reserved_gb']:.2f} GB "
        f"grad_norm: {row['train/grad_norm']:.3f} tgs: {row['throughput/tgs']:.1f} e2e_tgs: {row['throughput/e2e_tgs']:.1f}"
    )


def eval_line(row: Row) -> str:
    """An evaluation."""
    return f"Evaluation after step {row['train/step']} eval_loss: {row['eval/loss']:.4f} perplexity: {row['eval/perplexity']:.4g}"


def setup_logging(run_dir: Path, rank: int, *, terminal: bool) -> None:
    """Send the log to logs/rank{rank}.log and, for `terminal`, to the screen. A record with `file_only` stays off the screen."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):  # from an earlier run in this process
        log.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_LogFile(run_dir / "logs" / f"rank{rank}.log", encoding="utf-8")]
    if terminal:
        handlers.append(_Screen())
        handlers[-1].addFilter(lambda record: not getattr(record, "file_only", False))
    for handler in handlers:
        handler.setFormatter(LineFormatter(f"[xtuner_hydra][RANK {rank}][%(asctime)s][%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    threading.excepthook = _a_thread_died


def _a_thread_died(died: threading.ExceptHookArgs) -> None:
    """A sentence in place of a traceback on the screen: such threads are TensorBoard's and W&B's, and training continues without them."""
    if died.exc_type is SystemExit:  # it ended on purpose
        return
    name = died.thread.name if died.thread else "a thread"
    log.warning(redact(f"{name} has ended: {died.exc_type.__name__}: {died.exc_value}"))
    trace = "".join(traceback.format_exception(died.exc_type, died.exc_value, died.exc_traceback))
    log.warning(redact(trace), extra={"file_only": True})


class _LogFile(logging.FileHandler):
    """A rank's log file. If it cannot be written, on a full disk, it reports that once and stops; the screen continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        self.setLevel(logging.CRITICAL + 1)  # removing it now would make the logger skip the next handler
        with suppress(OSError):
            self.close()  # or its buffer would be written again at the end
        log.warning(f"{self.baseFilename}: {error.strerror}; nothing more is logged there")


class _Screen(logging.Handler):
    """Lines on stdout that leave the progress bar intact."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the reader (`| head`) has gone; the log file has everything
            log.removeHandler(self)
