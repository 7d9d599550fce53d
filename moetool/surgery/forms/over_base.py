"""What the forms of experts share that are the layer's own matrix with something changed: all
experts of a layer share it, and only the change lies beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.errors import MoetoolError
from moetool.surgery.forms.form import Params
from moetool.surgery.forms.in_groups import INCOMPLETE, InGroups, Site, part
from moetool.surgery.spec import FLOATS, InParts, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZED = (
    "an Auto class of transformers reads a base that was quantized so, with moetool installed; "
    "moetool's own verbs want it in full"
)


class OverBase(InGroups):
    """Subclass it: name the `suffixes` of what a change lies in and say its `change`. params of a
    matrix: {base: name of W, transposed: whether W lies as [in, out]} and what `said` gives.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    beside_base: ClassVar[str] = "a change does not fit its FFN"

    def change(self, target: Target, params: Params) -> tuple[Target, ...]:
        """What lies beside W, in the order of the suffixes."""
        raise NotImplementedError

    def said(self, site: Site, base: Stored, change: Sequence[Stored]) -> Params:
        """What a matrix's params say beside base and transposed."""
        raise NotImplementedError

    def added(self, parts: Sequence[Tensor], params: Params, width: int) -> Tensor:
        """The change as a matrix [out, in] in float32; `width`: in."""
        raise NotImplementedError

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        return (
            Target(params["base"], target.dtype, target.shape),
            *self.change(target, params),
        )

    def parts_of(self, tensors: Mapping[str, Stored], site: Site) -> InParts:
        base = site.under(tensors)
        change = [part(tensors, site, name) for name in self.suffixes]
        if base is None or base.parts is not None or base.dtype not in FLOATS:
            raise MoetoolError(
                f"{self.name} experts stand over a matrix that is not plain floats",
                tensor=site.base,
                expected=", ".join(FLOATS),
                found="nothing" if base is None else base.dtype,
                hint=INCOMPLETE if base is None else QUANTIZED,
            )
        params = {"base": site.base, "transposed": site.linear.transposed}
        params |= self.said(site, base, change)
        wanted = self.change(Target(site.full, base.dtype, base.shape), params)
        for stored, like in zip(change, wanted, strict=True):
            kind = like.dtype if like.dtype not in FLOATS else stored.dtype
            fits = stored.dtype == kind and (like.dtype not in FLOATS or kind in FLOATS)
            if stored.shape != like.shape or not fits:
                raise MoetoolError(
                    self.beside_base,
                    tensor=stored.name,
                    expected=f"{like.dtype} {list(like.shape)}",
                    found=f"{stored.dtype} {list(stored.shape)}",
                    hint="config.json and weights are not of the same model",
                )
        return InParts(self.name, (base, *change), params)

    def shape(self, parts: InParts, base: Stored | None) -> Shape:
        return parts.tensors[0].shape

    def weights(self, matrix: Stored) -> dict[str, int]:
        assert matrix.parts is not None
        floats = (p for p in matrix.parts.tensors if p.dtype in FLOATS)
        return {p.name: p.elements for p in floats}

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        base, turned = parts[0].float(), params["transposed"]
        change = self.added(parts[1:], params, base.shape[0 if turned else 1])
        return base + (change.T if turned else change)

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        raise MoetoolError(
            f"a single matrix cannot be written as a {self.name} change",
            expected="experts over an FFN",
            hint=f"experts over an FFN are written with --form {self.name}",
        )


def sides(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """(out, in) of W."""
    first, second = shape
    return (second, first) if transposed else (first, second)
