"""Adapters of PEFT, and folders of MixLoRA, read as low-rank experts of a dense model's FFNs."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from moetool import strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.methods.upcycle.ground import Ground
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.ffn import FfnLinear
from moetool.surgery.groups import linear_of
from moetool.surgery.headers import WeightFiles
from moetool.surgery.places import words
from moetool.surgery.spec import Stored

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_CLASSIFIER = "internal_xlora_classifier"
_PART = re.compile(r"(.+)\.(lora_[AB])((?:\.default)?\.weight)")
_EXPERT = re.compile(r"(.*?)(?:\.experts\.(\d+))?")
# What an adapter may say that a low-rank expert cannot hold: key -> what is harmless.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class LowRankExpert:
    """One expert of an adapter: names are `head` + the linear's own tail + `middle` + .lora_A +
    `suffix`, in the file that is number `source` of all adapters.
    """

    source: int
    head: str
    middle: str
    suffix: str

    def name(self, tail: str, part: str) -> str:
        """The tensor of a linear (`layers.3.mlp.gate_proj`): lora_A or lora_B."""
        return f"{self.head}{tail}{self.middle}.{part}{self.suffix}"


@dataclass(frozen=True)
class Adapter:
    """What one folder holds: its file, rank and alpha (as a plain LoRA would say it), its experts,
    the linears they change, and the template of its routers' names, if any.
    """

    folder: str
    weights: Checkpoint
    rank: int
    alpha: float
    experts: tuple[LowRankExpert, ...]
    targets: tuple[str, ...]
    router: str = ""
    merged: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # base's -> lora_A, lora_B


@dataclass(frozen=True)
class AdaptersRead:
    """How adapters are read. `work`: where tensors of a pickle are put as safetensors; `merge`:
    whether what changes the attention is taken apart, to become part of the base.
    """

    work: str
    merge: bool = False


def read(folder: str, number: int, ground: Ground, how: AdaptersRead) -> Adapter:
    """An adapter folder. MoetoolError for one that is no plain LoRA of these FFNs, whole."""
    path = Path(folder)
    said = strict_json.load(path / CONFIG, "adapter config")
    _check_plain(folder, said)
    weights = _weights(path, number, how.work)
    found, router = _Found(folder, ground, weights, how.merge), ""
    for name in weights.tensors:
        if _CLASSIFIER in name:  # PEFT saves X-LoRA's with each adapter too
            continue
        if name.endswith(".moe_gate.weight"):
            router = re.sub(r"(?<=\.)\d+(?=\.)", "{layer}", name, count=1)
        else:
            found.take(name)
    rank = said.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise _refused(folder, "the adapter names no rank", "r, a whole number", rank)
    root = sqrt(rank) if said.get("use_rslora") else 1.0
    alpha = float(said.get("lora_alpha", rank)) * root
    experts, targets = found.experts(number, rank)
    return Adapter(folder, weights, rank, alpha, experts, targets, router, found.merged(rank))


def _check_plain(folder: str, said: JsonObject) -> None:
    kind = said.get("peft_type")
    if kind not in ("LORA", "MIXLORA"):
        raise _refused(folder, "the adapter is no LoRA", "peft_type LORA or MIXLORA", kind)
    for key, harmless in _PLAIN.items():
        if key in said and said[key] not in harmless:
            what = f"the adapter has {key}, which a low-rank expert cannot hold"
            raise _refused(folder, what, f"{key} {harmless[0]}", said[key])


def _weights(path: Path, number: int, work: str) -> Checkpoint:
    """The adapter's tensors as they lie; a pickle is read without running what it says."""
    name = WEIGHTS
    if not (path / WEIGHTS).exists() and (path / PICKLE).exists():
        from safetensors.torch import save_file

        held = _unpickled(path / PICKLE)
        path, name = Path(work, "adapters"), f"{number}.safetensors"
        path.mkdir(parents=True, exist_ok=True)
        save_file(held, path / name, {"format": "pt"})
    if not (path / name).exists():
        raise _refused(str(path), "the folder holds no adapter", f"{WEIGHTS} or {PICKLE}", "none")
    return Checkpoint.seen(str(path), {}, WeightFiles.read(path, [name]))


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle. MoetoolError for one that holds, or would do, anything else."""
    import torch

    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as problem:
        held = str(problem).partition("\n")[0]
    if not isinstance(held, dict) or not all(isinstance(v, torch.Tensor) for v in held.values()):
        raise MoetoolError(
            "the adapter's pickle is no dictionary of tensors",
            file=str(file),
            expected="what torch.load reads with weights_only=True",
            found=str(held)[:200],
            hint=f"download it again, or save its tensors as {WEIGHTS}",
        )
    return {str(name): tensor.contiguous().clone() for name, tensor in held.items()}


class _Found:
    """The tensors of an adapter by what they change."""

    def __init__(self, folder: str, ground: Ground, weights: Checkpoint, merge: bool) -> None:
        self.folder, self.ground, self.weights = folder, ground, weights
        self.forms: dict[int, tuple[str, str, str]] = {}  # expert -> head, middle, suffix
        self.held: dict[int, dict[str, dict[str, Stored]]] = {}  # expert -> tail -> part
        self.tails = {t: name for name, t in tails(ground)}
        self.apart = dict(_attention(ground)) if merge else {}  # tail -> linear and base's tensor
        self.rest: dict[str, dict[str, Stored]] = {}  # tail -> part

    def take(self, name: str) -> None:
        """A tensor into its place; MoetoolError for one that changes something else."""
        found = _PART.fullmatch(name)
        split = _EXPERT.fullmatch(found[1] if found else "")
        module, expert = split.groups() if split else ("", None)
        tail = next((t for t in self.tails if f".{module}".endswith(f".{t}")), None)
        apart = next((t for t in self.apart if f".{module}".endswith(f".{t}")), None)
        if found is not None and tail is None and apart is not None and expert is None:
            self.rest.setdefault(apart, {})[found[2]] = self.weights.tensors[name]
            return
        if found is None or tail is None:
            raise _refused(
                self.folder,
                "the adapter changes more than the FFNs that become experts",
                "lora_A and lora_B of the FFN's linears, in the layers of --layers",
                name,
                "--merge-attention makes what it changes of the attention part of the base",
            )
        number = int(expert or 0)
        form = (module.removesuffix(tail), f".experts.{expert}" if expert else "", found[3])
        if self.forms.setdefault(number, form) != form:
            raise _refused(self.folder, "the adapter's names are of two kinds", form[0], name)
        parts = self.held.setdefault(number, {}).setdefault(tail, {})
        parts[found[2]] = self.weights.tensors[name]

    def merged(self, rank: int) -> dict[str, tuple[str, str]]:
        """What becomes part of the base's attention: its tensor -> lora_A and lora_B."""
        made = {}
        for tail, parts in self.rest.items():
            linear, stored = self.apart[tail]
            out, into = linear.sides(stored.shape)
            for part, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
                if part not in parts or parts[part].shape != shape:
                    seen = parts[part].shape if part in parts else "nothing"
                    what = f"the adapter is of another base or rank: {part} of {tail}"
                    raise _refused(self.folder, what, str(list(shape)), seen)
            made[stored.name] = (parts["lora_A"].name, parts["lora_B"].name)
        return made

    def experts(self, source: int, rank: int) -> tuple[tuple[LowRankExpert, ...], tuple[str, ...]]:
        """The experts, and the linears that all of them change in every layer."""
        targets: tuple[str, ...] = ()
        for held in self.held.values():
            mine = tuple(dict.fromkeys(self.tails[t] for t in self.tails if t in held))
            targets = targets or mine
            wanted = {t for t, name in self.tails.items() if name in targets}
            gap = sorted(wanted ^ set(held))
            if gap:
                raise _refused(
                    self.folder, "the adapter is not alike in all layers", gap[0], "absent"
                )
            self._check_shapes(held, rank)
        if not self.held:
            raise _refused(self.folder, "the adapter changes no FFN", "lora_A and lora_B", "none")
        made = (LowRankExpert(source, *self.forms[n]) for n in sorted(self.forms))
        return tuple(made), targets

    def _check_shapes(self, held: Mapping[str, Mapping[str, Stored]], rank: int) -> None:
        """MoetoolError for an adapter of another base, or another rank than it says."""
        for layer in self.ground.layers:
            for linear in self.ground.linears:
                parts = held.get(tail_of(self.ground, linear.slot.name, layer))
                if parts is None:
                    continue
                out, into = linear.sides(self.ground.stored(linear, layer).shape)
                wanted = {"lora_A": (rank, into), "lora_B": (out, rank)}
                for part, shape in wanted.items():
                    seen = parts[part].shape if part in parts else None
                    if seen != shape:
                        raise _refused(
                            self.folder,
                            f"the adapter is of another base or rank: {part} of "
                            f"{linear_of(linear.slot.name)}",
                            str(list(shape)),
                            list(seen) if seen else "nothing",
                        )


