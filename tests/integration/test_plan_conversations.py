"""Conversations in the layouts in which they are published give the same plan, or are refused in words."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.test_plan_chat import chat_subject, config_of, conversation, write_chats
from tests.integration.test_planner import planned
from tests.support.chat_templates import CHATML, SHAPES, Message
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError

CHATS = [conversation(number) for number in range(120)]


def tokens_of(config: Config, root: str) -> np.ndarray:
    made = config.model_copy(update={"root": f"{config.root}-{root}"})
    return planned(made, subject=chat_subject())[2]


def skipping(config: Config) -> Config:
    assert config.corpus is not None
    corpus = config.corpus.model_copy(update={"bad_records": "skip"})
    return config.model_copy(update={"corpus": corpus})


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def sharegpt(chat: list[Message]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]}


def anthropic(chat: list[Message]) -> dict[str, Any]:
    first = chat[0]["role"] == "system"
    blocks = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat[first:]]
    return {"system": chat[0]["content"] if first else None, "messages": blocks, "stop_sequences": []}


def openai(chat: list[Message]) -> dict[str, Any]:
    return {"messages": [{"weight": 0, "refusal": None, **m} for m in chat], "parallel_tool_calls": False}


@pytest.mark.parametrize("layout", [sharegpt, anthropic, openai])
def test_layouts_of_json_lines_give_the_same_plan(tmp_path: Path, layout: Any) -> None:
    write_chats(tmp_path, CHATS)
    wanted = tokens_of(config_of(tmp_path), "wanted")
    write_lines(tmp_path / "a.jsonl", [layout(chat) for chat in CHATS])
    column = "conversations" if layout is sharegpt else "messages"
    found = tokens_of(config_of(tmp_path, uri=str(tmp_path / "a.jsonl"), column=column), "found")
    assert np.array_equal(found, wanted)


ROLE, TEXT = pa.dictionary(pa.int32(), pa.string()), pa.string()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (pa.list_(pa.struct([("role", ROLE), ("content", TEXT)])), {}),
        (pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())])), {}),
        (pa.list_(pa.struct([("role", pa.binary()), ("content", pa.binary())])), {}),
        (None, {"at": datetime(2024, 1, 1, tzinfo=UTC), "cost": Decimal("1.5"), "image": b"\xff"}),
        (None, {"tool_calls": []}),
    ],
)
def test_parquet_of_every_type_gives_the_same_plan(tmp_path: Path, kind: Any, more: dict[str, Any]) -> None:
    write_chats(tmp_path, CHATS)
    wanted = tokens_of(config_of(tmp_path), "wanted")
    table = pa.table({"messages": pa.array([[{**m, **more} for m in chat] for chat in CHATS], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = tokens_of(config_of(tmp_path, uri=str(tmp_path / "a.parquet")), "found")
    assert np.array_equal(found, wanted)


# As DeepSeek's joins them, as templates that write what they are given, and as most write them.
JOINED = "{{ '' + call.function.arguments }}"
PRINTED = "{{ call.function.arguments }}"
WRITTEN = "{{ call.function.arguments | tojson }}"


@pytest.mark.parametrize("how", [JOINED, PRINTED, WRITTEN])
def test_arguments_of_calls_may_be_objects_or_json(tmp_path: Path, how: str) -> None:
    def called(arguments: Any) -> list[list[Message]]:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        asked = {"role": "assistant", "content": None, "tool_calls": [call]}
        return [[*chat, asked, {"role": "tool", "content": "18", "tool_call_id": "1"}] for chat in CHATS]

    assert WRITTEN in SHAPES["tools"][0]
    write_chats(tmp_path, called({"city": "Rome"}))
    template = SHAPES["tools"][0]
    wanted = tokens_of(config_of(tmp_path, template=template), "wanted")
    template = template.replace(WRITTEN, how)
    write_chats(tmp_path, called({"city": "Rome"}))
    assert np.array_equal(tokens_of(config_of(tmp_path, template=template), "objects"), wanted)
    write_chats(tmp_path, called('{"city": "Rome"}'))
    assert np.array_equal(tokens_of(config_of(tmp_path, template=template), "found"), wanted)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a key twice": (
        {"messages": '[{"role": "user", "role": "user", "content": "x"}]'},
        "line 121: expected every key of an object once, got 'role' twice",
    ),
    "content not text": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "x"}, {"type": "tool_use"}],
                }
            ]
        },
        "line 121: expected text or parts of text in message 0, got parts of type thinking, tool_use",
    ),
    "two system texts": (
        {"system": "other", "messages": [{"role": "system", "content": "one"}]},
        "line 121: expected one, in a message or in the field 'system'",
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_ambiguous_or_no_text_is_a_bad_record(tmp_path: Path, reason: str) -> None:
    record, said = BAD[reason]
    write_lines(tmp_path / "chats.jsonl", [*({"messages": chat} for chat in CHATS), record])
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match=said):
        planned(config, subject=chat_subject())
    assert planned(skipping(config), subject=chat_subject())[0].corpus_facts.bad_records == {reason: 1}


def test_a_message_of_parquet_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    texts = [[(m["role"], m["content"].encode()) for m in chat] for chat in CHATS]
    texts[7] = [("user", b"caf\xe9")]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary())]))
    made = pa.array([[{"role": r, "content": c} for r, c in chat] for chat in texts], kind)
    fields = made.flatten()
    parts = [fields.field("role"), fields.field("content").view(pa.string())]
    column = pa.ListArray.from_arrays(made.offsets, pa.StructArray.from_arrays(parts, ["role", "content"]))
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    config = config_of(tmp_path, uri=str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match=r"a\.parquet, row 7, a text in it, is not UTF-8 at byte 3"):
        planned(config, subject=chat_subject())
    assert planned(skipping(config), subject=chat_subject())[0].corpus_facts.bad_records == {"not UTF-8": 1}


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([CHATS, CHATS], names=["messages", "messages"]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="column 'messages': expected one column of that name, got 2"):
        planned(config_of(tmp_path, template=CHATML, uri=str(tmp_path / "a.parquet")), subject=chat_subject())
