"""Images per second of finetune_classify.py beside a bare torchvision loop, and what an epoch on features costs.

    python tests/benchmark_classify.py --arch mobilenet_v2 --image-size 96

In alternation: the script fine-tuning from files and from kept images; the usual loop (ImageFolder, DataLoader, SGD) on
the same files, and on one batch in memory; the script off-the-shelf beside a forward pass. Not collected by pytest.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from conftest import ROOT, only_run, scalars
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


@dataclass
class Args:
    arch: str = "resnet50"  # a classifier of torchvision
    image_size: int = 224  # side of the images in pixels
    images: int = 640  # number of images to train on, JPEGs of 256 pixels
    batch_size: int = 32  # images per update
    workers: int = 2  # processes that read images
    rounds: int = 3  # measurements of each


def script_rate(args: Args, folder: str, flags: str) -> float:
    """Images per second of training in the last of three epochs."""
    flags += f" --data-dir {folder} --arch {args.arch} --image-size {args.image_size} --weights none --epochs 3"
    flags += f" --batch-size {args.batch_size} --workers {args.workers}"
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, ROOT / "finetune_classify.py", *flags.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=cwd)
        return scalars(only_run(Path(cwd, "runs")))["charts/images_per_second"][-1][1]


def bare_rates(args: Args, folder: str) -> list[float]:
    """Images per second of training on files, of training on one batch, and of a forward pass on files."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = [v2.Resize(round(args.image_size * 256 / 224), antialias=True), v2.CenterCrop(args.image_size)]
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    data, on_cuda = ImageFolder(Path(folder, "train"), v2.Compose(steps)), device.type == "cuda"
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers, pin_memory=on_cuda)
    model = models.get_model(args.arch, weights=None, num_classes=10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True)

    def rate(batches, train: bool = True) -> float:
        begun, seen = time.perf_counter(), 0
        for images, labels in batches:
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda), torch.set_grad_enabled(train):
                loss = torch.nn.functional.cross_entropy(model(images), labels.to(device, non_blocking=True))
            if train:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seen += len(images)
        loss.item()
        return seen / (time.perf_counter() - begun)

    batch = [tensor.to(device) for tensor in next(iter(loader))]
    return [
        max(rate(loader) for _ in range(2)),
        max(rate([batch] * len(loader)) for _ in range(2)),
        rate(loader, False),
    ]


if __name__ == "__main__":
    args, rng, found = tyro.cli(Args), np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for split, n in (("train", args.images), ("val", 20), ("test", 20)):
            for i in range(n):
                path = Path(folder, split, str(i % 10), f"{i:05d}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((256, 256)).save(path)
        for _ in range(args.rounds):
            ours = [script_rate(args, folder, flags) for flags in ("--cache-gb 0", "", "--strategy off-the-shelf")]
            found.append(ours + bare_rates(args, folder))
    print(f"{args.arch}, {args.image_size} pixels, batch {args.batch_size}, median of {args.rounds} on {sys.platform}")
    names = [
        "script on files",
        "script, images kept",
        "script off-the-shelf",
        "bare on files",
        "bare on one batch",
        "pass",
    ]
    for name, rates in zip(names, zip(*found)):
        print(f"{name:24} {median(rates):10,.1f} images/s")
    for title, one, other in (("files", 0, 3), ("kept / one batch", 1, 4), ("pass / features", 5, 2)):
        print(f"ratio {title:18} {median(rates[one] / rates[other] for rates in found):10.3f}")
