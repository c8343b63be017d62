"""Where an SAE reads, in other libraries' words; their other fields and tensors; files of another format."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from tests.formats.test_foreign_fields import lens_files
from tests.support.making import LARGEST_ERROR, D, K, N, error, make_sae, rows, save
from tests.support.tiny import make_subject
from winnow.cli.main import app
from winnow.sae import Sae
from winnow.sae.formats.convert import READERS, export_sae, import_sae
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.subject.load import Subject


def exported(tmp_path, name, folder="theirs", **kind):
    """A folder of another library's, by way of an export; gives the SAE too."""
    sae = make_sae(**kind)
    export_sae(save(sae, tmp_path / f"of-{folder}"), name, tmp_path / folder)
    return sae, tmp_path / folder


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def card_of(source, name, tmp_path, out="ours"):
    return import_sae(source, name, str(tmp_path / out))


# ---- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "transcode", "hook", "target"),
    [
        ("layers.1", False, "resid_post.1", None),
        ("layers.1", True, "resid_pre.1", "resid_post.1"),
        ("layers.1.mlp", False, "model.layers.1.mlp", None),
        ("layers.1.mlp", True, "unknown", "model.layers.1.mlp"),
        ("layers.1.post_feedforward_layernorm", False, "model.layers.1.post_feedforward_layernorm", None),
        ("layers.1.attention", False, "gpt_neox.layers.1.attention", None),
        ("gpt_neox.layers.1.mlp", False, "gpt_neox.layers.1.mlp", None),
        ("h.11.attn", False, "transformer.h.11.attn", None),
        ("embed_tokens", False, "unknown", None),
    ],
)
def test_a_folder_of_sparsify_is_called_after_a_module_and_reads_that_module(
    tmp_path, folder, transcode, hook, target
):
    kind = {"d_out": D} if transcode else {}
    _, theirs = exported(tmp_path, "sparsify", folder, normalize="none", **kind)
    card = card_of(theirs, "sparsify", tmp_path)
    assert (card.hook, card.target_hook) == (hook, target)
    if "mlp" in folder or "att" in folder:
        site = "mlp_out" if "mlp" in folder else "attn_out"
        assert any(f"{site}.1" in note and "norms them first" in note for note in card.notes)
        assert any("--hook names the module whose output" in note for note in card.notes) == transcode


@pytest.mark.parametrize(("family", "same"), [("gemma2", False), ("llama", True)])
def test_a_module_is_what_sparsify_hooks_and_mlp_out_is_not_where_a_norm_follows(tmp_path, family, same):
    """A forward hook on the base model's module, as sparsify sets it, against the two hooks."""
    subject = Subject.load({"model": str(make_subject(tmp_path / "subject", family)), "attention": "eager"})
    _, theirs = exported(tmp_path, "sparsify", "layers.1.mlp", normalize="none")
    hook = card_of(theirs, "sparsify", tmp_path).hook
    tokens, seen = torch.arange(24)[None], []
    handle = subject.model.base_model.get_submodule(theirs.name).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    ours = subject.activations(tokens, [hook, "mlp_out.1"])
    handle.remove()
    torch.testing.assert_close(ours[hook], seen[-1])
    assert torch.equal(ours["mlp_out.1"], seen[-1]) == same


@pytest.mark.parametrize(
    ("name", "io", "hook"),
    [
        ("resid_post_layer_8", "out", "resid_post.8"),
        ("resid_post_layer_8", "in", "resid_pre.8"),
        ("mlp_out_layer_8", "out", None),
        ("attention_layer_8", "out", None),
        ("layers.8.mlp", "out", "model.layers.8.mlp"),
        ("layers.8.mlp", "in", None),
    ],
)
def test_a_submodule_of_dictionary_learning_is_asked_for_unless_it_is_the_stream(tmp_path, name, io, hook):
    sae, theirs = exported(tmp_path, "dictionary_learning", normalize="none")
    trainer = json.loads((theirs / "config.json").read_text())["trainer"]
    assert trainer.pop("winnow_hook") == "resid_post.9"
    trainer |= {"layer": 8, "submodule_name": name}
    edit(theirs / "config.json", trainer=trainer, buffer={"io": io, "ctx_len": 128, "d_submodule": D})
    card = card_of(theirs, "dictionary_learning", tmp_path)
    assert card.hook == (hook or "unknown")
    assert bool(card.notes) == ("resid" not in name)
    assert any("--hook" in note for note in card.notes) == ("resid" not in name)
    assert error(Sae.load(tmp_path / "ours")(rows()), sae(rows())) < LARGEST_ERROR


