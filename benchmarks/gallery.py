"""A gallery: for each of twenty cascades its equations, its passes, its kernels, and its speed beside its peers.

Programs and sizes are those of the tables, passes and kernels are what the compiler says of them on this machine, times
are rows of `results/`. `write` makes the pages, in Markdown; no number is typed in.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kept import OURS, Row, rows
from benchmarks.shown import is_alone, milliseconds
from benchmarks.workload import Workload
from cascade import trial
from cascade.backends.triton.standalone import Subject, standalone
from cascade.frontend.build import parse_cascade
from cascade.inference import bind_sizes
from cascade.ir import Cascade, DType
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.lift import lift_reductions
from cascade.passes.report import report, report_text
from cascade.pipeline import run_pipeline
from cascade.text import render
from cascade.values import FROM_TORCH

DEVICES = ("nvidia-h200", "nvidia-h100-80gb-hbm3")
SHOWN = {
    "attention": ("full 4 32 4096 128", "Attention"),
    "causal-attention": ("causal 2 32/8 8192 128", "Causal attention with grouped heads"),
    "alibi": ("alibi 4 16 8192 128", "ALiBi: a bias by distance"),
    "sliding-window": ("window 1024 4 16 8192 128", "A sliding window"),
    "documents": ("document 1100 4 16 8192 128", "Documents packed into one sequence"),
    "softcap": ("softcap 4 16 8192 128", "Bounded scores"),
    "prefix": ("prefix 2048 4 16 8192 128", "A prefix that everything sees"),
    "differential": ("differential attention causal 4 16 4096 128", "Differential attention"),
    "sigmoid": ("sigmoid attention causal 4 16 4096 128", "Sigmoid attention"),
    "decode": ("decode ragged 32 32/8 16384 128", "One query, a ragged batch"),
    "softmax": ("softmax 16384 8192", "Softmax"),
    "entropy": ("entropy 8192 32768", "Entropy of a softmax"),
    "divergence": ("kl 8192 32768", "Divergence of two softmaxes"),
    "layernorm": ("layernorm 16384 8192", "LayerNorm"),
    "cumulative-sum": ("cumulative sum 16384 8192", "A cumulative sum"),
    "routing": ("softmax top-8 65536 256", "Softmax, top 8, renormalise"),
    "gelu": ("matmul+bias+gelu 8192 4096 4096", "A product, a bias, a gelu"),
    "rmsnorm-linear": ("rmsnorm, linear 8192 4096 4096", "RMSNorm and a linear layer"),
    "cross-entropy": ("linear, cross-entropy 8192 4096 128256", "A linear layer and its cross-entropy"),
    "experts": ("top-6 of 64 experts 8192 2048 1408", "A mixture of experts"),
}
"""Pages by their name: the row that was measured, and a title."""


@dataclass(frozen=True)
class Entry:
    """One cascade: what it is, what is known of it, its kernels, what was measured."""

    name: str
    title: str
    row: str
    cascade: Cascade
    sizes: Mapping[str, int]
    report: dict[str, Any]
    kernels: dict[str, str]  # the files that `cascadec emit` would write
    measured: tuple[tuple[str, Row | None], ...]  # by device


def entries() -> list[Entry]:
    """All of them, made anew."""
    tables = importlib.import_module("benchmarks.predicting").workloads()
    found = {name: workload for (table, name), workload in tables.items() if table != "model"}
    kept = {device: rows(device) for device in DEVICES}
    return [
        entry(page, title, found[row], tuple((device, kept[device].get(row)) for device in DEVICES))
        for page, (row, title) in SHOWN.items()
    ]


def entry(page: str, title: str, workload: Workload, measured: tuple[tuple[str, Row | None], ...]) -> Entry:
    """What the compiler says of a workload; its inputs are made without memory."""
    cascade = parse_cascade(workload.text)
    with FakeTensorMode():
        inputs = workload.inputs(torch.Generator())
    tensors = {param.name: inputs[param.name] for param in cascade.params}
    sizes = bind_sizes(cascade, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {})
    types = {name: FROM_TORCH[tensor.dtype] for name, tensor in tensors.items()}
    steps = run_pipeline(cascade).steps
    canonical = next(step.after for step in steps if step.name == Canonicalize.name)
    told = report(canonical, lift_reductions(canonical), sizes, DType.BF16)
    highest = functools.partial(trial.highest_values, canonical)
    made = standalone(Subject(canonical, steps[-1].after, sizes, types, highest), descriptors=True)
    return Entry(page, title, workload.name, cascade, sizes, told, made.files, measured)


# --- pages -----------------------------------------------------------------------------------------------------------


def passes(one: Entry) -> str:
    """The ranks that are passed over more than once, as written and lifted: `n: 3 -> 1`."""
    many = [(rank, found) for rank, found in one.report["ranks"].items() if found["plain"] > 1]
    return ", ".join(f"{rank}: {found['plain']} -> {found['lifted']}" for rank, found in many) or "each rank once"


def fenced(kind: str, text: str) -> str:
    """A block of code."""
    return f"```{kind}\n{text.rstrip()}\n```"


def folded(summary: str, body: str) -> str:
    """What a reader opens."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"


