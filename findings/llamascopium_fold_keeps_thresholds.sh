#!/usr/bin/env bash
# Llamascopium's `fold_activation_scale=True` changes which latents of a JumpReLU SAE are active.
#
# Guess: folding the dataset's average norm into the weights leaves active latents and reconstructions as they are; its
#        documentation says so of the `inference` mode that results.
# Seen:  biases and decoder are divided, thresholds are not: they stay those of scaled rows, codes are now of raw rows.
#        A ReLU SAE reconstructs the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 llamascopium==2.0.0b34 transformer-lens==3.9.0

cat > "$folder/show.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from llamascopium import SAEConfig, SparseAutoEncoder

D, HOOK = 16, "blocks.0.hook_resid_post"
torch.manual_seed(0)
x = 5 * torch.randn(256, D)
norm = x.norm(dim=1).mean().item()


def load(act, fold):
    torch.manual_seed(1)
    config = SAEConfig(hook_point_in=HOOK, hook_point_out=HOOK, d_model=D, expansion_factor=4, act_fn=act,
                       norm_activation="dataset-wise", device="cpu", dtype=torch.float32)
    sae = SparseAutoEncoder(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    sae.set_dataset_average_activation_norm({HOOK: norm})
    if fold:
        sae.standardize_parameters_of_dataset_norm()  # what `from_pretrained(..., fold_activation_scale=True)` calls
    return sae


@torch.no_grad()
def run(sae):
    factor = sae.compute_norm_factor(x, HOOK)
    codes = sae.encode(x * factor)
    return sae.decode(codes) / factor, (codes > 0).float().mean().item()


print("llamascopium", version("llamascopium"))
apart = {}
for act in ("relu", "jumprelu"):
    (plain, active), (folded, after) = run(load(act, False)), run(load(act, True))
    apart[act] = ((folded - plain).norm() / plain.norm()).item()
    print(f"{act}: active {active:.3f}, folded {after:.3f}; reconstructions apart by {apart[act]:.0e} of their norm")
print("guess: the same reconstructions from both")
sys.exit(not (apart["relu"] < 1e-5 and apart["jumprelu"] > 0.01))
PY
"$folder/env/bin/python" "$folder/show.py" 2>/dev/null
