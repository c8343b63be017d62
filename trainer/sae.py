"""The TopK sparse autoencoder, readable and eager: THE SPECIFICATION that faster code is held to.

Legend: B rows, D d_model, N latents, K active latents a row. `W_enc` and `W_dec` are [N, D] (row n is
latent n's direction), `b_enc` [N], `b_pre` [D].

The model (Gao et al. 2024, arXiv 2406.04093, sections 2.2 and 2.3), on normalised rows x::

    z     = relu(TopK(W_enc (x - b_pre) + b_enc))
    x_hat = W_dec^T z + b_pre

Three spaces, three words: *raw* is the space of the activations, *normalised* is what the model sees
(see `Sae.normalise`), *codes* are `(values [B, K], indices [B, K])`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from schemas.base import sha256_hex
from schemas.config import StorageSpec
from schemas.errors import IntegrityError
from schemas.training import Normalize, SaeCard, SaeIdentity, TrainSpec
from store.objects import ObjectStore, open_store

WEIGHTS_KEY = "sae.safetensors"
CARD_KEY = "sae.json"
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_pre")
"""The trained tensors, in the order the optimiser holds them."""
CONSTANTS = ("input_mean", "input_scale")
"""Stored beside them with `normalize: dataset`."""
LARGEST_REST_BYTES = 1 << 26
"""Room in a weights file beside the two matrices: header, `b_pre`, constants."""
SMALLEST_NORM = 1e-12
"""A row with no more norm than this is not scaled up."""


class Scale(NamedTuple):
    """What `Sae.normalise` took from the rows: raw = normalised * norm + mean."""

    mean: Tensor
    """[B, 1] with `layer`, [D] with `dataset`, [] with `none`."""
    norm: Tensor
    """[B, 1] with `layer`, [] otherwise."""


class Sae(nn.Module):
    """A TopK sparse autoencoder together with the normalisation of its input.

    Args:
        d_model: Width D of the activations.
        latents: Dictionary size N.
        k: Active latents K a row, at most N.
        normalize: `layer`, `dataset` or `none`; see `normalise`.
        device: Where the tensors live.
        dtype: Their type; float64 is for tests.

    A new one holds zeros: `trainer.init` fills it, `Sae.load` reads a published one.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        d_model: int,
        latents: int,
        k: int,
        normalize: Normalize = "layer",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.d_model, self.latents, self.k = d_model, latents, k
        self.normalize_mode: Normalize = normalize
        self.card: SaeCard | None = None
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(torch.zeros(latents, d_model, **kind))
        self.b_enc = nn.Parameter(torch.zeros(latents, **kind))
        self.W_dec = nn.Parameter(torch.zeros(latents, d_model, **kind))
        self.b_pre = nn.Parameter(torch.zeros(d_model, **kind))
        self.register_buffer("input_mean", torch.zeros(d_model, **kind))
        self.register_buffer("input_scale", torch.ones((), **kind))

    # ---- the model -------------------------------------------------------------------------------

    def normalise(self, x: Tensor) -> tuple[Tensor, Scale]:
        """Raw rows [B, D] to normalised rows [B, D], and what was taken away.

        `layer`: each row's mean over D removed, scaled to unit norm. `dataset`: the training rows'
        mean removed, divided by one scalar so that their mean squared norm is 1. `none`: unchanged.
        """
        x = x.to(self.W_enc.dtype)
        if self.normalize_mode == "layer":
            mean = x.mean(dim=1, keepdim=True)
            centred = x - mean
            norm = centred.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
            return centred / norm, Scale(mean, norm)
        scale = Scale(self.input_mean, self.input_scale)
        if self.normalize_mode == "dataset":
            return (x - scale.mean) / scale.norm, scale
        return x, scale

    def restore(self, x: Tensor, scale: Scale) -> Tensor:
        """Normalised rows [B, D] back to the raw space of the rows `scale` was taken from."""
        return x if self.normalize_mode == "none" else x * scale.norm + scale.mean

    def select(self, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes of *normalised* rows: the `k` (default K) best latents, negatives cut to 0.

        The product takes x itself and `b = b_enc - W_enc b_pre`, which is the same number and spares
        a copy of x. Values and indices are [B, k], value descending.
        """
        b = self.b_enc - self.W_enc @ self.b_pre
        return encode_topk(x, self.W_enc, b, self.k if k is None else k)

    def reconstruct(self, values: Tensor, indices: Tensor) -> Tensor:
        """Codes [B, k] to *normalised* rows [B, D]; equal to `scatter(values) @ W_dec + b_pre`."""
        return F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum") + self.b_pre

    # ---- what users call -------------------------------------------------------------------------

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of raw rows.

        Args:
            x: Raw activations [B, D], any float dtype.

        Returns:
            values [B, K] >= 0, in units of the normalised space, descending; indices int64 [B, K].
            Equal values stand by ascending index (which of several equal values at the K-th place
            is chosen is torch's choice). A slot of value 0 is an inactive latent.
        """
        values, indices = self.select(self.normalise(x)[0])
        indices, by_index = indices.sort(dim=1)
        values, by_value = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, by_value)

    def decode(self, values: Tensor, indices: Tensor, like: Tensor | Scale | None = None) -> Tensor:
        """Rows of codes.

        Args:
            values: [B, K], as `encode` gives them, or edited.
            indices: int64 [B, K].
            like: The raw rows [B, D] the codes came from, or their `Scale` (from `normalise`).

        Returns:
            [B, D]: in the raw space of `like`; in the normalised space where it is not given, since
            `layer` cannot know a row's own mean and norm from its codes.
        """
        x_hat = self.reconstruct(values, indices)
        if like is None:
            return x_hat
        return self.restore(x_hat, like if isinstance(like, Scale) else self.normalise(like)[1])

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [B, D] of raw rows [B, D], in their raw space and dtype; differentiable."""
        normalised, scale = self.normalise(x)
        return self.restore(self.reconstruct(*self.select(normalised)), scale).to(x.dtype)

    # ---- storage ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name: parameters, and the constants of `dataset`."""
        names = PARAMETERS + (CONSTANTS if self.normalize_mode == "dataset" else ())
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
        weights: str = "raw",
        identity: SaeIdentity | None = None,
        spec: TrainSpec | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> SaeCard:
        """Write `sae.safetensors`, then `sae.json` which names its digest, into `store`.

        Args:
            store: The folder or prefix that becomes the SAE's address.
            hook: Where in the subject its rows come from.
            weights: `raw` or `ema`: which weights these are.
            identity: What they belong to.
            spec: How they were trained.
            metrics: Held-out figures by definition id.
        """
        data = safetensors.torch.save({n: t.cpu().contiguous() for n, t in self.tensors().items()})
        facts = {
            "d_model": self.d_model,
            "latents": self.latents,
            "k": self.k,
            "hook": hook,
            "normalize": self.normalize_mode,
            "weights": weights,
            "weights_sha256": sha256_hex(data),
            "identity": identity,
            "spec": spec,
            "metrics": dict(metrics or {}),
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
        uri = os.fspath(path_or_uri)
        store = open_store(uri, storage or StorageSpec())
        card = SaeCard.from_json(store.get(CARD_KEY), origin=f"{uri}/{CARD_KEY}")
        data = store.get(WEIGHTS_KEY, limit=2 * 4 * card.latents * (card.d_model + 1) + LARGEST_REST_BYTES)
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
        sae = cls(card.d_model, card.latents, card.k, card.normalize, device=device)
        sae.fill(tensors)
        sae.card = card
        return sae.requires_grad_(False)


def encode_topk(x: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`relu((x @ W_enc.T + b).topk(k))`, whose backward is sparse.

    Args:
        x: [B, D].
        W_enc: [N, D].
        b: [N].
        k: Latents kept a row.

    Returns:
        values [B, k] descending, indices int64 [B, k] (non-differentiable).
    """
    return _EncodeTopK.apply(x, W_enc, b, k)  # pyright: ignore[reportReturnType]


class _EncodeTopK(torch.autograd.Function):
    """Plain autograd would spend a second dense product on a gradient that is K/N full."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = torch.addmm(b, x, W_enc.T).topk(k, dim=1)
        values = values.relu_()
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        wants_x, wants_W, wants_b, _ = ctx.needs_input_grad
        dz = torch.where(values > 0, grads[0], 0.0)
        dx = F.embedding_bag(indices, W_enc, per_sample_weights=dz, mode="sum") if wants_x else None
        dW = sum_by_latent(dz, indices, x, len(W_enc)) if wants_W else None
        db = dz.new_zeros(len(W_enc)).index_add_(0, indices.flatten(), dz.flatten()) if wants_b else None
        return dx, dW, db, None


def sum_by_latent(values: Tensor, indices: Tensor, rows: Tensor, latents: int) -> Tensor:
    """`scatter(values).T @ rows`: for each latent the sum of `rows` weighted by its values.

    Entries are sorted by latent (stably, so by row inside one) and every latent's segment is summed in
    that order: no atomics, the same bits every run.

    Args:
        values: [B, k].
        indices: int64 [B, k].
        rows: [B, D].
        latents: N.

    Returns:
        [N, D].
    """
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=latents).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))
    row = order.div(indices.shape[1], rounding_mode="floor")
    return F.embedding_bag(row, rows, starts, per_sample_weights=values.flatten()[order], mode="sum")
