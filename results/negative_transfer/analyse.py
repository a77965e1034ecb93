"""Tables and pictures of the study of negative transfer, from its curves.csv; `collect` makes that of the runs.

python results/negative_transfer/analyse.py collect runs/negative
python results/negative_transfer/analyse.py > results/negative_transfer/table.md
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from transfer_matrix import read_runs, relative_change  # noqa: E402

COLUMNS = ["episodic_return", "discounted_return", "max_q", "dead_units", "feature_norm", "feature_rank"]
KEYS = ["arm", "mode", "source", "target", "seed"]
# {arm: (title, arm of the runs from scratch on the same terms, arm of the sources)}
ARMS = {
    "correct": ("terminals stored", "correct", "correct"),
    "no_terminal": ("none in source and target", "no_terminal", "no_terminal"),
    "source_only": ("none in the source", "correct", "no_terminal"),
    "target_only": ("none in the target", "no_terminal", "correct"),
    "slow_target": ("none in both, target network copied a tenth as often", "slow_target", "slow_target"),
    "frozen_target": ("none in both, target network never copied", "frozen_target", "frozen_target"),
    "rmsprop": ("none in both, RMSprop", "rmsprop", "rmsprop"),
    "each_step": ("none in both, an update a step", "each_step", "each_step"),
    "explore": ("none in both, epsilon falls over half of the steps", "explore", "explore"),
    "long_source": ("none in both, sources trained thrice as long", "no_terminal", "long_source"),
}


def collect(logdir: str) -> None:
    """Add the complete runs below `logdir` to curves.csv, in the place of those of the same arm, games and seed."""
    with open(HERE / "curves.csv", newline="") as file:
        header, *known = csv.reader(file)
    rows = defaultdict(list)
    for row in known:
        rows[tuple(row[:5])].append(row)
    for arm in ARMS:
        for run in read_runs(f"{logdir}/{arm}", [f"eval/{name}" for name in COLUMNS]):
            if run.lacks("eval/episodic_return"):
                continue
            key = arm, run.mode, run.source, run.target, str(run.seed)
            values = np.hstack([curve[:, 1:] for curve in run.curves.values()])
            steps = run.curves["eval/episodic_return"][:, 0].astype(int)
            rows[key] = [[*key, step, *(f"{value:.5g}" for value in row)] for step, row in zip(steps, values)]
    with open(HERE / "curves.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *sum(rows.values(), [])])


def read_curves() -> dict[tuple, np.ndarray]:
    """{(arm, mode, source, target, seed): float64 `(points, 7)`}, the columns are the step and COLUMNS."""
    curves = defaultdict(list)
    with open(HERE / "curves.csv", newline="") as file:
        for row in list(csv.reader(file))[1:]:
            curves[tuple(row[:5])].append([float(value) for value in row[5:]])
    return {key: np.array(rows) for key, rows in curves.items()}


def area(curve: np.ndarray) -> float:
    """Mean return over the whole curve, by trapezia."""
    steps, returns = curve[:, 0], curve[:, 1]
    return ((returns[1:] + returns[:-1]) / 2 * np.diff(steps)).sum() / (steps[-1] - steps[0])


def late(curve: np.ndarray, column: str = "episodic_return") -> float:
    """Mean over the last third of the curve."""
    return curve[-len(curve) // 3 :, 1 + COLUMNS.index(column)].mean()


def interval(values: np.ndarray) -> str:
    """Mean [95 % interval of Student's t], * where it excludes 0."""
    mean, low, high = (1 + end for end in relative_change(values, np.ones(len(values))))
    star = "*" if low > 0 or high < 0 else ""
    return f"{mean:+.3f}{star}" + ("" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; equal values share their mean rank."""
    ranks = [(values[:, None] > values).mean(axis=1) + (values[:, None] >= values).mean(axis=1) for values in (x, y)]
    return np.corrcoef(*ranks)[0, 1]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(line)} |")
    print()


def analyse() -> None:
    curves = read_curves()
    ends, cells, points, gains = [], [], [], defaultdict(list)
    pattern = defaultdict(lambda: defaultdict(list))  # {(arm, kind): {seed: [(R, late difference)]}}
    for arm, (title, scratch_arm, source_arm) in ARMS.items():
        scratch = defaultdict(list)
        for (its_arm, mode, _, target, seed), curve in curves.items():
            if its_arm == arm and mode == "scratch" and target != "Catch-v1":
                scratch[seed].append([late(curve, name) for name in COLUMNS])
        if scratch:
            means = np.mean([np.mean(rows, axis=0) for rows in scratch.values()], axis=0)
            ends.append([title, str(len(scratch)), *(f"{mean:.3g}" for mean in means)])
        groups = defaultdict(dict)
        for (its_arm, mode, source, target, seed), curve in curves.items():
            if its_arm == arm and mode != "scratch":
                groups[mode, source, target][seed] = curve
        for (mode, source, target), transfer in sorted(groups.items()):
            pairs = []
            for seed, curve in transfer.items():
                old = curves.get((scratch_arm, "scratch", "", target, seed))
                origin = curves.get((source_arm, "scratch", "", source, seed))
                if old is None or origin is None:
                    continue
                pairs.append((area(curve), area(old), late(curve) - late(old)))
                kind = "between games" if source != target else f"to itself, {mode}"
                kind += " (with Catch-v1)" * ("Catch-v1" in (source, target))  # that not all seeds have
                pattern[arm, kind][seed].append((pairs[-1][0] / pairs[-1][1] - 1, pairs[-1][2]))
                points.append((arm, late(origin, "dead_units"), late(origin, "feature_rank"), pairs[-1][2]))
                more = [late(curve, name) - late(old, name) for name in COLUMNS[2:]]
                gains[arm, kind].append([pattern[arm, kind][seed][-1][0], *points[-1][1:3], *more])
            if pairs:
                new, old, difference = np.array(pairs).T
                ratio, low, high = relative_change(new, old)
                text = f"{ratio:+.3f}{'*' * int(low > 0 or high < 0)}"
                text += "" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
                cells.append([title, source, target, mode, str(len(pairs)), text, interval(difference)])
    print("From scratch, mean over the last third of training:\n")
    print_table(["terminals", "seeds", *(name.replace("_", " ") for name in COLUMNS)], ends)
    print("Means over the cells of a kind, then over the seeds:\n")
    rows = []
    for (arm, kind), seeds in pattern.items():
        ratios, differences = np.array([np.mean(values, axis=0) for values in seeds.values()]).T
        negative = np.array([value for values in seeds.values() for value, _ in values])
        share = f"{(negative < 0).sum()} of {len(negative)}, {(ratios < 0).sum()} of {len(ratios)}"
        rows.append([ARMS[arm][0], kind, str(len(seeds)), share, interval(ratios), interval(differences)])
    print_table(["terminals", "transfer", "seeds", "R < 0: runs, seeds", "R", "late difference"], rows)
    for reference in ("correct", "no_terminal"):
        print(f"The same, minus that of the same seed with {ARMS[reference][0]}:\n")
        rows = []
        for (arm, kind), seeds in pattern.items():
            both = sorted(set(seeds) & set(pattern.get((reference, kind), ())))
            if both and arm not in ("correct", reference):
                mine, theirs = (np.array([np.mean(pattern[key, kind][seed], axis=0) for seed in both])
                                for key in (arm, reference))  # fmt: skip
                differences = (interval(column) for column in (mine - theirs).T)
                rows.append([ARMS[arm][0], kind, str(len(both)), *differences])
        print_table(["terminals", "transfer", "seeds", "R", "late difference"], rows)
    print(
        "Rank correlation of R with the source's dead units and feature rank, and with what the network has in the end"
    )
    print("more than that from scratch, within a kind of transfer (between kinds all of them differ):\n")
    rows = [(arm, kind, np.array(rows).T) for (arm, kind), rows in gains.items() if len(rows) > 9]
    rows = [
        [ARMS[arm][0], kind, str(len(ratios)), *(f"{rank_correlation(ratios, other):+.2f}" for other in others)]
        for arm, kind, (ratios, *others) in rows
    ]
    names = ["source's dead units", "source's feature rank", *(name.replace("_", " ") for name in COLUMNS[2:])]
    print_table(["terminals", "transfer", "runs", *names], rows)
    print("Each cell:\n")
    print_table(["terminals", "from", "to", "mode", "seeds", "R", "late difference"], cells)

    figure = Figure((9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, column, label in zip(panels, (1, 2), ("dead units of the source", "feature rank of the source")):
        x, y = (np.array([point[i] for point in points]) for i in (column, 3))
        for arm, (title, *_) in ARMS.items():
            chosen = np.array([point[0] == arm for point in points])
            if chosen.any():
                panel.scatter(x[chosen], y[chosen], s=14, alpha=0.7, label=title)
        panel.set(xlabel=label)
        panel.axhline(0, color="black", linewidth=0.5)
    panels[0].set_ylabel("late return, transfer minus scratch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(HERE / "sources.png", dpi=100)


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"] and len(sys.argv) == 3:
        collect(sys.argv[2])
    elif len(sys.argv) == 1:
        analyse()
    else:
        sys.exit(__doc__)
