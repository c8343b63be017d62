"""Crosscoders evaluated: whose a latent is, on ones whose figures are known; delta CE in each subject."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support.evaluated import save_sae, stop_after, toy_config
from tests.support.planted import HOOK
from tests.support.roots import HOOKS, roots_config, write_base
from tests.support.tiny import make_subject
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.evaluator.families import downstream
from winnow.evaluator.families.diffing import Scaling, relative_norms
from winnow.evaluator.heldout import measure_in_subject
from winnow.evaluator.report import evaluate
from winnow.evaluator.setting import Codes, Setting
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.sae import Sae
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.evaluation import LOSSES_KEY
from winnow.schemas.training import SaeParts, TrainSpec
from winnow.store.objects import open_store
from winnow.store.read.joined import open_roots
from winnow.store.testing import make_plan, write_dataset
from winnow.subject import Subject
from winnow.trainer.run.loop import train

D = 8
SPEC = {"normalize": "none", "latents": 4, "k": 3, "hook": HOOKS[0], "with_hooks": list(HOOKS[1:])}
NO_SUBJECT = {"metrics": ["reconstruction", "diffing"]}
"""Synthetic datasets have none to run."""


def concepts(plan, unit, hook, *, chat: bool):
    """Four concepts, an axis each: of both, of the base, of the chat model, of both but weak in the base."""
    draw = np.random.default_rng([unit, 9])
    strength = draw.uniform(1, 2, (plan.rows_per_unit, 4)) * (draw.random((plan.rows_per_unit, 4)) < 0.4)
    scale = [1, 0, 1, 1] if chat else [1, 1, 0, 0.6]
    rows = np.zeros((plan.rows_per_unit, D), np.float32)
    rows[:, :4] = strength * scale
    return rows


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roots")
    for name in ("base", "chat"):
        plan = make_plan(3, hooks={HOOK: D}, dtype="float32", sink_multiple=1e6)
        chat = name == "chat"
        rows = lambda plan, unit, hook, chat=chat: concepts(plan, unit, hook, chat=chat)  # noqa: E731
        write_dataset(open_store(str(folder / name)), plan, rows)
    return {name: str(folder / name) for name in ("base", "chat")}


@torch.no_grad()
def crosscoder() -> Sae:
    """A latent per concept, read where it is; the weak one's direction in the base is lost."""
    sae = Sae(2 * D, 4, 3, "none", SaeParts(widths=(D, D)))
    where = {0: (0.5, 0.5), 1: (1, 0), 2: (0, 1), 3: (0, 1)}
    for latent, (base, chat) in where.items():
        sae.W_enc[latent, latent], sae.W_enc[latent, D + latent] = base, chat
        sae.W_dec[latent, latent], sae.W_dec[latent, D + latent] = base > 0, chat > 0
    return sae


def saved(roots, folder, sae=None) -> str:
    spec = TrainSpec.model_validate({**SPEC, "out": str(folder), "roots": roots})
    (sae or crosscoder()).save(open_store(str(folder)), hook=HOOKS[0], with_hooks=HOOKS[1:], spec=spec)
    return str(folder)


def test_latents_are_told_apart_and_shrunk_ones_found_out(roots, tmp_path):
    config = Config.model_validate({"root": roots["base"], "evaluate": NO_SUBJECT})
    found = evaluate(saved(roots, tmp_path), config, out=tmp_path / "out")
    assert set(found.families) == {"reconstruction", "diffing"}
    values = {figure.id: figure.value for figure in found.families["diffing"].figures}
    assert values["latents_shared"] == 0.25
    assert (values["latents_only.base"], values["latents_only.chat"]) == (0.25, 0.5)
    # Of the two of the chat model, 2 is absent from the base; 3 is there, 0.6 as strong, in its error.
    assert values["latents_specific.base"] == 1
    assert values["latents_specific.chat"] == 0.5
    details = found.families["diffing"].details
    scaling = {line["latent"]: line["scaling_error"] for line in details["top"]["chat"]}
    assert scaling[2] == pytest.approx(0, abs=0.01)
    assert scaling[3] == pytest.approx(0.6, abs=0.01)
    assert sum(details["relative_norm_latents"]["chat"]) == 4
    assert details["parts"] == {"base": HOOKS[0], "chat": HOOKS[1]}
    # What is lost in the base is an error of the base alone.
    fvu = {figure.id: figure.value for figure in found.families["reconstruction"].figures}
    assert fvu["fvu_raw.base"] > 3 * fvu["fvu_raw.chat"]


@torch.no_grad()
def test_a_latent_that_is_not_found_at_home_is_not_specific_to_it(roots, tmp_path):
    sae = crosscoder()
    # its direction points away from what it reads: beta of the error is -1 at home and 0 in the base
    sae.W_dec[2, D + 2] = -1
    config = Config.model_validate({"root": roots["base"], "evaluate": NO_SUBJECT})
    found = evaluate(saved(roots, tmp_path, sae), config, out=tmp_path / "out")
    figures = {figure.id: figure for figure in found.families["diffing"].figures}
    assert (figures["latents_specific.chat"].value, figures["latents_specific.chat"].samples) == (0, 2)
    error = figures["latent_scaling_error.chat"]
    assert (error.value, error.samples) == (pytest.approx(0.6, abs=0.01), 1)
    assert error.note == "1 of 2 latents left out: their beta at home is not above 0"
    (line,) = [each for each in found.families["diffing"].details["top"]["chat"] if each["latent"] == 2]
    assert "scaling_error" not in line


