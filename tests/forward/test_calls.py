"""What decoder layers are called with: recorded once, given back, and watched for surprises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moetool.errors import MoetoolError, UsageError
from moetool.forward.adapter import Shell
from moetool.forward.batches import Batch
from moetool.forward.calls import Calls, StandIn, StandIns, same
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import Layout, families


def batch(rows: int, length: int, first: int = 10) -> Batch:
    ids = (np.arange(rows * length) + first).reshape(rows, length) % 150
    return Batch(ids, np.full(rows, length), 0)


@pytest.fixture
def shell(models: Callable[..., Path]) -> Shell:
    made = Shell(Checkpoint.open(models("llama")))
    made.fill(None)
    return made


def test_layers_are_called_as_the_model_calls_them(shell: Shell) -> None:
    """Embedded by the calls and sent through by hand: the model's own logits."""
    calls, text = Calls(shell, "cpu"), batch(2, 12)
    for layer in range(4):
        shell.fill(layer)
    with torch.no_grad():
        x = calls.enter(text)
        for number, layer in enumerate(shell.layers):
            args, kwargs = calls.of(text, number)
            out = layer(x, *args, **kwargs)
            x = out[0] if isinstance(out, tuple) else out
        made = calls.leave(text, x, torch.arange(3, 9))
        whole = shell.model(input_ids=torch.from_numpy(text.ids), use_cache=False).logits
    torch.testing.assert_close(made, whole[:, 3:9])


def test_a_shape_is_asked_once(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, entered = Calls(shell, "cpu"), 0
    real = calls.enter

    def enter(text: Batch) -> torch.Tensor:
        nonlocal entered
        entered += 1
        return real(text)

    monkeypatch.setattr(calls, "enter", enter)
    for text in (batch(1, 8), batch(1, 8, 40), batch(1, 9)):
        for layer in range(4):
            calls.of(text, layer)
    assert entered == 2


def test_layers_are_back_in_their_place(shell: Shell) -> None:
    before = [*shell.layers]
    Calls(shell, "cpu").enter(batch(1, 4))
    assert [*shell.layers] == before
    with pytest.raises(ZeroDivisionError), StandIns(shell.layers, lambda x, a, k: x):
        assert all(isinstance(layer, StandIn) for layer in shell.layers)
        raise ZeroDivisionError
    assert [*shell.layers] == before


def test_a_stand_in_has_its_layers_attributes() -> None:
    layer = nn.Linear(2, 3)
    made = StandIn(layer, lambda x, args, kwargs: (x, args, kwargs))
    assert made.in_features == 2 and made.weight is layer.weight
    assert made(1, 2, c=3) == (1, (2,), {"c": 3})


def test_what_depends_on_the_text_is_refused(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = Calls(shell, "cpu"), shell.base.forward

    def forward(input_ids: torch.Tensor, **more: Any) -> Any:
        for layer in shell.layers:
            layer(torch.zeros(1, 4, 64), secret=input_ids)
        return real(input_ids=input_ids, **more)

    monkeypatch.setattr(shell.base, "forward", forward)
    calls.enter(batch(1, 4))
    with pytest.raises(UsageError, match="depends on the text itself"):
        calls.enter(batch(1, 4, 90))


T = torch.arange(4.0)
ALIKE: list[tuple[Any, Any, bool]] = [
    (T, T.clone(), True),
    (T, T + 1, False),
    (T, T[:3], False),
    ((T, None), (T.clone(), None), True),
    ((T,), (T, T), False),
    ([T], (T,), True),
    ({"a": T}, {"a": T.clone()}, True),
    ({"a": T}, {"b": T}, False),
    ({"a": {"b": [T]}}, {"a": {"b": [T + 1]}}, False),
    (1, 2, True),
    (1, "1", False),
    (None, T, False),
]


@pytest.mark.parametrize(("a", "b", "alike"), ALIKE)
def test_same(a: Any, b: Any, alike: bool) -> None:
    """Tensors by value, containers by their parts, anything else by its type."""
    assert same(a, b) is alike and same(b, a) is alike


def test_families_without_a_plain_stack_are_refused() -> None:
    """The data says so: encoders, encoder and decoder, hybrids of which the class tells no list."""
    without = {n for k in ("moe", "dense") for n in families()[k] if Layout.load(n).stack is None}
    assert {"bert", "t5", "bart", "whisper", "clip", "nemotron_h", "switch_transformers"} <= without
    assert not {"llama", "mixtral", "gpt2", "bloom", "opt", "llava", "qwen3_vl_moe"} & without


def test_a_stack_of_another_length_is_refused(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(models("llama"))
    wrong = Layout.load("gpt2")
    monkeypatch.setattr("moetool.forward.adapter.Layout", type("L", (), {"load": lambda n: wrong}))
    with pytest.raises(MoetoolError, match="no plain stack of decoder layers") as refused:
        Shell(source)
    assert "4 layers in a row" in str(refused.value) and refused.value.hint
