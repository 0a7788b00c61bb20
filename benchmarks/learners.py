"""What do four ways to cheaper training gain, and what do they do to the gradient noise?"""
# python -m benchmarks.learners [--json PATH|-] [--page FILE] [--processes N] [--parts NAME,…] [--quick]

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.replicas import run_replicas
from dptrain.models.experts import ExpertsConfig
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.models.settings import DistillationConfig, ModelConfig, SparsityConfig
from dptrain.tasks.base import split_loss
from dptrain.tasks.gpt import next_token_loss
from dptrain.tasks.pysource import read_source
from dptrain.tracking.jsonl import read_rows
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    Trainer,
)

_NEVER = 10**9
_SEEDS = (0, 1, 2)
_EARLY = 0.2
PARTS = ("fine-tuning", "sparsity", "distillation", "experts", "mixture", "small-batches")
_UNRESOLVED = "not resolved"
_HOW_TO_READ = (
    "A margin is the control's loss less the arm's, in units of the larger of their two standard deviations over "
    "seeds. With three seeds such a deviation is itself off by half: a margin below 2 is weak evidence. FLOPs are "
    "counted, those of a teacher included; GFLOP by density is what hardware that passes over zeros would need. "
    "Seconds are in the JSON; other work ran on the machine, so they say little."
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        way: the question that it belongs to.
        name: of the arm.
        control: name of the arm of the same way that it is compared with; None for a control.
        settings: of the run.
    """

    way: str
    name: str
    control: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def measure(
    quick: bool,  # noqa: FBT001 - the harness's own signature
    *,
    parts: Sequence[str] = PARTS,
    num_processes: int = 1,
) -> harness.Findings:
    """Train all arms of some parts, three seeds each, some runs at a time: they do not know of one another."""
    seeds = _SEEDS[:2] if quick else _SEEDS
    rows: list[dict[str, Any]] = []
    # First, for it needs no training.
    sizes = (1, 2) if quick else (1, 2, 4)
    errors = [experts_gradient_error(world_size) for world_size in sizes] if "experts" in parts else []
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        for number, (part, way) in enumerate(_WAYS.items()):
            if part not in parts:
                continue
            folder = Path(name) / str(number)
            folder.mkdir()
            arms = list(way(folder, quick=quick))
            jobs = [(arm, seed) for arm in arms for seed in seeds]
            futures = [
                pool.submit(_train, arm, seed=seed, folder=folder / f"run-{at}") for at, (arm, seed) in enumerate(jobs)
            ]
            found = [future.result() for future in futures]
            for at, arm in enumerate(arms):
                rows.append(_row(arm, found[at * len(seeds) : (at + 1) * len(seeds)]))
                print(rows[-1], file=sys.stderr)
            _compare(rows, arms)
    return harness.Findings(
        figures={**_figures(rows), **({"experts_gradient_error": max(errors)} if errors else {})},
        rows=rows,
        columns={
            "way": "{way}",
            "arm": "{arm}",
            "held-out loss": "{loss:.4f} ± {loss_spread:.4f}",
            "accuracy": "{accuracy_text}",
            "GFLOP": "{gflop:.3g}",
            "by density": "{sparse_text}",
            "noise scale early": "{noise_early}",
            "late": "{noise_late}",
            "against its control": "{verdict}",
        },
        note=f"Means over {len(seeds)} seeds ± their standard deviation; noise scales are medians. One replica each.",
    )


# The ways


def finetuning(folder: Path, *, quick: bool) -> Iterator[Arm]:
    """Yield arms on five classes of mnist1d with 200 signals, for a network that was trained on the other five."""
    of_others = {"task": "mnist1d", "task_options": {"model": "cnn", "classes": "0-4"}}
    _run({**of_others, "max_samples": 10_000 if quick else 60_000}, seed=100, folder=folder / "pretrained")
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
    _run({**common, "task_options": shape, "max_samples": length}, seed=100, folder=teacher)
    small = {**common, "task_options": {**shape, "width": 56}, "max_samples": length // 2}
    way = "distillation"
    yield Arm(way=way, name="alone", settings=small)
    # At a temperature of 2 and a weight of 0.5 there was no gain; these were chosen by one trial of one seed.
    taught = {**small, "distillation": DistillationConfig(teacher=str(teacher), temperature=1.0, weight=1.0)}
    yield Arm(way=way, name="taught", control="alone", settings=taught)
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
    options: dict[str, Any] = {"data": str(_source_tokens(folder / "data")), **shape}
    common = {"task": "gpt", "global_batch_size": 32, "micro_batch_size": 32}
    way, samples = "mixture of experts", 1_600 if quick else 12_800

    def arm(name: str, *, max_samples: int, control: str | None = "dense", **choice: int) -> Arm:
        settings = {**common, "task_options": {**options, **choice}, "max_samples": max_samples}
        return Arm(way=way, name=name, control=control, settings=settings)

    def flops_per_sample(**choice: int) -> float:
        probe = arm("probe", max_samples=64, **choice)
        return float(_run(probe.settings, seed=100, folder=folder / "probe")["flops"]) / 64

    dense = flops_per_sample()
    yield arm("dense", max_samples=samples, control=None)
    for top_k in (1, 2):
        choice = {"num_experts": 4, "top_k": top_k}
        fewer = 32 * round(samples * dense / flops_per_sample(**choice) / 32)
        yield arm(f"4 experts, top-{top_k}", max_samples=fewer, **choice)
    yield arm("4 experts, top-2, samples of dense", max_samples=samples, num_experts=4, top_k=2)


def _source_tokens(folder: Path) -> Path:
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


_WAYS = {
    "fine-tuning": finetuning,
    "sparsity": sparsity,
    "distillation": distillation,
    "mixture": mixture,
    "small-batches": small_batches,
}


# One run


def _train(arm: Arm, *, seed: int, folder: Path) -> dict[str, Any]:
    summary = _run(arm.settings, seed=seed, folder=folder)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    end = float(summary["samples_seen"])
    scales = [
        (_number(row["progress/samples"]) / end, _number(row["noise_scale/value"]))
        for row in rows
        if row.get("noise_scale/value") is not None
    ]
    early = [scale for part, scale in scales if _EARLY / 2 <= part <= 1.5 * _EARLY]
    late = [scale for part, scale in scales if part >= 1 - _EARLY]
    return {
        "loss": summary["eval_loss"],
        "accuracy": summary.get("accuracy"),
        "seconds": summary["wall_s"],
        "flops": summary["flops"],
        "sparse_flops": summary.get("sparse_flops"),
        "noise_early": statistics.median(early) if early else None,
        "noise_late": statistics.median(late) if late else None,
    }


def _number(value: Any) -> float:  # noqa: ANN401 - of a row
    return float(value)


def _run(settings: Mapping[str, Any], *, seed: int, folder: Path) -> dict[str, Any]:
    """Train in this process; a folder that is there already is another seed's, and goes."""
    if folder.exists():
        shutil.rmtree(folder)
    config = TrainConfig(
        **{
            "run_dir": str(folder),
            "seed": seed,
            "device": "cpu",
            "control": ControlConfig(law="constant", mode="measure"),
            "noise": NoiseConfig(every=2),
            "optimizer": OptimizerConfig(),
            "checkpoint": CheckpointConfig(every_samples=_NEVER, keep=1),
            "log": LogConfig(tracker="none", print_every_steps=_NEVER, eval_every_samples=_NEVER),
            **settings,
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(config).run()
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


# What came out


def _row(arm: Arm, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [result["loss"] for result in results]
    accuracies = [result["accuracy"] for result in results if result["accuracy"] is not None]
    sparse = results[0]["sparse_flops"]
    return {
        "way": arm.way,
        "arm": arm.name,
        "loss": statistics.mean(losses),
        "loss_spread": statistics.stdev(losses),
        "accuracy_text": f"{statistics.mean(accuracies):.3f}" if accuracies else "–",
        "seconds": statistics.mean(result["seconds"] for result in results),
        "gflop": results[0]["flops"] / 1e9,
        "sparse_text": "–" if sparse is None else f"{sparse / 1e9:.3g}",
        "noise_early": _median(result["noise_early"] for result in results),
        "noise_late": _median(result["noise_late"] for result in results),
        "losses": " ".join(f"{loss:.5f}" for loss in losses),
        "verdict": "–",
    }


def _median(values: Iterator[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else _UNRESOLVED


def _compare(rows: list[dict[str, Any]], arms: Sequence[Arm]) -> None:
    """Say of each arm how far it is below its control, in units of the larger spread of the two."""
    found = {(row["way"], row["arm"]): row for row in rows}
    for arm in arms:
        if arm.control is not None:
            row, control = found[arm.way, arm.name], found[arm.way, arm.control]
            margin = _margin(row, control)
            row["margin"] = margin
            gain = "gain" if margin > 1 else "loss" if margin < -1 else "no gain"
            row["verdict"] = f"{gain} over {arm.control}: {margin:+.1f} spreads"


def _margin(row: Mapping[str, Any], control: Mapping[str, Any]) -> float:
    spread = max(row["loss_spread"], control["loss_spread"], 1e-12)
    return float((control["loss"] - row["loss"]) / spread)


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    margins = {(row["way"], row["arm"]): row["margin"] for row in rows if "margin" in row}
    figures = {}
    for name, arm in (
        ("finetune_margin_in_spreads", ("fine-tuning", "all weights")),
        ("distill_margin_in_spreads", ("distillation", "taught")),
    ):
        if arm in margins:
            figures[name] = margins[arm]
    if orders := [margin > 0 for (_, arm), margin in margins.items() if arm == "rigl"]:
        figures["rigl_order_holds"] = float(all(orders))
    return figures


# Experts


def experts_gradient_error(world_size: int) -> float:
    """Return the largest error of the replicas' mean gradient of a GPT of experts, over its largest component.

    The reference is one process with all samples; routing, capacity and balance are counted within a sequence.
    """
    model, windows = _experts(8)
    loss, _ = split_loss(next_token_loss(model, windows, balance_weight=0.01))
    loss.backward()  # type: ignore[no-untyped-call] # torch declares no types for it
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found = torch.tensor(run_replicas(_gradient_of_share, world_size=world_size))
    return float((found - expected).abs().max() / expected.abs().max())


def _experts(num_windows: int) -> tuple[Gpt, torch.Tensor]:
    torch.manual_seed(0)
    experts = ExpertsConfig(num_experts=4, top_k=2, capacity_factor=1.25)
    model = Gpt(GptConfig(width=32, depth=1, context=16, experts=experts)).train()
    for parameter in model.parameters():  # blocks begin as the identity, where experts have no gradient
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randint(0, 256, (num_windows, 17))


def _gradient_of_share(rank: int, world_size: int) -> list[float]:
    from torch.nn.parallel import DistributedDataParallel

    model, windows = _experts(8)
    share = windows.chunk(world_size)[rank]
    replica = DistributedDataParallel(model)  # has a name: let go before the backward pass, it would average nothing
    loss, _ = split_loss(next_token_loss(replica, share, balance_weight=0.01))
    loss.backward()  # type: ignore[no-untyped-call] # torch declares no types for it
    return [float(value) for p in model.parameters() if p.grad is not None for value in p.grad.flatten()]


def page(findings: harness.Findings, *, command: str) -> str:
    """Return the result as a page."""
    heads = list(findings.columns)
    lines = [
        "# What four ways to cheaper training gain",
        "",
        f"`{command}` on {harness.environment(device='cpu')['processor']}, torch {torch.__version__}. {findings.note}",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(
            f"| {' | '.join(template.format_map(row) for template in findings.columns.values())} |"
            for row in findings.rows
        ),
        "",
        *(["| figure | value |", "|---|---|"] if findings.figures else []),
        *(f"| {name} | {value:.3g} |" for name, value in findings.figures.items()),
        *([""] if findings.figures else []),
        _HOW_TO_READ,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser: argparse.ArgumentParser = harness.command_line(question=__doc__, name="learners")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write the result as a page")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="runs at a time")
    parser.add_argument("--parts", metavar="NAME,…", default=",".join(PARTS), help="what to measure; all by default")
    options = parser.parse_args()
    parts = [part.strip() for part in options.parts.split(",")]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    began_s = time.monotonic()
    findings = measure(options.quick, parts=parts, num_processes=options.processes)
    assert all(math.isfinite(value) for value in findings.figures.values()), findings.figures
    name = "learners" if tuple(parts) == PARTS else f"learners --parts {','.join(parts)}"
    harness.tell(findings, options, question=__doc__, name=name, device="cpu")
    if options.page is not None:
        command = f"python -m benchmarks.{name}" + (" --quick" if options.quick else "")
        options.page.write_text(page(findings, command=command), encoding="utf-8")
    print(f"{time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
