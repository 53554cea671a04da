"""Plans on torch.distributed: `cascadec plan --json` makes one anywhere, a `torchrun` program loads and calls it.

import torch.distributed as dist
import cascade.distributed

dist.init_process_group("gloo")
layer = cascade.distributed.load(open("plan.json").read(), kernels=True)
Y = layer(X=x, Wq=wq, ...)["Y"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade.backends.distributed import runtime
from cascade.backends.distributed.runtime import TIMEOUT_S, Loaded
from cascade.compiled import Compiled

__all__ = ["Loaded", "load"]


def load(
    plan: str | Mapping[str, Any],
    timeout_s: float = TIMEOUT_S,
    kernels: bool = False,
    backend: str = "auto",
    effort: str = "none",
) -> Loaded:
    """The program of a plan, given as its JSON, or as text of it, on the ranks of the default process group; a plan for
    one device needs no group.

    No collective waits longer than `timeout_s` seconds. With `kernels`, what a rank computes of a task is a compiled
    cascade of this `backend` and `effort`, as `cascade.compile` has them, and tensors may be on GPUs; else the
    interpreter runs the statements, which is slow and takes whatever the language has. With an effort, the first call
    on a GPU also times what a plan for one device has on sides of it, and the same in a row; it keeps the faster one,
    and `why` says which. Raises CallError: C347 for what is no plan, or one of another version, or whose hash does not
    fit what it says; C348 where the group has another number of ranks, or ranks have different plans. A call raises
    UnsupportedError (C555) where a task has no kernel.
    """
    return runtime.load(
        plan,
        timeout_s,
        (lambda cascade: Compiled(cascade, backend=backend, effort=effort)) if kernels else None,
        timed=effort != "none",
    )
