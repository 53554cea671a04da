"""Trial runs: small sizes and seeded inputs that fit a cascade, and the rules by which two results agree.

Inputs are chosen so that a run says something: integers that index a rank lie within it, integers that are compared
with a rank (lengths, positions) spread over it, everything else is normal. `agree` is the tolerance rule of the
project: results are judged against float64 on the same inputs, and may be no worse than the plain eager run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.arguments import shape_symbols
from cascade.errors import CallError
from cascade.inference import Shapes, infer_shapes
from cascade.interp import Precision, run
from cascade.ir import Apply, Cascade, Const, DType, Einsum, Expr, Extent, Rank, Read, Size, TopK
from cascade.passes.inline import Inline
from cascade.values import FROM_TORCH, TORCH_TYPES
from cascade.walk import children, expressions, reads, walk

SMALL = (3, 4, 5, 2)  # extents of symbols that nobody gave, in turn
MAX_POINTS = 1 << 22  # points of an iteration space above which a trial is not tiny
FEW = 3  # the largest value of an integer that neither indexes nor is compared with a rank
INTEGERS = (DType.I8, DType.I32, DType.I64)
ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "neg", "min", "max", "clamp", "default")
COMPARISONS = ("lt", "le", "gt", "ge")


# --- sizes and types -------------------------------------------------------------------------------------------------


def small_sizes(cascade: Cascade, given: Mapping[str, int]) -> dict[str, int]:
    """A size for every symbol: the given one, else a small one that leaves room for every `topk`."""
    sizes = {name: given.get(name, SMALL[i % len(SMALL)]) for i, name in enumerate(shape_symbols(cascade))}
    ranks = infer_shapes(cascade).ranks
    for stmt in cascade.body:
        if isinstance(stmt, TopK) and isinstance(size := ranks[stmt.rank], str) and size not in given:
            sizes[size] = max(sizes[size], extent(stmt.k, sizes))
    return sizes


def extent(size: Size, sizes: Mapping[str, int]) -> int:
    """A size as a number."""
    return size if isinstance(size, int) else sizes[size]


def param_types(cascade: Cascade, default: DType) -> dict[str, DType]:
    """The type of every parameter: the declared one; integer for an untyped one that is used as such; `default`."""
    integral: set[str] = set()
    flat = Inline()(cascade)
    for stmt in flat.body:
        for node in (node for expr in expressions(stmt) for node in walk(expr)):
            if isinstance(node, Read):
                integral.update(name for index in node.index for name in params_below(flat, index))
        where = None if not isinstance(stmt, Einsum | TopK) else stmt.where
        if where is not None and not any(isinstance(n, Const) and isinstance(n.value, float) for n in walk(where)):
            integral.update(params_below(flat, where))
    return {p.name: p.dtype or (DType.I64 if p.name in integral else default) for p in cascade.params}


def params_below(cascade: Cascade, expr: Expr) -> tuple[str, ...]:
    """The parameters that the expression reads, through the integer arithmetic that defines what it reads."""
    params = {param.name for param in cascade.params}
    seen: dict[str, None] = {}
    todo = [node.tensor for node in walk(expr) if isinstance(node, Read)]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen[name] = None
            stmt = definition(cascade, name)
            if stmt is not None and all(is_integer_arithmetic(node) for node in walk(stmt.expr)):
                todo.extend(reads(stmt))
    return tuple(name for name in seen if name in params)


def definition(cascade: Cascade, name: str) -> Einsum | None:
    """The Einsum that defines the tensor, if one does."""
    return next((s for s in cascade.body if isinstance(s, Einsum) and s.target.name == name), None)


def is_integer_arithmetic(expr: Expr) -> bool:
    """Whether the node keeps integers what they are; an `argmax` gives integers of anything."""
    return isinstance(expr, Const | Rank | Extent | Read) or (isinstance(expr, Apply) and expr.op in ARITHMETIC)


# --- inputs ----------------------------------------------------------------------------------------------------------


def random_inputs(
    cascade: Cascade, sizes: Mapping[str, int], types: Mapping[str, DType], seed: int = 0
) -> dict[str, Tensor]:
    """A tensor for every parameter, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    highest = highest_values(Inline()(cascade), sizes)
    inputs = {}
    for param in cascade.params:
        shape = tuple(extent(size, sizes) for size in param.shape)
        dtype = types[param.name]
        if dtype is DType.BOOL:
            data = torch.rand(shape, generator=generator) < 0.7
        elif dtype in INTEGERS:
            high = min(highest.get(param.name, FEW), torch.iinfo(TORCH_TYPES[dtype]).max)
            data = torch.randint(0, high + 1, shape, generator=generator)
        else:
            data = torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs[param.name] = data.to(TORCH_TYPES[dtype])
    return inputs


