#!/usr/bin/env bash
# A sparsify coder that was trained with the Multi-TopK loss reconstructs from 4 k latents whenever it is called, in use too.
#
# Guess: `multi_topk` is an option of the loss: what the coder gives for a row, its reconstruction and its k latents, is
#        the same with and without it.
# Seen:  with it, `coder(x)` gives the 4 k latents and the reconstruction from these, without the skip connection; `fvu` in
#        the same result is that of k latents, and so are `encode` and `decode`. Who measures `sae_out` of a coder that was
#        loaded from disk measures another one than who splices in `decode(encode(x))`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 eai-sparsify==1.3.3

cat > "$folder/show.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from sparsify import SparseCoder, SparseCoderConfig

torch.manual_seed(0)
D, N, K = 24, 96, 6
made = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, multi_topk=True, skip_connection=True))
with torch.no_grad():
    made.W_skip.copy_(0.3 * torch.randn(D, D))
made.save_to_disk(sys.argv[1] + "/layers.1")
coder = SparseCoder.load_from_disk(sys.argv[1] + "/layers.1").eval().requires_grad_(False)
x = torch.randn(64, D)
out, (acts, indices, _) = coder(x), coder.encode(x)
spliced = coder.decode(acts, indices) + x @ coder.W_skip.mT
wide = coder.decode(out.latent_acts, out.latent_indices)


def fvu(found):
    return ((found - x).square().sum() / (x - x.mean(0)).square().sum()).item()


print("eai-sparsify", version("eai-sparsify"))
print(f"guess: {K} latents per row from the call and from encode, and the same reconstruction")
print(f"seen:  {out.latent_indices.shape[1]} from the call, {indices.shape[1]} from encode")
print(f"seen:  FVU of the call's sae_out {fvu(out.sae_out):.3f}, the call's own fvu {out.fvu.item():.3f}, of encode and decode {fvu(spliced):.3f}")
print("sae_out is the 4 k latents' alone, without the skip:", torch.allclose(out.sae_out, wide, atol=1e-5))
same = out.latent_indices.shape[1] == 4 * K and indices.shape[1] == K and torch.allclose(out.sae_out, wide, atol=1e-5)
sys.exit(not (same and abs(out.fvu.item() - fvu(spliced)) < 1e-4 and abs(fvu(out.sae_out) - fvu(spliced)) > 0.01))
PY
SPARSIFY_DISABLE_TRITON=1 "$folder/env/bin/python" "$folder/show.py" "$folder" 2>/dev/null
