"""Keep of a run what --pretrained and --evaluate need, as float16: an eighth of its checkpoint (DQV: a seventh).

python results/atari/make_weights.py runs/NAME results/atari/pong_dqn.pt
"""

import sys
from pathlib import Path

import torch

if len(sys.argv) != 3:
    sys.exit(__doc__)
(path,) = Path(sys.argv[1]).glob("*.pt")
checkpoint = torch.load(path, map_location="cpu", weights_only=True)
names = ("algorithm", "args", "action_meanings", "transfers", "global_step", "updates")
kept = {name: checkpoint[name] for name in names}
for key in ("q_network", "v_network"):
    if key in checkpoint:
        kept[key] = {name: tensor.half() for name, tensor in checkpoint[key].items()}
torch.save(kept, sys.argv[2])
