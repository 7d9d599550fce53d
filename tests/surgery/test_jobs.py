"""The work of a plan: what each shard's job says, and that doing it makes the planned bytes."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from surgery.byhand import lay, numbered, planned, tensors

from moetool.errors import MoetoolError, Stopped
from moetool.surgery import engine
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plan import Plan
from moetool.surgery.spec import Piece, Target, Task, rows, whole

ARRAYS = numbered((4, 6), (8,), (2, 3, 2), (4, 6))


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return lay(tmp_path / "model", ARRAYS)


def copies(source: Checkpoint, *names: str) -> tuple[list[Target], list[Task]]:
    """Whole tensors, copied under new names."""
    targets = [Target(f"out.{n}", "F32", source.tensors[n].shape) for n in names]
    tasks = [
        Task("copy", (whole(source.tensors[n]),), (whole(t),))
        for n, t in zip(names, targets, strict=True)
    ]
    return targets, tasks


def jobs(plan: Plan, source: Checkpoint, folder: Path, **options: object) -> list[engine.Job]:
    folder.mkdir(exist_ok=True)
    how = engine.How(**options)  # type: ignore[arg-type]
    return list(engine.jobs_of(plan, [source], plan.shards, str(folder), how))


def make(job: engine.Job) -> Path:
    """Do a job; the file gets its final name."""
    assert engine.make_shard(job) == []
    path = Path(job.path.removesuffix(".tmp"))
    os.rename(job.path, path)
    return path


def test_neighbours_become_one_move(source: Checkpoint, tmp_path: Path) -> None:
    plan = planned(source, *copies(source, "t0", "t1", "t2", "t3"))
    (job,) = jobs(plan, source, tmp_path / "out")
    (move,) = job.copies
    stored = source.tensors
    assert (move.start, move.count) == (stored["t0"].start, stored["t3"].stop - stored["t0"].start)
    assert job.size == len(job.header) + plan.size and job.tasks == () and job.tables == {}
    found = tensors(make(job))
    assert all((found[f"out.{n}"] == ARRAYS[n]).all() for n in ARRAYS)


def test_another_order_takes_more_moves(source: Checkpoint, tmp_path: Path) -> None:
    plan = planned(source, *copies(source, "t3", "t1", "t2", "t0"))
    (job,) = jobs(plan, source, tmp_path / "out")
    assert len(job.copies) == 3  # t1 and t2 still follow one another
    found = tensors(make(job))
    assert all((found[f"out.{n}"] == ARRAYS[n]).all() for n in ARRAYS)


def test_a_range_read_twice_is_looked_at_once(source: Checkpoint, tmp_path: Path) -> None:
    targets = [Target(f"copy{i}", "F32", (4, 6)) for i in range(3)]
    tasks = [Task("copy", (whole(source.tensors["t0"]),), (whole(t),)) for t in targets]
    (job,) = jobs(planned(source, targets, tasks), source, tmp_path / "out")
    assert [m.first for m in job.copies] == [True, False, False]


def test_slices_land_where_they_belong(source: Checkpoint, tmp_path: Path) -> None:
    """Rows of two tensors, stacked into one."""
    target = Target("stacked", "F32", (4, 6))
    parts = [
        Task("copy", (rows(source.tensors["t0"], 2, 4),), (rows(target, 0, 2),)),
        Task("copy", (rows(source.tensors["t3"], 0, 2),), (rows(target, 2, 4),)),
    ]
    (job,) = jobs(planned(source, [target], parts), source, tmp_path / "out")
    wanted = np.concatenate([ARRAYS["t0"][2:4], ARRAYS["t3"][:2]])
    assert (tensors(make(job))["stacked"] == wanted).all()


def test_zeros_are_zero_and_cost_nothing(source: Checkpoint, tmp_path: Path) -> None:
    target = Target("nothing", "F32", (1000, 1000))
    plan = planned(source, [target], [Task("zeros", (), (Piece("nothing", (1000, 1000)),))])
    (job,) = jobs(plan, source, tmp_path / "out")
    path = make(job)
    assert not tensors(path)["nothing"].any()
    assert path.stat().st_blocks * 512 < 100_000 < path.stat().st_size


def computing(source: Checkpoint) -> tuple[list[Target], list[Task]]:
    """One computed tensor: t0 * 2 + 1."""
    target = Target("twice", "F32", (4, 6))
    params = {"scale": 2.0, "shift": 1.0}
    task = Task("affine", (whole(source.tensors["t0"]),), (whole(target),), params)
    return [target], [task]


def test_computed_bytes_are_those_that_verify_compares(source: Checkpoint, tmp_path: Path) -> None:
    (job,) = jobs(planned(source, *computing(source)), source, tmp_path / "out")
    ((piece, data),) = engine.computed(job, 0, job.tasks[0])
    found = tensors(make(job))["twice"]
    assert piece.name == "twice" and bytes(data) == found.tobytes()
    assert (found == ARRAYS["t0"] * 2 + 1).all()


def test_a_job_is_a_value(source: Checkpoint, tmp_path: Path) -> None:
    """Ray sends it to another machine."""
    targets, tasks = copies(source, "t1")
    more, computed = computing(source)
    plan = planned(source, targets + more, tasks + computed)
    (job,) = jobs(plan, source, tmp_path / "out")
    first = make(job).read_bytes()
    assert make(pickle.loads(pickle.dumps(job))).read_bytes() == first


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_are_dealt_by_size_at_least_one_each(
    threads: int, source: Checkpoint, tmp_path: Path
) -> None:
    targets, tasks = copies(source, "t0", "t1", "t2", "t3")
    plan = planned(source, targets, tasks, max_shard=100)
    dealt = [job.threads for job in jobs(plan, source, tmp_path / "out", threads=threads)]
    assert len(dealt) == len(plan.shards) == 3 and min(dealt) >= 1
    sizes = [s.size for s in plan.shards]
    assert dealt == [max(1, round(threads * size / sum(sizes))) for size in sizes]


def test_many_threads_write_the_same_file(source: Checkpoint, tmp_path: Path) -> None:
    plan = planned(source, *copies(source, "t3", "t2", "t1", "t0"))
    one = make(*jobs(plan, source, tmp_path / "one", threads=1))
    four = make(*jobs(plan, source, tmp_path / "four", threads=4))
    assert one.read_bytes() == four.read_bytes()


def test_a_copy_that_changes_size_is_a_bug(source: Checkpoint, tmp_path: Path) -> None:
    target = Target("narrow", "BF16", (4, 6))
    plan = planned(
        source, [target], [Task("copy", (whole(source.tensors["t0"]),), (whole(target),))]
    )
    with pytest.raises(MoetoolError, match="a copy changes size") as refused:
        jobs(plan, source, tmp_path / "out")
    assert (
        refused.value.where["expected"] == "48 bytes" and refused.value.where["tensor"] == "narrow"
    )


def test_nan_is_reported_where_it_was_read(tmp_path: Path) -> None:
    arrays = numbered((4,), (4,))
    arrays["t1"][2] = np.nan
    source = lay(tmp_path / "model", arrays)
    plan = planned(source, *copies(source, "t1", "t0"))
    (job,) = jobs(plan, source, tmp_path / "out", watch=True)
    (suspect,) = engine.make_shard(job)
    assert suspect[1] <= source.tensors["t1"].start < suspect[2]
    (blind,) = jobs(plan, source, tmp_path / "out", watch=False)
    assert engine.make_shard(blind) == []


def several(source: Checkpoint, tmp_path: Path) -> list[engine.Job]:
    plan = planned(source, *copies(source, "t0", "t1", "t2", "t3"), max_shard=100)
    return jobs(plan, source, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_done_once(workers: int, source: Checkpoint, tmp_path: Path) -> None:
    done: list[str] = []
    told: list[int] = []
    work = several(source, tmp_path)
    engine.run_local(
        work,
        lambda job, found: done.append(job.path),
        workers=workers,
        tell=told.append,
        stop=threading.Event(),
    )
    assert sorted(done) == sorted(job.path for job in work)
    assert sum(told) == sum(a.nbytes for a in ARRAYS.values())


def test_the_first_failure_ends_the_others(source: Checkpoint, tmp_path: Path) -> None:
    work = several(source, tmp_path)
    done: list[str] = []

    def fail(job: engine.Job, found: object) -> None:
        done.append(job.path)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        engine.run_local(work, fail, workers=1, tell=lambda n: None, stop=threading.Event())
    assert done == [work[0].path]


def test_a_stop_leaves_the_rest_undone(source: Checkpoint, tmp_path: Path) -> None:
    work, stop = several(source, tmp_path), threading.Event()
    done: list[str] = []

    def halfway(job: engine.Job, found: object) -> None:
        done.append(job.path)
        if len(done) == 2:
            stop.set()

    with pytest.raises(Stopped):
        engine.run_local(work, halfway, workers=1, tell=lambda n: None, stop=stop)
    assert done == [job.path for job in work[:2]]
    assert Stopped.exit_code == 3


def test_a_stop_is_seen_between_two_moves(source: Checkpoint, tmp_path: Path) -> None:
    plan = planned(source, *copies(source, "t3", "t1", "t0"))
    (job,) = jobs(plan, source, tmp_path / "out")
    told: list[int] = []
    with pytest.raises(Stopped):
        engine.make_shard(job, told.append, lambda: len(told) == 1)
    assert len(told) == 1
