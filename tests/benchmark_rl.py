"""Agent steps per second of a script before and while learning, and of other libraries' DQN, in alternation.

    python tests/benchmark_rl.py --flags="--no-double --optimizer adam" --peers sb3 cleanrl
    python tests/benchmark_rl.py --flags="--no-double, --no-double --bf16"      two of ours in turns
    python tests/benchmark_rl.py --updates                            milliseconds per update of all the scripts instead

The rates are from the times of events that the scripts log. The peers are Stable-Baselines3 and CleanRL's dqn_atari.py, of which
--cleanrl is a copy of the repository; --peer-pythons are the interpreters of environments that have what they need, in
their order (stable-baselines3, opencv-python, and for CleanRL gymnasium 0.29.1 with ale-py 0.9). They get the same network, batch
size, replay memory, exploration and number of updates per step, and their own settings for the rest. Not collected by
pytest.
"""

import importlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
BUFFER, STARTS, WARM = 20_000, 8_000, 1_000  # WARM: steps until the rates of a phase are looked at


@dataclass
class Args:
    script: str = "ddqn_atari.py"  # script to measure
    game: str = "Pong"  # the game's name as in ALE/<Game>-v5
    flags: str = ""  # further flags of the script, in one string; with commas, several sets in turns
    peers: list[Literal["sb3", "cleanrl"]] = field(default_factory=list)  # also measure these, in alternation
    peer_pythons: list[str] = field(default_factory=list)  # the Python that runs each of them, if not this
    cleanrl: str = "cleanrl"  # folder with CleanRL's repository
    rounds: int = 3  # measurements of each
    steps: int = 3_000  # agent steps to measure while learning, after 8,000 without learning
    updates: bool = False  # measure one update of DQN, DDQN, DQV and DQV-Max, in alternation
    bf16: bool = False  # with --updates: networks in bfloat16
    threads: int = 1  # threads of torch
    child: bool = False  # measure SB3 in this process (used internally)


