"""Scalars for TensorBoard, by step."""

from __future__ import annotations

from pathlib import Path

from xtuner_hydra.tracking.base import Row


class TensorBoardTracker:
    """Writes every metric of a row as a scalar at `train/step`."""

    required = False

    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier process wrote after the step that this one goes on from
        self.writer = SummaryWriter(directory, purge_step=start_step + 1 if directory.exists() else None)

    def log(self, row: Row) -> None:
        """Write the row's scalars; the file is flushed every two minutes and at the end."""
        for name, value in row.items():
            if name != "train/step" and value is not None:
                self.writer.add_scalar(name, value, row["train/step"])

    def finish(self, state: str, exit_code: int) -> None:
        """Flush and close."""
        self.writer.close()
