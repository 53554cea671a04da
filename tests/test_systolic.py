"""The systolic model: against a counter that walks every loop, against laws, against published numbers."""

from __future__ import annotations

import contextlib
import itertools
import operator
import random
from dataclasses import replace
from pathlib import Path

import pytest

from cascade.backends.systolic.cost import Evaluator, evaluator, placements
from cascade.backends.systolic.machine import Machine, from_tables, machine, parse_machine, shipped
from cascade.backends.systolic.mapping import Mapping, Placement, parse_mapping, render_mapping, scheduled, with_mapping
from cascade.backends.systolic.pareto import Choice, forms_of, front, unbeaten
from cascade.backends.systolic.report import front_rows, front_summary
from cascade.backends.systolic.search import regions, search, taken_apart
from cascade.backends.systolic.work import Cascaded, take_apart
from cascade.arguments import shape_symbols
from cascade.compiled import from_text
from cascade.frontend.build import parse_cascade
from cascade.errors import CascadeError, CommandError, UnsupportedError
from cascade.inference import infer_shapes
from cascade.ir import Cascade, Loop, Phase, Region, Stage
from cascade.pipeline import run_pipeline
from cascade.text import render
from cascade.trial import difference
from cascade.walk import defines
from tests.check import read_case
from tests.generate import RANKS, random_cascade, symbol
from tests.systolic_events import Counting

ROOT = Path(__file__).parent.parent

# --- against the naive counter ---------------------------------------------------------------------------------------


def random_machine(rng: random.Random) -> Machine:
    """Two units that can do everything, each operation in some cycles; a buffer that is never too small."""
    units = ""
    for name in ("array", "vector"):
        cycles = "\n".join(
            f"{op} = {{ cycles = {rng.randint(1, 5)} }}" for op in ("exp", "add", "max", "tanh", "other")
        )
        units += f"[units.{name}]\nrows = {rng.randint(1, 4)}\ncolumns = {rng.randint(1, 5)}\n"
        units += f"fill = {'true' if name == 'array' and rng.random() < 0.5 else 'false'}\n"
        units += f"[units.{name}.operations]\n{cycles}\n"
    return parse_machine(
        f'name = "random"\nclock_hz = 1e9\nword_bytes = {rng.choice((1, 2, 4))}\n[memories.dram]\n'
        f"bandwidth = {rng.choice((1e9, 1e11))}\n[buffer]\nbytes = 1e9\n{units}"
    )


def random_mapping(rng: random.Random, cascade: Cascade) -> Mapping:
    """Regions of neighbouring Einsums, stages of those, loops over ranks that all of a stage have; tensors held."""
    names = [defines(stmt)[0] for stmt in cascade.body]
    ranks = tuple(infer_shapes(cascade).ranks)
    regions = []
    while names:
        count = rng.randint(1, len(names))
        mine, names = names[:count], names[count:]
        stages = []
        while mine:
            count = rng.randint(1, len(mine))
            stages.append(Stage(tuple(mine[:count]), random_loops(rng, ranks, "s")))
            mine = mine[count:]
        region = Region(f"r{len(regions)}", tuple(stages), random_loops(rng, ranks, "o"), double=rng.random() < 0.3)
        regions.append(replace(region, keep=random_keep(rng, cascade, region)))
    units = tuple((defines(stmt)[0], rng.choice(("array", "vector"))) for stmt in cascade.body)
    return Mapping(tuple(regions), units, random_places(rng, cascade, dict(units)))


def random_places(rng: random.Random, cascade: Cascade, units: dict[str, str]) -> tuple[tuple[str, Placement], ...]:
    """Some way to lay each product on the array, where it runs there, at times with another rank along a side."""
    works = take_apart(cascade).works
    ways = {name: list(placements(work)) for name, work in works.items() if units[name] == "array"}
    places = {name: rng.choice(found) for name, found in ways.items() if found}
    for name, place in places.items():
        others = [rank for rank in works[name].ranks if rank not in place.ranks]
        if others and rng.random() < 0.5:
            side = rng.choice(("rows", "columns"))
            places[name] = replace(place, **{side: "*".join(filter(None, (getattr(place, side), rng.choice(others))))})
    return tuple(places.items())


