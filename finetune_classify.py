# Transfer of image classifiers: a network trained on ImageNet learns to tell the material, type or artist of a work of
# art (or any other classes) off-the-shelf, by fine-tuning, or from scratch, as in "Deep Transfer Learning for Art
# Classification Problems" (Sabatelli et al., 2018) and "Contributions to Deep Transfer Learning" (2022, chapter 4).
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
import inspect
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Callable, Iterable, Literal, NoReturn, Optional, Union

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
    resume: Optional[str] = None  # run (folder or checkpoint) to continue in its folder, with its flags
    track: bool = False  # mirror the run to Weights and Biases (needs `pip install wandb`)
    wandb_project_name: str = "deep-transfer-learning"  # the project of the run at Weights and Biases
    wandb_entity: Optional[str] = None  # the team of the run at Weights and Biases

    # Data
    data_dir: Optional[str] = None  # a folder per class, or train/, val/, test/ of these, or the images of --metadata
    dataset: Optional[str] = None  # a data set of torchvision by its name, in --data-dir (None: data)
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
    strategy: Literal["off-the-shelf", "fine-tune", "scratch"] = "fine-tune"  # new last layer, all, all from random
    weights: str = "IMAGENET1K_V1"  # torchvision's name of the weights, a file with a state dict, or `none`
    pretrained: Optional[str] = None  # run (folder or checkpoint) to start from instead, all but its heads
    unfreeze_from: Optional[str] = None  # fine-tune from this module on (`layer4`) and leave all before it frozen

    # Training
    epochs: int = 100  # passes over the training images, unless --patience ends training first
    patience: int = 7  # epochs without a lower validation loss after which training ends
    batch_size: int = 32  # images per update
    optimizer: Optional[Literal["sgd", "rmsprop", "adam"]] = None  # (None: as the papers, RMSprop off-the-shelf or SGD)
    learning_rate: float = 1e-3  # the learning rate of the optimizer
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # of SGD; the paper has it, the authors' code has not
    weight_decay: float = 0.0  # of weights with two dimensions and more; never of biases and normalisation

    # After training
    evaluate: Optional[str] = None  # run (folder or checkpoint) to test instead of training
    predict: Optional[str] = None  # with --evaluate: classify this folder into predictions.csv, instead of testing
    saliency: int = 0  # with --evaluate: explain so many test images by Grad-CAM and VisualBackProp
    compare: Optional[str] = None  # with --saliency: run of the other network to show (None: that of --weights)


