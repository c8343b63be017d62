"""The sparse autoencoder, readable and eager: THE SPECIFICATION against which faster code is tested.

Legend: B rows, D width of the input (d_model), O width of the output (D, except for a transcoder), N latents,
K active latents per row, S slots of padded codes, H hooks. `W_enc` is [N, D] and `W_dec` [N, O] (row n is
latent n's direction), `b_enc` [N], `b_pre` [D].

The model (Gao et al. 2024, arXiv 2406.04093, sections 2.2 and 2.3), on normalised rows x::

    z     = relu(TopK(W_enc (x - b_pre) + b_enc))
    x_hat = W_dec^T z + b_pre

One class, with parts (`winnow.schemas.training.SaeParts`):

- `activation`: `topk` as above. `batchtopk`: trained on the best values of a whole batch, on average K per
  row, used with one `threshold` []. `relu`: all above 0. `jumprelu`: all above `threshold` [N]. Each is a
  file of `winnow.sae.activations`.
- A *transcoder* has a target, another hook's rows y: `y_hat = W_dec^T z + b_dec`, and with `skip`
  `+ W_skip x` (W_skip is [O, D]).
  A layer of a cross-layer transcoder has several, whose rows are joined (`winnow.sae.sets`).
- A *crosscoder* reads and reconstructs several hooks: its rows are their rows, joined, each normalised with
  its own constants.
- `matryoshka`: prefixes of the latents that were trained to reconstruct on their own.

Three spaces, three words: *raw* is the space of the activations, *normalised* is what the model sees
(see `Sae.normalise`), *codes* are `(values [B, S], indices [B, S])`, where a slot of value 0 is inactive.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from winnow.sae.activations import activation_of
from winnow.sae.codes import encode_topk, sum_by_latent
from winnow.schemas.base import sha256_hex
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, NoSae
from winnow.schemas.service import STATUS_KEY
from winnow.schemas.sets import CARD_KEY, SET_KEY, WEIGHTS_KEY, SetCard
from winnow.schemas.training import Normalize, SaeCard, SaeIdentity, SaeParts, TrainSpec
from winnow.schemas.window import WindowRule

if TYPE_CHECKING:
    from winnow.store.objects import ObjectStore

__all__ = ["PARAMETERS", "Sae", "Scale", "encode_topk", "sum_by_latent"]

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_pre")
"""The trained tensors that every SAE has, in the optimiser's order; see `Sae.parameter_names` for all of
them."""
_LARGEST_REST_BYTES = 1 << 26
"""Bytes in a weights file beside the matrices: header, biases, constants."""
SMALLEST_NORM = 1e-12
"""Least norm that a row is divided by, so that a constant row stays 0 and does not become NaN."""


class Scale(NamedTuple):
    """What `Sae.normalise` removed from the rows: raw = normalised * norm + mean."""

    mean: Tensor
    """[B, 1] with `layer` or a `centred` SAE, [D] otherwise."""
    norm: Tensor
    """[B, 1] with `layer`, [] otherwise."""


class Sae(nn.Module):
    """A sparse autoencoder with the normalisation of its rows.

    A new one holds zeros: `winnow.sae.init` fills it, `Sae.load` reads a published one.

    Args:
        d_model: Width D of the input; of a crosscoder, the sum over its hooks.
        latents: Dictionary size N.
        k: Active latents K per row, at most N.
        normalize: `layer`, `dataset` or `none`; see `normalise`.
        parts: Activation, target, hooks and other parts; None is the paper's TopK autoencoder.
        device: Device of the tensors.
        dtype: Type of the tensors; float64 is for tests.
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
        # JumpReLU's thresholds are trained; BatchTopK's is calibrated after training and not a parameter.
        if self.parts.traits.threshold == "each":
            self.threshold = nn.Parameter(zeros(latents))
        elif self.parts.traits.threshold == "one":
            self.register_buffer("threshold", zeros(()))
        scales = (len(self.parts.widths),) if self.parts.widths else ()
        self.register_buffer("input_mean", zeros(d_model))
        self.register_buffer("input_scale", zeros(scales) + 1)
        several = self.parts.target_widths
        if self.has_target:
            self.register_buffer("target_mean", zeros(self.d_out))
            self.register_buffer("target_scale", zeros((len(several),) if several else ()) + 1)

    @property
    def has_target(self) -> bool:
        """Whether it is a transcoder, whose output is another hook's rows."""
        return self.parts.d_out is not None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The trained tensors, in the optimiser's order."""
        # Ranks reduce gradients name by name, so the order must be the same on each: not a set.
        more = {"b_dec": self.has_target, "W_skip": self.parts.skip}
        more["threshold"] = self.parts.traits.threshold == "each"
        return PARAMETERS + tuple(name for name, there in more.items() if there)

    def twin(self) -> Sae:
        """A new SAE of the same shape, type and device, filled with zeros."""
        kind: dict[str, Any] = {"device": self.W_enc.device, "dtype": self.W_enc.dtype}
        return Sae(self.d_model, self.latents, self.k, self.normalize_mode, self.parts, **kind)

    # ---- the model -------------------------------------------------------------------------------

    def normalise(self, x: Tensor) -> tuple[Tensor, Scale]:
        """Normalise raw rows [B, D]; returns normalised rows [B, D] and what was removed.

        `layer`: each row's mean over D removed, scaled to unit norm. `dataset`: the training rows' mean
        removed, divided by one scalar per hook so that their mean squared norm is 1. `none`: unchanged, or
        without each row's mean over D if the SAE is `centred`.
        """
        x = x.to(self.W_enc.dtype)
        if self.normalize_mode == "layer":
            mean = x.mean(dim=1, keepdim=True)
            centred = x - mean
            norm = centred.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
            # Others add their epsilon to the unbiased standard deviation, and the norm is sqrt(D - 1) times
            # that. It is not part of `Scale`: those libraries restore with the deviation alone.
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
        """Normalise raw rows [B, O] of the target hook to what a transcoder is trained to predict."""
        y = y.to(self.W_enc.dtype)
        return (y - self.target_mean) / self.target_norm if self._scales_target else y

    @property
    def target_norm(self) -> Tensor:
        """What a transcoder's rows of the target are divided by: [], or with several targets [O]."""
        if not self.parts.target_widths:
            return self.target_scale
        widths = torch.tensor(self.parts.target_widths, device=self.target_scale.device)
        return self.target_scale.repeat_interleave(widths)

    def restore(self, x: Tensor, scale: Scale) -> Tensor:
        """Bring normalised output [B, O] back to the raw space of the rows of `scale`, or of the target."""
        # A transcoder's target has its own constants: the norm of an input row says nothing about it.
        if self.has_target:
            return x * self.target_norm + self.target_mean if self._scales_target else x
        # Without a pass over the rows: multiplying by 1 and adding 0 would copy them.
        raw = self.normalize_mode == "none" and not self.parts.centred
        return x if raw else x * scale.norm + scale.mean

    @property
    def _scales_target(self) -> bool:
        return self.parts.target_normalize == "dataset"

    def select(self, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes of *normalised* rows as used outside training, with negatives set to 0.

        Args:
            x: Normalised rows [B, D].
            k: Take the k best of each row, whatever the activation.

        Returns:
            values [B, S], descending, and their latents [B, S]. S is K with `topk`, or `k` if it is given,
            otherwise the largest number of active latents of any row.
        """
        # Not in the autocast of a subject's pass: W_enc x and W_enc b_pre cancel, and of bfloat16 products of
        # rows far from 0 other latents would be left.
        with _without_autocast(x):
            # W_enc (x - b_pre) + b_enc with the bias multiplied out: the product takes x itself, no copy.
            b = self.b_enc - self.W_enc @ self.b_pre
            if k is not None:
                return encode_topk(x, self.W_enc, b, k)
            return activation_of(self.parts.activation).select(self, x, b)

    def reconstruct(self, values: Tensor, indices: Tensor | None, x: Tensor | None = None) -> Tensor:
        """Decode codes to *normalised* output [B, O]; equal to `scatter(values) @ W_dec + bias`.

        Args:
            values: Values of the codes [B, S].
            indices: Their latents [B, S]; None if the values are dense, [B, N].
            x: The normalised rows [B, D] of the codes; only a transcoder with `skip` needs them.
        """
        with _without_autocast(values):
            if indices is None:
                return self.add_bias(values @ self.W_dec, x)
            # A weighted gather of S rows of N: the dense product would take N / S times the work.
            x_hat = F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
            return self.add_bias(x_hat, x)

    def add_bias(self, x_hat: Tensor, x: Tensor | None = None) -> Tensor:
        """Add to an output [B, O] what it holds beside the latents' directions: bias, and skip path."""
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
            values [B, S] >= 0, in units of the normalised space, descending; indices int64 [B, S]. S is K
            with `topk`, otherwise the largest number of active latents of these rows, at least 1. Equal
            values are ordered by ascending index (which of several equal values at the K-th place is
            chosen is torch's choice). A slot of value 0 is an inactive latent.
        """
        values, indices = self.select(self.normalise(x)[0])
        # By index first, then stably by value: equal values come in one order on every device.
        indices, by_index = indices.sort(dim=1)
        values, by_value = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, by_value)

    def decode(self, values: Tensor, indices: Tensor, like: Tensor | Scale | None = None) -> Tensor:
        """Decode codes to rows.

        Args:
            values: Values [B, S], as `encode` returns them, or edited.
            indices: Latents, int64 [B, S].
            like: The raw rows [B, D] of the codes, or their `Scale` (from `normalise`). A transcoder with
                `skip` needs the rows.

        Returns:
            Rows [B, O] in the raw space of `like`, or of a transcoder's target; in the normalised space if
            `like` is not given, since `layer` cannot know a row's own mean and norm from its codes.
        """
        x, scale = self.normalise(like) if isinstance(like, Tensor) else (None, like)
        x_hat = self.reconstruct(values, indices, x)
        return x_hat if scale is None else self.restore(x_hat, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Output [B, O] for raw rows [B, D], in raw space and the rows' dtype; differentiable.

        The reconstruction of x, or a transcoder's prediction of its target.
        """
        normalised, scale = self.normalise(x)
        x_hat = self.reconstruct(*self.select(normalised), normalised)
        return self.restore(x_hat, scale).to(x.dtype)

    # ---- storage ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name: parameters, a threshold, and the constants of `dataset`."""
        # Constants of other modes are 0 and 1 by construction, and would only be one more thing to check.
        names = self.parameter_names
        names += ("threshold",) if self.parts.traits.threshold == "one" else ()
        names += ("input_mean", "input_scale") if self.normalize_mode == "dataset" else ()
        names += ("target_mean", "target_scale") if self._scales_target else ()
        return {name: getattr(self, name).detach() for name in names}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of the names and shapes of `tensors()` into this SAE.

        Raises:
            IntegrityError: Names or shapes differ.
        """
        mine = self.tensors()
        # All of them before the first copy: a mismatch leaves the SAE unchanged, and a missing tensor would
        # otherwise stay 0 without a word.
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
        with_targets: tuple[str, ...] = (),
        with_hooks: tuple[str, ...] = (),
        weights: str = "raw",
        identity: SaeIdentity | None = None,
        window: WindowRule | None = None,
        spec: TrainSpec | None = None,
        metrics: Mapping[str, float] | None = None,
        notes: tuple[str, ...] = (),
    ) -> SaeCard:
        """Write `sae.safetensors`, and then `sae.json`, which holds its digest, to `store`.

        Args:
            store: The folder or prefix that becomes the SAE's address.
            hook: The hook whose rows it reads.
            target_hook: A transcoder's target.
            with_targets: Its other targets, of a layer of a cross-layer transcoder.
            with_hooks: A crosscoder's other hooks.
            weights: Which weights these are, `raw` or `ema`.
            identity: Dataset and subject that they were trained on.
            window: How the windows of the dataset begin.
            spec: Settings of the training.
            metrics: Held-out figures by definition id.
            notes: After an import, what the files said and the SAE cannot hold.
        """
        data = safetensors.torch.save({n: t.cpu().contiguous() for n, t in self.tensors().items()})
        facts = {
            "d_model": self.d_model,
            "latents": self.latents,
            "k": self.k,
            "hook": hook,
            "target_hook": target_hook,
            "with_targets": with_targets,
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
        # The card last: an SAE exists once its card does, and a kill in between leaves no card with a digest
        # of weights that are not there.
        store.put(WEIGHTS_KEY, data)
        store.put(CARD_KEY, card.to_json())
        self.card = card
        return card

    def extra_repr(self) -> str:
        """What `repr` shows: torch itself shows submodules only, and an SAE has none."""
        activation = self.parts.activation
        return f"d_model={self.d_model}, latents={self.latents}, k={self.k}, activation={activation!r}"

    @classmethod
    def load(
        cls,
        path_or_uri: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        storage: StorageSpec | None = None,
    ) -> Sae:
        """Read a published SAE: a folder or URI that holds `sae.json` and `sae.safetensors`.

        Its attribute `card` is the `SaeCard`. The digest is checked before anything is parsed.

        Raises:
            NoSae: No SAE there.
            ConfigError: There is a transcoder set, of which one layer must be named.
            IntegrityError: Bytes, shapes or types differ from the card's.
            UnsupportedVersion: Written by a Winnow of another major version.
        """
        # Not needed to train on a machine that has no storage.
        from winnow.store.objects import open_store

        uri = os.fspath(path_or_uri)
        store = open_store(uri, storage or StorageSpec())
        card = read_card(store, uri)
        # Bounded by the card, since the file is read whole: a wrong one of any size would fill the memory.
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


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without the autocast of the tensor's device; some, such as `meta`, have none."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def read_card(store: ObjectStore, uri: str) -> SaeCard:
    """Read the card of the SAE at `uri`, which `store` has open.

    Raises:
        NoSae: No SAE there.
        ConfigError: There is a transcoder set, of which one layer must be named.
        UnsupportedVersion: Written by a Winnow of another major version.
    """
    try:
        return SaeCard.from_json(store.get(CARD_KEY), origin=f"{uri}/{CARD_KEY}")
    except MissingObject as error:
        # A set is named where one SAE is meant: the missing file would say nothing about that.
        if (found := read_set_card(store)) is None:
            raise no_sae(store, uri) from error
    raise ConfigError(
        f"{uri} is a set of layers {found.layers[0].layer} to {found.layers[-1].layer}",
        expected="one SAE",
        got="a transcoder set",
        fix=f"Name one of its layers, such as {uri.rstrip('/')}/{found.layers[0].folder}",
    )


def no_sae(store: ObjectStore, uri: str, *, a_set: bool = False) -> NoSae:
    """Make the error that there is no SAE (or no set) at `uri`: it says what is there in its place."""
    from winnow.store.format.layout import PLAN_KEY

    got, fix = "nothing there", "Check the path"
    if store.size(PLAN_KEY) is not None:
        got, fix = "a dataset", "Name what was trained on it: the config's `train.out`"
    elif store.size(CARD_KEY) is not None:
        got, fix = "one SAE", "`train.set` trains a set (docs/circuits.md)"
    elif store.size(STATUS_KEY) is not None:
        got, fix = (
            "a run that has published none yet",
            f"It does so at its end; `winnow watch {uri}` shows it",
        )
    what, key = ("transcoder set", SET_KEY) if a_set else ("SAE", CARD_KEY)
    return NoSae(f"{uri} holds no {what}", expected=key, got=got, fix=fix)


def require_some_sae(store: ObjectStore, uri: str) -> None:
    """Check that there is an SAE or a set at `uri`, which `store` has open.

    Raises:
        NoSae: There is neither.
    """
    if store.size(CARD_KEY) is None and store.size(SET_KEY) is None:
        raise no_sae(store, uri)


def read_set_card(store: ObjectStore) -> SetCard | None:
    """Read the card of the transcoder set in `store`; None if there is none."""
    try:
        return SetCard.from_json(store.get(SET_KEY), origin=f"{store.uri}/{SET_KEY}")
    except MissingObject:
        return None


def _largest_file(card: SaeCard) -> int:
    """Upper bound on the bytes of a weights file of this card."""
    d_out = card.parts.d_out or card.d_model
    # Encoder, decoder, bias and threshold per latent, 4 bytes per number.
    numbers = card.latents * (card.d_model + d_out + 2) + (d_out * card.d_model if card.parts.skip else 0)
    return 4 * numbers + _LARGEST_REST_BYTES
