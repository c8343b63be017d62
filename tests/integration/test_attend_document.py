"""`plan.attend: document`: rows and figures are those of each document run alone, or it is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.subjects.catalogue import make_subject
from tests.support.evaluated import HOOK, random_sae, save_sae
from tests.support.pipeline import make_alone, pipeline_config
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.evaluator.circuits.report import held_out_windows
from winnow.evaluator.families import ablation, downstream, sets
from winnow.evaluator.families.downstream import AcrossSubjects
from winnow.evaluator.set_setting import open_setting
from winnow.evaluator.setting import Setting
from winnow.explorer.site.reading import ablate, read_tokens
from winnow.harvester.plan.planner import make_plan
from winnow.harvester.run.worker import UnitWorker
from winnow.sae import Sae
from winnow.schemas.config import Config, StorageSpec
from winnow.schemas.errors import ConfigError, PlanMismatch
from winnow.schemas.evaluation import EvaluateSpec
from winnow.schemas.harvest import HarvestPlan
from winnow.store import ActivationStore
from winnow.store.check.info import dataset_info
from winnow.store.format import order as order_module
from winnow.store.format.labels import document_positions, label_key
from winnow.store.objects import open_store
from winnow.store.read.joined import open_roots
from winnow.store.read.reader import load_plan
from winnow.subject import Subject
from winnow.subject.tail import Tail


def config_of(folder: Path, **sections: dict) -> Config:
    """Short documents, so that most windows hold several; float32, so that rows are compared closely."""
    fields = {
        "hooks": ["resid_post.1", "mlp_out.0"],
        "context_length": 48,
        "dtype": "float32",
        "attend": "document",
        **sections.pop("plan", {}),
    }
    path = pipeline_config(folder, units=1, plan=fields, **sections)
    corpus = folder / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    short = [" ".join(text.split()[at : at + 4]) for text in texts * 8 for at in (0, 8)]
    lines = (json.dumps({"text": f"{number} {text}"}) for number, text in enumerate(short))
    corpus.write_text("\n".join(lines) + "\n")
    return load_config(path)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Config:
    config = config_of(tmp_path_factory.mktemp("harvested"))
    make_alone(config)
    return config


@pytest.fixture(scope="module")
def subject(harvested) -> Subject:
    return Subject.load(harvested.subject)


def documents(store: ActivationStore, window: int) -> list[tuple[int, int]]:
    """(first, end) of each document in a window, from its tokens: EOS ends a document."""
    ends = np.flatnonzero(store.tokens(window) == store.plan.join_token) + 1
    return list(pairwise(sorted({0, *ends.tolist(), store.plan.spec.context_length})))


def test_a_row_is_that_of_its_document_alone(harvested, subject):
    store = ActivationStore.open(harvested.root)
    rows = {hook: store.read_rows(hook, 0, store.plan.rows_per_unit) for hook in store.hooks}
    places = store.locate(np.arange(store.plan.rows_per_unit))
    several = 0
    for window in range(4):
        cut = documents(store, window)
        several += len(cut) > 1
        for low, high in cut:
            alone = subject.activations(store.tokens(window)[None, low:high], store.hooks)
            inside = (places[0] == window) & (places[1] >= low) & (places[1] < high)
            for hook in store.hooks:
                expected = alone[hook][0].numpy()[places[1][inside] - low]
                np.testing.assert_allclose(rows[hook][inside], expected, atol=2e-5)
    assert several == 4


def test_positions_begin_again_with_a_document_and_with_a_window(harvested):
    store = ActivationStore.open(harvested.root)
    found = store.positions(range(6))
    expected = [
        np.concatenate([np.arange(high - low) for low, high in documents(store, window)])
        for window in range(6)
    ]
    assert found is not None
    assert np.array_equal(found, expected)
    offsets = store.unit_labels(0, ["offset"])["offset"][:6]
    assert (offsets[:, 0] > 0).any()  # cut off from what the window before holds
    assert np.array_equal(document_positions(np.array([[7, 7, 9, 9, 9, 3]])), [[0, 1, 0, 1, 2, 0]])


def test_it_is_another_dataset_with_the_same_tokens(tmp_path, harvested):
    config = config_of(tmp_path, plan={"attend": "window"})
    plan, first = make_plan(config, open_store(config.root)), load_plan(open_store(harvested.root))
    assert plan.tokens_sha256 == first.tokens_sha256
    assert plan.fingerprint != first.fingerprint
    # As in plans made before the field existed.
    assert "attend" not in json.loads(plan.to_json())["spec"]
    assert HarvestPlan.from_json(first.to_json(), origin="plan").spec.attend == "document"
    assert dataset_info(open_store(harvested.root)).attend == "document"
    result = CliRunner().invoke(app, ["info", harvested.root])
    assert "its own document" in result.stdout
    with pytest.raises(PlanMismatch, match="attend"):
        make_plan(config, open_store(harvested.root))


def test_windows_of_another_dataset_may_be_attended_to_differently(tmp_path, harvested):
    raw = harvested.model_dump(mode="json", exclude={"corpus", "plan"}) | {
        "root": str(tmp_path / "data"),
        "plan": {"hooks": ["resid_post.1"], "tokens_from": harvested.root, "dtype": "float32"},
    }
    plan, _ = make_alone(Config.model_validate(raw))
    assert plan.spec.attend == "window"
    one, two = (
        ActivationStore.open(root).read_rows("resid_post.1", 0, 500) for root in (harvested.root, raw["root"])
    )
    assert not np.allclose(one, two, atol=1e-2)


def held_out_loss(root: str, subject: Subject, windows: int = 64, *, apart: bool = True) -> float:
    """Mean loss of the first windows, with documents kept apart or not."""
    store = ActivationStore.open(root)
    ids = torch.from_numpy(np.stack([store.tokens(window) for window in range(windows)]).astype(np.int64))
    return subject.loss(ids, positions=store.positions(range(windows)) if apart else None).mean().item()


def test_joined_datasets_attend_each_in_its_own_way(tmp_path, harvested, subject, monkeypatch):
    """Live rows of both are the stored ones, and each subject's figures are those of its own attention."""
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    raw = harvested.model_dump(mode="json", exclude_none=True, exclude={"corpus", "plan"})
    plan = {"hooks": ["resid_post.1"], "tokens_from": harvested.root, "dtype": "float32"}
    across = Config.model_validate({**raw, "root": str(tmp_path / "across"), "plan": plan})
    make_alone(across)
    roots = {"across": across.root, "apart": harvested.root}
    store, hooks = open_roots("", roots), tuple(f"{name}/resid_post.1" for name in roots)
    size = store.plan.rows_per_unit
    stored = np.concatenate([store.read_rows(hook, 0, size) for hook in hooks], axis=1)
    windows, places = store.locate(np.arange(size))
    runs = AcrossSubjects(dict.fromkeys(roots, subject), "apart", hooks, hooks, store)
    live = runs.clean(store, range(4), logits=False).rows.view(4, 48, -1).numpy()
    inside = windows < 4
    np.testing.assert_allclose(live[windows[inside], places[inside]], stored[inside], atol=2e-5, rtol=1e-4)
    assert not np.allclose(*np.split(stored[inside], 2, axis=1), atol=1e-2)
    config = tmp_path / "config.yaml"
    train = raw["train"] | {"hook": hooks[0], "with_hooks": [hooks[1]], "roots": roots, "epochs": 1}
    train |= {"normalize": "dataset", "out": str(tmp_path / "run")}
    config.write_text(yaml.safe_dump({"subject": raw["subject"], "train": train}), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(config), "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in roots:
        own = held_out_loss(harvested.root, subject, apart=name == "apart")
        assert told[f"ce_clean.{name}"] == pytest.approx(own, abs=1e-4), told
    assert told["ce_clean.apart"] != pytest.approx(told["ce_clean.across"], abs=1e-3)


def test_a_transcoder_set_attends_as_the_harvest_did(tmp_path, subject, monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    train = {"hook": None, "set": {"layers": [0, 2]}, "epochs": 1}
    config = config_of(tmp_path, plan={"hooks": ["resid_mid.0-2", "mlp_out.0-2"]}, train=train)
    make_alone(config)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "--json"])
    assert result.exit_code == 0, result.stderr
    spec = EvaluateSpec(windows=8, metrics=("downstream",))
    setting = open_setting(str(tmp_path / "run"), config.root, spec, subject=config.subject)
    found = {figure.id: figure.value for figure in sets.downstream(setting).figures}
    own = held_out_loss(config.root, subject, 8)
    assert found["ce_clean"] == pytest.approx(own, abs=1e-4)
    assert own != pytest.approx(held_out_loss(config.root, subject, 8, apart=False), abs=1e-3)