FREE = {"cuda", "amp", "workers", "cache_gb", "data_dir", "metadata", "split_file", "download"}  # to be given anew
ON_RESUME = FREE | {"resume", "epochs", "patience", "learning_rate", "track", "wandb_project_name", "wandb_entity"}
ON_EVALUATE = FREE | {"evaluate", "predict", "saliency", "compare", "weights", "seed", "batch_size", "dataset"}
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
SPLITS = ("train", "val", "test")
MISSING = -100  # the class of a missing label, as torch's cross entropy has it
MAX_PIXELS = 179_000_000  # of a decoded image; Pillow has this limit, but for scans before they are reduced
Image.MAX_IMAGE_PIXELS = None


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def written(path: str):
    """A temporary name that becomes `path` at the end; on a full disk one line, and nothing is left behind."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either
        fail(f"{path} cannot be written: {first_line(error)}")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_csv(path: str, rows: list[dict]) -> None:
    with written(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)


def read_csv(flag: str, path: str, columns: list[str]) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, csv.Error) as error:
        fail(f"{flag} {path}: {error}")
    for column in columns:
        if not rows or column not in rows[0]:
            fail(f"{flag} {path}: no column {column!r} in it, but {list(rows[0]) if rows else 'nothing'}")
    return rows


class Progress:
    """A line every ten seconds with images/s and the time that is left of all `total` images."""

    def __init__(self, total: int):
        self.total, self.done, self.begun, self.last = total, 0, time.perf_counter(), time.perf_counter()

    def step(self, images: int, describe: Callable[[], str]) -> None:
        self.done, now = self.done + images, time.perf_counter()
        if now - self.last > 10:
            self.last, rate = now, self.done / (now - self.begun)
            left = timedelta(seconds=int((self.total - self.done) / rate))
            print(f"{describe()}, {rate:,.0f} images/s, ETA of the run {left}", flush=True)


# Data: rows of an image's path, its split ("" if it has none yet) and the label of every task ("" where missing) ------
def find_images(folder: str) -> list[str]:
    """Paths of all images below `folder`, relative to it; what a link leads to a second time is left out."""
    found, again, seen = [], [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: print(f"left out: {error}")):
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        if os.path.realpath(root) in seen:
            again.append(root)
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        for path in (os.path.join(root, name) for name in names if os.path.splitext(name)[1].lower() in IMAGES):
            (again if os.path.realpath(path) in seen else found).append(path)
            seen.add(os.path.realpath(path))
    if again:
        print(f"left out: {len(again):,} links to what is there already, such as {again[0]!r}")
    return sorted(os.path.relpath(path, folder) for path in found) or fail(f"{folder}: no images in this folder")


def read_folders(folder: str) -> list[dict]:
    """A folder per class; images in train/, val/ (or valid/) and test/ have their split already."""
    paths, splits = find_images(folder), {"train": "train", "val": "val", "valid": "val", "test": "test"}
    fixed, rows = {"train", "test"} <= {path.split(os.sep)[0] for path in paths}, []
    for path in paths:
        split, *names = path.split(os.sep) if fixed else ["", *path.split(os.sep)]
        if len(names) > 1 and (split in splits or not fixed):
            rows.append({"path": path, "split": splits.get(split, ""), "class": names[0]})
    return rows or fail(f"--data-dir {folder}: a folder per class is expected there, or --metadata with the labels")


def read_table(args: Args) -> list[dict]:
    """Images and the labels that the CSV --metadata has for them."""
    table = read_csv("--metadata", args.metadata, [args.image_column, *args.label_column])
    by_name, rows, left_out = defaultdict(set), {}, []
    for path in find_images(args.data_dir):
        for name in (path, os.path.basename(path)):
            by_name[name].add(path)
            by_name[os.path.splitext(name)[0]].add(path)
    for entry in table:
        name = entry[args.image_column].strip()
        paths = by_name[name] & {name} or by_name[name]
        if len(paths) != 1 or paths <= set(rows):
            left_out.append(name)
            continue
        labels = {column: entry[column].strip() for column in args.label_column}
        labels = {column: "" if label in args.drop_label else label for column, label in labels.items()}
        rows[min(paths)] = {"path": min(paths), "split": ""} | labels
    if left_out:
        why = "have no image there, several, or that of an earlier row"
        print(f"left out: {len(left_out):,} of {len(table):,} rows of {args.metadata} {why}, such as {left_out[:5]}")
    return list(rows.values())


def read_torchvision(args: Args) -> tuple[list[dict], dict[str, Dataset]]:
    """A data set of torchvision and its parts; one without validation images has them taken from training."""
    make, parts, rows = getattr(datasets, args.dataset, None), {}, []
    if not inspect.isclass(make):
        fail(f"--dataset {args.dataset}: torchvision has none of that name, but {', '.join(datasets.__all__)}")
    by_name = "split" in inspect.signature(make).parameters
    for split, name in [("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test")]:
        if split in parts or (split == "val" and not by_name):
            continue
        try:
            which = {"split": name} if by_name else {"train": split == "train"}
            parts[split] = part = make(args.data_dir or "data", download=args.download, **which)
        except ValueError:  # it has no such split
            continue
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            fail(f"--dataset {args.dataset}: {first_line(error)}")
        labels = next((getattr(part, name) for name in ("targets", "labels", "_labels") if hasattr(part, name)), None)
        labels = map(int, [part[i][1] for i in range(len(part))] if labels is None else labels)
        names = [part.classes[label] if hasattr(part, "classes") else f"{label:03d}" for label in labels]
        rows += [{"path": f"{split}/{i}", "split": split, "class": name} for i, name in enumerate(names)]
    return rows, parts


def split_data(args: Args, rows: list[dict], trained: Optional[dict] = None) -> tuple[list[dict], dict[str, list[str]]]:
    """Assign the splits that are missing; returns rows and the classes of every task, those in all splits or `trained`.

    Other labels become missing, and rows without any label go.
    """
    tasks = [name for name in rows[0] if name not in ("path", "split")]
    if args.split_file:
        saved = {row["path"]: row["split"] for row in read_csv("--split-file", args.split_file, ["path", "split"])}
        known = [row | {"split": saved[row["path"]]} for row in rows if row["path"] in saved]
        if len(known) < len(rows):
            print(f"left out: {len(rows) - len(known):,} images that are not in {args.split_file}")
        rows = known
    elif not {"train", "val"} <= {row["split"] for row in rows}:
        rng, groups = np.random.default_rng(args.seed), defaultdict(list)
        new = [split for split in ("test", "val") if split not in {row["split"] for row in rows}]
        for row in rows:
            if row["split"] in ("", "train"):
                groups[row[tasks[0]] or None if args.stratify else None].append(row)
        for label in sorted(groups, key=str):
            # a class of three images has one in each split
            tenth = max(round(len(groups[label]) / 10), int(len(groups[label]) >= 3))
            for i, member in enumerate(rng.permutation(len(groups[label]))):
                groups[label][member]["split"] = new[i // tenth] if i < tenth * len(new) else "train"
    classes = {}
    for task in tasks:
        by_split = [{row[task] for row in rows if row["split"] == split} for split in SPLITS]
        classes[task] = trained[task] if trained else sorted(set.intersection(*by_split) - {""})
        dropped = [row for row in rows if row[task] not in {"", *classes[task]}]
        if dropped:
            lost = f"{len({row[task] for row in dropped}):,} classes with {len(dropped):,} images"
            print(f"left out: {task}: {lost} are not in {'the network' if trained else 'all of train, val and test'}")
        if len(classes[task]) < 2:
            fail(f"{task}: {len(classes[task])} classes are in all of train, val and test, at least 2 are needed")
        for row in dropped:
            row[task] = ""
    return [row for row in rows if any(row[task] for task in tasks)], classes


def open_image(path: str, side: int) -> Image.Image:
    """The image upright in RGB, its shorter side at least `side` pixels if it has them; raises OSError or ValueError.

    JPEGs are decoded at the fraction (1/2, 1/4, 1/8) that suffices: a scan of 4,000 x 3,000 pixels 7 times as fast.
    """
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))
        # pixels as decoded, and with the shorter side resized
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
    """Image i as uint8 `(3, size, size)`, i, and why it cannot be read, or an empty string.

    `source` is the folder of the `paths`, or the parts of a data set of torchvision.
    """

    def __init__(self, source: Union[str, dict[str, Dataset]], paths: list[str], preprocessing: dict):
        self.source, self.paths, self.preprocessing = source, paths, preprocessing
        mode = v2.InterpolationMode(preprocessing["interpolation"])
        steps = [v2.Resize(preprocessing["resize"], mode, antialias=True), v2.CenterCrop(preprocessing["size"])]
        self.transform = v2.Compose([*steps, v2.PILToTensor()])

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, str]:
        try:
            if isinstance(self.source, str):
                image = open_image(os.path.join(self.source, self.paths[i]), self.preprocessing["resize"])
            else:
                split, number = self.paths[i].split("/")
                image = self.source[split][int(number)][0].convert("RGB")
            return self.transform(image), int(i), ""
        except Exception as error:  # Pillow's plugins raise whatever their formats make them
            size = self.preprocessing["size"]
            return torch.zeros(3, size, size, dtype=torch.uint8), int(i), f"{type(error).__name__}: {error}"


def ignore_signals(_) -> None:
    """In a worker: signals to the process group are for the training process, which saves and ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch reports their end as an error
    for worker in multiprocessing.active_children():
        worker.kill()


