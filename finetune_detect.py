# Transfer of object detectors: a detector trained on photographs learns to find other objects, such as the musical
# instruments in paintings of "Advances in Digital Music Iconography" (Sabatelli et al., Digital Humanities Quarterly
# 15.1, 2021) and "Contributions to Deep Transfer Learning" (M. Sabatelli, 2022, chapter 5).
#
#   python finetune_detect.py --data-dir IMAGES --annotations train.json --arch fasterrcnn_resnet50_fpn_v2    COCO JSON
#   python finetune_detect.py --data-dir IMAGES --annotations Annotations --arch retinanet_resnet50_fpn_v2    VOC XML
#   python finetune_detect.py --data-dir IMAGES --annotations train.txt --val-annotations dev.txt --arch yolov3  MINERVA
#   python finetune_detect.py --evaluate runs/.../finetune_detect.pt --predict IMAGES                 boxes and pictures
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.18", "pillow>=10",
#                 "pycocotools>=2.0.8"]
# ///
import contextlib
import csv
import ctypes
import difflib
import io
import json
import math
import os
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field, fields
from datetime import timedelta
from itertools import count
from typing import Literal, NoReturn, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import models, tv_tensors
from torchvision.models import detection
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the split, the new layers, the order of the images and their augmentation"""
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
    """folder of the images"""
    annotations: Optional[str] = None
    """COCO JSON, folder of VOC XML, list of VOC's ImageSets, MINERVA's CSV, or lines `image x1,y1,x2,y2,class`"""
    val_annotations: Optional[str] = None
    """the same for validation (None: 50/25/25 of --annotations are for training, validation and test)"""
    test_annotations: Optional[str] = None
    """the same for the test at the end (None, but with --val-annotations: there is no test)"""
    image_column: str = "image_filename"
    """column of a CSV with the file names"""
    box_column: str = "bounding_box_coordinates"
    """column of a CSV with the boxes, `xmin,ymin,xmax,ymax` in pixels"""
    label_column: str = "instrument_name"
    """column of a CSV with the classes; a code in brackets after the name, `Harp (3285)`, is cut off"""
    classes: list[str] = field(default_factory=list)
    """the classes to learn (none given: all); images that are left without a box are dropped"""
    top_classes: int = 0
    """learn this many classes, the most frequent ones in training (0: all), as MINERVA's top-5 and top-10"""
    single_class: bool = False
    """all boxes are of one class, as in MINERVA's first version"""
    skip_bad: bool = False
    """leave out records with an error, and count them, instead of listing them and ending"""
    check_data: bool = False
    """list the records with an error, and end"""
    augmentation: Literal["none", "flip", "ssd"] = "flip"
    """in training: nothing, mirror images, or colours, zoom, crops and mirror images as for SSD"""

    # The detector
    arch: str = "fasterrcnn_resnet50_fpn_v2"
    """a detector of torchvision; fasterrcnn, fastrcnn, retinanet, fcos or ssd on --backbone; yolov3"""
    backbone: Optional[str] = None
    """classifier of torchvision under those five (None: resnet50) or under yolov3 (None: its own, darknet53)"""
    strategy: Literal["fine-tune", "off-the-shelf", "scratch"] = "fine-tune"
    """train everything; train only the layers that no weights were loaded into; train from random weights"""
    weights: Optional[str] = None
    """torchvision's name, a file (state dict or Darknet's) or `none` (None: COCO's, or ImageNet's of --backbone)"""
    pretrained: Optional[str] = None
    """checkpoint of this script, or of finetune_classify.py for the backbone, to start from instead of --weights"""
    trainable_backbone_layers: Optional[int] = None
    """fine-tune: train only this many of the 5 stages of the backbone, the last ones (None: all)"""
    image_size: Optional[int] = None
    """shorter side of the images for the detector, or side of its square input (None: the detector's own)"""
    proposals: Optional[str] = None
    """fastrcnn: JSON {image: [[x1, y1, x2, y2], ...]}, or `selective-search` (pip install opencv-contrib-python)"""
    kmeans_anchors: bool = False
    """yolov3: anchors from the boxes in training instead of COCO's"""

    # Training
    epochs: int = 26
    """passes over the training images"""
    batch_size: int = 4
    """images per update"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum 0.9, or Adam"""
    learning_rate: Optional[float] = None
    """(None: for SGD what torchvision, for yolov3 Darknet has, per image of a batch; 0.0001 for Adam)"""
    weight_decay: float = 1e-4
    """of weights with two dimensions and more; never of biases and normalisation"""
    warmup_iterations: int = 500
    """updates over which the learning rate rises to its value, at most the first epoch"""
    lr_drops: list[float] = field(default_factory=lambda: [0.67, 0.92])
    """shares of --epochs after which the learning rate falls to a tenth"""
    patience: int = 0
    """end training after this many epochs without a better validation AP at IoU 0.5 (0: never)"""
    resume: Optional[str] = None
    """checkpoint ..._last.pt of a run to continue, in its folder and with its flags unless given anew"""

    # After training
    evaluate: Optional[str] = None
    """checkpoint to test on --annotations instead of training"""
    predict: Optional[str] = None
    """with --evaluate: folder of images whose boxes are written beside the checkpoint, as JSON and drawn"""
    predict_threshold: float = 0.3
    """lowest score of the boxes that are drawn"""


FAMILIES = ("fasterrcnn", "fastrcnn", "retinanet", "fcos", "ssd")  # that stand on any --backbone
TORCHVISION = [name for name in models.list_models(module=detection) if "mask" not in name and "keypoint" not in name]
# learning rates of SGD: 0.02, 0.01 and 0.01 for batches of 16, 0.002 for 32, 0.001 for 64
PER_IMAGE = {"fast": 0.00125, "retinanet": 0.000625, "fcos": 0.000625, "ssd": 0.0000625, "yolov3": 0.000015625}
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
SPLITS = ("train", "val", "test")
Image.MAX_IMAGE_PIXELS = 2**30  # scans of museums exceed Pillow's limit against bombs


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
class Picture:
    """An annotated image."""

    path: str
    """relative to --data-dir"""
    boxes: list[list[float]] = field(default_factory=list)
    """xmin, ymin, xmax, ymax in pixels, continuous: a box over the first pixel is 0, 0, 1, 1"""
    labels: list[str] = field(default_factory=list)
    """class of every box, empty where it is not known"""
    crowd: list[bool] = field(default_factory=list)
    """boxes that evaluation neither expects nor counts as wrong (COCO's crowds, VOC's difficult objects)"""
    size: tuple[int, int] = (0, 0)
    """width and height as annotated, later as read; 0 where unknown"""
    split: str = ""

    def add(self, box: list[float], label: str, crowd: bool = False) -> None:
        self.boxes.append(list(map(float, box)))
        self.labels.append(label)
        self.crowd.append(crowd)


def read_coco(path: str) -> list[Picture]:
    """Boxes are x, y, width, height; ids of classes may have gaps and are mapped by name."""
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    names = {category["id"]: category["name"] for category in data["categories"]}
    pictures = {entry["id"]: Picture(entry["file_name"], size=(entry.get("width", 0), entry.get("height", 0)))
                for entry in data["images"]}  # fmt: skip
    for entry in data["annotations"]:
        if entry["image_id"] not in pictures:
            fail(f"{path}: annotation {entry.get('id')} is of image {entry['image_id']}, which is not among its images")
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
        picture = Picture(root.findtext("filename") or os.path.basename(path)[: -len(".xml")], size=size)
        for entry in root.iter("object"):
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            difficult = (entry.findtext("difficult") or "0").strip() == "1"
            picture.add([x1 - 1, y1 - 1, x2, y2], (entry.findtext("name") or "").strip(), difficult)
        pictures.append(picture)
    return pictures


