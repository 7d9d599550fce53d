"""How layers with different numbers of experts are written: --uneven, and what `auto` means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.errors import UsageError
from moetool.surgery import clients
from moetool.surgery.clients.traits import RAGGED, Traits

if TYPE_CHECKING:
    from moetool.methods.reduce.options import Reducing
    from moetool.surgery.experts import Mixture

AUTO = "auto"


def of(mixture: Mixture, options: Reducing) -> str:
    """One of options.UNEVEN but `auto`, which means ragged where every client of --for reads that,
    else ghost where it is exact, else uniform: there is nothing that both saves and loads.
    """
    if options.uneven != AUTO:
        return options.uneven
    if not _strangers(options):
        return "ragged"
    return "uniform" if any(_why_no_ghost(mixture, n) for n in mixture.layers) else "ghost"


def check(mixture: Mixture, options: Reducing) -> None:
    """Refuse, before any work, layers of different numbers that could not be written."""
    if options.budget == "uniform":
        return
    how, strangers = of(mixture, options), ", ".join(_strangers(options))
    if how == "ghost":
        for layer in mixture.layers:
            check_ghost(mixture, layer)
    if how == "uniform" or (how == "ragged" and strangers):
        padded = not any(_why_no_ghost(mixture, n) for n in mixture.layers)
        ghost = "--uneven ghost pads them exactly; " if padded else ""
        raise UsageError(
            f"--budget {options.budget} keeps other numbers of experts in each layer, which {strangers} cannot read",
            expected="layers that are alike, or padded",
            found=f"--uneven {options.uneven} --for {','.join(options.named)}",
            hint=f"{ghost}--budget uniform; --uneven zeroed loads there and saves nothing",
        )


def check_ghost(mixture: Mixture, layer: int) -> None:
    """Refuse experts that are only there to be counted where a router would choose them."""
    if why := _why_no_ghost(mixture, layer):
        hint = "--budget uniform, or --uneven zeroed or ragged"
        raise UsageError(why, tensor=f"layer {layer}", hint=hint)


def _why_no_ghost(mixture: Mixture, layer: int) -> str:
    if mixture.side(layer, "router.bias") is None:
        return f"ghost experts need a selection bias, and {mixture.layout.model_type} has none"
    grouped = "ghost experts would shift the groups of a group-limited router"
    return grouped if mixture.groups > 1 else ""


def _strangers(options: Reducing) -> list[str]:
    """The clients of --for that read no layers of different numbers."""
    output = Traits(RAGGED, {"container": "safetensors"})
    return [name for name in options.named if clients.model(name, output).state != "works"]
