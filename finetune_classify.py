# Transfer of image classifiers: a network trained on ImageNet learns to tell the material, type or artist of a work of
# art (or any other classes) off-the-shelf, by fine-tuning, or from scratch, as in "Deep Transfer Learning for Art
# Classification Problems" (Sabatelli et al., ECCV Workshops 2018) and "Contributions to Deep Transfer Learning"
# (M. Sabatelli, 2022, chapter 4).
#
#   python finetune_classify.py --dataset Flowers102 --download --strategy off-the-shelf      needs no data of yours
#   python finetune_classify.py --data-dir DIR --arch resnet50 --strategy fine-tune           a folder per class
#   python finetune_classify.py --evaluate runs/NAME --predict DIR                            classify other images
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.18", "pillow>=10",
#                 "matplotlib>=3.8"]
# ///
import copy
import csv
import difflib
import inspect
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Iterable, Literal, NoReturn, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models
from torchvision.transforms import v2


@dataclass
class Args:
    # The run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the split, the new layers and the order of the images
    cuda: bool = True  # train on CUDA when there is a GPU
    amp: bool = True  # on CUDA, compute in bfloat16 where that is safe (autocast)
    workers: Optional[int] = None  # processes that read images (None: one a core on CUDA, else up to 4)
    cache_gb: Optional[float] = None  # keep decoded images on the device up to this size (None: half a GPU; CPU: 2)
    logdir: str = "runs"  # folder in which the run's own folder is made
    resume: Optional[str] = None  # run (folder or checkpoint ..._last.pt) to continue, with its flags
    track: bool = False  # mirror the run to Weights and Biases (needs `pip install wandb`)
    wandb_project_name: str = "deep-transfer-learning"  # the project of the run at Weights and Biases
    wandb_entity: Optional[str] = None  # the team of the run at Weights and Biases

    # Data
    data_dir: Optional[str] = None  # a folder per class, or train/, val/, test/ of these, or the images of --metadata
    dataset: Optional[str] = None  # torchvision's data set of this name instead, in --data-dir (None: data)
    download: bool = False  # download --dataset first
    metadata: Optional[str] = None  # CSV with a row per image of --data-dir
    image_column: str = "ImageId"  # column of --metadata with the file names, with or without extension
    label_column: list[str] = field(default_factory=lambda: ["dc_type"])  # column(s) with labels; each gets a head
    drop_label: list[str] = field(default_factory=lambda: ["anoniem"])  # labels that count as missing, besides empty
    split_file: Optional[str] = None  # split.csv of an earlier run to use again
    stratify: bool = True  # split every class 80/10/10; `--no-stratify` splits all images at once, as the authors did
    image_size: Optional[int] = None  # side of the images in pixels (None: what the weights were trained with)
    balanced_sampling: bool = False  # draw all classes (of the first label) equally often; the papers do not

    # The network
    arch: str = "resnet50"  # a classifier of torchvision, `xception` or `timm:NAME` (both need `pip install timm`)
    strategy: Literal["off-the-shelf", "fine-tune", "scratch"] = "fine-tune"  # train the last layer only, or all layers
    weights: str = "IMAGENET1K_V1"  # torchvision's name of the weights, a file with a state dict, or `none`
    pretrained: Optional[str] = None  # run or checkpoint of this script to start from, all but its heads
    unfreeze_from: Optional[str] = None  # fine-tune from this module on (`layer4`) and leave all before it frozen

    # Training (None: the papers' value)
    epochs: int = 100  # passes over the training images, unless --patience ends training first
    patience: int = 7  # epochs without a lower validation loss after which training ends
    batch_size: int = 32  # images per update
    optimizer: Optional[Literal["sgd", "rmsprop", "adam"]] = None  # (None: RMSprop off-the-shelf, else SGD)
    learning_rate: float = 1e-3  # the learning rate of the optimizer
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # of SGD; the paper has it, the authors' code has not
    weight_decay: float = 0.0  # of weights with two dimensions and more; never of biases and normalisation

    # After training
    evaluate: Optional[str] = None  # run (folder or checkpoint) to test instead of training
    predict: Optional[str] = None  # with --evaluate: classify this folder into predictions.csv, instead of testing
    saliency: int = 0  # with --evaluate: explain so many test images by Grad-CAM and VisualBackProp
    compare: Optional[str] = None  # with --saliency: run of the other network to show (None: that of --weights)


# Smallest and largest value of numeric flags
BOUNDS = {
    "seed": (0, 2**31 - 1), "workers": (0, 1_024), "cache_gb": (0, 1e6), "image_size": (1, 10_000), "epochs": (1, 1e9),
    "patience": (1, 1e9), "batch_size": (1, 1e6), "learning_rate": (0, 1e9), "momentum": (0, 1),
    "weight_decay": (0, 1e9), "saliency": (0, 100),
}  # fmt: skip
# Flags that may be given anew
ON_RESUME = {"resume", "epochs", "patience", "learning_rate", "data_dir", "metadata", "split_file", "download"}
ON_RESUME |= {"workers", "cache_gb", "cuda", "amp", "track", "wandb_project_name", "wandb_entity"}
ON_EVALUATE = {"evaluate", "predict", "saliency", "compare", "weights", "seed", "batch_size", "workers", "cuda", "amp"}
ON_EVALUATE |= {"data_dir", "dataset", "metadata", "image_column", "drop_label", "split_file", "download", "resume"}

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
SPLITS = ("train", "val", "test")
MISSING = -100  # the class of a missing label, as torch's cross entropy has it
MAX_PIXELS = 179_000_000  # of an image as decoded: Pillow's limit, which it applies to scans before their reduction
Image.MAX_IMAGE_PIXELS = None


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def say(line: str, stay: bool = True) -> None:
    """Print over the progress line; on a terminal a line that does not `stay` is a progress line itself."""
    tty = sys.stdout.isatty()
    print(f"\r{line}\033[K" if tty else line, end="\n" if stay or not tty else "", flush=True)


