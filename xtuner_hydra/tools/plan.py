"""`plan [overrides]`, `plan -m [overrides]`: do all that comes before training, print what would happen, and stop."""

from __future__ import annotations

from xtuner_hydra.app import App
from xtuner_hydra.errors import EXIT_DONE
from xtuner_hydra.safe_text import printable


def main(argv: list[str]) -> int:
    """Print the plan of a run or a sweep; refuses what that would refuse."""
    with App(argv) as app:
        if app.shows_something():
            return EXIT_DONE
        if app.is_sweep:
            return _sweep(app)
        composition = app.compose_run()  # refuses what can be refused before torch is imported
    from xtuner_hydra import forecast
    from xtuner_hydra.launch import prepare

    print(printable("\n".join(forecast.of_run(prepare(composition)))))
    return EXIT_DONE


def _sweep(app: App) -> int:
    resuming = bool(app.sweep_config().resume)
    from xtuner_hydra import forecast, run_dir
    from xtuner_hydra.sweeps.draft import draft
    from xtuner_hydra.sweeps.driver import SETTLED
    from xtuner_hydra.sweeps.multirun import choose_launcher, resumed

    if resuming:
        with resumed(app) as (recorded, sweep, plan):
            done = {job.signature for job in plan.jobs if run_dir.state(sweep.directory / job.name) in SETTLED}
            print("\n".join(forecast.of_sweep(sweep, choose_launcher(recorded, sweep), done)))
    else:
        sweep = draft(app, app.sweep_dir())
        print("\n".join(forecast.of_sweep(sweep, choose_launcher(app, sweep))))
    return EXIT_DONE
