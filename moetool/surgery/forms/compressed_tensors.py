"""What the forms of the compressed-tensors library have in common: `quantization_config` with a
group for each scheme, its targets and what it leaves alone.

Facts: compressed_tensors/config and quantization/quant_config.py 0.20.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.forms.form import (
    Config,
    Form,
    Params,
    Read,
    Recognised,
    Written,
    float_of,
    made_of,
)
from moetool.surgery.forms.targets import ConfigGroups, check, chosen, ignore
from moetool.surgery.spec import FLOATS, InParts, Shape, Stored, Target

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the library whose files these are
KEY = "quantization_config"
SCALES = ("BF16", "F16", "F32")
WEIGHT = ".weight"
# Scales of activations that were fixed beforehand: they travel with their matrix.
_STATIC = (".input_scale", ".input_global_scale", ".input_zero_point")
_OBSERVED = ("observer", "observer_kwargs")  # how scales were found, not what they are
# Everything else that the library ever stores beside or instead of a weight.
_PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx",
          ".weight_global_scale", ".bitmask", ".compressed", ".row_offsets", ".meta",
          ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale")  # fmt: skip


class CompressedTensors(Form):
    """A form of that library. Subclasses say how their tensors lie and their scheme. Params of all:
    activations, where a config group quantizes them too (as it says it), and static, the scales of
    activations that lie beside a matrix: [suffix, dtype, shape] of each.
    """

    mixes: ClassVar[bool] = True
    quant_method: ClassVar[str] = METHOD
    kinds: ClassVar[tuple[str, ...]] = ()  # the library's `format`s that lie so
    suffixes: ClassVar[tuple[str, ...]] = ()  # of the parts, in order; the first is what leads

    def weights_of(self, params: Params) -> JsonObject:
        """`weights` of a config group."""
        raise NotImplementedError

    def params_of(self, weights: JsonObject) -> Params | None:
        """The params that a config group's `weights` mean; None where they are another form's."""
        raise NotImplementedError

    def settle(self, params: Params, parts: Sequence[Stored], read: Read | None) -> Params:
        """The params with what the parts themselves say."""
        return params

    def shape_of(self, parts: Sequence[Stored], params: Params) -> Shape | None:
        """The shape of the matrix, from the headers of its parts; None where they do not fit."""
        raise NotImplementedError

    def own(self, target: Target, params: Params) -> tuple[Target, ...]:
        """The parts that hold the matrix, without scales of activations."""
        raise NotImplementedError

    def kind(self, params: Params) -> str:
        """The library's `format` of a matrix with these params."""
        return self.kinds[0]

    def group(self, params: Params) -> int:
        """Neighbours that share a scale; 0 where a row does."""
        return int(params.get("group", 0))

    def fits(self, target: Target, params: Params) -> bool:
        return not self.misfit(target, params)

    def misfit(self, target: Target, params: Params) -> str:
        if len(target.shape) == 3:
            return "experts stacked like this are read by no loader of compressed-tensors"
        single = len(target.shape) == 2 and target.name.endswith(WEIGHT)
        if not (single and target.dtype in FLOATS):
            return "compressed-tensors holds single matrices called `.weight`"
        group = self.group(params)
        if group and target.shape[1] % group:
            return f"its input width {target.shape[1]} is no multiple of the group {group}"
        return ""

    def parts(self, target: Target, params: Params) -> tuple[Target, ...]:
        stem = target.name.removesuffix(WEIGHT)
        static = (Target(stem + s, d, tuple(n)) for s, d, n in params.get("static", ()))
        return (*self.own(target, params), *static)

    def encode(self, matrix: Tensor, params: Params) -> Sequence[Tensor]:
        self.refuse_static(params)
        return super().encode(matrix, params)

    @staticmethod
    def refuse_static(params: Params) -> None:
        """Say that nobody has scales for activations of a matrix that changes."""
        if params.get("static"):
            raise MoetoolError(
                "a matrix with fixed scales of its activations cannot be rounded again",
                expected="--form full",
                found="--form same",
                hint="those scales were measured: quantize the output anew",
            )

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        return self.look(tensors, config, None)

    def look(
        self, tensors: Mapping[str, Stored], config: Config, read: Read | None
    ) -> Recognised | None:
        said = config.get(KEY)
        if not isinstance(said, dict) or said.get("quant_method") != METHOD:
            return None
        check(said)
        try:
            found = self._found(tensors, config, read)
        except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as problem:
            raise MoetoolError(
                "quantization_config is not as compressed-tensors writes it",
                found=f"{type(problem).__name__}: {str(problem)[:200]}",
                hint="restore the config.json that came with the model",
            ) from None
        if not found:
            return None
        _refuse(said)
        return Recognised(found, config, {KEY: said})

    def _found(
        self, tensors: Mapping[str, Stored], config: Config, read: Read | None
    ) -> dict[str, Stored]:
        """The matrices whose config group means this form."""
        found: dict[str, Stored] = {}
        said, dtype = config[KEY], float_of(config)
        groups, lead = ConfigGroups.of(said), self.suffixes[0]
        for name in tensors:
            if not name.endswith(lead):
                continue
            stem = name.removesuffix(lead)
            params = self._told(said, groups.find(stem))
            if params is not None:
                full = stem + WEIGHT
                parts, params = self._whole(full, tensors, params, read)
                shape = self.shape_of(parts, params)
                self._check(Target(full, dtype, shape or ()), parts, params)
                assert shape is not None
                held = InParts(self.name, parts, params)
                found[full] = made_of(self.name, full, dtype, shape, held)
        return found

    def _told(self, said: JsonObject, group: JsonObject | None) -> Params | None:
        """What a config group says, where that is this form."""
        weights = (group or {}).get("weights")
        if group is None or not isinstance(weights, dict):
            return None
        if (group.get("format") or said.get("format")) not in self.kinds:
            return None
        params = self.params_of(weights)
        if params is not None and (activations := group.get("input_activations")):
            params["activations"] = {
                k: v for k, v in activations.items() if v is not None and k not in _OBSERVED
            }
        return params

    def _whole(
        self, full: str, tensors: Mapping[str, Stored], params: Params, read: Read | None
    ) -> tuple[tuple[Stored, ...], Params]:
        """Its parts, and the params with what they say. Raises MoetoolError where one lacks."""
        stem = full.removesuffix(WEIGHT)
        held = tuple(_part(tensors, full, stem + s) for s in self.suffixes)
        params = self.settle(dict(params), held, read)
        static = tuple(tensors[stem + s] for s in _STATIC if stem + s in tensors)
        if static:
            said = [[t.name.removeprefix(stem), t.dtype, list(t.shape)] for t in static]
            params["static"] = said
        return (*held, *static), params

    def _check(self, target: Target, parts: Sequence[Stored], params: Params) -> None:
        """Refuse parts that are not those of a matrix of this shape."""
        expected = self.parts(target, params) if target.shape else ()
        if [(t.dtype, t.shape) for t in expected] != [(t.dtype, t.shape) for t in parts]:
            raise MoetoolError(
                "the parts of a quantized matrix do not fit together, or not its config group",
                tensor=target.name,
                expected=_said(expected) if expected else json.dumps(self.weights_of(params)),
                found=_said(parts),
                hint="config.json is another model's, or the checkpoint is incomplete",
            )

    def complete(self, tensors: Mapping[str, Stored], config: Config) -> None:
        """Refuse what the library stored and no form knows."""
        if not isinstance(said := config.get(KEY), dict) or said.get("quant_method") != METHOD:
            return
        for name, tensor in tensors.items():
            stray = name.endswith((*_PARTS, *_STATIC)) and not tensor.parts
            if stray or (name.endswith(WEIGHT) and tensor.dtype in ("I8", "F8_E4M3")):
                raise MoetoolError(
                    "a tensor of compressed-tensors is not understood",
                    tensor=name,
                    expected="weights in a format that moetool reads: symmetric or asymmetric "
                    "integers, fp8, mxfp4, mxfp8, nvfp4; no sparsity, g_idx or cached keys",
                    found=f"{tensor.dtype} {list(tensor.shape)}; its config group: "
                    + json.dumps(ConfigGroups.of(said).find(name.rpartition(".")[0]))[:300],
                    hint="decompress the model with compressed-tensors first",
                )

    def scheme(self, params: Params) -> JsonObject:
        """A config group without its targets."""
        return {
            "weights": self.weights_of(params),
            "input_activations": params.get("activations"),
            "output_activations": None,
            "format": self.kind(params),
        }

    def config(self, config: Config, told: Config, written: Written) -> Config:
        said = told.get(KEY)
        if said and _still(said, written):
            return config | {KEY: said}
        modules: dict[str, list[str]] = {}
        for name, (_, form, params) in written.kin.items():
            assert isinstance(form, CompressedTensors)
            key = json.dumps(form.scheme(params), sort_keys=True)
            modules.setdefault(key, []).append(name.removesuffix(WEIGHT))
        full = _linears(written.full)
        # The group of the experts goes first: transformers 5 takes the first that names them.
        order = sorted(modules, key=lambda k: (-_experts(modules[k]), k))
        targets = chosen([modules[k] for k in order], full)
        groups = {
            f"group_{i}": {"targets": t, **json.loads(k)}
            for i, (k, t) in enumerate(zip(order, targets, strict=True))
        }
        kinds = {g["format"] for g in groups.values()}
        quantized = list(chain.from_iterable(modules.values()))
        return config | {
            KEY: {
                "quant_method": METHOD,
                "quantization_status": "compressed",
                "version": VERSION,
                "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
                "config_groups": groups,
                "ignore": ignore(full, quantized),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }


def weights(bits: int, kind: str, strategy: str, group: int = 0) -> JsonObject:
    """`weights` of a config group: symmetric, fixed."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "group_size": group or None,
        "strategy": strategy,
        "dynamic": False,
    }


def scaled_by(dtype: str) -> str:
    """The dtype of scales for a matrix: its own, as the library has it, if scales can have it."""
    return dtype if dtype in SCALES else "F32"


def _experts(modules: Sequence[str]) -> int:
    return sum(".experts." in m for m in modules)


def _still(said: JsonObject, written: Written) -> bool:
    """Whether a source's config says of every matrix what it is, and nothing of the full ones."""
    groups = ConfigGroups.of(said)
    for name, (_, form, params) in written.kin.items():
        assert isinstance(form, CompressedTensors)
        found = form._told(said, groups.find(name.removesuffix(WEIGHT)))
        if found is None or form.scheme(found) != form.scheme(params):
            return False
    return not any(groups.means(m) for m in _linears(written.new))


def _linears(full: Sequence[Target]) -> list[str]:
    """Modules of full matrices: what a loader must not look for packed."""
    return [
        t.name.removesuffix(WEIGHT) for t in full if len(t.shape) == 2 and t.name.endswith(WEIGHT)
    ]


def _refuse(said: JsonObject) -> None:
    """Models whose weights are not what is multiplied."""
    for key in ("transform_config", "sparsity_config", "moe_sparsity_config"):
        told = said.get(key)
        if told and (key != "sparsity_config" or told.get("format", "dense") != "dense"):
            raise MoetoolError(
                f"the config has a {key}, which moetool does not read",
                found=json.dumps(told)[:200],
                hint="decompress the model with compressed-tensors first",
            )


def _part(tensors: Mapping[str, Stored], full: str, name: str) -> Stored:
    """A part of a matrix; MoetoolError where it lacks."""
    if name not in tensors:
        raise MoetoolError(
            "a quantized matrix lacks a part",
            tensor=full,
            expected=name,
            found="nothing",
            hint="the checkpoint is incomplete: download it again",
        )
    return tensors[name]


def _said(parts: Sequence[Stored | Target]) -> str:
    return ", ".join(f"{p.name.rpartition('.')[2]} {p.dtype} {list(p.shape)}" for p in parts)