def some(names: Iterable, n: int = 5) -> str:
    names = list(names)
    return ", ".join(map(str, names[:n])) + (f" and {len(names) - n:,} more" if len(names) > n else "")


class Progress:
    """A line now and then, with images/s and the time that is left of all `total` images."""

    def __init__(self, total: int):
        self.total, self.done, self.begun, self.last = total, 0, time.perf_counter(), time.perf_counter()

    def due(self) -> bool:
        return time.perf_counter() - self.last > (1 if sys.stdout.isatty() else 30)

    def show(self, what: str) -> None:
        self.last = time.perf_counter()
        rate = max(self.done, 1) / (self.last - self.begun)
        say(f"{what}  {rate:,.0f} images/s  ETA {timedelta(seconds=int((self.total - self.done) / rate))}", stay=False)


@contextmanager
def written(path: str):
    """A temporary name beside `path`, renamed to it at the end; with a full disk one line, and nothing left behind."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either
        fail(f"{path} cannot be written: {str(error).splitlines()[0]}")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_csv(path: str, rows: Iterable) -> None:
    with written(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        csv.writer(f).writerows(rows)


# Data ----------------------------------------------------------------------------------------------------------------
@dataclass
class Data:
    names: list[str]  # of the images: paths relative to `folder`, or split/number of torchvision's `sets`
    labels: dict[str, list[Optional[str]]]  # of every task, None where missing
    splits: list[str]  # train, val or test; empty before the split
    folder: str = ""
    sets: dict[str, Dataset] = field(default_factory=dict)


def find_images(folder: str) -> list[str]:
    """Paths of all images below `folder`, relative to it; what a link leads to a second time is left out."""
    found, again, seen = [], [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: say(f"left out: {error}")):
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        images = [name for name in sorted(names) if os.path.splitext(name)[1].lower() in IMAGES]
        if os.path.realpath(root) in seen:
            again.append(os.path.relpath(root, folder))
            images, folders[:] = [], []
        seen.add(os.path.realpath(root))
        for path in (os.path.join(root, name) for name in images):
            (again if os.path.realpath(path) in seen else found).append(os.path.relpath(path, folder))
            seen.add(os.path.realpath(path))
    if again:
        say(f"{len(again):,} links lead to what is there already and are left out: {some(again)}")
    if not found:
        fail(f"{folder}: no images in it ({', '.join(sorted(IMAGES))})")
    return sorted(found)


def read_folders(folder: str) -> Data:
    """A folder per class; images in train/, val/ (or valid/) and test/ have their split already."""
    images = [path.split(os.sep) for path in find_images(folder)]
    fixed = {"train", "test"} <= {parts[0] for parts in images}
    splits = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    data = Data([], {"class": []}, [], folder)
    for parts in images:
        if len(parts) > 1 + fixed and (not fixed or parts[0] in splits):
            data.names.append(os.path.join(*parts))
            data.labels["class"].append(parts[fixed])
            data.splits.append(splits[parts[0]] if fixed else "")
    if not data.names:
        fail(f"--data-dir {folder}: a folder per class is expected there, or --metadata with the labels")
    return data


def read_table(args: Args) -> Data:
    """Images and the labels that the CSV --metadata has for them."""
    try:
        with open(args.metadata, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"--metadata {args.metadata}: {error}")
    columns = list(rows[0]) if rows else []
    for flag, column in [("image", args.image_column), *(("label", column) for column in args.label_column)]:
        if column not in columns:
            fail(f"--{flag}-column {column}: {args.metadata} has the columns {', '.join(map(repr, columns))}")
    by_name = defaultdict(set)
    for path in find_images(args.data_dir):
        for name in (path, os.path.basename(path)):
            by_name[name].add(path)
            by_name[os.path.splitext(name)[0]].add(path)
    data, taken, left_out = Data([], {column: [] for column in args.label_column}, [], args.data_dir), set(), {}
    for row in rows:
        name = (row[args.image_column] or "").strip()
        paths = {name} if name in by_name.get(name, ()) else by_name.get(name, set())
        if len(paths) == 1 and not paths <= taken:
            taken |= paths
            data.names += paths
            data.splits.append("")
            for column in args.label_column:
                label = (row[column] or "").strip()
                data.labels[column].append(None if label in {"", *args.drop_label} else label)
        else:
            reason = "name an image again" if len(paths) == 1 else "fit several images" if paths else "have no image"
            left_out.setdefault(reason, []).append(name)
    for reason, found in left_out.items():
        say(f"{len(found):,} of {len(rows):,} rows of {args.metadata} {reason} there and are left out: {some(found)}")
    if not data.names:
        fail(f"--metadata {args.metadata}: none of its images is in {args.data_dir}")
    return data


def read_torchvision(args: Args) -> Data:
    """A data set of torchvision with its splits; one without validation images has them taken from training."""
    make, data = getattr(datasets, args.dataset, None), Data([], {"class": []}, [])
    if not inspect.isclass(make):
        near = difflib.get_close_matches(args.dataset, dir(datasets), 3)
        fail(f"--dataset {args.dataset}: torchvision has none{', did you mean ' * bool(near)}{' or '.join(near)}")
    known = "split" in inspect.signature(make).parameters
    for split, name in [("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test")]:
        if not known and split == "val" or split in data.sets:
            continue
        try:
            part = make(
                args.data_dir, download=args.download, **({"split": name} if known else {"train": name == split})
            )
        except ValueError:  # no such split
            continue
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            fail(f"--dataset {args.dataset}: {str(error).splitlines()[0]} (see --download)")
        labels = next((getattr(part, name) for name in ("targets", "labels", "_labels") if hasattr(part, name)), None)
        labels = [part[i][1] for i in range(len(part))] if labels is None else labels
        classes, data.sets[split] = getattr(part, "classes", None), part
        data.names += [f"{split}/{i}" for i in range(len(part))]
        data.labels["class"] += [classes[int(i)] if classes else f"{int(i):03d}" for i in labels]
        data.splits += [split] * len(part)
    return data


def split_data(args: Args, data: Data, classes: Optional[dict] = None) -> dict[str, list[str]]:
    """Assign the splits that are missing and drop labels that are not in all splits; returns the classes of every task.

    With `classes` of a trained network only these labels are kept.
    """
    if args.split_file:
        try:
            with open(args.split_file, newline="", encoding="utf-8", errors="surrogateescape") as file:
                saved = {row["path"]: row["split"] for row in csv.DictReader(file)}
        except (OSError, KeyError) as error:
            fail(f"--split-file {args.split_file}: {error}")
        unknown = [name for name in data.names if name not in saved]
        if len(unknown) == len(data.names):
            fail(f"--split-file {args.split_file} is of other images: {some(unknown)} are not in it")
        if unknown:
            say(f"{len(unknown):,} images are not in --split-file and are left out: {some(unknown)}")
        data.splits = [saved.get(name, "") for name in data.names]
    elif "train" not in data.splits or "val" not in data.splits:
        rng, groups = np.random.default_rng(args.seed), defaultdict(list)
        for i, label in enumerate(next(iter(data.labels.values()))):
            if data.splits[i] in ("", "train"):
                groups[label if args.stratify else None].append(i)
        new = [split for split in ("test", "val") if split not in data.splits]
        for label in sorted(groups, key=str):
            # a class of three images has one in each split
            tenth = max(round(len(groups[label]) / 10), int(len(groups[label]) >= 3))
            for i, member in enumerate(rng.permutation(groups[label])):
                data.splits[member] = new[i // tenth] if i < tenth * len(new) else "train"
    kept = {}
    for task, labels in data.labels.items():
        present = [{label for label, split in zip(labels, data.splits) if split == name and label} for name in SPLITS]
        kept[task] = classes[task] if classes else sorted(set.intersection(*present))
        dropped = Counter(label for label in labels if label and label not in set(kept[task]))
        if dropped:
            lost = f"{len(dropped):,} classes with {sum(dropped.values()):,} images"
            why = "unknown to the network" if classes else "not in all of train, val and test"
            say(f"{task}: {lost} are {why} and are left out: {some(dropped)}")
        if len(kept[task]) < 2:
            fail(f"{task}: {len(kept[task])} classes have images in all of train, val and test, at least 2 are needed")
        data.labels[task] = [None if label in dropped else label for label in labels]
    used = [i for i, split in enumerate(data.splits) if split and any(labels[i] for labels in data.labels.values())]
    data.labels = {task: [labels[i] for i in used] for task, labels in data.labels.items()}
    data.names, data.splits = [data.names[i] for i in used], [data.splits[i] for i in used]
    return kept


def open_image(path: str, side: int) -> Image.Image:
    """The image upright in RGB, its shorter side at least `side` pixels if it has them; raises OSError or ValueError.

    JPEGs are decoded at the fraction (1/2, 1/4, 1/8) that suffices: a scan of 4,000 x 3,000 pixels 7 times as fast.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))
        # its decoded size, and that after its shorter side has been resized
        if max(image.width * image.height, side**2 * max(image.size) / min(image.size)) > MAX_PIXELS:
            raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many, or too long a strip")
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more, which convert() would cut off at 255
            values = np.asarray(image, dtype=np.float64)
            top = 65_535 if values.max() > 255 else 255
            image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")  # over white, as on paper
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.exif_transpose(image).convert("RGB")


