"""Training on a mesh is the eager training of one process: float64, gloo, every recipe."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from itertools import pairwise

import pytest
import safetensors.torch
import torch

from tests.support import cross
from tests.support.mesh_worker import CASES, OUT, REPORTED, D, K, N, batch, cases_on, go, make
from winnow.trainer.mesh.exchange import dense_bytes, rows_bytes
from winnow.trainer.mesh.shard import has_latents
from winnow.trainer.mesh.topk import candidates
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint import pack

MESHES = {"2x2": (2, 2), "1x4": (1, 4), "2x1": (2, 1), "1x2": (1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four processes left, each having gone through every case on every mesh."""
    folder = tmp_path_factory.mktemp("mesh")
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(4):
            log = stack.enter_context((folder / f"log-{rank}").open("w"))
            command = [sys.executable, "-m", "tests.support.mesh_worker", str(folder), str(rank)]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log))
        try:
            for rank, process in enumerate(ranks):
                assert process.wait(timeout=400) == 0, (folder / f"log-{rank}").read_text()[-3000:]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    return folder


@pytest.fixture(scope="module")
def reference():
    """The eager runs, each taken once."""
    found = {}

    def give(case):
        if case not in found:
            found[case] = go(case, None)
        return found[case]

    return give


def assembled(folder, mesh, case):
    """The state from the shards; replicas must hold the same bits."""
    data, latent = MESHES[mesh]
    grid = [
        [safetensors.torch.load_file(folder / f"{mesh} {case} {d} {s}.safetensors") for s in range(latent)]
        for d in range(data)
    ]
    for row in grid[1:]:
        for shard, other in zip(grid[0], row, strict=True):
            assert all(torch.equal(tensor, other[name]) for name, tensor in shard.items()), "replicas differ"
    state = {}
    for name, tensor in grid[0][0].items():
        if has_latents(name, tensor):
            state[name] = torch.cat([shard[name] for shard in grid[0]])
        else:
            assert all(torch.equal(tensor, shard[name]) for shard in grid[0]), name
            state[name] = tensor
    return state


def compare(run, told, state, reports):
    expected = pack(run)
    assert state.keys() == expected.keys()
    for report, right in zip(reports, told, strict=True):
        for name in REPORTED:
            assert report[name] == pytest.approx(right[name], rel=1e-9), (report["step"], name)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(("mesh", "case"), [(mesh, case) for mesh in MESHES for case in cases_on(mesh)])
def test_a_mesh_trains_as_one_process_does(folder, reference, mesh, case):
    run, told = reference(case)
    reports = json.loads((folder / f"{mesh} {case} 0 0.json").read_text())
    compare(run, told, assembled(folder, mesh, case), reports)
    if CASES[case].get("auxk_coefficient") is None and CASES[case].get("k") != N:
        assert run.counts.auxk_steps > 2


@pytest.mark.parametrize("case", CASES)
def test_the_mesh_of_one_is_one_process(reference, case):
    run, told = go(case, World())
    compare(*reference(case), pack(run), told)


@pytest.fixture(scope="module")
def cross_reference():
    """The specification of each cross-layer case on one process, taken once."""
    found = {}

    def give(case):
        if case not in found:
            # the specification has no parts
            runs = cross.make_cross("eager", **cross.CASES[case] | {"accumulate": 1})
            found[case] = cross.go_cross(runs), cross.pack_all(runs)
        return found[case]

    return give


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", cross.CASES)
def test_a_mesh_trains_all_layers_of_a_cross_layer_set(folder, cross_reference, mesh, case):
    told, expected = cross_reference(case)
    found = json.loads((folder / f"{mesh} cross, {case} 0 0.json").read_text())
    for step, (layers, right) in enumerate(zip(found, told, strict=True)):
        for layer, report in enumerate(layers):
            assert report == pytest.approx(right[layer], rel=1e-9), (step, layer)
    state = assembled(folder, mesh, f"cross, {case}")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_second_rounds_happen_where_one_shard_has_all_the_best(folder):
    def share(case):
        told = json.loads((folder / f"1x4 {case} 0 0.json").read_text())
        return sum(r["second_rounds"] for r in told) / sum(r["rows"] for r in told)

    assert candidates(K, 4) < K, "one round would send everything"
    assert share("skewed") > 2 * share("plain")


COUNTED = ("rows", "dense", "rows, batchtopk", "rows, batchtopk in one group")
COUNTED += ("rows, matryoshka", "rows, transcoder", "dense, transcoder")


