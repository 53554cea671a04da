"""Kernels as programs of their own: files that import torch and Triton, launch a kernel and check it.

    rows.py         the text of the kernel, `run(X)`, and under `__main__` a check against plain torch
    stream.py       the same of a kernel by parts, with the kernel that merges them
    block_0.py ...  where there are several groups, a file each; block.py calls them in order and checks the whole

What is in no kernel is a function of the last file, in plain torch. What was planned for some sizes runs for others as
well, as far as nothing of them was compiled in: `run` says what was with a `ValueError`. Pure text: neither torch nor
Triton is imported here.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.backends.triton.alone import Alone, Launch, Unit, unit
from cascade.backends.triton.count import work
from cascade.backends.triton.emit import Argument, wrapped
from cascade.backends.triton.machine import machine_of_arch
from cascade.backends.triton.offline import Failure, Request, StaticFacts
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.joined import Joined
from cascade.backends.triton.restate import restated
from cascade.backends.triton.plan import Kernel, Role
from cascade.backends.triton.planner import Layout, Planner
from cascade.backends.triton.reference import TORCH, Lines, interval, python_names, reference_lines
from cascade.backends.triton.rows import BLOCKS, SORTED
from cascade.backends.triton.spell import HELPERS, PORTABLE
from cascade.backends.triton.static import request
from cascade.backends.triton.tune import QUICK, Compiler, is_clean
from cascade.errors import Diagnostic, UnsupportedError, quoted_list
from cascade.inference import FLOATS, declared_sizes, infer_shapes
from cascade.ir import Cascade, DType, Given, Param, Rank, Read, Result, Size
from cascade.text import render
from cascade.walk import expressions, free_ranks, reads, targets, walk

LONG, WHOLE, FEW = 4096, 128, (2, 4)  # extents that nobody gave: of long ranks, of one whole in a tile, of batches
GUESS = 256  # the extent of every rank when it is asked how the ranks lie
MOST = 2**28  # elements of a tensor that default sizes lead to: the check is to run at once
TOLERANCE = {DType.F8E4M3: 2.0**-1, DType.F8E5M2: 1.0, DType.BF16: 2.0**-5, DType.F16: 2.0**-8}  # eight roundings
FINEST = 1e-4  # the tolerance from float32 on
ALIGNED = 16  # elements: strides of tiles that come by descriptor are multiples of it, or of fewer

POINTS, RAGGED = 3, 144  # extents for the interpreter: of ranks with one coordinate a program, of others

TAKEN = (
    "torch", "triton", "tl", "math", "TensorDescriptor", "run", "reference", "main", "accept", "descriptor",
    "largest_error", "sizes", "grid", "device", "tensor", "there", "body", "ordered", "key", "name", "ours", "wanted",
    "first", "values", "coords", "error", "wrong", "zip", "print", "int", "ValueError", "SystemExit", "sys", "STATIC",
    "BF16", "TORCH_BF16", "inputs", "cuda", "allowed", "results", "moved", "milliseconds", "flops", "rates", "sum",
    "any", "dict", "t", "min", "max", "programs", "keys", "places", "sorted_rows", "tiles_of_rows", "rows_by_value",
    "first_place",
)  # fmt: skip
"""What a file itself calls things; a tensor, rank or symbol of that name is written with a line behind it."""

TORCH_BF16 = "torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16"
TL_BF16 = "tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)"
BF16_OF_TORCH = """# Triton's interpreter multiplies no bf16 matrices: there all that is bf16 is float32.
TORCH_BF16 = {torch}"""
BF16 = f"{BF16_OF_TORCH}\nBF16 = {{tl}}"

ACCEPT = '''
def accept(name, tensor, dtype, shape, units, sizes):
    """Learns the sizes of a tensor; ValueError where it is not what the kernels were compiled for."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, compiled for {dtype}")
    if tensor.dim() != len(shape):
        raise ValueError(f"{name} has {tensor.dim()} dimensions, compiled for {len(shape)}")
    for d, (size, extent) in enumerate(zip(shape, tensor.shape)):
        here = f"{name} has extent {extent} in dimension {d}"
        if extent == 0:
            raise ValueError(f"{here}, nothing to compute")
        if size in STATIC and extent != STATIC[size]:
            raise ValueError(f"{here}, compiled for {size} = {STATIC[size]}: emit another file with -s {size}={extent}")
        if extent != (size if isinstance(size, int) else sizes.setdefault(size, extent)):
            raise ValueError(f"{here}, where {f'{size} is {sizes[size]}' if size in sizes else f'it is {size}'}")
        if d in units and extent > 1 and tensor.stride(d) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(d)} in dimension {d}, compiled for 1 (.contiguous())")
'''

DESCRIPTOR = '''
def descriptor(name, tensor, block):
    """The TMA descriptor of a tensor for such blocks; dimensions of one coordinate stand in front."""
    order = sorted(range(len(block)), key=lambda d: block[d] > 1)
    unit = 16 // tensor.element_size()  # strides are multiples of 16 bytes
    strides = [tensor.stride(d) if tensor.shape[d] > 1 or d == order[-1] else unit for d in order]
    if tensor.data_ptr() % 16 or any(stride % unit for stride in strides[:-1]):
        raise ValueError(
            f"{name} has strides {tensor.stride()} at address {tensor.data_ptr()}: TMA needs multiples of {unit} "
            "elements and of 16 bytes; pad the rows, or emit another file for these sizes"
        )
    return TensorDescriptor(tensor, [tensor.shape[d] for d in order], strides, [block[d] for d in order])
'''

LARGEST_ERROR = '''
def largest_error(ours, wanted):
    """The largest error, in parts of the element or, where that is more, of the root mean square of its row."""
    if not ours.is_floating_point():
        return float((ours != wanted).any())
    least = torch.finfo(ours.dtype).tiny  # below it fewer bits are kept
    ours, wanted = ours.double(), wanted.double()
    finite = wanted.where(wanted.isfinite(), 0)
    scale = finite.abs().maximum(finite.square().mean(-1, keepdim=True).sqrt()).clamp(min=least)
    same = (ours == wanted) | (ours.isnan() & wanted.isnan())
    error = ((ours - wanted).abs() / scale).masked_fill(same, 0)
    return float(error.nan_to_num(nan=math.inf).max())
