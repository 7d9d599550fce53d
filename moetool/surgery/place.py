"""The place of an output: what may be written there, and what may be replaced.

Nothing of a user's is ever deleted: `--overwrite` takes the place of an output of moetool, or of a
folder that holds nothing but a checkpoint's files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from moetool.atomic import SUFFIX
from moetool.errors import MoetoolError, UsageError
from moetool.surgery import companions

SHOWN = 4
# What the steps, and files that were given, leave in a work folder.
WORK = ("stats", "walk", "solved", "gate", "steps", "fit", "adapters", "domains", "tokens")


def resolved(out: str | Path) -> Path:
    """Where the output really lies: behind a link to a folder, so that the link stays a link."""
    path = Path(os.path.abspath(out))
    return path.resolve() if path.is_symlink() and path.is_dir() else path


def existing(path: Path) -> Path:
    """The nearest folder that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_target(out: Path, sources: Sequence[str], *, overwrite: bool) -> None:
    """Refuse an output that is a source, lies in one, holds one, is no folder, or holds what must
    stay; raises UsageError or MoetoolError.
    """
    real = out.resolve()
    for source in sources:
        folder = Path(source).resolve()
        if real == folder or folder in real.parents or real in folder.parents:
            raise UsageError(
                "the output must not be a source, lie in one, or hold one",
                file=out,
                found=f"source {source}",
                hint="choose another output folder",
            )
    _check_kind(out)
    if out.is_dir() and os.path.ismount(real):
        raise UsageError(
            "the output is a mount point, whose place nothing can take",
            file=out,
            hint=f"choose a folder in it, for example {out / 'model'}",
        )
    found = sorted(os.listdir(out)) if out.is_dir() else []
    if found and not overwrite:
        raise UsageError(
            "the output folder is not empty",
            file=out,
            found=found[0],
            hint="choose another folder, or add --overwrite to replace it",
        )
    if found:
        check_replaceable(out)
    parent = existing(real.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise MoetoolError(
            "cannot write here: "
            + ("permission denied" if parent.is_dir() else "a part of the path is no folder"),
            file=parent,
            hint="choose a folder you may write to",
        )


def _check_kind(out: Path) -> None:
    if out.is_symlink() and not out.exists():
        raise UsageError(
            "the output is a link that leads nowhere",
            file=out,
            found=out.readlink(),
            hint="make the folder that it leads to, or remove the link",
        )
    if out.exists() and not out.is_dir():
        raise UsageError(
            "the output is a file",
            file=out,
            expected="a folder",
            hint="choose another output folder",
        )


def check_staging(folder: Path, mark: str) -> None:
    """Refuse a staging folder that is none of ours: one without our mark (it is taken away before
    the last rename) holds a checkpoint's files only.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        others = [folder.name]
    elif folder.is_dir() and not (folder / mark).is_file():
        others = strangers(folder)
    else:
        others = []
    if others:
        raise _in_the_way(folder, others)


def check_work(folder: Path) -> None:
    """Refuse a work folder that is none of ours: it is removed when the output is whole. Ours holds
    the folders of the steps, and files of moetool's own name (a lock).
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        others = [folder.name]
    else:
        ours = [n for n in os.listdir(folder) if n in WORK or n.lstrip(".").startswith("moetool")]
        others = sorted(set(os.listdir(folder)) - set(ours))
    if others:
        raise _in_the_way(folder, others)


def _in_the_way(folder: Path, others: Sequence[str]) -> MoetoolError:
    return MoetoolError(
        "something else is where moetool works",
        file=folder,
        expected="nothing, or what an unfinished run left",
        found=", ".join(others[:SHOWN]),
        hint="move it away, or choose another output folder",
    )


def strangers(folder: Path) -> list[str]:
    """Names in a folder that no checkpoint holds: other files, and everything that is no file, but
    folders of adapters (X-LoRA's).
    """
    with os.scandir(folder) as entries:
        return sorted(
            e.name
            for e in entries
            if not (companions.is_output(e.name) and _is_file(e)) and not _is_adapter(e)
        )


def _is_adapter(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder that holds an adapter, or what there is of one, and nothing else."""
    if not entry.is_dir(follow_symlinks=False):
        return False
    with os.scandir(entry.path) as inside:
        found = [*inside]
    names = {e.name.removesuffix(SUFFIX) for e in found}
    return bool(found) and names <= set(companions.ADAPTED) and all(map(_is_file, found))


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() or stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a checkpoint's files, or no weights."""
    others = strangers(folder)
    if not others and not any(companions.is_weights(name) for name in os.listdir(folder)):
        others = sorted(os.listdir(folder))  # a README and a licence: somebody's own
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise UsageError(
            "the output folder holds what is no part of a checkpoint, and it is not deleted",
            file=folder,
            expected="an output of moetool, or nothing but a model's files",
            found=", ".join(others[:SHOWN]) + more,
            hint="move those away, or choose another output folder",
        )
