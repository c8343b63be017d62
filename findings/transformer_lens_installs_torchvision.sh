#!/usr/bin/env bash
# TransformerLens installs torchvision with pip while it loads a model that reads images too, and with it another torch.
#
# Guess: `TransformerBridge.boot_transformers` of a Gemma 3 with a vision tower reads the folder; what is missing for pictures
#        is an error, or left out, and the environment stays as it is.
# Seen:  transformer-lens 4.3.0 runs `pip install torchvision` in the environment that it runs in (`uv pip install` where there
#        is uv), says nothing, and goes on. The newest torchvision is for the newest torch, which takes the place of the one
#        that was pinned, in a process that runs. So does 3.9.0. Pip is told to change nothing here (PIP_DRY_RUN) and
#        reports what it would have installed; PIP_NO_INDEX=1 keeps an environment as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0 pillow

cat > "$folder/show.py" <<'PY'
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge

folder = Path(sys.argv[1], "model")
report = Path(sys.argv[1], "report.json")
text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8)
vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14)
config = t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
t.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
t.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2").save_pretrained(folder)
kinds = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
(folder / "preprocessor_config.json").write_text(json.dumps(kinds))

os.environ |= {"PIP_DRY_RUN": "1", "PIP_REPORT": str(report)}
bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
print(f"transformer-lens {version('transformer-lens')}, torch {version('torch')}: {type(bridge).__name__} of a Gemma 3")
if not report.exists():
    sys.exit("changed: pip was not run")
items = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]}
print("pip would have installed:", ", ".join(f"{name} {items[name]}" for name in ("torchvision", "torch") if name in items))
if "torchvision" not in items or items.get("torch", version("torch")) == version("torch"):
    sys.exit("changed: torch would stay")
print("as seen: loading a model replaces torch")
PY
PATH="$folder/env/bin:/usr/bin:/bin" HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/show.py" "$folder"
