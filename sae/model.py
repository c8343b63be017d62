"""The sparse autoencoder, readable and eager: THE SPECIFICATION that faster code is held to.

Legend: B rows, D width of the input (d_model), O width of the output (D, but for a transcoder), N latents,
K active latents a row, S slots of padded codes, H hooks. `W_enc` is [N, D] and `W_dec` [N, O] (row n is
latent n's direction), `b_enc` [N], `b_pre` [D].

The model (Gao et al. 2024, arXiv 2406.04093, sections 2.2 and 2.3), on normalised rows x::

    z     = relu(TopK(W_enc (x - b_pre) + b_enc))
    x_hat = W_dec^T z + b_pre

One class, with parts (`winnow.schemas.training.SaeParts`):

- `activation`: `topk` as above. `batchtopk`: trained on the K best a row of a whole batch, used with one
  `threshold` []. `relu`: all above 0. `jumprelu`: all above `threshold` [N].
- A *transcoder* has a target, another hook's rows y: `y_hat = W_dec^T z + b_dec`, and with `skip`
  `+ W_skip x` (W_skip is [O, D]).
- A *crosscoder* reads and reconstructs several hooks: its rows are theirs, joined, each normalised with
  its own constants.
- `matryoshka`: prefixes of the latents that were trained to reconstruct on their own.

Three spaces, three words: *raw* is the space of the activations, *normalised* is what the model sees
(see `Sae.normalise`), *codes* are `(values [B, S], indices [B, S])`, where a slot of value 0 is inactive.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from winnow.sae.codes import encode_above, encode_topk, sum_by_latent
from winnow.schemas.base import sha256_hex
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import IntegrityError
from winnow.schemas.training import Normalize, SaeCard, SaeIdentity, SaeParts, TrainSpec
from winnow.schemas.window import WindowRule

if TYPE_CHECKING:
    from winnow.store.objects import ObjectStore

__all__ = ["PARAMETERS", "Sae", "Scale", "encode_topk", "sum_by_latent"]

WEIGHTS_KEY = "sae.safetensors"
CARD_KEY = "sae.json"
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_pre")
"""The trained tensors that every SAE has, in the order the optimiser holds them; see
`Sae.parameter_names` for all of them."""
LARGEST_REST_BYTES = 1 << 26
"""Room in a weights file beside the matrices: header, biases, constants."""
SMALLEST_NORM = 1e-12
"""A row with no more norm than this is not scaled up."""


class Scale(NamedTuple):
    """What `Sae.normalise` took from the rows: raw = normalised * norm + mean."""

    mean: Tensor
    """[B, 1] with `layer` or a `centred` SAE, [D] otherwise."""
    norm: Tensor
    """[B, 1] with `layer`, [] otherwise."""


class Sae(nn.Module):
    """A sparse autoencoder together with the normalisation of its rows.

    Args:
        d_model: Width D of the input; of a crosscoder, the sum over its hooks.
        latents: Dictionary size N.
        k: Active latents K a row, at most N.
        normalize: `layer`, `dataset` or `none`; see `normalise`.
        parts: What else it is made of; null is the paper's TopK autoencoder.
        device: Where the tensors live.
        dtype: Their type; float64 is for tests.

    A new one holds zeros: `winnow.sae.init` fills it, `Sae.load` reads a published one.
    """

    input_mean: Tensor
    input_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor
    threshold: Tensor

    def __init__(
        self,
        d_model: int,
        latents: int,
        k: int,
        normalize: Normalize = "layer",
        parts: SaeParts | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.d_model, self.latents, self.k = d_model, latents, k
        self.normalize_mode: Normalize = normalize
        self.parts = parts or SaeParts()
        self.d_out = self.parts.d_out or d_model
        self.card: SaeCard | None = None
        zeros = partial(torch.zeros, device=device, dtype=dtype)
        self.W_enc = nn.Parameter(zeros(latents, d_model))
        self.b_enc = nn.Parameter(zeros(latents))
        self.W_dec = nn.Parameter(zeros(latents, self.d_out))
        self.b_pre = nn.Parameter(zeros(d_model))
        self.b_dec = nn.Parameter(zeros(self.d_out)) if self.has_target else None
        self.W_skip = nn.Parameter(zeros(self.d_out, d_model)) if self.parts.skip else None
        if self.parts.activation == "jumprelu":
            self.threshold = nn.Parameter(zeros(latents))
        elif self.parts.activation == "batchtopk":
            self.register_buffer("threshold", zeros(()))
        scales = (len(self.parts.widths),) if self.parts.widths else ()
        self.register_buffer("input_mean", zeros(d_model))
        self.register_buffer("input_scale", zeros(scales) + 1)
        if self.has_target:
            self.register_buffer("target_mean", zeros(self.d_out))
            self.register_buffer("target_scale", zeros(()) + 1)

    @property
    def has_target(self) -> bool:
        """Whether it is a transcoder: what it gives back is not what it was given."""
        return self.parts.d_out is not None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The trained tensors, in the order the optimiser holds them."""
        more = {"b_dec": self.has_target, "W_skip": self.parts.skip}
        more["threshold"] = self.parts.activation == "jumprelu"
        return PARAMETERS + tuple(name for name, there in more.items() if there)

    def twin(self) -> Sae:
        """A new, empty SAE of the same shape, type and device."""
        kind: dict[str, Any] = {"device": self.W_enc.device, "dtype": self.W_enc.dtype}
        return Sae(self.d_model, self.latents, self.k, self.normalize_mode, self.parts, **kind)

    # ---- the model -------------------------------------------------------------------------------

    def normalise(self, x: Tensor) -> tuple[Tensor, Scale]:
        """Raw rows [B, D] to normalised rows [B, D], and what was taken away.

        `layer`: each row's mean over D removed, scaled to unit norm. `dataset`: the training rows'
        mean removed, divided by one scalar (of each hook) so that their mean squared norm is 1.
        `none`: unchanged, or without each row's mean over D where the SAE is `centred`.
        """
        x = x.to(self.W_enc.dtype)
        if self.normalize_mode == "layer":
            mean = x.mean(dim=1, keepdim=True)
            centred = x - mean
            norm = centred.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
            epsilon = self.parts.layer_epsilon * (x.shape[1] - 1) ** 0.5
            return centred / (norm + epsilon), Scale(mean, norm)
        scale = Scale(self.input_mean, self.input_scale)
        if self.parts.widths:
            widths = torch.tensor(self.parts.widths, device=x.device)
            scale = Scale(scale.mean, scale.norm.repeat_interleave(widths))
        if self.normalize_mode == "dataset":
            return (x - scale.mean) / scale.norm, scale
        if self.parts.centred:
            mean = x.mean(dim=1, keepdim=True)
            return x - mean, scale._replace(mean=mean)
        return x, scale

    def normalise_target(self, y: Tensor) -> Tensor:
        """Raw rows [B, O] of the target hook to what a transcoder is trained to give."""
        y = y.to(self.W_enc.dtype)
        return (y - self.target_mean) / self.target_scale if self._scales_target else y

    def restore(self, x: Tensor, scale: Scale) -> Tensor:
        """Normalised output [B, O] to the raw space of the rows `scale` was taken from, or of the target."""
        if self.has_target:
            return x * self.target_scale + self.target_mean if self._scales_target else x
        raw = self.normalize_mode == "none" and not self.parts.centred
        return x if raw else x * scale.norm + scale.mean

    @property
    def _scales_target(self) -> bool:
        return self.parts.target_normalize == "dataset"

    def select(self, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes of *normalised* rows as they are outside training, negatives cut to 0.

        The product takes x itself and `b = b_enc - W_enc b_pre`, which is the same number and spares
        a copy of x.

        Args:
            x: [B, D].
            k: Take the k best of each row, whatever the activation.

        Returns:
            values [B, S], descending, and their latents [B, S]: S is K, or k, with `topk`, else the most
            active latents of any row.
        """
        b = self.b_enc - self.W_enc @ self.b_pre
        if self.parts.activation == "topk" or k is not None:
            return encode_topk(x, self.W_enc, b, self.k if k is None else k)
        threshold = 0.0 if self.parts.activation == "relu" else self.threshold.detach()
        return encode_above(x, self.W_enc, b, threshold)

    def reconstruct(self, values: Tensor, indices: Tensor | None, x: Tensor | None = None) -> Tensor:
        """Codes to *normalised* output [B, O]; equal to `scatter(values) @ W_dec + bias`.

        Args:
            values: [B, S].
            indices: [B, S]; null where the values are dense, [B, N].
            x: The normalised rows [B, D] of the codes: only a transcoder with `skip` needs them.
        """
        if indices is None:
            return self.add_bias(values @ self.W_dec, x)
        x_hat = F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return self.add_bias(x_hat, x)

    def add_bias(self, x_hat: Tensor, x: Tensor | None = None) -> Tensor:
        """What the output [B, O] holds beside the latents' directions."""
        if self.W_skip is not None:
            if x is None:
                raise ValueError("a transcoder with skip needs the rows of the codes to decode them")
            x_hat = x_hat + x @ self.W_skip.T
        return x_hat + (self.b_pre if self.b_dec is None else self.b_dec)

    # ---- what users call -------------------------------------------------------------------------

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of raw rows.

        Args:
            x: Raw activations [B, D], any float dtype; of a crosscoder, its hooks' rows joined.

        Returns:
            values [B, S] >= 0, in units of the normalised space, descending; indices int64 [B, S]. S is
            K with `topk`, else the most active latents of any of these rows, at least 1. Equal values
            stand by ascending index (which of several equal values at the K-th place is chosen is
            torch's choice). A slot of value 0 is an inactive latent.
        """
        values, indices = self.select(self.normalise(x)[0])
        indices, by_index = indices.sort(dim=1)
        values, by_value = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, by_value)

    def decode(self, values: Tensor, indices: Tensor, like: Tensor | Scale | None = None) -> Tensor:
        """Rows of codes.

        Args:
            values: [B, S], as `encode` gives them, or edited.
            indices: int64 [B, S].
            like: The raw rows [B, D] the codes came from, or their `Scale` (from `normalise`). A
                transcoder with `skip` needs the rows.

        Returns:
            [B, O]: in the raw space of `like`, or of a transcoder's target; in the normalised space
            where `like` is not given, since `layer` cannot know a row's own mean and norm from its codes.
        """
        x, scale = self.normalise(like) if isinstance(like, Tensor) else (None, like)
        x_hat = self.reconstruct(values, indices, x)
        return x_hat if scale is None else self.restore(x_hat, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Output [B, O] for raw rows [B, D], in raw space and the rows' dtype; differentiable.

        The reconstruction of x, or what a transcoder expects at its target.
        """
        normalised, scale = self.normalise(x)
        x_hat = self.reconstruct(*self.select(normalised), normalised)
        return self.restore(x_hat, scale).to(x.dtype)

    # ---- storage ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name: parameters, a threshold, and the constants of `dataset`."""
        names = self.parameter_names
        names += ("threshold",) if self.parts.activation == "batchtopk" else ()
        names += ("input_mean", "input_scale") if self.normalize_mode == "dataset" else ()
        names += ("target_mean", "target_scale") if self._scales_target else ()
        return {name: getattr(self, name).detach() for name in names}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of the names and shapes of `tensors()` into this SAE; IntegrityError otherwise."""
        mine = self.tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in mine.items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if given != shapes:
            raise IntegrityError("the SAE's tensors", expected=shapes, got=given)
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)

    def save(
        self,
        store: ObjectStore,
        *,
        hook: str,
        target_hook: str | None = None,
        with_hooks: tuple[str, ...] = (),
        weights: str = "raw",
        identity: SaeIdentity | None = None,
        window: WindowRule | None = None,
        spec: TrainSpec | None = None,
        metrics: Mapping[str, float] | None = None,
        notes: tuple[str, ...] = (),
    ) -> SaeCard:
        """Write `sae.safetensors`, then `sae.json` which names its digest, into `store`.

        Args:
            store: The folder or prefix that becomes the SAE's address.
            hook: Where in the subject its rows come from.
            target_hook: A transcoder's target.
            with_hooks: A crosscoder's other hooks.
            weights: `raw` or `ema`: which weights these are.
            identity: What they belong to.
            window: How the windows began that they were trained on.
            spec: How they were trained.
            metrics: Held-out figures by definition id.
            notes: Of an import: what the files said that the SAE cannot hold.
        """
        data = safetensors.torch.save({n: t.cpu().contiguous() for n, t in self.tensors().items()})
        facts = {
            "d_model": self.d_model,
            "latents": self.latents,
            "k": self.k,
            "hook": hook,
            "target_hook": target_hook,
            "with_hooks": with_hooks,
            "normalize": self.normalize_mode,
            "parts": self.parts,
            "weights": weights,
            "weights_sha256": sha256_hex(data),
            "identity": identity,
            "window": window,
            "spec": spec,
            "metrics": dict(metrics or {}),
            "notes": notes,
        }
        card = SaeCard.model_validate(facts)
        store.put(WEIGHTS_KEY, data)
        store.put(CARD_KEY, card.to_json())
        self.card = card
        return card

    @classmethod
    def load(
        cls,
        path_or_uri: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        storage: StorageSpec | None = None,
    ) -> Sae:
        """Read a published SAE: a folder or URI that holds `sae.json` and `sae.safetensors`.

        `.card` is its `SaeCard`. The digest is checked before anything is parsed.

        Raises:
            MissingObject: No SAE there.
            IntegrityError: Bytes, shapes or types differ from what the card promises.
            UnsupportedVersion: Written by a Winnow of another major version.
        """
        from winnow.store.objects import open_store  # not needed to train on a machine that has no storage

        uri = os.fspath(path_or_uri)
        store = open_store(uri, storage or StorageSpec())
        card = SaeCard.from_json(store.get(CARD_KEY), origin=f"{uri}/{CARD_KEY}")
        data = store.get(WEIGHTS_KEY, limit=_largest_file(card))
        if sha256_hex(data) != card.weights_sha256:
            raise IntegrityError(
                f"{uri}/{WEIGHTS_KEY} is not the file that {CARD_KEY} describes",
                expected=f"sha256 {card.weights_sha256}",
                got=sha256_hex(data),
                fix="Publish or copy the two files together again",
            )
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise IntegrityError(f"{uri}/{WEIGHTS_KEY} is not safetensors", got=error) from error
        sae = cls(card.d_model, card.latents, card.k, card.normalize, card.parts, device=device)
        sae.fill(tensors)
        sae.card = card
        return sae.requires_grad_(False)


def _largest_file(card: SaeCard) -> int:
    """Bytes that no honest weights file of this card exceeds."""
    d_out = card.parts.d_out or card.d_model
    numbers = card.latents * (card.d_model + d_out + 2) + (d_out * card.d_model if card.parts.skip else 0)
    return 4 * numbers + LARGEST_REST_BYTES
