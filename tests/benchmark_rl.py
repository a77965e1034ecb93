"""Agent steps per second of a script before and while learning, and of Stable-Baselines3's DQN, in alternation.

    python tests/benchmark_rl.py --flags="--no-double --optimizer adam" --peer sb3
    python tests/benchmark_rl.py --processes 1 2 4 8                 as many runs beside each other, on one machine
    python tests/benchmark_rl.py --updates                            milliseconds per update of all the scripts instead

Time per stage is that of the script's own main thread, sampled every 2 ms; the stages are named as the comments in the
script name them. On CUDA an update is only started there: the wait for it is part of the next stage that needs it.
The peer needs `pip install stable-baselines3 opencv-python`. It gets the same network, batch size, replay memory,
exploration and number of updates per step, and the settings of RL-Zoo for the rest. Not collected by pytest.
"""

import importlib
import json
import os
import re
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import tyro

ROOT = Path(__file__).resolve().parent.parent
BUFFER = 20_000


@dataclass
class Args:
    script: str = "ddqn_atari.py"
    """script to measure"""
    game: str = "Pong"
    """the game's name as in ALE/<Game>-v5"""
    flags: str = ""
    """further flags of the script, in one string"""
    peer: Optional[Literal["sb3"]] = None
    """also measure this library, in alternation"""
    rounds: int = 3
    """measurements of each"""
    steps: int = 3_000
    """agent steps to measure while learning, after 8,000 without learning"""
    processes: list[int] = field(default_factory=lambda: [1])
    """how many runs of the script go on at once; the rates are sums over them"""
    updates: bool = False
    """measure one update of DQN, DDQN, DQV and DQV-Max, in alternation"""
    threads: int = 1
    """threads of torch for --updates"""
    child: Optional[Literal["ours", "sb3"]] = None
    """run one measurement in this process (used internally)"""


STARTS, WARM = 8_000, 1_000  # steps without learning; steps until the rates of a phase are looked at


def ours_child(args: Args) -> None:
    """Run the script in this process, watch its main thread from another one, and print what was found as JSON."""
    path, main_thread, found, seen = str(ROOT / args.script), threading.main_thread().ident, Counter(), []
    lines, stages, stage = Path(path).read_text().splitlines(), {}, "before"
    for number, line in enumerate(lines, 1):
        if comment := re.match(r" {4,8}# (?:TRY NOT TO MODIFY|ALGO LOGIC): ([^;,]*)", line):
            stage = comment[1]
        stages[number] = "environments" if "envs.recv()" in line or "envs.send(" in line else stage

    def watch() -> None:
        while not done.wait(0.002):
            frame = sys._current_frames().get(main_thread)
            while frame and (frame.f_code.co_filename != path or frame.f_code.co_name != "<module>"):
                frame = frame.f_back
            step = frame.f_globals.get("global_step", 0) if frame else 0
            if step > STARTS + WARM:
                found[stages[frame.f_lineno]] += 1
                seen.append((step, frame.f_globals["updates"], time.perf_counter()))

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as logdir:
        flags = f"--env-id ALE/{args.game}-v5 --buffer-size {BUFFER} --learning-starts {STARTS} --eval-episodes 1"
        flags += f" --total-timesteps {STARTS + WARM + args.steps} --start-e 0.01 --end-e 0.01 --logdir {logdir}"
        sys.argv = [path, *flags.split(), *args.flags.split()]
        sys.stdout = sys.stderr
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            done.set()
            watcher.join()
            sys.stdout = sys.__stdout__
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next(Path(logdir).iterdir())))
        events.Reload()
        sps = [(event.step, event.value) for event in events.Scalars("charts/SPS")]
    import torch

    (_, first, begun), (_, last, ended) = seen[0], [row for row in seen if row[0] < STARTS + WARM + args.steps][-1]
    loop = {name: n for name, n in found.items() if name not in ("start the game", "the end")}
    result = {"before": statistics.median(value for step, value in sps if 1_500 < step < STARTS + 500)}
    result["learning"] = statistics.median(value for step, value in sps if step > STARTS + WARM + 500)
    result["updates"] = (last - first) / (ended - begun)
    result["stages"] = {name: n / sum(loop.values()) for name, n in loop.items()}
    result["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result["device"] = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0.0
    print(json.dumps(result))


def ours(args: Args, processes: int) -> list[dict]:
    """What `ours_child` found in each of several processes at once."""
    command = [sys.executable, __file__, "--child", "ours", "--script", args.script, "--game", args.game]
    command += ["--steps", str(args.steps), f"--flags={args.flags}"]
    # with the threads of others beside them, threads of their own would make all of them several times as slow
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(processes)]
    outputs = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        sys.exit(f"{args.script} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def sb3_child(args: Args) -> None:
    import ale_py  # noqa: F401
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

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


def sb3(args: Args) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", "sb3", "--game", args.game, "--steps", str(args.steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    before, learning = done.stdout.split()[-2:]
    return float(before), float(learning)


def updates(args: Args) -> None:
    """One update each, sampled batch included, on what the scripts' main parts would make of their flags."""
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ddqn, dqv, dqv_max = (importlib.import_module(name) for name in ("ddqn_atari", "dqv_atari", "dqv_max_atari"))
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
    if args.updates:
        updates(args)
        sys.exit()
    if args.child:
        {"ours": ours_child, "sb3": sb3_child}[args.child](args)
        sys.exit()
    rows = {n: [] for n in args.processes}
    peers = []
    for number in range(args.rounds):
        for n in args.processes:
            runs = ours(args, n)
            row = {name: sum(run[name] for run in runs) for name in ("before", "learning", "updates", "host", "device")}
            rows[n].append(row | {"stages": runs[0]["stages"]})
            shown = "  ".join(f"{name} {row[name]:,.1f}" for name in ("before", "learning", "updates"))
            print(f"round {number + 1}, {n} at once: {shown}", flush=True)
        if args.peer:
            peers.append(sb3(args))
            print(
                f"round {number + 1}, {args.peer}: before {peers[-1][0]:,.1f}  learning {peers[-1][1]:,.1f}", flush=True
            )
    print(f"\n| {args.game}, {os.cpu_count()} cores, median of {args.rounds} | steps/s before learning | learning | "
          "updates/s | host memory, GB | device memory, GB |\n|-|-|-|-|-|-|")  # fmt: skip
    for n, found in rows.items():
        before, learning, updates_, host, device = (
            statistics.median(row[name] for row in found)
            for name in ("before", "learning", "updates", "host", "device")
        )
        label = f"{args.script} {args.flags}".strip() + (f", {n} at once" if n > 1 else "")
        print(f"| {label} | {before:,.0f} | {learning:,.1f} | {updates_:,.1f} | {host:.2f} | {device:.2f} |")
    if args.peer:
        before, learning = (statistics.median(column) for column in zip(*peers))
        print(f"| {args.peer} | {before:,.0f} | {learning:,.1f} | | | |")
        ratios = [
            statistics.median(row[name] / peer[i] for row, peer in zip(rows[args.processes[0]], peers))
            for i, name in enumerate(("before", "learning"))
        ]
        print(f"| ratio, median over the rounds | {ratios[0]:.2f} | {ratios[1]:.2f} | | | |")
    first = rows[args.processes[0]]
    per_step = statistics.median(1_000 * args.processes[0] / row["learning"] for row in first)
    shares = {name: statistics.median(row["stages"].get(name, 0.0) for row in first) for name in first[0]["stages"]}
    print("\n| stage, while learning | share | ms per step |\n|-|-|-|")
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"| {name} | {share:.1%} | {share * per_step:.2f} |")
