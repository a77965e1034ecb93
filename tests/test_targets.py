"""The four algorithms in numbers: targets, gradients, and the architectures of DQV."""

import importlib

import numpy as np
import pytest
import torch
from conftest import TOY_FLAGS, only_run, run
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


@pytest.mark.parametrize("module, algorithm, q_target, v_target", [
    (ddqn, "DQN", 0.5 + GAMMA * 1.0, None),  # the frozen Q's best action in state 1 is 0, worth 1.0
    (ddqn, "DDQN", 0.5 + GAMMA * 0.8, None),  # the online Q's is 1, which the frozen Q says is worth 0.8
    (dqv, "DQV", 0.5 + GAMMA * 1.6, 0.5 + GAMMA * 1.6),
    (dqv_max, "DQV-Max", 0.5 + GAMMA * 0.7, 0.5 + GAMMA * 1.0),  # V of state 1 before it moves
])  # fmt: skip
def test_one_update_moves_what_it_should_by_the_right_amount(module, algorithm, q_target, v_target):
    """One update with plain gradient descent, learning rate 1, where gradients of an update before are still there."""
    q_network, v_network, copied = table(Q), table(V), V_FROZEN if algorithm == "DQV" else Q_FROZEN
    frozen, networks = table(copied), (q_network, v_network)[: 1 if module is ddqn else 2]
    for network in networks:
        network.weight.grad = torch.ones_like(network.weight)
    optimizers = [torch.optim.SGD(network.parameters(), 1.0) for network in networks]
    double = {"double": algorithm == "DDQN"} if module is ddqn else {}
    logged = module.learn(BATCH, GAMMA, *networks, frozen, *optimizers, **double).tolist()
    assert frozen.weight.grad is None and rows(frozen) == approx(copied)
    q, v = rows(q_network), rows(v_network)
    # Huber, mean over two transitions: state 1's error of 1.7 counts as 1
    error = 1.0 - q_target
    assert q == approx([[1.0 - error / 2, 0.2], [0.3, 0.9 - 1 / 2]])
    assert logged[:2] == approx([(error**2 / 2 + (1.7 - 0.5)) / 2, (1.0 + 0.9) / 2])
    if module is ddqn:
        assert v == approx(V) and len(logged) == 2 == len(module.LOSSES)
    else:  # squared error, mean over two: the gradient is the error itself
        assert v == approx([[v_target], [-0.8]])
        assert logged[2:] == approx([((0.6 - v_target) ** 2 + 1.5**2) / 2, (0.6 + 0.7) / 2])
        assert len(logged) == 4 == len(module.LOSSES)


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


def test_dueling():
    torch.manual_seed(0)
    network = ddqn.QNetwork(5, dueling=True)
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    features = network.network[:7](frames / 255.0)
    advantages, value = network.network[7:](features), network.value(features)
    assert torch.allclose(network(frames), value + advantages - advantages.mean(dim=1, keepdim=True), atol=1e-6)


def test_dueling_transfers_both_heads(tmp_path):
    flags = ["--dueling", "--total-timesteps", 260, "--eval-episodes", 2]
    run("ddqn_atari.py", *TOY_FLAGS, *flags, cwd=tmp_path)
    path = only_run(tmp_path / "runs")
    source = torch.load(path / "ddqn_atari.pt")["q_network"]
    flags = ["--env-id", "catch_env:Catch-v0", "--dueling", "--pretrained", path, "--freeze-features", "--logdir", "to"]
    run("ddqn_atari.py", *TOY_FLAGS, *flags, "--total-timesteps", 300, "--head-fraction", 1, cwd=tmp_path)
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
    shared = len(set(v_network.parameters()) & set(q_network.parameters()))
    assert shared == 2 * SHARED_LAYERS[architecture]
    v_network(frames).sum().backward()  # V's loss trains the layers that it uses, and none else
    assert sum(p.grad is not None for p in q_network.parameters()) == shared
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in v_network.parameters())
    head = [tuple(v_network.get_parameter(name).shape) for name in dqv.head_names(v_network)]
    assert head == [(1, 512 // narrow), (1,)]


@pytest.mark.parametrize("architecture", ["hard", "dueling-2nd"])
def test_architectures_train_resume_and_evaluate(architecture, tmp_path):
    flags = ["--architecture", architecture, "--total-timesteps", 260, "--eval-episodes", 2]
    run("dqv_atari.py", *TOY_FLAGS, *flags, cwd=tmp_path)
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


def test_the_thesis_sgd_for_v(tmp_path):
    flags = ["--optimizer", "rmsprop", "--v-optimizer", "sgd", "--total-timesteps", 260, "--eval-episodes", 2]
    run("dqv_atari.py", *TOY_FLAGS, *flags, cwd=tmp_path)
    checkpoint = torch.load(only_run(tmp_path / "runs") / "dqv_atari.pt")
    assert len(checkpoint["optimizer"]["state"]) == 10 and checkpoint["v_optimizer"]["state"] == {}
    assert [checkpoint[name]["param_groups"][0]["lr"] for name in ("optimizer", "v_optimizer")] == [1e-3, 1e-3]
