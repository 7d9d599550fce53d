"""What a rounded output must hold, and what was found when it was read back. Plain values;
evaluate/readback.py reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moetool.data import JsonObject
from moetool.surgery.spec import Piece

EXPERTS = "experts"


@dataclass(frozen=True)
class Pledge:
    """A matrix of an output that is stored in another form than its source's. piece: what of SRC it
    was made from; rounding: how (see `forms.encoded`); solved: it was copied from what deciding
    left.
    """

    name: str
    role: str
    piece: Piece
    form: str
    params: JsonObject = field(default_factory=dict)
    rounding: JsonObject = field(default_factory=dict)
    solved: bool = False


@dataclass(frozen=True)
class ReadBack:
    """A matrix that was read back: squared error and squared weights, summed."""

    name: str
    role: str
    error: float
    norm: float

    @property
    def relative(self) -> float:
        """Frobenius norm of the error by that of the matrix."""
        return _relative([self])


@dataclass(frozen=True)
class Loaded:
    """What the named loader made of a truncated copy. why: why there was none."""

    loader: str
    version: str = ""
    parameters: int = 0  # tensors that were compared by value
    layers: int = 0
    logits: float = 0.0  # relative difference of the logits
    why: str = ""

    def as_json(self) -> JsonObject:
        """Only what there is."""
        if self.why:
            return {"loader": self.loader, "skipped": self.why}
        return {k: v for k, v in vars(self).items() if k != "why"}

    @classmethod
    def from_json(cls, said: JsonObject) -> Loaded:
        """The inverse of `as_json`."""
        rest = {k: v for k, v in said.items() if k != "skipped"}
        return cls(**rest, why=said.get("skipped", ""))

    def __str__(self) -> str:
        if self.why:
            return f"not loaded: {self.why}"
        return (
            f"{self.version} loads {self.layers} layers with these {self.parameters} parameters, "
            f"value by value; logits differ by {self.logits:.2g}"
        )


@dataclass(frozen=True)
class Proof:
    """Every rounded matrix of an output, read from its bytes and held against its source."""

    held: tuple[ReadBack, ...]
    moved: int = 0  # bytes that were only moved, and are those of their source
    loaded: Loaded | None = None

    @property
    def worst(self) -> ReadBack:
        """The matrix farthest from its source."""
        return max(self.held, key=lambda h: h.relative)

    @property
    def roles(self) -> dict[str, tuple[ReadBack, ...]]:
        """By role, in the order in which they come."""
        named = dict.fromkeys(h.role for h in self.held)
        return {role: tuple(h for h in self.held if h.role == role) for role in named}

    def as_json(self) -> JsonObject:
        """A summary; `tensors` has all of them."""
        return {
            "matrices": len(self.held),
            "moved_bytes": self.moved,
            "relative_error": _relative(self.held),
            "worst": _named(self.worst),
            "roles": {
                role: {
                    "matrices": len(held),
                    "relative_error": _relative(held),
                    "worst": _named(max(held, key=lambda h: h.relative)),
                }
                for role, held in self.roles.items()
            },
        } | ({"loaded": self.loaded.as_json()} if self.loaded else {})

    def tensors(self) -> dict[str, float]:
        """Relative error of each matrix by name."""
        return {h.name: round(h.relative, 6) for h in self.held}

    def sentences(self) -> list[str]:
        """For people."""
        errors = ", ".join(f"{role} {_relative(held):.2%}" for role, held in self.roles.items())
        worst = self.worst
        said = [
            f"all {len(self.held)} matrices decoded from what was written; relative error {errors}",
            f"worst {worst.name} ({worst.relative:.2%})",
        ]
        return [*said, *([str(self.loaded)] if self.loaded else [])]


def _named(held: ReadBack) -> JsonObject:
    return {"tensor": held.name, "relative_error": held.relative}


def _relative(held: Iterable[ReadBack]) -> float:
    """Of several matrices together."""
    known = list(held)
    error, norm = sum(h.error for h in known), sum(h.norm for h in known)
    if error == 0:
        return 0.0
    return float("inf") if norm == 0 else round((error / norm) ** 0.5, 6)
