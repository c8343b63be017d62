"""Every field of a foreign config is used, mapped, named in a note, or refused; none is dropped."""

from __future__ import annotations

import json
import logging

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from tests.support.making import LARGEST_ERROR, D, K, N, dense, error, make_sae, rows, save
from winnow.cli.main import app
from winnow.sae import Sae
from winnow.sae.formats.convert import WRITERS, export_sae, import_sae
from winnow.sae.formats.lens import CENTRES
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.training import SaeParts
from winnow.trainer.run.warm_start import load_source

PYTHIA = {"model_name": "pythia-70m", "hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.5.0"}


def lens_files(folder, architecture="standard", width=D, *, extra=(), metadata=None, **fields):
    """A SAELens folder whose every tensor matters; fields win. Gives its tensors."""
    draw = torch.Generator().manual_seed(5)
    out = fields.get("d_out", width)
    state = {"W_enc": torch.randn(width, N, generator=draw), "b_enc": torch.randn(N, generator=draw)}
    state |= {"W_dec": torch.randn(N, out, generator=draw), "b_dec": torch.randn(out, generator=draw)}
    if "jumprelu" in architecture:
        state["threshold"] = torch.rand(N, generator=draw)
    if "skip" in architecture:
        state["W_skip"] = torch.randn(out, width, generator=draw)
    state |= {name: torch.ones(3) for name in extra}
    config = {"architecture": architecture, "d_in": width, "d_sae": N, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": "transcoder" not in architecture}
    config |= {"metadata": PYTHIA if metadata is None else {"sae_lens_version": "6.5.0"} | metadata}
    config |= {"k": K} if architecture == "topk" else {}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config | fields))
    return state


def lens_import(tmp_path, architecture="standard", *, out="ours", centred=None, **fields):
    lens_files(tmp_path / "theirs", architecture, **fields)
    return import_sae(tmp_path / "theirs", "saelens", str(tmp_path / out), centred=centred)


# ---- SAELens: how the subject was loaded -----------------------------------------------------------


def test_centred_rows_are_centred_and_their_mean_comes_back(tmp_path, caplog):
    options = {"model_from_pretrained_kwargs": {CENTRES: True, "fold_ln": True, "device": "cuda"}}
    state = lens_files(tmp_path / "theirs", metadata=PYTHIA | options)
    with caplog.at_level(logging.WARNING):
        card = import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "ours"))
    sae, x = Sae.load(tmp_path / "ours"), rows()
    mean = x.mean(1, keepdim=True)
    z = ((x - mean - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    assert error(dense(*sae.encode(x)), z) < LARGEST_ERROR
    assert error(sae(x), z @ state["W_dec"] + state["b_dec"] + mean) < LARGEST_ERROR
    values, indices = sae.encode(x)
    assert error(sae.decode(values, indices, like=x), sae(x)) < LARGEST_ERROR
    assert card.parts.centred
    assert len(card.notes) == len(caplog.messages) == 1
    assert CENTRES in card.notes[0]


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({}, False),  # version 6 loads models as they are
        ({"model_from_pretrained_kwargs": {CENTRES: False}}, False),
        ({"model_from_pretrained_kwargs": {CENTRES: True}}, True),
        ({"model_from_pretrained_kwargs": {CENTRES: True}, "model_name": "gemma-2b"}, False),  # RMSNorm
        ({"model_from_pretrained_kwargs": {CENTRES: True}, "hook_name": "blocks.3.attn.hook_z"}, False),
        ({"model_from_pretrained_kwargs": {CENTRES: True}, "hook_name": "blocks.3.hook_resid_mid"}, True),
        ({"model_from_pretrained_kwargs": {CENTRES: True}, "hook_name": "blocks.3.mlp.hook_in"}, False),
        ({"model_from_pretrained_kwargs": {}, "sae_lens_training_version": "3.19.1"}, True),
        ({"model_from_pretrained_kwargs": {}, "sae_lens_training_version": "3.19.2"}, False),
        ({"sae_lens_training_version": "2.1.3", "model_name": "mistral-7b"}, False),
        ({"sae_lens_version": None}, None),  # nothing tells
        ({"sae_lens_version": None, "model_name": "google/gemma-2-2b"}, False),
        ({"model_class_name": "AutoModelForCausalLM", "hook_name": "gpt_neox.layers.3"}, False),
    ],
    ids=str,
)
def test_centring_follows_from_option_version_model_and_hook(tmp_path, about, said):
    card = lens_import(tmp_path, metadata=PYTHIA | about)
    assert card.parts.centred == bool(said)
    assert any("--centred" in note for note in card.notes) == (said is None)
    for choice in (True, False):
        card = lens_import(tmp_path, metadata=PYTHIA | about, centred=choice, out=str(choice))
        assert card.parts.centred == choice
        assert not any("--centred" in note for note in card.notes)


