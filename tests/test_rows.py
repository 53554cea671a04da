"""Rows in the order of an index that is data, against a loop over its values in float64; the order itself, by sorting.

Without a GPU the kernels run on small sizes through Triton's interpreter; with one the same tests run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import cascade
from cascade import interp
from cascade.backends.triton.launch import KernelStep, SortStep, TableStep
from cascade.backends.triton.plan import Blocks
from cascade.backends.triton.plan import Tensor as Planned
from cascade.backends.triton.plan import render_kernel
from cascade.backends.triton.rows import MOST_VALUES, expected_tiles, most_tiles, rows_a_tile
from cascade.errors import CallError
from cascade.frontend.build import parse_cascade
from cascade.ir import DType, GroupBy
from cascade.pipeline import run_pipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATED = """
cascade c(X[T,D], I: i64[T,J], G[T,J], W[N,D,F], U[N,D,F], V[N,F,D]) -> Y[T,D] {
    H[t,j,f] = silu(sum[d] X[t,d] * W[I[t,j],d,f]) * (sum[d] X[t,d] * U[I[t,j],d,f])
    Y[t,d] = sum[j] G[t,j] * (sum[f] H[t,j,f] * V[I[t,j],f,d])
}
"""
ROUTINGS = ("even", "skewed", "one", "empty")
SIZES = {  # T, D, F, N, J
    "one value": (20, 32, 48, 1, 1),
    "odd": (37, 131, 17, 7, 2),
    "odd, wide": (11, 24, 131, 5, 3),
    "many values": (6, 16, 16, 256, 8),
    "all values": (9, 16, 24, 8, 8),
    "one row": (1, 64, 32, 8, 2),
}


def tensors(size: str, routing: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Inputs: an index that is even, skewed, one number, or never the first half of the values."""
    t, d, f, n, j = SIZES[size]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    index = torch.randint(0, n, (t, j), generator=generator)
    if routing == "skewed":
        index = index * torch.randint(0, 2, (t, j), generator=generator) // 2
    elif routing == "one":
        index = torch.full_like(index, n - 1)
    elif routing == "empty":
        index = n // 2 + index // 2
    found = {"X": normal(t, d), "G": normal(t, j), "W": normal(n, d, f) / d**0.5, "U": normal(n, d, f) / d**0.5}
    found |= {"V": normal(n, f, d) / f**0.5}
    found = {name: tensor.to(dtype).to(DEVICE) for name, tensor in found.items()}
    return found | {"I": index.clamp(0, n - 1).to(DEVICE)}


