"""Gemma Scope's `params.npz`: JumpReLU on raw rows.

`W_enc` [D, N], `b_enc` [N], `threshold` [N], `W_dec` [N, O], `b_dec` [O]; `b_dec` is *not* taken from the
input. A transcoder has the same arrays; where O = D only the reader knows which of the two it is.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from trainer.formats.files import read_npz, refuse, take
from trainer.formats.plain import Plain

NAME = "gemma-scope"
FILE = "params.npz"
HOOKS = {"res": "resid_post", "mlp": "mlp_out"}


def read(path: Path, *, transcoder: bool = False) -> Plain:
    """The `params.npz`, or the folder that holds it."""
    file = path / FILE if path.is_dir() else path
    arrays = {("W_" + name[2:] if name.startswith("w_") else name): a for name, a in read_npz(file).items()}
    W_enc, W_dec = take(arrays, "W_enc", file).T, take(arrays, "W_dec", file)
    return Plain(
        activation="jumprelu",
        W_enc=W_enc,
        b_enc=take(arrays, "b_enc", file),
        W_dec=W_dec,
        b_in=torch.zeros(W_enc.shape[1]),
        b_out=take(arrays, "b_dec", file),
        threshold=take(arrays, "threshold", file),
        transcoder=transcoder or W_dec.shape[1] != W_enc.shape[1],
        hook=_hook(file),
    )


def _hook(file: Path) -> str | None:
    """From a path such as `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`."""
    match = re.search(r"gemma-scope-[^/]*-(res|mlp)/layer_(\d+)/", file.as_posix())
    return f"{HOOKS[match[1]]}.{match[2]}" if match else None


def write(plain: Plain, folder: Path) -> None:
    """`params.npz`."""
    if plain.activation == "topk":
        raise refuse(NAME, "TopK, which has no threshold", "Export to saelens, sparsify or openai")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot hold. Export to saelens",
        )
    if plain.W_skip is not None:
        raise refuse(NAME, "a skip connection", "Export to saelens")
    plain = plain.taking(torch.zeros_like(plain.b_in)).single()
    arrays = {
        "W_enc": plain.W_enc.T.contiguous(),
        "b_enc": plain.b_enc,
        "threshold": plain.thresholds,
        "W_dec": plain.W_dec,
        "b_dec": plain.b_out,
    }
    np.savez(folder / FILE, **{name: tensor.numpy() for name, tensor in arrays.items()})  # pyright: ignore[reportArgumentType]
