"""Sharded checkpoints: each rank writes the pieces that it holds to files of its own, and rank 0 commits them together.

Nothing is gathered to be saved. A rank writes its pieces of the sharded tensors, a file for each group of tensors
(`model-shard-00001.safetensors`), and then `shard-00001.json`, with size and sha256 of those files and the place of
each piece in its tensor. Rank 0 waits for the JSON of all ranks, puts the digests of all files into the manifest, and
commits the folder by rename as always. The ranks meet in the folder alone, so no collective runs beside training. Put
together again, the tensors fit any number of ranks.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from dptrain.checkpoint.durable_files import sync_and_digest
from dptrain.checkpoint.finite import StateNotFiniteError
from dptrain.checkpoint.manifest import FileDigest, decode_json, quoted
from dptrain.checkpoint.state import is_sharded
from dptrain.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

Layout = dict[str, dict[str, "Piece"]]
"""Group → key → where this rank's piece of that tensor stands."""

_LAYOUT_NAME = re.compile(r"shard-([0-9]{5})\.json")
_POLL_S = 0.01
_GRACE_S = 5.0
"""How long a process that ends waits for the shards of others: they may be gone."""


class ShardError(CheckpointError):
    """Pieces that do not fit together; the text is the bare reason, without which checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where a rank's piece stands in a sharded tensor.

    Attributes:
        shape: of the whole tensor.
        offsets: of the piece's first element, one for each dimension.
        sizes: of the piece.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where the ranks put the shards of one checkpoint before it is committed.

    Attributes:
        folder: temporary, the same for all ranks, and of no other save, also not of one by an earlier attempt.
        rank: of this process.
        num_ranks: that write a shard each.
        layout: of this rank's pieces.
        patience_s: how long rank 0 waits for the others once it has written its own shard.
        closing: set where the process is about to end.
    """

    folder: Path
    rank: int
    num_ranks: int
    layout: Layout
    patience_s: float
    closing: threading.Event = field(default_factory=threading.Event)


def pieces_of(
    tensors: Mapping[str, Mapping[str, Tensor]], *, rank: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], Layout]:
    """Part what is whole on each rank from the pieces that this rank writes.

    Of pieces that several ranks hold (HSDP), the first of them writes.

    Args:
        tensors: group → key → tensor.
        rank: of this process.

    Returns:
        The whole tensors; this rank's pieces, by the stems of their files; where these stand.
    """
    whole = {group: {key: t for key, t in entries.items() if not is_sharded(t)} for group, entries in tensors.items()}
    pieces: dict[str, dict[str, Tensor]] = {}
    layout: Layout = {}
    for group, entries in tensors.items():
        own: dict[str, Tensor] = {}
        for key, tensor in entries.items():
            if not is_sharded(tensor):
                continue
            sharded = cast("Any", tensor.detach())
            local = sharded.to_local()
            if _writes(sharded) and (local.numel() or not sharded.numel()):
                chunk = sharded.__create_chunk_list__()[0]  # by which torch's own checkpoints find the place of a piece
                own[key] = local
                layout.setdefault(group, {})[key] = Piece(
                    shape=tuple(sharded.shape), offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes)
                )
        if own:
            pieces[_stem(group, rank=rank)] = own
    return whole, pieces, layout


def _stem(group: str, *, rank: int) -> str:
    return f"{group}-shard-{rank:05d}"


def _layout_name(rank: int) -> str:
    return f"shard-{rank:05d}.json"