def read_table(path: str, args: Args) -> list[Picture]:
    """CSV with a row per box, as in MINERVA."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    for flag in ("image_column", "box_column", "label_column"):
        if getattr(args, flag) not in columns:
            name = f"--{flag.replace('_', '-')} {getattr(args, flag)}"
            fail(f"{name}: {path} has the columns {', '.join(map(repr, columns))}")
    pictures: dict[str, Picture] = {}
    for row in rows:
        label = re.sub(r"\s*\([^()]*\)\s*$", "", row[args.label_column] or "").strip()
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", row[args.box_column] or "")]
        name = os.path.basename(row[args.image_column])
        picture = pictures.setdefault(name, Picture(name))
        picture.add(numbers if len(numbers) == 4 else [math.nan] * 4, label)
    return list(pictures.values())


def read_lines(path: str) -> list[Picture]:
    """Lines `image x1,y1,x2,y2,class ...` of keras-yolo3, whose images lie anywhere."""
    pictures: dict[str, Picture] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            found = re.match(r"(.+?)((?:\s+-?[\d.]+,-?[\d.]+,-?[\d.]+,-?[\d.]+,\S+)*)\s*$", line)
            if found and found[1].strip():
                name = os.path.basename(found[1])
                picture = pictures.setdefault(name, Picture(name))
                for box in found[2].split():
                    *numbers, label = box.split(",", 4)
                    picture.add(numbers, label)
    return list(pictures.values())


def read_annotations(path: str, args: Args) -> list[Picture]:
    """Whatever format `path` is in."""
    try:
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.endswith(".xml"))
            pictures = read_voc([os.path.join(path, name) for name in names])
        elif path.endswith(".json"):
            pictures = read_coco(path)
        else:
            with open(path, encoding="utf-8-sig") as file:
                lines = [line for line in file.read().splitlines() if line.strip()]
            if any(re.search(r"\s-?[\d.]+,-?[\d.]+,-?[\d.]+,-?[\d.]+,\S+$", line) for line in lines[:3]):
                pictures = read_lines(path)
            elif "," in lines[0]:
                pictures = read_table(path, args)
            else:  # VOC's ImageSets/Main/train.txt: names of the files in Annotations/
                base = os.path.join(os.path.dirname(os.path.abspath(path)), "..", "..", "Annotations")
                pictures = read_voc([os.path.join(base, f"{line.split()[0]}.xml") for line in lines])
    except (OSError, ValueError, KeyError, IndexError, TypeError, ElementTree.ParseError) as error:
        fail(f"{path}: no annotations in a known format ({type(error).__name__}: {error})")
    if not pictures:
        fail(f"{path}: there are no annotations in it")
    return pictures


def open_image(path: str) -> Image.Image:
    """The image upright in RGB; raises OSError or ValueError."""
    with Image.open(path) as image:
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
    """Paths of all images below `folder`, relative to it, sorted."""
    found = [os.path.relpath(os.path.join(root, name), folder)
             for root, _, names in os.walk(folder, followlinks=True) for name in names]  # fmt: skip
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in IMAGES)


def check(pictures: list[Picture], folder: str) -> tuple[list[Picture], list[str]]:
    """The pictures without what is wrong with them, and a line for each such thing. Completes paths and sizes."""
    present = find_images(folder)
    by_name = {os.path.basename(path): path for path in present} | {path: path for path in present}
    by_name = {os.path.splitext(name)[0]: path for name, path in by_name.items()} | by_name
    good, wrong = [], []
    for picture in pictures:
        path = by_name.get(picture.path) or by_name.get(os.path.basename(picture.path))
        if path is None:
            wrong.append(f"{picture.path}: there is no such image in {folder}")
            continue
        try:
            with Image.open(os.path.join(folder, path)) as image:  # the header only
                turned = image.getexif().get(0x0112, 1) >= 5
                size = image.size[::-1] if turned else image.size
        except Exception as error:  # Pillow's plugins raise whatever their formats make them
            wrong.append(f"{path}: cannot be read, {type(error).__name__}: {error}")
            continue
        if all(picture.size) and tuple(picture.size) != size:
            why = ", its boxes are of the image before EXIF's rotation" if tuple(picture.size) == size[::-1] else ""
            annotated, real = (" x ".join(map(str, sides)) for sides in (picture.size, size))
            wrong.append(f"{path}: annotated as {annotated} pixels, but it has {real}{why}")
            continue
        kept = Picture(path, size=size, split=picture.split)
        for box, label, crowd in zip(picture.boxes, picture.labels, picture.crowd):
            x1, y1, x2, y2 = box
            if not all(map(math.isfinite, box)):
                reason = "its box is not four numbers"
            elif x2 - x1 <= 1 or y2 - y1 <= 1:  # also VOC's boxes that end where they begin
                reason = "no wider or no higher than a pixel"
            elif min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:  # up to a pixel is a matter of counting
                reason = f"outside of the image of {size[0]} x {size[1]} pixels"
            elif not label:
                reason = "its class is missing or unknown"
            else:
                kept.add([max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])], label, crowd)
                continue
            wrong.append(f"{path}: box {', '.join(f'{value:g}' for value in box)} {label or '(no class)'}: {reason}")
        good.append(kept)
    return good, wrong


def choose_classes(args: Args, pictures: list[Picture]) -> tuple[list[Picture], list[str]]:
    """The classes to learn, sorted, from --classes, --top-classes and --single-class; and the images that have them."""
    if args.single_class:
        for picture in pictures:
            picture.labels = ["object"] * len(picture.labels)
    counted = Counter(label for picture in pictures if picture.split == "train" for label in picture.labels)
    if not counted:
        fail(f"--annotations {args.annotations}: there are no boxes in the training images")
    classes = set(args.classes or counted)
    if args.top_classes:
        classes = {name for name, _ in counted.most_common() if name in classes}
        classes = set(sorted(classes, key=lambda name: (-counted[name], name))[: args.top_classes])
    absent = classes - set(counted)
    if absent:
        near = difflib.get_close_matches(min(absent), counted, 3)
        fail(f"--classes {min(absent)}: no training image has it{', did you mean ' * bool(near)}{' or '.join(near)}")
    return keep_classes(pictures, classes), sorted(classes)


def keep_classes(pictures: list[Picture], classes) -> list[Picture]:
    """Without the boxes of other classes, and without images that have no other boxes; negatives stay."""
    kept, lost = [], Counter()
    for picture in pictures:
        reduced = Picture(picture.path, size=picture.size, split=picture.split)
        for box, label, crowd in zip(picture.boxes, picture.labels, picture.crowd):
            if label in classes:
                reduced.add(box, label, crowd)
            else:
                lost[label] += 1
        if reduced.boxes or not picture.boxes:
            kept.append(reduced)
    if lost:
        say(f"{sum(lost.values()):,} boxes of {len(lost):,} other classes are left out: {some(lost)}")
    return kept


def split_pictures(pictures: list[Picture], seed: int) -> None:
    """50/25/25 by image, as MINERVA; in each group of images whose rarest class is the same."""
    counted = Counter(label for picture in pictures for label in picture.labels)
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(min(picture.labels, key=lambda name: (counted[name], name), default=""), []).append(picture)
    rng, dealt = np.random.default_rng(seed), 0
    for name in sorted(groups):
        for i in rng.permutation(len(groups[name])):
            groups[name][i].split = ("train", "val", "train", "test")[dealt % 4]
            dealt += 1


def load_pictures(args: Args) -> list[Picture]:
    """All images of all splits, checked."""
    if not args.data_dir or not os.path.isdir(args.data_dir):
        fail(f"--data-dir {args.data_dir}: there is no such folder")
    if not args.annotations:
        fail("--annotations: a file or folder with the boxes is needed")
    pictures, wrong = [], []
    for split, path in zip(SPLITS, (args.annotations, args.val_annotations, args.test_annotations)):
        if path:
            found, more = check(read_annotations(path, args), args.data_dir)
            wrong += more
            for picture in found:
                picture.split = split
            pictures += found
    if args.test_annotations and not args.val_annotations:
        fail("--test-annotations needs --val-annotations")
    for line in wrong if args.check_data else wrong[:100]:
        say(line)
    if args.check_data:
        boxes = sum(len(picture.boxes) for picture in pictures)
        print(f"{len(pictures):,} images with {boxes:,} boxes; {len(wrong):,} errors")
        sys.exit(1 if wrong else 0)
    if wrong and not args.skip_bad:
        listed = "listed above" if len(wrong) <= 100 else "the first 100 listed above, all with --check-data"
        fail(f"{len(wrong):,} errors in the annotations, {listed}: correct them, or leave them out with --skip-bad")
    if wrong:
        say(f"{len(wrong):,} records are left out")
    if not args.val_annotations and not args.evaluate:
        split_pictures(pictures, args.seed)
    return pictures


class Pictures(Dataset):
    """Item (epoch, i) is image i as uint8 `(3, H, W)`, its target and i; None and the reason where it cannot be read.

    A target has `boxes` float `(n, 4)` in pixels, `labels` int64 `(n,)` from 1 on, and with proposals also these.
    """

    def __init__(self, folder: str, pictures: list[Picture], classes: list[str], proposals: Optional[dict], args: Args):
        self.folder, self.pictures, self.classes, self.proposals = folder, pictures, classes, proposals
        self.seed, self.augmentation = args.seed, args.augmentation
        flip = v2.RandomHorizontalFlip(0.5)
        ssd = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=127), v2.RandomIoUCrop(), flip]
        self.augment = v2.Compose([*(ssd if args.augmentation == "ssd" else [flip]), v2.SanitizeBoundingBoxes()])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int]):
        epoch, i = item
        picture = self.pictures[i]
        try:
            image = tv_tensors.Image(v2.functional.pil_to_tensor(open_image(os.path.join(self.folder, picture.path))))
        except Exception as error:
            return None, None, (i, f"{type(error).__name__}: {error}")
        # crowds are regions, not objects: nothing to learn from
        boxes = [box for box, crowd in zip(picture.boxes, picture.crowd) if not crowd]
        names = [name for name, crowd in zip(picture.labels, picture.crowd) if not crowd]
        labels = torch.tensor([1 + self.classes.index(name) for name in names], dtype=torch.int64)
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:])
        target = {"boxes": boxes, "labels": labels}
        if self.proposals is not None:
            target["proposals"] = torch.tensor(self.proposals.get(picture.path, []), dtype=torch.float32).reshape(-1, 4)
        if epoch >= 0 and self.augmentation != "none":
            with torch.random.fork_rng(devices=[]):  # the same whoever reads it, and whenever
                torch.manual_seed((self.seed * 1_000_003 + epoch) * 1_000_003 + i)
                if self.proposals is None:
                    image, target = self.augment(image, target)
                elif torch.rand(()) < 0.5:
                    image = image.flip(2)
                    for name in ("boxes", "proposals"):
                        x1, y1, x2, y2 = torch.as_tensor(target[name]).unbind(1)
                        target[name] = torch.stack((image.shape[2] - x2, y1, image.shape[2] - x1, y2), dim=1)
        return torch.as_tensor(image), {name: torch.as_tensor(value) for name, value in target.items()}, i


def collate(items: list) -> tuple[list, list, list[int], list[tuple[int, str]]]:
    """Images, targets, indices, and (index, reason) of what cannot be read."""
    good = [item for item in items if item[0] is not None]
    bad = [reason for image, _, reason in items if image is None]
    return [image for image, _, _ in good], [target for _, target, _ in good], [i for _, _, i in good], bad


class Order(torch.utils.data.Sampler):
    """Batches of (epoch, i) in an order that seed and epoch determine, from batch `start` on; epoch -1 is in order."""

    def __init__(self, indices: list[int], batch_size: int, seed: int):
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.epoch, self.start = -1, 0

    def batches(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __len__(self) -> int:
        return self.batches() - self.start

    def __iter__(self):
        order = self.indices
        if self.epoch >= 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = [self.indices[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        for i in range(self.start, self.batches()):
            yield [(self.epoch, j) for j in order[i * self.batch_size : (i + 1) * self.batch_size]]


def make_loader(args: Args, pictures: Pictures, order: Order, device: torch.device) -> DataLoader:
    workers = min(args.workers, max(len(order), 1))
    return DataLoader(
        pictures, batch_sampler=order, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and order.epoch >= 0, prefetch_factor=4 if workers else None,
    )  # fmt: skip


def to_device(images: list, targets: list, device: torch.device) -> tuple[list, list]:
    images = [image.to(device, non_blocking=True).float() / 255 for image in images]
    return images, [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]


def selective_search(folder: str, paths: list[str], stopped) -> dict[str, list]:
    """Uijlings et al. (2013), by OpenCV: at most 2,000 boxes an image."""
    try:
        import cv2
        from cv2.ximgproc.segmentation import createSelectiveSearchSegmentation
    except ImportError:
        fail("--proposals selective-search needs OpenCV with its contributions: pip install opencv-contrib-python")
    found, search, begun, last_line = {}, createSelectiveSearchSegmentation(), time.perf_counter(), 0.0
    for done, path in enumerate(paths, 1):
        if stopped():
            sys.exit(130)
        image = np.asarray(open_image(os.path.join(folder, path)))[:, :, ::-1]
        scale = min(1.0, 500 / max(image.shape))  # of the size of VOC's images: it takes seconds an image even so
        search.setBaseImage(cv2.resize(image, None, fx=scale, fy=scale))
        search.switchToSelectiveSearchFast()
        x, y, w, h = (search.process()[:2_000] / scale).T
        found[path] = np.stack([x, y, x + w, y + h], axis=1).round(1).tolist()
        if time.perf_counter() - last_line > (1 if sys.stdout.isatty() else 30):
            last_line = time.perf_counter()
            left = timedelta(seconds=int((last_line - begun) / done * (len(paths) - done)))
            say(f"selective search {done:,}/{len(paths):,}  ETA {left}", stay=False)
    return found


# YOLOv3 --------------------------------------------------------------------------------------------------------------
# As in "YOLOv3: An Incremental Improvement" (Redmon and Farhadi, arXiv 1804.02767), and where the paper is silent as in
# its code, Darknet (github.com/pjreddie/darknet, whose files are named below). Wherever there are three of a thing they
# are in the order of the strides.
STRIDES = (8, 16, 32)
COCO_ANCHORS = [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, leaky ReLU: float `(B, inputs, H, W)` -> `(B, outputs, H/stride, W/stride)`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        # eps and momentum of Darknet on GPUs (batchnorm_layer.c), where the published weights were trained
        super().__init__(convolution, nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.01), nn.LeakyReLU(0.1, inplace=True))


class Residual(nn.Sequential):
    """float `(B, channels, H, W)` -> the same shape."""

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

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[-3:]


class Neck(nn.Module):
    """The convolutions between the backbone and the output at one stride (section 2.3, yolov3.cfg).

    Features `(B, inputs, h, w)`, and if `lateral` the trunk `(B, 2 channels, h/2, w/2)` of the next coarser neck ->
    its own trunk `(B, channels, h, w)` and what the output sees, `(B, 2 channels, h, w)`.
    """

    def __init__(self, inputs: int, channels: int, lateral: bool):
        super().__init__()
        self.lateral = ConvBlock(2 * channels, channels, 1) if lateral else None
        inputs = inputs + channels if lateral else inputs
        widths = [inputs, channels, 2 * channels, channels, 2 * channels, channels]
        self.trunk = nn.Sequential(*map(ConvBlock, widths, widths[1:], (1, 3, 1, 3, 1)))
        self.last = ConvBlock(channels, 2 * channels, 3)

    def forward(self, features: torch.Tensor, coarser: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.lateral is not None:
            features = torch.cat([F.interpolate(self.lateral(coarser), scale_factor=2), features], dim=1)
        trunk = self.trunk(features)
        return trunk, self.last(trunk)


def yolo_output(channels: int, num_classes: int) -> nn.Conv2d:
    """A new output, float `(B, channels, h, w)` -> 3 anchors' t_x, t_y, t_w, t_h, objectness and classes as logits."""
    output = nn.Conv2d(channels, 3 * (4 + num_classes), 1)  # num_classes counts background, which has no logit
    nn.init.normal_(output.weight, std=0.01)
    nn.init.zeros_(output.bias)
    # Nearly all of the 10,647 predictions at 416 pixels are background. An objectness of 1/2 everywhere would cost
    # 10,647 log 2 = 7,380, hundreds of times as much as the few objects, and its gradient would wreck a pretrained
    # backbone; so objects start out rare ("Focal Loss for Dense Object Detection", Lin et al. 2017, section 3.3).
    nn.init.constant_(output.bias.view(3, -1)[:, 4], float(np.log(0.01 / 0.99)))
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