def random_loops(rng: random.Random, ranks: tuple[str, ...], prefix: str) -> tuple[Loop, ...]:
    count = rng.choice((0, 1, 1, 2, 2, 3))
    found = [Loop(rng.choice(ranks), rng.choice((1, 2, 2, 4)), f"{prefix}{number}") for number in range(count)]
    return tuple(found)


def random_keep(rng: random.Random, cascade: Cascade, region: Region) -> tuple[tuple[str, str], ...]:
    inside = {name for stmt in cascade.body if defines(stmt)[0] in region.statements for name in defines(stmt)}
    labels = [loop.label for loop in region.loops] or ["all"]
    read = [p.name for p in cascade.params] + sorted(inside)
    chosen = [name for name in read if rng.random() < 0.35]
    return tuple((name, rng.choice((*labels, "all", "tile", "dram"))) for name in chosen)


def triple(seed: int) -> tuple[Cascade, Machine, Mapping, dict[str, int]] | None:
    """A random cascade, machine, mapping and sizes; None where the cascade is no valid one or the mapping cannot run."""
    rng = random.Random(seed)
    try:
        cascade = run_pipeline(random_cascade(rng.randrange(4000)), "canonicalize", check=0).final
    except CascadeError:
        return None
    chosen, sizes = random_machine(rng), {symbol(rank): rng.choice((1, 2, 3, 5, 6)) for rank in RANKS}
    known = {size for shape in infer_shapes(cascade).tensors.values() for size in shape if isinstance(size, str)}
    sizes = {name: size for name, size in sizes.items() if name in known}
    cascaded = take_apart(cascade)
    for _ in range(30):
        mapping = random_mapping(rng, cascade)
        try:
            Evaluator(cascaded, chosen, mapping).cost(sizes)
        except CommandError:
            continue
        return cascade, chosen, mapping, sizes
    return None


def compared(seed: int) -> bool:
    """Whether the seed gives a triple; the model must count what the counter counts."""
    found = triple(seed)
    if found is None:
        return False
    cascade, chosen, mapping, sizes = found
    cost = evaluator(cascade, chosen, mapping).cost(sizes)
    events = Counting(cascade, chosen, mapping, sizes).count()
    assert {name: each.points for name, each in cost.einsums.items()} == dict(events.points), seed
    cycles = {name: each.cycles for name, each in cost.einsums.items()}
    if dict(events.idle):  # what no closed form counts is taken whole
        assert all(
            events.cycles[name] <= found <= events.cycles[name] + events.idle[name] for name, found in cycles.items()
        )
    exactly = cycles == dict(events.cycles)
    assert exactly or any(events.idle.values()), seed
    moved: dict[tuple[str, str], int] = {}
    for region in cost.regions:
        for key, count in region.movement.moved.items():
            moved[key] = moved.get(key, 0) + count
    assert moved == dict(events.moved), seed
    assert cost.traffic == sum(events.moved.values()), seed
    assert sum(region.movement.buffer_reads for region in cost.regions) == events.buffer_reads, seed
    assert sum(region.movement.buffer_writes for region in cost.regions) == events.buffer_writes, seed
    assert [region.movement.held for region in cost.regions] == events.held, seed
    assert not exactly or [region.cycles for region in cost.regions] == events.region_cycles, seed
    memory = replace(chosen.memories["dram"], bandwidth=2 * chosen.memories["dram"].bandwidth)
    faster = replace(chosen, memories={"dram": memory})
    assert evaluator(cascade, faster, mapping).cost(sizes).seconds <= cost.seconds, seed
    return True


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.campaign) for part in range(1, 4))])
def test_the_model_counts_what_happens(part: int) -> None:
    done = sum(compared(seed) for seed in range(part * 150, part * 150 + 150))
    assert done >= 120


def test_mappings_read_back() -> None:
    found = [mapped for mapped in map(triple, range(40)) if mapped is not None]
    assert len(found) > 10
    for _, _, mapping, _ in found:
        assert parse_mapping(render_mapping(mapping)) == mapping


# --- goldens ---------------------------------------------------------------------------------------------------------

GEMM = "cascade gemm(A[M,K], B[K,N]) -> C[M,N] {\n C[m,n] = sum[k] A[m,k] * B[k,n]\n}"


