"""What each rule of the grammar makes, while it is parsed: one method of `Nodes` for each rule or alias of the grammar.

Lark calls the methods bottom up, so that parsing never recurses. Expressions are IR nodes already, with two stand-ins
that `resolve.py` replaces once every name is known: a bare name is a `Read` without an index, whatever it turns out
to be, and an application is a `Use`, of a `def`, a built-in function or another cascade.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lark import Transformer, v_args

from cascade.errors import Diagnostic, Span, quoted_list
from cascade.frontend.tokens import Word
from cascade.ir import (
    Apply, Bind, Cast, Const, Directive, DType, Expr, Fold, FoldInit, FoldMerge, Fuse, Given, GroupBy, Loop, Mesh,
    Param, Part, Phase, Place, Rank, Read, Reduce, Region, Result, Shard, Size, Split, Stage, Stream, Target, Tile, Use,
    Wait,
)  # fmt: skip
from cascade.ops import FUNCTIONS, INFIX, REDUCERS, RESERVED
from cascade.wording import closest, quote

MAX_INT = 2**63  # the integers of the language are 64 bits wide; this one is for -2**63


class Mistake(Exception):
    """One diagnostic on its way out of a rule; `diagnose.py` collects those of all statements."""

    def __init__(
        self, code: str, message: str, where: Word | Expr | Span | None = None, help_: str | None = None
    ) -> None:
        span = where if isinstance(where, Span) or where is None else where.span
        self.diagnostic = Diagnostic(code, message, span, help_)
        super().__init__(message)


# --- what becomes IR only when names are known -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Equation:
    """A statement as written: left sides are reads; `choice` is the rank and `k` of a `topk`.

    One that could not be read keeps its left sides, for the statements that read them, and has no right side.
    """

    targets: tuple[Read, ...]
    expr: Expr | None
    where: Expr | None
    inits: tuple[tuple[Read, Expr], ...]
    choice: tuple[str, Size] | None
    span: Span


@dataclass(frozen=True, slots=True)
class FunctionText:
    """A `def` as written."""

    name: Word
    ranks: tuple[Word, ...]
    params: tuple[Word, ...]
    body: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class CascadeText:
    """A cascade as written, its span the header's."""

    name: Word
    params: tuple[Param, ...]
    results: tuple[Result, ...]
    given: tuple[Given, ...]
    body: tuple[Equation, ...]
    schedule: tuple[Directive, ...]
    span: Span


DefinitionText: TypeAlias = FunctionText | CascadeText
FoldHead: TypeAlias = tuple[Word, Word]  # `fold`, and the rank
Clause: TypeAlias = tuple[Word, ...] | FoldInit | FoldMerge
"""A line of a fold: `state`, `update` or `finalize` with names, or a first state or a merge with names unresolved."""
RegionLine: TypeAlias = Stage | Phase | tuple[Word, Any]
"""A line of a region: a stage, a phase, or a word with what stands behind it."""
Header: TypeAlias = tuple[Word, tuple[Param, ...], tuple[Result, ...], tuple[Given, ...], Span]


# --- rules -----------------------------------------------------------------------------------------------------------