def shape_iou(sizes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU `(n, k)` of boxes of (width, height) `(n, 2)` and `(k, 2)` that have the same centre."""
    shared = torch.minimum(sizes[:, None], others).prod(dim=-1)
    return shared / (sizes.prod(dim=-1)[:, None] + others.prod(dim=-1) - shared)


class YOLOv3(nn.Module):
    """A detector called like torchvision's: `num_classes` counts background, real classes are 1..num_classes - 1.

    `anchors` are 9 (width, height) in pixels of the square network input of side `size`; the 3 of the smallest area
    serve at stride 8. A detection's score is its objectness times its class probability. Another `backbone` gives a
    list of maps at strides 8, 16, 32 with so many `channels`.
    """

    def __init__(
        self, num_classes: int, anchors: list[tuple[float, float]] = COCO_ANCHORS, size: int = 416,
        score_thresh: float = 0.05, nms_thresh: float = 0.45, detections_per_img: int = 100,
        backbone: Optional[nn.Module] = None, channels: Sequence[int] = (256, 512, 1024),
    ):  # fmt: skip
        super().__init__()
        if size <= 0 or size % 32 or len(anchors) != 9:
            raise ValueError(f"YOLOv3 needs 9 anchors, not {len(anchors)}, and a size in multiples of 32, not {size}")
        self.size, self.detections_per_img = size, detections_per_img
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.backbone = backbone or Darknet53()
        widths = zip(channels, (128, 256, 512), (True, True, False))
        self.necks = nn.ModuleList(Neck(inputs, width, lateral) for inputs, width, lateral in widths)
        self.outputs = nn.ModuleList(yolo_output(channels, num_classes) for channels in (256, 512, 1024))
        # part of the state dict, for without its anchors an output means nothing
        self.register_buffer("anchors", torch.tensor(sorted(anchors, key=lambda a: a[0] * a[1]), dtype=torch.float32))
        # An image's N predictions are in the order of anchors, rows and columns: `first` is where those of an anchor
        # begin; `cells` are the (column, row) and `anchor_of` the anchor of each.
        grids = [size // stride for stride in STRIDES for _ in range(3)]
        cells = [torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).flip(1) for grid in grids]
        counts = torch.tensor([len(cell) for cell in cells])
        self.register_buffer("strides", torch.tensor(STRIDES).repeat_interleave(3), persistent=False)
        self.register_buffer("first", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("cells", torch.cat(cells), persistent=False)
        self.register_buffer("anchor_of", torch.arange(9).repeat_interleave(counts), persistent=False)

    def forward(self, images: list[torch.Tensor], targets: Optional[list[dict]] = None) -> dict | list[dict]:
        """Images float `(3, H, W)` in [0, 1] of any sizes -> the losses in training, else a dict of each one's objects.

        Targets are `boxes` float `(n, 4)`, xyxy in pixels of the image, and `labels` int64 `(n,)`, n >= 0; objects the
        same and `scores` float `(n,)`, best first.
        """
        squares, scales, shifts = zip(*(letterbox(image, self.size) for image in images))
        raw = self.predict(torch.stack(squares))
        if not self.training:
            sizes = [image.shape[-2:] for image in images]
            return [self.detect(*each) for each in zip(raw, scales, shifts, sizes)]
        if targets is None:
            raise ValueError("YOLOv3 needs targets in training")
        boxes, labels = [], []
        for image, target, scale, shift in zip(images, targets, scales, shifts):
            box = clip_boxes_to_image(target["boxes"], image.shape[-2:]) * scale + shift
            # as in data.c; the logarithm of a width of 0 is infinite
            kept = (box[:, 2:] - box[:, :2] >= 0.001 * self.size).all(dim=1)
            boxes.append(box[kept])
            labels.append(target["labels"][kept])
        return self.losses(raw, boxes, labels)

    def predict(self, squares: torch.Tensor) -> torch.Tensor:
        """Network input float `(B, 3, size, size)` -> logits float32 `(B, N, 5 + classes)`, under autocast too."""
        features, trunk, raw = self.backbone(squares), None, []
        for i in (2, 1, 0):
            trunk, x = self.necks[i](features[i], trunk)
            x = self.outputs[i](x).float().unflatten(1, (3, -1))
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
        gives the box and all their class. Box: binary cross entropy of t_x, t_y and half the squared error of t_w, t_h,
        times 2 - area. For x and y the paper says squared error, but what its formula and its code have as the
        gradient, target less logistic value, is that of the cross entropy.
        """
        with torch.no_grad():
            pairs = zip(self.decode(raw), boxes)
            # 0.5 as in the paper; yolov3.cfg has 0.7
            near = torch.stack([(box_iou(predicted, truth) > 0.5).any(dim=1) for predicted, truth in pairs])
        image = torch.cat([torch.full_like(label, i) for i, label in enumerate(labels)])
        truth, label = torch.cat(boxes), torch.cat(labels) - 1
        centre, sides = (truth[:, :2] + truth[:, 2:]) / 2, truth[:, 2:] - truth[:, :2]
        anchor = shape_iou(sides, self.anchors).argmax(dim=1)
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
    """Load Darknet's own weights (parser.c) and say what was loaded; raises ValueError if `path` does not hold them.

    They are darknet53.conv.74, the backbone, or those of a whole yolov3.cfg with any number of classes. Outputs are
    loaded if it is the model's number; they expect the anchors that they were trained with.
    """
    version, size = np.fromfile(path, dtype="<i4", count=3), os.path.getsize(path)
    if len(version) < 3 or version.min() < 0 or version.max() >= 1000:  # as numbers, text and archives are huge
        raise ValueError(f"{path} is not a Darknet weights file: it does not begin with a version")
    start = 20 if version[0] * 10 + version[1] >= 2 else 16  # after the number of images seen, which once had 4 bytes

    def tensors(module: nn.Module) -> list[torch.Tensor]:
        blocks = [block for block in module.modules() if isinstance(block, ConvBlock)]  # in the order of yolov3.cfg
        return [t for conv, bn, _ in blocks for t in (bn.bias, bn.weight, bn.running_mean, bn.running_var, conv.weight)]

    order, necks = tensors(model.backbone), [tensors(neck) for neck in model.necks]
    backbone = start + 4 * sum(tensor.numel() for tensor in order)
    lines = [f"{path}: loaded the backbone"]
    if size == backbone:
        lines.append("necks and outputs start from random weights")
    else:
        rest = size - backbone - 4 * sum(tensor.numel() for neck in necks for tensor in neck)
        filters, left = divmod(rest, 4 * sum(output.in_channels + 1 for output in model.outputs))
        if left or filters < 18 or filters % 3:  # 3 anchors of 4 coordinates, objectness and at least a class
            known = f"darknet53.conv.74 has {backbone:,}, a yolov3.weights of 80 classes 248,007,048"
            raise ValueError(f"{path} has {size:,} bytes, which does not fit the network: {known}")
        same = all(output.out_channels == filters for output in model.outputs)
        for neck, output in zip(reversed(necks), reversed(model.outputs)):
            output = output if same else nn.Conv2d(output.in_channels, filters, 1)  # read, and forgotten
            order += [*neck, output.bias, output.weight]
        lines.append(f"{'loaded necks and outputs' if same else 'loaded necks'}, of {filters // 3 - 5} classes")
        if not same:
            lines.append(f"outputs start from random weights, of {model.outputs[0].out_channels // 3 - 5} classes")
    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=start))
    for tensor, value in zip(order, values.split([tensor.numel() for tensor in order])):
        tensor.copy_(value.view_as(tensor))
    return lines


