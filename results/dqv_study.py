# Collects runs of the four algorithms into a CSV and draws learning curves and overestimation side by side: how the
# pictures in this folder were made.
#   python results/dqv_study.py results/dqv_catch_v0 runs/catch_env-Catch-v0__*                (needs matplotlib)
#   python results/dqv_study.py results/dqv_pong runs/ALE-Pong-v5__* --authors PATH/pong_results.txt
# The folders' names tell algorithm and seed. `--authors` draws their training returns (columns DQV, DQV-Max, DQN, DDQN
# over episodes, github.com/paintception) into a panel of our training returns over episodes.
import csv
import os
import sys
from collections import defaultdict

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ALGORITHMS = {"dqn_atari": "DQN", "ddqn_atari": "DDQN", "dqv_atari": "DQV", "dqv_max_atari": "DQV-Max"}
COLOURS = {"DQN": "tab:grey", "DDQN": "tab:blue", "DQV": "tab:orange", "DQV-Max": "tab:green"}
TAGS = ["episodic_return", "max_q", "discounted_return", "v_minus_max_q"]

arguments = sys.argv[1:]
authors = arguments.pop(arguments.index("--authors") + 1) if "--authors" in arguments else None
out, *folders = [argument for argument in arguments if argument != "--authors"]
curves, episodes = defaultdict(list), defaultdict(list)  # {algorithm: [(steps, {tag: values})]}, {algorithm: [returns]}
with open(out + ".csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["algorithm", "seed", "step", *TAGS])
    for folder in sorted(folders):
        _, name, seed, _ = os.path.basename(os.path.normpath(folder)).split("__")
        algorithm = ALGORITHMS[name]
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
        present = [tag for tag in TAGS if f"eval/{tag}" in events.Tags()["scalars"]]
        # an evaluation is a few steps late where 8 games share the count
        steps = [round(event.step, -3) for event in events.Scalars("eval/max_q")]
        values = {tag: np.array([event.value for event in events.Scalars(f"eval/{tag}")]) for tag in present}
        for i, step in enumerate(steps):
            row = (f"{values[tag][i]:.4f}" if tag in values else "" for tag in TAGS)
            writer.writerow([algorithm, seed, step, *row])
        curves[algorithm].append((steps, values))
        finished = "charts/episodic_return" in events.Tags()["scalars"]
        episodes[algorithm].append([e.value for e in events.Scalars("charts/episodic_return")] if finished else [])

figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)


def draw(axes, algorithm, steps, values):
    """Mean and range of the seeds: `values` is `(seeds, evaluations)`."""
    colour = COLOURS[algorithm]
    axes.plot(steps, values.mean(0), color=colour, marker="o", markersize=3, label=f"{algorithm}, n = {len(values)}")
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


for algorithm in [algorithm for algorithm in COLOURS if algorithm in curves]:
    steps = curves[algorithm][0][0]
    column = {tag: np.stack([run[1][tag] for run in curves[algorithm]]) for tag in curves[algorithm][0][1]}
    if authors:
        shortest = min(map(len, episodes[algorithm]))
        returns = np.mean([run[:shortest] for run in episodes[algorithm]], axis=0)
        smooth = np.convolve(returns, np.ones(20) / 20, "valid") if shortest >= 20 else np.array([])
        panels[0].plot(np.arange(len(smooth)) + 19, smooth, color=COLOURS[algorithm], label=algorithm)
    else:
        draw(panels[0], algorithm, steps, column["episodic_return"])
    draw(panels[1], algorithm, steps, column["max_q"] - column["discounted_return"])
    if "v_minus_max_q" in column:
        draw(panels[2], algorithm, steps, column["v_minus_max_q"])
print("algorithm, mean return per evaluation; from 0.6 of the steps on: estimate - return [range of seeds], V - max Q")
for algorithm, runs in curves.items():
    column = {tag: np.stack([values[tag] for _, values in runs]) for tag in runs[0][1]}
    late = np.array(runs[0][0]) >= 0.6 * runs[0][0][-1]
    over = (column["max_q"] - column["discounted_return"])[:, late].mean(axis=1)
    v = f", {column['v_minus_max_q'][:, late].mean():+.3f}" if "v_minus_max_q" in column else ""
    returns = " ".join(f"{value:.3f}" for value in column["episodic_return"].mean(axis=0))
    print(f"{algorithm}: {returns}; {over.mean():+.3f} [{over.min():+.3f}, {over.max():+.3f}]{v}")
if authors:
    with open(authors) as file:
        names, *rows = [line.rstrip("\n").split("\t") for line in file]
    for i, name in enumerate(names[1:], 1):
        points = [(float(row[0]), float(row[i])) for row in rows if len(row) > i and row[i]]
        panels[0].plot(*zip(*points), color=COLOURS[name], linestyle=":", label=f"{name}, authors")
    panels[0].set(xlabel="episodes", ylabel="charts/episodic_return, mean of 20")
else:
    panels[0].set(xlabel="agent steps", ylabel="eval/episodic_return")
if "catch_v0" in out:
    for level, name in ((0.247, "random play"), (0.973, "ceiling of the game")):
        panels[0].axhline(level, linestyle="--", linewidth=0.8, color="grey")
        panels[0].annotate(name, (panels[0].get_xlim()[1], level), fontsize=7, ha="right", va="bottom", color="grey")
panels[1].set(xlabel="agent steps", ylabel="eval/max_q - eval/discounted_return", title="above 0: overestimation")
panels[2].set(xlabel="agent steps", ylabel="eval/v_minus_max_q", title="above 0: V exceeds max Q")
for axes in panels[1:]:
    axes.axhline(0, color="black", linewidth=0.6)
panels[0].legend(fontsize=7, loc="center right" if "catch_v0" in out else "best")
panels[2].legend(fontsize=7)
figure.savefig(out + ".png", dpi=100)
