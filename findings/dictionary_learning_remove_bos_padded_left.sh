#!/usr/bin/env bash
# dictionary_learning's `ActivationBuffer(remove_bos=True)` keeps the BOS rows of every text but the longest of a batch.
#
# Guess: no row of BOS, whose norm is far above that of others in most models, is in the buffer.
# Seen:  it drops the first column of a batch. nnsight's LanguageModel pads on the left, where the first column is BOS
#        in the longest text alone and padding in all others: these keep their BOS row, 2 of 3 texts here. Padded
#        on the right none does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 pydantic==2.14.3 \
    sentencepiece==0.2.3 python-socketio==5.18.1 websocket-client==1.9.2 sniffio==1.3.1 einops==0.8.2 tqdm==4.70.1 \
    requests==2.34.2 pillow==13.0.0 zstandard==0.25.0 scipy==1.17.1
# nnsight's own dependencies include a torchvision for another torch; none of them is used here.
"$folder/env/bin/pip" install --quiet --no-deps nnsight==0.3.7 dictionary-learning==0.1.0

cat > "$folder/show.py" <<'PY'
import itertools
import sys
from importlib.metadata import version

import torch
from dictionary_learning.buffer import ActivationBuffer
from nnsight import LanguageModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
D, TEXTS = 16, ["w1 w2 w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12"]
words = ["<bos>", "<pad>", *(f"w{i}" for i in range(30))]
rule = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
rule.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
rule.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
network = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, hidden_size=D, **sizes)).eval()
# A causal model: BOS, which comes first, has the same row in every text.
with torch.no_grad():
    bos = network(torch.tensor([[0]]), output_hidden_states=True).hidden_states[1][0]
tokens = sum(1 + len(text.split()) for text in TEXTS)
found = {}
for side in ("left", "right"):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rule, bos_token="<bos>", pad_token="<pad>", padding_side=side
    )
    model = LanguageModel(network, tokenizer=tokenizer)
    buffer = ActivationBuffer(
        itertools.cycle(TEXTS), model, model.gpt_neox.layers[0], d_submodule=D, n_ctxs=3, ctx_len=8,
        refresh_batch_size=3, remove_bos=True,
    )
    next(buffer)
    # One batch of the three texts; more follow until the buffer is full.
    rows = buffer.activations[: tokens - (1 if side == "left" else 3)]
    found[side] = int(((rows - bos).norm(dim=1) < 1e-4).sum())
print(*(f"{name} {version(name)}" for name in ("dictionary-learning", "nnsight", "transformers")), sep=", ")
print("guess: 0 rows of BOS in a batch of 3 texts, whichever side is padded")
print(f"seen:  {found['left']} padded on the left, {found['right']} padded on the right")
sys.exit(found != {"left": 2, "right": 0})
PY
"$folder/env/bin/python" -W ignore "$folder/show.py" 2>/dev/null
