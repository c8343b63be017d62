"""`winnow harvest` on a tiny real LM through real Ray, on a local root and on S3."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.support.pipeline import pipeline_config
from tests.support.tiny import make_subject
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.single import local_worker
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.objects import open_store
from winnow.store.read.reader import load_plan, receipts_present
from winnow.subject import Subject


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    config = pipeline_config(tmp_path_factory.mktemp("harvested"))
    code, out, err = winnow("harvest", config, "--json")
    assert code == 0, err
    return config, json.loads(out)


def test_rows_are_the_subjects_activations_at_the_tokens_they_name(harvested):
    config_path, facts = harvested
    config = load_config(config_path)
    store = ActivationStore.open(config.root)
    assert facts["units"] == 5
    assert facts["rows"] == store.rows == 5 * 64 * 16
    lm = Subject.load(config.subject)
    rows = np.r_[0:40, store.rows - 40 : store.rows]
    windows, positions = store.locate(rows)
    tokens = np.stack([store.tokens(int(window)) for window in windows])
    assert positions.min() >= 1
    expected = lm.activations(tokens, hooks=list(store.hooks))
    for hook in store.hooks:
        found = np.concatenate(
            [store.read_rows(hook, 0, 40), store.read_rows(hook, store.rows - 40, store.rows)]
        )
        wanted = expected[hook].float().numpy()[np.arange(len(rows)), positions]
        assert found.shape == (80, store.d_model(hook))
        np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=1e-3)


def test_a_second_harvest_finds_everything_done(harvested):
    config, facts = harvested
    store = open_store(facts["root"])
    before = dict(store.list("receipts"))
    code, out, err = winnow("harvest", config, "--json")
    assert code == 0, err
    assert json.loads(out)["dataset_sha256"] == facts["dataset_sha256"]
    assert dict(store.list("receipts")) == before


def test_another_plan_on_the_same_root_is_refused_with_the_differing_fields(harvested):
    config, facts = harvested
    code, _, err = winnow("harvest", config, "--set", "plan.seed=7", "--set", "plan.dtype=float32")
    assert code == 2
    shown = " ".join(err.split())
    assert "seed" in shown
    assert "dtype" in shown
    code, out, _ = winnow("harvest", config, "--json")
    assert json.loads(out)["dataset_sha256"] == facts["dataset_sha256"]


def test_a_subject_that_moves_stops_no_harvest(tmp_path):
    """Half a harvest, then the subject's folder lies elsewhere byte for byte: the same command goes on."""
    config = pipeline_config(tmp_path)
    loaded = load_config(config)
    store = open_store(loaded.root)
    plan = ensure_plan(loaded, store)
    local_worker(loaded, store, plan).run(0)
    moved = tmp_path / "elsewhere"
    (tmp_path / "subject").rename(moved)
    here = ("--single-writer", "--json", "--set")
    code, out, err = winnow("harvest", config, *here, f"subject.model={moved}")
    assert code == 0, err
    assert f"{moved} holds the weights and the tokenizer that were planned as" in " ".join(err.split())
    assert verify(store, "full") == []
    assert json.loads(out)["plan_fingerprint"] == plan.fingerprint == load_plan(store).fingerprint
    other = make_subject(tmp_path / "other", "llama", layers=3, width=16, seed=1)
    code, _, err = winnow("harvest", config, *here, f"subject.model={other}")
    assert code == 2
    assert "subject.model: stored" in " ".join(err.split())


def test_a_corpus_that_moves_stops_no_harvest(tmp_path):
    config = pipeline_config(tmp_path)
    loaded = load_config(config)
    store = open_store(loaded.root)
    plan = ensure_plan(loaded, store)
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "corpus.jsonl").rename(moved)
    code, _, err = winnow("harvest", config, "--set", f"corpus.sources.0.uri={moved}", "--single-writer")
    assert code == 2
    assert "have only moved, leave them out (--set corpus=null)" in " ".join(err.split())
    # as it says; and with the old name, since a whole plan is harvested without its corpus
    assert ensure_plan(loaded, store) == plan
    code, out, err = winnow("harvest", config, "--set", "corpus=null", "--single-writer", "--json")
    assert code == 0, err
    assert json.loads(out)["plan_fingerprint"] == plan.fingerprint
    assert verify(store, "full") == []
    code, _, err = winnow("harvest", config, "--set", "corpus=null", "--set", f"root={tmp_path / 'new'}")
    assert (code, "section 'corpus'" in err) == (2, True)


