"""The invariants of a run under any fault: exactly once, independent of replicas and history, inert skips, agreement.

Of the sixteen, 4, 5, 6, 14 and 15 stand in test_invariants_storage.py, 13 in test_f_fuzz.py, and 16 in
tests/runtime/test_restart_policy.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dptrain.config.built import controller, learning_rate_schedule, micro_batch_size
from dptrain.config.filled_in import filled_in
from dptrain.control import BatchSizeGrid, Measurement, OnGrid
from dptrain.control.noise_law import NoiseLaw
from dptrain.data import SampleStream, slots
from dptrain.noise import Moments, MomentSums, Smoothing, noise_scale, smoothed, unbiased_moments
from dptrain.noise.moments import SquaredNorms
from dptrain.observe import NUM_SUMS, PendingSum
from dptrain.runtime.step_reduction import RankReport, StepRecord, receive, send
from dptrain.tasks import Suggestion
from dptrain.train import ControlConfig, OptimizerConfig, TrainConfig
from dptrain.train.optimizer import build_optimizer, step_if_finite

EXAMPLES = settings(max_examples=300)

any_float = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)
leg = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 40),
        "micro": st.integers(1, 9),
        "world": st.integers(1, 7),
        "saved": st.booleans(),
        "killed": st.booleans(),
    }
)


@EXAMPLES
@given(num_samples=st.integers(1, 50), seed=st.integers(0, 2**40), legs=st.lists(leg, min_size=1, max_size=30))
def test_invariant_1_every_sample_exactly_once(num_samples, seed, legs):
    """Whatever the batches, replicas, kills and checkpoints: what is committed tiles the stream, pass by pass."""
    stream = SampleStream(num_samples, seed=seed)
    position = saved = 0
    committed = {}
    for part in legs:
        read = []
        for rank in range(part["world"]):
            layout = {"global_batch_size": part["batch"], "micro_batch_size": part["micro"]}
            for slot in slots(position=position, **layout, world_size=part["world"], rank=rank):
                read += stream.indices(np.arange(slot.position, slot.position + slot.num_samples)).tolist()
        committed[position] = (position + part["batch"], read)
        position += part["batch"]
        if part["saved"]:
            saved = position
        if part["killed"]:
            committed = {begin: kept for begin, kept in committed.items() if begin < saved}
            position = saved
    assert [begin for begin, _ in committed.items()] == [0, *[end for end, _ in committed.values()]][: len(committed)]
    counts = Counter(itertools.chain.from_iterable(read for _, read in committed.values()))
    passes, rest = divmod(position, num_samples)
    assert all(passes <= counts[index] <= passes + 1 for index in range(num_samples))
    assert sum(count == passes + 1 for count in counts.values()) == rest or passes == 0 == rest
    assert sum(counts.values()) == position


@EXAMPLES
@given(
    position=st.integers(0, 10**9),
    batch=st.integers(1, 200),
    micro=st.integers(1, 40),
    worlds=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_invariant_2_replicas_only_share_the_window_out(position, batch, micro, worlds):
    """For any number of replicas the parts are disjoint, in order, even, and together the window."""
    layout = {"position": position, "global_batch_size": batch, "micro_batch_size": micro}
    found = []
    for world in worlds:
        parts = [slot for rank in range(world) for slot in slots(**layout, world_size=world, rank=rank)]
        filled = sorted((slot.position, slot.num_samples) for slot in parts if slot.num_samples)
        assert [begin for begin, _ in filled] == [position, *[begin + count for begin, count in filled]][: len(filled)]
        assert sum(count for _, count in filled) == batch
        assert max(count for _, count in filled) - min(count for _, count in filled) <= 1
        found.append(filled)
    assert found[0] == found[1]


@EXAMPLES
@given(num_samples=st.integers(1, 10**6), seed=st.integers(0, 2**40), cuts=st.lists(st.integers(0, 120), max_size=6))
def test_invariant_3_a_sample_depends_on_its_position_alone(num_samples, seed, cuts):
    """Reading in any pieces, in any order, by a stream made anew, gives the same samples."""
    edges = [0, *sorted(cuts), 120]
    pieces = [SampleStream(num_samples, seed=seed).indices(np.arange(a, b)) for a, b in itertools.pairwise(edges)]
    whole = SampleStream(num_samples, seed=seed).indices(np.arange(120))
    assert np.concatenate(pieces).tolist() == whole.tolist()


@EXAMPLES
@given(pairs=st.lists(st.tuples(any_float, any_float), max_size=12), present=st.sampled_from([4, 8, 64, 1024]))
def test_invariant_7_no_measurement_breaks_the_estimator_or_the_controller(pairs, present):
    """NaN, infinities, zeros and subnormals: the record stays finite, and the batch at most doubles."""
    law = OnGrid(NoiseLaw(ratio=1.0), BatchSizeGrid(quantum=4, smallest=4, largest=1024))
    smoothing, sums, state, batch = Smoothing(), MomentSums(), law.init(), present
    for number, (grad_sq_norm, noise_trace) in enumerate(pairs):
        before = sums
        sums = smoothing.update(sums, Moments(grad_sq_norm=grad_sq_norm, noise_trace=noise_trace, num_samples=batch))
        if not (math.isfinite(grad_sq_norm) and math.isfinite(noise_trace)):
            assert sums == before
        assert all(math.isfinite(value) for value in asdict(sums).values() if isinstance(value, float))
        scale = noise_scale(smoothed(sums), level=0.95)
        measurement = Measurement(samples_seen=number * batch, global_batch_size=batch, noise_scale=scale)
        state, decision = law.update(state, measurement)
        after = round(decision.global_batch_size)
        assert 4 <= after <= 1024
        assert after <= 2 * batch
        batch = after


@EXAMPLES
@given(
    small=st.floats(1e-3, 1e3),
    large=st.floats(1e-3, 1e3),
    exponent=st.integers(-10, 10),
    num_small=st.integers(2, 16),
    size=st.integers(1, 64),
)
def test_invariant_8_scaled_gradients_leave_the_noise_scale_alone(small, large, exponent, num_small, size):
    """|G|² and tr(Σ) of one step grow with the square of the factor, so that their ratio stays."""

    def moments(factor):
        return unbiased_moments(
            SquaredNorms(
                small=small * factor**2,
                large=large * factor**2,
                inverse_small=1 / size,
                inverse_large=1 / (size * num_small),
                num_small=num_small,
                num_samples=size * num_small,
            )
        )

    plain, scaled = moments(1.0), moments(10.0**exponent)
    assert scaled.noise_trace == pytest.approx(plain.noise_trace * 10.0 ** (2 * exponent), rel=1e-9)
    assert scaled.grad_sq_norm == pytest.approx(plain.grad_sq_norm * 10.0 ** (2 * exponent), rel=1e-6, abs=1e-300)


@EXAMPLES
@given(
    name=st.sampled_from(["adamw", "sgd"]),
    steps=st.lists(st.sampled_from(["step", "skip"]), min_size=1, max_size=6),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 2**31),
)
def test_invariant_9_a_skipped_step_is_inert(name, steps, value, seed):
    """Parameters and moments after any mixture of steps are those after the steps that were not skipped."""
    found = []
    for with_skips in (True, False):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        optimizer = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1), model)
        for kind in steps:
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if kind == "skip":
                if not with_skips:
                    continue
                model.bias.grad[0] = value
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            step_if_finite(optimizer, norm)
        state = [optimizer.state[p].get(key) for p in model.parameters() for key in ("step", "exp_avg", "exp_avg_sq")]
        found.append([p.detach().clone() for p in model.parameters()] + [entry for entry in state if entry is not None])
    for one, other in zip(found[0], found[1] or found[0], strict=False):
        assert torch.equal(one, other)


@EXAMPLES
@given(
    losses=st.lists(any_float, min_size=1, max_size=5),
    squares=st.lists(any_float, min_size=5, max_size=5),
    stops=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_invariant_10_equal_sums_are_equal_outcomes(losses, squares, stops):
    """Whatever replicas put in, what each makes of the sum is the same, and total: no value of it raises."""
    world = len(losses)
    record = StepRecord(
        step=3, position=8, global_batch_size=4 * world, micro_batch_size=4, learning_rate=0.1, wall_s=0.0
    )
    vectors = []
    for loss, square, stop in zip(losses, squares, stops, strict=False):
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
        sums[0], sums[1], sums[-1] = square, square, 4.0
        vectors.append(
            send(
                record,
                report=RankReport(stop=stop),
                loss_sum=torch.tensor(loss),
                num_samples=4,
                grad_norm=torch.tensor(sum(squares[:world]) / world, dtype=torch.float64),
                meter_sums=sums,
                measured=True,
            )._vector
        )
    total = torch.stack(vectors).sum(dim=0) / world  # one process: its group has one member, whose tags are its own
    total[0:3] = vectors[0][0:3]
    outcomes = [receive(PendingSum(total.clone()), record) for _ in range(world)]
    assert all(repr(outcome) == repr(outcomes[0]) for outcome in outcomes)
    assert outcomes[0].stop == any(stops[:world])
    # A loss that is no number on some replica marks it, whatever the others have.
    norm = torch.full((world,), sum(squares[:world]) / world, dtype=torch.float64)
    assert outcomes[0].finite == math.isfinite(norm.sum())  # thirds of the largest number add up to infinity


@EXAMPLES
@given(
    parts=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(lambda parts: sum(parts) > 0),
    seed=st.integers(0, 2**31),
)
def test_invariant_11_uneven_parts_give_the_mean_over_the_samples(parts, seed):
    """Means over parts of any sizes, none included, weighted by what they hold, are the mean over all samples."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(sum(parts), 5, generator=generator, dtype=torch.float64)
    total, world = torch.zeros(5, dtype=torch.float64), len(parts)
    for part in torch.split(gradients, parts):
        weight = len(part) * world / sum(parts)  # as in the stepper
        total += (part.mean(dim=0) if len(part) else torch.zeros(5, dtype=torch.float64)) * weight / world
    torch.testing.assert_close(total, gradients.mean(dim=0), rtol=1e-12, atol=1e-12)


