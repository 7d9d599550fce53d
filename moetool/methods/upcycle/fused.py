"""Experts that the noise level alone chooses, for one level: as one FFN, beside each other with
their weights in the last matrix (MoDE, arXiv 2412.12953, fuses them so).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.methods.contract import Builder, Certificate, Made, ModelFacts, Settings
from moetool.methods.upcycle import bare
from moetool.surgery import groups, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.ffn import LAST, FfnBlock, FfnLinear
from moetool.surgery.groups import FIRST_SITE, Group
from moetool.surgery.plan import Outputs
from moetool.surgery.spec import Stored, rows, whole
from moetool.surgery.text_model import TextModel, text_model

if TYPE_CHECKING:
    import numpy as np

KEY = "noise"
_LAWS = ("renormalised", "softmax", "hard", "soft")
Chosen = dict[str, list[list[float]]]  # layer -> (expert, weight) of each that runs


@dataclass(frozen=True)
class NoisedGroup:
    """A checkpoint with experts by noise level."""

    source: Checkpoint
    at: TextModel
    group: Group
    block: FfnBlock

    @classmethod
    def of(cls, source: Checkpoint) -> NoisedGroup:
        """MoetoolError where the experts of a level are not one FFN in every layer."""
        if not groups.is_ours(source.config) or not groups.read(source.config):
            raise _unfit(source, "a model without groups of experts")
        at = text_model(source.config)
        (group, *more), every = at.groups, range(at.field("layers") or 0)
        wrong = {
            f"a route by {group.route.key}": group.route.key != KEY,
            f"law {group.route.law}": group.route.law not in _LAWS,
            f"{group.form} experts, {group.base}": (group.form, group.base) != ("full", "gone"),
            f"experts at the site {group.site}": group.site != FIRST_SITE,
            "layers without experts": sorted(group.layers) != [*every],
            "another activation": bool(group.params) or group.scale != 1.0,
            f"{1 + len(more)} groups": bool(more),
        }
        for said, is_so in wrong.items():
            if is_so:
                raise _unfit(source, said)
        block = FfnBlock.of(text_model(groups.base_of(source.config)).layout)
        if any(one.transposed or one.role == "gate_up" for one in block.linears):
            raise _unfit(source, "linears that lie as [in, out], or gate and up in one matrix")
        return cls(source, at, group, block)

    def chosen(self, level: float) -> Chosen:
        """Who runs at a level, in float64 from the routers' tensors."""
        import numpy as np

        found = {}
        for layer in sorted(self.group.layers):
            module = f"{self.at.name(self.block.module, layer=layer)}.{self.group.router}"
            held = {t.name: self._numbers(f"{module}.{t.name}") for t in self.group.router_tensors}
            seen = held["embed"][:, 0] * level + held["embed_bias"]
            straight, gate = np.split(held["inner"] @ seen + held["inner_bias"], 2)
            middle = straight * gate / (1.0 + np.exp(-gate))
            scores = held["weight"] @ middle + held["bias"]
            found[str(layer)] = [[e, w] for e, w in self._weighed(scores)]
        return found

    def _numbers(self, name: str) -> np.ndarray:
        return self.source.numbers(whole(self.source.tensor(name)))

    def _weighed(self, scores: np.ndarray) -> Iterator[tuple[int, float]]:
        """(expert, weight) of those that run, as the law says."""
        import numpy as np

        law = self.group.route.law
        count = self.group.experts if law == "soft" else self.group.route.top_k
        best = np.argsort(-scores, kind="stable")[:count]
        shares = np.exp(scores - scores.max())
        total = shares[best].sum() if law == "renormalised" else shares.sum()
        for expert in best:
            yield int(expert), 1.0 if law == "hard" else float(shares[expert] / total)

    def expert(self, layer: int, expert: int, linear: FfnLinear, part: str = "weight") -> Stored:
        """A tensor of an expert."""
        module = self.at.name(self.block.module, layer=layer)
        return self.source.tensor(f"{module}.{self.group.expert(expert, linear.lies, part)}")