def told_by(folder, mesh, case):
    """(data rank, shard, a step's report) of every rank."""
    data, latent = MESHES[mesh]
    for place in range(data):
        for shard in range(latent):
            for report in json.loads((folder / f"{mesh} {case} {place} {shard}.json").read_text()):
                yield place, shard, report


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", COUNTED)
def test_bytes_on_the_wire_are_those_of_the_arithmetic(folder, mesh, case):
    """Counted bytes of each step, against the tensors that cross each axis, one by one."""
    data, latent = MESHES[mesh]
    spec = make(case).recipe.spec
    for place, shard, report in told_by(folder, mesh, case):
        weights = batch(report["step"])[1].view(data, -1)
        rows = [int(row.sum()) for row in weights]
        assert report["latent_bytes"] == across_latent(spec, data, latent, rows[place], report)
        part = range(shard * N // latent, (shard + 1) * N // latent)
        across = across_data_rows if case.startswith("rows") else across_data_dense
        low, high = across(spec, data, latent, max(rows), part, report)
        assert low <= report["data_bytes"] <= high
        assert latent > 1 or low == high or spec.activation == "batchtopk"


def counts(ranks, groups):
    """BatchTopK's selection: 11 bits at a time of the 63 of a positive float64, and whether it is final."""
    return sum(summed(ranks, groups * 2**bits, 4) for bits in (11, 11, 11, 11, 11, 8)) + summed(ranks, 1, 1)


def summed(ranks, numbers, size=8):
    """Bytes a rank of a ring sends to sum so many numbers."""
    return 2 * (ranks - 1) * numbers * size // ranks


def gathered(ranks, numbers, size=8):
    return (ranks - 1) * numbers * size


def across_latent(spec, ranks, shards, rows, report):
    """Dead latents' numbers, the selection, a reconstruction for each part, b_pre and the norm."""
    out = OUT if spec.target_hook else D
    total = gathered(shards, 1) + len(spec.prefixes) * summed(shards, rows * out)
    if spec.activation == "batchtopk":
        total += counts(shards, max(1, spec.groups // ranks))
    else:  # first and second rounds
        total += gathered(shards, rows * candidates(spec.k, shards))
        total += gathered(shards, report["second_rounds"] * min(spec.k, -(-N // shards)))
    if shards == 1:
        return 0
    if report["dead"]:
        k_dead = min(6, report["dead"])
        total += gathered(shards, rows * candidates(k_dead, shards)) + summed(shards, rows * out)
    return total + summed(shards, D) + summed(shards, 1)


def always_across_data(spec, ranks, n, report):
    """Rows and weights, loss and second rounds, who was active, AuxK's sums, a linear path, shared groups."""
    out = OUT if spec.target_hook else D
    total = gathered(ranks, 2) + summed(ranks, 2) + summed(ranks, n, size=1)
    total += summed(ranks, OUT * D) if spec.skip else 0
    if spec.activation == "batchtopk" and spec.groups < ranks:  # how many rows they have, and the same
        total += summed(ranks, spec.groups) + counts(ranks, spec.groups)
    return total + (summed(ranks, out) + summed(ranks, 2) if report["dead"] else 0)


def across_data_dense(spec, ranks, shards, rows, part, report):
    n, out = len(part), OUT if spec.target_hook else D
    total = always_across_data(spec, ranks, n, report) + summed(ranks, n * D) + summed(ranks, n * out)
    total += summed(ranks, n) + summed(ranks, out)
    return total, total


def across_data_rows(spec, ranks, shards, rows, part, report):
    """The encoder's input, and for each part a width, its gradient's rows and its codes."""
    n, out = len(part), OUT if spec.target_hook else D
    widest = n if spec.activation == "batchtopk" else min(spec.k, n)
    most = [
        widest if first < part.stop and stop > part.start else 0
        for first, stop in pairwise((0, *spec.prefixes))
    ]
    most += [min(6, report["dead"], n)] if report["dead"] else []
    low = high = always_across_data(spec, ranks, n, report) + gathered(ranks, rows * D)
    for width in most:
        low += summed(ranks, 1) + gathered(ranks, rows * out)
        high += (
            summed(ranks, 1) + gathered(ranks, rows * (out + 2 * width)) + gathered(ranks, rows * width, 4)
        )
        if shards == 1 and spec.activation != "batchtopk":
            low = high
    return low, high


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", ["relu", "jumprelu"])
def test_dense_codes_send_outputs_and_gradients(folder, mesh, case):
    data, latent = MESHES[mesh]
    thresholds = case == "jumprelu"
    for place, shard, report in told_by(folder, mesh, case):
        rows = int(batch(report["step"])[1].view(data, -1)[place].sum())
        n = (shard + 1) * N // latent - shard * N // latent
        across = gathered(latent, 1) + summed(latent, rows * D) + summed(latent, D) + 2 * summed(latent, 1)
        over = gathered(data, 2) + summed(data, n, size=1) + summed(data, 1) + thresholds * summed(data, 1)
        over += 2 * summed(data, n * D) + (1 + thresholds) * summed(data, n) + summed(data, D)
        if report["dead"]:
            among = gathered(latent, rows * candidates(6, latent)) if report["dead"] > 6 else 0
            across += among + summed(latent, rows * D)
            over += summed(data, D) + summed(data, 2)
        assert (report["latent_bytes"], report["data_bytes"]) == (across, over), report["step"]


def test_gradients_cross_the_data_axis_the_cheaper_way():
    assert rows_bytes(8, 1024, 768, 768, [36], 4) * 7 < dense_bytes(8, 32768, 768, 768, 4)
    assert rows_bytes(8, 8192, 768, 768, [32], 4) > dense_bytes(8, 4096, 768, 768, 4)
