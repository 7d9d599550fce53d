"""What the forms of the compressed-tensors library have in common: `quantization_config` with a
group for each scheme, its targets and what it leaves alone.

Facts: compressed_tensors/config and quantization/quant_config.py 0.20; transformers'
integrations/compressed_tensors.py 5.24 takes one group for all experts of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.forms.form import (
    Config,
    Form,
    Params,
    Recognised,
    Written,
    float_of,
    made_of,
)
from moetool.surgery.spec import FLOATS, InParts, Stored, Target

METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the library whose files these are
KEY = "quantization_config"
_WEIGHT = ".weight"


class CompressedTensors(Form):
    """A form of that library. Subclasses say how their tensors lie and their scheme."""

    method: ClassVar[str] = METHOD
    kind: ClassVar[str] = ""  # the library's `format`
    lead: ClassVar[str] = ""  # suffix of the tensor by which a matrix is recognised

    def scheme(self, params: Params) -> JsonObject:
        """`weights` (and `input_activations`) of a config group."""
        raise NotImplementedError

    def params_of(self, weights: JsonObject) -> Params | None:
        """The params that a config group's `weights` mean; None where they are another form's."""
        raise NotImplementedError

    def read(self, full: str, tensors: Mapping[str, Stored], params: Params, dtype: str) -> Stored:
        """The matrix of this name. Raises MoetoolError where a part lacks or does not fit."""
        raise NotImplementedError

    def fits(self, target: Target, params: Params) -> bool:
        return not self.misfit(target, params)

    def misfit(self, target: Target, params: Params) -> str:
        single = len(target.shape) == 2 and target.name.endswith(_WEIGHT)
        if not (single and target.dtype in FLOATS):
            return "compressed-tensors holds single matrices called `.weight`"
        group = params.get("group", 0)
        if group and target.shape[1] % group:
            return f"its input width {target.shape[1]} is no multiple of the group {group}"
        return ""

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        said = config.get(KEY)
        if not isinstance(said, dict) or said.get("quant_method") != METHOD:
            return None
        found: dict[str, Stored] = {}
        for name in tensors:
            if self.lead and name.endswith(self.lead):
                stem = name.removesuffix(self.lead)
                params = self._told(said, stem)
                if params is not None:
                    full = stem + _WEIGHT
                    found[full] = self.read(full, tensors, params, float_of(config))
        if not found:
            return None
        return Recognised(found, config, {KEY: said})

    def _told(self, said: JsonObject, module: str) -> Params | None:
        """What the config says of a module, where that is this form."""
        group = group_of(said, module)
        if group is None or group.get("format", said.get("format")) != self.kind:
            return None
        return self.params_of(group.get("weights") or {})

    def config(self, config: Config, told: Config, written: Written) -> Config:
        said: JsonObject = dict(config.get(KEY) or _empty())
        groups: JsonObject = dict(said["config_groups"])
        by_params: dict[str, list[str]] = {}
        params_of: dict[str, Params] = {}
        for name, (_, params) in written.matrices.items():
            key = json.dumps(params, sort_keys=True)
            by_params.setdefault(key, []).append(name.removesuffix(_WEIGHT))
            params_of[key] = params
        for key in sorted(by_params):
            groups[f"group_{len(groups)}"] = {
                "targets": patterns(by_params[key]),
                **self.scheme(params_of[key]),
                "format": self.kind,
            }
        kinds = {g["format"] for g in groups.values()}
        said["format"] = kinds.pop() if len(kinds) == 1 else "mixed-precision"
        said["config_groups"] = groups
        said["ignore"] = patterns(_linears(written.full))
        return config | {KEY: said}


def group_of(said: JsonObject, module: str) -> JsonObject | None:
    """The config group that a module belongs to: the first that names it, else the one for all."""
    rest = None
    for group in (said.get("config_groups") or {}).values():
        for target in group.get("targets") or ():
            if target == "Linear":
                rest = rest or group
            elif matches(target, module):
                return dict(group)
    return rest


def matches(target: str, module: str) -> bool:
    """Whether a target (a name, or `re:` and a pattern) means a module."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def patterns(modules: Iterable[str]) -> list[str]:
    """Modules as the library's patterns, numbers of layers and experts left open."""
    found = {re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(m)) for m in modules}
    return [f"re:^{p}$" for p in sorted(found)]


def _linears(full: Iterable[Target]) -> list[str]:
    """Modules of full matrices: what a loader must not look for packed."""
    return [
        t.name.removesuffix(_WEIGHT) for t in full if len(t.shape) == 2 and t.name.endswith(_WEIGHT)
    ]


def _empty() -> JsonObject:
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "version": VERSION,
        "format": "",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def part(tensors: Mapping[str, Stored], full: str, suffix: str) -> Stored:
    """A part of a matrix; MoetoolError where it lacks."""
    name = full.removesuffix(_WEIGHT) + suffix
    if name not in tensors:
        raise MoetoolError(
            "a quantized matrix lacks a part",
            tensor=full,
            expected=name,
            found="nothing",
            hint="the checkpoint is incomplete: download it again",
        )
    return tensors[name]


def whole(form: str, full: str, dtype: str, shape: tuple[int, int], parts: InParts) -> Stored:
    """A matrix in parts (see `made_of`)."""
    return made_of(form, full, dtype, shape, parts)