def test_a_mapping_in_a_schedule_is_the_same_and_changes_no_meaning() -> None:
    count = 0
    for seed in range(120):
        found = triple(seed)
        if found is None:
            continue
        cascade, _, mapping, _ = found
        written = with_mapping(cascade, mapping)
        read = parse_cascade(render(written))
        assert read == written and with_mapping(written, mapping) == written, seed
        mine = scheduled(read)
        assert mine is not None and mine.regions == mapping.regions and dict(mine.units) == dict(mapping.units), seed
        assert mine.place == mapping.place, seed
        if count < 12:
            assert not difference(cascade, read, seed), seed
        count += 1
    assert count > 40


def prepared(text: str) -> Cascade:
    return run_pipeline(from_text(text, "test", None).cascade, "canonicalize").final


def whole(cascade: Cascade, *groups: tuple[str, ...]) -> Mapping:
    """A region for each group, and each other Einsum, without a loop: everything fits."""
    grouped = {name: group for group in groups for name in group}
    names = [defines(stmt)[0] for stmt in cascade.body]
    regions = dict.fromkeys(grouped.get(name, (name,)) for name in names)
    return Mapping(tuple(Region(names[0], (Stage(names),)) for names in regions))


def big(word_bytes: int = 1) -> Machine:
    return parse_machine(f'extends = "scale-sim-32"\nword_bytes = {word_bytes}\n[buffer]\nbytes = 1e12')


PLACES = {"output": ("m", "n", "k"), "weight": ("k", "n", "m"), "input": ("k", "m", "n")}


@pytest.mark.parametrize(("stays", "cycles"), [("output", 10_176), ("weight", 11_200), ("input", 14_208)])
def test_an_array_fills_and_drains_as_scale_sim_has_it(stays: str, cycles: int) -> None:
    cascade = prepared(GEMM)
    mapping = replace(whole(cascade), place=(("C", Placement(*PLACES[stays])),))
    cost = evaluator(cascade, machine("scale-sim-32"), mapping).cost({"M": 256, "N": 128, "K": 256})
    assert cost.einsums["C"].cycles == cycles


def test_the_first_layer_of_alexnet_as_scale_sim_has_it() -> None:
    cascade = prepared(GEMM)
    mapping = replace(whole(cascade), place=(("C", Placement(*PLACES["weight"])),))
    sizes = {"M": 55 * 55, "N": 96, "K": 11 * 11 * 3}
    assert evaluator(cascade, big(), mapping).cost(sizes).einsums["C"].cycles == 112_284  # it prints one less


def test_without_a_place_the_fastest_way_to_lay_a_product_is_taken() -> None:
    cascade = prepared(GEMM)
    cost = evaluator(cascade, machine("scale-sim-32"), whole(cascade)).cost({"M": 256, "N": 128, "K": 256})
    assert cost.einsums["C"].cycles == 10_176


CHAIN = """cascade chain(A0[M0,M1], A1[M1,M2], X[N,M0]) -> Y[N,M2] {
    H[n,b] = sum[a] X[n,a] * A0[a,b]
    Y[n,c] = sum[b] H[n,b] * A1[b,c]
}"""
THREE = """cascade three(X[N,N], A[N,N], B[N,N], C[N,N]) -> Y[N,N] {
    P[n,a] = sum[k] X[n,k] * A[k,a]
    Q[n,a] = sum[k] P[n,k] * B[k,a]
    Y[n,a] = sum[k] Q[n,k] * C[k,a]
}"""
LAYER = """cascade layer(X[T,D], WQ[D,H,E], WK[D,H,E], WV[D,H,E], WZ[H,E,D], W1[D,S], W2[S,D]) -> Y[T,D] with u = T {
    Q[h,t,e] = sum[d] X[t,d] * WQ[d,h,e]
    K[h,u,e] = sum[d] X[u,d] * WK[d,h,e]
    V[h,u,e] = sum[d] X[u,d] * WV[d,h,e]
    QK[h,t,u] = sum[e] Q[h,t,e] * K[h,u,e]
    GM[h,t] = max[u] QK[h,t,u]
    SN[h,t,u] = exp(QK[h,t,u] - GM[h,t])
    SD[h,t] = sum[u] SN[h,t,u]
    A[h,t,u] = SN[h,t,u] / SD[h,t]
    AV[h,t,e] = sum[u] A[h,t,u] * V[h,u,e]
    Z[t,d] = sum[h,e] AV[h,t,e] * WZ[h,e,d]
    G[t,s] = sum[d] Z[t,d] * W1[d,s]
    Y[t,d] = sum[s] G[t,s] * W2[s,d]
}"""
SOFTMAX = ("GM", "SN", "SD", "A")
COMPULSORY = [
    (CHAIN, {"N": 64, "M0": 64, "M1": 64, "M2": 64}, 1, 196_608),
    (THREE, {"N": 128}, 1, 1_179_648),
    (CHAIN, {"N": 1, "M0": 4, "M1": 3, "M2": 4}, 1, 304),
    (LAYER, {"T": 256, "D": 4096, "H": 32, "E": 128, "S": 16384}, 2, 3_724_541_952),  # GPT-3 6.7B
    (LAYER, {"T": 256, "D": 12288, "H": 96, "E": 128, "S": 49152}, 2, 30_500_978_688),  # GPT-3 175B
]


