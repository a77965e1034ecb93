"""A game that a Q-network learns in seconds: a bar stands in one of three columns, the action that names it earns 1.

Episodes last 5 steps and end by termination; those of `ToyTruncated-v0` are cut at 7 steps instead. The stacks
of `ToyRepeated-v0` do not begin with black frames. In `ToyLives-v0` a life is lost at step 3, and rewards are 5 and -5.
Actions of `ToyFromOne-v0` are 1, 2 and 3.
"""

import gymnasium as gym
import numpy as np


class ToyEnv(gym.Env):
    def __init__(self, length=5, before=0, lives=False, start=0):
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.action_space = gym.spaces.Discrete(3, start=start)
        self.length, self.before, self.lives = length, before, lives

    def _see(self):
        self.bar = int(self.np_random.integers(3))
        frame = np.zeros((84, 84), np.uint8)
        frame[:, 28 * self.bar : 28 * (self.bar + 1)] = 255
        self.stack = np.concatenate([self.stack[1:], frame[None]])
        return self.stack.copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.stack, self.steps = np.full((4, 84, 84), self.before, np.uint8), 0
        return self._see(), {"lives": 3} if self.lives else {}

    def step(self, action):
        reward, self.steps = float(action == self.bar), self.steps + 1
        info = {"lives": 3 - (self.steps >= 3)} if self.lives else {}
        return self._see(), 10 * reward - 5 if self.lives else reward, self.steps == self.length, False, info


gym.register("Toy-v0", ToyEnv)
gym.register("ToyTruncated-v0", ToyEnv, max_episode_steps=7, kwargs={"length": 100})
gym.register("ToyRepeated-v0", ToyEnv, kwargs={"before": 9})
gym.register("ToyLives-v0", ToyEnv, kwargs={"lives": True})
gym.register("ToyFromOne-v0", ToyEnv, kwargs={"start": 1})
