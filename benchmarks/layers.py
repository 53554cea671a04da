"""The table `layers`: norms before products, gated blocks and losses, beside torch and beside the bare product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn import functional as F

from benchmarks import programs
from benchmarks.experts import by_groups
from benchmarks.peers import compiled, plain
from benchmarks.reductions import slice_of
from benchmarks.workload import Bar, Inputs, Peer, Workload, normal

decoder: Any = importlib.import_module("examples.07_decoder_layer")
mixture: Any = importlib.import_module("examples.08_mixture_of_experts")
EPS = 1e-6
NEAR = 0.05  # logits of experts, which have a deviation of 1, that roundings of 16 bits may turn round
LAST = 4  # tokens of a whole layer that are checked: with each goes all before it
GROUP = 128  # columns of 4-bit weights that share a scale
ROWS = (8192, 16)  # of activations: many, and those of a few sequences that are decoded


def linear(inputs: Inputs) -> Tensor:
    """The bare product of a row."""
    return F.linear(inputs["X"], inputs["W"])


def rms_linear(inputs: Inputs) -> Tensor:
    """A norm by the root mean square and a linear layer."""
    x, gain = inputs["X"], inputs["g"]
    return F.linear(F.rms_norm(x, gain.shape, gain, EPS), inputs["W"])


def layer_linear(inputs: Inputs) -> Tensor:
    """A norm by mean and variance and a linear layer."""
    x, gain = inputs["X"], inputs["g"]
    return F.linear(F.layer_norm(x, gain.shape, gain, None, EPS), inputs["W"])


def mlp(inputs: Inputs) -> Tensor:
    """A gated block between two linear layers."""
    x = inputs["X"]
    return F.linear(F.silu(F.linear(x, inputs["G"])) * F.linear(x, inputs["U"]), inputs["W"])


def loss(inputs: Inputs) -> Tensor:
    """The cross-entropy of every row of a linear layer."""
    return F.cross_entropy(linear(inputs).float(), inputs["y"], reduction="none")


def widened(inputs: Inputs) -> Tensor:
    """The weights that bytes and their scales stand for: one scale a row, or two numbers a byte and a scale a group."""
    weights, scales = inputs["W"], inputs["s"]
    if scales.dim() == 1:
        return weights * scales[:, None]
    numbers = torch.stack([weights.int() % 16, weights.int() // 16 % 16], -1).flatten(1) - 8
    return numbers * scales.repeat_interleave(numbers.shape[1] // scales.shape[1], 1)


def few_bits(inputs: Inputs) -> Tensor:
    """A linear layer of such weights."""
    return F.linear(inputs["X"], widened(inputs).to(inputs["X"].dtype))


def exactly(maths: Callable[[Inputs], Tensor], rows: tuple[str, ...]) -> Callable[[Inputs], Tensor]:
    """Sixteen rows in float64."""

    def expected(inputs: Inputs) -> Tensor:
        exact = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        chosen = {name: slice_of(exact[name]) for name in rows}
        chosen |= {"y": chosen["y"][:, 0]} if "y" in chosen else {}
        return slice_of(maths(exact | chosen))

    return expected


def found(out: Tensor, inputs: Inputs) -> Tensor:
    """The same rows of what was computed."""
    return slice_of(out)


def table(device: torch.device, options: Any) -> Iterator[Workload]:
    """The table `layers`."""
    width, hidden, words = (256, 48, 100) if options.tiny else (4096, 14336, 128256)
    for rows in (24, 3) if options.tiny else ROWS:
        many = rows in (24, ROWS[0])
        bars = (Bar(1.0, peer="torch.compile"), Bar(1 / 1.12, peer="product") if many else Bar(ms=0.021))
        for name, text, maths in (
            ("rmsnorm, linear", programs.RMSNORM_LINEAR, rms_linear),
            ("layernorm, linear", programs.LAYERNORM_LINEAR, layer_linear),
        ):
            peers = plain(maths, device) | {"product": Peer(linear, checked=False)}
            title, flops = f"{name} {rows} {width} {width}", 2.0 * rows * width * width
            for kept, asked in (("", {}), (", kept", {"constant": ("g", "W")})):
                yield Workload(
                    title.replace(" linear", f" linear{kept}"), text, normed(rows, width), exactly(maths, ("X",)),
                    found, peers, bars, flops, options=asked,
                )  # fmt: skip
        yield from quantised(rows, width, device)
        yield gated(rows, width, hidden, device, (Bar(1.0, peer="torch.compile") if many else Bar(ms=0.09),))
    yield losses(24 if options.tiny else ROWS[0], width, words, device)
    yield distilled(24 if options.tiny else ROWS[0], width, words, device)
    yield prefill(24 if options.tiny else ROWS[0], width, hidden, device)
    yield step(*((3, 40) if options.tiny else (32, 8192)), width, hidden, device)
    yield mixed(24 if options.tiny else ROWS[0], width, hidden, device)


def normed(rows: int, width: int) -> Callable[[torch.Generator], Inputs]:
    """Activations, a gain, a square weight as linear layers have it."""
    return lambda generator: {
        "X": normal(generator, rows, width), "g": normal(generator, width),
        "W": normal(generator, width, width) / width**0.5,
    }  # fmt: skip


def quantised(rows: int, width: int, device: torch.device) -> Iterator[Workload]:
    """A linear layer of weights in 8 bits and in 4, beside the product of weights in 16."""

    def inputs(bits: int) -> Callable[[torch.Generator], Inputs]:
        def made(generator: torch.Generator) -> Inputs:
            stored = torch.randint(-128, 128, (width, width * bits // 8), generator=generator, device=generator.device)
            scales = normal(generator, width).abs() if bits == 8 else normal(generator, width, width // GROUP).abs()
            return {
                "X": normal(generator, rows, width), "W": stored.to(torch.int8), "s": scales / 16 / width**0.5,
            }  # fmt: skip

        return made

    def widely(inputs: Inputs) -> Inputs:
        """With weights of 16 bits, each set its own: none is in the cache."""
        return {"X": inputs["X"], "W": torch.empty(width, width, dtype=torch.bfloat16, device=device)}

    peers = plain(few_bits, device) | {"product": Peer(linear, widely, checked=False)}
    for bits, text, bar in ((8, programs.INT8_LINEAR, 1.0), (4, programs.INT4_LINEAR, 2.5)):
        bars = (Bar(1.0, peer="torch.compile"), Bar(bar if rows <= ROWS[1] else 1 / 1.12, peer="product"))
        title = f"int{bits} linear {rows} {width} {width}"
        flops = 2.0 * rows * width * width
        yield Workload(title, text, inputs(bits), exactly(few_bits, ("X",)), found, peers, bars, flops)


def gated(rows: int, width: int, hidden: int, device: torch.device, bars: tuple[Bar, ...]) -> Workload:
    """A gated block, three products."""

    def inputs(generator: torch.Generator) -> Inputs:
        up = {name: normal(generator, hidden, width) / width**0.5 for name in "GU"}
        return {"X": normal(generator, rows, width), **up, "W": normal(generator, width, hidden) / hidden**0.5}

    title = f"gated mlp {rows} {width} {hidden}"
    flops = 6.0 * rows * width * hidden
    return Workload(title, programs.GATED_MLP, inputs, exactly(mlp, ("X",)), found, plain(mlp, device), bars, flops)


def losses(rows: int, width: int, words: int, device: torch.device) -> Workload:
    """The loss of a vocabulary, forward: no logits need be stored."""

    def inputs(generator: torch.Generator) -> Inputs:
        targets = torch.randint(words, (rows,), generator=generator, device=generator.device)
        return {"X": normal(generator, rows, width), "W": normal(generator, words, width) / width**0.5, "y": targets}

    peers = plain(loss, device) | {"product": Peer(linear, checked=False)}
    bars = (Bar(1.0, peer="torch.compile"), Bar(1 / 1.05, peer="product"))
    title = f"linear, cross-entropy {rows} {width} {words}"
    flops = 2.0 * rows * width * words
    return Workload(title, programs.LINEAR_LOSS, inputs, exactly(loss, ("X", "y")), found, peers, bars, flops)


def distilled(rows: int, width: int, words: int, device: torch.device) -> Workload:
    """How far a student's words are from a teacher's, each a linear layer on states of its own."""

    def inputs(generator: torch.Generator) -> Inputs:
        student, teacher = (normal(generator, words, width) / width**0.5 for _ in range(2))
        states = {name: normal(generator, rows, width) for name in "XU"}
        return {"X": states["X"], "W": student, "U": states["U"], "M": teacher}

    def divergence(given: Inputs) -> Tensor:
        logits = (F.linear(given[x], given[w]) for x, w in ("XW", "UM"))
        student, teacher = (F.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)), -1) for z in logits)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)

    title, flops = f"linear, KL {rows} {width} {words}", 4.0 * rows * width * words
    peers, bars = plain(divergence, device), (Bar(1.0, peer="torch.compile"),)
    return Workload(title, programs.LINEAR_KL, inputs, exactly(divergence, ("X", "U")), found, peers, bars, flops)


def prefill(rows: int, width: int, hidden: int, device: torch.device) -> Workload:
    """A whole decoder layer on the tokens of one sequence."""
    heads, shared, wide = (8, 2, 16) if rows < ROWS[1] * 2 else (32, 8, 128)

    def inputs(generator: torch.Generator) -> Inputs:
        sizes = (rows, width, heads, shared, wide, hidden)
        return decoder.inputs(*sizes, generator.device, torch.bfloat16, generator)  # type: ignore[no-any-return]

    def maths(given: Inputs) -> Tensor:
        return decoder.plain(**given)  # type: ignore[no-any-return]

    pairs = rows * (rows + 1) / 2
    weights = 2 * width * wide * (heads + shared) + 3 * width * hidden
    flops = 2.0 * rows * weights + 4.0 * pairs * heads * wide
    title = f"decoder layer {rows} {width} {hidden}"
    peers, bars = plain(maths, device), (Bar(1.1, peer="torch.compile"),)
    expected, lasts = last_tokens(decoder.plain)
    return Workload(title, decoder.TEXT, inputs, expected, lasts, peers, bars, flops)


def mixed(rows: int, width: int, hidden: int, device: torch.device) -> Workload:
    """A whole decoder layer with two of eight experts for each token, on the tokens of one sequence."""
    heads, shared, wide, experts = (8, 2, 16, 4) if rows < ROWS[1] * 2 else (32, 8, 128, 8)

    def inputs(generator: torch.Generator) -> Inputs:
        sizes = (rows, width, heads, shared, wide, hidden, experts)
        return mixture.inputs(*sizes, generator.device, torch.bfloat16, generator)  # type: ignore[no-any-return]

    def grouped(given: Inputs) -> Tensor:
        """The stock layer, its experts by products of groups of rows."""
        left = {name: t for name, t in given.items() if name not in ("g2", "Wr", "Wg", "Wu", "Wd")}
        z: Tensor = decoder.attended(**left)
        rest = {"R": given["Wr"].mT, "G": given["Wg"].mT, "U": given["Wu"].mT, "V": given["Wd"].mT}
        return z + by_groups({"X": F.rms_norm(z, given["g2"].shape, given["g2"], EPS), **rest}, mixture.CHOSEN)

    def settled(given: Inputs) -> Tensor:
        """Tokens whose last expert is chosen clearly."""
        logits = mixture.logits(**given)[1].float()
        best = torch.topk(logits, mixture.CHOSEN + 1).values
        return best[:, -2] - best[:, -1] > NEAR

    def eager(given: Inputs) -> Tensor:
        return mixture.plain(**given)  # type: ignore[no-any-return]

    pairs = rows * (rows + 1) / 2
    weights = 2 * width * wide * (heads + shared) + 3 * mixture.CHOSEN * width * hidden
    flops = 2.0 * rows * weights + 4.0 * pairs * heads * wide
    peers = {"torch.compile": Peer(compiled(grouped, device)), "eager": Peer(eager)}
    expected, lasts = last_tokens(mixture.plain)
    title, bars = f"mixture layer {rows} {width} {hidden}", (Bar(1.1, peer="torch.compile"),)
    return Workload(title, mixture.TEXT, inputs, expected, lasts, peers, bars, flops, settled=settled)


def last_tokens(maths: Callable[..., Tensor]) -> tuple[Callable[[Inputs], Tensor], Callable[[Tensor, Inputs], Tensor]]:
    """The checked tokens of a layer in float64, which attend to all before them; and those of a result."""

    def ends(rows: int) -> list[int]:
        return [rows * part // LAST for part in range(1, LAST + 1)]

    def expected(given: Inputs) -> Tensor:
        exact = {name: tensor.double() for name, tensor in given.items()}
        upto = ({name: exact[name][:n] for name in ("X", "cosine", "sine")} for n in ends(len(given["X"])))
        return torch.stack([maths(**exact | before)[-1] for before in upto])

    def lasts(out: Tensor, given: Inputs) -> Tensor:
        return torch.stack([out[end - 1] for end in ends(len(out))])

    return expected, lasts


def step(batch: int, length: int, width: int, hidden: int, device: torch.device) -> Workload:
    """A whole decoder layer on one more token of each sequence, whose caches it fills to the end."""
    heads, shared, wide = (8, 2, 16) if length < ROWS[0] else (32, 8, 128)

    def inputs(generator: torch.Generator) -> Inputs:
        given = decoder.inputs(length, width, heads, shared, wide, hidden, device, torch.bfloat16, generator)
        turned = {name: given[name][-1:].expand(batch, -1).contiguous() for name in ("cosine", "sine")}
        cache = {name: normal(generator, batch, shared, length, wide) for name in "KV"}
        places = torch.full((batch,), length - 1, dtype=torch.int32, device=device)
        found: Inputs = {**given, **turned, **cache, "X": normal(generator, batch, width), "len": places}
        return found

    def expected(given: Inputs) -> Tensor:
        """The first and the last sequence in float64."""
        exact = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        ends = {name: exact[name][[0, -1]] for name in ("X", "cosine", "sine", "K", "V", "len")}
        result: Tensor = decoder.plain_step(**exact | ends)
        return result

    def ends(out: Tensor | tuple[Tensor, ...], given: Inputs) -> Tensor:
        return (out if isinstance(out, Tensor) else out[0])[[0, -1]]

    def maths(given: Inputs) -> Tensor:
        return decoder.plain_step(**given, full=True)  # type: ignore[no-any-return]

    optimised = compiled(maths, device)

    def by_cudnn(given: Inputs) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return optimised(given)  # type: ignore[no-any-return]

    weights = 2 * width * wide * (heads + shared) + 3 * width * hidden
    moved = 2.0 * (weights + 2 * batch * shared * length * wide)
    peers = plain(maths, device) | ({} if device.type == "cpu" else {"cudnn": Peer(by_cudnn)})
    bars = (Bar(1.3, peer="torch.compile"), Bar(1.3, peer="cudnn"))
    title = f"decoder step {batch} {length} {width} {hidden}"
    return Workload(
        title, decoder.STEP, inputs, expected, ends, peers, bars, moved=moved, options={"in_place": decoder.IN_PLACE}
    )
