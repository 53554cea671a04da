"""What the names of a definition mean: tensors, rank variables, shape symbols, functions, cascades.

A name is a tensor where it is declared or defined as one, a rank variable where it is lower case and stands on a left
side, in the brackets of a reduction or in an index, a shape symbol where a declaration has it. One that is none of
these stays a read of an unknown tensor, which the verifier reports. Nothing recurses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from cascade.errors import Diagnostic, Span
from cascade.frontend.nodes import (
    PRODUCT, CascadeText, Equation, FunctionText, Mistake, across, rank_names, target_of,
)  # fmt: skip
from cascade.ir import (
    Apply, Call, Cascade, Const, Directive, Einsum, Expr, Extent, Fold, Function, Init, Local, Param, Rank, Read,
    Reduce, Result, Stmt, Target, TopK, Use,
)  # fmt: skip
from cascade.ops import FUNCTIONS, REDUCERS
from cascade.walk import children, fold_expressions, fold_parts, map_fold, with_children
from cascade.wording import MAX_NAME, closest, pinpoint, quote

MAX_DEPTH = 200  # of an expression: whatever comes later may recurse into one


@dataclass(frozen=True, slots=True)
class Callee:
    """A definition that text may use: its name in the IR, and whether it is a cascade."""

    name: str
    cascade: bool


@dataclass(frozen=True, slots=True)
class Resolved:
    """A definition whose names are resolved, and what is wrong with it.

    `doubtful` are the statements with a mistake, of which little else can be said; `lost` those that have only a left
    side in the IR.
    """

    definition: Function | Cascade
    found: tuple[Diagnostic, ...] = ()
    doubtful: tuple[Span, ...] = ()
    lost: tuple[Span, ...] = ()


def resolve_function(text: FunctionText, name: str, callees: Mapping[str, Callee]) -> Resolved:
    """The `def`, under its name in the IR."""
    scope = Scope(callees, params=frozenset(text.params), ranks={str(rank) for rank in text.ranks})
    ranks, params = tuple(str(rank) for rank in text.ranks), tuple(str(param) for param in text.params)
    body = text.body
    try:
        scope.ranks.update(rank_variables(body))
        body = scope.expr(body)
    except Mistake as mistake:
        scope.found.append(mistake.diagnostic)
    function = Function(name, ranks, params, body, span=text.span)
    return Resolved(function, tuple(scope.found), (text.span,) if scope.found else ())


def resolve_cascade(text: CascadeText, callees: Mapping[str, Callee]) -> Resolved:
    """The cascade, without what it uses."""
    declared: tuple[Param | Result, ...] = (*text.params, *text.results)
    sizes = {size for decl in declared for size in decl.shape if isinstance(size, str)}
    sizes |= {given.size for given in text.given if isinstance(given.size, str)}
    scope = Scope(callees, symbols={size for size in sizes if size[0].isupper()})
    scope.tensors.update(decl.name for decl in declared)
    scope.tensors.update(target.tensor for equation in text.body for target in equation.targets)
    scope.ranks.update(given.rank for given in text.given)
    doubtful: list[Span] = []
    lost: list[Span] = []
    whole: set[int] = set()  # the statements whose ranks are known
    for number, equation in enumerate(text.body):
        try:
            scope.ranks.update(equation_ranks(equation))
            whole.add(number)
        except Mistake as mistake:
            scope.found.append(mistake.diagnostic)
    body: list[Stmt] = []
    for number, equation in enumerate(text.body):
        before = len(scope.found)
        stmt = scope.statement(equation) if number in whole else None
        body.append(stmt or unknown(equation))
        if stmt is None:
            lost.append(equation.span)
        elif len(scope.found) > before:
            doubtful.append(equation.span)
    schedule: list[Directive] = []
    for directive in text.schedule:
        before, found = len(scope.found), scope.directive(directive)
        schedule += [] if found is None else [found]
        doubtful += [directive.span] if directive.span and len(scope.found) > before else []
    cascade = Cascade(
        str(text.name), text.params, text.results, tuple(body), tuple(schedule), given=text.given, span=text.span
    )
    return Resolved(cascade, tuple(scope.found), tuple(doubtful), tuple(lost))


def unknown(equation: Equation) -> Call:
    """A stand-in for a statement that cannot be built: its tensors exist, nothing else is known about them."""
    return Call(tuple(target.tensor for target in equation.targets), "", (), span=equation.span)


# --- rank variables --------------------------------------------------------------------------------------------------


def equation_ranks(equation: Equation) -> Iterator[str]:
    """Every name that stands where only a rank variable can; raises where an expression is too deep."""
    for target in equation.targets:
        yield from rank_names(target.index)
    if equation.choice:
        yield equation.choice[0]
    for left, _ in equation.inits:
        yield from (at.tensor for at in left.index if isinstance(at, Read))
    for expr in (equation.expr, equation.where, *(value for _, value in equation.inits)):
        if expr is not None:
            yield from rank_variables(expr)


def rank_variables(expr: Expr) -> Iterator[str]:
    """The names of an expression in indices and in the brackets of reductions."""
    todo = [(expr, 1, False)]
    while todo:
        node, depth, in_index = todo.pop()
        if depth > MAX_DEPTH:
            help_ = "give parts of it statements of their own; a sum over a rank is sum[k]"
            raise Mistake("C106", f"an expression is nested deeper than {MAX_DEPTH}, the limit", start(node), help_)
        if isinstance(node, (Reduce, Use)):
            yield from node.ranks
        if isinstance(node, Read) and not node.index:
            if in_index and not node.tensor.endswith("'"):
                yield node.tensor
            continue
        inside = in_index or isinstance(node, Read)
        todo += [(child, depth + 1, inside) for child in children(node)]


def fold_ranks(fold: Fold) -> Iterator[str]:
    """Every name of a fold that stands where only a rank variable can."""
    yield fold.rank
    for part in fold_parts(fold):
        yield from part.target.ranks
    for expr in fold_expressions(fold):
        yield from rank_variables(expr)


def start(expr: Expr) -> Span | None:
    """The first character of a long expression."""
    span = expr.span
    return span and Span(span.source, span.line, span.column, span.line, span.column + 1)


# --- one definition --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Scope:
    """The names that mean something inside one definition; collects what is wrong."""

    callees: Mapping[str, Callee]
    params: frozenset[str] = frozenset()  # of a `def`
    ranks: set[str] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)
    symbols: set[str] = field(default_factory=set)
    found: list[Diagnostic] = field(default_factory=list)

    # --- statements

    def statement(self, equation: Equation) -> Stmt | None:
        """The statement, or None where its form is wrong."""
        if equation.expr is None:
            return None
        try:
            if equation.choice is not None:
                return self.topk(equation, equation.expr, *equation.choice)
            use = equation.expr
            callee = self.callees.get(use.function) if isinstance(use, Use) and not use.ranks else None
            if isinstance(use, Use) and callee is not None and callee.cascade and self.whole(use, equation):
                return self.call(equation, use, callee)
            return self.einsum(equation, use)
        except Mistake as mistake:
            self.found.append(mistake.diagnostic)
            return None

    def whole(self, use: Use, equation: Equation) -> bool:
        """Whether a use is of whole tensors; a cascade may share its name with a built-in function of elements."""
        bare = all(isinstance(arg, Read) and not arg.index for arg in use.args)
        return use.function not in FUNCTIONS or (bare and not any(target.index for target in equation.targets))

    def einsum(self, equation: Equation, right: Expr) -> Einsum | None:
        before = len(self.found)
        expr = self.expr(right)
        if len(equation.targets) > 1:
            if len(self.found) > before:  # an unknown name may well have been meant as a cascade
                return None
            help_ = "topk defines two, and a cascade as many as it has results: O, L = attention(Q, K, V)"
            raise Mistake("C109", "several left sides, but one value on the right", equation.targets[1], help_)
        target = target_of(equation.targets[0])
        where = None if equation.where is None else self.expr(equation.where)
        inits = tuple(self.init(target, left, value) for left, value in equation.inits)
        return Einsum(target, expr, where, inits, span=equation.span)

    def init(self, target: Target, left: Read, value: Expr) -> Init:
        """`H[-1,d] = 0` for `H[t,d]`: one coordinate is a number, the others are the ranks of the left side."""
        form = f"write {target.name}[{','.join(('-1', *target.ranks[1:]))}] = ..., with -1 at the rank that steps"
        if left.tensor != target.name:
            message = f"this is an initial value of {quote(left.tensor)}, the statement defines {quote(target.name)}"
            raise Mistake("C108", message, left, form)
        steps = [(rank, at.value) for rank, at in zip(target.ranks, left.index, strict=False) if isinstance(at, Const)]
        rest = [at.tensor for at in left.index if isinstance(at, Read) and not at.index]
        kept = [rank for rank in target.ranks if not steps or rank != steps[0][0]]
        if len(left.index) != len(target.ranks) or len(steps) != 1 or rest != kept:
            raise Mistake("C108", "an initial value has one number among the ranks of the left side", left, form)
        rank, at = steps[0]
        if type(at) is not int or at >= 0:
            raise Mistake("C108", f"an initial value stands before coordinate 0, not at {at}", left, form)
        return Init(rank, at, self.expr(value), span=across(left, value))

    def topk(self, equation: Equation, body: Expr, rank: str, k: int | str) -> TopK:
        if len(equation.targets) != 2:
            message = f"topk gives two tensors, values and coordinates; {len(equation.targets)} stand on the left"
            raise Mistake("C109", message, equation.targets[0], "write G[t,j], I[t,j] = topk[n, 2] R[t,n]")
        values, coords = (target_of(target) for target in equation.targets)
        where = None if equation.where is None else self.expr(equation.where)
        return TopK(values, coords, rank, k, self.expr(body), where, span=equation.span)

    def call(self, equation: Equation, use: Use, callee: Callee) -> Call:
        """Another cascade: whole tensors on both sides."""
        for target in equation.targets:
            if target.index:
                message = f"{quote(callee.name)} is a cascade: it gives whole tensors, without ranks"
                names = ", ".join(target.tensor for target in equation.targets)
                raise Mistake("C109", message, target, f"write {names} = {callee.name}(...)")
        for arg in use.args:
            if not isinstance(arg, Read) or arg.index:
                message = f"{quote(callee.name)} is a cascade: it takes whole tensors, by their names"
                raise Mistake("C109", message, arg, "give the expression a statement of its own")
        if equation.where is not None or equation.inits:
            extra = equation.where if equation.where is not None else equation.inits[0][0]
            message = "a statement that uses a cascade has no `where` and no `init`"
            raise Mistake("C109", message, extra, f"filter in {callee.name}, or what {callee.name} gives")
        targets = tuple(target.tensor for target in equation.targets)
        args = tuple(arg.tensor for arg in use.args if isinstance(arg, Read))
        return Call(targets, callee.name, args, span=equation.span)

    # --- schedule

    def directive(self, directive: Directive) -> Directive | None:
        """The directive with the names in its expressions resolved; None where one of them is too deep."""
        if not isinstance(directive, Fold):
            return directive
        try:
            self.ranks.update(fold_ranks(directive))
            return map_fold(directive, self.expr)
        except Mistake as mistake:
            self.found.append(mistake.diagnostic)
            return None

    # --- expressions

    def expr(self, expr: Expr) -> Expr:
        """The expression with every name resolved, operands first."""
        order: list[Expr] = []
        todo = [expr]
        while todo:
            node = todo.pop()
            order.append(node)
            todo += children(node)
        done: list[Expr] = []
        for node in reversed(order):
            first = len(done) - len(children(node))
            args = tuple(done[first:])
            done[first:] = [self.node(node, args)]
        return done[0]

    def node(self, node: Expr, args: tuple[Expr, ...]) -> Expr:
        """One node with its operands resolved."""
        if isinstance(node, Read):
            self.check_operand(node)
            return Read(node.tensor, args, span=node.span) if args else self.bare(node)
        if isinstance(node, Use):
            return self.use(node, args)
        return with_children(node, args)

    def bare(self, read: Read) -> Expr:
        """A name without brackets."""
        name = read.tensor
        if name in self.params:
            return Local(name, span=read.span)
        if name in self.tensors:
            return read
        if name in self.ranks and not name[0].isupper():
            return Rank(name, span=read.span)
        return Extent(name, span=read.span) if name in self.symbols else read

    def check_operand(self, read: Read) -> None:
        """Reports a function that stands like a tensor: `rmsnorm[d] - x` is a difference."""
        callee = None if read.tensor in self.tensors or read.tensor in self.params else self.callees.get(read.tensor)
        if callee is not None and read.index and not callee.cascade:
            message = f"{quote(read.tensor)} is a function, and nothing stands here that it could be applied to"
            help_ = f"write {read.tensor}[...] x, or {read.tensor}[...] (-x) for what starts with a minus"
            self.found.append(Diagnostic("C203", message, read.span, help_))

    def use(self, use: Use, args: tuple[Expr, ...]) -> Expr:
        """A function of elements: a `def`, or one that is built in."""
        name = use.function
        callee = self.callees.get(name)
        if name in FUNCTIONS and not use.ranks and (callee is None or callee.cascade):
            return Apply(name, args, span=use.span)
        if callee is None:
            self.found.append(self.unknown_function(use))
        elif callee.cascade:
            message = f"{quote(name)} is a cascade, a function of whole tensors"
            help_ = f"give it a statement of its own: A = {name}(...)"
            self.found.append(Diagnostic("C231", message, pinpoint(use.span, name), help_))
        return replace(use, function=callee.name if callee else name, args=args)

    def unknown_function(self, use: Use) -> Diagnostic:
        """Why a name cannot be applied, and what may have been meant."""
        name, place = use.function, pinpoint(use.span, use.function)
        if name in self.tensors and use.ranks:
            raise Mistake("C105", f"expected an operator after {quote(name)}, found an operand", use.args[0], PRODUCT)
        if name in self.tensors:
            message = f"{quote(name)} is a tensor, not a function"
            return Diagnostic("C203", message, place, f"an element of it is {name}[...]; a product is {name} * (...)")
        known = [*self.callees, *FUNCTIONS, *REDUCERS]
        close = closest(name, known)
        meant = f"did you mean {quote(close)}? or " if close else ""
        own = f"def {name}[n](x) = ..." if use.ranks else f"def {name}(x) = ..."
        help_ = f"{meant}define it: {own}" if len(name) < MAX_NAME else None
        return Diagnostic("C203", f"function {quote(name)} is not defined", place, help_)
