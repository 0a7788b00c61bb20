"""Whether replicas that ended are started again: a pure policy over exit codes and checkpoints; starts nothing."""

from __future__ import annotations

from dataclasses import dataclass

_FINAL = frozenset(
    {
        0,  # done
        2,  # wrong settings stay wrong
        65,  # the same data would diverge again
        69,  # replicas that cannot meet need help
        74,  # storage that fails needs repair
        75,  # stopped on request
        76,  # replicas that disagree want to be looked at
    }
)
"""Exit codes after which another attempt would end the same, or is not wanted. Every other cause may be gone next
time: a signal that killed a replica, a crash, a hang."""


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """What is known of the attempts so far.

    Attributes:
        num_restarts: made so far.
        num_fruitless: the latest restarts, in a row, that are not known to have brought a new checkpoint.
        step: newest checkpoint when the latest attempt began; 0 where there was none.
        failure: what an exception said that ended the latest attempt, and at which step; empty for any other end.
    """

    num_restarts: int = 0
    num_fruitless: int = 0
    step: int = 0
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done after an attempt.

    Attributes:
        again: whether to start the replicas again.
        reason: why not, where another attempt could have been made; else empty.
        attempts: for the next decision.
    """

    again: bool
    reason: str
    attempts: Attempts


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """Restarts after transient causes for as long as that leads anywhere.

    A run has an end, and at most `max_fruitless` restarts are made for each new checkpoint on the way to it: so the
    policy comes to an end without a budget. A budget on top is for who pays for each attempt.

    Attributes:
        max_restarts: in the whole run; None for as many as it takes.
        max_fruitless: in a row, without a new checkpoint in between.
    """

    max_restarts: int | None = None
    max_fruitless: int = 3

    def decide(self, attempts: Attempts, *, code: int, step: int, failure: str = "") -> Verdict:
        """Decide after an attempt.

        Args:
            attempts: so far, the one that has just ended among them.
            code: exit code of its root cause; 128 + n where signal n killed a replica.
            step: of the newest checkpoint now.
            failure: the exception that ended the attempt with the step that it was raised in; empty for any other end.
                The same one twice is a bug, not bad luck: the samples of a step are the same in each attempt.
        """
        if code in _FINAL:
            return Verdict(again=False, reason="", attempts=attempts)
        if failure and failure == attempts.failure:
            reason = "the same error at the same step as in the attempt before: correct it, then continue with --resume"
            return Verdict(again=False, reason=reason, attempts=attempts)
        num_fruitless = 0 if step > attempts.step else attempts.num_fruitless
        if reason := self._objection(attempts.num_restarts, num_fruitless, step=step):
            return Verdict(again=False, reason=reason, attempts=attempts)
        following = Attempts(
            num_restarts=attempts.num_restarts + 1,
            num_fruitless=num_fruitless + 1,
            step=max(step, attempts.step),
            failure=failure,
        )
        return Verdict(again=True, reason="", attempts=following)

    def _objection(self, num_restarts: int, num_fruitless: int, *, step: int) -> str:
        if self.max_restarts is not None and num_restarts >= self.max_restarts:
            return f"--max-restarts is {self.max_restarts}"
        if num_fruitless >= self.max_fruitless:
            newest = f"newer than that of step {step:,}" if step else "at all"
            return f"{num_fruitless} restarts in a row have brought no checkpoint {newest}"
        return ""
