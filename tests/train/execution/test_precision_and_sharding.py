"""Every way to run a step on two and four replicas, against the plain one: parameters, noise scale, and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dptrain.checkpoint.store import load_newest
from dptrain.tasks import Suggestion, Task
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
from tests.train.test_trainer import NUM_SAMPLES, Numbered, cross_entropy

BATCH, MICRO, STEPS = 16, 4, 6

EXACT = {
    "activation checkpointing": {"execution": ExecutionConfig(activation_checkpointing="blocks")},
    "compiled model": {"execution": ExecutionConfig(compile="model", compile_backend="aot_eager")},
    "compiled blocks": {"execution": ExecutionConfig(compile="blocks", compile_backend="aot_eager")},
}
CLOSE = {
    "fsdp": {"execution": ExecutionConfig(wrapper="fsdp")},
    "hsdp": {"execution": ExecutionConfig(wrapper="hsdp", shard_size=1)},
    "fsdp, checkpointed": {"execution": ExecutionConfig(wrapper="fsdp", activation_checkpointing="blocks")},
}
ROUNDED = {
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "bf16 parameters": {"precision": "bf16_parameters"},
    "fsdp, bf16": {"precision": "bf16", "execution": ExecutionConfig(wrapper="fsdp")},
}


def deep_task():
    """Three blocks of one class, so that there are blocks to find."""
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)]
    return Task(
        name="deep",
        model=nn.Sequential(nn.Linear(6, 16), nn.Sequential(*blocks), nn.Linear(16, 3)),
        train_data=Numbered(NUM_SAMPLES),
        eval_data=Numbered(37),
        loss=cross_entropy,
        suggestion=Suggestion(
            learning_rate=0.02, global_batch_size=BATCH, micro_batch_size=MICRO, max_samples=96, eval_every_samples=50
        ),
    )


def config_of(folder, **settings):
    given = {
        "control": ControlConfig(law="constant"),
        "noise": NoiseConfig(every=1),
        "device": "cpu",
        "max_samples": STEPS * BATCH,
        "optimizer": OptimizerConfig(max_grad_norm=0.5),
        "checkpoint": CheckpointConfig(every_samples=3 * BATCH),
        "log": LogConfig(tracker="none"),
        **settings,
    }
    return TrainConfig(task="deep", run_dir=str(folder), **given)


def train(folder, *, stop_at=None, resume=False, **settings):
    trainer = Trainer(config_of(folder, **settings), task=deep_task, resume=resume)
    for record in trainer.steps():
        if record.step == stop_at:
            return


def in_all_ways(rank, world_size, folder, ways):
    for name, settings in ways.items():
        train(Path(folder) / name, **settings)


def weights(folder):
    return load_newest(Path(folder) / "checkpoints").tensors("model")


def column(folder, name):
    return [row[name] for row in read_rows(Path(folder) / "metrics.jsonl") if row["kind"] == "train"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    ways = {"plain": {}, **EXACT, **CLOSE, **ROUNDED}
    run_replicas(in_all_ways, world_size=2, args=(str(folder), ways), timeout_s=280)
    return folder


@pytest.mark.parametrize("way", EXACT)
def test_ways_that_compute_the_same_give_the_same_bits(runs, way):
    """Checkpointed activations, graphs compiled without fusion and a static graph change no bit of the parameters."""
    plain, found = weights(runs / "plain"), weights(runs / way)
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert column(runs / "plain", "noise_scale/trace") == column(runs / way, "noise_scale/trace")


@pytest.mark.parametrize(("way", "error"), [*((way, 1e-4) for way in CLOSE), *((way, 0.1) for way in ROUNDED)])
def test_other_ways_train_and_measure_the_same_but_for_rounding(runs, way, error):
    """Parameters, gradient norm and both moments of the noise scale agree to what the precision leaves."""
    plain, found = weights(runs / "plain"), weights(runs / way)
    assert plain.keys() == found.keys()
    for name in plain:
        assert (plain[name] - found[name].float()).abs().max() < (1e-5 if error < 0.1 else 0.08), name
    for name in ("train/grad_norm", "noise_scale/trace"):
        assert column(runs / way, name) == pytest.approx(column(runs / "plain", name), rel=error), name


def test_each_rank_saves_its_own_shard(runs):
    """Under FSDP both ranks write a file, rank 0 holds half of the parameters; of HSDP's copies one is written."""
    whole = sum(value.numel() for value in weights(runs / "plain").values())
    for way, num_files in (("fsdp", 2), ("hsdp", 1)):
        files = sorted(load_newest(runs / way / "checkpoints").path.glob("model-shard-*.safetensors"))
        assert len(files) == num_files
        held = [sum(value.numel() for value in load_file(file).values()) for file in files]
        assert sum(held) == whole
        assert max(held) < 0.7 * whole or num_files == 1


def test_parameters_are_kept_in_the_type_that_was_asked_for(runs):
    """With bfloat16 parameters the checkpoint holds these, and the float32 copies beside them."""
    checkpoint = load_newest(runs / "bf16 parameters" / "checkpoints")
    model, masters = checkpoint.tensors("model"), checkpoint.tensors("masters")
    assert all(value.dtype == torch.bfloat16 for value in model.values())
    assert all(value.dtype == torch.float32 for value in masters.values())
    assert all(torch.equal(model[name], masters[name].bfloat16()) for name in masters)


def cut_and_go_on(rank, world_size, folder, ways):
    for name, settings in ways.items():
        train(Path(folder) / name, resume=(Path(folder) / name).exists(), **settings)


RESUMED = {"fp16": ROUNDED["fp16"], "bf16 parameters": ROUNDED["bf16 parameters"], "fsdp": CLOSE["fsdp"]}


def begin(rank, world_size, folder, ways):
    for name, settings in ways.items():
        train(Path(folder) / name, stop_at=4, **settings)


def test_a_run_that_is_cut_goes_on_with_the_same_bits(runs, tmp_path):
    """Loss scale, float32 copies and shards come back from the checkpoint."""
    run_replicas(begin, world_size=2, args=(str(tmp_path), RESUMED), timeout_s=120)
    run_replicas(cut_and_go_on, world_size=2, args=(str(tmp_path), RESUMED), timeout_s=120)
    for name in RESUMED:
        straight, found = weights(runs / name), weights(tmp_path / name)
        assert all(torch.equal(straight[key], found[key]) for key in straight), name


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_sharded_checkpoint_loads_on_any_number_of_replicas(runs, tmp_path, world_size):
    """A run of two shards goes on as four, or as one, to where the plain run ends."""
    sharded = {"run": CLOSE["fsdp"]}
    run_replicas(begin, world_size=2, args=(str(tmp_path), sharded), timeout_s=120)
    run_replicas(cut_and_go_on, world_size=world_size, args=(str(tmp_path), sharded), timeout_s=120)
    plain, found = weights(runs / "plain"), weights(tmp_path / "run")
    for name in plain:
        assert torch.allclose(plain[name], found[name], atol=1e-4), name


def test_a_hook_of_ddp_is_refused_where_there_is_none(tmp_path):
    """noise.observer=hook with shards names the remedy."""
    settings = {"noise": NoiseConfig(observer="hook"), "execution": ExecutionConfig(wrapper="fsdp")}
    with pytest.raises(AssertionError, match=r"ConfigError.*use noise\.observer=parameters"):
        run_replicas(in_all_ways, world_size=2, args=(str(tmp_path), {"run": settings}))
