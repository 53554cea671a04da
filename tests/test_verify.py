"""Inference and the verifier: shapes, types, sizes, what mutants of a valid cascade get, and that nothing else raises.

What each rule says is in `cases/verify`, with positions; here is what needs code.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from cascade import trial
from cascade.errors import CallError, CascadeError, UnsupportedError, VerifyError
from cascade.frontend.build import parse_cascade
from cascade.inference import F8, FLOATS, bind_sizes, infer_dtypes, infer_shapes, promote
from cascade.interp import Precision, run
from cascade.ir import (
    Apply, Cascade, Const, DType, Einsum, Expr, Extent, Fold, FoldInit, FoldMerge, Fuse, Init, Mesh, Param, Part, Rank,
    Read, Reduce, Result, Split, Stream, Target, Tile, TopK, Use, Wait,
)  # fmt: skip
from cascade.scopes import facts, scan, signatures, visible
from cascade.values import FROM_TORCH
from cascade.verify import canonical, findings, inlined, verify, well_formed
from cascade.verify.program import strongly_connected
from cascade.walk import rewrite
from tests.generate import random_cascade
from tests.timing import least, within

ATTENTION = """
cascade attention(Q: bf16[B,H,M,E], K[B,H,N,E], V[B,H,N,F]) -> O[B,H,M,F] {
    S[b,h,m,n] = sum[e] Q[b,h,m,e] * K[b,h,n,e] / sqrt(E) where n <= m
    R[b,h,m] = max[n] S[b,h,m,n]
    P[b,h,m,n] = exp(S[b,h,m,n] - R[b,h,m])
    D[b,h,m] = sum[n] P[b,h,m,n]
    O[b,h,m,f] = sum[n] P[b,h,m,n] / D[b,h,m] * V[b,h,n,f]
}
"""
SCAN = "cascade f(X[T,D]) -> H[T,D] {\n    H[t,d] = 0.5 * H[t-1,d] + X[t,d] init H[-1,d] = 0\n}"


def codes(cascade: Cascade) -> list[str]:
    """The codes of all findings."""
    return [found.code for found in findings(cascade)]


# --- inference -------------------------------------------------------------------------------------------------------


def test_shapes_of_attention() -> None:
    shapes = infer_shapes(parse_cascade(ATTENTION))
    assert shapes.ranks == {"b": "B", "h": "H", "m": "M", "n": "N", "e": "E", "f": "F"}
    assert shapes.tensors["S"] == ("B", "H", "M", "N")
    assert shapes.tensors["D"] == ("B", "H", "M")


def test_shapes_through_calls_and_topk() -> None:
    text = """
    cascade scale(X[M,N], g[N]) -> Y[M,N] { Y[m,n] = X[m,n] * g[n] }
    cascade f(A[4,K], g[K]) -> I[4,2] {
        S = scale(A, g)
        G[t,j], I[t,j] = topk[n, 2] S[t,n]
    }"""
    shapes = infer_shapes(parse_cascade(text))
    assert shapes.tensors["S"] == (4, "K")
    assert shapes.ranks == {"t": 4, "j": 2, "n": "K"}


def test_infer_shapes_raises_every_conflict() -> None:
    text = """
    cascade f(A[M,64], B[65,N]) -> Z[M,N] {
        Z[m,n] = sum[k] A[m,k] * B[k,n]
        Y[m] = sum[w] A[m, w + 1] * B[m,0]
    }"""
    with pytest.raises(VerifyError) as caught:
        infer_shapes(parse_cascade(text))
    assert [found.code for found in caught.value.diagnostics] == ["C220", "C220", "C221"]


@pytest.mark.parametrize("a", DType)
@pytest.mark.parametrize("b", DType)
def test_promotion_is_symmetric_and_keeps_floats(a: DType, b: DType) -> None:
    assert promote(a, b) is promote(b, a)
    assert (promote(a, b) in FLOATS) == (a in FLOATS or b in FLOATS)
    assert promote(a, a) is (DType.F32 if a in F8 else a)


def test_types_of_intermediates() -> None:
    text = """
    def half(x) = x / 2
    cascade f(A: bf16[M,N], I: i32[M], C: bool[M]) -> Z[M], W: f16[M] {
        S[m] = sum[n] A[m,n] * 2
        T[m] = half(I[m]) + 1
        U[m] = I[m] * 2 + m
        V[m] = S[m] * T[m]
        J[m] = argmax[n] A[m,n]
        B[m] = C[m] + C[m]
        H[m] = H[m-1] * 0.5 + I[m] init H[-1] = 0
        K[m] = sqrt(M) * A[m,0]
        X[m] = m * 2
        Z[m] = max(K[m], X[m])
        W[m] = B[m] + H[m] + J[m] + U[m] + V[m]
    }"""
    types = {name: dtype.value for name, dtype in infer_dtypes(parse_cascade(text), {}).items()}
    assert types == {
        "A": "bf16", "I": "i32", "C": "bool", "S": "bf16", "T": "f32", "U": "i32", "V": "f32", "J": "i64", "B": "i64",
        "H": "f32", "K": "bf16", "X": "i64", "Z": "bf16", "W": "f16",
    }  # fmt: skip


def test_types_are_those_the_interpreter_gives() -> None:
    kinds = [DType.BF16, DType.F16, DType.F32, DType.F64, DType.I32, DType.I64, DType.BOOL, DType.F8E4M3]
    for seed in range(60):
        cascade, rng = random_cascade(seed), random.Random(seed)
        if findings(cascade):
            continue
        types = trial.param_types(cascade, DType.F32)
        types = {name: rng.choice(kinds) if dtype is DType.F32 else dtype for name, dtype in types.items()}
        sizes = trial.small_sizes(cascade, {})
        found = run(cascade, trial.random_inputs(cascade, sizes, types, seed), sizes)
        wanted = infer_dtypes(cascade, types)
        assert {name: FROM_TORCH[data.dtype] for name, data in found.items()} == {name: wanted[name] for name in found}


SIZES = "cascade f(A[M,4], B[M,N]) -> Z[M,P] {\n    Z[m,p] = A[m,0] where p < P\n}"


def test_sizes_are_bound() -> None:
    cascade = parse_cascade(SIZES)
    assert bind_sizes(cascade, {"A": (3, 4), "B": (3, 0)}, {"P": 7}) == {"M": 3, "N": 0, "P": 7}


@pytest.mark.parametrize(
    ("args", "given", "code", "says"),
    [
        ({"A": (3, 4, 1), "B": (3, 5)}, {"P": 1}, "C320", "'A' has 3 ranks, declared with 2"),
        ({"A": (3, 4), "B": (6, 5)}, {"P": 1}, "C321", "'M' is 3 in 'A' and 6 in 'B'"),
        ({"A": (3, 4), "B": (3, 5)}, {"P": 1, "M": 2}, "C321", "'M' is 2 by keyword and 3 in 'A'"),
        ({"A": (3, 5), "B": (3, 5)}, {"P": 1}, "C322", "rank 2 of 'A' has extent 5, declared 4"),
        ({"A": (3, 4), "B": (3, 5)}, {}, "C323", "pass it by keyword: f(..., P=...)"),
        ({"A": (3, 4), "B": (3, 5)}, {"P": -1}, "C324", "the size of 'P' is -1"),
        ({"A": (1 << 40, 4), "B": (1 << 40, 5)}, {"P": 1 << 40}, "C325", "about 10^24 elements"),
        ({"A": (3, 4), "B": (3, 5)}, {"P": 1, "Q": 2}, "C326", "'Q' is no shape symbol"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(args: dict[str, tuple[int, ...]], given: dict[str, int], code: str, says: str) -> None:
    with pytest.raises(CallError) as caught:
        bind_sizes(parse_cascade(SIZES), args, given)
    assert {found.code for found in caught.value.diagnostics} == {code}
    assert says in str(caught.value)


# --- scopes ----------------------------------------------------------------------------------------------------------


def test_a_use_binds_what_its_body_binds() -> None:
    cascade = parse_cascade(
        "cascade f(X[M,N], g[N]) -> A[M], B[M,N] {\n    A[m] = mean[n] X[m,n]\n    B[m,n] = softmax[n] X[m,n] * g[n]\n}"
    )
    known = signatures(visible(cascade).values())
    mean, softmax = (facts(stmt, known) for stmt in cascade.body)
    assert list(mean.body.free) == ["m"]
    assert sorted(softmax.body.free) == ["m", "n"]
    assert frozenset("n") in mean.body.scopes and frozenset("n") in softmax.body.scopes


def test_nothing_recurses_into_expressions() -> None:
    deep: Expr = Read("X", (Rank("m"),))
    for _ in range(20_000):
        deep = Apply("add", (deep, Const(1)))
    assert len(scan(deep, {}).nodes) == 40_002
    statement = Einsum(Target("Z", ("m",)), deep)
    cascade = Cascade("deep", (Param("X", None, ("M",)),), (Result("Z", None, ("M",)),), (statement,))
    verify(cascade)
    assert infer_dtypes(cascade, {"X": DType.F16})["Z"] is DType.F16


# --- mutants ---------------------------------------------------------------------------------------------------------


def changed(cascade: Cascade, at: int, **parts: object) -> Cascade:
    """The cascade with one statement changed."""
    body = list(cascade.body)
    body[at] = dataclasses.replace(body[at], **parts)  # type: ignore[arg-type]
    return dataclasses.replace(cascade, body=tuple(body))


def dropped(cascade: Cascade, at: int) -> Cascade:
    """The cascade without one statement."""
    return dataclasses.replace(cascade, body=cascade.body[:at] + cascade.body[at + 1 :])


def test_a_statement_dropped() -> None:
    cascade = parse_cascade(ATTENTION)
    verify(cascade)
    for at in range(5):
        found = codes(dropped(cascade, at))
        assert found == (["C206"] if at == 4 else ["C203"]), at


def test_ranks_swapped() -> None:
    cascade = parse_cascade(ATTENTION)
    for at, stmt in enumerate(cascade.body):
        assert isinstance(stmt, Einsum)
        for i, j in itertools.combinations(range(len(stmt.target.ranks)), 2):
            ranks = list(stmt.target.ranks)
            ranks[i], ranks[j] = ranks[j], ranks[i]
            mutant = changed(cascade, at, target=Target(stmt.target.name, tuple(ranks)))
            assert "C220" in codes(mutant), (at, ranks)


def test_a_reduction_dropped() -> None:
    cascade = parse_cascade(ATTENTION)
    for at in (0, 1, 3, 4):
        stmt = cascade.body[at]
        assert isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce)
        assert codes(changed(cascade, at, expr=stmt.expr.body)) == ["C211"]


def test_a_first_value_dropped() -> None:
    cascade = parse_cascade(SCAN)
    verify(cascade)
    assert codes(changed(cascade, 0, inits=())) == ["C226"]


def fused(*statements: str) -> Cascade:
    """Attention with these statements in one trip over n."""
    return dataclasses.replace(parse_cascade(ATTENTION), schedule=(Fuse(statements, "n"),))


@pytest.mark.parametrize("size", range(1, 6))
def test_groups_are_legal_where_streaming_them_is_right(size: int) -> None:
    """The witness is the interpreter: block by block, an illegal group gives other numbers, or has no order to run in."""
    plain = parse_cascade(ATTENTION)
    sizes = dict.fromkeys("BHEF", 2) | {"M": 7, "N": 7}
    inputs = trial.random_inputs(plain, sizes, dict.fromkeys("QKV", DType.F64), 0)
    wanted = run(plain, inputs, sizes, Precision.REFERENCE)["O"]
    for group in itertools.combinations("SRPDO", size):
        cascade = fused(*group)
        try:
            found = run(cascade, inputs, sizes, Precision.REFERENCE, block=2)["O"]
            streams = torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
        except UnsupportedError:
            streams = False
        assert (not findings(cascade)) == streams, group


FOLDED = """
cascade attention(S[M,N], V[N,F]) -> O[M,F] {
    R[m] = max[n] S[m,n]
    P[m,n] = exp(S[m,n] - R[m])
    D[m] = sum[n] P[m,n]
    T[m,f] = sum[n] P[m,n] * V[n,f]
    O[m,f] = T[m,f] / D[m]
} schedule {
    fold n {
        state R, D, T
        init R[m] = empty
        init D[m] = empty
        init T[m,f] = empty
        update R, P, D, T
        merge R[m] = R'[m]
        merge D[m] = D'[m] * exp(R'[m] - R[m])
        merge T[m,f] = T'[m,f] * exp(R'[m] - R[m])
        finalize O
    }
}
"""


def refolded(**changes: object) -> Cascade:
    """Attention in one trip, with a changed fold."""
    cascade = parse_cascade(FOLDED)
    fold = cascade.schedule[0]
    assert isinstance(fold, Fold)
    return dataclasses.replace(cascade, schedule=(dataclasses.replace(fold, **changes),))  # type: ignore[arg-type]


def test_a_fold_is_complete() -> None:
    verify(refolded())
    verify(refolded(finalize=()))
    fold = refolded().schedule[0]
    assert isinstance(fold, Fold)
    for at in range(3):
        for part in ("state", "init", "merge"):
            rest = getattr(fold, part)[:at] + getattr(fold, part)[at + 1 :]
            assert "C249" in codes(refolded(**{part: rest})), (part, at)
    for at in range(4):  # nothing but the fold needs a block of P or an unfinished state
        assert codes(refolded(update=fold.update[:at] + fold.update[at + 1 :])), at
    assert set(codes(refolded(rank="f"))) >= {"C243", "C249"}


def test_a_fold_is_updated_in_order() -> None:
    for order in itertools.permutations("RPDT"):
        allowed = order[:2] == ("R", "P")
        assert (not findings(refolded(update=order))) == allowed, order


def test_a_fold_keeps_what_it_mentions() -> None:
    text = FOLDED.replace("} schedule", "    U[m] = R[m] * 2\n} schedule")
    assert [found.message for found in canonical.holds(parse_cascade(text))] == ["nothing needs 'U'"]
    assert canonical.holds(parse_cascade(text.replace("finalize O", "finalize O, U"))) == ()


# --- invariants ------------------------------------------------------------------------------------------------------


def test_invariants() -> None:
    plain = parse_cascade(ATTENTION)
    assert well_formed.holds(plain) == inlined.holds(plain) == canonical.holds(plain) == ()
    text = "cascade f(X[M,N]) -> Z[M,N] {\n    Z[m,n] = softmax[n] X[m,n]\n}"
    assert [found.code for found in inlined.holds(parse_cascade(text))] == ["C251"]
    text = """
    cascade f(X[M,N]) -> Z[M,N] {
        Z[m,n] = X[m,n] / (sum[n] X[m,n]) + Y[m]
        Y[m] = max[n] X[m,n]
        U[m] = X[m,0]
    }"""
    messages = [found.message for found in canonical.holds(parse_cascade(text))]
    assert messages == [
        "'Z' holds a reduction, sum[n], that is not at its top",
        "'Z' stands before 'Y', which it reads",
        "nothing needs 'U'",
    ]
    assert canonical.holds(parse_cascade(SCAN)) == ()


# --- robustness ------------------------------------------------------------------------------------------------------


def test_time_is_linear() -> None:
    def layers(count: int) -> Cascade:
        body: list[Einsum] = []
        before = "X"
        for i in range(count):
            here, there = (Read(before, (Rank("t"), Rank("d"))), Read(f"G{i}", (Rank("t"), Rank("f"))))
            weight = Read("W", (Rank("d"), Rank("f")))
            body.append(Einsum(Target(f"G{i}", ("t", "f")), Reduce("sum", ("d",), Apply("mul", (here, weight)))))
            body.append(Einsum(Target(f"X{i}", ("t", "d")), Reduce("sum", ("f",), Apply("mul", (there, weight)))))
            before = f"X{i}"
        params = (Param("X", None, ("T", "D")), Param("W", None, ("D", "F")))
        return Cascade("layers", params, (Result(before, None, ("T", "D")),), tuple(body))

    def refuse(cascade: Cascade) -> None:
        found = findings(dataclasses.replace(cascade, params=()))  # every statement reads something undefined
        assert {diagnostic.code for diagnostic in found} == {"C203"} and len(found) == 2

    assert within(least(verify, (layers(1000) for _ in range(3))), 1.0)
    assert within(least(refuse, (layers(1000) for _ in range(3))), 1.0)


NAMES = ("X", "Y", "Z", "m", "n", "M", "N", "sum", "", "a b", "t", "\N{ZERO WIDTH SPACE}", "f" * 5000)


def nonsense(rng: random.Random, depth: int) -> Expr:
    """A random expression, valid or not."""
    name = rng.choice(NAMES)
    if depth == 0:
        leaves: list[Expr] = [
            Const(rng.choice((0, 1, -1.5, True, float("nan")))),
            Rank(name),
            Extent(name),
            Read(name, ()),
        ]
        return rng.choice(leaves)
    parts = tuple(nonsense(rng, depth - 1) for _ in range(rng.randint(0, 3)))
    inner = nonsense(rng, depth - 1)
    forms: list[Callable[[], Expr]] = [
        lambda: Read(name, parts),
        lambda: Apply(rng.choice(("add", "mul", "select", "not", "nope", "floordiv")), parts),
        lambda: Reduce(rng.choice(("sum", "argmax", "nope")), tuple(rng.sample(NAMES, rng.randint(0, 2))), inner),
        lambda: Use(rng.choice(("softmax", "X", "nope")), tuple(rng.sample(NAMES, rng.randint(0, 2))), parts),
    ]
    return rng.choice(forms)()


def primed(rng: random.Random, expr: Expr) -> Expr:
    """The expression with some reads of partial states."""

    def change(node: Expr) -> Expr:
        return Read(f"{node.tensor}'", node.index) if isinstance(node, Read) and rng.random() < 0.5 else node

    return rewrite(expr, change)


def rubbish(seed: int) -> Cascade:
    """A random cascade that is all but certain to be wrong."""
    rng = random.Random(seed)

    def ranks() -> tuple[str, ...]:
        return tuple(rng.choice(NAMES) for _ in range(rng.randint(0, 3)))

    def sizes() -> tuple[int | str, ...]:
        return tuple(rng.choice((*NAMES, 0, 1, -3, 10**30)) for _ in range(rng.randint(0, 3)))

    def statements() -> Iterator[Einsum | TopK]:
        for _ in range(rng.randint(0, 4)):
            target, expr = Target(rng.choice(NAMES), ranks()), nonsense(rng, rng.randint(0, 3))
            where = nonsense(rng, 2) if rng.random() < 0.3 else None
            inits = tuple(
                Init(rng.choice(NAMES), rng.randint(-2, 1), nonsense(rng, 1)) for _ in range(rng.randint(0, 2))
            )
            if rng.random() < 0.2:
                yield TopK(
                    target, Target(rng.choice(NAMES), ranks()), rng.choice(NAMES), rng.choice((2, -1, "K")), expr, where
                )
            else:
                yield Einsum(target, expr, where, inits)

    def fold() -> Fold:
        inits = tuple(FoldInit(Target(rng.choice(NAMES), ranks()), rng.choice((None, nonsense(rng, 2)))) for _ in "ab")
        merges = tuple(FoldMerge(Target(rng.choice(NAMES), ranks()), primed(rng, nonsense(rng, 2))) for _ in "ab")
        return Fold(rng.choice(NAMES), ranks(), inits, ranks(), merges, ranks())

    part = Part(rng.choice(NAMES), rng.choice((None, 0, 5)))
    schedule = (
        Fuse(ranks(), rng.choice(NAMES)), Tile(((rng.choice(NAMES), rng.randint(-1, 4)),)), Stream("s", (part, part)),
        fold(), Wait(part, part), Mesh("tp", rng.choice((0, "K"))), Split(rng.choice(NAMES), None, ()),
    )  # fmt: skip
    params = tuple(Param(rng.choice(NAMES), rng.choice((None, DType.I8)), sizes()) for _ in range(rng.randint(0, 3)))
    results = tuple(Result(rng.choice(NAMES), DType.BOOL, sizes(), Const(0.5)) for _ in range(rng.randint(0, 2)))
    return Cascade(rng.choice(NAMES), params, results, tuple(statements()), schedule[: rng.randint(0, 6)])


def test_only_cascade_errors() -> None:
    for seed in range(1500):
        cascade = rubbish(seed)
        for step in (verify, infer_shapes, canonical.holds, inlined.holds):
            try:
                step(cascade)
            except CascadeError as error:
                assert str(error)


def test_strongly_connected() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        count = rng.randint(0, 8)
        edges = [[rng.randrange(count) for _ in range(rng.randint(0, 2))] for _ in range(count)]
        reach = [{node} for node in range(count)]
        for _ in range(count):
            for node in range(count):
                reach[node] |= {far for other in edges[node] for far in reach[other]}
        found = {node: tuple(members) for members in strongly_connected(edges) for node in members}
        for a, b in itertools.product(range(count), repeat=2):
            assert (b in found[a]) == (b in reach[a] and a in reach[b])
