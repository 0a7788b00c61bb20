"""What tells a task from another one that has the same name: its samples as they are trained, and its source."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dptrain.data import SampleStream
from dptrain.data.digest import DataDigest
from dptrain.errors import ConfigError
from dptrain.runtime.startup_check import INITIAL_VALUES, is_same_loss, model_digests
from dptrain.tasks import losses_of_two_samples
from dptrain.tasks.base import Task

_INSTALLED = tuple(
    str(Path(path).resolve())
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    if path
)
_OWN = str(Path(__file__).resolve().parents[1])
_MAX_NAMED = 5
_NUM_ORDERED = 1024
"""Positions whose samples are compared: weights that differ by a few percent draw another sample at one of them."""


class TaskIdentity:
    """Digests of a task's data, after collation, and of its source; compared between replicas and between attempts.

    Args:
        task: the task.
        stream: the order of its training samples.

    Attributes:
        losses: of the first samples by the model as it is now; see `losses_of_two_samples`.
    """

    def __init__(self, task: Task, *, stream: SampleStream) -> None:
        self._train = DataDigest(task.train_data, stream=stream, collate=task.collate)
        self._train_digest = self._train.whole()
        self._held_out_digest = " ".join(
            f"{name}:{_held_out(data, seed=stream.seed, collate=task.collate)}" for name, data in task.eval_sets.items()
        )
        self._sources = source_digests(task)
        self._digests = dict(task.digests)
        order = stream.indices(range(_NUM_ORDERED)).tolist()
        self._order = hashlib.sha256(repr(order).encode()).hexdigest()[:16]
        self.losses = self._first_losses = losses_of_two_samples(task)
        initial = repr(model_digests(task.model)[INITIAL_VALUES])
        self._initial = self._first_initial = hashlib.sha256(initial.encode()).hexdigest()[:16]

    def subjects(self) -> dict[str, object]:
        """Return what must be the same on all replicas, by its name in an error."""
        return {
            "the number of samples": self._train.num_samples,
            "the data": self._train_digest,
            "the order of samples, such as by sample_weights": self._order,
            "the held-out data": self._held_out_digest,
            "the source of the task": self._sources,
            **self._digests,
        }

    def state(self, *, position: int) -> dict[str, Any]:
        """Return what a checkpoint keeps, to be given to `check` and `changes` when the run goes on.

        Args:
            position: samples seen; those just before it are among the ones that are read again then.
        """
        return {
            "train": self._train_digest,
            "held_out": self._held_out_digest,
            "recent": self._train.recent(position),
            "sources": self._sources,
            "digests": self._digests,
            "order": self._order,
            "losses": list(self._first_losses),
            "initial": self._first_initial,
        }

    def check_digests(self, saved: Mapping[str, Any], *, path: Path) -> None:
        """Refuse to go on from a checkpoint with another teacher, or other parts that no checkpoint holds.

        Raises:
            ConfigError: naming the part and the checkpoint.
        """
        before = {} if isinstance(saved["data"], str) else saved["data"].get("digests", {})
        for name in sorted(before.keys() | self._digests.keys()):
            if before.get(name) != self._digests.get(name):
                raise ConfigError(
                    f"cannot resume: {name} is another one than when {path} was saved (sha256 "
                    f"{str(before.get(name))[:12]} then, {str(self._digests.get(name))[:12]} now)"
                )

    def check(self, saved: Mapping[str, Any], *, position: int, path: Path) -> None:
        """Refuse to go on from a checkpoint with other training samples.

        Raises:
            ConfigError: naming the checkpoint.
        """
        before = saved["data"]
        if isinstance(before, str):  # by dptrain up to 0.1, from other samples: `changes` says that it is not compared
            return
        recent = self._train.recent(position)
        same_recent = not (recent and before["recent"]) or recent == before["recent"]
        if before["train"] == self._train_digest and before.get("order", self._order) != self._order:
            raise ConfigError(
                f"samples come in another order than when {path} was saved, such as by other sample_weights: bring "
                f"them back, or start a new run from the weights: --model.weights {path} --run-dir NEW"
            )
        if before["train"] != self._train_digest or not same_recent:
            raise ConfigError(
                f"the data set is another one than when {path} was saved: some of its samples have changed, or what "
                "collate makes of them, such as a vocabulary that is built anew in another order; bring the old data "
                f"back, or start a new run from the weights: --model.weights {path} --run-dir NEW"
            )

    def changes(self, saved: Mapping[str, Any]) -> Iterator[str]:
        """Yield a sentence for each difference from a checkpoint that is worth knowing and does not rule it out."""
        before = saved["data"]
        if isinstance(before, str):
            yield "the checkpoint is from an older dptrain: whether the data is still the same is not known"
            return
        if before["held_out"] != self._held_out_digest:
            yield "the held-out data has changed since the checkpoint: held-out losses before and after do not compare"
        if changed := changed_sources(before["sources"], self._sources):
            more = f" and {len(changed) - _MAX_NAMED} more" if len(changed) > _MAX_NAMED else ""
            yield (
                f"the source of the task has changed since the checkpoint ({', '.join(changed[:_MAX_NAMED])}{more}): "
                "the run goes on with what it says now"
            )
        elif before.get("initial") == self._initial:  # the model starts as it did then, so that losses compare
            yield from _changed_losses(before["losses"], self.losses)
        if not self._train.reproducible:
            yield "the data set gives other samples at each reading: whether it is still the same is not known"

    def go_on(self, saved: Mapping[str, Any]) -> None:
        """Keep the losses that the run began with, so that its checkpoints are those of a run that was not disturbed.

        A model that is resumed is not built from the weights that the run may have started from.
        """
        before = saved["data"]
        if not isinstance(before, str) and "initial" in before:
            self._first_losses, self._first_initial = before["losses"], before["initial"]


def _changed_losses(before: Sequence[float | None], now: Sequence[float | None]) -> Iterator[str]:
    """Yield a sentence where the loss of the same samples is another one: by a setting, or code in another file."""
    for then, value in zip(before, now, strict=True):
        if then is not None and value is not None and not is_same_loss(then, value):
            yield (
                f"the task computes another loss than when the checkpoint was saved ({then:.4g} then and {value:.4g} "
                "now, of the same samples by the same untrained model): the run goes on with what it computes now"
            )
            return


def _held_out(data: Dataset[Any], *, seed: int, collate: Callable[[list[Any]], Any] | None) -> str:
    num_samples = len(data)  # type: ignore[arg-type] # checked when the task was resolved
    stream = SampleStream(num_samples, seed=seed, shuffle=False)
    return DataDigest(data, stream=stream, collate=collate).whole()


def source_digests(task: Task) -> dict[str, str]:
    """Return the digest of each of the user's source files in which the parts of a task are defined, by file name.

    The files of the loss, the collation, the classes of the model's modules and of the data sets; none that is
    installed or dptrain's own, which a version tells. An edit of a loss changes no sample and no name of a parameter,
    so that nothing else would tell of it.
    """
    kinds = {type(module) for module in task.model.modules()}
    held_out = {type(data) for data in task.eval_sets.values()}
    parts = [task.loss, task.collate, type(task.train_data), *held_out, *kinds]
    files = {path for part in parts if (path := _file_of(part)) is not None}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(files)}


def changed_sources(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of files that differ, came or went between two results of `source_digests`."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _file_of(part: object) -> Path | None:
    while isinstance(part, functools.partial) or hasattr(part, "__wrapped__"):
        part = part.func if isinstance(part, functools.partial) else part.__wrapped__
    if not (inspect.isclass(part) or inspect.isroutine(part)):
        part = type(part)
    try:
        found = inspect.getsourcefile(part)
    except TypeError:  # built in
        return None
    path = Path(found).resolve() if found else None
    if path is None or not path.is_file() or str(path).startswith((*_INSTALLED, _OWN)):
        return None
    return path