class Pictures(Dataset):
    """Image i as uint8 `(3, size, size)` and i; an image that cannot be read as None and (i, reason)."""

    def __init__(self, data: Data, preprocessing: dict):
        self.data, self.side, size = data, preprocessing["resize"], preprocessing["size"]
        resize = v2.Resize(self.side, v2.InterpolationMode(preprocessing["interpolation"]), antialias=True)
        self.transform = v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])

    def __getitem__(self, i: int) -> tuple:
        name = self.data.names[i]
        try:
            if self.data.sets:
                split, number = name.split("/")
                image = self.data.sets[split][int(number)][0].convert("RGB")
            else:
                image = open_image(os.path.join(self.data.folder, name), self.side)
            return self.transform(image), int(i)
        except Exception as error:  # Pillow's plugins raise whatever their formats make them
            return None, (int(i), f"{type(error).__name__}: {error}")


def collate(items: list) -> tuple[Optional[torch.Tensor], torch.Tensor, list[tuple[int, str]]]:
    """Images uint8 `(B, 3, size, size)` or None, their indices, and (index, reason) of those that cannot be read."""
    good = [item for item in items if item[0] is not None]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([i for _, i in good]), [reason for image, reason in items if image is None]


def ignore_signals(_) -> None:
    """In a worker: a signal to the process group is the training process' business, which saves and ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def make_loader(args: Args, data: Data, preprocessing: dict, batches: list, device: torch.device) -> DataLoader:
    """The images of `batches` of indices, a list that may change between passes, as `collate` returns them."""
    workers = (
        (os.cpu_count() if device.type == "cuda" else min(os.cpu_count(), 4)) if args.workers is None else args.workers
    )
    workers = min(workers, len(batches))
    return DataLoader(
        Pictures(data, preprocessing), batch_sampler=batches, num_workers=workers, collate_fn=collate,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals, generator=torch.Generator(),  # its own: workers change no other random draw
    )  # fmt: skip


def report(bad: list[tuple[int, str]], data: Data, unreadable: dict[int, str]) -> None:
    """Name the images that cannot be read, once: they are left out, not replaced."""
    for i, reason in bad:
        if i not in unreadable:
            say(f"left out: {data.names[i]} cannot be read, {reason}")
        unreadable[i] = reason


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


def load_weights(args: Args, trunk: nn.Module) -> None:
    """Load all of `trunk` from what --weights names: a file, or what torchvision downloads once."""
    if os.path.isfile(args.weights):
        state = load_file(args.weights, "a state dict")
        state = state.get("model", state.get("state_dict", state))
    else:
        entry = weights_entry(args.arch, args.weights)
        try:
            state = entry.get_state_dict(progress=sys.stdout.isatty(), check_hash=True)
        except (OSError, RuntimeError) as error:
            folder = os.path.join(torch.hub.get_dir(), "checkpoints")
            there = f"put {entry.url} into {folder}, or give a local file with --weights"
            fail(f"the weights {entry} could not be downloaded ({error}): {there}")
    own = trunk.state_dict()
    wrong = [name for name, tensor in own.items() if getattr(state.get(name), "shape", None) != tensor.shape]
    if wrong:
        found = f"{wrong[0]} is {getattr(state.get(wrong[0]), 'shape', 'missing')}, not {own[wrong[0]].shape}"
        fail(f"--weights {args.weights} is of another architecture: {len(wrong):,} of {len(own):,} tensors, {found}")
    trunk.load_state_dict({name: state[name] for name in own})


def make_trunk(args: Args, random: bool) -> tuple[nn.Module, int, dict]:
    """A network without its last layer, the number of its features, and its preprocessing."""
    if args.arch.startswith("timm:") or args.arch == "xception":
        try:
            import timm
        except ImportError:
            fail(f"--arch {args.arch} needs timm: pip install timm")
        name = "legacy_xception" if args.arch == "xception" else args.arch.removeprefix("timm:")
        local = os.path.isfile(args.weights)
        try:
            trunk = timm.create_model(name, pretrained=not random and not local, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:
            fail(f"--arch {args.arch}: {(str(error) or type(error).__name__).splitlines()[0]}")
        if local and not random:
            load_weights(args, trunk)
        config = timm.data.resolve_model_data_config(trunk)
        size = args.image_size or config["input_size"][-1]
        preprocessing = {"size": size, "resize": round(size / config["crop_pct"]), "mean": list(config["mean"])}
        return (
            trunk,
            trunk.num_features,
            preprocessing | {"std": list(config["std"])} | {k: config[k] for k in ["interpolation"]},
        )
    preset = weights_entry(args.arch, args.weights).transforms()
    size = args.image_size or preset.crop_size[0]
    resize = max(round(preset.resize_size[0] * size / preset.crop_size[0]), size)
    preprocessing = {"size": size, "resize": resize, "mean": list(preset.mean), "std": list(preset.std)}
    preprocessing["interpolation"] = preset.interpolation.value
    extra = {}
    if args.arch in ("inception_v3", "googlenet"):
        extra = {"transform_input": False, "init_weights": random, "aux_logits": False}
        if not random:  # their weights want images as TensorFlow scales them
            preprocessing |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    if args.arch == "inception_v3" and size < 75:
        fail(f"--image-size {size}: inception_v3 needs at least 75 pixels, and 299 is what it was trained with")
    if args.arch.startswith("vit"):
        extra["image_size"] = size
    trunk = models.get_model(args.arch, weights=None, **extra)
    if args.arch.startswith("vgg"):  # global average pooling instead of hidden layers, as the paper's VGG19
        features, trunk.avgpool, trunk.classifier = 512, nn.AdaptiveAvgPool2d(1), nn.Identity()
    elif args.arch.startswith("squeezenet"):
        features, trunk.classifier = 512, nn.AdaptiveAvgPool2d(1)
    else:
        last = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)][-1]
        features = trunk.get_submodule(last).in_features
        trunk.set_submodule(last, nn.Identity())
    if not random:
        load_weights(args, trunk)
    return trunk, features, preprocessing


class Classifier(nn.Module):
    """A trunk and a linear head per task: images uint8 `(B, 3, H, W)` -> {task: logits float32 `(B, classes)`}."""

    def __init__(self, trunk: nn.Module, features: int, preprocessing: dict, classes: dict[str, list[str]]):
        super().__init__()
        self.trunk, self.tasks, self.preprocessing = trunk, list(classes), preprocessing
        self.heads = nn.ModuleList(nn.Linear(features, len(names)) for names in classes.values())
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(preprocessing[name]).view(3, 1, 1), persistent=False)
        self.frozen: list[nn.Module] = []
        self.bfloat16 = False

    def freeze(self, until: Optional[str]) -> None:
        """Freeze the trunk (`until` None) or what comes before its module `until`, with its statistics and dropout."""
        modules, parameters = list(self.trunk.named_modules()), list(self.trunk.named_parameters())
        at = [i for i, (name, _) in enumerate(parameters) if until and name.startswith(until + ".")]
        if until and not at:
            names = ", ".join(name for name, _ in self.trunk.named_children())
            fail(f"--unfreeze-from {until}: no layers by that name; the network consists of {names}")
        before = modules[: [name for name, _ in modules].index(until) if until else None]
        self.frozen = [module for _, module in before if not list(module.children())]
        for _, parameter in parameters[: at[0] if until else None]:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.frozen:  # or their batch normalisation would go on counting
            module.eval()
        return self

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `(B, 3, H, W)` -> float32 `(B, features)`."""
        images = images.float().contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.trunk((images - self.mean) / self.std).float()

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images, or the features of a frozen trunk."""
        features = inputs if inputs.ndim == 2 else self.features(inputs)
        return {task: head(features) for task, head in zip(self.tasks, self.heads)}


# Training ------------------------------------------------------------------------------------------------------------
def total_loss(logits: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over tasks of the mean cross entropy over the images that have the label."""
    loss = 0.0
    for task, target in targets.items():
        summed = F.cross_entropy(logits[task], target, ignore_index=MISSING, reduction="sum")
        loss = loss + summed / (target != MISSING).sum().clamp(min=1)
    return loss


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizers; weight decay only on what multiplies."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    name = args.optimizer or ("rmsprop" if args.strategy == "off-the-shelf" else "sgd")
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, args.learning_rate, alpha=0.9, eps=1e-8)
    if name == "adam":
        return torch.optim.Adam(groups, args.learning_rate)
    nesterov = args.nesterov and args.momentum > 0
    return torch.optim.SGD(groups, args.learning_rate, momentum=args.momentum, nesterov=nesterov)