def stop(*_) -> NoReturn:
    """Handle a signal."""
    end_workers()
    sys.exit(130)


def make_loader(args: Args, pictures: Pictures, batches: list, device: torch.device) -> DataLoader:
    """Images, indices and errors of `batches` of indices, a list that may change between passes."""
    cores = os.cpu_count() if device.type == "cuda" else min(os.cpu_count(), 4)
    workers = min(cores if args.workers is None else args.workers, len(batches))
    return DataLoader(
        pictures, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # its own: the number of workers changes no other random draw
    )  # fmt: skip


# The network ---------------------------------------------------------------------------------------------------------
def load_file(path: str) -> dict:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no file at {path}")
    except Exception:  # of many kinds; torch's own message advises to trust the file
        fail(f"{path} is no file of tensors that can be loaded safely")
    return data if isinstance(data, dict) else fail(f"{path} is no dict of tensors")


def load_weights(args: Args, trunk: nn.Module) -> None:
    """Load all of `trunk` from what --weights names: a file, or what torchvision downloads once."""
    if os.path.isfile(args.weights):
        state = load_file(args.weights)
        state = state.get("model", state.get("state_dict", state))
    else:
        entry = models.get_model_weights(args.arch)[args.weights]
        try:
            state = entry.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            there = f"put {entry.url} into {torch.hub.get_dir()}/checkpoints, or give a file with --weights"
            fail(f"--weights {args.weights}: no download ({error}); {there}")
    shapes = {name: tensor.shape for name, tensor in state.items() if torch.is_tensor(tensor)}
    wrong = [name for name, tensor in trunk.state_dict().items() if shapes.get(name) != tensor.shape]
    if wrong:
        fail(f"--weights {args.weights} is of another architecture: {len(wrong):,} tensors do not fit, as {wrong[0]}")
    trunk.load_state_dict({name: state[name] for name in trunk.state_dict()})


