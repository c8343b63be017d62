#!/usr/bin/env bash
# SAELens' shuffling buffer holds `n_batches_in_buffer` contexts, not batches of contexts.
#
# Guess: with 32 prompts a batch and 64 batches in the buffer, a training batch of 4,096 rows is drawn from about 2,048 contexts:
#        few of its rows are of the same text. The config's log says so ("n_contexts_per_buffer"), and the docs that a larger
#        number shuffles better.
# Seen:  sae-lens 6.54.12 makes a buffer of 64 contexts, which two batches fill. The first training batch is the first 64 contexts,
#        whole, 64 rows of each; later ones are of 96 to 241 contexts, most of the last few batches, where 2,048 contexts
#        would give some 1,770. Rows of one text are correlated, so the batch is effectively smaller than it looks. The
#        number to ask for is that of contexts: 2,048.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0

cat > "$folder/show.py" <<'PY'
from importlib.metadata import version

import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig

torch.set_num_threads(1)
torch.manual_seed(0)
CONTEXTS, T, D, PROMPTS, BATCHES, ROWS = 8192, 128, 4, 32, 64, 4096
sizes = dict(n_layers=1, d_model=D, n_ctx=T, d_head=4, n_heads=1, attn_only=True, d_vocab=CONTEXTS, seed=0)
model = HookedTransformer(HookedTransformerConfig(**sizes, normalization_type=None, device="cpu"))
# Context number i consists of token i, and a row says which token it is.
model.W_E.data.zero_()
model.W_E.data[:, 0] = torch.arange(CONTEXTS)
contexts = Dataset.from_list([{"tokens": [number] * T} for number in range(CONTEXTS)])


def in_batches(batches_in_buffer):
    """How many contexts each of ten training batches has rows of."""
    store = ActivationsStore(
        model=model,
        dataset=contexts,
        streaming=False,
        hook_name="hook_embed",
        hook_head_index=None,
        context_size=T,
        d_in=D,
        n_batches_in_buffer=batches_in_buffer,
        total_training_tokens=CONTEXTS,
        store_batch_size_prompts=PROMPTS,
        train_batch_size_tokens=ROWS,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    return [len(next(store)[:, 0].round().unique()) for _ in range(10)]


drawn = BATCHES * PROMPTS
expected = drawn * (1 - (1 - 1 / drawn) ** ROWS)
print(f"sae-lens {version('sae-lens')}, {PROMPTS} prompts a batch, {ROWS} rows a training batch")
print(f"{ROWS} rows of {drawn} contexts are of about {expected:.0f}")
found = {number: in_batches(number) for number in (BATCHES, drawn)}
for number, contexts_seen in found.items():
    print(f"n_batches_in_buffer {number}: the training batches have rows of {contexts_seen} contexts")
assert found[BATCHES][0] == BATCHES
assert max(found[BATCHES]) < 0.25 * expected
assert min(found[drawn]) > 0.7 * expected
print("as seen: the number is of contexts")
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/show.py"
