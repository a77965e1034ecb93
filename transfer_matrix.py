# Area ratios, forward transfer, tables of scores and curves from the event files of ddqn_atari.py, dqv_atari.py and
# dqv_max_atari.py, as in "On the Transferability of Deep-Q Networks" (Sabatelli and Geurts, 2021, arXiv 2110.02639)
# and "Contributions to Deep Transfer Learning" (M. Sabatelli, 2022).
#
#   python transfer_matrix.py plan --env-ids catch_env:Catch-v0 catch_env:Catch-v3 --stage source     what is to be run
#   python transfer_matrix.py table --logdir runs                                                     the matrices
#   python transfer_matrix.py scores --logdir runs                                                    the table of games
#   python transfer_matrix.py plot --logdir runs --out results                                        the pictures
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.21", "matplotlib>=3.8"]
# ///
import csv
import re
import shlex
import signal
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["plan", "table", "scores", "plot"]]  # jobs to run; transfer; games; pictures
    logdir: str = "runs"  # folder of the runs; it is searched at any depth, links are not followed
    metric: str = "eval/episodic_return"  # TensorBoard tag of the learning curve
    format: Literal["markdown", "csv"] = "markdown"  # table, scores: for people, or for programs
    out: str = "results"  # plot: folder for the pictures and curves.csv

    # plan: prints the commands, one a line; what is complete in --logdir is left out
    env_ids: tuple[str, ...] = ()  # the games, as the script's --env-id
    stage: Literal["source", "transfer", "only-head", "self-transfer", "hybrid"] = "source"  # after source; hybrid last
    targets: tuple[str, ...] = ()  # the games among these to train on (none given: all)
    script: str = "ddqn_atari.py"  # the script to run
    seeds: tuple[int, ...] = (1, 2, 3)  # a transfer run starts from the source of its own seed
    args: str = ""  # further flags of the script in one string: --args="--no-double --learning-rate 1e-3"
    source_args: str = ""  # flags of the sources, where not those of --args; others may differ, but not the algorithm


# Published results ---------------------------------------------------------------------------------------------------
# Slides and thesis; rows are sources (fine-tuning, if nothing else is said), columns targets; Catch-v1 is their v4.
# The hybrid's figures are from the author's curves, of which those of Catch-v1 are mixed up with Catch-v3's.
MATRICES = {
    "DQV": """
        BankHeist Boxing CrazyClimber Enduro FishingDerby Frostbite Jamesbond MsPacman Pong Zaxxon
        BankHeist nan -0.019 -1 -0.317 0.5 0.729 0.973 -0.089 -1.238 -0.998
        Boxing -0.494 nan -0.278 -0.852 0.552 -0.01 0.247 -0.184 -0.841 -0.999
        CrazyClimber -0.569 -0.261 nan -0.593 0.19 0.277 0.621 -0.111 -1.206 -0.178
        Enduro -0.571 -0.018 -0.25 nan 0.726 -0.017 -0.41 -0.08 -0.466 -0.164
        FishingDerby -1 -0.893 -0.093 -0.45 nan 0.068 0.197 -0.136 -3.083 -0.999
        Frostbite -0.933 0.024 -1 -0.348 0.222 nan 0.569 0.009 -0.663 -0.076
        Jamesbond -0.123 -0.106 -0.131 -0.033 0.519 0.262 nan 0.218 -1.329 -1
        MsPacman -0.985 -0.219 -0.012 -0.494 0.6 0.346 0.398 nan -1.646 -0.997
        Pong -1 -0.083 -0.428 -0.476 0.725 -0.024 0.896 0.123 nan -0.729
        Zaxxon -0.76 -0.028 0.037 -0.116 0.385 0.16 -0.253 0.06 -1.602 nan""",
    "DDQN": """
        BankHeist Boxing CrazyClimber Enduro FishingDerby Gopher IceHockey Jamesbond MsPacman Pong
        BankHeist nan 0.121 -0.378 -0.006 -0.107 0.042 -0.006 -0.058 0.001 -3.013
        Boxing -0.316 nan -0.104 -0 0.038 0.06 0.015 -0.225 -0.027 0.936
        CrazyClimber -0.192 -0.487 nan -0.012 -0.084 0.016 0.015 0.016 -0.015 -2.64
        Enduro -0.296 0.193 -0.167 nan 0.039 0.03 0.019 -0.235 -0.039 0.248
        FishingDerby -0.212 -0.545 -1 -0.085 nan 0.016 0.001 -0.055 -0.026 -0.935
        Gopher -0.466 0.044 -0.108 -0.005 0.007 nan -0.005 -0.094 -0.02 -1.816
        IceHockey -0.046 0.245 -0.067 0.014 -0.178 0.072 nan 0.037 -0.015 0.112
        Jamesbond -0.145 0.232 -0.064 0.005 -0.267 0.031 -0.092 nan -0.006 -1.578
        MsPacman -0.173 -1.179 -0.129 -0.06 0.003 -0.019 0.007 0.071 nan -2.774
        Pong -0.127 0.028 -0.12 0.01 0.037 0.042 0.002 -0.174 -0.006 nan""",
    "DQN": """
        Catch-v0 Catch-v2 Catch-v3 Catch-v1
        Catch-v0 nan -0.026 -0.486 -0.479
        Catch-v2 -0.16 nan -0.121 -0.248
        Catch-v3 -0.406 -0.313 nan -0.465
        Catch-v1 -0.016 -0.24 -0.179 nan
        itself 0.017 0.393 -0.236 -0.218
        itself, only-head 0.05 0.674 0.059 0.141
        itself, hybrid 0.041 0.241 -0.123 nan""",
}
PUBLISHED = {}  # {(algorithm, row, target): area ratio}
for _algorithm, _text in MATRICES.items():
    _header, *_lines = _text.strip().splitlines()
    _targets = _header.split()
    for _line in _lines:
        _source, *_ratios = _line.rsplit(maxsplit=len(_targets))
        PUBLISHED |= {(_algorithm, _source.strip(), _to): float(_ratio) for _to, _ratio in zip(_targets, _ratios)}

