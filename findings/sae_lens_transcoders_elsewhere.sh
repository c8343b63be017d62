#!/usr/bin/env bash
# SAELens measures a transcoder that is the MLP itself as a bad SAE of the MLP's input, and splices one in without its skip.
#
# Guess: `run_evals`' functions compare a transcoder's prediction with the rows of `hook_name_out`: an exact copy of a ReLU MLP
#        explains all variance and its `ce_loss_score` is 1. `run_with_saes` puts the forward pass there, skip included.
# Seen:  sae-lens 6.54.12: `explained_variance` compares the prediction with the rows that were read, and `ce_loss_score` is of a
#        pass in which it replaces them: -1.2 and -0.7 here, without a word. `run_with_saes` puts it at the right place, but as
#        `decode(encode(row))`: a skip transcoder's `W_skip row` is in its forward pass alone (Gemma Scope 2's affine
#        transcoders are of this class), and what was exact is off by nine tenths of its norm. With `use_error_term` the
#        output is right, and all that the skip contributes is error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0

cat > "$folder/show.py" <<'PY'
from importlib.metadata import version
from types import SimpleNamespace

import torch
from sae_lens import HookedSAETransformer
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformerConfig

torch.set_num_threads(1)
torch.manual_seed(0)
D, M, V, T = 16, 64, 32, 24
IN, OUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
sizes = dict(n_layers=1, d_model=D, n_ctx=T, d_head=8, n_heads=2, d_mlp=M, d_vocab=V, act_fn="relu", seed=0)
model = HookedSAETransformer(HookedTransformerConfig(**sizes, normalization_type="LN", device="cpu"))
chain = torch.softmax(3 * torch.randn(V, V), -1)


def text(windows):
    """A Markov chain."""
    tokens = torch.randint(0, V, (windows, T))
    for at in range(1, T):
        tokens[:, at] = torch.multinomial(chain[tokens[:, at - 1]], 1)[:, 0]
    return tokens


# Gain and bias of the norm stay 1 and 0, so that IN is the very row that the MLP is given.
trained = [value for name, value in model.named_parameters() if ".ln2." not in name]
optimiser = torch.optim.Adam(trained, lr=3e-3)
for _ in range(300):
    loss = model(text(32), return_type="loss")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
mlp, skip, eye = model.blocks[0].mlp, torch.randn(D, D) / D**0.5, torch.eye(D)
copy = Transcoder(TranscoderConfig(d_in=D, d_out=D, d_sae=M, apply_b_dec_to_input=False))
tensors = {"W_enc": mlp.W_in, "b_enc": mlp.b_in, "W_dec": mlp.W_out, "b_dec": mlp.b_out}
copy.load_state_dict({name: value.detach().clone() for name, value in tensors.items()})
# The same map with a skip, and 2 D more latents, x = relu(x) - relu(-x), that take the skip out again.
skipping = SkipTranscoder(SkipTranscoderConfig(d_in=D, d_out=D, d_sae=M + 2 * D, apply_b_dec_to_input=False))
more = {"W_enc": torch.cat([mlp.W_in, eye, -eye], 1), "b_enc": torch.cat([mlp.b_in, torch.zeros(2 * D)])}
more |= {"W_dec": torch.cat([mlp.W_out, -skip.T, skip.T]), "b_dec": mlp.b_out, "W_skip": skip}
skipping.load_state_dict({name: value.detach().clone() for name, value in more.items()})
for transcoder in (copy, skipping):
    transcoder.cfg.metadata.hook_name, transcoder.cfg.metadata.hook_name_out = IN, OUT


def gap(a, b):
    return ((a - b).norm() / b.norm()).item()


tokens = text(16)
with torch.no_grad():
    _, clean = model.run_with_cache(tokens)
    row, target = clean[IN], clean[OUT]
    for transcoder, name, spliced_gap in ((copy, "a copy", (0, 1e-5)), (skipping, "with a skip", (0.5, 9))):
        _, got = model.run_with_cache_with_saes(tokens, saes=[transcoder])
        _, whole = model.run_with_cache_with_saes(tokens, saes=[transcoder], use_error_term=True)
        of_error = whole[f"{OUT}.hook_sae_error"].norm() / target.norm()
        forward, spliced = gap(transcoder(row), target), gap(got[f"{OUT}.hook_sae_output"], target)
        print(f"{name}: its forward pass beside the MLP {forward:.0e}, spliced in {spliced:.0e}, error term {of_error:.0e}")
        assert forward < 1e-5
        assert spliced_gap[0] <= spliced < spliced_gap[1]
        assert spliced_gap[0] <= of_error < spliced_gap[1]
store = SimpleNamespace(get_batch_tokens=lambda _: tokens)
asked = dict(n_batches=1, eval_batch_size_prompts=16)
place = (copy, model, store, ActivationScaler())
kinds = dict(compute_l2_norms=False, compute_sparsity_metrics=False, compute_variance_metrics=True)
found, _ = get_sparsity_and_variance_metrics(
    *place, **kinds, compute_featurewise_density_statistics=False, model_kwargs={}, **asked
)
explained = found["explained_variance"]
score = get_downstream_reconstruction_metrics(*place, compute_kl=False, compute_ce_loss=True, **asked)["ce_loss_score"]
of_input = (1 - (copy(row) - row).square().sum() / (row - row.mean((0, 1))).square().sum()).item()
print(f"sae-lens {version('sae-lens')} measures the copy: explained_variance {explained:.3f}, ce_loss_score {score:.3f}")
print(f"the variance of the rows read that its prediction explains: {of_input:.3f}")
assert abs(explained - of_input) < 0.01
assert explained < 0.5 > score
print("as seen: an exact transcoder is measured as an SAE of its input, and a skip is not in the model")
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/show.py"
