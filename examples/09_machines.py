"""What grouping is worth on modelled machines: in attention much, in a decoder little, in a recurrence nothing.

Every cascade goes through the pipeline and is costed twice on each machine under a searched mapping: each Einsum alone,
and what the schedule groups in one region. Filters count for work that is spread over lanes; an array that is filled at
its edges takes whole ranks, so a window saves it nothing. Run it with `python -m examples.09_machines`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cascade import pipeline
from cascade.arguments import shape_symbols
from cascade.backends.systolic.cost import Cost, Evaluator
from cascade.backends.systolic.machine import Machine, machine, parse_machine
from cascade.backends.systolic.search import search
from cascade.backends.systolic.work import take_apart
from cascade.compiled import from_text

HERE = Path(__file__).parent
ATTENTION = (HERE / "attention.cascade").read_text()
CASCADES = {
    "causal attention": ATTENTION,
    "sliding window": ATTENTION.replace("n <= m", "n <= m and m - n < 512"),
    "grouped decoding": """cascade decode(Q[G,R,E], K[G,N,E], V[G,N,F]) -> O[G,R,F] {
    S[g,r,n] = Q[g,r,e] * K[g,n,e] / sqrt(E)
    P[g,r,n] = softmax[n] S[g,r,n]
    O[g,r,f] = sum[n] P[g,r,n] * V[g,n,f]
}""",
    "LayerNorm, then a product": """cascade project(X[M,E], W[E,F]) -> Y[M,F] {
    A[m] = mean[e] X[m,e]
    C[m,e] = X[m,e] - A[m]
    Y[m,f] = sum[e] C[m,e] * rsqrt(mean[e] C[m,e] * C[m,e] + 1e-5) * W[e,f]
}""",
    "transformer MLP": (HERE / "block.cascade").read_text(),
    "mixture of experts": (HERE / "moe.cascade").read_text(),
    "linear recurrence": """cascade decay(X[N,E], A[N,E]) -> H[N,E] {
    H[n,e] = A[n,e] * H[n-1,e] + X[n,e] init H[-1,e] = 0
}""",
}
SIZES = {"B": 4, "H": 8, "G": 8, "R": 8, "M": 4096, "N": 4096, "E": 128, "F": 128, "T": 2048, "D": 1024}
EXPERTS = {"N": 16}

# FuseMax's arrays, with a vector unit that does in seven cycles what the paper's cascades have no use for.
FUSEMAX = 'extends = "fusemax"\n[units.1d.operations]\nother = { cycles = 7 }'


def machines() -> dict[str, Machine]:
    """The machines of the table."""
    return {"fusemax": parse_machine(FUSEMAX, "fusemax"), "tpu-v4-like": machine("tpu-v4-like")}


def costed(text: str, on: Machine, fused: bool) -> Cost:
    """A cascade on a machine, with the groups of the pipeline or without any."""
    final = pipeline.run_pipeline(from_text(text, "<example>", None).cascade).final
    final = final if fused else replace(final, schedule=())
    sizes = {name: SIZES[name] for name in shape_symbols(final)} | (EXPERTS if "moe" in final.name else {})
    cascaded = take_apart(final)
    return Evaluator(cascaded, on, search(cascaded, on, sizes)).cost(sizes)


def main() -> None:
    """Prints the table, and checks what it is there to show."""
    found: dict[tuple[str, str], tuple[Cost, Cost]] = {}
    print(f"{'':26}{'machine':14}{'alone':>12}{'grouped':>12}{'time':>8}{'traffic':>9}")
    for title, text in CASCADES.items():
        for name, on in machines().items():
            alone, grouped = costed(text, on, fused=False), costed(text, on, fused=True)
            found[title, name] = alone, grouped
            times = f"{alone.seconds * 1e6:10.1f}us{grouped.seconds * 1e6:10.1f}us"
            gain, moved = alone.seconds / grouped.seconds, alone.traffic / grouped.traffic
            print(f"{title:26}{name:14}{times}{gain:7.2f}x{moved:8.2f}x{'' if gain >= 1 else '  grouping loses'}")
    for title in ("causal attention", "sliding window", "grouped decoding"):
        for name in machines():
            alone, grouped = found[title, name]
            assert grouped.traffic < alone.traffic and grouped.seconds <= alone.seconds
    for alone, grouped in found.values():  # one Einsum: nothing to group
        assert len(alone.regions) > 1 or grouped.seconds == alone.seconds


if __name__ == "__main__":
    main()