# Random, human (the scores of Mnih et al., Nature 2015), DQN, DDQN, DQV, DQV-Max: slides and thesis
COLUMNS = ["random", "human", "DQN", "DDQN", "DQV", "DQV-Max"]
SCORES = {
    "Asteroids": (719.1, 13156.7, 1629.33, 930.6, 1445.4, 1846.08),
    "BankHeist": (14.2, 734.4, 429.67, 728.3, 1236.5, 1118.28),
    "Boxing": (0.1, 4.3, 71.83, 81.7, 78.66, 80.15),
    "CrazyClimber": (10780.5, 35410.5, 114103.33, 101874.0, 108600.0, 1000131.0),
    "Enduro": (0.0, 309.6, 301.77, 319.5, 829.33, 875.64),
    "FishingDerby": (-91.7, 5.5, -0.8, 20.3, 1.12, 20.42),
    "Frostbite": (65.2, 4334.7, 328.33, 241.5, 271.86, 281.36),
    "Gopher": (257.6, 2321.0, 8520.0, 8215.4, 8230.3, 7940.0),
    "IceHockey": (-11.2, 0.9, -1.6, -2.4, -1.88, -1.12),
    "Jamesbond": (29.0, 406.7, 576.67, 438.0, 372.41, 440.8),
    "MontezumaRevenge": (0.0, 4366.7, 0.0, 0.0, 0.0, 0.0),
    "MsPacman": (307.3, 15693.4, 2311.0, 3210.0, 3590.0, 3390.0),
    "Pong": (-20.7, 9.3, 18.9, 21.0, 21.0, 21.0),
    "RoadRunner": (11.5, 7845.0, 18256.67, 48377.0, 39290.0, 20700.0),
    "Zaxxon": (32.5, 9173.3, 4976.67, 10182.0, 10950.0, 8487.0),
}
# What can be reached at best: Catch's ceilings by enumeration of all starts, else human play
REFERENCE = {"Catch-v0": 0.973, "Catch-v1": 0.898, "Catch-v2": 0.973, "Catch-v3": 0.973, "Catch-v4": 0.880}
REFERENCE |= {name: human for name, (_, human, *_) in SCORES.items()}


