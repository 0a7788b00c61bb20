"""A run without a model, step by step: gradients with known moments are drawn, measured and acted upon."""

import math
import random
from itertools import pairwise

from dptrain.batch import BatchPlan
from dptrain.control import BatchSizeGrid, Measurement, OnGrid, StepTimes
from dptrain.noise import Moments, MomentSums, Smoothing, noise_scale, smoothed

GRID = BatchSizeGrid(quantum=8, largest=65536)


def layout(batch, *, largest_micro=32, least_accumulation=1):
    """The shape in which one replica runs a power of two: the micro-batch rises first."""
    micro = min(batch // least_accumulation, largest_micro)
    return BatchPlan(micro_batch_size=micro, accumulation_steps=batch // micro, world_size=1)


def draw(rng, *, phi, batch, num_small=2, dimensions=50):
    """One step's pair of moments of a gradient with tr(Σ) = 1 and |G|² = 1/φ."""
    grad_sq_norm, k = 1 / phi, num_small
    var_trace = 2 / dimensions / (k - 1)
    cov = -var_trace / batch
    var_grad = var_trace * k / batch**2 + 4 * grad_sq_norm / dimensions / batch
    first, second = rng.gauss(0, 1), rng.gauss(0, 1)
    trace = 1 + math.sqrt(var_trace) * first
    tail = math.sqrt(var_grad - cov**2 / var_trace)
    grad = grad_sq_norm + cov / math.sqrt(var_trace) * first + tail * second
    return Moments(noise_trace=trace, grad_sq_norm=grad, num_samples=batch)


def closed_loop(law, *, phi_at, batch, seed, steps=600, every=10, num_small=2, grid=GRID, seconds=None, heat=None):
    """Return the batch after each step of a run under `law`.

    Args:
        law: not on a grid yet; decides every `every` steps.
        phi_at: the true noise scale at a step; None where nothing can be measured in it.
        batch: of the first step.
        seed: of the noise.
        steps: length of the run.
        every: steps between two decisions.
        num_small: small batches of a step.
        grid: the batches that run.
        seconds: true time of a step's shape, to which 10 % of noise and 5 % of stragglers are added; None: not timed.
        heat: factor on the true noise scale at a batch; None: it does not depend on the batch.
    """
    rng = random.Random(seed)
    smoothing, sums, times = Smoothing(), MomentSums(), StepTimes()
    control = OnGrid(law, grid)
    state, batches, seen = control.init(), [], 0
    for step in range(steps):
        phi = phi_at(step)
        if phi is not None:
            phi *= 1 if heat is None else heat(batch)
            sums = smoothing.update(sums, draw(rng, phi=phi, batch=batch, num_small=num_small))
        if seconds is not None:
            shape = layout(batch)
            straggler = 5 if rng.random() < 0.05 else 1
            times = times.timed(shape, seconds(shape) * math.exp(rng.gauss(0, 0.1)) * straggler)
        seen += batch
        if (step + 1) % every == 0:
            measurement = Measurement(
                samples_seen=seen,
                global_batch_size=batch,
                noise_scale=noise_scale(smoothed(sums)),
                step_time=times.model(),
            )
            state, decision = control.update(state, measurement)
            batch = decision.global_batch_size
        batches.append(batch)
    return batches


def arrival(batches, right):
    """The first step at which the batch is within half a grid point of the right one; all steps if none is."""
    return next((i for i, batch in enumerate(batches) if right / 1.5 < batch < right * 1.5), len(batches))


def reversals(batches):
    """How often a batch that rose fell, or the other way round."""
    signs = [after > before for before, after in pairwise(batches) if after != before]
    return sum(one != other for one, other in pairwise(signs))
