"""Sums over a group in memory that its devices share: operators of torch's symmetric memory, where the group has any.

    sums = symmetric(group, device)        sums.why is None, or says why there is no such memory
    if sums.takes(value):
        total = sums.summed(value)         the same on every member, added in the order of the ranks

Most of what a small exchange takes is latency: that of a library's ring or tree, and its launch. Here one kernel copies
what a rank has to where the others see it, waits for them, reads theirs and adds. What a rank reads grows with the
number of ranks, so what is large is left to the library.

Members agree on whether they have it before any relies on it; a group of one rank is one whose others are none. Each
stream has memory of its own: exchanges of one at a time, in the order in which all ranks issue them.

Source: `torch.distributed._symmetric_memory`, one-shot all-reduce.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as memory
from torch import Tensor

LARGEST = 1 << 18  # bytes of a sum: more is read faster in shares
ALIGNED = 16  # bytes: what the operators load at once
TYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Symmetric:
    """Memory of a group on one stream, or why it has none."""

    name: str
    shared: Tensor | None
    why: str | None = None

    def takes(self, value: Tensor) -> bool:
        """Whether a sum of such a tensor goes through this memory; the same on every rank, by type and extents."""
        size = value.numel() * value.element_size()
        return self.shared is not None and value.dtype in TYPES and 0 < size <= LARGEST and size % ALIGNED == 0

    def summed(self, value: Tensor) -> Tensor:
        """The sum of the values of all members, contiguous, in a new tensor."""
        assert self.shared is not None, "only what it takes"
        own = value.contiguous()
        if own.data_ptr() % ALIGNED:
            own = own.clone()
        place = self.shared[: own.numel() * own.element_size()].view(own.dtype).view(own.shape)
        made: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(place, own, "sum", self.name)
        return made


def symmetric(group: Any, device: torch.device) -> Symmetric:
    """The memory of a group for one stream of a device; a collective, whose answer is the same on every rank."""
    name = group.group_name
    if device.type != "cuda":
        return Symmetric(name, None, f"devices of type {device.type} have none")
    shared, why = _shared(group, device)
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, why, group)
    if refused := next((f"rank {rank} of the group: {one}" for rank, one in enumerate(found) if one), None):
        return Symmetric(name, None, refused)
    return Symmetric(name, shared)


def _shared(group: Any, device: torch.device) -> tuple[Tensor | None, str | None]:
    """Memory that all members see, or why this rank has none."""
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), device.index), group)
    own = places[group.rank()]
    if len({host for host, _ in places}) > 1:
        return None, "members are on several machines"
    if any(other != own and not torch.cuda.can_device_access_peer(own[1], other[1]) for other in places):
        return None, "its device cannot read the memory of the others"
    try:
        found = memory.empty(LARGEST, dtype=torch.uint8, device=device)
        memory.rendezvous(found, group)
    except (RuntimeError, AttributeError) as error:
        return None, str(error).splitlines()[0]
    return found, None
