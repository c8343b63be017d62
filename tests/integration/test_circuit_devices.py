"""Circuits where subject and set are on another device than the CPU, on which graphs are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.elsewhere import elsewhere
from tests.support.sets import random_set
from tests.support.tiny import make_subject
from winnow.evaluator.circuits import edit, faithfulness, set_quality, trace
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.subject.load import Subject

P, D, L = 7, 16, 3
IDS = torch.arange(5, 5 + 7 * P, 7)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject.load(str(make_subject(tmp_path, "llama", layers=L, width=D)))


def with_skip(set_: TranscoderSet) -> TranscoderSet:
    for layer in set_.layers:
        sae = set_[layer]
        sae.parts = sae.parts.model_copy(update={"skip": True})
        sae.W_skip = torch.nn.Parameter(torch.randn(D, D) / 8, requires_grad=False)
    return set_


@pytest.mark.parametrize("kind", ["plt with skip paths", "clt"])
def test_graphs_edits_and_figures_are_those_of_the_cpu(subject: Subject, kind: str):
    set_ = with_skip(random_set(L)) if kind != "clt" else random_set(L, cross=True)
    windows = IDS.repeat(2, 1)
    graph = trace(subject, set_, IDS, max_features=20)
    name = next(node.name for node in graph.nodes if node.kind == "feature")

    def measured() -> list[torch.Tensor]:
        found = edit(subject, set_, graph, [f"{name}*2"])
        figures = [*faithfulness(subject, set_, graph, 6), *set_quality(subject, set_, windows)]
        return [
            found.foretold,
            found.held,
            found.found,
            found.probabilities,
            torch.tensor([float(f.value or 0) for f in figures]),
        ]

    on_cpu = measured()
    with elsewhere() as device:
        subject.model.to(device)  # pyright: ignore[reportArgumentType]
        set_.to(device)
        subject.device = device
        there = trace(subject, set_, IDS, max_features=20)
        moved = measured()
    assert [node[:4] for node in there.nodes] == [node[:4] for node in graph.nodes]
    torch.testing.assert_close(there.adjacency, graph.adjacency)
    torch.testing.assert_close(moved, on_cpu, atol=1e-5, rtol=1e-4)


def test_a_set_on_another_device_than_its_subject_is_refused(subject: Subject):
    with elsewhere() as device:
        set_ = random_set(L).to(device)
        with pytest.raises(SaeMismatch, match=r"device of the set: expected cpu"):
            trace(subject, set_, IDS)


def test_a_subject_on_several_devices_is_refused(subject: Subject):
    with elsewhere() as device:
        subject.model.get_submodule(f"{subject.layout.blocks}.1").to(device)
        with pytest.raises(ConfigError, match="several devices"):
            trace(subject, random_set(L), IDS)
