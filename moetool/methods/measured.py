"""What ways were measured to keep: the numbers of measured.json, and what they say to a user.

The file is written by tests/bench/compress.py (--only ways), and read by `moetool methods` and by
README's tables; nobody types a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moetool import strict_json
from moetool.data import JsonObject

FILE = Path(__file__).with_name("measured.json")
CELLS = {
    "25%": "25 %",
    "50%": "50 %",
    "25% refit": "25 % refitted",
    "50% refit": "50 % refitted",
}
_NO = 1e30
Cells = Mapping[str, float | None]


@dataclass(frozen=True)
class Figures:
    """KL(SRC || OUT) of every way of each verb, by cell (None: it cannot be compared); `about`: of
    which model, on which text. `chance`: the way that is chance; `apart`: ways that do another
    thing than the others, and are not compared.
    """

    about: JsonObject
    kl: Mapping[str, Mapping[str, Cells]]
    chance: str
    apart: frozenset[str] = frozenset()

    def of(self, verb: str, way: str) -> dict[str, float]:
        """The cells of a way that were measured."""
        cells = self.kl.get(verb, {}).get(way, {})
        return {name: kl for name in CELLS if (kl := cells.get(name)) is not None}

    def advice(self, verb: str, way: str) -> str:
        """Where it is no better than chance, and where it is the best of its verb."""
        cells = self.of(verb, way)
        if way in self.apart:
            return ""
        if way == self.chance:
            return "what every other way must beat" if cells else ""
        chance = next((ways[self.chance] for ways in self.kl.values() if self.chance in ways), {})
        lost = [name for name, kl in cells.items() if kl >= (chance.get(name) or _NO)]
        best = [name for name, kl in cells.items() if kl <= self._least(verb, name)]
        said = [("no better than chance", lost), (f"the best of {verb}", best)]
        return "; ".join(f"{what} at {listed(names)}" for what, names in said if names)

    def _least(self, verb: str, cell: str) -> float:
        rows = self.kl.get(verb, {}).items()
        found = (cells.get(cell) for name, cells in rows if name not in self.apart)
        return min((kl for kl in found if kl is not None), default=0.0)


def listed(cells: Iterable[str]) -> str:
    """`25 %, 50 % and 50 % refitted`."""
    *first, last = [CELLS[name] for name in cells]
    return f"{', '.join(first)} and {last}" if first else last


def pair(cells: Mapping[str, float], more: str = "") -> str:
    """`.24 .63`: at 25 % and 50 %; empty where nothing was measured."""
    found = [cells.get(f"{share}{more}") for share in ("25%", "50%")]
    shown = ["-" if kl is None else f"{kl:.2f}".removeprefix("0") for kl in found]
    return " ".join(shown) if any(kl is not None for kl in found) else ""


@lru_cache(maxsize=2)
def figures(chance: str, apart: frozenset[str]) -> Figures:
    """What stands in the file."""
    data = strict_json.load(FILE, "measurements of ways")
    strict_json.check_shape(data, {"kl": dict}, FILE, "measurements of ways")
    return Figures({k: v for k, v in data.items() if k != "kl"}, data["kl"], chance, apart)
