"""Every format against its own library's code, in the peers' environment: `make test-formats`.

Both ways: what the library saves is imported and compared with the library, what is exported is loaded by
the library and compared with Winnow.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from tests.support.making import LARGEST_ERROR, D, K, N, dense, error, make_sae, rows, save
from winnow.sae import Sae
from winnow.sae.formats.convert import export_sae, import_sae

if importlib.util.find_spec("sparsify") is None:
    pytest.skip("the peers' libraries are not here: `make test-formats`", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
OUT = D + 4
ACTIVATIONS = ["topk", "batchtopk", "relu", "jumprelu"]


@torch.no_grad()
def randomise(module, seed=0):
    """Give every parameter of a library's module a value that matters, thresholds above 0."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        if name == "threshold":
            parameter.abs_()
    return module.requires_grad_(False)


def imported(folder, name, tmp_path) -> Sae:
    import_sae(folder, name, str(tmp_path / "imported"))
    return Sae.load(tmp_path / "imported")


def exported(sae, name, tmp_path):
    export_sae(save(sae, tmp_path / "ours"), name, tmp_path / "exported")
    return tmp_path / "exported"


# ---- sparsify --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}], ids=str
)
def test_sparsify_files_are_read(tmp_path, kind):
    from sparsify import SparseCoder, SparseCoderConfig

    theirs = randomise(SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, **kind)))
    theirs.save_to_disk(tmp_path / "layers.4")
    x, ours = rows(), imported(tmp_path / "layers.4", "sparsify", tmp_path)
    assert error(ours(x), theirs(x).sae_out) < LARGEST_ERROR
    codes = theirs.encode(x)
    assert error(dense(*ours.encode(x)), dense(codes.top_acts, codes.top_indices)) < LARGEST_ERROR


@pytest.mark.parametrize(
    "kind",
    [{"normalize": "none"}, {"normalize": "dataset"}, {"d_out": D}, {"d_out": D, "skip": True}],
    ids=str,
)
def test_sparsify_reads_ours(tmp_path, kind):
    from sparsify import SparseCoder

    sae, x = make_sae(**kind), rows()
    theirs = SparseCoder.load_from_disk(exported(sae, "sparsify", tmp_path))
    assert error(theirs(x).sae_out, sae(x)) < LARGEST_ERROR


# ---- SAELens ---------------------------------------------------------------------------------------

LENS = {
    "topk": {"k": K},
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": OUT},
    "skip_transcoder": {"d_out": OUT},
    "jumprelu_transcoder": {"d_out": OUT},
    "jumprelu_skip_transcoder": {"d_out": OUT},
}


@pytest.mark.parametrize("mode", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", LENS)
def test_saelens_files_are_read(tmp_path, architecture, mode):
    from sae_lens.registry import get_sae_class

    if "skip" in architecture and mode == "layer_norm":
        mode = "none"  # refused: see test_by_hand
    module, settings = get_sae_class(architecture)
    taken = "transcoder" not in architecture
    config = settings(
        d_in=D, d_sae=N, normalize_activations=mode, apply_b_dec_to_input=taken, **LENS[architecture]
    )
    theirs = randomise(module(config))
    theirs.save_model(tmp_path / "theirs")
    x, ours = rows(spread=1.0), imported(tmp_path / "theirs", "saelens", tmp_path)
    assert error(ours(x), theirs(x)) < LARGEST_ERROR
    factor = (D - 1) ** 0.5 if mode == "layer_norm" and taken else 1.0  # Winnow's rows have norm 1 there
    assert error(dense(*ours.encode(x)) * factor, theirs.encode(x)) < LARGEST_ERROR


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_saelens_checkpoints_and_published_saes_are_read(tmp_path, architecture):
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class

    module, settings = get_sae_training_class(architecture)
    theirs = randomise(module(settings(d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=True)))
    if architecture == "batchtopk":
        theirs.topk_threshold.fill_(0.8)
    theirs.save_inference_model(tmp_path / "published")
    theirs.save_model(tmp_path / "checkpoint")
    x = rows()
    expected = SAE.load_from_disk(tmp_path / "published")(x)
    for folder in ("published", "checkpoint"):
        import_sae(tmp_path / folder, "saelens", str(tmp_path / f"{folder}-ours"))
        assert error(Sae.load(tmp_path / f"{folder}-ours")(x), expected) < LARGEST_ERROR


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["none", "dataset", "layer"])
def test_saelens_reads_ours(tmp_path, activation, normalize):
    from sae_lens import SAE

    sae, x = make_sae(activation, normalize), rows()
    assert error(SAE.load_from_disk(exported(sae, "saelens", tmp_path))(x), sae(x)) < LARGEST_ERROR


@pytest.mark.parametrize("activation", ["batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_saelens_reads_our_transcoders(tmp_path, activation, skip):
    from sae_lens import SAE

    sae, x = make_sae(activation, d_out=OUT, skip=skip), rows()
    assert error(SAE.load_from_disk(exported(sae, "saelens", tmp_path))(x), sae(x)) < LARGEST_ERROR


# ---- dictionary_learning ---------------------------------------------------------------------------


def dictionary(name):
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D, N, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D, N, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, N, K, [16, N - 16]),
    }
    theirs = randomise(made[name]() if name in made else getattr(classes, name)(D, N))
    if "BatchTopK" in name:
        theirs.threshold.fill_(0.8)
    return theirs


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "AutoEncoder",
        "AutoEncoderNew",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learning_files_are_read(tmp_path, name):
    theirs = dictionary(name)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "layer": 9, "k": K, "lm_name": "someone/model"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    x, ours = rows(), imported(tmp_path, "dictionary_learning", tmp_path)
    assert error(ours(x), theirs(x)) < LARGEST_ERROR
    assert error(dense(*ours.encode(x)), theirs.encode(x)) < LARGEST_ERROR


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["none", "dataset"])
def test_dictionary_learning_reads_ours(tmp_path, activation, normalize):
    from dictionary_learning.utils import load_dictionary

    sae, x = make_sae(activation, normalize), rows()
    theirs, _ = load_dictionary(str(exported(sae, "dictionary_learning", tmp_path)), device="cpu")
    assert error(theirs(x), sae(x)) < LARGEST_ERROR


