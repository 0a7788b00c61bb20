"""`dptrain train`: this process as a replica, or as the launcher of the replicas."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dptrain.cli.replicas import default_replicas, is_replica, start_replicas
from dptrain.cli.settings import parse
from dptrain.errors import ConfigError
from dptrain.train.config import TrainConfig
from dptrain.train.preemption import EXIT_RESUMABLE
from dptrain.train.run_folder import default_run_dir, write_config


def train(arguments: Sequence[str]) -> int:
    """Parse, then train: as a replica where a launcher started this process, else by starting the replicas."""
    config, options = parse(arguments)
    if options.resume and config.run_dir is None:
        raise ConfigError("--resume needs --run_dir, the folder of the run to go on with")
    if is_replica():
        if options.replicas is not None:
            raise ConfigError("--replicas has no meaning under a launcher, which has started the replicas already")
        return _train_here(config, resume=options.resume)
    if options.replicas is None:
        options.replicas = default_replicas(cpu=config.device == "cpu")
    config = replace(config, run_dir=config.run_dir or default_run_dir(config.task))
    with tempfile.TemporaryDirectory(prefix="dptrain-") as folder:
        path = Path(folder) / "config.yaml"
        write_config(path, config)
        resume = ["--resume"] if options.resume else []
        return start_replicas(["train", "--config", str(path), *resume], num_replicas=options.replicas)


def _train_here(config: TrainConfig, *, resume: bool) -> int:
    import torch.distributed as dist

    from dptrain.train import Trainer

    try:
        trainer = Trainer(config, resume=resume)
        summary = trainer.run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if summary is None:
        return EXIT_RESUMABLE
    if trainer.is_main:
        _close(trainer.run_dir, summary)
    return 0


def _close(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Draw the report and say in three lines what came out."""
    from dptrain.explain import draw_report

    sys.stdout.write("\n".join([*_findings(summary), f"report: {draw_report(run_dir)}"]) + "\n")


def _findings(summary: Mapping[str, Any]) -> Iterable[str]:
    minutes, seconds = divmod(round(summary["wall_s"]), 60)
    held_out = "" if summary["eval_loss"] is None else f"held-out loss {summary['eval_loss']:.4g}"
    if summary["bits_per_byte"] is not None:
        held_out += f" ({summary['bits_per_byte']:.3f} bits per byte)"
    yield (
        f"{held_out or 'done'} after {summary['samples_seen']:,} samples in {summary['steps']:,} steps and "
        f"{minutes}:{seconds:02d} min ({summary['samples_per_s']:,.0f} samples/s)"
    )
    changes = summary["num_batch_changes"]
    times = {0: "the batch never moved from", 1: "the batch moved once, from"}.get(
        changes, f"the batch moved {changes} times, from"
    )
    to = "" if changes == 0 else f" to {summary['batch_last']:,}"
    yield f"{times} {summary['batch_first']:,}{to} samples; noise scale: {summary['noise_scale_text']}"
