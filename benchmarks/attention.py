"""Attention forward: the shapes that everybody reports, the variants of FlexAttention, the decoding of one token."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import programs
from benchmarks.ours import build
from benchmarks.peers import Mask, Score, flex, four, sdpa
from benchmarks.workload import Bar, Inputs, Peer, Workload, normal

CHECKED_ROWS = 32  # queries at the beginning, in the middle and at the end
CAP = 30.0
PADDED_BATCHES = 4


@dataclass(frozen=True)
class Shape:
    """Batches, query heads, key heads, length and width of a head."""

    batches: int
    heads: int
    shared: int
    length: int
    width: int

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.heads // self.shared

    @property
    def text(self) -> str:
        """The shape as a table names it: batch, heads, length, width."""
        heads = f"{self.heads}/{self.shared}" if self.group > 1 else f"{self.heads}"
        return f"{self.batches} {heads} {self.length} {self.width}"

    def small(self) -> Shape:
        """A shape of the same kind that the interpreter runs at once."""
        group = min(self.group, 4)
        return dataclasses.replace(self, batches=min(self.batches, 2), heads=2 * group, shared=2, length=48, width=16)


@dataclass(frozen=True)
class Variant:
    """Attention with a mask or another score: in the notation, and as functions of torch tensors."""

    name: str
    where: str = ""
    score: str = "{s}"
    params: str = ""
    mask: Callable[[Inputs], Mask] | None = None
    modify: Callable[[Inputs], Score] | None = None
    more: Callable[[Shape, torch.device], Inputs] = lambda shape, device: {}
    live: Callable[[int], float] = lambda length: float(length * length)  # pairs of a query and a key, of one head
    factor: float = 1.25  # how many times as fast as FlexAttention ours has to be
    batched: bool = False

    @property
    def causal(self) -> bool | None:
        """What `is_causal` has to be to say the same; None where it cannot."""
        return {"noop": False, "causal": True}.get(self.name)


def causal_pairs(length: int) -> float:
    """Pairs of a query and a key that is not after it."""
    return length * (length + 1) / 2


def causal_mask(inputs: Inputs) -> Mask:
    """No key after the query."""
    return lambda b, h, m, n: n <= m


NOOP = Variant("noop", factor=1.15)
CAUSAL = Variant("causal", "n <= m", mask=causal_mask, live=causal_pairs)


def relative(block: int) -> Variant:
    """A learned bias for each distance, and keys of the query's own block only: attention that no library has."""

    def score(inputs: Inputs) -> Score:
        table = inputs["T"]
        return lambda s, b, h, m, n: s + table[h, (m - n + block - 1).clamp(0, 2 * block - 2)]

    def table(shape: Shape, device: torch.device) -> Inputs:
        seeded = torch.Generator().manual_seed(1)
        return {"T": torch.randn(shape.heads, 2 * block - 1, generator=seeded).to(device)}

    return Variant(
        f"relative, blocks of {block}",
        f"m // {block} == n // {block}", f"{{s}} + T[h,m-n+{block - 1}]", ", T: f32[H,R]",
        lambda inputs: lambda b, h, m, n: m // block == n // block, score, table, lambda length: float(length * block),
    )  # fmt: skip


