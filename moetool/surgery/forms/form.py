"""What every form answers: how a matrix is stored, how its parts are found and named, and how a
loader is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from moetool.kernels.grid import Grid
from moetool.surgery.spec import InParts, Piece, Shape, Stored, Target, whole

if TYPE_CHECKING:
    from torch import Tensor

    from moetool.kernels.rounding import Rounded

Config = dict[str, Any]
Params = dict[str, Any]
Read = Callable[[Stored], bytes]  # the bytes of a small tensor


@dataclass(frozen=True)
class Recognised:
    """What a form found in a checkpoint: its matrices by their full names, the config as one
    reads it who knows nothing of the form, what that config no longer says (`told`), and names of
    parts that are tensors of their own as well.
    """

    matrices: dict[str, Stored]
    config: Config
    told: Config = field(default_factory=dict)
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Format:
    """A word of `--format`. `params`: of its form; `groups`: sizes that `WORD/SIZE` may ask for (0:
    one scale for a whole row, `WORD/channel`), the usual first, empty where there is no choice.
    `beside`: roles that `--format WORD` gives another format than the linears, or one at all.
    """

    about: str
    params: Params = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)


class Kin(NamedTuple):
    """A matrix of an output, in which form it is, and with which of its params."""

    target: Target
    form: Form
    params: Params


@dataclass(frozen=True)
class Written:
    """What a form's `config` is told of an output: its matrices in this form, each with the form's
    params, the tensors that are full, and which of those a source's config did not know as full
    (they have names that no source has, or had a form there). `kin`: the matrices of all forms with
    the same `method`, its own among them, each with form and params: they share one config.
    """

    matrices: Mapping[str, tuple[Target, Params]]
    full: Sequence[Target] = ()
    new: Sequence[Target] = ()
    kin: Mapping[str, Kin] = field(default_factory=dict)


class Form:
    """One way to store a matrix. A file of this folder holds one subclass with a `name`; nothing
    else has to be edited. No method but `decode` and `encode` imports torch.
    """

    name: ClassVar[str] = ""
    alone: ClassVar[bool] = True  # whether one matrix can be encoded without others
    formats: ClassVar[Mapping[str, Format]] = {}  # what --format may ask for
    searched: ClassVar[bool] = True  # whether a scale of less error than the largest value's pays
    computes: ClassVar[str] = ""  # dtype in which `encode` rounds; empty: the matrix's own
    mixes: ClassVar[bool] = False  # whether a model may hold other forms of its method as well
    quant_method: ClassVar[str] = ""  # as a config says it; one model, one method
    fits_in: ClassVar[str] = ""  # a dtype of 16 bits that holds all that it decodes to
    moves: ClassVar[bool] = False  # whether parts hold the matrix's own values, run after run
    in_groups: ClassVar[bool] = False  # whether only experts of a model type of its own have it
    container: ClassVar[str] = "safetensors"  # the only file format that can hold it

    def bits(self, shape: Shape, params: Params) -> float:
        """Stored bits a weight, scales included."""
        target = Target("", "BF16", shape)
        return 8 * sum(p.size for p in self.parts(target, params)) / max(1, whole(target).count)

    def fits(self, target: Target, params: Params) -> bool:
        """Whether a matrix of this name and shape can be stored so, and loads."""
        raise NotImplementedError

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        """What lies in the file for this matrix, in the order in which `decode` takes it."""
        raise NotImplementedError

    def weights(self, matrix: Stored) -> dict[str, int]:
        """Learned numbers by the part that holds them (a part that matrices share counts once)."""
        assert matrix.parts is not None
        return {matrix.parts.tensors[0].name: matrix.elements}

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        """The matrices that a checkpoint holds in this form; None where it holds none.

        Raises MoetoolError for a matrix that lacks a part or whose parts do not fit together.
        """
        raise NotImplementedError

    def look(
        self, tensors: Mapping[str, Stored], config: Config, read: Read | None
    ) -> Recognised | None:
        """As `recognise`, for forms that say in a small tensor what headers do not; without `read`
        nothing lies on disk yet, and shapes may be of as many weights only.
        """
        return self.recognise(tensors, config)

    def settled(self, target: Target, params: Params) -> Params:
        """The params with what they must say of one matrix."""
        return params

    def complete(self, tensors: Mapping[str, Stored], config: Config) -> None:
        """Raise MoetoolError for a tensor that a model of this `method` has, that none of its forms
        recognised, and that would be taken for something else.
        """
        return

    def pieces(
        self, parts: Sequence[Stored | Target], shape: Shape, piece: Piece, params: Params
    ) -> tuple[Piece, ...] | None:
        """The part of each tensor that holds `piece` of the decoded matrix, and nothing else;
        None where a piece has no part of its own.
        """
        if piece.offset == 0 and piece.count == whole(Target("", "", shape)).count:
            return tuple(Piece(p.name, p.shape, 0, piece.source) for p in parts)
        return None

    def config(self, config: Config, told: Config, written: Written) -> Config:
        """The config that tells a loader of these matrices; `told` is what a source's config said
        of the form (empty where no source has it).
        """
        raise NotImplementedError

    def decode(self, parts: Sequence[Tensor], params: Params) -> Tensor:
        """Parts, as their bytes say -> the matrix, in float32 where it must be computed."""
        raise NotImplementedError

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        """The matrix -> its parts: the inverse of `decode`, rounded to what the form can hold. By
        default to the nearest level under the largest value's scale, as the libraries do.
        """
        from moetool.kernels import rounding

        grid = self.grid(tuple(matrix.shape), params)
        assert grid is not None
        return self.pack(rounding.nearest(matrix, grid), params)

    def beside(self, name: str) -> tuple[str, ...]:
        """Names of other matrices that one is encoded beside, where all of these have this form."""
        return ()

    def encode_beside(
        self, matrix: Tensor, others: Sequence[Tensor], params: Params
    ) -> Sequence[Tensor]:
        """`encode`, with the matrices that `beside` names."""
        return self.encode(matrix, params)

    def grid(self, shape: Shape, params: Params) -> Grid | None:
        """What rounding methods aim at; None for a form that nobody rounds to."""
        return None

    def pack(self, rounded: Rounded, params: Params) -> Sequence[Tensor]:
        """Codes and scales -> the parts; forms with a grid have it."""
        raise NotImplementedError

    def forced(self, params: Params) -> Params:
        """The params under --force: forms that refuse some matrices by their values take them."""
        return params

    def unpack(self, parts: Sequence[Tensor], params: Params) -> Rounded | None:
        """The codes and scales of [out, in] parts, for who checks what was written: the inverse of
        `pack`. None where a form does not say.
        """
        return None

    def whole_numbers(self, part: str) -> bool:
        """Whether a part of this name holds whole numbers of which some cannot be right."""
        return False

    def flaw(self, part: Stored, data: bytes, matrix: Stored) -> tuple[str, str] | None:
        """What such a part must hold and what it does, where it cannot be right."""
        return None

    def misfit(self, target: Target, params: Params) -> str:
        """Why a matrix of this shape cannot be stored so, for people; empty where it can."""
        return "" if self.fits(target, params) else f"{self.name} does not hold such a tensor"


def slabs(parts: Sequence[Stored | Target], shape: Shape, piece: Piece) -> tuple[Piece, ...] | None:
    """Whole entries of the first axis, where every part has one entry there for each of the
    matrix's.
    """
    slab = whole(Target("", "", shape[1:])).count
    if not slab or piece.offset % slab or piece.count % slab:
        return None
    first, count = piece.offset // slab, piece.count // slab
    if any(p.shape[0] != shape[0] for p in parts):
        return None
    made = []
    for part in parts:
        size = whole(Target("", "", part.shape[1:])).count
        inner = part.shape[1:] if len(piece.shape) < len(shape) else (count, *part.shape[1:])
        made.append(Piece(part.name, inner, first * size, piece.source))
    return tuple(made)


def float_of(config: Config, unsaid: str = "BF16") -> str:
    """The dtype, as safetensors says it, that a config names for its weights; `unsaid` without."""
    text = config.get("text_config") or {}
    told = (config.get("dtype"), config.get("torch_dtype"), text.get("dtype"))
    said = next(filter(None, (*told, text.get("torch_dtype"))), None)
    if said is None:
        return unsaid
    return {"float32": "F32", "float16": "F16"}.get(str(said).removeprefix("torch."), "BF16")


def made_of(form: str, full: str, dtype: str, shape: Shape, parts: InParts) -> Stored:
    """A matrix under its full name, lying where its first part does."""
    assert parts.form == form
    return replace(parts.tensors[0], name=full, dtype=dtype, shape=shape, parts=parts)
