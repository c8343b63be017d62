"""Conversations to text by a chat template, and of every character the message that it came from.

Templates are not prefix-preserving (some drop earlier reasoning, some move the system text), so the rendered
whole is what counts. It is rendered a second time with marks, characters that no text has, in the messages'
texts; if it is the same text without the marks, they prove where each message's text went. Marks at the very
ends of a text would hide white space from a template that trims it, and marks before a tag such as `<think>`
would hide it from one that looks for it: each text gets the widest marks that change nothing.

What the template itself wrote between the texts of two messages belongs to the first one as far as it is what
follows when the conversation ends there (`<|im_end|>`), and to the second one from then on (its header).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The supplementary private use planes, less the two code points at the end of each that are no characters.
_FIRST_MARK, _MARKS = 0xF0000, 0xFFFE
_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _MARKS - 1)}]")
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")
"""What a template may look for in a text, or split it at."""
_OUTER, _CORE, _PIECES, _BARE = range(4)
"""How a text is marked: at its ends; inside the white space at its ends; between tags only; not at all."""
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls")
"""Fields of a message whose texts are marked."""
_DATE = (
    "{%- macro strftime_now(format) -%}{%- if format == '%d %b %Y' -%}26 Jul 2024"
    "{%- elif format == '%Y-%m-%d' -%}2024-07-26{%- elif format == '%B %d, %Y' -%}July 26, 2024"
    "{%- elif format == '%d %B %Y' -%}26 July 2024{%- elif format == '%Y' -%}2024"
    "{%- else -%}{{ raise_exception('strftime_now: no fixed date for the format ' ~ format) }}{%- endif -%}"
    "{%- endmacro -%}"
)
"""In the place of today's date, which would make another dataset every day."""


class TemplateRefusal(Exception):
    """The template raised for a conversation."""


class Unproved(Exception):
    """Where a conversation's messages are in its text could not be proved."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    roles: tuple[str, ...]
    """The role of each message."""
    owner: NDArray[np.int32]
    """Of each character, the message that it belongs to."""
    written: NDArray[np.bool_]
    """Of each character, whether it is the message's own text; the template wrote the others."""

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class _Leaf:
    """One text of a message."""

    message: int
    text: str


