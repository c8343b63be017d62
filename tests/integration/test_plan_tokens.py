"""The tokens of a plan that are no text: what joins documents, begins windows, or is spelt in a document."""

import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from tests.integration.test_planner import T, make_config, planned, write_corpus
from winnow.harvester.plan.planner import OTHER_TOKENIZER, find_plan, make_plan, read_corpus
from winnow.schemas.errors import ConfigError, PlanMismatch
from winnow.schemas.harvest import HarvestPlan
from winnow.store.check.info import dataset_info
from winnow.store.format.layout import PLAN_KEY, tokens_key
from winnow.store.read.reader import load_plan, load_token_digests, read_tokens
from winnow.subject.testing import BOS, EOS, TokenizerSubject, byte_subject, byte_tokenizer, tokenizer_subject

TURN, DOCUMENT = 258, 259


def chat_subject(*added: str) -> TokenizerSubject:
    """The byte tokenizer whose EOS ends a turn; more special tokens from number 259 on."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_end|>", *added])
    return tokenizer_subject(tokenizer, TURN, None)


def adding(first: int, name: str) -> TokenizerSubject:
    """A subject whose tokenizer puts a token before every text."""
    subject = byte_subject()
    subject.tokenizer.post_processor = TemplateProcessing(f"{name} $A", None, [(name, first)])
    return subject


@pytest.mark.parametrize(
    ("subject", "asked", "said", "token"),
    [
        (byte_subject(), "auto", "eos", EOS),
        (chat_subject("<|endoftext|>"), "auto", "<|endoftext|>", DOCUMENT),
        (chat_subject("</s>", "<|end_of_text|>"), "auto", "<|end_of_text|>", DOCUMENT + 1),
        (chat_subject("<other>"), "auto", "<eos>", EOS),
        (chat_subject("<|endoftext|>"), "eos", "eos", TURN),
        (chat_subject("<|endoftext|>"), "<|endoftext|>", "<|endoftext|>", DOCUMENT),
        (byte_subject(), "bos", "bos", BOS),
        (byte_subject(eos_token_id=None), "auto", "<eos>", EOS),
    ],
)
def test_documents_are_joined_as_the_model_was_trained_or_as_asked(tmp_path, subject, asked, said, token):
    texts = write_corpus(tmp_path)
    plan, store, tokens = planned(make_config(tmp_path, plan={"join": asked}), subject=subject)
    assert (plan.spec.join, plan.join_token) == (said, token)
    assert plan.corpus_facts.tokens == sum(len(text.encode()) + 1 for text in texts)
    special = tokens[tokens >= 256]
    assert len(special)
    assert set(special.tolist()) == {token}
    info = dataset_info(store)
    assert (info.join, info.join_token, info.bos_token) == (said, token, None)


@pytest.mark.parametrize(
    ("join", "subject", "said"),
    [
        ("<none>", byte_subject(), r"plan\.join.*a token '<none>', got none"),
        ("bos", byte_subject(bos_token_id=None), r"plan\.join.*a BOS token, got none"),
    ],
)
def test_a_token_that_is_not_there_is_refused(tmp_path, join, subject, said):
    write_corpus(tmp_path)
    with pytest.raises(ConfigError, match=said):
        planned(make_config(tmp_path, plan={"join": join}), subject=subject)


def test_windows_begin_with_the_bos_that_the_tokenizer_adds(tmp_path, caplog):
    write_corpus(tmp_path)
    subject = adding(BOS, "<bos>")
    subject.tokenizer.add_special_tokens(["<cls>"])
    subject = tokenizer_subject(subject.tokenizer, EOS, 258)  # the post-processor's is 257
    plan, store, tokens = planned(make_config(tmp_path), subject=subject)
    assert (plan.spec.bos, plan.bos_token) == ("window", BOS)
    assert (tokens[..., 0] == BOS).all()
    assert dataset_info(store).bos_token == BOS
    assert caplog.messages == []
    plain = make_config(tmp_path, plan={"bos": "none"}).model_copy(update={"root": str(tmp_path / "none")})
    plan, store, _ = planned(plain, subject=subject)
    assert (plan.spec.bos, plan.bos_token) == ("none", None)
    (line,) = caplog.messages
    assert "plan: bos is none, though the tokenizer of testing/tokenizer-only puts a BOS" in line


def test_windows_that_begin_with_the_first_of_several_tokens_are_warned_of(tmp_path, caplog):
    """GLM's tokenizer puts `[gMASK]<sop>` before a text."""
    write_corpus(tmp_path)
    subject = byte_subject()
    both = [("<bos>", BOS), ("<eos>", EOS)]
    subject.tokenizer.post_processor = TemplateProcessing("<bos> <eos> $A", None, both)
    plan, _, tokens = planned(make_config(tmp_path), subject=subject)
    assert (plan.spec.bos, plan.bos_token) == ("window", BOS)
    assert (tokens[..., 0] == BOS).all()
    (line,) = caplog.messages
    assert "puts 2 tokens before every text, and windows begin with the first of them alone" in line


