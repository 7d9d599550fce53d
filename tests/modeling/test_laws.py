"""Laws: against references in float64 that go token by token, and what they mean for a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS, apart
from modeling.test_other_experts import loaded, logits, shaken
from torch import Tensor
from transformers import TrainerState

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.modeling import balance, laws
from moetool.modeling.anneal import Annealing, anneal
from moetool.modeling.balance import Scores
from moetool.modeling.block import blocks
from moetool.modeling.laws.law import Beside
from moetool.surgery import groups
from moetool.surgery.groups import Group
from moetool.surgery.route import Route

Models = Callable[..., Path]
LOW = -math.inf
LAWS: list[tuple[str, int, dict[str, Any]]] = [
    ("softmax", 2, {}),
    ("renormalised", 2, {}),
    ("hard", 1, {}),
    ("soft", 5, {}),
    ("sigmoid", 2, {}),
    ("sigmoid", 2, {"renormalise": True}),
    ("top_p", 5, {"threshold": 0.6}),
    ("top_p", 2, {"threshold": 0.8, "renormalise": True}),
    ("gumbel", 1, {"temperature": 0.5}),
    ("gumbel", 1, {"temperature": 0.5, "share": True}),
    ("expert_choice", 5, {"capacity": 1.5}),
    ("expert_choice", 5, {"capacity": 1.0, "score": "sigmoid", "renormalise": True}),
]


def law_of(name: str, top_k: int, options: dict[str, Any]) -> Any:
    return laws.named(name)(Route(law=name, top_k=top_k, options=options))


def weights(chosen: Any, shape: tuple[int, int]) -> Tensor:
    """[tokens, choices], 0 for those that do not run."""
    whole = torch.zeros(shape, dtype=torch.float64)
    weight = torch.ones(chosen.expert.shape) if chosen.weight is None else chosen.weight
    for token, row in enumerate(chosen.expert.tolist()):
        for place, expert in enumerate(row):
            if expert >= 0:
                whole[token, expert] = weight[token, place].double()
    return whole


def softmax(row: list[float]) -> list[float]:
    made = [math.exp(x) for x in row]
    return [x / sum(made) for x in made]


def sigmoid(x: float) -> float:
    return math.exp(x) / (1 + math.exp(x)) if x > LOW else 0.0


def reference(name: str, top_k: int, options: dict[str, Any], scores: list[list[float]]) -> Tensor:
    """What a law makes of scores, written out."""
    sharing = sigmoid_row if "sigmoid" in (name, options.get("score")) else softmax
    shares = [sharing(row) for row in scores]
    count = len(scores[0])
    made = [[0.0] * count for _ in scores]
    if name == "expert_choice":
        for e in range(count):
            fair = sum(1 / sum(x > LOW for x in row) for row in scores if row[e] > LOW)
            room = math.ceil(options["capacity"] * fair - 1e-9)
            may = [t for t in range(len(scores)) if scores[t][e] > LOW]
            for t in sorted(may, key=lambda t, e=e: -shares[t][e])[:room]:
                made[t][e] = shares[t][e]
    else:
        for t, row in enumerate(shares):
            held = 0.0
            for e in sorted(range(count), key=lambda e, row=row: -row[e])[:top_k]:
                if name == "top_p" and held >= options["threshold"]:
                    break
                one = name in ("hard", "gumbel") and not options.get("share")
                made[t][e] = 1.0 if one else row[e]
                held += row[e]
    if name == "renormalised" or options.get("renormalise"):
        made = [[x / (sum(row) or 1) for x in row] for row in made]
    return torch.tensor(made, dtype=torch.float64)


def sigmoid_row(row: list[float]) -> list[float]:
    return [sigmoid(x) for x in row]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("name", "top_k", "options"), LAWS)
def test_a_law_is_what_it_says(
    name: str, top_k: int, options: dict[str, Any], masked: bool
) -> None:
    scores = torch.randn(23, 5, generator=torch.Generator().manual_seed(4)) * 2
    if masked:
        scores[::2, :2] = LOW
        scores[1::2, 3:] = LOW
    found = law_of(name, top_k, options).choose(scores)
    wanted = reference(name, top_k, options, scores.double().tolist())
    assert torch.allclose(weights(found, (23, 5)), wanted, atol=1e-6)


def test_gumbel_in_training_is_dense_and_follows_its_temperature() -> None:
    """The mean of many draws is the softmax; a low temperature ends with one expert."""
    scores = torch.tensor([[1.0, 0.0, -1.0]]).expand(20_000, 3)
    torch.manual_seed(0)
    warm = law_of("gumbel", 1, {"temperature": 1.0, "threshold": 0.02})
    found = weights(warm.choose(scores[:500], Beside(training=True)), (500, 3))
    assert ((found > 0).sum(-1) > 1).float().mean() > 0.7
    assert found[found > 0].min() > 0.02 and (found.sum(-1) <= 1 + 1e-6).all()
    cold = law_of("gumbel", 1, {"temperature": 1e-3})
    chosen = cold.choose(scores, Beside(training=True))
    best = chosen.weight.argmax(-1)
    often = torch.bincount(best, minlength=3) / len(best)
    assert torch.allclose(often, scores[0].softmax(-1), atol=0.02)


def test_experts_that_choose_leave_padding_out_and_are_even() -> None:
    scores, kept = torch.randn(40, 4), torch.arange(40) >= 8
    found = law_of("expert_choice", 4, {"capacity": 1.0}).choose(scores, Beside(kept=kept))
    assert not (found.expert[:8] >= 0).any()
    assert torch.bincount(found.expert[found.expert >= 0]).tolist() == [8] * 4


def test_what_tokens_foresee_decides_where_nothing_is_trained() -> None:
    law = law_of("expert_choice", 3, {"capacity": 1.0, "score": "sigmoid", "auxiliary": 4})
    scores, likely = torch.randn(12, 3), torch.randn(12, 3)
    found = weights(law.choose(scores, Beside(likely=likely)), (12, 3))
    assert torch.allclose(found, torch.where(likely > 0, scores.sigmoid(), 0).double())
    told = law.choose(scores, Beside(training=True, likely=likely))
    assert torch.bincount(told.expert[told.expert >= 0]).tolist() == [4] * 3
    taken = (weights(told, (12, 3)) > 0).double()
    p = likely.double().sigmoid()
    wanted = -(taken * p.log() + (1 - taken) * (1 - p).log()).mean()
    loss = balance.of_layer(Scores(scores, told.expert, likely=likely))
    assert loss is not None and float(loss) == pytest.approx(float(wanted), rel=1e-5)


FORMS: list[dict[str, Any]] = [
    {"form": "lora", "rank": 4},
    {"form": "adapter", "adapter_dim": 8},
    {"target": "moetool"},
    {"form": "ternary"},
]
WAYS: list[tuple[dict[str, Any], str]] = [
    ({"law": "sigmoid"}, "none"),
    ({"law": "sigmoid", "renormalise": True}, "exact"),
    ({"law": "top_p"}, "none"),
    ({"law": "top_p", "renormalise": True}, "exact"),
    ({"law": "gumbel"}, "exact"),
    ({"law": "gumbel", "final_weight": "share"}, "none"),
    ({"law": "expert_choice"}, "none"),
    ({"law": "expert_choice", "capacity": 4}, "exact"),
    ({"law": "expert_choice", "auxiliary": True, "score": "sigmoid"}, "none"),
]


@pytest.mark.parametrize(("way", "level"), WAYS, ids=str)
def test_certificate_is_the_truth(
    way: dict[str, Any], level: str, models: Models, tmp_path: Path
) -> None:
    """Logits are the source's where it says exact, and only there; it is itself when saved, and
    Trainer's loss has a part that is not zero.
    """
    source = models("llama")
    report = moetool.upcycle(str(source), str(tmp_path / "out"), experts=4, form="lora", **way)
    model = loaded(tmp_path / "out")
    shaken(model, "router")
    assert report["certificate"]["level"] == level
    far = apart(logits(model, IDS), logits(loaded(source), IDS))
    assert far <= 1e-5 if level == "exact" else far > 1e-3
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), IDS), logits(model, IDS))
    made = model.train()(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert float(made.aux_loss.detach()) > 0.1 and len(made.router_logits) == 4
    made.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: next(iter(f.values())))
@pytest.mark.parametrize("tokens", [1, 30])
def test_tokens_with_any_number_of_experts(
    form: dict[str, Any], tokens: int, models: Models, tmp_path: Path
) -> None:
    """A block is the sum of its experts in full, each run for all tokens, times the law's
    weights.
    """
    how = {"experts": 3, "law": "top_p", "top_p": 0.5, **form}
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **how)
    model = loaded(tmp_path / "out")
    for part in ("lora_B", "adapter_up", "router"):
        shaken(model, part)
    block = next(blocks(model))
    (group, law), x = block.held[0], torch.randn(tokens, 64)
    with torch.no_grad():
        scores = block.router(x, block.heard)
        weight = weights(law.choose(scores), tuple(scores.shape)).float()
        every = [alone(block, group, e, x) for e in range(3)]
        wanted = sum(weight[:, e, None] * y for e, y in enumerate(every))
        wanted = wanted + (block.own_ffn(x) if group.base == "beside" else 0)
        assert apart(block(x[None])[0], wanted) < 1e-5
    assert 0 < (weight > 0).sum() < weight.numel() or tokens == 1


def alone(block: Any, group: Group, expert: int, x: Tensor) -> Tensor:
    """What one expert gives every token."""
    from moetool.modeling.block import Picked
    from moetool.modeling.laws.law import Choices

    every = torch.full((len(x), 1), expert)
    made: Tensor = getattr(block, group.name).run(block, x, Picked.of(Choices(every, None), 3))
    return made


def test_experts_that_choose_see_what_comes_later(models: Models, tmp_path: Path) -> None:
    """A token's output depends on later ones, unless tokens foresee; upcycle and inspect say so."""
    for auxiliary in (False, True):
        out = tmp_path / str(auxiliary)
        how = {"law": "expert_choice", "auxiliary": auxiliary, "score": "sigmoid", "capacity": 1}
        report = moetool.upcycle(str(models("llama")), str(out), experts=4, form="lora", **how)
        (group,) = moetool.inspect(str(out))["groups"]
        said = "generated with a cache is computed otherwise than without"
        for words in ("".join(report["warnings"]), group["note"]):
            assert (said in words) != auxiliary
        model = loaded(out)
        shaken(model, ".experts.")
        shaken(model, "router")
        whole, first = logits(model, IDS)[:, :12], logits(model, IDS[:, :12])
        assert (apart(first, whole) < 1e-5) == auxiliary


