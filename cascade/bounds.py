"""Filters as loop bounds: which coordinates of a streamed rank a tile of the other ranks can reach, and which it holds.

    where n <= m, m tiled      visited [0, m_last + 1), full [0, m_first + 1)

Every comparison of integers is brought to `form <= 0`, with a form that is a sum of whole multiples of atoms, and
solved for the streamed rank: that is exact, floors included. What the other ranks do inside a tile is then replaced
by the least and the largest value there: one gives a superset over the rows of the tile, the other a subset. What
cannot be solved is visited everywhere and full nowhere, so an answer is never wrong, only wide.

Proofs (`always`, `never_empty`) work on the same forms: floors are bounded by what is divided, coordinates are put at
their ends, and what is left is a polynomial in extents, of which each is at least 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from cascade.errors import VerifyError
from cascade.inference import infer_shapes
from cascade.ir import Apply, Cascade, Cast, Const, DType, Expr, Extent, Local, Rank, Read, Reduce, Size, Use
from cascade.presence import may_be_absent
from cascade.recent import recently
from cascade.walk import free_ranks, substitute, walk

FAR = 2**31 - 1  # "up to the extent", where a bound must be a number; the caller takes the smaller of it and the extent
MOST_ALTERNATIVES = 16  # of full stretches that are kept apart before one is chosen
MOST_COMPOUNDS = 8  # floors, remainders, minima and maxima in one form that a proof looks into
MOST_WITNESSES = 64

INTEGER_OPS = ("add", "sub", "mul", "neg", "floordiv", "mod", "min", "max", "abs", "clamp", "default")
INTEGER_REDUCERS = ("sum", "prod", "max", "min")
OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}
TRUE, FALSE = Const(True), Const(False)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where a filter leaves coordinates of the streamed rank, for one tile of the other ranks.

    The expressions are integers over `Local("m_first")` and `Local("m_last")` (the least and the largest coordinate of
    the tile of m), point ranks, extents and reads; they may lie outside [0, extent), and `stop` below `first`: the
    caller clamps. A condition on the rows alone turns up as a `select` between a bound and 0.
    """

    first: Expr | None
    """Coordinates below are absent for every row of the tile; None: it starts at 0."""
    stop: Expr | None
    """Coordinates from here on are absent for every row; None: up to the extent."""
    full_first: Expr | None
    """Within [full_first, full_stop) every coordinate is present for every row; None: from 0."""
    full_stop: Expr | None
    """None: up to the extent."""
    never_full: bool
    """Nothing is known to be full; `full_stop` is 0 then."""
    rest: tuple[Expr, ...]
    """The conjuncts with a part that no bounds decide: they read data along the streamed rank, or are not monotone
    in it. They are visited everywhere and full nowhere; a caller may build an index from data for them."""


def conjuncts(where: Expr | None) -> tuple[Expr, ...]:
    """The conditions that a filter joins by `and`, in order; none where there is no filter."""
    match where:
        case None:
            return ()
        case Apply(op="and", args=args):
            return tuple(part for arg in args for part in conjuncts(arg))
        case _:
            return (where,)


def loop_bounds(
    conditions: Sequence[Expr],
    rank: str,
    tiles: Collection[str],
    *,
    inexact: Collection[str] = (),
    absent: Collection[str] = (),
) -> Bounds:
    """The stretch of `rank` to visit, and the one that needs no test, where all `conditions` are to hold.

    `tiles` are the other ranks that have more than one coordinate in a program. Tensors that hold other things than
    integers are named in `inexact`, those that may lack coordinates in `absent`; all others are whole.
    """
    tiled = frozenset(tiles) - {rank}
    forms = [_formula(_positive_form(condition, True, inexact), rank, inexact) for condition in conditions]
    visited = _intersection([_superset(form, tiled, inexact) for form in forms])
    present = all(_surely_present(condition, absent) for condition in conditions)
    full = _subsets(_All(tuple(forms)), tiled, inexact) if present else ()
    chosen = _folded(max(full, key=_preference)) if full else _NOTHING
    visited = _folded(visited)
    return Bounds(
        _rendered_first(visited),
        None if visited.stop is None else _render(visited.stop),
        _rendered_first(chosen),
        None if chosen.stop is None else _render(chosen.stop),
        chosen == _NOTHING,
        tuple(condition for condition, form in zip(conditions, forms, strict=True) if _undecided(form)),
    )


def always(
    conditions: Sequence[Expr],
    extents: Mapping[str, Size],
    *,
    inexact: Collection[str] = (),
    absent: Collection[str] = (),
) -> bool:
    """Whether it is proved that all conditions hold at all coordinates within `extents`; False where it is not.

    Extents are at least 1; the same symbol is the same number. `inexact` and `absent` are those of `loop_bounds`.
    """
    return all(
        _surely_present(condition, absent) and _holds(_positive_form(condition, True, inexact), extents, inexact)
        for condition in conditions
    )


