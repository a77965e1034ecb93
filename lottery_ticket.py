# Lottery tickets and their transfer: a network is trained, its smallest weights are pruned, the others are rewound to
# an early point of training, and so on for 31 rounds; the sparse networks found so on natural images are then trained
# on non-natural ones, as in "On the Transferability of Winning Tickets in Non-Natural Image Datasets" (Sabatelli et
# al., VISAPP 2021, arXiv 2005.05232) and "Contributions to Deep Transfer Learning" (M. Sabatelli, 2022, chapter 6).
#
#   python lottery_ticket.py --dataset cifar10 --download                               find the tickets of a source
#   python lottery_ticket.py --tickets runs/cifar10__... --dataset folder:DIR           train all of them on a target
#   python lottery_ticket.py --control dense --dataset folder:DIR                       the network to compare with
#   python lottery_ticket.py --report runs                                              tables and pictures
#
# The same command again continues a run that was stopped.
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.18", "pillow>=10",
#   "matplotlib>=3.8",
# ]
# ///
import csv
import gzip
import hashlib
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import warnings
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, NoReturn, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models
from torchvision.transforms import v2


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment, a part of the name of the run's folder"""
    seed: int = 1
    """seed of the split, the initial weights, the order of the images and their crops"""
    torch_deterministic: bool = True
    """sets `torch.backends.cudnn.deterministic`; off, cuDNN is free to pick its fastest kernels"""
    cuda: bool = True
    """train on CUDA when there is a GPU"""
    amp: bool = True
    """on CUDA, compute in bfloat16 where that is safe (autocast)"""
    compile: bool = False
    """compile the network (`torch.compile`); pays off in long runs"""
    workers: int = 4
    """processes that decode the images of a folder, once; 0 decodes them in this one"""
    logdir: str = "runs"
    """folder in which the run's own folder is made, or found again"""
    track: bool = False
    """mirror the run to Weights and Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "deep-transfer-learning"
    """the project of the run at Weights and Biases"""
    wandb_entity: Optional[str] = None
    """the team of the run at Weights and Biases"""

    # Data
    dataset: str = "cifar10"
    """cifar10, cifar100, fashion-mnist, mnist, or folder:DIR with a folder per class, or with train/, val/ and test/"""
    data_dir: str = "data"
    """where torchvision's sets lie, in the form in which torchvision downloads them"""
    download: bool = False
    """download the set into --data-dir if it is not there"""
    image_size: Optional[int] = None
    """side of the images for the network (None: the ticket's; else that of torchvision's sets, and 224 for folders)"""
    augment: Literal["none", "crop", "crop-flip"] = "crop"
    """training images: the centre; random crops (7/8 of a file's side; torchvision's sets: padded); also mirrored"""
    train_fraction: float = 1.0
    """share of the training images of every class to train on; the paper tries 0.75, 0.5 and 0.25"""
    image_cache: str = "image_cache"
    """folder in which the decoded images of a folder are kept for later runs"""

    # The network, and what is pruned from it. With tickets, None stands for what the ticket says.
    arch: Optional[Literal["resnet50", "resnet18", "resnet20", "conv", "mlp"]] = None
    """(None: resnet50, the paper's) the two large ones have a 3x3 stem without pooling at 64 pixels and below"""
    pruning: Optional[Literal["global", "layerwise", "channel"]] = None
    """(None: global) the smallest weights of all layers, of every layer, or the output channels of least L1 norm"""
    prune_fraction: float = 0.2
    """share of the remaining weights (channels) that a round prunes"""
    rounds: int = 31
    """rounds of training; the first one is that of the unpruned network"""
    rewind: Optional[str] = None
    """(None: 2ep) the point of the first round's training to which weights return: epochs (2ep) or updates (500it)"""

    # Training
    epochs: int = 90
    """the last epoch of every round, unless --patience ends it first"""
    patience: int = 5
    """epochs without a lower validation loss after which a round ends, with the weights of the lowest; 0: never, and
    with the last weights"""
    batch_size: int = 64
    """images per update"""
    learning_rate: float = 0.1
    """of SGD"""
    milestones: list[int] = field(default_factory=lambda: [50, 60, 75])
    """epochs after which the learning rate falls"""
    lr_decay: float = 0.1
    """what the learning rate is multiplied by then"""
    momentum: float = 0.9
    """of SGD"""
    nesterov: bool = True
    """of SGD"""
    weight_decay: float = 1e-5
    """of weights with two dimensions and more; never of biases and normalisation"""

    # Transfer
    ticket: Optional[str] = None
    """round_RR.pt of a source run to train on --dataset, with a new last layer"""
    tickets: Optional[str] = None
    """folder of a source run, whose tickets are all trained on --dataset"""
    control: Literal["none", "dense", "reinit", "random-mask", "trained"] = "none"
    """dense: unpruned, random weights; else the ticket but with random weights, a random mask, fully trained weights"""
    save_networks: bool = False
    """keep the network trained on --dataset, of every ticket, as network_RR.pt"""

    # Instead of training
    report: list[str] = field(default_factory=list)
    """folders of runs, or with runs in them, to compare in tables and pictures"""
    out: str = "."
    """with --report: folder for the pictures"""
    count: Optional[str] = None
    """round_RR.pt, of which weights and multiply-adds are counted layer by layer"""


IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
SPLITS = ("train", "val", "test")
TORCHVISION = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion-mnist": datasets.FashionMNIST,
               "mnist": datasets.MNIST}  # fmt: skip
FREE = {  # flags that may change when a run is continued
    "torch_deterministic", "cuda", "amp", "compile", "workers", "logdir", "track", "wandb_project_name",
    "wandb_entity", "dataset", "data_dir", "download", "image_cache", "rounds", "ticket", "tickets", "save_networks",
    "report", "out", "count",
}  # fmt: skip
COLUMNS = ["round", "sparsity", "remaining", "prunable", "parameters", "val_accuracy", "test_accuracy", "val_loss",
           "best_epoch", "epochs", "seconds"]  # fmt: skip
Image.MAX_IMAGE_PIXELS = 2**30  # scans of museums exceed Pillow's limit against bombs
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def say(line: str, stay: bool = True) -> None:
    """Print over the progress line; on a terminal a line that does not `stay` is a progress line itself."""
    tty = sys.stdout.isatty()
    print(f"\r{line}\033[K" if tty else line, end="\n" if stay or not tty else "", flush=True)


def some(names, n: int = 5) -> str:
    names = list(names)
    return ", ".join(map(str, names[:n])) + (f" and {len(names) - n:,} more" if len(names) > n else "")