@EXAMPLES
@given(
    kind=st.sampled_from(["constant", "cosine", "linear"]),
    warmup=st.integers(0, 500),
    cuts=st.lists(st.integers(1, 999), unique=True, max_size=5),
    batches=st.lists(st.sampled_from([4, 8, 16]), min_size=1, max_size=60),
)
def test_invariant_12_rate_and_batch_are_the_same_replayed_from_any_checkpoint(kind, warmup, cuts, batches):
    """Rate, micro-batch and controller go on from what a checkpoint holds, at any step, as if nothing had been."""
    suggestion = Suggestion(
        learning_rate=0.1, global_batch_size=8, micro_batch_size=4, max_samples=1000, eval_every_samples=100
    )
    config = filled_in(
        TrainConfig(
            control=ControlConfig(law="noise", largest=64, min_gain=0.0),
            optimizer=OptimizerConfig(schedule=kind, warmup_samples=warmup),
        ),
        suggestion,
        world_size=2,
    )

    def course(interruptions):
        law, position, batch, found = controller(config), 0, 8, []
        state = law.init()
        for number, phi in enumerate(batches):
            if number in interruptions:
                state = (law := controller(config)).restore(json.loads(json.dumps(asdict(state))))
            rate = learning_rate_schedule(config).factor(position + batch)
            found.append((position, batch, rate, micro_batch_size(config, global_batch_size=batch)))
            position += batch
            scale = noise_scale(
                smoothed(
                    Smoothing().update(
                        MomentSums(), Moments(grad_sq_norm=1.0, noise_trace=float(phi), num_samples=batch)
                    )
                ),
                level=0.95,
            )
            measurement = Measurement(samples_seen=position, global_batch_size=batch, noise_scale=scale)
            state, decision = law.update(state, measurement)
            batch = round(decision.global_batch_size)
        return found

    interruptions = {cut % (len(batches) + 1) for cut in cuts}
    assert course(interruptions) == course(set())
