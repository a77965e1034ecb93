# Collects runs of finetune_classify.py or finetune_detect.py into a CSV, prints the table of their tests and draws the
# validation curves: how the pictures in classify/ and detect/ were made.
#   python results/supervised_study.py results/classify/study top1,macro_f1 runs/*          (needs matplotlib)
#   python results/supervised_study.py results/detect/study "AP@0.5,AP@0.1,AP" runs/*
# The folders' names are {data}__{arm}__{seed}__{time}; the first metric is drawn.
import csv
import os
import sys
from collections import defaultdict

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

out, metrics, *folders = sys.argv[1:]
metrics = metrics.split(",")
curves, tests = defaultdict(dict), defaultdict(lambda: defaultdict(list))  # by data and arm
os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
with open(out + ".csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["data", "arm", "seed", "tag", "epoch", "value"])
    for folder in sorted(folders):
        data, arm, seed, _ = os.path.basename(os.path.normpath(folder)).split("__")
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
        tags = ["train/loss", *(f"{split}/{name}" for split in ("val", "test") for name in ("loss", *metrics))]
        for tag in [tag for tag in tags if tag in events.Tags()["scalars"]]:
            rows = [(event.step, event.value) for event in events.Scalars(tag)]
            writer.writerows([data, arm, seed, tag, step, f"{value:.4f}"] for step, value in rows)
            if tag == f"val/{metrics[0]}":
                curves[data].setdefault(arm, []).append([value for _, value in rows])
            if tag.startswith("test/") and tag[len("test/") :] in metrics:
                tests[data, arm][tag[len("test/") :]].append(rows[-1][1])

print(
    f"| data | arm | {' | '.join(f'test {name}' for name in metrics)} | seeds |\n|---|---|{'---|' * len(metrics)}---|"
)
for (data, arm), found in tests.items():
    cells = [f"{np.mean(found[name]):.3f} ({', '.join(f'{value:.3f}' for value in found[name])})" for name in metrics]
    print(f"| {data} | {arm} | {' | '.join(cells)} | {len(found[metrics[0]])} |")

figure, panels = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False, layout="constrained")
colours = {arm: f"C{k}" for k, arm in enumerate(sorted({arm for arms in curves.values() for arm in arms}))}
for panel, (data, arms) in zip(panels[0], curves.items()):
    for arm, runs in arms.items():
        for i, run in enumerate(runs):
            panel.plot(
                range(1, len(run) + 1), run, colours[arm], alpha=0.8, linewidth=1.2, label=arm if i == 0 else None
            )
    panel.set(title=data, xlabel="epoch", ylabel=f"validation {metrics[0]}", ylim=(0, 1.02))
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
figure.savefig(out + ".png", dpi=110)
