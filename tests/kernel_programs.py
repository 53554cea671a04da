"""Programs that kernels are tested on: plain maths, how their inputs are made from sizes, and which sizes excite what.

No tolerance finds a bug that the data does not excite, so inputs are made by *recipes*: normal; scores rising along the
reduced rank; falling; the last value times 500; all scores very negative; small integers; and, where a program has
coordinates that nothing may read, NaN and inf there. `nan` puts one NaN among live data. A recipe is a function of the
program, its sizes, a seed and the working type; integers that index, and numbers that a program needs as they are (a
slope, a cap), are the same under every recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Generator, Tensor

Sizes: TypeAlias = Mapping[str, int]
Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Input:
    """How the data of one parameter is made, of the given shape.

    `drives` is the rank along which the tensor decides how scores run, `weighs` the one whose last value counts most; a
    `partner` is what a driver is multiplied with, positive where scores are to rise or fall. `make` gives the data as
    it is. Other data is `centre + spread * normal`, in steps of `grid` where that is not 0.
    """

    shape: str
    drives: str = ""
    weighs: str = ""
    partner: bool = False
    make: Callable[[Sizes, Generator], Tensor] | None = None
    centre: float = 0.0
    spread: float = 1.0
    grid: float = 0.0

    def extents(self, sizes: Sizes) -> tuple[int, ...]:
        """The extents of the tensor."""
        return tuple(int(word) if word.isdigit() else sizes[word] for word in self.shape.split())


@dataclass(frozen=True, slots=True)
class Program:
    """A cascade, its inputs, and the sizes that it is run at.

    `small` is for the CPU, `large` for a GPU, `long` has a rank of 131,072 and few of the others. `lengths` are the
    symbols that a sweep over lengths sets, `batch` the one that makes many independent outputs, `heads` those of head
    sizes, `rows` the first rank of every input along which the program is independent. `extra` are symbols that no
    tensor binds. `exact`: integers give exact results. `overflows` are the recipes whose numbers f16 does not hold at
    large sizes, between two products. `reach` is how far scores run, `level` how negative they get;
    `tail` is where the last live element stands, from the end of the shortest of the lengths.
    """

    name: str
    text: str
    inputs: Mapping[str, Input]
    small: Sizes
    large: tuple[Sizes, ...] = ()
    long: Sizes | None = None
    lengths: tuple[str, ...] = ()
    batch: str = ""
    heads: tuple[str, ...] = ()
    rows: str = ""
    extra: tuple[str, ...] = ()
    complete: Callable[[Sizes], Sizes] = dict
    padding: Callable[[Tensors, Sizes], Tensors] | None = None
    exact: bool = False
    overflows: frozenset[str] = frozenset()
    reach: float = 2.0
    level: float = 50.0
    tail: int = 1
    without: frozenset[str] = field(default_factory=frozenset)

    def given(self, sizes: Sizes) -> dict[str, int]:
        """The sizes that a call passes by keyword."""
        return {name: sizes[name] for name in self.extra}

    def recipes(self) -> tuple[str, ...]:
        """The names of the recipes that apply."""
        absent = self.without | (frozenset() if self.padding else {"padding"})
        return tuple(name for name in RECIPES if name not in absent)


# --- recipes ---------------------------------------------------------------------------------------------------------

Recipe: TypeAlias = Callable[[Program, Sizes, int, torch.dtype, str], Tensors]


def _made(
    program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str, data: Callable[[Input, Tensor], Tensor]
) -> Tensors:
    """Every input of the working type: what `data` makes of standard normal numbers, or what its spec says."""
    fixed = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    found: Tensors = {}
    for name, spec in program.inputs.items():
        if spec.make is not None:
            made = spec.make(sizes, fixed).to(device)
            found[name] = made.to(dtype) if made.dtype.is_floating_point else made
            continue
        noise = torch.randn(spec.extents(sizes), generator=generator, device=device)
        values = data(spec, noise)
        found[name] = (torch.round(values / spec.grid) * spec.grid if spec.grid else values).to(dtype)
    return found


def _plain(spec: Input, noise: Tensor) -> Tensor:
    return spec.centre + spec.spread * noise


def _along(spec: Input, rank: str, like: Tensor, values: Tensor) -> Tensor:
    """Values along one rank, of a shape that broadcasts over the tensor."""
    shape = [1] * like.dim()
    shape[spec.shape.split().index(rank)] = -1
    return values.reshape(shape)


def normal(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Standard normal data."""
    return _made(program, sizes, seed, dtype, device, _plain)


def _running(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str, first: float) -> Tensors:
    def data(spec: Input, noise: Tensor) -> Tensor:
        if spec.partner:
            return noise.abs() / 2 + 0.5
        if not spec.drives:
            return _plain(spec, noise)
        count = noise.shape[spec.shape.split().index(spec.drives)]
        ramp = torch.linspace(first, -first, count, device=noise.device)
        return spec.centre + spec.spread * (0.3 * noise + _along(spec, spec.drives, noise, ramp))

    return _made(program, sizes, seed, dtype, device, data)


