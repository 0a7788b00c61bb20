"""The task `pysource`: a byte-level language model on the source text of Python's own standard library."""

from __future__ import annotations

import math
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from dptrain.errors import ConfigError, TaskError
from dptrain.tasks.base import Suggestion, Task

_MODELS = ("transformer", "lstm")
_DEFAULT_HEADS = 4
_NUM_BYTES = 256
_LARGEST_TEXT_BYTES = 16 << 20
_HELD_OUT_EVERY = 20
_HELD_OUT_BYTES = 64 << 10
# Installed packages and test suites, which some Pythons come without; tables of numbers; prose; and generated grammar.
_LEFT_OUT = frozenset(
    {
        "site-packages", "dist-packages", "__pycache__",
        "test", "tests", "idle_test",
        "encodings", "pydoc_data", "lib2to3",
    }
)  # fmt: skip


def pysource(
    *,
    model: str = "transformer",
    context: int = 64,
    width: int = 128,
    depth: int = 2,
    heads: int | None = None,
) -> Task:
    """Predict the next byte of the standard library's source text, which every Python has with it.

    One sample is a window of `context` + 1 bytes; the windows do not overlap. About one file in twenty is held out,
    by a hash of its path, so that files stay where they are from one release of Python to the next. The text is that
    of the running Python, so figures of different releases differ a little.

    Args:
        model: `"transformer"` or `"lstm"`.
        context: number of bytes that are predicted in a sample, each from all before it; at least 1.
        width: of the residual stream or of the state; for the transformer a multiple of 2 × `heads`.
        depth: number of transformer blocks or of LSTM layers, at least 1.
        heads: number of attention heads, at least 1; 4 where not given. The LSTM has none.

    Returns:
        The task. Its loss is in nats per byte; `bits_per_byte` is among its figures.

    Raises:
        ConfigError: where an argument is out of bounds.
        TaskError: where this Python has no source files beside it.
    """
    network = _network(model, context=context, width=width, depth=depth, heads=heads)
    train, held_out = read_source(Path(sysconfig.get_paths()["stdlib"]))
    held_out_data = Windows(held_out, size=context + 1)
    return Task(
        name="pysource" if model == "transformer" else f"pysource-{model}",
        model=network,
        train_data=Windows(train, size=context + 1),
        eval_data=held_out_data.spread(_HELD_OUT_BYTES // context),
        loss=next_byte_loss,
        eval_metrics={"bits_per_byte": _nats_to_bits},
        suggestion=Suggestion(
            learning_rate=2e-3,
            global_batch_size=16,
            micro_batch_size=8,
            max_samples=40_000,
            eval_every_samples=4_000,
        ),
    )


def _network(model: str, *, context: int, width: int, depth: int, heads: int | None) -> nn.Module:
    if model not in _MODELS:
        raise ConfigError(f"pysource has the models {', '.join(map(repr, _MODELS))}, got {model!r}")
    if model == "lstm":
        if heads is not None:
            raise ConfigError(f"heads of pysource is for the transformer, the LSTM has none: leave out heads={heads!r}")
        _check_sizes(context=context, width=width, depth=depth)
        return ByteLstm(width=width, depth=depth)
    heads = _DEFAULT_HEADS if heads is None else heads
    _check_sizes(context=context, width=width, depth=depth, heads=heads)
    if width % (2 * heads):
        raise ConfigError(
            f"width of pysource must be a multiple of 2 × heads = {2 * heads} (rotary positions turn pairs of "
            f"components within a head), got {width}"
        )
    return ByteTransformer(width=width, depth=depth, heads=heads)


def _check_sizes(*, context: int, **sizes: int) -> None:
    for name, value in {"context": context, **sizes}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} of pysource must be a whole number of at least 1, got {value!r}")
    if context > _HELD_OUT_BYTES:
        raise ConfigError(f"context of pysource must be at most {_HELD_OUT_BYTES}, got {context}")


