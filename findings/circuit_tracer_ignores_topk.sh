#!/usr/bin/env bash
# circuit-tracer 0.5.0 (PyPI) reads a set of TopK transcoders as one of ReLU transcoders.
#
# Guess: `activation: topk` and `k` of a set's config.yaml are used, as by the loader of decoderesearch/circuit-tracer,
#        or refused: 0.5.0 looks newer than the 0.4.1 that reads them.
# Seen:  0.5.0 is a fork of an earlier state and passes over both: every positive latent is active.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformer-lens==3.2.1 nnsight==0.8.1 circuit-tracer==0.5.0
cat > "$folder/show.py" <<'PY'
import sys

import torch
from circuit_tracer.utils.hf_utils import load_transcoders
from safetensors.torch import save_file

torch.manual_seed(0)
path = f"{sys.argv[1]}/layer_0.safetensors"
weights = {"W_enc": torch.randn(64, 8), "W_dec": torch.randn(64, 8), "b_enc": torch.zeros(64), "b_dec": torch.zeros(8)}
save_file(weights, path)
config = {
    "model_kind": "transcoder_set",
    "scan": "mine",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "hook_mlp_out",
    "activation": "topk",
    "k": 4,
    "transcoders": [path],
}
found = load_transcoders(config, device=torch.device("cpu"))
print(int((found[0].encode(torch.randn(1, 8)) > 0).sum()))
PY
active=$("$folder/env/bin/python" "$folder/show.py" "$folder" 2>/dev/null | tail -1)
echo "guess: 4 of 64 latents are active, or an error"
echo "seen:  $active are active"
((active > 16))
