"""`make readers`: how other readers of zarr read sound and damaged datasets.

It installs the pinned readers in a temporary folder (pip and npm, removed at the end), writes small datasets
with `winnow.store.testing`, and prints what docs/data.md says of readers: sound datasets by dtype, then
damaged ones of bfloat16 without and with compression. No test runs it, since it needs package registries.

`equal`: the stored numbers; `refused`: an error; `fill`: the fill value, without an error; `WRONG`: other
numbers, without an error.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.layout import BFLOAT16_NAN, shard_key
from winnow.store.format.shards import to_stored
from winnow.store.objects import open_store
from winnow.store.testing import flip_bit, make_plan, synthetic_rows, write_dataset

PYTHON = (
    "zarr==3.1.6",
    "zarrs==0.2.3",
    "zarrista==0.1.0",
    "tensorstore==0.1.86",
    "xarray-tensorstore==0.3.0",
    "xarray==2026.9.0",
    "dask==2026.8.0",
    "obstore==0.12.1",
    "virtualizarr==2.5.1",
    "arro3-core==0.9.1",
    "z5py==3.0.2",
    "rasterio==1.4.4",
    "netCDF4==1.7.5.1.post1",
)
NODE = ("zarrita@0.7.5", "@zarrita/storage@0.2.0", "zarr-js@3.3.0")
HOOK = "resid_post.1"
HOOKS = {HOOK: 8, "model.layers.0.mlp": 5}
SOUND = (
    ("bfloat16", "none"),
    ("bfloat16", "zstd"),
    ("float16", "none"),
    ("float32", "none"),
    ("int8", "none"),
)
DAMAGE = ("flipped bit", "bad index", "shard gone")

# Every reader is one process that reads all cases: a line of root, first and last row each.
READ = """
import hashlib, sys
import numpy as np
{read}
for case in sys.stdin.read().splitlines():
    root, first, stop = case.split("\\t")
    try:
        rows = read(root, {hook!r}, int(first), int(stop))
        print("seen", hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest(), flush=True)
    except Exception as error:
        print("seen refused", flush=True)
        print(type(error).__name__, error, file=sys.stderr)
"""
ZARR = """
import zarr
{}
def read(root, hook, first, stop):
    return zarr.open_group({}, mode="r")["activations/" + hook][first:stop]
"""
TENSORSTORE = """
import tensorstore
def read(root, hook, first, stop):
    place = {{"driver": "file", "path": f"{{root}}/activations/{{hook}}/"}}
    spec = {{"driver": "zarr3", "kvstore": place, "fill_missing_data_reads": {}}}
    return tensorstore.open(spec, read=True).result()[first:stop].read().result()
"""
READERS = {
    "zarr-python 3.1.6": ZARR.format("", "root"),
    "the same through obstore 0.12.1": ZARR.format(
        "from obstore.store import LocalStore\nfrom zarr.storage import ObjectStore",
        "ObjectStore(LocalStore(root))",
    ),
    "the same through VirtualiZarr 2.5.1": """
import zarr
from obspec_utils.registry import ObjectStoreRegistry
from obstore.store import LocalStore
from virtualizarr.parsers import ZarrParser
STORES = ObjectStoreRegistry({"file://": LocalStore()})
def read(root, hook, first, stop):
    return zarr.open_group(ZarrParser()(f"file://{root}/activations", STORES), mode="r")[hook][first:stop]
""",
    "the same with the pipeline of zarrs 0.2.3": ZARR.format(
        "import zarrs\nzarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'})", "root"
    ),
    "xarray 2026.9.0, dask 2026.8.0": """
import xarray
def read(root, hook, first, stop):
    return xarray.open_zarr(root, group="activations", chunks={"row": 512})[hook][first:stop].values
""",
    "zarrista 0.1.0": """
from zarrista import Array
from zarrista.store import FilesystemStore
def read(root, hook, first, stop):
    return np.asarray(Array.open(FilesystemStore(root), "/activations/" + hook)[first:stop])
