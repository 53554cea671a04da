"""Random chains of dependent reductions over one rank, seeded: what the count of passes is tested on.

Each reduction over n folds a map of the input X, of earlier maps and of results of earlier reductions, some of them put
into statements of their own. The maps are such that a partial result in place of a finished one changes the numbers:
nothing that an online algorithm gets right by itself, as the max of `x - max x` is 0 either way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade

REDUCERS = ("sum", "max", "min", "prod")
SMOOTH = ("sin(2 * {x} + 3 * {r})", "tanh({x} * {r} + 0.3)", "cos({x}) * sin(5 * {r})", "{x} * cos(3 * {r})")
WAVES = ("sin(5 * {x} + 3 * {r})", "cos(4 * {x} - 3 * {r})")  # under max and min: no element is the best for every r
SMOOTH_ALONE, WAVES_ALONE = ("tanh({x})", "sin(3 * {x})", "0.5 * {x} + 0.1"), ("sin(5 * {x})", "cos(4 * {x})")
SCALARS = ("tanh({a} + {b})", "cos({a}) + 0.5 * {b}", "sin({a} - 2 * {b})")
SEEDS = range(32)


@dataclass
class Chain:
    """One random cascade in the making: maps that have n, and values that lack it."""

    rng: random.Random
    maps: list[str] = field(default_factory=list)  # reads of what has n
    values: list[str] = field(default_factory=list)  # reads of what lacks it
    results: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def build(self) -> Cascade:
        """The cascade: 2 to 4 reductions over n, in half of the cases for every m, and now and then a map behind them."""
        batch = self.rng.choice(("m", ""))
        whole = f"{batch},n".strip(",")
        self.maps.append(f"X[{whole}]")
        for _ in range(self.rng.randint(2, 4)):
            self.reduction(batch)
            if len(self.values) > 1 and self.rng.random() < 0.4:
                self.scalar(batch)
        if self.rng.random() < 0.4:
            self.map(batch)
            self.results.append(self.maps[-1])
        ends = [f"{read.upper()}" if "[" in read else f"{read}[]" for read in self.results]
        body = "\n".join(self.lines)
        return parse_cascade(f"cascade chain(X[{whole.upper()}]) -> {', '.join(ends)} {{\n{body}\n}}")

    def expression(self, extreme: bool = False) -> str:
        """A map of something that has n, with an earlier result in it more often than not."""
        x = self.rng.choice(self.maps)
        if not self.values or self.rng.random() < 0.25:
            return self.rng.choice(WAVES_ALONE if extreme else SMOOTH_ALONE).format(x=x)
        return self.rng.choice(WAVES if extreme else SMOOTH).format(x=x, r=self.rng.choice(self.values))

    def define(self, letter: str, ranks: str, expr: str) -> str:
        """A statement of its own; the read of what it defines."""
        name = f"{letter}{len(self.lines)}"
        read = f"{name}[{ranks}]" if ranks else name
        self.lines.append(f"    {read} = {expr}")
        return read

    def map(self, batch: str) -> None:
        """A map that has n, as a statement of its own."""
        self.maps.append(self.define("T", f"{batch},n".strip(","), self.expression()))

    def reduction(self, batch: str) -> None:
        """A reduction over n, behind a map of its own in some cases. Its value is a result: what is wrong is seen."""
        if self.rng.random() < 0.35:
            self.map(batch)
        reducer = self.rng.choice(REDUCERS)
        body = self.expression(reducer in ("max", "min"))
        if reducer == "prod":  # factors near 1: of small ones nothing would be left to compare
            body = f"1 + 0.5 * tanh({body})"
        read = self.define("R", batch, f"{reducer}[n] ({body})")
        self.values.append(read)
        self.results.append(read)

    def scalar(self, batch: str) -> None:
        """A value of two earlier ones, computed outside of every trip over n."""
        a, b = self.rng.sample(self.values, 2)
        self.values.append(self.define("V", batch, self.rng.choice(SCALARS).format(a=a, b=b)))


def chain(seed: int) -> Cascade:
    """The cascade of a seed."""
    return Chain(random.Random(seed)).build()


def inputs(cascade: Cascade, seed: int) -> dict[str, torch.Tensor]:
    """A small random X, another for every seed: a partial result may be the finished one by chance, not each time."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple({"M": 2, "N": 7}[str(size)] for size in cascade.params[0].shape)
    return {"X": torch.randn(shape, generator=generator, dtype=torch.float64)}
