"""The findings of a sweep, as the words and numbers that all its reports share: what won, by how much, whether by more than chance, what mattered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

from xtuner_hydra import words
from xtuner_hydra.reports import commands
from xtuner_hydra.reports.curves import Scale
from xtuner_hydra.reports.lead import Lead, pooled
from xtuner_hydra.results.sweep import SEED, JobResult, Setting, SweepResult

STATES = ("completed", "running", "waiting", "pruned", "failed", "killed", "interrupted", "damaged")
TGS, TOKENS = "throughput/e2e_tgs", "train/total_tokens"
NOTABLY_FASTER = 1.1
"""How many times as fast; the same work varies by less on a shared machine."""


def changes_speed(key: str) -> bool:
    """Whether another value of `key` can change the time of a step: another learning rate, schedule or seed does not."""
    return key in ("optimizer", "optimizer.name") or not (key.startswith(("optimizer.", "scheduler")) or key == SEED)


@dataclass(frozen=True)
class Effect:
    """How much a swept key moves the metric: the range of its values' means (of thirds, if nearly all values differ)."""

    key: str
    size: float


@dataclass(frozen=True)
class Findings:
    """A SweepResult and what follows from it. title: of the report; else the name of the sweep's directory."""

    result: SweepResult
    title: str = ""

    @property
    def heading(self) -> str:
        """The title, or the name of the sweep's directory."""
        return self.title or self.result.directory.name

    @property
    def metric(self) -> str:
        return self.result.plan.metric

    @cached_property
    def keys(self) -> list[str]:
        """The swept keys that distinguish settings, without the seed; all of them if there is only one setting."""
        seen = dict.fromkeys([*self.result.plan.swept, *(key for setting in self.settings for key in setting.swept)])
        keys = [key for key in seen if any(key in setting.swept for setting in self.settings)]
        varied = [key for key in keys if len({self.at(setting, key) for setting in self.settings}) > 1]
        return varied or [key for key in keys if key != SEED]

    @cached_property
    def short(self) -> dict[str, str]:
        """Swept key -> its short name."""
        return words.short(self.keys)

    @property
    def settings(self) -> list[Setting]:
        return self.result.settings

    @cached_property
    def ranked(self) -> list[Setting]:
        """The settings that have a value, best first."""
        return [setting for setting in self.settings if setting.mean is not None]

    @cached_property
    def stopped(self) -> list[Setting]:
        """The settings whose jobs the sweep stopped early, the best last value first."""
        return [setting for setting in self.settings if setting.stopped is not None]

    @property
    def shown(self) -> list[Setting]:
        """The settings that charts show."""
        return [*self.ranked, *self.stopped]

    @property
    def best(self) -> Setting | None:
        return self.result.best_setting

    @cached_property
    def digits(self) -> int:
        """Decimals of the metric that distinguish settings and show two digits of their noise."""
        apart = words.decimals(setting.mean for setting in self.ranked)
        return max(apart, min(5, 1 - math.floor(math.log10(self.noise) + 1e-6))) if self.noise else apart

    def number(self, value: float | None) -> str:
        """A value of the metric."""
        return words.fixed(value, self.digits)

    def difference(self, value: float, digits: int | None = None) -> str:
        """A difference of the metric, with as many digits as the metric or `digits`; one so small that it would be 0.00 keeps one digit."""
        text = words.fixed(value, self.digits if digits is None else digits)
        return text if float(text.replace(",", "")) or not value else words.value(value, 1)

    def score(self, setting: Setting) -> str:
        """`8.441 ± 0.021`; for a setting that was stopped early, its last value."""
        if setting.stopped is not None:
            return self.number(setting.stopped)
        return self.number(setting.mean) + (f" ± {self.difference(setting.spread)}" if setting.spread is not None else "")

    def name(self, setting: Setting) -> str:
        """`lr 6e-5, pack_max_length 2048`; if nothing was swept, the only setting."""
        return (
            ", ".join(f"{self.short[key]} {self.text(key, setting.swept[key], 3)}" for key in self.keys if key in setting.swept)
            or "the setting"
        )

    def job_name(self, job: JobResult) -> str:
        """The setting of a job and its seed."""
        parts = [f"{self.short.get(key, key.rpartition('.')[2])} {self.text(key, value, 3)}" for key, value in job.swept.items()]
        return ", ".join(parts) or job.name

    def at(self, setting: Setting, key: str) -> Any:
        """The setting's value of `key`, made hashable."""
        return _hashable(setting.swept.get(key))

    def text(self, key: str, value: Any, digits: int = 4) -> str:
        """A value of a swept key as text, distinct from the key's other values."""
        if (key, digits) not in self._texts:
            self._texts[key, digits] = words.apart({self.at(setting, key): None for setting in self.settings}, digits)
        return self._texts[key, digits].get(_hashable(value)) or words.value(value, digits)

    @cached_property
    def _texts(self) -> dict[tuple[str, int], dict[Any, str]]:
        return {}

    def rank(self, setting: Setting) -> int | None:
        """1 for the best; None for a setting without a value."""
        return self._ranks.get(id(setting))

    @cached_property
    def _ranks(self) -> dict[int, int]:
        """By identity: to compare settings would compare their runs."""
        return {id(setting): rank for rank, setting in enumerate(self.ranked, 1)}

    def setting_of(self, job: JobResult) -> Setting:
        return self._settings[job.number]

    @cached_property
    def _settings(self) -> dict[int, Setting]:
        """By the numbers of their jobs."""
        return {job.number: setting for setting in self.settings for job in setting.jobs}

    # --- who won, and whether it is more than chance

    @cached_property
    def lead(self) -> Lead | None:
        """The best setting against the next one."""
        return self._against(self.ranked[1]) if len(self.ranked) > 1 else None

    def _against(self, other: Setting) -> Lead:
        return Lead(self.ranked[0], other, self.result.plan.sign, *pooled(self.ranked))

    @cached_property
    def noise(self) -> float | None:
        """Standard deviation between jobs that differ in their seed alone, pooled over all settings; None where no setting has two values."""
        return pooled(self.ranked)[0]

    @property
    def verdict(self) -> str:
        """Lead.verdict of the lead; `alone` if there is nothing to compare with."""
        return self.lead.verdict if self.lead else "alone"

    @property
    def verdict_text(self) -> str:
        """Whether the lead is more than chance, in a sentence."""
        if self.lead is None:
            return "There is nothing to compare it with yet." if self.ranked else self._unanswered
        if self.verdict == "tie":
            return "First and second have the same value."
        if self.verdict == "unknown":
            ahead = f"{self.difference(self.lead.size)} between first and second"
            return f"{ahead}. One seed per setting, so chance is not ruled out: run the best ones again with trainer.seed=0,1,2."
        end = {
            "clear": "not chance.",
            "unsure": "likely, not certain. More seeds would tell.",
            "chance": "within chance. More seeds would tell.",
        }
        return f"{self._paired(self.lead) if self.lead.pairs else self._against_noise(self.lead)}: {end[self.verdict]}"

    def _paired(self, lead: Lead) -> str:
        """`Ahead on all 3 seeds, by 0.051 ± 0.007`."""
        number, ahead = len(lead.pairs), sum(pair > 0 for pair in lead.pairs)
        shared = " shared" if number < max(len(lead.first.values), len(lead.second.values)) else ""
        on = ("both" if number == 2 else f"all {number}") if ahead == number else f"{ahead} of {number}"
        digits = max(2, min(6, -math.floor(math.log10(lead.spread) + 1e-6))) if lead.spread else self.digits
        by = self.difference(mean(lead.pairs), digits) + (f" ± {self.difference(lead.spread, digits)}" if lead.spread else " on each")
        return f"Ahead on {on}{shared} seeds, by {by}"

    def _against_noise(self, lead: Lead) -> str:
        if not lead.noise:
            return f"{self.difference(lead.size)} between first and second, with no spread between seeds"
        spread = f"the seed spread of {self.difference(lead.noise)}"
        return f"{self.difference(lead.size)} between first and second, {lead.size / lead.noise:.1f} times {spread}"

    @cached_property
    def answer(self) -> str:
        """The sweep in one sentence."""
        best = self.best
        if best is None:
            return self._unanswered
        if self.verdict == "chance":
            second = self.ranked[1]
            return f"{self.name(best)} and {self.name(second)} cannot be told apart: {self.metric} {self.score(best)} against {self.score(second)}."
        seeds = f" over {words.counted(len(best.values), 'seed')}" if len(best.values) > 1 else ""
        score = f"{self.metric} {self.score(best)}{seeds}"
        if self.verdict == "tie":
            return f"{self._tied()} tie{' so far' if self.unfinished else ''}: {score}."
        return f"{self.name(best)}{self._stands}: {score}{self._ahead()}." if self.keys else f"{score}."

    @property
    def _unanswered(self) -> str:
        """Why there is no ranking."""
        if not self.result.count("running", "waiting"):
            end = f"ended with a finite {self.metric}" if self.result.count("completed") else "has completed"
            return f"No job {end}, so there is no ranking."
        ends = {"failed": "ended by a failure", "interrupted": "interrupted"}
        why = ends.get(self.result.plan.state)
        return f"The sweep was {why} before any job completed." if why else "No job has completed yet."

    @property
    def _stands(self) -> str:
        """The verb of the headline: only what is beyond chance wins."""
        if len(self.settings) == 1:
            return ""
        if self.unfinished:
            return " leads so far"
        others = sum(job.state == "completed" and job.value is None for job in self.result.jobs)
        alone = f" is the only one with a finite {self.metric}" if others else " is the only one that completed"
        return {"clear": " wins", "alone": alone}.get(self.verdict, " leads")

    def _ahead(self) -> str:
        """`, 0.051 below the next (lr 2e-4)`."""
        if self.lead is None:
            return ""
        side = "below" if self.result.plan.direction == "minimize" else "above"
        which = "the next that ran to its end" if self._stopped_better_than(self.ranked[1]) else "the next"
        text = f", {self.difference(self.lead.size)} {side} {which}"
        return text + (f" ({self.name(self.ranked[1])})" if len(self.keys) < 3 else "")

    def _stopped_better_than(self, setting: Setting) -> bool:
        """Whether a setting that was stopped early was already better by then."""
        if not self.stopped or self.stopped[0].stopped is None or setting.mean is None:
            return False
        early = self.stopped[0].stopped
        return self.result.plan.sign * (early - setting.mean) < 0

    def _tied(self) -> str:
        """The settings that share first place."""
        tied = [setting for setting in self.ranked if setting is self.best or self._against(setting).verdict == "tie"]
        if len(tied) > 3:
            return f"{len(tied)} settings"
        return ", ".join(map(self.name, tied[:-1])) + f" and {self.name(tied[-1])}"

    @property
    def unfinished(self) -> bool:
        """Whether jobs are still to come."""
        planned = self.result.plan.total - len(self.result.jobs)
        return bool(self.result.count("running", "waiting")) or (planned > 0 and self.result.plan.state == "running")

    # --- what mattered

    @cached_property
    def effects(self) -> list[Effect]:
        """One per swept key, largest first; keys with one value among the ranked settings are left out."""
        found = [Effect(key, size) for key in self.keys if (size := self._effect(key)) is not None]
        return sorted(found, key=lambda effect: -effect.size)

    def _effect(self, key: str) -> float | None:
        points = [(self.at(setting, key), setting.mean) for setting in self.ranked if setting.mean is not None]
        groups: dict[Any, list[float]] = {}
        for value, score in points:
            groups.setdefault(value, []).append(score)
        if len(groups) < 2:
            return None
        if len(groups) > 0.7 * len(points) and len(points) >= 6 and Scale.of(groups).kind != "places":
            scores = [score for _, score in sorted(points, key=lambda point: point[0])]
            third = max(1, len(scores) // 3)
            parts = [scores[:third], scores[third:-third], scores[-third:]]
        else:
            parts = list(groups.values())
        means = [mean(part) for part in parts if part]
        return max(means) - min(means)

    @property
    def effects_text(self) -> str:
        """`lr moves eval/loss by 0.91, pack_max_length by 0.12.`; nothing for fewer than two keys."""
        if len(self.effects) < 2:
            return ""
        first, *others = self.effects[:4]
        text = f"{self.short[first.key]} moves {self.metric} by {self.difference(first.size)}"
        return ", ".join([text, *(f"{self.short[effect.key]} by {self.difference(effect.size)}" for effect in others)]) + "."

    @property
    def telling_keys(self) -> list[str]:
        """The swept keys, those that move the metric most first."""
        moved = [effect.key for effect in self.effects]
        return moved + [key for key in self.keys if key not in moved]

    # --- speed

    def faster(self) -> tuple[Setting, float] | None:
        """(the setting with the most tokens per second, how many times as fast as the best one it is), if the two differ in a key that can change
        speed, and by more than such measurements vary."""
        if self.best is None or not (own := self.average(self.best, TGS)):
            return None
        others = [(speed / own, setting) for setting in self.comparable_speeds if (speed := self.average(setting, TGS)) is not None]
        times, setting = max(others, key=lambda pair: pair[0], default=(1.0, self.best))
        return (setting, times) if times > NOTABLY_FASTER else None

    @property
    def comparable_speeds(self) -> list[Setting]:
        """The ranked settings that can be faster or slower than the best one: the others do the same work."""
        best = self.best
        if best is None:
            return []
        return [one for one in self.ranked if any(changes_speed(key) and self.at(one, key) != self.at(best, key) for key in self.keys)]

    # --- whether it is fair

    @property
    def unfair(self) -> str | None:
        """Why ranked settings do not compare, in half a sentence; None if they do."""
        reasons = self.result.unfair if len(self.ranked) > 1 else []
        return reasons[0].partition(", so")[0].rstrip(".") if reasons else None

    @cached_property
    def tokens(self) -> list[int]:
        """Training tokens of the jobs that count."""
        return [int(tokens) for job in self.result.jobs if job.value is not None and (tokens := job.last(TOKENS)) is not None]

    @cached_property
    def eval_tokens(self) -> list[int]:
        """Supervised held-out tokens of the jobs that count, each number once."""
        counts = {int(tokens) for job in self.result.jobs if job.value is not None and (tokens := job.last("eval/tokens")) is not None}
        return sorted(counts)

    def span(self, numbers: Sequence[int]) -> str:
        """`1,000`, or `1,000 to 1,010`."""
        return f"{min(numbers):,}" + (f" to {max(numbers):,}" if min(numbers) != max(numbers) else "")

    @property
    def basis(self) -> list[tuple[str, str]]:
        """How the jobs were compared, as name and value."""
        plan = self.result.plan
        side = "lowest" if plan.direction == "minimize" else "highest"
        rows = [("decides", f"{plan.metric}, {side}, its last value in each completed job")]
        if self.eval_tokens:
            rows.append(
                ("held-out tokens", self.span(self.eval_tokens) + " supervised" + (" in every job" if len(self.eval_tokens) == 1 else ""))
            )
        if self.tokens:
            rows.append(("training tokens", self.span(self.tokens) + " per job"))
        if self.noise is not None:
            rows.append(
                ("spread", f"standard deviation over the jobs of a setting; {self.difference(self.noise)} pooled over all settings")
            )
            rows.append(("a lead is clear", "beyond the 95 % interval of chance (Student's t), no winner below one standard error"))
        if self.lead and (self.lead.pairs or self.noise is not None):
            rows.append(("chance is judged by", self._judged_by(self.lead)))
        rows.append(("search", plan.search))
        if plan.state:
            rows.append(("sweep", plan.state))
        return rows

    @staticmethod
    def _judged_by(lead: Lead) -> str:
        if not lead.pairs:
            return "the pooled spread, as first and second do not share two seeds"
        return (
            f"the differences between first and second on the {len(lead.pairs)} seeds that both have (a seed starts alike in every setting)"
        )

    # --- how it stands

    def state(self, jobs: Sequence[JobResult]) -> str:
        """`2 completed`, `1 completed, 1 failed`."""
        return ", ".join(f"{n} {state}" for state in STATES if (n := sum(job.state == state for job in jobs))) or words.counted(
            len(jobs), "job"
        )

    def setting_state(self, setting: Setting) -> str:
        """`completed`, `2 completed, 1 failed`, `stopped early at 1,200 tokens`."""
        if setting.stopped is not None and (tokens := self.average(setting, TOKENS)) is not None:
            return f"stopped early at {tokens:,.0f} tokens"
        return setting.jobs[0].state if len(setting.jobs) == 1 else self.state(setting.jobs)

    @property
    def standing(self) -> str:
        """`18 jobs: 17 completed, 1 failed; 42 min`."""
        plan = self.result.plan
        to_come = plan.total - len(self.result.jobs)
        states = self.state(self.result.jobs) if self.result.jobs else "none started"
        text = f"{words.counted(max(plan.total, len(self.result.jobs)), 'job')}: {states}"
        text += f", {to_come} to come" if to_come > 0 else ""
        return text + (f"; {words.duration(plan.seconds)}" if plan.seconds else "")

    @property
    def failures(self) -> list[JobResult]:
        """Jobs that ended badly, in their order."""
        return [job for job in self.result.jobs if job.state in ("failed", "killed", "interrupted", "damaged")]

    def average(self, setting: Setting, metric: str) -> float | None:
        """Mean of the last `metric` over the setting's jobs, the completed ones if there are any; None if none has it."""
        jobs = [job for job in setting.jobs if job.state == "completed"] or setting.jobs
        values = [value for job in jobs if (value := job.last(metric)) is not None and math.isfinite(value)]
        return mean(values) if values else None

    @property
    def has_repeats(self) -> bool:
        """Whether any setting has more than one seed."""
        return any(setting.seeds > 1 for setting in self.settings)

    # --- what to do next

    @property
    def next(self) -> list[tuple[str, str]]:
        """What to run next, as (what it does, command), the most urgent first."""
        steps = []
        if command := commands.resume(self.result):
            running = self.result.plan.state == "running"
            steps.append(("If the sweep is stopped, continue it" if running else "Run what is missing, failed or interrupted", command))
        if self.repeat and self.result.best_job:
            steps.append((f"Repeat the best single job ({self.job_name(self.result.best_job)})", self.repeat))
        if self.refine:
            command, jobs = self.refine
            steps.append((f"Look closer around the best setting ({words.counted(jobs, 'job')})", command))
        return steps

    @cached_property
    def repeat(self) -> str | None:
        """The command that runs the best job again."""
        return commands.repeat(self.result, self.result.best_job) if self.result.best_job else None

    @cached_property
    def refine(self) -> tuple[str, int] | None:
        """The command that looks closer around the best setting, and its jobs."""
        if self.best is None:
            return None
        job = next(job for job in self.best.jobs if job.value is not None)
        return commands.refine(self.result, job, self.telling_keys)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
