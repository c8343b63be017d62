"""kill -9 of planning conversations, run again: the same plan, tokens and labels, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.test_plan_chat import conversation
from tests.support.chat_templates import CHATML
from tests.support.pipeline import pipeline_config
from tests.support.struck import killed
from winnow.common.config_file import load_config
from winnow.harvester.run.driver import ensure_plan
from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.layout import PLAN_KEY
from winnow.store.objects import open_store

UNITS = 40


def chat_config(folder: Path, root: Path) -> Path:
    """A config that plans conversations."""
    folder.mkdir()
    (folder / "template.jinja").write_text(CHATML)
    lines = [{"messages": conversation(number)} for number in range(330)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in lines))
    source = {
        "uri": str(folder / "chats.jsonl"),
        "format": "chat",
        "template": str(folder / "template.jinja"),
    }
    return pipeline_config(folder, root=str(root), units=UNITS, corpus={"sources": [source]})


def stored(root: Path) -> dict[str, bytes]:
    """Every object but the plan, which also says when it was made, and what a killed process left in .tmp."""
    keys = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {key: (root / key).read_bytes() for key in keys if key != PLAN_KEY and not key.startswith(".")}


def fingerprint(root: Path) -> str:
    return HarvestPlan.model_validate_json((root / PLAN_KEY).read_bytes()).fingerprint


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """The config, and the root of a plan that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    config, root = chat_config(folder / "chat", folder / "data"), folder / "data"
    ensure_plan(load_config(config), open_store(str(root)))
    return config, root


# Of the object whose bytes were written just before, and which is not there.
MOMENTS = {
    "while tokens are written": "tokens/c/5/0",
    "while labels are written": f"labels/role/c/{UNITS // 2}/0",
}


def test_killed_at_one_moment_after_another_it_gives_the_same_plan(whole, tmp_path):
    config, expected = whole
    root = tmp_path / "data"
    for moment in MOMENTS.values():
        killed(moment, ["winnow", "plan", str(config), "--json", "--set", f"root={root}"])
        assert len(list(root.glob("labels/*/c/*/0"))) < 6 * (UNITS + 1), "killed too late to show anything"
    ensure_plan(load_config(config), open_store(str(root)))
    assert fingerprint(root) == fingerprint(expected)
    assert stored(root) == stored(expected)
    labels = {key.split("/")[1] for key in stored(root) if key.startswith("labels/")}
    assert {"role", "turn", "flags", "source", "document", "offset"} <= labels
