# Area ratios, transfer matrices and score tables from the event files of ddqn_atari.py, dqv_atari.py and
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
import json
import os
import shlex
import struct
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Literal, NoReturn, Optional, Union

import numpy as np
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


@dataclass
class Plan:
    """Print the commands of a study, one a line; what is complete in --logdir is left out."""

    env_ids: list[str]
    """the games, as the script's --env-id"""
    stage: Literal["source", "transfer", "only-head", "self-transfer", "hybrid"]
    """from scratch; every game to every other, fine-tuned or only the head; to itself in both ways; hybrids of these"""
    targets: list[str] = field(default_factory=list)
    """the games among these to train on (none given: all), where games have budgets of their own"""
    script: str = "ddqn_atari.py"
    """the script to run"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """the seeds; a transfer run starts from the source of its own seed"""
    logdir: str = "runs"
    """folder of the runs"""
    args: str = ""
    """further flags of the script, in one string such as "--no-double --total-timesteps 200000" in quotes"""
    source_args: str = ""
    """flags of the runs to start from, where these are not --args; further flags of theirs do not matter"""


@dataclass
class Table:
    """Print the matrices of area ratios and the metrics of transfer."""

    logdir: str = "runs"
    """folder of the runs; it is searched at any depth"""
    metric: str = "eval/episodic_return"
    """TensorBoard tag of the learning curve"""
    baseline: Literal["none", "random", "min"] = "none"
    """what the curves are shifted by before areas are taken: nothing (the papers'), random play, the lowest value"""
    threshold: float = 0.9
    """time to threshold: the first step with this share of what scratch gained, from its start to its end"""
    format: Literal["markdown", "csv", "json"] = "markdown"
    """tables to read, or one row a cell with all that is known of it"""


@dataclass
class Scores:
    """Print the table of games: the last evaluations beside the published scores."""

    logdir: str = "runs"
    """folder of the runs; it is searched at any depth"""
    format: Literal["markdown", "csv", "json"] = "markdown"
    """a table to read, or one row per game and algorithm"""


@dataclass
class Plot:
    """Draw the matrices and the learning curves of every target, and write the curves to a CSV."""

    logdir: str = "runs"
    """folder of the runs; it is searched at any depth"""
    metric: str = "eval/episodic_return"
    """TensorBoard tag of the learning curve"""
    baseline: Literal["none", "random", "min"] = "none"
    """as in `table`"""
    out: str = "results"
    """folder for the pictures and curves.csv"""


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
        PUBLISHED |= {
            (_algorithm, "fine-tuning", _source, _target): float(_cell)
            for _target, _cell in zip(_targets, _cells) if _cell != "-"
        }  # fmt: skip
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
MISPRINT = ("CrazyClimber", "DQV-Max")  # as printed; 100,131 is likely, since the text says that others are better
# Catch has no published random score: these are exact, by enumeration of all starts
RANDOM = {game: scores[0] for game, scores in SCORES.items()} | {
    "Catch-v0": 0.247, "Catch-v1": 0.150, "Catch-v2": 0.247, "Catch-v3": 0.247,
}  # fmt: skip


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def skip(path: str, reason: str) -> None:
    print(f"skipped {path}: {reason}", file=sys.stderr)


# Reading runs --------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    folder: str
    flags: dict[str, str]
    """the hyper-parameters that the run logged"""
    steps: np.ndarray
    """agent steps int64 `(points,)` of the metric, ascending"""
    values: np.ndarray
    """the metric, float64 `(points,)`"""
    last_step: int
    """of any scalar"""
    algorithm: str = ""
    target: str = ""
    source: str = ""
    mode: str = "scratch"
    seed: int = 0


def read_events(path: str, tag: str) -> tuple[np.ndarray, np.ndarray, dict[str, str], Optional[int], int]:
    """Steps and values of scalar `tag`, the logged hyper-parameters, the purge step of a resumed run, the last step.

    TensorBoard's reader takes 1 s for 10,000 points, this 0.05 s, one file in memory at a time: it walks the records
    (length, CRC, data, CRC), stops at a cut one, and decodes the bytes that TensorBoard's writers put around a scalar
    all at once.
    Raises ValueError when the file does not begin as an event file does.
    """
    with open(path, "rb") as file:
        buffer = file.read()
    name, length = tag.encode(), struct.Struct("<Q").unpack_from
    flags, purge, bounds, last = {}, None, [], b""
    position = count = 0
    while position + 12 <= len(buffer):
        start, end = position + 12, position + 12 + length(buffer, position)[0]
        if end + 4 > len(buffer):
            break  # cut off, or still being written
        place = buffer.find(name, start, end)
        if place > 0:
            bounds.append((start, place, end))
        elif count < 10:
            event = parse(buffer[start:end])
            if count == 0 and not (event and event.file_version.startswith("brain.Event")):
                raise ValueError("not an event file")
            if event and event.session_log.status == SessionLog.START:
                purge = event.step
            for value in event.summary.value if event else ():
                if value.tag == "hyperparameters/text_summary":
                    rows = value.tensor.string_val[0].decode().splitlines()[2:]
                    flags |= dict(row.strip("|").split("|", 1) for row in rows)
        position, count, last = end + 4, count + 1, (start, end)
    if not count:
        raise ValueError("an empty event file" if not buffer else "not an event file")
    last_step = getattr(parse(buffer[slice(*last)]), "step", 0)
    starts, places, ends = np.array(bounds, np.int64).reshape(-1, 3).T
    data = np.frombuffer(buffer, np.uint8)
    exact = data[places - 1] == len(name)  # the length stands before a string: no longer tag that begins the same
    starts, places, ends = starts[exact], places[exact], ends[exact]
    # wall time, step, summary; the value is a float of 4 bytes
    plain = (data[starts] == 0x09) & (data[starts + 9] == 0x10) & (data[places + len(name)] == 0x15)
    varint = data[starts[:, None] + np.arange(10, 16)].astype(np.int64)
    digits = np.cumprod(np.concatenate([np.ones((len(starts), 1), np.int64), varint[:, :-1] >> 7], axis=1), axis=1)
    steps = (((varint & 0x7F) << (7 * np.arange(6))) * digits).sum(axis=1)
    values = data[(places + len(name) + 1)[:, None].clip(max=len(data) - 4) + np.arange(4)].view("<f4")[:, 0]
    values = values.astype(np.float64)
    for i in np.flatnonzero(~plain):  # step 0 is left out, other writers
        event = parse(buffer[starts[i] : ends[i]])
        scalars = [value for value in event.summary.value if value.tag == tag] if event else []
        steps[i] = event.step if scalars else 0
        values[i] = (scalars[0].tensor.float_val or [scalars[0].simple_value])[0] if scalars else np.nan
    kept = ~np.isnan(values)
    return steps[kept], values[kept], flags, purge, last_step


def parse(record: bytes) -> Optional[Event]:
    try:
        return Event.FromString(record)
    except Exception:  # noqa: BLE001  protobuf's own class of errors differs between its versions
        return None


def read_run(folder: str, metric: str) -> Union[Run, str]:
    """The run in `folder`, or in words why there is none."""
    run, problems = Run(folder, {}, np.zeros(0, np.int64), np.zeros(0), 0), []
    for name in sorted(name for name in os.listdir(folder) if "tfevents" in name):
        try:
            steps, values, flags, purge, last_step = read_events(os.path.join(folder, name), metric)
        except ValueError as error:
            problems.append(f"{name} is {error}")
            continue
        except OSError as error:
            problems.append(f"{name} cannot be read, {error.strerror}")
            continue
        kept = slice(None) if purge is None else run.steps < purge
        run.steps, run.values = np.append(run.steps[kept], steps), np.append(run.values[kept], values)
        run.flags, run.last_step = run.flags | flags, last_step
    if problems and not run.flags:
        return problems[0]
    if not {"env_id", "seed", "exp_name"} <= set(run.flags):
        return "it has logged no hyper-parameters with env_id, seed and exp_name"
    order = np.argsort(run.steps, kind="stable")
    run.steps, run.values = run.steps[order], run.values[order]
    names = {"ddqn_atari": "DDQN", "dqv_atari": "DQV", "dqv_max_atari": "DQV-Max"}
    run.algorithm = run.flags.get("algorithm") or names.get(run.flags["exp_name"], run.flags["exp_name"])
    if run.algorithm == "DDQN" and run.flags.get("double") == "False":
        run.algorithm = "DQN"
    run.target, run.seed = game(run.flags["env_id"]), int(run.flags["seed"])
    if run.flags.get("pretrained", "None") != "None":
        run.source = game(run.flags.get("pretrained_env_id", "unknown"))
        run.mode = "hybrid" if run.flags.get("pretrained_head", "None") != "None" else "fine-tuning"
        if run.mode == "fine-tuning":
            run.mode = "only-head" if run.flags.get("freeze_features") == "True" else run.mode
            run.mode += ", head kept" if run.flags.get("keep_head") == "True" else ""
    return run


def game(env_id: str) -> str:
    """`Pong` of ALE/Pong-v5, `Catch-v0` of catch_env:Catch-v0."""
    name = env_id.split("/")[-1].split(":")[-1]
    return name.removesuffix("-v5") if env_id.startswith("ALE/") else name


def read_runs(logdir: str, metric: str) -> list[Run]:
    """All runs below `logdir`; what is none is named on stderr."""
    if not os.path.isdir(logdir):
        fail(f"--logdir {logdir}: there is no such folder")
    folders = [folder for folder, _, names in os.walk(logdir) if any("tfevents" in name for name in names)]
    folders.sort(key=lambda folder: (os.path.getmtime(folder), folder))
    metrics = [metric] * len(folders)
    if len(folders) > 20:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(read_run, folders, metrics, chunksize=4))
    else:
        found = list(map(read_run, folders, metrics))
    runs = []
    for folder, run in zip(folders, found):
        if isinstance(run, Run):
            runs.append(run)
        else:
            skip(folder, run)
    return runs


