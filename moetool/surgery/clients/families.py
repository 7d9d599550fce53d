"""What a client says of models: families that it computes rightly, and what of a config, of how
experts lie or of the files beside them breaks that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moetool.data import JsonObject
from moetool.surgery import groups, hub
from moetool.surgery.clients.cells import Cell
from moetool.surgery.clients.traits import FACTS, RAGGED, Fact, Traits, words
from moetool.surgery.forms import factored
from moetool.surgery.layout import kinds

_OURS = (groups.MODEL_TYPE, RAGGED, factored.MODEL_TYPE)


@dataclass(frozen=True)
class Breaks:
    """What a client makes of outputs of `families` (empty: of all; never of `but`) for which all of
    this holds: facts `when` -> one of the values, a config that names none of `lacks`, a tokenizer
    without `token`, no `file` beside the weights. With state works, `told` is what goes with it.
    """

    cell: Cell
    families: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    when: Mapping[str, Sequence[Fact]] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    token: str = ""
    file: str = ""
    told: str = ""

    @classmethod
    def read(cls, data: JsonObject) -> Breaks:
        """TypeError for an unknown key, fact or family."""
        rest = dict(data)
        lists: JsonObject = {k: tuple(rest.pop(k, ())) for k in ("families", "but", "lacks")}
        own = ("when", "token", "file", "told")
        mine = {k: rest.pop(k) for k in own if k in rest}
        _check_families((*lists["families"], *lists["but"]))
        unknown = set(mine.get("when", {})) - set(FACTS)
        if unknown or not (lists["lacks"] or set(mine) - {"told"}):
            raise TypeError(f"a rule of {', '.join(sorted(unknown)) or 'no condition'}")
        made = cls(Cell(**rest), **lists, **mine)
        if (made.cell.state == "works") != bool(made.told):
            raise TypeError(f"{made.cell.state} told {made.told!r}")
        return made

    def __str__(self) -> str:
        """Of which outputs it speaks: `stacked experts`."""
        found = [words(name, values) for name, values in self.when.items()]
        found += [f"no {name} in the config" for name in self.lacks]
        found += [f"no {self.token} in the tokenizer"] if self.token else []
        found += [f"no {self.file}"] if self.file else []
        return " and ".join(filter(None, found))

    def holds(self, output: Traits) -> bool:
        """Whether an output is of this kind."""
        if output.family in self.but or (self.families and output.family not in self.families):
            return False
        if any(output.facts.get(name) not in values for name, values in self.when.items()):
            return False
        if self.lacks and any(name in output.fields for name in self.lacks):
            return False
        if self.token and output.has_token(self.token):
            return False
        return not (self.file and output.has_file(self.file))


@dataclass(frozen=True)
class Models:
    """`families`: what is known of each as its client usually meets it; `rules`: what changes that.
    `version`: the one that was run.
    """

    version: str
    families: Mapping[str, Cell]
    rules: tuple[Breaks, ...] = ()

    @classmethod
    def read(cls, data: JsonObject) -> Models:
        """`works` lists families that were run and are equal. TypeError for an unknown key."""
        rest = dict(data)
        families = {name: Cell("works", "run") for name in rest.pop("works")}
        families |= {name: Cell(**cell) for name, cell in rest.pop("families", {}).items()}
        _check_families(families)
        return cls(families=families, rules=tuple(map(Breaks.read, rest.pop("rules", ()))), **rest)

    def of(self, family: str) -> Cell:
        """What is known of a family by itself."""
        unknown = Cell("untried", "untried", f"nobody has tried {family}")
        return self.families.get(family, unknown)

    def found(self, output: Traits) -> list[Cell]:
        """All that is said of an output, the family's own cell first."""
        return [self.of(output.family), *(rule.cell for rule in self.rules if rule.holds(output))]

    def told(self, output: Traits) -> list[str]:
        """What goes with an output that works."""
        return [rule.told for rule in self.rules if rule.told and rule.holds(output)]


def _check_families(names: Sequence[str] | Mapping[str, Cell]) -> None:
    unknown = [n for n in names if n not in kinds() and n not in _OURS and not hub.family(n)]
    if unknown:
        raise TypeError(f"no family {', '.join(unknown)}")