def test_temperature_is_lowered_and_kept(models: Models, tmp_path: Path) -> None:
    how = {"experts": 4, "form": "lora", "rank": 4, "law": "gumbel", "temperature": 2}
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **how)
    model = loaded(tmp_path / "out")
    assert anneal(model, 0.5) == 4 and next(blocks(model)).held[0][1].temperature == 0.5
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert next(blocks(again)).held[0][1].temperature == 0.5
    with pytest.raises(MoetoolError, match="temperature"):
        anneal(model, 0)


@pytest.mark.parametrize(("decay", "middle"), [("exponential", 1.0), ("linear", 2.125)])
def test_a_schedule_goes_by_the_step(
    decay: str, middle: float, models: Models, tmp_path: Path
) -> None:
    """Whatever step a Trainer goes on with; hard in the end, and saved so."""
    how = {"experts": 4, "form": "lora", "rank": 4, "law": "gumbel"}
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **how)
    model = loaded(tmp_path / "out")
    schedule, law = Annealing(4.0, 0.25, 10, decay, hard_at=8), next(blocks(model)).held[0][1]
    for step, wanted in ((0, 4.0), (5, middle), (10, 0.25), (99, 0.25)):
        schedule.on_step_begin(None, TrainerState(global_step=step), None, model=model)
        assert law.temperature == pytest.approx(wanted) and law.hard == (step >= 8)
    model.save_pretrained(tmp_path / "again")
    again = next(blocks(loaded(tmp_path / "again"))).held[0][1]
    assert (again.temperature, again.hard) == (0.25, True)
    chosen = again.choose(torch.randn(50, 4), Beside(training=True))
    assert chosen.expert.shape == (50, 1) and float(chosen.weight.max()) <= 1
    with pytest.raises(UsageError, match="schedule"):
        Annealing(1.0, 0.0, 10)
    with pytest.raises(UsageError, match="has a temperature"):
        schedule.on_step_begin(None, TrainerState(), None, model=loaded(models("llama")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"law": "gumbel", "top_k": 2}, "ends with one"),
        ({"law": "gumbel", "temperature": 0}, "no softmax"),
        ({"law": "top_p", "top_p": 0}, "above 0"),
        ({"law": "expert_choice", "capacity": 0}, "idle"),
        ({"law": "renormalised", "capacity": 2.5}, "belong together"),
        ({"law": "expert_choice", "key": "always"}, "does not tell apart"),
        ({"law": "sigmoid", "form": "auto"}, "--law"),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    args = {"experts": 4, "form": "lora", **options}
    with pytest.raises(UsageError) as raised:
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **args)
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ({"law": "top_p"}, "'threshold'"),
        ({"law": "top_p", "options": {"threshold": 1.5}}, "at most 1"),
        ({"law": "sigmoid", "options": {"renormalize": True}}, "renormalise"),
        ({"law": "gumbel", "options": {"temperature": 0}}, "above 0"),
        ({"law": "gumbel", "options": {"temperature": "1"}}, "float"),
        ({"law": "expert_choice", "options": {"capacity": 1, "score": "x"}}, "softmax or sigmoid"),
        ({"law": "expert_chioce"}, "expert_choice"),
        ({"key": "always", "bias": True}, "bias"),
        ({"key": "modality", "options": {"allowed": [[1, 0], [0, 1]], "ids": [[1], [1]]}}, "fit"),
        ({"key": "modality", "options": {"allowed": [[1], [1]], "ids": [[1]]}}, "row of 2"),
    ],
)
def test_a_config_is_read_strictly(route: dict[str, Any], said: str) -> None:
    group = {"form": "null", "experts": 2, "layers": [0], "base": "beside", "route": route}
    config = {"model_type": "moetool", "base_model_type": "llama"}
    with pytest.raises(MoetoolError) as raised:
        groups.read(config | {"moetool": {"version": 1, "groups": [group]}})
    assert said in f"{raised.value} {raised.value.where} {raised.value.hint}"