@pytest.mark.parametrize(("text", "sizes", "word_bytes", "bits"), COMPULSORY)
def test_compulsory_traffic(text: str, sizes: dict[str, int], word_bytes: int, bits: int) -> None:
    """What every Einsum must move where each is on its own, a softmax being one; the layers have 16-bit values."""
    cascade = prepared(text)
    groups = [SOFTMAX] if text is LAYER else []
    mapping = replace(whole(cascade, *groups), units=tuple((name, "1d") for name in SOFTMAX if groups))
    assert evaluator(cascade, big(word_bytes), mapping).cost(sizes).traffic * 8 == bits


# --- laws ------------------------------------------------------------------------------------------------------------


def test_a_larger_bandwidth_is_never_slower_and_a_larger_buffer_moves_no_more() -> None:
    tiled = parse_mapping(FITTED)
    cascade, sizes = prepared(GEMM), {"M": 192, "N": 160, "K": 96}
    before = None
    for power in range(12, 24):
        changed = parse_machine(f'extends = "scale-sim-32"\n[buffer]\nbytes = {1 << power}')
        cost = evaluator(cascade, changed, tiled).cost(sizes)
        assert before is None or cost.traffic <= before
        before = cost.traffic
    slow, fast = (
        evaluator(cascade, parse_machine(f'extends = "scale-sim-32"\n[memories.dram]\nbandwidth = {rate}'), tiled)
        for rate in (1e8, 2e8)
    )
    assert fast.cost(sizes).seconds < slow.cost(sizes).seconds


FITTED = """[[regions]]
loops = ["m = fit"]
[[regions.stages]]
einsums = ["C"]
loops = ["n = 16"]
"""


def test_a_fitted_loop_is_the_largest_that_fits() -> None:
    cascade, sizes = prepared(GEMM), {"M": 180, "N": 160, "K": 96}
    small = parse_machine('extends = "scale-sim-32"\n[buffer]\nbytes = 9000')
    (region,) = evaluator(cascade, small, parse_mapping(FITTED)).cost(sizes).regions
    taken = region.movement.nests[0].lengths(1)["m"]
    held = {
        size: size * 96 + 96 * 16  # a tile of A and one of B; C goes to memory
        for size in range(1, 181)
        if 180 % size == 0
    }
    assert region.movement.held == held[taken]
    assert taken == max(size for size, count in held.items() if count <= 9000)


def test_splitting_a_rank_evenly_changes_no_work() -> None:
    one = prepared("cascade a(X[N], Y[N]) -> Z[] {\n Z = sum[n] X[n] * Y[n]\n}")
    two = prepared("cascade a(X[N1,N0], Y[N1,N0]) -> Z[] {\n Z = sum[i,j] X[i,j] * Y[i,j]\n}")
    whole_rank = evaluator(one, big(), whole(one)).cost({"N": 96})
    split = evaluator(two, big(), whole(two)).cost({"N1": 8, "N0": 12})
    assert whole_rank.einsums["Z"].points == split.einsums["Z"].points == 96
    assert whole_rank.traffic == split.traffic


def test_two_operations_are_one_where_the_unit_has_it() -> None:
    cascade = prepared("cascade a(X[N], Y[N]) -> Z[N], S[] {\n Z[n] = exp(X[n] - Y[n])\n S = sum[n] X[n] * Y[n]\n}")
    text = """name = "u"
clock_hz = 1e9
[memories.dram]
bandwidth = 1e9
[buffer]
bytes = 1e6
[units.u]
columns = 4
[units.u.operations]
other = { cycles = 10 }
"""
    plain, fused = (
        evaluator(cascade, parse_machine(text + more), whole(cascade)).cost({"N": 8}).einsums
        for more in ("", "sub-exp = { cycles = 3 }\nmac = { cycles = 1 }\n")
    )
    assert (plain["Z"].cycles, plain["S"].cycles) == (2 * 20, 2 * 20)
    assert (fused["Z"].cycles, fused["S"].cycles) == (2 * 3, 2 * 1)


