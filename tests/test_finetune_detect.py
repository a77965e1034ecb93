"""Detection: annotations and their defects, detectors, metrics, and whole runs on pictures made here."""

import json
import math
import os
import re
import resource
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import needs_cuda, only_run, refused, run, run_on_cuda, scalars, start
from PIL import Image
from torch import nn
from torchvision import models

import finetune_detect as fd

SMALL = ["--arch", "fastrcnn", "--backbone", "mobilenet_v3_small", "--image-size", 64, "--workers", 0]
SMALL += ["--weights", "none", "--batch-size", 4, "--learning-rate", 0.01]
TIMES = ("charts/seconds_per_update",)
script = partial(run, "finetune_detect.py")


def canvas(rng, n, side=96):
    """An image with n bright squares and discs on dark noise, that do not overlap; their boxes (xyxy) and names."""
    image, boxes, names = rng.integers(0, 60, size=(side, side, 3)), [], []
    places = [(x, y) for x in (2, side // 2 + 2) for y in (2, side // 2 + 2)]
    for k in rng.permutation(4)[:n]:
        w = int(rng.integers(24, 40))
        x, y = (int(c + rng.integers(0, 44 - w)) for c in places[k])
        kind = ("square", "disc")[rng.integers(2)]
        yy, xx = np.mgrid[:w, :w] - (w - 1) / 2
        mask = np.ones((w, w), bool) if kind == "square" else xx**2 + yy**2 < (w / 2) ** 2
        image[y : y + w, x : x + w][mask] = (230, 60, 60) if kind == "square" else (60, 230, 60)
        boxes.append([x, y, x + w, y + w])
        names.append(kind)
    return Image.fromarray(image.astype(np.uint8)), boxes, names


def write_coco(path, pictures, names=("disc", "square"), ids=(18, 7)):
    """COCO JSON of [(file name, boxes, names)]; a name that is not in `names` gets an id without a category."""
    data = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in zip(ids, names)]}
    for k, (name, boxes, labels) in enumerate(pictures):
        data["images"].append({"id": 100 + k, "file_name": name})
        for (x1, y1, x2, y2), label in zip(boxes, labels):
            category = ids[names.index(label)] if label in names else 999
            box = {"image_id": 100 + k, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            data["annotations"].append(box | {"id": len(data["annotations"])})
    path.write_text(json.dumps(data))
    return str(path)


def write_voc(path, image, rows):
    """VOC XML of [(box, name)]; all but the first object are difficult."""
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = ""
    for k, ((x1, y1, x2, y2), name) in enumerate(rows):
        places = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2))
        box = "".join(f"<{side}>{value:g}</{side}>" for side, value in places)
        objects += f"<object><name>{name}</name><difficult>{int(k > 0)}</difficult><bndbox>{box}</bndbox></object>"
    path.write_text(f"<annotation><filename>{image}</filename>{objects}</annotation>")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder with images/, train, val and test JSON of 32, 8 and 8 images of squares and discs, and proposals."""
    root, rng, proposals = tmp_path_factory.mktemp("detect"), np.random.default_rng(0), {}
    (root / "images").mkdir()
    for split, n in (("train", 32), ("val", 8), ("test", 8)):
        pictures = []
        for i in range(n):
            name = f"{split}_{i:02d}.png"
            image, boxes, names = canvas(rng, 0 if i == 3 else int(rng.integers(1, 4)))
            image.save(root / "images" / name)
            pictures.append((name, boxes, names))
            proposals[name] = [[x1 - 1, y1 + 1, x2 + 1, y2] for x1, y1, x2, y2 in boxes] + [[3, 3, 40, 40, 0.9]]
        write_coco(root / f"{split}.json", pictures)
    (root / "proposals.json").write_text(json.dumps(proposals))
    return root


def flags(shapes, *more, **files):
    """Flags of a run on all images, or on `files`, which name the splits' annotations."""
    names = {"train": "--annotations", "val": "--val-annotations", "test": "--test-annotations"}
    words = [*SMALL, "--data-dir", shapes / "images", "--proposals", shapes / "proposals.json"]
    for split, name in (files or {name: name for name in names}).items():
        words += [names[split], shapes / f"{name}.json"]
    return [*words, *more]


def load(tmp_path, classes=(), **options):
    """The images as {file name: (split, boxes, names, crowds)} and the names of the classes."""
    _, coco = fd.load_data(fd.Args(data_dir=str(tmp_path), **options), list(classes))
    found = {}
    for i, image in coco.imgs.items():
        boxes = coco.imgToAnns[i]
        names = [coco.cats[box["category_id"]]["name"] for box in boxes]
        found[image["file_name"]] = image["split"], fd.corners(boxes).tolist(), names, [b["iscrowd"] for b in boxes]
    return found, [category["name"] for category in coco.cats.values()]


# --------------------------------------------------------------------------------------------------------------- data
def test_all_formats_say_the_same(tmp_path):
    """The same two boxes in three formats; pixels of VOC count from 1 with both ends in the box."""
    boxes, names = [[10, 20, 30, 50], [0, 0, 100, 80]], ["Harp", "lute"]
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg")
    write_voc(tmp_path / "Annotations/a.xml", "a.jpg", zip(boxes, names))
    table = ",image_filename,id,bounding_box_coordinates,instrument_name,area_of_bounding_box,lev1\n"
    table += '0,a.jpg,5,"10,20,30,50",Harp (3285),600,Strings\n1,a.jpg,6,"0,0,100,80",lute,8000,Strings\n'
    (tmp_path / "dev.txt").write_text(table)
    write_coco(tmp_path / "a.json", [("a.jpg", boxes, names)], ("Harp", "lute"), (90, 3))
    for name in ("Annotations", "dev.txt", "a.json"):
        found, classes = load(tmp_path, annotations=str(tmp_path / name))
        difficult = [0, int(name == "Annotations")]
        assert found == {"a.jpg": ("train", boxes, names, difficult)} and classes == ["Harp", "lute"], name
    found, _ = load(tmp_path, annotations=str(tmp_path / "dev.txt"), label_column="lev1")
    assert found["a.jpg"][2] == ["Strings", "Strings"]
    found, classes = load(tmp_path, annotations=str(tmp_path / "a.json"), single_class=True)
    assert found["a.jpg"][2] == ["object", "object"] and classes == ["object"]


