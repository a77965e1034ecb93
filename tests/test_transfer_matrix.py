"""Area ratios on curves that can be integrated by hand and on the author's own; reading, planning, printing."""

import csv
import io
import json
import shlex
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import transfer_matrix as tm
from conftest import ROOT, run, scalars
from torch.utils.tensorboard import SummaryWriter

DATA = Path(__file__).parent / "data"
METRIC = "eval/episodic_return"


def write(logdir, env_id, steps, values, seed=1, exp_name="ddqn_atari", metric=METRIC, **flags):
    """An event file as the Atari scripts write it; returns its folder."""
    flags = {
        "env_id": env_id,
        "seed": seed,
        "exp_name": exp_name,
        "double": True,
        "total_timesteps": int(max(steps)),
    } | flags
    folder = Path(logdir) / f"{len(list(Path(logdir).glob('*'))):04d}"
    with SummaryWriter(folder) as writer:
        rows = "\n".join(f"|{name}|{value}|" for name, value in flags.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        for step, value in zip(steps, values):
            writer.add_scalar(f"{metric}_std", 9.0, int(step))  # a tag that begins like the metric
            writer.add_scalar(metric, float(value), int(step))
    return folder


def pretrained(env_id):
    return {"pretrained": "source.pt", "pretrained_env_id": env_id}


def cells(logdir, *flags, **kwargs):
    out = run("transfer_matrix.py", "table", "--logdir", logdir, "--format", "json", *flags, cwd=ROOT, **kwargs).stdout
    return {(cell["mode"], cell["source"], cell["target"]): cell for cell in json.loads(out)}


# ---------------------------------------------------------------------------------------------- the author's own data


def author(name):
    head, *rows = (line.split() for line in (DATA / name).read_text().splitlines())
    return dict(zip(head, np.array(rows, float).T))


def test_the_author_s_curves_give_the_published_tables(tmp_path):
    ours = {"Catch_v0": "Catch-v0", "Catch_v2": "Catch-v2", "Catch_v3": "Catch-v3", "Catch_v4": "Catch-v1"}
    flags = {"exp_name": "ddqn_atari", "double": False, "algorithm": "DDQN"}
    for version in range(4):
        curves, target = author(f"catch_v{version}.dat"), f"catch_env:Catch-v{version}"
        write(tmp_path, target, curves["epochs"], curves["target_catch"], **flags)
        for column, source in ours.items():
            if column in curves:
                write(tmp_path, target, curves["epochs"], curves[column], **flags, **pretrained(f"catch_env:{source}"))
    for version in (0, 1):
        curves, target = author(f"self_transfer_catch_v{version}.dat"), f"catch_env:Catch-v{version}"
        head, fine = curves["only_head"], curves["self_transfer_full_fine_tuning"]
        write(tmp_path, target, curves["epochs"], head, freeze_features=True, **flags, **pretrained(target))
        write(tmp_path, target, curves["epochs"], fine, **flags, **pretrained(target))
    found = cells(tmp_path)
    assert len(found) == 12 + 4 and {cell["algorithm"] for cell in found.values()} == {"DQN"}
    for (mode, source, target), cell in found.items():
        assert cell["published"] == tm.PUBLISHED["DQN", mode, source, target]
        # the published figure of Catch-v1, only-head, is 0.0012 off the curve it was taken from
        tolerance = 0.0015 if (mode, target) == ("only-head", "Catch-v1") else 0.001
        assert cell["ratio"] == pytest.approx(cell["published"], abs=tolerance), (mode, source, target)
    shown = run("transfer_matrix.py", "table", "--logdir", tmp_path, cwd=ROOT).stdout
    assert "| Catch-v3 | -0.406 n=1 (published -0.406) | -0.465 n=1 (published -0.465) |" in shown
    assert "### DQN, self-transfer" in shown and "| only-head | +0.050 n=1 (published +0.050) |" in shown
    assert "Negative: 12 of 12 (100%" in shown and "Published: 12 of 12 (100%" in shown


def test_the_catch_study_s_tables_follow_from_its_curves(tmp_path):
    """What results/catch and README show is what the CSV of all runs says."""
    results = ROOT / "results/catch"
    command = [sys.executable, results / "restore.py", results / "curves.csv", tmp_path / "runs"]
    subprocess.run(command, check=True, capture_output=True)
    shown = run("transfer_matrix.py", "table", "--logdir", tmp_path / "runs", cwd=ROOT).stdout
    assert shown == (results / "table.md").read_text()
    out = run("transfer_matrix.py", "table", "--logdir", tmp_path / "runs", "--format", "json", cwd=ROOT).stdout
    readme = (ROOT / "README.md").read_text().split("**Transfer between Catch games**")[1].split("\n**")[0]
    ratios = [cell["ratio"] for cell in json.loads(out) if cell["ratio"] is not None]
    assert len(ratios) > 40
    assert [ratio for ratio in ratios if f"{ratio:+.3f}" not in readme] == []


def test_the_published_tables_are_those_of_the_slides():
    for algorithm, negative in (("DQV", 62), ("DDQN", 54)):  # 69 % and 60 % of 90 cells
        ratios = [ratio for (name, _, source, target), ratio in tm.PUBLISHED.items() if name == algorithm]
        assert len(ratios) == 90 and sum(ratio < 0 for ratio in ratios) == negative
    assert np.median([r for (a, *_), r in tm.PUBLISHED.items() if a == "DQV"]) == pytest.approx(-0.127, abs=0.001)
    assert np.median([r for (a, *_), r in tm.PUBLISHED.items() if a == "DDQN"]) == pytest.approx(-0.017, abs=0.001)
    assert len(tm.SCORES) == 15 and all(len(scores) == 6 for scores in tm.SCORES.values())


# ------------------------------------------------------------------------------------------------- analytic curves

GAME, OTHER = "catch_env:Catch-v0", "catch_env:Catch-v3"
PAIR = ("fine-tuning", "Catch-v3", "Catch-v0")


def test_constants_and_ramps(tmp_path):
    steps = np.arange(0, 11_000, 1_000)
    write(tmp_path, GAME, steps, steps / 10_000)  # a ramp from 0 to 1: area 1/2
    write(tmp_path, GAME, steps, np.full(11, 0.75), **pretrained(OTHER))  # a constant: area 3/4
    cell = cells(tmp_path)[PAIR]
    assert cell["ratio"] == pytest.approx(0.5) and cell["low"] is None  # one seed has no interval
    assert (cell["n_transfer"], cell["n_scratch"]) == (1, 1)
    assert cell["jumpstart"] == pytest.approx(0.75) and cell["asymptotic"] == pytest.approx(0.75 - 0.95)
    assert cell["threshold"] == pytest.approx(0.9 * 0.95) and cell["time_to_threshold"] is None
    assert cell["time_to_threshold_scratch"] == 9_000 and cell["total_reward"] == pytest.approx(0.25)
    half = cells(tmp_path, "--threshold", 0.5)[PAIR]
    assert (half["time_to_threshold"], half["time_to_threshold_scratch"]) == (0, 5_000)


def test_other_grids_are_compared_over_the_common_range(tmp_path):
    write(tmp_path, GAME, [0, 10_000], [0, 1])
    write(tmp_path, GAME, [2_000, 5_003, 10_000], [0.6, 0.6, 0.6], **pretrained(OTHER))
    cell = cells(tmp_path)[PAIR]
    assert (cell["first_step"], cell["last_step"]) == (2_000, 10_000)
    assert cell["mean_scratch"] == pytest.approx(0.6) and cell["ratio"] == pytest.approx(0, abs=1e-6)


def test_pairs_of_seeds_are_resampled_together(tmp_path):
    for seed, level in enumerate([0.2, 0.4, 0.9]):  # transfer is always half as good again, whatever the level
        write(tmp_path, GAME, [0, 100], [level] * 2, seed=seed)
        write(tmp_path, GAME, [0, 100], [1.5 * level] * 2, seed=seed, **pretrained(OTHER))
    cell = cells(tmp_path)[PAIR]
    assert [cell[k] for k in ("ratio", "low", "high")] == pytest.approx([0.5, 0.5, 0.5], abs=1e-6)
    assert cell["n_transfer"] == cell["n_scratch"] == 3
    assert "+0.500* [+0.50, +0.50] n=3" in run("transfer_matrix.py", "table", "--logdir", tmp_path, cwd=ROOT).stdout
    write(tmp_path, GAME, [0, 100], [0.3] * 2, seed=7)  # now seeds do not pair: both are resampled on their own
    cell = cells(tmp_path)[PAIR]
    assert cell["low"] < 0 < cell["high"] and (cell["n_transfer"], cell["n_scratch"]) == (3, 4)


def test_a_negative_area_is_no_baseline(tmp_path):
    write(tmp_path, "ALE/Pong-v5", [0, 100], [-20.7, -10.7])
    write(tmp_path, "ALE/Pong-v5", [0, 100], [-15.7, -10.7], **pretrained("ALE/Boxing-v5"))
    write(tmp_path, "ALE/Tennis-v5", [0, 100], [-1, -1])
    write(tmp_path, "ALE/Tennis-v5", [0, 100], [1, 1], **pretrained("ALE/Boxing-v5"))
    key, tennis = ("fine-tuning", "Boxing", "Pong"), ("fine-tuning", "Boxing", "Tennis")
    none = cells(tmp_path)
    assert none[key]["ratio"] is None and "-1570, is not positive" in none[key]["note"]
    assert none[key]["total_reward"] == pytest.approx(2.5)  # better, though the ratio would say -0.16
    random = cells(tmp_path, "--baseline", "random")
    assert random[key]["ratio"] == pytest.approx(7.5 / 5 - 1)  # above Pong's -20.7
    assert random[tennis]["note"] == "the score of random play is not known for Tennis"
    lowest = cells(tmp_path, "--baseline", "min")
    assert lowest[key]["ratio"] == pytest.approx(0.5)
    assert lowest[tennis]["ratio"] is None  # scratch is the lowest everywhere: no area
    shown = run("transfer_matrix.py", "table", "--logdir", tmp_path, cwd=ROOT).stdout
    assert "| Boxing | n/a † n=1" in shown and "† DDQN, Boxing to Pong, fine-tuning: the area from scratch" in shown


def test_next_to_nothing_is_no_baseline(tmp_path):
    write(tmp_path, GAME, [0, 100], [0.0, 0.019])
    write(tmp_path, GAME, [0, 100], [1, 1], **pretrained("catch_env:Catch-v2"))
    write(tmp_path, OTHER, [0, 100], [0.0, 0.021])
    write(tmp_path, OTHER, [0, 100], [1, 1], **pretrained("catch_env:Catch-v2"))
    below, above = (cells(tmp_path)["fine-tuning", "Catch-v2", target] for target in ("Catch-v0", "Catch-v3"))
    assert below["ratio"] is None and below["note"] == (
        "the area from scratch, 0.95, is next to nothing beside 100 with transfer"
    )
    assert above["ratio"] == pytest.approx(1 / 0.0105 - 1) and not above["note"]


def test_missing_cells(tmp_path):
    write(tmp_path, GAME, [0, 100], [1, 1])
    write(tmp_path, GAME, [0, 100], [1, 1], **pretrained(OTHER))
    write(tmp_path, OTHER, [0, 100], [1, 1], **pretrained(GAME))
    write(tmp_path, GAME, [0, 100], [1, 1], **pretrained("catch_env:Catch-v2"))
    found = cells(tmp_path)
    assert found["fine-tuning", "Catch-v0", "Catch-v3"]["note"] == "no run from scratch on Catch-v3"
    shown = run("transfer_matrix.py", "table", "--logdir", tmp_path, cwd=ROOT).stdout
    assert "| Catch-v2 | +0.000 n=1 | – |" in shown
    assert "Negative: 0 of 2" in shown and "Published" not in shown  # DDQN's published share is of other games


def test_runs_under_other_conditions_are_refused_by_name(tmp_path):
    write(tmp_path, GAME, [0, 100], [1, 1], maxpool=True, cuda=True, algorithm="DDQN")
    write(tmp_path, GAME, [0, 100], [1, 1], maxpool=False, cuda=False, **pretrained(OTHER))
    done = run("transfer_matrix.py", "table", "--logdir", tmp_path, cwd=ROOT, check=False)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0
    assert "differ in maxpool: " in done.stderr and "True (" in done.stderr and "False (" in done.stderr


def test_algorithms_and_modes_come_from_the_hyper_parameters(tmp_path):
    for i, (flags, algorithm, mode) in enumerate([
        ({"double": False}, "DQN", "fine-tuning"), ({}, "DDQN", "fine-tuning"),
        ({"exp_name": "dqv_atari"}, "DQV", "fine-tuning"),
        ({"exp_name": "mine", "algorithm": "DQV-Max"}, "DQV-Max", "fine-tuning"),
        ({"freeze_features": True}, "DDQN", "only-head"), ({"pretrained_head": "head.pt"}, "DDQN", "hybrid"),
        ({"keep_head": True}, "DDQN", "fine-tuning, head kept"),
    ]):  # fmt: skip
        found = tm.read_run(write(tmp_path, GAME, [0, 100], [1, 1], seed=i, **pretrained(OTHER), **flags), METRIC)
        assert (found.algorithm, found.mode, found.source, found.target, found.seed) == (
            algorithm,
            mode,
            "Catch-v3",
            "Catch-v0",
            i,
        )


# ------------------------------------------------------------------------------------------------------ event files


def test_reading_equals_tensorboard_s_own_reader(tmp_path):
    rng = np.random.default_rng(0)
    steps = np.concatenate([[0, 1, 127, 128, 300], np.sort(rng.integers(16_384, 300_000_000, size=500))])
    folder = write(tmp_path, GAME, steps, rng.normal(size=505) * 1e3, metric="charts/episodic_return")
    mine = tm.read_run(folder, "charts/episodic_return")
    theirs = scalars(folder)["charts/episodic_return"]
    assert list(zip(mine.steps.tolist(), mine.values.tolist())) == sorted(theirs, key=lambda point: point[0])
    assert mine.last_step == steps.max() and mine.flags["env_id"] == GAME


def test_a_resumed_run_replaces_what_it_purges(tmp_path):
    folder = write(tmp_path, GAME, [10, 20, 30], [1, 2, 3])
    time.sleep(1.1)  # event files are ordered by the second in their names
    with SummaryWriter(folder, purge_step=20) as writer:
        for step in (20, 40):
            writer.add_scalar(METRIC, step / 2, step)
    found = tm.read_run(folder, METRIC)
    assert found.steps.tolist() == [10, 20, 40] and found.values.tolist() == [1, 10, 20]
    assert scalars(folder)[METRIC] == [(10, 1), (20, 10), (40, 20)]


def test_bad_event_files_are_skipped_with_a_line_each(tmp_path):
    write(tmp_path, GAME, [0, 50, 100], [1, 1, 1])
    whole = write(tmp_path, GAME, [0, 50, 100], [1, 1, 1], seed=2)
    growing = write(tmp_path, GAME, [0, 50], [1, 1], seed=3, total_timesteps=100)
    nothing = write(tmp_path, GAME, [0, 50, 100], [1, 1, 1], seed=4, metric="charts/other")
    (file,) = whole.glob("*tfevents*")
    for name, content in {
        "empty": b"", "text": b"no event file at all, but long enough", "cut": file.read_bytes()[:-130],
        "huge": struct.pack("<Q", 1 << 60) + b"xxxxxxxxxxxxxxxxx",
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / file.name).write_bytes(content)
    with SummaryWriter(tmp_path / "foreign") as writer:
        writer.add_scalar(METRIC, 1.0, 5)
    done = run("transfer_matrix.py", "scores", "--logdir", tmp_path, "--format", "json", cwd=ROOT)
    assert json.loads(done.stdout)[0]["n"] == 2
    lines = {line.split(": ")[0].split("/")[-1]: line.split(": ")[1] for line in done.stderr.splitlines()}
    assert len(lines) == 7 and lines["foreign"] == "it has logged no hyper-parameters with env_id, seed and exp_name"
    assert lines["empty"].endswith("an empty event file") and lines["text"].endswith("not an event file")
    assert lines["huge"].endswith("not an event file") and lines["cut"] == "incomplete, 50 of 100 steps"
    assert lines[growing.name] == "incomplete, 50 of 100 steps"
    assert lines[nothing.name] == f"it has 0 points of {METRIC}, at least 1 are needed"


def test_speed_of_reading(tmp_path):
    """300 runs of 10,000 points in 10 seconds on two cores are 0.067 s a run and core; three times that passes here."""
    folder = write(tmp_path, GAME, np.arange(10_000) * 250, np.arange(10_000))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        assert len(tm.read_run(folder, METRIC).steps) == 10_000
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.2


@pytest.mark.parametrize("command", ["table", "scores", "plot"])
def test_bad_folders_get_one_line(command, tmp_path):
    for logdir, says in ((tmp_path, "no complete run"), (tmp_path / "none", "there is no such folder")):
        done = run("transfer_matrix.py", command, "--logdir", logdir, cwd=tmp_path, check=False)
        assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- scores


def test_scores(tmp_path):
    for seed, final in enumerate([10.0, 20.0]):
        write(tmp_path, "ALE/Pong-v5", [0, 100], [-21, final], seed=seed)
        write(tmp_path, "ALE/Boxing-v5", [0, 100], [0, 4.3], seed=seed)
        write(tmp_path, "ALE/Tennis-v5", [0, 100], [0, seed], seed=seed)
    done = run("transfer_matrix.py", "scores", "--logdir", tmp_path, "--format", "csv", cwd=ROOT).stdout
    rows = {row["game"]: row for row in csv.DictReader(io.StringIO(done))}
    assert float(rows["Pong"]["score"]) == 15 and float(rows["Pong"]["human_normalised"]) == pytest.approx(35.7 / 30)
    assert (float(rows["Pong"]["low"]), float(rows["Pong"]["high"])) == (10, 20) and rows["Pong"]["n"] == "2"
    assert float(rows["Pong"]["DQV"]) == 21 and float(rows["Boxing"]["human_normalised"]) == pytest.approx(1)
    assert rows["Tennis"]["human_normalised"] == rows["Tennis"]["DQV"] == ""
    shown = run("transfer_matrix.py", "scores", "--logdir", tmp_path, cwd=ROOT).stdout
    assert "| Pong | -20.7 | 9.3 | 18.9 | 21.0 | 21.0 | 21.0 | 15.00 [10.00, 20.00] n=2, 119% |" in shown
    assert "1,000,131.0 ‡" in shown and "2 of 15 games" in shown
    # normalised 1.023 and 1.357 (Pong), 1 and 1 (Boxing): the middle half of the four
    assert f"interquartile mean of the human-normalised scores of all runs {(1 + 30.7 / 30) / 2:.3f}" in shown


def test_interquartile_mean_is_the_trimmed_mean_of_a_quarter():
    assert tm.interquartile_mean(np.array([9.0, 1, 2, 3, 4, 5, 6, 100])) == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert tm.interquartile_mean(np.array([[1.0, 2, 3], [6, 4, 5]])).tolist() == [2, 5]  # int(3 / 4) = 0 are cut
    assert tm.interquartile_mean(np.arange(10.0)) == 4.5


# ------------------------------------------------------------------------------------------------------------- plans


def planned(cwd, stage, *flags, **kwargs):
    flags = ["--script", "dqv_atari.py", "--env-ids", GAME, OTHER, "--seeds", 1, 2, "--stage", stage, *flags]
    return run("transfer_matrix.py", "plan", *flags, cwd=cwd, **kwargs)


def test_plans_of_a_whole_study(tmp_path):
    """Every stage prints what it should, needs the stage before it, and leaves out what is complete."""
    extra = ["--args", "--total-timesteps 100"]

    def commands(stage):
        return [shlex.split(line) for line in planned(tmp_path, stage, *extra).stdout.splitlines()]

    def make(command):
        """What the run of a command leaves behind."""
        words = [word for word in command if word != "--freeze-features"]
        given = dict(zip(words[2::2], words[3::2]))
        flags = {"exp_name": "dqv_atari", "seed": given["--seed"], "freeze_features": "--freeze-features" in command}
        if "--pretrained" in given:
            source = tm.read_run(Path(tmp_path, given["--pretrained"]).parent, METRIC)
            flags |= {"pretrained": given["--pretrained"], "pretrained_env_id": source.flags["env_id"]}
            flags |= {"pretrained_head": given["--pretrained-head"]} if "--pretrained-head" in given else {}
        folder = write(tmp_path / "runs", given["--env-id"], [0, 100], [1, 1], **flags)
        (folder / "dqv_atari.pt").touch()

    (tmp_path / "runs").mkdir()
    done = planned(tmp_path, "transfer", *extra, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "lacks 4 checkpoints of complete runs: Catch-v3, scratch, seed 1; " in done.stderr
    first = commands("source")
    assert first[0] == shlex.split(f"python dqv_atari.py --env-id {GAME} --seed 1 --logdir runs --total-timesteps 100")
    assert len(first) == 4
    make(first[0])
    assert commands("source") == first[1:]
    folder = write(tmp_path / "runs", OTHER, [0, 50], [1, 1], exp_name="dqv_atari", total_timesteps=100)
    (folder / "dqv_atari.pt").touch()  # half a run
    assert [command[2] for command in commands("source")] == ["--env-id", "--resume", "--env-id"]
    assert commands("source")[1][3] == f"runs/{folder.name}/dqv_atari.pt"
    shutil.rmtree(folder)
    for command in commands("source"):
        make(command)
    assert commands("source") == []
    transfer = commands("transfer")
    assert len(transfer) == 4 and all("--pretrained" in command for command in transfer)
    for command in transfer:
        source = tm.read_run(Path(tmp_path, command[command.index("--pretrained") + 1]).parent, METRIC)
        assert source.mode == "scratch" and source.flags["env_id"] not in command and str(source.seed) in command
        make(command)
    assert commands("transfer") == []
    assert "--stage hybrid" in planned(tmp_path, "hybrid", *extra, check=False).stderr
    own = commands("self-transfer")
    assert len(own) == 8 and sum("--freeze-features" in command for command in own) == 4
    for command in own:
        make(command)
    assert commands("self-transfer") == []
    hybrid = commands("hybrid")
    assert len(hybrid) == 4
    for command in hybrid:
        modes = [tm.read_run(Path(tmp_path, command[command.index(flag) + 1]).parent, METRIC).mode
                 for flag in ("--pretrained", "--pretrained-head")]  # fmt: skip
        assert modes == ["fine-tuning", "only-head"]
        make(command)
    assert commands("hybrid") == []
    found = cells(tmp_path / "runs")
    assert len(found) == 2 + 4 + 2 and all(cell["ratio"] == 0 and cell["n_transfer"] == 2 for cell in found.values())


def test_a_plan_tells_other_flags_apart(tmp_path):
    folder = write(tmp_path / "runs", GAME, [0, 100], [1, 1], exp_name="ddqn_atari", double=False, learning_rate=1e-3)
    (folder / "ddqn_atari.pt").touch()

    def count(*flags):
        flags = ["--env-ids", GAME, "--seeds", 1, "--stage", "source", *flags]
        return len(run("transfer_matrix.py", "plan", *flags, cwd=tmp_path).stdout.splitlines())

    assert count() == 1  # Double DQN is not there
    assert count("--args", "--no-double") == 0
    assert count("--args", "--no-double --learning-rate 0.001 --total-timesteps 1e2") == 0
    assert count("--args", "--no-double --learning-rate 0.002") == 1
    assert count("--args", "--no-double --exp-name other") == 1
    refused = run(
        "transfer_matrix.py",
        "plan",
        "--env-ids",
        GAME,
        "--stage",
        "source",
        "--args",
        "--seed 3",
        cwd=tmp_path,
        check=False,
    )
    assert refused.returncode == 1 and "--args: the plan sets --seed itself" in refused.stderr


def test_a_plan_for_games_with_budgets_of_their_own(tmp_path):
    """--targets are trained on, --source-args finds their sources, whatever the budget of these was."""
    for env_id, steps in ((GAME, 100), (OTHER, 300)):
        flags = {"exp_name": "ddqn_atari", "total_timesteps": steps, "learning_rate": 1e-3}
        (write(tmp_path / "runs", env_id, [0, steps], [1, 1], **flags) / "ddqn_atari.pt").touch()
    flags = ["--env-ids", GAME, OTHER, "--seeds", 1, "--stage", "transfer", "--args", "--total-timesteps 300"]

    def plan(*more, **kwargs):
        return run("transfer_matrix.py", "plan", *flags, *more, cwd=tmp_path, **kwargs)

    assert "lacks 1 checkpoints" in plan("--targets", OTHER, check=False).stderr  # the source with 300 steps
    lines = plan("--targets", OTHER, "--source-args", "--learning-rate 0.001").stdout.splitlines()
    assert len(lines) == 1 and f"--env-id {OTHER} --seed 1" in lines[0] and "--total-timesteps 300" in lines[0]
    source = shlex.split(lines[0])[shlex.split(lines[0]).index("--pretrained") + 1]
    assert tm.read_run(str((tmp_path / source).parent), METRIC).flags["env_id"] == GAME
    wrong = plan("--targets", OTHER, "--source-args", "--learning-rate 1", check=False)
    assert "lacks 1 checkpoints" in wrong.stderr
    refused = plan("--targets", "catch_env:Catch-v4", check=False)
    assert refused.returncode == 1 and "--targets catch_env:Catch-v4: not one of --env-ids" in refused.stderr


def test_a_run_from_a_former_source_is_planned_again(tmp_path):
    """A transfer run is complete only when it began from a network that the plan would take for its source."""

    def make(env_id, **flags):
        folder = write(tmp_path / "runs", env_id, [0, 100], [1, 1], exp_name="ddqn_atari", **flags)
        (folder / "ddqn_atari.pt").touch()
        return folder

    def plan():
        flags = ["--env-ids", GAME, OTHER, "--targets", OTHER, "--seeds", 1, "--stage", "transfer"]
        return run("transfer_matrix.py", "plan", *flags, cwd=tmp_path).stdout.splitlines()

    def transfer(source):
        path = f"elsewhere/{source.name}/ddqn_atari.pt"  # as logged before the study's folder was moved
        make(OTHER, pretrained=path, pretrained_env_id=GAME)

    former = make(GAME)
    transfer(former)
    assert plan() == []
    again = make(GAME)
    assert plan() == []  # both are sources of this plan
    (former / "ddqn_atari.pt").unlink()
    lines = plan()
    assert len(lines) == 1 and f"--pretrained runs/{again.name}/ddqn_atari.pt" in lines[0]
    transfer(again)
    assert plan() == []


def test_a_planned_study_of_the_real_script(tmp_path, toy_flags):
    """Two games of a few steps, from plan to table: what the scripts log is what this script reads."""
    flags = " ".join(toy_flags[2:]).replace("--total-timesteps 1200", "--total-timesteps 216")
    games = ["toy_env:Toy-v0", "toy_env:ToyTruncated-v0"]
    for stage, number in (("source", 2), ("transfer", 2), ("only-head", 2), ("self-transfer", 4), ("hybrid", 2)):
        plan = ["plan", "--env-ids", *games, "--seeds", 1, "--stage", stage, "--args", flags + " --eval-frequency 100"]
        lines = run("transfer_matrix.py", *plan, cwd=tmp_path).stdout.splitlines()
        assert len(lines) == number
        for line in lines:
            run(shlex.split(line)[1], *shlex.split(line)[2:], cwd=tmp_path)
        assert run("transfer_matrix.py", *plan, cwd=tmp_path).stdout == ""
    found = cells(tmp_path / "runs")
    assert len(found) == 4 + 6 and all(cell["n_transfer"] == 1 for cell in found.values())
    assert {mode for mode, _, _ in found} == {"fine-tuning", "only-head", "hybrid"}


# ---------------------------------------------------------------------------------------------------------- pictures


def test_plot(tmp_path):
    for seed in (1, 2):
        write(tmp_path / "runs", GAME, [0, 50, 100], [0.2, 0.5, 0.9 + seed / 100], seed=seed)
        write(tmp_path / "runs", GAME, [0, 50, 100], [0.2, 0.3, 0.5], seed=seed, **pretrained(OTHER))
    done = run("transfer_matrix.py", "plot", "--logdir", "runs", "--out", "pictures", cwd=tmp_path)
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {"curves.csv", "matrix_ddqn_fine-tuning.png", "curves_ddqn_catch-v0.png"}
    assert done.stdout.splitlines() == ["pictures/matrix_ddqn_fine-tuning.png", "pictures/curves_ddqn_catch-v0.png"]
    assert all((tmp_path / "pictures" / name).stat().st_size > 5_000 for name in pictures if name.endswith("png"))
    with open(tmp_path / "pictures/curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[2] == {
        "algorithm": "DDQN", "mode": "scratch", "source": "", "target": "Catch-v0", "seed": "1", "step": "100",
        METRIC: "0.91",
    }  # fmt: skip


def test_plot_says_when_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("transfer_matrix.py", "plot", cwd=tmp_path, check=False)
    assert (
        done.returncode == 1
        and done.stderr.strip() == "transfer_matrix.py: error: plot needs matplotlib: pip install matplotlib"
    )
