"""A quantized checkpoint cut to its first layers, twice: as it is stored, and decoded by us. What a
loader makes of both must be the same.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from moetool import atomic
from moetool.data import JsonObject
from moetool.surgery import engine, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import words
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Stored, Target, Task, size_of, whole
from moetool.surgery.text_model import TextModel, text_model
from moetool.surgery.weights import INDEX

_MOST = 8  # layers; of models whose kinds of layers need more, those up to the first mixture
_SHARD = 4_000_000_000


@dataclass(frozen=True)
class Truncated:
    """The first `layers` layers: of which matrices they are, and the config that says so."""

    source: Checkpoint
    layers: int
    names: tuple[str, ...]
    config: JsonObject  # as it will be beside the weights

    @classmethod
    def of(cls, source: Checkpoint, config: JsonObject) -> Truncated | None:
        """As few layers as hold one of each kind; None where layers cannot be counted. `config`:
        the whole one, which tells a loader of forms.
        """
        at = text_model(source.config)
        count = at.field("layers")
        if not isinstance(count, int) or at.layout.stack is None:
            return None
        kept = _prefix(at, source.tensors, count)
        names = tuple(n for n in source.tensors if _stays(at, n, kept))
        field = at.layout.fields["layers"]
        return cls(source, kept, names, _cut(config, at.path, field, (count, kept)))

    @property
    def elements(self) -> int:
        """Weights of the copy."""
        return sum(self.source.tensors[n].elements for n in self.names)

    @property
    def lying(self) -> dict[str, Stored]:
        """Its tensors as they are stored."""
        parts = chain.from_iterable(self.source.tensors[n].lying for n in self.names)
        return {p.name: p for p in parts}

    @property
    def memory(self) -> int:
        """Bytes of both copies loaded one beside the other."""
        full = sum(size_of(t.dtype, t.shape) for t in map(self.source.tensor, self.names))
        return 2 * full + sum(p.size for p in self.lying.values())

    def write(self, packed: Path, plain: Path) -> None:
        """Both copies, into two folders that are there."""
        lying = self.source.stored
        stored = Checkpoint(self.source.folder, self.config, lying, self.source.files)
        _write(Plan.build([], _copies(self.config, self.lying.values()), max_shard=_SHARD), stored,
               packed)  # fmt: skip
        config = {k: v for k, v in self.config.items() if k not in _told(self.source)}
        wanted = _copies(config, map(self.source.tensor, self.names))
        _write(
            reform.plan([self.source], wanted, max_shard=_SHARD, form="full"), self.source, plain
        )


def _told(source: Checkpoint) -> set[str]:
    """Keys of the config that tell loaders of forms."""
    return set(chain.from_iterable(source.told.values()))


def _prefix(at: TextModel, tensors: Mapping[str, Stored], count: int) -> int:
    """How many layers from the first on hold one of each kind."""
    kinds: dict[int, set[str]] = {}
    for name in tensors:
        found = at.match(name)
        if found and found.layer is not None and found.layer < count:
            kinds.setdefault(found.layer, set()).add(found.slot.name)
    first: dict[frozenset[str], int] = {}
    for layer in sorted(kinds):
        first.setdefault(frozenset(kinds[layer]), layer)
    needed = 1 + max(first.values(), default=0)
    mixture = 1 + min(at.moe_layers(), default=0)
    return needed if needed <= max(_MOST, mixture) else mixture


def _stays(at: TextModel, name: str, kept: int) -> bool:
    if words().in_mtp(name):
        return False
    layer = at.layer_of(name)
    return layer is None or layer < kept


def _cut(
    config: JsonObject, path: Sequence[str], field: str, counts: tuple[int, int]
) -> JsonObject:
    """A config with fewer layers; lists with an entry for each are as much shorter."""
    before, after = counts
    made = copy.deepcopy(config)
    text: Any = made
    for part in path:
        text = text[part]
    for key, value in text.items():
        if isinstance(value, list) and len(value) == before:
            text[key] = value[:after]
    text[field] = after
    return made


def _copies(config: JsonObject, tensors: Iterable[Stored]) -> Outputs:
    found = list(tensors)
    targets = [Target(t.name, t.dtype, t.shape) for t in found]
    tasks = [Task("copy", (whole(t),), (whole(t),)) for t in found]
    return Outputs(config, targets, tasks, {})


def _write(plan: Plan, source: Checkpoint, folder: Path) -> None:
    jobs = list(engine.jobs_of(plan, [source], plan.shards, str(folder)))

    def done(job: engine.Job, seen: object) -> None:
        atomic.publish(Path(job.path))

    never = threading.Event()
    engine.run_local(jobs, done, workers=1, tell=lambda count: None, stop=never)
    (folder / "config.json").write_text(json.dumps(plan.config))
    if len(plan.shards) > 1:
        where: dict[str, str] = {}
        for shard in plan.shards:
            where |= dict.fromkeys(shard.offsets, shard.name)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
