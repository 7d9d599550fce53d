"""What the forms of bitsandbytes have in common: `quantization_config` as transformers'
BitsAndBytesConfig has it, and how matrices are found by one of their parts.

transformers 5 has no place for experts of these forms (its own are one tensor a layer); 4.57 loads
them and keeps them packed, and `moetool.load` does for 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.forms.form import Config, Form, Params, Read, Recognised, Written, float_of
from moetool.surgery.spec import FLOATS, Stored, Target

METHOD = "bitsandbytes"
KEY = "quantization_config"
SKIPPED = "llm_int8_skip_modules"
WEIGHT = ".weight"
_HEAD = "lm_head"  # as transformers does unless it is told which modules are full
_PLAIN: JsonObject = {  # BitsAndBytesConfig's defaults
    "quant_method": METHOD,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    SKIPPED: None,
    "llm_int8_threshold": 6.0,
}


@dataclass(frozen=True)
class Seen:
    """How a matrix is looked at: what reads small tensors, and the dtype that the config names."""

    read: Read | None
    dtype: str


class BitsAndBytes(Form):
    """A form of that library. Subclasses say how their tensors lie, and what a config tells."""

    quant_method: ClassVar[str] = METHOD
    lead: ClassVar[str] = ""  # suffix, after the module's name, of the part that finds a matrix

    def said(self, params: Params, dtype: str) -> JsonObject:
        """The fields of BitsAndBytesConfig that differ from its defaults."""
        raise NotImplementedError

    def read(self, full: str, tensors: Mapping[str, Stored], seen: Seen) -> Stored:
        """The matrix of this name. Raises MoetoolError where a part lacks or does not fit."""
        raise NotImplementedError

    def fits(self, target: Target, params: Params) -> bool:
        return not self.misfit(target, params)

    def misfit(self, target: Target, params: Params) -> str:
        single = len(target.shape) == 2 and target.name.endswith(WEIGHT)
        if not (single and target.dtype in FLOATS):
            return "bitsandbytes holds single matrices called `.weight`"
        return ""

    def recognise(self, tensors: Mapping[str, Stored], config: Config) -> Recognised | None:
        return self.look(tensors, config, None)

    def look(
        self, tensors: Mapping[str, Stored], config: Config, read: Read | None
    ) -> Recognised | None:
        said = config.get(KEY)
        if not isinstance(said, dict) or said.get("quant_method", METHOD) != METHOD:
            return None
        found: dict[str, Stored] = {}
        seen = Seen(read, float_of(config))
        for name in tensors:
            if name.endswith(self.lead):
                full = name.removesuffix(self.lead) + WEIGHT
                found[full] = self.read(full, tensors, seen)
        return Recognised(found, config, {KEY: said}) if found else None

    def complete(self, tensors: Mapping[str, Stored], config: Config) -> None:
        """Refuse integers that no part makes a matrix of: they would be taken for weights."""
        said = config.get(KEY)
        if not isinstance(said, dict) or said.get("quant_method") != METHOD:
            return
        for name, tensor in tensors.items():
            if name.endswith(WEIGHT) and tensor.dtype in ("I8", "U8") and not tensor.parts:
                stem = name.removesuffix(WEIGHT)
                raise MoetoolError(
                    "a matrix of bitsandbytes lacks a part",
                    tensor=name,
                    expected=f"{stem}.SCB" if tensor.dtype == "I8" else f"{name}.quant_state...",
                    found=f"{tensor.dtype} {list(tensor.shape)} alone",
                    hint="the checkpoint is incomplete: download it again",
                )

    def config(self, config: Config, told: Config, written: Written) -> Config:
        dtype, before = float_of(config), told.get(KEY)
        each = [self.said(params, dtype) for _, params in written.matrices.values()]
        if KEY in config or any(said != each[0] for said in each):
            raise MoetoolError(
                "bitsandbytes stores the matrices of a model in one format",
                expected="the same format for every role",
                hint="ask for one of nf4, nf4-double, fp4, fp4-double and bnb-int8",
            )
        said: JsonObject = dict(before or {**_PLAIN, **each[0]})
        full = _modules(written.new if before else written.full)
        if full or not before:
            head = [] if _HEAD + WEIGHT in written.matrices else [_HEAD]
            said[SKIPPED] = list(dict.fromkeys([*(said.get(SKIPPED) or head), *full]))
        return config | {KEY: said}


def _modules(full: Iterable[Target]) -> list[str]:
    """Modules of full matrices, which a loader must leave alone."""
    names = [t.name for t in full if len(t.shape) == 2 and t.name.endswith(WEIGHT)]
    return [name.removesuffix(WEIGHT) for name in dict.fromkeys(names)]


def part(tensors: Mapping[str, Stored], full: str, name: str, dtypes: tuple[str, ...]) -> Stored:
    """A part of a matrix; MoetoolError where it lacks, or is something else."""
    found = tensors.get(name)
    if found is None or found.dtype not in dtypes:
        raise MoetoolError(
            "a matrix of bitsandbytes lacks a part",
            tensor=full,
            expected=f"{name} in {' or '.join(dtypes)}",
            found=f"{found.dtype} {list(found.shape)}" if found else "nothing",
            hint="the checkpoint is incomplete: download it again",
        )
    return found
