"""A plan is a value: it checks itself, packs shards, and survives JSON."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import moetool
from moetool.errors import MoetoolError
from moetool.surgery.containers.safetensors import INDEX
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Piece, Target, Task, rows, size_of, whole

A, B = Target("a", "BF16", (4, 8)), Target("b", "F32", (6,))


def copy(target: Target) -> Task:
    return Task("copy", (whole(target),), (whole(target),))


def build(*tasks: Task, targets: tuple[Target, ...] = (A, B), max_shard: int = 10**9) -> Plan:
    wanted = Outputs({"model_type": "t"}, targets, tasks, {})
    return Plan.build([[["f", 1, "x"]]], wanted, max_shard=max_shard)


def test_header_is_final_and_aligned() -> None:
    plan = build(copy(A), copy(B))
    (shard,) = plan.shards
    assert shard.name == "model.safetensors" and list(shard.offsets) == [
        "b",
        "a",
    ]  # wide dtypes first
    raw = plan.header(shard)
    (length,) = struct.unpack("<Q", raw[:8])
    assert len(raw) == 8 + length and len(raw) % 8 == 0
    table = json.loads(raw[8:])
    assert table["__metadata__"] == {"format": "pt", "moetool_plan": plan.digest}
    assert table["a"] == {"dtype": "BF16", "shape": [4, 8], "data_offsets": [24, 88]}


@pytest.mark.parametrize(
    ("tasks", "word"),
    [
        ((copy(A),), "not fully made"),
        ((copy(A), copy(A), copy(B)), "twice or not at all"),
        ((copy(B), Task("copy", (), (Piece("a", (2, 8)),))), "not fully made"),
        (
            (
                copy(B),
                Task("copy", (), (Piece("a", (2, 8)),)),
                Task("copy", (), (Piece("a", (2, 8), 8),)),
            ),
            "twice or not at all",
        ),
        ((copy(A), copy(B), Task("zeros", (), (Piece("ghost", (1,)),))), "unplanned"),
    ],
)
def test_every_element_once(tasks: tuple[Task, ...], word: str) -> None:
    with pytest.raises(MoetoolError, match=word):
        build(*tasks)


def test_an_output_planned_twice() -> None:
    with pytest.raises(MoetoolError, match="planned twice"):
        build(copy(A), targets=(A, A))


def test_slabs_fill_a_tensor() -> None:
    halves = [Task("copy", (), (Piece("a", (2, 8), i * 16),)) for i in (1, 0)]
    assert build(*halves, copy(B)).size == 88


def test_packing_keeps_tasks_together() -> None:
    targets = tuple(Target(f"t{i}", "U8", (100,)) for i in range(10))
    both = Task("x", (), (whole(targets[3]), whole(targets[4])))
    tasks = [copy(t) for t in targets[:3]] + [both] + [copy(t) for t in targets[5:]]
    plan = Plan.build([], Outputs({}, targets, tasks, {}), max_shard=250)
    homes = {n: s.name for s in plan.shards for n in s.offsets}
    assert homes["t3"] == homes["t4"] and len(homes) == 10
    assert (
        all(s.size <= 250 for s in plan.shards)
        and plan.shards[-1].name
        == f"model-0000{len(plan.shards)}-of-0000{len(plan.shards)}.safetensors"
    )
    assert plan.beside()[INDEX]["metadata"]["total_size"] == 1000


def test_json_there_and_back(llama: Path, tmp_path: Path) -> None:
    plan = moetool.plan(
        str(llama), str(tmp_path / "out"), experts=8, split=4, top_k=4, carve="random"
    )
    again = Plan.from_json(json.loads(json.dumps(plan.as_json())))
    assert (
        again.digest == plan.digest
        and again.tasks == plan.tasks
        and again.shards == plan.shards
        and again.targets == plan.targets
    )


def test_planning_reads_no_tensor(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetool.surgery.checkpoint import Checkpoint

    def forbidden(*args: object) -> None:
        raise AssertionError("planning read a tensor")

    monkeypatch.setattr(Checkpoint, "read", forbidden)
    assert moetool.plan(str(llama), str(tmp_path / "out"), experts=4).size > 0


def test_spec() -> None:
    assert size_of("BF16", (3, 5)) == 30 and size_of("F4", (3, 4)) == 6 and size_of("F32", ()) == 4
    assert rows(A, 1, 3) == Piece("a", (2, 8), 8)
    assert rows(rows(A, 1, 4), 1, 2) == Piece("a", (1, 8), 16)
    with pytest.raises(MoetoolError, match="unknown dtype"):
        size_of("F99", (1,))