def decide(source: Checkpoint, level: float) -> JsonObject:
    """Who runs at a level: small numbers, which the record keeps."""
    return {"noise": NoisedGroup.of(source).chosen(level)}


def plan(source: Checkpoint, chosen: Chosen, level: float, settings: Settings) -> Made:
    """The dense family with a wider FFN; all else moves byte for byte."""
    held, build = NoisedGroup.of(source), Builder()
    base = bare.base_of(source)
    for name, stored in base.tensors.items():
        build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
    for layer, linear in product(sorted(held.group.layers), held.block.linears):
        _write(build, held, layer, linear, chosen[str(layer)])
    width = held.at.layout.fields["width"]
    first = held.expert(held.group.layers[0], 0, held.block.last)
    config, text = _with_text(base.config, held.at.path)
    text[width] = first.shape[1] * len(chosen[str(held.group.layers[0])])
    why = f"experts are those of the noise level {level:g}, which the model no longer hears"
    used = {p.name for p in chain.from_iterable(task.inputs for task in build.tasks)}
    gone = {n: f"it is no part of the level {level:g}" for n in source.tensors if n not in used}
    wanted = Outputs(config, build.targets, build.tasks, gone)
    made = reform.plan((source,), wanted, max_shard=settings.max_shard, form="same")
    if first.dtype in ("BF16", "F16"):
        why += f"; the last matrix times their weights is rounded to {first.dtype}"
    family, count = groups.family_of(source.config), made.parameters
    facts = ModelFacts(groups.MODEL_TYPE, family, (), 0, 0, 0, "dense", count, count)
    return Made(made, Certificate("exact_if", why), made.config, {}, facts)


def _write(
    build: Builder, held: NoisedGroup, layer: int, linear: FfnLinear, runs: Sequence[list[float]]
) -> None:
    """One linear of the wide FFN: rows one after the other, or weighed columns side by side."""
    each = [held.expert(layer, int(e), linear) for e, _ in runs]
    (out, into), first = linear.sides(each[0].shape), each[0]
    last, count, weights = linear.role in LAST, len(each), [w for _, w in runs]
    shape = (out, into * count) if last else (out * count, into)
    target = build.target(held.at.name(linear.slot.name, layer=layer), first.dtype, shape)
    if last:
        build.task("columns", [*map(whole, each)], [whole(target)], scales=weights)
    else:
        for number, stored in enumerate(each):
            build.copy(whole(stored), rows(target, out * number, out * (number + 1)))
    if linear.bias is None or not _has_bias(held, layer, linear):
        return
    biases = [held.expert(layer, int(e), linear, "bias") for e, _ in runs]
    name = held.at.name(linear.bias.name, layer=layer)
    target = build.target(name, biases[0].dtype, (out if last else out * count,))
    if last:
        build.task("combine", [*map(whole, biases)], [whole(target)], weights=weights)
        return
    for number, stored in enumerate(biases):
        build.copy(whole(stored), rows(target, out * number, out * (number + 1)))


def _has_bias(held: NoisedGroup, layer: int, linear: FfnLinear) -> bool:
    module = held.at.name(held.block.module, layer=layer)
    return f"{module}.{held.group.expert(0, linear.lies, 'bias')}" in held.source.tensors


def _with_text(config: JsonObject, path: Sequence[str]) -> tuple[JsonObject, JsonObject]:
    """A config that may be changed, and the part of it that is the text model's."""
    made = dict(config)
    text = made
    for part in path:
        text[part] = dict(text.get(part) or {})
        text = text[part]
    return made, text


def _unfit(source: Checkpoint, found: str) -> MoetoolError:
    return MoetoolError(
        "the experts of a noise level are no single FFN here",
        file=source.folder,
        expected="one group of whole copies in the place of each layer's FFN, by noise level",
        found=found,
        hint="made by `moetool upcycle SRC OUT --key noise`",
    )
