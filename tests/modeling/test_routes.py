"""What routes look at: exact at birth, as a reference in float64 says, the same with a cache and
without, and when layers run again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS, apart
from modeling.test_other_experts import CHECKPOINTING, loaded, logits, shaken
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.modeling import signals
from moetool.modeling.block import blocks
from moetool.modeling.signals import Heard

Models = Callable[..., Path]
LORA: dict[str, Any] = {"form": "lora", "rank": 4, "experts": 4}
# key -> its options, and what a call must say
KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pooled": ({}, {}),
    "pooled-hidden": ({"pool": "hidden"}, {}),
    "sequence": ({}, {}),
    "noise": ({"noise_dim": 8}, {"noise": torch.tensor([0.3, -1.2])}),
    "task": ({}, {"task": torch.tensor([2, 0])}),
    "domain": ({"domains": "@"}, {}),
    "neurons": ({"neurons": "3,30,77,127"}, {}),
}
HIDDEN = 64


def made(key: str, models: Models, folder: Path, **more: Any) -> Path:
    options = dict(KEYS[key][0])
    if options.get("domains"):
        draw = torch.Generator().manual_seed(2)
        save_file({"d": torch.randn(4, 6, generator=draw)}, folder / "d.safetensors")
        options["domains"] = str(folder / "d.safetensors")
    out, word = folder / f"out{len(more)}", key.partition("-")[0]
    moetool.upcycle(str(models("llama")), str(out), **{**LORA, "key": word, **options, **more})
    return out


def wild(model: Any) -> Any:
    """Experts that differ, and a router that tells."""
    for part in (".experts.", "router.weight", "router.bias", "router.inner", "router.embed"):
        shaken(model, part)
    return model


@pytest.mark.parametrize("key", KEYS)
def test_exact_at_birth_trained_and_saved(key: str, models: Models, tmp_path: Path) -> None:
    """Logits are the source's, a saved model is itself, and layers that run again give the same
    gradients, with a balance loss.
    """
    said, source = KEYS[key][1], models("llama")
    out = made(key, models, tmp_path)
    model, stock = loaded(out), loaded(source)
    assert apart(logits(model, IDS, **said), logits(stock, IDS)) <= 1e-5
    moetool.verify(str(out), against=[str(source)], load=key == "noise")
    wild(model)
    assert apart(logits(model, IDS, **said), logits(stock, IDS)) > 1e-3
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again").train()
    assert torch.equal(logits(again.eval(), IDS, **said), logits(model, IDS, **said))
    found = []
    for rerun in (False, True):
        again.zero_grad()
        again.train()
        if rerun:
            getattr(again, CHECKPOINTING, again.gradient_checkpointing_enable)()
        loss = again(input_ids=IDS, labels=IDS, output_router_logits=True, **said)
        if key != "task":
            assert float(loss.aux_loss.detach()) > 0.1
        loss.loss.backward()
        found.append({n: p.grad.clone() for n, p in again.named_parameters() if p.grad is not None})
    one, other = found
    assert one.keys() == other.keys()
    assert all(torch.allclose(g, other[n], atol=1e-6) for n, g in one.items())
    assert key in ("task", "neurons") or any("router" in n and g.any() for n, g in one.items())


@pytest.mark.parametrize("key", ["pooled", "pooled-hidden", "sequence", "noise", "task"])
def test_generating_is_the_same_with_a_cache(key: str, models: Models, tmp_path: Path) -> None:
    """Two prompts of unlike length, padded at the left."""
    model = wild(loaded(made(key, models, tmp_path)))
    mask = torch.ones_like(IDS[:, :8])
    mask[0, :3] = 0
    how = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "output_logits": True}
    how |= {"return_dict_in_generate": True, "pad_token_id": 0, **KEYS[key][1]}
    cached, whole = (model.generate(IDS[:, :8], use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(whole.logits)) < 1e-5
    if key in ("pooled", "pooled-hidden", "sequence"):
        check_padding(model, how, torch.stack(cached.logits))
    if key != "pooled":
        return
    beams = {**how, "num_beams": 2, "output_logits": False}
    one, two = (model.generate(IDS[:, :8], use_cache=use, **beams) for use in (True, False))
    assert torch.equal(one.sequences, two.sequences)


def check_padding(model: Any, how: dict[str, Any], wanted: Tensor) -> None:
    """What stands in the padding changes nothing, nor whether there is any."""
    other = IDS[:, :8].clone()
    other[0, :3] = torch.tensor([150, 3, 77])
    again = model.generate(other, **how)
    assert apart(torch.stack(again.logits), wanted) < 1e-6
    alone = model.generate(IDS[:1, 3:8], **{**how, "attention_mask": torch.ones(1, 5).long()})
    assert apart(torch.stack(alone.logits)[:, 0], wanted[:, 0]) < 1e-5


def scores(router: Any, key: str, x: Tensor, heard: Heard) -> Tensor:
    """What a route says of x [batch, length, hidden], in float64, sequence by sequence."""
    at = {n: p.detach().double() for n, p in router.named_parameters()}
    rows = []
    for b, sequence in enumerate(x.double()):
        if key.startswith("pooled"):
            seen = sequence if key.endswith("hidden") else heard.values["embeddings"][b].double()
            mean = seen[heard.values["prompt"][b]].mean(0)
            mean = mean / (mean.square().mean() + 1e-6).sqrt() * (1 + at["norm"])
            one = at["weight"] @ mean + at["bias"]
        elif key == "sequence":
            one = at["weight"] @ sequence[int(heard.values["kept"][b].nonzero()[0])]
        elif key == "noise":
            level = heard.values["noise"][b].double()
            inner = at["inner"] @ (at["embed"][:, 0] * level + at["embed_bias"]) + at["inner_bias"]
            a, gate = inner[: len(inner) // 2], inner[len(inner) // 2 :]
            one = at["weight"] @ (a * functional.silu(gate)) + at["bias"]
        elif key == "task":
            one = torch.full((4,), -torch.inf).double()
            one[heard.values["task"][b]] = 0
        elif key == "domain":
            e = [
                at["down"] @ (functional.silu(at["gate"] @ d) * (at["up"] @ d))
                for d in at["domains"]
            ]
            rows.append(sequence @ torch.stack(e).T)
            continue
        else:
            fires = functional.silu(sequence @ at["gate"].T) * (sequence @ at["up"].T)
            rows.append(fires.abs())
            continue
        rows.append(one.expand(len(sequence), 4))
    return torch.cat(rows)


@pytest.mark.parametrize("key", KEYS)
def test_a_route_is_what_it_says(key: str, models: Models, tmp_path: Path) -> None:
    model = wild(loaded(made(key, models, tmp_path)))
    shaken(model, "router.norm")
    router = next(blocks(model)).router
    x = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(6))
    kept = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    prompt = kept & torch.tensor([1, 1, 1, 1, 0, 0, 0]).bool()
    said = {"kept": kept, "prompt": prompt, "embeddings": torch.randn(2, 7, HIDDEN)}
    heard = Heard({**said, "noise": torch.tensor([0.5, 2.0]), "task": torch.tensor([3, 1])})
    with torch.no_grad():
        found = router(x.reshape(-1, HIDDEN), heard).double()
    wanted = scores(router, key, x, heard)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_prompt_is_what_labels_leave_out(models: Models, tmp_path: Path) -> None:
    """In training an answer must not choose its own experts."""
    model = wild(loaded(made("pooled", models, tmp_path)))
    ids, labels = IDS[:1].clone(), IDS[:1].clone()
    labels[:, :10] = -100
    answered = model(input_ids=ids, labels=labels, output_router_logits=True).router_logits[0]
    ids[:, 10:] = 7
    other = model(input_ids=ids, labels=labels, output_router_logits=True).router_logits[0]
    assert torch.equal(answered, other)
    said = torch.ones_like(ids)
    said[:, 10:] = 0
    told = model(input_ids=ids, prompt=said, output_router_logits=True).router_logits[0]
    assert torch.allclose(told, other, atol=1e-6)
    whole = model(input_ids=ids, output_router_logits=True).router_logits[0]
    assert not torch.allclose(whole, other, atol=1e-3)


def test_neurons_are_rows_of_the_ffn(models: Models, tmp_path: Path) -> None:
    numbers = [3, 30, 77, 127]
    for family in ("llama", "phi3"):
        out = tmp_path / family
        args = {**LORA, "key": "neurons", "neurons": ",".join(map(str, numbers)), "layers": "1"}
        moetool.upcycle(str(models(family)), str(out), **args)
        held = load_file(next(out.glob("*.safetensors")))
        at = "model.layers.1.mlp."
        if family == "llama":
            gate, up = held[f"{at}gate_proj.weight"], held[f"{at}up_proj.weight"]
        else:
            gate, up = held[f"{at}gate_up_proj.weight"].chunk(2)
        assert torch.equal(held[f"{at}router.gate"], gate[numbers])
        assert torch.equal(held[f"{at}router.up"], up[numbers])


def test_whole_copies_and_any_key(models: Models, tmp_path: Path) -> None:
    """Forms and keys are independent: an expert of its own for each task, from three models."""
    source, other = models("llama"), models("llama", seed=1)
    args = {"experts": 2, "key": "task", "expert_map": "0,1", "experts_from": [str(other)]}
    moetool.upcycle(str(source), str(tmp_path / "out"), form="full", **args)
    model, stock = loaded(tmp_path / "out"), loaded(source)
    assert apart(logits(model, IDS, task=0), logits(stock, IDS)) <= 1e-5
    assert apart(logits(model, IDS, task=1), logits(stock, IDS)) > 1e-3
    model.usual = {"task": 1}
    assert torch.equal(logits(model, IDS), logits(model, IDS, task=torch.tensor([1, 1])))


def test_what_a_call_lacks_is_said(models: Models, tmp_path: Path) -> None:
    task = loaded(made("task", models, tmp_path))
    for said, words in (
        ({}, "need to know the task"),
        ({"task": torch.tensor([4])}, "not one of the model's"),
        ({"task": torch.tensor([0, 1, 2])}, "need to know the task"),
        ({"task": 0, "noise": 1.0}, "no route of this model looks at noise"),
    ):
        with pytest.raises(UsageError, match=words):
            logits(task, IDS, **said)
    noise = loaded(made("noise", models, tmp_path, layers="1"))
    with pytest.raises(UsageError, match="no number"):
        logits(noise, IDS, noise=torch.tensor([torch.nan, 1.0]))
    first = loaded(made("sequence", models, tmp_path, layers="1", seed=3))
    with pytest.raises(UsageError, match="by itself"):
        next(blocks(first))(torch.randn(1, 3, HIDDEN))
    cache = loaded(models("llama"))(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="how these sequences begin"):
        first(input_ids=IDS[:, :1], past_key_values=cache)
    assert signals.GIVEN.keys() == {"modality", "prompt", "noise", "task"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": "domain"}, "--domains FILE"),
        ({"key": "domain", "domains": "nowhere.safetensors"}, "names no file"),
        ({"key": "neurons", "neurons": "1,2"}, "one neuron an expert"),
        ({"key": "neurons", "neurons": "1,2,3,999"}, "one neuron an expert"),
        ({"key": "neurons", "router": "zero"}, "starts at random"),
        ({"key": "task", "allowed": "10/01"}, "--allowed does not fit"),
        ({"key": "query"}, "--site heads"),
        ({"key": "sequence", "law": "expert_choice"}, "does not tell apart"),
        ({"key": "token", "noise_dim": 8}, "belong together"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(MoetoolError) as raised:
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **{**LORA, **options})
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


def test_patches_choose_by_all_of_their_tokens(models: Models, tmp_path: Path) -> None:
    """Against float64, of a batch padded at the left; token by token with a cache each sees what
    came before it in its patch; exact at birth and itself when saved.
    """
    out = made("sequence", models, tmp_path, patch=4, router_bias=True)
    model, stock = loaded(out), loaded(models("llama"))
    assert apart(logits(model, IDS), logits(stock, IDS)) <= 1e-5
    wild(model)
    router, x = next(blocks(model)).router, torch.randn(2, 7, HIDDEN)
    kept = torch.tensor([[0, 0] + [1] * 5, [1] * 7]).bool()
    at = {n: p.detach().double() for n, p in router.named_parameters()}

    def wanted(row: int, last: int, first: int) -> Tensor:
        """The scores of a patch that begins at `first`, of what stands up to `last`."""
        flat = torch.zeros(4, HIDDEN, dtype=torch.float64)
        flat[: last + 1 - first] = x[row, first : last + 1].double()
        return at["weight"] @ flat.flatten() + at["bias"]

    with torch.no_grad():
        whole = router(x.flatten(0, 1), Heard({"kept": kept})).view(2, 7, -1).double()
        steps = [router(x[:, :4].flatten(0, 1), Heard({"kept": kept[:, :4]})).view(2, 4, -1)]
        for n in range(4, 7):
            heard = Heard({"kept": kept[:, n : n + 1]}, fresh=False)
            steps.append(router(x[:, n], heard).view(2, 1, -1))
    cached = torch.cat(steps, 1).double()
    for row, start in ((0, 2), (1, 0)):
        for n in range(start, 7):
            first = start + (n - start) // 4 * 4
            last = min(first + 3, 6)
            assert apart(whole[row, n], wanted(row, last, first)) < 1e-5
            seen = min(last, 3) if n < 4 else n
            assert apart(cached[row, n], wanted(row, seen, first)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), IDS), logits(model, IDS))
    moetool.verify(str(out), against=[str(models("llama"))], load=False)
    again = {**LORA, "key": "sequence", "patch": 4}
    told = moetool.upcycle(str(models("llama")), str(tmp_path / "dry"), dry_run=True, **again)
    assert any("tokens of a patch choose together" in line for line in told["warnings"])
