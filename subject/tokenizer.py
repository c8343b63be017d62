"""Text to token ids, with nothing added, truncated or padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel

from winnow.schemas.errors import ConfigError

ControlTokens = Literal["text", "token"]
"""What a special token's spelling inside a text is read as."""


class TextTokenizer:
    """Text to token ids, for everything that reads text: nothing is added, truncated or padded.

    Added tokens that are not marked special (runs of spaces, `<think>`) count as ordinary text.

    Args:
        tokenizer: A fast tokenizer of transformers, or one of `tokenizers` itself; it is not changed.
        control: What a special token's spelling inside a text is read as: `text`, split like any other, or
            that `token`.
        model: Name of the subject, for messages.

    Raises:
        ConfigError: A slow tokenizer.
    """

    def __init__(self, tokenizer: Any, *, control: ControlTokens = "text", model: str = "") -> None:
        # A copy, since these settings are not the subject's.
        self._tokenizer: Tokenizer = copy_of(_backend(tokenizer, model))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = control == "text"
        declared = getattr(tokenizer, "init_kwargs", {}).get("add_bos_token") is True
        self._declared_bos: int | None = tokenizer.bos_token_id if declared else None

    @cached_property
    def before(self) -> list[int]:
        """The tokens that the post-processor puts before a text."""
        plain = self.encode("x")
        ids = self._tokenizer.encode("x", add_special_tokens=True).ids
        return ids[: next((at for at in range(len(ids)) if ids[at : at + len(plain)] == plain), 0)]

    @property
    def bos(self) -> int | None:
        """The token that the tokenizer itself puts before a text (the first, if several), or None.

        If its post-processor puts none, the BOS token, where its configuration says `add_bos_token: true`.
        """
        # Not by `bos_token_id` alone: that of Qwen and of SmolLM2-Instruct begins a chat's turn, and no text.
        return self.before[0] if self.before else self._declared_bos

    @cached_property
    def special(self) -> frozenset[str]:
        """The spellings of the special tokens."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    def token(self, number: int) -> str | None:
        """The spelling of a token in the vocabulary."""
        return self._tokenizer.id_to_token(number)

    def number(self, token: str) -> int | None:
        """A token's id, or None if the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """The tokens of one text [T]."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _placing(self) -> Tokenizer:
        """This tokenizer, with offsets that contain a token's white space."""
        made = copy_of(self._tokenizer)
        made.encode_special_tokens = self._tokenizer.encode_special_tokens
        # The byte-level post-processor leaves a token's white space out of its offsets otherwise.
        made.post_processor = ByteLevel(trim_offsets=False)
        return made

    def encode_placed(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """The tokens of each text, and (start, stop) of each in the text's characters."""
        made = self._placing.encode_batch(list(texts), add_special_tokens=False)
        return ((each.ids, each.offsets) for each in made)

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The tokens of each text, computed on all cores."""
        # The fast variant does not track offsets, which nobody reads here.
        return (made.ids for made in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))


def copy_of(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with settings of its own and the same vocabulary; `encode_special_tokens` is not copied."""
    # Its parts are shared: to write a vocabulary of 49,000 tokens as JSON and read it again took 0.13 s.
    made = Tokenizer(tokenizer.model)
    made.normalizer, made.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    made.post_processor, made.decoder = tokenizer.post_processor, tokenizer.decoder
    added = tokenizer.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    # A number follows from the tokens before it; a file may have given others.
    return made if made.get_added_tokens_decoder() == added else Tokenizer.from_str(tokenizer.to_str())


def vocabulary(tokenizer: Any) -> dict[int, str]:
    """Id -> spelling of every token, added ones included; ConfigError for a slow tokenizer."""
    return {number: token for token, number in _backend(tokenizer).get_vocab().items()}


def _backend(tokenizer: Any, model: str = "") -> Tokenizer:
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"subject {model!r} has no fast tokenizer",
            expected="a tokenizer.json or one that transformers can convert",
            got=type(tokenizer).__name__,
            fix="Save a fast tokenizer beside the weights",
        )
    return backend
