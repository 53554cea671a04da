"""Launches after the first: what goes to the launcher is what Triton's own wrapper would have passed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from triton.tools.tensor_descriptor import TensorDescriptor

from cascade.backends.triton import relaunch

ROOT = Path(__file__).parent.parent
TRITON36 = ROOT / ".venv-triton36" / "bin" / "python"
GRID = (3, 1, 1)


class Memory:
    """What stands for a tensor: an address, and what a descriptor asks for."""

    def __init__(self, address: int) -> None:
        self.address, self.shape, self.dtype = address, (64, 32), SimpleNamespace(is_floating_point=True, itemsize=2)

    def data_ptr(self) -> int:
        return self.address

    def element_size(self) -> int:
        return 2

    def stride(self) -> tuple[int, int]:
        return (32, 1)


def described(tensor: Memory) -> TensorDescriptor:
    return TensorDescriptor(tensor, [64, 32], [32, 1], [16, 32])


def make_tensordesc_arg(arg: Any, metadata: Any) -> list[Any]:
    """As in Triton 3.6, but that what is encoded is told."""
    encoded.append(arg.base.data_ptr())
    return [("map", arg.base.data_ptr(), metadata["swizzle"]), *arg.shape, *arg.strides]


encoded: list[int] = []


def wrapped(launcher: Any, indices: set[int], metadata: list[Any]) -> Any:
    """The closure that Triton 3.6 makes around a launcher."""
    tensordesc_indices, tensordesc_meta = indices, metadata

    def inner(*args: Any) -> Any:
        final, number = list(args[:13]), 0
        for i, arg in enumerate(args[13:]):
            if i in tensordesc_indices:
                final.extend(make_tensordesc_arg(arg, tensordesc_meta[number]))
                number += 1
            else:
                final.append(arg)
        return launcher(*final)

    return inner


def launcher_of(launch: Any, **more: Any) -> Any:
    """A launcher as a compiled kernel has it."""
    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0}
    found = SimpleNamespace(launch=launch, launch_cooperative_grid=False, launch_pdl=False, **{**sizes, **more})
    return SimpleNamespace(run=found, function=77, packed_metadata=("packed",))


def test_the_wrapper_is_gone_around_and_passes_the_same() -> None:
    seen: list[tuple[Any, ...]] = []
    launch = wrapped(lambda *args: seen.append(args), {0, 2}, [{"swizzle": 3}, {"swizzle": 1}])
    tensors = {"Q": Memory(4096), "K": Memory(8192), "O": Memory(128)}
    arguments = [described(tensors["Q"]), 5, described(tensors["K"]), tensors["O"], 9]
    names = {0: "Q", 2: "K", 3: "O"}
    again = relaunch.relaunch(launcher_of(launch), GRID, arguments, names)
    moved = {"Q": Memory(512), "K": Memory(8192), "O": Memory(1024)}
    again(moved, 11)
    base = (*GRID, 11, 77, False, False, None, None, ("packed",), None, None, None)
    launch(*base, described(moved["Q"]), 5, described(moved["K"]), moved["O"].data_ptr(), 9)
    assert seen[0] == seen[1]


def test_a_descriptor_is_encoded_once_per_address() -> None:
    launch = wrapped(lambda *args: None, {0}, [{"swizzle": 3}])
    again = relaunch.relaunch(launcher_of(launch), GRID, [described(Memory(16))], {0: "X"})
    encoded.clear()
    for address in (32, 48, 32, 48, 32):
        again({"X": Memory(address)}, 0)
    assert encoded == [32, 48]
    for address in range(16, 16 * (relaunch.KEPT + 8), 16):  # more than are kept
        again({"X": Memory(address)}, 0)
    encoder = again.slots[0][2]
    assert encoder is not None and len(encoder.known) <= relaunch.KEPT


@pytest.mark.parametrize(
    "launch, more",
    [
        (lambda *args: None, {}),
        (wrapped(print, {0}, [None]), {}),
        (wrapped(print, {0}, [{"swizzle": 1}]), {"global_scratch_size": 128}),
    ],
    ids=["another form", "nothing to encode", "scratch memory"],
)
def test_any_other_launcher_gets_descriptors_as_they_are(launch: Any, more: dict[str, Any]) -> None:
    seen: list[tuple[Any, ...]] = []

    class Run(SimpleNamespace):
        def __call__(self, *args: Any) -> None:
            seen.append(args)

    kernel = launcher_of(launch, **more)
    kernel.run = Run(**vars(kernel.run))
    first, other = Memory(16), Memory(32)
    relaunch.relaunch(kernel, GRID, [described(first), 7, first], {0: "X", 2: "Y"})({"X": other, "Y": other}, 5)
    assert seen[0][:9] == (*GRID, 5, 77, ("packed",), None, None, None)
    found = seen[0][9]
    assert isinstance(found, TensorDescriptor) and found.base is other and found.block_shape == [16, 32]
    assert seen[0][10:] == (7, 32)


def test_triton_3_6_has_the_form_that_is_gone_around() -> None:
    if not TRITON36.exists():
        pytest.skip("no .venv-triton36; `make test` makes it")
    words = [
        "from types import SimpleNamespace as N",
        "from triton.backends.nvidia import driver as d",
        "from cascade.backends.triton.relaunch import unwrapped",
        "w = d.wrap_handle_tensordesc(print, {0: 'tensordesc<fp16[16,32]>', 1: 'i32'}, [{'swizzle': 1}])",
        "f = unwrapped(N(launch=w, global_scratch_size=0, profile_scratch_size=0))",
        "assert f is not None and f.launcher is print and f.encode is d.make_tensordesc_arg",
    ]
    subprocess.run(
        [str(TRITON36), "-c", "\n".join(words)], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, check=True
    )
