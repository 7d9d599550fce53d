"""`moetool run`: a recipe file."""

from __future__ import annotations

from moetool.cli.app import session
from moetool.cli.options import Argument, Command, Given
from moetool.methods.options import RUN, WHAT, Common, Field, fields

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
COMMON = tuple(f for f in fields(Common) if f.name != "seed")


def run(given: Given) -> int:
    """Read, check, and do what the recipe says."""
    from moetool.cli.write import write
    from moetool.recipe import read

    values = dict(given.values)
    changes = values.pop("set_", ())
    assert isinstance(changes, tuple)
    recipe = read(given.arguments["recipe"], list(changes))
    return write(recipe.options({"seed": recipe.seed, **values}, session.command))


COMMAND = Command(
    "run",
    "Run a recipe: one method with its options, as a paper describes it.",
    run,
    (Argument("recipe", "a YAML file; recipes/ has one for each paper", "RECIPE"),),
    (SET, SEED, *COMMON),
    (
        "moetool run recipes/upcycle/sparse-upcycling.yaml --set source=SRC --set out=OUT",
        "moetool run recipes/upcycle/btx.yaml --set source=SRC --set out=OUT --set from=A,B,C",
        "moetool run recipes/prune/reap.yaml --set source=SRC --set out=OUT --set calibrate=TEXT",
    ),
    "Make a model",
)
