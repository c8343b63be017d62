#!/usr/bin/env bash
# transformers 5.24.0: architectures that run some of their layers several times in a pass (Dory, Inkling 2 Loop).
#
# Guess: with `output_hidden_states=True` a model of N layers returns N + 1 tensors, and number L + 1 is the output of
#        layer L; a forward hook on layer L sees one output a pass.
# Seen:  one tensor for each run of a layer. Dory with 4 layers, of which 1 and 2 run three times, returns 9; number 4,
#        "the output of layer 3", is that of layer 1 in its second run. Nothing in the output says which run a tensor is
#        of, and a forward hook is called three times. Rows by either way are of another place than their index says.
# Fails if this has changed. Installs torch (some GB) in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.dory.configuration_dory import DoryConfig

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
LAYERS = 4
config = DoryConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, n_input_layers=1, n_output_layers=1, n_recurrent_loops=3,
)
model = AutoModelForCausalLM.from_config(config).eval()
runs = {layer: [] for layer in range(LAYERS)}
for number, layer in enumerate(model.model.layers):
    layer.register_forward_hook(
        lambda _, __, out, n=number: runs[n].append((out[0] if isinstance(out, tuple) else out).clone())
    )
with torch.no_grad():
    states = model(torch.arange(5)[None], output_hidden_states=True, use_cache=False).hidden_states
print(f"{len(states)} hidden states of {LAYERS} layers; outputs that a hook sees: { {n: len(o) for n, o in runs.items()} }")
assert [len(outputs) for outputs in runs.values()] == [1, 3, 3, 1]
assert len(states) == 1 + sum(len(outputs) for outputs in runs.values()), "not one for each run"
assert torch.equal(states[LAYERS], runs[1][1]), "number 4 is not layer 1 in its second run"
assert not torch.equal(states[LAYERS], runs[3][0])
PYTHON
