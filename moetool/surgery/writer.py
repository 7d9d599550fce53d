"""Where an output comes to life: a staging folder beside the target, shards by rename,
`config.json` last, one final rename.

A folder that a loader accepts exists only when everything in it is whole. A second process,
another plan, a folder with other content: all refused before a byte is written.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from moetool import atomic
from moetool.data import JsonObject
from moetool.errors import MoetoolError, Unfit
from moetool.surgery import clone, companions, containers
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.place import (
    check_replaceable,
    check_staging,
    check_target,
    existing,
    resolved,
)
from moetool.surgery.plan import Plan, Shard

STATE = "moetool-staging.json"


class Writer:
    """Owns the staging folder of one output. Use as a context manager: it holds the lock."""

    def __init__(
        self,
        out: str | Path,
        plan: Plan,
        *,
        overwrite: bool = False,
        sources: Sequence[Checkpoint] = (),
        sync: bool = True,
        cloned: bool = False,
    ) -> None:
        self.out, self.plan, self.overwrite = resolved(out), plan, overwrite
        self.staging = self.out.parent / f".{self.out.name}.moetool"
        self.sources, self.sync, self.cloned = sources, sync, cloned
        self._lock: int | None = None

    @property
    def _config(self) -> str:
        """The file that makes the folder whole."""
        return containers.of(self.plan.container).config

    def finished(self) -> bool:
        """Whether the target already is the whole result of this very plan (a run that was killed
        after its last rename).
        """
        if (
            self.overwrite
            or not (self.out / self._config).is_file()
            or not (self.out / "moetool.json").is_file()
        ):
            return False
        return all(self._whole(self.out / s.name, s) for s in self.plan.shards)

    def check(self) -> None:
        """Refuse a target that cannot or must not be written; nothing is changed. Raises
        UsageError or MoetoolError.
        """
        check_target(self.out, [s.folder for s in self.sources], overwrite=self.overwrite)
        left = self.plan.disk - sum(
            (self.staging / s.name).stat().st_size
            for s in self.plan.shards
            if (self.staging / s.name).exists()
        )
        room = existing(self.out.parent)
        free = shutil.disk_usage(room).free
        if left > free and self.cloned and clone.works_in(room):
            left -= self.plan.repeated
        if left > free:
            raise MoetoolError(
                "not enough space on the disk",
                file=self.out,
                expected=f"{left:,} bytes",
                found=f"{free:,} bytes free",
                hint="free some space or choose another disk",
            )

    def __enter__(self) -> Writer:
        check_staging(self.staging, STATE)
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.staging / STATE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as problem:
            raise MoetoolError(
                f"cannot write here: {problem.strerror}",
                file=self.staging.parent,
                hint="choose a folder you may write to",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise MoetoolError(
                "another moetool process is writing this output",
                file=self.out,
                hint="wait for it, or choose another output folder",
            ) from None
        try:
            self._begin(self._lock)
        except BaseException:
            self.__exit__()  # the lock must not outlive a refusal: the caller may try again
            raise
        return self

    def __exit__(self, kind: object = None, problem: object = None, *_: object) -> None:
        """What these weights cannot be made into is not gone on with: it would be in the way."""
        if isinstance(problem, Unfit):
            shutil.rmtree(self.staging, ignore_errors=True)
            problem.where = {"file": self.sources[0].folder} | problem.where
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _begin(self, lock: int) -> None:
        """Take over what an earlier run of the same plan left; refuse what another plan left."""
        seen = os.pread(lock, 1 << 20, 0)
        try:
            old = json.loads(seen) if seen else None
        except json.JSONDecodeError:
            old = {}
        if old is not None and not isinstance(old, dict):
            old = {}  # JSON, but not ours
        if old is None and self._strangers():
            old = {}  # killed between its last two steps, and not ours
        mine = {"digest": self.plan.digest, "sources": self._stamps()}
        if old is not None and old != mine:
            if not self.overwrite:
                why = (
                    "its sources have changed since"
                    if old.get("digest") == self.plan.digest
                    else "it belongs to another plan"
                )
                raise MoetoolError(
                    f"an unfinished output is in the way: {why}",
                    file=self.staging,
                    expected=self.plan.digest[:16],
                    found=str(old.get("digest"))[:16],
                    hint="add --overwrite to discard it, or choose another output folder",
                )
            for entry in self.staging.iterdir():
                if entry.name != STATE:
                    shutil.rmtree(
                        entry
                    ) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(mine).encode(), 0)
        atomic.sweep(self.staging)
        for shard in self.plan.shards:
            (self.staging / shard.name).parent.mkdir(exist_ok=True)

    def _strangers(self) -> list[str]:
        """Weight files in the staging folder that are not whole shards of this plan."""
        mine = {s.name for s in self.plan.shards if self.is_done(s)}
        found = (p.name for p in self.staging.iterdir() if companions.is_weights(p.name))
        return [n for n in found if n not in mine and not n.endswith(".json")]

    def _stamps(self) -> list[list[list[Any]]]:
        return [list(chain.from_iterable(map(_stamp, s.real))) for s in self.sources]

    def is_done(self, shard: Shard) -> bool:
        """A shard is done if it is there, whole, and its header (which holds the plan's digest) is
        the planned one.
        """
        return self._whole(self.staging / shard.name, shard)

    def _whole(self, path: Path, shard: Shard) -> bool:
        header = self.plan.header(shard)
        try:
            with path.open("rb") as handle:
                return (
                    os.fstat(handle.fileno()).st_size == len(header) + shard.size
                    and handle.read(len(header)) == header
                )
        except OSError:
            return False

    def publish(self, temporary: str) -> None:
        """Give a finished shard its final name, once the disk holds it."""
        if self.sync:
            atomic.sync(Path(temporary))
        atomic.publish(Path(temporary))

    def finish(
        self, files: Mapping[str, bytes], travelling: Mapping[str, str], config: JsonObject
    ) -> None:
        """Write index and small files, then config.json, then move the whole folder to its place."""
        missing = [s.name for s in self.plan.shards if not self.is_done(s)]
        if missing:
            raise MoetoolError(
                "a shard is not whole",
                file=self.staging / missing[0],
                hint="run the same command again",
            )
        alone = containers.of(self.plan.container).is_model
        for name, source in sorted(travelling.items()) if alone else ():
            atomic.copy(source, self.staging / name)
        everything = dict(files)
        everything |= {name: as_json(data) for name, data in self.plan.beside().items()}
        for name, data in sorted(everything.items()):
            atomic.write(self.staging / name, data)
        atomic.write(self.staging / self._config, as_json(config))
        os.unlink(self.staging / STATE)
        for folder in (self.out, atomic.aside(self.out)):
            if folder.is_dir() and any(folder.iterdir()):
                check_replaceable(folder)  # somebody may have put something there meanwhile
        self._synced(atomic.sync_all, self.staging)
        atomic.publish_folder(self.staging, self.out, overwrite=self.overwrite)
        self._synced(atomic.sync, self.out.parent)

    def _synced(self, how: Callable[[Path], None], folder: Path) -> None:
        if not self.sync:
            return
        try:
            how(folder)
        except OSError as problem:
            raise MoetoolError(
                f"the disk does not take what was written: {problem.strerror or problem}",
                file=folder,
                hint="look after the disk, then run the same command again",
            ) from None


def _stamp(source: Checkpoint) -> list[list[Any]]:
    """[file, when it was written] of every weight file."""
    paths = {name: os.path.join(source.folder, name) for name in sorted(source.files)}
    return [[name, os.stat(path).st_mtime_ns] for name, path in paths.items()]


def as_json(data: Any) -> bytes:
    """JSON as people and diffs like it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
