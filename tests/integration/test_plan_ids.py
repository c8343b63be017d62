"""Token ids to a plan: the ids as they are, with the roles that the source gives, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.test_planner import make_config, planned
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError
from winnow.schemas.labels import FIRST, LAST_TURN, SPECIAL
from winnow.store.read.labels import read_labels
from winnow.subject.testing import EOS

DOCUMENTS = [[(7 * n + at) % 250 for at in range(10 + n % 30)] for n in range(300)]


def config_of(folder: Path, name: str, **fields: Any) -> Config:
    config = make_config(
        folder, corpus={"sources": [{"uri": str(folder / name), "format": "tokens", **fields}]}
    )
    return config.model_copy(update={"root": str(folder / f"root-{name}")})


def write_lines(path: Path, **columns: list[Any]) -> None:
    rows = zip(*columns.values(), strict=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


def test_lines_parquet_and_raw_files_give_the_same_tokens(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", input_ids=DOCUMENTS)
    pq.write_table(pa.table({"ids": DOCUMENTS}), tmp_path / "a.parquet")
    stream = [token for ids in DOCUMENTS for token in [*ids, EOS]]
    np.array(stream, "<u2").tofile(tmp_path / "a.bin")
    np.array(stream, "<u4").tofile(tmp_path / "b.bin")
    plan, store, tokens = planned(config_of(tmp_path, "a.jsonl"))
    for config in (
        config_of(tmp_path, "a.parquet", column="ids"),
        config_of(tmp_path, "a.bin"),
        config_of(tmp_path, "b.bin", dtype="uint32"),
    ):
        other, _, found = planned(config)
        assert np.array_equal(found, tokens)
        assert other.labels == plan.labels
    for unit in range(plan.units):
        labels = read_labels(store, plan, unit)
        for ids, document, offset in zip(
            tokens[unit].ravel(), labels["document"].ravel(), labels["offset"].ravel(), strict=True
        ):
            assert ids == [*DOCUMENTS[int(document)], EOS][int(offset)]


def test_roles_come_from_their_column(tmp_path: Path) -> None:
    roles = [["user" if at < 4 else "judge" if at < 6 else "user" for at in range(len(d))] for d in DOCUMENTS]
    write_lines(tmp_path / "a.jsonl", input_ids=DOCUMENTS, who=roles)
    plan, store, _ = planned(config_of(tmp_path, "a.jsonl", roles="who"))
    assert plan.labels is not None
    assert plan.labels.roles == ("none", "system", "user", "assistant", "tool", "judge")
    for unit in range(plan.units):
        labels = read_labels(store, plan, unit)
        names = np.array(plan.labels.roles)[labels["role"].astype(int)]
        turns = labels["turn"]
        for document, offset, name, turn, flags in zip(
            *(
                x.ravel().tolist()
                for x in (labels["document"], labels["offset"], names, turns, labels["flags"])
            ),
            strict=True,
        ):
            if offset == len(DOCUMENTS[document]):
                assert (name, turn, flags) == ("none", 0, SPECIAL)
                continue
            assert name == roles[document][offset]
            assert turn == (0 if offset < 4 else 1 if offset < 6 else 2)
            assert flags == (FIRST if offset == 0 else 0) | (LAST_TURN if turn == 2 else 0)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([3, 999], r"line 301: expected token ids below 258, the subject's vocabulary, got 999"),
        ("text", r"line 301: expected a list of token ids, got str"),
        ([3, -1], r"line 301: expected a list of token ids"),
        ([3, 1.5], r"line 301: expected a list of token ids"),
    ],
)
def test_ids_that_are_none_of_the_subject_are_refused(tmp_path: Path, ids: Any, said: str) -> None:
    write_lines(tmp_path / "a.jsonl", input_ids=[*DOCUMENTS, ids])
    with pytest.raises(ConfigError, match=said):
        planned(config_of(tmp_path, "a.jsonl"))
    assert not (tmp_path / "root-a.jsonl").exists()


def test_roles_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", input_ids=[[1, 2]], who=[["user"]])
    with pytest.raises(
        ConfigError, match=r"line 1: expected 2 names of roles in column 'who', one for each id"
    ):
        planned(config_of(tmp_path, "a.jsonl", roles="who"))


def test_a_raw_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\1\0" * 5000 + b"\1")
    with pytest.raises(ConfigError, match=r"a\.bin is cut short: expected whole ids of 2 bytes"):
        planned(config_of(tmp_path, "a.bin"))
    np.array([5, 999], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="near byte 0: expected token ids below 258"):
        planned(config_of(tmp_path, "a.bin"))
