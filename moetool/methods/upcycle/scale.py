"""SCALE: solve the coverage identity, c_j + sum over experts holding neuron j of w_e * m = 1, and
say how sure it is.

Facts: NVIDIA's and Megatron's cube root on gate, up and down is not exact for SwiGLU; the whole
factor on down_proj is (or in the config, where the family multiplies the routed sum by a field).
"""

from __future__ import annotations

from dataclasses import replace
from math import frexp

from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.surgery.family import RouterLaw
from moetool.surgery.layout import Layout
from moetool.units import STRENGTH, parse_number


def solve(
    *,
    experts: int,
    top_k: int,
    split: int,
    router_law: str,
    router_repeat: int,
    target: Layout,
    shared: bool,
    changed: bool,
    assembled: bool,
    asked: str,
) -> Certificate:
    """The factor on every routed expert's output, where it is put, and the certificate of the
    whole.

    `changed`: copies were re-drawn or got noise; `assembled`: experts come from different models
    or the trunk is mixed.
    """
    law = target.overlay.law
    total = law.total  # what the combine weights of one token sum to
    factor = split / total
    place = "config" if target.fields.get("routed_scale") and law.renorm != "never" else "down_proj"
    if asked != "auto":
        try:
            factor = parse_number(asked, largest=STRENGTH)
        except ValueError:
            raise UsageError(
                f"--scale {asked!r} is not understood",
                expected=f"auto or a number of at most {STRENGTH:g}",
                hint="leave it out to have it solved",
            ) from None
    if shared or factor == 1.0:
        place = "none"
    level, why, coverage = _level(experts, top_k, split, router_law, router_repeat, shared, law)
    coverage = (
        coverage * factor * total / split if not shared and coverage is not None else coverage
    )
    if coverage is not None and abs(coverage - 1.0) > 1e-9:
        level, why = "none", f"--scale {asked} gives a coverage of {coverage:g}"
    if assembled:
        level, why, coverage = (
            "none",
            "experts or trunk come from different models: there is no single function to keep",
            None,
        )
    elif changed and not shared:
        level, why, coverage = (
            "none",
            "copies were changed on purpose (noise or re-drawn neurons)",
            None,
        )
    return Certificate(level, why, coverage, 1.0 if shared else factor, place)


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


def _level(
    experts: int,
    top_k: int,
    split: int,
    router_law: str,
    repeat: int,
    shared: bool,
    law: RouterLaw,
) -> tuple[str, str, float | None]:
    if shared:
        return (
            "exact",
            "the whole FFN stays always on and the routed experts start at zero output",
            1.0,
        )
    if split == 1:
        return (
            "exact",
            "every expert is the whole FFN and the combine weights sum to a constant, whatever the router says",
            1.0,
        )
    if split == experts == top_k and (repeat == split or router_law == "zero"):
        return "exact", "all parts of the FFN run, with equal weights", 1.0
    if repeat == split:
        return (
            "exact_if",
            "no two groups of experts tie in the router (then whole groups are selected); expert order is group-major",
            1.0,
        )
    return (
        "expectation",
        f"{top_k} of {experts} parts run: the mean over routers is right, a token is not",
        1.0,
    )
