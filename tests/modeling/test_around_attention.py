"""What stands in front of an attention, behind it, and at its values: by the formulas of LaVIN's and
PILL's code, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling import stacks, test_towers
from modeling.grown import IDS, apart
from modeling.test_group_sites import attention, written
from modeling.test_other_experts import IMAGE, MIXED, loaded, logits, shaken
from torch import Tensor
from torch.nn import functional

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.modeling import signals
from moetool.modeling.block import blocks
from moetool.surgery import groups

Models = Callable[..., Path]
FRONT: dict[str, Any] = {"site": "attention", "form": "adapter", "adapter_at": "before"}
LAVIN = FRONT | {
    "adapter_dim": 8,
    "adapter_act": "none",
    "adapter_groups": 2,
    "adapter_bias": True,
    "adapter_shared_down": True,
    "key": "sequence",
    "router_bias": True,
    "law": "soft",
    "temperature": 10,
    "experts": 2,
}
GLU = FRONT | {"adapter_dim": 8, "adapter_act": "silu", "adapter_gated": True}
PILL = (
    GLU | {"key": "always", "experts": 1},
    {"site": "attention", "form": "gate", "key": "modality", "experts": 1, "modality_ids": "5"},
)


def grown(source: Path, folder: Path, *steps: dict[str, Any]) -> Path:
    """The source with one group after the other."""
    for number, options in enumerate(steps):
        written(source, folder / str(number), **options)
        source = folder / str(number)
    return source


def ran(block: Any, x: Tensor) -> Tensor:
    """A causal attention without rotation."""
    size, (batch, length, _) = block.head_dim, x.shape
    flat = torch.ones(batch, length, size), torch.zeros(batch, length, size)
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        made: Tensor = block(x, position_embeddings=flat, attention_mask=mask)[0]
    return made


def weights(block: Any) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in block.named_parameters()}


def test_lavin_is_two_grouped_convolutions_after_one(models: Models, tmp_path: Path) -> None:
    """x + w0 B(A x) + w1 D(A x), w by the first token that is no padding."""
    model = loaded(grown(models("llama"), tmp_path, LAVIN))
    for part in (".experts.", ".router."):
        shaken(model, part)
    block: Any = next(iter(blocks(model)))
    x = torch.randn(2, 9, block.linears.hidden, generator=torch.Generator().manual_seed(1))
    kept = torch.ones(2, 9, dtype=torch.long)
    kept[1, :3] = 0
    signals.say(block, kept=kept)
    weight, made = weights(block), ran(block, x)
    first = torch.stack((x[0, 0], x[1, 3])).double()
    scores = first @ weight["router.weight"].T + weight["router.bias"]
    share = (scores / 10).softmax(-1)
    flat = x.double().transpose(1, 2)
    down = functional.conv1d(
        flat,
        weight["experts.0.adapter_down.weight"][..., None],
        weight["experts.0.adapter_down.bias"],
    )
    for expert in range(2):
        up = (weight[f"experts.{expert}.adapter_up.{n}"] for n in ("weight", "bias"))
        branch = functional.conv1d(down, next(up)[..., None], next(up), groups=2)
        flat = flat + share[:, expert, None, None] * branch
    heads, pairs = model.config.num_attention_heads, model.config.num_key_value_heads
    for row, seen in enumerate(flat.transpose(1, 2)):
        assert apart(made[row].double(), attention(weight, "", seen, heads, pairs)) <= 2e-6
    assert sum(".adapter_down." in n for n in weight) == 2  # one way down, weight and bias


def test_pill_is_a_gated_adapter_and_gates_on_the_values_of_images(
    models: Models, tmp_path: Path
) -> None:
    model = loaded(grown(models("llama"), tmp_path, *PILL))
    shaken(model, "experts")
    block: Any = next(iter(blocks(model)))
    assert [(g.form, g.base) for g, _ in block.held] == [("adapter", "beside"), ("gate", "member")]
    x = torch.randn(1, 9, block.linears.hidden, generator=torch.Generator().manual_seed(1))
    kinds = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 1]])
    signals.say(block, modality=kinds)
    weight, made, seen = weights(block), ran(block, x), x[0].double()
    down, gate, up = (weight[f"experts.0.adapter_{n}.weight"] for n in ("down", "gate", "up"))
    seen = seen + (functional.silu(seen @ gate.T) * (seen @ down.T)) @ up.T
    gates = torch.tanh(seen @ weight["experts_2.0.value_gate.weight"].T)
    gates = torch.where(kinds[0, :, None] == 1, gates, torch.ones_like(gates))
    heads, pairs = model.config.num_attention_heads, model.config.num_key_value_heads
    assert gates.shape == (9, pairs)
    assert apart(made[0].double(), attention(weight, "", seen, heads, pairs, gates)) <= 2e-6


def test_gates_leave_text_alone_and_show_nothing_of_images_at_first(
    models: Models, tmp_path: Path
) -> None:
    source = models("llama")
    out = grown(source, tmp_path, PILL[1] | {"layers": "all"})
    model, stock = loaded(out), loaded(source)
    assert torch.equal(logits(model, IDS), logits(stock, IDS)) and not (IDS == IMAGE).any()
    assert apart(logits(model, MIXED), logits(stock, MIXED)) > 1e-3
    before = logits(model, MIXED)[:, :2]
    shaken(model, ".experts.")
    assert torch.equal(logits(model, MIXED)[:, :2], before)
    assert torch.equal(logits(model, IDS), logits(stock, IDS))
    base = tmp_path / "base"
    moetool.materialize(str(out), str(base), target="base")
    assert torch.equal(logits(loaded(base), IDS), logits(stock, IDS))


@pytest.mark.parametrize("at", ["before", "after"])
def test_two_groups_of_adapters_add_up(at: str, models: Models, tmp_path: Path) -> None:
    """Each changes what came, not what the other made of it."""
    one = {"site": "attention", "form": "adapter", "adapter_at": at, "adapter_dim": 4}
    one |= {"key": "always", "experts": 1}
    model = loaded(grown(models("llama"), tmp_path, one, one | {"name": "more"}))
    shaken(model, "adapter_")
    block: Any = next(iter(blocks(model)))
    x = torch.randn(1, 7, block.linears.hidden, generator=torch.Generator().manual_seed(1))
    weight, made = weights(block), ran(block, x)
    heads, pairs = model.config.num_attention_heads, model.config.num_key_value_heads

    def both(h: Tensor) -> Tensor:
        each = (
            functional.gelu(h @ weight[f"{n}.0.adapter_down.weight"].T)
            @ weight[f"{n}.0.adapter_up.weight"].T
            for n in ("experts", "more")
        )
        return h + sum(each)

    seen = x[0].double()
    want = attention(weight, "", both(seen) if at == "before" else seen, heads, pairs)
    assert apart(made[0].double(), want if at == "before" else both(want)) <= 2e-6


def test_in_a_vision_tower_the_first_patch_chooses(tmp_path: Path) -> None:
    """As LaVIN's adapters in CLIP: padding is unknown there, and no text is heard."""
    stack = stacks.BY_NAME["clip-vision"]
    source = stack.save(tmp_path / "source")
    moetool.upcycle(str(source), str(tmp_path / "out"), tower="vision", **LAVIN)
    model, stock = (test_towers.loaded(stack, folder) for folder in (tmp_path / "out", source))
    inputs = stack.inputs(model.config)
    with torch.no_grad():
        made, want = (m(**inputs).logits_per_image for m in (model, stock))
        assert apart(made, want) <= 1e-5
        shaken(model, ".experts.")
        shaken(model, ".router.")
        seen: list[Tensor] = []
        block: Any = next(iter(blocks(model)))
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", *args)),
            with_kwargs=True,
        )
        block.seen = []
        assert apart(model(**inputs).logits_per_image, want) > 1e-3
        scores = functional.linear(seen[0][:, 0], block.router.weight, block.router.bias)
        length = seen[0].shape[1]
        assert apart(block.seen[0].logits, scores.repeat_interleave(length, 0)) <= 1e-6


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("gpt2", PILL[1], "c_attn"),
        ("llama", LAVIN | {"adapter_groups": 3}, "--adapter-dim 8"),
        ("llama", LAVIN | {"temperature": 0}, "no softmax"),
        ("llama", PILL[1] | {"site": "ffn"}, "--site attention"),
        ("llama", GLU | {"site": "norms"}, "--form full"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_any_work(
    family: str, options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises((MoetoolError, UsageError)) as raised:
        written(models(family), tmp_path / "out", **options)
    error = raised.value
    assert said in f"{error} {getattr(error, 'where', '')} {error.hint}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "under"}, "'under'"),
        ({"params": {"dim": 8, "act": "selu"}}, "gelu"),
        ({"params": {"dim": 8, "groups": 3}}, "a divisor"),
        ({"form": "gate", "base": "member", "params": {"heads": 5}}, "gates on values"),
        ({"form": "gate", "base": "member", "params": {"heads": 2}, "site": "ffn"}, "gate experts"),
        ({"form": "part", "base": "under", "params": {}, "site": "cross"}, "no place"),
    ],
)
def test_a_config_is_read_strictly(
    change: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    out = grown(models("llama"), tmp_path, GLU | {"experts": 2, "top_k": 1})
    file = out / "config.json"
    config = json.loads(file.read_text())
    (group,) = groups.read(config)
    config["moetool"]["groups"] = [replace(group, **change).as_json()]
    file.write_text(json.dumps(config))
    with pytest.raises(MoetoolError) as raised:
        loaded(out)
    assert said in f"{raised.value} {raised.value.where}"
