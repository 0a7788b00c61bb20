"""Tokens in memory-mapped .bin files or arrays, cut into windows of equal length; tokenizers are not known here."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dptrain.errors import ConfigError

Tokens = NDArray[Any]
"""Unsigned integers, shape (tokens,)."""

_HEADER_INTS = 256
# First number of the 1,024-byte header that llm.c's tools write, and the type of the tokens behind it.
_MAGIC = {20240520: "uint16", 20240801: "uint32"}
_LOOKED_AT_BYTES = 1 << 16
_LARGEST_UPPER_HALF = 3  # of a token below 262,144; no vocabulary in use is larger
_FEWEST_HALVES = 64
_MAX_OPEN_FILES = 256  # a process has 1,024 descriptors by default, and a map keeps one
_BLOCK = 1 << 20
_MAX_CHECKED_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One file of raw tokens in the machine's byte order, as nanoGPT's `prepare.py` writes them.

    Attributes:
        path: of the file.
        dtype: `uint16` or `uint32`.
        offset_bytes: before the first token.
        num_tokens: in the file.
    """

    path: Path
    dtype: str
    offset_bytes: int
    num_tokens: int

    def __len__(self) -> int:
        return self.num_tokens

    def open(self) -> Tokens:
        """Map the file into memory."""
        # A plain array over the map: slicing the subclass np.memmap costs 2 µs more each.
        mapped = np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset_bytes, shape=(self.num_tokens,))
        return np.asarray(mapped)


