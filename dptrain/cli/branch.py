"""`dptrain branch RUN --multipliers 1,2,4,8 --window-samples N`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dptrain.checkpoint.store import load_checkpoint
from dptrain.cli.settings import parse
from dptrain.config.built import beta_scaling, decay_factor, learning_rate_schedule
from dptrain.config.filled_in import as_saved, given
from dptrain.config.resume_check import UNTRAINED
from dptrain.config.settings_file import build_config, read_settings
from dptrain.config.train_config import TrainConfig
from dptrain.config.validation import leaves
from dptrain.error_text import shown
from dptrain.errors import CheckpointError, ConfigError
from dptrain.explain.model.branching import Branched, branched
from dptrain.runtime.launcher import GRACE_S
from dptrain.runtime.signals import EXIT_RESUMABLE
from dptrain.sweep.child_runs import RunProcess, Site
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import checkpoints_in, holds_run

_DESCRIPTION = """Find the critical batch size at a moment of a run by trying it: from its checkpoints, train on for a
window of samples with multiples of the batch, and compare the held-out losses. The largest batch that is no worse is
the ground truth that the noise scale stands in for. Each branch is a run folder, and is not trained again with the same
settings."""

_POLL_S = 0.05
_EXIT_DIVERGED = 65
_RULES: Mapping[str, Callable[[float], float]] = {
    "square_root": math.sqrt,
    "linear": lambda multiple: multiple,
    "none": lambda _multiple: 1.0,
}


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A moment of the run from which branches go.

    Attributes:
        path: of the checkpoint.
        step: of the run.
        position: samples seen.
        global_batch_size: in force.
        learning_rate: in force.
        betas: of Adam, in force.
        weight_decay: in force.
        noise_scale: columns of the log at that step.
    """

    path: Path
    step: int
    position: int
    global_batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    noise_scale: Mapping[str, Any]


