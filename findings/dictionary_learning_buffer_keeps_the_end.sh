#!/usr/bin/env bash
# dictionary_learning's ActivationBuffer never gives the last rows of a stream of texts, and of one smaller than itself none.
#
# Guess: a pass over a corpus trains on all of its rows, but for an incomplete last batch.
# Seen:  dictionary-learning 0.1.0 fills the buffer before it gives a batch, and again when half of it is read. A stream that
#        ends meanwhile ends the iteration: whatever is in the buffer is lost, half of it or more. Of a corpus smaller than
#        the buffer (`n_ctxs`, 30,000 texts by default) a training loop takes no step, and ends without a word. A pass over 300
#        texts gives 66 % of their rows here; rows of the last texts of each filling, which no longer fit, are lost too.
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
from importlib.metadata import version

import torch
from dictionary_learning.buffer import ActivationBuffer
from nnsight import LanguageModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
torch.manual_seed(0)
D, T, ROWS, CONTEXTS = 16, 8, 16, 128
rule = Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{i}": i + 1 for i in range(31)}}, unk_token="<pad>"))
rule.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
network = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, hidden_size=D, **sizes)).eval()
model = LanguageModel(network, tokenizer=PreTrainedTokenizerFast(tokenizer_object=rule, pad_token="<pad>"))


def given(texts):
    """Rows in one pass over so many texts of T tokens."""
    stream = iter([" ".join([f"w{number % 31}"] * T) for number in range(texts)])
    buffer = ActivationBuffer(
        stream, model, model.gpt_neox.layers[0], d_submodule=D, n_ctxs=CONTEXTS, ctx_len=T,
        refresh_batch_size=8, out_batch_size=ROWS,
    )
    return sum(len(batch) for batch in buffer)


print(*(f"{name} {version(name)}" for name in ("dictionary-learning", "nnsight", "transformers")), sep=", ")
print(f"a buffer of {CONTEXTS} contexts, texts of {T} rows, batches of {ROWS}")
found = {texts: given(texts) for texts in (100, 128, 300)}
for texts, rows in found.items():
    print(f"{texts} texts have {texts * T} rows; one pass gives {rows} of them")
assert found[100] == 0
assert 0 < found[128] < 0.6 * 128 * T
assert 0 < found[300] < 0.75 * 300 * T
print("as seen: what is in the buffer when the texts end is lost")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py" 2>/dev/null
