"""The tables of README and the guide, written from the registries: `python tests/docs.py` rewrites
them, `--check` says which are stale (exit code 1).

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what a NAME is made from stands in
TABLES.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moetool.surgery.layout import kinds

if TYPE_CHECKING:
    from moetool.surgery.clients import Judged
    from moetool.surgery.forms import Spelled

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "moetool" / "guide").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def sentence(about: str) -> str:
    """The first sentence of a text, on one line."""
    return re.split(r"\.(?=\s|$)", " ".join(about.split()), maxsplit=1)[0]


def ways(verb: str) -> str:
    """The ways of a verb, those that need no text first, each with its docstring's first sentence."""
    from moetool.methods import described

    found = sorted(described.describe(verb)["methods"], key=lambda way: (way["text"], way["name"]))
    measured = any("kl" in way for way in found)
    rows = [[f"`{w['name']}`{default(w)}", sentence(w["about"]), said(w)] for w in found]
    if not measured:
        return markdown([f"`{verb} --method`", "is", "text"], rows)
    head = [f"`{verb} --method`", "is", "text", "KL at 25 %, 50 %", "refitted", "so it is"]
    cells = ([*row, *kept(way)] for row, way in zip(rows, found, strict=True))
    return markdown(head, cells) + "\n" + measured_on()


def measured_on() -> str:
    """Of what model, and on which text, the numbers are."""
    from moetool.methods import described

    about = described.figures().about
    return (
        f"KL(SRC || OUT) in nats a token, {about['held out']}, held out, of {about['model']}; decided and "
        f"refitted on {about['calibration']} (ways that need no text: without, but for the refit). "
        f"`{about['command']}`; on another model the order may be another: `--text` says.\n"
    )


def kept(way: dict[str, Any]) -> list[str]:
    """What a way was measured to keep, and what that says."""
    from moetool.methods.measured import pair

    cells = way.get("kl", {})
    return [pair(cells), pair(cells, " refit"), way.get("advice", "")]


def default(way: dict[str, str]) -> str:
    """When --method auto means this way."""
    return f" (default, {way['auto']})" if way.get("auto") else ""


def said(way: dict[str, str]) -> str:
    """Whether it needs text."""
    return "yes" if way["text"] else "no"


def grammar() -> str:
    """Every word of what a group of experts is, its docstring's first sentence, and the options that
    it alone has.
    """
    from moetool.methods.options import fields
    from moetool.methods.upcycle import growing
    from moetool.surgery import places

    rows = []
    for axis, found in growing.axes().items():
        for name, word in found.items():
            own = ", ".join(f"`--{field.spelled}`" for field in fields(word.Options))
            rows.append([f"`--{axis} {name}`", sentence(word.about()), own])
    rows += [
        [f"`--site {name}`", f"of a layer: {place.about()}", ""]
        for name, place in places.known().items()
    ]
    return markdown(["word", "is", "its own options"], rows)


def pairs() -> str:
    """Dense family -> families with experts, in the order in which --target auto tries them."""
    from moetool.surgery.pair import pairs as known

    into: dict[str, list[str]] = {}
    for pair in known():
        inner = f" (with a {pair.inner.rpartition('--')[2]} inside)" if pair.inner else ""
        into.setdefault(pair.source, []).append(pair.target + inner)
    rows = ([source, ", ".join(targets)] for source, targets in sorted(into.items()))
    return markdown(["dense", "mixture of experts"], rows)


def guide() -> str:
    """The pages of the guide."""
    from moetool.guide import pages as known

    rows = [[f"[`{page.name}`](moetool/guide/{page.name}.md)", page.about] for page in known()]
    return markdown(["page", "is"], rows)


def recipes() -> str:
    """Every recipe and its paper."""
    rows = []
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        text = yaml.safe_load(path.read_text())
        rows.append([f"`{path.relative_to(ROOT)}`", str(text["paper"])])
    return markdown(["recipe", "is"], rows)


# How a recipe begins what it says of the difference to its paper.
_OTHERWISE = r"(Approximate|Left out|Not here|Not made|Unknown)\b"


def papers() -> str:
    """Every method that gives a model experts: its recipe, and what is there another way."""
    rows = []
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        if path.parent.name in ("upcycle", "extend"):
            data = yaml.safe_load(path.read_text())
            said = re.split(r"(?<=\.)\s(?=[A-Z])", " ".join(data["about"].split()))
            apart = [one for one in said if re.match(_OTHERWISE, one)]
            rows.append([f"`{path.stem}`", number(data["paper"]), " ".join(apart) or "whole"])
    return markdown(["recipe", "arXiv", "otherwise than there"], rows)