# Reading runs --------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    checkpoint: Path  # the file that it writes into its folder
    flags: dict[str, str]  # the hyper-parameters that it logged
    curves: dict[str, np.ndarray]  # {tag: float64 (points, 2) with agent steps, ascending, and values}
    algorithm: str
    mode: str  # scratch, fine-tuning, only-head or hybrid
    source: str  # the game of --pretrained, "" from scratch
    target: str
    seed: int
    total: int  # its --total-timesteps
    last: int  # the step of its last event

    def paired(self) -> bool:
        return self.flags.get("pretrained_seed", str(self.seed)) == str(self.seed)

    def lacks(self, metric: str) -> str:
        """Why its curve of `metric` is not complete, "" if it is."""
        if not len(self.curves[metric]):
            return f"no {metric} in it"
        steps, values = self.curves[metric].T
        last = self.last if metric.startswith("charts/episodic") else steps[-1]  # the last game goes on
        if last < self.total:
            return f"incomplete, {last:,.0f} of {self.total:,} steps"
        return "" if len(steps) > 1 and np.isfinite(values).all() else f"{metric} has one point, or is not finite"


# Flags of runs, and of the sources that they began from, that do not change what is learned, or stand in a run's fields
LABELS = "algorithm architecture double dueling keep_head head_fraction freeze_features".split()  # a source's matter
FREE = """env_id exp_name seed pretrained pretrained_env_id pretrained_head cuda cudagraphs logdir resume evaluate track
    capture_video eval_frequency checkpoint_frequency""".split()
FREE = {*LABELS, *FREE, *(f"pretrained_{name}" for name in FREE)}


def game(env_id: str) -> str:
    """`Pong` of ALE/Pong-v5, `Catch-v0` of catch_env:Catch-v0."""
    return re.sub("^ALE/(.+)-v5$", r"\1", env_id).split(":")[-1]


def read_run(folder: str, tags: list[str]) -> Run:
    """The run in `folder` with its curves of `tags`, or an error that says why there is none."""
    flags, points, begin, last = {}, {tag: [] for tag in tags}, np.inf, 0
    for path in sorted(Path(folder).glob("*tfevents*")):
        buffer = path.read_bytes()
        start = 12  # a record: length of the event (8 bytes), checksum (4), event, checksum (4); the last may be cut
        while start <= len(buffer) and (end := start + struct.unpack_from("<Q", buffer, start - 12)[0]) < len(buffer):
            event = Event.FromString(buffer[start:end])
            last = max(last, event.step)
            if event.session_log.status == SessionLog.START:  # resumed: what is written again goes
                points = {tag: [point for point in points[tag] if point[0] < event.step] for tag in tags}
                last = event.step - 1
            for value in event.summary.value:
                if value.tag in points:
                    points[value.tag].append((event.step, value.simple_value))
                elif value.tag == "hyperparameters/text_summary":
                    rows = value.tensor.string_val[0].decode().splitlines()[2:]
                    flags |= dict(row[1:-1].split("|", 1) for row in rows)
                    begin = min(begin, event.step)
            start = end + 16
    if not {"algorithm", "env_id", "seed", "exp_name"} <= set(flags):
        raise ValueError("it has logged no hyper-parameters with algorithm, env_id, seed and exp_name")
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "".join([str(folder), *flags.values()])):
        raise ValueError("control characters in the folder's name or in its hyper-parameters")
    if begin:
        raise ValueError(f"it begins at step {begin:,}: the rest of a run that was resumed elsewhere")
    given = {name for name, value in flags.items() if value not in ("None", "False", "0.0")}
    algorithm = "DQN" if flags["algorithm"] == "DDQN" and flags.get("double") == "False" else flags["algorithm"]
    algorithm = "Dueling " * ("dueling" in given) + algorithm
    algorithm += f" {flags['architecture']}" if flags.get("architecture", "separate") != "separate" else ""
    mode = "scratch" if "pretrained" not in given else "only-head" if "freeze_features" in given else "fine-tuning"
    if "pretrained_head" in given:
        mode = "hybrid" + ", features frozen" * (mode == "only-head")
    elif "pretrained_pretrained" in given:
        mode += ", of a transferred run"
    mode += ", head kept" * ("keep_head" in given)
    mode += f", {flags['head_fraction']} of the head" if "head_fraction" in given else ""
    identity = algorithm, mode, game(flags.get("pretrained_env_id", "")), game(flags["env_id"]), int(flags["seed"])
    curves = {}
    for tag in tags:  # games that end at the same step are one point, their mean
        steps, index, n = np.unique([step for step, _ in points[tag]], return_inverse=True, return_counts=True)
        curves[tag] = np.c_[steps, np.bincount(index, [value for _, value in points[tag]]) / n]
    checkpoint = Path(folder, f"{flags['exp_name']}.pt")
    return Run(checkpoint, flags, curves, *identity, int(float(flags.get("total_timesteps", 0))), last)


