"""A folder of PEFT's X-LoRA, read as low-rank experts of linears behind one classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moetool import strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.methods.contract import Builder, Decisions
from moetool.methods.upcycle.adapters import CONFIG, WEIGHTS
from moetool.surgery import places
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.headers import WeightFiles
from moetool.surgery.layout import Layout
from moetool.surgery.spec import Piece, Stored, whole

if TYPE_CHECKING:
    from moetool.methods.upcycle.ground import Ground, Spot
    from moetool.surgery.groups import Group

KIND, HEAD = "XLORA", "base_model.internal_xlora_classifier.layers"
_WRAPPED = "base_model.lora_model."  # names in what PEFT writes of an adapter inside X-LoRA
# What it may say that experts behind a classifier cannot hold: key -> what is harmless.
_PLAIN = {"enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": None}


class HeldLinear(NamedTuple):
    """A linear of a classifier: the number of the file it lies in, and its tensors."""

    file: int
    weight: str
    bias: str


@dataclass(frozen=True)
class XLoraFolder:
    """`adapters`: their folders, by their names; `said`: adapter_config.json; `weights`: of the
    classifier.
    """

    folder: Path
    said: JsonObject
    adapters: dict[str, str]
    weights: Checkpoint

    @classmethod
    def read(cls, given: Sequence[str]) -> XLoraFolder | None:
        """The folder that is given; None where it is another, or there are several. MoetoolError
        for one that computes what our two passes do not.
        """
        path = Path(given[0]) if len(given) == 1 else None
        if path is None or not (path / CONFIG).is_file():
            return None
        said = strict_json.load(path / CONFIG, "adapter config")
        if said.get("peft_type") != KIND:
            return None
        for key, harmless in _PLAIN.items():
            if said.get(key, harmless) != harmless:
                raise _refused(path, f"X-LoRA with {key}", f"{key} {harmless}", said[key])
        kept = said.get("adapters")
        if not isinstance(kept, dict) or [*kept] != [str(n) for n in range(len(kept))]:
            # PEFT 0.21 runs no adapter that is called otherwise
            raise _refused(path, "adapters with other names than 0, 1, ...", "0, 1, ...", kept)
        adapters = {name: str(_adapter(path, name, str(kept[name]))) for name in kept}
        weights = Checkpoint.seen(str(path), {}, WeightFiles.read(path, [WEIGHTS]))
        return cls(path, said, adapters, weights)

    def decided(self, made: Decisions, ground: Ground, linears: Sequence[str]) -> Decisions:
        """What the plan must know of it, beside its adapters, whose files come first."""
        spare = self._spare()
        files = (*made.extra, self.weights, *spare.values())
        count = len(ground.layers) * len(linears)
        apart = bool(self.said.get("layerwise_scalings"))
        held = [*self._linears(files, len(made.extra), [*spare])]
        rows = len(self.adapters) * (count if apart else 1)
        last = files[held[-1].file].tensors[held[-1].bias]
        if last.shape != (rows,):
            raise _refused(self.folder, "a classifier of other linears", rows, list(last.shape))
        chosen = made.chosen | {
            "alpha": made.chosen["alpha"] * float(self.said.get("global_scaling_weight", 1.0)),
            "route": self._options(count if apart else 0),
            "classifier": [list(one) for one in held],
            "modules": registered(ground.source.config, ground.source.folder) if apart else [],
        }
        return replace(made, chosen=chosen, extra=files)

    def _options(self, modules: int) -> JsonObject:
        """Of the route."""
        said, depth = self.said, int(self.said.get("xlora_depth", 1))
        made: JsonObject = {"width": int(said.get("xlora_size", 2048))} if depth > 1 else {}
        made |= {"middle": depth - 2} if depth > 2 else {}
        made |= {"modules": modules} if modules else {}
        before, warm = (
            float(said.get(name, usual))
            for name, usual in (("scaling_pass_value", 0.0), ("softmax_temperature", 1.0))
        )
        made |= {"before": before} if before else {}
        return made | ({"temperature": warm} if warm != 1.0 else {})

    def _spare(self) -> dict[str, Checkpoint]:
        """Files of adapters in the folder that hold a linear of the classifier, by their names."""
        inside = (name for name in self.adapters if (self.folder / name / WEIGHTS).is_file())
        found = {
            name: Checkpoint.seen(
                str(self.folder / name), {}, WeightFiles.read(self.folder / name, [WEIGHTS])
            )
            for name in inside
        }
        return {name: file for name, file in found.items() if f"{HEAD}.weight" in file.tensors}

    def _linears(
        self, files: Sequence[Checkpoint], own: int, spare: Sequence[str]
    ) -> Iterator[HeldLinear]:
        """File, weight and bias of each; `own`: the number of the classifier's file, behind which
        lie those of `spare`. PEFT 0.21 takes an adapter's name out of those of tensors: the linear
        0 lies in the folder of the adapter 0, without its number.
        """
        step = 3 if float(self.said.get("xlora_dropout_p", 0.2)) > 0 else 2
        for number in range(int(self.said.get("xlora_depth", 1))):
            place = str(number * step)
            homes = [(own, f"{HEAD}.{place}")]
            homes += [(own + 1 + spare.index(place), HEAD)] if place in spare else []
            found = next((h for h in homes if f"{h[1]}.weight" in files[h[0]].tensors), None)
            if found is None:
                raise _refused(
                    self.folder, "a linear of the classifier is missing", homes[0][1], "nothing"
                )
            yield HeldLinear(found[0], f"{found[1]}.weight", f"{found[1]}.bias")


def _adapter(folder: Path, name: str, said: str) -> Path:
    """Where an adapter lies: as the config says, seen from the folder, else inside it."""
    if (folder / said / CONFIG).is_file():
        return folder / said
    at = folder / name
    held = WeightFiles.read(at, [WEIGHTS]).tensors if (at / WEIGHTS).is_file() else {}
    if any(tensor.startswith(_WRAPPED) for tensor in held):
        raise MoetoolError(
            "an adapter of X-LoRA as PEFT 0.21 saves it, without the layers that are called as "
            "other adapters are",
            file=at,
            expected="a folder that LoRA was trained in",
            found=next(tensor for tensor in held if tensor.startswith(_WRAPPED)),
            hint=f"the config names {said}: put the adapter there, or in {at}",
        )
    return at


def registered(config: JsonObject, folder: str) -> list[str]:
    """The modules of a model in the order in which its stock class registers them, which is the one
    in which PEFT counts those that have adapters.
    """
    from moetool.forward import stock

    return [name for name, _ in stock.empty_model(config, folder).named_modules()]


def write(build: Builder, spot: Spot, chosen: JsonObject, extra: Sequence[Checkpoint]) -> None:
    """Plan the classifier of a group, in its first module, byte for byte."""
    first = 1 + len(spot.others)
    held = [
        [(extra[n].tensor(name), first + n) for name in (weight, bias)]
        for n, weight, bias in chosen["classifier"]
    ]
    head, group = f"{spot.module}.{spot.group.router}", spot.group
    deep = len(held) > 1
    for what, (suffix, last) in enumerate((("", "weight"), ("_bias", "bias"))):
        if deep:
            _stacked(build, f"{head}.into{suffix}", [held[0][what]], flat=True)
        if len(held) > 2:
            _stacked(build, f"{head}.middle{suffix}", [one[what] for one in held[1:-1]])
        stored, number = held[-1][what]
        target = build.target(f"{head}.{last}", stored.dtype, stored.shape)
        order = _order(spot.ground, group, chosen["modules"])
        if not order:
            build.copy(whole(stored, number), whole(target))
        shape = (group.choices, *stored.shape[1:])
        for ours, theirs in enumerate(order):
            piece = Piece(stored.name, shape, theirs * prod(shape), number)
            build.copy(piece, Piece(target.name, shape, ours * prod(shape)))


def _stacked(
    build: Builder, name: str, held: Sequence[tuple[Stored, int]], *, flat: bool = False
) -> None:
    """One tensor of several, or of one as it lies."""
    shape = held[0][0].shape
    target = build.target(name, held[0][0].dtype, shape if flat else (len(held), *shape))
    for n, (stored, number) in enumerate(held):
        build.copy(whole(stored, number), Piece(target.name, shape, n * prod(shape)))


def _order(ground: Ground, group: Group, modules: Sequence[str]) -> list[int]:
    """Where each of the group's modules stands among those that PEFT counts."""
    stack = Layout.load(ground.at.layout.model_type).stack or ""
    blocks = places.named(group.site).of(ground.at.layout, group)
    each = product(sorted(group.layers), blocks)
    ours = [f"{stack}.{n}.{b.module.partition('{layer}.')[2]}" for n, b in each]
    theirs = [name for name in modules if name in set(ours)]
    return [theirs.index(name) for name in ours] if modules else []


def _refused(folder: Path, what: str, expected: object, found: object) -> MoetoolError:
    return MoetoolError(
        f"{what}, which two passes here do not compute",
        file=folder,
        expected=expected,
        found=str(found)[:200],
        hint="give a folder of X-LoRA that PEFT trained on this model, over all of --layers",
    )
