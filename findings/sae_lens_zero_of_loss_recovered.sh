#!/usr/bin/env bash
# SAELens' and SAE-Bench's share of the loss recovered is not 0 for an SAE that outputs zeros, once special tokens are left out.
#
# Guess: `ce_loss_score` and `kl_div_score` compare the SAE with zeros at the same positions: an SAE that outputs zeros scores 0.
# Seen:  sae-lens 6.54.12 with `ignore_tokens`, and sae-bench 0.6.0 with `exclude_special_tokens_from_reconstruction` (its
#        default is off), keep the rows of these tokens where the SAE is spliced in; the ablation zeroes them too. An SAE of
#        zeros scores -0.36 here, where keeping BOS alone does more harm than zeroing it as well; where BOS is needed it is
#        above 0. Scores with and without the option have another zero.
#        Also: the KL is a mean over all T positions, the last included, the loss over the T - 1 that predict a token.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 tabulate==0.10.0
"$folder/env/bin/pip" install --quiet --no-deps sae-bench==0.6.0

cat > "$folder/show.py" <<'PY'
from importlib.metadata import version
from types import SimpleNamespace

import torch
from sae_bench.custom_saes.relu_sae import ReluSAE
from sae_bench.evals.core.main import get_downstream_reconstruction_metrics as bench_metrics
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.evals import get_downstream_reconstruction_metrics as lens_metrics
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer, HookedTransformerConfig

torch.set_num_threads(1)
torch.manual_seed(0)
D, T, V, BOS, HOOK = 32, 24, 12, 0, "blocks.0.hook_resid_post"
sizes = dict(n_layers=2, d_model=D, n_ctx=T, d_head=8, n_heads=4, d_mlp=64, d_vocab=V, act_fn="gelu", seed=0)
model = HookedTransformer(HookedTransformerConfig(**sizes, normalization_type="LN", device="cpu"))
chain = torch.softmax(3 * torch.randn(V, V), -1)
chain[:, BOS] = 0


def text(windows):
    """BOS, then a Markov chain over the other tokens."""
    tokens = torch.full((windows, T), BOS)
    for at in range(1, T):
        tokens[:, at] = torch.multinomial(chain[tokens[:, at - 1]], 1)[:, 0]
    return tokens


optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(300):
    loss = model(text(32), return_type="loss")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

tokens = text(16)
store = SimpleNamespace(get_batch_tokens=lambda _: tokens)
lens = StandardSAE(StandardSAEConfig(d_in=D, d_sae=16))
lens.cfg.metadata.hook_name = HOOK
bench = ReluSAE(D, 16, "model", 0, torch.device("cpu"), torch.float32, hook_name=HOOK)
for value in (*lens.parameters(), *bench.parameters()):
    value.data.zero_()
asked = dict(compute_kl=True, compute_ce_loss=True, n_batches=1, eval_batch_size_prompts=16)
print(f"loss of the model {loss.item():.2f}; the score of an SAE that outputs zeros:")
for left_out in ([], [BOS]):
    found = {
        "sae-lens": lens_metrics(lens, model, store, ActivationScaler(), ignore_tokens=left_out, **asked),
        "sae-bench": bench_metrics(
            bench, model, store, ignore_tokens=set(left_out),
            exclude_special_tokens_from_reconstruction=bool(left_out), **asked,
        ),
    }
    for library, values in found.items():
        ce, kl = values["ce_loss_score"], values["kl_div_score"]
        print(f"{library:>10} {version(library)}, {'BOS left out' if left_out else 'all tokens':>12}: ce {ce:.3f}, kl {kl:.3f}")
        assert all(abs(score) > 0.1 for score in (ce, kl)) if left_out else abs(ce) + abs(kl) < 1e-6
with torch.no_grad():
    clean = model(tokens).log_softmax(-1)
    zeroed = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda rows, hook: 0 * rows)]).log_softmax(-1)
each = (clean.exp() * (clean - zeroed)).sum(-1)
kl = lens_metrics(lens, model, store, ActivationScaler(), **asked)["kl_div_with_ablation"]
print(f"kl_div_with_ablation {kl:.4f}; over all positions {each.mean():.4f}, over all but the last {each[:, :-1].mean():.4f}")
assert abs(kl - each.mean()) < 1e-4 < abs(kl - each[:, :-1].mean())
print("as seen: with BOS left out, zeros at the same positions score otherwise than 0")
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/show.py"
