"""Llama Scope's layouts and its library's, written out here: read, written, and refused in a sentence."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from tests.formats.test_by_hand import keep_best
from tests.formats.test_qwen_scope import draw
from tests.support.making import LARGEST_ERROR, D, K, N, dense, error, make_sae, rows, save
from winnow.sae import Sae
from winnow.sae.formats.convert import export_sae, import_sae
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError

HOOK, NEXT = "blocks.4.hook_resid_post", "blocks.4.hook_mlp_out"
LLAMA = {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": D, "act_fn": "jumprelu", "top_k": K}
LLAMA |= {"norm_activation": "dataset-wise", "use_decoder_bias": True, "use_glu_encoder": False}
LLAMA |= {"sparsity_include_decoder_norm": True, "expansion_factor": N / D}
NORMS = {"in": 70.0, "out": 11.0}


def llama_state():
    """The library's names, in its orientation."""
    rows_of_any_norm = draw(N, D, seed=2) * (draw(N, 1, seed=5).abs() + 0.1)
    return {
        "W_E": draw(D, N) / 4,
        "b_E": draw(N, seed=1),
        "W_D": rows_of_any_norm,
        "b_D": 3 * draw(D, seed=3),
    }


def llama_files(folder, layout, state=None, **changes):
    """The three layouts of the module's docstring."""
    folder.mkdir(parents=True, exist_ok=True)
    state, config = dict(llama_state() if state is None else state), LLAMA | changes
    if layout != "library":
        names = {
            "W_E": "encoder.weight",
            "b_E": "encoder.bias",
            "W_D": "decoder.weight",
            "b_D": "decoder.bias",
        }
        state = {
            names.get(n, n): t.T.contiguous() if n in ("W_E", "W_D") and t.ndim == 2 else t
            for n, t in state.items()
        }
    if layout == "first":
        (folder / "checkpoints").mkdir()
        config |= {"dataset_average_activation_norm": NORMS, "jump_relu_threshold": 6.0, "d_sae": N}
        config |= changes
        file, name = folder / "checkpoints/final.safetensors", "hyperparams.json"
    else:
        prefix = "activation_function." if layout == "library" else ""
        state.setdefault(f"{prefix}log_jumprelu_threshold", 0.3 * draw(N, seed=4) + 1)
        for side in ("in", "out"):
            state.setdefault(
                f"dataset_average_activation_norm.{config[f'hook_point_{side}']}", torch.tensor(NORMS[side])
            )
        config |= {"sae_type": "sae"} | changes
        file, name = folder / "sae_weights.safetensors", "config.json"
    kept = {n: t for n, t in state.items() if t is not None}
    safetensors.torch.save_file(kept, file)
    (folder / name).write_text(json.dumps(config))
    return folder


def as_llama(layout, x, *, activation="jumprelu", by_norm=True, across=False):
    """What the library computes, in training and, for the first release, after it folded both factors in."""
    state = llama_state()
    f_in = D**0.5 / NORMS["in"]
    f_out = D**0.5 / NORMS["out"] if across else f_in
    W_D, norms = state["W_D"], state["W_D"].norm(dim=1) if by_norm else 1.0
    if layout == "first":
        z = x @ state["W_E"] + state["b_E"] / f_in
        W_D = W_D * f_in / f_out
        norms = W_D.norm(dim=1) if by_norm else 1.0
        return z * (z * norms > 6.0) @ W_D + state["b_D"] / f_out
    pre = (f_in * x) @ state["W_E"] + state["b_E"]
    if activation == "jumprelu":
        z = pre * (pre * norms > (0.3 * draw(N, seed=4) + 1).exp())
    elif activation == "topk":
        z = keep_best(pre * norms, K).relu() / norms
    else:
        z = pre.relu()
    return (z @ W_D + state["b_D"]) / f_out


