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
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "tyro>=0.9.2", "tensorboard>=2.21", "pillow>=10",
#                 "matplotlib>=3.8", "pycocotools>=2.0.8"]
# ///
import contextlib
import csv
import glob
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Literal, NoReturn
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.font_manager import findfont
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models, tv_tensors
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN, IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation, batched_nms, box_area, box_convert, box_iou, clip_boxes_to_image, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes


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

    # Data
    data_dir: str | None = None  # folder of the images; of train/, valid/ and test/ with _annotations.coco.json
    dataset: Literal["voc2007"] | None = None  # Pascal VOC 2007 in --data-dir (None: `data`)
    download: bool = False  # download --dataset first
    annotations: str | None = None  # COCO JSON, folder of VOC XML, or MINERVA's CSV, for training
    val_annotations: str | None = None  # the same for validation (None: a quarter of the training images)
    test_annotations: str | None = None  # the same for the test (None: another quarter, or none with --val-annotations)
    split_file: str | None = None  # split.csv of an earlier run to use again
    label_column: str = "instrument_name"  # column of a CSV with the classes; a code in brackets after them is cut off
    top_classes: int = 0  # learn the classes that are most frequent in training (0: all), as MINERVA's top-5
    single_class: bool = False  # all boxes are of one class, as in MINERVA's first version
    augmentation: Literal["none", "flip", "ssd"] = "flip"  # mirror images; `ssd`: and colours, zoom and crops

    # The detector
    arch: str = "fasterrcnn_resnet50_fpn_v2"  # of torchvision, or yolov3, fasterrcnn, fastrcnn, retinanet, fcos
    backbone: str | None = None  # classifier of torchvision (None: resnet50; under yolov3 its own, darknet53)
    strategy: Literal["fine-tune", "off-the-shelf", "scratch"] = "fine-tune"  # train all; only new layers; from random
    unfreeze_from: str | None = None  # fine-tune from this module on, such as `layer3`; of all before only what is new
    weights: str | None = None  # torchvision's name, a file (Darknet's too), `none` (None: COCO's or ImageNet's)
    pretrained: str | None = None  # run of this script, or of finetune_classify.py for the backbone, to start from
    image_size: int | None = None  # shorter side in pixels, or side of a square input (None: the detector's own)
    proposals: str | None = None  # fastrcnn: JSON {image: [[x1, y1, x2, y2], ...]} of boxes in pixels

    # Training
    epochs: int = 26  # passes over the training images
    batch_size: int = 4  # images per update
    optimizer: Literal["sgd", "adam"] = "sgd"  # SGD with momentum 0.9, or Adam
    learning_rate: float | None = None  # (None: Adam's 0.0001; SGD's of torchvision or Darknet, scaled to --batch-size)
    weight_decay: float = 1e-4  # of weights with two dimensions and more; never of biases and normalisation
    warmup_iterations: int = 500  # updates over which the learning rate rises to its value, at most the first epoch
    lr_drops: list[float] = field(default_factory=lambda: [0.67, 0.92])  # shares of --epochs: the rate falls tenfold
    patience: int = 0  # end after this many epochs without a better validation AP at IoU 0.5 (0: never)

    # After training
    evaluate: str | None = None  # run (folder or checkpoint) to test, on its test images or on other --annotations
    predict: str | None = None  # with --evaluate: folder of images whose boxes go beside the checkpoint
    predict_threshold: float = 0.3  # lowest score of the boxes that are drawn


FAMILIES = ("fasterrcnn", "fastrcnn", "retinanet", "fcos")  # that stand on any --backbone
TORCHVISION = [name for name in models.list_models(module=detection) if "mask" not in name and "keypoint" not in name]
ARCHITECTURES = (*FAMILIES, "yolov3", *TORCHVISION)
# SGD's learning rate per image of a batch (torchvision's: of 16, 16, 16, 192 and 32 images, Darknet's: 64), by how
# --arch begins; the first that fits counts, so ssdlite stands before ssd
PER_IMAGE = {"fast": 0.00125, "retinanet": 0.000625, "fcos": 0.000625, "ssdlite": 0.00078, "ssd": 0.0000625}
PER_IMAGE["yolov3"] = 0.000015625
LOWEST_SCORE, MOST_BOXES = 0.05, 100  # the same for all; torchvision's go from 0.001 to 0.2 and from 100 to 300
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
SPLITS = ("train", "val", "test")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # allowed to this process
HEAD = re.compile(r"box_predictor|classification_head\.(cls_logits|module_list)|outputs\.")  # is always new
STOPS = []  # signals to end the run, heeded between batches: the fork of workers would lose a KeyboardInterrupt


def fail(message: str) -> NoReturn:
    sys.exit(f"{os.path.basename(__file__)}: error: {message}")


def write_file(path: str, write) -> None:
    """Have `write` fill a file of a temporary name, which then replaces `path`; half a file is never left."""
    content, temporary = io.BytesIO(), f"{path}.{os.getpid()}.tmp"
    write(content)  # into memory first: on a full disk torch.save would not say so
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        fail(f"{path} cannot be written: {error}")


