"""The plan of one kernel: frozen, printable, complete. What `lower.py` decides and `emit.py` writes down.

    Kernel  = name, Axis*, Tensor*, Op*, Options
    Axis    = rank, role, extent, tile           point: one coordinate a program; tile; stream: looped over; whole;
                                                 inner: looped over for every tile of the stream
    Op      = Load | Let | Mask | Keep | Dot | Fold | Scan | Redo | Seen | TopKept | Start | Loop | Carry | Store

A program of the grid holds tiles: arrays over the axes that are no points. Expressions are those of the language, over
`Local` variables of the kernel, coordinates (`Rank`) and sizes (`Extent`). An op with `edge` set runs only in the part
of a loop where some coordinates of a tile are absent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias, assert_never

from cascade.backends.triton.index import Index
from cascade.ir import Const, DType, Expr, Extent, Size
from cascade.text import render_expr

BYTES = {
    DType.BF16: 2, DType.F16: 2, DType.F32: 4, DType.F64: 8, DType.F8E4M3: 1, DType.F8E5M2: 1, DType.I8: 1,
    DType.I32: 4, DType.I64: 8, DType.BOOL: 1,
}  # fmt: skip


FEW_QUOTIENTS = 1024  # elements of a tile
EIGHT = 8  # neighbours that are sorted together
FEW_LARGEST = 2  # of a row are found sooner one after the other


class Role(Enum):
    """How a rank lies in a kernel."""

    POINT = "point"  # one coordinate a program
    TILE = "tile"  # a tile of coordinates a program
    STREAM = "stream"  # a tile at a time, in a loop
    WHOLE = "whole"  # all coordinates in one tile
    INNER = "inner"  # a tile at a time, in a loop for every tile of the stream


@dataclass(frozen=True, slots=True)
class Axis:
    """A rank as the kernel sees it; `tile` coordinates at a time, a power of two, 1 for a point.

    An `exact` axis has no tile that reaches beyond its extent. A static extent is a number, another is an argument.
    `parts` programs share a streamed axis, each with a stretch of it. A program has `step` coordinates of a tiled axis:
    fewer than the tile where the hardware wants more rows than belong together.
    """

    rank: str
    role: Role
    extent: Size
    tile: int
    exact: bool
    parts: int = 1
    step: int = 0  # 0: the whole tile
    told: str = ""  # the part of the stream at which a table has the coordinate: no dimension of the grid

    @property
    def single(self) -> bool:
        """Whether there is one coordinate at a time, a number and no dimension of a tile."""
        return self.role is Role.POINT or (self.role is Role.STREAM and self.tile == 1)

    @property
    def advance(self) -> int:
        """How far the tiles of neighbouring programs lie apart."""
        return self.step or self.tile


@dataclass(frozen=True, slots=True)
class Tensor:
    """An argument in global memory: strides are counted in elements, None where only a call tells them."""

    name: str
    dtype: DType
    shape: tuple[Size, ...]
    strides: tuple[int | None, ...]
    result: bool = False
    described: bool = False  # base and strides are such that a TMA descriptor can be made


@dataclass(frozen=True, slots=True)
class Load:
    """`name` := the tensor at these coordinates, over `axes` in this order; 0 where not live.

    With tests a tile comes by pointers, also where it has a box: at the edges, or always. Where the index has a rank of
    the tile only divided by a number, an element comes once and stands for so many neighbours.
    """

    name: str
    tensor: str
    index: tuple[Expr, ...]
    axes: tuple[str, ...]
    live: tuple[Expr, ...]  # tests that always stand
    edge: tuple[Expr, ...]  # tests that stand only where a tile of the stream is not whole
    box: tuple[int, ...] | None  # the box of the descriptor; None: by pointers
    evict: str = ""  # what becomes of it in the cache: evict_first where nobody reads it again, evict_last where soon
    grouped: tuple[str, int] | None = None  # the rank along which one stands for several, a power of two of them


@dataclass(frozen=True, slots=True)
class Let:
    """`name` := an elementwise expression over `axes`; rounded to `dtype` where one is given."""

    name: str
    axes: tuple[str, ...]
    expr: Expr
    dtype: DType | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """`name` := whether all of these hold; without tests that always stand it is there only at edges."""

    name: str
    axes: tuple[str, ...]
    live: tuple[Expr, ...]  # tests that always stand
    edge: tuple[Expr, ...]  # tests that stand only where a tile of the stream is not whole


@dataclass(frozen=True, slots=True)
class Keep:
    """`name` := itself where the mask holds, else a constant."""

    name: str
    axes: tuple[str, ...]
    mask: str
    fill: float | int | bool
    edge: bool


@dataclass(frozen=True, slots=True)
class Dot:
    """`name[rows, columns]` := left[rows, over] @ right[over, columns], added to what is there where `into` is set."""

    name: str
    axes: tuple[str, str]
    left: str
    right: str
    over: str
    into: bool
    exact: bool  # of full precision: float32 operands, multiplied and summed in float64
    live: str | None = None  # the mask of what is present: the right side may have NaN or infinity elsewhere
    edge: bool = False  # whether that matters only where a tile is not whole


@dataclass(frozen=True, slots=True)
class Fold:
    """`name` := an expression over more axes, folded along some of them; by `last`, the end of the tile is taken."""

    name: str
    axes: tuple[str, ...]
    reducer: str
    over: tuple[str, ...]
    expr: Expr
    nan: bool = False  # a NaN among the elements must come through


@dataclass(frozen=True, slots=True)
class Scan:
    """`names` := the steps of a recurrence from the beginning of the tile to each coordinate of it, composed.

    A step is one element, composed by `sum`, `max` or `min`, or a factor and a term, composed as `affine` maps, or
    these and what sums of terms leave over, as a `drift`.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]
    kind: str
    over: str
    elements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Redo:
    """`name` and `after` := what steps one by one give, where what was composed has a value that is not finite.

    A product of factors may overflow where no step does. A step takes `after` from `before`, or from the step before
    it, to the expression; `picks` are what it reads of the coordinate at hand, each with the tile that it is from.
    """

    name: str
    axes: tuple[str, ...]
    over: str
    before: str
    after: str
    picks: tuple[tuple[str, str], ...]
    expr: Expr