def shuffled(indices: torch.Tensor, args: Args, epoch: int, weights: Optional[torch.Tensor]) -> list[torch.Tensor]:
    """Batches of an epoch in an order that seed and epoch determine; of `weights` `(N,)`, drawn with replacement."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    n = len(indices)
    if weights is None:
        order = torch.randperm(n, generator=generator)
    else:
        order = torch.multinomial(weights, n, replacement=True, generator=generator)
    batches = list(indices[order.to(indices.device)].split(args.batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches  # batch normalisation needs two


def train_epoch(model: Classifier, optimizer, batches: Iterable, targets: dict, progress: Progress, name: str) -> float:
    """Mean loss of a pass over batches of (images or features, indices), both on the device."""
    model.train()
    total, seen = 0.0, 0
    for inputs, chosen in batches:
        progress.done += len(chosen)
        if len(chosen) < 2 and not model.frozen:
            continue
        loss = total_loss(model(inputs), {task: target[chosen] for task, target in targets.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, seen = total + loss.detach() * len(chosen), seen + len(chosen)
        if progress.due():
            progress.show(f"{name}  loss {check(total / seen):.4f}")
    return check(total / max(seen, 1))


def check(loss) -> float:
    if not np.isfinite(float(loss)):
        fail(f"the loss is {float(loss)}: try a lower --learning-rate")
    return float(loss)


@torch.no_grad()
def run_through(model: Classifier, batches: Iterable) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Logits `(N, classes)` of every task, and the indices `(N,)` of the images."""
    model.eval()
    found = [(model(inputs), chosen) for inputs, chosen in batches]
    if not found:
        fail("there are no images to test on, or none can be read")
    return {task: torch.cat([logits[task] for logits, _ in found]) for task in model.tasks}, torch.cat(
        [i for _, i in found]
    )


