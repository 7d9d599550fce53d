"""safetensors: JSON with names, dtypes, shapes and offsets, then the bytes of the tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import ClassVar

from moetool.data import JsonObject
from moetool.surgery.clone import BLOCK
from moetool.surgery.containers.container import Container, Shard, Whole
from moetool.surgery.spec import DTYPE_BITS, Target

INDEX = "model.safetensors.index.json"


class Safetensors(Container):
    """What transformers and every server read."""

    name: ClassVar[str] = "safetensors"

    def lay(self, number: int, count: int, tensors: Sequence[Target], tasks: list[int]) -> Shard:
        """Tensors of whole blocks first, so that equal ones lie alike in blocks (what is alike can
        be shared, surgery/clone.py); wide dtypes before narrow ones: every tensor starts at a
        multiple of its element size.
        """
        part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
        offsets, position = {}, 0
        for tensor in sorted(tensors, key=_order):
            offsets[tensor.name] = (position, position + tensor.size)
            position += tensor.size
        return Shard(f"model{part}.safetensors", offsets, tuple(sorted(tasks)))

    def header(self, shard: Shard, whole: Whole) -> bytes:
        table: JsonObject = {"__metadata__": {"format": "pt", "moetool_plan": whole.digest}}
        for name, offsets in shard.offsets.items():
            table[name] = {
                "dtype": whole.targets[name].dtype,
                "shape": list(whole.targets[name].shape),
                "data_offsets": list(offsets),
            }
        body = json.dumps(table, separators=(",", ":")).encode()
        body += b" " * (-(8 + len(body)) % BLOCK)  # legal: the library allows spaces here
        return struct.pack("<Q", len(body)) + body

    def beside(self, whole: Whole) -> dict[str, JsonObject]:
        """The index, where there are several files."""
        if len(whole.shards) < 2:
            return {}
        places: dict[str, str] = {}
        for shard in whole.shards:
            places |= dict.fromkeys(shard.offsets, shard.name)
        total = sum(t.size for t in whole.targets.values())
        return {
            INDEX: {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        }


def _order(tensor: Target) -> tuple[bool, int]:
    return tensor.size % BLOCK != 0, -DTYPE_BITS[tensor.dtype]