def never_empty(
    conditions: Sequence[Expr],
    rank: str,
    extents: Mapping[str, Size],
    *,
    inexact: Collection[str] = (),
    absent: Collection[str] = (),
) -> bool:
    """Whether it is proved that some coordinate of `rank` passes all conditions, whatever the other coordinates are.

    The other ranks run over [0, extent). Witnesses are both ends of the rank, the other coordinates, and what solving
    a condition for the rank gives: m, for n <= m. False where none of them is proved to pass.
    """
    if not all(_surely_present(condition, absent) for condition in conditions):
        return False
    checked = [_positive_form(condition, True, inexact) for condition in conditions]
    others = {name: size for name, size in extents.items() if name != rank}
    last = _sum(_size(extents[rank]), _number(-1)) if rank in extents else None
    for witness in itertools.islice(_witnesses(checked, rank, last, inexact), MOST_WITNESSES):
        inside = _nonpositive(_scaled(witness, -1), others)
        inside = inside and (witness == _ZERO or (last is not None and _nonpositive(_minus(witness, last), others)))
        at = {rank: _render(witness)}
        if inside and all(_holds(substitute(condition, at), others, inexact) for condition in checked):
            return True
    return False


def absent_tensors(cascade: Cascade, extents: Mapping[str, int] | None = None) -> frozenset[str]:
    """The tensors that may have absent coordinates, where every rank has one.

    `extents` are those of ranks or of shape symbols, where known.
    """
    return _absent_at(cascade, extents) if extents else _absent_anywhere(cascade)


@recently
def _absent_anywhere(cascade: Cascade) -> frozenset[str]:
    return _absent_at(cascade, {})


def _absent_at(cascade: Cascade, extents: Mapping[str, int]) -> frozenset[str]:
    try:
        sizes: Mapping[str, Size] = infer_shapes(cascade).ranks
    except VerifyError:  # half of a rewrite: whatever has tests may be absent
        sizes = {}
    known = {rank: extents[size] for rank, size in sizes.items() if isinstance(size, str) and size in extents}

    def proved(tests: Sequence[Expr], rank: str, absent: Collection[str]) -> bool:
        return never_empty(tests, rank, sizes, absent=absent)

    return may_be_absent(cascade, {**known, **extents}, proved)


def _witnesses(conditions: Sequence[Expr], rank: str, last: _Form | None, inexact: Collection[str]) -> Iterator[_Form]:
    """Coordinates of the rank that are worth a proof, each once, the likeliest first."""
    ends = [_ZERO] if last is None else [_ZERO, last]
    solved = [form for condition in conditions for form in _solutions(_formula(condition, rank, inexact))]
    ranks = dict.fromkeys(name for condition in conditions for name in free_ranks(condition) if name != rank)
    found = [*ends, *solved, *(_atom(Rank(name)) for name in ranks)]
    clamped = [_extreme("max", [form, _ZERO]) for form in found]
    if last is not None:
        clamped += [_extreme("min", [form, last]) for form in (*found, *clamped)]
    yield from dict.fromkeys((*found, *clamped))


def _solutions(formula: _Formula) -> Iterator[_Form]:
    match formula:
        case _Upto() | _From():
            yield formula.at
        case _All() | _Any():
            for part in formula.parts:
                yield from _solutions(part)
        case _Row() | _Unknown():
            return
        case _:
            assert_never(formula)


