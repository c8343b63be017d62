"""Corpus to plan: what is written, what is refused, and that every token is accounted for."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from winnow.cli.harvest import _show_plan
from winnow.cli.store import _show_info
from winnow.harvester.plan import spill as spill_module
from winnow.harvester.plan import windows as windows_module
from winnow.harvester.plan.packing import in_keyed_order, order_key
from winnow.harvester.plan.planner import find_plan, make_plan, missing_tokens
from winnow.harvester.plan.tokenise import read_ahead
from winnow.schemas.base import validate
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, IntegrityError, PlanMismatch, StoreError
from winnow.schemas.harvest import HarvestPlan
from winnow.schemas.labels import FIRST, SPECIAL
from winnow.store.check.info import dataset_info
from winnow.store.format.layout import PLAN_KEY, tokens_key
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.labels import read_labels
from winnow.store.read.reader import load_plan, load_token_digests, read_tokens
from winnow.subject.testing import BOS, EOS, byte_subject, byte_tokenizer

T, W = 16, 64


def write_corpus(folder: Path, documents: int = 400, length: int = 40) -> list[str]:
    """`documents` different texts of about `length` bytes, one a jsonl line."""
    texts = [(f"<{n}> " + "ab cé " * length)[: length + n % 17] for n in range(documents)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(lines, encoding="utf-8")
    return texts


def make_config(folder: Path, **sections: dict[str, Any]) -> Config:
    plan = {"hooks": ["resid_post.1"], "context_length": T, "windows_per_unit": W}
    raw = {
        "root": str(folder / "root"),
        "subject": {"model": "testing/tokenizer-only"},
        "corpus": {"sources": [{"uri": str(folder / "corpus.jsonl")}], **sections.get("corpus", {})},
        "plan": {**plan, **sections.get("plan", {})},
        "harvest": sections.get("harvest", {}),
    }
    return validate(Config, raw, origin="test")


def planned(config: Config, **options: Any) -> tuple[HarvestPlan, ObjectStore, np.ndarray]:
    """(plan, store, all tokens [units, W, T]) of a fresh planning."""
    store = open_store(config.root)
    plan = make_plan(config, store, subject=options.pop("subject", byte_subject()), **options)
    digests = load_token_digests(store, plan)
    tokens = np.stack([read_tokens(store, plan, unit, digests) for unit in range(plan.units)])
    return plan, store, tokens


def document_numbers(tokens: np.ndarray) -> set[int]:
    """Numbers of the documents whose head lies whole in a window (each begins with `<number> `)."""
    text = "\n".join(byte_tokenizer().decode(window.tolist()) for window in tokens.reshape(-1, T))
    return {int(number) for number in re.findall(r"<(\d+)> ", text)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_token_is_accounted_for(tmp_path):
    texts = write_corpus(tmp_path)
    plan, store, tokens = planned(make_config(tmp_path))
    facts = plan.corpus_facts
    assert facts.documents == len(texts)
    assert facts.tokens == sum(len(text.encode()) + 1 for text in texts)
    windows = plan.units * W + facts.windows_unused
    assert facts.tokens == windows * T + facts.tokens_unused
    assert facts.tokens_unused < 2 * T
    assert tokens.shape == (plan.units, W, T)
    assert load_plan(store) == plan
    assert find_plan(make_config(tmp_path), store) == plan


def test_windows_are_the_documents_joined_with_eos(tmp_path):
    texts = write_corpus(tmp_path)
    config = make_config(tmp_path, plan={"split_by": "window"})
    _, _, tokens = planned(config)
    stream = [token for text in texts for token in [*byte_tokenizer().encode(text).ids, EOS]]
    count = len(stream) // T
    windows = np.array(stream[: count * T], np.uint32).reshape(count, T)
    ordered = in_keyed_order(windows, order_key(0))
    units = count // W
    assert np.array_equal(tokens, ordered[: units * W].reshape(units, W, T))


@pytest.mark.parametrize("bos", ["none", "window"])
@pytest.mark.parametrize("split_by", ["document", "window"])
def test_every_token_says_where_it_comes_from(tmp_path, bos, split_by):
    texts = write_corpus(tmp_path)
    (tmp_path / "more.txt").write_text("Another source. " * 150)
    sources = [{"uri": str(tmp_path / name)} for name in ("corpus.jsonl", "more.txt")]
    texts.append((tmp_path / "more.txt").read_text())
    config = make_config(tmp_path, corpus={"sources": sources}, plan={"bos": bos, "split_by": split_by})
    plan, store, tokens = planned(config)
    documents = [[*byte_tokenizer().encode(text).ids, EOS] for text in texts]
    counted = np.zeros(2, int)
    for unit in range(plan.units):
        labels = read_labels(store, plan, unit)
        place = zip(labels["document"].ravel().tolist(), labels["offset"].ravel().tolist(), strict=True)
        wanted = np.array([documents[document][offset] for document, offset in place]).reshape(W, T)
        body = slice(1 if bos == "window" else 0, None)
        assert np.array_equal(wanted[:, body], tokens[unit][:, body])
        special = np.isin(tokens[unit], (EOS, BOS))
        assert np.array_equal((labels["flags"] & SPECIAL).astype(bool), special)
        first = (labels["offset"] == 0)[:, body]
        assert np.array_equal((labels["flags"] & FIRST).astype(bool)[:, body], first)
        assert np.array_equal(labels["source"], labels["document"] == len(texts) - 1)
        assert not labels["role"].any()
        assert not labels["turn"].any()
        if bos == "window":
            for name in ("document", "offset", "source"):
                assert np.array_equal(labels[name][:, 0], labels[name][:, 1])
        counted += np.bincount(labels["source"].ravel(), minlength=2)
    assert plan.labels is not None
    assert plan.labels.tokens_by_source == tuple(counted.tolist())
    assert plan.labels.tokens_by_role == (plan.windows * T, 0, 0, 0, 0)
    assert plan.labels.tokens_by_turn == (plan.windows * T,)
    assert plan.labels.special == int(np.isin(tokens, (EOS, BOS)).sum())


def test_bos_starts_every_window(tmp_path):
    texts = write_corpus(tmp_path)
    plan, _, tokens = planned(make_config(tmp_path, plan={"bos": "window"}))
    assert (tokens[:, :, 0] == BOS).all()
    assert not (tokens[:, :, 1:] == BOS).any()
    windows = plan.units * W + plan.corpus_facts.windows_unused
    assert (
        sum(len(text.encode()) + 1 for text in texts) == windows * (T - 1) + plan.corpus_facts.tokens_unused
    )


@pytest.mark.parametrize("validation_units", [1, 3])
def test_validation_documents_are_in_no_training_window(tmp_path, validation_units):
    write_corpus(tmp_path, documents=1200)
    plan, store, _ = planned(make_config(tmp_path, plan={"validation_units": validation_units}))
    digests = load_token_digests(store, plan)
    units = [read_tokens(store, plan, unit, digests) for unit in range(plan.units)]
    held = document_numbers(np.stack(units[:validation_units]))
    train = document_numbers(np.stack(units[validation_units:]))
    assert held
    assert train
    assert not held & train


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=60, max_size=120),
    seed=st.integers(0, 2**63 - 1),
    split=st.sampled_from(["document", "window"]),
    bos=st.sampled_from(["none", "window"]),
)
def test_any_corpus_is_split_without_loss(tmp_path_factory, lengths, seed, split, bos):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [chr(0x4E00 + n) * length for n, length in enumerate(lengths)]  # a letter of its own each
    (folder / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    config = make_config(folder, plan={"seed": seed, "split_by": split, "bos": bos})
    try:
        plan, _, tokens = planned(config)
    except ConfigError:
        event("too small")
        assert not (folder / "root").exists()
        return
    facts, payload = plan.corpus_facts, T - (bos == "window")
    assert facts.tokens == sum(3 * length + 1 for length in lengths)
    assert facts.tokens == (plan.units * W + facts.windows_unused) * payload + facts.tokens_unused
    if split == "document":
        held = plan.spec.validation_units
        assert not letters(tokens[:held]) & letters(tokens[held:])


def letters(tokens: np.ndarray) -> set[str]:
    """Whole Chinese letters inside windows."""
    windows = byte_tokenizer().decode_batch(tokens.reshape(-1, T).tolist())
    return {mark for text in windows for mark in text if 0x4E00 <= ord(mark) < 0x5000}


def test_nothing_depends_on_buckets_batches_or_buffers(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, _, tokens = planned(config)
    for number, (buckets, chars) in enumerate([(1, 50), (64, 2**21), (4096, 3000)]):
        monkeypatch.setattr(windows_module, "bucket_count", lambda _, buckets=buckets: buckets)
        monkeypatch.setattr("winnow.harvester.plan.tokenise.BATCH_CHARS", chars)
        other = config.model_copy(update={"root": str(tmp_path / f"root{number}")})
        again, _, same = planned(other)
        assert again.fingerprint == plan.fingerprint
        assert np.array_equal(same, tokens)


def test_the_seed_moves_everything(tmp_path):
    write_corpus(tmp_path)
    first, _, tokens = planned(make_config(tmp_path))
    other = make_config(tmp_path, plan={"seed": 1}).model_copy(update={"root": str(tmp_path / "other")})
    second, _, moved = planned(other)
    assert first.fingerprint != second.fingerprint
    assert not np.array_equal(tokens, moved)


@pytest.mark.parametrize("split", ["document", "window"])
def test_train_units_keep_the_first_in_keyed_order(tmp_path, split):
    write_corpus(tmp_path, documents=800)
    whole, _, tokens = planned(make_config(tmp_path, plan={"split_by": split}))
    config = make_config(tmp_path, plan={"split_by": split, "train_units": 4})
    part, _, kept = planned(config.model_copy(update={"root": str(tmp_path / "part")}))
    assert part.units == 5
    assert np.array_equal(kept, tokens[:5])
    dropped = (whole.units - part.units) * W
    assert part.corpus_facts.windows_unused == whole.corpus_facts.windows_unused + dropped


def test_train_units_beyond_the_corpus_are_refused(tmp_path):
    write_corpus(tmp_path)
    with pytest.raises(ConfigError, match=r"plan\.train_units.*expected at most \d+, got 9000"):
        planned(make_config(tmp_path, plan={"train_units": 9000}))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("split", ["document", "window"])
def test_too_small_a_corpus_is_refused_before_anything_is_written(tmp_path, split):
    write_corpus(tmp_path, documents=30)
    with pytest.raises(ConfigError, match=r"too small.*at least 2,048 tokens.*got \d,\d+ tokens in 30 doc"):
        planned(make_config(tmp_path, plan={"split_by": split}))
    assert not (tmp_path / "root").exists()


def test_a_subject_that_cannot_join_documents_is_refused(tmp_path):
    write_corpus(tmp_path)
    for config, subject, complaint in [
        (
            make_config(tmp_path, plan={"join": "eos"}),
            byte_subject(eos_token_id=None),
            r"plan\.join.*an EOS token",
        ),
        (make_config(tmp_path, plan={"bos": "window"}), byte_subject(bos_token_id=None), r"plan\.bos"),
        (make_config(tmp_path), byte_subject(context_limit=8), r"context_length.*at most 8, got 16"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            planned(config, subject=subject)
    slow = byte_subject()
    slow.tokenizer = SimpleNamespace(backend_tokenizer=None)
    with pytest.raises(ConfigError, match="no fast tokenizer"):
        planned(make_config(tmp_path), subject=slow)
    with pytest.raises(IntegrityError, match="does not fit its model"):
        planned(make_config(tmp_path), subject=byte_subject(vocabulary=100))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", ["subject", "corpus", "plan"])
def test_a_missing_section_is_named(tmp_path, name):
    config = make_config(tmp_path).model_copy(update={name: None})
    with pytest.raises(ConfigError, match=f"section '{name}'"):
        make_plan(config, open_store(config.root), subject=byte_subject())


def test_padding_truncation_and_added_tokens_are_off(tmp_path):
    from tokenizers.processors import TemplateProcessing

    write_corpus(tmp_path)
    said = {"bos": "none"}
    plan, _, tokens = planned(make_config(tmp_path, plan=said))
    subject = byte_subject()
    subject.tokenizer.enable_truncation(5)
    subject.tokenizer.enable_padding()
    subject.tokenizer.post_processor = TemplateProcessing(
        "<bos> $A <eos>", None, [("<bos>", BOS), ("<eos>", EOS)]
    )
    config = make_config(tmp_path, plan=said).model_copy(update={"root": str(tmp_path / "other")})
    _, _, same = planned(config, subject=subject)
    assert np.array_equal(tokens, same)
    assert subject.tokenizer.truncation is not None  # the subject's own tokenizer is left alone
    assert plan.units == len(same)


def test_another_run_fills_the_gaps_and_changes_nothing(tmp_path):
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, store, _ = planned(config)
    before = tree(tmp_path / "root")
    for unit in (0, plan.units - 1):
        store.delete(tokens_key(unit))
    assert missing_tokens(plan, store) == [0, plan.units - 1]
    assert find_plan(config, store) is None
    assert planned(config)[0] == plan
    assert tree(tmp_path / "root") == before


def test_a_chunk_that_differs_is_not_overwritten(tmp_path):
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, store, _ = planned(config)
    store.put(tokens_key(0), b"\0" * (store.size(tokens_key(0)) or 0))
    make_plan(config, store, subject=byte_subject())  # present: `verify` and the harvest check contents
    with pytest.raises(IntegrityError):
        read_tokens(store, plan, 0, load_token_digests(store, plan))


def test_another_plan_is_refused_with_the_fields_before_reading(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    _, store, _ = planned(config)
    before = tree(tmp_path / "root")
    monkeypatch.setattr(windows_module, "documents", lambda *_: pytest.fail("the corpus was read"))
    for other, field in [
        (make_config(tmp_path, plan={"seed": 5}), r"spec\.seed: stored 0, asked for 5"),
        (make_config(tmp_path, corpus={"deduplicate": False}), r"corpus\.deduplicate"),
    ]:
        with pytest.raises(PlanMismatch, match=field):
            make_plan(other, store, subject=byte_subject())
        with pytest.raises(PlanMismatch, match=field):
            find_plan(other, store)
    for subject, field in [
        (byte_subject(weights_sha256="ab" * 32), r"subject\.weights_sha256"),
        (byte_subject(layers=3), r"subject\.layers: stored 1, asked for 3"),
    ]:
        with pytest.raises(PlanMismatch, match=field):
            find_plan(config, store, subject=subject)
    renamed = config.model_copy(update={"subject": config.subject.model_copy(update={"model": "another"})})
    with pytest.raises(PlanMismatch, match=r"subject\.model"):
        find_plan(renamed, store)
    assert find_plan(Config(root=config.root), store) is not None  # sections left out are not compared
    assert tree(tmp_path / "root") == before


def test_a_subject_that_moved_is_the_same_by_its_digests(tmp_path, told):
    """Of a name that is no folder here nothing can be digested, so the identity is handed in."""
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, store, _ = planned(config)
    store.delete(tokens_key(0))
    before = tree(tmp_path / "root")
    moved = byte_subject(model="elsewhere", revision="a" * 40)
    renamed = config.model_copy(update={"subject": config.subject.model_copy(update={"model": "elsewhere"})})
    assert find_plan(renamed, store, subject=moved) is None, "a token chunk is missing"
    for other in ({"weights_sha256": "ab" * 32}, {"tokenizer_sha256": "ab" * 32}):
        with pytest.raises(PlanMismatch, match=r"subject\.model: stored 'testing/tokenizer-only'"):
            make_plan(renamed, store, subject=byte_subject(model="elsewhere", **other))
    assert tree(tmp_path / "root") == before
    with pytest.raises(PlanMismatch, match=r"subject\.revision"):  # the same name, another commit
        find_plan(config, store, subject=byte_subject(revision="a" * 40))
    assert make_plan(renamed, store, subject=moved) == plan
    assert "elsewhere holds the weights and the tokenizer that were planned as" in told[-1]
    assert find_plan(renamed, store, subject=moved) == plan


def test_attention_is_the_plans_unless_it_is_given(tmp_path):
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, store, _ = planned(config)
    assert config.subject.attention == "auto"
    assert plan.subject.attention == "sdpa"
    assert plan.subject.spec(config.subject).attention == "sdpa"
    for attention in ("sdpa", "eager"):
        given = config.subject.model_copy(update={"attention": attention})
        assert plan.subject.spec(given) == given
        if attention == "sdpa":
            assert find_plan(config.model_copy(update={"subject": given}), store) == plan
            continue
        with pytest.raises(PlanMismatch, match=r"subject\.attention: stored 'sdpa', asked for 'eager'"):
            find_plan(config.model_copy(update={"subject": given}), store)
    with pytest.raises(PlanMismatch, match=r"subject\.attention"):  # `auto` takes another one today
        make_plan(config, store, subject=byte_subject(attention="eager"))


def test_a_corpus_that_changed_is_refused(tmp_path):
    texts = write_corpus(tmp_path)
    config = make_config(tmp_path)
    planned(config)
    before = tree(tmp_path / "root")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(text + "!") + "\n" for text in texts))
    with pytest.raises(PlanMismatch, match=r"corpus_facts\.sha256"):
        planned(config)
    assert tree(tmp_path / "root") == before


def test_execution_stands_outside_the_identity(tmp_path):
    write_corpus(tmp_path)
    plan, _, _ = planned(make_config(tmp_path))
    again, _, _ = planned(make_config(tmp_path, harvest={"batch_windows": 3}))
    assert again == plan
    assert again.execution.batch_windows == "auto"


def test_no_plan_is_no_plan(tmp_path):
    config = make_config(tmp_path)
    assert find_plan(config, open_store(config.root)) is None


def test_progress_is_told(tmp_path):
    write_corpus(tmp_path)
    told: list[tuple[int, dict[str, str]]] = []
    plan, _, _ = planned(make_config(tmp_path), progress=lambda tokens, **facts: told.append((tokens, facts)))
    assert told[0][1]["read"] == "100%"
    assert told[-1] == (plan.corpus_facts.tokens, {"chunks": f"{plan.units}/{plan.units}"})


def test_an_error_while_reading_ends_the_threads(tmp_path):
    write_corpus(tmp_path)
    with (tmp_path / "corpus.jsonl").open("ab") as file:
        file.write(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        planned(make_config(tmp_path))
    assert not [thread for thread in threading.enumerate() if "winnow" in thread.name]
    assert not (tmp_path / "root").exists()


def test_read_ahead_is_bounded_and_ends_when_left():
    made: list[int] = []
    stream = read_ahead((made.append(n) or n for n in range(1000)), depth=2)
    assert [next(stream), next(stream)] == [0, 1]
    assert len(made) <= 5
    stream.close()
    assert not [thread for thread in threading.enumerate() if "winnow" in thread.name]


def test_too_small_a_disk_is_told_beforehand(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.setattr(spill_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(StoreError, match=r"disk too small for the planner's spill file.*temp_dir"):
        planned(make_config(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(windows_module, "TOKENS_PER_BYTE", 0)  # a first forecast that is far too low
    monkeypatch.setattr(windows_module, "MEASURE_BYTES", 0)
    monkeypatch.setattr(spill_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(StoreError, match="the rest of the planner's spill file"):
        planned(make_config(tmp_path))
    monkeypatch.undo()
    store = open_store(make_config(tmp_path).root)
    monkeypatch.setattr(type(store), "free_bytes", lambda _: 100)
    with pytest.raises(StoreError, match="disk too small for the tokens"):
        make_plan(make_config(tmp_path), store, subject=byte_subject())
    assert not (tmp_path / "root").exists()


def test_a_temp_folder_that_is_absent(tmp_path):
    write_corpus(tmp_path)
    for name in ("absent", "corpus.jsonl"):
        with pytest.raises(ConfigError, match=r"harvest\.temp_dir"):
            planned(make_config(tmp_path, harvest={"temp_dir": str(tmp_path / name)}))


def test_a_planner_that_is_killed_leaves_no_spill_and_can_go_on(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "temp").mkdir()
    config = make_config(tmp_path, harvest={"temp_dir": str(tmp_path / "temp")})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = """
        import os, signal, sys
        from winnow.harvester.plan import planner
        from winnow.subject.testing import byte_subject
        from winnow.schemas.config import Config
        from winnow.store.objects import open_store
        real = planner.put_tokens
        def put(store, plan, unit, tokens):
            if unit == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            real(store, plan, unit, tokens)
        planner.put_tokens, planner.PUT_THREADS = put, 1
        config = Config.model_validate_json(open(sys.argv[1]).read())
        planner.make_plan(config, open_store(config.root), subject=byte_subject())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "config.json")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not list((tmp_path / "temp").iterdir())
    store = open_store(config.root)
    stood = load_plan(store)
    assert missing_tokens(stood, store)
    plan, _, tokens = planned(config)
    assert plan == stood
    assert not missing_tokens(plan, store)
    digests = b"".join(hashlib.sha256(unit.astype("<u4").tobytes()).digest() for unit in tokens)
    assert hashlib.sha256(digests).hexdigest() == plan.tokens_sha256