def test_the_first_published_files_are_centred(tmp_path):
    """Before SAELens wrote its version: `hook_point`, and GPT-2 loaded with TransformerLens' defaults."""
    old = {"architecture": "standard", "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
    lens_files(tmp_path / "theirs")
    (tmp_path / "theirs/cfg.json").write_text(json.dumps(old))
    card = import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "ours"))
    assert (card.hook, card.parts.centred) == ("resid_pre.8", True)


@pytest.mark.parametrize("hook", ["resid_mid.3", "mlp_in.3"])
def test_the_places_around_the_mlp_s_norm_keep_their_names(tmp_path, hook):
    name = {"resid_mid.3": "blocks.3.hook_resid_mid", "mlp_in.3": "blocks.3.mlp.hook_in"}[hook]
    card = lens_import(tmp_path, metadata=PYTHIA | {"hook_name": name})
    assert (card.hook, card.notes) == (hook, ())
    export_sae(str(tmp_path / "ours"), "saelens", tmp_path / "back")
    assert json.loads((tmp_path / "back/cfg.json").read_text())["metadata"]["hook_name"] == name
    if hook == "mlp_in.3":
        with pytest.raises(ConfigError, match="HookedTransformer"):
            export_sae(str(tmp_path / "ours"), "neuronpedia", tmp_path / "pedia", model="pythia-70m")
        about = {"hook_name": name, "model_from_pretrained_kwargs": {"fold_ln": True}}
        notes = lens_import(tmp_path, metadata=PYTHIA | about, out="folded").notes
        assert any("gain" in note for note in notes)


def test_hook_mlp_in_is_taken_for_no_place_of_ours(tmp_path):
    """TransformerLens' is before the MLP's norm; SAELens calls what Gemma Scope 2 reads after it so too."""
    about = PYTHIA | {"hook_name": "blocks.3.hook_mlp_in"}
    card = lens_import(tmp_path, metadata=about)
    assert card.hook == "blocks.3.hook_mlp_in"
    assert any("none that Winnow reads" in note for note in card.notes)
    module = "model.layers.3.pre_feedforward_layernorm"
    assert lens_import(tmp_path, metadata=about | {"hf_hook_name": module}, out="told").hook == module


def test_new_fields_stand_in_no_card_that_does_not_need_them(tmp_path):
    save(make_sae(), tmp_path / "ours")
    card = json.loads((tmp_path / "ours/sae.json").read_text())
    assert "notes" not in card
    assert "centred" not in card["parts"]
    assert "centred" not in SaeParts().model_dump()


def test_a_centred_sae_starts_no_run_of_raw_rows(tmp_path):
    lens_import(tmp_path, metadata=PYTHIA | {"model_from_pretrained_kwargs": {CENTRES: True}})
    fresh = Sae(D, N, 1, "none", SaeParts(activation="relu"))
    with pytest.raises(ConfigError, match="centred False"):
        load_source(str(tmp_path / "ours"), fresh, StorageSpec())


def test_a_layer_norm_needs_no_centring(tmp_path):
    about = PYTHIA | {"model_from_pretrained_kwargs": {CENTRES: True}}
    card = lens_import(tmp_path, normalize_activations="layer_norm", metadata=about)
    assert not card.parts.centred
    assert card.notes == ()


def test_other_options_of_loading_and_other_places_are_named(tmp_path):
    options = {"revision": "step1000", "torch_dtype": "bfloat16", "fold_value_biases": True}
    about = {"hook_name": "blocks.3.attn.hook_q", "model_from_pretrained_kwargs": options}
    notes = " ".join(lens_import(tmp_path, metadata=PYTHIA | about).notes)
    assert "revision: 'step1000'" in notes
    assert "blocks.3.attn.hook_q is none that Winnow reads" in notes
    assert "loaded with fold_value_biases" in notes
    assert "bfloat16" not in notes


