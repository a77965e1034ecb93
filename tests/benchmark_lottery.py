"""Images per second of lottery_ticket.py's training loop, of the same loop fed by a DataLoader, and what masks cost.

    python tests/benchmark_lottery.py --archs mlp conv resnet20

In alternation, in one process: the script's loop (Images, learn); the same update fed by torchvision's usual pipeline
(Dataset, RandomCrop, DataLoader with two workers); the same update of one batch again and again, which no feeding can
exceed; batches only, without updates; updates of one batch with masks of 80 % sparsity and without masks (on a CPU in
CPU time). Prints a table of medians, and medians of the ratios within a round. Not collected by pytest.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    if (folder / "lottery_ticket.py").is_file():
        sys.path.insert(0, str(folder))
import lottery_ticket as lt  # noqa: E402


@dataclass
class Args:
    archs: list[str] = field(default_factory=lambda: ["mlp", "conv", "resnet20"])
    """networks to measure"""
    images: int = 2000
    """number of random images, of 32x32 pixels"""
    batch_size: int = 64
    """images per update"""
    workers: int = 2
    """processes of the DataLoader"""
    updates: int = 30
    """at most, in each measurement"""
    rounds: int = 5
    """measurements of each"""
    cuda: bool = True
    """measure on CUDA when there is a GPU"""


class Pictures(Dataset):
    """As torchvision's CIFAR-10: an image from an array, then its transforms."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, moments: tuple):
        self.images, self.labels = pixels.cpu().numpy(), labels.tolist()
        steps = [v2.RandomCrop(32, padding=4), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*steps, v2.Normalize(*((m / 255).tolist() for m in moments))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def main(args: Args) -> None:
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    amp = device.type == "cuda"
    n = args.images
    pixels = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8).to(device)
    labels, moments = (torch.arange(n) % 10).to(device), lt.pixel_statistics(pixels)
    feed = lt.Images(pixels, labels, moments, 32, 32, "crop")
    loader = DataLoader(
        Pictures(pixels, labels, moments), args.batch_size, shuffle=True, num_workers=args.workers, pin_memory=amp,
        persistent_workers=True,
    )  # fmt: skip

    def on_device():
        plan = feed.plan_epoch(1, 0)
        for start in range(0, n, args.batch_size):
            yield feed.batch(slice(start, start + args.batch_size), *plan)

    def from_loader():
        for images, labels in loader:
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            yield images, labels.to(device, non_blocking=True)

    def rate(batches, update) -> float:
        """Images per second, the first batch, for which workers start, left out."""
        batches, done = iter(batches), 0
        update(*next(batches))
        begun = time.perf_counter()
        for images, labels in batches:
            update(images, labels)
            done += len(images)
            if done >= args.updates * args.batch_size:
                break
        return done / (time.perf_counter() - begun)

    names = ["script", "loader", "ratio", "its bound", "batches, script", "batches, loader", "dense, ms", "masked, ms"]
    names += ["masked / dense", "script / no feeding"]
    print(f"on {device}, batch {args.batch_size}, {args.workers} workers, {torch.get_num_threads()} threads, median of "
          f"{args.rounds}\n\n| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")  # fmt: skip
    for arch in args.archs:
        found = {name: [] for name in names}
        networks = {kind: lt.make_network(arch, 10, 32, lt.random_stream(0)).to(device) for kind in ("dense", "masked")}
        optimizers = {kind: lt.make_optimizer(lt.Args(learning_rate=1e-3), net) for kind, net in networks.items()}
        weights = lt.prunable(networks["masked"])
        whole = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        masks = lt.prune({name: w.detach() for name, w in weights.items()}, whole, "global", 0.8)
        lt.apply_masks(networks["masked"], masks)
        factors = [torch.empty_like(weights[name]).copy_(masks[name]) for name in weights]
        sparse = {"dense": None, "masked": (list(weights.values()), factors)}

        def update(images, labels, kind="dense"):
            return lt.learn(networks[kind], optimizers[kind], sparse[kind], images, labels, amp)

        fixed = next(on_device())
        for _ in range(args.rounds):
            one, other = rate(on_device(), update), rate(from_loader(), update)
            found["script"].append(one)
            found["loader"].append(other)
            found["ratio"].append(one / other)
            bound = rate(repeat(fixed), update)
            found["its bound"].append(bound / other)
            found["script / no feeding"].append(one / bound)
            found["batches, script"].append(rate(on_device(), lambda *_: None))
            found["batches, loader"].append(rate(from_loader(), lambda *_: None))
            times = {"dense": [], "masked": []}
            clock = time.perf_counter if amp else time.process_time
            for _ in range(args.updates):  # in turns, since other work on the machine comes and goes
                for kind in times:
                    begun = clock()
                    update(*fixed, kind).item()
                    times[kind].append(1000 * (clock() - begun))
            dense, masked = (statistics.median(times[kind]) for kind in ("dense", "masked"))
            found["dense, ms"].append(dense)
            found["masked, ms"].append(masked)
            found["masked / dense"].append(masked / dense)
        cells = [f"{statistics.median(found[name]):,.{0 if i in (0, 1, 4, 5) else 3}f}" for i, name in enumerate(names)]
        print(f"| {arch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