def kmeans_anchors(sizes: np.ndarray, k: int = 9, seed: int = 0) -> list[tuple[float, float]]:
    """`k` anchors for boxes of widths and heights `(n, 2)`, both in pixels of the network input, smallest area first.

    By k-means with the distance 1 - IoU of centred boxes ("YOLO9000", Redmon and Farhadi, arXiv 1612.08242, section 2),
    with medians for means, which a few large boxes would draw away: anchors of a higher IoU. Boxes without area are
    left out; raises ValueError if fewer than `k` different ones are left.
    """
    boxes = torch.as_tensor(sizes, dtype=torch.float64).reshape(-1, 2)
    boxes = boxes[(boxes > 0).all(dim=1)]
    different = len(boxes.unique(dim=0))
    if different < k:
        raise ValueError(f"{k} anchors need boxes of at least {k} different sizes, there are {different}")
    generator = torch.Generator().manual_seed(seed)
    centres = boxes[torch.randint(len(boxes), (1,), generator=generator)]
    while len(centres) < k:  # as in k-means++: far ones first, and none twice
        odds = (1 - shape_iou(boxes, centres)).amin(dim=1).square()
        centres = torch.cat([centres, boxes[odds.multinomial(1, generator=generator)]])
    for _ in range(1_000):  # a bound, for with this distance nothing ensures an end
        before, nearest = centres.clone(), shape_iou(boxes, centres).argmax(dim=1)
        for i in nearest.unique().tolist():  # a centre without boxes stays
            centres[i] = boxes[nearest == i].median(dim=0).values
        if centres.equal(before):
            break
    return [(width, height) for width, height in centres[centres.prod(dim=1).argsort()].tolist()]


