"""What the Atari scripts must do: runs for every one of them, parts that are equal to the letter once.

That they are equal is held by `test_repository.py`; targets and updates are in `test_targets.py`.
"""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import ROOT, only_run, run, scalars
from gymnasium.vector import AutoresetMode
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

TAGS = {
    "charts/episodic_return", "charts/episodic_length", "charts/epsilon", "charts/max_q",
    "losses/td_loss", "losses/q_values",
    "eval/episodic_return", "eval/episodic_return_std", "eval/max_q", "eval/discounted_return",
}  # fmt: skip
V_TAGS = TAGS | {"losses/v_loss", "losses/v_values", "eval/v_minus_max_q"}
SCRIPTS = {"ddqn_atari": TAGS, "dqv_atari": V_TAGS, "dqv_max_atari": V_TAGS}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture
def module(script):
    return importlib.import_module(script)


@pytest.fixture
def shared():
    """One of the scripts, for parts that are equal in all."""
    return importlib.import_module("ddqn_atari")


def trunk(name):
    return not name.startswith("network.9")


def before_training(script):
    """{network: state dict} of a run with seed 1 before its first update."""
    module = importlib.import_module(script)
    torch.manual_seed(1)
    q_network = module.QNetwork(3)
    if script == "ddqn_atari":
        return {"q_network": q_network.state_dict(), "target_network": q_network.state_dict()}
    v_network = module.QNetwork(1)
    target = v_network if script == "dqv_atari" else q_network
    networks = {"q_network": q_network, "v_network": v_network, "target_network": target}
    return {name: network.state_dict() for name, network in networks.items()}


@pytest.fixture(scope="session")
def source(tmp_path_factory, toy_flags):
    """{script: (checkpoint path, checkpoint)} of finished runs on the toy game, replay memory saved."""
    runs = {}

    def get(script):
        if script not in runs:
            cwd = tmp_path_factory.mktemp(script)
            run(f"{script}.py", *toy_flags, "--save-buffer", cwd=cwd)
            path = only_run(cwd / "runs") / f"{script}.pt"
            runs[script] = path, torch.load(path)
        return runs[script]

    return get


# ----------------------------------------------------------------------------------------------- network and targets


def test_network_is_the_nature_dqn_with_cleanrl_names(module):
    network = module.QNetwork(6)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert list(shapes) == [f"network.{layer}.{part}" for layer in (0, 2, 4, 7, 9) for part in ("weight", "bias")]
    counts = [sum(p.numel() for p in network.network[layer].parameters()) for layer in (0, 2, 4, 7)]
    assert counts == [8224, 32832, 36928, 1606144]  # the thesis' appendix
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    assert network(frames).shape == (3, 6)
    assert torch.allclose(network(frames), network.network(frames.float() / 255))


def test_linear_schedule(shared):
    epsilon = [shared.linear_schedule(1.0, 0.1, 1000, t) for t in (0, 250, 500, 1000, 5000)]
    assert epsilon == pytest.approx([1.0, 0.775, 0.55, 0.1, 0.1])
    assert shared.linear_schedule(0.5, 0.1, 0, 0) == 0.1


def test_frozen_features_cost_no_backward_pass(module):
    network = module.QNetwork(3)
    for parameter in list(network.parameters())[:-2]:
        parameter.requires_grad_(False)
    assert not network.network[:-1](torch.zeros(1, 4, 84, 84)).requires_grad  # autograd records nothing below the head
    network(torch.zeros(1, 4, 84, 84)).sum().backward()
    assert [p.grad is None for p in network.parameters()] == [True] * 8 + [False] * 2


# ----------------------------------------------------------------------------------------------------- replay memory


class NaiveReplay:
    """Whole stacks in a list of rows; the last `capacity` slots that are transitions may be drawn."""

    def __init__(self, capacity, num_envs):
        self.rows, self.keep = [], -(-capacity // num_envs)

    def transitions(self):
        return [transition for row in self.rows[-self.keep :] for transition in row]


def picture(number):
    frame = np.zeros((84, 84), np.uint8)
    frame[0, :4] = [1, number & 255, number >> 8 & 255, number >> 16]
    return frame


def drawn(replay, ranks):
    """The transitions with these ranks, through `sample` itself."""
    fractions = (torch.as_tensor(ranks, dtype=torch.float64) + 0.5) / replay.count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda n, **_: fractions)
        return replay.sample(len(ranks))


