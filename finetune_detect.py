# Transfer of object detectors: a detector trained on photographs learns to find other objects, such as the musical
# instruments in paintings of "Advances in Digital Music Iconography" (Sabatelli et al., Digital Humanities Quarterly
# 15.1, 2021) and "Contributions to Deep Transfer Learning" (M. Sabatelli, 2022, chapter 5).
#
#   python finetune_detect.py --data-dir DIR                          train/, valid/, test/ with _annotations.coco.json
#   python finetune_detect.py --dataset voc2007 --download --arch retinanet_resnet50_fpn_v2
#   python finetune_detect.py --evaluate runs/NAME --predict IMAGES   boxes as JSON and drawn
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.18", "pillow>=10.1",
#                 "matplotlib>=3.8", "pycocotools>=2.0.8"]
# ///
import contextlib
import csv
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import BinaryIO, Literal, NoReturn
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models, tv_tensors
from torchvision.models import detection
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms import v2


@dataclass
class Args:
    # The run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the split, the new layers, the order of the images and their augmentation
    cuda: bool = True  # train on CUDA when there is a GPU
    amp: bool = True  # on CUDA, train the backbone in bfloat16; anchors, boxes and heads stay float32
    workers: int | None = None  # processes that read images, 0 for none (None: all cores on CUDA, else up to 4)
    logdir: str = "runs"  # folder in which the run's own folder is made
    resume: str | None = None  # run (folder or checkpoint) to continue, with its flags unless given anew
    track: bool = False  # mirror the run to Weights and Biases (needs `pip install wandb`)
    wandb_project_name: str = "deep-transfer-learning"  # the project of the run at Weights and Biases
    wandb_entity: str | None = None  # the team of the run at Weights and Biases

    # Data
    data_dir: str | None = None  # folder of the images; of train/, valid/ and test/ with _annotations.coco.json
    dataset: Literal["voc2007"] | None = None  # Pascal VOC 2007 in --data-dir (None: `data`)
    download: bool = False  # download --dataset if it is not there
    annotations: str | None = None  # COCO JSON, folder of VOC XML, or MINERVA's CSV, for training
    val_annotations: str | None = None  # the same for validation (None: --annotations is split 50/25/25)
    test_annotations: str | None = None  # the same for the test at the end (None, but with validation: no test)
    split_file: str | None = None  # split.csv of an earlier run to use again
    image_column: str = "image_filename"  # column of a CSV with the file names
    box_column: str = "bounding_box_coordinates"  # column of a CSV with the boxes, `xmin,ymin,xmax,ymax` in pixels
    label_column: str = "instrument_name"  # column of a CSV with the classes; a code in brackets after them is cut off
    classes: list[str] = field(default_factory=list)  # the classes to learn (none: all); images with others only go
    top_classes: int = 0  # learn so many classes, the most frequent ones in training (0: all), as MINERVA's top-5
    single_class: bool = False  # all boxes are of one class, as in MINERVA's first version
    skip_bad: bool = False  # leave out records with an error, and count them, instead of ending
    check_data: bool = False  # list the records with an error, and end
    augmentation: Literal["none", "flip", "ssd"] = "flip"  # mirror images; `ssd`: and colours, zoom and crops

    # The detector
    arch: str = "fasterrcnn_resnet50_fpn_v2"  # torchvision's, or yolov3, or one of FAMILIES on a --backbone
    backbone: str | None = None  # classifier of torchvision (None: resnet50; under yolov3 its own, darknet53)
    strategy: Literal["fine-tune", "off-the-shelf", "scratch"] = "fine-tune"  # train all; only new layers; from random
    unfreeze_from: str | None = None  # fine-tune from this module on, such as `layer3`; all before it stays frozen
    weights: str | None = None  # torchvision's name, a file (Darknet's too), `none` (None: COCO's or ImageNet's)
    pretrained: str | None = None  # run of this script, or of finetune_classify.py for the backbone, to start from
    image_size: int | None = None  # shorter side in pixels, or side of a square input (None: the detector's own)
    proposals: str | None = None  # fastrcnn: JSON {image: [[x1, y1, x2, y2], ...]} of boxes in pixels

    # Training
    epochs: int = 26  # passes over the training images
    batch_size: int = 4  # images per update
    optimizer: Literal["sgd", "adam"] = "sgd"  # SGD with momentum 0.9, or Adam
    learning_rate: float | None = None  # (None: SGD's by torchvision and Darknet, times the batch; Adam's 0.0001)
    weight_decay: float = 1e-4  # of weights with two dimensions and more; never of biases and normalisation
    warmup_iterations: int = 500  # updates over which the learning rate rises to its value, at most the first epoch
    lr_drops: list[float] = field(default_factory=lambda: [0.67, 0.92])  # shares of --epochs: then a tenth of the rate
    patience: int = 0  # end after this many epochs without a better validation AP at IoU 0.5 (0: never)

    # After training
    evaluate: str | None = None  # run (folder or checkpoint) to test, on its test images or on other --annotations
    predict: str | None = None  # with --evaluate: folder of images whose boxes go beside the checkpoint
    predict_threshold: float = 0.3  # lowest score of the boxes that are drawn


FAMILIES = ("fasterrcnn", "fastrcnn", "retinanet", "fcos", "ssd")  # that stand on any --backbone
TORCHVISION = [name for name in models.list_models(module=detection) if "mask" not in name and "keypoint" not in name]
# Learning rates of SGD for an image: 0.02, 0.01 and 0.01 for batches of 16, 0.002 for 32, 0.001 for 64
PER_IMAGE = {"fast": 0.00125, "retinanet": 0.000625, "fcos": 0.000625, "ssd": 0.0000625, "yolov3": 0.000015625}
# All detectors are compared at one cut-off; their own reach from 0.001 (SSDlite) to 0.2 (FCOS), 100 to 300 boxes
LOWEST_SCORE, MOST_BOXES = 0.05, 100
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
SPLITS = ("train", "val", "test")
# Smallest and largest value of numeric flags; all others are at least 1
BOUNDS = {
    "seed": (0, 2**31 - 1), "workers": (0, 1_000), "top_classes": (0, 10**9), "learning_rate": (0, 1e9),
    "weight_decay": (0, 1e9), "warmup_iterations": (0, 10**9), "patience": (0, 10**9), "predict_threshold": (0, 1),
}  # fmt: skip
# What a resumed run may change, and what besides it another test of a run
CHANGEABLE = "cuda amp workers logdir resume evaluate predict predict_threshold track wandb_project_name wandb_entity "
CHANGEABLE += "data_dir download skip_bad check_data proposals epochs learning_rate lr_drops patience split_file"
TESTABLE = "dataset annotations val_annotations test_annotations image_column box_column label_column batch_size seed"
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error from 179,000,000 pixels on


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def say(line: str, stay: bool = True) -> None:
    """Print over the progress line; on a terminal a line that does not `stay` is a progress line itself."""
    line, tty = line.encode("utf-8", "backslashreplace").decode(), sys.stdout.isatty()  # file names may be any bytes
    print(f"\r{line}\033[K" if tty else line, end="\n" if stay or not tty else "", flush=True)


def some(names, n: int = 5) -> str:
    names = list(names)
    return ", ".join(map(str, names[:n])) + (f" and {len(names) - n:,} more" if len(names) > n else "")


