"""A dense checkpoint as experts of moetool's own see it: the linears of its FFNs, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

from moetool.errors import MoetoolError
from moetool.methods import site
from moetool.methods.contract import Builder
from moetool.surgery import classes, forms, groups, places, towers
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.ffn import NORM, FfnBlock, FfnLinear
from moetool.surgery.groups import Group
from moetool.surgery.inside import inside
from moetool.surgery.layout import words
from moetool.surgery.pair import drops
from moetool.surgery.places.linear import chosen
from moetool.surgery.spec import FLOATS, Stored, run_of, whole
from moetool.surgery.text_model import TextModel, tower_of

Place = int | str  # a layer, "before" or "after" the layers


@dataclass(frozen=True)
class Ground:
    """The FFNs that experts are to stand under or beside."""

    source: Checkpoint
    at: TextModel
    blocks: tuple[FfnBlock, ...]  # of each layer, at the site where experts are to be
    layers: tuple[int, ...]
    tower: str
    older: tuple[str, str] = ("", "")  # what names have before them in SRC, and have today

    @classmethod
    def of(
        cls,
        source: Checkpoint,
        layers: str,
        where: str = "ffn",
        tower: str = towers.AUTO,
        only: Sequence[str] = (),
    ) -> Ground:
        """At a site of a tower; of the site `linear`, at some of them by name. MoetoolError where
        the family has no such, or its weights are no plain floats.
        """
        ours = groups.is_ours(source.config)
        config = groups.base_of(source.config) if ours else source.config
        named = towers.meant(classes.layout_of(config), tower)
        at = tower_of(source.config, named)
        blocks = places.named(where).blocks(at.layout)
        blocks = chosen(blocks, only) if only else blocks
        count = 1 if places.named(where).outside else at.field("layers") or 0
        meant = site.parse(layers, count)
        meant = _held(source, at, blocks, meant) if layers == "all" else meant
        older = words().older_of(at.layout.stem, source.tensors)
        found = cls(source, at, blocks, meant, named, older)
        for layer in found.layers:
            for linear in chain.from_iterable(block.linears for block in blocks):
                found.stored(linear, layer)
        return found

    @property
    def block(self) -> FfnBlock:
        """The one of a layer, or the first."""
        return self.blocks[0]

    @property
    def linears(self) -> tuple[FfnLinear, ...]:
        """Those of all blocks of a layer."""
        return tuple(chain.from_iterable(block.linears for block in self.blocks))

    @property
    def count(self) -> int:
        """Layers of the tower."""
        return self.at.field("layers") or 0

    @property
    def dtype(self) -> str:
        """Of the FFNs, and of what stands beside them."""
        return self.stored(self.block.last, self.layers[0]).dtype

    @property
    def hidden(self) -> int:
        """Width of what goes in."""
        first = self.block.linears[0]
        return first.sides(self.stored(first, self.layers[0]).shape)[1]

    @property
    def given(self) -> int:
        """Width of what comes out."""
        last = self.block.last
        return last.sides(self.stored(last, self.layers[0]).shape)[0]

    @property
    def width(self) -> int:
        """Neurons of an FFN."""
        last = self.block.last
        return last.sides(self.stored(last, self.layers[0]).shape)[1]

    def module(self, layer: int, block: FfnBlock | None = None) -> str:
        """The module that holds a layer's FFN: `model.layers.3.mlp`, or another block."""
        return self.at.name((block or self.block).module, layer=layer)

    def today(self, name: str) -> str:
        """What a tensor of SRC is called today."""
        there, today = self.older
        return today + name.removeprefix(there) if there and name.startswith(there) else name

    def _there(self, name: str) -> str:
        """What SRC calls a tensor."""
        there, today = self.older
        return there + name.removeprefix(today) if there and name.startswith(today) else name

    def stored(self, linear: FfnLinear, layer: int) -> Stored:
        """The weight of a linear; MoetoolError where it is quantized, or no matrix."""
        name = self._there(self.at.name(linear.slot.name, layer=layer))
        if name not in self.source.tensors:
            self._check_there(name, layer)
        found = self.source.tensor(name)
        fits = len(found.shape) == (1 if linear.role == NORM else 2)
        if not forms.lies_plain(found) or found.dtype not in FLOATS or not fits:
            held = found.parts.form if found.parts else f"{found.dtype} {list(found.shape)}"
            raise MoetoolError(
                "the weights are not plain floats",
                file=f"{self.source.folder}/{found.file}",
                tensor=found.name,
                expected=f"a matrix of {', '.join(FLOATS)}",
                found=held,
                hint="`moetool dequantize` writes them in full",
            )
        return found if linear.rows is None else run_of(found, *linear.rows)

    def _check_there(self, name: str, layer: int) -> None:
        """Refuse what a group of experts stands in the place of."""
        for group in self.at.groups:
            blocks = places.named(group.site).of(self.at.layout, group)
            here = any(name.startswith(f"{self.module(layer, block)}.") for block in blocks)
            if here and group.base == "gone" and layer in group.layers:
                raise MoetoolError(
                    f"experts of the group {group.name!r} stand in the place of this matrix",
                    file=self.source.folder,
                    tensor=name,
                    expected="a matrix that the layer has itself",
                    found=f"{group.experts} {group.form} experts at the site {group.site}",
                    hint="choose layers without that group (--layers), or begin with the model "
                    "that this one was made from",
                )

    def bias(self, linear: FfnLinear, layer: int) -> Stored | None:
        """The bias of a linear, where the layer has one."""
        if linear.bias is None:
            return None
        name = self._there(self.at.name(linear.bias.name, layer=layer))
        found = self.source.tensors.get(name)
        return found if found is None or linear.rows is None else run_of(found, *linear.rows)

    def names(self) -> dict[Place, list[str]]:
        """The source's tensors by where they lie, without buffers that no class reads."""
        found: dict[Place, list[str]] = {}
        for name in sorted(self.source.tensors):
            if drops(name):
                continue
            place: Place | None = self.at.layer_of(self.today(name))
            if place is None:
                place = "before" if words().is_first(name) else "after"
            found.setdefault(place, []).append(name)
        return found

    def dropped(self) -> dict[str, str]:
        """What is left out, by name with the reason."""
        return {n: why for n in self.source.tensors if (why := drops(n))}


