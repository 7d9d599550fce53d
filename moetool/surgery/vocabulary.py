"""The tensors of a checkpoint that have a row for each token: embeddings, heads, their biases."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import FLOATS, Stored
from moetool.surgery.text_model import TextModel, text_model


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens a model knows, and where; `field`: what the config calls their number."""

    at: TextModel
    count: int
    field: str
    tables: tuple[Stored, ...]

    @classmethod
    def of(cls, source: Checkpoint) -> Vocabulary:
        """MoetoolError where a model has no tokens, or its tables are no plain numbers of so many
        rows.
        """
        at = text_model(source.config)
        count, field = at.field("vocab"), at.layout.fields.get("vocab", "")
        tables = tuple(_tables(source, at, field))
        if not isinstance(count, int) or not tables:
            raise MoetoolError(
                "this model has no table of tokens",
                file=source.folder,
                expected="embeddings with a row for each token",
                found=f"model type {at.layout.model_type}, {field or 'vocab_size'}={count}",
                hint="see `moetool archs show`",
            )
        for table in tables:
            _check(source, table, count)
        return cls(at, count, field, tables)

    @property
    def embedding(self) -> Stored:
        """What tokens are on their way in."""
        tied = self.at.layout.tied
        wide = [t for t in self.tables if len(t.shape) > 1] or [*self.tables]
        read = [t for t in wide if self._slot(t) in tied.values()]
        rest = [t for t in wide if self._slot(t) not in tied]
        return (read or rest or wide)[0]

    def _slot(self, table: Stored) -> str:
        matched = self.at.match(table.name)
        return matched.slot.name if matched else ""

    def enlarged(self, config: JsonObject, count: int) -> JsonObject:
        """The config with another number of tokens."""
        made = deepcopy(config)
        text = made
        for part in self.at.path:
            text = text.setdefault(part, {})
        for known in (made, text):
            if known is text or known.get(self.field) == self.count:
                known[self.field] = count
        return made


def _tables(source: Checkpoint, at: TextModel, field: str) -> Iterator[Stored]:
    tied = {*at.layout.tied, *at.layout.tied.values()}
    tied |= {f"{name.removesuffix('weight')}bias" for name in tied}
    for name, stored in source.tensors.items():
        matched = at.match(name)
        if matched is None:
            continue
        shape = matched.slot.shape
        if (shape or [""])[0] == field or (not shape and matched.slot.name in tied):
            yield stored


def _check(source: Checkpoint, table: Stored, count: int) -> None:
    if table.parts is None and table.dtype in FLOATS and table.shape[0] == count:
        return
    form = table.parts.form if table.parts else table.dtype
    raise MoetoolError(
        "a table of tokens cannot get more rows",
        file=f"{source.folder}/{table.file}",
        tensor=table.name,
        expected=f"{count} rows of {', '.join(FLOATS)}",
        found=f"{form} {list(table.shape)}",
        hint="`moetool dequantize` writes it in full",
    )
