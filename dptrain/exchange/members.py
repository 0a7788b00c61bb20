"""What each replica has of its own, brought to rank 0 for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

Groups = Mapping[str, Mapping[str, Tensor]]


def member_name(group: str, rank: int) -> str:
    """Return the name in a checkpoint of a replica's tensors: those of rank 0 have the name of the only ones."""
    return group if rank == 0 else f"{group}-{rank}"


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
