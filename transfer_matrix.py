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
# dependencies = ["numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.18", "matplotlib>=3.8"]
# ///
import csv
import os
import re
import shlex
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from typing import Literal, NoReturn

import numpy as np
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["plan", "table", "scores", "plot"]]  # commands of a study; matrices; games
    logdir: str = "runs"  # folder of the runs; it is searched at any depth

    # table, scores, plot
    metric: str = "eval/episodic_return"  # TensorBoard tag of the learning curve
    threshold: float = 0.9  # steps to threshold: until this share of what scratch gained in all
    format: Literal["markdown", "csv"] = "markdown"  # to read, or to read in: one row a cell with all that is known
    out: str = "results"  # plot: folder for the pictures and curves.csv

    # plan: prints the commands, one a line; what is complete in --logdir is left out
    env_ids: tuple[str, ...] = ()  # the games, as the script's --env-id
    stage: Literal["source", "transfer", "only-head", "self-transfer", "hybrid"] = "source"  # each needs those before
    targets: tuple[str, ...] = ()  # the games among these to train on (none given: all)
    script: str = "ddqn_atari.py"  # the script to run
    seeds: tuple[int, ...] = (1, 2, 3)  # a transfer run starts from the source of its own seed
    args: str = ""  # further flags of the script in one string, such as "--no-double --total-timesteps 200000"
    source_args: str = ""  # flags of the runs to start from, where these are not --args; their other flags are free


# Published results ---------------------------------------------------------------------------------------------------
# Slides and thesis, rows are sources, columns targets; the Catch games by the names of the thesis' text, since the
# table itself calls Catch-v1 (small paddle) v4
MATRICES = {
    "DQV": """
        - BankHeist Boxing CrazyClimber Enduro FishingDerby Frostbite Jamesbond MsPacman Pong Zaxxon
        BankHeist - -0.019 -1 -0.317 0.5 0.729 0.973 -0.089 -1.238 -0.998
        Boxing -0.494 - -0.278 -0.852 0.552 -0.01 0.247 -0.184 -0.841 -0.999
        CrazyClimber -0.569 -0.261 - -0.593 0.19 0.277 0.621 -0.111 -1.206 -0.178
        Enduro -0.571 -0.018 -0.25 - 0.726 -0.017 -0.41 -0.08 -0.466 -0.164
        FishingDerby -1 -0.893 -0.093 -0.45 - 0.068 0.197 -0.136 -3.083 -0.999
        Frostbite -0.933 0.024 -1 -0.348 0.222 - 0.569 0.009 -0.663 -0.076
        Jamesbond -0.123 -0.106 -0.131 -0.033 0.519 0.262 - 0.218 -1.329 -1
        MsPacman -0.985 -0.219 -0.012 -0.494 0.6 0.346 0.398 - -1.646 -0.997
        Pong -1 -0.083 -0.428 -0.476 0.725 -0.024 0.896 0.123 - -0.729
        Zaxxon -0.76 -0.028 0.037 -0.116 0.385 0.16 -0.253 0.06 -1.602 -""",
    "DDQN": """
        - BankHeist Boxing CrazyClimber Enduro FishingDerby Gopher IceHockey Jamesbond MsPacman Pong
        BankHeist - 0.121 -0.378 -0.006 -0.107 0.042 -0.006 -0.058 0.001 -3.013
        Boxing -0.316 - -0.104 -0 0.038 0.06 0.015 -0.225 -0.027 0.936
        CrazyClimber -0.192 -0.487 - -0.012 -0.084 0.016 0.015 0.016 -0.015 -2.64
        Enduro -0.296 0.193 -0.167 - 0.039 0.03 0.019 -0.235 -0.039 0.248
        FishingDerby -0.212 -0.545 -1 -0.085 - 0.016 0.001 -0.055 -0.026 -0.935
        Gopher -0.466 0.044 -0.108 -0.005 0.007 - -0.005 -0.094 -0.02 -1.816
        IceHockey -0.046 0.245 -0.067 0.014 -0.178 0.072 - 0.037 -0.015 0.112
        Jamesbond -0.145 0.232 -0.064 0.005 -0.267 0.031 -0.092 - -0.006 -1.578
        MsPacman -0.173 -1.179 -0.129 -0.06 0.003 -0.019 0.007 0.071 - -2.774
        Pong -0.127 0.028 -0.12 0.01 0.037 0.042 0.002 -0.174 -0.006 -""",
    "DQN": """
        - Catch-v0 Catch-v2 Catch-v3 Catch-v1
        Catch-v0 - -0.026 -0.486 -0.479
        Catch-v2 -0.16 - -0.121 -0.248
        Catch-v3 -0.406 -0.313 - -0.465
        Catch-v1 -0.016 -0.24 -0.179 -""",
}
PUBLISHED = {}  # {(algorithm, mode, source, target): area ratio}
for _algorithm, _text in MATRICES.items():
    (_, *_targets), *_rows = (line.split() for line in _text.strip().splitlines())
    for _source, *_cells in _rows:
        _known = [(_target, float(_cell)) for _target, _cell in zip(_targets, _cells) if _cell != "-"]
        PUBLISHED |= {(_algorithm, "fine-tuning", _source, _target): _cell for _target, _cell in _known}
