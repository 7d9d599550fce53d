"""Copies of FFNs for image tokens, as the class of the Hub that has a second FFN in each layer:
Mono-InternVL's text model (arXiv 2410.08202; official code: OpenGVLab/Mono-InternVL).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.methods.contract import Builder, Certificate, Made, ModelFacts, Settings
from moetool.methods.upcycle import bare
from moetool.surgery import forms, groups, hub, pair, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.family import filled
from moetool.surgery.ffn import FfnBlock
from moetool.surgery.groups import FIRST_SITE, Group
from moetool.surgery.hub import HubFamily, Twofold
from moetool.surgery.layout import Layout
from moetool.surgery.plan import Outputs
from moetool.surgery.route import MODALITY
from moetool.surgery.spec import Stored, Target, rows, whole
from moetool.surgery.text_model import TextModel, text_model

_BESIDE = "it is not of the text model, which alone is written"
HELD = "the class computes it, or trains alone by it"
_SILU = ("silu", "swish")
_TURNS = ("default", "linear", "dynamic")  # of rotary positions
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_TIED = "tie_word_embeddings"
_DTYPES = ("dtype", "torch_dtype")
_OWN = ("architectures", "model_type", "auto_map", *_DTYPES, *_ROPE)


def target(name: str) -> HubFamily | None:
    """The family whose class with a second FFN is called so; None for other words of --target."""
    found = (one for one in hub.families() if one.twofold and one.twofold.name == name)
    return next(found, None)


def names() -> list[str]:
    """What --target may say."""
    return [one.twofold.name for one in hub.families() if one.twofold]


def plan(source: Checkpoint, family: HubFamily, settings: Settings) -> Made:
    """The model by the class's names. MoetoolError, with the reason, for what it cannot hold."""
    assert family.twofold is not None
    held = _Held(source, family, family.twofold, _group(source))
    held.check()
    build = Builder()
    held.write(build)
    wanted = Outputs(held.config(), build.targets, build.tasks, held.dropped())
    made = reform.plan((source,), wanted, max_shard=settings.max_shard, form="same")
    facts = ModelFacts(
        source_type=groups.MODEL_TYPE,
        target_type=family.twofold.name,
        layers=held.group.layers,
        experts=1,
        top_k=1,
        expert_width=held.at.field("width"),
        layout="two FFNs a layer",
        parameters=made.parameters,
        active_parameters=made.active_parameters,
    )
    return Made(made, held.certificate(), made.config, held.fields(), facts, held.told())


def _group(source: Checkpoint) -> Group:
    """The one group that does something."""
    found = [g for g in text_model(source.config).groups if not bare.adds_nothing(g)]
    if len(found) != 1:
        raise _refused(source, f"it has {len(found)} groups of experts that do something")
    return found[0]


class _Second(NamedTuple):
    """A matrix of a second FFN."""

    layer: int
    linear: str
    stored: Stored


