"""Model classes with groups of experts: the stock class of a family, and what it lacks.

For training they answer what trainers ask of a mixture: `output_router_logits` and
`router_aux_loss_coef` in the config or the call, `aux_loss` and `router_logits` in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from moetool.errors import MoetoolError
from moetool.modeling import balance, passes, ragged, signals
from moetool.modeling.block import Grouped, blocks
from moetool.modeling.embedded import embedded
from moetool.modeling.generation import encoding, prepared, taking, told
from moetool.modeling.install import install
from moetool.modeling.piece import GrownPart
from moetool.surgery import groups, shim

Tensor = torch.Tensor
_PREPARE, _ASKED = "prepare_inputs_for_generation", "output_router_logits"
_ENCODE = "_maybe_prepare_encoder_kwargs_for_generation"
_FLOAT32 = ("weight_scale", "output_scale")  # of pieces; bf16 would round them


class Grown(PreTrainedModel):  # type: ignore[misc]
    """What derived classes have beside their stock class."""

    stock: ClassVar[type[Any]]
    usual: Mapping[str, float] = MappingProxyType({})  # signals that a caller leaves out

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the stock class does it. MoetoolError where a tensor of a group is missing (it would
        be random) or of no group that the config speaks of (it would be left out), of which
        transformers only warns; and where one has not the shape that the config says.
        """
        asked = kwargs.pop("output_loading_info", False)
        said = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        made, info = super().from_pretrained(*args, **{**said, **kwargs})
        if not kwargs.get("ignore_mismatched_sizes"):
            _refuse_mismatched(made, info)
        _refuse_missing(made, info)
        _refuse_left(made, info)
        _refuse_damaged(made)
        _admit_training(made)
        return (made, info) if asked else made

    @classmethod
    def is_custom_code(cls) -> bool:
        """First values are given as the library's own code gives them, tensor by tensor: it must
        not leave out a module without tensors of its own, which fills those of others (FalconH1).
        """
        return False

    def initialize_weights(self) -> None:
        """Experts and routers too: submodels of the stock class do not know them. Nothing where the
        stock class would look for linears that are gone.
        """
        for module in self.modules():
            if isinstance(module, Grouped) and any(g.base == "gone" for g, _ in module.held):
                module._is_hf_initialized = True  # type: ignore[assignment]
            if isinstance(module, GrownPart) and not getattr(module, "_is_hf_initialized", False):
                module.reset()
                module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Also the file that says to those without moetool what they need."""
        self.config.auto_map = dict(shim.AUTO_MAP)
        parts = [(n, m) for n, m in self.named_modules() if isinstance(m, GrownPart)]
        if any(m.trains_masters for _, m in parts):
            state = dict(kwargs.get("state_dict") or self.state_dict())
            for name, module in parts:
                module.written(state, f"{name}.")
            kwargs["state_dict"] = state
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            (Path(save_directory) / shim.FILE).write_text(shim.TEXT)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the stock class and the config say it: another process derives the class anew."""
        return (_blank, (self.stock, self.config), *tuple(super().__reduce_ex__(protocol))[2:])

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        _observe_backbone(self)  # pickle keeps the name of a method alone


def _refuse_missing(model: Any, info: dict[str, Any]) -> None:
    """MoetoolError where the files lack a tensor that only groups of experts have."""
    parts = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, GrownPart))
    lost = sorted(name for name in info["missing_keys"] if name.startswith(parts))
    if lost:
        raise MoetoolError(
            "a tensor of a group of experts is missing",
            file=str(model.config.name_or_path),
            tensor=lost[0],
            expected="every tensor that config.json speaks of",
            found=f"{len(lost)} missing",
            hint="`moetool verify` says what the checkpoint lacks: download or make it again",
        )


