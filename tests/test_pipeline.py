"""The steps of the pipeline, apart: what each takes, gives, refuses and leaves behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetool import methods, pipeline
from moetool.errors import MoetoolError, Stopped, UsageError, VerificationFailed
from moetool.evaluate.measured import Measured
from moetool.methods.contract import (
    Certificate,
    Line,
    Method,
    ModelFacts,
    Report,
    Summary,
    left_out,
)
from moetool.methods.options import Common, Gate, Text
from moetool.methods.prepared import Options, Prepared
from moetool.pipeline import Caller
from moetool.progress import Stage
from moetool.surgery import promise
from moetool.surgery.writer import Writer


def asked(source: Path, out: Path, *, common: Common | None = None, **values: Any) -> Options:
    return Options(str(out), (str(source),), "upcycle", values, common or Common())


def writer_of(prepared: Prepared) -> Writer:
    return Writer(prepared.options.out, prepared.plan, sources=prepared.sources)


def test_preparing_writes_nothing(llama: Path, tmp_path: Path) -> None:
    prepared = pipeline.prepare(asked(llama, tmp_path / "out", experts=4))
    assert not list(tmp_path.iterdir())
    assert prepared.names == (str(llama),) and len(prepared.sources) == 1
    assert prepared.jobs >= 1 and prepared.peak > 0 and not prepared.done
    assert prepared.method.recorded()["experts"] == 4 and prepared.chosen == {}


def test_a_summary_is_a_value(llama: Path, tmp_path: Path) -> None:
    prepared = pipeline.prepare(asked(llama, tmp_path / "out", experts=4))
    found = pipeline.summary(prepared)
    data = found.as_json()
    assert json.loads(json.dumps(data)) == data
    facts = ModelFacts.of(found.facts)
    assert (data["experts"], data["target_type"]) == (facts.experts, facts.target_type)
    assert data["output_bytes"] == prepared.plan.disk
    assert list(data).index("facts") if "facts" in data else True
    assert "trunks" not in data and "warnings" not in data


def test_make_alone_leaves_shards_that_do_not_load(llama: Path, tmp_path: Path) -> None:
    common = Common(max_shard_size=200_000)
    prepared = pipeline.prepare(asked(llama, tmp_path / "out", experts=4, common=common))
    assert len(prepared.plan.shards) > 2
    with writer_of(prepared) as writer:
        written = pipeline.make(prepared, writer, Caller())
        assert (written.resumed, written.findings, written.nodes) == (0, (), ())
        assert not (tmp_path / "out").exists()
        assert not (writer.staging / "config.json").exists()
        found = pipeline.staged(prepared, writer)
        assert set(found.tensors) == set(prepared.plan.targets)
        again = pipeline.make(prepared, writer, Caller())
        assert again.resumed == len(prepared.plan.shards)


def test_finish_gives_it_its_name(llama: Path, tmp_path: Path) -> None:
    prepared = pipeline.prepare(asked(llama, tmp_path / "out", experts=4))
    with writer_of(prepared) as writer:
        pipeline.make(prepared, writer, Caller())
        pipeline.finish(prepared, writer, Report.of(pipeline.summary(prepared)))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "moetool.json", "README.md", "model.safetensors"} <= names
    assert not list(tmp_path.glob(".out*"))


def test_write_is_all_of_them_once(llama: Path, tmp_path: Path) -> None:
    options = asked(llama, tmp_path / "out", experts=4)
    report = pipeline.write(pipeline.prepare(options))
    assert report.resumed_shards == 0 and report.quality is None and report.stages is None
    again = pipeline.prepare(options)
    assert again.done
    second = pipeline.write(again)
    assert second.seconds == 0 and "already there" in second.warnings[0]
    assert second.resumed_shards == report.shards


def test_nobody_asked_for_measuring(llama: Path, tmp_path: Path) -> None:
    prepared = pipeline.prepare(asked(llama, tmp_path / "out"))
    assert prepared.method.gate is None and prepared.method.text == Text()
    assert pipeline.measure(prepared, writer_of(prepared), Caller()) == Measured()


class Missed(Method):
    """A method whose gate is missed."""

    @property
    def gate(self) -> Gate:
        return Gate(max_kl=1e-9, text=("nothing",))


def test_a_missed_gate_removes_what_was_made(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetool.evaluate import gate

    def missed(*args: object, **kwargs: object) -> None:
        raise VerificationFailed("too far")

    prepared = pipeline.prepare(asked(llama, tmp_path / "out"))
    monkeypatch.setattr(gate, "measure", missed)
    gated = replace(prepared, method=Missed(None))
    with pytest.raises(VerificationFailed):
        pipeline.write(gated)
    assert not list(tmp_path.iterdir())


def test_a_gate_without_text_is_refused(llama: Path, tmp_path: Path) -> None:
    from moetool.evaluate import gate

    class Blind(Missed):
        @property
        def gate(self) -> Gate:
            return Gate(max_kl=0.1)

    prepared = replace(pipeline.prepare(asked(llama, tmp_path / "out")), method=Blind(None))
    with pytest.raises(UsageError, match="needs text"):
        gate.measure(prepared, prepared.sources[0], tell=lambda *a: None, stop=None)


@pytest.mark.parametrize(
    ("found", "gate", "missed"),
    [
        ({"kl": 0.1}, Gate(), False),
        ({"kl": 0.1}, Gate(max_kl=0.2), False),
        ({"kl": 0.3}, Gate(max_kl=0.2), True),
        ({"kl": float("nan")}, Gate(max_kl=0.2), True),
        ({"perplexity_increase": 0.05}, Gate(max_perplexity_increase=0.02), True),
        ({"perplexity_increase": 0.01}, Gate(max_perplexity_increase=0.02), False),
        ({"perplexity_increase": -0.1}, Gate(max_perplexity_increase=0.0), False),
        ({"perplexity_increase": 0.1}, Gate(max_perplexity_increase=0.0), True),
    ],
    ids=str,
)
def test_gates(found: dict[str, float], gate: Gate, missed: bool) -> None:
    from moetool.evaluate.gate import check

    if not missed:
        check(found, gate, "here")
        return
    with pytest.raises(VerificationFailed, match="from the source"):
        check(found, gate, "here")


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_memory_decides_how_many_work(jobs: int, llama: Path, tmp_path: Path) -> None:
    prepared = pipeline.prepare(asked(llama, tmp_path / "out", experts=4))
    free = promise.fit(prepared.plan, prepared.sources, jobs, None)
    assert free.jobs == jobs
    one = promise.fit(prepared.plan, prepared.sources, 1, None)
    assert one.peak <= free.peak
    tight = promise.fit(prepared.plan, prepared.sources, jobs, one.peak)
    assert (tight.jobs, tight.peak <= one.peak) == (1, True)
    with pytest.raises(MoetoolError, match="does not fit"):
        promise.fit(prepared.plan, prepared.sources, jobs, one.peak - 1)


def test_progress_says_its_unit(llama: Path, tmp_path: Path) -> None:
    heard: list[tuple[Stage, int, int]] = []
    caller = Caller(lambda *told: heard.append(told))
    prepared = pipeline.prepare(asked(llama, tmp_path / "out", experts=4), caller)
    pipeline.write(prepared, caller)
    stages = {stage.name: stage.unit for stage, _, _ in heard}
    assert stages["write"] == "bytes"
    stage, done, total = heard[-1]
    assert stage == Stage("write") and done == total


def test_stopped_before_the_first_shard(llama: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    prepared = pipeline.prepare(asked(llama, tmp_path / "out", experts=4))
    stop.set()
    with pytest.raises(Stopped, match="finished shards are kept"):
        pipeline.write(prepared, Caller(stop=stop))
    assert not (tmp_path / "out").exists()
    assert pipeline.write(pipeline.prepare(prepared.options)).shards == 1


def test_a_dry_run_works_elsewhere(llama: Path, tmp_path: Path) -> None:
    dry = pipeline.prepare(asked(llama, tmp_path / "out", common=Common(dry_run=True)))
    wet = pipeline.prepare(asked(llama, tmp_path / "out"))
    assert Path(wet.work) == tmp_path / ".out.moetool-work" and not Path(wet.work).exists()
    assert Path(dry.work).is_dir() and tmp_path not in Path(dry.work).parents


# --- what is said of it


def summary(**change: Any) -> Summary:
    facts = ModelFacts("llama", "mixtral", (0, 1), 4, 2, 8, "per-expert", 100, 60, (0, 0, 0, 0))
    found = Summary(
        sources=("a",),
        out="/out",
        method="upcycle",
        options={"experts": 4, "text": ("x", "y")},
        seed=0,
        certificate=Certificate("exact", "because"),
        output_bytes=10,
        tensors=3,
        shards=1,
        read_bytes=5,
        peak_memory=7,
        jobs=1,
        free_disk=100,
        plan_digest="d",
        dropped_tensors={"t": "old"},
        dropped_fields={"f": "gone"},
        facts=facts,
    )
    return replace(found, **change)


def test_a_report_says_what_happened_and_nothing_else() -> None:
    plain = Report.of(summary()).as_json()
    assert list(plain)[-3:] == ["warnings", "resumed_shards", "seconds"]
    assert not {"quality", "stages", "peak_rss", "ray_nodes", "facts"} & set(plain)
    assert plain["options"]["text"] == ["x", "y"] and plain["certificate"]["level"] == "exact"
    full = Report.of(summary(), quality={"kl": 0.1}, peak_rss=5, ray_nodes=("n",)).as_json()
    assert list(full)[-3:] == ["ray_nodes", "quality", "peak_rss"]


def test_left_out() -> None:
    assert left_out(summary()) == {"t": "old", "config.f": "gone"}
    assert Method(None).card(Report.of(summary())) == [
        "left out: `t` (old)",
        "left out: `config.f` (gone)",
    ]


def test_lines() -> None:
    assert str(Line("experts", "8 of width 384")) == "  experts      8 of width 384"
    facts = ModelFacts.of(summary().facts)
    assert [line.label for line in facts.lines()] == ["family", "experts", "parameters"]
    assert [line.label for line in replace(facts, experts=0).lines()] == ["family", "parameters"]
    trunks = ({"source": "b", "distance": 0.5},)
    assert replace(facts, trunks=trunks).as_json()["trunks"] == list(trunks)
    assert "trunks" not in facts.as_json()


def test_the_screen_says_the_plan_and_the_run() -> None:
    from moetool.cli.write import shown

    method = methods.make("upcycle", {"experts": 4})
    planned = shown(method, summary(), None)
    assert planned.startswith("a -> /out\n  family       llama -> mixtral")
    assert "coverage 1: because" in planned and "done" not in planned
    report = Report.of(summary(), seconds=2.0, resumed_shards=1)
    finished = shown(method, report, report)
    assert "done         2.0s, 5 B/s, 1 files were there already" in finished
    already = Report.of(summary(), resumed_shards=1)
    assert "done         0.0s, 1 files were there already" in shown(method, already, already)
    quality = {
        "kl": 0.5,
        "perplexity": 3.0,
        "reference_perplexity": 2.0,
        "tokens": 1000,
        "held_out": False,
    }
    measured = Report.of(summary(), quality=quality, stages={"decide": 1.0})
    text = shown(method, measured, measured)
    assert "KL 0.5, perplexity 2 -> 3 on 1,000 predictions of the calibration text" in text
    assert "/s" not in text.splitlines()[-1]


LEAST = {  # what a verb cannot do without: there is no text here
    "extend": {"copy_expert": "0"},
    "add-tokens": {"tokens": 8},
}


@pytest.mark.parametrize("verb", methods.METHODS)
def test_what_is_recorded_makes_the_same_method(verb: str) -> None:
    made = methods.make(verb, LEAST.get(verb, {}))
    again = methods.make(verb, made.recorded())
    assert again.recorded() == made.recorded() and again.options == made.options
    assert set(made.recorded()) <= {f.name for f in methods.load(verb).fields()}


def test_unknown_methods_and_options() -> None:
    with pytest.raises(UsageError, match="no method 'prnue'") as refused:
        methods.make("prnue", {})
    assert "prune" in refused.value.hint
    with pytest.raises(UsageError, match="convert-layout has no option 'too'"):
        methods.make("convert-layout", {"too": "fused"})


# --- outputs of 0.2.0: what their moetool.json says, in the words of then

OF_0_2_0: dict[str, dict[str, Any]] = {
    "upcycle": {"experts": 4, "top_k": 2, "layout": "auto", "shared": False, "expert_map": ""},
    "convert-layout": {"to": "fused"},
    "prune": {
        "ratio": 0.25,
        "calibrate": "a.jsonl,b.jsonl:0.3",
        "layout": "uniform",
        "max_perplexity_increase": "",
        "method": "auto",
        "text": "",
        "total_sparsity": 0.0,
    },
    "merge": {
        "layout": "uniform",
        "joint": "auto",
        "whiten": "true",
        "max_perplexity_increase": "2%",
        "text": "a.txt",
        "form": "materialised",
        "rank_energy": 0.95,
    },
}


@pytest.mark.parametrize("verb", OF_0_2_0)
def test_options_that_0_2_0_recorded_are_read(verb: str) -> None:
    made = methods.make(verb, OF_0_2_0[verb])
    assert methods.make(verb, made.recorded()).recorded() == made.recorded()


def test_an_output_in_the_words_of_0_2_0_verifies(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """As if 0.2.0 had written it: `layout`, texts joined by commas, empty words."""
    import moetool as api

    source, out = models("mixtral"), tmp_path / "out"
    api.prune(str(source), str(out), ratio=0.25, method="router-distance")
    file = out / "moetool.json"
    record = json.loads(file.read_text())
    said = record["options"]
    said["layout"] = said.pop("uneven")
    said |= {"calibrate": "", "text": "", "max_perplexity_increase": "", "total_sparsity": 0.0}
    file.write_text(json.dumps(record))
    found = api.verify(str(out), against=[str(source)], load=False)
    assert found["verified"] == "bytes"
