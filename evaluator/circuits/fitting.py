"""Whether a set, a subject and a graph belong together, by digests."""

from __future__ import annotations

import hashlib

from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import SaeMismatch
from winnow.schemas.fit import mismatch, require_own_rows
from winnow.schemas.graph import GraphOrigin
from winnow.subject.load import Subject


def set_digest(set_: TranscoderSet) -> str:
    """A digest of a set: `SetCard.layers_sha256`; of the weights if it has no card."""
    if set_.card is not None:
        return set_.card.layers_sha256
    digest = hashlib.sha256()
    for layer in set_.layers:
        for name, tensor in set_[layer].tensors().items():
            digest.update(f"{layer} {name}\n".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_set(subject: Subject, set_: TranscoderSet) -> None:
    """Check that a set is one of a subject's.

    Raises:
        SaeMismatch: Another width, layers that the subject lacks, trained on another subject, or on another
            device.
    """
    layers = subject.layout.layers
    if set_.layers.stop > layers:
        raise mismatch(
            "layers", "the set", expected=f"0 to {layers - 1}", of="the subject", got=set_.layers[-1]
        )
    width = subject.d_model
    if set_.d_model != width:
        raise mismatch("width D", "the set", expected=width, of="the subject", got=set_.d_model)
    device = set_[set_.layers.start].W_enc.device
    if device != subject.device:
        raise mismatch(
            "device", "the set", expected=str(subject.device), of="the subject", got=str(device),
            fix="Load or move the set there: `set_.to(subject.device)`",
        )  # fmt: skip
    identity = set_.card.identity if set_.card is not None else None
    if identity is not None and identity.subject_weights_sha256 != subject.identity.weights_sha256:
        raise mismatch(
            "subject", "the set", expected=subject.identity.weights_sha256, of="the subject",
            got=f"{identity.subject_model} ({identity.subject_weights_sha256})",
            fix="Load the subject that the set was trained on",
        )  # fmt: skip
    require_own_rows("the set", identity)


def check_graph(subject: Subject, set_: TranscoderSet, origin: GraphOrigin | None) -> GraphOrigin:
    """Check that a graph was traced from this set and this subject; returns what it was traced from.

    Raises:
        SaeMismatch: It was traced from others, or another program wrote it.
    """
    if origin is None:
        raise SaeMismatch(
            "the graph", expected="one that `winnow circuit` traced", got="no block metadata.winnow",
            fix="Trace the prompt again with this set",
        )  # fmt: skip
    fix = "Trace the prompt again, or name the set and subject that it was traced with"
    found = set_digest(set_)
    if origin.set_sha256 != found:
        raise mismatch("set", "the graph", expected=found, of="the set", got=origin.set_sha256, fix=fix)
    found = subject.identity.weights_sha256
    if origin.subject_weights_sha256 != found:
        got = origin.subject_weights_sha256
        raise mismatch("subject", "the graph", expected=found, of="the subject", got=got, fix=fix)
    return origin
