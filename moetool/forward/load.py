"""moetool.load: a model as stock transformers computes with it, experts packed where its own loader
has no place for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.forward import stock
from moetool.surgery import clients, forms, groups, sound, source
from moetool.surgery.active import Matching
from moetool.surgery.checkpoint import Checkpoint, read_json
from moetool.surgery.forms.bitsandbytes import KEY, METHOD
from moetool.surgery.spec import whole

_LOADER = "transformers5"
_PACKED, _UNPACKED = "use", "load"
_STRAIGHT = "ste"  # the gradient goes straight through rounding


def load(
    path: str | Path,
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    unpack: str = "use",
    train: str = "",
    **options: Any,
) -> Any:
    """The model at `path` (a folder, or org/name on the Hub) in its stock transformers class.

    What transformers 5 loads by itself goes through its `from_pretrained`. Experts in nf4, fp4 or
    bnb-int8, which it does not load, stay packed in memory: a quarter or half of bf16, scales
    beside them. `dtype` is what is computed in (torch.bfloat16, "float32", ...; auto: as the config
    says), `device_map` and `options` are those of `from_pretrained`.

    `unpack` says when ternary experts leave their two bits a weight: at each `use` (small), or once
    at `load` (fast, with as much memory as experts in full).

    `train="ste"` is for training ternary experts: each holds its weights in full beside (float32;
    those of the FFN where it was rounded from them), computes with these rounded, and passes the
    gradient on to them (MoTE, BitNet). `save_pretrained` writes packed codes again, with which a
    model computes what the trained one does; the weights in full are not kept.

    Raises MoetoolError for what is no checkpoint, for a package that is missing, and for forms that
    no loader here reads.
    """
    folder = str(source.locate(str(path)))
    how = {"dtype": _dtype(dtype), "device_map": device_map, **options}
    if _has_groups(folder):
        return _with_groups(folder, unpack, train, how)
    if unpack != _PACKED:
        raise _nothing_to_unpack(unpack, folder)
    if train:
        raise _nothing_to_train(train, folder)
    opened = Checkpoint.open(folder)
    if opened.hub_class:
        with stock.quietly():
            return stock.filled(opened, **how)
    packed = _packed_experts(opened)
    _require(opened)
    raw = read_json(Path(opened.folder) / "config.json", what="model config")
    config = stock.config(raw, opened.folder)
    if not packed:
        return stock.model_class(raw).from_pretrained(opened.folder, config=config, **how)
    return _with_experts(opened, raw, config, how)


def _has_groups(folder: str) -> bool:
    """Whether it holds groups of experts that no stock class does."""
    path = Path(folder) / "config.json"
    return path.is_file() and groups.is_ours(read_json(path, what="model config"))


def _with_groups(folder: str, unpack: str, train: str, how: JsonObject) -> Any:
    """A model with groups of experts in its derived class, every tensor in its place."""
    from moetool.modeling.block import blocks
    from moetool.modeling.piece import GrownPart

    if unpack not in (_PACKED, _UNPACKED):
        raise _nothing_to_unpack(unpack, folder)
    if train not in ("", _STRAIGHT) or (train and unpack == _UNPACKED):
        raise _nothing_to_train(train, folder)
    sound.check(Checkpoint.open(folder))
    raw = read_json(Path(folder) / "config.json", what="model config")
    with stock.quietly():
        made, info = stock.model_class(raw).from_pretrained(
            folder,
            config=stock.config(raw, folder),
            output_loading_info=True,
            trust_remote_code=False,
            **how,
        )
    refuse_other(folder, {k: set(v) for k, v in info.items()}, set())
    for module in made.modules() if unpack == _UNPACKED else ():
        if isinstance(module, GrownPart):
            module.unpack(made.dtype)
    if train and not any([*map(_hold_masters, blocks(made))]):
        raise _nothing_to_train(train, folder)
    return made


def _hold_masters(block: Any) -> bool:
    """Of all its groups; whether one trains weights in full now."""
    every = [getattr(block, group.name) for group, _ in block.held]
    return True in [experts.hold_masters(block) for experts in every]


def _nothing_to_train(said: str, folder: str) -> MoetoolError:
    return MoetoolError(
        f"train={said!r} means nothing for this model",
        file=folder,
        expected=f"nothing, or for ternary experts that stay packed {_STRAIGHT}",
        found=said,
        hint="leave it out: all other experts are trained as they are",
    )


def _nothing_to_unpack(said: str, folder: str) -> MoetoolError:
    return MoetoolError(
        f"unpack={said!r} means nothing for this model",
        file=folder,
        expected=f"{_PACKED}, or for ternary experts {_UNPACKED}",
        found=said,
        hint="leave it out",
    )


def _dtype(said: Any) -> Any:
    """A torch dtype, or "auto"; MoetoolError for words that name none."""
    import torch

    found = getattr(torch, said, None) if isinstance(said, str) and said != "auto" else said
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise MoetoolError(
            f"{said!r} is no dtype to compute in",
            expected="auto, float32, bfloat16, float16",
            hint="for example dtype='bfloat16'",
        )
    return found


def _packed_experts(opened: Checkpoint) -> bool:
    """Whether routed experts are in a form of bitsandbytes. MoetoolError for any form, of experts
    or others, that transformers does not read and that does not run here.
    """
    matching = Matching.of(opened.config, opened.tensors)
    found = False
    for stored in opened.tensors.values():
        if stored.parts is None:
            continue
        matched = matching.match(stored.name)
        expert = matched is not None and (matched.slot.role or "").startswith("expert.")
        name, params = stored.parts.form, stored.parts.params
        if not forms.named(name).alone:
            raise MoetoolError(
                f"transformers has no class for experts stored as {name}",
                file=opened.folder,
                hint="write them in full with `moetool dequantize`, and load that",
            )
        told = clients.verdict(_LOADER, name, params, moe=expert)
        mine = expert and forms.named(name).quant_method == METHOD
        found = found or mine
        if told.state in ("refuses", "wrong") and not mine:
            raise MoetoolError(
                f"transformers does not load this model as it is stored: {told.why}",
                file=opened.folder,
                tensor=stored.name,
                found=f"{'experts' if expert else 'a matrix'} in {name}",
                hint="write it in full with `moetool dequantize`, and load that",
            )
    return found


def _require(opened: Checkpoint) -> None:
    """MoetoolError where a package that a form needs is not installed."""
    import importlib.util

    needed = {forms.named(name).quant_method.replace("-", "_") for name in opened.told}
    for package in sorted(needed & {METHOD, "compressed_tensors"}):
        if importlib.util.find_spec(package) is None:
            word = package.replace("_", "-")
            raise MoetoolError(
                f"{word} is not installed, and this model is stored in its form",
                file=opened.folder,
                hint=f"pip install {word}",
            )


def _with_experts(opened: Checkpoint, raw: JsonObject, config: Any, how: JsonObject) -> Any:
    """Everything but the experts as transformers loads it, and these in their form."""
    import torch

    from moetool.modeling import bitsandbytes, stacks

    named = config.get_text_config(decoder=True).dtype or torch.bfloat16
    dtype = named if how["dtype"] == "auto" else how["dtype"]
    held = bitsandbytes.PackedStacks(opened, stacks.stacks(opened), dtype)
    del config.quantization_config
    with stock.quietly():
        model, info = stock.model_class(raw).from_pretrained(
            None,
            config=config,
            state_dict=_rest(opened, held.parts),
            quantization_config=bitsandbytes.told(raw[KEY], held),
            output_loading_info=True,
            **{**held.options, **how, "dtype": dtype},
        )
    refuse_other(opened.folder, {k: set(v) for k, v in info.items()}, held.names)
    bitsandbytes.settle(model, dtype)
    model.config.name_or_path = opened.folder
    if model.can_generate() and (Path(opened.folder) / "generation_config.json").exists():
        model.generation_config = stock.library().GenerationConfig.from_pretrained(opened.folder)
    return model


def _rest(opened: Checkpoint, packed: set[str]) -> dict[str, Any]:
    """Every tensor as it lies in the files, but those that experts are made of."""
    from moetool.kernels import codec

    return {
        name: codec.decode(opened.read(whole(stored)), stored.dtype, stored.shape)
        for name, stored in opened.stored.items()
        if name not in packed
    }


def refuse_other(folder: str, info: dict[str, set[str]], expected: set[str]) -> None:
    """MoetoolError where transformers missed anything but the experts, or knew something not."""
    found = {k: v - expected if k == "missing_keys" else v for k, v in info.items()}
    wrong = {k: sorted(map(str, v)) for k, v in found.items() if v}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise MoetoolError(
            "transformers did not load the whole model",
            file=folder,
            tensor=names[0],
            found=f"{len(names)} {kind.replace('_', ' ')}",
            hint="`moetool verify` says what the checkpoint lacks",
        )
