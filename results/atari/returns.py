"""Draw the training returns of runs from scratch over their games, beside the author's own curves.

    python results/atari/returns.py pong.png results/atari/author/pong_results.txt runs/ALE-Pong-v5__*

The author's files (github.com/paintception/phd-thesis, MIT licence) have the columns DQV, DQV-Max, DQN and DDQN over
episodes; without such a file, ours are drawn alone.
"""

import csv
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
from transfer_matrix import read_run  # noqa: E402

COLOURS = {"DDQN": "C0", "DQN": "C1", "DQV": "C2", "DQV-Max": "C3"}  # as transfer_matrix.py has them
TAG = "charts/episodic_return"

out, author, *folders = sys.argv[1:]
returns = defaultdict(list)
for folder in folders:
    run = read_run(folder, [TAG])
    returns[run.algorithm].append(run.curves[TAG][:, 1])
figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
for algorithm, runs in returns.items():
    episodes = min(map(len, runs))
    smooth = np.convolve(np.mean([run[:episodes] for run in runs], axis=0), np.ones(20) / 20, "valid")
    axes.plot(np.arange(len(smooth)) + 20, smooth, color=COLOURS[algorithm], label=f"{algorithm}, n = {len(runs)}")
if os.path.isfile(author):
    with open(author, newline="") as file:
        names, *rows = csv.reader(file, delimiter="\t")
    for i, name in enumerate(names[1:], 1):
        points = [(float(row[0]), float(row[i])) for row in rows if len(row) > i and row[i]]
        axes.plot(*zip(*points), color=COLOURS[name], linestyle=":", label=f"{name}, the author's")
axes.set(xlabel="episodes", ylabel="training return, mean of 20 episodes")
axes.legend(fontsize=8)
figure.savefig(out, dpi=100)