def highest_values(cascade: Cascade, sizes: Mapping[str, int]) -> dict[str, int]:
    """The largest value of every integer parameter that indexes a rank or is compared with one."""
    bounds = _Bounds(cascade, infer_shapes(cascade), sizes)
    indexing: dict[str, int] = {}
    compared: dict[str, int] = {}
    for expr in (expr for stmt in cascade.body for expr in expressions(stmt)):
        for node in walk(expr):
            if isinstance(node, Read):
                shape = bounds.shapes.tensors[node.tensor]
                for index, size in zip(node.index, shape, strict=True):
                    for name, high in bounds.indexing(index, extent(size, sizes)).items():
                        indexing[name] = min(high, indexing.get(name, high))
            elif isinstance(node, Apply) and node.op in COMPARISONS:
                for name, high in bounds.compared(node).items():
                    compared[name] = max(high, compared.get(name, high))
    return compared | indexing


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Interval arithmetic over integer expressions, given the largest value that a parameter may have."""

    cascade: Cascade
    shapes: Shapes
    sizes: Mapping[str, int]

    def indexing(self, index: Expr, size: int) -> dict[str, int]:
        """The largest value of each parameter in an index expression that keeps it below `size`."""
        names = params_below(self.cascade, index)
        if not names:
            return {}
        fits = (high for high in range(max(size - 1, 0), 0, -1) if self.largest(index, high) < size)
        return dict.fromkeys(names, next(fits, 0))

    def compared(self, node: Apply) -> dict[str, int]:
        """The extent of the ranks that a comparison sets each parameter against."""
        ranks = [n.name for n in walk(node) if isinstance(n, Rank)]
        if not ranks:
            return {}
        return dict.fromkeys(
            params_below(self.cascade, node), max(extent(self.shapes.ranks[r], self.sizes) for r in ranks)
        )

    def largest(self, expr: Expr, high: int) -> int:
        """An upper bound of the expression where every parameter is at most `high`."""
        return self.interval(expr, high)[1]

    def interval(self, expr: Expr, high: int) -> tuple[int, int]:
        """Bounds of an expression; of what is not integer arithmetic, those of a parameter."""
        match expr:
            case Const(value=int(value)):
                return value, value
            case Rank():
                return 0, max(0, extent(self.shapes.ranks[expr.name], self.sizes) - 1)
            case Extent():
                return self.sizes[expr.name], self.sizes[expr.name]
            case Read() if (stmt := definition(self.cascade, expr.tensor)) is not None and not stmt.inits:
                return self.interval(stmt.expr, high)
            case Apply(op="add" | "sub" | "mul" | "floordiv" | "mod" | "neg"):
                return combined(expr.op, [self.interval(child, high) for child in children(expr)])
            case _:
                return 0, high


def combined(op: str, args: list[tuple[int, int]]) -> tuple[int, int]:
    """Bounds of an integer operation from those of its operands."""
    low, high = args[0]
    if op == "neg":
        return -high, -low
    other_low, other_high = args[1]
    match op:
        case "add":
            return low + other_low, high + other_high
        case "sub":
            return low - other_high, high - other_low
        case "mod":
            return 0, max(0, other_high - 1)
        case "mul":
            corners = [a * b for a in (low, high) for b in (other_low, other_high)]
        case _:
            corners = [a // b for a in (low, high) for b in (other_low, other_high) if b]
    return min(corners, default=0), max(corners, default=0)


# --- agreement -------------------------------------------------------------------------------------------------------


def measure(
    cascade: Cascade, compiled: Callable[..., Any], sizes: Mapping[str, int], types: Mapping[str, DType], seed: int
) -> dict[str, Verdict]:
    """Every result that `compiled` gives on random inputs, judged by what the cascade means."""
    inputs = random_inputs(cascade, sizes, types, seed)
    found = compiled(**inputs, **sizes)
    results = found if isinstance(found, tuple) else (found,)
    gold = run(cascade, inputs, sizes, Precision.REFERENCE)
    eager = run(cascade, inputs, sizes, Precision.EAGER)
    return {name: agree(ours, gold[name], eager[name]) for name, ours in zip(gold, results, strict=True)}


def difference(before: Cascade, after: Cascade, seed: int = 0) -> str:
    """How the results of two cascades differ in float64 on the same tiny inputs; "" where they do not.

    Cascades whose declared extents are not tiny are not run, nor are inputs that the first one refuses.
    """
    sizes = small_sizes(before, {})
    if max(points(before, sizes), points(after, sizes)) > MAX_POINTS:
        return ""
    inputs = random_inputs(before, sizes, param_types(before, DType.F64), seed)
    try:
        wanted = run(before, inputs, sizes, Precision.REFERENCE)
    except CallError:
        return ""
    found = run(after, inputs, sizes, Precision.REFERENCE)
    if list(found) != list(wanted):
        return f"the results are {', '.join(found)}, were {', '.join(wanted)}"
    return next((f"{name!r}: {how}" for name in wanted if (how := unlike(found[name], wanted[name]))), "")


def points(cascade: Cascade, sizes: Mapping[str, int]) -> int:
    """The size of the largest iteration space of the cascade."""
    flat = Inline()(cascade)
    ranks = infer_shapes(flat).ranks
    used = ({n.name for e in expressions(stmt) for n in walk(e) if isinstance(n, Rank)} for stmt in flat.body)
    return max((math.prod(extent(ranks[rank], sizes) for rank in names) for names in used), default=1)


def unlike(found: Tensor, wanted: Tensor) -> str:
    """How two float64 results differ by more than a change of order explains; "" where they do not."""
    if found.shape != wanted.shape:
        return f"the shape is {tuple(found.shape)}, was {tuple(wanted.shape)}"
    a, b = found.double(), wanted.double()
    if strangers(a, b):
        return "values that are not finite stand elsewhere"
    a, b = a[b.isfinite()], b[b.isfinite()]
    error, scale = max_abs(a - b), max_abs(b)
    return f"the largest difference is {error:.3g} at a magnitude of {scale:.3g}" if error > 1e-9 * (1 + scale) else ""


def strangers(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 tensors have NaN, inf or -inf at different places."""
    strange = ~b.isfinite()
    return not torch.equal(~a.isfinite(), strange) or not torch.equal(
        a[strange].nan_to_num(0.0), b[strange].nan_to_num(0.0)
    )


