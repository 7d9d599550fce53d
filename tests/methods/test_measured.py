"""What ways were measured to keep: read from one file, and turned into advice by it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moetool.methods import described, measured

KL = {
    "prune": {
        "chance": {"25%": 0.3, "50%": 0.9, "25% refit": 0.2, "50% refit": None},
        "good": {"25%": 0.1, "50%": 0.5, "25% refit": 0.05},
        "bad": {"25%": 0.31, "50%": 0.9, "25% refit": 0.1},
        "none": {"25%": None, "50%": None},
    },
    "merge": {"half": {"25%": 0.2}, "apart": {"25%": 0.1}},
}


def test_advice_is_what_the_numbers_say() -> None:
    known = measured.Figures({}, KL, "chance", frozenset({"apart"}))
    assert known.advice("prune", "good") == "the best of prune at 25 %, 50 % and 25 % refitted"
    assert known.advice("prune", "bad") == "no better than chance at 25 % and 50 %"
    assert known.advice("merge", "half") == "the best of merge at 25 %"
    assert known.advice("prune", "chance").startswith("what every other")
    assert known.advice("merge", "apart") == ""
    assert known.advice("prune", "none") == known.advice("merge", "unknown") == ""
    assert known.of("prune", "chance") == {"25%": 0.3, "50%": 0.9, "25% refit": 0.2}


def test_a_pair_of_numbers() -> None:
    cells = {"25%": 0.0312, "50%": 1.2, "25% refit": 0.2}
    assert measured.pair(cells) == ".03 1.20" and measured.pair(cells, " refit") == ".20 -"
    assert measured.pair({}) == ""


def test_every_way_was_measured_or_says_that_it_cannot_be() -> None:
    """A way that is added is measured by tests/bench/compress.py --only ways."""
    known = described.figures()
    for verb in ("prune", "merge"):
        for way in described.ways(verb):
            cells = known.kl[verb][way.name]
            assert {"25%", "50%"} <= set(cells) <= set(measured.CELLS), way.name
            assert all(kl is None or 0 < kl < 5 for kl in cells.values()), way.name


def test_the_list_and_a_way_show_them(moetool: Callable[..., Any]) -> None:
    said, shown = moetool("methods", "list"), moetool("methods", "show", "reap", "--json").json
    pair = measured.pair(shown["kl"])
    (line,) = [x for x in said.stdout.splitlines() if x.startswith("  reap ")]
    assert pair in line and "held out" in said.stdout
    assert f"measured: KL {pair}" in moetool("methods", "show", "reap").stdout
