"""Keeps as many runs of a sweep going as there is room for, until none is asked for any more; asks for none itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dptrain.errors import ConfigError
from dptrain.runtime.launcher import GRACE_S
from dptrain.runtime.restart_policy import Attempts, RestartPolicy
from dptrain.runtime.signals import EXIT_RESUMABLE, NotedSignals
from dptrain.sweep import Course, CourseLog, Search, SweepRun, SweepSpec
from dptrain.sweep.child_runs import RunProcess, Site
from dptrain.sweep.folder import SweepFolder
from dptrain.sweep.search import search
from dptrain.sweep.view import Standing, SweepView
from dptrain.tracking.run_folder import holds_run, newest_step

_TICK_S = 0.02
_READ_EVERY_S = 0.25
_REPEAT_S = 2.0  # what comes sooner is the same request; a later one means it
_FINER = 10
"""By how much more often to evaluate is suggested where the first evaluation comes too late."""
_EXIT_SETTINGS, _EXIT_DIVERGED = 2, 65


class SignalHandler(NotedSignals):
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered.

    Attributes:
        asked: whether one came.
        insisted: whether another one came some seconds later.
    """

    def __init__(self) -> None:
        super().__init__((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        self.asked = False
        self.insisted = False
        self._first_s = 0.0

    def _note(self, number: int) -> None:  # noqa: ARG002 - each of them is a request to stop
        if not self.asked:
            self.asked, self._first_s = True, time.monotonic()
        self.insisted = self.insisted or time.monotonic() - self._first_s > _REPEAT_S


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a sweep came to its end, for now.

    Attributes:
        searches: of its batches.
        failures: exit codes of runs that failed in a way that another attempt would not mend.
        was_stopped: whether it was asked to stop.
    """

    searches: tuple[Search, ...]
    failures: Mapping[SweepRun, int]
    was_stopped: bool


class SweepLoop:
    """The runs of a sweep, as many at a time as there is room for.

    What runs are asked for, and which of them have gone far enough, is read from their logs and decided by `search`;
    nothing is remembered that a new sweep in the same folder would not find.

    Args:
        spec: of the sweep.
        folder: of the sweep.
        site: where runs go.
        max_skipped_steps: after which a run counts as diverged.
    """

    def __init__(self, spec: SweepSpec, *, folder: SweepFolder, site: Site, max_skipped_steps: int) -> None:
        self._spec = spec
        self._folder = folder
        self._site = site
        self._max_skipped_steps = max_skipped_steps
        self._logs: dict[SweepRun, CourseLog] = {}
        self._courses: dict[SweepRun, Course] = {}
        self._running: dict[SweepRun, tuple[int, RunProcess]] = {}
        self._attempts: dict[SweepRun, Attempts] = {}
        self._failures: dict[SweepRun, int] = {}
        self._began_s = 0.0
        self._began_at: dict[SweepRun, float] = {}

    def course_of(self, run: SweepRun) -> Course:
        """Return how far a run was when its log was last read; it is read where it never was."""
        return self._courses[run] if run in self._courses else self._read(run)

    def _read(self, run: SweepRun) -> Course:
        log = self._logs.setdefault(
            run, CourseLog(self._folder.run_dir(run), max_skipped_steps=self._max_skipped_steps)
        )
        self._courses[run] = log.read()
        self._check_evaluations(run)
        return self._courses[run]

    def _check_evaluations(self, run: SweepRun) -> None:
        """Refuse to go on where evaluations are too rare to see a target crossed: every further run would be lost."""
        course = self._courses[run]
        early = [target for target in self._spec.targets if course.is_early(target)]
        # An evaluation after the very first step cannot be made earlier: such a batch is too large for the target.
        if early and course.positions[0] > run.global_batch_size:
            first = int(course.positions[0])
            finer = max(run.global_batch_size, first // _FINER)
            raise ConfigError(
                f"run {run.name} has reached target {early[0]:g} at its first evaluation ({first:,} samples), so its "
                f"steps to the target are unknown: set --log.eval-every-samples {finer} or give "
                f"lower --targets, with another --out"
            )

    def run(self, view: SweepView) -> Ending:
        """Train until all batches are done, a run fails for good, or somebody asks to stop.

        Raises:
            ConfigError: where a run says that its settings are wrong, or a target is crossed before the first
                evaluation; the other runs would end the same.
        """
        self._began_s, read_s = time.monotonic(), 0.0
        searches = self._search()
        with SignalHandler() as stop:
            try:
                while True:
                    ended = self._take_ended(view, searches)
                    if ended or time.monotonic() - read_s > _READ_EVERY_S:
                        for run in self._running:
                            self._read(run)
                        searches, read_s = self._search(), time.monotonic()
                        view.update(self._standing(searches))
                    self._stop_what_is_settled(searches, everything=stop.asked)
                    if not stop.asked:
                        self._start_what_is_asked_for(searches)
                    if not self._running:
                        return Ending(searches=searches, failures=self._failures, was_stopped=stop.asked)
                    if stop.insisted:
                        self._kill()
                    time.sleep(_TICK_S)
            finally:
                self._kill()

    def _search(self) -> tuple[Search, ...]:
        return tuple(search(self._spec, batch, self.course_of) for batch in self._spec.batch_sizes)

    def _standing(self, searches: tuple[Search, ...]) -> Standing:
        gained = sum(max(self.course_of(run).positions, default=0.0) - before for run, before in self._began_at.items())
        speed = gained / (time.monotonic() - self._began_s)
        return Standing(searches=searches, running=tuple(self._running), samples_per_s=speed)

    def _stop_what_is_settled(self, searches: tuple[Search, ...], *, everything: bool) -> None:
        asked_for = set() if everything else {run for found in searches for run in found.unsettled}
        for run, (_, process) in self._running.items():
            if run not in asked_for:
                process.stop()

    def _start_what_is_asked_for(self, searches: tuple[Search, ...]) -> None:
        free = sorted(set(range(self._site.num_parallel)) - {slot for slot, _ in self._running.values()}, reverse=True)
        for found in searches:
            for run in found.unsettled:
                if free and run not in self._running and run not in self._failures:
                    self._running[run] = (slot := free.pop(), self._start(run, slot=slot))

    def _start(self, run: SweepRun, *, slot: int) -> RunProcess:
        self._folder.wait_for(run)
        run_dir = self._folder.run_dir(run)
        self._began_at.setdefault(run, max(self.course_of(run).positions, default=0.0))
        settings = {
            "config": self._folder.config,
            "run_dir": run_dir,
            "global_batch_size": run.global_batch_size,
            "optimizer.learning_rate": run.learning_rate,
            "seed": run.seed,
            "max_samples": self._spec.max_samples(run.global_batch_size),
            "replicas": self._site.num_replicas,
        }
        return RunProcess(
            [
                "train",
                *(f"--{name}={value}" for name, value in settings.items()),
                *(["--resume"] if holds_run(run_dir) else []),
            ],
            log=self._folder.log(run),
            environment=self._site.environment(slot),
            fork=not self._site.gpus,
        )

    def _take_ended(self, view: SweepView, searches: tuple[Search, ...]) -> bool:
        ended = [(run, process) for run, (_, process) in self._running.items() if process.code is not None]
        for run, process in ended:
            del self._running[run]
            self._note(run, process)
            view.ended(run, self._standing(searches))
        return bool(ended)

    def _note(self, run: SweepRun, process: RunProcess) -> None:
        course, code = self._read(run), process.code or 0
        if code in (0, _EXIT_DIVERGED):
            # As its log says, too, unless the disk was full or the log leaves steps out.
            self._courses[run] = replace(course, is_over=True, has_diverged=code == _EXIT_DIVERGED)
        elif code == _EXIT_SETTINGS:
            raise ConfigError(f"{process.last_line().removeprefix('dptrain train: ')} (run {run.name})")
        elif not process.is_asked_to_stop and not self._is_worth_another(run, code):
            self._failures[run] = code

    def _is_worth_another(self, run: SweepRun, code: int) -> bool:
        """Whether to start a run again. What may pass, `dptrain train` has tried to mend; all but its own death."""
        if code > 0 and code != EXIT_RESUMABLE:
            return False
        step = newest_step(self._folder.run_dir(run))
        verdict = RestartPolicy().decide(self._attempts.get(run, Attempts()), code=128 + signal.SIGKILL, step=step)
        self._attempts[run] = verdict.attempts
        return verdict.again

    def _kill(self) -> None:
        """End what is left; on the way out of an error, after a chance to save."""
        deadline_s = time.monotonic() + GRACE_S
        for _, process in self._running.values():
            process.stop()
        while any(process.code is None for _, process in self._running.values()):
            if time.monotonic() > deadline_s:
                for _, process in self._running.values():
                    process.kill()
            time.sleep(_TICK_S)
