"""Messages as a chat template takes them, from the layouts in which conversations are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from winnow.harvester.plan.records import BadRecord, KeyTwice, parse_json
from winnow.schemas.labels import MAX_TURNS

Bad = Callable[[str, str, Any], BadRecord]
"""Makes the error for a record, from (reason, what was expected, what was found)."""

# ShareGPT's `from` and `value`, with the names of the services that its conversations were exported from.
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of the parts of a content that are its text."""


def conversation(value: Any, system: Any, column: str, bad: Bad) -> list[dict[str, Any]]:
    """The messages of a record, each with `role` and `content`.

    Args:
        value: A list of messages, or its JSON: `role` and `content`, or ShareGPT's `from` and `value`.
        system: The record's system text beside them (Anthropic, ShareGPT); anything else is ignored.
        column: The name of the field that holds `value`, for messages.
        bad: Makes the error.

    Raises:
        BadRecord: No conversation, a message without a role, or content that is not text.
        KeyTwice: JSON inside the record has an object with a key twice.
    """
    value = parsed(value)
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise bad("no conversation", f"a list of messages in column {column!r}", got)
    made = [_message(number, message, bad) for number, message in enumerate(cast("list[Any]", value))]
    if isinstance(system, str) and system.strip():
        if made[0]["role"] != "system":
            made.insert(0, {"role": "system", "content": system})
        elif made[0]["content"].strip() != system.strip():
            raise bad("two system texts", "one, in a message or in the field 'system'", "both, which differ")
    if len(made) >= MAX_TURNS:
        raise bad("too many messages", f"fewer than {MAX_TURNS} messages", len(made))
    return made


def parsed(value: Any) -> Any:
    """`value`, or what it is the JSON of: Parquet files often hold messages and tools as JSON."""
    if isinstance(value, str):
        try:
            return parse_json(value)
        except KeyTwice:
            raise
        except ValueError:
            return value
    return value


def without_none(value: Any) -> Any:
    """`value` without the fields that are null: Parquet has all of them in every message."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {key: without_none(item) for key, item in items if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in cast("list[Any]", value)]
    return value


def _message(number: int, value: Any, bad: Bad) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad("no conversation", f"message {number} as an object", type(value).__name__)
    # A template asks whether a field is there.
    fields: dict[str, Any] = without_none(value)
    if "role" not in fields and "from" in fields and "value" in fields:
        sender, content = fields.pop("from"), fields.pop("value")
        fields = {**fields, "role": _SHAREGPT.get(str(sender), sender), "content": content}
    role = _text(fields.get("role"))
    if not role or len(role) > 64:
        raise bad("no role", f"a role in message {number}", repr(fields.get("role"))[:80])
    content = _content(fields.get("content"))
    if content is None:
        got = _kinds(fields.get("content"))
        raise bad("content not text", f"text or parts of text in message {number}", got)
    calls = parsed(fields.pop("tool_calls", None))
    return {**fields, "role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def argument_forms(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages with the arguments of tool calls as objects, then as text; once if there are none.

    OpenAI's arguments are text, JSON. Most templates write objects as JSON themselves, and quote text again;
    some, such as DeepSeek's, take text alone. Text that was given keeps its spaces.
    """
    objects, texts = ([_with_calls(message, form) for message in messages] for form in (_as_object, _as_text))
    return [objects] if objects == texts else [objects, texts]


def written_by_python(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether `text` holds an object among the arguments as Python prints it, and not as JSON."""
    found: list[str] = []

    def look(arguments: Any) -> Any:
        if isinstance(arguments, dict) and arguments:
            found.append(repr(cast("dict[str, Any]", arguments)))
        return arguments

    for message in messages:
        _with_calls(message, look)
    return any(each in text for each in found)


def _with_calls(message: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_arguments(call, form) for call in cast("list[Any]", calls)]}


def _with_arguments(call: Any, form: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    fields = cast("dict[str, Any]", call)
    if isinstance(fields.get("function"), dict):
        return {**fields, "function": _with_arguments(fields["function"], form)}
    return {**fields, "arguments": form(fields["arguments"])} if "arguments" in fields else call


def _as_object(arguments: Any) -> Any:
    found = parsed(arguments)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    if isinstance(arguments, dict):
        return json.dumps(arguments, ensure_ascii=False, default=str)
    return arguments


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):  # some writers of Parquet mark text so
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


def _content(value: Any) -> str | None:
    """Text as it is, parts of text joined; None for anything else."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _text(value)
    texts: list[str] = []
    for part in cast("list[Any]", value):
        fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {"text": part}
        text = _text(fields.get("text"))
        if text is None or fields.get("type") not in _TEXT_PARTS:
            return None
        texts.append(text)
    return "".join(texts)


def _kinds(value: Any) -> str:
    """What a content is that is not text."""
    if not isinstance(value, list):
        return type(value).__name__
    parts = [cast("dict[str, Any]", part) for part in cast("list[Any]", value) if isinstance(part, dict)]
    kinds = sorted({str(part.get("type"))[:40] for part in parts} - {"text"})
    return f"parts of type {', '.join(kinds)}" if kinds else "other parts"
