"""The four algorithms in numbers: targets, gradients, fixed points, and the architectures of DQV."""

import copy
import importlib

import numpy as np
import pytest
import torch
from conftest import only_run, run
from torch import nn

ddqn, dqv, dqv_max = (importlib.import_module(name) for name in ("ddqn_atari", "dqv_atari", "dqv_max_atari"))


def table(rows):
    """A linear network that looks up `rows[state]` for states given as one-hot vectors."""
    network = nn.Linear(len(rows), len(rows[0]), bias=False)
    network.weight.data = torch.tensor(rows).T.contiguous()
    return network


def rows(network):
    return network.weight.detach().T.tolist()


def approx(values):
    return pytest.approx(np.array(values), abs=1e-6)


# -------------------------------------------------------------------------------------------------------- one update

Q, Q_FROZEN = [[1.0, 0.2], [0.3, 0.9]], [[2.0, 1.0], [1.0, 0.8]]
V, V_FROZEN = [[0.6], [0.7]], [[5.0], [1.6]]
# From state 0 action 0 earns 0.5 and leads to state 1, from state 1 action 1 earns -0.8 and ends the episode
BATCH = torch.eye(2), torch.tensor([0, 1]), torch.tensor([0.5, -0.8]), torch.eye(2).flip(0), torch.tensor([False, True])
GAMMA = 0.5


def updated(module, algorithm):
    """The tables and what `learn` returns after one update with plain gradient descent, learning rate 1."""
    q_network, v_network = table(Q), table(V)
    frozen = table(V_FROZEN if algorithm == "DQV" else Q_FROZEN)
    optimizer, v_optimizer = (torch.optim.SGD(network.parameters(), 1.0) for network in (q_network, v_network))
    if module is ddqn:
        logged = ddqn.learn(BATCH, GAMMA, q_network, frozen, optimizer, double=algorithm == "DDQN")
    else:
        logged = module.learn(BATCH, GAMMA, q_network, v_network, frozen, optimizer, v_optimizer)
    assert frozen.weight.grad is None and rows(frozen) == table_rows(V_FROZEN if algorithm == "DQV" else Q_FROZEN)
    return rows(q_network), rows(v_network), logged.tolist()


def table_rows(values):
    return rows(table(values))


@pytest.mark.parametrize(
    "module, algorithm, q_target, v_target",
    [
        (ddqn, "DQN", 0.5 + GAMMA * 1.0, None),  # the frozen Q's best action in state 1 is 0, worth 1.0
        (ddqn, "DDQN", 0.5 + GAMMA * 0.8, None),  # the online Q's is 1, which the frozen Q says is worth 0.8
        (dqv, "DQV", 0.5 + GAMMA * 1.6, 0.5 + GAMMA * 1.6),
        (dqv_max, "DQV-Max", 0.5 + GAMMA * 0.7, 0.5 + GAMMA * 1.0),  # V of state 1 before it moves
    ],
)
def test_one_update_moves_what_it_should_by_the_right_amount(module, algorithm, q_target, v_target):
    q, v, logged = updated(module, algorithm)
    # Huber, mean over two transitions: state 1's error of 1.7 counts as 1
    error = 1.0 - q_target
    assert q == approx([[1.0 - error / 2, 0.2], [0.3, 0.9 - 1 / 2]])
    assert logged[:2] == approx([(error**2 / 2 + (1.7 - 0.5)) / 2, (1.0 + 0.9) / 2])
    if module is ddqn:
        assert v == table_rows(V) and len(logged) == 2 == len(module.LOSSES)
    else:  # squared error, mean over two: the gradient is the error itself
        assert v == approx([[v_target], [-0.8]])
        assert logged[2:] == approx([((0.6 - v_target) ** 2 + 1.5**2) / 2, (0.6 + 0.7) / 2])
        assert len(logged) == 4 == len(module.LOSSES)


# ------------------------------------------------------------------------------------------------------ fixed points

# States 0 -> 1 -> 2 -> end. Only in state 1 do actions differ: 0 ends the episode with 0.2, 1 goes on. State 2 earns 1
CHAIN = [  # state, action, reward, next state, terminal: what a random policy experiences, each as often in its state
    (0, 0, 0.0, 1, False), (0, 1, 0.0, 1, False), (1, 0, 0.2, 0, True), (1, 1, 0.0, 2, False),
    (2, 0, 1.0, 0, True), (2, 1, 1.0, 0, True),
]  # fmt: skip
OPTIMAL_Q = [[0.25, 0.25], [0.2, 0.5], [1.0, 1.0]]  # gamma is 0.5
RANDOM_V = [[0.175], [0.35], [1.0]]  # (0.2 + 0.5) / 2 in state 1