def total(run: Run) -> int:
    return int(run.flags.get("total_timesteps", 0))


def finished_runs(logdir: str, metric: str, points: int = 2) -> list[Run]:
    """The runs that a table may use: complete, with the metric, one per cell and seed (the newest)."""
    cells = {}
    for run in read_runs(logdir, metric):
        if run.last_step < 0.99 * total(run):  # other programs log their last point a little before the end
            skip(run.folder, f"incomplete, {run.last_step:,} of {total(run):,} steps")
        elif len(run.steps) < points:
            skip(run.folder, f"it has {len(run.steps)} points of {metric}, at least {points} are needed")
        elif run.mode != "scratch" and run.source == "unknown":
            skip(run.folder, "it does not say on which game its --pretrained network was trained")
        else:
            key = (run.algorithm, run.mode, run.source, run.target, run.seed)
            if key in cells:
                skip(cells[key].folder, f"the same experiment and seed as {run.folder}, which is newer")
            cells[key] = run
    if not cells:
        fail(f"--logdir {logdir}: no complete run with {metric} in it")
    return list(cells.values())


# Areas and metrics ---------------------------------------------------------------------------------------------------
# What may differ between the runs of a cell: it does not change what is learned, or is the cell itself
FREE = {
    "algorithm", "exp_name", "seed", "cuda", "cudagraphs", "torch_deterministic", "logdir", "track",
    "wandb_project_name", "wandb_entity", "capture_video", "buffer_device", "save_buffer", "checkpoint_frequency",
    "eval_frequency", "resume", "evaluate", "pretrained", "pretrained_env_id", "pretrained_head", "keep_head",
    "freeze_features",
}  # fmt: skip
RESAMPLES = 10_000