def test(model: Classifier, batches: Iterable, targets: dict[str, torch.Tensor]) -> tuple[float, dict[str, dict]]:
    """Loss and, for every task, `measure` of all batches of (images or features, indices)."""
    logits, seen = run_through(model, batches)
    targets = {task: target[seen] for task, target in targets.items()}
    return total_loss(logits, targets).item(), {task: measure(logits[task], targets[task]) for task in targets}


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


def in_words(metrics: dict[str, dict]) -> str:
    line = "{}: top-1 {top1:.4f}, top-5 {top5:.4f}, macro-F1 {macro_f1:.4f}"
    return "; ".join(line.format(task, **m) for task, m in metrics.items())


def by_tag(split: str, metrics: dict[str, dict]) -> dict[str, float]:
    """Scalars as `val/top1`, of several tasks as `val/TASK/top1`."""
    names = ("top1", "top5", "macro_f1")
    return {
        f"{split}/{f'{task}/' if len(metrics) > 1 else ''}{name}": m[name]
        for task, m in metrics.items()
        for name in names
    }


# Pictures ------------------------------------------------------------------------------------------------------------
def save_figure(figure: Figure, path: str) -> None:
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def curves(history: list[dict[str, float]]) -> Figure:
    """Loss and validation metrics by epoch; `history` has a dict of scalars per epoch."""
    figure = Figure(figsize=(10, 4))
    for axes, title in zip(figure.subplots(1, 2), ("loss", "validation metrics")):
        for tag in history[0]:
            if tag.endswith("loss") == (title == "loss"):
                axes.plot(range(1, len(history) + 1), [scalars[tag] for scalars in history], marker=".", label=tag)
        axes.set(title=title, xlabel="epoch")
        axes.legend()
    return figure