def rising(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Scores rise along the reduced rank: every block has a new maximum."""
    return _running(program, sizes, seed, dtype, device, -program.reach)


def falling(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Scores fall along the reduced rank: the first block has the maximum."""
    return _running(program, sizes, seed, dtype, device, program.reach)


def spike(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """The last live value along the reduced rank is 500 times as large: dropping it shows in every output."""

    def data(spec: Input, noise: Tensor) -> Tensor:
        values = _plain(spec, noise)
        if spec.weighs and noise.numel():
            swept = program.lengths if spec.weighs in program.lengths else (spec.weighs,)
            last = max(0, min(sizes[symbol] for symbol in swept) - program.tail)
            values.select(spec.shape.split().index(spec.weighs), last).mul_(500)
        return values

    return _made(program, sizes, seed, dtype, device, data)


def negative(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """All scores are very negative: a maximum that starts at 0 instead of -inf shows."""

    def data(spec: Input, noise: Tensor) -> Tensor:
        if spec.partner:
            return noise.abs() / 2 + 0.5
        return _plain(spec, noise) - (program.level if spec.drives else 0)

    return _made(program, sizes, seed, dtype, device, data)


def integers(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Integers from -3 to 3: sums of products are exact, ties abound."""

    def data(spec: Input, noise: Tensor) -> Tensor:
        return (noise * 2).round().clamp(-3, 3)

    return _made(program, sizes, seed, dtype, device, data)


def padding(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Normal data, with NaN and inf at the coordinates that nothing may read."""
    found = normal(program, sizes, seed, dtype, device)
    assert program.padding is not None, f"{program.name} has no padding"
    for i, (name, dead) in enumerate(program.padding(found, sizes).items()):
        found[name] = found[name].masked_fill(dead.to(device), math.inf if i % 2 else math.nan)
    return found


def nan(program: Program, sizes: Sizes, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Normal data with one NaN: exactly the outputs that depend on it are NaN."""
    found = normal(program, sizes, seed, dtype, device)
    free = [name for name, spec in program.inputs.items() if spec.make is None and found[name].numel()]
    if free:
        data = found[free[seed % len(free)]].view(-1)
        data[(seed * 7919 + 5) % data.numel()] = math.nan
    return found


RECIPES: dict[str, Recipe] = {
    "normal": normal,
    "rising": rising,
    "falling": falling,
    "spike": spike,
    "negative": negative,
    "integers": integers,
    "padding": padding,
    "nan": nan,
}


# --- integers and numbers that programs need as they are -------------------------------------------------------------


def number(value: float) -> Callable[[Sizes, Generator], Tensor]:
    """A scalar."""
    return lambda sizes, generator: torch.tensor(value)


def slopes(sizes: Sizes, generator: Generator) -> Tensor:
    """The slopes of linear biases, a power of two for each head."""
    return 2.0 ** -(torch.arange(sizes["H"]) % 8 + 1).float()


def lengths(sizes: Sizes, generator: Generator) -> Tensor:
    """A length per batch: spread over 0 to N, the first N, the last 0 where there are several."""
    found = torch.randint(0, sizes["N"] + 1, (sizes["B"],), generator=generator)
    if sizes["B"]:
        found[0] = sizes["N"]
    if sizes["B"] > 1:
        found[-1] = 0
    return found.int()


def documents(sizes: Sizes, generator: Generator) -> Tensor:
    """The document of every position, in order, about four documents a sequence."""
    starts = torch.rand(sizes["B"], sizes["M"], generator=generator) < 4 / max(4, sizes["M"])
    return starts.long().cumsum(1)


def kept(sizes: Sizes, generator: Generator) -> Tensor:
    """Which keys are no padding: left of a batch's first one they are, and a few between; of the last batch all are."""
    first = torch.randint(0, max(1, sizes["N"] // 2), (sizes["B"], 1), generator=generator)
    found = (torch.arange(sizes["N"]) >= first) & (torch.rand(sizes["B"], sizes["N"], generator=generator) < 0.9)
    if sizes["B"] > 1:
        found[-1] = False
    return found


def pairs(sizes: Sizes, generator: Generator) -> Tensor:
    """Which key a query sees: a third of them, in every third row none."""
    found = torch.rand(sizes["B"], sizes["M"], sizes["N"], generator=generator) < 0.3
    found[:, ::3] = False
    return found


PAGE = 16  # positions that a page holds


def pages(sizes: Sizes, generator: Generator) -> Tensor:
    """The page of every stretch of positions; those behind the length are -1."""
    found = torch.randint(0, max(1, sizes["C"]), (sizes["B"], sizes["L"]), generator=generator)
    starts = torch.arange(sizes["L"]) * PAGE
    return torch.where(starts < paged_lengths(sizes, generator)[:, None], found, -1)


def paged_lengths(sizes: Sizes, generator: Generator) -> Tensor:
    """Lengths that do not depend on the state of the generator, so that pages fit them; the second is 0."""
    longest = sizes["L"] * PAGE
    return torch.tensor([0 if b == 1 else max(0, longest - 7 * b) for b in range(sizes["B"])], dtype=torch.long)


def labels(sizes: Sizes, generator: Generator) -> Tensor:
    """A class per row."""
    return torch.randint(0, max(1, sizes["N"]), (sizes["M"],), generator=generator)


def tokens(sizes: Sizes, generator: Generator) -> Tensor:
    """A row of the table per position."""
    return torch.randint(0, max(1, sizes["N"]), (sizes["T"],), generator=generator)


def starts(sizes: Sizes, generator: Generator) -> Tensor:
    """Where the live stretch of a row begins: behind the first tiles of long rows as well; the first row is live."""
    found = torch.randint(0, max(1, sizes["N"]), (sizes["M"],), generator=generator).int()
    found[:1] = 0
    return found


def stops(sizes: Sizes, generator: Generator) -> Tensor:
    """Where the live stretch of a row ends: often before it begins, which leaves nothing; the first row is live."""
    found = torch.randint(0, sizes["N"] + 1, (sizes["M"],), generator=generator).int()
    found[:1] = sizes["N"]
    return found


# --- coordinates that nothing may read -------------------------------------------------------------------------------


def behind_the_queries(inputs: Tensors, sizes: Sizes) -> Tensors:
    """Keys and values behind the last query."""
    dead = (torch.arange(sizes["N"]) >= sizes["M"])[:, None]
    return {"K": dead, "V": dead}


def behind_the_length(inputs: Tensors, sizes: Sizes) -> Tensors:
    """Keys and values behind the length of their batch."""
    dead = torch.arange(sizes["N"]) >= inputs["len"].cpu()[:, None]
    dead = dead.reshape(sizes["B"], *[1] * (inputs["K"].dim() - 3), sizes["N"], 1)
    return {"K": dead, "V": dead}


def padded_keys(inputs: Tensors, sizes: Sizes) -> Tensors:
    """Keys and values that are padding, or behind the last query."""
    dead = ~inputs["keep"].cpu()[:, None, :, None] | (torch.arange(sizes["N"]) >= sizes["M"])[:, None]
    return {"K": dead, "V": dead}


def outside_the_pages(inputs: Tensors, sizes: Sizes) -> Tensors:
    """Positions of the pool that no length reaches."""
    dead = torch.ones(sizes["C"], 1, sizes["W"], 1, dtype=torch.bool)
    for table, length in zip(inputs["pages"].tolist(), inputs["len"].tolist(), strict=True):
        for place, page in enumerate(table):
            if page >= 0:
                dead[page, :, : max(0, length - place * PAGE)] = False
    return {"K": dead, "V": dead}


def outside_the_stretch(inputs: Tensors, sizes: Sizes) -> Tensors:
    """Elements of a row before its first live one, and from the last one on."""
    n = torch.arange(sizes["N"])
    return {"X": (n < inputs["start"].cpu()[:, None]) | (n >= inputs["stop"].cpu()[:, None])}


def above_the_diagonal(inputs: Tensors, sizes: Sizes) -> Tensors:
    """Elements that a strictly lower triangle leaves out."""
    return {"X": torch.arange(sizes["N"]) >= torch.arange(sizes["M"])[:, None]}


# --- attention -------------------------------------------------------------------------------------------------------


def attention(
    where: str = "",
    scores: str = "Q[b,h,m,e] * K[b,h,n,e] / sqrt(E)",
    params: str = "",
    results: str = "",
    more: str = "",
) -> str:
    """Attention over n, with a filter, other scores, further parameters, further results and their statements."""
    return f"""
cascade attention(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F]{params}) -> O[B,H,M,F]{results} {{
    S[b,h,m,n] = {scores} {where and "where " + where}
    R[b,h,m]   = max[n] S[b,h,m,n]
    P[b,h,m,n] = exp(S[b,h,m,n] - R[b,h,m])
    D[b,h,m]   = sum[n] P[b,h,m,n]
    O[b,h,m,f] = sum[n] P[b,h,m,n] / D[b,h,m] * V[b,h,n,f]{more}
}}"""


QUERY = Input("B H M E", partner=True)
KEY = Input("B H N E", drives="N")
VALUE = Input("B H N F", weighs="N")
ATTENTION_SMALL: Sizes = {"B": 2, "H": 2, "M": 9, "N": 13, "E": 5, "F": 6}
ATTENTION_LARGE: tuple[Sizes, ...] = (
    {"B": 2, "H": 4, "M": 200, "N": 333, "E": 64, "F": 64},
    {"B": 1, "H": 8, "M": 1024, "N": 1024, "E": 128, "F": 128},
    {"B": 1, "H": 1, "M": 8191, "N": 8191, "E": 64, "F": 64},
)
ATTENTION_LONG: Sizes = {"B": 1, "H": 2, "M": 16, "N": 131_072, "E": 64, "F": 64}


def attending(name: str, text: str, more: Mapping[str, Input] | None = None, **options: object) -> Program:
    """A program of the attention family with the common inputs and sizes, some of them replaced."""
    fields: dict[str, object] = {
        "inputs": {"Q": QUERY, "K": KEY, "V": VALUE, **(more or {})},
        "small": ATTENTION_SMALL,
        "large": ATTENTION_LARGE,
        "long": ATTENTION_LONG,
        "lengths": ("N",),
        "batch": "B",
        "heads": ("E", "F"),
    }
    return Program(name=name, text=text, **{**fields, **options})  # type: ignore[arg-type]


def square(sizes: Sizes) -> Sizes:
    """As many keys as queries."""
    return {**sizes, "N": sizes["M"]}


def halved(sizes: Sizes) -> Sizes:
    """Two query heads for each head of keys."""
    return {**sizes, "H": 2 * sizes["G"]}


def in_pages(sizes: Sizes) -> Sizes:
    """The positions that the pages hold."""
    return {**sizes, "N": sizes["L"] * PAGE}


GROUPED = {"K": Input("B G N E", drives="N"), "V": Input("B G N F", weighs="N")}
POOL = {
    "K": Input("C H W E", drives="W"), "V": Input("C H W F", weighs="W"),
    "pages": Input("B L", make=pages), "len": Input("B", make=paged_lengths),
}  # fmt: skip
POOL_SMALL: Sizes = {"B": 3, "H": 2, "M": 4, "C": 5, "L": 3, "W": PAGE, "E": 5, "F": 6}
POOL_LARGE: tuple[Sizes, ...] = (
    {"B": 4, "H": 4, "M": 3, "C": 100, "L": 40, "W": PAGE, "E": 64, "F": 64},
    {"B": 2, "H": 8, "M": 1, "C": 1100, "L": 512, "W": PAGE, "E": 128, "F": 128},
)
POOL_LONG: Sizes = {"B": 1, "H": 2, "M": 1, "C": 8200, "L": 8192, "W": PAGE, "E": 64, "F": 64}
DECODE_SMALL: Sizes = {"B": 3, "G": 2, "J": 4, "N": 13, "E": 5, "F": 6}
DECODE_LARGE: tuple[Sizes, ...] = (
    {"B": 4, "G": 2, "J": 8, "N": 333, "E": 64, "F": 64},
    {"B": 2, "G": 8, "J": 4, "N": 8192, "E": 128, "F": 128},
)
DECODE_LONG: Sizes = {"B": 1, "G": 2, "J": 8, "N": 131_072, "E": 128, "F": 128}
LATENT_SMALL: Sizes = {"B": 2, "H": 3, "M": 2, "N": 13, "E": 9, "F": 8}
LATENT_LARGE: tuple[Sizes, ...] = (
    {"B": 2, "H": 16, "M": 1, "N": 333, "E": 576, "F": 512},
    {"B": 1, "H": 16, "M": 128, "N": 1024, "E": 576, "F": 512},
)
LATENT_LONG: Sizes = {"B": 1, "H": 16, "M": 1, "N": 131_072, "E": 576, "F": 512}

CAUSAL = "n <= m"

ATTENTION: tuple[Program, ...] = (
    attending("full", attention()),
    attending("causal", attention(CAUSAL), lengths=("M", "N"), padding=behind_the_queries),
    attending(
        "window", attention("m - n < 70 and n <= m"), lengths=("M", "N"), padding=behind_the_queries,
        small=dict(ATTENTION_SMALL, M=81, N=83),
    ),
    attending("prefix", attention("n < 4 or n <= m"), lengths=("M", "N")),
    attending(
        "document",
        attention("doc[b,m] == doc[b,n]", params=", doc: i64[B,M]").replace("N,E]", "M,E]").replace("N,F]", "M,F]"),
        {"K": Input("B H M E", drives="M"), "V": Input("B H M F", weighs="M"), "doc": Input("B M", make=documents)},
        lengths=("M",),
        long=None,
    ),
    attending(
        "ragged", attention("n < len[b]", params=", len: i32[B]"), {"len": Input("B", make=lengths)},
        padding=behind_the_length, small=dict(ATTENTION_SMALL, B=3),
    ),
    attending(
        "padded", attention("n <= m and keep[b,n]", params=", keep: bool[B,N]"), {"keep": Input("B N", make=kept)},
        lengths=("M", "N"), padding=padded_keys, small=dict(ATTENTION_SMALL, B=3, M=37, N=35),
    ),
    attending(
        "masked", attention("see[b,m,n]", params=", see: bool[B,M,N]"), {"see": Input("B M N", make=pairs)},
        lengths=("N",), long=None,
    ),
    attending(
        "alibi",
        attention(CAUSAL, "(sum[e] Q[b,h,m,e] * K[b,h,n,e] / sqrt(E)) - slope[h] * (m - n)", ", slope[H]"),
        {"slope": Input("H", make=slopes)},
        lengths=("M", "N"),
        padding=behind_the_queries,
    ),
    attending(
        "softcap",
        attention(CAUSAL, "cap * tanh((sum[e] Q[b,h,m,e] * K[b,h,n,e]) / cap)", ", cap[]"),
        {"cap": Input("", make=number(30.0))},
        lengths=("M", "N"),
    ),
    attending(
        "grouped_query",
        attention(CAUSAL, "Q[b,h,m,e] * K[b,h//2,n,e] / sqrt(E)")
        .replace("K[B,H,", "K[B,G,").replace("V[B,H,", "V[B,G,").replace("V[b,h,n,f]", "V[b,h//2,n,f]"),
        GROUPED,
        lengths=("M", "N"),
        small=dict(ATTENTION_SMALL, H=4, G=2),
        large=tuple(dict(sizes, G=sizes["H"]) for sizes in ATTENTION_LARGE),
        long=dict(ATTENTION_LONG, G=2),
        complete=halved,
    ),
    attending(
        "sink",
        attention(CAUSAL, params=", sink[H]").replace("max[n] S[b,h,m,n]", "max(max[n] S[b,h,m,n], sink[h])").replace(
            "D[b,h,m]   = sum[n] P[b,h,m,n]", "D[b,h,m] = (sum[n] P[b,h,m,n]) + exp(sink[h] - R[b,h,m])"),
        {"sink": Input("H")},
        lengths=("M", "N"),
    ),
    attending("cross", attention(), small=dict(ATTENTION_SMALL, M=17, N=3), large=(dict(ATTENTION_LARGE[0], N=77),)),
    attending(
        "paged",
        f"""cascade paged(Q[B,H,M,E], K[C,H,W,E], V[C,H,W,F], pages: i64[B,L], len: i64[B]) -> O[B,H,M,F] {{
    S[b,h,m,l,w] = Q[b,h,m,e] * K[pages[b,l],h,w,e] / sqrt(E) where l*{PAGE} + w < len[b]
    P[b,h,m,l,w] = softmax[l,w] S[b,h,m,l,w]
    O[b,h,m,f]   = P[b,h,m,l,w] * V[pages[b,l],h,w,f] where l*{PAGE} + w < len[b]
}}""",
        POOL,
        small=POOL_SMALL,
        large=POOL_LARGE,
        long=POOL_LONG,
        lengths=("L",),
        padding=outside_the_pages,
    ),
    attending(
        "paged_by_quotient_and_remainder",
        attention("n < len[b]", f"Q[b,h,m,e] * K[pages[b, n//{PAGE}],h,n%{PAGE},e] / sqrt(E)", ", pages: i64[B,L], len: i64[B]")
        .replace("K[B,H,N,E]", "K[C,H,W,E]").replace("V[B,H,N,F]", "V[C,H,W,F]")
        .replace("V[b,h,n,f]", f"V[pages[b, n//{PAGE}],h,n%{PAGE},f] where n < len[b]")
        .replace("O[B,H,M,F] {", "O[B,H,M,F] with n = N {"),
        POOL,
        small=dict(POOL_SMALL, N=3 * PAGE),
        large=POOL_LARGE,
        long=POOL_LONG,
        lengths=("L",),
        extra=("N",),
        complete=in_pages,
        padding=outside_the_pages,
    ),
    attending(
        "picture",
        """cascade picture(Q[B,H,M,N,E], K[B,H,M,N,E], V[B,H,M,N,F]) -> O[B,H,M,N,F] {
    S[b,h,m,n,x,y] = Q[b,h,m,n,e] * K[b,h,x,y,e] / sqrt(E) where x - m < 3 and m - x < 4 and y - n < 5 and n - y < 3
    P[b,h,m,n,x,y] = softmax[x,y] S[b,h,m,n,x,y]
    O[b,h,m,n,f]   = P[b,h,m,n,x,y] * V[b,h,x,y,f]
}""",
        {
            "Q": Input("B H M N E", partner=True), "K": Input("B H M N E", drives="N"),
            "V": Input("B H M N F", weighs="N"),
        },
        small={"B": 2, "H": 2, "M": 3, "N": 7, "E": 5, "F": 6},
        large=(
            {"B": 2, "H": 4, "M": 11, "N": 33, "E": 64, "F": 64}, {"B": 2, "H": 4, "M": 24, "N": 64, "E": 128, "F": 128},
            {"B": 1, "H": 2, "M": 9, "N": 256, "E": 64, "F": 64},
        ),
        long=None,
    ),
    attending(
        "simplicial",
        """cascade simplicial(Q[B,H,M,E], K[B,H,L,E], J[B,H,N,E], V[B,H,L,F], U[B,H,N,F]) -> O[B,H,M,F] {
    S[b,h,m,l,n] = Q[b,h,m,e] * K[b,h,l,e] * J[b,h,n,e] / sqrt(E) where l <= m and m < l + 6 and n <= m and m < n + 40
    P[b,h,m,l,n] = softmax[l,n] S[b,h,m,l,n]
    O[b,h,m,f]   = P[b,h,m,l,n] * V[b,h,l,f] * U[b,h,n,f]
}""",
        {
            "Q": Input("B H M E", partner=True), "K": Input("B H L E", drives="L"),
            "J": Input("B H N E", partner=True), "V": Input("B H L F", weighs="L"), "U": Input("B H N F"),
        },
        small={"B": 2, "H": 2, "M": 9, "L": 5, "N": 7, "E": 5, "F": 6},
        large=(
            {"B": 1, "H": 2, "M": 200, "L": 200, "N": 192, "E": 64, "F": 64},
            {"B": 1, "H": 2, "M": 130, "L": 67, "N": 256, "E": 128, "F": 128},
            {"B": 2, "H": 1, "M": 60, "L": 60, "N": 60, "E": 64, "F": 64},
        ),
        long=None,
    ),
    attending(
        "decode",
        """cascade decode(Q[B,H,E], K[B,G,N,E], V[B,G,N,F], len: i32[B]) -> O[B,H,F] {
    S[b,h,n] = Q[b,h,e] * K[b,h//2,n,e] / sqrt(E) where n < len[b]
    P[b,h,n] = softmax[n] S[b,h,n]
    O[b,h,f] = sum[n] P[b,h,n] * V[b,h//2,n,f]
}""",
        {"Q": Input("B H E", partner=True), **GROUPED, "len": Input("B", make=lengths)},
        small=dict(DECODE_SMALL, H=4),
        large=DECODE_LARGE,
        long=DECODE_LONG,
        complete=halved,
        padding=behind_the_length,
    ),
    attending(
        "decode_grouped",
        """cascade decode(Q[B,G,J,E], K[B,G,N,E], V[B,G,N,F]) -> O[B,G,J,F] {
    S[b,g,j,n] = Q[b,g,j,e] * K[b,g,n,e] / sqrt(E)
    P[b,g,j,n] = softmax[n] S[b,g,j,n]
    O[b,g,j,f] = sum[n] P[b,g,j,n] * V[b,g,n,f]
}""",
        {"Q": Input("B G J E", partner=True), **GROUPED},
        small=DECODE_SMALL,
        large=DECODE_LARGE,
        long=DECODE_LONG,
    ),
    attending(
        "latent",
        """cascade latent(Q[B,H,M,E], K[B,N,E], V[B,N,F]) -> O[B,H,M,F] {
    S[b,h,m,n] = Q[b,h,m,e] * K[b,n,e] / sqrt(E)
    P[b,h,m,n] = softmax[n] S[b,h,m,n]
    O[b,h,m,f] = sum[n] P[b,h,m,n] * V[b,n,f]
}""",
        {"K": Input("B N E", drives="N"), "V": Input("B N F", weighs="N")},
        small=LATENT_SMALL,
        large=LATENT_LARGE,
        long=LATENT_LONG,
        heads=(),
    ),
    attending(
        "latent_shared",
        """cascade latent(Q[B,H,M,F], Qr[B,H,M,E], K[B,N,F], Kr[B,N,E]) -> O[B,H,M,F] {
    S[b,h,m,n] = ((sum[f] Q[b,h,m,f] * K[b,n,f]) + (sum[e] Qr[b,h,m,e] * Kr[b,n,e])) / sqrt(E + F)
    P[b,h,m,n] = softmax[n] S[b,h,m,n]
    O[b,h,m,f] = sum[n] P[b,h,m,n] * K[b,n,f]
}""",
        inputs={
            "Q": Input("B H M F", partner=True), "Qr": Input("B H M E", partner=True),
            "K": Input("B N F", drives="N", weighs="N"), "Kr": Input("B N E", drives="N"),
        },
        small=dict(LATENT_SMALL, E=3),
        large=tuple(dict(sizes, E=64) for sizes in LATENT_LARGE),
        long=dict(LATENT_LONG, E=64),
        heads=(),
    ),
    attending(
        "latent_slice",
        """cascade latent(Q[B,H,M,E], K[B,N,E]) -> O[B,H,M,F] {
    S[b,h,m,n] = Q[b,h,m,e] * K[b,n,e] / sqrt(E)
    P[b,h,m,n] = softmax[n] S[b,h,m,n]
    O[b,h,m,f] = sum[n] P[b,h,m,n] * K[b,n,f+0]
}""",
        inputs={"Q": Input("B H M E", partner=True), "K": Input("B N E", drives="N", weighs="N")},
        small=LATENT_SMALL,
        large=LATENT_LARGE,
        long=LATENT_LONG,
        heads=(),
        extra=("F",),
    ),
    attending(
        "differential",
        """cascade differential(Q[B,H,M,E], K[B,H,N,E], Q2[B,H,M,E], K2[B,H,N,E], V[B,H,N,F], w[H]) -> O[B,H,M,F] {
    S[b,h,m,n] = Q[b,h,m,e] * K[b,h,n,e] / sqrt(E) where n <= m
    T[b,h,m,n] = Q2[b,h,m,e] * K2[b,h,n,e] / sqrt(E) where n <= m
    P[b,h,m,n] = (softmax[n] S[b,h,m,n]) - w[h] * (softmax[n] T[b,h,m,n])
    O[b,h,m,f] = sum[n] P[b,h,m,n] * V[b,h,n,f]
}""",
        inputs={"Q": QUERY, "K": KEY, "Q2": QUERY, "K2": KEY, "V": VALUE, "w": Input("H", make=slopes)},
        lengths=("M", "N"),
    ),
    attending(
        "sigmoid",
        """cascade attention(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F], bias[]) -> O[B,H,M,F] {
    P[b,h,m,n] = sigmoid((sum[e] Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E) + bias) where n <= m
    O[b,h,m,f] = sum[n] P[b,h,m,n] * V[b,h,n,f]
}""",
        {"bias": Input("", make=number(-2.0))},
        lengths=("M", "N"),
        padding=behind_the_queries,
    ),
    attending(
        "with_scores",
        attention("n < m", results=", S[B,H,M,N] fill -inf"),
        small={"B": 1, "H": 2, "M": 40, "N": 80, "E": 8, "F": 8},
        long=None,
        tail=2,
        lengths=("M", "N"),
    ),
    attending(
        "shared_prefix",
        """cascade shared_prefix(Q[B,H,E], C[H,L,E], W[H,L,F], K[B,H,N,E], V[B,H,N,F]) -> O[B,H,F] {
    T[b,h,l] = Q[b,h,e] * C[h,l,e] / sqrt(E)
    S[b,h,n] = Q[b,h,e] * K[b,h,n,e] / sqrt(E)
    R[b,h]   = max(max[l] T[b,h,l], max[n] S[b,h,n])
    D[b,h]   = sum[l] exp(T[b,h,l] - R[b,h]) + sum[n] exp(S[b,h,n] - R[b,h])
    O[b,h,f] = (sum[l] exp(T[b,h,l] - R[b,h]) * W[h,l,f] + sum[n] exp(S[b,h,n] - R[b,h]) * V[b,h,n,f]) / D[b,h]
}""",
        {
            "Q": Input("B H E", partner=True), "C": Input("H L E", drives="L"), "W": Input("H L F", weighs="L"),
        },
        small={"B": 5, "H": 2, "L": 21, "N": 13, "E": 5, "F": 6},
        large=(
            {"B": 16, "H": 4, "L": 300, "N": 77, "E": 64, "F": 64},
            {"B": 64, "H": 8, "L": 4096, "N": 512, "E": 128, "F": 128},
        ),
        long={"B": 4, "H": 2, "L": 131_072, "N": 100, "E": 64, "F": 64},
    ),
    attending(
        "with_logsumexp",
        attention("n < m", results=", L[B,H,M] fill -inf", more="\n    L[b,h,m] = R[b,h,m] + log(D[b,h,m])"),
        tail=2,
        lengths=("M", "N"),
        padding=behind_the_queries,
    ),
    attending(
        "with_entropy",
        attention(
            "n < m", results=", A[B,H,M] fill -inf",
            more="\n    A[b,h,m] = sum[n] P[b,h,m,n] / D[b,h,m] * (log(D[b,h,m]) - (S[b,h,m,n] - R[b,h,m]))",
        ),
        tail=2,
        lengths=("M", "N"),
        padding=behind_the_queries,
    ),
)  # fmt: skip


# --- rows ------------------------------------------------------------------------------------------------------------

ROW = Input("M N", drives="N", weighs="N")
ROWS_SMALL: Sizes = {"M": 5, "N": 37}
ROWS_LARGE: tuple[Sizes, ...] = ({"M": 301, "N": 1000}, {"M": 64, "N": 8191}, {"M": 4096, "N": 128})
ROWS_LONG: Sizes = {"M": 8, "N": 131_072}


def rowwise(name: str, text: str, more: Mapping[str, Input] | None = None, **options: object) -> Program:
    """A program over the rows of X[M,N], with common sizes, some of them replaced."""
    fields: dict[str, object] = {
        "inputs": {"X": ROW, **(more or {})},
        "small": ROWS_SMALL,
        "large": ROWS_LARGE,
        "long": ROWS_LONG,
        "lengths": ("N",),
        "batch": "M",
        "rows": "M",
        "reach": 8.0,
        "level": 1000.0,
    }
    return Program(name=name, text=text, **{**fields, **options})  # type: ignore[arg-type]


GAIN = Input("N", centre=1.0, spread=0.3)
ROUTED = Input("M N", drives="N", grid=1 / 256)  # no two logits so close that their exponentials in f32 coincide

ROWS: tuple[Program, ...] = (
    rowwise("softmax", "cascade c(X[M,N]) -> Y[M,N] {\n Y[m,n] = softmax[n] X[m,n]\n}"),
    rowwise("logsumexp", "cascade c(X[M,N]) -> L[M] fill -inf {\n L[m] = logsumexp[n] X[m,n]\n}"),
    rowwise(
        "layernorm",
        "cascade c(X[M,N], g[N], b[N]) -> Y[M,N] {\n Y[m,n] = layernorm[n](X[m,n], g[n], b[n])\n}",
        {"g": GAIN, "b": Input("N")},
    ),
    rowwise("rmsnorm", "cascade c(X[M,N], g[N]) -> Y[M,N] {\n Y[m,n] = rmsnorm[n](X[m,n], g[n])\n}", {"g": GAIN}),
    rowwise(
        "residual_norm",
        "cascade c(X[M,N], U[M,N], g[N]) -> Z[M,N], Y[M,N] {\n"
        " Z[m,n] = X[m,n] + U[m,n]\n Y[m,n] = rmsnorm[n](Z[m,n], g[n])\n}",
        {"U": Input("M N"), "g": GAIN},
    ),
    rowwise(
        "variance",
        "cascade c(X[M,N]) -> A[M], W[M] {\n"
        " A[m] = mean[n] X[m,n]\n W[m] = mean[n] (X[m,n] - A[m]) * (X[m,n] - A[m])\n}",
        level=100.0,
    ),
    rowwise(
        "entropy",
        """cascade c(X[M,N]) -> A[M] {
    R[m] = max[n] X[m,n]
    D[m] = sum[n] exp(X[m,n] - R[m])
    A[m] = sum[n] exp(X[m,n] - R[m]) / D[m] * (log(D[m]) - (X[m,n] - R[m]))
}""",
    ),
    rowwise(
        "kl",
        """cascade c(X[M,N], U[M,N]) -> A[M] {
    P[m,n] = logsoftmax[n] X[m,n]
    W[m,n] = logsoftmax[n] U[m,n]
    A[m]   = sum[n] exp(P[m,n]) * (P[m,n] - W[m,n])
}""",
        {"U": Input("M N")},
    ),
    rowwise(
        "topk_routing",
        """cascade c(X[M,N]) -> Y[M,8], I[M,8] {
    G[m,j], I[m,j] = topk[n, 8] softmax[n] X[m,n]
    Y[m,j] = G[m,j] / sum[j] G[m,j]
}""",
        inputs={"X": ROUTED},
        large=({"M": 301, "N": 64}, {"M": 4096, "N": 128}, {"M": 64, "N": 1000}),
        long=None,
        complete=lambda sizes: {**sizes, "N": max(8, sizes["N"])},
        without=frozenset({"spike", "nan"}),  # equal exponentials, and which of NaN is largest, are no matter of kernels
    ),
    rowwise(
        "cross_entropy",
        "cascade c(X[M,N], y: i64[M]) -> P[M] {\n P[m] = (logsumexp[n] X[m,n]) - X[m,y[m]]\n}",
        {"y": Input("M", make=labels)},
    ),
    rowwise(
        "mean_cross_entropy",
        "cascade c(X[M,N], y: i64[M]) -> L[] {\n"
        " P[m] = (logsumexp[n] X[m,n]) - X[m,y[m]]\n L = mean[m] P[m]\n}",
        {"y": Input("M", make=labels)},
        batch="",
        rows="",
    ),
    rowwise(
        "cumulative_sum_by_filter",
        "cascade c(X[M,N]) -> C[M,N] {\n C[m,n] = sum[s] X[m,s] where s <= n\n}",
        reach=1.0,
        level=3.0,
        exact=True,
        large=({"M": 301, "N": 100}, {"M": 64, "N": 1000}),
        long=None,
    ),
    rowwise(
        "masked_softmax",
        "cascade c(X[M,N], start: i32[M], stop: i32[M]) -> Y[M,N] {\n"
        " S[m,n] = X[m,n] where n >= start[m] and n < stop[m]\n Y[m,n] = softmax[n] S[m,n]\n}",
        {"start": Input("M", make=starts), "stop": Input("M", make=stops)},
        padding=outside_the_stretch,
    ),
    rowwise(
        "masked_logsumexp",
        "cascade c(X[M,N], start: i32[M], stop: i32[M]) -> L[M] fill -inf {\n"
        " L[m] = logsumexp[n] X[m,n] where n >= start[m] and n < stop[m]\n}",
        {"start": Input("M", make=starts), "stop": Input("M", make=stops)},
        padding=outside_the_stretch,
    ),
    rowwise(
        "triangle_logsumexp",
        "cascade c(X[M,N]) -> L[M] fill -inf {\n L[m] = logsumexp[n] X[m,n] where n < m\n}",
        padding=above_the_diagonal,
        small={"M": 41, "N": 37},
        large=({"M": 1001, "N": 1000}, {"M": 300, "N": 8191}),
        long=None,
        rows="",
    ),
    rowwise(
        "a_part_and_the_whole",
        "cascade c(X[M,N]) -> C[M,N], R[M], Q[M] {\n"
        " C[m,n] = sigmoid(X[m,n])\n R[m] = sum[n] C[m,n] where n >= 3\n Q[m] = sum[n] C[m,n]\n}",
    ),
    rowwise(
        "rows_by_their_largest",
        "cascade c(X[M,N]) -> Y[M,N] {\n A[m] = max[n] abs(X[m,n])\n Y[m,n] = X[m,n] / A[m]\n}",
    ),
    rowwise("embedding", "cascade c(ids: i64[T], X[N,D]) -> Y[T,D] {\n Y[t,d] = X[ids[t],d]\n}",
        inputs={"ids": Input("T", make=tokens), "X": Input("N D")}, small={"T": 7, "N": 5, "D": 6},
        large=({"T": 1000, "N": 3001, "D": 257},), long={"T": 1000, "N": 131_072, "D": 65}, lengths=("T", "D"), batch="T", rows="", exact=True),
)  # fmt: skip


# --- reductions ------------------------------------------------------------------------------------------------------

REDUCTIONS: tuple[Program, ...] = (
    rowwise("row_sum", "cascade c(X[M,N]) -> Y[M] {\n Y[m] = sum[n] X[m,n]\n}", reach=1.0, level=3.0, exact=True),
    rowwise("column_max", "cascade c(X[M,N]) -> Y[N] {\n Y[n] = max[m] X[m,n]\n}", exact=True, rows="",
        lengths=("M",), inputs={"X": Input("M N", drives="M", weighs="M")}, batch="N", long={"M": 131_072, "N": 8}),
    rowwise("total", "cascade c(X[M,N]) -> Y[] {\n Y = sum[m,n] X[m,n]\n}", reach=1.0, level=3.0, exact=True, batch="",
        rows=""),
    rowwise(
        "extremes",
        "cascade c(X[M,N]) -> A[M], Z[M] {\n A[m] = max[n] X[m,n]\n Z[m] = min[n] X[m,n] where n > 2\n}",
        exact=True,
    ),
    rowwise(
        "arg_extremes",
        "cascade c(X[M,N]) -> I[M], J[M] {\n I[m] = argmax[n] X[m,n]\n J[m] = argmin[n] X[m,n] where n > 2\n}",
    ),
    rowwise(
        "truths",
        "cascade c(X[M,N]) -> A[M], Z[M] {\n A[m] = all[n] (X[m,n] > -2)\n Z[m] = any[n] (X[m,n] > 2)\n}",
    ),
    rowwise("counts", "cascade c(X[M,N]) -> C[M] {\n C[m] = count[n] X[m,n] where X[m,n] > 0\n}"),
    rowwise(
        "products", "cascade c(X[M,N]) -> P[M] {\n P[m] = prod[n] X[m,n]\n}",
        inputs={"X": Input("M N", centre=1.0, spread=0.03)}, long=None,
    ),
    rowwise("shifted", "cascade c(X[M,N]) -> Z[M,N] {\n Z[m,n] = (X[m,n+1] ?? 7.0) + clamp(X[m,n], -1, 1)\n}", exact=True),
)  # fmt: skip


# --- products --------------------------------------------------------------------------------------------------------

LEFT = Input("M K", partner=True)
RIGHT = Input("K N", drives="K", weighs="K")
GEMM_SMALL: Sizes = {"M": 9, "N": 11, "K": 21}
GEMM_LARGE: tuple[Sizes, ...] = (
    {"M": 300, "N": 257, "K": 333},
    {"M": 1024, "N": 1024, "K": 1024},
    {"M": 17, "N": 4099, "K": 8191},
)
GEMM_LONG: Sizes = {"M": 16, "N": 64, "K": 131_072}


def multiplying(name: str, text: str, more: Mapping[str, Input] | None = None, **options: object) -> Program:
    """A program around A[M,K] B[K,N], with common sizes, some of them replaced."""
    fields: dict[str, object] = {
        "inputs": {"A": LEFT, "B": RIGHT, **(more or {})},
        "small": GEMM_SMALL,
        "large": GEMM_LARGE,
        "long": GEMM_LONG,
        "lengths": ("K",),
        "batch": "M",
        "exact": True,
        "reach": 1.0,
        "level": 3.0,
    }
    return Program(name=name, text=text, **{**fields, **options})  # type: ignore[arg-type]


PRODUCTS: tuple[Program, ...] = (
    multiplying("gemm", "cascade c(A[M,K], B[K,N]) -> C[M,N] {\n C[m,n] = A[m,k] * B[k,n]\n}"),
    multiplying(
        "batched_gemm", "cascade c(A[T,M,K], B[T,K,N]) -> C[T,M,N] {\n C[t,m,n] = A[t,m,k] * B[t,k,n]\n}",
        inputs={"A": Input("T M K", partner=True), "B": Input("T K N", drives="K", weighs="K")},
        small=dict(GEMM_SMALL, T=2), large=({"T": 5, "M": 130, "N": 65, "K": 333},), long=None, batch="T",
    ),
    multiplying(
        "gemm_bias_gelu",
        "cascade c(A[M,K], B[K,N], b[N]) -> C[M,N] {\n C[m,n] = gelu((sum[k] A[m,k] * B[k,n]) + b[n])\n}",
        {"b": Input("N")},
        exact=False,
    ),
    multiplying(
        "gemm_prologue", "cascade c(A[M,K], B[K,N]) -> C[M,N] {\n C[m,n] = sum[k] silu(A[m,k]) * B[k,n]\n}", exact=False
    ),
    multiplying(
        "gemm_transposed", "cascade c(A[K,M], B[N,K]) -> C[M,N] {\n C[m,n] = A[k,m] * B[n,k]\n}",
        inputs={"A": Input("K M", partner=True), "B": Input("N K", drives="K", weighs="K")},
    ),
    multiplying("matrix_vector", "cascade c(A[M,K], B[K]) -> C[M] {\n C[m] = A[m,k] * B[k]\n}",
        {"B": Input("K", drives="K", weighs="K")}, small={"M": 9, "K": 21},
        large=({"M": 1001, "K": 8191},), long={"M": 8, "K": 131_072}),
    multiplying("outer_product", "cascade c(A[M], B[N]) -> C[M,N] {\n C[m,n] = A[m] * B[n]\n}",
        inputs={"A": Input("M", partner=True), "B": Input("N", drives="N", weighs="N")}, small={"M": 9, "N": 11},
        large=({"M": 1001, "N": 333},), long={"M": 3, "N": 131_072}, lengths=("N",)),
    multiplying(
        "norm_gemm",
        """cascade c(A[M,K], g[K], B[K,N]) -> C[M,N] {
    Z[m,k] = rmsnorm[k](A[m,k], g[k])
    C[m,n] = Z[m,k] * B[k,n]
}""",
        inputs={"A": Input("M K", weighs="K"), "g": Input("K", centre=1.0, spread=0.3), "B": Input("K N")},
        exact=False,
    ),
    multiplying(
        "gated",
        "cascade c(A[M,K], B[K,N], G[K,N]) -> C[M,N] {\n"
        " C[m,n] = silu(sum[k] A[m,k] * B[k,n]) * (sum[k] A[m,k] * G[k,n])\n}",
        {"G": Input("K N")},
        exact=False,
    ),
    multiplying(
        "heads_together", "cascade c(U[B,H,M,E], W[H,E,N]) -> Z[B,M,N] {\n Z[b,m,n] = U[b,h,m,e] * W[h,e,n]\n}",
        inputs={"U": Input("B H M E", partner=True), "W": Input("H E N", drives="E", weighs="E")},
        small={"B": 2, "H": 3, "M": 9, "E": 5, "N": 6},
        large=({"B": 3, "H": 8, "M": 130, "E": 64, "N": 77}, {"B": 1, "H": 12, "M": 300, "E": 33, "N": 256}),
        long={"B": 1, "H": 4, "M": 8, "E": 32_768, "N": 32}, lengths=("E",), batch="B",
    ),
    multiplying(
        "low_rank", "cascade c(A[M,K], B[K,R], U[R,N]) -> C[M,N] {\n C[m,n] = A[m,k] * B[k,r] * U[r,n]\n}",
        inputs={"A": LEFT, "B": Input("K R", drives="K", weighs="K"), "U": Input("R N", spread=0.25)},
        small={"M": 9, "K": 21, "R": 4, "N": 11},
        large=({"M": 300, "K": 333, "R": 16, "N": 257}, {"M": 256, "K": 512, "R": 33, "N": 256}),
        long={"M": 8, "K": 131_072, "R": 8, "N": 32}, exact=False,
    ),
    multiplying(
        "bilinear", "cascade c(X[M,K], W[N,K,L], Y[M,L]) -> C[M,N] {\n C[m,n] = X[m,k] * W[n,k,l] * Y[m,l]\n}",
        inputs={"X": LEFT, "W": Input("N K L", drives="K", weighs="K", spread=0.5), "Y": Input("M L", spread=0.5)},
        small={"M": 9, "K": 5, "L": 7, "N": 6},
        large=({"M": 130, "K": 65, "L": 48, "N": 77}, {"M": 256, "K": 32, "L": 256, "N": 128}),
        long=None, lengths=("L",), exact=False,
    ),
    multiplying(
        "bilinear_form", "cascade c(X[M,K], W[K,L], Y[M,L]) -> C[M] {\n C[m] = X[m,k] * W[k,l] * Y[m,l]\n}",
        inputs={"X": LEFT, "W": Input("K L", drives="K", weighs="K", spread=0.5), "Y": Input("M L", spread=0.5)},
        small={"M": 9, "K": 5, "L": 7}, large=({"M": 300, "K": 257, "L": 333}, {"M": 1024, "K": 128, "L": 256}),
        long=None, lengths=("L",), exact=False,
    ),
    multiplying(
        "convolution", "cascade c(X[B,S,C], W[K,C,D]) -> Y[B,S,D] {\n Y[b,t,d] = X[b,t+w,c] * W[w,c,d]\n}",
        inputs={"X": Input("B S C", partner=True), "W": Input("K C D", drives="C", weighs="C")},
        small={"B": 2, "S": 8, "C": 3, "K": 3, "D": 4}, large=({"B": 2, "S": 300, "C": 33, "K": 5, "D": 65},),
        long={"B": 1, "S": 131_072, "C": 4, "K": 3, "D": 8}, lengths=("S",), batch="B",
    ),
    multiplying(
        "strided_convolution",
        "cascade c(X[B,S,C], W[K,C,D]) -> Y[B,T,D] {\n Y[b,t,d] = X[b,2*t+w-1,c] * W[w,c,d]\n}",
        inputs={"X": Input("B S C", partner=True), "W": Input("K C D", drives="C", weighs="C")},
        small={"B": 2, "S": 8, "C": 3, "K": 3, "D": 4, "T": 4},
        large=({"B": 2, "S": 301, "C": 33, "K": 4, "D": 65},),
        long={"B": 1, "S": 131_072, "C": 4, "K": 3, "D": 8}, lengths=("S",), batch="B", extra=("T",),
        complete=lambda sizes: {**sizes, "T": (sizes["S"] + 1) // 2},
    ),
)  # fmt: skip

# --- recurrences -----------------------------------------------------------------------------------------------------

STEPS_LARGE: tuple[Sizes, ...] = ({"M": 301, "N": 100}, {"M": 64, "N": 1000}, {"M": 3, "N": 20_001})


def stepping(name: str, text: str, more: Mapping[str, Input] | None = None, **options: object) -> Program:
    """A recurrence along the rows of X[M,N]: the reference takes a step at a time, so rows are shorter."""
    fields: dict[str, object] = {"reach": 1.0, "level": 3.0, "large": STEPS_LARGE, "long": None}
    return rowwise(name, text, more, **{**fields, **options})


def behind_the_sequence(inputs: Tensors, sizes: Sizes) -> Tensors:
    """Positions behind the length of their sequence."""
    dead = torch.arange(sizes["N"]) >= inputs["len"].cpu()[:, None]
    return {"X": dead[:, :, None], "G": dead[:, :, None]}


RECURRENCES: tuple[Program, ...] = (
    stepping(
        "cumulative_sum",
        "cascade c(X[M,N]) -> C[M,N] {\n C[m,n] = C[m,n-1] + X[m,n]  init C[m,-1] = 0\n}",
        exact=True,
    ),
    stepping(
        "cumulative_maximum",
        "cascade c(X[M,N]) -> C[M,N] {\n C[m,n] = max(C[m,n-1], X[m,n])  init C[m,-1] = -inf\n}",
        exact=True,
    ),
    stepping(
        "decayed_state",
        "cascade c(X[M,N], G[M,N]) -> H[M,N] {\n H[m,n] = sigmoid(G[m,n]) * H[m,n-1] + X[m,n]  init H[m,-1] = 0\n}",
        {"G": Input("M N")},
    ),
    stepping(
        "moving_average",
        "cascade c(X[M,N], a[], h[M]) -> H[M,N] {\n"
        " H[m,n] = H[m,n-1] + a * (X[m,n] - H[m,n-1])  init H[m,-1] = h[m]\n}",
        {"a": Input("", make=number(0.1)), "h": Input("M")},
    ),
    stepping(
        "scan_between_maps",
        "cascade c(X[M,N]) -> C[M,N], Y[M,N], T[M], E[M] {\n"
        " V[m,n] = sigmoid(X[m,n])\n C[m,n] = C[m,n-1] + V[m,n]  init C[m,-1] = 1\n"
        " Y[m,n] = log(C[m,n]) * X[m,n]\n T[m] = sum[n] Y[m,n] where n >= 3\n E[m] = 1 / C[m,N-1]\n}",
    ),
    stepping(
        "scan_by_its_largest",
        "cascade c(X[M,N]) -> Y[M,N] {\n C[m,n] = C[m,n-1] / 2 + X[m,n]  init C[m,-1] = 0\n"
        " A[m] = max[n] abs(C[m,n])\n Y[m,n] = C[m,n] / A[m]\n}",
    ),
    stepping(
        "scan_that_starts_anew",
        "cascade c(X[M,N]) -> C[M,N] {\n C[m,n] = select(X[m,n] > 1, 0, C[m,n-1]) + X[m,n]  init C[m,-1] = 0\n}",
    ),
    stepping(
        "steps_that_do_not_compose",
        "cascade c(X[M,N], G[M,N]) -> H[M,N] {\n H[m,n] = tanh(G[m,n] * H[m,n-1] + X[m,n])  init H[m,-1] = 0\n}",
        {"G": Input("M N")},
    ),
    stepping(
        "averages_by_their_size",
        "cascade c(X[M,N], g[M]) -> Y[M,N] {\n E[m,n] = 0.75 * E[m,n-1] + X[m,n] / 4  init E[m,-1] = 0\n"
        " Y[m,n] = E[m,n] * rsqrt((mean[m] E[m,n] * E[m,n]) + 1e-5) * g[m]\n}",
        {"g": Input("M")},
    ),
    Program(
        "selective_scan",
        "cascade c(X[B,N,D], G[B,N,D], A[D,S], U[B,N,S], R[B,N,S]) -> Y[B,N,D] {\n"
        " H[b,n,d,s] = sigmoid(G[b,n,d] * A[d,s]) * H[b,n-1,d,s] + U[b,n,s] * X[b,n,d]  init H[b,-1,d,s] = 0\n"
        " Y[b,n,d] = H[b,n,d,s] * R[b,n,s]\n}",
        {"X": Input("B N D", drives="N", weighs="N"), "G": Input("B N D"), "A": Input("D S"), "U": Input("B N S"),
         "R": Input("B N S")},
        small={"B": 2, "N": 11, "D": 5, "S": 4},
        large=({"B": 2, "N": 333, "D": 65, "S": 16}, {"B": 1, "N": 500, "D": 128, "S": 16}),
        lengths=("N",),
        batch="B",
        rows="B",
        reach=1.0,
        level=3.0,
    ),
    Program(
        "states_by_length",
        "cascade c(X[B,N,D], G[B,N,D], len: i32[B], h[B,D]) -> H[B,N,D], S[B,D] {\n"
        " H[b,n,d] = sigmoid(G[b,n,d]) * H[b,n-1,d] + X[b,n,d]  where n < len[b]  init H[b,-1,d] = h[b,d]\n"
        " S[b,d] = sum[n] H[b,n,d]\n}",
        {"X": Input("B N D", drives="N", weighs="N"), "G": Input("B N D"), "len": Input("B", make=lengths),
         "h": Input("B D")},
        small={"B": 3, "N": 19, "D": 5},
        large=({"B": 5, "N": 333, "D": 65}, {"B": 4, "N": 1000, "D": 128}),
        lengths=("N",),
        batch="B",
        rows="B",
        padding=behind_the_sequence,
        reach=1.0,
        level=3.0,
    ),
)  # fmt: skip

PROGRAMS: dict[str, Program] = {p.name: p for p in (*ATTENTION, *ROWS, *REDUCTIONS, *PRODUCTS, *RECURRENCES)}
