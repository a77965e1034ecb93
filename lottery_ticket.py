# Lottery tickets and their transfer: a network is trained, its smallest weights are pruned, the others are rewound to
# an early point of training, and so on for 31 rounds; the sparse networks found so on natural images are then trained
# on non-natural ones, as in "On the Transferability of Winning Tickets in Non-Natural Image Datasets" (Sabatelli et
# al., VISAPP 2021, arXiv 2005.05232) and "Contributions to Deep Transfer Learning" (M. Sabatelli, 2022, chapter 6).
#
#   python lottery_ticket.py --dataset cifar10 --download --arch conv --rounds 10      find tickets, minutes on a CPU
#   python lottery_ticket.py --tickets runs/cifar10__... --dataset folder:DIR          train all of them on a target
#   python lottery_ticket.py --report runs                                             tables and pictures
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.21", "pillow>=10",
#                 "matplotlib>=3.8"]
# ///
import copy
import csv
import fcntl
import hashlib
import io
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models
from torchvision.transforms import v2


@dataclass
class Args:
    # The run; the same command again, or --resume, goes on with a run that was stopped
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the split, the initial weights, the order of the images and their crops
    cuda: bool = True  # train on CUDA when there is a GPU
    amp: bool = True  # on CUDA, compute in bfloat16 where that is safe (autocast)
    workers: int = 0  # threads that decode the images of a folder, once (0: Python's choice)
    logdir: str = "runs"  # folder in which the run's own folder is made, or found again
    resume: str | None = None  # run (folder or checkpoint) to continue with its flags; --rounds may be another
    track: bool = False  # mirror the run to Weights and Biases (`pip install wandb`; set WANDB_PROJECT, WANDB_ENTITY)

    # Data
    dataset: str = "cifar10"  # cifar10, cifar100, fashion-mnist, mnist, or folder:DIR (a folder a class, or a split)
    data_dir: str = "data"  # where torchvision's sets lie
    download: bool = False  # download the set into --data-dir if it is not there
    image_size: int | None = None  # side of the images for the network (None: the ticket's, the set's, 224 for folders)
    augment: Literal["none", "crop", "crop-flip"] = "crop"  # training images: the centre, random crops, also mirrored
    train_fraction: float = 1.0  # share of the training images of every class; the paper tries 0.75, 0.5 and 0.25

    # The network and its pruning. With tickets, None stands for what the ticket says.
    arch: Literal["resnet50", "resnet18", "conv", "mlp"] | None = None  # (None: resnet50, the paper's)
    pruning: Literal["global", "channel"] | None = None  # least weights of all layers (None), or channels of each
    prune_fraction: float | None = None  # share of the remaining weights (channels) that a round prunes (None: 0.2)
    rounds: int = 31  # rounds of training; the first one is that of the unpruned network
    rewind: str | None = None  # the point of round 0 to which later rounds rewind: 2ep (None), 500it or 2ep500it

    # Training
    epochs: int | None = None  # the last epoch of every round (None: 90; conv and mlp: 6)
    patience: int = 5  # epochs without a lower validation loss after which a round ends (0: never; keeps the last)
    batch_size: int = 64  # images per update
    learning_rate: float = 0.1  # of SGD
    milestones: list[int] | None = None  # epochs after which the learning rate falls tenfold (None: 50 60 75 of 90)
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-5  # of weights with two dimensions and more; never of biases and normalisation

    # Transfer, and what tickets are compared with
    tickets: str | None = None  # run whose tickets are trained on --dataset, or one of its round_RR.pt; new last layer
    control: Literal["none", "dense", "reinit", "random-mask", "trained", "lr-rewinding"] = "none"
    """dense: unpruned, random weights; with --tickets: the ticket with random weights, a random mask or the weights
    after training; without: weights stay trained, the learning rate alone is rewound (Renda et al., ICLR 2020)"""
    save_networks: bool = False  # keep the network trained on --dataset, of every ticket, as network_RR.pt

    # Instead of training
    report: list[str] = field(default_factory=list)  # folders of runs, or with runs in them, to compare
    out: str = "."  # with --report: folder for the pictures


SPLITS = ("train", "val", "test")
# folders that stand for a split
FOLDERS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
TORCHVISION = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion-mnist": datasets.FashionMNIST,
               "mnist": datasets.MNIST}  # fmt: skip
TICKET = ("mask", "weights", "trained", "meta")
# Smallest and largest value of numeric flags
BOUNDS = {"seed": (0, 2**63), "workers": (0, 1024), "image_size": (2, 4096), "train_fraction": (1e-6, 1),
          "prune_fraction": (1e-6, 0.999), "rounds": (1, 100), "epochs": (1, 10**6), "patience": (0, 10**6),
          "batch_size": (2, 10**6), "learning_rate": (0, 1e15), "momentum": (0, 1), "weight_decay": (0, 1)}  # fmt: skip
NO_EFFECT = "cuda amp workers logdir track dataset data_dir rounds tickets save_networks"  # may change as a run goes on
FREE = NO_EFFECT + " seed source_seed source_run moments"  # what runs of one arm may differ in


