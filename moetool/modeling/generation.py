"""What routes look at while text is generated: the caller says it of the prompt, and each step is
told it of the tokens that it gets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import chain
from typing import Any

import torch

from moetool.modeling.block import blocks
from moetool.modeling.embedded import embedded
from moetool.modeling.passes import CACHE, are_two
from moetool.modeling.signals import (
    GIVEN,
    MODALITY,
    PROMPT,
    WORDS,
    note,
    of_ids,
    span_of,
    wanted_by,
    within,
)

Tensor = torch.Tensor
Method = Callable[..., Any]


def taking(forward: Method) -> Method:
    """A forward whose signature names the signals, too: `generate` refuses arguments that are not
    in it, and trainers drop such columns.
    """
    stock = inspect.signature(forward)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in GIVEN
        if name not in stock.parameters
    ]
    known = [*stock.parameters.values()]
    last = known and known[-1].kind is inspect.Parameter.VAR_KEYWORD
    whole = [*known[:-1], *more, known[-1]] if last else [*known, *more]
    forward.__signature__ = stock.replace(parameters=whole)  # type: ignore[attr-defined]
    return forward


def told(stock: Method) -> Method:
    """`generate`, whose steps know where the prompt ends."""

    @wraps(stock)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._prompt = None
        if are_two([*blocks(self)]):
            kwargs[CACHE] = False
        try:
            return stock(self, *args, **kwargs)
        finally:
            del self._prompt

    return generate


def encoding(stock: Method) -> Method:
    """What encodes images before the first step, for routes that look at text while it does."""

    @wraps(stock)
    def encode(
        self: Any, inputs: Tensor, kwargs: dict[str, Any], name: str | None = None, *args: Any
    ) -> Any:
        held = [*blocks(self)]
        if not any(WORDS in reader.reads for reader in wanted_by(held)):
            return stock(self, inputs, kwargs, name, *args)
        said = {n: kwargs[n] for n in (*GIVEN, "attention_mask") if n in kwargs}
        heard = note(held, (), {name or "input_ids": inputs, **said})
        assert heard is not None
        try:
            with embedded(self, heard, held):
                return stock(self, inputs, kwargs, name, *args)
        finally:
            heard.over = True

    return encode


def prepared(stock: Method) -> Method:
    """`prepare_inputs_for_generation`, with the signals of the tokens that a step gets: those of
    the prompt as they were given, those of new tokens by their ids.
    """

    @wraps(stock)
    def prepare(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        readers = wanted_by(blocks(self))
        wanted = set(chain.from_iterable(r.reads for r in readers))
        modality, prompt = kwargs.pop(MODALITY, None), kwargs.pop(PROMPT, None)
        made = stock(self, input_ids, *args, **kwargs)
        before = _before(input_ids, kwargs)
        length = before + input_ids.shape[1]
        if modality is not None and MODALITY in wanted:
            ids = next(r for r in readers if MODALITY in r.reads).ids
            new = of_ids(input_ids[:, max(modality.shape[1] - before, 0) :], ids)
            made[MODALITY] = _last(torch.cat([modality.to(new), new], -1), made)
        elif modality is not None:
            made[MODALITY] = modality  # refused by the forward
        if PROMPT in wanted:
            if prompt is None and not before:
                prompt = _spanned(self, readers, input_ids, kwargs)
            made[PROMPT] = _last(_prompt(self, prompt, length, made), made)
        elif prompt is not None:
            made[PROMPT] = prompt
        return made

    return prepare


def _before(input_ids: Tensor, kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt that have no ids: it was given as embeddings."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if embeds is None:
        return 0
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.shape[1] - input_ids.shape[1]
    return int(embeds.shape[1])


def _spanned(
    model: Any, readers: Iterable[Any], input_ids: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """What of the tokens that generation began with routes look at [batch, length], bool."""
    if getattr(model, "_prompt", None) is None:
        model._prompt = input_ids.shape[1]
    ids, mask = input_ids[:, : model._prompt], kwargs.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        kept = mask[:, : ids.shape[1]].bool()
    return within(kept, span_of(readers).of(ids, kept))


def _prompt(model: Any, given: Tensor | None, length: int, made: dict[str, Any]) -> Tensor:
    """1 for the tokens of the prompt, of all tokens so far [batch, length]."""
    if getattr(model, "_prompt", None) is None:
        model._prompt = length
    lying = made.get("input_ids")
    lying = made["inputs_embeds"] if lying is None else lying
    known = lying.new_ones(len(lying), model._prompt, dtype=torch.bool) if given is None else given
    new = known.new_zeros(len(known), max(length - known.shape[1], 0))
    return torch.cat([known, new], -1)


def _last(every: Tensor, made: dict[str, Any]) -> Tensor:
    """Of all tokens so far, those that a step gets."""
    lying = made.get("input_ids")
    lying = made["inputs_embeds"] if lying is None else lying
    return every[:, -lying.shape[1] :]