def test_filters_count_for_work() -> None:
    text = "cascade a(X[M,N]) -> Y[M] {\n Y[m] = sum[n] X[m,n] where n <= m\n}"
    cascade = prepared(text)
    for length in (5, 1 << 20):
        cost = evaluator(cascade, parse_machine('extends = "scale-sim-32"\n[buffer]\nbytes = 1e15'), whole(cascade))
        assert cost.cost({"M": length, "N": length}).einsums["Y"].points == length * (length + 1) // 2


# --- regions ---------------------------------------------------------------------------------------------------------

TWO_UNITS = """name = "two"
clock_hz = 1e9
[memories.dram]
bandwidth = 1e12
[buffer]
bytes = {bytes}
[units.array]
rows = 4
columns = 4
[units.array.operations]
mac = {{ cycles = 1 }}
[units.vector]
columns = 4
[units.vector.operations]
other = {{ cycles = 1 }}
"""
SOFT = """cascade soft(X[M,K], W[K,N]) -> Y[M,N] {
    S[m,n] = sum[k] X[m,k] * W[k,n]
    R[m] = max[n] S[m,n]
    Y[m,n] = S[m,n] - R[m]
}"""


def test_phases_follow_one_another_and_units_in_one_work_together() -> None:
    cascade, sizes = prepared(SOFT), {"M": 8, "N": 8, "K": 6}
    chosen = parse_machine(TWO_UNITS.format(bytes=10_000))
    stages = (Stage(("S",)), Stage(("R",)), Stage(("Y",)))
    apart = (Phase((("array", ("S",)),), "array"), Phase((("vector", ("R", "Y")),)))
    products, softened = 8 * 8 * 6 // 16, 2 * 8 * 8 // 4
    together = evaluator(cascade, chosen, Mapping((Region("all", stages),))).cost(sizes)
    assert together.regions[0].cycles == max(products, softened)
    one_by_one = evaluator(cascade, chosen, Mapping((Region("all", stages, phases=apart),))).cost(sizes)
    assert one_by_one.regions[0].cycles == products + 4 * (8 * 8 // 16) + softened  # 4 rows, emptied for every 4 x 4


def test_what_has_no_room_is_spilled_and_read_by_every_later_stage() -> None:
    cascade, sizes = prepared(SOFT), {"M": 8, "N": 8, "K": 4}
    stages = (Stage(("S",)), Stage(("R",)), Stage(("Y",)))
    region = Region("all", stages, keep=(("R", "registers"),), spill=("S",))
    full = 2 * (8 * 4 + 4 * 8 + 8 * 8)
    assert evaluator(cascade, parse_machine(TWO_UNITS.format(bytes=full)), Mapping((region,))).cost(
        sizes
    ).traffic == 2 * (8 * 4 + 4 * 8 + 8 * 8)
    less = evaluator(cascade, parse_machine(TWO_UNITS.format(bytes=full - 32)), Mapping((region,))).cost(sizes)
    assert less.regions[0].movement.spilled == 32 / (2 * 8 * 8)
    assert less.traffic == full + 32 * (1 + 2)  # written once, read by R and by Y


def test_a_search_takes_apart_what_is_too_large_together() -> None:
    text = (ROOT / "examples/decoder_layer.cascade").read_text()
    cascade = run_pipeline(from_text(text, "decoder_layer", None).cascade).final
    sizes = dict.fromkeys(shape_symbols(cascade), 64) | {"H": 4}
    cascaded = take_apart(cascade)
    small, large = (len(search(cascaded, machine(name), sizes).regions) for name in ("eyeriss-like", "tpu-v4-like"))
    assert small > large


@pytest.mark.parametrize("name", ["sink", "attention", "layernorm_gemm", "route"])
def test_a_search_finds_a_mapping_for_what_is_lifted(name: str) -> None:
    program = read_case(ROOT / f"tests/cases/lift/{name}.case").program
    cascade = run_pipeline(from_text(program, name, None).cascade).final
    sizes = dict.fromkeys(shape_symbols(cascade), 64)
    told: list[tuple[str, int, int]] = []
    found = search(take_apart(cascade), machine("tpu-v4-like"), sizes, lambda *what: told.append(what))
    done = dict.fromkeys(region for region, tried, forms in told if tried == forms)
    assert [region.name for region in found.regions] == list(done)
    assert parse_mapping(render_mapping(found)) == found


SMALL = {"buffer": {"bytes": 90}}
SILENT = {"units": {"2d": {"operations": {"mac": {"cycles": 1}}}}}
ROWS = "cascade rows(X[M,N]) -> Y[M,N] { Y[m,n] = softmax[n] X[m,n] }"
FRONTS = {
    "grouped": (ROWS, {"M": 1, "N": 32}, {}),
    "too large together": (ROWS, {"M": 8, "N": 32}, SMALL),
    "no energies": (SOFT, {"M": 8, "N": 8, "K": 4}, SILENT),
}


def brute_front(cascaded: Cascaded, on: Machine, sizes: dict[str, int]) -> set[tuple[float, float, int]]:
    """Every form of every region in every combination, costed as a whole; what none of the others beats."""
    start = Mapping(tuple(regions(cascaded)))
    ways: list[list[tuple[Region, ...]]] = []
    extents = Evaluator(cascaded, on, start).extents(sizes)
    for number, region in enumerate(start.regions):
        alone = taken_apart(start, number).regions[number : number + len(region.statements)]
        together = [(form,) for form in forms_of(cascaded, region, extents)[0]]
        apart = itertools.product(*(forms_of(cascaded, one, extents)[0] for one in alone))
        ways.append([*together, *(apart if len(alone) > 1 else ())])
    keys = set()
    for chosen in itertools.product(*ways):
        with contextlib.suppress(CascadeError):
            cost = Evaluator(cascaded, on, Mapping(tuple(itertools.chain(*chosen)))).cost(sizes)
            held = max(region.movement.held for region in cost.regions)
            keys.add((cost.seconds, cost.traffic if cost.energy_pj is None else cost.energy_pj, held))
    return {one for one in keys if not any(other != one and all(map(operator.le, other, one)) for other in keys)}


def test_what_is_unbeaten_is_what_no_other_beats() -> None:
    rng = random.Random(1)
    for _ in range(300):
        numbers = [(rng.randint(1, 5), rng.randint(1, 5), rng.randint(1, 5)) for _ in range(rng.randint(1, 30))]
        found = unbeaten(Choice(float(time), float(energy), 0, held, ()) for time, energy, held in numbers)
        keys = {(float(time), float(energy), held) for time, energy, held in numbers}
        assert [choice.key for choice in found] == sorted(
            one for one in keys if not any(other != one and all(map(operator.le, other, one)) for other in keys)
        )


@pytest.mark.parametrize("name", FRONTS)
def test_a_front_is_that_of_all_candidates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, sizes, fields = FRONTS[name]
    chosen = from_tables({"extends": "fusemax", **fields})
    monkeypatch.setattr("cascade.backends.systolic.pareto.STEPS", (4,))
    monkeypatch.setattr("cascade.backends.systolic.pareto.FINEST", 5)
    cascade = run_pipeline(from_text(text, name, None).cascade).final
    cascaded = take_apart(cascade)
    found = front(cascaded, chosen, sizes)
    assert found.exhaustive and found.base == 16
    brute = sorted(brute_front(cascaded, chosen, sizes))
    ours = [choice.key for choice in found.choices]
    assert len({(f"{s:.9e}", f"{e:.9e}", held) for s, e, held in ours}) == len(ours)
    for one, other in zip(sorted(ours), brute, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    for choice, chosen_map in zip(found.choices, found.mappings, strict=True):
        cost = Evaluator(cascaded, chosen, parse_mapping(render_mapping(chosen_map))).cost(sizes)
        assert (cost.seconds, cost.traffic) == pytest.approx((choice.seconds, choice.traffic))


def test_a_front_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.backends.systolic.pareto.MOST_FORMS", 5)
    cascaded, sizes = take_apart(prepared(GEMM)), {"M": 1024, "N": 1024, "K": 1024}
    found = front(cascaded, machine("fusemax"), sizes)
    assert not found.exhaustive and found.tried == 6 and f"6 of {found.forms} forms tried" in front_summary(found)
    best = search(cascaded, machine("fusemax"), sizes)
    cost = Evaluator(cascaded, machine("fusemax"), best).cost(sizes)
    monkeypatch.undo()
    whole = front(cascaded, machine("fusemax"), sizes)
    shown = front_rows(whole)  # a long front: the least of each, and some between
    assert 40 <= len(shown) <= 43 < len(whole.choices)
    assert f"{len(shown)} of them shown" in front_summary(whole)
    least = min(choice.key[1] for choice in whole.choices)
    assert f"{least / 1e12:.4g} J" in {row[1] for row in shown}
    assert whole.exhaustive and whole.choices[0].seconds <= cost.seconds


BESIDE = """name = "beside"
clock_hz = 1e9
[memories.link]
bandwidth = 1e11
[memories.bank]
bandwidth = 1e12
[buffer]
bytes = 1e7
[units.array]
rows = 128
columns = 128
[units.array.operations]
mac = { cycles = 1 }
[units.near]
columns = 64
memory = "bank"
[units.near.operations]
mac = { cycles = 1 }
"""


@pytest.mark.parametrize(("rows", "unit"), [(1, "near"), (4096, "array")])
def test_a_unit_beside_memory_is_chosen_by_operations_a_byte(rows: int, unit: str) -> None:
    cascaded, sizes = take_apart(prepared(GEMM)), {"M": rows, "N": 1024, "K": 1024}
    chosen = parse_machine(BESIDE)
    cost = Evaluator(cascaded, chosen, search(cascaded, chosen, sizes)).cost(sizes)
    assert cost.einsums["C"].unit == unit
    path = {"near": "bank", "array": "link"}[unit]
    assert cost.regions[0].movement.by_memory == {path: cost.traffic}


def test_a_search_shares_a_tensor_that_data_chooses() -> None:
    """Rows of a table for every token: the table is loaded once, not for each of them."""
    text = "cascade a(X[T,D], I: i32[T], W[N,D,F]) -> Y[T,F] {\n Y[t,f] = sum[d] X[t,d] * W[I[t],d,f]\n}"
    cascaded, sizes = take_apart(prepared(text)), {"T": 512, "D": 64, "F": 32, "N": 4}
    chosen = machine("fusemax")
    cost = Evaluator(cascaded, chosen, search(cascaded, chosen, sizes)).cost(sizes)
    assert cost.traffic == 2 * (512 * 64 + 4 * 64 * 32 + 512 * 32) + 4 * 512


def test_a_search_does_not_fill_an_array_for_a_vector() -> None:
    text = "cascade a(X[B,K], W[B,K,N]) -> Y[B,N] {\n Y[b,n] = sum[k] X[b,k] * W[b,k,n]\n}"
    cascaded, chosen, sizes = take_apart(prepared(text)), machine("tpu-v4-like"), {"B": 64, "K": 64, "N": 64}
    cost = Evaluator(cascaded, chosen, search(cascaded, chosen, sizes)).cost(sizes)
    assert cost.einsums["Y"].unit == "vpu"


def test_under_the_search_a_larger_buffer_moves_no_more() -> None:
    cascaded, sizes = take_apart(prepared(GEMM)), {"M": 384, "N": 320, "K": 256}
    before = None
    for power in (12, 14, 16, 18, 20):
        changed = parse_machine(f'extends = "eyeriss-like"\n[buffer]\nbytes = {1 << power}')
        cost = Evaluator(cascaded, changed, search(cascaded, changed, sizes)).cost(sizes)
        assert before is None or cost.traffic <= before
        before = cost.traffic
    assert before == 2 * (384 * 256 + 256 * 320 + 384 * 320)


# --- what is refused -------------------------------------------------------------------------------------------------

WRONG = [
    ("[[regions]]", "C621"),
    ('[[regions]]\n[[regions.stages]]\neinsums = ["D"]', "C622"),
    ('[[regions]]\nloops = ["q = 1"]\n[[regions.stages]]\neinsums = ["C"]', "C622"),
    ('[[regions]]\nloops = ["m"]\n[[regions.stages]]\neinsums = ["C"]', "C621"),
    ('[[regions]]\nloops = ["m = 2", "m = 1"]\n[[regions.stages]]\neinsums = ["C"]', "C621"),
    ('[[regions]]\nkeep = { A = "x" }\n[[regions.stages]]\neinsums = ["C"]', "C621"),
    ('[[regions]]\nkeep = { Z = "all" }\n[[regions.stages]]\neinsums = ["C"]', "C622"),
    ('[[regions]]\nkept = 1\n[[regions.stages]]\neinsums = ["C"]', "C621"),
    ('[[regions]]\n[[regions.stages]]\neinsums = ["C"]\n[[regions.phases]]\nwork = { 3d = ["C"] }', "C622"),
    ("[[regions]]\n[[regions]]", "C621"),
    (
        '[[regions]]\n[[regions.stages]]\neinsums = ["C"]\n[place]\nC = { rows = "m*k", columns = "m", stream = "n" }',
        "C622",
    ),
    (
        '[[regions]]\n[[regions.stages]]\neinsums = ["C"]\n[place]\nC = { rows = "m*", columns = "k", stream = "n" }',
        "C622",
    ),
    ("regions = 3", "C621"),
    ("x = [", "C620"),
]


@pytest.mark.parametrize(("text", "code"), WRONG)
def test_a_wrong_mapping_is_one_error(text: str, code: str) -> None:
    with pytest.raises(CommandError) as caught:
        evaluator(prepared(GEMM), machine("scale-sim-32"), parse_mapping(text)).cost({"M": 4, "N": 4, "K": 4})
    (finding,) = caught.value.diagnostics
    assert (finding.code == code and finding.help is not None) or code == "C620"


def test_what_does_not_fit_names_the_bytes_that_are_lacking() -> None:
    cascade = prepared(GEMM)
    tiny = parse_machine('extends = "scale-sim-32"\n[buffer]\nbytes = 100')
    with pytest.raises(UnsupportedError, match="needs 128 bytes on chip: the buffer lacks 28 of them") as caught:
        evaluator(cascade, tiny, whole(cascade)).cost({"M": 8, "N": 8, "K": 8})
    assert caught.value.diagnostics[0].code == "C540"


def test_two_passes_do_not_share_a_loop() -> None:
    cascade = prepared("cascade a(X[N]) -> Y[N] {\n S = sum[n] X[n]\n Y[n] = X[n] / S\n}")
    text = '[[regions]]\nloops = ["n = 1"]\n[[regions.stages]]\neinsums = ["S", "Y"]'
    with pytest.raises(CommandError, match="Y needs all of n from S"):
        evaluator(cascade, big(), parse_mapping(text)).cost({"N": 8})


BAD_MACHINES = [
    ("a = 1\na = 2", "C620", "overwrite"),
    ('extends = "fusemaxx"', "C605", "did you mean 'fusemax'"),
    ('extends = "fusemax"\nclock_hz = -1', "C621", "clock_hz is -1"),
    ('extends = "fusemax"\nclock_hz = nan', "C621", "clock_hz is nan"),
    ('extends = "fusemax"\n[units.2d]\nrows = 1.5', "C621", "units.2d.rows is 1.5"),
    ('extends = "fusemax"\n[units.2d]\nrow = 3', "C621", "units.2d.row means nothing"),
    ('extends = "fusemax"\n[units.2d.operations]\nexq = { cycles = 1 }', "C621", "exq is no operation"),
    ('extends = "fusemax"\n[units.2d.operations]\nexp = { made_of = { mak = 1 } }', "C621", "made_of.mak is 1"),
    ('extends = "fusemax"\n[units.2d]\nmemory = "x"', "C621", "it is one of dram"),
    ('name = "a"\nclock_hz = 1', "C621", "memories is missing"),
]


@pytest.mark.parametrize(("text", "code", "message"), BAD_MACHINES)
def test_a_wrong_machine_is_one_error(text: str, code: str, message: str) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        parse_machine(text)
    assert [finding.code for finding in caught.value.diagnostics] == [code]


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_machine_says_where_it_is_from(name: str) -> None:
    found = machine(name)
    assert found.name == name and found.source
    stated = [found.buffer.read, found.buffer.write, *(memory.energy for memory in found.memories.values())]
    stated += [op.energy for unit in found.units.values() for op in unit.operations.values()]
    assert None not in stated if found.energies else set(stated) == {None}, "all energies with their source, or none"
    assert found.energies or name in ("duplex-like", "neupims-like"), "none of theirs are published"
