"""Tables and pictures of the study of negative transfer, from its curves.csv; `collect` makes that of the runs.

python results/negative_transfer/analyse.py collect runs/negative
python results/negative_transfer/analyse.py > results/negative_transfer/table.md
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from transfer_matrix import read_runs, relative_change, shown  # noqa: E402

COLUMNS = ["episodic_return", "discounted_return", "max_q", "dead_units", "feature_norm", "feature_rank"]
# {arm: (title, arm of the runs from scratch on the same terms, arm of the sources)}
ARMS = {
    "correct": ("terminals stored", "correct", "correct"),
    "no_terminal": ("none in source and target", "no_terminal", "no_terminal"),
    "source_only": ("none in the source", "correct", "no_terminal"),
    "target_only": ("none in the target", "no_terminal", "correct"),
    "long_correct": ("terminals stored, 72,000 steps", "long_correct", "long_correct"),
    "long_no_terminal": ("none in both, 72,000 steps", "long_no_terminal", "long_no_terminal"),
    "slow_correct": ("terminals stored, target network copied a tenth as often", "slow_correct", "slow_correct"),
    "slow_target": ("none in both, target network copied a tenth as often", "slow_target", "slow_target"),
    "frozen_target": ("none in both, target network never copied", "frozen_target", "frozen_target"),
    "rmsprop": ("none in both, RMSprop", "rmsprop", "rmsprop"),
    "each_step": ("none in both, an update a step", "each_step", "each_step"),
    "explore": ("none in both, epsilon falls over half of the steps", "explore", "explore"),
    "long_source": ("none in both, sources trained thrice as long", "no_terminal", "long_source"),
}
BESIDE = {"correct": list(ARMS)[1:4] + ["rmsprop", "each_step", "explore", "long_source"],
          "no_terminal": list(ARMS)[2:4] + ["slow_target", "rmsprop", "each_step", "explore", "long_source"],
          "long_correct": ["long_no_terminal"], "slow_correct": ["slow_target"]}  # fmt: skip


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


def interval(values: np.ndarray, scratch: np.ndarray | None = None) -> str:
    """Mean, or with `scratch` ratio of the means - 1 [95 % interval], * where it excludes 0."""
    change = relative_change(values, np.ones(len(values)) if scratch is None else scratch)
    return shown(dict(zip(("R", "R_low", "R_high"), np.add(change, scratch is None))), "R")


def kinds(mode: str, source: str, target: str) -> list[str]:
    """The kinds of transfer over whose cells means are taken."""
    with_v1 = "Catch-v1" in (source, target)
    if source == target:
        return [f"to itself, {mode}" + with_v1 * ", Catch-v1"]
    pair = "between {} and {}".format(*sorted(game.removeprefix("Catch-") for game in (source, target)))
    return [pair, "between all three"] + ["from or to Catch-v1"] * with_v1


def centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each column minus their mean, 0 where a value is missing; equal values share their mean rank."""
    ranks = ((values[:, None] > values).sum(axis=1) + (values[:, None] >= values).sum(axis=1)) / 2
    ranks = np.where(np.isnan(values), np.nan, ranks)
    return np.nan_to_num(ranks - np.nanmean(ranks, axis=0))


def correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Spearman's within cells, of `(seeds, cells)`; * where less than 5 % of permutations of whole seeds give as much.

    Seeds change places with those that have the same cells only.
    """
    groups = np.unique(np.isnan(x), axis=0, return_inverse=True)[1].ravel()
    a, b = (centred_ranks(values)[np.argsort(groups, kind="stable")] for values in (x, y))
    groups, rng = np.sort(groups), np.random.default_rng(0)
    orders = [np.lexsort((rng.random(len(a)), groups)) for _ in range(4000)]
    by_chance = np.array([(a[order] * b).sum() for order in orders])
    share = (1 + (abs(by_chance) >= abs((a * b).sum()) - 1e-9).sum()) / (1 + len(orders))
    return f"{(a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()):+.2f}{'*' * int(share < 0.05)}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(line)} |")
    print()


def print_ends(curves: dict[tuple, np.ndarray]) -> None:
    print("From scratch on Catch-v0 and v3: the step at which 0.9 is first reached, means over the last third:\n")
    rows = []
    for arm, (title, *_) in ARMS.items():
        scratch, reached = defaultdict(list), []
        for (its_arm, mode, _, target, seed), curve in curves.items():
            if its_arm == arm and mode == "scratch" and target != "Catch-v1":
                scratch[seed].append([late(curve, name) for name in COLUMNS])
                reached.append(min(curve[curve[:, 1] >= 0.9, 0], default=np.inf))
        if scratch:
            means = np.mean([np.mean(values, axis=0) for values in scratch.values()], axis=0)
            steps = [
                f"{step:,.0f}".replace("inf", "never") for step in (np.median(reached), min(reached), max(reached))
            ]
            steps = f"{steps[0]} [{steps[1]}, {steps[2]}]"
            rows.append([title, str(len(scratch)), steps, *(f"{mean:.3g}" for mean in means)])
    names = [name.replace("_", " ") for name in COLUMNS]
    print_table(["terminals", "seeds", "0.9: median [range] of the runs", *names], rows)


def analyse() -> None:
    curves = read_curves()
    print_ends(curves)
    # {(arm, kind): {seed: {cell: (R, late difference, dead units and rank of the source, own ones minus scratch's)}}}
    found, cells, points = defaultdict(lambda: defaultdict(dict)), [], []
    for arm, (title, scratch_arm, source_arm) in ARMS.items():
        groups = defaultdict(dict)
        for (its_arm, mode, source, target, seed), curve in curves.items():
            scratch = curves.get((scratch_arm, "scratch", "", target, seed))
            origin = curves.get((source_arm, "scratch", "", source, seed))
            if its_arm == arm and mode != "scratch" and scratch is not None and origin is not None:
                groups[mode, source, target][seed] = curve, scratch, origin
        for cell, transfer in sorted(groups.items()):
            pairs = []
            for seed, (curve, scratch, origin) in transfer.items():
                pairs.append((area(curve), area(scratch), late(curve) - late(scratch)))
                sources = [late(origin, name) for name in ("dead_units", "feature_rank")]
                own = [late(curve, name) - late(scratch, name) for name in ("dead_units", "feature_rank")]
                points.append((arm, *sources, pairs[-1][2]))
                for kind in kinds(*cell):
                    found[arm, kind][seed][cell] = pairs[-1][0] / pairs[-1][1] - 1, pairs[-1][2], *sources, *own
            new, old, difference = np.array(pairs).T
            mode, source, target = cell
            cells.append([title, source, target, mode, str(len(pairs)), interval(new, old), interval(difference)])
    # `(seeds, cells, values)`, NaN where a run is missing
    tables = {}
    for key, seeds in found.items():
        names = sorted(set().union(*seeds.values()))
        if key[1] != "between all three" or len(names) == 6:
            missing = [np.nan] * 6
            tables[key] = list(seeds), np.array([[seeds[s].get(name, missing) for name in names] for s in seeds])
    means = {}  # {(arm, kind): {seed: (R, late difference, own dead units and rank minus scratch's)}}, of whole seeds
    for key, (seeds, values) in tables.items():
        whole = ~np.isnan(values).any(axis=(1, 2))
        means[key] = {seed: values[i][:, [0, 1, 4, 5]].mean(axis=0) for i, seed in enumerate(seeds) if whole[i]}

    print("Means over the cells of a kind, then over the seeds that have all of them:\n")
    rows = []
    for (arm, kind), seeds in means.items():
        if seeds:
            ratios, *differences = np.array(list(seeds.values())).T
            runs = np.array([row[:, 0] for seed, row in zip(*tables[arm, kind]) if seed in seeds])
            share = f"{(runs < 0).sum()} of {runs.size}, {(ratios < 0).sum()} of {len(ratios)}"
            rows.append([ARMS[arm][0], kind, str(len(seeds)), share, *map(interval, (ratios, *differences))])
    names = ["R", "late difference", "dead units", "feature rank"]
    print_table(["terminals", "transfer", "seeds", "R < 0: runs, seeds", *names], rows)
    for arm in ARMS:
        between, own = (means.get((arm, kind), {}) for kind in ("between v0 and v3", "to itself, fine-tuning"))
        means[arm, "between v0 and v3, less to itself"] = {s: between[s] - own[s] for s in between if s in own}
    for reference, arms in BESIDE.items():
        rows = []
        for (arm, kind), seeds in means.items():
            both = sorted(set(seeds) & set(means.get((reference, kind), ())))
            if both and arm in arms:
                change = np.array([seeds[seed] - means[reference, kind][seed] for seed in both]).T[:2]
                rows.append([ARMS[arm][0], kind, str(len(both)), *map(interval, change)])
        if rows:
            print(f"The same, minus that of the same seed with {ARMS[reference][0]}:\n")
            print_table(["terminals", "transfer", "seeds", "R", "late difference"], rows)

    print("Rank correlations of R / of the late difference within cells, * where permutations of the seeds exclude 0")
    print("(5 %). Own: at the end, minus scratch's. These, and the source's to itself, share the run from scratch with")
    print("R, so that chance alone gives them more *:\n")
    rows = []
    for title, arms in [(title, [arm]) for arm, (title, *_) in ARMS.items()] + [("all", list(ARMS))]:
        for kind in ("between games", "to itself"):
            parts = [(seeds, values) for (arm, its_kind), (seeds, values) in tables.items()
                     if arm in arms and its_kind not in ("between all three", "from or to Catch-v1")
                     and its_kind.startswith("to itself") == (kind == "to itself")]  # fmt: skip
            names = sorted(set().union(*(seeds for seeds, _ in parts)))
            if len(names) < 5:
                continue
            joined = [np.full((len(names), values.shape[1], 6), np.nan) for _, values in parts]
            for part, (seeds, values) in zip(joined, parts):
                part[[names.index(seed) for seed in seeds]] = values
            joined = np.concatenate(joined, axis=1)
            runs = (~np.isnan(joined[..., 0])).sum()
            pairs = [[correlation(joined[..., i], joined[..., k]) for k in (0, 1)] for i in range(2, 6)]
            rows.append([title, kind, str(runs), *(" / ".join(pair) for pair in pairs)])
    names = ["source's dead units", "source's feature rank", "own dead units", "own feature rank"]
    print_table(["terminals", "transfer", "runs", *names], rows)
    between = [row for row in rows if row[0] != "all" and row[1] == "between games"]
    texts = [text for row in between for text in " / ".join(row[3:5]).split(" / ")]
    stars = sum("*" in text for text in texts)
    print(f"Of the {len(texts)} with sources between games {stars} have a *; chance gives {len(texts) / 20:.1f}.\n")
    print("Each cell:\n")
    print_table(["terminals", "from", "to", "mode", "seeds", "R", "late difference"], cells)

    figure = Figure((9, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, column, label in zip(panels, (1, 2), ("dead units of the source", "feature rank of the source")):
        x, y = (np.array([point[i] for point in points]) for i in (column, 3))
        for i, (arm, (title, *_)) in enumerate(ARMS.items()):
            chosen = np.array([point[0] == arm for point in points])
            if chosen.any():
                panel.scatter(x[chosen], y[chosen], s=14, color=colormaps["tab20"](i), label=title)
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
