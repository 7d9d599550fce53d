"""What a user sees: one JSON object, sentences, exit codes, a quick answer."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moetool as api
from moetool import methods
from moetool.units import parse_bytes, show_bytes, show_count, show_seconds

ROOT = Path(__file__).resolve().parents[2]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom moetool.cli import main\nmain(['--help'])\nbad = {'torch', 'transformers', 'numpy', 'rich', 'sklearn', 'pydantic', 'huggingface_hub', 'yaml'} & set(sys.modules)\nassert not bad, bad"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "upcycle" in done.stdout
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "moetool", "--help"], capture_output=True, check=True)
    assert (
        time.perf_counter() - begun < 2.0
    )  # the figure itself is measured by tests/bench/upcycle.py


def test_every_option_of_upcycle_is_on_the_command_line(moetool: Callable[..., Any]) -> None:
    text = moetool("upcycle", "--help").stdout
    fields = [f.spelled for f in methods.load("upcycle").fields()]
    assert len(fields) >= 28 and all(f"--{name}" in text for name in fields)
    for name in (
        "seed",
        "jobs",
        "memory",
        "max-shard-size",
        "overwrite",
        "strict",
        "dry-run",
        "device",
        "engine",
        "ray-address",
        "from",
    ):
        assert f"--{name}" in text


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "SRC"],
        ["upcycle", "SRC", "OUT"],
        ["upcycle", "SRC", "OUT2", "--dry-run"],
        ["archs", "list"],
        ["archs", "show", "llama"],
        ["methods", "list"],
        ["methods", "show", "upcycle"],
    ],
    ids=" ".join,
)
def test_json_is_one_object(
    args: list[str], llama: Path, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    words = [
        str(llama) if a == "SRC" else str(tmp_path / a) if a.startswith("OUT") else a for a in args
    ]
    after, before = (
        moetool(*words, "--json"),
        moetool("--json", *[w.replace("OUT", "IN") for w in words]),
    )
    assert after.returncode == before.returncode == 0, after.stderr
    assert (
        isinstance(after.json, dict)
        and after.stdout.count("\n") == 1
        and isinstance(before.json, dict)
    )
    human = moetool(*[w.replace("OUT", "HUMAN") for w in words])
    assert human.returncode == 0 and len(human.stdout) > 40


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["upcycle"], 2, "Missing argument"),
        (["upcycle", "SRC"], 2, "Missing argument"),
        (["upcicle"], 2, "No such command"),
        (["upcycle", "SRC", "OUT", "--expert", "4"], 2, "No such option"),
        (["upcycle", "SRC", "OUT", "--experts", "many"], 2, "valid integer"),
        (["upcycle", "SRC", "OUT", "--memory", "lots"], 2, "not a size"),
        (["upcycle", "SRC", "OUT", "--top-k", "9"], 2, "more experts run"),
        (["upcycle", "nowhere", "OUT"], 1, "does not exist"),
        (["upcycle", "no/where", "OUT"], 1, "no local path"),
        (["inspect", "README.md"], 1, "no weights"),
        (["archs", "show", "lama"], 1, "did you mean"),
        (["methods", "show", "upcycel"], 2, "did you mean"),
        (["verify", "SRC"], 4, "not written by moetool"),
        (["run", "none.yaml"], 2, "no such recipe"),
        (["upcycle", "SRC", "OUT", "--target", "mixtrall"], 1, "did you mean mixtral"),
    ],
)
def test_wrong_calls(
    args: list[str], code: int, word: str, llama: Path, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    words = [str(llama) if a == "SRC" else str(tmp_path / "out") if a == "OUT" else a for a in args]
    done = moetool(*words)
    assert done.returncode == code and word in done.stderr and "next:" in done.stderr, (
        done.returncode,
        done.stderr,
    )
    assert done.stderr.startswith("error: ") and not (tmp_path / "out").exists()
    assert moetool(*words, "--json").json["exit_code"] == code


def test_quiet_says_nothing(llama: Path, tmp_path: Path, moetool: Callable[..., Any]) -> None:
    done = moetool("upcycle", llama, tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_bug_is_a_sentence(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetool.cli import main
    from moetool.report import anatomy

    def broken(*args: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(anatomy, "anatomy", broken)
    assert main(["inspect", str(llama)]) == 1
    assert "a bug in moetool: ZeroDivisionError: oops" in capsys.readouterr().err


def test_inspect_sees_what_is_there(llama: Path, tmp_path: Path) -> None:
    dense = api.inspect(str(llama))
    assert (dense["family"], dense["kind"], dense["known"]) == ("llama", "dense", True) and dense[
        "parameters"
    ] == dense["active_parameters"]
    assert [r["ffn"] for r in dense["layers"]] == [128] * 4
    api.upcycle(
        str(llama), str(tmp_path / "out"), experts=4, target="glm4_moe", shared=True, split=2
    )
    sparse = api.inspect(str(tmp_path / "out"))
    assert (
        sparse["kind"] == "moe"
        and sparse["top_k"] == 2
        and sparse["law"]["score"] == "sigmoid"
        and not sparse["unknown_tensors"]
    )
    assert all(
        (r["experts"], r["expert_width"], r["shared"], r["router_bias"]) == (4, 64, 128, True)
        for r in sparse["layers"]
    )
    assert sparse["active_parameters"] == sparse["parameters"] - 4 * 2 * 3 * 64 * 64
    api.convert_layout(str(tmp_path / "out"), str(tmp_path / "fused"), to="fused")
    assert [
        (r["experts"], r["stacked"]) for r in api.inspect(str(tmp_path / "fused"))["layers"]
    ] == [(4, True)] * 4


def test_inspect_of_an_unknown_family(llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(llama, tmp_path / "x"))
    (folder / "config.json").write_text('{"model_type": "brandnew"}')
    found = api.inspect(str(folder))
    assert found["known"] is False and found["parameters"] > 0


def test_what_travels_and_what_is_written(llama: Path, tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(llama, tmp_path / "source"))
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "special_tokens_map.json",
    ):
        (source / name).write_bytes(b'{"x": "\xc3\xa9"}\r\n')
    (source / "README.md").write_text("# the old card")
    api.upcycle(str(source), str(tmp_path / "out"), experts=4)
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: transformers\ntags:\n- moe\n")
        and "certificate | exact" in card
    )
    record = json.loads((tmp_path / "out" / "moetool.json").read_text())
    assert (
        record["method"] == "upcycle"
        and record["seed"] == 0
        and record["sources"][0]["files"][0][0] == "model.safetensors"
        and record["report"]["plan_digest"]
    )


def test_base_model_of_a_hub_source(llama: Path, tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/base"}))
    api.upcycle(str(source), str(tmp_path / "out"))
    assert "base_model:\n- org/base\n" in (tmp_path / "out" / "README.md").read_text()


def test_hub_ids_go_through_the_hub(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(
        repo: str,
        revision: str | None = None,
        allow_patterns: Any = None,
        repo_type: str | None = None,
    ) -> str:
        asked.append((repo, revision, "*.bin" in allow_patterns))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert api.upcycle("org/name@main", str(tmp_path / "out"))["sources"] == ["org/name@main"]
    assert asked == [("org/name", "main", False)]


def test_verify_finds_one_flipped_bit(
    llama: Path, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    for number, position in enumerate((-3, -200_000)):
        out = tmp_path / str(number)
        api.upcycle(str(llama), str(out), experts=8, split=2, top_k=4)
        data = bytearray((out / "model.safetensors").read_bytes())
        data[position] ^= 1
        (out / "model.safetensors").write_bytes(data)
        done = moetool("verify", out, "--against", llama, "--no-load")
        assert (
            done.returncode == 4
            and "bytes are not what the plan makes" in done.stderr
            and "tensor: model." in done.stderr
        )


@pytest.mark.parametrize("what", ["config", "shard", "source", "record"])
def test_verify_finds_what_was_exchanged(
    what: str, llama: Path, models: Callable[..., Path], tmp_path: Path
) -> None:
    api.upcycle(str(llama), str(tmp_path / "a"), experts=4)
    api.upcycle(str(llama), str(tmp_path / "b"), experts=4, seed=5)
    against = [str(llama)]
    if what == "config":
        (tmp_path / "a" / "config.json").write_text(
            (tmp_path / "a" / "config.json")
            .read_text()
            .replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1')
        )
    elif what == "shard":
        (tmp_path / "a" / "model.safetensors").write_bytes(
            (tmp_path / "b" / "model.safetensors").read_bytes()
        )
    elif what == "source":
        against = [str(models("llama", num_hidden_layers=5))]
    else:
        (tmp_path / "a" / "moetool.json").unlink()
    with pytest.raises(api.VerificationFailed):
        api.verify(str(tmp_path / "a"), against=against, load=False)


def test_verify_against_a_broken_function_fails(llama: Path, tmp_path: Path) -> None:
    """The block check stands alone: with norm_topk_prob switched off the outputs shrink, and that
    is seen.
    """
    from moetool.evaluate import blocks
    from moetool.surgery.checkpoint import Checkpoint

    api.upcycle(str(llama), str(tmp_path / "out"), experts=4, target="qwen2_moe")
    config = tmp_path / "out" / "config.json"
    good = max(
        e.relative
        for e in blocks.compare(Checkpoint.open(llama), Checkpoint.open(tmp_path / "out"))
    )
    config.write_text(
        config.read_text().replace('"norm_topk_prob": true', '"norm_topk_prob": false')
    )
    bad = max(
        e.relative
        for e in blocks.compare(Checkpoint.open(llama), Checkpoint.open(tmp_path / "out"))
    )
    assert good < 1e-5 < 0.1 < bad


def test_demo(moetool: Callable[..., Any], tmp_path: Path) -> None:
    done = moetool("demo", "--json", "--keep", tmp_path)
    assert done.returncode == 0 and done.json["seconds"] < 60
    rows = done.json["rows"]
    assert [r["certificate"] for r in rows] == ["exact", "exact_if", "exact", "exact", "none"]
    assert all(r["logit_error"] < 1e-5 for r in rows[:4]) and rows[4]["logit_error"] > 0.1
    assert (tmp_path / "demo-1" / "config.json").exists()


def test_progress_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetool.cli.sink import Sink
    from moetool.progress import Stage

    clock = iter([0.0, 6.0, 12.0, 18.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    sink = Sink()
    for done in (0, 10**9, 2 * 10**9, 4 * 10**9):
        sink.progress(Stage("write"), done, 4 * 10**9)
    said = capsys.readouterr().err
    assert "write 1 GB of 4 GB (25 %), 167 MB/s, 18.0s left" in said and "\r" not in said


def test_units() -> None:
    assert [parse_bytes(t) for t in ("2GB", "64MiB", "1000", "1.5k", 7)] == [
        2 * 10**9,
        64 * 2**20,
        1000,
        1500,
        7,
    ]
    for wrong in ("", "0", "GB", "-1GB", "1XB"):
        with pytest.raises(api.UsageError):
            parse_bytes(wrong)
    assert (show_bytes(999), show_bytes(1234567), show_bytes(5e12)) == ("999 B", "1.23 MB", "5 TB")
    assert (
        show_count(12),
        show_count(134515008),
        show_seconds(75.2),
        show_seconds(7300),
        show_seconds(2),
    ) == ("12", "134.5 M", "1m15s", "2h01m", "2.0s")


def test_the_public_face_is_complete() -> None:
    assert set(api.__all__) == {
        "MoetoolError",
        "Stopped",
        "UsageError",
        "VerificationFailed",
        "add_tokens",
        "convert_layout",
        "dequantize",
        "eval",
        "extend",
        "inspect",
        "load",
        "materialize",
        "merge",
        "plan",
        "profile",
        "prune",
        "quantize",
        "run",
        "upcycle",
        "verify",
    }
    assert all(callable(getattr(api, name)) for name in api.__all__)


def test_house_rules() -> None:
    """No file is long, none is called utils; every module says what it is for; the core knows no
    method.
    """
    files = sorted((ROOT / "moetool").rglob("*.py"))
    assert len(files) > 40
    for path in files:
        text = path.read_text()
        assert not re.search(r"(utils|helpers|common|misc)", path.stem), path
        assert text.startswith('"""'), path
        assert text.count("\n") < 420, path
    for floor in ("surgery", "kernels"):
        for path in (ROOT / "moetool" / floor).rglob("*.py"):
            assert not re.search(
                r"method\s*==|upcycle",
                path.read_text()
                .lower()
                .replace("megatron-lm upcycling_utils", "")
                .replace("drop-upcycling", ""),
            ), path
    top = {
        p.name
        for p in ROOT.iterdir()
        if not p.name.startswith(".") and not p.name.endswith(".egg-info") and p.name != "build"
    }
    assert top == {"pyproject.toml", "moetool", "tests", "recipes", "README.md", "CHANGELOG.md"}


def on_terminal(columns: int, *words: str) -> str:
    """What a command prints on a terminal this wide."""
    import fcntl
    import os
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moetool", *words], stdout=theirs, env=environment
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the terminal is gone: the command has ended
        while data := os.read(ours, 1 << 16):
            said += data
    os.close(ours)
    assert process.wait() == 0
    return said.decode()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_vl_moe", "llava"])
def test_archs_show_names_tensors_in_full(family: str) -> None:
    """On the narrowest terminal too: a name that is cut off cannot be copied. And no file of ours
    is named.
    """
    from moetool.surgery.layout import Layout

    said = on_terminal(40, "archs", "show", family)
    for slot in Layout.load(family).tensors:
        assert slot.name in said
    assert "…" not in said and not re.search(r"\w\.(md|py|json)\b", said)
    assert "None" not in said and "{'" not in said  # nothing as Python prints it
    assert "exact" in on_terminal(40, "archs", "show", "llama")
