"""Rows that lie in the order of an index: which tensors, what a copy in that order means, and what kernels then give.

The witnesses: the interpreter on the cascade before and after, and a loop over the values of the index in float64.
"""

from __future__ import annotations

import pytest
import torch

import cascade
from cascade import interp
from cascade.backends.triton import ordered
from cascade.backends.triton.launch import KernelStep
from cascade.backends.triton.ordered import in_order, with_ordered_operands
from cascade.backends.triton.plan import Load, Store, every_op
from cascade.frontend.build import parse_cascade
from cascade.inference import infer_shapes
from cascade.ir import Cascade, DType, Einsum, GroupBy
from cascade.pipeline import run_pipeline
from cascade.text import render_stmt
from cascade.values import Precision
from tests.test_rows import GATED, ROUTINGS, SIZES, loop_over_values, tensors

LARGE = {"T": 8192, "D": 4096, "F": 14336, "N": 8, "J": 2}
TWICE = """
cascade c(X[T,D], I: i64[T], A[N,D,F], B[N,F,E], U[T,E]) -> Y[T,E]{more} {{
    H[t,f] = relu(sum[d] X[t,d] * A[I[t],d,f])
    Z[t,e] = sum[f] H[t,f] * B[{index},f,e]
    Y[t,e] = Z[t,e] + U[t,e]{then}
}}
"""


def final(text: str) -> Cascade:
    return run_pipeline(parse_cascade(text)).final


def types(cascade_: Cascade, dtype: DType) -> dict[str, DType]:
    return {param.name: param.dtype or dtype for param in cascade_.params}


def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets small extents be worth a copy."""
    for name, value in {"LAUNCH": 0, "OPERATIONS": 0}.items():
        monkeypatch.setattr(ordered, name, value)


def test_an_operand_is_copied_once_for_all_products_that_gather_it() -> None:
    before = final(GATED)
    after = with_ordered_operands(before, LARGE, types(before, DType.BF16))
    (made,) = [stmt for stmt in after.body if stmt not in before.body and stmt.target.name == "X_rows"]  # type: ignore[union-attr]
    assert render_stmt(made) == "X_rows[t,j,d] = X[t,d]"
    products = [render_stmt(stmt) for stmt in after.body if "X_rows" in render_stmt(stmt).split("=")[1]]
    assert len(products) == 2 and all("X_rows[t,j,d] *" in text and "X[t,d]" not in text for text in products)
    assert any(isinstance(item, GroupBy) and item.statements == ("X_rows",) for item in after.schedule)
    given = {n: t.double() if t.is_floating_point() else t for n, t in tensors("odd", "skewed").items()}
    found = interp.run(after, given, {}, Precision.REFERENCE)["Y"]
    assert torch.equal(found, interp.run(before, given, {}, Precision.REFERENCE)["Y"])


@pytest.mark.parametrize(
    ("extents", "dtype"),
    [
        (LARGE, DType.F32),  # products in full precision take no boxes
        (LARGE | {"T": 64}, DType.BF16),  # they wait for the weights
        (LARGE | {"N": 4096}, DType.BF16),
        (LARGE | {"F": 32}, DType.BF16),  # a copy takes longer
    ],
)
def test_no_copy_where_it_does_not_pay(extents: dict[str, int], dtype: DType) -> None:
    before = final(GATED)
    assert with_ordered_operands(before, extents, types(before, dtype)) == before


def test_what_groups_alone_read_lies_in_their_order() -> None:
    cascade_ = final(GATED)
    found = in_order(cascade_, types(cascade_, DType.BF16))
    (maker,) = [s for s in cascade_.body if isinstance(s, Einsum) and s.target.name in found]
    assert "silu" in render_stmt(maker) or "sigmoid" in render_stmt(maker)
    assert not in_order(cascade_, types(cascade_, DType.F32))


@pytest.mark.parametrize(
    ("index", "more", "then", "lies"),
    [
        ("I[t]", "", "", True),
        ("I[t]", ", H[T,F]", "", False),  # it is a result
        ("I[T - 1 - t]", "", "", False),  # rows in another order
        ("I[t]", ", Q[T]", "; Q[t] = sum[f] H[t,f]", False),  # something else reads it
    ],
)
def test_a_tensor_that_others_read_lies_as_it_is_declared(index: str, more: str, then: str, lies: bool) -> None:
    cascade_ = final(TWICE.format(index=index, more=more, then=then))
    assert ("H" in in_order(cascade_, types(cascade_, DType.BF16))) is lies


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_kernels_with_copies_against_a_loop(size: str, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worth(monkeypatch)
    call = cascade.compile(GATED, backend="triton")
    given = tensors(size, routing, torch.float16)
    wanted = loop_over_values(given)
    error = (call(**given).double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    assert error < 1e-2 and "X_rows[row,d] = X[t_row[row],d]" in call.explain()


def test_a_length_that_changes_moves_what_lies_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    worth(monkeypatch)
    call = cascade.compile(GATED, backend="triton")
    whole = tensors("odd", "skewed", torch.float16)
    for rows in (37, 5, 19, 1, 36):
        given = {n: t[:rows].contiguous() if n in "XIG" else t for n, t in whole.items()}
        wanted = loop_over_values(given)
        assert (call(**given).double() - wanted).abs().max() < 1e-2 * wanted.abs().max().clamp(min=1e-6)


def test_products_read_boxes_of_rows_and_store_them() -> None:
    """What is in order is read and written without the coordinates of any row."""
    call = cascade.compile(GATED, backend="triton")
    given = tensors("odd", "even", torch.float16) | {
        "W": torch.zeros(7, 128, 32, dtype=torch.float16), "U": torch.zeros(7, 128, 32, dtype=torch.float16),
        "V": torch.zeros(7, 32, 128, dtype=torch.float16), "X": torch.zeros(37, 128, dtype=torch.float16),
    }  # fmt: skip
    call(**given)
    (launcher,) = call._launchers.values()
    (plan,) = launcher.plans.values()
    kernels = [step.kernel for step in plan.steps if isinstance(step, KernelStep)]
    name = next(iter(in_order(launcher.cascade, types(launcher.cascade, DType.F16))))
    loads = [op for k in kernels for op in every_op(k.ops) if isinstance(op, Load) and op.tensor == name]
    stores = [op for k in kernels for op in every_op(k.ops) if isinstance(op, Store) and op.tensor == name]
    assert len(loads) == len(stores) == 1 and loads[0].box and stores[0].box
    assert infer_shapes(launcher.cascade).tensors[name] == ("T", "J", "F")
