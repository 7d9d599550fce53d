"""The cells of the reload matrix: a family in a format, written by moetool, and what every loader
should make of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clients import shapes
from moetool import verbs
from moetool.methods import quantize  # noqa: F401 - its ways are found below this name
from moetool.methods.quantize import scheme
from moetool.methods.quantize.options import Quantizing
from moetool.surgery import clients, forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.clients import Assigned

GROUPS = ("int4/32", "int8/channel")  # beside the usual group of every format
SLOW = ("int5", "int6", "int7")
# Forms whose linears round their input too in some loaders: the logits of those tell nothing.
ROUNDS_INPUT = ("fp8", "int8_activations", "bnb_int8", "bitnet", "nvfp4", "mxfp8")
FORCED = ("ternary",)  # these models were not trained so
STACKED = ("mxfp4",)  # forms of stacked experts: gpt-oss has no others


def formats() -> tuple[str, ...]:
    """Every word of --format that is written as safetensors, and some groups."""
    words = [w for w, form in forms.formats().items() if form != "gguf"]
    return (*words, *GROUPS)


@dataclass(frozen=True)
class Cell:
    """A family in a format, below a folder."""

    family: str
    format: str
    root: Path

    @property
    def plan(self) -> str:
        """What quantize is asked for: everything; of gpt-oss the part that the form can hold."""
        if self.family != "gpt_oss":
            return ",".join(f"{role}={self.format}" for role in scheme.EVERY_LINEAR)
        stacked = forms.asked(self.format).form in STACKED
        return f"{'experts' if stacked else 'attn'}={self.format}"

    @cached_property
    def source(self) -> Path:
        """The model itself, written once a root."""
        folder = self.root / self.family
        return folder if folder.exists() else shapes.save(self.family, folder)

    @cached_property
    def choice(self) -> scheme.Choice:
        """Which matrix gets which format. MoetoolError where a form cannot hold one."""
        options = Quantizing(plan=self.plan)
        return scheme.choose(Checkpoint.open(self.source), scheme.Scheme.of(options))

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
        out = self.root / f"{self.family}-{self.format.replace('/', '-')}"
        back = out.with_name(f"{out.name}-back")
        if not back.exists():
            quantize_, dequantize = verbs.make("quantize"), verbs.make("dequantize")
            force = self.state(loader) != "works" or self.format in FORCED
            said = {"plan": self.plan, "method": "rtn", "force": force, "for_": loader}
            quantize_(str(self.source), str(out), **said)
            dequantize(str(out), str(back))
        return out, back
