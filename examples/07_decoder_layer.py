"""A decoder layer as one program, from `decoder_layer.cascade`: equal to plain torch, and what its kernels are.

Run it with `python -m examples.07_decoder_layer`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional as F

import cascade as cs

TEXT = Path(__file__).with_name("decoder_layer.cascade").read_text()
BASE = 10000.0  # of the rotary embedding


def plain(X, cosine, sine, g1, Wq, Wk, Wv, Wo, g2, Wg, Wu, Wd):
    """The same layer in plain torch."""
    heads, shared = Wq.shape[0], Wk.shape[0]

    def turn(x):
        left, right = x.chunk(2, -1)
        return x * cosine + torch.cat([-right, left], -1) * sine

    n = F.rms_norm(X, g1.shape, g1, 1e-6)
    q, k, v = (F.linear(n, w.flatten(0, 1)).unflatten(1, w.shape[:2]).transpose(0, 1) for w in (Wq, Wk, Wv))
    q, k = turn(q)[None], turn(k)[None]
    attended = F.scaled_dot_product_attention(q, k, v[None], is_causal=True, enable_gqa=heads != shared)
    z = X + F.linear(attended[0].transpose(0, 1).flatten(1), Wo.flatten(1))
    m = F.rms_norm(z, g2.shape, g2, 1e-6)
    return z + F.linear(F.silu(F.linear(m, Wg)) * F.linear(m, Wu), Wd)


def inputs(t, d, h, g, e, f, device="cpu", dtype=torch.float32, generator=None):
    """Random activations and weights: t tokens of width d, h heads and g of keys of width e, f hidden."""
    angle = torch.arange(t)[:, None] * BASE ** (-torch.arange(e // 2) / (e // 2))
    shapes = {"g1": (d,), "Wq": (h, e, d), "Wk": (g, e, d), "Wv": (g, e, d), "Wo": (d, h, e), "g2": (d,),
              "Wg": (f, d), "Wu": (f, d), "Wd": (d, f)}  # fmt: skip
    found = {"X": torch.randn(t, d, device=device, generator=generator)}
    found |= {"cosine": angle.cos().repeat(1, 2), "sine": angle.sin().repeat(1, 2)}
    for name, shape in shapes.items():
        summed = 1.0 if len(shape) == 1 else math.prod(shape[1:] if name in ("Wo", "Wd") else shape[-1:])
        found[name] = torch.randn(shape, device=device, generator=generator) / math.sqrt(summed)
    return {name: tensor.to(device, dtype) for name, tensor in found.items()}


def main() -> None:
    """The layer equals plain torch; on a GPU it says what its kernels are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = cs.parse(TEXT)
    given = inputs(100, 64, 8, 2, 16, 96, device)
    torch.testing.assert_close(layer(**given), plain(**given), rtol=1e-4, atol=1e-4)
    print(f"{len(layer.cascade.body)} statements as written; equal to plain torch on 100 tokens of width 64")
    if device == "cuda":
        print(layer.explain())


if __name__ == "__main__":
    main()
