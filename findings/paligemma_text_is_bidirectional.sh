#!/usr/bin/env bash
# A text given to PaliGemma is read in both directions, to PaliGemma 2 in one: rows of the first, and of the Gemma taken
# out of it, have seen the tokens that they are to predict. Ones as token_type_ids make the first causal; nothing is said.
#
# Guess: without an image and without token_type_ids a PaliGemma of either generation is its text model, a causal LM: early
#        logits do not depend on the last token. And `AutoModelForCausalLM.from_config(config.text_config)` is a plain Gemma.
# Seen:  transformers 5.23.0: with Gemma inside, earlier logits move by about 5 (weights of std 0.3), with and without a cache.
#        PaliGemmaConfig puts `use_bidirectional_attention: true` into its text config: Gemma obeys it, also when it is taken
#        out alone; Gemma 2, with the same flag, is causal to the bit. token_type_ids of ones are causal, of zeros
#        bidirectional, in both.
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
V = 97
text = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64,
}
TEXTS = {
    "gemma": {**text, "model_type": "gemma"},
    "gemma2": {**text, "model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 16},
}
eyes = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "projection_dim": 32,
}


def ready(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def moves(model, types=None, **call):
    """How far earlier logits move when only the last token changes."""
    one = torch.randint(3, 90, (1, 12))
    other = one.clone()
    other[0, -1] = (one[0, -1] + 5) % 90
    with torch.no_grad():
        a, b = (
            model(input_ids=ids, **call, **({} if types is None else {"token_type_ids": types(ids)})).logits
            for ids in (one, other)
        )
    return float((a - b)[:, :-1].abs().max())


print("transformers", version("transformers"))
found = {}
for name, config in TEXTS.items():
    whole = t.PaliGemmaConfig(text_config=config, vision_config=eyes, image_token_index=95, projection_dim=32)
    model = ready(t.PaliGemmaForConditionalGeneration(whole))
    alone = ready(t.AutoModelForCausalLM.from_config(whole.text_config))
    found[name] = {
        "plain": moves(model),
        "no cache": moves(model, use_cache=False),
        "types 1": moves(model, torch.ones_like),
        "types 0": moves(model, torch.zeros_like),
        "text model alone": moves(alone),
    }
    said = getattr(whole.text_config, "use_bidirectional_attention", None)
    print(f"{name:7s} {', '.join(f'{key}: {value:.1f}' for key, value in found[name].items())}; config says {said}")
first, second = found["gemma"], found["gemma2"]
same = (
    all(first[key] > 0.1 for key in ("plain", "no cache", "types 0", "text model alone"))
    and first["types 1"] == 0
    and all(second[key] == 0 for key in ("plain", "no cache", "types 1", "text model alone"))
    and second["types 0"] > 0.1
)
raise SystemExit(0 if same else "no longer as described")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py"
