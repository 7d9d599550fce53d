"""What routes look at beside the tokens themselves, kept on the blocks until the next forward: a
context around it would be gone when gradient checkpointing runs a layer once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any, Protocol

import torch

from moetool.errors import UsageError
from moetool.modeling.spans import Span

Tensor = torch.Tensor
MODALITY, PROMPT, NOISE, TASK = "modality", "prompt", "noise", "task"
# Those that no caller gives: which tokens are no padding, what goes into the first layer, the ids
# of tokens and their embeddings, without those of images.
KEPT, EMBEDDINGS, IDS, WORDS = "kept", "embeddings", "ids", "words"
BEFORE = "pass before"
OF_TEXT = (IDS, WORDS, PROMPT)  # that a route of another tower may look at
# Arguments that a model's forward takes for its routes, with what each is.
GIVEN: Mapping[str, str] = {
    MODALITY: "[batch, length] of 0 (text), 1, ...",
    PROMPT: "[batch, length], 1 for the tokens of the prompt",
    NOISE: "[batch], the noise level",
    TASK: "[batch] of 0, 1, ...",
}
_IGNORED = -100  # of labels


@dataclass
class Heard:
    """What one call says beside its tokens. `values`: modality [batch, length], kept and prompt
    [batch, length] (bool), noise and task [batch], embeddings [batch, length, hidden]; `fresh`:
    whether sequences begin with it, and no cache holds tokens before; `over`: the call has ended;
    `before`: this is the pass before, of those that have two, whose hidden states are looked at.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    fresh: bool = True
    over: bool = False
    before: bool = False

    def read(self, name: str) -> Tensor:
        """UsageError where nobody said it, or it was said of another call: layers run alone."""
        found = self.values.get(name)
        if found is None or not self._live:
            raise UsageError(
                f"a layer by itself does not know the {name} of its tokens",
                expected="a forward of the whole model",
                found="nothing said" if found is None else "what the last forward said",
                hint=f"run the model, or say it: moetool.modeling.signals.say(layer, {name}=...)",
            )
        return found

    def find(self, name: str, tokens: int) -> Tensor | None:
        """A signal of each token [tokens], where it is said."""
        found = self.values.get(name)
        fits = found is not None and found.numel() == tokens
        return found.reshape(-1) if found is not None and fits and self._live else None

    @property
    def _live(self) -> bool:
        """Whether the call has not ended; a layer that gradient checkpointing runs again belongs
        to it.
        """
        return not self.over or torch._C._current_graph_task_id() != -1

    def of_tokens(self, name: str, tokens: int) -> Tensor:
        """A signal of each token [tokens]."""
        found = self.read(name).reshape(-1)
        if len(found) != tokens:
            raise _unlike(name, tokens, len(found))
        return found

    def of_sequences(self, name: str, tokens: int) -> Tensor:
        """A signal of each sequence, for each of its tokens [tokens, ...]."""
        found = self.read(name)
        each, rest = divmod(tokens, len(found))
        if rest:
            raise _unlike(name, tokens, len(found))
        return found.repeat_interleave(each, 0)


class Hears(Protocol):
    """A block that keeps signals for its routes."""

    heard: Heard

    def readers(self) -> Iterator[Any]:
        """Routers and laws of its groups."""
        ...