for _mode, _cells in {
    "only-head": (0.05, 0.141, 0.674, 0.059), "fine-tuning": (0.017, -0.218, 0.393, -0.236),
    "hybrid": (0.041, None, 0.241, -0.123),  # from the author's curves; those of Catch-v1 are mixed up with Catch-v3's
}.items():  # fmt: skip
    PUBLISHED |= {("DQN", _mode, f"Catch-v{i}", f"Catch-v{i}"): _cell for i, _cell in enumerate(_cells) if _cell}

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


def fail(message: str) -> NoReturn:
    sys.exit(f"transfer_matrix.py: error: {message}")


# Reading runs --------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    folder: str
    flags: dict[str, str]  # the hyper-parameters that the run logged
    curves: dict[str, np.ndarray]  # {tag: float64 (points, 2) with agent steps, ascending, and values}
    last_step: int  # of any scalar
    total: int  # its --total-timesteps
    algorithm: str
    mode: str  # scratch, fine-tuning, only-head or hybrid
    source: str  # the game of --pretrained, "" from scratch
    target: str
    seed: int


# Flags in which runs may differ that are compared: they do not change what is learned, or stand in the fields above
FREE = """algorithm architecture double dueling env_id exp_name seed pretrained pretrained_env_id pretrained_head
    keep_head head_fraction freeze_features cuda cudagraphs logdir resume evaluate track capture_video eval_frequency
    checkpoint_frequency buffer_device save_buffer torch_deterministic wandb_project_name wandb_entity"""
FLAGS_TAG = "hyperparameters/text_summary"
ALGORITHMS = {"ddqn_atari": "DDQN", "dqv_atari": "DQV", "dqv_max_atari": "DQV-Max"}


def game(env_id: str) -> str:
    """`Pong` of ALE/Pong-v5, `Catch-v0` of catch_env:Catch-v0."""
    name = re.split("[/:]", env_id)[-1]
    return name.removesuffix("-v5") if env_id.startswith("ALE/") else name


def read_events(folder: str, tags: list[str]) -> tuple[dict[str, str], dict[str, np.ndarray], int]:
    """Flags, curves and last step of a run; only records in which a tag stands are decoded, purged points left out."""
    flags, points, last_step = {}, {tag: [] for tag in tags}, 0
    wanted = re.compile(b"|".join(re.escape(bytes([len(tag)]) + tag.encode()) for tag in [*tags, FLAGS_TAG]))
    for name in sorted(name for name in os.listdir(folder) if "tfevents" in name):
        with open(os.path.join(folder, name), "rb") as file:
            buffer = file.read()
        start, end, count = 12, -4, 0
        while start <= len(buffer):  # a record: length (8 bytes), CRC (4), event, CRC (4)
            (size,) = struct.unpack_from("<Q", buffer, start - 12)
            if start + size + 4 > len(buffer):
                break  # cut off, or still being written
            end, count = start + size, count + 1
            match = wanted.search(buffer, start, end)
            if match and match.end() + 5 == end:  # the value is all that follows the tag: read without the summary
                step, (value,) = Event.FromString(buffer[start:end]).step, struct.unpack_from("<f", buffer, end - 4)
                points[match[0][1:].decode()].append((step, value))
            elif match or count < 4:
                event = Event.FromString(buffer[start:end])
                if count < 4 and event.session_log.status == SessionLog.START:  # a resumed run
                    points = {tag: [point for point in points[tag] if point[0] < event.step] for tag in tags}
                for value in event.summary.value:
                    if value.tag in points:
                        number = value.simple_value or (value.tensor.float_val or [0.0])[0]  # of other writers
                        points[value.tag].append((event.step, number))
                    elif value.tag == FLAGS_TAG:
                        rows = value.tensor.string_val[0].decode().splitlines()[2:]
                        flags |= dict(row[1:-1].split("|", 1) for row in rows)
            last, start = start, end + 16
        last_step = Event.FromString(buffer[last:end]).step if count else last_step
    return flags, {tag: np.array(sorted(points[tag])).reshape(-1, 2) for tag in tags}, last_step


