"""What an output is, as far as clients tell outputs apart: its family, how its experts lie, and
what its config says. Read off the output itself, whatever verb writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import groups
from moetool.surgery.pair import rope
from moetool.surgery.spec import Stored, Target
from moetool.surgery.text_model import TextModel, text_model

RAGGED = "moetool_ragged"  # what a model of moetool's own type is called that has no groups
_SILU = ("silu", "swish", None)
Fact = str | bool


@dataclass(frozen=True)
class Traits:
    """An output. `facts`: the value of everything in FACTS, empty where the family is unknown;
    `fields`: what its text config names; `folder`: where the files lie that travel with it.
    """

    family: str
    facts: dict[str, Fact] = field(default_factory=dict)
    fields: frozenset[str] = frozenset()
    folder: str = ""

    def has_token(self, token: str) -> bool:
        """Whether the tokenizer knows it."""
        files = (Path(self.folder, n) for n in ("tokenizer.json", "added_tokens.json"))
        return any(f'"{token}"' in f.read_text("utf-8", "replace") for f in files if f.is_file())

    def has_file(self, name: str) -> bool:
        """Whether a file of this name travels with it."""
        return Path(self.folder, name).is_file()


class Looked(NamedTuple):
    """What facts are read off."""

    at: TextModel
    text: JsonObject  # defaults filled in
    own: JsonObject  # as the file says it
    lie: str
    turned: bool = False  # stacks of experts lie [experts, in, out]


def traits(
    config: JsonObject,
    names: Iterable[str] | Mapping[str, Stored | Target],
    *,
    folder: str = "",
    container: str = "",
    idle: bool = False,
) -> Traits:
    """Of a config and its tensors; names alone where none are there yet: then they lie as moetool
    writes them. `container`: what kind of file, where it is not safetensors; `idle`: whether every
    routed expert puts out zero, so that routing does not count.
    """
    family = str(config.get("model_type"))
    try:
        at = text_model(config)
    except MoetoolError:
        return Traits(family, folder=folder)
    ours = groups.is_ours(config)
    family = RAGGED if ours and not (at.groups or at.calibration) else family
    own = _inside(config, at.path)
    lie = "own" if container else _lie(at, tuple(names))
    seen = Looked(at, at.text, own, lie, _turned(at, names))
    facts = {name: read(seen) for name, read in _READ.items()}
    facts |= {"container": container or "safetensors", "idle": idle}
    facts["ragged"] = facts["ragged"] and not ours  # whose class has such layers
    return Traits(family, facts, frozenset(own), folder)


def _inside(config: JsonObject, path: Iterable[str]) -> JsonObject:
    for part in path:
        config = config.get(part) or {}
    return config


def _lie(at: TextModel, names: Collection[str]) -> str:
    """none, per-expert, fused (a second form beside per-expert names) or own (the family's only
    one).
    """
    layers = at.moe_layers() if at.layout.kind == "moe" else []
    if not layers:
        return "none"
    single, stacked = at.layout.per_expert(), at.layout.fused()
    if single and _there(at, single["down"], layers[0], names):
        return "per-expert"
    second = single and at.layout.experts.reads_per_expert
    there = stacked and _there(at, stacked["down"], layers[0], names)
    return "fused" if second and there else "own"


def _there(at: TextModel, template: str, layer: int, names: Collection[str]) -> bool:
    """Whether a matrix is there, in whatever parts."""
    stem = at.name(template, layer=layer, expert=0).removesuffix(".weight")
    return any(name.startswith(stem) for name in names)


def _turned(at: TextModel, names: Iterable[str] | Mapping[str, Stored | Target]) -> bool:
    """Whether stacks lie as the Hub's of a family whose files may lie in two ways."""
    slot, hidden = at.layout.role("expert.down"), at.field("hidden")
    if not at.layout.overlay.turns_stacks or slot is None or not isinstance(names, Mapping):
        return at.layout.overlay.turns_stacks
    found = (names.get(at.name(slot.name, layer=layer)) for layer in at.moe_layers())
    shapes = [down.shape[-2:] for down in found if down is not None]
    return any(into != hidden and out == hidden for into, out in shapes)


