"""The page of errors, from the classes."""

from __future__ import annotations

from collections.abc import Iterator

from winnow.schemas.errors import WinnowError

INTRODUCTION = """# Errors

Every error that Winnow raises on purpose is a `WinnowError` of `winnow.schemas.errors`. Each class also
inherits the builtin that a caller without this hierarchy would catch. A message names the field or object,
what was expected, what was found and what to do; the attributes `what`, `expected`, `got` and `fix` hold
the parts. This page is generated from the program.

A command ends with exit code 0 if all went well, 1 or 2 as below, and 130 if it was interrupted (Ctrl-C).

| error | also | a command exits with | raised when |
|---|---|---|---|
"""


def page() -> str:
    """Write the page of all errors."""
    return INTRODUCTION + "\n".join(_row(error, depth) for error, depth in family(WinnowError)) + "\n"


def family(error: type[WinnowError], depth: int = 0) -> Iterator[tuple[type[WinnowError], int]]:
    """Iterate over an error and all errors derived from it, each after its parent, with its depth."""
    yield error, depth
    for below in error.__subclasses__():
        yield from family(below, depth + 1)


def _row(error: type[WinnowError], depth: int) -> str:
    builtins = [base.__name__ for base in error.__bases__ if not issubclass(base, WinnowError)]
    also = ", ".join(f"`{name}`" for name in builtins if name != "Exception")
    when = " ".join((error.__doc__ or "").split("\n\n")[0].split())
    indent = "&nbsp;" * 4 * depth
    return f"| {indent}`{error.__name__}` | {also} | {error.exit_code} | {when} |"