def test_prompts_of_circuits_are_windows_of_one_document(tmp_path, harvested, subject):
    with pytest.raises(ConfigError, match="windows of a single document"):
        held_out_windows(subject, harvested.root, 4, StorageSpec())
    config = config_of(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    long = [json.dumps({"text": f"{number} long text, " * 99}) for number in range(9)]
    # First, because planning reads no further than it needs.
    corpus.write_text("\n".join([*long, corpus.read_text()]))
    plan, _ = make_alone(config)
    found = held_out_windows(subject, config.root, 1000, StorageSpec())
    assert 0 < len(found) < len(plan.split_units("validation")) * plan.spec.windows_per_unit
    assert not (found[:, :-1] == plan.join_token).any()


@pytest.mark.parametrize("hook", ["resid_post.1", "mlp_out.0"])
def test_tails_and_whole_passes_agree(harvested, subject, hook):
    store = ActivationStore.open(harvested.root)
    ids = torch.from_numpy(np.stack([store.tokens(w) for w in range(3)]).astype(np.int64))
    positions = store.positions(range(3))
    tail = Tail(subject, hook)
    start = tail.start(ids, keep_cache=True, positions=positions)
    whole = subject.logits(ids, positions=positions)
    assert not torch.allclose(whole, subject.logits(ids), atol=1e-2)
    torch.testing.assert_close(start.logits, whole)
    halved = subject.logits(ids, {hook: lambda rows: rows / 2}, positions=positions)
    torch.testing.assert_close(tail.patched(start, lambda rows: rows / 2), halved)

    def change(rows):
        rows = rows.clone().view(3, ids.shape[1], -1)
        rows[1, 20] *= 2
        return rows.flatten(0, 1)

    one = tail.continued(start, 1, 20, 40, start.rows[1, 20][None] * 2)
    expected = subject.logits(ids, {hook: change}, positions=positions)[1, 20:40]
    torch.testing.assert_close(one[0], expected, atol=1e-4, rtol=1e-4)


def test_losses_are_those_of_documents_alone(harvested, subject, tmp_path):
    store = ActivationStore.open(harvested.root)
    runs = downstream.AtHook(Tail(subject, "resid_post.1"))
    losses = downstream.splice_losses(runs, store, range(5), {"same": lambda x, _: x})
    across = downstream.AcrossHooks(subject, ["resid_post.1"], ["resid_post.1"], store)
    again = downstream.splice_losses(across, store, range(5), {"same": lambda x, _: x})
    for window in range(5):
        ids = torch.from_numpy(store.tokens(window).astype(np.int64))
        logits = torch.cat([subject.logits(ids[None, low:high])[0] for low, high in documents(store, window)])
        own = torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()
        for found in (losses["clean"], losses["same"], again["clean"], again["same"]):
            assert found[window] == pytest.approx(own, abs=1e-4)


def test_an_evaluation_attends_as_the_harvest_did(harvested, subject, tmp_path):
    uri = save_sae(harvested, tmp_path / "sae", random_sae())
    spec = EvaluateSpec(windows=8, ablation_rows=3, ablation_latents=2, ablation_tokens=6)
    setting = Setting.open(uri, harvested.root, spec, subject=harvested.subject)
    found = {figure.id: figure.value for figure in downstream.measure(setting).figures}
    store = ActivationStore.open(harvested.root)
    ids = torch.from_numpy(np.stack([store.tokens(window) for window in range(8)]).astype(np.int64))
    own = subject.loss(ids, positions=store.positions(range(8))).mean().item()
    assert found["ce_clean"] == pytest.approx(own, abs=1e-4)
    assert own != pytest.approx(subject.loss(ids).mean().item(), abs=1e-3)
    low, high = documents(store, 2)[1]
    run = ablation._Passes(setting, 2, low)
    alone = subject.activations(ids[2:3, low:high], [HOOK])[HOOK][0, 0]
    torch.testing.assert_close(run.row, alone, atol=2e-5, rtol=1e-5)
    assert ablation.measure(setting).figures[0].value > 0


def test_the_explorer_reads_a_window_as_the_harvest_did(harvested, subject, tmp_path):
    store = ActivationStore.open(harvested.root)
    sae = Sae.load(save_sae(harvested, tmp_path / "sae", random_sae()))
    ids, positions = store.tokens(1).tolist(), store.positions([1])
    reading = read_tokens(subject, sae, ids, positions=positions, sink_multiple=1e9)
    for low, high in documents(store, 1):
        rows = subject.activations([ids[low:high]], [HOOK])[HOOK][0]
        values, _ = sae.encode(rows)
        torch.testing.assert_close(reading.values[max(low, 1) : high], values[max(low, 1) - low :])
    low, high = documents(store, 1)[1]
    latent = int(reading.indices[low, 0])
    found = ablate(subject, sae, reading, latent, positions=positions)
    # Past its document a latent changes nothing unless it is active there too.
    changed = np.array(found.kl) > 1e-9
    active = np.array(found.activation) > 0
    for first, end in documents(store, 1):
        if changed[first:end].any():
            assert active[first:end].any()


def test_a_subject_that_ignores_positions_is_refused_before_anything_is_written(tmp_path):
    config = config_of(tmp_path, plan={"hooks": ["resid_post.1"]})
    make_subject(tmp_path / "subject", "opt")
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "config.yaml")])
    assert result.exit_code == 2
    assert "does not keep the documents of a window apart" in result.stderr
    assert not Path(config.root).exists()
    subject = Subject.load(config.subject)
    ids = torch.arange(3, 19)[None]
    with pytest.raises(ConfigError, match="does not keep the documents"):
        subject.logits(ids, positions=torch.arange(16)[None] % 8)


def test_positions_that_do_not_count_are_refused(subject):
    ids = torch.arange(3, 11)[None]
    for wrong in ([[0, 1, 2, 4, 5, 6, 7, 8]], [[1, 2, 3, 4, 5, 6, 7, 8]], [[0, 1, 2]]):
        with pytest.raises(ConfigError, match="positions"):
            subject.activations(ids, ["resid_post.1"], positions=wrong)


def test_missing_labels_stop_the_harvest(tmp_path):
    config = config_of(tmp_path)
    plan = make_plan(config, open_store(config.root))
    Path(config.root, label_key("document", 1)).unlink()
    worker = UnitWorker(plan.to_json(), config.root, config.storage, config.subject, 1, 16)
    worker.run(0)
    with pytest.raises(Exception, match="label 'document' of unit 1 is missing"):
        worker.run(1)
