"""nvfp4 as compressed-tensors packs it (`nvfp4-pack-quantized`): `weight_packed` U8 [out, in / 2],
two E2M1 a byte, `weight_scale` E4M3 [out, in / 16] and `weight_global_scale` F32 [1], by which the
scales are divided. What loaders fuse (q, k, v; gate, up) has one global scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.surgery.forms.compressed_tensors import WEIGHT, CompressedTensors, weights
from moetool.surgery.forms.form import Format, Params
from moetool.surgery.spec import Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_SCALES = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}


class Nvfp4(CompressedTensors):
    """No params of its own."""

    name: ClassVar[str] = "nvfp4"
    kinds: ClassVar[tuple[str, ...]] = ("nvfp4-pack-quantized",)
    suffixes: ClassVar[tuple[str, ...]] = (
        ".weight_packed",
        ".weight_scale",
        ".weight_global_scale",
    )
    formats: ClassVar[Mapping[str, Format]] = {
        "nvfp4": Format("E2M1 with an E4M3 scale for 16 neighbours and one for the matrix")
    }

    def group(self, params: Params) -> int:
        return GROUP

    def weights_of(self, params: Params) -> JsonObject:
        return weights(4, "float", "tensor_group", GROUP) | _SCALES

    def params_of(self, weights: JsonObject) -> Params | None:
        return {} if weights.get("group_size") == GROUP else None

    def shape_of(self, parts: Sequence[Stored], params: Params) -> Shape | None:
        packed = parts[0].shape
        return (packed[0], 2 * packed[1]) if len(packed) == 2 else None

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        (rows, columns), stem = target.shape, target.name.removesuffix(WEIGHT)
        return (
            Target(f"{stem}.weight_packed", "U8", (rows, columns // 2)),
            Target(f"{stem}.weight_scale", "F8_E4M3", (rows, columns // GROUP)),
            Target(f"{stem}.weight_global_scale", "F32", (1,)),
        )

    def beside(self, name: str) -> tuple[str, ...]:
        stem, _, word = name.removesuffix(WEIGHT).rpartition(".")
        fused = next((words for words in _FUSED if word in words), ())
        return tuple(f"{stem}.{w}{WEIGHT}" for w in fused if w != word)

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        return self.encode_beside(matrix, (), params)

    def encode_beside(
        self, matrix: Tensor, others: Sequence[Tensor], params: Params
    ) -> Sequence[Tensor]:
        from moetool.kernels import nvfp4

        self.refuse_static(params)
        return nvfp4.encode(matrix, others)

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        from moetool.kernels import nvfp4

        return nvfp4.decode(*parts[:3])