def test_records_with_an_error_are_left_out_and_named(tmp_path, capsys):
    """A missing picture, one that stands in two splits, thin boxes and unknown classes; negatives are no error."""
    for name in ("a.png", "negative.png", "thin.png"):
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    boxes, names = [[1, 1, 20, 20], [5, 5, 5.5, 20], [1, 1, 9, 9]], ["disc", "disc", "moon"]
    pictures = [("a.png", boxes, names), ("b.png", [], []), ("negative.png", [], []), (None, [], [])]
    pictures.append(("thin.png", boxes[1:2], names[1:2]))  # its object is not background
    train = write_coco(tmp_path / "a.json", pictures)
    val = write_coco(tmp_path / "b.json", [("a.png", boxes[:1], names[:1])])
    data = json.loads((tmp_path / "a.json").read_text())
    data["annotations"].append(data["annotations"][0] | {"image_id": "0"})  # a string, where images have numbers
    (tmp_path / "a.json").write_text(json.dumps(data))
    found, _ = load(tmp_path, annotations=train, val_annotations=val)
    assert found == {"a.png": ("train", boxes[:1], names[:1], [0]), "negative.png": ("train", [], [], [])}
    out, gone = capsys.readouterr().out, f"there is no such image in {tmp_path}, or it is annotated twice"
    for line in (f"boxes of 1 images not in {train}, as of 0", "a.png: disc, box [5, 5, 0.5, 15]", "6 records",
                 "a.png: unknown class", f"None: {gone}", f"a.png: {gone}", f"b.png: {gone}"):  # fmt: skip
        assert line in out
    unusable = [[math.nan, 1, 9, 9], ["1", 1, 9, 9], [1, 9, 9], [1, 1, 1, 9], None]
    assert fd.is_box([1, 1, 9, 9]) and not any(map(fd.is_box, unusable))
    (tmp_path / "split.csv").write_text("path,split\nnegative.png,train\n")
    found, _ = load(tmp_path, ["sun"], annotations=train, split_file=str(tmp_path / "split.csv"))
    assert list(found) == ["negative.png"]  # an image with boxes of other classes only goes, and both are said
    out = capsys.readouterr().out
    assert "boxes of other classes, left out: 1 disc\n" in out and "2 images are not in --split-file" in out