def write_file(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Have `write` fill a file of a temporary name, which then replaces `path`; half a file is never left."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch has its own error for a full disk
        if isinstance(error.__context__, KeyboardInterrupt) or "DataLoader worker" in f"{error} {error.__context__}":
            raise KeyboardInterrupt from error  # a signal, or a worker's end, has come while it was written
        fail(f"{path} cannot be written: {str(error).splitlines()[0]}")
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_rows(path: str, rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_file(path, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")))


# Data -----------------------------------------------------------------------------------------------------------------
@dataclass
class Picture:
    """An annotated image; boxes are xmin, ymin, xmax, ymax in continuous pixels: the first pixel is 0, 0, 1, 1."""

    path: str  # relative to --data-dir
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # class of every box, empty where it is not known
    crowd: list[bool] = field(default_factory=list)  # evaluation neither expects these boxes nor counts them as wrong
    size: tuple[int, int] = (0, 0)  # width and height as annotated, later as read; 0 where unknown
    split: str = ""

    def add(self, box: list[float], label: str, crowd: bool = False) -> None:
        self.boxes.append(list(map(float, box)))
        self.labels.append(label)
        self.crowd.append(crowd)

    def only(self, keep: Callable[[str, bool], bool]) -> "Picture":
        """The same with those boxes only for which `keep(label, crowd)` holds."""
        picture = Picture(self.path, size=self.size, split=self.split)
        for box, label, crowd in zip(self.boxes, self.labels, self.crowd):
            if keep(label, crowd):
                picture.add(box, label, crowd)
        return picture


def read_coco(path: str) -> list[Picture]:
    """Boxes are x, y, width, height; ids of classes may have gaps and are mapped by name."""
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    names, pictures = {category["id"]: category["name"] for category in data["categories"]}, {}
    for entry in data["images"]:
        name = entry["file_name"] or f"image {entry['id']} without a file name"
        pictures[entry["id"]] = Picture(name, size=(entry.get("width", 0), entry.get("height", 0)))
    for entry in data["annotations"]:
        x, y, w, h = entry["bbox"]
        label = names.get(entry["category_id"], "")
        pictures[entry["image_id"]].add([x, y, x + w, y + h], label, bool(entry.get("iscrowd")))
    return list(pictures.values())


def read_voc(paths: list[str]) -> list[Picture]:
    """XML files; pixels count from 1 and both ends belong to the box."""
    pictures = []
    for path in paths:
        root = ElementTree.parse(path).getroot()
        size = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        pictures.append(Picture(root.findtext("filename") or os.path.basename(path).removesuffix(".xml"), size=size))
        for entry in root.iter("object"):
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            difficult = (entry.findtext("difficult") or "0").strip() == "1"
            pictures[-1].add([x1 - 1, y1 - 1, x2, y2], (entry.findtext("name") or "").strip(), difficult)
    return pictures


def read_table(path: str, args: Args) -> list[Picture]:
    """CSV with a row per box, as in MINERVA."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for flag in ("image_column", "box_column", "label_column"):
        if rows and getattr(args, flag) not in rows[0]:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {path} has the columns {', '.join(rows[0])}")
    pictures: dict[str, Picture] = {}
    for row in rows:
        label = re.sub(r"\s*\([^()]*\)\s*$", "", row[args.label_column] or "").strip()
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", row[args.box_column] or "")]
        name = os.path.basename(row[args.image_column] or "row without a file name")
        pictures.setdefault(name, Picture(name)).add(numbers if len(numbers) == 4 else [math.nan] * 4, label)
    return list(pictures.values())


def read_annotations(path: str, args: Args) -> list[Picture]:
    """Whatever format `path` is in: a folder of XML, COCO's JSON, or a table."""
    try:
        if os.path.isdir(path):
            pictures = read_voc(
                [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(".xml")]
            )
        else:
            pictures = read_coco(path) if path.endswith(".json") else read_table(path, args)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ElementTree.ParseError) as error:
        fail(f"{path}: no annotations in a known format ({type(error).__name__}: {error})")
    return pictures or fail(f"{path}: there are no annotations in it")


def check_shape(image: Image.Image) -> None:
    """Pillow bounds the number of pixels, but resizing the shorter side of a strip would blow it up all the same."""
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"a strip of {image.width:,} x {image.height:,} pixels")


def open_image(path: str) -> Image.Image:
    """The image upright in RGB; raises OSError or ValueError."""
    with Image.open(path) as image:
        check_shape(image)
        image.load()
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more, which convert() would cut off at 255
            values = np.asarray(image, dtype=np.float64)
            top = 65_535 if values.max() > 255 else 255
            image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")  # over white, as on paper
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return ImageOps.exif_transpose(image).convert("RGB")


def find_images(folder: str) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted; a folder that several links lead to counts once."""

    def on_error(error: OSError) -> NoReturn:
        fail(f"{error.filename} cannot be read: {error.strerror}")

    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=on_error):
        folders[:] = [] if os.path.realpath(root) in visited else sorted(folders)
        if os.path.realpath(root) not in visited:
            found += [os.path.relpath(os.path.join(root, name), folder) for name in names]
        visited.add(os.path.realpath(root))
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in IMAGES)


def check(
    pictures: list[Picture], split: str, folder: str, beside: str, seen: dict[str, str]
) -> tuple[list[Picture], list[str]]:
    """The pictures without what is wrong with them, and a line for each such thing. Completes paths and sizes.

    Images are looked for in the folder `beside` the annotations, then by name in all of `folder`, with or without
    extension. `seen` has the splits of the images that have been annotated already.
    """
    present, good, wrong, by_name = set(find_images(folder)), [], [], defaultdict(set)
    for path in present:
        for name in (path, os.path.basename(path)):
            by_name[name].add(path)
            by_name[os.path.splitext(name)[0]].add(path)
    for picture in pictures:
        names = os.path.normpath(os.path.join(beside, picture.path)), picture.path, os.path.basename(picture.path)
        named = next(({name} & present or by_name[name] for name in names if name in by_name), set())
        path = min(named, default=picture.path)
        kept = Picture(path, split=split)
        try:
            if len(named) != 1:
                raise ValueError(f"there are {len(named)} such images in {folder}")
            with Image.open(os.path.join(folder, path)) as image:  # the header only
                check_shape(image)
                kept.size = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size
            if all(picture.size) and tuple(picture.size) != kept.size:
                annotated, real = (" x ".join(map(str, sides)) for sides in (picture.size, kept.size))
                raise ValueError(f"annotated as {annotated} pixels, but upright it has {real}")
            if path in seen:
                raise ValueError(f"annotated twice{f', for {seen[path]} and {split}' * bool(split)}")
        except Exception as error:  # noqa: BLE001 (Pillow's plugins raise whatever their formats make them)
            wrong.append(f"{path}: {error}")
            continue
        seen[path] = split
        for box, label, crowd in zip(picture.boxes, picture.labels, picture.crowd):
            x1, y1, x2, y2 = box
            clipped = [max(x1, 0), max(y1, 0), min(x2, kept.size[0]), min(y2, kept.size[1])]
            if not all(map(math.isfinite, box)):
                reason = "its box is not four numbers"
            elif x2 - x1 <= 1 or y2 - y1 <= 1:  # also VOC's boxes that end where they begin
                reason = "no wider or no higher than a pixel"
            elif max(abs(one - other) for one, other in zip(box, clipped)) > 1:  # a pixel is a matter of counting
                reason = f"outside of the image of {kept.size[0]} x {kept.size[1]} pixels"
            elif not label:
                reason = "its class is missing or unknown"
            elif (clipped, label) in zip(kept.boxes, kept.labels):
                reason = "it stands there twice"
            else:
                kept.add(clipped, label, crowd)
                continue
            wrong.append(f"{path}: box {', '.join(f'{value:g}' for value in box)} {label or '(no class)'}: {reason}")
        good.append(kept)
    return good, wrong


def read_all(args: Args) -> tuple[str, list[Picture], list[str]]:
    """The folder of the images, all images with their splits and without their errors, and a line for each error."""
    folder, found = args.data_dir or ("data" if args.dataset else ""), {}
    files = dict(zip(SPLITS, (args.annotations, args.val_annotations, args.test_annotations)))
    if args.dataset:
        voc = os.path.join(folder, "VOCdevkit", "VOC2007")
        try:
            for split in SPLITS:
                missing = not os.path.isfile(os.path.join(voc, "ImageSets", "Main", f"{split}.txt"))
                data = datasets.VOCDetection(folder, "2007", split, download=args.download and missing)
                found[split] = read_voc(data.annotations)
        except (OSError, RuntimeError, ElementTree.ParseError) as error:
            fail(f"--dataset {args.dataset}: {error} ({folder}{' is what --download fills' * (not args.download)})")
        folder, files = os.path.join(voc, "JPEGImages"), {}
    elif not os.path.isdir(folder):
        fail(f"--data-dir {folder}: there is no such folder" if folder else "--data-dir: the images' folder is needed")
    elif not args.annotations:
        for name, split in (("train", "train"), ("val", "val"), ("valid", "val"), ("test", "test")):
            path = os.path.join(folder, name, "_annotations.coco.json")
            files[split] = path if os.path.isfile(path) else files[split]
        if not files["train"]:
            fail(
                "--annotations: a file or folder with boxes is needed, or train/_annotations.coco.json in --data-dir"
            )
    found |= {split: read_annotations(path, args) for split, path in files.items() if path}
    if "test" in found and "val" not in found:
        fail("annotations for the test need others for validation")
    pictures, wrong, seen = [], [], {}
    for split in found:
        beside = os.path.relpath(os.path.dirname(os.path.abspath(files[split])), folder) if files else ""
        good, lines = check(found[split], split if len(found) > 1 else "", folder, beside, seen)
        pictures, wrong = pictures + good, wrong + lines
    return folder, pictures, wrong


def load_pictures(args: Args) -> tuple[str, list[Picture]]:
    """The folder of the images, and all images, checked and with their splits."""
    folder, pictures, wrong = read_all(args)
    for line in wrong:
        say(line)
    say(f"{len(pictures):,} images with {sum(len(p.boxes) for p in pictures):,} boxes; {len(wrong):,} errors")
    if args.check_data:
        sys.exit(1 if wrong else 0)
    if wrong and not (args.skip_bad or args.dataset):
        fail(f"{len(wrong):,} errors in the annotations, listed above: correct them, or leave them out with --skip-bad")
    if args.split_file:
        try:
            with open(args.split_file, newline="", encoding="utf-8", errors="surrogateescape") as file:
                saved = {row["path"]: row["split"] for row in csv.DictReader(file)}
        except (OSError, KeyError, csv.Error) as error:
            fail(f"--split-file {args.split_file}: {error}")
        unknown = [picture.path for picture in pictures if picture.path not in saved]
        if unknown:
            say(f"{len(unknown):,} images are not in --split-file and are left out: {some(unknown)}")
        for picture in pictures:
            picture.split = saved.get(picture.path, "")
    elif not any(picture.split for picture in pictures):
        split_pictures(pictures, args.seed)
    return folder, [picture for picture in pictures if picture.split]


def split_pictures(pictures: list[Picture], seed: int) -> None:
    """50/25/25 by image, as MINERVA; in each group of images whose rarest class is the same."""
    counted = Counter(label for picture in pictures for label in picture.labels)
    groups = defaultdict(list)
    for picture in pictures:
        groups[min(picture.labels, key=lambda name: (counted[name], name), default="")].append(picture)
    rng, dealt = np.random.default_rng(seed), 0
    for name in sorted(groups):
        for i in rng.permutation(len(groups[name])):
            groups[name][i].split = ("train", "val", "train", "test")[dealt % 4]
            dealt += 1


def choose_classes(args: Args, pictures: list[Picture]) -> list[str]:
    """The classes to learn, sorted, from --classes and --top-classes."""
    counted = Counter(label for picture in pictures if picture.split == "train" for label in picture.labels)
    unknown = [name for name in args.classes if name not in counted]
    if unknown or not counted:
        fail(f"--classes {some(unknown)}: in the training images there are {some(counted, 20) or 'no boxes'}")
    ordered = sorted(args.classes or counted, key=lambda name: (-counted[name], name))
    return sorted(set(ordered[: args.top_classes or None]))


def keep_classes(pictures: list[Picture], classes: list[str]) -> list[Picture]:
    """Without the boxes of other classes, and without images that have no other boxes; negatives stay."""
    lost = Counter(label for picture in pictures for label in picture.labels if label not in classes)
    if lost:
        say(f"{sum(lost.values()):,} boxes of {len(lost):,} other classes are left out: {some(lost)}")
    reduced = [(picture, picture.only(lambda label, crowd: label in classes)) for picture in pictures]
    return [kept for picture, kept in reduced if kept.boxes or not picture.boxes]


class Pictures(Dataset):
    """Item (epoch, i) is image i as uint8 `(3, H, W)`, its target and i; None and the reason where it cannot be read.

    A target has `boxes` float `(n, 4)` in pixels, `labels` int64 `(n,)` from 1 on, and with proposals also these.
    Epoch -1 is evaluation, without augmentation.
    """

    def __init__(self, folder: str, pictures: list[Picture], classes: list[str], proposals: dict | None, args: Args):
        self.folder, self.pictures, self.classes, self.proposals = folder, pictures, classes, proposals
        self.seed, self.augmentation, self.unreadable = args.seed, args.augmentation, set()
        ssd = [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=127),
            v2.RandomIoUCrop(),
            v2.SanitizeBoundingBoxes(),
        ]
        self.augment = v2.Compose([*ssd[: 4 * (args.augmentation == "ssd")], v2.RandomHorizontalFlip(0.5)])

    def __len__(self) -> int:
        return len(self.pictures)

    def report(self, bad: list[tuple[int, str]]) -> None:
        """Name the images that cannot be read: they are left out, not replaced."""
        for i, reason in bad:
            if i not in self.unreadable:
                say(f"left out: {self.pictures[i].path} cannot be read, {reason}")
            self.unreadable.add(i)

    def __getitem__(self, item: tuple[int, int]):
        epoch, i = item
        picture = self.pictures[i]
        try:
            image = tv_tensors.Image(v2.functional.pil_to_tensor(open_image(os.path.join(self.folder, picture.path))))
        except Exception as error:  # noqa: BLE001
            return None, None, (i, f"{type(error).__name__}: {error}")
        learned = picture.only(lambda label, crowd: not crowd)  # crowds are regions, not objects
        target = {"boxes": learned.boxes, "proposals": (self.proposals or {}).get(picture.path, [])}
        for name, boxes in target.items():
            boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            target[name] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:])
        if self.proposals is None:
            del target["proposals"]
        target["labels"] = torch.tensor([1 + self.classes.index(name) for name in learned.labels], dtype=torch.int64)
        if epoch >= 0 and self.augmentation != "none":
            with torch.random.fork_rng(devices=[]):  # the same whoever reads it, and whenever
                torch.manual_seed((self.seed * 1_000_003 + epoch) * 1_000_003 + i)
                image, target = self.augment(image, target)
        return torch.as_tensor(image), {name: torch.as_tensor(value) for name, value in target.items()}, i


def collate(items: list) -> tuple[list, list, list[int], list[tuple[int, str]]]:
    """Images, targets, indices, and (index, reason) of what cannot be read."""
    good = [item for item in items if item[0] is not None]
    bad = [reason for image, _, reason in items if image is None]
    return [image for image, _, _ in good], [target for _, target, _ in good], [i for _, _, i in good], bad


def make_batches(indices: list[int], args: Args, epoch: int = -1) -> list[list[tuple[int, int]]]:
    """Items of `Pictures` in batches, in an order that seed and epoch determine; epoch -1 is in order."""
    if epoch >= 0:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        indices = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    items = [(epoch, i) for i in indices]
    return [items[i : i + args.batch_size] for i in range(0, len(items), args.batch_size)]


def ignore_signals(_: int) -> None:
    """In a worker: Ctrl-C and a scheduler's signals reach the whole process group, but the parent is to end it."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Since they ignore SIGTERM, with which Python would end them at its own end, and then wait for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
    for worker in multiprocessing.active_children():
        worker.kill()


def make_loader(args: Args, data: Pictures, batches: list, device: torch.device, stay: bool = False) -> DataLoader:
    """Reads `batches` on every pass, whatever the list holds then; workers `stay` from pass to pass."""
    workers = min(args.workers, max(len(batches), 1))
    return DataLoader(
        data, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        persistent_workers=stay and workers > 0, prefetch_factor=4 if workers else None, worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else every pass would draw from the generator that the network draws from
    )  # fmt: skip


def to_device(images: list, targets: list, device: torch.device) -> tuple[list, list]:
    images = [image.to(device, non_blocking=True).float() / 255 for image in images]
    return images, [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]


def read_proposals(args: Args, paths: list[str]) -> dict[str, list] | None:
    """{path: boxes} for fastrcnn from --proposals, whose images are named by path or file name; none are no error."""
    if args.arch != "fastrcnn":
        return None
    try:
        with open(args.proposals or "", encoding="utf-8") as file:
            given = json.load(file)
        found = {path: given.get(path, given.get(os.path.basename(path), [])) for path in paths}
        if not all(len(box) == 4 for boxes in found.values() for box in boxes):
            raise ValueError("a box is four numbers")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"--arch fastrcnn needs --proposals FILE.json, {args.proposals}: {error}")
    say(f"{sum(map(len, found.values())):,} proposals; {sum(not boxes for boxes in found.values()):,} images have none")
    return found


