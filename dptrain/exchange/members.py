"""What each replica has of its own: brought to rank 0 for a checkpoint, and read from one as a single model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.errors import ConfigError

Groups = Mapping[str, Mapping[str, Tensor]]


class Saved(Protocol):
    """A checkpoint, as far as it is read here."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def state(self) -> Mapping[str, Any]:
        """What was saved beside the tensors."""

    def holds(self, name: str) -> bool:
        """Whether tensors were saved under a name."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return those tensors."""


def member_name(group: str, rank: int) -> str:
    """Return the name in a checkpoint of a replica's tensors: those of rank 0 have the name of the only ones."""
    return group if rank == 0 else f"{group}-{rank}"


def member_names(saved: Saved) -> list[str]:
    """Return the names of the models in a checkpoint, by rank: one, unless replicas have parameters of their own."""
    names = ["model"]
    while saved.holds(member_name("model", len(names))):
        names.append(member_name("model", len(names)))
    return names


def model_of(saved: Saved, *, remedy: str) -> dict[str, Tensor]:
    """Return the model of a checkpoint by name: that of all replicas, or of local updates the mean, which is evaluated.

    Args:
        saved: the checkpoint.
        remedy: what to do where replicas are models of their own, for the error.

    Raises:
        ConfigError: where they are, as those of an ensemble and of codistillation.
    """
    names = member_names(saved)
    kind = saved.state.get("config", {}).get("exchange", {}).get("kind", "all_reduce")
    if len(names) > 1 and kind != "local_updates":
        raise ConfigError(
            f"the {len(names)} replicas of exchange.kind={kind} in {saved.path} are models of their own, and their "
            f"mean is none: {remedy}"
        )
    return averaged([saved.tensors(name) for name in names])


def averaged(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the means of floating-point entries, and of all others those of rank 0."""
    if len(members) == 1:
        return members[0]
    found = dict(members[0])
    for name, first in found.items():
        if first.is_floating_point():
            wide = first.new_zeros(first.shape, dtype=torch.float64)
            for each in members:
                wide += each[name].double()
            found[name] = (wide / len(members)).to(first.dtype)
    return found


def gathered(groups: Groups, *, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of all replicas, by `member_name`; those of rank 0 alone on the other ranks. A collective.

    All of a replica's tensors travel as one vector of bytes, which takes one message and no rounding.

    Args:
        groups: this replica's; names, shapes and types equal on all.
        device: where collectives run.
    """
    own = {name: dict(tensors) for name, tensors in groups.items()}
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    parts = [tensor.detach().to(device) for tensors in own.values() for tensor in tensors.values()]
    packed = torch.cat([_bytes(part) for part in parts]) if parts else torch.zeros(0, dtype=torch.uint8, device=device)
    is_first = dist.get_rank() == 0
    received = [torch.empty_like(packed) for _ in range(dist.get_world_size())] if is_first else None
    dist.gather(packed, received, dst=0)
    found = dict(own)
    for rank, vector in enumerate(received or []):
        pieces = iter(torch.split(vector, [part.numel() * part.element_size() for part in parts]))
        for name, tensors in own.items():
            # In host memory: rank 0 has room for one replica on its device, and not for all.
            theirs = {key: _tensor(next(pieces), like=tensor) for key, tensor in tensors.items()}
            if rank:
                found[member_name(name, rank)] = theirs
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _tensor(content: Tensor, *, like: Tensor) -> Tensor:
    # Cloned, because a piece need not begin where its type may.
    return content.clone().view(like.dtype).view(like.shape).cpu()
