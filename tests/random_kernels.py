"""Random cascades for kernels, seeded: text, sizes, inputs; run against the reference, and shrunk where they fail.

The programs are what users write, put together at random: chains of maps and reductions, normalised exponentials and
norms, matrix products with maps before and behind, filters of every kind, gathers, windows, quotients, top-k, results
in the middle. Values stay bounded, and what turns on a comparison (a choice, a coordinate, a rounding) is compared
where it is exact, so that the tolerance rule means something. Data follows from the name of a parameter:

    F0 floats   J0 small integers   T0 truth values   P0_n coordinates of n   L0_n lengths of n   D0 document ids

    python -m tests.random_kernels 0 1000      runs the seeds 0 to 999, prints and shrinks what fails
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch
from torch import Tensor

import cascade
from benchmarks.correctness import LAYOUTS
from cascade.backends.triton import partition, planner
from cascade.backends.triton.launch import Bench, Groups, Launcher
from cascade.backends.triton.partition import Group
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.split import divisible
from cascade.backends.triton.tune import candidates
from cascade.errors import CallError, CascadeError, InternalError
from cascade.evaluate import Stored, Windows
from cascade.frontend.build import parse_cascade
from cascade.inference import FLOATS as FLOATED
from cascade.inference import bind_sizes, infer_shapes
from cascade.interp import Precision, Machine, groups, run
from cascade.ir import Apply, Cascade, Const, DType, Einsum, Expr, Param, Rank, Read, Reduce, Result, Target, TopK
from cascade.pipeline import run_pipeline
from cascade.text import render
from cascade.trial import unlike
from cascade.values import FROM_TORCH, TORCH_TYPES, Value
from cascade.verify import verify
from cascade.walk import children, defines, expressions, reads, targets, walk, with_children
from tests.planned import call_of
from tests.tolerance import Standard, Verdict, filled_with_nan, judge_all, standard

RANKS = ("b", "m", "n", "k", "e")
FEW = (1, 1, 2, 3, 4, 5, 8)
MANY = (1, 7, 13, 16, 17, 23, 31, 32, 33, 48, 50, 64, 65, 80, 96, 100)
POINTS = 20_000  # of the iteration space of a statement, at most
FLOATS = ("f32", "f16", "bf16")
VARIANTS = ("own", "candidate", "streams", "small")
CLOSE = 4  # times the allowed error: less is no finding, on programs as small as these
UNLUCKY = 16  # evaluations with results rounded at random: up, down or not at all
GRID = 64  # of half of the floats: multiples of 1 / GRID, so that equal values occur and sums are exact


@dataclass(frozen=True)
class Case:
    """A program with what it is run on: sizes by symbol, the seed of data and tiles, how it is tiled and laid out."""

    text: str
    sizes: Mapping[str, int]
    seed: int
    variant: str = "own"
    layout: str = ""

    def __str__(self) -> str:
        return f"{self.text}\n# sizes {dict(self.sizes)} seed {self.seed} variant {self.variant} layout {self.layout!r}"


@dataclass(frozen=True)
class Term:
    """An expression: its text, its free ranks, its kind (f, i or b), and whether f32 has its value exactly."""

    text: str
    ranks: frozenset[str]
    kind: str
    exact: bool

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Known:
    """A tensor that expressions may read."""

    name: str
    ranks: tuple[str, ...]
    kind: str
    exact: bool = False


# --- programs --------------------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """One random program in the making."""

    rng: random.Random
    ranks: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    working: str = "f32"
    params: dict[str, str] = field(default_factory=dict)  # declaration by name
    known: list[Known] = field(default_factory=list)
    made: list[Known] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def write(self) -> tuple[str, dict[str, int]]:
        """The text of a program, and the sizes that it is run at."""
        rng = self.rng
        self.working = rng.choice(FLOATS)
        self.ranks = tuple(sorted(rng.sample(RANKS, rng.randint(2, 5)), key=RANKS.index))
        large = set(rng.sample(self.ranks, min(len(self.ranks), rng.choice((1, 2, 2)))))
        while not self.sizes or math.prod(sorted(self.sizes.values())[-3:]) > POINTS:
            self.sizes = {rank.upper(): rng.choice(MANY if rank in large else FEW) for rank in self.ranks}
        wanted = rng.randint(2, 8)
        while len(self.lines) < wanted:
            self.statement()
        return self.finish(), self.sizes

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    # --- tensors -----------------------------------------------------------------------------------------------------

    def param(self, ranks: Sequence[str], kind: str = "f") -> Known:
        """A parameter of a kind with these ranks, a new one or one that is there."""
        same = [t for t in self.known if t.ranks == tuple(ranks) and t.kind == kind and t.name[0] in "FJT"]
        if same and self.chance(0.6):
            return self.rng.choice(same)
        name = f"{ {'f': 'F', 'i': 'J', 'b': 'T'}[kind] }{len(self.params)}"
        floats = (self.working, self.working, self.working, "f32")
        dtype = {"f": self.rng.choice(floats), "i": self.rng.choice(("i32", "i64")), "b": "bool"}[kind]
        return self.declare(name, ranks, dtype, kind)

    def declare(self, name: str, ranks: Sequence[str], dtype: str, kind: str) -> Known:
        self.params[name] = f"{name}: {dtype}[{','.join(rank.upper() for rank in ranks)}]"
        tensor = Known(name, tuple(ranks), kind, True)
        self.known.append(tensor)
        return tensor

    def integers(self, letter: str, rank: str, along: Sequence[str]) -> str:
        """A read of integers that have to do with a rank: coordinates of it, or lengths."""
        name = f"{letter}{len(self.params)}_{rank}"
        found = [
            t for t in self.known if t.name[0] == letter and t.name.endswith(f"_{rank}") and set(t.ranks) <= set(along)
        ]
        tensor = self.rng.choice(found) if found and self.chance(0.7) else None
        if tensor is None:
            ranks = [r for r in along if r != rank][: self.rng.randint(0, 2)] if letter == "L" else list(along)[:1]
            tensor = self.declare(name, ranks, self.rng.choice(("i32", "i64")), "p")
        return f"{tensor.name}[{','.join(tensor.ranks)}]"

    def scope(self, low: int = 1, high: int = 4) -> list[str]:
        """Some ranks, in order, whose points are not too many."""
        while True:
            count = min(len(self.ranks), self.rng.randint(low, high))
            found = sorted(self.rng.sample(self.ranks, count), key=RANKS.index)
            if math.prod(self.sizes[rank.upper()] for rank in found) <= POINTS:
                return found

    # --- statements --------------------------------------------------------------------------------------------------

    def statement(self) -> None:
        forms: tuple[tuple[Callable[[], None], int], ...] = (
            (self.mapped, 4), (self.reduced, 6), (self.product, 4), (self.normalised, 4), (self.moments, 2),
            (self.extreme, 2), (self.largest, 1), (self.logical, 1), (self.weighted, 3), (self.stepped, 1),
            (self.shared_maximum, 1),
        )  # fmt: skip
        self.rng.choices([form for form, _ in forms], [weight for _, weight in forms])[0]()

    def add(self, term: Term, reducer: str = "", over: Sequence[str] = (), where: bool = True, tail: str = "") -> Known:
        """A statement: the term, reduced over some of its ranks; its target has the others."""
        kept = [rank for rank in RANKS if rank in term.ranks and rank not in over]
        if self.chance(0.15):
            self.rng.shuffle(kept)
        text = f"{reducer}[{','.join(over)}] ({term})" if reducer else term.text
        kind = {"any": "b", "all": "b", "count": "i", "argmax": "i", "argmin": "i"}.get(reducer, term.kind)
        kind = "i" if kind == "b" and reducer in ("sum", "prod") else "f" if reducer == "mean" else kind
        exact = kind != "f" or (term.exact and reducer in ("", "max", "min"))
        known = Known(f"V{len(self.made)}", tuple(kept), kind, exact)
        filtered = f" where {self.test([*kept, *over])}" if where and (kept or over) and self.chance(0.35) else ""
        self.line(known, f"{text}{tail}{filtered}")
        return known

    def line(self, known: Known, text: str) -> None:
        self.lines.append(f"{self.at(known)} = {text}")
        self.made.append(known)
        self.known.append(known)

    def at(self, known: Known) -> str:
        return f"{known.name}[{','.join(known.ranks)}]" if known.ranks else known.name

    def over(self, term: Term, count: int = 2) -> list[str]:
        """Some of the ranks of a term, to reduce over."""
        ranks = sorted(term.ranks, key=RANKS.index)
        return sorted(self.rng.sample(ranks, min(len(ranks), self.rng.randint(1, count))), key=RANKS.index)

    def mapped(self) -> None:
        self.add(self.map(self.scope(), 2))

    def reduced(self) -> None:
        term = self.map(self.scope(), 1)
        if not term.ranks:
            return
        reducer = self.rng.choice(("sum", "sum", "sum", "max", "max", "min", "mean", "prod", "count"))
        if reducer == "prod":
            term = dataclasses.replace(term, text=f"1 + tanh({term}) / 16", kind="f", exact=False)
        self.add(term, reducer, self.over(term))

    def logical(self) -> None:
        ranks = self.scope(2)
        test = self.test(ranks)
        found = frozenset(rank for rank in ranks if any(rank == word for word in words(test)))
        if found:
            term = Term(test, found, "b", True)
            self.add(term, self.rng.choice(("any", "all", "sum")), self.over(term))

    def product(self) -> None:
        """A sum of products of two factors with maps before and behind."""
        if len(self.ranks) < 3:
            return self.reduced()
        ranks = self.scope(3, 4)
        k = self.rng.choice(ranks)
        rest = [rank for rank in ranks if rank != k]
        cut = self.rng.randint(1, max(1, len(rest) - 1))
        self.rng.shuffle(rest)
        both = rest[cut + 1 :]
        sides = ([*rest[:cut], *both, k], [*rest[cut : cut + 1], *both, k])
        factors = [self.factor(sorted(side, key=RANKS.index)) for side in sides]
        ranks = [rank for rank in ranks if any(rank in factor.ranks for factor in factors)]
        free = frozenset(rank for rank in ranks if rank != k)
        text = f"sum[{k}] {factors[0]} * {factors[1]}"
        term = Term(f"({text})", free, "f", False)
        if self.chance(0.4):
            other = self.map(sorted(free, key=RANKS.index), 0) if free else Term("1.5", frozenset(), "f", True)
            behind = self.rng.choice(("{0} + {1}", "gelu({0} + {1})", "silu({0}) * {1}", "tanh({0} / 8) - {1}"))
            term = Term(behind.format(term, other), term.ranks | other.ranks, "f", False)
        if not all(k in factor.ranks for factor in factors) and not any(k in factor.ranks for factor in factors):
            return None
        self.add(term)
        return None

    def factor(self, ranks: Sequence[str]) -> Term:
        """A factor of a product: a tensor with all these ranks, mapped or not."""
        known = [t for t in self.known if set(t.ranks) == set(ranks) and t.kind == "f"]
        tensor = self.rng.choice(known) if known and self.chance(0.6) else self.param(self.permuted(ranks))
        term = Term(self.at(tensor), frozenset(tensor.ranks), "f", tensor.exact)
        if self.chance(0.75):
            return term
        mapped = self.bounded(term)
        return dataclasses.replace(mapped, text=f"({mapped})")

    def permuted(self, ranks: Sequence[str]) -> list[str]:
        found = list(ranks)
        if self.chance(0.2):
            self.rng.shuffle(found)
        return found

    def normalised(self) -> None:
        """Exponentials below their largest, over their sum; some of what is between is a statement of its own."""
        term = self.source()
        over = self.over(term, 1)
        if self.chance(0.3):
            name = self.rng.choice(("softmax", "softmax", "logsumexp", "logsoftmax"))
            keeps = name != "logsumexp"
            ranks = term.ranks if keeps else term.ranks - set(over)
            self.add(Term(f"{name}[{over[0]}] ({term})", ranks, "f", False), where=False)
            return
        score = self.add(term)
        best = self.add(self.read(score), "max", over, where=False)
        weight = self.add(
            Term(f"exp({self.at(score)} - {self.at(best)})", frozenset(score.ranks), "f", False), where=False
        )
        total = self.add(self.read(weight), "sum", over, where=False)
        last = self.rng.choice(("weights", "entropy", "log", "none"))
        if last == "weights":
            self.add(Term(f"{self.at(weight)} / {self.at(total)}", frozenset(score.ranks), "f", False), where=False)
        elif last == "entropy":
            body = (
                f"{self.at(weight)} / {self.at(total)} * (log({self.at(total)}) - {self.at(score)} + {self.at(best)})"
            )
            self.add(Term(body, frozenset(score.ranks), "f", False), "sum", over, where=False)
        elif last == "log":
            self.add(Term(f"{self.at(best)} + log({self.at(total)})", frozenset(total.ranks), "f", False), where=False)

    def weighted(self) -> None:
        """Values averaged by normalised exponentials of scores, which may be a product themselves."""
        if len(self.ranks) < 3:
            return self.normalised()
        ranks = self.scope(3, 4)
        n = self.rng.choice(ranks)
        f = self.rng.choice([rank for rank in ranks if rank != n])
        rows = [rank for rank in ranks if rank not in (n, f)]
        inner = f if self.chance(0.5) else n
        if inner == f:
            left, right = self.factor([*rows, f]), self.factor([n, f])
            scores = Term(f"(sum[{f}] {left} * {right}) / sqrt({f.upper()})", frozenset([*rows, n]), "f", False)
        else:
            scores = self.factor([*rows, n])
        score = self.add(scores)
        best = self.add(self.read(score), "max", [n], where=False)
        weight = self.add(
            Term(f"exp({self.at(score)} - {self.at(best)})", frozenset(score.ranks), "f", False), where=False
        )
        total = self.add(self.read(weight), "sum", [n], where=False)
        value = self.factor([n, f])
        form = self.rng.choice(("{0} / {1} * {2}", "{0} * {2} / {1}", "{0} * {2}"))
        body = form.format(self.at(weight), self.at(total), value)
        self.add(Term(body, frozenset([*score.ranks, f]), "f", False), "sum", [n], where=False)
        return None

    def shared_maximum(self) -> None:
        """Several sums of exponentials below one maximum, over one rank or two."""
        term = self.source()
        over = self.over(term, 2)
        score = self.add(term)
        best = self.add(self.read(score), "max", over, where=False)
        for _ in range(self.rng.randint(1, 2)):
            weight = f"exp({self.at(score)} - {self.at(best)})"
            other = self.map(list(score.ranks), 0)
            body = Term(f"{weight} * {other}", frozenset(score.ranks) | other.ranks, "f", False)
            body = body if self.chance(0.5) else Term(weight, frozenset(score.ranks), "f", False)
            self.add(body, "sum", over if self.chance(0.7) else over[:1], where=self.chance(0.2))

    def moments(self) -> None:
        """Averages, and averages of squares of differences."""
        term = self.source()
        over = self.over(term, 2)
        self.add(term)
        value = self.made[-1]
        average = self.add(self.read(value), "mean", over, where=False)
        shifted = f"({self.at(value)} - {self.at(average)})"
        square = self.add(Term(f"{shifted} * {shifted}", frozenset(value.ranks), "f", False), "mean", over, where=False)
        if self.chance(0.7):
            text = f"{shifted} * rsqrt({self.at(square)} + 0.01)"
            self.add(Term(text, frozenset(value.ranks), "f", False))

    def source(self) -> Term:
        """A term of floats with at least one rank."""
        while True:
            term = self.map(self.scope(1, 3), 1)
            if term.ranks and term.kind == "f":
                return term

    def extreme(self) -> None:
        """The coordinate of an extreme, of exact values."""
        term = self.exact(self.scope(1, 3))
        if term.ranks:
            self.add(term, self.rng.choice(("argmax", "argmin")), self.over(term, 1))

    def largest(self) -> None:
        """The largest values with their coordinates; another rank counts them."""
        term = self.exact(self.scope(1, 3))
        ranks = sorted(term.ranks, key=RANKS.index)
        count = self.rng.choice((1, 2, 3, 4))
        long = [rank for rank in ranks if self.sizes[rank.upper()] >= count]
        if not long or term.kind == "b":
            return
        over = self.rng.choice(long)
        left = [rank for rank in ranks if rank != over]
        at = ",".join([*left, f"z{count}"])
        number = len(self.made)
        values, places = (
            Known(f"V{number}", tuple(left), term.kind, True),
            Known(f"V{number + 1}", tuple(left), "i", True),
        )
        self.lines.append(f"{values.name}[{at}], {places.name}[{at}] = topk[{over}, {count}] ({term})")
        self.made += [dataclasses.replace(t, ranks=(*t.ranks, f"z{count}")) for t in (values, places)]
        if self.chance(0.5):
            total = Known(f"V{len(self.made)}", tuple(left), term.kind, False)
            self.line(total, f"sum[z{count}] {values.name}[{at}]")

    def stepped(self) -> None:
        """A running sum or maximum along a rank."""
        term = self.source()
        over = self.rng.choice(sorted(term.ranks, key=RANKS.index))
        ranks = tuple(sorted(term.ranks, key=RANKS.index))
        name = f"V{len(self.made)}"
        back = ",".join(f"{rank}-1" if rank == over else rank for rank in ranks)
        first = ",".join("-1" if rank == over else rank for rank in ranks)
        step = self.rng.choice((f"0.5 * {name}[{back}] + ({term})", f"max({name}[{back}], {term})"))
        self.line(Known(name, ranks, "f"), f"{step}  init {name}[{first}] = 0")

    # --- expressions -------------------------------------------------------------------------------------------------

    def read(self, tensor: Known) -> Term:
        return Term(self.at(tensor), frozenset(tensor.ranks), tensor.kind, tensor.exact)

    def leaf(self, ranks: Sequence[str], exact: bool = False) -> Term:
        """A tensor at some of the ranks, a coordinate or a number."""
        roll = self.rng.random()
        if roll < 0.05 and ranks:
            a, b = self.rng.choice(ranks), self.rng.choice(ranks)
            return Term(self.rng.choice((a, f"({a} - {b})", f"({a} % 3)", f"({a} // 2)")), frozenset((a,)), "i", True) \
                if a == b else Term(f"({a} - {b})", frozenset((a, b)), "i", True)  # fmt: skip
        fits = [t for t in self.known if set(t.ranks) <= set(ranks) and t.kind in "fib" and (t.exact or not exact)]
        made = [t for t in fits if t.name.startswith("V")]
        if made and roll < 0.5:
            return self.read(self.rng.choice(made[-3:]))
        if fits and roll < 0.6:
            return self.read(self.rng.choice(fits))
        chosen = list(ranks) if self.chance(0.6) else self.rng.sample(ranks, self.rng.randint(0, len(ranks)))
        chosen.sort(key=RANKS.index)
        tensor = self.param(self.permuted(chosen), self.rng.choices("fib", (8, 2, 1))[0])
        if tensor.ranks and self.chance(0.25):
            return self.computed(tensor, ranks)
        return self.read(tensor)

    def computed(self, tensor: Known, ranks: Sequence[str]) -> Term:
        """A read whose coordinate along one rank is computed."""
        at = self.rng.randrange(len(tensor.ranks))
        r, s = tensor.ranks[at], self.rng.choice(list(ranks))
        c = self.rng.randint(1, 3)
        forms = [f"{r} + {c}", f"{r} - {c}", f"{r} + {s}", f"{r} - {s}", f"{r.upper()} - 1 - {r}", f"{r} // 2", f"{r} % 3",
            f"2 * {r}", f"({r} + {r.upper()} // 2) % {r.upper()}", f"{s} // 2", f"{s} % {c}", f"2 * {r} + {s} - 1",
            self.integers("P", r, [s]), self.integers("P", r, [s])]  # fmt: skip
        form = self.rng.choice(forms)
        index = [form if i == at else rank for i, rank in enumerate(tensor.ranks)]
        free = frozenset(word for text in index for word in words(text) if word in self.ranks)
        return Term(f"{tensor.name}[{','.join(index)}]", free, tensor.kind, tensor.exact)

    def exact(self, ranks: Sequence[str]) -> Term:
        """A term whose comparisons no rounding changes."""
        term = self.leaf(ranks, exact=True)
        form = self.rng.choice(("{0}", "{0}", "-{0}", "abs({0})", "max({0}, 0)", "2 * {0}", "clamp({0}, -1, 2)"))
        if term.kind == "b":
            return term
        return dataclasses.replace(term, text=form.format(f"({term})"))

    def map(self, ranks: Sequence[str], depth: int) -> Term:
        """A pointwise expression over some of the ranks."""
        if depth == 0 or self.chance(0.15):
            return self.leaf(ranks)
        roll = self.rng.random()
        if roll < 0.4:
            return self.bounded(self.map(ranks, depth - 1))
        if roll < 0.5:
            return self.stepwise(ranks)
        a, b = self.map(ranks, depth - 1), self.map(ranks, depth - 1)
        free, kind = a.ranks | b.ranks, "f" if "f" in (a.kind, b.kind) else "i"
        if roll < 0.85:
            form = self.rng.choice(("{0} + {1}", "{0} - {1}", "{0} * {1}", "max({0}, {1})", "min({0}, {1})"))
            exact = a.exact and b.exact and form[0] == "m"
            return Term(form.format(f"({a})", f"({b})"), free, kind, exact or kind == "i")
        if roll < 0.93:
            return Term(f"({a}) / (1.5 + abs({b}))", free, "f", False)
        test = self.test(ranks)
        ranked = frozenset(word for word in words(test) if word in self.ranks)
        return Term(f"select({test}, {a}, {b})", free | ranked, kind, a.exact and b.exact)

    def bounded(self, term: Term) -> Term:
        """A function of a term that keeps to moderate values."""
        if term.kind == "b":
            return Term(f"select({term}, 1.5, -0.5)", term.ranks, "f", True)
        form = self.rng.choice((
            "exp(min({0}, 2))", "exp2(min({0}, 2))", "log(abs({0}) + 0.5)", "log2(abs({0}) + 0.5)", "sqrt(abs({0}))",
            "rsqrt({0} * {0} + 1)", "abs({0})", "sin({0})", "cos({0})", "tanh({0})", "sigmoid({0})", "silu({0})",
            "gelu({0})", "relu({0})", "erf({0})", "pow(abs({0}) + 0.5, 2)", "pow(abs({0}) + 0.5, tanh({0}))",
            "clamp({0}, -1, 2)", "-({0})", "({0}) ?? 0.5", "softplus({0})", "softcap({0}, 3.0)", "gelu_tanh({0})",
            "cast({0}, f32)", "0.25 * {0}", "{0} / 3", "1 - {0}", "clamp({0}, -2.0, 2.0) * 0.5", "cast({0}, f16)",
        ))  # fmt: skip
        keeps = form in ("abs({0})", "relu({0})", "clamp({0}, -1, 2)", "-({0})", "1 - {0}")
        kind = term.kind if keeps else "f"
        if form == "cast({0}, f16)" and not term.exact:
            form = "cast({0}, f32)"
        return Term(form.format(f"({term})"), term.ranks, kind, kind == "i" or (term.exact and keeps))

    def stepwise(self, ranks: Sequence[str]) -> Term:
        """A function with steps, of exact values."""
        term = self.exact(ranks)
        if term.kind == "i":
            form = self.rng.choice(
                ("({0}) // 2", "({0}) % 3", "cast({0}, f32)", "cast({0}, i64)", "sign({0})", "pow({0}, 2)")
            )
            return Term(form.format(term), term.ranks, "f" if "f32" in form else "i", True)
        if term.kind == "b":
            return Term(self.rng.choice((f"cast({term}, i32)", f"select({term}, 2, 1)")), term.ranks, "i", True)
        form = self.rng.choice(
            ("floor({0})", "round({0})", "sign({0})", "cast({0}, i32)", "cast({0}, bf16)", "floor({0}) % 2")
        )
        return Term(form.format(term), term.ranks, "i" if "i32" in form else "f", True)

    def test(self, ranks: Sequence[str], depth: int = 1) -> str:
        """A predicate over some of the ranks."""
        if not ranks:
            return "1 < 2"
        ranks = [rank for rank in ranks if rank in self.ranks]
        roll = self.rng.random()
        if depth and roll < 0.3:
            word = self.rng.choice(("and", "and", "or"))
            return f"({self.test(ranks, 0)}) {word} ({self.test(ranks, 0)})"
        if depth and roll < 0.38:
            return f"not ({self.test(ranks, 0)})"
        a, b = self.rng.choice(ranks), self.rng.choice(ranks)
        c = self.rng.randint(0, max(1, self.sizes[a.upper()] - 1))
        forms = [f"{a} <= {b}", f"{a} < {c}", f"{a} >= {c}", f"{a} - {b} < {c}", f"{a} + {b} < {a.upper()}", f"{a} > {b}",
            f"{a} % 2 == 0", f"{a} // 4 == {b} // 4", f"{a} != {c}", f"2 * {a} <= {b} + {c}", f"{a} < {c} or {b} <= {a}"]  # fmt: skip
        if roll < 0.65:
            return self.rng.choice(forms)
        if roll < 0.8:
            return f"{a} {self.rng.choice(('<', '>=', '<='))} {self.integers('L', a, ranks)}"
        if roll < 0.88 and a != b:
            return self.documents(a, b)
        term = self.exact(ranks)
        if term.kind == "b":
            return term.text
        return f"{term} {self.rng.choice(('>', '<=', '!='))} {self.rng.choice(('0', '1', '-0.5'))}"

    def documents(self, a: str, b: str) -> str:
        """Whether two coordinates have the same number in a table of each."""
        found = {t.ranks: t for t in self.known if t.name.startswith("D")}
        names = [
            (found.get((rank,)) or self.declare(f"D{len(self.params)}", [rank], "i32", "p")).name for rank in (a, b)
        ]
        return f"{names[0]}[{a}] == {names[1]}[{b}]"

    # --- the whole ---------------------------------------------------------------------------------------------------

    def finish(self) -> str:
        """The text: what nobody reads is a result, and some of what is read as well."""
        read = {word for line in self.lines for word in words(line.split(" = ", 1)[1])}
        results = []
        for known in self.made:
            if known.name in read and not self.chance(0.2):
                continue
            shape = ",".join(rank[1:] if rank.startswith("z") else rank.upper() for rank in known.ranks)
            dtype = "" if known.name in read else self.result_type(known)  # others read it as it is stored
            results.append(f"{known.name}{dtype}[{shape}]{self.fill(known)}")
        params = ", ".join(text for name, text in self.params.items() if name in read)
        used = {word for line in self.lines for word in words(line)}
        given = ", ".join(f"{rank} = {rank.upper()}" for rank in self.ranks if rank in used)
        body = "\n".join(f"    {line}" for line in self.lines)
        return f"cascade c({params}) -> {', '.join(results)} with {given} {{\n{body}\n}}\n"

    def result_type(self, known: Known) -> str:
        if self.chance(0.7):
            return ""
        return ": " + {"f": self.rng.choice(FLOATS), "i": self.rng.choice(("i32", "i64")), "b": "bool"}[known.kind]

    def fill(self, known: Known) -> str:
        if self.chance(0.75) or known.kind == "b":
            return ""
        return " fill " + self.rng.choice(
            ("-1", "7", "-inf", "inf", "nan", "2.5") if known.kind == "f" else ("-1", "7")
        )


def words(text: str) -> list[str]:
    """The names in a text."""
    return "".join(c if c.isalnum() or c == "_" else " " for c in text).split()


def random_case(seed: int) -> Case | None:
    """The program of a seed; None where what was put together is no program."""
    rng = random.Random(seed)
    text, sizes = Writer(rng).write()
    variant = rng.choice(VARIANTS)
    layout = rng.choice(("", "", "", *LAYOUTS))
    try:
        case = tidy(Case(text, sizes, seed, variant, layout), parse_cascade(text))
    except CascadeError:
        return None
    return case


def tidy(case: Case, program: Cascade) -> Case:
    """The case with a program less what no result needs: statements, parameters, extents, sizes."""
    needed = {result.name for result in program.results}
    body = []
    for stmt in reversed(program.body):
        if needed & set(defines(stmt)):
            body.append(stmt)
            needed |= set(reads(stmt))
    body.reverse()
    params = tuple(param for param in program.params if param.name in needed)
    program = dataclasses.replace(program, body=tuple(body), params=params)
    try:
        bare = dataclasses.replace(program, given=())
        verify(bare)
        program = bare
    except CascadeError:
        names = {node.name for s in body for e in expressions(s) for node in walk(e) if isinstance(node, Rank)}
        names |= {rank for s in body for target in targets(s) for rank in target.ranks}
        names |= {r for s in body for e in expressions(s) for n in walk(e) if isinstance(n, Reduce) for r in n.ranks}
        program = dataclasses.replace(program, given=tuple(g for g in program.given if g.rank in names))
        verify(program)
    text = render(program)
    used = set(words(text))
    return dataclasses.replace(case, text=text, sizes={name: size for name, size in case.sizes.items() if name in used})


# --- inputs ----------------------------------------------------------------------------------------------------------


def inputs_of(case: Case, program: Cascade, draw: int = 0) -> dict[str, Tensor]:
    """A tensor for every parameter."""
    generator = torch.Generator().manual_seed(case.seed + 1000 * draw)
    found = {}
    for param in program.params:
        shape = tuple(size if isinstance(size, int) else case.sizes[size] for size in param.shape)
        assert param.dtype is not None
        found[param.name] = data(param, shape, case, generator).to(TORCH_TYPES[param.dtype])
    if case.layout:
        change = LAYOUTS[case.layout]
        found = {name: change(t) if t.is_floating_point() and t.dim() else t for name, t in found.items()}
    return found


def data(param: Param, shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    """The numbers of a parameter, by its name."""
    match param.name[0]:
        case "F" | "V" | "X" | "Y" | "A" | "B" | "G" | "W":
            noise = torch.randn(shape, generator=generator)
            return (noise * GRID).round() / GRID if case.seed % 2 else noise
        case "T":
            return torch.rand(shape, generator=generator) < 0.7
        case "P":
            return torch.randint(0, case.sizes.get(param.name.split("_")[1].upper(), 1), shape, generator=generator)
        case "L":
            return torch.randint(0, case.sizes.get(param.name.split("_")[1].upper(), 1) + 1, shape, generator=generator)
        case "D":
            return (torch.rand(shape, generator=generator) < 0.15).long().cumsum(-1)
        case _:
            return torch.randint(-3, 4, shape, generator=generator)


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Varied(Launcher):
    """A launcher that takes tilings as a device would, or smaller ones."""

    variant: str = "candidate"
    rng: random.Random = field(default_factory=random.Random)

    def tiling(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench | None) -> Tiling:
        own = planner.default_tiling(group)
        if self.variant == "candidate":
            return self.rng.choice(candidates(planner, group))
        parts = planner_parts(planner, group, groups, self.rng)
        if self.variant != "small":
            return dataclasses.replace(own, parts=parts)
        least = 16 if planner.products(group) else 1
        whole = set(group.arrangement.whole)
        tiles = {r: t if r in whole or t <= least else self.rng.choice([s for s in (1, 2, 4, 16, 32) if least <= s <= t])
            for r, t in own.tiles if r not in planner.packed(group)}  # fmt: skip
        options = dataclasses.replace(own.options, edge_tile=0)
        return Tiling(tuple((dict(own.tiles) | tiles).items()), options, parts)


def planner_parts(planner: Planner, group: Group, groups: Groups, rng: random.Random) -> int:
    """How many programs share the stream of a group, at random where they can."""
    able = group.arrangement.stream is not None and divisible(group, planner.stored(group, groups))
    return rng.choice((1, 2, 3)) if able else 1


@contextlib.contextmanager
def limits(variant: str) -> Iterator[None]:
    """While this holds, what is long is shorter where the variant wants streams."""
    before = planner.LONG_ROW, partition.ROW_LIMIT, partition.SHORT
    if variant in ("streams", "small"):
        planner.LONG_ROW, partition.SHORT = 16, 16
    if variant == "streams":
        partition.ROW_LIMIT = 512
    try:
        yield
    finally:
        planner.LONG_ROW, partition.ROW_LIMIT, partition.SHORT = before


@dataclass(frozen=True)
class Finding:
    """What was wrong with a case: a kind, by which failures are the same, and its words."""

    kind: str
    words: str


def call_for(case: Case, program: Cascade) -> Callable[..., object]:
    """What runs the kernels of a case, as a function of tensors and sizes."""
    if case.variant == "own":
        return cascade.compile(case.text, backend="triton")
    final = run_pipeline(program).final
    return call_of(Varied(final, source=program, variant=case.variant, rng=random.Random(case.seed)))


def given_of(case: Case, program: Cascade) -> dict[str, int]:
    """The sizes that no tensor has."""
    bound = {size for param in program.params for size in param.shape}
    return {name: size for name, size in case.sizes.items() if name not in bound}


def fair(by: Standard) -> bool:
    """Whether plain evaluation in the working type has finite values where the reference has them."""
    return all(torch.equal(gold.isfinite(), by.eager[name].isfinite()) for name, gold in by.gold.items())


def examine(case: Case) -> Finding | str | None:
    """What is wrong with the kernels of a case; None for nothing, a word where it says nothing."""
    program = parse_cascade(case.text)
    verdict = Verdict()
    call: Callable[..., object] | None = None
    for draw in range(6):
        inputs, given = inputs_of(case, program, draw), given_of(case, program)
        try:
            by = standard(program, inputs, given)
        except CallError:
            return "refused"
        if not fair(by):
            return "overflow"
        try:
            with limits(case.variant), filled_with_nan():
                call = call or call_for(case, program)
                ours = call(**inputs, **given)
        except InternalError as error:
            return Finding("the passes: InternalError", str(error).splitlines()[0])
        except Exception as error:  # whatever is raised is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip().splitlines() or [""])[0]
            return Finding(f"{type(error).__name__} {where.name}", f"{first} at {where.filename}:{where.lineno}")
        verdict = judge_all(ours, by)  # type: ignore[arg-type]
        if not verdict.rounding:
            break
    if verdict.ok:
        return None
    if verdict.rounding and (near(verdict) or near(judge_all(ours, unlucky(program, inputs, given, by)))):  # type: ignore[arg-type]
        return "close"  # the bounds compare two samples of rounding errors, here of few elements
    who = "" if kept_meaning(case, program) else "the passes: "
    return Finding(f"{who}{verdict.clause.split(': ', 1)[-1]}", str(verdict))


def kept_meaning(case: Case, program: Cascade) -> bool:
    """Whether the interpreter finds what the pipeline made of a program right as well: else no kernel is to blame."""
    inputs, given = inputs_of(case, program), given_of(case, program)
    by, final = standard(program, inputs, given), run_pipeline(program).final
    plain = run(final, inputs, given, Precision.REFERENCE)
    if any(unlike(plain[name], gold) for name, gold in by.gold.items()):
        return False
    ours = tuple(run(final, inputs, given, Precision.COMPUTE).values())
    verdict = judge_all(ours, by)
    fine = verdict.ok or not verdict.rounding or near(verdict)
    return fine or near(judge_all(ours, unlucky(program, inputs, given, by)))


def near(verdict: Verdict) -> bool:
    """Whether an error is not much larger than what is allowed."""
    return verdict.ok or (verdict.rounding and verdict.found < CLOSE * verdict.allowed)


def unlucky(program: Cascade, inputs: Mapping[str, Tensor], given: Mapping[str, int], by: Standard) -> Standard:
    """A standard whose eager errors are the largest of some evaluations with results rounded at random.

    Plain evaluation may have no error by luck: values that are equal are rounded the same way, and their difference is
    0. A kernel that keeps the digits of one of them is no further from gold than the rounding of the other.
    """
    worst = dict(by.eager)
    for draw in range(UNLUCKY):
        machine = AtRandom.of(program, inputs, given, draw)
        for result in program.results:
            gold, plain = by.gold[result.name], worst[result.name]
            found = machine.result(result).to(plain.dtype)
            if plain.is_floating_point():
                further = (found.double() - gold).abs() > (plain.double() - gold).abs()
                worst[result.name] = torch.where(further, found, plain)
    return dataclasses.replace(by, eager=worst)


@dataclass(slots=True, eq=False)
class AtRandom(Machine):
    """The interpreter in float64, with what a statement gives rounded to its type at random: up, down or not at all."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    @classmethod
    def of(cls, program: Cascade, inputs: Mapping[str, Tensor], given: Mapping[str, int], seed: int) -> AtRandom:
        """The machine, run."""
        extents = bind_sizes(program, {name: tuple(tensor.shape) for name, tensor in inputs.items()}, given)
        machine = cls(program, infer_shapes(program), extents, Precision.REFERENCE, torch.device("cpu"))
        machine.generator.manual_seed(seed)
        for name, tensor in inputs.items():
            dtype = FROM_TORCH[tensor.dtype]
            machine.store[name] = Stored(tensor.to(Precision.REFERENCE.storage(dtype)), dtype)
        machine.run(program.body, {}, groups(program))
        return machine

    def _write(self, target: Target, value: Value, here: Windows, low: tuple[int, ...]) -> None:
        kept = float(torch.rand((), generator=self.generator)) < 0.5
        if value.dtype in FLOATED and not value.weak and not kept:
            kind = TORCH_TYPES[value.dtype]
            step = torch.ldexp(torch.tensor(torch.finfo(kind).eps, dtype=torch.float64), torch.frexp(value.data)[1] - 1)
            noise = torch.rand(value.data.shape, generator=self.generator, dtype=torch.float64) - 0.5
            moved = value.data.isfinite() & (value.data != 0)
            data = torch.where(moved, value.data + noise * step, value.data)  # what is exact stays so
            value = dataclasses.replace(value, data=data.to(kind).double())
        Machine._write(self, target, value, here, low)  # `super` knows no class with slots


