"""Seconds that transfer_matrix.py takes to read 300 runs of 10,000 points, and what TensorBoard's reader would take.

    python tests/benchmark_events.py

Not collected by pytest.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transfer_matrix

RUNS, POINTS, TAG = 300, 10_000, "charts/episodic_return"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as logdir:
        with SummaryWriter(f"{logdir}/0") as writer:
            writer.add_text(
                "hyperparameters", "|param|value|\n|-|-|\n|algorithm|DQN|\n|env_id|ALE/Pong-v5|\n|seed|1|\n|exp_name|x|"
            )
            for i in range(POINTS):
                writer.add_scalar(TAG, i % 40, i * 250)
        for run in range(1, RUNS):
            shutil.copytree(f"{logdir}/0", f"{logdir}/{run}")
        begun, cpu = time.perf_counter(), time.process_time()
        runs = transfer_matrix.read_runs(logdir, [TAG])
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        assert len(runs) == RUNS and all(len(run.curves[TAG]) == POINTS for run in runs)
        print(f"transfer_matrix.py: {wall:.1f} s, {cpu:.1f} s of them of a CPU, for {RUNS} runs of {POINTS:,} points")
        begun = time.perf_counter()
        for run in range(3):
            events = EventAccumulator(f"{logdir}/{run}", size_guidance={"scalars": 0})
            events.Reload()
            assert len(events.Scalars(TAG)) == POINTS
        print(f"TensorBoard's EventAccumulator: {(time.perf_counter() - begun) * RUNS / 3:.0f} s, from 3 of them")
