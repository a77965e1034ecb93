# Transfer of image classifiers: a network trained on ImageNet learns to tell the material, type or artist of a work of
# art (or any other classes) off-the-shelf, by fine-tuning, or from scratch, as in "Deep Transfer Learning for Art
# Classification Problems" (Sabatelli et al., 2018) and "Contributions to Deep Transfer Learning" (2022, chapter 4).
#
#   python finetune_classify.py --dataset DTD --download --strategy off-the-shelf             needs no data of yours
#   python finetune_classify.py --data-dir DIR --arch resnet50 --strategy fine-tune           a folder per class
#   python finetune_classify.py --evaluate runs/NAME --predict DIR                            classify other images
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.21", "pillow>=10",
#                 "matplotlib>=3.8"]
# ///
import copy
import csv
import glob
import io
import os
import re
import signal
import sys
import time
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
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
    workers: int | None = None  # processes that read images, 0 for none (None: all cores on CUDA, else up to 4)
    cache_gb: float | None = None  # keep decoded images on the device up to this size (None: half a GPU; CPU: 2)
    logdir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run (folder or checkpoint) to continue, with its flags unless given anew
    track: bool = False  # mirror the run to Weights and Biases (needs `pip install wandb`)

    # Data
    data_dir: str | None = None  # a folder per class, or train/, val/, test/ of these, or the images of --metadata
    dataset: str | None = None  # a data set of torchvision by its name, in --data-dir (None: `data`)
    download: bool = False  # download --dataset first
    metadata: str | None = None  # CSV with a row per image of --data-dir
    image_column: str = "ImageId"  # column of --metadata with the file names, with or without extension
    label_column: list[str] = field(default_factory=lambda: ["dc_type"])  # column(s) with labels; each gets a head
    drop_label: list[str] = field(default_factory=lambda: ["anoniem"])  # labels that count as missing, besides empty
    split_file: str | None = None  # split.csv of an earlier run to use again
    stratify: bool = True  # split every class 80/10/10; `--no-stratify` splits all images at once, as the authors did
    image_size: int | None = None  # side of the images in pixels (None: what the weights were trained with)

    # The network
    arch: str = "resnet50"  # a classifier of torchvision, `xception` or `timm:NAME` (both need `pip install timm`)
    strategy: Literal["off-the-shelf", "fine-tune", "scratch"] = "fine-tune"  # train the last layer, all, all anew
    weights: str = "IMAGENET1K_V1"  # torchvision's name of the weights, a file with a state dict, or `none`
    pretrained: str | None = None  # run (folder or checkpoint) to start from instead, all but its heads
    unfreeze_from: str | None = None  # fine-tune from this module on (`layer4`) and leave all before it frozen

    # Training
    epochs: int = 100  # passes over the training images, unless --patience ends training first
    patience: int = 7  # epochs without a lower validation loss after which training ends
    batch_size: int = 32  # images per update
    optimizer: Literal["sgd", "rmsprop", "adam"] | None = None  # (None: the papers', RMSprop off-the-shelf, else SGD)
    learning_rate: float = 1e-3  # the learning rate of the optimizer
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # of SGD; the paper has it, the authors' code has not
    weight_decay: float = 0.0  # of weights with two dimensions and more; never of biases and normalisation

    # After training
    evaluate: str | None = None  # run (folder or checkpoint) to test instead of training
    predict: str | None = None  # with --evaluate: classify this folder into predictions.csv, instead of testing
    saliency: int = 0  # with --evaluate: explain so many test images by Grad-CAM and VisualBackProp in saliency.png


IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
SPLITS = ("train", "val", "test")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # allowed to this process
CHECKPOINT = ("args", "classes", "preprocessing", "model", "last", "optimizer")  # keys of this script's checkpoints
MISSING = -100  # the class of a missing label, as torch's cross entropy has it


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def write_file(path: str, write) -> None:
    """Have `write` fill a temporary file, which then replaces `path`: half a file is never left. Folders are made."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either
        if os.path.exists(temporary):
            os.remove(temporary)
        fail(f"{path} cannot be written: {error}")


def write_csv(path: str, rows: list[dict]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([rows[0], *(row.values() for row in rows)])
    write_file(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


def read_csv(path: str, columns: list[str], errors: str = "surrogateescape") -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8-sig", errors=errors) as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, ValueError, csv.Error) as error:
        fail(f"{path} cannot be read: {error}")
    if not rows or set(columns) - set(rows[0]):
        fail(f"{path}: the columns {columns} are expected, not {list(rows[0]) if rows else 'nothing'}")
    return rows


# Data: rows of an image's path, its split ("" if it has none yet) and the label of every task ("" where missing) ------
def find_images(folder: str) -> list[str]:
    """Paths of all images below `folder`, relative to it, without what links lead to a second time."""
    paths = [path for path in glob.glob("**/*", root_dir=folder, recursive=True) if path.lower().endswith(IMAGES)]
    paths.sort(key=lambda path: (-len(path), path))  # the shortest path of an image counts
    unique = {os.path.realpath(os.path.join(folder, path)): path for path in paths}
    return sorted(unique.values()) or fail(f"{folder}: no images in this folder")


def read_folders(folder: str) -> list[dict]:
    """A folder per class; images in train(ing)/, val(id, idation)/ and test(ing)/ have their split already."""
    known = dict(train="train", training="train", val="val", valid="val", validation="val", test="test", testing="test")
    paths, rows = find_images(folder), []
    top = {known.get(path.split(os.sep)[0].lower()) for path in paths} - {None}
    fixed = "train" in top and len(top) > 1
    for path in paths:
        split, *names = path.split(os.sep) if fixed else ["", *path.split(os.sep)]
        if len(names) > 1 and (split.lower() in known or not fixed):
            rows.append({"path": path, "split": known.get(split.lower(), ""), "class": names[0]})
    return rows or fail(f"--data-dir {folder}: a folder per class is expected there, or --metadata with the labels")


def read_table(args: Args) -> list[dict]:
    """Images and the labels that the CSV --metadata has for them."""
    table = read_csv(args.metadata, [args.image_column, *args.label_column], errors="strict")
    by_name, rows = defaultdict(set), {}
    for path in find_images(args.data_dir):
        for name in (path, os.path.basename(path)):
            by_name[name].add(path)
            by_name[os.path.splitext(name)[0]].add(path)
    for entry in table:
        name = entry[args.image_column].strip()
        paths = by_name[name] & {name} or by_name[name]
        if len(paths) == 1:
            labels = {column: entry[column].strip() for column in args.label_column}
            labels = {column: "" if label in args.drop_label else label for column, label in labels.items()}
            rows.setdefault(min(paths), {"path": min(paths), "split": ""} | labels)
    print(f"{len(rows):,} of {len(table):,} rows have an image of their own")
    return list(rows.values()) or fail(f"--metadata {args.metadata}: no row has an image in {args.data_dir}")


def read_torchvision(args: Args) -> tuple[list[dict], dict[str, Dataset]]:
    """Rows and parts of a data set of torchvision that has training, validation and test images."""
    try:
        make, rows = getattr(datasets, args.dataset), []
        parts = {split: make(args.data_dir or "data", split=split, download=args.download) for split in SPLITS}
    except (AttributeError, TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
        fail(f"--dataset {args.dataset} with split={'|'.join(SPLITS)}: {error}")
    for split, part in parts.items():
        labels = part._labels if hasattr(part, "_labels") else [part[i][1] for i in range(len(part))]
        names = part.classes if hasattr(part, "classes") else [f"{label:03d}" for label in range(max(labels) + 1)]
        rows += [{"path": f"{split}/{i}", "split": split, "class": names[label]} for i, label in enumerate(labels)]
    return rows, parts


def split_data(args: Args, rows: list[dict], trained: dict | None = None) -> tuple[list[dict], dict[str, list[str]]]:
    """Rows with their split, and each task's classes: those in all splits, or `trained` ones; labels of others go."""
    tasks, given = [name for name in rows[0] if name not in ("path", "split")], {row["split"] for row in rows}
    if trained and tasks != list(trained):
        fail(f"the network's labels are {', '.join(trained)}, not {', '.join(tasks)}: see --label-column")
    if args.split_file:
        saved = {row["path"]: row["split"] for row in read_csv(args.split_file, ["path", "split"])}
        paths = {row["path"] for row in rows}
        gone, new = saved.keys() - paths, paths - saved.keys()
        if gone and (args.resume or not (args.evaluate or args.pretrained)):
            fail(f"--split-file {args.split_file}: {len(gone):,} of its images are not there, as {min(gone)}")
        if gone or new:
            print(f"{args.split_file}: {len(gone):,} of its images are not there; {len(new):,} are not in it, left out")
        rows = [row | {"split": saved[row["path"]]} for row in rows if row["path"] in saved]
    elif not set(SPLITS) <= given:
        rng, groups, drawn = np.random.default_rng(args.seed), defaultdict(list), sorted({"test", "val"} - given)
        for row in (row for row in rows if row["split"] in ("", "train")):
            groups[row[tasks[0]] if args.stratify else ""].append(row)
        for _, group in sorted(groups.items()):
            tenth = max(round(len(group) / 10), int(len(group) >= 3))  # three images: one in each split
            for i, member in enumerate(rng.permutation(len(group))):
                group[member]["split"] = drawn[i // tenth] if i < tenth * len(drawn) else "train"
    classes = {}
    for task in tasks:
        by_split = [{row[task] for row in rows if row["split"] == split} for split in SPLITS]
        classes[task] = trained[task] if trained else sorted(set.intersection(*by_split) - {""})
        dropped = [row for row in rows if row[task] not in ("", *classes[task])]
        for row in dropped:
            row[task] = ""
        where = "the network" if trained else "all of train, val and test"
        if dropped:
            print(f"left out: {task}: {len(dropped):,} images of classes that are not in {where}")
        if len(classes[task]) < 2:
            fail(f"{task}: {len(classes[task])} classes are in {where}, at least 2 are needed")
    return [row for row in rows if any(row[task] for task in tasks)], classes


class Pictures(Dataset):
    """Image i of a folder or of torchvision's data as uint8 `(3, size, size)`, i, and why it cannot be read, or ""."""

    def __init__(self, source: str | dict[str, Dataset], paths: list[str], preprocessing: dict):
        self.source, self.paths, self.size, self.least = source, paths, preprocessing["size"], preprocessing["resize"]
        mode = v2.InterpolationMode(preprocessing["interpolation"])
        self.transform = v2.Compose([v2.Resize(self.least, mode), v2.CenterCrop(self.size), v2.PILToTensor()])

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, str]:
        try:
            if isinstance(self.source, dict):
                split, number = self.paths[i].split("/")
                return self.transform(self.source[split][int(number)][0].convert("RGB")), i, ""
            with Image.open(os.path.join(self.source, self.paths[i])) as image:
                image.draft("RGB", (2 * self.least, 2 * self.least))  # a large JPEG at the fraction that suffices
                if image.mode[0] in "IF" or max(image.size) > 100 * min(image.size):
                    raise ValueError(f"mode {image.mode}, {image.size}: 8 bits a channel, sides to 1:100 are expected")
                image = ImageOps.exif_transpose(image)
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return self.transform(image.convert("RGB")), i, ""
        except Exception as error:  # noqa: BLE001 Pillow's plugins raise whatever their formats make them
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), i, f"{type(error).__name__}: {error}"