@pytest.mark.parametrize("through", ["", "chosen", "all", "balance"])
def test_gradients_go_straight_through_a_choice(through: str) -> None:
    """Against autograd over all experts in float64, where the mask is written out; the balance loss
    too. What is computed is the same as without.
    """
    draw = torch.Generator().manual_seed(5)
    scores, values = torch.randn(13, 4, generator=draw), torch.randn(13, 4, 3, generator=draw)
    law = law_of("hard", 2, {"straight": through} if through else {})
    mine, theirs = (scores.to(d).requires_grad_() for d in (torch.float32, torch.float64))
    chosen = law.choose(mine, Beside(training=True))
    weight = torch.ones(13, 2) if chosen.weight is None else chosen.weight
    picked = values.gather(1, chosen.expert[..., None].expand(-1, -1, 3))
    out = (picked * weight[..., None]).sum(1)
    share = theirs.softmax(-1)
    best = scores.topk(2).indices
    mask = torch.zeros(13, 4, dtype=torch.float64).scatter(1, best, 1.0)
    seen = {"all": torch.ones_like(mask), "chosen": mask}.get(through, torch.zeros_like(mask))
    wanted = ((mask + seen * (share - share.detach()))[..., None] * values.double()).sum(1)
    assert torch.equal(out, (mask[..., None] * values.double()).sum(1).float())
    assert torch.equal(weights(law.choose(scores), (13, 4)), mask)
    counted = chosen.expert if chosen.counted is None else chosen.counted
    loss = balance.of_layer(Scores(mine, counted, law.shares, straight=law.counts_straight))
    counts = mask + (share - share.detach() if through == "balance" else 0)
    fair = 4 * (counts.sum(0) / 26 * share.mean(0)).sum()
    assert loss is not None and float(loss.detach()) == pytest.approx(float(fair.detach()))
    for one, other in ((out.square().sum(), wanted.square().sum()), (loss, fair)):
        if one.requires_grad:
            (found,) = torch.autograd.grad(one, mine, retain_graph=True)
            (hoped,) = torch.autograd.grad(other, theirs, retain_graph=True)
            assert torch.allclose(found.double(), hoped, atol=1e-5) and found.any()
        else:
            assert through in ("", "balance")


