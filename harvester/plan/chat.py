"""Records to conversations: messages and tools as a chat template takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, cast

import fsspec

from winnow.harvester.plan.messages import (
    argument_forms,
    conversation,
    parsed,
    without_none,
    written_by_python,
)
from winnow.harvester.plan.records import (
    BadRecord,
    KeyTwice,
    Reading,
    bad_record,
    jsonl_values,
    key_twice,
    parquet_values,
)
from winnow.harvester.plan.rendering import ChatTemplate, Rendered, TemplateRefusal, Unproved
from winnow.harvester.plan.sources import SourceFile
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError

TOOLS_COLUMN, SYSTEM_COLUMN = "tools", "system"
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
    for place, value, (tools, system) in read(reading, file.source.column, (TOOLS_COLUMN, SYSTEM_COLUMN)):

        def bad(reason: str, expected: str, got: Any, place: str = place) -> BadRecord:
            return bad_record(file, place, reason, expected=expected, got=got)

        try:
            messages = conversation(value, system, file.source.column, bad)
            tools = _tools(tools)
            data = _canonical(messages, tools)
            rendered = _rendered(reading, template, messages, tools, place)
        except BadRecord as error:
            reading.settle(error)
            continue
        except KeyTwice as error:
            reading.settle(key_twice(file, place, error))
            continue
        except UnicodeEncodeError:
            reading.settle(_not_unicode(file, place))
            continue
        if rendered is not None and rendered.text:
            yield data, rendered


def _rendered(
    reading: Reading, template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, place: str
) -> Rendered | None:
    file = reading.file
    try:
        return template.render(_in_one_form(template, messages, tools), tools)
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


def _in_one_form(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls in the form that the template takes."""
    objects, *texts = argument_forms(messages)
    if not texts:
        return objects
    try:
        return texts[0] if written_by_python(objects, template.text(objects, tools)) else objects
    except TemplateRefusal:
        return texts[0]


def _tools(value: Any) -> Any:
    """Tools as a template takes them; None for none. A list may hold the JSON of each."""
    value = parsed(value)
    if isinstance(value, list):
        value = [parsed(tool) for tool in cast("list[Any]", value)]
    return without_none(value) or None


def _canonical(messages: list[dict[str, Any]], tools: Any) -> bytes:
    """What a conversation is compared and digested by."""
    # Parquet's messages may also hold times, decimals and bytes, which JSON has not.
    return json.dumps([messages, tools], sort_keys=True, ensure_ascii=False, default=str).encode()


def _not_unicode(file: SourceFile, place: str) -> BadRecord:
    return bad_record(file, place, "not Unicode", expected="valid Unicode", got="a lone surrogate")
