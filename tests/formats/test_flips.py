"""Every field of a config changed, one at a time: Winnow gives the library's numbers, or refuses.

In the peers' environment: `make test-formats`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch

from tests.formats.test_libraries import dictionary, randomise
from tests.support.making import LARGEST_ERROR, D, K, N, error, rows
from winnow.sae.formats import dictionary_learning, saelens, saelens_fields, sparsify
from winnow.sae.formats.plain import to_sae
from winnow.schemas.errors import WinnowError

if importlib.util.find_spec("sparsify") is None:
    pytest.skip("the peers' libraries are not here: `make test-formats`", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

SIZES = {"d_in", "d_out", "d_sae", "num_latents", "expansion_factor", "activation_dim", "dict_size", "k"}
TEXTS = ("relu", "topk", "tanh-relu", "layer_norm", "expected_average_only_in", "constant_norm_rescale")
CHOICES = {
    "activation": ("groupmax",),
    "activation_fn_kwargs": ({"k": K - 2}, {"k": K, "signed": True}),
    "architecture": (*saelens_fields.ACTIVATIONS, "abstopk", "matching_pursuit"),
    "dict_class": ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"),
    "dtype": ("float64", "bfloat16"),
    "reshape_activations": ("hook_z",),
}
"""Values of the fields that have others than those of `values_of`."""


def values_of(field, value):
    """Other values that the field may have."""
    if field in CHOICES:
        return [other for other in CHOICES[field] if other != value]
    if isinstance(value, bool):
        return [not value]
    if field in SIZES:
        return [1, 2, K - 1, N]
    return [other for other in (True, 3, 0.5, *TEXTS) if other != value]


def flip(path, config, fields, theirs, ours):
    """Change one field after the other; gives the fields that change the library's reconstructions.

    Args:
        path: The config's file.
        config: The object in it that holds the fields; `path` must be what `theirs` and `ours` read.
        fields: Names of the fields, of any version.
        theirs: Gives the library's reconstructions [B, D].
        ours: Gives Winnow's, and its notes.
    """
    whole = json.loads(path.read_text())
    inner = whole[config] if config else whole
    before, matter = theirs(), set()
    assert error(ours()[0], before) < LARGEST_ERROR
    for field in sorted(fields - {"metadata"}):
        for value in values_of(field, inner.get(field)):
            changed = {**inner, field: value}
            path.write_text(json.dumps({**whole, config: changed} if config else changed))
            try:
                expected = theirs().float()
            except Exception:
                expected = None
            try:
                found, notes = ours()
            except WinnowError:
                found, notes = None, ()
            if expected is not None and (expected.shape != before.shape or error(expected, before) > 1e-4):
                matter.add(field)
            if expected is None or found is None:
                continue
            named = any(f"({field})" in note for note in notes)
            assert named or error(found, expected) < LARGEST_ERROR, f"{field}: {value!r}"
    return matter


@pytest.mark.parametrize("old", [False, True], ids=["6", "5"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated", "jumprelu_transcoder"])
def test_no_field_of_saelens_changes_its_numbers_unseen(tmp_path, architecture, old):
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    module, settings = get_sae_class(architecture)
    across = "transcoder" in architecture
    kind = {"k": K} if architecture == "topk" else {"d_out": D} if across else {}
    theirs, x = (
        randomise(module(settings(d_in=D, d_sae=N, apply_b_dec_to_input=not across, **kind))),
        rows(1.0),
    )
    theirs.save_model(tmp_path)
    path = tmp_path / "cfg.json"
    if old:
        config = json.loads(path.read_text())
        k = config.pop("k", None)
        config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}} if k else {}
        config |= config.pop("metadata") | {"sae_lens_version": "5.1.0"}
        path.write_text(json.dumps(config | {"hook_name": "blocks.3.hook_resid_post"}))

    def ours():
        plain = saelens.read(tmp_path)
        return to_sae(plain)(x), plain.notes

    fields = {field.name for field in dataclasses.fields(settings)} | saelens_fields.USED
    matter = flip(path, "", fields, lambda: SAE.load_from_disk(tmp_path)(x), ours)
    expected = {"normalize_activations", "dtype"} | ({"apply_b_dec_to_input"} if not across else set())
    if architecture == "topk":
        expected |= {"activation_fn_kwargs"} if old else {"k", "rescale_acts_by_decoder_norm"}
    assert expected <= matter


def test_no_field_of_sparsify_changes_its_numbers_unseen(tmp_path):
    from sparsify import SparseCoder, SparseCoderConfig

    theirs, x = randomise(SparseCoder(D, SparseCoderConfig(num_latents=N, k=K))), rows()
    folder = tmp_path / "layers.4"
    theirs.save_to_disk(folder)

    def ours():
        plain = sparsify.read(folder)
        return to_sae(plain)(x), plain.notes

    fields = sparsify.USED | sparsify.OF_TRAINING
    matter = flip(
        folder / "cfg.json", "", fields, lambda: SparseCoder.load_from_disk(folder)(x).sae_out, ours
    )
    assert {"k", "transcode", "multi_topk"} <= matter


@pytest.mark.parametrize(
    "name", ["AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"]
)
def test_no_field_of_dictionary_learning_changes_its_numbers_unseen(tmp_path, name):
    from dictionary_learning.utils import load_dictionary

    torch.save(dictionary(name).state_dict(), tmp_path / "ae.pt")
    trainer, path, x = {"dict_class": name, "layer": 9, "k": K}, tmp_path / "config.json", rows()
    path.write_text(json.dumps({"trainer": trainer}))

    def ours():
        plain = dictionary_learning.read(tmp_path)
        return to_sae(plain)(x), plain.notes

    fields = dictionary_learning.USED | dictionary_learning.OF_TRAINING
    matter = flip(path, "trainer", fields, lambda: load_dictionary(str(tmp_path), "cpu")[0](x), ours)
    assert matter == ({"dict_class"} if "TopK" in name else set())
