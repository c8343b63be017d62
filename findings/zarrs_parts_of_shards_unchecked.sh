#!/usr/bin/env bash
# zarrs (zarrs 0.2.3 as the codec pipeline of zarr-python, zarrista 0.1.0) and zarrita 0.7.5: the crc32c of an inner chunk of a
# shard is not compared, though the chunk is read whole.
#
# Guess: activations stored with `crc32c` inside `sharding_indexed` are compared at every read: whoever reads whole inner
#        chunks has each one's checksum in hand, and zarrs has an option `validate_checksums` that is on.
# Seen:  one bit of a stored row is another. zarr-python 3.1.6 and tensorstore 0.1.86 refuse the chunk, read alone or with its
#        shard. zarrs refuses it only in a read of the whole shard: of some of its inner chunks, each read whole and
#        decompressed, it gives the other number. zarrita gives it in both.
# Needs: npm, python3 with venv.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet zarr==3.1.6 zarrs==0.2.3 zarrista==0.1.0 tensorstore==0.1.86
(cd "$folder" && echo '{"type": "module"}' > package.json && npm install --silent zarrita@0.7.5 @zarrita/storage)

cat > "$folder/read.js" <<'JS'
import * as zarr from "zarrita";
import { FileSystemStore } from "@zarrita/storage";
const [path, stop] = process.argv.slice(2);
const array = await zarr.open(zarr.root(new FileSystemStore(path)), { kind: "array" });
console.log((await zarr.get(array, [zarr.slice(0, Number(stop)), null])).data.join());
JS
cat > "$folder/show.py" <<'PY'
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorstore
import zarr
import zarrista
import zarrs
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarrista.store import FilesystemStore

folder = Path(sys.argv[1])
rows = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
DEFAULT = "zarr.core.codec_pipeline.BatchedCodecPipeline"


def by_zarr(pipeline):
    def read(path, stop):
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            return zarr.open_array(path, mode="r")[:stop]

    return read


def by_tensorstore(path, stop):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path + "/"}}
    return tensorstore.open(spec, read=True).result()[:stop].read().result()


def by_zarrista(path, stop):
    return np.asarray(zarrista.Array.open(FilesystemStore(path), "/")[:stop])


def by_zarrita(path, stop):
    command = ["node", str(folder / "read.js"), path, str(stop)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    return np.array(shown.split(","), "float32").reshape(-1, 8)


READERS = {
    "zarr-python": by_zarr(DEFAULT),
    "tensorstore": by_tensorstore,
    "zarr-python with zarrs": by_zarr("zarrs.ZarrsCodecPipeline"),
    "zarrista": by_zarrista,
    "zarrita": by_zarrita,
}
seen = {}
for name, packing in {"plain": (), "zstd": (ZstdCodec(level=1),)}.items():
    path = str(folder / name)
    array = zarr.create_array(
        path, shape=(64, 8), shards=(64, 8), chunks=(8, 8), dtype="float32",
        serializer=BytesCodec(endian="little"), compressors=(*packing, Crc32cCodec()),
    )
    array[:] = rows
    for reader, read in READERS.items():
        assert all(np.array_equal(read(path, stop), rows[:stop]) for stop in (16, 64)), reader
    shard = Path(path, "c/0/0")
    body = bytearray(shard.read_bytes())
    body[40] ^= 1  # in the first of eight inner chunks
    shard.write_bytes(body)
    for reader, read in READERS.items():
        for part, stop in (("two of eight inner chunks", 16), ("whole shard", 64)):
            try:
                found = "right" if np.array_equal(read(path, stop), rows[:stop]) else "another number"
            except Exception:
                found = "refused"
            seen[reader, part, name] = found
            print(f"{name}: {reader}, {part}: {found}")
WRONG = {(reader, "two of eight inner chunks") for reader in ("zarr-python with zarrs", "zarrista", "zarrita")}
WRONG.add(("zarrita", "whole shard"))
expected = {key: "another number" if key[:2] in WRONG else "refused" for key in seen}
raise SystemExit(0 if seen == expected else "no longer as described")
PY
"$folder/env/bin/python" -W ignore "$folder/show.py" "$folder"
