#!/usr/bin/env bash
# SAELens says that Gemma Scope 2's transcoders read `blocks.L.hook_mlp_in`. In TransformerLens that is the residual
# stream before the MLP's norm; the transcoders read the row after it.
#
# Guess: the `hook_name` of an SAE that SAELens loads is the place in TransformerLens whose rows it reads.
# Seen:  the files say `pre_feedforward_layernorm.output`; `hook_mlp_in` of the model is `hook_resid_mid`, far from that
#        module's output. `mlp.hook_in` of TransformerLens 3's bridge is that output. `hf_hook_name` is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0

cat > "$folder/show.py" <<'PY'
import json, sys
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
D, N, L, root = 32, 64, 1, Path(sys.argv[1])
path = f"transcoder_all/layer_{L}_width_16k_l0_big"
(root / path).mkdir(parents=True)
tensors = {"w_enc": torch.randn(D, N), "b_enc": torch.zeros(N), "threshold": torch.ones(N)}
tensors |= {"w_dec": torch.randn(N, D), "b_dec": torch.zeros(D)}
save_file(tensors, root / path / "params.safetensors")
points = {"hf_hook_point_in": f"model.layers.{L}.pre_feedforward_layernorm.output"}
points |= {"hf_hook_point_out": f"model.layers.{L}.post_feedforward_layernorm.output"}
config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "type": "transcoder", **points}
(root / path / "config.json").write_text(json.dumps(config))
# The hub's two functions, given this folder in its place.
loaders.hf_hub_download = lambda repo_id, filename, **_: str(root / filename)
loaders.get_safetensors_tensor_shapes = lambda repo_id, name: {n: list(t.shape) for n, t in load_file(root / name).items()}
found = loaders.get_gemma_3_config_from_hf("google/gemma-scope-2-1b-pt", path, "cpu")

# A small random model of the family with that norm, which both libraries run.
sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "query_pre_attn_scalar": 8}
model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_implementation="eager")).eval()
for block in model.model.layers:
    torch.nn.init.normal_(block.pre_feedforward_layernorm.weight, std=0.5)
c = model.config
lens = HookedTransformer(HookedTransformerConfig(
    n_layers=2, d_model=D, n_ctx=64, d_head=8, n_heads=4, d_mlp=64, d_vocab=100, act_fn="gelu_pytorch_tanh",
    normalization_type="RMS", eps=c.rms_norm_eps, positional_embedding_type="rotary", rotary_dim=8, gated_mlp=True,
    n_key_value_heads=2, use_attn_scale=True, attn_scale=8**0.5, use_normalization_before_and_after=True,
    attn_scores_soft_cap=c.attn_logit_softcapping, final_rms=True, original_architecture="Gemma2ForCausalLM", device="cpu",
))
lens.load_state_dict(weight_conversions.convert_gemma_weights(model, lens.cfg), strict=False)
lens.set_use_hook_mlp_in(True)
tokens, kept = torch.randint(100, (2, 12)), {}
model.model.layers[L].pre_feedforward_layernorm.register_forward_hook(lambda m, i, o: kept.update(read=o, stream=i[0]))
with torch.no_grad():
    model(tokens)
    cache = lens.run_with_cache(tokens)[1]
row = cache[found["hook_name"]]
def apart(other):
    return ((row - other).norm() / other.norm()).item()
print("sae-lens", version("sae-lens"), "transformer-lens", version("transformer-lens"))
print("guess: its rows are those of", points["hf_hook_point_in"])
print(f"seen:  {found['hook_name']}, {apart(kept['read']):.2f} of the norm from those, {apart(kept['stream']):.0e} from the norm's input")
print("       hf_hook_name:", found["hf_hook_name"])
seen = found["hook_name"] == f"blocks.{L}.hook_mlp_in" and apart(kept["read"]) > 0.1 and apart(kept["stream"]) < 1e-4
sys.exit(not seen)
PY
"$folder/env/bin/python" "$folder/show.py" "$folder" 2>/dev/null
