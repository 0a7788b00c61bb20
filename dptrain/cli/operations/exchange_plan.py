"""`dptrain plan --bandwidth-mbit-per-s`: which kinds of exchange pay on a network, and the bytes that each sends."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from dptrain.checkpoint.store import load_newest
from dptrain.errors import ConfigError
from dptrain.explain.model.exchange_plan import plan_exchange
from dptrain.explain.record import RunRecord
from dptrain.explain.text.exchange_text import exchange_sentences, exchange_table
from dptrain.tracking.run_folder import checkpoints_in


def plan_exchange_of(record: RunRecord, options: argparse.Namespace, *, console: Console) -> int:
    """Print which kinds of exchange pay on a network, by the options of `dptrain plan`; return the exit code.

    Raises:
        ConfigError: where the run has no checkpoint, or the file of the plan cannot be written.
    """
    found = plan_exchange(
        record,
        _shapes(options.run),
        mbit_per_s=options.bandwidth_mbit_per_s,
        delay_s=1e-3 * options.delay_ms,
    )
    text = json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"
    console.print(exchange_table(found))
    for sentence in exchange_sentences(found):
        console.print(sentence, highlight=False, markup=False)
    if options.json == "-":
        sys.stdout.write(text)
    elif options.json is not None:
        try:
            Path(options.json).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {options.json}: {error.strerror or error}") from error
    return 0


def _shapes(run_dir: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Return the form of each entry of the model in a run's newest checkpoint."""
    checkpoint = load_newest(checkpoints_in(run_dir))
    if checkpoint is None:
        raise ConfigError(f"there is no checkpoint in {run_dir}, from which the size of the gradients is read")
    tensors = checkpoint.tensors("model")
    return {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
