"""What the next optimizer step of a foreign loop is made of: reading in, window out; knows no framework, no ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch.optim import Optimizer

from dptrain.batch import BatchPlan
from dptrain.control import RULES, Controller, Limits, Measurement, RuleName, limited, state_to_json
from dptrain.errors import CheckpointError, ConfigError
from dptrain.noise import NoiseScale


@dataclass(frozen=True, kw_only=True)
class Window:
    """The micro-batches of one optimizer step.

    Attributes:
        accumulation_steps: micro-batches per replica.
        learning_rate_factor: by which the optimizer's rates are multiplied in this step.
        reason: why, in one sentence.
    """

    accumulation_steps: int
    learning_rate_factor: float
    reason: str


class Adaptation:
    """Moves the accumulation steps of a loop whose micro-batch stays what it is.

    All replicas hold equal readings, so that all come to the same window without a message.

    Args:
        law: decides on the global batch, such as `NoiseLaw()`.
        limits: what the batch may do; it is always a multiple of micro-batch × world size.
        micro_batch_size: samples in one forward–backward on one replica.
        world_size: number of replicas.
        accumulation_steps: of the first window. Its global batch is the one that the base learning rate belongs to.
        rule: how the learning rate follows the batch.

    Raises:
        ConfigError: where a setting is out of range.
    """

    def __init__(
        self,
        *,
        law: Controller,
        limits: Limits,
        micro_batch_size: int,
        world_size: int,
        accumulation_steps: int,
        rule: RuleName = "none",
    ) -> None:
        self._start = BatchPlan(
            micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps, world_size=world_size
        )
        if rule not in RULES:
            raise ConfigError(f"the learning rate rule must be one of {', '.join(RULES)}, got {rule!r}")
        self._rule = RULES[rule]
        self._quantum = micro_batch_size * world_size
        self._controller = limited(law, quantum=self._quantum, limits=limits)
        self._state = self._controller.init()
        self._samples_seen = 0
        self._num_changes = 0
        self.window = Window(accumulation_steps=accumulation_steps, learning_rate_factor=1.0, reason="the start")

    @property
    def global_batch_size(self) -> int:
        """Samples in the present window, all replicas together."""
        return self._quantum * self.window.accumulation_steps

    def decide(
        self, noise_scale: NoiseScale, *, micro_steps: int, may_be: Callable[[int], bool] = lambda _: True
    ) -> Window:
        """Count a window that is done, and decide on the next one.

        Args:
            noise_scale: what is known of it; equal on all replicas.
            micro_steps: micro-batches that the window had on each replica: fewer than planned at an epoch's end.
            may_be: whether the loop can go over to this number of accumulation steps just now; if not, the
                window stays as it is, and the law is asked again after the next.
        """
        self._samples_seen += self._quantum * micro_steps
        measurement = Measurement(
            samples_seen=self._samples_seen, global_batch_size=self.global_batch_size, noise_scale=noise_scale
        )
        self._state, decision = self._controller.update(self._state, measurement)
        asked, present = round(decision.global_batch_size) // self._quantum, self.window.accumulation_steps
        accumulation_steps = asked if may_be(asked) else present
        self._num_changes += accumulation_steps != present
        factor = self._rule(
            noise_scale,
            batch=self._quantum * accumulation_steps,
            reference_batch=self._start.global_batch_size,
        )
        self.window = Window(accumulation_steps=accumulation_steps, learning_rate_factor=factor, reason=decision.reason)
        return self.window

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats for any logger."""
        return {
            "batch/global": float(self.global_batch_size),
            "batch/accumulation_steps": float(self.window.accumulation_steps),
            "batch/num_changes": float(self._num_changes),
            "batch/lr_factor": self.window.learning_rate_factor,
            "progress/samples": float(self._samples_seen),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that `load_state_dict` goes on from."""
        return {
            "window": asdict(self.window),
            "controller": state_to_json(self._state),
            "samples_seen": self._samples_seen,
            "num_changes": self._num_changes,
            "quantum": self._quantum,
        }

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; on other replicas the batch is kept, the accumulation steps follow.

        Raises:
            CheckpointError: where the record is not one, or its batch cannot be laid out on these replicas.
        """
        try:
            window, batch = Window(**record["window"]), record["quantum"] * record["window"]["accumulation_steps"]
            self._state = self._controller.restore(record["controller"])
            self._samples_seen, self._num_changes = int(record["samples_seen"]), int(record["num_changes"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"not the state of an adaptive batch: {error!r} is missing or wrong") from error
        if batch % self._quantum:
            raise CheckpointError(
                f"the saved batch of {batch} is no multiple of micro-batch × world size = {self._quantum}: resume "
                "on a number of replicas that divides it"
            )
        self.window = Window(**{**asdict(window), "accumulation_steps": batch // self._quantum})


def scale_learning_rate(optimizer: Optimizer, factor: Callable[[], float]) -> Callable[[], None]:
    """Multiply the rate of every group by `factor()` while `optimizer.step` runs, and return what ends it.

    Outside of the step the groups hold the base rates, so that no factor multiplies the one before it and a
    scheduler, whether it rewrites the rates or multiplies them, never meets a scaled one.
    """
    base: list[Any] = []

    def scale(*_: object) -> None:
        restore()  # a step that raised has left its rates scaled
        base.extend(group["lr"] for group in optimizer.param_groups)
        present = factor()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * present

    def restore(*_: object) -> None:
        for group, rate in zip(optimizer.param_groups, base, strict=False):
            group["lr"] = rate
        base.clear()

    handles = [optimizer.register_step_pre_hook(scale), optimizer.register_step_post_hook(restore)]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop
