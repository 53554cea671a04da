"""Fusing: classes of pairs, what may be fused against the verifier, folds that grow, and numbers that stay."""

from __future__ import annotations

import dataclasses
import random

import dependent
import generate
import pytest
import torch

from cascade.errors import UnsupportedError
from cascade.frontend.build import parse_cascade, parse_program
from cascade.interp import Precision, run
from cascade.ir import Cascade, Fold, Fuse, Split, TopK
from cascade.passes import PASSES
from cascade.passes.base import parse_pass, spelling
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.fuse import Fuse as FusePass
from cascade.passes.fuse import FusionClass, fusion_class, iteration_ranks, may_fuse
from cascade.passes.inline import Inline
from cascade.text import render
from cascade.trial import unlike
from cascade.verify import canonical, findings, verify
from cascade.walk import defines, free_ranks
from tests.test_random import valid
from tests.test_speed import model
from tests.timing import least, within

PARTS = 8
SHARES = [0, *(pytest.param(part, marks=pytest.mark.campaign) for part in range(1, PARTS))]
"""Of a campaign, so that workers share it; the first is quick enough for every commit."""

ATTENTION = """
cascade attention(Q[M,E], K[N,E], V[N,F]) -> O[M,F] {
    S[m,n] = sum[e] Q[m,e] * K[n,e]
    R[m] = max[n] S[m,n]
    P[m,n] = exp(S[m,n] - R[m])
    D[m] = sum[n] P[m,n]
    T[m,f] = sum[n] P[m,n] * V[n,f]
    O[m,f] = T[m,f] / D[m]
}
"""


def prepared(cascade: Cascade) -> Cascade:
    """The cascade in the form that is fused."""
    return Canonicalize()(Inline()(cascade))


def groups(cascade: Cascade) -> list[str]:
    """The groups of a schedule as text: the rank and the statements of each."""
    found = [item for item in cascade.schedule if isinstance(item, (Fuse, Fold))]
    return [f"{g.rank}: {' '.join(g.statements if isinstance(g, Fuse) else g.update)}" for g in found]


def check(cascade: Cascade, plain: Cascade, inputs: dict[str, torch.Tensor]) -> Cascade:
    """The cascade after fusing: valid, canonical, printable, done, and of the meaning of `plain` in blocks of any size."""
    fused = FusePass()(cascade)
    if fused is cascade:
        return cascade
    verify(fused)
    assert canonical.holds(fused) == (), render(fused)
    assert parse_cascade(render(fused)) == fused
    wanted = run(plain, inputs, precision=Precision.REFERENCE)
    for block in (1, 2, 3):
        found = run(fused, inputs, precision=Precision.REFERENCE, block=block)
        for name in wanted:
            assert not (how := unlike(found[name], wanted[name])), f"{name}, {how}\n{render(fused)}"
    return fused


# --- classes and legality --------------------------------------------------------------------------------------------


def test_classes_of_pairs() -> None:
    statements = {defines(stmt)[0]: stmt for stmt in parse_cascade(ATTENTION).body}
    assert iteration_ranks(statements["S"]) == ("m", "n", "e")
    wanted = {"SR": "RSb", "RP": "RI", "PD": "RI", "SP": "RSb", "PT": "RSp", "PS": "RSp", "ST": "RD", "TO": "RSb"}
    for pair, name in wanted.items():
        assert fusion_class(statements[pair[0]], statements[pair[1]]) is FusionClass(name), pair


REFUSED = {
    "S R P": ("'P' reads 'R', which is final behind the last block of 'n' only",),
    "S O": (
        "'O' neither has the rank 'n' nor reduces it",
        "'P' stands outside, needs 'S' of the group, and the group needs it",
    ),
    "R D": ("'P' stands outside, needs 'R' of the group, and the group needs it",),
    "S S": ("'S' is named twice",),
    "X": ("there is no statement 'X'",),
    "P D": (),
    "S R": (),
}


@pytest.mark.parametrize("group", REFUSED)
def test_reasons(group: str) -> None:
    assert may_fuse(parse_cascade(ATTENTION), group.split(), "n") == REFUSED[group]


def test_reasons_of_ranks_and_groups() -> None:
    cascade = parse_cascade(ATTENTION)
    assert may_fuse(cascade, ["S"], "z") == ("there is no rank 'z'", "'S' neither has the rank 'z' nor reduces it")
    with_group = dataclasses.replace(cascade, schedule=(Fuse(("S", "R"), "n"),))
    assert may_fuse(with_group, ["S", "P"], "n")[0] == "'S' is in a trip over 'n' already"
    assert may_fuse(with_group, ["S", "R"], "m") == ()
    assert may_fuse(with_group, ["R", "P"], "m") == ("'R' is in a trip over 'n' already, and others are not",)


CROSSED = """
cascade c(X[M], Y[K]) -> B[M], D[K] {
    A[m] = exp(X[m])
    C[k] = exp(Y[k]) + A[0]
    D[k] = exp(Y[k]) * C[k]
    E[k] = exp(Y[k])
    B[m] = exp(X[m]) + E[0]
} schedule {
    fuse {A, B} over m
}
"""


