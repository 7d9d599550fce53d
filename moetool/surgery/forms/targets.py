"""Which modules a group of compressed-tensors' config means, by that library's own rules, and the
patterns that say it of ours.

Facts: compressed_tensors/utils/match.py and quantization/lifecycle/apply.py 0.20. What is ignored
belongs to no group; names come before patterns, patterns before classes; of several patterns the
first in the order of their text. transformers 5.24 (integrations/compressed_tensors.py) takes for
all experts the first group with a pattern that speaks of experts, else the first of a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError

LINEAR = "Linear"
_CLASSES = (LINEAR, "Module")  # of which a linear is, to the library
EXPERTS = r"re:.*\.experts(\..*)?$"
_HEAD = "lm_head"  # a tied head lies in no file, and is a linear all the same
_Opened = tuple[str, ...]  # a module's name, `#` for its numbers


@dataclass(frozen=True)
class ConfigGroups:
    """The config groups of a file, as a loader looks them up."""

    groups: tuple[JsonObject, ...]
    ignored: tuple[str, ...]
    targets: Mapping[str, JsonObject]

    @classmethod
    def of(cls, said: JsonObject) -> ConfigGroups:
        """Those of a `quantization_config`."""
        groups = tuple(g for g in (said.get("config_groups") or {}).values() if isinstance(g, dict))
        targets: dict[str, JsonObject] = {}
        for group in groups:
            targets |= dict.fromkeys(group.get("targets") or (), group)
        order = sorted(targets, key=lambda t: ("re:" in t, t))
        return cls(groups, tuple(said.get("ignore") or ()), {t: targets[t] for t in order})

    def find(self, module: str) -> JsonObject | None:
        """The group that a linear belongs to. Where only one is there, and no target means this
        module, it is that one: loaders know some modules by other names than files do.
        """
        if any(matches(i, module) for i in self.ignored):
            return None
        named = next((g for t, g in self.targets.items() if matches(t, module)), None)
        if named is None:
            named = next((g for t, g in self.targets.items() if t in _CLASSES), None)
        return self.groups[0] if named is None and len(self.groups) == 1 else named

    def means(self, module: str) -> bool:
        """Whether a loader would look for a packed matrix here."""
        return not any(matches(i, module) for i in self.ignored) and any(
            t in _CLASSES or matches(t, module) for t in self.targets
        )


def check(said: JsonObject) -> None:
    """MoetoolError naming the field of a `quantization_config` that cannot be what it is."""
    groups = _field("config_groups", said.get("config_groups"), dict) or {}
    _field("ignore", said.get("ignore"), list, str)
    for name, group in groups.items():
        here = f"config_groups.{name}"
        _field(here, group, dict)
        _field(f"{here}.targets", group.get("targets"), list, str)
        _field(f"{here}.input_activations", group.get("input_activations"), dict)
        weights = _field(f"{here}.weights", group.get("weights"), dict) or {}
        for key in ("num_bits", "group_size"):
            _field(f"{here}.weights.{key}", weights.get(key), int)


_KINDS = {dict: "an object", list: "a list", int: "a whole number", str: "text"}


def _field(name: str, value: Any, kind: type, each: type | None = None) -> Any:
    """The value, which is of this kind, or null; `each`: what a list holds."""
    strange = value is not None and type(value) is not kind
    if strange or (each is not None and any(type(v) is not each for v in value or ())):
        raise MoetoolError(
            "a field of the config cannot be what it is",
            field=f"quantization_config.{name}",
            expected=_KINDS[kind] + (f" of {_KINDS[each]}" if each else "") + ", or null",
            found=repr(value)[:80],
            hint="restore the config.json that came with the model",
        )
    return value


def matches(target: str, module: str) -> bool:
    """Whether a target (a name, or `re:` and a pattern) means a module."""
    if target.startswith("re:"):
        return _compiled(target[3:]).match(module) is not None
    return target == module


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as problem:
        raise MoetoolError(
            f"a target in quantization_config is no pattern: {problem}",
            found=pattern[:200],
            hint="correct config.json",
        ) from None


def chosen(groups: Sequence[Sequence[str]], full: Sequence[str]) -> list[list[str]]:
    """Targets for each group of modules, where no target may mean one of another group or one that
    is full. A single group is every linear; with several, the experts are told by one pattern, and
    the group with the most other modules is every linear that no pattern means.
    """
    if len(groups) == 1:
        return [[LINEAR]]
    made: list[list[str]] = []
    others = [[m for m in g if not matches(EXPERTS, m)] for g in groups]
    most = max(range(len(groups)), key=lambda i: len(others[i]))
    for i, group in enumerate(groups):
        beside = [*chain.from_iterable(g for j, g in enumerate(groups) if j != i), *full]
        targets, rest = [], others[i]
        if len(rest) < len(group):
            if any(matches(EXPERTS, m) for m in beside):
                experts = [m for m in group if matches(EXPERTS, m)]
                targets = patterns(experts, beside)
            else:
                targets = [EXPERTS]
        if rest:
            targets += [LINEAR] if i == most else patterns(rest, beside)
        made.append(targets)
    return made


def ignore(full: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """What is to be left alone: the full linears, and the output embedding even where it lies in no
    file.
    """
    made = patterns(full, quantized, least=1)
    known = {*quantized, *full}
    return made if _HEAD in known else [_HEAD, *made]


def _ends(name: _Opened) -> Iterator[_Opened]:
    """The last words of a name: one, two, ... all."""
    return (name[-n:] for n in range(1, len(name) + 1))


def patterns(modules: Iterable[str], others: Iterable[str], least: int = 2) -> list[str]:
    """Patterns that mean these modules and none of the others: the shortest ends of their names, of
    at least so many words, with numbers left open where they can be.
    """
    taken = {_opened(m) for m in others}
    ends = set(chain.from_iterable(map(_ends, taken)))
    wanted: dict[_Opened, list[str]] = {}
    for module in modules:
        wanted.setdefault(_opened(module), []).append(module)
    found: dict[str, None] = {}
    for name, meant in wanted.items():
        if name in taken:
            found |= dict.fromkeys(_numbered(name, meant, others))
            continue
        some = range(min(least, len(name)), len(name) + 1)
        end = next(name[-n:] for n in some if name[-n:] not in ends and name[-n] != "#")
        found[_said(end, len(end) < len(name))] = None
    return sorted(found)


def _opened(module: str) -> _Opened:
    return tuple("#" if word.isdigit() else word for word in module.split("."))


def _said(words: _Opened, inner: bool) -> str:
    if not inner and "#" not in words:
        return ".".join(words)
    text = r"\.".join(r"\d+" if w == "#" else re.escape(w) for w in words)
    return f"re:.*\\.{text}$" if inner else f"re:^{text}$"


def _numbered(name: _Opened, meant: Sequence[str], others: Iterable[str]) -> list[str]:
    """Where only numbers tell modules from others: those of the layers; the names themselves where
    a layer holds both.
    """
    at = name.index("#") if "#" in name else len(name)
    layers = {m.split(".")[at] for m in meant} if "#" in name else set()
    both = any(_opened(o) == name and o.split(".")[at] in layers for o in others)
    if both or not layers:
        return sorted(meant)
    words = [r"\d+" if w == "#" else re.escape(w) for w in name]
    words[at] = f"({'|'.join(sorted(layers, key=int))})"
    return ["re:^" + r"\.".join(words) + "$"]