def stream(*key) -> torch.Generator:
    """A generator of its own for every purpose: what is drawn for one does not depend on what is drawn for another."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


# Data ----------------------------------------------------------------------------------------------------------------
@dataclass
class Data:
    name: str
    classes: list[str]
    pixels: dict[str, torch.Tensor]
    """of every split, uint8 `(N, C, S, S)`, C 1 or 3, in the memory order (N, S, S, C)"""
    labels: dict[str, torch.Tensor]
    """of every split, int64 `(N,)`"""
    crop: int
    """side of the part of an image that is used; S, or about 7/8 of it where a margin for crops was kept"""


def places(labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """For every image its place in a random order of its class, and the size of its class: int64 `(N,)` each."""
    place, size = torch.zeros_like(labels), torch.zeros_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        place[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members))
        size[members] = len(members)
    return place, size


def tenths(size: torch.Tensor) -> torch.Tensor:
    """A tenth of every class, rounded; a class of three images has one in each split."""
    return torch.maximum((size / 10).round().long(), (size >= 3).long())


def read_idx(folder: str, name: str) -> Optional[torch.Tensor]:
    """An array of bytes in the format of MNIST (yann.lecun.com/exdb/mnist), packed or not; None if it is not there."""
    for path in (os.path.join(folder, name), os.path.join(folder, name + ".gz")):
        if os.path.isfile(path):
            try:
                with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                    content = file.read()
                sides = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
                values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sides)).reshape(sides)
            except (OSError, EOFError, ValueError, IndexError) as error:
                fail(f"{path} is damaged: {error}")
            return torch.from_numpy(values.copy())
    return None


def read_torchvision(args: Args) -> tuple[list[str], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The class names, and images uint8 `(N, S, S, C)` and labels of train and test as they are published."""
    kind, parts = TORCHVISION[args.dataset], {}
    try:
        if args.download:
            kind(args.data_dir, download=True)
        for part in ("train", "test"):
            if args.dataset.startswith("cifar"):
                found = kind(args.data_dir, train=part == "train")
                parts[part] = torch.from_numpy(found.data), torch.tensor(found.targets)
                classes = found.classes
            else:  # read here, since torchvision wants the files unpacked and in folders of its own
                prefix = "train" if part == "train" else "t10k"
                for folder in (os.path.join(args.data_dir, kind.__name__, "raw"), args.data_dir):
                    names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
                    images, labels = (read_idx(folder, name) for name in names)
                    if images is not None and labels is not None:
                        parts[part] = images[..., None], labels.long()
                        break
                else:
                    raise RuntimeError(f"{prefix}-images-idx3-ubyte(.gz) is neither there nor in {kind.__name__}/raw")
                classes = kind.classes
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        hint = "" if args.download else "; --download fetches it"
        fail(f"--data-dir {args.data_dir}: {args.dataset} could not be read ({reason}){hint}")
    return list(classes), parts


def find_images(folder: str) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted."""
    found = [
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
    ]
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in IMAGES)


def open_image(path: str, side: int) -> Image.Image:
    """The image upright in RGB, its shorter side at least `side` pixels if it has them; may raise anything."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))  # JPEGs are decoded at the fraction that suffices
        image.load()
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more, which convert() would cut off at 255
            values = np.asarray(image, dtype=np.float64)
            top = 65_535 if values.max() > 255 else 255
            image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")  # over white, as on paper
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.exif_transpose(image).convert("RGB")


class Pictures(Dataset):
    """Image i as uint8 `(side, side, 3)`: its shorter side resized, the centre cut out; or why it cannot be read."""

    def __init__(self, folder: str, paths: list[str], side: int):
        self.folder, self.paths, self.side = folder, paths, side
        self.transform = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        try:
            image = open_image(os.path.join(self.folder, self.paths[i]), self.side)
            return self.transform(image).permute(1, 2, 0).contiguous()
        except Exception as error:  # Pillow's plugins raise whatever their formats make them
            return f"{type(error).__name__}: {error}"


def decode(args: Args, folder: str, paths: list[str], side: int, stopped) -> tuple[torch.Tensor, dict[int, str]]:
    """All images, uint8 `(N, side, side, 3)`, and {index: reason} of the unreadable ones; kept in --image-cache."""
    digest = hashlib.sha256(f"{side}".encode())
    for path in paths:
        status = os.stat(os.path.join(folder, path))
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = os.path.join(args.image_cache, f"{side}_{digest.hexdigest()[:32]}.pt")
    if os.path.isfile(cache):
        kept = torch.load(cache, weights_only=True)
        return kept["pixels"], kept["unreadable"]
    pixels, unreadable, last_line = torch.zeros(len(paths), side, side, 3, dtype=torch.uint8), {}, time.perf_counter()
    # one task is 16 images, so that few and large messages go between the processes
    workers = min(args.workers, os.cpu_count())
    loader = DataLoader(Pictures(folder, paths, side), 16, num_workers=workers, collate_fn=list)
    for start, images in zip(range(0, len(paths), 16), loader):
        if stopped():
            sys.exit(128 + stopped()[0])
        for i, image in enumerate(images, start):
            if torch.is_tensor(image):
                pixels[i] = image
            else:
                unreadable[i] = image
        if time.perf_counter() - last_line > (1 if sys.stdout.isatty() else 30):
            last_line = time.perf_counter()
            say(f"decoding {folder}: {start / len(paths):.1%}", stay=False)
    os.makedirs(args.image_cache, exist_ok=True)
    save_atomically({"pixels": pixels, "unreadable": unreadable}, cache)
    return pixels, unreadable