def test_the_scaling_is_the_least_squares_solution():
    draw = torch.Generator().manual_seed(0)
    sae = Sae(2 * D, 12, 4, "none", SaeParts(widths=(D, D)))
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec, sae.b_pre):
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
        x = torch.randn(300, 2 * D, generator=draw)
        values, indices = sae.encode(x)
        scaling, size = Scaling(sae), 100
        for low in range(0, 300, size):
            part = slice(low, low + size)
            none = np.zeros(size, np.int64)
            scaling.add(Codes(x[part], torch.ones(size), none, none, values[part], indices[part]))
        dense = torch.zeros(300, 12).scatter(1, indices, values)
        errors, given = (x - sae(x)).split(D, 1), (sae(x) - sae.b_pre).split(D, 1)
    both, decoders = scaling.betas(), sae.W_dec.detach().split(D, 1)
    for latent in range(12):
        home = decoders[scaling.home[latent]][latent]
        a = (dense[:, latent, None] * home).flatten()[:, None].double()
        for part in range(2):
            own = dense[:, latent, None] * decoders[part][latent]
            for beta, y in zip(both, (errors[part] + own, given[part]), strict=True):
                wanted = torch.linalg.lstsq(a, y.flatten()[:, None].double()).solution.item()
                assert beta[latent, part].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_relative_norms_are_shares():
    sae = crosscoder()
    norms = relative_norms(sae)
    assert norms.tolist() == [[0.5, 0.5], [1, 0], [0, 1], [0, 1]]


def test_parts_of_different_widths_have_no_latent_scaling(tmp_path):
    config = load_config(roots_config(tmp_path, epochs=1))
    train(config)
    evaluation = config.evaluate.model_copy(update={"metrics": ("reconstruction", "diffing")})
    config = config.model_copy(update={"evaluate": evaluation})
    found = evaluate(tmp_path / "run", config)
    family = found.families["diffing"]
    assert "different widths" in family.notes[0]
    assert [figure.id for figure in family.figures] == [
        "latents_shared",
        "latents_only.base",
        "latents_only.chat",
    ]
    assert found.reads == HOOKS
    # Again: nothing is measured twice.
    assert evaluate(tmp_path / "run", config) == found


def test_other_saes_have_no_diffing_and_say_so(tmp_path):
    root = write_base(tmp_path, 3)
    sae = Sae(32, 8, 2, "none")
    sae.save(open_store(str(tmp_path / "sae")), hook=HOOK)
    config = Config.model_validate({"root": root, "evaluate": {"metrics": ["diffing"]}})
    with pytest.raises(ConfigError, match="expected a crosscoder"):
        evaluate(tmp_path / "sae", config)


def test_roots_of_another_width_or_hook_are_refused(roots, tmp_path):
    sae = saved(roots, tmp_path / "sae")
    wide = write_base(tmp_path, 3)
    train = {**SPEC, "out": "x", "roots": {"base": wide, "chat": wide}}
    with pytest.raises(SaeMismatch, match="width D"):
        evaluate(sae, Config.model_validate({"train": train}))