def test_a_plan_says_which_records_it_left_out(tmp_path, capsys):
    write_corpus(tmp_path)
    good, _, tokens = planned(make_config(tmp_path))
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("".join(f"{{{n}\n" for n in range(7)))
    with pytest.raises(ConfigError, match=r"line 401: expected one JSON value.*bad_records"):
        make_plan(make_config(tmp_path), open_store(str(tmp_path / "other")), subject=byte_subject())
    config = make_config(tmp_path, corpus={"bad_records": "skip"})
    with pytest.raises(PlanMismatch, match=r"corpus\.bad_records"):
        make_plan(config, open_store(config.root), subject=byte_subject())
    config = config.model_copy(update={"root": str(tmp_path / "skipped")})
    plan, store, same = planned(config)
    assert (same == tokens).all()
    assert plan.corpus_facts.sha256 == good.corpus_facts.sha256
    assert plan.corpus_facts.bad_records == {"not JSON": 7}
    assert plan.corpus_facts.bad_first == tuple(f"corpus.jsonl, line {n}: not JSON" for n in range(401, 406))
    assert find_plan(config, store, subject=byte_subject()) == plan
    _show_plan(plan, store)
    _show_info(dataset_info(store))
    shown = capsys.readouterr().out
    for line in (r"records left out +│ +7 not JSON", r"corpus\.jsonl, line 405: not JSON", "and 2 more"):
        assert len(re.findall(line, shown)) == 2
    # what says nothing is not written: plans of before keep their fingerprint
    stored = json.loads(open_store(str(tmp_path / "root")).get(PLAN_KEY))
    assert not {"bad_records", "bad_first"} & {*stored["corpus"], *stored["corpus_facts"]}