def token_file(path: Path, *, dtype: str | None = None) -> TokenFile:
    """Describe a .bin file: with a header of llm.c's tools, or raw.

    Args:
        path: of the file.
        dtype: of raw tokens, `uint16` or `uint32`; uint16 where not given, as nanoGPT writes them.

    Raises:
        ConfigError: where the file cannot be read, its size is no whole number of tokens, or no type is given and the
            tokens look like uint32.
    """
    if dtype not in (None, "uint16", "uint32"):
        raise ConfigError(f"the tokens of a .bin file are uint16 or uint32, got {dtype!r}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LOOKED_AT_BYTES)
    except OSError as error:
        raise ConfigError(f"token file {path} cannot be read: {error.strerror or error}") from error
    found = _MAGIC.get(int.from_bytes(start[:4], "little")) if len(start) >= 4 * _HEADER_INTS else None
    if found is not None and dtype not in (None, found):
        raise ConfigError(f"the header of token file {path} says {found}, but dtype is {dtype}")
    kind, offset = (found, 4 * _HEADER_INTS) if found is not None else (dtype or "uint16", 0)
    itemsize = np.dtype(kind).itemsize
    if (size - offset) % itemsize:
        raise ConfigError(f"token file {path} has {size - offset} bytes, no whole number of {kind} tokens")
    if found is None and dtype is None and _look_like_uint32(start):
        raise ConfigError(
            f"the tokens of {path} look like uint32, each of which would be read as two: give dtype uint32, or uint16 "
            "if that is what they are"
        )
    return TokenFile(path=path, dtype=kind, offset_bytes=offset, num_tokens=(size - offset) // itemsize)


def _look_like_uint32(start: bytes) -> bool:
    """Whether every second 16-bit number is what the upper half of a token is, and the others are not."""
    halves = np.frombuffer(start[: len(start) // 4 * 4], dtype=np.uint16)
    if len(halves) < _FEWEST_HALVES:
        return False
    first, second = int(halves[::2].max()), int(halves[1::2].max())
    lower, upper = (first, second) if sys.byteorder == "little" else (second, first)
    return upper <= _LARGEST_UPPER_HALF < lower


def find_token_files(path: Path, *, dtype: str | None = None) -> tuple[list[TokenFile], list[TokenFile]]:
    """Return the training and the held-out files of a .bin file or of a folder of them, in the order of their names.

    Held out are the files with `val` in their name, as in nanoGPT's `val.bin`; there may be none.

    Raises:
        ConfigError: where there is no file to train on, or one cannot be read.
    """
    paths = [path] if path.is_file() else sorted(path.glob("*.bin"))
    files = [token_file(found, dtype=dtype) for found in paths]
    train = [file for file in files if "val" not in file.path.stem or len(files) == 1]
    if not train:
        raise ConfigError(f"no token file to train on: {path} must be a .bin file or a folder that holds some")
    return train, [file for file in files if file not in train]


class TokenWindows(Dataset[Tensor]):
    """Windows of tokens, all of one length, numbered through all files; none reaches from one file into the next.

    A window is uint8 where the tokens are bytes, else int32: the embedding takes both, and the copy to a GPU is half
    of that of int64.

    Args:
        sources: files, or arrays of tokens.
        size: tokens in a window.
        stride: from the start of one window to the start of the next; `size` where not given.
        every: keep one window in so many.

    Raises:
        ConfigError: where no source is long enough for a window.
    """

    def __init__(
        self, sources: Sequence[TokenFile | Tokens], *, size: int, stride: int | None = None, every: int = 1
    ) -> None:
        self._sources = tuple(sources)
        self._size = size
        self._stride = stride or size
        self._every = every
        counts = [max(0, (len(source) - size) // self._stride + 1) for source in self._sources]
        self._ends = np.cumsum(counts)
        self._num_windows = int(self._ends[-1]) if counts else 0
        if not self._num_windows:
            raise ConfigError(f"{sum(map(len, self._sources))} tokens are too few for one window of {size}")
        is_bytes = all(_dtype(source) == np.uint8 for source in self._sources)
        self._dtype: type[np.generic] = np.uint8 if is_bytes else np.int32
        self._opened: dict[int, Tokens] = {}

    @property
    def size(self) -> int:
        """Tokens in a window."""
        return self._size

    def __len__(self) -> int:
        return math.ceil(self._num_windows / self._every)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"windows are numbered 0 … {len(self) - 1}, got {index}")
        return self.read_batch(np.array([index]))[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return list(self.read_batch(np.array(indices)))

    def read_batch(self, indices: NDArray[np.int64]) -> Tensor:
        """Return the windows of these numbers at once, shape (windows, size)."""
        numbers = indices * self._every
        shards = np.searchsorted(self._ends, numbers, side="right")
        firsts = np.concatenate(([0], self._ends))[shards]
        batch = np.empty((len(indices), self._size), dtype=self._dtype)
        starts = ((numbers - firsts) * self._stride).tolist()
        for row, (shard, start) in enumerate(zip(shards.tolist(), starts, strict=True)):
            batch[row] = self._tokens(shard)[start : start + self._size]
        return torch.from_numpy(batch)

    def spread(self, at_most: int) -> TokenWindows:
        """Return at most so many of these windows, evenly spread over the text."""
        every = self._every * math.ceil(len(self) / at_most)
        return TokenWindows(self._sources, size=self._size, stride=self._stride, every=every)

    def largest_token(self) -> int:
        """Return the largest token: of all up to 64 Mi tokens, else of 64 blocks spread over each file."""
        return max(int(_spot_check(self._tokens(number))) for number in range(len(self._sources)))

    def _tokens(self, shard: int) -> Tokens:
        source = self._sources[shard]
        if not isinstance(source, TokenFile):
            return source
        if shard not in self._opened:
            if len(self._opened) >= _MAX_OPEN_FILES:
                self._opened.clear()
            self._opened[shard] = source.open()
        return self._opened[shard]

    def __getstate__(self) -> dict[str, Any]:
        # A map would be pickled as a copy of the whole file, once for each loading process.
        return {**self.__dict__, "_opened": {}}


def _dtype(source: TokenFile | Tokens) -> np.dtype[Any]:
    return np.dtype(source.dtype)


def _spot_check(tokens: Tokens) -> int:
    num_blocks = -(-len(tokens) // _BLOCK)
    chosen = np.unique(np.linspace(0, num_blocks - 1, min(num_blocks, _MAX_CHECKED_BLOCKS)).round().astype(int))
    return max((int(tokens[block * _BLOCK : (block + 1) * _BLOCK].max()) for block in chosen), default=0)


def split_off(
    files: Sequence[TokenFile | Tokens], *, num_tokens: int, shortest: int = 1
) -> tuple[list[TokenFile | Tokens], list[TokenFile | Tokens]]:
    """Return the sources without the last tokens of all, and those tokens.

    Args:
        files: the sources.
        num_tokens: how many are split off, at least `shortest`; fewer where the rest would be shorter than that.
        shortest: tokens of a source that anything is read from; shorter ones count for nothing and are left out.

    Raises:
        ConfigError: where nothing would be left.
    """
    kept = [file for file in files if len(file) >= shortest]
    tail: list[TokenFile | Tokens] = []
    missing = num_tokens
    while kept and missing >= shortest:
        last = kept.pop()
        if len(last) > missing:
            head, last = _cut(last, len(last) - missing)
            kept.append(head)
        tail.insert(0, last)
        missing -= len(last)
    if not any(len(file) >= shortest for file in kept):
        raise ConfigError(
            f"{num_tokens} tokens cannot be held out of the {sum(map(len, files))} of {len(files)} files: put a file "
            "with val in its name beside them, or lower the context"
        )
    return kept, tail


def _cut(source: TokenFile | Tokens, at: int) -> tuple[TokenFile | Tokens, TokenFile | Tokens]:
    if not isinstance(source, TokenFile):
        return source[:at], source[at:]
    offset = source.offset_bytes + at * np.dtype(source.dtype).itemsize
    return replace(source, num_tokens=at), replace(source, offset_bytes=offset, num_tokens=len(source) - at)