def test_pictures_that_cannot_be_used_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    """Broken ones, enormous ones, and ones with boxes outside, as of photographs that are turned by their EXIF tag."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000)  # Pillow refuses twice as many before it decodes them
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "good.jpg")
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGB", (600, 400)).save(tmp_path / "huge.png")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-200])
    names = ("good.jpg", "turned.jpg", "huge.png", "broken.jpg")
    path = write_coco(tmp_path / "a.json", [(name, [[1, 1, 58, 39]], ["disc"]) for name in names])
    args = fd.Args(data_dir=str(tmp_path), annotations=path, batch_size=3, workers=0)
    text = (tmp_path / "a.json").read_text()  # sizes as pandas writes them
    (tmp_path / "a.json").write_text(text.replace('"file_name"', '"width": 60.0, "height": 40.0, "file_name"', 1))
    data = fd.Pictures(*fd.load_data(args, []), args)
    assert data.coco.imgs[0]["size"] == "(60, 40)"
    for _ in range(2):
        batches = list(fd.read_batches(args, data, [0, 1, 2, 3], torch.device("cpu"), epoch=0))
        assert [i for _, _, read in batches for i in read] == [0]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 3 == len(data.unreadable)
    for words in ("turned.jpg' cannot be used, ValueError: a box is outside of its 40 x 60", "DecompressionBombError"):
        assert sum(words in line for line in lines) == 1, lines
    Image.fromarray(np.full((40, 60), 300, np.uint16)).save(tmp_path / "deep.png")
    names = ("good.jpg", "turned.jpg", "deep.png")  # boxes that go a little beyond, and of a picture before its turn
    data.coco.imgs = {i: {"file_name": name, "size": "(60, 40)"} for i, name in enumerate(names)}
    data.coco.imgToAnns = {i: [{"bbox": [1, -1, 58, 39], "iscrowd": 0, "category_id": 1}] for i in range(3)}
    data.coco.imgs[3] = {"file_name": "good.jpg", "size": "(30, 20)"}  # boxes of a smaller copy
    Image.new("RGBA", (60, 40)).save(tmp_path / "clear.png")
    data.coco.imgs[4] = {"file_name": "clear.png", "size": "(60, 40)"}
    data.coco.imgToAnns[3] = data.coco.imgToAnns[4] = []
    assert (data[4][0] == 255).all()  # on white, as in the other scripts
    (one, target, _), (turned, again, _), (_, reason, _), (_, scaled, _) = (data[i] for i in range(4))
    assert scaled == "ValueError: (60, 40) pixels, annotated as (30, 20)"
    assert one.shape == turned.shape == (3, 40, 60) and reason.startswith("ValueError: mode I;16")
    assert target["boxes"].tolist() == again["boxes"].tolist() == [[1, 0, 59, 38]]


def test_a_coco_folder_and_voc_2007_are_found_by_themselves(tmp_path):
    """Roboflow's layout, with the same file name in all splits; and torchvision's of Pascal VOC."""
    box, rows = [[1, 1, 9, 9]], {}
    voc = tmp_path / "voc/VOCdevkit/VOC2007"
    (voc / "ImageSets/Main").mkdir(parents=True)

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(path)

    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        put(tmp_path / name / "0.jpg")
        write_coco(tmp_path / name / "_annotations.coco.json", [("0.jpg", box, ["disc"])])
        put(voc / f"JPEGImages/{split}.jpg")
        write_voc(voc / f"Annotations/{split}.xml", f"{split}.jpg", [(box[0], "cat")])
        (voc / f"ImageSets/Main/{split}.txt").write_text(f"{split}\n")
    places = {"train": "train/0.jpg", "val": "valid/0.jpg", "test": "test/0.jpg"}
    assert load(tmp_path)[0] == {path: (split, box, ["disc"], [0]) for split, path in places.items()}
    found, _ = load(tmp_path / "voc", dataset="voc2007")
    assert found == {f"{split}.jpg": (split, box, ["cat"], [0]) for split in fd.SPLITS}
    with pytest.raises(SystemExit, match="--dataset voc2007: Dataset not found"):
        load(tmp_path / "elsewhere", dataset="voc2007")
    # COCO's own layout: first no name is in both folders, then one is, and one is only in the other split's
    files = {"annotations": str(tmp_path / "train.json"), "val_annotations": str(tmp_path / "val.json")}
    for names in (["{}.jpg"], ["0.jpg", "{}.jpg", "train.jpg"]):
        for split in ("train", "val"):
            rows[split] = [name.format(split) for name in names[: 2 if split == "train" else 3]]
            for name in rows[split][:2]:
                put(tmp_path / f"coco/{split}2017/{name}")
            write_coco(tmp_path / f"{split}.json", [(name, box, ["disc"]) for name in rows[split]])
        found, _ = load(tmp_path / "coco", **files)
        places = {f"{split}2017/{name}": split for split in rows for name in rows[split][:2]}
        assert found == {path: (split, box, ["disc"], [0]) for path, split in places.items()}
    write_voc(tmp_path / "coco/train2017/a.xml", "train.jpg", [(box[0], "cat")])
    found, _ = load(tmp_path, annotations=str(tmp_path / "coco/train2017"))
    assert found == {"coco/train2017/train.jpg": ("train", box, ["cat"], [0])}


def test_choice_of_classes_and_split(tmp_path):
    """The most frequent classes in training; images that have boxes of others only go, negatives stay."""
    rows = {"a": ["lute", "lute", "harp"], "b": ["harp"], "c": ["drum"], "d": []}
    for name in [*rows, "e"]:
        Image.new("RGB", (10, 10)).save(tmp_path / name, "png")
    pictures = [(name, [[0, 0, 9, 9]] * len(names), names) for name, names in rows.items()]
    train = write_coco(tmp_path / "a.json", pictures, ("lute", "harp", "drum"), (1, 2, 3))
    drums = ("e", [[0, 0, 9, 9]] * 3, ["drum"] * 3)  # more than anything, but not in training
    val = write_coco(tmp_path / "b.json", [drums], ("lute", "harp", "drum"), (1, 2, 3))
    found, classes = load(tmp_path, annotations=train, val_annotations=val, top_classes=2)
    assert classes == ["harp", "lute"]
    assert {name: row[2] for name, row in found.items()} == {name: rows[name] for name in "abd"}
    found, classes = load(tmp_path, ["drum"], annotations=train, val_annotations=val)  # of a checkpoint
    assert classes == ["drum"] and set(found) == {"c", "d", "e"}
    found, _ = load(tmp_path, annotations=train, test_annotations=val)
    assert sorted(found[name][0] for name in "abcd") == ["train"] * 3 + ["val"] and found["e"][0] == "test"
    one, other, again = (load(tmp_path, annotations=train, seed=seed)[0] for seed in (1, 2, 1))
    splits = [[row[0] for row in found.values()] for found in (one, other, again)]
    assert sorted(splits[0]) == ["test", "train", "train", "val"] and splits[0] == splits[2] != splits[1]
    (tmp_path / "split.csv").write_text("path,split\na,val\nb,train\nc,train\n")
    found, _ = load(tmp_path, annotations=train, split_file=str(tmp_path / "split.csv"))
    assert {name: row[0] for name, row in found.items()} == {"a": "val", "b": "train", "c": "train", "d": ""}


def test_augmentation_moves_boxes_with_the_image_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the GPU's random numbers are training's"))
    image, boxes, names = canvas(np.random.default_rng(1), 1)
    image.save(tmp_path / "a.png")
    path = write_coco(tmp_path / "a.json", [("a.png", [*boxes, [0, 0, 96, 96]], [*names, names[0]])])
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace('"id": 1}', '"id": 1, "iscrowd": 1}'))
    (tmp_path / "proposals.json").write_text(json.dumps({"a.png": boxes}))
    x1, y1, x2, y2 = map(float, boxes[0])

    def read(epoch, **options):
        args = fd.Args(data_dir=str(tmp_path), annotations=path, workers=0, **options)
        pictures = fd.Pictures(*fd.load_data(args, ["disc", "square"]), args)
        ((images, targets, _),) = fd.read_batches(args, pictures, [0], torch.device("cpu"), epoch)
        return images[0], targets[0]

    pixels, target = read(None)
    assert (pixels * 255).round().byte().permute(1, 2, 0).numpy().tolist() == np.asarray(image).tolist()
    assert target["boxes"].tolist() == [[x1, y1, x2, y2]]  # without the crowd
    assert target["labels"].tolist() == [1 + ["disc", "square"].index(names[0])]
    mirrored = set()
    for epoch in range(12):
        state = torch.get_rng_state()
        flipped, target = read(epoch, arch="fastrcnn", proposals=str(tmp_path / "proposals.json"))
        assert torch.equal(torch.get_rng_state(), state)
        mirrored.add(not torch.equal(flipped, pixels))
        expected = [x1, y1, x2, y2] if torch.equal(flipped, pixels) else [96 - x2, y1, 96 - x1, y2]
        assert torch.equal(flipped, pixels) or torch.equal(flipped, pixels.flip(2))
        assert target["boxes"].tolist() == [expected]
        assert target["proposals"].tolist() == [expected, [0, 0, 96, 96]]  # the last is the whole image
    assert mirrored == {True, False}
    assert torch.equal(read(3, augmentation="ssd")[0], read(3, augmentation="ssd")[0])
    assert len({read(epoch, augmentation="ssd")[0].shape for epoch in range(8)}) > 2
    assert torch.equal(read(3, augmentation="none")[0], pixels)


# ------------------------------------------------------------------------------------------------------------ metrics
def make_case(truth, found, names="x"):
    """COCO's index of [[(box, name, crowd), ...] by image] and results of [[(box, name, score), ...] by image]."""

    def rows(images, key):
        for i, boxes in enumerate(images):
            for (x1, y1, x2, y2), name, value in boxes:
                box = {"image_id": i, "category_id": 1 + names.index(name), "bbox": [x1, y1, x2 - x1, y2 - y1]}
                yield box | {"area": (x2 - x1) * (y2 - y1), key: value}

    coco, numbered = fd.COCO(), [box | {"id": k} for k, box in enumerate(rows(truth, "iscrowd"), 1)]
    coco.dataset = {"info": {}, "images": [{"id": i} for i in range(len(truth))], "annotations": numbered}
    coco.dataset["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    coco.createIndex()
    return coco, list(rows(found, "score")), list(range(len(truth)))


def test_the_paper_s_ap_by_hand():
    a, b, c, nothing = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60], [70, 70, 80, 80]
    truth = [[(a, "x", False), (b, "x", False)], [(c, "x", False)]]

    def ap(iou, *found, truth=truth):
        coco, results, ids = make_case(truth, [[(box, "x", score) for box, score in rows] for rows in found])
        return fd.paper_ap(coco, coco.loadRes(results) if results else fd.COCO(), ids, 1, iou)

    third = [53, 50, 63, 60]  # IoU with c: 70 / 130
    # by score: right, wrong, right; precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3
    assert ap(0.5, [(a, 0.9), (nothing, 0.8)], [(third, 0.7)]) == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert ap(0.6, [(a, 0.9), (nothing, 0.8)], [(third, 0.7)]) == pytest.approx(1 / 3)
    # the second of two boxes on the same object is wrong, and gone if it overlaps the first by 0.45
    assert ap(0.1, [(a, 0.9), ([4, 0, 14, 10], 0.8), (b, 0.04)], [(c, 0.7)]) == pytest.approx(1 / 3 + 2 / 3 * 3 / 4)
    assert ap(0.1, [(a, 0.9), ([0, 3, 10, 13], 0.8), (b, 0.7)], []) == pytest.approx(2 / 3)
    # a miss before takes no object away; ties: the order of the images decides
    assert ap(0.5, [([0, 0, 4, 4], 0.9), (a, 0.8)], []) == pytest.approx(1 / 3 * 1 / 2)
    assert ap(0.5, [(nothing, 0.5)], [(c, 0.5)]) == pytest.approx(1 / 3 * 1 / 2)
    assert ap(0.5, [], []) == 0.0 and math.isnan(ap(0.5, [(a, 0.9)], truth=[[]]))
    # a crowd is neither expected nor wrong
    assert ap(0.5, [(b, 0.9), (a, 0.8)], truth=[[(a, "x", False), (b, "x", True)]]) == 1.0