def read_run(folder: str, tags: list[str]) -> Run:
    """The run in `folder` with its curves of `tags`. Raises an error that says why there is none."""
    flags, curves, last_step = read_events(folder, tags)
    if not {"env_id", "seed", "exp_name"} <= set(flags):
        raise ValueError("it has logged no hyper-parameters with env_id, seed and exp_name")
    if not "".join([str(folder), *flags.values()]).isprintable() or "/" in flags["exp_name"]:
        raise ValueError("control characters in the folder's name or in its hyper-parameters, or a slash in exp_name")
    logged = defaultdict(lambda: "None", flags)
    flags["algorithm"] = algorithm = flags.get("algorithm") or ALGORITHMS.get(flags["exp_name"], flags["exp_name"])
    algorithm = "DQN" if algorithm == "DDQN" and logged["double"] == "False" else algorithm
    algorithm = "Dueling " * (logged["dueling"] == "True") + algorithm
    algorithm += f" {logged['architecture']}" if logged["architecture"] not in ("None", "separate") else ""
    mode, source = "scratch", ""
    if logged["pretrained"] != "None":
        mode, source = "fine-tuning", game(flags["pretrained_env_id"])
        mode = "only-head" if logged["freeze_features"] == "True" else mode
        mode = "hybrid" if logged["pretrained_head"] != "None" else mode
        mode += ", head kept" if logged["keep_head"] == "True" else ""
        mode += f", {logged['head_fraction']} of the head" if float(flags.get("head_fraction", 0)) else ""
    identity = algorithm, mode, source, game(flags["env_id"]), int(flags["seed"])
    return Run(folder, flags, curves, last_step, int(float(flags.get("total_timesteps", 0))), *identity)


def skip(folder: str, reason: object) -> None:
    print(f"skipped {folder if folder.isprintable() else ascii(folder)}: {reason}", file=sys.stderr)


def read_runs(logdir: str, tags: list[str]) -> list[Run]:
    """All runs below `logdir`, oldest first; what is none is named on stderr."""
    if not os.path.isdir(logdir):
        fail(f"--logdir {logdir}: there is no such folder")
    folders = [folder for folder, _, names in os.walk(logdir) if any("tfevents" in name for name in names)]
    runs = []
    for folder in sorted(folders, key=lambda folder: (os.path.getmtime(folder), folder)):
        try:
            runs.append(read_run(folder, tags))
        except Exception as error:  # noqa: BLE001  whatever one run holds, the others have their table
            skip(folder, error)
    return runs


def finished_runs(logdir: str, metric: str, points: int = 2, others: tuple[str, ...] = ()) -> list[Run]:
    """The runs that a table may use: complete, with `metric`, one (the newest) of each experiment and seed.

    Where runs of an algorithm on a game differ in further flags, these become part of the algorithm's name.
    """
    found, groups = {}, defaultdict(list)
    for run in read_runs(logdir, [metric, *others]):
        settings = sorted((name, value) for name, value in run.flags.items() if name not in FREE.split())
        key = (run.algorithm, run.mode, run.source, run.target, run.seed, *settings)
        if run.last_step < 0.99 * run.total:  # other programs log their last point a little before the end
            skip(run.folder, f"incomplete, {run.last_step:,} of {run.total:,} steps")
        elif len(run.curves[metric]) < points:
            skip(run.folder, f"it has {len(run.curves[metric])} points of {metric}, at least {points} are needed")
        else:
            if key in found:
                skip(found[key].folder, f"the same experiment and seed as {run.folder}, which is newer")
            found[key] = run
    if not found:
        fail(f"--logdir {logdir}: no complete run with {metric} in it")
    for run in found.values():
        groups[run.algorithm, run.target].append(run)
    for runs in groups.values():
        for name in sorted(set().union(*(run.flags for run in runs)) - set(FREE.split())):
            if len({run.flags.get(name) for run in runs}) > 1:
                for run in runs:
                    run.algorithm += f", {name} {run.flags.get(name)}"
    return sorted(found.values(), key=lambda run: (run.algorithm, run.mode, run.source, run.target, run.seed))