""",
    "tensorstore 0.1.86": TENSORSTORE.format(True),
    "tensorstore 0.1.86, fill_missing_data_reads=False": TENSORSTORE.format(False),
    "xarray-tensorstore 0.3.0": """
import xarray_tensorstore
def read(root, hook, first, stop):
    return xarray_tensorstore.open_zarr(root + "/activations")[hook][first:stop].values
""",
    "z5py 3.0.2": """
import z5py
def read(root, hook, first, stop):
    return z5py.File(root, "r")["activations/" + hook][first:stop]
""",
    "GDAL 3.10.3 (rasterio 1.4.4)": """
import rasterio
from rasterio.windows import Window
def read(root, hook, first, stop):
    with rasterio.open(f'ZARR:"{root}/activations/{hook}"') as rows:
        return rows.read(1, window=Window(0, first, rows.width, stop - first))
""",
    "netCDF-C 4.10.1 (netCDF4 1.7.5.1)": """
import netCDF4
def read(root, hook, first, stop):
    opened = netCDF4.Dataset(f"file://{root}#mode=nczarr,file")
    opened.set_auto_mask(False)
    return opened["activations"][hook][first:stop]
""",
}
NODE_READ = """
import {{ createHash }} from "node:crypto";
import {{ readFileSync }} from "node:fs";
import * as files from "node:fs/promises";
{read}
for (const line of readFileSync(0, "utf8").trim().split("\\n")) {{
    const [root, first, stop] = line.split("\\t");
    try {{
        const rows = await read(root, "{hook}", Number(first), Number(stop));
        const bytes = new Uint8Array(rows.buffer, rows.byteOffset, rows.byteLength);
        console.log("seen", createHash("sha256").update(bytes).digest("hex"));
    }} catch (error) {{ console.log("seen refused"); console.error(String(error)); }}
}}
process.exit(0);
"""
NODE_READERS = {
    "zarrita 0.7.5": """
import * as zarr from "zarrita";
import { FileSystemStore } from "@zarrita/storage";
async function read(root, hook, first, stop) {
    const group = zarr.root(new FileSystemStore(root));
    const array = await zarr.open(group.resolve(`activations/${hook}`), { kind: "array" });
    return (await zarr.get(array, [zarr.slice(first, stop), null])).data;
}
""",
    # It reads chunk by chunk over HTTP; of a codec that it does not know it ends the process.
    "zarr-js 3.3.0": """