def test_groups_that_wait_for_each_other() -> None:
    """The verifier looks at one group at a time and takes both; no order runs them, which is what `may_fuse` sees."""
    cascade = parse_cascade(CROSSED)
    wanted = "'B' stands outside, needs 'E' of the group, and the group needs it"
    assert may_fuse(cascade, ["C", "E"], "k") == (wanted,)
    both = dataclasses.replace(cascade, schedule=(*cascade.schedule, Fuse(("C", "E"), "k")))
    verify(both)
    with pytest.raises(UnsupportedError, match="C501"):
        run(both, {"X": torch.ones(2), "Y": torch.ones(3)})


def counts_along(cascade: Cascade, rank: str) -> bool:
    """Whether a `topk` counts by the rank what it keeps."""
    kept = [stmt for stmt in cascade.body if isinstance(stmt, TopK) and rank in stmt.values.ranks]
    return any(rank not in free_ranks(stmt.body) for stmt in kept)


@pytest.mark.parametrize("part", SHARES)
def test_what_may_be_fused_is_what_verifies(part: int) -> None:
    """Random groups of random cascades, canonical and not; the kept rank of a `topk` aside, which `may_fuse` refuses."""
    count = {True: 0, False: 0}
    for seed in range(part, 1200, PARTS):
        made = valid(seed)
        if made is None:
            continue
        rng = random.Random(seed)
        for cascade in (made[0], prepared(made[0])):
            names = [defines(stmt)[0] for stmt in cascade.body]
            for _ in range(4):
                rank = rng.choice(generate.RANKS)
                near = [defines(stmt)[0] for stmt in cascade.body if rank in iteration_ranks(stmt)]
                pool = near if near and rng.random() < 0.9 else names
                group = tuple(sorted(rng.sample(pool, rng.randint(1, min(4, len(pool)))), key=names.index))
                legal = not findings(dataclasses.replace(cascade, schedule=(Fuse(group, rank),)))
                assert counts_along(cascade, rank) or legal == (not may_fuse(cascade, group, rank)), (seed, group, rank)
                count[legal] += 1
    assert min(count.values()) > 200, count


# --- the pass --------------------------------------------------------------------------------------------------------


def test_attention() -> None:
    cascade = parse_cascade(ATTENTION)
    assert groups(FusePass()(cascade)) == ["n: S R", "n: P D T"]
    assert groups(FusePass(over="n")(cascade)) == ["n: S R", "n: P D T"]
    assert FusePass(over="m")(cascade) is cascade
    assert FusePass(over="z")(cascade) is cascade
    assert spelling(parse_pass("fuse{over=n}", PASSES)) == "fuse{over=n}"
    fused = FusePass()(cascade)
    assert FusePass()(fused) is fused


def test_every_group_may_be_fused() -> None:
    """The pass decides with an analysis of its own, of all groups at once; each of them is one that `may_fuse` allows."""
    checked = 0
    for seed in range(300):
        made = valid(seed)
        cascade = prepared(made[0]) if made else None
        for group in FusePass()(cascade).schedule if cascade else ():
            assert isinstance(group, Fuse) and cascade is not None
            if set(group.statements) <= {defines(stmt)[0] for stmt in cascade.body}:
                assert may_fuse(cascade, group.statements, group.rank) == (), (seed, group)
                checked += 1
    assert checked > 80


@pytest.mark.parametrize("part", SHARES)
def test_random_cascades_keep_their_meaning(part: int) -> None:
    """With splits of some ranks in every third, and a group of the author's in every fourth."""
    changed = 0
    for seed in range(part, 1000, PARTS):
        made = valid(seed)
        if made is None:
            continue
        plain, rng = prepared(made[0]), random.Random(seed)
        cascade = plain
        if seed % 3 == 1:
            ranks = sorted({rank for stmt in plain.body for rank in iteration_ranks(stmt)} - {"z"})
            splits = tuple(Split(rank, rng.choice((1, 2, 3))) for rank in rng.sample(ranks, min(2, len(ranks))))
            cascade = dataclasses.replace(cascade, schedule=splits)
        elif seed % 4 == 2:
            cascade = FusePass(over=rng.choice(generate.RANKS))(cascade)
        fused = check(cascade, plain, made[1])
        assert set(groups(cascade)) <= set(groups(fused))
        changed += fused is not cascade
    assert changed > 30, changed


@pytest.mark.parametrize("split", [None, 1, 2, 3])
def test_chains_of_dependent_reductions_keep_their_meaning(split: int | None) -> None:
    schedule = () if split is None else (Split("n", split),)
    for seed in dependent.SEEDS:
        plain = prepared(dependent.chain(seed))
        check(dataclasses.replace(plain, schedule=schedule), plain, dependent.inputs(plain, seed))


def test_2600_statements_are_fused_in_seconds() -> None:
    cascade = prepared(parse_program(model(100))[-1])
    assert within(least(FusePass(), [cascade]), 3)
    assert len(FusePass()(cascade).schedule) >= 600


