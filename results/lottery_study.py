# Collects runs of lottery_ticket.py into a CSV and draws their curves above the author's own (tests/data, MIT licence):
# how the files in lottery/ were made.
#   python results/lottery_study.py results/lottery/study runs          (needs matplotlib)
import csv
import json
import os
import sys
from collections import defaultdict

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

out, logdir = sys.argv[1:]
found, rows = defaultdict(lambda: defaultdict(list)), []
for name in sorted(os.listdir(logdir)):
    with open(os.path.join(logdir, name, "hyperparameters.json")) as file:
        settings = json.load(file)
    with open(os.path.join(logdir, name, "results.csv")) as file:
        table = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    target, arm = settings["target"], settings["arm"].replace("-global", "")
    curve = [(1 - row["sparsity"], row["test_accuracy"]) for row in table]
    found[target][arm].append(np.array(curve).T)
    rows += [{"target": target, "arm": arm, "seed": settings["seed"]} | row for row in table]
with open(out + ".csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{value:.4g}" if "loss" in k or "accuracy" in k else value for k, value in row.items()})

what = "test accuracy, mean of the rounds with at most a tenth of the weights, minus dense: of each seed"
print(f"| target | arm | {what} |")
print("|---|---|---|")
for target, arms in found.items():
    for arm, runs in arms.items() if "dense" in arms else ():
        sparse = [run[1][run[0] < 0.1].mean() if arm != "dense" else run[1][0] for run in runs]
        gains = [100 * (value - dense[1][0]) for value, dense in zip(sparse, arms["dense"])]
        print(f"| {target} | {arm} | {np.mean(gains):+.1f} ({', '.join(f'{gain:+.1f}' for gain in gains)}) |")


natural = ["clothes", "clothes-random-mask", "clothes-reinit", "clothes-trained"]
others = [["own"], ["own-reinit", "openclipart-reinit"], ["own-0.25", "cifar100"], ["own-0.5"], ["own-0.75", "cifar10"]]
colors = {arm: f"C{i}" for i, arms in enumerate(others + [[arm] for arm in natural]) for arm in arms}


def draw(panel, title, curves):
    for arm, runs in curves.items():
        left, accuracy = runs[0][0], 100 * np.mean([run[1] for run in runs], axis=0)
        if arm in ("dense", "baseline"):
            panel.axhline(accuracy[0], color="black", linestyle="--", linewidth=1, label=arm)
            continue
        color = colors.get(arm, "C9")
        panel.plot(100 * left, accuracy, marker=".", markersize=4, linewidth=1.2, label=arm, color=color)
        low, high = (100 * edge([run[1] for run in runs], axis=0) for edge in (np.min, np.max))
        panel.fill_between(100 * left, low, high, color=color, alpha=0.12, linewidth=0)
    panel.set(title=title, xscale="log")
    fewest = 100 * min(runs[0][0].min() for runs in curves.values())
    ticks = [tick for tick in (100, 30, 10, 3, 1, 0.3, 0.1) if tick > 0.8 * fewest]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.invert_xaxis()
    panel.legend(fontsize=6)


figure, panels = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
sizes = {arm: runs for arm, runs in found["openclipart"].items() if arm.startswith("own")}
arms = {arm: runs for arm, runs in found["openclipart"].items() if arm == "own" or not arm.startswith("own")}
draw(panels[0, 0], "clip art", arms)
draw(panels[0, 1], "clip art: share of the training images", sizes)
draw(panels[0, 2], "shoes and bags", found["shoes-and-bags"])
data = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "data")
author = [("type_classification", "Type"), ("artist_classification_1", "Artist-1"), ("human_lba", "Human-LBA")]
for panel, (name, title) in zip(panels[1], author):
    with open(os.path.join(data, f"{name}.txt")) as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    left = [0.8 ** float(row["pruning_stages"]) for row in table]
    columns = {"baseline": "dense", "winning_ticket": "own", "random_mask": "own-reinit"} | {
        name: name for name in ("cifar10", "cifar100")} | {"fahion_mnist": "fashion-mnist"}  # fmt: skip
    curves = {arm: [np.array([left, [float(row[name]) / 100 for row in table]])] for name, arm in columns.items()}
    draw(panel, f"{title}, the author's curves", curves)
for panel in panels[:, 0]:
    panel.set_ylabel("test accuracy, %")
for panel in panels[1]:
    panel.set_xlabel("weights left, %")
figure.savefig(out + ".png", dpi=90)