def test_coco_s_and_the_paper_s_ap_agree():
    """They differ here in the integration only: over 101 points of the curve, and over all."""
    rng, truth, found = np.random.default_rng(0), [], []
    for _ in range(40):  # objects in separate places, some missed, some boxes inaccurate, some of nothing
        places = np.stack(np.divmod(rng.permutation(9), 3), axis=1) * 33
        rows = [([*xy, *(xy + rng.integers(15, 28, size=2))], "abc"[rng.integers(3)], rng.random() < 0.1)
                for xy in places[: int(rng.integers(0, 6))]]  # fmt: skip
        seen = [(np.clip(np.array(box) + rng.normal(0, 2, 4), 0, 100), name, rng.uniform(0.06, 1))
                for box, name, _ in rows if rng.random() < 0.8]  # fmt: skip
        truth.append(rows)
        found.append([*seen, ([*places[8], *(places[8] + 20.0)], "abc"[rng.integers(3)], 0.3 + 0.2 * rng.random())])
    metrics = fd.measure(*make_case(truth, found, "abc"))
    for name in ("AP", "AP@0.1", "AP@0.5"):
        assert np.mean([metrics[f"{name}/{letter}"] for letter in "abc"]) == pytest.approx(metrics[name])
    assert metrics["AP@0.5"] == pytest.approx(metrics["AP50"], abs=0.01) and metrics["AP@0.1"] >= metrics["AP@0.5"]
    assert 0.3 < metrics["AP"] < metrics["AP50"] < 0.95


def test_metrics_without_predictions_or_truth():
    box = [0, 0, 9, 9]
    empty = fd.measure(*make_case([[(box, "a", False)]], [[]], "ab"))
    assert (empty["AP"], empty["AP@0.5"], empty["AP@0.5/a"]) == (0, 0, 0) and math.isnan(empty["AP@0.5/b"])
    perfect = fd.measure(*make_case([[(box, "a", False)], []], [[(box, "a", 0.9)], []], "ab"))
    assert perfect["AP"] == pytest.approx(1) and perfect["AP@0.1"] == 1 and math.isnan(perfect["AP/b"])
    near = fd.measure(*make_case([[([0, 0, 200, 200], "a", False)]], [[([0, 0, 200, 154], "a", 0.9)]], "a"))  # IoU 0.77
    assert (near["AP50"], near["AP75"], near["AP"]) == pytest.approx((1, 1, 0.6))
    nothing = fd.measure(*make_case([[]], [[(box, "x", 0.9)]]))
    assert math.isnan(nothing["AP@0.5"]) and math.isnan(nothing["AP"])


# ---------------------------------------------------------------------------------------------------------- detectors
def detector(arch, backbone="mobilenet_v3_small", image_size=64, **more):
    torch.manual_seed(0)
    args = fd.Args(arch=arch, backbone=backbone, image_size=image_size, weights="none", **more)
    return fd.make_detector(args, 3), args


