"""`python -m benchmarks.readers_tried`: how other zarr readers read sound and damaged datasets.

It installs the pinned readers in a temporary folder (pip and npm, removed at the end), writes small datasets
with `winnow.store.testing`, and prints the table of docs/data.md. No test runs it, since it needs package
registries.

`equal`: the stored numbers; `refused`: an error; `fill`: the fill value, without an error; `WRONG`: other
numbers, without an error.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from winnow.store.format.layout import BFLOAT16_NAN, shard_key
from winnow.store.format.shards import to_stored
from winnow.store.objects import open_store
from winnow.store.testing import flip_bit, make_plan, synthetic_rows, write_dataset

PYTHON = ("zarr==3.1.6", "zarrs==0.2.3", "tensorstore==0.1.86", "xarray==2026.9.0", "dask==2026.8.0")
NODE = "zarrita@0.7.5"
HOOK = "resid_post.1"
HOOKS = {HOOK: 8, "model.layers.0.mlp": 5}

OPEN = """import sys, hashlib, numpy as np
root, hook, first, stop = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
"""
SHOW = "\nprint(hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest())\n"
ZARR = "import zarr\n{}rows = zarr.open_group(root, mode='r')['activations/' + hook][first:stop]"
READERS = {
    "zarr 3.1.6": ZARR.format(""),
    "zarr 3.1.6 with zarrs 0.2.3": ZARR.format(
        "import zarrs\nzarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'})\n"
    ),
    "xarray 2026.9.0, dask 2026.8.0": "import xarray\n"
    "opened = xarray.open_zarr(root, group='activations', chunks={'row': 512})\n"
    "rows = opened[hook][first:stop].values",
    "tensorstore 0.1.86": """import tensorstore
spec = {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': root + '/activations/' + hook + '/'}}
rows = tensorstore.open(spec, read=True).result()[first:stop].read().result()""",
    "tensorstore 0.1.86, fill_missing_data_reads=False": """import tensorstore
spec = {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': root + '/activations/' + hook + '/'}}
spec['fill_missing_data_reads'] = False
rows = tensorstore.open(spec, read=True).result()[first:stop].read().result()""",
}
ZARRITA = """
import * as zarr from "zarrita";
import { FileSystemStore } from "@zarrita/storage";
import { createHash } from "node:crypto";
const [root, hook, first, stop] = process.argv.slice(2);
const group = zarr.root(new FileSystemStore(root));
const array = await zarr.open(group.resolve(`activations/${hook}`), { kind: "array" });
const rows = await zarr.get(array, [zarr.slice(Number(first), Number(stop)), null]);
const bytes = new Uint8Array(rows.data.buffer, rows.data.byteOffset, rows.data.byteLength);
console.log(createHash("sha256").update(bytes).digest("hex"));
"""


def main() -> None:
    """Install, write, read, print."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        commands = _install(work)
        datasets = _datasets(work)
        plan = make_plan(hooks=HOOKS)
        stored = np.concatenate(
            [to_stored(synthetic_rows(plan, unit, HOOK), "bfloat16") for unit in range(plan.units)]
        )
        per_unit, per_slice = plan.rows_per_unit, plan.rows_per_slice
        spans = {"a shard": (0, per_unit), "a part of it": (0, 4 * per_slice)}
        print("| reader | " + " | ".join(f"{case}, {span}" for case in datasets for span in spans) + " |")
        print("|---" * (1 + len(datasets) * len(spans)) + "|")
        for reader, command in commands.items():
            cells: list[str] = []
            for root in datasets.values():
                for first, stop in spans.values():
                    arguments = [*command, str(root), HOOK, str(first), str(stop)]
                    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
                    cells.append(_verdict(done, stored[first:stop]))
            print(f"| {reader} | " + " | ".join(cells) + " |", flush=True)


def _install(work: Path) -> dict[str, list[str]]:
    """Install the readers; returns the command of each."""
    # An environment of its own: the readers' versions of zarr and numpy need not be Winnow's.
    subprocess.run([sys.executable, "-m", "venv", work / "py"], check=True)
    pip = [work / "py/bin/python", "-m", "pip", "install", "--quiet", *PYTHON]
    subprocess.run(pip, check=True)
    (work / "js").mkdir()
    (work / "js/package.json").write_text(json.dumps({"type": "module"}))
    npm = ["npm", "install", "--silent", NODE, "@zarrita/storage"]
    subprocess.run(npm, cwd=work / "js", check=True, stdout=subprocess.DEVNULL)
    (work / "js/read.js").write_text(ZARRITA)
    commands = {
        reader: [str(work / "py/bin/python"), "-W", "ignore", "-c", OPEN + code + SHOW]
        for reader, code in READERS.items()
    }
    return {**commands, "zarrita 0.7.5": ["node", str(work / "js/read.js")]}


def _datasets(work: Path) -> dict[str, Path]:
    """Write the datasets; returns the root of each by what was done to it."""
    plan = make_plan(hooks=HOOKS)
    roots = {
        name: work / name.replace(" ", "-") for name in ("sound", "flipped bit", "bad index", "shard gone")
    }
    for root in roots.values():
        write_dataset(open_store(str(root)), plan)
    key = shard_key(HOOK, 0)
    # A bit of the first slice's numbers, and one of the shard's index, which is at the end.
    flip_bit(open_store(str(roots["flipped bit"])), key, 20)
    flip_bit(open_store(str(roots["bad index"])), key, -1)
    open_store(str(roots["shard gone"])).delete(key)
    return roots


def _verdict(done: subprocess.CompletedProcess[str], stored: np.ndarray) -> str:
    if done.returncode != 0:
        return "refused"
    found = done.stdout.split()[-1]
    fill = np.full_like(stored, BFLOAT16_NAN)
    known = {
        hashlib.sha256(rows.tobytes()).hexdigest(): name for rows, name in ((stored, "equal"), (fill, "fill"))
    }
    return known.get(found, "WRONG")


if __name__ == "__main__":
    main()
