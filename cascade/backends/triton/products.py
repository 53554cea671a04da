"""A sum of products taken apart: which factors depend on what, and whether two of them make a matrix product."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cascade.inference import FLOATS, promote
from cascade.ir import Apply, Const, DType, Einsum, Expr, Rank, Read, Reduce, Stmt
from cascade.walk import reads, rewrite, walk


def factors(expr: Expr) -> tuple[Expr, ...]:
    """The factors of a product, one over a divisor for a division.

    a * b / c  -->  a, b, 1 / c
    """
    match expr:
        case Apply(op="mul"):
            return (*factors(expr.args[0]), *factors(expr.args[1]))
        case Apply(op="div"):
            return (*factors(expr.args[0]), *(reciprocal(factor) for factor in factors(expr.args[1])))
        case Apply(op="neg"):
            return (Const(-1.0), *factors(expr.args[0]))
        case _:
            return (expr,)


def reciprocal(expr: Expr) -> Expr:
    """One over an expression."""
    return folded(Apply("div", (Const(1.0), expr)))


def product(terms: Sequence[Expr]) -> Expr:
    """The product of some factors, numbers multiplied out and put last; 1 for none."""
    number = 1.0
    found: Expr | None = None
    for term in terms:
        if isinstance(term, Const):
            number *= float(term.value)
        else:
            found = term if found is None else Apply("mul", (found, term))
    if found is None:
        return Const(number)
    return found if number == 1.0 else Apply("mul", (found, Const(number)))


def folded(expr: Expr) -> Expr:
    """The expression with operations on numbers carried out."""
    from_numbers: dict[str, Callable[..., float]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "neg": lambda a: -a,
        "sqrt": lambda a: a**0.5,
        "rsqrt": lambda a: a**-0.5,
        "log": math.log,
        "max": max,
        "min": min,
        "floordiv": lambda a, b: a // b,
        "mod": lambda a, b: a % b,
    }

    def fold(node: Expr) -> Expr:
        if not isinstance(node, Apply) or node.op not in from_numbers:
            return node
        values = [arg.value for arg in node.args if isinstance(arg, Const) and not isinstance(arg.value, bool)]
        if len(values) < len(node.args):
            return node
        try:
            found = from_numbers[node.op](*values)
        except (ValueError, ZeroDivisionError, OverflowError):
            return node
        return Const(found)

    return rewrite(expr, fold)


def ranks_of(expr: Expr) -> frozenset[str]:
    """The rank variables that occur anywhere in an expression."""
    return frozenset(node.name for node in walk(expr) if isinstance(node, Rank))


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """`sum[over] left * right * rest`: what each factor depends on, the reduced rank aside.

    `grouped` are ranks of the left side of which the right side knows only the quotient by a number.
    """

    over: str
    left: tuple[Expr, ...]
    right: tuple[Expr, ...]
    rest: tuple[Expr, ...]
    rows: frozenset[str]
    columns: frozenset[str]
    grouped: tuple[tuple[str, int], ...] = ()

    @property
    def two_sided(self) -> bool:
        """Whether either side has a rank of its own: else it is a matrix by a vector, bound by reading the matrix."""
        return bool(self.rows) and bool(self.columns or self.grouped)


@functools.lru_cache(maxsize=4096)  # asked of the same statements at every turn
def matrix_product(stmt: Stmt) -> MatrixProduct | None:
    """How a statement is a matrix product: a sum over a rank of factors in two groups that differ in their ranks.

    Of several such ranks, one that only says where something lies comes last: along it a matrix has gaps.
    """
    if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce) or stmt.expr.reducer != "sum":
        return None
    terms = factors(stmt.expr.body)
    places = {rank for term in terms for rank in looking_up(term)}
    for over in sorted(stmt.expr.ranks, key=places.__contains__):
        inside = [term for term in terms if over in ranks_of(term)]
        if len(inside) < 2 or not all(reads_something(term) for term in inside):
            continue
        found = _two_sides(over, inside, tuple(term for term in terms if term not in inside), stmt)
        if found is not None:
            return found
    return None


def looking_up(expr: Expr) -> frozenset[str]:
    """The ranks by which an expression looks up where something lies."""
    lookups = (node for at in walk(expr) if isinstance(at, Read) for index in at.index for node in walk(index))
    return frozenset().union(*(ranks_of(node) for node in lookups if isinstance(node, Read)))


def is_plain(stmt: Stmt, dtypes: Mapping[str, DType]) -> bool:
    """Whether a statement is no product of matrices; in full precision one with a vector is a sum as any other."""
    found = matrix_product(stmt)
    if found is None:
        return True
    return not (found.rows and found.columns) and {dtypes[name] for name in reads(stmt)} & FLOATS == {DType.F32}


def _two_sides(over: str, inside: Sequence[Expr], rest: tuple[Expr, ...], stmt: Einsum) -> MatrixProduct | None:
    """The factors sorted by which of the target's ranks they have; the side of the target's first rank is left."""
    kept = stmt.target.ranks
    own = {index: {rank for rank in kept if rank in ranks_of(term)} for index, term in enumerate(inside)}
    shaped = [ranks for ranks in own.values() if ranks]  # a factor of the reduced rank alone says nothing of the rest
    common = set.intersection(*(shaped if len(shaped) > 1 else own.values()))
    exclusive = [own[index] - common for index in range(len(inside))]
    first = next((index for rank in kept for index, ranks in enumerate(exclusive) if rank in ranks), None)
    if first is None:
        return None
    rows = set(exclusive[first])
    left: list[Expr] = []
    right: list[Expr] = []
    for index, term in enumerate(inside):
        (left if exclusive[index] & rows or (not exclusive[index] and index == first) else right).append(term)
        rows |= exclusive[index] if exclusive[index] & rows else set()
    columns = set().union(*(exclusive[index] for index, term in enumerate(inside) if term in right))
    if not right or rows & columns:
        return None
    grouped = _grouped(left, right, common) or _grouped(right, left, common)
    return MatrixProduct(over, tuple(left), tuple(right), rest, frozenset(rows), frozenset(columns), grouped)


def _grouped(plain: Sequence[Expr], other: Sequence[Expr], common: set[str]) -> tuple[tuple[str, int], ...]:
    """The ranks that one side has plainly and the other only divided by a number."""
    found = []
    for rank in sorted(common):
        quotients = {
            node.args[1].value
            for term in other
            for node in walk(term)
            if isinstance(node, Apply) and node.op == "floordiv" and node.args[0] == Rank(rank)
            and isinstance(node.args[1], Const)
        }  # fmt: skip
        bare = sum(node == Rank(rank) for term in other for node in walk(term))
        divided = sum(
            isinstance(node, Apply) and node.op == "floordiv" and node.args[0] == Rank(rank)
            for term in other
            for node in walk(term)
        )
        if len(quotients) == 1 and bare == divided:
            found.append((rank, int(next(iter(quotients)))))
    return tuple(found)


def multiplied_in(kinds: Collection[DType]) -> DType:
    """The type in which a matrix product multiplies floats of these types, at least one.

    Bytes take the type of the 16 bits that they meet, which has all their numbers; else unlike ones meet in f32.
    """
    found = functools.reduce(promote, sorted(kinds, key=lambda kind: kind.value))
    return DType.F32 if found is DType.F64 else found


def reads_something(expr: Expr) -> bool:
    """Whether an expression has data in it."""
    return any(isinstance(node, Read) for node in walk(expr))