def read_runs(logdir: str, tags: list[str]) -> list[Run]:
    """All runs below `logdir`, oldest first; what is none is named on stderr."""
    newest, runs = defaultdict(float), []
    for path in Path(logdir).rglob("*tfevents*"):  # not the folder's time: what is put into it later changes that
        newest[path.parent] = max(newest[path.parent], path.stat().st_mtime)
    for folder in sorted(newest, key=lambda folder: (newest[folder], folder)):
        try:
            runs.append(read_run(str(folder), tags))
        except Exception as error:  # noqa: BLE001  whatever one run holds, the others have their table
            print(f"skipped {str(folder)!a}: {error}", file=sys.stderr)
    return runs


def differences(runs: list[Run], of_source: bool = False) -> list[str]:
    """Names of the flags, of `runs` or of their sources, that matter and have two known values that differ."""
    names = {name for run in runs for name in run.flags if name.startswith("pretrained_") == of_source} - FREE
    return sorted(name for name in names if len({run.flags.get(name) for run in runs} - {None}) > 1)


def finished_runs(args: Args, others: tuple[str, ...] = ()) -> dict[tuple, dict[int, Run]]:
    """{(algorithm, mode, source, target): {seed: newest complete run}}, in order, with the curves of `others` too."""
    complete, groups, arms = [], defaultdict(list), defaultdict(dict)
    for run in read_runs(args.logdir, [args.metric, *others]):
        if reason := run.lacks(args.metric):
            print(f"skipped {str(run.checkpoint.parent)!a}: {reason}", file=sys.stderr)
        else:
            complete.append(run)
            groups["algorithm", run.algorithm, run.target].append(run)
            groups["mode", run.algorithm, run.mode, run.source, run.target].append(run)
    if not complete:
        sys.exit(f"--logdir {args.logdir}: no complete run with {args.metric} in it")
    for (field, *_), runs in groups.items():  # flags that differ: a run's join its algorithm, its source's its mode
        for name, run in product(differences(runs, of_source=field == "mode"), runs):
            setattr(run, field, f"{getattr(run, field)}, {name} {run.flags.get(name)}")
    for run in sorted(complete, key=lambda run: (run.seed, run.paired())):
        arm = arms[run.algorithm, run.mode, run.source, run.target]
        if older := arm.get(run.seed):
            reason = "is newer" if older.paired() == run.paired() else "has a source of the same seed"
            print(f"skipped {str(older.checkpoint.parent)!a}: one with the same flags {reason}", file=sys.stderr)
        arm[run.seed] = run
    return dict(sorted(arms.items()))


# Areas and metrics ---------------------------------------------------------------------------------------------------
DEGREES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30, 60, 1_000]
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.131, 2.086, 2.042, 2.000, 1.962]


def relative_change(new: np.ndarray, old: np.ndarray) -> tuple[float, float, float]:
    """mean(new) / mean(old) - 1 of float64 `(seeds,)`, and the ends of its 95 % interval by Fieller's theorem (1954).

    The interval holds every ratio at which Student's t-test of the pairs does not tell `new` from that multiple of
    `old`. It is nan for a single seed, and where the mean of `old` cannot be told from 0.
    """
    ratio, n = new.mean() / old.mean(), len(new)
    if n < 2:
        return ratio - 1, np.nan, np.nan
    (var_new, covariance), (_, var_old) = np.cov(new, old) * np.interp(n - 1, DEGREES, T95) ** 2 / n
    # (mean(new) - ratio mean(old))^2 <= var_new - 2 ratio covariance + ratio^2 var_old, solved for the ratio
    a, b, c = old.mean() ** 2 - var_old, new.mean() * old.mean() - covariance, new.mean() ** 2 - var_new
    root = max(b * b - a * c, 0.0) ** 0.5 if a > 0 else np.nan
    return ratio - 1, (b - root) / a - 1, (b + root) / a - 1


