"""Where the FFN of a family's layers lies, found by the roles in its layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moetool.errors import MoetoolError
from moetool.surgery import towers
from moetool.surgery.family import Slot, Tower
from moetool.surgery.groups import TEXT, block_of, linear_of
from moetool.surgery.layout import Layout

ROLES = ("gate", "up", "gate_up", "fc1", "down", "fc2")
NORM = "norm"
TURNED = "turned"  # heads before tokens, in what a norm sees
LAST = ("down", "fc2", "o", "out", NORM)  # those that give the output of a block
_WEIGHT = ".weight"


@dataclass(frozen=True)
class FfnLinear:
    """One linear of an FFN or of another block. `transposed`: its weight lies as [in, out]; `bias`:
    the slot of its bias, where the family has one; `whole`: it is the block itself; `within`: its
    path inside the block, where the class has another than the file; `word`: what an expert's is
    called in files, where the class has another word; `rows`: which of how many runs of rows of the
    slot's tensor it is, where that holds several.
    """

    role: str
    slot: Slot
    bias: Slot | None
    transposed: bool
    whole: bool = False
    within: str = ""
    word: str = ""
    rows: tuple[int, int] | None = None

    @property
    def path(self) -> str:
        """Where it is inside the block: `gate_proj`, `intermediate.dense`; nothing where it is the
        block.
        """
        return "" if self.whole else self.within or linear_of(self.slot.name)

    @property
    def name(self) -> str:
        """What experts call their own: `gate_proj`, `intermediate_dense`."""
        return self.path.replace(".", "_")

    @property
    def lies(self) -> str:
        """What experts' own are called in files."""
        return self.word or self.name

    @property
    def shape(self) -> list[str | None] | None:
        """Of its weight, as the layout says it."""
        said = self.slot.shape
        return said if self.rows is None or said is None else [None, *said[1:]]

    def at(self, path: str) -> FfnLinear:
        """The same, at this path inside its block."""
        return replace(self, within=path)

    def sides(self, shape: Sequence[int]) -> tuple[int, int]:
        """(out, in) of a weight of this shape; of a norm's both are its width."""
        first, second = shape if len(shape) == 2 else (*shape, *shape)
        return (second, first) if self.transposed else (first, second)


@dataclass(frozen=True)
class FfnBlock:
    """The FFN of a layer. `module`: the template of the module that holds its linears, or the layer
    itself; `inside`: its path inside a layer, where the class has another; `steps`: the modules
    that run before the last linear, where the layer itself runs all; `residual`: whether its
    forward takes what stands around it too, and adds that; `mixes`: whether, as an attention, it
    can have the heads of several beside each other; `heads`: of a norm, whether it sees each head
    by itself, `tokens` (after the tokens) or `turned` (before them).
    """

    module: str
    linears: tuple[FfnLinear, ...]
    inside: str | None = None
    steps: tuple[str, ...] = ()
    residual: bool = False
    mixes: bool = True
    heads: str = ""

    @classmethod
    def of(cls, layout: Layout) -> FfnBlock:
        """As the tower's data says, or by the layout's roles. MoetoolError where there is none, or
        nothing could run experts in it (modeling/sites).
        """
        tower = towers.lying(layout)
        if tower is not None:
            return cls._of_tower(layout, tower)
        found = [s for role in ROLES if (s := layout.role(f"ffn.{role}")) is not None]
        roles = {str(s.role).removeprefix("ffn.") for s in found}
        if layout.kind != "dense" or not roles.intersection(LAST) or len(roles) < 2:
            have = "it has experts already" if layout.kind == "moe" else f"roles {sorted(roles)}"
            raise _homeless(layout, "an FFN whose linears the layout names", have)
        if not layout.stack:
            raise _homeless(layout, "a plain stack of layers", "none that the layout names")
        modules = sorted({block_of(s.name) for s in found})
        bare = modules[0].endswith("{layer}")  # the linears lie in the layer itself
        if len(modules) > 1 or "{i" in modules[0] or bare:
            raise _homeless(layout, "one module with all linears of the FFN", ", ".join(modules))
        slots = {s.name: s for s in layout.tensors}
        turned = layout.overlay.linears == "transposed"

        def linear(slot: Slot) -> FfnLinear:
            bias = slots.get(slot.name.removesuffix(_WEIGHT) + ".bias")
            return FfnLinear(str(slot.role).removeprefix("ffn."), slot, bias, turned)

        return cls(modules[0], tuple(map(linear, found)), residual=layout.overlay.adds_residual)

    @classmethod
    def _of_tower(cls, layout: Layout, tower: Tower) -> FfnBlock:
        slots, head = (
            {s.name: s for s in layout.tensors},
            tower.stem if tower.single else f"{tower.stem}{{layer}}",
        )
        turned = layout.overlay.linears == "transposed"

        def linear(role: str) -> FfnLinear:
            within, lies, *word = tower.linears[role]
            name = f"{head}.{lies}{_WEIGHT}"
            slot = slots.get(name) or Slot(name, [None, None], f"ffn.{role}", "some")
            bias, run = bias_slot(layout.tensors, f"{head}.{lies}.bias"), tower.rows.get(role)
            made = FfnLinear(role, slot, bias, turned, within=within, word="".join(word))
            return made if run is None else replace(made, rows=(run[0], run[1]))

        module = ".".join(filter(None, (head, tower.block)))
        linears = tuple(linear(role) for role in ROLES if role in tower.linears)
        residual = layout.overlay.adds_residual
        return cls(module, linears, tower.inside, tuple(tower.steps), residual)

    @property
    def within(self) -> str:
        """Where the module is inside a layer of the class; empty: the layer itself."""
        said = self.module.partition("{layer}.")[2]
        return said if self.inside is None else self.inside

    @property
    def last(self) -> FfnLinear:
        """The linear that gives the output."""
        return next((one for one in self.linears if one.role in LAST), self.linears[-1])

    def seen(self, hidden: str) -> str | None:
        """The width that a router sees, as a layout says it: that of the layers, or where the
        block is one linear that of its input; None where nothing says it.
        """
        first = self.linears[0]
        if not first.whole or first.role == NORM or first.slot.shape is None:
            return hidden
        return first.slot.shape[0 if first.transposed else 1]


def bias_slot(slots: Sequence[Slot], name: str) -> Slot | None:
    """The slot of a bias of this name, in which further numbers may be open (`{i1}`)."""
    for slot in slots:
        pattern = re.sub(r"\\\{i\d+\\\}", r"\\d+", re.escape(slot.name))
        if slot.name.endswith(".bias") and re.fullmatch(pattern, name):
            return replace(slot, name=name)
    return None


def stands(layout: Layout) -> Iterator[tuple[str, str]]:
    """Each tower of a family, and where experts of its FFNs lie; or the sentence that says why
    they cannot.
    """
    if layout.kind != "dense":
        return
    known = towers.names(layout)
    if not known:
        yield TEXT, "nowhere: no stack of layers is known of it"
    for name in known:
        try:
            block = FfnBlock.of(towers.layout_of(layout, name, layout.defaults))
            yield name, f"{block.module}.experts"
        except MoetoolError as problem:
            yield name, f"nowhere: it has not {problem.where.get('expected')}"


def _homeless(layout: Layout, expected: str, found: str) -> MoetoolError:
    return MoetoolError(
        f"{layout.model_type} has no FFN that groups of experts can stand beside",
        expected=expected,
        found=found,
        hint=f"see `moetool archs show {layout.model_type}`",
    )