# ---- every field ----------------------------------------------------------------------------------


def test_every_field_that_the_libraries_write_is_known():
    """A new version's new field fails here before a user's file carries it past us."""
    import ast
    import dataclasses
    import inspect

    import dictionary_learning.buffer
    from dictionary_learning import trainers
    from sae_lens import LanguageModelSAERunnerConfig, registry
    from sae_lens.loading.pretrained_sae_loaders import LLM_METADATA_KEYS
    from sparsify import SparseCoderConfig

    from winnow.sae.formats import dictionary_learning as of_dictionaries
    from winnow.sae.formats import saelens_fields, sparsify

    def written(module):
        """Keys of the dictionaries that a module's `config` properties return."""
        found = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.FunctionDef)]
        dicts = [d for n in found if n.name == "config" for d in ast.walk(n) if isinstance(d, ast.Dict)]
        return {key.value for d in dicts for key in d.keys if isinstance(key, ast.Constant)}

    known = saelens_fields.USED | saelens_fields.OF_TRAINING
    classes = [settings for _, settings in registry.SAE_CLASS_REGISTRY.values()]
    classes += [settings for _, settings in registry.SAE_TRAINING_CLASS_REGISTRY.values()]
    read = [c for c in classes if c.architecture() in saelens_fields.ACTIVATIONS]
    assert len(read) > 10
    for settings in (*read, LanguageModelSAERunnerConfig):
        assert {field.name for field in dataclasses.fields(settings)} - {"sae"} <= known, settings
    assert set(LLM_METADATA_KEYS) <= known
    names = {field.name for field in dataclasses.fields(SparseCoderConfig)} | {"d_in"}
    assert names <= sparsify.USED | sparsify.OF_TRAINING
    keys = set().union(*(written(module) for _, module in inspect.getmembers(trainers, inspect.ismodule)))
    assert "submodule_name" in keys
    assert keys <= of_dictionaries.USED | of_dictionaries.OF_TRAINING
    assert written(dictionary_learning.buffer) <= of_dictionaries.OF_BUFFER


# ---- the peers' own trainers, which the benchmarks measure -----------------------------------------


def test_every_peer_steps_and_saves_what_we_import(tmp_path):
    from benchmarks.peer_trainers import PEERS, Job

    x = rows(spread=3.0)
    for name, make in PEERS.items():
        peer = make(Job(D, N, K, len(x), x, steps=40, lr=1e-2, warmup=2, decay=8, dead_after=5 * len(x)))
        for _ in range(30):
            peer.step(x)
        folder = tmp_path / name
        peer.save(folder)
        import_sae(folder, peer.format, str(tmp_path / f"{name}-ours"))
        ours = Sae.load(tmp_path / f"{name}-ours")
        variance = (x - x.mean(0)).square().sum()
        assert (ours(x) - x).square().sum() < 0.9 * variance, f"{name} has learnt nothing of raw rows"


def test_peer_steps_are_measured_beside_ours():
    from benchmarks.peer_steps import measure_peers
    from benchmarks.peer_trainers import PEERS
    from benchmarks.train_step import SIZES

    found = measure_peers(SIZES["tiny"], rounds=1)
    assert set(found["peers"]) == set(found["peers_over_winnow"]) == set(PEERS)
    assert min(*found["peers"].values(), found["winnow"]) > 0


def test_the_quality_table_is_made_resumed_and_complete(tmp_path, monkeypatch):
    from benchmarks import quality
    from tests.support.evaluated import toy_config
    from winnow.store import ActivationStore

    monkeypatch.setattr(quality, "MOST_RATES", 3)
    config = toy_config(tmp_path)
    bench = quality.Bench(config, ActivationStore.open(config.root), tmp_path / "work", 32, 4, 256, 1.0)
    trainers = list(quality.MIDDLE)
    table = quality.run(bench, trainers, (0, 1), windows=4)
    for name in trainers:
        row = table[name]
        assert row["fvu_by_lr"][f"{row['lr']:g}"] == min(row["fvu_by_lr"].values())
        assert len(row["delta_ce"]) == len(row["fvu_raw"]) == 2
        assert all(0 < fvu < 1.5 for fvu in row["fvu_raw"])
        assert all(0 < l0 <= 4 for l0 in row["l0"])
        assert all(0 <= share < 1 for share in row["dead_share"])
    text = quality.page(table, bench, "make it")
    assert all(f"| {name} |" in text for name in trainers)
    assert quality.draw(table).startswith(b"\x89PNG")

    monkeypatch.setattr(quality, "train", None)  # nothing is trained or measured a second time
    monkeypatch.setattr(quality, "PEERS", {})
    monkeypatch.setattr(quality, "Subject", None)
    assert quality.run(bench, trainers, (0, 1), windows=4) == table
