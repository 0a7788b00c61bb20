"""From the command line of `dptrain sweep`, and what its folder holds already, to settings and spec; trains nothing."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from dptrain.cli.settings import parse
from dptrain.config.filled_in import filled_in, given
from dptrain.config.train_config import TrainConfig
from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError, DptrainError, TaskError
from dptrain.sweep import SweepSpec
from dptrain.sweep.folder import saved_sweep
from dptrain.tasks.base import Suggestion
from dptrain.tracking.run_folder import default_run_dir

_DESCRIPTION = """Train a grid of global batches, each with the learning rate that is best for it, and fit the frontier
of steps against samples to each target. Every setting of `dptrain train` is taken as well, as an option or in a
--config file; those of control are not used, and within a run learning rate, betas and weight decay stay as they are.
Interrupted or killed, the sweep goes on with --out alone; so can it be given further batches, targets and seeds."""

_EVALUATIONS = 4
"""How many times as often as its task suggests a run is evaluated: a target is looked for between two evaluations."""

_EXPONENTS = {"linear": 1.0, "none": 0.0}
"""Of the batch in the first guess at a learning rate, by optimizer.rule; ½ for every other one."""

_NUM_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a sweep is asked for.

    Attributes:
        config: what all runs have in common.
        spec: what is tried.
        out: folder of the sweep.
        num_parallel: runs at a time; None for as many as there is room for.
    """

    config: TrainConfig
    spec: SweepSpec
    out: Path
    num_parallel: int | None


def read_request(arguments: Sequence[str]) -> Request:
    """Read what is asked for; what is left open is as the sweep was begun, where one was.

    Raises:
        ConfigError: where options or settings make no sense.
        TaskError: where the task has no loss to reach.
    """
    options, settings = _parser().parse_known_args(arguments)
    saved = saved_sweep(options.out) if options.out else None
    before = saved[1] if saved else None
    if before is None:
        _check_complete(options)
    if saved is None or settings:
        config, suggestion, base = _from_settings(settings, num_replicas=options.replicas)
    else:
        config, suggestion, base = saved[0], _suggestion(saved[0]), _base_of(saved[1])
        if options.replicas not in (None, config.layout_replicas):
            raise ConfigError(f"--replicas was {config.layout_replicas} when the sweep was begun: leave it out")
    spec = _spec(options, base, first_seed=config.seed, before=before)
    for batch in spec.batch_sizes:  # what cannot be laid out is refused before anything is trained
        _filled(replace(config, global_batch_size=batch, max_samples=spec.max_samples(batch)), suggestion)
    out = options.out or Path("sweeps") / Path(default_run_dir(config.task)).name
    return Request(config=config, spec=spec, out=out, num_parallel=options.parallel)


def _check_complete(options: argparse.Namespace) -> None:
    for name, example in (("global_batch_sizes", "8,16,32,64"), ("targets", "0.5,0.3")):
        if getattr(options, name) is None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is missing: give at least one, such as --{option} {example}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument (--[\w-]+)\S*:", r"\1", message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dptrain sweep",
        description=_DESCRIPTION,
        allow_abbrev=False,
        usage="dptrain sweep --global-batch-sizes LIST --targets LIST [OPTIONS] [settings of dptrain train]",
    )
    helps: Mapping[str, tuple[Any, str, str]] = {
        "global-batch-sizes": (_whole_numbers, "LIST", "global batches to try, such as 8,16,32,64"),
        "targets": (_numbers, "LIST", "held-out losses to reach, such as 0.5,0.3"),
        "learning-rates": (
            _rates,
            "auto|LIST",
            "auto: searched for each batch, the default; or those to try at each, such as 1e-3,3e-3",
        ),
        "seeds": (int, "N", f"seeds of the runs that count; intervals need two. Default: {_NUM_SEEDS}"),
        "replicas": (int, "N", "replicas of each run. Default: 1"),
        "parallel": (int, "P", "runs at a time. Default: as many as have cores or GPUs of their own"),
        "out": (Path, "DIR", "folder of the sweep. Default: sweeps/TASK-DATE-TIME"),
    }
    for name, (kind, metavar, text) in helps.items():
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=kind, metavar=metavar, help=text)
    return parser


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text!r}") from None


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}") from None


def _rates(text: str) -> list[float]:
    """Return the rates; none where they are to be searched."""
    return [] if text == "auto" else _numbers(text)