_Path = tuple[Any, ...]
"""Keys and indices that lead from the list of messages to a text."""
_Marked = tuple[str, list[tuple[int, tuple[_Path, int]]]]
"""A text without its marks, and (place in it, (text, place in that)) of each."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The template, in Jinja.
        tokens: The tokenizer's named special tokens (`bos_token`, ...), which templates write.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self._template = (_DATE if "strftime_now" in source else "") + source
        self._tokens: dict[str, Any] = dict(tokens)

    def text(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """The conversation as text; TemplateRefusal if the template raises."""
        # Here, not above: it imports transformers, which a corpus of texts does not need for reading.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            made = render_jinja_template([messages], tools, chat_template=self._template, **self._tokens)
        except Exception as error:  # whatever a template runs into: its own, Jinja's and Python's errors
            raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error
        return made[0][0]

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Rendered:
        """Render a conversation, with the message of every character.

        Raises:
            TemplateRefusal: The template raises.
            Unproved: Where the messages are in the text could not be proved.
        """
        return _Proof(self, messages, tools).rendered()


class _Proof:
    """The marks of one conversation."""

    def __init__(
        self, template: ChatTemplate, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> None:
        self.template, self.messages, self.tools = template, messages, tools
        self.text = template.text(messages, tools)
        if _MARK.search(self.text):
            raise Unproved("it has characters of the private use area")
        self.leaves = dict(_leaves(messages))
        self.places: list[tuple[_Path, int]] = []
        """Of each mark, the text and the place in it."""
        self.pieces: set[tuple[_Path, int, int]] = set()
        self.levels = dict.fromkeys(self.leaves, _OUTER)
        whole = self._unchanged(self.levels)
        if whole is None:
            self.levels = self._levels()
            whole = self._marked(self.messages, self.levels)
        self.whole = whole
        """The text without its marks, and the marks: of `_marked`'s last call, whose `pieces` are kept."""

    def rendered(self) -> Rendered:
        text, marks = self.whole
        if text != self.text:
            raise Unproved("marks in several of its texts change what the template writes")
        self.marks = marks
        size = len(text)
        owner, written = np.full(size, -1, np.int32), np.zeros(size, np.bool_)
        for (at, one), (end, other) in pairwise(marks):
            self._between(at, one, end, other, owner, written)
        self._ends(marks, owner, written)
        self._share_out(marks, owner)
        return Rendered(text, tuple(message["role"] for message in self.messages), owner, written)

    def _levels(self) -> dict[_Path, int]:
        """How each text is marked, where not all can be at their ends: as widely as alone changes nothing."""
        found: dict[_Path, int] = {}
        for path, leaf in self.leaves.items():
            bare = dict.fromkeys(self.leaves, _BARE)
            wide = (_OUTER, _CORE, _PIECES)
            levels = (level for level in wide if self._unchanged({**bare, path: level}) is not None)
            found[path] = next(levels, _BARE)
            plain = _TAG.sub("", leaf.text).strip()
            if leaf.text.strip() and (found[path] == _BARE or (found[path] == _PIECES and not plain)):
                raise Unproved("the template looks into a text that cannot be marked")
        return found

    def _unchanged(self, levels: Mapping[_Path, int]) -> _Marked | None:
        """What `_marked` gives for the conversation, or None if these marks change the text."""
        try:
            made = self._marked(self.messages, levels)
        except TemplateRefusal:
            return None
        return made if made[0] == self.text else None

    def _marked(self, messages: list[dict[str, Any]], levels: Mapping[_Path, int]) -> _Marked:
        """The text without its marks, and (place in it, (text, place in that)) of each."""
        self.places, self.pieces = [], set()
        marked = [
            {key: self._mark(value, (number, key), levels) for key, value in message.items()}
            for number, message in enumerate(messages)
        ]
        raw = self.template.text(marked, self.tools)
        parts, marks, at = list[str](), list[tuple[int, tuple[_Path, int]]](), 0
        length = 0
        for match in _MARK.finditer(raw):
            parts.append(raw[at : match.start()])
            length += match.start() - at
            at = match.end()
            marks.append((length, self.places[ord(match[0]) - _FIRST_MARK]))
        return "".join([*parts, raw[at:]]), marks

    def _mark(self, value: Any, path: _Path, levels: Mapping[_Path, int]) -> Any:
        """`value` with marks in each text that `levels` names."""
        if isinstance(value, dict):
            return {key: self._mark(item, (*path, key), levels) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item, (*path, at), levels) for at, item in enumerate(value)]
        if path not in levels or levels[path] == _BARE:
            return value
        text, level, cuts = value, levels[path], set[int]()
        start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
        if level == _OUTER:
            cuts |= {0, len(text)}
        if level == _CORE and start < stop:
            cuts |= {start, stop}
        for begin, end in _plain_pieces(text):
            cuts |= {begin, end}
            self.pieces.add((path, begin, end))
        parts, last = list[str](), 0
        for cut in sorted(cuts):
            if len(self.places) == _MARKS:
                raise Unproved("it has too many parts")
            parts += [text[last:cut], chr(_FIRST_MARK + len(self.places))]
            self.places.append((path, cut))
            last = cut
        return "".join([*parts, text[last:]])

    def _between(
        self,
        at: int,
        one: tuple[_Path, int],
        end: int,
        other: tuple[_Path, int],
        owner: NDArray[np.int32],
        written: NDArray[np.bool_],
    ) -> None:
        (path, begin), (after, stop) = one, other
        if path != after or stop <= begin:
            return
        owner[at:end] = path[0]
        # A piece that was escaped is the message's all the same; between pieces a template may write its own.
        same = self.text[at:end] == self.leaves[path].text[begin:stop]
        written[at:end] |= same or (path, begin, stop) in self.pieces

    def _ends(
        self, marks: list[tuple[int, tuple[_Path, int]]], owner: NDArray[np.int32], written: NDArray[np.bool_]
    ) -> None:
        """What a text has before its first mark and after its last, if the template wrote just that."""
        for number, (at, (path, place)) in enumerate(marks):
            text = self.leaves[path].text.strip() if self.levels[path] != _OUTER else self.leaves[path].text
            skipped = len(self.leaves[path].text) - len(self.leaves[path].text.lstrip())
            inside = place - (skipped if self.levels[path] != _OUTER else 0)
            before, behind = text[:inside], text[inside:]
            first = number == 0 or marks[number - 1][1][0] != path
            last = number == len(marks) - 1 or marks[number + 1][1][0] != path
            low, high = at - len(before), at + len(behind)
            if first and before and low >= 0 and self.text[low:at] == before and (owner[low:at] < 0).all():
                owner[low:at], written[low:at] = path[0], True
            if last and behind and self.text[at:high] == behind and (owner[at:high] < 0).all():
                owner[at:high], written[at:high] = path[0], True

    def _share_out(self, marks: list[tuple[int, tuple[_Path, int]]], owner: NDArray[np.int32]) -> None:
        """Give every other character to a message."""
        # The places at which a message's own text ends and another's begins. An empty text has a place, too.
        known = [(at, at, path[0]) for at, (path, _) in marks]
        for start, stop in _runs(owner >= 0):
            known += [(begin, end, int(owner[begin])) for begin, end in _equal(owner, start, stop)]
        known.sort()
        last = len(self.messages) - 1
        before, message = 0, -1
        for start, stop, its in [*known, (len(owner), len(owner), last)]:
            if start > before:
                self._gap(before, start, message, its, owner)
            if stop >= before:
                before, message = max(before, stop), its

    def _gap(self, start: int, stop: int, one: int, other: int, owner: NDArray[np.int32]) -> None:
        """Share what the template wrote between the texts of two messages; `one` -1 is the beginning."""
        if one == other:
            owner[start:stop] = other
            return
        at = start
        # Backwards where a template moved a text, such as the system's into the last turn.
        # In between are messages without a text of their own; one that has its text elsewhere is not here.
        elsewhere = {path[0] for _, (path, _) in self.marks} - {one}
        between = range(max(one, 0), other) if one < other else [one]
        for number in (number for number in between if number not in elsewhere):
            end = start + self._following(start, stop, one, number)
            if end > at:
                owner[at:end] = number
                at = end
        owner[at:stop] = other

    def _following(self, start: int, stop: int, one: int, number: int) -> int:
        """How many characters after `start` also follow there in a conversation up to message `number`."""
        try:
            text, marks = self._marked(self.messages[: number + 1], self.levels)
        except TemplateRefusal:
            return 0
        at = 0
        if one >= 0:
            ends = [at for at, (path, _) in marks if path[0] == one]
            if not ends:
                return 0
            # From the last mark, not from the end of the text: what lies between the two is compared as well.
            whole = [at for at, (path, _) in self.marks if path[0] == one and at <= start]
            if not whole:
                return 0
            at = ends[-1] + start - whole[-1]
            if text[ends[-1] : at] != self.text[whole[-1] : start]:
                return 0
        return _common(text[at : at + stop - start], self.text[start:stop])


def _leaves(messages: list[dict[str, Any]]) -> Iterator[tuple[_Path, _Leaf]]:
    for number, message in enumerate(messages):
        for key in _TEXTS:
            for path, text in _strings(message.get(key), (number, key)):
                # `type` says what a part is, and templates compare it.
                if path[-1] != "type":
                    yield path, _Leaf(number, text)


def _strings(value: Any, path: _Path) -> Iterator[tuple[_Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, (*path, key))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _strings(item, (*path, at))


def _plain_pieces(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of what lies between tags, without white space at the ends."""
    at = 0
    for match in [*_TAG.finditer(text), None]:
        stop = match.start() if match else len(text)
        piece = text[at:stop]
        start = at + len(piece) - len(piece.lstrip())
        end = at + len(piece.rstrip())
        if start < end:
            yield start, end
        at = match.end() if match else stop


def _runs(chosen: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _equal(owner: NDArray[np.int32], start: int, stop: int) -> Iterator[tuple[int, int]]:
    edges = [start, *(np.flatnonzero(np.diff(owner[start:stop])) + start + 1).tolist(), stop]
    yield from pairwise(edges)


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