def read_folder(args: Args, folder: str, side: int, stopped) -> tuple[list[str], dict]:
    """The class names, and images and labels of each split, of a folder per class or of train/, val/ and test/."""
    if not os.path.isdir(folder):
        fail(f"--dataset folder:{folder}: there is no such folder")
    paths = find_images(folder)
    if not paths:
        fail(f"--dataset folder:{folder}: no images in it ({', '.join(sorted(IMAGES))})")
    fixed = set(SPLITS) <= {path.split(os.sep)[0] for path in paths if os.sep in path}
    names = [path.split(os.sep)[fixed:][:-1] for path in paths]
    used = [i for i, inside in enumerate(names) if inside and (not fixed or paths[i].split(os.sep)[0] in SPLITS)]
    if not used:
        fail(f"--dataset folder:{folder}: a folder per class is expected there, or train/, val/ and test/ with those")
    paths, names = [paths[i] for i in used], [names[i][0] for i in used]
    pixels, unreadable = decode(args, folder, paths, side, stopped)
    for i, reason in unreadable.items():
        say(f"left out: {paths[i]} cannot be read, {reason}")
    known = sorted(set(names))
    labels = torch.tensor([known.index(name) for name in names])
    split = torch.tensor([SPLITS.index(path.split(os.sep)[0]) for path in paths]) if fixed else torch.zeros_like(labels)
    readable = torch.ones_like(labels, dtype=torch.bool)
    readable[list(unreadable)] = False
    if not fixed:
        place, size = torch.zeros_like(labels), torch.zeros_like(labels)
        place[readable], size[readable] = places(labels[readable], stream(args.seed, "split"))
        split[place < 2 * tenths(size)] = 1
        split[place < tenths(size)] = 2
    present = [set(labels[readable & (split == i)].tolist()) for i in range(3)]
    kept = sorted(set.intersection(*present))
    lost = Counter(name for name in names if known.index(name) not in kept)
    if lost:
        what = f"{len(lost):,} classes with {sum(lost.values()):,} images"
        say(f"{what} are not in all of train, val and test and are left out: {some(lost)}")
    if len(kept) < 2:
        fail(f"--dataset folder:{folder}: {len(kept)} classes have images in all of train, val and test, 2 are needed")
    position = torch.full((len(known),), -1)
    position[kept] = torch.arange(len(kept))
    labels = position[labels]
    chosen = [(readable & (split == i) & (labels >= 0)).nonzero()[:, 0] for i in range(3)]
    return [known[i] for i in kept], {name: (pixels[i], labels[i]) for name, i in zip(SPLITS, chosen)}


def load_data(args: Args, device: torch.device, stopped=lambda: []) -> Data:
    """--dataset, split into train, val and test and put on the device as it will stay there."""
    kind, _, folder = args.dataset.partition(":")
    if kind == "folder" and folder:
        args.image_size = args.image_size or 224
        crop, name = args.image_size, os.path.basename(os.path.abspath(folder))
        classes, parts = read_folder(args, folder, round(crop * 8 / 7), stopped)
    elif args.dataset in TORCHVISION:
        (classes, parts), name = read_torchvision(args), args.dataset
        crop = parts["train"][0].shape[1]
        args.image_size = args.image_size or crop
        images, labels = parts["train"]
        place, size = places(labels, stream(args.seed, "split"))
        for split, members in (("train", place >= tenths(size)), ("val", place < tenths(size))):
            parts[split] = images[members], labels[members]
    else:
        fail(f"--dataset {args.dataset}: {', '.join(TORCHVISION)} or folder:DIR is expected")
    if args.train_fraction < 1:
        images, labels = parts["train"]
        place, size = places(labels, stream(args.seed, "fraction"))
        members = place < (size * args.train_fraction).round().clamp(min=1)
        parts["train"] = images[members], labels[members]
    few = [f"{len(parts[split][1])} {split}" for split in SPLITS if len(parts[split][1]) < 1 + (split == "train")]
    if few:
        fail(f"--dataset {args.dataset}: too few images, {' and '.join(few)}")
    try:
        pixels = {split: parts[split][0].contiguous().to(device).permute(0, 3, 1, 2) for split in SPLITS}
    except torch.OutOfMemoryError:
        size = sum(parts[split][0].numel() for split in SPLITS) / 2**30
        fail(f"the images take {size:.1f} GiB on the GPU, more than it has left: a smaller --image-size, or --no-cuda")
    return Data(name, classes, pixels, {split: parts[split][1].to(device) for split in SPLITS}, crop)


