"""The command line: parse, call, show. Typer and Rich live here and nowhere else."""

from moetool.cli.main import main

__all__ = ["main"]
