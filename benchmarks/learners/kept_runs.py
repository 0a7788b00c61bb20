"""Runs that were measured before: their figures in a folder, with when and by which version they were measured."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import dptrain
from benchmarks import harness
from benchmarks.learners.runs import Arm, train


def train_once(arm: Arm, *, seed: int, folder: Path, shared: Path, kept: Path | None) -> dict[str, Any]:
    """Return the figures of a run: those that are kept, where its settings are the same; else it is trained and kept.

    Args:
        arm: its settings.
        seed: of the run.
        folder: of the run, which need not stay.
        shared: folder of what all runs of a way start from; its place does not matter for whether runs are the same.
        kept: folder of figures; None keeps none.
    """
    known = known_of(arm, seed=seed, shared=shared)
    return kept_or_made(known, lambda: train(arm, seed=seed, folder=folder), kept=kept)


def known_of(arm: Arm, *, seed: int, shared: Path) -> dict[str, Any]:
    """Return what tells a run of an arm from others, as JSON: the same wherever the code and the shared folder lie."""
    settings = json.dumps(arm.settings, sort_keys=True, default=_as_mapping)
    for place in (shared, Path(__file__).parent):
        settings = settings.replace(str(place), "…")
    return {"way": arm.way, "arm": arm.name, "seed": seed, "settings": json.loads(settings)}


def kept_or_made(known: Mapping[str, Any], make: Callable[[], dict[str, Any]], *, kept: Path | None) -> dict[str, Any]:
    """Return figures that are kept under what is known of them, or made and kept; with when and by which version.

    Args:
        known: what tells them from others, as JSON.
        make: trains, and returns them.
        kept: folder of figures; None keeps none.
    """
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    path = None if kept is None else kept / f"{name}.json"
    if path is not None and path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert found["run"] == known, f"{path} is of another run"
        return {**found["figures"], "measured": found["measured"], "source": found["source"]}
    figures = make()
    stamp = {"measured": f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}", "source": source_digest()}
    if path is not None:
        entry = {"run": known, **stamp, "environment": harness.environment(device="cpu"), "figures": figures}
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
        whole.replace(path)
    return {**figures, **stamp}


def _as_mapping(value: object) -> dict[str, Any]:
    assert is_dataclass(value)
    assert not isinstance(value, type)
    return asdict(value)


def source_digest() -> str:
    """Return the digest of the package's source, which tells whether two results are of one version."""
    found = hashlib.sha256()
    root = Path(dptrain.__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]