@dataclass(frozen=True, slots=True)
class Seen:
    """`name` := itself, or whether a mask holds anywhere along some axes; true in whole tiles where `edge` is set."""

    name: str
    axes: tuple[str, ...]
    mask: str
    over: tuple[str, ...]
    edge: bool = True


@dataclass(frozen=True, slots=True)
class TopKept:
    """`values`, `coords` := the `count` largest along an axis, sorted, ties to the lower coordinate.

    Those where the mask `live` fails take no part; `there` := whether so many are left.
    """

    values: str
    coords: str
    axes: tuple[str, ...]
    over: str
    kept: str
    count: int
    source: str
    bits: int  # of the values: 16 where they are exactly numbers of 16 bits, else 32
    live: str | None
    there: str | None


@dataclass(frozen=True, slots=True)
class Carry:
    """The end of an iteration: variables take their new values."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Start:
    """A state before the first element."""

    name: str
    axes: tuple[str, ...]
    value: Expr


@dataclass(frozen=True, slots=True)
class Strip:
    """What a loop visits of a rank that is two, np of n and p: a stretch of p, whole tiles of it, in some rows n.

    It counts these tiles alone: the one at c begins at (row + c // length) * width + first + c % length.
    """

    width: int  # the extent of p, whole tiles
    row: Expr
    first: Expr
    length: Expr


@dataclass(frozen=True, slots=True)
class Loop:
    """The tiles of a streamed axis. Between `inner` bounds every coordinate is live; the rest is done at the edges.

    Bounds are coordinates; None stands for the end of the axis. `inner` is None where no tile is known to be whole.
    Those of a strip count what it visits.
    """

    rank: str
    first: Expr | None
    stop: Expr | None
    inner: tuple[Expr | None, Expr | None] | None
    edges: bool  # whether there are tiles that need tests
    carried: tuple[str, ...]
    body: tuple[Op, ...]
    edge_tile: int = 0  # coordinates at a time where tests are needed; 0: as everywhere
    backwards: bool = False  # last tile first: what a trip before has read last is still in the cache
    unless: str | None = None  # flags that all being set makes the loop needless: then it does not run
    strip: Strip | None = None


@dataclass(frozen=True, slots=True)
class Store:
    """An expression over `axes` written to the tensor at these coordinates, `fill` where not live."""

    tensor: str
    index: tuple[Expr, ...]
    axes: tuple[str, ...]
    expr: Expr
    live: tuple[Expr, ...]
    fill: float | int | bool
    box: tuple[int, ...] | None
    only: tuple[Expr, ...] = ()  # elsewhere nothing is written at all
    passing: bool = False  # whether it leaves the cache first, for what is still read there


Op: TypeAlias = Load | Let | Mask | Keep | Dot | Fold | Scan | Redo | Seen | TopKept | Carry | Start | Loop | Store


@dataclass(frozen=True, slots=True)
class Options:
    """What is chosen by the model or by timing."""

    num_warps: int = 4
    num_stages: int = 2
    edge_tile: int = 0  # coordinates of the stream at a time where tests are needed; 0: as everywhere
    grouped: int = 0  # tiles of the grid's first axis beside which all tiles of its second follow; 0: all of the first
    resident: int = 0  # programs of each multiprocessor that go through the tiles of the grid; 0: a program a tile
    pieces: int = 1  # in which a program does what follows its loop: so many times fewer columns at a time


@dataclass(frozen=True, slots=True)
class Partial:
    """A state that a program leaves for a later kernel to merge: the tensor, its ranks behind that of the part.

    `live` are the tests under which the state is present; a local is a flag that is left like a state.
    """

    state: str
    tensor: Tensor
    ranks: tuple[str, ...]
    live: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which rows the tiles of an axis have: in the order of an index, none with rows of two values.

    `tables` are tensors that are made before: the row at each place of each tile, the value of each tile, and how many
    tiles there are (and whether all rows are in one); the extent of the axis, `symbol`, is a bound of it.
    """

    rank: str
    symbol: str
    index: Tensor  # by which rows are ordered
    values: Size  # below which it lies
    tile: int
    tables: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: which statements, over which axes, and its tile program."""

    name: str
    statements: tuple[str, ...]  # as text, in the order of the cascade
    axes: tuple[Axis, ...]  # in the order of a tile's dimensions; `grid` has the order of programs
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    variables: tuple[tuple[str, tuple[str, ...], DType], ...]  # every local: its axes and type
    options: Options = field(default=Options())
    reverse: str | None = None  # the tiled axis whose last tile has most work and therefore starts first
    watched: tuple[str, ...] = ()  # products that what is absent may have spoilt: 0 * NaN is NaN
    partial: tuple[Partial, ...] = ()  # the states of a part of the stream, where several programs share it
    base_two: tuple[str, ...] = ()  # tensors that are exponents and lie to base two
    live: tuple[tuple[str, tuple[Expr, ...]], ...] = ()  # what is stored, and the tests under which it is present
    exact: bool = False  # in full precision: all floats that it reads and writes have 32 bits, and so have results
    why: tuple[str, ...] = ()  # reasons for tensors that the author's cascade has not
    singly: tuple[str, ...] = ()  # recurrences that go one coordinate at a time, as nothing composes their steps
    index: Index | None = None  # what must be computed before: bounds that depend on data
    rows: Blocks | None = None  # the axis whose tiles have rows of one value of an index
    careful: Kernel | None = None  # the same for one coordinate of each tiled axis, without products: where they are

    def axis(self, rank: str) -> Axis:
        """The axis of a rank."""
        return next(axis for axis in self.axes if axis.rank == rank)

    @property
    def grid(self) -> tuple[Axis, ...]:
        """The axes that programs are spread over, the first varying fastest.

        Without products these are the last of the tile: programs that run together are neighbours in memory.
        """
        spread = (axis for axis in self.axes if not axis.told)
        found = tuple(axis for axis in spread if axis.role in (Role.POINT, Role.TILE) or axis.parts > 1)
        if any(isinstance(op, Dot) for op in every_op(self.ops)):
            return found
        tiles = [axis for axis in found if axis.role is Role.TILE]
        return (*reversed(tiles), *(axis for axis in found if axis.role is not Role.TILE))


def every_op(ops: Sequence[Op]) -> Iterator[Op]:
    """All ops, those inside loops included."""
    for op in ops:
        yield op
        if isinstance(op, Loop):
            yield from every_op(op.body)


def in_eights(kernel: Kernel, op: TopKept) -> bool:
    """Whether the largest of a row are found among sorted eights: where going through all for each takes longer."""
    axes = next(axes for name, axes, _ in kernel.variables if name == op.source)
    rows = len(axes) < 3 and axes[-1] == op.over and op.axes == (*axes[:-1], op.kept)
    return rows and op.count > FEW_LARGEST and kernel.axis(op.over).tile >= 2 * EIGHT


def few_quotients(axes: Collection[str], tiles: Mapping[str, int]) -> bool:
    """Whether so few numbers are divided that a division rounded once costs nothing that shows."""
    return math.prod(tiles[rank] for rank in axes) < FEW_QUOTIENTS


def extent_expr(size: Size) -> Expr:
    """An extent as an expression: a number, or the symbol of an argument."""
    return Const(size) if isinstance(size, int) else Extent(size)


# --- text ------------------------------------------------------------------------------------------------------------


def render_kernel(kernel: Kernel) -> str:
    """The plan as text: the axes, then the tile program."""
    lines = [f"kernel {kernel.name} {{"]
    for axis in kernel.axes:
        tile = "" if axis.role is Role.POINT else f" by {axis.tile}"
        shared = f" in {axis.parts} parts" if axis.parts > 1 else f" of {axis.told}" if axis.told else ""
        lines.append(
            f"    {axis.role.value} {axis.rank} = {axis.extent}{tile}{shared}{'' if axis.exact else ' ragged'}"
        )
    options = kernel.options
    lines.append(f"    warps {options.num_warps}, stages {options.num_stages}")
    if kernel.rows is not None:
        lines.append(f"    {kernel.rows.rank} in the order of {kernel.rows.index.name} < {kernel.rows.values}")
    if options.grouped:
        lines.append(f"    {options.grouped} tiles of {kernel.grid[0].rank} beside each other")
    if options.resident:
        lines.append(f"    {options.resident} programs of each multiprocessor for all tiles")
    if options.pieces > 1:
        lines.append(f"    what follows the loop in {options.pieces} pieces")
    lines.extend(f"    {line}" for op in kernel.ops for line in render_op(op))
    if kernel.singly:
        lines.append(f"    one step at a time: {', '.join(kernel.singly)}")
    if kernel.careful is not None:
        lines.append(f"    where {', '.join(kernel.watched)} is not a number, one by one: {kernel.careful.name}")
    return "\n".join([*lines, "}", ""])


def render_op(op: Op) -> list[str]:
    """One op as lines of text."""
    match op:
        case Load():
            how = "descriptor" if op.box else "pointers"
            tests = "".join(f" if {render_expr(c)}" for c in op.live) + "".join(
                f" edge {render_expr(c)}" for c in op.edge
            )
            once = "" if op.grouped is None else f" each for {op.grouped[1]} along {op.grouped[0]}"
            return [f"{_over(op.name, op.axes)} = load {op.tensor}[{_list(op.index)}] by {how}{once}{tests}"]
        case Let():
            rounded = f" as {op.dtype.value}" if op.dtype else ""
            return [f"{_over(op.name, op.axes)} = {render_expr(op.expr)}{rounded}"]
        case Mask():
            every = [*map(render_expr, op.live), *(f"edge {render_expr(test)}" for test in op.edge)]
            return [f"{_over(op.name, op.axes)} = {' and '.join(every)}"]
        case Keep():
            return [f"{'edge ' if op.edge else ''}{_over(op.name, op.axes)} = {op.name} if {op.mask} else {op.fill}"]
        case Dot():
            return [f"{_over(op.name, op.axes)} {'+=' if op.into else '='} {op.left} @[{op.over}] {op.right}"]
        case Fold():
            return [f"{_over(op.name, op.axes)} = {op.reducer}[{','.join(op.over)}] {render_expr(op.expr)}"]
        case Scan():
            return [f"{', '.join(_over(name, op.axes) for name in op.names)} = scan[{op.over}] {_step(op)}"]
        case Redo():
            taken = "".join(f", {one} of {tile}" for one, tile in op.picks)
            return [f"{op.name} not finite: one by one along {op.over} {op.after} = {render_expr(op.expr)}{taken}"]
        case Seen():
            always = "" if op.edge else "always "
            return [f"{always}{_over(op.name, op.axes)} = {op.name} or any[{','.join(op.over)}] {op.mask}"]
        case TopKept():
            tests = f" if {op.live}" if op.live else ""
            return [f"{_over(op.values, op.axes)}, {op.coords} = topk[{op.over}, {op.count}] {op.source}{tests}"]
        case Carry():
            return [f"{', '.join(a for a, _ in op.pairs)} = {', '.join(b for _, b in op.pairs)}"]
        case Start():
            return [f"{_over(op.name, op.axes)} = {render_expr(op.value)}"]
        case Loop():
            return _render_loop(op)
        case Store():
            tests = "".join(f" if {render_expr(c)}" for c in op.live)
            tests += "".join(f" only {render_expr(c)}" for c in op.only)
            how = "descriptor" if op.box else "pointers"
            return [f"store {op.tensor}[{_list(op.index)}] = {render_expr(op.expr)}{tests} by {how}"]
        case _:
            assert_never(op)


def _render_loop(op: Loop) -> list[str]:
    def end(bound: Expr | None, default: str) -> str:
        return default if bound is None else render_expr(bound)

    head = f"for {op.rank} from {end(op.first, '0')} to {end(op.stop, 'the end')}"
    if op.strip is not None:
        row, first, length = map(render_expr, (op.strip.row, op.strip.first, op.strip.length))
        head += f", {length} from {first} on of each {op.strip.width} from row {row} on"
    if op.unless is not None:
        head = f"unless {op.unless}, {head}"
    if op.edges:
        inner = op.inner
        head += ", tested" if inner is None else f", whole from {end(inner[0], '0')} to {end(inner[1], 'the end')}"
    return [f"{head} {{", *(f"    {line}" for inner_op in op.body for line in render_op(inner_op)), "}"]


def _step(op: Scan) -> str:
    return f"{op.kind} {', '.join(op.elements)}"


def _over(name: str, axes: tuple[str, ...]) -> str:
    return f"{name}[{','.join(axes)}]" if axes else name


def _list(index: tuple[Expr, ...]) -> str:
    return ",".join(map(render_expr, index))
