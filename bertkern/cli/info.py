"""bertkern info: what is installed, compiled and usable on this machine."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.text import Text

import bertkern

from .console import out


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, for scripts.")] = False,
) -> None:
    """What is installed, compiled and usable on this machine, and why the rest is not."""
    found = bertkern.info()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    print_info(str(found))


def print_info(text: str) -> None:
    """Print the text of `bertkern.info()`, its headings in bold."""
    for line in text.splitlines():
        styled = Text(line, style="" if line.startswith(" ") else "bold")
        styled.highlight_regex(r"usable on .*", "green")
        styled.highlight_regex(r"not on .*|not usable|absent.*", "yellow")
        out.print(styled, soft_wrap=True)
