"""Images per second of finetune_classify.py and of a bare torchvision loop, and what an epoch on features costs.

    python tests/benchmark_classify.py --arch mobilenet_v2 --image-size 96

In alternation: the script fine-tuning, reading its files in every epoch and with decoded images kept; the usual loop
(ImageFolder, DataLoader, model, SGD) on the same images with the same batches, workers, precision and memory format;
that loop on one batch that lies on the device already. Then the script off-the-shelf. Prints a table of medians and
ratios. Not collected by pytest.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    arch: str = "resnet50"
    """a classifier of torchvision"""
    image_size: int = 224
    """side of the images in pixels"""
    images: int = 640
    """number of images to train on"""
    source_size: int = 256
    """side of the JPEG files in pixels"""
    batch_size: int = 32
    """images per update"""
    workers: int = 2
    """processes that read images"""
    rounds: int = 3
    """measurements of each"""
    cuda: bool = True
    """measure on CUDA when there is a GPU"""
    bare: str = ""
    """internal: the folder of images for the bare loop"""


def make_images(folder: Path, args: Args) -> None:
    """Smooth noise as JPEGs in ten folders each of train/, val/ and test/."""
    rng = np.random.default_rng(0)
    for split, n in (("train", args.images), ("val", 20), ("test", 20)):
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 256, size=(12, 12, 3), dtype=np.uint8))
            path = folder / split / str(i % 10) / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small.resize((args.source_size,) * 2, Image.Resampling.BICUBIC).save(path)


def script_rate(args: Args, folder: Path, flags: str, cwd: str) -> float:
    """Images per second in the last epoch of three."""
    flags += f" --data-dir {folder} --arch {args.arch} --image-size {args.image_size} --weights none --epochs 3"
    flags += f" --batch-size {args.batch_size} --workers {args.workers}" + ("" if args.cuda else " --no-cuda")
    flags += f" --exp-name bench-{time.time_ns()}"
    command = [sys.executable, ROOT / "finetune_classify.py", *flags.split(), "--logdir", cwd]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=cwd)
    newest = max(Path(cwd).glob("*__bench-*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(newest))
    events.Reload()
    return events.Scalars("charts/images_per_second")[-1].value


def bare_rates(args: Args) -> None:
    """Print the images per second of training on files, of training on one batch, and of inference on files."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [v2.Resize(round(args.image_size * 256 / 224), antialias=True), v2.CenterCrop(args.image_size)]
    transform = v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalise])
    data = ImageFolder(Path(args.bare, "train"), transform)
    more = {"num_workers": args.workers, "persistent_workers": args.workers > 0, "pin_memory": device.type == "cuda"}
    loader = DataLoader(data, args.batch_size, shuffle=True, **more)
    model = models.get_model(args.arch, weights=None, num_classes=10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True)

    def epoch(batches, train: bool = True) -> float:
        begun, seen = time.perf_counter(), 0
        for images, labels in batches:
            seen += len(images)
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(images)
            if train:
                loss = nn.functional.cross_entropy(logits.float(), labels.to(device, non_blocking=True))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        logits.sum().item()
        return seen / (time.perf_counter() - begun)

    on_files = [epoch(loader) for _ in range(3)][-1]
    batch = [tensor.to(device) for tensor in next(iter(loader))]
    on_device = [epoch([batch] * len(loader)) for _ in range(2)][-1]
    model.eval()
    with torch.no_grad():
        inference = [epoch(loader, train=False) for _ in range(2)][-1]
    print(on_files, on_device, inference)


def main(args: Args) -> None:
    if args.bare:
        return bare_rates(args)
    rates = {name: [] for name in ("script", "cached", "files", "device", "inference", "features")}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cwd:
        make_images(Path(folder), args)
        for _ in range(args.rounds):
            rates["script"].append(script_rate(args, Path(folder), "--cache-gb 0", cwd))
            rates["cached"].append(script_rate(args, Path(folder), "--cache-gb 99", cwd))
            command = [sys.executable, __file__, *sys.argv[1:], "--bare", folder]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            for name, rate in zip(("files", "device", "inference"), found):
                rates[name].append(float(rate))
            rates["features"].append(script_rate(args, Path(folder), "--strategy off-the-shelf", cwd))

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other]))

    def row(what: str, name: str, compared: str = "") -> None:
        print(f"| {what} | {statistics.median(rates[name]):,.1f} | {compared} |")

    on = "CUDA" if args.cuda and torch.cuda.is_available() else "CPU"
    title = f"{args.arch}, {args.image_size} pixels, batch {args.batch_size}, on {on}, median of {args.rounds}"
    print(f"\n| {title} | images/s | |\n|---|---|---|")
    row("`finetune_classify.py --strategy fine-tune --cache-gb 0`", "script")
    row("the same with decoded images kept", "cached", f"cached / bare on one batch {ratio('cached', 'device'):.3f}")
    row("bare loop on the same files", "files", f"script / bare {ratio('script', 'files'):.3f}")
    row("bare loop on one batch in memory", "device", f"script / bare {ratio('script', 'device'):.3f}")
    row("`--strategy off-the-shelf`, from the second epoch on", "features")
    row("forward pass on the same files", "inference", f"epoch / pass {100 * ratio('inference', 'features'):.2f} %")


if __name__ == "__main__":
    main(tyro.cli(Args))
