"""For tests and benchmarks: a subject without a model, whose tokenizer gives one token per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from winnow.schemas.base import sha256_hex
from winnow.schemas.subject import HookSite, SubjectIdentity

EOS, BOS = 256, 257
"""Ids of the byte tokenizer's two special tokens."""


@dataclass
class TokenizerSubject:
    """What the planner needs of a subject (`planner.PlanSubject`), and nothing else."""

    identity: SubjectIdentity
    tokenizer: Any
    d_model: int = 16

    def sites(self, hooks: Sequence[str], /) -> tuple[HookSite, ...]:
        """Accept any hook."""
        return tuple(HookSite(name=hook, d_model=self.d_model) for hook in hooks)


def byte_tokenizer() -> Tokenizer:
    """A lossless tokenizer: a token for each byte of UTF-8, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({mark: index for index, mark in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    return tokenizer


def tokenizer_subject(
    tokenizer: Tokenizer, eos: int | None, bos: int | None, **facts: Any
) -> TokenizerSubject:
    """A subject with any tokenizer; `facts` override fields of its identity."""
    identity = SubjectIdentity(
        model="testing/tokenizer-only",
        architecture="none",
        weights_sha256=sha256_hex(b""),
        tokenizer_sha256=sha256_hex(tokenizer.to_str().encode()),
        dtype="float32",
        attention="sdpa",
        layers=1,
        vocabulary=tokenizer.get_vocab_size(),
        eos_token_id=eos,
        bos_token_id=bos,
    )
    return TokenizerSubject(identity.model_copy(update=facts), tokenizer)


def byte_subject(**facts: Any) -> TokenizerSubject:
    """A subject with the byte tokenizer."""
    return tokenizer_subject(byte_tokenizer(), EOS, BOS, **facts)