def speeds(one: Entry) -> str:
    """A table of milliseconds for each device; what has none says why."""
    lines = ["| device | contender | milliseconds | ours is so many times as fast | from |", "|---|---|---|---|---|"]
    for device, row in one.measured:
        if row is None:
            lines.append(f"| {device} | ours | not measured | | |")
            continue
        here = f"{row.device}, {row.date[:10]}"
        source = f"`{row.source}`"
        if OURS not in row.ms:
            lines.append(f"| {here} | ours | {row.failed.get(OURS, 'not measured')} | | {source} |")
        for name, ms in row.ms.items():
            times = row.times(name)
            ratio = f"{times:.2f}" if times is not None and name != OURS else ""
            called = f"{name}, the product alone" if is_alone(row, name) else name
            lines.append(f"| {here} | {called} | {milliseconds(ms)} | {ratio} | {source} |")
        lines += [f"| {here} | {name} | {why} | | {source} |" for name, why in row.failed.items() if name != OURS]
    return "\n".join(lines)


def page(one: Entry) -> str:
    """The page of one cascade."""
    sizes = ", ".join(f"{symbol} = {size}" for symbol, size in one.sizes.items())
    kernels = [
        folded(f"<code>{name}</code>, {len(text.splitlines())} lines", fenced("py", text))
        for name, text in one.kernels.items()
    ]
    parts = [
        f"# {one.title}",
        fenced("cascade", re.sub(r"^def .*\n+", "", render(one.cascade), flags=re.M)),
        f"Passes over its ranks, as written and lifted: **{passes(one)}**.",
        folded("All that <code>cascadec passes</code> says", fenced("text", report_text(one.report))),
        "## Speed",
        f"bf16, {sizes}: the row `{one.row}` of the tables. Peers ran in the same process and in turns.",
        speeds(one),
        "## Kernels",
        "What `cascadec emit` writes for these sizes, a file for each group of statements. It has the tiles that the "
        "model prefers; those of a call that is timed are tuned.",
        *kernels,
    ]
    return "\n\n".join(parts) + "\n"


def index(every: list[Entry]) -> str:
    """The list of all, with the speed beside the fastest peer of the first device that has one."""
    lines = ["| cascade | passes | ours | the fastest peer | |", "|---|---|---|---|---|"]
    lines += [f"| [{one.title}]({one.name}.md) | {passes(one)} | {beside(one)} |" for one in every]
    toctree = "```{toctree}\n:hidden:\n\n" + "\n".join(one.name for one in every) + "\n```"
    intro = (
        "Twenty cascades, each with its equations, how often it passes over its ranks, the kernel that the compiler "
        "writes, and its speed beside its peers. Made when the site is built: passes and kernels by the compiler, "
        "times from `benchmarks/results`. Where something was not measured, the page says so."
    )
    return "\n\n".join(["# Gallery", intro, "\n".join(lines), toctree]) + "\n"


def beside(one: Entry) -> str:
    """Ours, the fastest peer that computes the same, the device."""
    for _, row in one.measured:
        if row is not None and OURS in row.ms:
            peers = {name: ms for name, ms in row.ms.items() if name != OURS and not is_alone(row, name)}
            best = min(peers, key=peers.__getitem__, default=None)
            theirs = "none was measured" if best is None else f"{milliseconds(peers[best])} ms, {best}"
            return f"{milliseconds(row.ms[OURS])} ms | {theirs} | {row.device.removeprefix('NVIDIA ')}"
    return "not measured | | "


def write(folder: Path) -> list[Entry]:
    """Writes all pages into a folder; what they show."""
    every = entries()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.md"):
        path.unlink()
    for one in every:
        (folder / f"{one.name}.md").write_text(page(one), encoding="utf-8")
    (folder / "index.md").write_text(index(every), encoding="utf-8")
    return every
