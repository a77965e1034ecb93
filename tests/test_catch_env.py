"""catch_env.py against an independent, literal transcription of its specification."""

import copy
import itertools
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from PIL import Image

import catch_env

IDS = [f"Catch-v{version}" for version in range(5)]
LAST_ROW, REACH = {"Catch-v1": 15}, {"Catch-v1": 1}
PADDLE = {"Catch-v1": (-1, 0)}  # cells relative to its position, where not -2..2


def move(x, vx):
    """One step of the ball, as the authors' code words it."""
    x += vx
    if x > 20:
        x, vx = 40 - x, -vx
    elif x < 0:
        x, vx = -x, -vx
    return x, vx


def paddle(p, action):
    return p - 2 if action == 0 and p > 3 else p + 2 if action == 1 and p < 17 else p


@pytest.mark.parametrize("env_id", IDS)
def test_conforms_to_gymnasium(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(f"catch_env:{env_id}", render_mode="rgb_array")
        check_env(env.unwrapped)
        envs = gym.make_vec(f"catch_env:{env_id}", num_envs=3)
    assert isinstance(envs, catch_env.CatchVectorEnv) and envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    obs, _ = env.reset(seed=0)
    image = env.render()
    assert image.shape == (336, 336, 3) and image.dtype == np.uint8 and (image[::4, ::4, 0] == obs[3]).all()


@pytest.mark.parametrize("env_id", IDS)
def test_dynamics_and_pixels_follow_the_specification(env_id):
    env = gym.make(f"catch_env:{env_id}").unwrapped
    rng = np.random.default_rng(0)
    cells = PADDLE.get(env_id, (-2, -1, 0, 1, 2))
    noisy, ink = env_id == "Catch-v2", 51 if env_id == "Catch-v2" else 255
    falling = slice(None, None, -1 if env_id == "Catch-v3" else 1)  # rows in the order in which the ball passes them
    starts, later = set(), set()
    for episode in range(80):
        obs, info = env.reset(seed=episode)
        games = env.games
        p, x, y, vx = int(games.paddle[0]), int(games.ball_x[0]), int(games.ball_y[0]), int(games.ball_vx[0])
        starts.add((p, vx))
        assert 2 <= p <= 18 and -2 <= vx <= 2 and y == 5 and not obs[:3].any()
        assert info == {"caught": 0, "balls": 0}
        stack, grid = [np.zeros((21, 21), int)] * 3, None
        caught = 0
        while True:
            if grid is None:  # the first frame: the background is drawn by chance, everything else is prescribed
                grid = obs[3, ::4, ::4][falling].astype(int)
                if noisy:
                    rest = np.delete(grid, 16, axis=0)
                    assert set(np.unique(rest)) <= {0, ink, 102, 153, 204, 255} and (rest == ink).sum() == 1
                    assert (grid[4] == 0).sum() == 1  # the trail: where the ball was before reset's no-op
                else:
                    assert grid.sum() == ink * (1 + len(cells))
            row = set(grid[16, [c for c in range(21) if c - p not in cells]])
            assert row <= ({102, 153, 204, 255} if noisy else {0}) and len(row) == 1
            assert (grid[16, [p + c for c in cells]] == ink).all()
            assert y == 16 or grid[y, x] == ink
            stack = [*stack[-3:], grid[falling].copy()]
            assert obs.dtype == np.uint8
            assert (obs == np.stack(stack).repeat(4, axis=1).repeat(4, axis=2)).all()

            action = int(rng.integers(3))
            obs, reward, terminated, truncated, info = env.step(action)
            p = paddle(p, action)
            grid[y, x] = 0
            (x, vx), y = move(x, vx), y + 1
            grid[y, x] = ink
            grid[16] = obs[3, ::4, ::4][falling][16]
            landed = y == LAST_ROW.get(env_id, 16)
            caught += landed and abs(x - p) <= REACH.get(env_id, 2)
            assert info["caught"] == caught and not truncated
            won = caught == (5 if env_id == "Catch-v4" else 1)
            missed = landed and caught < info["balls"]
            assert terminated == (won or missed) and reward == float(won)
            if terminated:
                break
            if landed:  # Catch-v4: a new ball starts like the first, no-op included
                assert env_id == "Catch-v4"
                x, y, vx = int(games.ball_x[0]), int(games.ball_y[0]), int(games.ball_vx[0])
                assert y == 5
                later.add(vx)
                grid[y, x] = ink
    assert len(starts) > 45 and later == (set(range(-2, 3)) if env_id == "Catch-v4" else set())  # of 17 * 5


def test_starts_are_uniform():
    games, found = catch_env.CatchVectorEnv(1), []
    games.reset(seed=0)
    for _ in range(5_000):
        games._new_episode(0)
        found.append((games.paddle[0], games.ball_vx[0], games.ball_x[0]))
    for column, values in zip(np.transpose(found), (range(2, 19), range(-2, 3), range(21))):
        seen, counts = np.unique(column, return_counts=True)
        share = 1 / len(values)
        assert seen.tolist() == list(values)
        assert np.abs(counts - 5_000 * share).max() < 5 * (5_000 * share * (1 - share)) ** 0.5
    assert len({(vx, x) for _, vx, x in found}) == 105


@pytest.mark.parametrize("env_id", IDS)
def test_every_row_of_the_vector_environment_plays_like_a_single_one(env_id):
    envs = gym.make_vec(f"catch_env:{env_id}", num_envs=5)
    singles = [gym.make(f"catch_env:{env_id}") for _ in range(5)]
    rng = np.random.default_rng(1)
    observations, infos = envs.reset(seed=7)
    for i, env in enumerate(singles):
        obs, _ = env.reset(seed=7 + i)
        assert (observations[i] == obs).all()
    over = np.zeros(5, bool)
    for _ in range(120):
        actions, before, kept = rng.integers(3, size=5), observations, observations.copy()
        observations, rewards, terminations, truncations, infos = envs.step(actions)
        for i, env in enumerate(singles):
            if over[i]:
                (obs, info), reward, terminated = env.reset(), 0.0, False
            else:
                obs, reward, terminated, _, info = env.step(int(actions[i]))
            assert (observations[i] == obs).all()
            assert (rewards[i], terminations[i], truncations[i]) == (reward, terminated, False)
            assert (infos["caught"][i], infos["balls"][i]) == (info["caught"], info["balls"])
        assert (before == kept).all()  # what was returned before is left as it was
        before[:] = 7  # and whoever writes into it does not change the game
        over = terminations.copy()


def stated(env_id):
    """Random and optimal score in the docstring's table."""
    (line,) = [line for line in catch_env.__doc__.splitlines() if line.startswith(f"| {env_id}")]
    return float(line.split("|")[-3]), float(line.split("|")[-2])


@pytest.mark.parametrize(
    ("env_ids", "last_row", "reach"), [(("Catch-v0", "Catch-v2", "Catch-v3"), 16, 2), (("Catch-v1",), 15, 1)]
)
def test_stated_scores_by_enumeration_of_all_starts(env_ids, last_row, reach):
    by_chance = best = border = 0
    starts = list(itertools.product(range(2, 19), range(-2, 3), range(21)))
    for start, vx, x in starts:
        for _ in range(4, last_row):
            x, vx = move(x, vx)
        chance = {start: 1.0}  # {position of the paddle: probability under random play}
        for _ in range(5, last_row):
            after = dict.fromkeys({paddle(p, action) for p in chance for action in range(3)}, 0.0)
            for (p, probability), action in itertools.product(chance.items(), range(3)):
                after[paddle(p, action)] += probability / 3
            chance = after
        by_chance += sum(probability for p, probability in chance.items() if abs(x - p) <= reach) / len(starts)
        best += any(abs(x - p) <= reach for p in chance) / len(starts)
        border += (x in (0, 20)) / len(starts)
    for env_id in env_ids:
        assert stated(env_id) == pytest.approx((by_chance, best), abs=6e-4)
    if reach == 2:  # Catch-v4: from an even position every column can be reached, from an odd one all but the border
        assert stated("Catch-v4")[1] == pytest.approx(9 / 17 + 8 / 17 * (1 - border) ** 5, abs=6e-4)


@pytest.mark.parametrize("env_id", IDS)
def test_random_play_scores_what_the_docstring_says(env_id):
    envs, rng = gym.make_vec(f"catch_env:{env_id}", num_envs=200), np.random.default_rng(0)
    envs.reset(seed=0)
    played = [envs.step(rng.integers(3, size=200))[1:3] for _ in range(1000)]
    rewards, episodes = np.sum(played, axis=(0, 2))
    assert rewards / episodes == pytest.approx(stated(env_id)[0], abs=4 * np.sqrt(stated(env_id)[0] / episodes) + 5e-4)


def test_a_copy_plays_on_and_an_observation_is_the_caller_s():
    env = catch_env.CatchEnv(mirrored=True)
    observation, _ = env.reset(seed=0)
    twin = copy.deepcopy(env)
    observation[:] = 0
    assert all((env.step(2)[0] == twin.step(2)[0]).all() for _ in range(5))


def test_seeds_and_misuse():
    env, envs = catch_env.CatchEnv(), catch_env.CatchVectorEnv(2)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    same, _ = envs.reset(seed=[5, 5])
    other, _ = envs.reset()
    assert (same[0] == same[1]).all() and (other[0] == other[1]).all()
    assert (other != same).any()  # the generators go on, they are not reseeded
    with pytest.raises(gym.error.InvalidAction, match="expected 2 actions in 0..2, got array"):
        envs.step(np.array([0, 3]))
    with pytest.raises(AssertionError, match="3 seeds for 2"):
        envs.reset(seed=[1, 2, 3])


def test_a_person_can_see_the_game(tmp_path):
    def run(*args):  # in a process of its own: the games are registered once
        command = [sys.executable, str(ROOT / "catch_env.py"), *args]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)

    shown = run("--episodes", "1").stdout
    assert "caught 1 of 1" in shown and shown.count("#####") == 12 and shown.count(" # ") > 5
    run("--env-id", "Catch-v4", "Catch-v3", "--episodes", "2", "--gif", "game.gif")
    with Image.open(tmp_path / "game.gif") as gif:
        assert gif.size == (336, 336) and gif.n_frames > 2 * 11 + 2 * 11
    wrong = run("--env-id", "Catch-v9")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "Catch-v0" in wrong.stderr
