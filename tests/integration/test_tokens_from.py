"""`plan.tokens_from`: another subject on the same windows, aligned by digest or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.integration.test_planner import tree
from tests.support.pipeline import make_alone, pipeline_config
from tests.support.tiny import SENTENCES, make_subject, make_tokenizer
from winnow.common.config_file import load_config
from winnow.harvester.plan.parent import Parent
from winnow.harvester.plan.planner import find_plan, make_plan
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.forecast import forecast
from winnow.harvester.run.mend import mend
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, PlanMismatch
from winnow.schemas.subject import HookSite
from winnow.store import ActivationStore
from winnow.store.format.labels import label_key
from winnow.store.format.layout import row_permutation, tokens_key
from winnow.store.objects import open_store
from winnow.store.read.labels import read_labels
from winnow.store.read.reader import load_plan, read_tokens


@pytest.fixture
def base(tmp_path) -> Config:
    """A planned dataset of a base model."""
    config = load_config(pipeline_config(tmp_path / "base", units=2))
    ensure_plan(config, open_store(config.root))
    return config


def other(folder: Path, base: Config, **plan: object) -> Config:
    """The config of a second subject, wider than the base, on the base's windows; without a corpus."""
    folder.mkdir(exist_ok=True)
    if not (folder / "subject").exists():
        make_subject(folder / "subject", "llama", layers=3, width=24, seed=1)
    fields = {"hooks": ["resid_post.1"], "tokens_from": base.root, **plan}
    raw = base.model_dump(mode="json", exclude={"corpus", "plan"}) | {"plan": fields}
    raw |= {"root": str(folder / "data"), "subject": {"model": str(folder / "subject"), "device": "cpu"}}
    return Config.model_validate(raw)


def test_a_second_subject_has_the_same_tokens_order_and_permutation(tmp_path, base):
    config = other(tmp_path / "chat", base)
    plan, _ = make_alone(config)
    first = load_plan(open_store(base.root))
    assert plan.tokens_sha256 == first.tokens_sha256
    assert plan.subject.weights_sha256 != first.subject.weights_sha256
    assert (plan.units, plan.corpus, plan.corpus_facts) == (first.units, first.corpus, first.corpus_facts)
    assert plan.execution.tokens_from == first.fingerprint
    assert "tokens_from" not in json.loads(plan.to_json())["spec"]
    assert plan.fingerprint != first.fingerprint
    dataset = ActivationStore.open(config.root)
    for unit in range(plan.units):
        assert np.array_equal(dataset.unit_tokens(unit), read_tokens(open_store(base.root), first, unit))
        assert np.array_equal(row_permutation(plan, unit), row_permutation(first, unit))
    # Again: it finds the plan, and a config that says nothing of windows is no other plan.
    assert find_plan(config, dataset.store) == plan


def test_a_plan_of_the_same_subject_is_the_same_plan(tmp_path, base):
    fields = {"root": str(tmp_path / "copy"), "plan": base.plan.model_copy(update={"tokens_from": base.root})}
    copied = ensure_plan(base.model_copy(update=fields), open_store(str(tmp_path / "copy")))
    assert copied.fingerprint == load_plan(open_store(base.root)).fingerprint


def test_other_vocabularies_are_refused_with_the_first_difference(tmp_path, base):
    config = other(tmp_path / "chat", base)
    make_tokenizer(384, [SENTENCES[1], SENTENCES[3]]).save_pretrained(tmp_path / "chat" / "subject")
    before = make_tokenizer().backend_tokenizer.get_vocab()
    after = make_tokenizer(384, [SENTENCES[1], SENTENCES[3]]).backend_tokenizer.get_vocab()
    one, two = ({number: token for token, number in each.items()} for each in (before, after))
    first = min(n for n in one.keys() | two.keys() if one.get(n) != two.get(n))
    with pytest.raises(ConfigError, match=f"the first is {first}") as caught:
        ensure_plan(config, open_store(config.root))
    assert caught.value.expected.startswith(repr(one[first]))
    assert not Path(config.root).exists()


def test_a_tokenizer_that_only_post_processes_differently_is_accepted(tmp_path, base):
    config = other(tmp_path / "chat", base)
    file = tmp_path / "chat" / "subject" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save(str(file))
    plan = ensure_plan(config, open_store(config.root))
    first = load_plan(open_store(base.root))
    assert plan.subject.tokenizer_sha256 != first.subject.tokenizer_sha256
    assert (plan.tokens_sha256, plan.bos_token) == (first.tokens_sha256, first.bos_token)


