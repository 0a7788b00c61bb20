"""How does the noise scale depend on precision, where does rounding drown the gradient, and what does it cost?"""
# python -m benchmarks.precision [--json PATH|-] [--page] [--parts NAME,…] [--quick]

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks import harness
from benchmarks.precision_page import figures_of, write
from dptrain.checkpoint.store import load_newest
from dptrain.cli.operations.int8_export import Int8Export, in_int8
from dptrain.models.number_formats import FORMATS
from dptrain.models.quantization import quantize_layers
from dptrain.models.settings import ModelConfig
from dptrain.tasks import Task, resolve_task
from dptrain.tasks.base import split_loss
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, TrainConfig, Trainer

_NEVER = 10**9
_SEEDS = (0, 1, 2)
_BATCH = 32
_EARLY, _LATE = 0.1, 0.5  # later on, |G|² of digits and mnist1d cannot be told from zero by so few samples
_NUM_POINTS, _NUM_BATCHES = 8, 2
_Z95 = 1.96
_WIDEST = 100.0  # an interval whose bounds are further apart than by this factor resolves nothing
Arm = tuple[str | None, str]
"""A number format, None for float32, and its rounding."""
FULL: Arm = (None, "nearest")
PARTS = ("gradients", "losses")
_MEASURED: Sequence[Arm] = (
    FULL,
    ("bf16", "nearest"),
    *((kind, rounding) for kind in ("fp8", "int8") for rounding in ("nearest", "stochastic")),
    ("fp6", "nearest"),
    *((kind, rounding) for kind in ("int6", "fp4", "int4", "int3") for rounding in ("nearest", "stochastic")),
)
"""What gradients are computed in."""
_TRAINED: Sequence[Arm] = (
    FULL,
    ("fp8", "nearest"),
    *((kind, rounding) for kind in ("fp4", "int3") for rounding in ("nearest", "stochastic_gradients")),
)
"""What models are trained in."""
_CHUNK = 50  # samples whose gradients are computed at a time


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task, and how much of it is measured.

    Attributes:
        options: of the task.
        samples: length of a run.
        measured: samples whose gradients are computed one by one.
    """

    options: Mapping[str, Any]
    samples: int
    measured: int


CASES: Mapping[str, Case] = {
    "digits": Case(options={}, samples=6_400, measured=1_000),
    "mnist1d": Case(options={}, samples=6_400, measured=1_000),
    "pysource": Case(options={"width": 32, "context": 32}, samples=1_920, measured=200),
}


def measure(quick: bool, *, parts: Sequence[str] = PARTS) -> harness.Findings:  # noqa: FBT001 - the harness's own
    """Measure gradients along one run of each task in full precision, and train each task in some formats."""
    torch.set_num_threads(1)
    seeds = _SEEDS[:2] if quick else _SEEDS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for task in CASES if "gradients" in parts else ():
            rows += course(task, quick=quick, folder=Path(name) / task)
            print(rows[-1], file=sys.stderr)
        for task in CASES if "losses" in parts else ():
            full: list[float] = []
            for arm in _TRAINED[:2] if quick else _TRAINED:
                own = [_held_out(task, arm, seed=seed, quick=quick, folder=Path(name) / "run") for seed in seeds]
                full = full or own
                rows.append(loss_row(task, arm, own, full=full))
                print(rows[-1], file=sys.stderr)
    return harness.Findings(
        figures=figures_of(rows),
        rows=rows,
        columns={"table": "{table}", "task": "{task}", "arm": "{arm}"},
        note=f"One replica; {len(seeds)} seeds where a loss has a spread; intervals are 95 %.",
    )


# Gradients along one run


def course(name: str, *, quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Train in full precision; on the way, compare gradients through the same weights in every format."""
    case = CASES[name]
    torch.manual_seed(0)
    task = resolve_task(name, options=dict(case.options))
    config = settings(name, FULL, seed=0, quick=quick, folder=folder)
    points = [round(config.max_samples * (at + 0.5) / _NUM_POINTS) for at in range(_NUM_POINTS)]  # type: ignore[operator]
    stages = {"early": round(_EARLY * config.max_samples), "late": round(_LATE * config.max_samples)}  # type: ignore[operator]
    rows: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(io.StringIO()):
        steps = Trainer(config, task=task).steps()
        for record in steps:
            passed = range(record.position + 1, record.position + record.global_batch_size + 1)
            for stage, at in stages.items():
                if at in passed:
                    rows += noise_rows(task, stage=stage, count=case.measured // (10 if quick else 1))
            for at in points:
                if at in passed:
                    rows += gap_rows(task, part=at / config.max_samples)  # type: ignore[operator]
    checkpoint = load_newest(folder / "checkpoints")
    assert checkpoint is not None
    return [*rows, export_row(name, in_int8(checkpoint, checkpoint.tensors("model")))]


def export_row(task: str, exported: Int8Export) -> dict[str, Any]:
    """Return the row of a model's export in int8."""
    assert exported.loss is not None
    (before, after), (bytes_before, bytes_after) = exported.loss, exported.size_bytes
    row = {"table": "export", "task": task, "arm": "int8 weights", "before": before, "after": after}
    return {**row, "change": after - before, "bytes_before": bytes_before, "bytes_after": bytes_after}


def noise_rows(task: Task, *, stage: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield φ of each format from the gradients of the same samples, with intervals; ratios are to float32, paired."""
    picks = torch.randperm(len(task.train_data), generator=torch.Generator().manual_seed(0))[:count].tolist()  # type: ignore[arg-type]
    full, full_mean = None, torch.zeros(())
    for arm in _MEASURED:
        gradients = _of_samples(in_format(task.model, arm), task, picks)
        found, mean = noise(gradients), gradients.mean(0)
        if full is None:
            full, full_mean = found, mean
        phi, ratio = interval(found.log_scales), interval(found.log_scales - full.log_scales)
        yield {
            "table": "noise",
            "task": task.name.partition("-")[0],
            "arm": _arm(arm),
            "stage": stage,
            "bits": 32 if arm[0] is None else FORMATS[arm[0]].bits,
            "kind": arm[0] or "float32",
            "rounding": arm[1],
            "noise_scale": phi,
            "ratio": ratio,
            "trace_ratio": found.trace / full.trace,
            "square_ratio": found.square / full.square,
            "cosine": float(torch.cosine_similarity(mean, full_mean, dim=0)),
        }


def gap_rows(task: Task, *, part: float) -> Iterator[dict[str, Any]]:
    """Yield ‖g‖ over √3 × the root mean square of what a format adds to it, on some batches of a step's size."""
    order = torch.randperm(len(task.train_data), generator=torch.Generator().manual_seed(1)).tolist()  # type: ignore[arg-type]
    batches = [order[_BATCH * at : _BATCH * (at + 1)] for at in range(_NUM_BATCHES)]
    full = _gradients(in_format(task.model, FULL), task, batches)
    for arm in _MEASURED[1:]:
        error = _gradients(in_format(task.model, arm), task, batches) - full
        yield {
            "table": "gap",
            "task": task.name.partition("-")[0],
            "arm": _arm(arm),
            "kind": arm[0] or "float32",
            "rounding": arm[1],
            "part": part,
            "gap": float((full.square().sum() / (3 * error.square().sum().clamp(min=1e-30))).sqrt()),
        }


def in_format(model: nn.Module, arm: Arm) -> nn.Module:
    """Return a copy whose layers compute in a format; its draws are the same at each call."""
    copied = copy.deepcopy(model).train()
    if arm[0] is not None:
        quantize_layers(copied, to=arm[0], rounding=arm[1])
    torch.manual_seed(0)
    return copied


def _of_samples(model: nn.Module, task: Task, picks: Sequence[int]) -> Tensor:
    """Return the gradient of each sample, flat, in float64."""
    batch = default_collate([task.train_data[pick] for pick in picks])
    is_one = isinstance(batch, Tensor)

    def loss(parameters: Mapping[str, Tensor], *parts: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(model, dict(parameters), inputs)
            return found

        one = [part[None] for part in parts]
        return split_loss(task.loss(call, one[0] if is_one else tuple(one)))[0]  # type: ignore[arg-type] # it is called

    each = torch.func.vmap(
        torch.func.grad(loss),
        in_dims=(None, *[0] * (1 if is_one else len(batch))),
        randomness="different",
        chunk_size=_CHUNK,
    )
    found = each({name: p.detach() for name, p in model.named_parameters()}, *([batch] if is_one else batch))
    return torch.cat([gradient.flatten(1) for gradient in found.values()], dim=1).double()


def _gradients(model: nn.Module, task: Task, batches: Sequence[Sequence[int]]) -> Tensor:
    """Return the gradient of each batch, flat, in float64."""
    parameters = list(model.parameters())
    found = []
    for batch in batches:
        samples = (task.collate or default_collate)([task.train_data[index] for index in batch])
        loss, _ = split_loss(task.loss(model, samples))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found).double()


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Unbiased |G|² and tr(Σ), and ln φ of all samples (first) and without each of them.

    Attributes:
        square: |G|².
        trace: tr(Σ).
        log_scales: not a number where |G|² is not positive.
    """

    square: float
    trace: float
    log_scales: Tensor


def noise(gradients: Tensor) -> Noise:
    """Return the noise of samples, from their gradients of shape (samples, parameters)."""
    total, squares = gradients.sum(0), gradients.square().sum(1)
    without = torch.cat([torch.zeros(1).double(), torch.ones(len(gradients)).double()])
    count = len(gradients) - without
    rest = torch.cat([torch.zeros(1).double(), squares])
    projected = torch.cat([torch.zeros(1).double(), gradients @ total])
    norms = squares.sum() - rest
    square = (total @ total - 2 * projected + rest - norms) / (count * (count - 1))
    trace = norms / count - square
    return Noise(square=float(square[0]), trace=float(trace[0]), log_scales=(trace / square).log())


def interval(logs: Tensor) -> tuple[float, float, float] | None:
    """Return exp of the first entry, with its 95 % jackknife interval from the others; None where not resolved."""
    value, others = logs[0], logs[1:]
    spread = ((others - others.mean()).square().sum() * (len(others) - 1) / len(others)).sqrt()
    bounds = [float((value + sign * _Z95 * spread).exp()) for sign in (0, -1, 1)]
    resolved = all(math.isfinite(bound) for bound in bounds) and bounds[2] < _WIDEST * bounds[1]
    return (bounds[0], bounds[1], bounds[2]) if resolved else None


# Training in a format


def settings(name: str, arm: Arm, *, seed: int, quick: bool, folder: Path) -> TrainConfig:
    """Return the settings of a run."""
    case = CASES[name]
    return TrainConfig(
        task=name,
        task_options=dict(case.options),
        run_dir=str(folder),
        seed=seed,
        device="cpu",
        max_samples=case.samples // (10 if quick else 1),
        global_batch_size=_BATCH,
        micro_batch_size=_BATCH // 2,
        model=ModelConfig() if arm[0] is None else ModelConfig(quantize=arm[0], rounding=arm[1]),  # type: ignore[arg-type]
        control=ControlConfig(law="constant", mode="off"),
        checkpoint=CheckpointConfig(every_samples=_NEVER, keep=1),
        log=LogConfig(tracker="none", print_every_steps=_NEVER, eval_every_samples=_NEVER),
    )


def _held_out(name: str, arm: Arm, *, seed: int, quick: bool, folder: Path) -> float:
    if folder.exists():  # another seed's
        shutil.rmtree(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(settings(name, arm, seed=seed, quick=quick, folder=folder)).run()
    return float(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["eval_loss"])


def loss_row(task: str, arm: Arm, own: Sequence[float], *, full: Sequence[float]) -> dict[str, Any]:
    """Return the row of some seeds: mean, spread, and the difference to float32 seed by seed."""
    differences = [mine - theirs for mine, theirs in zip(own, full, strict=True)]
    return {
        "table": "loss",
        "task": task,
        "arm": _arm(arm),
        "loss": statistics.mean(own),
        "spread": statistics.stdev(own),
        "difference": statistics.mean(differences),
        "difference_spread": statistics.stdev(differences),
    }


def _arm(arm: Arm) -> str:
    return "float32" if arm[0] is None else f"{arm[0]}, {arm[1].replace('_', ' ')}"


def main() -> None:
    """Measure and tell, on the console and where it was asked for."""
    parser = harness.command_line(question=__doc__, name="precision")
    parser.add_argument("--page", action="store_true", help="write page and picture beside the JSON")
    parser.add_argument("--parts", metavar="NAME,…", default=",".join(PARTS), help="what to measure; all by default")
    options = parser.parse_args()
    parts = [part.strip() for part in options.parts.split(",")]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if options.page and options.json in (None, "-"):
        parser.error("--page writes beside the JSON: give --json PATH")
    findings = measure(options.quick, parts=parts)
    name = "precision" if tuple(parts) == PARTS else f"precision --parts {','.join(parts)}"
    harness.tell(findings, options, question=__doc__, name=name, device="cpu")
    if options.page:
        write(Path(options.json))


if __name__ == "__main__":
    main()
