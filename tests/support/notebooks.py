"""Executes the notebooks of `examples/`: tiny in tests, and as they are by `make notebooks`.

The first cell of code of each notebook holds its parameters.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("own_text", "read_and_steer", "public_dictionary")
"""In an order in which each finds what it needs."""
CELL_SECONDS = 3600


def source_of(name: str) -> Any:
    """A notebook as it is committed."""
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def execute(name: str, folder: Path, parameters: dict[str, object] | None = None) -> Any:
    """Run a notebook in a folder and return it with its outputs, without machine paths and progress.

    Args:
        name: One of `NAMES`.
        folder: Its working directory.
        parameters: New values for names that its first cell of code assigns.

    Raises:
        CellExecutionError: A cell fails.
    """
    notebook = source_of(name)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    committed = first.source
    if parameters:
        assigned = {target.id for line in ast.parse(committed).body if isinstance(line, ast.Assign)
                    for target in line.targets if isinstance(target, ast.Name)}  # fmt: skip
        assert parameters.keys() <= assigned, f"{name} has no parameters {parameters.keys() - assigned}"
        first.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    # As in an activated environment, for the notebooks' lines of shell.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    client.execute(env={**os.environ, "PATH": path})
    first.source = committed
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # times of this run
            cell.outputs = [_clean(each, folder) for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def _clean(output: Any, folder: Path) -> Any:
    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(f"{folder}{os.sep}", "").replace(str(folder), ".").replace("\r\n", "\n")
        if isinstance(value, dict):
            return {key: clean(each) for key, each in value.items()}
        return value

    return nbformat.from_dict(clean(dict(output)))


def main() -> None:
    """Execute notebooks and write their outputs into them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, help=f"default: {', '.join(NAMES)}")
    parser.add_argument("--folder", type=Path, default=Path(), help="where they run; default here")
    options = parser.parse_args()
    for name in options.names:
        nbformat.write(execute(name, options.folder.resolve()), EXAMPLES / f"{name}.ipynb")
        print(EXAMPLES / f"{name}.ipynb")


if __name__ == "__main__":
    main()