def tail_of(ground: Ground, template: str, layer: int) -> str:
    """`layers.3.mlp.gate_proj`: a linear as every wrapper of the model calls it at the end."""
    stack = ground.at.layout.stem.rstrip(".").rpartition(".")[2]
    inner = template.partition("{layer}.")[2].removesuffix(".weight")
    return f"{stack}.{layer}.{inner}"


def tails(ground: Ground) -> Iterator[tuple[str, str]]:
    """(name of the linear, its tail) for every linear that becomes experts'."""
    for layer in ground.layers:
        for linear in ground.linears:
            yield linear_of(linear.slot.name), tail_of(ground, linear.slot.name, layer)


def _attention(ground: Ground) -> Iterator[tuple[str, tuple[FfnLinear, Stored]]]:
    """The projections of attention in all layers, by their tails."""
    for layer in range(ground.count):
        for linear, *_ in words.linears(ground.at.layout, "attention"):
            tail = tail_of(ground, linear.slot.name, layer)
            yield tail, (linear, ground.stored(linear, layer))


def _refused(folder: str, what: str, expected: str, found: object, hint: str = "") -> MoetoolError:
    return MoetoolError(
        what,
        file=folder,
        expected=expected,
        found=str(found)[:200],
        hint=hint or "give adapters that PEFT trained on this model, as plain LoRA of one rank",
    )
