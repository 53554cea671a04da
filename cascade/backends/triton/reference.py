"""What a cascade means, as plain torch: the lines of a function in float64, one equation after the other.

    S[b,m,n] = sum[e] Q[b,m,e] * K[b,n,e]   where n <= m

    S_live = (n <= m[:, None])[None]
    S = torch.einsum("bme,bne->bmn", Q, K)
    S = torch.where(S_live, S, 0)

A tensor with absent coordinates has a mask beside it, `S_live`, of extent 1 where it does not vary, and holds 0 where
nothing is present. Statements are those of the canonical cascade, before anything is lifted or fused: what checks a
kernel shares no step with what made it, but the frontend. Pure text: torch is not imported here.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cascade.backends.triton.recurrence import carried, refusal
from cascade.backends.triton.spell import AND, ATOM, COMPARE, OR, PRODUCT, SUM, UNARY
from cascade.errors import Diagnostic, UnsupportedError
from cascade.inference import FLOATS, infer_dtypes, infer_shapes
from cascade.ir import (
    Apply, Cascade, Cast, Const, DType, Einsum, Expr, Extent, Rank, Read, Reduce, Result, Size, Stmt, Target, TopK,
)  # fmt: skip
from cascade.ops import OPS, Kind
from cascade.text import render_stmt
from cascade.walk import children, free_ranks, walk

TORCH = {
    DType.BF16: "torch.bfloat16", DType.F16: "torch.float16", DType.F32: "torch.float32", DType.F64: "torch.float64",
    DType.F8E4M3: "torch.float8_e4m3fn", DType.F8E5M2: "torch.float8_e5m2", DType.I8: "torch.int8",
    DType.I32: "torch.int32", DType.I64: "torch.int64", DType.BOOL: "torch.bool",
}  # fmt: skip
"""Element types as torch calls them."""

INFIX: dict[str, tuple[str, int]] = {
    "or": ("{0} | {1}", OR), "and": ("{0} & {1}", AND), "not": ("~{0}", UNARY), "neg": ("-{0}", UNARY),
    "eq": ("{0} == {1}", COMPARE), "ne": ("{0} != {1}", COMPARE), "lt": ("{0} < {1}", COMPARE),
    "le": ("{0} <= {1}", COMPARE), "gt": ("{0} > {1}", COMPARE), "ge": ("{0} >= {1}", COMPARE),
    "add": ("{0} + {1}", SUM), "sub": ("{0} - {1}", SUM), "mul": ("{0} * {1}", PRODUCT),
    "div": ("{0} / {1}", PRODUCT), "floordiv": ("{0} // {1}", PRODUCT), "mod": ("{0} % {1}", PRODUCT),
}  # fmt: skip
"""Operators, of tensors and of numbers."""

CALLS: dict[str, str] = {
    **{op: f"torch.{op}({{0}})" for op in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "sign", "floor",
                                           "round", "sin", "cos", "tanh", "sigmoid", "relu", "erf")},
    **{op: f"torch.nn.functional.{op}({{0}})" for op in ("silu", "gelu")},
    "pow": "torch.pow({0}, {1})", "min": "torch.minimum({0}, {1})", "max": "torch.maximum({0}, {1})",
    "select": "torch.where({0}, {1}, {2})", "clamp": "torch.minimum(torch.maximum({0}, {1}), {2})",
}  # fmt: skip
"""Functions of tensors."""

NUMBERS: dict[str, str] = {
    **{op: f"math.{op}({{0}})" for op in ("exp", "log", "log2", "sqrt", "sin", "cos", "tanh", "erf", "floor")},
    "exp2": "math.pow(2.0, {0})", "rsqrt": "(1 / math.sqrt({0}))", "abs": "abs({0})", "round": "round({0})",
    "relu": "max({0}, 0)", "pow": "pow({0}, {1})", "min": "min({0}, {1})", "max": "max({0}, {1})",
    "select": "({1} if {0} else {2})", "clamp": "min(max({0}, {1}), {2})",
    "and": "({0} and {1})", "or": "({0} or {1})", "not": "(not {0})",
}  # fmt: skip
"""Functions of Python's numbers; what has no row is computed by torch."""

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def python_names(words: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """A Python name for every word, the word itself where that is none of those taken and no keyword."""
    used = set(taken) | set(keyword.kwlist)
    found: dict[str, str] = {}
    for word in dict.fromkeys(words):
        name = word
        while name in used:
            name += "_"
        found[word] = name
        used.add(name)
    return found


@dataclass(frozen=True, slots=True)
class Lines:
    """The body of a function: its lines, the sizes that it uses, and the text of every result."""

    lines: tuple[str, ...]
    sizes: frozenset[str]
    results: tuple[str, ...]


def reference_lines(
    cascade: Cascade, types: Mapping[str, DType], extents: Mapping[str, int], names: Mapping[str, str]
) -> Lines:
    """The statements of a canonical cascade as lines of torch, where its parameters are tensors of float64.

    `types` are those of the parameters; `extents` numbers for the shape symbols, by which it is decided whether an
    index can lie outside; `names` the Python names of tensors, ranks and symbols. Raises `UnsupportedError` for a
    call, a recurrence that no kernel holds, and a statement with more ranks than torch has letters for.
    """
    shapes = infer_shapes(cascade)
    speller = _Speller(names, shapes.ranks, shapes.tensors, infer_dtypes(cascade, types), extents)
    device = f"{names[cascade.params[0].name]}.device" if cascade.params else '"cpu"'
    speller.device = device
    for stmt in cascade.body:
        speller.lines += ["", f"# {render_stmt(stmt)}"]
        speller.statement(stmt)
    results = tuple(speller.result(result) for result in cascade.results)
    ranges = [
        f"{names[rank]} = torch.arange({speller.size(shapes.ranks[rank])}, device={device})" for rank in speller.ranges
    ]
    return Lines((*ranges, *speller.lines), frozenset(speller.sizes), results)


def interval(expr: Expr, ranks: Mapping[str, int], extents: Mapping[str, int]) -> tuple[int, int] | None:
    """The least and the largest value of integer arithmetic on coordinates and sizes; None for anything else."""
    match expr:
        case Const(value=int(value)):
            return value, value
        case Rank():
            return 0, max(ranks[expr.name] - 1, 0)
        case Extent():
            return extents[expr.name], extents[expr.name]
        case Apply(op="add" | "sub" | "mul" | "floordiv" | "mod" | "neg"):
            parts = [interval(child, ranks, extents) for child in children(expr)]
            known = [part for part in parts if part is not None]
            return _combined(expr.op, known) if len(known) == len(parts) else None
        case _:
            return None


def _combined(op: str, parts: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    low, high = parts[0]
    if op == "neg":
        return -high, -low
    first, last = parts[1]
    if op in ("floordiv", "mod") and first <= 0:
        return None
    if op == "mod":
        return 0, last - 1
    pairs = [(a, b) for a in (low, high) for b in (first, last)]
    found = {
        "add": [a + b for a, b in pairs],
        "sub": [a - b for a, b in pairs],
        "mul": [a * b for a, b in pairs],
        "floordiv": [a // b if b else 0 for a, b in pairs],
    }[op]
    return min(found), max(found)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The text of an expression, its dimensions, how strongly it binds, and the mask of what is present."""

    text: str
    axes: tuple[str, ...] = ()
    level: int = ATOM
    real: bool = False  # a float, not an integer or truth value
    scalar: bool = False  # a number of Python, not a tensor
    live: _Piece | None = None
    zeroed: bool = False  # 0 where it is absent

    @property
    def atom(self) -> str:
        return self.text if self.level == ATOM else f"({self.text})"


@dataclass(slots=True, eq=False)
class _Speller:
    names: Mapping[str, str]
    ranks: Mapping[str, Size]
    shapes: Mapping[str, tuple[Size, ...]]
    dtypes: Mapping[str, DType]
    extents: Mapping[str, int]
    device: str = '"cpu"'
    lines: list[str] = field(default_factory=list)
    ranges: dict[str, None] = field(default_factory=dict)  # the ranks whose coordinates are used
    sizes: set[str] = field(default_factory=set)
    masks: dict[str, str] = field(default_factory=dict)  # the name of the mask, for tensors that have one
    held: dict[Expr, _Piece] = field(default_factory=dict)  # of the step of a recurrence at hand

    # --- statements --------------------------------------------------------------------------------------------------

    def statement(self, stmt: Stmt) -> None:
        """The lines of one statement."""
        match stmt:
            case TopK():
                self.top_k(stmt)
            case Einsum(inits=()):
                self.einsum(stmt)
            case Einsum() if refusal(stmt) is None:
                self.recurrence(stmt)
            case _:
                message = "a call, or a recurrence that no kernel holds, is not written as plain torch"
                raise UnsupportedError(Diagnostic("C531", message, stmt.span, "run it with the interpreter"))

    def einsum(self, stmt: Einsum) -> None:
        """A map or a reduction, and where its result is present."""
        where = stmt.where
        at_target = where is not None and set(free_ranks(where)) <= set(stmt.target.ranks)
        outside = self.mask(where) if where is not None and at_target else None
        where = None if at_target else where
        piece = self.reduced(stmt.expr, where) if isinstance(stmt.expr, Reduce) else self.piece(stmt.expr)
        self.define(stmt.target, replace(piece, live=self.both(piece.live, outside), zeroed=False))

    def recurrence(self, stmt: Einsum) -> None:
        """One coordinate after the other, from the initial value; what is absent ends it."""
        init, name, own = stmt.inits[0], self.names[stmt.target.name], carried(stmt)
        rows = tuple(rank for rank in stmt.target.ranks if rank != init.rank)
        ends = [f"{name}_before", f"{name}_all", f"{self.names[init.rank]}_at"]
        parts = list(dict.fromkeys(_without(stmt.expr, own)))
        words = python_names([*ends, *(f"{name}_{k}" for k in range(len(parts)))], (*self.names.values(), *self.masks))
        before, every, at = (words[word] for word in ends)
        first = self.piece(init.expr)
        self.lines.append(f"{before} = {self.covering(replace(first, live=None), rows).text}")
        live = self.both(first.live, None if stmt.where is None else self.mask(stmt.where))
        real = self.dtypes[stmt.target.name] in FLOATS
        held: dict[Expr, _Piece] = {own: _Piece(before, rows, ATOM, real)}
        for k, part in enumerate(parts):
            piece = self.piece(part)
            live = self.both(live, piece.live)
            held[part] = replace(piece, live=None)
            if init.rank in piece.axes:
                here = tuple(rank for rank in piece.axes if rank != init.rank)
                self.lines.append(f"{words[f'{name}_{k}']} = {self.aligned(piece, (*here, init.rank)).text}")
                held[part] = _Piece(f"{words[f'{name}_{k}']}[..., {at}]", here, ATOM, piece.real)
        self.held = held
        step = self.covering(self.as_real(self.piece(stmt.expr), real), rows)
        self.held = {}
        self.lines.append(f"{every} = []")
        self.lines.append(f"for {at} in range({self.size(self.ranks[init.rank])}):")
        self.lines += [f"    {before} = {step.text}", f"    {every}.append({before})"]
        along = (*rows, init.rank)
        if live is not None and init.rank in live.axes:
            live = _Piece(f"{_atom(self.full(live, along))}.cumprod(-1) > 0", along, COMPARE)
        self.define(stmt.target, _Piece(f"torch.stack({every}, -1)", along, ATOM, real, live=live))

    def define(self, target: Target, piece: _Piece) -> None:
        """The lines that give a name to a value, 0 where it is absent."""
        name = self.names[target.name]
        if piece.live is not None:
            mask = self.mask_name(target.name)
            self.lines.append(f"{mask} = {self.full(piece.live, target.ranks)}")
        extents = ", ".join(self.size(self.ranks[rank]) for rank in target.ranks)
        if piece.scalar:
            kind = "torch.float64" if piece.real else TORCH[self.dtypes[target.name]]
            text = f"torch.full([{extents}], {piece.text}, dtype={kind}, device={self.device})"
        elif set(piece.axes) == set(target.ranks):
            text = self.aligned(piece, target.ranks).text
        else:
            text = f"{self.aligned(piece, target.ranks).atom}.expand({extents})"
        self.lines.append(f"{name} = {text}")
        if piece.live is not None:
            truth = self.dtypes[target.name] is DType.BOOL
            kept = f"{name} & {mask}" if truth else f"torch.where({mask}, {name}, 0)"
            self.lines.append(f"{name} = {kept}")

    def mask_name(self, tensor: str) -> str:
        """The name of the mask of a tensor, which gets one."""
        taken = {*self.names.values(), *self.masks.values()}
        self.masks[tensor] = python_names([f"{self.names[tensor]}_live"], taken)[f"{self.names[tensor]}_live"]
        return self.masks[tensor]

    def result(self, result: Result) -> str:
        """The text of a result, with its fill where it is absent."""
        name = self.names[result.name]
        if result.name not in self.masks or not (result.fill.value or result.fill.value != result.fill.value):
            return name
        return f"torch.where({self.masks[result.name]}, {name}, {self.number(result.fill).text})"

    def top_k(self, stmt: TopK) -> None:
        """The largest present values, ties to the lower coordinate: a stable sort, cut off."""
        kept = next(rank for rank in stmt.values.ranks if rank not in free_ranks(stmt.body))
        order = (*(rank for rank in stmt.values.ranks if rank != kept), stmt.rank)
        piece = self.piece(stmt.body)
        live = self.both(piece.live, None if stmt.where is None else self.mask(stmt.where))
        body = self.covering(replace(piece, live=None), order)
        count, short = self.size(stmt.k), self.number_of(stmt.k) > self.number_of(self.ranks[stmt.rank])
        if live is not None or short:
            there = _Piece("True", scalar=True) if live is None else live
            extents = ", ".join(self.size(self.ranks[rank]) for rank in order)
            self.lines.append(f"there = {self.full(there, order)}.expand({extents})")
            self.lines.append(f"body = torch.where(there, {body.text}, -math.inf)")
            body = _Piece("body", order, ATOM, True)
        if short:
            self.lines.append(f"there = torch.nn.functional.pad(there, (0, {count}))")
            body = _Piece(f"torch.nn.functional.pad({body.text}, (0, {count}), value=-math.inf)", order, ATOM, True)
        self.lines.append(f"ordered = torch.sort({body.text}, dim=-1, descending=True, stable=True)")
        after = (*order[:-1], kept)
        if live is None and not short:
            self.define(stmt.values, _Piece(f"ordered.values[..., :{count}]", after, ATOM, True))
            self.define(stmt.coords, _Piece(f"ordered.indices[..., :{count}]", after))
            return
        self.lines.append("there = torch.gather(there, -1, ordered.indices)  # a value may be what stands for none")
        self.lines.append("first = torch.sort(there.byte(), dim=-1, descending=True, stable=True).indices")
        for name, part in (("values", "ordered.values"), ("coords", "ordered.indices"), ("there", "there")):
            self.lines.append(f"{name} = torch.gather({part}, -1, first)[..., :{count}]")
        found = _Piece("there", after)
        self.define(stmt.values, _Piece("values", after, ATOM, True, live=found))
        self.define(stmt.coords, _Piece("coords", after, live=found))

    # --- reductions --------------------------------------------------------------------------------------------------

    def reduced(self, expr: Reduce, where: Expr | None) -> _Piece:
        """A fold over the present coordinates; present where there is one."""
        mask = None if where is None else self.mask(where)
        if expr.reducer == "sum" and (found := self.contracted(expr, mask)) is not None:
            return found
        piece = self.piece(expr.body)
        live = self.both(piece.live, mask)
        order = tuple(dict.fromkeys((*piece.axes, *(live.axes if live else ()), *expr.ranks)))
        order = (*(rank for rank in order if rank not in expr.ranks), *expr.ranks)
        kept = order[: len(order) - len(expr.ranks)]
        dims = ", ".join(str(position - len(order)) for position in range(len(kept), len(order)))
        dims = dims if len(expr.ranks) == 1 else f"({dims})"
        some = None
        if live is not None:
            text = self.full(live, order)
            some = _Piece(f"{_atom(text)}.any({dims})", kept)
        if expr.reducer == "count":
            extents = ", ".join(self.size(self.ranks[rank]) for rank in order)
            every = self.full(live or _Piece("True", scalar=True), order)
            return _Piece(f"{_atom(every)}.expand({extents}).sum({dims})", kept, live=some)
        real = OPS["max"].kind is Kind.SAME and piece.real
        body = self.covering(replace(piece, live=None), order)
        fill = {"sum": "0", "prod": "1", "any": "False", "all": "True"}.get(expr.reducer)
        if fill is None:
            least = expr.reducer in ("max", "argmax")
            fill = ("-" if least else "") + "math.inf" if piece.real else str(-(2**31) if least else 2**31 - 1)
        if live is not None and not (expr.reducer == "sum" and piece.zeroed and mask is None):
            body = _Piece(f"torch.where({text}, {body.text}, {fill})", order)
        if expr.reducer in ("argmax", "argmin"):
            if live is None:
                return _Piece(f"{body.atom}.{expr.reducer}(-1)", kept)
            best = f"{body.atom}.a{expr.reducer.removeprefix('arg')}(-1, keepdim=True)"
            chosen = f"({body.atom} == {best}) | ({body.atom} != {body.atom})"
            return _Piece(f"({_atom(text)} & ({chosen})).byte().argmax(-1)", kept, live=some)
        if expr.reducer == "prod" and len(expr.ranks) > 1:
            return _Piece(f"{body.atom}.flatten({-len(expr.ranks)}).prod(-1)", kept, ATOM, real, live=some)
        verb = {"max": "amax", "min": "amin"}.get(expr.reducer, expr.reducer)
        return _Piece(f"{body.atom}.{verb}({dims})", kept, ATOM, real, live=some)

    def contracted(self, expr: Reduce, mask: _Piece | None) -> _Piece | None:
        """A sum of a product as an einsum; None where one factor has all ranks, or there is no product."""
        over, under = _product(expr.body)
        factors = [self.piece(factor) for factor in over]
        divisors = [self.piece(divisor) for divisor in under]
        every = {rank for piece in (*factors, *divisors) for rank in piece.axes} | set(expr.ranks)
        every |= set(mask.axes) if mask is not None else set()
        tensors = [piece for piece in factors if not piece.scalar and piece.axes]
        if len({frozenset(piece.axes) for piece in tensors}) < 2:
            return None
        if any(set(piece.axes) >= every and not piece.zeroed for piece in tensors):
            return None
        if not all(piece.real for piece in tensors) or not set(expr.ranks) <= {r for p in tensors for r in p.axes}:
            return None
        after = [piece for piece in factors if piece.scalar or not piece.axes]
        left: list[_Piece] = []
        for divisor in divisors:
            host = next((i for i, p in enumerate(tensors) if divisor.axes and set(divisor.axes) <= set(p.axes)), None)
            if host is not None:
                tensors[host] = self.combined("div", [tensors[host], divisor])
            elif set(divisor.axes) & set(expr.ranks):
                return None
            else:
                left.append(divisor)
        if mask is not None:
            host = next((i for i, p in enumerate(tensors) if set(mask.axes) <= set(p.axes)), None)
            if host is None:
                return None
            tensors[host] = replace(tensors[host], live=self.both(tensors[host].live, mask), zeroed=False)
        live = None
        for piece in (*tensors, *after, *left):
            live = self.both(live, piece.live)
        kept = tuple(dict.fromkeys(rank for p in tensors for rank in p.axes if rank not in expr.ranks))
        letters = _letters({rank: None for p in tensors for rank in p.axes})
        inputs = ",".join("".join(letters[rank] for rank in piece.axes) for piece in tensors)
        into = "".join(letters[rank] for rank in kept)
        operands = ", ".join(self.zeroed(piece) for piece in tensors)
        found = _Piece(f'torch.einsum("{inputs}->{into}", {operands})', kept, ATOM, True)
        for piece in after:
            found = self.combined("mul", [found, replace(piece, live=None)])
        for divisor in left:
            found = self.combined("div", [found, replace(divisor, live=None)])
        if live is None:
            return found
        order = (*kept, *(rank for rank in dict.fromkeys((*live.axes, *expr.ranks)) if rank not in kept))
        dims = ", ".join(str(position - len(order)) for position in range(len(kept), len(order)))
        text = f"{_atom(self.full(live, order))}.any({f'({dims})' if ',' in dims else dims})"
        return replace(found, live=_Piece(text, kept))

    def zeroed(self, piece: _Piece) -> str:
        """A factor that is 0 where it is absent."""
        if piece.live is None or piece.zeroed:
            return piece.text
        return f"torch.where({self.aligned(piece.live, piece.axes).text}, {piece.text}, 0)"

    # --- expressions -------------------------------------------------------------------------------------------------

    def piece(self, expr: Expr) -> _Piece:
        """An expression with the dimensions that it has."""
        if expr in self.held:
            return self.held[expr]
        match expr:
            case Const():
                return self.number(expr)
            case Extent():
                return _Piece(self.size(expr.name), scalar=True)
            case Rank():
                self.ranges.setdefault(expr.name)
                return _Piece(self.names[expr.name], (expr.name,))
            case Read():
                return self.read(expr)
            case Cast():
                return self.cast(expr)
            case Apply(op="default"):
                return self.default([self.piece(arg) for arg in expr.args])
            case Apply():
                return self.combined(expr.op, [self.piece(arg) for arg in expr.args])
            case _:
                raise AssertionError(f"{type(expr).__name__} does not stand in a canonical expression")

    def number(self, expr: Const) -> _Piece:
        """A number as Python writes it."""
        value = expr.value
        if isinstance(value, float) and value != value:
            return _Piece("math.nan", real=True, scalar=True)
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return _Piece(f"{'-' if value < 0 else ''}math.inf", (), UNARY if value < 0 else ATOM, True, True)
        level = UNARY if not isinstance(value, bool) and value < 0 else ATOM
        return _Piece(repr(value), (), level, isinstance(value, float), True)

    def cast(self, expr: Cast) -> _Piece:
        """A value rounded to a type, and computed with in float64."""
        piece = self.tensor(self.piece(expr.arg))
        real = expr.dtype in FLOATS
        text = f"{piece.atom}.to({TORCH[expr.dtype]})" + (".double()" if real else "")
        return replace(piece, text=text, level=ATOM, real=real)

    def default(self, pieces: Sequence[_Piece]) -> _Piece:
        """The first value where it is present, else the second."""
        first, second = pieces
        if first.live is None:
            return first
        real = first.real or second.real
        axes = self.together(first.axes, first.live.axes, second.axes)
        words = [self.aligned(self.as_real(p, real), axes).text for p in (first, second)]
        mask = self.aligned(first.live, axes).text
        either = None if second.live is None else self.combined("or", [first.live, second.live])
        return _Piece(f"torch.where({mask}, {words[0]}, {words[1]})", axes, ATOM, real, live=either)

    def combined(self, op: str, pieces: Sequence[_Piece]) -> _Piece:
        """A pointwise operation; present where all operands are."""
        live = None
        for piece in pieces:
            live = self.both(live, piece.live)
        kind = OPS[op].kind
        operands = pieces[1:] if op == "select" else pieces
        real = any(piece.real for piece in operands) or kind is Kind.FLOAT
        if all(piece.scalar for piece in pieces) and (op in NUMBERS or op in INFIX):
            return self.infix(op, pieces, (), real and kind is not Kind.BOOL, None, scalar=True)
        if op in ("floor", "round") and not real:
            return pieces[0]
        if op not in ("and", "or", "not"):
            pieces = [p if op == "select" and i == 0 else self.as_real(p, real) for i, p in enumerate(pieces)]
        if op in INFIX:
            axes = self.together(*(piece.axes for piece in pieces))
            return self.infix(op, pieces, axes, real and kind is not Kind.BOOL, live)
        if op in ("min", "max") and any(piece.scalar for piece in pieces):
            tensor, bound = sorted(pieces, key=lambda piece: piece.scalar)
            text = f"{tensor.atom}.clamp({'max' if op == 'min' else 'min'}={bound.text})"
            return _Piece(text, tensor.axes, ATOM, real, live=live)
        if op != "pow" or all(piece.scalar for piece in pieces):
            pieces = [self.tensor(piece) for piece in pieces]
        axes = self.together(*(piece.axes for piece in pieces))
        words = [self.aligned(piece, axes).text for piece in pieces]
        return _Piece(CALLS[op].format(*words), axes, ATOM, real, live=live)

    def infix(
        self, op: str, pieces: Sequence[_Piece], axes: tuple[str, ...], real: bool, live: _Piece | None,
        scalar: bool = False,
    ) -> _Piece:  # fmt: skip
        """An operator between its operands, or a function of numbers; brackets where they are needed."""
        if scalar and op in NUMBERS:
            return _Piece(NUMBERS[op].format(*(piece.text for piece in pieces)), (), ATOM, real, True)
        form, level = INFIX[op]
        words = []
        for position, piece in enumerate(self.aligned(piece, axes) for piece in pieces):
            chained = piece.level == level and position == 0 and level in (SUM, PRODUCT)
            words.append(piece.text if piece.level > level or chained else f"({piece.text})")
        return _Piece(form.format(*words), axes, level, real, scalar, live)

    def read(self, expr: Read) -> _Piece:
        """A tensor at coordinates: itself where these are ranks, else gathered, absent outside."""
        name, real = self.names[expr.tensor], self.dtypes[expr.tensor] in FLOATS
        mask = self.masks.get(expr.tensor)
        plain = tuple(part.name for part in expr.index if isinstance(part, Rank))
        if len(set(plain)) == len(expr.index):
            live = None if mask is None else _Piece(mask, plain)
            return _Piece(name, plain, ATOM, real, live=live, zeroed=True)
        computed = [position for position, part in enumerate(expr.index) if not isinstance(part, Rank)]
        if len(computed) == 1 and len(set(plain)) == len(plain):
            position = computed[0]
            piece = self.place(expr, position)
            if not set(piece.axes) & set(plain):
                return self.taken(expr.tensor, piece, plain, position)
        pieces = [self.place(expr, position) for position in range(len(expr.index))]
        axes = self.together(*(piece.axes for piece in pieces))
        words = ", ".join(self.aligned(piece, axes).text for piece in pieces)
        found = None
        for piece in pieces:
            found = self.both(found, piece.live)
        if mask is not None:
            extents = ", ".join(map(self.size, self.shapes[expr.tensor]))
            found = self.both(found, _Piece(f"{mask}.expand({extents})[{words}]", axes))
        return _Piece(f"{name}[{words}]", axes, ATOM, real, live=found)

    def taken(self, tensor: str, piece: _Piece, plain: tuple[str, ...], position: int) -> _Piece:
        """A read with one computed index: along its dimension, all of the others."""
        axes = (*plain[:position], *piece.axes, *plain[position:])
        marks = f"[{', '.join([*([':'] * position), piece.text])}]"
        live = piece.live
        if (mask := self.masks.get(tensor)) is not None:
            extents = ", ".join(map(self.size, self.shapes[tensor]))
            live = self.both(live, _Piece(f"{mask}.expand({extents}){marks}", axes))
        real = self.dtypes[tensor] in FLOATS
        return _Piece(f"{self.names[tensor]}{marks}", axes, ATOM, real, live=live, zeroed=piece.live is None)

    def place(self, expr: Read, position: int) -> _Piece:
        """One index of a gathered read, kept within the tensor, present where it lies within."""
        part, size = expr.index[position], self.shapes[expr.tensor][position]
        piece = self.piece(part)
        read = [node.tensor for node in walk(part) if isinstance(node, Read)]
        if read:
            long = all(self.dtypes[name] is DType.I64 for name in read)
            return piece if long else replace(piece, text=f"{piece.atom}.long()", level=ATOM)
        numbers = {rank: self.number_of(extent) for rank, extent in self.ranks.items()}
        known = interval(part, numbers, self.extents)
        if known is not None and known[0] >= 0 and known[1] < self.number_of(size):
            return piece
        tensor, last = self.tensor(piece), f"{self.size(size)} - 1"
        inside = _Piece(f"({tensor.atom} >= 0) & ({tensor.atom} <= {last})", tensor.axes, AND)
        return _Piece(f"{tensor.atom}.clamp(0, {last})", tensor.axes, live=inside)

    def mask(self, where: Expr) -> _Piece:
        """Where a filter holds."""
        piece = self.piece(where)
        found = self.both(replace(piece, live=None), piece.live)
        assert found is not None
        return found

    # --- dimensions --------------------------------------------------------------------------------------------------

    def both(self, first: _Piece | None, second: _Piece | None) -> _Piece | None:
        """Where two masks hold; None stands for everywhere."""
        if first is None or second is None or first == second:
            return first if second is None else second
        return self.combined("and", [self.tensor(first), self.tensor(second)])

    def tensor(self, piece: _Piece) -> _Piece:
        """A number as a tensor."""
        if not piece.scalar:
            return piece
        kind = ", dtype=torch.float64" if piece.real else ""
        return replace(piece, text=f"torch.tensor({piece.text}{kind}, device={self.device})", level=ATOM, scalar=False)

    def as_real(self, piece: _Piece, real: bool) -> _Piece:
        """An integer tensor in float64, where the operation is one on floats: torch would go to float32."""
        if piece.real or piece.scalar or not real:
            return piece
        return replace(piece, text=f"{piece.atom}.double()", level=ATOM, real=True)

    def together(self, *groups: tuple[str, ...]) -> tuple[str, ...]:
        """The dimensions of all groups: as a group that has them all lies, else as their extents are declared."""
        every = {rank for group in groups for rank in group}
        whole = next((group for group in groups if set(group) == every), None)
        return tuple(rank for rank in self.ranks if rank in every) if whole is None else whole

    def aligned(self, piece: _Piece, axes: Sequence[str]) -> _Piece:
        """A piece with dimensions of extent 1 put in; in front of it torch puts them in by itself."""
        wanted = tuple(rank for rank in axes if rank in piece.axes)
        text, level = piece.text, piece.level
        if wanted != piece.axes:
            places = ", ".join(str(piece.axes.index(rank)) for rank in wanted)
            text, level = (f"{piece.atom}.T" if len(wanted) == 2 else f"{piece.atom}.permute({places})"), ATOM
        marks = [":" if rank in wanted else "None" for rank in axes]
        while marks and marks[0] == "None":
            marks.pop(0)
        if "None" in marks:
            inner = marks.index("None")
            short = marks[inner:] == ["None"] * (len(marks) - inner) and inner > 1
            marks = ["...", *marks[inner:]] if short else marks
            text, level = f"{text if level == ATOM else f'({text})'}[{', '.join(marks)}]", ATOM
        return replace(piece, text=text, level=level, axes=tuple(axes) if wanted else ())

    def full(self, piece: _Piece, axes: Sequence[str]) -> str:
        """A mask with exactly these dimensions, of extent 1 where it does not vary."""
        tensor = self.tensor(piece)
        found = self.aligned(tensor, axes)
        missing = 0
        for rank in axes:
            if rank in tensor.axes:
                break
            missing += 1
        if not missing:
            return found.text
        return f"{found.atom}[{', '.join(['None'] * missing)}]"

    def covering(self, piece: _Piece, axes: tuple[str, ...]) -> _Piece:
        """A piece over all of these ranks, at their full extents."""
        found = self.aligned(self.tensor(piece), axes)
        if set(piece.axes) == set(axes):
            return found
        extents = ", ".join(self.size(self.ranks[rank]) for rank in axes)
        return replace(found, text=f"{found.atom}.expand({extents})", level=ATOM, axes=axes)

    def size(self, size: Size) -> str:
        """An extent as text."""
        if isinstance(size, int):
            return str(size)
        self.sizes.add(size)
        return self.names[size]

    def number_of(self, size: Size) -> int:
        """An extent as a number."""
        return size if isinstance(size, int) else self.extents[size]


def _product(expr: Expr) -> tuple[list[Expr], list[Expr]]:
    """The factors of a product and what it is divided by."""
    if isinstance(expr, Apply) and expr.op == "mul":
        parts = [_product(arg) for arg in expr.args]
        return [f for over, _ in parts for f in over], [d for _, under in parts for d in under]
    if isinstance(expr, Apply) and expr.op == "div":
        over, under = _product(expr.args[0])
        return over, [*under, expr.args[1]]
    return [expr], []


def _without(expr: Expr, own: Expr) -> Iterator[Expr]:
    """The largest parts of an expression that do not have what a recurrence carries."""
    if own not in walk(expr):
        yield expr
    elif expr != own:
        for child in children(expr):
            yield from _without(child, own)


def _letters(ranks: Mapping[str, None]) -> dict[str, str]:
    """A letter for each rank: its name where that is one."""
    found = {rank: rank for rank in ranks if rank in LETTERS}
    free = [letter for letter in LETTERS if letter not in found.values()]
    if len(ranks) > len(LETTERS):
        message = f"a product over {len(ranks)} ranks: torch names at most {len(LETTERS)}"
        raise UnsupportedError(Diagnostic("C531", message, None, "write it in several statements"))
    for rank in ranks:
        if rank not in found:
            found[rank] = free.pop(0)
    return found


def _atom(text: str) -> str:
    """Text in brackets, unless it is a name."""
    return text if text.isidentifier() else f"({text})"
