"""The arms of each way to cheaper training: settings of runs that are compared with a control."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.learners.pictures import finetuning_pictures
from benchmarks.learners.runs import Arm, run
from dptrain.models.settings import DistillationConfig, ModelConfig, SparsityConfig
from dptrain.tasks.pysource import read_source


def finetuning(folder: Path, *, quick: bool) -> Iterator[Arm]:
    """Yield arms on five classes of mnist1d with 200 signals, for a network that was trained on the other five."""
    of_others = {"task": "mnist1d", "task_options": {"model": "cnn", "classes": "0-4"}}
    run({**of_others, "max_samples": 10_000 if quick else 60_000}, seed=100, folder=folder / "pretrained")
    few = {
        "task": "mnist1d",
        "task_options": {"model": "cnn", "classes": "5-9", "num_train": 200},
        "max_samples": 1_000 if quick else 4_000,
        "global_batch_size": 20,
        "micro_batch_size": 10,
    }
    start: dict[str, Any] = {"weights": str(folder / "pretrained"), "new_head": "8.*"}
    way = "fine-tuning"
    yield Arm(way=way, name="from scratch", settings=few)
    choices: dict[str, dict[str, Any]] = {
        "all weights": {},
        "all weights, layer_decay 0.5": {"layer_decay": 0.5},
        "head alone": {"freeze": "*"},
        **{f"LoRA, rank {rank}": _lora(rank) for rank in ((2,) if quick else (2, 8, 32))},
    }
    for name, choice in choices.items():
        yield Arm(way=way, name=name, control="from scratch", settings={**few, "model": ModelConfig(**start, **choice)})


def _lora(rank: int) -> dict[str, Any]:
    return {"lora_rank": rank, "lora_targets": "1,3,5", "lora_alpha": 2 * rank}


def sparsity(folder: Path, *, quick: bool) -> Iterator[Arm]:  # noqa: ARG001 - the form of a way
    """Yield dense, static and RigL arms at 90 % on two tasks, with equal samples."""
    for task, samples in (("digits", 30_000), ("mnist1d", 40_000)):
        settings = {"task": task, "max_samples": samples // (5 if quick else 1), "global_batch_size": 32}
        way = f"90 % sparse, {task}"
        yield Arm(way=way, name="dense", settings=settings)
        for method in ("static", "rigl"):
            masks = SparsityConfig(method=method, sparsity=0.9)
            control = "dense" if method == "static" else "static"
            yield Arm(way=way, name=method, control=control, settings={**settings, "sparsity": masks})


def distillation(folder: Path, *, quick: bool) -> Iterator[Arm]:
    """Yield a GPT on bytes a quarter of its teacher's size: alone, taught, and alone with the FLOPs of the taught."""
    common = {"task": "pysource", "global_batch_size": 32, "micro_batch_size": 16}
    shape = {"context": 32}
    teacher = folder / "teacher"
    length = 800 if quick else 8_000
    run({**common, "task_options": shape, "max_samples": length}, seed=100, folder=teacher)
    small = {**common, "task_options": {**shape, "width": 56}, "max_samples": length // 2}
    way = "distillation"
    yield Arm(way=way, name="alone", settings=small)
    # At a temperature of 2 and a weight of 0.5 there was no gain; these were chosen by one trial of one seed.
    taught = DistillationConfig(teacher=str(teacher), temperature=1.0, weight=1.0)
    yield Arm(way=way, name="taught", control="alone", settings={**small, "distillation": taught})
    # The outputs of both blocks beside the prediction, at the default weight of 1, tuned by nothing.
    hidden = replace(taught, hidden="blocks.0,blocks.1")
    name = "taught, hidden states too"
    yield Arm(way=way, name=name, control="alone", settings={**small, "distillation": hidden})
    # FLOPs of the student with its teacher over those of the student, by the parameters of matrices: 3 s + t over 3 s.
    ratio = 1 + _matrix_weights(128) / (3 * _matrix_weights(56))
    longer = 32 * round(ratio * length / 2 / 32)
    yield Arm(way=way, name="alone, FLOPs of taught", control="taught", settings={**small, "max_samples": longer})


def _matrix_weights(width: int, *, depth: int = 2, vocabulary: int = 256) -> int:
    return 12 * depth * width**2 + vocabulary * width


def mixture(folder: Path, *, quick: bool) -> Iterator[Arm]:
    """Yield a dense GPT on bytes, and mixtures of four experts of its size, one or two per token, at equal FLOPs.

    The dense one has the experts' activation, so that its feed-forward layer is one expert.
    """
    shape = {"vocab_size": 256, "context": 32, "width": 64, "feed_forward": "relu2"}
    options: dict[str, Any] = {"data": str(source_tokens(folder / "data")), **shape}
    common = {"task": "gpt", "global_batch_size": 32, "micro_batch_size": 32}
    way, samples = "mixture of experts", 1_600 if quick else 12_800

    def settings(max_samples: int, top_k: int | None) -> dict[str, Any]:
        choice = {} if top_k is None else {"num_experts": 4, "top_k": top_k}
        return {**common, "task_options": {**options, **choice}, "max_samples": max_samples}

    def flops_per_sample(top_k: int | None) -> float:
        return float(run(settings(64, top_k), seed=100, folder=folder / "probe")["flops"]) / 64

    dense = flops_per_sample(None)
    yield Arm(way=way, name="dense", settings=settings(samples, None))
    for top_k in (1, 2):
        fewer = 32 * round(samples * dense / flops_per_sample(top_k) / 32)
        yield Arm(way=way, name=f"4 experts, top-{top_k}", control="dense", settings=settings(fewer, top_k))
    name = "4 experts, top-2, samples of dense"
    yield Arm(way=way, name=name, control="dense", settings=settings(samples, 2))


def source_tokens(folder: Path) -> Path:
    """Write the bytes of task `pysource` as token files, with 64 KiB held out that are spread over all that is."""
    train, held_out = read_source(Path(sysconfig.get_paths()["stdlib"]))
    pieces = held_out[: len(held_out) // 1024 * 1024].view(-1, 1024)
    spread = pieces[torch.linspace(0, len(pieces) - 1, 64).long()].flatten()
    folder.mkdir()
    for name, tokens in (("train", train), ("val", spread)):
        tokens.numpy().astype("uint16").tofile(folder / f"{name}.bin")
    return folder


def small_batches(folder: Path, *, quick: bool) -> Iterator[Arm]:  # noqa: ARG001 - the form of a way
    """Yield normalisations of the convolutional network on mnist1d, at 2 samples per replica and 16 in a step.

    A step of 16 on 8 replicas of 2 is 8 micro-batches of 2 on one. SyncBatchNorm on 8 replicas takes its means over all
    16, as batch norm does over one micro-batch of 16; torch has it for GPUs only. The other norms look at one sample,
    so 1 per replica is the same training in other roundings: one row shows it. Batch norm refuses 1.
    """
    synced = "SyncBatchNorm, 2 per replica"
    arms = {
        synced: ("batch", 16),
        "batch norm, 2 per replica": ("batch", 2),
        "group norm, 2 per replica": ("group", 2),
        "group norm, 1 per replica": ("group", 1),
        "filter response norm, 2 per replica": ("response", 2),
        "no norm, 2 per replica": ("none", 2),
    }
    for name, (norm, size) in arms.items():
        settings = {
            "task": f"{Path(__file__).with_name('normalised_cnn.py')}:build",
            "task_options": {"norm": norm},
            "max_samples": 800 if quick else 4_800,
            "global_batch_size": 16,
            "micro_batch_size": size,
        }
        yield Arm(way="small batches", name=name, control=None if name == synced else synced, settings=settings)


WAYS = {
    "fine-tuning": finetuning,
    "fine-tuning-pictures": finetuning_pictures,
    "sparsity": sparsity,
    "distillation": distillation,
    "mixture": mixture,
    "small-batches": small_batches,
}
