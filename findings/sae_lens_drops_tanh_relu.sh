#!/usr/bin/env bash
# SAELens 6 reads a `standard` SAE whose cfg.json says `activation_fn_str: tanh-relu` as a plain ReLU, without a word.
#
# Guess: the field that SAELens 5 wrote, and obeyed, is obeyed by SAELens 6 too, or refused.
# Seen:  5.10.4 gives tanh(relu(pre)), 6.54.12 gives relu(pre) from the same two files; neither warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0
"$folder/env/bin/pip" install --quiet --no-deps --target "$folder/five" sae-lens==5.10.4 transformer-lens==2.16.1

cat > "$folder/make.py" <<'PY'
import json, sys
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
D, N = 8, 32
tensors = {"W_enc": torch.randn(D, N), "b_enc": torch.randn(N), "W_dec": torch.randn(N, D), "b_dec": torch.randn(D)}
save_file(tensors, sys.argv[1] + "/sae_weights.safetensors")
config = {  # every field of SAELens 5.10.4's SAEConfig
    "architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
    "activation_fn_str": "tanh-relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False, "normalize_activations": "none", "context_size": 128,
    "model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post", "hook_layer": 3, "hook_head_index": None,
    "prepend_bos": True, "dataset_path": "a/b", "dataset_trust_remote_code": True, "seqpos_slice": [None],
    "sae_lens_training_version": "5.10.4", "neuronpedia_id": None, "model_from_pretrained_kwargs": {},
}
open(sys.argv[1] + "/cfg.json", "w").write(json.dumps(config))
PY
cat > "$folder/read.py" <<'PY'
import sys, warnings
import torch
from safetensors.torch import load_file
from sae_lens import SAE, __version__

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    sae = SAE.load_from_disk(sys.argv[1])
w = load_file(sys.argv[1] + "/sae_weights.safetensors")
x = torch.linspace(-2, 2, 40).reshape(5, 8)
relu = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
with torch.no_grad():
    codes = sae.encode(x)
kind = "tanh(relu)" if torch.allclose(codes, relu.tanh(), atol=1e-4) else "relu" if torch.allclose(codes, relu, atol=1e-4) else "other"
told = any("tanh" in str(w.message) for w in said)
print(__version__, kind, "with a warning" if told else "without a word", f"largest code {codes.max():.2f}")
PY
mkdir "$folder/sae"
"$folder/env/bin/python" "$folder/make.py" "$folder/sae"
five=$(PYTHONPATH="$folder/five" "$folder/env/bin/python" "$folder/read.py" "$folder/sae" 2>/dev/null | tail -1)
six=$("$folder/env/bin/python" "$folder/read.py" "$folder/sae" 2>/dev/null | tail -1)
echo "guess: both tanh(relu), or a refusal"
echo "seen:  $five"
echo "seen:  $six"
[[ $five == "5.10.4 tanh(relu) without a word"* && $six == "6.54.12 relu without a word"* ]]
