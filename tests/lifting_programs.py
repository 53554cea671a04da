"""Random cascades of dependent reductions over n, seeded, as text; their passes follow from how they are put together.

A program is a family with a name (softmax, entropy, LayerNorm into a GEMM, ...), in one of the ways to write it, and
links behind it: reductions that depend on a value made so far. What a reduction reads of earlier ones is said where it
is written, with whether one trip could compute both: so each value has the pass it ends, without lifting and with it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from cascade.ir import Cascade

FILTERS = ("n <= m", "n < len[m]", "n >= low[m]", "(m + n) % 3 != 0")
SCORES = ("X[m,n]", "X[m,n]", "0.5 * X[m,n]", "2 * X[m,n] - 1", "X[m,n] + shift[m]", "sum[e] Q[m,e] * K[n,e]")
SCORES_ALONE = ("X[n]", "0.5 * X[n] + 1", "sum[e] q[e] * K[n,e]")
SHAPES = {"X": "M,N", "Y": "M,N", "V": "N,F", "W": "N,F", "g": "N", "sink": "M", "shift": "M", "Q": "M,E", "K": "N,E",
          "q": "E", "len": "M", "low": "M"}  # fmt: skip
INTEGERS = ("len", "low")


@dataclass(frozen=True, slots=True)
class Program:
    """The text, and the passes over `rank`, plain and lifted; `parts` names the family and the links behind it."""

    text: str
    rank: str
    plain: int
    lifted: int
    parts: tuple[str, ...] = ()
    filtered: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor so far: how it is read, and the pass that ends it."""

    read: str
    plain: int
    lifted: int


@dataclass
class Builder:
    """One random cascade in the making."""

    rng: random.Random
    batch: str  # the kept rank, "m" or nothing
    lines: list[str] = field(default_factory=list)
    made: dict[str, Made] = field(default_factory=dict)
    ends: list[Made] = field(default_factory=list)  # what visits n: the passes are the largest among these
    reductions: int = 0
    values: list[Made] = field(default_factory=list)  # of the ranks `batch`, for links
    shown: list[Made] = field(default_factory=list)  # results, whatever reads them

    def at(self, name: str, *ranks: str) -> str:
        """A read of a tensor at the kept rank and these."""
        found = [rank for rank in (self.batch, *ranks) if rank]
        return f"{name}[{','.join(found)}]" if found else name

    def define(self, letter: str, ranks: tuple[str, ...], expr: str, plain: int, lifted: int) -> Made:
        """A statement."""
        name = f"{letter}{len(self.lines)}"
        self.lines.append(f"    {self.at(name, *ranks)} = {expr}")
        self.made[name] = Made(self.at(name, *ranks), plain, lifted)
        return self.made[name]

    def map(self, letter: str, ranks: tuple[str, ...], expr: str) -> Made:
        """A map, with n or of values: in the pass of what it reads. With n, its readers are what waits."""
        below = self.below(expr)
        return self.define(
            letter, ranks, expr, max((b.plain for b in below), default=0), max((b.lifted for b in below), default=0)
        )

    def below(self, expr: str) -> list[Made]:
        """The tensors of the cascade that a text reads."""
        return [self.made[name] for name in re.findall(r"[A-Za-z_]\w*", expr) if name in self.made]

    def reduce(self, letter: str, ranks: tuple[str, ...], expr: str, blocked: bool = False) -> Made:
        """A reduction over n. `blocked`: no trip computes it together with the values that it reads."""
        below = self.below(expr)
        plain = 1 + max((b.plain for b in below), default=0)
        lifted = max(1, *(b.lifted + (blocked and b.lifted > 0) for b in below))
        self.reductions += 1
        reducer, body = expr.split(" ", 1)  # a sum of terms as a whole: a reduction binds tighter than `+`
        self.ends.append(self.define(letter, ranks, f"{reducer} ({body})", plain, lifted))
        return self.ends[-1]

    def keep(self, letter: str, expr: str) -> None:
        """A result with n: it visits every element once more, behind what it reads."""
        below = self.below(expr)
        plain, lifted = (1 + max(getattr(b, kind) for b in below) for kind in ("plain", "lifted"))
        self.ends.append(self.define(letter, ("n",), expr, plain, lifted))

    # --- the whole ---------------------------------------------------------------------------------------------------

    def program(self, parts: tuple[str, ...], filtered: bool) -> Program:
        """The program, with all values as results that nothing reads, and some that something does."""
        body = "\n".join(self.lines)
        used = [name for name in SHAPES if re.search(rf"\b{name}\b", body)]
        shapes = {name: SHAPES[name] if self.batch else SHAPES[name].removeprefix("M,") for name in used}
        params = [f"{name}{': i64' if name in INTEGERS else ''}[{shapes[name]}]" for name in used]
        results = []
        for name, made in self.made.items():
            read = len(re.findall(rf"\b{name}\b", body)) > 1
            if not read or made in self.shown or (made in self.values and self.rng.random() < 0.3):
                ranks = re.findall(r"\[(.*)\]", made.read)
                results.append(
                    f"{name}[{','.join('2' if r == 'j' else r.upper() for r in ','.join(ranks).split(','))}]"
                )
        text = f"cascade lifting({', '.join(params)}) -> {', '.join(results)} {{\n{body}\n}}\n"
        plain, lifted = max(end.plain for end in self.ends), max(end.lifted for end in self.ends)
        return Program(text, "n", plain, lifted, parts, filtered)


