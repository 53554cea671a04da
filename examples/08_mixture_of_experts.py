"""A decoder layer with a mixture of experts, from `mixture_of_experts.cascade`, equal to a loop over experts.

Run it with `python -m examples.08_mixture_of_experts`.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import torch
from torch.nn import functional as F

import cascade as cs

TEXT = Path(__file__).with_name("mixture_of_experts.cascade").read_text()
CHOSEN = 2  # experts of a token
decoder = importlib.import_module("examples.07_decoder_layer")


def logits(X, cosine, sine, g1, Wq, Wk, Wv, Wo, g2, Wr, **experts):
    """What attention gives, and how well each expert suits each token."""
    z = decoder.attended(X, cosine, sine, g1, Wq, Wk, Wv, Wo)
    return z, F.linear(F.rms_norm(z, g2.shape, g2, 1e-6), Wr)


def plain(X, cosine, sine, g1, Wq, Wk, Wv, Wo, g2, Wr, Wg, Wu, Wd):
    """The same layer in plain torch, expert by expert."""
    z, suits = logits(X, cosine, sine, g1, Wq, Wk, Wv, Wo, g2, Wr)
    m = F.rms_norm(z, g2.shape, g2, 1e-6)
    weights, experts = torch.topk(torch.softmax(suits, -1), CHOSEN)
    weights = weights / weights.sum(-1, keepdim=True)
    out = z.clone()
    for expert in range(len(Wr)):
        token, slot = torch.where(experts == expert)
        hidden = F.silu(F.linear(m[token], Wg[expert])) * F.linear(m[token], Wu[expert])
        out.index_add_(0, token, weights[token, slot, None] * F.linear(hidden, Wd[expert]))
    return out


def inputs(t, d, h, g, e, f, n, device="cpu", dtype=torch.float32, generator=None):
    """Random activations and weights as for the decoder layer, with n experts of f hidden."""
    found = decoder.inputs(t, d, h, g, e, f, device, dtype, generator)
    for name, shape in {"Wr": (n, d), "Wg": (n, f, d), "Wu": (n, f, d), "Wd": (n, d, f)}.items():
        data = torch.randn(shape, device=device, generator=generator) / math.sqrt(shape[-1])
        found[name] = data.to(device, dtype)
    return found


def main() -> None:
    """The layer equals plain torch; on a GPU it says what its kernels are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = cs.parse(TEXT)
    given = inputs(100, 64, 8, 2, 16, 96, 4, device)
    torch.testing.assert_close(layer(**given), plain(**given), rtol=1e-4, atol=1e-4)
    print(f"{len(layer.cascade.body)} statements as written; equal to a loop over 4 experts on 100 tokens of width 64")
    if device == "cuda":
        print(layer.explain())


if __name__ == "__main__":
    main()
