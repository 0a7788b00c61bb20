"""Experts that replicas share out: the run of 2 × 2 replicas is that of one process, and is resumed to the last bit."""

from __future__ import annotations

import pytest
import torch

import dptrain
from dptrain.checkpoint.store import load_newest
from dptrain.errors import ConfigError, DesyncError, ObservationError
from dptrain.tasks.gpt import gpt
from dptrain.tracking.jsonl import read_rows
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    ExecutionConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    Trainer,
)
from tests.replicas import run_replicas
from tests.runs import BY_CLOCK, Killed, assert_same, attempt, noisy, result_of
from tests.tasks.made_data import make_nanogpt_folder

BATCH = 16
NOT_COMPARED = BY_CLOCK | {"batch/accumulation", "ledger/bytes_sent", "time/world_size"}


def make_task(data):
    """Four experts with a capacity; as blocks begin as the identity, where experts have no gradient, they are moved."""
    torch.manual_seed(3)
    shape = {"vocab_size": 96, "context": 8, "width": 16, "depth": 2, "heads": 2}
    task = gpt(data=str(data), **shape, num_experts=4, top_k=2, capacity_factor=1.25)
    for parameter in task.model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return task


def make_config(folder, size, *, name="sgd", **settings):
    """Steps of eight micro-batches and a last one of three, each of which clips; evaluated and saved on the way."""
    settings = {
        "device": "cpu",
        "max_samples": 3 * BATCH + 5,
        "global_batch_size": BATCH,
        "micro_batch_size": 2,
        "layout_replicas": 4,
        "replica_check_every_steps": 1,
        "control": ControlConfig(law="constant"),
        "optimizer": OptimizerConfig(name=name, learning_rate=0.1, max_grad_norm=0.2),
        "noise": NoiseConfig(groups="experts", every=1),
        "checkpoint": CheckpointConfig(every_samples=2 * BATCH),
        "log": LogConfig(tracker="none", eval_every_samples=2 * BATCH),
        "execution": ExecutionConfig(expert_parallel_size=size),
        **settings,
    }
    return TrainConfig(run_dir=str(folder), **settings)


def on_2_by_2(rank, world_size, data, folder):
    """Train; then let the experts of one rank drift from the same ones elsewhere, and return what is said of it."""
    trainer = Trainer(make_config(folder / "shared", 2), task=lambda: make_task(data))
    trainer.run()
    weights = trainer._bare_model.blocks[1].experts.weight_out
    weights.data += float(rank == 3)
    with pytest.raises(DesyncError) as caught:
        trainer._drift.check(4)
    with pytest.raises(ObservationError, match="its experts are shared out over replicas"):
        dptrain.attach(trainer._model)
    return str(caught.value), tuple(weights.shape)


def test_2_by_2_replicas_train_as_one_process_does(tmp_path):
    """Losses, norms before clipping, noise scale of each expert, FLOPs, weights and optimizer: equal to rounding.

    The checkpoint has whole experts. A replica whose experts differ from the same ones elsewhere is found. A meter of a
    loop of one's own is refused there.
    """
    data = make_nanogpt_folder(tmp_path / "data", num_tokens=1200)
    found = run_replicas(on_2_by_2, world_size=4, args=(data, tmp_path))
    Trainer(make_config(tmp_path / "alone", 1), task=lambda: make_task(data)).run()
    alone, shared = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("alone", "shared"))
    assert [row["kind"] for row in alone] == [row["kind"] for row in shared]
    assert {"eval/loss", "noise_scale/value", "noise_scale/blocks.1.experts.3/value"} <= {
        key for row in alone for key in row
    }
    for one, other in zip(alone, shared, strict=True):
        for key in one.keys() - NOT_COMPARED:
            expected = pytest.approx(one[key], rel=1e-4) if isinstance(one[key], float) else one[key]
            assert other[key] == expected, (one["step"], key)
    assert all(row["train/grad_norm"] > 0.2 for row in alone if row["kind"] == "train")
    runs = [load_newest(tmp_path / name / "checkpoints") for name in ("alone", "shared")]
    for group in ("model", "optimizer"):
        torch.testing.assert_close(runs[1].tensors(group), runs[0].tensors(group), rtol=1e-4, atol=1e-6)
    assert not torch.equal(
        runs[0].tensors("model")["blocks.0.experts.weight_in"], make_task(data).model.blocks[0].experts.weight_in
    )
    complaint, shape = found[0]
    assert shape == (2, 64, 16)
    assert "blocks.1.experts.weight_out (part 2 of 2) on rank 1, 3 of 4" in complaint


def killed_and_resumed(rank, world_size, data, folder):
    """Train a run whole and one that dies in its third step; return what a run with whole experts says of it."""
    settings = {"task": lambda: make_task(data), "keep": 3}
    attempt(folder / "whole", config=make_config(folder / "whole", 2, name="adamw"), **settings)
    config = make_config(folder / "killed", 2, name="adamw")
    with pytest.raises(Killed):
        attempt(folder / "killed", kill_at=3, config=config, **settings)
    torch.distributed.barrier()
    with pytest.raises(ConfigError) as caught:
        Trainer(make_config(folder / "killed", 1, name="adamw"), task=lambda: make_task(data), resume=True).run()
    torch.distributed.barrier()
    attempt(folder / "killed", config=config, **settings)
    return str(caught.value)


def test_killed_and_resumed_it_ends_the_same(tmp_path):
    """On two replicas with half of the experts each: same bits, no row lost. Another size of groups is refused."""
    data = make_nanogpt_folder(tmp_path / "data", num_tokens=1200)
    refused = run_replicas(killed_and_resumed, world_size=2, args=(data, tmp_path))
    assert_same(result_of(tmp_path / "killed"), result_of(tmp_path / "whole"))
    runs = [load_newest(tmp_path / name / "checkpoints") for name in ("killed", "whole")]
    for group in ("model", "optimizer"):
        resumed, whole = (run.tensors(group) for run in runs)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), group
    assert "execution.expert_parallel_size was 2 and is 1" in refused[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"execution": ExecutionConfig(expert_parallel_size=2, wrapper="fsdp")}, "use ddp"),
        ({"optimizer": OptimizerConfig(average_decay=0.9)}, "averages whole weights"),
    ],
)
def test_what_needs_whole_experts_is_refused(tmp_path, settings, message):
    """Before anything is trained, with the remedy."""
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, 2, **settings)


def test_a_number_that_does_not_fit_is_refused(tmp_path):
    """Where there are fewer replicas than parts."""
    with pytest.raises(ConfigError, match="does not divide the number of replicas, 1"):
        Trainer(make_config(tmp_path / "run", 2), task=noisy)
