"""What the directions of latents tell by themselves: logits they promote, latents of similar direction.

Letters: D d_model, N latents, P latents of a part, V vocabulary, M kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from winnow.explorer.index.latents import Near
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.features import HEADS, INSIDE, site_of
from winnow.schemas.subject import parse_hook
from winnow.subject.load import Subject

_LOGIT_NUMBERS = 1 << 24
"""Largest rows x V of logits held at once: 67 MB of float32."""
# A set's cross-layer decoder of 24 layers of 768 is wider: its covariance would be 2.7 GB, and take minutes.
_PRINCIPAL_WIDTH = 8192
"""Largest D of which principal components are computed."""
COSINE_COLUMNS = 1 << 14
"""Latents that a part is compared with at a time: with 1,024 per part, also 67 MB."""


class Promoted(NamedTuple):
    """The tokens a latent raises and lowers most, best first."""

    up_ids: NDArray[np.uint32]
    """[P, M]"""
    up: NDArray[np.float32]
    """[P, M] logits"""
    down_ids: NDArray[np.uint32]
    down: NDArray[np.float32]


class DirectLogits:
    """Logits of directions, skipping the layers after the hook.

    Definition: the logits that the subject's final norm and unembedding give for the direction alone (as if
    the last residual stream held nothing else), minus those for the zero vector, minus their mean over the
    vocabulary. The norm divides a lone direction by its own size, so the figure does not depend on the
    decoder row's length (the effect at a real position does).

    Args:
        subject: The whole subject.

    Raises:
        ConfigError: The subject is truncated, or its final norm cannot be determined.
    """

    def __init__(self, subject: Subject) -> None:
        if subject.truncated:
            raise ConfigError("direct logits", expected="the whole subject", fix="Load it without `until`")
        self._norm = _final_norm(subject)
        self._head: Any = subject.model.get_output_embeddings()
        self._device, self._dtype = subject.device, subject.dtype
        self._width = subject.d_model

    @torch.no_grad()
    def __call__(self, directions: Tensor) -> Tensor:
        """float32 [P, V] of directions [P, D] in the raw space of the residual stream.

        Raises:
            ConfigError: They are not as wide as the stream.
        """
        if directions.shape[1] != self._width:
            raise ConfigError(
                "promoted tokens",
                expected=f"directions in the residual stream (D = {self._width})",
                got=f"D = {directions.shape[1]}",
                fix="Index with `--logits 0`",
            )
        # The zero vector's logits are the biases of norm and unembedding, the same for every latent.
        rows = torch.cat([directions, torch.zeros_like(directions[:1])]).to(self._device, self._dtype)
        logits = self._head(self._norm(rows)).float()
        logits = logits[:-1] - logits[-1]
        # A constant over the vocabulary changes no probability.
        return logits - logits.mean(1, keepdim=True)

    @torch.no_grad()
    def extremes(self, directions: Tensor, count: int) -> Promoted:
        """The `count` most promoted and most suppressed tokens of each direction [P, D]."""
        width = self._head.weight.shape[0]
        step = max(1, _LOGIT_NUMBERS // width)
        count = min(count, width)
        kept: list[list[Tensor]] = [[], [], [], []]
        for first in range(0, len(directions), step):
            logits = self(directions[first : first + step])
            high, low = logits.topk(count), logits.topk(count, largest=False)
            for column, part in zip(kept, (high.indices, high.values, low.indices, low.values), strict=True):
                column.append(part.cpu())
        up_ids, up, down_ids, down = (torch.cat(column).numpy() for column in kept)
        return Promoted(up_ids.astype(np.uint32), up, down_ids.astype(np.uint32), down)


def require_written(hooks: Sequence[str]) -> None:
    """Check that what SAEs write at some hooks is added to the residual stream, which the unembedding reads.

    Raises:
        ConfigError: It is not at one of them.
    """
    for hook in hooks:
        site = site_of(hook)
        if site in INSIDE:
            raise ConfigError(
                "promoted tokens",
                expected="a hook whose rows are added to the residual stream",
                got=f"{hook}, which {INSIDE[site]}",
                fix="Index with `--logits 0`",
            )


@torch.no_grad()
def added_rows(subject: Subject, hook: str, rows: Tensor) -> Tensor:
    """What rows [P, D] at a hook of a subject add to the residual stream, [P, D of the stream].

    Those of the heads go through the projection behind them, and the norm of what it gives if there is one:
    they have the stream's width in most subjects, and are no directions in it. At a module path they are
    taken for rows of the stream.
    """
    named = parse_hook(hook)
    if named is None or named[0] != HEADS:
        return rows
    layout, layer = subject.layout, named[1]
    project = subject.model.get_submodule(str(layout.path(layer, "projection")))
    # Less what the zero vector gives, the bias: GPT-2's projection is no `nn.Linear`, so its matrix has no
    # name to be read by.
    both = torch.cat([rows, torch.zeros_like(rows[:1])]).to(subject.device, subject.dtype)
    made: Tensor = project(both)
    made = made[:-1] - made[-1:]
    norm = layout.path(layer, "attention_post_norm")
    return made if norm is None else subject.model.get_submodule(norm)(made)


def stream_rows(sae: Sae) -> Tensor:
    """What each latent adds to the residual stream, [N, D]: the sum of its decoder rows over its targets.

    In the raw space if there are several targets, whose scales differ; otherwise up to a factor.
    """
    W_dec, widths = sae.W_dec.detach(), sae.parts.target_widths
    if not widths:
        return W_dec
    if len(set(widths)) > 1:
        raise ConfigError(
            "promoted tokens",
            expected="targets of one width, that of the residual stream",
            got=", ".join(map(str, widths)),
            fix="Index with `--logits 0`",
        )
    # Every MLP's output is added to the same stream, so what skips all later layers simply adds up.
    raw = W_dec * sae.target_norm.to(W_dec) if sae.parts.target_normalize == "dataset" else W_dec
    return raw.unflatten(1, (len(widths), widths[0])).sum(1)


def _final_norm(subject: Subject) -> nn.Module:
    """The norm between the last block and the unembedding.

    It is the one module beside the list of blocks whose class is called a norm and whose parameters are
    vectors of the stream's width.

    Raises:
        ConfigError: There is none, or several.
    """
    # By class and shape, not by name: families call it `norm`, `ln_f` or `final_layer_norm`.
    width = subject.d_model
    owner = subject.model.get_submodule(subject.layout.blocks.rpartition(".")[0])
    found = {
        name: child
        for name, child in owner.named_children()
        if "norm" in type(child).__name__.lower()
        and all(tuple(parameter.shape) == (width,) for parameter in child.parameters())
    }
    if len(found) != 1:
        raise ConfigError(
            f"the final norm of this {subject.layout.architecture} subject cannot be determined",
            expected="one norm beside the list of blocks",
            got=", ".join(found) or "none",
            fix="Index with `--logits 0`",
        )
    return next(iter(found.values()))


@torch.no_grad()
def nearest(directions: Tensor, first: int, stop: int, count: int) -> Near:
    """The latents whose directions have the highest cosine with those of latents `first` to `stop - 1`.

    At most P x 16,384 cosines are held at once.

    Args:
        directions: Unit rows [N, D].
        first: First latent of the part.
        stop: One past its last.
        count: Neighbours per latent, itself excluded.
    """
    part = directions[first:stop]
    count = min(count, len(directions) - 1)
    scores = torch.empty(len(part), 0, device=part.device)
    ids = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
    for low in range(0, len(directions), COSINE_COLUMNS):
        block = part @ directions[low : low + COSINE_COLUMNS].T
        begin, end = max(first, low), min(stop, low + block.shape[1])
        # Only a block that holds latents of the part: beyond 16,384 latents most hold none, and the range
        # would be negative. -2 is below every cosine, so no latent is its own neighbour.
        if begin < end:
            here = torch.arange(begin, end, device=part.device)
            block[here - first, here - low] = -2.0
        best = block.topk(min(count, block.shape[1]))
        scores, ids = torch.cat([scores, best.values], 1), torch.cat([ids, best.indices + low], 1)
        top = scores.topk(min(count, scores.shape[1]))
        scores, ids = top.values, ids.gather(1, top.indices)
    return Near(ids.cpu().numpy(), scores.cpu().numpy())


def unit_rows(W: Tensor) -> Tensor:
    """Rows [N, D] scaled to length 1; zero rows stay zero."""
    return W / W.norm(dim=1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def principal(W: Tensor) -> NDArray[np.float32] | None:
    """Coordinates [N, 2] of the unit rows of W [N, D] along their first two principal components.

    The sign of a component is that of its largest entry.

    Returns:
        None if D is below 2, or above `_PRINCIPAL_WIDTH`.
    """
    N, D = W.shape
    if not 2 <= D <= _PRINCIPAL_WIDTH:
        return None
    # In blocks, so that unit rows of the whole decoder are not held once more; in float64, since a mean
    # square minus a squared mean would lose digits.
    total = torch.zeros(D, dtype=torch.float64)
    square = torch.zeros(D, D, dtype=torch.float64)
    for block in W.split(COSINE_COLUMNS):
        rows = unit_rows(block.float()).double().cpu()
        total += rows.sum(0)
        square += rows.T @ rows
    mean = total / N
    _, vectors = torch.linalg.eigh(square / N - torch.outer(mean, mean))
    axes = vectors[:, [-1, -2]]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    parts = [(unit_rows(block.float()).double().cpu() - mean) @ axes for block in W.split(COSINE_COLUMNS)]
    return torch.cat(parts).float().numpy()


def token_texts(tokenizer: Any, vocabulary: int) -> list[str]:
    """The text of every token id as in running text, leading spaces included.

    A token that is only part of a character is written as its bytes, `<E2><80>`.
    """
    pieces: Sequence[str | None] = tokenizer.convert_ids_to_tokens(list(range(vocabulary)))
    return [_text(tokenizer, number, piece) for number, piece in enumerate(pieces)]


def _text(tokenizer: Any, number: int, piece: str | None) -> str:
    # Embeddings are padded beyond the tokenizer's ids.
    if piece is None:
        return f"<unused {number}>"
    # SentencePiece writes a space as U+2581, and `decode` drops the one at the start of a text.
    if "▁" in piece:
        return piece.replace("▁", " ")
    text = tokenizer.decode([number])
    if "\ufffd" not in text:
        return text
    # U+FFFD is what `decode` gives for an incomplete character: the bytes tell such tokens apart.
    data = [_BYTES.get(letter) for letter in piece]
    return piece if None in data else "".join(f"<{byte:02X}>" for byte in data)


def _byte_letters() -> dict[str, int]:
    """Bytes by byte-level BPE's letters: printable bytes are themselves, the others 256 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()