def test_a_bos_that_the_tokenizer_does_not_add_is_left_out(tmp_path):
    write_corpus(tmp_path)
    plan, _, tokens = planned(make_config(tmp_path))
    assert (plan.spec.bos, plan.bos_token) == ("none", None)
    assert not (tokens == BOS).any()


@pytest.mark.parametrize(("asked", "said"), [("auto", "text"), ("text", "text"), ("token", "token")])
def test_a_documents_control_tokens_are_text_unless_asked_for(tmp_path, asked, said):
    texts = [f"<{n}> a <bos> b" for n in range(400)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    plan, store, tokens = planned(make_config(tmp_path, plan={"control_tokens": asked}))
    assert plan.spec.control_tokens == said == dataset_info(store).control_tokens
    assert (tokens == BOS).any() == (said == "token")
    short = 4 if said == "token" else 0
    assert plan.corpus_facts.tokens == sum(len(text) + 1 - short for text in texts)


def test_auto_takes_what_is_stored(tmp_path):
    write_corpus(tmp_path)
    subject = chat_subject("<|endoftext|>")
    stated = {"join": "eos", "control_tokens": "token"}
    plan, store, tokens = planned(make_config(tmp_path, plan=stated), subject=subject)
    fields = json.loads(store.get(PLAN_KEY))["spec"]
    assert "join" not in fields, "an older Winnow's plan"
    assert "control_tokens" not in fields
    assert load_plan(store).fingerprint == plan.fingerprint
    config = make_config(tmp_path)
    assert find_plan(config, store, subject=subject) == plan
    store.delete(tokens_key(0))
    assert make_plan(config, store, subject=subject) == plan
    assert np.array_equal(read_tokens(store, plan, 0, load_token_digests(store, plan)), tokens[0])
    for other, said in (({"join": "<|endoftext|>"}, "spec.join"), ({"bos": "window"}, "spec.bos")):
        with pytest.raises(PlanMismatch, match=said):
            find_plan(make_config(tmp_path, plan=other), store)


def test_another_tokenizers_plan_is_read_but_not_made_again(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, store, tokens = planned(config)
    other = byte_subject(tokenizer_sha256="0" * 64)
    assert find_plan(config, store) == plan, "a harvest goes on"
    digests = load_token_digests(store, plan)
    assert np.array_equal(read_tokens(store, plan, 1, digests), tokens[1])
    store.delete(tokens_key(0))
    with pytest.raises(
        PlanMismatch, match=r"subject\.tokenizer_sha256: stored.*can be streamed and trained on"
    ):
        make_plan(config, store, subject=other)
    monkeypatch.setattr("winnow.harvester.plan.planner._outline", lambda _: other)
    with pytest.raises(PlanMismatch, match=OTHER_TOKENIZER.split("(")[0]):
        read_corpus(config, str(tmp_path), plan)


def test_a_plan_without_the_fields_means_what_it_did(tmp_path):
    write_corpus(tmp_path)
    plan, _, _ = planned(make_config(tmp_path, plan={"join": "eos", "control_tokens": "token"}))
    fields = json.loads(plan.to_json())
    assert {"join_token_id", "bos_token_id"} & set(fields) == set()
    old = HarvestPlan.from_json(json.dumps(fields).encode(), origin="old")
    assert (old.spec.join, old.spec.control_tokens, old.spec.bos) == ("eos", "token", "none")
    assert old == plan
    assert old.spec.context_length == T
