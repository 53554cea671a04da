"""The one IR: a cascade of extended Einsums with optional scheduling directives. Frozen, printable, no behaviour.

    Cascade   = name, Param*, Result*, Given*, Stmt*, Directive*, (Function | Cascade)*   what it uses travels with it
    Param     = name ":"? DType? "[" Size* "]"             Result = Param and the fill of its absent coordinates
    Given     = rank Size                                  with n = N: the extent of a rank that no shape gives
    Stmt      = Einsum(Target, Expr, where?, Init*)        Z[m,n] = sum[k] A[m,k] * B[k,n]   where n <= m
              | TopK(Target, Target, rank, k, Expr, ...)   G[t,j], I[t,j] = topk[n, 2] R[t,n]
              | Call(name*, callee, name*)                 A = attention(Q, K, V)
    Expr      = Const | Rank | Extent | Read(tensor, Expr*) | Apply(op, Expr*) | Cast(DType, Expr)
              | Reduce(reducer, rank*, Expr)               sum[k,e] x          folds the present coordinates only
              | Use(function, rank*, Expr*)                softmax[n] x, silu(x): a `def`, of the file or the library
              | Local(name)                                a parameter, inside the body of a `def`
    Function  = name, rank*, name*, Expr                   def mean[n](x) = (sum[n] x) / (count[n] x)
    Directive = Mesh | Shard | Split | Fuse | Fold | GroupBy | Tile | Stream | Wait | Region | Bind | Place
    GroupBy   = statement*, Read, Size                     group {H} by I[t,j] < N: rows of one value together
    Region    = name, Stage*, Loop*, ...                   region r over p = 256 { stage {S, R} over n = 64 }
    Fold      = rank, state*, FoldInit*, update*, FoldMerge*, finalize*    one trip over n, with a state that is carried

One name means one thing in a cascade: rank variables are lower case and have one extent each, shape symbols are upper
case, everything that is declared or defined is a tensor. `where` filters the iteration space of its statement: it
applies at the statement's own coordinates where it mentions only those, and inside every reduction that binds a rank
it mentions. Equality is meaning: spans take no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from cascade.errors import Span


class DType(Enum):
    """Element types, by the names the language uses."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    F64 = "f64"
    F8E4M3 = "f8e4m3"
    F8E5M2 = "f8e5m2"
    I8 = "i8"
    I32 = "i32"
    I64 = "i64"
    BOOL = "bool"


Size: TypeAlias = int | str
"""The extent of a rank: a number, or a shape symbol bound when tensors arrive."""


@dataclass(frozen=True, slots=True)
class Node:
    """What every node has: where it stands in the user's source, excluded from equality and from repr."""

    span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)


# --- expressions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Const(Node):
    """A number or a truth value."""

    value: int | float | bool

    def __eq__(self, other: object) -> bool:  # 1, 1.0 and True differ, and nan equals itself: equality is by text
        return isinstance(other, Const) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


@dataclass(frozen=True, slots=True)
class Rank(Node):
    """A rank variable used as an integer, its coordinate."""

    name: str


@dataclass(frozen=True, slots=True)
class Extent(Node):
    """A shape symbol used as an integer, the extent of a rank."""

    name: str


@dataclass(frozen=True, slots=True)
class Read(Node):
    """The element of a tensor at integer coordinates; absent where a coordinate lies outside the shape."""

    tensor: str
    index: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Apply(Node):
    """A pointwise operation of `ops.OPS`; present where all operands are (`default`: where either is)."""

    op: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Cast(Node):
    """Rounding to a type, where the author wants it."""

    dtype: DType
    arg: Expr


@dataclass(frozen=True, slots=True)
class Reduce(Node):
    """A fold by a reducer of `ops.REDUCERS` over the present coordinates of some ranks."""

    reducer: str
    ranks: tuple[str, ...]
    body: Expr


@dataclass(frozen=True, slots=True)
class Use(Node):
    """An application of a `def`, with the ranks it works along (none for a pointwise one)."""

    function: str
    ranks: tuple[str, ...]
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Local(Node):
    """A parameter of the `def` whose body this stands in."""

    name: str


