"""A text that no model has seen: the log of an invented craft, with words of its own. Seeded."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = (
    "velmar", "orskin", "tharrel", "quillom", "drevane", "sulphane", "brintel", "ghomrick", "yaskeld",
    "perrowin", "zhaltin", "mourvek", "fennaldir", "korrigath", "lustrin", "obrelle",
)  # fmt: skip
"""The craft's own words. None is in the King James Bible or in Shakespeare."""
_CRAFTS = ("weighed", "folded", "sealed", "split", "measured", "traded", "washed", "lifted")
_TIMES = (
    "before the second bell",
    "at low water",
    "after the lamps",
    "on the ninth day",
    "by the north gate",
)


def write_texts(path: Path, documents: int, seed: int, sentences: int = 24) -> Path:
    """Write `documents` texts of so many sentences as JSON lines; the same seed gives the same bytes."""
    draw = random.Random(seed)
    lines = [json.dumps({"text": _text(draw, sentences)}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_texts(path: Path) -> list[str]:
    """Read what `write_texts` wrote."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _text(draw: random.Random, sentences: int) -> str:
    return " ".join(_sentence(draw) for _ in range(sentences))


def _sentence(draw: random.Random) -> str:
    one, two, three = draw.sample(WORDS, 3)
    what, when, count = draw.choice(_CRAFTS), draw.choice(_TIMES), draw.randrange(2, 40)
    return draw.choice(
        (
            f"The {one} {what} {count} {two} {when}.",
            f"{count} {one} were {what} for the {two} of {three}, {when}.",
            f"If a {one} is {what} {when}, the {two} owes the {three} {count} more.",
            f"Never is {one} {what} beside {two}; the {three} said so {when}.",
        )
    )
