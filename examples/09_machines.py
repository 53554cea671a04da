"""What grouping is worth on modelled machines: in attention much, in a decoder little, in a recurrence nothing.

Every cascade is costed twice on each machine under a searched mapping: as written, each Einsum alone, and after the
pipeline, what it groups in one region. The pages in `docs` look at each of them. Run it with
`python -m examples.09_machines`.
"""

from __future__ import annotations

from pathlib import Path

from cascade.arguments import shape_symbols
from cascade.backends.systolic.cost import Cost
from examples.machines.ways import ways

HERE = Path(__file__).parent
CASCADES = {
    "causal attention": ("machines/attention.cascade", "causal"),
    "sliding window": ("machines/attention.cascade", "window"),
    "grouped decoding": ("machines/decode.cascade", None),
    "LayerNorm, then a product": ("machines/layernorm_linear.cascade", None),
    "transformer MLP": ("block.cascade", None),
    "mixture of experts": ("moe.cascade", None),
    "linear recurrence": ("machines/retention.cascade", None),
}
SIZES = {"B": 4, "H": 8, "G": 8, "R": 8, "M": 4096, "N": 4096, "E": 128, "F": 128, "T": 2048, "D": 1024}
EXPERTS = {"N": 16}
MACHINES = (str(HERE / "machines/fusemax-general.toml"), "tpu-v4-like")


def main() -> None:
    """Prints the table, and checks what it is there to show."""
    found: dict[tuple[str, str], tuple[Cost, Cost]] = {}
    print(f"{'':26}{'machine':14}{'alone':>12}{'grouped':>12}{'time':>8}{'traffic':>9}")
    for title, (file, name) in CASCADES.items():
        alone, grouped = ways((HERE / file).read_text(), name)
        known = SIZES | (EXPERTS if title == "mixture of experts" else {})
        sizes = {symbol: known[symbol] for symbol in shape_symbols(alone.cascaded.cascade)}
        for on in MACHINES:
            costs = alone.cost(on, sizes), grouped.cost(on, sizes)
            found[title, on] = costs
            times = "".join(f"{cost.seconds * 1e6:10.1f}us" for cost in costs)
            gain, moved = costs[0].seconds / costs[1].seconds, costs[0].traffic / costs[1].traffic
            remark = "  grouping loses" if gain < 1 else ""
            print(f"{title:26}{costs[0].machine:14}{times}{gain:7.2f}x{moved:8.2f}x{remark}")
    for title in ("causal attention", "sliding window", "grouped decoding"):
        for on in MACHINES:
            one, other = found[title, on]
            assert other.traffic < one.traffic and other.seconds <= one.seconds
    for one, other in (found["linear recurrence", on] for on in MACHINES):  # no group: a state that is read at once
        assert other.seconds == one.seconds


if __name__ == "__main__":
    main()