@v_args(inline=True)
class Nodes(Transformer[Word, Any]):
    """The rules, in the order of the grammar."""

    def program(self, *definitions: DefinitionText) -> tuple[DefinitionText, ...]:
        return definitions

    def cascade(
        self, header: Header, body: tuple[Equation, ...], schedule: tuple[Directive, ...] | None
    ) -> CascadeText:
        return CascadeText(*header[:4], body, schedule or (), header[4])

    def header(
        self, word: Word, name: Word, _open: Word, params: tuple[Param, ...] | None, _close: Word, _arrow: Word,
        results: tuple[Result, ...], given: tuple[Given, ...] | None,
    ) -> Header:  # fmt: skip
        return name, params or (), results, given or (), across(word, given[-1] if given else results[-1])

    def extents(self, _with: Word, *given: Given) -> tuple[Given, ...]:
        return given

    def given(self, rank: Word, extent: Word) -> Given:
        return Given(own_name(rank), size(extent), span=across(rank, extent))

    def body(self, *statements: Equation) -> tuple[Equation, ...]:
        return statements

    def schedule(self, *directives: Directive) -> tuple[Directive, ...]:
        return directives

    def params(self, *params: Param) -> tuple[Param, ...]:
        return params

    def results(self, *results: Result) -> tuple[Result, ...]:
        return results

    def param(self, name: Word, dtype: Word | None, shape: tuple[tuple[Size, ...], Span]) -> Param:
        sizes, span = shape
        return Param(own_name(name), type_named(dtype), sizes, span=name.span.to(span))

    def result(
        self, name: Word, dtype: Word | None, shape: tuple[tuple[Size, ...], Span], fill: Const | None
    ) -> Result:
        sizes, span = shape
        over = name.span.to(fill.span if fill else span)
        return Result(own_name(name), type_named(dtype), sizes, fill or Const(0), span=over)

    def shape(self, first: Word, sizes: tuple[Size, ...] | None, last: Word) -> tuple[tuple[Size, ...], Span]:
        return sizes or (), across(first, last)

    def sizes(self, *sizes: Word) -> tuple[Size, ...]:
        return tuple(size(word) for word in sizes)

    def below_zero(self, minus: Word, number: Word) -> Word:
        raise Mistake("C222", f"an extent is -{number}", minus, "extents are 0 or more")

    # --- statements

    def equation(
        self, targets: tuple[Read, ...], expr: Expr, where: Expr | None, inits: tuple[tuple[Read, Expr], ...] | None
    ) -> Equation:
        last = inits[-1][1] if inits else where if where is not None else expr
        return Equation(targets, expr, where, inits or (), None, across(targets[0], last))

    def topk(self, targets: tuple[Read, ...], rank: Word, k: Word, body: Expr, where: Expr | None) -> Equation:
        last = body if where is None else where
        return Equation(targets, body, where, (), (own_name(rank), size(k)), across(targets[0], last))

    def targets(self, *targets: Read) -> tuple[Read, ...]:
        return targets

    def target(self, name: Word, _open: Word | None, index: tuple[Expr, ...] | None, last: Word | None) -> Read:
        return Read(own_name(name), index or (), span=across(name, last or name))

    def inits(self, *inits: tuple[Read, Expr]) -> tuple[tuple[Read, Expr], ...]:
        return inits

    def init(self, target: Read, expr: Expr) -> tuple[Read, Expr]:
        return target, expr

    # --- expressions

    def infix(self, left: Expr, symbol: Word, right: Expr) -> Apply:
        return Apply(INFIX[symbol].name, (left, right), span=across(left, right))

    def prefix(self, symbol: Word, arg: Expr) -> Apply:
        return Apply("not" if symbol == "not" else "neg", (arg,), span=across(symbol, arg))

    def reduce(self, name: Word, ranks: tuple[Expr, ...], body: Expr) -> Expr:
        bound, span = rank_names(ranks), across(name, body)
        if name in REDUCERS:
            return Reduce(str(name), bound, body, span=span)
        return Use(str(name), bound, (body,), span=span)

    def apply(self, name: Word, ranks: tuple[Expr, ...], body: Expr) -> Use:
        if not all(isinstance(rank, Read) and not rank.index for rank in ranks):  # an element, then another operand
            raise Mistake("C105", f"expected an operator after {quote(name)}, found an operand", body, PRODUCT)
        return Use(own_name(name), rank_names(ranks), (body,), span=across(name, body))

    def negative(self, minus: Word, number: Const) -> Const:
        return Const(-number.value, span=across(minus, number))

    def number(self, word: Word) -> Const:
        return Const(integer(word) if word.type == "INT" else real(word), span=word.span)

    def truth(self, word: Word) -> Const:
        return Const(word == "true", span=word.span)

    def bare(self, name: Word) -> Read:
        return Read(own_name(name), (), span=name.span)

    def read(self, name: Word, _open: Word, index: tuple[Expr, ...] | None, last: Word) -> Read:
        return Read(own_name(name), index or (), span=across(name, last))

    def call(self, name: Word, _open: Word, args: tuple[Expr, ...] | None, last: Word) -> Use:
        if name.type == "REDUCER" and name not in FUNCTIONS:
            raise Mistake("C107", f"{name} needs the ranks it works along", name, f"write {name}[k] x")
        return Use(str(name), (), args or (), span=across(name, last))

    def call_along(
        self, name: Word, _open: Word, ranks: tuple[Expr, ...], _close: Word, _paren: Word, first: Expr, _comma: Word,
        rest: tuple[Expr, ...], last: Word,
    ) -> Use:  # fmt: skip
        if name in REDUCERS:
            given = f"{name}[...] folds one expression, {1 + len(rest)} are given"
            raise Mistake("C107", given, across(name, last), f"write {name}[k] x")
        return Use(str(name), rank_names(ranks), (first, *rest), span=across(name, last))

    def cast(self, first: Word, _open: Word, arg: Expr, _comma: Word, dtype: Word, last: Word) -> Cast:
        return Cast(type_named(dtype) or DType.F32, arg, span=across(first, last))

    def parens(self, first: Word, inner: Expr, last: Word) -> Expr:
        if isinstance(inner, (Read, Const)):  # an error about a name points at the name alone
            return inner
        return replace(inner, span=across(first, last))

    def exprs(self, *exprs: Expr) -> tuple[Expr, ...]:
        return exprs

    # --- schedule

    def mesh(self, word: Word, axis: Word, extent: Word) -> Mesh:
        return Mesh(str(axis), size(extent), span=across(word, extent))

    def shard(self, word: Word, rank: Word, _over: Word, axis: Word) -> Shard:
        return Shard(str(rank), str(axis), span=across(word, axis))

    def split_into(self, word: Word, rank: Word, _into: Word, parts: Word) -> Split:
        return Split(str(rank), size(parts), span=across(word, parts))

    def split_at(self, word: Word, rank: Word, _at: Word, *cuts: Word) -> Split:
        return Split(str(rank), None, tuple(integer(cut) for cut in cuts), span=across(word, cuts[-1]))

    def fuse(self, word: Word, *names: Word) -> Fuse:
        *statements, _over, rank = names
        return Fuse(tuple(str(name) for name in statements), str(rank), span=across(word, rank))

    def fold_head(self, word: Word, rank: Word) -> FoldHead:
        return word, rank

    def fold(self, head: FoldHead, *clauses: Clause) -> Fold:
        return fold_of(head, clauses)

    def fold_names(self, *words: Word) -> tuple[Word, ...]:
        return words

    def fold_init(self, target: Read, first: Expr | Word) -> FoldInit:
        expr = None if isinstance(first, Word) else first
        return FoldInit(target_of(target), expr, span=across(target, first))

    def fold_merge(self, word: Word, target: Read, expr: Expr) -> FoldMerge:
        return FoldMerge(target_of(target), expr, span=across(word, expr))

    def group_by(
        self, word: Word, statements: tuple[Word, ...], _by: Word, tensor: Word, ranks: tuple[Word, ...], sign: Word,
        bound: Word,
    ) -> GroupBy:  # fmt: skip
        if sign != "<":
            raise Mistake("C105", f"expected '<', found {quote(sign)}", sign, "write group {H} by I[t] < N")
        index = tuple(Rank(str(rank), span=rank.span) for rank in ranks)
        key = Read(str(tensor), index, span=across(tensor, ranks[-1]))
        return GroupBy(tuple(str(name) for name in statements), key, size(bound), span=across(word, bound))

    def tiles(self, word: Word, *tiles: tuple[Word, Word]) -> Tile:
        sizes = tuple((str(rank), integer(extent)) for rank, extent in tiles)
        return Tile(sizes, span=across(word, tiles[-1][1]))

    def tile(self, rank: Word, extent: Word) -> tuple[Word, Word]:
        return rank, extent

    def stream(self, word: Word, name: Word, *parts: Part) -> Stream:
        return Stream(str(name), parts, span=across(word, parts[-1]))

    def wait(self, word: Word, part: Part, _on: Word, on: Part) -> Wait:
        return Wait(part, on, span=across(word, on))

    def part(self, name: Word, index: Word | None) -> Part:
        return Part(str(name), integer(index) if index else None, span=across(name, index or name))

    def region(self, word: Word, name: Word, loops: tuple[Loop, ...] | None, *lines: Any) -> Region:
        return region_of(name, loops or (), lines[:-1], across(word, name))

    def stage(self, word: Word, names: tuple[Word, ...], close: Word, loops: tuple[Loop, ...] | None) -> Stage:
        return Stage(tuple(map(str, names)), loops or (), span=across(word, loops[-1] if loops else close))

    def keep(self, word: Word, tensor: Word, _in: Word, level: Word) -> RegionLine:
        return word, (str(tensor), str(level))

    def spill(self, word: Word, names: tuple[Word, ...]) -> RegionLine:
        return word, tuple(map(str, names))

    def phase(self, word: Word, *parts: Any) -> Phase:
        *work, drain_word, drain = parts
        pairs = tuple((str(unit), tuple(map(str, names))) for unit, names in work)
        last = work[-1][1][-1] if drain_word is None else drain
        return Phase(pairs, None if drain is None else str(drain), span=across(word, last))

    def work(self, unit: Word, names: tuple[Word, ...]) -> tuple[Word, tuple[Word, ...]]:
        return unit, names

    def capacity(self, word: Word, number: Word) -> RegionLine:
        return word, integer(number)

    def double(self, word: Word) -> RegionLine:
        return word, True

    def over(self, _over: Word, *loops: Loop) -> tuple[Loop, ...]:
        return loops

    def loop(self, label: Word | None, rank: Word, extent: Word) -> Loop:
        if extent.type == "NAME" and extent != "fit":
            message = f"expected a number or 'fit', found {quote(extent)}"
            raise Mistake("C105", message, extent, "a loop takes some coordinates an iteration, or as many as fit")
        count = None if extent == "fit" else integer(extent)
        return Loop(str(rank), count, str(label or rank), span=across(label or rank, extent))

    def unit(self, number: Word | None, name: Word) -> Word:
        if number is None:
            return name
        if (number.line, number.end_column) != (name.line, name.column):
            raise Mistake("C105", f"expected a unit, found {quote(number)}", number, "the name of a unit is one word")
        return Word.at(f"{number}{name}", name.type, number.source, number.line, number.column)

    def bind(self, word: Word, names: tuple[Word, ...], _on: Word, unit: Word) -> Bind:
        return Bind(tuple(map(str, names)), str(unit), span=across(word, unit))

    def place(
        self, word: Word, name: Word, _on: Word, rows: tuple[str, ...], columns: tuple[str, ...], _by: Word, last: Word
    ) -> Place:
        stream = self.side(last)
        return Place(str(name), rows, columns, stream[0] if stream else None, span=across(word, last))

    def side(self, *words: Word) -> tuple[str, ...]:
        wrong = next((word for word in words if word.type != "NAME" and word not in ("*", "1")), None)
        if wrong is not None:
            message = f"expected ranks or 1, found {quote(wrong)}"
            raise Mistake("C105", message, wrong, "a side of an array has ranks, as in c * r, or 1 where it has none")
        return () if words[0] == "1" else tuple(map(str, words[::2]))

    # --- definitions

    def function(
        self, name: Word, ranks: tuple[Word, ...] | None, params: tuple[Word, ...] | None, body: Expr
    ) -> FunctionText:
        if name in REDUCERS:
            own_name(name)
        return FunctionText(name, ranks or (), params or (), body, across(name, body))

    def names(self, *names: Word) -> tuple[Word, ...]:
        return names