@pytest.mark.parametrize("hook", ["mlp_out.3", "resid_pre.3", "model.layers.3.mlp"])
def test_an_export_to_dictionary_learning_says_its_hook(tmp_path, hook):
    export_sae(save(make_sae(), tmp_path / "ours", hook), "dictionary_learning", tmp_path / "theirs")
    card = card_of(tmp_path / "theirs", "dictionary_learning", tmp_path, "back")
    assert (card.hook, card.notes) == (hook, ())


@pytest.mark.parametrize("name", ["sparsify", "dictionary_learning", "saelens"])
@pytest.mark.parametrize(
    ("hook", "norm"),
    [
        ("mlp_out.3", "post_feedforward_layernorm"),
        ("attn_out.3", "post_attention_layernorm"),
        ("resid_post.3", ""),
    ],
)
def test_an_export_says_what_to_hook_where_a_norm_follows(tmp_path, caplog, name, hook, norm):
    export_sae(save(make_sae(normalize="none"), tmp_path / "ours", hook), name, tmp_path / "theirs")
    said = bool(norm) and name != "saelens"
    assert [f"layers.3.{norm}" in message for message in caplog.messages] == [True] * said


@pytest.mark.parametrize(
    ("path", "hook", "target", "noted"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "resid_post.20", None, False),
        ("gemma-scope-2b-pt-mlp/layer_20/width_16k/canonical", "mlp_out.20", None, False),
        ("gemma-scope-9b-pt-att/layer_20/width_16k/canonical", "attn_z.20", None, False),
        ("gemma-scope-2b-pt-transcoders/layer_5/width_16k/canonical", "unknown", "mlp_out.5", True),
        ("elsewhere", "unknown", None, False),
    ],
)
def test_a_path_of_gemma_scope_names_the_place(tmp_path, path, hook, target, noted):
    _, theirs = exported(tmp_path, "gemma-scope", activation="jumprelu")
    folder = tmp_path / path
    folder.mkdir(parents=True)
    (theirs / "params.npz").rename(folder / "params.npz")
    card = card_of(folder, "gemma-scope", tmp_path)
    assert (card.hook, card.target_hook, bool(card.notes)) == (hook, target, noted)


NORM = "model.layers.5.pre_feedforward_layernorm"


@pytest.mark.parametrize(
    ("points", "path", "hook", "target"),
    [
        (["model.layers.5.output"], "x", "resid_post.5", None),
        (["model.layers.5.output"] * 2, "x", "resid_post.5", None),
        (["model.layers.5.post_feedforward_layernorm.output"], "x", "mlp_out.5", None),
        (["model.layers.5.self_attn.o_proj.input"], "x", "attn_z.5", None),
        ([f"{NORM}.output", "model.layers.5.post_feedforward_layernorm.output"], "x", NORM, "mlp_out.5"),
        (None, "resid_post_all/layer_5_width_16k_l0_big", "resid_post.5", None),
        (None, "attn_out/layer_5_width_16k_l0_big", "attn_z.5", None),
        (None, "transcoder_all/layer_5_width_16k_l0_big_affine", NORM, "mlp_out.5"),
    ],
    ids=str,
)
def test_gemma_scope_2_is_read(tmp_path, points, path, hook, target):
    """Its arithmetic written out: JumpReLU of raw rows, and a skip that stands [D, O]."""
    draw = torch.Generator().manual_seed(1)
    state = {"w_enc": torch.randn(D, N, generator=draw), "b_enc": torch.randn(N, generator=draw)}
    state |= {"w_dec": torch.randn(N, D, generator=draw), "b_dec": torch.randn(D, generator=draw)}
    state |= {"threshold": torch.rand(N, generator=draw)}
    if target:
        state["affine_skip_connection"] = torch.randn(D, D, generator=draw)
    folder = tmp_path / path
    folder.mkdir(parents=True)
    safetensors.torch.save_file(state, folder / "params.safetensors")
    if points:
        config = {"architecture": "jump_relu", "width": N, "l0": 20, "model_name": "google/gemma-3-1b-pt"}
        config |= dict(zip(("hf_hook_point_in", "hf_hook_point_out"), points, strict=False))
        (folder / "config.json").write_text(json.dumps(config | {"affine_connection": bool(target)}))
    card = card_of(folder / "params.safetensors", "gemma-scope", tmp_path)
    assert (card.hook, card.target_hook, bool(card.notes)) == (hook, target, hook == "unknown")
    x, pre = rows(), rows() @ state["w_enc"] + state["b_enc"]
    expected = (pre.relu() * (pre > state["threshold"])) @ state["w_dec"] + state["b_dec"]
    expected = expected + x @ state["affine_skip_connection"] if target else expected
    assert error(Sae.load(tmp_path / "ours")(x), expected) < LARGEST_ERROR


