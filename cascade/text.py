"""The canonical text of a cascade: `parse(render(c)) == c`, and `render(parse(s)) == s` for canonical `s`.

Parentheses stand exactly where the grammar needs them. Two things decide: how tightly an expression binds (the levels
of `ops.py`), and whether its end is a reduction, which would take in whatever product follows it.
"""

from __future__ import annotations

from typing import NamedTuple, assert_never

from cascade.ir import (
    Apply, Bind, Call, Cascade, Cast, Const, Directive, Einsum, Expr, Extent, Fold, Function, Fuse, GroupBy, Init,
    Local, Loop, Mesh, Param, Part, Phase, Place, Rank, Read, Reduce, Region, Result, Shard, Split, Stmt, Stream,
    Target, Tile, TopK, Use, Wait,
)  # fmt: skip
from cascade.ops import LEVEL_COMPARE, LEVEL_PRODUCT, LEVEL_UNARY, LIBRARY_REDUCTIONS, OPS, REDUCERS, Op
from cascade.walk import children

LEVEL_ATOM = LEVEL_UNARY + 1
INDENT = "    "


def render(cascade: Cascade) -> str:
    """The cascade as text: the definitions it uses, callees first, then itself."""
    blocks = [render_function(d) if isinstance(d, Function) else render_alone(d) for d in cascade.uses]
    return "\n\n".join([*blocks, render_alone(cascade)]) + "\n"


# `print(cascade)` shows its text; set from here, because ir.py holds no behaviour and imports nothing above it
Cascade.__str__ = render  # type: ignore[method-assign, assignment]


def render_alone(cascade: Cascade) -> str:
    """The cascade without what it uses."""
    params = ", ".join(render_declaration(param) for param in cascade.params)
    results = ", ".join(render_declaration(result) for result in cascade.results)
    given = ", ".join(f"{extent.rank} = {extent.size}" for extent in cascade.given)
    lines = [f"cascade {cascade.name}({params}) -> {results}{given and f' with {given}'} {{"]
    lines += [INDENT + render_stmt(stmt) for stmt in cascade.body]
    if cascade.schedule:
        lines.append("} schedule {")
        lines += [INDENT + line for directive in cascade.schedule for line in render_directive(directive).split("\n")]
    return "\n".join([*lines, "}"])


def render_declaration(decl: Param | Result) -> str:
    """`Q: bf16[B,M]`, and the fill of a result where it is not 0."""
    dtype = f": {decl.dtype.value}" if decl.dtype else ""
    fill = f" fill {render_expr(decl.fill)}" if isinstance(decl, Result) and decl.fill != Const(0) else ""
    return f"{decl.name}{dtype}[{','.join(str(size) for size in decl.shape)}]{fill}"


def render_function(function: Function) -> str:
    """`def mean[n](x) = ...`."""
    ranks = f"[{','.join(function.ranks)}]" if function.ranks else ""
    return f"def {function.name}{ranks}({', '.join(function.params)}) = {render_expr(function.body)}"


# --- statements ------------------------------------------------------------------------------------------------------


def render_stmt(stmt: Stmt) -> str:
    """One statement on one line."""
    match stmt:
        case Einsum():
            inits = ", ".join(_init(stmt.target, init) for init in stmt.inits)
            text = f"{_target(stmt.target)} = {render_expr(stmt.expr)}{_where(stmt.where)}"
            return f"{text} init {inits}" if inits else text
        case TopK():
            left = f"{_target(stmt.values)}, {_target(stmt.coords)}"
            body = _enclosed(_piece(stmt.body), LEVEL_PRODUCT)
            return f"{left} = topk[{stmt.rank}, {stmt.k}] {body}{_where(stmt.where)}"
        case Call():
            return f"{', '.join(stmt.targets)} = {stmt.callee}({', '.join(stmt.args)})"
        case _:
            assert_never(stmt)


def _target(target: Target) -> str:
    return f"{target.name}[{','.join(target.ranks)}]" if target.ranks else target.name


def _where(where: Expr | None) -> str:
    return "" if where is None else f" where {render_expr(where)}"


