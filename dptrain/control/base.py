"""What every controller is: measurement in, decision with its reason out; no law and no limit lives here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dptrain.control.grid import BatchSizeGrid
from dptrain.control.step_time_model import StepTimeModel
from dptrain.errors import CheckpointError
from dptrain.noise import NoiseScale


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is known when a decision is asked for; the same on all ranks.

    Attributes:
        samples_seen: position in the stream of samples.
        global_batch_size: batch in force, in samples.
        noise_scale: estimate up to now, in samples, with what is known of it.
        step_time: what a step costs; None where it is not measured, or not known yet.
        loss: smoothed training loss, in nats per token for language models; None where it is not given.
        grid: the batches that run; `OnGrid` adds it.
    """

    samples_seen: int
    global_batch_size: int
    noise_scale: NoiseScale
    step_time: StepTimeModel | None = None
    loss: float | None = None
    grid: BatchSizeGrid | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The batch to train on with from here, with the reason in words.

    Attributes:
        global_batch_size: in samples. A bare law may ask for a fraction; behind `OnGrid` it is a whole number.
        reason: one sentence with the numbers that led here, for the log and for people.
    """

    global_batch_size: float
    reason: str

    def __post_init__(self) -> None:
        assert 0 < self.global_batch_size < math.inf, f"a law asked for a batch of {self.global_batch_size}"


@dataclass(frozen=True, kw_only=True)
class State:
    """What a controller remembers between decisions: as it stands, nothing. One that remembers derives its own."""


class Controller(ABC):
    """Decides on the global batch: a pure function of (state, measurement), without clock, rank or file.

    Attributes:
        memory: the record that it remembers from one decision to the next.
    """

    memory: ClassVar[type[State]] = State

    def init(self) -> State:
        """Return the state before the first decision."""
        return self.memory()

    @abstractmethod
    def update(self, state: State, measurement: Measurement) -> tuple[State, Decision]:
        """Decide, and return the state for the next decision."""

    def restore(self, record: Mapping[str, Any]) -> State:
        """Return the state that `asdict` wrote.

        Raises:
            CheckpointError: where the record is that of another controller.
        """
        if set(record) != {field.name for field in fields(self.memory)}:
            raise CheckpointError(
                f"the saved controller is no {type(self).__name__} (it remembers {', '.join(record) or 'nothing'}): "
                "resume with the controller settings of the saved run"
            )
        return self.memory(**record)


class Law(Controller):
    """A controller that remembers nothing: it only has to `decide`."""

    def update(self, state: State, measurement: Measurement) -> tuple[State, Decision]:
        """Decide on the measurement alone."""
        return state, self.decide(measurement)

    @abstractmethod
    def decide(self, measurement: Measurement) -> Decision:
        """Return the batch that the law asks for."""
