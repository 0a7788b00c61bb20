"""Hooks of a run: the average of the weights, early stopping and a user's own, on two replicas and over a resume."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dptrain.checkpoint.store import load_newest
from dptrain.config.train_config import EarlyStoppingConfig, TrainConfig
from dptrain.errors import ConfigError
from dptrain.models.settings import SparsityConfig
from dptrain.tasks import Moment, TrainHook
from dptrain.tasks.base import Hooks
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, OptimizerConfig, Trainer
from dptrain.train.execution.master_weights import MasterWeights
from dptrain.train.hooks import EarlyStopping, WeightAverage, build_hooks
from tests.replicas import run_replicas
from tests.runs import Killed, attempt, make_config, noisy


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def moment(model, *, step, batch):
    return Moment(step=step, samples_seen=step * batch, global_batch_size=batch, model=model)


def test_the_average_is_that_of_swa_utils():
    """At the reference batch it is the exponential average of torch.optim.swa_utils, bit for bit."""
    model = make_model()
    average = WeightAverage(model, decay=0.9, reference_batch_size=16)
    plain = torch.optim.swa_utils.AveragedModel(
        copy.deepcopy(model), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for step in range(1, 6):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        average.on_step(moment(model, step=step, batch=16))
        plain.update_parameters(model)
    for ours, theirs in zip(average.model.state_dict().values(), plain.module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_larger_step_decays_more():
    """One step of 64 samples weighs as four of 16 with the same weights do."""
    averages = []
    for batches in ([16] * 4, [64]):
        model = make_model()
        average = WeightAverage(model, decay=0.9, reference_batch_size=16)
        average.on_step(moment(model, step=1, batch=16))
        model.load_state_dict(make_model(seed=1).state_dict())
        for step, batch in enumerate(batches, start=2):
            average.on_step(moment(model, step=step, batch=batch))
        averages.append(average.model)
    for one, other in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_of_16_bits_are_averaged_in_float32():
    """The average of float32 copies is that of a float32 model, bit for bit; in bfloat16 it would stay at its start."""
    short, wide = make_model(), make_model()
    masters = MasterWeights(short)
    ours = WeightAverage(short, decay=0.999, reference_batch_size=16, masters=masters)
    theirs = WeightAverage(wide, decay=0.999, reference_batch_size=16)
    began = [parameter.detach().clone() for parameter in wide.parameters()]
    for step in range(1, 101):
        for master, parameter in zip(masters.parameters, wide.parameters(), strict=True):
            parameter.data += 1e-3 * torch.randn_like(parameter)
            master.data.copy_(parameter.data)
        masters.give_values()
        ours.on_step(moment(short, step=step, batch=16))
        theirs.on_step(moment(wide, step=step, batch=16))
    for kept, expected, first in zip(ours.model.parameters(), theirs.model.parameters(), began, strict=True):
        assert torch.equal(kept, expected)
        assert not torch.equal(kept, first)
    with ours.evaluating() as averaged:
        assert {parameter.dtype for parameter in averaged.parameters()} == {torch.bfloat16}
        for kept, expected in zip(averaged.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(kept, expected.bfloat16())
    assert torch.equal(next(ours.model.parameters()), next(theirs.model.parameters()))


def test_a_model_that_comes_in_bfloat16_is_averaged_in_float32():
    """Without copies it is the average of what the parameters are, not rounded."""
    model = nn.Linear(3, 4, dtype=torch.bfloat16)
    average = WeightAverage(model, decay=0.999, reference_batch_size=16)
    expected = None
    for step in range(1, 101):
        model.weight.data += 0.1
        average.on_step(moment(model, step=step, batch=16))
        now = model.weight.detach().float()
        expected = now if expected is None else torch.lerp(expected, now, 1 - 0.999)
    assert torch.equal(average.model.weight, expected)
    with average.evaluating() as averaged:
        assert averaged(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def stopper(values, **settings):
    """Count after how many evaluations it stops; None where it does not."""
    stopping = EarlyStopping(EarlyStoppingConfig(**settings))
    for number, value in enumerate(values, start=1):
        if stopping.on_evaluation(moment(None, step=number, batch=1), {"loss": value, "accuracy": value}):
            return number
    return None


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([3, 2, 2, 2, 1], {"patience": 2}, 4),
        ([3, 2, 2, 1, 1, 0], {"patience": 2}, None),
        ([1, 2, 2, 3], {"patience": 2, "figure": "accuracy", "higher_is_better": True}, None),
        ([2, 1, 3, 1], {"patience": 2, "figure": "accuracy", "higher_is_better": True}, None),
        ([2, 1, 1], {"patience": 2, "figure": "accuracy", "higher_is_better": True}, 3),
        ([1.0, 0.95, 0.91], {"patience": 2, "min_improvement": 0.1}, 3),
        ([1.0, float("nan"), float("nan")], {"patience": 2}, 3),
        ([float("nan"), 3.0, 2.0, 1.0], {"patience": 2}, None),
        ([float("inf"), 3.0, 3.5, 3.2], {"patience": 2}, 4),
        ([float("nan"), float("nan")], {"patience": 2}, 2),
        ([float("inf"), 0.5, 0.6, 0.7], {"patience": 2, "figure": "accuracy", "higher_is_better": True}, None),
    ],
)
def test_early_stopping_waits_for_its_patience(values, settings, expected):
    """It stops at the patience-th evaluation in a row that is no better than the best, and at none else."""
    assert stopper(values, **settings) == expected


def test_early_stopping_goes_on_counting_after_a_resume():
    """State out and in again, it stops where it would have."""
    first, second = (EarlyStopping(EarlyStoppingConfig(patience=2)) for _ in range(2))
    for value in (1.0, 2.0):
        assert not first.on_evaluation(moment(None, step=1, batch=1), {"loss": value})
    second.load_state_dict(first.state_dict())
    assert second.on_evaluation(moment(None, step=3, batch=1), {"loss": 3.0})


def test_a_figure_that_is_not_there_is_refused():
    """With the names of those that are."""
    with pytest.raises(ConfigError, match="'f1' is none of this task's: loss, accuracy"):
        stopper([1.0], patience=1, figure="f1")


class Noting(TrainHook):
    """Notes what it is told, and wants the end at its third evaluation."""

    def __init__(self):
        self.steps, self.saves, self.evaluations = [], 0, 0

    def on_step(self, moment):
        self.steps.append((moment.step, moment.samples_seen, moment.global_batch_size))

    def on_evaluation(self, moment, figures):  # noqa: ARG002 - the hook's form
        self.evaluations += 1
        return self.evaluations == 3

    def on_save(self, moment):  # noqa: ARG002 - as above
        self.saves += 1

    def state_dict(self):
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state):
        self.evaluations = state["evaluations"]


def settings(folder, **changes):
    config = make_config(folder, control=ControlConfig(law="constant"))
    return replace(config, optimizer=replace(config.optimizer, average_decay=0.8), **changes)


def hooked(rank, world_size, folder):
    hook = Noting()
    summary = Trainer(settings(folder), task=replace(noisy(), hook=hook)).run()
    return hook.steps, hook.saves, hook.evaluations, summary["samples_seen"]


def test_a_users_hook_is_called_and_may_end_the_run(tmp_path):
    """On both replicas after every step and evaluation; the run ends where it says, saved, evaluated and summed up."""
    results = run_replicas(hooked, world_size=2, args=(str(tmp_path / "run"),))
    (steps, saves, evaluations, seen), (other_steps, _, other_evaluations, other_seen) = results
    assert steps == other_steps == [(step, 4 * step, 4) for step in range(1, len(steps) + 1)]
    assert (evaluations, other_evaluations) == (3, 3)
    assert seen == other_seen == steps[-1][1] == 180  # evaluated at 60, 120 and 180 samples of 230
    assert saves >= 1
    saved = load_newest(tmp_path / "run" / "checkpoints")
    assert saved.state["progress"]["ended_early"] is True
    assert saved.state["progress"]["position"] == 180
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"]
    assert [row["progress/samples"] for row in rows] == [60, 120, 180]
    assert all("eval/average/loss" in row for row in rows)


@pytest.mark.parametrize("precision", ["no", "bf16_parameters"])
def test_average_and_hook_survive_a_kill(tmp_path, precision):
    """Killed and resumed, the averaged weights are the same bytes in float32, and the hook counts on."""
    results = []
    for name, deaths in (("straight", []), ("killed", [20])):
        folder = tmp_path / name
        hook = None
        for death in [*deaths, None]:
            hook = Noting()
            try:
                config = settings(folder, precision=precision)
                attempt(folder, kill_at=death, config=config, task=lambda hook=hook: replace(noisy(), hook=hook))
            except Killed:
                assert death is not None
        saved = load_newest(folder / "checkpoints")
        assert {tensor.dtype for tensor in saved.tensors("average").values()} == {torch.float32}
        figures = {key: value for key, value in saved.state["progress"].items() if key != "wall_s"}
        results.append(((saved.path / "average.safetensors").read_bytes(), figures, hook.evaluations))
    assert results[0] == results[1]
    assert results[0][2] == 3


class Masked(nn.Module):
    """A model with a mask of attention in its checkpoint."""

    def __init__(self):
        super().__init__()
        self.inner = noisy().model
        self.register_buffer("mask", torch.full((2,), float("-inf")))

    def forward(self, features):
        return self.inner(features) + self.mask.exp().sum()


def test_a_mask_of_infinities_is_saved_with_the_average_too(tmp_path):
    """The buffers of the averaged model are the model's: what is meant in one is no divergence in the other."""
    summary = Trainer(settings(tmp_path / "run"), task=replace(noisy(), model=Masked())).run()
    assert summary["samples_seen"] == 230
    saved = load_newest(tmp_path / "run" / "checkpoints")
    assert saved.state["progress"]["position"] == 230
    assert saved.tensors("average")["mask"].tolist() == [float("-inf")] * 2
    assert not saved.holds("hook")  # which would hold the average once more


