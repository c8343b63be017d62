"""What TransformerLens and SAELens read, against what Winnow reads of the same model: `make test-formats`."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from tests.formats.test_foreign_fields import lens_files
from tests.support.making import dense, error
from tests.support.tiny import make_subject
from winnow.sae import Sae
from winnow.sae.formats.convert import export_sae, import_sae
from winnow.sae.formats.lens import CENTRES, SAME_ROWS
from winnow.sae.formats.names import to_lens
from winnow.subject.load import Subject

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("the peers' libraries are not here: `make test-formats`", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
WIDTH = 32
SITES = [f"{site}.1" for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")]
OPTIONS = dict.fromkeys((CENTRES, *SAME_ROWS), False)


def lens_rows(model, tokens, **options):
    """What TransformerLens reads at `SITES` of a model of transformers, each [W * T, D]."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    c = model.config
    kind = {
        "n_layers": 4,
        "d_model": WIDTH,
        "n_ctx": 256,
        "d_head": WIDTH // 4,
        "n_heads": 4,
        "d_mlp": 2 * WIDTH,
    }
    kind |= {"d_vocab": c.vocab_size, "device": "cpu"}
    if c.model_type == "gpt2":
        kind |= {"act_fn": "gelu_new", "normalization_type": "LN", "eps": c.layer_norm_epsilon}
        convert = weight_conversions.convert_gpt2_weights
    else:
        kind |= {"act_fn": "gelu_pytorch_tanh", "normalization_type": "RMS", "eps": c.rms_norm_eps}
        kind |= {"positional_embedding_type": "rotary", "rotary_dim": WIDTH // 4, "gated_mlp": True}
        kind |= {"n_key_value_heads": 2, "use_attn_scale": True, "attn_scale": c.query_pre_attn_scalar**0.5}
        kind |= {"use_normalization_before_and_after": True, "attn_scores_soft_cap": c.attn_logit_softcapping}
        kind |= {"rotary_base": 10_000, "final_rms": True}
        convert = weight_conversions.convert_gemma_weights
    kind["original_architecture"] = type(model).__name__
    lens = HookedTransformer(HookedTransformerConfig(**kind), move_to_device=False)
    lens.load_and_process_state_dict(convert(model, lens.cfg), **OPTIONS | options)
    with torch.no_grad():
        cache = lens.run_with_cache(tokens)[1]
    return {hook: cache[to_lens(hook)].flatten(0, 1) for hook in SITES}


@pytest.fixture(params=["gpt2", "gemma2"])
def subject(request, tmp_path):
    return Subject.load(
        {"model": str(make_subject(tmp_path / "subject", request.param)), "attention": "eager"}
    )


def test_transformer_lens_reads_what_winnow_reads_and_its_options_do_what_we_say(subject):
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(384, (3, 16), generator=torch.Generator().manual_seed(0))
    ours = {hook: rows.flatten(0, 1) for hook, rows in subject.activations(tokens, SITES).items()}
    model = AutoModelForCausalLM.from_pretrained(subject.spec.model, attn_implementation="eager")
    normed = model.config.model_type == "gpt2"
    for name in (None, *OPTIONS):
        if name == "refactor_factored_attn_matrices" and not normed:
            continue  # not with rotary embeddings
        theirs = lens_rows(model, tokens, **({name: True} if name else {}))
        for hook in SITES:
            expected = ours[hook]
            if name == CENTRES and normed:
                expected = expected - expected.mean(1, keepdim=True)
            assert error(theirs[hook], expected) < 1e-4, (name, hook)


def test_the_bridge_s_names_are_of_the_rows_that_winnow_reads(subject):
    """TransformerLens 3's bridge has a hook at `mlp_in`, which HookedTransformer has not."""
    from transformer_lens.model_bridge import TransformerBridge

    tokens = torch.randint(384, (3, 16), generator=torch.Generator().manual_seed(0))
    ours = subject.activations(tokens, [*SITES, "mlp_in.1"])
    bridge = TransformerBridge.boot_transformers(str(subject.spec.model), device="cpu")
    with torch.no_grad():
        cache = bridge.run_with_cache(tokens)[1]
    for hook, rows in ours.items():
        assert error(cache[to_lens(hook)].flatten(0, 1), rows.flatten(0, 1)) < 1e-4, hook


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_an_sae_of_centred_rows_gives_the_same_codes_and_errors_on_raw_ones(
    tmp_path, architecture, normalize
):
    """SAELens on TransformerLens' centred rows; Winnow on the rows of the model as it is."""
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM

    subject = Subject.load({"model": str(make_subject(tmp_path / "subject", "gpt2")), "attention": "eager"})
    tokens = torch.randint(384, (3, 16), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(subject.spec.model, attn_implementation="eager")
    hook = "resid_post.1"
    raw = subject.activations(tokens, [hook])[hook].flatten(0, 1)
    centred = lens_rows(model, tokens, center_writing_weights=True)[hook]
    metadata = {"model_from_pretrained_kwargs": {CENTRES: True}, "hook_name": to_lens(hook)}
    lens_files(tmp_path / "theirs", architecture, WIDTH, normalize_activations=normalize, metadata=metadata)
    theirs = SAE.load_from_disk(tmp_path / "theirs")
    card = import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "ours"))
    ours = Sae.load(tmp_path / "ours")
    factor = (WIDTH - 1) ** 0.5 if normalize == "layer_norm" else 1.0
    codes = dense(*ours.encode(raw)) * factor
    assert error(codes, theirs.encode(centred)) < 1e-4
    assert error(ours(raw) - raw, theirs(centred) - centred) < 1e-4
    assert error(theirs.encode(raw), codes) > 0.01 or normalize == "layer_norm"  # it matters
    assert card.parts.centred == (normalize == "none")

    export_sae(str(tmp_path / "ours"), "saelens", tmp_path / "back")
    told = json.loads((tmp_path / "back/cfg.json").read_text())["metadata"]
    assert told.get("model_from_pretrained_kwargs", {}).get(CENTRES, False) == (normalize == "none")
    assert error(SAE.load_from_disk(tmp_path / "back")(centred), theirs(centred)) < 1e-4


def test_a_transcoder_of_centred_rows_gives_the_same_codes(tmp_path):
    from sae_lens import SAE

    metadata = {"model_from_pretrained_kwargs": {CENTRES: True}, "hook_name": "blocks.1.hook_resid_pre"}
    metadata |= {"hook_name_out": "blocks.1.hook_mlp_out"}
    lens_files(tmp_path / "theirs", "skip_transcoder", WIDTH, d_out=WIDTH, metadata=metadata)
    theirs = SAE.load_from_disk(tmp_path / "theirs")
    card = import_sae(tmp_path / "theirs", "saelens", str(tmp_path / "ours"))
    ours, raw = Sae.load(tmp_path / "ours"), 3 * torch.randn(40, WIDTH) + 1
    centred = raw - raw.mean(1, keepdim=True)
    assert error(dense(*ours.encode(raw)), theirs.encode(centred)) < 1e-4
    assert error(ours(raw), theirs(centred)) < 1e-4
    assert any("lacks each target row's mean" in note for note in card.notes)
