"""Run and sweep directories as training leaves them, made without training."""

import json
from dataclasses import asdict

import yaml

from xtuner_hydra import run_dir
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig
from xtuner_hydra.results.sweep import Job, SweepPlan

ENVIRONMENT = {
    "time": "2026-01-02T03:04:05+00:00",
    "command": "xtuner_hydra optimizer.lr=1e-4",
    "versions": {"torch": "2.13.0", "wandb": None},
    "hardware": {"host": "h", "system": "Linux", "cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "gpus": []},
    "git": {"commit": "0123456789abcdef", "dirty": True, "diff": "-<old>\n+<new>"},
}


def config(**values):
    """A small model's config; `values` by full key with `__` for the dot."""
    made = Config(
        model=ModelConfig(
            vocab_size=300,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        ),
        data=DataConfig(path="chats.jsonl"),
    )
    for key, value in values.items():
        group, _, name = key.partition("__")
        setattr(getattr(made, group), name, value)
    return made


def step(number, loss, **more):
    return {
        "train/step": number,
        "train/total_tokens": 100 * number,
        "train/loss": loss,
        "train/lr": 1e-4 / number,
        "train/grad_norm": 1.0 / number,
        "throughput/tgs": 110.0,
        "throughput/e2e_tgs": 100.0,
        "throughput/pack_utilization": 0.95,
        "memory/max_gb": 1.5,
        **more,
    }


def evaluation(number, loss, tokens=500):
    return {"train/step": number, "train/total_tokens": 100 * number, "eval/loss": loss, "eval/perplexity": 2.0, "eval/tokens": tokens}


def make_run(directory, rows, state="completed", *, overrides=(), error=None, pruned=None, **values):
    """A run directory with `rows` as its metrics; `values`: see `config`."""
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(asdict(config(**values)), sort_keys=False))
    (directory / "overrides.yaml").write_text("".join(f"- {json.dumps(override)}\n" for override in overrides) or "[]\n")
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "logs" / "rank0.log").write_text("a log\n")
    metrics = {name: value for row in rows for name, value in row.items()}
    done = int(metrics.get("train/step", 0))
    run_dir.write_status(
        directory, state, error=error, step=done, total_steps=done, metrics=metrics, **({"pruned": pruned} if pruned else {})
    )
    return directory


def make_sweep(directory, jobs, *, total=None, state="completed", metric="eval/loss", direction="minimize", seconds=90.0):
    """A sweep's directory. jobs: (swept values by full key, what make_run takes, or None for a job that waits) each."""
    directory.mkdir(exist_ok=True)
    planned, swept = [], list(dict.fromkeys(key for values, _ in jobs for key in values))
    for number, (values, run) in enumerate(jobs):
        overrides = [f"{key}={value}" for key, value in values.items()]
        planned.append(Job(number, f"{number}_job", overrides, f"signature{number}", attempts=int(run is not None)))
        if run is not None:
            keys = {key.replace(".", "__"): value for key, value in values.items()}
            make_run(directory / f"{number}_job", **{"overrides": ["debug=fast", *overrides], **keys, **run})
    plan = SweepPlan([], "grid", metric, direction, "best", swept, total or len(jobs), planned, state, seconds)
    plan.save(directory)
    return directory


def finished(loss, train=None, steps=3, **more):
    """What make_run takes for a job that ended with the evaluation loss `loss`."""
    rows = [step(number, (train or loss) + steps - number) for number in range(1, steps + 1)]
    return {"rows": [*rows, evaluation(steps, loss, more.pop("tokens", 500))], **more}
