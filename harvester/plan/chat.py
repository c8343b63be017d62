"""Records to conversations: messages and tools as a chat template takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, cast

import fsspec

from winnow.harvester.plan.records import BadRecord, Reading, bad_record, jsonl_values, parquet_values
from winnow.harvester.plan.rendering import ChatTemplate, Rendered, TemplateRefusal, Unproved
from winnow.harvester.plan.sources import SourceFile
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.labels import MAX_TURNS

TOOLS_COLUMN = "tools"
_SKIP = "Set the source's unproved to skip to leave such conversations out"


def chat_templates(corpus: CorpusSpec, tokenizer: Any, model: str) -> dict[int, ChatTemplate]:
    """The template of each source of conversations, by the source's number.

    Args:
        corpus: The corpus.
        tokenizer: The subject's, of transformers or of `tokenizers`.
        model: The subject's name, for messages.

    Raises:
        ConfigError: A file that cannot be read, or a tokenizer without a template.
    """
    named = getattr(tokenizer, "special_tokens_map", {})
    tokens = {name: str(token) for name, token in named.items() if isinstance(token, str)}
    return {
        number: ChatTemplate(
            _own(tokenizer, model) if source.template is None else _file(source.template), tokens
        )
        for number, source in enumerate(corpus.sources)
        if source.format == "chat"
    }


def template_digests(templates: dict[int, ChatTemplate]) -> dict[int, str]:
    """The SHA-256 of each template."""
    return {number: hashlib.sha256(made.source.encode()).hexdigest() for number, made in templates.items()}


def _own(tokenizer: Any, model: str) -> str:
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = cast("dict[str, Any]", found).get("default")
    if not isinstance(found, str):
        raise ConfigError(
            f"the tokenizer of subject {model!r} has no chat template",
            expected="one, for corpus.sources of format chat",
            got="none",
            fix="Set the source's template to a Jinja file",
        )
    return found


def _file(uri: str) -> str:
    try:
        with fsspec.open(uri, "rb") as file:
            return cast(bytes, file.read()).decode()  # pyright: ignore
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"corpus.sources[].template {uri!r}",
            expected="a Jinja file",
            got=str(error),
            fix="Check the path",
        ) from error


def read_chat(reading: Reading, template: ChatTemplate) -> Iterator[tuple[bytes, Rendered]]:
    """Yield (canonical JSON of the conversation, the rendered conversation) of each record of a file."""
    file = reading.file
    read = parquet_values if file.format == "parquet" else jsonl_values
    for place, value, tools in read(reading, file.source.column, TOOLS_COLUMN):
        try:
            messages = _messages(_parsed(value), file, place)
            tools = _without_none(_parsed(tools)) or None
            data = json.dumps([messages, tools], sort_keys=True, ensure_ascii=False).encode()
            rendered = _rendered(reading, template, messages, tools, place)
        except (BadRecord, UnicodeEncodeError) as error:
            reading.settle(error if isinstance(error, BadRecord) else _not_unicode(file, place))
            continue
        if rendered is not None and rendered.text:
            yield data, rendered


def _rendered(
    reading: Reading, template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, place: str
) -> Rendered | None:
    file = reading.file
    try:
        return template.render(messages, tools)
    except TemplateRefusal as error:
        raise bad_record(
            file,
            place,
            "refused by the chat template",
            expected="a conversation that the chat template takes",
            got=str(error),
        ) from error
    except Unproved as error:
        if file.source.unproved == "refuse":
            raise ConfigError(
                f"corpus file {file.name}{place}: where the messages are in the text cannot be proved",
                expected="texts that the template writes as they are, or trimmed",
                got=str(error),
                fix=_SKIP,
            ) from error
        reading.leave_out(place, "messages not proved")
        return None


def _not_unicode(file: SourceFile, place: str) -> BadRecord:
    return bad_record(file, place, "not Unicode", expected="valid Unicode", got="a lone surrogate")


def _parsed(value: Any) -> Any:
    # Parquet files often hold messages and tools as JSON.
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _messages(value: Any, file: SourceFile, place: str) -> list[dict[str, Any]]:
    def bad(reason: str, expected: str, got: Any) -> BadRecord:
        return bad_record(file, place, reason, expected=expected, got=got)

    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise bad("no conversation", f"a list of messages in column {file.source.column!r}", got)
    made: list[dict[str, Any]] = []
    for number, message in enumerate(cast("list[Any]", value)):
        if not isinstance(message, dict):
            raise bad("no conversation", f"message {number} as an object", type(message).__name__)
        fields = cast("dict[str, Any]", message)
        role = fields.get("role")
        if not isinstance(role, str) or not role or len(role) > 64:
            raise bad("no role", f"a role in message {number}", repr(role)[:80])
        content = _content(fields.get("content"))
        if content is None:
            raise bad("content not text", f"text or parts of text in message {number}", "another content")
        # A template asks whether a field is there; Parquet has all of them in every message.
        made.append({**_without_none(fields), "content": content})
    if len(made) >= MAX_TURNS:
        raise bad("too many messages", f"fewer than {MAX_TURNS} messages", len(made))
    return made


def _content(value: Any) -> str | None:
    """Text as it is, parts of text joined; None for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    texts: list[str] = []
    for part in cast("list[Any]", value):
        text = cast("dict[str, Any]", part).get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {key: _without_none(item) for key, item in items if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in cast("list[Any]", value)]
    return value