def make_trunk(args: Args, random: bool) -> tuple[nn.Module, int, dict]:
    """A network without its last layer, the number of its features, and its preprocessing."""
    if args.arch.startswith("timm:") or args.arch == "xception":
        try:
            import timm

            name = "legacy_xception" if args.arch == "xception" else args.arch.removeprefix("timm:")
            local = os.path.isfile(args.weights)
            trunk = timm.create_model(name, pretrained=not random and not local, num_classes=0)
        except (ImportError, RuntimeError, OSError, ValueError) as error:
            fail(f"--arch {args.arch} needs timm (pip install timm) and its weights: {first_line(error)}")
        if local and not random:
            load_weights(args, trunk)
        config = timm.data.resolve_model_data_config(trunk)
        size = args.image_size or config["input_size"][-1]
        preprocessing = {"size": size, "resize": round(size / config["crop_pct"]), "mean": list(config["mean"])}
        return trunk, trunk.num_features, preprocessing | {key: config[key] for key in ("std", "interpolation")}
    try:
        entries = models.get_model_weights(args.arch)
    except ValueError:
        fail(f"--arch {args.arch}: torchvision has {', '.join(models.list_models(module=models))}")
    if args.weights not in [*entries.__members__, "none"] and not os.path.isfile(args.weights):
        fail(f"--weights {args.weights}: neither a file nor one of {', '.join(entries.__members__)}, none")
    preset = (entries[args.weights] if args.weights in entries.__members__ else next(iter(entries))).transforms()
    size = args.image_size or preset.crop_size[0]
    resize = max(round(preset.resize_size[0] * size / preset.crop_size[0]), size)
    preprocessing = {"size": size, "resize": resize, "mean": list(preset.mean), "std": list(preset.std)}
    preprocessing["interpolation"] = preset.interpolation.value
    extra = {"image_size": size} if args.arch.startswith("vit") else {}
    if args.arch in ("inception_v3", "googlenet"):
        extra = {"transform_input": False, "init_weights": random, "aux_logits": False}
        if not random:  # trained on images scaled as TensorFlow scales them
            preprocessing |= {"mean": [0.5] * 3, "std": [0.5] * 3}
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
        self.frozen, self.bfloat16 = [], False

    def freeze(self, until: Optional[str]) -> None:
        """Freeze the trunk (`until` None) or what comes before its module `until`, with its statistics and dropout."""
        modules, parameters = list(self.trunk.named_modules()), list(self.trunk.named_parameters())
        at = [i for i, (name, _) in enumerate(parameters) if until and name.startswith(until + ".")]
        if until and not at:
            fail(f"--unfreeze-from {until}: no such layers, but {', '.join(dict(self.trunk.named_children()))}")
        before = modules[: list(dict(modules)).index(until) if until else None]
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
        """Images, or features of the frozen trunk."""
        features = inputs if inputs.ndim == 2 else self.features(inputs)
        return {task: head(features) for task, head in zip(self.tasks, self.heads)}


def load_checkpoint(path: str, end: str = "") -> tuple[dict, str]:
    """A checkpoint and its path; of a run's folder the one of the best epoch, or that whose name ends in `end`."""
    if os.path.isdir(path):
        names = [name for name in sorted(os.listdir(path)) if name.endswith(end + ".pt")]
        path = os.path.join(path, next((name for name in names if end or not name.endswith("_last.pt")), f"*{end}.pt"))
    data = load_file(path)
    if not {"model", "classes", "preprocessing", "args"} <= set(data):
        fail(f"{path} is not a checkpoint of this script")
    return data, path


def restore(checkpoint: dict) -> Classifier:
    """The network of a checkpoint."""
    args = Args(arch=checkpoint["args"]["arch"], weights="none", image_size=checkpoint["preprocessing"]["size"])
    trunk, features, _ = make_trunk(args, random=True)
    model = Classifier(trunk, features, checkpoint["preprocessing"], checkpoint["classes"])
    model.load_state_dict(checkpoint["model"])
    return model