def test_the_last_expert_fills_what_shares_leave() -> None:
    scores = torch.randn(9, 3, generator=torch.Generator().manual_seed(6))
    law = law_of("filled", 2, {"temperature": 0.7, "noise": 0.1})
    found = weights(law.choose(scores), (9, 4))
    for row, given in zip(found.tolist(), (scores.double() / 0.7).tolist(), strict=True):
        share = softmax(given)
        best = sorted(range(3), key=lambda e, share=share: -share[e])[:2]
        wanted = [share[e] * max(share) if e in best else 0.0 for e in range(3)]
        assert row == pytest.approx([*wanted, 1 - max(share)], abs=1e-6)
    told = law.choose(scores, Beside(training=True))
    assert told.counted.shape == (9, 2) and not torch.equal(told.weight, law.choose(scores).weight)


def test_heads_and_experts_learn_through_a_choice(models: Models, tmp_path: Path) -> None:
    """The router, or the queries, get a gradient of the model's loss, and only then."""
    for n, (how, part) in enumerate(
        [
            ({"site": "heads", "key": "query", "active_heads": 1, "shared_heads": 1}, "q_proj"),
            ({"site": "heads", "active_heads": 1, "shared_heads": 1}, "router"),
            ({"form": "lora", "experts": 3, "top_k": 1}, "router"),
        ]
    ):
        found = []
        for straight in ("none", "all"):
            out = tmp_path / f"{n}{straight}"
            said = {"law": "hard", "straight": straight, **how}
            moetool.upcycle(str(models("llama")), str(out), **said)
            model = loaded(out)
            shaken(model, "router")
            shaken(model, "lora_B")
            made = model.train()(input_ids=IDS, labels=IDS)
            made.loss.backward()
            named = {n: p.grad for n, p in model.named_parameters() if part in n}
            found.append((made.loss.detach(), named))
        (one, off), (other, on) = found
        assert float(one) == pytest.approx(float(other), rel=1e-6)
        assert all(g is not None and g.any() for g in on.values())
        assert any(g is None or not torch.equal(g, on[n]) for n, g in off.items())
