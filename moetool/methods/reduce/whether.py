"""Whether down matrices are solved again: asked for, refused, or left to what there is to solve
on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moetool.methods.reduce.options import Reducing
from moetool.methods.reduce.way import Way
from moetool.surgery.experts import Mixture


@dataclass(frozen=True)
class Whether:
    """`refits`, or not, and then why: a sentence for the report."""

    refits: bool = False
    why: str = ""


def whether(way: Way, mixture: Mixture, kept: int) -> Whether:
    """As --refit says; else wherever the experts that `way` writes can be solved and there is
    enough to solve on. `kept`: experts of a layer that stay.
    """
    told = way.options.refit
    if told is not None:
        return Whether(told, "" if told else "--no-refit")
    why = _against(way, mixture, kept)
    return Whether(not why, why)


def _against(way: Way, mixture: Mixture, kept: int) -> str:
    """Why nothing is solved where nobody asked; empty where something is."""
    if not way.options.has_text:
        return "there is no text"
    if not way.solvable:
        return f"{way.called} writes experts that cannot be solved again"
    if not mixture.plain:
        return "the experts are quantized"
    if way.copies and mixture.coded:
        return "the experts are quantized, and --refit writes them in full"
    if way.options.stats:
        return _too_few(way.options, mixture, kept)
    return ""


def _too_few(options: Reducing, mixture: Mixture, kept: int) -> str:
    """Why a profile's sample is not enough: an expert must see about as many tokens as it is
    wide.
    """
    from moetool.forward.stats import Profile

    sample = int(Profile.open(Path(options.stats)).facts.get("sample", 0))
    width = mixture.width(mixture.layers[0])
    if sample * mixture.top_k >= width * kept:
        return ""
    need = -(-width * kept // mixture.top_k)
    return f"the profile kept {sample:,} tokens a layer, and {need:,} are needed (--sample)"
