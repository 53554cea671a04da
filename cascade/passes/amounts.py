"""Amounts: polynomials in shape symbols, numbers where the sizes are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cascade.ir import Size


@dataclass(frozen=True, slots=True)
class Amount:
    """A polynomial in shape symbols: for each product of symbols, in order, its factor."""

    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    @property
    def value(self) -> int | None:
        """The number; None while a symbol is unknown."""
        return sum(factor for _, factor in self.terms) if all(not symbols for symbols, _ in self.terms) else None

    def __add__(self, other: Amount) -> Amount:
        total: dict[tuple[str, ...], int] = {}
        for symbols, factor in (*self.terms, *other.terms):
            total[symbols] = total.get(symbols, 0) + factor
        return Amount(tuple(sorted((symbols, factor) for symbols, factor in total.items() if factor)))

    def times(self, factor: int) -> Amount:
        """The amount, so many times."""
        return Amount(tuple((symbols, old * factor) for symbols, old in self.terms if factor))

    def __str__(self) -> str:
        """`2*E*M*N + M*N`, `0` for nothing."""
        words = [
            "*".join((*((str(factor),) if factor != 1 or not symbols else ()), *symbols))
            for symbols, factor in self.terms
        ]
        return " + ".join(words) or "0"


NOTHING = Amount()


def product(extents: Iterable[Size], sizes: Mapping[str, int]) -> Amount:
    """The product of extents, as a number as far as the sizes tell."""
    known, symbols = 1, []
    for extent in extents:
        size = extent if isinstance(extent, int) else sizes.get(extent)
        if size is None:
            symbols.append(str(extent))
        else:
            known *= size
    return Amount(((tuple(sorted(symbols)), known),) if known else ())


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum of amounts."""
    return sum(amounts, NOTHING)
