"""Text to tokens: text is text, nothing is added to it, and batches stay in order."""

import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import Unigram, WordLevel, WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing

from tests.support.tiny import make_tokenizer
from winnow.harvester.plan import tokenise
from winnow.harvester.plan.corpus import Document
from winnow.harvester.plan.ids import GivenIds
from winnow.harvester.plan.tokenise import DocumentTokenizer, tokenised
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.harvest import PlanSpec
from winnow.subject.testing import BOS, EOS, byte_tokenizer, tokenizer_subject
from winnow.subject.tokenizer import TextTokenizer, copy_of

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


def made_otherwise() -> Iterator[Tokenizer]:
    """Tokenizers of every kind of model, with tokens added to each."""
    models = [
        WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"),
        Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0),
        WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"),
    ]
    for model in models:
        made = Tokenizer(model)
        made.normalizer, made.decoder = Lowercase(), Fuse()
        made.pre_tokenizer = Metaspace()
        made.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 3)])
        made.add_tokens([AddedToken("a", special=True), AddedToken("<think>", special=False, lstrip=True)])
        made.add_special_tokens([AddedToken("<s>", special=True, normalized=True)])
        yield made
    yield byte_tokenizer()
    yield make_tokenizer().backend_tokenizer


@pytest.mark.parametrize("at", range(5))
def test_a_copy_is_the_same_tokenizer_and_changes_nothing(at: int) -> None:
    tokenizer = list(made_otherwise())[at]
    before = tokenizer.to_str()
    made = copy_of(tokenizer)
    assert made.to_str() == before
    text = "ab <think> a <s> <eos>"
    assert made.encode(text).ids == tokenizer.encode(text).ids
    made.encode_special_tokens = True
    made.enable_truncation(1)
    made.add_tokens(["of its own"])
    assert tokenizer.to_str() == before
    assert not tokenizer.encode_special_tokens


def test_a_copy_keeps_numbers_that_follow_from_nothing():
    raw = json.loads(byte_tokenizer().to_str())
    raw["model"]["vocab"]["beyond"] = 300
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 300, "content": "beyond"})
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    assert copy_of(tokenizer).encode("beyond").ids == tokenizer.encode("beyond").ids == [300]


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"'m' has no fast tokenizer"):
        TextTokenizer(object(), model="m")


def of_documents(
    tokenizer: Tokenizer | None = None, *, turns: bool = False, **facts: int
) -> DocumentTokenizer:
    subject = tokenizer_subject(tokenizer or byte_tokenizer(), EOS, BOS, **facts)
    spec = PlanSpec(hooks=("resid_post.0",), context_length=16, windows_per_unit=64)
    return DocumentTokenizer(subject.tokenizer, subject.identity, spec, turns=turns)


def mixed(count: int) -> list[Document]:
    """Texts of all lengths, and ids whose roles are new ones every now and then."""
    ids = np.arange(3, 9, dtype=np.uint32)
    return [
        GivenIds(ids, (f"role{at // 6}",) * 6) if at % 3 == 0 else f"<eos> {at} " * (at % 7)
        for at in range(count)
    ]


@pytest.mark.parametrize("size", [1, 20, 300])
def test_batches_come_in_the_order_of_their_documents(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    documents = mixed(90)
    whole = of_documents(turns=True)
    expected = whole(documents)
    monkeypatch.setattr(tokenise, "BATCH_CHARS", size)
    each = of_documents(turns=True)
    made = [tokens for batch in tokenised(documents, each) for tokens in batch]
    assert each.roles == whole.roles
    assert len(each.roles) > 15
    assert [tokens.tobytes() for tokens in made] == [tokens.tobytes() for tokens in expected]


def test_texts_split_together_are_as_each_alone():
    tokenizer, texts = of_documents(), ["", "a <eos> b", "é", "", "x" * 50]
    made = tokenizer(list(texts))
    assert [tokens.tobytes() for tokens in made] == [tokenizer([text])[0].tobytes() for text in texts]
    assert made[1]["token"].tolist() == [*TextTokenizer(byte_tokenizer()).encode("a <eos> b"), EOS]


def test_of_two_errors_the_first_document_s_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def documents() -> Iterator[Document]:
        yield "ab"
        yield "<beyond>"
        raise ConfigError("the next document")

    monkeypatch.setattr(tokenise, "BATCH_CHARS", 1)
    tokenizer = byte_tokenizer()
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken("<beyond>", special=False)])
    small = of_documents(tokenizer, vocabulary=rows)
    for _ in range(20):
        stream = tokenised(documents(), small)
        assert next(stream)[0]["token"].tolist()[-1] == EOS
        with pytest.raises(IntegrityError, match="does not fit"):
            next(stream)
    assert not [thread for thread in threading.enumerate() if "winnow" in thread.name]


def test_reading_is_a_few_batches_ahead_and_ends_when_left(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(tokenise, "BATCH_CHARS", 1)
    stream = tokenised((read.append(at) or "text" for at in range(1000)), of_documents())
    next(stream)
    stream.close()
    assert len(read) < 10
    assert not [thread for thread in threading.enumerate() if "winnow" in thread.name]