@dataclass(frozen=True)
class Tokens:
    """The arguments of a forward that say how its tokens lie."""

    ids: Tensor | None
    embeds: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    past: int

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tokens:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        past = 0 if cache is None else int(cache.get_seq_length())
        flat = isinstance(mask, torch.Tensor) and mask.dim() == 2
        return cls(
            ids, kwargs.get("inputs_embeds"), mask if flat else None, kwargs.get("labels"), past
        )

    @property
    def said(self) -> bool:
        """Whether text goes in; a vision tower has no padding."""
        return self.ids is not None or self.embeds is not None

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, length) of this call."""
        lying = self.embeds if self.ids is None else self.ids
        if lying is None:
            raise UsageError(
                "a call without tokens",
                expected="input_ids or inputs_embeds",
                hint="give the model one of the two",
            )
        return lying.shape[0], lying.shape[1]

    @property
    def kept(self) -> Tensor:
        """Which tokens are no padding [batch, length]."""
        batch, length = self.shape
        lying = self.embeds if self.ids is None else self.ids
        assert lying is not None
        if self.mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=lying.device)
        return self.mask[:, -length:].bool()


def note(
    blocks: Sequence[Hears],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    usual: Mapping[str, float] = MappingProxyType({}),
) -> Heard | None:
    """Tell blocks what this call says to their routes; the arguments for them are taken out of
    `kwargs`. None where no route looks at any. `usual`: for arguments that are not given.
    UsageError for one that no route looks at, and where one is missing or not of the call's tokens.
    """
    given = {n: v for n in GIVEN if (v := kwargs.pop(n, None)) is not None}
    readers = wanted_by(blocks)
    wanted = set(chain.from_iterable(r.reads for r in readers))
    for name in given:
        if name not in wanted:
            raise UsageError(
                f"no route of this model looks at {name}",
                expected=", ".join(sorted(wanted & set(GIVEN))) or "none of " + ", ".join(GIVEN),
                found=f"{name}=...",
                hint=f"leave out {name}",
            )
    if not wanted:
        return None
    given = {n: v for n, v in usual.items() if n in wanted} | given
    call = Tokens.of(args, kwargs)
    heard = Heard(dict(_values(call, given, readers, wanted)), fresh=not call.past)
    for block in blocks:
        block.heard = heard
    return heard


def say(layer: torch.nn.Module, **given: Tensor) -> None:
    """Tell the blocks in a layer that runs by itself what its routes look at: `modality`, `kept`
    and `prompt` [batch, length], `noise` and `task` [batch], `embeddings` [batch, length, hidden].
    """
    heard = Heard(dict(given))
    for block in layer.modules():
        if hasattr(block, "heard"):
            block.heard = heard  # type: ignore[assignment]


def wanted_by(blocks: Iterable[Hears]) -> list[Any]:
    """Routers and laws that look at signals."""
    return [r for r in chain.from_iterable(b.readers() for b in blocks) if r.reads]


def _values(
    call: Tokens, given: Mapping[str, Any], readers: Iterable[Any], wanted: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Each signal that a route looks at, but what only the forward itself sees."""
    if MODALITY in wanted:
        ids = next(r for r in readers if MODALITY in r.reads).ids
        yield MODALITY, _modality(call, given.get(MODALITY), ids)
    if PROMPT in wanted or (KEPT in wanted and call.said):
        yield KEPT, call.kept
    if PROMPT in wanted:
        yield PROMPT, _prompt(call, given.get(PROMPT), span_of(readers))
    if WORDS in wanted:
        yield IDS, _ids(call)
    if NOISE in wanted:
        yield NOISE, _noise(call, given.get(NOISE))
    if TASK in wanted:
        most = min(len(r.allowed) for r in readers if TASK in r.reads) - 1
        yield TASK, _whole(TASK, _sequences(call, TASK, given.get(TASK)), most)


def _modality(call: Tokens, given: Tensor | None, ids: Sequence[Sequence[int]]) -> Tensor:
    """As it is given, or by token ids."""
    if given is not None:
        _whole(MODALITY, given, len(ids))
        return _of_call(call, MODALITY, given)
    if call.ids is None:
        raise UsageError(
            "experts by modality need to know what kind of token each is",
            expected="input_ids, or modality=[batch, length] of 0 (text), 1, ...",
            found="inputs_embeds alone",
            hint="give the model one of the two",
        )
    return of_ids(call.ids, ids)


def _ids(call: Tokens) -> Tensor:
    if call.ids is None:
        raise UsageError(
            "experts by the text that an image attends to need to know the text",
            expected="input_ids",
            found="inputs_embeds alone",
            hint="give the model input_ids",
        )
    return call.ids


