"""Random valid cascades, seeded: as IR, as Python for the tracer, and with inputs to run them on.

The programs mix maps, reductions (nested ones too), filters, affine and indirect indices, `??`, `topk` and iterative
ranks. Values stay bounded (every map ends in a bounded function), so that float64 comparisons mean something.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from cascade.frontend.build import library_uses
from cascade.ir import (
    Apply, Cascade, Const, Einsum, Expr, Extent, Init, Param, Rank, Read, Reduce, Result, Stmt, Target, TopK, Use,
)  # fmt: skip
from cascade.scopes import scan, signatures
from cascade.walk import defines, expressions, reads, walk

RANKS = ("i", "j", "k", "l")
MONOTONE = ("tanh", "sigmoid", "sin", "cos", "abs", "relu")
REDUCERS = ("sum", "sum", "sum", "max", "min", "prod", "count")


LIBRARY = ("mean", "softmax", "logsumexp")
KNOWN = signatures(library_uses(LIBRARY))


def free_ranks(expr: Expr) -> tuple[str, ...]:
    """The ranks that an expression leaves free, seen through the functions of the library."""
    return tuple(scan(expr, KNOWN).free)


def symbol(rank: str) -> str:
    """The shape symbol of a rank variable."""
    return rank.upper()


def plain(ranks: tuple[str, ...]) -> tuple[Expr, ...]:
    """Rank variables as index expressions."""
    return tuple(Rank(rank) for rank in ranks)


@dataclass
class Builder:
    """One random cascade in the making."""

    rng: random.Random
    params: dict[str, tuple[str, ...]] = field(default_factory=dict)
    index_params: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # name -> (its rank, the rank it points into)
    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)  # statements so far
    body: list[Stmt] = field(default_factory=list)

    def build(self) -> Cascade:
        for number in range(self.rng.randint(1, 3)):
            ranks = tuple(self.rng.sample(RANKS, self.rng.randint(1, 3)))
            self.params[f"X{number}"] = ranks
        if self.rng.random() < 0.4:
            here, there = self.rng.sample(RANKS, 2)
            self.index_params["P"] = (here, there)
        for _ in range(self.rng.randint(1, 5)):
            self.statement()
        return self.finish()

    # --- statements --------------------------------------------------------------------------------------------------

    def statement(self) -> None:
        name = f"T{len(self.body)}"
        roll = self.rng.random()
        if roll < 0.12:
            return self.scan(name)
        if roll < 0.2 and self.top_k(name):
            return None
        expr = self.reduction() if self.rng.random() < 0.5 else self.map(2)
        ranks = list(free_ranks(expr))
        self.rng.shuffle(ranks)
        where = self.predicate(expr, tuple(ranks)) if self.rng.random() < 0.4 else None
        self.add(Einsum(Target(name, tuple(ranks)), expr, where))
        return None

    def add(self, stmt: Einsum) -> None:
        self.body.append(stmt)
        self.tensors[stmt.target.name] = stmt.target.ranks

    def scan(self, name: str) -> None:
        source = self.map(1)
        ranks = free_ranks(source)
        if not ranks:
            return
        rank = self.rng.choice(ranks)
        back = tuple(Apply("sub", (Rank(r), Const(1))) if r == rank else Rank(r) for r in ranks)
        step = Apply(self.rng.choice(("add", "max")), (Apply("mul", (Const(0.5), Read(name, back))), source))
        self.add(Einsum(Target(name, ranks), step, None, (Init(rank, -1, Const(self.rng.choice((0, 1)))),)))

    def top_k(self, name: str) -> bool:
        source = self.read()
        ranks = free_ranks(source)
        if not ranks or "z" in ranks:
            return False
        rank = self.rng.choice(ranks)
        left = (*(r for r in ranks if r != rank), "z")
        coords = f"C{len(self.body)}"
        self.body.append(TopK(Target(name, left), Target(coords, left), rank, 2, source))
        self.tensors[name] = left
        return True

    # --- expressions -------------------------------------------------------------------------------------------------

    def read(self) -> Expr:
        """A read of a parameter or an earlier tensor, now and then at computed coordinates."""
        name, ranks = self.rng.choice([*self.params.items(), *self.tensors.items()])
        index = list(plain(ranks))
        if name in self.params and len(ranks) > 1 and self.rng.random() < 0.25:
            self.computed(index, ranks)
        return Read(name, tuple(index))

    def computed(self, index: list[Expr], ranks: tuple[str, ...]) -> None:
        """Makes one of the coordinates an expression; the rank keeps its extent from elsewhere."""
        at = self.rng.randrange(len(ranks))
        pointers = [(p, here) for p, (here, there) in self.index_params.items() if there == ranks[at]]
        if pointers:
            pointer, here = pointers[0]
            index[at] = Read(pointer, (Rank(here),))
            return
        anchored = [rank for shape in self.params.values() for rank in shape[:1]]
        rank = self.rng.choice(anchored)
        shift = Const(self.rng.randint(1, 2))
        index[at] = self.rng.choice(
            (
                Apply("add", (Rank(rank), shift)),
                Apply("sub", (Rank(rank), shift)),
                Apply("floordiv", (Rank(rank), Const(2))),
                Apply("mod", (Rank(rank), Const(2))),
            )
        )

    def map(self, depth: int) -> Expr:
        if depth == 0:
            return self.read()
        roll = self.rng.random()
        if roll < 0.3:
            return Apply(self.rng.choice(MONOTONE), (self.map(depth - 1),))
        if roll < 0.7:
            op = self.rng.choice(("add", "sub", "mul", "max", "min"))
            return Apply("tanh", (Apply(op, (self.map(depth - 1), self.map(depth - 1))),))
        if roll < 0.78:
            return Apply("default", (self.map(depth - 1), Const(self.rng.choice((0.5, 2.0)))))
        if roll < 0.86:
            return Apply("mul", (Const(0.25), self.map(depth - 1)))
        if roll < 0.92:
            test = Apply("gt", (self.map(depth - 1), Const(0)))
            return Apply("select", (test, self.map(depth - 1), Const(-0.5)))
        return Apply("tanh", (self.reduction(),))

    def reduction(self) -> Expr:
        if self.rng.random() < 0.25:
            return self.library()
        body = Apply("mul", (self.map(1), self.read())) if self.rng.random() < 0.5 else self.map(1)
        ranks = free_ranks(body)
        if not ranks:
            return body
        chosen = tuple(self.rng.sample(ranks, min(len(ranks), self.rng.choice((1, 1, 2)))))
        return Reduce(self.rng.choice(REDUCERS), chosen, body)

    def library(self) -> Expr:
        """A function of the library along one rank."""
        body = self.map(1)
        ranks = free_ranks(body)
        return Use(self.rng.choice(LIBRARY), (self.rng.choice(ranks),), (body,)) if ranks else body

    def predicate(self, expr: Expr, left: tuple[str, ...]) -> Expr | None:
        """A filter over the left side, and over what the top reduction binds."""
        scope = [*left, *(expr.ranks if isinstance(expr, Reduce) else ())]
        if not scope:
            return None
        a, b = self.rng.choice(scope), self.rng.choice(scope)
        forms: list[Expr] = [
            Apply("le", (Rank(a), Rank(b))),
            Apply("lt", (Apply("sub", (Rank(a), Rank(b))), Const(2))),
            Apply("ne", (Apply("mod", (Rank(a), Const(2))), Const(0))),
            Apply("or", (Apply("lt", (Rank(a), Const(1))), Apply("gt", (Rank(b), Const(2))))),
            Apply("not", (Apply("eq", (Rank(a), Apply("sub", (Extent(symbol(a)), Const(1))))),)),
        ]
        usable = [form for form in forms if "z" not in free_ranks(form)]
        return self.rng.choice(usable) if usable else None

    # --- the whole ---------------------------------------------------------------------------------------------------

    def finish(self) -> Cascade:
        """The cascade with what nobody reads as results, and the parameters that something reads."""
        read = {name for stmt in self.body for name in reads(stmt) if name not in defines(stmt)}
        ends = [name for name in self.tensors if name not in read or name == list(self.tensors)[-1]]
        results = tuple(Result(name, None, self.shape(self.tensors[name])) for name in ends)
        params = [Param(name, None, self.shape(ranks)) for name, ranks in self.params.items() if name in read]
        params += [
            Param(name, None, self.shape((here,))) for name, (here, _) in self.index_params.items() if name in read
        ]
        nodes = [node for stmt in self.body for expr in expressions(stmt) for node in walk(expr)]
        uses = library_uses({node.function for node in nodes if isinstance(node, Use)})
        return Cascade("random_cascade", tuple(params), results, tuple(self.body), (), uses)

    def shape(self, ranks: tuple[str, ...]) -> tuple[int | str, ...]:
        return tuple(2 if rank == "z" else symbol(rank) for rank in ranks)


def random_cascade(seed: int) -> Cascade:
    """The cascade of a seed; not every one verifies (a rank may lack an extent), see `valid_cascade`."""
    return Builder(random.Random(seed)).build()


def inputs(cascade: Cascade, seed: int, pointers: dict[str, str]) -> dict[str, torch.Tensor]:
    """Random tensors for the parameters; `pointers` maps an index parameter to the symbol it points into."""
    rng = random.Random(seed)
    sizes = {symbol(rank): rng.choice((1, 2, 3, 4, 5)) for rank in RANKS}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for param in cascade.params:
        shape = [size if isinstance(size, int) else sizes[size] for size in param.shape]
        if param.name in pointers:
            tensors[param.name] = torch.randint(0, sizes[pointers[param.name]], shape, generator=generator)
        else:
            tensors[param.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tensors


# --- the same program as Python ----------------------------------------------------------------------------------------

INFIX = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
         "eq": "==", "ne": "!=", "and": "&", "or": "|"}  # fmt: skip


def python_source(cascade: Cascade) -> str:
    """The cascade as a Python function for the tracer, statement for statement."""
    lines = [f"def {cascade.name}({', '.join(param.name for param in cascade.params)}):"]
    lines.append(f'    {", ".join(RANKS)} = cs.ranks("{" ".join(RANKS)}")')
    lines.append('    z = cs.ranks("z=2")')
    lines += [f"    {python_statement(stmt)}" for stmt in cascade.body]
    targets = {t.name: t for s in cascade.body for t in ((s.values, s.coords) if isinstance(s, TopK) else (s.target,))}
    results = [f"{result.name}{subscript(targets[result.name].ranks)}" for result in cascade.results]
    return "\n".join([*lines, f"    return {', '.join(results)}"])


def subscript(ranks: tuple[str, ...]) -> str:
    return f"[{', '.join(ranks)}]" if ranks else ""


def python_statement(stmt: Stmt) -> str:
    if isinstance(stmt, TopK):
        return f"{stmt.values.name}, {stmt.coords.name} = cs.topk[{stmt.rank}, z]({python_expr(stmt.body)})"
    assert isinstance(stmt, Einsum)
    target = stmt.target
    if stmt.inits:
        init = stmt.inits[0]
        step = python_expr(stmt.expr, target.name)
        order = f"({', '.join(target.ranks)},)"
        return (
            f"{target.name} = cs.scan[{init.rank}](lambda prev: {step}, init={python_expr(init.expr)}, order={order})"
        )
    value = f"cs.where({python_expr(stmt.expr)}, {python_expr(stmt.where)})" if stmt.where else python_expr(stmt.expr)
    return f"{target.name} = ({value}){subscript(target.ranks)}"


def python_expr(expr: Expr, own: str = "") -> str:
    match expr:
        case Const():
            return repr(expr.value)
        case Rank():
            return expr.name
        case Extent():
            return f"{expr.name.lower()}.extent"
        case Read():
            if expr.tensor == own:
                return "prev"
            if expr.tensor.startswith(("T", "C")):
                return expr.tensor
            return f"{expr.tensor}[{', '.join(map(python_expr, expr.index))}]"
        case Reduce():
            return f"cs.{expr.reducer}[{', '.join(expr.ranks)}]({python_expr(expr.body, own)})"
        case Use():
            return f"cs.{expr.function}[{', '.join(expr.ranks)}]({python_expr(expr.args[0], own)})"
        case Apply(op="not"):
            return f"~({python_expr(expr.args[0], own)})"
        case Apply(op=op) if op in INFIX:
            left, right = (python_expr(arg, own) for arg in expr.args)
            return f"(({left}) {INFIX[op]} ({right}))"
        case Apply():
            return f"cs.{expr.op}({', '.join(python_expr(arg, own) for arg in expr.args)})"
        case _:
            raise AssertionError(expr)
