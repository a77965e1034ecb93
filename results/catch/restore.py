"""Write the curves of a curves.csv as runs again, so that transfer_matrix.py works on them without a rerun.

    python results/catch/restore.py results/catch/curves.csv restored
    python transfer_matrix.py table --logdir restored

The runs have the metrics of the CSV and of their hyper-parameters what `table` and `plot` need; no checkpoints.
"""

import csv
import os
import sys
from collections import defaultdict

from torch.utils.tensorboard import SummaryWriter

if len(sys.argv) != 3 or not os.path.isfile(sys.argv[1]):
    sys.exit(__doc__)
path, logdir = sys.argv[1:]
runs = defaultdict(list)
with open(path, newline="") as file:
    header, *rows = csv.reader(file)
for row in rows:
    runs[tuple(row[:5])].append(row[5:])
for (algorithm, mode, source, target, seed), points in runs.items():
    flags = {"algorithm": algorithm, "env_id": f"catch_env:{target}", "exp_name": "restored", "seed": seed}
    if mode not in ("scratch", "fine-tuning", "only-head", "hybrid"):
        sys.exit(f"{path} has runs of the mode {mode}, which cannot be written again")
    if source:
        flags |= {"pretrained": f"{source}.pt", "pretrained_env_id": f"catch_env:{source}"}
        flags |= {"freeze_features": mode == "only-head"} | ({"pretrained_head": "pt"} if mode == "hybrid" else {})
    folder = os.path.join(logdir, "__".join(part for part in (target, algorithm, mode, source, seed) if part))
    if os.path.exists(folder):
        sys.exit(f"{folder} exists already: name another folder")
    with SummaryWriter(folder) as writer:
        table = "\n".join(f"|{name}|{value}|" for name, value in flags.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        for step, *values in points:
            for metric, value in zip(header[6:], values):
                if value:
                    writer.add_scalar(metric, float(value), int(step))
print(f"{len(runs)} runs in {logdir}")
