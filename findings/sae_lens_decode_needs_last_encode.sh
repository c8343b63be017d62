#!/usr/bin/env bash
# SAELens: what `decode` gives for the same codes depends on which rows were encoded last, for SAEs with `layer_norm`.
#
# Guess: `decode(codes)` is a function of the codes, or takes what it needs of their rows.
# Seen:  sae-lens 6.54.12: an SAE with `normalize_activations: layer_norm` (OpenAI's for GPT-2) restores the mean and the
#        standard deviation of the rows that `encode` last saw. Encode two batches, decode the first: the first one's rows with
#        the second one's means and deviations come out, silently. A second `decode` (of the same codes, edited) is an
#        AttributeError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0

cat > "$folder/show.py" <<'PY'
from importlib.metadata import version

import torch
from sae_lens import StandardSAE, StandardSAEConfig

torch.manual_seed(0)
sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=64, normalize_activations="layer_norm"))
x, other = torch.randn(8, 16), 5 * torch.randn(8, 16) + 3


def moments(rows):
    return rows.mean(1, keepdim=True), rows.std(1, keepdim=True)


def apart(rows, expected):
    return float((rows - expected).norm() / expected.norm())


with torch.no_grad():
    whole = sae(x)
    codes = sae.encode(x)
    sae.encode(other)
    found = sae.decode(codes)
    (mean, std), (other_mean, other_std) = moments(x), moments(other)
    mixed = (whole - mean) / std * other_std + other_mean
    sae.encode(x)
    sae.decode(codes)
    try:
        sae.decode(codes * 0)
        again = "rows"
    except AttributeError as error:
        again = f"AttributeError: {error}"
print("sae-lens", version("sae-lens"), "torch", torch.__version__)
print(f"seen:  {apart(found, whole):.1f} of the norm off; {apart(found, mixed):.0e} off with the other rows' mean and deviation")
print("seen:  a second decode:", again)
same = apart(found, whole) > 1 and apart(found, mixed) < 1e-4 and again.startswith("AttributeError")
raise SystemExit(0 if same else "no longer as described")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py" 2>/dev/null