def tamed(b: Builder, value: Made) -> Made:
    """A value of moderate size: links behind it turn with it, and would make rounding of a large one an error."""
    b.shown.append(value)
    return b.map("D", (), f"log(1 + abs({value.read}))")


# --- families: the scores are S, a name that has n -------------------------------------------------------------------


def softmax(b: Builder, s: str) -> tuple[Made, Made, Made]:
    """The largest score, the weights and their sum; sinks join both reductions."""
    r = b.reduce("R", (), f"max[n] {s}")
    sink = bool(b.batch) and b.rng.random() < 0.25
    if sink:
        r = b.map("R", (), f"max({r.read}, sink[m])")
    p = b.map("P", ("n",), f"exp({s} - {r.read})")
    d = b.reduce("D", (), f"sum[n] {p.read}")
    if sink:
        d = b.map("D", (), f"{d.read} + exp(sink[m] - {r.read})")
    return r, p, d


def attention(b: Builder, s: str) -> Made:
    """Softmax of the scores times values; the division before the sum, inside of it or behind."""
    _, p, d = softmax(b, s)
    form = b.rng.choice(("weights", "inside", "behind", "scalar"))
    if form == "weights":
        w = b.map("A", ("n",), f"{p.read} / {d.read}")
        b.reduce("O", ("f",), f"sum[n] {w.read} * V[n,f]")
    elif form == "inside":
        b.reduce("O", ("f",), f"sum[n] {p.read} / {d.read} * V[n,f]")
    elif form == "behind":
        t = b.reduce("T", ("f",), f"sum[n] {p.read} * V[n,f]")
        b.map("O", ("f",), f"{t.read} / {d.read}")
    else:
        return b.reduce("O", (), f"sum[n] {p.read} / {d.read} * g[n]")
    return d


def weights(b: Builder, s: str) -> Made:
    """Softmax as a result: every element is visited again, once the sum is known."""
    _, p, d = softmax(b, s)
    b.keep("Y", f"{p.read} / {d.read}")
    return d


def log_sum_exp(b: Builder, s: str) -> Made:
    """log(sum(exp(x))), the maximum taken out."""
    r, _, d = softmax(b, s)
    return b.map("L", (), f"{r.read} + log({d.read})")


