"""Sites of architectures outside the table: planned by name, proved by the harvest, stored, trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.pipeline import pipeline_config
from tests.support.tiny import make_subject
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import SubjectSpec
from winnow.store import ActivationStore
from winnow.subject import Subject

PLAN = {"hooks": ["attn_z.1", "mlp_in.1", "mlp_out.1"]}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def winnow(*arguments: object) -> tuple[int, str]:
    code, _, error = run(*arguments)
    return code, error


@pytest.mark.parametrize(
    ("architecture", "extra", "width"),
    [("gpt2", {}, 32), ("qwen3", {"head_dim": 16}, 64), ("granite", {"residual_multiplier": 1.0}, 32)],
)
def test_the_heads_width_is_known_without_weights(
    architecture: str, extra: dict[str, object], width: int, tmp_path: Path
) -> None:
    folder = make_subject(tmp_path, architecture, layers=2, **extra)
    subject = Subject.load(folder)
    (site,) = subject.sites(["attn_z.1"])
    assert site.d_model == width
    assert subject.activations(np.arange(16)[None], ["attn_z.1"])["attn_z.1"].shape == (1, 16, width)
    outline = Subject.outline(SubjectSpec(model=str(folder)), gpu=False)
    assert outline.sites(["attn_z.1"]) == (site,)


def test_found_sites_are_harvested_and_trained_on(tmp_path: Path) -> None:
    make_subject(tmp_path / "subject", "granite", layers=3, width=16, residual_multiplier=1.0)
    path = pipeline_config(tmp_path, units=2, plan=PLAN, train={"hook": "attn_z.1", "epochs": 1})
    code, error = winnow("harvest", path, "--single-writer", "--json")
    assert code == 0, error
    config = load_config(path)
    store, lm = ActivationStore.open(config.root), Subject.load(config.subject)
    windows, positions = store.locate(np.arange(40))
    tokens = np.stack([store.tokens(int(window)) for window in windows])
    expected = lm.activations(tokens, hooks=list(store.hooks))
    for hook in store.hooks:
        wanted = expected[hook].float().numpy()[np.arange(40), positions]
        np.testing.assert_allclose(store.read_rows(hook, 0, 40), wanted, rtol=2**-7, atol=1e-3)
    code, error = winnow("train", path, "--json")
    assert code == 0, error
    sae = Sae.load(str(tmp_path / "run"))
    assert sae.card is not None
    assert (sae.card.hook, sae.card.d_model) == ("attn_z.1", store.d_model("attn_z.1"))


def test_a_scaled_block_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """The plan, made without weights, takes the names' word; the harvest does not."""
    make_subject(tmp_path / "subject", "granite", layers=3, width=16, residual_multiplier=0.3)
    path = pipeline_config(tmp_path, units=2, plan=PLAN)
    code, error = winnow("harvest", path, "--single-writer")
    assert code == 2
    assert "where 'granite' has the projection of its heads is not known" in error
    assert not list((tmp_path / "data").rglob("receipts/*"))
    with pytest.raises(ConfigError, match="is not known"):
        Subject.load(tmp_path / "subject").sites(["mlp_in.1"])


def test_a_router_is_planned_harvested_derived_from_and_trained_on(tmp_path: Path) -> None:
    """Its rows are narrower than the stream; the families that replace them are left out."""
    make_subject(
        tmp_path / "subject", "mixtral", layers=2, width=16, num_local_experts=8, num_experts_per_tok=2
    )
    hooks = {"hooks": ["router.1", "resid_post.1"]}
    path = pipeline_config(
        tmp_path, units=2, plan=hooks, train={"hook": "router.1", "epochs": 1, "latents": 16, "k": 2}
    )
    code, forecast, _ = run("harvest", path, "--forecast", "--json")
    assert code == 0
    assert json.loads(forecast)["bytes_to_do"] >= 3 * 64 * 16 * (8 + 16) * 2
    code, error = winnow("harvest", path, "--single-writer", "--json")
    assert code == 0, error
    config = load_config(path)
    store = ActivationStore.open(config.root)
    assert (store.d_model("router.1"), store.d_model("resid_post.1")) == (8, 16)
    code, told, _ = run("info", config.root)
    assert code == 0
    assert "router.1" in told
    code, error = winnow("derive", config.root, tmp_path / "half", "--dtype", "float32", "--single-writer")
    assert code == 0, error
    assert ActivationStore.open(str(tmp_path / "half")).d_model("router.1") == 8
    code, error = winnow("train", path, "--json")
    assert code == 0, error
    few = ("--set", "evaluate.n2g_latents=1", "--set", "evaluate.n2g_examples=2")
    code, error = winnow(
        "evaluate", tmp_path / "run", "--config", path, "--metrics", "reconstruction,n2g", *few
    )
    assert code == 0, error
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["families"]["n2g"]
    assert {figure["id"] for figure in found["figures"]} == {"n2g_recall", "n2g_precision"}
    assert "not simulated: the rows at router.1 cannot be replaced" in found["notes"]
    code, error = winnow("evaluate", tmp_path / "run", "--config", path, "--metrics", "downstream")
    assert code == 2
    assert "the rows at router.1 cannot be replaced" in error


def test_a_router_of_a_dense_subject_is_refused(tmp_path: Path) -> None:
    path = pipeline_config(tmp_path, units=2, plan={"hooks": ["router.1"]})
    code, error = winnow("harvest", path, "--single-writer")
    assert code == 2
    assert "block 1 of 'llama' has no router of experts that is known" in error
    assert not (tmp_path / "data").exists()