# YOLOv3 ---------------------------------------------------------------------------------------------------------------
# As in "YOLOv3: An Incremental Improvement" (Redmon and Farhadi, arXiv 1804.02767), and where the paper is silent as in
# its code, Darknet (pjreddie/darknet, whose files are named below). Three of a thing are in the order of the strides.
STRIDES = (8, 16, 32)
COCO_ANCHORS = [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, leaky ReLU: float `(B, inputs, H, W)` -> `(B, outputs, H/stride, W/stride)`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        # eps and momentum of Darknet on GPUs (batchnorm_layer.c), where the published weights were trained
        super().__init__(convolution, nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.01), nn.LeakyReLU(0.1, inplace=True))


class Residual(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(ConvBlock(channels, channels // 2, 1), ConvBlock(channels // 2, channels, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Darknet53(nn.Module):
    """Table 1 without classifier, 52 convolutions: float `(B, 3, H, W)` -> features of 256, 512 and 1,024 channels."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBlock(3, 32, 3)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvBlock(channels // 2, channels, 3, stride=2), *(Residual(channels) for _ in range(n)))
            for channels, n in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return dict(zip("012", maps[-3:]))


class Neck(nn.Module):
    """Between backbone and output at one stride (section 2.3, yolov3.cfg): features `(B, inputs, h, w)`, and if
    `lateral` the next coarser neck's trunk `(B, 2 channels, h/2, w/2)` -> trunk, for the output `(B, 2 channels, h, w)`
    """

    def __init__(self, inputs: int, channels: int, lateral: bool):
        super().__init__()
        self.lateral = ConvBlock(2 * channels, channels, 1) if lateral else None
        widths = [inputs + channels if lateral else inputs, channels, 2 * channels, channels, 2 * channels, channels]
        self.trunk = nn.Sequential(*map(ConvBlock, widths, widths[1:], (1, 3, 1, 3, 1)))
        self.last = ConvBlock(channels, 2 * channels, 3)

    def forward(self, features: torch.Tensor, coarser: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.lateral is not None:
            features = torch.cat([F.interpolate(self.lateral(coarser), scale_factor=2), features], dim=1)
        trunk = self.trunk(features)
        return trunk, self.last(trunk)


def yolo_output(channels: int, num_classes: int) -> nn.Conv2d:
    """A new output, float `(B, channels, h, w)` -> 3 anchors' t_x, t_y, t_w, t_h, objectness and classes as logits."""
    output = nn.Conv2d(channels, 3 * (4 + num_classes), 1)  # num_classes counts background, which has no logit
    nn.init.normal_(output.weight, std=0.01)
    nn.init.zeros_(output.bias)
    # An objectness of 1/2 for all of the 10,647 predictions at 416 pixels would cost 10,647 log 2, hundreds of times as
    # much as the few objects, and wreck a pretrained backbone: objects start out rare (Lin et al. 2017, section 3.3)
    nn.init.constant_(output.bias.view(3, -1)[:, 4], math.log(0.01 / 0.99))
    return output


def letterbox(image: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image float `(3, H, W)` as large as it fits in the middle of a grey `(3, size, size)` (image.c).

    Also float `(4,)` scale and shift: what is at xyxy in the image is at xyxy * scale + shift in the square.
    """
    height, width = image.shape[-2:]
    h, w = (max(round(side * size / max(height, width)), 1) for side in (height, width))
    top, left = (size - h) // 2, (size - w) // 2
    scale, shift = image.new_tensor([w / width, h / height] * 2), image.new_tensor([left, top] * 2)
    image = F.interpolate(image[None], (h, w), mode="bilinear", antialias=True)[0]
    return F.pad(image, (left, size - w - left, top, size - h - top), value=0.5), scale, shift


class YOLOv3(nn.Module):
    """A detector called like torchvision's: `num_classes` counts background, real classes are 1..num_classes - 1.

    The anchors are 9 (width, height) in pixels of the square network input of side `size`, a multiple of 32; the 3
    smallest serve at stride 8. A detection's score is its objectness times its class probability. Another `backbone`
    gives a dict of maps at strides 8, 16, 32 with so many `channels`.
    """

    def __init__(self, num_classes: int, size: int = 416, backbone: nn.Module | None = None, channels=(256, 512, 1024)):
        super().__init__()
        self.size, self.score_thresh, self.nms_thresh, self.detections_per_img = size, LOWEST_SCORE, 0.45, MOST_BOXES
        self.backbone = backbone or Darknet53()
        widths = zip(channels, (128, 256, 512), (True, True, False))
        self.necks = nn.ModuleList(Neck(inputs, width, lateral) for inputs, width, lateral in widths)
        self.outputs = nn.ModuleList(yolo_output(channels, num_classes) for channels in (256, 512, 1024))
        # part of the state dict, for without its anchors an output means nothing
        self.register_buffer("anchors", torch.tensor(COCO_ANCHORS, dtype=torch.float32))
        # An image's N predictions are in the order of anchors, rows and columns: `first` is where those of an anchor
        # begin; `cells` are the (column, row) and `anchor_of` the anchor of each.
        grids = [torch.arange(size // stride) for stride in STRIDES for _ in range(3)]
        cells = [torch.cartesian_prod(grid, grid).flip(1) for grid in grids]
        counts = torch.tensor([len(cell) for cell in cells])
        self.register_buffer("strides", torch.tensor(STRIDES).repeat_interleave(3), persistent=False)
        self.register_buffer("first", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("cells", torch.cat(cells), persistent=False)
        self.register_buffer("anchor_of", torch.arange(9).repeat_interleave(counts), persistent=False)

    def forward(self, images: list[torch.Tensor], targets: list[dict] | None = None) -> dict | list[dict]:
        """Images float `(3, H, W)` in [0, 1] -> the losses, or `boxes`, `labels`, `scores` of each."""
        squares, scales, shifts = zip(*(letterbox(image, self.size) for image in images))
        raw = self.predict(torch.stack(squares))
        if not self.training:
            return [self.detect(*each) for each in zip(raw, scales, shifts, (image.shape[-2:] for image in images))]
        boxes, labels = [], []
        for image, target, scale, shift in zip(images, targets, scales, shifts):
            box = clip_boxes_to_image(target["boxes"], image.shape[-2:]) * scale + shift
            # as in data.c; the logarithm of a width of 0 is infinite
            kept = (box[:, 2:] - box[:, :2] >= 0.001 * self.size).all(dim=1)
            boxes.append(box[kept])
            labels.append(target["labels"][kept])
        return self.losses(raw, boxes, labels)

    def predict(self, squares: torch.Tensor) -> torch.Tensor:
        """Network input float `(B, 3, size, size)` -> logits float32 `(B, N, 5 + classes)`."""
        features, trunk, raw = list(self.backbone(squares).values()), None, []
        for i in (2, 1, 0):
            trunk, x = self.necks[i](features[i], trunk)
            x = self.outputs[i](x).unflatten(1, (3, -1))
            raw.insert(0, x.permute(0, 1, 3, 4, 2).flatten(1, 3))
        return torch.cat(raw, dim=1)

    def decode(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits `(..., N, 5 + classes)` -> boxes `(..., N, 4)` xyxy in pixels of the network input (section 2.1)."""
        centre = (raw[..., :2].sigmoid() + self.cells) * self.strides[self.anchor_of, None]
        half = self.anchors[self.anchor_of] * raw[..., 2:4].exp() / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    def detect(self, raw: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, size: tuple[int, int]) -> dict:
        """Logits `(N, 5 + classes)` of an image of `size` (height, width) -> its `boxes`, `labels` and `scores`."""
        boxes = clip_boxes_to_image((self.decode(raw) - shift) / scale, size)
        scores = raw[:, 4:5].sigmoid() * raw[:, 5:].sigmoid()
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)  # of those in the grey nothing is left
        rows, classes = ((scores >= self.score_thresh) & inside).nonzero(as_tuple=True)
        # early in training every box may pass in every class, which is more than suppression can compare
        scores, best = scores[rows, classes].topk(min(3_000, len(rows)))
        boxes, labels = boxes[rows[best]], classes[best] + 1
        kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}

    def losses(self, raw: torch.Tensor, boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> dict:
        """Logits `(B, N, 5 + classes)`, boxes `(n, 4)` in pixels of the network input and labels `(n,)` -> the losses.

        Sums over an image's predictions, mean over images (sections 2.1 and 2.2, yolo_layer.c). A ground truth belongs
        to the prediction in the cell of its centre by the anchor most like it in shape; if several share one, the last
        gives the box and all their class. Box, times 2 - area: half the squared error of t_w, t_h and, as Darknet's
        gradient of x and y is not that of the paper's squared error, the binary cross entropy of t_x, t_y.
        """
        with torch.no_grad():
            pairs = zip(self.decode(raw), boxes)
            # 0.5 as in the paper; yolov3.cfg has 0.7
            near = torch.stack([(box_iou(predicted, truth) > 0.5).any(dim=1) for predicted, truth in pairs])
        image = torch.cat([torch.full_like(label, i) for i, label in enumerate(labels)])
        truth, label = torch.cat(boxes), torch.cat(labels) - 1
        centre, sides = (truth[:, :2] + truth[:, 2:]) / 2, truth[:, 2:] - truth[:, :2]
        shared = torch.minimum(sides[:, None], self.anchors).prod(dim=-1)  # of boxes with the same centre
        union = sides.prod(dim=-1)[:, None] + self.anchors.prod(dim=-1) - shared
        anchor = (shared / union).argmax(dim=1)
        stride, grid = self.strides[anchor], self.size // self.strides[anchor]
        cell = (centre / stride[:, None]).long()
        number = image * raw.shape[1] + self.first[anchor] + cell[:, 1] * grid + cell[:, 0]
        number, slot = number.unique(return_inverse=True)
        last = torch.zeros_like(number).scatter_reduce(0, slot, torch.arange(len(slot), device=raw.device), "amax")
        responsible = raw.flatten(0, 1)[number]

        bce = F.binary_cross_entropy_with_logits
        xy, wh = (centre / stride[:, None] - cell)[last], (sides / self.anchors[anchor]).log()[last]
        # less its least value, which depends on the data alone, so that a perfect box costs nothing
        error = bce(responsible[:, :2], xy, reduction="none") + torch.xlogy(xy, xy) + torch.xlogy(1 - xy, 1 - xy)
        error = error + (responsible[:, 2:4] - wh).square() / 2
        weight = 2 - sides[last].prod(dim=1, keepdim=True) / self.size**2
        classes = torch.zeros_like(responsible[:, 5:])
        classes[slot, label] = 1.0
        objects, counted = torch.zeros_like(near, dtype=raw.dtype), (~near).to(raw.dtype)
        objects.view(-1)[number] = counted.view(-1)[number] = 1.0
        return {
            "loss_box": (error * weight).sum() / len(raw),
            "loss_objectness": bce(raw[..., 4], objects, weight=counted, reduction="sum") / len(raw),
            "loss_classifier": bce(responsible[:, 5:], classes, reduction="sum") / len(raw),
        }


@torch.no_grad()
def load_darknet(model: YOLOv3, path: str) -> list[str]:
    """Load Darknet's own weights (parser.c); returns the names of the tensors that it had, or raises ValueError.

    They are darknet53.conv.74, the backbone, or those of a whole yolov3.cfg with any number of classes; outputs are
    loaded if it is the model's number.
    """
    version, size = np.fromfile(path, dtype="<i4", count=3), os.path.getsize(path)
    if len(version) < 3 or version.min() < 0 or version.max() >= 1000:  # as numbers, text and archives are huge
        raise ValueError(f"{path} is not a Darknet weights file: it does not begin with a version")
    start = 20 if version[0] * 10 + version[1] >= 2 else 16  # after the number of images seen, which once had 4 bytes

    def tensors(module: nn.Module) -> list[torch.Tensor]:
        blocks = [block for block in module.modules() if isinstance(block, ConvBlock)]  # in the order of yolov3.cfg
        return [t for conv, bn, _ in blocks for t in (bn.bias, bn.weight, bn.running_mean, bn.running_var, conv.weight)]

    order, necks = tensors(model.backbone), [tensors(neck) for neck in model.necks]
    backbone, parts = start + 4 * sum(tensor.numel() for tensor in order), ("backbone.",)
    if size != backbone:
        rest = size - backbone - 4 * sum(tensor.numel() for neck in necks for tensor in neck)
        filters, left = divmod(rest, 4 * sum(output.in_channels + 1 for output in model.outputs))
        if left or filters < 18 or filters % 3:  # 3 anchors of 4 coordinates, objectness and at least a class
            known = f"darknet53.conv.74 has {backbone:,}, a yolov3.weights of 80 classes 248,007,048"
            raise ValueError(f"{path} has {size:,} bytes, which does not fit the network: {known}")
        same = all(output.out_channels == filters for output in model.outputs)
        for neck, output in zip(reversed(necks), reversed(model.outputs)):
            output = output if same else nn.Conv2d(output.in_channels, filters, 1)  # read, and forgotten
            order += [*neck, output.bias, output.weight]
        parts = ("backbone.", "necks.", "outputs.") if same else ("backbone.", "necks.")
    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=start))
    for tensor, value in zip(order, values.split([tensor.numel() for tensor in order])):
        tensor.copy_(value.view_as(tensor))
    return [name for name in model.state_dict() if name.startswith(parts)]


# The detectors --------------------------------------------------------------------------------------------------------
def make_body(name: str) -> tuple[nn.Module, dict[str, str], list[int]]:
    """A classifier of torchvision, the names of its layers with maps at strides 8, 16, 32, and their channels."""
    if name not in models.list_models(module=models):
        fail(f"--backbone {name}: torchvision has no such classifier")
    net, x, last = models.get_model(name, weights=None).eval(), torch.zeros(1, 3, 64, 64), {}
    if isinstance(getattr(net, "features", None), nn.Sequential):
        net = net.features
    children = list(net.named_children())
    if hasattr(net, "layer4"):
        children = children[: [child_name for child_name, _ in children].index("layer4") + 1]
    with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError, AssertionError):
        for child_name, child in children:
            x = child(x)
            last[64 // x.shape[-1]] = child_name, x.shape[1]
    if not set(STRIDES) <= set(last):
        fail(f"--backbone {name}: no feature maps at strides 8, 16 and 32; ResNets, MobileNets and VGGs have them")
    return net, {last[stride][0]: str(i) for i, stride in enumerate(STRIDES)}, [last[stride][1] for stride in STRIDES]


class Tower(nn.Module):
    """A body's maps and two coarser ones, as in SSD (Liu et al., 2016)."""

    def __init__(self, body: nn.Module, channels: int):
        super().__init__()
        self.body, self.extra = body, nn.ModuleList()
        for inputs in (channels, 256):
            convs = nn.Conv2d(inputs, 128, 1), nn.ReLU(), nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.ReLU()
            self.extra.append(nn.Sequential(*convs))
        detection.ssd._xavier_init(self.extra)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(x)
        for i, layers in enumerate(self.extra, 3):
            maps[str(i)] = layers(maps[str(i - 1)])
        return maps


class ExternalProposals(nn.Module):
    """In the place of the region proposal network: hands on `boxes` of images of `sizes`, and the whole images."""

    def forward(self, images, features, targets=None) -> tuple[list[torch.Tensor], dict]:
        scaled = []
        for boxes, old, new in zip(self.boxes, self.sizes, images.image_sizes):
            boxes = torch.cat((boxes, boxes.new_tensor([[0.0, 0.0, old[1], old[0]]])))
            scaled.append(boxes * boxes.new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2))
        return scaled, {}