def _init(target: Target, init: Init) -> str:
    index = ",".join(str(init.at) if rank == init.rank else rank for rank in target.ranks)
    return f"{target.name}[{index}] = {render_expr(init.expr)}"


# --- expressions -----------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A rendered expression and what decides whether it needs parentheses."""

    text: str
    level: int = LEVEL_ATOM
    reduction: bool = False  # a reduction, or minus one: may end a product chain without parentheses
    closed: str = ""  # where the last operand is a reduction: the text before the rest of a product chain


def render_expr(expr: Expr) -> str:
    """One expression, with blanks around its operators."""
    return _piece(expr).text


def _piece(expr: Expr) -> _Piece:
    """The expression rendered operands first, without recursion: a pass may have made it deep."""
    order: list[tuple[Expr, bool]] = []
    todo = [(expr, False)]
    while todo:
        node, tight = todo.pop()
        order.append((node, tight))
        inner = tight or isinstance(node, Read)  # index expressions stand without blanks
        todo.extend([(child, inner) for child in children(node)])
    done: list[_Piece] = []
    for node, tight in reversed(order):
        first = len(done) - len(children(node))
        done[first:] = [_render_node(node, done[first:], tight)]
    return done[0]


def _render_node(expr: Expr, args: list[_Piece], tight: bool) -> _Piece:
    match expr:
        case Const():
            return _number(expr)
        case Rank() | Extent() | Local():
            return _Piece(expr.name)
        case Read():
            return _Piece(f"{expr.tensor}[{','.join([arg.text for arg in args])}]" if args else expr.tensor)
        case Apply():
            return _application(OPS[expr.op], expr.args, args, tight)
        case Cast():
            return _Piece(f"cast({args[0].text}, {expr.dtype.value})")
        case Reduce():
            return _along(expr.reducer, expr.ranks, args[0])
        case Use():
            if expr.ranks and len(args) == 1:
                return _along(expr.function, expr.ranks, args[0])
            ranks = f"[{','.join(expr.ranks)}]" if expr.ranks else ""
            return _Piece(f"{expr.function}{ranks}({', '.join([arg.text for arg in args])})")
        case _:
            assert_never(expr)


def _number(const: Const) -> _Piece:
    text = str(const.value).lower() if isinstance(const.value, bool) else repr(const.value)
    return _Piece(text, LEVEL_UNARY if text.startswith("-") else LEVEL_ATOM)


def _along(name: str, ranks: tuple[str, ...], body: _Piece) -> _Piece:
    """`sum[k] body`, which takes a product; after a name of the user's that may not start with a minus."""
    minus = body.text.startswith("-") and name not in REDUCERS and name not in LIBRARY_REDUCTIONS
    text = _enclosed(body, LEVEL_ATOM if minus else LEVEL_PRODUCT)
    return _reduction(f"{name}[{','.join(ranks)}] {text}")


def _reduction(text: str) -> _Piece:
    return _Piece(text, LEVEL_PRODUCT, reduction=True, closed=f"({text})")


def _application(op: Op, operands: tuple[Expr, ...], args: list[_Piece], tight: bool) -> _Piece:
    if op.symbol is None:
        return _Piece(f"{op.name}({', '.join([arg.text for arg in args])})")
    if op.arity == 1:
        return _prefixed(op, operands[0], args[0])
    left, right = args
    symbol = f" {op.symbol} " if not tight or op.symbol.isalpha() else op.symbol
    if op.level == LEVEL_PRODUCT:
        first = (left.closed or left.text) if left.level >= LEVEL_PRODUCT else f"({left.text})"
        if right.reduction:
            return _Piece(f"{first}{symbol}{right.text}", LEVEL_PRODUCT, closed=f"{first}{symbol}{right.closed}")
    else:
        chains = op.level != LEVEL_COMPARE
        first = _enclosed(left, op.level if chains else op.level + 1)
    return _Piece(f"{first}{symbol}{_enclosed(right, op.level + 1)}", op.level)


def _prefixed(op: Op, operand: Expr, arg: _Piece) -> _Piece:
    if op.name == "not":
        return _Piece(f"not {_enclosed(arg, op.level)}", op.level)
    if isinstance(operand, Const):  # `-2` is a number, `-(2)` its negation
        return _Piece(f"-({arg.text})", LEVEL_UNARY)
    if arg.reduction:
        return _reduction(f"-{arg.text}")
    return _Piece(f"-{_enclosed(arg, LEVEL_UNARY)}", LEVEL_UNARY)


