#!/usr/bin/env bash
# SAELens evaluates an SAE on other rows than those that the SAE's own metadata says it was trained on, and two SAEs on two texts.
#
# Guess: `ActivationsStore.from_sae` gives rows as the SAE's metadata says: contexts begin with BOS if `prepend_bos` is true,
#        documents are joined by its `sequence_separator_token`, `exclude_special_tokens` are left out.
#        After `reset_input_dataset`, which `run_evals` calls between its figures, the next batch is the first again.
# Seen:  sae-lens 6.54.12: a dataset that is tokenised already gets no BOS, in training neither, while the metadata keep the
#        `prepend_bos: true` that was configured. Documents are joined by BOS whatever the metadata say, and special tokens' rows
#        are not left out. Resetting does nothing: `l0` is of other windows than `ce_loss_score`, and a second SAE that
#        is evaluated with the same store gets the next windows. Nothing is said in any case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0

cat > "$folder/show.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from datasets import Dataset
from sae_lens import ActivationsStore, StandardSAE, StandardSAEConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer, PreTrainedTokenizerFast

torch.set_num_threads(1)
WORDS, D, T = 60, 16, 16
BOS, EOS = WORDS, WORDS + 1
names = {f"w{i}": i for i in range(WORDS)} | {"<bos>": BOS, "<eos>": EOS}
rule = Tokenizer(models.WordLevel(names, unk_token="w0"))
rule.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=rule, bos_token="<bos>", eos_token="<eos>").save_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
sizes = dict(n_layers=1, d_model=D, n_ctx=T, d_head=8, n_heads=2, attn_only=True, d_vocab=WORDS + 2, seed=0)
config = HookedTransformerConfig(**sizes, normalization_type=None, device="cpu")
model = HookedTransformer(config, tokenizer=tokenizer)
# A row says which token it is of.
model.W_E.data.zero_()
model.W_E.data[:, 0] = torch.arange(WORDS + 2)

sae = StandardSAE(StandardSAEConfig(d_in=D, d_sae=32))
about = sae.cfg.metadata
about.hook_name, about.context_size, about.prepend_bos = "hook_embed", T, True
about.sequence_separator_token, about.exclude_special_tokens = "eos", [BOS, EOS]
texts = [" ".join(f"w{(7 * number + place) % WORDS}" for place in range(20)) for number in range(400)]
kinds = {
    "text": Dataset.from_list([{"text": text} for text in texts]),
    "tokens": Dataset.from_list([{"tokens": tokenizer(text)["input_ids"][:T]} for text in texts]),
}


def store(kind):
    sizes = dict(store_batch_size_prompts=8, n_batches_in_buffer=16, train_batch_size_tokens=128)
    return ActivationsStore.from_sae(model, sae, kinds[kind], streaming=False, **sizes)


print(f"sae-lens {version('sae-lens')}")
text, tokens = store("text").get_batch_tokens(), store("tokens").get_batch_tokens()
print(f"contexts that begin with BOS: of text {(text[:, 0] == BOS).sum()} of 8, of tokens {(tokens[:, 0] == BOS).sum()} of 8")
assert (text[:, 0] == BOS).all()
assert not (tokens == BOS).any()
joins = {name: int((text[:, 1:] == token).sum()) for name, token in (("BOS", BOS), ("EOS", EOS))}
print(f"between the documents of these contexts: {joins}")
assert joins["BOS"] > 0 == joins["EOS"]
rows = next(store("text"))[:, 0].round()
print(f"rows of BOS among 128 from which special tokens are to be left out: {int((rows == BOS).sum())}")
assert (rows == BOS).any()
one = store("text")
first = one.get_batch_tokens()
one.reset_input_dataset()
second = one.get_batch_tokens()
print(f"after reset_input_dataset, the first batch again: {torch.equal(first, second)}")
assert not torch.equal(first, second)
print("as seen: these are not the rows that the metadata say")
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/show.py" "$folder/tokenizer"