class FastRCNN(detection.FasterRCNN):
    """Girshick (2015): the boxes to classify and correct come with the images, in the targets' `proposals`."""

    def forward(self, images: list[torch.Tensor], targets: list[dict]):
        self.rpn.boxes, self.rpn.sizes = [target["proposals"] for target in targets], [i.shape[-2:] for i in images]
        return super().forward(images, targets if self.training else None)


def make_detector(args: Args, num_classes: int) -> nn.Module:
    """A detector with random weights for `num_classes` classes, the background (0) included."""
    size = args.image_size
    scale = {"min_size": size, "max_size": round(size * 1333 / 800)} if size else {}
    net, layers, channels = make_body(args.backbone) if args.backbone else (None, None, None)
    if args.arch in TORCHVISION:
        if args.arch.startswith("ssd") and size:
            fail(f"--image-size: {args.arch} has a fixed size; --arch ssd --backbone NAME takes any")
        model = models.get_model(args.arch, weights=None, weights_backbone=None, num_classes=num_classes, **scale)
    elif args.arch == "yolov3":
        if size and size % 32:
            fail(f"--image-size {size}: yolov3 needs a multiple of 32")
        normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # what ImageNet's networks expect
        body = OrderedDict(normalise=normalise, body=IntermediateLayerGetter(net, layers)) if net else None
        model = YOLOv3(num_classes, size or 416, *((nn.Sequential(body), channels) if net else ()))
    elif args.arch == "ssd":
        tower = Tower(IntermediateLayerGetter(net, layers), channels[-1])
        model = detection.ssd.SSD(tower, DefaultBoxGenerator([[2, 3]] * 5), (size or 320,) * 2, num_classes)
    elif args.arch in ("retinanet", "fcos"):
        backbone = BackboneWithFPN(net, layers, channels, 256, LastLevelP6P7(256, 256))
        octave = [tuple(round(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in (8, 16, 32, 64, 128)]
        boxes = AnchorGenerator(tuple(octave), ((0.5, 1.0, 2.0),) * 5)
        model = (detection.FCOS(backbone, num_classes, **scale) if args.arch == "fcos" else
                 detection.RetinaNet(backbone, num_classes, anchor_generator=boxes, **scale))  # fmt: skip
    else:
        # 128 regions an image and 256 hidden units, where torchvision has 512 and 1,024: a third of the time on a CPU
        model = (FastRCNN if args.arch == "fastrcnn" else detection.FasterRCNN)(
            BackboneWithFPN(net, layers, channels, 256, LastLevelMaxPool()), box_batch_size_per_image=128,
            rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4),
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2),
            box_head=detection.faster_rcnn.TwoMLPHead(256 * 7 * 7, 256),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(256, num_classes), **scale,
        )  # fmt: skip
        model.rpn = ExternalProposals() if args.arch == "fastrcnn" else model.rpn
    chooser = getattr(model, "roi_heads", model)
    chooser.score_thresh, chooser.detections_per_img = LOWEST_SCORE, MOST_BOXES
    if args.weights == "COCO_V1" and args.arch in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"):
        for module in model.backbone.modules():  # they were trained with epsilon 0
            module.eps = 0.0
    return model