# --- integer forms ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """A sum of whole multiples of atoms and a number; atoms in a fixed order, each once, none with the factor 0.

    An atom is a product of factors, or anything that is no sum: a coordinate, an extent, a read, a floor.
    """

    terms: tuple[tuple[Expr, int], ...]
    const: int


def _number(value: int) -> _Form:
    return _Form((), value)


_ZERO, _ONE = _number(0), _number(1)


def _atom(expr: Expr, times: int = 1) -> _Form:
    return _Form(((expr, times),), 0)


def _order(term: tuple[Expr, int]) -> tuple[int, str]:
    """Coordinates come first and extents last, as one would write them."""
    atom = term[0]
    kind = (
        0 if isinstance(atom, Rank | Local) else 2 if isinstance(atom, Read) else 3 if isinstance(atom, Extent) else 1
    )
    return kind, repr(atom)


def _collected(terms: Iterable[tuple[Expr, int]], const: int) -> _Form:
    found: dict[Expr, int] = {}
    for atom, times in terms:
        found[atom] = found.get(atom, 0) + times
    return _Form(tuple(sorted(((a, c) for a, c in found.items() if c), key=_order)), const)


def _sum(*forms: _Form) -> _Form:
    return _collected((term for form in forms for term in form.terms), sum(form.const for form in forms))


def _scaled(form: _Form, times: int) -> _Form:
    return _Form(tuple((atom, c * times) for atom, c in form.terms), form.const * times) if times else _ZERO


def _minus(left: _Form, right: _Form) -> _Form:
    return _sum(left, _scaled(right, -1))


def _factors(atom: Expr) -> tuple[Expr, ...]:
    if isinstance(atom, Apply) and atom.op == "mul":
        return tuple(factor for arg in atom.args for factor in _factors(arg))
    return (atom,)


def _monomial(factors: Sequence[Expr], times: int = 1) -> _Form:
    """The product of atoms that are no products themselves."""
    if not factors:
        return _number(times)
    first, *more = sorted(factors, key=lambda factor: _order((factor, 1)))
    for factor in more:
        first = Apply("mul", (first, factor))
    return _atom(first, times)


def _product(left: _Form, right: _Form) -> _Form:
    parts = [_scaled(left, right.const), *(_scaled(_atom(atom, c), left.const) for atom, c in right.terms)]
    for (a, times), (b, more) in itertools.product(left.terms, right.terms):
        parts.append(_monomial((*_factors(a), *_factors(b)), times * more))
    return _sum(*parts)


def _form(expr: Expr) -> _Form:
    """The form of an expression whose value is an integer (`_is_integer` knows)."""
    match expr:
        case Const(value=value):
            return _number(int(value))
        case Apply(op="add", args=(a, b)):
            return _sum(_form(a), _form(b))
        case Apply(op="sub", args=(a, b)):
            return _minus(_form(a), _form(b))
        case Apply(op="neg", args=(a,)):
            return _scaled(_form(a), -1)
        case Apply(op="mul", args=(a, b)):
            return _product(_form(a), _form(b))
        case Apply(op="floordiv", args=(a, b)):
            return _quotient(_form(a), _form(b))
        case Apply(op="mod", args=(a, b)):
            return _remainder(_form(a), _form(b))
        case Apply(op="min" | "max", args=(a, b)):
            return _extreme(expr.op, [_form(a), _form(b)])
        case Apply(op="abs", args=(a,)):
            return _extreme("max", [_form(a), _scaled(_form(a), -1)])
        case Apply(op="clamp", args=(a, low, high)):
            return _extreme("min", [_extreme("max", [_form(a), _form(low)]), _form(high)])
        case _:
            return _atom(expr)


def _quotient(form: _Form, by: _Form) -> _Form:
    """`form // by`, rounded down, with whatever divides out taken out."""
    if by.terms or by.const == 0:
        return _symbolic_quotient(form, by)
    k = by.const
    if k < 0:
        form, k = _scaled(form, -1), -k
    whole = _Form(tuple((atom, c // k) for atom, c in form.terms if c % k == 0), form.const // k)
    left = _Form(tuple((atom, c) for atom, c in form.terms if c % k), form.const % k)
    if not left.terms:
        return whole
    common = math.gcd(k, *(c for _, c in left.terms))  # (g x + c) // g k  is  (x + c // g) // k
    left, k = _Form(tuple((atom, c // common) for atom, c in left.terms), left.const // common), k // common
    match left.terms:
        case ((Apply(op="floordiv", args=(inner, Const(value=j))), 1),) if j > 0:  # x // j // k  is  x // j k
            nested = _sum(_form(inner), _number(left.const * int(j)))
            return _sum(whole, _quotient(nested, _number(k * int(j))))
    return _sum(whole, _atom(Apply("floordiv", (_render(left), Const(k)))))


def _symbolic_quotient(form: _Form, by: _Form) -> _Form:
    """`form // by` of a divisor that is no number: multiples of a positive divisor are taken out."""
    whole, left = _multiples(form, by)
    if not left.terms and left.const == 0 and _is_positive(by):
        return whole
    return _sum(whole, _atom(Apply("floordiv", (_render(left), _render(by)))))


def _multiples(form: _Form, by: _Form) -> tuple[_Form, _Form]:
    """(whole, left), with form = whole * by + left, for a positive symbol `by`; (0, form) for any other."""
    whole, left = _ZERO, form
    match by.terms:
        case ((symbol, 1),) if by.const == 0 and _is_positive(by):
            for atom, times in form.terms:
                factors = list(_factors(atom))
                if symbol in factors:
                    factors.remove(symbol)
                    whole = _sum(whole, _monomial(factors, times))
                    left = _minus(left, _atom(atom, times))
    return whole, left


def _remainder(form: _Form, by: _Form) -> _Form:
    """`form % by`, with the sign of `by`, without the multiples of `by` in `form`."""
    k = by.const
    if by.terms or k <= 0:
        left = _multiples(form, by)[1]
        if not left.terms and left.const == 0 and _is_positive(by):
            return _ZERO
        return _atom(Apply("mod", (_render(left), _render(by))))
    left = _Form(tuple((atom, c) for atom, c in form.terms if c % k), form.const % k)
    return _atom(Apply("mod", (_render(left), Const(k)))) if left.terms else left


def _extreme(op: str, forms: Sequence[_Form]) -> _Form:
    """The least (`min`) or the largest (`max`) of some forms, without those that another one is known to beat."""
    kept: list[_Form] = []
    for part in dict.fromkeys(part for form in forms for part in _joined_by(op, form)):
        if not any(_beats(op, other, part) for other in kept):
            kept = [other for other in kept if not _beats(op, part, other)] + [part]
    kept.sort(key=lambda form: (bool(form.terms), repr(form)))
    found = _render(kept[0])
    for part in kept[1:]:
        found = Apply(op, (found, _render(part)))
    return kept[0] if len(kept) == 1 else _atom(found)


def _joined_by(op: str, form: _Form) -> tuple[_Form, ...]:
    match form:
        case _Form(terms=((Apply(op=found, args=(a, b)), 1),), const=0) if found == op:
            return (*_joined_by(op, _form(a)), *_joined_by(op, _form(b)))
        case _:
            return (form,)


def _beats(op: str, one: _Form, other: _Form) -> bool:
    form = _minus(one, other) if op == "min" else _minus(other, one)
    return _is_polynomial(form) and _below_at_ends(form, {})  # no more: a proof may ask for another such choice


def _render(form: _Form) -> Expr:
    """The form as an expression that a person would write: what is added, then what is taken away, then the number."""
    added = [_term(atom, c) for atom, c in form.terms if c > 0]
    taken = [_term(atom, -c) for atom, c in form.terms if c < 0]
    const = form.const
    if added:
        found = added.pop(0)
    elif const > 0 or not taken:
        found, const = Const(const), 0
    else:
        found = Apply("neg", (taken.pop(0),))
    for term in added:
        found = Apply("add", (found, term))
    for term in taken:
        found = Apply("sub", (found, term))
    if const:
        found = Apply("add" if const > 0 else "sub", (found, Const(abs(const))))
    return found


def _term(atom: Expr, times: int) -> Expr:
    return atom if times == 1 else Apply("mul", (atom, Const(times)))


# --- conditions ------------------------------------------------------------------------------------------------------


def _is_integer(expr: Expr, inexact: Collection[str]) -> bool:
    """Whether the value is a whole number, tensors of `inexact` apart."""
    match expr:
        case Const(value=value):
            return isinstance(value, int) and not isinstance(value, bool)
        case Rank() | Extent() | Local():
            return True
        case Read():
            return expr.tensor not in inexact
        case Cast():
            return expr.dtype in (DType.I8, DType.I32, DType.I64)
        case Apply(op="select", args=(_, *values)):
            return all(_is_integer(value, inexact) for value in values)
        case Apply():
            return expr.op in INTEGER_OPS and all(_is_integer(arg, inexact) for arg in expr.args)
        case Reduce():
            return expr.reducer == "count" or (expr.reducer in INTEGER_REDUCERS and _is_integer(expr.body, inexact))
        case Use():
            return False
        case _:
            assert_never(expr)


def _surely_present(condition: Expr, absent: Collection[str]) -> bool:
    """Whether the condition has a truth value everywhere: one that has none filters, even beside an `or` that holds."""
    for node in walk(condition):
        match node:
            case Reduce() | Use():
                return False
            case Read():
                if node.tensor in absent or not all(isinstance(index, Rank | Const) for index in node.index):
                    return False
            case Apply(op="floordiv" | "mod", args=(_, by)):
                known = _form(by) if _is_integer(by, ()) else _ZERO
                if not (_is_positive(known) or _is_positive(_scaled(known, -1))):
                    return False
            case Apply(op="pow"):
                return False  # of integers, it has no value for a negative exponent
    return True


def _positive_form(expr: Expr, wanted: bool, inexact: Collection[str]) -> Expr:
    """A condition that holds where the truth of `expr` is `wanted`, with `not` only in front of what is no integer."""
    match expr:
        case Const(value=value):
            return Const(bool(value) == wanted)
        case Apply(op="not", args=(inner,)):
            return _positive_form(inner, not wanted, inexact)
        case Apply(op="and" | "or", args=args):
            op = expr.op if wanted else ("or" if expr.op == "and" else "and")
            return Apply(op, tuple(_positive_form(arg, wanted, inexact) for arg in args))
        case Apply(op=op) if wanted or op not in OPPOSITE or not all(_is_integer(a, inexact) for a in expr.args):
            return expr if wanted else Apply("not", (expr,))
        case Apply(op=op):
            return Apply(OPPOSITE[op], expr.args)
        case _:
            return expr if wanted else Apply("not", (expr,))


@dataclass(frozen=True, slots=True)
class _Constraints:
    """A comparison of integers: all of the forms are at most 0, or (`either`) one of them is."""

    forms: tuple[_Form, ...]
    either: bool = False


def _constraints(expr: Expr, inexact: Collection[str]) -> _Constraints | None:
    """What a comparison of integers says; None for any other condition."""
    match expr:
        case Apply(op=op, args=(a, b)) if op in OPPOSITE and _is_integer(a, inexact) and _is_integer(b, inexact):
            more = _minus(_form(a), _form(b))
            less = _scaled(more, -1)
            match op:
                case "le":
                    return _Constraints((more,))
                case "lt":
                    return _Constraints((_sum(more, _ONE),))
                case "ge":
                    return _Constraints((less,))
                case "gt":
                    return _Constraints((_sum(less, _ONE),))
                case "eq":
                    return _Constraints((more, less))
                case _:
                    return _Constraints((_sum(more, _ONE), _sum(less, _ONE)), either=True)
    return None


# --- formulas of the streamed rank -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Upto:
    """The coordinate is `at` at most."""

    at: _Form


@dataclass(frozen=True, slots=True)
class _From:
    """The coordinate is `at` at least."""

    at: _Form


@dataclass(frozen=True, slots=True)
class _Row:
    """A condition without the streamed rank."""

    condition: Expr


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A condition on the streamed rank that is no bound."""


