# Double DQN (van Hasselt et al., AAAI 2016, arXiv 1509.06461) and, with --no-double, DQN (Mnih et al., Nature 2015),
# as used in "Contributions to Deep Transfer Learning" (M. Sabatelli, 2022): one file, for the ALE and for Catch.
#
#   python ddqn_atari.py --env-id catch_env:Catch-v0                           minutes on a laptop's CPU
#   python ddqn_atari.py --env-id ALE/Boxing-v5 --pretrained runs/NAME         transfer the network of a run to a game
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "gymnasium>=1.1", "ale-py>=0.12", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.21",
#                 "pillow>=10"]
# ///
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    # The run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment: two CPU runs with equal flags write equal scalars
    cuda: bool = True  # train on CUDA when there is a GPU
    cudagraphs: bool = True  # on CUDA, replay acting and updating as graphs, with Python's numbers as at capture
    bf16: bool = False  # networks in bfloat16 (slow on a CPU without AVX512-BF16); losses, targets in float32
    logdir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run (folder or checkpoint) to continue with its flags; some may be given anew
    evaluate: str | None = None  # run (folder or checkpoint) to evaluate instead of training
    track: bool = False  # mirror the run to Weights and Biases (`pip install wandb`; set WANDB_PROJECT, WANDB_ENTITY)
    capture_video: bool = False  # save a GIF of the first game of every evaluation

    # The game
    env_id: str = "ALE/Pong-v5"  # `ALE/<Game>-v5`, or a Gymnasium id with uint8 (4, 84, 84) stacks that begin black
    num_envs: int = 0  # games played side by side, 1 is the papers' sequential agent (0: 32 on CUDA, 8 on a CPU)
    repeat_action_probability: float = 0.0  # ALE: sticky actions; the papers use none, Machado et al. (2018) 0.25
    full_action_space: bool = False  # ALE: all 18 joystick actions instead of those that have an effect in the game
    life_loss_terminal: bool = True  # ALE: a lost life is terminal for the learner (the game goes on either way)
    maxpool: bool = True  # ALE: maximum over the last two frames, against flicker; the authors' had none

    # The algorithm (in brackets: the default for games that are not of the ALE)
    total_timesteps: int = 10_000_000  # agent steps in all, each of 4 frames on the ALE (40,000)
    double: bool = True  # Double DQN; `--no-double` is DQN
    dueling: bool = False  # Q = V + A - mean A from two streams (Wang et al., 2016); both last layers are the head
    narrow: int = 1  # divides the numbers of filters and hidden units; 4 makes the thesis' Tiny-DQV (8, 16, 16; 128)
    learning_rate: float = 2.5e-4  # the learning rate of Q's optimizer
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"  # RMSprop as in the papers, Adam or SGD (adam)
    adam_eps: float = 1.5e-4  # epsilon of Adam
    buffer_size: int = 400_000  # capacity of the replay memory in transitions, 7,056 bytes each
    gamma: float = 0.99  # the discount factor
    target_network_frequency: int = 10_000  # agent steps between copies to the target network (500)
    batch_size: int = 32  # transitions per update
    start_e: float = 1.0  # epsilon when learning starts (before, actions are random)
    end_e: float = 0.1  # epsilon after the exploration fraction
    exploration_fraction: float = 0.1  # share of total-timesteps, from the start of learning, over which epsilon falls
    learning_starts: int = 50_000  # agent steps before learning starts (5,000)
    train_frequency: int = 4  # agent steps per update, whatever the number of games; 1 is the authors' setting
    terminal: bool = True  # `--no-terminal` stores no transition as terminal, as the authors' code (a bug) does

    # Evaluation and checkpoints
    eval_frequency: int = 250_000  # agent steps between evaluations, 0 for none but the last (5,000)
    eval_episodes: int = 10  # full games per evaluation, side by side (100)
    eval_epsilon: float = 0.05  # epsilon of the policy in evaluations
    checkpoint_frequency: int = 100_000  # agent steps between checkpoints, 0 for none but the last (10,000)

    # Transfer
    pretrained: str | None = None  # run of another game whose layers are copied, all but the heads (the last layers)
    pretrained_head: str | None = None  # run from which the head is copied (the thesis' hybrid)
    keep_head: bool = False  # copy the head of --pretrained too; only between games with the same actions
    head_fraction: float = 0.0  # new head = random head + this x the head of --pretrained (Sasso et al., 2021)
    freeze_features: bool = False  # train the head only


ALGORITHM = "DDQN"
LOSSES = ("td_loss", "q_values")  # what `learn` returns, logged as losses/...

# Defaults for Catch and other small games
SMALL_GAME = {
    "total_timesteps": 40_000, "optimizer": "adam", "target_network_frequency": 500, "learning_starts": 5_000,
    "eval_frequency": 5_000, "eval_episodes": 100, "checkpoint_frequency": 10_000,
}  # fmt: skip

