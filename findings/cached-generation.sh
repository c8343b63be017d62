#!/usr/bin/env bash
# transformers 5.23.0: a pass over the prompt, then one token a pass with the cache that the model returned.
#
# Guess: the logits of every step are those of one whole pass over the same tokens, up to float noise (1e-5),
#   as they are for Llama.
# Seen, on small random models in float32:
#   Bamba       differs from the first step on: without `position_ids` the rotary embedding takes every cached
#               token for position 0. With them it does not differ.
#   Moshi       differs from `sliding_window` on: the cache forgets older keys, the whole pass sees them all.
#   Zamba2, Nemotron-H  differ from the first step on: a whole pass clamps the time step at `time_step_min`, a
#               cached step does not.
#   Phi-3 with longrope  differs past `original_max_position_embeddings`: a longer pass rotates all of its
#               positions by the long factors, cached keys stay rotated by the short ones. Hence a row of
#               activations also depends on the length of the window it is read in.
# Fails if any of these has changed. Installs torch (some GB) in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0
cat >check.py <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
PROMPT, LENGTH, NOISE = 6, 30, 1e-5
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
MAMBA = {"mamba_d_state": 8, "mamba_expand": 2, "time_step_min": 0.1}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": {},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "moshi": {"head_dim": 8, "ffn_dim": 64, "num_key_value_heads": 4, "sliding_window": 16},
    "zamba2": {
        **MAMBA,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
    },
    "nemotron_h": {
        **MAMBA,
        "layers_block_type": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 16},
}


def model_of(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **CASES[name]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.7 / parameter.shape[-1] ** 0.5)
    return model.eval()


@torch.no_grad()
def differences(model, ids, *, positions=False):
    """For each length: the largest difference between the last logits of a cached and of a whole pass."""
    cache, found = None, {}
    for end in range(PROMPT, LENGTH + 1):
        first = 0 if cache is None else end - 1
        extra = {"position_ids": torch.arange(first, end)[None]} if positions else {}
        output = model(input_ids=ids[:, first:end], past_key_values=cache, use_cache=True, **extra)
        cache = output.past_key_values
        whole = model(input_ids=ids[:, :end], use_cache=False).logits[0, -1]
        found[end] = (output.logits[0, -1] - whole).abs().max().item()
    return found


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
ids = torch.randint(8, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0))
first_expected = {"llama": None, "bamba": 7, "moshi": 17, "zamba2": 7, "nemotron_h": 7, "phi3": 17}
as_seen = True
for name, expected in first_expected.items():
    model = model_of(name)
    found = differences(model, ids)
    first = next((end for end, off in found.items() if off > NOISE), None)
    as_seen &= first == expected
    print(f"{name}: largest difference {max(found.values()):.1e}, first at {first} tokens (seen: {expected})")
    if name == "bamba":
        off = max(differences(model, ids, positions=True).values())
        as_seen &= off <= NOISE
        print(f"bamba with position_ids: largest difference {off:.1e}")
    if name == "phi3":
        with torch.no_grad():
            short, long = (model(input_ids=ids[:, :end], use_cache=False).logits[0, :16] for end in (16, 17))
        off = (short - long).abs().max().item()
        as_seen &= off > 0.01
        print(f"phi3: the first 16 rows of a window of 17 differ from a window of 16 by {off:.1e}")
sys.exit(0 if as_seen else "this has changed")
PYTHON
venv/bin/python check.py
