# Transfer of image classifiers: a network trained on ImageNet learns to tell the material, type or artist of a work of
# art (or any other classes) off-the-shelf, by fine-tuning, or from scratch, as in "Deep Transfer Learning for Art
# Classification Problems" (Sabatelli et al., ECCV Workshops 2018) and "Contributions to Deep Transfer Learning"
# (M. Sabatelli, 2022, chapter 4).
#
#   python finetune_classify.py --data-dir DIR --arch resnet50 --strategy fine-tune           a folder per class
#   python finetune_classify.py --data-dir DIR --metadata FILE.csv --label-column dc_type     images and a table
#   python finetune_classify.py --data-dir DIR --evaluate runs/.../finetune_classify.pt       test, predict, look
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.18", "pillow>=10"]
# ///
import csv
import difflib
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, fields
from datetime import timedelta
from itertools import count
from typing import Callable, Literal, NoReturn, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import models
from torchvision.transforms import v2


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the split, the new layers and the order of the images"""
    torch_deterministic: bool = True
    """sets `torch.backends.cudnn.deterministic`; off, cuDNN is free to pick its fastest kernels"""
    cuda: bool = True
    """train on CUDA when there is a GPU"""
    amp: bool = True
    """on CUDA, compute in bfloat16 where that is safe (autocast)"""
    workers: int = 4
    """processes that read images; 0 reads them in the training process"""
    logdir: str = "runs"
    """folder in which the run's own folder is made"""
    track: bool = False
    """mirror the run to Weights and Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "deep-transfer-learning"
    """the project of the run at Weights and Biases"""
    wandb_entity: Optional[str] = None
    """the team of the run at Weights and Biases"""

    # Data
    data_dir: Optional[str] = None
    """a folder per class; or train/, val/ and test/ with a folder per class each; or the images of --metadata"""
    metadata: Optional[str] = None
    """CSV with a row per image of --data-dir"""
    image_column: str = "ImageId"
    """column of --metadata with the file names, with or without extension"""
    label_column: list[str] = field(default_factory=lambda: ["dc_type"])
    """column of --metadata with the labels; of several, each gets a head of its own and the losses are added"""
    drop_label: list[str] = field(default_factory=lambda: ["anoniem"])
    """labels that count as missing, besides empty ones"""
    split_file: Optional[str] = None
    """split.csv of an earlier run to use again"""
    stratify: bool = True
    """split every class 80/10/10; `--no-stratify` splits all images at once, as the authors did"""
    check_data: bool = False
    """open every image first, list those that cannot be used, and end"""
    image_size: Optional[int] = None
    """side of the images for the network (None: what the weights were trained with)"""
    balanced_sampling: bool = False
    """draw all classes equally often in training (the papers do not)"""

    # The network
    arch: str = "resnet50"
    """a classifier of torchvision, `xception` or `timm:NAME` (both need `pip install timm`)"""
    strategy: Literal["off-the-shelf", "fine-tune", "scratch"] = "fine-tune"
    """train new last layers on frozen features; train everything; train everything from random weights"""
    weights: str = "IMAGENET1K_V1"
    """torchvision's name of the weights, a local file with a state dict, or `none`"""
    pretrained: Optional[str] = None
    """checkpoint of this script to start from instead, all but its heads; its classes may be others"""
    unfreeze_from: Optional[str] = None
    """fine-tune from this module of the network on, such as `layer4`, and leave all before it frozen"""

    # Training. None stands for the papers' value for the strategy.
    epochs: int = 100
    """passes over the training images, unless --patience ends training first"""
    patience: int = 7
    """epochs without a lower validation loss after which training ends"""
    batch_size: int = 32
    """images per update"""
    optimizer: Optional[Literal["sgd", "rmsprop", "adam"]] = None
    """(None: rmsprop with rho 0.9 off-the-shelf, else SGD)"""
    learning_rate: Optional[float] = None
    """(None: 0.001)"""
    momentum: float = 0.9
    """of SGD"""
    nesterov: bool = True
    """of SGD; the paper has it, the authors' code has not"""
    weight_decay: float = 0.0
    """of weights with two dimensions and more; never of biases and normalisation"""
    feature_cache: str = "feature_cache"
    """off-the-shelf: folder for the features of the images, used again where data, weights and preprocessing agree"""
    resume: Optional[str] = None
    """checkpoint ..._last.pt of a run to continue, in its folder and with its flags unless given anew"""

    # After training
    evaluate: Optional[str] = None
    """checkpoint to test instead of training"""
    predict: Optional[str] = None
    """with --evaluate: folder of images to classify into predictions.csv beside the checkpoint"""
    saliency: int = 0
    """with --evaluate: test images to explain by Grad-CAM and VisualBackProp, beside the network of --compare"""
    compare: Optional[str] = None
    """with --saliency: checkpoint of the other network (None: the network with --weights)"""


IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
SPLITS = ("train", "val", "test")
MISSING = -100  # the class of a missing label, as torch's cross entropy has it
Image.MAX_IMAGE_PIXELS = 2**30  # scans of museums exceed Pillow's limit against bombs; decoded at a fraction, see below
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


# Data ----------------------------------------------------------------------------------------------------------------
@dataclass
class Data:
    paths: list[str]
    """of the images, relative to --data-dir"""
    labels: dict[str, list[Optional[str]]]
    """of every task, None where missing"""
    splits: list[str]
    """train, val or test; empty strings before the split"""


