"""Kernels compiled for a GPU that is not there, and what can be read off the machine code.

Triton compiles for any target on any machine: the wheel brings the assembler and the disassembler, and no driver is
asked. So the registers a kernel needs, the shared memory, how many blocks fit on a multiprocessor, and whether products
became asynchronous tensor-core instructions are known before a kernel runs; a candidate that spills or is serialized is
dropped without a measurement.

    facts(requests, "sm_90")                 a list: StaticFacts, or Failure with the compiler's words
    facts(requests, "sm_90", python=path)    the same with the Triton of another environment
    compile_offline(request, "sm_90")        in this process

`facts` compiles in child processes: a compiler that crashes or hangs costs one kernel, `TRITON_INTERPRET` may be set in
this process, and `python` may be an interpreter with another version of Triton. A child runs this very file:

    python -m cascade.backends.triton.offline < requests > answers

One request a line, `{"arch": "sm_90", "request": {...}}` with the fields of `Request`; one answer a line, the fields of
`StaticFacts` under "facts" or the words of a `Failure` under "failure". The file needs Triton and the standard library,
nothing else of cascade: neither torch nor the frontend need be in that environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import linecache
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

Constant: TypeAlias = int | float | bool | str | None

LONGEST = 2000  # characters of a failure: the assembler repeats itself for every line it refuses
WARP = 32
SUBPARTITIONS = 4  # of a multiprocessor; each has its quarter of the registers


@dataclass(frozen=True, slots=True)
class Request:
    """One kernel to compile.

    `source` is the text of a module that imports `triton` and `triton.language` only; `kernel` is the name of a jit
    function in it. Every argument of the kernel is either in `types`, as a pair of its name and a Triton type
    ("*bf16", "i32", "fp32", "tensordesc<bf16[1,1,64,128]>"), or in `constants`, as a pair of its name and the value of
    the `tl.constexpr`. `aligned` names the pointers and integers that are divisible by 16.
    """

    source: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...] = ()
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class StaticFacts:
    """What the compiled kernel shows without being run; instructions are counted as written, not as executed.

    `registers` is per thread; `spills` is the bytes of local memory per thread, 0 unless registers overflow;
    `shared_bytes` is per block; `blocks_per_sm` is how many blocks fit on a multiprocessor at once, 0 if none does.
    `serialized` are the codes with which the assembler tells that it waits for every asynchronous product ("C7511").
    """

    registers: int
    spills: int
    shared_bytes: int
    blocks_per_sm: int
    num_warps: int  # of a block, with those that the compiler added
    wgmma: int  # asynchronous products of a warpgroup
    mma: int  # synchronous products of a warp
    mma_f64: int  # those in f64
    waits: int  # for asynchronous products
    tma_loads: int
    tma_stores: int
    async_copies: int  # from global to shared memory through pointers
    wide_loads: int  # 16 bytes a thread from global memory
    wide_stores: int
    shared_loads: int
    shared_stores: int
    exp2: int
    instructions: int
    serialized: tuple[str, ...]
    triton: str  # the version


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a kernel has no facts: the compiler's words, or that it crashed or took too long."""

    message: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What a multiprocessor has for its blocks; bytes, 32-bit registers, threads."""

    shared: int
    shared_per_block: int
    shared_reserved: int  # by the system, for each block
    registers: int
    threads: int
    blocks: int


LIMITS = {
    "sm_80": Limits(167_936, 166_912, 1024, 65_536, 2048, 32),
    "sm_90": Limits(233_472, 232_448, 1024, 65_536, 2048, 32),
}

COUNTED = {
    "wgmma": r"[HQI]GMMA",
    "mma": r"[HIDQ]MMA",
    "mma_f64": r"DMMA",
    "waits": r"WARPGROUP\.DEPBAR",
    "tma_loads": r"UTMALDG",
    "tma_stores": r"UTMASTG",
    "async_copies": r"LDGSTS",
    "wide_loads": r"LDG\.[\w.]*\b128\b",
    "wide_stores": r"STG\.[\w.]*\b128\b",
    "shared_loads": r"LDSM?\b",
    "shared_stores": r"STSM?\b",
    "exp2": r"MUFU\.EX2",
}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)", re.M)


def blocks_per_sm(arch: str, shared_bytes: int, registers: int, num_warps: int) -> int:
    """How many blocks of `num_warps` warps fit on a multiprocessor; 0 if not even one does.

    Registers are given out per warp, 8 per thread at a time, from the quarter of the multiprocessor the warp is on.
    """
    limits = limits_of(arch)
    if shared_bytes > limits.shared_per_block:
        return 0
    per_warp = WARP * -(-max(registers, 1) // 8) * 8
    warps = limits.registers // SUBPARTITIONS // per_warp * SUBPARTITIONS
    shared = -(-(shared_bytes + limits.shared_reserved) // 128) * 128
    return min(limits.shared // shared, warps // num_warps, limits.threads // (WARP * num_warps), limits.blocks)


def limits_of(arch: str) -> Limits:
    """The limits of an architecture by its name, "sm_80" or "sm_90"; ValueError for others."""
    if arch not in LIMITS:
        raise ValueError(f"nothing is known of {arch!r}; there are {', '.join(LIMITS)}")
    return LIMITS[arch]


def compile_offline(request: Request, arch: str = "sm_90") -> StaticFacts:
    """The facts of one kernel, compiled in this process; not for several threads at once.

    Raises what Triton raises where it cannot compile (RuntimeError, CompilationError and others), RuntimeError in a
    process that interprets its kernels, and ValueError for a request that does not fit its kernel.
    """
    limits_of(arch)
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set in this process, so it cannot compile; `facts` can")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", int(arch.removeprefix("sm_")), WARP)
    function = jit_function(request)
    source = compiler.ASTSource(function, *parts(request, function))
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages, "enable_fp_fusion": True}
    knobs, log = triton.knobs, io.StringIO()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cascade-offline-"))
        for group in (knobs.nvidia, knobs.cache):
            stack.enter_context(group.scope())
        stack.enter_context(contextlib.redirect_stdout(log))
        # An empty cache: what is cached is not assembled again, and then there is no log to read.
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        kernel = triton.compile(source, target=target, options=options)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read(arch, code, log.getvalue(), kernel.metadata, triton.__version__)


def jit_function(request: Request) -> Any:
    """The jit function that the request names, made from its text."""
    # Triton asks for the source lines of a function; the text is no file, so it is entered where they are looked up.
    digest = hashlib.sha256(request.source.encode()).hexdigest()[:16]
    name = f"<kernel {digest}>"
    linecache.cache[name] = (len(request.source), None, request.source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": f"kernel_{digest}"}
    exec(compile(request.source, name, "exec"), namespace)
    function = namespace.get(request.kernel)
    if not hasattr(function, "arg_names"):
        raise ValueError(f"the source defines no jit function {request.kernel!r}")
    return function


def parts(request: Request, function: Any) -> tuple[dict[str, str], dict[tuple[int], Constant], dict[Any, Any]]:
    """The signature, the constants and the attributes of the arguments, as Triton takes them."""
    names, types, constants = list(function.arg_names), dict(request.types), dict(request.constants)
    given = [*types, *constants]
    if sorted(given) != sorted(names):
        raise ValueError(f"{request.kernel} takes {', '.join(names)}; the request gives {', '.join(given)}")
    return (
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in request.aligned},
    )


def read(arch: str, code: str, log: str, metadata: Any, version: str) -> StaticFacts:
    """The facts in the disassembly and in the log of the assembler."""
    operations = Counter(match["op"] for match in INSTRUCTION.finditer(code))
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    counted = {
        name: sum(count for operation, count in operations.items() if re.match(form, operation))
        for name, form in COUNTED.items()
    }
    return StaticFacts(
        registers=registers,
        spills=max(map(int, re.findall(r"(\d+) bytes stack frame", log))),
        shared_bytes=metadata.shared,
        blocks_per_sm=blocks_per_sm(arch, metadata.shared, registers, metadata.num_warps),
        num_warps=metadata.num_warps,
        **counted,
        instructions=operations.total(),
        serialized=tuple(sorted(set(re.findall(r"C75\d\d", log)))),
        triton=version,
    )


def facts(
    requests: Iterable[Request],
    arch: str = "sm_90",
    python: str | Path = sys.executable,
    jobs: int | None = None,
    seconds: float = 60.0,
) -> list[StaticFacts | Failure]:
    """The facts of every kernel, in the order of the requests; a `Failure` for each that does not compile.

    At most `jobs` child processes run (as many as there are processors, if None), each with the interpreter `python`,
    in whose environment Triton must be. A kernel that takes longer than `seconds` is given up. Raises ValueError for an
    unknown `arch` and nothing for a kernel.
    """
    limits_of(arch)
    wanted = list(requests)
    workers = max(min(jobs or os.cpu_count() or 1, len(wanted)), 1)
    idle: queue.SimpleQueue[Child] = queue.SimpleQueue()

    def answer(request: Request) -> StaticFacts | Failure:
        child = idle.get()
        try:
            return child.ask(request, arch, seconds)
        finally:
            idle.put(child)

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(contextlib.closing(Child(python))))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        return list(pool.map(answer, wanted))


class Child:
    """A process that compiles one kernel after another; started when it is first asked, and again after a crash."""

    def __init__(self, python: str | Path) -> None:
        # `-u TRITON_INTERPRET`: a process that has it cannot compile. `-P`: the modules beside this file have names
        # of their own and are not to be found by Triton.
        self.command = ["env", "-u", "TRITON_INTERPRET", str(python), "-P", str(Path(__file__).resolve())]
        self.process: subprocess.Popen[str] | None = None
        self.complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see `close`

    def ask(self, request: Request, arch: str, seconds: float) -> StaticFacts | Failure:
        """What the child answers; a `Failure` if it ends, or if it is killed after `seconds` without an answer."""
        question = json.dumps({"arch": arch, "request": dataclasses.asdict(request)})
        mark = self.complaints.seek(0, io.SEEK_END)
        try:
            process = self.process = self.process or self.start()
        except OSError as error:
            return Failure(f"no compiler: {error}")
        began = time.monotonic()
        timer = threading.Timer(seconds, kill, [process])
        timer.start()
        try:
            answer = exchange(process, question)
        finally:
            timer.cancel()
        if answer:
            return found(json.loads(answer), errors(self.complaints, mark))
        late = time.monotonic() - began >= seconds
        reason = f"no answer within {seconds:g} s" if late else f"the compiler ended with code {process.wait()}"
        self.stop()
        return Failure("\n".join((reason, *errors(self.complaints, mark))))

    def start(self) -> subprocess.Popen[str]:
        """A new process, in a session of its own so that the assembler it starts ends with it."""
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            encoding="utf-8",
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ends the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            kill(process)
            with contextlib.suppress(OSError):  # what could not be written to it is of no use any more
                process.communicate()

    def close(self) -> None:
        """Ends the process and forgets what it complained of."""
        self.stop()
        self.complaints.close()


def found(answer: dict[str, Any], complaints: Iterable[str]) -> StaticFacts | Failure:
    """The answer of a child, as a value."""
    if "facts" in answer:
        return StaticFacts(**{name: hashable(value) for name, value in answer["facts"].items()})
    return Failure("\n".join((answer["failure"], *complaints)))


def exchange(process: subprocess.Popen[str], question: str) -> str:
    """The line with which the process answers a line; empty if it is no longer there."""
    if process.stdin is None or process.stdout is None:
        return ""
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""


def kill(process: subprocess.Popen[str]) -> None:
    """Ends the process and those it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def errors(complaints: IO[str], mark: int) -> list[str]:
    """The first errors that were written from the mark on: MLIR says there what is wrong, the exception does not."""
    complaints.seek(mark)
    lines = dict.fromkeys(line.strip() for line in complaints)
    return [line for line in lines if re.search(r"error|Assertion|No such file", line, re.I)][:3]


def main(lines: Iterable[str], answers: IO[str]) -> None:
    """Answers each line, the JSON of a request, with the JSON of its facts or of its failure."""
    for line in lines:
        answers.write(json.dumps(answered(json.loads(line))) + "\n")
        answers.flush()


def answered(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question; whatever the compiler raises is an answer too."""
    try:
        request = Request(**{name: hashable(value) for name, value in question["request"].items()})
        return {"facts": dataclasses.asdict(compile_offline(request, question["arch"]))}
    except Exception as error:  # Triton raises all kinds, of classes that differ between versions
        return {"failure": f"{type(error).__name__}: {error}"[:LONGEST]}


def hashable(value: Any) -> Any:
    """JSON has lists only; the fields of a request are tuples."""
    return tuple(map(hashable, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


if __name__ == "__main__":
    # The answers have a channel of their own: tools of the compiler may write to standard output.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(sys.stdin, channel)
