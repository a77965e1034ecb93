# Collects one tag of several runs into a CSV and draws mean and range: how the pictures in this folder were made.
#   python results/curve.py eval/caught results/catch_v0 runs/catch_env-Catch-v0__*     (needs `pip install matplotlib`)
import csv
import sys

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

tag, out, *folders = sys.argv[1:]
curves = []
for folder in folders:
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    curves.append([(event.step, event.value) for event in events.Scalars(tag)])
steps = [round(step, -3) for step, _ in curves[0]]  # evaluations are a few steps late where 8 games share the count
values = np.array([[value for _, value in curve] for curve in curves])
with open(out + ".csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["step", *(f"seed_{i + 1}" for i in range(len(curves)))])
    writer.writerows([step, *(f"{value:.4f}" for value in column)] for step, column in zip(steps, values.T))
figure, axes = pyplot.subplots(figsize=(6, 3.2), constrained_layout=True)
axes.plot(steps, values.mean(0), marker="o", markersize=3)
axes.fill_between(steps, values.min(0), values.max(0), alpha=0.25)
if tag == "eval/caught":
    for level, name in ((0.247, "random play"), (0.973, "ceiling of the game")):
        axes.axhline(level, linestyle="--", linewidth=0.8, color="grey")
        axes.annotate(name, (steps[-1], level), fontsize=7, ha="right", va="bottom", color="grey")
axes.set(xlabel="agent steps", ylabel=tag, ylim=(0, 1.05 if tag == "eval/caught" else None))
figure.savefig(out + ".png", dpi=110)
