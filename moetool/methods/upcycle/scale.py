"""SCALE: solve the coverage identity, c_j + sum over experts holding neuron j of w_e * m = 1, and
say how sure it is.

Facts: NVIDIA's and Megatron's cube root on gate, up and down is not exact for SwiGLU; the whole
factor on down_proj is (or in the config, where the family multiplies the routed sum by a field).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import frexp
from typing import NamedTuple

from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.surgery.layout import Layout
from moetool.units import STRENGTH, parse_number


@dataclass(frozen=True)
class Combination:
    """What the identity is solved for. `changed`: copies were re-drawn or got noise; `assembled`:
    experts come from different models or the trunk is mixed; `asked`: `auto` or a number.
    """

    experts: int
    top_k: int
    split: int
    router_law: str
    router_repeat: int
    shared: bool
    changed: bool
    assembled: bool
    asked: str

    @property
    def silent(self) -> bool:
        """Whether routed experts start at zero output."""
        return self.shared and self.asked == "auto"

    @property
    def discards(self) -> bool:
        """Whether the last copy of the FFN is cut short."""
        return self.experts % self.split > 0

    def factor(self, total: float) -> float:
        """The factor on every routed expert's output, where a token's weights sum to `total`."""
        return said(self.asked, self.split / total)


def said(asked: str, solved: float) -> float:
    """What --scale says, `solved` where it is to be. UsageError"""
    if asked == "auto":
        return solved
    try:
        return parse_number(asked, largest=STRENGTH)
    except ValueError:
        raise UsageError(
            f"--scale {asked!r} is not understood",
            expected=f"auto or a number of at most {STRENGTH:g}",
            hint="leave it out to have it solved",
        ) from None


class Sure(NamedTuple):
    """How sure the identity is: its level, a sentence why, and the coverage (None: not asked)."""

    level: str
    why: str
    coverage: float | None


def solve(recipe: Combination, target: Layout) -> Certificate:
    """The factor on every routed expert's output, where it is put, and the certificate of the
    whole.
    """
    law = target.overlay.law
    factor = recipe.factor(law.total)
    place = "config" if target.fields.get("routed_scale") and law.renorm != "never" else "down_proj"
    if recipe.silent or factor == 1.0:
        place = "none"
    sure = _sure(recipe, factor * law.total / recipe.split)
    return Certificate(sure.level, sure.why, sure.coverage, 1.0 if recipe.silent else factor, place)


def _sure(recipe: Combination, share: float) -> Sure:
    """The certificate's level; `share` is what the factor leaves of the coverage."""
    level, why = _level(recipe)
    coverage = 1.0 if recipe.silent else share + recipe.shared
    if recipe.assembled:
        why = "experts or trunk come from different models: there is no single function to keep"
        return Sure("none", why, None)
    if recipe.changed and not recipe.silent:
        return Sure(
            "none", "copies were changed on purpose (noise, re-drawn neurons or a mask)", None
        )
    if recipe.discards and not recipe.silent:
        why = "a part of the last copy is discarded: some neurons stand in more experts than others"
        return Sure("none", why, None)
    if abs(coverage - 1.0) > 1e-9:
        return Sure("none", f"--scale {recipe.asked} gives a coverage of {coverage:g}", coverage)
    return Sure(level, why, coverage)


def rounded(certificate: Certificate, dtype: str, folded: bool) -> Certificate:
    """Say so where an exact recipe rounds: a factor that is no power of two, or folded norms, in a
    16-bit dtype.
    """
    scaled = certificate.place == "down_proj" and frexp(certificate.scale)[0] != 0.5
    if (
        certificate.level not in ("exact", "exact_if")
        or dtype not in ("BF16", "F16")
        or not (scaled or folded)
    ):
        return certificate
    what = "folded norms and embeddings are" if folded else f"down_proj * {certificate.scale:g} is"
    return replace(
        certificate, level="exact_if", why=f"{certificate.why}; {what} rounded to {dtype}"
    )


def _level(recipe: Combination) -> tuple[str, str]:
    """(level, why) of a recipe with the solved factor, from one model and nothing changed."""
    split = recipe.split
    if recipe.shared:
        why = "the whole FFN stays always on and the routed experts start at zero output"
        return "exact", why
    if split == 1:
        why = "every expert is the whole FFN and the combine weights sum to a constant"
        return "exact", f"{why}, whatever the router says"
    alike = recipe.router_repeat == split or recipe.router_law == "zero"
    if split == recipe.experts == recipe.top_k and alike:
        return "exact", "all parts of the FFN run, with equal weights"
    if recipe.router_repeat == split:
        why = "no two groups of experts tie in the router (then whole groups are selected)"
        return "exact_if", f"{why}; expert order is group-major"
    parts = f"{recipe.top_k} of {recipe.experts} parts run"
    return "expectation", f"{parts}: the mean over routers is right, a token is not"
