#!/usr/bin/env bash
# Documents packed into one window: position ids that restart at each of them keep transformers' attention inside a
# document, exactly, but only in a call without a cache and without a mask. The default call lets it through silently.
#
# Guess: position ids decide rotary or learned positions only; to keep packed documents apart takes a 4D mask, or flash
#        attention with sequence lengths. And a mask of ones, or whether a cache is made, changes no logit.
# Seen:  transformers 5.23.0, eager and sdpa: with `use_cache=False` and no mask the second document's logits equal those
#        of the document alone (1e-6) in Llama, Qwen 2, Mistral with a window, GPT-2, GPT-NeoX and Phi. With the
#        default call, or with a mask of ones, they are 5 to 10 off (weights of std 0.3). OPT, BLOOM and Falcon do not keep
#        documents apart either way. Nothing is said in any case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

cat > "$folder/show.py" <<'PY'
from importlib.metadata import version

import torch
import transformers as t

torch.manual_seed(0)
V, A, B = 97, 11, 13
sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
wide = {**sizes, "intermediate_size": 64, "max_position_embeddings": 64}
CONFIGS = {
    "llama": t.LlamaConfig(**wide, num_key_value_heads=4),
    "qwen2": t.Qwen2Config(**wide, num_key_value_heads=4),
    "mistral, window 8": t.MistralConfig(**wide, num_key_value_heads=4, sliding_window=8),
    "gpt2": t.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "gpt_neox": t.GPTNeoXConfig(**wide),
    "phi": t.PhiConfig(**wide),
    "opt": t.OPTConfig(**sizes, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32),
    "bloom": t.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "falcon": t.FalconConfig(**sizes, alibi=False, new_decoder_architecture=False),
}
APART = {"llama", "qwen2", "mistral, window 8", "gpt2", "gpt_neox", "phi"}
print("transformers", version("transformers"))
failed = []
for name, config in CONFIGS.items():
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    # numbers of a trained model's size: BLOOM's small initial weights would hide what is let through
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    first, second = torch.randint(3, V, (1, A)), torch.randint(3, V, (1, B))
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(A), torch.arange(B)])[None]
    with torch.no_grad():
        alone = model(input_ids=second, use_cache=False).logits

        def off(**call):
            logits = model(input_ids=packed, position_ids=positions, **call).logits[:, A:]
            return float((logits - alone).abs().max())

        bare = off(use_cache=False)
        default = off()
        ones = off(use_cache=False, attention_mask=torch.ones_like(packed))
    print(f"{name:18s} no cache, no mask {bare:.0e}   default {default:.0e}   no cache, mask of ones {ones:.0e}")
    apart = [each < 1e-4 for each in (bare, default, ones)]
    if apart != [name in APART, False, False]:
        failed.append(name)
if failed:
    raise SystemExit(f"no longer so: {', '.join(failed)}")
PY
"$folder/env/bin/python" "$folder/show.py" 2>/dev/null
