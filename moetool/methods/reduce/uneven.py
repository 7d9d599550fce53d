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
    """One of options.UNEVEN but `auto`, which means ragged where the family's class and every
    client of --for can have that, else ghost where it is exact, else uniform: there is nothing that
    both saves and loads.
    """
    if options.uneven != AUTO:
        return options.uneven
    if not (_strangers(options) or mixture.text_model.must_be_alike()):
        return "ragged"
    return "ghost" if _pads(mixture) else "uniform"


def check(mixture: Mixture, options: Reducing) -> None:
    """Refuse, before any work, layers of different numbers that could not be written."""
    if options.budget == "uniform":
        return
    how, strangers = of(mixture, options), _strangers(options)
    if how == "ghost":
        for layer in mixture.layers:
            check_ghost(mixture, layer)
    why = mixture.text_model.must_be_alike()
    if how == "uniform" or (how == "ragged" and (strangers or why)):
        ghost = "--uneven ghost pads them exactly; " if _pads(mixture) else ""
        cannot = f"which {', '.join(strangers)} cannot read" if strangers else f"and {why}"
        raise UsageError(
            f"--budget {options.budget} keeps other numbers of experts in each layer, {cannot}",
            expected="layers that are alike, or padded",
            found=" ".join(
                [f"--uneven {options.uneven}", *(f"--for {name}" for name in options.named)]
            ),
            hint=f"{ghost}--budget uniform; --uneven zeroed loads there and saves nothing",
        )


def check_ghost(mixture: Mixture, layer: int) -> None:
    """Refuse experts that are only there to be counted where a router would choose them."""
    if why := _why_no_ghost(mixture, layer):
        hint = "--budget uniform, or --uneven zeroed or ragged"
        raise UsageError(why, tensor=f"layer {layer}", hint=hint)


def _pads(mixture: Mixture) -> bool:
    """Whether empty experts change nothing in any layer."""
    return not any(_why_no_ghost(mixture, layer) for layer in mixture.layers)


def _why_no_ghost(mixture: Mixture, layer: int) -> str:
    if mixture.side(layer, "router.bias") is None:
        return f"ghost experts need a selection bias, and {mixture.layout.model_type} has none"
    grouped = "ghost experts would shift the groups of a group-limited router"
    return grouped if mixture.groups > 1 else ""


def _strangers(options: Reducing) -> list[str]:
    """The clients of --for that read no layers of different numbers."""
    output = Traits(RAGGED, {"container": "safetensors"})
    return [name for name in options.named if clients.model(name, output).state != "works"]