@dataclass(frozen=True, slots=True)
class _All:
    """All parts hold."""

    parts: tuple[_Formula, ...]


@dataclass(frozen=True, slots=True)
class _Any:
    """One of the parts holds."""

    parts: tuple[_Formula, ...]


_Formula: TypeAlias = _Upto | _From | _Row | _Unknown | _All | _Any


def _undecided(formula: _Formula) -> bool:
    match formula:
        case _All() | _Any():
            return any(map(_undecided, formula.parts))
        case _:
            return isinstance(formula, _Unknown)


def _formula(condition: Expr, rank: str, inexact: Collection[str]) -> _Formula:
    """A condition in positive form, solved for the rank: exact for each row, but for what is unknown."""
    if rank not in free_ranks(condition):
        return _Row(condition)
    if isinstance(condition, Apply) and condition.op in ("and", "or"):
        parts = tuple(_formula(arg, rank, inexact) for arg in condition.args)
        return _All(parts) if condition.op == "and" else _Any(parts)
    found = _constraints(condition, inexact)
    if found is None:
        return _Unknown()
    solved = tuple(_solved(form, rank) for form in found.forms)
    return solved[0] if len(solved) == 1 else _Any(solved) if found.either else _All(solved)


def _solved(form: _Form, rank: str) -> _Formula:
    """`form <= 0`, solved for the rank."""
    mine = [(atom, c) for atom, c in form.terms if rank in free_ranks(atom)]
    if not mine:
        return _Row(_comparison(form))
    chosen = next((term for term in mine if isinstance(term[0], Apply) and term[0].op in ("min", "max")), mine[0])
    atom, times = chosen
    rest = _minus(form, _atom(atom, times))
    if isinstance(atom, Apply) and atom.op in ("min", "max"):
        parts = tuple(_solved(_sum(rest, _scaled(_form(arg), times)), rank) for arg in atom.args)
        return _Any(parts) if (atom.op == "min") == (times > 0) else _All(parts)
    if len(mine) > 1:
        return _Unknown()
    upper = times > 0
    scale = _number(abs(times))
    match atom:
        case Rank():
            return _Upto(_quotient(_scaled(rest, -1), scale)) if upper else _From(_quotient_up(rest, scale))
        case Apply(op="floordiv", args=(inner, by)) if rank not in free_ranks(by) and _is_positive(_form(by)):
            k = _form(by)
            if upper:  # inner // k <= q  is  inner <= q k + k - 1
                q = _quotient(_scaled(rest, -1), scale)
                return _solved(_minus(_form(inner), _sum(_product(q, k), k, _number(-1))), rank)
            return _solved(_minus(_product(_quotient_up(rest, scale), k), _form(inner)), rank)
        case Apply(op="mul"):
            factors = _factors(atom)
            inside = [factor for factor in factors if rank in free_ranks(factor)]
            outside = _monomial([factor for factor in factors if rank not in free_ranks(factor)], abs(times))
            if len(inside) == 1 and _is_positive(outside):
                if upper:
                    return _solved(_minus(_form(inside[0]), _quotient(_scaled(rest, -1), outside)), rank)
                return _solved(_minus(_quotient_up(rest, outside), _form(inside[0])), rank)
    return _Unknown()