def test_windows_that_do_not_fit_the_embedding_are_refused(tmp_path, base):
    config = other(tmp_path / "chat", base)
    make_subject(tmp_path / "chat" / "subject", "llama", layers=3, width=24, vocab=300)
    make_tokenizer().save_pretrained(tmp_path / "chat" / "subject")
    with pytest.raises(ConfigError, match="do not fit"):
        ensure_plan(config, open_store(config.root))
    assert not Path(config.root).exists()


@pytest.mark.parametrize(
    ("field", "value"), [("context_length", 33), ("seed", 1), ("drop_leading", 2), ("windows_per_unit", 128)]
)
def test_fields_that_decide_windows_must_agree(tmp_path, base, field, value):
    config = other(tmp_path / "chat", base, **{field: value})
    with pytest.raises(PlanMismatch, match=f"plan.{field}: stored .*, asked for {value}"):
        ensure_plan(config, open_store(config.root))
    assert not Path(config.root).exists()
    agreeing = other(tmp_path / "chat", base, **{field: getattr(base.plan, field)}, dtype="float32")
    assert ensure_plan(agreeing, open_store(config.root)).spec.dtype == "float32"


def test_a_swapped_token_chunk_is_refused(tmp_path, base):
    store = open_store(base.root)
    one, two = (Path(base.root) / tokens_key(unit) for unit in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    config = other(tmp_path / "chat", base)
    with pytest.raises(IntegrityError, match="tokens of unit 1"):
        ensure_plan(config, open_store(config.root))
    assert not (Path(config.root) / tokens_key(1)).exists()
    # Once it is restored, the same command finishes what it had begun.
    one.write_bytes(kept)
    plan = ensure_plan(config, open_store(config.root))
    assert plan.tokens_sha256 == load_plan(store).tokens_sha256


def test_a_dataset_that_is_not_planned_completely_is_refused(tmp_path, base):
    (Path(base.root) / tokens_key(1)).unlink()
    config = other(tmp_path / "chat", base)
    with pytest.raises(MissingObject, match="not planned completely"):
        ensure_plan(config, open_store(config.root))
    assert not Path(config.root).exists()


def test_another_parent_than_before_is_refused(tmp_path, base):
    config = other(tmp_path / "chat", base)
    ensure_plan(config, open_store(config.root))
    elsewhere = load_config(pipeline_config(tmp_path / "elsewhere", units=2, plan={"seed": 3}))
    ensure_plan(elsewhere, open_store(elsewhere.root))
    before = tree(Path(config.root))
    changed = other(tmp_path / "chat", elsewhere)
    for ask in (find_plan, make_plan):
        with pytest.raises(PlanMismatch, match=r"other tokens than plan\.tokens_from"):
            ask(changed, open_store(config.root))
    assert tree(Path(config.root)) == before


def test_a_repair_takes_the_tokens_from_there_again(tmp_path, base):
    config = other(tmp_path / "chat", base)
    plan, _ = make_alone(config)
    chunk = Path(config.root) / tokens_key(1)
    good = chunk.read_bytes()
    chunk.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    report = mend(config, open_store(config.root), plan)
    assert report.restored == [tokens_key(1)]
    assert chunk.read_bytes() == good


def test_labels_are_copied_with_the_tokens_and_a_damaged_one_is_refused(tmp_path, base):
    made = other(tmp_path / "chat", base)
    source, target = open_store(base.root), open_store(made.root)
    ensure_plan(made, target)
    plan, copied = load_plan(source), load_plan(target)
    assert copied.labels == plan.labels
    for unit in range(plan.units):
        theirs = read_labels(target, copied, unit)
        for name, values in read_labels(source, plan, unit).items():
            assert np.array_equal(theirs[name], values)
    source.put(label_key("role", 1), source.get(label_key("offset", 1)))
    with pytest.raises(IntegrityError, match="label 'role' of unit 1"):
        ensure_plan(other(tmp_path / "late", base), open_store(str(tmp_path / "late" / "data")))


def test_a_forecast_before_there_is_a_plan_knows_the_windows(tmp_path, base):
    config = other(tmp_path / "chat", base)
    store = open_store(config.root)
    sites = (HookSite(name="resid_post.1", d_model=24),)
    found = forecast(Parent.written_out(config), store, None, measure=lambda: (sites, 100.0))
    assert (found.units, found.tokens_to_do) == (3, 3 * 64 * 17)
    assert not Path(config.root).exists()
    ensure_plan(config, store)
    assert forecast(config, store, find_plan(config, store)).units == found.units
