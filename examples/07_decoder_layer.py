"""A decoder layer as one program, from `decoder_layer.cascade`: equal to plain torch, and what its kernels are.

`decoder_step.cascade` is the same layer for one more token of each sequence: keys and values go into a cache, in place.

Run it with `python -m examples.07_decoder_layer`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional as F

import cascade as cs

TEXT = Path(__file__).with_name("decoder_layer.cascade").read_text()
STEP = Path(__file__).with_name("decoder_step.cascade").read_text()
IN_PLACE = {"K_new": "K", "V_new": "V"}
BASE = 10000.0  # of the rotary embedding


def attended(X, cosine, sine, g1, Wq, Wk, Wv, Wo):
    """The first half of the layer in plain torch: attention, added to what comes in."""
    heads, shared = Wq.shape[0], Wk.shape[0]

    def turn(x):
        left, right = x.chunk(2, -1)
        return x * cosine + torch.cat([-right, left], -1) * sine

    n = F.rms_norm(X, g1.shape, g1, 1e-6)
    q, k, v = (F.linear(n, w.flatten(0, 1)).unflatten(1, w.shape[:2]).transpose(0, 1) for w in (Wq, Wk, Wv))
    q, k = turn(q)[None], turn(k)[None]
    u = F.scaled_dot_product_attention(q, k, v[None], is_causal=True, enable_gqa=heads != shared)
    return X + F.linear(u[0].transpose(0, 1).flatten(1), Wo.flatten(1))


def plain(X, cosine, sine, g1, Wq, Wk, Wv, Wo, g2, Wg, Wu, Wd):
    """The same layer in plain torch."""
    z = attended(X, cosine, sine, g1, Wq, Wk, Wv, Wo)
    m = F.rms_norm(z, g2.shape, g2, 1e-6)
    return z + F.linear(F.silu(F.linear(m, Wg)) * F.linear(m, Wu), Wd)


def plain_step(X, cosine, sine, K, V, len, g1, Wq, Wk, Wv, Wo, g2, Wg, Wu, Wd, full=False):
    """A step in plain torch, K and V growing in place; no mask is needed where it makes them `full`."""
    heads, shared, rows = Wq.shape[0], Wk.shape[0], torch.arange(X.shape[0], device=X.device)

    def turn(x):
        left, right = x.chunk(2, -1)
        return x * cosine[:, None] + torch.cat([-right, left], -1) * sine[:, None]

    n = F.rms_norm(X, g1.shape, g1, 1e-6)
    q, k, v = (F.linear(n, w.flatten(0, 1)).unflatten(1, w.shape[:2]) for w in (Wq, Wk, Wv))
    K[rows, :, len], V[rows, :, len] = turn(k), v
    seen = None if full else (torch.arange(K.shape[2], device=X.device) <= len[:, None])[:, None, None]
    u = F.scaled_dot_product_attention(turn(q)[:, :, None], K, V, attn_mask=seen, enable_gqa=heads != shared)
    z = X + F.linear(u.flatten(1), Wo.flatten(1))
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
    step = cs.compile(STEP, in_place=IN_PLACE)
    shared = {name: tensor for name, tensor in given.items() if name not in ("X", "cosine", "sine")}
    K, V = (torch.zeros(1, 2, 12, 16, device=device) for _ in range(2))
    rows = []
    for place in range(12):
        here = {name: given[name][place : place + 1] for name in ("X", "cosine", "sine")}
        rows.append(step(**here, K=K, V=V, len=torch.tensor([place], dtype=torch.int32, device=device), **shared)[0])
    torch.testing.assert_close(torch.cat(rows), layer(**given)[:12], rtol=1e-4, atol=1e-4)
    print("12 tokens one by one, with a cache that grows in place: the first 12 rows of the layer")
    if device == "cuda":
        print(layer.explain())


if __name__ == "__main__":
    main()