# --- shrinking -------------------------------------------------------------------------------------------------------


def shrink(case: Case, finding: Finding, seconds: float = 60.0) -> Case:
    """A smaller case with a finding of the same kind."""
    end = time.monotonic() + seconds
    changed = True
    while changed and time.monotonic() < end:
        changed = False
        for smaller in simpler(case):
            if time.monotonic() > end:
                break
            found = examine(smaller)
            if isinstance(found, Finding) and found.kind == finding.kind:
                case, changed = smaller, True
                break
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Cases with less in them, those with much less first."""
    program = parse_cascade(case.text)
    for change in (*without_parts(program), *without_expressions(program)):
        try:
            verify(change)
            smaller = tidy(case, change)
        except CascadeError:
            continue
        if smaller.text != case.text:
            yield smaller
    for name, size in case.sizes.items():
        for less in dict.fromkeys((1, size // 2, size - 1)):
            if 0 < less < size:
                yield dataclasses.replace(case, sizes={**case.sizes, name: less})
    if case.layout:
        yield dataclasses.replace(case, layout="")


def without_parts(program: Cascade) -> Iterator[Cascade]:
    """The program less a result, with what a result reads instead, less a statement whose result becomes a parameter,
    less a filter or a fill, with a wider type."""
    for result in program.results if len(program.results) > 1 else ():
        yield dataclasses.replace(program, results=tuple(r for r in program.results if r is not result))
    for target in (target for stmt in program.body for target in targets(stmt)):
        yield dataclasses.replace(program, results=(Result(target.name, None, shape_of(target)),))
    for stmt in program.body:
        results = tuple(r for r in program.results if r.name not in defines(stmt))
        made = tuple(Param(t.name, DType.F32, shape_of(t)) for t in targets(stmt))
        body = tuple(s for s in program.body if s is not stmt)
        if results and body:
            yield dataclasses.replace(program, params=(*program.params, *made), results=results, body=body)
        if isinstance(stmt, Einsum) and stmt.where is not None:
            changed = dataclasses.replace(stmt, where=None)
            yield dataclasses.replace(program, body=tuple(changed if s is stmt else s for s in program.body))
    for result in program.results:
        plain = Result(result.name, None, result.shape)
        if plain != result:
            yield dataclasses.replace(program, results=tuple(plain if r is result else r for r in program.results))
    for param in program.params:
        if param.dtype in (DType.F16, DType.BF16, DType.I64):
            wide = dataclasses.replace(param, dtype=DType.I32 if param.dtype is DType.I64 else DType.F32)
            yield dataclasses.replace(program, params=tuple(wide if p is param else p for p in program.params))


def shape_of(target: Target) -> tuple[int | str, ...]:
    """The shape of a tensor, by the names of its ranks."""
    return tuple(int(rank[1:]) if rank.startswith("z") else rank.upper() for rank in target.ranks)


def without_expressions(program: Cascade) -> Iterator[Cascade]:
    """The program with one expression replaced by a part of it or by a number."""
    for stmt in program.body:
        for changed in lesser_statements(stmt):
            yield dataclasses.replace(program, body=tuple(changed if s is stmt else s for s in program.body))


def lesser_statements(stmt: object) -> Iterator[Einsum | TopK]:
    if isinstance(stmt, TopK):
        yield from (dataclasses.replace(stmt, body=body) for body in lesser(stmt.body))
    if isinstance(stmt, Einsum) and not stmt.inits:
        yield from (dataclasses.replace(stmt, expr=expr) for expr in lesser(stmt.expr))
        if stmt.where is not None:
            yield from (dataclasses.replace(stmt, where=where) for where in lesser(stmt.where))


def lesser(expr: Expr) -> Iterator[Expr]:
    """The expression with one node of it replaced by an operand, or by 1."""
    parts = tuple(children(expr))
    if isinstance(expr, Apply | Reduce) or (parts and not isinstance(expr, Read)):
        yield from parts
    if isinstance(expr, Read):
        plain = Read(expr.tensor, tuple(next((n for n in walk(i) if isinstance(n, Rank)), i) for i in expr.index))
        if plain != expr:
            yield plain
    if not isinstance(expr, Const | Rank):
        yield Const(1.0)
    for number, part in enumerate(parts):
        for less in lesser(part):
            yield with_children(expr, tuple(less if i == number else p for i, p in enumerate(parts)))


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Runs seeds, prints what fails, shrunk; 1 where something did."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_kernels", description="Random cascades as kernels.")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--seconds", type=float, default=60.0, help="for shrinking one failure")
    options = parser.parse_args(arguments)
    counts: dict[str, int] = {}
    for seed in range(options.first, options.last):
        case = random_case(seed)
        found = "no program" if case is None else examine(case)
        word = found if isinstance(found, str) else "failed" if found else "passed"
        counts[word] = counts.get(word, 0) + 1
        if case is not None and isinstance(found, Finding):
            small = shrink(case, found, options.seconds)
            sys.stdout.write(f"--- seed {seed}: {found.kind}: {found.words}\n{small}\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps(counts) + "\n")
    return int("failed" in counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
