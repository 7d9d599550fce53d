"""Layers with numbers of experts of their own (surgery/ragged.py): each is the stock layer, built
from the config that it would have in a model whose layers were all like it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moetool.modeling import balance, calibration
from moetool.modeling.sites.site import stack
from moetool.surgery import calibrated, groups
from moetool.surgery.layout import Layout
from moetool.surgery.text_model import text_model

Tensor = torch.Tensor
Run = Callable[..., Any]
_ASKED = "output_router_logits"


def rebuild(model: Any) -> None:
    """Give the layers of a stock model the numbers of experts that its config says. MoetoolError
    for a config that says none.
    """
    if not groups.is_ragged({groups.MODEL_TYPE: model.config.moetool}):
        return
    at = text_model(model.config.to_dict() | {groups.MODEL_TYPE: model.config.moetool})
    text, layers = model.config, stack(model, at.layout)
    for part in at.path:
        text = getattr(text, part)
    for number, count in at.own_counts().items():
        own = text.per_layer_config[number]
        top_k = at.layout.fields["top_k"]
        setattr(own, top_k, min(getattr(own, top_k), count))
        layers[number] = made = type(layers[number])(own, number)
        for module in made.modules():
            if getattr(module, "config", None) is own:
                module.config = text  # what is set on the model later is set on all of it
    if at.calibration:
        name = calibrated.stem(at.layout).rpartition(".")[2]
        field = at.layout.fields.get("renorm", "")
        known = at.layout.overlay.law.renorm == "always" or bool(at.text.get(field))
        calibration.attach(layers, at.calibration, name=name, renormalises=known)


def scored(model: Any, run: Run, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One forward pass of a ragged model. Where router logits are asked for, these as the stock
    class gives them, and its balance loss of each layer, whose mean counts: the stock sum over all
    layers takes them for alike. A backbone, which has no loss, gives them as wide (`alike`).
    """
    config = model.config.get_text_config()
    asked = kwargs.pop(_ASKED, None)
    asked = getattr(config, _ASKED, False) if asked is None else asked
    if model.base_model is model:
        made = run(*args, **kwargs, **({_ASKED: True} if asked else {}))
        if asked and not isinstance(made, tuple):
            made["router_logits"] = balance.alike(made.get("router_logits") or ())
        return made
    silent = {_ASKED: False} if hasattr(config, _ASKED) else {}
    if not asked:
        return run(*args, **kwargs, **silent)
    whole = kwargs.pop("return_dict", None)
    whole = model.config.return_dict if whole is None else whole
    seen: list[Tensor] = []
    hooks = _listen(model.base_model, seen)
    try:
        made = run(*args, **kwargs, **silent, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    made["router_logits"] = tuple(seen)
    made["aux_loss"] = loss = _balance(model, config, seen, kwargs.get("attention_mask"))
    if made.get("loss") is not None and loss is not None:
        made["loss"] = made.loss + config.router_aux_loss_coef * loss.to(made.loss.device)
    return made if whole else made.to_tuple()


def _listen(backbone: Any, seen: list[Tensor]) -> tuple[Any, Any]:
    """Ask the backbone for its router logits, and keep them."""

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, _ASKED: True}

    def keep(module: Any, args: Any, made: Any) -> None:
        seen.extend(made.get("router_logits") or ())

    first = backbone.register_forward_pre_hook(ask, with_kwargs=True)
    return first, backbone.register_forward_hook(keep)


def _balance(model: Any, config: Any, seen: Sequence[Tensor], mask: Tensor | None) -> Tensor | None:
    """The mean over layers of the family's own balance loss; None where it has none."""
    stock = sys.modules[model.stock.__module__]
    loss: Run | None = getattr(stock, "load_balancing_loss_func", None)
    if loss is None or not seen or not hasattr(config, "router_aux_loss_coef"):
        return None
    top_k = getattr(config, Layout.load(model.config.base_model_type).fields["top_k"])
    each = [
        loss((one,), one.shape[-1], min(top_k, one.shape[-1]), mask).to(seen[0].device)
        for one in seen
    ]
    return torch.stack(each).mean()
