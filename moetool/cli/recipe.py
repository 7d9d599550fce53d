"""`moetool run`: a recipe file."""

from __future__ import annotations

from typing import Annotated

import typer

from moetool.cli.main import app
from moetool.cli.upcycle import (
    Device,
    DryRun,
    Engine,
    Jobs,
    MaxShard,
    Memory,
    Overwrite,
    RayAddress,
    Strict,
    common,
    write,
)


@app.command(name="run")
def run_recipe(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="a YAML file; recipes/ has one for each paper")
    ],
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="source=, out=, from=A,B or any option of the method"
        ),
    ] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="instead of the recipe's own")] = None,
    jobs: Jobs = 0,
    memory: Memory = "",
    max_shard_size: MaxShard = "5GB",
    overwrite: Overwrite = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    device: Device = "cpu",
    engine: Engine = "local",
    ray_address: RayAddress = "",
) -> int:
    """Run a recipe: one method with its options, as a paper describes it."""
    from moetool.recipe import read

    found = read(recipe, set_)
    rest = common(
        found["seed"] if seed is None else seed,
        jobs,
        memory,
        max_shard_size,
        overwrite,
        strict,
        device,
        engine,
        ray_address,
    )
    return write(
        found["method"],
        (found["source"], *found["from"]),
        found["out"],
        found["options"],
        rest,
        dry_run=dry_run,
    )
