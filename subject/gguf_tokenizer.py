"""Rebuilds the tokenizer that a GGUF file was made from.

For byte-level BPE a GGUF holds the vocabulary and the merges, but only the name of the rule that splits text
before merging (`tokenizer.ggml.pre`), whose meaning is in llama.cpp's code. The rules here are those of the
models' own published `tokenizer.json` files; a name without one is refused, since another rule silently gives
other tokens. SentencePiece vocabularies are rebuilt by transformers, except for the space before a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Split
from tokenizers.processors import TemplateProcessing

from winnow.schemas.errors import ConfigError
from winnow.subject.tokenizer import TextTokenizer

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF: special tokens, and added ones that are ordinary text (runs of spaces, `<think>`)."""

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# These split words where a small letter is followed by a capital.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    # Letters that have cases, in the version of Unicode that this was published with: newer ones have more.
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")


class Rule(NamedTuple):
    """The meaning of a name in `tokenizer.ggml.pre`."""

    cuts: tuple[PreTokenizer, ...]
    """Splits of the text before merging, applied in order; the last turns it into bytes."""
    nfc: bool = False
    """Whether text is normalised to NFC first."""
    whole_words: bool = False
    """Whether a piece that is in the vocabulary is taken whole, whatever the merges say."""
    bos: bool = False
    """Whether BOS is put first if the file does not say."""


def _cut(*patterns: str) -> tuple[PreTokenizer, ...]:
    return tuple(Split(Regex(pattern), "isolated") for pattern in patterns)


# ByteLevel has GPT-2's pattern built in: rules with a pattern of their own use it for the bytes only.
_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = Digits(individual_digits=True)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("gpt-2", "phi-2"), Rule((_GPT2,))),
    **dict.fromkeys(("olmo", "mpt"), Rule((_GPT2,), nfc=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), Rule((_DIGITS, _GPT2))),
    "command-r": Rule((_DIGITS, _GPT2), nfc=True),
    "falcon": Rule(
        (Punctuation("contiguous"), _GPT2, Digits(individual_digits=False), *_cut("[0-9][0-9][0-9]"))
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "lfm2"),
        Rule((*_cut(_LLAMA3), _BYTES), whole_words=True, bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Rule((*_cut(_LLAMA3), _BYTES))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Rule((*_cut(_QWEN2), _BYTES), nfc=True)),
    "qwen35": Rule((*_cut(_QWEN35), _BYTES), nfc=True),
    "tekken": Rule((*_cut(_TEKKEN), _BYTES), whole_words=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Rule((*_cut(_GPT4O), _BYTES), whole_words=True)),
    "deepseek-v3": Rule((*_cut(*_DEEPSEEK_V3), _BYTES)),
    "deepseek-llm": Rule((*_cut(*_DEEPSEEK_LLM), _DIGITS, _BYTES)),
    "deepseek-coder": Rule((*_cut(*_DEEPSEEK_CODER), _DIGITS, _BYTES)),
}
# `falcon3` and `falcon-h1` are not here: llama.cpp reads both by Llama 3's rule, which could not be compared
# with their original tokenizers.
"""Name -> rule. Which models each name stands for is in llama.cpp's src/llama-vocab.cpp."""


def gguf_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Raises:
        ConfigError: The file names a rule that is not in `RULES`, or none; or a token occurs twice.
        ValueError: Its vocabulary is of a kind that transformers cannot rebuild.
    """
    fields = gguf.GGUFReader(path).fields

    def read(name: str, default: Any = None) -> Any:
        field = fields.get(name)
        return default if field is None else field.contents()

    if read("tokenizer.ggml.model") == "gpt2":
        return _byte_level(path, read)
    # Gemma's GGUFs are left as transformers rebuilds them: its tokenizer puts no space before a text.
    made = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if read("tokenizer.ggml.model") == "llama" and not read("general.architecture").startswith("gemma"):
        _space_before(made.backend_tokenizer, read("tokenizer.ggml.add_space_prefix", True))
        if read("general.architecture") == "phi3":
            made._tokenizer = _with_stripping(made.backend_tokenizer)
    # transformers passes over this field of Gemma 4, whose chat template writes BOS: other texts need it too.
    if read("tokenizer.ggml.add_bos_token", False) and TextTokenizer(made).bos is None:
        made.add_bos_token = True
    return made


def _byte_level(path: Path, read: Callable[..., Any]) -> transformers.PreTrainedTokenizerFast:
    rule = _rule(path, read("tokenizer.ggml.pre"))
    tokens: list[str] = read("tokenizer.ggml.tokens")
    types, merges = read("tokenizer.ggml.token_type", ()), read("tokenizer.ggml.merges", ())
    backend = _backend(rule, tokens, types, merges)
    # A vocabulary is a mapping: of two equal tokens one would lose its id, and all later ids would still fit.
    if backend.get_vocab_size() != len(tokens):
        raise ConfigError(
            f"the tokenizer of {path.name}",
            expected=f"{len(tokens)} different tokens",
            got="one occurs twice",
        )
    ids = {role: read(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    roles = {role: tokens[at] for role, at in ids.items() if at is not None}
    first = roles.get("bos_token") if read("tokenizer.ggml.add_bos_token", rule.bos) else None
    last = roles.get("eos_token") if read("tokenizer.ggml.add_eos_token", False) else None
    around = {token: backend.token_to_id(token) for token in (first, last) if token}
    # As the tokenizer itself would, so that `TextTokenizer.bos` finds what the model was trained with.
    backend.post_processor = TemplateProcessing(
        [token for token in (first, "$A", last) if token], None, list(around.items())
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    made.chat_template = read("tokenizer.chat_template")
    return made


def _space_before(backend: Tokenizer, prefix: bool) -> None:
    """Put a space before every text, as SentencePiece does, also if the text begins with one."""
    # The decoder removes it again, once, so that a text that began with a space keeps its own.
    before = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]  (its stub forgets None)
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )


def _with_stripping(backend: Tokenizer) -> Tokenizer:
    """The same, whose tokens of Phi-3's chats take the white space after them: a GGUF does not say it."""
    facts = json.loads(backend.to_str())
    for token in facts["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    return Tokenizer.from_str(json.dumps(facts))


_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _rule(path: Path, name: str | None) -> Rule:
    if name not in RULES:
        raise ConfigError(
            f"the tokenizer of {path.name}: how it cuts text before merging (tokenizer.ggml.pre)",
            expected=f"one of {', '.join(sorted(RULES))}",
            got=repr(name) if name else "nothing",
            fix="Give the model's folder with its own tokenizer.json instead of the GGUF file",
        )
    return RULES[name]


def _backend(rule: Rule, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rule.whole_words))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = rule.cuts[0] if len(rule.cuts) == 1 else pre_tokenizers.Sequence(list(rule.cuts))
    backend.decoder = decoders.ByteLevel()
    # Not normalised: their spelling must be matched in the raw text, before any split.
    for kind in (_CONTROL, _USER_DEFINED):
        added = [token for token, its in zip(tokens, types, strict=False) if its == kind]
        backend.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in added])
    return backend
