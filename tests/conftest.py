"""Helpers of the tests: run a script as a user does, read its event file, and small environments made for the tests."""

import io
import os
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two OpenMP threads beside ALE's own threads collapse on a busy machine

import gymnasium as gym  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # of the processes that tests start
gym.logger.min_level = gym.logger.WARN
torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have what the tests start ignore it, `&` in a script
signal.signal(signal.SIGINT, signal.default_int_handler)  # this one
ON_CUDA = "_atari.py", "_classify.py", "_detect.py", "_ticket.py"  # scripts with the flag --no-cuda
TOY_FLAGS = """--env-id toy_env:Toy-v0 --num-envs 4 --buffer-size 2000 --learning-starts 200 --train-frequency 8
    --total-timesteps 1200 --target-network-frequency 350 --eval-frequency 500 --eval-episodes 8 --narrow 4
    --checkpoint-frequency 500 --learning-rate 1e-3""".split()  # of a run of a few seconds on the game of `toy_env.py`


def run(script, *args, cwd, check=True):
    """What `python script args` in `cwd` does, in this process, which saves seconds of imports; without a GPU.

    `variables` of what comes back are the script's own at its end, if it did not exit.
    """
    command = [str(ROOT / script), *map(str, args), *(["--no-cuda"] if script.endswith(ON_CUDA) else [])]
    changed = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE
    handlers = {number: signal.getsignal(number) for number in changed}
    out, err, code, variables = io.StringIO(), io.StringIO(), 0, {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command)
        try:
            variables = runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            err.write(f"{end.code}\n" if isinstance(end.code, str) else "")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    done = subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
    done.variables = variables
    if check and done.returncode:
        raise AssertionError(f"{script} {args} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def refused(script, *args, cwd):
    """The one line with which the script ends, where it is asked for what it cannot do."""
    done = run(script, *args, cwd=cwd, check=False)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0, done.stderr
    return done.stderr


def start(script, *args, cwd, before=(), **options):
    """A process with the script, without a GPU, that leads a group of its own; all that it prints is its stdout."""
    command = [*before, sys.executable, str(ROOT / script), *map(str, args), "--no-cuda"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, **pipes, **options)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def run_on_cuda(script, *args, cwd):
    """What the script prints, in a process of its own, on the GPU."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def scalars(run_dir, leave_out=("charts/SPS",)):
    """{tag: [(step, value), ...]} of the event files in `run_dir`, without the tags that measure time."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in leave_out]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def only_run(logdir):
    """The one run folder below `logdir`."""
    (folder,) = Path(logdir).iterdir()
    return folder