def find_images(folder: str) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted."""
    found = [
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
    ]
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in IMAGES)


def read_data(args: Args) -> Data:
    """What --data-dir and --metadata hold; images in train/, val/ and test/ have their split already."""
    if not args.data_dir or not os.path.isdir(args.data_dir):
        fail(f"--data-dir {args.data_dir}: there is no such folder")
    images = find_images(args.data_dir)
    if not images:
        fail(f"--data-dir {args.data_dir}: no images in it ({', '.join(sorted(IMAGES))})")
    if not args.metadata:
        folders = {path.split(os.sep)[0] for path in images if os.sep in path}
        fixed = set(SPLITS) <= folders
        data = Data([], {"class": []}, [])
        for path in images:
            split, _, inside = path.partition(os.sep) if fixed else ("", "", path)
            if os.sep in inside and (not fixed or split in SPLITS):
                data.paths.append(path)
                data.labels["class"].append(inside.split(os.sep)[0])
                data.splits.append(split)
        if not data.paths:
            fail(f"--data-dir {args.data_dir}: a folder per class is expected there, or --metadata with the labels")
        return data
    try:
        with open(args.metadata, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"--metadata {args.metadata}: {error}")
    columns = list(rows[0]) if rows else []
    for flag, column in [("image", args.image_column), *(("label", column) for column in args.label_column)]:
        if column not in columns:
            fail(f"--{flag}-column {column}: {args.metadata} has the columns {', '.join(map(repr, columns))}")
    by_name = {os.path.basename(path): path for path in images} | {path: path for path in images}
    by_name = {os.path.splitext(name)[0]: path for name, path in by_name.items()} | by_name
    data, absent = Data([], {column: [] for column in args.label_column}, []), []
    missing = {"", *args.drop_label}
    for row in rows:
        path = by_name.get(row[args.image_column].strip())
        if path is None:
            absent.append(row[args.image_column])
            continue
        data.paths.append(path)
        data.splits.append("")
        for column in args.label_column:
            label = (row[column] or "").strip()
            data.labels[column].append(None if label in missing else label)
    if absent:
        say(f"{len(absent):,} of {len(rows):,} rows of {args.metadata} have no image there: {some(absent)}")
    if not data.paths:
        fail(f"--metadata {args.metadata}: none of its images is in {args.data_dir}")
    return data


def split_data(args: Args, data: Data) -> tuple[Data, dict[str, list[str]]]:
    """Assign the splits and keep the classes that are in all three of them; returns also the classes of every task."""
    first = next(iter(data.labels.values()))
    if args.split_file:
        try:
            with open(args.split_file, newline="") as file:
                saved = {row["path"]: row["split"] for row in csv.DictReader(file)}
        except (OSError, KeyError) as error:
            fail(f"--split-file {args.split_file}: {error}")
        unknown = [path for path in data.paths if path not in saved]
        if len(unknown) == len(data.paths):
            fail(f"--split-file {args.split_file} is of other images: {some(unknown)} are not in it")
        if unknown:
            say(f"{len(unknown):,} images are not in --split-file and are left out: {some(unknown)}")
        data.splits = [saved.get(path, "") for path in data.paths]
    elif not any(data.splits):
        rng = np.random.default_rng(args.seed)
        groups: dict[Optional[str], list[int]] = {}
        for i, label in enumerate(first):
            groups.setdefault(label if args.stratify else None, []).append(i)
        for label in sorted(groups, key=str):
            members = rng.permutation(groups[label])
            # a class of three images has one in each split
            tenth = max(round(len(members) / 10), int(len(members) >= 3))
            for i, member in enumerate(members):
                data.splits[member] = "test" if i < tenth else "val" if i < 2 * tenth else "train"
    classes = {}
    for task, labels in data.labels.items():
        present = [{label for label, split in zip(labels, data.splits) if split == name and label} for name in SPLITS]
        kept = set.intersection(*present)
        dropped = Counter(label for label in labels if label and label not in kept)
        if dropped:
            lost = f"{len(dropped):,} classes with {sum(dropped.values()):,} images"
            say(f"{task}: {lost} are not in all of train, val and test and are left out: {some(dropped)}")
        if len(kept) < 2:
            fail(f"{task}: {len(kept)} classes have images in all of train, val and test, at least 2 are needed")
        classes[task] = sorted(kept)
        data.labels[task] = [label if label in kept else None for label in labels]
    used = [i for i, split in enumerate(data.splits) if split and any(labels[i] for labels in data.labels.values())]
    labels = {task: [labels[i] for i in used] for task, labels in data.labels.items()}
    return Data([data.paths[i] for i in used], labels, [data.splits[i] for i in used]), classes


def open_image(path: str, side: int) -> Image.Image:
    """The image upright in RGB, its shorter side at least `side` pixels if it has them; raises OSError or ValueError.

    JPEGs are decoded at the fraction (1/2, 1/4, 1/8) that suffices: a scan of 4,000 x 3,000 pixels 7 times as fast.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))
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
    """Image i as uint8 `(3, size, size)` and its index; an image that cannot be read as None and the reason."""

    def __init__(self, folder: str, paths: list[str], preprocessing: dict):
        self.folder, self.paths, self.side = folder, paths, preprocessing["resize"]
        mode = v2.InterpolationMode(preprocessing["interpolation"])
        crop = v2.CenterCrop(preprocessing["size"])
        self.transform = v2.Compose([v2.Resize(self.side, mode, antialias=True), crop, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        try:
            return self.transform(open_image(os.path.join(self.folder, self.paths[i]), self.side)), i
        except Exception as error:  # Pillow's plugins raise whatever their formats make them
            return None, (i, f"{type(error).__name__}: {error}")


def collate(items: list) -> tuple[Optional[torch.Tensor], list[int], list[tuple[int, str]]]:
    """Images uint8 `(B, 3, size, size)` or None, their indices, and (index, reason) of those that cannot be read."""
    good = [item for item in items if item[0] is not None]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, [i for _, i in good], [reason for image, reason in items if image is None]


class Order(torch.utils.data.Sampler):
    """The images of an epoch in an order that seed and epoch determine, from batch `start` on."""

    def __init__(self, indices: list[int], batch_size: int, seed: int, weights: Optional[list[float]] = None):
        self.indices, self.batch_size, self.seed = torch.tensor(indices), batch_size, seed
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.epoch = self.start = 0

    def batches(self) -> int:
        # one image alone is no batch: batch normalisation needs two values
        full, rest = divmod(len(self.indices), self.batch_size)
        return max(full + (rest > 1), 1)

    def __len__(self) -> int:
        return self.batches() - self.start

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        n = len(self.indices)
        if self.weights is None:
            order = torch.randperm(n, generator=generator)
        else:
            order = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        order = self.indices[order]
        for i in range(self.start, self.batches()):
            yield order[i * self.batch_size : (i + 1) * self.batch_size].tolist()


# The network ---------------------------------------------------------------------------------------------------------
def weights_entry(arch: str, name: str):
    """torchvision's entry of the weights `name` of `arch`; of other weights the first, for its preprocessing."""
    try:
        entries = models.get_model_weights(arch)
    except ValueError:
        near = difflib.get_close_matches(arch, models.list_models(module=models), 3)
        fail(f"--arch {arch}: torchvision has no such classifier{', did you mean ' * bool(near)}{' or '.join(near)}")
    if name in entries.__members__:
        return entries[name]
    if name != "none" and not os.path.isfile(name):
        fail(f"--weights {name}: neither a file nor one of {arch}'s weights, {', '.join(entries.__members__)}, none")
    return next(iter(entries))


def load_weights(args: Args, arch: str) -> dict:
    """The state dict that --weights names: a file, or what torchvision downloads once."""
    if os.path.isfile(args.weights):
        try:
            state = torch.load(args.weights, map_location="cpu", weights_only=True)
        except Exception as error:
            fail(f"--weights {args.weights} is no state dict: {(str(error) or type(error).__name__).splitlines()[0]}")
        state = state.get("model", state.get("state_dict", state)) if isinstance(state, dict) else {}
        if not state or not all(torch.is_tensor(value) for value in state.values()):
            fail(f"--weights {args.weights} is no state dict, a dict of tensors is expected")
        return state
    entry = weights_entry(arch, args.weights)
    try:
        return entry.get_state_dict(progress=sys.stdout.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        there = f"put {entry.url} into {folder}, or give a local file with --weights"
        fail(f"the weights {entry} could not be downloaded ({error}): {there}")


def make_trunk(args: Args, random: bool) -> tuple[nn.Module, int, int, dict]:
    """A network without its last layer, the sizes of its features and auxiliary features (0: none), preprocessing."""
    if args.arch.startswith("timm:") or args.arch == "xception":
        try:
            import timm
        except ImportError:
            fail(f"--arch {args.arch} needs timm: pip install timm")
        name = "legacy_xception" if args.arch == "xception" else args.arch.removeprefix("timm:")
        local = not random and os.path.isfile(args.weights)
        try:
            trunk = timm.create_model(name, pretrained=not random and not local, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:
            fail(f"--arch {args.arch}: {(str(error) or type(error).__name__).splitlines()[0]}")
        if local:
            load_into(trunk, load_weights(args, args.arch), args.weights)
        config = timm.data.resolve_model_data_config(trunk)
        size = args.image_size or config["input_size"][-1]
        preprocessing = {"size": size, "resize": round(size / config["crop_pct"]), "mean": list(config["mean"])}
        preprocessing |= {"std": list(config["std"]), "interpolation": config["interpolation"]}
        return trunk, trunk.num_features, 0, preprocessing
    preset = weights_entry(args.arch, args.weights).transforms()
    size = args.image_size or preset.crop_size[0]
    resize = round(preset.resize_size[0] * size / preset.crop_size[0])
    preprocessing = {"size": size, "resize": max(resize, size), "mean": list(preset.mean), "std": list(preset.std)}
    preprocessing["interpolation"] = preset.interpolation.value
    # Inception's weights want their input scaled as in TensorFlow, which is part of the network in torchvision
    extra = {}
    if args.arch in ("inception_v3", "googlenet"):
        extra = {"transform_input": not random, "init_weights": random, "aux_logits": args.arch == "inception_v3"}
    if args.arch.startswith("vit") and size != preset.crop_size[0]:
        extra["image_size"] = size
    trunk, aux = models.get_model(args.arch, weights=None, **extra), 0
    if args.arch.startswith("vgg"):  # global average pooling instead of hidden layers, as the paper's VGG19
        features, trunk.avgpool, trunk.classifier = 512, nn.AdaptiveAvgPool2d(1), nn.Identity()
    elif args.arch.startswith("squeezenet"):
        features, trunk.classifier = 512, nn.AdaptiveAvgPool2d(1)
    else:
        linear = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear) and "Aux" not in name]
        last = linear[-1]
        features = trunk.get_submodule(last).in_features
        trunk.set_submodule(last, nn.Identity())
        if args.arch == "inception_v3":
            aux, trunk.AuxLogits.fc = trunk.AuxLogits.fc.in_features, nn.Identity()
    if args.arch == "inception_v3" and size < 75:
        fail(f"--image-size {size}: inception_v3 needs at least 75 pixels, and 299 is what it was trained with")
    if not random:
        load_into(trunk, load_weights(args, args.arch), args.weights)
    return trunk, features, aux, preprocessing


def load_into(trunk: nn.Module, state: dict, source: str) -> None:
    """Load all of `trunk` from `state`, which may have a last layer besides, or say in one line what does not fit."""
    own = trunk.state_dict()
    wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
        first = f"{wrong[0]} is {found} there and {tuple(own[wrong[0]].shape)} here"
        fail(f"{source} is of another architecture: {len(wrong):,} of {len(own):,} tensors do not fit, {first}")
    trunk.load_state_dict({name: state[name] for name in own})


class Classifier(nn.Module):
    """A trunk and a linear head per task: images uint8 `(B, 3, H, W)` -> {task: logits `(B, classes)`}."""

    def __init__(self, trunk: nn.Module, features: int, aux: int, preprocessing: dict, classes: dict[str, list[str]]):
        super().__init__()
        self.trunk, self.tasks, self.preprocessing = trunk, list(classes), preprocessing
        self.heads = nn.ModuleList(nn.Linear(features, len(names)) for names in classes.values())
        self.aux_heads = nn.ModuleList(nn.Linear(aux, len(names)) for names in classes.values() if aux)
        for name in ("mean", "std"):
            value = 255 * torch.tensor(preprocessing[name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.frozen: list[nn.Module] = []

    def freeze(self, until: Optional[str]) -> None:
        """Freeze the trunk (`until` None) or what comes before its module `until`, with its statistics and dropout."""
        if until is None:
            self.frozen, frozen = [self.trunk], list(self.trunk.parameters())
        else:
            modules, parameters = list(self.trunk.named_modules()), list(self.trunk.named_parameters())
            first = [i for i, (name, _) in enumerate(parameters) if name.startswith(until + ".")]
            if not first:
                names = ", ".join(name for name, _ in self.trunk.named_children())
                fail(f"--unfreeze-from {until}: no layers by that name; the network consists of {names}")
            before = modules[: [name for name, _ in modules].index(until)]
            self.frozen = [module for _, module in before if not list(module.children())]
            frozen = [parameter for _, parameter in parameters[: first[0]]]
        for parameter in frozen:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.frozen:  # or their batch normalisation would go on counting
            module.eval()
        return self

    def features(self, images: torch.Tensor):
        """float `(B, features)`; a network with an auxiliary head returns a pair of these while it is trained."""
        return self.trunk((images - self.mean) / self.std)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(images)
        if not isinstance(features, tuple):
            return self.classify(features)
        auxiliary = {f"aux {task}": head(features[1]) for task, head in zip(self.tasks, self.aux_heads)}
        return self.classify(features[0]) | auxiliary

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {task: head(features) for task, head in zip(self.tasks, self.heads)}


def total_loss(logits: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over tasks of the mean cross entropy over the images that have the label; auxiliary heads count 0.4."""
    loss = 0.0
    for name, values in logits.items():
        target = targets[name.removeprefix("aux ")]
        summed = F.cross_entropy(values.float(), target, ignore_index=MISSING, reduction="sum")
        loss = loss + summed / (target != MISSING).sum().clamp(min=1) * (0.4 if name.startswith("aux ") else 1.0)
    return loss


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    """The paper's optimizers; weight decay only on what multiplies."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, args.learning_rate, alpha=0.9, eps=1e-8)
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, args.learning_rate)
    nesterov = args.nesterov and args.momentum > 0
    return torch.optim.SGD(groups, args.learning_rate, momentum=args.momentum, nesterov=nesterov)


# Features and metrics ------------------------------------------------------------------------------------------------
def fingerprint(args: Args, data: Data, preprocessing: dict, trunk: nn.Module) -> str:
    """Names the features of these images under this network: files by size and time, the network by its numbers."""
    digest = hashlib.sha256(json.dumps([args.arch, preprocessing], sort_keys=True).encode())
    for path in data.paths:
        status = os.stat(os.path.join(args.data_dir, path))
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    for tensor in trunk.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def all_features(args: Args, data: Data, model: Classifier, preprocessing: dict, device, stopped) -> tuple:
    """Features float32 `(N, features)` of all images and the unreadable ones as {index: reason}, from the cache."""
    key = fingerprint(args, data, preprocessing, model.trunk)
    path = os.path.join(args.feature_cache, f"{args.arch.replace(':', '-')}_{key}.pt")
    if os.path.isfile(path):
        cached = torch.load(path, weights_only=True)
        say(f"features of {len(data.paths):,} images from {path}")
        return cached["features"], cached["unreadable"]
    loader = make_loader(args, Pictures(args.data_dir, data.paths, preprocessing), list(range(len(data.paths))), device)
    model.eval()
    features, unreadable, begun, last_line = None, {}, time.perf_counter(), 0.0
    for done, (images, indices, bad) in enumerate(loader, 1):
        if stopped():
            return None, None
        unreadable |= report(bad, data)
        if images is not None:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp and device.type == "cuda"):
                values = model.features(to_device(images, device)).float().cpu()
            features = torch.zeros(len(data.paths), values.shape[1]) if features is None else features
            features[indices] = values
        if time.perf_counter() - last_line > (1 if sys.stdout.isatty() else 30):
            last_line = time.perf_counter()
            rate = done * args.batch_size / (last_line - begun)
            left = timedelta(seconds=int((len(loader) - done) * args.batch_size / rate))
            say(f"features {done / len(loader):.1%}  {rate:,.0f} images/s  ETA {left}", stay=False)
    if features is None:
        fail(f"--data-dir {args.data_dir}: none of the {len(data.paths):,} images can be read")
    os.makedirs(args.feature_cache, exist_ok=True)
    save_atomically({"features": features, "unreadable": unreadable}, path)
    say(f"saved the features of {len(data.paths):,} images to {path}")
    return features, unreadable


def to_device(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    images = images.to(device, non_blocking=True).float()
    return images.contiguous(memory_format=torch.channels_last)


def make_loader(args: Args, pictures: Pictures, indices, device) -> DataLoader:
    """Batches of `indices`, a list or an Order, read by --workers processes."""
    batches = indices
    if isinstance(indices, list):
        batches = [indices[i : i + args.batch_size] for i in range(0, len(indices), args.batch_size)]
    workers = min(args.workers, len(batches))
    return DataLoader(
        pictures, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and isinstance(indices, Order), prefetch_factor=4 if workers else None,
    )  # fmt: skip


def report(bad: list[tuple[int, str]], data: Data) -> dict[int, str]:
    """Name the images that cannot be read: they are left out, not replaced."""
    for i, reason in bad:
        say(f"left out: {data.paths[i]} cannot be read, {reason}")
    return dict(bad)


def measure(logits: torch.Tensor, targets: torch.Tensor) -> dict:
    """Metrics of logits `(N, classes)` with targets int64 `(N,)`: shares; precision, recall, F1, support per class."""
    known = targets != MISSING
    logits, targets, n = logits[known], targets[known], logits.shape[1]
    ranked = logits.topk(min(5, n), dim=1).indices
    confusion = torch.bincount(targets * n + ranked[:, 0], minlength=n * n).view(n, n)
    right, support, chosen = confusion.diag().double(), confusion.sum(dim=1).double(), confusion.sum(dim=0).double()
    f1 = 2 * right / (support + chosen).clamp(min=1)
    result = {"top1": right.sum().item() / max(len(targets), 1)}
    result["top5"] = (ranked == targets[:, None]).any(dim=1).double().mean().item() if len(targets) else 0.0
    result["macro_f1"] = f1[support > 0].mean().item() if len(targets) else 0.0
    table = {"precision": right / chosen.clamp(min=1), "recall": right / support.clamp(min=1)}
    return result | {"table": table | {"f1": f1, "support": support}, "confusion": confusion}


def confusion_picture(confusion: torch.Tensor) -> torch.Tensor:
    """Rows (true classes) as shares of the class, dark where many, uint8 `(1, side, side)` of about 600 pixels."""
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    scale = max(1, 600 // len(confusion))
    return (255 * (1 - shares)).to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)[None]


# Saliency ------------------------------------------------------------------------------------------------------------
def feature_maps(model: Classifier, images: torch.Tensor, kinds: tuple, keep: Callable) -> tuple[list, torch.Tensor]:
    """What `keep` makes of the outputs `(B, C, h, w)` of all modules of these kinds, in order, and the features."""
    maps, modules = [], [module for module in model.trunk.modules() if isinstance(module, kinds)]

    def hook(_, __, output) -> None:
        if torch.is_tensor(output) and output.ndim == 4 and min(output.shape[2:]) > 1:
            maps.append(keep(output))

    hooks = [module.register_forward_hook(hook) for module in modules]
    features = model.features(images)
    for handle in hooks:
        handle.remove()
    if not maps:
        fail("--saliency: this network has no feature maps")
    return maps, features


def grad_cam(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Selvaraju et al. (2017): where the last feature map speaks for the most likely class of the first task.

    float `(B, 3, H, W)` -> `(B, H, W)` in [0, 1]. A network without heads is asked for the length of its features.
    """
    with torch.enable_grad():
        maps, features = feature_maps(model, images.clone().requires_grad_(), (nn.Module,), lambda output: output)
        score = model.heads[0](features).max(dim=1).values if len(model.heads) else features.norm(dim=1)
        (gradient,) = torch.autograd.grad(score.sum(), maps[-1])
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * maps[-1]).sum(dim=1, keepdim=True).relu()
    return spread(F.interpolate(cam, images.shape[2:], mode="bilinear"))[:, 0].detach()


@torch.no_grad()
def visual_back_prop(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Bojarski et al. (2018): mean maps after rectifiers, multiplied from the coarsest resolution to the finest.

    float `(B, 3, H, W)` -> `(B, H, W)` in [0, 1]. Maps of one resolution are averaged first: the paper's network had
    5 rectifiers, and the product over 35 of today's is a few single pixels. They grow by interpolation where the paper
    has a transposed convolution with ones, which needs strides that not every network has.
    """
    kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU)
    if not any(isinstance(module, kinds) for module in model.trunk.modules()):
        kinds = (nn.Conv2d,)  # rectified by functions: Inception, DenseNet
    maps, _ = feature_maps(model, images, kinds, lambda output: spread(output.relu().mean(dim=1, keepdim=True)))
    sizes = sorted({values.shape[2:] for values in maps})
    mask = torch.ones_like(maps[-1])
    for size in sizes:
        values = torch.stack([values for values in maps if values.shape[2:] == size]).mean(dim=0)
        mask = spread(F.interpolate(mask, size, mode="bilinear") * values)
    mask = F.interpolate(mask, images.shape[2:], mode="bilinear")[:, 0]
    # the zeros around an image make a frame that outshines all else: the brightest 2 % count as one
    top = mask.flatten(1).quantile(0.98, dim=1).clamp(min=1e-12)
    return (mask / top[:, None, None]).clamp(max=1)


def spread(maps: torch.Tensor) -> torch.Tensor:
    """Every map `(B, 1, H, W)` scaled to [0, 1]."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def overlay(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """uint8 `(3, H, W)` in grey, red where the mask `(H, W)` is high."""
    grey = image.float().mean(dim=0).expand(3, -1, -1) * 0.6
    heat = torch.stack([mask, mask.clamp(min=0.5) - 0.5, torch.zeros_like(mask)]) * 255
    return (grey * (1 - mask * 0.7) + heat * 0.7).clamp(0, 255).to(torch.uint8)


def explain(args: Args, model: Classifier, data: Data, chosen: list[int], device, path: str) -> None:
    """A picture: a row per image; the image, then Grad-CAM and VisualBackProp of the other network and of this one."""
    if args.compare:
        other = restore(load_checkpoint(args.compare))
    else:
        other = Classifier(*make_trunk(args, random=args.weights == "none"), {})
    rows, names = [], ("image", "Grad-CAM, other", "Grad-CAM, this", "VisualBackProp, other", "VisualBackProp, this")
    networks = [network.to(device).eval() for network in (other, model)]
    everywhere = np.random.default_rng(args.seed).permutation(chosen)[: args.saliency].tolist()
    for i in everywhere:
        image, reason = Pictures(args.data_dir, data.paths, model.preprocessing)[i]
        if image is None:
            report([reason], data)
            continue
        batch = image[None].to(device).float()
        masks = [method(network, batch)[0].cpu() for method in (grad_cam, visual_back_prop) for network in networks]
        rows.append(torch.cat([image, *(overlay(image, mask) for mask in masks)], dim=2))
    if not rows:
        fail("--saliency: none of the test images can be read")
    picture = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(path + ".tmp", "PNG")
    os.replace(path + ".tmp", path)
    say(f"saved {path}, from left to right: {'; '.join(names)}; other is {args.compare or f'{args.weights} weights'}")


@torch.no_grad()
def predict(args: Args, model: Classifier, classes: dict, device, path: str) -> None:
    """Write the most likely class of every image in --predict, with its probability, to `path`."""
    if not os.path.isdir(args.predict):
        fail(f"--predict {args.predict}: there is no such folder")
    data = Data(find_images(args.predict), {}, [])
    if not data.paths:
        fail(f"--predict {args.predict}: no images in it ({', '.join(sorted(IMAGES))})")
    pictures, rows = Pictures(args.predict, data.paths, model.preprocessing), []
    model.eval()
    for images, chosen, bad in make_loader(args, pictures, list(range(len(data.paths))), device):
        report(bad, data)
        logits = model(to_device(images, device)) if images is not None else {}
        best = {task: values.float().softmax(dim=1).max(dim=1) for task, values in logits.items()}
        for row, i in enumerate(chosen):
            found = ((classes[task][b.indices[row]], f"{b.values[row]:.4f}") for task, b in best.items())
            rows.append([data.paths[i], *(value for pair in found for value in pair)])
    with open(path + ".tmp", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(name for task in model.tasks for name in (task, f"{task}_probability"))])
        writer.writerows(rows)
    os.replace(path + ".tmp", path)
    say(f"saved {len(rows):,} predictions to {path}")


# Checkpoints ---------------------------------------------------------------------------------------------------------
def load_checkpoint(path: str) -> dict:
    if not os.path.isfile(path):
        fail(f"no checkpoint file at {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{path} is not a checkpoint: {(str(error) or type(error).__name__).splitlines()[0]}")
    if not isinstance(data, dict) or not {"model", "classes", "preprocessing", "args"} <= set(data):
        fail(f"{path} is not a checkpoint of this script")
    return data


def restore(checkpoint: dict) -> Classifier:
    """The network of a checkpoint."""
    args = Args(**{k: v for k, v in checkpoint["args"].items() if k in {f.name for f in fields(Args)}})
    args.weights, args.image_size = "none", checkpoint["preprocessing"]["size"]
    trunk, features, aux, _ = make_trunk(args, random=True)
    if hasattr(trunk, "transform_input"):  # Inception and GoogLeNet
        trunk.transform_input = checkpoint["transform_input"]
    model = Classifier(trunk, features, aux, checkpoint["preprocessing"], checkpoint["classes"])
    model.load_state_dict(checkpoint["model"])
    return model


def save_atomically(data: dict, path: str) -> None:
    torch.save(data, path + ".tmp")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    args, checkpoint = tyro.cli(Args), {}
    if args.evaluate or args.resume:
        checkpoint = load_checkpoint(args.evaluate or args.resume)
        saved = {k: v for k, v in checkpoint["args"].items() if k in {flag.name for flag in fields(Args)}}
        args = tyro.cli(Args, default=Args(**saved | {"resume": None}))  # the command line wins over the checkpoint
        if args.resume and "optimizer" not in checkpoint:
            fail(f"{args.resume} has no training state to resume; that is in the file that ends in _last.pt")
        fixed = ("arch", "strategy", "unfreeze_from", "optimizer", "label_column", "batch_size", "balanced_sampling")
        for name in fixed:
            if args.resume and saved.get(name) != getattr(args, name):
                fail(f"--resume continues a run with {name} {saved.get(name)}, not {getattr(args, name)}")
        folder = os.path.dirname(os.path.abspath(args.evaluate or args.resume))
        if not args.split_file and os.path.isfile(os.path.join(folder, "split.csv")):
            args.split_file = os.path.join(folder, "split.csv")
    args.optimizer = args.optimizer or ("rmsprop" if args.strategy == "off-the-shelf" else "sgd")
    args.learning_rate = 1e-3 if args.learning_rate is None else args.learning_rate
    for name in ("epochs", "patience", "batch_size"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.strategy == "scratch" and (args.pretrained or args.unfreeze_from):
        fail("--strategy scratch trains everything from random weights: no --pretrained, no --unfreeze-from")
    if args.strategy == "off-the-shelf" and args.unfreeze_from:
        fail("--unfreeze-from trains a part of the network: use it with --strategy fine-tune")
    for name in ("predict", "saliency"):
        if getattr(args, name) and not args.evaluate:
            fail(f"--{name} needs the checkpoint of a trained network: --evaluate PATH")

    # Ctrl-C and kill end the run after the update, with a checkpoint; a second one ends it at once
    signals: list[int] = []

    def on_signal(number: int, _) -> None:
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    on_cuda, frozen = device.type == "cuda", args.strategy == "off-the-shelf"

    # Data
    data = read_data(args)
    if args.check_data:
        pictures = Pictures(args.data_dir, data.paths, {"resize": 256, "size": 224, "interpolation": "bilinear"})
        unreadable = {}
        for _, _, bad in make_loader(args, pictures, list(range(len(data.paths))), torch.device("cpu")):
            unreadable |= report(bad, data)
        print(f"{len(data.paths):,} images, {len(unreadable):,} of them cannot be read")
        sys.exit(1 if unreadable else 0)
    data, classes = split_data(args, data)
    if checkpoint and classes != checkpoint["classes"]:
        if not args.evaluate:
            fail(f"--resume {args.resume}: the classes in --data-dir are not those of the run")
        for task in data.labels:
            known = set(checkpoint["classes"].get(task, ()))
            data.labels[task] = [label if label in known else None for label in data.labels[task]]
        classes = checkpoint["classes"]
        if not any(label for labels in data.labels.values() for label in labels):
            fail(f"--data-dir {args.data_dir} has none of the classes of {args.evaluate}")
    indices = {name: [i for i, split in enumerate(data.splits) if split == name] for name in SPLITS}
    targets = {
        task: torch.tensor([MISSING if label is None else names.index(label) for label in data.labels[task]])
        for task, names in classes.items() if task in data.labels
    }  # fmt: skip
    sizes = ", ".join(f"{len(indices[name]):,} {name}" for name in SPLITS)
    say(f"{args.data_dir}: {sizes}; " + ", ".join(f"{task}: {len(names):,} classes" for task, names in classes.items()))

    # The network
    if checkpoint:
        model = restore(checkpoint)
    elif args.pretrained:
        source = load_checkpoint(args.pretrained)
        if source["args"]["arch"] != args.arch:
            fail(f"--pretrained {args.pretrained} is a {source['args']['arch']}, not a {args.arch}")
        donor = restore(source)
        sizes = donor.heads[0].in_features, donor.aux_heads[0].in_features if len(donor.aux_heads) else 0
        model = Classifier(donor.trunk, *sizes, source["preprocessing"], classes)
    else:
        model = Classifier(*make_trunk(args, random=args.strategy == "scratch" or args.weights == "none"), classes)
    model = model.to(device, memory_format=torch.channels_last)
    if frozen or args.unfreeze_from:
        model.freeze(args.unfreeze_from)

    def forward(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of images, or of features where the network is frozen."""
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp and on_cuda):
            return model.classify(inputs) if features is not None else model(inputs)

    def batches(loader):
        """(images or features on the device, indices into data.paths), without what cannot be read."""
        if features is not None:
            for chosen in loader:
                yield features[chosen].to(device), chosen
            return
        for images, chosen, bad in loader:
            unreadable.update(report([item for item in bad if item[0] not in unreadable], data))
            if images is not None:
                yield to_device(images, device), chosen

    @torch.no_grad()
    def test(split: str) -> Optional[tuple[float, dict]]:
        """Loss and, per task, the metrics of a split; None when a signal came."""
        model.eval()
        chunks = [indices[split][i : i + args.batch_size] for i in range(0, len(indices[split]), args.batch_size)]
        loader = chunks if features is not None else make_loader(args, pictures, indices[split], device)
        found, seen = {task: [] for task in classes}, []
        for inputs, chosen in batches(loader):
            if signals:
                return None
            for task, values in forward(inputs).items():
                found[task].append(values.float().cpu())
            seen += chosen
        if not seen:
            fail(f"none of the {split} images can be read")
        logits = {task: torch.cat(found[task]) for task in targets}
        loss = total_loss(logits, {task: targets[task][seen] for task in targets}).item()
        return loss, {task: measure(logits[task], targets[task][seen]) for task in targets}

    def describe(metrics: dict) -> str:
        line = "{}: top-1 {top1:.4f}, top-5 {top5:.4f}, macro-F1 {macro_f1:.4f}"
        return "; ".join(line.format(task, **m) for task, m in metrics.items())

    pictures, unreadable, features = Pictures(args.data_dir, data.paths, model.preprocessing), {}, None

    if args.evaluate:
        result = test("test")
        if result is None:
            sys.exit(128 + signals[0])
        print(f"{args.evaluate} on {len(indices['test']):,} test images: loss {result[0]:.4f}; {describe(result[1])}")
        base = os.path.dirname(os.path.abspath(args.evaluate))
        if args.predict:
            predict(args, model, classes, device, os.path.join(base, "predictions.csv"))
        if args.saliency:
            explain(args, model, data, indices["test"], device, os.path.join(base, "saliency.png"))
        sys.exit()

    if frozen:
        features, unreadable = all_features(args, data, model, model.preprocessing, device, lambda: bool(signals))
        if features is None:
            sys.exit(128 + signals[0])
        indices = {name: [i for i in members if i not in unreadable] for name, members in indices.items()}
    weights = None
    if args.balanced_sampling:
        first = next(iter(targets.values()))[indices["train"]]
        weights = (1.0 / torch.bincount(first.clamp(min=0))[first.clamp(min=0)]).tolist()
    order = Order(indices["train"], args.batch_size, args.seed, weights)
    train_loader = order if frozen else make_loader(args, pictures, order, device)
    optimizer = make_optimizer(args, model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"{args.arch}, {args.strategy}: {trained:,} of {size:,} parameters are trained, images of "
        f"{model.preprocessing['size']} pixels, on {device}")  # fmt: skip

    # TRY NOT TO MODIFY: the run's folder and logs
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs Weights and Biases: pip install wandb")
    name = os.path.basename(os.path.normpath(args.data_dir))
    run_name = f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = os.path.dirname(os.path.abspath(args.resume)) if args.resume else os.path.join(args.logdir, run_name)
    for copy in count(2):
        try:
            os.makedirs(run_dir, exist_ok=bool(args.resume))
            break
        except FileExistsError:  # two runs that start in the same second
            run_dir = os.path.join(args.logdir, f"{run_name}-{copy}")
    if args.track:
        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": os.path.basename(run_dir)}
        wandb.init(**project, config=vars(args), sync_tensorboard=True, save_code=True)
    best_path, last_path = (os.path.join(run_dir, f"{args.exp_name}{end}.pt") for end in ("", "_last"))
    epoch, step, best, stale = (
        checkpoint.get(k, v) for k, v in (("epoch", 0), ("step", 0), ("best", float("inf")), ("stale", 0))
    )
    sums = checkpoint.get("sums", [0.0, 0])
    writer = SummaryWriter(run_dir, purge_step=epoch + 1 if args.resume else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", epoch)
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        if on_cuda and checkpoint["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    else:
        with open(os.path.join(run_dir, "split.csv.tmp"), "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "split", *data.labels])
            rows.writerows(zip(data.paths, data.splits, *data.labels.values()))
        os.replace(os.path.join(run_dir, "split.csv.tmp"), os.path.join(run_dir, "split.csv"))

    def save(path: str, **more) -> None:
        state = {"args": vars(args), "classes": classes, "preprocessing": model.preprocessing, "epoch": epoch}
        state |= {"transform_input": getattr(model.trunk, "transform_input", False), "best": best}
        save_atomically(state | {"model": model.state_dict()} | more, path)

    def save_last() -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        generators = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if on_cuda else None}
        save(last_path, optimizer=optimizer.state_dict(), rng=generators, step=step, stale=stale, sums=sums)

    def diverged(loss: float) -> NoReturn:
        fail(f"the loss is {loss} after {epoch} epochs: try a lower --learning-rate than {args.learning_rate}")

    # Training
    last_line, saved_at = 0.0, -60.0
    while epoch < args.epochs and stale < args.patience and not signals:
        model.train()
        order.epoch, order.start = epoch, step
        begun = waited_from = time.perf_counter()
        waiting, first, images_before = 0.0, step, sums[1]
        for inputs, chosen in batches(train_loader):
            waiting += time.perf_counter() - waited_from
            if len(chosen) > 1 or frozen:
                wanted = {task: target[chosen].to(device) for task, target in targets.items()}
                loss = total_loss(forward(inputs), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sums = [sums[0] + loss.detach() * len(chosen), sums[1] + len(chosen)]
            step += 1
            if signals:
                break
            waited_from = now = time.perf_counter()
            if now - last_line > (1 if sys.stdout.isatty() else 30):
                last_line, mean = now, float(sums[0]) / max(sums[1], 1)
                if not np.isfinite(mean):
                    diverged(mean)
                rate = (step - first) * args.batch_size / (now - begun)
                left = timedelta(seconds=int((order.batches() - step) * args.batch_size / rate))
                speed = f"{rate:,.0f} images/s, {waiting / (now - begun):.0%} waiting for data"
                done = f"epoch {epoch + 1}/{args.epochs} {step / order.batches():.1%}"
                say(f"{done}  loss {mean:.4f}  {speed}  ETA of the epoch {left}", stay=False)
        sums = [float(sums[0]), sums[1]]
        if step < order.batches():
            break
        seconds = time.perf_counter() - begun
        result = test("val")
        if result is None:
            break
        mean, (val_loss, metrics) = sums[0] / max(sums[1], 1), result
        epoch, step, rate = epoch + 1, 0, (sums[1] - images_before) / seconds
        if not np.isfinite(mean + val_loss):
            diverged(mean)
        sums, stale = [0.0, 0], 0 if val_loss < best else stale + 1
        writer.add_scalar("train/loss", mean, epoch)
        writer.add_scalar("val/loss", val_loss, epoch)
        writer.add_scalar("charts/images_per_second", rate, epoch)
        for task, m in metrics.items():
            for metric in ("top1", "top5", "macro_f1"):
                writer.add_scalar(f"val/{f'{task}/' if len(classes) > 1 else ''}{metric}", m[metric], epoch)
        losses = f"train loss {mean:.4f}, validation loss {val_loss:.4f}"
        say(f"epoch {epoch}: {losses}; {describe(metrics)}; {rate:,.0f} images/s")
        if val_loss < best:
            best = val_loss
            save(best_path)
        if time.perf_counter() - saved_at > 60 or epoch == args.epochs or stale == args.patience:
            save_last()
            saved_at = time.perf_counter()

    if signals:
        save_last()
        writer.close()
        say(f"stopped in epoch {epoch + 1}; python {os.path.basename(__file__)} --resume {last_path} goes on")
        sys.exit(128 + signals[0])

    # The test images, once, with the weights of the lowest validation loss
    model.load_state_dict(load_checkpoint(best_path)["model"])
    result = test("test")
    if result is None:
        sys.exit(128 + signals[0])
    loss, metrics = result
    writer.add_scalar("test/loss", loss, epoch)
    with open(os.path.join(run_dir, "per_class.csv"), "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["task", "class", "precision", "recall", "f1", "support"])
        for task, m in metrics.items():
            prefix = f"test/{f'{task}/' if len(classes) > 1 else ''}"
            for metric in ("top1", "top5", "macro_f1"):
                writer.add_scalar(prefix + metric, m[metric], epoch)
            writer.add_image(f"{prefix}confusion", confusion_picture(m["confusion"]), epoch)
            columns = (m["table"][name].tolist() for name in ("precision", "recall", "f1", "support"))
            rows.writerows([task, *row] for row in zip(classes[task], *columns))
    writer.close()
    say(f"test: loss {loss:.4f}; {describe(metrics)} ({len(indices['test']):,} images; the best of {epoch} epochs)")
    if unreadable:
        say(f"{len(unreadable):,} images could not be read and were left out")
    say(f"saved {best_path}, per_class.csv, split.csv")
