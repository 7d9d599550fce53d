"""The parts of a family's data, each strict: a key that is no field here is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields

from moetool.data import JsonObject
from moetool.surgery import sites
from moetool.surgery.sites import Sites

# a number of a name, open or said: a part of its own, or of expert_7 (Switch, NLLB)
_NUMBERS = re.compile(r"\{\w+\}|(?:(?<=\.)|(?<=\.expert_)|^)\d+(?=\.|$)")
MAY = "may"  # of a slot outside layers: not every class of the family has it


@dataclass(frozen=True)
class Slot:
    """One kind of tensor. In its name `{layer}` is a number of the text model's stack, `{expert}`
    an expert's, `{i0}` any other. `layers`: all | moe | dense | some (or None outside layers, MAY
    where it need not be there);
    `when`: only with this config.
    """

    name: str
    shape: list[str | None] | None
    role: str | None = None
    layers: str | None = None
    when: str | None = None

    def named(self, **numbers: int | None) -> str:
        """The tensor's name with these numbers in it: `layer=3, expert=7`."""
        return filled(self.name, **numbers)

    @property
    def pattern(self) -> tuple[str, list[str]]:
        """The name with `#` for each number, and what those number: `=1` for one that is said."""
        found = [one.strip("{}") for one in _NUMBERS.findall(self.name)]
        return _NUMBERS.sub("#", self.name), [f"={n}" if n.isdigit() else n for n in found]


@dataclass(frozen=True)
class GroupSlot(Slot):
    """A tensor of groups of experts (surgery/groups.py), in the layers that `held` names, each with
    the number of experts that have it there. `owner`: what one group's have in common, the template
    of their module; `reached`: how many of them work on a token.
    """

    held: Mapping[int, int] = field(default_factory=dict)
    owner: str = ""
    reached: int = 0


def filled(template: str, **numbers: int | None) -> str:
    """A template with numbers in it; those that are not given stay open."""
    for key, number in numbers.items():
        template = template.replace(f"{{{key}}}", str(number))
    return template


@dataclass(frozen=True)
class RouterLaw:
    """How a router's logits become experts and weights (read by surgery/experts.py, written out
    in kernels/moe.py).

    `score`: softmax, sigmoid, ...; `renorm`: always | never | field (as the config says);
    `groups`: true (the best two of a group count), "max" (its best one) or "zero" (ineligible
    scores become zero); `bias`: choice | logit; `zero`: the field that counts zero experts;
    `least_sum`: the field with the least divisor; `act`: an activation that is no config's word;
    `total`: what the weights of a token sum to; `near`: the field with half of how far below the
    best an expert still shares in its weight.
    """

    score: str = ""
    renorm: str = "never"
    groups: bool | str = False
    bias: str = "choice"
    zero: str = ""
    least_sum: str = ""
    act: str = ""
    total: float = 1.0
    near: str = ""

    def as_json(self) -> JsonObject:
        """What is said of this family: fields that are not the usual ones."""
        usual = {f.name: f.default for f in fields(self)}
        said = {name: getattr(self, name) for name in usual}
        always = ("score", "renorm") if self.score else ()
        return {n: v for n, v in said.items() if n in always or v != usual[n]}


@dataclass(frozen=True)
class SharedExpert:
    """The always-on expert of a family. `width` or `count`: the field that says how wide it is or
    how many experts wide; `gated`: behind a sigmoid; `always`: its tensors must be there; `idle`:
    how narrow it may be where it is not wished (with `count`: in experts).
    """

    width: str = ""
    count: str = ""
    gated: bool = False
    always: bool = False
    idle: int = 0


@dataclass(frozen=True)
class StackedExperts:
    """The experts as transformers' class holds them. `block`: the module of a layer with router
    and experts; `stacked`: role -> template of parameters that hold all experts of a layer, which
    is also the stacked form on disk; `reads_per_expert`: whether a tensor an expert is read too.
    """

    block: str | None = None
    stacked: dict[str, str] = field(default_factory=dict)
    reads_per_expert: bool = False
    is_transposed: bool | None = None
    is_concatenated: bool | None = None
    has_gate: bool | None = None


