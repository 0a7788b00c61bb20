"""Section D of the fault list: gradients, losses and noise scales that are not what they should be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dptrain.checkpoint.store import load_newest
from dptrain.data import SampleStream
from dptrain.errors import DivergedError
from dptrain.observe import Meter
from dptrain.tasks import Suggestion, Task
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_log import WritingLog
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, OptimizerConfig, TrainConfig, Trainer
from tests.replicas import run_replicas

NUM_SAMPLES = 64
BATCH = 8


def squared_error(model, batch):
    features, target = batch
    return ((model(features) - target) ** 2).mean()


def make_task(broken=None, *, model=None, loss=squared_error):
    """Build a task some of whose samples are broken: index → value of its features."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(NUM_SAMPLES, 4, generator=generator)
    torch.manual_seed(0)  # the task is built by each replica for itself
    for index, value in (broken or {}).items():
        features[index] = value
    return Task(
        name="numerics",
        model=model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        train_data=TensorDataset(features, torch.randn(NUM_SAMPLES, 1, generator=generator)),
        loss=loss,
        suggestion=Suggestion(
            learning_rate=0.01, global_batch_size=BATCH, micro_batch_size=2, max_samples=48, eval_every_samples=48
        ),
    )


def make_config(folder, **settings):
    settings = {"control": ControlConfig(law="constant"), "noise": NoiseConfig(every=1), "device": "cpu", **settings}
    return TrainConfig(task="numerics", run_dir=str(folder), log=LogConfig(tracker="none"), **settings)


def samples_of_step(step, *, rank=None):
    """The sample numbers of a step; those of a rank of two where it is given."""
    positions = torch.arange((step - 1) * BATCH, step * BATCH)
    if rank is not None:  # micro-batches of two samples are dealt out in turn
        positions = positions.reshape(-1, 2)[rank::2].flatten()
    return SampleStream(NUM_SAMPLES, seed=0).indices(positions.numpy()).tolist()


def train(folder, task, **settings):
    """Train and return the sentences that the run printed."""
    notes = []
    note = WritingLog.note
    WritingLog.note = lambda log, text: notes.append(text) or note(log, text)
    try:
        Trainer(make_config(folder, **settings), task=lambda: task).run()
    finally:
        WritingLog.note = note
    return notes


def break_on_rank_1(rank, world_size, folder):
    output = {}
    for name, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        index = samples_of_step(3, rank=1)[0]
        output[name] = train(Path(folder) / name, make_task({index: value}))
    return output


def test_d1_d11_a_step_that_is_not_finite_is_skipped_and_reported_with_rank_and_samples(tmp_path):
    """NaN or infinity in a sample of rank 1: one step skipped, the run goes on, the sentence says who and what."""
    output, _ = run_replicas(break_on_rank_1, world_size=2, args=(tmp_path,))
    samples = samples_of_step(3, rank=1)
    for name, notes in output.items():
        skipped = [note for note in notes if "skipped" in note]
        # tanh maps an infinity to a finite number, and its slope there to zero: the first layer's gradient is 0·∞.
        assert len(skipped) == 1, name
        assert skipped[0].startswith("step 3 was skipped")
        assert f"on rank 1 (samples {', '.join(map(str, samples))})" in skipped[0]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert (summary["steps"], summary["steps_dropped"], summary["samples_seen"]) == (6, 1, 48)


def hide_a_statistic(rank, world_size, folder):
    """Replace what one replica says of its own gradients in step 2 by no number."""
    local_sums, calls = Meter.local_sums, []

    def broken(meter, **arguments):
        sums = local_sums(meter, **arguments)
        calls.append(None)
        if rank == 1 and len(calls) == 2:
            sums[0] = math.nan
        return sums

    Meter.local_sums = broken
    try:
        train(folder, make_task())
    finally:
        Meter.local_sums = local_sums


def test_d2_a_statistic_that_is_no_number_is_dropped_and_the_step_kept(tmp_path):
    """The combined gradient was fine, so all replicas took the step; the meter does without it."""
    run_replicas(hide_a_statistic, world_size=2, args=(tmp_path / "broken",))
    run_replicas(train_plainly, world_size=2, args=(tmp_path / "plain",))
    broken, plain = (load_newest(tmp_path / name / "checkpoints") for name in ("broken", "plain"))
    for name, tensor in plain.tensors("model").items():
        assert torch.equal(tensor, broken.tensors("model")[name])
    assert broken.state["progress"]["steps_dropped"] == 0
    assert (plain.state["meter"]["steps_measured"], plain.state["meter"]["steps_dropped"]) == (6, 0)
    assert (broken.state["meter"]["steps_measured"], broken.state["meter"]["steps_dropped"]) == (5, 1)


