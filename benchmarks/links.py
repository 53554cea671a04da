"""Fits of machines of several devices to what others measured: `python -m benchmarks.links FOLDER`.

FOLDER holds their tables as CSV (TokenWeave's artifact, APEX+'s profiles, reports on Flux). What is printed are the
fields of `backends/distributed/machines/h100x8.toml` that come from them; a test prints them again and compares.

Latencies and shares are lines t = latency + bytes / (links * share), by least squares of relative errors. `sustained`
makes the model right, in the same sense, about layers of Llama 70B without their collectives on eight devices, from
1024 to 65536 tokens: a product alone is faster than one of thousands in a row. `host_us` is the time of a layer of
Mixtral 8x22B in two slices, of 1024 and of 2048 tokens, over its launches: both are the same, so no device set it.
Nothing else of that model was fitted: what its layers take without collectives follows from what brings rows in order.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade.backends.distributed.kernels import Clock, groups, layer_of, problem_of
from cascade.backends.distributed.machine import US_PER_BYTE_AT_1_GBS, Node, node
from cascade.backends.distributed.plan import Plan, plan
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.passes.schedule_overlap import serial_us
from cascade.passes.shard import stated
from cascade.passes.split_tokens import dependencies
from cascade.pipeline import run_pipeline
from cascade.placed import Program

LINK_GBS = 450.0  # NVLink 4, a direction
DEVICES = 8
BYTES = 2  # of an element of 16 bits
FEW = 2048  # tokens up to which the host is what a layer in slices waits for
PREFILL = "tokenweave_fig11_prefill_latency_ms.csv"

Points = Iterable[tuple[float, float]]
"""Bytes that a device moves, and microseconds."""


EXAMPLES = Path(__file__).parents[1] / "examples"

MIXTURE = """
cascade mixture_block(
    X[T,D], cosine[T,E], sine[T,E], g1[D], Wq[H,E,D], Wk[G,E,D], Wv[G,E,D], Wo[D,H,E], g2[D],
    Wr[N,D], Wg[N,F,D], Wu[N,F,D], Wd[N,D,F]
) -> Y[T,D] {
    L[t,d]   = rmsnorm[d](X[t,d], g1[d])
    Q[t,h,e] = L[t,d] * Wq[h,e,d]
    K[t,g,e] = L[t,d] * Wk[g,e,d]
    V[t,g,e] = L[t,d] * Wv[g,e,d]
    A[t,h,e] = Q[t,h,e] * cosine[t,e] + select(e < E // 2, -1, 1) * Q[t,h,(e + E//2) % E] * sine[t,e]
    C[t,g,e] = K[t,g,e] * cosine[t,e] + select(e < E // 2, -1, 1) * K[t,g,(e + E//2) % E] * sine[t,e]
    S[h,m,n] = A[m,h,e] * C[n,h*G//H,e] / sqrt(E)   where n <= m
    P[h,m,n] = softmax[n] S[h,m,n]
    U[m,h,e] = P[h,m,n] * V[n,h*G//H,e]
    Z[t,d]   = X[t,d] + sum[h,e] U[t,h,e] * Wo[d,h,e]
    M[t,d]   = rmsnorm[d](Z[t,d], g2[d])
    B[t,j], I[t,j] = topk[r, 2] softmax[r] (sum[d] M[t,d] * Wr[r,d])
    J[t,j,f] = silu(sum[d] M[t,d] * Wg[I[t,j],f,d]) * (sum[d] M[t,d] * Wu[I[t,j],f,d])
    R[t,j]   = B[t,j] / (sum[j] B[t,j])
    Y[t,d]   = Z[t,d] + sum[j,f] R[t,j] * J[t,j,f] * Wd[I[t,j],d,f]
} schedule {
    mesh tp = 8
    shard h over tp
    shard g over tp
    shard f over tp
}
"""


@dataclass(frozen=True)
class Model:
    """A published model: the text of its layer on a mesh of eight, the sizes of it, how many layers it has."""

    text: str
    sizes: Mapping[str, int]
    layers: int

    def cascade(self, devices: int = DEVICES) -> Cascade:
        """Its layer on so many devices, canonical."""
        text = self.text.replace(f"mesh tp = {DEVICES}", f"mesh tp = {devices}")
        return run_pipeline(parse_cascade(text, "<layer>"), "canonicalize").final

    def plan(self, tokens: int, devices: int = DEVICES, machine: str = "h100x8") -> Plan:
        """The plan of a layer."""
        return plan(self.cascade(devices), {"T": tokens, **self.sizes}, node(machine))

    def reduced(self, tokens: int, devices: int = DEVICES) -> Program:
        """A layer with an all-reduce behind each half of it, everything else on all rows everywhere."""
        return stated(self.cascade(devices), {"T": tokens, **self.sizes})

    def measured_us(self, row: Mapping[str, str], key: str) -> float:
        """A time of a whole model, in milliseconds, as microseconds of a layer."""
        return 1000 * float(row[key]) / self.layers


BLOCK = (EXAMPLES / "tensor_parallel_block.cascade").read_text(encoding="utf-8")
LLAMA = Model(BLOCK, {"D": 8192, "H": 64, "HK": 8, "E": 128, "F": 28672}, 80)
QWEN = Model(BLOCK, {"D": 8192, "H": 64, "HK": 8, "E": 128, "F": 29568}, 80)
MIXTRAL = Model(MIXTURE, {"D": 6144, "H": 48, "G": 8, "E": 128, "F": 16384, "N": 8}, 56)
MODELS = {"Llama": LLAMA, "Qwen": QWEN, "Mixtral": MIXTRAL}


def line(points: Points) -> tuple[float, float]:
    """The latency in microseconds and the share of the links of the line with least relative errors."""
    found = [(moved * US_PER_BYTE_AT_1_GBS / LINK_GBS, us) for moved, us in points]
    one, x, xx, y, xy = (
        sum(term(moved, us) / us**2 for moved, us in found)
        for term in (lambda m, t: 1.0, lambda m, t: m, lambda m, t: m * m, lambda m, t: t, lambda m, t: m * t)
    )
    slope = (one * xy - x * y) / (one * xx - x * x)
    return (y - slope * x) / one, 1 / slope


def rows(folder: Path, name: str) -> Iterator[dict[str, str]]:
    """The rows of a table."""
    with (folder / name).open(encoding="utf-8") as file:
        yield from csv.DictReader(file)


def column(folder: Path, name: str, key: str, share: float) -> Points:
    """The times of a column by tokens, of collectives that move this share of a tensor."""
    for row in rows(folder, name):
        yield BYTES * int(row["tokens"]) * int(row["hidden_size"]) * share, float(row[key])


def fits(folder: Path) -> Mapping[str, tuple[float, float]]:
    """Latency and share by the table of the machine file that has them."""
    whole, part = 1 + 1 / DEVICES, (DEVICES - 1) / DEVICES
    kernels, budgets = "tokenweave_fig4_arln_kernels_us.csv", "tokenweave_fig10_fused_arln_ctas_us.csv"
    found = {
        "collectives.all-reduce": line(column(folder, kernels, "multimem_all_reduce_us", whole)),
        "collectives.reduce-scatter": line(column(folder, kernels, "multimem_rs_us", part)),
        "collectives.all-gather": line(column(folder, kernels, "multimem_ag_us", part)),
    }
    pairs = [
        row for row in rows(folder, "nccl_collectives_us.csv") if row["gpu"].startswith("H100") and row["nodes"] == "1"
    ]
    for name, own, devices, share in (("all-to-all", "alltoall", "8", part), ("shift", "sendrecv", "2", 1.0)):
        chosen = [
            r for r in pairs if r["collective"] == own and r["gpus_per_node"] == devices and int(r["size_kb"]) >= 1024
        ]
        found[f"collectives.{name}"] = line(
            (1024 * int(row["size_kb"]) * share, float(row["time_us"])) for row in chosen
        )
    for blocks in (2, 4, 8, 16):
        found[f"fused.{blocks}"] = line(column(folder, budgets, f"fused_arln_us_ctas_{blocks}", whole))
    reports = [row for row in rows(folder, "flux_issue90_8xh100_ms.csv") if row["op"] == "gemm_rs_N8192_K28672"]
    stored = reports[::2]  # the others are left for a test
    found["stores"] = line((BYTES * int(r["M"]) * 8192 * part, 1000 * float(r["flux_ms"])) for r in stored)
    return found


def apart(program: Program, machine: Node) -> tuple[float, float]:
    """How long a layer takes one task after the other, and how much of that are collectives."""
    clock, needs = Clock.of(program, machine), dependencies(program)
    layer = layer_of(groups(program, needs), [[number] for number in range(len(program.steps))], needs)
    problem = problem_of(program, layer, clock)
    links = sum(task.modes[0].us for task in problem.tasks if task.modes[0].name == "links")
    return serial_us(problem), links


def sustained(folder: Path) -> float:
    """The share of the matrix rate with the least relative errors of layers without their collectives."""
    table = [r for r in rows(folder, PREFILL) if r["model"].startswith("Llama") and int(r["tp"]) == DEVICES]
    layers = [(LLAMA.reduced(int(r["prompt_len"])), LLAMA.measured_us(r, "no_allreduce_ms")) for r in table]

    def error(share: float) -> float:
        machine = dataclasses.replace(node("h100x8"), sustained=share)
        return sum(((whole - links) / us - 1) ** 2 for p, us in layers for whole, links in [apart(p, machine)])

    return lowest(error, 0.5, 1.0)


def lowest(value: Callable[[float], float], low: float, high: float, rounds: int = 12) -> float:
    """Where a function with one valley is lowest, by thirds."""
    for _ in range(rounds):
        third = (high - low) / 3
        if value(low + third) < value(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def host_us(folder: Path) -> float:
    """The host's time for a launch: a layer in slices over how often it launches, where tokens do not change it."""
    table = [r for r in rows(folder, PREFILL) if r["model"].startswith("Mixtral") and int(r["prompt_len"]) <= FEW]
    found = []
    for row in table:
        tokens = int(row["prompt_len"])
        text = MIXTRAL.text.replace("shard f over tp", f"shard f over tp\n    split t at {tokens // 2}")
        halves = dataclasses.replace(MIXTRAL, text=text)
        found.append(MIXTRAL.measured_us(row, "tokenweave_ms") / halves.plan(tokens).launches)
    return statistics.mean(found)


def text(folder: Path) -> str:
    """The fields as TOML."""
    found = [f"host_us = {host_us(folder):.1f}\nsustained = {sustained(folder):.2f}\n"]
    found += [
        f"[{name}]\nlatency_us = {latency:.1f}\nshare = {share:.3f}\n"
        for name, (latency, share) in fits(folder).items()
    ]
    return "\n".join(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(text(parser.parse_args().folder))
