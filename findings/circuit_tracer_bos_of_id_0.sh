#!/usr/bin/env bash
# circuit-tracer never puts a token of id 0 in front of a prompt, so that a tokenizer whose BOS has id 0 gets another one.
#
# Guess: a prompt that begins with no special token gets the tokenizer's BOS, and where there is none its padding or EOS.
# Seen:  0.5.0 passes over ids that are 0. With DeepSeek V3's ids (BOS 0, EOS 1) a prompt begins with the end of a text, with
#        SmolLM2's (BOS and EOS 0, others after them) with <|im_start|>; with Pythia's (id 0 alone) it ends in a bare
#        StopIteration. Nothing is said in the first two cases. Ids that begin with BOS are taken as they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==4.57.3 tokenizers==0.22.2
"$folder/env/bin/pip" install --quiet --no-deps circuit-tracer==0.5.0

cat > "$folder/show.py" <<'PY'
import importlib.util
import sys
from importlib.metadata import files, version

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# The one file: the package around it wants TransformerLens and nnsight, and this function does not.
found = next(path for path in files("circuit-tracer") if path.match("replacement_model/common.py"))
spec = importlib.util.spec_from_file_location("common", found.locate())
common = importlib.util.module_from_spec(spec)
spec.loader.exec_module(common)


def first(names, **special):
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*names, "a", "b"])}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    try:
        ids = common.ensure_tokenized("a b", tokenizer, "cpu", "model").tolist()
    except StopIteration:
        return "StopIteration"
    assert ids[1:] == tokenizer("a b", add_special_tokens=False).input_ids
    return tokenizer.convert_ids_to_tokens(ids)[0]


end, chat = "<|endoftext|>", "<|im_start|>"
seen = {
    "BOS 1, EOS 0": first(["</s>", "<s>"], bos_token="<s>", eos_token="</s>"),
    "BOS 0, EOS 1, as DeepSeek V3": first(["<bos>", "<eos>"], bos_token="<bos>", eos_token="<eos>"),
    "BOS 0 = EOS, others, as SmolLM2": first(
        [end, chat], bos_token=end, eos_token=end, unk_token=end, additional_special_tokens=[end, chat]
    ),
    "BOS 0 = EOS alone, as Pythia": first([end], bos_token=end, eos_token=end, unk_token=end),
}
print("circuit-tracer", version("circuit-tracer"), "transformers", version("transformers"))
for name, token in seen.items():
    print(f"{name:33s} in front of the prompt: {token}")
sys.exit(0 if [*seen.values()] == ["<s>", "<eos>", chat, "StopIteration"] else "this has changed")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py" 2>/dev/null