def fail(message: str) -> None:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def random_stream(*key) -> torch.Generator:
    """A CPU generator for every purpose: what is drawn for one does not depend on what is drawn for another."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


def save_atomically(path: str, write) -> None:
    """`write(temporary path)`, then rename; nothing half written is left, also when the disk is full."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        fail(f"cannot write {path}: {error}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def save_table(path: str, rows: list[dict]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([rows[0], *(row.values() for row in rows)])
    save_atomically(path, lambda temporary: Path(temporary).write_text(text.getvalue(), errors="surrogateescape"))


# Data ----------------------------------------------------------------------------------------------------------------
def rank_in_class(labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Of every image its place in a random order of its class, that class' size and a tenth of it: `(N,)` each."""
    rank, size = torch.zeros_like(labels), torch.zeros_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        rank[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members))
        size[members] = len(members)
    return rank, size, (size / 10).round().maximum(size >= 3)  # a class of three images has one in each split


def open_image(path: str, side: int) -> torch.Tensor:
    """The image upright, its shorter side resized to `side` and the middle cut out: uint8 `(side, side, 3)`."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))  # JPEGs are decoded at the fraction that suffices
        if image.mode[0] in "IF" or max(image.size) > 100 * min(image.size):
            raise ValueError(f"mode {image.mode}, {image.size}: 8 bits a channel and sides to 1:100 are expected")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")  # over white, as on paper
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    return v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])(image).permute(1, 2, 0)


def read_folder(folder: str, side: int, workers: int) -> tuple[list[tuple[str, str, int]], torch.Tensor]:
    """(path, class, number of the split) and pixels of every image; of a folder per class, or of splits with those."""
    names = [path.name for path in sorted(Path(folder).glob("*")) if path.name.lower() in FOLDERS and path.is_dir()]
    names = names if {0} < {FOLDERS[name.lower()] for name in names} else [""]
    try:
        roots = {name: datasets.ImageFolder(os.path.join(folder, name), allow_empty=True) for name in names}
    except OSError as error:
        fail(f"--dataset folder:{folder}: {error}")
    found = [(path, root.classes[i], FOLDERS.get(name.lower(), 0)) for name, root in roots.items()
             for path, i in root.samples
             if f"{os.sep}." not in os.sep + os.path.relpath(path, root.root)]  # fmt: skip
    found.sort(key=lambda image: (-len(image[0]), image[0]))  # of an image and links to it the shortest path counts
    found = sorted({os.path.realpath(image[0]): image for image in found}.values())
    pixels, unreadable = torch.zeros(len(found), side, side, 3, dtype=torch.uint8), {}

    def read(i: int) -> None:
        try:
            pixels[i] = open_image(found[i][0], side)
        except Exception as error:  # Pillow's plugins raise whatever their formats make them
            unreadable[i] = f"{found[i][0]!r}: {error}"

    with ThreadPoolExecutor(workers or None) as pool:  # Pillow does without the interpreter's lock
        list(pool.map(read, range(len(found))))
    if unreadable:
        print(f"{len(unreadable):,} images cannot be read and are left out:", *unreadable.values(), sep="\n    ")
    readable = [i for i in range(len(found)) if i not in unreadable]
    return [found[i] for i in readable], pixels[readable]


def load_data(args: Args) -> tuple[list[str], dict[str, tuple[torch.Tensor, torch.Tensor]], list[dict]]:
    """Class names, {split: (images uint8 `(N, S, S, C)`, labels int64 `(N,)`)} and split.csv of a folder."""
    found = []
    if args.dataset.startswith("folder:"):
        folder, args.image_size = args.dataset.removeprefix("folder:"), args.image_size or 224
        found, pixels = read_folder(folder, round(args.image_size * 8 / 7), args.workers)  # with a margin for crops
        classes = sorted({name for _, name, _ in found})
        labels = torch.tensor([classes.index(name) for _, name, _ in found])
        split = torch.tensor([i for *_, i in found])
    elif args.dataset in TORCHVISION:
        try:
            parts = [TORCHVISION[args.dataset](args.data_dir, train, download=args.download) for train in (True, False)]
        except (RuntimeError, OSError) as error:
            fail(f"--data-dir {args.data_dir}: {error}")
        labels = torch.cat([torch.as_tensor(part.targets) for part in parts])
        pixels = torch.cat([torch.as_tensor(part.data) for part in parts])
        pixels = pixels.view(*pixels.shape[:3], -1)  # grey images get a channel
        classes, split = list(parts[0].classes), torch.tensor([0] * len(parts[0]) + [2] * len(parts[1]))
        args.image_size = args.image_size or pixels.shape[1]
    else:
        fail(f"--dataset {args.dataset}: {', '.join(TORCHVISION)} or folder:DIR is expected")
    train = (split == 0).nonzero()[:, 0]  # of which a tenth each goes to the splits that are not given
    rank, _, tenth = rank_in_class(labels[train], random_stream(args.seed, "split"))
    for n, i in enumerate([i for i in (2, 1) if i not in split]):
        split[train[(rank >= n * tenth) & (rank < (n + 1) * tenth)]] = i
    members = {name: (split == i).nonzero()[:, 0] for i, name in enumerate(SPLITS)}
    if len(classes) < 2 or any(len(labels[chosen].unique()) < len(classes) for chosen in members.values()):
        fail(f"--dataset {args.dataset}: two classes or more are needed, each with images in train, val and test")
    rows = [{"path": os.path.relpath(found[i][0], folder), "split": name, "class": found[i][1]}
            for name in SPLITS for i in members[name].tolist() if found]  # fmt: skip
    if args.train_fraction < 1:
        rank, size, _ = rank_in_class(labels[members["train"]], random_stream(args.seed, "fraction"))
        members["train"] = members["train"][rank < (size * args.train_fraction).round().clamp(min=1)]
    return classes, {name: (pixels[chosen], labels[chosen]) for name, chosen in members.items()}, rows


class Images:
    """One split on the device, of which batches are cut out and normalised there."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, moments: tuple, crop: int, size: int, augment: str):
        """pixels uint8 `(N, S, S, C)`, of which a crop is resized to `size`; moments: mean and std, `(3,)` each."""
        self.labels, self.crop, self.size, self.augment = labels, crop, size, augment
        self.mean, self.std = (value.view(1, 3, 1, 1) for value in moments)
        if pixels.shape[1] == crop and augment != "none":
            pixels = F.pad(pixels, (0, 0, *[crop // 8] * 4))
        self.span = pixels.shape[1] - crop
        # (image, top, left, row, column, channel) without a copy, so that cutting out is one quick look-up
        self.windows = pixels.unfold(1, crop, 1).unfold(2, crop, 1).permute(0, 1, 2, 4, 5, 3)

    def plan_epoch(self, seed: int, epoch: int) -> tuple[torch.Tensor, ...]:
        """The order of the images `(N,)`, corners of their crops `(N, 2)` and which are mirrored `(N,)`."""
        generator, n = random_stream(seed, "order", epoch), len(self.labels)
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
    """Mean and standard deviation of each of three channels over uint8 `(N, S, S, C)`: float32 `(3,)` on its device."""
    sums, squares, count = 0.0, 0.0, pixels[..., 0].numel()
    for values in map(torch.Tensor.double, pixels.split(100)):
        sums, squares = sums + values.sum(dim=(0, 1, 2)), squares + values.square().sum(dim=(0, 1, 2))
    std = (squares / count - (sums / count).square()).clamp(min=1.0).sqrt()  # at least one grey level
    return (sums / count).float().expand(3), std.float().expand(3)


# The networks, all of which end in a linear layer `fc` ---------------------------------------------------------------
def make_network(arch: str, classes: int, image_size: int, generator, head=None, device="cpu") -> nn.Module:
    """The network with Xavier-uniform weights that `generator` draws on the CPU, or `head` those of the last layer."""
    network = nn.Sequential()
    if arch in ("resnet50", "resnet18"):
        network = getattr(models, arch)(weights=None, num_classes=classes)
        if image_size <= 64:  # or little would be left of the image after the stem
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    elif arch == "mlp":  # LeNet-300-100 (LeCun et al., 1998) on grey images
        layers = [nn.AvgPool3d((3, 1, 1)), nn.Flatten(), nn.Linear(image_size**2, 300), nn.ReLU()]
        network.trunk = nn.Sequential(*layers, nn.Linear(300, 100), nn.ReLU())
        network.fc = nn.Linear(100, classes)
    else:
        network.trunk = nn.Sequential()
        for one, two in ((3, 32), (32, 64), (64, 128), (128, 256)):
            network.trunk.extend([nn.Conv2d(one, two, 3, 1, 1, bias=False), nn.BatchNorm2d(two), nn.ReLU()])
            network.trunk.append(nn.MaxPool2d(2, ceil_mode=True))
        network.trunk.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        network.fc = nn.Linear(256, classes)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight, generator=head if head and module is network.fc else generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network.to(device, memory_format=torch.channels_last)


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning may take: of convolutions and linear layers but the last, whose classes change."""
    return {name: p for name, p in network.named_parameters() if p.ndim > 1 and name != "fc.weight"}


# Pruning and training ------------------------------------------------------------------------------------------------
def keep_largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Marks the n largest of scores `(N,)`: bool `(N,)`. Of equal ones the later are kept, on every device."""
    return scores.argsort(stable=True).argsort() >= len(scores) - n


def prune(weights: dict, masks: dict, kind: str, fraction: float) -> dict[str, torch.Tensor]:
    """The next round's masks: exactly `fraction` of what remains is pruned, rounded, and never all of a layer."""
    # As torch.nn.utils.prune has them, which would rename the parameters and let "global" empty a layer
    if kind == "channel":
        new = {}
        for name, mask in masks.items():
            scores = weights[name].abs().flatten(1).sum(dim=1).masked_fill(~mask.flatten(1).any(dim=1), -1.0)
            remaining = int((scores >= 0).sum())
            kept = keep_largest(scores, max(remaining - round(fraction * remaining), 1))
            new[name] = mask & kept.view(-1, *[1] * (mask.ndim - 1))
        return new
    scores = [weights[name].abs().masked_fill(~mask, -1.0).flatten() for name, mask in masks.items()]
    for values in scores:  # the largest weight of a layer outranks all others
        values[(values == values.max()).nonzero()[-1, 0]] = torch.inf
    remaining = sum(int(mask.sum()) for mask in masks.values())
    kept = keep_largest(torch.cat(scores), max(remaining - round(fraction * remaining), len(masks)))
    layers = kept.split([mask.numel() for mask in masks.values()])
    return {name: layer.reshape(mask.shape) for layer, (name, mask) in zip(layers, masks.items())}


def random_masks(masks: dict, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Masks that keep as many weights (channels) of every layer, at random; nested over the rounds of a seed."""
    new = {}
    for name, mask in masks.items():
        ranked = mask.flatten(1).any(dim=1) if kind == "channel" else mask.flatten()
        scores = torch.rand(len(ranked), generator=random_stream(seed, "mask", name))
        kept = keep_largest(scores, int(ranked.sum()))
        new[name] = kept.view(len(mask), -1).expand_as(mask.flatten(1)).reshape(mask.shape)
    return new


def make_optimizer(args: Args, network: nn.Module) -> torch.optim.Optimizer:
    decayed, rest = ([p for p in network.parameters() if (p.ndim > 1) == several] for several in (True, False))
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, args.learning_rate, momentum=args.momentum, nesterov=args.momentum > 0, fused=True)


def learn(network: nn.Module, optimizer, sparse: tuple[list, list], images, labels, amp: bool) -> torch.Tensor:
    """One update; returns the loss. Gradients of zero keep pruned weights, and their momentum, at exactly zero."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp and images.is_cuda):
        loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    weights, masks = sparse
    torch._foreach_mul_([weight.grad for weight in weights], masks)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(network: nn.Module, split: Images) -> torch.Tensor:
    """Loss and accuracy on a split: float64 `(2,)` on the device."""
    network.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    for in_order in torch.arange(len(split.labels), device=split.labels.device).split(256):
        images, labels = split.batch(slice(None), in_order)
        logits = network(images)
        right = (logits.argmax(dim=1) == labels).sum()
        totals += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right]).double()
    return totals / len(split.labels)


def train_round(
    args: Args, r: int, network: nn.Module, masks: dict, images: dict, per_epoch: int, keep_from: int,
    rounds_to_come: int, writer: SummaryWriter, state: dict, checkpoint: str,
) -> dict:  # fmt: skip
    """Train round `r` from its beginning, or from where `state` (the checkpoint's) has it, which is kept up to date.

    Returns {best: scalars and weights, start: the weights at update `keep_from`, entries: of epochs}.
    """
    weights, optimizer = prunable(network), make_optimizer(args, network)
    step = keep_from if r > 0 else 0
    total = args.epochs * per_epoch
    # the masks in the memory order of the weights, or multiplying would be slow
    sparse = list(weights.values()), [torch.empty_like(w).copy_(masks[name]) for name, w in weights.items()]
    best, start, entries = {"val_loss": np.inf, "epoch": keep_from // per_epoch}, None, []
    if state["round"] and state["round"]["round"] == r:
        best, start, entries = (state["round"][name] for name in ("best", "start", "entries"))
        network.load_state_dict(state["round"]["network"])
        optimizer.load_state_dict(state["round"]["optimizer"])
        step = entries[-1]["epoch"] * per_epoch
    first_step, printed_at, begun = step, -np.inf, time.perf_counter()
    while step < total and not 0 < args.patience <= step // per_epoch - best["epoch"]:
        epoch, first_batch = divmod(step, per_epoch)
        rate = args.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
        for group in optimizer.param_groups:
            group["lr"] = rate
        plan = images["train"].plan_epoch(args.seed, epoch)
        network.train()
        loss_sum, seen = 0.0, 0
        for batch in range(first_batch, per_epoch):
            if step == keep_from:
                start = copy.deepcopy(network.state_dict())
            part = slice(batch * args.batch_size, (batch + 1) * args.batch_size)
            pictures, labels = images["train"].batch(part, *plan)
            loss = learn(network, optimizer, sparse, pictures, labels, args.amp)
            loss_sum, seen, step = loss_sum + loss * len(labels), seen + len(labels), step + 1
            if time.perf_counter() - printed_at > 10:
                printed_at = time.perf_counter()
                speed = (step - first_step) / (printed_at - begun)
                eta = timedelta(seconds=int((total - step + rounds_to_come * (total - keep_from)) / speed))
                print(f"round {r} epoch {epoch + 1}/{args.epochs} {(batch + 1) / per_epoch:.0%}  loss {loss:.4f}  "
                      f"{speed * args.batch_size:,.0f} images/s  ETA of the run {eta} at most", flush=True)  # fmt: skip
        entry = {"round": r, "epoch": epoch + 1, "train_loss": float(loss_sum) / seen, "learning_rate": rate}
        entry["val_loss"], entry["val_accuracy"] = evaluate(network, images["val"]).tolist()
        if not np.isfinite(entry["train_loss"] + entry["val_loss"]):
            fail(f"the loss is not finite in round {r}, epoch {epoch + 1}: try a lower --learning-rate")
        entries.append(entry)
        if step > keep_from and (entry["val_loss"] < best["val_loss"] or not args.patience):
            best = entry | {"network": copy.deepcopy(network.state_dict())}
        state["round"] = {"round": r, "best": best, "start": start, "entries": entries, "network": network.state_dict(),
                          "optimizer": optimizer.state_dict()}  # fmt: skip
        save_atomically(checkpoint, lambda path: torch.save(state, path))
        for name in ("train_loss", "val_loss", "val_accuracy", "learning_rate"):  # once a checkpoint has the epoch
            writer.add_scalar(f"round_{r:02d}/{name}", entry[name], epoch + 1)
        writer.flush()
    return state["round"]


# Tickets -------------------------------------------------------------------------------------------------------------
def load_file(path: str, needed: tuple[str, ...]) -> dict:
    """A checkpoint, or a ticket {mask: bool by name, weights: at the round's start, trained: at its end, meta}."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: content[name] for name in needed}
    except Exception:  # torch's own message advises to load with weights_only=False
        fail(f"{path} is missing, damaged or not a file of this script")


def start_from_ticket(network: nn.Module, path: str, control: str, seed: int) -> dict[str, torch.Tensor]:
    """Put the ticket, or what `control` has in its place, into a random network but its `fc`; returns the masks."""
    ticket = load_file(path, TICKET)
    masks, state = ticket["mask"], ticket["trained" if control == "trained" else "weights"]
    if control == "random-mask":
        masks = random_masks(masks, ticket["meta"]["pruning"], seed)
        # the weights that the mask may need and the ticket has pruned
        state = load_file(os.path.join(os.path.dirname(path), "round_00.pt"), TICKET)["weights"]
    own = network.state_dict()
    state = own if control == "reinit" else state | {name: own[name] for name in ("fc.weight", "fc.bias")}
    network.load_state_dict(state | {name: state[name].cpu() * mask for name, mask in masks.items()})
    return masks


# Reporting -----------------------------------------------------------------------------------------------------------
# Table of the paper: test accuracy in %, its standard deviation and the best ticket's sparsity, of the unpruned network
# and of tickets of CIFAR-10, CIFAR-100, Fashion-MNIST and the target itself
PUBLISHED = {
    "human-lba": "71.85 ± 1.12, 79.17 ± 1.85 (.945), 76.97 ± .73 (.79), 77.32 ± 1.85 (.886), 81.72 ± .39 (.832)",
    "lung-tissues": "84.75 ± .81, 88.90 ± 1.97 (.977), 87.61 ± .90 (.977), 87.61 ± .11 (.672), 90.48 ± .16 (.965)",
    "mouse-lba": "48.17 ± 1.18, 74.20 ± 2.04 (.972), 57.42 ± .48 (.893), 52.27 ± 1.73 (.738), 68.20 ± 3.79 (.931)",
    "bone-marrow": "64.66 ± 1.36, 71.75 ± 3.36 (.866), 69.87 ± .39 (.988), 68.77 ± .39 (.931), 72.55 ± .46 (.914)",
    "artist-1": "45.88 ± .42, 66.58 ± 1.54 (.972), 65.55 ± 1.79 (.993), 63.88 ± .12 (.991), 58.74 ± 1.92 (.931)",
    "type": "41.36 ± 2.31, 58.63 ± 2.97 (.991), 60.56 ± .44 (.931), 58.92 ± .59 (.995), 50.44 ± 2.23 (.963)",
}
T95 = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 1 to 9 degrees of freedom, more


def mean_and_half(shares: list[float]) -> tuple[float, float]:
    """The mean, in percent, and half of its 95 % interval (Student's t; 0 for a single value)."""
    n, mean = len(shares), 100 * np.mean(shares)
    half = 100 * T95[min(n, 10) - 2] * np.std(shares, ddof=1) / np.sqrt(n) if n > 1 else 0.0
    return mean, half


def shown(shares: list[float]) -> str:
    mean, half = mean_and_half(shares)
    return f"{mean:.2f} ± {half:.2f}" if half else f"{mean:.2f}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print("\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n")


def read_settings(run_dir: str) -> dict:
    try:
        settings = json.loads(Path(run_dir, "hyperparameters.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{run_dir} is not a run of this script: {error!r} in hyperparameters.json")
    return settings if "arm" in settings else fail(f"{run_dir} is not a run of this script: it has no arm")


def difference(one: dict, other: dict, free: str = FREE) -> str:
    """The flags that change results and are not the same in the settings of two runs."""
    if one.get("control") == "dense":  # which prunes nothing
        free += " pruning prune_fraction rewind"
    names = (one.keys() & other.keys()) - set(free.split())  # those of an earlier version may lack some
    return ", ".join(sorted(name for name in names if one[name] != other[name]))


def read_runs(folders: list[str]) -> dict[str, dict[str, tuple[list[dict], dict[int, dict[str, list[float]]]]]]:
    """{target: {arm: (settings of every seed, {round: {column: a value for every seed}})}}"""
    found = {}
    paths = sorted({path.resolve() for folder in folders for path in Path(folder).rglob("results.csv")})
    several = len({read_settings(path.parent)["arch"] for path in paths}) > 1
    for path in paths:
        settings = read_settings(path.parent)
        arm = settings["arm"]
        arm += f" ({settings['exp_name']})" if settings["exp_name"] != Args.exp_name else ""
        arm += f" ({settings['arch']})" if several else ""
        runs, curve = found.setdefault(settings["target"], {}).setdefault(arm, ([], {}))
        if settings["seed"] in [other["seed"] for other in runs]:
            fail(f"{path}: there is another run of the same arm and seed")
        if runs and (differing := difference(runs[0], settings)):
            fail(f"{path} and another run of the same arm differ in {differing}")
        runs.append(settings)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                columns = curve.setdefault(int(row["round"]), {})
                for name, value in row.items():
                    columns.setdefault(name, []).append(float(value))
    if not found:
        fail(f"--report {' '.join(folders)}: no runs with results there")
    return found


def report(folders: list[str], out: str) -> None:
    """Print a table per target and draw its picture, lottery_TARGET.png."""
    os.makedirs(out, exist_ok=True)
    for target, arms in sorted(read_runs(folders).items()):
        arms = dict(sorted(arms.items(), key=lambda item: (item[0][:5] != "dense", item[0][:3] != "own", item[0])))
        curves = {}
        for arm, (runs, curve) in arms.items():
            rounds = [r for r in sorted(curve) if len(curve[r]["sparsity"]) == len(runs)]  # that all seeds have
            curves[f"{arm}, n = {len(runs)}"] = {r: curve[r] for r in rounds or fail(f"{arm}: no round of all seeds")}
        print(f"### {target}: test accuracy in %, mean ± half of the 95 % interval over seeds\n")
        rows = []
        for r in sorted(set().union(*curves.values())):
            sparsities = {f"{value:.3f}" for curve in curves.values() if r in curve for value in curve[r]["sparsity"]}
            accuracies = [shown(curve[r]["test_accuracy"]) if r in curve else "–" for curve in curves.values()]
            rows.append([str(r), " / ".join(sorted(sparsities)), *accuracies])
        print_table(["round", "sparsity", *curves], rows)
        published = PUBLISHED.get(re.sub(r"[\s_]+", "-", target.lower()), "").split(", ")
        published, rows = dict(zip(["dense", "cifar10", "cifar100", "fashion-mnist", "own"], published)), []
        for arm, curve in zip(arms, curves.values()):
            bests = [max(curve.values(), key=lambda row: np.mean(row[f"{s}_accuracy"])) for s in ("val", "test")]
            cells = [f"{shown(best['test_accuracy'])} ({np.mean(best['sparsity']):.3f})" for best in bests]
            source = re.fullmatch(r"(.+?)(-global|-channel)?( \(.+\))?", arm)[1]  # controls are not published
            rows.append([arm, *cells, published.get(source) or "–"])
        head = ["best ticket (its sparsity)", "chosen on validation", "highest on test, as published", "published"]
        print_table(head, rows)
        axes = Figure(figsize=(8.5, 4.2), layout="constrained").subplots()
        for label, curve in curves.items():
            left = [100 * (1 - np.mean(columns["sparsity"])) for columns in curve.values()]
            means, halves = zip(*(mean_and_half(columns["test_accuracy"]) for columns in curve.values()))
            bars = axes.errorbar(left, means, halves, marker=".", capsize=2, label=label.replace("$", r"\$"))
            if label.startswith("dense"):  # to be compared with all sparsities
                axes.axhline(means[0], color=bars[0].get_color(), linestyle="--")
        axes.set(title=target.replace("$", r"\$"), xscale="log", xlabel="weights left, %", ylabel="accuracy, %")
        axes.invert_xaxis()
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        picture = os.path.join(out, f"lottery_{target}.png".replace(" ", "_"))
        save_atomically(picture, lambda path: axes.figure.savefig(path, format="png"))


def draw_curves(run_dir: str, rows: list[dict], history: list[dict]) -> None:
    """curves.png: the losses of every round by epoch."""
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for row in rows:
        entries = [entry for entry in history if entry["round"] == row["round"]]
        epochs, color = [entry["epoch"] for entry in entries], colormaps["viridis"](row["sparsity"])
        axes.plot(epochs, [entry["train_loss"] for entry in entries], color=color, linestyle=":")
        axes.plot(epochs, [entry["val_loss"] for entry in entries], color=color, label=f"round {row['round']}")
    axes.set(xlabel="epoch", ylabel="loss", yscale="log", title="dotted: training, solid: validation")
    axes.legend(fontsize=6, ncols=2)
    save_atomically(os.path.join(run_dir, "curves.png"), lambda path: axes.figure.savefig(path, format="png"))


if __name__ == "__main__":
    about = "Find lottery tickets on one set of images and train them on another. A first run, minutes on a CPU: "
    about += "python lottery_ticket.py --dataset cifar10 --download --arch conv --rounds 10"
    args = tyro.cli(Args, description=about)
    run_dir = args.resume
    if run_dir:
        run_dir = os.path.dirname(os.path.abspath(run_dir)) if os.path.isfile(run_dir) else run_dir
        args = tyro.cli(Args, default=Args(**{k: v for k, v in read_settings(run_dir).items() if k in vars(args)}))
    if args.report:
        sys.exit(report(args.report, args.out))
    for name, (low, high) in BOUNDS.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            fail(f"--{name.replace('_', '-')} must be between {low} and {high}, not {getattr(args, name)}")
    if os.path.basename(args.exp_name) != args.exp_name:
        fail(f"--exp-name {args.exp_name} is not the name of a file")
    if args.control not in ("none", "dense") and bool(args.tickets) == (args.control == "lr-rewinding"):
        fail(f"--control {args.control} is for runs {'without' if args.tickets else 'with'} --tickets")

    # The tickets, {round: path}, and what they say about the network
    tickets, source = {}, {}
    if args.tickets:
        for path in sorted(map(str, Path(args.tickets).glob("round_*.pt"))) or [args.tickets]:
            source = load_file(path, TICKET)["meta"]
            tickets[source["round"]] = path
    for name, default in {"arch": "resnet50", "pruning": "global", "prune_fraction": 0.2, "rewind": "2ep"}.items():
        if source and getattr(args, name) not in (None, source[name]):
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {args.tickets} has {source[name]}")
        setattr(args, name, getattr(args, name) or source.get(name, default))
    if args.control == "random-mask" and source["control"] == "lr-rewinding":
        fail("--control random-mask: of tickets of lr-rewinding it would change the weights as well")
    args.image_size = args.image_size or source.get("image_size")
    args.epochs = args.epochs or (6 if args.arch in ("conv", "mlp") else 90)
    args.milestones = args.milestones or sorted({round(args.epochs * share / 90) for share in (50, 60, 75)})
    built_for = source.get("built_for")  # the size of images, on which the first layers depend
    if args.control == "dense":
        tickets, source = {0: None}, {}

    # TRY NOT TO MODIFY: device, and signals that end the run as Ctrl-C does unless nohup ignores them
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    args.amp = args.amp and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)

    # Data
    classes, parts, split_rows = load_data(args)
    parts = {split: [tensor.contiguous().to(device) for tensor in parts[split]] for split in SPLITS}
    moments = pixel_statistics(parts["train"][0])
    crop = args.image_size if split_rows else parts["train"][0].shape[1]  # folders were read with a margin for crops
    augment = {"train": args.augment, "val": "none", "test": "none"}
    images = {split: Images(*parts[split], moments, crop, args.image_size, augment[split]) for split in SPLITS}
    per_epoch, rest = divmod(len(images["train"].labels), args.batch_size)
    per_epoch += rest > 1  # one image alone is no batch, as batch normalisation needs two values
    rewind = re.fullmatch(r"(?=.)(?:(\d+)ep)?(?:(\d+)it)?", args.rewind)
    if not rewind:
        fail(f"--rewind {args.rewind}: epochs (2ep) or updates (500it) are expected")
    keep_from = 0 if tickets else int(rewind[1] or 0) * per_epoch + int(rewind[2] or 0)
    if keep_from >= args.epochs * per_epoch:
        fail(f"--rewind {args.rewind} is {keep_from:,} updates, and a round has {args.epochs * per_epoch:,}")

    # TRY NOT TO MODIFY: the run's folder, which one process at a time may write, and its settings
    target = os.path.basename(os.path.abspath(args.dataset.removeprefix("folder:")))
    drawn = split_rows and FOLDERS.get(split_rows[-1]["path"].split(os.sep)[0].lower()) != 2  # the last is of the test
    if drawn and source.get("dataset") == target:
        test_images = {row["path"] for row in split_rows if row["split"] == "test"}
        theirs = Path(tickets[source["round"]]).with_name("split.csv")
        leak = source["seed"] != args.seed  # all that can be asked of a ticket without its run's split
        if theirs.is_file():  # another seed, or new images
            saved = csv.DictReader(theirs.open(newline="", errors="surrogateescape"))
            leak = any(row["path"] in test_images for row in saved if row["split"] != "test")
        if leak:
            fail(f"{theirs}, of --seed {source['seed']}: the tickets saw test images of this run's split")
    if args.arch == "mlp" and built_for not in (None, args.image_size):
        fail(f"--image-size {args.image_size}: the tickets of this mlp are for {built_for} pixels")
    arm = "dense" if args.control == "dense" else f"{source.get('dataset', 'own')}-{args.pruning}"
    variant = source.get("arm", "").removeprefix(f"own-{args.pruning}").strip("-")  # of the tickets' run
    arm += f"-of-{variant}" if variant else ""
    arm += f"-{args.control}" if args.control not in ("none", "dense") else ""
    arm += f"-{args.train_fraction:g}" if args.train_fraction < 1 else ""
    run_name = f"{target}__{args.exp_name}__{args.arch}__{arm}__{args.seed}"
    run_dir = run_dir or os.path.join(args.logdir, run_name)
    try:
        os.makedirs(run_dir, exist_ok=True)
        lock = open(os.path.join(run_dir, ".lock"), "w")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        fail(f"{run_dir} cannot be written, or another process does it: {error}")
    checkpoint, state = os.path.join(run_dir, "last.pt"), {"rows": [], "history": [], "round": None}
    settings = {name: value for name, value in vars(args).items() if name not in ("resume", "download")}
    settings |= {"target": target, "arm": arm, "classes": classes, "built_for": built_for or args.image_size}
    settings["images"] = [len(images[split].labels) for split in SPLITS]
    settings["moments"] = [round(value) for value in torch.cat(moments).tolist()]  # tells other images of the same name
    if source:
        settings["source_run"] = Path(next(iter(tickets.values()))).absolute().parent.name
        settings |= {f"source_{k}": source.get(k) for k in "learning_rate batch_size milestones augment".split()}
    if os.path.isfile(checkpoint):
        state = load_file(checkpoint, tuple(state))
        if differing := difference(json.loads(json.dumps(settings)), read_settings(run_dir), NO_EFFECT):
            fail(f"{run_dir} was made with other flags: {differing}; another --exp-name makes another run")
    text = json.dumps(settings, indent=1)
    save_atomically(f"{run_dir}/hyperparameters.json", lambda path: Path(path).write_text(text))
    if split_rows:
        save_table(f"{run_dir}/split.csv", split_rows)
    if args.track:
        import wandb

        wandb.init(name=os.path.basename(run_dir), config=settings, sync_tensorboard=True, save_code=True)

    # ALGO LOGIC: the network. What is new on a target, a control's weights and the last layer of all arms, must not be
    # what the source began with.
    purposes = ("control", "new head") if tickets else ("source", "head")
    generators = (random_stream(args.seed, purpose) for purpose in purposes)
    network = make_network(args.arch, len(classes), settings["built_for"], *generators, device)
    initial = copy.deepcopy(network.state_dict())
    prunable_count = sum(p.numel() for p in prunable(network).values())
    everything = sum(p.numel() for p in network.parameters())
    done = {row["round"] for row in state["rows"]}
    to_do = [r for r in (tickets or range(args.rounds)) if r < args.rounds and r not in done]
    if not done and not to_do:
        fail(f"--rounds {args.rounds}: the tickets are of rounds {', '.join(map(str, tickets))}")
    print(f"{run_dir}: {len(done)} rounds are done, {len(to_do)} to do, on {device}", flush=True)
    writer = SummaryWriter(run_dir)
    try:
        for n, r in enumerate(to_do, 1):
            # ALGO LOGIC: what the round begins with
            network.load_state_dict(initial)
            masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in prunable(network).items()}
            if tickets.get(r):
                masks = start_from_ticket(network, tickets[r], args.control, args.seed)
            elif r > 0:
                first, previous = (load_file(f"{run_dir}/round_{i:02d}.pt", TICKET) for i in (0, r - 1))
                masks = prune(previous["trained"], previous["mask"], args.pruning, args.prune_fraction)
                weights = previous["trained"] if args.control == "lr-rewinding" else first["weights"]
                network.load_state_dict(weights | {name: weights[name] * mask for name, mask in masks.items()})

            # ALGO LOGIC: training
            end = train_round(
                args, r, network, masks, images, per_epoch, keep_from, len(to_do) - n, writer, state, checkpoint
            )

            # The test images, once, with the weights of the lowest validation loss (without --patience the last)
            best = end["best"]
            network.load_state_dict(best["network"])
            _, test_accuracy = evaluate(network, images["test"]).tolist()
            start, trained = ({k: v.cpu() for k, v in part.items()} for part in (end["start"], best["network"]))
            assert all((trained[name][~mask] == 0).all() for name, mask in masks.items()), "pruned weights moved"
            remaining = sum(int(mask.sum()) for mask in masks.values())
            row = {"round": r, "sparsity": 1 - remaining / prunable_count, "remaining": remaining,
                   "prunable": prunable_count, "parameters": everything - prunable_count + remaining,
                   "val_accuracy": best["val_accuracy"], "test_accuracy": test_accuracy, "val_loss": best["val_loss"],
                   "best_epoch": best["epoch"], "epochs": end["entries"][-1]["epoch"]}  # fmt: skip
            meta = settings | row | {"dataset": target, "mean": moments[0].tolist(), "std": moments[1].tolist()}
            ticket = {"mask": masks, "weights": start, "trained": trained, "meta": meta}
            if not tickets or args.save_networks:
                path = f"{run_dir}/{'network' if tickets else 'round'}_{r:02d}.pt"
                save_atomically(path, lambda path: torch.save(ticket, path))
            rows = sorted([*state["rows"], row], key=lambda row: row["round"])
            state = {"rows": rows, "history": [*state["history"], *end["entries"]], "round": None}
            save_table(f"{run_dir}/results.csv", rows)
            draw_curves(run_dir, rows, state["history"])
            save_atomically(checkpoint, lambda path: torch.save(state, path))
            for name, value in row.items():
                writer.add_scalar(f"rounds/{name}", value, r)
            writer.flush()
            print(f"round {r}: {remaining:,} of {prunable_count:,} weights (sparsity {row['sparsity']:.4f}); accuracy "
                  f"{row['val_accuracy']:.4f} in validation, {test_accuracy:.4f} in the test", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; the same command or --resume {run_dir} goes on after the last finished epoch", file=sys.stderr)
        sys.exit(130)
    print(f"{run_dir}: all rounds are done: results.csv, curves.png" + ("" if tickets else ", tickets round_RR.pt"))
