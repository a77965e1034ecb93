"""What the Atari scripts must do: runs for every one of them, parts that are equal to the letter once.

That they are equal is held by `test_repository.py`; targets and updates are in `test_targets.py`.
"""

import contextlib
import importlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import ROOT, TOY_FLAGS, needs_cuda, only_run, refused, run, scalars, start
from gymnasium.vector import AutoresetMode
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ddqn_atari as shared  # for parts that are equal in all

TAGS = {
    "charts/episodic_return", "charts/episodic_length", "charts/epsilon", "charts/max_q",
    "losses/td_loss", "losses/q_values",
    "eval/episodic_return", "eval/episodic_return_std", "eval/max_q", "eval/discounted_return",
    "eval/dead_units", "eval/feature_norm", "eval/feature_rank",
}  # fmt: skip
V_TAGS = TAGS | {"losses/v_loss", "losses/v_values", "eval/v_minus_max_q"}
SCRIPTS = {"ddqn_atari": TAGS, "dqv_atari": V_TAGS, "dqv_max_atari": V_TAGS}
TOY = "--env-id toy_env:Toy-v0 --learning-starts 4 --total-timesteps 4 --eval-episodes 1 --narrow 4".split()


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture
def module(script):
    return importlib.import_module(script)


def learner(module, narrow=4):
    """Networks, the arguments of `learn` behind the batch, for 3 actions, without the optimizers."""
    networks = [module.QNetwork(n, narrow) for n in ((3,) if module.ALGORITHM == "DDQN" else (3, 1))]
    target = module.QNetwork(1 if module.ALGORITHM == "DQV" else 3, narrow)
    return networks, target, {"double": True} if module.ALGORITHM == "DDQN" else {}


def trunk(name):
    return not name.startswith("network.9")


def learners(checkpoint):
    return [name for name in ("q_network", "v_network") if name in checkpoint]


def before_training(script):
    """{network: state dict} of a run with seed 1 before its first update."""
    torch.manual_seed(1)
    networks, _, _ = learner(importlib.import_module(script))
    networks = dict(zip(("q_network", "v_network"), networks))
    networks["target_network"] = networks["v_network" if script == "dqv_atari" else "q_network"]
    return {name: network.state_dict() for name, network in networks.items()}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """{script: (checkpoint path, checkpoint)} of finished runs on the toy game."""
    runs = {}

    def get(script):
        if script not in runs:
            cwd = tmp_path_factory.mktemp(script)
            run(f"{script}.py", *TOY_FLAGS, cwd=cwd)
            path = only_run(cwd / "runs") / f"{script}.pt"
            runs[script] = path, torch.load(path)
        return runs[script]

    return get


# ----------------------------------------------------------------------------------------------- network, replay memory
def test_network_is_the_nature_dqn_with_cleanrl_names(module):
    network = module.QNetwork(6)
    assert list(network.state_dict()) == [f"network.{i}.{part}" for i in (0, 2, 4, 7, 9) for part in ("weight", "bias")]
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    assert torch.allclose(network(frames), network.network(frames.float() / 255)) and network(frames).shape == (3, 6)
    assert module.head_names(network) == ["network.9.weight", "network.9.bias"]


def test_bfloat16_leaves_outputs_losses_and_gradients_in_float32(module, monkeypatch):
    torch.manual_seed(0)
    networks, target, extra = learner(module)
    obs = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    batch = obs, torch.tensor([0, 1, 2, 0]), torch.ones(4), obs.flip(0), torch.tensor([True, False, False, False])
    gradients, losses = [], []
    for bf16 in (False, True):
        monkeypatch.setattr(module.QNetwork, "bf16", bf16)
        optimizers = [torch.optim.SGD(network.parameters(), 0.0) for network in networks]
        losses.append(module.learn(batch, 0.99, *networks, target, *optimizers, **extra))
        gradients.append([p.grad.clone() for network in networks for p in network.parameters()])
    q = networks[0](obs)
    assert q.dtype == losses[1].dtype == torch.float32 and not torch.equal(q, q.bfloat16().float())
    assert not torch.equal(*losses) and torch.allclose(*losses, atol=0.02)
    # of every layer: a weight that is cast under no_grad and kept would have lost its gradient
    for exact, rounded in zip(*gradients):
        assert rounded.dtype == torch.float32 and (exact - rounded).norm() < 0.3 * exact.norm() > 0


def picture(number):
    frame = np.zeros((84, 84), np.uint8)
    frame[0, :4] = [1, number & 255, number >> 8 & 255, number >> 16]
    return frame


def put(replay, actions, rewards, dones, obs, restarted):
    replay.stage(actions, rewards, dones, obs, restarted, ~restarted)
    replay.store()


def assert_drawn(replay, expected):
    """These (obs, action, reward, next_obs, done) are what `sample` can draw, in order of age."""
    assert replay.count == len(expected)
    for first in range(0, len(expected), 500):
        part = expected[first : first + 500]
        fractions = (first + torch.arange(len(part), dtype=torch.float64) + 0.5) / replay.count
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda n, **_: fractions)
            found = replay.sample(len(part))
        assert found[0].dtype == found[3].dtype == torch.uint8 and found[0].shape == (len(part), 4, 84, 84)
        for column, theirs in zip(found, zip(*part), strict=True):
            assert (column.numpy() == np.array(theirs)).all()


