# The Catch games of "On the Transferability of Deep-Q Networks" (Sabatelli and Geurts, arXiv 2110.02639; thesis ch. 8)
#
#   python ddqn_atari.py --env-id catch_env:Catch-v0                       learn one
#   python catch_env.py --env-id Catch-v2                                  watch one in the terminal
#   python catch_env.py --env-id Catch-v0 Catch-v3 --gif catch.gif         film several in one clip
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.1", "numpy>=1.26", "tyro>=0.9.2", "pillow>=10"]
# ///
"""Five small games of one family, to study in minutes on a laptop whether a Deep-Q network transfers. A ball falls down
a grid of 21x21 cells and bounces off the side walls; a paddle in row 16 has to be under it. The dynamics are those of
the authors' code (paintception/upside_down_rl, experiment_2), the names those of the thesis:

| id       | what changes                                                                      | random | optimal |
|----------|-----------------------------------------------------------------------------------|--------|---------|
| Catch-v0 | paddle of 5 cells, ball and paddle white on black                                 | 0.247  | 0.973   |
| Catch-v1 | paddle of 2 cells (authors' code and transfer table: "v4"), one decision fewer    | 0.148  | 0.898   |
| Catch-v2 | random background, drawn anew each episode; the ball leaves a dark trail          | 0.247  | 0.973   |
| Catch-v3 | the picture is mirrored top to bottom: the ball rises                             | 0.247  | 0.973   |
| Catch-v4 | five balls in a row: a miss ends the episode with reward 0, the fifth catch with 1 | 0.001  | 0.880   |

The last columns are exact mean rewards an episode. The best play misses balls because the paddle moves by two cells:
which border columns it can reach depends on the start. An episode starts with the paddle's centre uniform in 2..18, the
ball in row 4, its column and its sideways speed (-2..2) uniform; one step passes at once. It terminates when the ball
reaches the paddle, after 11 decisions (10 on v1); on v4 a caught ball is replaced, the paddle stays. The step that
catches the last ball has reward 1, all others 0. Actions: 0 left, 1 right (two cells, within the walls), 2 stay.
Observations: uint8 `(4, 84, 84)`, the last four frames, oldest first, black before the first; background 0, ball and
paddle 255; on v2 background 102 to 255, ball and paddle 51, trail 0. `info` counts the balls `caught`, of `balls`.
"""

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

SIZE, CELL = 21, 4  # cells a side, pixels a cell: 84x84, the size of the Atari networks' input
START_ROW, PADDLE_ROW = 4, 16
LEFT, RIGHT, STAY = range(3)

VARIANTS = {
    "Catch-v0": {},
    "Catch-v1": {"small_paddle": True},
    "Catch-v2": {"noisy": True},
    "Catch-v3": {"mirrored": True},
    "Catch-v4": {"balls_to_win": 5},
}