def _refuse_mismatched(model: Any, info: dict[str, Any]) -> None:
    """MoetoolError where a tensor has another shape than the config says."""
    for name, found, expected in sorted(info["mismatched_keys"], key=str):
        raise MoetoolError(
            "a tensor is not as config.json says",
            file=str(model.config.name_or_path),
            tensor=name,
            expected=list(expected),
            found=list(found),
            hint="restore the config.json that came with the model",
        )


def _refuse_left(model: Any, info: dict[str, Any]) -> None:
    """MoetoolError where the files have a tensor of a group that the config does not speak of, in
    a module that the model has: a class without a tower leaves out what lies there.
    """
    said = {
        "base_model_type": model.config.base_model_type,
        groups.MODEL_TYPE: model.config.moetool,
    }
    words = set(chain.from_iterable((g.name, g.router) for g in groups.read(said)))
    here, head = dict(model.named_modules()), f"{model.base_model_prefix}."
    left = []
    for name in info["unexpected_keys"]:
        parts = name.split(".")
        above = (n for n in range(1, len(parts)) if parts[n] in words)
        stems = [".".join(parts[:n]) for n in above]
        if any({stem, head + stem, stem.removeprefix(head)} & here.keys() for stem in stems):
            left.append(name)
    if left:
        raise MoetoolError(
            "a tensor of a group of experts that config.json does not speak of",
            file=str(model.config.name_or_path),
            tensor=min(left),
            expected="the config.json that came with the model",
            found=f"{len(left)} that would be left out",
            hint="restore config.json, or make the checkpoint again without this group",
        )


def _refuse_damaged(model: Any) -> None:
    """MoetoolError where a packed tensor of a group holds what cannot be; those that lie on disk
    are not read.
    """
    parts = ((name, m) for name, m in model.named_modules() if isinstance(m, GrownPart))
    for stem, part in parts:
        for name, held in part.named_parameters(recurse=False):
            if not held.is_meta and (wrong := part.flaw(name, held.data)):
                raise MoetoolError(
                    "a part of a packed matrix is damaged",
                    file=str(model.config.name_or_path),
                    tensor=f"{stem}.{name}",
                    expected=wrong[0],
                    found=wrong[1],
                    hint="download the checkpoint again, or make it again",
                )


def _admit_training(model: Any) -> None:
    """Trainers refuse a quantized model without adapters of PEFT, as one in which nothing can
    learn; groups of experts can, over a base that is quantized while it is loaded (QLoRA).
    """
    told = getattr(model, "hf_quantizer", None)
    parts = [m for m in model.modules() if isinstance(m, GrownPart)]
    own = chain.from_iterable(part.parameters() for part in parts)
    if told is not None and any(held.is_floating_point() for held in own):
        kind = type(told)
        told.__class__ = type(kind.__name__, (kind,), {"is_qat_trainable": kind.is_trainable})


def model_class(stock: type[Any], config: type[Any]) -> type[Any]:
    """`MoeLlamaForCausalLM` of `LlamaForCausalLM`, and its config class; one class however often it
    is asked for.
    """
    if stock not in _MADE:
        _MADE[stock] = _made(stock, config)
    return _MADE[stock]


def _blank(stock: type[Any], config: Any) -> Any:
    cls: Any = model_class(stock, type(config))
    return cls.__new__(cls)


_MADE: dict[type[Any], type[Any]] = {}