@pytest.mark.parametrize("folds", [False, True])
def test_joined_heads_are_attn_z_and_come_back_by_head(tmp_path, folds):
    about = {
        "hook_name": "blocks.3.attn.hook_z",
        "model_from_pretrained_kwargs": {"fold_value_biases": folds},
    }
    card = lens_import(tmp_path, reshape_activations="hook_z", metadata=PYTHIA | about)
    assert card.hook == "attn_z.3"
    assert ("lacked attention's value biases" in " ".join(card.notes)) == folds
    export_sae(str(tmp_path / "ours"), "saelens", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert written["metadata"]["hook_name"] == "blocks.3.attn.hook_z"
    assert written["reshape_activations"] == "hook_z"


@pytest.mark.parametrize(
    "name", [name for name in WRITERS if name not in ("saelens", "saebench", "neuronpedia")]
)
def test_no_other_format_holds_centred_rows(tmp_path, name):
    lens_import(tmp_path, metadata=PYTHIA | {"model_from_pretrained_kwargs": {CENTRES: True}})
    with pytest.raises(ConfigError, match="centred rows"):
        export_sae(str(tmp_path / "ours"), name, tmp_path / "out")


# ---- SAELens: everything else ----------------------------------------------------------------------

NAMED = {
    "prepend_bos": True,
    "hook_head_index": 4,
    "seqpos_slice": [5, -5],
    "exclude_special_tokens": [0, 1],
    "use_chat_formatting": True,
    "model_kwargs": {"attention_mask": 1},
    "sequence_separator_token": "bos",
    "some_new_field": 0.5,
}


def test_every_field_with_a_meaning_is_named_and_no_other(tmp_path):
    notes = lens_import(tmp_path, **NAMED).notes
    assert len(notes) == len(NAMED)
    assert all(any(name in note for note in notes) for name in NAMED)
    harmless = {
        "seqpos_slice": [None],
        "hook_head_index": None,
        "exclude_special_tokens": False,
        "prepend_bos": False,
    }
    harmless |= {"context_size": 128, "dataset_path": "a/b", "dataset_trust_remote_code": True, "lr": 4e-4}
    harmless |= {"neuronpedia_id": "gpt2-small/8-res-jb", "hook_layer": 3, "another_new_field": None}
    assert lens_import(tmp_path, out="quiet", **harmless).notes == ()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sequence_separator_token": "eos"}, "`plan.join: eos`"),
        ({"sequence_separator_token": 3}, "joined by the token 3"),
        ({"sequence_separator_token": None}, "nothing stood between its documents"),
        ({"sequence_separator_token": "bos", "disable_concat_sequences": True}, "beginnings of documents"),
        ({"disable_concat_sequences": False}, None),
    ],
    ids=str,
)
def test_what_stood_between_the_documents_is_named(tmp_path, fields, says):
    notes = lens_import(tmp_path, metadata=PYTHIA | fields).notes
    assert len(notes) == (says is not None)
    assert says is None or says in notes[0]


def test_a_skip_that_saelens_leaves_out_where_it_splices_is_named(tmp_path, caplog):
    for kind in ("transcoder", "skip_transcoder"):
        lens_import(tmp_path / kind, kind, d_out=D)
        caplog.clear()
        export_sae(str(tmp_path / kind / "ours"), "saelens", tmp_path / kind / "out")
        assert any("forward pass alone" in said for said in caplog.messages) == ("skip" in kind)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"architecture": "jumprelu", "activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"architecture": "jumprelu", "activation_fn_str": "topk"}, "topk"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "signed": True}}, "signed"),
        ({"architecture": "gated", "extra": ["b_gate", "b_mag", "r_mag"]}, "holds b_enc"),
        ({"architecture": "jumprelu", "extra": ["b_gate"]}, "b_gate"),
        ({"architecture": "abstopk", "k": K}, "abstopk"),
        ({"architecture": "matching_pursuit"}, "matching_pursuit"),
        ({"architecture": "temporal"}, "temporal"),
        ({"normalize_activations": "constant_norm_rescale"}, "does not centre"),
        ({"normalize_activations": True}, "expected_average_only_in"),
        ({"normalize_activations": "covariance_whitening"}, "matrices"),
        ({"d_sae": N + 1}, "d_sae"),
        ({"d_in": D - 1}, "d_in"),
        ({"extra": ["b_gate"]}, "b_gate"),
        ({"extra": ["threshold"]}, "threshold"),
        ({"architecture": "transcoder", "extra": ["W_skip"]}, "W_skip"),
        ({"extra": ["scaling_factor", "W_skip"]}, "W_skip"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"reshape_activations": "other"}, "reshape_activations"),
    ],
    ids=str,
)
def test_what_would_give_other_numbers_is_refused_by_name(tmp_path, fields, says):
    with pytest.raises(ConfigError, match=says):
        lens_import(tmp_path, **fields)
    assert not (tmp_path / "ours/sae.json").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "topk", "k": N + 1},
        {"architecture": "topk", "k": "6"},
        {"architecture": "topk", "activation_fn_kwargs": {"k": K + 1}},
        {"activation_fn_str": ["relu"]},
        {"activation_fn_kwargs": "k"},
        {"apply_b_dec_to_input": 0.5},
        {"hook_name": 3},
        {"metadata": {"hook_name": 3}},
        {"matryoshka_widths": 16},
    ],
    ids=str,
)
def test_a_field_of_another_type_or_two_that_disagree_are_refused(tmp_path, fields):
    with pytest.raises(
        IntegrityError, match=str(next(reversed(fields))).replace("metadata", "metadata|hook_name")
    ):
        lens_import(tmp_path, **fields)