# The detectors -------------------------------------------------------------------------------------------------------
def strides(net: nn.Module) -> list[int]:
    """For every child of a classifier's features: the number of pixels, 2 to 32, that one cell of its output covers."""
    x, found = torch.zeros(1, 3, 64, 64), []
    with torch.no_grad():
        for child in net.eval().children():
            x = child(x)
            found.append(64 // x.shape[-1])
    return found


def make_body(name: str) -> tuple[nn.Module, list[int]]:
    """The feature maps "0", "1", "2" at strides 8, 16, 32 of a torchvision classifier, and their channels."""
    if name not in models.list_models(module=models):
        near = " or ".join(difflib.get_close_matches(name, models.list_models(module=models), 3))
        fail(f"--backbone {name}: torchvision has no such classifier{', did you mean ' * bool(near)}{near}")
    net = models.get_model(name, weights=None)
    if hasattr(net, "layer4"):
        layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    elif hasattr(net, "features") and isinstance(net.features, nn.Sequential):
        net = net.features
        of = strides(net)
        last = [max((i for i, s in enumerate(of) if s == stride), default=None) for stride in (8, 16, 32)]
        layers = {str(i): str(n) for n, i in enumerate(last) if i is not None}
    else:
        layers = {}
    if len(layers) < 3:
        fail(f"--backbone {name}: no feature maps at strides 8, 16 and 32; ResNets, MobileNets and VGGs have them")
    body = IntermediateLayerGetter(net, layers).eval()
    with torch.no_grad():
        channels = [values.shape[1] for values in body(torch.zeros(1, 3, 64, 64)).values()]
    return body, channels


class Pyramid(nn.Module):
    """Feature pyramid (Lin et al., 2017) with 256 channels on a body's maps; `extra` adds coarser levels."""

    def __init__(self, body: nn.Module, channels: list[int], extra: nn.Module):
        super().__init__()
        self.body, self.fpn, self.out_channels = body, FeaturePyramidNetwork(channels, 256, extra), 256

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn(self.body(x))


class Tower(nn.Module):
    """A body's maps and two coarser ones, as in SSD (Liu et al., 2016)."""

    def __init__(self, body: nn.Module, channels: list[int]):
        super().__init__()
        self.body, self.extra = body, nn.ModuleList()
        for inputs in (channels[-1], 256):
            convs = nn.Conv2d(inputs, 128, 1), nn.ReLU(), nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.ReLU()
            self.extra.append(nn.Sequential(*convs))
        for module in self.extra.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(x)
        for i, layers in enumerate(self.extra, 3):
            maps[str(i)] = layers(maps[str(i - 1)])
        return maps


class Normalised(nn.Module):
    """A body for YOLOv3: images in [0, 1] become what ImageNet's classifiers expect."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self.body((x - self.mean) / self.std).values())


class Given(nn.Module):
    """Stands in the place of the region proposal network and hands on the proposals of `boxes` and whole images."""

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


def make_detector(args: Args, num_classes: int, anchors: Optional[list] = None) -> nn.Module:
    """A detector with random weights for `num_classes` classes, the background (0) included."""
    size = args.image_size
    if args.arch == "yolov3":
        backbone, channels = None, (256, 512, 1024)
        if args.backbone:
            body, channels = make_body(args.backbone)
            backbone = Normalised(body)
        if size and size % 32:
            fail(f"--image-size {size}: yolov3 needs a multiple of 32")
        return YOLOv3(num_classes, anchors or COCO_ANCHORS, size or 416, backbone=backbone, channels=channels)
    scale = {"min_size": size, "max_size": round(size * 1333 / 800)} if size else {}
    if args.arch in TORCHVISION:
        if args.arch.startswith("ssd"):
            if size:
                fail(f"--image-size: {args.arch} has a fixed size; --arch ssd --backbone NAME takes any")
            scale = {}
        return models.get_model(args.arch, weights=None, weights_backbone=None, num_classes=num_classes, **scale)
    body, channels = make_body(args.backbone)
    if args.arch == "ssd":
        boxes = detection.anchor_utils.DefaultBoxGenerator([[2, 3]] * 5)
        return detection.ssd.SSD(Tower(body, channels), boxes, (size or 320,) * 2, num_classes)
    if args.arch in ("retinanet", "fcos"):
        backbone = Pyramid(body, channels, LastLevelP6P7(256, 256))
        if args.arch == "fcos":
            return detection.FCOS(backbone, num_classes, **scale)
        octave = [tuple(round(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in (8, 16, 32, 64, 128)]
        boxes = detection.anchor_utils.AnchorGenerator(tuple(octave), ((0.5, 1.0, 2.0),) * 5)
        return detection.RetinaNet(backbone, num_classes, anchor_generator=boxes, **scale)
    pool = MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2)
    boxes = detection.anchor_utils.AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4)
    kind = FastRCNN if args.arch == "fastrcnn" else detection.FasterRCNN
    backbone = Pyramid(body, channels, LastLevelMaxPool())
    # 128 regions an image and 256 hidden units, where torchvision has 512 and 1,024: a third of the time on a CPU
    head = {"box_head": detection.faster_rcnn.TwoMLPHead(256 * 7 * 7, 256), "box_batch_size_per_image": 128}
    head["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(256, num_classes)
    model = kind(backbone, rpn_anchor_generator=boxes, box_roi_pool=pool, **head, **scale)
    if args.arch == "fastrcnn":
        model.rpn = Given()
    return model


def plain_norms(model: nn.Module) -> None:
    """torchvision's frozen batch normalisation as the usual one: frozen or not is decided in one place, by `Frozen`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "FrozenBatchNorm2d":
                plain = nn.BatchNorm2d(len(child.weight), eps=child.eps)
                plain.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, plain)


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the layers that say which class a box is of, which are always new."""
    parts = ("box_predictor", "cls_logits", "head.classification_head.module_list", "outputs.")
    return any(part in name for part in parts)


def load_into(model: nn.Module, state: dict, source: str) -> list[str]:
    """Copy all but the head from a detector's state dict, or a classifier's into the backbone; names of the copied.

    Ends with one line where tensors of the source have no place, or other shapes.
    """
    own = model.state_dict()
    if not any(name.startswith(("backbone.", "head.")) for name in state):
        base = "backbone.body." if any(name.startswith("backbone.body.") for name in own) else "backbone."
        flat = base == "backbone." or any(re.match(r"backbone\.body\.\d", name) for name in own)
        state = {base + (name.removeprefix("features.") if flat else name): value for name, value in state.items()
                 if not name.startswith(("fc.", "classifier.", "AuxLogits."))}  # fmt: skip
        if "backbone.extra.0.1.weight" in own and flat:  # SSD300 cuts VGG16 in two

            def place(found: re.Match) -> str:
                layer = int(found[1])
                return f"backbone.features.{layer}" if layer < 23 else f"backbone.extra.0.{layer - 23}"

            state = {re.sub(r"backbone\.(\d+)", place, name): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not is_head(name)}
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if wrong or not state:
        found = f"{wrong[0]} {tuple(state[wrong[0]].shape)} has no place" if wrong else "nothing in it has"
        fail(f"{source} is of another architecture: {len(wrong):,} of {len(state):,} tensors do not fit, {found} here")
    model.load_state_dict(state, strict=False)
    return list(state)


def read_state(path: str) -> tuple[dict, dict]:
    """The state dict in a file of this script, of finetune_classify.py, or bare; and all that is in the file."""
    if not os.path.isfile(path):
        fail(f"no file at {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{path} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}")
    state = data.get("model", data.get("state_dict", data)) if isinstance(data, dict) else {}
    if not state or not all(torch.is_tensor(value) for value in state.values()):
        fail(f"{path} is no state dict, a dict of tensors is expected")
    if any(name.startswith("trunk.") for name in state):
        state = {name.removeprefix("trunk."): state[name] for name in state if name.startswith("trunk.")}
    return state, data


def download(entry, arch: str) -> dict:
    try:
        return entry.get_state_dict(progress=sys.stdout.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        there = f"put {entry.url} into {folder}, or give a local file with --weights"
        fail(f"the weights {entry} could not be downloaded ({error}): {there}")


def load_weights(args: Args, model: nn.Module) -> list[str]:
    """Load what --weights or --pretrained names; returns the names of the tensors that are not random any more."""
    if args.pretrained:
        return load_into(model, read_state(args.pretrained)[0], args.pretrained)
    name = args.weights
    if name == "none" or args.strategy == "scratch":
        return []
    if name and os.path.isfile(name):
        if args.arch == "yolov3" and not name.endswith((".pth", ".pt")):
            try:
                lines = load_darknet(model, name)
            except ValueError as error:
                fail(f"--weights {error}")
            say("; ".join(lines))
            count_of_parts = 1 + ("loaded necks" in lines[1]) + ("loaded necks and" in lines[1])
            parts = ("backbone.", "necks.", "outputs.")[:count_of_parts]
            return [tensor for tensor in model.state_dict() if tensor.startswith(parts)]
        return load_into(model, read_state(name)[0], name)
    if args.arch in TORCHVISION:
        entries = {entry.name: entry for entry in models.get_model_weights(args.arch)}
        name = name or models.get_model_weights(args.arch).DEFAULT.name
        if name in entries:
            # COCO's first ResNet-50s were trained with epsilon 0
            if name == "COCO_V1" and args.arch in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"):
                for module in model.backbone.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eps = 0.0
            return load_into(model, download(entries[name], args.arch), name)
    elif args.backbone:
        entries = {entry.name: entry for entry in models.get_model_weights(args.backbone)}
        name = name or "IMAGENET1K_V1"
        if name in entries:
            return load_into(model, download(entries[name], args.backbone), name)
    else:
        entries = {}
        if not name:
            fail("yolov3: give --weights yolov3.weights or darknet53.conv.74 of Darknet, or --weights none")
    fail(f"--weights {name}: neither a file nor one of {', '.join([*entries, 'none'])}")


def stages(model: nn.Module) -> list[list[nn.Module]]:
    """The layers of the backbone in five groups, from the image on: each halves the resolution."""
    body = getattr(model.backbone, "body", model.backbone)
    if hasattr(body, "layer4"):
        return [[body.conv1, body.bn1], [body.layer1], [body.layer2], [body.layer3], [body.layer4]]
    if isinstance(body, Darknet53):
        return [[body.stem, body.stages[0]], *([stage] for stage in body.stages[1:])]
    if not isinstance(body, IntermediateLayerGetter):
        fail("--trainable-backbone-layers: not with this architecture; --arch ssd --backbone NAME has stages")
    of = strides(body)
    return [[child for child, s in zip(body.children(), of) if s == stride] for stride in (2, 4, 8, 16, 32)]


class Frozen:
    """Keeps `modules` as they are: no gradients, and no new statistics while the rest is trained."""

    def __init__(self, model: nn.Module, loaded: list[str], args: Args):
        self.model, self.norms = model, []
        if args.strategy == "scratch":  # MobileNets and Darknet average over 100 batches, more than there may be at all
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.1
        pretrained = [name for name in loaded if name.startswith("backbone.")]
        names = set(loaded) if args.strategy == "off-the-shelf" else set()
        if args.trainable_backbone_layers is not None:
            kept = stages(model)[: 5 - args.trainable_backbone_layers]
            still = {id(parameter) for group in kept for module in group for parameter in module.parameters()}
            names |= {name for name, parameter in model.named_parameters() if id(parameter) in still}
        for name, module in model.named_modules():
            # Batches of a few images have no statistics worth having: torchvision freezes a trained backbone's too
            if isinstance(module, nn.BatchNorm2d):
                if (name.startswith("backbone.") and pretrained) or f"{name}.weight" in names:
                    self.norms.append(module)
                    names |= {f"{name}.weight", f"{name}.bias"}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in names)
        if args.strategy == "off-the-shelf":
            self.norms += [module for name, module in model.named_modules() if isinstance(module, nn.Dropout)]

    def train(self) -> None:
        self.model.train()
        for module in self.norms:
            module.eval()


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, args.learning_rate)
    return torch.optim.SGD(groups, args.learning_rate, momentum=0.9)


# Evaluation ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def detect(model: nn.Module, loader, device, report, stopped) -> Optional[dict[int, dict]]:
    """{index: boxes, labels, scores on the CPU} of all images that can be read; None when a signal came."""
    model.eval()
    found = {}
    for images, targets, indices, bad in loader:
        if stopped():
            return None
        report(bad)
        if images:
            for i, result in zip(indices, model(*to_device(images, targets, device))):
                found[i] = {name: result[name].float().cpu() for name in ("boxes", "scores")}
                found[i]["labels"] = result["labels"].cpu()
    return found


def coco_metrics(pictures: list[Picture], found: dict[int, dict], classes: list[str]) -> dict[str, float]:
    """AP over IoU 0.5 to 0.95, AP50, AP75 and `AP/<class>` of the images in `found`, by pycocotools."""
    truth, boxes = [], []
    for i in found:
        picture = pictures[i]
        for (x1, y1, x2, y2), label, crowd in zip(picture.boxes, picture.labels, picture.crowd):
            entry = {"image_id": i, "category_id": 1 + classes.index(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            truth.append(entry | {"id": len(truth) + 1, "area": (x2 - x1) * (y2 - y1), "iscrowd": int(crowd)})
        xyxy, labels, scores = (found[i][name].tolist() for name in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(xyxy, labels, scores):
            boxes.append({"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    categories = [{"id": n, "name": name} for n, name in enumerate(classes, 1)]
    if not boxes:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0} | {f"AP/{name}": 0.0 for name in classes}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
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


def paper_ap(pictures: list[Picture], found: dict[int, dict], classes: list[str], iou: float) -> dict[str, float]:
    """{class: AP} as in the paper: the area under the interpolated precision-recall curve (VOC 2010 on).

    Boxes of score 0.05 and more after non-maximum suppression at IoU 0.45; a box belongs to the object that it overlaps
    most, and is right if by `iou` at least and as the first one. NaN for a class without objects.
    """
    result = {}
    for label, name in enumerate(classes, 1):
        scores, right, total = [], [], 0
        for i, boxes in found.items():
            mine = [k for k, other in enumerate(pictures[i].labels) if other == name]
            truth = torch.tensor([pictures[i].boxes[k] for k in mine]).reshape(-1, 4)
            crowd = [pictures[i].crowd[k] for k in mine]
            total += crowd.count(False)
            chosen = (boxes["labels"] == label) & (boxes["scores"] >= 0.05)
            candidates, values = boxes["boxes"][chosen], boxes["scores"][chosen]
            kept = batched_nms(candidates, values, torch.zeros(len(values)), 0.45)
            overlaps, taken = box_iou(candidates[kept], truth), set()
            for row, value in zip(overlaps, values[kept].tolist()):
                best = int(row.argmax()) if len(mine) else -1
                if best >= 0 and row[best] >= iou:
                    if crowd[best]:
                        continue
                    right.append(best not in taken)
                    taken.add(best)
                else:
                    right.append(False)
                scores.append(value)
        order = np.argsort(-np.array(scores), kind="stable")
        hits = np.array(right, dtype=np.float64)[order]
        recall = np.cumsum(hits) / max(total, 1)
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        result[name] = float(np.sum(np.diff(recall, prepend=0.0) * envelope)) if total else math.nan
    return result


def measure(pictures: list[Picture], found: dict[int, dict], classes: list[str]) -> dict[str, float]:
    """COCO's metrics, and the paper's `AP@0.1` and `AP@0.5` with `AP@0.1/<class>`; means over classes with objects."""
    metrics = coco_metrics(pictures, found, classes)
    for iou in (0.1, 0.5):
        each = paper_ap(pictures, found, classes, iou)
        known = [value for value in each.values() if not math.isnan(value)]
        metrics[f"AP@{iou}"] = sum(known) / len(known) if known else math.nan
        metrics |= {f"AP@{iou}/{name}": value for name, value in each.items()}
    return metrics


def describe(metrics: dict[str, float]) -> str:
    names = ("AP", "AP50", "AP75", "AP@0.1", "AP@0.5")
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)


def draw(image: torch.Tensor, boxes: dict, classes: list[str], threshold: float) -> torch.Tensor:
    """uint8 `(3, H, W)` with the boxes of `threshold` and more, their classes and scores."""
    shown = boxes["scores"] >= threshold
    labels, scores = boxes["labels"][shown].tolist(), boxes["scores"][shown].tolist()
    words = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores)]
    colors = [("red", "cyan", "yellow", "lime", "magenta", "orange")[(label - 1) % 6] for label in labels]
    if not words:
        return image
    look = {"colors": colors, "width": max(2, max(image.shape) // 200), "fill_labels": True, "label_colors": "black"}
    return draw_bounding_boxes(image, boxes["boxes"][shown], words, **look)


def predict(args: Args, model: nn.Module, classes: list[str], device, base: str) -> None:
    """Write predictions.json (COCO's format of results, with names) and pictures/ with the boxes drawn into `base`."""
    if not os.path.isdir(args.predict):
        fail(f"--predict {args.predict}: there is no such folder")
    pictures = [Picture(path) for path in find_images(args.predict)]
    if not pictures:
        fail(f"--predict {args.predict}: no images in it ({', '.join(sorted(IMAGES))})")
    proposals = get_proposals(args, args.predict, [picture.path for picture in pictures], lambda: False)
    data, results = Pictures(args.predict, pictures, classes, proposals, args), []
    order = Order(list(range(len(pictures))), args.batch_size, 0)

    def report(bad: list) -> None:
        for i, reason in bad:
            say(f"left out: {pictures[i].path} cannot be read, {reason}")

    found = detect(model, make_loader(args, data, order, device), device, report, lambda: False)
    for i, boxes in found.items():
        xyxy, labels, scores = (boxes[name].tolist() for name in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(xyxy, labels, scores):
            box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
            entry = {"image_id": i, "category_id": label, "bbox": box, "score": round(score, 4)}
            results.append(entry | {"file_name": pictures[i].path, "category": classes[label - 1]})
        path = os.path.join(base, "pictures", os.path.splitext(pictures[i].path)[0] + ".png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        image = torch.as_tensor(data[-1, i][0])
        Image.fromarray(draw(image, boxes, classes, args.predict_threshold).permute(1, 2, 0).numpy()).save(path)
    path = os.path.join(base, "predictions.json")
    with open(path + ".tmp", "w") as file:
        json.dump(results, file, indent=0)
    os.replace(path + ".tmp", path)
    say(f"saved {len(results):,} boxes in {len(found):,} images to {path}, drawn in {os.path.join(base, 'pictures')}")


def get_proposals(args: Args, folder: str, paths: list[str], stopped) -> Optional[dict[str, list]]:
    """{path: boxes} for fastrcnn, from a file or by selective search."""
    if args.arch != "fastrcnn":
        return None
    if args.proposals == "selective-search":
        return selective_search(folder, paths, stopped)
    if not args.proposals:
        fail("--arch fastrcnn needs --proposals FILE.json, or --proposals selective-search")
    try:
        with open(args.proposals, encoding="utf-8") as file:
            given = json.load(file)
        by_name = {os.path.basename(name): boxes for name, boxes in given.items()} | given
        found = {path: by_name.get(path, by_name.get(os.path.basename(path), [])) for path in paths}
        if not all(len(box) == 4 for boxes in found.values() for box in boxes):
            raise ValueError("a box is four numbers")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"--proposals {args.proposals}: {error}")
    without = [path for path, boxes in found.items() if not boxes]
    if without:
        say(f"{len(without):,} of {len(paths):,} images have no proposals: {some(without)}")
    return found


# Checkpoints ---------------------------------------------------------------------------------------------------------
def load_checkpoint(path: str) -> dict:
    _, data = read_state(path)
    if not {"model", "classes", "norm_eps", "args"} <= set(data):
        fail(f"{path} is not a checkpoint of this script")
    return data


def restore(checkpoint: dict) -> nn.Module:
    """The detector of a checkpoint."""
    args = Args(**{k: v for k, v in checkpoint["args"].items() if k in {f.name for f in fields(Args)}})
    model = make_detector(args, 1 + len(checkpoint["classes"]), checkpoint["anchors"])
    plain_norms(model)
    for name, module in model.named_modules():
        if name in checkpoint["norm_eps"]:
            module.eps = checkpoint["norm_eps"][name]
    model.load_state_dict(checkpoint["model"])
    return model


def save_atomically(data: dict, path: str) -> None:
    torch.save(data, path + ".tmp")
    os.replace(path + ".tmp", path)


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory rather than give it back to the system. Nothing on other systems.

    Otherwise tensors of some megabytes are mapped anew in every update, which on a CPU cost 5,000 to 20,000 page faults
    and up to a tenth of its time, another share in every run (Linux, mallopt(3)).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


if __name__ == "__main__":
    args, checkpoint = tyro.cli(Args), {}
    if args.evaluate or args.resume:
        checkpoint = load_checkpoint(args.evaluate or args.resume)
        saved = {k: v for k, v in checkpoint["args"].items() if k in {flag.name for flag in fields(Args)}}
        args = tyro.cli(Args, default=Args(**saved | {"resume": None}))  # the command line wins over the checkpoint
        if args.resume and "optimizer" not in checkpoint:
            fail(f"{args.resume} has no training state to resume; that is in the file that ends in _last.pt")
        fixed = ("arch", "backbone", "strategy", "optimizer", "batch_size", "image_size")
        for name in (*fixed, "trainable_backbone_layers"):
            if saved.get(name) != getattr(args, name):
                of = args.resume or args.evaluate
                fail(f"{of} is of a run with {name} {saved.get(name)}, not {getattr(args, name)}")
    known = [*FAMILIES, "yolov3", *TORCHVISION]
    if args.arch not in known:
        near = difflib.get_close_matches(args.arch, known, 3)
        fail(f"--arch {args.arch}: no such detector, did you mean {' or '.join(near)}" if near else
             f"--arch {args.arch}: no such detector; there are {', '.join(known)}")  # fmt: skip
    if args.arch in FAMILIES:
        args.backbone = args.backbone or "resnet50"
    elif args.backbone and args.arch != "yolov3":
        fail(f"--backbone goes with --arch {', '.join(FAMILIES)} or yolov3; {args.arch} has its own")
    if args.learning_rate is None:
        family = next(name for name in PER_IMAGE if args.arch.startswith(name))
        args.learning_rate = 1e-4 if args.optimizer == "adam" else PER_IMAGE[family] * args.batch_size
    for name in ("epochs", "batch_size"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if not 0 <= (args.trainable_backbone_layers if args.trainable_backbone_layers is not None else 5) <= 5:
        fail(f"--trainable-backbone-layers {args.trainable_backbone_layers}: the backbone has 5 stages")
    if args.strategy != "fine-tune" and args.trainable_backbone_layers is not None:
        fail("--trainable-backbone-layers trains a part of the backbone: use it with --strategy fine-tune")
    if args.strategy == "scratch" and args.pretrained:
        fail("--strategy scratch trains everything from random weights: no --pretrained")
    if args.strategy == "off-the-shelf" and args.weights == "none" and not args.pretrained:
        fail("--strategy off-the-shelf needs trained layers: --weights or --pretrained")
    if args.predict and not args.evaluate:
        fail("--predict needs the checkpoint of a trained detector: --evaluate PATH")
    if args.arch == "fastrcnn" and args.augmentation == "ssd":
        fail("--augmentation ssd crops images, which --proposals cannot follow: use flip or none")

    # Ctrl-C and kill end the run after the update, with a checkpoint; a second one ends it at once
    signals: list[int] = []

    def on_signal(number: int, _) -> None:
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    def stopped() -> bool:
        return bool(signals)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    on_cuda = device.type == "cuda"
    if not on_cuda:
        keep_freed_memory()

    # Predictions need no annotations
    if args.evaluate and args.predict:
        base = os.path.dirname(os.path.abspath(args.evaluate))
        predict(args, restore(checkpoint).to(device), checkpoint["classes"], device, base)
        sys.exit()

    # Data
    if args.evaluate:  # the test images of the run, or all of other --annotations
        of_the_run = args.annotations == checkpoint["args"]["annotations"]
        args.annotations = args.test_annotations if of_the_run and args.test_annotations else args.annotations
        args.val_annotations = args.test_annotations = None
    pictures = load_pictures(args)
    if checkpoint:
        classes = checkpoint["classes"]
        if args.single_class:
            for picture in pictures:
                picture.labels = classes * len(picture.labels)
        splits = checkpoint["splits"]
        if args.annotations == checkpoint["args"]["annotations"] and splits:  # of one file, which the run has split
            for picture in pictures:
                picture.split = splits.get(picture.path, "")
            pictures = [picture for picture in pictures if picture.split]
        elif args.evaluate:
            for picture in pictures:
                picture.split = "test"
        pictures = keep_classes(pictures, set(classes))
    else:
        pictures, classes = choose_classes(args, pictures)
    indices = {name: [i for i, picture in enumerate(pictures) if picture.split == name] for name in SPLITS}
    boxes = {name: sum(len(pictures[i].boxes) for i in indices[name]) for name in SPLITS}
    sizes = ", ".join(f"{len(indices[name]):,} ({boxes[name]:,} boxes) {name}" for name in SPLITS)
    say(f"{args.annotations}: {sizes}; {len(classes):,} classes: {some(classes, 10)}")
    for name in ("test",) if args.evaluate else ("train", "val"):
        if not indices[name]:
            fail(f"there are no images for {name}")
    proposals = get_proposals(args, args.data_dir, [picture.path for picture in pictures], stopped)
    data = Pictures(args.data_dir, pictures, classes, proposals, args)
    unreadable: dict[int, str] = {}

    def report(bad: list[tuple[int, str]]) -> None:
        """Name the images that cannot be read: they are left out, not replaced."""
        for i, reason in bad:
            if i not in unreadable:
                say(f"left out: {pictures[i].path} cannot be read, {reason}")
            unreadable[i] = reason

    def test(split: str) -> Optional[tuple[dict[str, float], dict[int, dict]]]:
        """Metrics and boxes of a split; None when a signal came."""
        order = Order(indices[split], args.batch_size, 0)
        found = detect(model, make_loader(args, data, order, device), device, report, stopped)
        return None if found is None else (measure(pictures, found, classes), found)

    # The detector
    if checkpoint:
        model, loaded, anchors = restore(checkpoint), checkpoint["loaded"], checkpoint["anchors"]
    else:
        anchors = None
        if args.kmeans_anchors:
            if args.arch != "yolov3":
                fail("--kmeans-anchors is for --arch yolov3")
            size = args.image_size or 416
            training = [picture for picture in pictures if picture.split == "train"]
            boxes = [[size * side / max(picture.size) for side in (x2 - x1, y2 - y1)]
                     for picture in training for x1, y1, x2, y2 in picture.boxes]  # fmt: skip
            try:
                anchors = [list(anchor) for anchor in kmeans_anchors(np.array(boxes), seed=args.seed)]
            except ValueError as error:
                fail(f"--kmeans-anchors: {error}")
            say(f"anchors {', '.join(f'{w:.0f}x{h:.0f}' for w, h in anchors)}")
        model = make_detector(args, 1 + len(classes), anchors)
        plain_norms(model)
        loaded = load_weights(args, model)
    model = model.to(device, memory_format=torch.channels_last)
    frozen = Frozen(model, loaded, args)

    if args.evaluate:
        result = test("test")
        if result is None:
            sys.exit(128 + signals[0])
        print(f"{args.evaluate} on {len(result[1]):,} images: {describe(result[0])}")
        sys.exit()

    order = Order(indices["train"], args.batch_size, args.seed)
    order.epoch = 0
    train_loader = make_loader(args, data, order, device)
    optimizer = make_optimizer(args, model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = sum(isinstance(module, nn.BatchNorm2d) for module in frozen.norms)
    what = f"{args.arch} on {args.backbone}" if args.backbone else args.arch
    say(f"{what}, {args.strategy}: {len(loaded):,} tensors loaded, {trained:,} of {total:,} parameters are trained, "
        f"{kept:,} batch normalisations frozen, learning rate {args.learning_rate:g}, on {device}")  # fmt: skip

    # TRY NOT TO MODIFY: the run's folder and logs
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs Weights and Biases: pip install wandb")
    name = os.path.splitext(os.path.basename(os.path.normpath(args.annotations)))[0]
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
    start = {"epoch": 0, "step": 0, "best": -1.0, "stale": 0}
    epoch, step, best, stale = (checkpoint.get(name, value) for name, value in start.items())
    sums = checkpoint.get("sums", {})
    writer = SummaryWriter(run_dir, purge_step=epoch + 1 if args.resume else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", epoch)
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        if on_cuda and checkpoint["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    norm_eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    splits = {} if args.val_annotations else {picture.path: picture.split for picture in pictures}

    def save(path: str, **more) -> None:
        state = {"args": vars(args), "classes": classes, "anchors": anchors, "norm_eps": norm_eps, "loaded": loaded}
        state |= {"splits": splits, "epoch": epoch, "best": best, "model": model.state_dict()}
        save_atomically(state | more, path)

    def save_last() -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        generators = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if on_cuda else None}
        save(last_path, optimizer=optimizer.state_dict(), rng=generators, step=step, stale=stale, sums=sums)

    def write(metrics: dict[str, float], found: dict[int, dict], split: str) -> None:
        for name, value in metrics.items():
            if not math.isnan(value):
                writer.add_scalar(f"{split}/{name}", value, epoch)
        for i in [i for i in indices[split] if i in found][:4]:
            image = torch.as_tensor(data[-1, i][0])
            picture = draw(image, found[i], classes, args.predict_threshold)
            writer.add_image(f"{split}/{pictures[i].path}", picture, epoch)

    def diverged(losses: dict) -> NoReturn:
        each = ", ".join(f"{name} {float(value):g}" for name, value in losses.items())
        fail(f"the loss is not finite in epoch {epoch + 1} ({each}): lower --learning-rate {args.learning_rate:g}")

    # Training
    last_line, saved_at, batches = 0.0, -60.0, order.batches()
    while epoch < args.epochs and not (args.patience and stale >= args.patience) and not signals:
        frozen.train()
        order.epoch, order.start = epoch, step
        begun = waited_from = time.perf_counter()
        waiting, first = 0.0, step
        for images, targets, chosen, bad in train_loader:
            waiting += time.perf_counter() - waited_from
            report(bad)
            done = epoch * batches + step
            rate = args.learning_rate * min(1.0, (done + 1) / min(args.warmup_iterations, batches))
            rate *= 0.1 ** sum(epoch >= round(share * args.epochs) for share in args.lr_drops)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if images:
                images, targets = to_device(images, targets, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp and on_cuda):
                    losses = model(images, targets)
                loss = torch.stack([value.float() for value in losses.values()]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for name, value in (losses | {"loss": loss}).items():
                    sums[name] = sums.get(name, 0.0) + value.detach()
                sums["batches"] = sums.get("batches", 0) + 1
            step += 1
            if signals:
                break
            waited_from = now = time.perf_counter()
            if now - last_line > (1 if sys.stdout.isatty() else 30):
                last_line = now
                means = {name: float(value) / sums["batches"] for name, value in sums.items() if name != "batches"}
                if not math.isfinite(means.get("loss", 0.0)):
                    diverged(losses)
                per_step = (now - begun) / (step - first)
                left = timedelta(seconds=int(per_step * (batches - step)))
                shares = f"{per_step:.2f} s/update, {waiting / (now - begun):.0%} of it waiting for data"
                line = f"epoch {epoch + 1}/{args.epochs} {step / batches:.1%}  loss {means.get('loss', 0.0):.4f}"
                say(f"{line}  {shares}  ETA of the epoch {left}", stay=False)
        sums = {name: float(value) for name, value in sums.items()}
        if step < batches:
            break
        seconds = time.perf_counter() - begun
        result = test("val")
        if result is None:
            break
        metrics, found = result
        if not sums:
            fail("none of the training images could be read")
        means = {name: value / sums["batches"] for name, value in sums.items() if name != "batches"}
        if not math.isfinite(means["loss"]):
            diverged(means)
        epoch, step, sums = epoch + 1, 0, {}
        score = 0.0 if math.isnan(metrics["AP@0.5"]) else metrics["AP@0.5"]
        stale = 0 if score > best else stale + 1
        for name, value in means.items():
            writer.add_scalar("train/loss" if name == "loss" else f"losses/{name.removeprefix('loss_')}", value, epoch)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], epoch)
        if batches > first:  # not so in a run that was stopped during this validation
            writer.add_scalar("charts/seconds_per_update", (seconds - waiting) / (batches - first), epoch)
            writer.add_scalar("charts/seconds_waiting_for_data", waiting / (batches - first), epoch)
        write(metrics, found, "val")
        say(f"epoch {epoch}: loss {means['loss']:.4f}; validation: {describe(metrics)}; {seconds:.0f} s, "
            f"{waiting:.1f} s of them waiting for data")  # fmt: skip
        if score > best:
            best = score
            save(best_path)
        if time.perf_counter() - saved_at > 60 or epoch == args.epochs or (args.patience and stale == args.patience):
            save_last()
            saved_at = time.perf_counter()

    if signals:
        save_last()
        writer.close()
        say(f"stopped in epoch {epoch + 1}; python {os.path.basename(__file__)} --resume {last_path} goes on")
        sys.exit(128 + signals[0])

    # The test images, once, with the weights of the best validation AP at IoU 0.5
    if indices["test"]:
        model.load_state_dict(load_checkpoint(best_path)["model"])
        result = test("test")
        if result is None:
            sys.exit(128 + signals[0])
        metrics, found = result
        write(metrics, found, "test")
        path = os.path.join(run_dir, "per_class.csv")
        with open(path + ".tmp", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "boxes", "AP", "AP@0.1", "AP@0.5"])
            for name in classes:
                boxes = sum(pictures[i].labels.count(name) for i in found)
                scores = (metrics[f"{metric}/{name}"] for metric in ("AP", "AP@0.1", "AP@0.5"))
                rows.writerow([name, boxes, *(f"{score:.4f}" for score in scores)])
        os.replace(path + ".tmp", path)
        say(f"test: {describe(metrics)} ({len(found):,} images; the best of {epoch} epochs)")
    writer.close()
    if unreadable:
        say(f"{len(unreadable):,} images could not be read and were left out")
    say(f"saved {best_path}")