import { createServer } from "node:http";
import zarrjs from "zarr-js";
process.on("uncaughtException", (error) => { console.error(String(error)); process.exit(1); });
const server = createServer(async (request, reply) => {
    try {
        const body = await files.readFile(request.url);
        const range = /bytes=(\\d*)-(\\d*)/.exec(request.headers.range ?? "bytes=0-");
        const first = range[1] === "" ? body.length - Number(range[2]) : Number(range[1]);
        const last = range[1] === "" || range[2] === "" ? body.length - 1 : Number(range[2]);
        reply.writeHead(206).end(body.subarray(first, last + 1));
    } catch { reply.writeHead(404).end(); }
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const get = (call) =>
    new Promise((done, failed) => call((error, value) => (error ? failed(error) : done(value))));
async function read(root, hook, first, stop) {
    const url = `http://127.0.0.1:${server.address().port}${root}/activations/${hook}`;
    const open = await get((then) => zarrjs(fetch, "v3").open(url, then));
    const parts = [];
    for (let chunk = first / 8; chunk < stop / 8; chunk++)
        parts.push(Buffer.from((await get((then) => open([chunk, 0], then))).data.buffer));
    return Buffer.concat(parts);
}
""",
}


class Case(NamedTuple):
    """Rows of `HOOK` to read: a column of a table."""

    root: Path
    plan: HarvestPlan
    first: int
    stop: int

    @property
    def stored(self) -> NDArray[np.generic]:
        """The rows in the dtype on disk."""
        kept = [to_stored(synthetic_rows(self.plan, unit, HOOK), self.plan.spec.dtype) for unit in range(2)]
        return np.concatenate(kept)[self.first : self.stop]


def main() -> None:
    """Install, write, read, print."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        commands = _install(work)
        tables: dict[str, dict[str, Case]] = {"sound": _sound(work)}
        for compress in ("none", "zstd"):
            tables[f"damaged, {compress}"] = _damaged(work, compress)
        seen = {reader: _read(command, tables.values()) for reader, command in commands.items()}
        at = 0
        for title, cases in tables.items():
            print(f"\n| {title} | " + " | ".join(cases) + " |\n" + "|---" * (1 + len(cases)) + "|")
            for reader, found in seen.items():
                cells = map(_verdict, found[at : at + len(cases)], cases.values())
                print(f"| {reader} | " + " | ".join(cells) + " |")
            at += len(cases)


def _install(work: Path) -> dict[str, list[str]]:
    """Install the readers; returns the command of each."""
    # An environment of its own: the readers' versions of zarr and numpy need not be Winnow's.
    subprocess.run([sys.executable, "-m", "venv", work / "py"], check=True)
    pip = [work / "py/bin/python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *PYTHON]
    subprocess.run(pip, check=True)
    (work / "js").mkdir()
    (work / "js/package.json").write_text(json.dumps({"type": "module"}))
    npm = ["npm", "install", "--silent", *NODE]
    subprocess.run(npm, cwd=work / "js", check=True, stdout=subprocess.DEVNULL)
    commands: dict[str, list[str]] = {}
    for reader, code in READERS.items():
        program = READ.format(read=code, hook=HOOK)
        commands[reader] = [str(work / "py/bin/python"), "-W", "ignore", "-c", program]
    for number, (reader, code) in enumerate(NODE_READERS.items()):
        file = work / f"js/read{number}.js"
        file.write_text(NODE_READ.format(read=code, hook=HOOK))
        commands[reader] = ["node", str(file)]
    return commands


def _write(root: Path, **options: Any) -> HarvestPlan:
    plan = make_plan(hooks=HOOKS, **options)
    write_dataset(open_store(str(root)), plan)
    return plan


def _sound(work: Path) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for dtype, compress in SOUND:
        name = dtype if compress == "none" else f"{dtype}, {compress}"
        root = work / f"{dtype}-{compress}"
        plan = _write(root, dtype=dtype, compress=compress)
        # Two shards, whole and in part.
        cases[name] = Case(root, plan, 0, plan.rows_per_unit + 4 * plan.rows_per_slice)
    return cases


def _damaged(work: Path, compress: str) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for damage in DAMAGE:
        root = work / f"{damage.replace(' ', '-')}-{compress}"
        plan = _write(root, compress=compress)
        store, key = open_store(str(root)), shard_key(HOOK, 0)
        if damage == "shard gone":
            store.delete(key)
        else:  # a bit of the first slice, or of the shard's index, which is at the end
            flip_bit(store, key, 20 if damage == "flipped bit" else -1)
        cases[f"{damage}, whole shard"] = Case(root, plan, 0, plan.rows_per_unit)
        cases[f"{damage}, part of it"] = Case(root, plan, 0, 4 * plan.rows_per_slice)
    return cases


def _read(command: list[str], tables: Iterable[dict[str, Case]]) -> list[str]:
    """What a reader says of each case of the tables, in order: a digest, or `refused`."""
    cases = [case for table in tables for case in table.values()]
    lines = "\n".join(f"{case.root}\t{case.first}\t{case.stop}" for case in cases)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=600, check=False)
    seen = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seen ")]
    if done.stderr:
        print(done.stderr[-300:], file=sys.stderr)
    if len(seen) < len(cases):  # the reader ended at this case, and the others were not tried
        seen.append("refused")
    return seen + ["?"] * (len(cases) - len(seen))


def _verdict(found: str, case: Case) -> str:
    if len(found) < 64:
        return found
    known = {_digest(case.stored): "equal"}
    if case.stored.dtype == np.uint16:
        known[_digest(np.full_like(case.stored, BFLOAT16_NAN))] = "fill"
    return known.get(found, "WRONG")


def _digest(rows: NDArray[np.generic]) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()


if __name__ == "__main__":
    main()