def on_grid(runs: list[Run], grid: np.ndarray) -> np.ndarray:
    """The curves `(runs, points)` by linear interpolation."""
    return np.stack([np.interp(grid, run.steps, run.values) for run in runs])


def areas(curves: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Areas under `(runs, points)` by the trapezoidal rule `(runs,)`."""
    return ((curves[:, 1:] + curves[:, :-1]) / 2 * np.diff(grid)).sum(axis=1)


def area_ratio(with_transfer: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """(area with transfer - area from scratch) / area from scratch, of mean areas over the last axis."""
    return with_transfer.mean(axis=-1) / scratch.mean(axis=-1) - 1


def same_settings(runs: list[Run], what: str) -> None:
    """End with one line when the runs of a cell were not made under the same conditions."""
    for name in sorted({name for run in runs for name in run.flags} - FREE):
        found = {run.flags.get(name, "not logged"): run.folder for run in reversed(runs)}
        if len(found) > 1:
            listed = ", ".join(f"{value} ({folder})" for value, folder in found.items())
            fail(f"{what}: the runs differ in {name}: {listed}; move one kind to another folder")


def compare(scratch: list[Run], transfer: list[Run], args: Union[Table, Plot]) -> dict:
    """All that is known of a cell: area ratio and interval, the metrics of Taylor and Stone (2009), notes."""
    first = transfer[0]
    cell = {"algorithm": first.algorithm, "mode": first.mode, "source": first.source, "target": first.target}
    cell |= {
        "n_transfer": len(transfer),
        "n_scratch": len(scratch),
        "ratio": None,
        "low": None,
        "high": None,
        "note": "",
    }
    cell["published"] = PUBLISHED.get((first.algorithm, first.mode, first.source, first.target))
    if not scratch:
        return cell | {"note": f"no run from scratch on {first.target}"}
    same_settings(scratch + transfer, f"{first.algorithm}, {first.source} to {first.target}")
    begin, end = (pick(run.steps[i] for run in scratch + transfer) for pick, i in ((max, 0), (min, -1)))
    if begin >= end:
        return cell | {"note": "the runs have no steps in common"}
    grid = np.unique(np.concatenate([run.steps for run in scratch + transfer] + [[begin, end]]))
    grid = grid[(grid >= begin) & (grid <= end)].astype(np.float64)
    s, t = on_grid(scratch, grid), on_grid(transfer, grid)
    if args.baseline == "random" and first.target not in RANDOM:
        return cell | {"note": f"the score of random play is not known for {first.target}"}
    shift = {"none": 0.0, "random": RANDOM.get(first.target), "min": min(s.min(), t.min())}[args.baseline]
    a_s, a_t = areas(s - shift, grid), areas(t - shift, grid)
    pairs = [run.seed for run in scratch] == [run.seed for run in transfer]
    rng = np.random.default_rng(0)
    picks = [rng.integers(len(area), size=(RESAMPLES, len(area))) for area in (a_s, a_t)]
    a_s_again, a_t_again = a_s[picks[0]], a_t[picks[0] if pairs else picks[1]]
    if a_s.mean() <= 0:
        cell["note"] = f"the area from scratch, {a_s.mean():.4g}, is not positive: --baseline random or min"
    elif a_s.mean() < 0.01 * abs(a_t.mean()):  # a game hardly ever won: nothing to divide by
        cell["note"] = (
            f"the area from scratch, {a_s.mean():.4g}, is next to nothing beside {a_t.mean():.4g} with transfer"
        )
    else:
        cell["ratio"] = float(area_ratio(a_t, a_s))
        if min(len(scratch), len(transfer)) > 1 and (a_s_again.mean(axis=1) > 0).all():
            low, high = np.percentile(area_ratio(a_t_again, a_s_again), [2.5, 97.5])
            cell |= {"low": float(low), "high": float(high)}
    width, late = grid[-1] - grid[0], grid >= grid[0] + 0.9 * (grid[-1] - grid[0])
    start, finish = s[:, 0].mean(), s[:, late].mean()
    level = start + getattr(args, "threshold", 0.9) * (finish - start)

    def time_to(level: float, curve: np.ndarray) -> Optional[float]:
        reached = np.flatnonzero(curve >= level)
        return float(grid[reached[0]]) if len(reached) else None

    return cell | {
        "jumpstart": float(t[:, 0].mean() - start), "asymptotic": float(t[:, late].mean() - finish),
        "threshold": float(level), "time_to_threshold": time_to(level, t.mean(axis=0)),
        "time_to_threshold_scratch": time_to(level, s.mean(axis=0)),
        "total_reward": float((a_t.mean() - a_s.mean()) / width),
        "mean_transfer": float(a_t.mean() / width), "mean_scratch": float(a_s.mean() / width),
        "first_step": int(grid[0]), "last_step": int(grid[-1]), "baseline": args.baseline,
    }  # fmt: skip


def all_cells(args: Union[Table, Plot]) -> tuple[list[dict], list[Run]]:
    """Every comparison that the runs below --logdir allow."""
    groups = defaultdict(list)
    runs = sorted(finished_runs(args.logdir, args.metric), key=lambda run: run.seed)
    for run in runs:
        groups[run.algorithm, run.mode, run.source, run.target].append(run)
    cells = []
    for (algorithm, mode, _, target), transfer in sorted(groups.items()):
        if mode != "scratch":
            cells.append(compare(groups.get((algorithm, "scratch", "", target), []), transfer, args))
    return cells, runs


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z = 1.959964
    centre, spread = count + z * z / 2, z * (count * (n - count) / n + z * z / 4) ** 0.5
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def share_of_negative(ratios: list[float]) -> str:
    negative = sum(ratio < 0 for ratio in ratios)
    low, high = wilson(negative, len(ratios))
    return f"{negative} of {len(ratios)} ({negative / len(ratios):.0%}, 95 % interval {low:.0%} to {high:.0%})"


# Printing ------------------------------------------------------------------------------------------------------------
def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def write_rows(rows: list[dict], format: str) -> None:
    """`rows` as CSV or JSON on stdout."""
    if format == "json":
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        writer = csv.DictWriter(
            sys.stdout, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def shown(cell: dict) -> str:
    """Ratio, * where its interval excludes 0, interval, number of seeds, published value."""
    text = "n/a †" if cell["ratio"] is None else f"{cell['ratio']:+.3f}"
    if cell["low"] is not None:
        text += "*" * (cell["low"] > 0 or cell["high"] < 0) + f" [{cell['low']:+.2f}, {cell['high']:+.2f}]"
    text += f" n={cell['n_transfer']}" + f"/{cell['n_scratch']}" * (cell["n_transfer"] != cell["n_scratch"])
    return text + (f" (published {cell['published']:+.3f})" if cell["published"] is not None else "")


def table(args: Table) -> None:
    cells, _ = all_cells(args)
    if not cells:
        fail(f"--logdir {args.logdir}: no run with --pretrained in it, there is nothing to compare")
    if args.format != "markdown":
        return write_rows(cells, args.format)
    print(
        f"Area ratios of {args.metric}, baseline {args.baseline}: mean over seeds [95 % bootstrap interval] (* excludes"
        " 0) n seeds (with transfer/from scratch where they differ).\n"
    )
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells):
        mine = [cell for cell in cells if cell["algorithm"] == algorithm]
        for mode in dict.fromkeys(cell["mode"] for cell in mine):
            pairs = {(c["source"], c["target"]): c for c in mine if c["mode"] == mode and c["source"] != c["target"]}
            if not pairs:
                continue
            targets, sources = (sorted({pair[i] for pair in pairs}) for i in (1, 0))
            print(f"### {algorithm}, {mode}: source (rows) to target (columns)\n")
            rows = [[s, *(shown(pairs[s, t]) if (s, t) in pairs else "–" for t in targets)] for s in sources]
            print(markdown(["", *targets], rows) + "\n")
            known = [cell for cell in pairs.values() if cell["ratio"] is not None]
            if known:
                print(f"Negative: {share_of_negative([cell['ratio'] for cell in known])}.", end=" ")
            published = [r for (a, m, s, t), r in PUBLISHED.items() if (a, m) == (algorithm, mode) and s != t]
            if any(cell["published"] is not None for cell in pairs.values()):  # of these games, not of others
                print(f"Published: {share_of_negative(published)}.", end="")
            print("\n")
        own = {(cell["mode"], cell["target"]): cell for cell in mine if cell["source"] == cell["target"]}
        if own:
            games = sorted({target for _, target in own})
            modes = sorted({mode for mode, _ in own}, key="only-head fine-tuning hybrid".find)
            print(f"### {algorithm}, self-transfer\n")
            rows = [[mode, *(shown(own[mode, g]) if (mode, g) in own else "–" for g in games)] for mode in modes]
            print(markdown(["", *games], rows) + "\n")
        print(f"### {algorithm}, metrics of transfer (with transfer minus from scratch)\n")
        rows = []
        for cell in [cell for cell in mine if "jumpstart" in cell]:
            times = [
                "never" if cell[k] is None else f"{cell[k]:,.0f}"
                for k in ("time_to_threshold", "time_to_threshold_scratch")
            ]
            # rounded first: of equal float32s, which the log holds, means may differ in the eighth digit
            gains = [f"{round(cell[k], 6):+.4g}" for k in ("jumpstart", "asymptotic", "total_reward")]
            when = f"{times[0]} / {times[1]} (to {cell['threshold']:.4g})"
            rows.append([cell["source"], cell["target"], cell["mode"], *gains, when])
        head = ["source", "target", "mode", "jumpstart", "asymptotic", "total reward, mean over the curve"]
        print(markdown([*head, "steps to threshold, transfer / scratch"], rows) + "\n")
    for cell in [cell for cell in cells if cell["note"]]:
        print(f"† {cell['algorithm']}, {cell['source']} to {cell['target']}, {cell['mode']}: {cell['note']}")


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half over the last axis, as `scipy.stats.trim_mean(values, 0.25)`."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def scores(args: Scores) -> None:
    groups = defaultdict(list)
    for run in finished_runs(args.logdir, "eval/episodic_return", points=1):
        if run.mode == "scratch":
            groups[run.algorithm, run.target].append(run)
    if not groups:
        fail(f"--logdir {args.logdir}: no run from scratch in it")
    rng, rows, normalised = np.random.default_rng(0), [], defaultdict(list)
    for (algorithm, target), runs in sorted(groups.items()):
        same_settings(runs, f"{algorithm} on {target}")
        final = np.array([run.values[-1] for run in runs])
        again = final[rng.integers(len(final), size=(RESAMPLES, len(final)))].mean(axis=1)
        low, high = np.percentile(again, [2.5, 97.5]).tolist() if len(final) > 1 else (None, None)
        row = {"algorithm": algorithm, "game": target, "score": final.mean().item(), "low": low, "high": high}
        row |= {"n": len(final), "human_normalised": None} | dict(zip(COLUMNS, SCORES.get(target, [None] * 6)))
        if target in SCORES:
            shares = (final - row["random"]) / (row["human"] - row["random"])
            row["human_normalised"] = shares.mean().item()
            normalised[algorithm].append(shares)
        rows.append(row)
    if args.format != "markdown":
        return write_rows(rows, args.format)
    ours = {(row["algorithm"], row["game"]): row for row in rows}
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    lines = []
    for target in [*SCORES, *sorted({row["game"] for row in rows} - set(SCORES))]:
        published = [f"{score:,}" for score in SCORES.get(target, ())] or ["–"] * len(COLUMNS)
        if target == MISPRINT[0]:
            published[COLUMNS.index(MISPRINT[1])] += " ‡"
        cells = []
        for row in (ours.get((algorithm, target)) for algorithm in algorithms):
            text = f"{row['score']:,.2f}" if row else "–"
            text += f" [{row['low']:,.2f}, {row['high']:,.2f}]" if row and row["low"] is not None else ""
            text += f" n={row['n']}" if row else ""
            cells.append(text + (f", {row['human_normalised']:.0%}" if row and target in SCORES else ""))
        lines.append([target, *published, *cells])
    print(
        "Last evaluations from scratch: mean over seeds [95 % bootstrap interval] n seeds, human-normalised by the\n"
        "random and human scores of Mnih et al. (Nature 2015), the first columns; the next are the published scores.\n"
    )
    print(markdown(["", *COLUMNS, *(f"{algorithm}, ours" for algorithm in algorithms)], lines) + "\n")
    for algorithm, games in normalised.items():
        again = [shares[rng.integers(len(shares), size=(RESAMPLES, len(shares)))] for shares in games]
        low, high = np.percentile(interquartile_mean(np.concatenate(again, axis=1)), [2.5, 97.5])
        iqm = interquartile_mean(np.concatenate(games))
        print(f"{algorithm}: interquartile mean of the human-normalised scores of all runs {iqm:.3f} "
              f"[{low:.3f}, {high:.3f}] (stratified bootstrap), {len(games)} of {len(SCORES)} games")  # fmt: skip
    print("‡ as printed; 100,131 is likely: the text lists this game among those where DQV-Max is not the best")


# Planning ------------------------------------------------------------------------------------------------------------
def wanted_flags(text: str) -> dict[str, str]:
    """{hyper-parameter: value} of flags as given on a command line; `--no-x` is x False."""
    words, flags = shlex.split(text), {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
            switched_off = name.startswith("no-") and not value and not following
            flags[name.removeprefix("no-" if switched_off else "").replace("-", "_")] = (
                "False" if switched_off else value or following or "True"
            )
    return flags


def equal(one: str, other: str) -> bool:
    try:
        return float(one.replace("_", "")) == float(other.replace("_", ""))
    except ValueError:
        return one == other


def plan(args: Plan) -> None:
    script, extra = os.path.splitext(os.path.basename(args.script))[0], wanted_flags(args.args)
    for name in ("env_id", "seed", "logdir", "pretrained", "pretrained_head", "freeze_features"):
        if name in extra:
            fail(f"--args: the plan sets --{name.replace('_', '-')} itself")
    runs = list(read_runs(args.logdir, "eval/episodic_return")) if os.path.isdir(args.logdir) else []

    def find(wanted: dict) -> dict:
        """The runs with these flags: {(mode, source, target, seed): [(checkpoint, complete, sources' folders)]}."""
        found = defaultdict(list)
        for run in runs:
            flags = {"double": "True"} | wanted
            flags = flags if "double" in run.flags else {name: flags[name] for name in flags if name != "double"}
            as_wanted = all(equal(run.flags.get(name, ""), value) for name, value in flags.items())
            checkpoint = os.path.join(run.folder, f"{run.flags['exp_name']}.pt")
            if as_wanted and run.flags["exp_name"] == wanted.get("exp_name", script) and os.path.isfile(checkpoint):
                starts = [run_of(run.flags[name]) for name in ("pretrained", "pretrained_head") if name in run.flags]
                complete = len(run.steps) > 0 and run.steps[-1] >= total(run)
                found[run.mode, run.source, run.target, run.seed].append((checkpoint, complete, starts))
        return found

    def run_of(checkpoint: str) -> str:
        """The name of its run's folder, which stays when --logdir is moved."""
        return os.path.basename(os.path.dirname(checkpoint))

    found = find(extra)
    sources = find(wanted_flags(args.source_args)) if args.source_args else found
    sources = {key: [checkpoint for checkpoint, complete, _ in runs if complete] for key, runs in sources.items()}
    experiments, games = [], {env_id: game(env_id) for env_id in args.env_ids}
    if len(set(games.values())) < len(args.env_ids):
        fail("--env-ids: a game is named twice")
    unknown = [env_id for env_id in args.targets if env_id not in games]
    if unknown:
        fail(f"--targets {unknown[0]}: not one of --env-ids {' '.join(games)}")
    for env_id, seed in product(args.targets or args.env_ids, args.seeds):
        if args.stage == "source":
            experiments.append((("scratch", "", games[env_id], seed), env_id, seed, {}))
        elif args.stage in ("transfer", "only-head"):
            mode = "only-head" if args.stage == "only-head" else "fine-tuning"
            for source in [name for name in games.values() if name != games[env_id]]:
                needs = {"--pretrained": ("scratch", "", source, seed)}
                experiments.append(((mode, source, games[env_id], seed), env_id, seed, needs))
        elif args.stage == "self-transfer":
            for mode in ("fine-tuning", "only-head"):
                needs = {"--pretrained": ("scratch", "", games[env_id], seed)}
                experiments.append(((mode, games[env_id], games[env_id], seed), env_id, seed, needs))
        else:
            needs = {f: (m, games[env_id], games[env_id], seed)
                     for f, m in (("--pretrained", "fine-tuning"), ("--pretrained-head", "only-head"))}  # fmt: skip
            experiments.append((("hybrid", games[env_id], games[env_id], seed), env_id, seed, needs))
    needed = dict.fromkeys(key for _, _, _, needs in experiments for key in needs.values())
    missing = [key for key in needed if not sources.get(key)]
    if missing:
        listed = "; ".join(f"{target}, {mode}, seed {seed}" for mode, _, target, seed in missing)
        fail(
            f"--stage {args.stage}: --logdir {args.logdir} lacks {len(missing)} checkpoints of complete runs: {listed}"
        )
    for key, env_id, seed, needs in experiments:
        # A run that began from another network than these sources, a former one of the game, say, is another experiment
        allowed = [{run_of(checkpoint) for checkpoint in sources[needed_key]} for needed_key in needs.values()]
        mine = [run for run in found.get(key, ()) if all(start in ok for start, ok in zip(run[2], allowed))]
        checkpoint, complete, _ = max(reversed(mine), key=lambda run: run[1], default=("", False, []))
        command = ["python", args.script]
        if checkpoint and not complete:
            print(shlex.join([*command, "--resume", checkpoint]))
        elif not complete:
            command += ["--env-id", env_id, "--seed", str(seed), "--logdir", args.logdir]
            command += [word for flag, needed_key in needs.items() for word in (flag, sources[needed_key][-1])]
            command += ["--freeze-features"] if key[0] == "only-head" else []
            print(shlex.join(command + shlex.split(args.args)))


# Pictures ------------------------------------------------------------------------------------------------------------
def plot(args: Plot) -> None:
    try:
        import matplotlib
    except ImportError:
        fail("plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells, runs = all_cells(args)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "curves.csv.tmp"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algorithm", "mode", "source", "target", "seed", "step", args.metric])
        for run in runs:
            head = [run.algorithm, run.mode, run.source, run.target, run.seed]
            writer.writerows([*head, step, f"{value:.6g}"] for step, value in zip(run.steps, run.values))
    os.replace(os.path.join(args.out, "curves.csv.tmp"), os.path.join(args.out, "curves.csv"))

    def save(figure, name: str) -> None:
        path = os.path.join(args.out, f"{name}.png".replace(" ", "_").replace(",", "").lower())
        figure.savefig(path + ".tmp", dpi=100, format="png")
        os.replace(path + ".tmp", path)
        pyplot.close(figure)
        print(path)

    for algorithm, mode in dict.fromkeys((cell["algorithm"], cell["mode"]) for cell in cells):
        pairs = {(c["source"], c["target"]): c for c in cells if (c["algorithm"], c["mode"]) == (algorithm, mode)}
        sources, targets = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
        values = np.full((len(sources), len(targets)), np.nan)
        figure, axes = pyplot.subplots(
            figsize=(2.5 + 1.1 * len(targets), 1.8 + 0.7 * len(sources)), layout="constrained"
        )
        for (source, target), cell in pairs.items():
            y, x = sources.index(source), targets.index(target)
            values[y, x] = np.nan if cell["ratio"] is None else cell["ratio"]
            text = "n/a" if cell["ratio"] is None else f"{cell['ratio']:+.2f}"
            if cell["low"] is not None and (cell["low"] > 0 or cell["high"] < 0):
                text += "*"
            text += "" if cell["published"] is None else f"\n({cell['published']:+.2f})"
            dark = abs(np.nan_to_num(values[y, x])) > 0.65
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        picture = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(targets)), targets, rotation=30, ha="right")
        axes.set_yticks(range(len(sources)), sources)
        known = any(cell["published"] is not None for cell in pairs.values())
        title = f"{algorithm}, {mode}: area ratio" + " (published)" * known
        axes.set(xlabel="target", ylabel="source", title=title)
        figure.colorbar(picture, extend="both")
        save(figure, f"matrix {algorithm} {mode}")
    for algorithm, target in dict.fromkeys((run.algorithm, run.target) for run in runs):
        mine = [run for run in runs if (run.algorithm, run.target) == (algorithm, target)]
        figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
        for mode, source in sorted(
            {(run.mode, run.source) for run in mine}, key=lambda kind: (kind[0] != "scratch", kind)
        ):
            group = [run for run in mine if (run.mode, run.source) == (mode, source)]
            grid = np.unique(np.concatenate([run.steps for run in group])).astype(np.float64)
            grid = grid[(grid >= max(run.steps[0] for run in group)) & (grid <= min(run.steps[-1] for run in group))]
            curves = on_grid(group, grid)
            mean, picks = curves.mean(axis=0), np.random.default_rng(0).integers(len(group), size=(1_000, len(group)))
            low, high = np.percentile(curves[picks].mean(axis=1), [2.5, 97.5], axis=0)
            name = "from scratch" if mode == "scratch" else f"{mode} from {source}"
            (line,) = axes.plot(
                grid, mean, label=f"{name}, n = {len(group)}", color="black" if mode == "scratch" else None
            )
            axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="agent steps", ylabel=args.metric, title=f"{algorithm} on {target}")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))  # not over the curves
        save(figure, f"curves {algorithm} {target}")


if __name__ == "__main__":
    Commands = Union[
        Annotated[Plan, tyro.conf.subcommand("plan")],
        Annotated[Table, tyro.conf.subcommand("table")],
        Annotated[Scores, tyro.conf.subcommand("scores")],
        Annotated[Plot, tyro.conf.subcommand("plot")],
    ]
    words = sys.argv[1:]
    for flag in ("--args", "--source-args"):  # their values begin with --, which would be taken for flags
        if flag in words[:-1]:
            place = words.index(flag)
            words[place : place + 2] = [f"{flag}={words[place + 1]}"]
    args = tyro.cli(Commands, args=words, description="Area ratios, transfer matrices and scores from event files.")
    {Plan: plan, Table: table, Scores: scores, Plot: plot}[type(args)](args)
