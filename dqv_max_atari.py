# DQV-Max Learning (Sabatelli et al., 2019, arXiv 1909.01779), as used in "Contributions to Deep Transfer Learning"
# (M. Sabatelli, 2022): V(s) regresses on r + gamma max_a Q(s', a), and Q(s, a) on r + gamma V(s').
#
#   python dqv_max_atari.py --env-id ALE/Pong-v5                                           train on an Atari game
#   python dqv_max_atari.py --env-id ALE/Boxing-v5 --pretrained runs/.../dqv_max_atari.pt  transfer it to another
#   python dqv_max_atari.py --env-id catch_env:Catch-v0                                    minutes on a laptop's CPU
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "gymnasium>=1.1", "ale-py>=0.12", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.18",
#                 "pillow>=10"]
# ///
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import count
from typing import Callable, Literal, NoReturn, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment: two CPU runs with equal flags write equal scalars"""
    torch_deterministic: bool = True
    """sets `torch.backends.cudnn.deterministic`; off, cuDNN is free to pick its fastest kernels"""
    cuda: bool = True
    """train on CUDA when there is a GPU"""
    cudagraphs: bool = True
    """on CUDA, replay acting and updating as CUDA graphs (not with --buffer-device cpu)"""
    logdir: str = "runs"
    """folder in which the run's own folder is made"""
    track: bool = False
    """mirror the run to Weights and Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "deep-transfer-learning"
    """the project of the run at Weights and Biases"""
    wandb_entity: Optional[str] = None
    """the team of the run at Weights and Biases"""
    capture_video: bool = False
    """save a GIF of the first game of every evaluation"""

    # The game
    env_id: str = "ALE/Pong-v5"
    """`ALE/<Game>-v5`, or any Gymnasium id with uint8 (4, 84, 84) observations, such as `catch_env:Catch-v0`"""
    num_envs: int = 8
    """number of games played side by side; 1 is the papers' sequential agent"""
    repeat_action_probability: float = 0.0
    """ALE: sticky actions; the papers use none, Machado et al. (2018) recommend 0.25"""
    full_action_space: bool = False
    """ALE: all 18 joystick actions instead of those that have an effect in the game"""
    life_loss_terminal: bool = True
    """ALE: a lost life is a terminal state for the learner (the game goes on either way)"""
    maxpool: bool = True
    """ALE: maximum over the last two frames, against flicker; the authors' environments had none"""

    # Algorithm specific arguments. None stands for the default of the kind of game, see KIND_DEFAULTS.
    total_timesteps: Optional[int] = None
    """agent steps in all, each of 4 frames on the ALE (None: 10,000,000 on the ALE, 40,000 elsewhere)"""
    learning_rate: float = 2.5e-4
    """the learning rate of Q's optimizer"""
    v_learning_rate: float = 1e-3
    """the learning rate of V's optimizer"""
    optimizer: Optional[Literal["rmsprop", "adam", "sgd"]] = None
    """RMSprop as in the papers, Adam or SGD (None: rmsprop on the ALE, adam elsewhere)"""
    v_optimizer: Optional[Literal["rmsprop", "adam", "sgd"]] = None
    """the same for V (None: as --optimizer); the thesis' table says sgd, the preprint and the authors' code rmsprop"""
    buffer_size: int = 400_000
    """capacity of the replay memory in transitions, 7,056 bytes each"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay memory lives (auto: where training happens)"""
    gamma: float = 0.99
    """the discount factor"""
    target_network_frequency: Optional[int] = None
    """agent steps between copies to the target network (None: 10,000 on the ALE, 500 elsewhere)"""
    batch_size: int = 32
    """transitions per update"""
    start_e: float = 0.5
    """epsilon of the behaviour policy when learning starts (before, it is uniformly random); the papers' for DQV-Max"""
    end_e: float = 0.1
    """epsilon after the exploration fraction"""
    exploration_fraction: float = 0.1
    """fraction of total-timesteps, from the start of learning, over which epsilon falls from start-e to end-e"""
    learning_starts: Optional[int] = None
    """agent steps with a random policy before learning starts (None: 50,000 on the ALE, 5,000 elsewhere)"""
    train_frequency: int = 4
    """agent steps per update, whatever the number of environments; 1 is the authors' setting"""

    # Evaluation and checkpoints
    eval_frequency: Optional[int] = None
    """agent steps between evaluations, 0 for none but the last (None: 250,000 on the ALE, 5,000 elsewhere)"""
    eval_episodes: Optional[int] = None
    """full games per evaluation (None: 10 on the ALE, 100 elsewhere)"""
    eval_epsilon: float = 0.05
    """epsilon of the policy in evaluations"""
    checkpoint_frequency: Optional[int] = None
    """agent steps between checkpoints, 0 for none but the last (None: 100,000 on the ALE, 10,000 elsewhere)"""
    save_buffer: bool = False
    """save the replay memory with each checkpoint: a resumed run then equals an uninterrupted one"""
    resume: Optional[str] = None
    """checkpoint of a run to continue, in its folder and with its flags unless given anew"""
    evaluate: Optional[str] = None
    """checkpoint to evaluate, with its flags unless given anew, instead of training"""

    # Transfer
    pretrained: Optional[str] = None
    """checkpoint of another game whose layers are copied, all but the heads (the last layers)"""
    pretrained_head: Optional[str] = None
    """checkpoint from which the head is copied (the thesis' hybrid)"""
    keep_head: bool = False
    """copy the head of --pretrained too; only between games with the same actions"""
    freeze_features: bool = False
    """train the head only"""


