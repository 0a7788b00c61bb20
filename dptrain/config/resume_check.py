"""Which settings a resumed run may have otherwise than before: those that change no step, and a larger length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dptrain.config.learning_rate_schedule import DECAY_FRACTION
from dptrain.config.train_config import TrainConfig
from dptrain.config.validation import leaves
from dptrain.errors import ConfigError

UNTRAINED = ("run_dir", "log", "checkpoint", "num_workers", "device", "replica_check_every_steps", "micro_batch_size")
"""Settings that change what is recorded, not what is trained. The size of micro-batches changes the last bits of a
sum; it is among them because memory may leave no choice."""

LENGTHS = ("max_samples", "max_steps", "max_tokens")
"""Settings of which each gives the length of a run."""


def check_same_settings(config: TrainConfig, *, saved: Mapping[str, Any], position: int = 0) -> None:
    """Refuse to resume with settings under which the steps so far would have been others.

    Args:
        config: filled in.
        saved: settings in the checkpoint.
        position: samples seen at the checkpoint.

    Raises:
        ConfigError: listing each such setting with both values, or what to do about another length.
    """
    current, before = leaves(asdict(config)), leaves(saved)
    # A run that was saved before a setting existed had its default.
    before = {name: value for name, value in leaves(asdict(type(config)())).items() if name in current} | before
    differing = [
        f"{name} was {before.get(name)!r} and is {current.get(name)!r}"
        for name in sorted(before.keys() | current.keys())
        if before.get(name) != current.get(name) and name.split(".")[0] not in (*UNTRAINED, *LENGTHS)
    ]
    if differing:
        raise ConfigError(f"cannot resume with other settings: {'; '.join(differing)}")
    if config.max_samples != saved.get("max_samples"):
        _check_length(config, old=int(saved["max_samples"]), position=position)


def _check_length(config: TrainConfig, *, old: int, position: int) -> None:
    """Refuse another length where the learning rate up to here would have been another one, or it is already passed."""
    new, schedule = int(config.max_samples or 0), config.optimizer.schedule
    change = f"max_samples was {old:,} and is {new:,}"
    if new < position:
        raise ConfigError(f"cannot resume: {change}, but the checkpoint has seen {position:,} samples already")
    decay = DECAY_FRACTION if config.optimizer.decay_fraction is None else config.optimizer.decay_fraction
    is_before_decay = schedule == "wsd" and position <= min(old, new) * (1 - decay)
    if schedule == "constant" or is_before_decay:
        return
    why = (
        f"the wsd schedule has begun to decay at {old * (1 - decay):,.0f} samples"
        if schedule == "wsd"
        else f"the {schedule} schedule so far was that of the old length"
    )
    raise ConfigError(
        f"cannot resume: {change}, and {why}. Leave max_samples out to finish the run, or start a new run from its "
        f"checkpoint: --branch-from RUN/checkpoints/step-… --max-samples {new} --run-dir NEW"
    )
