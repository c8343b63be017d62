#!/usr/bin/env bash
# TransformerLens 3 reads another tensor at a LayerNorm's `hook_normalized` than TransformerLens 2 did.
#
# Guess: `blocks.0.ln2.hook_normalized` holds the same rows in both: SAEs and transcoders are published by that name.
# Seen:  2.16.1 has the norm's whole output, gain and bias included; 3.9.0 what stands before gain and bias.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformer-lens==3.9.0
"$folder/env/bin/pip" install --quiet --no-deps --target "$folder/two" transformer-lens==2.16.1

cat > "$folder/show.py" <<'PY'
import sys

import torch
import torch.nn.functional as F
from transformer_lens import HookedTransformer, HookedTransformerConfig

sizes = dict(n_layers=1, d_model=16, n_ctx=8, d_head=4, n_heads=4, d_mlp=32, d_vocab=20)
model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="gelu", normalization_type="LN", device="cpu", seed=0))
with torch.no_grad():
    model.blocks[0].ln2.w.fill_(3.0)
    model.blocks[0].ln2.b.fill_(1.0)
    cache = model.run_with_cache(torch.arange(8)[None])[1]
before = F.layer_norm(cache["blocks.0.hook_resid_mid"], (16,), eps=model.cfg.eps)
found = cache["blocks.0.ln2.hook_normalized"]
for name, rows in (("before gain and bias", before), ("after gain and bias", 3 * before + 1)):
    if torch.allclose(found, rows, atol=1e-4):
        print(name)
PY
two=$(PYTHONPATH="$folder/two" "$folder/env/bin/python" "$folder/show.py" 2>/dev/null | tail -1)
three=$("$folder/env/bin/python" "$folder/show.py" 2>/dev/null | tail -1)
echo "guess: the same in transformer-lens 2.16.1 and 3.9.0"
echo "seen:  2.16.1 $two; 3.9.0 $three"
[[ $two == "after gain and bias" && $three == "before gain and bias" ]]
