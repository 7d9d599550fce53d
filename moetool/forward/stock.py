"""The one place that asks transformers for a model, a config or a tokenizer.

A checkpoint is data here. transformers sees a folder made for the occasion: links to the weight
files that were read and to known companions, and a config without what would fetch or run code
(`auto_map`, kernels of the Hub, adapters, pickles). Standard input is nobody's but `-`'s: a
question that a library asks there is answered with an end of file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetool.data import JsonMapping, JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import companions, groups
from moetool.surgery.checkpoint import Checkpoint, read_json
from moetool.surgery.weights import INDEX

# Fields that name code: classes of the checkpoint, or kernels that transformers would download.
_CODE = {
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "kernel_config",
    "use_kernels",
    "trust_remote_code",
    "custom_generate",
}
_SPECIAL = 64  # tokens that a tokenizer may have without any vocabulary
_PASSED = (KeyboardInterrupt, SystemExit, MemoryError, MoetoolError)


def library() -> Any:
    """transformers, without its progress bars and advice."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def without_code(config: Any, *, trusted: bool = False) -> Any:
    """A config, or any part of one, without the fields that name code."""
    if trusted:
        return config
    if isinstance(config, Mapping):
        return {k: without_code(v) for k, v in config.items() if k not in _CODE}
    if isinstance(config, list):
        return [without_code(v) for v in config]
    return config


def config(raw: JsonMapping, folder: str) -> Any:
    """The config object of a family that transformers knows; MoetoolError for other ones, and for
    values that it refuses.
    """
    transformers = library()
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise MoetoolError(
            f"transformers does not know {kind!r}",
            file=f"{folder}/config.json",
            expected="a model type of the installed transformers",
            hint="upgrade transformers; custom code is not run",
        )
    with _guarded("transformers does not accept the config", f"{folder}/config.json"):
        return transformers.CONFIG_MAPPING[kind].from_dict(without_code(dict(raw)))


def empty_model(raw: JsonMapping, folder: str) -> Any:
    """The checkpoint's class in float32, with parameters on the meta device and real buffers
    (rotary tables are computed, not stored). Errors as in `config`.
    """
    import torch
    from accelerate import init_empty_weights

    made = config(raw, folder)
    made.use_cache = False
    cls = model_class(raw)
    with (
        _guarded("transformers cannot build the model of this config", f"{folder}/config.json"),
        init_empty_weights(include_buffers=False),
    ):
        make = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
        return make(made, dtype=torch.float32, experts_implementation="eager")


def load(checkpoint: Checkpoint) -> tuple[Any, JsonObject]:
    """(the model in float32, loading info), as stock transformers loads it from the files that
    `checkpoint` was read from. Raises whatever transformers raises.
    """
    import torch

    if checkpoint.hub_class:
        with quietly():
            made, lost = filled(checkpoint, dtype=torch.float32, output_loading_info=True)
        return made, lost
    path = Path(checkpoint.folder) / "config.json"  # a staged output has none yet
    raw = read_json(path, what="model config") if path.exists() else checkpoint.config
    with _view(checkpoint.folder, raw, checkpoint) as folder, quietly():
        model, info = model_class(raw).from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        if groups.is_ours(raw):
            from moetool.modeling.signals import NOISE, TASK

            model.usual = {NOISE: 0, TASK: 0}  # what text alone does not say
        return model, info


def filled(checkpoint: Checkpoint, **how: Any) -> Any:
    """The model, or what else `from_pretrained` gives for `how`, of a checkpoint whose family has
    other names for its tensors than its files: it reads none itself.
    """
    from moetool.kernels import codec

    raw, left = checkpoint.config, set(checkpoint.hub_left)
    state = {
        name: checkpoint.matrix(name).to(codec.torch_dtype(stored.dtype))
        for name, stored in checkpoint.tensors.items()
        if name not in left
    }
    made = config(raw, checkpoint.folder)
    return model_class(raw).from_pretrained(
        None,
        config=made,
        state_dict=state,
        local_files_only=True,
        trust_remote_code=False,
        **how,
    )


def tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside the weights; MoetoolError where there is none that loads.

    `trust_remote_code` runs the code that comes with the checkpoint, and is the only way to do so.
    """
    transformers = library()
    path = Path(folder) / "config.json"
    raw = read_json(path, what="model config") if path.exists() else {}
    hint = (
        "copy it from the original model, or give token ids: "
        '{"input_ids": [...]} a line; code from a checkpoint is not run'
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            _guarded(
                "the model has no tokenizer that loads",
                folder,
                expected="tokenizer.json beside the weights",
                hint=hint,
            )
        )
        at: Path = Path(folder) if trust_remote_code else stack.enter_context(_view(folder, raw))
        made = transformers.AutoTokenizer.from_pretrained(
            at, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if not _has_words(made, Path(folder)):
            # transformers makes an empty one of the config alone, which gives no token, ever
            raise ValueError("no file here holds its vocabulary")
        return made


def _has_words(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer that reads a vocabulary from files could find one."""
    names = set(tokenizer.vocab_files_names.values())
    found = {path.name for path in folder.iterdir()}
    return not names or bool(names & found) or len(tokenizer) > _SPECIAL