@pytest.mark.parametrize(
    "module, algorithm, q, v",
    [
        (ddqn, "DQN", OPTIMAL_Q, None),
        (ddqn, "DDQN", OPTIMAL_Q, None),
        (dqv, "DQV", [[0.175, 0.175], [0.2, 0.5], [1.0, 1.0]], RANDOM_V),  # Q too: random after the first action
        # V is greedy from the second action on: 0.25, the optimal value, in state 0, whose own actions are equal, but
        # 0.35 in state 1, where the action is the random policy's; and Q, which learns from that, gets 0.175 in state 0
        (dqv_max, "DQV-Max", [[0.175, 0.175], [0.2, 0.5], [1.0, 1.0]], [[0.25], [0.35], [1.0]]),
    ],
)
def test_fixed_points_under_a_random_policy(module, algorithm, q, v):
    states, actions, rewards, next_states, dones = (torch.tensor(column) for column in zip(*CHAIN))
    batch = torch.eye(3)[states], actions, rewards, torch.eye(3)[next_states], dones
    torch.manual_seed(0)
    q_network, v_network = nn.Linear(3, 2, bias=False), nn.Linear(3, 1, bias=False)
    copied = v_network if algorithm == "DQV" else q_network
    frozen = copy.deepcopy(copied)
    optimizers = [torch.optim.SGD(network.parameters(), 0.5) for network in (q_network, v_network)]
    for step in range(800):
        if step % 20 == 0:
            frozen.load_state_dict(copied.state_dict())
        if module is ddqn:
            module.learn(batch, 0.5, q_network, frozen, optimizers[0], double=algorithm == "DDQN")
        else:
            module.learn(batch, 0.5, q_network, v_network, frozen, *optimizers)
    assert rows(q_network) == pytest.approx(np.array(q), abs=1e-4)
    assert v is None or rows(v_network) == pytest.approx(np.array(v), abs=1e-4)


def test_rmsprop_equals_torch_s_to_the_last_bit():
    """Also where gradients are exact zeros, now and then or always; and it goes on from its state dict."""
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 1000).view(10, 100)) for _ in range(2))
    reference = torch.optim.RMSprop([theirs], 2.5e-4, alpha=0.95, eps=0.01**0.5 / 32, centered=True)
    optimizer = ddqn.RMSprop([mine], 2.5e-4)
    for step in range(200):
        gradient = torch.randn(10, 100) * 10.0 ** torch.randint(-6, 2, (10, 100))
        gradient[step % 10], gradient[:, :50] = 0, 0
        mine.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
        if step == 100:
            state = optimizer.state_dict()
            optimizer = ddqn.RMSprop([mine], 2.5e-4)
            optimizer.load_state_dict(state)
    alive = ~theirs.isnan()  # torch's takes the root of a variance that rounding made negative
    assert torch.equal(mine[alive], theirs[alive]) and alive.float().mean() > 0.9 and not mine.isnan().any()
    assert not torch.equal(mine, torch.linspace(-1, 1, 1000).view(10, 100))
    assert torch.equal(mine[:, :50], torch.linspace(-1, 1, 1000).view(10, 100)[:, :50])


