"""Bottleneck adapters: each expert changes what comes out of a module, or goes into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from moetool.errors import MoetoolError
from moetool.modeling.block import FfnLinears
from moetool.modeling.experts.adding import AddingExperts
from moetool.modeling.experts.group import Expert
from moetool.modeling.experts.map import PlainMap
from moetool.surgery.groups import Group
from moetool.surgery.inside import ADAPTER_ACTS
from moetool.surgery.strict import Kinds

_ACTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "silu": functional.silu,
    "relu": functional.relu,
    "none": lambda x: x,
}


class AdapterExperts(AddingExperts):
    """up(act(down h)), or gated up(act(gate h) * down h). params: dim, the bottleneck's width;
    `at`: after (the usual) or before the module; act; gated; bias, on the ways down and up; groups,
    into which up is cut; shared_down: the first expert's way down (and gate) is everyone's;
    residual: the factor on what comes out of the module, where that is no 1.
    """

    name: ClassVar[str] = "adapter"
    needs: ClassVar[Kinds] = {"dim": int}
    knows: ClassVar[Kinds] = {
        "at": ("after", "before"),
        "act": ADAPTER_ACTS,
        "gated": bool,
        "bias": bool,
        "groups": int,
        "shared_down": bool,
        "residual": float,
    }

    def __init__(self, group: Group, linears: FfnLinears) -> None:
        super().__init__(group, linears)
        said = group.params
        self.before, self.shared = said.get("at") == "before", bool(said.get("shared_down"))
        self.keeps = float(said.get("residual", 1.0))
        if self.keeps != 1.0 and (self.before or group.base != "under"):
            raise MoetoolError(
                "`residual` of adapters that do not stand behind an FFN",
                file="config.json",
                expected="base under, at after",
                found=f"base {group.base}, at {said.get('at', 'after')}",
                hint="restore the config.json that came with the model",
            )
        self.gated, self.act = bool(said.get("gated")), _ACTS[said.get("act", "gelu")]
        for expert in list(self)[1:] if self.shared else ():
            for name in [n for n, _ in expert.named_children() if n != "adapter_up"]:
                delattr(expert, name)

    def one(self, group: Group, linears: FfnLinears) -> Expert:
        said, hidden = group.params, linears.given
        dim, parts, bias = said["dim"], said.get("groups", 1), bool(said.get("bias"))
        if parts < 1 or dim % parts or hidden % parts:
            raise MoetoolError(
                "`groups` of adapters do not fit",
                file="config.json",
                expected=f"a divisor of {dim} and {hidden}",
                found=parts,
                hint="restore the config.json that came with the model",
            )
        made = {"down": PlainMap(dim, hidden, bias=bias, drawn=True)}
        if said.get("gated"):
            made["gate"] = PlainMap(dim, hidden, drawn=True)
        made["up"] = PlainMap(hidden, dim, bias=bias, parts=parts)
        return Expert(((f"adapter_{name}", part) for name, part in made.items()), {})

    def made(self, number: int, rows: Tensor) -> Tensor:
        first = self[0 if self.shared else number]
        low: Tensor = first.get_submodule("adapter_down")(rows)
        if self.gated:
            low = self.act(first.get_submodule("adapter_gate")(rows)) * low
        else:
            low = self.act(low)
        made: Tensor = self[number].get_submodule("adapter_up")(low)
        return made
