"""An SAE as other libraries hold one, and the folding of Winnow's normalisation into it.

Legend: D width of the input, O of the output, N latents.

Winnow's SAE works on normalised rows; the others' work on raw rows, or on rows that are *layer-normed*:
``v = (x - mean(x)) / (std(x) + epsilon)`` with the unbiased standard deviation, restored as
``v_hat * std(x) + mean(x)``. Both are affine to Winnow's spaces, ``v = a u + c``, so nothing is lost:

- `dataset`: a is the dataset's scale and c its mean, folded into raw rows;
- `layer`: a is sqrt(D - 1), c is 0, since |x - mean(x)| = sqrt(D - 1) std(x);
- `none`: a is 1, c is 0.

Rows may be *centred* as well: without their mean over D, which Winnow's `parts.centred` removes and restores.

The decoder's rows stay as they are and codes are multiplied by the output's a: which latents are active,
and every reconstruction, stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError
from winnow.schemas.training import Activation, SaeParts


@dataclass(frozen=True)
class Plain:
    """``z = act(W_enc (v - b_in) + b_enc)``, ``v_hat = W_dec^T z + b_out`` (``+ W_skip v``).

    v are raw rows where `epsilon` is None, layer-normed ones otherwise. A transcoder's output is always raw.
    """

    activation: Activation
    W_enc: Tensor
    """[N, D]."""
    b_enc: Tensor
    """[N]."""
    W_dec: Tensor
    """[N, O]."""
    b_in: Tensor
    """[D]."""
    b_out: Tensor
    """[O]."""
    k: int | None = None
    """Active latents a row; None where the files do not say."""
    threshold: Tensor | None = None
    """[] with `batchtopk`, [N] with `jumprelu`."""
    W_skip: Tensor | None = None
    """[O, D]."""
    epsilon: float | None = None
    """Of the layer norm; None where rows are raw."""
    transcoder: bool = False
    matryoshka: tuple[int, ...] = ()
    """Prefixes that reconstruct on their own, N the last."""
    hook: str | None = None
    """Where the input is read, in Winnow's words; None where the files do not say."""
    target_hook: str | None = None
    model: str | None = None
    """The subject, as its own library names it."""
    centred: bool = False
    """Rows are without their mean over D (TransformerLens' `center_writing_weights`); not with `epsilon`."""
    bos: bool | None = None
    """Whether the windows it was trained on began with BOS; None where the files do not say."""
    notes: tuple[str, ...] = ()
    """What the files say that the SAE cannot hold, a sentence each."""

    @property
    def thresholds(self) -> Tensor:
        """The threshold of each latent [N]; 0 with `relu`."""
        zero = torch.zeros_like(self.b_enc)
        return zero if self.threshold is None else zero + self.threshold

    def taking(self, b_in: Tensor) -> Plain:
        """The same SAE with another bias [D] taken from its input; `b_enc` makes up for it."""
        shift = self.W_enc.double() @ (b_in.double() - self.b_in.double())
        return replace(self, b_in=b_in, b_enc=self.b_enc.double() + shift)

    def centred_input(self) -> Plain:
        """The same codes from rows whose mean is not removed: centring is linear, so `W_enc` takes it in.

        ``W (x - mean(x)) = (W - mean(W)) x``, exactly; the skip likewise. What comes out stays as it was.
        """
        plain = self.taking(torch.zeros_like(self.b_in))
        W_enc = plain.W_enc.double()
        W_skip = None if plain.W_skip is None else plain.W_skip.double()
        return replace(
            plain,
            W_enc=W_enc - W_enc.mean(dim=1, keepdim=True),
            W_skip=None if W_skip is None else W_skip - W_skip.mean(dim=1, keepdim=True),
            centred=False,
        )

    def single(self) -> Plain:
        """With every tensor contiguous, in single precision."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {n: t.detach().float().contiguous() for n, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **kept)


def from_sae(sae: Sae, model: str | None = None) -> Plain:
    """A Winnow SAE with its normalisation folded.

    Raises:
        ConfigError: A crosscoder, which none of the formats knows.
    """
    parts, card = sae.parts, sae.card
    if parts.widths:
        raise ConfigError(
            "a crosscoder cannot be exported",
            expected="an SAE or a transcoder",
            fix="None of the formats has it",
        )
    tensors = {name: tensor.double() for name, tensor in sae.tensors().items()}
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(sae.d_model, dtype=torch.float64)
    layer = sae.normalize_mode == "layer"
    a_in = one * (sae.d_model - 1) ** 0.5 if layer else tensors.get("input_scale", one)
    c_in = tensors.get("input_mean", zero)
    a_out, c_out = a_in, c_in
    if sae.has_target:
        a_out = tensors.get("target_scale", one)
        c_out = tensors.get("target_mean", torch.zeros(sae.d_out, dtype=torch.float64))
    b_out = a_out * tensors.get("b_dec", tensors["b_pre"]) + c_out
    W_skip = tensors.get("W_skip")
    if W_skip is not None:
        W_skip = W_skip * (a_out / a_in)
        b_out = b_out - W_skip @ c_in
    threshold = tensors.get("threshold")
    return Plain(
        activation=parts.activation,
        W_enc=tensors["W_enc"] * (a_out / a_in),
        b_enc=tensors["b_enc"] * a_out,
        W_dec=tensors["W_dec"],
        b_in=a_in * tensors["b_pre"] + c_in,
        b_out=b_out,
        k=sae.k,
        threshold=None if threshold is None else threshold * a_out,
        W_skip=W_skip,
        epsilon=parts.layer_epsilon if layer else None,
        transcoder=sae.has_target,
        matryoshka=parts.matryoshka,
        hook=card.hook if card else None,
        target_hook=card.target_hook if card else None,
        centred=parts.centred,
        model=model or (card.identity.subject_model if card and card.identity else None),
        bos=card.window.bos if card and card.window else None,
    )


def to_sae(plain: Plain) -> Sae:
    """The Winnow SAE that gives the same reconstructions: the inverse of `from_sae`.

    Raises:
        IntegrityError: The shapes do not fit each other.
        NonFiniteError: A weight is NaN or infinite.
    """
    _check(plain)
    latents, width = plain.W_enc.shape
    layer = plain.epsilon is not None
    if plain.centred and plain.transcoder:
        plain = plain.centred_input()
    a_in = (width - 1) ** 0.5 if layer else 1.0
    a_out = 1.0 if plain.transcoder else a_in
    parts = SaeParts(
        activation=plain.activation,
        d_out=len(plain.b_out) if plain.transcoder else None,
        target_normalize="none" if plain.transcoder else None,
        skip=plain.W_skip is not None,
        matryoshka=plain.matryoshka,
        layer_epsilon=plain.epsilon or 0.0,
        centred=plain.centred,
    )
    k = min(plain.k or 1, latents)
    sae = Sae(width, latents, k, "layer" if layer else "none", parts)
    if not plain.transcoder:  # Winnow takes from the input what it adds to the output
        plain = plain.taking(plain.b_out)
    tensors = {
        "W_enc": plain.W_enc.double() * (a_in / a_out),
        "b_enc": plain.b_enc.double() / a_out,
        "W_dec": plain.W_dec,
        "b_pre": plain.b_in.double() / a_in,
    }
    if plain.transcoder:
        tensors["b_dec"] = plain.b_out
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip.double() * (a_in / a_out)
    if plain.threshold is not None:  # below 0 a threshold lets nothing more through than 0 does
        tensors["threshold"] = plain.threshold.double().clamp_min(0) / a_out
    sae.fill(tensors)
    return sae.requires_grad_(False)


def _check(plain: Plain) -> None:
    if plain.W_enc.ndim != 2:
        raise IntegrityError("W_enc", expected="a matrix", got=f"shape {tuple(plain.W_enc.shape)}")
    latents, width = plain.W_enc.shape
    out = len(plain.b_out) if plain.transcoder and plain.b_out.ndim else width
    shapes = {"b_enc": (latents,), "W_dec": (latents, out), "b_in": (width,), "b_out": (out,)}
    shapes |= {"W_skip": (out, width), "threshold": (latents,) if plain.activation == "jumprelu" else ()}
    for name, shape in shapes.items():
        tensor = getattr(plain, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise IntegrityError(f"{name} does not fit W_enc", expected=shape, got=tuple(tensor.shape))
    for name in ("W_enc", *shapes):
        tensor = getattr(plain, name)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinity", fix="The file is damaged or was never trained"
            )