def loop_over_values(given: Mapping[str, Tensor]) -> Tensor:
    """What is meant, value after value, in float64."""
    x, g, w, u, v = (given[name].double() for name in "XGWUV")
    out = torch.zeros_like(x)
    for value in range(len(w)):
        row, slot = torch.where(given["I"] == value)
        hidden = torch.nn.functional.silu(x[row] @ w[value]) * (x[row] @ u[value])
        out.index_add_(0, row, g[row, slot, None] * (hidden @ v[value]))
    return out


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_kernels_against_a_loop(size: str, routing: str) -> None:
    call = cascade.compile(GATED, backend="triton")
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        given = tensors(size, routing, dtype)
        wanted = loop_over_values(given)
        error = (call(**given).double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
        assert error < allowed, f"{dtype}: {error}"
    assert "no kernel" not in call.explain() and "I_order" in call.explain()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_the_interpreter_against_a_loop(size: str, routing: str) -> None:
    final = run_pipeline(parse_cascade(GATED)).final
    assert any(isinstance(item, GroupBy) for item in final.schedule)
    given = {name: t.double() if t.is_floating_point() else t for name, t in tensors(size, routing).items()}
    found = interp.run(final, given, {}, interp.Precision.REFERENCE)["Y"]
    torch.testing.assert_close(found, loop_over_values(given), rtol=1e-9, atol=1e-9)


def test_permuted_rows_give_permuted_results_bit_for_bit() -> None:
    """In whole numbers: where a row stands in a tile tells the CPU's matrix product in which order it adds."""
    text = """
    cascade c(X[T,D], I: i64[T,J], G[T,J], W[N,D,F]) -> Y[T,F] {
        Y[t,f] = sum[j] G[t,j] * (sum[d] X[t,d] * W[I[t,j],d,f])
    }
    """
    call = cascade.compile(text, backend="triton")
    given = {name: t for name, t in tensors("odd", "skewed", torch.float16).items() if name not in "UV"}
    if DEVICE == "cpu":
        given = {name: (8 * t).round() if t.is_floating_point() else t for name, t in given.items()}
    first = call(**given)
    assert torch.equal(call(**given), first)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    moved = {name: t[order].contiguous() if name in "XIG" else t for name, t in given.items()}
    assert torch.equal(call(**moved), first[order])


ROUTED = """
cascade c(X[T,D], R[D,N], W[N,D,F], V[N,F,D]) -> Y[T,D] {{
    G[t,j], I[t,j] = topk[n, {chosen}] softmax[n] (sum[d] X[t,d] * R[d,n])
    H[t,j,f] = silu(sum[d] X[t,d] * W[I[t,j],d,f])
    Y[t,d] = sum[j] G[t,j] / (sum[j] G[t,j]) * (sum[f] H[t,j,f] * V[I[t,j],f,d])
}}
"""


def routed(tokens: int, width: int, hidden: int, values: int) -> dict[str, Tensor]:
    """Inputs of a router and its products."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = {"X": (tokens, width), "R": (width, values), "W": (values, width, hidden), "V": (values, hidden, width)}
    return {name: (torch.randn(shape, generator=generator) / 4).to(DEVICE) for name, shape in shapes.items()}


def loop_over_tokens(given: Mapping[str, Tensor], chosen: int) -> Tensor:
    """Each token through what its scores choose, one after the other, in float64."""
    x, r, w, v = (given[name].double() for name in "XRWV")
    out = torch.zeros_like(x)
    for token, row in enumerate(x):
        weights, values = torch.topk(torch.softmax(row @ r, 0), chosen)
        for weight, value in zip(weights / weights.sum(), values.tolist(), strict=True):
            out[token] += weight * (torch.nn.functional.silu(row @ w[value]) @ v[value])
    return out


@pytest.mark.parametrize(("chosen", "values"), [(1, 1), (1, 8), (1, 256), (2, 5), (3, 64), (8, 8), (8, 256)])
def test_a_router_and_its_products_are_kernels(chosen: int, values: int) -> None:
    call = cascade.compile(ROUTED.format(chosen=chosen), backend="triton")
    for tokens, width, hidden in ((5, 24, 40), (1, 131, 17)):
        given = routed(tokens, width, hidden, values)
        wanted = loop_over_tokens(given, chosen)
        torch.testing.assert_close(call(**given).double(), wanted, rtol=1e-4, atol=1e-5)
        assert "no kernel" not in call.explain()
    assert "rows of H_sum by I[t,j]: grouped" in call.explain()


def test_a_token_that_is_not_a_number_stays_alone() -> None:
    """What is not a number is chosen first, whatever its sign: every index is one that there is."""
    call = cascade.compile(ROUTED.format(chosen=2), backend="triton")
    given = routed(21, 24, 40, 5)
    given["X"][3], given["X"][8, 5] = torch.inf, torch.nan  # infinities of both signs add up to a NaN with a sign
    found, wanted = call(**given).double(), loop_over_tokens(given, 2)
    assert bool(found[[3, 8]].isnan().all())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_no_rows_give_no_results() -> None:
    given = tensors("odd", "even")
    empty = {name: t[:0] if name in "XIG" else t for name, t in given.items()}
    assert cascade.compile(GATED, backend="triton")(**empty).shape == (0, 131)


def test_counts_of_rows_that_change_take_few_kernels() -> None:
    call: Any = cascade.compile(GATED, backend="triton")
    given = tensors("odd", "skewed")
    for count in (37, 5, 20, 30, 16):
        some = {name: t[:count].contiguous() if name in "XIG" else t for name, t in given.items()}
        wanted = loop_over_values(some)
        torch.testing.assert_close(call(**some).double(), wanted, rtol=1e-4, atol=1e-5)
    (launcher,) = call._launchers.values()
    plans = [[s.source.text for s in plan.steps if isinstance(s, KernelStep)] for plan in launcher.plans.values()]
    assert all(plan == plans[1] for plan in plans[1:])  # the first count has its own


# --- other forms -----------------------------------------------------------------------------------------------------

Rowwise = Callable[[Mapping[str, Tensor], int], Tensor]


def product_of(given: Mapping[str, Tensor], row: int) -> Tensor:
    """One row times the matrix that its index chooses."""
    return given["X"][row] @ given["W"][int(given["I"][row])]


FORMS: dict[str, tuple[str, Rowwise]] = {
    "a bias by the same index": (
        "Y[t,f] = relu((sum[d] X[t,d] * W[I[t],d,f]) + B[I[t],f])",
        lambda given, row: torch.relu(product_of(given, row) + given["B"][int(given["I"][row])]),
    ),
    "another operand of another extent": (
        "Y[t,f] = relu((sum[d] X[t,d] * W[I[t],d,f]) + C[I[t],f])",
        lambda given, row: torch.relu(product_of(given, row) + given["C"][int(given["I"][row])]),
    ),
    "a neighbour": (
        "Y[t,f] = relu((sum[d] X[t,d] * W[I[t],d,f]) + Z[t-1,f])",
        lambda given, row: torch.relu(product_of(given, row) + given["Z"][row - 1]) if row else torch.zeros(13),
    ),
    "its own coordinate": (
        "Y[t,f] = (sum[d] X[t,d] * W[I[t],d,f]) * t + f",
        lambda given, row: product_of(given, row) * row + torch.arange(13),
    ),
    "weights with a maximum of their own": (
        "Y[t,f] = sum[d] (softmax[d] X[t,d]) * W[I[t],d,f]",
        lambda given, row: torch.softmax(given["X"][row], 0) @ given["W"][int(given["I"][row])],
    ),
    "ranks in another order": (
        "A[f,t] = sum[d] (softmax[d] X[t,d]) * W[I[t],d,f]; Y[t,f] = relu(A[f,t])",
        lambda given, row: torch.relu(torch.softmax(given["X"][row], 0) @ given["W"][int(given["I"][row])]),
    ),
    "a softmax of what it gives": (
        "Y[t,f] = softmax[f] sum[d] X[t,d] * W[I[t],d,f]",
        lambda given, row: torch.softmax(product_of(given, row), 0),
    ),
    "an index that is made": (
        "K[t] = argmax[d] X[t,d]; Y[t,f] = sum[d] X[t,d] * U[K[t],d,f]",
        lambda given, row: given["X"][row] @ given["U"][int(given["X"][row].argmax())],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("narrow", [torch.int64, torch.int32, torch.int8])
def test_forms_row_by_row(form: str, narrow: torch.dtype) -> None:
    body, expected = FORMS[form]
    names = {"X": (29, 21), "W": (4, 21, 13), "U": (21, 21, 13), "B": (4, 13), "C": (6, 13), "Z": (29, 13)}
    ranks = {"X": "T,D", "W": "N,D,F", "U": "D,D,F", "B": "N,F", "C": "M,F", "Z": "T,F"}
    used = [name for name in names if f"{name}[" in body]
    declared = ", ".join([f"I: i{8 * narrow.itemsize}[T]"] * ("I[" in body) + [f"{n}[{ranks[n]}]" for n in used])
    generator = torch.Generator().manual_seed(len(form))
    given = {name: torch.randn(names[name], generator=generator) for name in used}
    index = {"I": torch.randint(0, 4, (29,), generator=generator).to(narrow)} if "I[" in body else {}
    call = cascade.compile(f"cascade c({declared}) -> Y[T,F] {{ {body} }}", backend="triton")
    found = call(**{name: tensor.to(DEVICE) for name, tensor in (given | index).items()})
    exact = {name: tensor.double() for name, tensor in given.items()} | index
    wanted = torch.stack([expected(exact, row).double() for row in range(29)])
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5)
    assert "in the order of" in "".join(map(told, steps_of(call)))


def steps_of(call: Any) -> list[Any]:
    """What a call runs, in order."""
    (launcher,) = call._launchers.values()
    return list(next(iter(launcher.plans.values())).steps)


def told(step: Any) -> str:
    """The plan of a kernel, as it prints."""
    return render_kernel(step.kernel) if isinstance(step, KernelStep) else ""


ONE = "cascade c(X[T,D], I: i64[T], W[N,D,F]) -> Y[T,F] { Y[t,f] = sum[d] X[t,d] * W[I[t],d,f] }"


def test_sums_over_the_rows_as_well() -> None:
    text = "cascade c(X[T,D], I: i64[S,T], W[N,D,F]) -> Y[T,F] { Y[t,f] = sum[d,s] X[t,d] * W[I[s,t],d,f] }"
    x, w = torch.randn(19, 16), torch.randn(5, 16, 24)
    index = torch.randint(0, 5, (3, 19))
    found = cascade.compile(text, backend="triton")(x.to(DEVICE), index.to(DEVICE), w.to(DEVICE))
    wanted = torch.stack([sum(x[t].double() @ w[i].double() for i in index[:, t].tolist()) for t in range(19)])
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5)


def test_an_index_of_very_many_values_is_not_sorted() -> None:
    call = cascade.compile(ONE, backend="triton")
    x, w = torch.randn(20, 16), torch.randn(MOST_VALUES + 1, 16, 16)
    index = torch.randint(0, len(w), (20,))
    wanted = torch.stack([row.double() @ w[value].double() for row, value in zip(x, index.tolist(), strict=True)])
    found = call(x.to(DEVICE), index.to(DEVICE), w.to(DEVICE))
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(step, SortStep) for step in steps_of(call))


def test_an_index_out_of_range_is_refused_by_the_interpreter() -> None:
    given = tensors("odd", "even")
    given["I"][3, 1] = 7
    with pytest.raises(CallError, match="C311"):
        interp.run(run_pipeline(parse_cascade(GATED)).final, given)


@pytest.mark.parametrize("wrong", [3, -1, 2**16, 2**40])
def test_an_index_out_of_range_is_refused_by_the_device(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a failed assertion ends the process's use of it: only what is asserted is looked at."""
    seen: list[bool] = []
    monkeypatch.setattr(torch, "_assert_async", lambda holds, _told: seen.append(bool(holds)))
    call = cascade.compile(ONE, backend="triton")
    x, index, w = torch.randn(20, 16), torch.randint(0, 3, (20,)), torch.randn(3, 16, 16)
    call(x.to(DEVICE), index.to(DEVICE), w.to(DEVICE))
    index[7] = wrong
    call(x.to(DEVICE), index.to(DEVICE), w.to(DEVICE))
    assert seen == [True, False]
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="points outside"):
        torch._assert_async(torch.tensor(0), "an index from data points outside")


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 15, 101])
@pytest.mark.parametrize("tile", [16, 64])
def test_tables_have_every_row_once(rows: int, values: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(rows + values)
    index = torch.randint(0, values, (rows,), generator=generator)
    index[index == values // 2] = 0  # a value that no row has
    blocks = Blocks("row", "ROWS", Planned("I", DType.I64, (rows,), (1,)), values, tile, ("order", "value", "count"))
    tiles = most_tiles(rows, values, tile)
    sort = SortStep("I", values)
    table = TableStep(sort, blocks, tiles * tile)
    found = {"I": index.to(DEVICE)}
    found |= {name: torch.empty(shape, dtype=dtype, device=DEVICE) for name, shape, dtype in table.made}
    sort(found)
    table(found)
    order, value = found["order"].cpu().reshape(tiles, tile), found["value"].cpu()
    wanted: list[list[int]] = []
    for number in range(values):
        own = torch.where(index == number)[0].tolist()
        wanted += [own[at : at + tile] for at in range(0, len(own), tile)]
    assert found["count"].tolist() == [len(wanted), 1] and len(wanted) <= tiles
    for number, own in enumerate(wanted):
        assert order[number].tolist() == own + [-1] * (tile - len(own))
        assert all(int(index[row]) == int(value[number]) for row in own)
    assert bool((order[len(wanted) :] == -1).all())


@pytest.mark.parametrize(("rows", "values", "tile"), [(16384, 8, 128), (49152, 64, 128), (128, 8, 32), (2, 256, 16)])
def test_how_many_rows_a_tile_has(rows: int, values: int, tile: int) -> None:
    assert rows_a_tile(rows, values) == tile
    assert expected_tiles(rows, values, tile) <= most_tiles(rows, values, tile)