@dataclass(frozen=True)
class _Held:
    """A model whose group of experts is to be second FFNs."""

    source: Checkpoint
    family: HubFamily
    second: Twofold
    group: Group

    @cached_property
    def base(self) -> Checkpoint:
        return bare.base_of(self.source)

    @cached_property
    def at(self) -> TextModel:
        """The base's text model, which alone is written."""
        return text_model(self.base.config)

    @property
    def layout(self) -> Layout:
        return self.at.layout

    @cached_property
    def text(self) -> JsonObject:
        """The text model's config, defaults filled in."""
        return self.at.text

    @cached_property
    def turns(self) -> JsonObject:
        """Rotary settings."""
        return pair.rope(self.layout, self.at.config)

    def check(self) -> None:
        """Refuse what the class cannot hold."""
        if why := next(chain(self._unlike_group(), self._unlike_base()), ""):
            raise _refused(self.source, why)

    def _unlike_group(self) -> Iterator[str]:
        """What of the group the class has not."""
        group, route = self.group, self.group.route
        where = f"group {bare.named(group)}"
        if (group.site, group.tower) != (FIRST_SITE, groups.TEXT):
            yield f"{where} is not at the FFNs of the text model"
        if group.form != "full":
            yield f"{where} holds {group.form} experts, and its second FFN is one in full"
        if route.key != MODALITY or route.law not in bare.ALONE or group.base != "member":
            yield f"{where} is no copy of the FFN that the kind of a token chooses"
        if group.experts != 1 or route.options.get("allowed") != [[1, 0], [0, 1]]:
            yield (
                f"{where} holds {group.experts + 1} experts for {len(route.options['allowed'])} "
                "kinds of tokens, and it has two for two: text has the one, images the other"
            )
        if group.scale != 1.0 or "activation" in group.params:
            yield f"{where} computes otherwise than the FFN"

    def _unlike_base(self) -> Iterator[str]:
        """What of the base the class has not."""
        text, family = self.text, self.layout.model_type
        if family != self.family.family:
            yield f"it is a {self.family.family}, and this model stands on {family}"
            return
        if text.get("hidden_act") not in _SILU:
            yield f"its FFNs compute with silu, and these with {text.get('hidden_act')}"
        if text.get("mlp_bias"):
            yield "its FFNs have no biases"
        heads, hidden = (int(text.get(self.layout.fields[n]) or 0) for n in ("heads", "hidden"))
        wide = self.layout.evaluate("head_dim", text) or 0
        if heads * wide != hidden:
            yield f"its {heads} heads are {hidden} / {heads} wide, and these {wide}"
        kind, more = self.turns.get("rope_type", "default"), set(self.turns) - {"rope_theta"}
        if kind not in _TURNS or more - {"rope_type", "factor"}:
            said = ", ".join(sorted(more - {"rope_type"}))
            yield f"it has no rotary positions of the kind {kind} ({said})"
        quantized = (t for t in self.source.tensors.values() if not forms.lies_plain(t))
        if (one := next(quantized, None)) is not None and one.parts is not None:
            yield f"{one.name} is stored as {one.parts.form}"

    @cached_property
    def tied(self) -> bool:
        """Whether the base has no head of its own; the class is written with a copy."""
        return bool(self.text.get(_TIED, self.base.config.get(_TIED)))

    def write(self, build: Builder) -> None:
        """Plan every tensor: bytes only move."""
        joined, left = dict[str, Target](), self.dropped()
        for name, stored in self.base.tensors.items():
            if name not in left:
                self._one(build, self.at.inner(name) or "", stored, joined)
        for head, embedded in self.layout.tied.items() if self.tied else ():
            self._one(build, head, self.base.tensor(self.at.name(embedded)), joined)
        for layer, linear, stored in self._seconds():
            there = filled(self.second.modules[linear], layer=layer)
            _copy(build, stored, f"{there}.weight")

    def _one(self, build: Builder, name: str, stored: Stored, joined: dict[str, Target]) -> None:
        """A tensor of the base in its place, alone or in a tensor with others."""
        place, height = self.family.place(name), (stored.shape or (0,))[0]
        if place is None:
            raise _refused(self.source, f"it has no place for {name}")
        if not place.joined:
            _copy(build, stored, place.name)
            return
        if place.name not in joined:
            heads = self.family.heads(place.joined, self.text)
            every = height // heads[place.module] * sum(heads.values())
            joined[place.name] = build.target(place.name, stored.dtype, (every, *stored.shape[1:]))
        there = joined[place.name]
        held = self.family.share(place, self.text, there.shape[0])
        for begun in range(0, height, held.rows):
            first = held.first + begun // held.rows * held.step
            piece = rows(stored, begun, begun + held.rows)
            build.copy(piece, rows(there, first, first + held.rows))

    def _seconds(self) -> Iterator[_Second]:
        """Of every second FFN: the layer's own matrix where the group has none."""
        block, held = FfnBlock.of(self.layout), self.group
        for layer in range(int(self.at.field("layers") or 0)):
            for linear in block.linears:
                own = self.at.name(linear.slot.name, layer=layer)
                inside = f"{groups.block_of(own)}.{held.expert(0, linear.name, 'weight')}"
                has = layer in held.layers and held.has(linear.name)
                yield _Second(layer, linear.name, self.source.tensor(inside if has else own))

    def dropped(self) -> dict[str, str]:
        """Tensors that are not taken along, by name with the reason."""
        used = {one.stored.name for one in self._seconds()}
        found = {n: why for n in self.source.tensors if (why := pair.drops(n))}
        found |= bare.dropped(self.source, self._nulls())
        for head in self.layout.tied if self.tied else ():
            found[self.at.name(head)] = "tied to the embeddings by the config"
        for name in self.source.tensors:
            if name in self.base.tensors:
                found |= {} if self.at.match(name) else {name: _BESIDE}
            elif name not in used:
                found.setdefault(name, "the caller says which tokens are of images: no router")
        return {name: why for name, why in found.items() if name in self.source.tensors}

    def _nulls(self) -> list[Group]:
        return [g for g in text_model(self.source.config).groups if bare.adds_nothing(g)]

    def certificate(self) -> Certificate:
        """Exact; of a model with more beside its text model, for what is embedded already."""
        why = "text has the FFN and image tokens have its copy, as the caller's mask says"
        if _BESIDE not in self.dropped().values():
            return Certificate("exact", why)
        return Certificate("exact_if", f"images are embedded by the caller; {why}")

    def config(self) -> JsonObject:
        """As the class reads it."""
        told, own = self.at.config, {v: k for k, v in self.family.rename.items()}
        here = {own.get(name, name): value for name, value in self.text.items()}
        made = {name: here.get(name, usual) for name, usual in self.family.defaults.items()}
        made |= {
            "hidden_act": _SILU[0],
            _TIED: False,
            "rope_theta": self.turns.get("rope_theta"),
            "rope_scaling": None,
        }
        kind = self.turns.get("rope_type", "default")
        if kind != "default":
            made["rope_scaling"] = {"type": kind, "factor": float(self.turns["factor"])}
        made[self.family.blocks] = made[self.family.blocks] or here[self.layout.fields["heads"]]
        head = {"architectures": [self.second.cls], "model_type": self.second.model_type}
        more = {n: v for n, v in told.items() if n not in self.layout.defaults and n not in _OWN}
        said = {n: v for n in _DTYPES if (v := told.get(n, self.base.config.get(n)))}
        said = {_DTYPES[-1]: next(iter(said.values()))} if said else {}
        if len(ids := self._ids()) == 1:
            said[self.second.image] = ids[0]
        return {**head, **made, **more, **said}

    def fields(self) -> dict[str, str]:
        """Fields of the base's config that are not taken along, with the reason."""
        kept = {*self.family.defaults, *self.family.rename.values(), *_ROPE}
        known = (n for n in self.at.config if n in self.layout.defaults)
        return dict.fromkeys((n for n in known if n not in kept), HELD)

    def _ids(self) -> list[int]:
        """The tokens that stand for images."""
        return [*chain.from_iterable(self.group.route.options["ids"])]

    def told(self) -> tuple[str, ...]:
        """What its readers must know."""
        found = [
            "it is a text model: the caller embeds images and says which tokens they are "
            "(visual_token_mask); its own code, LMDeploy and vLLM up to 0.23 read it"
        ]
        if self.tied:
            found.append("its head is a copy of the embeddings, which the class does not tie")
        if self.text.get("attention_bias"):
            found.append("vLLM's class has no biases in attention: it is for its own code alone")
        return tuple(found)


def _copy(build: Builder, stored: Stored, name: str) -> None:
    build.copy(whole(stored), whole(build.target(name, stored.dtype, stored.shape)))


def _refused(source: Checkpoint, why: str) -> MoetoolError:
    return MoetoolError(
        f"the class with a second FFN for image tokens cannot hold this model: {why}",
        file=source.folder,
        expected="one copy of each FFN for image tokens, over a base that computes as it does",
        hint="it runs with `import moetool`, as it is; for text, --target base",
    )
