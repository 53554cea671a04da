"""Where results of a call are written, if whoever calls has a place for them.

    with into({"Y": rows[128:256]}):
        call(...)      # the result Y is that tensor, where a kernel writes it and it lies as a new one would

Results of other shapes or types, and those that no kernel writes, are new tensors as ever: who asks looks which came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

ALIGNMENT = 16  # bytes, of the base of what kernels suppose

_PLACES: ContextVar[Mapping[str, Any]] = ContextVar("places")


@contextlib.contextmanager
def into(places: Mapping[str, Any]) -> Iterator[None]:
    """Results of these names are these tensors, in calls in here."""
    token = _PLACES.set(places)
    try:
        yield
    finally:
        _PLACES.reset(token)


def place_of(name: str, like: tuple[tuple[int, ...], Any, tuple[int, ...]]) -> Any:
    """The tensor of a result of this shape, type and strides; None where there is none like that."""
    tensor = _PLACES.get({}).get(name)
    if tensor is None or (tuple(tensor.shape), tensor.dtype, tensor.stride()) != like or tensor.data_ptr() % ALIGNMENT:
        return None
    return tensor