def _quotient_up(form: _Form, by: _Form) -> _Form:
    """`form / by` rounded up, for a positive `by`."""
    return _quotient(_sum(form, by, _number(-1)), by)


def _comparison(form: _Form) -> Expr:
    """`form <= 0` as a condition, with nothing negative in it."""
    if _nonpositive(form, {}):
        return TRUE
    if _nonpositive(_minus(_ONE, form), {}):
        return FALSE
    strict = form.const == 1
    left = _Form(tuple((a, c) for a, c in form.terms if c > 0), 0 if strict else max(form.const, 0))
    right = _Form(tuple((a, -c) for a, c in form.terms if c < 0), max(-form.const, 0))
    return Apply("lt" if strict else "le", (_render(left), _render(right)))


# --- tiles -----------------------------------------------------------------------------------------------------------


def _end(form: _Form, tiles: frozenset[str], upper: bool) -> _Form:
    """No less (`upper`), or no more, than the form at any coordinate of the tiles."""
    return _sum(
        _number(form.const),
        *(_scaled(_atom_end(atom, tiles, upper == (times > 0)), times) for atom, times in form.terms),
    )


def _atom_end(atom: Expr, tiles: frozenset[str], upper: bool) -> _Form:
    inside = tuple(rank for rank in free_ranks(atom) if rank in tiles)
    if not inside:
        return _atom(atom)
    match atom:
        case Rank(name=name):
            return _atom(Local(f"{name}_last" if upper else f"{name}_first"))
        case Apply(op="floordiv", args=(a, by)) if tiles.isdisjoint(free_ranks(by)) and _is_positive(_form(by)):
            return _quotient(_end(_form(a), tiles, upper), _form(by))
        case Apply(op="mod", args=(_, Const(value=k))) if k > 0:
            return _number(int(k) - 1) if upper else _ZERO
        case Apply(op="min" | "max", args=(a, b)):
            return _extreme(atom.op, [_end(_form(a), tiles, upper), _end(_form(b), tiles, upper)])
        case Apply(op="mul"):
            factors = [_form(factor) for factor in _factors(atom)]
            if all(_nonpositive(_scaled(factor, -1), {}) for factor in factors):
                found = _ONE
                for factor in factors:
                    found = _product(found, _end(factor, tiles, upper))
                return found
    return _atom(Reduce("max" if upper else "min", inside, atom))


