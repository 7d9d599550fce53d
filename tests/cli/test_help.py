"""Options are said once: what `--help` shows, what the parser, completion and did-you-mean know, and
everything that 0.2.0 took.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command

from moetool import methods
from moetool.cli.commands import GROUPS, READING
from moetool.cli.options import Command, helped, metavar
from moetool.cli.write import command as written
from moetool.methods.field import RUN, WHAT, Field
from moetool.methods.options import PANELS, Text, fields

WRITING = tuple(methods.METHODS)
PLAIN = tuple(module.COMMAND.name for module in READING)
GROUPED = tuple(
    f"{name} {each.name}" for name, module in GROUPS.items() for each in module.COMMANDS
)
PRUNE = ("prune", "--method", "router-distance")  # nothing runs
EVERY = (*WRITING, *PLAIN, *GROUPED)

COMMON = "jobs memory max-shard-size overwrite strict dry-run engine ray-address"
TEXT = "tokens seq-len pack no-pack text-field batch-tokens"
GATE = "max-kl max-perplexity-increase"
REDUCE = (
    f"ratio method calibrate stats {TEXT} sample decisions budget layout protect no-protect propagate "
    f"refit refit-tokens {GATE} text text-tokens seed device {COMMON}"
)
# Every option of 0.2.0, by command.
OF_0_2_0 = {
    "upcycle": "experts top-k split from expert-map trunk layers shared router carve diversify scale "
    f"target layout seed device {COMMON}",
    "convert-layout": f"to {COMMON}",
    "prune": f"total-sparsity {REDUCE}",
    "merge": "features cluster joint weigh align combine router rank-energy whiten density form "
    f"{REDUCE}",
    "demo": "keep",
    "profile": f"calibrate {TEXT} sample covariance seed memory device",
    "eval": f"text reference {TEXT} {GATE} memory device",
    "run": f"set seed device {COMMON}",
    "verify": "against load no-load memory device",
}


def built(name: str) -> Command:
    """A command as data, by its name."""
    if name in methods.METHODS:
        return written(name)
    if " " in name:
        group, _, each = name.partition(" ")
        return next(c for c in GROUPS[group].COMMANDS if c.name == each)
    return next(module.COMMAND for module in READING if module.COMMAND.name == name)


def help_of(name: str, width: int = 100) -> str:
    return command(*name.split(), "--help", env={"COLUMNS": str(width)}).stdout


def parsed(name: str) -> set[str]:
    """The options that the parser of a command knows, hidden ones among them."""
    import typer

    from moetool.cli.commands import application

    made: Any = typer.main.get_command(application(name.split()))
    for word in name.split():
        made = made.commands[word]
    found: set[str] = set()
    for param in made.params:
        if param.param_type_name == "option":
            found |= {*param.opts, *param.secondary_opts}
    return found


def test_every_command_is_seen_here() -> None:
    assert len(WRITING) == 9 and len(PLAIN) == 8 and len(GROUPED) == 4


@pytest.mark.parametrize("name", sorted(OF_0_2_0))
def test_options_of_0_2_0_are_still_taken(name: str) -> None:
    known = parsed(name)
    assert not {f"--{word}" for word in OF_0_2_0[name].split()} - known


@pytest.mark.parametrize("name", EVERY)
def test_three_examples(name: str) -> None:
    """And each begins with the command it is an example of, or says what comes next."""
    examples = built(name).examples
    assert len(examples) >= 3
    assert sum(e.startswith(f"moetool {name}") for e in examples) >= 2
    assert all(e.startswith("moetool ") for e in examples)


@pytest.mark.parametrize("name", EVERY)
def test_help_is_whole(name: str) -> None:
    """Every option under its panel, the modes, the examples one a line, at the width of the
    terminal.
    """
    made, text = built(name), help_of(name, 100)
    for field in made.fields:
        assert re.search(rf"^  (-\w, )?--{re.escape(field.spelled)}\b", text, re.M), field.name
        assert f"\n{field.panel}:\n" in text
    for line in ("--json", "-q, --quiet", "-h, --help"):
        assert f"  {line}" in text
    for example in made.examples:
        assert f"\n  {example}\n" in text + "\n"
    assert max(len(line) for line in text.partition("\nExamples:")[0].splitlines()) <= 100


def test_panels_stand_in_one_order() -> None:
    text = help_of("merge")
    places = [text.index(f"\n{panel}:\n") for panel in ("Arguments", *PANELS, "Everywhere")]
    assert places == sorted(places)


def test_help_takes_the_width_of_the_terminal() -> None:
    narrow, wide = help_of("prune", 70), help_of("prune", 160)
    options = lambda text: text.partition("\nExamples:")[0].splitlines()  # noqa: E731
    assert max(map(len, options(narrow))) <= 70 < max(map(len, options(wide))) <= 160
    assert len(options(wide)) < len(options(narrow))


def test_short_help_and_bare_commands(moetool: Callable[..., Any]) -> None:
    for words, long in ((["-h"], ["--help"]), (["prune", "-h"], ["prune", "--help"])):
        assert moetool(*words).stdout == moetool(*long).stdout
    for words in ([], ["archs"], ["methods"]):
        done = moetool(*words)
        assert done.returncode == 0 and done.stdout.startswith("Usage: moetool")
    assert "--install-completion" in moetool().stdout and "--version" in moetool().stdout


def test_version(moetool: Callable[..., Any]) -> None:
    import moetool as api

    assert moetool("--version").stdout == f"moetool {api.__version__}\n"
    assert moetool("--version", "--json").json == {"version": api.__version__}


@pytest.mark.parametrize("name", ["", "prune", "merge", "upcycle", "archs", "schema", "eval"])
def test_help_is_quick_and_light(name: str) -> None:
    """CPU seconds, so that other work on the machine does not count; the best of three."""
    code = (
        "import sys\nfrom moetool.cli import main\nmain(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'sklearn', 'yaml', 'rich', 'pydantic',"
        " 'safetensors', 'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy"
    )
    words, spent = [*name.split(), "--help"], []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=True)
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(spent) < (0.2 if not name else 0.35)


# --- what the parser knows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "--method", "reep"], "did you mean reap"),
        (["merge", "--method", "reem"], "did you mean ream"),
        (["merge", "--cluster", "kmean"], "did you mean kmeans"),
        (["prune", "--budget", "sensitive"], "did you mean sensitivity"),
        (["convert-layout", "--to", "fuse"], "did you mean fused"),
        (["upcycle", "--layout", "stacked"], "per-expert"),
        (["upcycle", "--engine", "lokal"], "did you mean local"),
        (["prune", "--ratio", "a lot"], "--ratio: 'a lot' is not a percentage"),
        (["prune", "--memory", "lots"], "--memory: 'lots' is not a size"),
        (["prune", "--max-kl", "nan"], "--max-kl"),
        (["prune", "--tokens", "0"], "--tokens is too small"),
        (["prune", "--tokens", "many"], "valid integer"),
        (["prune", "--raito", "0.5"], "--ratio"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_wrong_values_end_with_2(
    words: list[str], said: str, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    done = moetool(words[0], "SRC", tmp_path / "out", *words[1:])
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "next:" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", ["25%", "0.25", "25 %", ".25", "2.5e-1"])
def test_shares_are_read_everywhere(
    share: str, models: Callable[..., Path], tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    done = moetool(
        *PRUNE, models("mixtral"), tmp_path / "out", "--ratio", share, "--dry-run", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert (done.json["options"]["ratio"], done.json["experts_after"]) == (0.25, 6)


def test_the_old_word_is_taken_with_a_note(
    models: Callable[..., Path], tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    words = (*PRUNE, models("mixtral"), tmp_path / "out", "--dry-run", "--json")
    old, new = moetool(*words, "--layout", "zeroed"), moetool(*words, "--uneven", "zeroed")
    assert old.returncode == new.returncode == 0, old.stderr
    assert "--layout is called --uneven now" in old.stderr and "--layout" not in new.stderr
    assert old.json["options"] == new.json["options"]
    assert old.json["plan_digest"] == new.json["plan_digest"]
    assert "--layout" not in help_of("prune")


def test_repeated_options_and_commas(
    models: Callable[..., Path], tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    """Texts may be repeated, or joined by commas as in 0.2.0."""
    for number in (1, 2):
        (tmp_path / f"{number}.txt").write_text(f"some text, {number}")
    both = [str(tmp_path / "1.txt"), str(tmp_path / "2.txt")]
    words = ("eval", models("mixtral"), "--tokens", "1", "--json")
    repeated = moetool(*words, "--text", both[0], "--text", both[1])
    joined = moetool(*words, "--text", ",".join(both))
    assert (repeated.returncode, repeated.stderr) == (joined.returncode, joined.stderr)


@pytest.mark.parametrize(
    ("typed", "wanted", "not_wanted"),
    [
        ("moetool prune --method re", {"reap"}, {"ream", "naee"}),
        ("moetool merge --method re", {"ream"}, {"reap"}),
        ("moetool merge --cluster k", {"kmeans"}, {"ward"}),
        ("moetool convert-layout --to ", {"per-expert", "fused"}, set()),
        ("moetool pr", {"prune", "profile"}, {"merge"}),
        ("moetool prune --ref", {"--refit", "--refit-tokens"}, {"--ratio"}),
        ("moetool methods ", {"list", "show"}, set()),
    ],
)
def test_completion(typed: str, wanted: set[str], not_wanted: set[str]) -> None:
    environment = {
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - (not typed.endswith(" "))),
        "_MOETOOL_COMPLETE": "complete_bash",
    }
    found = set(command(env=environment).stdout.split())
    assert wanted <= found and not not_wanted & found


def test_completion_is_installed(tmp_path: Path) -> None:
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("ZDOTDIR", "XDG_CONFIG_HOME")},
        "HOME": str(tmp_path),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "moetool", "--install-completion", "bash"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    script = (tmp_path / ".bash_completions" / "moetool.sh").read_text()
    assert "_MOETOOL_COMPLETE" in script and "moetool.sh" in (tmp_path / ".bashrc").read_text()


# --- how a field is shown


@pytest.mark.parametrize(
    ("field", "beside", "text"),
    [
        (Field("a_b", int, 3, "number of things", WHAT), "N", "number of things [default: 3]"),
        (Field("x", float, 0.5, "share", WHAT, unit="share"), "X", "share [default: 0.5]"),
        (Field("s", str, "", "a word", WHAT, metavar="WORD"), "WORD", "a word"),
        (Field("f", bool, False, "a switch", WHAT), "", "a switch"),
        (Field("t", tuple, (), "texts", WHAT, metavar="FILE"), "FILE", "texts"),
        (
            Field("m", int, 5_000_000_000, "size", RUN, unit="bytes", metavar="SIZE"),
            "SIZE",
            "size [default: 5GB]",
        ),
        (Field("m", int, None, "size", RUN, unit="bytes", metavar="SIZE"), "SIZE", "size"),
        (Field("c", str, "a", "one", WHAT, choices=("a", "b")), "a|b", "one [default: a]"),
        (
            Field("c", str, "first", "one", WHAT, choices=("first", "x" * 20, "y" * 20)),
            "C",
            f"one: first, {'x' * 20}, {'y' * 20} [default: first]",
        ),
    ],
    ids=lambda v: v.name if isinstance(v, Field) else None,
)
def test_how_a_field_is_shown(field: Field, beside: str, text: str) -> None:
    assert (metavar(field), helped(field)) == (beside, text)


def test_no_help_text_is_written_twice() -> None:
    """Options of one name in several commands are one field, or say other things on purpose."""
    texts: dict[tuple[str, str], set[str]] = {}
    for name in EVERY:
        for field in built(name).fields:
            texts.setdefault((field.name, str(field.default)), set()).add(field.help)
    several = {key for key, found in texts.items() if len(found) > 1}
    purposes = {"device", "form", "max_kl", "memory", "method", "router", "sample", "seed"}
    purposes |= {"target", "text", "layers"}
    purposes |= {f.name for f in fields(Text)}  # which one way of upcycle alone reads
    assert {name for name, _ in several} <= purposes
