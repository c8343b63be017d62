#!/usr/bin/env bash
# transformers 5 loads a folder whose tokenizer.json splits digits one by one and, where tokenizer_config.json
# says GPT2Tokenizer (as SmolLM2's and StarCoder2's do), cuts text by GPT-2's rule instead: other tokens, no word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits

folder = Path(sys.argv[1])
folder.mkdir()
letters = sorted(ByteLevel.alphabet())
vocabulary = {token: number for number, token in enumerate([*letters, "19", "ĠĠ"])}
original = Tokenizer(models.BPE(vocabulary, [("1", "9"), ("Ġ", "Ġ")]))
original.pre_tokenizer = pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
original.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text('{"model_type": "llama"}')

text = "a  1914"
expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("the file's own tokens (expected):", expected)
seen = {}
for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer"):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    seen[name] = loaded.tokenize(text)
    print(f"seen with {name}:", seen[name])
assert seen["PreTrainedTokenizerFast"] == expected == ["a", "ĠĠ", "1", "9", "1", "4"]
assert seen["GPT2Tokenizer"] == ["a", "Ġ", "Ġ", "19", "1", "4"], "the behaviour has changed"
PYTHON
"$folder/env/bin/python" "$folder/read.py" "$folder/model"
