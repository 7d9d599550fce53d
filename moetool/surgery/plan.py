"""A plan is a value: which output tensors come from which input pieces by which operation, and
where each will lie.

Dry run prints it, verify compares with it, resume skips shards that carry its digest, workers get
parts of it. No torch here; JSON in, JSON out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import active, containers, forms
from moetool.surgery.containers import Shard, Whole
from moetool.surgery.known import known
from moetool.surgery.spec import DTYPE_BITS, Piece, Stored, Target, Task, size_of

__all__ = ["Outputs", "Plan", "Shard", "elements"]

FORMAT = 1
_NUMBER = re.compile(r"(?<=[._r])\d+(?=[./\"])|(?<=layer)\d+")


@dataclass(frozen=True)
class Outputs:
    """What is to be written: in terms of matrices (surgery/reform.py), or of what lies in files.
    `container`: {} for safetensors, else {name: ..., and what that file format alone knows}.
    """

    config: JsonObject
    targets: Sequence[Target]
    tasks: Sequence[Task]
    dropped: Mapping[str, str]
    container: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of an output, and the digest of it."""

    sources: list[list[list[Any]]]  # fingerprint of each source checkpoint
    config: JsonObject
    targets: dict[str, Target]
    tasks: tuple[Task, ...]
    shards: tuple[Shard, ...]
    dropped: dict[str, str]
    tables: dict[str, list[int]] = field(default_factory=dict)
    digest: str = ""
    container: JsonObject = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        sources: list[list[list[Any]]],
        wanted: Outputs,
        *,
        max_shard: int,
        tables: dict[str, list[int]] | None = None,
    ) -> Plan:
        """Pack targets into shards of at most `max_shard` bytes (a task's outputs stay together)
        and seal the digest.
        """
        by_name: dict[str, Target] = {}
        for target in wanted.targets:
            if target.name in by_name:
                raise MoetoolError(
                    "an output is planned twice",
                    tensor=target.name,
                    hint="report this as a bug of moetool",
                )
            by_name[target.name] = target
        tasks = tuple(wanted.tasks)
        shards = _pack(by_name, tasks, max_shard, containers.of(wanted.container))
        plan = cls(
            sources,
            wanted.config,
            by_name,
            tasks,
            shards,
            dict(wanted.dropped),
            tables or {},
            container=dict(wanted.container),
        )
        plan.check()
        return replace(plan, digest=plan.sealed(wanted.config))

    def sealed(self, config: JsonObject) -> str:
        """The digest that this plan has with a config."""
        body: JsonObject = {
            "format": FORMAT,
            "sources": self.sources,
            "config": config,
            "tables": self.tables,
            "targets": [[t.name, t.dtype, t.shape] for t in self.targets.values()],
            "tasks": [t.as_json() for t in self.tasks],
            "shards": [[s.name, list(s.offsets)] for s in self.shards],
        } | _contained(self.container)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self) -> None:
        """Every element of every output is made exactly once; raises MoetoolError otherwise."""
        runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for task in self.tasks:
            for out in task.outputs:
                if out.name not in self.targets:
                    raise MoetoolError(
                        "a task makes an unplanned tensor",
                        tensor=out.name,
                        hint="report this as a bug of moetool",
                    )
                runs[out.name].append((out.offset, out.offset + out.count))
        for name, target in self.targets.items():
            position, total = 0, 1
            for n in target.shape:
                total *= n
            for start, stop in sorted(runs[name]):
                if start != position:
                    raise MoetoolError(
                        "an output is made twice or not at all",
                        tensor=name,
                        expected=f"element {position}",
                        found=f"element {start}",
                        hint="report this as a bug of moetool",
                    )
                position = stop
            if position != total:
                raise MoetoolError(
                    "an output is not fully made",
                    tensor=name,
                    expected=f"{total} elements",
                    found=position,
                    hint="report this as a bug of moetool",
                )

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.size for t in self.targets.values())

    @property
    def disk(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(len(self.header(s)) + s.size for s in self.shards)

    @property
    def repeated(self) -> int:
        """Bytes of copies that stand in the same shard already: on file systems that share blocks
        they take no disk.
        """
        total = 0
        for shard in self.shards:
            seen: set[tuple[int, str, int, int]] = set()
            for number in shard.tasks:
                task = self.tasks[number]
                if task.op != "copy":
                    continue
                for piece, out in zip(task.inputs, task.outputs, strict=True):
                    key = (piece.source, piece.name, piece.offset, piece.count)
                    if key in seen:
                        total += size_of(self.targets[out.name].dtype, out.shape)
                    seen.add(key)
        return total

    @property
    def parameters(self) -> int:
        """Learned numbers of all tensors; the scales of quantized matrices are none."""
        return forms.count(self.seen().tensors.values())

    @property
    def active_parameters(self) -> int:
        """Those of `parameters` that work on a token: without the experts that it does not reach."""
        seen = self.seen()
        return forms.count(seen.tensors.values()) - active.idle(seen.config, seen.tensors)

    @property
    def stored_as(self) -> frozenset[str]:
        """The forms in which its matrices are stored, full aside."""
        return frozenset(self.seen().told)

    def seen(self) -> forms.Known:
        """Its tensors under the names that the family knows."""
        lying = {n: Stored(n, t.dtype, t.shape, "", 0, t.size) for n, t in self.targets.items()}
        return known(lying, self.config, self.container.get("types"))

    def header(self, shard: Shard) -> bytes:
        """The header of a shard, final: it is written before the first tensor."""
        return containers.of(self.container).header(shard, self._whole())

    def beside(self) -> dict[str, JsonObject]:
        """Small files that say which of several shards holds what, by name."""
        return containers.of(self.container).beside(self._whole())

    def _whole(self) -> Whole:
        return Whole(self.digest, self.targets, self.shards, self.container)

    def render(self) -> str:
        """The plan for reading and diffing: tasks that differ only in layer and expert numbers on
        one line, with their count.
        """
        lines: dict[str, int] = {}
        for task in self.tasks:
            params = {k: v for k, v in task.params.items() if k != "first"}
            sources = (
                ", ".join(
                    dict.fromkeys(f"{i.source}:{i.name} {list(i.shape)}" for i in task.inputs)
                )
                or "-"
            )
            outs = ", ".join(
                dict.fromkeys(_NUMBER.sub("#", o.name) + f" {list(o.shape)}" for o in task.outputs)
            )
            line = _NUMBER.sub(
                "#",
                f"{task.op} {sources} -> {outs} {json.dumps(params) if params else ''}".rstrip(),
            )
            lines[line] = lines.get(line, 0) + 1
        dropped = [f"drop {name}: {why}" for name, why in self.dropped.items()]
        shards = [f"shard {s.name}: {len(s.offsets)} tensors, {s.size} bytes" for s in self.shards]
        return (
            "\n".join(
                [
                    f"digest {self.digest}",
                    *shards,
                    *dropped,
                    *(f"{count} x {line}" for line, count in lines.items()),
                    f"config {json.dumps(self.config, sort_keys=True)}",
                ]
            )
            + "\n"
        )

    def as_json(self) -> JsonObject:
        """The plan as plain data (`Plan.from_json` gives it back)."""
        return {
            "format": FORMAT,
            "digest": self.digest,
            "sources": self.sources,
            "config": self.config,
            "dropped": self.dropped,
            "tables": self.tables,
            "targets": [[t.name, t.dtype, list(t.shape)] for t in self.targets.values()],
            "tasks": [t.as_json() for t in self.tasks],
            "shards": [
                [s.name, {k: list(v) for k, v in s.offsets.items()}, list(s.tasks), *_tail(s)]
                for s in self.shards
            ],
        } | _contained(self.container)

    @classmethod
    def from_json(cls, data: JsonObject) -> Plan:
        """Read a plan that `as_json` wrote; the digest is taken as it stands."""
        targets = {n: Target(n, d, tuple(s)) for n, d, s in data["targets"]}
        shards = tuple(
            Shard(n, {k: (a, b) for k, (a, b) in o.items()}, tuple(t), *tail)
            for n, o, t, *tail in data["shards"]
        )
        return cls(
            data["sources"],
            data["config"],
            targets,
            tuple(map(Task.from_json, data["tasks"])),
            shards,
            data["dropped"],
            data["tables"],
            data["digest"],
            data.get("container", {}),
        )


def _contained(container: JsonObject) -> JsonObject:
    """What a plan says of its container; nothing where it is the usual one."""
    return {"container": container} if container else {}


def _tail(shard: Shard) -> list[int]:
    return [shard.tail] if shard.tail else []


def _pack(
    targets: dict[str, Target],
    tasks: tuple[Task, ...],
    max_shard: int,
    container: containers.Container,
) -> tuple[Shard, ...]:
    """Greedy, in plan order, a folder after the other. Tensors that share a task share a shard, so
    that the task runs once.
    """
    at = container.folder
    groups: list[tuple[list[str], list[int]]] = []
    place: dict[str, int] = {}
    for number, task in enumerate(tasks):
        near = sorted({place[o.name] for o in task.outputs if o.name in place})
        home = near[0] if near else len(groups)
        if not near:
            groups.append(([], []))
        for other in near[1:]:
            for name in groups[other][0]:
                place[name] = home
            groups[home][0].extend(groups[other][0])
            groups[home][1].extend(groups[other][1])
            groups[other] = ([], [])
        for out in task.outputs:
            if out.name not in place:
                place[out.name] = home
                groups[home][0].append(out.name)
        groups[home][1].append(number)
    packed: list[tuple[list[str], list[int]]] = []
    filled, folder = 0, ""
    for names, numbers in sorted(filter(itemgetter(0), groups), key=lambda g: at(g[0][0])):
        size = sum(targets[n].size for n in names if n in targets)
        if not packed or filled + size > max_shard or at(names[0]) != folder:
            packed.append(([], []))
            filled, folder = 0, at(names[0])
        packed[-1][0].extend(names)
        packed[-1][1].extend(numbers)
        filled += size
    laid = (([targets[n] for n in names if n in targets], some) for names, some in packed)
    return tuple(container.lay(i, len(packed), *part) for i, part in enumerate(laid))


def elements(piece: Piece, dtype: str) -> tuple[int, int]:
    """(byte offset, byte count) of an output piece inside its tensor."""
    return piece.offset * DTYPE_BITS[dtype] // 8, piece.count * DTYPE_BITS[dtype] // 8