@pytest.mark.parametrize("arch", [*fd.FAMILIES, "yolov3"])
def test_families_train_in_bfloat16_in_the_backbone_only_and_detect(arch):
    """Losses with and without boxes, gradients in all parts, scores from 0.05 on, and boxes in an image's pixels."""
    model, args = detector(arch)
    chooser = getattr(model, "roi_heads", model)
    assert (chooser.score_thresh, chooser.detections_per_img) == (0.05, 100)
    images = [torch.rand(3, 48, 80), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([2])},
               {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]  # fmt: skip
    for target, image in zip(targets, images):
        target["proposals"] = torch.tensor([[8.0, 8.0, 42.0, 42.0], [0, 0, image.shape[2], image.shape[1]]])
    inside, outside, spreads, sums = [], set(), [], []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and not name.startswith("backbone."):
            module.register_forward_hook(lambda module, inputs, output: outside.add(output.dtype))
    convolution = next(module for module in model.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    convolution.register_forward_hook(lambda module, inputs, output: spreads.append(inputs[0].float().std()))
    assert fd.freeze(model, [], args) == []
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} <= {0.1}  # all are new
    for amp in (False, True):  # as on CUDA, but here on the CPU
        if amp:
            fd.autocast_backbone(model.train(), "cpu")
        torch.manual_seed(0)
        losses = model(images, targets)
        assert all(value.ndim == 0 and value.isfinite() and value.dtype == torch.float32 for value in losses.values())
        sums.append(sum(losses.values()))
        sums[-1].backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert min(spreads) > 0.8, "not normalised as for ImageNet"  # of the images it is 0.3
    assert arch != "retinanet" or model.anchor_generator.sizes[::4] == ((32, 40, 51), (512, 645, 813))
    assert inside == [torch.float32, torch.bfloat16] and outside == {torch.float32}
    assert sums[1].item() == pytest.approx(sums[0].item(), rel=0.3)
    with torch.no_grad():
        results = model.eval()(images, targets)
    assert inside[2] == torch.float32  # evaluation
    for image, result in zip(images, results):
        h, w = image.shape[1:]
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
        assert (result["scores"] >= 0.05).all() and set(result["labels"].tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("arch", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large",
                                  "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "fasterrcnn"])  # fmt: skip
def test_a_detector_gets_a_new_head(arch, tmp_path):
    """COCO's weights (here random ones of that form) go everywhere but into the head; objectness is no head."""
    args = fd.Args(arch=arch, backbone="resnet18" if arch in fd.FAMILIES else None, weights=str(tmp_path / "coco.pth"))
    if arch in fd.FAMILIES:
        coco = fd.make_detector(args, 91).state_dict()
    else:
        coco = models.get_model(arch, weights=None, weights_backbone=None, num_classes=91).state_dict()
    older = {re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0", r"\1.\2", name): value for name, value in coco.items()}
    older = {name.replace("rpn.head.conv.0.0", "rpn.head.conv"): value for name, value in older.items()}
    torch.save(older if arch.endswith("_fpn") else coco, args.weights)  # as torchvision's files of version 1 have them
    model = fd.make_detector(args, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded, after = fd.load_weights(args, model), model.state_dict()
    new = set(after) - set(loaded)
    assert new and all(fd.HEAD.search(name) and torch.equal(after[name], before[name]) for name in new)
    assert all(torch.equal(after[name], coco[name]) for name in loaded)
    if arch == "fasterrcnn":
        parts = ("cls_score.weight", "cls_score.bias", "bbox_pred.weight", "bbox_pred.bias")
        assert new == {f"roi_heads.box_predictor.{part}" for part in parts}
        assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))


@pytest.mark.parametrize("arch", ["fcos", "yolov3"])
def test_backbones_of_finetune_classify_fit(arch, tmp_path):
    """A checkpoint of finetune_classify.py and torchvision's file give the backbone its tensors; the rest is new."""
    source = models.mobilenet_v3_small(weights=None).state_dict()
    torch.save(source, tmp_path / "bare.pth")
    trunk = {f"trunk.{name}": value for name, value in source.items() if not name.startswith("classifier.3")}
    torch.save({"model": trunk | {"heads.0.weight": torch.zeros(2, 9)}, "classes": {}}, tmp_path / "classify.pt")
    for path, flag in ((tmp_path / "bare.pth", "weights"), (tmp_path / "classify.pt", "pretrained")):
        model, args = detector(arch)
        loaded = fd.load_weights(fd.Args(arch=arch, **{flag: str(path)}), model)
        own = model.state_dict()
        assert len(loaded) == sum(name.startswith("features.") for name in source)
        assert all(torch.equal(own[name], source[name.replace("backbone.body.", "features.")]) for name in loaded)
    args.strategy = "off-the-shelf"
    fd.freeze(model, loaded, args)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {name for name, _ in model.named_parameters() if name.startswith("backbone.body.")}
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((module.momentum == 0.1) != name.startswith("backbone.") for name, module in norms)
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="other.pth is of another architecture: .* tensors do not fit"):
        fd.load_weights(fd.Args(arch=arch, weights=str(tmp_path / "other.pth")), model)


def test_a_backbone_s_published_file_may_have_older_names(monkeypatch):
    older = models.densenet121(weights=None).state_dict()
    older = {re.sub(r"(layer\d+\.(?:norm|conv))", r"\1.", n): v for n, v in older.items() if "num_batches" not in n}
    monkeypatch.setattr(models._api, "load_state_dict_from_url", lambda *_, **__: older)
    args = fd.Args(arch="yolov3", backbone="densenet121", weights="IMAGENET1K_V1")
    assert len(fd.load_weights(args, fd.make_detector(args, 3))) > 600


def test_heads_begin_where_they_can_learn():
    """Behind a ReLU distances of 0 have no gradient; without a normalisation four layers leave nothing of the image."""

    def head(arch):
        model, _ = detector(arch, strategy="scratch")
        return model.head(list(model.backbone(torch.rand(1, 3, 64, 64)).values()))

    assert (head("fcos")["bbox_regression"] > 0).float().mean() > 0.9
    assert head("retinanet")["cls_logits"].std() > 0.01


def test_frozen_stays_frozen_and_momentum_from_scratch():
    model, args = detector("fastrcnn", strategy="fine-tune", unfreeze_from="body.4")
    norms = fd.freeze(model, [name for name in model.state_dict() if name.startswith("backbone.body.")], args)
    model.train()
    for module in norms:
        module.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [2.0, 2.0, 60.0, 60.0], [0.0, 0.0, 64.0, 64.0]])
    target = {"boxes": boxes, "labels": torch.tensor([2, 1, 1]), "proposals": boxes}
    for _ in range(2):
        optimizer.zero_grad()
        sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
        optimizer.step()
    body = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    body = {name for name in body if name.startswith("backbone.body.")}
    assert {int(name.split(".")[2]) for name in body} == set(range(4, 13))
    assert not any("running" in name for name in body)
    with pytest.raises(SystemExit, match="--unfreeze-from layer9: no module has that name"):
        fd.freeze(model, [], fd.Args(unfreeze_from="layer9"))
    model, args = detector("fcos", "efficientnet_b0", strategy="off-the-shelf")
    for module in fd.freeze(model.train(), [name for name in model.state_dict() if ".body." in name], args):
        module.eval()  # stochastic depth, too
    assert not any(module.training for module in model.backbone.body.modules()) and model.head.training
    model, args = detector("fasterrcnn", strategy="off-the-shelf")  # as of COCO's weights: all but the last layer
    still = fd.freeze(model, [name for name in model.state_dict() if not fd.HEAD.search(name)], args)
    assert model.rpn.head in still and model.rpn not in still  # it proposes less in evaluation mode
    model, _ = detector("fcos")
    body = {name for name in model.state_dict() if ".body." in name}
    fd.freeze(model, list(body), fd.Args(unfreeze_from="regression_head"))  # all that is new learns, before it too
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad}.isdisjoint(body)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name not in body)


