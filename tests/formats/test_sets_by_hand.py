"""Formats of transcoder sets against their documented layouts, written out: no other library is needed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support.making import dense, make_sae, save
from tests.support.sets import random_set
from winnow.cli.main import app
from winnow.sae.formats.raw import fold, unfold
from winnow.sae.formats.sets import export_set, import_set
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

L, D, N = 3, 16, 32
LARGEST_ERROR = 1e-5


def rows(count=64, seed=1):
    """Raw rows of every layer, with a mean that matters."""
    draw = torch.Generator().manual_seed(seed)
    return {layer: 2 * torch.randn(count, D, generator=draw) + 0.5 for layer in range(L)}


def publish(folder, **options):
    set_ = random_set(L, d_model=D, latents=N, **options)
    set_.save(open_store(str(folder)))
    return set_


def error(found, expected):
    """The largest relative error of a row, over all layers."""
    pairs = [(found[layer], expected[layer]) for layer in expected]
    return max(((a - b).norm(dim=1) / b.norm(dim=1)).max().item() for a, b in pairs)


def codes_of(set_, x):
    return {layer: dense(*code, latents=N) for layer, code in set_.encode(x).items()}


# ---- each format's own arithmetic, from its documentation ------------------------------------------


def as_circuit_tracer(folder, x):
    """Codes and predictions from its files, as its two classes compute them on raw rows."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    cross = config["model_kind"] == "cross_layer_transcoder"
    codes, out = {}, {layer: torch.zeros(len(x[0]), D) for layer in x}
    for layer in x:
        if cross:
            state = load_file(folder / f"W_enc_{layer}.safetensors")
            state = {name.removesuffix(f"_{layer}"): tensor for name, tensor in state.items()}
            state["W_dec"] = load_file(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
            assert state["W_dec"].shape == (N, L - layer, D)
        else:
            state = load_file(folder / f"layer_{layer}.safetensors")
            state["threshold"] = state.pop("activation_function.threshold", None)
            state["W_dec"] = state["W_dec"][:, None]
        pre = x[layer] @ state["W_enc"].T + state["b_enc"]
        if config.get("activation") == "topk":
            best = pre.topk(config["k"], dim=1)
            z = torch.zeros_like(pre).scatter(1, best.indices, best.values)
        else:
            threshold = state.get("threshold")
            z = pre.relu() if threshold is None else pre * (pre > threshold)
        codes[layer] = z
        out[layer] += state["b_dec"] + (x[layer] @ state["W_skip"].T if "W_skip" in state else 0)
        for at, target in enumerate(range(layer, L) if cross else [layer]):
            out[target] += z @ state["W_dec"][:, at]
    return codes, out


def as_clt_forge(folder, x):
    """Predictions from its files: all layers and all decoders at once, scaled rows in and out."""
    config = json.loads((folder / "clt_cfg.json").read_text())
    state = load_file(folder / "clt_weights.safetensors")
    stacked = torch.stack([x[layer] for layer in x], dim=1)
    scaled = stacked * state["estimated_norm_scaling_factor_in"][:, None]
    pre = torch.einsum("bld,ldn->bln", scaled, state["W_enc"]) + state["b_enc"]
    z = pre * (pre > state["log_threshold"].exp())
    if config["cross_layer_decoders"]:
        sources, targets = torch.triu_indices(L, L)
        each = torch.einsum("bpn,pnd->bpd", z[:, sources], state["W_dec"]) + state["b_dec"]
        y = torch.zeros_like(stacked).index_add(1, targets, each)
        assert torch.equal(state["layer_mask"], (sources == torch.arange(L)[:, None]).float())
    else:
        y = torch.einsum("bln,lnd->bld", z, state["W_dec"]) + state["b_dec"]
    y = y / state["estimated_norm_scaling_factor_out"][:, None]
    return {layer: z[:, layer] for layer in x}, {layer: y[:, layer] for layer in x}


THEIRS = {"circuit-tracer": as_circuit_tracer, "clt-forge": as_clt_forge}


# ---- both directions -------------------------------------------------------------------------------


CASES = [
    ("circuit-tracer", False, "topk", True),
    ("circuit-tracer", False, "batchtopk", True),
    ("circuit-tracer", False, "relu", False),
    ("circuit-tracer", True, "jumprelu", True),
    ("circuit-tracer", True, "relu", True),
    ("circuit-tracer", True, "batchtopk", False),
    ("clt-forge", False, "jumprelu", True),
    ("clt-forge", True, "batchtopk", True),
    ("clt-forge", True, "relu", False),
]


@pytest.mark.parametrize(("name", "cross", "activation", "scaled"), CASES)
def test_theirs_on_raw_rows_is_ours_both_ways(tmp_path, name, cross, activation, scaled):
    ours, x = publish(tmp_path / "ours", cross=cross, activation=activation, scaled=scaled), rows()
    export_set(str(tmp_path / "ours"), name, tmp_path / "theirs", model="gpt2")
    codes, out = THEIRS[name](tmp_path / "theirs", x)
    assert error(out, ours(x)) < LARGEST_ERROR
    assert error(codes, codes_of(ours, x)) < LARGEST_ERROR
    card = import_set(tmp_path / "theirs", name, str(tmp_path / "back"), reads="resid_mid")
    back = TranscoderSet.load(tmp_path / "back")
    assert (card.cross, card.of) == (cross, ours.of)
    assert error(back(x), ours(x)) < LARGEST_ERROR
    assert error(codes_of(back, x), codes_of(ours, x)) < LARGEST_ERROR


@pytest.mark.parametrize("reads", ["resid_mid", "mlp_in"])
def test_circuit_tracer_says_what_is_read_and_a_skip_is_kept(tmp_path, reads):
    ours, x = random_set(L, d_model=D, latents=N, reads=reads, activation="relu"), rows()
    for sae in ours._saes.values():
        twin = type(sae)(D, N, 4, sae.normalize_mode, sae.parts.model_copy(update={"skip": True}))
        twin.fill(sae.tensors() | {"W_skip": torch.randn(D, D, generator=torch.Generator().manual_seed(3))})
        ours._saes[str(list(ours._saes.values()).index(sae))] = twin
    ours.save(open_store(str(tmp_path / "ours")))
    export_set(str(tmp_path / "ours"), "circuit-tracer", tmp_path / "theirs")
    assert error(as_circuit_tracer(tmp_path / "theirs", x)[1], ours(x)) < LARGEST_ERROR
    card = import_set(tmp_path / "theirs", "circuit-tracer", str(tmp_path / "back"))
    assert card.reads == reads
    assert error(TranscoderSet.load(tmp_path / "back")(x), ours(x)) < LARGEST_ERROR


def write_gemma(folder, cross, layers=range(L), skip=True, in_folders=False):
    """Files in the published layout, and what they compute."""
    draw = torch.Generator().manual_seed(5)
    states = {}
    for layer in layers:
        state = {
            "w_enc": torch.randn(D, N, generator=draw) / 4,
            "w_dec": torch.randn(*((N, L, D) if cross else (N, D)), generator=draw),
            "b_enc": torch.randn(N, generator=draw) / 10,
            "b_dec": torch.randn(D, generator=draw),
            "threshold": torch.rand(N, generator=draw),
        }
        if skip:
            state["affine_skip_connection"] = torch.randn(D, D, generator=draw)
        path = folder / (f"layer_{layer}_width_16k" if in_folders else "")
        path.mkdir(parents=True, exist_ok=True)
        save_file(state, path / ("params.safetensors" if in_folders else f"params_layer_{layer}.safetensors"))
        states[layer] = state

    def compute(x):
        out = {layer: states[layer]["b_dec"].expand(len(x[layer]), D).clone() for layer in states}
        for layer, state in states.items():
            pre = x[layer] @ state["w_enc"] + state["b_enc"]
            z = pre * (pre > state["threshold"])
            if skip:
                out[layer] += x[layer] @ state["affine_skip_connection"]
            for target in range(layer, L) if cross else [layer]:
                out[target] += z @ (state["w_dec"][:, target] if cross else state["w_dec"])
        return out

    return compute


@pytest.mark.parametrize("in_folders", [False, True], ids=["files", "folders"])
@pytest.mark.parametrize("skip", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_gemma_scope_2_is_read_as_a_set(tmp_path, cross, skip, in_folders):
    theirs, x = write_gemma(tmp_path / "theirs", cross, skip=skip, in_folders=in_folders), rows()
    card = import_set(tmp_path / "theirs", "gemma-scope-2", str(tmp_path / "ours"))
    assert (card.cross, card.reads, len(card.layers)) == (cross, "mlp_in", L)
    assert error(TranscoderSet.load(tmp_path / "ours")(x), theirs(x)) < LARGEST_ERROR


def test_the_hook_points_of_a_published_cross_layer_transcoder_are_understood(tmp_path):
    write_gemma(tmp_path / "theirs", True, skip=False)
    config = {"type": "clt", "architecture": "jump_relu", "affine_connection": False, "l0": 150}
    for side, name in (("in", "pre"), ("out", "post")):
        config[f"hf_hook_point_{side}"] = f"model.layers.{{all}}.{name}_feedforward_layernorm.output"
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    card = import_set(tmp_path / "theirs", "gemma-scope-2", str(tmp_path / "ours"))
    assert (card.cross, card.notes) == (True, ())


def test_clt_forge_scales_and_biases_of_every_pair(tmp_path):
    """What an export of ours never has: scaling factors, a bias a pair, ranks' files."""
    publish(tmp_path / "ours", cross=True, activation="jumprelu")
    export_set(str(tmp_path / "ours"), "clt-forge", tmp_path / "theirs")
    path, draw, x = tmp_path / "theirs" / "clt_weights.safetensors", torch.Generator().manual_seed(2), rows()
    state = load_file(path)
    state |= {
        f"estimated_norm_scaling_factor_{way}": torch.rand(L, generator=draw) + 0.5 for way in ("in", "out")
    }
    state["b_dec"] = torch.randn(state["b_dec"].shape, generator=draw)
    save_file(state, path)
    _, expected = as_clt_forge(tmp_path / "theirs", x)
    import_set(tmp_path / "theirs", "clt-forge", str(tmp_path / "back"), reads="mlp_in")
    assert error(TranscoderSet.load(tmp_path / "back")(x), expected) < LARGEST_ERROR
    config = json.loads((tmp_path / "theirs" / "clt_cfg.json").read_text()) | {"feature_sharding": True}
    (tmp_path / "theirs" / "clt_cfg.json").write_text(json.dumps(config))
    path.unlink()
    axes = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1, "feature_count": 1}
    for rank in range(2):
        half = {n: t.chunk(2, axes[n])[rank].contiguous() if n in axes else t for n, t in state.items()}
        save_file(half, tmp_path / "theirs" / f"rank{rank}_clt_weights.safetensors")
    import_set(tmp_path / "theirs", "clt-forge", str(tmp_path / "joined"), reads="mlp_in")
    assert error(TranscoderSet.load(tmp_path / "joined")(x), expected) < LARGEST_ERROR


def test_folding_is_exact_in_double_precision():
    ours, x = random_set(L, d_model=D, latents=N, cross=True, dtype=torch.float64), rows()
    x = {layer: part.double() for layer, part in x.items()}
    for layer in ours.layers:
        raw = fold(ours[layer])
        pre = x[layer] @ raw.W_enc.T + raw.b_enc
        sae = ours[layer]
        expected = (sae.normalise(x[layer])[0] - sae.b_pre) @ sae.W_enc.T + sae.b_enc
        assert (pre - expected).abs().max() < 1e-12
        latents = torch.tensor([3, 7])
        for at, target in enumerate(ours.targets(layer)):
            assert torch.equal(raw.W_dec[latents, at], ours.decoder_rows(layer, latents, target))


# ---- thresholds in place of TopK -------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Normal rows of every hook of a set of L layers."""
    hooks = {f"{site}.{layer}": D for layer in range(L) for site in ("resid_mid", "mlp_out")}
    plan = make_plan(3, hooks=hooks, dtype="float32", windows_per_unit=64)

    def draw(plan, unit, hook):
        seed = [unit, len(hook), int(hook[-1])]
        return np.random.default_rng(seed).standard_normal((plan.rows_per_unit, D)).astype(np.float32)

    root = tmp_path_factory.mktemp("data")
    write_dataset(open_store(str(root)), plan, draw)
    return str(root)


@pytest.mark.parametrize("name", THEIRS)
def test_a_topk_clt_gets_thresholds_and_what_they_cost(tmp_path, dataset, name):
    publish(tmp_path / "ours", cross=True, k=4)
    with pytest.raises(ConfigError, match="--dataset"):
        export_set(str(tmp_path / "ours"), name, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    found = export_set(str(tmp_path / "ours"), name, tmp_path / "theirs", dataset=dataset)
    codes, out = THEIRS[name](tmp_path / "theirs", rows(512))
    for layer, cost in found.cost.items():
        # Random rows of the same kind: K latents on average, within what 256 held-out rows allow.
        assert cost.l0_topk == pytest.approx(4.0)
        assert cost.l0 == pytest.approx(4.0, rel=0.15)
        assert 0 < cost.threshold < codes[layer].max()
        assert cost.fvu != cost.fvu_topk
    # The figures are those of the exported files: measured again on them.
    back = import_set(tmp_path / "theirs", name, str(tmp_path / "back"), reads="resid_mid")
    assert back.cross
    assert error(TranscoderSet.load(tmp_path / "back")(rows(512)), out) < LARGEST_ERROR


def test_the_command_says_what_thresholds_cost(tmp_path, dataset):
    publish(tmp_path / "ours", k=4)
    command = ["export", str(tmp_path / "ours"), "--to", "circuit-tracer", "--out", str(tmp_path / "theirs")]
    done = CliRunner().invoke(app, [*command, "--dataset", dataset])
    assert done.exit_code == 0, done.output
    assert "L0 4.0 →" in done.output
    assert "FVU" in done.output
    assert "activation_function.threshold" in load_file(tmp_path / "theirs" / "layer_0.safetensors")
    assert "activation" not in yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())


# ---- what is refused -------------------------------------------------------------------------------


def test_a_set_that_does_not_begin_at_layer_0_is_refused(tmp_path):
    random_set((1, 2), d_model=D, latents=N, activation="relu").save(open_store(str(tmp_path / "ours")))
    for name in THEIRS:
        with pytest.raises(ConfigError, match="every layer from 0"):
            export_set(str(tmp_path / "ours"), name, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_input_hook": "ln2.hook_normalized"}, "--reads"),
        ({"feature_output_hook": "hook_resid_post"}, "hook_mlp_out"),
        ({"model_kind": "crosscoder"}, "model_kind"),
        ({"activation": "topk", "k": 0}, "active latents"),
        ({"activation": "gelu"}, "relu, jumprelu or topk"),
        ({"transcoders": ["hf://them/theirs/layer_7.safetensors"]}, "not there"),
    ],
)
def test_circuit_tracer_configs_that_are_refused(tmp_path, change, words):
    publish(tmp_path / "ours", activation="relu")
    export_set(str(tmp_path / "ours"), "circuit-tracer", tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        import_set(tmp_path / "theirs", "circuit-tracer", str(tmp_path / "back"))
    assert not (tmp_path / "back" / "set.json").exists()


def test_damaged_and_incomplete_files_are_refused(tmp_path):
    publish(tmp_path / "ours", cross=True, activation="relu")
    export_set(str(tmp_path / "ours"), "circuit-tracer", tmp_path / "clt")
    (tmp_path / "clt" / "W_enc_2.safetensors").unlink()
    with pytest.raises(IntegrityError, match="2 targets"):  # the decoders tell that a layer is missing
        import_set(tmp_path / "clt", "circuit-tracer", str(tmp_path / "back"))
    (tmp_path / "clt" / "W_enc_0.safetensors").unlink()
    with pytest.raises(ConfigError, match="every layer from 0"):
        import_set(tmp_path / "clt", "circuit-tracer", str(tmp_path / "back"))
    write_gemma(tmp_path / "gemma", cross=True, layers=range(L - 1))
    with pytest.raises(ConfigError, match="3 files"):
        import_set(tmp_path / "gemma", "gemma-scope-2", str(tmp_path / "back"))
    write_gemma(tmp_path / "gemma", cross=True)
    write_gemma(tmp_path / "gemma", cross=True, in_folders=True)
    with pytest.raises(ConfigError, match="one file a layer"):
        import_set(tmp_path / "gemma", "gemma-scope-2", str(tmp_path / "back"))


def test_shapes_that_do_not_fit_are_refused():
    raw = fold(random_set(L, d_model=D, latents=N)[0]).single()
    with pytest.raises(IntegrityError, match="b_dec"):
        unfold(replace(raw, b_dec=torch.zeros(D + 1)), "relu", None)
    with pytest.raises(ValueError, match="NaN"):
        unfold(replace(raw, b_enc=torch.full((N,), torch.nan)), "relu", None)


def test_sets_and_saes_are_not_taken_for_each_other(tmp_path):
    publish(tmp_path / "set", activation="relu")
    save(make_sae(), tmp_path / "sae")
    runs = [
        (["export", str(tmp_path / "set"), "--to", "saelens"], "is a transcoder set"),
        (["export", str(tmp_path / "sae"), "--to", "circuit-tracer"], "is an SAE"),
        (["export", str(tmp_path / "sae"), "--to", "saelens", "--dataset", "data"], "--dataset"),
        (["import", str(tmp_path), "--from", "circuit-tracer", "--hook", "resid_mid.0"], "--hook"),
        (["import", str(tmp_path), "--from", "clt-forge", "--reads", "resid_post"], "--reads"),
        (["import", str(tmp_path), "--from", "saelens", "--reads", "mlp_in"], "--reads"),
    ]
    for command, words in runs:
        done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2, (command, done.output)
        assert words in " ".join(done.stderr.split()), (command, done.stderr)
    assert not (tmp_path / "out").exists()
