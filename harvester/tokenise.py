"""Documents to token ids, in parallel: reading, tokenising and packing overlap.

Threads only: the tokenizer's own (Rust) do the work inside `encode_batch`, with the GIL released, and
nothing forks, which would turn them off.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from tokenizers import Tokenizer

from harvester.packing import Tokens
from schemas.errors import ConfigError, IntegrityError
from schemas.subject import SubjectIdentity

BATCH_CHARS = 2**21
"""Characters tokenised together: enough for every core, little enough to keep memory flat (the
tokenizer takes about 30 bytes for each while it works)."""
BATCH_DOCUMENTS = 4096
AHEAD = 2
"""Batches waiting between two stages."""

ControlTokens = Literal["text", "token"]
"""What a special token's spelling inside a text is read as."""

T = TypeVar("T")


def read_ahead(items: Iterable[T], depth: int = AHEAD) -> Generator[T, None, None]:
    """`items`, made in a thread of their own, at most `depth` of them waiting.

    An error in `items` is raised here; leaving early ends the thread.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    def hand_over(item: T | None, error: BaseException | None) -> None:
        while not left.is_set():
            try:
                waiting.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        source = iter(items)
        try:
            for item in source:
                hand_over(item, None)
                if left.is_set():
                    break
            else:
                hand_over(None, StopIteration())
        except BaseException as error:  # carried to the reader's thread, whatever it is
            hand_over(None, error)
        finally:
            if hasattr(source, "close"):
                source.close()  # pyright: ignore

    thread = threading.Thread(target=produce, name="winnow-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType]
    finally:
        left.set()
        thread.join()


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive documents, about `BATCH_CHARS` characters together."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class TextTokenizer:
    """Text to token ids, for whoever reads text: nothing is added, cut or padded.

    Tokens that a tokenizer adds without calling them special (runs of spaces, `<think>`) belong to its
    ordinary text.

    Args:
        tokenizer: A fast tokenizer of transformers, or one of `tokenizers` itself; it stays as it is.
        control: What a special token's spelling inside a text is read as: `text`, split like any other, or
            that `token`.
        model: Whose tokenizer it is, for messages.

    Raises:
        ConfigError: A slow tokenizer.
    """

    def __init__(self, tokenizer: Any, *, control: ControlTokens = "text", model: str = "") -> None:
        # A copy: its settings are not the subject's. `to_str` leaves `encode_special_tokens` out.
        self._tokenizer: Tokenizer = Tokenizer.from_str(_backend(tokenizer, model).to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = control == "text"

    @cached_property
    def bos(self) -> int | None:
        """The token that the tokenizer itself puts before a text (the first, if several), or None.

        What its post-processor does decides, not `bos_token_id`: that of Qwen and of SmolLM2-Instruct begins
        a chat's turn, and no text.
        """
        plain = self.encode("x")
        ids = self._tokenizer.encode("x", add_special_tokens=True).ids
        before = next((at for at in range(len(ids)) if ids[at : at + len(plain)] == plain), 0)
        return ids[0] if before else None

    def encode(self, text: str) -> list[int]:
        """The tokens of one text [T]."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The tokens of each text, made on all cores."""
        return (made.ids for made in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))


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


class DocumentTokenizer:
    """A subject's tokenizer, set for whole documents: nothing added, cut or padded, EOS after each.

    Args:
        tokenizer: A fast tokenizer of transformers, or one of `tokenizers` itself.
        identity: The subject's; its EOS joins documents, its vocabulary bounds the ids.
        bos: Whether windows start with BOS.

    Raises:
        ConfigError: A slow tokenizer, or one without EOS (or BOS, where asked for).
    """

    def __init__(self, tokenizer: Any, identity: SubjectIdentity, *, bos: bool) -> None:
        self._text = TextTokenizer(tokenizer, control="token", model=identity.model)
        if identity.eos_token_id is None:
            raise ConfigError(
                f"subject {identity.model!r}: its tokenizer has no EOS token",
                expected="one, since it joins documents",
                got="none",
                fix="Set eos_token in the model's tokenizer_config.json",
            )
        if bos and identity.bos_token_id is None:
            raise ConfigError(
                "plan.bos",
                expected="none, since the subject's tokenizer has no BOS token",
                got="window",
                fix="Set plan.bos to none",
            )
        self._identity = identity
        self.eos: int = identity.eos_token_id
        self.bos: int | None = identity.bos_token_id if bos else None
        self.dtype: np.dtype[np.generic] = np.dtype(np.uint16 if identity.vocabulary <= 2**16 else np.uint32)
        """The smallest that holds every id: what is spilled to disk."""

    def __call__(self, texts: list[str]) -> list[Tokens]:
        """The tokens of each document, EOS at the end.

        Raises:
            IntegrityError: An id beyond the subject's embedding.
        """
        made: list[Tokens] = []
        for ids in self._text.encode_batch(texts):
            ids.append(self.eos)
            made.append(np.array(ids, np.uint32))
        largest = max(int(tokens.max()) for tokens in made)
        if largest >= self._identity.vocabulary:
            raise IntegrityError(
                f"the tokenizer of {self._identity.model!r} does not fit its model",
                expected=f"token ids below {self._identity.vocabulary}, the embedding's rows",
                got=largest,
                fix="Use the tokenizer the model was trained with",
            )
        return [tokens.astype(self.dtype) for tokens in made]