LAYOUTS = ["first", "distilled", "library"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("across", [False, True])
def test_llama_scope_is_read(tmp_path, layout, by_norm, across):
    norms = NORMS if across else {"in": NORMS["in"], "out": NORMS["in"]}
    changes = {"hook_point_out": NEXT} if across else {}
    if layout == "first":
        changes["dataset_average_activation_norm"] = norms
    theirs = llama_files(tmp_path / "theirs", layout, sparsity_include_decoder_norm=by_norm, **changes)
    card = import_sae(theirs, "llama-scope", str(tmp_path / "ours"))
    assert (card.hook, card.target_hook) == ("resid_post.4", "mlp_out.4" if across else None)
    x, ours = rows(), Sae.load(tmp_path / "ours")
    assert error(ours(x), as_llama(layout, x, by_norm=by_norm, across=across)) < LARGEST_ERROR
    assert 0.02 < (dense(*ours.encode(x)) > 0).float().mean() < 0.6


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_llama_scope_s_other_activations_are_read(tmp_path, activation, by_norm):
    gone = {"activation_function.log_jumprelu_threshold": None}
    settings = {"act_fn": activation, "sparsity_include_decoder_norm": by_norm}
    theirs = llama_files(tmp_path / "theirs", "library", llama_state() | gone, **settings)
    import_sae(theirs, "llama-scope", str(tmp_path / "ours"))
    expected = as_llama("library", x := rows(), activation=activation, by_norm=by_norm)
    assert error(Sae.load(tmp_path / "ours")(x), expected) < LARGEST_ERROR


@pytest.mark.parametrize("normalize", ["none", "dataset"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("out", [None, D])
def test_llama_scope_is_written_and_read_back(tmp_path, activation, normalize, out):
    sae, x = make_sae(activation, normalize, d_out=out), rows()
    export_sae(save(sae, tmp_path / "ours"), "llama-scope", tmp_path / "theirs")
    state = safetensors.torch.load_file(tmp_path / "theirs/sae_weights.safetensors")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert int(config["d_model"] * config["expansion_factor"]) == N
    pre = x @ state["W_E"] + state["b_E"]
    z = keep_best(pre, config["top_k"]).relu() if config["act_fn"] == "topk" else pre.relu()
    if config["act_fn"] == "jumprelu":
        z = z * (pre > state["activation_function.log_jumprelu_threshold"].exp())
    assert error(z @ state["W_D"] + state["b_D"], sae(x)) < LARGEST_ERROR
    card = import_sae(tmp_path / "theirs", "llama-scope", str(tmp_path / "back"))
    assert (card.hook, card.target_hook) == ("resid_post.9", "mlp_out.9" if out else None)
    assert error(Sae.load(tmp_path / "back")(x), sae(x)) < LARGEST_ERROR


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"normalize": "layer"}, "layer-normed"),
        ({"d_out": D, "skip": True}, "skip"),
        ({"d_out": D + 4}, "two widths"),
    ],
    ids=str,
)
def test_what_llama_scope_cannot_hold_is_refused(tmp_path, kind, says):
    with pytest.raises(ConfigError, match=says):
        export_sae(save(make_sae(**kind), tmp_path / "ours"), "llama-scope", tmp_path / "theirs")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "config", "kind", "says"),
    [
        ({"W_D": draw(N, D + 1)}, {}, IntegrityError, "W_dec"),
        ({"W_D": draw(D, N)}, {}, IntegrityError, "W_D"),
        ({"W_E": draw(N)}, {}, IntegrityError, "a matrix"),
        ({"b_E": draw(D)}, {}, IntegrityError, "b_E"),
        ({"b_D": None}, {}, IntegrityError, "b_D"),
        ({"W_E_glu": draw(D, N)}, {}, ConfigError, "W_E_glu"),
        ({"W_E": draw(D, N) * float("nan")}, {}, NonFiniteError, "W_enc"),
        ({}, {"use_glu_encoder": True}, ConfigError, "use_glu_encoder"),
        ({}, {"apply_decoder_bias_to_pre_encoder": True}, ConfigError, "apply_decoder_bias"),
        ({}, {"act_fn": "batchtopk"}, ConfigError, "whole batch"),
        ({}, {"norm_activation": "token-wise"}, ConfigError, "norm_activation"),
        ({}, {"d_model": D + 1}, ConfigError, "d_model"),
        ({}, {"sae_type": "lorsa"}, ConfigError, "sae_type"),
    ],
    ids=str,
)
def test_damaged_llama_scope_files_are_refused_in_a_sentence(tmp_path, layout, change, config, kind, says):
    theirs = llama_files(tmp_path / "theirs", layout, llama_state() | change, **config)
    with pytest.raises(kind, match=says):
        import_sae(theirs, "llama-scope", str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), "twelve", None])
def test_a_norm_that_is_none_is_refused(tmp_path, norm):
    norms = {"dataset_average_activation_norm": {"in": norm, "out": 1.0}}
    theirs = llama_files(tmp_path / "theirs", "first", **norms)
    with pytest.raises(IntegrityError, match="average norm"):
        import_sae(theirs, "llama-scope", str(tmp_path / "ours"))


def test_a_place_that_winnow_does_not_read_is_named(tmp_path):
    theirs = llama_files(tmp_path / "theirs", "first", hook_point_in="blocks.4.ln2.hook_normalized")
    card = import_sae(theirs, "llama-scope", str(tmp_path / "ours"))
    assert any("hook_normalized is no hook" in note for note in card.notes)