def _made(stock: type[Any], config: type[Any]) -> type[Any]:
    strict = set(stock._keep_in_fp32_modules_strict or ()) | set(_FLOAT32)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        said = {"base_model_type": config.base_model_type, groups.MODEL_TYPE: config.moetool}
        ragged.rebuild(self)
        if next(blocks(self), None) is None:  # the model inside was not made by an Auto class
            install(self, groups.read(said), config.base_model_type, config.to_dict())
        _observe_backbone(self)
        self.post_init()
        whole = set(self._no_split_modules or ())  # layers are among blocks
        there = {type(module).__name__ for module in self.modules()}  # FSDP refuses other names
        self._no_split_modules = whole | ({f"Moe{name}" for name in whole} & there)

    said = {
        "stock": stock,
        "__init__": wraps(stock.__init__)(__init__),
        "__module__": __name__,
        "__doc__": f"A {stock.__name__} with groups of experts.",
        "forward": _observed(stock.forward),
        "config_class": config,
        "_keep_in_fp32_modules_strict": strict,
    }
    if hasattr(stock, "generate") and hasattr(stock, _PREPARE):
        said |= {"generate": told(stock.generate)}
        if encode := getattr(stock, _ENCODE, None):
            said |= {_ENCODE: encoding(encode)}
        said |= {_PREPARE: prepared(stock.prepare_inputs_for_generation)}
    made = type(f"Moe{stock.__name__}", (Grown, stock), said)
    _copy_names(stock, made)
    return made


def _observe_backbone(model: Any) -> None:
    """Trainers that compute the loss themselves ask it, not the head."""
    backbone = model.base_model
    if backbone is not model:
        backbone.forward = MethodType(_observed(type(backbone).forward), backbone)


def _copy_names(stock: type[Any], made: type[Any]) -> None:
    """Names on disk are the stock class's: transformers looks for its renamings by class name."""
    from transformers import conversion_mapping as names

    found = names.get_checkpoint_conversion_mapping(stock.__name__)
    if found is None:
        found = names.get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if found is not None:
        names.register_checkpoint_conversion_mapping(made.__name__, found, overwrite=True)


def _observed(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The stock forward, with what routes and trainers look at; of a head and its backbone, which
    both have it, only the one that was called looks.
    """

    @wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_within", False):
            return stock(self, *args, **kwargs)
        inner = self.base_model
        inner._within = True
        try:
            return _looking(self, partial(stock, self), args, kwargs)
        finally:
            inner._within = False

    return taking(forward)


def _looking(self: Any, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """One forward pass, and where router logits are asked for, these and their loss."""
    held = [*blocks(self)]
    if not held:
        return ragged.scored(self, run, args, kwargs)
    heard = signals.note(held, args, kwargs, getattr(self, "usual", {}))
    if heard is None:
        return _scored(self, held, run, args, kwargs)
    try:
        with embedded(self, heard, held):
            passes.first(heard, held, run, args, kwargs)
            return _scored(self, held, run, args, kwargs)
    finally:
        heard.over = True


def _scored(
    self: Any, held: Sequence[Any], run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    asked = kwargs.pop(_ASKED, None)
    asked = self.config.output_router_logits if asked is None else asked
    if hasattr(getattr(type(self), "stock", type(self)).config_class, _ASKED):
        kwargs[_ASKED] = bool(asked)  # a family with experts of its own
    if not asked:
        made = run(*args, **kwargs)
        for name in ("aux_loss", "router_logits"):
            if not isinstance(made, tuple):
                setattr(made, name, None)
        return made
    whole = kwargs.pop("return_dict", None)
    whole = self.config.return_dict if whole is None else whole
    every = chain.from_iterable(block.held for block in held)
    masked = all(group.tower in groups.MASKED for group, _ in every)
    for block in held:
        block.seen = []
    try:
        made = run(*args, **kwargs, return_dict=True)
        seen = [*chain.from_iterable(block.seen or () for block in held)]
    finally:
        for block in held:
            block.seen = None
    loss = balance.mean(seen, kwargs.get("attention_mask") if masked else None)
    parts = [one for one in (made.get("aux_loss"), loss) if one is not None]
    made["aux_loss"] = sum(one.to(parts[0].device) for one in parts) if parts else None
    each = [*(made.get("router_logits") or ()), *(scores.logits for scores in seen)]
    made["router_logits"] = balance.alike(each) if self.base_model is self else tuple(each)
    if made.get("loss") is not None and loss is not None:
        made["loss"] = made.loss + self.config.router_aux_loss_coef * loss.to(made.loss.device)
    return made if whole else made.to_tuple()
