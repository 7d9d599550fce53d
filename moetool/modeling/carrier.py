"""The config class of model type `moetool`, and the classes that it stands for.

A config with groups of experts (surgery/groups.py) names the family it stands on. When one is read,
a config class is derived from that family's, and for every Auto class that knows the family a model
class from the stock one: `MoeLlamaConfig(LlamaConfig)`, `MoeLlamaForCausalLM(LlamaForCausalLM)`.
No model is imported before a config is read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from transformers import configuration_utils

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import groups
from moetool.surgery.layout import Layout

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig as Base
else:  # transformers 4 spells it otherwise
    Base = getattr(configuration_utils, "PreTrainedConfig", None)
    Base = Base or configuration_utils.PretrainedConfig

_MAJOR = 5
_AUTO = (
    "modeling_auto",
    "tokenization_auto",
    "processing_auto",
    "image_processing_auto",
    "feature_extraction_auto",
    "video_processing_auto",
)
_NOT_LOGITS = ("aux_loss", "router_logits")


class MoetoolConfig(Base):  # type: ignore[misc]
    """Reads a config with groups of experts as the family's own config, derived."""

    model_type: ClassVar[str] = groups.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: JsonObject, **kwargs: Any) -> Any:
        """The family's config. MoetoolError for groups that are not well formed, a family that
        transformers does not know, and a transformers before 5.
        """
        groups.read(config_dict)
        return derived(config_dict["base_model_type"]).from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Nothing: its code is the package's, not a file of the checkpoint."""


@lru_cache(maxsize=64)
def derived(base: str) -> Any:
    """The config class over family `base`, with every Auto class told of it. MoetoolError for a
    family that transformers does not know, and a transformers before 5.
    """
    if int(transformers.__version__.partition(".")[0]) < _MAJOR:
        raise MoetoolError(
            "models of moetool's own type need transformers 5",
            expected=f"transformers {_MAJOR} or newer",
            found=transformers.__version__,
            hint="upgrade transformers; where a native class computes the same, `moetool materialize` "
            "writes groups of experts as that",
        )
    known = transformers.CONFIG_MAPPING
    if base not in known or base == groups.MODEL_TYPE:
        raise MoetoolError(
            f"transformers does not know {base!r}, which this model stands on",
            file="config.json",
            expected="a `base_model_type` of the installed transformers",
            hint="upgrade transformers",
        )
    family = known[base]
    ignored = getattr(family, "keys_to_ignore_at_inference", None) or ("past_key_values",)
    said = {
        "model_type": groups.MODEL_TYPE,
        "keys_to_ignore_at_inference": [*ignored, *_NOT_LOGITS],
        "num_experts": property(_experts),
        "num_experts_per_tok": property(_experts_per_token),
        "__reduce_ex__": _pickled,
        "from_dict": classmethod(_read(family)),
        "to_dict": _written(family),
        "register_for_auto_class": MoetoolConfig.register_for_auto_class,
        "__module__": __name__,
        "__doc__": f"A {family.__name__} with groups of experts.",
    }
    if Layout.load(base).kind == "moe":  # it says so itself
        said = {n: v for n, v in said.items() if not isinstance(v, property)}
    made = type(f"Moe{family.__name__}", (family,), said)
    for name in _AUTO:
        _tell(getattr(transformers.models.auto, name), family, made)
    return made


def _read(family: Any) -> Any:
    """What the family's class makes of a config: who runs the experts is told by the class."""

    def from_dict(cls: Any, config_dict: JsonObject, **kwargs: Any) -> Any:
        said = {k: v for k, v in config_dict.items() if (k, v) != (groups.RUNS, groups.MODEL_TYPE)}
        return family.from_dict.__func__(cls, said, **kwargs)

    return from_dict


def _written(family: Any) -> Any:
    """For config.json: the family's own, and who runs the experts."""

    def to_dict(self: Any) -> JsonObject:
        made: JsonObject = family.to_dict(self)
        return made | {groups.RUNS: groups.MODEL_TYPE}

    return to_dict


def _experts(config: Any) -> int:
    """What the routers of the first group choose among, as trainers ask for it."""
    return _first(config).choices


def _experts_per_token(config: Any) -> int:
    return _first(config).route.top_k


def _first(config: Any) -> groups.Group:
    said = {"base_model_type": config.base_model_type, groups.MODEL_TYPE: config.moetool}
    return groups.read(said)[0]


def _pickled(config: Any, protocol: Any) -> Any:
    """No derived class has a name that another process could import: it is derived there again."""
    which = (config.base_model_type,)
    return (_blank, which, *tuple(object.__reduce_ex__(config, protocol))[2:])


def _blank(base: str) -> Any:
    cls = derived(base)
    return cls.__new__(cls)


def over(stock: Any, base: str) -> Any:
    """The class with groups of experts over a stock model class of family `base`."""
    return _grown(stock, derived(base))


def _tell(module: Any, family: Any, made: Any) -> None:
    """Let every mapping of an Auto module that knows a family's config know the derived one."""
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    for mapping in list(vars(module).values()):
        if isinstance(mapping, _LazyAutoMapping) and family in mapping:
            mapping.register(made, _grown(mapping[family], made), exist_ok=True)


def _grown(stock: Any, config: Any) -> Any:
    """The derived class of a model class; what is none (a tokenizer, a processor) stays."""
    from transformers import PreTrainedModel

    from moetool.modeling.derived import model_class

    if isinstance(stock, tuple | list):
        return tuple(_grown(one, config) for one in stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return model_class(stock, config)
    return stock