# ---- fields and tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "harmless", "odd"),
    [
        ("sparsify", "cfg.json", {"normalize_decoder": False}, {"jumprelu": 0.5}),
        (
            "dictionary_learning",
            "config.json",
            {"buffer": {"n_ctxs": 3, "device": "cuda:0"}},
            {"scaler": 2.0},
        ),
        ("openai", None, {}, {}),
        ("gemma-scope", None, {}, {}),
    ],
)
def test_unknown_fields_are_named_and_unknown_tensors_refused(tmp_path, name, config, harmless, odd):
    kind = {"activation": "jumprelu"} if name == "gemma-scope" else {}
    normalize = "layer" if name == "openai" else "none"
    _, theirs = exported(tmp_path, name, normalize=normalize, **kind)
    if config:
        edit(theirs / config, **harmless)
        assert card_of(theirs, name, tmp_path).notes == ()
        edit(theirs / config, **odd)
        (note,) = card_of(theirs, name, tmp_path, "odd").notes
        assert all(f"{field}: {value!r}" in note for field, value in odd.items())
    (weights,) = (file for file in theirs.iterdir() if file.suffix != ".json")
    if weights.suffix == ".npz":
        np.savez(weights, odd_scale=np.ones(3), **np.load(weights))
    elif weights.suffix == ".pt":
        torch.save(torch.load(weights) | {"odd_scale": torch.ones(3)}, weights)
    else:
        safetensors.torch.save_file(
            safetensors.torch.load_file(weights) | {"odd_scale": torch.ones(3)}, weights
        )
    with pytest.raises(ConfigError, match="odd_scale"):
        card_of(theirs, name, tmp_path, "refused")


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("sparsify", {"activation": "groupmax"}, "groupmax"),
        ("sparsify", {"signed": True}, "signed"),
        ("sparsify", {"num_latents": N + 1}, "num_latents"),
        ("sparsify", {"num_latents": 0, "expansion_factor": 3}, "expansion_factor"),
        ("sparsify", {"d_in": D + 1}, "d_in"),
        ("dictionary_learning", {"dict_size": N + 1}, "dict_size"),
        ("dictionary_learning", {"k": K + 1}, "trainer.k"),
    ],
    ids=str,
)
def test_a_field_that_the_tensors_gainsay_is_refused(tmp_path, name, fields, says):
    _, theirs = exported(tmp_path, name, normalize="none")
    if name == "sparsify":
        edit(theirs / "cfg.json", **fields)
    else:
        trainer = json.loads((theirs / "config.json").read_text())["trainer"]
        edit(theirs / "config.json", trainer=trainer | fields)
    with pytest.raises(ConfigError, match=says):
        card_of(theirs, name, tmp_path)


def test_a_skip_that_the_config_denies_is_refused(tmp_path):
    _, theirs = exported(tmp_path, "sparsify", d_out=D, skip=True, target_normalize="none")
    edit(theirs / "cfg.json", skip_connection=False)
    with pytest.raises(ConfigError, match="W_skip"):
        card_of(theirs, "sparsify", tmp_path)


# ---- another format's file -------------------------------------------------------------------------