Expr: TypeAlias = Const | Rank | Extent | Read | Apply | Cast | Reduce | Use | Local


# --- statements ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target(Node):
    """What a statement defines: a tensor and the rank variables of its positions, all different."""

    name: str
    ranks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Init(Node):
    """The value of an iterative tensor at coordinate `at` (-1, -2, ...) of its iterative rank, before the first."""

    rank: str
    at: int
    expr: Expr


@dataclass(frozen=True, slots=True)
class Einsum(Node):
    """One extended Einsum: map, reduce, populate. With `inits` it steps along the rank they name."""

    target: Target
    expr: Expr
    where: Expr | None = None
    inits: tuple[Init, ...] = ()


@dataclass(frozen=True, slots=True)
class TopK(Node):
    """The `k` largest present values along `rank`, sorted, ties to the lower coordinate: values and coordinates.

    Both targets have the same ranks; the one that `body` does not have, of extent `k`, counts the kept ones.
    """

    values: Target
    coords: Target
    rank: str
    k: Size
    body: Expr
    where: Expr | None = None


@dataclass(frozen=True, slots=True)
class Call(Node):
    """Another cascade used as a function of whole tensors, by position."""

    targets: tuple[str, ...]
    callee: str
    args: tuple[str, ...]


Stmt: TypeAlias = Einsum | TopK | Call


# --- schedule --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part(Node):
    """A statement, or one of the parts that a split makes of it: `mlp`, `mlp.1`."""

    name: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Mesh(Node):
    """`mesh tp = 8`: an axis of devices."""

    axis: str
    size: Size


@dataclass(frozen=True, slots=True)
class Shard(Node):
    """`shard f over tp`: the rank is spread over an axis of devices."""

    rank: str
    axis: str


@dataclass(frozen=True, slots=True)
class Split(Node):
    """`split t into 2`, or at given cuts: `split t at 4096, 8192`. Exactly one of `parts` and `cuts` is set."""

    rank: str
    parts: Size | None = None
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fuse(Node):
    """`fuse {R, P} over n`: one trip over the rank computes all of these statements, block by block."""

    statements: tuple[str, ...]
    rank: str


@dataclass(frozen=True, slots=True)
class FoldInit(Node):
    """`init D[m] = empty`: what a state is before the first element; `empty` (None) where it is nothing at all."""

    target: Target
    expr: Expr | None = None


@dataclass(frozen=True, slots=True)
class FoldMerge(Node):
    """`merge D[m] = D'[m] * exp(R'[m] - R[m])`: what a partial state D' counts for in the state that it is merged into.

    A read of `D'` is the state of a part of the rank, a read of `R` the merged state. The contributions of all parts
    are folded with the reducer of `D`: so one expression gives streaming, tiling, splitting and trees of merges.
    """

    target: Target
    expr: Expr


@dataclass(frozen=True, slots=True)
class Fold(Node):
    """`fold n { ... }`: one trip over the rank computes all of `update`, carrying `state` from block to block.

    Each state is a reduction over the rank among `update`, or a map of `update` that joins one with the virtual
    elements of its `init`: `R[m] = max(X_max[m], sink)`. Statements of `update` run in order: those that keep the rank
    hold for a block, those without it for the state so far; `merge` moves what was there before into the new state.
    `finalize` are the statements behind the trip that turn the state into what the cascade defines.
    """

    rank: str
    state: tuple[str, ...]
    init: tuple[FoldInit, ...]
    update: tuple[str, ...]
    merge: tuple[FoldMerge, ...]
    finalize: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupBy(Node):
    """`group {H, P} by I[t,j] < N`: these statements run over t and j in the order of I, rows of one value together.

    What the statements index by `key` is one number for all rows of a value. Values are 0 and more and below `size`,
    the extent of the dimensions that they index; rows of a value keep their order.
    """

    statements: tuple[str, ...]
    key: Read
    size: Size


