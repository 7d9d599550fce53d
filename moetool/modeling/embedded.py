"""What goes into the first layer of a model, for routes that look at it: embeddings of tokens, with
those of images where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from moetool.modeling.signals import EMBEDDINGS, IDS, WORDS, Heard, Hears, wanted_by
from moetool.modeling.sites.site import stack
from moetool.surgery.layout import Layout


@contextmanager
def embedded(model: Any, heard: Heard, blocks: Sequence[Hears]) -> Iterator[None]:
    """While it is open, a forward of the model says its embeddings to the routes that want them."""
    reads = {*chain.from_iterable(reader.reads for reader in wanted_by(blocks))}
    if WORDS in reads:
        heard.values[WORDS] = model.get_input_embeddings()(heard.values[IDS])
    if EMBEDDINGS not in reads:
        yield
        return

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = args[0] if args else kwargs["hidden_states"]
        heard.values[EMBEDDINGS] = seen.detach()

    first = stack(model, Layout.load(model.config.base_model_type))[0]
    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
