"""What a traced value is made by: one form for each thing that notation can do.

    Form = Literal | SizeOf | Element | Pointwise | Casting | Fold | Applied     inside the expression they stand in
         | At | Ordered                                                          another value at other coordinates
         | Filtered | Chosen | Scan                                              are statements always
         | Previous                                                              of a scan, inside its step

The operands of a form are in the value that has it; see `notation.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from cascade.frontend.frames import Placed
from cascade.ir import Cascade, DType

if TYPE_CHECKING:
    from cascade.frontend.notation import RankVariable, Tensor, Value


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """A number or a truth value."""

    value: int | float | bool


@dataclass(frozen=True, slots=True, eq=False)
class SizeOf:
    """The extent of a rank, or of a position of a tensor."""

    rank: RankVariable | None = None
    tensor: Tensor | None = None
    position: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Element:
    """A parameter, or a result of a called cascade, at the coordinates that are the operands."""

    tensor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class At:
    """The first operand with its `ranks` replaced by the other operands; `rename`: by other ranks, all different.

    `sizes` are the extents, by rank, that the replacement relies on.
    """

    ranks: tuple[RankVariable, ...]
    rename: bool
    sizes: tuple[tuple[RankVariable, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Ordered:
    """The operand, with its ranks in the order that the user wrote."""


@dataclass(frozen=True, slots=True, eq=False)
class Pointwise:
    """A pointwise operation of `ops.OPS`."""

    op: str


@dataclass(frozen=True, slots=True, eq=False)
class Casting:
    """A rounding to a type."""

    dtype: DType


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A primitive reduction."""

    reducer: str
    along: tuple[RankVariable, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """A rank function of the library."""

    function: str
    along: tuple[RankVariable, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Filtered:
    """The first operand where the second, a predicate, holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A `topk` over the operand (and the predicate after it), shared by its two values."""

    along: RankVariable
    k: int | SizeOf
    kept: RankVariable
    parts: list[Value] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The values (0) or the coordinates (1) of a `topk`."""

    choice: Choice
    part: int


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """An iterative statement; operands: the step, the initial values at -1, -2, ..., and a filter if `filtered`."""

    loop: Loop
    inits: int
    filtered: bool


@dataclass(slots=True, eq=False)
class Loop:
    """An iterative rank while its step is being traced; `value` is set once it has been."""

    along: RankVariable
    order: tuple[RankVariable, ...] | None
    value: Value | None = None
    asked: bool = False  # the step used its previous value


@dataclass(frozen=True, slots=True, eq=False)
class Previous:
    """The iterative tensor itself at the coordinates that are the operands (none: one step back)."""

    loop: Loop


Form: TypeAlias = (
    Literal | SizeOf | Element | At | Ordered | Pointwise | Casting | Fold | Applied | Filtered | Chosen | Scan
    | Previous
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Invocation:
    """A cascade used as a function of whole tensors."""

    callee: Cascade
    args: tuple[Tensor | Value, ...]
    place: Placed
    results: list[Tensor] = field(default_factory=list)
