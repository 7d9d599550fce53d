"""`moetool methods`: the verbs, their ways, and all options."""

from __future__ import annotations

import re
import textwrap
from shutil import get_terminal_size

from moetool import methods
from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given, metavar, shown_default
from moetool.data import JsonObject
from moetool.methods.field import Field

HELP = "Methods and their options."
_FREE = " (needs no text)"
_LEAST = 30  # characters of a sentence that are shown however narrow the terminal is


def list_(given: Given) -> int:
    """A line each."""
    from moetool.methods.described import listed

    found, sink = listed(), session.sink
    sink.result({"methods": found})
    for verb in found:
        sink.line(f"{verb['name']}: {verb['about']}")
        width = max((len(way["name"]) for way in verb["ways"]), default=0)
        kept = max((len(_kept(way)) for way in verb["ways"]), default=0)
        for way in verb["ways"]:
            need = "" if way["text"] else _FREE
            head = f"  {way['name']:<{width}}  {_kept(way):<{kept}}" + ("  " if kept else "")
            room = get_terminal_size().columns - len(head + need)
            sink.line(f"{head}{_clause(way['about'], room)}{need}")
    sink.line(_told_of_kept())
    sink.line("\nnext: moetool methods show NAME, of a verb or of a way")
    return 0


def _kept(way: JsonObject) -> str:
    """`.24 .63 -> .09 .31`: without and with refit; `!` where it is no better than chance."""
    from moetool.methods.measured import pair

    if "kl" not in way:
        return ""
    lost = " !" if "no better than chance" in way["advice"] else ""
    refitted = pair(way["kl"], " refit")
    return pair(way["kl"]) + (f" -> {refitted}" if refitted else "") + lost


def _told_of_kept() -> str:
    """What the numbers are."""
    from moetool.methods.described import figures

    about = figures().about
    return (
        "\nnumbers: KL(SRC || OUT) with 25 % and 50 % of the experts gone, -> with --refit; ! no better "
        f"than chance somewhere ({about['model']}; {about['held out']}, held out)"
    )


def show(given: Given) -> int:
    """One verb, or one way."""
    from moetool.methods.described import describe

    found, sink = describe(given.arguments["name"]), session.sink
    sink.result(found, "\n".join(_lines(found)))
    head = ["option", "value", "default", "meaning"]
    if found["options"]:
        told = {f.spelled: f for f in methods.load(str(found.get("verb", found["name"]))).fields()}
        sink.table(head, [_row(told[o["name"]], o["help"]) for o in found["options"]])
        sink.line("")
    for example in found.get("examples") or [found.get("example")]:
        sink.line(f"  {example}")
    return 0


COMMANDS = (
    Command(
        "list",
        "Every method, with a line each, and its ways.",
        list_,
        examples=(
            "moetool methods list",
            "moetool methods list --json",
            "moetool methods show reap",
        ),
    ),
    Command(
        "show",
        "What a method, or a way of one, does; where it is published; its options.",
        show,
        (Argument("name", "a verb (prune) or a way (reap)", "METHOD"),),
        examples=(
            "moetool methods show prune",
            "moetool methods show reap",
            "moetool methods show upcycle --json",
        ),
    ),
)


def _lines(found: JsonObject) -> list[str]:
    lines = [found["about"], ""]
    if "verb" in found:
        need = "needs text" if found["text"] else "needs no text"
        lines = [f"{found['name']} (moetool {found['verb']}; {need})", found["about"], ""]
        if "kl" in found:
            advice = f"; {found['advice']}" if found["advice"] else ""
            lines += [f"measured: KL {_kept(found)}{advice}", ""]
    for way in found.get("methods", ()):
        need = "" if way["text"] else " (needs no text)"
        lines += [f"{way['name']}{need}: {way['about']}", ""]
    return lines


def _row(field: Field, meaning: str) -> list[object]:
    """As in the verb's --help."""
    if field.type is bool:
        return [f"--{field.spelled}", "flag", "on" if field.default else "off", meaning]
    return [f"--{field.spelled}", metavar(field), shown_default(field), meaning]


def _clause(about: str, room: int) -> str:
    """What fits on a line of a sentence: it ends with a clause that fills at least half of it,
    or else with a word.
    """
    room = max(room, _LEAST)
    if len(about) <= room:
        return about
    ends = [found.start() for found in re.finditer(r"[,;:](?=\s)", about[: room + 1])]
    whole = [n for n in ends if 2 * n >= room and about[:n].count("(") == about[:n].count(")")]
    if whole:
        return about[: whole[-1]]
    return textwrap.shorten(about, room, placeholder=" ...", break_on_hyphens=False)
