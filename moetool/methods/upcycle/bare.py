"""What of a model with groups of experts is its base's own, and the base alone (--target base):
what it computes where the groups add nothing, or for text where these are other modalities'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moetool.errors import MoetoolError
from moetool.methods.contract import Builder, Certificate, Made, ModelFacts, Settings
from moetool.surgery import groups, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import EMPTY, PART, Group
from moetool.surgery.plan import Outputs
from moetool.surgery.route import MODALITY
from moetool.surgery.spec import whole
from moetool.surgery.text_model import text_model

TARGET = "base"
LORA = "lora"  # the form of low-rank experts
IN_FULL = "`moetool materialize` without --target writes experts in full, where a class has such"
# Under these laws the only one that a token may use has the weight 1.
ALONE = ("renormalised", "hard", "softmax", "soft")


def named(group: Group) -> str:
    """As a sentence calls it: `experts_2 (null, ffn)`."""
    return f"{group.name} ({group.form}, {group.site})"


def adds_nothing(group: Group) -> bool:
    """Whether the model is the same without it: experts of no output beside an FFN, or parts that
    all run and count once.
    """
    whole = group.reached == group.experts and group.route.law == "hard" and group.scale == 1.0
    return group.base == "beside" if group.form == EMPTY else group.form == PART and whole


def base_of(source: Checkpoint) -> Checkpoint:
    """The checkpoint as its base alone has it: tensors and config."""
    config, at = groups.base_of(source.config), text_model(source.config)
    base = text_model(config)
    bare = {
        name: stored
        for name, stored in source.tensors.items()
        if base.match(name) is not None or at.match(name) is None
    }
    return replace(source, config=config, tensors=bare)


def dropped(source: Checkpoint, left: Sequence[Group]) -> dict[str, str]:
    """The tensors of groups that are left out, by name with the reason."""
    at, found = text_model(source.config), {}
    for name in source.tensors:
        block, _, rest = name.partition(".layers.")[2].partition(".")[2].rpartition(".")
        words = [*block.split("."), rest]
        for group in left:
            if at.layer_of(name) in group.layers and {group.name, group.router} & set(words):
                found[name] = f"group {named(group)} is left out"
    return found


def plan(source: Checkpoint, settings: Settings) -> Made:
    """The base, byte for byte. MoetoolError where some token would be computed otherwise without a
    group, and is no other modality's.
    """
    at, text = text_model(source.config), list[str]()
    for group in at.groups:
        if adds_nothing(group):
            continue
        if not _is_for_others(group):
            raise MoetoolError(
                f"the base alone computes something else: without group {named(group)} every "
                "token misses its experts",
                file=source.folder,
                expected="groups that add nothing, or that text does not use",
                hint=IN_FULL,
            )
        text.append(named(group))
    base, build = base_of(source), Builder()
    for name, stored in base.tensors.items():
        build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))
    out = {n: f"only {at.layout.cls} has it" for n in source.tensors if n not in base.tensors}
    wanted = Outputs(base.config, build.targets, build.tasks, out)
    made = reform.plan((source,), wanted, max_shard=settings.max_shard, form="same")
    family, count = groups.family_of(source.config), made.parameters
    facts = ModelFacts(groups.MODEL_TYPE, family, (), 0, 0, 0, "dense", count, count)
    return Made(made, _certificate(text), made.config, {}, facts)


def _is_for_others(group: Group) -> bool:
    """Whether text is computed by the layer's own alone, whatever the others have."""
    route = group.route
    if route.key != MODALITY or group.base != "member" or route.law not in ALONE:
        return False
    own: Sequence[int] = route.options["allowed"][0]
    return own[0] == 1 and sum(own) == 1


def _certificate(text: Sequence[str]) -> Certificate:
    if not text:
        return Certificate("exact", "the groups that are left out add nothing")
    why = "tokens are text: experts of the other modalities are left out"
    return Certificate("exact_if", f"{why} ({', '.join(text)})")
