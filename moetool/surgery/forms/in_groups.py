"""What the forms share that only experts of groups have (surgery/groups.py): their parts are found
by the groups that the config names, not by a quantization config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from moetool.errors import MoetoolError
from moetool.surgery import groups, places, strict
from moetool.surgery.ffn import FfnLinear
from moetool.surgery.forms.form import Config, Form, Params, Recognised, Written, made_of
from moetool.surgery.groups import Group
from moetool.surgery.spec import InParts, Stored, Target, run_of
from moetool.surgery.text_model import TextModel, text_model

INCOMPLETE = "the checkpoint is incomplete: download or make it again"


@dataclass(frozen=True)
class Site:
    """One linear of one expert: where its parts and the FFN's own linear lie in the file."""

    group: Group
    linear: FfnLinear
    stem: str  # model.layers.3.mlp.experts.7.gate_proj
    base: str  # model.layers.3.mlp.gate_proj.weight

    @property
    def full(self) -> str:
        """The name of the whole matrix."""
        return f"{self.stem}.weight"

    def under(self, tensors: Mapping[str, Stored]) -> Stored | None:
        """The FFN's own matrix, where the layer has it."""
        found, rows = tensors.get(self.base), self.linear.rows
        return found if found is None or rows is None else run_of(found, *rows)


def sites(at: TextModel, form: str) -> Iterator[Site]:
    """Every linear of the experts in a form, in the order of their names."""
    for group in at.groups:
        if group.form != form:
            continue
        here = at.of(group)
        for block, layer in product(places.named(group.site).of(here.layout, group), group.layers):
            module = here.name(block.module, layer=layer)
            for expert in range(group.experts):
                for linear in filter(lambda one: group.has(one.name), block.linears):
                    stem = f"{module}.{group.expert(expert, linear.lies)}"
                    yield Site(group, linear, stem, here.name(linear.slot.name, layer=layer))


class InGroups(Form):
    """Subclass it: say with `parts_of` what one matrix lies in. `must` and `may`: what a group's
    params say, with the kind of each.
    """

    in_groups: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    must: ClassVar[Mapping[str, type]] = {}
    may: ClassVar[Mapping[str, type]] = {}

    def parts_of(self, tensors: Mapping[str, Stored], site: Site) -> InParts:
        """The stored parts of one linear of one expert; MoetoolError where they do not fit."""
        raise NotImplementedError

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        if not groups.is_ours(config):
            return None
        found: dict[str, Stored] = {}
        kept: set[str] = set()
        at = text_model(config)
        for group in at.groups:
            if group.form == self.name:
                self.check(group.params)
        for site in sites(at, self.name):
            parts = self.parts_of(tensors, site)
            base = site.under(tensors)
            kept.add(site.base)
            like = base or parts.tensors[0]
            shape = self.shape(parts, base)
            found[site.full] = made_of(self.name, site.full, like.dtype, shape, parts)
        return Recognised(found, config, kept=frozenset(kept)) if found else None

    def check(self, params: Params) -> None:
        """Refuse params that a group of this form cannot have."""
        strict.check(params, self.must, self.may, f"params of {self.name} experts")

    def shape(self, parts: InParts, base: Stored | None) -> tuple[int, ...]:
        """Of the whole matrix."""
        raise NotImplementedError

    def fits(self, target: Target, params: Params) -> bool:
        """No matrix of another plan is written so: what groups there are, a config says."""
        return False

    def config(self, config: Config, told: Config, written: Written) -> Config:
        return config


def part(tensors: Mapping[str, Stored], site: Site, name: str) -> Stored:
    """A part of a matrix; MoetoolError where it is not there."""
    found = tensors.get(f"{site.stem}.{name}")
    if found is None:
        raise MoetoolError(
            f"an expert lacks a part of its {site.linear.name}",
            tensor=f"{site.stem}.{name}",
            expected=f"present, for form {site.group.form}",
            found="absent",
            hint=INCOMPLETE,
        )
    return found


def wrong(form: str, what: str, expected: object, found: object, hint: str = "") -> MoetoolError:
    """The error of a group's params."""
    return MoetoolError(
        f"the params of a {form} group {what}",
        file="config.json",
        expected=str(expected),
        found=str(found)[:200],
        hint=hint or "the config was written by another moetool, or edited",
    )
