"""Write every page of the site to a folder: those of the repository, and those generated from the program.

::

    python -m docs.generate --out build/docs
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from docs.generate import commands, errors, fields, figures, library
from docs.generate.pages import Pages

GENERATED = {
    "reference/config.md": fields.config_page,
    "reference/commands.md": commands.page,
    "reference/python.md": library.page,
    "reference/metrics.md": figures.page,
    "reference/files.md": fields.files_page,
    "reference/errors.md": errors.page,
}
"""Page -> what writes its Markdown."""
OVERVIEW = "docs/reference.md"
TITLES = {
    "reference/config.md": "Config fields",
    "reference/commands.md": "Commands",
    "reference/python.md": "Python API",
    "reference/metrics.md": "Metrics",
    "reference/files.md": "Stored documents",
    "reference/errors.md": "Errors",
}
"""Page -> its name in the overview."""
ROOT = Path(__file__).parents[2]


def gather(root: Path = ROOT) -> Pages:
    """Collect every page of the site."""
    pages = Pages(root)
    for name, write in GENERATED.items():
        pages.add(f"docs/{name}", write())
    # Only the site has these pages: in the repository their links would lead nowhere.
    overview = (root / OVERVIEW).read_text(encoding="utf-8")
    for name in GENERATED:
        overview = re.sub(rf"^\| {TITLES[name]} \|", f"| [{TITLES[name]}]({name}) |", overview, flags=re.M)
    pages.add(OVERVIEW, overview)
    pages.collect()
    return pages


def main() -> None:
    """Write the pages; files of an earlier run that are no longer made are removed."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="folder of the pages")
    out: Path = parser.parse_args().out
    pages = gather()
    pages.write(out)
    print(f"{len(pages.files)} files in {out}")


if __name__ == "__main__":
    main()