def _over_rows(condition: Expr, tiles: frozenset[str], every: bool, inexact: Collection[str]) -> Expr:
    """A condition on a tile: if it holds, `condition` does for `every` row; or it holds if any row passes."""
    inside = tuple(rank for rank in free_ranks(condition) if rank in tiles)
    if isinstance(condition, Apply) and condition.op in ("and", "or"):
        return _joined(condition.op, [_over_rows(arg, tiles, every, inexact) for arg in condition.args])
    found = _constraints(condition, inexact)
    if found is not None:
        parts = [_comparison(_end(form, tiles, every)) for form in found.forms]
        joined = _joined("or" if found.either else "and", parts)
        return joined if inside or isinstance(joined, Const) else condition
    return Reduce("all" if every else "any", inside, condition) if inside else condition


def _joined(op: str, parts: Iterable[Expr]) -> Expr:
    """The parts joined by `and` or `or`, without truth values."""
    neutral, absorbing = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
    kept = [part for part in dict.fromkeys(parts) if part != neutral]
    if absorbing in kept:
        return absorbing
    found = kept[0] if kept else neutral
    for part in kept[1:]:
        found = Apply(op, (found, part))
    return found


@dataclass(frozen=True, slots=True)
class _Range:
    """Coordinates from `first` (None: 0) to below `stop` (None: the extent), if `given` holds for the tile."""

    first: _Form | None = None
    stop: _Form | None = None
    given: Expr = TRUE


_EVERYTHING, _NOTHING = _Range(), _Range(stop=_ZERO)


def _folded(found: _Range) -> _Range:
    """The same without a condition: where it fails, the stretch stops at 0."""
    if found.given == TRUE:
        return found
    if found.given == FALSE:
        return _NOTHING
    stop = _number(FAR) if found.stop is None else found.stop
    return _Range(found.first, _atom(Apply("select", (found.given, _render(stop), Const(0)))))


def _rendered_first(found: _Range) -> Expr | None:
    if found.first is None or (not found.first.terms and found.first.const <= 0):
        return None
    return _render(found.first)


def _widest(op: str, ends: Iterable[_Form | None]) -> _Form | None:
    """The extreme of some ends, none of which may be open."""
    found = list(ends)
    closed = [end for end in found if end is not None]
    return _extreme(op, closed) if len(closed) == len(found) else None


def _narrowest(op: str, ends: Iterable[_Form | None]) -> _Form | None:
    """The extreme of those ends that are not open."""
    closed = [end for end in ends if end is not None]
    return _extreme(op, closed) if closed else None


