"""Where the FFN of a family's layers lies, found by the roles in its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetool.errors import MoetoolError
from moetool.surgery.family import Slot
from moetool.surgery.groups import block_of, linear_of
from moetool.surgery.layout import Layout

ROLES = ("gate", "up", "gate_up", "fc1", "down", "fc2")
NORM = "norm"
LAST = ("down", "fc2", "o", "out", NORM)  # those that give the output of a block
_WEIGHT = ".weight"


@dataclass(frozen=True)
class FfnLinear:
    """One linear of an FFN or of another block. `transposed`: its weight lies as [in, out]; `bias`:
    the slot of its bias, where the family has one; `whole`: it is the block itself.
    """

    role: str
    slot: Slot
    bias: Slot | None
    transposed: bool
    whole: bool = False

    @property
    def name(self) -> str:
        """Its name inside the block: `gate_proj`; nothing where it is the block."""
        return "" if self.whole else linear_of(self.slot.name)

    def sides(self, shape: Sequence[int]) -> tuple[int, int]:
        """(out, in) of a weight of this shape; of a norm's both are its width."""
        first, second = shape if len(shape) == 2 else (*shape, *shape)
        return (second, first) if self.transposed else (first, second)


@dataclass(frozen=True)
class FfnBlock:
    """The FFN of a layer. `module`: the template of the module that holds its linears."""

    module: str
    linears: tuple[FfnLinear, ...]

    @classmethod
    def of(cls, layout: Layout) -> FfnBlock:
        """By the layout's roles. MoetoolError where there is none, no one module holds it, or
        nothing could run experts in it (modeling/install).
        """
        found = [s for role in ROLES if (s := layout.role(f"ffn.{role}")) is not None]
        roles = {str(s.role).removeprefix("ffn.") for s in found}
        if layout.kind != "dense" or not roles.intersection(LAST) or len(roles) < 2:
            have = "it has experts already" if layout.kind == "moe" else f"roles {sorted(roles)}"
            raise _homeless(layout, "an FFN whose linears the layout names", have)
        if not layout.stack:
            raise _homeless(layout, "a plain stack of layers", "none that the layout names")
        if layout.overlay.adds_residual:
            raise _homeless(layout, "an FFN of its input alone", "one that adds the residual too")
        modules = sorted({block_of(s.name) for s in found})
        bare = modules[0].endswith("{layer}")  # the linears lie in the layer itself
        if len(modules) > 1 or "{i" in modules[0] or bare:
            raise _homeless(layout, "one module with all linears of the FFN", ", ".join(modules))
        slots = {s.name: s for s in layout.tensors}
        turned = layout.overlay.linears == "transposed"

        def linear(slot: Slot) -> FfnLinear:
            bias = slots.get(slot.name.removesuffix(_WEIGHT) + ".bias")
            return FfnLinear(str(slot.role).removeprefix("ffn."), slot, bias, turned)

        return cls(modules[0], tuple(map(linear, found)))

    @property
    def last(self) -> FfnLinear:
        """The linear that gives the output."""
        return next(one for one in self.linears if one.role in LAST)


def _homeless(layout: Layout, expected: str, found: str) -> MoetoolError:
    return MoetoolError(
        f"{layout.model_type} has no FFN that groups of experts can stand beside",
        expected=expected,
        found=found,
        hint=f"see `moetool archs show {layout.model_type}`",
    )
