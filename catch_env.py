# The Catch games of "On the Transferability of Deep-Q Networks" (Sabatelli and Geurts, arXiv 2110.02639; thesis ch. 8)
# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.1", "numpy>=1.26", "tyro>=0.9.2", "pillow>=10"]
# ///
"""Catch: five small games of one family, to study in minutes on a laptop whether a Deep-Q network transfers.

A ball falls down a grid of 21x21 cells and bounces off the side walls; a paddle in row 16 has to be under it. The
dynamics are those of the authors' code (paintception/upside_down_rl, experiment_2). Names as in the thesis:

| id       | what changes                                                                      | random | optimal |
|----------|-----------------------------------------------------------------------------------|--------|---------|
| Catch-v0 | paddle of 5 cells, ball and paddle white on black                                 | 0.247  | 0.973   |
| Catch-v1 | paddle of 2 cells (authors' code and transfer table: "v4"), one decision fewer    | 0.148  | 0.898   |
| Catch-v2 | random background, drawn anew each episode; the ball leaves a dark trail          | 0.247  | 0.973   |
| Catch-v3 | the picture is mirrored top to bottom: the ball rises                             | 0.247  | 0.973   |
| Catch-v4 | five balls in a row: a miss ends the episode with reward 0, the fifth catch with 1 | 0.001  | 0.880   |

The last two columns are mean rewards per episode. Optimal play misses balls because the paddle moves in steps of two
cells, so half of the starting positions can never reach one of the border columns (enumerated in the tests).

Importing this file registers the games: `gym.make("catch_env:Catch-v0")` and, natively vectorised,
`gym.make_vec("catch_env:Catch-v0", num_envs=64)`. `python catch_env.py --env-id Catch-v2` shows one.
"""

from typing import Any, Optional

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

SIZE = 21  # cells per side
CELL = 4  # pixels per cell: 84x84, the size of the Atari networks' input
PADDLE_ROW = 16
START_ROW = 4
STACK = 4  # frames per observation
LEFT, RIGHT, STAY = range(3)

VARIANTS: dict[str, dict[str, Any]] = {
    "Catch-v0": {},
    "Catch-v1": {"small_paddle": True},
    "Catch-v2": {"random_background": True},
    "Catch-v3": {"mirrored": True},
    "Catch-v4": {"balls_to_win": 5},
}