def cross_entropy(b: Builder, s: str) -> Made:
    """The scores' log-softmax against targets, summed in two ways."""
    total = log_sum_exp(b, s)
    y = "Y[m,n]" if b.batch else "g[n]"
    if b.rng.random() < 0.5:
        return b.reduce("C", (), f"sum[n] {y} * ({total.read} - {s})")
    t = b.reduce("T", (), f"sum[n] {y} * {s}")
    return b.map("C", (), f"{total.read} - {t.read}")


def entropy(b: Builder, s: str) -> Made:
    """The entropy of a softmax, in three ways."""
    r, p, d = softmax(b, s)
    form = b.rng.randrange(3)
    if form == 0:
        w = b.map("A", ("n",), f"{p.read} / {d.read}")
        return b.reduce("H", (), f"sum[n] -({w.read} * log({w.read}))")
    if form == 1:
        t = b.reduce("T", (), f"sum[n] {p.read} * ({s} - {r.read})")
        return b.map("H", (), f"log({d.read}) - {t.read} / {d.read}")
    total = b.map("L", (), f"{r.read} + log({d.read})")
    return b.reduce("H", (), f"sum[n] {p.read} / {d.read} * ({total.read} - {s})")


def average(b: Builder, s: str) -> Made:
    """The mean of the present elements."""
    t = b.reduce("T", (), f"sum[n] {s}")
    c = b.reduce("C", (), f"count[n] {s}")
    return b.map("A", (), f"{t.read} / {c.read}")


def variance(b: Builder, s: str) -> Made:
    """The average square of the distance to the mean, as a sum or with the count."""
    mu = average(b, s)
    if b.rng.random() < 0.5:
        z = b.map("Z", ("n",), f"{s} - {mu.read}")
        return b.reduce("E", (), f"sum[n] {z.read} * {z.read}")
    return b.reduce("E", (), f"sum[n] ({s} - {mu.read}) * ({s} - {mu.read})")


def covariance(b: Builder, s: str) -> Made:
    """Two means, and the sum of the products of the distances."""
    z = b.map("Z", ("n",), f"{s} * 0 + {'Y[m,n]' if b.batch else 'g[n]'}")  # present where the scores are
    mu, nu = average(b, s), average(b, z.read)
    return b.reduce("E", (), f"sum[n] ({s} - {mu.read}) * ({z.read} - {nu.read})")


def third_moment(b: Builder, s: str) -> Made:
    """Skewness, or its numerator."""
    mu = average(b, s)
    z = f"({s} - {mu.read})"
    if b.rng.random() < 0.5:
        e = b.reduce("E", (), f"sum[n] {z} * {z} * {z}")
        return tamed(b, e)
    e = b.reduce("E", (), f"sum[n] {z} * {z}")
    d = b.map("D", (), f"sqrt({e.read} + 0.01)")
    return b.reduce("G", (), f"sum[n] {z} / {d.read} * ({z} / {d.read}) * ({z} / {d.read})")


def layernorm_gemm(b: Builder, s: str) -> Made:
    """Mean, variance, scale, then a matrix product over the normalised rank; or the normalised rows as a result."""
    mu = average(b, s)
    e = b.reduce("E", (), f"sum[n] ({s} - {mu.read}) * ({s} - {mu.read})")
    k = b.map("B", (), f"rsqrt({e.read} / 8 + 0.01)")
    form = b.rng.choice(("gemm", "gain", "rows"))
    if form == "rows":
        b.keep("Y", f"({s} - {mu.read}) * {k.read} * g[n]")
    elif form == "gain":
        z = b.map("Z", ("n",), f"({s} - {mu.read}) * {k.read} * g[n]")
        b.reduce("O", ("f",), f"sum[n] {z.read} * W[n,f]")
    else:
        b.reduce("O", ("f",), f"sum[n] ({s} - {mu.read}) * {k.read} * W[n,f]")
    return e