@pytest.mark.parametrize("num_envs, capacity", [(1, 37), (3, 100), (8, 1000)])
def test_replay_equals_a_naive_list_of_stacks(num_envs, capacity):
    """The last `capacity` slots that are transitions may be drawn, each with its whole stacks."""
    rng, zeros, rows, keep = np.random.default_rng(num_envs), np.zeros(num_envs), [], -(-capacity // num_envs)
    replay = shared.Replay(capacity, num_envs, torch.device("cpu"))
    blank = np.zeros((84, 84), np.uint8)
    stacks = [[blank, blank, blank, picture(i + 1)] for i in range(num_envs)]
    number, over, seen, kinds = num_envs, np.zeros(num_envs, bool), 0, np.zeros(4, int)
    put(replay, zeros, zeros, zeros, np.stack([np.stack(stack) for stack in stacks]), ~over)
    iterations = -(-6_000 // num_envs)
    for iteration in range(iterations):
        actions, rewards = rng.integers(18, size=num_envs), rng.integers(-1, 2, size=num_envs)
        chance, restarted = rng.random(num_envs), over
        kinds_now = (chance < 0.05, (0.05 < chance) & (chance < 0.1), (0.1 < chance) & (chance < 0.13))
        terminated, life_lost, truncated = (~restarted & kind for kind in kinds_now)
        kinds += [restarted.sum(), terminated.sum(), life_lost.sum(), truncated.sum()]
        row = []
        for i in range(num_envs):
            number, before = number + 1, stacks[i]
            stacks[i] = [blank] * 3 + [picture(number)] if restarted[i] else [*before[1:], picture(number)]
            if not restarted[i]:
                row.append((before, actions[i], rewards[i], stacks[i], bool(terminated[i] or life_lost[i])))
        rows.append(row)
        obs = np.stack([np.stack(stack) for stack in stacks])
        put(replay, actions, rewards, terminated | life_lost, obs, restarted)
        over = terminated | truncated
        if iteration % (iterations // 12) == 0 or iteration < 8 or iteration == iterations - 1:
            expected = [transition for row in rows[-keep:] for transition in row]
            assert_drawn(replay, expected)
            seen += len(expected)
    assert kinds.min() > 30 and seen >= 400


# ----------------------------------------------------------------------------------------------------- environments
def test_settings_of_ale_that_are_traps(monkeypatch):
    """Clipped rewards cannot be undone, `episodic_life` restarts the game, three actions are RIGHT in Pong."""
    passed = {}
    monkeypatch.setattr(shared, "AtariVectorEnv", lambda game, num_envs, **settings: passed.update(settings))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    given = {"repeat_action_probability": 0.25, "full_action_space": True, "maxpool": False}
    shared.make_envs(shared.Args(env_id="ALE/Pong-v5", **given), 20)
    assert passed | given | {"num_threads": 14} == passed
    shared.make_envs(shared.Args(env_id="ALE/Pong-v5"), 8)
    expected = {
        "frameskip": 4, "repeat_action_probability": 0.0, "full_action_space": False, "noop_max": 30, "maxpool": True,
        "use_fire_reset": True, "episodic_life": False, "life_loss_info": False, "reward_clipping": False,
        "max_num_frames_per_episode": 108_000, "autoreset_mode": AutoresetMode.NEXT_STEP, "num_threads": 8,
    }  # fmt: skip
    assert passed | expected == passed
    monkeypatch.undo()
    meanings = shared.action_meanings(args := shared.Args(env_id="ALE/Pong-v5"), shared.make_envs(args, 1))
    assert meanings == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]


def test_replayed_stacks_equal_ale_s_own_and_lost_lives_are_told():
    """Over a few games of Ms. Pac-Man: what is learned from is what was acted on."""
    envs = shared.make_envs(shared.Args(env_id="ALE/MsPacman-v5"), 2)
    settings = {"repeat_action_probability": 0.0, "reward_clipping": False, "noop_max": 30, "use_fire_reset": True}
    reference = AtariVectorEnv("ms_pacman", 2, stack_num=1, life_loss_info=True, **settings)
    (obs, infos), _ = envs.reset(seed=3), reference.reset(seed=3)
    replay, zeros, rng = shared.Replay(10_000, 2, torch.device("cpu")), np.zeros(2), np.random.default_rng(0)
    put(replay, zeros, zeros, zeros, obs, np.ones(2, bool))
    lives, over, stored, losses, games, scores = infos["lives"], np.zeros(2, bool), [], 0, 0, set()
    for _ in range(900):
        before, actions = obs, rng.integers(9, size=2)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        dones = terminations | (infos["lives"] < lives)  # the scripts' rule
        assert (dones == reference.step(actions)[2]).all()
        put(replay, actions, rewards, dones, obs, over)
        stored += [(before[i], actions[i], rewards[i], obs[i], dones[i]) for i in range(2) if not over[i]]
        lives, over = infos["lives"], terminations | truncations
        losses, games = losses + (dones & ~terminations).sum(), games + terminations.sum()
        scores |= set(rewards.tolist())
    assert games >= 2 and losses >= 2 * games  # three lives: a lost one does not end the game
    assert max(scores) >= 10 and all(score % 10 == 0 for score in scores)
    assert_drawn(replay, stored)


# ------------------------------------------------------------------------------------------------------- whole runs
def test_a_run_logs_learns_evaluates_and_saves(script, source):
    path, checkpoint = source(script)
    logged = scalars(path.parent)
    assert set(logged) == SCRIPTS[script]
    assert checkpoint["global_step"] >= 1200 and checkpoint["transfers"] == 0
    assert checkpoint["action_meanings"] == [f"toy_env:Toy-v0 {i}" for i in range(3)]
    assert checkpoint["args"]["total_timesteps"] == 1200 and checkpoint["args"]["env_id"] == "toy_env:Toy-v0"
    # every fourth action of the loop owes updates; those of the last step are done by whoever resumes the run
    assert 0 <= (checkpoint["global_step"] - 200) // 8 - checkpoint["updates"] <= 1 and checkpoint["updates"] > 100
    fresh = before_training(script)
    assert {name for name in checkpoint if name.endswith("network")} == set(fresh)
    for network, tensors in fresh.items():  # the target network too has moved
        assert not any(torch.equal(checkpoint[network][name], tensor) for name, tensor in tensors.items()), network
    frozen_copy_of = "v_network" if script == "dqv_atari" else "q_network"
    for name, tensor in checkpoint["target_network"].items():  # but it is behind by the updates since it was copied
        ahead = checkpoint[frozen_copy_of][name]
        assert not torch.equal(ahead, tensor) and torch.allclose(ahead, tensor, atol=0.1), name
    lengths = [value for _, value in logged["charts/episodic_length"]]
    assert set(lengths) == {5.0} and len(lengths) > 200
    assert {round(value, 6) for _, value in logged["charts/epsilon"]} == {0.1}  # which has fallen within 120 steps
    steps = [step for step, _ in logged["eval/episodic_return"]]
    assert len(steps) == 3 and all(step - mark in range(8) for step, mark in zip(steps, (500, 1000, 1200)))
    returns = [value for _, value in logged["eval/episodic_return"]]
    assert returns[-1] > 4, returns  # of 5; chance is 1.67, epsilon 0.05 costs 0.17
    values = {tag: points[-1][1] for tag, points in logged.items()}
    assert abs(values["eval/max_q"] - values["eval/discounted_return"]) < 1.5
    assert abs(values["losses/q_values"] - values["eval/max_q"]) < 1.5
    if "eval/v_minus_max_q" in values:  # in a game where every state has the same value
        assert abs(values["losses/v_values"] - values["losses/q_values"]) < 1
        assert abs(values["eval/v_minus_max_q"]) < 1 and values["losses/v_loss"] > 0


def memory_of(done):
    """Columns slot, action, reward, done, age of the transitions that may be drawn at the end of a run."""
    replay = done.variables["rb"]
    replay.store()  # the last step is staged only
    return replay.transitions[(replay.totals[0] + torch.arange(replay.count)) % replay.slots].T


@pytest.mark.parametrize("game, flags, each", [
    ("ToyTruncated", (), 0), ("ToyLives", ("--no-terminal",), 0), ("ToyLives", (), 2),
    ("ToyLives", ("--no-life-loss-terminal",), 1),
])  # fmt: skip
def test_terminals_lost_lives_and_clipped_rewards_are_stored_but_truncations_are_not(tmp_path, game, flags, each):
    flags = ["--env-id", f"toy_env:{game}-v0", "--total-timesteps", 260, "--eval-episodes", 2, *flags]
    done = run("ddqn_atari.py", *TOY_FLAGS, *flags, cwd=tmp_path)
    lengths = [value for _, value in scalars(only_run(tmp_path / "runs"))["charts/episodic_length"]]
    _slots, actions, rewards, dones, ages = memory_of(done)
    assert len(dones) == done.variables["global_step"] and set(lengths) == {7.0 if game == "ToyTruncated" else 5.0}
    lost = 4 if each == 2 else 0  # lives of the episodes that go on, at most one a game
    assert 0 <= dones.sum() - each * len(lengths) <= lost and len(lengths) > 30
    assert set(actions.tolist()) == {0, 1, 2} and ages.max() == 3
    assert set(rewards.tolist()) == ({0, 1} if game == "ToyTruncated" else {-1, 1})


def test_same_seed_same_scalars_with_and_without_evaluation(source, tmp_path):
    path, checkpoint = source("dqv_max_atari")
    out = run("dqv_max_atari.py", *TOY_FLAGS, "--eval-frequency", 0, "--checkpoint-frequency", 0, cwd=tmp_path).stdout
    assert "evaluation at step 1,20" in out and out.count("evaluation") == 1
    folder = only_run(tmp_path / "runs")
    mine, theirs = scalars(folder), scalars(path.parent)
    for tag in V_TAGS:
        assert mine[tag] == (theirs[tag][-1:] if tag.startswith("eval/") else theirs[tag]), tag
    again = torch.load(folder / "dqv_max_atari.pt")
    assert all(torch.equal(again["q_network"][k], v) for k, v in checkpoint["q_network"].items())


def test_the_papers_sequential_agent_with_another_seed_and_flags_of_its_own(script, module, source, tmp_path):
    flags = ["--num-envs", 1, "--total-timesteps", 300, "--eval-episodes", 3, "--seed", 2, "--gamma", 0.5,
             "--exploration-fraction", 0.5, "--batch-size", 7, "--buffer-size", 90, "--adam-eps", 1e-3,
             *(["--no-double"] if script == "ddqn_atari" else ["--v-learning-rate", 2e-3])]  # fmt: skip
    variables = run(f"{script}.py", *TOY_FLAGS, *flags, cwd=tmp_path).variables
    folder = only_run(tmp_path / "runs")
    checkpoint, used = torch.load(folder / f"{script}.pt"), {}
    assert checkpoint["global_step"] == 300 and checkpoint["updates"] == 12
    theirs = source(script)[1]["q_network"]["network.0.weight"]
    assert not torch.allclose(checkpoint["q_network"]["network.0.weight"], theirs, atol=0.02)
    start = 1 if script == "ddqn_atari" else 0.5  # the last action is the 100th of learning, epsilon falls over 150
    assert scalars(folder)["charts/epsilon"][-1][1] == pytest.approx(start + (0.1 - start) * 99 / 150)

    def learn(batch, gamma, *networks, **others):
        used.update(others, batch_size=len(batch[1]), gamma=gamma, networks=networks)
        return torch.zeros(len(module.LOSSES))

    variables["update"].__globals__["learn"] = learn
    variables["update"]()
    networks = [variables[name] for name in (*learners(checkpoint), "target_network")]
    assert used["networks"] == tuple(networks) and (used["batch_size"], used["gamma"]) == (7, 0.5)
    assert 60 < variables["rb"].count <= 90 and variables["eval_envs"].num_envs == 3 and not used.get("double")
    for name, network, rate in zip(("optimizer", "v_optimizer"), networks[:-1], (1e-3, 2e-3)):
        (group,) = used[name].param_groups
        assert (group["lr"], group["eps"], group["params"]) == (rate, 1e-3, list(network.parameters()))
    _, measured = variables["look"](variables["rb"].obs)
    if "v_network" in checkpoint:
        v = variables["v_network"](variables["rb"].obs).squeeze(1)
        assert torch.equal(measured["v_minus_max_q"], v - variables["q_network"](variables["rb"].obs).amax(1))


def test_another_seed_plays_other_games_with_other_actions(tmp_path):
    flags = [*TOY, "--total-timesteps", 40, "--learning-starts", 40, "--seed"]
    first, second = (run("ddqn_atari.py", *flags, seed, cwd=tmp_path) for seed in (1, 2))
    assert not torch.equal(memory_of(first)[1], memory_of(second)[1])
    assert not torch.equal(first.variables["rb"].obs, second.variables["rb"].obs)
    assert first.variables["seed_for"](1, 40) != second.variables["seed_for"](1, 40) != second.variables["seed_for"](1)


def test_progress_is_told_every_ten_seconds_and_no_eta_before_learning(tmp_path, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    out = run("ddqn_atari.py", *TOY_FLAGS, "--total-timesteps", 600, cwd=tmp_path).stdout
    lines = re.findall(r"step (\d+)/600  SPS [\d,]+  ETA (.*)  return \S+(?: yet)?  epsilon [\d.]+\n", out)
    # the speed of the steps before learning would promise too much
    assert len(lines) > 3 and all((eta == "once learning") == (int(step) < 212) for step, eta in lines), out


def start_and_kill(script, flags, cwd, number, before=()):
    """Start a script and send it signal `number` once it has saved a checkpoint."""
    process = start(f"{script}.py", *flags, "--checkpoint-frequency", 300, cwd=cwd, before=before)
    for _ in range(4000):
        if list(Path(cwd).glob("runs/*/*.pt")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    time.sleep(1)  # TensorBoard orders event files by the second in which they were begun
    return process.returncode, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_run_resumes(tmp_path, number):
    script = {signal.SIGTERM: "dqv_atari", signal.SIGHUP: "dqv_max_atari", signal.SIGKILL: "ddqn_atari"}[number]
    code, out = start_and_kill(script, TOY_FLAGS, tmp_path, number)
    assert code == (-number if number == signal.SIGKILL else 130), out
    assert number == signal.SIGKILL or re.search(rf"{script}.py --resume runs/\S+ --env-id \S+ goes on\n$", out), out
    folder = only_run(tmp_path / "runs")
    killed = torch.load(folder / f"{script}.pt")
    assert killed["global_step"] < 1200 and killed["updates"] > 5
    done = run(f"{script}.py", "--resume", folder, *TOY[:2], "--checkpoint-frequency", 500, cwd=tmp_path)
    assert only_run(tmp_path / "runs") == folder
    resumed, logged = torch.load(folder / f"{script}.pt"), scalars(folder)
    assert 1200 <= resumed["global_step"] < 1208 and not list(folder.glob("*.tmp"))
    assert 0 <= (resumed["global_step"] - 200) // 8 - resumed["updates"] <= 1  # refilling is not counted
    refilled = memory_of(done).shape[1] - (resumed["global_step"] - killed["global_step"])
    assert 0 <= refilled - min(killed["global_step"], 200) < 4
    for tag, points in logged.items():  # no point twice
        steps = [step for step, _ in points]
        assert steps == sorted(steps) and (tag.startswith("charts/episodic") or len(set(steps)) == len(steps)), tag
    # where it was killed decides what follows: in one of many runs the last evaluation alone fell to 2.25
    assert max(value for step, value in logged["eval/episodic_return"] if step > killed["global_step"]) > 3.5
    for name in [name for name in resumed if name.endswith("optimizer")]:
        steps = [state["step"] for state in resumed[name]["state"].values()]
        assert len(steps) == 10  # a stop between an optimizer's step and the count of updates leaves them apart by one
        assert all(0 <= float(step) - resumed["updates"] <= 1 for step in steps)


def test_a_closed_terminal_does_not_stop_what_nohup_started(tmp_path):
    code, out = start_and_kill("ddqn_atari", TOY_FLAGS, tmp_path, signal.SIGHUP, before=["nohup"])
    assert code == 0 and "saved runs/" in out


def test_resuming_continues_networks_and_moments_and_leaves_a_finished_run_alone(script, source, tmp_path):
    path, checkpoint = source(script)
    folder = tmp_path / "run"
    shutil.copytree(path.parent, folder)
    steps = checkpoint["global_step"] + 1
    for flags, says in (("", f"has made its {checkpoint['args']['total_timesteps']:,} steps"),
                        (f"--total-timesteps {steps} --freeze-features", "--freeze-features True: "),
                        (f"--total-timesteps {steps} --train-frequency 1", "goes on with 8")):  # fmt: skip
        assert says in refused(f"{script}.py", "--resume", folder, *TOY[:2], *flags.split(), cwd=tmp_path)
    again = torch.load(folder / path.name)
    flags = ["--resume", folder, *TOY[:2], "--total-timesteps", steps, "--learning-rate", 5e-4]
    done = run(f"{script}.py", *flags, cwd=tmp_path)  # one more step of the game
    assert done.variables["optimizers"]["optimizer"].param_groups[0]["lr"] == 5e-4
    more = torch.load(folder / path.name)
    assert more["updates"] - checkpoint["updates"] <= 1 and "refilling" not in done.stdout
    for name in [name for name in checkpoint if name.endswith("network")]:
        for tensor, old, new in zip(*(c[name].values() for c in (checkpoint, again, more))):
            assert torch.equal(tensor, old) and (tensor - new).abs().max() < 2e-2
            assert name != "target_network" or torch.equal(tensor, new)  # it is not copied at this step
    before, after = (c["optimizer"]["state"][0]["exp_avg_sq"] for c in (checkpoint, more))
    assert before.max() > 0 and (after >= 0.99 * before).all()
    assert scalars(folder)["eval/episodic_return"][:3] == scalars(path.parent)["eval/episodic_return"]


def test_an_evaluation_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    """Also the last one, after which nothing is left to do."""
    calls, measure = [], torch.linalg.eigvalsh

    def stop(matrix):
        calls.append(matrix)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", stop)
    assert run("ddqn_atari.py", *TOY_FLAGS, cwd=tmp_path, check=False).returncode == 130
    run("ddqn_atari.py", "--resume", only_run(tmp_path / "runs"), *TOY_FLAGS[:2], cwd=tmp_path)
    first, second, last = (step for step, _ in scalars(only_run(tmp_path / "runs"))["eval/episodic_return"])
    assert 500 <= first < 504 and 1000 <= second < 1004 and 1200 <= last < 1204 and len(calls) == 4


def test_a_full_disk_and_a_closed_pipe_keep_a_checkpoint(tmp_path, monkeypatch):
    def full(state, path):
        if state["updates"] > 60:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device" in refused("dqv_atari.py", *TOY_FLAGS, cwd=tmp_path)
    folder = only_run(tmp_path / "runs")
    assert not list(folder.glob("*.tmp")) and 5 < torch.load(folder / "dqv_atari.pt")["updates"] <= 60
    command = [sys.executable, f"{ROOT}/ddqn_atari.py", *TOY_FLAGS, "--no-cuda", "--checkpoint-frequency", "0"]
    pipe = f"({shlex.join(command)} --logdir pipe; echo $? >&2) | head -n 2"
    closed = subprocess.run(pipe, shell=True, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert closed.stdout.startswith("toy_env") and "--resume" in closed.stderr and "Traceback" not in closed.stderr
    assert torch.load(only_run(tmp_path / "pipe") / "ddqn_atari.pt")["global_step"] > 0


def test_what_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.functional, "mse_loss", lambda v, target: (v - target).sum() * float("inf"))
    assert "not finite at step 5" in refused("dqv_atari.py", *TOY_FLAGS, cwd=tmp_path)  # at the first checkpoint
    assert not list(only_run(tmp_path / "runs").glob("*.pt"))


def test_two_runs_in_the_same_second_have_their_own_folders_and_wandb_sees_their_event_files(tmp_path, monkeypatch):
    files = []  # that are there when wandb starts: it mirrors those that come after
    wandb = SimpleNamespace(init=lambda **_: files.append(list(tmp_path.rglob("*tfevents*"))))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(time, "time", lambda: 7.0)
    for flags in (["--track"], []):
        run("ddqn_atari.py", *TOY, *flags, cwd=tmp_path)
    assert files == [[]]
    names = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert names == ["toy_env-Toy-v0__ddqn_atari__1__7", "toy_env-Toy-v0__ddqn_atari__1__7-2"]


# -------------------------------------------------------------------------------------------------------- evaluation
def test_evaluate_prints_what_was_measured(source, tmp_path):
    path = shutil.copy(source("dqv_max_atari")[0], tmp_path)
    flags = [*TOY[:2], "--eval-episodes", 20, "--capture-video"]
    first, second = (run("dqv_max_atari.py", "--evaluate", p, *flags, cwd=tmp_path).stdout for p in (path, tmp_path))
    assert first.splitlines()[-1] == second.splitlines()[-1] and "n = 20" in first and "toy_env:Toy-v0" in first
    by_chance = run("dqv_max_atari.py", "--evaluate", path, *flags, "--eval-epsilon", 1, cwd=tmp_path).stdout
    returns = [float(out.split("episodic_return ")[1].split(",")[0]) for out in (first, by_chance)]
    assert 4 < returns[0] <= 5 and 1 < returns[1] < 2.5
    with Image.open(tmp_path / "dqv_max_atari.gif") as gif:
        assert 1 < gif.n_frames <= 5 and gif.size == (252, 252)  # pillow merges equal frames
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("weights, games, least", [
    ("pong_dqn", 2, -5), ("pong_dqv", 2, -5), ("pong_dqv_max", 2, -5), ("boxing_dqv", 2, 0.5), ("enduro_dqv", 1, 100),
    ("pong_dqv_enduro", 2, 5),
])  # fmt: skip
def test_the_committed_networks_play(weights, games, least, tmp_path):
    """Their page says how well; random play has -20.7, 0.1 and 0."""
    script = f"{weights.split('_', 1)[1].replace('dqn', 'ddqn').removesuffix('_enduro')}_atari.py"
    flags = ["--evaluate", ROOT / "results" / "atari" / f"{weights}.pt", "--eval-episodes", games]
    out = run(script, *flags, cwd=tmp_path).stdout
    assert float(out.split("episodic_return ")[1].split(",")[0]) > least


class Corridor(gym.vector.VectorEnv):
    """Two games of three states that bars tell apart; the second game is a step shorter. State 2 costs a life."""

    single_action_space, num_envs, metadata = gym.spaces.Discrete(2), 2, {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def look(self):
        stacks = np.zeros((2, 4, 84, 84), np.uint8)
        for i, state in enumerate(self.states):
            stacks[i, -1, :, 20 * state : 20 * state + 20] = 255
        return stacks

    def reset(self, *, seed=None, options=None):
        self.states, self.ends = np.zeros(2, int), np.array([3, 2])
        return self.look(), {"lives": np.array([2, 2])}

    def step(self, actions):
        self.states += 1
        over = self.states >= self.ends
        return self.look(), np.array([5.0, -2.0]), over, np.zeros(2, bool), {"lives": 2 - (self.states >= 2)}


@pytest.mark.parametrize("flags, followed", [
    ({}, (1.5 + 1 + 1 - 1.5 - 1) / 5), ({"terminal": False}, (1.75 + 1.5 + 1 - 1.5 - 1) / 5),
    ({"life_loss_terminal": False}, (1.75 + 1.5 + 1 - 1.5 - 1) / 5),
])  # fmt: skip
def test_evaluation_s_numbers(flags, followed):
    """Returns raw, returns-to-go clipped and discounted, and the three diagnostics, on what two games visited."""
    torch.manual_seed(0)
    network, args = shared.QNetwork(2), shared.Args(gamma=0.5, eval_epsilon=0.0, **flags)
    with torch.no_grad():
        network.network[7].weight[:500] = 0
        network.network[7].bias[:500] = -1.0  # 500 units that never fire
        network.network[4].bias[:10] = -1e6  # and 10 channels
    envs, visited = Corridor(), []

    def look(stacks):
        visited.append(stacks)
        max_q, actions = network(stacks).max(dim=1)
        return actions, {"max_q": max_q}

    scalars = shared.evaluate(args, envs, network, look, 1, None)
    assert (scalars["episodic_return"], scalars["episodic_return_std"]) == (5.5, 9.5)  # 15 and -4
    assert scalars["discounted_return"] == pytest.approx(followed)
    states = torch.stack([visited[0][0], visited[1][0], visited[2][0], visited[0][1], visited[1][1]])
    with torch.no_grad():
        hidden, channels = network.network[:9](states / 255.0), network.network[:6](states / 255.0)
        assert scalars["max_q"] == pytest.approx(float(network(states).amax(1).mean()), abs=1e-6)
    dead = (hidden.amax(0) == 0).sum() + (channels.amax((0, 2, 3)) == 0).sum()
    assert scalars["dead_units"] == pytest.approx(float(dead) / 576) and dead >= 510
    assert scalars["feature_norm"] == pytest.approx(float(hidden.norm(dim=1).mean()), rel=1e-5)
    singular = torch.linalg.svdvals(hidden.double())
    srank = 1 + int((singular.cumsum(0) < 0.99 * singular.sum()).sum())
    assert scalars["feature_rank"] == srank and not network.network[5]._forward_hooks


def test_max_q_is_of_games_that_go_on(tmp_path):
    done = run("ddqn_atari.py", *TOY_FLAGS, "--total-timesteps", 240, "--learning-starts", 40, "--end-e", 0.0,
               "--start-e", 0.0, cwd=tmp_path)  # fmt: skip
    logged = scalars(only_run(tmp_path / "runs"))
    variables = done.variables
    assert variables["sums"].tolist() == [0.0] * 5 and len(logged["charts/max_q"]) == 1
    variables["rb"].playing[:] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    variables["act"]()
    max_q = variables["q_network"](variables["rb"].obs).amax(1).detach()
    assert variables["sums"][-2:].tolist() == pytest.approx([float(max_q[0] + max_q[3]), 2.0])


# ---------------------------------------------------------------------------------------------------------- transfer
CATCH = "--env-id catch_env:Catch-v0 --num-envs 4 --buffer-size 1000 --learning-starts 4 --train-frequency 8 "
CATCH += "--eval-frequency 0 --eval-episodes 4 --total-timesteps 4 --narrow 4"


def transferred(script, cwd, *flags):
    cwd.mkdir(exist_ok=True)
    done = run(f"{script}.py", *CATCH.split(), *flags, cwd=cwd)
    return done, torch.load(only_run(cwd / "runs") / f"{script}.pt")


def test_fine_tuning_copies_all_but_the_heads_which_are_new(script, source, tmp_path):
    path, checkpoint = source(script)
    done, before = transferred(script, tmp_path / "a", "--pretrained", path.parent)
    assert learners(before) == learners(checkpoint) and len(learners(before)) == (1 if script == "ddqn_atari" else 2)
    assert before["transfers"] == 1 and f"q_network: all but the head of {path}" in done.stdout
    fresh = before_training(script)
    for network in learners(before):
        for name, tensor in checkpoint[network].items():
            assert torch.equal(before[network][name], tensor) == trunk(name), name
            # the source of the same seed began with `fresh`: its features are used to that head
            assert trunk(name) or not torch.equal(before[network][name], fresh[network][name])
    copied = before["v_network" if script == "dqv_atari" else "q_network"]
    assert all(torch.equal(before["target_network"][name], tensor) for name, tensor in copied.items())
    again = torch.load(shutil.copy(only_run(tmp_path / "a" / "runs") / f"{script}.pt", tmp_path / "second.pt"))
    _, third = transferred(script, tmp_path / "c", "--pretrained", tmp_path / "second.pt")
    heads = [c["q_network"]["network.9.weight"] for c in (before_training(script), again, third)]
    assert third["transfers"] == 2 and not any(torch.equal(heads[i], heads[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    _, after = transferred(script, tmp_path / "b", "--pretrained", path, "--total-timesteps", 200)
    assert after["updates"] > 8
    for network in learners(after):
        assert not any(torch.equal(after[network][name], tensor) for name, tensor in before[network].items())


def test_only_head_leaves_frozen_tensors_bit_identical(script, source, tmp_path):
    path, checkpoint = source(script)
    flags = ["--pretrained", path, "--freeze-features", "--total-timesteps", 200]
    done, after = transferred(script, tmp_path, *flags)
    done = run(f"{script}.py", "--resume", only_run(tmp_path / "runs"), "--total-timesteps", 400, cwd=tmp_path)
    resumed = torch.load(only_run(tmp_path / "runs") / f"{script}.pt")
    assert after["updates"] > 8 and resumed["updates"] > 30
    for network, optimizer in zip(learners(after), ("optimizer", "v_optimizer")):
        assert len(after[optimizer]["state"]) == len(resumed[optimizer]["state"]) == 2
        for name, tensor in after[network].items():
            assert torch.equal(tensor, checkpoint[network][name]) == torch.equal(tensor, resumed[network][name])
            assert torch.equal(tensor, checkpoint[network][name]) == trunk(name)
    parameters = done.variables["q_network"].network[:-1].parameters()
    assert all(parameter.grad is None for parameter in parameters)  # autograd records nothing below the head


def test_hybrid_keep_head_and_head_fraction(source, tmp_path):
    path, checkpoint = source("dqv_max_atari")
    head = tmp_path / "head.pt"
    other = {key: {name: tensor + 1 for name, tensor in checkpoint[key].items()} for key in learners(checkpoint)}
    torch.save(checkpoint | other, head)
    flags = ["--env-id", "toy_env:Toy-v0", "--pretrained", path]
    _, fresh = transferred("dqv_max_atari", tmp_path / "fresh", *flags)
    _, hybrid = transferred("dqv_max_atari", tmp_path / "hybrid", *flags, "--pretrained-head", head)
    _, kept = transferred("dqv_max_atari", tmp_path / "kept", *flags, "--keep-head")
    _, added = transferred("dqv_max_atari", tmp_path / "added", *flags, "--head-fraction", 0.5)
    done, catch = transferred("dqv_max_atari", tmp_path / "catch", "--pretrained", path, "--head-fraction", 0.5)
    _, fresh_catch = transferred("dqv_max_atari", tmp_path / "fresh_catch", "--pretrained", path)
    assert "q_network: nothing of its head, x 0.5, added" in done.stdout
    logged = scalars(only_run(tmp_path / "catch" / "runs"))
    assert logged["eval/caught"] == logged["eval/episodic_return"]
    for key in learners(checkpoint):
        for name, tensor in checkpoint[key].items():
            assert torch.equal(hybrid[key][name], tensor if trunk(name) else other[key][name])
            assert torch.equal(kept[key][name], tensor)
            assert torch.equal(added[key][name], tensor if trunk(name) else fresh[key][name] + 0.5 * tensor)
            moved = not trunk(name) and key == "v_network"  # Catch's actions are others, a state's value is one
            assert torch.equal(catch[key][name], fresh_catch[key][name] + 0.5 * tensor * moved)


def test_the_memory_is_filled_by_a_policy_that_was_transferred_with_its_head(source, tmp_path):
    path, _ = source("ddqn_atari")
    flags = ["--env-id", "toy_env:Toy-v0", "--pretrained", path, "--learning-starts", 400, "--total-timesteps", 400,
             "--start-e", 0.05]  # fmt: skip
    for extra, low, high in (
        (["--keep-head"], 4.3, 5),
        (["--pretrained-head", path], 4.3, 5),
        (["--freeze-features"], 1, 2.3),
    ):
        transferred("ddqn_atari", tmp_path / extra[0], *flags, *extra)
        returns = [v for _, v in scalars(only_run(tmp_path / extra[0] / "runs"))["charts/episodic_return"]]
        assert len(returns) > 60 and low < np.mean(returns) < high, extra


@pytest.mark.parametrize("script, of", [("ddqn_atari", "dqv_atari"), ("dqv_atari", "ddqn_atari")])
def test_a_checkpoint_of_another_algorithm_initialises_the_trunks(script, of, source, tmp_path):
    path, checkpoint = source(of)
    _, copy = transferred(script, tmp_path / "a", "--pretrained", path)
    for network in learners(copy):  # V starts from Q's layers where there is no V
        theirs = checkpoint.get(network, checkpoint["q_network"])
        assert all(torch.equal(copy[network][name], theirs[name]) for name in filter(trunk, theirs))
    says = f"is no run of {importlib.import_module(script).ALGORITHM} to resume"
    assert says in refused(f"{script}.py", "--resume", path, *TOY[:2], cwd=tmp_path)


def test_where_v_shares_q_s_layers_they_come_from_q(source, tmp_path):
    path, checkpoint = source("dqv_atari")
    flags = ["--pretrained", path, "--architecture", "hard", "--keep-head", *TOY[:2]]
    _, copy = transferred("dqv_atari", tmp_path, *flags)
    assert all(torch.equal(copy["q_network"][name], tensor) for name, tensor in checkpoint["q_network"].items())


def test_cleanrl_s_bare_state_dict_is_accepted(source, tmp_path):
    _, checkpoint = source("ddqn_atari")
    torch.save(checkpoint["q_network"], bare := tmp_path / "dqn_atari.cleanrl_model")
    flags = ["--evaluate", bare, "--narrow", 4, "--env-id", "toy_env:Toy-v0"]
    done = run("ddqn_atari.py", *flags, cwd=tmp_path)
    assert 4 < float(done.stdout.split("episodic_return ")[1].split(",")[0]) <= 5 and "n = 100" in done.stdout
    assert "another architecture" in refused("dqv_atari.py", *flags, cwd=tmp_path)
    _, copy = transferred("dqv_atari", tmp_path / "run", "--pretrained", bare)
    assert torch.equal(copy["q_network"]["network.7.weight"], checkpoint["q_network"]["network.7.weight"])


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, says", [
    ("--env-id ALE/Pongg-v5", "ALE/Pongg-v5"),
    ("--env-id CartPole-v1", "uint8 (4, 84, 84)"),
    ("--env-id toy_env:ToyFromOne-v0", "actions Discrete(3, start=1) instead of"),
    ("--env-id toy_env:ToyRepeated-v0", "a stack must begin with black frames"),
    ("--env-id nowhere:Game-v0", "--env-id nowhere:Game-v0: No module named 'nowhere'"),
    ("--evaluate missing.pt", "missing.pt: 0 checkpoints (*.pt) are there, one is needed"),
    ("--pretrained many", "many: 2 checkpoints (*.pt) are there, one is needed"),
    ("--evaluate text", "text/text.pt is not a checkpoint of a Q-network\n"),
    ("--num-envs -1", "--num-envs must be between 0"),
    ("--gamma nan", "--gamma must be between 0 and 1, not nan"),
    ("--total-timesteps 40000", "--learning-starts 50000 is beyond --total-timesteps 40000"),
    ("--exp-name a/b", "--exp-name a/b is not the name of a file"),
    ("--keep-head", "--pretrained"),
    ("--pretrained=", "--pretrained is empty"),
    ("--env-id toy_env:Toy-v0 --logdir text/text.pt/runs", "Not a directory: 'text/text.pt/runs"),
    (f"--env-id toy_env:Toy-v0 --buffer-size {10**14} --total-timesteps {10**14}", "allocate"),
    ("--freeze-features", "need a --pretrained run"),
])  # fmt: skip
def test_bad_input_gets_one_line(flags, says, tmp_path):
    for folder, name in (("many", "a.pt"), ("many", "b.pt"), ("text", "text.pt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("not a checkpoint")
    error = refused("dqv_atari.py", *flags.split(), cwd=tmp_path)
    assert says in error and error.startswith("dqv_atari.py: error: ") and "weights_only" not in error


def test_a_checkpoint_names_no_module_and_no_path(source, tmp_path):
    """A downloaded run's folder must neither import code nor write outside of itself."""
    _path, checkpoint = source("ddqn_atari")
    (tmp_path / "run").mkdir()
    (tmp_path / "payload.py").write_text("raise SystemExit('imported')")
    evil = checkpoint["args"] | {"env_id": "payload:Toy-v0", "exp_name": "../escaped", "logdir": "elsewhere"}
    torch.save(checkpoint | {"args": evil}, tmp_path / "run" / "x.pt")
    for flag in ("--evaluate", "--resume"):
        assert "say --env-id payload:Toy-v0 if you trust it" in refused("ddqn_atari.py", flag, "run", cwd=tmp_path)
    evil |= {"env_id": "toy_env:Toy-v0", "total_timesteps": checkpoint["global_step"] + 1}
    torch.save(checkpoint | {"args": evil}, tmp_path / "run" / "x.pt")
    flags = ["--resume", "run", "--env-id", "toy_env:Toy-v0"]
    assert "../escaped is not the name of a file" in refused("ddqn_atari.py", *flags, cwd=tmp_path)
    torch.save(checkpoint | {"args": evil | {"exp_name": "x"}}, tmp_path / "run" / "x.pt")
    run("ddqn_atari.py", *flags, cwd=tmp_path)
    assert torch.load(tmp_path / "run" / "x.pt")["global_step"] > checkpoint["global_step"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["payload.py", "run"]


def test_foreign_checkpoints_and_heads_are_named_in_one_line(source, tmp_path):
    _path, checkpoint = source("dqv_atari")
    smaller = {name: tensor[..., :1].clone() for name, tensor in checkpoint["q_network"].items()}
    for content, flags, says in (
        ({"weights": [1, 2]}, [], "is not a checkpoint of a Q-network"),
        (smaller, [], "another architecture: size mismatch for network.7"),
        (checkpoint["q_network"], ["--keep-head"], "its actions are unknown, those of this game ['LEFT'"),
        (checkpoint["q_network"] | {"value.0.bias": torch.zeros(1)}, ["--evaluate", "other.pt"], '"value.0.bias"'),
    ):
        torch.save(content, tmp_path / "other.pt")
        flags = [*CATCH.split(), "--pretrained", tmp_path / "other.pt", *flags]
        assert says in refused("dqv_atari.py", *flags, "--narrow", 4, cwd=tmp_path)


# -------------------------------------------------------------------------------------------------------- copy-alone
def test_the_script_runs_alone_on_a_real_game(tmp_path):
    shutil.copy(ROOT / "dqv_max_atari.py", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    command, options = [sys.executable, "dqv_max_atari.py"], {"cwd": tmp_path, "env": env, "text": True}
    flags = "--env-id ALE/MsPacman-v5 --num-envs 4 --total-timesteps 1500 --learning-starts 1100 --train-frequency 32"
    flags += " --buffer-size 1000 --target-network-frequency 400 --eval-episodes 1 --capture-video --narrow 4"
    subprocess.run([*command, *flags.split()], check=True, capture_output=True, **options)
    folder = only_run(tmp_path / "runs")
    assert folder.name.startswith("ALE-MsPacman-v5__dqv_max_atari__1__")
    logged = scalars(folder)
    assert V_TAGS <= set(logged)
    for tag in ("charts/episodic_return", "eval/episodic_return"):  # raw scores, not clipped ones
        assert all(value % 10 == 0 for _, value in logged[tag]) and max(logged[tag])[1] > 0
    assert torch.load(folder / "dqv_max_atari.pt")["updates"] > 10 and list(folder.glob("eval_*.gif"))
    missing = subprocess.run([*command, "--env-id", "catch_env:Catch-v0"], check=False, capture_output=True, **options)
    assert missing.returncode == 1 and missing.stderr.strip().count("\n") == 0
    assert "No module named 'catch_env'" in missing.stderr


# -------------------------------------------------------------------------------------------- CUDA, without a GPU
@pytest.mark.parametrize("frozen", [False, True])
def test_no_autograd_node_outlives_a_call_of_what_is_captured(module, monkeypatch, frozen):
    """A parameter's AccumulateGrad node remembers its stream; a stale one makes CUDA refuse the capture."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    networks, target, extra = learner(module)
    for network in networks:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not frozen or name in module.head_names(network))
    optimizers = [module.make_optimizer(module.Args(), "rmsprop", network, 1e-3) for network in networks]
    obs = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    batch = obs, torch.tensor([0, 1, 2, 0]), torch.ones(4), obs, torch.zeros(4, dtype=torch.bool)
    trained = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    calls, edge = [], torch.autograd.graph.get_gradient_edge

    def update():
        stale = [edge(parameter).node.metadata.get("tag") for parameter in trained]
        module.learn(batch, 0.99, *networks, target, *optimizers, **extra)
        for parameter in trained:
            edge(parameter).node.metadata["tag"] = len(calls)
        calls.append(stale)

    graphed = module.graphed(update)
    before = trained[0].detach().clone()  # a copy with a grad_fn would be such a node
    for _ in range(6):
        graphed()
    assert len(calls) == 4 and calls == [[None] * len(trained)] * 4  # three for real, one to be captured
    assert not torch.equal(before, trained[0])


def test_sampling_and_learning_read_no_value_on_the_host(module, monkeypatch):
    """On the meta device whoever looks at a value, or mixes in a tensor of the CPU, gets an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which does not know this device
    replay = module.Replay(100, 4, torch.device("meta"))
    replay.store()
    batch = replay.sample(8)
    networks, target, extra = learner(module)
    networks, target = [network.to("meta") for network in networks], target.to("meta")
    for name in ("rmsprop", "sgd"):
        optimizers = [module.make_optimizer(module.Args(), name, network, 1e-3) for network in networks]
        logged = module.learn(batch, 0.99, *networks, target, *optimizers, **extra)
        assert logged.device.type == "meta" and logged.shape == (len(module.LOSSES),)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_optimizers_keep_their_state_on_the_device(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = nn.Parameter(torch.zeros(3, device="cuda"))
        network = nn.ParameterList([parameter])
        optimizer = shared.make_optimizer(shared.Args(), name, network, 1e-3)
        parameter.grad = torch.ones(3, device="cuda")
        optimizer.step()
        states = list(optimizer.state[parameter].values())
    assert len(states) >= 2 and all(state.device.type == "cuda" for state in states)
    assert optimizer.param_groups[0].get("capturable", True)  # without which CUDA refuses to capture Adam's step


# -------------------------------------------------------------------------------------------------------------- CUDA
@needs_cuda
@pytest.mark.parametrize(
    "flags", ["", "--freeze-features", "--optimizer rmsprop", "--resume", "--learning-rate 0 --start-e 0 --end-e 0"]
)
def test_captured_and_eager_updates_agree_on_cuda(script, source, tmp_path, flags):
    results = []
    for graphs in ("--cudagraphs", "--no-cudagraphs"):
        # random actions, or the first network's, so that rounding cannot change the data
        same = f"--start-e 1 --end-e 1 --total-timesteps 1900 {flags.removeprefix('--resume')}".split()
        same += ["--pretrained", str(source(script)[0])] if "--freeze-features" in flags else []
        command = [sys.executable, str(ROOT / f"{script}.py"), "--logdir", graphs[2:], graphs]
        subprocess.run([*command, *TOY_FLAGS, *same], cwd=tmp_path, check=True)
        folder = only_run(tmp_path / graphs[2:])
        if "--resume" in flags:
            more = ["--resume", str(folder), "--env-id", "toy_env:Toy-v0", "--total-timesteps", "2600"]
            subprocess.run([*command, *more], cwd=tmp_path, check=True)
        results.append((torch.load(folder / f"{script}.pt", map_location="cpu"), scalars(folder)))
    (captured, logged), (eager, eager_logged) = results
    assert captured["updates"] == eager["updates"] >= 200
    for key in [key for key in captured if key.endswith(("network", "optimizer"))]:
        one, other = (checkpoint[key].get("state", checkpoint[key]) for checkpoint in (captured, eager))
        assert one
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)
    for tag in [tag for tag in logged if tag.startswith(("losses/", "charts/max_q"))]:
        values = [[value for _, value in points[tag]] for points in (logged, eager_logged)]
        assert values[0] == pytest.approx(values[1], abs=1e-2), tag