# Data -----------------------------------------------------------------------------------------------------------------
# Inside, an image is a dict of `file_name`, `boxes` and, if annotated, `width` and `height`. A box has a `category`, by
# name, and COCO's `bbox`: x, y, width, height in continuous pixels, the first being 0, 0, 1, 1. Those with `iscrowd`
# (VOC: difficult) are not learned, and are neither expected nor wrong; COCO's metric also forgives what is inside them.
def read_voc(paths: list[str]) -> list[dict]:
    """Images of XML files, whose pixels count from 1 and where both ends belong to the box."""
    images = []
    for path in paths:
        root, boxes = ElementTree.parse(path).getroot(), []
        for entry in root.iter("object"):
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            box = {"bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], "category": entry.findtext("name")}
            boxes.append(box | {"iscrowd": int(entry.findtext("difficult") == "1")})
        size = {side: root.findtext(f"size/{side}") for side in ("width", "height")}
        images.append({"file_name": root.findtext("filename"), "boxes": boxes} | size)
    return images


def read_annotations(path: str, label_column: str) -> list[dict]:
    """Images of a folder of XML, of COCO's JSON, or of a CSV with a row per box and columns named as in MINERVA."""
    boxes = defaultdict(list)
    try:
        if os.path.isdir(path):
            return read_voc([os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(".xml")])
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.endswith(".json"):
                data = json.load(file)
                names = {c["id"]: str(c["name"]) for c in data["categories"] if c["name"] is not None}
                for box in data["annotations"]:
                    boxes[box["image_id"]].append(box | {"category": names.get(box["category_id"])})
                if unknown := boxes.keys() - {image["id"] for image in data["images"]}:
                    print(f"left out: boxes of {len(unknown):,} images not in {path}, as of {min(map(str, unknown))}")
                return [i | {"file_name": i["file_name"], "boxes": boxes[i["id"]]} for i in data["images"]]
            for row in csv.DictReader(file):
                x1, y1, x2, y2 = map(float, row["bounding_box_coordinates"].split(","))
                category = re.sub(r"\s*\([^()]*\)\s*$", "", row[label_column]).strip()
                boxes[row["image_filename"]].append({"bbox": [x1, y1, x2 - x1, y2 - y1], "category": category})
        return [{"file_name": name, "boxes": found} for name, found in boxes.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error, ElementTree.ParseError) as error:
        fail(f"{path}: no annotations in a known format ({type(error).__name__}: {error})")


def find_annotations(args: Args) -> tuple[str, dict[str, list[dict]]]:
    """The folder of the images; the images of each split, with their paths in the folder."""
    folder, found = args.predict or args.data_dir or "data", {}
    files = {"train": args.annotations, "val": args.val_annotations, "test": args.test_annotations}
    if args.predict:
        paths = sorted(glob.glob("**", root_dir=folder, recursive=True))
        return folder, {"test": [{"file_name": path, "boxes": []} for path in paths if path.lower().endswith(IMAGES)]}
    if args.dataset:
        try:
            for split in files:
                found[split] = read_voc(datasets.VOCDetection(folder, "2007", split, args.download).annotations)
        except (OSError, RuntimeError) as error:
            fail(f"--dataset {args.dataset}: {error} ({folder})")
        return os.path.join(folder, "VOCdevkit", "VOC2007", "JPEGImages"), found
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):  # as Roboflow exports
        exported = os.path.join(folder, name, "_annotations.coco.json")
        path = files[split] or (exported if os.path.isfile(exported) and not any(files.values()) else None)
        if not path:
            continue
        images = read_annotations(path, args.label_column)
        # where the images are: the first of the annotations' folder, --data-dir and its subfolders that has any
        beside = os.path.relpath(path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path)), folder)
        below = sorted(glob.glob("*/", root_dir=folder), key=lambda name: (not name.startswith(split), name))
        each = [[os.path.normpath(os.path.join(p, str(i["file_name"]))) for i in images] for p in (beside, "", *below)]
        paths = max(each, key=lambda paths: any(os.path.isfile(os.path.join(folder, path)) for path in paths))
        found[split] = [image | {"file_name": path} for image, path in zip(images, paths)]
    if not found:
        fail(f"--data-dir {folder} has no train/_annotations.coco.json, and there are no --annotations")
    return folder, found


def is_box(bbox) -> bool:
    known = isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(number, (int, float)) for number in bbox)
    return known and math.isfinite(sum(bbox)) and min(bbox[2:]) > 1


