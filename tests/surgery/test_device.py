"""A device that cannot be used is refused in whole words."""

from __future__ import annotations

import pytest

from moetool.errors import UsageError
from moetool.surgery.device import check_device, shorten


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Torch not compiled with CUDA enabled", "Torch not compiled with CUDA enabled"),
        ("There is no such backend. A longer story follows.", "There is no such backend."),
        ("aten::empty.memory_format is not there. Why?", "aten::empty.memory_format is not there."),
        ("Expected one of " + "cuda, " * 40, "Expected one of " + "cuda, " * 22 + "cuda, ..."),
        ("", ""),
    ],
)
def test_a_message_is_cut_at_a_sentence_or_a_word(message: str, shown: str) -> None:
    assert shorten(message) == shown and len(shown) <= 160


def test_an_unknown_device_is_said_in_whole_words() -> None:
    """Torch lists every backend that it has ever had."""
    with pytest.raises(UsageError, match="--device nowhere cannot be used") as refused:
        check_device("nowhere")
    said = refused.value.message
    assert len(said) < 210 and (said.endswith(" ...") or "..." not in said)
    check_device("cpu")