PRODUCT = "a product is written with '*'"


def across(first: Word | Expr | Param | Part, last: Word | Expr | Param | Result | Given | Part | Loop) -> Span:
    """From the start of one node to the end of another."""
    start = first.span
    assert start is not None  # every node of the frontend has a span
    return start.to(last.span)


def region_of(name: Word, loops: tuple[Loop, ...], lines: Iterable[RegionLine], span: Span) -> Region:
    """The region of these lines; several lines of one kind count as one. Its span is that of its head."""
    stages, phases = list[Stage](), list[Phase]()
    keep, spill = list[tuple[str, str]](), list[str]()
    single: dict[str, Any] = {}
    for line in lines:
        if isinstance(line, Stage):
            stages.append(line)
        elif isinstance(line, Phase):
            phases.append(line)
        elif line[0] == "keep":
            keep.append(line[1])
        elif line[0] == "spill":
            spill += line[1]
        elif line[0] in single:
            raise Mistake("C105", f"{quote(line[0])} is said twice", line[0], "keep one of the two")
        else:
            single[line[0]] = line[1]
    return Region(str(name), tuple(stages), loops, tuple(keep), tuple(spill), tuple(phases), **single, span=span)


def fold_of(head: FoldHead, clauses: Iterable[Clause]) -> Fold:
    """The fold of these lines; several lines of names of one kind count as one."""
    names: dict[str, list[str]] = {"state": [], "update": [], "finalize": []}
    init, merge, span = list[FoldInit](), list[FoldMerge](), across(*head)
    for clause in clauses:
        if isinstance(clause, tuple):
            names[clause[0]] += [str(name) for name in clause[1:]]
        elif isinstance(clause, FoldInit):
            init.append(clause)
        else:
            merge.append(clause)
        span = span.to(clause[-1].span if isinstance(clause, tuple) else clause.span)
    state, update, finalize = (tuple(listed) for listed in names.values())
    return Fold(str(head[1]), state, tuple(init), update, tuple(merge), finalize, span=span)


