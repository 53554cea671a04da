"""Exponents in base two: what a group computes stays what it was, and its text has the exponential that hardware has."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

import cascade
from cascade.backends.triton import planner
from cascade.backends.triton.partition import Group
from cascade.backends.triton.units import LN2, LOG2E, in_base_two
from cascade.interp import Precision, run
from cascade.ir import Apply, Cascade, Einsum, Fold, Result
from cascade.walk import defines, expressions, walk
from tests.kernel_programs import PROGRAMS, Program
from tests.planned import all_kernels, emitted, final, planner_for
from tests.tolerance import Draw

EXPONENTIAL = tuple(
    name
    for name, program in PROGRAMS.items()
    if any(word in program.text for word in ("exp", "softmax", "sigmoid", "silu", "cross_entropy"))
)
CANCELLING = ("entropy", "kl", "with_entropy")  # all exponents are differences that are needed as well
SMALLEST = 1e-30  # of a difference that is compared in relation to its size


def with_base_two(cascade: Cascade, group: Group) -> tuple[Cascade, frozenset[str]]:
    """The cascade with the statements of one group, and its folds, in base two; the tensors whose unit changed."""
    names = set(group.names)
    stored = {result.name for result in cascade.results}
    folds = [item for item in cascade.schedule if isinstance(item, Fold) and not names.isdisjoint(item.state)]
    assert len(folds) <= 1
    kept = [] if group.fold is None else folds  # what stands in part of it alone is no fold
    statements, fold, changed = in_base_two(group.statements, kept[0] if kept else None, stored)
    new = {defines(stmt): stmt for stmt in statements}
    assert set(new) == {defines(stmt) for stmt in group.statements}, "no statement is added or lost"
    body = tuple(new.get(defines(stmt), stmt) for stmt in cascade.body)
    others = (item for item in cascade.schedule if item in kept or item not in folds)
    schedule = tuple(fold if item in kept and fold is not None else item for item in others)
    return dataclasses.replace(cascade, body=body, schedule=schedule), changed


def exponentials(cascade: Cascade, op: str) -> int:
    """How often an operation stands in the statements and folds."""
    parts = [expr for stmt in cascade.body for expr in expressions(stmt)]
    parts += [merge.expr for item in cascade.schedule if isinstance(item, Fold) for merge in item.merge]
    return sum(isinstance(node, Apply) and node.op == op for expr in parts for node in walk(expr))


def with_results(cascade: Cascade, names: list[str], like: planner.Planner) -> Cascade:
    """The cascade with further tensors among its results, absent coordinates 0."""
    known = {result.name for result in cascade.results}
    more = tuple(Result(name, None, like.shapes[name]) for name in names if name not in known)
    return dataclasses.replace(cascade, results=(*cascade.results, *more))


def same(ours: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Equal to 1e-12 in relation to the largest, and not finite in the same places."""
    if not wanted.dtype.is_floating_point:
        assert torch.equal(ours, wanted), what
        return
    known = wanted.isfinite()
    assert torch.equal(known, ours.isfinite()) and torch.equal(
        ours[~known].nan_to_num(), wanted[~known].nan_to_num()
    ), what
    if known.any():
        largest = wanted[known].abs().max() + SMALLEST
        assert float((ours - wanted)[known].abs().max() / largest) <= 1e-12, what


def drawn(program: Program, dtype: torch.dtype = torch.float64, seed: int = 0) -> Draw:
    """A draw of the program with several blocks along the stream."""
    sizes = {name: 50 if name == "N" else size for name, size in program.small.items()}
    return Draw(program, sizes, "padding" if program.padding else "normal", dtype)


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_the_meaning_stays(name: str) -> None:
    program, cascade = PROGRAMS[name], final(PROGRAMS[name].text)
    draw = drawn(program)
    inputs, given = draw.inputs(0), draw.given()
    made = planner_for(cascade, inputs, given)
    for group in (item for item in made.groups() if isinstance(item, Group)):
        after, changed = with_base_two(cascade, group)
        assert not exponentials(after, "exp") or len(made.groups()) > 1
        fixed = exponentials(cascade, "exp") == 0 or not linear(group) or name in CANCELLING
        assert changed or fixed, "a unit changes where one can"
        shown = [name for name in sorted(changed) if isinstance(definition(group, name), Einsum)]
        for block in (None, 16):
            before = run(with_results(cascade, shown, made), inputs, given, Precision.REFERENCE, block)
            found = run(with_results(after, shown, made), inputs, given, Precision.REFERENCE, block)
            for result, value in before.items():
                scale = LN2 if result in changed else 1.0
                same(found[result] * scale if scale != 1.0 else found[result], value, f"{name}: {result}")