'''


@dataclass(frozen=True, slots=True)
class Emitted:
    """One kernel: its file, its plan, what the offline compiler is asked, and the values of its symbols."""

    file: str
    kernel: Kernel
    grid: dict[str, int]  # programs along each rank
    request: Request
    extents: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Emission:
    """The files, by name, and the kernels in them."""

    files: dict[str, str]
    kernels: tuple[Emitted, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is emitted: the cascade in canonical form and after the pipeline, sizes, types of the parameters.

    `highest` tells, for sizes, the largest value of each integer parameter that indexes or is compared with a rank.
    `products` are the sizes of ranks that kernels have in the place of two, with the sizes of these.
    """

    canonical: Cascade
    final: Cascade
    sizes: Mapping[str, int]
    types: Mapping[str, DType]
    highest: Callable[[Mapping[str, int]], Mapping[str, int]]
    products: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)

    @property
    def extents(self) -> dict[str, int]:
        """The sizes, and those that are products of two."""
        return Joined(self.final, self.products).extents(self.sizes)

    def layouts(self, sizes: Mapping[str, int]) -> dict[str, Layout]:
        """The parameters, contiguous, at some sizes."""
        return {p.name: contiguous([_number(s, sizes) for s in p.shape], self.types[p.name]) for p in self.final.params}

    def planner(self, sizes: Mapping[str, int], descriptors: bool) -> Alone:
        """The planner of kernels that hold for all sizes."""
        return Alone(self.final, sizes, self.layouts(sizes), descriptors, frozenset(sizes), joined=self.products)


def with_facts(subject: Subject, arch: str, compiler: Compiler) -> tuple[Emission, tuple[StaticFacts | Failure, ...]]:
    """The files of a cascade for a GPU, and what the machine code of each kernel shows, in their order.

    A kernel that spills, or whose products wait for each other, has the next tiles of the model's order, as long as
    others of the first few do better; errors are those of `standalone`.
    """
    past: dict[str, int] = {}
    known: dict[Request, StaticFacts | Failure] = {}

    def attempt() -> tuple[Emission, tuple[StaticFacts | Failure, ...]]:
        made = standalone(subject, arch >= "sm_90", past)
        new = [kernel.request for kernel in made.kernels if kernel.request not in known]
        known.update(zip(new, compiler(new, arch), strict=True))
        return made, tuple(known[kernel.request] for kernel in made.kernels)

    for _ in range(QUICK):
        made, found = attempt()
        poor = [kernel.kernel.name for kernel, one in zip(made.kernels, found, strict=True) if not is_clean(one)]
        if not poor:
            return made, found
        past |= {name: past.get(name, 0) + 1 for name in poor}
    past |= dict.fromkeys(poor, 0)
    return attempt()


def standalone(subject: Subject, descriptors: bool = True, past: Mapping[str, int] | None = None) -> Emission:
    """The files of a cascade; with `descriptors` for a device that has TMA.

    Statements that no kernel computes are written as plain torch. Raises `UnsupportedError` where they cannot be, and
    where there is no kernel at all. `past` says, by the name of a kernel, how many of the tiles that the model prefers
    are passed over.
    """
    found = restated(subject.final, subject.sizes, subject.types, {})
    subject = dataclasses.replace(subject, final=found.cascade, products=found.joined.sizes)
    planner = subject.planner(subject.extents, descriptors)
    return _Writer(subject, planner, planner.groups(), past or {}).emission()


def outside(group: Rest, reason: str) -> Diagnostic:
    """What is told of statements that would run outside kernels and that no file holds."""
    message = f"{quoted_list(group.names)} would run outside kernels: {reason}"
    hint = "no file can be written without a kernel, or with a recurrence; call the compiled cascade instead"
    return Diagnostic("C531", message, group.statements[0].span, hint)


def contiguous(shape: Sequence[int], dtype: DType) -> Layout:
    """The layout of a tensor in row-major order on an aligned base."""
    strides = [1] * len(shape)
    for position in range(len(shape) - 2, -1, -1):
        strides[position] = strides[position + 1] * max(shape[position + 1], 1)
    return Layout(tuple(shape), tuple(strides), dtype, True)


def _number(size: Size, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sizes[size]


# --- sizes -----------------------------------------------------------------------------------------------------------


def default_sizes(final: Cascade, types: Mapping[str, DType], given: Mapping[str, int]) -> dict[str, int]:
    """A size for every shape symbol: the given one, else by how its ranks lie in the kernels.

    In kernels with matrix products 128 for a rank that is whole in a tile and 2 or 4 for one of which a program has one
    coordinate; everything else is 4096, and less where a tensor would have more than 2^28 elements.
    """
    symbols = [size for size in dict.fromkeys(declared_sizes(final)) if isinstance(size, str)]
    guess = Subject(final, final, {s: given.get(s, GUESS) for s in symbols}, types, _nothing)
    planner = Planner(final, guess.sizes, guess.layouts(guess.sizes))
    kinds: dict[str, set[str]] = {}
    packed: dict[str, int] = {}
    for group in planner.groups():
        if isinstance(group, Rest):
            continue
        products = planner.products(group)
        for rank, role in planner.roles(group).items():
            size = planner.sizes[rank]
            if isinstance(size, str):
                kinds.setdefault(size, set()).add(role.value if products else "rows")
                if rank in planner.grouped(group):
                    packed[size] = 2 * planner.grouped(group)[rank]
    few = iter(FEW * len(symbols))
    sizes: dict[str, int] = {}
    for symbol in symbols:
        lies = kinds.get(symbol, set())
        short = next(few) if symbol not in given and lies == {Role.POINT.value} else LONG
        sizes[symbol] = given.get(symbol, packed.get(symbol, WHOLE if Role.WHOLE.value in lies else short))
    for symbol in symbols:
        if symbol not in given and symbol not in kinds:
            sizes[symbol] = _reached(symbol, final, sizes) or LONG
    return _limited(final, sizes, [s for s in symbols if s not in given])


def _nothing(sizes: Mapping[str, int]) -> Mapping[str, int]:
    return {}


def _reached(symbol: str, cascade: Cascade, sizes: Mapping[str, int]) -> int:
    """The extent that the indices of a dimension reach; 0 where they are not known."""
    shapes = infer_shapes(cascade)
    ranks = {rank: _number(size, sizes) for rank, size in shapes.ranks.items()}
    found = 0
    for node in (node for stmt in cascade.body for expr in expressions(stmt) for node in walk(expr)):
        if isinstance(node, Read):
            for part, size in zip(node.index, shapes.tensors[node.tensor], strict=True):
                known = interval(part, ranks, sizes) if size == symbol else None
                found = max(found, known[1] + 1 if known else 0)
    return found


def _limited(cascade: Cascade, sizes: dict[str, int], free: Sequence[str]) -> dict[str, int]:
    """The sizes with the largest free ones halved until no tensor is absurdly large."""
    shapes = infer_shapes(cascade)
    spaces: list[tuple[Size, ...]] = [p.shape for p in cascade.params]
    for stmt in cascade.body:
        spaces += [tuple(shapes.ranks[rank] for rank in target.ranks) for target in targets(stmt)]
        for node in (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)):
            if not all(isinstance(part, Rank) for part in node.index):  # the check gathers it
                spaces.append(tuple(shapes.ranks[rank] for rank in free_ranks(node)))
    for space in spaces:
        while (count := _elements(space, sizes)) > MOST:
            longest = max((s for s in space if s in free), key=lambda s: sizes[str(s)], default=None)
            if longest is None or sizes[str(longest)] <= GUESS:
                break
            assert count > 0
            sizes[str(longest)] //= 2
    return sizes


def _elements(space: Sequence[Size], sizes: Mapping[str, int]) -> int:
    count = 1
    for size in space:
        count *= _number(size, sizes)
    return count


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Outside:
    """Statements that no kernel computes: a function of the file that calls the kernels, in plain torch."""

    name: str
    rest: Rest
    inputs: tuple[str, ...]
    stored: tuple[str, ...]
    lines: Lines


@dataclass(slots=True, eq=False)
class _Writer:
    subject: Subject
    planner: Alone
    groups: Sequence[Group | Rest]
    past: Mapping[str, int]
    program: str = field(init=False)  # the name of the file that checks everything
    names: dict[str, str] = field(init=False)
    steps: list[Unit | _Outside] = field(init=False)
    widened: bool = field(init=False)  # whether bf16 is float32 in Triton's interpreter

    def __post_init__(self) -> None:
        final, canonical = self.subject.final, self.subject.canonical
        self.program = python_names([final.name], {*TAKEN, *HELPERS})[final.name]
        modules = [f"{self.program}_{number}" for number in range(len(self.groups))]
        labels = [self.program] if len(self.groups) == 1 else modules
        planned = [self.planned(label, group) for label, group in zip(labels, self.groups, strict=True)]
        self.refuse_none(planned)
        launches = [one for step in planned if isinstance(step, Unit) for one in step.launches]
        words = [p.name for p in final.params] + [name for group in self.groups for name in group.names]
        words += [target.name for stmt in canonical.body for target in targets(stmt)]
        words += [*infer_shapes(canonical).ranks, *self.subject.extents]
        words += [tensor.name for one in launches for tensor in one.made]
        words += [symbol for step in planned if isinstance(step, Unit) for symbol in step.counted]
        words += [word for one in launches if (rows := one.kernel.rows) for word in (rows.symbol, *rows.tables)]
        functions = re.findall(r"^def (\w+)", "\n".join(one.source.text for one in launches), re.M)
        outside = [f"outside_{number}" for number in range(len(self.groups))]
        self.names = python_names(words, {*TAKEN, self.program, *modules, *functions, *outside})
        self.widened = any(_multiplies_bf16(one) for one in launches)
        self.steps = [
            step if isinstance(step, Unit) else self.outside(f"outside_{number}", self.groups[number], step)
            for number, step in enumerate(planned)
        ]

    # --- what there is ------------------------------------------------------------------------------------------------

    def planned(self, label: str, group: Group | Rest) -> Unit | Rest:
        """The kernels of a group, or why there are none."""
        if isinstance(group, Rest):
            return group
        machine = machine_of_arch("sm_90" if self.planner.descriptors else "sm_80")
        try:
            return unit(label, self.planner, group, self.groups, machine, self.elsewhere, self.past)
        except UnsupportedError as error:
            return Rest(group.statements, error.diagnostics[0].message)

    def elsewhere(self, changed: Mapping[str, int]) -> Alone:
        """The planner where some sizes are others."""
        return self.subject.planner({**self.subject.extents, **changed}, self.planner.descriptors)

    def refuse_none(self, planned: Sequence[Unit | Rest]) -> None:
        """Files without a kernel are none."""
        found = [outside(step, step.reason) for step in planned if isinstance(step, Rest)]
        if len(found) == len(planned):
            raise UnsupportedError(found)

    def outside(self, name: str, group: Group | Rest, rest: Rest) -> _Outside:
        """Statements outside kernels as a function."""
        made = group.names
        inputs = tuple(dict.fromkeys(n for stmt in rest.statements for n in reads(stmt) if n not in made))
        stored = self.planner.stored(group, self.groups)
        shapes, dtypes = self.planner.shapes, self.planner.dtypes
        known = {result.name: result for result in self.subject.final.results}
        params = tuple(Param(n, dtypes[n], shapes[n]) for n in inputs)
        results = tuple(known.get(n, Result(n, None, shapes[n])) for n in stored)
        given = tuple(Given(rank, size) for rank, size in self.planner.sizes.items())
        part = Cascade(name, params, results, rest.statements, given=given)
        types = {param: dtypes[param] for param in inputs}
        try:
            lines = reference_lines(part, types, self.subject.sizes, self.names)
        except UnsupportedError as error:
            raise UnsupportedError(outside(rest, rest.reason)) from error
        return _Outside(name, rest, inputs, stored, lines)

    @property
    def units(self) -> list[Unit]:
        """The steps that are kernels."""
        return [step for step in self.steps if isinstance(step, Unit)]

    def emission(self) -> Emission:
        """Every file."""
        checks = [*self.reference(), LARGEST_ERROR.strip("\n"), *self.main()]
        alone = len(self.steps) == 1
        files: dict[str, str] = {}
        for one in self.units:
            inputs = self.inputs(one)
            blocks = [self.head(one), ACCEPT.strip("\n")]
            if _described(one):
                blocks.append(DESCRIPTOR.strip("\n"))
            blocks.append("\n".join(self.launcher(one, inputs)))
            files[f"{one.name}.py"] = _joined([*blocks, *(checks if alone else ())])
        if not alone:
            rests = ["\n".join(self.plain(step)) for step in self.steps if isinstance(step, _Outside)]
            files[f"{self.program}.py"] = _joined([self.driver_head(), *rests, "\n".join(self.driver()), *checks])
        kernels = [self.emitted(one, launch) for one in self.units for launch in one.launches]
        return Emission(files, tuple(kernels))

    def emitted(self, one: Unit, launch: Launch) -> Emitted:
        """What is told of a kernel."""
        extents = launch.extents
        count = {axis.rank: -(-_number(axis.extent, extents) // axis.advance) for axis in launch.kernel.grid}
        strides = {}
        for tensor in launch.kernel.tensors:
            strides[tensor.name] = contiguous([_number(s, extents) for s in tensor.shape], tensor.dtype).strides
        asked = request(launch.kernel, launch.source, strides)
        general = "".join(re.findall(r"do_not_specialize=\[(.*?)\]", launch.source.text))
        sizes = (a for a in launch.source.arguments if a.kind == "size" and f'"{a.name}"' not in general)
        aligned = (size.name for size in sizes if extents[size.symbol] % 16 == 0)  # Triton compiles these as such
        asked = dataclasses.replace(asked, aligned=(*asked.aligned, *aligned))
        return Emitted(f"{one.name}.py", launch.kernel, count, asked, extents)

    def inputs(self, one: Unit) -> list[str]:
        """The tensors that a group reads, in the order of the declaration, then as they are made."""
        if len(self.steps) == 1:
            return [param.name for param in self.subject.final.params]
        order = [p.name for p in self.subject.final.params] + [n for group in self.groups for n in group.names]
        made = {tensor.name for launch in one.launches for tensor in launch.made}
        used = {tensor.name for launch in one.launches for tensor in launch.kernel.tensors} - made
        return [name for name in order if name in used]

    def stored(self, one: Unit) -> list[str]:
        """What a group leaves: results of the cascade, where it is the only one, in their order."""
        if len(self.steps) == 1:
            return [result.name for result in self.subject.final.results]
        return list(self.planner.stored(one.group, self.groups))

    # --- a file of kernels -------------------------------------------------------------------------------------------

    def head(self, one: Unit) -> str:
        """The equations, the imports, and the text of the kernels."""
        imports = ["import torch", "import triton", "import triton.language as tl"]
        if _described(one):
            imports.append("from triton.tools.tensor_descriptor import TensorDescriptor")
        if len(self.steps) == 1:
            imports = ["import math", "import sys", "", *imports]
        plain, titles, bodies = "\nimport triton\nimport triton.language as tl\n", [], []
        known: set[str] = set()
        for launch in one.launches:
            title, body = launch.source.text.split(plain, 1)
            for name, text in HELPERS.items():
                if f"\n{text}" in body:
                    body = body.replace(f"\n{text}\n", "") if name in known else body
                    known.add(name)
                    body = body.replace(text, f"{text}\n\n{PORTABLE[name]}") if name in PORTABLE else body
            titles.append(title.strip().strip('"').strip("\n"))
            bodies.append(body.strip("\n"))
        if any(launch.kernel.rows for launch in one.launches):
            bodies = [*(text.split("\n\n\n", 1)[1].strip("\n") for text in (SORTED, BLOCKS)), *bodies]
        if len(titles) > 1:
            titles.insert(0, f"{one.name}, in {len(titles)} kernels that run one after the other")
        title = "\n\n".join(titles).rstrip()
        top = "\n".join([f'"""{title}', '"""', "", *imports])
        if self.widened:
            named = BF16 if any("tl.bfloat16" in body for body in bodies) else BF16_OF_TORCH
            said = named.format(torch=TORCH_BF16, tl=TL_BF16)
            bodies = [said, *(body.replace("tl.bfloat16", "BF16") for body in bodies)]
        return _joined([top, *bodies]).rstrip("\n")

    def launcher(self, one: Unit, inputs: Sequence[str]) -> Iterator[str]:
        """`run`: checks, allocates, launches."""
        given = {size for name in inputs for size in self.planner.shapes[name]}
        needed = self.needed(one)
        loose = [symbol for symbol in self.subject.sizes if symbol not in given]  # only a keyword tells them
        if len(self.steps) > 1:
            loose = [symbol for symbol in loose if symbol in needed and symbol not in one.static]
        words = [self.names[name] for name in inputs]
        static = [f'"{symbol}": {one.static[symbol]}' for symbol in self.subject.sizes if symbol in one.static]
        yield f"STATIC = {{{', '.join(static)}}}{'  # sizes that are numbers in the kernels' if static else ''}"
        yield from ("", "")
        yield from wrapped("def run(", [*words, *(["*"] if loose else []), *map(self.name, loose)], "):")
        yield from self.described(one, inputs, loose)
        yield "    sizes = dict(STATIC)" if static else "    sizes = {}"
        for symbol in loose:
            if symbol in one.static:
                word = self.name(symbol)
                message = f"{symbol} is {{{word}}}, compiled for {one.static[symbol]}: emit another file"
                yield f"    if {word} != {one.static[symbol]}:"
                yield f'        raise ValueError(f"{message} with -s {symbol}={{{word}}}")'
            else:
                yield f'    sizes["{symbol}"] = {self.name(symbol)}'
        yield from self.accepted(one, inputs)
        if len(inputs) > 1:
            yield f"    if any(tensor.device != {words[0]}.device for tensor in {_tuple(words[1:])}):"
            yield '        raise ValueError("the tensors are on different devices")'
        if told := [symbol for symbol in needed if symbol not in loose]:
            left = ", ".join(map(self.name, told)) + ("," if len(told) == 1 else "")
            yield f"    {left} = (sizes[key] for key in {_tuple([_quoted(symbol) for symbol in told])})"
        for symbol, longest in one.longest.items():
            if symbol in needed and symbol not in one.static:
                word = self.name(symbol)
                message = f"{symbol} is {{{word}}}, {longest} at most: a program holds all of it; emit another file"
                yield f"    if {word} > {longest}:"
                yield f'        raise ValueError(f"{message} with -s {symbol}={{{word}}}")'
        for tie in one.ties:
            extent, dimension = self.name(tie.extent), self.name(tie.dimension)
            message = f"{tie.extent} is {{{extent}}}: {tie.by} for each of {tie.dimension}, which is {{{dimension}}}"
            yield f"    if {extent} > {tie.by} * {dimension}:"
            yield f'        raise ValueError(f"{message}, at most")'
        yield from self.counted(one)
        device = f"{words[0]}.device" if words else '"cuda"'
        yield from self.allocated(one, device)
        yield f"    with torch.cuda.device_of({self.names[one.launches[-1].made[0].name]}):"
        for launch in one.launches:
            yield from self.launch(one, launch)
        yield f"    return {', '.join(self.names[name] for name in self.stored(one))}"

    def accepted(self, one: Unit, inputs: Sequence[str]) -> Iterator[str]:
        """The checks of the tensors, from which the sizes are learned."""
        for name in inputs:
            shape = _tuple([_quoted(s) if isinstance(s, str) else str(s) for s in self.planner.shapes[name]])
            found = [t for launch in one.launches for t in launch.kernel.tensors if t.name == name]
            units = {d for tensor in found for d, stride in enumerate(tensor.strides) if stride == 1}
            dtype = found[0].dtype if found else self.subject.types[name]
            places = _tuple(list(map(str, sorted(units))))
            yield f'    accept("{name}", {self.names[name]}, {self.torch(dtype)}, {shape}, {places}, sizes)'

    def needed(self, one: Unit) -> list[str]:
        """The symbols of the cascade that launches mention."""
        used: set[Size] = {extent for extent, _ in one.counted.values()}
        used |= {symbol for tie in one.ties for symbol in (tie.extent, tie.dimension)}
        for launch in one.launches:
            used |= {size for tensor in launch.made for size in tensor.shape}
            used |= {extent for extent, _ in launch.source.grid}
            used |= {argument.symbol for argument in launch.source.arguments if argument.kind == "size"}
            used |= {launch.kernel.rows.values} if launch.kernel.rows else set()
            used |= {axis.extent for axis in launch.wholes.values() if axis.extent not in one.static}
        for product, sizes in self.products(one).items():
            used |= {product, *sizes}
        return [symbol for symbol in self.subject.sizes if symbol in used]

    def products(self, one: Unit) -> dict[str, tuple[Size, Size]]:
        """The sizes that are products of two, of those that the kernels of a file have."""
        axes = {axis.extent for launch in one.launches for axis in launch.kernel.axes}
        return {symbol: sizes for symbol, sizes in self.subject.products.items() if symbol in axes}

    def counted(self, one: Unit) -> Iterator[str]:
        """The sizes that only the kernels know."""
        for product, sizes in self.products(one).items():
            yield f"    {self.name(product)} = {' * '.join(map(self.name, sizes))}"
            if product in one.static:
                message = (
                    f"{' * '.join(map(str, sizes))} is {{{self.name(product)}}}, compiled for {one.static[product]}"
                )
                yield f"    if {self.name(product)} != {one.static[product]}:"
                yield f'        raise ValueError(f"{message}: emit another file")'
        for symbol, (extent, tile) in one.counted.items():
            if tile:
                yield f"    {self.name(symbol)} = triton.cdiv({self.name(extent)}, {tile})"
            else:
                yield f"    {self.name(symbol)} = {extent}  # programs that share a stream"

    def allocated(self, one: Unit, device: str) -> Iterator[str]:
        """Everything that the kernels write."""
        for tensor in (tensor for launch in one.launches for tensor in launch.made):
            shape = ", ".join(map(self.name, tensor.shape))
            kind = self.torch(tensor.dtype)
            yield f"    {self.names[tensor.name]} = torch.empty([{shape}], dtype={kind}, device={device})"

    def launch(self, one: Unit, launch: Launch) -> Iterator[str]:
        """The grid, and the call of the kernel."""
        source = launch.source
        yield from self.in_order(launch)
        counts = [
            self.name(extent) if tile == 1 else f"triton.cdiv({self.name(extent)}, {tile})"
            for extent, tile in source.grid
        ]
        tiles = " * ".join(counts) or "1"
        if source.resident:
            where = self.names[one.launches[-1].made[0].name]
            yield "        # as many programs as run at a time go through all tiles; without a GPU a few"
            found = f"torch.cuda.get_device_properties({where}.device).multi_processor_count"
            yield f"        programs = {source.resident} * ({found} if {where}.is_cuda else 4)"
            tiles = f"min(programs, {tiles})"
        yield f"        {source.kernel}[({tiles},)]("
        line = ""
        for argument in source.arguments:
            text = self.argument(one, launch, argument)
            if argument.kind == "descriptor" or len(line) + len(text) > 90:
                if line:
                    yield f"            {line.rstrip()}"
                line = ""
            line += f"{text}, "
            if argument.kind == "descriptor":
                yield f"            {line.rstrip()}"
                line = ""
        if line:
            yield f"            {line.rstrip()}"
        yield f"            num_warps={source.num_warps}, num_stages={source.num_stages},"
        yield "        )"

    def in_order(self, launch: Launch) -> Iterator[str]:
        """The tables of a kernel whose rows are sorted by an index: nothing of them is known here but a bound."""
        rows = launch.kernel.rows
        if rows is None:
            return
        index, values, symbol = self.names[rows.index.name], self.name(rows.values), self.names[rows.symbol]
        tables = [self.names[table] for table in rows.tables]
        yield f"        keys, places = sorted_rows({index}, {values})"
        yield f"        {symbol} = {rows.tile} * (len(places) // {rows.tile} + min({values}, len(places)))"
        for table, size in zip(tables, (symbol, f"{symbol} // {rows.tile}", "2"), strict=True):
            yield f"        {table} = torch.empty({size}, dtype=torch.int32, device={index}.device)"
        yield f"        tiles_of_rows(keys, places, {', '.join(tables)}, {values}, {rows.tile})"

    def argument(self, one: Unit, launch: Launch, argument: Argument) -> str:
        """What a launch gives for an argument of the kernel."""
        tensor = self.names.get(argument.tensor, argument.tensor)
        match argument.kind:
            case "descriptor":
                return f'descriptor("{argument.tensor}", {tensor}, [{", ".join(map(str, argument.box))}])'
            case "pointer":
                return tensor
            case "stride":
                return f"{tensor}.stride({argument.position})"
            case "size":
                return self.name(argument.symbol)
            case _:
                axis = launch.wholes.get(argument.name)
                if axis is None or axis.extent in one.static or axis.extent not in self.subject.extents:
                    return f"{argument.name}={argument.value}"
                return f"{argument.name}=triton.next_power_of_2({self.name(axis.extent)})"

    def name(self, size: Size) -> str:
        """A size as it is written."""
        return str(size) if isinstance(size, int) else self.names[size]

    def torch(self, dtype: DType) -> str:
        """An element type as the file writes it."""
        return "TORCH_BF16" if self.widened and dtype is DType.BF16 else TORCH[dtype]

    def described(self, one: Unit, inputs: Sequence[str], loose: Sequence[str]) -> Iterator[str]:
        """The docstring of `run`."""
        yield f'    """{self.summary(inputs, self.stored(one))}'
        yield ""
        free = [s for s in dict.fromkeys(s for n in inputs for s in self.planner.shapes[n]) if isinstance(s, str)]
        free = [symbol for symbol in (*free, *loose) if symbol not in one.static]
        fixed = [f"{symbol} = {size}" for symbol, size in one.static.items()]
        if fixed:
            yield f"    For {', '.join(fixed)}{f' and any {_and(free)}' if free else ''}."
        elif free:
            yield f"    For any {_and(free)}."
        yield "    ValueError for tensors of other types or extents, or that do not lie in memory as the kernels need."
        yield '    """'

    def summary(self, inputs: Sequence[str], results: Sequence[str]) -> str:
        """`O[B,M] of X[B,M] and g[M], all bf16.`"""
        types = {name: self.stored_type(name).value for name in (*inputs, *results)}
        same = len(set(types.values())) == 1

        def shaped(names: Sequence[str]) -> str:
            kinds = [f"{n}[{','.join(map(str, self.planner.shapes[n]))}]" for n in names]
            return _and([kind if same else f"{kind} {types[n]}" for n, kind in zip(names, kinds, strict=True)])

        end = f", {'all ' if len(types) > 2 else ''}{next(iter(types.values()))}" if same and types else ""
        return f"{shaped(results)} of {shaped(inputs) or 'nothing'}{end}."

    def stored_type(self, name: str) -> DType:
        """The type with which a tensor lies in memory."""
        return self.subject.types.get(name) or self.planner.written(name, self.groups).dtype

    # --- several groups ----------------------------------------------------------------------------------------------

    def driver_head(self) -> str:
        """The docstring and the imports of the file that calls everything."""
        text = [f"    {line}".rstrip() for line in render(self.subject.canonical).splitlines()]
        modules = [f"import {one.name}" for one in self.units]
        imports = ["import math", "import sys", "", "import torch", "import triton", "", *modules]
        plural = "the kernel" if len(modules) == 1 else "the kernels"
        title = f'"""{self.subject.final.name}: {plural} in the file{"s" * (len(modules) > 1)} beside this one'
        rest = [name for step in self.steps if isinstance(step, _Outside) for name in step.stored]
        title += f"; {_and(rest)} in plain torch" if rest else ""
        widened = ["", "", BF16_OF_TORCH.format(torch=TORCH_BF16)] if self.widened else []
        return "\n".join([title, "", *text, '"""', "", *imports, *widened])

    def plain(self, step: _Outside) -> Iterator[str]:
        """The function of statements that are in no kernel."""
        lines, types = step.lines, self.planner.dtypes
        given = {size for name in step.inputs for size in self.planner.shapes[name]}
        loose = [symbol for symbol in self.subject.sizes if symbol in lines.sizes and symbol not in given]
        words = [self.names[name] for name in step.inputs]
        yield from wrapped(f"def {step.name}(", [*words, *(["*"] if loose else []), *map(self.name, loose)], "):")
        yield f'    """{self.summary(step.inputs, step.stored)[:-1]}, in plain torch and float64.'
        yield ""
        yield from (f"    {line}" for line in textwrap.wrap(f"In no kernel: {step.rest.reason}.", 110))
        yield '    """'
        yield from self.opened(step.inputs, types, lines, loose)
        results = []
        for name, text in zip(step.stored, lines.results, strict=True):
            atom = text if text.isidentifier() or text.endswith(")") else f"({text})"
            results.append(f"{atom}.to({self.torch(self.stored_type(name))}).contiguous()")
        yield ""
        yield f"    return {', '.join(results)}"

    def opened(
        self, names: Sequence[str], types: Mapping[str, DType], lines: Lines, loose: Sequence[str]
    ) -> Iterator[str]:
        """The lines of a function in plain torch: its tensors in float64, the sizes that it uses, the equations."""
        floats = [self.names[name] for name in names if types[name] in FLOATS]
        if floats:
            yield f"    {', '.join(floats)} = {', '.join(f'{name}.double()' for name in floats)}"
        known: set[str] = set(loose)
        for name in names:
            shape = self.planner.shapes[name]
            fresh = [s for s in shape if isinstance(s, str) and s in lines.sizes and s not in known]
            if fresh:
                parts = [self.name(s) if s in fresh else "_" for s in shape]
                yield f"    {', '.join(parts)}{',' if len(parts) == 1 else ''} = {self.names[name]}.shape"
                known |= set(fresh)
        yield from (f"    {line}" if line else "" for line in lines.lines)

    def driver(self) -> Iterator[str]:
        """`run` of several groups: each takes what those before it made."""
        params = [param.name for param in self.subject.final.params]
        results = [result.name for result in self.subject.final.results]
        given = [size for name in params for size in self.planner.shapes[name]]
        loose = [symbol for symbol in self.subject.sizes if symbol not in given]
        words = [self.names[name] for name in params]
        yield from wrapped("def run(", [*words, *(["*"] if loose else []), *map(self.name, loose)], "):")
        yield f'    """{self.summary(params, results)}"""'
        for step in self.steps:
            if isinstance(step, Unit):
                stored, inputs = self.stored(step), self.inputs(step)
                call, wanted, fixed = f"{step.name}.run(", self.needed(step), set(step.static)
            else:
                stored, inputs = list(step.stored), list(step.inputs)
                call, fixed = f"{step.name}(", set()
                wanted = [symbol for symbol in self.subject.sizes if symbol in step.lines.sizes]
            known = {size for name in inputs for size in self.planner.shapes[name]} | fixed
            more = [f"{self.name(s)}={self.size_of(s, loose)}" for s in wanted if s not in known]
            left = ", ".join(self.names[name] for name in stored)
            for line in wrapped(f"{left} = {call}", [*(self.names[name] for name in inputs), *more], ")"):
                yield f"    {line}"
        yield f"    return {', '.join(self.names[name] for name in results)}"

    def size_of(self, symbol: str, loose: Sequence[str]) -> str:
        """A size as the parameters tell it."""
        if symbol in loose:
            return self.name(symbol)
        places = ((p.name, p.shape.index(symbol)) for p in self.subject.final.params if symbol in p.shape)
        tensor, position = next(places)
        return f"{self.names[tensor]}.shape[{position}]"

    # --- the check ---------------------------------------------------------------------------------------------------

    def reference(self) -> Iterator[str]:
        """The function that says in plain torch what the cascade means."""
        canonical, types = self.subject.canonical, self.subject.types
        found: Lines = reference_lines(canonical, types, self.subject.sizes, self.names)
        params = [param.name for param in canonical.params]
        given = {size for param in canonical.params for size in param.shape}
        loose = [symbol for symbol in self.subject.sizes if symbol not in given]
        words = [self.names[name] for name in params]
        lines = wrapped("def reference(", [*words, *(["*"] if loose else []), *map(self.name, loose)], "):")
        lines.append('    """The same in float64, one equation after the other."""')
        lines += self.opened(params, types, found, loose)
        lines += ["", f"    return {', '.join(found.results)}"]
        yield "\n".join(lines)

    def main(self) -> Iterator[str]:
        """The check: random inputs, the largest error of each result, the exit code; with --bench, the time."""
        final = self.subject.final
        several = len(final.results) > 1
        given = {size for param in final.params for size in param.shape}
        loose = [f", {self.name(symbol)}={self.name(symbol)}" for symbol in self.subject.sizes if symbol not in given]
        calls = [f"{call}(*inputs{''.join(loose)})" for call in ("run", "reference")]
        yield "\n".join(
            [
                "def main():",
                '    """Compares with the reference on random inputs, exits with 1 if they differ; --bench times."""',
                "    cuda = torch.cuda.is_available()",
                "    if not cuda and not triton.knobs.runtime.interpret:",
                '        raise SystemExit("no CUDA device: TRITON_INTERPRET=1 runs the kernels on the CPU, slowly")',
                '    device = "cuda" if cuda else "cpu"',
                *self.inputs_made(),
                *self.benched(calls[0]),
                *self.fewer(),
                "    wrong = False",
                f"    for name, ours, wanted in zip({self.result_names()}, "
                f"{', '.join(calls if several else [f'({call},)' for call in calls])}):",
                "        error = largest_error(ours, wanted)",
                "        wrong |= not error <= allowed",
                '        print(f"{name}: largest error {error:.2e}, at most {allowed:.2e} allowed")',
                "    raise SystemExit(int(wrong))",
            ]
        )
        yield 'if __name__ == "__main__":\n    main()'

    def result_names(self) -> str:
        return _tuple([_quoted(result.name) for result in self.subject.final.results])

    def inputs_made(self) -> Iterator[str]:
        """Sizes, smaller ones in the interpreter; the seed, the inputs, the tolerance."""
        sizes, small = self.subject.sizes, self.small()
        if sizes:
            yield f"    {', '.join(map(self.name, sizes))} = {', '.join(map(str, sizes.values()))}"
        if fewer := {symbol: size for symbol, size in small.items() if size != sizes[symbol]}:
            yield "    if not cuda:  # the interpreter is slow"
            yield f"        {', '.join(map(self.name, fewer))} = {', '.join(map(str, fewer.values()))}"
        yield "    torch.manual_seed(0)"
        yield from (f"    {line}" for line in self.drawn(sizes, small))
        floats = [dtype for dtype in self.dtypes() if dtype in FLOATS]
        tolerance = max((TOLERANCE.get(dtype, FINEST) for dtype in floats), default=FINEST)
        finer = self.widened and tolerance == TOLERANCE[DType.BF16]
        yield f"    allowed = {f'{tolerance} if cuda else {TOLERANCE[DType.F16]}' if finer else tolerance}"

    def drawn(self, sizes: Mapping[str, int], small: Mapping[str, int]) -> Iterator[str]:
        """Random inputs, of these sizes or, in the interpreter, small ones."""
        yield "inputs = ["
        yield from (f"    {self.random(p.name, sizes, small)},  # {p.name}" for p in self.subject.final.params)
        yield "]"

    def fewer(self) -> Iterator[str]:
        """Inputs that the reference has room for: unlike the kernels it stores whatever a statement defines."""
        sizes, checked = self.subject.sizes, self.checked()
        changed = {symbol: size for symbol, size in checked.items() if size != sizes[symbol]}
        if not changed:
            return
        told = ", ".join(f"{symbol}={size}" for symbol, size in changed.items())
        yield "    if cuda:  # the reference stores what the kernels do not, and that would be too large"
        yield f"        {', '.join(map(self.name, changed))} = {', '.join(map(str, changed.values()))}"
        yield from (f"        {line}" for line in self.drawn(checked, checked))
        yield f'        print("checked at smaller sizes, for the memory that the reference takes: {told}")'

    def fixed(self) -> dict[str, int]:
        """The sizes that are numbers in kernels."""
        return {symbol: size for one in self.units for symbol, size in one.static.items()}

    def checked(self) -> dict[str, int]:
        """Sizes at which all that the reference stores has room; what of them kernels rely on is as it was."""
        sizes, fixed = self.subject.sizes, self.fixed()
        fewer = _limited(self.subject.canonical, dict(sizes), [symbol for symbol in sizes if symbol not in fixed])
        return {symbol: size - (size - sizes[symbol]) % ALIGNED for symbol, size in fewer.items()}

    def small(self) -> dict[str, int]:
        """Sizes for the interpreter: a ragged tile or two of each rank, few of one with one coordinate a program."""
        fixed = self.fixed()
        points: set[Size] = set()
        wide: set[Size] = set()
        for axis in (axis for one in self.units for launch in one.launches for axis in launch.kernel.axes):
            lying = points if axis.role is Role.POINT else wide
            lying |= {axis.extent, *self.subject.products.get(str(axis.extent), ())}
        found = {}
        for symbol, size in self.subject.sizes.items():
            few = POINTS if symbol in points - wide else RAGGED
            found[symbol] = fixed.get(symbol, min(size, few))
        return found

    def benched(self, call: str) -> Iterator[str]:
        """What --bench does: times a call, against what the kernels compute and what has to be moved at least."""
        counts = [work(launch.kernel, launch.extents) for one in self.units for launch in one.launches]
        flops = sum(count.matrix_flops + count.vector_flops for count in counts)
        results = "results" if len(self.subject.final.results) > 1 else "[results]"
        yield '    if "--bench" in sys.argv[1:]:'
        yield "        if not cuda:"
        yield '            raise SystemExit("--bench needs a CUDA device")'
        yield f"        results = {call}"
        yield f"        moved = sum(t.numel() * t.element_size() for t in (*inputs, *{results}))"
        yield f"        milliseconds = triton.testing.do_bench(lambda: {call})"
        yield f"        flops = {flops:.4g}  # that the kernels compute, what tiles have beyond an extent included"
        yield '        rates = f"{moved / milliseconds / 1e6:.1f} GB/s, {flops / milliseconds / 1e9:.2f} TFLOP/s"'
        yield '        print(f"{milliseconds:.4f} ms, {rates}")'

    def dtypes(self) -> Iterator[DType]:
        """The types of what goes in and out."""
        yield from self.subject.types.values()
        for result in self.subject.final.results:
            yield self.planner.dtypes[result.name]

    def random(self, name: str, sizes: Mapping[str, int], small: Mapping[str, int]) -> str:
        """Random values for a parameter."""
        dtype = self.subject.types[name]
        shape = f"[{', '.join(map(self.name, self.planner.shapes[name]))}]"
        if dtype is DType.BOOL:
            return f"torch.rand({shape}, device=device) < 0.7"
        if dtype in FLOATS:
            short = dtype in (DType.F8E4M3, DType.F8E5M2)
            made = f"torch.randn({shape}, device=device{'' if short else f', dtype={self.torch(dtype)}'})"
            return f"{made}.to({TORCH[dtype]})" if short else made
        most = 127 if dtype is DType.I8 else 2**31 - 1
        stop, few = (min(self.subject.highest(each).get(name, 3), most) + 1 for each in (sizes, small))
        high = str(stop) if stop == few else f"{stop} if cuda else {few}"
        return f"torch.randint(0, {high}, {shape}, dtype={TORCH[dtype]}, device=device)"


def _multiplies_bf16(launch: Launch) -> bool:
    """Whether a kernel has products, and bf16 among what it loads, computes or stores."""
    kernel = launch.kernel
    short = "tl.bfloat16" in launch.source.text or any(tensor.dtype is DType.BF16 for tensor in kernel.tensors)
    return short and "dot" in launch.source.text


def _described(one: Unit) -> bool:
    """Whether a kernel takes descriptors."""
    return any(argument.kind == "descriptor" for launch in one.launches for argument in launch.source.arguments)


def _quoted(word: str) -> str:
    return f'"{word}"'


def _and(words: Sequence[str]) -> str:
    """`A, B and C`."""
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), *words[-1:]])


def _tuple(words: Sequence[str]) -> str:
    """The text of a tuple."""
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"


def _joined(blocks: Sequence[str]) -> str:
    """Blocks of a file, two lines apart."""
    return "\n\n\n".join(blocks) + "\n"
