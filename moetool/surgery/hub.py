"""Families whose class lies on the Hub, beside their weights, and computes what a class of
transformers does: their checkpoints are read as that family's (archs/hub/, one strict file each).
None of their code is run.

A module there is one of the family's under another name, or some of it joined: for each block (a
key/value head) the rows of each, one after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import groups
from moetool.surgery.family import filled
from moetool.surgery.forms import Known
from moetool.surgery.groups import Group
from moetool.surgery.layout import DATA, Layout
from moetool.surgery.route import MODALITY, Route
from moetool.surgery.spec import InParts, Stored

FORM = "in_rows"
_REMADE = ("architectures", "model_type", "auto_map")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Twofold:
    """The class with a second FFN in each layer, for image tokens. `name`: what it is called here;
    `modules`: where each linear of that FFN lies; `image`: the field with the id of image tokens.
    """

    name: str
    cls: str
    model_type: str
    modules: dict[str, str]
    image: str

    def group(self, config: JsonObject, layers: int) -> Group:
        """The second FFNs as experts: text has the layer's own, image tokens the other."""
        said = config.get(self.image)
        ids = [said] if isinstance(said, int) else []
        options = {"allowed": [[1, 0], [0, 1]], "ids": [ids]}
        route = Route(MODALITY, "hard", options=options)
        return Group("full", 1, tuple(range(layers)), base="member", route=route)


class HubPlace(NamedTuple):
    """Where a tensor of the family lies: its name in files of the class, the family's module, and
    the module that it shares with others (empty: it has its own); both as templates.
    """

    name: str
    module: str
    joined: str


@dataclass(frozen=True)
class JoinedRows:
    """Rows of a joined tensor that are one module's: `rows` from `first` on, then every `step`."""

    first: int
    rows: int
    step: int

    def as_params(self) -> JsonObject:
        return {"first": self.first, "rows": self.rows, "step": self.step}


@dataclass(frozen=True)
class Wrapped:
    """A class of the Hub with such a model inside: the part of its config, the prefix of names."""

    config: str
    prefix: str


@dataclass(frozen=True)
class HubFamily:
    """One file of archs/hub/. `family`: whose class it computes like; `defaults`: what its own
    class takes for fields that a config leaves out; `rename` and `drop`: of those fields;
    `modules`: the family's name of a module -> its name there; `joined`: name there -> the family's
    modules in it, each with the field that counts its heads; `blocks`: the field that counts
    blocks; `around`: model types of classes with such a model inside.
    """

    model_types: tuple[str, ...]
    cls: str
    family: str
    defaults: JsonObject
    rename: dict[str, str]
    drop: dict[str, str]
    modules: dict[str, str]
    joined: dict[str, dict[str, str]]
    blocks: str
    around: dict[str, Wrapped]
    twofold: Twofold | None = None

    @classmethod
    def read(cls, path: Path) -> HubFamily:
        """From a file; MoetoolError for an unknown key, in nested parts too."""
        data = json.loads(path.read_text())
        try:
            second = data.pop("twofold", None)
            types = tuple(data.pop("model_types"))
            around = {name: Wrapped(**where) for name, where in data.pop("around", {}).items()}
            made = Twofold(**second) if second else None
            return cls(types, **data, around=around, twofold=made)
        except (KeyError, TypeError) as problem:
            raise MoetoolError(
                f"a family of the Hub is not well formed: {problem}",
                file=path,
                hint="correct the file",
            ) from None

    def is_twofold(self, config: JsonObject) -> bool:
        """Whether a config is of the class with a second FFN. MoetoolError for a class that is
        neither.
        """
        second = self.twofold
        classes = [self.cls, *([second.cls] if second else [])]
        named = config.get("architectures") or []
        if isinstance(named, list) and named and named[0] not in classes:
            raise MoetoolError(
                f"this model is of a class that moetool does not know: {named[0]}",
                file="config.json",
                expected=" or ".join(classes),
                hint="its other heads are no matter of a language model",
            )
        if second is None:
            return False
        said, known = (named[0], second.cls) if named else (config["model_type"], second.model_type)
        return bool(said == known)

    def config(self, config: JsonObject) -> JsonObject:
        """As the family's own class has it."""
        said = {**self.defaults, **config}
        left = (*_REMADE, *self.drop)
        kept = {self.rename.get(n, n): v for n, v in said.items() if n not in left}
        layout = Layout.load(self.family)
        made = {"architectures": [layout.cls], "model_type": self.family} | kept
        if not self.is_twofold(config) or self.twofold is None:
            return made
        layers = layout.field("layers", made)
        return groups.config_of(made, (self.twofold.group(config, layers),))

    def heads(self, joined: str, config: JsonObject) -> dict[str, int]:
        """How many heads of each module lie in a joined tensor, each a multiple of the blocks, by
        a config of the family's or the class's own. MoetoolError where they are no numbers.
        """
        said = {**self.defaults, **config}
        most = Layout.load(self.family).fields["heads"]  # counts those that are left out
        blocks = said.get(self.blocks) or said.get(most)
        found: dict[str, int] = {}
        for module, counted in self.joined[joined].items():
            heads = said.get(counted) or said.get(most)
            if type(heads) is not int or type(blocks) is not int or blocks < 1 or heads % blocks:
                raise _unfit(joined, f"heads in {self.blocks} blocks", [heads, blocks])
            found[module] = heads
        return found

    def share(self, place: HubPlace, config: JsonObject, rows: int) -> JoinedRows:
        """Which of the `rows` of a joined tensor are a module's. MoetoolError where they cannot be
        parted as the config says.
        """
        heads = self.heads(place.joined, config)
        every, blocks = sum(heads.values()), {**self.defaults, **config}.get(self.blocks)
        blocks = blocks or heads[next(iter(heads))]
        if not rows or rows % every:
            raise _unfit(place.joined, f"a multiple of {every} rows", rows)
        wide, names = rows // every, list(heads)
        before = sum(heads[name] for name in names[: names.index(place.module)])
        return JoinedRows(
            before // blocks * wide, heads[place.module] // blocks * wide, every // blocks * wide
        )

    def place(self, name: str) -> HubPlace | None:
        """Where a tensor of the family lies in files of the class; None for one without a place."""
        module, _, part = name.rpartition(".")
        number = next(iter(_NUMBER.findall(f"{module}.")), None)
        template = _NUMBER.sub("{layer}", f"{module}.").removesuffix(".")
        joined = next((j for j, modules in self.joined.items() if template in modules), "")
        there = joined or self.modules.get(template)
        if there is None:
            return None
        layer = None if number is None else int(number)
        return HubPlace(f"{filled(there, layer=layer)}.{part}", template, joined)

    @cached_property
    def _theirs(self) -> dict[str, str]:
        """Name there, with `#` for each number, -> the family's."""
        second = self.twofold.modules if self.twofold else {}
        base = Layout.load(self.family)
        slot = base.role("ffn.down")
        block = groups.block_of(slot.name) if slot else ""
        own = {f"{block}.{groups.FIRST}.0.{linear}": there for linear, there in second.items()}
        return {there.replace("{layer}", "#"): name for name, there in (self.modules | own).items()}

    def matrices(self, stored: Stored, config: JsonObject, prefix: str = "") -> Iterator[Stored]:
        """What a tensor of a file is to the family; itself where nothing is known of its name."""
        module, _, part = stored.name.removeprefix(prefix).rpartition(".")
        number = next(iter(_NUMBER.findall(f"{module}.")), None)
        layer = None if number is None else int(number)
        joined = _NUMBER.sub("{layer}", f"{module}.").removesuffix(".")
        if joined in self.joined:
            for name in self.joined[joined]:
                share = self.share(HubPlace("", name, joined), config, (stored.shape or (0,))[0])
                blocks = stored.shape[0] // share.step
                shape = (blocks * share.rows, *stored.shape[1:])
                params = share.as_params()
                yield _held(stored, f"{filled(name, layer=layer)}.{part}", shape, params)
            return
        own = self._theirs.get(joined.replace("{layer}", "#"))
        name = f"{filled(own, layer=layer)}.{part}" if own else stored.name
        yield stored if name == stored.name else _held(stored, name, stored.shape, {})