def _window(seen: Looked) -> bool:
    """Whether some layer looks back less far than the model reaches."""
    width, reach = seen.text.get("sliding_window"), seen.text.get("max_position_embeddings")
    if not width or seen.text.get("use_sliding_window") is False:
        return False
    return not reach or width < reach


def _spelling(seen: Looked) -> str:
    """Whose words the rotary settings are in: old ones, transformers 5's alone, or none."""
    if "rope_theta" in seen.own or "rope_scaling" in seen.own:
        return "old"
    return "new" if "rope_parameters" in seen.own else "none"


def _turns_as_usual(seen: Looked) -> bool:
    """Whether the rotary settings are the class's own defaults."""
    layout, config = seen.at.layout, seen.at.config
    usual = rope(layout, {})
    return not usual or all(usual.get(k) == v for k, v in rope(layout, config).items())


def _odd_head(seen: Looked) -> bool:
    hidden, heads = (seen.at.field(f) for f in ("hidden", "heads"))
    size = seen.at.layout.evaluate("head_dim", seen.text)
    return bool(hidden and heads and size and size * heads != hidden)


def _grouped(seen: Looked) -> bool:
    heads, kv_heads = (seen.at.field(f) for f in ("heads", "kv_heads"))
    return bool(kv_heads) and heads != kv_heads


def _dense_layers(seen: Looked) -> bool:
    return seen.lie != "none" and len(seen.at.moe_layers()) < (seen.at.field("layers") or 0)


def _without_shared(seen: Looked) -> bool:
    """Whether the family's count of shared experts is zero."""
    shared = seen.at.layout.overlay.shared
    return bool(shared and shared.count and not seen.text.get(shared.count))


def _renormalised(seen: Looked) -> bool:
    """Whether the weights of the chosen experts are made to sum to one, as the config says."""
    top_k, experts = (seen.at.field(f) for f in ("top_k", "experts"))
    return bool(seen.at.field("renorm")) and (top_k or 0) < (experts or 0)


def _ragged(seen: Looked) -> bool:
    """Whether layers have numbers of experts of their own."""
    own = seen.text.get("per_layer_config")
    layers = own.values() if isinstance(own, Mapping) else ()
    return any(seen.at.layout.fields.get("experts") in layer for layer in layers)


_READ: dict[str, Callable[[Looked], Fact]] = {
    "layout": lambda s: s.lie,
    "turned": lambda s: s.turned,
    "silu": lambda s: s.text.get("hidden_act", s.text.get("hidden_activation")) in _SILU,
    "window": _window,
    "rope": lambda s: str(rope(s.at.layout, s.at.config).get("rope_type", "default")),
    "rope_spelling": _spelling,
    "usual_rope": _turns_as_usual,
    "odd_head": _odd_head,
    "grouped": _grouped,
    "tied": lambda s: bool(s.text.get("tie_word_embeddings")),
    "renormalised": _renormalised,
    "single": lambda s: s.at.field("top_k") == 1,
    "without_shared": _without_shared,
    "qkv_bias": lambda s: s.text.get("qkv_bias") is not False,
    "dense_layers": _dense_layers,
    "ragged": _ragged,
}
FACTS = (*_READ, "container", "idle")
_WORDS: dict[tuple[str, Fact], str] = {
    ("layout", "fused"): "stacked experts",
    ("turned", False): "stacked experts as transformers 5 saves them, [experts, out, in]",
    ("silu", False): "an activation other than SiLU",
    ("window", True): "a sliding window",
    ("rope_spelling", "new"): "rope_parameters alone in the config",
    ("usual_rope", False): "a rope that is not the family's usual one",
    ("odd_head", True): "head_dim other than hidden_size / heads",
    ("grouped", True): "grouped heads",
    ("tied", True): "a tied head",
    ("renormalised", True): "norm_topk_prob",
    ("single", True): "one expert a token",
    ("without_shared", True): "no shared expert",
    ("qkv_bias", False): "no biases of q, k and v",
    ("dense_layers", True): "layers without experts",
    ("ragged", True): "layers of different numbers of experts",
    ("idle", True): "routed experts that put out zero",
}


def words(name: str, values: Iterable[Fact]) -> str:
    """A fact of these values, for people; empty where it need not be said."""
    if name == "rope":
        return f"{' or '.join(map(str, values))} rope"
    return _WORDS.get((name, next(iter(values))), "")
