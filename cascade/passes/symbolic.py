"""The terms of a map, by SymPy: expand, split exponents, collect by factors; and back to expressions.

Loaded only where a map was never decided before. Symbols are those of the atoms: x0, x1, ... of the element, r0, r1,
... of the state; all are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from cascade.ir import Apply, Const, Expr, Local
from cascade.passes.separate import Family, Terms

MAX_TERMS = 24


def families(expr: Expr, shifts: Mapping[tuple[str, str], int]) -> tuple[Family, ...] | str | None:
    """The families of a map over atoms; None where it has no such form, the reason where its form would cancel."""
    try:
        return tuple(_family(key, group, shifts) for key, group in _grouped(expr).items())
    except _Cancels as no:
        return str(no)
    except _NoForm:
        return None


def frame_free(expr: Expr, maxima: Mapping[str, str]) -> tuple[Family, ...]:
    """Exponential families in whose factors no frame of an exponent is left; empty where there are none.

    `maxima` says which atom of the state is the largest value of which of the element.
    """
    try:
        return tuple(_frame_free(key, group, maxima) for key, group in _grouped(expr).items())
    except _NoForm:
        return ()


def _grouped(expr: Expr) -> dict[tuple[Any, Any], list[_Term]]:
    """The terms of a map by their exponents, those of the element and those of the state."""
    grouped: dict[tuple[Any, Any], list[_Term]] = {}
    for term in _expanded(_symbolic(expr)):
        framed = term.x_power != 0 and term.r_power != 0
        key = (term.x_power, term.r_power) if framed else (sympy.S.Zero, sympy.S.Zero)
        grouped.setdefault(key, []).append(term if framed else term.unframed())
    if sum(len(group) for group in grouped.values()) > MAX_TERMS:
        raise _NoForm
    return grouped


class _NoForm(Exception):
    """The map has no such form."""


class _Cancels(_NoForm):
    """The only form is one whose terms cancel."""


def _symbol(name: str) -> Any:
    return sympy.Symbol(name, real=True)


def _symbolic(expr: Expr) -> Any:
    match expr:
        case Const():
            return sympy.nsimplify(expr.value) if isinstance(expr.value, int) else sympy.Float(expr.value)
        case Local():
            return _symbol(expr.name)
        case Apply(op=op, args=args) if op in SYMPY:
            return SYMPY[op](*map(_symbolic, args))
        case _:
            raise _NoForm


SYMPY: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "exp": sympy.exp,
    "exp2": lambda a: sympy.exp(a * sympy.log(2)),
    "log": sympy.log,
    "log2": lambda a: sympy.log(a) / sympy.log(2),
    "sqrt": sympy.sqrt,
    "rsqrt": lambda a: 1 / sympy.sqrt(a),
    "abs": sympy.Abs,
    "pow": lambda a, b: a**b,
}


@dataclass(frozen=True, slots=True)
class _Term:
    """x * r * exp(x_power + r_power), each of one side."""

    x: Any
    r: Any
    x_power: Any
    r_power: Any

    def unframed(self) -> _Term:
        """The same with its exponential among the factors."""
        return _Term(self.x * sympy.exp(self.x_power), self.r * sympy.exp(self.r_power), sympy.S.Zero, sympy.S.Zero)


def _expanded(expr: Any) -> list[_Term]:
    expr = sympy.expand_log(sympy.expand(expr, power_base=True, force=True), force=True)
    expr = sympy.expand(expr, force=True)
    if expr.has(sympy.nan, sympy.zoo):
        raise _NoForm
    return [_term(term) for term in sympy.Add.make_args(expr)]


def _term(term: Any) -> _Term:
    x = r = sympy.S.One
    x_power = r_power = sympy.S.Zero
    for factor in sympy.Mul.make_args(term):
        if isinstance(factor, sympy.exp):
            for part in sympy.Add.make_args(sympy.expand(factor.args[0])):
                side = _side(part)
                x_power, r_power = (x_power, r_power + part) if side == "r" else (x_power + part, r_power)
        elif _side(factor) == "r" or factor.is_number:
            r *= factor
        else:
            x *= factor
    return _Term(x, r, x_power, r_power)


def _side(expr: Any) -> str:
    """The side of a factor: "x", also for numbers, or "r"."""
    letters = {symbol.name[0] for symbol in expr.free_symbols} - {"c"}
    if len(letters) > 1:
        raise _NoForm
    return letters.pop() if letters else "r" if expr.free_symbols else "x"


def _family(key: tuple[Any, Any], group: list[_Term], shifts: Mapping[tuple[str, str], int]) -> Family:
    x_power, r_power = key
    total = sympy.Add(*[term.x * term.r for term in group])
    if x_power != 0:
        moved = _in_frame(total, x_power, -r_power)
        return Family(True, to_expr(x_power), to_expr(-r_power), _collected(moved))
    for (x, r), sign in shifts.items():
        a, rho = _symbol(x), -sign * _symbol(r)
        if sympy.degree(total, a) >= 2 if total.is_polynomial(a) else False:
            moved = sympy.expand(total.subs(a, U + rho))
            if not moved.has(_symbol(r)):
                return Family(False, Local(x), to_expr(rho), _collected(moved))
    product = _comoment(total, shifts)
    if product is not None:
        return product
    _no_cancellation(total)
    return Family(False, None, None, _merged(_collected(total)))


U = sympy.Symbol("u", real=True)


def _in_frame(total: Any, a: Any, rho: Any) -> Any:
    """The factors beside exp(a - rho), with a written as u + rho where they mention it."""
    symbols = [symbol for symbol in a.free_symbols if symbol.name.startswith("x")]
    if len(symbols) != 1 or not total.has(symbols[0]):
        return total
    scale = a.coeff(symbols[0])
    if a != scale * symbols[0] or not total.is_polynomial(symbols[0]):
        return total
    return sympy.expand(total.subs(symbols[0], (U + rho) / scale))


def _collected(total: Any) -> tuple[Terms, ...]:
    """The polynomial by its factor of the element, then by the power of u."""
    found: dict[Any, dict[int, Any]] = {}
    for term in sympy.Add.make_args(sympy.expand(total)):
        x, r, power = sympy.S.One, sympy.S.One, 0
        for factor in sympy.Mul.make_args(term):
            base, exponent = factor.as_base_exp()
            if base == U:
                power = int(exponent)
            elif factor.is_number or _side(factor) == "r":
                r *= factor
            else:
                x *= factor
        powers = found.setdefault(x, {})
        powers[power] = powers.get(power, 0) + r
    return tuple(
        Terms(to_expr(x), tuple(to_expr(p[j]) if p.get(j, 0) != 0 else None for j in range(max(p) + 1)))
        for x, p in found.items()
    )


def _frame_free(key: tuple[Any, Any], group: list[_Term], maxima: Mapping[str, str]) -> Family:
    """The family in a frame that cancels, elements beside the exponential in frames of their own."""
    a, rho = key[0], -key[1]
    total = sympy.expand(_in_frame(sympy.Add(*[term.x * term.r for term in group]), a, rho))
    frames: dict[str, Expr] = {}
    for name, maximum in sorted(maxima.items()):
        x, r = _symbol(name), _symbol(maximum)
        about = sympy.expand(total.subs(x, _carried(name) + r))
        if total.has(x) and total.has(r) and not about.has(r):
            total, frames[name] = about, Local(maximum)
    if a == 0 or any(_has_state(symbol) for symbol in rho.free_symbols & total.free_symbols):
        raise _NoForm
    carried = {U, *map(_carried, frames)}
    parts: dict[Any, dict[Any, Any]] = {}  # by the weight, by the powers of what is carried: the factor of the state
    for term in sympy.Add.make_args(total):
        x = r = power = sympy.S.One
        for factor in sympy.Mul.make_args(term):
            if factor.free_symbols & carried:
                power *= factor
            elif factor.is_number or _side(factor) == "r":
                r *= factor
            else:
                x *= factor
        found = parts.setdefault(x, {})
        found[power] = found.get(power, 0) + r
    terms = (term for x, found in parts.items() for term in _moments(x, found, frames))
    return Family(True, to_expr(a), to_expr(rho), tuple(terms), frames=tuple(frames.items()))


def _carried(name: str) -> Any:
    """An atom of the element less its frame."""
    return sympy.Symbol(f"w_{name}", real=True)


def _moments(x: Any, found: Mapping[Any, Any], frames: Mapping[str, Expr]) -> Iterator[Terms]:
    """The terms of one weight: powers of u, and combinations of what is linear that have one factor of the state."""
    powers = {int(sympy.degree(p, U)): f for p, f in found.items() if p == 1 or p.as_base_exp()[0] == U}
    linear = {_carried(name): name for name in frames if _carried(name) in found}
    if len(powers) + len(linear) < len(found):
        raise _NoForm
    left = {w: found[w] for w in linear}
    if left and max(powers, default=0) == 1:
        left = {U: powers.pop(1), **left}
    if powers:
        factors = (powers.get(j) for j in range(max(powers) + 1))
        yield Terms(to_expr(x), tuple(None if f is None else to_expr(sympy.together(f)) for f in factors))
    while left:
        first = next(iter(left.values()))
        shares = {w: sympy.simplify(f / first) for w, f in left.items()}
        shares = {w: share for w, share in shares.items() if share.is_number}
        left = {w: f for w, f in left.items() if w not in shares}
        combined = sympy.Add(*[share * (U if w == U else _symbol(linear[w])) for w, share in shares.items()])
        yield Terms(to_expr(x), (to_expr(sympy.together(first)),), to_expr(combined))


def _merged(terms: tuple[Terms, ...]) -> tuple[Terms, ...]:
    """Terms with one factor of the state taken together: one accumulator for all of them."""
    found: dict[tuple[Expr | None, ...], Expr] = {}
    for term in terms:
        before = found.get(term.factors)
        found[term.factors] = term.weight if before is None else Apply("add", (before, term.weight))
    return tuple(Terms(weight, factors) for factors, weight in found.items())


def _comoment(total: Any, shifts: Mapping[tuple[str, str], int]) -> Family | None:
    """A factor of the state times (a - rho) * (b - sigma); None for other maps."""
    for (x, r), sign in shifts.items():
        for (y, s), other in shifts.items():
            frames = -sign * _symbol(r), -other * _symbol(s)
            moved = sympy.expand(total.subs({_symbol(x): U + frames[0], _symbol(y): W + frames[1]}, simultaneous=True))
            factor = sympy.simplify(moved / (U * W)) if x < y else moved
            if x < y and not factor.has(U, W, _symbol(r), _symbol(s)) and _only_state(factor):
                terms = (Terms(Const(1), (to_expr(factor),)),)
                return Family(False, Local(x), to_expr(frames[0]), terms, Local(y), to_expr(frames[1]))
    return None


W = sympy.Symbol("w", real=True)


def _only_state(factor: Any) -> bool:
    return all(symbol.name[0] in "rc" for symbol in factor.free_symbols)


def _no_cancellation(total: Any) -> None:
    """A product of elements beside such of lower degree times the state has no form: raw moments would cancel."""
    terms = sympy.Add.make_args(total)
    elements = [symbol for symbol in total.free_symbols if symbol.name[0] == "x"]
    if len(terms) == 1 or not elements or not total.is_polynomial(*elements):
        return
    degrees = {term: _shifted_degree(term, elements, terms) for term in terms}
    most = max(degrees.values())
    if most >= 2 and any(0 < degree < most and _has_state(term) for term, degree in degrees.items()):
        raise _Cancels("raw moments of second degree would cancel, and no frame centres them")


def _shifted_degree(term: Any, elements: list[Any], terms: tuple[Any, ...]) -> int:
    """The degree of a term in the elements that some terms lack: a weight that is in all of them does not cancel."""
    varying = [x for x in elements if any(not t.has(x) for t in terms) or _powers(x, terms)]
    return sum(int(sympy.degree(term, x)) if term.has(x) else 0 for x in varying)


def _powers(x: Any, terms: tuple[Any, ...]) -> bool:
    return len({sympy.degree(term, x) for term in terms}) > 1


def _has_state(term: Any) -> bool:
    return any(symbol.name[0] == "r" for symbol in term.free_symbols)


# --- back to expressions ---------------------------------------------------------------------------------------------


def to_expr(found: Any) -> Expr:
    """What SymPy made of an expression, as an expression again."""
    if found.is_Symbol:
        return Local(found.name)
    if found.is_Integer:
        return Const(int(found)) if abs(int(found)) < 2**53 else Const(float(found))
    if found.is_number:
        return Const(float(found))
    if found.is_Add:
        first, *rest = sorted(found.args, key=lambda arg: (arg.could_extract_minus_sign(), str(arg)))
        result = to_expr(first)
        for arg in rest:
            minus = arg.could_extract_minus_sign()
            result = Apply("sub" if minus else "add", (result, to_expr(-arg if minus else arg)))
        return result
    if found.is_Mul:
        return _quotient(found)
    if found.is_Pow and not isinstance(found, sympy.exp):
        return _power(*found.as_base_exp())
    functions = {sympy.exp: "exp", sympy.log: "log", sympy.Abs: "abs"}
    if found.func in functions:
        return Apply(functions[found.func], (to_expr(found.args[0]),))
    raise _NoForm


def _quotient(found: Any) -> Expr:
    if found.could_extract_minus_sign():
        return Apply("neg", (to_expr(-found),))
    over, under = found.as_numer_denom()
    if under == 1 or under.is_number:
        if under != 1:
            over = found
        factors = sorted(sympy.Mul.make_args(over), key=lambda f: (not f.is_number, str(f)))
        result = to_expr(factors[0])
        for factor in factors[1:]:
            result = Apply("mul", (result, to_expr(factor)))
        return result
    return Apply("div", (to_expr(over), to_expr(under)))


def _power(base: Any, exponent: Any) -> Expr:
    if exponent == sympy.Rational(1, 2):
        return Apply("sqrt", (to_expr(base),))
    if exponent.could_extract_minus_sign():
        return Apply("div", (Const(1.0), to_expr(base**-exponent)))
    if exponent.is_Integer and int(exponent) <= 8:
        result = factor = to_expr(base)
        for _ in range(int(exponent) - 1):
            result = Apply("mul", (result, factor))
        return result
    return Apply("pow", (to_expr(base), to_expr(exponent)))
