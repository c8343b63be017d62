"""Runs a model position by position, with its own cache if that gives the logits of whole passes.

Letters: T positions, V vocabulary.

A model's cache of earlier positions (keys and values, the state of a recurrence) has several names in
transformers, some models have none, and some give other logits with a cache than without. So the ways of
using it are tried once per model, on a few random tokens, and the first that gives the logits of whole passes
is taken; if none does, every pass is a whole one.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from winnow.subject.precise import in_float32

log = logging.getLogger("winnow.subject")

Kept = dict[str, Any]
"""The cache that a model returned, by the name of the argument that takes it back."""


class _Way(NamedTuple):
    """How a model's cache is used."""

    plain: bool
    """Whether it is given a cache that holds every position; otherwise it makes one of its own."""
    positions: bool
    """Whether it is told its tokens' positions: some models count them from 0 in every pass."""


# A model's own cache drops what leaves a window, which Moshi's whole pass still sees: it comes second.
_WAYS = (_Way(True, True), _Way(False, True), _Way(True, False), _Way(False, False))
_CHOSEN = ("index_topk", "indexer_budget", "keep_window_size")
"""Fields of a config with the number of earlier positions, the best ones, that each attends to."""

# Not Reformer's past_buckets_states: past a chunk its logits are others than a whole pass gives.
_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")
# SmolLM2-135M in bfloat16 has up to 0.036 with a cache that is right.
_NOISE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}
"""Largest float noise: root mean square of a difference over the logits' spread."""

# Short, since the trial delays the first token.
_PROMPT, _TOKENS = 8, 12
"""Tokens of the trial's first pass, and of all its passes."""


def same_logits(found: Tensor, expected: Tensor) -> bool:
    """Whether [..., V] are equal up to float noise, relative to the logits' own spread over V."""
    # Infinite logits, of tokens that a model never gives, must be the same ones and take no part in the rest.
    finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(found.isfinite(), finite):
        return False
    a, b = (torch.where(finite, logits, 0).float() for logits in (found, expected))
    off, spread = (a - b).square().mean(-1).sqrt(), b.std(-1, correction=0)
    return bool((off <= _NOISE.get(expected.dtype, 1e-3) * spread).all())


def trial_ids(model: transformers.PreTrainedModel, windows: int, length: int) -> Tensor:
    """Random tokens int64 [windows, T] on the model's device; T is at most `length` and the context."""
    text: Any = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    # Of its own, so that a trial does not disturb torch's global random numbers.
    draw = torch.Generator().manual_seed(0)
    return torch.randint(embedding.num_embeddings, (windows, length), generator=draw).to(model.device)


def cache_argument(model: transformers.PreTrainedModel) -> str:
    """The argument of a pass that takes a cache: `past_key_values`, and `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def turning_points(config: Any) -> frozenset[int]:
    """Lengths past which a whole pass rotates every position differently, earlier ones included."""
    # With LongRoPE, all positions of a pass are rotated by the long factors as soon as one of them is beyond
    # the original context; keys in a cache were rotated by the short ones.
    found: set[int] = set()
    for name in ("rope_parameters", "rope_scaling"):
        common: Any = getattr(config, name, None) or {}
        for part in (common, *(part for part in common.values() if isinstance(part, dict))):
            if part.get("rope_type", part.get("type")) == "longrope":
                point = part.get("original_max_position_embeddings")
                found.add(point or config.original_max_position_embeddings)
    return frozenset(found)


def _choice_begins(config: Any) -> float:
    """The length past which attention chooses among positions; between equal weights, float noise decides."""
    counts = [getattr(config, name, None) for name in _CHOSEN]
    blocks, block = (getattr(config, name, None) for name in ("index_topk_blocks", "index_block_size"))
    counts.append(blocks * block if blocks and block else None)
    return min((count for count in counts if count), default=math.inf)


class Steps:
    """Runs a whole causal LM token by token; several runs may be interleaved.

    Args:
        model: The model.
        blocks: Path of the list of its blocks.
    """

    def __init__(self, model: transformers.PreTrainedModel, blocks: str) -> None:
        config = model.config.get_text_config()
        self._model: Any = model
        self._parameters = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model)
        self._turns = turning_points(config)
        self._limit = _choice_begins(config)
        self._way = self._proved(blocks)

    def run(self, ids: Tensor, end: int, kept: Kept | None) -> tuple[Tensor, Kept | None]:
        """Run one pass.

        Args:
            ids: int64 [1, T], the last T of `end` tokens: all of them if nothing is kept, else one.
            end: Number of tokens so far.
            kept: The cache that the last pass returned.

        Returns:
            Logits [V] of the last position, and the cache for the next token; None if that one needs a
            pass over all tokens.
        """
        if self._way is None:
            return self._whole(ids), None
        return self._cached(self._way, ids, end, kept)

    def _whole(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids, use_cache=False).logits[0, -1]

    def _cached(self, way: _Way, ids: Tensor, end: int, kept: Kept | None) -> tuple[Tensor, Kept | None]:
        if kept is None:
            kept = {self._cache_argument: DynamicCache()} if way.plain else {}
        if way.positions:
            kept = {**kept, "position_ids": torch.arange(end - ids.shape[1], end, device=ids.device)[None]}
        output = self._model(input_ids=ids, use_cache=True, **kept)
        name = next(name for name in _CACHES if getattr(output, name, None) is not None)
        # transformers 5.24 returns every cache as `cache`, also of code that takes it by an older name.
        taken = next((other for other in (name, *_CACHES) if other in self._parameters), name)
        # Where cached and whole passes part, the cache is given up: once at LongRoPE's turn, for good where
        # attention begins to choose.
        ends = end in self._turns or end >= self._limit
        return output.logits[0, -1], None if ends else {taken: output[name]}

    def _proved(self, blocks: str) -> _Way | None:
        """The first way of using a cache that gives the logits of whole passes; None if there is none."""
        ids = trial_ids(self._model, 1, _TOKENS)
        ends = range(min(_PROMPT, ids.shape[1]), ids.shape[1] + 1)
        told = "position_ids" in self._parameters
        with torch.no_grad(), in_float32(self._model, blocks):
            whole = torch.stack([self._whole(ids[:, :end]) for end in ends])
            for way in (way for way in _WAYS if told or not way.positions):
                try:
                    if same_logits(torch.stack(list(self._along(way, ids, ends))), whole):
                        return way
                # Models raise all kinds of errors for a cache or an argument that they do not know.
                except Exception as error:
                    log.debug("%s with a cache, %s: %r", type(self._model).__name__, way, error)
        log.warning(
            "%s has no cache that gives the logits of a whole pass: every token takes a whole pass",
            type(self._model).__name__,
        )
        return None

    def _along(self, way: _Way, ids: Tensor, ends: range) -> Iterator[Tensor]:
        kept: Kept | None = None
        for end in ends:
            new = ids[:, :end] if kept is None else ids[:, end - 1 : end]
            logits, kept = self._cached(way, new, end, kept)
            yield logits
