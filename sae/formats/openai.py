"""OpenAI's `.pt` (github.com/openai/sparse_autoencoder), layout of its version 5 and the earlier ones.

A state dict: `encoder.weight` [N, D], `latent_bias` [N], `decoder.weight` [D, N], `pre_bias` [D], buffers of
statistics, and two plain values, `activation` (a class name) and `activation_state_dict` (`k`, `postact_fn`).
`TopK` means that rows are layer-normed, any other activation that they are raw, as in the library's loader.
"""

from __future__ import annotations

from pathlib import Path

import torch

from winnow.sae.formats.fields import refuse_tensors, unknown_fields, words
from winnow.sae.formats.files import read_pt, refuse, take
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError, IntegrityError

NAME = "openai"
# Added to the standard deviation by the library's layer norm; imported SAEs keep it exactly.
EPSILON = 1e-5
FILE = "autoencoder.pt"
USED = words("activation activation_state_dict decoder.weight encoder.weight latent_bias pre_bias")
OF_TRAINING = words("latents_activation_frequency latents_mean_square stats_last_nonzero")


def read(path: Path) -> Plain:
    """Read the `.pt` file, or the folder that holds `autoencoder.pt`."""
    file = path / FILE if path.is_dir() else path
    state = read_pt(file)
    refuse_tensors(state, USED | OF_TRAINING, file)
    W_enc = take(state, "encoder.weight", file)
    # Tied SAEs store no decoder: it is the encoder.
    tied = "decoder.weight" not in state
    W_dec = W_enc if tied else take(state, "decoder.weight", file).T
    activation, settings = state.get("activation", "ReLU"), state.get("activation_state_dict") or {}
    topk = activation == "TopK"
    if not topk and activation != "ReLU":
        raise ConfigError(f"{file}: activation", expected="TopK or ReLU", got=repr(activation))
    if topk and settings.get("postact_fn") != "ReLU":
        raise ConfigError(
            f"{file}: TopK followed by {settings.get('postact_fn')}",
            expected="ReLU",
            fix="Winnow's codes are never negative",
        )
    if topk and not isinstance(settings.get("k"), int):
        raise IntegrityError(f"{file}: activation_state_dict", expected="a number k", got=settings)
    # One bias, which the library subtracts from the input and adds to the output.
    b = take(state, "pre_bias", file)
    notes = unknown_fields(settings, ("k", "postact_fn"), file)
    return Plain(
        activation="topk" if topk else "relu",
        W_enc=W_enc,
        b_enc=take(state, "latent_bias", file),
        W_dec=W_dec,
        b_in=b,
        b_out=b,
        k=settings["k"] if topk else None,
        epsilon=EPSILON if topk else None,
        notes=notes,
    )


def write(plain: Plain, folder: Path) -> None:
    """Write `autoencoder.pt`, for `Autoencoder.from_state_dict(torch.load(...))`."""
    if plain.transcoder:
        raise refuse(NAME, "a transcoder", "Export to sparsify or saelens")
    if plain.activation not in ("topk", "relu"):
        raise refuse(NAME, f"activation {plain.activation!r}", "Export to saelens or dictionary_learning")
    topk = plain.activation == "topk"
    if topk != (plain.epsilon is not None):
        raise refuse(
            NAME,
            "TopK on rows that are not layer-normed: its loader always norms them"
            if topk
            else "ReLU on layer-normed rows: its loader never norms them",
            "Each row has its own mean and norm, which weights cannot express. Export to saelens",
        )
    plain = plain.taking(plain.b_out).single()
    latents = len(plain.b_enc)
    state = {
        "pre_bias": plain.b_out,
        "encoder.weight": plain.W_enc,
        "latent_bias": plain.b_enc,
        "decoder.weight": plain.W_dec.T.contiguous(),
        # Statistics of training that its loader requires as buffers, with the values of a new SAE.
        "stats_last_nonzero": torch.zeros(latents, dtype=torch.long),
        "latents_activation_frequency": torch.ones(latents),
        "latents_mean_square": torch.zeros(latents),
        "activation": "TopK" if topk else "ReLU",
        "activation_state_dict": {"k": plain.k, "postact_fn": "ReLU"} if topk else {},
    }
    torch.save(state, folder / FILE)