def rmsnorm_gemm(b: Builder, s: str) -> Made:
    """The same without a mean."""
    e = b.reduce("E", (), f"sum[n] {s} * {s}")
    k = b.map("B", (), f"rsqrt({e.read} / 8 + 0.01)")
    if b.rng.random() < 0.5:
        z = b.map("Z", ("n",), f"{s} * {k.read} * g[n]")
        b.reduce("O", ("f",), f"sum[n] {z.read} * W[n,f]")
    else:
        b.reduce("O", ("f",), f"sum[n] {s} * {k.read} * W[n,f]")
    return e


def amax_gemm(b: Builder, s: str) -> Made:
    """Rows scaled by their largest magnitude, in a matrix product."""
    a = b.reduce("A", (), f"max[n] abs({s})")
    form = b.rng.choice(("{s} / {a} * W[n,f]", "{s} * (1.0 / ({a} + 0.5)) * W[n,f]"))
    b.reduce("O", ("f",), f"sum[n] {form.format(s=s, a=a.read)}")
    return a


def route(b: Builder, s: str) -> Made:
    """The two largest weights of a softmax, scaled to add up to 1."""
    _, p, d = softmax(b, s)
    at = len(b.lines)
    left = f"{b.at(f'G{at}', 'j')}, {b.at(f'I{at}', 'j')}"
    plain, lifted = d.plain + 1, d.lifted
    b.lines.append(f"    {left} = topk[n, 2] {p.read} / {d.read}")
    for letter in "GI":
        b.made[f"{letter}{at}"] = Made(b.at(f"{letter}{at}", "j"), plain, lifted)
    b.ends.append(b.made[f"G{at}"])
    b.reductions += 1
    g = b.at(f"G{at}", "j")
    b.map("O", ("j",), f"{g} / (sum[j] {g})")
    return d


def scaled_maximum(b: Builder, s: str) -> Made:
    """The largest of what grows with the scores, whatever the value is: a positive scale, a shift, an exponential."""
    r, p, d = softmax(b, s)
    form = b.rng.choice(("{p} / {d}", "{s} / {d}", "{s} + {r}", "2 * {s} - {d}", "{s} * ({d} + 1)"))
    return b.reduce("B", (), f"max[n] {form.format(s=s, p=p.read, d=d.read, r=r.read)}")


def product(b: Builder, s: str) -> Made:
    """A product of positive factors, to the power of an earlier value."""
    a = b.reduce("A", (), f"max[n] abs({s})")
    u = b.reduce("U", (), f"prod[n] pow(1 + 0.125 * tanh({s}), {a.read} + 1)")
    return tamed(b, u)


def linear_sums(b: Builder, s: str) -> Made:
    """Sums that scale with sums."""
    a = b.reduce("A", (), f"sum[n] abs({s})")
    c = b.reduce("B", (), f"sum[n] {s} * {s} * {a.read}")
    form = b.rng.choice(
        ("{s} / ({a} + 0.5)", "{s} * {a} + abs({s}) * {c}", "{s} * {c} + {a}", "(1 + {s}) * ({a} - {c})")
    )
    d = b.reduce("C", (), f"sum[n] {form.format(s=s, a=a.read, c=c.read)}")
    return tamed(b, d)


def spread(b: Builder, s: str) -> Made:
    """What only looks like a variance, or a scaled product: a kink, a saturation, a step at the value."""
    form = b.rng.choice(
        ("abs({s} - {v})", "relu({s} - {v})", "sigmoid(16 * ({s} - {v}))", "round({s} / {a} * 127) * g[n]")
    )
    if "{a}" in form:
        a = b.map("B", (), f"{b.reduce('A', (), f'max[n] abs({s})').read} + 0.5")
        return tamed(b, b.reduce("O", (), f"sum[n] {form.format(s=s, a=a.read)}", blocked=True))
    return tamed(b, b.reduce("E", (), f"sum[n] {form.format(s=s, v=average(b, s).read)}", blocked=True))


