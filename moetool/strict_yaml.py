"""YAML as people write it, read strictly: no name twice, no references that unfold without end, and
nothing but texts, numbers, lists and mappings.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import yaml

LARGEST = 1 << 17  # characters; recipes have hundreds
UNFOLDED = 10_000  # values, every reference counted where it stands


_NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Strict(yaml.SafeLoader):
    """Refuses what a reader would overlook."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}

    def compose_document(self) -> yaml.Node | None:
        """The tree of nodes, with its unfolded size looked at before anything is made of it."""
        node = super().compose_document()
        if node is not None:
            self._size(node, frozenset())
        return node

    def _size(self, node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above:
            raise yaml.composer.ComposerError(
                None, None, "a value refers to itself", node.start_mark
            )
        if id(node) not in self._sizes:
            inner = above | {id(node)}
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                parts = list(node.value)
            elif isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                parts = list(chain.from_iterable(node.value))
            self._sizes[id(node)] = 1 + sum(self._size(part, inner) for part in parts)
        if self._sizes[id(node)] > UNFOLDED:
            raise yaml.composer.ComposerError(
                None, None, f"more than {UNFOLDED:,} values, references unfolded", node.start_mark
            )
        return self._sizes[id(node)]

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                wrong = "a list or a mapping is no name"
            elif key.tag not in _NAMES:
                wrong = f"{key.value[:60]!r} is no name: put it in quotes"
            elif key.value in seen:
                wrong = f"{key.value[:60]!r} stands twice"
            else:
                seen.add(key.value)
                continue
            raise yaml.composer.ComposerError(None, None, wrong, key.start_mark)


def load(text: str) -> Any:
    """The value that the text holds; ValueError with a sentence (and line) for anything else."""
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} characters")
    try:
        loader = _Strict(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as problem:  # noqa: BLE001 (dates, tags and digits raise all sorts)
        raise ValueError(" ".join(str(problem).split())[:300]) from None