class CatchVectorEnv(VectorEnv):
    """`num_envs` games in one set of arrays, with next-step autoreset: the call after a termination ignores a game's
    action and returns the first observation of its next episode with reward 0. Game i of `reset(seed=s)` plays exactly
    as `CatchEnv` does after `reset(seed=s + i)`. The next step reads what `step` returned: do not write to it."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": ["rgb_array"], "render_fps": 6}

    def __init__(self, num_envs=1, render_mode=None, small_paddle=False, noisy=False, mirrored=False, balls_to_win=1):
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = gym.spaces.Box(0, 255, (4, SIZE * CELL, SIZE * CELL), np.uint8)
        self.single_action_space = gym.spaces.Discrete(3)
        self.observation_space = gym.spaces.Box(0, 255, (num_envs, 4, SIZE * CELL, SIZE * CELL), np.uint8)
        self.action_space = gym.spaces.MultiDiscrete([3] * num_envs)
        self.noisy, self.mirrored, self.balls_to_win = noisy, mirrored, balls_to_win
        self.paddle_cells = np.arange(-1, 1) if small_paddle else np.arange(-2, 3)  # relative to its position
        self.reach = 1 if small_paddle else 2  # how far from its position a ball counts as caught
        self.last_row = PADDLE_ROW - 1 if small_paddle else PADDLE_ROW
        # Grey levels 0..255 stand for the values 0..5 that the authors' min-max resize spread over a byte. A cell is a
        # uint32: 4 equal bytes, its 4 pixels in a row of the picture.
        self.background_levels = np.array([102, 153, 204, 255], np.uint32) * 0x01010101
        self.ink = (51 if noisy else 255) * 0x01010101
        self.cells = np.zeros((num_envs, SIZE, SIZE), np.uint32)  # here the ball always falls
        self.paddle_row_levels = np.zeros((num_envs, PADDLE_ROW - START_ROW), np.uint32)
        self.frames = np.zeros(self.observation_space.shape, np.uint8)  # the newest observations, oldest frame first
        self.paddle, self.ball_x, self.ball_y, self.ball_vx = np.zeros((4, num_envs), np.int64)
        self.caught, self.balls = np.zeros((2, num_envs), np.int64)
        self.rngs = [gym.utils.seeding.np_random()[0] for _ in range(num_envs)]
        self.over = np.ones(num_envs, bool)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict | None = None):
        if seed is not None:
            seeds = seed if np.iterable(seed) else [seed + i for i in range(self.num_envs)]
            assert len(seeds) == self.num_envs, f"reset() got {len(seeds)} seeds for {self.num_envs} games"
            self.rngs = [gym.utils.seeding.np_random(s)[0] for s in seeds]
        self.over[:] = True
        observations, _, _, _, infos = self.step(np.full(self.num_envs, STAY))
        return observations, infos

    def step(self, actions: np.ndarray):
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or ((actions < 0) | (actions > 2)).any():
            raise gym.error.InvalidAction(f"expected {self.num_envs} actions in 0..2, got {actions!r}")
        starting = self.over
        self.paddle -= 2 * ((actions == LEFT) & (self.paddle > 3))
        self.paddle += 2 * ((actions == RIGHT) & (self.paddle < 17))
        for i in np.flatnonzero(starting):
            self._new_episode(i)
        self._fall(np.arange(self.num_envs))  # where an episode starts, the no-op with which the authors' `reset` ends
        landed = self.ball_y == self.last_row
        caught = landed & (np.abs(self.ball_x - self.paddle) <= self.reach)
        self.balls += landed
        self.caught += caught
        another = caught & (self.caught < self.balls_to_win)
        if another.any():
            for i in np.flatnonzero(another):
                self._new_ball(i, int(self.rngs[i].integers(105)))
            self._fall(np.flatnonzero(another))
        frames = np.empty_like(self.frames)
        frames[:, :-1] = self.frames[:, 1:]
        frames[starting, :-1] = 0  # as ALE's vector environment: frames older than the episode are black
        picture = self.cells[:, ::-1] if self.mirrored else self.cells
        frames[:, -1].reshape(self.num_envs, SIZE, CELL, -1)[:] = picture.view(np.uint8)[:, :, None]
        self.frames = frames
        self.over = landed & ~another
        won = (caught & ~another).astype(np.float64)
        infos = {"caught": self.caught.copy(), "balls": self.balls.copy()}
        infos |= {f"_{key}": np.ones(self.num_envs, bool) for key in infos}
        return frames, won, self.over.copy(), np.zeros(self.num_envs, bool), infos

    def _new_ball(self, i: int, start: int) -> None:
        """Put a ball in row 4 by a number uniform in 0..104: 5 sideways speeds x 21 columns."""
        self.ball_vx[i], self.ball_x[i], self.ball_y[i] = start // SIZE - 2, start % SIZE, START_ROW

    def _new_episode(self, i: int) -> None:
        position, start = divmod(int(self.rngs[i].integers(17 * 105)), 105)  # one draw for all three: a draw costs 5 us
        self.paddle[i] = 2 + position
        self._new_ball(i, start)
        self.caught[i] = self.balls[i] = self.cells[i] = 0
        if self.noisy:
            # A cell takes two bits of a random byte: the same distribution as integers(2, 6), at a tenth of its price.
            levels = self.background_levels[self.rngs[i].bit_generator.random_raw(57).view(np.uint8) & 3]  # 456
            self.cells[i] = levels[: SIZE * SIZE].reshape(SIZE, SIZE)
            # The rest of the paddle's row flickers: one level per step of the episode, the no-op of reset included.
            self.paddle_row_levels[i] = levels[SIZE * SIZE :][: PADDLE_ROW - START_ROW]

    def _fall(self, i: np.ndarray) -> None:
        """Move the balls of games `i` by one row and draw them and the paddles."""
        self.cells[i, self.ball_y[i], self.ball_x[i]] = 0
        x, y, vx = self.ball_x[i] + self.ball_vx[i], self.ball_y[i] + 1, self.ball_vx[i]
        bounced = np.where(x >= SIZE, 2 * (SIZE - 1) - x, np.abs(x))
        self.ball_x[i], self.ball_y[i], self.ball_vx[i] = bounced, y, np.where(bounced == x, vx, -vx)
        self.cells[i, y, bounced] = self.ink
        self.cells[i, PADDLE_ROW] = self.paddle_row_levels[i, y - START_ROW - 1, None]  # hides a missed ball
        self.cells[i[:, None], PADDLE_ROW, self.paddle[i, None] + self.paddle_cells] = self.ink

    def render(self):
        """What the network sees now, enlarged: of each game uint8 `(336, 336, 3)`."""
        return tuple(np.repeat(frame.repeat(4, 0).repeat(4, 1)[..., None], 3, 2) for frame in self.frames[:, -1])

    def get_action_meanings(self) -> list[str]:
        return ["LEFT", "RIGHT", "STAY"]


class CatchEnv(gym.Env):
    """A `CatchVectorEnv` with one game as an ordinary environment."""

    metadata = CatchVectorEnv.metadata
    get_action_meanings = CatchVectorEnv.get_action_meanings

    def __init__(self, render_mode: str | None = None, **variant):
        self.games, self.render_mode = CatchVectorEnv(1, render_mode, **variant), render_mode
        self.observation_space, self.action_space = self.games.single_observation_space, self.games.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.games.rngs = [self.np_random]
        return self.games.reset()[0][0].copy(), {"caught": 0, "balls": 0}

    def step(self, action: int):
        if self.games.over[0]:
            raise gym.error.ResetNeeded("the episode is over (or never began): call reset() before step()")
        observations, rewards, terminations, _, infos = self.games.step(np.array([action]))
        info = {key: int(infos[key][0]) for key in ("caught", "balls")}
        return observations[0].copy(), float(rewards[0]), bool(terminations[0]), False, info

    def render(self):
        return self.games.render()[0] if self.render_mode else None


for env_id, variant in VARIANTS.items():  # for gym.make("catch_env:Catch-v0") and gym.make_vec(..., num_envs=64)
    entries = {"entry_point": f"{__name__}:CatchEnv", "vector_entry_point": f"{__name__}:CatchVectorEnv"}
    gym.registry[env_id] = gym.envs.registration.EnvSpec(env_id, **entries, kwargs=variant)
    gym.registry[env_id].version = None  # five games, not five editions of one, of which four were out of date


if __name__ == "__main__":
    import sys
    import time
    from dataclasses import dataclass

    import tyro
    from PIL import Image

    @dataclass
    class Args:
        env_id: tuple[str, ...] = ("Catch-v0",)  # the games, one after the other: Catch-v0 to Catch-v4
        episodes: int = 3  # how many episodes of each, played as well as can be
        seed: int = 1  # of the games
        gif: str | None = None  # write an animated GIF to this file instead of playing in the terminal

    args = tyro.cli(Args, description="Show games of Catch, in the terminal or as a GIF.")
    if set(args.env_id) - set(VARIANTS) or args.episodes < 1 or args.seed < 0:
        sys.exit("catch_env.py: --env-id takes Catch-v0 to Catch-v4, --episodes at least 1, --seed at least 0")
    pictures, period = [], 2 * (SIZE - 1)  # with the walls unfolded, the ball moves on a circle of 40 columns
    for env_id in args.env_id:
        games, episode = gym.make_vec(env_id, num_envs=1), 1
        games.reset(seed=args.seed)
        while episode <= args.episodes:
            if args.gif:
                pictures.append(Image.fromarray(games.render()[0]))
            else:
                lines = ["".join(" o.:+#"[level // 51] for level in row) for row in games.frames[0, -1, ::4, ::4]]
                print("\033[H\033[2J" * sys.stdout.isatty() + "\n".join(lines))
                print(f"{env_id}, episode {episode}: caught {games.caught[0]} of {games.balls[0]}\n", flush=True)
                time.sleep(sys.stdout.isatty() / 6)
            column = (games.ball_x + games.ball_vx * (games.last_row - games.ball_y)) % period
            away = np.minimum(column, period - column) - games.paddle
            episode += int(games.over[0])
            games.step(np.where(np.abs(away) <= games.reach, STAY, np.where(away < 0, LEFT, RIGHT)))
    if args.gif:
        pictures[0].save(args.gif, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // 6, loop=0)
        print(f"{len(pictures)} frames of {', '.join(args.env_id)} in {args.gif}")