# Smallest and largest value of numeric flags; fractions are within 0 and 1, all others at least 1
BOUNDS = {
    "seed": (0, 2**31 - 1), "num_envs": (0, 4_096), "narrow": (1, 32),
    "learning_starts": (0, 1e18), "eval_frequency": (0, 1e18), "checkpoint_frequency": (0, 1e18),
}  # fmt: skip

# What --resume cannot change: the state would not fit, or the run would become two experiments
FIXED = """env_id seed exp_name repeat_action_probability full_action_space life_loss_terminal maxpool double dueling
    architecture narrow gamma terminal optimizer v_optimizer pretrained pretrained_head keep_head head_fraction
    freeze_features learning_starts train_frequency""".split()


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """`num_envs` games with next-step autoreset: the call after an end ignores the action and returns the new game.

    Observations are uint8 `(num_envs, 4, 84, 84)`, newest frame last, black before the first; rewards are raw.
    """
    try:
        if args.env_id.startswith("ALE/"):
            # The learner clips rewards (the score is what we report) and reads lost lives from `info`: `episodic_life`
            # would restart the game, and `life_loss_info` would not tell a lost life from the game's end.
            return AtariVectorEnv(
                gym.spec(args.env_id).kwargs["game"], num_envs, autoreset_mode=AutoresetMode.NEXT_STEP, frameskip=4,
                max_num_frames_per_episode=108_000, repeat_action_probability=args.repeat_action_probability,
                full_action_space=args.full_action_space, noop_max=30, use_fire_reset=True, episodic_life=False,
                life_loss_info=False, reward_clipping=False, stack_num=4, maxpool=args.maxpool,
                num_threads=max(1, min(num_envs, (os.cpu_count() or 1) - 2)),
            )  # fmt: skip
        envs = gym.make_vec(args.env_id, num_envs=num_envs)
    except (gym.error.Error, ImportError, ValueError) as error:
        fail(f"--env-id {args.env_id}: {str(error).splitlines()[0]}")
    space, actions, mode = envs.single_observation_space, envs.single_action_space, envs.metadata["autoreset_mode"]
    if space.shape != (4, 84, 84) or space.dtype != np.uint8 or mode != AutoresetMode.NEXT_STEP:
        fail(f"--env-id {args.env_id}: {space.dtype} {space.shape}, {mode}, instead of uint8 (4, 84, 84), NEXT_STEP")
    if not isinstance(actions, gym.spaces.Discrete) or actions.start:
        fail(f"--env-id {args.env_id}: actions {actions} instead of Discrete(n)")
    return envs


def action_meanings(args: Args, envs: gym.vector.VectorEnv) -> list[str]:
    """What each action does: a head fits another game only where these are equal."""
    if isinstance(envs, AtariVectorEnv):
        return [action.name for action in envs.ale.get_action_set()]
    if hasattr(envs, "get_action_meanings"):
        return envs.get_action_meanings()
    return [f"{args.env_id} {action}" for action in range(envs.single_action_space.n)]


