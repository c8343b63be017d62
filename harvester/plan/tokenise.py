"""Documents to token ids, in parallel: reading, tokenising and packing overlap."""

# Threads only: the tokenizer's own (Rust) do the work inside `encode_batch`, with the GIL released. After a
# fork the library turns them off. It has several batches at once: the cores work on the others while the ids
# of one become arrays, under Python's lock, and when a batch has fewer documents left than there are cores.

from __future__ import annotations

import queue
import threading
from array import array
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from winnow.harvester.plan.conversations import ConversationTokens, Placed
from winnow.harvester.plan.corpus import Document
from winnow.harvester.plan.ids import GivenIds, IdRules
from winnow.harvester.plan.marks import FIRST_MARK, document_tokens
from winnow.harvester.plan.packing import Tokens
from winnow.harvester.plan.rendering import ChatTemplate, Rendered
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.harvest import BEFORE, HarvestPlan, PlanSpec
from winnow.schemas.labels import LAST_TURN, MAX_ROLES, MAX_TURNS, ROLES, SPECIAL
from winnow.schemas.subject import SubjectIdentity
from winnow.subject.tokenizer import TextTokenizer

BATCH_CHARS = 2**19
"""Characters tokenised together: few enough to keep memory flat (the tokenizer takes about 30 bytes for each
while it works), with enough documents to share among cores."""
_BATCH_DOCUMENTS = 4096
_TOGETHER = 3
"""Batches tokenised at the same time."""
_AHEAD = 3
"""Most batches waiting for the reader of a stage."""

T = TypeVar("T")


