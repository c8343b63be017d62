#!/usr/bin/env bash
# Falcon with ALiBi (falcon-rw) is another model under eager attention in transformers: the bias is added twice.
#
# Guess: `attn_implementation` changes rounding: eager and sdpa give the same logits and rows to about 1e-6, as with rotary
#        positions.
# Seen:  transformers 5.23.0: logits and rows differ by some per cent. The bias is part of the mask, and eager attention adds
#        it to the scores as well: with half the bias eager equals sdpa with the whole. Nothing is said. Eager is what libraries
#        choose that read attention patterns; TransformerLens 4.3.0's bridge gives the logits of eager.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

cat > "$folder/show.py" <<'PY'
import sys
from importlib.metadata import version

import torch
import transformers as t
from transformers.models.falcon import modeling_falcon

torch.manual_seed(0)
sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
form = dict(alibi=True, new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True)  # falcon-rw's
whole = modeling_falcon.build_alibi_tensor
ids = torch.randint(97, (2, 12))


def difference(alibi, share):
    """Of eager's logits and last rows from sdpa's, relative; `share`: how much of the bias eager is given."""
    model = t.FalconForCausalLM(t.FalconConfig(**sizes, **form | {"alibi": alibi}, attn_implementation="sdpa")).eval()
    eager = t.FalconForCausalLM(t.FalconConfig(**sizes, **form | {"alibi": alibi}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.3)
        eager.load_state_dict(model.state_dict())
        expected = model(ids, output_hidden_states=True)
        modeling_falcon.build_alibi_tensor = lambda *args, **kwargs: share * whole(*args, **kwargs)
        got = eager(ids, output_hidden_states=True)
        modeling_falcon.build_alibi_tensor = whole
    pairs = (got.logits, expected.logits), (got.hidden_states[-2], expected.hidden_states[-2])
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


print(f"transformers {version('transformers')}; eager from sdpa, logits and rows:")
seen = {}
for name, alibi, share in (("rotary", False, 1), ("ALiBi", True, 1), ("ALiBi, half of it in eager", True, 0.5)):
    seen[name] = difference(alibi, share)
    print(f"{name:>27}: {seen[name][0]:.1e} {seen[name][1]:.1e}")
if not min(seen["ALiBi"]) > 1e-3 > 1e-4 > max(*seen["rotary"], *seen["ALiBi, half of it in eager"]):
    sys.exit("changed")
print("as seen: eager adds ALiBi twice")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py"
