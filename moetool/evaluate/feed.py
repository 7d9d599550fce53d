"""What a model is fed when it is compared with another: random token ids, and pixels or sound for
those that take them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from moetool.data import JsonObject

TOKENS = 48


def inputs(model: Any, config: JsonObject, seed: int) -> dict[str, Tensor]:
    """The arguments of one forward of two sequences, by what the model's forward takes and needs:
    `input_ids` where text goes in, `pixel_values` and `input_features` where it cannot go without.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    main = str(getattr(model, "main_input_name", "input_ids"))
    takes = inspect.signature(model.forward).parameters
    made: dict[str, Tensor] = {}
    if "input_ids" in takes or main == "input_ids":
        made["input_ids"] = _ids(model, config, draw)
    if "decoder_input_ids" in takes:
        made["decoder_input_ids"] = _ids(model, config, draw)
    if "input_features" in takes and main == "input_features":
        size = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        made["input_features"] = torch.randn(size, generator=draw)
    if "pixel_values" in takes and (main == "pixel_values" or _in_two_towers(model)):
        made["pixel_values"] = _pixels(model, draw)
    return {name: tensor.to(model.device) for name, tensor in made.items()}


def answers(made: Any) -> Iterator[Tensor]:
    """The floats that a model gives: its logits, or, where it has none, all."""
    logits = getattr(made, "logits", None)
    yield from _floats(made if logits is None else logits)


def _floats(made: Any) -> Iterator[Tensor]:
    if hasattr(made, "is_floating_point"):
        if made.is_floating_point():
            yield made.float()
    elif isinstance(made, Mapping):
        for one in made.values():
            yield from _floats(one)
    elif isinstance(made, tuple | list):
        for one in made:
            yield from _floats(one)


def _ids(model: Any, config: JsonObject, draw: Generator) -> Tensor:
    import torch

    text = config.get("text_config") or config
    vocab = int(text.get("vocab_size") or model.get_input_embeddings().num_embeddings)
    length = min(TOKENS, _longest(model))
    ids = torch.randint(min(10, vocab - 1), vocab, (2, length), generator=draw)
    said = ((k, v) for k, v in config.items() if k.endswith(("_token_id", "_token_index")))
    special = {v for _, v in said if isinstance(v, int)}
    for token in special:
        ids[ids == token] = (max(special) + 1) % vocab
    return ids


def _longest(model: Any) -> int:
    """How many tokens a model has positions for, where it has few."""
    text = getattr(model.config, "text_config", model.config)
    found = getattr(text, "max_position_embeddings", TOKENS)
    return int(found) if isinstance(found, int) and found > 0 else TOKENS


def _in_two_towers(model: Any) -> bool:
    """Whether text and image are embedded apart, so that neither goes without the other."""
    return hasattr(model, "get_image_features") and not model.can_generate()


def _pixels(model: Any, draw: Generator) -> Tensor:
    import torch

    seen = getattr(model.config, "vision_config", model.config)
    size = seen.image_size
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(seen, "num_channels", 3)
    return torch.randn((2, channels, high, wide), generator=draw)
