"""Runs without a model, to a fixed amount of progress, and what share of the fastest possible time a law makes of it.

The noise is that of real gradients (`closed_loop.draw`), step times scatter by 10 % with 5 % of stragglers, and the law
sees both through the real estimator and the real step-time model. A step at batch b makes b/(b + κφ) of the progress of
one without noise. The oracle takes the best batch of the grid at every point.
"""

import math
import random
from dataclasses import dataclass

from dptrain.batch import BatchPlan
from dptrain.control import BatchSizeGrid, Measurement, OnGrid, StepTimes
from dptrain.noise import MomentSums, Smoothing, noise_scale, smoothed
from tests.control.simulated.closed_loop import draw

SMALLEST, LARGEST, LARGEST_MICRO = 8, 65536, 64


def layout(batch):
    """Two replicas; the micro-batch rises first."""
    share = batch // 2
    micro = min(share, LARGEST_MICRO)
    return BatchPlan(micro_batch_size=micro, accumulation_steps=share // micro, world_size=2)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The true time of a step, in seconds and samples."""

    per_step: float
    per_micro_batch: float
    per_sample: float
    full_at: int = 0

    def seconds(self, shape):
        micro = max(shape.micro_batch_size, self.full_at)
        return self.per_step + shape.accumulation_steps * (self.per_micro_batch + self.per_sample * micro)


SLOW_STEP = Machine(per_step=0.064, per_micro_batch=0.004, per_sample=0.002)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: the true noise scale against the share of the progress made, and where the batch begins."""

    phi: object
    start: int
    machine: Machine = SLOW_STEP
    critical_ratio: float = 1.0
    progress: float = 150.0


def rising(first, factor):
    """A noise scale that rises by a factor over the run, at equal rates."""
    return lambda done: first * factor**done


CASES = {
    "16 times too small": Case(phi=lambda _: 1024.0, start=16),
    "16 times too large": Case(phi=lambda _: 1024.0, start=4096),
    "drowned in noise": Case(phi=lambda _: 16384.0, start=32, progress=60),
    "rises ×100, κ = 4": Case(phi=rising(30, 100), start=16, critical_ratio=4.0),
    "rises ×10": Case(phi=rising(50, 10), start=16),
    "between two batches": Case(phi=lambda _: 2048.0, start=256),
    "rises ×10, κ = 0.4": Case(phi=rising(50, 10), start=16, critical_ratio=0.4),
    "falls ×20": Case(phi=rising(2000, 0.05), start=512),
    "jumps ×10": Case(phi=lambda done: 100.0 if done < 0.5 else 1000.0, start=64),
    "a step costs little": Case(
        phi=rising(40, 10), start=16, machine=Machine(per_step=0.003, per_micro_batch=0.0006, per_sample=0.00012)
    ),
    "30 ms a step": Case(
        phi=rising(40, 10), start=16, machine=Machine(per_step=0.03, per_micro_batch=0.003, per_sample=0.0006)
    ),
    "300 ms a step": Case(
        phi=rising(40, 10), start=16, machine=Machine(per_step=0.3, per_micro_batch=0.004, per_sample=0.0002)
    ),
    "a device that is not full": Case(
        phi=rising(40, 10), start=16, machine=Machine(per_step=0.01, per_micro_batch=0.0, per_sample=0.001, full_at=32)
    ),
    "a micro-batch costs much": Case(
        phi=rising(100, 10), start=64, machine=Machine(per_step=0.005, per_micro_batch=0.03, per_sample=0.0005)
    ),
}


def efficiency(law, case, *, seed, most_steps=6000, smoothing=None):
    """Return the oracle's time over that of a run under `law`, and how often the batch changed.

    Args:
        law: decides after each step.
        case: the run.
        seed: of the noise.
        most_steps: a run that is not there by then counts by the part that it made.
        smoothing: of the noise scale; the default where None.
    """
    rng = random.Random(seed)
    smoothing, sums, times = smoothing or Smoothing(), MomentSums(), StepTimes()
    control = OnGrid(law, BatchSizeGrid(quantum=SMALLEST, smallest=SMALLEST, largest=LARGEST))
    points = [SMALLEST << k for k in range(14)]
    seconds = {b: case.machine.seconds(layout(b)) for b in points}
    state, batch, seen, done, spent, fastest, changes, model = control.init(), case.start, 0, 0.0, 0.0, 0.0, 0, None
    for step in range(most_steps):
        phi = case.phi(done / case.progress)
        critical = case.critical_ratio * phi
        part = min(1.0, (case.progress - done) * (batch + critical) / batch)  # of the last step
        made = part * batch / (batch + critical)
        fastest += made * min(seconds[b] * (b + critical) / b for b in points)
        spent, done, seen = spent + part * seconds[batch], done + made, seen + batch
        if done >= case.progress * (1 - 1e-9):
            break
        sums = smoothing.update(sums, draw(rng, phi=phi, batch=batch))
        straggler = 5 if rng.random() < 0.05 else 1
        times = times.timed(layout(batch), seconds[batch] * math.exp(rng.gauss(0, 0.1)) * straggler)
        if step % 16 == 0 or times.has_just_settled or model is None or not model.is_split_known:
            model = times.model()  # as the trainer does: a fit takes longer than a decision
        measurement = Measurement(
            samples_seen=seen, global_batch_size=batch, noise_scale=noise_scale(smoothed(sums)), step_time=model
        )
        state, decision = control.update(state, measurement)
        changes += decision.global_batch_size != batch
        batch = decision.global_batch_size
    return fastest / spent * min(1.0, done / case.progress), changes
