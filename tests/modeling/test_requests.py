"""Experts that a whole request has: what adds to linears behind one router, what an always-on
expert fills, and which part of a prompt counts (Awaker2.5-VL).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_to_peft import IDS as PEFT_IDS
from methods.test_to_peft import merged as merged_by_peft
from modeling.grown import IDS, apart
from modeling.test_other_experts import loaded, logits, shaken
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.modeling.block import blocks
from moetool.modeling.spans import Span

Models = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = 7, 9  # tokens where a prompt begins to count, and where it ends
REQUEST = torch.tensor([[11, 9, 12, 7, 13, 14, 9, 15], [0, 0, 21, 22, 9, 23, 24, 25]])
MASK = torch.tensor([[1] * 8, [0, 0] + [1] * 6])
COUNTS = torch.tensor([[3, 4, 5, -1], [2, 3, -1, -1]])  # the tokens that count of each


@pytest.fixture(scope="module")
def awaker(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Path:
    """What the recipe makes of a tiny Llama."""
    out = tmp_path_factory.mktemp("awaker") / "out"
    more = {"rank": 4, "alpha": 8, "prompt_from": str(BEGIN), "prompt_until": str(END)}
    recipe = ROOT / "recipes/upcycle/awaker.yaml"
    moetool.run(str(recipe), source=str(models("llama")), out=str(out), **more)
    return out


def wild(folder: Path) -> Any:
    model = loaded(folder)
    for part in ("lora_B", "router.weight", "router.bias", "router.norm"):
        shaken(model, part)
    return model


def merged(model: Any, mean: Tensor) -> dict[str, Tensor]:
    """The weights of a request whose prompt has this mean, in float64, with every low-rank change
    written out.
    """
    at = {n: p.detach().double() for n, p in model.named_parameters()}

    def gates(stem: str) -> Tensor:
        norm = mean / (mean.square().mean() + 1e-6).sqrt() * (1 + at[f"{stem}router.norm"])
        share = (at[f"{stem}router.weight"] @ norm + at[f"{stem}router.bias"]).softmax(-1)
        best = int(share.argmax())
        made = torch.zeros(5, dtype=torch.float64)
        made[best], made[4] = share[best] ** 2, 1 - share[best]
        return made

    def changed(weight: str, stem: str, each: Tensor, part: str = "") -> Tensor:
        made = at[f"{weight}.weight"]
        for e, gate in enumerate(each):
            a, b = (at[f"{stem}.{e}.{part}lora_{n}"] for n in "AB")
            made = made + gate * 2 * b @ a
        return made

    for number in range(model.config.num_hidden_layers):
        layer = f"model.layers.{number}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        for name in ("q_proj", "k_proj", "v_proj"):
            stem = next(n for n in at if n.startswith(f"{attn}.{name}.") and "lora_A" in n)
            one = changed(f"{attn}.{name}", stem.rsplit(".", 2)[0], torch.ones(1))
            at[f"{attn}.{name}.weight"] = one
        stem = f"{attn}.o_proj."
        at[f"{stem}weight"] = changed(f"{attn}.o_proj", f"{stem}experts", gates(stem))
        each = gates(f"{mlp}.")
        for name in ("gate_proj", "up_proj", "down_proj"):
            at[f"{mlp}.{name}.weight"] = changed(
                f"{mlp}.{name}", f"{mlp}.experts", each, f"{name}."
            )
    return at


def test_a_request_is_a_plain_model_with_its_changes_merged(awaker: Path, models: Models) -> None:
    """Each row of a batch, padded at the left, against the stock class in float64 with W + g^2 B A
    of the chosen expert and (1 - g) B A of the always-on one in every linear.
    """
    model, stock = wild(awaker), loaded(models("llama")).double()
    found = logits(model, REQUEST, attention_mask=MASK)
    embedded = model.get_input_embeddings()(REQUEST).detach().double()
    for row, counts in enumerate(COUNTS):
        mean = embedded[row, counts[counts >= 0]].mean(0)
        held = merged(model, mean)
        stock.load_state_dict({n: held[n] for n, _ in stock.named_parameters()}, strict=False)
        kept = MASK[row].bool()
        wanted = logits(stock, REQUEST[row : row + 1, kept])
        assert apart(found[row, kept].double(), wanted[0]) < 1e-4, row


def test_exact_at_birth_and_the_same_with_a_cache(awaker: Path, models: Models) -> None:
    assert apart(logits(loaded(awaker), IDS), logits(loaded(models("llama")), IDS)) <= 1e-5
    model = wild(awaker)
    how = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(REQUEST, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(whole.logits)) < 1e-4
    for row in range(2):  # alone, without padding
        kept = MASK[row].bool()
        mine = {**how, "attention_mask": MASK[row : row + 1, kept]}
        alone = model.generate(REQUEST[row : row + 1, kept], **mine)
        assert torch.equal(alone.sequences[0, -4:], cached.sequences[row, -4:])
        assert apart(torch.stack(alone.logits)[:, 0], torch.stack(cached.logits)[:, row]) < 1e-4


def test_a_request_is_an_adapter(awaker: Path, models: Models, tmp_path: Path) -> None:
    """With the weights that are said, at o and in the FFN; q, k and v have theirs always."""
    wild(awaker).save_pretrained(tmp_path / "own")
    gates = (0.5, 0.0, 0.0, 0.0, 0.25)
    said = ",".join(map(str, gates))
    how = {"target": "peft", "request_gates": said}
    moetool.materialize(str(tmp_path / "own"), str(tmp_path / "adapter"), **how)
    held, stock = load_file(tmp_path / "own" / "model.safetensors"), loaded(models("llama"))
    for name in (n for n in held if n.endswith("lora_A")):
        stem, _, tail = name.removesuffix(".lora_A").partition(".experts")
        number, _, linear = tail.partition(".")[2].partition(".")
        weight = 1.0 if stem.endswith(("q_proj", "k_proj", "v_proj")) else gates[int(number)]
        change = held[name.replace("lora_A", "lora_B")] @ held[name] * 2
        stock.get_submodule(f"{stem}.{linear}".rstrip(".")).weight.data += weight * change
    assert (
        apart(merged_by_peft(models("llama"), tmp_path / "adapter"), logits(stock, PEFT_IDS)) < 1e-5
    )


def test_spans() -> None:
    kept = MASK.bool()
    assert Span().of(REQUEST, kept).equal(kept)
    found = Span((BEGIN,), (END,)).of(REQUEST, kept)
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[3, 4, 5], [2, 3]]
    assert Span(end=(0,)).of(REQUEST, kept).equal(kept)  # padding ends nothing


@pytest.mark.parametrize("law", ["soft", "hard", "top_p"])
def test_changes_mixed_inside_each_linear(law: str, models: Models, tmp_path: Path) -> None:
    """Against float64: one router, and in each linear W x + sum of w_e (alpha / rank) B_e A_e x."""
    how = {"form": "lora", "lora_mix": "linears", "experts": 3, "rank": 4, "law": law}
    how |= {"top_k": 1} if law == "hard" else {}
    source, out = models("llama"), tmp_path / "out"
    report = moetool.upcycle(str(source), str(out), **how)
    assert report["certificate"]["level"] == "exact"
    assert apart(logits(loaded(out), IDS), logits(loaded(source), IDS)) <= 1e-5
    model = wild(out)
    block = next(blocks(model))
    (_, combine), x = block.held[0], torch.randn(11, 64)
    at = {n: p.detach().double() for n, p in block.named_parameters()}
    with torch.no_grad():
        chosen = combine.choose(block.router(x, block.heard))
        made = block(x[None])[0].double()
    weight = torch.ones(chosen.expert.shape) if chosen.weight is None else chosen.weight
    for token, one in enumerate(x.double()):
        pairs = zip(chosen.expert[token].tolist(), weight[token].double(), strict=True)
        runs = [(e, w) for e, w in pairs if e >= 0]

        def linear(name: str, h: Tensor, runs: list[Any] = runs) -> Tensor:
            total = at[f"{name}.weight"] @ h
            for e, w in runs:
                a, b = (at[f"experts.{e}.{name}.lora_{n}"] for n in "AB")
                total = total + w * 2 * b @ (a @ h)
            return total

        middle = functional.silu(linear("gate_proj", one)) * linear("up_proj", one)
        assert apart(made[token], linear("down_proj", middle)) < 1e-5
    with pytest.raises(MoetoolError, match=r"inside each linear|law top_p"):
        moetool.materialize(str(out), str(tmp_path / "native"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_mix": "linears", "site": "linear"}, "--lora-mix"),
        ({"key": "pooled", "prompt_from": "x"}, "--prompt-from names no tokens"),
        ({"key": "pooled", "prompt_until": "999"}, "--prompt-until names no tokens"),
        ({"law": "filled", "experts": 1}, "always on"),
        ({"law": "hard", "straight": "all", "key": "always"}, "trains a router"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    how = {"form": "lora", "experts": 2, "rank": 4, **options}
    with pytest.raises(UsageError, match=said):
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **how)
