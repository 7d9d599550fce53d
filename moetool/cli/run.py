"""`moetool run`: a recipe, by its name or as a file."""

from __future__ import annotations

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.errors import UsageError
from moetool.methods.field import RUN, WHAT, Field
from moetool.methods.options import Common, fields

SET = Field(
    "set_",
    tuple,
    (),
    "source=, out=, from=A,B or any option of the method; repeat it",
    WHAT,
    unit="whole",
    metavar="KEY=VALUE",
)
SEED = Field("seed", int, None, "instead of the recipe's own", RUN)
LIST = Field("list_", bool, False, "the recipes that come with moetool, a line each", WHAT)
COMMON = tuple(f for f in fields(Common) if f.name != "seed")


def run(given: Given) -> int:
    """Read, check, and do what the recipe says."""
    from moetool.cli.write import write
    from moetool.recipe import read
    from moetool.recipes import find

    values, name = dict(given.values), given.arguments["recipe"]
    if values.pop("list_", False):
        return _list()
    if not name:
        raise UsageError(
            "no recipe was named",
            expected="a name, or a YAML file",
            hint="moetool run --list shows the names",
        )
    changes = values.pop("set_", ())
    assert isinstance(changes, tuple)
    recipe = read(find(name), list(changes))
    return write(recipe.options({"seed": recipe.seed, **values}, session.command))


def _list() -> int:
    """Every recipe of ours."""
    from moetool.recipes import shipped

    found, sink = shipped(), session.sink
    sink.result({"recipes": [r._asdict() | {"file": str(r.file)} for r in found]})
    sink.table(["name", "method", "paper"], [[r.name, r.method, r.paper] for r in found])
    sink.line("\nnext: moetool run NAME --set source=SRC --set out=OUT")
    return 0


COMMAND = Command(
    "run",
    "Run a recipe: one method with its options, as a paper describes it.",
    run,
    (Argument("recipe", "a name that --list shows, or a YAML file", "RECIPE", needed=False),),
    (LIST, SET, SEED, *COMMON),
    (
        "moetool run --list",
        "moetool run moe-llava --set source=SRC --set out=OUT",
        "moetool run recipes/upcycle/sparse-upcycling.yaml --set source=SRC --set out=OUT",
        "moetool run recipes/upcycle/btx.yaml --set source=SRC --set out=OUT --set from=A,B,C",
        "moetool run recipes/prune/reap.yaml --set source=SRC --set out=OUT --set calibrate=TEXT",
    ),
    "Make a model",
)