# Training ------------------------------------------------------------------------------------------------------------
def total_loss(logits: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over tasks of the mean cross entropy over the images that have the label."""
    losses = (F.cross_entropy(logits[task], target, reduction="sum") for task, target in targets.items())
    return sum(loss / (target != MISSING).sum().clamp(min=1) for loss, target in zip(losses, targets.values()))


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
    generator, n = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch), len(indices)
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
        if len(chosen) > 1 or model.frozen:
            loss = total_loss(model(inputs), {task: target[chosen] for task, target in targets.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, seen = total + loss.detach() * len(chosen), seen + len(chosen)
        progress.step(len(chosen), lambda: f"{name}: loss {finite(total / max(seen, 1)):.4f}")
    return finite(total / max(seen, 1))


def finite(loss) -> float:
    if not np.isfinite(float(loss)):
        fail(f"the loss is {float(loss)}: try a lower --learning-rate")
    return float(loss)


@torch.no_grad()
def run_through(model: Classifier, batches: Iterable) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Logits `(N, classes)` of every task and the indices `(N,)` of the images."""
    model.eval()
    found = [(model(inputs), chosen) for inputs, chosen in batches]
    if not found:
        fail("there are no images to test on, or none can be read")
    logits = {task: torch.cat([values[task] for values, _ in found]) for task in model.tasks}
    return logits, torch.cat([chosen for _, chosen in found])


def test(model: Classifier, batches: Iterable, targets: dict, split: str) -> tuple[dict[str, float], dict[str, dict]]:
    """Scalars such as `val/top1` (`val/TASK/top1` of several tasks), and `measure` of every task."""
    logits, seen = run_through(model, batches)
    targets = {task: target[seen] for task, target in targets.items()}
    metrics = {task: measure(logits[task], targets[task]) for task in targets}
    scalars = {f"{split}/loss": total_loss(logits, targets).item()}
    for task, found in metrics.items():
        prefix = f"{split}/{task}/" if len(metrics) > 1 else f"{split}/"
        scalars |= {prefix + name: found[name] for name in ("top1", "top5", "macro_f1")}
    return scalars, metrics


def words(scalars: dict[str, float]) -> str:
    return ", ".join(f"{tag} {value:.4f}" for tag, value in scalars.items())


def measure(logits: torch.Tensor, targets: torch.Tensor) -> dict:
    """Metrics of logits `(N, classes)` with targets int64 `(N,)`: shares; precision, recall, F1, support per class."""
    known = targets != MISSING
    logits, targets, n = logits[known], targets[known], logits.shape[1]
    ranked = logits.topk(min(5, n), dim=1).indices
    confusion = torch.bincount(targets * n + ranked[:, 0], minlength=n * n).view(n, n)
    right, support, chosen = confusion.diag().double(), confusion.sum(dim=1).double(), confusion.sum(dim=0).double()
    f1, total = 2 * right / (support + chosen).clamp(min=1), max(len(targets), 1)
    return {
        "top1": right.sum().item() / total, "top5": (ranked == targets[:, None]).sum().item() / total,
        "macro_f1": (f1.sum() / (support > 0).sum().clamp(min=1)).item(), "precision": right / chosen.clamp(min=1),
        "recall": right / support.clamp(min=1), "f1": f1, "support": support, "confusion": confusion,
    }  # fmt: skip


# Pictures ------------------------------------------------------------------------------------------------------------
def save_figure(figure: Figure, path: str) -> None:
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def draw_curves(history: list[dict[str, float]]) -> Figure:
    """Loss and validation metrics by epoch; `history` has a dict of scalars per epoch."""
    figure = Figure(figsize=(10, 4))
    for axes, title in zip(figure.subplots(1, 2), ("loss", "validation")):
        for tag in [tag for tag in history[0] if tag.endswith("loss") == (title == "loss")]:
            axes.plot(range(1, len(history) + 1), [scalars[tag] for scalars in history], marker=".", label=tag)
        axes.set(title=title, xlabel="epoch")
        axes.legend()
    return figure


def draw_confusion(confusion: torch.Tensor, names: list[str], title: str) -> Figure:
    """Rows (true classes) as shares of the class; with names up to 60 classes, and with counts up to 25."""
    figure, confusion = Figure(figsize=(2 + 0.5 * min(len(names), 25),) * 2), confusion.cpu()
    axes = figure.subplots()
    axes.imshow(confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    for row, column in confusion.nonzero().tolist() if len(names) <= 25 else []:
        count = confusion[row, column].item()
        axes.text(column, row, count, ha="center", color="white" if count > confusion[row].sum() / 2 else "black")
    return figure


def saliency_maps(model: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM and VisualBackProp of images uint8 `(B, 3, H, W)`, each float `(B, H, W)` in [0, 1].

    Grad-CAM (Selvaraju et al., 2017): where the last feature map speaks for the most likely class of the first task; a
    network without heads is asked for the length of its features. VisualBackProp (Bojarski et al., 2018): mean maps
    after rectifiers, multiplied from coarse to fine. Maps of one resolution are averaged first, as the product over 35
    rectifiers is a few single pixels; they grow by interpolation, where the paper has a transposed convolution.
    """
    kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU)
    if not any(isinstance(module, kinds) for module in model.trunk.modules()):
        kinds = (nn.Conv2d,)  # rectified by functions: Inception, DenseNet
    last, rectified = [], defaultdict(list)

    def keep(module: nn.Module, _, output) -> None:
        if torch.is_tensor(output) and output.ndim == 4 and min(output.shape[1:3]) > 1 and output.shape[2] > 1:
            # images are square; maps that are not have their channels last (ConvNeXt, Swin)
            order = (0, 1, 2, 3) if output.shape[2] == output.shape[3] else (0, 3, 1, 2)
            last[:] = [output, order]
            if isinstance(module, kinds):
                values = output.detach().permute(order).float().relu().mean(dim=1, keepdim=True)
                rectified[values.shape[-1]].append(spread(values))

    hooks = [module.register_forward_hook(keep) for module in model.trunk.modules()]
    features = model.features(images.float().requires_grad_())
    score = model.heads[0](features).max(dim=1).values if len(model.heads) else features.norm(dim=1)
    for hook in hooks:
        hook.remove()
    if not rectified:
        fail("--saliency: this network has no feature maps")
    (gradient,), (output, order) = torch.autograd.grad(score.sum(), last[0]), last
    cam = (gradient.permute(order).mean(dim=(2, 3), keepdim=True) * output.detach().permute(order)).sum(1, keepdim=True)
    cam = spread(F.interpolate(cam.float().relu(), images.shape[2:], mode="bilinear"))[:, 0]
    mask = torch.ones(len(images), 1, 1, 1, device=images.device)
    for size in sorted(rectified):
        mask = spread(F.interpolate(mask, size, mode="bilinear") * torch.stack(rectified[size]).mean(dim=0))
    mask = F.interpolate(mask, images.shape[2:], mode="bilinear")[:, 0]
    # the zeros around an image make a frame that outshines all else: the brightest 2 % count as one
    return cam, (mask / mask.flatten(1).quantile(0.98, dim=1).clamp(min=1e-12)[:, None, None]).clamp(max=1)


def spread(maps: torch.Tensor) -> torch.Tensor:
    """Every map `(B, 1, H, W)` scaled to [0, 1]."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def draw_saliency(networks: dict[str, Classifier], images: torch.Tensor, labels: list[str]) -> Figure:
    """A row per image uint8 `(B, 3, H, W)`: the image with its label, then both maps of every network."""
    figure = Figure(figsize=(2 + 4 * len(networks), 2.2 * len(images)))
    grid = figure.subplots(len(images), 1 + 2 * len(networks), squeeze=False)
    maps = {name: saliency_maps(network.eval(), images) for name, network in networks.items()}
    methods = ("Grad-CAM", "VisualBackProp")
    columns = [(f"{methods[i]}\n{name}", maps[name][i]) for i in range(2) for name in maps]
    for axes, (title, _) in zip(grid[0], [("image", None), *columns]):
        axes.set_title(title, fontsize=8)
    for row, image, label, number in zip(grid, images.cpu(), labels, range(len(images))):
        row[0].set_ylabel(label, fontsize=8)
        row[0].imshow(image.permute(1, 2, 0))
        for axes, (_, mask) in zip(row[1:], columns):
            axes.imshow(image.float().mean(dim=0), cmap="gray")
            axes.imshow(mask[number].cpu(), cmap="jet", alpha=0.5, vmin=0, vmax=1)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    # TRY NOT TO MODIFY: flags, with those of the run that --resume and --evaluate name
    about = "Train an image classifier off-the-shelf, by fine-tuning or from scratch, then test it once; for example\n"
    about += "python finetune_classify.py --data-dir DIR --arch resnet50 --strategy fine-tune"
    args, checkpoint, path = tyro.cli(Args, description=about), {}, ""
    if args.evaluate or args.resume:
        checkpoint, path = load_checkpoint(args.evaluate or args.resume, "" if args.evaluate else "_last")
        names = {flag.name for flag in fields(Args)} & set(checkpoint["args"]) - {"resume"}
        saved = {name: checkpoint["args"][name] for name in names}
        args = tyro.cli(Args, default=Args(**saved), description=about)
        changed = {name for name in saved if getattr(args, name) != saved[name]}
        if fixed := changed - (ON_EVALUATE if args.evaluate else ON_RESUME):
            fail(f"the flags {', '.join(sorted(fixed))} are those of {path} and cannot be changed")
        if args.resume and not {"optimizer", "history"} <= set(checkpoint):
            fail(f"{path} has no training state to resume; that is in the file that ends in _last.pt")
        over = checkpoint.get("epoch", 0) >= args.epochs or checkpoint.get("stale", 0) >= args.patience
        if args.resume and checkpoint.get("finished") and over:
            fail(f"{path} is of a run that has ended; more --epochs or --patience would go on")
        split_file = os.path.join(os.path.dirname(path), "split.csv")
        if os.path.isfile(split_file) and (args.resume or not changed & {"data_dir", "dataset", "metadata"}):
            args.split_file = args.split_file if "split_file" in changed else split_file
    for name, value in vars(args).items():
        least = 1 if name in ("epochs", "patience", "batch_size", "image_size") else 0
        if isinstance(value, (int, float)) and not least <= value < 2**63:
            fail(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if not re.fullmatch(r"[\w.+-]+", args.exp_name):
        fail(f"--exp-name {args.exp_name!r} becomes a file's name: letters, digits and .+-_ only")
    if (args.unfreeze_from and args.strategy != "fine-tune") or (args.pretrained and args.strategy == "scratch"):
        fail("--unfreeze-from needs --strategy fine-tune, and --pretrained any but scratch")
    if (args.predict or args.saliency) and not args.evaluate:
        fail("--predict and --saliency need a trained network: --evaluate PATH")
    folder = args.predict or args.data_dir
    if not os.path.isdir(folder or "") and (args.predict or not args.dataset):
        fail(f"{folder}: there is no such folder" if folder else "give --data-dir DIR or --dataset NAME")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    on_cuda, frozen = device.type == "cuda", args.strategy == "off-the-shelf"

    # Data
    source, classes = folder, checkpoint.get("classes")
    if args.predict:
        rows = [{"path": name, "split": "test"} for name in find_images(folder)]
    elif args.dataset:
        rows, source = read_torchvision(args)
    else:
        rows = read_table(args) if args.metadata else read_folders(folder)
    if args.evaluate and not args.split_file and "test" not in {row["split"] for row in rows}:
        rows = [row | {"split": "test"} for row in rows]
    if not args.predict:
        rows, classes = split_data(args, rows, classes)
    indices = {name: [i for i, row in enumerate(rows) if row["split"] == name] for name in SPLITS}
    targets = {}
    for task, names in classes.items():
        numbers = {name: number for number, name in enumerate(names)}
        targets[task] = torch.tensor([numbers.get(row.get(task), MISSING) for row in rows], device=device)
    sizes = [f"{len(found):,} {name}" for name, found in indices.items()]
    print(", ".join(sizes + [f"{task}: {len(names):,} classes" for task, names in classes.items()]))

    # The network
    if checkpoint:
        model = restore(checkpoint)
    elif args.pretrained:
        checkpoint, _ = load_checkpoint(args.pretrained)
        donor, wanted = restore(checkpoint), (args.arch, args.image_size or checkpoint["preprocessing"]["size"])
        if wanted != (checkpoint["args"]["arch"], donor.preprocessing["size"]):
            fail(f"--pretrained: a {checkpoint['args']['arch']} for {donor.preprocessing['size']} pixels, not {wanted}")
        model = Classifier(donor.trunk, donor.heads[0].in_features, donor.preprocessing, classes)
    else:
        model = Classifier(*make_trunk(args, random=args.strategy == "scratch" or args.weights == "none"), classes)
    model = model.to(device, memory_format=torch.channels_last)
    model.bfloat16 = args.amp and on_cuda
    if (frozen or args.unfreeze_from) and not args.evaluate:
        model.freeze(args.unfreeze_from)
    pictures, unreadable, table = Pictures(source, [row["path"] for row in rows], model.preprocessing), set(), None

    def batches(chunks: Iterable, loader: Optional[DataLoader] = None):
        """(images or features, indices) on the device, without images that cannot be read, which are named once."""
        if table is not None:
            yield from ((table[chosen], chosen) for chosen in chunks)
            return
        for images, chosen, errors in loader or make_loader(args, pictures, chunks, device):
            good = [row for row, error in enumerate(errors) if not error]
            for i, error in zip(chosen.tolist(), errors):
                if error and i not in unreadable:
                    name = pictures.paths[i].encode(errors="backslashreplace").decode()  # it may not be UTF-8
                    print(f"left out: {name} cannot be read, {error}")
                    unreadable.add(i)
            if good:
                images, chosen = (images, chosen) if len(good) == len(errors) else (images[good], chosen[good])
                yield images.to(device, non_blocking=True), chosen.to(device, non_blocking=True)

    def in_order(split: str) -> list[torch.Tensor]:
        return torch.tensor(indices[split], device=device if table is not None else "cpu").split(args.batch_size)

    # After training: predict, test, look
    beside = os.path.dirname(path)
    if args.predict:
        logits, chosen = run_through(model, batches(in_order("test")))
        found = [{"path": pictures.paths[i]} for i in chosen.tolist()]
        for task, values in logits.items():
            for row, share, number in zip(found, *(best.tolist() for best in values.softmax(dim=1).max(dim=1))):
                row |= {task: classes[task][number], f"{task}_probability": f"{share:.4f}"}
        write_csv(os.path.join(beside, "predictions.csv"), found)
        print(f"saved {len(found):,} predictions to {os.path.join(beside, 'predictions.csv')}")
    elif args.evaluate:
        scalars, _ = test(model, batches(in_order("test")), targets, "test")
        print(f"{path} on {len(indices['test']) - len(unreadable):,} test images: {words(scalars)}")
    if args.saliency and not args.predict:
        if args.compare:
            other = restore(load_checkpoint(args.compare)[0])
        else:
            other = Classifier(*make_trunk(args, random=args.weights == "none"), {})
        order = np.random.default_rng(args.seed).permutation([i for i in indices["test"] if i not in unreadable])
        chosen = order[: args.saliency].tolist()
        images, task = torch.stack([pictures[i][0] for i in chosen]).to(device), model.tasks[0]
        best = model(images)[task].argmax(dim=1).tolist()
        labels = [f"{rows[i][task]}\n-> {classes[task][number]}" for i, number in zip(chosen, best)]
        networks = {args.compare or f"{args.weights} weights": other.to(device), "this network": model}
        save_figure(draw_saliency(networks, images, labels), os.path.join(beside, "saliency.png"))
        print(f"saved {os.path.join(beside, 'saliency.png')}")
    if args.evaluate:
        sys.exit(print(f"{len(unreadable):,} images could not be read and were left out\n" * bool(unreadable), end=""))

    # Features of a frozen network are computed once; images that fit on the device are decoded once, which is exact
    fits = (torch.cuda.mem_get_info()[0] / 2 if on_cuda else 2e9) if args.cache_gb is None else args.cache_gb * 1e9
    if frozen or len(rows) * 3 * model.preprocessing["size"] ** 2 <= fits:
        progress, cache = Progress(len(rows)), None
        for images, chosen in batches(torch.arange(len(rows)).split(args.batch_size)):
            with torch.no_grad():
                values = model.eval().features(images) if frozen else images
            if cache is None:
                cache = torch.zeros((len(rows), *values.shape[1:]), dtype=values.dtype, device=device)
            cache[chosen] = values
            progress.step(len(chosen), lambda: f"{'features of' if frozen else 'decoded'} {progress.done:,} images")
        table = cache if cache is not None else fail("none of the images can be read")
        indices = {name: [i for i in found if i not in unreadable] for name, found in indices.items()}
    train, weights = torch.tensor(indices["train"], device=device if table is not None else "cpu"), None
    if args.balanced_sampling:
        first = next(iter(targets.values()))[train].cpu()
        weights = (first != MISSING) / torch.bincount(first[first != MISSING]).double()[first.clamp(min=0)]
    optimizer = make_optimizer(args, model)
    trained, size = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True))
    side = f"images of {model.preprocessing['size']} pixels, on {device}"
    print(f"{args.arch}, {args.strategy}: {trained:,} of {size:,} parameters are trained, {side}")

    # TRY NOT TO MODIFY: the run's folder and logs
    name = re.sub(r"[^\w.+-]", "_", args.dataset or os.path.basename(os.path.abspath(folder)))
    run_dir = os.path.join(args.logdir, f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}")
    run_dir = (beside or ".") if args.resume else run_dir
    stem = os.path.basename(path).removesuffix("_last.pt") if args.resume else args.exp_name
    best_path, last_path = (os.path.join(run_dir, f"{stem}{end}.pt") for end in ("", "_last"))
    try:
        os.makedirs(run_dir, exist_ok=bool(args.resume))
    except OSError as error:
        fail(f"--logdir {args.logdir}: {error}")
    if args.track:
        import wandb

        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": os.path.basename(run_dir)}
        wandb.init(**project, config=vars(args), sync_tensorboard=True, save_code=True)
    epoch, history, lowest, stale, best = 0, [], float("inf"), 0, None
    if args.resume:
        epoch, history, lowest, stale = (checkpoint[name] for name in ("epoch", "history", "best", "stale"))
        best = load_checkpoint(best_path)[0] if epoch else None
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
    else:
        write_csv(os.path.join(run_dir, "split.csv"), rows)
    writer = SummaryWriter(run_dir, purge_step=epoch + 1 if args.resume else None)
    lines = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{lines}", epoch)

    def state() -> dict:
        """All that resuming needs, copied, as an interrupt comes in the middle of an epoch."""
        tensors = model.state_dict().items()
        return {
            "args": vars(args), "classes": classes, "preprocessing": model.preprocessing, "epoch": epoch,
            "best": lowest, "stale": stale, "history": history, "optimizer": copy.deepcopy(optimizer.state_dict()),
            "model": {k: v if frozen and k.startswith("trunk.") else v.to("cpu", copy=True) for k, v in tensors},
        }  # fmt: skip

    def save() -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        if best:
            save_figure(draw_curves(history), os.path.join(run_dir, "curves.png"))
        for data, path in ((best, best_path), (last, last_path)):
            if data:
                with written(path) as temporary:
                    torch.save(data, temporary)

    # Training
    last, saved_at, order = state(), -60.0, shuffled(train, args, epoch, weights)
    loader = make_loader(args, pictures, order, device) if table is None else None
    progress = Progress((args.epochs - epoch) * len(train))
    try:
        while epoch < args.epochs and stale < args.patience:
            torch.manual_seed(args.seed * 1_000_003 + epoch)  # of dropout: a resumed run draws what a straight one does
            order[:], begun = shuffled(train, args, epoch, weights), time.perf_counter()
            title = f"epoch {epoch + 1}/{args.epochs}"
            scalars = {"train/loss": train_epoch(model, optimizer, batches(order, loader), targets, progress, title)}
            rate = len(train) / (time.perf_counter() - begun)
            scalars |= test(model, batches(in_order("val")), targets, "val")[0]
            epoch, stale = epoch + 1, 0 if finite(scalars["val/loss"]) < lowest else stale + 1
            history, lowest = [*history, scalars], min(lowest, scalars["val/loss"])
            for tag, value in (scalars | {"charts/images_per_second": rate}).items():
                writer.add_scalar(tag, value, epoch)
            print(f"epoch {epoch}: {words(scalars)}, {rate:,.0f} images/s", flush=True)
            last = state()
            best = best if stale else {name: value for name, value in last.items() if name != "optimizer"}
            if time.perf_counter() - saved_at > 60:
                save()
                saved_at = time.perf_counter()

        # The test images, once, with the weights of the lowest validation loss
        model.load_state_dict(best["model"])
        scalars, metrics = test(model, batches(in_order("test")), targets, "test")
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, epoch)
        last["finished"] = True
        save()
    except BaseException as end:  # Ctrl-C, kill, a lost worker, a full GPU: nothing is lost
        sys.stdout = open(os.devnull, "w") if isinstance(end, BrokenPipeError) else sys.stdout
        save()
        print(f"stopped in epoch {epoch + 1}; python {os.path.basename(__file__)} --resume {run_dir} goes on")
        raise fail(f"{type(end).__name__}: {first_line(end)}") if isinstance(end, Exception) else end
    finally:
        end_workers()
    per_class, columns = [], ("precision", "recall", "f1", "support")
    for task, found in metrics.items():
        figure = draw_confusion(found["confusion"], classes[task], f"{task}, test images")
        save_figure(figure, os.path.join(run_dir, f"confusion{f'_{task}' if len(metrics) > 1 else ''}.png"))
        for number, name in enumerate(classes[task]):
            values = {column: found[column][number].item() for column in columns}
            per_class.append({"task": task, "class": name} | values)
    write_csv(os.path.join(run_dir, "per_class.csv"), per_class)
    writer.close()
    print(f"test, the best of {epoch} epochs: {words(scalars)}")
    print(f"{len(unreadable):,} images could not be read and were left out\n" * bool(unreadable) + f"saved {run_dir}")