def load_data(args: Args, classes: list[str]) -> tuple[str, COCO]:
    """The folder of the images, and COCO's index of them with the boxes of `classes` (none: the most frequent ones)."""
    images, boxes, wrong, coco = {}, [], [], COCO()
    folder, sources = find_annotations(args)
    for split, found in sources.items():
        for image in found:
            path, i = image["file_name"], len(images)
            if path in images or not os.path.isfile(os.path.join(folder, path)):
                wrong.append(f"{path}: there is no such image in {folder}, or it is annotated twice")
                continue
            size = "({:g}, {:g})".format(*(float(image.get(side) or 0) for side in ("width", "height")))
            images[path] = {"id": i, "file_name": path, "split": split, "size": size, "negative": not image["boxes"]}
            for box in image["boxes"]:
                if not box["category"] or not is_box(box.get("bbox")):
                    wrong.append(f"{path}: {box['category'] or 'unknown class'}, box {box.get('bbox')} (x, y, w, h)")
                    continue
                box |= {"image_id": i, "iscrowd": box.get("iscrowd") or 0, "area": math.prod(box["bbox"][2:])}
                boxes.append(box | ({"category": "object"} if args.single_class else {}))
    if wrong:
        print(*wrong[:20], f"{len(wrong):,} records with an error are left out", sep="\n")
    if args.split_file:
        try:
            with open(args.split_file, newline="", encoding="utf-8") as file:
                splits = {row["path"]: row["split"] for row in csv.DictReader(file)}
        except (OSError, LookupError) as error:
            fail(f"--split-file {args.split_file}: {error!r}")
        for path, image in images.items():
            image["split"] = splits.get(path, "")
        if lost := sum(not image["split"] for image in images.values()):
            print(f"{lost:,} images are not in --split-file {args.split_file} and are left out")
    elif "train" in sources and "val" not in sources:  # 50/25/25 by image, as MINERVA
        own = [image for image in images.values() if image["split"] == "train"]
        for n, i in enumerate(np.random.default_rng(args.seed).permutation(len(own))):
            own[i]["split"] = ("train", "val", "train", "train" if "test" in sources else "test")[n % 4]
    if not classes:
        train = {image["id"] for image in images.values() if image["split"] == "train"}
        counted = Counter(box["category"] for box in boxes if box["image_id"] in train)
        classes = sorted(sorted(counted, key=lambda name: (-counted[name], name))[: args.top_classes or None])
    # images none of whose boxes is kept go, too; negatives never had one
    kept = [box for box in boxes if box["category"] in classes]
    if other := Counter(box["category"] for box in boxes if box["category"] not in classes):
        print("boxes of other classes, left out:", ", ".join(f"{n:,} {name}" for name, n in other.most_common(20)))
    positive = {box["image_id"] for box in kept}
    for i, box in enumerate(kept, 1):
        box |= {"id": i, "category_id": 1 + classes.index(box["category"])}
    coco.dataset = {"info": {}, "images": [i for i in images.values() if i["negative"] or i["id"] in positive]}
    coco.dataset |= {"annotations": kept, "categories": [{"id": i, "name": n} for i, n in enumerate(classes, 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return folder, coco


def corners(boxes: list[dict]) -> torch.Tensor:
    """COCO's boxes as float `(n, 4)` of xmin, ymin, xmax, ymax."""
    return box_convert(torch.tensor([box["bbox"] for box in boxes]).reshape(-1, 4).float(), "xywh", "xyxy")


class Pictures(Dataset):
    """Item i is image i as uint8 `(3, H, W)`, its target and i; where it cannot be read None, the reason and i."""

    def __init__(self, folder: str, coco: COCO, args: Args):
        self.folder, self.coco, self.seed, self.unreadable, self.proposals = folder, coco, args.seed, set(), None
        self.epoch = None  # augmentation is a function of seed, epoch and image, whoever reads it; None: there is none
        if args.arch == "fastrcnn":
            try:
                with open(args.proposals, encoding="utf-8") as file:
                    self.proposals = json.load(file)
                known = [self.proposals.get(image["file_name"], []) for image in coco.imgs.values()]
                wrong = [box for boxes in known for box in boxes if not (box[0] <= box[2] and box[1] <= box[3])]
            except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
                fail(f"--proposals {args.proposals}: not {{path: [[xmin, ymin, xmax, ymax], ...]}} ({error!r})")
            if wrong or not any(known):
                wrong = f"a box ends before it begins: {wrong[0]}" if wrong else f"none is of an image in {folder}"
                fail(f"--proposals {args.proposals}: {wrong}")
            print(f"{known.count([]):,} of {len(known):,} images have no --proposals but the whole image")
        ssd = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=127), v2.RandomIoUCrop()]
        ssd = [*ssd, v2.SanitizeBoundingBoxes()] if args.augmentation == "ssd" else []
        self.augment = v2.Compose([*ssd, v2.RandomHorizontalFlip(0.5)])

    def __getitem__(self, i: int) -> tuple:
        name, boxes = self.coco.imgs[i]["file_name"], [box for box in self.coco.imgToAnns[i] if not box["iscrowd"]]
        target = {"boxes": corners(boxes)}  # float `(n, 4)` in pixels; `labels` are int64 `(n,)` from 1 on
        try:
            with Image.open(os.path.join(self.folder, name)) as file:
                if file.mode[0] in "IF":
                    raise ValueError(f"mode {file.mode}, while 8 bits a channel are expected")
                turned = ImageOps.exif_transpose(file)
                size = self.coco.imgs[i]["size"]
                if size not in ("(0, 0)", str(file.size), str(turned.size)):
                    raise ValueError(f"{file.size} pixels, annotated as {size}")
                annotated = file if size == str(file.size) != str(turned.size) else turned
                if annotated.mode in ("RGBA", "LA", "PA") or "transparency" in annotated.info:
                    white = Image.new("RGBA", annotated.size, "white")
                    annotated = Image.alpha_composite(white, annotated.convert("RGBA"))
                image = v2.functional.to_image(annotated.convert("RGB"))
            inside = clip_boxes_to_image(target["boxes"], image.shape[1:])
            if (box_area(inside) < 0.9 * box_area(target["boxes"])).any():  # a tenth is a matter of how one draws
                raise ValueError(f"a box is outside of its {image.shape[2]} x {image.shape[1]} pixels")
            target["boxes"] = inside
        except Exception as error:  # noqa: BLE001 (Pillow's plugins raise whatever their formats make them)
            return None, f"{type(error).__name__}: {error}", i
        if self.proposals is not None:  # and the whole image
            proposals = [box[:4] for box in self.proposals.get(name, [])]  # some tools have a score behind
            target["proposals"] = torch.tensor([*proposals, [0, 0, image.shape[2], image.shape[1]]])
        for key, corner in target.items():
            target[key] = tv_tensors.BoundingBoxes(corner.float(), format="XYXY", canvas_size=image.shape[1:])
        target["labels"] = torch.tensor([box["category_id"] for box in boxes], dtype=torch.int64)
        if self.epoch is not None:
            with torch.random.fork_rng(devices=[]):  # not torch.manual_seed, which seeds the GPU's generator as well
                torch.default_generator.manual_seed(((self.seed * 1_000_003 + self.epoch) * 1_000_003 + i) % 2**63)
                image, target = self.augment(image, target)
        return image, target, i


def read_batches(args: Args, data: Pictures, ids: list[int], device: torch.device, epoch: int | None = None):
    """Batches of images float `(3, H, W)` in [0, 1], targets and ids; for an `epoch` in random order and augmented."""
    data.epoch = epoch if args.augmentation != "none" else None
    if epoch is not None:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
        ids = [ids[i] for i in order.tolist()]
    workers = args.workers if args.workers is not None else CORES if device.type == "cuda" else min(CORES, 4)
    workers = min(workers, -(-len(ids) // args.batch_size))
    # a generator of its own: else every pass would draw from the one that dropout and the R-CNNs draw from
    loader = DataLoader(data, args.batch_size, sampler=ids, num_workers=workers, collate_fn=list,
                        pin_memory=device.type == "cuda", generator=torch.Generator())  # fmt: skip
    for items in loader:
        if STOPS:
            raise KeyboardInterrupt
        for _, reason, i in (item for item in items if item[0] is None and item[2] not in data.unreadable):
            print(f"left out: {data.coco.imgs[i]['file_name']!r} cannot be used, {reason}")
            data.unreadable.add(i)
        good = [item for item in items if item[0] is not None]
        images = [image.to(device, non_blocking=True).float() / 255 for image, _, _ in good]
        targets = [{key: v.to(device, non_blocking=True) for key, v in target.items()} for _, target, _ in good]
        yield images, targets, [i for _, _, i in good]


# YOLOv3 ---------------------------------------------------------------------------------------------------------------
# As in "YOLOv3: An Incremental Improvement" (Redmon and Farhadi, arXiv 1804.02767), and where the paper is silent as in
# its code, Darknet (pjreddie/darknet, whose files are named below). Three of a thing are in the order of the strides.
STRIDES = (8, 16, 32)
COCO_ANCHORS = [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]
# Convolution (inputs, outputs, kernel, stride), normalisation with eps and momentum of Darknet on GPUs, on which the
# published weights were trained (batchnorm_layer.c), leaky ReLU: `(B, inputs, H, W)` -> `(B, outputs, H/stride, ...)`
ConvBlock = partial(Conv2dNormActivation, norm_layer=partial(nn.BatchNorm2d, eps=1e-5, momentum=0.01),
                    activation_layer=partial(nn.LeakyReLU, 0.1))  # fmt: skip


class Darknet53(nn.Module):
    """Table 1 without classifier, 52 convolutions: float `(B, 3, H, W)` -> maps of 256, 512 and 1,024 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.stages = ConvBlock(3, 32, 3), nn.ModuleList()
        for channels, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
            half = channels // 2
            stage = [ConvBlock(half, channels, 3, stride=2)]
            stage += [nn.Sequential(ConvBlock(channels, half, 1), ConvBlock(half, channels, 3)) for _ in range(blocks)]
            self.stages.append(nn.ModuleList(stage))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = [self.stem(images)]
        for reduce, *blocks in self.stages:
            maps.append(reduce(maps[-1]))
            for block in blocks:
                maps[-1] = maps[-1] + block(maps[-1])
        return dict(zip("012", maps[-3:]))


class Neck(nn.Module):
    """Layers at a stride (section 2.3): features and, if `lateral`, the next coarser trunk -> trunk and last layer."""

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


def letterbox(image: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image float `(3, H, W)` within a grey `(3, size, size)` (image.c), and scale and shift of its boxes `(4,)`."""
    height, width = image.shape[-2:]
    h, w = (max(round(side * size / max(height, width)), 1) for side in (height, width))
    top, left = (size - h) // 2, (size - w) // 2
    scale, shift = image.new_tensor([w / width, h / height] * 2), image.new_tensor([left, top] * 2)
    image = F.interpolate(image[None], (h, w), mode="bilinear", antialias=True)[0]
    return F.pad(image, (left, size - w - left, top, size - h - top), value=0.5), scale, shift


class YOLOv3(nn.Module):
    """Called like torchvision's detectors; a `backbone` gives a dict of maps of so many `channels` at the strides."""

    def __init__(self, num_classes: int, size: int = 416, backbone: nn.Module | None = None, channels=(256, 512, 1024)):
        super().__init__()
        self.size, self.score_thresh, self.nms_thresh, self.detections_per_img = size, LOWEST_SCORE, 0.45, MOST_BOXES
        self.backbone = backbone or Darknet53()
        self.necks = nn.ModuleList(map(Neck, channels, (128, 256, 512), (True, True, False)))
        self.outputs = nn.ModuleList()
        for inputs in (256, 512, 1024):  # of 3 anchors t_x, t_y, t_w, t_h, objectness and the classes as logits
            output = nn.Conv2d(inputs, 3 * (4 + num_classes), 1)
            nn.init.normal_(output.weight, std=0.01)
            nn.init.zeros_(output.bias)
            # objects start out rare (Lin et al. 2017, section 3.3): thousands of empty places would wreck the backbone
            nn.init.constant_(output.bias.view(3, -1)[:, 4], math.log(0.01 / 0.99))
            self.outputs.append(output)
        # part of the state dict, for without its anchors (width, height) in pixels an output means nothing
        self.register_buffer("anchors", torch.tensor(COCO_ANCHORS, dtype=torch.float32))
        # An image's N predictions are in the order of anchors (three a stride), rows and columns
        strides = torch.tensor(STRIDES).repeat_interleave(3)
        sides = [torch.arange(size // stride) for stride in strides.tolist()]
        cells = torch.cat([torch.cartesian_prod(side, side).flip(1) for side in sides])
        self.register_buffer("strides", strides, persistent=False)  # of an anchor
        self.register_buffer("cells", cells, persistent=False)  # (column, row) of a prediction
        self.register_buffer("anchor_of", torch.arange(9).repeat_interleave((size // strides) ** 2), persistent=False)

    def forward(self, images: list[torch.Tensor], targets: list[dict] | None = None) -> dict | list[dict]:
        """Images float `(3, H, W)` in [0, 1] -> the losses, or `boxes`, `labels`, `scores` of each."""
        squares, scales, shifts = zip(*(letterbox(image, self.size) for image in images))
        raw = self.predict(torch.stack(squares))
        if not self.training:
            return [self.detect(*each) for each in zip(raw, scales, shifts, (image.shape[-2:] for image in images))]
        boxes, labels = [], []
        for image, target, scale, shift in zip(images, targets, scales, shifts):
            box = clip_boxes_to_image(target["boxes"], image.shape[-2:]) * scale + shift
            kept = (box[:, 2:] - box[:, :2] >= 0.001 * self.size).all(dim=1)  # as in data.c
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
        with torch.no_grad():  # Darknet: 0.7
            near = [(box_iou(box, truth) > 0.5).any(dim=1) for box, truth in zip(self.decode(raw), boxes)]
        image = torch.cat([torch.full_like(label, i) for i, label in enumerate(labels)])
        truth, label = torch.cat(boxes), torch.cat(labels) - 1
        centre, sides = (truth[:, :2] + truth[:, 2:]) / 2, truth[:, 2:] - truth[:, :2]
        anchor = box_iou(F.pad(sides, (2, 0)), F.pad(self.anchors, (2, 0))).argmax(dim=1)  # all with a corner at 0, 0
        stride = self.strides[anchor]
        cell = (centre / stride[:, None]).long()
        first = torch.searchsorted(self.anchor_of, anchor)  # prediction of an anchor
        number = image * raw.shape[1] + first + cell[:, 1] * (self.size // stride) + cell[:, 0]
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
        objects, counted = torch.zeros_like(raw[..., 0]), (~torch.stack(near)).to(raw.dtype)
        objects.view(-1)[number] = counted.view(-1)[number] = 1.0
        losses = {"loss_box": (error * weight).sum()}
        losses["loss_objectness"] = bce(raw[..., 4], objects, weight=counted, reduction="sum")
        losses["loss_classifier"] = bce(responsible[:, 5:], classes, reduction="sum")
        return {name: loss / len(raw) for name, loss in losses.items()}


@torch.no_grad()
def load_darknet(model: YOLOv3, path: str) -> list[str]:
    """Load Darknet's darknet53.conv.74 or yolov3.weights; names of the tensors that were in it."""

    def tensors(module: nn.Module) -> list[torch.Tensor]:
        units = [unit for unit in module.modules() if isinstance(unit, Conv2dNormActivation)]  # as in yolov3.cfg
        return [t for conv, bn, *_ in units for t in (bn.bias, bn.weight, bn.running_mean, bn.running_var, conv.weight)]

    values = torch.from_numpy(np.fromfile(path, dtype="<f4")[5:])  # after version and number of images seen (parser.c)
    order, parts = tensors(model.backbone), ("backbone.",)
    if len(values) > sum(tensor.numel() for tensor in order):
        parts = "backbone.", "necks."
        for neck, output in zip(reversed(model.necks), reversed(model.outputs)):
            coco = nn.Conv2d(output.in_channels, 255, 1)  # of COCO's classes, and forgotten
            order += [*tensors(neck), coco.bias, coco.weight]
    if len(values) != sum(tensor.numel() for tensor in order):
        fail(f"{path} has another length than Darknet's darknet53.conv.74 or yolov3.weights")
    for tensor, value in zip(order, values.split([tensor.numel() for tensor in order])):
        tensor.copy_(value.view_as(tensor))
    return [name for name in model.state_dict() if name.startswith(parts)]


# The detectors --------------------------------------------------------------------------------------------------------
class ExternalProposals(nn.Module):
    """Fast R-CNN (Girshick, 2015): in the place of the region proposal network, hands on the targets' `proposals`."""

    def forward(self, images, features, targets) -> tuple[list[torch.Tensor], dict]:
        boxes = [target["proposals"] for target in targets]  # the last is the whole image, before it was resized
        scales = [box.new_tensor([w, h] * 2) / box[-1, 2:].repeat(2) for box, (h, w) in zip(boxes, images.image_sizes)]
        return [box * scale for box, scale in zip(boxes, scales)], {}


def make_detector(args: Args, num_classes: int) -> nn.Module:
    """A detector with random weights for `num_classes` classes, the background (0) included."""
    size, arch = args.image_size, args.arch
    scale = {"min_size": size, "max_size": round(size * 1333 / 800)} if size else {}
    if size and (arch.startswith("ssd") or arch == "yolov3" and size % 32):
        fail(f"--image-size {size}: yolov3 takes multiples of 32, SSD and SSDlite only their own sizes")
    if args.backbone:
        net = models.get_model(args.backbone, weights=None).eval()
        net = net.features if isinstance(getattr(net, "features", None), nn.Sequential) else net
        x, at_stride = torch.zeros(1, 3, 64, 64), {}
        with torch.no_grad(), contextlib.suppress(RuntimeError, IndexError, AssertionError):  # at the classifier
            for name, child in net.named_children():
                x = child(x)
                at_stride[64 // x.shape[3]] = name, x.shape[1]  # the last one at a stride
        if not set(STRIDES) <= set(at_stride):
            fail(f"--backbone {args.backbone}: no maps at strides 8, 16 and 32; ResNets, MobileNets and VGGs have them")
        channels = [at_stride[stride][1] for stride in STRIDES]
        layers = {at_stride[stride][0]: str(i) for i, stride in enumerate(STRIDES)}
    if arch in FAMILIES:
        coarser = LastLevelMaxPool() if arch == "fastrcnn" else LastLevelP6P7(256, 256)
        pyramid = BackboneWithFPN(net, layers, channels, 256, coarser)
    if arch in TORCHVISION:
        model = models.get_model(arch, weights=None, weights_backbone=None, num_classes=num_classes, **scale)
    elif arch == "yolov3" and not args.backbone:
        model = YOLOv3(num_classes, size or 416)
    elif arch == "yolov3":
        normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # as for ImageNet
        body = OrderedDict(normalise=normalise, body=IntermediateLayerGetter(net, layers))
        model = YOLOv3(num_classes, size or 416, nn.Sequential(body), channels)
    elif arch == "fcos":
        model = detection.FCOS(pyramid, num_classes, **scale)
        # distances pass a ReLU: at 0 half begin without a gradient, and one step too large could silence all for good
        nn.init.ones_(model.head.regression_head.bbox_reg.bias)
    elif arch == "retinanet":
        # with the normalisation of torchvision's second version, without which small data teach it nearly nothing
        head = detection.retinanet.RetinaNetHead(256, 9, num_classes, norm_layer=partial(nn.GroupNorm, 32))
        octaves = tuple(tuple(round(4 * 2 ** (level + i / 3)) for i in range(3)) for level in range(3, 8))
        anchors = detection.anchor_utils.AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * 5)
        model = detection.RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head, **scale)
    else:
        # 128 regions an image and 256 hidden units, where torchvision has 512 and 1,024: a third of the time on a CPU
        head = detection.faster_rcnn.TwoMLPHead(256 * 7 * 7, 256)
        predictor = detection.faster_rcnn.FastRCNNPredictor(256, num_classes)
        scale |= {"box_batch_size_per_image": 128, "box_head": head, "box_predictor": predictor}
        model = detection.FasterRCNN(pyramid, **scale)
        model.rpn = ExternalProposals() if arch == "fastrcnn" else model.rpn
    chooser = getattr(model, "roi_heads", model)
    chooser.score_thresh, chooser.detections_per_img = LOWEST_SCORE, MOST_BOXES
    return model


def autocast_backbone(model: nn.Module, device_type: str) -> None:
    """Have the backbone train in bfloat16 and give float32: as bfloat16, anchors and boxes would be pixels away."""
    forward = model.backbone.forward

    def forward_in_bfloat16(images: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(device_type, torch.bfloat16, enabled=model.training):
            maps = forward(images)
        return {name: values.float() for name, values in maps.items()}

    model.backbone.forward = forward_in_bfloat16


def read_checkpoint(path: str) -> dict:
    """What is in a file, or in that of a run's folder, and its `path`; `model` is the state dict, also of bare ones."""
    if os.path.isdir(path):
        path = next((os.path.join(path, name) for name in os.listdir(path) if name.endswith(".pt")), path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        return {"model": data} | (data if "model" in data else {}) | {"path": os.path.abspath(path)}
    except Exception as error:  # noqa: BLE001 (torch's own text advises to run whatever code the file has)
        fail(f"{path} cannot be loaded: {str(error).splitlines()[0].split('. ')[0]}")


def load_weights(args: Args, model: nn.Module) -> list[str]:
    """Copy what --weights or --pretrained names into all but the head; names of the copied tensors."""
    source = str(args.pretrained or args.weights)
    if source == "none":
        return []
    if args.arch == "yolov3" and os.path.isfile(source) and not source.endswith((".pth", ".pt")):
        return load_darknet(model, source)
    if args.pretrained or os.path.isfile(source):
        state = read_checkpoint(source)["model"]
    else:
        bare = args.arch == "yolov3" and not args.backbone
        entries = {} if bare else models.get_model_weights(args.backbone or args.arch).__members__
        if source not in entries:
            fail(f"--weights {source}: no file (Darknet's yolov3.weights) nor {', '.join([*entries, 'none'])}")
        try:
            state = models.get_model(args.backbone or args.arch, weights=source, progress=False).state_dict()
        except OSError as error:
            fail(f"--weights {source} cannot be downloaded: {error}")
    state = {name.removeprefix("trunk."): value for name, value in state.items()}  # of finetune_classify.py
    if not any(name.startswith(("backbone.", "head.")) for name in state):
        state = {f"backbone.body.{name.removeprefix('features.')}": value for name, value in state.items()
                 if not name.startswith(("fc.", "classifier.", "heads."))}  # fmt: skip
    state = {name: value for name, value in state.items() if not HEAD.search(name)}
    try:
        missing, wrong = model.load_state_dict(state, strict=False)  # torchvision renames what older files have
    except RuntimeError as error:  # of shapes, a line each
        missing, wrong = [], str(error).splitlines()[1:]
    if wrong or not state:
        fail(f"{source} is of another architecture: {len(wrong)} of {len(state)} tensors do not fit, as {wrong[:1]}")
    # `missing` never has num_batches_tracked (torch fills it in): ask for the weight of the same layer
    return [name for name in model.state_dict() if name.replace("num_batches_tracked", "weight") not in missing]


def freeze(model: nn.Module, loaded: list[str], args: Args) -> list[nn.Module]:
    """Take gradients from what --strategy and --unfreeze-from keep; the modules that are frozen as a whole."""
    names = [name for name, _ in model.named_parameters()]
    frozen = set(loaded) if args.strategy == "off-the-shelf" else set()
    if args.unfreeze_from:
        later = [i for i, name in enumerate(names) if f".{args.unfreeze_from}." in f".{name}"]
        if not later:
            fail(f"--unfreeze-from {args.unfreeze_from}: no module has that name; there are {', '.join(names[::9])}")
        frozen |= set(names[: later[0]]) & set(loaded)  # what is new is always trained
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, nn.BatchNorm2d):
            # Batches of a few images have no statistics worth having: torchvision freezes a trained backbone's too
            if weight in frozen or (name.startswith("backbone.") and weight in loaded):
                frozen |= {weight, f"{name}.bias"}
            elif weight not in loaded:
                module.momentum = 0.1  # MobileNets' and Darknet's would average over more batches than there may be
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    # not the proposals' network (RPN): in evaluation mode it would propose fewer regions
    parts = [module for module in model.modules() if not isinstance(module, detection.rpn.RegionProposalNetwork)]
    return [part for part in parts if {parameter.requires_grad for parameter in part.parameters()} == {False}]


# Evaluation -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def detect(args: Args, model: nn.Module, data: Pictures, ids: list[int], device: torch.device) -> tuple[list, list]:
    """Boxes as COCO's results, and the ids of all images that can be read."""
    results, seen = [], []
    model.eval()
    for images, targets, read in read_batches(args, data, ids, device):
        seen += read
        for i, found in zip(read, model(images, targets) if images else []):
            boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
            for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist()):
                if label > 0:  # FCOS and RetinaNet have a sigmoid for the background, too
                    words = {"file_name": data.coco.imgs[i]["file_name"], "category": data.coco.cats[label]["name"]}
                    results.append({"image_id": i, "category_id": label, "bbox": box, "score": score} | words)
    return results, seen


def paper_ap(coco: COCO, results: COCO, ids: list[int], category: int, iou: float) -> float:
    """AP of a class as in the paper: the area under the interpolated precision-recall curve (VOC 2010 on), or NaN."""
    judged, total = [], 0
    for i in ids:
        objects, taken = [box for box in coco.imgToAnns[i] if box["category_id"] == category], set()
        boxes = [box for box in results.imgToAnns[i] if box["category_id"] == category]
        total += sum(not box["iscrowd"] for box in objects)
        if not boxes:
            continue
        found, values = corners(boxes), torch.tensor([box["score"] for box in boxes])
        kept = nms(found, values, 0.45)
        # a box is of the object that it overlaps most, and right if it does so by `iou` and as the first one
        for overlaps, value in zip(box_iou(found[kept], corners(objects)), values[kept].tolist()):
            best = int(overlaps.argmax()) if objects else -1
            hit = best >= 0 and bool(overlaps[best] >= iou)
            if hit and objects[best]["iscrowd"]:
                continue
            judged.append((value, hit and best not in taken))
            if hit:
                taken.add(best)
    hits = np.array([right for _, right in sorted(judged, key=lambda pair: -pair[0])], dtype=np.float64)
    recall = np.cumsum(hits) / max(total, 1)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope)) if total else math.nan


def measure(coco: COCO, results: list[dict], ids: list[int]) -> dict[str, float]:
    """COCO's AP (IoU 0.5 to 0.95), AP50 and AP75, and the paper's AP@0.1 and AP@0.5; each also by class."""
    metrics = {}
    with contextlib.redirect_stdout(io.StringIO()):
        index = coco.loadRes(results) if results else COCO()
        evaluation = COCOeval(coco, index, "bbox")
        evaluation.params.imgIds = ids or [-1]  # COCO takes none for all
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # by IoU, recall and class; -1: nothing to be found
    by_class = {"AP": precision.mean((0, 1)), "AP50": precision[0].mean(0), "AP75": precision[5].mean(0)}
    by_class |= {f"AP@{iou}": [paper_ap(coco, index, ids, i, iou) for i in coco.cats] for iou in (0.1, 0.5)}
    for metric, values in by_class.items():
        values = [float(value) if value > -1 else math.nan for value in values]
        metrics[metric] = torch.tensor(values, dtype=torch.float64).nanmean().item()
        metrics |= {f"{metric}/{c['name']}": value for c, value in zip(coco.cats.values(), values)}
    return metrics


def describe(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name)


def draw_detections(data: Pictures, results: list[dict], ids: list[int], threshold: float, folder: str) -> None:
    """Write the images `ids` with their boxes of `threshold` and more, and these boxes' classes and scores, as PNGs."""
    drawn = [box for box in results if box["score"] >= threshold]
    for i in ids:
        image, found = data[i][0], [box for box in drawn if box["image_id"] == i]
        words = [f"{box['category']} {box['score']:.2f}" for box in found]
        if found:
            colors = [f"hsl({47 * box['category_id'] % 360}, 100%, 70%)" for box in found]  # torchvision's has black
            image = draw_bounding_boxes(image, corners(found), words, colors, width=max(image.shape) // 300 + 1,
                                        font=findfont("DejaVu Sans"), font_size=max(image.shape) // 60 + 8,
                                        fill_labels=True)  # fmt: skip
        name = os.path.splitext(os.path.basename(data.coco.imgs[i]["file_name"]))[0]
        picture = v2.functional.to_pil_image(image)
        write_file(f"{folder}/{i}_{name}.png", partial(picture.save, format="PNG"))


if __name__ == "__main__":
    # TRY NOT TO MODIFY: flags, with those of the run that --resume and --evaluate name unless given anew
    about = "Fine-tune object detectors. A first run: python finetune_detect.py --dataset voc2007 --download"
    args, checkpoint = tyro.cli(Args, description=about), {}
    if args.evaluate or args.resume:
        checkpoint = read_checkpoint(args.evaluate or args.resume)
        base = os.path.dirname(checkpoint["path"])
        if not {"classes", "loaded", "last"} <= set(checkpoint):
            fail(f"{checkpoint['path']} is no checkpoint of this script")
        own = set(vars(args)) - {"exp_name", "logdir", "resume", "evaluate", "predict", "download"}
        saved = {name: value for name, value in checkpoint["args"].items() if name in own}
        saved["exp_name"] = os.path.basename(checkpoint["path"]).removesuffix(".pt")
        saved |= {"split_file": f"{base}/split.csv"} if os.path.isfile(f"{base}/split.csv") else {}
        args = tyro.cli(Args, default=Args(**saved))
        new = {name: value for name, value in vars(args).items() if value != saved.get(name)}
        for name in ("arch", "backbone", "strategy", "unfreeze_from", "optimizer", "pretrained"):
            if name in new and (args.resume or name in ("arch", "backbone")):
                fail(f"--{name.replace('_', '-')} {new[name]}: the run has {saved[name]}")
        root = args.data_dir or "data"
        exported = glob.glob("*/_annotations.coco.json", root_dir=root) if "data_dir" in new else []
        exported = [os.path.join(root, path) for path in exported]
        if exported and os.path.isfile(saved.get("split_file") or ""):
            with open(saved["split_file"], newline="", encoding="utf-8") as file:
                paths = [os.path.join(root, row["path"]) for row in csv.DictReader(file)]
            exported = [] if all(map(os.path.isfile, paths)) else exported  # the run's own images, moved
        others = [new.get(name) for name in ("test_annotations", "val_annotations", "annotations")]
        others = next(filter(None, others), exported[0] if len(exported) == 1 else None)
        if args.predict or args.evaluate and (others or exported or "dataset" in new):  # other images than the run's
            args.annotations, args.val_annotations, args.test_annotations = None, None, others
            args.dataset, args.split_file = new.get("dataset"), new.get("split_file")
    for name, value in vars(args).items():
        least = int(name in ("epochs", "batch_size", "image_size"))
        if type(value) in (int, float) and not least <= value < 2**31:
            fail(f"--{name.replace('_', '-')} must be at least {least} and less than 2**31, not {value}")
    if args.arch not in ARCHITECTURES:
        fail(f"--arch {args.arch}: there are {', '.join(ARCHITECTURES)}")
    if args.arch == "fastrcnn" and (not os.path.isfile(args.proposals or "") or args.augmentation == "ssd"):
        fail("--arch fastrcnn needs a file of --proposals, which --augmentation ssd would not crop")
    if args.backbone and args.arch in TORCHVISION:
        fail(f"--backbone is for --arch yolov3, {', '.join(FAMILIES)}; {args.arch} has its own")
    if os.path.basename(args.exp_name) != args.exp_name:
        fail(f"--exp-name {args.exp_name} is not the name of a file")
    if args.predict and not args.evaluate:
        fail("--predict needs a trained detector: --evaluate RUN")
    if args.strategy != "fine-tune" and args.unfreeze_from or args.strategy == "scratch" and args.pretrained:
        fail("--unfreeze-from is for --strategy fine-tune, and --pretrained for all but scratch")
    args.backbone = args.backbone or ("resnet50" if args.arch in FAMILIES else None)
    if args.backbone and args.backbone not in models.list_models(module=models):
        fail(f"--backbone {args.backbone}: torchvision has no such classifier")
    args.weights = "none" if args.strategy == "scratch" else args.weights
    if args.backbone == "googlenet" and args.weights != "none" and not checkpoint:
        fail("--backbone googlenet: its weights want images scaled in their own way; --weights none has none")
    if not args.weights and (args.backbone or args.arch in TORCHVISION):
        args.weights = next(iter(models.get_model_weights(args.backbone or args.arch))).name
    per_image = next(rate for name, rate in PER_IMAGE.items() if args.arch.startswith(name))
    usual_rate = 1e-4 if args.optimizer == "adam" else per_image * args.batch_size
    learning_rate = usual_rate if args.learning_rate is None else args.learning_rate
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")
    # the new layers of a chain must not be those that its source, often of the same seed, began with
    source = read_checkpoint(args.pretrained) if args.pretrained and not checkpoint else {}
    transfers = source.get("transfers", 0) + 1 if source else checkpoint.get("transfers", 0)
    torch.manual_seed(args.seed + 1_000_003 * transfers)

    # Data
    folder, coco = load_data(args, checkpoint.get("classes", []))
    classes = [category["name"] for category in coco.dataset["categories"]]
    ids = {split: [i for i, image in coco.imgs.items() if image["split"] == split] for split in SPLITS}
    sizes = ", ".join(f"{len(ids[split]):,} {split}" for split in SPLITS)
    print(f"{folder}: {sizes} images; {len(coco.anns):,} boxes of {len(classes):,} classes: {', '.join(classes)}")
    data = Pictures(folder, coco, args)
    theirs = os.path.join(os.path.dirname(source.get("path", "")), "split.csv")
    both = source.get("args", {}), vars(args)
    same = len({(run.get("dataset"), os.path.realpath(run.get("data_dir") or "data")) for run in both}) == 1
    if source and same and os.path.isfile(theirs):
        with open(theirs, newline="", encoding="utf-8") as file:
            seen = {row["path"] for row in csv.DictReader(file) if row["split"] in ("train", "val")}
        if seen := seen & {coco.imgs[i]["file_name"] for i in ids["test"]}:
            fail(f"--pretrained has seen {len(seen):,} of the test images in training: give --split-file {theirs}")
    del source, both  # with its tensors

    # The detector
    model = make_detector(args, 1 + len(classes))
    if checkpoint:
        model.load_state_dict(checkpoint["model" if args.evaluate else "last"])
    loaded = checkpoint["loaded"] if checkpoint else load_weights(args, model)
    model = model.to(device, memory_format=torch.channels_last)
    if args.evaluate:
        split = "test" if ids["test"] else "val"
        if not ids[split]:
            fail("there are no images to test on")
        results, seen = detect(args, model, data, ids[split], device)
        if args.predict:
            draw_detections(data, results, seen, args.predict_threshold, f"{base}/pictures")
            write_file(f"{base}/predictions.json", lambda file: file.write(json.dumps(results).encode()))
            print(f"saved {len(results):,} boxes in {len(seen):,} images to {base}: predictions.json and pictures")
        else:
            print(f"{checkpoint['path']} on {len(seen):,} {split} images: {describe(measure(coco, results, seen))}")
        sys.exit()
    if not ids["train"] or not any(coco.imgToAnns[i] for i in ids["val"]):
        fail("there are no images for training, or no boxes in those for validation")
    if not loaded and (args.strategy == "off-the-shelf" or args.unfreeze_from):
        fail("there are no weights to keep: --weights or --pretrained")
    in_evaluation = freeze(model, loaded, args)  # their statistics stay, and nothing is dropped in them
    if args.amp and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        autocast_backbone(model, device.type)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.Adam(groups) if args.optimizer == "adam" else torch.optim.SGD(groups, momentum=0.9)
    trainable = sum(p.numel() for p in trained)
    total = sum(p.numel() for p in model.parameters())
    frozen = f"{sum(isinstance(module, nn.BatchNorm2d) for module in in_evaluation):,} batch normalisations frozen"
    print(f"{args.arch}, {args.strategy}: {trainable:,} of {total:,} parameters are trained, {frozen}, on {device}")

    # TRY NOT TO MODIFY: the run's folder and logs
    name = os.path.basename(os.path.abspath(args.dataset or args.annotations or folder)).removesuffix(".json")
    run_dir = os.path.join(args.logdir, f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}")
    while os.path.exists(run_dir):
        run_dir += "-2"  # two runs that start in the same second
    run_dir, path = (base, checkpoint["path"]) if args.resume else (run_dir, f"{run_dir}/{args.exp_name}.pt")
    if args.resume:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    if args.track:
        import wandb

        wandb.init(name=os.path.basename(run_dir), config=vars(args), sync_tensorboard=True, save_code=True)
    epoch, best, stale = checkpoint.get("epoch", 0), checkpoint.get("best", -1.0), checkpoint.get("stale", 0)
    best_weights = checkpoint.get("model", model.state_dict())
    if args.split_file != f"{run_dir}/split.csv":
        rows = io.StringIO()
        csv.writer(rows).writerows([["path", "split"], *([i["file_name"], i["split"]] for i in coco.imgs.values())])
        write_file(f"{run_dir}/split.csv", lambda file: file.write(rows.getvalue().encode()))
    writer = SummaryWriter(run_dir, purge_step=epoch + 1 if args.resume else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", epoch)

    def save() -> None:
        writer.flush()  # first: a kill right after the checkpoint must not cost the points before it
        state = {"args": vars(args), "classes": classes, "loaded": loaded, "transfers": transfers, "epoch": epoch,
                 "best": best, "stale": stale, "model": best_weights, "last": model.state_dict(),
                 "optimizer": optimizer.state_dict()}  # fmt: skip
        write_file(path, lambda file: torch.save(state, file))

    def test(split: str) -> dict[str, float]:
        results, seen = detect(args, model, data, ids[split], device)
        metrics = measure(coco, results, seen)
        for name, value in metrics.items():
            writer.add_scalar(f"{split}/{name}", value, epoch)
        draw_detections(data, results, seen[:8], args.predict_threshold, f"{run_dir}/detections/{split}")
        return metrics

    # Training
    least_images = 2 if args.arch.startswith("ssdlite") else 1  # its last normalisation sees one pixel of each image
    updates, started, done, shown = math.ceil(len(ids["train"]) / args.batch_size), time.perf_counter(), 0, -math.inf
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: STOPS.append(number))
    try:
        save()
        while epoch < args.epochs and not 0 < args.patience <= stale:
            shutil.rmtree(f"{run_dir}/detections/test", ignore_errors=True)  # of fewer epochs
            model.train()
            for module in in_evaluation:
                module.eval()
            torch.manual_seed(args.seed * 1_000_003 + epoch)  # for dropout and the regions that R-CNNs draw
            drops = sum(epoch >= round(share * args.epochs) for share in args.lr_drops)
            begun, sums, count = time.perf_counter(), Counter(), 0
            for step, (images, targets, _) in enumerate(read_batches(args, data, ids["train"], device, epoch), 1):
                warmed = (epoch * updates + step) / max(min(args.warmup_iterations, updates), 1)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * min(1.0, warmed) * 0.1**drops
                if len(images) >= least_images:
                    losses = model(images, targets)
                    losses["loss"] = torch.stack(list(losses.values())).sum()
                    optimizer.zero_grad()
                    losses["loss"].backward()
                    optimizer.step()
                    sums.update({name: value.detach() for name, value in losses.items()})
                    count += 1
                now, done = time.perf_counter(), done + 1
                if now - shown > 30 and count:
                    if not torch.isfinite(sums["loss"]):
                        break
                    shown, left = now, round((now - started) / done * ((args.epochs - epoch) * updates - step))
                    print(f"epoch {epoch + 1}/{args.epochs} {step / updates:.1%}  loss {sums['loss'] / count:.4f}  "
                          f"{(now - begun) / step:.2f} s/update  ETA {timedelta(0, left)}", flush=True)  # fmt: skip
            means = {name: float(value) / count for name, value in sums.items()}
            if not math.isfinite(means.get("loss", math.nan)):
                fail(f"the loss is not finite in epoch {epoch + 1}: {means or 'there was no update'}")
            points = {f"losses/{name.removeprefix('loss_')}": value for name, value in means.items() if name != "loss"}
            points |= {"train/loss": means["loss"], "charts/learning_rate": optimizer.param_groups[0]["lr"]}
            points |= {"charts/seconds_per_update": (time.perf_counter() - begun) / updates}
            epoch += 1
            for tag, value in points.items():
                writer.add_scalar(tag, value, epoch)
            metrics = test("val")
            print(f"epoch {epoch}: loss {means['loss']:.4f}; validation: {describe(metrics)}", flush=True)
            stale += 1
            if metrics["AP@0.5"] > best:
                best, stale = metrics["AP@0.5"], 0
                best_weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
            save()

        # The test images, once (also if a finished run is resumed), with the weights of the best validation AP@0.5
        if ids["test"] and not (epoch == checkpoint.get("epoch") and os.path.isdir(f"{run_dir}/detections/test")):
            model.load_state_dict(best_weights)
            print(f"test: {describe(test('test'))} (the best of {epoch} epochs)")
        writer.close()
        print(f"saved {path}; {len(data.unreadable):,} images could not be used and were left out")
    except (KeyboardInterrupt, RuntimeError):
        if not STOPS:  # a signal to the group may end a worker first
            raise
        print(f"\nstopped; python {sys.argv[0]} --resume {run_dir} goes on after the last epoch", file=sys.stderr)
        sys.exit(130)
