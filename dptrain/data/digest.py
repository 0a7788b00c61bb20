"""Digests of samples as they are trained and held out, after collation: what tells a data set from another one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dptrain.data.source import SlotSource, random_state_kept
from dptrain.data.stream import SampleStream

_NUM_SPREAD, _NUM_DRAWN, _NUM_RECENT = 8, 32, 8
"""Samples at fixed places from first to last, at places drawn from the seed, and before a position. 40 samples find a
change of one sample in ten with 98 % probability; reading them takes as long as some steps do."""
_PER_MICRO_BATCH = 4
_DEEPEST = 16  # of containers within containers


@dataclass(frozen=True, kw_only=True)
class _Listed(SampleStream):
    """Samples by their own numbers, in whatever order they are asked for."""

    def indices(self, positions: NDArray[np.int64] | range) -> NDArray[np.int64]:
        return np.asarray(positions, dtype=np.int64)


class DataDigest:
    """Digests of a task's data, the same for the same samples and the same collation, in any process.

    A data set whose samples differ from one reading to the next, by a generator of its own or a clock, has no digest:
    it is `reproducible` no more, and only its length counts. Values that are no tensor, array, number, text or
    container of them count by their type.

    Args:
        data: the samples.
        stream: the order in which they are trained.
        collate: samples → micro-batch; torch's default where None.
    """

    def __init__(
        self, data: Dataset[Any], *, stream: SampleStream, collate: Callable[[list[Any]], object] | None
    ) -> None:
        collate = collate or default_collate
        listed = _Listed(stream.num_samples, seed=stream.seed, shuffle=False)
        self._listed = SlotSource(data, stream=listed, collate=collate)
        self._trained = SlotSource(data, stream=stream, collate=collate)
        # A stream of samples names its own places: to read a late one, or one again, it would be read from its start.
        self._places: list[int] = list(getattr(data, "probes", None) or [])
        self.reproducible = bool(self._places) or self._of(self._listed, [0]) == self._of(self._listed, [0])

    def whole(self) -> str:
        """Return the digest of samples spread over the data set; that of its length where it is not reproducible."""
        num_samples, seed = self.num_samples, self._seed
        spread = [round(i * (num_samples - 1) / (_NUM_SPREAD - 1)) for i in range(_NUM_SPREAD)]
        drawn = np.random.default_rng([seed, num_samples]).integers(0, num_samples, _NUM_DRAWN).tolist()
        if not self.reproducible:
            return f"length {num_samples}"
        return self._of(self._listed, self._places or sorted({*spread, *drawn}))

    def recent(self, position: int) -> str:
        """Return the digest of the samples last trained before a position; empty where that says nothing."""
        if not self.reproducible or self._places or position < 1:
            return ""
        return self._of(self._trained, list(range(max(0, position - _NUM_RECENT), position)))

    @property
    def num_samples(self) -> int:
        """The length of the data set."""
        return self._listed._stream.num_samples  # noqa: SLF001 - the same room

    @property
    def _seed(self) -> int:
        return self._listed._stream.seed  # noqa: SLF001 - as above

    def _of(self, source: SlotSource, positions: list[int]) -> str:
        digest = hashlib.sha256(str(self.num_samples).encode())
        with random_state_kept():
            for start in range(0, len(positions), _PER_MICRO_BATCH):
                _feed(digest, _read(source, positions[start : start + _PER_MICRO_BATCH]))
        return digest.hexdigest()[:16]


def _read(source: SlotSource, positions: list[int]) -> object:
    """Return a micro-batch, or the kind of error where it cannot be made: training says where and why."""
    try:
        return source.micro_batch(np.array(positions, dtype=np.int64))
    except Exception as error:  # noqa: BLE001 - whatever a user's data raises
        return type(error).__qualname__


def _feed(digest: hashlib._Hash, value: object, depth: int = 0) -> None:
    content = _content(value)
    if content is not None:
        digest.update(content)
    elif depth >= _DEEPEST:
        digest.update(type(value).__qualname__.encode())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(repr(key).encode())
            _feed(digest, value[key], depth + 1)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}".encode())
        for item in value:
            _feed(digest, item, depth + 1)
    else:  # a dataclass, a graph, an encoding
        digest.update(type(value).__qualname__.encode())
        _feed(digest, dict(sorted(getattr(value, "__dict__", {}).items())), depth + 1)


def _content(value: object) -> bytes | None:
    """Return the bytes of a value that holds no others; None for a container, or what nothing is known of."""
    if isinstance(value, Tensor):
        return _tensor_bytes(value.detach().cpu())
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + (b"" if value.dtype.hasobject else value.tobytes())
    if isinstance(value, (bool, int, float, complex, str, bytes, np.generic)) or value is None:
        return f"{type(value).__name__} {value!r}".encode()
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(repr, value))).encode()
    return None


def _tensor_bytes(tensor: Tensor) -> bytes:
    form = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.layout}".encode()
    if not tensor.numel() or tensor.is_quantized:
        return form
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return form + dense.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