# Areas and metrics ---------------------------------------------------------------------------------------------------
DEGREES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30, 60, 1_000]
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.131, 2.086, 2.042, 2.000, 1.962]


def relative_change(new: np.ndarray, old: np.ndarray, paired: bool) -> tuple[float, float, float]:
    """mean(new) / mean(old) - 1 of float64 `(runs,)`, and the ends of its 95 % interval by Fieller's theorem (1954).

    The interval holds every ratio at which Student's t-test (of the pairs; else Welch's) does not tell `new` from that
    multiple of `old`. It is nan for single runs, and where the mean of `old` cannot be told from 0.
    """
    ratio, n_new, n_old = new.mean() / old.mean(), len(new), len(old)
    if min(n_new, n_old) < 2:
        return ratio - 1, np.nan, np.nan
    var_new, var_old = new.var(ddof=1) / n_new, old.var(ddof=1) / n_old
    covariance, degrees = (np.cov(new, old)[0, 1] / n_new if paired else 0.0), n_new - 1
    if not paired:
        terms = var_new, var_old * ratio**2
        degrees = sum(terms) ** 2 / max(terms[0] ** 2 / (n_new - 1) + terms[1] ** 2 / (n_old - 1), 1e-300)
    t2 = np.interp(degrees, DEGREES, T95) ** 2
    # (mean(new) - ratio mean(old))^2 <= t2 (var_new - 2 ratio covariance + ratio^2 var_old), solved for the ratio
    a, b, c = old.mean() ** 2 - t2 * var_old, new.mean() * old.mean() - t2 * covariance, new.mean() ** 2 - t2 * var_new
    root = max(b * b - a * c, 0.0) ** 0.5
    return (ratio - 1, (b - root) / a - 1, (b + root) / a - 1) if a > 0 else (ratio - 1, np.nan, np.nan)


def on_grid(runs: list[Run], tag: str) -> tuple[np.ndarray, np.ndarray]:
    """All steps `(points,)` of the range that the runs share, and the curves `(runs, points)` there, linear between."""
    curves = [run.curves[tag] for run in runs]
    begin, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    grid = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    grid = grid[(grid >= begin) & (grid <= end)]
    return grid, np.stack([np.interp(grid, *curve.T) for curve in curves])


