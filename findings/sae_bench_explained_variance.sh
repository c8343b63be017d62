#!/usr/bin/env bash
# SAE-Bench's "explained variance" depends on the rows' scale: of large rows, an SAE that reconstructs nothing explains more
# than 100 %. Five libraries' figures of the same reconstructions agree in two only.
#
# Guess: explained variance, and R², are 1 - FVU: 0 for a reconstruction that is the mean row, below 0 for one that is worse
#        (zeros, or the mean with an offset), and unchanged if rows and reconstruction are multiplied by 100.
# Seen:  sae-lens 6.54.12 and eai-sparsify 1.3.3 are so.
#        sae-bench 0.6.0 divides by E|x|² - (E|x|² / D)², where E|x|² - |E x|² is the variance: here the mean row explains 0.87, and
#        above E|x|² = D² the denominator is negative: the mean row, and zeros too, explain more than 1. Its `mse` is a
#        row's squared error over the number of rows of its batch: twice the batch, half the mse.
#        dictionary-learning 0.1.0 takes the mean off the error too: an offset of every reconstruction costs nothing.
#        overcomplete 0.3.0's R² is about the mean of all numbers, not of each dimension: here the mean row explains 0.89.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 eai-sparsify==1.3.3 scipy \
  tabulate==0.10.0
"$folder/env/bin/pip" install --quiet --no-deps nnsight==0.8.1 greenlet==3.5.6 cloudpickle==3.1.3 httpx
"$folder/env/bin/pip" install --quiet --no-deps sae-bench==0.6.0 dictionary-learning==0.1.0 overcomplete==0.3.0

cat > "$folder/show.py" <<'PY'
import importlib.util
from importlib.metadata import files, version
from types import SimpleNamespace

import torch
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.evaluation import evaluate
from sae_bench.custom_saes.relu_sae import ReluSAE
from sae_bench.evals.core.main import get_sparsity_and_variance_metrics as bench_metrics
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.evals import get_sparsity_and_variance_metrics as lens_metrics
from sae_lens.training.activation_scaler import ActivationScaler
from sparsify import SparseCoder, SparseCoderConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

# The one file: the package around it wants torchvision and more, and these functions do not.
found = next(path for path in files("overcomplete") if path.match("overcomplete/metrics.py"))
spec = importlib.util.spec_from_file_location("overcomplete_metrics", found.locate())
overcomplete = importlib.util.module_from_spec(spec)
spec.loader.exec_module(overcomplete)

torch.set_num_threads(1)
torch.manual_seed(0)
D, N, V, HOOK = 64, 128, 97, "blocks.0.hook_resid_pre"
sizes = dict(n_layers=1, d_model=D, n_ctx=32, d_head=16, n_heads=4, d_mlp=64, d_vocab=V, act_fn="gelu")
model = HookedTransformer(HookedTransformerConfig(**sizes, normalization_type="LN", device="cpu"))
tokens = torch.randint(V, (8, 32))
plain = 3 * torch.randn(D) + torch.randn(V, D)  # rows of variance D about a mean of norm 3 sqrt(D)
asked = dict(compute_l2_norms=False, compute_sparsity_metrics=False, compute_variance_metrics=True, model_kwargs={},
             compute_featurewise_density_statistics=False, n_batches=1, eval_batch_size_prompts=8)


def figures(what, scale, windows=8):
    with torch.no_grad():
        model.W_E.copy_(scale * plain)  # the hook's rows, with positions at 0
        model.W_pos.zero_()
    text = SimpleNamespace(get_batch_tokens=lambda _: tokens[:windows])
    rows = model.run_with_cache(tokens[:windows])[1][HOOK].flatten(0, 1).detach()
    mean = rows.mean(0)
    output = {"mean": mean, "zeros": 0 * mean, "offset": mean + scale}[what]

    def constant(sae, bias):
        """An SAE whose latents are never active, and whose decoder has this bias."""
        for value in sae.parameters():
            value.data.zero_()
        bias.data.copy_(output)
        return sae

    lens = StandardSAE(StandardSAEConfig(d_in=D, d_sae=N))
    lens.cfg.metadata.hook_name = HOOK
    bench = ReluSAE(D, N, "model", 0, torch.device("cpu"), torch.float32, hook_name=HOOK)
    sparsify = SparseCoder(D, SparseCoderConfig(num_latents=N, k=4))
    learning = AutoEncoder(D, N)
    got = bench_metrics(constant(bench, bench.b_dec), model, text, **asked)[0]
    with torch.no_grad():
        return {
            "sae-lens": lens_metrics(constant(lens, lens.b_dec), model, text, ActivationScaler(), **asked)[0][
                "explained_variance"
            ],
            "eai-sparsify": 1 - constant(sparsify, sparsify.b_dec)(rows).fvu.item(),
            "sae-bench": got["explained_variance"],
            "dictionary-learning": evaluate(constant(learning, learning.bias), iter([rows]))["frac_variance_explained"],
            "overcomplete": overcomplete.r2_score(rows, output.expand_as(rows)).item(),
        }, got["mse"]


cases = {(what, scale): figures(what, scale)[0] for what in ("mean", "zeros", "offset") for scale in (1, 100)}
for library in cases["mean", 1]:
    row = "  ".join(f"{what} x {scale}: {cases[what, scale][library]:8.4f}" for what, scale in cases)
    print(f"{library:>20} {version(library):8} {row}")
whole, half = figures("zeros", 1)[1], figures("zeros", 1, 4)[1]
print(f"sae-bench's mse of zeros: {whole:.3f} on 8 windows, {half:.3f} on 4")
for library in ("sae-lens", "eai-sparsify"):
    assert all(abs(cases["mean", scale][library]) < 0.01 for scale in (1, 100)), library
    assert all(cases[what, scale][library] < -0.5 for what in ("zeros", "offset") for scale in (1, 100)), library
bench = {case: values["sae-bench"] for case, values in cases.items()}
assert 0.8 < bench["mean", 1] < 1 and bench["mean", 100] > 1 and bench["zeros", 1] < 0 and bench["zeros", 100] > 1
assert 1.8 < half / whole < 2.2
assert all(abs(values["dictionary-learning"]) < 1e-3 for values in cases.values())
assert all(cases["mean", scale]["overcomplete"] > 0.8 for scale in (1, 100))
print("as seen: of these, sae-lens and eai-sparsify alone compute 1 - FVU")
PY
SPARSIFY_DISABLE_TRITON=1 HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/show.py"
