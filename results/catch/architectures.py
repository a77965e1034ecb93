"""The table of DQV's architectures, from architectures.csv: python results/catch/architectures.py"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from transfer_matrix import DEGREES, T95  # noqa: E402

curves = defaultdict(lambda: defaultdict(list))  # {architecture: {seed: [(step, return)]}}
with open(HERE / "architectures.csv", newline="") as file:
    for row in csv.DictReader(file):
        curves[row["architecture"]][row["seed"]].append((float(row["step"]), float(row["episodic_return"])))

print("| | area | minus `separate` | last return | minus `separate` |\n|---|---|---|---|---|")
results = {}
for architecture in ("separate", "hard", "dueling-1st", "dueling-2nd", "dueling-3rd"):
    steps, returns = np.array([curve for _, curve in sorted(curves[architecture].items())]).transpose(2, 0, 1)
    areas = ((returns[:, 1:] + returns[:, :-1]) / 2 * np.diff(steps)).sum(axis=1) / (steps[:, -1] - steps[:, 0])
    cells = [f"`{architecture}`"]
    for name, values in (("area", areas), ("last", returns[:, -1])):
        results[architecture, name] = values
        difference = values - results["separate", name]
        mean, n = difference.mean(), len(values)
        half = np.interp(n - 1, DEGREES, T95) * difference.std(ddof=1) / n**0.5
        text = f"{mean:+.2f}{'*' * int(abs(mean) > half)} [{mean - half:+.2f}, {mean + half:+.2f}]"
        cells += [f"{values.mean():.3f}", text if architecture != "separate" else ""]
    print(f"| {' | '.join(cells)} |")