def test_external_proposals_are_scaled_with_the_image():
    model, _ = detector("fastrcnn")
    seen = []
    model.roi_heads.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    proposals = torch.tensor([[0.0, 8.0, 24.0, 16.0], [0.0, 0.0, 48.0, 32.0]])
    target = {"proposals": proposals, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with torch.no_grad():
        model.eval()([torch.rand(3, 32, 48)], [target])
    assert torch.allclose(seen[0][0], torch.tensor([[0.0, 16.0, 48.0, 32.0], [0.0, 0.0, 96.0, 64.0]]), atol=0.1)


# --------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A finished run from scratch: (its folder, what it printed, names of the images it read, its learning rates)."""
    cwd, read, rates = tmp_path_factory.mktemp("trained"), [], []
    step, open_image = torch.optim.SGD.step, Image.open
    words = flags(
        shapes, "--strategy", "scratch", "--epochs", 4, "--predict-threshold", 0.1, "--weights", "ignored.pth"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda path: read.append(os.path.basename(path)) or open_image(path))
        patch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
        out = script(*words, cwd=cwd).stdout
    return only_run(cwd / "runs"), out, read, rates


def test_a_run_learns_and_leaves_what_it_should(trained, shapes):
    folder, out, read, rates = trained
    assert rates == pytest.approx([0.01 * i / 8 for i in range(1, 9)] + [0.01] * 16 + [0.001] * 8)  # warm-up, one drop
    train, val, test = ([f"{split}_{i:02d}.png" for i in range(n)] for split, n in zip(fd.SPLITS, (32, 8, 8)))
    epochs = [read[48 * i : 48 * i + 48] for i in range(4)]  # validation images are read once more to be drawn
    assert all(sorted(names[:32]) == train and names[32:] == val + val for names in epochs)
    assert read[192:] == test + test
    assert len({tuple(names) for names in [train + val + val, *epochs]}) == 5, "not shuffled"
    logged = scalars(folder, TIMES)
    losses = [value for _, value in logged["train/loss"]]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    assert logged["test/AP@0.5"][0][1] > 0.5, logged["test/AP@0.5"]
    each = [logged[f"test/AP@0.5/{name}"][0][1] for name in ("disc", "square")]
    assert np.mean(each) == pytest.approx(logged["test/AP@0.5"][0][1])
    assert {"losses/classifier", "losses/box_reg", "val/AP"} <= set(logged) and "losses/rpn_box_reg" not in logged
    rates = [value for _, value in logged["charts/learning_rate"]]
    assert rates == pytest.approx([0.01] * 3 + [0.001])
    checkpoint = torch.load(folder / "finetune_detect.pt")
    assert checkpoint["classes"] == ["disc", "square"] and checkpoint["epoch"] == 4
    assert checkpoint["best"] == pytest.approx(max(value for _, value in logged["val/AP@0.5"]))
    splits = [line.rpartition(",")[2] for line in (folder / "split.csv").read_text().split()]
    assert splits == ["split"] + ["train"] * 32 + ["val"] * 8 + ["test"] * 8
    for split in ("val", "test"):
        pictures = sorted((folder / "detections" / split).iterdir())
        originals = [np.asarray(Image.open(shapes / "images" / path.name.split("_", 1)[1])) for path in pictures]
        drawn = [(np.asarray(Image.open(path)) != one).any() for path, one in zip(pictures, originals)]
        assert len(drawn) == 8 and sum(drawn) >= 4  # one has no object
    # the first line of progress, after an update of eight in the first of four epochs, has the time left of all
    words = next(line for line in out.splitlines() if line.startswith("epoch 1/4 12.5%")).split()
    hours, minutes, seconds = map(int, words[-1].split(":"))
    assert hours * 3600 + minutes * 60 + seconds >= (float(words[words.index("s/update") - 1]) - 0.006) * 31 - 1
    assert not list(folder.glob("*.tmp"))


def test_drawing_leaves_the_user_s_pictures_alone(tmp_path):
    """Annotations may name them by their absolute paths, and `a.jpg` may stand beside `a.png`."""
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    pictures = [(str(path), [[1, 1, 50, 30]], ["disc"]) for path in before]
    (tmp_path / "out").mkdir()
    args = fd.Args(data_dir=str(tmp_path), annotations=write_coco(tmp_path / "out/a.json", pictures))
    data = fd.Pictures(*fd.load_data(args, []), args)
    box = {"bbox": [1, 1, 9, 9], "score": 0.9, "category": "disc", "category_id": 1}
    fd.draw_detections(data, [box | {"image_id": i} for i in (0, 1)], [0, 1], 0.3, str(tmp_path / "out"))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert sorted(path.name[1:] for path in (tmp_path / "out").glob("*.png")) == ["_a.png"] * 2


def test_evaluate_and_predict(trained, shapes, tmp_path):
    folder = trained[0]
    out = script("--evaluate", folder, cwd=tmp_path).stdout
    logged = scalars(folder)
    assert f"on 8 test images: AP {logged['test/AP'][0][1]:.4f}, AP50 {logged['test/AP50'][0][1]:.4f}" in out
    best = max(logged["val/AP@0.5"], key=lambda point: point[1])[0]  # the first epoch of the best
    for flag in ("--annotations", "--test-annotations"):
        words = ["--evaluate", folder / "finetune_detect.pt", flag, shapes / "val.json"]
        out = script(*words, cwd=tmp_path).stdout
        assert f"on 8 test images: AP {dict(logged['val/AP'])[best]:.4f}" in out
    shutil.copytree(shapes / "images", tmp_path / "other/train")  # an export that is not split: all is tested
    shutil.copytree(shapes / "images", tmp_path / "moved")  # unless it is what the run was trained on
    for folder_of in ("other", "moved"):
        (tmp_path / folder_of / "train").mkdir(exist_ok=True)
        shutil.copy(shapes / "val.json", tmp_path / folder_of / "train/_annotations.coco.json")
    out = script("--evaluate", folder, "--data-dir", "moved", cwd=tmp_path).stdout
    assert f"on 8 test images: AP {logged['test/AP'][0][1]:.4f}" in out
    proposals = {f"train/{name}": found for name, found in json.loads((shapes / "proposals.json").read_text()).items()}
    (tmp_path / "p.json").write_text(json.dumps(proposals))
    out = script("--evaluate", folder, "--data-dir", "other", "--proposals", "p.json", cwd=tmp_path).stdout
    assert f"on 8 test images: AP {dict(logged['val/AP'])[best]:.4f}" in out
    (tmp_path / "new").mkdir()
    image, boxes, names = canvas(np.random.default_rng(5), 2)
    image.save(tmp_path / "new/one.png")
    (tmp_path / "new/bad.jpg").write_bytes(b"nothing")
    (tmp_path / "proposals.json").write_text(json.dumps({"one.png": [[x - 2, y, z, w + 2] for x, y, z, w in boxes]}))
    new = ["--evaluate", folder, "--predict", "new", "--proposals", "proposals.json"]
    assert "'bad.jpg' cannot be used" in script(*new, cwd=tmp_path).stdout
    results = json.loads((folder / "predictions.json").read_text())
    assert {row["file_name"] for row in results} == {"one.png"}
    best = max(results, key=lambda row: row["score"])
    overlaps = fd.box_iou(fd.corners([best]), torch.tensor(boxes, dtype=torch.float32))[0]
    assert overlaps.max() > 0.5 and best["category"] == names[int(overlaps.argmax())]
    assert (np.asarray(Image.open(folder / "pictures/1_one.png")) != np.asarray(image)).any()


def test_a_signal_to_the_process_group_leaves_a_run_that_resumes(shapes, tmp_path):
    """As `timeout` and schedulers send it: the workers get it, too. The resumed run is the straight one, bit by bit."""
    more = ["--strategy", "scratch", "--epochs", 2, "--exp-name", "detector", "--workers", 2, "--optimizer", "adam"]
    more += ["--learning-rate", None, "--weight-decay", 0.01]
    optimizer = script(*flags(shapes, *more, "--logdir", "whole"), cwd=tmp_path).variables["optimizer"]
    found = [(group["weight_decay"], {p.ndim > 1 for p in group["params"]}) for group in optimizer.param_groups]
    assert isinstance(optimizer, torch.optim.Adam) and found == [(0.01, {True}), (0.0, {False})]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)  # 1e-4, dropped
    process = start("finetune_detect.py", *flags(shapes, *more, "--logdir", "parts"), cwd=tmp_path)
    while not list(tmp_path.glob("parts/*/detections/val")) and process.poll() is None:  # the first epoch is over
        time.sleep(0.02)
    time.sleep(0.2)  # in the second epoch
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    # torch's destructors may speak of workers that were killed
    assert process.returncode == 130 and out.count("Traceback") == out.count("Exception ignored in"), out
    folder = only_run(tmp_path / "parts")
    assert f"--resume {folder.relative_to(tmp_path)} goes on" in out
    assert torch.load(folder / "detector.pt")["epoch"] < 2 and not list(folder.glob("*.tmp"))
    script("--resume", folder, cwd=tmp_path)
    whole, parts = (torch.load(only_run(tmp_path / name) / "detector.pt") for name in ("whole", "parts"))
    for key in ("last", "model"):
        assert all(torch.equal(value, parts[key][name]) for name, value in whole[key].items())
    logged = scalars(folder, TIMES)
    assert logged == scalars(only_run(tmp_path / "whole"), TIMES)
    # a finished run that is resumed writes no point again; with more epochs it goes on
    script("--resume", folder, cwd=tmp_path)
    assert scalars(folder, TIMES) == logged
    script("--resume", folder, "--epochs", 3, cwd=tmp_path)
    assert [step for step, _ in scalars(folder)["train/loss"]] == [1, 2, 3]


