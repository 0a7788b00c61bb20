"""`dptrain export`: the weights of a checkpoint as safetensors, or the metrics of a run as CSV or Parquet."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dptrain.checkpoint.manifest import MANIFEST
from dptrain.checkpoint.opened import Checkpoint
from dptrain.checkpoint.store import load_checkpoint, load_newest
from dptrain.errors import CheckpointError, ConfigError
from dptrain.exchange.members import averaged, member_names, model_of
from dptrain.tracking.run_folder import checkpoints_in

_DESCRIPTION = """Write the bare weights of a checkpoint to one safetensors file, which needs no dptrain to be read,
or the metrics of a run to a table. Every byte of a checkpoint is verified first. Tied weights stand under the first of
their names, and low-rank adapters are merged into the weights. Where replicas have parameters of their own, --member
says which are written. Of a run with optimizer.average_decay, --averaged writes the averaged weights. With --int8,
weights of linear and convolutional layers are rounded, and the held-out loss of the run's task is printed before and
after."""
_TABLES = (".csv", ".parquet")


def export(arguments: Sequence[str]) -> int:
    """Write the weights of the newest verified checkpoint of a run, or of the one named, or the metrics of a run.

    Raises:
        ConfigError: where there is no checkpoint or no run, the file is there already, or its kind is not known.
        CheckpointError: where no checkpoint can be trusted, or the file cannot be written.
    """
    parser = argparse.ArgumentParser(prog="dptrain export", description=_DESCRIPTION)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run folder, or one step-… of it")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to", type=Path, metavar="FILE", help="weights, such as weights.safetensors")
    kind.add_argument("--metrics", type=Path, metavar="FILE", help="metrics, such as metrics.csv or metrics.parquet")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--averaged",
        action="store_true",
        help="the average of optimizer.average_decay, not the weights of the last step",
    )
    which.add_argument(
        "--member",
        metavar="average|N|all",
        help="weights of which replica: the mean of all, that of rank N, or each in a file of its own, FILE-N "
        "(default: average for exchange.kind=local_updates)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="weights x.weight of linear and convolutional layers as int8, with a scale for each output channel, "
        "x.weight_scale; the task of the run must be where it was",
    )
    options = parser.parse_args(arguments)
    target = options.to or options.metrics
    if target.exists():
        raise ConfigError(f"{target} exists already: name another file, or remove it")
    if options.metrics is not None:
        given = {"--int8": options.int8, "--averaged": options.averaged, "--member": options.member is not None}
        if of_weights := [name for name, is_given in given.items() if is_given]:
            raise ConfigError(f"{of_weights[0]} is about weights: use it with --to FILE.safetensors")
        return _export_metrics(options.source, to=options.metrics)
    if options.to.suffix in _TABLES:
        raise ConfigError(f"--to writes weights, not tables: use --metrics {options.to}")
    checkpoint = _find(options.source)
    for path, reason in checkpoint.passed_over:
        sys.stderr.write(f"dptrain export: passed over {path}: {reason}\n")
    if options.averaged:
        found_for = iter([(options.to, _average_of(checkpoint))])
    else:
        found_for = _members(checkpoint, member=options.member, to=options.to)
    for target, own in found_for:
        weights = _merged(checkpoint, own)
        found, told = _in_int8(checkpoint, weights) if options.int8 else (weights, "")
        num_tensors, size_bytes = _write_weights(found, step=checkpoint.step, to=target, is_int8=options.int8)
        sys.stdout.write(
            f"weights of step {checkpoint.step:,} ({num_tensors} tensors, {size_bytes:,} bytes): {target}\n{told}"
        )
    return 0


def _merged(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    settings: Any = checkpoint.state.get("config", {})
    if settings.get("model", {}).get("lora_rank") is None:
        return weights
    from dptrain.train.preparation.saved_task import without_adapters  # needs the trainer's parts, too

    return without_adapters(checkpoint, weights)


def _in_int8(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    from dptrain.cli.operations.int8_export import in_int8  # needs the trainer's parts, which other exports do not

    found = in_int8(checkpoint, weights)
    return found.tensors, found.text()


def _members(checkpoint: Checkpoint, *, member: str | None, to: Path) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Yield what is written where.

    Raises:
        ConfigError: where there is no such member, or it must be said which.
    """
    names = member_names(checkpoint)
    if member is not None and len(names) == 1:
        remedy = ", or for the average of optimizer.average_decay use --averaged" if checkpoint.holds("average") else ""
        raise ConfigError(f"{checkpoint.path} holds one model, equal on all replicas: leave out --member{remedy}")
    if member is None:
        yield to, model_of(checkpoint, remedy=f"use --member 0 … {len(names) - 1}, or --member all")
    elif member == "average":
        yield to, averaged([checkpoint.tensors(name) for name in names])
    elif member == "all":
        files = [to.with_name(f"{to.stem}-{rank}{to.suffix}") for rank in range(len(names))]
        if taken := [str(file) for file in files if file.exists()]:
            raise ConfigError(f"{', '.join(taken)} exists already: name another file, or remove it")
        for file, name in zip(files, names, strict=True):
            yield file, checkpoint.tensors(name)
    elif member.isdecimal() and int(member) < len(names):
        yield to, checkpoint.tensors(names[int(member)])
    else:
        raise ConfigError(f"--member must be average, all, or a replica from 0 to {len(names) - 1}, got {member}")


def _average_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    if not checkpoint.holds("average"):
        raise ConfigError(
            f"{checkpoint.path} holds no averaged weights: train with --optimizer.average_decay 0.999, or leave out "
            f"--averaged"
        )
    return checkpoint.tensors("average")


def _export_metrics(run: Path, *, to: Path) -> int:
    """Write one row for each logged optimizer step."""
    if to.suffix not in _TABLES:
        raise ConfigError(f"--metrics writes {' or '.join(_TABLES)} files, got {to.name}")
    from dptrain.explain.run_data import load_run

    table = load_run(run).to_arrow()
    try:
        if to.suffix == ".csv":
            from pyarrow.csv import write_csv

            write_csv(table, to)
        else:
            from pyarrow.parquet import write_table

            write_table(table, to)
    except OSError as error:
        raise ConfigError(f"the metrics could not be written to {to}: {error}") from error
    sys.stdout.write(f"metrics of {table.num_rows:,} steps ({table.num_columns} columns): {to}\n")
    return 0


def _find(source: Path) -> Checkpoint:
    if (source / MANIFEST).exists():
        return load_checkpoint(source)
    folder = checkpoints_in(source)
    checkpoint = load_newest(folder if folder.is_dir() else source)
    if checkpoint is None:
        raise ConfigError(
            f"there is no checkpoint in {source}: name a run folder, or a folder step-… in its {folder.name}"
        )
    return checkpoint


def _write_weights(weights: dict[str, Tensor], *, step: int, to: Path, is_int8: bool) -> tuple[int, int]:
    """Write under another name first, so that what bears the name is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt", "step": str(step)}
    if is_int8:
        metadata["int8"] = "x.weight × x.weight_scale, one scale for each index of the first dimension"
    try:
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as folder:
            temporary = Path(folder) / to.name
            save_file(weights, temporary, metadata=metadata)
            temporary.chmod(0o600)
            temporary.rename(to)
        return len(weights), to.stat().st_size
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights could not be written to {to}: {error}") from error
