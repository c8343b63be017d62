#!/usr/bin/env bash
# SAELens' `sparsify_disk_loader` calls any module of a layer that layer's residual stream, and does not give back
# what sparsify computes.
#
# Guess: an SAE that sparsify saved for the module `layers.1.mlp` is loaded as one of that MLP's output, and
#        reconstructs what it does in sparsify.
# Seen:  its hook is `blocks.1.hook_resid_post`; b_dec is not taken from the input, where sparsify takes it; W_dec is
#        transposed, which is an error unless the SAE has as many latents as inputs: then other numbers come out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3

cat > "$folder/show.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sparsify import SparseCoder, SparseCoderConfig

torch.manual_seed(0)
D, K = 24, 6
theirs = SparseCoder(D, SparseCoderConfig(num_latents=D, k=K))
with torch.no_grad():
    theirs.b_dec.copy_(torch.randn(D))
path = sys.argv[1] + "/layers.1.mlp"
theirs.save_to_disk(path)
x = torch.randn(64, D)
lens = SAE.load_from_disk(path, converter=sparsify_disk_loader, dtype="float32")
with torch.no_grad():
    expected, found = theirs(x).sae_out, lens(x)
apart = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
again = SparseCoder.load_from_disk(path)(x).sae_out
print("sae-lens", version("sae-lens"), "eai-sparsify", version("eai-sparsify"))
print("guess: the MLP's output, b_dec taken, the same reconstructions")
print(f"seen:  hook {lens.cfg.metadata.hook_name}, b_dec taken: {bool(lens.cfg.apply_b_dec_to_input)}")
print(f"seen:  reconstructions apart by {apart:.2f} of their norm; sparsify's own loader: {(again - expected).abs().max():.0e}")
print("W_dec is transposed:", torch.equal(lens.W_dec, theirs.W_dec.T))
same = lens.cfg.metadata.hook_name == "blocks.1.hook_resid_post" and not lens.cfg.apply_b_dec_to_input
sys.exit(not (same and apart > 0.1 and torch.equal(lens.W_dec, theirs.W_dec.T) and torch.equal(again, expected)))
PY
SPARSIFY_DISABLE_TRITON=1 "$folder/env/bin/python" "$folder/show.py" "$folder" 2>/dev/null