Family: TypeAlias = Callable[[Builder, str], Made]
FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        attention, weights, log_sum_exp, cross_entropy, entropy, variance, covariance, third_moment, layernorm_gemm,
        rmsnorm_gemm, amax_gemm, route, scaled_maximum, product, linear_sums, spread,
    )
}  # fmt: skip

LINKS = {
    "scaled sum": "sum[n] {s} * {v}",
    "shifted sum": "sum[n] ({s} + {v}) * ({s} - {v})",
    "square of a distance": "sum[n] ({s} - {v}) * ({s} - {v})",
    "shifted maximum": "max[n] {s} + {v}",
    "shifted minimum": "min[n] 3 * {s} - {v}",
    "monotone maximum": "max[n] tanh(0.25 * {s} - {w})",
}
"""Reductions that one trip computes together with any value v; w is v, folded into the range of the scores."""

BLOCKED = {
    "distance": "sum[n] abs({s} - {w})",
    "threshold": "sum[n] relu({s} - {w})",
    "gate": "sum[n] sigmoid(16 * ({s} - {w}))",
    "quantised": "sum[n] round({s} / (abs({w}) + 0.5) * 127) * g[n]",
    "temperature": "sum[n] exp({s} * {w})",
    "wave maximum": "max[n] sin(5 * {s} + 3 * {v})",
    "wave minimum": "min[n] cos(4 * {s} - 3 * {v})",
}
"""Reductions that need the finished v: no other value of it says enough about the elements."""

WAVY = frozenset({"monotone maximum", *BLOCKED})
"""Links that turn with v: what rounding does to a large v, they make of any size."""

SHARE = 0.3  # how often there is another link, while there are not too many
MOST = 4  # reductions above which no link is added


def program(seed: int, where: str | None = None) -> Program:
    """The program of a seed; `where` is the filter of the first statement, else chosen: none in half of the cases."""
    rng = random.Random(seed)
    b = Builder(rng, "m" if where or rng.random() < 0.8 else "")
    scores = rng.choice(SCORES if b.batch else SCORES_ALONE)
    if where is None:
        where = rng.choice(FILTERS) if b.batch and rng.random() < 0.5 else ""
    s = b.define("S", ("n",), scores + f" where {where}" * bool(where), 0, 0)
    family = rng.choice(list(FAMILIES))
    parts = [family]
    b.values.append(FAMILIES[family](b, s.read))
    for links in (LINKS, BLOCKED, LINKS, BLOCKED):
        if b.reductions < MOST and rng.random() < SHARE:
            link = rng.choice(list(links))
            v = rng.choice(b.values).read
            expr = links[link].format(s=s.read, v=v, w=f"(0.5 + sin(5 * {v}))")
            made = b.reduce("K" if links is LINKS else "N", (), expr, blocked=links is BLOCKED)
            b.values.append(tamed(b, made))
            parts.append(link)
    return b.program(tuple(parts), bool(where))


def inputs(cascade: Cascade, seed: int, n: int, m: int = 3, recipe: str = "normal") -> dict[str, torch.Tensor]:
    """Random tensors for the parameters, float64: `normal`, cut at 2; `large`, 1e5 of it; `equal`, 1.5 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"M": m, "N": n, "E": 2, "F": 2}
    tensors = {}
    for param in cascade.params:
        shape = [size if isinstance(size, int) else sizes[size] for size in param.shape]
        if param.name in INTEGERS:
            tensors[param.name] = torch.randint(0, n + 1, shape, generator=generator)
            continue
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-2, 2)
        scaled = {"normal": drawn, "large": drawn * 1e5, "equal": torch.full_like(drawn, 1.5)}[recipe]
        tensors[param.name] = scaled if param.name in ("X", "Q", "q", "shift", "sink") else drawn
    return tensors