def autocast_backbone(model: nn.Module, device_type: str) -> None:
    """Have the backbone train in bfloat16 and give float32: as bfloat16, anchors and boxes would be pixels away.

    Evaluation is in float32 throughout, on every device.
    """
    forward = model.backbone.forward

    def forward_in_bfloat16(images: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(device_type, torch.bfloat16, enabled=model.training):
            maps = forward(images)
        return {name: values.float() for name, values in maps.items()}

    model.backbone.forward = forward_in_bfloat16


# Layers that say which class a box is of, which are always new
HEAD = re.compile(r"box_predictor|cls_logits|head\.classification_head\.module_list|outputs\.")


def load_into(model: nn.Module, state: dict, source: str) -> list[str]:
    """Copy all but the head from a detector's state dict, or a classifier's into the backbone; names of the copied.

    Ends with one line where tensors of the source have no place, or other shapes.
    """
    own = model.state_dict()
    if not any(name.startswith(("backbone.", "head.")) for name in state):
        state = {f"backbone.body.{name.removeprefix('features.')}": value for name, value in state.items()
                 if not name.startswith(("fc.", "classifier.", "AuxLogits."))}  # fmt: skip
    state = {name: value for name, value in state.items() if not HEAD.search(name)}
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if wrong or not state:
        found = f"{wrong[0]} {tuple(state[wrong[0]].shape)} has no place" if wrong else "nothing in it has"
        fail(f"{source} is of another architecture: {len(wrong):,} of {len(state):,} tensors do not fit, {found} here")
    model.load_state_dict(state, strict=False)
    return list(state)


def read_checkpoint(path: str, last: bool = False) -> dict:
    """What is in a file, or in a run's folder in its checkpoint of the best or of the `last` epoch; and its `path`.

    `model` in it is the state dict, also of bare files and of finetune_classify.py, whose backbone it is.
    """
    if os.path.isdir(path):
        names = [name for name in os.listdir(path) if name.endswith(".pt") and name.endswith("_last.pt") == last]
        path = os.path.join(path, names[0] if len(names) == 1 else f"({len(names)} checkpoints)")
    if not os.path.isfile(path):
        fail(f"no file at {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        state = data.get("model", data.get("state_dict", data))
        if not state or not all(map(torch.is_tensor, state.values())):
            raise TypeError("a dict of tensors is expected")
    except Exception as error:  # noqa: BLE001 (torch's own text advises to run whatever code the file has)
        fail(f"{path} cannot be loaded as a state dict: {str(error).splitlines()[0].split('. ')[0]}")
    if any(name.startswith("trunk.") for name in state):
        state = {name.removeprefix("trunk."): value for name, value in state.items() if name.startswith("trunk.")}
    return (data if "model" in data else {}) | {"model": state, "path": path}


def load_weights(args: Args, model: nn.Module) -> list[str]:
    """Load what --weights or --pretrained names; returns the names of the tensors that are not random any more."""
    source = args.pretrained or args.weights
    if source == "none":
        return []
    if args.pretrained or os.path.isfile(source or ""):
        if args.arch == "yolov3" and os.path.isfile(source) and not source.endswith((".pth", ".pt")):
            try:
                return load_darknet(model, source)
            except ValueError as error:
                fail(f"--weights {error}")
        return load_into(model, read_checkpoint(source)["model"], source)
    if args.arch == "yolov3" and not args.backbone:
        fail("yolov3: give --weights yolov3.weights or darknet53.conv.74 of Darknet, or --weights none")
    entries = {entry.name: entry for entry in models.get_model_weights(args.backbone or args.arch)}
    if source not in entries:
        fail(f"--weights {source}: neither a file nor one of {', '.join([*entries, 'none'])}")
    try:
        state = entries[source].get_state_dict(progress=sys.stdout.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        fail(f"{entries[source].url} could not be downloaded ({error}): put it into {folder}, or give a --weights FILE")
    return load_into(model, state, source)


def freeze(model: nn.Module, loaded: list[str], args: Args) -> list[nn.Module]:
    """Take gradients from all that --strategy and --unfreeze-from keep; the layers that stay in evaluation mode."""
    names, in_evaluation = [name for name, _ in model.named_parameters()], []
    frozen = set(loaded) if args.strategy == "off-the-shelf" else set()
    if args.unfreeze_from:
        later = [i for i, name in enumerate(names) if f".{args.unfreeze_from}." in f".{name}"]
        if not later:
            fail(f"--unfreeze-from {args.unfreeze_from}: no module has that name; there are {some(names[::9], 12)}")
        frozen |= set(names[: later[0]])
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, nn.BatchNorm2d):
            if args.strategy == "scratch":
                module.momentum = 0.1  # MobileNets' and Darknet's would average over more batches than there may be
            # Batches of a few images have no statistics worth having: torchvision freezes a trained backbone's too
            elif weight in frozen or (name.startswith("backbone.") and weight in loaded):
                in_evaluation.append(module)
                frozen |= {weight, f"{name}.bias"}
        elif isinstance(module, nn.Dropout) and args.strategy == "off-the-shelf":
            in_evaluation.append(module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return in_evaluation


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, args.learning_rate)
    return torch.optim.SGD(groups, args.learning_rate, momentum=0.9)


# Evaluation -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def detect(args: Args, model: nn.Module, data: Pictures, indices: Sequence[int], device: torch.device) -> dict:
    """{index: boxes, labels, scores on the CPU} of all images that can be read."""
    model.eval()
    found = {}
    try:
        for images, targets, read, bad in make_loader(args, data, make_batches(indices, args), device):
            data.report(bad)
            for i, result in zip(read, model(*to_device(images, targets, device)) if images else ()):
                objects = result["labels"] > 0  # FCOS and RetinaNet have a sigmoid for the background, too
                found[i] = {name: result[name][objects].cpu() for name in ("boxes", "labels", "scores")}
    except BaseException:
        end_workers()
        raise
    return found


def to_coco(pictures: list[Picture], found: dict[int, dict], classes: list[str]) -> list[dict]:
    """Detections in COCO's format of results, with names."""
    results = []
    for i, each in found.items():
        for (x1, y1, x2, y2), label, score in zip(*(each[name].tolist() for name in ("boxes", "labels", "scores"))):
            entry = {"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            results.append(entry | {"file_name": pictures[i].path, "category": classes[label - 1]})
    return results


def coco_metrics(pictures: list[Picture], found: dict[int, dict], classes: list[str]) -> dict[str, float]:
    """AP over IoU 0.5 to 0.95, AP50, AP75 and `AP/<class>` of the images in `found`, by pycocotools."""
    truth, boxes = [], to_coco(pictures, found, classes)
    for i in found:
        for (x1, y1, x2, y2), label, crowd in zip(pictures[i].boxes, pictures[i].labels, pictures[i].crowd):
            entry = {"image_id": i, "category_id": 1 + classes.index(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            truth.append(entry | {"id": len(truth) + 1, "area": (x2 - x1) * (y2 - y1), "iscrowd": int(crowd)})
    if not boxes:
        return {name: 0.0 for name in ("AP", "AP50", "AP75", *(f"AP/{name}" for name in classes))}
    with contextlib.redirect_stdout(io.StringIO()):
        coco, categories = COCO(), [{"id": n, "name": name} for n, name in enumerate(classes, 1)]
        coco.dataset = {"images": [{"id": i} for i in found], "annotations": truth, "categories": categories}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(boxes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(("AP", "AP50", "AP75"), evaluation.stats.tolist()))
    for k, name in enumerate(classes):
        precision = evaluation.eval["precision"][:, :, k, 0, 2]
        metrics[f"AP/{name}"] = precision[precision > -1].mean().item() if (precision > -1).any() else math.nan
    return metrics


def paper_ap(pictures: list[Picture], found: dict[int, dict], name: str, label: int, iou: float) -> float:
    """AP of a class as in the paper: the area under the interpolated precision-recall curve (VOC 2010 on).

    Boxes after non-maximum suppression at IoU 0.45; a box belongs to the object that it overlaps most, and is right if
    by `iou` at least and as the first one. NaN for a class without objects.
    """
    scores, right, total = [], [], 0
    for i, boxes in found.items():
        objects = pictures[i].only(lambda other, crowd: other == name)
        truth, taken = torch.tensor(objects.boxes).reshape(-1, 4), set()
        total += objects.crowd.count(False)
        chosen = boxes["labels"] == label
        candidates, values = boxes["boxes"][chosen], boxes["scores"][chosen]
        kept = batched_nms(candidates, values, torch.zeros(len(values)), 0.45)
        for overlaps, value in zip(box_iou(candidates[kept], truth), values[kept].tolist()):
            best = int(overlaps.argmax()) if len(truth) else -1
            hit = best >= 0 and bool(overlaps[best] >= iou)
            if hit and objects.crowd[best]:
                continue
            scores.append(value)
            right.append(hit and best not in taken)
            taken |= {best} if hit else set()
    hits = np.array(right, dtype=np.float64)[np.argsort(-np.array(scores), kind="stable")]
    recall = np.cumsum(hits) / max(total, 1)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope)) if total else math.nan


def measure(pictures: list[Picture], found: dict[int, dict], classes: list[str]) -> dict[str, float]:
    """COCO's metrics, and the paper's `AP@0.1` and `AP@0.5` with `AP@0.1/<class>`; means over classes with objects."""
    metrics = coco_metrics(pictures, found, classes)
    for iou in (0.1, 0.5):
        each = {name: paper_ap(pictures, found, name, label, iou) for label, name in enumerate(classes, 1)}
        known = [value for value in each.values() if not math.isnan(value)]
        metrics[f"AP@{iou}"] = sum(known) / len(known) if known else math.nan
        metrics |= {f"AP@{iou}/{name}": value for name, value in each.items()}
    return metrics


def describe(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "AP75", "AP@0.1", "AP@0.5"))


def draw(data: Pictures, found: dict[int, dict], threshold: float, folder: str) -> None:
    """Write the images in `found` with the boxes of `threshold` and more, their classes and scores, as PNGs."""
    colours = ("red", "cyan", "yellow", "lime", "magenta", "orange")
    for i, each in found.items():
        image = open_image(os.path.join(data.folder, data.pictures[i].path))
        canvas, font = ImageDraw.Draw(image), ImageFont.load_default(max(12, max(image.size) // 50))
        for entry in to_coco(data.pictures, {i: each}, data.classes):
            if entry["score"] >= threshold:
                x, y, w, h = entry["bbox"]
                colour, words = colours[entry["category_id"] % 6], f"{entry['category']} {entry['score']:.2f}"
                canvas.rectangle((x, y, x + w, y + h), outline=colour, width=max(2, max(image.size) // 300))
                canvas.rectangle(canvas.textbbox((x, y), words, font), fill=colour)
                canvas.text((x, y), words, "black", font)
        path = os.path.join(folder, os.path.splitext(data.pictures[i].path)[0] + ".png")
        write_file(path, lambda file: image.save(file, "PNG"))  # noqa: B023


def draw_curves(history: dict[str, list], path: str) -> None:
    """Training loss, and validation APs by epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for name, panel in zip(history, np.repeat(figure.subplots(1, 2), (1, len(history) - 1))):
        panel.plot(
            *zip(*history[name]), marker=".", label=f"training {name}" if name == "loss" else f"validation {name}"
        )
        panel.set_xlabel("epoch")
        panel.legend()
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=110))


if __name__ == "__main__":
    args, checkpoint, own_data = tyro.cli(Args, description="Fine-tune and compare object detectors."), {}, True
    if args.resume or args.evaluate:  # with the flags of the run unless given anew
        checkpoint, given = read_checkpoint(args.resume or args.evaluate, last=bool(args.resume)), args
        path, saved = checkpoint["path"], {}
        if not {"classes", "loaded", "args"} <= set(checkpoint) or (args.resume and "optimizer" not in checkpoint):
            fail(f"{path} is no checkpoint of this script{' to resume, which ends in _last.pt' * bool(args.resume)}")
        saved = {name: value for name, value in checkpoint["args"].items() if name in vars(args)}
        args = tyro.cli(Args, default=Args(**saved))
        args.resume, args.evaluate = given.resume, given.evaluate
        free = (CHANGEABLE + " " + TESTABLE if args.evaluate else CHANGEABLE).split()
        for name, value in saved.items():
            if value != getattr(args, name) and name not in free:
                fail(f"{path} is of a run with {name} {value}, not {getattr(args, name)}")
        own_data = all(saved[name] == getattr(args, name) for name in ("data_dir", "dataset", "annotations"))
        kept_split = os.path.join(os.path.dirname(path), "split.csv")
        args.split_file = args.split_file or (kept_split if own_data and os.path.isfile(kept_split) else None)
    if args.arch not in (*FAMILIES, "yolov3", *TORCHVISION):
        fail(f"--arch {args.arch}: there are {', '.join((*FAMILIES, 'yolov3', *TORCHVISION))}")
    for name, value in vars(args).items():
        low, high = BOUNDS.get(name, (1, 10**9))
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must be between {low} and {high:g}, not {value}")
    untrained = args.weights == "none" and not args.pretrained
    for message, wrong in {
        f"--exp-name {args.exp_name} is not the name of a file": os.path.basename(args.exp_name) != args.exp_name,
        f"--backbone: {args.arch} has its own": args.backbone and args.arch not in (*FAMILIES, "yolov3"),
        "--unfreeze-from is for --strategy fine-tune": args.unfreeze_from and args.strategy != "fine-tune",
        "--strategy scratch has random weights: no --pretrained": args.strategy == "scratch" and args.pretrained,
        "--strategy off-the-shelf needs trained layers": args.strategy == "off-the-shelf" and untrained,
        "--predict needs a trained detector: --evaluate RUN": args.predict and not args.evaluate,
        "--augmentation ssd crops no proposals": args.arch == "fastrcnn" and args.augmentation == "ssd",
    }.items():
        if wrong:
            fail(message)

    # TRY NOT TO MODIFY: what flags that were not given stand for; device, signals and seeding
    args.backbone = args.backbone or ("resnet50" if args.arch in FAMILIES else None)
    args.weights = "none" if args.strategy == "scratch" else args.weights
    if not args.weights and not args.pretrained and (args.backbone or args.arch in TORCHVISION):
        args.weights = "IMAGENET1K_V1" if args.backbone else models.get_model_weights(args.arch).DEFAULT.name
    if args.learning_rate is None:
        family = next(name for name in PER_IMAGE if args.arch.startswith(name))
        args.learning_rate = 1e-4 if args.optimizer == "adam" else PER_IMAGE[family] * args.batch_size
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    if args.workers is None:
        args.workers = os.cpu_count() if device.type == "cuda" else min(os.cpu_count(), 4)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")
    # the new layers of a chain must not be those that its source, often of the same seed, began with
    source = read_checkpoint(args.pretrained) if args.pretrained and not checkpoint else checkpoint
    transfers = source.get("transfers", 0) + bool(args.pretrained and not checkpoint)
    torch.manual_seed(args.seed + 1_000_003 * transfers)

    # Data
    other_data = args.evaluate and args.annotations != checkpoint["args"]["annotations"]
    if other_data:
        args.val_annotations = args.test_annotations = None
    if args.predict:
        folder, pictures = args.predict, [Picture(path, split="test") for path in find_images(args.predict)]
    else:
        folder, pictures = load_pictures(args)
    for picture in pictures:
        picture.split = "test" if other_data else picture.split
        picture.labels = ["object"] * len(picture.labels) if args.single_class else picture.labels
    classes = checkpoint["classes"] if checkpoint else choose_classes(args, pictures)
    pictures = keep_classes(pictures, classes)
    indices = {name: [i for i, picture in enumerate(pictures) if picture.split == name] for name in SPLITS}
    boxes = {name: sum(len(pictures[i].boxes) for i in indices[name]) for name in SPLITS}
    sizes = ", ".join(f"{len(indices[name]):,} ({boxes[name]:,} boxes) {name}" for name in SPLITS)
    say(f"{folder}: {sizes}; {len(classes):,} classes: {some(classes, 10)}")
    data = Pictures(folder, pictures, classes, read_proposals(args, [picture.path for picture in pictures]), args)

    # The detector
    model = make_detector(args, 1 + len(classes))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    loaded = checkpoint["loaded"] if checkpoint else load_weights(args, model)
    model = model.to(device, memory_format=torch.channels_last)
    if args.evaluate:
        split = "test" if indices["test"] else "val"
        found = detect(args, model, data, indices[split], device)
        if not found:
            fail(f"{folder}: there are no {split} images that can be read")
        if args.predict:
            base, results = os.path.dirname(os.path.abspath(path)), to_coco(pictures, found, classes)
            draw(data, found, args.predict_threshold, os.path.join(base, "pictures"))
            text = json.dumps(results, indent=0).encode()
            write_file(os.path.join(base, "predictions.json"), lambda file: file.write(text))
            say(f"saved {len(results):,} boxes in {len(found):,} images to {base}: predictions.json and pictures")
        else:
            say(f"{path} on {len(found):,} {split} images: {describe(measure(pictures, found, classes))}")
        sys.exit()
    if not indices["train"] or not indices["val"]:
        fail("there are no images for training or none for validation")
    in_evaluation = freeze(model, loaded, args)
    if args.amp and device.type == "cuda":
        autocast_backbone(model, device.type)
    optimizer = make_optimizer(args, model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = sum(isinstance(module, nn.BatchNorm2d) for module in in_evaluation)
    say(f"{args.arch}{f' on {args.backbone}' * bool(args.backbone)}, {args.strategy}: {len(loaded):,} tensors loaded, "
        f"{trained:,} of {total:,} parameters are trained, {kept:,} batch normalisations frozen"
        f"{', the momentum of the others 0.1' * (args.strategy == 'scratch')}, "
        f"learning rate {args.learning_rate:g}, on {device}")  # fmt: skip

    # TRY NOT TO MODIFY: the run's folder and logs
    name = os.path.basename(os.path.normpath(args.dataset or args.annotations or args.data_dir)).removesuffix(".json")
    run_dir = os.path.join(args.logdir, f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}")
    if args.resume:
        run_dir = os.path.dirname(os.path.abspath(path))
    while os.path.exists(run_dir) and not args.resume:  # of a run that began in the same second
        run_dir += "-2"
    try:
        os.makedirs(run_dir, exist_ok=True)
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=os.path.basename(run_dir),
                       config=vars(args), sync_tensorboard=True, save_code=True)  # fmt: skip
        epoch, history = checkpoint.get("epoch", 0), checkpoint.get("history", {})
        writer = SummaryWriter(run_dir, purge_step=epoch + 1 if args.resume else None)
    except (OSError, ImportError) as error:
        fail(f"{run_dir}: {error}")
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", epoch)
    best_path, last_path, per_class = (
        os.path.join(run_dir, name) for name in (f"{args.exp_name}.pt", f"{args.exp_name}_last.pt", "per_class.csv")
    )
    best, stale, resumed_at = checkpoint.get("best", -1.0), checkpoint.get("stale", 0), epoch
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
    else:
        write_rows(os.path.join(run_dir, "split.csv"), [["path", "split"], *([p.path, p.split] for p in pictures)])

    def save(path: str, **more) -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        state = {"args": vars(args), "classes": classes, "loaded": loaded, "transfers": transfers, "epoch": epoch}
        state |= {"best": best, "stale": stale, "history": history, "model": model.state_dict()} | more
        write_file(path, lambda file: torch.save(state, file))

    def test(split: str) -> dict[str, float]:
        """Metrics of a split, written with pictures of its first images."""
        found = detect(args, model, data, indices[split], device)
        metrics = measure(pictures, found, classes)
        for name, value in metrics.items():
            if not math.isnan(value):
                writer.add_scalar(f"{split}/{name}", value, epoch)
        if split == "test" or metrics["AP@0.5"] > best:
            first = {i: found[i] for i in list(found)[:8]}
            draw(data, first, args.predict_threshold, os.path.join(run_dir, "detections", split))
        return metrics

    # Training
    batches, last_line = make_batches(indices["train"], args), 0.0
    loader = make_loader(args, data, batches, device, stay=True)
    share = len(indices["val"]) / len(indices["train"]) / 3  # of validation in the time of an epoch, until it is known
    try:
        if not args.resume:
            save(last_path, optimizer=optimizer.state_dict())
        while epoch < args.epochs and not 0 < args.patience <= stale:
            model.train()
            for module in in_evaluation:
                module.eval()
            torch.manual_seed(args.seed * 1_000_003 + epoch)  # for dropout and the regions that R-CNNs draw
            batches[:] = make_batches(indices["train"], args, epoch)
            begun = waited_from = time.perf_counter()
            waiting, sums, count = 0.0, Counter(), 0
            for step, (images, targets, _, bad) in enumerate(loader, 1):
                waiting += time.perf_counter() - waited_from
                data.report(bad)
                warmed = (epoch * len(batches) + step) / max(min(args.warmup_iterations, len(batches)), 1)
                drops = sum(epoch >= round(share_of_epochs * args.epochs) for share_of_epochs in args.lr_drops)
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * min(1.0, warmed) * 0.1**drops
                if images:
                    losses = model(*to_device(images, targets, device))
                    losses["loss"] = torch.stack(list(losses.values())).sum()
                    optimizer.zero_grad()
                    losses["loss"].backward()
                    optimizer.step()
                    count += 1
                    for name, value in losses.items():
                        sums[name] += value.detach()
                waited_from = now = time.perf_counter()
                if now - last_line > (1 if sys.stdout.isatty() else 30) and count:
                    last_line, mean, per_step = now, float(sums["loss"]) / count, (now - begun) / step
                    if not math.isfinite(mean):
                        break
                    left = per_step * len(batches) * ((args.epochs - epoch) * (1 + share) - step / len(batches))
                    say(f"epoch {epoch + 1}/{args.epochs} {step / len(batches):.1%}  loss {mean:.4f}  "
                        f"{per_step:.2f} s/update, {waiting / (now - begun):.0%} of it waiting for data  "
                        f"ETA {timedelta(seconds=int(left))}", stay=False)  # fmt: skip
            seconds = time.perf_counter() - begun
            means = {name: float(value) / count for name, value in sums.items()}
            if not means or not math.isfinite(means["loss"]):
                each = ", ".join(f"{name} {value:g}" for name, value in means.items())
                fail(f"the loss is not finite in epoch {epoch + 1} ({each}): lower --learning-rate" if means else
                     "none of the training images could be read")  # fmt: skip
            epoch += 1
            metrics = test("val")
            share = (time.perf_counter() - begun) / seconds - 1
            points = {f"losses/{name.removeprefix('loss_')}": value for name, value in means.items() if name != "loss"}
            points |= {"train/loss": means["loss"], "charts/learning_rate": optimizer.param_groups[0]["lr"]}
            points["charts/seconds_per_update"] = (seconds - waiting) / len(batches)
            points["charts/seconds_waiting_for_data"] = waiting / len(batches)
            for tag, value in points.items():
                writer.add_scalar(tag, value, epoch)
            say(f"epoch {epoch}: loss {means['loss']:.4f}; validation: {describe(metrics)}; {seconds:.0f} s, "
                f"{waiting:.1f} s of them waiting for data")  # fmt: skip
            for name in ("loss", "AP", "AP50", "AP@0.1"):
                history.setdefault(name, []).append((epoch, (means | metrics)[name]))
            draw_curves(history, os.path.join(run_dir, "curves.png"))
            score = 0.0 if math.isnan(metrics["AP@0.5"]) else metrics["AP@0.5"]
            stale = 0 if score > best else stale + 1
            if score > best:
                best = score
                save(best_path)
            save(last_path, optimizer=optimizer.state_dict())

        # The test images, once, with the weights of the best validation AP at IoU 0.5
        if os.path.exists(per_class) and epoch == resumed_at:
            say("the run is finished and tested: more --epochs go on")
        elif indices["test"]:
            model.load_state_dict(read_checkpoint(best_path)["model"])
            metrics, rows = test("test"), [["class", "boxes", "AP", "AP@0.1", "AP@0.5"]]
            writer.flush()
            for name in classes:
                boxes = sum(pictures[i].labels.count(name) for i in indices["test"])
                rows.append([name, boxes, *(f"{metrics[f'{metric}/{name}']:.4f}" for metric in rows[0][2:])])
            write_rows(per_class, rows)
            say(f"test: {describe(metrics)} (the best of {epoch} epochs)")
        say(f"saved {best_path}; {len(data.unreadable):,} images could not be read and were left out")
        del loader  # and with it its workers
    except BaseException as error:
        end_workers()
        lost_worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        if not isinstance(error, (KeyboardInterrupt, BrokenPipeError)) and not lost_worker:
            raise
        file = os.path.basename(__file__)
        print(f"\nstopped; python {file} --resume {run_dir} goes on after the last finished epoch", file=sys.stderr)
        sys.exit(130)
    finally:
        writer.close()