# ALGO LOGIC: initialize agent here:
class QNetwork(nn.Module):
    """The network of Mnih et al. (2015): uint8 `(B, 4, 84, 84)` -> values float32 `(B, num_outputs)`.

    With `dueling`, `network` ends in the advantages A, and `value` is the other stream, V (Wang et al., 2016, eq. 9).
    """

    bf16 = False

    def __init__(self, num_outputs: int, narrow: int = 1, dueling: bool = False):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 32 // narrow, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32 // narrow, 64 // narrow, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64 // narrow, 64 // narrow, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 // narrow * 7 * 7, 512 // narrow),
            nn.ReLU(),
            nn.Linear(512 // narrow, num_outputs),
        )
        hidden = nn.Linear(64 // narrow * 7 * 7, 512 // narrow) if dueling else None
        self.value = nn.Sequential(hidden, nn.ReLU(), nn.Linear(512 // narrow, 1)) if dueling else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16 if self.bf16 else torch.float32) / 255.0
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.network[:7](x)
            hidden = [stream[:-1](features) for stream in (self.network[7:], self.value) if stream is not None]
        q = self.network[-1](hidden[0].float())  # rounded to bfloat16, a tenth of the best actions would be ties
        return q if self.value is None else self.value[-1](hidden[1].float()) + q - q.mean(dim=1, keepdim=True)


def learn(batch, gamma: float, q_network, target_network, optimizer, double: bool) -> torch.Tensor:
    """One update with a `batch` of `Replay.sample`; returns what LOSSES names, float32 `(2,)`.

    Q(s, a) regresses on r + gamma Q(s', a*; target); a* maximises the online Q (DDQN, eq. 4) or the target one (DQN).
    """
    obs, actions, rewards, next_obs, dones = batch
    with torch.no_grad():
        next_q = target_network(next_obs)
        best = (q_network(next_obs) if double else next_q).argmax(dim=1, keepdim=True)
        target = rewards + gamma * next_q.gather(1, best).squeeze(1) * ~dones
    q = q_network(obs).gather(1, actions[:, None]).squeeze(1)
    q_loss = F.smooth_l1_loss(q, target)  # Huber, as in the authors' code
    optimizer.zero_grad()
    q_loss.backward()
    optimizer.step()
    return torch.stack((q_loss, q.mean())).detach()


class RMSprop(torch.optim.Optimizer):
    """Centred RMSprop as of Mnih et al. (2015): bit for bit torch's, but where that has NaN, at twice its speed.

    Their epsilon of 0.01 is under the root, their gradients are sums over 32; ours are means, epsilon beside the root.
    """

    def __init__(self, parameters, lr: float, decay: float = 0.95, eps: float = 0.01**0.5 / 32):
        super().__init__(parameters, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter] = {key: torch.zeros_like(parameter) for key in ("square_avg", "grad_avg")}
                grad, state, weight = parameter.grad, self.state[parameter], 1 - group["decay"]
                state["square_avg"].mul_(group["decay"]).addcmul_(grad, grad, value=weight)
                state["grad_avg"].lerp_(grad, weight)
                variance = state["square_avg"].addcmul(state["grad_avg"], state["grad_avg"], value=-1)
                # a CPU takes ten times as long for the root of an exact zero, which half of the variances are
                parameter.addcdiv_(grad, variance.clamp_(min=1e-30).sqrt_().add_(group["eps"]), value=-group["lr"])


def make_optimizer(args: Args, name: str, network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer `name` of the parameters of `network` that are not frozen; a CUDA graph can hold its step."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if name == "adam":
        return torch.optim.Adam(trained, learning_rate, eps=args.adam_eps, fused=True, capturable=trained[0].is_cuda)
    return RMSprop(trained, learning_rate) if name == "rmsprop" else torch.optim.SGD(trained, learning_rate)


class Replay:
    """Uniform replay memory on `device` that stores each 84x84 frame once and rebuilds the stacks of 4 when sampling.

    `frames` is a ring of rows, a row a step and a slot a game; `transitions` is a ring of its own that points into it.
    An autoreset fills a slot (its frame begins an episode) but adds no transition, so that a truncated episode keeps
    its last frame to bootstrap from. `stage` copies a step to the device; CUDA graphs can hold all that happens there.
    """

    def __init__(self, capacity: int, num_envs: int, device: torch.device):
        # 4 rows cannot be drawn: the newest lacks its next frame, of the 3 oldest earlier frames are overwritten
        rows = -(-capacity // num_envs) + 4  # capacity rounded up to whole rows
        self.num_envs, self.slots = num_envs, rows * num_envs
        # torch.empty: a CPU hands out memory as frames are written; `sample` blanks those that never were
        self.frames = torch.empty((self.slots, 84 * 84), dtype=torch.uint8, device=device)
        # columns: slot, action, reward, done, age (earlier frames of the episode, at most 3); last row: a waste bin
        self.transitions = torch.empty((self.slots + 1, 5), dtype=torch.float64, device=device)
        self.newest, self.age = np.arange(-num_envs, 0), np.zeros(num_envs)  # slots of the newest frames, their ages
        self.totals = deque([0], maxlen=rows - 3)  # transitions until the end of each row
        self.obs = torch.zeros((num_envs, 4, 84, 84), dtype=torch.uint8, device=device)  # the newest observations
        # a row a game: row of `transitions`, its five columns, newest slot, 1 while it plays; last row: oldest, count
        self.staged = torch.zeros((num_envs + 1, 8), dtype=torch.float64, device=device)
        self.playing = self.staged[:-1, 7]
        self.offsets = torch.arange(-3, 2, device=device) * num_envs
        self.needed_age = torch.arange(3, 0, -1, device=device)

    def stage(self, actions, rewards, dones, obs, restarted, playing) -> None:
        """Bring a step, arrays `(num_envs, ...)`, to the device; `restarted` marks autoresets (at the start, all)."""
        entries = np.where(restarted, self.slots, (self.totals[-1] + np.cumsum(~restarted) - 1) % self.slots)
        self.totals.append(self.totals[-1] + int((~restarted).sum()))
        self.count = self.totals[-1] - self.totals[0]  # that may be drawn
        slots, self.newest = self.newest, (self.newest + self.num_envs) % self.slots
        staged = np.stack((entries, slots, actions, rewards, dones, self.age, self.newest, playing), axis=1)
        staged = np.vstack((staged, [self.totals[0] % self.slots, self.count, 0, 0, 0, 0, 0, 0]))
        for tensor, array in ((self.obs, obs), (self.staged, staged)):
            host = torch.from_numpy(array)
            tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)
        self.age = np.where(restarted, 0, np.minimum(self.age + 1, 3))

    def store(self) -> None:
        """Complete the newest row with what was staged, and begin the next one with the newest frames."""
        self.transitions[self.staged[:-1, 0].long()] = self.staged[:-1, 1:6]
        self.frames[self.staged[:-1, 6].long()] = self.obs[:, -1].flatten(1)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """obs uint8 `(B, 4, 84, 84)`, actions int64, rewards float32, next_obs like obs, dones bool, all `(B, ...)`."""
        oldest, count = self.staged[-1, :2].unbind()
        # From [0, 1) and a tensor, not randint: a captured graph would freeze randint's upper bound.
        ranks = torch.rand(batch_size, dtype=torch.float64, device=self.frames.device) * count
        slots, actions, rewards, dones, ages = self.transitions[(oldest + ranks).long() % self.slots].unbind(dim=1)
        slots = (slots.long()[:, None] + self.offsets) % self.slots
        frames = self.frames.index_select(0, slots.flatten())  # copies rows: ten times as fast as self.frames[...]
        frames = frames.view(batch_size, 5, 84, 84)  # 3 before, the newest of obs, the newest of next_obs
        frames[:, :3] *= (ages[:, None] >= self.needed_age)[:, :, None, None]  # none from before the episode
        return frames[:, :4], actions.long(), rewards.float(), frames[:, 1:], dones.bool()


@torch.no_grad()
def evaluate(args: Args, envs, q_network: nn.Module, look: Callable, seed: int, gif: str | None) -> dict[str, float]:
    """Play one full game in each of `envs` and return the scalars to log, means over games or over visited states.

    `look` takes stacks and returns greedy actions and named values, all `(N,)`. `discounted_return` is what followed,
    rewards clipped, up to the end of the game (or life, if terminal). `dead_units` is the share of hidden units and
    channels of the last convolution that never fire (Sokar et al., 2023); of the hidden layer, `feature_norm` is the
    mean L2 norm, `feature_rank` the number of singular values that make up 99 % of their sum (Kumar et al., 2021).
    """
    rng, device, layers = np.random.default_rng(seed), next(q_network.parameters()).device, {}
    hooks = [q_network.network[i].register_forward_hook(lambda *io, i=i: layers.update({i: io[2]})) for i in (5, 8)]
    obs, infos = envs.reset(seed=seed)
    playing, returns = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs)
    lives = infos.get("lives", returns)  # games without lives lose none
    highest, norms, gram = 0.0, 0.0, 0.0  # maxima of all outputs; sums over the visited states
    balls, steps, pictures = np.zeros(2), [], []  # balls: caught, all
    while playing.any():
        greedy, values = look(torch.from_numpy(obs).to(device))
        visited = torch.from_numpy(np.flatnonzero(playing)).to(device)
        channels, hidden = layers[5][visited].float(), layers[8][visited].float()
        highest = torch.cat((channels.amax(dim=(0, 2, 3)), hidden.amax(dim=0))).clamp(min=highest)
        norms, gram = norms + hidden.norm(dim=1).sum(), gram + hidden.double().T @ hidden.double()
        if gif and playing[0] and len(pictures) < 5_000:  # Pillow keeps them all
            pictures.append(Image.fromarray(obs[0, -1].repeat(3, 0).repeat(3, 1)))
        explore = rng.random(envs.num_envs) < args.eval_epsilon
        actions = np.where(explore, rng.integers(envs.single_action_space.n, size=envs.num_envs), greedy.cpu().numpy())
        obs, rewards, terminations, truncations, infos = envs.step(actions)
        over = terminations | truncations
        lives_before, lives = lives, infos.get("lives", lives)
        cuts = over | (lives < lives_before) & (args.life_loss_terminal and args.terminal)
        steps.append((playing, np.clip(rewards, -1, 1), cuts, *(value.cpu().numpy() for value in values.values())))
        returns = returns + rewards * playing
        if "caught" in infos:
            balls += infos["caught"][over & playing].sum(), infos["balls"][over & playing].sum()
        playing = playing & ~over
    for hook in hooks:
        hook.remove()
    if gif:
        pictures[0].save(f"{gif}.tmp", "GIF", save_all=True, append_images=pictures[1:], duration=67)  # 15 steps/s
        os.replace(f"{gif}.tmp", gif)
    played, clipped, cuts, *columns = (np.stack(column) for column in zip(*steps))  # each `(steps, games)` from here on
    to_go = np.zeros((len(clipped) + 1, envs.num_envs))
    for t in reversed(range(len(clipped))):
        to_go[t] = clipped[t] + args.gamma * to_go[t + 1] * ~cuts[t]
    scalars = {"episodic_return": np.mean(returns), "episodic_return_std": np.std(returns)}
    for name, column in zip((*values, "discounted_return"), (*columns, to_go[:-1])):
        scalars[name] = column[played].mean()
    # the roots of the eigenvalues of H'H are H's singular values; nan_to_num: eigvalsh raises where H has diverged
    cumulated = torch.linalg.eigvalsh(gram.cpu().nan_to_num(0, 0, 0)).clamp(min=0).sqrt().flip(0).cumsum(0)
    scalars |= {"dead_units": (highest <= 0).float().mean(), "feature_norm": norms / played.sum()}
    scalars["feature_rank"] = 1 + (cumulated < 0.99 * cumulated[-1]).sum()
    scalars |= {"caught": balls[0] / balls[1]} if balls[1] else {}
    return {name: float(value) for name, value in scalars.items()}


def load_checkpoint(path: str | None) -> dict:
    """The checkpoint in `path`, a file or a run's folder, with its own path; CleanRL's state dict is a `q_network`."""
    if not path:
        return {}
    files = [path] if os.path.isfile(path) else sorted(Path(path).glob("*.pt"))
    if len(files) != 1:
        fail(f"{path}: {len(files)} checkpoints (*.pt) are there, one is needed")
    try:
        data = torch.load(files[0], map_location="cpu", weights_only=True)
        data = {"q_network": data} if all(torch.is_tensor(value) for value in data.values()) else data
        return {"args": {}, **data, "q_network": data["q_network"], "path": str(files[0])}
    except Exception:  # noqa: BLE001 - torch would advise to load foreign files without care
        fail(f"{files[0]} is not a checkpoint of a Q-network")


def head_names(network: nn.Module) -> list[str]:
    """Names of the head's tensors: weight and bias of the last layer of every stream."""
    last_layers = [f"{stream}.{len(layers) - 1}" for stream, layers in network.named_children()]
    return [f"{layer}.{part}" for layer in last_layers for part in ("weight", "bias")]


def load_tensors(network: nn.Module, tensors: dict[str, torch.Tensor], path: str) -> None:
    """Load all `tensors` of `network`, which came from `path`, or say that they are of another one."""
    try:
        network.load_state_dict(tensors)
    except (AttributeError, RuntimeError) as error:
        fail(f"{path} is of another architecture: {str(error).splitlines()[-1].strip()}")


def transfer(args: Args, networks: dict[str, nn.Module], source: dict, meanings: list[str]) -> None:
    """Initialise `networks` from the checkpoint `source` and --pretrained-head; the rest stays as drawn at random.

    A network that the checkpoint lacks (V in one of DQN) gets the layers of its `q_network`, but never the head.
    """
    head_source = source if args.keep_head else load_checkpoint(args.pretrained_head)
    theirs = head_source.get("action_meanings", "unknown")
    if head_source and theirs != meanings:
        fail(f"the head of {head_source['path']} does not fit, its actions are {theirs}, those of this game {meanings}")
    for key, network in reversed(networks.items()):  # V first: where the two share layers, Q's count
        state, head, body = network.state_dict(), head_names(network), source.get(key, source["q_network"])
        load_tensors(network, state | {name: body.get(name) for name in state if name not in head}, source["path"])
        print(f"{key}: all but the head of {source['path']}")
        if key in head_source:
            others = {name: tensor for name, tensor in network.state_dict().items() if name not in head}
            load_tensors(network, head_source[key] | others, head_source["path"])
            print(f"{key}: the head of {head_source['path']}")
        if args.head_fraction and key in source:
            same_actions = source.get("action_meanings") == meanings
            fits = [name for name in head if same_actions or len(body[name]) == 1]  # a state's value fits every game
            for name in fits:  # in place: a state_dict shares the memory of its network
                state[name] += args.head_fraction * body[name].to(state[name])
            print(f"{key}: {', '.join(fits) or 'nothing'} of its head, x {args.head_fraction}, added to the new one")


def graphed(function: Callable) -> Callable:
    """`function` that replays itself as a CUDA graph from the fourth call on; the three before are its warm-up."""
    calls, graph = count(1), torch.cuda.CUDAGraph()

    def call() -> None:
        number = next(calls)
        if number == 4:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                function()
        graph.replay() if number > 3 else function()

    return call


if __name__ == "__main__":
    about = f"{ALGORITHM}. A first run: python {os.path.basename(__file__)} --env-id catch_env:Catch-v0 (in brackets: "
    about += "defaults of such small games). Flags of the run, the game, the algorithm, evaluation, transfer:"
    args = tyro.cli(Args, description=about)
    trusted = "catch_env", args.env_id.split(":")[0]  # modules that a checkpoint may name
    checkpoint = load_checkpoint(args.evaluate or args.resume)
    path = checkpoint.get("path")
    source = {} if checkpoint else load_checkpoint(args.pretrained)
    saved = {name: value for name, value in checkpoint.get("args", {}).items() if name in vars(args)}
    defaults = {} if saved.get("env_id", args.env_id).startswith("ALE/") else SMALL_GAME
    args = tyro.cli(Args, default=Args(**defaults | saved))  # the command line wins over the checkpoint
    if ":" in args.env_id and args.env_id.split(":")[0] not in trusted:
        fail(f"{path} plays {args.env_id}, which imports a module: say --env-id {args.env_id} if you trust it")
    if args.resume and (checkpoint.get("algorithm") != ALGORITHM or "optimizer" not in checkpoint):
        fail(f"{path} is no run of {ALGORITHM} to resume; --pretrained takes its layers into a new run")
    for name in FIXED:
        if args.resume and name in saved and getattr(args, name) != saved[name]:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {path} goes on with {saved[name]}")
    if args.resume and checkpoint["global_step"] >= args.total_timesteps:
        fail(f"{path} has made its {args.total_timesteps:,} steps; with more --total-timesteps it goes on")
    for name, value in vars(args).items():
        low, high = BOUNDS.get(name, (0, 1) if isinstance(value, float) else (1, 10**18))
        if value == "":
            fail(f"--{name.replace('_', '-')} is empty")
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must be between {low} and {high}, not {value}")
    if os.path.basename(args.exp_name) != args.exp_name:
        fail(f"--exp-name {args.exp_name} is not the name of a file")  # or the first checkpoint could not be written
    if args.learning_starts > args.total_timesteps and not args.evaluate:
        fail(f"--learning-starts {args.learning_starts} is beyond --total-timesteps {args.total_timesteps}")
    heads = [args.keep_head, args.head_fraction > 0, bool(args.pretrained_head)]
    if sum(heads) > 1 or (not args.pretrained and (args.freeze_features or any(heads))):
        fail("--freeze-features and either --keep-head, --head-fraction or --pretrained-head need a --pretrained run")

    # TRY NOT TO MODIFY: device and seeding
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs can be captured on any stream but the default one
    args.num_envs = args.num_envs or (32 if device.type == "cuda" else 8)
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")

    def seed_for(*purpose: int) -> int:
        """For games (0), evaluation (1), new heads (2), resumed draws (3); seed 2's are not seed 1's shifted by one."""
        return int(np.random.SeedSequence((args.seed, *purpose)).generate_state(1)[0] >> 2)

    # a new head must not be the one that a source of the same seed, or the source's source, began with
    transfers = source.get("transfers", 0) + 1 if source else checkpoint.get("transfers", 0)
    torch.manual_seed(seed_for(2, transfers) if transfers else args.seed)

    # TRY NOT TO MODIFY: env setup
    envs = make_envs(args, args.eval_episodes if args.evaluate else args.num_envs)
    obs, infos = envs.reset(seed=seed_for(0, checkpoint.get("global_step", 0)))
    if obs[:, :3].any():
        fail(f"--env-id {args.env_id}: a stack must begin with black frames, as the memory rebuilds it")
    num_actions, meanings = int(envs.single_action_space.n), action_meanings(args, envs)
    print(f"{args.env_id}: {envs.num_envs} games, {num_actions} actions ({', '.join(meanings)}), network on {device}")

    # ALGO LOGIC: networks
    QNetwork.bf16 = args.bf16
    q_network, target_network = (QNetwork(num_actions, args.narrow, args.dueling) for _ in range(2))
    networks = {"q_network": q_network}

    def look(stacks: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        max_q, actions = q_network(stacks).max(dim=1)
        return actions, {"max_q": max_q}

    # TRY NOT TO MODIFY: checkpoints and transfer
    for network in (*networks.values(), target_network):
        network.to(device, memory_format=torch.channels_last)  # the layout of fast convolutions
    for name, network in networks.items():
        if checkpoint:
            load_tensors(network, checkpoint.get(name, checkpoint["q_network"]), path)
        for part, parameter in network.named_parameters():
            parameter.requires_grad_(not args.freeze_features or part in head_names(network))
    if args.evaluate:
        gif = os.path.splitext(path)[0] + ".gif" if args.capture_video else None
        result = evaluate(args, envs, q_network, look, seed_for(1), gif)
        print(f"epsilon {args.eval_epsilon}, n = {args.eval_episodes}:",
              ", ".join(f"{name} {value:.3f}" for name, value in result.items()))  # fmt: skip
        sys.exit()
    if source:
        transfer(args, networks, source, meanings)

    # ALGO LOGIC: target network and optimizers
    target_network.load_state_dict(checkpoint.get("target_network", q_network.state_dict()))
    optimizers = {"optimizer": make_optimizer(args, args.optimizer, q_network, args.learning_rate)}

    # TRY NOT TO MODIFY: the replay memory, the run's folder and logs
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = os.path.dirname(path) or "." if path else os.path.join(args.logdir, run_name)
    while not path and os.path.exists(run_dir):
        run_dir += "-2"  # two runs that start in the same second
    checkpoint_path, global_step = path or f"{run_dir}/{args.exp_name}.pt", checkpoint.get("global_step", 0)
    try:
        rb = Replay(min(args.buffer_size, 2 * args.total_timesteps), args.num_envs, device)
        os.makedirs(run_dir, exist_ok=bool(path))
    except (OSError, RuntimeError) as error:  # a memory that is too large, a folder that cannot be made
        fail(str(error).splitlines()[0])
    print(f"replay memory: up to {rb.frames.nbytes / 1e9:.1f} GB")
    if args.track:
        import wandb

        wandb.init(name=os.path.basename(run_dir), config=vars(args), sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else None)
    origin = {"env_id": "unknown"} | source["args"] | {"algorithm": source.get("algorithm")} if source else {}
    facts = {"algorithm": ALGORITHM, "script": os.path.basename(__file__)} | vars(args)
    facts |= {f"pretrained_{name}": value for name, value in origin.items()}
    table = "\n".join(f"|{name}|{value}|" for name, value in facts.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", global_step)

    # TRY NOT TO MODIFY: the state of the run; a resumed one first refills its memory, in `refill` steps not counted
    updates, refill = checkpoint.get("updates", 0), min(global_step, args.learning_starts)
    rng = np.random.default_rng((args.seed, global_step))  # of the behaviour policy; torch's draws the batches
    if checkpoint:  # the moments, not the param_groups: a learning rate given anew must hold
        torch.manual_seed(seed_for(3, global_step))
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint[name]["state"]})
    sums = torch.zeros(len(LOSSES) + 3, device=device)  # since the last log: LOSSES, updates; max_q, states acted on
    greedy = torch.zeros(args.num_envs, dtype=torch.int64, device=device)

    # TRY NOT TO MODIFY: acting, on the device
    @torch.no_grad()
    def act() -> None:
        rb.store()
        max_q, actions = q_network(rb.obs).max(dim=1)
        greedy.copy_(actions)
        sums[-2:] += torch.stack(((max_q * rb.playing).sum(), rb.playing.sum()))

    # ALGO LOGIC: training, on the device
    def update() -> None:
        batch = rb.sample(args.batch_size)
        sums[:-3] += learn(batch, args.gamma, q_network, target_network, **optimizers, double=args.double)
        sums[-3] += 1

    if device.type == "cuda" and args.cudagraphs:
        act, update = graphed(act), graphed(update)

    # TRY NOT TO MODIFY: checkpoints
    def save() -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        flags = {name: value for name, value in vars(args).items() if name not in ("resume", "evaluate")}
        state = {"algorithm": ALGORITHM, "args": flags, "global_step": global_step, "updates": updates}
        state |= {"action_meanings": meanings, "transfers": transfers, "target_network": target_network.state_dict()}
        state |= {name: learner.state_dict() for name, learner in (networks | optimizers).items()}
        temporary = Path(f"{checkpoint_path}.{os.getpid()}.tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, checkpoint_path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            fail(f"cannot write {checkpoint_path}: {error}")

    # TRY NOT TO MODIFY: start the game
    on_the_ale, eval_envs = isinstance(envs, AtariVectorEnv), None
    playing, zeros = np.ones(args.num_envs, bool), np.zeros(args.num_envs)
    rb.stage(zeros, zeros, zeros, obs, restarted=np.ones(args.num_envs, bool), playing=playing)  # all begin
    returns, lengths, lives = zeros, zeros, infos.get("lives", zeros)
    recent = deque(maxlen=20)  # returns of the last games, for the console
    exploration_steps = max(1, args.exploration_fraction * args.total_timesteps)
    learning, previous_step, phase_step = False, global_step, global_step  # phases of SPS: before learning, learning
    phase_start = line_time = time.perf_counter()

    def reached(every: int) -> bool:
        return every > 0 and global_step // every > previous_step // every

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        while global_step < args.total_timesteps:
            # TRY NOT TO MODIFY: epsilon-greedy actions, random ones before learning unless a head was transferred
            learning_step = global_step - args.learning_starts
            epsilon = float(np.interp(learning_step, [0, exploration_steps], [args.start_e, args.end_e]))
            if learning_step < 0 and not (args.keep_head or args.pretrained_head):
                epsilon = 1.0
            explore = rng.random(args.num_envs) < epsilon  # each game draws for itself
            actions = rng.integers(num_actions, size=args.num_envs)
            if explore.all():
                rb.store()
            else:
                act()
                actions = np.where(explore, actions, greedy.cpu().numpy())

            # TRY NOT TO MODIFY: execute the game; ALE does so in its own threads while the learner is at work
            if on_the_ale:
                envs.send(actions)

            # ALGO LOGIC: training
            while not refill and rb.count and updates < learning_step // args.train_frequency:
                update()
                updates += 1

            # TRY NOT TO MODIFY: save data to replay buffer
            obs, rewards, terminations, truncations, infos = envs.recv() if on_the_ale else envs.step(actions)
            restarted, playing = ~playing, ~(terminations | truncations)
            lives_before, lives = lives, infos.get("lives", lives)
            dones = (terminations | (lives < lives_before) & args.life_loss_terminal) & args.terminal
            rb.stage(actions, np.clip(rewards, -1, 1), dones, obs, restarted, playing)
            steps = int((~restarted).sum())  # an autoreset is no step
            previous_step, global_step = global_step, global_step + (0 if refill else steps)
            refill, finished = max(0, refill - steps), global_step >= args.total_timesteps

            # ALGO LOGIC: update target network
            if reached(args.target_network_frequency):
                target_network.load_state_dict(q_network.state_dict())

            # TRY NOT TO MODIFY: record rewards for plotting purposes
            returns, lengths = (returns + rewards) * ~restarted, (lengths + 1) * ~restarted
            for i in np.flatnonzero(~playing & (global_step > previous_step)):  # none while refilling
                writer.add_scalar("charts/episodic_return", returns[i], global_step)
                writer.add_scalar("charts/episodic_length", lengths[i], global_step)
                recent.append(returns[i])
            now = time.perf_counter()
            if refill:
                sums.zero_()
            if updates and not refill and not learning:
                learning, phase_step, phase_start = True, global_step, now
            sps = (global_step - phase_step) / max(now - phase_start, 1e-9)
            if now - line_time > 10:
                steps_left = max(0, args.total_timesteps - global_step)
                left = timedelta(seconds=int(steps_left / sps)) if learning and sps else "once learning"
                score = f"{np.mean(recent):.2f}" if recent else "none yet"
                print(f"step {global_step:,}/{args.total_timesteps:,}  SPS {sps:,.0f}  ETA {left}  return {score}  "
                      f"epsilon {epsilon:.3f}{f'  refilling: {refill:,}' if refill else ''}", flush=True)  # fmt: skip
                line_time = now
            if (reached(1_000) or reached(args.checkpoint_frequency) or finished) and not sums.isfinite().all():
                fail(f"a loss or value is not finite at step {global_step}: try a smaller --learning-rate")
            if reached(1_000) or finished:
                *losses, n_updates, max_q, n_states = sums.tolist()  # the only place where logging waits
                sums.zero_()
                means = {f"losses/{name}": value / n_updates for name, value in zip(LOSSES, losses) if n_updates}
                means |= {"charts/max_q": max_q / n_states} if n_states else {}
                means |= {"charts/SPS": sps, "charts/epsilon": epsilon}
                for name, value in means.items():
                    writer.add_scalar(name, value, global_step)

            # TRY NOT TO MODIFY: evaluations, from seeds of their own: they do not change the training; checkpoints
            if reached(args.eval_frequency) or finished:
                eval_envs = eval_envs or make_envs(args, args.eval_episodes)
                gif = os.path.join(run_dir, f"eval_{global_step}.gif") if args.capture_video else None
                result = evaluate(args, eval_envs, q_network, look, seed_for(1, global_step), gif)
                for name, value in result.items():
                    writer.add_scalar(f"eval/{name}", value, global_step)
                print(f"evaluation at step {global_step:,}: return {result['episodic_return']:.2f} +- "
                      f"{result['episodic_return_std']:.2f} (n = {args.eval_episodes})", flush=True)  # fmt: skip
            if reached(args.checkpoint_frequency) or finished:
                save()
    except (KeyboardInterrupt, BrokenPipeError):
        # signals often come in pairs, to the process and to its group
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        global_step = previous_step  # so that --resume repeats what the interrupted step logs, copies, evaluates
        save()
        sys.stdout = sys.stderr  # Python flushes sys.stdout at exit, which fails again where it is a closed pipe
        print(f"stopped at step {global_step:,}; python {os.path.basename(__file__)} --resume {run_dir} "
              f"--env-id {args.env_id} goes on")  # fmt: skip
        sys.exit(130)
    except OSError as error:
        fail(f"{error}; the last checkpoint, if there is one, is {checkpoint_path}")
    writer.close()
    print(f"saved {checkpoint_path}")
