"""docs/subjects.md: what was found of every subject, one line each.

::

    python -m tests.subjects.table --write         try every subject, write the table
    python -m tests.subjects.table llama mamba     print the lines of these
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from tests.subjects.catalogue import CLASSES, SUBJECTS, VISION
from tests.subjects.checks import Row, examine
from winnow.schemas.subject import HOOK_SITES

PAGE = Path(__file__).parents[2] / "docs" / "subjects.md"

INTRODUCTION = f"""\
# Subjects: every causal language model of transformers {transformers.__version__}

A tiny random model of each of the {len(CLASSES) - len(VISION)} architectures that
`AutoModelForCausalLM` knows, of {len(VISION)} that read images too and that only
`AutoModelForImageTextToText` knows, and of some of their forms, was loaded with `subject.attention: auto` and
compared with the bare transformers model.
`make test-subjects` repeats this and fails if the result differs from this page;
`python -m tests.subjects.table --write` rewrites the page.

- **attention**: what `auto` selects.
- **sites**: where activations can be read and replaced, on every layer unless some are named. If a site is
  replaced by itself, every logit is bit-identical; if it is replaced by zeros, the next block receives zeros;
  and `resid_post = resid_pre + attn_out + mlp_out` and `resid_mid = resid_pre + attn_out` (`resid_pre` where
  attention and MLP run in parallel) if all are present, the MLP's norm of `resid_mid` is `mlp_in`, and the
  projection of `attn_z`, normed where the block norms it, is `attn_out`. A site that is not named is refused.
  `router` is read-only: the experts that a block runs are those of the largest logits, or the weights of
  their outputs rise with their logits where a bias has a say in the choice.
  Outside the table of subject/layout.py, parts are found by their names and proved at load; a model whose
  config scales what a block adds (Granite's `residual_multiplier`) loses them.
  Module paths can be read on every subject that loads.
- **truncation**: a subject loaded only up to a hook gives the same bits as the whole subject.
- **generation**: `cached`, or a whole pass for each token. The logits of every step are those of a whole pass
  over the same tokens, and a steer of strength 0 changes no bit.
- **tail**: the passes of evaluation and attribution that begin at a hook: `patched` (whole windows) and
  `continued` (positions after one changed row, with a cache); `right` is both.
- **documents**: `apart`: with `plan.attend: document`, logits and rows of documents packed into a window are
  those of each document run alone. `refused`: they are not, because the architecture in transformers ignores
  positions that restart (recurrences, ALiBi, positions of its own, masks made without them as in gpt-oss).

For every subject, logits and losses are those of the bare model, a window alone gives the same result as in a
batch of 8, and no logit depends on a later token.

| subject | class | attention | sites | truncation | generation | tail | documents | why |
|---|---|---|---|---|---|---|---|---|
"""


def line(row: Row) -> str:
    """One line of the table."""
    parts: dict[str, list[str]] = {}
    for what, text in row.notes:
        # Where a block adds its parts is known of few architectures: the page says so once.
        if row.sites in ("—", "none") or what not in HOOK_SITES[2:]:
            parts.setdefault(text, []).append(what)
    why = [text if what == ["note"] else f"{', '.join(what)}: {text}" for text, what in parts.items()]
    why += [f"**FAULT** {fault}" for fault in row.faults]
    cells = [f"`{row.name}`", row.model_class, row.attention, row.sites, row.truncation, row.generation]
    return f"| {' | '.join([*cells, row.tail, row.documents, '; '.join(why).replace('|', '/')])} |"


def page(rows: Iterable[Row]) -> str:
    """The whole of docs/subjects.md."""
    return INTRODUCTION + "".join(line(row) + "\n" for row in rows)


def check(name: str, folder: Path) -> None:
    """Fail where a subject shows a fault, or the page says something else of it."""
    row = examine(name, folder)
    assert not row.faults
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    written = next((text for text in lines if text.startswith(f"| `{name}` |")), None)
    assert line(row) == written, f"{PAGE.name} is out of date: python -m tests.subjects.table --write"


def main() -> int:
    """Try subjects; print their lines or write the page. Returns 1 where a fault was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="subjects; all of them if none is named")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}; needs all of them")
    options = parser.parse_args()
    if options.write and options.names:
        parser.error("--write takes no names")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in options.names or SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(examine(name, Path(folder)))
        print(line(rows[-1]), flush=True)
    if options.write:
        PAGE.write_text(page(rows), encoding="utf-8")
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