def on_grid(runs: list[Run], tag: str) -> tuple[np.ndarray, np.ndarray]:
    """All steps `(points,)` of the range that the runs share, and the curves `(runs, points)` there, linear between."""
    curves = [run.curves[tag] for run in runs]
    begin, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    grid = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    grid = grid[(grid >= begin) & (grid <= end)]
    return grid, np.stack([np.interp(grid, *curve.T) for curve in curves])


def compare(scratch: dict[int, Run], transfer: dict[int, Run], metric: str) -> dict:
    """All that is known of a cell, from the seeds that both sides have; areas are means of `metric` over the steps."""
    first, seeds = next(iter(transfer.values())), sorted(set(scratch) & set(transfer))
    cell = {name: getattr(first, name) for name in ("algorithm", "mode", "source", "target")}
    cell["from"] = f"{'itself' if first.source == first.target else first.source}, {first.mode}"
    published = re.sub("(, fine-tuning)?(, pretrained_.+)?$", "", cell["from"])  # under flags of their own, too
    row = first.algorithm.split(", ")[0], published, first.target
    names = ("R", "R_low", "R_high", "FT", "FT_low", "FT_high", "jumpstart", "asymptotic")
    cell |= {"n": len(seeds), "published": PUBLISHED.get(row, np.nan), "note": ""} | dict.fromkeys(names, np.nan)
    if not seeds:
        return cell | {"note": f"no run from scratch on {first.target} with the same flags and seed"}
    if not all(run.paired() for run in transfer.values()):
        cell["note"] += "Sources have other seeds. "
    grid, curves = on_grid([runs[seed] for runs in (scratch, transfer) for seed in seeds], metric)
    areas = ((curves[:, 1:] + curves[:, :-1]) / 2 * np.diff(grid)).sum(axis=1) / (grid[-1] - grid[0])
    old, new = np.split(areas, 2)
    if old.mean() > 0.01 * abs(new.mean()):
        cell |= zip(names, relative_change(new, old))
    else:  # returns below 0, or a game hardly ever won
        cell["note"] += f"R is undefined, scratch has {old.mean():.4g} on average beside {new.mean():.4g} with transfer"
    reference = REFERENCE.get(first.target, -np.inf)
    if metric.endswith("episodic_return") and reference > old.mean():
        # FT = 1 - (reference - new) / (reference - old), where the scale's random play cancels out; low and high swap
        cell |= zip(("FT", "FT_high", "FT_low"), np.negative(relative_change(reference - new, reference - old)))
    gain = curves[len(seeds) :].mean(axis=0) - curves[: len(seeds)].mean(axis=0)
    late = np.interp(np.linspace(0.1 * grid[0] + 0.9 * grid[-1], grid[-1]), grid, gain)  # the last tenth
    cell |= {"jumpstart": gain[0].round(6), "asymptotic": late.mean().round(6)}
    return cell | {"mean_transfer": new.mean(), "mean_scratch": old.mean()}


def all_cells(arms: dict[tuple, dict[int, Run]], metric: str) -> list[list[dict]]:
    """For each algorithm every comparison that these runs allow, those between games first."""
    cells = defaultdict(list)
    for (algorithm, mode, source, target), transfer in sorted(arms.items(), key=lambda arm: arm[0][2] == arm[0][3]):
        if mode != "scratch":
            cells[algorithm].append(compare(arms.get((algorithm, "scratch", "", target), {}), transfer, metric))
    return [cells[algorithm] for algorithm in sorted(cells)]


def shown(cell: dict, measure: str, interval: bool = True) -> str:
    """Value, * where the interval excludes 0, interval."""
    value, low, high = cell[measure], cell[f"{measure}_low"], cell[f"{measure}_high"]
    text = "n/a" if np.isnan(value) else f"{value:+.3f}" + "*" * int(low > 0 or high < 0)
    return text + (f" [{low:+.2f}, {high:+.2f}]" if interval and not np.isnan(low) else "")


