"""The plan that gives a model more experts: every byte of the old ones stays, and copies follow."""

from __future__ import annotations

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.methods.extend.choose import Copies
from moetool.methods.reduce.cut import NEVER, Cutter
from moetool.methods.reduce.decided import Decided
from moetool.methods.reduce.decision import Decision
from moetool.methods.reduce.writing import Writing
from moetool.surgery import calibrated, groups, shim
from moetool.surgery.calibrated import INTO, NAME, OUT, Correction
from moetool.surgery.counted import Counted
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import FLOATS, Piece, whole

STD = 0.02  # of the first weights of what corrects a router


def decided(mixture: Mixture, copies: Copies) -> Decided:
    """Every layer's experts of the output, as the cut reads them."""
    numbers = (*mixture.layers, *mixture.mtp_layers)
    layers = {n: copies.decision(n, mixture) for n in numbers}
    return Decided("extend", "copy", mixture.experts, layers)


class Extender(Cutter):
    """Writes copies as the cut writes experts, ragged where not all layers are extended alike;
    `router`: copy or never (extend/options.py).
    """

    def __init__(self, writing: Writing, router: str, held: Correction | None = None) -> None:
        super().__init__(writing, "ragged", "centroid", None)
        self.never, self.held = router == "never", held

    def _config(self) -> JsonObject:
        made = super()._config()
        if self.held is None:
            return made
        base = groups.base_of(made) if groups.is_ours(made) else made
        return groups.ragged_config(base, self.held) | {"auto_map": dict(shim.AUTO_MAP)}

    def _layer(self, number: int) -> None:
        super()._layer(number)
        router = self.mixture.side(number, "router")
        if self.held is None or number not in self.held.layers or router is None:
            return
        stem = router.stored.name.removesuffix(".weight")
        count, width = self.decided.layers[number].count, self.held.width
        shapes = {INTO: (width, count), OUT: (count, width)}
        for part, shape in shapes.items():
            name = f"{stem}.{NAME}.{part}"
            out = whole(self.build.target(name, router.stored.dtype, shape))
            if part == OUT:  # zero at birth
                self.build.task("zeros", (), (out,))
            else:
                how = {"law": "normal", "sigma": STD, "seed": self.writing.settings.seed}
                self.build.task("draw", (), (out,), **how, repeat=1, name=name)

    def _entry(self, c: Counted, decision: Decision, group: int, out: Piece) -> None:
        """A copy's router row is its expert's; its bias, too, or one that nothing overcomes."""
        (expert,) = decision.groups[group]
        first = decision.leads.index(expert) == group
        if self.never and c.role == "router.bias" and not first:
            self.build.task("fill", (), (out,), value=NEVER)
        else:
            super()._entry(c, decision, group, out)


def check_router(mixture: Mixture, copies: Copies, router: str) -> None:
    """Refuse `never` where no bias is in the way, and where a group would be chosen for a copy."""
    if router != "never":
        return
    bare = [n for n in copies.layers if mixture.side(n, "router.bias") is None]
    if bare:
        raise UsageError(
            f"--router never needs a router with a bias, and {mixture.layout.model_type} has none",
            tensor=f"layer {bare[0]}",
            expected="a selection bias (DeepSeek-V3, GLM-4.5) or one in the logits (gpt-oss)",
            hint="--router copy, and measure: --text FILE",
        )


def calibration(mixture: Mixture, copies: Copies, width: int) -> Correction | None:
    """What corrects the routers of the layers that get copies; None for none."""
    layers = tuple(sorted(set(copies.layers) & set(mixture.layers)))
    return Correction(layers, width) if width and layers else None


def check_calibration(mixture: Mixture, width: int) -> None:
    """Refuse it where no router can have one, from headers alone."""
    if not width:
        return
    why = calibrated.why_not(mixture.layout)
    routers = [mixture.side(n, "router") for n in mixture.layers]
    plain = all(
        r and r.stored.dtype in FLOATS and r.stored.name.endswith(".weight") for r in routers
    )
    if why or not plain:
        raise UsageError(
            f"--calibration corrects shares of a softmax, and {why or 'this router has none'}",
            expected="Mixtral, Qwen-MoE, OLMoE and others that route by a softmax alone",
            found=mixture.layout.model_type,
            hint="leave out --calibration",
        )


def certificate(mixture: Mixture, copies: Copies, router: str) -> Certificate:
    """How the output relates to its source."""
    if not copies.layers:
        return Certificate("exact", "nothing was added: a copy")
    if router == "never":
        return Certificate("exact", "copies are never chosen: their bias is below every score")
    if _alone(mixture):
        why = "top-1, and a weight that other experts have no part in: a copy is its expert"
        return Certificate("exact", why)
    return Certificate(
        "none",
        "a copy is chosen with its expert and takes the slot of another: by how much, "
        "`moetool eval --reference` or --text measures",
        None,
    )


def _alone(mixture: Mixture) -> bool:
    """Whether the one chosen expert's weight is the same, however many there are."""
    rule = mixture.layout.overlay.law
    if mixture.top_k != 1 or mixture.groups > 1 or rule.score not in _KNOWN:
        return False
    law = mixture.law()
    return bool(law["renorm"]) or rule.score.startswith("sigmoid")


_KNOWN = ("softmax", "sigmoid", "sigmoid-on-input")
