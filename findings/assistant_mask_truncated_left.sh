#!/usr/bin/env bash
# A conversation truncated on the left loses transformers' mask of the assistant's tokens, also of replies that are whole.
#
# Guess: `return_assistant_tokens_mask` marks what is left of the template's {% generation %} blocks, whichever side a
#        truncation takes from. Cut on the right it does.
# Seen:  transformers 5.23.0 stops at the first block whose beginning is cut off: no later reply is marked. A choice of rows
#        by the mask then has none of that conversation, silently; the long ones are those that are truncated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6

cat > "$folder/show.py" <<'PY'
from importlib.metadata import version

from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
words = Tokenizer(models.BPE(letters, []))
words.pre_tokenizer = ByteLevel(add_prefix_space=False)
words.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": role, "content": content}
    for role, content in (("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "ef"))
]


def marked(**options):
    """The conversation's tokens, those that the mask marks in capitals."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **options)
    limit = {"truncation": True, "max_length": 9} if options else {}
    found = tokenizer.apply_chat_template(
        MESSAGES, chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True, **limit
    )
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
    return "".join(token.upper() if mark else token for token, mark in zip(tokens, found["assistant_masks"]))


SEEN = {
    "whole": "<|user|>a<|end|><|assistant|>BC<|END|><|user|>d<|end|><|assistant|>EF<|END|>",
    "right": "<|user|>a<|end|><|assistant|>BC<|END|><|user|>d",
    "left": "c<|end|><|user|>d<|end|><|assistant|>ef<|end|>",
}
found = {"whole": marked(), "right": marked(truncation_side="right"), "left": marked(truncation_side="left")}
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
for name, tokens in found.items():
    print(f"{name:6s}{tokens}")
raise SystemExit(0 if found == SEEN else "no longer as described")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py" 2>/dev/null
