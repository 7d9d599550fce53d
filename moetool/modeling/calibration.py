"""What corrects the weights that a router gives (surgery/calibrated.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moetool.errors import MoetoolError
from moetool.modeling.piece import GrownPart
from moetool.surgery.calibrated import NAME, Correction

Tensor = torch.Tensor
_STD = 0.02


class _Matrix(nn.Module):
    """A linear without a bias, of no class that a quantizer takes."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, into))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class RouterCalibration(GrownPart):
    """C(p): linear, GELU, linear, without biases; zero at birth. MoExtend's `WeightScale`."""

    def __init__(self, experts: int, width: int, renormalises: bool) -> None:
        super().__init__()
        self.renormalises = renormalises
        self.up, self.down = _Matrix(experts, width), _Matrix(width, experts)

    def reset(self) -> None:
        from transformers import initialization as init

        init.normal_(self.up.weight, 0.0, _STD)
        init.zeros_(self.down.weight)

    def forward(self, shares: Tensor) -> Tensor:
        """[tokens, experts] -> what is added to it."""
        made: Tensor = self.down(functional.gelu(self.up(shares)))
        return made

    def corrected(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weights [tokens, k] of the chosen experts, float32."""
        shares = logits.float().softmax(-1)
        dtype = self.up.weight.dtype
        weights: Tensor = (shares + self(shares.to(dtype)).float()).gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True) if self.renormalises else weights


def attach(layers: nn.ModuleList, held: Correction, *, name: str, renormalises: bool) -> None:
    """Give routers, called `name` in their layers, one each. MoetoolError where a layer has no such
    module.
    """
    for number in held.layers:
        found = [m for n, m in layers[number].named_modules() if n.rpartition(".")[2] == name]
        routers = [m for m in found if isinstance(getattr(m, "weight", None), Tensor)]
        if len(routers) != 1:
            raise MoetoolError(
                "no router that could be corrected",
                tensor=f"layer {number}",
                expected=f"one module called {name} with a weight",
                found=len(routers),
                hint="the config was written by another moetool, or edited",
            )
        experts = routers[0].weight.shape[0]  # type: ignore[union-attr,index]
        routers[0].add_module(NAME, RouterCalibration(experts, held.width, renormalises))
        routers[0].register_forward_hook(_correct)


def _correct(router: Any, args: Any, made: Any) -> Any:
    """What a router of transformers 5 gives: logits, weights, numbers of experts."""
    logits, weights, chosen = made
    right = router.calibration.corrected(logits, chosen).to(weights.dtype)
    given = (logits, right, chosen)
    return given
