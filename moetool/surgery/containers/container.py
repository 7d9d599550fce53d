"""What every container answers: how an output's files are called, where in them its tensors lie,
and what stands before the first tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moetool.data import JsonObject
from moetool.surgery.spec import Target


@dataclass(frozen=True)
class Shard:
    """One output file: its final name, its tensors with their byte offsets (after the header), its
    tasks. `tail`: zeros behind the last tensor.
    """

    name: str
    offsets: dict[str, tuple[int, int]]
    tasks: tuple[int, ...]
    tail: int = 0

    @property
    def size(self) -> int:
        """Bytes of tensor data."""
        return max((stop for _, stop in self.offsets.values()), default=0) + self.tail


@dataclass(frozen=True)
class Whole:
    """What a header may say of the output that its file is a part of."""

    digest: str
    targets: Mapping[str, Target]
    shards: Sequence[Shard]
    said: JsonObject = field(default_factory=dict)  # what the container alone knows


class Container:
    """A file format for tensors. A file of this folder holds one subclass with a `name`."""

    name: ClassVar[str] = ""
    config: ClassVar[str] = "config.json"  # the file that makes a folder of these whole
    is_model: ClassVar[bool] = True  # whether it loads by itself, with tokenizer and all

    def folder(self, tensor: str) -> str:
        """In which folder of an output a tensor of this name lies; the output itself, mostly."""
        return ""

    def lay(self, number: int, count: int, tensors: Sequence[Target], tasks: list[int]) -> Shard:
        """File `number` of `count`, with these tensors."""
        raise NotImplementedError

    def header(self, shard: Shard, whole: Whole) -> bytes:
        """All that stands before the first tensor, final: it is written first, and it holds the
        plan's digest.
        """
        raise NotImplementedError

    def beside(self, whole: Whole) -> dict[str, JsonObject]:
        """Small files that say which of several files holds what."""
        return {}