def test_dueling():
    torch.manual_seed(0)
    network = ddqn.QNetwork(5, dueling=True)
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    features = network.network[:7](frames / 255.0)
    advantages, value = network.network[7:](features), network.value(features)
    assert torch.allclose(network(frames), value + advantages - advantages.mean(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(network(frames).mean(dim=1, keepdim=True), value, atol=1e-6)  # what makes V identifiable
    heads = {"network.9.weight", "network.9.bias", "value.2.weight", "value.2.bias"}
    assert set(ddqn.head_names(network)) == heads


def test_dueling_transfers_both_heads(tmp_path, toy_flags):
    flags = ["--dueling", "--total-timesteps", 260, "--eval-episodes", 2]
    run("ddqn_atari.py", *toy_flags, *flags, cwd=tmp_path)
    path = only_run(tmp_path / "runs")
    source = torch.load(path / "ddqn_atari.pt")["q_network"]
    flags = ["--env-id", "catch_env:Catch-v0", "--dueling", "--pretrained", path, "--freeze-features", "--logdir", "to"]
    run("ddqn_atari.py", *toy_flags, *flags, "--total-timesteps", 300, "--head-fraction", 1, cwd=tmp_path)
    checkpoint = torch.load(only_run(tmp_path / "to") / "ddqn_atari.pt")
    heads = {name for name in source if name.startswith(("network.9", "value.2"))}
    assert checkpoint["updates"] > 5 and len(checkpoint["optimizer"]["state"]) == len(heads) == 4
    for name, tensor in source.items():
        assert torch.equal(checkpoint["q_network"][name], tensor) == (name not in heads), name


# ------------------------------------------------------------------------------------------------ architectures of DQV

TRUNK = 8_224 + 32_832 + 36_928 + 1_606_144  # the thesis' appendix
ACTIONS = 6
PARAMETERS = {
    ("separate", 1): 2 * TRUNK + 513 * (ACTIONS + 1),
    ("hard", 1): TRUNK + 513 * (ACTIONS + 1),
    ("dueling-1st", 1): TRUNK + (32 * 20 * 20 + 1) * 512 + 513 * (ACTIONS + 1),
    ("dueling-2nd", 1): TRUNK + (64 * 9 * 9 + 1) * 512 + 513 * (ACTIONS + 1),
    ("dueling-3rd", 1): TRUNK + (64 * 7 * 7 + 1) * 512 + 513 * (ACTIONS + 1),
    ("dueling-1st", 3): 2_570 + 3_381 + 3_990 + 175_100 + (10 * 20 * 20 + 1) * 170 + 171 * (ACTIONS + 1),
    ("separate", 4): 2 * (2_056 + 2_064 + 2_320 + 100_480) + 129 * (ACTIONS + 1),  # Tiny-DQV
}
SHARED_LAYERS = {"separate": 0, "hard": 4, "dueling-1st": 1, "dueling-2nd": 2, "dueling-3rd": 3}


@pytest.mark.parametrize("architecture, narrow", PARAMETERS)
def test_architectures(architecture, narrow):
    q_network, v_network = dqv.make_networks(dqv.Args(architecture=architecture, narrow=narrow), ACTIONS)
    frames = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    assert q_network(frames).shape == (2, ACTIONS) and v_network(frames).shape == (2, 1)
    parameters = nn.ModuleList([q_network, v_network]).parameters()  # each once
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[architecture, narrow]
    own = {id(parameter) for parameter in v_network.parameters()} - {id(p) for p in q_network.parameters()}
    shared = sum(1 for parameter in v_network.parameters() if id(parameter) not in own)
    assert shared == 2 * SHARED_LAYERS[architecture]
    v_network(frames).sum().backward()  # V's loss trains the layers that it uses, and none else
    assert sum(p.grad is not None for p in q_network.parameters()) == shared
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in v_network.parameters())
    head = [tuple(v_network.get_parameter(name).shape) for name in dqv.head_names(v_network)]
    assert head == [(1, 512 // narrow), (1,)]


@pytest.mark.parametrize("architecture", ["hard", "dueling-2nd"])
def test_architectures_train_resume_and_evaluate(architecture, tmp_path, toy_flags):
    flags = ["--architecture", architecture, "--total-timesteps", 260, "--eval-episodes", 2]
    run("dqv_atari.py", *toy_flags, *flags, cwd=tmp_path)
    path = only_run(tmp_path / "runs")
    before = torch.load(path / "dqv_atari.pt")
    game = ["--env-id", "toy_env:Toy-v0"]  # which a checkpoint alone may not import
    run("dqv_atari.py", "--resume", path, *game, "--total-timesteps", 400, cwd=tmp_path)
    after = torch.load(path / "dqv_atari.pt")
    assert before["updates"] > 5 and after["updates"] > before["updates"] + 10
    for network in ("q_network", "v_network", "target_network"):
        assert all(not torch.equal(after[network][name], tensor) for name, tensor in before[network].items()), network
    first = list(after["v_network"])[: 2 * SHARED_LAYERS[architecture]]
    assert all(torch.equal(after["v_network"][name], after["q_network"][name]) for name in first)
    assert "v_minus_max_q" in run("dqv_atari.py", "--evaluate", path, *game, cwd=tmp_path).stdout


def test_the_thesis_sgd_for_v(tmp_path, toy_flags):
    flags = ["--optimizer", "rmsprop", "--v-optimizer", "sgd", "--total-timesteps", 260, "--eval-episodes", 2]
    run("dqv_atari.py", *toy_flags, *flags, cwd=tmp_path)
    checkpoint = torch.load(only_run(tmp_path / "runs") / "dqv_atari.pt")
    assert len(checkpoint["optimizer"]["state"]) == 10 and checkpoint["v_optimizer"]["state"] == {}
    assert [checkpoint[name]["param_groups"][0]["lr"] for name in ("optimizer", "v_optimizer")] == [1e-3, 1e-3]