def test_batch_shape_is_no_part_of_the_identity(harvested):
    config, facts = harvested
    code, out, err = winnow("harvest", config, "--json", "--set", "harvest.batch_windows=64")
    assert code == 0, err
    assert json.loads(out)["plan_fingerprint"] == facts["plan_fingerprint"]


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("plan.hooks=[resid_post.1, mpl_out.0]", "mlp_out.0"),
        ("plan.hooks=[resid_post.9]", "layer"),
        ("plan.train_units=4000", "tokens"),
        ("corpus.sources.0.column=body", "text"),
        ("corpus.sources.0.uri=nowhere/*.txt", "nowhere"),
        ("subject.model=nowhere/at-all", "nowhere/at-all"),
        ("plan.context_length=100000", "context"),
        ("subject.device=cuda:7", "cuda:7"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(tmp_path, harvested, override, names):
    config, _ = harvested
    root = tmp_path / "fresh"
    code, out, err = winnow("harvest", config, "--set", f"root={root}", "--set", override)
    assert code == 2, err
    assert out == ""
    assert names in " ".join(err.split())
    assert not any(path.is_file() for path in root.rglob("*"))


def test_a_nan_names_hook_unit_and_window_and_commits_nothing(tmp_path):
    config = pipeline_config(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "subject" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.1" in name and "down_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    code, _, err = winnow("harvest", config)
    assert code == 2
    shown = " ".join(err.split())
    assert "resid_post.1" in shown
    assert "unit 0" in shown
    assert "window 0" in shown
    store = open_store(str(tmp_path / "data"))
    assert not list(store.list("receipts"))


def test_a_disk_too_small_is_refused_before_the_first_shard(tmp_path, monkeypatch):
    config = pipeline_config(tmp_path)
    code, _, err = winnow("plan", config)
    assert code == 0, err
    monkeypatch.setattr(type(open_store(str(tmp_path / "data"))), "free_bytes", lambda _: 1000)
    code, _, err = winnow("harvest", config)
    assert code == 2
    assert "disk" in err
    assert not list(open_store(str(tmp_path / "data")).list("activations/resid_post.1/c"))


def test_harvest_and_read_back_on_s3(tmp_path, harvested, s3_uri):
    config_path, facts = harvested
    code, out, err = winnow("harvest", config_path, "--json", "--set", f"root={s3_uri}")
    assert code == 0, err
    assert json.loads(out)["dataset_sha256"] == facts["dataset_sha256"]
    code, out, err = winnow("verify", s3_uri, "--level", "full", "--json")
    assert code == 0, out + err
    local, remote = ActivationStore.open(load_config(config_path).root), ActivationStore.open(s3_uri)
    np.testing.assert_array_equal(
        local.read_rows("mlp_out.0", 100, 300), remote.read_rows("mlp_out.0", 100, 300)
    )
    assert len(receipts_present(open_store(s3_uri), remote.plan)) == 5


def test_two_actors_make_the_same_rows(tmp_path, harvested):
    config_path, _ = harvested
    root = tmp_path / "two"
    code, _, err = winnow("harvest", config_path, "--set", f"root={root}", "--set", "harvest.actors=2")
    assert code == 0, err
    one = ActivationStore.open(yaml.safe_load(config_path.read_text())["root"])
    two = ActivationStore.open(str(root))
    np.testing.assert_allclose(
        two.read_rows("resid_post.1", 0, two.rows),
        one.read_rows("resid_post.1", 0, one.rows),
        rtol=2**-6,
        atol=1e-2,
    )


def test_modules_in_the_working_directory_are_not_taken_for_the_libraries(tmp_path, harvested, monkeypatch):
    for name in ("random", "numpy", "datasets", "store", "trainer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user's own')\n")
    monkeypatch.chdir(tmp_path)
    # a relative root is still one of the working directory, which the workers share
    code, _, err = winnow("harvest", harvested[0], "--set", "root=here")
    assert code == 0, err
    assert ActivationStore.open(str(tmp_path / "here")).rows == harvested[1]["rows"]