def branch(arguments: Sequence[str]) -> int:
    """Train the branches and say what they found.

    Raises:
        ConfigError: where there is no checkpoint to branch from, no held-out data, or a setting is wrong.
        CheckpointError: where a checkpoint cannot be trusted.
    """
    options = _parser().parse_args(arguments)
    moments = trunks(options.run, steps=options.at)
    out = options.out or options.run / "branches"
    site = Site.here(num_parallel=1, num_replicas=options.replicas, cpu=options.cpu)
    found = []
    for trunk in moments:
        losses = {}
        for multiple in sorted(options.multipliers):
            loss = _train(trunk, multiple=multiple, options=options, out=out, site=site)
            if loss is None:
                sys.stderr.write(f"dptrain branch: stopped; the same command goes on in {out}\n")
                return EXIT_RESUMABLE
            losses[multiple] = loss
        found.append((trunk, branched(losses, tolerance=options.tolerance)))
    _tell(found, out=out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dptrain branch", description=_DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with checkpoints")
    parser.add_argument("--at", type=_counts, metavar="STEPS", help="steps of its checkpoints; default: the newest")
    parser.add_argument(
        "--multipliers", type=_counts, default=[1, 2, 4, 8], metavar="K", help="of the batch in force; default 1,2,4,8"
    )
    parser.add_argument("--window-samples", type=_count, required=True, metavar="N", help="samples of each branch")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="how much worse a loss may be, in its own unit; default 0.01"
    )
    parser.add_argument(
        "--rule",
        choices=list(_RULES),
        default="square_root",
        help="how the rate follows the multiple; default square_root, for Adam",
    )
    parser.add_argument("--replicas", type=_count, default=1, help="of each branch; default 1")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the branches; default RUN/branches")
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def trunks(run: Path, *, steps: Sequence[int] | None) -> list[Trunk]:
    """Return the moments of a run from which branches can go: those asked for, or that of the newest checkpoint.

    Raises:
        ConfigError: where there is no run, or no such checkpoint.
    """
    if not holds_run(run):
        raise ConfigError(f"{run} is not a run folder: give one that `dptrain train` made")
    folder = checkpoints_in(run)
    there = {int(path.name.removeprefix("step-")): path for path in sorted(folder.glob("step-*"))}
    if not there:
        raise ConfigError(f"there is no checkpoint in {folder}: train with checkpoint.every_samples, and keep enough")
    if missing := set(steps or ()) - set(there):
        raise ConfigError(
            f"there is no checkpoint of step {min(missing)} in {folder}; there are {', '.join(map(str, there))}"
        )
    rows = {row["step"]: row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"}
    config = build_config(read_settings(run / "config.yaml"))
    return [_trunk(there[step], row=rows.get(step, {}), config=config) for step in steps or [max(there)]]


def _trunk(path: Path, *, row: Mapping[str, Any], config: TrainConfig) -> Trunk:
    checkpoint = load_checkpoint(path)
    progress: Any = checkpoint.state["progress"]
    position, batch = progress["position"], progress["global_batch_size"]
    optimizer, factor = config.optimizer, progress["learning_rate_factor"]
    rate = given(optimizer.learning_rate) * learning_rate_schedule(config).factor(position + batch)
    scaling = beta_scaling(config, batch=batch)
    scaled = None if scaling is None else scaling.scaled((optimizer.beta1, optimizer.beta2))
    decay = decay_factor(config, batch=batch, rate_factor=factor)
    return Trunk(
        path=path,
        step=checkpoint.step,
        position=position,
        global_batch_size=batch,
        learning_rate=rate * factor,
        betas=(optimizer.beta1, optimizer.beta2) if scaled is None else (scaled.beta1, scaled.beta2),
        weight_decay=optimizer.weight_decay * (1.0 if decay is None else decay),
        noise_scale={name: row.get(f"noise_scale/{name}") for name in ("value", "lower", "upper")},
    )


def _train(trunk: Trunk, *, multiple: int, options: argparse.Namespace, out: Path, site: Site) -> float | None:
    """Train one branch, if it is not there, and return its held-out loss; None where it was asked to stop."""
    folder = out / f"step-{trunk.step}" / f"x{multiple}"
    arguments = branch_arguments(trunk, multiple=multiple, options=options, folder=folder)
    if holds_run(folder):
        _refuse_another(arguments, folder=folder)
        arguments = ["train", f"--run_dir={folder}", "--resume", *_place(options)]
    if (loss := _loss(folder)) is not None:
        return loss
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(
        f"step {trunk.step}: batch {trunk.global_batch_size * multiple}, {options.window_samples} samples\n"
    )
    sys.stdout.flush()
    process = RunProcess(
        arguments,
        log=folder / "output.txt",
        environment=site.environment(0),
        # This process has read checkpoints: a copy of it would wait for torch's threads, which it does not have.
        fork=False,
    )
    code = _wait(process)
    if code == _EXIT_DIVERGED:
        return math.nan
    if code == EXIT_RESUMABLE:
        return None
    loss = _loss(folder)
    if code != 0 or loss is None:
        reason = process.last_line() if code else "it has no held-out data to compare losses on"
        raise ConfigError(f"the branch in {folder} ended with code {code}: {reason}")
    return loss


def branch_arguments(trunk: Trunk, *, multiple: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of a new branch: the run's settings, but for the batch, the rate and the window."""
    settings = {
        "run_dir": folder,
        # As it is from anywhere: the same branch may be asked for from another folder.
        "branch_from": trunk.path.resolve(),
        "max_samples": trunk.position + options.window_samples,
        "max_steps": "null",
        "global_batch_size": trunk.global_batch_size * multiple,
        "control.law": "constant",
        "control.mode": "off",
        "control.schedule": "null",
        "control.law_options": "{}",
        "optimizer.reference_batch_size": "null",
        "optimizer.learning_rate": trunk.learning_rate * _RULES[options.rule](multiple),
        # What is in force is held. A schedule would end elsewhere, a warm-up begin anew, and rules of rate, betas and
        # decay would go by a noise scale that a branch does not measure, or back to what was tuned.
        "optimizer.schedule": "constant",
        "optimizer.warmup_samples": 0,
        "optimizer.final_fraction": 0,
        "optimizer.decay_fraction": "null",
        "optimizer.preset": "null",
        "optimizer.rule": "none",
        "optimizer.beta_rule": "none",
        "optimizer.decay_rule": "none",
        "optimizer.beta1": trunk.betas[0],
        "optimizer.beta2": trunk.betas[1],
        "optimizer.weight_decay": trunk.weight_decay,
        "log.tracker": "none",
        "log.eval_every_samples": 2**40,
    }
    source = options.run / "config.yaml"
    given = [f"--{name}={value}" for name, value in settings.items()]
    return ["train", f"--config={source}", *_place(options), *given]


def _place(options: argparse.Namespace) -> list[str]:
    """Return where a branch trains; without the device, it would take a GPU that is to be left alone."""
    return [f"--replicas={options.replicas}", *(["--device=cpu"] if options.cpu else [])]


def _refuse_another(arguments: Sequence[str], *, folder: Path) -> None:
    """Refuse a branch that is there and has other settings than are asked for: its loss is no answer to the question.

    Raises:
        ConfigError: with those that differ.
    """
    there = asdict(build_config(read_settings(folder / "config.yaml")))
    asked = leaves(asdict(as_saved(parse(arguments[1:])[0], saved=there)))
    before = leaves(there)
    differing = [
        f"{name} {shown(before.get(name))} and not {shown(asked.get(name))}"
        for name in sorted(before.keys() | asked.keys())
        if before.get(name) != asked.get(name) and name.split(".")[0] not in UNTRAINED
    ]
    if differing:
        raise ConfigError(
            f"the branch in {folder} was trained with {', '.join(differing)}: give another --out, or remove that folder"
        )


def _wait(process: RunProcess) -> int:
    try:
        while process.code is None:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        process.stop()
        deadline_s = time.monotonic() + GRACE_S
        while process.code is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        process.kill()
        return EXIT_RESUMABLE
    return process.code


def _loss(folder: Path) -> float | None:
    try:
        loss = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["eval_loss"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the summary of the branch in {folder} cannot be read: {error}") from error
    return None if loss is None else float(loss)


def _tell(found: Sequence[tuple[Trunk, Branched]], *, out: Path) -> None:
    table = Table("step", "samples", "batch", "held-out loss by multiple", "critical batch", "noise scale then")
    records = []
    for trunk, result in found:
        critical = trunk.global_batch_size * result.largest_multiple
        losses = "\n".join(
            f"×{multiple} {'diverged' if math.isnan(loss) else format(loss, '.4f')}"
            for multiple, loss in result.losses.items()
        )
        table.add_row(
            f"{trunk.step:,}",
            f"{trunk.position:,}",
            f"{trunk.global_batch_size:,}",
            losses,
            _critical_text(result, batch=trunk.global_batch_size),
            _shown(trunk.noise_scale),
        )
        records.append(
            {
                **{name: value for name, value in asdict(trunk).items() if name != "path"},
                **asdict(result),
                "losses": {str(k): loss if math.isfinite(loss) else None for k, loss in result.losses.items()},
                "critical_batch_size": None if result.only_below else critical,
                "critical_batch_size_below": (
                    None if result.first_worse is None else trunk.global_batch_size * result.first_worse
                ),
            }
        )
    Console().print(table)
    path = out / "branch.json"
    path.write_text(json.dumps({"branches": records}, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sys.stdout.write(
        "The critical batch is the largest that is no worse after the same samples, at the rate in force scaled by the "
        f"rule; it is known to a factor of two at best. {path}\n"
    )


def _critical_text(result: Branched, *, batch: int) -> str:
    """Say what is known of the critical batch; where the second multiple is worse already, only an upper bound is."""
    if result.first_worse is None:
        return f"at least {batch * result.largest_multiple:,}"
    below = f"below {batch * result.first_worse:,}"
    return below if result.only_below else f"{batch * result.largest_multiple:,} ({below})"


def _shown(noise_scale: Mapping[str, Any]) -> str:
    value, lower, upper = (noise_scale[name] for name in ("value", "lower", "upper"))
    if value is not None:
        return f"{value:.3g} ({lower:.3g}–{'∞' if upper is None else format(upper, '.3g')})"
    return f"at least {lower:.3g}" if lower else "not resolved"
