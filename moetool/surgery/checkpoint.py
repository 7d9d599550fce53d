"""Read a safetensors checkpoint without loading it: names, dtypes, shapes and byte ranges, all
checked.

A Checkpoint is a value (no open handle), so it can be pickled to a worker. Its readers see every
matrix under the name and with the shape that its family knows, in whatever form it is stored
(surgery/forms/). Everything a hostile or broken file can say is checked here, once: header length,
JSON, duplicate names, dtypes, shapes, overlapping or missing ranges, truncation, indexes that lead
out of the folder, indexes and shards that disagree. Format: safetensors README.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moetool import strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import bounds, companions, forms, weights
from moetool.surgery.headers import WeightFiles
from moetool.surgery.known import known
from moetool.surgery.spec import DTYPE_BITS, Piece, Stored, whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Extent(NamedTuple):
    """Bytes of a file: `size` of them from `start` on."""

    path: str
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `files` maps each weight file to (bytes, sha256 of its header).

    `tensors` and `config` are what a reader works with: matrices by the names of their family,
    whatever they are made of, and a config without what it told loaders of their forms (`told`,
    by form). `lying` are the tensors as they lie in the files, where that is not the same.
    One that shows what a plan would write (surgery/view.py) has no files of its own: its bytes lie
    at `places`, in files of the checkpoints `under` it, and tensors in `beyond` stem from what does
    not travel with an output.
    """

    folder: str
    config: JsonObject
    tensors: dict[str, Stored]
    files: dict[str, tuple[int, str]]
    lying: dict[str, Stored] = field(default_factory=dict, repr=False)
    told: dict[str, JsonObject] = field(default_factory=dict)
    under: tuple[Checkpoint, ...] = ()
    places: Mapping[str, Extent] = field(default_factory=dict, repr=False)
    beyond: frozenset[str] = frozenset()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read headers and config of a folder, or of one `.safetensors` file with a config.json
        beside it.

        Raises MoetoolError naming the file (and tensor) for anything that is not a whole, honest
        checkpoint.
        """
        path = Path(path)
        if path.is_file():
            if path.suffix not in weights.SUFFIXES:
                weights.refuse_other(path)
            folder, shards, promised = path.parent, [path.name], None
        elif path.is_dir():
            folder = path
            shards, promised = weights.weight_files(path)
        else:
            raise MoetoolError(
                f"{path} does not exist",
                hint="give a folder, a .safetensors file or a Hub id like org/name",
            )
        companions.check_inside(folder / "config.json", "model config")
        companions.travelling(folder)  # links out of the folder, pipes: said before any work
        config = read_json(folder / "config.json", what="model config")
        bounds.check(config, folder / "config.json")
        read = WeightFiles.read(folder, shards)
        if promised is not None:
            weights.compare_index(folder, promised, read.tensors)
        return cls.seen(str(folder), config, read)

    @classmethod
    def staged(cls, folder: str, shards: list[str], config: JsonObject) -> Checkpoint:
        """Finished shards of an output that has no config.json yet."""
        return cls.seen(folder, config, WeightFiles.read(Path(folder), shards))

    @classmethod
    def seen(
        cls,
        folder: str,
        config: JsonObject,
        read: WeightFiles,
        places: Mapping[str, Extent] | None = None,
    ) -> Checkpoint:
        """A checkpoint of these tensors as they lie: ask which matrices are known among them."""
        try:
            lying = cls(folder, config, read.tensors, read.files, places=places or {})
            found = known(read.tensors, config, read.types, lying.content)
        except MoetoolError as problem:
            problem.where.setdefault("file", folder)
            raise
        if not found.told:
            return lying
        return replace(
            lying,
            config=found.config,
            tensors=found.tensors,
            lying=read.tensors,
            told=found.told,
        )

    @property
    def real(self) -> tuple[Checkpoint, ...]:
        """The checkpoints whose files hold the bytes: itself, or those under it; none where headers
        alone are known.
        """
        if not self.under:
            return (self,) if self.folder else ()
        return tuple(chain.from_iterable(c.real for c in self.under))

    @property
    def stored(self) -> dict[str, Stored]:
        """Every tensor as it lies in a file, parts of matrices included."""
        return self.lying or self.tensors

    @property
    def hub_class(self) -> str:
        """The class of the Hub that the files are of, where these have other names for what its
        family has; else nothing.
        """
        named = (told["cls"] for form, told in self.told.items() if forms.named(form).moves)
        return next(named, "")

    @property
    def hub_left(self) -> list[str]:
        """Names of what is not of the language model, in files of a class of the Hub around it."""
        found = (told["left"] for form, told in self.told.items() if forms.named(form).moves)
        return next(found, [])

    def part(self, name: str) -> Stored:
        """The tensor of this name as it lies in a file; MoetoolError when it is missing."""
        return _present(self.stored, name, self.folder)

    def numbers(self, piece: Piece) -> np.ndarray:
        """A piece of a floating tensor as a float64 array [*shape], without torch where it lies
        in the file as it is.
        """
        from moetool.kernels import codec

        stored = self.tensor(piece.name)
        if stored.parts is not None:
            made: np.ndarray = self.matrix(piece).double().numpy()
            return made
        return codec.as_float64(self.read(piece), stored.dtype).reshape(piece.shape)

    def matrix(self, what: str | Piece, device: str = "cpu") -> Tensor:
        """A tensor, or a piece of one, as a torch tensor: decoded where it is stored in parts
        (then in float32), else in the dtype of its bytes.
        """
        from moetool.kernels import codec

        piece = whole(self.tensor(what)) if isinstance(what, str) else what
        parts, how = forms.split(self.tensor(piece.name), piece)
        read = [
            codec.decode(self.read(part), self.part(part.name).dtype, part.shape, device)
            for part in parts
        ]
        return forms.decoded(read, [how])[0]

    def tensor(self, name: str) -> Stored:
        """The tensor of this name as readers see it; MoetoolError when it is missing."""
        return _present(self.tensors, name, self.folder)

    def fingerprint(self) -> list[list[Any]]:
        """[file, bytes, header sha256] of every weight file: what a plan's digest knows of its
        source.
        """
        return [[name, *self.files[name]] for name in sorted(self.files)]

    def travelling(self) -> list[str]:
        """Files that go with the weights byte for byte: tokenizer, chat template, generation and
        processor configs.
        """
        return companions.travelling(self.folder)

    def place(self, stored: Stored) -> Extent:
        """Where the bytes of a tensor of `stored` lie."""
        if stored.name in self.places:
            return self.places[stored.name]
        path = os.path.join(self.folder, stored.file)
        return Extent(path, stored.start, stored.stop - stored.start)

    def range_of(self, piece: Piece) -> Extent:
        """(file, first byte, byte count) of a piece of a tensor as it lies in a file."""
        stored = self.part(piece.name)
        bits = DTYPE_BITS[stored.dtype]
        start, count = piece.offset * bits // 8, piece.count * bits // 8
        if start + count > stored.stop - stored.start:
            raise MoetoolError(
                "a plan reads past the end of a tensor",
                tensor=piece.name,
                expected=f"at most {stored.stop - stored.start} bytes",
                found=start + count,
                hint="report this as a bug of moetool",
            )
        path, begin, _ = self.place(stored)
        return Extent(path, begin + start, count)

    def read(self, piece: Piece) -> bytearray:
        """The bytes of a piece as they lie in a file, by pread (no mapping stays behind)."""
        path, start, count = self.range_of(piece)
        return read_range(path, start, count)

    def content(self, stored: Stored) -> bytes:
        """The bytes of a small tensor."""
        return bytes(self.read(whole(stored)))


def _present(tensors: dict[str, Stored], name: str, folder: str) -> Stored:
    if name not in tensors:
        raise MoetoolError(
            "a tensor is missing",
            file=folder,
            tensor=name,
            expected="present",
            found="absent",
            hint="the checkpoint is incomplete: download or save it again",
        )
    return tensors[name]


def read_range(path: str, start: int, count: int) -> bytearray:
    """Exactly `count` bytes from `start`; MoetoolError when the file has become shorter."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    handle = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < count:
            got = os.preadv(handle, [view[done : done + (1 << 30)]], start + done)
            if got == 0:
                raise MoetoolError(
                    "the file became shorter while it was read",
                    file=path,
                    expected=f"{start + count} bytes",
                    found=f"{start + done} bytes",
                    hint="do not change a source while moetool works on it",
                )
            done += got
    finally:
        os.close(handle)
    return buffer


def read_json(path: Path, *, what: str) -> JsonObject:
    """A JSON object from a file; MoetoolError otherwise."""
    return strict_json.load(path, what)