@dataclass(frozen=True)
class Bare:
    """A family's class without a head. `prefix`: what its names lack of those with one; `more`:
    tensors that it alone has.
    """

    cls: str
    prefix: str
    more: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tower:
    """A stack of layers whose FFN is not where the text model's roles say: an encoder, a vision
    tower, layers whose FFN lies in no module of its own. `stack`: the module of transformers' class
    that holds them; `config`: the part of the config that its `fields` (layers, hidden) are in, two
    names where the class takes the second one's value for the first; `stem`: what stands before a
    layer's number in names on disk; `inside`, `block`: the FFN's module inside a layer, in the
    class and on disk (empty: the layer itself); `linears`: role -> the path of each in that module,
    and in the layer on disk, and what an expert's is called there, where the class has another
    word; `rows`: role -> which of how many runs of rows it is, where one tensor on disk holds
    several; `steps`: what runs before the last linear, where no module runs all; `when`: only with
    this config. A stem without a dot at its end is one module, with no layers.
    """

    name: str
    stack: str
    config: str
    fields: dict[str, str]
    stem: str
    inside: str
    block: str
    linears: dict[str, list[str]]
    steps: list[str]
    when: str | None = None
    rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        """Whether it is one module: names say no layer, which is number 0."""
        return not self.stem.endswith(".")


@dataclass(frozen=True)
class Overlay:
    """What transformers cannot tell about a family (archs/overlay.json). `fixed`: config fields
    that a conversion sets; `gate_up`: how the two lie in one tensor; `turns_stacks`: whether files
    on the Hub hold stacked experts as [experts, in, out], the other way round than transformers 5
    saves them; it reads both, told apart by their shape; `returns_logits`: whether the block's
    forward gives (output, router logits); `adjusts_width`: the config's flag under which
    the class computes the width of an FFN from more than its field; `linears`: transposed where
    the class's linears are Conv1D, whose weights are [in, out]; `adds_residual`: whether the FFN's
    forward takes the residual and adds it; `said`: config fields that transformers 5 leaves out and
    other readers ask for; `derived`: such fields as formulas over others; `ropes`: kinds of layers
    with rotary settings of their own -> the older name of their base; the first's is scaled too.
    """

    law: RouterLaw = field(default_factory=RouterLaw)
    sites: Sites = field(default_factory=Sites)
    shared: SharedExpert | None = None
    fixed: JsonObject = field(default_factory=dict)
    gate_up: str = "concatenated"
    turns_stacks: bool = False
    returns_logits: bool = False
    adjusts_width: str = ""
    linears: str = ""
    adds_residual: bool = False
    said: JsonObject = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    ropes: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def read(cls, data: JsonObject) -> Overlay:
        """From a family's entry; TypeError for an unknown key, in nested parts too."""
        rest = dict(data)
        law, shared = RouterLaw(**rest.pop("law", {})), rest.pop("shared", None)
        return cls(
            law=law,
            sites=sites.read(rest.pop("sites", None)),
            shared=None if shared is None else SharedExpert(**shared),
            **rest,
        )


@dataclass(frozen=True)
class Names:
    """Words in tensor names that hold for every family (archs/names.json). `dead`: ends of old
    buffers that no class reads; `mtp`: heads of layers that predict more tokens and lie outside
    the stack; `first`: what comes before the layers, such as embeddings; `tables`: parts of names
    of embeddings inside layers; `images`: config fields that name the token of an image; `older`:
    what files on the Hub have before names of a tower -> what transformers has today.
    """

    dead: tuple[str, ...]
    mtp: tuple[str, ...]
    first: tuple[str, ...]
    tables: tuple[str, ...]
    images: tuple[str, ...]
    older: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Names:
        """From the file's text; TypeError for an unknown key."""
        data = json.loads(text)
        older = data.pop("older", {})
        return cls(**{k: tuple(v) for k, v in data.items()}, older=older)

    def older_of(self, stem: str, names: Collection[str]) -> tuple[str, str]:
        """What names of a stack have before them in a file, and have today; nothing where these
        are the same.
        """
        for there, today in self.older.items():
            found = there + stem.removeprefix(today)
            if stem.startswith(today) and any(name.startswith(found) for name in names):
                return there, today
        return "", ""

    def is_dead(self, name: str) -> bool:
        """Whether a tensor holds nothing that a model reads."""
        return name.endswith(self.dead)

    def is_table(self, name: str) -> bool:
        """Whether a tensor of a layer is looked up, not multiplied with."""
        return any(word in name for word in self.tables)

    def is_first(self, name: str) -> bool:
        """Whether a tensor outside the layers comes before them."""
        return any(word in name for word in self.first)

    def images_of(self, config: JsonObject) -> list[int]:
        """Tokens that stand for an image in the text of a model of this config."""
        return [config[n] for n in self.images if isinstance(config.get(n), int)]

    def in_mtp(self, name: str) -> str | None:
        """`0.mlp.gate.weight` of an MTP layer's tensor; None for any other."""
        for head in self.mtp:
            if name.startswith(head) and name.removeprefix(head).partition(".")[0].isdigit():
                return name.removeprefix(head)
        return None