def compare(scratch: list[Run], transfer: list[Run], args: Args) -> dict:
    """All that is known of a cell; areas are divided by their range of steps, which makes them means of the metric."""
    first, names = transfer[0], ("R", "R_low", "R_high", "FT", "FT_low", "FT_high")
    cell = {name: getattr(first, name) for name in ("algorithm", "mode", "source", "target")}
    cell |= {"n_transfer": len(transfer), "n_scratch": len(scratch), "note": ""} | dict.fromkeys(names, np.nan)
    cell["published"] = PUBLISHED.get((first.algorithm, first.mode, first.source, first.target), np.nan)
    if not scratch:
        return cell | {"note": f"no run from scratch on {first.target} with the same flags"}
    grid, curves = on_grid(scratch + transfer, args.metric)
    if len(grid) < 2:
        return cell | {"note": "the runs have no steps in common"}
    areas = ((curves[:, 1:] + curves[:, :-1]) / 2 * np.diff(grid)).sum(axis=1) / (grid[-1] - grid[0])
    old, new = areas[: len(scratch)], areas[len(scratch) :]
    paired = [run.seed for run in scratch] == [run.seed for run in transfer]
    if old.mean() > 0.01 * abs(new.mean()):
        cell |= zip(names, relative_change(new, old, paired))
    else:  # returns below 0, or a game hardly ever won
        cell["note"] = f"R is undefined, scratch has {old.mean():.4g} on average beside {new.mean():.4g} with transfer"
    reference = REFERENCE.get(first.target, -np.inf) if args.metric.endswith("episodic_return") else -np.inf
    if reference > old.mean():  # FT of curves scaled to random play 0 and the reference 1; random play cancels out
        change, low, high = relative_change(reference - new, reference - old, paired)
        cell |= {"FT": -change, "FT_low": -high, "FT_high": -low}
    s, t = curves[: len(scratch)].mean(axis=0), curves[len(scratch) :].mean(axis=0)
    late = grid >= grid[0] + 0.9 * (grid[-1] - grid[0])
    level = s[0] + args.threshold * (s[late].mean() - s[0])
    times = [grid[curve >= level][0] if (curve >= level).any() else np.nan for curve in (t, s)]
    return cell | {
        "jumpstart": t[0] - s[0], "asymptotic": t[late].mean() - s[late].mean(), "threshold": level,
        "time_to_threshold": times[0], "time_to_threshold_scratch": times[1], "mean_transfer": new.mean(),
        "mean_scratch": old.mean(), "first_step": grid[0], "last_step": grid[-1],
    }  # fmt: skip


def all_cells(runs: list[Run], args: Args) -> list[dict]:
    """Every comparison that these runs allow, of an algorithm those between games first."""
    groups, cells = defaultdict(list), []
    for run in runs:
        groups[run.algorithm, run.mode, run.source, run.target].append(run)
    for (algorithm, mode, source, target), group in groups.items():
        if mode != "scratch":
            cells.append(compare(groups.get((algorithm, "scratch", "", target), []), group, args))
            cells[-1]["from"] = f"{'itself' if source == target else source}, {mode}"
    return sorted(cells, key=lambda cell: (cell["algorithm"], cell["source"] == cell["target"]))


def shown(cell: dict, measure: str, interval: bool = True) -> str:
    """Value, * where the interval excludes 0, interval."""
    value, low, high = cell[measure], cell[f"{measure}_low"], cell[f"{measure}_high"]
    text = "n/a" if np.isnan(value) else f"{value:+.3f}" + "*" * int(low > 0 or high < 0)
    return text + (f" [{low:+.2f}, {high:+.2f}]" if interval and not np.isnan(low) else "")


# Printing ------------------------------------------------------------------------------------------------------------
def write(rows: list[dict], format: str) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[str(row.get(name, "–")) for name in names] for row in rows]
    if format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([names, *lines])
    else:
        print("\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *lines]) + "\n")


def table(args: Args) -> None:
    cells = all_cells(finished_runs(args.logdir, args.metric), args)
    if not cells:
        fail(f"--logdir {args.logdir}: no run with --pretrained in it, there is nothing to compare")
    if args.format == "csv":
        return write(cells, "csv")
    print(
        f"{args.metric}: mean over seeds [95 % interval], * where that excludes 0, each cell for itself; n seeds (with"
    )
    print("transfer/from scratch where they differ). No interval: one seed, or what is divided by may be 0.\n")
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells):
        mine = [cell for cell in cells if cell["algorithm"] == algorithm]
        targets, rows, others = sorted({cell["target"] for cell in mine}), {}, []
        for cell in mine:
            text = f"{shown(cell, 'R')} n={cell['n_transfer']}"
            text += f"/{cell['n_scratch']}" * (cell["n_transfer"] != cell["n_scratch"])
            text += "" if np.isnan(cell["published"]) else f" (published {cell['published']:+.3f})"
            rows.setdefault(cell["from"], {"from": cell["from"]} | dict.fromkeys(targets, "–"))[cell["target"]] = text
            if "jumpstart" in cell:
                gains = {name: f"{round(cell[name], 6):+.4g}" for name in ("jumpstart", "asymptotic")}
                times = [f"{cell[name]:,.0f}" for name in ("time_to_threshold", "time_to_threshold_scratch")]
                gains[f"steps to {args.threshold:g}, scratch's"] = " / ".join(times).replace("nan", "never")
                others.append({"from": cell["from"], "to": cell["target"], "FT": shown(cell, "FT")} | gains)
        print(f"### {algorithm}: area ratio R, from (rows) to (columns)\n")
        write(list(rows.values()), "markdown")
        pairs = [cell for cell in mine if cell["mode"] == "fine-tuning" and cell["source"] != cell["target"]]
        for name, measure in {"ours": "R", "published": "published"}.items():
            known = [cell[measure] for cell in pairs if not np.isnan(cell[measure])]
            if known:
                negative = sum(value < 0 for value in known)
                print(f"Between games, fine-tuned: {name} negative in {negative} of {len(known)} cells\n")
        print(f"### {algorithm}: normalised forward transfer FT; transfer minus scratch at the start and the end\n")
        write(others, "markdown")
    for cell in [cell for cell in cells if cell["note"]]:
        print(f"{cell['algorithm']}, {cell['from']}, to {cell['target']}: {cell['note']}")


