"""Every format against its documented layout, written out here: no other library is needed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.support.making import LARGEST_ERROR, D, K, N, dense, error, make_sae, rows, save
from winnow.cli.main import app
from winnow.sae import Sae
from winnow.sae.formats.convert import READERS, WRITERS, export_sae, import_sae
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError

RAW = ["none", "dataset"]
THRESHOLDS = ["batchtopk", "relu", "jumprelu"]


# ---- each format's own arithmetic, from its documentation ------------------------------------------


def keep_best(pre, k):
    best = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values)


def as_openai(folder, x):
    state = torch.load(folder / "autoencoder.pt", weights_only=True)
    mean, std = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    topk = state["activation"] == "TopK"
    if topk:  # its loader norms the rows of TopK, and of nothing else
        mean = x.mean(1, keepdim=True)
        std = (x - mean).std(1, keepdim=True)
    v = (x - mean) / (std + 1e-5) if topk else x
    pre = (v - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    z = (keep_best(pre, state["activation_state_dict"]["k"]) if topk else pre).relu()
    return (z @ state["decoder.weight"].T + state["pre_bias"]) * std + mean


def as_saelens(folder, x):
    config, state = (
        json.loads((folder / "cfg.json").read_text()),
        load_file(folder / "sae_weights.safetensors"),
    )
    mean, std = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    v = x
    if config["normalize_activations"] == "layer_norm":
        mean = x.mean(1, keepdim=True)
        std = (x - mean).std(1, keepdim=True)
        v = (x - mean) / (std + 1e-5)
    taken = state["b_dec"] if config["apply_b_dec_to_input"] else 0.0
    pre = (v - taken) @ state["W_enc"] + state["b_enc"]
    z = keep_best(pre, config["k"]).relu() if config["architecture"] == "topk" else pre.relu()
    if "threshold" in state:
        z = z * (pre > state["threshold"])
    out = z @ state["W_dec"] + state["b_dec"]
    if "transcoder" in config["architecture"]:
        return out + x @ state["W_skip"].T if "W_skip" in state else out
    return out * std + mean


def as_sparsify(folder, x):
    config, state = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    v = x if config["transcode"] else x - state["b_dec"]
    z = keep_best((v @ state["encoder.weight"].T + state["encoder.bias"]).relu(), config["k"])
    out = z @ state["W_dec"] + state["b_dec"]
    return out + x @ state["W_skip"].T if config["skip_connection"] else out


def as_dictionary_learning(folder, x):
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    state = torch.load(folder / "ae.pt", weights_only=True)
    if name == "JumpReluAutoEncoder":
        pre = x @ state["W_enc"] + state["b_enc"]
        return (pre.relu() * (pre > state["threshold"])) @ state["W_dec"] + state["b_dec"]
    b = state["bias" if name == "AutoEncoder" else "b_dec"]
    z = ((x - b) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    if name == "AutoEncoderTopK":
        z = keep_best(z, int(state["k"]))
    elif name == "BatchTopKSAE":
        z = z * (z > state["threshold"])
    return z @ state["decoder.weight"].T + b


def as_gemma_scope(folder, x):
    with np.load(folder / "params.npz", allow_pickle=False) as data:
        state = {key: torch.from_numpy(data[key]) for key in data.files}
    pre = x @ state["W_enc"] + state["b_enc"]
    return (pre.relu() * (pre > state["threshold"])) @ state["W_dec"] + state["b_dec"]


ARITHMETIC = {
    "openai": as_openai,
    "saelens": as_saelens,
    "sparsify": as_sparsify,
    "dictionary_learning": as_dictionary_learning,
    "gemma-scope": as_gemma_scope,
}
TRANSCODER = {"d_out": D + 4}
CASES = [
    ("openai", {"activation": "topk", "normalize": "layer"}),
    *[("openai", {"activation": "relu", "normalize": mode}) for mode in RAW],
    *[("saelens", {"activation": a, "normalize": "layer"}) for a in ["topk", *THRESHOLDS]],
    *[("saelens", {"activation": a, "normalize": mode}) for a in ["topk", *THRESHOLDS] for mode in RAW],
    *[("saelens", {"activation": a, **TRANSCODER}) for a in THRESHOLDS],
    *[("saelens", {"activation": a, **TRANSCODER, "skip": True}) for a in THRESHOLDS],
    ("saelens", {"activation": "relu", "normalize": "layer", **TRANSCODER}),
    *[("sparsify", {"normalize": mode}) for mode in RAW],
    ("sparsify", {"d_out": D}),
    ("sparsify", {"d_out": D, "skip": True, "target_normalize": "none"}),
    *[("dictionary_learning", {"activation": a, "normalize": m}) for a in ["topk", *THRESHOLDS] for m in RAW],
    *[("gemma-scope", {"activation": a}) for a in THRESHOLDS],
    ("gemma-scope", {"activation": "jumprelu", **TRANSCODER}),
]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: str(value).replace("'", ""))
def test_there_and_back_gives_the_same_reconstructions(tmp_path, name, kind):
    sae, x = make_sae(**kind), rows()
    expected = sae(x)
    export_sae(save(sae, tmp_path / "ours"), name, tmp_path / "theirs")
    assert error(ARITHMETIC[name](tmp_path / "theirs", x), expected) < LARGEST_ERROR

    card = import_sae(tmp_path / "theirs", name, str(tmp_path / "back"), hook="resid_post.9")
    back = Sae.load(tmp_path / "back")
    assert error(back(x), expected) < LARGEST_ERROR
    assert back.has_target == sae.has_target
    assert card.hook == "resid_post.9"
    torch.testing.assert_close(back.W_dec, sae.W_dec)
    active = (dense(*sae.encode(x)) > 0) != (dense(*back.encode(x)) > 0)
    assert active.float().mean() < 1e-4  # a value beside the threshold may fall on either side


@pytest.mark.parametrize("name", ["openai", "saelens"])
def test_the_epsilon_of_layer_norm_comes_along_exactly(tmp_path, name):
    """At a standard deviation of 0.01 an epsilon of 1e-5 is a thousandth: it must not be lost."""
    x = rows(spread=0.01)
    export_sae(save(make_sae(normalize="layer"), tmp_path / "ours"), name, tmp_path / "theirs")
    import_sae(tmp_path / "theirs", name, str(tmp_path / "back"))
    assert error(Sae.load(tmp_path / "back")(x), ARITHMETIC[name](tmp_path / "theirs", x)) < LARGEST_ERROR


@pytest.mark.parametrize("normalize", ["dataset", "layer", "none"])
def test_an_export_says_by_how_much_its_codes_differ(tmp_path, told, normalize):
    sae, x = make_sae(normalize=normalize), rows()
    export_sae(save(sae, tmp_path / "ours"), "saelens", tmp_path / "theirs")
    import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "back"))
    # of raw rows an import has the file's own codes
    scale = {"layer": (D - 1) ** 0.5, "none": 1.0}.get(normalize)
    if scale is None:
        codes = [dense(*each.encode(x)).double().sum() for each in (Sae.load(tmp_path / "back"), sae)]
        scale = (codes[0] / codes[1]).item()
    said = [line for line in told if line.startswith("codes are")]
    assert said == (
        []
        if scale == 1
        else [f"codes are {scale:.4g} times those here; latents and reconstructions are the same"]
    )


# ---- what only other libraries write ---------------------------------------------------------------


def test_saelens_files_from_before_version_6_are_read(tmp_path):
    sae, x = make_sae(normalize="none"), rows()
    export_sae(save(sae, tmp_path / "ours"), "saelens", tmp_path / "theirs")
    config = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "hook_point": "blocks.3.hook_mlp_out",
    }
    (tmp_path / "theirs/cfg.json").write_text(json.dumps(config))
    card = import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "back"))
    assert card.hook == "mlp_out.3"
    assert error(Sae.load(tmp_path / "back")(x), sae(x)) < LARGEST_ERROR


def test_saelens_choice_by_decoder_norm_is_folded(tmp_path):
    """`rescale_acts_by_decoder_norm`: TopK of pre * |W_dec|, then divided by it again."""
    x, draw = rows(), torch.Generator().manual_seed(3)
    W = torch.randn(N, D, generator=draw) * torch.rand(N, 1, generator=draw)
    state = {"W_enc": torch.randn(D, N, generator=draw), "b_enc": torch.randn(N, generator=draw)}
    state |= {"W_dec": W, "b_dec": torch.randn(D, generator=draw)}
    safetensors.torch.save_file(state, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    norms = W.norm(dim=1)
    z = keep_best(((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]) * norms, K).relu() / norms
    import_sae(tmp_path, "saelens", str(tmp_path / "ours"))
    assert error(Sae.load(tmp_path / "ours")(x), z @ W + state["b_dec"]) < LARGEST_ERROR


def test_dictionary_learning_matryoshka_keeps_its_prefixes(tmp_path):
    sae, x = make_sae("batchtopk", "none"), rows()
    export_sae(save(sae, tmp_path / "ours"), "dictionary_learning", tmp_path / "theirs")
    state = torch.load(tmp_path / "theirs/ae.pt", weights_only=True)
    state = {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["encoder.bias"],
        "W_dec": state["decoder.weight"].T,
        "b_dec": state["b_dec"],
        "k": state["k"],
        "threshold": state["threshold"],
        "group_sizes": torch.tensor([16, 16, N - 32]),
    }
    torch.save(state, tmp_path / "theirs/ae.pt")
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "layer": 9, "submodule_name": "resid_post_layer_9"}
    (tmp_path / "theirs/config.json").write_text(json.dumps({"trainer": trainer}))
    card = import_sae(tmp_path / "theirs", "dictionary_learning", str(tmp_path / "back"))
    assert (card.parts.matryoshka, card.hook) == ((16, 32, N), "resid_post.9")
    assert error(Sae.load(tmp_path / "back")(x), sae(x)) < LARGEST_ERROR


def test_a_threshold_that_was_never_estimated_is_refused(tmp_path):
    ours = save(make_sae("batchtopk", "none"), tmp_path / "ours")
    export_sae(ours, "dictionary_learning", tmp_path / "theirs")
    state = torch.load(tmp_path / "theirs/ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, tmp_path / "theirs/ae.pt")
    with pytest.raises(ConfigError, match=r"no threshold was estimated .*every positive latent is active"):
        import_sae(tmp_path / "theirs", "dictionary_learning", str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_gated_saes_are_jumprelu_here(tmp_path, name):
    """The gate and the magnitude share an encoder, so that the gate is a threshold of the magnitude."""
    draw = torch.Generator().manual_seed(6)
    W_enc, W_dec = torch.randn(D, N, generator=draw), torch.randn(N, D, generator=draw)
    gate, mag, r_mag = (torch.randn(N, generator=draw) for _ in range(3))
    b, folder, x = torch.randn(D, generator=draw), tmp_path / "theirs", rows()
    folder.mkdir()
    if name == "saelens":
        state = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b, "b_gate": 9 * gate, "b_mag": mag, "r_mag": r_mag}
        safetensors.torch.save_file(state, folder / "sae_weights.safetensors")
        about = {"architecture": "gated", "d_in": D, "d_sae": N, "apply_b_dec_to_input": True}
        (folder / "cfg.json").write_text(json.dumps(about | {"metadata": {"sae_lens_version": "6.5.0"}}))
    else:
        state = {"encoder.weight": W_enc.T.contiguous(), "decoder.weight": W_dec.T.contiguous()}
        state |= {"decoder_bias": b, "gate_bias": 9 * gate, "mag_bias": mag, "r_mag": r_mag}
        torch.save(state, folder / "ae.pt")
        about = {"trainer": {"dict_class": "GatedAutoEncoder", "activation_dim": D, "dict_size": N}}
        (folder / "config.json").write_text(json.dumps(about))
    import_sae(folder, name, str(tmp_path / "ours"))
    ours, shared = Sae.load(tmp_path / "ours"), (x - b) @ W_enc
    open_, magnitude = shared + 9 * gate > 0, (r_mag.exp() * shared + mag).relu()
    assert (magnitude[open_] == 0).any()  # either may close a latent
    assert (magnitude[~open_] > 0).any()
    assert error(dense(*ours.encode(x)), open_ * magnitude) < LARGEST_ERROR
    assert error(ours(x), (open_ * magnitude) @ W_dec + b) < LARGEST_ERROR
    assert ours.parts.activation == "jumprelu"


def test_openai_tied_weights_are_read(tmp_path):
    draw = torch.Generator().manual_seed(4)
    state = {
        "encoder.weight": torch.randn(N, D, generator=draw),
        "latent_bias": torch.randn(N, generator=draw),
    }
    state |= {"pre_bias": torch.randn(D, generator=draw), "activation": "ReLU", "activation_state_dict": {}}
    torch.save(state, tmp_path / "x.pt")
    import_sae(tmp_path / "x.pt", "openai", str(tmp_path / "ours"))
    x, W, b = rows(), state["encoder.weight"], state["pre_bias"]
    expected = ((x - b) @ W.T + state["latent_bias"]).relu() @ W + b
    assert error(Sae.load(tmp_path / "ours")(x), expected) < LARGEST_ERROR


def test_names_and_paths_are_taken_as_people_write_them(tmp_path):
    export_sae(save(make_sae(), tmp_path / "ours"), "Dictionary-Learning", tmp_path / "theirs")
    card = import_sae(tmp_path / "theirs/ae.pt", "dictionary_learning", str(tmp_path / "back"))
    assert card.hook == "resid_post.9"
    export_sae(save(make_sae("relu"), tmp_path / "relu"), "gemma_scope", tmp_path / "scope")
    kind = {"hook": "resid_post.2", "target_hook": "mlp_out.2"}  # where D = O only the user knows
    card = import_sae(tmp_path / "scope/params.npz", "gemma_scope", str(tmp_path / "across"), **kind)
    assert (card.hook, card.target_hook, card.parts.d_out) == ("resid_post.2", "mlp_out.2", D)
    x = rows()
    assert error(Sae.load(tmp_path / "across")(x), make_sae("relu")(x)) < LARGEST_ERROR


def test_a_folder_called_after_its_module_names_the_hook(tmp_path):
    export_sae(save(make_sae(), tmp_path / "ours"), "sparsify", tmp_path / "layers.4")
    assert import_sae(tmp_path / "layers.4", "sparsify", str(tmp_path / "back")).hook == "resid_post.4"


# ---- what is refused -------------------------------------------------------------------------------

REFUSED = [
    ("openai", {"normalize": "dataset"}, "not layer-normed"),
    ("openai", {"activation": "relu", "normalize": "layer"}, "never norms"),
    ("openai", {"activation": "jumprelu"}, "jumprelu"),
    ("openai", {"activation": "relu", **TRANSCODER}, "transcoder"),
    ("sparsify", {"normalize": "layer"}, "layer-normed"),
    ("sparsify", {"activation": "relu"}, "relu"),
    ("sparsify", {**TRANSCODER}, "two widths"),
    ("dictionary_learning", {"normalize": "layer"}, "layer-normed"),
    ("dictionary_learning", {**TRANSCODER}, "transcoder"),
    ("gemma-scope", {"activation": "topk"}, "TopK"),
    ("gemma-scope", {"activation": "relu", "normalize": "layer"}, "layer-normed"),
    ("gemma-scope", {"activation": "relu", "d_out": D, "skip": True}, "skip"),
    ("saelens", {**TRANSCODER}, "TopK transcoder"),
    ("saelens", {"activation": "relu", "normalize": "layer", "d_out": D, "skip": True}, "skip"),
    ("neuronpedia", {}, "--model"),
]


@pytest.mark.parametrize(("name", "kind", "says"), REFUSED, ids=str)
def test_what_a_format_cannot_hold_is_refused_in_words(tmp_path, name, kind, says):
    uri = save(make_sae(**kind), tmp_path / "ours")
    with pytest.raises(ConfigError, match=says):
        export_sae(uri, name, tmp_path / "theirs")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_file_that_wants_to_run_code_is_refused_and_does_not(tmp_path):
    trap, runner = Trap(tmp_path / "sprung"), CliRunner()
    torch.save({"encoder.weight": torch.zeros(2, 2), "extra": trap}, tmp_path / "a.pt")
    np.savez(tmp_path / "params.npz", W_enc=np.array([trap], dtype=object))
    for source, name in (("a.pt", "openai"), ("params.npz", "gemma-scope")):
        args = ["import", str(tmp_path / source), "--from", name, "--out", str(tmp_path / "out")]
        result = runner.invoke(app, args)
        assert result.exit_code == 2, result.output
        assert "would run code" in result.output
        assert "weights_only" not in result.output  # torch's advice on how to load it all the same
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out/sae.json").exists()


@pytest.mark.parametrize("name", ["openai", "saelens", "sparsify", "dictionary-learning", "gemma-scope"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    args = ["import", str(tmp_path / "none"), "--from", name, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2, result.output
    assert "is not there" in result.output


def test_damaged_files_are_named(tmp_path):
    export_sae(save(make_sae(), tmp_path / "ours"), "sparsify", tmp_path / "theirs")
    weights = tmp_path / "theirs/sae.safetensors"
    whole = weights.read_bytes()
    state = load_file(weights)
    for broken, kind in (
        (state | {"W_dec": state["W_dec"][:, 1:].contiguous()}, IntegrityError),
        (state | {"W_dec": state["W_dec"] * float("nan")}, NonFiniteError),
        ({"W_dec": state["W_dec"]}, IntegrityError),
    ):
        safetensors.torch.save_file(broken, weights)
        with pytest.raises(kind, match=r"W_dec|encoder\.weight"):
            import_sae(tmp_path / "theirs", "sparsify", str(tmp_path / "back"))
    weights.write_bytes(whole[:100])
    with pytest.raises(IntegrityError, match="not safetensors"):
        import_sae(tmp_path / "theirs", "sparsify", str(tmp_path / "back"))
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises((IntegrityError, ConfigError), match=r"cut\.pt"):
        import_sae(tmp_path / "cut.pt", "openai", str(tmp_path / "back"))


def test_the_commands_say_what_they_know(tmp_path):
    runner = CliRunner()
    uri = save(make_sae(normalize="layer"), tmp_path / "ours")
    args = ["export", uri, "--to", "neuronpedia", "--out", str(tmp_path / "theirs"), "--model", "pythia-70m"]
    assert runner.invoke(app, args).exit_code == 0
    metadata = json.loads((tmp_path / "theirs/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("pythia-70m", "blocks.9.hook_resid_post")
    assert runner.invoke(app, args).exit_code == 2  # the folder is in use
    back = ["import", str(tmp_path / "theirs"), "--from", "saelens", "--out", str(tmp_path / "back")]
    result = runner.invoke(app, [*back, "--json"])
    assert json.loads(result.stdout)["hook"] == "resid_post.9"
    assert runner.invoke(app, back).exit_code == 2  # there is an SAE already
    for wrong in (["import", uri, "--from", "nobody"], ["export", uri, "--to", "nobody"]):
        result = runner.invoke(app, [*wrong, "--out", str(tmp_path / "x")])
        assert result.exit_code == 2
        assert all(name in result.output for name in (READERS if wrong[0] == "import" else WRITERS))
