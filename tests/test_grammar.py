"""The tables of the parser that lie beside the grammar: they are those that lark computes from it."""

from __future__ import annotations

from typing import Any

import pytest
from lark import Lark
from lark.parsers.lalr_analysis import Shift

from cascade.frontend import tables


def states(made: Lark) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """What is done in each state at each word, and where each rule that may begin begins."""
    table: Any = made.parser.parser._parse_table  # type: ignore[attr-defined]
    return table.states, table.start_states


def test_the_tables_are_those_of_the_grammar() -> None:
    """State by state from where each rule begins, whatever their numbers."""
    (ours, begun), (wanted, starts) = states(tables.parser(None)), states(tables.computed(tables.grammar()))
    assert begun.keys() == starts.keys() and len(ours) == len(wanted)
    twin = {begun[name]: starts[name] for name in begun}
    todo = list(twin)
    while todo:
        here = todo.pop()
        assert ours[here].keys() == wanted[twin[here]].keys()
        for word, (action, target) in ours[here].items():
            other, goal = wanted[twin[here]][word]
            assert action is other
            if action is not Shift:
                assert (target, target.alias, str(target.options)) == (goal, goal.alias, str(goal.options))
            elif target not in twin:
                twin[target] = goal
                todo.append(target)
            assert action is not Shift or twin[target] == goal
    assert len(twin) == len(ours) == len(set(twin.values()))


def test_terminals_are_those_of_the_grammar() -> None:
    ours, wanted = (
        {t.name: (type(t.pattern), t.pattern.value, {*t.pattern.flags}, t.priority) for t in made.terminals}
        for made in (tables.parser(None), tables.computed(tables.grammar()))
    )
    assert ours == wanted


def test_tables_lie_beside_the_grammar_and_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another grammar or another lark they are computed anew."""
    asked: list[str] = []
    monkeypatch.setattr(tables, "computed", lambda text, _: asked.append(text))
    assert tables.parser(None) is not None and not asked
    monkeypatch.setattr(tables, "grammar", lambda: "start: WORD")
    tables.parser(None)
    assert asked == ["start: WORD"]