def model_class(raw: JsonMapping) -> Any:
    """The class that the config names, if it is a model of transformers, or of moetool over one;
    else the causal one.
    """
    transformers = library()
    if groups.is_ours(raw):
        return _over(dict(raw)) or transformers.AutoModelForCausalLM
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    return transformers.AutoModelForCausalLM


def _over(raw: JsonObject) -> Any:
    """The class with groups of experts over the one that the config names."""
    from moetool.modeling import carrier

    found = model_class(groups.base_of(raw))
    return carrier.over(found, raw["base_model_type"]) if hasattr(found, "config_class") else None


def attends_eagerly(raw: JsonMapping, folder: str) -> bool:
    """Whether the class of this config computes attention as matrices [heads, length, length] that
    are held whole: it has no other way.
    """
    cls = model_class(raw)
    if not hasattr(cls, "_supports_sdpa"):  # the class is found by the config
        known = library().MODEL_FOR_CAUSAL_LM_MAPPING
        cls = known.get(type(config(raw, folder)), None)
    return not getattr(cls, "_supports_sdpa", True)


def answers_in_words(raw: JsonMapping, folder: str) -> bool:
    """Whether the class of this config goes on with a text, from ids alone."""
    transformers = library()
    known = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    kind = type(config(raw, folder))
    named = [cls.__name__ for mapping in known if (cls := mapping.get(kind, None)) is not None]
    return model_class(raw).__name__ in (*named, "AutoModelForCausalLM")


@contextmanager
def _view(
    folder: str | Path, raw: JsonMapping, checkpoint: Checkpoint | None = None
) -> Iterator[Path]:
    """A folder for transformers: the config, and links to companions, or to weights with an index
    of what they hold.
    """
    real = Path(folder).resolve()
    with tempfile.TemporaryDirectory(prefix="moetool-") as made:
        view = Path(made)
        (view / "config.json").write_text(json.dumps(without_code(raw)))
        if checkpoint is None:
            for name in companions.travelling(folder):
                (view / name).symlink_to(real / name)
        else:
            _link_weights(checkpoint, real, view)
        yield view


def _link_weights(checkpoint: Checkpoint, real: Path, view: Path) -> None:
    if len(checkpoint.files) == 1:
        (view / "model.safetensors").symlink_to(real / next(iter(checkpoint.files)))
        return
    for name in checkpoint.files:
        (view / name).symlink_to(real / name)
    index = {"metadata": {}, "weight_map": {n: t.file for n, t in checkpoint.stored.items()}}
    (view / INDEX).write_text(json.dumps(index))


@contextmanager
def quietly() -> Iterator[None]:
    """No advice, and nobody at the keyboard."""
    keyboard, sys.stdin = sys.stdin, io.StringIO("")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdin = keyboard


@contextmanager
def _guarded(message: str, file: object, **where: str) -> Iterator[None]:
    """Whatever a library makes of a hostile file (panics of its Rust parts among it), as a
    sentence.
    """
    where.setdefault("hint", "restore it from the original model, or upgrade transformers")
    try:
        with quietly():
            yield
    except _PASSED:
        raise
    except BaseException as problem:  # noqa: BLE001
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise MoetoolError(f"{message}: {reason[:200]}", file=file, **where) from None


@contextmanager
def running(folder: str) -> Iterator[None]:
    """What a model's class makes of a config that it cannot compute with, as a MoetoolError; a
    fault of our own, which calls it or is called by it, stays what it is.
    """
    try:
        yield
    except (*_PASSED, OSError):
        raise
    except Exception as problem:
        if "can't allocate memory" in str(problem) or not _is_theirs(problem):
            raise
        reason = str(problem).strip().partition("\n")[0][:160]
        raise MoetoolError(
            f"transformers cannot run this model: {type(problem).__name__}: {reason}",
            file=f"{folder}/config.json",
            expected="a config that its class computes with",
            hint="restore config.json from the original model, or upgrade transformers",
        ) from None


def _is_theirs(problem: BaseException) -> bool:
    """Whether it was raised below a line of transformers, and not below one of ours."""
    named = [f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(problem.__traceback__)]
    packages = [name.partition(".")[0] for name in named]
    last = [package for package in packages if package in ("moetool", "transformers")]
    return last[-1:] == ["transformers"]