def train_plainly(rank, world_size, folder):
    train(folder, make_task())


def break_for_good(rank, world_size, folder):
    broken = {index: math.nan for step in (3, 4, 5, 6) for index in samples_of_step(step)}
    with pytest.raises(DivergedError) as caught:
        train(
            folder,
            make_task(broken),
            checkpoint=CheckpointConfig(every_samples=BATCH),
            optimizer=OptimizerConfig(max_skipped_steps=3),
        )
    return str(caught.value)


def test_d3_too_many_skipped_steps_end_the_run_on_a_good_checkpoint(tmp_path):
    """After three in a row all replicas stop with the same sentence; what was saved last is finite."""
    first, second = run_replicas(break_for_good, world_size=2, args=(tmp_path,))
    assert first == second
    assert first.startswith("3 steps in a row had to be skipped")
    saved = load_newest(tmp_path / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in saved.tensors("model").values())


def huge(model, batch):
    """A loss whose gradient is finite and has a square that single precision does not hold."""
    return squared_error(model, batch) * (1e22 if batch[0].abs().max() > 50 else 1.0)


def meet_huge_gradients(rank, world_size, folder):
    return train(folder, make_task({samples_of_step(2, rank=0)[0]: 100.0}, loss=huge))


def test_d4_a_gradient_whose_square_overflows_is_no_silent_step_of_nothing(tmp_path):
    """Clipping would turn it into zeros; here the step is skipped and reported, and the noise scale stays finite."""
    notes, _ = run_replicas(meet_huge_gradients, world_size=2, args=(tmp_path,))
    assert [note.split(":")[0] for note in notes if "skipped" in note] == ["step 2 was skipped"]
    saved = load_newest(tmp_path / "checkpoints")
    assert saved.state["progress"]["steps_dropped"] == 1
    assert saved.state["meter"]["steps_measured"] == 5
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert all(math.isfinite(row.get("noise_scale/grad_sq") or 0.0) for row in rows)


def nothing_to_learn(model, batch):
    return squared_error(model, batch) * 0.0


EAGER = ControlConfig(law="noise", min_gain=0.0, largest=64)


def learn_nothing(rank, world_size, folder):
    return train(folder, make_task(loss=nothing_to_learn), control=EAGER)


def test_d5_zero_gradients_change_neither_the_batch_nor_the_run(tmp_path):
    """All-zero gradients leave the noise scale unknown and the batch where it is."""
    run_replicas(learn_nothing, world_size=2, args=(tmp_path,))
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert {row["batch/global"] for row in rows} == {BATCH}
    assert {row.get("noise_scale/value") for row in rows} == {None}


def freeze_half(rank, world_size, folder):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].requires_grad_(requires_grad=False)
    before = model[0].weight.clone()
    train(folder, make_task(model=model))
    return torch.equal(before, model[0].weight)


def test_d5_frozen_parameters_stay_and_the_rest_is_trained(tmp_path):
    """A model that is frozen in part trains, and what is frozen is the same to the last bit."""
    assert run_replicas(freeze_half, world_size=2, args=(tmp_path,)) == [True, True]


def decide_on_uneven_ground(rank, world_size, folder):
    """Let each replica see its own gradients a little wrong, and note the batch of each step on each."""
    from dptrain.train.step import Stepper

    local_sums, take_step, batches = Meter.local_sums, Stepper.step, []

    def wrong(meter, **arguments):
        sums = local_sums(meter, **arguments)
        sums[0] *= 1 + 1e-7 * rank
        return sums

    def note(stepper, record, *, report):
        batches.append(record.global_batch_size)
        return take_step(stepper, record, report=report)

    Meter.local_sums, Stepper.step = wrong, note
    try:
        train(folder, make_task(), max_samples=600, control=EAGER)
    finally:
        Meter.local_sums, Stepper.step = local_sums, take_step
    return batches


def test_d9_replicas_that_measured_otherwise_decide_alike(tmp_path):
    """A float that differs between replicas is summed before it is read, so that decisions cannot differ."""
    first, second = run_replicas(decide_on_uneven_ground, world_size=2, args=(tmp_path,))
    assert first == second
    assert len(set(first)) > 1, "the batch moves"


def meet_a_spike(rank, world_size, folder):
    return train(folder, make_task(dict.fromkeys(samples_of_step(3), 30.0)))


def test_d12_a_spike_is_not_skipped(tmp_path):
    """Ten times larger data make a loss that stands out, and a step like any other: no rule skips what is finite."""
    notes, _ = run_replicas(meet_a_spike, world_size=2, args=(tmp_path,))
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[2]["train/grad_norm"] is not None
    assert rows[-1]["train/steps_dropped"] == 0
    assert not [note for note in notes if "skipped" in note]