ALGORITHM = "DQV-Max"

# what `learn` returns, logged as losses/...
LOSSES = ("td_loss", "q_values", "v_loss", "v_values")

# flag: (papers' value for the ALE, value for Catch and other small games)
KIND_DEFAULTS = {
    "optimizer": ("rmsprop", "adam"),
    "total_timesteps": (10_000_000, 40_000),
    "target_network_frequency": (10_000, 500),
    "learning_starts": (50_000, 5_000),
    "eval_frequency": (250_000, 5_000),
    "eval_episodes": (10, 100),
    "checkpoint_frequency": (100_000, 10_000),
}


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def say(line: str, stay: bool = True) -> None:
    """Print over the progress line; on a terminal a line that does not `stay` is a progress line itself."""
    tty = sys.stdout.isatty()
    print(f"\r{line}\033[K" if tty else line, end="\n" if stay or not tty else "", flush=True)


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """`num_envs` games with next-step autoreset: the call after an end ignores the action and returns the new game.

    Observations are uint8 `(num_envs, k, 84, 84)`, of which only the newest frame, the last, is used; rewards are raw.
    """
    if args.env_id.startswith("ALE/"):
        try:
            game = gym.spec(args.env_id).kwargs["game"]
        except gym.error.Error as error:
            fail(f"--env-id {args.env_id}: {error}")
        # The learner clips rewards, since the score is what we report, and builds the stacks. It reads lost lives from
        # `info`: `episodic_life` would restart the game, `life_loss_info` would not tell a lost life from its end.
        return AtariVectorEnv(
            game, num_envs, autoreset_mode=AutoresetMode.NEXT_STEP, max_num_frames_per_episode=108_000, frameskip=4,
            repeat_action_probability=args.repeat_action_probability, full_action_space=args.full_action_space,
            noop_max=30, use_fire_reset=True, episodic_life=False, life_loss_info=False, reward_clipping=False,
            img_height=84, img_width=84, grayscale=True, maxpool=args.maxpool, stack_num=1, continuous=False,
            continuous_action_threshold=0.5, batch_size=0, num_threads=0, thread_affinity_offset=-1,
        )  # fmt: skip
    try:
        envs = gym.make_vec(args.env_id, num_envs=num_envs)
    except ModuleNotFoundError as error:
        fail(f"--env-id {args.env_id}: no module named {error.name!r}, put {error.name}.py beside this script")
    except (gym.error.Error, ValueError) as error:
        fail(f"--env-id {args.env_id}: {error}")
    space = envs.single_observation_space
    if space.shape != (4, 84, 84) or space.dtype != np.uint8:
        fail(f"--env-id {args.env_id}: observations are {space}, not uint8 (4, 84, 84); Atari games are ALE/<Game>-v5")
    if envs.metadata["autoreset_mode"] != AutoresetMode.NEXT_STEP:
        fail(f"--env-id {args.env_id}: the vector environment must reset with AutoresetMode.NEXT_STEP")
    return envs


def action_meanings(args: Args, envs: gym.vector.VectorEnv) -> list[str]:
    """What each action does: a head fits another game only where these are equal."""
    if args.env_id.startswith("ALE/"):
        return [str(action).split(".")[-1] for action in envs.ale.get_action_set()]
    if hasattr(envs, "get_action_meanings"):
        return envs.get_action_meanings()
    return [f"{args.env_id} {action}" for action in range(envs.single_action_space.n)]


# ALGO LOGIC: initialize agent here:
class QNetwork(nn.Module):
    """The network of Mnih et al. (2015): uint8 `(B, 4, 84, 84)` -> values `(B, num_outputs)`."""

    def __init__(self, num_outputs: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, num_outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x / 255.0)


