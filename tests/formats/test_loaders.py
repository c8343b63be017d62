"""SAELens' own loaders of public collections and Winnow, on the same files: `make test-formats`.

The files are small and laid out as published; instead of a download, the loaders are given their folder.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.formats.test_llama_scope import HOOK, NORMS, llama_files, llama_state
from tests.formats.test_qwen_scope import QWEN, draw, qwen_files
from tests.support.making import LARGEST_ERROR, D, N, dense, error, rows
from winnow.sae import Sae
from winnow.sae.formats.convert import import_sae

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("the peers' libraries are not here: `make test-formats`", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture
def lens(tmp_path, monkeypatch):
    """Loads an SAE as SAELens does what its registry lists, from `tmp_path` in place of the hub."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def fetch(repo_id, filename, subfolder="", **_):
        return str(Path(tmp_path, subfolder, filename))

    def shapes(repo_id, filename):
        return {n: list(t.shape) for n, t in safetensors.torch.load_file(tmp_path / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", fetch)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)

    def load(name, repo, path, factor=None, **overrides):
        overrides = {"dtype": "float32", "device": "cpu", **overrides}
        load = loaders.NAMED_PRETRAINED_SAE_LOADERS[name]
        found, state, _ = load(repo, path, device="cpu", cfg_overrides=overrides)
        found = loaders.handle_config_defaulting(found)
        settings = SAE.get_sae_config_class_for_architecture(found["architecture"]).from_dict(found)
        sae = SAE.get_sae_class_for_architecture(settings.architecture())(settings)
        sae.process_state_dict_for_loading(state)
        sae.load_state_dict(state)
        if factor is not None:
            assert found["normalize_activations"] == "expected_average_only_in"
            sae.fold_activation_norm_scaling_factor(factor)
        return sae.requires_grad_(False)

    return load


def imported(source, name, tmp_path, **options):
    import_sae(source, name, str(tmp_path / "ours"), **options)
    return Sae.load(tmp_path / "ours")


SIZES = {"d_in": D, "d_sae": N}


def test_qwen_scope(tmp_path, lens):
    file, x = qwen_files(tmp_path), rows()
    theirs = lens(
        "qwen_scope",
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
        file.name,
        activation_fn_kwargs={"k": QWEN["k"]},
        **SIZES,
    )
    ours = imported(file, "qwen-scope", tmp_path)
    assert error(ours(x), theirs(x)) < LARGEST_ERROR
    assert error(dense(*ours.encode(x)), theirs.encode(x)) < LARGEST_ERROR


@pytest.mark.parametrize("kind", ["resid_post", "transcoder", "transcoder_affine"])
def test_gemma_scope_2(tmp_path, lens, kind):
    folder = f"{kind.partition('_affine')[0]}/layer_4_width_16k_l0_big{'_affine' * kind.endswith('affine')}"
    state = {"w_enc": draw(D, N), "b_enc": draw(N, seed=1), "threshold": draw(N, seed=2).abs()}
    state |= {"w_dec": draw(N, D, seed=3), "b_dec": draw(D, seed=4)}
    if kind.endswith("affine"):
        state["affine_skip_connection"] = draw(D, D, seed=5)
    (tmp_path / folder).mkdir(parents=True)
    safetensors.torch.save_file(state, tmp_path / folder / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}
    config["affine_connection"] = kind.endswith("affine")
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    theirs, x = lens("gemma_3", "google/gemma-scope-2-1b-pt", folder), rows()
    ours = imported(tmp_path / folder, "gemma-scope", tmp_path)
    assert error(ours(x), theirs(x)) < LARGEST_ERROR
    assert error(dense(*ours.encode(x)), theirs.encode(x)) < LARGEST_ERROR
    assert ours.has_target == (kind != "resid_post")


def test_gemma_scope(tmp_path, lens):
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_4/width_16k/average_l0_9"
    folder.mkdir(parents=True)
    state = {"W_enc": draw(D, N), "b_enc": draw(N, seed=1), "threshold": draw(N, seed=2).abs()}
    state |= {"W_dec": draw(N, D, seed=3), "b_dec": draw(D, seed=4)}
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    path = folder.relative_to(tmp_path).as_posix()
    theirs, x = lens("gemma_2", "google/gemma-scope-2b-pt-res", path, **SIZES), rows()
    assert error(imported(folder, "gemma-scope", tmp_path)(x), theirs(x)) < LARGEST_ERROR
    assert torch.equal(Sae.load(tmp_path / "ours").W_dec, state["W_dec"])


@pytest.mark.parametrize("layout", ["first", "distilled"])
def test_llama_scope(tmp_path, lens, layout):
    """With rows of norm 1, since SAELens compares codes with thresholds whatever their rows' norms are."""
    state = llama_state()
    state["W_D"] = torch.nn.functional.normalize(state["W_D"], dim=1)
    first = {
        "dataset_average_activation_norm": dict.fromkeys(NORMS, NORMS["in"]),
        "jump_relu_threshold": 60.0,
    }
    llama_files(tmp_path / "theirs", layout, state, **(first if layout == "first" else {}))
    name = "llama_scope" if layout == "first" else "llama_scope_r1_distill"
    factor, x = D**0.5 / NORMS["in"], rows(spread=50.0)
    theirs = lens(name, "fnlp/any", "theirs", factor, **SIZES)
    ours = imported(tmp_path / "theirs", "llama-scope", tmp_path)
    assert error(ours(x), theirs(x)) < LARGEST_ERROR
    # Its codes are those of rows times the factor.
    codes = factor * dense(*ours.encode(x))
    assert error(codes, theirs.encode(x)) < LARGEST_ERROR
    assert 0.02 < (codes > 0).float().mean() < 0.6
    assert theirs.cfg.metadata.hook_name == HOOK
