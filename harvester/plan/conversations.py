"""Rendered conversations to tokens, each with its message, and whether it is the message's own text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from winnow.harvester.plan.rendering import Rendered
from winnow.subject.tokenizer import TextTokenizer

Placed = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.bool_]]
"""(ids, the message of each token, whether each token is its message's own text), [n] each."""


class ConversationTokens:
    """Tokenises rendered conversations.

    Args:
        control: The subject's tokenizer, which reads special tokens' spellings as those tokens.
        text: The same, which reads them as text.
        as_text: Read spellings in the messages' own texts as text; those that the template wrote are tokens.
    """

    def __init__(self, control: TextTokenizer, text: TextTokenizer, *, as_text: bool) -> None:
        self._control, self._text, self._as_text = control, text, as_text
        numbers = (control.number(token) for token in control.special)
        self._special = np.array([number for number in numbers if number is not None], np.int64)

    def encode(self, chats: list[Rendered]) -> Iterator[Placed]:
        """The tokens of each conversation."""
        for chat, (ids, offsets) in zip(
            chats, self._control.encode_placed([chat.text for chat in chats]), strict=True
        ):
            tokens, places = np.array(ids, np.uint32), np.array(offsets, np.int64).reshape(-1, 2)
            if self._as_text:
                tokens, places = self._spelt_out(chat, tokens, places)
            yield (tokens, *_owners(chat, places))

    def _spelt_out(
        self, chat: Rendered, tokens: NDArray[np.uint32], places: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Read special tokens that a message spells as text."""
        special = np.isin(tokens, self._special)
        own = np.array([chat.written[start:stop].all() for start, stop in places[special]], np.bool_)
        if not own.any():
            return tokens, places
        # Between the special tokens that the template wrote, at which the tokenizer splits a text anyway.
        walls = np.flatnonzero(special)[~own]
        ids, found, at = list[NDArray[np.uint32]](), list[NDArray[np.int64]](), 0
        for wall in [*walls.tolist(), len(tokens)]:
            part = slice(at, wall)
            if special[part].any():
                start, stop = int(places[at, 0]), int(places[wall - 1, 1])
                ((new, offsets),) = self._text.encode_placed([chat.text[start:stop]])
                ids.append(np.array(new, np.uint32))
                found.append(np.array(offsets, np.int64).reshape(-1, 2) + start)
            else:
                ids.append(tokens[part])
                found.append(places[part])
            ids.append(tokens[wall : wall + 1])
            found.append(places[wall : wall + 1])
            at = wall + 1
        return np.concatenate(ids), np.concatenate(found)


def _owners(chat: Rendered, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(message, own text) of each token; one with a character of a message's own text is that message's."""
    size = len(chat.text)
    start = np.minimum(places[:, 0], size - 1)
    # A token without characters of its own (a dummy space, a byte of a character) has that of its place.
    stop = np.maximum(places[:, 1], start + 1)
    upto = np.concatenate([[0], np.cumsum(chat.written)])
    own = upto[stop] > upto[start]
    following = np.minimum.accumulate(np.where(chat.written, np.arange(size), size)[::-1])[::-1]
    at = np.where(own, np.minimum(following[start], size - 1), start)
    return chat.owner[at].astype(np.int64), own