def _intersection(ranges: Sequence[_Range]) -> _Range:
    return _Range(
        _narrowest("max", (found.first for found in ranges)),
        _narrowest("min", (found.stop for found in ranges)),
        _joined("and", [found.given for found in ranges]),
    )


def _superset(formula: _Formula, tiles: frozenset[str], inexact: Collection[str]) -> _Range:
    """A stretch with every coordinate that is present for some row of the tiles."""
    match formula:
        case _Upto():
            return _Range(stop=_sum(_end(formula.at, tiles, True), _ONE))
        case _From():
            return _Range(first=_end(formula.at, tiles, False))
        case _Row():
            return _Range(given=_over_rows(formula.condition, tiles, False, inexact))
        case _Unknown():
            return _EVERYTHING
        case _All():
            return _intersection([_superset(part, tiles, inexact) for part in formula.parts])
        case _Any():
            parts = [_superset(part, tiles, inexact) for part in formula.parts]
            kept = [_folded(part) for part in parts if part.given != FALSE]
            if not kept:
                return _NOTHING
            return _Range(_widest("min", (p.first for p in kept)), _widest("max", (p.stop for p in kept)))
        case _:
            assert_never(formula)


def _subsets(formula: _Formula, tiles: frozenset[str], inexact: Collection[str]) -> tuple[_Range, ...]:
    """Stretches in which every coordinate is present for every row of the tiles; any one may be empty."""
    match formula:
        case _Upto():
            return (_Range(stop=_sum(_end(formula.at, tiles, False), _ONE)),)
        case _From():
            return (_Range(first=_end(formula.at, tiles, True)),)
        case _Row():
            return _nonempty([_Range(given=_over_rows(formula.condition, tiles, True, inexact))])
        case _Unknown():
            return ()
        case _All():
            found: tuple[_Range, ...] = (_EVERYTHING,)
            for part in formula.parts:
                choices = _subsets(part, tiles, inexact)
                found = _nonempty([_intersection(pair) for pair in itertools.product(found, choices)])
            return found
        case _Any():
            found = ()
            for part in formula.parts:
                for one in _subsets(part, tiles, inexact):
                    found = _with(one, found)
            return found
        case _:
            assert_never(formula)


def _nonempty(ranges: Iterable[_Range]) -> tuple[_Range, ...]:
    kept = [
        found
        for found in dict.fromkeys(ranges)
        if found.given != FALSE and not (found.stop is not None and _nonpositive(_minus(found.stop, _start(found)), {}))
    ]
    return tuple(sorted(kept, key=_preference, reverse=True)[:MOST_ALTERNATIVES])


def _with(one: _Range, ranges: tuple[_Range, ...]) -> tuple[_Range, ...]:
    """The stretches and one more, joined to one of them where nothing lies between the two."""
    for index, other in enumerate(ranges):
        joined = _union(one, other) or _union(other, one)
        if joined is not None:
            return _with(joined, (*ranges[:index], *ranges[index + 1 :]))
    return (*ranges, one)


def _union(one: _Range, other: _Range) -> _Range | None:
    """The stretch that both make up, if `other` provably starts within `one`, or both start or stop at one place."""
    one, other = _folded(one), _folded(other)
    if one.stop == other.stop:
        return _Range(_widest("min", (one.first, other.first)), one.stop)
    starts = _start(other)
    follows = _nonpositive(_minus(_start(one), starts), {}) and (
        one.stop is None or _nonpositive(_minus(starts, one.stop), {})
    )
    if starts == _start(one) or follows:
        return _Range(one.first, _widest("max", (one.stop, other.stop)))
    return None


def _start(found: _Range) -> _Form:
    return _ZERO if found.first is None else found.first


def _preference(found: _Range) -> tuple[bool, bool, bool, bool]:
    """What makes one full stretch likely to be longer than another."""
    capped = found.stop is not None and any(not form.terms for form in _joined_by("min", found.stop))
    return found.stop is None, not capped, found.first is None, found.given == TRUE


# --- proofs ----------------------------------------------------------------------------------------------------------


def _size(size: Size) -> _Form:
    return _number(size) if isinstance(size, int) else _atom(Extent(size))


def _holds(condition: Expr, extents: Mapping[str, Size], inexact: Collection[str]) -> bool:
    """Whether a condition in positive form is proved at all coordinates."""
    if isinstance(condition, Apply) and condition.op in ("and", "or"):
        quantifier: Callable[[Iterable[bool]], bool] = all if condition.op == "and" else any
        return quantifier(_holds(arg, extents, inexact) for arg in condition.args)
    found = _constraints(condition, inexact)
    if found is None:
        return condition == TRUE
    proved = (_nonpositive(form, extents) for form in found.forms)
    return any(proved) if found.either else all(proved)


