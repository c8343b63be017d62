"""Crosscoders of other libraries, from and to their published layouts, written out here."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from tests.formats.test_qwen_scope import draw, run_import
from tests.support.making import K, N, dense, error
from winnow.sae import Sae
from winnow.sae.formats.convert import export_sae, import_sae
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError
from winnow.schemas.training import SaeParts
from winnow.store.objects import open_store

H, D = 3, 16
HOOKS = ("resid_post.1", "resid_post.5", "resid_post.9")
LARGEST_ERROR = 1e-5
NORMS = ["CROSSCODER", "SAE", "MIXED", "NONE"]


def rows():
    return 4 * (draw(64, H * D, seed=9) + 0.4)


# ---- dictionary_learning's, of science-of-finetuning -----------------------------------------------


def state_of(norm="CROSSCODER", threshold=12.0, normalised=False):
    state = {
        "encoder.weight": draw(H, D, N),
        "encoder.bias": draw(N, seed=1),
        "decoder.weight": draw(H, N, D, seed=2) * draw(1, N, 1, seed=3).abs(),
        "decoder.bias": 3 * draw(H, D, seed=4),
        "code_normalization_id": torch.tensor([*NORMS, "DECOUPLED"].index(norm) + 1),
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(threshold),
        "target_rms": torch.tensor(1.0),
        "activation_mean": torch.full((H, D), torch.nan),
        "activation_std": torch.full((H, D), torch.nan),
        "activation_global_scale": torch.ones(H),
    }
    if normalised:
        state["activation_mean"] = 2 * draw(H, D, seed=5)
        state["activation_std"] = draw(H, D, seed=6).abs() + 1
        variance = state["activation_std"].square().sum(1)
        state["activation_global_scale"] = 1 / (variance + 1e-8).sqrt()
    return state


def encode(state, x):
    """Codes [B, N] of rows [B, H, D], before and after what BatchTopKCrossCoder compares."""
    if not state["activation_mean"].isnan().any():
        x = (x - state["activation_mean"]) * state["activation_global_scale"][:, None]
    z = (torch.einsum("bhd,hdn->bn", x, state["encoder.weight"]) + state["encoder.bias"]).relu()
    W = state["decoder.weight"]
    summed, joined = W.norm(dim=2).sum(0), W.norm(dim=(0, 2))
    norms = (summed, joined, joined + 0.1 * summed, torch.ones(N))[int(state["code_normalization_id"]) - 1]
    return z * (z * norms > state["threshold"]) if "threshold" in state else z


def reconstruct(state, x):
    out = torch.einsum("bn,hnd->bhd", encode(state, x), state["decoder.weight"]) + state["decoder.bias"]
    if not state["activation_mean"].isnan().any():
        out = out / (state["activation_global_scale"][:, None] + 1e-8) + state["activation_mean"]
    return out


def write(folder, state, suffix="safetensors", **config):
    folder.mkdir(exist_ok=True)
    if suffix == "pt":
        torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, folder / "model_final.pt")
        return folder / "model_final.pt"
    safetensors.torch.save_file(state, folder / "model.safetensors")
    facts = {"activation_dim": D, "dict_size": N, "num_layers": H, **config}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_batchtopk_crosscoders_are_read(tmp_path, norm, normalised, suffix):
    state = state_of(norm, 1.0 if normalised else 12.0, normalised)
    x = rows()
    source = write(tmp_path / "theirs", state, suffix)
    card = import_sae(source, "crosscoder", str(tmp_path / "ours"), hook=",".join(HOOKS))
    ours, expected = Sae.load(tmp_path / "ours"), reconstruct(state, x.view(-1, H, D))
    assert (card.input_hooks, card.parts.widths, card.k) == (HOOKS, (D, D, D), K)
    codes = encode(state, x.view(-1, H, D))
    assert 0.02 < (codes > 0).float().mean() < 0.9
    assert error(dense(*ours.encode(x)), codes) < LARGEST_ERROR
    assert error(ours(x), expected.flatten(1)) < LARGEST_ERROR


def test_a_crosscoder_of_an_older_version_is_a_relu_without_a_norm(tmp_path):
    state, x = state_of(), rows()
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    source = write(tmp_path / "theirs", {name: state[name] for name in names}, "pt")
    card = import_sae(source, "crosscoder", str(tmp_path / "ours"))
    assert card.parts.activation == "relu"
    assert card.input_hooks == ("unknown",) * H
    del state["threshold"]
    expected = reconstruct(state, x.view(-1, H, D)).flatten(1)
    assert error(Sae.load(tmp_path / "ours")(x), expected) < LARGEST_ERROR


def make_crosscoder(activation, normalize):
    sae = Sae(H * D, N, K, normalize, SaeParts(activation=activation, widths=(D,) * H))
    noise = torch.Generator().manual_seed(7)
    tensors = {name: 0.3 * torch.randn(t.shape, generator=noise) for name, t in sae.tensors().items()}
    if normalize == "dataset":
        tensors |= {"input_scale": torch.tensor([5.0, 11.0, 23.0]), "input_mean": draw(H * D, seed=8)}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs() + 0.1
    sae.fill(tensors)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("activation", ["batchtopk", "relu"])
@pytest.mark.parametrize("normalize", ["none", "dataset"])
def test_our_crosscoders_are_written_and_read_back(tmp_path, activation, normalize):
    sae, x = make_crosscoder(activation, normalize), rows()
    sae.save(open_store(str(tmp_path / "ours")), hook=HOOKS[0], with_hooks=HOOKS[1:])
    export_sae(str(tmp_path / "ours"), "crosscoder", tmp_path / "theirs")
    state = load_file(tmp_path / "theirs/model.safetensors")
    assert error(reconstruct(state, x.view(-1, H, D)).flatten(1), sae(x)) < LARGEST_ERROR
    card = import_sae(tmp_path / "theirs", "crosscoder", str(tmp_path / "back"))
    assert card.input_hooks == HOOKS
    assert error(Sae.load(tmp_path / "back")(x), sae(x)) < LARGEST_ERROR


@pytest.mark.parametrize("norm", ["CROSSCODER", "SAE"])
def test_thresholds_that_come_of_a_norm_go_back_to_it(tmp_path, norm):
    state, x = state_of(norm), rows()
    import_sae(write(tmp_path / "theirs", state), "crosscoder", str(tmp_path / "ours"))
    export_sae(str(tmp_path / "ours"), "crosscoder", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again["code_normalization_id"] == state["code_normalization_id"]
    torch.testing.assert_close(again["threshold"], state["threshold"])
    assert error(*(reconstruct(s, x.view(-1, H, D)).flatten(1) for s in (again, state))) < LARGEST_ERROR


def test_what_cannot_be_exported_is_refused(tmp_path):
    for name, activation, normalize, says in (
        ("crosscoder", "topk", "none", "TopK"),
        ("crosscoder", "jumprelu", "none", "threshold for each latent"),
        ("saelens", "relu", "none", "--to|crosscoder"),
    ):
        folder = tmp_path / f"{name}-{activation}"
        sae = make_crosscoder(activation, normalize)
        sae.save(open_store(str(folder)), hook=HOOKS[0], with_hooks=HOOKS[1:])
        with pytest.raises(ConfigError, match=says):
            export_sae(str(folder), name, tmp_path / f"out-{name}-{activation}")


@pytest.mark.parametrize(
    ("change", "config", "kind", "says"),
    [
        ({"encoder.weight": draw(D, N)}, {}, IntegrityError, "hooks, D, N"),
        ({"decoder.weight": draw(H, D, N)}, {}, IntegrityError, r"decoder\.weight"),
        ({"decoder.bias": draw(H * D)}, {}, IntegrityError, r"decoder\.bias"),
        ({"encoder.bias": None}, {}, IntegrityError, r"encoder\.bias"),
        ({"W_skip": draw(D, D)}, {}, ConfigError, "W_skip"),
        ({"encoder.weight": draw(H, D, N) * float("inf")}, {}, NonFiniteError, "W_enc"),
        ({"threshold": torch.tensor(-1.0)}, {}, ConfigError, "no threshold.*every positive latent is active"),
        ({"code_normalization_id": torch.tensor(5)}, {}, ConfigError, "DECOUPLED"),
        ({"code_normalization_id": torch.tensor(9)}, {}, ConfigError, "1 to 5"),
        ({}, {"code_normalization": "SAE"}, ConfigError, "code_normalization"),
        ({}, {"dict_size": N + 1}, ConfigError, "dict_size"),
        ({}, {"encoder_layers": [2, 1, 0]}, ConfigError, "encoder_layers"),
        ({}, {"k": K + 1}, ConfigError, ": k"),
    ],
    ids=str,
)
def test_damaged_crosscoders_are_refused_in_a_sentence(tmp_path, change, config, kind, says):
    state = {name: value for name, value in (state_of() | change).items() if value is not None}
    source = write(tmp_path / "theirs", state, **config)
    with pytest.raises(kind, match=says):
        import_sae(source, "crosscoder", str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_a_crosscoder_takes_as_many_hooks_as_it_has(tmp_path):
    source = write(tmp_path / "theirs", state_of())
    result = run_import(source, "crosscoder", tmp_path, "--hook", "resid_post.1")
    assert result.exit_code == 2
    assert "3 hooks" in result.output
    result = run_import(source, "crosscoder", tmp_path, "--hook", ",".join(HOOKS))
    assert result.exit_code == 0
    assert "crosscoder" in result.output


def test_a_crosscoder_s_files_are_told_from_those_of_other_formats(tmp_path):
    folder = write(tmp_path / "theirs", state_of())
    torch.save(state_of(), tmp_path / "lone.pt")
    for name in ("openai", "saelens", "dictionary_learning", "gemma-scope"):
        for source in (folder, folder / "model.safetensors", tmp_path / "lone.pt"):
            result = run_import(source, name, tmp_path)
            assert result.exit_code == 2
            assert "--from crosscoder" in result.output


# ---- Gemma Scope 2's -------------------------------------------------------------------------------

M = N // H
LAYERS = (5, 9, 12)
CONFIG = {"type": "crosscoder", "architecture": "jump_relu", "model_name": "google/gemma-3-270m-pt"}
CONFIG |= {"width": N, "l0": 150, "affine_connection": False}
CONFIG |= {f"hf_hook_point_{side}": "model.layers.{5,9,12}.output" for side in ("in", "out")}


def gemma_files(folder, config=CONFIG, change=None):
    folder.mkdir(parents=True)
    files = []
    for hook in range(H):
        state = {"w_enc": draw(D, M, seed=hook), "b_enc": draw(M, seed=10 + hook)}
        state |= {"threshold": draw(M, seed=20 + hook).abs(), "b_dec": draw(D, seed=30 + hook)}
        state["w_dec"] = draw(M, H, D, seed=40 + hook)
        if hook == 1:
            state |= change or {}
        files.append({name: value for name, value in state.items() if value is not None})
        safetensors.torch.save_file(files[-1], folder / f"params_layer_{hook}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return files


def as_gemma(files, x):
    out = torch.stack([state["b_dec"] for state in files]).expand(len(x), H, D).clone()
    for hook, state in enumerate(files):
        pre = x.view(-1, H, D)[:, hook] @ state["w_enc"] + state["b_enc"]
        z = pre.relu() * (pre > state["threshold"])
        out += torch.einsum("bm,mhd->bhd", z, state["w_dec"])
    return out.flatten(1)


@pytest.mark.parametrize("config", [CONFIG, None], ids=["config", "folder"])
def test_gemma_scope_2_crosscoders_are_read(tmp_path, config):
    folder, x = tmp_path / "layer_5_9_12_width_1m_l0_big", rows()
    files = gemma_files(folder, config)
    card = import_sae(folder, "gemma-scope", str(tmp_path / "ours"))
    assert card.input_hooks == tuple(f"resid_post.{layer}" for layer in LAYERS)
    assert (card.latents, card.parts.widths) == (N, (D, D, D))
    assert error(Sae.load(tmp_path / "ours")(x), as_gemma(files, x)) < LARGEST_ERROR


@pytest.mark.parametrize(
    ("change", "config", "kind", "says"),
    [
        ({"w_dec": draw(M, H + 1, D)}, {}, IntegrityError, "w_dec"),
        ({"w_dec": draw(M, D)}, {}, IntegrityError, "w_dec"),
        ({"w_enc": draw(M, D)}, {}, IntegrityError, "w_enc"),
        ({"b_enc": draw(M, 1)}, {}, IntegrityError, "b_enc"),
        ({"threshold": None}, {}, IntegrityError, "threshold"),
        ({"threshold": draw(M + 1).abs()}, {}, IntegrityError, "threshold"),
        ({"b_dec": draw(D + 1)}, {}, IntegrityError, "b_out"),
        ({"affine_skip_connection": draw(D, D)}, {}, ConfigError, "affine_skip_connection"),
        ({"w_enc": draw(D, M) * float("nan")}, {}, NonFiniteError, "W_enc"),
        ({}, {"type": "clt"}, ConfigError, "gemma-scope-2"),
        ({}, {"width": N + 1}, ConfigError, "width"),
        ({}, {"hf_hook_point_in": "model.layers.{5,9}.output"}, ConfigError, "the same in both"),
        ({}, {"hf_hook_point_out": "model.layers.5.output"}, ConfigError, "hf_hook_point"),
    ],
    ids=str,
)
def test_damaged_gemma_scope_2_crosscoders_are_refused_in_a_sentence(tmp_path, change, config, kind, says):
    gemma_files(tmp_path / "theirs", CONFIG | config, change)
    with pytest.raises(kind, match=says):
        import_sae(tmp_path / "theirs", "gemma-scope", str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_a_crosscoder_is_no_set_of_transcoders_and_a_missing_file_is_told(tmp_path):
    gemma_files(tmp_path / "theirs")
    result = run_import(tmp_path / "theirs", "gemma-scope-2", tmp_path)
    assert result.exit_code == 2
    assert "--from gemma-scope" in result.output
    (tmp_path / "theirs/params_layer_2.safetensors").unlink()
    with pytest.raises(ConfigError, match="one of each of the layers"):
        import_sae(tmp_path / "theirs", "gemma-scope", str(tmp_path / "ours"))