@dataclass(frozen=True, slots=True)
class Tile(Node):
    """`tile m = 128, n = 64`: block extents of ranks."""

    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Stream(Node):
    """`stream comm { ARN.0, ARN.1 }`: what one queue runs, in order, beside the other queues."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Wait(Node):
    """`wait mlp.1 on ARN.1`: an edge from one queue to another."""

    part: Part
    on: Part


@dataclass(frozen=True, slots=True)
class Loop(Node):
    """`label: rank = size`: an iteration takes `size` coordinates of the rank; None, `fit`, is as many as fit."""

    rank: str
    size: int | None
    label: str


@dataclass(frozen=True, slots=True)
class Stage(Node):
    """`stage {S, R} over n = 64`: what runs together in each iteration of the region's loops and its own."""

    statements: tuple[str, ...]
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True, slots=True)
class Phase(Node):
    """`phase 2d {S}, 1d {R} drain 2d`: what units do at the same time; `drain` empties an array behind it, as often as
    results fill it."""

    work: tuple[tuple[str, tuple[str, ...]], ...]
    drain: str | None = None


@dataclass(frozen=True, slots=True)
class Region(Node):
    """Stages that run in turn inside of loops that they share; regions run one after another.

    region attention over b = 1, rows: p = fit {
        stage {S, R} over n = 64
        keep Q in rows              what stays on chip, inside of which loop; also all, tile, dram, registers
        spill S                     what may stay partly off chip where not all fits
        phase 2d {S}, 1d {R}        after one another
        capacity 65536              bytes on chip, where that is less than the buffer
        double                      what is loaded has room twice, to be loaded ahead
    }
    """

    name: str
    stages: tuple[Stage, ...]
    loops: tuple[Loop, ...] = ()
    keep: tuple[tuple[str, str], ...] = ()
    spill: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    capacity: int | None = None
    double: bool = False

    @property
    def statements(self) -> tuple[str, ...]:
        """All that runs in the region, in order."""
        return tuple(name for stage in self.stages for name in stage.statements)


@dataclass(frozen=True, slots=True)
class Bind(Node):
    """`bind {S, R} on 2d`: the unit on which statements run that no phase names."""

    statements: tuple[str, ...]
    unit: str


@dataclass(frozen=True, slots=True)
class Place(Node):
    """`place S on m, n by k`: the ranks along the rows and columns of an array, and the one that streams past.

    Several may lie along a side, `c * r`: the coordinates of one for each of the other. Without any it is 1.
    """

    statement: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    stream: str | None

    @property
    def statements(self) -> tuple[str, ...]:
        """The one statement, as other directives have theirs."""
        return (self.statement,)


Directive: TypeAlias = Mesh | Shard | Split | Fuse | Fold | GroupBy | Tile | Stream | Wait | Region | Bind | Place


# --- definitions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Param(Node):
    """A tensor that comes from outside; untyped ones take the type of the argument."""

    name: str
    dtype: DType | None
    shape: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Result(Node):
    """A tensor that goes out; its absent coordinates are stored as `fill`."""

    name: str
    dtype: DType | None
    shape: tuple[Size, ...]
    fill: Const = Const(0)


@dataclass(frozen=True, slots=True)
class Given(Node):
    """`with n = N`: the extent of a rank variable, where no tensor is read or declared at it alone."""

    rank: str
    size: Size


@dataclass(frozen=True, slots=True)
class Function(Node):
    """A `def`: pointwise, or along formal ranks (one formal rank may stand for several actual ones)."""

    name: str
    ranks: tuple[str, ...]
    params: tuple[str, ...]
    body: Expr


@dataclass(frozen=True, slots=True)
class Cascade(Node):
    """A named list of statements from parameters to results, with the definitions it uses, callees first."""

    name: str
    params: tuple[Param, ...]
    results: tuple[Result, ...]
    body: tuple[Stmt, ...]
    schedule: tuple[Directive, ...] = ()
    uses: tuple[Function | Cascade, ...] = ()
    given: tuple[Given, ...] = ()


Definition: TypeAlias = Function | Cascade
