"""From the text of a cascade to its first result in a process of its own, as JSON: `python -m benchmarks.first NAME`.

PyTorch is loaded when the clock starts, cascade and Triton are not; it stands still while the inputs are made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable

import torch

CASES = {
    "softmax": ("reductions", "table", "softmax 16384"),
    "rmsnorm": ("reductions", "table", "rmsnorm 16384"),
    "matmul": ("products", "table", "matmul 8192 4096"),
    "attention": ("attention", "forward", "causal 4 32 4096 128"),
    "decoder layer": ("layers", "table", "decoder layer"),
    "decoder step": ("layers", "table", "decoder step"),
}
"""By name: the module of `benchmarks`, its function, and how the title of the row begins."""

LAYERS = ("decoder layer", "decoder step")
"""Those of more kernels than one."""


def main() -> None:
    """Prints one line: the seconds to load cascade and Triton, and from there to the first result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--effort", default="none")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    started = time.perf_counter()
    importlib.import_module("cascade.backends.triton.launch")
    loaded = time.perf_counter() - started
    module, make, title = CASES[options.name]
    table = getattr(importlib.import_module(f"benchmarks.{module}"), make)
    workload = next(found for found in table(device, options) if found.name.startswith(title))
    inputs = workload.inputs(torch.Generator(device=device).manual_seed(20))
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    ours = importlib.import_module("benchmarks.ours")
    wait()
    started = time.perf_counter()
    compiled = ours.build(workload.text, options.effort, device.type, workload.options)
    compiled(**inputs)
    wait()
    first = time.perf_counter() - started
    found = compiled(**inputs)
    wait()
    difference = workload.found(found, inputs).double() - (wanted := workload.expected(inputs))
    seconds = {"loaded": loaded, "first": loaded + first}
    print(json.dumps(seconds | {"error": float(difference.norm() / wanted.norm())}))


if __name__ == "__main__":
    main()