def ours(args: Args, flags: str) -> tuple[float, float]:
    total = STARTS + WARM + args.steps
    with tempfile.TemporaryDirectory() as logdir:
        flags += f" --env-id ALE/{args.game}-v5 --buffer-size {BUFFER} --learning-starts {STARTS} --eval-episodes 1"
        flags += f" --total-timesteps {total} --start-e 0.01 --end-e 0.01 --logdir {logdir}"
        command = [sys.executable, str(ROOT / args.script), *flags.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        events = EventAccumulator(str(next(Path(logdir).iterdir())))
        events.Reload()
        logged = [(event.step, event.wall_time) for event in events.Scalars("charts/SPS")]
    rates = []
    for low, high in ((WARM, STARTS), (STARTS + WARM, total)):
        (first, begun), *_, (last, ended) = (event for event in logged if low <= event[0] <= high + 32)
        rates.append((last - first) / (ended - begun))
    return tuple(rates)


def sb3_child(args: Args) -> None:
    import ale_py  # noqa: F401
    import torch
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    torch.set_num_threads(args.threads)
    times = {}

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            times[self.num_timesteps] = time.perf_counter()
            return True

    envs = VecFrameStack(make_atari_env(f"{args.game}NoFrameskip-v4", n_envs=1, seed=1), 4)
    settings = dict(learning_rate=1e-4, buffer_size=BUFFER, learning_starts=STARTS, batch_size=32, train_freq=4)
    settings |= dict(gradient_steps=1, exploration_initial_eps=0.01, exploration_final_eps=0.01, seed=1)
    total = STARTS + WARM + args.steps
    DQN("CnnPolicy", envs, target_update_interval=10_000, **settings).learn(total, callback=Clock())
    before = (STARTS - WARM) / (times[STARTS] - times[WARM])
    print(before, args.steps / (times[total] - times[STARTS + WARM]))


def sb3(args: Args, python: str) -> tuple[float, float]:
    flags = f"--child --game {args.game} --steps {args.steps} --threads {args.threads}"
    command = [python, __file__, *flags.split()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    before, learning = done.stdout.split()[-2:]
    return float(before), float(learning)


def cleanrl(args: Args, python: str) -> tuple[float, float]:
    """From the times of its events: the ends of games before learning, a line every 100 steps while learning."""
    total, folder = STARTS + WARM + args.steps, Path(args.cleanrl).resolve()
    start = "import sys, runpy, ale_py; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = f"--env-id {args.game}NoFrameskip-v4 --buffer-size {BUFFER} --learning-starts {STARTS} --start-e 0.01"
    flags += f" --end-e 0.01 --total-timesteps {total} --target-network-frequency 10000"
    command = [python, "-c", start, str(folder / "cleanrl" / "dqn_atari.py"), *flags.split()]
    env = os.environ | {"PYTHONPATH": str(folder)}
    with tempfile.TemporaryDirectory() as cwd:
        subprocess.run(command, check=True, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        events = EventAccumulator(str(next(Path(cwd, "runs").iterdir())), size_guidance={"scalars": 0})
        events.Reload()
    logged = [(event.step, event.wall_time) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    rates = []
    for low, high in ((WARM, STARTS), (STARTS + WARM, total)):
        (first, begun), *_, (last, ended) = sorted(event for event in logged if low < event[0] < high)
        rates.append((last - first) / (ended - begun))
    return tuple(rates)


def updates(args: Args) -> None:
    """One update each, sampled batch included, on what the scripts' main parts would make of their flags."""
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ddqn, dqv, dqv_max = (importlib.import_module(name) for name in ("ddqn_atari", "dqv_atari", "dqv_max_atari"))
    for module in (ddqn, dqv, dqv_max):
        module.QNetwork.bf16 = args.bf16
    rb = ddqn.Replay(BUFFER, 8, device)
    obs, zeros = np.random.default_rng(0).integers(256, size=(8, 4, 84, 84), dtype=np.uint8), np.zeros(8)
    for step in range(BUFFER // 8):
        rb.stage(zeros, zeros, zeros, obs, np.full(8, step == 0), np.ones(8, bool))
        rb.store()

    def learner(module, optimizer, **extra):
        outputs = (18, 1) if module is not ddqn else (18,)
        networks = [module.QNetwork(n).to(device, memory_format=torch.channels_last) for n in outputs]
        target = module.QNetwork(1 if module is dqv else 18).to(device, memory_format=torch.channels_last)
        optimizers = [module.make_optimizer(module.Args(), optimizer, network, 1e-4) for network in networks]
        return lambda: module.learn(rb.sample(32), 0.99, *networks, target, *optimizers, **extra)

    print(f"| ms per update on {device}, median of {args.rounds} | DQN | DDQN | DQV | DQV-Max |\n|-|-|-|-|-|")
    for optimizer in ("rmsprop", "adam"):
        one, two = (learner(ddqn, optimizer, double=double) for double in (False, True))
        learners, times = [one, two, learner(dqv, optimizer), learner(dqv_max, optimizer)], []
        for _ in range(args.rounds + 1):
            row = []
            for update in learners:
                begun = time.perf_counter()
                for _ in range(20):
                    update()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                row.append((time.perf_counter() - begun) / 20 * 1e3)
            times.append(row)
        medians = [statistics.median(column) for column in zip(*times[1:])]  # the first round warms up
        ratios = [statistics.median(row[i] / row[1] for row in times[1:]) for i in range(4)]
        print(f"| {optimizer} | " + " | ".join(f"{ms:.2f} ({r:.2f}x)" for ms, r in zip(medians, ratios)) + " |")


if __name__ == "__main__":
    args = tyro.cli(Args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.updates or args.child:
        updates(args) if args.updates else sb3_child(args)
        sys.exit()
    mine = {f"{args.script} {flags.strip()}".strip(): (ours, flags, []) for flags in args.flags.split(",")}
    pythons = args.peer_pythons or [sys.executable] * len(args.peers)
    theirs = {peer: (globals()[peer], python, []) for peer, python in zip(args.peers, pythons, strict=True)}
    for number in range(args.rounds):
        for name, (measure, how, found) in (mine | theirs).items():
            found.append(measure(args, how))
            print(f"round {number + 1}, {name}: before {found[-1][0]:,.1f}  learning {found[-1][1]:,.1f}", flush=True)
    print(f"\n| {args.game}, {args.threads} threads, median of {args.rounds} | steps/s before | learning |\n|-|-|-|")
    for name, (*_, found) in (mine | theirs).items():
        print(f"| {name} | " + " | ".join(f"{statistics.median(column):,.1f}" for column in zip(*found)) + " |")
    for (one, (*_, found)), (other, (*_, others)) in itertools.product(mine.items(), theirs.items()):
        ratios = [statistics.median(a / b for a, b in zip(*columns)) for columns in zip(zip(*found), zip(*others))]
        print(f"| {one} / {other}, median over the rounds | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
