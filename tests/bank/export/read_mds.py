"""Run with an interpreter that has mosaicml-streaming: reads an MDS folder and stores what it saw as an .npz."""

import sys

import numpy as np
from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]  # another environment's

folder, target, check = sys.argv[1:4]
data = StreamingDataset(local=folder, batch_size=4, shuffle=False, validate_hash=check or None)
rows = [data[i] for i in range(len(data))]
columns = {}
for name in rows[0]:
    values = [np.asarray(row[name]) for row in rows]
    if name == "image":
        values = [v[None] if v.ndim == 2 else v for v in values]
        if rows[0][name].__class__.__module__.startswith("PIL"):
            values = [v if len(v) == 1 else v.transpose(2, 0, 1) for v in values]
    columns[name] = np.stack(values)
np.savez(target, **columns)
