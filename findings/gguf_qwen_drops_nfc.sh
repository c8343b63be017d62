#!/usr/bin/env bash
# Qwen's tokenizer normalises text to NFC first. A GGUF has no field for it, and `tokenizer.ggml.pre: qwen2` names the
# splitting only: llama.cpp (here in cyllama) gives a letter with a combining accent other tokens than the tokenizer
# that the file was made from. Rows of such texts differ, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 cyllama==0.2.18
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import cyllama.llama.llama_cpp as llama
import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.qwen2 import Qwen2Tokenizer

path = Path(sys.argv[1])
tokens = [*sorted(ByteLevel.alphabet()), "Ã©", "<|endoftext|>"]  # each byte, an é of two bytes, the end
merges = ["Ã ©"]
vocabulary = {token: number for number, token in enumerate(tokens)}
original = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])

writer = gguf.GGUFWriter(path, "qwen2")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types([*[gguf.TokenType.NORMAL] * (len(tokens) - 1), gguf.TokenType.CONTROL])
writer.add_token_merges(merges)
writer.add_eos_token_id(len(tokens) - 1)
# A model of one layer, since llama.cpp opens no file without one.
wide, inner = 32, 64
for name, value in {
    "context_length": 64, "embedding_length": wide, "block_count": 1, "feed_forward_length": inner, "head_count": 1,
    "head_count_kv": 1, "layer_norm_rms_eps": 1e-6,
}.items():
    getattr(writer, f"add_{name}")(value)
sizes = {"token_embd.weight": (len(tokens), wide), "output_norm.weight": (wide,)}
sizes |= {f"blk.0.{part}_norm.weight": (wide,) for part in ("attn", "ffn")}
sizes |= {f"blk.0.attn_{part}.weight": (wide, wide) for part in ("q", "k", "v", "output")}
sizes |= {f"blk.0.attn_{part}.bias": (wide,) for part in ("q", "k", "v")}
sizes |= {f"blk.0.ffn_{part}.weight": (inner, wide) for part in ("gate", "up")} | {"blk.0.ffn_down.weight": (wide, inner)}
for name, size in sizes.items():
    writer.add_tensor(name, np.zeros(size, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

live = llama.LlamaModel(str(path), llama.LlamaModelParams())
vocab = live.get_vocab()

print("transformers", version("transformers"), "cyllama", version("cyllama"), "gguf", version("gguf"))
seen = {}
for name, text in {"composed": "\u00e9", "combining": "e\u0301"}.items():
    seen[name] = {
        "Qwen2Tokenizer": original(text)["input_ids"],
        "llama.cpp": list(vocab.tokenize(text, add_special=False, parse_special=False)),
    }
    print(name, ascii(text), json.dumps(seen[name]))
one = [vocabulary["Ã©"]]
spelt = [vocabulary[mark] for mark in ("e", "Ì", "ģ")]
print("expected: one token", one, "for both texts from both, as in the tokenizer that the file was made from")
assert set(map(tuple, seen["composed"].values())) == {tuple(one)}
assert seen["combining"]["Qwen2Tokenizer"] == one
assert seen["combining"]["llama.cpp"] == spelt, "the behaviour has changed"
PYTHON
"$folder/env/bin/python" "$folder/read.py" "$folder/qwen.gguf" 2>"$folder/log" || { tail -n 5 "$folder/log" >&2; exit 1; }