def padded_lengths(length: int, batches: int) -> list[int]:
    """How many keys of each batch are no padding: all, an eighth fewer, two eighths fewer, ..."""
    return [length - batch % 8 * (length // 8) for batch in range(batches)]


def padded() -> Variant:
    """Causal attention over sequences of several lengths, with a mask of the keys that are no padding."""

    def keys(shape: Shape, device: torch.device) -> Inputs:
        lengths = torch.tensor(padded_lengths(shape.length, shape.batches), device=device)
        return {"keep": torch.arange(shape.length, device=device)[None, :] < lengths[:, None]}

    def mask(inputs: Inputs) -> Mask:
        keep = inputs["keep"]
        return lambda b, h, m, n: (n <= m) & keep[b, n]

    def pairs(length: int) -> float:
        lengths = padded_lengths(length, PADDED_BATCHES)
        return sum(causal_pairs(keys) + keys * (length - keys) for keys in lengths) / len(lengths)

    return Variant(
        "padded", "n <= m and keep[b,n]", params=", keep: bool[B,N]", mask=mask, more=keys, live=pairs, batched=True
    )


def variants(tiny: bool) -> tuple[Variant, ...]:
    """FlexAttention's variants, with windows and documents that suit the lengths."""
    window, prefix, document = (16, 16, 11) if tiny else (1024, 2048, 1100)

    def documents(shape: Shape, device: torch.device) -> Inputs:
        rows = [document_of(shape.length, document, batch) for batch in range(shape.batches)]
        return {"doc": torch.tensor(rows, dtype=torch.int32, device=device)}

    def document_pairs(length: int) -> float:
        counts = document_of(length, document, 0)
        return float(sum(counts.count(number) ** 2 for number in set(counts)))

    return (
        NOOP,
        CAUSAL,
        Variant(
            "alibi", "n <= m", "{s} - slope[h] * (m - n)", ", slope: f32[H]", causal_mask, alibi_score,
            more=slopes, live=causal_pairs,
        ),
        Variant(
            f"window {window}", f"n <= m and m - n < {window}",
            mask=lambda inputs: lambda b, h, m, n: (n <= m) & (m - n < window),
            live=lambda length: float(sum(min(m + 1, window) for m in range(length))),
        ),
        Variant(
            f"document {document}", "doc[b,m] == doc[b,n]", params=", doc: i32[B,M]", mask=document_mask,
            more=documents, live=document_pairs, batched=True,
        ),
        Variant("softcap", score=f"{CAP} * tanh({{s}} / {CAP})", modify=softcap_score, factor=1.8),
        Variant(
            f"prefix {prefix}", f"n <= m or n < {prefix}",
            mask=lambda inputs: lambda b, h, m, n: (n <= m) | (n < prefix),
            live=lambda length: float(sum(max(m + 1, min(prefix, length)) for m in range(length))),
        ),
    )  # fmt: skip


def document_of(length: int, mean: int, seed: int) -> list[int]:
    """For every position the number of its document; lengths vary by half of the mean to either side."""
    drawn, found = random.Random(seed), list[int]()
    while len(found) < length:
        found += [found[-1] + 1 if found else 0] * drawn.randint(mean // 2, mean + mean // 2)
    return found[:length]


def document_mask(inputs: Inputs) -> Mask:
    """Keys of the query's own document."""
    doc = inputs["doc"]
    return lambda b, h, m, n: doc[b, m] == doc[b, n]


def slopes(shape: Shape, device: torch.device) -> Inputs:
    """The slopes of ALiBi, a geometric sequence over the heads."""
    return {"slope": 2.0 ** (-8.0 * torch.arange(1, shape.heads + 1, device=device) / shape.heads)}


def alibi_score(inputs: Inputs) -> Score:
    """The farther the key, the lower the score."""
    slope = inputs["slope"]
    return lambda s, b, h, m, n: s - slope[h] * (m - n)


def softcap_score(inputs: Inputs) -> Score:
    """The score, bounded smoothly."""
    return lambda s, b, h, m, n: CAP * torch.tanh(s / CAP)


def checked(length: int, device: torch.device) -> Tensor:
    """The queries that are checked: some at the beginning, in the middle and at the end."""
    middle = max(0, length // 2 - CHECKED_ROWS // 2 - 3)
    starts = (0, middle, max(0, length - CHECKED_ROWS))
    chosen = {m for start in starts for m in range(start, min(length, start + CHECKED_ROWS))}
    return torch.tensor(sorted(chosen), device=device)


def expected(variant: Variant, inputs: Inputs) -> Tensor:
    """The first and the last head of the results for the checked queries, in float64."""
    q, k, v = four(inputs["Q"]), inputs["K"], inputs["V"]
    found = []
    for batch, head in ((0, 0), (q.shape[0] - 1, q.shape[1] - 1)):
        m = checked(q.shape[2], q.device)[:, None]
        n = torch.arange(k.shape[2], device=q.device)[None, :]
        key = head // (q.shape[1] // k.shape[1])
        scores = q[batch, head, m[:, 0]].double() @ k[batch, key].double().mT / math.sqrt(q.shape[-1])
        b, h = torch.tensor(batch, device=q.device), torch.tensor(head, device=q.device)
        if variant.modify:
            scores = variant.modify(inputs)(scores, b, h, m, n)
        if variant.mask:
            scores = scores.masked_fill(~variant.mask(inputs)(b, h, m, n), -math.inf)
        found.append(torch.softmax(scores, -1) @ v[batch, key].double())
    return torch.cat(found)


def found(out: Tensor, inputs: Inputs) -> Tensor:
    """The same slice of what was computed."""
    out = four(out)
    rows = checked(out.shape[2], out.device)
    return torch.cat([out[0, 0, rows], out[-1, -1, rows]])


def workload(
    name: str, shape: Shape, variant: Variant, peers: dict[str, Peer], bars: tuple[Bar, ...], device: torch.device
) -> Workload:
    """Attention of this shape and variant."""

    def inputs(generator: torch.Generator) -> Inputs:
        keys = (shape.batches, shape.shared, shape.length, shape.width)
        q = normal(generator, shape.batches, shape.heads, shape.length, shape.width)
        return {"Q": q, "K": normal(generator, *keys), "V": normal(generator, *keys), **variant.more(shape, device)}

    square = "B,M" in variant.params
    text = programs.attention(shape.group, variant.score, variant.where, variant.params, square)
    flops = 4.0 * shape.batches * shape.heads * shape.width * variant.live(shape.length)
    return Workload(name, text, inputs, lambda given: expected(variant, given), found, peers, bars, flops=flops)


def beside(variant: Variant, device: torch.device, names: tuple[str, ...]) -> dict[str, Peer]:
    """The peers of these names that can compute the variant."""
    found: dict[str, Peer] = {"flex": flex(device, variant.mask, variant.modify, variant.batched)}
    if variant.causal is not None:
        found["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION, variant.causal)
        found["flash"] = sdpa(SDPBackend.FLASH_ATTENTION, variant.causal)
    return {name: found[name] for name in names if name in found}


def forward(device: torch.device, options: Any) -> Iterator[Workload]:
    """The table `attention`."""
    for variant, shape, bars in (
        (NOOP, Shape(4, 32, 32, 4096, 128), (Bar(1.15, peer="flex"), Bar(1.0, peer="cudnn", goal=True))),
        (CAUSAL, Shape(4, 32, 32, 4096, 128), (Bar(1.25, peer="flex"), Bar(0.95, peer="cudnn", goal=True))),
        (NOOP, Shape(4, 32, 32, 4096, 64), (Bar(1.15, peer="flex"),)),
        (CAUSAL, Shape(4, 32, 32, 4096, 64), (Bar(1.2, peer="flex"), Bar(1.0, peer="cudnn"))),
        (CAUSAL, Shape(2, 32, 8, 8192, 128), (Bar(1.25, peer="flex"),)),
        (relative(16), Shape(4, 16, 16, 8192, 128), (Bar(1.25, peer="flex"),)),
        (padded(), Shape(PADDED_BATCHES, 16, 16, 8192, 128), (Bar(1.25, peer="flex"),)),
        (padded(), Shape(PADDED_BATCHES, 16, 16, 8192, 64), (Bar(1.25, peer="flex"),)),
    ):
        name = f"{'full' if variant is NOOP else variant.name} {shape.text}"
        peers = beside(variant, device, ("flex", "cudnn", "flash"))
        yield workload(name, shape.small() if options.tiny else shape, variant, peers, bars, device)
    for reach, bars in (
        (0, (Bar(1.15, peer="flex"), Bar(1.0, peer="cudnn", goal=True))),
        (6, (Bar(1.25, peer="flex"),)),
    ):
        yield picture_workload(Picture(4, 16, 64, 64, 128, reach), options.tiny, bars, device)


@dataclass(frozen=True)
class Picture:
    """Batches, heads, rows and columns, width of a head, and how far a place sees each way; 0 for all of it."""

    batches: int
    heads: int
    rows: int
    columns: int
    width: int
    reach: int

    @property
    def text(self) -> str:
        """As a table names it."""
        seen = f"near {2 * self.reach + 1}x{2 * self.reach + 1}" if self.reach else "full"
        return f"picture {seen} {self.batches} {self.heads} {self.rows}x{self.columns} {self.width}"

    @property
    def where(self) -> str:
        """Which places one sees, in the notation."""
        ways = (f"{a} - {b} <= {self.reach}" for pair in ("ix", "jy") for a, b in (pair, pair[::-1]))
        return " and ".join(ways) if self.reach else ""

    @property
    def variant(self) -> Variant:
        """The same as attention over places in a row."""

        def sees(inputs: Inputs) -> Mask:
            def near(m: Tensor, n: Tensor) -> Tensor:
                up, across = m // self.columns - n // self.columns, m % self.columns - n % self.columns
                return (up.abs() <= self.reach) & (across.abs() <= self.reach)

            return lambda b, h, m, n: near(m, n)

        def along(extent: int) -> int:
            return sum(min(at + self.reach, extent - 1) - max(at - self.reach, 0) + 1 for at in range(extent))

        pairs = along(self.rows) * along(self.columns)
        return Variant(self.text, mask=sees, live=lambda length: float(pairs)) if self.reach else NOOP


def picture_workload(shape: Picture, small: bool, bars: tuple[Bar, ...], device: torch.device) -> Workload:
    """Attention over two ranks; peers have the places in a row, which is no work."""
    own = dataclasses.replace(shape, batches=2, heads=2, rows=6, columns=8, width=16) if small else shape
    variant = own.variant

    def inputs(generator: torch.Generator) -> Inputs:
        extents = (own.batches, own.heads, own.rows, own.columns, own.width)
        return {name: normal(generator, *extents) for name in "QKV"}

    def flat(inputs: Inputs) -> Inputs:
        return {name: inputs[name].flatten(2, 3) for name in "QKV"}

    def in_a_row(peer: Peer) -> Peer:
        return Peer(peer.run, lambda given: peer.prepare(flat(given)))

    peers = {name: in_a_row(peer) for name, peer in beside(variant, device, ("flex", "cudnn", "flash")).items()}
    length = own.rows * own.columns
    return Workload(
        shape.text, programs.picture(own.where), inputs, lambda given: expected(variant, flat(given)),
        lambda out, given: found(out.reshape(own.batches, own.heads, length, own.width), given), peers, bars,
        flops=4.0 * own.batches * own.heads * own.width * variant.live(length),
    )  # fmt: skip


def grid(device: torch.device, options: Any) -> Iterator[Workload]:
    """The table `flex-grid`: variants by heads, lengths and widths."""
    for heads in options.heads:
        for length in options.lengths:
            for width in options.widths:
                query, _, shared = heads.partition("/")
                shape = Shape(4, int(query), int(shared or query), length, width)
                for variant in variants(options.tiny):
                    peers = beside(variant, device, ("flex", "cudnn"))
                    bars = (Bar(variant.factor, peer="flex"),)
                    name = f"{variant.name} {shape.text}"
                    yield workload(name, shape.small() if options.tiny else shape, variant, peers, bars, device)


RAGGED = Variant(
    "ragged", "n < len[b]", params=", len: i32[B]", mask=lambda inputs: lambda b, h, m, n: n < inputs["len"][b],
    more=lambda shape, device: {"len": torch.tensor(lengths_of(shape), dtype=torch.int32, device=device)}, batched=True,
)  # fmt: skip


def lengths_of(shape: Shape) -> list[int]:
    """How many keys each row of a ragged batch has: as many short rows as long ones, in no order."""
    rows = [max(1, shape.length * (row + 1) // shape.batches) for row in range(shape.batches)]
    random.Random(0).shuffle(rows)
    return rows


def decoding(device: torch.device, options: Any) -> Iterator[Workload]:
    """The table `decode`: what it takes to read the keys and values once."""
    for variant, shape, bars in (
        (NOOP, Shape(32, 32, 8, 8192, 128), (Bar(0.97, copy=True),)),
        (NOOP, Shape(1, 32, 8, 131072, 128), (Bar(0.92, copy=True), Bar(1.0, peer="cudnn"))),
        (RAGGED, Shape(32, 32, 8, 16384, 128), (Bar(1.0, peer="flex"),)),
    ):
        name = f"decode {'ragged ' if variant is RAGGED else ''}{shape.text}"
        yield decode_workload(name, shape.small() if options.tiny else shape, variant, bars, device)
    for page in (16, 64):
        yield paged_workload(Shape(32, 32, 8, 8192, 128), page, options.tiny, device)
    for shared in (32, 8):
        yield prefixed_workload(Prefixed(64, 32, shared, 8192, 512, 128), options.tiny, device)


def paged_workload(shape: Shape, page: int, small: bool, device: torch.device) -> Workload:
    """One query for every head, keys in pages that lie in no order; the peers have them in a row, made before."""
    name, own = f"decode pages of {page} {shape.text}", shape.small() if small else shape
    pages = -(-own.length // page)

    def inputs(generator: torch.Generator) -> Inputs:
        count = own.batches * pages
        keys = (count, own.shared, page, own.width)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
        found = {"Q": normal(generator, own.batches, own.heads, own.width)}
        found |= {"K": normal(generator, *keys), "V": normal(generator, *keys)}
        lengths = torch.full((own.batches,), own.length, dtype=torch.int32, device=device)
        return found | {"pages": order.reshape(own.batches, pages), "len": lengths}

    def in_a_row(inputs: Inputs) -> Inputs:
        def whole(cache: Tensor) -> Tensor:
            found = cache[inputs["pages"].long()].transpose(1, 2)
            return found.flatten(2, 3)[:, :, : own.length].contiguous()

        return {"Q": inputs["Q"], "K": whole(inputs["K"]), "V": whole(inputs["V"])}

    def prepared(peer: Peer) -> Peer:
        return Peer(peer.run, lambda given: peer.prepare(in_a_row(given)))

    peers = {key: prepared(peer) for key, peer in beside(NOOP, device, ("cudnn", "flash", "flex")).items()}
    moved = 4.0 * own.width * own.batches * (own.shared * own.length + own.heads)
    return Workload(
        name, programs.paged(own.group), inputs, lambda given: expected(NOOP, in_a_row(given)), found, peers,
        (Bar(0.97, copy=True, goal=True), Bar(0.9, peer="cudnn")), moved=moved,
    )  # fmt: skip


@dataclass(frozen=True)
class Prefixed:
    """Sequences that have their first keys in common: how many, the heads, the keys of all and of each, the width."""

    batches: int
    heads: int
    shared: int
    prefix: int
    length: int
    width: int

    @property
    def text(self) -> str:
        """As a table names it."""
        heads = f"{self.heads}/{self.shared}" if self.shared < self.heads else f"{self.heads}"
        return f"{self.batches} {heads} {self.prefix}+{self.length} {self.width}"

    def small(self) -> Prefixed:
        """One that the interpreter runs at once."""
        group = self.heads // self.shared
        return Prefixed(3, 2 * group, 2, 40, 24, 16)


def prefixed_workload(shape: Prefixed, small: bool, device: torch.device) -> Workload:
    """One query of every sequence against keys of all and of its own; the peer has the common ones in each."""
    name, group = f"decode prefix {shape.text}", shape.heads // shape.shared
    own = shape.small() if small else shape

    def inputs(generator: torch.Generator) -> Inputs:
        common = (own.shared, own.prefix, own.width)
        keys = (own.batches, own.shared, own.length, own.width)
        found = {"Q": normal(generator, own.batches, own.heads, own.width)}
        found |= {"C": normal(generator, *common), "W": normal(generator, *common)}
        return found | {"K": normal(generator, *keys), "V": normal(generator, *keys)}

    def apart(inputs: Inputs) -> Inputs:
        """The keys and values of every sequence with those of all before its own."""
        pairs = ((inputs["C"], inputs["K"]), (inputs["W"], inputs["V"]))
        k, v = (torch.cat([common.expand(own.batches, *common.shape), each], 2) for common, each in pairs)
        return {"Q": inputs["Q"], "K": k, "V": v}

    call = build(programs.decode(group), "quick", device.type)
    moved = 4.0 * own.width * own.shared * (own.prefix + own.batches * own.length)
    return Workload(
        name, programs.prefixed(group), inputs, lambda given: expected(NOOP, apart(given)), found,
        {"unshared": Peer(lambda given: call(**given), apart)}, (Bar(5.0, peer="unshared"),), moved=moved,
    )  # fmt: skip


def decode_workload(name: str, shape: Shape, variant: Variant, bars: tuple[Bar, ...], device: torch.device) -> Workload:
    """One query for every head against all keys that its row has."""

    def inputs(generator: torch.Generator) -> Inputs:
        keys = (shape.batches, shape.shared, shape.length, shape.width)
        q = normal(generator, shape.batches, shape.heads, shape.width)
        return {"Q": q, "K": normal(generator, *keys), "V": normal(generator, *keys), **variant.more(shape, device)}

    rows = lengths_of(shape) if variant is RAGGED else [shape.length] * shape.batches
    moved = 2.0 * shape.width * (2 * shape.shared * sum(rows) + 2 * shape.heads * shape.batches)
    peers = beside(variant, device, ("cudnn", "flash", "flex"))
    text = programs.decode(shape.group, ragged=variant is RAGGED)
    return Workload(name, text, inputs, lambda given: expected(variant, given), found, peers, bars, moved=moved)