def confusion_matrix(confusion: torch.Tensor, names: list[str], title: str) -> Figure:
    """Rows (true classes) as shares of the class; with names up to 60 classes, and with counts up to 25."""
    figure = Figure(figsize=(2 + 0.5 * min(len(names), 25),) * 2)
    axes, confusion = figure.subplots(), confusion.cpu()
    axes.imshow(confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    for row, column in confusion.nonzero().tolist() if len(names) <= 25 else []:
        count = confusion[row, column].item()
        dark = count > confusion[row].sum() / 2
        axes.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    return figure


def saliency_maps(model: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM and VisualBackProp of images uint8 `(B, 3, H, W)`, each float `(B, H, W)` in [0, 1].

    Grad-CAM (Selvaraju et al., 2017): where the last feature map speaks for the most likely class of the first task; a
    network without heads is asked for the length of its features. VisualBackProp (Bojarski et al., 2018): mean maps
    after rectifiers, multiplied from the coarsest resolution to the finest. Maps of one resolution are averaged first:
    the paper's network had 5 rectifiers, and the product over 35 of today's is a few single pixels. They grow by
    interpolation where the paper has a transposed convolution with ones, which needs strides that not all have.
    """
    kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU)
    if not any(isinstance(module, kinds) for module in model.trunk.modules()):
        kinds = (nn.Conv2d,)  # rectified by functions: Inception, DenseNet
    last, rectified = [], defaultdict(list)

    def keep(module: nn.Module, _, output) -> None:
        if torch.is_tensor(output) and output.ndim == 4 and min(output.shape[1:3]) > 1 and output.shape[2] > 1:
            # images are square: maps that are not have their channels last (ConvNeXt, Swin)
            order = (0, 1, 2, 3) if output.shape[2] == output.shape[3] else (0, 3, 1, 2)
            last[:] = [output, order]
            if isinstance(module, kinds):
                values = output.detach().permute(order).relu().mean(dim=1, keepdim=True)
                rectified[values.shape[-1]].append(spread(values))

    hooks = [module.register_forward_hook(keep) for module in model.trunk.modules()]
    with torch.enable_grad():
        features = model.features(images.float().requires_grad_())
        score = model.heads[0](features).max(dim=1).values if len(model.heads) else features.norm(dim=1)
    for hook in hooks:
        hook.remove()
    if not rectified:
        fail("--saliency: this network has no feature maps")
    output, order = last
    (gradient,) = torch.autograd.grad(score.sum(), output)
    cam = (
        (gradient.mean(dim=[order[2], order[3]], keepdim=True) * output)
        .detach()
        .permute(order)
        .sum(dim=1, keepdim=True)
    )
    cam = spread(F.interpolate(cam.relu().float(), images.shape[2:], mode="bilinear"))[:, 0]
    mask = torch.ones_like(rectified[min(rectified)][0])
    for size in sorted(rectified):
        mask = spread(F.interpolate(mask, size, mode="bilinear") * torch.stack(rectified[size]).mean(dim=0))
    mask = F.interpolate(mask.float(), images.shape[2:], mode="bilinear")[:, 0]
    # the zeros around an image make a frame that outshines all else: the brightest 2 % count as one
    return cam, (mask / mask.flatten(1).quantile(0.98, dim=1).clamp(min=1e-12)[:, None, None]).clamp(max=1)


def spread(maps: torch.Tensor) -> torch.Tensor:
    """Every map `(B, 1, H, W)` scaled to [0, 1]."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def explain(model: Classifier, other: Classifier, name: str, pictures: Pictures, chosen: list, classes: list) -> Figure:
    """A row per image of the first task: the image and both maps of the `other` network, called `name`, and of this."""
    pairs = [(i, image) for i, image in ((i, pictures[i][0]) for i in chosen) if image is not None]
    if not pairs:
        fail("--saliency: none of the test images can be read")
    titles = ["image", f"Grad-CAM\n{name}", "Grad-CAM\nthis network", f"VisualBackProp\n{name}",
              "VisualBackProp\nthis network"]  # fmt: skip
    figure, task = Figure(figsize=(10, 2.1 * len(pairs))), model.tasks[0]
    for row, (i, image) in zip(figure.subplots(len(pairs), 5, squeeze=False), pairs):
        batch = image[None].to(model.mean.device)
        maps = zip(*(saliency_maps(network.eval(), batch) for network in (other, model)))
        share, best = model(batch)[task][0].softmax(dim=0).max(dim=0)
        row[0].set_ylabel(f"{pictures.data.labels[task][i]}\n-> {classes[best]} {share:.2f}", fontsize=8)
        row[0].imshow(image.permute(1, 2, 0))
        for axes, mask in zip(row[1:], (mask for pair in maps for mask in pair)):
            axes.imshow(image.float().mean(dim=0), cmap="gray")
            axes.imshow(mask[0].cpu(), cmap="jet", alpha=0.5, vmin=0, vmax=1)
        for axes, title in zip(row, titles):
            axes.set(xticks=[], yticks=[])
            axes.set_title(title if row is figure.axes[:5] or axes in figure.axes[:5] else "", fontsize=8)
    return figure


# Checkpoints ---------------------------------------------------------------------------------------------------------
def load_file(path: str, what: str) -> dict:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint file at {path}")
    except Exception:  # whatever a foreign file makes of it; torch's own advice is to trust it
        fail(f"{path} is not {what}")
    return data if isinstance(data, dict) else fail(f"{path} is not {what}")


def load_checkpoint(path: str, end: str = "") -> tuple[dict, str]:
    """A checkpoint and its path; of a run's folder its best, or the one whose name has this `end`."""
    if os.path.isdir(path):
        found = [name for name in sorted(os.listdir(path)) if name.endswith(".pt")]
        found = [name for name in found if name.endswith("_last.pt") == bool(end)]
        path = os.path.join(path, found[0] if found else f"*{end}.pt")
    data = load_file(path, "a checkpoint")
    if not {"model", "classes", "preprocessing", "args"} <= set(data):
        fail(f"{path} is not a checkpoint of this script")
    return data, path


def restore(checkpoint: dict) -> Classifier:
    """The network of a checkpoint."""
    args = Args(**{k: v for k, v in checkpoint["args"].items() if k in {flag.name for flag in fields(Args)}})
    args.image_size = checkpoint["preprocessing"]["size"]
    args.weights = "none"
    trunk, features, _ = make_trunk(args, random=True)
    model = Classifier(trunk, features, checkpoint["preprocessing"], checkpoint["classes"])
    model.load_state_dict(checkpoint["model"])
    return model


if __name__ == "__main__":
    # TRY NOT TO MODIFY: flags, and those of the run that --resume and --evaluate name
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
    describe = "Train a classifier of images off-the-shelf, by fine-tuning or from scratch, and test it; for example\n"
    describe += "python finetune_classify.py --data-dir DIR --arch resnet50 --strategy fine-tune"
    args, checkpoint, path = tyro.cli(Args, description=describe), {}, ""
    if args.evaluate or args.resume:
        checkpoint, path = load_checkpoint(args.evaluate or args.resume, "" if args.evaluate else "_last")
        saved = Args(**{k: v for k, v in checkpoint["args"].items() if k in {flag.name for flag in fields(Args)}})
        saved.resume = None
        args = tyro.cli(Args, default=copy.copy(saved), description=describe)
        for name in {flag.name for flag in fields(Args)} - (ON_EVALUATE if args.evaluate else ON_RESUME):
            if getattr(args, name) != getattr(saved, name):
                fail(f"--{name.replace('_', '-')} is {getattr(saved, name)} in {path} and cannot be changed")
        if args.resume and "optimizer" not in checkpoint:
            fail(f"{path} has no training state to resume; that is in the file that ends in _last.pt")
        same = all(getattr(args, name) == getattr(saved, name) for name in ("data_dir", "dataset", "metadata"))
        split_file = os.path.join(os.path.dirname(path), "split.csv")
        if os.path.isfile(split_file) and (args.resume or same) and not args.split_file:
            args.split_file = split_file
    flags = dict(vars(args))
    for name, (low, high) in BOUNDS.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is not between {low:,} and {high:,}")
    if not re.fullmatch(r"[\w.+-]+", args.exp_name):
        fail(f"--exp-name {args.exp_name!r} is part of the names of files: letters, digits and .+-_ only")
    if args.strategy != "fine-tune" and args.unfreeze_from or args.strategy == "scratch" and args.pretrained:
        fail("--unfreeze-from needs --strategy fine-tune, and --pretrained another strategy than scratch")
    if (args.predict or args.saliency) and not args.evaluate:
        fail("--predict and --saliency need the checkpoint of a trained network: --evaluate PATH")
    if args.dataset:
        args.data_dir = args.data_dir or "data"
    elif not (args.evaluate and args.predict) and not os.path.isdir(args.data_dir or ""):
        fail(
            "--data-dir DIR or --dataset NAME is needed"
            if not args.data_dir
            else f"--data-dir {args.data_dir}: there is no such folder"
        )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    on_cuda, frozen, table, unreadable = device.type == "cuda", args.strategy == "off-the-shelf", None, {}

    # Data
    if args.predict:
        data = Data(find_images(args.predict), {}, [], args.predict)
    elif args.dataset:
        data = read_torchvision(args)
    else:
        data = read_table(args) if args.metadata else read_folders(args.data_dir)
    if args.evaluate and not args.split_file and "test" not in data.splits:
        data.splits = ["test"] * len(data.names)
    classes = checkpoint["classes"] if args.predict else split_data(args, data, checkpoint.get("classes"))
    targets = {
        task: torch.tensor(
            [MISSING if label is None else classes[task].index(label) for label in labels], device=device
        )
        for task, labels in data.labels.items()
    }
    indices = {
        name: torch.tensor([i for i, s in enumerate(data.splits) if s == name], dtype=torch.long) for name in SPLITS
    }
    sizes = ", ".join(f"{len(indices[name]):,} {name}" for name in SPLITS)
    say(
        f"{data.folder or args.dataset}: {sizes}; "
        + ", ".join(f"{task}: {len(names):,} classes" for task, names in classes.items())
    )

    # The network
    if checkpoint:
        model = restore(checkpoint)
    elif args.pretrained:
        source, _ = load_checkpoint(args.pretrained)
        if source["args"]["arch"] != args.arch:
            fail(f"--pretrained {args.pretrained} is a {source['args']['arch']}, not a {args.arch}")
        donor = restore(source)
        model = Classifier(donor.trunk, donor.heads[0].in_features, source["preprocessing"], classes)
    else:
        model = Classifier(*make_trunk(args, random=args.strategy == "scratch" or args.weights == "none"), classes)
    model = model.to(device, memory_format=torch.channels_last)
    model.bfloat16 = args.amp and on_cuda
    if (frozen or args.unfreeze_from) and not args.evaluate:
        model.freeze(args.unfreeze_from)

    def stream(loader: DataLoader):
        """(images, indices) on the device, without what cannot be read."""
        for images, chosen, bad in loader:
            report(bad, data, unreadable)
            if images is not None:
                yield images.to(device, non_blocking=True), chosen.to(device, non_blocking=True)

    def batches_of(split: str):
        batches = indices[split].split(args.batch_size)
        if table is not None:
            return ((table[chosen], chosen) for chosen in batches)
        return stream(make_loader(args, data, model.preprocessing, batches, device))

    # Test, predict and look
    if args.predict:
        indices["test"] = torch.arange(len(data.names))
        logits, chosen = run_through(model, batches_of("test"))
        best = {task: values.softmax(dim=1).max(dim=1) for task, values in logits.items()}
        rows = [["path", *(column for task in best for column in (task, f"{task}_probability"))]]
        for row, i in enumerate(chosen.tolist()):
            found = ((classes[task][b.indices[row]], f"{b.values[row]:.4f}") for task, b in best.items())
            rows.append([data.names[i], *(value for pair in found for value in pair)])
        path = os.path.join(os.path.dirname(path), "predictions.csv")
        write_csv(path, rows)
        say(f"saved {len(rows) - 1:,} predictions to {path}; {len(unreadable):,} images could not be read")
        sys.exit()
    if args.evaluate:
        loss, metrics = test(model, batches_of("test"), targets)
        say(f"{path} on {len(indices['test']):,} test images: loss {loss:.4f}; {in_words(metrics)}")
        if args.saliency:
            other = args.compare and restore(load_checkpoint(args.compare)[0])
            other = other or Classifier(*make_trunk(args, random=args.weights == "none"), {})
            order = np.random.default_rng(args.seed).permutation(indices["test"].numpy())[: args.saliency].tolist()
            pictures, name = Pictures(data, model.preprocessing), args.compare or f"{args.weights} weights"
            figure = explain(model, other.to(device), name, pictures, order, classes[model.tasks[0]])
            save_figure(figure, os.path.join(os.path.dirname(path), "saliency.png"))
            say(f"saved {os.path.join(os.path.dirname(path), 'saliency.png')}")
        sys.exit()

    # Images that fit on the device are decoded once (their transform is deterministic), features computed once
    memory = torch.cuda.mem_get_info()[0] / 2 if on_cuda else 2e9
    memory = memory if args.cache_gb is None else args.cache_gb * 1e9
    if frozen or len(data.names) * 3 * model.preprocessing["size"] ** 2 <= memory:
        everything = torch.arange(len(data.names)).split(args.batch_size)
        progress = Progress(len(data.names))
        with torch.no_grad():
            for images, chosen in stream(make_loader(args, data, model.preprocessing, everything, device)):
                values = model.eval().features(images) if frozen else images
                if table is None:
                    table = torch.zeros((len(data.names), *values.shape[1:]), dtype=values.dtype, device=device)
                table[chosen] = values
                progress.done += len(chosen)
                if progress.due():
                    progress.show(f"{'features' if frozen else 'decoded'} {progress.done / progress.total:.1%}")
    indices = {
        name: torch.tensor([i for i in members.tolist() if i not in unreadable]) for name, members in indices.items()
    }
    if table is not None:
        indices = {name: members.to(device) for name, members in indices.items()}
    weights = None
    if args.balanced_sampling:
        first = next(iter(targets.values())).cpu()[indices["train"].cpu()]
        weights = (1 / torch.bincount(first.clamp(min=0)).double())[first.clamp(min=0)] * (first != MISSING)
    optimizer = make_optimizer(args, model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"{args.arch}, {args.strategy}: {trained:,} of {size:,} parameters are trained, images of "
        f"{model.preprocessing['size']} pixels, on {device}")  # fmt: skip

    # TRY NOT TO MODIFY: the run's folder and logs
    name = re.sub(r"[^\w.+-]", "_", args.dataset or os.path.basename(os.path.abspath(args.data_dir)))
    run_dir = os.path.dirname(path)
    while not args.resume:
        run_dir = os.path.join(args.logdir, f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}")
        try:
            os.makedirs(run_dir)
            break
        except FileExistsError:  # two runs that start in the same second
            time.sleep(1)
        except OSError as error:
            fail(f"--logdir {args.logdir}: {error}")
    stem = os.path.basename(path).removesuffix("_last.pt") if args.resume else args.exp_name
    best_path, last_path = (os.path.join(run_dir, f"{stem}{end}.pt") for end in ("", "_last"))
    if args.track:
        import wandb

        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": os.path.basename(run_dir)}
        wandb.init(**project, config=vars(args), sync_tensorboard=True, save_code=True)
    epoch, lowest, stale, history = (
        checkpoint.get(k, v) for k, v in [("epoch", 0), ("best", float("inf")), ("stale", 0), ("history", [])]
    )
    writer = SummaryWriter(run_dir, purge_step=epoch + 1 if args.resume else None)
    lines = "\n".join(f"|{name}|{value}|" for name, value in flags.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{lines}", epoch)
    best = None
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
        best = load_checkpoint(best_path)[0] if epoch else None
    else:
        write_csv(
            os.path.join(run_dir, "split.csv"),
            [["path", "split", *data.labels], *zip(data.names, data.splits, *data.labels.values())],
        )

    def state() -> dict:
        """All that resuming needs, copied: an interrupt comes in the middle of an epoch."""
        keep = frozen and "trunk."
        tensors = {
            k: v if keep and k.startswith(keep) else v.to("cpu", copy=True) for k, v in model.state_dict().items()
        }
        return {
            "args": flags, "classes": classes, "preprocessing": model.preprocessing, "epoch": epoch, "best": lowest,
            "stale": stale, "history": list(history), "model": tensors,
            "optimizer": copy.deepcopy(optimizer.state_dict()),
        }  # fmt: skip

    def save() -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        for checkpoint, path in ((best, best_path), (last, last_path)):
            if checkpoint:
                with written(path) as temporary:
                    torch.save(checkpoint, temporary)
        if history:
            save_figure(curves(history), os.path.join(run_dir, "curves.png"))

    # Training
    last, saved_at = state(), -60.0
    order = shuffled(indices["train"], args, epoch, weights)
    loader = None if table is not None else make_loader(args, data, model.preprocessing, order, device)
    progress = Progress((args.epochs - epoch) * len(indices["train"]))
    try:
        while epoch < args.epochs and stale < args.patience:
            torch.manual_seed(args.seed * 1_000_003 + epoch)  # of dropout: a resumed run draws what a straight one does
            order[:] = shuffled(indices["train"], args, epoch, weights)
            begun = time.perf_counter()
            batches = stream(loader) if loader else ((table[chosen], chosen) for chosen in order)
            mean = train_epoch(model, optimizer, batches, targets, progress, f"epoch {epoch + 1}/{args.epochs}")
            rate = len(indices["train"]) / (time.perf_counter() - begun)
            val_loss, metrics = test(model, batches_of("val"), targets)
            epoch, stale = epoch + 1, 0 if check(val_loss) < lowest else stale + 1
            scalars = {"train/loss": mean, "val/loss": val_loss} | by_tag("val", metrics)
            for tag, value in (scalars | {"charts/images_per_second": rate}).items():
                writer.add_scalar(tag, value, epoch)
            losses = f"train loss {mean:.4f}, validation loss {val_loss:.4f}"
            say(f"epoch {epoch}: {losses}; {in_words(metrics)}; {rate:,.0f} images/s")
            history, lowest = [*history, scalars], min(lowest, val_loss)
            last = state()
            best = best if stale else {name: value for name, value in last.items() if name != "optimizer"}
            if time.perf_counter() - saved_at > 60:
                save()
                saved_at = time.perf_counter()

        # The test images, once, with the weights of the lowest validation loss
        model.load_state_dict(best["model"])
        loss, metrics = test(model, batches_of("test"), targets)
        for tag, value in ({"test/loss": loss} | by_tag("test", metrics)).items():
            writer.add_scalar(tag, value, epoch)
        last["finished"] = True
        save()
    except BaseException as stop:  # Ctrl-C, kill, a worker or a GPU without memory: nothing is lost
        save()
        say(f"stopped in epoch {epoch + 1}; python {os.path.basename(__file__)} --resume {run_dir} goes on")
        if isinstance(stop, Exception):
            fail(f"{type(stop).__name__}: {str(stop).splitlines()[0]}")
        raise
    rows = [["task", "class", "precision", "recall", "f1", "support"]]
    for task, m in metrics.items():
        figure = confusion_matrix(m["confusion"], classes[task], f"{task}: test images")
        save_figure(figure, os.path.join(run_dir, f"confusion{f'_{task}' if len(metrics) > 1 else ''}.png"))
        rows += [[task, *row] for row in zip(classes[task], *(values.tolist() for values in m["table"].values()))]
    write_csv(os.path.join(run_dir, "per_class.csv"), rows)
    writer.close()
    say(f"test: loss {loss:.4f}; {in_words(metrics)} ({len(indices['test']):,} images; the best of {epoch} epochs)")
    if unreadable:
        say(f"{len(unreadable):,} images could not be read and were left out")
    say(f"saved {best_path}, per_class.csv, split.csv, curves.png and confusion.png beside it")