def _held(stored: Stored, name: str, shape: tuple[int, ...], params: JsonObject) -> Stored:
    return replace(stored, name=name, shape=shape, parts=InParts(FORM, (stored,), params))


@lru_cache(maxsize=1)
def families() -> tuple[HubFamily, ...]:
    """Every one there is data for, in name order."""
    return tuple(map(HubFamily.read, sorted((DATA / "hub").glob("*.json"))))


def family(model_type: object) -> HubFamily | None:
    """The one with this model type; None where a class of transformers has it, or nobody."""
    return next((one for one in families() if model_type in one.model_types), None)


class HubModel(NamedTuple):
    """A model of one of these families: its own config, and what stands before its names."""

    family: HubFamily
    config: JsonObject
    prefix: str = ""


def find(config: JsonObject) -> HubModel | None:
    """The model that a config is of, or that is inside it; None where there is none."""
    model_type = config.get("model_type")
    if (own := family(model_type)) is not None:
        return HubModel(own, config)
    for one in families():
        where = one.around.get(str(model_type))
        inner = config.get(where.config) if where else None
        if where and isinstance(inner, dict) and inner.get("model_type") in one.model_types:
            outer: JsonObject = {n: config[n] for n in ("dtype", "torch_dtype") if n in config}
            return HubModel(one, outer | inner, where.prefix)
    return None


def seen(known: Known) -> Known:
    """A checkpoint as the family that it computes like has it; any other as it is. Where it is
    inside another model, the tensors of this keep their names. MoetoolError for one that is
    quantized.
    """
    at = find(known.config)
    if at is None:
        return known
    found, config = at.family, at.config
    if known.told:
        raise MoetoolError(
            f"a quantized {found.cls} is not read: its matrices lie joined",
            expected="float weights",
            found=", ".join(known.told),
            hint=f"take the original, or quantize what moetool makes of it (a {found.family})",
        )
    made: dict[str, Stored] = {}
    left: list[str] = []
    for name, stored in known.tensors.items():
        if name.startswith(at.prefix):
            made |= {one.name: one for one in found.matrices(stored, config, at.prefix)}
        else:
            made[name] = stored
            left.append(name)
    second = found.twofold if found.is_twofold(config) else None
    cls = second.cls if second else found.cls
    return Known(made, found.config(config), {FORM: {"cls": cls, "left": left}})


def _unfit(joined: str, expected: str, found: object) -> MoetoolError:
    return MoetoolError(
        "a tensor that holds several matrices does not fit the config",
        tensor=joined,
        expected=expected,
        found=found,
        hint="config.json and weights are not of the same model",
    )