class Games:
    """`num_envs` games of Catch as arrays; `CatchEnv` and `CatchVectorEnv` are both thin shells around it.

    Row i only ever draws from the i-th generator it is given, so a game does not depend on its neighbours.
    """

    def __init__(
        self,
        num_envs: int,
        small_paddle: bool = False,
        random_background: bool = False,
        mirrored: bool = False,
        balls_to_win: int = 1,
    ):
        self.num_envs, self.balls_to_win = num_envs, balls_to_win
        # Columns relative to the paddle's position: drawn, and those in which a ball counts as caught.
        self.paddle = np.arange(-1, 1) if small_paddle else np.arange(-2, 3)
        self.reach = 1 if small_paddle else 2
        self.last_row = PADDLE_ROW - 1 if small_paddle else PADDLE_ROW
        # Grey levels 0..255 stand for the values 0..5 that the authors' min-max resize spread over a byte.
        # A cell is 4 equal pixels wide: one uint32 holds a cell's pixel row, which makes drawing four times cheaper.
        self.random_background = random_background
        self.background_levels = np.array([102, 153, 204, 255], np.uint32) * 0x01010101
        self.ink = (51 if random_background else 255) * 0x01010101
        self.picture = np.zeros((num_envs, SIZE, SIZE), np.uint32)
        self.cells = self.picture[:, ::-1] if mirrored else self.picture  # row 0 at the top, whatever is shown
        self.paddle_row_levels = np.zeros((num_envs, PADDLE_ROW - START_ROW), np.uint32)
        # The last four frames, oldest first; a list of planes, because shifting one array costs more than all the rest.
        self.planes = [np.zeros((num_envs, SIZE * CELL, SIZE * CELL), np.uint8) for _ in range(STACK)]
        self.p, self.x, self.y, self.vx = np.zeros((4, num_envs), np.int64)
        self.caught, self.balls = np.zeros((2, num_envs), np.int64)

    def _new_ball(self, i: int, start: int) -> None:
        """Put a ball in row 4 by a number uniform in 0..104: 5 sideways speeds x 21 columns."""
        self.vx[i], self.x[i] = start // SIZE - 2, start % SIZE
        self.y[i] = START_ROW

    def _new_episode(self, i: int, rng: np.random.Generator) -> None:
        position, start = divmod(int(rng.integers(17 * 105)), 105)  # one draw for all three: a draw costs 5 us
        self.p[i] = 2 + position
        self._new_ball(i, start)
        self.caught[i] = self.balls[i] = 0
        self.cells[i] = 0
        if self.random_background:
            # A cell takes two bits of a random byte: the same distribution as integers(2, 6), at a tenth of its price.
            count = SIZE * SIZE + PADDLE_ROW - START_ROW
            random_bytes = rng.bit_generator.random_raw(count // 8 + 1).view(np.uint8)[:count]
            levels = self.background_levels[random_bytes & 3]
            self.cells[i] = levels[: SIZE * SIZE].reshape(SIZE, SIZE)
            # The rest of the paddle's row flickers: one level per step of the episode, the no-op of reset included.
            self.paddle_row_levels[i] = levels[SIZE * SIZE :]

    def _fall(self, mask: np.ndarray) -> None:
        """Move the balls of the games in `mask` by one row and draw their grids."""
        i = np.flatnonzero(mask)
        if not len(i):
            return
        x, y, vx = self.x[i], self.y[i], self.vx[i]
        self.cells[i, y, x] = 0
        x, y = x + vx, y + 1
        bounced = (x < 0) | (x >= SIZE)
        x = np.where(x >= SIZE, 2 * (SIZE - 1) - x, np.abs(x))
        self.x[i], self.y[i], self.vx[i] = x, y, np.where(bounced, -vx, vx)
        self.cells[i, y, x] = self.ink
        self.cells[i, PADDLE_ROW] = self.paddle_row_levels[i, y - START_ROW - 1, None]  # hides a missed ball
        self.cells[i[:, None], PADDLE_ROW, self.p[i, None] + self.paddle] = self.ink

    def observations(self) -> np.ndarray:
        """A fresh uint8 `(num_envs, 4, 84, 84)` with the last four frames of every game, oldest first."""
        return np.stack(self.planes, axis=1)

    def advance(
        self, actions: np.ndarray, starting: np.ndarray, rngs: list[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Start an episode where `starting` is true and take one step in every other game.

        `actions` int `(num_envs,)`, `starting` bool `(num_envs,)`. Returns rewards float64 and terminations bool,
        both `(num_envs,)`. A start includes the no-op with which the authors' `reset` ends.
        """
        playing = ~starting
        self.p[playing & (actions == LEFT) & (self.p > 3)] -= 2
        self.p[playing & (actions == RIGHT) & (self.p < 17)] += 2
        self._fall(playing)
        landed = playing & (self.y == self.last_row)
        caught = landed & (np.abs(self.x - self.p) <= self.reach)
        self.balls += landed
        self.caught += caught
        again = caught & (self.caught < self.balls_to_win)
        for i in np.flatnonzero(again):
            self._new_ball(i, int(rngs[i].integers(105)))
        for i in np.flatnonzero(starting):
            self._new_episode(i, rngs[i])
        self._fall(again | starting)
        self.planes = [*self.planes[1:], np.repeat(self.picture, CELL, axis=1).view(np.uint8)]
        for plane in self.planes[:-1]:
            plane[starting] = 0  # as ALE's vector environment: planes older than the episode are black
        return (caught & ~again).astype(np.float64), landed & ~again

    def image(self, i: int) -> np.ndarray:
        """Game i as the network sees it now, enlarged: uint8 `(336, 336, 3)`."""
        return np.ascontiguousarray(np.repeat(self.planes[-1][i].repeat(4, 0).repeat(4, 1)[..., None], 3, axis=2))

    def text(self, i: int) -> str:
        """Game i as 21 lines of 21 characters: o ball, = paddle, darker to lighter " .:+#"."""
        grid = np.array(list(" .:+#"))[np.maximum((self.cells[i] & 255).astype(int) // 51 - 1, 0)]
        if not self.random_background:
            grid[:] = "."
        if self.y[i] != PADDLE_ROW:
            grid[self.y[i], self.x[i]] = "o"
        grid[PADDLE_ROW, self.p[i] + self.paddle] = "="
        return "\n".join("".join(row) for row in (grid if self.cells is self.picture else grid[::-1]))


class CatchEnv(gym.Env):
    """
    ## Description
    Catch a falling ball with a paddle; the module's docstring lists the five variants. Dynamics: arXiv 2110.02639.

    ## Action Space
    `Discrete(3)`: 0 left, 1 right (two cells each, within the walls), 2 stay.

    ## Observation Space
    `Box(0, 255, (4, 84, 84), uint8)`: the last four frames, oldest first, 4x4 pixels a cell. Background 0, ball and
    paddle 255; on Catch-v2 background 102 to 255, ball and paddle 51, trail 0.

    ## Starting State
    Paddle centre uniform in 2..18, ball in row 4 at a uniform column with a sideways speed uniform in -2..2; then one
    step passes. Only the newest plane of the first observation shows it, the older three are zero.

    ## Rewards
    1 on the step that catches the (on Catch-v4: fifth) ball, else 0.

    ## Episode End
    Terminates when the ball reaches the paddle (11 decisions; 10 on Catch-v1). On Catch-v4 a caught ball is replaced
    by a new one, up to the fifth; each one starts like the first, the paddle stays where it is. Never truncates.

    ## Information
    `caught` and `balls`: number of balls caught, and of balls that came down, in this episode so far.

    ## Arguments
    `small_paddle`, `random_background`, `mirrored` (bool), `balls_to_win` (int): the registered ids set them.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 6}

    def __init__(self, render_mode: Optional[str] = None, **variant: Any):
        self.observation_space = gym.spaces.Box(0, 255, (STACK, SIZE * CELL, SIZE * CELL), np.uint8)
        self.action_space = gym.spaces.Discrete(3)
        self.render_mode = render_mode
        self.games = Games(1, **variant)
        self.over = True

    def _advance(self, action: int, starting: bool) -> tuple[float, bool, dict[str, int]]:
        rewards, terminations = self.games.advance(np.array([action]), np.array([starting]), [self.np_random])
        self.over = bool(terminations[0])
        return float(rewards[0]), self.over, {"caught": int(self.games.caught[0]), "balls": int(self.games.balls[0])}

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        _, _, info = self._advance(STAY, starting=True)
        return self.games.observations()[0], info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.over:
            raise gym.error.ResetNeeded("the episode is over (or never began): call reset() before step()")
        if not self.action_space.contains(action):
            raise gym.error.InvalidAction(f"{action!r} is not an action of Catch: 0 left, 1 right, 2 stay")
        reward, terminated, info = self._advance(action, starting=False)
        return self.games.observations()[0], reward, terminated, False, info

    def render(self):
        return {"rgb_array": self.games.image, "ansi": self.games.text, None: lambda i: None}[self.render_mode](0)

    def get_action_meanings(self) -> list[str]:
        return ["LEFT", "RIGHT", "STAY"]


class CatchVectorEnv(VectorEnv):
    """`num_envs` games of Catch in one set of arrays, with the spaces, rewards and `info` keys of `CatchEnv`.

    Next-step autoreset, Gymnasium's default: the call after a termination ignores that game's action and returns the
    first observation of its next episode with reward 0. `reset(seed=s)` seeds game i with s + i, and game i then plays
    exactly as `CatchEnv` does after `reset(seed=s + i)`. Observations are fresh copies, uint8 `(num_envs, 4, 84, 84)`.
    """

    metadata = {**CatchEnv.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int = 1, render_mode: Optional[str] = None, **variant: Any):
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = gym.spaces.Box(0, 255, (STACK, SIZE * CELL, SIZE * CELL), np.uint8)
        self.single_action_space = gym.spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.games = Games(num_envs, **variant)
        self.rngs: list[np.random.Generator] = []
        self.over: Optional[np.ndarray] = None

    def _info(self) -> dict[str, np.ndarray]:
        everywhere = np.ones(self.num_envs, bool)
        counts = {"caught": self.games.caught.copy(), "balls": self.games.balls.copy()}
        return {**counts, **{f"_{key}": everywhere.copy() for key in counts}}

    def reset(self, *, seed: "int | list[int | None] | None" = None, options: Optional[dict] = None):
        if seed is not None or not self.rngs:
            seeds = (
                [None if seed is None else seed + i for i in range(self.num_envs)] if not np.iterable(seed) else seed
            )
            if len(seeds) != self.num_envs:
                raise gym.error.Error(f"reset() got {len(seeds)} seeds for {self.num_envs} environments")
            self.rngs = [gym.utils.seeding.np_random(s)[0] for s in seeds]
        self.over = np.zeros(self.num_envs, bool)
        self.games.advance(np.full(self.num_envs, STAY), ~self.over, self.rngs)
        return self.games.observations(), self._info()

    def step(self, actions: np.ndarray):
        if self.over is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or ((actions < 0) | (actions > 2)).any():
            raise gym.error.InvalidAction(f"expected {self.num_envs} actions in 0..2, got {actions!r}")
        rewards, self.over = self.games.advance(actions, self.over, self.rngs)
        return self.games.observations(), rewards, self.over.copy(), np.zeros(self.num_envs, bool), self._info()

    def render(self):
        shown = {"rgb_array": self.games.image, "ansi": self.games.text, None: lambda i: None}[self.render_mode]
        return None if self.render_mode is None else tuple(shown(i) for i in range(self.num_envs))

    def get_action_meanings(self) -> list[str]:
        return ["LEFT", "RIGHT", "STAY"]


for env_id, variant in VARIANTS.items():
    gym.register(
        id=env_id,
        entry_point=f"{__name__}:CatchEnv",
        vector_entry_point=f"{__name__}:CatchVectorEnv",
        kwargs=variant,
    )
for env_id in VARIANTS:
    # The suffix numbers five games, not five editions of one: without this, Gymnasium calls v0 to v3 out of date.
    gym.registry[env_id].version = None


def landing_column(x: int, y: int, vx: int, last_row: int) -> int:
    """Column in which a ball at column x, row y with sideways speed vx (cells per step) reaches `last_row`."""
    x = (x + vx * (last_row - y)) % (2 * (SIZE - 1))  # unfold the walls: motion on a circle of 40 columns
    return min(x, 2 * (SIZE - 1) - x)


if __name__ == "__main__":
    import sys
    import time
    from dataclasses import dataclass
    from typing import Literal

    import tyro

    @dataclass
    class Args:
        env_id: str = "Catch-v0"
        """which game: Catch-v0 to Catch-v4"""
        episodes: int = 3
        """how many episodes to play"""
        policy: Literal["optimal", "random"] = "optimal"
        """who plays: a script that knows where the ball will land, or chance"""
        seed: int = 1
        """seed of the games and of the random policy"""
        fps: float = 6.0
        """frames per second, in the terminal and in the GIF"""
        gif: Optional[str] = None
        """write an animated GIF to this file (needs Pillow) instead of playing in the terminal"""

    args = tyro.cli(Args)
    if args.env_id not in VARIANTS:
        sys.exit(f"catch_env.py: no game {args.env_id!r}, choose one of {', '.join(VARIANTS)}")
    if args.fps <= 0:
        sys.exit("catch_env.py: --fps must be positive")
    env = gym.make(args.env_id, render_mode="rgb_array" if args.gif else "ansi")
    games, rng, frames = env.unwrapped.games, np.random.default_rng(args.seed), []

    def show(status: str) -> None:
        if args.gif:
            frames.append(env.render())
            return
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        print(f"{env.render()}\n{args.env_id} {status}\n", flush=True)
        time.sleep(1 / args.fps if sys.stdout.isatty() else 0)

    for episode in range(args.episodes):
        env.reset(seed=args.seed if episode == 0 else None)
        over, info = False, {"caught": 0, "balls": 0}
        while not over:
            show(f"episode {episode + 1}/{args.episodes}")
            away = landing_column(games.x[0], games.y[0], games.vx[0], games.last_row) - games.p[0]
            action = STAY if abs(away) <= games.reach else LEFT if away < 0 else RIGHT
            _, reward, over, _, info = env.step(int(rng.integers(3)) if args.policy == "random" else action)
        show(f"episode {episode + 1}/{args.episodes}: caught {info['caught']} of {info['balls']}, reward {reward:g}")
    if args.gif:
        from PIL import Image

        first, *rest = (Image.fromarray(frame).convert("P") for frame in frames)
        first.save(args.gif, save_all=True, append_images=rest, duration=round(1000 / args.fps), loop=0)
        print(f"saved {len(frames)} frames of {args.env_id} to {args.gif}")