def span_of(readers: Iterable[Any]) -> Span:
    """Which part of a prompt routes look at. UsageError where they do not look at one."""
    spans: set[Span] = {reader.span for reader in readers if PROMPT in reader.reads}
    if len(spans) > 1:
        raise UsageError(
            "groups of experts whose prompts begin or end at different tokens",
            expected="one prompt of a call",
            found=", ".join(map(str, sorted(spans))),
            hint="give all groups of the model the same `begin` and `end`",
        )
    return spans.pop()


def _prompt(call: Tokens, given: Tensor | None, span: Span) -> Tensor:
    """As it is given; of a training example what its labels leave out; else all that is there; of
    these two what the span says, where it has a token.
    """
    kept = call.kept
    if given is not None:
        return _of_call(call, PROMPT, given).to(kept.device).bool() & kept
    asked = kept
    if call.labels is not None and call.labels.shape == kept.shape:
        asked = within(kept, call.labels.to(kept.device) == _IGNORED)
    return asked if call.ids is None else within(asked, span.of(call.ids, kept))


def within(all_of_it: Tensor, some: Tensor) -> Tensor:
    """What of it is among some, row by row; all of it where nothing is."""
    both = all_of_it & some.to(all_of_it.device)
    return torch.where(both.any(-1, keepdim=True), both, all_of_it)


def _noise(call: Tokens, given: Tensor | float | None) -> Tensor:
    found = _sequences(call, NOISE, given).float()
    if not bool(torch.isfinite(found).all()):
        raise UsageError(
            "a noise level that is no number",
            expected="finite numbers",
            found=found.tolist(),
            hint=f"give the model noise={GIVEN[NOISE]}",
        )
    return found


def _sequences(call: Tokens, name: str, given: Tensor | float | None) -> Tensor:
    """A signal of each sequence [batch]; one number stands for all."""
    batch, _ = call.shape
    found = None if given is None else torch.as_tensor(given).reshape(-1)
    if found is None or len(found) not in (1, batch):
        raise UsageError(
            f"experts by {name} need to know the {name} of each sequence",
            expected=f"{name}={GIVEN[name]}, batch {batch}",
            found="nothing" if found is None else f"{len(found)} numbers",
            hint=f"give it to forward or generate: {name}=...",
        )
    return found.expand(batch)


def _of_call(call: Tokens, name: str, given: Tensor) -> Tensor:
    """Refuse a signal of tokens that has not one number for each."""
    if tuple(given.shape) != call.shape:
        raise UsageError(
            f"the {name} of the tokens does not fit them",
            expected=f"[batch, length] of these tokens: {list(call.shape)}",
            found=list(given.shape),
            hint=f"give the model {name}={GIVEN[name]}",
        )
    return given


def _whole(name: str, given: Tensor, most: int) -> Tensor:
    """Refuse numbers that nothing has; indexing would take -1 for the last."""
    whole = not (given.is_floating_point() or given.dtype == torch.bool)
    if whole and given.numel() and int(given.min()) >= 0 and int(given.max()) <= most:
        return given
    raise UsageError(
        f"a {name} that is not one of the model's",
        expected=f"whole numbers from 0 to {most}",
        found=f"{given.dtype}" + (f", {given.min()} to {given.max()}" if given.numel() else ""),
        hint=f"give the model {name}={GIVEN[name]}",
    )


def of_ids(input_ids: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """0 for text, else the number of the modality whose ids a token is among, from 1 [...]."""
    kind = torch.zeros_like(input_ids, dtype=torch.long)
    for number, mine in enumerate(ids, 1):
        is_mine = torch.isin(input_ids, torch.tensor(list(mine), device=input_ids.device))
        kind = kind.masked_fill(is_mine, number)
    return kind


def _unlike(name: str, tokens: int, found: int) -> UsageError:
    return UsageError(
        f"the {name} of the tokens does not fit them",
        expected=f"{tokens} tokens",
        found=f"{found}",
        hint="run the whole model on one batch",
    )