def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path):
    """A limit on the size of files stands for it."""
    path, limits = tmp_path / "run/a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    fd.write_file(str(path), lambda file: file.write(b"old"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="a.pt cannot be written: "):
            fd.write_file(str(path), lambda file: file.write(bytes(1_000_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_results_do_not_depend_on_workers_and_without_test_images_those_of_validation_are(shapes, tmp_path):
    """Regions of Faster R-CNN are drawn by the generator of the training process, which workers do not touch."""
    for workers in (0, 2):
        more = ["--arch", "fasterrcnn", "--epochs", 2, "--batch-size", 2, "--logdir", workers, "--workers", workers]
        more += ["--learning-rate", None]
        script(*flags(shapes, *more, train="test", val="val"), cwd=tmp_path)
    one, other = (scalars(only_run(tmp_path / name), TIMES) for name in ("0", "2"))
    assert [rate for _, rate in one["charts/learning_rate"]] == pytest.approx([0.0025, 0.00025])  # of two images
    assert one == other and "losses/rpn_box_reg" in one and not any(tag.startswith("test/") for tag in one)
    out = script("--evaluate", only_run(tmp_path / "0"), cwd=tmp_path).stdout
    best = max(one["val/AP@0.5"], key=lambda point: point[1])[0]
    assert f"on 8 val images: AP {dict(one['val/AP'])[best]:.4f}" in out


def test_one_file_is_split_and_a_chain_gets_another_head(shapes, tmp_path):
    """Off-the-shelf without warm-up; the chain has its source's split and body, never the source's first head."""
    torch.manual_seed(5)
    torch.save(models.mobilenet_v3_small(weights=None).state_dict(), tmp_path / "w.pth")
    one = flags(shapes, "--weights", "w.pth", "--learning-rate", 0, "--epochs", 9, "--patience", 1, train="val")
    out = script(*one, "--strategy", "off-the-shelf", "--warmup-iterations", 0, cwd=tmp_path).stdout
    assert "4 train, 2 val, 2 test images" in out and "34 batch normalisations frozen" in out
    source = only_run(tmp_path / "runs")
    assert torch.load(source / "finetune_detect.pt")["epoch"] == 2  # the second is not better
    again = script("--evaluate", source, cwd=tmp_path).stdout
    assert f"on 2 test images: AP {scalars(source)['test/AP'][0][1]:.4f}" in again
    seed = ["--seed", 2, "--split-file", source / "split.csv"]
    for name, more in (("same", []), ("seed", seed), ("other", [*seed, "--single-class"])):
        out = script(*one, "--pretrained", source, "--logdir", name, *more, cwd=tmp_path).stdout
    assert "1 classes: object" in out
    shutil.copytree(shapes / "images", tmp_path / "moved")
    same, other = (only_run(tmp_path / name) for name in ("same", "other"))
    script("--resume", other, "--data-dir", tmp_path / "moved", "--epochs", 2, cwd=tmp_path)
    error = refused("finetune_detect.py", "--resume", other, "--optimizer", "adam", cwd=tmp_path)
    assert "--optimizer adam: the run has sgd" in error
    error = refused("finetune_detect.py", "--evaluate", other, "--arch", "yolov3", cwd=tmp_path)
    assert "--arch yolov3: the run has " in error
    error = refused("finetune_detect.py", *one, "--pretrained", source, "--seed", 2, cwd=tmp_path)
    assert re.search(r"has seen \d of the test images in training: give --split-file .*split.csv", error)
    assert (other / "split.csv").read_text() == (source / "split.csv").read_text()
    folders = source, same, only_run(tmp_path / "seed")
    first, chained, reseeded = (torch.load(folder / "finetune_detect.pt")["last"] for folder in folders)
    heads = [name for name in first if fd.HEAD.search(name) and name.endswith("weight")]
    assert heads and not any(torch.equal(first[name], chained[name]) for name in heads)
    assert not any(torch.equal(reseeded[name], chained[name]) for name in heads)
    assert all(torch.equal(first[name], chained[name]) for name in first if "body" in name)


def test_a_checkpoint_writes_nothing_outside_of_its_folder(trained, shapes, tmp_path):
    """Names in a file that somebody else made: the run's name and folder are those of the file, as the best weights."""
    checkpoint = torch.load(trained[0] / "finetune_detect.pt")
    checkpoint["best"] = 2.0
    checkpoint["model"] = best = {name: value + 1 for name, value in checkpoint["model"].items()}
    checkpoint["args"] |= {"exp_name": "../escaped", "logdir": str(tmp_path / "elsewhere"), "epochs": 5}
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run/evil.pt")
    (tmp_path / "run/split.csv").write_bytes((trained[0] / "split.csv").read_bytes())
    tested = script("--resume", tmp_path / "run", cwd=tmp_path).variables["model"].state_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    checkpoint = torch.load(tmp_path / "run/evil.pt")
    assert (checkpoint["epoch"], checkpoint["best"]) == (5, 2.0)
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in best.items())
    assert all(torch.equal(value, tested[name]) for name, value in best.items())


MISTAKES = [
    ("", "--data-dir data has no train/_annotations.coco.json, and there are no --annotations"),
    ("{data} empty.json", "empty.json: no annotations in a known format"),
    ("--annotations {train} --data-dir nowhere --weights none", "there are no images for training"),
    ("{data} {train} --split-file no.csv", "--split-file no.csv: FileNotFoundError"),
    ("{data} {train} --arch yolov5", "--arch yolov5: there are fasterrcnn, fastrcnn"),
    ("{data} {train} --arch fcos --backbone resnet19", "--backbone resnet19: torchvision has no such"),
    ("{data} {train} --arch fcos --backbone vit_b_16", "--backbone vit_b_16: no maps at strides 8"),
    ("{data} {train} --arch fcos --backbone googlenet", "its weights want images scaled in their own way"),
    ("{data} {train} --exp-name a/b", "--exp-name a/b is not the name of a file"),
    ("{data} {train} --arch yolov3", "--weights None: no file (Darknet's yolov3.weights) nor none"),
    ("{data} {train} --arch yolov3 --weights none --image-size 100", "yolov3 takes multiples of 32"),
    ("{data} {train} --arch ssd300_vgg16 --backbone resnet18", "ssd300_vgg16 has its own"),
    ("{data} {train} --predict images", "--predict needs a trained detector"),
    ("{data} {train} --arch fcos --weights x.pth", "x.pth: no file (Darknet's yolov3.weights) nor IMAGENET1K_V1"),
    ("{data} {train} --arch fastrcnn", "--arch fastrcnn needs a file of --proposals"),
    ("{data} {train} --arch fastrcnn --weights none --proposals xywh.json", "a box ends before it begins: [40, 20, 10"),
    ("{data} {train} --arch fastrcnn --weights none --proposals empty.json", "none is of an image in"),
    ("{data} {train} --arch fastrcnn --weights none --proposals bare.csv", "not {path: [[xmin, ymin, xmax"),
    ("{data} {train} --weights none --strategy off-the-shelf", "there are no weights to keep"),
    ("{data} {train} --unfreeze-from layer3 --strategy scratch", "--unfreeze-from is for --strategy fine-tune"),
    ("{data} {train} --pretrained x.pt", "x.pt cannot be loaded"),
    ("{data} {train} --epochs 0", "--epochs must be at least 1"),
    ("--resume bare.pt", "bare.pt is no checkpoint of this script"),
    ("--evaluate .", ". cannot be loaded"),
]


@pytest.mark.parametrize("words, says", MISTAKES)
def test_bad_input_gets_one_line(words, says, shapes, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "xywh.json").write_text('{"train_00.png": [[40, 20, 10, 15]]}')
    (tmp_path / "bare.csv").write_text("train_00.png,40,20,10,15")
    if "bare.pt" in words:
        torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "bare.pt")
    words = words.format(train=shapes / "train.json", data=f"--data-dir {shapes / 'images'} --annotations")
    error = refused("finetune_detect.py", *words.split(), cwd=tmp_path)
    assert says in error and "weights_only" not in error


@needs_cuda
@pytest.mark.parametrize("arch", ["fastrcnn", "fcos", "yolov3"])
def test_it_trains_resumes_and_evaluates_on_cuda(arch, shapes, tmp_path):
    words = flags(shapes, "--arch", arch, "--epochs", 2, "--workers", 2)
    assert "on cuda" in run_on_cuda("finetune_detect.py", *words, cwd=tmp_path)
    run_on_cuda("finetune_detect.py", "--resume", run_dir := only_run(tmp_path / "runs"), "--epochs", 3, cwd=tmp_path)
    logged = scalars(run_dir)
    assert len(logged["train/loss"]) == 3 and logged["train/loss"][-1][1] < logged["train/loss"][0][1]
    out = run_on_cuda("finetune_detect.py", "--evaluate", run_dir, cwd=tmp_path)
    assert f"AP {logged['test/AP'][-1][1]:.4f}" in out
