"""Text to tokens: text is text, and nothing is added to it."""

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from tests.support.tiny import make_tokenizer
from winnow.schemas.errors import ConfigError
from winnow.subject.testing import BOS, EOS, byte_tokenizer
from winnow.subject.tokenizer import TextTokenizer

SPELT = "a <eos> b"


def test_a_special_tokens_spelling_is_text_unless_asked_for():
    tokenizer = byte_tokenizer()
    text = TextTokenizer(tokenizer)
    assert len(text.encode(SPELT)) == len(SPELT)
    assert tokenizer.decode(text.encode(SPELT)) == SPELT
    assert [len(ids) for ids in text.encode_batch([SPELT, "<bos>", "é"])] == [9, 5, 2]
    token = TextTokenizer(tokenizer, control="token")
    assert token.encode(SPELT)[2] == EOS
    assert len(token.encode(SPELT)) == 5
    assert tokenizer.encode(SPELT).ids == token.encode(SPELT), "the tokenizer given stays as it was"


def test_added_tokens_that_are_not_special_stay_whole():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    assert TextTokenizer(tokenizer).encode("<think>") == [tokenizer.token_to_id("<think>")]


def test_nothing_is_added_cut_or_padded():
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=32, direction="left")
    tokenizer.post_processor = TemplateProcessing("<bos> $A <eos>", None, [("<bos>", BOS), ("<eos>", EOS)])
    text = TextTokenizer(tokenizer)
    assert len(text.encode("ten letters")) == 11
    assert text.bos == BOS


def test_the_bos_is_the_one_that_the_post_processor_adds():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    assert tokenizer.bos_token_id is not None
    assert TextTokenizer(tokenizer).bos is None
    after = byte_tokenizer()
    after.post_processor = TemplateProcessing("$A <eos>", None, [("<eos>", EOS)])
    assert TextTokenizer(after).bos is None


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"'m' has no fast tokenizer"):
        TextTokenizer(object(), model="m")