# --- folds that take in ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Around:
    """Folds over n, as an online softmax has them, with random statements around: maps, reductions, reads elsewhere."""

    rng: random.Random
    maps: list[str] = dataclasses.field(default_factory=lambda: ["X[m,n]"])
    values: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    folds: list[str] = dataclasses.field(default_factory=list)

    def build(self) -> Cascade:
        """The cascade: one fold or two, what is around them, and results among all."""
        for number in range(self.rng.choice((1, 1, 2))):
            self.fold(number)
            self.some(3)
        names = [line.split("[")[0] for line in self.lines]
        shapes = {"A": "M,N", "T": "M,F"}
        ends = [name for name in names if name[0] in "ABCW" and self.rng.random() < 0.5] + ["T0"]
        results = ", ".join(f"{name}[{shapes.get(name[0], 'M')}]" for name in ends)
        split = self.rng.choice(("", "", "split n into 2", "split n at 2"))
        body, schedule = "\n".join(self.lines), "\n".join([split, *self.folds])
        return parse_cascade(f"cascade c(X[M,N], V[N,F]) -> {results} {{\n{body}\n}} schedule {{\n{schedule}\n}}")

    def expr(self) -> str:
        """A map that has n, now and then with a read at another coordinate of it."""
        one = self.rng.choice(self.maps)
        other = self.rng.choice([*self.maps, *self.values, "V[n,0]"])
        if self.rng.random() < 0.15:
            one = f"({one.replace('n]', self.rng.choice(('n-1]', 'n+1]', 'n-2]')))} ?? 0.5)"
        form = self.rng.choice(("tanh({x} * {y})", "sin({x}) + {y}", "cos({x} - 2 * {y})", "exp(0.1 * sin({x}))"))
        return form.format(x=one, y=other)

    def define(self, letter: str, ranks: str, expr: str) -> str:
        """A statement of its own; the read of what it defines."""
        read = f"{letter}{len(self.lines)}[{ranks}]"
        self.lines.append(f"{read} = {expr}")
        return read

    def some(self, most: int) -> None:
        """A few statements: maps, reductions, reads at one coordinate, values of values."""
        for _ in range(self.rng.randint(0, most)):
            roll = self.rng.random()
            if roll < 0.5:
                self.maps.append(self.define("A", "m,n", self.expr()))
            elif roll < 0.75:
                reducer = self.rng.choice(("sum", "max", "min", "argmax"))
                self.values.append(self.define("B", "m", f"{reducer}[n] ({self.expr()})"))
            elif roll < 0.9:
                at = self.rng.choice(("0]", "N-1]"))
                self.values.append(self.define("C", "m", self.rng.choice(self.maps).replace("n]", at) + " + 1.0"))
            elif self.values:
                self.values.append(self.define("W", "m", f"tanh({self.rng.choice(self.values)})"))

    def fold(self, i: int) -> None:
        """An online softmax over a random map, times a random map."""
        self.some(4)
        self.lines += [f"S{i}[m,n] = {self.expr()}", f"R{i}[m] = max[n] S{i}[m,n]"]
        self.maps.append(f"S{i}[m,n]")
        self.some(2)
        self.lines += [f"P{i}[m,n] = exp(S{i}[m,n] - R{i}[m])", f"D{i}[m] = sum[n] P{i}[m,n]"]
        self.some(2)
        self.lines.append(f"T{i}[m,f] = sum[n] P{i}[m,n] * V[n,f] * ({self.expr()})")
        self.values += [f"D{i}[m]", f"R{i}[m]", f"T{i}[m,0]"]
        moved = f"* exp(R{i}'[m] - R{i}[m])"
        self.folds.append(f"""fold n {{
            state R{i}, D{i}, T{i}
            init R{i}[m] = empty; init D{i}[m] = empty; init T{i}[m,f] = empty
            update R{i}, P{i}, D{i}, T{i}
            merge R{i}[m] = R{i}'[m]; merge D{i}[m] = D{i}'[m] {moved}; merge T{i}[m,f] = T{i}'[m,f] {moved}
        }}""")


@pytest.mark.parametrize("part", SHARES)
def test_folds_take_in_what_streams_into_them(part: int) -> None:
    found = {"maps": 0, "states": 0, "copies": 0}
    generator = torch.Generator().manual_seed(part)
    inputs = {name: torch.randn(shape, generator=generator).double() for name, shape in (("X", (3, 7)), ("V", (7, 2)))}
    for seed in range(part, 400, PARTS):
        cascade = prepared(Around(random.Random(seed)).build())
        verify(cascade)
        fused = check(cascade, dataclasses.replace(cascade, schedule=()), inputs)
        for before, after in zip(cascade.schedule, fused.schedule, strict=False):
            if isinstance(before, Fold):
                assert isinstance(after, Fold)
                assert [name for name in after.update if name in before.update] == list(before.update)
                states = len(after.state) - len(before.state)
                found["states"] += states
                found["maps"] += len(after.update) - len(before.update) - states
        found["copies"] += len(fused.body) - len(cascade.body)
    assert found["maps"] > 30 and found["states"] > 20, found
