"""Images per second of lottery_ticket.py's training loop, and of the same update without feeding.

    python tests/benchmark_lottery.py --archs mlp conv resnet18

In turns, in one process: the script's loop (Images, learn) and the same update of one batch again and again, which no
feeding can exceed, with masks of 80 % sparsity. Prints medians of the rounds. Not collected by pytest.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lottery_ticket as lt


@dataclass
class Args:
    archs: list[str] = field(default_factory=lambda: ["mlp", "conv"])  # networks to measure
    images: int = 2000  # number of random images, of 32x32 pixels
    batch_size: int = 64  # images per update
    updates: int = 30  # in each measurement, at most an epoch
    rounds: int = 5  # measurements of each
    cuda: bool = True  # measure on CUDA when there is a GPU


def main(args: Args) -> None:
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    pixels = torch.randint(0, 256, (args.images, 32, 32, 3), dtype=torch.uint8).to(device)
    labels = (torch.arange(args.images) % 10).to(device)
    images = lt.Images(pixels, labels, lt.pixel_statistics(pixels), 32, 32, "crop")

    def from_script():
        plan = images.plan_epoch(1, 0)
        for start in range(0, args.images - args.batch_size + 1, args.batch_size):
            yield images.batch(slice(start, start + args.batch_size), *plan)

    def rate(batches, update) -> float:
        """Images per second."""
        begun, done = time.perf_counter(), 0
        for batch in islice(batches, args.updates):
            loss = update(*batch)
            done += args.batch_size
        loss.item()
        return done / (time.perf_counter() - begun)

    print(f"on {device}, batch {args.batch_size}, {torch.get_num_threads()} threads, median of {args.rounds}\n")
    print("| | script, images/s | no feeding, images/s | script / no feeding |\n|---|---|---|---|")
    for arch in args.archs:
        network = lt.make_network(arch, 10, 32, lt.random_stream(0), device=device)
        optimizer = lt.make_optimizer(lt.Args(learning_rate=1e-3), network)
        weights = lt.prunable(network)
        sparse = list(weights.values()), [(torch.rand_like(weight) < 0.2).float() for weight in weights.values()]

        def update(*batch):
            return lt.learn(network, optimizer, sparse, *batch, device.type == "cuda")

        fixed = next(from_script())
        update(*fixed).item()
        rows = []
        for _ in range(args.rounds):
            script, bound = rate(from_script(), update), rate(repeat(fixed), update)
            rows.append((script, bound, script / bound))
        script, bound, ratio = map(statistics.median, zip(*rows))
        print(f"| {arch} | {script:,.0f} | {bound:,.0f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
