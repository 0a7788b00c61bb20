"""Plain text as tokens: bytes, or what a tokenizer's file makes of them; which model reads them is not known here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.data.token_files import Tokens
from dptrain.errors import ConfigError

_NUM_BYTES = 256
_LARGEST_TEXT_BYTES = 1 << 30
_PIECE_CHARACTERS = 1 << 20  # a tokenizer takes some 60 bytes of memory for each character that it is given at once


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokens of text files, one array for each file.

    Attributes:
        train: to train on.
        held_out: of the files with `val` in their name; may be empty.
        vocab_size: number of token values.
    """

    train: list[Tokens]
    held_out: list[Tokens]
    vocab_size: int


def read_text(path: Path, *, tokenizer: str | None) -> Text:
    """Read a text file, or the .txt files of a folder in the order of their names.

    Args:
        path: of the file or folder.
        tokenizer: file of a tokenizer (`tokenizer.json`); bytes where None.

    Raises:
        ConfigError: where there is no text or too much of it, it is no UTF-8, or the tokenizer cannot be read.
    """
    paths = [path] if path.is_file() else sorted(path.glob("*.txt"))
    size = sum(found.stat().st_size for found in paths)
    if not size:
        raise ConfigError(f"{path} holds neither .bin files nor text: give a .bin or text file, or a folder of them")
    if size > _LARGEST_TEXT_BYTES:
        raise ConfigError(
            f"{path} holds {size / 2**30:.1f} GiB of text, which every replica would read into memory: write its "
            f"tokens to .bin files first, which are read where they lie"
        )
    encode, vocab_size = (_bytes_of, _NUM_BYTES) if tokenizer is None else _encoder(Path(tokenizer).expanduser())
    train = [encode(found) for found in paths if "val" not in found.stem or len(paths) == 1]
    held_out = [encode(found) for found in paths if "val" in found.stem and len(paths) > 1]
    if not train:
        raise ConfigError(f"all text files of {path} have val in their name, so none is left to train on")
    return Text(train=train, held_out=held_out, vocab_size=vocab_size)


def _bytes_of(path: Path) -> Tokens:
    return np.frombuffer(bytearray(path.read_bytes()), dtype=np.uint8)


def _encoder(path: Path) -> tuple[Any, int]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            f"a tokenizer needs the package tokenizers: pip install 'dptrain[tasks]' ({error})"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # its errors derive from nothing narrower
        raise ConfigError(f"tokenizer file {path} cannot be read: {error}") from error
    vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
    # Ids may have gaps: the largest one decides.
    vocab_size = max(vocab_size, 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0))

    def encode(text_path: Path) -> Tokens:
        try:
            text = text_path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{text_path} is no UTF-8 text: {error.reason} at byte {error.start}") from error
        encoded = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in _pieces(text)]
        return np.concatenate([np.array(ids, dtype=np.uint32) for ids in encoded] or [np.empty(0, dtype=np.uint32)])

    return encode, vocab_size


def _pieces(text: str) -> Iterator[str]:
    """Cut a text at ends of lines into pieces of a million characters or somewhat more."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS) + 1
        yield text[start : end or None]
        start = end or len(text)
