"""Draw the evaluations of runs from scratch against agent steps, beside the author's training returns against games.

    python results/atari/returns.py results/atari/pong.png results/atari/author/pong_results.txt results/atari/pong.csv
    python results/atari/returns.py pong.png results/atari/author/pong_results.txt runs/ALE-Pong-v5__*

The author's files (github.com/paintception/phd-thesis, MIT licence) have the columns DQV, DQV-Max, DQN and DDQN over
episodes; without such a file, its panel stays empty.
"""

import csv
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from transfer_matrix import read_runs  # noqa: E402

COLOURS = {"DDQN": "C0", "DQN": "C1", "DQV": "C2", "DQV-Max": "C3"}  # as transfer_matrix.py has them
TAG = "eval/episodic_return"

out, author, *paths = sys.argv[1:]
curves = defaultdict(list)  # {(algorithm, seed): [(step, return), ...]}
for path in paths:
    if path.endswith(".csv"):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                curves[row["algorithm"], row["seed"]].append((float(row["step"]), float(row["eval_return"])))
    else:
        for run in read_runs(path, [TAG]):
            if run.mode == "scratch" and not run.lacks(TAG):
                curves[run.algorithm, run.seed] = run.curves[TAG]
figure = Figure(figsize=(10, 4), layout="constrained")
ours, theirs = figure.subplots(1, 2, sharey=True)
for (algorithm, seed), points in curves.items():
    steps, returns = np.array(points).T
    ours.plot(steps / 1_000, returns, color=COLOURS.get(algorithm), label=f"{algorithm}, seed {seed}")
ours.set(title="ours", xlabel="thousands of agent steps", ylabel="return of evaluations")
ours.legend(fontsize=8)
if os.path.isfile(author):
    with open(author, newline="") as file:
        names, *rows = csv.reader(file, delimiter="\t")
    for i, name in enumerate(names[1:], 1):
        points = [(float(row[0]), float(row[i])) for row in rows if len(row) > i and row[i]]
        theirs.plot(*zip(*points), color=COLOURS[name], label=name)
    theirs.set(title="the author's", xlabel="games", ylabel="return of training")
    theirs.legend(fontsize=8)
figure.savefig(out, dpi=100)