# Printing ------------------------------------------------------------------------------------------------------------
def write(rows: list[dict], format: str, file: IO | None = None) -> None:
    """All rows under the union of their keys, to `file`, else to stdout."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    if format == "csv":
        return csv.writer(file or sys.stdout, lineterminator="\n").writerows(lines)
    lines.insert(1, ["---"] * len(names))
    print("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n", file=file)


def table(args: Args) -> None:
    cells = all_cells(finished_runs(args), args.metric)
    if not cells:
        sys.exit(f"--logdir {args.logdir}: no run with --pretrained in it, there is nothing to compare")
    if args.format == "csv":
        return write([cell for group in cells for cell in group], "csv")
    print(f"{args.metric}: means over n seeds [95 % interval], * where that excludes 0, each cell for itself.")
    print("No interval: one seed, or what is divided by may be 0.\n")
    for group in cells:
        targets, rows, details = sorted({cell["target"] for cell in group}), {}, []
        for cell in group:
            text = shown(cell, "R") + ("" if np.isnan(cell["published"]) else f" (published {cell['published']:+.3f})")
            rows.setdefault(cell["from"], {"from": cell["from"]} | dict.fromkeys(targets, "–"))[cell["target"]] = text
            place = {"from": cell["from"], "to": cell["target"], "n": cell["n"], "FT": shown(cell, "FT")}
            gains = {name: f"{cell[name]:+.4g}" for name in ("jumpstart", "asymptotic")}
            details.append(place | gains | {"note": cell["note"]})
        print(f"### {group[0]['algorithm']}: area ratio R, from (rows) to (columns)\n")
        write(list(rows.values()), "markdown")
        print(f"### {group[0]['algorithm']}: forward transfer FT; transfer minus scratch at the start and the end\n")
        write(details, "markdown")


def scores(args: Args) -> None:
    rows, normalised = {name: {"game": name} | dict(zip(COLUMNS, row)) for name, row in SCORES.items()}, {}
    for (algorithm, mode, _, target), arm in finished_runs(args).items():
        if mode == "scratch":
            values = np.array([run.curves[args.metric][-1, 1] for run in arm.values()])
            mean, low, high = (1 + change for change in relative_change(values, np.ones(len(values))))
            row = rows.setdefault(target, {"game": target} | dict.fromkeys(COLUMNS, "–"))
            row[f"{algorithm}, ours"] = f"{mean:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")
            row[f"{algorithm}, n"] = len(values)
            if target in SCORES:
                shares = (values - row["random"]) / (row["human"] - row["random"])
                row[f"{algorithm}, of human"] = f"{shares.mean():.1%}"
                normalised.setdefault(algorithm, []).extend(shares)
    write(list(rows.values()), args.format)
    if args.format == "markdown":
        print("Ours: mean of the last evaluations [95 % interval]. Random and human scores are those of Mnih et al.")
        print("(Nature 2015), the next are published; DQV-Max on CrazyClimber as printed, 100,131 is likely.\n")
        for algorithm, shares in normalised.items():
            middle = np.sort(shares)[len(shares) // 4 : len(shares) - len(shares) // 4]
            print(f"{algorithm}: interquartile mean of the human-normalised scores of all runs {middle.mean():.3f}")


# Planning ------------------------------------------------------------------------------------------------------------
ALGORITHMS = {"ddqn_atari.py": "DDQN", "dqv_atari.py": "DQV", "dqv_max_atari.py": "DQV-Max"}
STAGES = {"source": ["scratch"], "transfer": ["fine-tuning"], "only-head": ["only-head"], "hybrid": ["hybrid"]}
STAGES["self-transfer"] = ["fine-tuning", "only-head"]
# {mode: {flag: mode of the run that it names}}
NEEDS = {"scratch": {}, "fine-tuning": {"pretrained": "scratch"}, "only-head": {"pretrained": "scratch"}}
NEEDS["hybrid"] = {"pretrained": "fine-tuning", "pretrained_head": "only-head"}


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def plan(args: Args) -> None:
    games = {env_id: game(env_id) for env_id in args.env_ids}
    if not games or not set(args.targets) <= set(games):
        sys.exit(f"--env-ids has to name the games, those of --targets too: {' '.join(args.targets)}")
    runs = [run for run in read_runs(args.logdir, [args.metric]) if run.checkpoint.is_file()]
    usual = {"double": "True", "dueling": "False", "architecture": "separate", "terminal": "True"}
    usual |= {"keep_head": "False", "head_fraction": "0.0"}
    script = Path(args.script).name
    usual |= {"script": script} | ({"algorithm": ALGORITHMS[script]} if script in ALGORITHMS else {})
    for run in runs:  # older ones did not log their script: a changed copy's are known by their name
        run.flags.setdefault("script", script if script in ALGORITHMS else f"{run.flags['exp_name']}.py")
    heads = r", head kept|, \S+ of the head"  # of a mode, what flags say

    def find(flags: str, *identity: str | int) -> list[Run]:
        """Runs with these flags, of the algorithm proper where they say nothing else; the newest complete one last."""
        given = re.findall(r"--(no[-_])?([\w-]+)(?:[ =]+(?!--)(\S+))?", " ".join(shlex.split(flags)))
        wanted = usual | {name.replace("-", "_"): value or str(not off) for off, name, value in given}
        same = [run for run in runs if (re.sub(heads, "", run.mode), run.source, run.target, run.seed) == identity]
        same = [run for run in same if all(number(run.flags.get(k, v)) == number(v) for k, v in wanted.items())]
        return sorted(same, key=lambda run: not run.lacks(args.metric))

    commands, missing, taken = [], [], []
    origins = [""] if args.stage == "source" else games.values()
    for env_id, seed, mode, origin in product(args.targets or games, args.seeds, STAGES[args.stage], origins):
        if origin and (origin == games[env_id]) != (args.stage in ("self-transfer", "hybrid")):
            continue
        command = ["python", args.script, "--env-id", env_id, "--seed", str(seed), "--logdir", args.logdir]
        mine = find(args.args, mode, origin, games[env_id], seed)
        for flag, needed in NEEDS[mode].items():
            starts = find(args.source_args or args.args, needed, "" if needed == "scratch" else origin, origin, seed)
            starts = [run for run in starts if not run.lacks(args.metric)]
            taken += [] if args.source_args else starts[-1:]
            missing += [] if starts else [f"{origin}, {needed}, seed {seed}"]
            command += [f"--{flag.replace('_', '-')}", *(str(run.checkpoint) for run in starts[-1:])]
            folders = [run.checkpoint.parent.name for run in starts]  # what began elsewhere is of another study
            mine = [run for run in mine if any(folder in run.flags[flag] for folder in folders)]
        taken += mine[-1:]
        if not mine:
            commands.append(command + ["--freeze-features"] * (mode == "only-head") + shlex.split(args.args))
        elif (reason := mine[-1].lacks(args.metric)).startswith(("no ", "incomplete,")):  # it may have steps to go
            commands.append(["python", args.script, "--resume", str(mine[-1].checkpoint), "--env-id", env_id])
        elif reason:
            sys.exit(f"{mine[-1].checkpoint.parent}: {reason}; move it away and have more evaluations")
    if missing:
        sys.exit(f"--logdir {args.logdir} lacks complete runs: {'; '.join(dict.fromkeys(missing))}")
    if names := differences(taken):
        sys.exit(f"runs that fit differ in {', '.join(names)}: say it in --args or --source-args")
    for command in commands:
        print(shlex.join(command))
    print(f"{len(commands)} runs to go", file=sys.stderr)


# Pictures ------------------------------------------------------------------------------------------------------------
TAGS = [f"eval/{name}" for name in "max_q discounted_return caught v_minus_max_q dead_units feature_rank".split()]
PANELS = ["eval/max_q - eval/discounted_return", *TAGS[3:]]
STYLES = {"scratch": "-", "fine-tuning": "-", "only-head": "--", "hybrid": ":"}


def draw_matrix(cells: list[dict]) -> Figure:
    """Area ratios as colours, with the published ones and forward transfer as text."""
    rows, targets = list(dict.fromkeys(cell["from"] for cell in cells)), sorted({cell["target"] for cell in cells})
    values = np.full((len(rows), len(targets)), np.nan)
    figure = Figure((3.5 + 1.2 * len(targets), 1.5 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for cell in cells:
        y, x = rows.index(cell["from"]), targets.index(cell["target"])
        values[y, x] = cell["R"]
        text = f"{shown(cell, 'R', interval=False)}\nFT {shown(cell, 'FT', interval=False)}"
        text += "" if np.isnan(cell["published"]) else f"\n({cell['published']:+.3f})"
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="w" if abs(cell["R"]) > 0.65 else "k")
    figure.colorbar(axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto"), extend="both", label="R")
    axes.set(xlabel="to", xticks=range(len(targets)), xticklabels=targets)
    axes.set(ylabel="from", yticks=range(len(rows)), yticklabels=rows)
    axes.set_title(f"{cells[0]['algorithm']}: area ratio R (published), forward transfer FT")
    return figure


def draw_curves(title: str, arms: dict[str, tuple[str, str, list[Run]]], tags: list[str]) -> Figure:
    """Mean and range of the seeds of {label: (colour, style, runs)}, a panel for each of `tags` that they have."""
    tags = [tag for tag in tags if any(len(run.curves[tag]) > 1 for *_, group in arms.values() for run in group)]
    figure = Figure((4 * len(tags) + 2.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(tags), squeeze=False)[0]
    for (label, (colour, style, group)), (panel, tag) in product(arms.items(), zip(panels, tags)):
        panel.set(xlabel="agent steps", ylabel=tag)
        panel.locator_params(axis="x", nbins=5)
        if known := [run for run in group if len(run.curves[tag]) > 1]:
            grid, curves = on_grid(known, tag)
            panel.plot(grid, curves.mean(axis=0), style, color=colour, label=f"{label}, n = {len(known)}")
            panel.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    figure.suptitle(f"{title}: mean and range of the seeds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def plot(args: Args) -> None:
    arms, rows, colours = finished_runs(args, TAGS), [], {"": "black"}
    runs = [run for arm in arms.values() for run in arm.values()]
    for run in runs:
        fields = {name: getattr(run, name) for name in ("algorithm", "mode", "source", "target", "seed")}
        values = defaultdict(dict)
        for tag, curve in run.curves.items():
            for step, value in curve:
                values[int(step)][tag] = f"{value:.6g}"
        rows += [fields | {"step": step} | values[step] for step in sorted(values)]
        outcome = dict(run.curves["eval/discounted_return"])
        gaps = [(step, value - outcome[step]) for step, value in run.curves["eval/max_q"] if step in outcome]
        run.curves[PANELS[0]] = np.array(gaps).reshape(-1, 2)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(f"{args.out}/curves.csv", "w", newline="") as file:
        write(rows, "csv", file)
        print(file.name)
    for names in ({run.algorithm for run in runs}, {run.source for run in runs} - {""}):  # equal in all pictures
        colours |= {name: f"C{i}" for i, name in enumerate(sorted(names))}
    pictures = {f"matrix {cells[0]['algorithm']}": draw_matrix(cells) for cells in all_cells(arms, args.metric)}
    figures = defaultdict(dict)  # {title: {label: (colour, style, runs)}}
    for (algorithm, mode, source, target), arm in sorted(arms.items(), key=lambda arm: arm[0][2]):
        label = f"{mode} from {source}" if source else "from scratch"
        style, group = STYLES.get(mode, "-."), list(arm.values())
        figures[f"{algorithm} on {target}"][label] = colours[source], style, group
        if not source:
            figures[f"{target} from scratch"][algorithm] = colours[algorithm], style, group
    for title, groups in figures.items():
        if len(groups) > 1:
            pictures[f"curves {title}"] = draw_curves(title, groups, [args.metric, *PANELS])
    for number, (name, figure) in enumerate(pictures.items()):
        stem = re.sub(r"[^a-z0-9.-]+", "_", name.lower())  # with many flags longer than a file's name can be
        path = f"{args.out}/{stem if len(stem) < 200 else f'{stem[:190]}_{number}'}.png"
        figure.savefig(path, dpi=100)
        print(path)


if __name__ == "__main__":
    args = tyro.cli(Args, description="After the runs of a study: python transfer_matrix.py table --logdir runs")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `plan | head` ends without a traceback
    {"plan": plan, "table": table, "scores": scores, "plot": plot}[args.command](args)