def _writes(sharded: Any) -> bool:  # noqa: ANN401 - a DTensor
    """Whether this rank is the first of those that hold the same piece."""
    place = sharded.device_mesh.get_coordinate()
    return all(
        coordinate == 0 or type(placement).__name__ == "Shard"
        for coordinate, placement in zip(place, sharded.placements, strict=True)
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shard(staging: Staging, pieces: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Make the pieces of a rank durable in the staging folder, and then say that they are there.

    Raises:
        OSError: where they cannot be written.
        SafetensorError: where a tensor is of a kind that no file holds.
    """
    from safetensors.torch import save_file

    staging.folder.mkdir(mode=0o700, exist_ok=True)
    digests = {}
    for stem, own in pieces.items():
        path = staging.folder / f"{stem}.safetensors"
        save_file(dict(own), path)
        digests[path.name] = sync_and_digest(path)
    announce(staging, digests)


def own_files(staging: Staging) -> list[str]:
    """Return the names of the files with this rank's pieces."""
    return [shard_file(group, rank=staging.rank) for group in staging.layout]


def announce(staging: Staging, digests: Mapping[str, FileDigest]) -> None:
    """Say that a rank's files are there, and where their pieces stand."""
    files = {name: asdict(digest) for name, digest in digests.items()}
    layout = {group: {key: asdict(piece) for key, piece in own.items()} for group, own in staging.layout.items()}
    _write_json(staging, {"files": files, "layout": layout})


def announce_failure(staging: Staging, error: BaseException) -> None:
    """Say that a rank's shard will not come, so that rank 0 need not wait for it."""
    reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    staging.folder.mkdir(mode=0o700, exist_ok=True)
    _write_json(staging, {"error": reason, "is_diverged": isinstance(error, StateNotFiniteError)})


def _write_json(staging: Staging, content: Mapping[str, object]) -> None:
    """Write under another name first: what bears the name is whole."""
    path = staging.folder / _layout_name(staging.rank)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(json.dumps(content, indent=1).encode("ascii"))
    sync_and_digest(temporary)
    temporary.rename(path)


def collect_shards(staging: Staging) -> dict[str, FileDigest]:
    """Wait for the shards of all ranks, and return the digests of their files for the manifest.

    Raises:
        CheckpointError: where a rank could not write its shard, or did not in time; a StateNotFiniteError where its
            shard held numbers that are not finite.
    """
    digests: dict[str, FileDigest] = {}
    ends_s = time.monotonic() + staging.patience_s
    for rank in range(staging.num_ranks):
        path = staging.folder / _layout_name(rank)
        while not path.exists():
            if staging.closing.is_set():
                ends_s = min(ends_s, time.monotonic() + _GRACE_S)
                staging.closing.clear()
            if time.monotonic() > ends_s:
                raise CheckpointError(f"rank {rank} of {staging.num_ranks} did not write its shard in time")
            time.sleep(_POLL_S)
        found = json.loads(path.read_bytes())
        if "error" in found:
            kind = StateNotFiniteError if found["is_diverged"] else CheckpointError
            raise kind(f"{found['error']} (rank {rank})")
        for name, digest in found["files"].items():
            size_bytes = (staging.folder / name).stat().st_size
            if size_bytes != digest["size_bytes"]:
                raise CheckpointError(f"{name} has {size_bytes} bytes, and rank {rank} wrote {digest['size_bytes']}")
            digests[name] = FileDigest(**digest)
        digests[path.name] = sync_and_digest(path)
    return digests


# --- reading ---------------------------------------------------------------------------------------------------------


def layouts_in(names: Iterable[str]) -> dict[int, str]:
    """Return, by rank, the names of a checkpoint's files that say where pieces stand; none where nothing is sharded."""
    return {int(match[1]): name for name in sorted(names) if (match := _LAYOUT_NAME.fullmatch(name))}


def shard_file(group: str, *, rank: int) -> str:
    """Return the name of the file with a rank's pieces of a group."""
    return f"{_stem(group, rank=rank)}.safetensors"


def decode_layout(content: bytes, *, name: str, group: str) -> dict[str, Piece]:
    """Return where a rank's pieces of a group stand; nothing where it has none.

    Raises:
        ShardError: unless `content` is what `announce` writes.
    """
    try:
        own = cast("Any", decode_json(content, name=name))["layout"].get(group, {})
        return {key: Piece(**{part: _counts(values) for part, values in piece.items()}) for key, piece in own.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{name} does not say where pieces stand ({error!r})") from error


def _counts(values: Any) -> tuple[int, ...]:  # noqa: ANN401 - of JSON
    if type(values) is not list or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(values)


class Assembly:
    """Puts the sharded tensors of a group together, one rank's pieces at a time."""

    def __init__(self) -> None:
        self._whole: dict[str, Tensor] = {}
        self._offsets: dict[str, set[tuple[int, ...]]] = {}
        self._left: dict[str, int] = {}

    def add(self, pieces: Mapping[str, Tensor], layout: Mapping[str, Piece]) -> None:
        """Put a rank's pieces into place.

        Raises:
            ShardError: where pieces and places do not fit one another.
        """
        if pieces.keys() != layout.keys():
            raise ShardError(f"{quoted(pieces.keys() ^ layout.keys())} has a piece and no place, or the reverse")
        for key, piece in pieces.items():
            place = layout[key]
            if key not in self._whole:
                self._whole[key] = torch.empty(place.shape, dtype=piece.dtype)
                self._left[key] = self._whole[key].numel()
                self._offsets[key] = set()
            whole = self._whole[key]
            is_like = (tuple(whole.shape), whole.dtype, place.sizes) == (place.shape, piece.dtype, tuple(piece.shape))
            is_inside = len(place.offsets) == len(place.sizes) == whole.dim() and all(
                offset + size <= total
                for offset, size, total in zip(place.offsets, place.sizes, place.shape, strict=True)
            )
            if not (is_like and is_inside) or place.offsets in self._offsets[key]:
                raise ShardError(f"a piece of {key!r} does not fit into the tensor")
            self._offsets[key].add(place.offsets)
            self._left[key] -= piece.numel()
            for dimension, (offset, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
                whole = whole.narrow(dimension, offset, size)
            whole.copy_(piece)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole tensors.

        Raises:
            ShardError: where pieces are missing, or overlap.
        """
        if torn := [key for key, left in self._left.items() if left]:
            raise ShardError(f"the pieces of {quoted(torn)} do not make up the tensor")
        return self._whole