# Two real subjects


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Configs of two subjects on the same windows, harvested."""
    folder = tmp_path_factory.mktemp("pair")
    base = toy_config(folder / "base")
    make_subject(folder / "chat", "llama", layers=3, width=24, seed=4)
    fields = {"root": str(folder / "chat-data"), "corpus": None}
    fields["subject"] = base.subject.model_copy(update={"model": str(folder / "chat")})
    plan = {"hooks": ["resid_post.1"], "tokens_from": base.root}
    chat = Config.model_validate(base.model_dump(mode="json") | {"plan": plan} | _json(fields))
    store = open_store(chat.root)
    harvest(chat, store, ensure_plan(chat, store))
    return base, chat


def _json(fields):
    return {
        key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in fields.items()
    }


@torch.no_grad()
def identity(widths: tuple[int, ...]) -> Sae:
    """Gives back what it reads."""
    width = sum(widths)
    sae = Sae(width, 2 * width, 2 * width, "none", SaeParts(widths=widths))
    eye = torch.eye(width)
    sae.W_enc.copy_(torch.cat([eye, -eye]))
    sae.W_dec.copy_(sae.W_enc)
    return sae


def real(pair, folder, sae) -> tuple[Config, str]:
    base, chat = pair
    train = {**SPEC, "latents": 80, "out": str(folder), "roots": {"base": base.root, "chat": chat.root}}
    config = Config.model_validate({"root": base.root, "train": train, "evaluate": {"windows": 8}})
    sae.save(open_store(str(folder)), hook=HOOKS[0], with_hooks=HOOKS[1:], spec=config.train)
    return config, str(folder)


def test_giving_rows_back_costs_neither_subject_anything(pair, tmp_path):
    _, uri = real(pair, tmp_path, identity((16, 24)))
    done = CliRunner().invoke(
        app, ["evaluate", uri, "--metrics", "downstream,reconstruction", "--windows", "8", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["families"]
    figures = {figure["id"]: figure["value"] for figure in found["downstream"]["figures"]}
    for name in ("base", "chat"):
        assert figures[f"delta_ce.{name}"] == pytest.approx(0, abs=1e-5)
        assert figures[f"loss_recovered_zero.{name}"] == pytest.approx(1, abs=1e-2)
    assert figures["ce_clean.base"] != figures["ce_clean.chat"]


def test_each_subject_is_spliced_alone(pair, tmp_path):
    base, chat = pair
    sae = identity((16, 24))
    with torch.no_grad():
        sae.W_dec[:, 16:] = 0  # the chat model's rows come out as zeros
    config, uri = real(pair, tmp_path, sae)
    setting = Setting.open(uri, base.root, config.evaluate)
    figures = measure_in_subject(config, Sae.load(uri), open_roots("", config.train.roots), HOOKS[0])
    assert figures["delta_ce.base"] == pytest.approx(0, abs=1e-5)
    subject = Subject.load(chat.subject)
    zeroed, clean = [], []
    for window in setting.windows:
        tokens = setting.dataset.tokens(window)[None]
        keep = torch.from_numpy(setting.dataset.window_weights(HOOKS, [window]) > 0).reshape(-1, 1)
        splice = {HOOK: lambda x, keep=keep: torch.where(keep, torch.zeros_like(x), x)}
        zeroed.append(subject.loss(tokens, splice).mean().item())
        clean.append(subject.loss(tokens).mean().item())
    assert figures["delta_ce.chat"] == pytest.approx(np.mean(zeroed) - np.mean(clean), abs=1e-5)
    assert figures["delta_ce.chat"] != pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("batches", [1, 3])  # of four windows: in the first subject, in the second
def test_a_killed_delta_ce_of_two_subjects_resumes_in_either(pair, tmp_path, monkeypatch, told, batches):
    base, _ = pair
    config, uri = real(pair, tmp_path / "sae", identity((16, 24)))
    out, joined = open_store(uri), open_roots("", config.train.roots)
    whole = measure_in_subject(config, Sae.load(uri), joined, HOOKS[0])
    stop_after(monkeypatch, downstream.AcrossSubjects, "clean", batches)
    with pytest.raises(KeyboardInterrupt):
        measure_in_subject(config, Sae.load(uri), joined, HOOKS[0], out)
    told.clear()
    assert measure_in_subject(config, Sae.load(uri), joined, HOOKS[0], out) == whole
    name = "base" if batches == 1 else "chat"
    assert [line for line in told if "resuming" in line] == [
        f"delta CE of {name}: resuming after 4 windows of 8"
    ]
    # what `winnow evaluate` asks for is the same by another name: it does not take these
    found = evaluate(
        uri, Config.model_validate({"root": base.root, "evaluate": {"windows": 8, "metrics": ["downstream"]}})
    )
    assert found.figure("delta_ce.chat").value == whole["delta_ce.chat"]
    assert out.size(LOSSES_KEY) is None


def test_subjects_that_have_moved_are_found_and_others_refused(pair, tmp_path):
    base, chat = pair
    config, uri = real(pair, tmp_path / "sae", identity((16, 24)))
    shutil.copytree(chat.subject.model, tmp_path / "elsewhere")

    def measured(**subjects):
        spec = {"windows": 4, "metrics": ["downstream"], "subjects": subjects}
        raw = {"root": base.root, "train": config.train.model_dump(), "evaluate": spec}
        return evaluate(uri, Config.model_validate(raw), again=True)

    found = measured(chat=str(tmp_path / "elsewhere"))
    assert found.figure("delta_ce.chat").value == pytest.approx(0, abs=1e-5)
    with pytest.raises(SaeMismatch, match="subject"):
        measured(chat=base.subject.model)
    with pytest.raises(ConfigError, match="names of base, chat"):
        measured(other=base.subject.model)


def test_a_crosscoder_of_one_subject_is_evaluated_too(tmp_path):
    config = toy_config(tmp_path / "toy")
    parts = ("resid_post.1", "mlp_out.0")
    uri = save_sae(config, tmp_path / "sae", identity((16, 16)), hook=parts[0], with_hooks=parts[1:])
    found = evaluate(
        uri, config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"windows": 4})})
    )
    assert list(found.families) == ["reconstruction", "downstream", "diffing"]
    assert found.figure("delta_ce").value == pytest.approx(0, abs=1e-5)
    assert found.figure("latents_only.resid_post_1").value == pytest.approx(0.5, abs=0.1)
    assert found.figure("fvu_raw.mlp_out_0").value == pytest.approx(0, abs=1e-6)
