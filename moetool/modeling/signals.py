"""What routes look at beside the tokens themselves, kept on the blocks until the next forward: a
context around it would be gone when gradient checkpointing runs a layer once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from moetool.errors import UsageError

Tensor = torch.Tensor
MODALITY = "modality"


class Hears(Protocol):
    """A block that keeps signals for its routes."""

    signals: Mapping[str, Tensor]

    @property
    def ids_by_modality(self) -> Sequence[Sequence[int]] | None:
        """Token ids of each modality beside text, where a route looks at it."""
        ...


def note(blocks: Sequence[Hears], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Tell blocks the modality of each token of this call: as the argument `modality` [batch,
    length] says (it is taken out of `kwargs`), or by `input_ids`. UsageError where neither is
    given and a block needs it.
    """
    given = kwargs.pop(MODALITY, None)
    for block in blocks:
        ids = block.ids_by_modality
        if ids is None:
            continue
        found = kwargs.get("input_ids", args[0] if args else None)
        if given is not None:
            kind = _known(given, len(ids))
        elif found is not None:
            kind = of_ids(found, ids)
        else:
            raise UsageError(
                "experts by modality need to know what kind of token each is",
                expected="input_ids, or modality=[batch, length] of 0 (text), 1, ...",
                found="inputs_embeds alone",
                hint="give the model one of the two",
            )
        block.signals = {MODALITY: kind.reshape(-1)}


def _known(given: Tensor, most: int) -> Tensor:
    """Refuse numbers that no modality has; indexing would take -1 for the last."""
    whole = not (given.is_floating_point() or given.dtype == torch.bool)
    if whole and given.numel() and int(given.min()) >= 0 and int(given.max()) <= most:
        return given
    raise UsageError(
        "a modality that is not one of the model's",
        expected=f"whole numbers from 0 (text) to {most}",
        found=f"{given.dtype}" + (f", {given.min()} to {given.max()}" if given.numel() else ""),
        hint="give the model modality=[batch, length], or input_ids alone",
    )


def of_ids(input_ids: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """0 for text, else the number of the modality whose ids a token is among, from 1 [...]."""
    kind = torch.zeros_like(input_ids, dtype=torch.long)
    for number, mine in enumerate(ids, 1):
        is_mine = torch.isin(input_ids, torch.tensor(list(mine), device=input_ids.device))
        kind = kind.masked_fill(is_mine, number)
    return kind


def read(signals: Mapping[str, Tensor], names: Sequence[str], tokens: int) -> list[Tensor]:
    """Those that a route reads. UsageError where one is not of these tokens."""
    for name in names:
        found = signals.get(name)
        if found is None or len(found) != tokens:
            raise UsageError(
                f"the {name} of the tokens does not fit them",
                expected=f"{tokens} tokens",
                found="nothing" if found is None else f"{len(found)}",
                hint="run the whole model, with input_ids or modality=[batch, length]",
            )
    return [signals[name] for name in names]