# The network ----------------------------------------------------------------------------------------------------------
def load_file(path: str, *needed: str) -> dict:
    """What is in a file of tensors, or in that of a run's folder, and its `path`."""
    if os.path.isdir(path):
        path = os.path.join(path, next((name for name in os.listdir(path) if name.endswith(".pt")), "*.pt"))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True) | {"path": os.path.abspath(path)}
    except Exception as error:  # noqa: BLE001 torch's own message advises to trust the file
        fail(f"{path} cannot be loaded: {'there is none' if isinstance(error, OSError) else 'no file of tensors'}")
    if set(needed) - set(content):
        fail(f"{path} is not a checkpoint of this script")
    return content


def make_trunk(arch: str, weights: str, image_size: int | None, random=False) -> tuple[nn.Module, int, dict]:
    """A network without its last layer, the number of its features, and the preprocessing that goes with `weights`."""
    names, extra, random = [], {}, random or weights == "none"
    if arch.startswith("timm:") or arch == "xception":
        name, theirs = arch.removeprefix("timm:"), weights == Args.weights and not random
        name = "legacy_xception" if name == "xception" else name
        try:
            import timm  # pip install timm

            trunk = timm.create_model(name, pretrained=theirs, num_classes=0)
        except (ImportError, RuntimeError, OSError) as error:
            fail(f"--arch {arch}: {error}")
        config = timm.data.resolve_model_data_config(trunk)
        features = getattr(trunk, "head_hidden_size", None) or trunk.num_features
        size = image_size or config["input_size"][-1]
        preprocessing = {"size": size, "resize": int(size / config["crop_pct"]), "mean": list(config["mean"])}
        preprocessing |= {"std": list(config["std"]), "interpolation": config["interpolation"]}
        random = random or theirs  # nothing more to load
    else:
        if arch not in models.list_models(module=models):
            fail(f"--arch {arch}: torchvision has {', '.join(models.list_models(module=models))}")
        entries = models.get_model_weights(arch)
        names = list(entries.__members__)
        if weights not in [*names, "none"] and not os.path.isfile(weights):
            fail(f"--weights {weights}: neither a file nor one of {', '.join(names)}, none")
        preset = getattr(entries, weights, next(iter(entries))).transforms()
        size = image_size or preset.crop_size[0]
        resize = max(round(preset.resize_size[0] * size / preset.crop_size[0]), size)
        preprocessing = {"size": size, "resize": resize, "mean": list(preset.mean), "std": list(preset.std)}
        preprocessing |= {"interpolation": preset.interpolation.value}
        if arch in ("inception_v3", "googlenet"):
            extra = {"init_weights": random, "aux_logits": False}
            if not random:  # trained on images scaled as TensorFlow scales them
                preprocessing |= {"mean": [0.5] * 3, "std": [0.5] * 3}
        elif arch.startswith("vit"):
            extra = {"image_size": size}
        trunk = models.get_model(arch, weights=None, **extra)
        if arch.startswith("vgg"):  # global average pooling instead of hidden layers, as the paper's VGG19
            features, trunk.avgpool, trunk.classifier = 512, nn.AdaptiveAvgPool2d(1), nn.Identity()
        elif arch.startswith("squeezenet"):
            features, trunk.classifier = 512, nn.AdaptiveAvgPool2d(1)
        else:
            last = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)][-1]
            features = trunk.get_submodule(last).in_features
            trunk.set_submodule(last, nn.Identity())
    if random:
        return trunk, features, preprocessing
    if weights in names:  # torchvision downloads it once
        try:
            state = entries[weights].get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            fail(f"--weights {weights} cannot be downloaded: {error}")
    else:
        state = load_file(weights)
        state = state.get("model", state.get("state_dict", state))
    # published files have the names of DenseNet's first version, and older ones no counts of batches
    state = OrderedDict((re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", k), v) for k, v in state.items())
    if arch.startswith("vit") and "encoder.pos_embedding" in state:
        state = models.vision_transformer.interpolate_embeddings(trunk.image_size, trunk.patch_size, state)
    state._metadata = {"": {"version": 2}}  # MNASNet asks for its version; modules without one rename older files' keys
    try:
        wrong = trunk.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:  # of shapes, a line each
        wrong = str(error).splitlines()[1:]
    if wrong:
        fail(f"--weights {weights} is of another architecture: {len(wrong):,} tensors, as {wrong[0].strip()}")
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

    def freeze(self, until: str | None) -> None:
        """Freeze the trunk (`until` None) or what comes before its module `until`, with its statistics and dropout."""
        modules = dict(self.trunk.named_modules())
        if until and until not in modules:
            fail(f"--unfreeze-from {until}: no such layers, but {', '.join(dict(self.trunk.named_children()))}")
        for name, module in modules.items():
            if until and name == until:
                break
            if not (until and until.startswith(f"{name}." if name else "")):  # it does not contain `until`
                self.frozen.append(module)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `(B, 3, H, W)` -> float32 `(B, features)`."""
        images = images.float().contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.trunk((images - self.mean) / self.std).float()

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images, or features of the frozen trunk."""
        features = inputs if inputs.ndim == 2 else self.features(inputs)
        return {task: head(features) for task, head in zip(self.tasks, self.heads)}


def restore(checkpoint: dict, arch: str, image_size: int | None, weights: str = "model") -> Classifier:
    """The network of a checkpoint, for images of another size than its own if that is given."""
    if arch != checkpoint["args"]["arch"]:
        fail(f"{checkpoint['path']} is of --arch {checkpoint['args']['arch']}, not {arch}")
    old = checkpoint["preprocessing"]
    size = image_size or old["size"]
    if arch.startswith("vit") and size != old["size"]:
        fail(f"--image-size {size}: {checkpoint['path']} has a position for each part of {old['size']} pixels")
    trunk, features, _ = make_trunk(arch, "none", size)
    preprocessing = old | {"size": size, "resize": round(old["resize"] * size / old["size"])}
    model = Classifier(trunk, features, preprocessing, checkpoint["classes"])
    model.load_state_dict(checkpoint[weights])
    return model


# Training -------------------------------------------------------------------------------------------------------------
def total_loss(logits: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over tasks of the mean cross entropy over the images that have the label."""
    losses = (F.cross_entropy(logits[task], target, reduction="sum") for task, target in targets.items())
    return sum(loss / (target != MISSING).sum().clamp(min=1) for loss, target in zip(losses, targets.values()))


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizers; weight decay only on what multiplies."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    name = args.optimizer or ("rmsprop" if args.strategy == "off-the-shelf" else "sgd")
    if name == "sgd":
        nesterov = args.nesterov and args.momentum > 0
        return torch.optim.SGD(groups, args.learning_rate, momentum=args.momentum, nesterov=nesterov)
    if name == "adam":
        return torch.optim.Adam(groups, args.learning_rate)
    return torch.optim.RMSprop(groups, args.learning_rate, alpha=0.9, eps=1e-8)


def train_epoch(model: Classifier, optimizer, batches, targets: dict[str, torch.Tensor]) -> float:
    """Mean loss of a pass over batches of (images or features, indices), both on the device."""
    model.train()
    for module in model.frozen:  # or their batch normalisation would go on counting
        module.training = False
    total, seen = 0.0, 0
    for inputs, chosen in batches:
        loss = total_loss(model(inputs), {task: target[chosen] for task, target in targets.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, seen = total + loss.detach() * len(chosen), seen + len(chosen)
    return float(total / seen)


@torch.no_grad()
def run_through(model: Classifier, batches) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Logits float32 `(N, classes)` of every task and the indices int64 `(N,)` of the images."""
    found = [(model.eval()(inputs), chosen) for inputs, chosen in batches]
    if not found:
        fail("there are no images to test on, or none can be read")
    logits = {task: torch.cat([values[task] for values, _ in found]) for task in model.tasks}
    return logits, torch.cat([chosen for _, chosen in found])


def measure(logits: dict, seen: torch.Tensor, targets: dict, split: str) -> tuple[dict[str, float], dict]:
    """Loss and shares in [0, 1], as `val/top1` (`val/TASK/top1` of several tasks), and confusion matrices.

    Logits are `(N, classes)` of the images `seen` `(N,)`, targets int64 of all; a matrix has a row per true class.
    Macro-F1 is the mean over the classes that have images, where scikit-learn's is over those predicted, too.
    """
    targets, confusions = {task: target[seen] for task, target in targets.items()}, {}
    scalars = {f"{split}/loss": total_loss(logits, targets).item()}
    for task, target in targets.items():
        prefix = f"{split}/{task}" if len(targets) > 1 else split
        values, target, n = logits[task][target != MISSING], target[target != MISSING], logits[task].shape[1]
        ranked, total = values.topk(min(5, n), dim=1).indices, max(len(target), 1)
        confusion = torch.bincount(target * n + ranked[:, 0], minlength=n * n).view(n, n)
        right, support, chosen = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        f1 = 2 * right.double() / (support + chosen).clamp(min=1)
        scalars[f"{prefix}/top1"] = right.sum().item() / total
        scalars[f"{prefix}/top5"] = (ranked == target[:, None]).sum().item() / total
        scalars[f"{prefix}/macro_f1"] = f1.sum().item() / max((support > 0).sum().item(), 1)
        confusions[task] = confusion
    return scalars, confusions


def describe(scalars: dict[str, float]) -> str:
    return ", ".join(f"{tag} {value:.4f}" for tag, value in scalars.items())


# Pictures -------------------------------------------------------------------------------------------------------------
rcParams["text.parse_math"] = False  # `$` in the names of classes


def save_figure(figure: Figure, path: str) -> None:
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=120, bbox_inches="tight"))


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
    """Rows (true classes) as shares of the class; with names up to 60 classes."""
    figure, confusion = Figure(figsize=(2 + 0.5 * min(len(names), 25),) * 2), confusion.cpu()
    axes = figure.subplots()
    axes.imshow((confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    return figure


def spread(maps: torch.Tensor) -> torch.Tensor:
    """Every map `(B, 1, H, W)` scaled to [0, 1]."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def saliency_maps(model: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM and VisualBackProp of images uint8 `(B, 3, H, W)`, each float `(B, H, W)` in [0, 1].

    Grad-CAM (Selvaraju et al., 2017) of the most likely class of the first task, or, without heads, of the length of
    the features. VisualBackProp (Bojarski et al., 2018): mean maps after rectifiers, averaged at a resolution (the
    product over 35 is a few single pixels), multiplied from coarse to fine, enlarged by interpolation.
    """
    kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU)
    if not any(isinstance(module, kinds) for module in model.trunk.modules()):
        normed = any(isinstance(module, nn.BatchNorm2d) for module in model.trunk.modules())
        kinds = (nn.BatchNorm2d if normed else nn.Conv2d,)  # rectified by functions: Inception, GoogLeNet
    last, rectified = [], defaultdict(list)

    def keep(module: nn.Module, _, output) -> None:
        # maps depend on the image (Swin V2 also has tables of positions) and are square (MaxViT also has windows)
        if torch.is_tensor(output) and output.ndim == 4 and output.requires_grad and min(output.shape[1:3]) > 1:
            # images are square; maps that are not have their channels last (ConvNeXt, Swin)
            order = (0, 1, 2, 3) if output.shape[2] == output.shape[3] else (0, 3, 1, 2)
            last[:] = [output, order]
            if isinstance(module, kinds) and output.shape[order[2]] == output.shape[order[3]]:
                values = output.detach().permute(order).float().relu().mean(dim=1, keepdim=True)
                rectified[values.shape[-1]].append(spread(values))

    hook = nn.modules.module.register_module_forward_hook(keep)
    model.requires_grad_(False)
    features = model.features(images.float().requires_grad_())
    hook.remove()
    score = model.heads[0](features).max(dim=1).values if len(model.heads) else features.norm(dim=1)
    if not rectified:
        fail("--saliency: this network has no feature maps")
    (gradient,), (output, order) = torch.autograd.grad(score.sum(), last[0]), last
    cam = (gradient.permute(order).mean(dim=(2, 3), keepdim=True) * output.detach().permute(order)).sum(1, keepdim=True)
    cam = spread(F.interpolate(cam.float().relu(), images.shape[2:], mode="bilinear"))[:, 0]
    mask = torch.ones(len(images), 1, 1, 1, device=images.device)
    for size in sorted(rectified):
        mask = spread(F.interpolate(mask, size, mode="bilinear") * torch.stack(rectified[size]).mean(dim=0))
    mask = F.interpolate(mask, images.shape[2:], mode="bilinear")[:, 0]
    # zero padding leaves a frame that outshines all else: what is above the 98 % quantile counts as 1
    return cam, (mask / mask.flatten(1).quantile(0.98, dim=1).clamp(min=1e-12)[:, None, None]).clamp(max=1)


def draw_saliency(networks: dict[str, Classifier], images: torch.Tensor, labels: list[str]) -> Figure:
    """A row per image uint8 `(B, 3, H, W)`: the image with its label, then both maps of every network."""
    maps = {name: saliency_maps(network.eval(), images) for name, network in networks.items()}
    methods = ("Grad-CAM", "VisualBackProp")
    columns = [(f"{method}\n{name}", maps[name][i].cpu()) for i, method in enumerate(methods) for name in maps]
    figure, images = Figure(figsize=(2 + 4 * len(networks), 2.2 * len(images))), images.cpu()
    no_ticks = {"xticks": [], "yticks": []}
    grid = figure.subplots(len(images), 1 + len(columns), squeeze=False, subplot_kw=no_ticks)
    for row, (label, image) in enumerate(zip(labels, images)):
        grid[row, 0].imshow(image.permute(1, 2, 0))
        grid[row, 0].set(title="image" if row == 0 else "", ylabel=label)
        for axes, (title, mask) in zip(grid[row, 1:], columns):
            axes.imshow(image.float().mean(dim=0), cmap="gray")
            axes.imshow(mask[row], cmap="jet", alpha=0.5, vmin=0, vmax=1)
            axes.set_title(title if row == 0 else "", fontsize=8)
    return figure


if __name__ == "__main__":
    # TRY NOT TO MODIFY: flags, with those of the run that --resume and --evaluate name unless given anew
    about = "Train an image classifier off-the-shelf, by fine-tuning or from scratch, then test it once. A first run: "
    about += "python finetune_classify.py --dataset DTD --download --strategy off-the-shelf"
    args, checkpoint = tyro.cli(Args, description=about), {}
    if args.evaluate or args.resume:
        checkpoint = load_file(args.evaluate or args.resume, *CHECKPOINT)
        path, beside = checkpoint["path"], os.path.dirname(checkpoint["path"])
        own = set(vars(args)) - {"exp_name", "logdir", "resume", "evaluate", "predict", "split_file", "download"}
        saved = {name: value for name, value in checkpoint["args"].items() if name in own}
        saved["exp_name"] = os.path.basename(path).removesuffix(".pt")
        args = tyro.cli(Args, default=Args(**saved))
        moved = any(getattr(args, name) != saved[name] for name in ("data_dir", "dataset"))
        for name in ("strategy", "unfreeze_from", "optimizer", "weights", "pretrained") if args.resume else ():
            if getattr(args, name) != saved[name]:
                fail(f"--{name.replace('_', '-')} {getattr(args, name)}: the run has {saved[name]} (None: the default)")
        over = checkpoint["epoch"] >= args.epochs or checkpoint["stale"] >= args.patience
        if args.resume and checkpoint["finished"] and over:
            fail(f"{path} is of a run that has ended; more --epochs or --patience would go on")
    for name, value in vars(args).items():
        least = int(name in ("epochs", "patience", "batch_size", "image_size"))
        if type(value) in (int, float) and not least <= value < 2**44:  # seed * 1_000_003 must fit in 64 bits
            fail(f"--{name.replace('_', '-')} {value} must be at least {least} and less than 2**44")
    if (args.unfreeze_from and args.strategy != "fine-tune") or (args.pretrained and args.strategy == "scratch"):
        fail("--unfreeze-from needs --strategy fine-tune, and --pretrained any but scratch")
    if args.metadata and args.dataset:
        fail("--metadata is for images of --data-dir, not of --dataset")
    if os.path.basename(args.exp_name) != args.exp_name:
        fail(f"--exp-name {args.exp_name} is not the name of a file")
    if (args.predict or args.saliency) and not args.evaluate:
        fail("--predict and --saliency need a trained network: --evaluate PATH")
    folder = args.predict or args.data_dir
    if not os.path.isdir(folder or "") and (args.predict or not args.dataset):
        fail(f"{folder}: there is no such folder" if folder else "give --data-dir DIR or --dataset NAME")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    on_cuda, frozen = device.type == "cuda", args.strategy == "off-the-shelf"
    workers = (CORES if on_cuda else min(CORES, 4)) if args.workers is None else args.workers

    # Data
    source, classes, transfers = folder, checkpoint.get("classes"), checkpoint.get("transfers", bool(args.pretrained))
    if args.predict:
        rows = [{"path": name, "split": "test"} for name in find_images(folder)]
    elif args.dataset:
        rows, source = read_torchvision(args)
    else:
        rows = read_table(args) if args.metadata else read_folders(folder)
    if checkpoint and not args.predict and not args.split_file and os.path.isfile(f"{beside}/split.csv"):
        own_images = {row["path"] for row in read_csv(f"{beside}/split.csv", ["path"])}
        known = len(own_images & {row["path"] for row in rows})
        if args.resume or known > (0.9 * len(own_images) if moved else 0):  # the run's images, elsewhere or fewer
            args.split_file = f"{beside}/split.csv"
        elif known:
            print(f"{known:,} of the run's {len(own_images):,} images are there: its training images may be tested")
    if args.evaluate and not args.split_file and "test" not in {row["split"] for row in rows}:
        if not moved:
            fail(f"{beside}/split.csv is not there, or none of its images: the run's training images would be tested")
        rows = [row | {"split": "test"} for row in rows]
    if not args.predict:
        rows, classes = split_data(args, rows, classes)
    targets, unreadable, cache = {}, set(), None  # cache: features or pixels of all images, once they are read
    for task, names in classes.items():
        numbers = {name: number for number, name in enumerate(names)}
        targets[task] = torch.tensor([numbers.get(row.get(task), MISSING) for row in rows], device=device)

    def members(split: str) -> torch.Tensor:
        """A split's images. Until there is a cache unreadable ones stay in: a resumed run does not know them yet."""
        gone = unreadable if cache is not None else ()
        return torch.tensor([i for i, row in enumerate(rows) if row["split"] == split and i not in gone]).long()

    sizes = [f"{len(members(split)):,} {split}" for split in SPLITS]
    print(", ".join(sizes + [f"{task}: {len(names):,} classes" for task, names in classes.items()]))

    # The network
    if checkpoint:
        model = restore(checkpoint, args.arch, args.image_size, "model" if args.evaluate else "last")
    elif args.pretrained:
        content = load_file(args.pretrained, *CHECKPOINT)
        transfers = 1 + content.get("transfers", bool(content["args"].get("pretrained")))
        torch.manual_seed(args.seed + 1_000_003 * (transfers - 1))  # no new head is one that a source began with
        donor = restore(content, args.arch, args.image_size)
        theirs = os.path.join(os.path.dirname(content["path"]), "split.csv")
        data = {(run["dataset"], os.path.realpath(run["data_dir"] or "")) for run in (content["args"], vars(args))}
        if len(data) == 1 and os.path.isfile(theirs):
            seen = {row["path"] for row in read_csv(theirs, ["path", "split"]) if row["split"] != "test"}
            if seen := seen & {row["path"] for row in rows if row["split"] == "test"}:
                fail(f"--pretrained has seen {len(seen):,} of the test images in training: give --split-file {theirs}")
        model = Classifier(donor.trunk, donor.heads[0].in_features, donor.preprocessing, classes)
    else:
        trunk = make_trunk(args.arch, args.weights, args.image_size, random=args.strategy == "scratch")
        model = Classifier(*trunk, classes)
    model = model.to(device, memory_format=torch.channels_last)
    model.bfloat16 = args.amp and on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # with the 0.01 or less of some, statistics would not get to those of small data
    if frozen or args.unfreeze_from:
        model.freeze(args.unfreeze_from)
    pictures = Pictures(source, [row["path"] for row in rows], model.preprocessing)
    stops = []  # signals to end the run, heeded between batches: a fork of workers would lose a KeyboardInterrupt

    def batches(order: torch.Tensor, title: str = "", total: int = 0):
        """Inputs (images, or features of a frozen network) and indices, on the device, of the images `order`."""
        begun = shown = time.perf_counter()
        done = 0
        if cache is not None:
            loader = ((cache[chosen], chosen, ()) for chosen in order.to(device).split(args.batch_size))
        else:  # with a generator of its own: the number of workers changes no other random draw
            processes = min(workers, -(-len(order) // args.batch_size))  # no more than there are batches
            loader = DataLoader(pictures, args.batch_size, sampler=order.tolist(), num_workers=processes,
                                pin_memory=on_cuda, generator=torch.Generator())  # fmt: skip
        for inputs, chosen, errors in loader:
            if stops:
                raise KeyboardInterrupt
            done += len(chosen)
            if any(errors):
                for i, error in zip(chosen.tolist(), errors):
                    if error and i not in unreadable:
                        print(f"left out: {pictures.paths[i]!r} cannot be read, {error}")
                        unreadable.add(i)
                good = torch.tensor([not error for error in errors])
                inputs, chosen = inputs[good], chosen[good]
            if len(chosen):
                yield inputs.to(device, non_blocking=True), chosen.to(device, non_blocking=True)
            if total and (now := time.perf_counter()) > shown + 10:
                shown, rate = now, done / (now - begun)
                left = f"ETA {(total - done) / rate / 60:,.0f} min"
                print(f"{title}: {done:,} images, {rate:,.0f} images/s, {left}", flush=True)

    # After training: predict, test, look
    if args.evaluate:
        logits, seen = run_through(model, batches(members("test")))
        indices = seen.tolist()
        if args.predict:
            found = [{"path": pictures.paths[i]} for i in indices]
            for task, values in logits.items():
                shares, numbers = values.softmax(dim=1).max(dim=1)
                for row, share, number in zip(found, shares.tolist(), numbers.tolist()):
                    row |= {task: classes[task][number], f"{task}_probability": f"{share:.4f}"}
            write_csv(f"{beside}/predictions.csv", found)
            print(f"saved {len(found):,} predictions to {beside}/predictions.csv")
            sys.exit()
        print(f"{path} on {len(seen):,} test images: {describe(measure(logits, seen, targets, 'test')[0])}")
        if args.saliency:
            other = Classifier(*make_trunk(args.arch, args.weights, args.image_size), {}).to(device)
            order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(args.seed)).tolist()
            images = torch.stack([pictures[indices[k]][0] for k in order[: args.saliency]]).to(device)
            task, numbers = model.tasks[0], logits[model.tasks[0]].argmax(dim=1).tolist()
            labels = [f"{rows[indices[k]][task]}\n-> {classes[task][numbers[k]]}" for k in order]
            figure = draw_saliency({f"{args.weights} weights": other, "this network": model}, images, labels)
            save_figure(figure, f"{beside}/saliency.png")
        sys.exit()

    # TRY NOT TO MODIFY: the run's folder, before what may take hours
    name = args.dataset or os.path.basename(os.path.abspath(folder))
    run_dir = os.path.join(args.logdir, f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}")
    while os.path.exists(run_dir):
        run_dir += "-2"  # two runs that start in the same second
    run_dir, path = (beside, path) if args.resume else (run_dir, os.path.join(run_dir, f"{args.exp_name}.pt"))
    write_csv(f"{run_dir}/split.csv", rows)
    if args.track:
        import wandb

        wandb.init(name=os.path.basename(run_dir), config=vars(args), sync_tensorboard=True, save_code=True)

    # Features of a frozen network are computed once; images that fit on the device are decoded once, which is exact
    room = torch.cuda.mem_get_info()[0] / 2 if on_cuda else 2e9
    room = room if args.cache_gb is None else args.cache_gb * 1e9
    if frozen or len(rows) * 3 * pictures.size**2 <= room:
        shape = (model.heads[0].in_features,) if frozen else (3, pictures.size, pictures.size)
        filled = torch.zeros((len(rows), *shape), dtype=torch.float32 if frozen else torch.uint8, device=device)
        with torch.no_grad():
            for images, chosen in batches(torch.arange(len(rows)), "features" if frozen else "decoded", len(rows)):
                filled[chosen] = model.eval().features(images) if frozen else images
        cache = filled  # not before: `batches` reads files while there is none
    optimizer = make_optimizer(args, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.arch}: {trained:,} of {size:,} parameters are trained, images of {pictures.size} pixels, on {device}")

    # TRY NOT TO MODIFY: the run's state and logs
    state = {"epoch": 0, "best": np.inf, "stale": 0, "history": [], "model": model.state_dict()}
    if args.resume:
        state = {name: checkpoint[name] for name in state}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    state |= {"finished": False, "args": vars(args), "classes": classes, "preprocessing": model.preprocessing}
    state["transfers"] = transfers
    writer = SummaryWriter(run_dir, purge_step=state["epoch"] + 1 if args.resume else None)
    lines = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{lines}", state["epoch"])

    def copied() -> dict:
        """What training changes, copied, as an interrupt comes in the middle of an epoch."""
        return copy.deepcopy({"last": model.state_dict(), "optimizer": optimizer.state_dict()})

    def save() -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        write_file(path, lambda file: torch.save(state, file))
        if state["history"]:
            save_figure(draw_curves(state["history"]), f"{run_dir}/curves.png")

    # Training
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: stops.append(number))
    saved_at = -60.0
    state |= copied()
    try:
        while (epoch := state["epoch"]) < args.epochs and state["stale"] < args.patience:
            torch.manual_seed(args.seed * 1_000_003 + epoch)  # of dropout: a resumed run draws what a straight one does
            train, begun = members("train"), time.perf_counter()
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            n = len(train) - (len(train) % args.batch_size == 1)  # a batch of one image has no variance
            order = train[torch.randperm(len(train), generator=generator)[:n]]
            passes = batches(order, f"epoch {epoch + 1}/{args.epochs}", (args.epochs - epoch) * n)
            scalars = {"train/loss": train_epoch(model, optimizer, passes, targets)}
            rate = n / (time.perf_counter() - begun)
            scalars |= measure(*run_through(model, batches(members("val"))), targets, "val")[0]
            if not np.isfinite(scalars["train/loss"] + scalars["val/loss"]):
                raise RuntimeError("the loss is not finite: try a lower --learning-rate")
            for tag, value in (scalars | {"charts/images_per_second": rate}).items():
                writer.add_scalar(tag, value, epoch + 1)
            state |= copied() | {"epoch": epoch + 1, "stale": state["stale"] + 1}
            state["history"] = [*state["history"], scalars]
            if scalars["val/loss"] < state["best"]:
                state |= {"best": scalars["val/loss"], "stale": 0, "model": state["last"]}
            print(f"epoch {epoch + 1}: {describe(scalars)}, {rate:,.0f} images/s", flush=True)
            if time.perf_counter() - saved_at > 60:
                save()
                saved_at = time.perf_counter()

        # The test images, once, with the weights of the lowest validation loss
        model.load_state_dict(state["model"])
        scalars, confusions = measure(*run_through(model, batches(members("test"))), targets, "test")
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, epoch)
        state["finished"] = True
        save()
    except (KeyboardInterrupt, Exception) as end:  # noqa: BLE001 a lost worker, a full GPU: nothing is lost
        save()
        print(f"stopped by {end!r}; python {sys.argv[0]} --resume {run_dir} goes on", file=sys.stderr)
        sys.exit(130 if stops else 1)  # on a signal to the group a worker may die first, which raises something else
    print(f"test, the best of {epoch} epochs: {describe(scalars)}")
    for task, confusion in confusions.items():
        name = f"confusion_{task}.png" if len(confusions) > 1 else "confusion.png"
        save_figure(draw_confusion(confusion, classes[task], f"{task}, test images"), f"{run_dir}/{name}")
    writer.close()
    print(f"{len(unreadable):,} images could not be read and were left out; saved {run_dir}")