def read_source(root: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out text of the *.py files below `root`, as two uint8 tensors of shape (bytes,).

    Files come in the order of their paths, each closed by a zero byte, which no source file holds. At most 16 MiB
    are read, which is more than today's libraries have.

    Raises:
        TaskError: where one of the two would be empty.
    """
    train, held_out = bytearray(), bytearray()
    for path in _source_files(root):
        text = path.read_bytes()
        if len(train) + len(held_out) + len(text) > _LARGEST_TEXT_BYTES:
            break
        (held_out if is_held_out(path.relative_to(root)) else train).extend(text + b"\0")
    if not train or not held_out:
        raise TaskError(f"there is too little Python source text below {root} to train on, {len(train)} bytes")
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # Pruned before it is entered (pathlib's rglob would list all of site-packages), and sorted, as os.walk is not.
        subfolders[:] = sorted(set(subfolders) - _LEFT_OUT)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def is_held_out(path: Path) -> bool:
    """Whether the file of this path, relative to the library, is held out: the same on every machine."""
    return zlib.crc32(path.as_posix().encode()) % _HELD_OUT_EVERY == 0


class Windows(Dataset[Tensor]):
    """Consecutive windows of a text that do not overlap; a last one that would be shorter is left out.

    Args:
        text: uint8, shape (bytes,).
        size: bytes in a window.
        every: keep one window in so many.
    """

    def __init__(self, text: Tensor, *, size: int, every: int = 1) -> None:
        self._text = text
        self._size = size
        self._every = every

    def __len__(self) -> int:
        return math.ceil(len(self._text) // self._size / self._every)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"windows are numbered 0 … {len(self) - 1}, got {index}")
        start = index * self._every * self._size
        return self._text[start : start + self._size]

    def spread(self, at_most: int) -> Windows:
        """At most so many of these windows, evenly spread over the text."""
        return Windows(self._text, size=self._size, every=self._every * math.ceil(len(self) / at_most))


class ByteTransformer(nn.Module):
    """A causal pre-norm transformer over bytes: RMS norms, rotary positions, no biases.

    Args:
        width: of the residual stream.
        depth: number of blocks.
        heads: number of attention heads.
    """

    def __init__(self, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_NUM_BYTES, width)
        self.blocks = nn.ModuleList(_Block(width=width, heads=heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, _NUM_BYTES, bias=False)
        # The first norm divides a small embedding by its size and multiplies its gradient by as much. At 0.02 the first
        # |G|² is 7,000 times that of 2,000 samples later, which any smoothing remembers for long; at 0.25 it is 400
        # times, for 0.06 bits per byte after 10,000 samples (2.44 against 2.38).
        nn.init.normal_(self.embedding.weight, std=0.25)
        nn.init.normal_(self.output.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the byte after each, shape (samples, bytes, 256), of int64 text of shape (samples, bytes)."""
        stream = self.embedding(text)
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.output(self.norm(stream))
        return logits


class _Block(nn.Module):
    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        # A block reads at unit scale and starts as the identity: 0.09 bits per byte better after 10,000 samples than
        # writing with small random weights (2.48 against 2.57).
        for reads in (self.attention_in, self.mlp_in):
            nn.init.normal_(reads.weight, std=width**-0.5)
        for writes in (self.attention_out, self.mlp_out):
            nn.init.zeros_(writes.weight)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self._attention(self.attention_norm(stream))
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(stream)), approximate="tanh")
        out: Tensor = stream + self.mlp_out(hidden)
        return out

    def _attention(self, stream: Tensor) -> Tensor:
        samples, length, width = stream.shape
        heads = self.attention_in(stream).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(_turned(query), _turned(key), value, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(samples, length, width))
        return out


def _turned(heads: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): pairs of components turn at rates from 1 down to 1/10,000.

    The angles are computed on the spot: at this size that costs nothing, and no buffer has to follow the model.
    """
    half = heads.shape[-1] // 2
    rates = 1e4 ** -(torch.arange(half, device=heads.device) / half)
    angles = torch.arange(heads.shape[-2], device=heads.device)[:, None] * rates
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class ByteLstm(nn.Module):
    """Long short-term memory over bytes: what a text model was before attention.

    Args:
        width: of the embedding and of each layer's state.
        depth: number of layers.
    """

    def __init__(self, *, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_NUM_BYTES, width)
        self.layers = nn.LSTM(width, width, num_layers=depth, batch_first=True)
        self.output = nn.Linear(width, _NUM_BYTES, bias=False)
        # Small, so that training starts from a uniform guess, 8 bits per byte, as the transformer's does.
        nn.init.normal_(self.output.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the byte after each, shape (samples, bytes, 256), of int64 text of shape (samples, bytes)."""
        states, _ = self.layers(self.embedding(text))
        logits: Tensor = self.output(states)
        return logits


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats; windows are uint8 of shape (samples, context + 1).

    All windows are equally long, so the mean over bytes is the mean over samples of each one's mean over bytes.
    """
    windows = windows.long()
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _nats_to_bits(nats: float) -> float:
    return nats / math.log(2)
