"""transformers' loader of bitsandbytes checkpoints, with experts.

Its quantizers know linears alone; these two do what they do, and before weights are loaded put
memory for packed experts into the place of the stacked parameters, to be filled afterwards. 4-bit
experts become bitsandbytes' own parametrization of a parameter, which runs with every experts
implementation; 8-bit ones, for which it has none, are `Packed`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import nn

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.modeling.packed import Packed
from moetool.modeling.stacks import Stack, parts
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.forms.bnb_4bit import BLOCK, Bnb4Bit

Tensor = torch.Tensor
_FOUR, _EIGHT = "moetool_4bit", "moetool_8bit"


@dataclass
class PackedStacks:
    """The stacked experts of a model, and the dtype it computes in."""

    source: Checkpoint
    stacks: list[Stack]
    dtype: torch.dtype

    def __deepcopy__(self, memo: object) -> PackedStacks:
        """Itself, a value: transformers copies its quantizer for every tensor that it loads."""
        return self

    @property
    def names(self) -> set[str]:
        """The parameters that come from here, and that a loader misses."""
        made: set[str] = set()
        for stack in self.stacks:
            lying = range(len(stack.like.tensors))
            packed = {f"{stack.name}.part{number}" for number in lying}
            made |= {stack.name} if _stackable(stack) else packed
        return made

    @property
    def parts(self) -> set[str]:
        """Names in the file of all that experts are made of."""
        every = chain.from_iterable(stack.matrices for stack in self.stacks)
        return {p.name for p in chain.from_iterable(m.lying for m in every)}

    @property
    def options(self) -> JsonObject:
        """What `from_pretrained` must be told."""
        one_by_one = not all(map(_stackable, self.stacks))
        return {"experts_implementation": "eager"} if one_by_one else {}

    def place(self, model: nn.Module) -> None:
        """Memory for packed experts (still on the meta device) for full ones."""
        for stack in self.stacks:
            module, name = _owner(model, stack)
            module._is_hf_initialized = True  # type: ignore[assignment]
            delattr(module, name)
            if _stackable(stack):
                count = stack.shape[0] * stack.shape[1] * stack.shape[2] // 2
                made = torch.empty((count, 1), dtype=torch.uint8, device="meta")
                module.register_parameter(name, nn.Parameter(made, requires_grad=False))
            else:
                setattr(module, name, Packed(stack, self.dtype))

    def fill(self, model: nn.Module) -> None:
        """Read them."""
        for stack in self.stacks:
            module, name = _owner(model, stack)
            held = getattr(module, name)
            if isinstance(held, Packed):
                held.fill(self.source, stack)
            else:
                self._parametrize(module, name, stack)

    def _parametrize(self, module: nn.Module, name: str, stack: Stack) -> None:
        """The packed bytes of all experts as one 4-bit parameter of bitsandbytes."""
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

        form, params = forms.named(stack.like.form), stack.like.params
        assert isinstance(form, Bnb4Bit)
        held = module.get_parameter(name).data
        scales, at = [], 0
        for matrix in stack.matrices:
            packed, table, *rest = parts(self.source, matrix)
            held[at : at + len(packed)].copy_(packed)
            scales.append(form.scales(*rest))
            at += len(packed)
        state = {
            "quant_type": form.name,
            "absmax": torch.cat(scales),
            "quant_map": table,
            "blocksize": params.get("block", BLOCK),
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": stack.shape,
        }
        replace_parameter_4bit_prequantized(module, name, state, held.device)


def _stackable(stack: Stack) -> bool:
    """Whether blocks of 4 bits do not run on from one matrix into the next."""
    form, params = forms.named(stack.like.form), stack.like.params
    block = params.get("block", BLOCK)
    return isinstance(form, Bnb4Bit) and all(m.elements % block == 0 for m in stack.matrices)


def _owner(model: nn.Module, stack: Stack) -> tuple[nn.Module, str]:
    """The module of a stacked parameter, and its name there."""
    head, _, name = stack.name.rpartition(".")
    try:
        module = model.get_submodule(head)
        getattr(module, name)
    except AttributeError:
        raise MoetoolError(
            "the installed transformers holds the experts of this model in another way",
            tensor=stack.name,
            expected="a stacked parameter",
            hint="upgrade transformers, or write it in full with `moetool dequantize`",
        ) from None
    return module, name


def told(said: JsonObject, held: PackedStacks) -> Any:
    """The quantization config that makes transformers load linears as bitsandbytes does, and the
    experts of `held`. `said`: what the checkpoint's config says.
    """
    fields = {k: v for k, v in said.items() if k != "quant_method" and not k.startswith("_")}
    made = _plugin()(**{**fields, "bnb_4bit_compute_dtype": held.dtype})
    made.quant_method, made.held = (_FOUR if made.load_in_4bit else _EIGHT), held
    return made


def settle(model: Any, dtype: torch.dtype) -> None:
    """The config as transformers has it, full weights in `dtype` (stock loading leaves them as the
    file has them), and linears that compute in it.
    """
    from transformers import BitsAndBytesConfig

    said = model.config.quantization_config.to_dict()
    known = {k: v for k, v in said.items() if k != "quant_method" and not k.startswith("_")}
    model.config.quantization_config = BitsAndBytesConfig(**known)
    model.quantization_method = model.config.quantization_config.quant_method
    kept = model._get_dtype_plan(dtype)  # what the family wants in float32
    for head, module in model.named_modules():
        _settle_linear(head, module, dtype)
        for name, held in module.named_parameters(head, recurse=False):
            full = held.is_floating_point() and not isinstance(module, Packed)
            if full and not any(re.search(pattern, name) for pattern in kept):
                held.data = held.data.to(dtype)


def _settle_linear(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """On CPUs with bf16 bitsandbytes rounds every 4-bit linear to it, and asserts that 32 divides
    its rows; and with AVX-512 it decodes some widths wrongly. MoetoolError for the last.
    """
    from bitsandbytes import nn as theirs

    if not isinstance(module, theirs.Linear4bit):  # type: ignore[attr-defined]
        return
    if module.in_features % BLOCK and module.weight.device.type == "cpu":
        raise MoetoolError(
            "bitsandbytes decodes a 4-bit matrix of this width wrongly on CPUs with AVX-512",
            tensor=f"{name}.weight",
            expected=f"an input width that {BLOCK} divides",
            found=module.in_features,
            hint="write it in full with `moetool dequantize`, or load it on a GPU",
        )
    if module.out_features % 32 or dtype != torch.bfloat16:
        module.support_avx512bf16_for_cpu = False


@lru_cache(maxsize=1)
def _plugin() -> Any:
    """The config class, with quantizers registered that know it."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    class Told(BitsAndBytesConfig):  # type: ignore[misc]
        held: PackedStacks

        def to_dict(self) -> JsonObject:
            """Without what is no JSON."""
            held = self.__dict__.pop("held")
            made: JsonObject = super().to_dict()
            self.held = held
            return made

    class Loader:
        """What both have to do."""

        def __init__(self, said: Told, **how: Any) -> None:
            super().__init__(said, **{**how, "pre_quantized": True})  # type: ignore[call-arg]

        def _process_model_before_weight_loading(self, model: Any, *args: Any, **how: Any) -> None:
            super()._process_model_before_weight_loading(model, *args, **how)  # type: ignore[misc]
            self.quantization_config.held.place(model)  # type: ignore[attr-defined]

        def _process_model_after_weight_loading(self, model: Any, **how: Any) -> Any:
            self.quantization_config.held.fill(model)  # type: ignore[attr-defined]
            return super()._process_model_after_weight_loading(model, **how)  # type: ignore[misc]

    for name, base in ((_FOUR, Bnb4BitHfQuantizer), (_EIGHT, Bnb8BitHfQuantizer)):
        register_quantization_config(name)(Told)
        register_quantizer(name)(type(name, (Loader, base), {}))
    return Told