@torch.no_grad()
def td_targets(v_network, target_network, next_obs, rewards, dones, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """For Q r + gamma V(s'), for V r + gamma max_a Q(s', a; target), both `(B,)` (1909.01779, eq. 9-10)."""
    q_target = rewards + gamma * v_network(next_obs).squeeze(1) * ~dones
    return q_target, rewards + gamma * target_network(next_obs).max(dim=1).values * ~dones


def learn(batch, gamma: float, q_network, v_network, target_network, optimizer, v_optimizer) -> torch.Tensor:
    """One update with a `batch` of `Replay.sample`; returns what LOSSES names, float32 `(4,)`."""
    obs, actions, rewards, next_obs, dones = batch
    q_target, v_target = td_targets(v_network, target_network, next_obs, rewards, dones, gamma)
    q = q_network(obs).gather(1, actions[:, None]).squeeze(1)
    q_loss = F.smooth_l1_loss(q, q_target)  # Huber, as in the authors' code
    optimizer.zero_grad()
    q_loss.backward()
    optimizer.step()
    v = v_network(obs).squeeze(1)
    v_loss = F.mse_loss(v, v_target)
    v_optimizer.zero_grad()
    v_loss.backward()
    v_optimizer.step()
    return torch.stack((q_loss, q.mean(), v_loss, v.mean())).detach()


def make_optimizer(name: str, network: nn.Module, learning_rate: float, capturable: bool) -> torch.optim.Optimizer:
    """The optimizer of the parameters of `network` that are not frozen; `capturable` in a CUDA graph."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if name == "adam":
        return torch.optim.Adam(trained, learning_rate, eps=1.5e-4, fused=True, capturable=capturable)
    if name == "sgd":
        return torch.optim.SGD(trained, learning_rate)
    # Mnih et al.'s 0.01 is under the root and their gradients are sums over the batch of 32, ours are means
    eps = 0.01**0.5 / 32
    return torch.optim.RMSprop(trained, learning_rate, 0.95, eps, centered=True, capturable=capturable)


class Replay:
    """Uniform replay memory that stores each 84x84 frame once and rebuilds the stacks of 4 when sampling.

    A ring of rows, one slot per game: the newest frame of the observation, then the action taken on it, reward and
    `done` (terminal for the learner). The call of an autoreset takes a slot as well, since its frame begins the next
    episode, but is never drawn; so the last frame of a truncated episode is there to bootstrap from.
    """

    def __init__(self, capacity: int, num_envs: int, device: torch.device):
        # Not to be drawn: the newest row, whose successor is yet to come, and three whose stacks are overwritten.
        self.rows, self.num_envs, self.device = -(-capacity // num_envs) + 4, num_envs, device
        slots = self.rows * num_envs
        self.frames = torch.empty((slots, 84 * 84), dtype=torch.uint8, device=device)
        self.frames.zero_()  # touches the memory now: better out of memory at the start than hours later
        self.actions = torch.zeros(slots, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(slots, dtype=torch.float32, device=device)
        self.dones = torch.zeros(slots, dtype=torch.bool, device=device)
        self.ages = torch.zeros(slots, dtype=torch.int64, device=device)  # earlier frames in the episode, at most 3
        # Slots of the transitions that may be drawn, oldest first: a ring of its own, `count` long from `first` on.
        self.drawable = torch.zeros(slots, dtype=torch.int64, device=device)
        self.drawable_per_row = np.zeros(self.rows, dtype=np.int64)
        self.row = self.first = self.count = 0
        self.filled = 1  # rows written so far
        self.window = torch.zeros(2, dtype=torch.int64, device=device)  # (first, count), read by captured graphs
        self.age = np.zeros(num_envs, dtype=np.int64)
        self.offsets = torch.arange(-3, 2, device=device) * num_envs
        self.needed_age = torch.arange(3, 0, -1, device=device)

    def start(self, frames: np.ndarray) -> None:
        """Begin with the first frames uint8 `(num_envs, 84, 84)` of new episodes."""
        self.frames[: self.num_envs] = torch.from_numpy(frames.reshape(self.num_envs, -1)).to(self.device)

    def add(self, actions, rewards, dones, frames, restarted) -> None:
        """Complete the newest row and begin the next one with `frames`; arrays are `(num_envs, ...)`.

        `restarted` marks games in which this step was an autoreset: no transition, and the first frame of an episode.
        """
        here = slice(self.row * self.num_envs, (self.row + 1) * self.num_envs)
        self.actions[here] = torch.from_numpy(actions).to(self.device)
        self.rewards[here] = torch.from_numpy(rewards.astype(np.float32)).to(self.device)
        self.dones[here] = torch.from_numpy(dones).to(self.device)
        self.ages[here] = torch.from_numpy(self.age).to(self.device)
        transitions = np.flatnonzero(~restarted)
        places = (self.first + self.count + np.arange(len(transitions))) % len(self.drawable)
        slots = torch.from_numpy(here.start + transitions).to(self.device)
        self.drawable[torch.from_numpy(places).to(self.device)] = slots
        self.drawable_per_row[self.row] = len(transitions)
        self.row = (self.row + 1) % self.rows
        self.filled = max(self.filled, self.row + 1)
        lost = (self.row + 3) % self.rows  # the rows before were lost when the rows before this one were written
        self.first = (self.first + int(self.drawable_per_row[lost])) % len(self.drawable)
        self.count += len(transitions) - int(self.drawable_per_row[lost])
        self.drawable_per_row[lost] = 0
        self.window[0], self.window[1] = self.first, self.count
        here = slice(self.row * self.num_envs, (self.row + 1) * self.num_envs)
        self.frames[here] = torch.from_numpy(frames.reshape(self.num_envs, -1)).to(self.device)
        self.age = np.where(restarted, 0, np.minimum(self.age + 1, 3))

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """obs uint8 `(B, 4, 84, 84)`, actions int64, rewards float32, next_obs like obs, dones bool, all `(B, ...)`."""
        # From [0, 1) and a tensor, not randint: a captured graph would freeze randint's upper bound.
        ranks = (torch.rand(batch_size, dtype=torch.float64, device=self.device) * self.window[1]).long()
        slots = self.drawable[(self.window[0] + ranks) % len(self.drawable)]
        frames = self.frames[((slots[:, None] + self.offsets) % len(self.frames)).flatten()]
        frames = frames.view(batch_size, 5, 84, 84)  # 3 before, the newest of obs, the newest of next_obs
        frames[:, :3] *= (self.ages[slots, None] >= self.needed_age)[:, :, None, None]  # none from before the episode
        return frames[:, :4], self.actions[slots], self.rewards[slots], frames[:, 1:], self.dones[slots]

    def state_dict(self) -> dict:
        state = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return state | {"device": str(self.device), "frames": self.frames[: self.filled * self.num_envs]}

    def load_state_dict(self, state: dict) -> None:
        if (state["rows"], state["num_envs"]) != (self.rows, self.num_envs):
            fail("the saved replay memory has another size: resume with the --buffer-size and --num-envs of the run")
        for name, value in state.items():
            if torch.is_tensor(value):
                mine = getattr(self, name)
                (mine if torch.is_tensor(mine) else torch.from_numpy(mine))[: len(value)] = value
        self.row, self.first, self.count, self.filled = (state[k] for k in ("row", "first", "count", "filled"))


def make_replay(args: Args, device: torch.device) -> Replay:
    """Allocate the replay memory, or say in one line why it does not fit."""
    device = device if args.buffer_device == "auto" else torch.device(args.buffer_device)
    if device.type == "cuda" and not torch.cuda.is_available():
        fail("--buffer-device cuda: there is no CUDA device")
    size = args.buffer_size * 84 * 84
    need = f"a replay memory of {args.buffer_size:,} transitions takes {size:,} bytes ({size / 1e9:.2f} GB)"
    way_out = "use a smaller --buffer-size" + (" or --buffer-device cpu" if device.type == "cuda" else "")
    available = size
    if device.type == "cuda":
        available = torch.cuda.mem_get_info()[0]
    elif os.path.exists("/proc/meminfo"):  # Linux hands out memory it does not have and kills the process later
        with open("/proc/meminfo") as meminfo:
            available = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    if size > available:
        fail(f"{need}, but {device.type} has {available:,} bytes free: {way_out}")
    try:
        replay = Replay(args.buffer_size, args.num_envs, device)
    except (RuntimeError, MemoryError):
        fail(f"{need}, which {device.type} refuses: {way_out}")
    say(f"replay memory: {args.buffer_size:,} transitions, {size:,} bytes ({size / 1e9:.2f} GB) on {device.type}")
    return replay


def push_frame(stacks: torch.Tensor, frames: np.ndarray, restarted: np.ndarray) -> None:
    """Append frames uint8 `(N, 84, 84)` to stacks uint8 `(N, 4, 84, 84)`, in place; new episodes begin black."""
    keep = torch.from_numpy(~restarted).to(stacks.device)[:, None, None, None]
    stacks[:, :-1] = stacks[:, 1:] * keep
    stacks[:, -1] = torch.from_numpy(np.ascontiguousarray(frames)).to(stacks.device)


def linear_schedule(start_e: float, end_e: float, duration: float, t: int) -> float:
    """Epsilon t agent steps after learning started."""
    return end_e if t >= duration else start_e + (end_e - start_e) * t / duration


@torch.no_grad()
def evaluate(args: Args, envs, look: Callable, device, seed: int, gif: Optional[str], stopped: Callable[[], bool]):
    """Play `eval_episodes` full games, each of `envs` a fixed share of them, and return the scalars to log.

    `look` takes stacks and returns the greedy actions and named values, all `(N,)`. Values are compared on equal
    terms: they and `discounted_return` (the discounted return-to-go) are means over all visited states, with rewards
    clipped and cut where training cuts. Returns None if `stopped()` before the end.
    """
    num_envs, rng = envs.num_envs, np.random.default_rng(seed)
    obs, infos = envs.reset(seed=seed)
    stacks = torch.zeros((num_envs, 4, 84, 84), dtype=torch.uint8, device=device)
    over, lives = np.zeros(num_envs, bool), infos.get("lives")
    push_frame(stacks, obs[:, -1], ~over)
    to_play = np.bincount(np.arange(args.eval_episodes) % num_envs)
    first_share = to_play[0]
    returns, running, caught, balls, trace, pictures = [], np.zeros(num_envs), 0, 0, [], []
    while to_play.any():
        if stopped():
            return None
        greedy, values = look(stacks)
        explore = rng.random(num_envs) < args.eval_epsilon
        random_actions = rng.integers(envs.single_action_space.n, size=num_envs)
        actions = np.where(explore, random_actions, greedy.cpu().numpy())
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        playing = (to_play > 0) & ~over
        cuts = terminations | truncations
        if lives is not None:
            cuts, lives = cuts | (infos["lives"] < lives) & args.life_loss_terminal, infos["lives"]
        trace.append((playing, np.clip(rewards, -1, 1), cuts, *(value.cpu().numpy() for value in values.values())))
        push_frame(stacks, obs[:, -1], over)
        running += rewards * playing
        if gif and to_play[0] == first_share and playing[0]:
            pictures.append(obs[0, -1])
        over = terminations | truncations
        for i in np.flatnonzero(over & playing):
            returns.append(float(running[i]))
            running[i] = 0.0
            to_play[i] -= 1
            if "caught" in infos:
                caught, balls = caught + int(infos["caught"][i]), balls + int(infos["balls"][i])
    playing, rewards, cuts, *columns = (np.stack(column) for column in zip(*trace))
    to_go = np.zeros(rewards.shape)
    for t in reversed(range(len(rewards))):
        to_go[t] = rewards[t] + (args.gamma * to_go[t + 1] * ~cuts[t] if t + 1 < len(rewards) else 0.0)
    if gif:
        images = (Image.fromarray(picture.repeat(3, 0).repeat(3, 1)) for picture in pictures)
        next(images).save(gif + ".tmp", "GIF", save_all=True, append_images=images, duration=67, loop=0)  # 15 steps/s
        os.replace(gif + ".tmp", gif)
        say(f"saved the first game, {len(pictures)} frames, to {gif}")
    scalars = {"episodic_return": float(np.mean(returns)), "episodic_return_std": float(np.std(returns))}
    for name, column in zip((*values, "discounted_return"), (*columns, to_go)):
        scalars[name] = float(column[playing].mean())
    return scalars | ({"caught": caught / balls} if balls else {})


def load_checkpoint(path: str) -> dict:
    """A checkpoint of these scripts, or CleanRL's bare state dict as one that has nothing but a `q_network`."""
    if not os.path.isfile(path):
        fail(f"no checkpoint file at {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{path} is not a checkpoint: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if isinstance(data, dict) and data and all(torch.is_tensor(value) for value in data.values()):
        data = {"q_network": data}
    if not isinstance(data, dict) or "q_network" not in data:
        fail(f"{path} is not a checkpoint of a Q-network")
    return data


def copy_layers(network: nn.Module, source: dict, names: list[str], path: str) -> None:
    """Copy the tensors `names` of the state dict `source`, read from `path`, or say in one line what does not fit."""
    state = network.state_dict()
    for name in {**state, **source}:
        mine, theirs = (tuple(d[name].shape) if name in d else "missing" for d in (state, source))
        if (mine == "missing" or theirs == "missing" or name in names) and mine != theirs:
            fail(f"{path} is a checkpoint of another architecture: {name} is {theirs} there and {mine} here")
    network.load_state_dict({**state, **{name: source[name] for name in names}})


def transfer(args: Args, networks: dict[str, nn.Module], meanings: list[str]) -> dict[str, str]:
    """Initialise `networks` from --pretrained and --pretrained-head, and print what was loaded and what is frozen.

    A network that the checkpoint lacks (V in one of DQN) gets the layers of its `q_network`, but never the head.
    Returns the game of the --pretrained checkpoint, to be logged with the hyper-parameters.
    """
    sources, origin = {}, {}
    for path, features, head in ((args.pretrained, True, args.keep_head), (args.pretrained_head, False, True)):
        checkpoint = load_checkpoint(path) if path else {}
        if path and head and checkpoint.get("action_meanings") != meanings:
            known = checkpoint.get("action_meanings", "unknown")
            fail(f"the head of {path} does not fit, its actions are {known}, those of {args.env_id} {meanings}")
        if path and features:
            origin["pretrained_env_id"] = checkpoint.get("args", {}).get("env_id", "unknown")
        for key, network in networks.items() if path else ():
            names = list(network.state_dict())  # the head is the last layer: weight and bias
            part = names[:-2] * features + names[-2:] * (head and key in checkpoint)
            copy_layers(network, checkpoint.get(key, checkpoint["q_network"]), part, path)
            sources |= {(key, name): path for name in part}
    for key, network in networks.items():
        names = list(network.state_dict())
        rows = {"initialised at random": [name for name in names if (key, name) not in sources]}
        for path in dict.fromkeys(sources.values()):
            rows[f"loaded from {path}"] = [name for name in names if sources.get((key, name)) == path]
        rows["frozen"] = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
        for what, members in rows.items():
            size = sum(network.get_parameter(name).numel() for name in members)
            layers = dict.fromkeys(name.rsplit(".", 1)[0] for name in members)
            say(f"{key}: {size:,} parameters {what}: {', '.join(layers) or 'none'}")
    size = sum(parameter.numel() for parameter in nn.ModuleList(networks.values()).parameters())
    say(f"{size:,} parameters in all")
    return origin


def save_atomically(data: dict, path: str) -> None:
    torch.save(data, path + ".tmp")
    os.replace(path + ".tmp", path)


def capture(function: Callable, state: list[torch.Tensor]) -> Callable:
    """`function` as a CUDA graph: one launch instead of a hundred. `state` is put back to what it was before."""
    saved = [tensor.clone() for tensor in state]
    rng_state = torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    with torch.no_grad():
        for tensor, value in zip(state, saved):
            tensor.copy_(value)
    torch.cuda.set_rng_state(rng_state)
    return graph.replay


if __name__ == "__main__":
    args, checkpoint = tyro.cli(Args), {}
    if args.evaluate or args.resume:
        checkpoint = load_checkpoint(args.evaluate or args.resume)
        saved = {k: v for k, v in checkpoint.get("args", {}).items() if k in {field.name for field in fields(Args)}}
        args = tyro.cli(Args, default=Args(**saved))  # flags on the command line win over the checkpoint's
        if not args.evaluate:
            if "optimizer" not in checkpoint:
                fail(f"{args.resume} has no training state to resume; --pretrained takes its layers into a new run")
            if checkpoint.get("algorithm", ALGORITHM) != ALGORITHM:
                fail(f"{args.resume} is a run of {checkpoint['algorithm']}, which {ALGORITHM} cannot continue")
            fixed = "env_id exp_name architecture optimizer v_optimizer pretrained pretrained_head keep_head"
            for name in (*fixed.split(), "freeze_features"):
                was, now = checkpoint["args"].get(name), getattr(args, name, None)
                if was != now:
                    fail(f"--resume continues a run with {name} {was}, not {now}")
    on_the_ale = args.env_id.startswith("ALE/")
    for name, values in KIND_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[0 if on_the_ale else 1])
    counts = "num_envs total_timesteps buffer_size batch_size train_frequency target_network_frequency eval_episodes"
    for name in counts.split():
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.keep_head and not args.pretrained:
        fail("--keep-head keeps the head of a --pretrained checkpoint, and none is given")

    # Ctrl-C and kill end the run at the next step, with a checkpoint; a second one ends it at once
    signals: list[int] = []

    def on_signal(number: int, _) -> None:
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)  # of the behaviour policy; torch's own generator draws the batches
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    on_cuda = device.type == "cuda"
    use_graphs = on_cuda and args.cudagraphs and args.buffer_device != "cpu"

    def seed_for(*purpose: int) -> int:
        """A seed for environments; those of run 2 must not be those of run 1 shifted by one."""
        return int(np.random.SeedSequence((args.seed, *purpose)).generate_state(1)[0] >> 2)

    # TRY NOT TO MODIFY: env setup
    envs = make_envs(args, min(args.eval_episodes, 16) if args.evaluate else args.num_envs)
    num_actions, meanings = int(envs.single_action_space.n), action_meanings(args, envs)
    say(f"{args.env_id}: {envs.num_envs} games, {num_actions} actions ({', '.join(meanings)}), network on {device}")
    if on_the_ale:
        say(f"frame skip 4, sticky actions {args.repeat_action_probability}, a lost life is "
            f"{'' if args.life_loss_terminal else 'not '}terminal for the learner, maxpool {args.maxpool}")  # fmt: skip

    # ALGO LOGIC: networks
    q_network = QNetwork(num_actions).to(device, memory_format=torch.channels_last)  # the layout of fast convolutions
    v_network = QNetwork(1).to(device, memory_format=torch.channels_last)
    networks = {"q_network": q_network, "v_network": v_network}
    target_network = QNetwork(num_actions).to(device, memory_format=torch.channels_last)

    def look(stacks: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        max_q, actions = q_network(stacks).max(dim=1)
        return actions, {"max_q": max_q, "v_minus_max_q": v_network(stacks).squeeze(1) - max_q}

    # TRY NOT TO MODIFY: checkpoints
    for name, network in networks.items() if checkpoint else ():
        path = args.evaluate or args.resume
        if name not in checkpoint:
            fail(f"{path} has no {name}: it is not a checkpoint of {ALGORITHM}, which only --pretrained can start from")
        copy_layers(network, checkpoint[name], list(network.state_dict()), path)
    if args.evaluate:
        gif = os.path.splitext(args.evaluate)[0] + ".gif" if args.capture_video else None
        result = evaluate(args, envs, look, device, seed_for(1), gif, lambda: bool(signals))
        if result is None:
            sys.exit(128 + signals[0])
        mean, std = result.pop("episodic_return"), result.pop("episodic_return_std")
        print(f"{args.evaluate} on {args.env_id}, epsilon {args.eval_epsilon}: return {mean:.2f} +- {std:.2f} "
              f"(mean, standard deviation, n = {args.eval_episodes})")  # fmt: skip
        print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
        sys.exit()
    for network in networks.values():
        for parameter in list(network.parameters())[:-2]:
            parameter.requires_grad_(not args.freeze_features)
    origin = {} if args.resume else transfer(args, networks, meanings)

    # ALGO LOGIC: target network and optimizers
    target_network.load_state_dict(checkpoint.get("target_network", q_network.state_dict()))
    optimizers = {"optimizer": make_optimizer(args.optimizer, q_network, args.learning_rate, use_graphs)}
    v_optimizer = args.v_optimizer or args.optimizer
    optimizers["v_optimizer"] = make_optimizer(v_optimizer, v_network, args.v_learning_rate, use_graphs)

    # TRY NOT TO MODIFY: replay memory
    rb = make_replay(args, device)

    # TRY NOT TO MODIFY: the run's folder and logs
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs Weights and Biases: pip install wandb")
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = os.path.dirname(os.path.abspath(args.resume)) if args.resume else os.path.join(args.logdir, run_name)
    for copy in count(2):
        try:
            os.makedirs(run_dir, exist_ok=bool(args.resume))
            break
        except FileExistsError:  # two runs that start in the same second
            run_dir = os.path.join(args.logdir, f"{run_name}-{copy}")
    checkpoint_path = os.path.join(run_dir, f"{args.exp_name}.pt")
    if args.track:
        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": os.path.basename(run_dir)}
        wandb.init(**project, config=vars(args), sync_tensorboard=True, save_code=True)
    global_step = checkpoint.get("global_step", 0)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    hyperparameters = {"algorithm": ALGORITHM} | vars(args) | origin
    table = "\n".join(f"|{name}|{value}|" for name, value in hyperparameters.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", global_step)

    # TRY NOT TO MODIFY: the state of the run, fresh or as the checkpoint has it
    updates, evaluated_at = checkpoint.get("updates", 0), checkpoint.get("evaluated_at", 0)
    sums = torch.zeros(len(LOSSES) + 3, device=device)  # since the last log: LOSSES, updates; max_q, forward passes
    stacks = torch.zeros((args.num_envs, 4, 84, 84), dtype=torch.uint8, device=device)
    episode_returns, episode_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, np.int64)
    over, env_seed, action_log, memory = np.zeros(args.num_envs, bool), seed_for(0, global_step), bytearray(), None
    if args.resume:
        for name, optimizer in optimizers.items():
            for group, mine in zip(checkpoint[name]["param_groups"], optimizer.param_groups):
                group.update(lr=mine["lr"], capturable=use_graphs)
            optimizer.load_state_dict(checkpoint[name])
        rng.bit_generator.state = checkpoint["rng"]["numpy"]
        torch.set_rng_state(checkpoint["rng"]["torch"])
        if on_cuda and checkpoint["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
        sums.copy_(checkpoint["sums"])
        memory_path = os.path.join(run_dir, f"{args.exp_name}_buffer_{global_step}.pt")
        if os.path.exists(memory_path):
            memory = torch.load(memory_path, map_location="cpu", weights_only=True)
            rb.load_state_dict(memory["replay"])
            env_seed, action_log, refill = memory["env_seed"], bytearray(memory["actions"].numpy()), memory["refill"]
            over, episode_returns, episode_lengths = (memory[name].numpy() for name in ("over", "returns", "lengths"))
    obs, infos = envs.reset(seed=env_seed)
    if memory:
        # Emulators can't be saved, but they are deterministic: equal actions lead to equal states
        say(f"resuming at step {global_step:,}: replaying {len(action_log):,} actions to bring the games back there")
        for actions in np.frombuffer(action_log, np.uint8).reshape(-1, args.num_envs):
            obs, _, _, _, infos = envs.step(actions.astype(np.int64))
            if signals:
                sys.exit(128 + signals[0])
        stacks.copy_(memory["stacks"])
        memory = None  # 2.8 GB at the default size
    else:
        rb.start(obs[:, -1])
        push_frame(stacks, obs[:, -1], ~over)
        refill = min(global_step, args.learning_starts)
        if args.resume:
            say(f"resuming at step {global_step:,} without a saved replay memory: {refill:,} steps refill it first")
    lives = infos.get("lives")

    # TRY NOT TO MODIFY: acting, all on the device
    greedy = torch.zeros(args.num_envs, dtype=torch.int64, device=device)

    @torch.no_grad()
    def act() -> None:
        best, actions = q_network(stacks).max(dim=1)
        greedy.copy_(actions)
        sums[-2:] += torch.stack((best.mean(), torch.ones_like(best[0])))

    # ALGO LOGIC: training, all on the device
    def update() -> None:
        batch = [x.to(device) for x in rb.sample(args.batch_size)]
        sums[:-3] += learn(batch, args.gamma, q_network, v_network, target_network, **optimizers)
        sums[-3] += 1

    # TRY NOT TO MODIFY: CUDA graphs
    if use_graphs:
        state = [sums, *nn.ModuleList(networks.values()).parameters()]
        for optimizer in optimizers.values():
            if not optimizer.state:  # which its first step makes, but a graph needs its addresses
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                for moments in optimizer.state.values():
                    for moment in moments.values():
                        moment.zero_()
            state += [moment for moments in optimizer.state.values() for moment in moments.values()]
        act, update = capture(act, [sums]), capture(update, state)

    # TRY NOT TO MODIFY: checkpoints and the replay memory
    def save() -> None:
        """Write the checkpoint, after the replay memory that belongs to it and before the older one is removed."""
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        memory_path = os.path.join(run_dir, f"{args.exp_name}_buffer_{global_step}.pt")
        if args.save_buffer:
            arrays = {"over": over, "returns": episode_returns, "lengths": episode_lengths}
            arrays["actions"] = np.array(action_log)
            memory = {name: torch.from_numpy(array) for name, array in arrays.items()}
            memory |= {"env_seed": env_seed, "refill": refill, "stacks": stacks, "replay": rb.state_dict()}
            save_atomically(memory, memory_path)
        learners = networks | {"target_network": target_network} | optimizers
        state = {"algorithm": ALGORITHM, "args": vars(args), "global_step": global_step}
        state |= {name: learner.state_dict() for name, learner in learners.items()}
        state |= {"updates": updates, "evaluated_at": evaluated_at, "action_meanings": meanings, "sums": sums}
        generators = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if on_cuda else None}
        state |= {"rng": {"numpy": rng.bit_generator.state, **generators}}
        save_atomically(state, checkpoint_path)
        for name in os.listdir(run_dir):
            if name.startswith(f"{args.exp_name}_buffer_") and os.path.join(run_dir, name) != memory_path:
                os.remove(os.path.join(run_dir, name))

    # TRY NOT TO MODIFY: start the game
    recent, saved_at, last_line, eval_envs = deque(maxlen=20), global_step, 0.0, None
    window_start, window_step = time.perf_counter(), global_step
    while True:
        paused, every = time.perf_counter(), args.eval_frequency
        finished = global_step >= args.total_timesteps
        if finished and evaluated_at < global_step or every and global_step // every > evaluated_at // every:
            gif = os.path.join(run_dir, f"eval_{global_step}.gif") if args.capture_video else None
            eval_envs = eval_envs or make_envs(args, min(args.eval_episodes, 16))
            seed = seed_for(1, global_step)  # of its own: training is the same with and without evaluations
            result = evaluate(args, eval_envs, look, device, seed, gif, lambda: bool(signals))
            if result is not None:
                evaluated_at = global_step
                for name, value in result.items():
                    writer.add_scalar(f"eval/{name}", value, global_step)
                say(f"evaluation at step {global_step:,}: return {result['episodic_return']:.2f} +- "
                    f"{result['episodic_return_std']:.2f} (n = {args.eval_episodes})")  # fmt: skip
        every = args.checkpoint_frequency
        if finished or signals or every and global_step // every > saved_at // every:
            save()
            saved_at = global_step
        if finished or signals:
            break
        window_start += time.perf_counter() - paused  # SPS leaves evaluations out

        # TRY NOT TO MODIFY: epsilon-greedy actions
        learning_step = global_step - args.learning_starts
        duration = args.exploration_fraction * args.total_timesteps
        epsilon = 1.0 if learning_step < 0 else linear_schedule(args.start_e, args.end_e, duration, learning_step)
        explore = rng.random(args.num_envs) < epsilon  # each game draws for itself
        actions = rng.integers(num_actions, size=args.num_envs)
        if not explore.all():
            act()
            actions = np.where(explore, actions, greedy.cpu().numpy())

        # TRY NOT TO MODIFY: execute the game; ALE does so in its own threads while the learner is at work
        if on_the_ale:
            envs.send(actions)

        # TRY NOT TO MODIFY: training
        while refill <= 0 and updates < learning_step // args.train_frequency:
            update()
            updates += 1

        # TRY NOT TO MODIFY: save data to replay buffer
        obs, rewards, terminations, truncations, infos = envs.recv() if on_the_ale else envs.step(actions)
        restarted, over, dones = over, terminations | truncations, terminations
        if lives is not None:
            dones = dones | (infos["lives"] < lives) & args.life_loss_terminal
            lives = infos["lives"]
        rb.add(actions, np.clip(rewards, -1, 1), dones, obs[:, -1], restarted)
        push_frame(stacks, obs[:, -1], restarted)
        if args.save_buffer:
            action_log += actions.astype(np.uint8).tobytes()
        steps = args.num_envs - int(restarted.sum())  # an autoreset is no step
        previous_step, global_step = global_step, global_step + (steps if refill <= 0 else 0)
        refill -= steps

        # TRY NOT TO MODIFY: record rewards for plotting purposes
        episode_returns += rewards
        episode_lengths += ~restarted
        for i in np.flatnonzero(over):
            if global_step > previous_step:
                writer.add_scalar("charts/episodic_return", episode_returns[i], global_step)
                writer.add_scalar("charts/episodic_length", episode_lengths[i], global_step)
                recent.append(episode_returns[i])
            episode_returns[i] = episode_lengths[i] = 0
        if global_step // 1_000 > previous_step // 1_000:
            *losses, n_updates, max_q, n_acts = sums.tolist()  # the only place where logging waits
            sums.zero_()
            for name, value in zip(LOSSES, losses) if n_updates else ():
                writer.add_scalar(f"losses/{name}", value / n_updates, global_step)
            if n_acts:
                writer.add_scalar("charts/max_q", max_q / n_acts, global_step)
            now = time.perf_counter()
            sps = (global_step - window_step) / (now - window_start)
            window_start, window_step = now, global_step
            writer.add_scalar("charts/SPS", sps, global_step)
            writer.add_scalar("charts/epsilon", epsilon, global_step)
            if now - last_line > (1 if sys.stdout.isatty() else 30):
                last_line, left = now, timedelta(seconds=int((args.total_timesteps - global_step) / sps))
                share, score = global_step / args.total_timesteps, f"{np.mean(recent):.2f}" if recent else "none yet"
                say(f"step {global_step:,}/{args.total_timesteps:,} ({share:.1%})  SPS {sps:,.0f}  ETA {left}  "
                    f"return {score}  epsilon {epsilon:.3f}", stay=False)  # fmt: skip

        # ALGO LOGIC: update target network
        if global_step // args.target_network_frequency > previous_step // args.target_network_frequency:
            target_network.load_state_dict(q_network.state_dict())

    # TRY NOT TO MODIFY: the end
    writer.close()
    say(f"saved {checkpoint_path}")
    if signals:
        say(f"stopped at step {global_step:,}; python {os.path.basename(__file__)} --resume {checkpoint_path} goes on")
        sys.exit(128 + signals[0])
