"""From a plan to the text of a kernel: names from the cascade, equations as comments, nothing dead.

The text imports Triton only and needs nothing of this project. `Source` has it with the arguments that a launch gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from cascade.backends.triton import spell
from cascade.backends.triton.grid import Ending, ending
from cascade.backends.triton.lower import RESERVED, uses
from cascade.backends.triton.plan import (
    Axis, Carry, Dot, Fold, Keep, Kernel, Let, Load, Loop, Mask, Op, Redo, Role, Scan, Seen, Start, Store, Strip,
    Tensor, TopKept, every_op, extent_expr, few_quotients, in_eights,
)  # fmt: skip
from cascade.backends.triton.spell import ATOM, COMPARE, PRODUCT, SPELLINGS, SUM, TYPES, UNARY
from cascade.backends.triton.units import scaled_by
from cascade.backends.triton.widths import values_of
from cascade.inference import FLOATS
from cascade.intervals import ANY, Interval, Known, interval
from cascade.ir import Apply, Cast, Const, DType, Expr, Extent, Local, Rank
from cascade.ops import OPS, Kind
from cascade.walk import walk


ADD = SPELLINGS["add"]
WARP = 32  # threads that exchange without shared memory
VECTOR = 4  # elements of 32 bits that a thread loads at once, at most
CHAIN = 8  # additions one after the other
WHOLE_WORDS = (DType.F32, DType.F64, DType.I32, DType.I64)  # what takes a register or more of each element


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a kernel: what it is called there, and what a launch puts in.

    Kinds: `pointer` and `descriptor` of a tensor, `stride` of a dimension of it, `size` of a shape symbol, `constant`.
    """

    name: str
    kind: str
    tensor: str = ""
    position: int = 0  # of the dimension, for a stride
    box: tuple[int, ...] = ()
    value: int = 0
    symbol: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """The text of a kernel, its arguments in order, and the extents of its grid."""

    kernel: str
    text: str
    arguments: tuple[Argument, ...]
    grid: tuple[tuple[str | int, int], ...]  # per axis: an extent and how many coordinates a program has
    num_warps: int
    num_stages: int
    resident: int = 0  # programs of each multiprocessor that go through the tiles of the grid; 0: a program a tile


def emit(kernel: Kernel, portable: bool = False) -> Source:
    """The text of a kernel. A `portable` one runs in Triton's interpreter: no assembly, no 16-bit products."""
    return _Emitter(kernel, portable).source()


@dataclass(frozen=True, slots=True)
class _Piece:
    """The text of an expression, its dimensions, and how strongly its last operator binds."""

    text: str
    axes: tuple[str, ...]
    level: int = ATOM
    real: bool = True  # a float: not an integer or truth value