def _held(
    source: Checkpoint, at: TextModel, blocks: Sequence[FfnBlock], layers: tuple[int, ...]
) -> tuple[int, ...]:
    """Of layers those that have the blocks, where a family has them in some alone; all, where none
    has.
    """
    every = chain.from_iterable(block.linears for block in blocks)
    some = [one.slot.name for one in every if one.slot.layers == "some"]
    has = (n for n in layers if all(at.name(name, layer=n) in source.tensors for name in some))
    return tuple(has) or layers


@dataclass(frozen=True)
class Spot:
    """One block of one layer, and the group of experts that it gets. `seed`: of everything random;
    `others`: further sources.
    """

    ground: Ground
    group: Group
    layer: int
    block: FfnBlock
    seed: int
    others: tuple[Ground, ...] = ()

    @property
    def module(self) -> str:
        return self.ground.module(self.layer, self.block)

    @property
    def first(self) -> bool:
        """Whether it is the group's first."""
        return self.layer == min(self.group.layers) and self.block == self.ground.blocks[0]

    @property
    def seen(self) -> int:
        """Width of what a router sees."""
        first = self.block.linears[0]
        return first.sides(self.ground.stored(first, self.layer).shape)[1]

    def name(self, expert: int, linear: FfnLinear, part: str) -> str:
        """A tensor of an expert: `model.layers.3.mlp.experts.7.gate_proj.lora_A`."""
        return f"{self.module}.{self.group.expert(expert, linear.lies, part)}"

    def each(self) -> Iterator[tuple[int, FfnLinear]]:
        """Every linear of every expert."""
        for expert in range(self.group.experts):
            for linear in self.block.linears:
                yield expert, linear

    def copy(self, build: Builder, expert: int, linear: FfnLinear, source: int = 0) -> str:
        """An expert's own copy of a linear, with its bias; the name of its weight."""
        stored, name = self.ground.stored(linear, self.layer), self.name(expert, linear, "weight")
        target = build.target(name, stored.dtype, stored.shape)
        build.copy(whole(stored, source), whole(target))
        self.copy_bias(build, expert, linear, source)
        return name

    def copy_bias(self, build: Builder, expert: int, linear: FfnLinear, source: int = 0) -> None:
        """An expert's own bias, where the FFN's linear has one."""
        bias = self.ground.bias(linear, self.layer)
        if bias is not None:
            target = build.target(self.name(expert, linear, "bias"), bias.dtype, bias.shape)
            build.copy(whole(bias, source), whole(target))

    def write_inside(self, build: Builder, drawn: bool = False) -> None:
        """What experts have that are no FFNs: zero, or drawn as torch's linears are; `drawn`: all
        matrices are.
        """
        hidden, dtype, group = self.ground.given, self.ground.dtype, self.group
        each = product(range(group.experts), inside(group.form, group.params))
        for expert, one in ((e, o) for e, o in each if e < o.among(group.experts, group.params)):
            name = f"{self.module}.{group.expert(expert, part=one.name)}"
            target = build.target(name, dtype, one.sides(hidden, group.params))
            if one.zero and not (drawn and len(target.shape) == 2):
                build.zeros(target)
            else:
                build.task("draw", [], [whole(target)], law="kaiming", seed=self.seed, name=name)
