"""Experts that are no FFN of their own: the tensors that each has instead of a matrix for every
linear. One entry a form; `hidden` in a shape is the width of a token, every other word one of the
group's params.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moetool.data import JsonObject


class ExpertTensor(NamedTuple):
    """A tensor of an expert: `adapter_up.weight` [hidden, dim]. A word of its shape may be a share
    of a param, `dim/groups`. `zero`: it is zero at birth; `when`: the param without which it is not
    there; `once`: the param with which only the first expert has it, for all.
    """

    name: str
    shape: tuple[str, ...]
    zero: bool = True
    when: str = ""
    once: str = ""

    def sides(self, hidden: int, params: JsonObject) -> tuple[int, ...]:
        """Its shape in numbers."""
        return tuple(hidden if w == "hidden" else side(w, params) for w in self.shape)

    def among(self, experts: int, params: JsonObject) -> int:
        """How many of the experts of a group have it, the first ones."""
        return 1 if self.once and params.get(self.once) else experts


def side(word: str, params: JsonObject) -> int:
    """A param, or a param over another that is 1 where it is not said."""
    name, _, parts = word.partition("/")
    return int(params[name]) // int(params.get(parts, 1))


ADAPTER_ACTS = ("gelu", "silu", "relu", "none")  # what adapters compute with, the usual first
_SQUARE, _ROW = ("hidden", "hidden"), ("hidden",)
HELD: Mapping[str, tuple[ExpertTensor, ...]] = {
    "part": (),  # heads of an attention (MoH, arXiv 2410.11842)
    # h + up(act(down h)), h what comes out of a module or goes in (PESC, arXiv 2401.02731; LaVIN)
    "adapter": (
        ExpertTensor("adapter_down.weight", ("dim", "hidden"), zero=False, once="shared_down"),
        ExpertTensor("adapter_down.bias", ("dim",), when="bias", once="shared_down"),
        ExpertTensor(
            "adapter_gate.weight", ("dim", "hidden"), zero=False, when="gated", once="shared_down"
        ),
        ExpertTensor("adapter_up.weight", ("hidden", "dim/groups")),
        ExpertTensor("adapter_up.bias", ("hidden",), when="bias"),
    ),
    # values of a head times tanh(gate x), x what the attention sees (PILL, arXiv 2311.02126)
    "gate": (ExpertTensor("value_gate.weight", ("heads", "hidden")),),
    # (1 + scale(h)) * h + shift(h), h what comes out of a module (MoFME, arXiv 2312.16610)
    "film": (
        ExpertTensor("film_scale.weight", _SQUARE),
        ExpertTensor("film_scale.bias", _ROW),
        ExpertTensor("film_shift.weight", _SQUARE),
        ExpertTensor("film_shift.bias", _ROW),
    ),
}


def inside(form: str, params: JsonObject) -> Iterator[ExpertTensor]:
    """What an expert of a form has; nothing for forms of whole FFNs."""
    return (one for one in HELD.get(form, ()) if not one.when or params.get(one.when))
