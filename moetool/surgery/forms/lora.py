"""Low-rank experts over the layer's own FFN: W + (alpha / rank) B A, as PEFT has them (Hu et al.,
arXiv 2106.09685). A `lora_A` [rank, in] and a `lora_B` [out, rank] a linear; all experts of a layer
share its W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.surgery.forms.form import Params
from moetool.surgery.forms.in_groups import Site
from moetool.surgery.forms.over_base import OverBase, sides
from moetool.surgery.spec import Stored, Target

if TYPE_CHECKING:
    from torch import Tensor


class LoraForm(OverBase):
    """params: {base: name of W, rank, scale, transposed: whether W lies as [in, out]}; a config's
    group says {rank, alpha} and, where only some linears change, their names {targets}.
    """

    name: ClassVar[str] = "lora"
    suffixes: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    beside_base: ClassVar[str] = "a low-rank expert does not fit its FFN"
    must: ClassVar[Mapping[str, type]] = {"rank": int, "alpha": float}
    may: ClassVar[Mapping[str, type]] = {"targets": list, "linears": list, "mix": str}

    def change(self, target: Target, params: Params) -> tuple[Target, ...]:
        out, into = sides(target.shape, params["transposed"])
        stem, rank = target.name.removesuffix(".weight"), params["rank"]
        return (
            Target(f"{stem}.lora_A", target.dtype, (rank, into)),
            Target(f"{stem}.lora_B", target.dtype, (out, rank)),
        )

    def said(self, site: Site, base: Stored, change: Sequence[Stored]) -> Params:
        params = site.group.params
        return {"rank": params["rank"], "scale": params["alpha"] / params["rank"]}

    def added(self, parts: Sequence[Tensor], params: Params, width: int) -> Tensor:
        a, b = (p.float() for p in parts)
        scale: float = params["scale"]
        return (b @ a) * scale
