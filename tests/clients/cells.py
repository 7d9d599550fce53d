"""The cells of the reload matrix: a family in a format, written by moetool, and what every loader
should make of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from clients import shapes
from moetool import verbs
from moetool.errors import UsageError
from moetool.methods import quantize  # noqa: F401 - its ways are found below this name
from moetool.methods.quantize import scheme
from moetool.methods.quantize.options import Quantizing
from moetool.surgery import clients, forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Assigned

GROUPS = ("int4/32", "int8/channel")  # beside the usual group of every format
SLOW = ("int5", "int6", "int7")
# What a linear puts out may differ by so much of its largest value, where a loader rounds its input
# too (fp8 to 3 bits of mantissa, the others to 8 bits) or has kernels of its own.
NEAR = {
    "fp8": 0.06,
    "fp8_ct_block": 0.06,
    "int8_activations": 0.03,
    "bnb_int8": 0.03,
    "bitnet": 0.03,
    "nvfp4": 0.1,
    "mxfp8": 0.06,
    "nf4": 0.01,
    "fp4": 0.01,
}
FORCED = ("ternary",)  # these models were not trained so


def formats() -> tuple[str, ...]:
    """Every word of --format that is written as safetensors, and some groups."""
    words = [w for w, form in forms.formats().items() if not w.startswith("gguf")]
    return (*words, *GROUPS)


@dataclass(frozen=True)
class Cell:
    """A family in a format, or in a plan of its own, below a folder."""

    family: str
    format: str
    root: Path
    own: str = ""

    @property
    def asked(self) -> dict[str, str]:
        """What quantize is asked for: everything; of gpt-oss, whose experts only its own mxfp4
        holds, the attention.
        """
        if self.own:
            return {"plan": self.own}
        if self.family == "gpt_oss" and self.format != "mxfp4" and ":" not in self.format:
            return {"plan": f"attn={self.format}"}
        return {"format": self.format}

    @cached_property
    def source(self) -> Path:
        """The model itself, written once a root."""
        folder = self.root / self.family
        return folder if folder.exists() else shapes.save(self.family, folder)

    @cached_property
    def choice(self) -> scheme.Choice:
        """Which matrix gets which format. MoetoolError where a form cannot hold one."""
        options = Quantizing(**self.asked, force=True)
        source = Checkpoint.open(self.source)
        return scheme.choose(source, scheme.Scheme.of(options), options)

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names in the source."""
        return frozenset(Checkpoint.open(self.source).tensors)

    @property
    def assigned(self) -> list[Assigned]:
        """The matrices as the data of loaders wants to hear of them."""
        found = []
        for name, matrix in self.choice.matrices.items():
            spelled = self.choice.formats.get(name)
            form, params = (spelled.form, spelled.params) if spelled else ("full", {})
            where = {"name": name, "shape": tuple(matrix.shape), "layer": matrix.layer}
            where["bias"] = name.removesuffix("weight") + "bias" in self.tensors
            found.append(Assigned(matrix.role, form, params, str(spelled or ""), **where))
        return found

    def state(self, loader: str) -> str:
        """The worst that the data says of it."""
        said = {refusal.state for refusal in clients.refusals(loader, self.assigned)}
        return next((s for s in ("refuses", "wrong", "untried") if s in said), "works")

    def write(self, loader: str) -> tuple[Path, Path]:
        """The quantized checkpoint and the same dequantized."""
        out = self.root / f"{self.family}-{(self.own or self.format).replace('/', '-')}"
        back = out.with_name(f"{out.name}-back")
        if not back.exists():
            quantize_, dequantize = verbs.make("quantize"), verbs.make("dequantize")
            said = {**self.asked, "method": "rtn", "for_": loader}
            said["loader_check"] = False  # that is what the tests do themselves
            refused = any(not r.through for r in clients.refusals(loader, self.assigned))
            if refused:
                with pytest.raises(UsageError, match=re.escape(loader)):
                    quantize_(str(self.source), str(out), **said)
            force = refused or self.format in FORCED
            quantize_(str(self.source), str(out), **said, force=force)
            dequantize(str(out), str(back))
        return out, back
