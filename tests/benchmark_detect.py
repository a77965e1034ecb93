"""Seconds per update of finetune_detect.py, and of torchvision's detector in the shortest loop there is.

    python tests/benchmark_detect.py --arch ssdlite320_mobilenet_v3_large

In alternation: the script, its waiting for data apart; the same model on the same images, which lie on the device
already (on CUDA all of it in bfloat16, where the script computes anchors, boxes and heads in float32). Prints the medians and their ratio. Then the step of both alone, in turns in one process: what the script adds
to a step, without the reading of images beside it (on a CPU in CPU time). Not collected by pytest.
"""

import json
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
from torchvision import models
from torchvision.transforms.v2 import functional

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    arch: str = "fasterrcnn_resnet50_fpn_v2"
    """a detector of torchvision"""
    images: int = 64
    """number of images"""
    side: int = 320
    """of the images in pixels"""
    batch_size: int = 4
    """images per update"""
    workers: int = 1
    """processes that read images for the script"""
    rounds: int = 3
    """measurements of each"""
    cuda: bool = True
    """measure on CUDA when there is a GPU"""
    bare: str = ""
    """internal: the folder of images for the bare loop"""


def make_images(folder: Path, args: Args) -> None:
    """Smooth noise with three boxes an image."""
    rng, data = np.random.default_rng(0), {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    for i in range(args.images):
        small = Image.fromarray(rng.integers(0, 256, size=(12, 12, 3), dtype=np.uint8))
        small.resize((args.side,) * 2, Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg")
        data["images"].append({"id": i, "file_name": f"{i:04d}.jpg", "width": args.side, "height": args.side})
        for _ in range(3):
            x, y, w, h = (rng.random(4) * args.side / 2).round() + [0, 0, 8, 8]
            entry = {"id": len(data["annotations"]) + 1, "image_id": i, "category_id": 1, "bbox": [x, y, w, h]}
            data["annotations"].append(entry)
    (folder / "boxes.json").write_text(json.dumps(data))


def script_seconds(args: Args, folder: Path) -> tuple[float, float]:
    """Seconds per update, and of waiting for data per update, in the second epoch of two."""
    files = f"--annotations {folder}/boxes.json --val-annotations {folder}/val.json"
    flags = (
        f"--data-dir {folder} {files} --arch {args.arch} --strategy scratch --epochs 2 --augmentation none --skip-bad"
    )
    flags += f" --batch-size {args.batch_size} --workers {args.workers} --learning-rate 1e-5"
    flags += "" if args.cuda else " --no-cuda"
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, ROOT / "finetune_detect.py", *flags.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=cwd)
        (run,) = Path(cwd, "runs").iterdir()
        events = EventAccumulator(str(run))
        events.Reload()
        names = ("charts/seconds_per_update", "charts/seconds_waiting_for_data")
        return tuple(events.Scalars(name)[-1].value for name in names)


def bare_seconds(args: Args) -> None:
    """Print the seconds per update of the model alone, in the second of two passes."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    data, images, targets = json.loads(Path(args.bare, "boxes.json").read_text()), [], []
    for entry in data["images"]:
        image = functional.pil_to_tensor(Image.open(Path(args.bare, entry["file_name"]))).to(device)
        boxes = torch.tensor([row["bbox"] for row in data["annotations"] if row["image_id"] == entry["id"]])
        boxes[:, 2:] += boxes[:, :2]
        images.append(image.float() / 255)
        targets.append({"boxes": boxes.to(device), "labels": torch.ones(len(boxes), dtype=torch.int64, device=device)})
    model = models.get_model(args.arch, weights=None, weights_backbone=None, num_classes=2)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        begun, starts = time.perf_counter(), range(0, len(images), args.batch_size)
        for i in starts:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses = model(images[i : i + args.batch_size], targets[i : i + args.batch_size])
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()
        seconds = (time.perf_counter() - begun) / len(starts)
    print(seconds)


def step_ratio(args: Args, folder: Path, steps: int = 24) -> float:
    """Median over steps in turns of the script's time for a step, its conversion of images included, over the bare."""
    sys.path.insert(0, str(ROOT))
    import finetune_detect as fd

    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    amp, flags = device.type == "cuda", fd.Args(arch=args.arch, strategy="scratch", weights="none", learning_rate=1e-5)
    ours = fd.make_detector(flags, 2)
    fd.freeze(ours, [], flags)
    if amp:
        fd.autocast_backbone(ours, "cuda")
    bare = models.get_model(args.arch, weights=None, weights_backbone=None, num_classes=2)
    ours, bare = (model.to(device, memory_format=torch.channels_last).train() for model in (ours, bare))
    optimizers = {ours: fd.make_optimizer(flags, ours)}
    optimizers[bare] = torch.optim.SGD(bare.parameters(), 1e-5, momentum=0.9, weight_decay=1e-4)
    images = [functional.pil_to_tensor(Image.open(path)) for path in sorted(folder.glob("*.jpg"))[: args.batch_size]]
    target = {"boxes": torch.tensor([[20.0, 20.0, 120.0, 150.0]]), "labels": torch.ones(1, dtype=torch.int64)}
    there, sums, times = fd.to_device(images, [target] * len(images), device), {}, {ours: [], bare: []}
    for _ in range(steps):
        for model in times:
            begun = time.perf_counter() if amp else time.process_time()
            batch = fd.to_device(images, [target] * len(images), device) if model is ours else there
            with torch.autocast(device.type, torch.bfloat16, enabled=amp and model is bare):
                losses = model(*batch)
            losses["loss"] = torch.stack([value.float() for value in losses.values()]).sum()
            optimizers[model].zero_grad()
            losses["loss"].backward()
            optimizers[model].step()
            for name, value in losses.items() if model is ours else ():
                sums[name] = sums.get(name, 0.0) + value.detach()
            if amp:
                torch.cuda.synchronize()
            times[model].append((time.perf_counter() if amp else time.process_time()) - begun)
    return statistics.median(a / b for a, b in list(zip(times[ours], times[bare]))[4:])


def main(args: Args) -> None:
    if args.bare:
        return bare_seconds(args)
    script, waiting, bare = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), args)
        data = json.loads(Path(folder, "boxes.json").read_text())
        data["images"], data["annotations"] = data["images"][:2], data["annotations"][:6]
        Path(folder, "val.json").write_text(json.dumps(data))
        for _ in range(args.rounds):
            seconds, waited = script_seconds(args, Path(folder))
            script.append(seconds)
            waiting.append(waited)
            command = [sys.executable, __file__, *sys.argv[1:], "--bare", folder]
            bare.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        alone = step_ratio(args, Path(folder))
    on = "CUDA" if args.cuda and torch.cuda.is_available() else "CPU"
    size = f"{args.side} pixels, batch {args.batch_size}"
    print(f"\n| {args.arch}, {size}, on {on}, median of {args.rounds} | s/update |\n|---|---|")
    print(f"| `finetune_detect.py` | {statistics.median(script):.3f} |")
    print(f"| its waiting for data | {statistics.median(waiting):.3f} |")
    print(f"| bare loop, images in memory | {statistics.median(bare):.3f} |")
    print(f"| script / bare, median of the rounds | {statistics.median(a / b for a, b in zip(script, bare)):.3f} |")
    print(f"| the same of a step alone, median of 20 in turns | {alone:.3f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
