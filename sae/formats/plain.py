"""An SAE in the form that other libraries share, and the folding of Winnow's normalisation into it.

Legend: D width of the input, O of the output, N latents.

Winnow's SAE works on normalised rows; the others' work on raw rows, or on rows that are *layer-normed*:
``v = (x - mean(x)) / (std(x) + epsilon)`` with the unbiased standard deviation, restored as
``v_hat * std(x) + mean(x)``. Both are affine to Winnow's spaces, ``v = a u + c``, so nothing is lost:

- `dataset`: a is the dataset's scale and c its mean, folded into raw rows;
- `layer`: a is sqrt(D - 1), c is 0, since |x - mean(x)| = sqrt(D - 1) std(x);
- `none`: a is 1, c is 0.

Rows may also be *centred*: without their mean over D, which Winnow's `parts.centred` removes and restores.

The decoder's rows do not change, and codes are multiplied by the output's a: active latents and
reconstructions stay the same. A crosscoder has an a per hook: there codes do not change, the decoder's rows
do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.activations import OWN
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError
from winnow.schemas.training import Activation, SaeParts


@dataclass(frozen=True)
class Plain:
    """``z = act(W_enc (v - b_in) + b_enc)``, ``v_hat = W_dec^T z + b_out`` (``+ W_skip v``).

    v are raw rows if `epsilon` is None, otherwise layer-normed ones. A transcoder's output is always raw.
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
    """Active latents per row; None if the files do not say."""
    threshold: Tensor | None = None
    """[] with `batchtopk`, [N] with `jumprelu`."""
    W_skip: Tensor | None = None
    """[O, D]."""
    epsilon: float | None = None
    """What the layer norm adds to a row's standard deviation; None if rows are raw."""
    transcoder: bool = False
    matryoshka: tuple[int, ...] = ()
    """Prefixes that reconstruct on their own; the last is N."""
    hook: str | None = None
    """The input's hook by Winnow's name; None if the files do not say."""
    widths: tuple[int, ...] = ()
    """Of a crosscoder: widths of its hooks, whose rows are joined; they add up to D and O."""
    with_hooks: tuple[str, ...] = ()
    """Of a crosscoder: the hooks after the first; empty if the files do not say."""
    target_hook: str | None = None
    model: str | None = None
    """The subject, as the files name it."""
    centred: bool = False
    """Whether rows lack their mean over D (TransformerLens' `center_writing_weights`); not with `epsilon`."""
    bos: bool | None = None
    """Whether the windows it was trained on began with BOS; None if the files do not say."""
    code_scale: float = 1.0
    """Of an export: what Winnow's codes are multiplied by; reconstructions stay the same."""
    notes: tuple[str, ...] = ()
    """What the files say and the SAE cannot hold, one sentence each."""

    @property
    def thresholds(self) -> Tensor:
        """The threshold of each latent [N]; 0 with `relu`."""
        zero = torch.zeros_like(self.b_enc)
        return zero if self.threshold is None else zero + self.threshold

    def taking(self, b_in: Tensor) -> Plain:
        """The same SAE with another bias [D] subtracted from its input; `b_enc` compensates."""
        # In float64: `b_in` may be a dataset's mean, large against the codes, and its product with W_enc
        # cancels in `b_enc`. Round trips keep 1e-5 in single precision this way.
        shift = self.W_enc.double() @ (b_in.double() - self.b_in.double())
        return replace(self, b_in=b_in, b_enc=self.b_enc.double() + shift)

    def centred_input(self) -> Plain:
        """The same codes from rows whose mean is not removed: centring is linear, so `W_enc` can absorb it.

        ``W (x - mean(x)) = (W - mean(W)) x``, exactly; the skip likewise. The output does not change.
        """
        # First the bias: it is subtracted after centring, so its own mean must not be removed with the rows'.
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
        """The same SAE with every tensor contiguous and in single precision."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {n: t.detach().float().contiguous() for n, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **kept)


def from_sae(sae: Sae, model: str | None = None) -> Plain:
    """Fold the normalisation of a Winnow SAE into its weights.

    Raises:
        ConfigError: An activation that is not Winnow's own: none of the formats knows it.
    """
    parts, card = sae.parts, sae.card
    if parts.activation not in OWN:
        raise ConfigError(
            f"activation {parts.activation} cannot be exported",
            expected=", ".join(sorted(OWN)),
            fix="None of the formats has it",
        )
    tensors = {name: tensor.double() for name, tensor in sae.tensors().items()}
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(sae.d_model, dtype=torch.float64)
    layer = sae.normalize_mode == "layer"
    # Constants that a mode does not have are absent from `tensors()`: then a is 1 and c is 0.
    a_in = one * (sae.d_model - 1) ** 0.5 if layer else tensors.get("input_scale", one)
    c_in = tensors.get("input_mean", zero)
    # A crosscoder has one scale per hook: [D].
    if parts.widths and a_in.ndim:
        a_in = a_in.repeat_interleave(torch.tensor(parts.widths))
    a_out, c_out = a_in, c_in
    if sae.has_target:
        a_out = tensors.get("target_scale", one)
        c_out = tensors.get("target_mean", torch.zeros(sae.d_out, dtype=torch.float64))
    b_out = a_out * tensors.get("b_dec", tensors["b_pre"]) + c_out
    W_skip = tensors.get("W_skip")
    # Winnow's skip reads normalised rows, the others' raw ones: its share of the mean goes to the bias.
    if W_skip is not None:
        W_skip = W_skip * (a_out / a_in)
        b_out = b_out - W_skip @ c_in
    threshold = tensors.get("threshold")
    # Codes take the output's scale, so that the decoder's rows stay as they are. Several scales cannot all be
    # taken: a crosscoder's codes stay as they are, and its decoder's rows take the scales.
    code = a_out if not a_out.ndim else one
    return Plain(
        activation=parts.activation,
        W_enc=tensors["W_enc"] * (code / a_in),
        b_enc=tensors["b_enc"] * code,
        W_dec=tensors["W_dec"] * (a_out / code),
        b_in=a_in * tensors["b_pre"] + c_in,
        b_out=b_out,
        k=sae.k,
        threshold=None if threshold is None else threshold * code,
        W_skip=W_skip,
        epsilon=parts.layer_epsilon if layer else None,
        transcoder=sae.has_target,
        matryoshka=parts.matryoshka,
        hook=card.hook if card else None,
        widths=parts.widths,
        with_hooks=card.with_hooks if card else (),
        target_hook=card.target_hook if card else None,
        centred=parts.centred,
        model=model or (card.identity.subject_model if card and card.identity else None),
        bos=card.window.bos if card and card.window else None,
        code_scale=float(code),
    )


def to_sae(plain: Plain) -> Sae:
    """The Winnow SAE with the same reconstructions: the inverse of `from_sae`.

    Raises:
        IntegrityError: The shapes do not fit each other.
        NonFiniteError: A weight is NaN or infinite.
    """
    # Before the arithmetic, which would broadcast a wrong shape or spread a NaN without a word.
    _check(plain)
    latents, width = plain.W_enc.shape
    layer = plain.epsilon is not None
    # `parts.centred` also adds the mean back to the output, and a transcoder's output is another row.
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
        widths=plain.widths,
    )
    # ReLU and JumpReLU files have no k; the card requires one, and encoding does not use it.
    k = min(plain.k or 1, latents)
    sae = Sae(width, latents, k, "layer" if layer else "none", parts)
    # Winnow has one bias for both: it subtracts from the input what it adds to the output.
    if not plain.transcoder:
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
    # Winnow's codes are never negative, so a threshold below 0 is one at 0.
    if plain.threshold is not None:
        tensors["threshold"] = plain.threshold.double().clamp_min(0) / a_out
    sae.fill(tensors)
    return sae.requires_grad_(False)


def _check(plain: Plain) -> None:
    """Raise unless the tensors' shapes fit and all numbers are finite."""
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
    if plain.widths and sum(plain.widths) != width:
        raise IntegrityError("the crosscoder's hooks", expected=f"{width} wide together", got=plain.widths)
    for name in ("W_enc", *shapes):
        tensor = getattr(plain, name)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinity", fix="The file is damaged or was never trained"
            )
