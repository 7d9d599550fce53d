"""The staging folder: who may write, what is taken over, and what only a finished folder has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from surgery.byhand import lay, numbered, planned

from moetool.errors import MoetoolError, UsageError
from moetool.surgery import engine
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Target, Task, whole
from moetool.surgery.weights import INDEX
from moetool.surgery.writer import STATE, Writer, as_json, check_target, existing

CONFIG = {"model_type": "llama"}


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return lay(tmp_path / "model", numbered((4, 4), (4, 4), (4, 4)))


def plan_of(source: Checkpoint, *names: str, max_shard: int = 64) -> Plan:
    """Copies; a file for each tensor, unless told otherwise."""
    targets = [Target(n, "F32", (4, 4)) for n in names]
    tasks = [Task("copy", (whole(source.tensors[t.name]),), (whole(t),)) for t in targets]
    return planned(source, targets, tasks, max_shard=max_shard)


def write_shards(writer: Writer, plan: Plan, source: Checkpoint, count: int | None = None) -> None:
    """Make the first `count` shards."""
    shards = plan.shards[:count]
    for job in engine.jobs_of(plan, [source], shards, str(writer.staging)):
        engine.make_shard(job)
        writer.publish(job.path)


def finish(writer: Writer, **files: bytes) -> None:
    writer.finish({n.replace("_", "."): d for n, d in files.items()}, {}, CONFIG)


def test_a_whole_run(source: Checkpoint, tmp_path: Path) -> None:
    plan, out = plan_of(source, "t0", "t1", "t2"), tmp_path / "out"
    writer = Writer(out, plan, sources=[source])
    writer.check()
    with writer:
        assert not any(writer.is_done(s) for s in plan.shards)
        write_shards(writer, plan, source)
        assert all(writer.is_done(s) for s in plan.shards) and not out.exists()
        assert not (writer.staging / "config.json").exists()
        finish(writer, moetool_json=b"{}")
    assert not writer.staging.exists() and writer.finished()
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        INDEX,
        "moetool.json",
    ]
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == 192 and len(set(index["weight_map"].values())) == 3
    assert Checkpoint.open(out).tensors.keys() == {"t0", "t1", "t2"}


def test_one_file_needs_no_index(source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, "t0", "t1", max_shard=10**6)
    with Writer(tmp_path / "out", plan) as writer:
        write_shards(writer, plan, source)
        finish(writer)
    assert not (tmp_path / "out" / INDEX).exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_second_run_takes_over_whole_shards_only(source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, "t0", "t1", "t2")
    with Writer(tmp_path / "out", plan, sources=[source]) as writer:
        write_shards(writer, plan, source, 2)
        (writer.staging / "half.json.tmp").write_text("{")
        broken = writer.staging / plan.shards[1].name
        broken.write_bytes(broken.read_bytes()[:-1])
    with Writer(tmp_path / "out", plan, sources=[source]) as writer:
        assert [writer.is_done(s) for s in plan.shards] == [True, False, False]
        assert not (writer.staging / "half.json.tmp").exists(), "half-written files are swept"


def test_a_shard_of_another_plan_is_not_ours(source: Checkpoint, tmp_path: Path) -> None:
    """Same size, same name; the digest in the header tells them apart."""
    plan, other = plan_of(source, "t0", "t1"), plan_of(source, "t0", "t2")
    with Writer(tmp_path / "out", plan) as writer:
        write_shards(writer, plan, source)
        assert not Writer(tmp_path / "out", other).is_done(other.shards[0])
        assert writer.is_done(plan.shards[0])


def test_finishing_with_a_shard_missing(source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, "t0", "t1")
    with Writer(tmp_path / "out", plan) as writer:
        write_shards(writer, plan, source, 1)
        with pytest.raises(MoetoolError, match="not whole") as refused:
            finish(writer)
    assert plan.shards[1].name in refused.value.where["file"]
    assert not (tmp_path / "out").exists() and not (writer.staging / "config.json").exists()


def test_two_writers_of_one_output(source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, "t0")
    with Writer(tmp_path / "out", plan):
        with (
            pytest.raises(MoetoolError, match="another moetool process"),
            Writer(tmp_path / "out", plan),
        ):
            pass
        with Writer(tmp_path / "elsewhere", plan):
            pass
    with Writer(tmp_path / "out", plan):
        pass  # the lock goes with its owner


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_plan_left(overwrite: bool, source: Checkpoint, tmp_path: Path) -> None:
    old, new = plan_of(source, "t0", "t1"), plan_of(source, "t1", "t2")
    with Writer(tmp_path / "out", old) as writer:
        write_shards(writer, old, source)
        (writer.staging / "stats").mkdir()
    later = Writer(tmp_path / "out", new, overwrite=overwrite)
    if not overwrite:
        with pytest.raises(MoetoolError, match="belongs to another plan") as refused, later:
            pass
        assert old.digest[:16] in refused.value.where["found"] and "--overwrite" in str(
            refused.value
        )
        return
    with later:
        assert [p.name for p in later.staging.iterdir()] == [STATE]


def test_a_refusal_holds_no_lock(source: Checkpoint, tmp_path: Path) -> None:
    """In one Python process: refused, and then again with overwrite."""
    old, new = plan_of(source, "t0"), plan_of(source, "t1")
    with Writer(tmp_path / "out", old):
        pass
    refused = Writer(tmp_path / "out", new)
    with pytest.raises(MoetoolError, match="another plan"):
        refused.__enter__()
    with Writer(tmp_path / "out", new, overwrite=True):
        pass


def test_a_source_that_changed_is_not_gone_on_with(source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, "t0", "t1")
    with Writer(tmp_path / "out", plan, sources=[source]) as writer:
        write_shards(writer, plan, source, 1)
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    with (
        pytest.raises(MoetoolError, match="sources have changed since"),
        Writer(tmp_path / "out", plan, sources=[source]),
    ):
        pass


@pytest.mark.parametrize("state", [b"{", b"[]", b"null"])
def test_a_broken_state_file_is_not_ours(state: bytes, source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, "t0")
    with Writer(tmp_path / "out", plan) as writer:
        pass
    (writer.staging / STATE).write_bytes(state)
    (writer.staging / "model-x.safetensors").write_bytes(b"?")
    with (
        pytest.raises(MoetoolError, match="unfinished output is in the way"),
        Writer(tmp_path / "out", plan),
    ):
        pass


def test_overwriting_replaces_a_finished_folder(source: Checkpoint, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", plan_of(source, "t0")
    out.mkdir()
    (out / "old.safetensors").write_text("old")
    writer = Writer(out, plan, overwrite=True, sources=[source])
    writer.check()
    with writer:
        write_shards(writer, plan, source)
        assert (out / "old.safetensors").exists(), "the old folder stays until the new one is whole"
        finish(writer)
    assert not (out / "old.safetensors").exists() and (out / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("missing", ["config.json", "moetool.json", "model.safetensors"])
def test_a_finished_output_has_everything(missing: str, source: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(source, "t0")
    with Writer(tmp_path / "out", plan) as writer:
        write_shards(writer, plan, source)
        finish(writer, moetool_json=b"{}")
    assert writer.finished() and not Writer(tmp_path / "out", plan, overwrite=True).finished()
    (tmp_path / "out" / missing).unlink()
    assert not writer.finished()


def test_targets_that_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    for out in (tmp_path / "model", tmp_path / "model" / "inner", tmp_path):
        with pytest.raises(UsageError, match="must not be a source"):
            check_target(out, [model], overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_target(tmp_path / "file", [model], overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UsageError, match="not empty") as refused:
        check_target(tmp_path / "full", [model], overwrite=False)
    assert refused.value.where["found"] == "x"
    with pytest.raises(UsageError, match="not deleted"):
        check_target(tmp_path / "full", [model], overwrite=True)
    (tmp_path / "full" / "x").rename(tmp_path / "full" / "x.safetensors")
    check_target(tmp_path / "full", [model], overwrite=True)
    check_target(tmp_path / "a" / "b" / "c", [model], overwrite=False)


def test_a_link_to_a_source_is_seen_through(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UsageError, match="must not be a source"):
        check_target(tmp_path / "link" / "out", [str(tmp_path / "model")], overwrite=False)


def test_space_counts_what_is_there_already(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    plan = plan_of(source, "t0", "t1")
    free = {"bytes": plan.disk - 1}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=free["bytes"]))
    writer = Writer(tmp_path / "out", plan, sources=[source])
    with pytest.raises(MoetoolError, match="not enough space") as refused:
        writer.check()
    assert refused.value.where["expected"] == f"{plan.disk:,} bytes"
    with writer:
        write_shards(writer, plan, source, 1)
    writer.check()


def test_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path and existing(tmp_path) == tmp_path


def test_json_is_for_people() -> None:
    assert as_json({"name": "Qwen-3°", "n": [1]}).decode() == (
        '{\n  "name": "Qwen-3°",\n  "n": [\n    1\n  ]\n}\n'
    )