def _enclosed(piece: _Piece, level: int) -> str:
    return piece.text if piece.level >= level else f"({piece.text})"


# --- schedule --------------------------------------------------------------------------------------------------------


def render_directive(directive: Directive) -> str:
    """One directive on one line; a fold and a region have a line for each of their parts."""
    match directive:
        case Mesh():
            return f"mesh {directive.axis} = {directive.size}"
        case Shard():
            return f"shard {directive.rank} over {directive.axis}"
        case Split():
            cuts = ", ".join(str(cut) for cut in directive.cuts)
            return f"split {directive.rank} " + (f"at {cuts}" if cuts else f"into {directive.parts}")
        case Fuse():
            return f"fuse {{{', '.join(directive.statements)}}} over {directive.rank}"
        case Fold():
            return _fold(directive)
        case GroupBy():
            by = f"{render_expr(directive.key)} < {directive.size}"
            return f"group {{{', '.join(directive.statements)}}} by {by}"
        case Tile():
            return "tile " + ", ".join(f"{rank} = {size}" for rank, size in directive.sizes)
        case Stream():
            return f"stream {directive.name} {{ {', '.join(_part(part) for part in directive.parts)} }}"
        case Wait():
            return f"wait {_part(directive.part)} on {_part(directive.on)}"
        case Region():
            return _region(directive)
        case Bind():
            return f"bind {{{', '.join(directive.statements)}}} on {directive.unit}"
        case Place():
            rows, columns = (" * ".join(side) or "1" for side in (directive.rows, directive.columns))
            return f"place {directive.statement} on {rows}, {columns} by {directive.stream or 1}"
        case _:
            assert_never(directive)


def _fold(fold: Fold) -> str:
    lines = [f"state {', '.join(fold.state)}"] if fold.state else []
    lines += [f"init {_target(init.target)} = {_fold_expr(init.expr)}" for init in fold.init]
    lines += [f"update {', '.join(fold.update)}"] if fold.update else []
    lines += [f"merge {_target(merge.target)} = {_fold_expr(merge.expr)}" for merge in fold.merge]
    lines += [f"finalize {', '.join(fold.finalize)}"] if fold.finalize else []
    return "\n".join([f"fold {fold.rank} {{", *(INDENT + line for line in lines), "}"])


def render_loop(loop: Loop) -> str:
    """A loop of a region: `rows: p = fit`."""
    size = "fit" if loop.size is None else str(loop.size)
    return f"{loop.rank} = {size}" if loop.label == loop.rank else f"{loop.label}: {loop.rank} = {size}"


def _over(loops: tuple[Loop, ...]) -> str:
    return f" over {', '.join(map(render_loop, loops))}" if loops else ""


def _region(region: Region) -> str:
    lines = [f"stage {{{', '.join(stage.statements)}}}{_over(stage.loops)}" for stage in region.stages]
    lines += [f"keep {tensor} in {level}" for tensor, level in region.keep]
    lines += [f"spill {', '.join(region.spill)}"] if region.spill else []
    lines += [_phase(phase) for phase in region.phases]
    lines += [] if region.capacity is None else [f"capacity {region.capacity}"]
    lines += ["double"] if region.double else []
    return "\n".join([f"region {region.name}{_over(region.loops)} {{", *(INDENT + line for line in lines), "}"])


def _phase(phase: Phase) -> str:
    work = ", ".join(f"{unit} {{{', '.join(names)}}}" for unit, names in phase.work)
    return f"phase {work}" + ("" if phase.drain is None else f" drain {phase.drain}")


def _fold_expr(expr: Expr | None) -> str:
    """The right side of an init or a merge; a scalar tensor that is called `empty` is not the word."""
    text = "empty" if expr is None else render_expr(expr)
    return f"({text})" if text == "empty" and expr is not None else text


def _part(part: Part) -> str:
    return part.name if part.index is None else f"{part.name}.{part.index}"