def number(paper: str) -> str:
    """The papers' numbers at arXiv."""
    return ", ".join(re.findall(r"\d{4}\.\d{5}", paper))


def formats() -> str:
    """Every word of `quantize --format`, its stored bits a weight, and who reads it in linears and
    in experts: formats that somebody reads first, the smallest first.
    """
    from moetool.surgery import forms

    found = sorted(map(format_row, forms.formats()), key=lambda row: (not row[3], float(row[2])))
    return markdown(["`--format`", "is", "bits", "dense, read by", "experts, read by"], found)


def format_row(word: str) -> list[str]:
    """A format on a matrix of 4,096 x 4,096."""
    from moetool.surgery import forms
    from moetool.surgery.spec import Target

    spelled = forms.asked(word)
    asked = forms.settled(spelled, Target("model.layers.0.weight", "BF16", (4096, 4096)))
    form, about = forms.named(asked.form), forms.named(spelled.form).formats[word].about
    bits = f"{form.bits((4096, 4096), asked.params):.4g}"
    return [f"`{word}`", about, bits, readers(asked, False), readers(asked, True)]


def readers(asked: Spelled, moe: bool) -> str:
    """The loaders that read a format; with an asterisk where only their source was read."""
    from moetool.surgery import clients

    found = []
    for loader in clients.clients():
        verdict = clients.verdict(loader, asked.form, asked.params, moe=moe)
        if verdict.works:
            found.append(loader + ("" if verdict.known == "run" else "*"))
    return ", ".join(found)


def works() -> str:
    """Conversions of a family's default config, and families as prune, merge and quantize keep
    them, those with experts first: what each client makes of them.
    """
    from moetool.methods.upcycle import usual
    from moetool.surgery import clients
    from moetool.surgery.pair import pairs as known

    rows = [[f"{p.source} to {p.target}", *map(state, usual.of_pair(p))] for p in known()]
    tried = chain.from_iterable(c.models.families for c in clients.clients().values())
    kept = (name for name in dict.fromkeys(tried) if name in kinds())
    order = sorted(kept, key=lambda name: (kinds()[name] != "moe", name))
    rows += [[name, *map(state, usual.of_family(name))] for name in order]
    return markdown(["written", *clients.clients()], rows)


def state(judged: Judged) -> str:
    """A cell: what fails silently stands out."""
    return f"**{judged.state}**" if judged.state == "wrong" else judged.state


def breaks() -> str:
    """What of an output makes a client that knows its family do something else."""
    from moetool.methods.upcycle import usual

    found: dict[tuple[str, str, str, str], list[str]] = {}
    for family in sorted(kinds()):
        for told in usual.told(family):
            found.setdefault((told.client, told.of, told.state, told.why), []).append(family)
    rows = ([c, of, ", ".join(names), is_, why] for (c, of, is_, why), names in found.items())
    return markdown(["client", "with", "of", "is", "because"], sorted(rows))


TABLES: dict[str, Callable[[], str]] = {
    "ways of prune": lambda: ways("prune"),
    "ways of merge": lambda: ways("merge"),
    "ways of quantize": lambda: ways("quantize"),
    "grammar of upcycle": grammar,
    "formats": formats,
    "pairs": pairs,
    "what works where": works,
    "what breaks it": breaks,
    "recipes": recipes,
    "papers": papers,
    "guide": guide,
}


def written(text: str) -> str:
    """A page with each marked table made anew; KeyError for a table that nobody makes."""
    return MARKED.sub(lambda m: m[1] + TABLES[m[2]]() + m[4], text)


def stale(texts: Iterable[str]) -> list[str]:
    """Names of the tables that are not what the registries say, and of those on no page."""
    found = {m[2]: m[3] for text in texts for m in MARKED.finditer(text)}
    return [name for name, make in TABLES.items() if found.get(name) != make()]


def main(argv: list[str] | None = None) -> int:
    """Rewrite the tables, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when one is stale")
    check = parser.parse_args(argv).check
    texts = {page: page.read_text() for page in PAGES}
    found = stale(texts.values())
    for name in found:
        print(f"{'stale' if check else 'written'}: {name}")
    if not check:
        for page, text in texts.items():
            page.write_text(written(text))
    return int(check and bool(found))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
