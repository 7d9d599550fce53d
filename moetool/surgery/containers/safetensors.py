"""safetensors: JSON with names, dtypes, shapes and offsets, then the bytes of the tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import ClassVar

from moetool.data import JsonObject
from moetool.surgery.containers.container import Container, Shard, Whole
from moetool.surgery.spec import DTYPE_BITS, Target

INDEX = "model.safetensors.index.json"


class Safetensors(Container):
    """What transformers and every server read."""

    name: ClassVar[str] = "safetensors"

    def lay(self, number: int, count: int, tensors: Sequence[Target], tasks: list[int]) -> Shard:
        """Wide dtypes first: every tensor then starts at a multiple of its element size."""
        part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
        offsets, position = {}, 0
        for tensor in sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype]):
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
        body += b" " * (-len(body) % 8)
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
