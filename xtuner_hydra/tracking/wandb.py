"""Weights & Biases. Online only with an API key, else offline; the step metric is `train/step`; finished with the run's exit code."""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from xtuner_hydra.config.schema import WandbConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.files import write_text
from xtuner_hydra.tracking.base import Row

log = logging.getLogger("xtuner_hydra")

ONLINE_SECONDS = 30
"""How long to wait for the server before the run goes on offline."""

_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # W&B's service, by its name since wandb 0.31 and by the one before


class WandbTracker:
    """One W&B run under run_dir/wandb. Its id is kept there, so that a resumed run continues the same one."""

    required = False

    def __init__(self, config: WandbConfig, run_dir: Path, resolved: dict[str, Any], overrides: list[str]) -> None:
        import wandb

        mode = resolve_mode(config)
        arguments: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "name": config.name or run_dir.name,
            "tags": config.tags,
            "job_type": "train",
            "config": {**resolved, "overrides": overrides},
            "dir": str(run_dir),
            "id": _run_id(run_dir / "wandb" / "run_id"),
            "resume": "allow",
            "reinit": "finish_previous",
            "settings": wandb.Settings(silent=True, console="off", init_timeout=ONLINE_SECONDS),
        }
        try:
            self.run = wandb.init(mode=mode, **arguments)
        except wandb.Error as error:
            if mode != "online" or config.mode == "online":
                raise
            log.warning(f"W&B cannot be reached ({error}); writing an offline run, `wandb sync` uploads it later")
            wandb.teardown()  # W&B's service still holds the run id of the attempt, and would refuse it
            self.run = wandb.init(mode="offline", **arguments)
        self.run.define_metric("train/step")
        self.run.define_metric("*", step_metric="train/step")
        log.info(f"W&B: {self.run.dir if self.run.offline else self.run.url}")

    def log(self, row: Row) -> None:
        """Send the row, `train/step` among its values."""
        self.run.log({name: value for name, value in row.items() if value is not None})

    def finish(self, state: str, exit_code: int) -> None:
        """End the W&B run as this one ended."""
        self.run.summary["state"] = state
        self.run.finish(exit_code=exit_code)


def resolve_mode(config: WandbConfig) -> Literal["online", "offline"]:
    """`online` or `offline`. Raises ConfigError for an online run without an API key, rather than ask for one."""
    if config.mode == "online" and not has_api_key():
        raise ConfigError("tracking.wandb.mode", "online", "there is no API key; set WANDB_API_KEY, run `wandb login`, or use offline")
    if config.mode == "auto":
        return "online" if has_api_key() and os.environ.get("WANDB_MODE") not in ("offline", "disabled") else "offline"
    return "online" if config.mode == "online" else "offline"


def has_api_key() -> bool:
    """True where W&B would find a key without asking: in the environment, or in netrc for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(own).hostname or "",) if own else _HOSTS
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
        return any(entries.authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")
