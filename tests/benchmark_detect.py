"""Seconds per update of finetune_detect.py, and of torchvision's detector in the shortest loop there is.

    python tests/benchmark_detect.py --arch ssdlite320_mobilenet_v3_large

In turns in one process: the script's step with its conversion of images, and that of the same model on images on the
device already (on CUDA all of it in bfloat16). Then an epoch of the script, with reading. Not collected by pytest.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import finetune_detect as fd


@dataclass
class Args:
    arch: str = "fasterrcnn_resnet50_fpn_v2"  # a detector of torchvision
    images: int = 64  # number of images, of which the script trains on half
    side: int = 320  # of the images in pixels
    batch_size: int = 4  # images per update
    workers: int = 1  # processes that read images for the script
    steps: int = 24  # measured in turns, after four more
    cuda: bool = True  # measure on CUDA when there is a GPU


def make_images(folder: Path, args: Args) -> None:
    """Smooth noise with a box an image."""
    rng, data = np.random.default_rng(0), {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    for i in range(args.images):
        small = Image.fromarray(rng.integers(0, 256, size=(12, 12, 3), dtype=np.uint8))
        small.resize((args.side,) * 2, Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg")
        data["images"].append({"id": i, "file_name": f"{i:04d}.jpg"})
        data["annotations"].append({"image_id": i, "category_id": 1, "bbox": [20, 20, args.side // 2, args.side // 3]})
    (folder / "train.json").write_text(json.dumps(data))


def steps_in_turns(args: Args, flags: fd.Args, device: torch.device) -> dict[str, list[float]]:
    """Seconds of steps of the script and of the bare loop."""
    on_cuda, ours = device.type == "cuda", fd.make_detector(flags, 2)
    fd.freeze(ours, [], flags)
    if on_cuda:
        fd.autocast_backbone(ours, "cuda")
    bare = models.get_model(args.arch, weights=None, weights_backbone=None, num_classes=2)
    nets = {"script": ours.to(device, memory_format=torch.channels_last).train()}
    nets["bare"] = bare.to(device, memory_format=torch.channels_last).train()
    optimizers = {name: torch.optim.SGD(net.parameters(), 1e-5, momentum=0.9) for name, net in nets.items()}
    data = fd.Pictures(*fd.load_data(flags, []), flags)
    ((images, targets, _),) = fd.read_batches(flags, data, list(range(args.batch_size)), device)
    raw, times = [data[i][0] for i in range(args.batch_size)], {"script": [], "bare": []}
    for _ in range(4 + args.steps):
        for name, net in nets.items():
            begun = time.perf_counter() if on_cuda else time.process_time()
            batch = images if name == "bare" else [image.to(device, non_blocking=True).float() / 255 for image in raw]
            with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda and name == "bare"):
                losses = net(batch, targets)
            loss = torch.stack([value.float() for value in losses.values()]).sum()
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            loss.item()  # waits for the device
            times[name].append((time.perf_counter() if on_cuda else time.process_time()) - begun)
    return {name: seconds[4:] for name, seconds in times.items()}


def main(args: Args) -> None:
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), args)
        words = f"--data-dir {folder} --annotations {folder}/train.json --logdir {folder}/runs --epochs 2"
        words += f" --arch {args.arch} --strategy scratch --augmentation none --learning-rate 1e-5"
        words += f" --batch-size {args.batch_size} --workers {args.workers}{'' if args.cuda else ' --no-cuda'}"
        times = steps_in_turns(args, tyro.cli(fd.Args, args=[*words.split(), "--workers", "0"]), device)
        subprocess.run([sys.executable, ROOT / "finetune_detect.py", *words.split()], check=True, stdout=sys.stderr)
        events = EventAccumulator(str(next(Path(folder, "runs").iterdir()))).Reload()
        epoch = events.Scalars("charts/seconds_per_update")[-1].value
    ratio = statistics.median(ours / bare for ours, bare in zip(times["script"], times["bare"]))
    print(f"| {args.arch}, {args.side} pixels, batch {args.batch_size}, on {device}, medians | s/update |\n|---|---|")
    print(f"| `finetune_detect.py`, an epoch with reading | {epoch:.3f} |")
    print(f"| its step | {statistics.median(times['script']):.3f} |")
    print(f"| bare | {statistics.median(times['bare']):.3f} |")
    print(f"| step / bare, median of {args.steps} in turns | {ratio:.3f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
