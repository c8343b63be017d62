#!/usr/bin/env bash
# Mean and variance of activations stored as float16: numpy is right about the one and wrong about the other, xarray and dask
# about both, with numbers that nothing marks as wrong.
#
# Guess: numpy adds up float16 in float32 (its docs say so of `mean`), so the mean and the variance per dimension of 65,536 rows
#        are right to about three digits; xarray and dask, which call numpy, give the same.
# Seen:  numpy 2.4.6, xarray 2026.9.0, dask 2026.8.0, rows of mean 0.1 and variance 1: numpy's mean is right and its variance
#        0.28, since `var` adds up in float16, where a sum stops growing at some thousands. xarray's mean, which adds up in
#        float16 as well, is 0.07 to 0.13 in memory and 0.4 by shards of 8,192 rows; its variance by shards is 0. dask says that
#        mean and variance are 0: it divides by the number of rows as float16, which is infinite. All this with a warning of an
#        overflow at most. In float32 all are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6 zarr==3.1.6 xarray==2026.9.0 dask==2026.8.0

cat > "$folder/show.py" <<'PY'
import sys
import warnings

import dask.array
import numpy as np
import xarray
import zarr

warnings.simplefilter("ignore")
rows = (np.random.default_rng(0).standard_normal((65536, 64)) + 0.1).astype("float16")
array = zarr.create_array(
    sys.argv[1] + "/rows.zarr", shape=rows.shape, shards=(8192, 64), chunks=(128, 64), dtype="float16", dimension_names=("row", "d")
)
array[:] = rows
true = {"mean": rows.astype("float64").mean(0), "var": rows.astype("float64").var(0)}
read = {
    "numpy": array[:],
    "xarray, in memory": xarray.DataArray(array[:], dims=("row", "d")),
    "xarray, by shards": xarray.DataArray(dask.array.from_array(array, chunks=array.shards), dims=("row", "d")),
    "dask, by shards": dask.array.from_array(array, chunks=array.shards),
}
off = {}
for name, values in read.items():
    for what, right in true.items():
        for dtype in ("float16", "float32"):
            found = np.asarray(getattr(values.astype(dtype), what)(axis=0), dtype="float64")
            off[name, what, dtype] = float(np.abs(found - right).max())
            print(f"{name}, {what} in {dtype}: largest error {off[name, what, dtype]:.4f}")
fine = all(error < 0.002 for (_, _, dtype), error in off.items() if dtype == "float32")
fine &= off["numpy", "mean", "float16"] < 0.002
wrong = off["numpy", "var", "float16"] > 0.5 and all(
    not off[name, what, "float16"] < 0.01 for name in read if name != "numpy" for what in true
)
raise SystemExit(0 if fine and wrong else "no longer as described")
PY
"$folder/env/bin/python" "$folder/show.py" "$folder"
