"""Low-rank experts over the layer's own FFN: W + (alpha / rank) B A, as PEFT has them (Hu et al.,
arXiv 2106.09685). A `lora_A` [rank, in] and a `lora_B` [out, rank] a linear; all experts of a layer
share its W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.errors import MoetoolError
from moetool.surgery.forms.form import Params
from moetool.surgery.forms.in_groups import INCOMPLETE, InGroups, Site, part
from moetool.surgery.spec import FLOATS, InParts, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("lora_A", "lora_B")


class LoraForm(InGroups):
    """params: {base: name of W, rank, scale, transposed: whether W lies as [in, out]}; a config's
    group says {rank, alpha} and, where only some linears change, their names {targets}.
    """

    name: ClassVar[str] = "lora"
    must: ClassVar[Mapping[str, type]] = {"rank": int, "alpha": float}
    may: ClassVar[Mapping[str, type]] = {"targets": list}

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        out, into = _sides(target.shape, params["transposed"])
        stem, rank = target.name.removesuffix(".weight"), params["rank"]
        return (
            Target(params["base"], target.dtype, target.shape),
            Target(f"{stem}.lora_A", target.dtype, (rank, into)),
            Target(f"{stem}.lora_B", target.dtype, (out, rank)),
        )

    def weights(self, matrix: Stored) -> dict[str, int]:
        assert matrix.parts is not None
        return {p.name: p.elements for p in matrix.parts.tensors}

    def parts_of(self, tensors: Mapping[str, Stored], site: Site) -> InParts:
        base = tensors.get(site.base)
        a, b = (part(tensors, site, name) for name in PARTS)
        if base is None or base.parts is not None or base.dtype not in FLOATS:
            raise MoetoolError(
                "low-rank experts stand over a matrix that is not plain floats",
                tensor=site.base,
                expected=", ".join(FLOATS),
                found="nothing" if base is None else (base.parts or base).__class__.__name__,
                hint=INCOMPLETE,
            )
        said = site.group.params
        rank, turned = said["rank"], site.linear.transposed
        out, into = _sides(base.shape, turned)
        for stored, wanted in ((a, (rank, into)), (b, (out, rank))):
            if stored.shape != wanted:
                raise MoetoolError(
                    "a low-rank expert does not fit its FFN",
                    tensor=stored.name,
                    expected=list(wanted),
                    found=list(stored.shape),
                    hint="config.json and weights are not of the same model",
                )
        scale = said["alpha"] / rank
        params = {"base": site.base, "rank": rank, "scale": scale, "transposed": turned}
        return InParts(self.name, (base, a, b), params)

    def shape(self, parts: InParts, base: Stored | None) -> tuple[int, ...]:
        return parts.tensors[0].shape

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        base, a, b = (p.float() for p in parts)
        change = a.T @ b.T if params["transposed"] else b @ a
        scale: float = params["scale"]
        return base.add(change, alpha=scale)

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        raise MoetoolError(
            "a single matrix cannot be written as a low-rank change",
            expected="experts over an FFN",
            hint="experts over an FFN are written with --form lora",
        )


def _sides(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """(out, in) of W."""
    first, second = shape
    return (second, first) if transposed else (first, second)