def scores(args: Args) -> None:
    final, normalised = defaultdict(list), defaultdict(list)
    for run in finished_runs(args.logdir, args.metric, points=1):
        if run.mode == "scratch":
            final[run.algorithm, run.target].append(run.curves[args.metric][-1, 1])
    if not final:
        fail(f"--logdir {args.logdir}: no run from scratch in it")
    games = [*SCORES, *sorted({target for _, target in final} - set(SCORES))]
    rows = {target: {"game": target} | dict(zip(COLUMNS, SCORES.get(target, "–" * 6))) for target in games}
    for (algorithm, target), values in sorted(final.items()):
        row, (mean, low, high) = rows[target], relative_change(np.array(values), np.ones(len(values)), paired=True)
        interval = "" if np.isnan(low) else f" [{low + 1:.2f}, {high + 1:.2f}]"
        row |= {f"{algorithm}, ours": f"{mean + 1:.2f}{interval}", f"{algorithm}, n": len(values)}
        if target in SCORES:
            shares = (np.array(values) - row["random"]) / (row["human"] - row["random"])
            row[f"{algorithm}, of human"] = f"{shares.mean():.1%}"
            normalised[algorithm].append(shares)
    write(list(rows.values()), args.format)
    if args.format == "markdown":
        print("Ours: mean of the last evaluations [95 % interval]. Random and human scores are those of Mnih et al.")
        print("(Nature 2015), the next are published; DQV-Max on CrazyClimber as printed, 100,131 is likely.\n")
        for algorithm, shares in normalised.items():
            shares = np.sort(np.concatenate(shares))
            middle = shares[len(shares) // 4 : len(shares) - len(shares) // 4]
            print(f"{algorithm}: interquartile mean of the human-normalised scores of all runs {middle.mean():.3f}")


# Planning ------------------------------------------------------------------------------------------------------------
STAGES = {  # {stage: [(mode, {flag: mode of the run that it names})]}
    "source": [("scratch", {})],
    "transfer": [("fine-tuning", {"--pretrained": "scratch"})],
    "only-head": [("only-head", {"--pretrained": "scratch"})],
    "self-transfer": [("fine-tuning", {"--pretrained": "scratch"}), ("only-head", {"--pretrained": "scratch"})],
    "hybrid": [("hybrid", {"--pretrained": "fine-tuning", "--pretrained-head": "only-head"})],
}


def flags_of(text: str) -> dict[str, str]:
    """{hyper-parameter: value} of flags as given on a command line; `--no-x` is x False."""
    found = re.findall(r"--(no-)?([\w-]+)(?:[ =]+(?!--)(\S+))?", text)
    return {name.replace("-", "_"): value or str(not off) for off, name, value in found}


def equal(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def plan(args: Args) -> None:
    script, given = os.path.splitext(os.path.basename(args.script))[0], flags_of(args.args)
    games, metric = {env_id: game(env_id) for env_id in args.env_ids}, args.metric
    for name in {"env_id", "seed", "logdir", "pretrained", "pretrained_head", "freeze_features"} & set(given):
        fail(f"--args: the plan sets --{name.replace('_', '-')} itself")
    if not games or not set(args.targets) <= set(games):
        fail(f"--env-ids names the games, --targets some of these: {' '.join(set(args.targets) - set(games))}")
    runs = read_runs(args.logdir, [metric]) if os.path.isdir(args.logdir) else []

    def checkpoint(run: Run) -> str:
        return os.path.join(run.folder, f"{run.flags['exp_name']}.pt")

    def find(flags: dict[str, str]) -> dict[tuple, list[Run]]:
        """{(mode, source, target, seed): runs with these flags and else of the algorithm proper, oldest first}."""
        wanted = {"algorithm": ALGORITHMS.get(script, script), "double": "True", "architecture": "separate"}
        wanted, found = wanted | {"dueling": "False", "terminal": "True"} | flags, defaultdict(list)
        for run in runs:
            fits = all(equal(run.flags.get(name, value), value) for name, value in wanted.items())
            if fits and os.path.isfile(checkpoint(run)):
                found[run.mode, run.source, run.target, run.seed].append(run)
        return found

    def finished(run: Run) -> bool:
        return len(run.curves[metric]) > 0 and run.curves[metric][-1, 0] >= run.total

    def folder_name(path: str) -> str:
        """Of a run, which stays when --logdir is moved; `path` is the folder or its checkpoint."""
        return os.path.basename(os.path.dirname(path) if path.endswith(".pt") else os.path.normpath(path))

    found, commands, missing = find(given), [], {}
    sources = find(flags_of(args.source_args)) if args.source_args else found
    origins = [""] if args.stage == "source" else games.values()
    for env_id, seed, (mode, needs), origin in product(args.targets or games, args.seeds, STAGES[args.stage], origins):
        if origin and (origin == games[env_id]) != (args.stage in ("self-transfer", "hybrid")):
            continue
        command = ["python", args.script, "--env-id", env_id, "--seed", str(seed), "--logdir", args.logdir]
        mine = found.get((mode, origin, games[env_id], seed), [])
        for flag, needed in needs.items():
            starts = sources.get((needed, "" if needed == "scratch" else origin, origin, seed), [])
            starts = [checkpoint(run) for run in starts if finished(run)]
            if not starts:
                missing[f"{origin}, {needed}, seed {seed}"], starts = True, [""]
            # A run that began from another network than these, a former one of the game, say, is another experiment
            names = [folder_name(path) for path in starts]
            mine = [run for run in mine if folder_name(run.flags[flag[2:].replace("-", "_")]) in names]
            command += [flag, starts[-1]]
        if mine and not any(map(finished, mine)):
            commands.append(["python", args.script, "--resume", checkpoint(mine[-1])])
        elif not mine:
            commands.append(command + ["--freeze-features"] * (mode == "only-head") + shlex.split(args.args))
    if missing:
        fail(f"--stage {args.stage}: --logdir {args.logdir} lacks {len(missing)} complete runs: {'; '.join(missing)}")
    print("".join(f"{shlex.join(command)}\n" for command in commands), end="")


# Pictures ------------------------------------------------------------------------------------------------------------
DIAGNOSTICS = ["eval/max_q", "eval/discounted_return", "eval/caught"]
DIAGNOSTICS += ["eval/v_minus_max_q", "eval/dead_units", "eval/feature_rank"]
PANELS = ["eval/max_q - eval/discounted_return", *DIAGNOSTICS[3:]]


def plot(args: Args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(name: str, write) -> None:
        path = os.path.join(args.out, re.sub(r"[^a-z0-9.-]+", "_", name.lower()))
        write(f"{path}.{os.getpid()}.tmp")
        os.replace(f"{path}.{os.getpid()}.tmp", path)
        pyplot.close("all")
        print(path)

    def write_curves(path: str) -> None:
        tags = [tag for tag in dict.fromkeys([args.metric, *DIAGNOSTICS]) if any(len(run.curves[tag]) for run in runs)]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["algorithm", "mode", "source", "target", "seed", "step", *tags])
            for run in runs:
                known = [dict(run.curves[tag]) for tag in tags]
                for step in sorted(set().union(*known)):
                    values = [f"{curve[step]:.6g}" if step in curve else "" for curve in known]
                    writer.writerow([run.algorithm, run.mode, run.source, run.target, run.seed, int(step), *values])

    def draw_matrix(algorithm: str, cells: list[dict]) -> None:
        rows, targets = list(dict.fromkeys(cell["from"] for cell in cells)), sorted({cell["target"] for cell in cells})
        values, size = np.full((len(rows), len(targets)), np.nan), (3.5 + 1.2 * len(targets), 1.5 + 0.6 * len(rows))
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        for cell in cells:
            y, x = rows.index(cell["from"]), targets.index(cell["target"])
            values[y, x] = cell["R"]
            text = f"{shown(cell, 'R', interval=False)}\nFT {shown(cell, 'FT', interval=False)}"
            text += "" if np.isnan(cell["published"]) else f"\n({cell['published']:+.3f})"
            colour = "white" if abs(cell["R"]) > 0.65 else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto"), extend="both", label="R")
        axes.set_xticks(range(len(targets)), targets)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel="to", ylabel="from", title=f"{algorithm}: area ratio R (published), forward transfer FT")
        save(f"matrix {algorithm}.png", lambda path: figure.savefig(path, dpi=100, format="png"))

    def draw_curves(title: str, arms: dict[str, list[Run]]) -> None:
        """Mean and range of the seeds of {label: runs}, a panel for each tag; equal arms look equal in all pictures."""
        everyone = [run for group in arms.values() for run in group]
        tags = [tag for tag in (args.metric, *PANELS) if any(len(run.curves[tag]) > 1 for run in everyone)]
        size = (4 * len(tags) + 2.5, 3.6)
        figure, panels = pyplot.subplots(1, len(tags), figsize=size, squeeze=False, layout="constrained")
        for (label, group), (panel, tag) in product(arms.items(), zip(panels[0], tags)):
            panel.set(xlabel="agent steps", ylabel=tag)
            panel.locator_params(axis="x", nbins=5)
            style, colour = styles.get(group[0].mode, "-."), colours[label if label in colours else group[0].source]
            if known := [run for run in group if len(run.curves[tag]) > 1]:
                grid, curves = on_grid(known, tag)
                panel.plot(grid, curves.mean(axis=0), style, color=colour, label=f"{label}, n = {len(known)}")
                panel.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.12, linewidth=0)
        figure.suptitle(f"{title}: mean and range of the seeds")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        save(f"curves {title}.png", lambda path: figure.savefig(path, dpi=100, format="png"))

    runs = finished_runs(args.logdir, args.metric, others=tuple(DIAGNOSTICS))
    styles, colours = {"scratch": "-", "fine-tuning": "-", "only-head": "--", "hybrid": ":"}, {"": "black"}
    for names in ({run.algorithm for run in runs}, {run.source for run in runs} - {""}):
        colours |= {name: f"C{i}" for i, name in enumerate(sorted(names))}
    os.makedirs(args.out, exist_ok=True)
    save("curves.csv", write_curves)
    for run in runs:
        estimate, outcome = run.curves["eval/max_q"], run.curves["eval/discounted_return"]
        known = len(estimate) == len(outcome)
        run.curves[PANELS[0]] = np.c_[estimate[:, 0], estimate[:, 1] - outcome[:, 1]] if known else estimate[:0]
    cells = all_cells(runs, args)
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells):
        draw_matrix(algorithm, [cell for cell in cells if cell["algorithm"] == algorithm])
    figures = defaultdict(lambda: defaultdict(list))  # {title: {label: runs}}
    for run in sorted(runs, key=lambda run: run.source):
        label = f"{run.mode} from {run.source}" if run.source else "from scratch"
        figures[f"{run.algorithm} on {run.target}"][label].append(run)
        if not run.source:
            figures[f"{run.target} from scratch"][run.algorithm].append(run)
    for title, arms in figures.items():
        if len(arms) > 1:
            draw_curves(title, arms)


if __name__ == "__main__":
    words = sys.argv[1:]
    for i, word in enumerate(words[:-1]):
        if word in ("--args", "--source-args"):  # their values begin with --, which would be taken for flags
            words[i : i + 2] = [f"{word}={words[i + 1]}", ""]
    args = tyro.cli(Args, args=[word for word in words if word], description="Transfer studies, from plan to picture.")
    {"plan": plan, "table": table, "scores": scores, "plot": plot}[args.command](args)
