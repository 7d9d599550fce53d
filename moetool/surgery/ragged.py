"""Layers with numbers of experts of their own, as a config says them.

    "model_type": "moetool", "base_model_type": "qwen3_moe", "num_experts": 16,
    "per_layer_config": {"03": {"num_experts": 8}}, "moetool": {"version": 1, "ragged": true}

The key is the one that transformers has for settings of a layer; its classes build every layer
alike all the same, so such a model is of moetool's own type (modeling/ragged.py builds it). Layers
that are not named hold as many experts as the config says. A token that reaches more experts than a
layer holds gets all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moetool.data import JsonMapping, JsonObject
from moetool.errors import MoetoolError, did_you_mean

KEY = "per_layer_config"
ACCESS = "allow_global_per_layer_attribute_access"  # stock classes read the count of the config
MOST = 1 << 15


def overrides(text: JsonMapping, layer: int) -> JsonObject:
    """What a layer has of its own; nothing where the config says nothing of it."""
    said = text.get(KEY)
    if not isinstance(said, Mapping):
        return {}
    own = (v for k, v in said.items() if str(k).isdigit() and int(k) == layer)
    return {**next(own, {})}


def fields(counts: Mapping[int, int], most: int, name: str) -> JsonObject:
    """The config fields of layers with these counts, where the config says `most`; `name`: the
    field that counts experts.
    """
    own = {n: count for n, count in sorted(counts.items()) if count != most}
    digits = len(str(max(own, default=0)))
    said = {str(n).zfill(digits): {name: count} for n, count in own.items()}
    return {KEY: said, ACCESS: True}


def without(config: JsonObject, path: Sequence[str]) -> JsonObject:
    """The whole config of a model whose layers are alike; `path`: to its text part."""
    if not path:
        return {k: v for k, v in config.items() if k not in (KEY, ACCESS)}
    inner = config.get(path[0])
    return config | ({path[0]: without(inner, path[1:])} if isinstance(inner, dict) else {})


def read(text: JsonMapping, layers: Collection[int], names: Sequence[str]) -> dict[int, int]:
    """{layer: experts} of the layers that have a number of their own, of those that hold experts;
    `names`: the field that counts them and its other spellings, none for a family without experts.
    MoetoolError for a layer that holds none, another field, and a count that is none.
    """
    said, found = text.get(KEY), dict[int, int]()
    if not names:
        raise _wrong("numbers of experts by layer, of a family that has none", "none", said)
    if not isinstance(said, Mapping):
        raise _wrong("no numbers of experts by layer", f"layers with {names[0]} of their own", said)
    for key, values in said.items():
        number = int(key) if str(key).isdigit() and str(key).isascii() and len(key) < 10 else -1
        if number not in layers or number in found:
            raise _wrong(f"no layer {key!r} with experts, or twice", f"of {sorted(layers)}", key)
        if not isinstance(values, Mapping) or not values:
            raise _wrong(f"layer {key} says no number of experts", f"{names[0]}: a number", values)
        found[number] = _count(values, key, names)
    return found


def _count(values: JsonMapping, key: str, names: Sequence[str]) -> int:
    for name, count in values.items():
        if name not in names:
            hint = did_you_mean(str(name), list(names))
            raise _wrong(f"layer {key} has the unknown key {name!r}", ", ".join(names), name, hint)
        if type(count) is not int or not 1 <= count <= MOST:
            raise _wrong(f"`{name}` of layer {key}", "a number of experts, from 1", count)
    if len(set(values.values())) > 1:
        raise _wrong(f"layer {key} says two numbers of experts", "one", dict(values))
    found: int = next(iter(values.values()))
    return found


def _wrong(what: str, expected: str, found: object, hint: str = "") -> MoetoolError:
    return MoetoolError(
        what,
        file="config.json",
        field=KEY,
        expected=expected,
        found=str(found)[:200],
        hint=hint or "the config was written by another moetool, or edited",
    )