def _is_positive(form: _Form) -> bool:
    """Whether a divisor or a factor is seen to be at least 1: a positive number, an extent, products of them."""
    return _is_polynomial(form) and _below_at_ends(_minus(_ONE, form), {})


def _is_polynomial(form: _Form) -> bool:
    """Whether nothing but coordinates, ends of tiles and extents is in the form."""
    return all(isinstance(factor, Rank | Extent | Local) for atom, _ in form.terms for factor in _factors(atom))


def _nonpositive(form: _Form, extents: Mapping[str, Size]) -> bool:
    """Whether it is proved that the form is at most 0; ranks without an extent are any coordinates from 0 on."""
    if not form.terms:
        return form.const <= 0
    compounds = sum(isinstance(node, Apply) for atom, _ in form.terms for node in walk(atom))
    return compounds <= MOST_COMPOUNDS and _below(form, _ONE, extents)


def _below(form: _Form, scale: _Form, extents: Mapping[str, Size]) -> bool:
    """Whether form < scale is proved.

    It starts with scale 1 and is multiplied by each divisor: c (a // k) + rest < s follows from c a + k rest < s k.
    """
    for atom, times in form.terms:
        factors = _factors(atom)
        found = next((factor for factor in factors if not isinstance(factor, Rank | Extent | Local)), None)
        if found is None:
            continue
        others = list(factors)
        others.remove(found)
        around = _monomial(others, times)
        rest = _minus(form, _atom(atom, times))
        if not isinstance(found, Apply) or (others and not _nonpositive(_scaled(_monomial(others), -1), {})):
            return False
        return any(_below(f, s, extents) for f, s in _replacements(found, around, times > 0, rest, scale)) or (
            (found.op == "min") != (times > 0)
            and found.op in ("min", "max")
            and all(_below(_sum(rest, _product(around, _form(arg))), scale, extents) for arg in found.args)
        )
    return _below_at_ends(_sum(form, _scaled(scale, -1), _ONE), extents)


def _replacements(found: Apply, around: _Form, upper: bool, rest: _Form, scale: _Form) -> Iterator[tuple[_Form, _Form]]:
    """What rest + around * found < scale follows from, each with the scale it is to be below."""
    match found:
        case Apply(op="min" | "max", args=args) if (found.op == "min") == upper:
            yield from ((_sum(rest, _product(around, _form(arg))), scale) for arg in args)
        case Apply(op="floordiv", args=(inner, by)) if _is_positive(_form(by)):
            k = _form(by)
            bound = _form(inner) if upper else _sum(_form(inner), _scaled(k, -1), _ONE)
            yield _sum(_product(rest, k), _product(around, bound)), _product(scale, k)
        case Apply(op="mod", args=(inner, by)) if _is_positive(_form(by)):
            k = _form(by)
            yield _sum(rest, _product(around, _sum(k, _number(-1)) if upper else _ZERO)), scale
            yield _sum(rest, _product(around, _minus(_form(inner), _product(_quotient(_form(inner), k), k)))), scale


def _below_at_ends(form: _Form, extents: Mapping[str, Size]) -> bool:
    """Whether form <= 0 is proved, for a polynomial of coordinates, ends of tiles and extents."""
    for rank in dict.fromkeys(f.name for atom, _ in form.terms for f in _factors(atom) if isinstance(f, Rank)):
        terms = [(atom, c) for atom, c in form.terms if Rank(rank) in _factors(atom)]
        signs = {c > 0 for _, c in terms}
        if signs != {False} and rank not in extents:
            continue
        if len(signs) == 2 and any(_factors(atom).count(Rank(rank)) > 1 for atom, _ in terms):
            return False
        last = _sum(_size(extents[rank]), _number(-1)) if rank in extents else _ZERO
        ends = [end for end, sign in ((_ZERO, False), (last, True)) if sign in signs]
        return all(_below_at_ends(_replaced(form, Rank(rank), end), extents) for end in ends)
    for symbol in dict.fromkeys(factor for atom, _ in form.terms for factor in _factors(atom)):
        match symbol:
            case Extent():  # by how much it is more than 1, which is no less than 0
                form = _replaced(form, symbol, _sum(_atom(symbol), _ONE))
            case Local(name=name) if name.endswith("_last"):
                rank = name.removesuffix("_last")
                form = _replaced(form, symbol, _sum(_atom(Local(f"{rank}_first")), _atom(Local(f"{rank}_length"))))
    return form.const <= 0 and all(times <= 0 for _, times in form.terms)


def _replaced(form: _Form, factor: Expr, by: _Form) -> _Form:
    """The polynomial with another in the place of one of its factors."""
    found = _number(form.const)
    for atom, times in form.terms:
        part = _number(times)
        for piece in _factors(atom):
            part = _product(part, by if piece == factor else _atom(piece))
        found = _sum(found, part)
    return found