def test_a_computation_in_low_precision_is_named(tmp_path):
    [note] = lens_import(tmp_path, dtype="bfloat16").notes
    assert "bfloat16 (dtype)" in note


def test_the_four_k_latents_of_sparsify_s_forward_pass_are_named(tmp_path):
    export_sae(save(make_sae(normalize="none"), tmp_path / "ours"), "sparsify", tmp_path / "layers.4")
    config = tmp_path / "layers.4/cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"multi_topk": True}))
    card = import_sae(tmp_path / "layers.4", "sparsify", str(tmp_path / "back"))
    assert card.k == K
    assert [f"{4 * K} latents" in note for note in card.notes] == [True]


def test_rescaling_by_decoder_norm_is_for_topk_alone(tmp_path):
    """SAELens drops the field of a JumpReLU; folding it beside the thresholds gave other codes."""
    state = lens_files(tmp_path / "theirs", "jumprelu", rescale_acts_by_decoder_norm=True)
    card = import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "ours"))
    pre = (rows() - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    expected = (pre.relu() * (pre > state["threshold"])) @ state["W_dec"] + state["b_dec"]
    assert error(Sae.load(tmp_path / "ours")(rows()), expected) < LARGEST_ERROR
    assert "rescale_acts_by_decoder_norm" in card.notes[0]


def test_logarithms_of_thresholds_are_read(tmp_path):
    state = lens_files(tmp_path / "theirs", "jumprelu")
    lens_files(tmp_path / "old", "jumprelu")
    state["log_threshold"] = state.pop("threshold").log()
    safetensors.torch.save_file(state, tmp_path / "old/sae_weights.safetensors")
    for name in ("theirs", "old"):
        import_sae(tmp_path / name, "saelens", str(tmp_path / f"{name}-ours"))
    old, new = (Sae.load(tmp_path / f"{name}-ours") for name in ("old", "theirs"))
    torch.testing.assert_close(old.threshold, new.threshold)


def test_the_prefixes_of_a_published_matryoshka_come_along(tmp_path):
    details = {"training_architecture_details": {"matryoshka_widths": [16, N]}}
    assert lens_import(tmp_path, "jumprelu", metadata=PYTHIA | details).parts.matryoshka == (16, N)


def test_a_module_names_its_place_both_ways(tmp_path):
    about = {"hook_name": "blocks.3.hook_other", "hf_hook_name": "model.layers.3.mlp"}
    assert lens_import(tmp_path, metadata=about).hook == "model.layers.3.mlp"
    export_sae(str(tmp_path / "ours"), "saelens", tmp_path / "back")
    told = json.loads((tmp_path / "back/cfg.json").read_text())["metadata"]
    assert (told["hook_name"], told["model_class_name"]) == ("model.layers.3.mlp", "AutoModelForCausalLM")
    export_sae(save(make_sae(), tmp_path / "site"), "saelens", tmp_path / "site-back")
    assert "model_class_name" not in json.loads((tmp_path / "site-back/cfg.json").read_text())["metadata"]


def test_a_format_that_there_is_not_is_told_all_that_there_are_and_the_nearest(tmp_path):
    def refused(*arguments):
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        return " ".join(done.stderr.split())

    told = refused("import", "nowhere", "--from", "safelens")
    assert "--from 'safelens'; did you mean saelens: expected openai, saelens" in told
    assert "sets: circuit-tracer, gemma-scope-2, clt-forge; neuronpedia-graph." in told
    told = refused("export", "nowhere", "--to", "circuit-trace")
    assert "--to 'circuit-trace'; did you mean circuit-tracer: expected openai" in told
    assert "neuronpedia; sets: circuit-tracer, clt-forge; neuronpedia-graph." in told
    with pytest.raises(ConfigError, match="--from 'safelens'; did you mean saelens: expected openai"):
        import_sae(tmp_path, "safelens", str(tmp_path / "out"))
