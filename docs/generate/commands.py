"""The page of the command line, from the program's own help."""

from __future__ import annotations

import re
from typing import Any

import typer

from winnow.cli.main import COMMANDS, load_command

INTRODUCTION = """# Every command and option

`winnow COMMAND --help` prints the same in the terminal, and `winnow --install-completion` makes the shell
complete commands and options. `winnow --version` prints the version.

Input that is wrong ends a command with exit code 2 and one sentence: what is wrong, what was expected, what
was found, what to do. Nothing is written then. [Errors](errors.md) lists all exit codes. This page is
generated from the program.

| command | what it does |
|---|---|
"""


def page() -> str:
    """Write the page of all commands."""
    lines = [
        f"| [`{name}`](#{name}) | {entry.line.replace('|', chr(92) + '|')} |"
        for name, entry in COMMANDS.items()
    ]
    return INTRODUCTION + "\n".join(lines) + "\n\n" + "\n\n".join(map(_command, COMMANDS)) + "\n"


def _command(name: str) -> str:
    command: Any = load_command(name)
    context = typer.Context(command, info_name=f"winnow {name}")
    usage = command.get_usage(context).removeprefix("Usage:").strip()
    parts = [f"## {name} {{ #{name} }}", f"```text\n{usage}\n```", command.help or "", command.epilog or ""]
    records = [parameter.get_help_record(context) for parameter in command.params]
    # Definition lists: a table of options does not fit a telephone.
    parts += [f"`{signature}`\n:   {_sentence(said)}" for signature, said in filter(None, records)]
    return "\n\n".join(part.strip() for part in parts if part)


def _sentence(said: str) -> str:
    """An option's help in one line; its default and bounds in square brackets are set off."""
    text = " ".join(said.split()) or "No description."
    # Otherwise a bracket may be taken for a link.
    return re.sub(r"\s*\[([^\]`]*)\]$", r" <small>(\1)</small>", text)