class Feed:
    """Batches of one split for the network, cut out and normalised on the device on which the images lie."""

    def __init__(self, args: Args, data: Data, split: str, moments: tuple[torch.Tensor, torch.Tensor]):
        pixels, self.labels = data.pixels[split].permute(0, 2, 3, 1), data.labels[split]
        self.mean, self.std = (value.to(pixels.device).view(1, 3, 1, 1) for value in moments)
        self.augment, self.crop, self.size = args.augment if split == "train" else "none", data.crop, args.image_size
        if pixels.shape[1] == data.crop and self.augment != "none":
            pixels = F.pad(pixels, (0, 0, *[data.crop // 8] * 4))
        self.span = pixels.shape[1] - data.crop
        # (image, top, left, row, column, channel) without a copy: cutting out is one look-up, several times as fast
        # as one with rows and columns
        self.windows = pixels.unfold(1, data.crop, 1).unfold(2, data.crop, 1).permute(0, 1, 2, 4, 5, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def plan(self, seed: int, epoch: int) -> tuple[torch.Tensor, ...]:
        """The order of the images `(N,)`, the corners of their crops `(N, 2)` and which are mirrored `(N,)`.

        Only seed and epoch determine them, so that every round and every arm sees the same.
        """
        generator, n = stream(seed, "order", epoch), len(self)
        order = torch.randperm(n, generator=generator)
        corners = torch.randint(0, self.span + 1, (n, 2), generator=generator)
        mirrored = torch.rand(n, generator=generator) < 0.5
        return tuple(part.to(self.labels.device) for part in (order, corners, mirrored))

    def batch(self, part: slice, order: torch.Tensor, corners=None, mirrored=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 `(B, 3, size, size)` in channels_last and labels `(B,)`, of a part of a plan."""
        chosen = order[part]
        top, left = (self.span // 2,) * 2 if self.augment == "none" else corners[part].unbind(1)
        images = self.windows[chosen, top, left]
        if self.augment == "crop-flip":
            images = torch.where(mirrored[part, None, None, None], images.flip(2), images)
        images = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std  # grey becomes three channels here
        if self.crop != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=self.size < self.crop)
        return images.contiguous(memory_format=torch.channels_last), self.labels[chosen]


def pixel_statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each of three channels over uint8 `(N, C, S, S)`: float32 `(3,)` on the CPU."""
    sums, squares = 0.0, 0.0
    for part in pixels.split(1_000):
        values = part.double()
        sums, squares = sums + values.sum(dim=(0, 2, 3)), squares + values.square().sum(dim=(0, 2, 3))
    count = pixels.numel() // pixels.shape[1]
    mean = sums / count
    std = (squares / count - mean.square()).clamp(min=1.0).sqrt()  # at least one grey level
    return tuple(value.float().cpu().expand(3).contiguous() for value in (mean, std))


# The networks, all of which end in a linear layer `fc` ---------------------------------------------------------------
class Block(nn.Module):
    """Two convolutions and a shortcut without weights: subsampled and padded with zero channels (He et al., 2016)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.stride, self.more = stride, after - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class Grey(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1).flatten(1)


def make_network(arch: str, classes: int, image_size: int, generator: torch.Generator) -> nn.Module:
    """The network with Xavier-uniform weights; the MLP is LeNet-300-100 (LeCun et al., 1998) on grey images."""
    if arch in ("resnet50", "resnet18"):
        network = getattr(models, arch)(weights=None, num_classes=classes)
        if image_size <= 64:  # or little would be left of the image after the stem
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    elif arch == "mlp":
        hidden = nn.Linear(image_size**2, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()
        network = nn.Sequential(OrderedDict(trunk=nn.Sequential(Grey(), *hidden), fc=nn.Linear(100, classes)))
    else:
        if arch == "resnet20":
            widths, layers = [16] * 4 + [32] * 3 + [64] * 3, [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
            layers += [nn.BatchNorm2d(16), nn.ReLU()]
            layers += [Block(one, two, 1 + (one != two)) for one, two in zip(widths, widths[1:])]
        else:
            widths, layers = [3, 32, 64, 128, 256], []
            for one, two in zip(widths, widths[1:]):
                layers += [nn.Conv2d(one, two, 3, 1, 1, bias=False), nn.BatchNorm2d(two), nn.ReLU()]
                layers += [nn.MaxPool2d(2, ceil_mode=True)]
        trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network = nn.Sequential(OrderedDict(trunk=trunk, fc=nn.Linear(widths[-1], classes)))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            xavier(module, generator)
    return network.to(memory_format=torch.channels_last)


def xavier(module: nn.Module, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(module.weight, generator=generator)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning may take: of convolutions and linear layers but the last, whose classes change."""
    kinds = (nn.Conv2d, nn.Linear)
    modules = {name: module for name, module in network.named_modules() if isinstance(module, kinds) and name != "fc"}
    return {f"{name}.weight": module.weight for name, module in modules.items()}


# Pruning -------------------------------------------------------------------------------------------------------------
def keep_largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Marks the n largest of scores `(N,)`: bool `(N,)`. Of equal ones the later are kept, on every device."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.sort(stable=True).indices[len(scores) - n :]] = True
    return kept


def prune(weights: dict, masks: dict, kind: str, fraction: float) -> dict[str, torch.Tensor]:
    """The next round's masks: `fraction` of what remains is pruned, rounded, and never all of a layer.

    Only what remains is ranked, by its place in the ranking and not by a threshold: the count is exact. The masks are
    those of `torch.nn.utils.prune` (global_unstructured, l1_unstructured, ln_structured with n=1 and dim=0), which
    would rename the parameters and let "global" empty a layer.
    """
    scores = {name: weights[name].abs() for name in masks}
    if kind == "channel":
        scores = {name: score.flatten(1).sum(dim=1) for name, score in scores.items()}
        masks = {name: mask.flatten(1).any(dim=1) for name, mask in masks.items()}
    remaining = {name: score[masks[name]] for name, score in scores.items()}
    if kind == "global":
        everything = torch.cat(list(remaining.values()))
        left = len(everything) - round(fraction * len(everything))
        sizes, firsts, start = [len(values) for values in remaining.values()], [], 0
        for values in remaining.values():  # the largest weight of a layer outranks all others
            firsts.append(start + (values == values.max()).nonzero()[-1, 0])
            start += len(values)
        everything[torch.stack(firsts)] = torch.inf
        kept = dict(zip(remaining, keep_largest(everything, max(left, len(sizes))).split(sizes)))
    else:
        left = {name: max(len(values) - round(fraction * len(values)), 1) for name, values in remaining.items()}
        kept = {name: keep_largest(values, left[name]) for name, values in remaining.items()}
    new = {}
    for name, mask in masks.items():
        new[name] = torch.zeros_like(mask)
        new[name][mask] = kept[name]
    return {name: widen(mask, weights[name].shape) for name, mask in new.items()}


def widen(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mask of the weights of `shape` from one of them or of their output channels."""
    return mask.view(*mask.shape, *[1] * (len(shape) - mask.ndim)).expand(shape).clone()


def random_masks(masks: dict, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Masks that keep as many weights (channels) of every layer, at random; nested over the rounds of a seed."""
    new = {}
    for name, mask in masks.items():
        ranked = mask.flatten(1).any(dim=1) if kind == "channel" else mask
        scores = torch.rand(ranked.numel(), generator=stream(seed, "mask", name))
        new[name] = widen(keep_largest(scores, int(ranked.sum())).view(ranked.shape), mask.shape)
    return new


def learn(
    network: nn.Module, optimizer, sparse: Optional[tuple[list, list]], images, labels, amp: bool
) -> torch.Tensor:
    """One update; returns the loss. `sparse`: the pruned weights and their masks in float.

    Weights that are zero, a gradient of zero and an optimizer that never knew another keep what is pruned, and its
    momentum, at exactly zero: masking weights and momentum too would cost four times as much and change nothing.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    if sparse:
        weights, masks = sparse
        torch._foreach_mul_([weight.grad for weight in weights], masks)
    optimizer.step()
    return loss.detach()


def make_optimizer(args: Args, network: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    nesterov = args.nesterov and args.momentum > 0
    return torch.optim.SGD(groups, args.learning_rate, momentum=args.momentum, nesterov=nesterov, fused=True)


def rewind_steps(text: str, per_epoch: int) -> int:
    """Updates of `2ep`, `500it` or `1ep20it`."""
    found = re.fullmatch(r"(?:(\d+)ep)?(?:(\d+)it)?", text) if text else None
    if not found:
        fail(f"--rewind {text}: epochs (2ep) or updates (500it) are expected")
    return int(found[1] or 0) * per_epoch + int(found[2] or 0)


# Tickets -------------------------------------------------------------------------------------------------------------
def load_file(path: str, needed: set, what: str) -> dict:
    if not os.path.isfile(path):
        fail(f"no {what} at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{path} is not a {what}: {(str(error) or type(error).__name__).splitlines()[0]}")
    if not isinstance(content, dict) or not needed <= set(content):
        fail(f"{path} is not a {what} of this script")
    return content


def load_ticket(path: str) -> dict:
    """{mask: bool by name, weights: the rewound and masked state, trained: the state at the round's end, meta}."""
    return load_file(path, {"mask", "weights", "trained", "meta"}, "ticket")


def plant(network: nn.Module, ticket: dict, control: str, seed: int, path: str) -> dict[str, torch.Tensor]:
    """Put the ticket, or what `control` has in its place, into a random network; returns the masks.

    The last layer stays as it is, so that it is the same in all arms. `path`: where the ticket is from; beside it lie
    the weights that a random mask may need, which the ticket itself has pruned.
    """
    own, masks = network.state_dict(), {}
    for name, weight in prunable(network).items():
        mask = ticket["mask"].get(name)
        if mask is None or mask.shape != weight.shape:
            found = "missing" if mask is None else tuple(mask.shape)
            fail(f"{path}: the mask of {name} is {found}, and {tuple(weight.shape)} is needed at this --image-size")
        masks[name] = mask.bool()
    state = {"none": "weights", "trained": "trained", "random-mask": "weights"}.get(control)
    if control == "random-mask":
        first = os.path.join(os.path.dirname(path), "round_00.pt")
        if ticket["meta"]["round"] > 0 and not os.path.isfile(first):
            fail(f"--control random-mask needs the unpruned weights beside the ticket, {first}")
        masks = random_masks(masks, ticket["meta"]["pruning"], seed)
        ticket = load_ticket(first) if ticket["meta"]["round"] > 0 else ticket
    if state:
        body = {name: tensor for name, tensor in ticket[state].items() if not name.startswith("fc.")}
        wrong = [name for name in own if not name.startswith("fc.") and (
            name not in body or body[name].shape != own[name].shape)]  # fmt: skip
        if wrong:
            fail(f"{path}: the weights do not fit a {ticket['meta']['arch']}: {some(wrong)}")
        network.load_state_dict(body, strict=False)
    apply_masks(network, masks)
    return masks


@torch.no_grad()
def apply_masks(network: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, weight in prunable(network).items():
        weight.mul_(masks[name].to(weight.device))


def clone(state: dict) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def save_atomically(content: dict, path: str) -> None:
    torch.save(content, path + ".tmp")
    os.replace(path + ".tmp", path)


def read_rows(path: str) -> list[dict]:
    """The rounds in a results.csv, numbers as numbers."""
    if not os.path.isfile(path):
        return []
    try:
        with open(path, newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, TypeError, ValueError) as error:
        fail(f"{path}: {error}")
    if rows and not set(COLUMNS) <= set(rows[0]):
        fail(f"{path}: the columns {', '.join(COLUMNS)} are expected")
    whole = {"round", "remaining", "prunable", "parameters", "best_epoch", "epochs"}
    return [{name: int(value) if name in whole else value for name, value in row.items()} for row in rows]


# Counting and reporting ----------------------------------------------------------------------------------------------
def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def count_costs(ticket: dict) -> list[tuple[str, int, int, int, int]]:
    """Of every layer: name, weights, weights left, multiply-adds per image, multiply-adds of the weights left."""
    meta = ticket["meta"]
    network = make_network(meta["arch"], len(meta["classes"]), meta["built_for"], stream(0)).eval()
    names, rows = {module: name for name, module in network.named_modules()}, []

    def hook(module: nn.Module, _, output: torch.Tensor) -> None:
        weights = module.weight.numel()
        mask = ticket["mask"].get(f"{names[module]}.weight")
        left = weights if mask is None else int(mask.sum())
        positions = output[0, 0].numel()  # a weight is used once for every output pixel
        rows.append((names[module], weights, left, weights * positions, left * positions))

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook)
    with torch.no_grad():
        network(torch.zeros(1, 3, meta["image_size"], meta["image_size"]))
    return rows


def print_counts(path: str) -> None:
    ticket = load_ticket(path)
    meta, rows = ticket["meta"], count_costs(ticket)
    lines = [[name, *(f"{number:,}" for number in numbers)] for name, *numbers in rows]
    totals = [sum(column) for column in list(zip(*rows))[1:]]
    lines.append(["sum", *(f"{number:,}" for number in totals)])
    print(f"{path}: {meta['arch']} of {meta['dataset']}, {meta['image_size']} pixels, round {meta['round']}\n")
    print(markdown(["layer", "weights", "left", "multiply-adds", "of the weights left"], lines) + "\n")
    masks = ticket["mask"].values()
    prunable_count, left = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    remain, everything = meta["parameters"], meta["parameters"] + prunable_count - left
    print(f"{left:,} of {prunable_count:,} prunable weights are left (sparsity {1 - left / prunable_count:.4f}), "
          f"{remain:,} of {everything:,} parameters in all (sparsity {1 - remain / everything:.4f}), and "
          f"{totals[3]:,} of {totals[2]:,} multiply-adds ({totals[3] / totals[2]:.2%}; FLOPs are twice as many). "
          "Dense kernels multiply zeros too: this says nothing about time.")  # fmt: skip


# Table of the paper: test accuracy in % and its standard deviation, and the sparsity of the best ticket
PUBLISHED_ARMS = ["dense", "cifar10", "cifar100", "fashion-mnist", "own"]
PUBLISHED = {
    "human-lba": "71.85 ± 1.12, 79.17 ± 1.85 (.945), 76.97 ± .73 (.79), 77.32 ± 1.85 (.886), 81.72 ± .39 (.832)",
    "lung-tissues": "84.75 ± .81, 88.90 ± 1.97 (.977), 87.61 ± .90 (.977), 87.61 ± .11 (.672), 90.48 ± .16 (.965)",
    "mouse-lba": "48.17 ± 1.18, 74.20 ± 2.04 (.972), 57.42 ± .48 (.893), 52.27 ± 1.73 (.738), 68.20 ± 3.79 (.931)",
    "bone-marrow": "64.66 ± 1.36, 71.75 ± 3.36 (.866), 69.87 ± .39 (.988), 68.77 ± .39 (.931), 72.55 ± .46 (.914)",
    "artist-1": "45.88 ± .42, 66.58 ± 1.54 (.972), 65.55 ± 1.79 (.993), 63.88 ± .12 (.991), 58.74 ± 1.92 (.931)",
    "type": "41.36 ± 2.31, 58.63 ± 2.97 (.991), 60.56 ± .44 (.931), 58.92 ± .59 (.995), 50.44 ± 2.23 (.963)",
}
T95 = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 1 to 9 degrees of freedom


def mean_and_half(values: list[float]) -> tuple[float, Optional[float]]:
    """The mean and half of its 95 % interval (Student's t), None for a single value."""
    if len(values) < 2:
        return values[0], None
    t = T95[len(values) - 2] if len(values) < 11 else 1.96 + 2.5 / (len(values) - 1)
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def read_runs(folders: list[str]) -> dict[str, dict[str, list[tuple[dict, dict[int, dict]]]]]:
    """{target: {arm: [(settings, {round: row}) of every seed]}}"""
    found, seen = defaultdict(lambda: defaultdict(list)), {}
    paths = sorted({os.path.realpath(root) for folder in folders for root, _, names in os.walk(folder)
                    if "hyperparameters.json" in names})  # fmt: skip
    for path in paths:
        try:
            with open(os.path.join(path, "hyperparameters.json")) as file:
                settings = json.load(file)
            target, arm, seed = (settings[name] for name in ("target", "arm", "seed"))
            arm = arm if settings["exp_name"] == Args.exp_name else f"{arm} ({settings['exp_name']})"
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{path}/hyperparameters.json is not of this script: {error!r}")
        rows = read_rows(os.path.join(path, "results.csv"))
        if not rows:
            say(f"{path}: no round is finished yet")
            continue
        for other, _ in found[target][arm][:1]:
            compared = [name for name in other if name not in FREE | {"seed", "source", "source_seed"}]
            differ = [f"{n} {other[n]} and {settings.get(n)}" for n in compared if other[n] != settings.get(n)]
            if differ:
                fail(f"{seen[target, arm, other['seed']]} and {path} are of one arm but differ in {', '.join(differ)}")
        if (target, arm, seed) in seen:
            fail(f"{path} and {seen[target, arm, seed]} are the same run twice")
        seen[target, arm, seed] = path
        found[target][arm].append((settings, {row["round"]: row for row in rows}))
    if not seen:
        fail(f"--report {' '.join(folders)}: no runs with results there")
    return found


def best_round(runs: list[dict[int, dict]], measure: str) -> int:
    """The round with the highest mean of `measure` over the seeds, among those that all seeds have."""
    common = sorted(set.intersection(*map(set, runs))) or sorted(runs[0])
    return max(common, key=lambda r: statistics.fmean(run[r][measure] for run in runs if r in run))


def report(folders: list[str], out: str) -> None:
    """Print a table per target and draw its picture, lottery_TARGET.png."""
    try:
        import matplotlib
    except ImportError:
        fail("--report needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = read_runs(folders)
    os.makedirs(out, exist_ok=True)
    for target, arms in sorted(targets.items()):
        arms = dict(sorted(arms.items(), key=lambda item: (item[0] != "dense", not item[0].startswith("own"), item[0])))
        runs = {arm: [rows for _, rows in group] for arm, group in arms.items()}

        def at(arm: str, r: int, measure: str = "test_accuracy") -> list[float]:
            return [rows[r][measure] for rows in runs[arm] if r in rows]

        def shown(values: list[float]) -> str:
            if not values:
                return "–"
            mean, half = mean_and_half([100 * value for value in values])
            return f"{mean:.2f}" + ("" if half is None else f" ± {half:.2f}")

        print(f"### {target}: test accuracy in %, mean ± half of the 95 % interval over seeds\n")
        rounds = sorted({r for group in runs.values() for rows in group for r in rows})
        lines = []
        for r in rounds:
            sparsities = {f"{value:.3f}" for arm in runs for value in at(arm, r, "sparsity")}
            lines.append([str(r), " / ".join(sorted(sparsities)), *(shown(at(arm, r)) for arm in runs)])
        print(markdown(["round", "sparsity", *(f"{arm}, n = {len(runs[arm])}" for arm in runs)], lines) + "\n")
        lines, published = [], PUBLISHED.get(re.sub(r"[\s_]+", "-", target.lower()), "").split(", ")
        published = dict(zip(PUBLISHED_ARMS, published))
        for arm, group in runs.items():
            cells = []
            for measure in ("val_accuracy", "test_accuracy"):
                r = best_round(group, measure)
                sparsity = statistics.fmean(at(arm, r, "sparsity"))
                cells.append(f"{shown(at(arm, r))} ({sparsity:.3f})")
            settings = arms[arm][0][0]
            name = settings.get("source_dataset") or arm.split("-")[0]
            alike = settings["control"] in ("none", "dense") and settings["train_fraction"] == 1
            lines.append([arm, *cells, alike and published.get(name) or "–"])
        head = ["best ticket (its sparsity)", "chosen on validation", "highest on test, as published", "published"]
        print(markdown(head, lines) + "\n")
        figure, axes = pyplot.subplots(figsize=(8.5, 4.2), layout="constrained")
        drawn = []
        for arm in runs:
            points = [r for r in rounds if at(arm, r)]
            left = [100 * (1 - statistics.fmean(at(arm, r, "sparsity"))) for r in points]
            found = [mean_and_half([100 * value for value in at(arm, r)]) for r in points]
            means, halves = np.array([mean for mean, _ in found]), np.array([half or 0.0 for _, half in found])
            drawn += list(zip(left, means))
            if arm.startswith("dense"):  # there is one, to be compared with all sparsities
                axes.axhline(means[0], color="black", linestyle="--", label=f"{arm}, n = {len(runs[arm])}")
                axes.axhspan(means[0] - halves[0], means[0] + halves[0], color="black", alpha=0.1, linewidth=0)
                continue
            (line,) = axes.plot(left, means, marker=".", label=f"{arm}, n = {len(runs[arm])}")
            axes.fill_between(left, means - halves, means + halves, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel="weights left, %", ylabel="test accuracy, %", title=target)
        least, low, high = min(left for left, _ in drawn), *(edge(mean for _, mean in drawn) for edge in (min, max))
        ticks = [left for left in (100, 70, 50, 30, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if left >= 0.9 * least]
        axes.set_xticks(ticks, [f"{left:g}" for left in ticks])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.set_ylim(max(low - 10, -1), min(high + 10, 101))  # intervals of two or three seeds leave the picture
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        path = os.path.join(out, f"lottery_{target}.png".replace(" ", "_"))
        figure.savefig(path + ".tmp", dpi=100, format="png")
        os.replace(path + ".tmp", path)
        pyplot.close(figure)
        print(f"{path}\n")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.report or args.count:
        report(args.report, args.out) if args.report else print_counts(args.count)
        sys.exit()
    for name, least in (("epochs", 1), ("rounds", 1), ("batch_size", 2), ("patience", 0)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for name, most in (("prune_fraction", 0.999), ("train_fraction", 1)):
        if not 0 < getattr(args, name) <= most:
            fail(f"--{name.replace('_', '-')} must be above 0 and at most {most}, not {getattr(args, name)}")
    if args.ticket and args.tickets:
        fail("--ticket is one ticket and --tickets a folder of them: give one of the two")
    if args.control not in ("none", "dense") and not (args.ticket or args.tickets):
        fail(f"--control {args.control} needs the tickets that it is compared with: --ticket or --tickets")

    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs Weights and Biases: pip install wandb")

    # Ctrl-C and kill end the run after the update, with a checkpoint; a second one ends it at once
    signals: list[int] = []

    def on_signal(number: int, _) -> None:
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    amp = args.amp and device.type == "cuda"

    # The tickets, {round: path}, if there are any
    tickets, source = {}, None
    if args.tickets:
        if not os.path.isdir(args.tickets):
            fail(f"--tickets {args.tickets}: there is no such folder")
        for name in sorted(os.listdir(args.tickets)):
            if found := re.fullmatch(r"round_(\d+)\.pt", name):
                tickets[int(found[1])] = os.path.join(args.tickets, name)
        tickets = {r: path for r, path in tickets.items() if r < args.rounds}
        if not tickets:
            fail(f"--tickets {args.tickets}: no round_RR.pt in it, of the first {args.rounds}")
    if args.tickets or args.ticket:
        path = args.ticket or next(iter(tickets.values()))
        source = load_ticket(path)["meta"]
        tickets = tickets or {source["round"]: args.ticket}
        for name in ("arch", "pruning", "rewind"):
            if getattr(args, name) not in (None, source[name]):
                fail(f"--{name} {getattr(args, name)}: {path} has {source[name]}")
            setattr(args, name, source[name])
        args.prune_fraction, args.image_size = source["prune_fraction"], args.image_size or source["image_size"]
    args.arch, args.pruning = args.arch or "resnet50", args.pruning or "global"
    args.rewind = args.rewind or "2ep"
    if args.control == "dense":
        tickets, args.pruning, args.rewind, args.prune_fraction = {0: None}, None, None, None

    # Data
    data = load_data(args, device, lambda: signals)
    moments = pixel_statistics(data.pixels["train"])
    feeds = {split: Feed(args, data, split, moments) for split in SPLITS}
    sizes = {split: len(feeds[split]) for split in SPLITS}
    shown = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
    say(f"{data.name}: {shown} images, {len(data.classes):,} classes")
    full, rest = divmod(sizes["train"], args.batch_size)
    per_epoch = full + (rest > 1)  # one image alone is no batch: batch normalisation needs two values
    keep_from = 0 if tickets else rewind_steps(args.rewind, per_epoch)
    if keep_from >= args.epochs * per_epoch:
        fail(f"--rewind {args.rewind} is {keep_from:,} updates, and a round has {args.epochs * per_epoch:,}")

    built_for = source["built_for"] if source else args.image_size
    if args.arch == "mlp" and built_for != args.image_size:
        fail(f"--image-size {args.image_size}: this ticket is a network for {built_for} pixels and nothing else")

    # TRY NOT TO MODIFY: the run's folder and logs
    if args.control == "dense":
        arm = "dense"
    elif source:
        arm = f"{source['dataset']}-{args.pruning}" + (f"-{args.control}" if args.control != "none" else "")
    else:
        arm = f"own-{args.pruning}"
    arm += f"-{args.train_fraction:g}" if args.train_fraction < 1 else ""
    run_dir = os.path.join(args.logdir, f"{data.name}__{args.exp_name}__{args.arch}__{arm}__{args.seed}")
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {"target": data.name, "arm": arm, "classes": data.classes, "images": list(sizes.values())}
    if source and args.control != "dense":
        settings |= {"source_dataset": source["dataset"], "source_seed": source["seed"]}
        settings |= {"source": os.path.basename(os.path.dirname(os.path.abspath(args.ticket or args.tickets + "/x")))}
    os.makedirs(run_dir, exist_ok=True)
    settings_path, results_path, last_path = (
        os.path.join(run_dir, name) for name in ("hyperparameters.json", "results.csv", "last.pt")
    )
    if os.path.isfile(settings_path):
        try:
            with open(settings_path) as file:
                saved = json.load(file)
        except ValueError as error:
            fail(f"{settings_path}: {error}")
        names = sorted(set(saved) | set(settings))
        differ = [f"{n} {saved.get(n)}, not {settings.get(n)}" for n in names if saved.get(n) != settings.get(n)]
        if differ:
            fail(f"{run_dir} was made with {'; '.join(differ)}: another --exp-name makes another run")
    else:
        with open(settings_path + ".tmp", "w") as file:
            json.dump(settings, file, indent=1)
        os.replace(settings_path + ".tmp", settings_path)
    if args.track:
        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": os.path.basename(run_dir)}
        wandb.init(**project, config=vars(args), sync_tensorboard=True, save_code=True)
    rows = read_rows(results_path)
    done = {row["round"] for row in rows}
    todo = [r for r in (tickets or range(args.rounds)) if r not in done]
    if not todo:
        say(f"{run_dir}: all rounds are done")
        sys.exit()
    checkpoint = {}
    if os.path.isfile(last_path):
        checkpoint = load_file(last_path, {"round", "step", "network", "optimizer"}, "checkpoint")
    say(f"{run_dir}: {'goes on' if done or checkpoint else 'begins'} with round {todo[0]}, on {device}")
    writer = SummaryWriter(run_dir)
    table = "\n".join(f"|{name}|{value}|" for name, value in (vars(args) | settings).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", todo[0])

    # The network. A control that begins at random must not begin with the source's own initial weights, and the last
    # layer is the same in all arms.
    role = "control" if tickets else "source"
    network = make_network(args.arch, len(data.classes), built_for, stream(args.seed, role)).to(device)
    xavier(network.fc, stream(args.seed, "head"))
    initial = clone(network.state_dict())
    forward = torch.compile(network) if args.compile else network
    weights = prunable(network)
    prunable_count, everything = (sum(p.numel() for p in group) for group in (weights.values(), network.parameters()))
    say(f"{args.arch} for images of {args.image_size} pixels: {everything:,} parameters, {prunable_count:,} prunable")
    total = args.epochs * per_epoch

    def ticket_path(r: int) -> str:
        return os.path.join(run_dir, f"round_{r:02d}.pt")

    @torch.no_grad()
    def test(split: str) -> Optional[tuple[float, float]]:
        """Loss and accuracy on a split; None when a signal came."""
        forward.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        everything = torch.arange(len(feeds[split]), device=device)
        for start in range(0, len(everything), max(args.batch_size, 256)):
            images, labels = feeds[split].batch(slice(start, start + max(args.batch_size, 256)), everything)
            if signals:
                return None
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = forward(images)
            right = (logits.argmax(dim=1) == labels).sum()
            totals += torch.stack([F.cross_entropy(logits.float(), labels, reduction="sum"), right]).double()
        loss, accuracy = (totals / len(feeds[split])).tolist()
        return loss, accuracy

    last_line, saved_at = 0.0, time.perf_counter()
    for r in todo:
        # ALGO LOGIC: what the round begins with
        step, rewound = 0, None
        network.load_state_dict(initial)
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        if tickets and tickets[r]:
            masks = plant(network, load_ticket(tickets[r]), args.control, args.seed, tickets[r])
        elif not tickets and r > 0:
            previous, rewound, step = load_ticket(ticket_path(r - 1)), load_ticket(ticket_path(0))["weights"], keep_from
            masks = prune(previous["trained"], previous["mask"], args.pruning, args.prune_fraction)
            network.load_state_dict(rewound)
            apply_masks(network, masks)
        remaining = {name: int(mask.sum()) for name, mask in masks.items()}
        left, sparse = sum(remaining.values()), None
        if left < prunable_count:
            # in the memory order of the weights, or multiplying would be slow
            sparse = list(weights.values()), [torch.empty_like(weights[name]).copy_(masks[name]) for name in weights]
        optimizer = make_optimizer(args, network)
        best, best_state, stale, sums, seconds = [float("inf"), 0.0, 0], None, 0, [0.0, 0], 0.0
        if checkpoint.get("round") == r:
            network.load_state_dict(checkpoint["network"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            step, best, best_state, stale, sums, seconds = (
                checkpoint[name] for name in ("step", "best", "best_state", "stale", "sums", "seconds")
            )
            rewound = checkpoint["rewound"] or rewound
        tag, since, first_step = f"round_{r:02d}", time.perf_counter(), step

        def over() -> bool:
            stopped_early = args.patience and stale >= args.patience and (tickets or rewound)
            return bool(stopped_early) or (step >= total and not sums[1])

        def save_last() -> None:
            """All that the round needs to go on as if it had not been stopped."""
            writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "best_state": best_state}
            state |= {"rewound": None if r else rewound, "best": best, "sums": [float(sums[0]), sums[1]]}
            spent = seconds + time.perf_counter() - since
            save_atomically(state | {"round": r, "step": step, "stale": stale, "seconds": spent}, last_path)

        # ALGO LOGIC: training, with the learning rates and the images that belong to the epoch
        while not over():
            # an epoch that has been begun has sums, also one of which only the validation is missing
            epoch, first_batch = divmod(step - bool(sums[1]), per_epoch)
            first_batch += bool(sums[1])
            rate = args.learning_rate * args.lr_decay ** sum(epoch >= milestone for milestone in args.milestones)
            for group in optimizer.param_groups:
                group["lr"] = rate
            plan = feeds["train"].plan(args.seed, epoch)
            forward.train()
            for batch in range(first_batch, per_epoch):
                if signals:
                    break
                if step == keep_from and rewound is None and not tickets:
                    rewound = clone(network.state_dict())
                part = slice(batch * args.batch_size, (batch + 1) * args.batch_size)
                images, labels = feeds["train"].batch(part, *plan)
                loss = learn(forward, optimizer, sparse, images, labels, amp)
                sums = [sums[0] + loss * len(labels), sums[1] + len(labels)]
                step += 1
                now = time.perf_counter()
                if now - last_line > (1 if sys.stdout.isatty() else 30):
                    last_line, mean = now, float(sums[0]) / sums[1]
                    speed = (step - first_step) * args.batch_size / (now - since)
                    eta = timedelta(seconds=int((total - step) * args.batch_size / speed))
                    say(f"round {r} epoch {epoch + 1}/{args.epochs} {(batch + 1) / per_epoch:.0%}  loss {mean:.4f}  "
                        f"{speed:,.0f} images/s  ETA of the round {eta} at most", stay=False)  # fmt: skip
            found = None if signals else test("val")
            if found is None:
                break
            mean, sums = float(sums[0]) / sums[1], [0.0, 0]
            if not math.isfinite(mean + found[0]):
                fail(f"the loss is {mean} in round {r}, epoch {epoch + 1}: try a lower --learning-rate than {rate:g}")
            for name, value in (("train_loss", mean), ("val_loss", found[0]), ("val_accuracy", found[1])):
                writer.add_scalar(f"{tag}/{name}", value, epoch + 1)
            writer.add_scalar(f"{tag}/learning_rate", rate, epoch + 1)
            stale += 1
            if found[0] < best[0] or not args.patience:
                best, best_state, stale = [*found, epoch + 1], clone(network.state_dict()), 0
            if time.perf_counter() - saved_at > 60:
                save_last()
                saved_at = time.perf_counter()

        # The test images, once a round, with the weights of the lowest validation loss (without --patience the last)
        if over() and not signals:
            network.load_state_dict(best_state)
            found = test("test")
        if signals:
            save_last()
            writer.close()
            say(f"stopped in round {r}, epoch {step // per_epoch + 1}; the same command goes on from there")
            sys.exit(128 + signals[0])
        state = {name: tensor.cpu() for name, tensor in best_state.items()}
        assert all((state[name][~mask.cpu()] == 0).all() for name, mask in masks.items()), "pruned weights are not zero"
        row = {"round": r, "sparsity": 1 - left / prunable_count, "remaining": left, "prunable": prunable_count}
        row |= {"parameters": everything - prunable_count + left, "val_accuracy": best[1], "test_accuracy": found[1]}
        row |= {"val_loss": best[0], "best_epoch": best[2], "epochs": step // per_epoch}
        row |= {"seconds": round(seconds + time.perf_counter() - since, 1)}
        meta = {"arch": args.arch, "dataset": data.name, "image_size": args.image_size, "built_for": built_for}
        meta |= {"classes": data.classes, "mean": moments[0].tolist(), "std": moments[1].tolist(), "seed": args.seed}
        meta |= {name: getattr(args, name) for name in ("pruning", "prune_fraction", "rewind", "train_fraction")} | row
        content = {"mask": {name: mask.cpu() for name, mask in masks.items()}, "trained": state, "meta": meta}
        if not tickets:
            start = {name: tensor.cpu() for name, tensor in rewound.items()}
            start |= {name: start[name] * mask for name, mask in content["mask"].items()}
            save_atomically(content | {"weights": start}, ticket_path(r))
        elif args.save_networks:
            save_atomically(content, os.path.join(run_dir, f"network_{r:02d}.pt"))
        rows = sorted([*rows, row], key=lambda row: row["round"])
        for name in ("sparsity", "remaining", "val_accuracy", "test_accuracy", "best_epoch", "epochs"):
            writer.add_scalar(f"rounds/{name}", row[name], r)
        speed = (step - first_step) * args.batch_size / (time.perf_counter() - since)
        writer.add_scalar("charts/images_per_second", speed, r)
        writer.flush()
        with open(results_path + ".tmp", "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        os.replace(results_path + ".tmp", results_path)
        if os.path.isfile(last_path):
            os.remove(last_path)
        least = min(remaining, key=remaining.get)
        say(f"round {r}: {left:,} of {prunable_count:,} weights (sparsity {row['sparsity']:.4f}, least in {least}: "
            f"{remaining[least]:,}); validation {best[1]:.4f}, test {found[1]:.4f}, after epoch {best[2]} of "
            f"{row['epochs']}; {row['seconds']:,.0f} s, {speed:,.0f} images/s")  # fmt: skip
    writer.close()
    say(f"saved {results_path}" + ("" if tickets else f" and the tickets {ticket_path(0)} to {todo[-1]:02d}"))
