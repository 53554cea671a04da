"""How kernels write and read once: by boxes or by pointers, and what they leave in the cache."""

from __future__ import annotations

import pytest
import torch

from cascade.backends.triton.lower import PASSING
from cascade.backends.triton.plan import Kernel, Load, Store, every_op
from tests.planned import all_kernels, emitted, final, planner_for

PRODUCT = "cascade c(X[M,K], W[N,K]) -> Y[M,N] { Y[m,n] = silu(sum[k] X[m,k] * W[n,k]) }"
MAP = "cascade c(X[M,N]) -> Y[M,N] { Y[m,n] = silu(X[m,n]) }"
TURNED = "cascade c(X[M,N]) -> Y[M,N] { Y[m,n] = X[m,n] + X[m,(n + N // 2) % N] }"
ROWS = "cascade c(X[M,N]) -> Y[M,N], S[M] { S[m] = sum[n] X[m,n]\n Y[m,n] = X[m,n] / S[m] }"


def kernel_of(text: str, **sizes: int) -> Kernel:
    """The one kernel of a call on tensors of 16 bits."""
    cascade = final(text)
    shapes = {param.name: [sizes[str(size)] for size in param.shape] for param in cascade.params}
    inputs = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    (found,) = all_kernels(planner_for(cascade, inputs))
    return found


def stores(kernel: Kernel) -> list[Store]:
    return [op for op in every_op(kernel.ops) if isinstance(op, Store)]


def test_products_go_by_boxes_and_maps_by_pointers() -> None:
    for text, boxed in ((PRODUCT, True), (MAP, False), (ROWS, False)):
        kernel = kernel_of(text, M=256, N=256, K=128)
        assert [op.box is not None for op in stores(kernel)] == [boxed] * len(stores(kernel))


@pytest.mark.parametrize(
    ("rows", "passing"), [(1024, False), (PASSING // 2 // 8192 - 1, False), (PASSING // 2 // 8192, True)]
)
def test_what_no_cache_holds_is_written_past_it(rows: int, passing: bool) -> None:
    kernel = kernel_of(ROWS, M=rows, N=8192)
    assert {op.tensor: op.passing for op in stores(kernel)} == {"S": False, "Y": passing}
    assert emitted(kernel).count('cache_modifier=".cs"') == passing


def test_large_products_are_written_as_they_are() -> None:
    assert not any(op.passing for op in stores(kernel_of(PRODUCT, M=16384, N=16384, K=128)))


def test_a_tensor_that_is_read_elsewhere_as_well_stays_in_the_cache() -> None:
    for text, policy in ((MAP, {"evict_first"}), (TURNED, {""})):
        kernel = kernel_of(text, M=256, N=128)
        assert {op.evict for op in every_op(kernel.ops) if isinstance(op, Load)} == policy


def test_programs_that_run_together_are_neighbours_in_memory() -> None:
    text = "cascade c(X[T,H,E], C[T,E]) -> Y[T,H,E] { Y[t,h,e] = X[t,h,e] * C[t,e] }"
    kernel = kernel_of(text, T=8192, H=32, E=128)
    assert [axis.rank for axis in kernel.axes] == ["t", "h", "e"]
    assert [axis.rank for axis in kernel.grid] == ["e", "h", "t"]
    assert emitted(kernel).index("e_tile = pid %") < emitted(kernel).index("h_tile = pid %")


def test_programs_of_products_keep_their_order() -> None:
    kernel = kernel_of(PRODUCT, M=4096, N=4096, K=128)
    assert [axis.rank for axis in kernel.grid] == [axis.rank for axis in kernel.axes if axis.rank != "k"]


def test_what_goes_round_in_a_size_is_loaded_wide() -> None:
    kernel = kernel_of(TURNED, M=256, N=128)
    text = emitted(kernel)
    assert "% N" in text and '"N"' not in text.partition("do_not_specialize=[")[2].partition("]")[0]
    known = "c(X[M,N]) -> Y[M,N] { Y[m,n] = X[m,n] + X[m,n] }"
    assert '"N"' in emitted(kernel_of(f"cascade {known}", M=256, N=128))