def read_ahead(items: Iterable[T], depth: int = _AHEAD) -> Generator[T, None, None]:
    """Yield `items`, which are computed in a thread of their own, at most `depth` of them ahead.

    An error in `items` is raised here; closing the generator early ends the thread.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    left = threading.Event()

    # With a timeout, so that the thread notices a reader that has left and does not block on a full queue for
    # ever.
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
            # In this thread: a generator cannot be closed by another one while it runs.
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


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield batches of consecutive documents, of about `BATCH_CHARS` characters each."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# Instruction-tuned models name one of these as EOS, but in pretraining another token ended their documents.
TURN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|end_of_turn|>",
        "<end_of_turn>",
        "<turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|role_end|>",
    }
)
"""Tokens that end a turn of a chat, not a document."""
_DOCUMENT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<EOS_TOKEN>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "</s>",
)
"""Tokens that end a document, the least ambiguous first."""


def tokenised(
    documents: Iterable[Document], tokenizer: DocumentTokenizer
) -> Generator[list[Tokens], None, None]:
    """Yield the tokens of each batch of `documents`, in order; a few batches ahead are read and tokenised.

    An error in `documents` is raised after the batches before it. Closing the generator ends the threads.
    """
    pool = ThreadPoolExecutor(_TOGETHER, "winnow-tokenise")
    begun = (pool.submit(tokenizer.split, batch) for batch in batches(documents))
    try:
        # The queue of futures bounds what is read ahead, and keeps the order.
        with closing(read_ahead(begun)) as futures:
            for future in futures:
                yield tokenizer.mark(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


class SplitBatch(NamedTuple):
    """Documents that have been split into tokens; those with roles lack their marks."""

    documents: list[Document]
    texts: list[Tokens]
    """Of each text among them."""
    chats: list[Placed]
    """Of each conversation among them."""


class DocumentTokenizer:
    """A subject's tokenizer, set for whole documents: nothing is truncated or padded, one token follows each.

    Args:
        tokenizer: A fast tokenizer of transformers, or one of `tokenizers` itself.
        identity: The subject's identity; its vocabulary bounds the ids.
        spec: How documents are joined, windows begin, and control tokens' spellings are read.
        plan: A stored plan, whose special tokens are used again.
        templates: The chat template of each source of conversations.
        turns: Whether other sources have turns.

    Attributes:
        spec: The spec with every `auto` resolved.
        join: The token after each document.
        bos: The token that windows start with, or None.
        bos_twice: Whether windows start with it also where a document does (`Packer`): in plans made before.
        added_bos: The token that the tokenizer itself puts before a text, or None.
        added: Number of tokens that its post-processor puts there.

    Raises:
        ConfigError: A slow tokenizer, or one without the token asked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        identity: SubjectIdentity,
        spec: PlanSpec,
        plan: HarvestPlan | None = None,
        templates: Mapping[int, ChatTemplate] | None = None,
        turns: bool = False,
    ) -> None:
        self._identity = identity
        self.templates = dict(templates or {})
        self.turns = bool(templates) or turns
        # A stored plan decides what `auto` means: the rule may have changed since, and its tokens must not.
        if plan is not None:
            spec = spec.settled(plan.spec.model_dump(include=set(BEFORE)))
        spec = spec.settled({"control_tokens": "text"})
        self._text = TextTokenizer(
            tokenizer, control="token" if spec.control_tokens == "token" else "text", model=identity.model
        )
        self.added_bos, self.added = self._text.bos, len(self._text.before)
        spec = spec.settled({"bos": "none" if self.added_bos is None else "window"})
        self.spec: PlanSpec = spec.settled({"join": self._trained_with()})
        self.bos: int | None = None
        if spec.bos == "window":
            self.bos = plan.bos_token if plan else self._found("plan.bos", "bos")
        self.bos_twice = plan is not None and (plan.labels is None or plan.labels.own_bos is None)
        join = plan.join_token if plan else None
        self.join: int = self._found("plan.join", self.spec.join) if join is None else join
        self.roles = list[str](ROLES)
        """Names of the roles that have occurred, the usual ones first."""
        self._chat = None
        if self.templates:
            control = TextTokenizer(tokenizer, control="token", model=identity.model)
            self._chat = ConversationTokens(control, self._text, as_text=spec.control_tokens == "text")
        self._special = np.zeros(max(identity.vocabulary, 1), np.uint8)
        """SPECIAL for each id of a special token."""
        numbers = (self._text.number(token) for token in self._text.special)
        self._special[[n for n in numbers if n is not None and n < len(self._special)]] = SPECIAL
        self.dtype: np.dtype[np.generic] = np.dtype(np.uint16 if identity.vocabulary <= 2**16 else np.uint32)
        """The smallest dtype that holds every id, for the spill file."""

    def _trained_with(self) -> str:
        """The value of `plan.join: auto`; `PlanSpec.join` has the rule."""
        eos = self._identity.eos_token_id
        if eos is not None and self._text.token(eos) not in TURN_ENDS:
            return "eos"
        # Special tokens only: a vocabulary may hold `</s>` as ordinary text.
        special = self._text.special
        return next((token for token in _DOCUMENT_ENDS if token in special), "eos")

    def _found(self, field: str, token: str) -> int:
        """The id of `eos`, of `bos` or of a token's text; ConfigError if there is none."""
        if token == "eos":
            number = self._identity.eos_token_id
        elif token == "bos":
            # The one that the tokenizer adds, if any: `bos_token_id` of Qwen begins a chat's turn.
            number = self._identity.bos_token_id if self.added_bos is None else self.added_bos
        else:
            number = self._text.number(token)
        if number is None:
            named = {"eos": "an EOS token", "bos": "a BOS token"}.get(token, f"a token {token!r}")
            raise ConfigError(
                f"{field}: the tokenizer of subject {self._identity.model!r}",
                expected=named,
                got="none",
                fix="Set plan.bos to none"
                if field == "plan.bos"
                else "Set plan.join to the text of the token that ends a document, or set eos_token in the "
                "model's tokenizer_config.json",
            )
        return number

    @property
    def rules(self) -> IdRules:
        """What the ids of sources of tokens must be."""
        return IdRules(self._identity.vocabulary, self.join)

    def split(self, documents: list[Document]) -> SplitBatch:
        """Split documents into tokens, on all cores; threads may call it, for batches in any order.

        Raises:
            IntegrityError: An id beyond the subject's embedding.
        """
        texts = [document for document in documents if isinstance(document, str)]
        chats = [document for document in documents if isinstance(document, Rendered)]
        return SplitBatch(documents, self._plain(texts), self._placed(chats))

    def mark(self, batch: SplitBatch) -> list[Tokens]:
        """The tokens of documents, each followed by the joining token, unless a conversation ends with it.

        Batches must come in the corpus's order, which is that of new roles.

        Raises:
            ConfigError: More roles than a label can hold.
        """
        texts, chats = iter(batch.texts), iter(batch.chats)
        made: list[Tokens] = []
        for document in batch.documents:
            if isinstance(document, str):
                made.append(next(texts))
            elif isinstance(document, Rendered):
                made.append(self._in_roles(document, *next(chats)))
            else:
                made.append(self._given_document(document))
        return made

    def __call__(self, documents: list[Document]) -> list[Tokens]:
        """Tokenise documents: `split`, then `mark`."""
        return self.mark(self.split(documents))

    def _given_document(self, document: GivenIds) -> Tokens:
        ids, roles, turns = document.ids, np.zeros(len(document), np.int64), np.zeros(len(document), np.int64)
        flags = self._special[ids].astype(np.int64)
        if document.roles is not None:
            roles = np.array([self._role(name) for name in document.roles], np.int64)
            # A turn is a run of tokens of one role.
            turns = np.minimum(np.concatenate([[0], np.cumsum(np.diff(roles) != 0)]), MAX_TURNS - 1)
            flags |= np.where(turns == turns[-1], LAST_TURN, 0)
        return self._joined(ids, roles, turns, flags)

    def _plain(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        # As one array, of which each document is a piece: NumPy's price per call counts for short documents.
        # Through `array`, which takes a list in 10 ns a token where NumPy takes 20.
        gathered, stops = array("I"), list[int]()
        for ids in self._text.encode_batch(texts):
            ids.append(self.join)
            gathered += array("I", ids)
            stops.append(len(gathered))
        tokens = np.frombuffer(gathered, np.uint32)
        self.check([tokens])
        # The joining token is special wherever it is; the others are text, or spelt in it as control tokens.
        flags, ends = self._special[tokens], np.array(stops)
        flags[ends - 1] = SPECIAL
        flags[ends[:-1]] |= FIRST_MARK
        made = document_tokens(tokens, self.dtype, flags=flags, turns=0 if self.turns else None)
        return [made[start:stop] for start, stop in pairwise([0, *stops])]

    def _placed(self, chats: list[Rendered]) -> list[Placed]:
        if not chats:
            return []
        assert self._chat is not None, "a conversation without a template"
        made = list(self._chat.encode(chats))
        self.check([ids for ids, _, _ in made])
        return made

    def _in_roles(
        self, chat: Rendered, ids: NDArray[np.uint32], turns: NDArray[np.int64], own: NDArray[np.bool_]
    ) -> Tokens:
        roles = np.array([self._role(name) for name in chat.roles], np.int64)[turns]
        flags = np.where(own, self._special[ids], SPECIAL).astype(np.int64)
        flags |= np.where(turns == len(chat.roles) - 1, LAST_TURN, 0)
        return self._joined(ids, roles, turns, flags)

    def _joined(
        self,
        ids: NDArray[np.uint32],
        roles: NDArray[np.int64],
        turns: NDArray[np.int64],
        flags: NDArray[np.int64],
    ) -> Tokens:
        """The document with the joining token after it, unless it ends with that."""
        if not len(ids) or ids[-1] != self.join:
            ids = np.append(ids, np.uint32(self.join))
            roles, turns, flags = np.append(roles, 0), np.append(turns, 0), np.append(flags, SPECIAL)
        return document_tokens(ids, self.dtype, flags=flags, roles=roles, turns=turns if self.turns else None)

    def _role(self, name: str) -> int:
        if name not in self.roles:
            if len(self.roles) == MAX_ROLES:
                raise ConfigError(
                    "the corpus has too many roles",
                    expected=f"at most {MAX_ROLES - 1}",
                    got=f"{', '.join(self.roles[1:])} and {name}",
                    fix="Rename roles in the data",
                )
            self.roles.append(name)
        return self.roles.index(name)

    def check(self, made: list[NDArray[np.uint32]]) -> None:
        """Raise IntegrityError if an id is beyond the subject's embedding."""
        # Here, before anything is stored: the LM would fail on such an id hours later.
        largest = max(int(tokens.max()) for tokens in made)
        if largest >= self._identity.vocabulary:
            raise IntegrityError(
                f"the tokenizer of {self._identity.model!r} does not fit its model",
                expected=f"token ids below {self._identity.vocabulary}, the embedding's rows",
                got=largest,
                fix="Use the tokenizer the model was trained with",
            )
