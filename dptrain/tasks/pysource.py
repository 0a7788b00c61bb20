"""The task `pysource`: the tiny GPT, or an LSTM, on the bytes of the source text of Python's own standard library."""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dptrain.data.token_files import TokenWindows
from dptrain.errors import ConfigError, TaskError
from dptrain.models.gpt import SIZES, Gpt
from dptrain.tasks.base import Task
from dptrain.tasks.gpt import SUGGESTIONS, language_task

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
    train, held_out = (
        TokenWindows([text.numpy()], size=context + 1) for text in read_source(Path(sysconfig.get_paths()["stdlib"]))
    )
    return language_task(
        "pysource" if model == "transformer" else f"pysource-{model}",
        network,
        train=train,
        held_out=held_out.spread(_HELD_OUT_BYTES // context),
        suggestion=SUGGESTIONS["tiny"],
        is_bytes=True,
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
    return Gpt(replace(SIZES["tiny"], context=context, width=width, depth=depth, heads=heads))


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
