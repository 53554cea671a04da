"""Kernels that are compiled before they are launched: in threads, all that will be timed, and failures left to launches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BESIDE = '''
import torch, triton
from triton.backends.compiler import GPUTarget

from cascade.backends.triton.ahead import Wanted, compile_beside
from cascade.backends.triton.launch import module


class Driver:
    """An H200 that is not there: kernels are compiled for it and not launched."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


TEXT = """import triton
import triton.language as tl


@triton.jit
def kernel(X, Y, N, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK != 32)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + n, tl.exp(tl.load(X + n, mask=n < N)), mask=n < N)
"""
triton.runtime.driver.set_active(Driver())
function = module(TEXT, "kernel").kernel
x, y = torch.empty(1000), torch.empty(1000, device="meta")
wanted = [Wanted(function, (9, 1, 1), [x, y, 1000, block], {"num_warps": 4, "num_stages": 2}) for block in (16, 32, 64, 128)]
compile_beside(wanted, 2)
with triton.AsyncCompileMode(None):
    compile_beside(wanted, 2)  # leaves all to launches
compiled = []
function.create_binder()
plain = function.compile
function.compile = lambda src, **more: compiled.append(src.constants) or plain(src, **more)
found = {}
for one in wanted:
    try:
        found[one.arguments[-1]] = function.warmup(*one.arguments, grid=one.grid, **one.options).asm["ptx"].count("ex2")
    except Exception as error:
        found[one.arguments[-1]] = type(error).__name__
print(found, len(compiled))
'''


def test_launches_find_what_was_compiled_and_say_why_something_was_not(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    ran = subprocess.run([sys.executable, "-c", BESIDE], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "{16: 1, 32: 'CompileTimeAssertionFailure', 64: 1, 128: 1} 1", ran.stdout
    assert ran.stderr == ""