@dataclass(slots=True, eq=False)
class _Emitter:
    kernel: Kernel
    portable: bool
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    arguments: dict[str, Argument] = field(default_factory=dict)
    helpers: dict[str, None] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    prefix: str = "BLOCK"  # of the constants that are tile extents
    one_by_one: bool = False  # a fallback: one loop that tests all tiles, compiled in half the time, will do
    always_edge: bool = False  # inside a loop all tiles of which are tested
    around: Loop | None = None  # the innermost one around what is written
    edge_end: tuple[int, int] = (0, 0)  # where the last block of lines for edges ends
    assumed: list[str] = field(default_factory=list)  # lines that stand before all loops
    wide: bool = False  # what is written goes to a variable in f64, or is rounded as a whole
    grouped_by: tuple[str, int] | None = None  # the rank that the load at hand has divided by a number, and the number
    reached: dict[str, Interval] = field(default_factory=dict)  # by integer variables that are set once
    carried: frozenset[str] = field(init=False)  # the variables that loops set anew

    def __post_init__(self) -> None:
        self.carried = carried_in(self.kernel)

    # --- the whole ---------------------------------------------------------------------------------------------------

    def source(self) -> Source:
        """The kernel with its helpers and its arguments."""
        for axis in self.kernel.axes:
            if axis.role is not Role.POINT:
                self.argument(Argument(self.block(axis.rank), "constant", value=axis.tile))
        options = self.kernel.options
        stores = [op for op in self.kernel.ops if isinstance(op, Store)]
        end = ending(self.kernel) if options.pieces > 1 else None
        self.depth = 2 if options.resident else 1
        for op in self.kernel.ops:
            if not (op in stores if self.kernel.careful is not None else end is not None and op in end.ops):
                self.op(op)
        if self.kernel.careful is not None:
            self.carefully(self.kernel.careful, stores)
        if end is not None:
            self.in_pieces(end)
        body, self.lines = self.lines, []
        self.places("\n".join(body))
        head, self.lines = self.lines, []
        text = "\n".join([*self.header(), *self.helper_texts(), *self.functions, *self.definition(), *head, *body, ""])
        grid = tuple((axis.extent, axis.advance) for axis in self.kernel.grid)
        used = tuple(sorted(self.arguments.values(), key=_argument_order))
        return Source(self.kernel.name, text, used, grid, options.num_warps, options.num_stages, options.resident)

    def carefully(self, careful: Kernel, stores: Sequence[Store]) -> None:
        """Stores the tile, or goes through its coordinates one by one where products are not numbers."""
        tests = [f"({name} != {name}).to(tl.int32)" for name in self.kernel.watched]
        for number, name in enumerate(self.kernel.watched):
            known = self.variable(name)
            for position in reversed(range(len(known[0]) if known else 0)):  # within threads first
                tests[number] = f"tl.max({tests[number]}, {position})"
        self.line(f"if {' + '.join(tests)} == 0:")
        self.depth += 1
        for op in stores:
            self.op(op)
        self.depth -= 1
        self.line("else:  # 0 * NaN is NaN: one by one, so that what is absent takes no part")
        inner = _Emitter(careful, self.portable, prefix="ONE", one_by_one=True)
        words = inner.function()
        self.functions.extend(inner.functions)
        self.helpers |= inner.helpers
        self.arguments |= {name: argument for name, argument in inner.arguments.items() if name not in self.arguments}
        depth = self.depth
        for axis in self.kernel.axes:
            if axis.role is Role.TILE:
                self.depth += 1
                rank = self.rank(axis.rank)
                count = f"{axis.step or self.block(axis.rank)}"
                count = count if axis.exact else f"tl.minimum({count}, {self.size(axis.extent)} - {rank}_first)"
                self.line(f"for {rank}_next in range({count}):")
        self.depth += 1
        tiled = {self.rank(axis.rank) for axis in self.kernel.axes if axis.role is Role.TILE}
        for line in wrapped(f"{careful.name}(", [f"{w}_first + {w}_next" if w in tiled else w for w in words], ")"):
            self.line(line)
        self.depth = depth

    def function(self) -> list[str]:
        """The kernel as a function of its coordinates that another one calls; its arguments."""
        for axis in self.kernel.axes:
            if axis.role is not Role.POINT:
                self.argument(Argument(self.block(axis.rank), "constant", value=axis.tile))
        for op in self.kernel.ops:
            self.op(op)
        body, self.lines = self.lines, []
        words = set(re.findall(r"\w+", "\n".join(body)))
        self.lines.extend(self.assumed)
        for axis in self.kernel.axes:
            self.coordinates(axis, words)
        head, self.lines = self.lines, []
        points = [self.rank(axis.rank) for axis in self.kernel.axes if axis.role is Role.POINT]
        found = sorted(self.arguments.values(), key=_argument_order)
        heads = [*points, *(f"{a.name}: tl.constexpr" if a.kind == "constant" else a.name for a in found)]
        self.functions.extend(["", "@triton.jit", *wrapped(f"def {self.kernel.name}(", heads, "):"), *head, *body, ""])
        return [*points, *(argument.name for argument in found)]

    def header(self) -> list[str]:
        equations = [f"    {line}" for line in self.kernel.statements]
        if self.kernel.base_two:
            names = ", ".join(self.kernel.base_two)
            equations += ["", f"Exponents lie to base two: {names} times log2(e)."]
        return [f'"""{self.kernel.name}, one kernel for', "", *equations, '"""', "", "import triton",
                "import triton.language as tl", ""]  # fmt: skip

    def helper_texts(self) -> Iterator[str]:
        wanted: dict[str, None] = {}
        for name in self.helpers:
            for needed in spell.NEEDS.get(name, ()):
                wanted.setdefault(needed)
            wanted.setdefault(name)
        for name in wanted:
            yield "\n" + spell.HELPERS[name]

    def definition(self) -> list[str]:
        """The first lines of the kernel function."""
        found = sorted(self.arguments.values(), key=_argument_order)
        words = [f"{a.name}: tl.constexpr" if a.kind == "constant" else a.name for a in found]
        # Sizes change from call to call: that they are divisible serves only where lanes are tested against them, or
        # where coordinates go round in them: what is neighbours stays neighbours then.
        ragged = {axis.extent for axis in self.kernel.axes if axis.role is not Role.POINT and not axis.exact}
        tested = set() if any(isinstance(op, Dot) for op in every_op(self.kernel.ops)) else ragged
        special = tested | gone_round(self.kernel)
        sizes = [a.name for a in found if a.kind == "size" and a.symbol not in special]
        jit = "@triton.jit"
        if sizes:
            jit = f"@triton.jit(do_not_specialize={sizes!r})".replace("'", '"')
        return ["", jit, *wrapped(f"def {self.kernel.name}(", words, "):")]

    def argument(self, wanted: Argument) -> str:
        """The name of an argument, added where the kernel has it not yet."""
        self.arguments.setdefault(wanted.name, wanted)
        return wanted.name

    def places(self, body: str) -> None:
        """Which coordinates a program has: its number taken apart, as far as the body asks."""
        words = set(re.findall(r"\w+", body))
        grid = self.kernel.grid
        self.known_tiles()
        rest = self.turns()
        if len(grid) > 1:
            self.line(f"pid = {rest}")
            rest = "pid"
        if self.kernel.options.grouped:
            self.beside(grid[0], grid[1], last=len(grid) == 2)
            grid = grid[2:]
        for number, axis in enumerate(grid):
            last = number == len(grid) - 1
            count = self.count(axis)
            name = self.rank(axis.rank) if axis.role is Role.POINT else f"{self.rank(axis.rank)}_tile"
            mine = rest if last else f"{rest} % {count}"
            if axis.rank == self.kernel.reverse:
                self.line(f"{name} = {count} - 1 - {mine}  # the longest loops start first")
            else:
                self.line(f"{name} = {mine}")
            if not last:
                self.line(f"pid = pid // {count}")
        for axis in self.kernel.axes:
            self.coordinates(axis, words)

    def known_tiles(self) -> None:
        """How many tiles of rows there are, which only the device knows; a program beyond them has nothing to do."""
        rows = self.kernel.rows
        if rows is None:
            return
        self.depth = 1
        table = self.argument(Argument(f"{rows.tables[2]}_ptr", "pointer", rows.tables[2]))
        self.line(f"{self.rank(rows.rank)}_tiles = tl.load({table})")
        if not self.kernel.options.resident:
            self.line(f"if tl.program_id(0) >= {' * '.join(self.count(axis) for axis in self.kernel.grid)}:")
            self.line("    return")

    def turns(self) -> str:
        """The number of a tile of the grid: that of the program, or one after the other in a loop over them."""
        self.depth = 1
        self.lines.extend(self.assumed)
        if not self.kernel.options.resident:
            return "tl.program_id(0)"
        counts = [self.count(axis) for axis in self.kernel.grid]
        self.line(f"tiles = {' * '.join(counts)}")
        self.line("# one loop of all rounds of all tiles: what the next tile reads is on its way while this one ends")
        self.line("for turn in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):")
        self.depth = 2
        return "turn"

    def beside(self, first: Axis, second: Axis, last: bool) -> None:
        """The tiles of the first two axes: a few of the first beside each other, with every tile of the second."""
        a, b = self.rank(first.rank), self.rank(second.rank)
        group = self.argument(Argument(f"GROUP_{first.rank.upper()}", "constant", value=self.kernel.options.grouped))
        counts = {f"{rank}_tiles": self.count(axis) for rank, axis in ((a, first), (b, second))}
        new = {tiles: count for tiles, count in counts.items() if count != tiles}
        self.line(f"{', '.join(new)} = {', '.join(new.values())}")
        place = "pid"
        if not last:
            self.line(f"{a}_{b} = pid % ({a}_tiles * {b}_tiles)")
            self.line(f"pid = pid // ({a}_tiles * {b}_tiles)")
            place = f"{a}_{b}"
        self.line(f"# {group} tiles of {a} beside each other: programs near in time read the same tiles of {b}")
        self.line(f"{a}_from = {place} // ({group} * {b}_tiles) * {group}")
        self.line(f"{a}_beside = tl.minimum({a}_tiles - {a}_from, {group})")
        self.line(f"{a}_tile = {a}_from + {place} % ({group} * {b}_tiles) % {a}_beside")
        one = b if second.role is Role.POINT else f"{b}_tile"
        self.line(f"{one} = {place} % ({group} * {b}_tiles) // {a}_beside")

    def coordinates(self, axis: Axis, words: set[str]) -> None:
        """The first, the last and all coordinates of a tile, where the body uses them."""
        rank = self.rank(axis.rank)
        if axis.role is Role.TILE:
            self.line(f"{rank}_first = {rank}_tile * {axis.step or self.block(axis.rank)}")
            self.within(axis, words)
        elif axis.role is Role.WHOLE and rank in words:
            self.line(f"{rank} = tl.arange(0, {self.block(axis.rank)})")

    def within(self, axis: Axis, words: set[str]) -> None:
        """The last and all coordinates of a tile whose first is known, where they are used."""
        rank, block = self.rank(axis.rank), self.block(axis.rank)
        if f"{rank}_last" in words:
            beyond = f"{rank}_first + {block}"
            beyond = beyond if axis.exact else f"tl.minimum({beyond}, {self.size(axis.extent)})"
            self.line(f"{rank}_last = {beyond} - 1")
        if rank in words:
            self.line(f"{rank} = {rank}_first + tl.arange(0, {block})")

    def count(self, axis: Axis) -> str:
        """The number of programs along an axis."""
        if self.kernel.rows is not None and self.kernel.rows.rank == axis.rank:
            return f"{self.rank(axis.rank)}_tiles"
        size = self.size(axis.extent)
        return size if axis.role is Role.POINT else f"tl.cdiv({size}, {axis.step or self.block(axis.rank)})"

    # --- names -------------------------------------------------------------------------------------------------------

    def rank(self, name: str) -> str:
        return f"{name}_" if name in RESERVED else name

    def block(self, rank: str) -> str:
        return f"{self.prefix}_{rank.upper()}"

    def size(self, extent: str | int) -> str:
        if isinstance(extent, int):
            return str(extent)
        return self.argument(Argument(f"{extent}_" if extent in RESERVED else extent, "size", symbol=extent))

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.kernel.tensors if tensor.name == name)

    def variable(self, name: str) -> tuple[tuple[str, ...], DType] | None:
        return next(((axes, dtype) for known, axes, dtype in self.kernel.variables if known == name), None)

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def dims(self, axes: Sequence[str]) -> str:
        """The shape of a tile, as it is written."""
        return "[" + ", ".join(self.blocks(axes, self.grouped_by)) + "]"

    def order(self, axes: set[str]) -> tuple[str, ...]:
        return tuple(axis.rank for axis in self.kernel.axes if axis.rank in axes and not axis.single)

    # --- expressions -------------------------------------------------------------------------------------------------

    def text(self, expr: Expr, axes: Sequence[str]) -> str:
        """An expression as a tile over these axes."""
        return self.aligned(self.piece(expr), tuple(axes)).text

    def aligned(self, piece: _Piece, axes: tuple[str, ...]) -> _Piece:
        """A piece with dimensions of extent 1 put in, or its two dimensions exchanged."""
        if piece.axes == axes or not piece.axes:
            return piece
        assert set(piece.axes) <= set(axes), f"{piece.text} lies over {piece.axes}, not over {axes}"
        atom = piece.text if piece.level == ATOM else f"({piece.text})"
        if set(piece.axes) == set(axes):
            if len(axes) == 2:
                return _Piece(f"tl.trans({piece.text})", axes, ATOM, piece.real)
            places = ", ".join(str(piece.axes.index(rank)) for rank in axes)
            return _Piece(f"tl.permute({piece.text}, ({places}))", axes, ATOM, piece.real)
        inner = tuple(rank for rank in axes if rank in piece.axes)
        if inner != piece.axes:
            return self.aligned(self.aligned(piece, inner), axes)
        marks = ", ".join(":" if rank in piece.axes else "None" for rank in axes)
        return _Piece(f"{atom}[{marks}]", axes, ATOM, piece.real)

    def piece(self, expr: Expr) -> _Piece:
        """An expression with the dimensions that it has."""
        match expr:
            case Const():
                return _Piece(number(expr.value), (), ATOM, isinstance(expr.value, float))
            case Rank():
                axis = self.kernel.axis(expr.name)
                return _Piece(self.rank(expr.name), () if axis.single else (expr.name,), ATOM, False)
            case Extent():
                return _Piece(self.size(expr.name), (), ATOM, False)
            case Local():
                return self.local(expr)
            case Cast(arg=Const(value=value)):
                return _Piece(f"tl.full([], {number(value)}, {TYPES[expr.dtype]})", (), ATOM, expr.dtype in FLOATS)
            case Cast():
                inner = self.before_cast(expr)
                if not inner.axes and expr.dtype not in FLOATS:  # of a number or an argument as well
                    return _Piece(f"tl.cast({inner.text}, {TYPES[expr.dtype]})", (), ATOM, False)
                atom = inner.text if inner.level == ATOM else f"({inner.text})"
                text = self.short(expr, inner, atom) or self.converted(atom, expr.dtype)
                short = expr.dtype in FLOATS and expr.dtype is not DType.F32
                return _Piece(f"{text}.to(tl.float32)" if short else text, inner.axes, ATOM, expr.dtype in FLOATS)
            case Apply():
                return self.apply(expr)
            case _:
                raise AssertionError(f"{type(expr).__name__} is lowered before it is written")

    def short(self, expr: Cast, inner: _Piece, atom: str) -> str | None:
        """Integers of few values as floats of 16 bits; None of others, which the hardware converts, slowly."""
        if inner.real or not inner.axes or self.portable or expr.dtype not in spell.MANTISSA:
            return None
        low, high = interval(expr.arg, self.values_of)
        count = 1 << spell.MANTISSA[expr.dtype]
        if low < -count or high > count or high - low >= count:
            return None
        helper = f"short_{expr.dtype.value}"
        self.helpers.setdefault(helper)
        return f"{helper}({atom}, {low})"

    def before_cast(self, expr: Cast) -> _Piece:
        """What is brought to a type: to f32 from f64, an expression is rounded as a whole."""
        before, self.wide = self.wide, self.wide or expr.dtype is DType.F32
        found, self.wide = self.piece(expr.arg), before
        return found

    def local(self, expr: Local) -> _Piece:
        """A variable; data of short types is widened where it is computed with."""
        known = self.variable(expr.name)
        if known is None:  # the end of a tile: m_first
            rank, _, end = expr.name.rpartition("_")
            axis = self.kernel.axis(rank)
            if axis.role is Role.WHOLE:
                return _Piece("0" if end == "first" else f"({self.size(axis.extent)} - 1)", (), ATOM, False)
            return _Piece(f"{self.rank(rank)}_{end}", (), ATOM, False)
        axes, dtype = known
        if dtype in FLOATS and dtype is not DType.F32 and not (self.wide and dtype is DType.F64):
            return _Piece(f"{expr.name}.to(tl.float32)", axes)
        if self.portable and dtype is DType.BOOL and not axes:  # else the interpreter spreads it as a number
            return _Piece(f"(tl.full([], True, tl.int1) & {expr.name})", axes, ATOM, False)
        if dtype is DType.BOOL or dtype in FLOATS:
            return _Piece(expr.name, axes, ATOM, dtype in FLOATS)
        return _Piece(expr.name, axes, ATOM, False)

    def apply(self, expr: Apply) -> _Piece:
        """An operation by its row, operands brought to common dimensions."""
        if (whole := self.quotient(expr)) is not None:
            return _Piece(whole, (), PRODUCT, False)
        if (groups := self.groups(expr)) is not None:
            return groups
        row = self.row(expr.op)
        if expr.op == "div" and not self.portable and not isinstance(expr.args[0], Const):
            row = self.division(expr)
        pieces = [self.piece(scaled_by(arg, row.scale) if row.scale else arg) for arg in expr.args]
        together = self.order({rank for piece in pieces for rank in piece.axes})
        largest = max(pieces, key=lambda piece: len(piece.axes))
        axes = largest.axes if set(largest.axes) == set(together) else together
        if expr.op == "mul" and len(axes) == 3 and [piece.axes for piece in pieces] == [axes[:2], axes[1:]]:
            pieces.reverse()  # a sum over the middle of a[:, :, None] * b[None, :, :] would become a product in tf32
        pieces = [self.aligned(piece, axes) for piece in pieces]
        real = any(piece.real for piece in pieces)
        if not real and expr.op in spell.INTEGER:
            return self.integer(expr, pieces, axes)
        if row.helper is not None:
            self.helpers.setdefault(row.helper)
        if OPS[expr.op].kind is Kind.FLOAT and row is not SPELLINGS["div"]:  # functions of floats take no integers
            pieces = [p if p.real else _Piece(f"({self.bracketed(p, ADD, 0)} + 0.0)", p.axes) for p in pieces]
        words = [self.bracketed(piece, row, position) for position, piece in enumerate(pieces)]
        result_real = (real or expr.op in ("div", "exp", "exp2")) and row.infix != COMPARE
        text = row.text.format(*words)
        if self.portable and not axes and row.infix == COMPARE:  # else the interpreter spreads it as a number
            return _Piece(f"(tl.full([], True, tl.int1) & ({text}))", axes, ATOM, False)
        return _Piece(text, axes, row.infix or ATOM, result_real)

    def division(self, expr: Apply) -> spell.Spelling:
        """How a division is written: rounded once where few are divided, or in full precision many by the same."""
        tile, by = (self.piece(arg).axes for arg in expr.args)
        if few_quotients({*tile, *by}, {axis.rank: axis.tile for axis in self.kernel.axes}):
            return spell.ONCE_ROUNDED
        return spell.BY_COMMON if self.kernel.exact and len(by) < len(tile) else self.row("div")

    def groups(self, expr: Expr) -> _Piece | None:
        """The quotient of which a load has one element for each value; None for anything else."""
        match expr:
            case Apply(op="floordiv", args=(Rank(name=rank), Const(value=int(by)))) if self.grouped_by is not None:
                _, size = self.grouped_by
            case _:
                return None
        if rank != self.grouped_by[0] or by % size:
            return None
        text = f"tl.arange(0, {self.block(rank)} // {size})"
        if self.kernel.axis(rank).role is not Role.WHOLE:
            text = f"({self.rank(rank)}_first // {size} + {text})"
        return _Piece(text if by == size else f"({text} // {by // size})", (rank,), ATOM, False)

    def row(self, op: str) -> spell.Spelling:
        """How an operation is written: the fast way where results or factors are short and it can run."""
        if op in spell.ROUGH and any(isinstance(each, Dot) and not each.exact for each in every_op(self.kernel.ops)):
            return spell.ROUGH[op]
        fast = spell.FAST.get(op)
        if fast is None or (self.portable and fast.assembly) or not self.short_results():
            return SPELLINGS[op]
        return fast

    def integer(self, expr: Apply, pieces: list[_Piece], axes: tuple[str, ...]) -> _Piece:
        """An operation on integers; division of what may be negative rounds down, unlike Triton's."""
        words = [piece.text for piece in pieces]
        if expr.op in ("floordiv", "mod"):
            by = expr.args[1].value if isinstance(expr.args[1], Const) else 0
            power = by > 0 and int(by).bit_count() == 1
            learned = any(isinstance(node, Local) for node in walk(expr))
            if all(never_negative(arg, self.values_of) for arg in expr.args) and not (power and learned):
                row = spell.NATURAL[expr.op]
                words = [self.bracketed(piece, row, position) for position, piece in enumerate(pieces)]
                return _Piece(row.text.format(*words), axes, row.infix, False)
            if power:  # shifts and bits round down
                lower = words[0] if pieces[0].level == ATOM else f"({words[0]})"
                bits = f">> {int(by).bit_length() - 1}" if expr.op == "floordiv" else f"& {int(by) - 1}"
                return _Piece(f"({lower} {bits})", axes, ATOM, False)
            self.helpers.setdefault("floor_divide" if expr.op == "floordiv" else "floor_modulo")
        return _Piece(spell.INTEGER[expr.op].format(*words), axes, ATOM, False)

    def bracketed(self, piece: _Piece, row: spell.Spelling, position: int) -> str:
        """An operand in brackets where it binds less than the operator around it."""
        if not row.infix or piece.level == ATOM:
            return piece.text
        tight = piece.level > row.infix or (piece.level == row.infix and position == 0 and row.infix in (SUM, PRODUCT))
        return piece.text if tight and row.infix != UNARY else f"({piece.text})"

    def short_results(self) -> bool:
        """Whether floats are stored, and all have 16 bits or fewer: integers may turn on any rounding."""
        stored = {self.tensor(op.tensor).dtype for op in every_op(self.kernel.ops) if isinstance(op, Store)}
        return bool(stored & FLOATS) and DType.F32 not in stored

    # --- ops ---------------------------------------------------------------------------------------------------------

    def op(self, op: Op) -> None:  # long because every kind of op has its arm
        self.learn(op)
        match op:
            case Load():
                self.load(op)
            case Let():
                self.let(op)
            case Mask():
                self.mask(op)
            case Keep():
                mask = self.text(Local(op.mask), op.axes)
                self.guarded(
                    op.edge and not self.always_edge, f"{op.name} = tl.where({mask}, {op.name}, {number(op.fill)})"
                )
            case Dot():
                self.dot(op)
            case Fold():
                self.line(f"{op.name} = {self.fold(op)}")
            case Scan():
                self.scan(op)
            case Redo():
                self.redo(op)
            case Seen():
                self.seen(op)
            case TopKept():
                self.top_k(op)
            case Carry():
                for target, new in op.pairs:
                    self.line(f"{target} = {new}")
            case Start():
                self.start(op)
            case Loop():
                self.loop(op)
            case Store():
                self.store(op)
            case _:
                assert_never(op)

    def learn(self, op: Op) -> None:
        """Remembers what an integer variable can be that is set once: division of what is never negative is short."""
        known = self.variable(op.name) if isinstance(op, (Let, Fold)) else None
        if not isinstance(op, (Let, Fold)) or known is None or known[1] in FLOATS or op.name in self.carried:
            return
        low, high = interval(op.expr, self.values_of)
        if isinstance(op, Let):
            self.reached[op.name] = low, high
        elif op.reducer in ("sum", "max", "min") and low >= 0:
            self.reached[op.name] = 0 if op.reducer == "sum" else low, ANY[1]

    def values_of(self, expr: Expr) -> Interval:
        """What a coordinate, a size or a variable can be, as far as it holds for every call."""
        match expr:
            case Rank():
                return 0, ANY[1]
            case Extent():
                return 1, ANY[1]  # nothing is launched for an extent of 0
            case Local() if expr.name in self.reached:
                return self.reached[expr.name]
            case Local() if (known := self.variable(expr.name)) is not None and known[1] not in FLOATS:
                return values_of(known[1])
            case _:
                return ANY

    def let(self, op: Let) -> None:
        """A variable for an expression, spread over the dimensions that it has not."""
        known = self.variable(op.name)
        self.wide = known is not None and known[1] is DType.F64
        text = self.text(op.expr, op.axes)
        had = self.piece(op.expr).axes
        if set(had) != set(op.axes) and not had:
            text = f"tl.full({self.dims(op.axes)}, {text}, {TYPES[known[1]] if known else 'tl.float32'})"
        elif set(had) != set(op.axes):
            text = f"tl.broadcast_to({text}, {self.dims(op.axes)})"
        if op.dtype is not None:
            text = self.converted(self.raw(op.expr, op.axes), op.dtype)
            text = f"{text}.to(tl.float32)" if self.portable and op.dtype is DType.BF16 else text
        self.line(f"{op.name} = {text}")
        self.wide = False

    def mask(self, op: Mask) -> None:
        """Where all tests hold: those of edges come behind those that always stand."""
        if self.always_edge or not op.edge:
            self.line(f"{op.name} = {self.all_of((*op.live, *op.edge), op.axes)}")
            return
        edge = self.all_of(op.edge, op.axes)
        if op.live:
            text = self.all_of(op.live, op.axes)
            tile = any(self.piece(test).axes for test in op.live)
            self.line(f"{op.name} = {text if tile else f'tl.broadcast_to({text}, {self.dims(op.axes)})'}")
            edge = f"{op.name} & {edge if len(op.edge) > 1 else self.enclosed(op.edge[0], op.axes)}"
        self.guarded(True, f"{op.name} = {edge}")

    def guarded(self, edge: bool, text: str) -> None:
        """A line that runs only where a tile is not whole; neighbours share one test."""
        if not edge:
            self.line(text)
            return
        if self.edge_end != (id(self.lines), len(self.lines)):
            self.line("if EDGE:")
        self.line(f"    {text}")
        self.edge_end = (id(self.lines), len(self.lines))

    def enclosed(self, expr: Expr, axes: Sequence[str]) -> str:
        piece = self.aligned(self.piece(expr), tuple(axes))
        return piece.text if piece.level == ATOM else f"({piece.text})"

    def all_of(self, tests: Sequence[Expr], axes: Sequence[str]) -> str:
        """That all tests hold; one alone needs no brackets.

        Those of one number choose between those of a tile and none: Triton's interpreter cannot join the two.
        """
        if len(tests) == 1:
            return self.text(tests[0], axes)
        single = [self.enclosed(test, ()) for test in tests if not self.piece(test).axes]
        tiles = [self.enclosed(test, axes) for test in tests if self.piece(test).axes]
        if single and tiles:
            return f"tl.where({' & '.join(single)}, {' & '.join(tiles)}, False)"
        return " & ".join(single or tiles)

    def raw(self, expr: Expr, axes: Sequence[str]) -> str:
        """An expression that is about to be converted: data is not widened first."""
        known = self.variable(expr.name) if isinstance(expr, Local) else None
        return expr.name if isinstance(expr, Local) and known and known[0] == axes else self.enclosed(expr, axes)

    def converted(self, atom: str, dtype: DType) -> str:
        """An operand brought to a type."""
        if self.portable and dtype is DType.BF16:
            self.helpers.setdefault("to_bf16")
            return f"to_bf16({atom})"
        return f"{atom}.to({TYPES[dtype]})"

    def start(self, op: Start) -> None:
        known = self.variable(op.name)
        assert known is not None
        kind = TYPES[known[1]]
        zeros = f"tl.zeros({self.dims(op.axes)}, {kind})"
        if isinstance(op.value, Const):
            zero = op.axes and op.value.value == 0 and known[1] is not DType.BOOL
            shape = self.dims(op.axes) if op.axes else "[]"
            text = zeros if zero else f"tl.full({shape}, {number(op.value.value)}, {kind})"
        else:
            text = f"{zeros} + {self.enclosed(op.value, op.axes)}" if op.axes else self.text(op.value, ())
        self.line(f"{op.name} = {text}")

    def dot(self, op: Dot) -> None:
        """A matrix product; operands are turned where they lie the other way in memory."""
        left = self.operand(op, op.left, (op.axes[0], op.over))
        right = self.operand(op, op.right, (op.over, op.axes[1]))
        plain = f"{op.name} = {self.product(op, left, right)}"
        if op.live is None:
            self.line(plain)
            return
        self.helpers.setdefault("dot_present")
        live = self.text(Local(op.live), (op.axes[0], op.over))
        before = op.name if op.into else f"tl.zeros({self.dims(op.axes)}, {self.summed(op)})"
        careful = f"{op.name} = dot_present({left}, {right}, {live}, {before})"
        if op.edge and not self.always_edge:
            for line in ("if EDGE:", f"    {careful}", "else:", f"    {plain}"):
                self.line(line)
        else:
            self.line(careful)

    def product(self, op: Dot, left: str, right: str) -> str:
        """A product, added to what is there; one in full precision is multiplied and summed in f64."""
        kind = f", out_dtype={self.summed(op)}" if op.exact else ""
        return f"tl.dot({left}, {right}{f', {op.name}' if op.into else ''}{kind})"

    def summed(self, op: Dot) -> str:
        """The type in which a product is summed."""
        return TYPES[DType.F64 if op.exact else DType.F32]

    def operand(self, op: Dot, name: str, axes: tuple[str, str]) -> str:
        known = self.variable(name)
        assert known is not None
        text = f"{name}.to(tl.float32)" if self.portable and known[1] is DType.BF16 else name
        if op.exact:
            text = self.settled(name) if name in short_sources(self.kernel) else self.converted(name, DType.F64)
        return text if known[0] == axes else f"{text}.T"

    def settled(self, name: str) -> str:
        """An operand in f64 from which a compiler does not see in how many bits its elements were loaded.

        One from before the loop is made to depend on its round: else it is converted before, and takes as many
        registers as all sums.
        """
        self.helpers.setdefault("settled")
        before = self.around is not None and name not in {getattr(op, "name", "") for op in every_op(self.around.body)}
        if self.around is not None and before:
            name = f"tl.where({self.rank(self.around.rank)}_first >= 0, {name}, 0.0)"
        return f"settled({self.converted(name, DType.F64)})"

    def fold(self, op: Fold) -> str:
        """A reduction along some dimensions, the last first."""
        piece = self.piece(op.expr)
        inner = self.order(set(piece.axes) | set(op.axes) | set(op.over))
        inner = piece.axes if set(piece.axes) == set(inner) else inner
        missing = set(inner) - set(piece.axes)
        text = self.aligned(piece, inner).text
        if missing & set(op.over) or len(inner) > len(piece.axes):
            text = f"tl.broadcast_to({text}, {self.dims(inner)})"
        if op.reducer == "last":
            block = self.block(op.over[0])
            at_end = self.aligned(_Piece(f"tl.arange(0, {block}) == {block} - 1", op.over, COMPARE), inner).text
            text = f"tl.where({at_end}, {text}, 0)"
        axes = list(inner)
        for rank in sorted(op.over, key=axes.index, reverse=True):
            if op.reducer == "sum" and piece.real and self.kernel.exact:
                text = self.apart(text, axes, rank)
            else:
                text = self.along(op, text, axes.index(rank))
            axes.remove(rank)
        if op.reducer in ("any", "all"):
            text = f"{text} > 0"
        return text if tuple(axes) == op.axes else self.aligned(_Piece(text, tuple(axes)), op.axes).text

    def apart(self, text: str, axes: Sequence[str], rank: str) -> str:
        """A sum in full precision: elements far apart are added first, in short chains; threads join theirs in f64.

        Triton would add up a chain of all elements of a thread, then neighbours: along a row that rises or falls sums
        of neighbours are large, and so are their roundings. The many chains of threads round independently, which
        averages out; the few additions that join them, and neighbours, would each be seen in the whole. What is short
        has such additions only; between products, whose operands have the registers, it is summed as it is.
        """
        place, block, tile = axes.index(rank), self.block(rank), self.kernel.axis(rank).tile
        multiplies = any(isinstance(each, Dot) for each in every_op(self.kernel.ops))
        if tile <= WARP * VECTOR and self.around is not None and multiplies:
            return f"tl.sum({text}, {place})"
        short = f"tl.sum({text if text.isidentifier() else f'({text})'}.to(tl.float64), {place}).to(tl.float32)"
        if tile <= WARP * VECTOR:
            return short
        threads = min(WARP * self.kernel.options.num_warps, tile // VECTOR)
        levels = [min(CHAIN, tile // (threads * VECTOR))]
        while (left := tile // (threads * VECTOR * math.prod(levels))) > 1:
            levels.append(min(CHAIN, left))
        shape, least = [self.block(other) for other in axes], tile // levels[0]
        shape[place : place + 1] = [f"{block} // {least}", *map(str, levels[1:]), str(threads), str(VECTOR)]
        summed = f"tl.reshape({text}, [{', '.join(shape)}])"
        for _ in levels:
            summed = f"tl.sum({summed}, {place})"
        summed = f"tl.sum(tl.sum({summed}.to(tl.float64), {place + 1}), {place}).to(tl.float32)"
        axis = self.kernel.axis(rank)
        varies = axis.role is Role.WHOLE and not isinstance(axis.extent, int)  # a file has tiles for other lengths too
        return f"({summed} if {block} >= {least} else {short})" if varies else summed

    def scan(self, op: Scan) -> None:
        """Steps composed along a dimension, in order."""
        place = op.axes.index(op.over)
        if op.kind == "sum":
            self.line(f"{op.names[0]} = tl.cumsum({op.elements[0]}, {place})")
            return
        helper = {"max": "larger", "min": "smaller", "affine": "composed", "drift": "drifted"}[op.kind]
        self.helpers.setdefault(helper)
        elements = op.elements[0] if len(op.elements) == 1 else f"({', '.join(op.elements)})"
        self.line(f"{', '.join(op.names)} = tl.associative_scan({elements}, {place}, {helper})")

    def redo(self, op: Redo) -> None:
        """The steps of a tile one by one, where not all that was composed is finite."""
        finite = f'(tl.abs({op.name}) < float("inf")).to(tl.int32)'
        for position in reversed(range(len(op.axes))):
            finite = f"tl.min({finite}, {position})"
        rank, block, axis = self.rank(op.over), self.block(op.over), self.kernel.axis(op.over)
        left = self.size(axis.extent) if axis.role is Role.WHOLE else f"{self.size(axis.extent)} - {rank}_first"
        count = block if axis.exact else f"tl.minimum({block}, {left})"
        self.line(f"if {finite} == 0:  # data, or a product of factors that no step has: one by one")
        self.depth += 1
        self.line(f"{op.after} = {op.before}")
        self.line(f"for {rank}_next in range({count}):")
        self.depth += 1
        self.line(f"{rank}_here = tl.arange(0, {block}) == {rank}_next")
        here = _Piece(f"{rank}_here", (op.over,), ATOM, False)
        for one, tile in op.picks:
            known = self.variable(tile)
            assert known is not None
            chosen, place = self.aligned(here, known[0]).text, known[0].index(op.over)
            truth = known[1] is DType.BOOL
            found = f"tl.sum(tl.where({chosen}, {tile}{'.to(tl.int32)' if truth else ''}, 0), {place})"
            self.line(f"{one} = {found}{' > 0' if truth else ''}")
        rows = tuple(other for other in op.axes if other != op.over)
        self.line(f"{op.after} = {self.text(op.expr, rows)}")
        step = self.aligned(self.piece(Local(op.after)), op.axes).text
        self.line(f"{op.name} = tl.where({self.aligned(here, op.axes).text}, {step}, {op.name})")
        self.depth -= 2

    def seen(self, op: Seen) -> None:
        """Whether anything was present so far; in a whole tile everything is, as far as that is asked at edges."""
        found = f"({op.mask}).to(tl.int32)"
        known = self.variable(op.mask)
        assert known is not None
        axes = list(known[0])
        for rank in sorted(op.over, key=axes.index, reverse=True):
            found = f"tl.max({found}, {axes.index(rank)})"
            axes.remove(rank)
        tested = f"{op.name} = {op.name} | ({found} > 0)"
        if self.always_edge or not op.edge:
            self.line(tested)
            return
        for line in ("if EDGE:", f"    {tested}", "else:", f"    {op.name} = {op.name} | True"):
            self.line(line)

    def any_unset(self, flags: str) -> str:
        """That some of these flags is not set."""
        known = self.variable(flags)
        assert known is not None
        text = f"{flags}.to(tl.int32)"
        for axis in reversed(range(len(known[0]))):
            text = f"tl.min({text}, {axis})"
        return f"{text} == 0"

    def along(self, op: Fold, text: str, axis: int) -> str:
        match op.reducer:
            case "sum" | "last":
                return f"tl.sum({text}, {axis})"
            case "max" | "min" if op.nan:
                helper = {"max": "larger", "min": "smaller"}[op.reducer]
                self.helpers.setdefault(helper)
                return f"tl.reduce({text}, {axis}, {helper})"
            case "max" | "min":
                return f"tl.{op.reducer}({text}, {axis})"
            case "any" | "all":
                reduce = {"any": "max", "all": "min"}[op.reducer]
                return f"tl.{reduce}(({text}).to(tl.int32), {axis})"
            case _:
                self.helpers.setdefault("times")
                return f"tl.reduce({text}, {axis}, times)"

    def top_k(self, op: TopKept) -> None:
        """The largest one after the other: value and coordinate in one integer, so that a maximum is also its place."""
        known = self.variable(op.source)
        assert known is not None
        axes, dtype = known
        short = op.bits == 16 and dtype in (DType.BF16, DType.F16)
        wide, shift = ("tl.int32", 16) if short else ("tl.int64", 32)
        key, column = f"{op.values}_key", self.text(Rank(op.over), axes)
        base = op.source if short else self.text(Local(op.source), axes)
        number = f"({base} + 0.0)"  # of one zero, and on a GPU of one NaN; a CPU keeps the sign of a NaN
        if self.portable:  # whose bf16 has no arithmetic
            zero = f"({base}.to(tl.float32) + 0.0).to({TYPES[dtype]})" if short else f"{base} + 0.0"
            number = f'tl.where({base} == {base}, {zero}, float("nan"))'
        bits = f"{number}.to(tl.int{16 if short else 32}, bitcast=True)" + (".to(tl.int32)" if short else "")
        low = "0x7FFF" if short else "0x7FFFFFFF"
        size = self.block(op.over)
        self.line("# an integer whose order is that of the values, the lower coordinate first among equals")
        least = "-2147483648" if short else "-9223372036854775808"
        self.line(f"{key} = {bits}")
        self.line(f"{key} = {key} ^ (({key} >> 31) & {low})")
        self.line(f"{key} = tl.where({base} == {base}, {key}, {low})  # a NaN, of any sign, is the largest")
        self.line(f"{key} = ({key}.to({wide}) << {shift}) | ({size} - 1 - {column})")
        if op.live is not None:
            self.line(f"{key} = tl.where({self.text(Local(op.live), axes)}, {key}, {least})")
        count = f"{op.values}_best"
        self.line(f"{count} = tl.zeros({self.dims(op.axes)}, {wide})")
        self.take_largest(op, axes, (key, count, least))
        if op.there is not None:
            self.line(f"{op.there} = {count} != {least}")
        self.line(f"{op.coords} = ({size} - 1 - ({count} & {hex((1 << shift) - 1)})).to(tl.int32)")
        value = f"({count} >> {shift}).to(tl.int32)"
        self.line(f"{op.values}_bits = {value}")
        self.line(f"{op.values}_bits = {op.values}_bits ^ (({op.values}_bits >> 31) & {low})")
        if short:
            self.line(f"{op.values} = {op.values}_bits.to(tl.int16).to({TYPES[dtype]}, bitcast=True).to(tl.float32)")
        else:
            self.line(f"{op.values} = {op.values}_bits.to(tl.float32, bitcast=True)")

    def take_largest(self, op: TopKept, axes: tuple[str, ...], names: tuple[str, str, str]) -> None:
        """The `count` largest keys, sorted: out of sorted eights, or of all of them again and again."""
        key, best, least = names
        kept = self.text(Rank(op.kept), op.axes)
        if in_eights(self.kernel, op) and not self.one_by_one:
            self.helpers.setdefault("largest")
            row, back = ("", "") if len(axes) > 1 else ("[None, :]", f".reshape({self.block(op.kept)})")
            self.line(f"{best} = largest({key}{row}, {best}{row}, {kept}{row}, {op.count}, {least}){back}")
            return
        marks = ", ".join("None" if r == op.over else ":" for r in axes)
        back = ", ".join("None" if r == op.kept else ":" for r in op.axes)
        top_in, top_out = (f"top[{marks}]", f"top[{back}]") if len(axes) > 1 else ("top", "top")
        self.line(f"for i in tl.static_range({op.count}):")
        self.line(f"    top = tl.max({key}, {axes.index(op.over)})")
        self.line(f"    {best} = tl.where({kept} == i, {top_out}, {best})")
        self.line(f"    {key} = tl.where({key} == {top_in}, {least}, {key})")

    # --- loops -------------------------------------------------------------------------------------------------------

    def loop(self, op: Loop) -> None:
        """The tiles of a stream: one loop, or a function that is called for the edges and for whole tiles."""
        rank, block = self.rank(op.rank), self.block(op.rank)
        axis = self.kernel.axis(op.rank)
        size = self.size(axis.extent)
        start = "0" if op.first is None else self.first_tile(op.first, block, size)
        if axis.role is Role.INNER:
            self.assume(f"{size} > 0")
            self.one_loop(op, "0", size)
            return
        stop = size if op.stop is None else f"tl.minimum({self.bound(op.stop, size)}, {size})"
        if op.unless is not None:
            self.line(f"if {self.any_unset(op.unless)}:  # some rows saw nothing, or nothing but what they began as")
            self.depth += 1
            self.one_loop(op, start, stop)
            self.depth -= 1
            return
        if self.one_by_one or not op.edges or op.inner is None or not self.tells_edges(op):
            if op.stop is None and op.first is None and not isinstance(axis.extent, int):
                self.assume(f"{size} > 0")
            self.one_loop(op, start, stop)
            return
        self.line(f"{rank}_from, {rank}_to = {start}, {stop}")
        first, last = op.inner
        begin = f"{rank}_from"
        if first is not None:
            begin = f"tl.maximum(tl.cdiv({self.bound(first, size)}, {block}) * {block}, {rank}_from)"
            begin = f"tl.minimum({begin}, tl.cdiv({rank}_to, {block}) * {block})"
        end = f"{rank}_to" if last is None else f"tl.minimum({self.bound(last, size)}, {rank}_to)"
        self.line(f"whole_from = {begin}")
        self.line(f"whole_to = tl.maximum({end} // {block} * {block}, whole_from)")
        name, words = self.body_function(op)
        small = self.edge_words(op, words)
        states = ", ".join(op.carried)
        calls = [(f"{rank}_from", "whole_from", True)] if first is not None else []
        calls += [("whole_from", "whole_to", False), ("whole_to", f"{rank}_to", True)]
        for low, high, edge in reversed(calls) if op.backwards else calls:
            head = f"{states} = {name}(" if states else f"{name}("
            for text in wrapped(head, [*(small if edge else words), low, high, f"EDGE={edge}"], ")"):
                self.line(text)

    def first_tile(self, expr: Expr, block: str, size: str) -> str:
        """Where a loop begins: with a whole tile, or behind the stream where it has none."""
        text = f"tl.maximum({self.text(expr, ())}, 0) // {block} * {block}"
        return f"tl.cast(tl.minimum({text}, {size}), tl.int32)" if self.is_wide(expr) else text

    def bound(self, expr: Expr, size: str) -> str:
        """An end of a loop. One that needs 64 bits is brought to where the stream is: coordinates have 32."""
        text = self.text(expr, ())
        return f"tl.cast(tl.minimum(tl.maximum({text}, 0), {size}), tl.int32)" if self.is_wide(expr) else text

    def is_wide(self, expr: Expr) -> bool:
        """Whether an integer may have 64 bits."""
        return any(
            (isinstance(node, Cast) and node.dtype is DType.I64)
            or (isinstance(node, Local) and (known := self.variable(node.name)) is not None and known[1] is DType.I64)
            for node in walk(expr)
        )

    def assume(self, fact: str) -> None:
        """A fact that the compiler may use: where it is wanted, but outside of loops."""
        if not self.kernel.options.resident and self.around is None:
            self.line(f"tl.assume({fact})")
        elif (line := f"    tl.assume({fact})") not in self.assumed:
            self.assumed.append(line)

    def in_pieces(self, end: Ending) -> None:
        """What follows the loop as a function, called for the columns of each piece after the other."""
        axis, pieces = self.kernel.axis(end.rank), self.kernel.options.pieces
        rank, block = self.rank(end.rank), self.block(end.rank)
        narrow = self.argument(Argument(f"PIECE_{end.rank.upper()}", "constant", value=axis.tile // pieces))
        name, words = self.end_function(end)
        parts = {name: [f"{name}_piece_{number}" for number in range(pieces)] for name in end.crossing}
        for whole, names in parts.items():
            self.helpers.setdefault("halves")
            known, width = {0: whole}, pieces
            while width > 1:
                width //= 2
                for begin in list(known):
                    self.line(f"{names[begin]}, {names[begin + width]} = halves({known[begin]})")
                    known |= {begin: names[begin], begin + width: names[begin + width]}
        for number in range(pieces):
            shift = {0: "", 1: f" + {narrow}"}.get(number, f" + {number} * {narrow}")
            of_piece = {whole: names[number] for whole, names in parts.items()}
            of_piece |= {f"{rank}_first": f"{rank}_first{shift}", block: narrow}
            for line in wrapped(f"{name}(", [of_piece.get(word, word) for word in words], ")"):
                self.line(line)

    def end_function(self, end: Ending) -> tuple[str, list[str]]:
        """What follows the loop as a function of its own, for fewer columns, and the variables that it takes."""
        axis, rank = self.kernel.axis(end.rank), self.rank(end.rank)
        outside, self.lines, depth, self.depth = self.lines, [], self.depth, 1
        for op in end.ops:
            self.op(self.narrowed(op, end.rank))
        body, self.lines = self.lines, []
        self.within(axis, set(re.findall(r"\w+", "\n".join(body))))
        body, self.lines, self.depth = [*self.lines, *body], outside, depth
        own = {op.name for op in end.ops if isinstance(op, (Let, Load, Mask))} | {rank, f"{rank}_last"}
        outer = self.taken(body, own, (*end.crossing, f"{rank}_first"))
        constants = list(dict.fromkeys([*self.constants(body), self.block(end.rank)]))
        name = f"{self.kernel.name}_end"
        heads = [*outer, *(f"{c}: tl.constexpr" for c in constants)]
        self.functions.extend(["", "@triton.jit", *wrapped(f"def {name}(", heads, "):"), *body, ""])
        return name, [*outer, *constants]

    def narrowed(self, op: Op, rank: str) -> Op:
        """An op that copies a box, with a box of fewer columns."""
        if not isinstance(op, (Load, Store)) or op.box is None:
            return op
        less = self.kernel.options.pieces
        pairs = zip(op.index, op.box, strict=True)
        return replace(op, box=tuple(size // less if part == Rank(rank) else size for part, size in pairs))

    def taken(self, body: Sequence[str], own: set[str], first: Sequence[str]) -> list[str]:
        """The variables that the lines of a function take from outside, those of `first` in front."""
        known = {name for name, _, _ in self.kernel.variables} | set(self.arguments) | self.place_names()
        words = dict.fromkeys(re.findall(r"(?<![.\w])[A-Za-z_]\w*", "\n".join(body)))
        more = [w for w in words if w in known and w not in own and w not in first and not self.is_constant(w)]
        return [*first, *more]

    def constants(self, body: Sequence[str]) -> list[str]:
        """The constants that the lines of a function mention."""
        words = dict.fromkeys(re.findall(r"(?<![.\w])[A-Za-z_]\w*", "\n".join(body)))
        return [word for word in words if self.is_constant(word)]

    def tells_edges(self, op: Loop) -> bool:
        """Whether the body tests anything at the edges: what comes by descriptor is 0 beyond the extent as it is."""
        return any(re.search(r"\bEDGE\b", line) for line in self.captured(op))

    def edge_words(self, op: Loop, words: Sequence[str]) -> list[str]:
        """The arguments of the loop's function where it goes in smaller steps: other boxes, another tile."""
        if not op.edge_tile:
            return list(words)
        axis = self.kernel.axis(op.rank)
        found = {self.block(op.rank): f"EDGE_{op.rank.upper()}"}
        self.argument(Argument(f"EDGE_{op.rank.upper()}", "constant", value=op.edge_tile))
        for access in every_op(op.body):
            if isinstance(access, Load | Store) and access.box is not None and op.rank in access.axes:
                box = tuple(
                    op.edge_tile if part == Rank(op.rank) else size
                    for part, size in zip(access.index, access.box, strict=True)
                )
                tensor = self.tensor(access.tensor)
                found[self.descriptor(tensor, access.box)] = self.descriptor(tensor, box)
        assert axis.tile % op.edge_tile == 0
        return [found.get(word, word) for word in words]

    def one_loop(self, op: Loop, start: str, stop: str) -> None:
        rank = self.rank(op.rank)
        for number, line in enumerate(self.steps(op, start, stop)):
            self.line("    " * bool(number) + line)
        self.depth += 1
        before, self.always_edge = self.always_edge, self.always_edge or self.kernel.axis(op.rank).role is Role.STREAM
        body = self.captured(op)
        if re.search(rf"\b{rank}\b", "\n".join(body)):
            self.line(self.whereabouts(self.kernel.axis(op.rank)))
        self.lines.extend(body)
        self.always_edge = before
        self.depth -= 1

    def steps(self, op: Loop, start: str, stop: str) -> list[str]:
        """The head of a loop; backwards it begins with the last tile."""
        rank, block = self.rank(op.rank), self.block(op.rank)
        joined = ", flatten=True" if any(isinstance(inner, Loop) for inner in op.body) else ""
        at = f"{rank}_first" if op.strip is None else f"{rank}_at"
        place = [] if op.strip is None else [f"{rank}_first = {self.in_row(op.strip, at)}"]
        if not op.backwards:
            return [f"for {at} in tl.range({start}, {stop}, {block}{joined}):", *place]
        last = f"({stop} - 1) // {block} * {block}"
        back = f"{rank}_back" if start == "0" else f"({rank}_back - {start})"
        return [f"for {rank}_back in tl.range({start}, {stop}, {block}):", f"{at} = {last} - {back}", *place]

    def in_row(self, strip: Strip, at: str) -> str:
        """Where the tile begins that a strip has at some place of it."""
        row, first, length = (self.text(part, ()) for part in (strip.row, strip.first, strip.length))
        row = f"({row} + {at} // {length})" if row != "0" else f"{at} // {length}"
        return " + ".join([f"{row} * {strip.width}", *([first] if first != "0" else []), f"{at} % {length}"])

    def whereabouts(self, axis: Axis) -> str:
        """The coordinates of the tile at hand."""
        rank = self.rank(axis.rank)
        more = "" if axis.single else f" + tl.arange(0, {self.block(axis.rank)})"
        return f"{rank} = {rank}_first{more}"

    def captured(self, op: Loop) -> list[str]:
        """The lines of a loop's body."""
        outside, self.lines = self.lines, []
        outer, self.around = self.around, op
        for inner in op.body:
            self.op(inner)
        found, self.lines, self.around = self.lines, outside, outer
        return found

    def body_function(self, op: Loop) -> tuple[str, list[str]]:
        """The loop as a function of its own, and the variables that it takes from outside."""
        rank, block = self.rank(op.rank), self.block(op.rank)
        depth, self.depth = self.depth, 2
        body = self.captured(op)
        self.depth = depth
        if re.search(rf"\b{rank}\b", "\n".join(body)):
            body.insert(0, "        " + self.whereabouts(self.kernel.axis(op.rank)))
        every = tuple(every_op(op.body))
        made = {inner.name for inner in every if isinstance(inner, (Load, Let, Mask, Dot, Fold))}
        for inner in every:
            if isinstance(inner, TopKept):
                made |= {inner.values, inner.coords, *((inner.there,) if inner.there else ())}
        made -= set(op.carried)
        made |= {name for inner in every if isinstance(inner, Scan) for name in inner.names}
        made |= {one for inner in every if isinstance(inner, Redo) for one, _ in inner.picks}
        for inner in every:
            if isinstance(inner, Loop):
                made |= {*inner.carried, self.rank(inner.rank), f"{self.rank(inner.rank)}_first"}
        outer = self.taken(body, made | {rank, f"{rank}_first"}, op.carried)
        constants = list(dict.fromkeys([*self.constants(body), block]))
        number_ = 1 + sum(line.startswith("def ") for line in "\n".join(self.functions).split("\n"))
        name = f"{self.kernel.name}_{rank}" + (f"_{number_}" if number_ > 1 else "")
        heads = [*outer, *(f"{c}: tl.constexpr" for c in constants), f"{rank}_from", f"{rank}_to", "EDGE: tl.constexpr"]
        lines = ["", "@triton.jit", *wrapped(f"def {name}(", heads, "):")]
        for number, line in enumerate(self.steps(op, f"{rank}_from", f"{rank}_to")):
            lines.append("    " * (1 + bool(number)) + line)
        lines.extend(body)
        if op.carried:
            lines.append(f"    return {', '.join(op.carried)}")
        self.functions.extend([*lines, ""])
        return name, [*outer, *constants]

    def place_names(self) -> set[str]:
        """The names of coordinates that a kernel has outside its loops."""
        found: set[str] = set()
        for axis in self.kernel.axes:
            rank = self.rank(axis.rank)
            found |= {rank, f"{rank}_first", f"{rank}_last", f"{rank}_part"}
        return found

    def is_constant(self, word: str) -> bool:
        known = self.arguments.get(word)
        return known is not None and known.kind == "constant"

    # --- memory ------------------------------------------------------------------------------------------------------

    def load(self, op: Load) -> None:
        """A tile by its descriptor, or by pointers; by pointers where tests stand, at the edges or everywhere."""
        by_box = op.box is not None and not op.live and not (op.edge and self.always_edge)
        if op.box is not None and by_box and not op.edge:
            self.line(self.boxed(op, op.box))
            return
        self.grouped_by = op.grouped
        self.by_pointers(op, by_box)
        self.grouped_by = None
        self.repeat(op)

    def by_pointers(self, op: Load, by_box: bool) -> None:
        """A tile by the addresses of its elements, in whole tiles `by_box`; of groups that share one, one for each."""
        place = self.address(self.tensor(op.tensor), op.index, op.axes)
        if op.axes:
            self.line(f"{op.name}_place = {place}")
            place = f"{op.name}_place"
        tested = self.pointed(op, place, (*op.live, *op.edge))
        if not op.edge or self.always_edge:
            self.line(tested)
            return
        plain = self.boxed(op, op.box) if op.box is not None and by_box else self.pointed(op, place, op.live)
        for line in ("if EDGE:", f"    {tested}", "else:", f"    {plain}"):
            self.line(line)

    def repeat(self, op: Load) -> None:
        """Each element beside itself until it stands for its group: nothing leaves a thread's registers.

        In a row of them it is spread over the threads that ask for it, instead of one thread having them all.
        """
        if op.grouped is None:
            return
        (rank, left), last = op.grouped, len(op.axes)
        if last == 1:
            (few,), (all_,) = self.blocks(op.axes, op.grouped), self.blocks(op.axes)
            self.line(f"{op.name} = tl.broadcast_to({op.name}[:, None], [{few}, {left}]).reshape({all_})")
            return
        order = list(range(last))
        order.insert(op.axes.index(rank) + 1, last)
        while left > 1:
            left //= 2
            text = f"tl.join({op.name}, {op.name})"
            text = text if order[-1] == last else f"tl.permute({text}, ({', '.join(map(str, order))}))"
            self.line(f"{op.name} = {text}.reshape({', '.join(self.blocks(op.axes, (rank, left)))})")

    def blocks(self, axes: Sequence[str], group: tuple[str, int] | None = None) -> list[str]:
        """The extents of a tile; of one rank that of groups of neighbours."""
        rank, size = group or ("", 1)
        return [self.block(axis) + (f" // {size}" if axis == rank and size > 1 else "") for axis in axes]

    def boxed(self, op: Load, box: tuple[int, ...]) -> str:
        """A tile by its descriptor; dimensions of one coordinate are dropped."""
        shape = ", ".join(self.block(rank) for rank in op.axes)
        text = f"{self.descriptor(self.tensor(op.tensor), box)}.load([{', '.join(self.corner(op.index, box))}])"
        return f"{op.name} = {text}" + (f".reshape({shape})" if rearranged(box, op.axes) else "")

    def pointed(self, op: Load, place: str, tests: Sequence[Expr]) -> str:
        """A tile by the addresses of its elements, 0 where a test fails."""
        tensor = self.tensor(op.tensor)
        policy = f', eviction_policy="{op.evict}"' if op.evict else ""
        if not tests:
            return f"{op.name} = tl.load({place}{policy})"
        other = "False" if tensor.dtype is DType.BOOL else "0.0" if tensor.dtype in FLOATS else "0"
        mask = self.all_of(tests, op.axes)
        return f"{op.name} = tl.load({place}, mask={mask}, other={other}{policy})"

    def descriptor(self, tensor: Tensor, box: tuple[int, ...]) -> str:
        """The name of a descriptor; one more for each other box of the same tensor."""
        others = [a for a in self.arguments.values() if a.kind == "descriptor" and a.tensor == tensor.name]
        for known in others:
            if known.box == box:
                return known.name
        name = f"{tensor.name}_desc" + (f"_{len(others) + 1}" if others else "")
        return self.argument(Argument(name, "descriptor", tensor.name, box=box))

    def corner(self, index: Sequence[Expr], box: tuple[int, ...]) -> list[str]:
        """Where a box begins, in the order of the descriptor's dimensions."""
        found = []
        for part in (index[position] for position in permutation(box)):
            if isinstance(part, Rank):
                axis = self.kernel.axis(part.name)
                rank = self.rank(part.name)
                named = {Role.POINT: rank, Role.WHOLE: "0"}
                found.append(named.get(axis.role, f"{rank}_first"))
            else:
                found.append(self.beginning(part))
        return found

    def beginning(self, part: Expr) -> str:
        """Where a box begins along a shifted or computed index."""
        if isinstance(part, Apply) and part.op == "add" and isinstance(part.args[0], Rank):
            axis = self.kernel.axis(part.args[0].name)
            if not axis.single:
                shift = self.text(part.args[1], ())
                return shift if axis.role is Role.WHOLE else f"{self.rank(axis.rank)}_first + {shift}"
        return self.text(part, ())

    def quotient(self, expr: Expr) -> str | None:
        """A quotient that is one number for a whole tile, taken at its first coordinate; None for anything else."""
        if not isinstance(expr, Apply) or expr.op != "floordiv" or not isinstance(expr.args[0], Rank):
            return None
        axis, by = self.kernel.axis(expr.args[0].name), expr.args[1]
        if axis.role not in (Role.TILE, Role.STREAM) or not isinstance(by, Const) or int(by.value) % axis.advance:
            return None
        return f"{self.rank(axis.rank)}_first // {by.value}"

    def address(self, tensor: Tensor, index: Sequence[Expr], axes: Sequence[str]) -> str:
        """The addresses of a tile: offsets of 64 bits where a stride multiplies, the contiguous dimension last."""
        base = self.argument(Argument(f"{tensor.name}_ptr", "pointer", tensor.name))
        terms: list[tuple[int, str]] = []
        for position, part in enumerate(index):
            stride = tensor.strides[position]
            if stride == 0 or part == Const(0):
                continue
            piece = self.piece(part)
            step = f"{tensor.name}_{position}" if stride is None else str(stride)
            if stride is None:
                self.argument(Argument(step, "stride", tensor.name, position))
            if stride != 1:
                atom = piece.text if piece.level == ATOM else f"({piece.text})"
                if self.counts(part) and not piece.axes:  # a number of the interpreter's loop, that has no methods
                    atom = f"tl.cast({piece.text}, tl.int64)"
                wide = atom if atom.endswith("int64)") or atom.isdigit() else f"{atom}.to(tl.int64)"
                piece = _Piece(f"{wide} * {step}", piece.axes, PRODUCT)
            terms.append((len(piece.axes), self.aligned(piece, tuple(axes)).text))
        terms.sort(key=lambda term: term[0])
        place = " + ".join([base, *(text for _, text in terms)])
        covered = {rank for part in index for rank in self.piece(part).axes if stepped(tensor, index, part)}
        return place if covered >= set(axes) or not axes else f"tl.broadcast_to({place}, {self.dims(axes)})"

    def counts(self, part: Expr) -> bool:
        """Whether a coordinate comes of a loop."""
        return any(isinstance(n, Rank) and self.kernel.axis(n.name).role is Role.STREAM for n in walk(part))

    def store(self, op: Store) -> None:
        tensor = self.tensor(op.tensor)
        expr = self.enclosed(op.expr, op.axes)
        if op.live:
            whole = isinstance(op.expr, Const) and type(op.expr.value) is int and tensor.dtype not in FLOATS
            chosen = self.text(Cast(tensor.dtype, op.expr) if whole else op.expr, op.axes)  # two numbers have no type
            expr = f"tl.where({self.all_of(op.live, op.axes)}, {chosen}, {number(op.fill)})"
        piece = self.piece(op.expr)
        if piece.axes != op.axes and set(piece.axes) != set(op.axes) and op.axes:
            expr = f"tl.broadcast_to({expr}, {self.dims(op.axes)})"
        value = self.cast(expr, tensor.dtype, op)
        if op.box is not None:
            shape = f".reshape({', '.join(self.box_dims(op))})" if rearranged(op.box, op.axes) else ""
            self.line(
                f"{self.descriptor(tensor, op.box)}.store([{', '.join(self.corner(op.index, op.box))}], {value}{shape})"
            )
            return
        tests = [*(test for rank in op.axes for test in self.own(rank)), *op.only]
        more = f", mask={self.all_of(tests, op.axes)}" if tests else ""
        more += ', cache_modifier=".cs"' if op.passing else ""
        place = self.address(tensor, op.index, op.axes)
        if op.axes:
            self.line(f"{op.tensor}_place = {place}")
            place = f"{op.tensor}_place"
        self.line(f"tl.store({place}, {value}{more})")

    def own(self, rank: str) -> Iterator[Expr]:
        """The tests that a coordinate of a tile is one of the program's."""
        axis = self.kernel.axis(rank)
        if axis.step:
            yield Apply("lt", (Rank(rank), Apply("add", (Local(f"{rank}_first"), Const(axis.step)))))
        if not axis.exact:
            yield Apply("lt", (Rank(rank), extent_expr(axis.extent)))

    def box_dims(self, op: Store) -> list[str]:
        """The shape of a box, as it is written."""
        found = []
        assert op.box is not None
        for part in (op.index[position] for position in permutation(op.box)):
            axis = self.kernel.axis(part.name) if isinstance(part, Rank) else None
            found.append("1" if axis is None or axis.role is Role.POINT else self.block(axis.rank))
        return found

    def cast(self, text: str, dtype: DType, op: Store) -> str:
        known = self.variable(op.expr.name) if isinstance(op.expr, Local) else None
        if (isinstance(op.expr, Const) and not op.live) or (known is None and not re.search(r"[A-Za-z_]", text)):
            return text if not op.axes else f"tl.full({self.dims(op.axes)}, {text}, {TYPES[dtype]})"
        if known is not None and known[1] is dtype and not op.live:
            return op.expr.name if isinstance(op.expr, Local) and known[0] == op.axes else text
        return self.converted(text, dtype)


# --- text ------------------------------------------------------------------------------------------------------------


def stepped(tensor: Tensor, index: Sequence[Expr], part: Expr) -> bool:
    """Whether moving along an index moves in memory."""
    return any(stride != 0 for other, stride in zip(index, tensor.strides, strict=True) if other is part)


def permutation(box: Sequence[int]) -> tuple[int, ...]:
    """The order of a descriptor's dimensions: those of which a box has one coordinate stand in front.

    A tile whose rows are neighbours goes into shared memory as it is; with a dimension of one between them a left
    operand would be taken through registers.
    """
    return tuple(sorted(range(len(box)), key=lambda position: box[position] > 1))


def rearranged(box: Sequence[int], axes: Sequence[str]) -> bool:
    """Whether a tile has not the dimensions of its box, or those of one coordinate elsewhere."""
    return len(box) != len(axes) or permutation(box) != tuple(range(len(box)))


def number(value: float | int | bool) -> str:
    """A number as Triton reads it."""
    if isinstance(value, (bool, int)):
        return str(value)
    if value != value:
        return 'float("nan")'
    if value in (float("inf"), float("-inf")):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    return repr(value)


def wrapped(head: str, words: Sequence[str], tail: str, width: int = 110) -> list[str]:
    """A call or definition on one line, or its words on indented lines."""
    line = head + ", ".join(words) + tail
    if len(line) <= width:
        return [line]
    lines, current = [head], "    "
    for word in words:
        if len(current) + len(word) + 2 > width:
            lines.append(current.rstrip())
            current = "    "
        current += f"{word}, "
    return [*lines, current.rstrip(), tail]


def never_negative(expr: Expr, known: Known) -> bool:
    """Whether an integer expression cannot fall below 0; a divisor of it is not 0, whatever is known of it."""
    match expr:
        case Cast():
            return never_negative(expr.arg, known)
        case Apply(op="floordiv" | "mod"):
            return all(never_negative(arg, known) for arg in expr.args)
        case Apply(op="add" | "mul" | "min"):
            return all(never_negative(arg, known) for arg in expr.args) or interval(expr, known)[0] >= 0
        case Apply(op="max"):
            return any(never_negative(arg, known) for arg in expr.args)
        case _:
            return interval(expr, known)[0] >= 0


def gone_round(kernel: Kernel) -> frozenset[str]:
    """The sizes that coordinates in memory are remainders by."""
    places = (part for op in every_op(kernel.ops) if isinstance(op, (Load, Store)) for part in op.index)
    rests = (node for part in places for node in walk(part) if isinstance(node, Apply) and node.op == "mod")
    return frozenset(node.name for rest in rests for node in walk(rest) if isinstance(node, Extent))


def carried_in(kernel: Kernel) -> frozenset[str]:
    """The variables that loops carry, which are set in every round."""
    found: set[str] = set()
    for op in every_op(kernel.ops):
        match op:
            case Start():
                found.add(op.name)
            case Carry():
                found |= {target for target, _ in op.pairs}
    return frozenset(found)


def short_sources(kernel: Kernel) -> frozenset[str]:
    """The variables that are computed, element by element, from tiles of which an element is loaded in under 32 bits.

    A product or a reduction ends that, and so does the end of a round of a loop.
    """
    ops = tuple(every_op(kernel.ops))
    dtypes = {tensor.name: tensor.dtype for tensor in kernel.tensors}
    tiles = (op for op in ops if isinstance(op, Load) and op.axes)
    found = {op.name for op in tiles if op.grouped is not None or dtypes[op.tensor] not in WHOLE_WORDS}
    made = [op for op in ops if isinstance(op, (Load, Let, Mask, Keep))]
    while more := {op.name for op in made if op.name not in found and not found.isdisjoint(uses(op))}:
        found |= more
    return frozenset(found)


def _argument_order(argument: Argument) -> tuple[int, str, int]:
    kinds = ("descriptor", "pointer", "size", "stride", "constant")
    return (kinds.index(argument.kind), "", 0)