def definition(group: Group, name: str) -> object:
    """The statement that defines a tensor."""
    return next(stmt for stmt in group.statements if name in defines(stmt))


def linear(group: Group) -> bool:
    """Whether an exponential of the group reads something that the group defines."""
    parts = [expr for stmt in group.statements for expr in expressions(stmt)]
    inside = [n for e in parts for node in walk(e) if isinstance(node, Apply) and node.op == "exp" for n in walk(node)]
    return any(getattr(node, "tensor", "") in group.names for node in inside)


def test_results_are_natural() -> None:
    for name, program in PROGRAMS.items():
        cascade = final(program.text)
        draw = drawn(program)
        results = {result.name for result in cascade.results}
        for group in planner_for(cascade, draw.inputs(0), draw.given()).groups():
            if isinstance(group, Group):
                changed = with_base_two(cascade, group)[1]
                assert not changed & results, f"{name}: {changed & results}"


def test_twice_is_once() -> None:
    cascade = final(PROGRAMS["causal"].text)
    draw = drawn(PROGRAMS["causal"])
    (group,) = planner_for(cascade, draw.inputs(0)).groups()
    assert isinstance(group, Group)
    statements, fold, _ = in_base_two(group.statements, group.fold)
    assert in_base_two(statements, fold) == (statements, fold, frozenset())


def test_the_constants_are_each_others_inverse() -> None:
    assert abs(LOG2E * LN2 - 1.0) < 1e-15


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_the_text_of_16_bits_has_no_natural_exponential(name: str) -> None:
    draw = drawn(PROGRAMS[name], torch.float16)
    for kernel in all_kernels(planner_for(final(PROGRAMS[name].text), draw.inputs(0), draw.given())):
        text = emitted(kernel)
        assert not re.search(r"\bexponential\(", text), name


def test_32_bits_keep_their_exponential() -> None:
    draw = drawn(PROGRAMS["causal"], torch.float32)
    (kernel,) = all_kernels(planner_for(final(PROGRAMS["causal"].text), draw.inputs(0)))
    text = emitted(kernel)
    assert "= exponential(" in text and "tl.exp(" not in text
    assert text.count("exp2") == 1  # in its helper, of what is left of a range


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 4, 64])
def test_equal_elements_differ_by_nothing(length: int, dtype: torch.dtype) -> None:
    x = torch.randn(37, 1, generator=torch.Generator().manual_seed(length)).to(dtype).expand(-1, length).contiguous()
    entropy = cascade.compile(PROGRAMS["entropy"].text, backend="triton")(X=x)
    assert torch.equal(entropy, torch.full((37,), math.log(length), dtype=dtype))
    assert not cascade.compile(PROGRAMS["kl"].text, backend="triton")(X=x, U=x + 1).any()


def test_a_result_that_is_exponentiated_is_natural() -> None:
    text = "cascade c(X[M,N]) -> R[M], D[M] {\n R[m] = max[n] X[m,n]\n D[m] = sum[n] exp(X[m,n] - R[m])\n}"
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cascade = final(text)
    (group,) = planner_for(cascade, {"X": x}).groups()
    assert isinstance(group, Group)
    after, _ = with_base_two(cascade, group)
    for name, value in run(cascade, {"X": x}, {}, Precision.REFERENCE).items():
        same(run(after, {"X": x}, {}, Precision.REFERENCE)[name], value, name)


def test_what_a_topk_orders_keeps_its_unit() -> None:
    text = (
        "cascade c(X[T,D], R[D,N]) -> W[T,2], I[T,2] {\n"
        " W[t,j], I[t,j] = topk[n, 2] softmax[n] (sum[d] X[t,d] * R[d,n])\n}"
    )
    generator = torch.Generator().manual_seed(0)
    data = {"X": (5, 16), "R": (16, 8)}
    x = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in data.items()}
    cascade = final(text)
    groups = [group for group in planner_for(cascade, x).groups() if isinstance(group, Group)]
    (group,) = (group for group in groups if "I" in group.names)
    after, _ = with_base_two(cascade, group)
    for name, value in run(cascade, x, {}, Precision.REFERENCE).items():
        same(run(after, x, {}, Precision.REFERENCE)[name], value, name)