def _spec(
    options: argparse.Namespace, base: Mapping[str, Any], *, first_seed: int, before: SweepSpec | None
) -> SweepSpec:
    """Put together what is asked for now, what was asked for before, and defaults, in this order."""
    if options.seeds is not None and options.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {options.seeds}")
    num_seeds = options.seeds or (len(before.seeds) if before else _NUM_SEEDS)
    rates = before.learning_rates if before and options.learning_rates is None else options.learning_rates
    return SweepSpec(
        batch_sizes=sorted(options.global_batch_sizes or (before.batch_sizes if before else [])),
        targets=sorted(options.targets or (before.targets if before else []), reverse=True),
        seeds=[first_seed + number for number in range(num_seeds)],
        learning_rates=sorted(rates) if rates else None,
        **base,
    )


def _base_of(spec: SweepSpec) -> dict[str, Any]:
    return {
        "base_batch_size": spec.base_batch_size,
        "base_learning_rate": spec.base_learning_rate,
        "base_samples": spec.base_samples,
        "exponent": spec.exponent,
    }


def _from_settings(
    settings: Sequence[str], *, num_replicas: int | None
) -> tuple[TrainConfig, Suggestion, dict[str, Any]]:
    """Return what all runs have in common, what the task suggests, and what the spec takes from both."""
    wished, more = parse(settings)
    for name in ("resume", "allow_fresh"):
        if more[name]:
            raise ConfigError(f"--{name} has no meaning for a sweep: with the same --out it goes on by itself")
    optimizer, control = wished.optimizer, wished.control
    config = replace(
        wished,
        layout_replicas=1 if num_replicas is None else num_replicas,
        control=ControlConfig(mode="off" if control.mode == "off" else "measure", law="constant"),
        # A rate that falls towards the end of a run would make the steps to a target depend on the run's length.
        # The batch of a run is constant, so that no rule has anything to follow; a preset stands for rules.
        optimizer=replace(
            optimizer,
            preset=None,
            rule="none",
            beta_rule=None,
            decay_rule=None,
            schedule="constant",
            decay_fraction=None,
            final_fraction=None,
        ),
    )
    suggestion = _suggestion(config)
    filled = _filled(config, suggestion)
    batch, exponent = given(filled.global_batch_size), _EXPONENTS.get(optimizer.rule or "", 0.5)
    factor = (batch / given(filled.optimizer.reference_batch_size)) ** exponent
    base = {
        "base_batch_size": batch,
        "base_learning_rate": given(filled.optimizer.learning_rate) * factor,
        "base_samples": given(filled.max_samples),
        "exponent": exponent,
    }
    every = config.log.eval_every_samples or max(1, suggestion.eval_every_samples // _EVALUATIONS)
    config = replace(
        config,
        run_dir=None,
        max_samples=None,
        max_steps=None,
        global_batch_size=None,
        optimizer=replace(config.optimizer, learning_rate=None, reference_batch_size=None),
        log=replace(config.log, eval_every_samples=every),
        checkpoint=replace(config.checkpoint, keep=1),  # there are many runs, and a run that goes on needs one
    )
    return config, suggestion, base


def _filled(config: TrainConfig, suggestion: Suggestion) -> TrainConfig:
    if config.micro_batch_size == "auto":
        config = replace(config, micro_batch_size=None)
    return filled_in(config, suggestion, world_size=given(config.layout_replicas))


def _suggestion(config: TrainConfig) -> Suggestion:
    """Ask the task what it suggests, in a process of its own.

    The runs are copies of this process, and a copy of a process that has computed in several threads may hang.

    Raises:
        DptrainError: what the task raises.
        TaskError: where it has no held-out samples, or is not to be had.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_ask, args=(config, sender))
    process.start()
    sender.close()
    try:
        answer, modules = receiver.recv()
    except EOFError:
        answer, modules = TaskError(f"task {config.task} cannot be built: see above"), []
    process.join()
    for name in modules:  # which every run would load again: of scikit-learn, a second and a half
        with contextlib.suppress(ImportError):  # some are made by others and cannot be loaded by name
            importlib.import_module(name)
    if isinstance(answer, DptrainError):
        raise answer
    assert isinstance(answer, Suggestion), answer
    return answer


def _ask(config: TrainConfig, sender: Connection) -> None:
    from dptrain.tasks import BUILT_IN, resolve_task

    before = set(sys.modules)
    try:
        task = resolve_task(config.task, options=config.task_options)
    except DptrainError as error:
        sender.send((error, []))
        return
    # What the tasks that come with dptrain load is known to start no threads.
    modules = [name for name in sys.modules if name not in before] if config.task in BUILT_IN else []
    if task.eval_data is None:
        sender.send((TaskError(f"task {task.name} has no held-out samples, and so no loss to reach"), []))
    else:
        sender.send((task.suggestion, modules))
