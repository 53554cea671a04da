"""From the text of a cascade to its first result in a process of its own, as JSON: `python -m benchmarks.first NAME`.

PyTorch is loaded and the inputs are on the device when the clock starts; cascade and Triton are not loaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import attention, layers, products, reductions
from benchmarks.workload import Workload

CASES: dict[str, tuple[Callable[[torch.device, Any], Iterator[Workload]], str]] = {
    "softmax": (reductions.table, "softmax 16384"),
    "rmsnorm": (reductions.table, "rmsnorm 16384"),
    "matmul": (products.table, "matmul 8192 4096"),
    "attention": (attention.forward, "causal 4 32 4096 128"),
    "decoder layer": (layers.table, "decoder layer"),
    "decoder step": (layers.table, "decoder step"),
}
LAYERS = ("decoder layer", "decoder step")
"""Those of more kernels than one."""


def main() -> None:
    """Prints one line: the seconds to load cascade, to the first result, and of a second call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--effort", default="none")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    make, title = CASES[options.name]
    workload = next(found for found in make(device, options) if found.name.startswith(title))
    inputs = workload.inputs(torch.Generator(device=device).manual_seed(20))
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    ours = importlib.import_module("benchmarks.ours")
    loaded = time.perf_counter()
    compiled = ours.build(workload.text, options.effort, device.type, workload.options)
    compiled(**inputs)
    wait()
    first = time.perf_counter()
    found = compiled(**inputs)
    wait()
    second = time.perf_counter()
    difference = workload.found(found, inputs).double() - (wanted := workload.expected(inputs))
    seconds = {"loaded": loaded - started, "first": first - started, "second": second - first}
    print(json.dumps(seconds | {"error": float(difference.norm() / wanted.norm())}))


if __name__ == "__main__":
    main()
