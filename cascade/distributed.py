"""Plans on torch.distributed: `cascadec plan --json` makes one anywhere, a `torchrun` program loads and calls it.

import torch.distributed as dist
import cascade.distributed

dist.init_process_group("gloo")
layer = cascade.distributed.load(open("plan.json").read())
Y = layer(X=x, Wq=wq, ...)["Y"]
"""

from __future__ import annotations

from cascade.backends.distributed.runtime import Loaded, load

__all__ = ["Loaded", "load"]