@pytest.mark.parametrize("num_envs, capacity", [(1, 37), (3, 100), (8, 1000), (8, 12_000)])
def test_replay_equals_a_naive_list_of_stacks(shared, num_envs, capacity):
    rng, number = np.random.default_rng(num_envs), 0
    replay, naive = shared.Replay(capacity, num_envs, torch.device("cpu")), NaiveReplay(capacity, num_envs)
    blank = np.zeros((84, 84), np.uint8)
    stacks = [[blank, blank, blank, picture(i + 1)] for i in range(num_envs)]
    number, over, seen, kinds = num_envs, np.zeros(num_envs, bool), 0, np.zeros(4, int)
    replay.start(np.stack([stack[-1] for stack in stacks]))
    iterations = -(-10_000 // num_envs)
    for iteration in range(iterations):
        actions, rewards = rng.integers(18, size=num_envs), rng.integers(-1, 2, size=num_envs)
        chance, restarted = rng.random(num_envs), over
        terminated, life_lost, truncated = (
            chance < 0.05,
            (0.05 < chance) & (chance < 0.1),
            (0.1 < chance) & (chance < 0.13),
        )
        terminated, life_lost, truncated = (~restarted & kind for kind in (terminated, life_lost, truncated))
        kinds += [restarted.sum(), terminated.sum(), life_lost.sum(), truncated.sum()]
        frames, row = [], []
        for i in range(num_envs):
            number += 1
            frames.append(picture(number))
            before = stacks[i]
            stacks[i] = [blank] * 3 + [frames[i]] if restarted[i] else [*before[1:], frames[i]]
            if not restarted[i]:
                row.append((before, actions[i], rewards[i], stacks[i], bool(terminated[i] or life_lost[i])))
        naive.rows.append(row)
        replay.add(actions, rewards, terminated | life_lost, np.stack(frames), restarted)
        over = terminated | truncated
        if iteration % (iterations // 12) == 0 or iteration < 8 or iteration == iterations - 1:
            expected = naive.transitions()
            assert replay.count == len(expected)
            for start in range(0, len(expected), 500):  # every transition that may be drawn, in order of age
                part = expected[start : start + 500]
                obs, act, rew, next_obs, done = drawn(replay, range(start, start + len(part)))
                assert obs.dtype == next_obs.dtype == torch.uint8 and obs.shape == (len(part), 4, 84, 84)
                assert (obs.numpy() == np.stack([np.stack(t[0]) for t in part])).all()
                assert (next_obs.numpy() == np.stack([np.stack(t[3]) for t in part])).all()
                assert (act.tolist(), rew.tolist()) == ([t[1] for t in part], [t[2] for t in part])
                assert done.tolist() == [t[4] for t in part]
                seen += len(part)
    assert kinds.min() > 50 and seen >= 400
    saved = shared.Replay(capacity, num_envs, torch.device("cpu"))
    saved.load_state_dict(replay.state_dict())
    ranks = rng.integers(replay.count, size=64)
    for mine, theirs in zip(drawn(replay, ranks), drawn(saved, ranks)):
        assert torch.equal(mine, theirs)


def test_replay_draws_uniformly_and_never_an_autoreset(shared):
    torch.manual_seed(0)
    replay = shared.Replay(60, 2, torch.device("cpu"))
    replay.start(np.zeros((2, 84, 84), np.uint8))
    for t in range(200):
        restarted = np.array([t % 5 == 4, t % 7 == 6])
        actions = np.where(restarted, 999, t)
        replay.add(actions, np.zeros(2), np.zeros(2, bool), np.zeros((2, 84, 84), np.uint8), restarted)
    counts = torch.zeros(400)
    for _ in range(200):
        _, actions, _, _, _ = replay.sample(256)
        assert 999 not in actions
        counts += torch.bincount(actions, minlength=400)
    counts = counts[counts > 0]
    pairs = sum((t % 5 != 4) and (t % 7 != 6) for t in range(170, 200))
    singles = sum((t % 5 != 4) != (t % 7 != 6) for t in range(170, 200))
    assert replay.count == 2 * pairs + singles and len(counts) == pairs + singles
    each = 200 * 256 / replay.count
    expected = torch.where(counts > 1.5 * each, 2 * each, each)
    assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 5 * (2 * len(counts)) ** 0.5  # chi-square


def test_a_replay_memory_that_does_not_fit_is_refused_in_bytes(script, tmp_path):
    done = run(f"{script}.py", "--env-id", "toy_env:Toy-v0", "--buffer-size", 10**10, cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "70,560,000,000,000 bytes" in done.stderr and "--buffer-size" in done.stderr


# ----------------------------------------------------------------------------------------------------- environments


def atari_args(shared, env_id, **flags):
    return shared.Args(env_id=env_id, **flags)


def test_every_setting_of_ale_is_explicit(shared, monkeypatch):
    """Its defaults are traps: clipped rewards cannot be undone, `episodic_life` restarts the game."""
    passed = {}
    monkeypatch.setattr(shared, "AtariVectorEnv", lambda game, num_envs, **settings: passed.update(settings))
    shared.make_envs(atari_args(shared, "ALE/Pong-v5"), 8)
    assert passed == {
        "frameskip": 4, "repeat_action_probability": 0.0, "full_action_space": False, "noop_max": 30, "maxpool": True,
        "use_fire_reset": True, "episodic_life": False, "life_loss_info": False, "reward_clipping": False,
        "max_num_frames_per_episode": 108_000, "autoreset_mode": AutoresetMode.NEXT_STEP, "stack_num": 1,
        "img_height": 84, "img_width": 84, "grayscale": True, "continuous": False, "continuous_action_threshold": 0.5,
        "batch_size": 0, "num_threads": 0, "thread_affinity_offset": -1,
    }  # fmt: skip
    flags = {"repeat_action_probability": 0.25, "full_action_space": True, "maxpool": False}
    shared.make_envs(atari_args(shared, "ALE/Pong-v5", **flags), 8)
    assert flags.items() <= passed.items()


def test_stacks_from_single_frames_equal_ale_s_own(shared):
    args = atari_args(shared, "ALE/Breakout-v5")
    envs = shared.make_envs(args, 2)
    settings = dict(repeat_action_probability=0.0, reward_clipping=False, noop_max=30, use_fire_reset=True)
    reference = AtariVectorEnv("breakout", 2, stack_num=4, **settings)
    (obs, _), (stacked, _) = envs.reset(seed=3), reference.reset(seed=3)
    stacks, over, rng = torch.zeros((2, 4, 84, 84), dtype=torch.uint8), np.ones(2, bool), np.random.default_rng(0)
    shared.push_frame(stacks, obs[:, -1], over)
    over, games = np.zeros(2, bool), 0
    for _ in range(700):
        assert (stacks.numpy() == stacked).all()
        actions = rng.integers(4, size=2)
        obs, _, terminations, truncations, _ = envs.step(actions)
        stacked = reference.step(actions)[0]
        shared.push_frame(stacks, obs[:, -1], over)
        over = terminations | truncations
        games += over.sum()
    assert games >= 3


def test_life_losses_and_raw_scores(shared):
    args = atari_args(shared, "ALE/MsPacman-v5")
    envs = shared.make_envs(args, 2)
    settings = dict(repeat_action_probability=0.0, reward_clipping=False, noop_max=30, use_fire_reset=True)
    reference = AtariVectorEnv("ms_pacman", 2, stack_num=1, life_loss_info=True, **settings)
    (_, infos), _ = envs.reset(seed=3), reference.reset(seed=3)
    lives, rng, losses, games, scores = infos["lives"], np.random.default_rng(0), 0, 0, set()
    for _ in range(900):
        actions = rng.integers(9, size=2)
        _, rewards, terminations, _, infos = envs.step(actions)
        dones = terminations | (infos["lives"] < lives)  # the scripts' rule
        assert (dones == reference.step(actions)[2]).all()
        lives = infos["lives"]
        losses, games = losses + (dones & ~terminations).sum(), games + terminations.sum()
        scores |= set(rewards.tolist())
    assert games >= 2 and losses >= 2 * games  # three lives: a lost one does not end the game
    assert max(scores) >= 10 and all(score % 10 == 0 for score in scores)


def test_action_meanings(shared):
    meanings = shared.action_meanings(args := atari_args(shared, "ALE/Pong-v5"), shared.make_envs(args, 1))
    assert meanings == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    args = atari_args(shared, "ALE/Pong-v5", full_action_space=True)
    assert len(shared.action_meanings(args, shared.make_envs(args, 1))) == 18


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_logs_learns_evaluates_and_saves(script, module, source):
    path, checkpoint = source(script)
    logged = scalars(path.parent)
    assert set(logged) == SCRIPTS[script]
    assert checkpoint["global_step"] >= 1200 and checkpoint["action_meanings"] == [
        f"toy_env:Toy-v0 {i}" for i in range(3)
    ]
    assert checkpoint["args"]["total_timesteps"] == 1200 and checkpoint["args"]["env_id"] == "toy_env:Toy-v0"
    # every fourth action of the loop owes updates; those of the last step are done by whoever resumes the run
    assert 0 <= (checkpoint["global_step"] - 200) // 8 - checkpoint["updates"] <= 1 and checkpoint["updates"] > 100
    fresh = before_training(script)
    assert {name for name in checkpoint if name.endswith("network")} == set(fresh)
    frozen_copy_of = "v_network" if script == "dqv_atari" else "q_network"
    for network, tensors in fresh.items():  # the target network too has moved
        assert not any(torch.equal(checkpoint[network][name], tensor) for name, tensor in tensors.items()), network
    for name, tensor in checkpoint["target_network"].items():  # but it is behind by the updates since it was copied
        ahead = checkpoint[frozen_copy_of][name]
        assert not torch.equal(ahead, tensor) and torch.allclose(ahead, tensor, atol=0.1), name
    lengths = [value for _, value in logged["charts/episodic_length"]]
    assert set(lengths) == {5.0} and len(lengths) > 200
    steps = [step for step, _ in logged["eval/episodic_return"]]
    assert len(steps) == 3 and all(step - mark in range(8) for step, mark in zip(steps, (500, 1000, 1200)))
    assert len({step for step, _ in logged["charts/epsilon"]}) == len(logged["charts/epsilon"])
    replay = torch.load(path.parent / f"{script}_buffer_{checkpoint['global_step']}.pt")["replay"]
    assert replay["count"] == checkpoint["global_step"]  # autoresets are neither steps nor transitions
    assert replay["dones"].sum() == len(lengths)


def test_a_run_learns(script, source):
    path, checkpoint = source(script)
    returns = [value for _, value in scalars(path.parent)["eval/episodic_return"]]
    assert returns[-1] > 4, returns  # of 5; chance is 1.67, epsilon 0.05 costs 0.17
    values = {tag: points[-1][1] for tag, points in scalars(path.parent).items()}
    assert abs(values["eval/max_q"] - values["eval/discounted_return"]) < 1.5
    if "eval/v_minus_max_q" in values:  # in a game where every state has the same value
        assert abs(values["losses/v_values"] - values["losses/q_values"]) < 1
        assert abs(values["eval/v_minus_max_q"]) < 1 and values["losses/v_loss"] > 0


def test_truncated_episodes_are_no_terminals(script, tmp_path, toy_flags):
    flags = ["--env-id", "toy_env:ToyTruncated-v0", "--total-timesteps", 400, "--eval-episodes", 2, "--save-buffer"]
    run(f"{script}.py", *toy_flags, *flags, cwd=tmp_path)
    folder = only_run(tmp_path / "runs")
    logged = scalars(folder)
    assert {value for _, value in logged["charts/episodic_length"]} == {7.0}
    (memory,) = folder.glob("*_buffer_*.pt")
    replay = torch.load(memory)["replay"]
    assert replay["count"] >= 400 and not replay["dones"].any()


def test_same_seed_same_scalars_with_and_without_evaluation(script, source, tmp_path, toy_flags):
    path, checkpoint = source(script)
    out = run(f"{script}.py", *toy_flags, "--eval-frequency", 0, "--checkpoint-frequency", 0, cwd=tmp_path).stdout
    progress = r"step 1,0\d\d/1,200 \(8\d\.\d%\)  SPS [\d,]+  ETA 0:\d\d:\d\d  return \d\.\d\d  epsilon 0\.\d+\n"
    assert re.search(progress, out) and "evaluation at step 1,20" in out
    folder = only_run(tmp_path / "runs")
    mine, theirs = scalars(folder), scalars(path.parent)
    assert len(mine["eval/episodic_return"]) == 1
    for tag in SCRIPTS[script]:
        assert mine[tag] == (theirs[tag][-1:] if tag.startswith("eval/") else theirs[tag]), tag
    again = torch.load(folder / f"{script}.pt")
    assert all(torch.equal(again["q_network"][k], v) for k, v in checkpoint["q_network"].items())


def test_another_seed_another_run(script, source, tmp_path, toy_flags):
    run(f"{script}.py", *toy_flags, "--seed", 2, "--total-timesteps", 8, "--eval-episodes", 2, cwd=tmp_path)
    other = torch.load(only_run(tmp_path / "runs") / f"{script}.pt")
    assert not torch.equal(other["q_network"]["network.0.weight"], source(script)[1]["q_network"]["network.0.weight"])


def start_and_kill(command, cwd, number):
    """Start a command and send it signal `number` once it has saved a checkpoint."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    process = subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for _ in range(4000):
        if list(Path(cwd).glob("runs/*/*[!0-9].pt")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    time.sleep(1)  # TensorBoard orders event files by the second in which they were begun
    return process.returncode, out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes_to_the_last_bit(source, tmp_path, toy_flags, number):
    script = {signal.SIGINT: "dqv_atari", signal.SIGTERM: "dqv_max_atari", signal.SIGKILL: "ddqn_atari"}[number]
    straight_path, straight = source(script)
    command = [sys.executable, str(ROOT / f"{script}.py"), *toy_flags, "--save-buffer", "--checkpoint-frequency", "300"]
    code, out = start_and_kill(command, tmp_path, number)
    assert code == (-number if number == signal.SIGKILL else 128 + number), out
    assert number == signal.SIGKILL or "--resume" in out
    path = only_run(tmp_path / "runs") / f"{script}.pt"
    assert torch.load(path)["global_step"] < straight["global_step"]
    out = run(f"{script}.py", "--resume", path, "--checkpoint-frequency", 500, cwd=tmp_path).stdout
    assert "bring the games back" in out and only_run(tmp_path / "runs") == path.parent
    resumed = torch.load(path)
    assert resumed["global_step"] == straight["global_step"] and resumed["updates"] == straight["updates"]
    for part in [name for name in straight if name.endswith("network")]:
        assert all(torch.equal(resumed[part][k], v) for k, v in straight[part].items())
    for part in [name for name in straight if name.endswith("optimizer")]:
        states = resumed[part]["state"], straight[part]["state"]
        assert states[1] and all(torch.equal(states[0][i][k], v) for i in states[1] for k, v in states[1][i].items())
    assert scalars(path.parent) == scalars(straight_path.parent)
    assert len(list(path.parent.glob("*_buffer_*"))) == 1 and not list(path.parent.glob("*.tmp"))


def test_the_log_is_written_before_the_checkpoint(tmp_path, toy_flags, monkeypatch):
    """A kill right after the checkpoint must not cost points that the resumed run will not write again."""
    calls, real = [], os.replace

    def watch(name):
        method = getattr(SummaryWriter, name)
        monkeypatch.setattr(SummaryWriter, name, lambda *args: (calls.append(name), method(*args))[1])

    watch("add_scalar")
    watch("flush")
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("checkpoint"), real(old, new))[1])
    run("ddqn_atari.py", *toy_flags, "--checkpoint-frequency", 300, cwd=tmp_path)
    before = [calls[i - 1] for i, name in enumerate(calls) if name == "checkpoint"]
    assert before == ["flush"] * 4 and calls.count("add_scalar") > 200


def test_atari_resumes_to_the_last_bit(tmp_path):
    script = "ddqn_atari"  # what this adds to the test before, the replayed games, is the same in all
    flags = "--env-id ALE/Breakout-v5 --num-envs 2 --buffer-size 500 --learning-starts 100 --train-frequency 16"
    flags += " --target-network-frequency 200 --eval-frequency 0 --eval-episodes 1 --save-buffer"
    run(f"{script}.py", *flags.split(), "--total-timesteps", 1200, "--logdir", "straight", cwd=tmp_path)
    # epsilon falls over a fraction of the total: half the steps, twice the fraction
    half = ["--total-timesteps", 600, "--exploration-fraction", 0.2, "--logdir", "halves"]
    run(f"{script}.py", *flags.split(), *half, cwd=tmp_path)
    path = only_run(tmp_path / "halves") / f"{script}.pt"
    run(f"{script}.py", "--resume", path, "--total-timesteps", 1200, "--exploration-fraction", 0.1, cwd=tmp_path)
    one, two = torch.load(only_run(tmp_path / "straight") / f"{script}.pt"), torch.load(path)
    assert one["updates"] == two["updates"] == 68
    assert all(torch.equal(one["q_network"][k], v) for k, v in two["q_network"].items())
    one, two = scalars(only_run(tmp_path / "straight")), scalars(path.parent)
    assert one["eval/episodic_return"][-1] == two["eval/episodic_return"][-1]
    assert one["losses/td_loss"] == two["losses/td_loss"] and one["charts/max_q"] == two["charts/max_q"]


def test_resuming_without_the_replay_memory_refills_it_first(script, source, tmp_path):
    path, checkpoint = source(script)
    copy = tmp_path / "run" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    out = run(f"{script}.py", "--resume", copy, "--total-timesteps", 1400, "--no-save-buffer", cwd=tmp_path).stdout
    assert "200 steps refill it first" in out
    resumed = torch.load(copy)
    assert 1400 <= resumed["global_step"] < 1408  # refilling is not counted
    assert 0 <= (resumed["global_step"] - 200) // 8 - resumed["updates"] <= 1
    logged = scalars(copy.parent)
    assert min(step for step, _ in logged["charts/episodic_return"]) > checkpoint["global_step"]


def test_two_runs_in_the_same_second_have_their_own_folders(script, tmp_path, toy_flags, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 7.0)
    for _ in range(2):
        run(f"{script}.py", *toy_flags, "--total-timesteps", 4, "--eval-episodes", 1, cwd=tmp_path)
    names = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert names == [f"toy_env-Toy-v0__{script}__1__7", f"toy_env-Toy-v0__{script}__1__7-2"]


def test_the_papers_sequential_agent(script, tmp_path, toy_flags):
    flags = ["--num-envs", 1, "--total-timesteps", 300, "--eval-episodes", 1]
    run(f"{script}.py", *toy_flags, *flags, cwd=tmp_path)
    checkpoint = torch.load(only_run(tmp_path / "runs") / f"{script}.pt")
    assert checkpoint["global_step"] == 300 and checkpoint["updates"] == 12


# ------------------------------------------------------------------------------------------- evaluation and transfer


def test_evaluate_prints_mean_deviation_and_n(script, source, tmp_path):
    path, _ = source(script)
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    flags = ["--evaluate", copy, "--eval-episodes", 20, "--capture-video"]
    first, second = (run(f"{script}.py", *flags, cwd=tmp_path).stdout for _ in range(2))
    assert first == second and "n = 20" in first and "toy_env:Toy-v0" in first
    assert 4 < float(first.split(" return ")[1].split(" ")[0]) <= 5
    with Image.open(copy.with_suffix(".gif")) as gif:
        assert gif.n_frames == 5 and gif.size == (252, 252)
    assert not (tmp_path / "runs").exists()


def test_cleanrl_s_bare_state_dict_is_accepted(script, source, tmp_path, toy_flags):
    path, checkpoint = source(script)
    bare = tmp_path / "dqn_atari.cleanrl_model"
    torch.save(checkpoint["q_network"], bare)
    done = run(f"{script}.py", "--evaluate", bare, "--env-id", "toy_env:Toy-v0", cwd=tmp_path, check=False)
    if script == "ddqn_atari":
        assert 4 < float(done.stdout.split(" return ")[1].split(" ")[0]) <= 5 and "n = 100" in done.stdout
    else:
        assert done.returncode == 1 and "has no v_network" in done.stderr and done.stderr.count("\n") == 1
    run(f"{script}.py", *toy_flags, "--total-timesteps", 4, "--pretrained", bare, cwd=tmp_path)
    copy = torch.load(only_run(tmp_path / "runs") / f"{script}.pt")["q_network"]
    assert torch.equal(copy["network.7.weight"], checkpoint["q_network"]["network.7.weight"])
    refused = run(f"{script}.py", "--resume", bare, cwd=tmp_path, check=False)
    assert refused.returncode == 1 and "--pretrained" in refused.stderr


CATCH = "--env-id catch_env:Catch-v0 --num-envs 4 --buffer-size 1000 --learning-starts 100 --train-frequency 8 "
CATCH += "--eval-frequency 0 --eval-episodes 4"


def transferred(script, cwd, *flags):
    cwd.mkdir(exist_ok=True)
    out = run(f"{script}.py", *CATCH.split(), *flags, cwd=cwd).stdout
    return out, torch.load(only_run(cwd / "runs") / f"{script}.pt")


def learners(checkpoint):
    return [name for name in ("q_network", "v_network") if name in checkpoint]


def test_fine_tuning_copies_all_but_the_heads(script, source, tmp_path):
    path, checkpoint = source(script)
    out, before = transferred(script, tmp_path / "a", "--pretrained", path, "--total-timesteps", 4)
    assert learners(before) == learners(checkpoint) and len(learners(before)) == (1 if script == "ddqn_atari" else 2)
    for network, head in zip(learners(before), (1539, 513)):
        assert (
            f"{network}: 1,684,128 parameters loaded from {path}: network.0, network.2, network.4, network.7\n" in out
        )
        assert f"{network}: {head:,} parameters initialised at random: network.9\n" in out
        assert f"{network}: 0 parameters frozen: none" in out
        for name, tensor in checkpoint[network].items():
            assert torch.equal(before[network][name], tensor) == trunk(name), name
    copied = before["v_network" if script == "dqv_atari" else "q_network"]
    assert all(torch.equal(before["target_network"][name], tensor) for name, tensor in copied.items())
    assert before["optimizer"]["state"] == {} and before["args"]["start_e"] == (1 if script == "ddqn_atari" else 0.5)
    _, after = transferred(script, tmp_path / "b", "--pretrained", path, "--total-timesteps", 200)
    assert after["updates"] > 8
    for network in learners(after):
        assert not any(torch.equal(after[network][name], tensor) for name, tensor in before[network].items())


def test_only_head_leaves_frozen_tensors_bit_identical(script, source, tmp_path):
    path, checkpoint = source(script)
    flags = ["--pretrained", path, "--freeze-features", "--total-timesteps", 400]
    out, after = transferred(script, tmp_path, *flags)
    fresh = before_training(script)
    assert after["updates"] > 30
    for network, optimizer in zip(learners(after), ("optimizer", "v_optimizer")):
        assert f"{network}: 1,684,128 parameters frozen: network.0, network.2, network.4, network.7\n" in out
        assert len(after[optimizer]["state"]) == 2
        for name, tensor in after[network].items():
            assert torch.equal(tensor, checkpoint[network][name]) == trunk(name)
            assert trunk(name) or not torch.equal(tensor, fresh[network][name])
    source_of_target = checkpoint["v_network" if script == "dqv_atari" else "q_network"]
    assert all(
        torch.equal(after["target_network"][name], source_of_target[name]) for name in filter(trunk, fresh["q_network"])
    )


def test_hybrid_takes_the_head_from_elsewhere_and_keep_head_from_the_source(script, source, tmp_path):
    path, checkpoint = source(script)
    head = tmp_path / "head.pt"
    other = {
        network: {name: tensor + 1 for name, tensor in checkpoint[network].items()} for network in learners(checkpoint)
    }
    torch.save(checkpoint | other, head)
    flags = ["--env-id", "toy_env:Toy-v0", "--pretrained", path, "--total-timesteps", 4]
    _, hybrid = transferred(script, tmp_path / "hybrid", *flags, "--pretrained-head", head)
    _, kept = transferred(script, tmp_path / "kept", *flags, "--keep-head")
    for network in learners(checkpoint):
        for name, tensor in checkpoint[network].items():
            assert torch.equal(hybrid[network][name], tensor if trunk(name) else other[network][name])
            assert torch.equal(kept[network][name], tensor)


@pytest.mark.parametrize(
    "script, of", [("ddqn_atari", "dqv_atari"), ("dqv_atari", "ddqn_atari"), ("dqv_max_atari", "dqv_atari")]
)
def test_a_checkpoint_of_another_algorithm_initialises_the_trunks(script, of, source, tmp_path):
    path, checkpoint = source(of)
    out, copy = transferred(script, tmp_path / "a", "--pretrained", path, "--total-timesteps", 4)
    for network in learners(copy):  # V starts from Q's layers where there is no V
        assert f"{network}: 1,684,128 parameters loaded from" in out
        theirs = checkpoint.get(network, checkpoint["q_network"])
        assert all(torch.equal(copy[network][name], theirs[name]) for name in filter(trunk, theirs))
    flags = ["--env-id", "toy_env:Toy-v0", "--pretrained", path, "--keep-head", "--total-timesteps", 4]
    out, kept = transferred(script, tmp_path / "b", *flags)
    assert torch.equal(kept["q_network"]["network.9.weight"], checkpoint["q_network"]["network.9.weight"])
    assert ("v_network: 513 parameters initialised at random: network.9" in out) == (script == "dqv_atari")
    refused = run(f"{script}.py", "--resume", path, cwd=tmp_path, check=False)
    theirs, mine = (importlib.import_module(name).ALGORITHM for name in (of, script))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert f"is a run of {theirs}, which {mine} cannot continue" in refused.stderr


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--env-id ALE/Pongg-v5", "ALE/Pongg-v5"),
        ("--env-id CartPole-v1", "uint8 (4, 84, 84)"),
        ("--evaluate missing.pt", "no checkpoint file at missing.pt"),
        ("--num-envs 0", "--num-envs must be at least 1"),
        ("--keep-head", "--pretrained"),
        ("--env-id toy_env:Toy-v0 --buffer-size 100 --track", "pip install wandb"),
    ],
)
def test_bad_input_gets_one_line(script, flags, says, tmp_path):
    if "--track" in flags and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    done = run(f"{script}.py", *flags.split(), cwd=tmp_path, check=False)
    assert done.returncode == 1 and says in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr


def test_resume_refuses_another_game(script, source, tmp_path):
    path, _ = source(script)
    done = run(f"{script}.py", "--resume", path, "--env-id", "catch_env:Catch-v0", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "--resume continues a run with env_id toy_env:Toy-v0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_bad_files_and_games_are_named_in_one_line(module, script, source, tmp_path):
    def refused(function, *args, says):
        with pytest.raises(SystemExit) as error:
            function(*args)
        assert says in error.value.code and "\n" not in error.value.code, error.value.code
        assert error.value.code.startswith(f"{script}.py: error: ")

    refused(module.make_envs, module.Args(env_id="nowhere:Game-v0"), 1, says="nowhere")
    refused(module.make_envs, module.Args(env_id="catch_env:Catch-v9"), 1, says="Catch")
    path, checkpoint = source(script)
    state, meanings = checkpoint["q_network"], checkpoint["action_meanings"]
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": [1, 2]}, tmp_path / "other.pt")
    torch.save({name: tensor[..., :1].clone() for name, tensor in state.items()}, tmp_path / "smaller.pt")
    torch.save(state | {"network.11.weight": torch.zeros(1)}, tmp_path / "extra.pt")
    torch.save(state, tmp_path / "bare.pt")
    for name, says in (
        ("text", "is not a checkpoint"),
        ("other", "is not a checkpoint of a Q-network"),
        ("no", "no checkpoint"),
    ):
        refused(module.load_checkpoint, str(tmp_path / f"{name}.pt"), says=says)
    refused(module.load_checkpoint, str(tmp_path), says="no checkpoint file")
    for name, keep_head, theirs, says in (
        (
            "smaller",
            False,
            meanings,
            "another architecture: network.0.weight is (32, 4, 8, 1) there and (32, 4, 8, 8) here",
        ),
        ("extra", False, meanings, "another architecture: network.11.weight is (1,) there and missing here"),
        ("bare", True, meanings, "actions are unknown"),
        (path, True, ["LEFT", "RIGHT", "STAY"], "'LEFT'"),
    ):
        args = module.Args(pretrained=str(path if name == path else tmp_path / f"{name}.pt"), keep_head=keep_head)
        refused(module.transfer, args, {"q_network": module.QNetwork(3)}, theirs, says=says)
    network = module.QNetwork(6)
    refused(
        module.copy_layers, network, state, list(network.state_dict()), "x.pt", says="(3, 512) there and (6, 512) here"
    )


# -------------------------------------------------------------------------------------------------------- copy-alone


def test_the_script_runs_alone_on_a_real_game(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"{script}.py"]
    shown = subprocess.run(
        [*command, "--help"], cwd=tmp_path, env=env, text=True, capture_output=True, check=True
    ).stdout
    for flag in ("--env-id", "--pretrained", "--freeze-features", "--resume", "--num-envs"):
        assert flag in shown
    flags = "--env-id ALE/MsPacman-v5 --num-envs 4 --total-timesteps 3200 --learning-starts 1600 --train-frequency 32"
    flags += " --buffer-size 1000 --target-network-frequency 400 --eval-episodes 1 --capture-video"
    subprocess.run([*command, *flags.split()], cwd=tmp_path, env=env, check=True, capture_output=True)
    folder = only_run(tmp_path / "runs")
    assert folder.name.startswith(f"ALE-MsPacman-v5__{script}__1__")
    logged = scalars(folder)
    assert SCRIPTS[script] <= set(logged)
    for tag in ("charts/episodic_return", "eval/episodic_return"):  # raw scores, not clipped ones
        assert all(value % 10 == 0 for _, value in logged[tag]) and max(logged[tag])[1] > 0
    assert torch.load(folder / f"{script}.pt")["updates"] > 30
    assert list(folder.glob("eval_*.gif"))
    missing = subprocess.run(
        [*command, "--env-id", "catch_env:Catch-v0"], cwd=tmp_path, env=env, text=True, capture_output=True
    )
    assert missing.returncode == 1 and "catch_env" in missing.stderr and missing.stderr.strip().count("\n") == 0


# -------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("flags", [(), ("--freeze-features",), ("--optimizer", "rmsprop")])
def test_captured_and_eager_updates_agree(script, tmp_path, toy_flags, flags):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    networks = []
    for graphs in ("--cudagraphs", "--no-cudagraphs"):
        # random actions, so that rounding cannot change the data
        command = [
            sys.executable,
            str(ROOT / f"{script}.py"),
            *toy_flags,
            "--end-e",
            "1",
            "--logdir",
            graphs.strip("-"),
        ]
        subprocess.run([*command, graphs, *flags], cwd=tmp_path, env=env, check=True)
        checkpoint = torch.load(only_run(tmp_path / graphs.strip("-")) / f"{script}.pt", map_location="cpu")
        tensors = {f"{network} {k}": v for network in learners(checkpoint) for k, v in checkpoint[network].items()}
        networks.append(tensors)
        assert checkpoint["updates"] > 100
    for name, tensor in networks[0].items():
        assert torch.allclose(tensor, networks[1][name], atol=1e-3), name


def test_ale_py_is_recent_enough():
    assert tuple(int(part) for part in ale_py.__version__.split(".")[:2]) >= (0, 12) and gym.__version__ >= "1.1"