def test_a_run_with_the_average_trains_as_without(tmp_path):
    """The average looks on: the trained weights are the same bytes."""
    found = []
    for name, decay in (("with", 0.9), ("without", None)):
        config = make_config(tmp_path / name, optimizer=OptimizerConfig(average_decay=decay))
        attempt(tmp_path / name, config=config, task=noisy)
        found.append((load_newest(tmp_path / name / "checkpoints").path / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_masks_are_back_before_other_hooks_look():
    """Muon mixes a matrix's entries, so it moves masked weights; neither the average nor the task's hook sees that."""
    torch.manual_seed(0)
    seen = []

    class Looking(TrainHook):
        def on_step(self, moment):
            seen.append(moment.model[0].weight.detach().clone())

    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05)
    config = TrainConfig(
        task="digits",
        max_samples=40,
        sparsity=SparsityConfig(method="static", sparsity=0.5),
        optimizer=OptimizerConfig(average_decay=0.5, reference_batch_size=4),
    )
    hook, average = build_hooks(config, replace(noisy(), hook=Looking()), model=model, optimizer=optimizer)
    masked = model[0].weight == 0
    assert 0 < int(masked.sum()) < masked.numel()
    for step in (1, 2):
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()
        assert model[0].weight[masked].any()
        hook.on_step(moment(model, step=step, batch=4))
    assert not average.model[0].weight[masked].any()
    assert not any(weight[masked].any() for weight in seen)


class Keeping(TrainHook):
    """Has a number as its state."""

    def __init__(self, number=0):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def test_states_are_found_by_class_wherever_a_hook_stands():
    """So another order, or a hook that joins, moves none; checkpoints that have them by place are still read."""
    stopping = EarlyStopping(EarlyStoppingConfig(patience=2))
    for saved in (
        Hooks([Keeping(1), Keeping(2)]).state_dict(),
        {"0/Keeping": {"number": 1}, "1/Absent": {}, "2/Keeping": {"number": 2}},
    ):
        one, two = Keeping(), Keeping()
        Hooks([stopping, one, two]).load_state_dict(saved)
        assert (one.number, two.number) == (1, 2)
