"""A transcoder set's layer on raw rows, the form that other libraries' files have, and the folding into it.

Legend: B rows, D width of the residual stream, N latents, T targets of a layer, O = T D.

In Winnow a layer reads normalised rows and writes normalised rows. Both normalisations are affine::

    pre   = W_enc ((x - mean) / scale - b_pre) + b_enc  =  (W_enc / scale) x + b
    y_m  += scale_m (W_dec_m^T z + b_dec_m) + mean_m    =  (scale_m W_dec_m)^T z + ...

so that they fold into the weights. Codes stay the same numbers; decoder rows get their target's scale, since
the targets of a cross-layer transcoder have one each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.activations import OWN
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError
from winnow.schemas.layers import SetSpec
from winnow.schemas.training import Activation, SaeParts


@dataclass(frozen=True)
class RawLayer:
    """``z = act(W_enc x + b_enc)``; ``W_dec[:, t]^T z`` to each target, ``b_dec + W_skip x`` to its own."""

    W_enc: Tensor
    """[N, D]."""
    b_enc: Tensor
    """[N]."""
    W_dec: Tensor
    """[N, T, D]; the layer's own MLP output comes first."""
    b_dec: Tensor
    """[D]: of the layer's own MLP output, of which it is the whole bias."""
    threshold: Tensor | None = None
    """[N] with thresholds; None without."""
    W_skip: Tensor | None = None
    """[D, D]: ``W_skip @ x``, for the layer's own MLP output."""

    def single(self) -> RawLayer:
        """The same with every tensor contiguous and in single precision."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: t.detach().float().contiguous() for name, t in tensors.items() if t is not None}
        )


@dataclass(frozen=True)
class RawSet:
    """Another library's set: what its files say of all layers, and how one of them is read."""

    of: SetSpec
    activation: Activation
    """`topk`, `relu` or `jumprelu`."""
    read: Callable[[int], RawLayer]
    """Read a layer. One at a time: all decoders of a cross-layer transcoder may not fit in memory."""
    k: int | None = None
    """Active latents per row with `topk`."""
    notes: tuple[str, ...] = ()
    """What the files say and the set cannot hold, one sentence each."""


def fold(sae: Sae) -> RawLayer:
    """Fold the normalisation of a set's layer into its weights, in double precision.

    Raises:
        ConfigError: Rows are normalised one by one, or the activation is not Winnow's own.
        IntegrityError: It has a bias for the MLP output of another layer than its own.
    """
    if sae.parts.activation not in OWN:
        raise ConfigError(
            f"activation {sae.parts.activation} cannot be exported", expected=", ".join(sorted(OWN))
        )
    if sae.normalize_mode == "layer":
        raise ConfigError(
            "a set of layer-normed rows cannot be exported",
            expected="normalize: dataset or none",
            fix="Each row has its own mean and norm, which weights cannot express",
        )
    tensors = {name: tensor.double() for name, tensor in sae.tensors().items()}
    zero, one = torch.zeros(sae.d_model, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    mean, scale = tensors.get("input_mean", zero), tensors.get("input_scale", one)
    scaled = "target_scale" in tensors
    norm = (sae.target_norm.double() if scaled else one).expand(sae.d_out)
    W_enc = tensors["W_enc"] / scale
    # In float64: the mean may be large against the codes, and its product with W_enc cancels in the bias.
    b_enc = tensors["b_enc"] - tensors["W_enc"] @ tensors["b_pre"] - W_enc @ mean
    b_out = norm * tensors["b_dec"] + tensors.get("target_mean", torch.zeros_like(norm))
    W_skip = tensors.get("W_skip")
    if W_skip is not None:
        W_skip = norm[:, None] * W_skip / scale
        b_out = b_out - W_skip @ mean
    own = slice(0, sae.d_model)
    # The formats have one bias a target. By the contract of a set, the target's own layer holds all of it.
    for name, tensor in (("bias", b_out), ("skip", W_skip)):
        if tensor is not None and bool(tensor[sae.d_model :].any()):
            raise IntegrityError(
                f"the {name} of a layer's further targets", expected="0", got="other numbers"
            )
    threshold = tensors.get("threshold")
    return RawLayer(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=(tensors["W_dec"] * norm).view(sae.latents, -1, sae.d_model),
        b_dec=b_out[own],
        threshold=None if threshold is None else threshold.expand(sae.latents),
        W_skip=None if W_skip is None else W_skip[own],
    )


def unfold(layer: RawLayer, activation: Activation, k: int | None) -> Sae:
    """The transcoder that reads and writes raw rows with these weights: `normalize: none`.

    Raises:
        IntegrityError: The shapes do not fit each other.
        NonFiniteError: A weight is NaN or infinite.
    """
    _check(layer)
    latents, width = layer.W_enc.shape
    targets = layer.W_dec.shape[1]
    parts = SaeParts(
        activation=activation,
        d_out=targets * width,
        target_widths=(width,) * targets if targets > 1 else (),
        target_normalize="none",
        skip=layer.W_skip is not None,
    )
    # ReLU and JumpReLU files have no k; the card requires one, and encoding does not use it.
    sae = Sae(width, latents, min(k or 1, latents), "none", parts)
    b_dec = torch.zeros(targets * width)
    b_dec[:width] = layer.b_dec
    tensors = {"W_enc": layer.W_enc, "b_enc": layer.b_enc, "b_dec": b_dec, "b_pre": torch.zeros(width)}
    tensors["W_dec"] = layer.W_dec.reshape(latents, -1)
    if layer.W_skip is not None:
        tensors["W_skip"] = torch.zeros(targets * width, width)
        tensors["W_skip"][:width] = layer.W_skip
    if activation == "jumprelu":
        assert layer.threshold is not None
        # Winnow's codes are never negative, so a threshold below 0 is one at 0.
        tensors["threshold"] = layer.threshold.clamp_min(0)
    sae.fill(tensors)
    return sae.requires_grad_(False)


def _check(layer: RawLayer) -> None:
    """Raise unless the tensors' shapes fit and all numbers are finite."""
    if layer.W_enc.ndim != 2 or layer.W_dec.ndim != 3:
        shapes = f"{tuple(layer.W_enc.shape)} and {tuple(layer.W_dec.shape)}"
        raise IntegrityError("W_enc and W_dec", expected="[N, D] and [N, targets, D]", got=shapes)
    latents, width = layer.W_enc.shape
    wanted = {
        "b_enc": (latents,),
        "W_dec": (latents, layer.W_dec.shape[1], width),
        "b_dec": (width,),
        "threshold": (latents,),
        "W_skip": (width, width),
    }
    for name in ("W_enc", *wanted):
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted.get(name, (latents, width)):
            raise IntegrityError(f"{name} does not fit W_enc", expected=wanted[name], got=tuple(tensor.shape))
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinity", fix="The file is damaged or was never trained"
            )
