"""Conversations to a plan: every token has the role and turn of its message, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from tests.integration.test_planner import make_config, planned, tree
from tests.support.chat_templates import CHATML, CONTROL, SHAPES, Message
from winnow.harvester.plan import packing
from winnow.harvester.plan.planner import find_plan
from winnow.harvester.run import ledger as ledgers
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import HarvestPlan
from winnow.schemas.labels import FIRST, LAST_TURN, SPECIAL
from winnow.store.check.info import dataset_info
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.labels import read_labels
from winnow.subject.testing import BOS, EOS, TokenizerSubject, byte_tokenizer, tokenizer_subject

BOS_TEXT = "<bos>"


def bos_subject(adds: bool) -> TokenizerSubject:
    """`chat_subject` with a BOS, which the post-processor puts before every text if it `adds` one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in CONTROL])
    if adds:
        made = TemplateProcessing(single=f"{BOS_TEXT} $A", special_tokens=[(BOS_TEXT, BOS)])
        tokenizer.post_processor = made
    return tokenizer_subject(tokenizer, EOS, BOS)


def chat_subject() -> TokenizerSubject:
    """The byte tokenizer with the control tokens of all templates."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in CONTROL])
    return tokenizer_subject(tokenizer, EOS, None)


def conversation(number: int) -> list[Message]:
    """Five turns, with contents that repeat each other and spell a control token."""
    first = [{"role": "system", "content": f"be {number}"}] if number % 2 else []
    contents = (f"hi {number}", "hi é\n", "hi <|im_end|>", f"yes {number % 7}", "hi")
    turns = [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]
    return [*first, *turns]


def config_of(
    folder: Path, *, template: str = CHATML, plan: dict[str, Any] | None = None, **source: Any
) -> Config:
    (folder / "template.jinja").write_text(template)
    fields = {
        "uri": str(folder / "chats.jsonl"),
        "format": "chat",
        "template": str(folder / "template.jinja"),
        **source,
    }
    return make_config(folder, corpus={"sources": [fields]}, plan=plan or {})


def write_chats(folder: Path, chats: list[list[Message]]) -> None:
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def labels_of(store: ObjectStore, plan: HarvestPlan) -> dict[str, np.ndarray]:
    units = [read_labels(store, plan, unit) for unit in range(plan.units)]
    return {name: np.stack([unit[name] for unit in units]) for name in units[0]}


@pytest.mark.parametrize("control", ["text", "token"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "qwen3"])
def test_every_token_has_the_role_of_its_message(tmp_path: Path, name: str, control: str) -> None:
    template, reckon = SHAPES[name]
    chats = [conversation(number) for number in range(120)]
    write_chats(tmp_path, chats)
    config = config_of(tmp_path, template=template, plan={"control_tokens": control})
    subject = chat_subject()
    plan, store, tokens = planned(config, subject=subject)
    assert plan.labels is not None
    found = labels_of(store, plan)
    number_of = {token: subject.tokenizer.token_to_id(token) for token in CONTROL}
    wanted: dict[tuple[int, int], tuple[int, str, int, int]] = {}
    for document, chat in enumerate(chats):
        made: list[tuple[int, str, int, int]] = []
        # A tokenizer without named special tokens has no bos_token: the template writes none.
        for text, message, own in [piece for piece in reckon(chat) if piece[0] != "<s>"]:
            last = LAST_TURN if message == len(chat) - 1 else 0
            role = chat[message]["role"]
            for part in split_at_control(text) if control == "token" or not own else [text]:
                if part in number_of and (control == "token" or not own):
                    made.append((number_of[part], role, message, SPECIAL | last))
                else:
                    flags = last | (0 if own else SPECIAL)
                    ids = (
                        byte_tokenizer().encode(part).ids if not own or control == "token" else as_bytes(part)
                    )
                    made += [(token, role, message, flags) for token in ids]
        made.append((EOS, "none", 0, SPECIAL))
        for offset, entry in enumerate(made):
            wanted[document, offset] = (*entry[:3], entry[3] | (FIRST if offset == 0 else 0))
    names = np.array(plan.labels.roles)
    got = zip(
        *(array.ravel().tolist() for array in (found["document"], found["offset"], tokens)),
        names[found["role"].ravel()].tolist(),
        found["turn"].ravel().tolist(),
        found["flags"].ravel().tolist(),
        strict=True,
    )
    for document, offset, *entry in got:
        assert tuple(entry) == wanted[document, offset], (document, offset)
    assert plan.corpus_facts.documents == len(chats)
    assert sum(plan.labels.tokens_by_turn) == plan.windows * plan.spec.context_length
    assert plan.corpus_facts.templates.keys() == {0}


def as_bytes(text: str) -> list[int]:
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text).ids


def split_at_control(text: str) -> list[str]:
    parts = [text]
    for token in CONTROL:
        parts = [
            piece
            for part in parts
            for piece in ([part] if part in CONTROL else part.replace(token, f"\0{token}\0").split("\0"))
            if piece
        ]
    return parts


def test_parquet_and_parts_of_content_and_json_give_the_same_plan(tmp_path: Path) -> None:
    chats = [conversation(number) for number in range(120)]
    write_chats(tmp_path, chats)
    config = config_of(tmp_path)
    plan, store, tokens = planned(config, subject=chat_subject())
    assert find_plan(config, store) == plan
    info = dataset_info(store)
    assert info.labels is not None
    assert info.labels.tokens_by_role[3] > 0
    kinds: dict[str, list[Any]] = {
        "records": chats,
        "text": [json.dumps(chat) for chat in chats],
        "parts": [
            [
                {"role": m["role"], "content": [{"type": "text", "text": m["content"]}], "name": None}
                for m in chat
            ]
            for chat in chats
        ],
    }
    for name, column in kinds.items():
        pq.write_table(
            pa.table({"messages": column, "tools": [None] * len(chats)}), tmp_path / f"{name}.parquet"
        )
        other = config_of(tmp_path, uri=str(tmp_path / f"{name}.parquet"))
        other = other.model_copy(update={"root": str(tmp_path / f"root-{name}")})
        same, _, found = planned(other, subject=chat_subject())
        assert np.array_equal(found, tokens), name
        assert same.labels == plan.labels
        assert same.corpus_facts.templates == plan.corpus_facts.templates


BAD: dict[str, tuple[Any, str]] = {
    "no role": ([{"content": "x"}], r"line 121: expected a role in message 0, got None"),
    "no conversation": ("x", r"line 121: expected a list of messages in column 'messages', got str"),
    "content not text": (
        [{"role": "user", "content": [{"type": "image"}]}],
        r"line 121: expected text or parts of text in message 0",
    ),
    "refused by the chat template": (
        [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}],
        r"line 121: expected a conversation that the chat template takes, got no two alike",
    ),
}
STRICT = (
    "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}"
    "{{ raise_exception('no two alike') }}{% endif %}{% endfor %}" + CHATML
)


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_conversation_is_named_and_nothing_is_written(tmp_path: Path, reason: str) -> None:
    bad, said = BAD[reason]
    chats = [conversation(number) for number in range(120)]
    write_chats(tmp_path, [*chats, bad, bad])
    config = config_of(tmp_path, template=STRICT)
    with pytest.raises(ConfigError, match=said) as caught:
        planned(config, subject=chat_subject())
    assert caught.value.exit_code == 2
    assert not (tmp_path / "root").exists()
    assert config.corpus is not None
    skipping = config.model_copy(update={"corpus": config.corpus.model_copy(update={"bad_records": "skip"})})
    plan, _, tokens = planned(skipping, subject=chat_subject())
    assert plan.corpus_facts.bad_records == {reason: 2}
    assert plan.corpus_facts.bad_first[0] == f"chats.jsonl, line 121: {reason}"
    write_chats(tmp_path, chats)
    again = skipping.model_copy(update={"root": str(tmp_path / "again")})
    assert np.array_equal(planned(again, subject=chat_subject())[2], tokens)


def test_what_cannot_be_proved_is_refused_or_left_out(tmp_path: Path) -> None:
    cutting = CHATML.replace(
        "message.content", "message.content[:100 if message.content | length == 200 else 999]"
    )
    chats = [conversation(number) for number in range(120)]
    write_chats(tmp_path, [*chats[:50], [{"role": "user", "content": "XY" * 100}], *chats[50:]])
    with pytest.raises(
        ConfigError, match=r"line 51: where the messages are.*cannot be proved.*unproved to skip"
    ):
        planned(config_of(tmp_path, template=cutting), subject=chat_subject())
    assert not (tmp_path / "root").exists()
    plan, _, tokens = planned(config_of(tmp_path, template=cutting, unproved="skip"), subject=chat_subject())
    assert plan.corpus_facts.bad_records == {"messages not proved": 1}
    write_chats(tmp_path, chats)
    again = config_of(tmp_path).model_copy(update={"root": str(tmp_path / "again")})
    assert np.array_equal(planned(again, subject=chat_subject())[2], tokens)


def test_without_a_template_it_says_what_to_do(tmp_path: Path) -> None:
    write_chats(tmp_path, [conversation(0)])
    with pytest.raises(ConfigError, match=r"has no chat template.*Jinja file"):
        planned(config_with(tmp_path), subject=chat_subject())
    with pytest.raises(ConfigError, match="expected a Jinja file"):
        planned(config_with(tmp_path, template=str(tmp_path / "absent")), subject=chat_subject())


def config_with(folder: Path, **fields: Any) -> Config:
    source = {"uri": str(folder / "chats.jsonl"), "format": "chat", **fields}
    return make_config(folder, corpus={"sources": [source]})


def test_another_template_is_another_plan(tmp_path: Path) -> None:
    write_chats(tmp_path, [conversation(number) for number in range(120)])
    plan, _, _ = planned(config_of(tmp_path), subject=chat_subject())
    before = tree(tmp_path / "root")
    other = config_of(tmp_path, template=CHATML.replace("\n", " "))
    open_store(other.root).delete("tokens/c/0/0")
    with pytest.raises(ConfigError, match="already holds another plan"):
        planned(other, subject=chat_subject())
    assert {name: before[name] for name in tree(tmp_path / "root")} == tree(tmp_path / "root")
    assert plan.units > 1


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("bos", ["auto", "none", "window"])
def test_bos_stands_once_where_windows_and_conversations_begin(
    tmp_path: Path, bos: str, writes: bool, adds: bool
) -> None:
    write_chats(tmp_path, [conversation(number) for number in range(120)])
    template = f"{{{{ '{BOS_TEXT}' }}}}{CHATML}" if writes else CHATML
    config = config_of(tmp_path, template=template, plan={"bos": bos})
    subject = bos_subject(adds)
    plan, store, tokens = planned(config, subject=subject)
    assert plan.labels is not None
    windows = tokens.reshape(-1, tokens.shape[-1])
    first = (labels_of(store, plan)["flags"] & FIRST).astype(bool).reshape(windows.shape)
    begins = bos == "window" or (bos == "auto" and adds)
    # Anywhere but at a window's beginning it is the first token of a conversation, if the template writes it.
    assert ((windows == BOS)[:, 1:] == (first[:, 1:] & writes)).all()
    if not begins:
        assert plan.labels.own_bos is None
        assert ((windows[:, 0] == BOS) == (first[:, 0] & writes)).all()
        return
    assert (windows[:, 0] == BOS).all()
    own = int(first[:, 0].sum())
    assert plan.labels.own_bos == (own if writes else None)
    if writes:
        assert own > 0
        assert not (windows[:, 1] == BOS).any()
        account = ledgers.account(plan)
        assert account.bos_added == plan.windows - own
        used = account.beyond_plan + account.tails + account.leading + account.stored
        assert account.corpus + account.bos_added == used
        # Lost chunks are made again by the rule that the plan was made with.
        store.delete("tokens/c/0/0")
        assert planned(config, subject=subject)[0] == plan


def test_a_plan_made_with_two_bos_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chats(tmp_path, [conversation(number) for number in range(120)])
    config = config_of(tmp_path, template=f"{{{{ '{BOS_TEXT}' }}}}{CHATML}", plan={"bos": "window"})
    subject = bos_subject(adds=True)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "begin_with", lambda _, documents: np.zeros(len(documents), np.bool_))
        plan, store, tokens = planned(config, subject=subject)
    assert (tokens.reshape(-1, tokens.shape[-1])[:, :2] == BOS).all(1).any()
    assert plan.labels is not None
    assert plan.labels.own_bos is None
    store.delete("tokens/c/0/0")
    same, _, found = planned(config, subject=subject)
    assert same == plan
    assert np.array_equal(found, tokens)
