"""Streams whose kernels run on some of the SMs of a device only: green contexts of the CUDA driver.

    a, b = sides(56, device)        of 132 SMs: a has 56, b the other 76; neither has one of the other's
    with torch.cuda.stream(a), within(a.sms): product(...)
    with torch.cuda.stream(b), within(b.sms): reading(...)

A context gets the SMs that one split of the device gives: a group, and what remains. `torch.cuda.green_contexts` makes
one context at a time and always of the first group, so two of them would share SMs; the driver is asked itself. Streams
of such contexts run kernels that were loaded in the primary context, of which they are parts: compiled ones, torch's.
Kernels whose programs stay are started as many as a side holds (`backends/share.py`); of others, programs that find no
place wait.

Where the driver has no green contexts, or refuses, the streams are ordinary ones, and say why: kernels then share all
SMs as the device sees fit, and the results are the same.

Contexts and streams live as long as the process: a few, kept by device and partition.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

DRIVER = "libcuda.so.1"
SM_RESOURCE = 1  # CU_DEV_RESOURCE_TYPE_SM
DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM, the only flag of a context, and needed
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which streams of green contexts must be
COUNT_AT = 4 + 92  # bytes of a resource before its number of SMs: its type, and what is the driver's own
RESOURCE_BYTES = 256  # it has 144 in version 1 of its layout


class Confined(torch.cuda.ExternalStream):
    """A stream, on how many SMs its kernels run, and why these are all of them where they are.

    `owner` is the stream of torch whose handle an ordinary one has.
    """

    sms: int
    why: str | None
    owner: torch.cuda.Stream | None = None


class _RefusedError(Exception):
    """The driver lacks a function, or does not do what it is asked for."""


def sides(first: int, device: torch.device | int = 0) -> tuple[Confined, Confined]:
    """Streams of both sides of a device: of so many SMs, and of the rest."""
    return _sides(first, _number(device))


def confined(sms: int, device: torch.device | int = 0, rest: bool = False) -> Confined:
    """A stream on so many SMs; as the rest of a device whose other side has what is left, if asked for."""
    return sides(_total(_number(device)) - sms, device)[1] if rest else sides(sms, device)[0]


def _number(device: torch.device | int) -> int:
    if isinstance(device, int):
        return device
    return torch.cuda.current_device() if device.index is None else device.index


def _total(number: int) -> int:
    return int(torch.cuda.get_device_properties(number).multi_processor_count)


@functools.cache
def _sides(first: int, number: int) -> tuple[Confined, Confined]:
    torch.cuda.synchronize(number)  # contexts are parts of the primary one, which exists from here on
    try:
        return _split(_Driver(), first, number)
    except (OSError, _RefusedError) as error:
        return _ordinary(number, str(error)), _ordinary(number, str(error))


def _ordinary(number: int, why: str) -> Confined:
    stream: Any = torch.cuda.Stream(number)  # type: ignore[no-untyped-call]
    found = _stream(stream.cuda_stream, number, _total(number), f"not confined: {why}")
    found.owner = stream
    return found


def _stream(handle: int, number: int, sms: int, why: str | None) -> Confined:
    found = Confined(handle, torch.device("cuda", number))  # type: ignore[no-untyped-call]
    found.sms, found.why = sms, why
    return found


class _Driver:
    """Functions of the driver; a call that fails is an error with its name and number."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(DRIVER)

    def __call__(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self.library, name)
        except AttributeError:
            raise _RefusedError(f"the driver has no {name}") from None
        if code := function(*arguments):
            raise _RefusedError(f"{name} gives error {code}")


def _split(driver: _Driver, first: int, number: int) -> tuple[Confined, Confined]:
    """Two streams of contexts that share no SM: of the one group of a split, and of what remains of it."""
    device = ctypes.c_int()
    driver("cuDeviceGet", ctypes.byref(device), number)
    whole, group, rest = (ctypes.create_string_buffer(RESOURCE_BYTES) for _ in range(3))
    driver("cuDeviceGetDevResource", device, whole, SM_RESOURCE)
    groups = ctypes.c_uint(1)
    driver("cuDevSmResourceSplitByCount", group, ctypes.byref(groups), whole, rest, 0, ctypes.c_uint(first))
    if groups.value != 1 or _count(group) + _count(rest) > _count(whole) or not _count(rest):
        raise _RefusedError(f"the device does not split into {first} SMs and a rest")
    return _of(driver, group, device, number), _of(driver, rest, device, number)


def _count(resource: ctypes.Array[ctypes.c_char]) -> int:
    """The SMs of a resource."""
    return ctypes.c_uint.from_buffer(resource, COUNT_AT).value


def _of(driver: _Driver, resource: ctypes.Array[ctypes.c_char], device: ctypes.c_int, number: int) -> Confined:
    """A stream of a context that has a resource."""
    described, context, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    driver("cuDevResourceGenerateDesc", ctypes.byref(described), resource, ctypes.c_uint(1))
    driver("cuGreenCtxCreate", ctypes.byref(context), described, device, ctypes.c_uint(DEFAULT_STREAM))
    driver("cuGreenCtxStreamCreate", ctypes.byref(stream), context, ctypes.c_uint(NON_BLOCKING), ctypes.c_int(0))
    if not stream.value:
        raise _RefusedError("cuGreenCtxStreamCreate gives no stream")
    return _stream(stream.value, number, _count(resource), None)
