"""The JSON of a checkpoint, byte for byte: `manifest.json` with the digests of the files, `state.json`, tensor headers.

Strict JSON, extended in two places by objects with one reserved key: a non-finite float is written as its eight bytes
(`{"$float64": "7ff8000000000000"}`), a tuple as `{"$tuple": [...]}`. No file is opened here. The text of a
CheckpointError is the bare reason: the caller adds which checkpoint it is about.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from dptrain.errors import CheckpointError
from dptrain.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = {MANIFEST: 1 << 20, STATE: 1 << 26}  # neither writer nor reader goes beyond
MAX_HEADER_BYTES = 1 << 24
MAX_TENSORS = 50_000  # its reader takes 84 s for 200,000 empty ones: the time grows with the square
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NON_FINITE = "$float64"
_TUPLE = "$tuple"


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What the manifest promises of one file."""

    size_bytes: int
    sha256: str


def encode_manifest(*, step: int, written_by: str, digests: Mapping[str, FileDigest]) -> bytes:
    """Return `manifest.json`: equal arguments, equal bytes."""
    files = {name: {"bytes": digest.size_bytes, "sha256": digest.sha256} for name, digest in digests.items()}
    body = {"format": FORMAT, "dptrain": written_by, "step": step, "files": files}
    return _dumps({**body, "sha256": hashlib.sha256(_dumps(body)).hexdigest()})


def decode_manifest(content: bytes) -> tuple[int, dict[str, FileDigest]]:
    """Return the step and the digest of each file.

    Raises:
        CheckpointError: unless `content` is, to the byte, what `encode_manifest` writes in this format.
    """
    body = decode_json(content, name=MANIFEST)
    if not isinstance(body, dict):
        raise CheckpointError(f"{MANIFEST} is not an object")
    version, written_by, step, files = (body.get(key) for key in ("format", "dptrain", "step", "files"))
    if type(version) is int and version > FORMAT:
        writer = quoted([written_by]) if type(written_by) is str else "of another version"
        raise CheckpointError(
            f"it was written by dptrain {writer} in format {version} and this is dptrain {__version__}, which "
            f"reads format {FORMAT}: use the dptrain that wrote it, or a newer one"
        )
    if version != FORMAT or type(written_by) is not str or type(step) is not int or type(files) is not dict:
        raise CheckpointError(f"{MANIFEST} lacks its format, dptrain version, step or files")
    digests = {name: _decode_digest(name, entry) for name, entry in files.items()}
    # Equal to the byte with what we would write, its own checksum included: no flipped bit can hide in a blank.
    if content != encode_manifest(step=step, written_by=written_by, digests=digests):
        raise CheckpointError(f"{MANIFEST} does not match the checksum that it carries")
    return step, digests


def _decode_digest(name: str, entry: object) -> FileDigest:
    if not PLAIN_NAME.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(f"{MANIFEST} lists {quoted([name])}, which is not a plain file name")
    match entry:
        case {"bytes": int(size_bytes), "sha256": str(digest)} if size_bytes >= 0:
            return FileDigest(size_bytes=size_bytes, sha256=digest)
    raise CheckpointError(f"{MANIFEST} lacks the size or the sha256 of {name}")


def encode_state(state: Mapping[str, JSON]) -> bytes:
    """Return `state.json`.

    Raises:
        CheckpointError: where a value is not JSON; the text says where it stands.
    """
    return _dumps(_plain(state, where="state"))


def decode_state(content: bytes) -> dict[str, JSON]:
    """Return what `encode_state` was given, tuples as tuples, floats equal bit for bit.

    Raises:
        CheckpointError: where `content` is not strict JSON with an object at the top.
    """
    state = decode_json(content, name=STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} is not an object")
    return state


def check_header(start: bytes, *, size_bytes: int) -> None:
    """Refuse a safetensors header that is longer than is ever written or read, or that names a tensor twice.

    Its own reader allows for 100 MB, of which it makes 2 GB of empty tensors, and takes the second of two in silence.

    Args:
        start: the first bytes of the file; the header is looked into where it is among them.
        size_bytes: of the file.

    Raises:
        CheckpointError: with the reason.
    """
    length = int.from_bytes(start[:8], "little")
    if length > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise CheckpointError(
            f"a header of {length} bytes in a file of {size_bytes} is refused: up to {MAX_HEADER_BYTES} are written or "
            f"read: join small tensors"
        )
    if len(start) >= 8 + length:
        entries = decode_json(start[8 : 8 + length], name="the header")
        if isinstance(entries, dict) and len(entries) > MAX_TENSORS:
            raise CheckpointError(f"{len(entries):,} tensors are refused, up to {MAX_TENSORS:,} are written or read")


def _dumps(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode("ascii")


def _plain(value: object, *, where: str) -> object:
    """Turn a value into strict JSON. A finite float's repr is exact; the others are written as their eight bytes."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else {_NON_FINITE: struct.pack(">d", value).hex()}
        case tuple():
            return {_TUPLE: [_plain(item, where=f"{where}[{i}]") for i, item in enumerate(value)]}
        case list():
            return [_plain(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
        case Mapping() if all(isinstance(key, str) and key not in {_NON_FINITE, _TUPLE} for key in value):
            return {key: _plain(item, where=f"{where}[{key!r}]") for key, item in value.items()}
    raise CheckpointError(
        f"{where} is a {type(value).__name__} that {STATE} cannot hold: use None, bool, int, float, str, list, "
        f"tuple or a dict with plain string keys, and store tensors as tensors"
    )


def decode_json(content: bytes, *, name: str) -> object:
    """Return what JSON holds; a CheckpointError where it is not strict."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_decode_object, parse_constant=_refuse_constant)
    except (ValueError, TypeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{name} is not the JSON that dptrain writes ({type(error).__name__})") from error


def _decode_object(pairs: list[tuple[str, Any]]) -> object:
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("a key stands twice")
    if decoded.keys() == {_NON_FINITE}:
        return struct.unpack(">d", bytes.fromhex(decoded[_NON_FINITE]))[0]
    if decoded.keys() == {_TUPLE}:
        return tuple(decoded[_TUPLE])
    return decoded


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not strict JSON")


def quoted(names: Iterable[str]) -> str:
    """Return foreign names fit for a message: escaped, and not too many of them."""
    text = ", ".join(sorted(repr(name)[:80] for name in names))
    return text if len(text) <= 400 else text[:400] + "…"  # noqa: PLR2004 -- a sentence, not a listing