KINDS = {
    "openai": {"normalize": "layer"},
    "saelens": {"normalize": "none"},
    "sparsify": {"normalize": "none"},
    "dictionary_learning": {"normalize": "none"},
    "gemma-scope": {"activation": "jumprelu"},
    "qwen-scope": {"normalize": "none"},
    "llama-scope": {"normalize": "none"},
}
"""Formats of an SAE of one hook, and one that they hold."""


def refusal(source, name, tmp_path) -> str:
    args = ["import", str(source), "--from", name, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out").exists()
    return " ".join(result.output.split())


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("asked", KINDS)
def test_each_reader_given_another_formats_files_says_whose_they_are(tmp_path, given, asked):
    if given == asked:
        return
    _, theirs = exported(tmp_path, given, **KINDS[given])
    for source in (theirs, *theirs.iterdir()):
        said = refusal(source, asked, tmp_path)
        assert f"--from {given} reads it" in said
        assert f"(--from {asked})" in said
        assert "run code" not in said


@pytest.mark.parametrize("asked", KINDS)
def test_a_file_under_any_name_is_told_by_what_it_holds(tmp_path, asked):
    """As it is when it was copied out of its folder: the tensors say whose it is."""
    for given in KINDS:
        _, theirs = exported(tmp_path, given, f"from-{given}", **KINDS[given])
        (weights,) = (file for file in theirs.iterdir() if file.suffix != ".json")
        lone = tmp_path / f"lone-{given}" / f"weights{weights.suffix}"
        lone.parent.mkdir()
        weights.rename(lone)
        if given != asked:
            assert f"--from {given} reads such tensors" in refusal(lone, asked, tmp_path)
        elif asked in ("openai", "gemma-scope"):  # these are one file
            assert card_of(lone, asked, tmp_path).latents == N
        elif asked in ("qwen-scope", "llama-scope"):  # one file too, but what it lacks is beside it
            said = "the number of active latents" if asked == "qwen-scope" else "config.json is not there"
            assert said in refusal(lone, asked, tmp_path)
        else:
            assert f"expected a folder with {'config.json' if 'dict' in asked else 'cfg.json'}" in refusal(
                lone, asked, tmp_path
            )


@pytest.mark.parametrize("asked", READERS)
@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "a GGUF"),
        ("params.npz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("ae.pt", b"<!doctype html>", "a web page"),
        ("sae.json", b'{"kind": "winnow.sae"}', "JSON"),
        ("x.safetensors", b"", "empty"),
        ("x.bin", b"\x01\x02\x03\x04", "no importer reads"),
    ],
)
def test_what_no_importer_reads_is_called_what_it_is(tmp_path, asked, name, data, says):
    (tmp_path / name).write_bytes(data)
    said = refusal(tmp_path / name, asked, tmp_path)
    assert says in said
    assert "run code" not in said


def test_no_reader_is_named_for_tensors_that_none_reads(tmp_path):
    """A state dict of a ReLU or TopK in names like SAELens', and in no format's layout."""
    torch.save({name: torch.ones(3) for name in ("W_enc", "b_enc", "W_dec", "scale")}, tmp_path / "x.pt")
    for asked in READERS:
        said = refusal(tmp_path / "x.pt", asked, tmp_path)
        assert "W_dec" in said
        assert "reads" not in said


def test_a_pointer_inside_a_whole_folder_is_named(tmp_path):
    lens_files(tmp_path / "theirs")
    weights = tmp_path / "theirs/sae_weights.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(IntegrityError, match="git lfs pull"):
        card_of(tmp_path / "theirs", "saelens", tmp_path)


def test_a_folder_of_several_and_one_of_our_own_are_told(tmp_path):
    for layer in (0, 1):
        exported(tmp_path, "sparsify", f"all/layers.{layer}", normalize="none")
    assert "all holds 2 SAEs: layers.0, layers.1" in refusal(tmp_path / "all", "sparsify", tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "all").rename(tmp_path / "deep/all")
    assert "deep holds 2 SAEs: all/layers.0, all/layers.1" in refusal(tmp_path / "deep", "sparsify", tmp_path)
    uri = save(make_sae(), tmp_path / "own")
    assert "one of Winnow's own SAEs" in refusal(uri, "sparsify", tmp_path)
