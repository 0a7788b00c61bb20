"""The meter of a run, as its settings ask for it: the noise scale of each expert, and of each local block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dptrain.errors import ConfigError
from dptrain.noise.derived import expert_noise_scale, routed_noise_scale
from dptrain.tasks.base import split_loss
from dptrain.tasks.gpt import gpt
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, LogConfig, NoiseConfig, OptimizerConfig, TrainConfig, Trainer
from tests.replicas import run_replicas
from tests.runs import make_config, noisy
from tests.tasks.made_data import make_nanogpt_folder

CONTEXT, NUM_WINDOWS, NUM_EXPERTS = 4, 40, 8
EXPERTS = [f"blocks.0.experts.{expert}" for expert in range(NUM_EXPERTS)]


def make_task(folder):
    """GPT of eight experts on windows of four tokens, so that a window reaches an expert about every third time."""
    torch.manual_seed(3)
    shape = {"vocab_size": 96, "context": CONTEXT, "width": 16, "depth": 1, "heads": 2}
    task = gpt(data=str(folder), **shape, num_experts=NUM_EXPERTS, top_k=1)
    for parameter in task.model.parameters():  # blocks begin as the identity, where experts have no gradient
        parameter.data += 0.2 * torch.randn_like(parameter)
    return task


def measured(rank, world_size, data, folder):
    """Train on the whole data set in each step, at a rate that moves nothing, so that the run's figures are exact."""
    config = exactly_measured(Path(folder) / f"run-{world_size}", groups="experts")
    return Trainer(config, task=lambda: make_task(data)).run()


def exactly_measured(folder, *, groups):
    """Settings under which a run measures what exact gradients of all samples give."""
    return TrainConfig(
        run_dir=str(folder),
        device="cpu",
        max_samples=4 * NUM_WINDOWS,
        global_batch_size=NUM_WINDOWS,
        micro_batch_size=1,
        control=ControlConfig(law="constant"),
        optimizer=OptimizerConfig(learning_rate=1e-12),
        noise=NoiseConfig(groups=groups, every=1),
        log=LogConfig(tracker="none"),
    )


def gradients_of_samples(task):
    """Return each window's own gradient of each expert's weights, shape (experts, windows, weights)."""
    experts = task.model.blocks[0].experts
    found = []
    for index in range(NUM_WINDOWS):
        task.model.zero_grad()
        loss, _ = split_loss(task.loss(task.model, task.train_data[index][None]))
        loss.backward()
        found.append(torch.cat([experts.weight_in.grad.flatten(1), experts.weight_out.grad.flatten(1)], 1).double())
    return torch.stack(found, 1)


def exact_noise_scale(rows):
    """Return tr(Σ)/|G|² over a data set, given the gradients of its samples."""
    mean = rows.mean(0)
    return float(rows.var(0, unbiased=True).sum() / mean.square().sum())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_measures_each_expert_by_the_formula(tmp_path, world_size):
    """In metrics and summary φ is that of exact per-sample gradients, and (φ_h + 1 − p)/p over routed ones, to 2 %."""
    data = make_nanogpt_folder(tmp_path / "data", num_tokens=CONTEXT * NUM_WINDOWS + 1)
    if world_size == 1:
        summary = measured(0, 1, str(data), str(tmp_path))
    else:
        summary = run_replicas(measured, world_size=world_size, args=(str(data), str(tmp_path)))[0]
    train = [row for row in read_rows(tmp_path / f"run-{world_size}" / "metrics.jsonl") if row["kind"] == "train"]
    # Sixteen shares are logged in every second row, so that rows stay short; the parts of the loss in each.
    assert [f"train/routed_samples/{EXPERTS[0]}" in row for row in train] == [False, True, False, True]
    assert all("train/load_balancing" in row for row in train)
    last = train[-1]
    task = make_task(data)
    assert len(task.train_data) == NUM_WINDOWS
    shares = []
    for name, rows in zip(EXPERTS, gradients_of_samples(task), strict=True):
        routed = rows[rows.abs().sum(1) > 0]
        share = len(routed) / NUM_WINDOWS
        assert last[f"train/routed_samples/{name}"] == pytest.approx(share, rel=1e-5), name
        if len(routed) < 2:
            continue  # no variance over routed samples
        shares.append(share)
        found = last[f"noise_scale/{name}/value"]
        assert found == pytest.approx(exact_noise_scale(rows), rel=1e-3), name
        # The formula is of a distribution, whose variance counts each sample as 1/n, where the meter's has n − 1.
        unbiased = NUM_WINDOWS / (NUM_WINDOWS - 1)
        own = exact_noise_scale(routed) * (len(routed) - 1) / len(routed)
        assert found == pytest.approx(unbiased * expert_noise_scale(own, probability=share), rel=0.02), name
        assert routed_noise_scale(found / unbiased, probability=share) == pytest.approx(own, rel=0.02), name
        for key in (f"noise_scale/{name}/value", f"train/routed_samples/{name}"):
            assert summary[key] == last[key]
    assert len(shares) >= NUM_EXPERTS / 2
    assert max(shares) > 1.5 * min(shares)
    tokens = sum(last[f"train/routed_tokens/{name}"] for name in EXPERTS)
    assert tokens == pytest.approx(1.0)  # top-1 without a capacity
    assert json.loads((tmp_path / f"run-{world_size}" / "summary.json").read_text())[f"noise_scale/{EXPERTS[0]}/value"]


def test_a_run_measures_each_local_block_by_its_own_loss(tmp_path):
    """φ of a block is tr(Σ)/|G|² of the gradients that its loss alone gives each sample, to 0.1 %."""
    data = make_nanogpt_folder(tmp_path / "data", num_tokens=CONTEXT * NUM_WINDOWS + 1)

    def task():
        torch.manual_seed(3)
        shape = {"vocab_size": 96, "context": CONTEXT, "width": 16, "depth": 2, "heads": 2}
        made = gpt(data=str(data), **shape, local_blocks=2)
        for parameter in made.model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return made

    config = exactly_measured(tmp_path / "run", groups="local_blocks")
    summary = Trainer(config, task=task).run()
    model, windows = task().model.train(), torch.stack([task().train_data[index] for index in range(NUM_WINDOWS)])
    for name, own in model.local_blocks().items():
        place, rows = int(name[-1]), []
        for window in windows.long():
            found = model(window[None, :-1])
            logits = (*found.local_logits, found.logits)[place]
            gradients = torch.autograd.grad(functional.cross_entropy(logits[0], window[1:]), own)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
        expected = exact_noise_scale(torch.stack(rows))
        assert summary[f"noise_scale/{name}/value"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("groups", "needed"),
    [("experts", "modules called 'experts'"), ("local_blocks", "parts of the model with losses of their own")],
)
def test_a_model_without_such_parts_is_refused(tmp_path: Path, groups, needed):
    """In one sentence, with the setting and what to write instead."""
    config = make_config(tmp_path / "run", noise=NoiseConfig(groups=groups))
    with pytest.raises(ConfigError, match=rf"noise\.groups={groups} needs {needed}.* noise\.groups=true"):
        Trainer(config, task=noisy)