def max_abs(data: Tensor) -> float:
    """The largest magnitude, 0 for no elements."""
    return float(data.abs().max()) if data.numel() else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a result is within tolerance: its type and shape, its largest error, the allowed one, what failed."""

    ok: bool
    dtype: str
    shape: tuple[int, ...]
    max_error: float
    allowed: float
    reason: str = ""


def agree(ours: Tensor, gold: Tensor, eager: Tensor) -> Verdict:
    """The tolerance rule: `gold` is float64 on the same inputs, `eager` the unfused run with each result rounded.

    Positions and signs of non-finite values agree; integers and truth values are equal; the largest error is at most
    twice that of eager plus two roundings; so is the root mean square per row against eager's row or its median row,
    and over all 1.1 times (3 times from f32 on) plus one rounding.
    """
    error, allowed, reason = judge(ours, gold, eager)
    return Verdict(not reason, FROM_TORCH[ours.dtype].value, tuple(ours.shape), error, allowed, reason)


def judge(ours: Tensor, gold: Tensor, eager: Tensor) -> tuple[float, float, str]:
    """The largest error, the largest that is allowed, and which part of the rule is broken ("" for none)."""
    if ours.shape != gold.shape:
        return math.inf, 0.0, f"the shape is not {tuple(gold.shape)}"
    if not ours.is_floating_point():
        return max_abs(ours.double() - gold.double()), 0.0, "integers differ" if bool((ours != gold).any()) else ""
    unit = torch.finfo(ours.dtype).eps / 2
    ours, gold, eager = ours.double(), gold.double(), eager.double()
    if strangers(ours, gold):
        return math.inf, 0.0, "values that are not finite stand elsewhere"
    known = gold.isfinite() & eager.isfinite()
    error, plain, size = (torch.where(known, data, 0.0) for data in (ours - gold, eager - gold, gold))
    largest, allowed = max_abs(error), 2 * max_abs(plain) + 2 * unit * max_abs(size)
    if largest > allowed:
        return largest, allowed, "the largest error"
    if rms(error) > (1.1 if unit > 2**-20 else 3.0) * rms(plain) + unit * rms(size):
        return largest, allowed, "the root mean square error"
    rows, plain_rows, size_rows = row_rms(error), row_rms(plain), row_rms(size)
    typical = plain_rows.clamp_min(plain_rows.median()) if plain_rows.numel() else plain_rows
    return largest, allowed, "a row's error" if bool((rows > 2 * typical + 2 * unit * size_rows).any()) else ""


def rms(data: Tensor) -> float:
    """The root mean square, 0 for no elements."""
    return float(data.square().mean().sqrt()) if data.numel() else 0.0


def row_rms(data: Tensor) -> Tensor:
    """The root mean square along the last rank, none for no elements."""
    rows = data.reshape(-1, data.shape[-1]) if data.dim() and data.numel() else data.reshape(-1, 1)
    return rows.square().mean(-1).sqrt()
