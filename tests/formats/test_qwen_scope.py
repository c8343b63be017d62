"""Qwen-Scope's layout, written out here: read, written, and refused in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.formats.test_by_hand import Trap, keep_best
from tests.support.making import LARGEST_ERROR, D, K, N, error, make_sae, rows, save
from winnow.cli.main import app
from winnow.sae import Sae
from winnow.sae.formats.convert import export_sae, import_sae
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError

LAYER = 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_import(source, name, tmp_path, *more):
    args = ["import", str(source), "--from", name, "--out", str(tmp_path / "ours"), *more]
    return CliRunner().invoke(app, args)


# ---- Qwen-Scope ------------------------------------------------------------------------------------


def qwen_state():
    return {
        "W_enc": draw(N, D),
        "b_enc": draw(N, seed=1),
        "W_dec": draw(D, N, seed=2),
        "b_dec": 3 * draw(D, seed=3),
    }


QWEN = {"model_type": "topk_sae", "base_model": "some/Model", "d_model": D, "d_sae": N, "k": K}
QWEN |= {"num_layers": 28, "hook_point": "resid_post", "dtype": "float32"}


def qwen_files(folder, state=None, config=QWEN):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(qwen_state() if state is None else state, folder / f"layer{LAYER}.sae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / f"layer{LAYER}.sae.pt"


def as_qwen(state, x, k=K):
    """Its page's arithmetic, but that no code is negative."""
    z = keep_best(x @ state["W_enc"].T + state["b_enc"], k).relu()
    return z @ state["W_dec"].T + state["b_dec"]


@pytest.mark.parametrize("whole_folder", [False, True])
def test_qwen_scope_is_read(tmp_path, whole_folder):
    file, x = qwen_files(tmp_path / "theirs"), rows()
    card = import_sae(file.parent if whole_folder else file, "qwen-scope", str(tmp_path / "ours"))
    assert (card.hook, card.k, card.parts.activation) == (f"resid_post.{LAYER}", K, "topk")
    assert error(Sae.load(tmp_path / "ours")(x), as_qwen(qwen_state(), x)) < LARGEST_ERROR


def test_qwen_scope_takes_k_from_the_published_folder_s_name(tmp_path):
    file = qwen_files(tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", config=None)
    assert import_sae(file, "qwen-scope", str(tmp_path / "ours")).k == 50
    (file.parent / "config.json").write_text(json.dumps({"k": 100}))
    with pytest.raises(ConfigError, match="100, 50"):
        import_sae(file, "qwen-scope", str(tmp_path / "again"))


@pytest.mark.parametrize("normalize", ["none", "dataset"])
def test_qwen_scope_is_written_and_read_back(tmp_path, normalize):
    sae, x = make_sae(normalize=normalize), rows()
    export_sae(save(sae, tmp_path / "ours"), "qwen-scope", tmp_path / "theirs")
    state = torch.load(tmp_path / "theirs/layer9.sae.pt", weights_only=True)
    assert error(as_qwen(state, x), sae(x)) < LARGEST_ERROR
    card = import_sae(tmp_path / "theirs", "qwen-scope", str(tmp_path / "back"))
    assert (card.hook, card.k) == ("resid_post.9", K)
    assert error(Sae.load(tmp_path / "back")(x), sae(x)) < LARGEST_ERROR


@pytest.mark.parametrize(
    ("kind", "hook", "says"),
    [
        ({"activation": "batchtopk"}, "resid_post.9", "TopK only"),
        ({"normalize": "layer"}, "resid_post.9", "layer-normed"),
        ({"d_out": D}, "resid_post.9", "transcoder"),
        ({}, "mlp_out.9", "resid_post only"),
    ],
    ids=str,
)
def test_what_qwen_scope_cannot_hold_is_refused(tmp_path, kind, hook, says):
    uri = save(make_sae(**kind), tmp_path / "ours", hook=hook)
    with pytest.raises(ConfigError, match=says):
        export_sae(uri, "qwen-scope", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"W_dec": draw(N, D)}, IntegrityError, "W_dec does not fit"),
        ({"W_enc": draw(N)}, IntegrityError, "a matrix"),
        ({"b_enc": draw(D)}, IntegrityError, "b_enc does not fit"),
        ({"b_dec": None}, IntegrityError, "b_dec"),
        ({"threshold": draw(N)}, ConfigError, "threshold"),
        ({"W_enc": draw(N, D) * float("nan")}, NonFiniteError, "W_enc"),
    ],
    ids=str,
)
def test_damaged_qwen_scope_files_are_refused_in_a_sentence(tmp_path, change, kind, says):
    state = {name: value for name, value in (qwen_state() | change).items() if value is not None}
    file = qwen_files(tmp_path / "theirs", state)
    with pytest.raises(kind, match=says):
        import_sae(file, "qwen-scope", str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "number of active latents"),
        (QWEN | {"k": "many"}, "number of active latents"),
        (QWEN | {"d_sae": N + 1}, "d_sae"),
        (QWEN | {"hook_point": "mlp_out"}, "hook_point"),
        (QWEN | {"model_type": "gated_sae"}, "model_type"),
    ],
    ids=str,
)
def test_a_qwen_scope_config_that_does_not_fit_is_refused(tmp_path, config, says):
    result = run_import(qwen_files(tmp_path / "theirs", config=config), "qwen-scope", tmp_path)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_a_folder_of_many_qwen_scope_layers_asks_for_one_of_them(tmp_path):
    file = qwen_files(tmp_path / "theirs")
    (file.parent / "layer11.sae.pt").write_bytes(file.read_bytes())
    result = run_import(file.parent, "qwen-scope", tmp_path)
    assert result.exit_code == 2
    assert "layer11.sae.pt" in result.output


def test_a_qwen_scope_file_that_wants_to_run_code_is_refused_and_does_not(tmp_path):
    file = qwen_files(tmp_path / "theirs", {"W_enc": Trap(tmp_path / "sprung")})
    result = run_import(file, "qwen-scope", tmp_path)
    assert result.exit_code == 2
    assert "would run code" in result.output
    assert not (tmp_path / "sprung").exists()


def test_another_format_s_reader_names_qwen_scope(tmp_path):
    result = run_import(qwen_files(tmp_path / "theirs"), "openai", tmp_path)
    assert result.exit_code == 2
    assert "--from qwen-scope" in result.output
