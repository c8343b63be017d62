#!/usr/bin/env bash
# dictionary_learning: a BatchTopK SAE of the first 1,000 steps encodes as a ReLU, with far more than K latents.
#
# Guess: `encode` of a BatchTopKSAE gives about K latents a row at any step: those of the batch's K largest on average where
#        the threshold is not known yet, as in training.
# Seen:  dictionary-learning 0.1.0 compares with the threshold's initial value of -1 until `threshold_start_step` (1,000): every
#        positive latent is active, as in every checkpoint saved until then. Here L0 is 20 with K = 8; the same weights give 8.0
#        with `use_threshold=False`; one step later it is 8.1. FVU is lower meanwhile (0.13, then 0.17).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 nnsight==0.8.1 einops==0.8.2 tqdm==4.67.1
"$folder/env/bin/pip" install --quiet --no-deps dictionary-learning==0.1.0

cat > "$folder/show.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer

torch.set_num_threads(1)
torch.manual_seed(0)
D, N, K = 16, 512, 8
directions = torch.nn.functional.normalize(torch.randn(N, D), dim=1)
held = torch.rand(256, N).mul(torch.rand(256, N) < 4 / N) @ directions
trainer = BatchTopKTrainer(
    steps=2000, activation_dim=D, dict_size=N, k=K, layer=0, lm_name="any", device="cpu", warmup_steps=10, seed=0
)


@torch.no_grad()
def figures(**how):
    path = f"{sys.argv[1]}/ae.pt"
    torch.save(trainer.ae.state_dict(), path)
    sae = BatchTopKSAE.from_pretrained(path)
    codes = sae.encode(held, **how)
    lost = (sae.decode(codes) - held).square().sum() / (held - held.mean(0)).square().sum()
    return sae.threshold.item(), (codes > 0).float().sum(1).mean().item(), lost.item()


print("dictionary-learning", version("dictionary-learning"), "torch", torch.__version__, "K =", K)
seen = {}
for step in range(1002):
    trainer.update(step, torch.rand(256, N).mul(torch.rand(256, N) < 4 / N) @ directions)
    if step in (1000, 1001):
        for threshold in (True, False):
            found = seen[step, threshold] = figures(use_threshold=threshold)
            print(f"step {step}, use_threshold={threshold!s:5s}: threshold {found[0]:.3f}, L0 {found[1]:.1f}, FVU {found[2]:.3f}")
early, late = seen[1000, True], seen[1001, True]
same = early[0] == -1 and early[1] > 2 * K and seen[1000, False][1] <= K and late[0] > 0 and late[1] < 1.5 * K
raise SystemExit(0 if same else "no longer as described")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py" "$folder" 2>/dev/null