def target_of(left: Read) -> Target:
    """The target that a left side names."""
    return Target(left.tensor, rank_names(left.index), span=left.span)


def own_name(word: Word) -> str:
    """The word as the name of a tensor or a rank variable; those of functions and reducers are taken."""
    if word in RESERVED:
        form = f"a function, {word}(x)" if word in FUNCTIONS else f"a reduction, {word}[k] x"
        raise Mistake("C201", f"'{word}' is reserved: it is {form}", word, f"choose another name, such as {word}1")
    return sys.intern(str(word))


def rank_names(exprs: tuple[Expr, ...]) -> tuple[str, ...]:
    """The rank variables between the brackets of a reduction, an application or a left side."""
    for expr in exprs:
        if not isinstance(expr, Read) or expr.index:
            raise Mistake("C107", "expected a rank variable, found an expression", expr, RANKS)
    return tuple(expr.tensor for expr in exprs if isinstance(expr, Read))


RANKS = "a left side and the brackets of a reduction list rank variables, as in Z[m] = sum[k] A[m,k]"


def type_named(word: Word | None) -> DType | None:
    """The element type of that name."""
    known = {dtype.value: dtype for dtype in DType}
    if word is None or word in known:
        return known[word] if word else None
    close = closest(word, known)
    meant = f"did you mean {quote(close)}? " if close else ""
    raise Mistake("C110", f"{quote(word)} is not a type", word, f"{meant}types: {quoted_list(known, 20)}")


def size(word: Word) -> Size:
    """An extent: a number or a symbol."""
    return integer(word) if word.type == "INT" else own_name(word)


def integer(word: Word) -> int:
    """The value of an integer literal."""
    if len(word.lstrip("0")) > 19 or int(word) > MAX_INT:  # the length first: Python refuses to read very long ones
        message = f"an integer has at most 64 bits, its limit is {MAX_INT}"
        raise Mistake("C106", message, word, "write a float, as 1e30, where a value is meant")
    return int(word)


def real(word: Word) -> float:
    """The value of a float literal, `inf` or `nan`."""
    value = float(word)
    if math.isinf(value) and word != "inf":
        raise Mistake("C106", f"{quote(word)} is beyond the largest float, 1.7976931348623157e308", word, "write inf")
    return value
