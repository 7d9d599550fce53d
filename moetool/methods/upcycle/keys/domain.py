"""How near a token is to an expert's domain."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Builder
from moetool.methods.field import WHAT
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.keys.key import RouteKey
from moetool.methods.upcycle.route import Router
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.headers import WeightFiles
from moetool.surgery.route import RouterTensor
from moetool.surgery.spec import FLOATS, Stored, whole

_NAME = "domains.safetensors"


@dataclass(frozen=True)
class Domains:
    """The options of the key."""

    domains: str = option(
        "",
        "a .safetensors file with one tensor [experts, any width]: an embedding of the domain that "
        "each expert is for, as of the mean of its texts",
        WHAT,
        metavar="FILE",
    )


class DomainKey(RouteKey):
    """How near a token is to an expert's domain: a SwiGLU MLP makes the rows of the router of fixed
    embeddings of the domains (--domains FILE), so that a new expert needs no row.

    Nexus (arXiv 2408.15901).
    """

    name = "domain"
    Options: ClassVar[type] = Domains
    own: Domains
    source: int = 0  # the file's number among the sources

    def files(self, work: str) -> tuple[Checkpoint, ...]:
        if not self.own.domains:
            raise UsageError(
                "--key domain needs the domains' embeddings",
                expected="--domains FILE.safetensors",
                found="--key domain alone",
                hint="a tensor [experts, width], or leave out --key",
            )
        path = Path(self.own.domains)
        if not path.is_file():
            raise UsageError(
                "--domains names no file",
                file=str(path),
                expected="a .safetensors file",
                hint="give the file of the domains' embeddings",
            )
        folder = Path(work, "domains")  # OUT may lie beside the file
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / _NAME)
        return (Checkpoint.seen(str(folder), {}, WeightFiles.read(folder, [_NAME])),)

    def attach(self, extra: Sequence[Checkpoint], sources: int) -> None:
        self.file, self.source = extra[-1], sources + len(extra) - 1

    def embeddings(self, choices: int) -> Stored:
        """The tensor of the file. UsageError where it is none of so many experts."""
        found = [*self.file.tensors.values()]
        shape = found[0].shape if len(found) == 1 else ()
        if len(shape) != 2 or shape[0] != choices or found[0].dtype not in FLOATS:
            raise UsageError(
                "--domains holds something else",
                file=self.own.domains,
                expected=f"one tensor [{choices}, width] of {', '.join(FLOATS)}",
                found=", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in found[:4]) or "none",
                hint="a row for each of --experts",
            )
        return found[0]

    def check(self, ground: Ground, choices: int, top_k: int) -> None:
        self.embeddings(choices)

    def options(self, ground: Ground, choices: int, top_k: int) -> JsonObject:
        return {"dim": self.embeddings(choices).shape[1], "width": ground.hidden}

    def one(self, build: Builder, spot: Spot, tensor: RouterTensor, start: Router) -> None:
        if tensor.start != "given":
            super().one(build, spot, tensor, start)
            return
        piece = whole(self.embeddings(spot.group.choices), self.source)
        build.task("affine", [piece], [whole(self.target(build, spot, tensor))], scale=1.0)
