"""Detection: annotations and their defects, detectors, metrics, and whole runs on pictures made here."""

import csv
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, run, scalars
from PIL import Image
from torchvision import models

import finetune_detect as fd

SMALL = ["--arch", "ssd", "--backbone", "mobilenet_v3_small", "--image-size", 96, "--workers", 0, "--weights", "none"]


def canvas(rng, n, side=96):
    """An image with n bright squares and discs on dark noise, that do not overlap; their boxes and names."""
    image, boxes, names = rng.integers(0, 60, size=(side, side, 3)), [], []
    corners = [(x, y) for x in (2, side // 2 + 2) for y in (2, side // 2 + 2)]
    for k in rng.permutation(4)[:n]:
        w = int(rng.integers(24, 40))
        x, y = (int(c + rng.integers(0, 44 - w)) for c in corners[k])
        kind = ("square", "disc")[rng.integers(2)]
        yy, xx = np.mgrid[:w, :w] - (w - 1) / 2
        mask = np.ones((w, w), bool) if kind == "square" else xx**2 + yy**2 < (w / 2) ** 2
        image[y : y + w, x : x + w][mask] = (230, 60, 60) if kind == "square" else (60, 230, 60)
        boxes.append([x, y, x + w, y + w])
        names.append(kind)
    return Image.fromarray(image.astype(np.uint8)), boxes, names


def write_coco(path, pictures, names=("disc", "square"), ids=(18, 7)):
    """COCO JSON of [(file name, size, boxes, names)]."""
    data = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in zip(ids, names)]}
    for k, (name, size, boxes, labels) in enumerate(pictures):
        data["images"].append({"id": 100 + k, "file_name": name, "width": size[0], "height": size[1]})
        for (x1, y1, x2, y2), label in zip(boxes, labels):
            category = ids[names.index(label)] if label in names else 999
            entry = {"id": len(data["annotations"]) + 1, "image_id": 100 + k, "category_id": category}
            data["annotations"].append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1, "iscrowd": 0})
    path.write_text(json.dumps(data))
    return path


def write_voc(path, image, size, rows):
    """VOC XML of [(box, name)]; all but the first object are difficult."""
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = ""
    for k, ((x1, y1, x2, y2), name) in enumerate(rows):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2))
        box = "".join(f"<{side}>{value:g}</{side}>" for side, value in corners)
        objects += f"<object><name>{name}</name><difficult>{int(k > 0)}</difficult><bndbox>{box}</bndbox></object>"
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    path.write_text(f"<annotation><filename>{image}</filename>{size}{objects}</annotation>")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with images/ and train, val and test JSON: 32, 8 and 8 images of squares and discs, one without any."""
    root, rng = tmp_path_factory.mktemp("detect"), np.random.default_rng(0)
    (root / "images").mkdir()
    for split, n in (("train", 32), ("val", 8), ("test", 8)):
        pictures = []
        for i in range(n):
            image, boxes, names = canvas(rng, 0 if i == 3 else int(rng.integers(1, 4)))
            image.save(root / "images" / f"{split}_{i:02d}.png")
            pictures.append((f"{split}_{i:02d}.png", image.size, boxes, names))
        write_coco(root / f"{split}.json", pictures)
    return root


def flags(shapes, *more):
    names = ("annotations", "val-annotations", "test-annotations")
    files = [word for name, split in zip(names, fd.SPLITS) for word in (f"--{name}", shapes / f"{split}.json")]
    return [*SMALL, "--data-dir", shapes / "images", *files, *more]


# --------------------------------------------------------------------------------------------------------------- data


def test_all_formats_say_the_same(tmp_path):
    """The same two boxes in three formats; pixels of VOC count from 1 with both ends in the box."""
    expected = [([10.0, 20.0, 30.0, 50.0], "harp"), ([0.0, 0.0, 100.0, 80.0], "lute")]
    args, voc = fd.Args(), tmp_path / "Annotations"
    write_voc(voc / "a.xml", "a.jpg", (100, 80), expected)
    (tmp_path / "dev.txt").write_text(
        ",image_filename,id,bounding_box_coordinates,instrument_name,area_of_bounding_box,lev1\n"
        '0,a.jpg,5,"10,20,30,50",Harp (3285),600,Strings\n1,a.jpg,6,"0,0,100,80",lute,8000,Strings\n'
    )
    pictures = [("a.jpg", (100, 80), [box for box, _ in expected], [name for _, name in expected])]
    write_coco(tmp_path / "a.json", pictures, ("harp", "lute"), (90, 3))
    for path in (voc, tmp_path / "dev.txt", tmp_path / "a.json"):
        (picture,) = fd.read_annotations(str(path), args)
        assert picture.path == "a.jpg" and picture.boxes == [box for box, _ in expected], path
        assert [name.lower() for name in picture.labels] == ["harp", "lute"]
        assert picture.crowd == [False, path == voc]  # VOC's difficult objects
    args.label_column = "lev1"
    assert fd.read_annotations(str(tmp_path / "dev.txt"), args)[0].labels == ["Strings", "Strings"]


def test_errors_in_annotations_are_named(tmp_path):
    for name in ("a.png", "negative.png", "one/same.png", "two/same.png", "strip.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40) if name != "strip.png" else (1, 200)).save(tmp_path / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=turned)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    boxes = [[1, 1, 20, 20], [5, 5, 5.5, 20], [30, 30, 70, 39], [1, 1, 9, 9], [-0.5, -1, 61, 40], [1, 1, 20, 20]]
    names = ["disc", "disc", "disc", "moon", "square", "disc"]
    others = ("turned.jpg", "missing.png", "broken.png", "dangling.png", "negative.png", "a.png", "same.png", None)
    write_coco(tmp_path / "a.json", [("a.png", (60, 40), boxes, names), *((name, (60, 40), [], []) for name in others),
                                     ("strip.png", (1, 200), [], [])])  # fmt: skip
    good, wrong = fd.check(fd.read_annotations(str(tmp_path / "a.json"), fd.Args()), "", str(tmp_path), ".", {})
    assert [picture.path for picture in good] == ["a.png", "negative.png"]
    assert good[0].boxes == [[1, 1, 20, 20], [0, 0, 60, 40]] and good[0].labels == ["disc", "square"]
    for text in ("a.png: box 5, 5, 5.5, 20 disc: no wider or no higher than a pixel",
                 "a.png: box 30, 30, 70, 39 disc: outside",
                 "a.png: box 1, 1, 9, 9 (no class): its class is missing or unknown",
                 "a.png: box 1, 1, 20, 20 disc: it stands there twice", "a.png: annotated twice",
                 "turned.jpg: annotated as 60 x 40 pixels, but upright it has 40 x 60", "missing.png: there are 0",
                 "broken.png: cannot identify", "dangling.png: ", "one/same.png: there are 2 such images",
                 "image 108 without a file name", "strip.png: a strip of 1 x 200 pixels"):  # fmt: skip
        assert sum(line.startswith(text) for line in wrong) == 1, (text, wrong)
    assert len(wrong) == 12
    command = ["finetune_detect.py", "--data-dir", tmp_path, "--annotations", tmp_path / "a.json", "--weights", "none"]
    done = run(*command, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "12 errors in the annotations" in done.stderr and "--skip-bad" in done.stderr
    done = run(*command, "--check-data", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "2 images with 2 boxes; 12 errors" in done.stdout


def test_short_rows_of_a_table(tmp_path):
    """Rows without a name, without a box, and a box of a mouse click: records with an error, not a traceback."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    header = "image_filename,bounding_box_coordinates,instrument_name\n"
    (tmp_path / "a.csv").write_text(header + 'a.png\na.png,"9,7,9,7",harp\n,"1,1,9,9",harp\na.png,"1,1,9,9",harp\n')
    good, wrong = fd.check(fd.read_annotations(str(tmp_path / "a.csv"), fd.Args()), "", str(tmp_path), ".", {})
    assert [picture.boxes for picture in good] == [[[1, 1, 9, 9]]] and len(wrong) == 3


def test_links_and_huge_images(tmp_path, monkeypatch):
    """A link to the parent shows no image twice; a PNG of 1 kB with 10^9 pixels is refused before it is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # Pillow's own, which importing other scripts lifts
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/up").symlink_to(tmp_path)
    Image.new("1", (32_000, 32_000)).save(tmp_path / "sub/huge.png")
    assert fd.find_images(str(tmp_path)) == ["sub/huge.png"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = fd.Pictures(str(tmp_path), [fd.Picture("sub/huge.png")], [], None, fd.Args())
    image, _, (_, reason) = data[-1, 0]
    assert image is None and "DecompressionBombError" in reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_coco_folder_is_found_by_itself(tmp_path):
    """Roboflow's layout, with the same file name in two splits; a picture that is in two splits is an error."""
    for split, value in (("train", 10), ("valid", 20), ("test", 30)):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 40), (value, 0, 0)).save(tmp_path / split / "0.jpg")
        write_coco(tmp_path / split / "_annotations.coco.json", [("0.jpg", (40, 40), [[1, 1, 9, 9]], ["disc"])])
    folder, pictures = fd.load_pictures(fd.Args(data_dir=str(tmp_path)))
    assert folder == str(tmp_path)
    assert [(p.path, p.split) for p in pictures] == [
        (f"{a}/0.jpg", b) for a, b in zip(("train", "valid", "test"), fd.SPLITS)
    ]
    leak = write_coco(tmp_path / "leak.json", [("valid/0.jpg", (40, 40), [[1, 1, 9, 9]], ["disc"])])
    args = fd.Args(data_dir=str(tmp_path), annotations=str(leak), val_annotations=str(leak))
    with pytest.raises(SystemExit, match="1 errors in the annotations"):
        fd.load_pictures(args)


def test_voc_2007(tmp_path, monkeypatch):
    for k, split in enumerate(fd.SPLITS):
        write_voc(
            tmp_path / f"data/VOCdevkit/VOC2007/Annotations/{k}.xml", f"{k}.jpg", (40, 40), [([1, 1, 9, 9], "cat")]
        )
        for folder in ("JPEGImages", "ImageSets/Main"):
            (tmp_path / "data/VOCdevkit/VOC2007" / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / f"data/VOCdevkit/VOC2007/JPEGImages/{k}.jpg")
        (tmp_path / f"data/VOCdevkit/VOC2007/ImageSets/Main/{split}.txt").write_text(f"{k}\n")
    monkeypatch.chdir(tmp_path)
    _, pictures = fd.load_pictures(fd.Args(dataset="voc2007", download=True))  # what is there is not downloaded
    assert [(p.path, p.split, p.labels) for p in pictures] == [
        (f"{k}.jpg", s, ["cat"]) for k, s in enumerate(fd.SPLITS)
    ]
    with pytest.raises(SystemExit, match="--dataset voc2007: Dataset not found"):
        fd.load_pictures(fd.Args(dataset="voc2007", data_dir="elsewhere"))


def make(split, *labels, path="x"):
    return fd.Picture(path, [[0, 0, 9, 9]] * len(labels), list(labels), [False] * len(labels), (10, 10), split)


def test_choice_of_classes(capsys):
    def chosen(**flags):
        pictures = [make("train", "lute", "lute", "harp"), make("train", "harp"), make("train", "drum"),
                    make("val", "lute"), make("train"), make("test", "drum")]  # fmt: skip
        classes = fd.choose_classes(fd.Args(**flags), pictures)
        return classes, [picture.labels for picture in fd.keep_classes(pictures, classes)]

    classes, labels = chosen()
    assert classes == ["drum", "harp", "lute"] and len(labels) == 6
    classes, labels = chosen(top_classes=2)
    assert classes == ["harp", "lute"]
    assert labels == [["lute", "lute", "harp"], ["harp"], ["lute"], []]  # negatives stay
    assert "2 boxes of 1 other classes are left out: drum" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--classes harps: in the training images there are lute, harp, drum"):
        chosen(classes=["harps"])


def test_split_by_image():
    pictures = [make("", *(["rare"] if i % 10 == 0 else ["common"]), path=str(i)) for i in range(200)]
    fd.split_pictures(pictures, 1)
    counted = {split: sum(picture.split == split for picture in pictures) for split in fd.SPLITS}
    assert counted == {"train": 100, "val": 50, "test": 50}
    rare = [sum(picture.split == split and picture.labels == ["rare"] for picture in pictures) for split in fd.SPLITS]
    assert rare == [10, 5, 5]
    first = [picture.split for picture in pictures]
    fd.split_pictures(pictures, 2)
    assert first != [picture.split for picture in pictures]


def test_augmentation_moves_boxes_with_the_image_and_can_be_repeated(tmp_path):
    image, boxes, names = canvas(np.random.default_rng(1), 1)
    image.save(tmp_path / "a.png")
    picture = fd.Picture("a.png", [*boxes, [0, 0, 96, 96]], [*names, "disc"], [False, True], image.size)
    x1, y1, x2, y2 = boxes[0]
    plain = fd.Pictures(str(tmp_path), [picture], ["disc", "square"], None, fd.Args(augmentation="none"))
    pixels, target, _ = plain[0, 0]
    assert pixels.dtype == torch.uint8 and target["boxes"].tolist() == [boxes[0]]  # without the crowd
    assert target["labels"].tolist() == [1 + ["disc", "square"].index(names[0])]
    for proposals in (None, {"a.png": boxes}):
        data = fd.Pictures(str(tmp_path), [picture], ["disc", "square"], proposals, fd.Args())
        state, seen = torch.get_rng_state(), set()
        for epoch in range(20):
            flipped, target, _ = data[epoch, 0]
            mirrored = not torch.equal(flipped, pixels)
            seen.add(mirrored)
            expected = [96 - x2, y1, 96 - x1, y2] if mirrored else boxes[0]
            assert target["boxes"].tolist() == [expected] and (not mirrored or torch.equal(flipped, pixels.flip(2)))
            assert proposals is None or target["proposals"].tolist() == [expected]
        assert seen == {True, False} and torch.equal(torch.get_rng_state(), state)
    data = fd.Pictures(str(tmp_path), [picture], ["disc", "square"], None, fd.Args(augmentation="ssd"))
    assert torch.equal(data[3, 0][0], data[3, 0][0]) and len({data[e, 0][0].shape for e in range(12)}) > 3
    assert torch.equal(data[-1, 0][0], pixels)  # evaluation


# ------------------------------------------------------------------------------------------------------------ metrics


def found(*rows):
    """Detections of an image from (box, label, score)."""
    boxes, labels, scores = zip(*rows) if rows else ((), (), ())
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64), "scores": torch.tensor(scores)}  # fmt: skip


def truth(*rows):
    """A picture of 100 x 100 pixels from (box, name, crowd)."""
    boxes, names, crowd = zip(*rows) if rows else ((), (), ())
    return fd.Picture("x", [list(map(float, box)) for box in boxes], list(names), list(crowd), (100, 100))


def test_the_paper_s_ap_by_hand():
    a, b, c = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]
    pictures = [truth((a, "x", False), (b, "x", False)), truth((c, "x", False))]
    third = [53, 50, 63, 60]  # IoU with c: 70 / 130
    boxes = {0: found((a, 1, 0.9), ([70, 70, 80, 80], 1, 0.8)), 1: found((third, 1, 0.7))}
    # by score: right, wrong, right; precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3
    assert paper_ap(pictures, boxes, 0.5) == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert paper_ap(pictures, boxes, 0.6) == pytest.approx(1 / 3)
    # the second of two boxes on the same object is wrong, and gone if it overlaps the first by 0.45
    twice = {0: found((a, 1, 0.9), ([4, 0, 14, 10], 1, 0.8), (b, 1, 0.04)), 1: found((c, 1, 0.7))}
    assert paper_ap(pictures, twice, 0.1) == pytest.approx(1 / 3 + 2 / 3 * 3 / 4)
    near = [0, 3, 10, 13]  # IoU with a: 70 / 130
    assert paper_ap(pictures, {0: found((a, 1, 0.9), (near, 1, 0.8), (b, 1, 0.7)), 1: found()}, 0.1) == pytest.approx(
        2 / 3
    )
    # a miss before takes no object away
    miss = {0: found(([0, 0, 4, 4], 1, 0.9), (a, 1, 0.8)), 1: found()}
    assert paper_ap(pictures, miss, 0.5) == pytest.approx(1 / 3 * 1 / 2)
    # ties: the order of the images decides
    tied = {0: found(([70, 70, 80, 80], 1, 0.5)), 1: found((c, 1, 0.5))}
    assert paper_ap(pictures, tied, 0.5) == pytest.approx(1 / 3 * 1 / 2)
    assert paper_ap(pictures, {0: found(), 1: found()}, 0.5) == 0.0
    assert math.isnan(fd.paper_ap(pictures, boxes, "y", 2, 0.5))
    # a crowd is neither expected nor wrong
    crowd = [truth((a, "x", False), (b, "x", True))]
    assert paper_ap(crowd, {0: found((b, 1, 0.9), (a, 1, 0.8))}, 0.5) == 1.0


def paper_ap(pictures, boxes, iou):
    return fd.paper_ap(pictures, boxes, "x", 1, iou)


def random_case(seed, images=40):
    """Objects of three classes in separate places, some missed, some boxes inaccurate, some of nothing."""
    rng = np.random.default_rng(seed)
    pictures, boxes = [], {}
    for i in range(images):
        corners = np.stack(np.divmod(rng.permutation(9), 3), axis=1) * 33
        n = int(rng.integers(0, 6))
        rows = [([*xy, *(xy + rng.integers(15, 28, size=2))], "abc"[rng.integers(3)], rng.random() < 0.1)
                for xy in corners[:n]]  # fmt: skip
        pictures.append(truth(*rows))
        seen = [(np.clip(np.array(box) + rng.normal(0, 2, 4), 0, 100).tolist(), "abc".index(name) + 1,
                 rng.uniform(0.06, 1)) for box, name, _ in rows if rng.random() < 0.8]  # fmt: skip
        seen += [([*map(float, corners[8]), *(corners[8] + 20.0)], int(rng.integers(1, 4)), 0.3 + 0.2 * rng.random())]
        boxes[i] = found(*seen)
    return pictures, boxes


@pytest.mark.parametrize("seed", range(3))
def test_coco_s_and_the_paper_s_ap_agree(seed):
    """They differ here in the integration only: over 101 points of the curve, and over all."""
    metrics = fd.measure(*random_case(seed), list("abc"))
    assert np.mean([metrics[f"AP/{name}"] for name in "abc"]) == pytest.approx(metrics["AP"])
    assert metrics["AP@0.5"] == pytest.approx(metrics["AP50"], abs=0.01) and metrics["AP@0.1"] >= metrics["AP@0.5"]
    assert 0.3 < metrics["AP"] < metrics["AP50"] < 0.95


def test_metrics_without_predictions_or_truth():
    empty = fd.measure([truth(([0, 0, 9, 9], "a", False))], {0: found()}, ["a", "b"])
    assert (empty["AP"], empty["AP@0.5"], empty["AP@0.5/a"]) == (0, 0, 0) and math.isnan(empty["AP@0.5/b"])
    perfect = fd.measure(
        [truth(([0, 0, 9, 9], "a", False)), truth()], {0: found(([0, 0, 9, 9], 1, 0.9)), 1: found()}, ["a"]
    )
    assert perfect["AP"] == pytest.approx(1) and perfect["AP@0.1"] == 1
    with_nothing = fd.measure([truth()], {0: found(([0, 0, 9, 9], 1, 0.9))}, ["a"])
    assert math.isnan(with_nothing["AP@0.5"])


# ---------------------------------------------------------------------------------------------------------- detectors


def detector(arch, backbone="mobilenet_v3_small", **more):
    args = fd.Args(arch=arch, backbone=backbone, image_size=more.pop("image_size", 64), weights="none", **more)
    model = fd.make_detector(args, 3)
    return model, args


@pytest.mark.parametrize("arch", [*fd.FAMILIES, "yolov3"])
def test_families_train_and_detect(arch):
    """Losses with and without boxes, gradients in all parts, and detections in the pixels of each image."""
    torch.manual_seed(0)
    model, args = detector(arch, learning_rate=1e-3)
    images = [torch.rand(3, 48, 80), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([2])},
               {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]  # fmt: skip
    for target in targets:
        target["proposals"] = torch.tensor([[8.0, 8.0, 42.0, 42.0], [0.0, 0.0, 20.0, 30.0]])
    assert fd.freeze(model, [], args) == []
    model.train()
    optimizer = fd.make_optimizer(args, model)
    losses = model(images, targets)
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, without
    optimizer.step()
    model.eval()
    with torch.no_grad():
        results = model(images, targets)
    if arch in ("fcos", "retinanet"):  # whose first sigmoid is of the background: `detect` leaves its boxes out
        results = [{name: value[each["labels"] > 0] for name, value in each.items()} for each in results]
    for image, result in zip(images, results):
        h, w = image.shape[1:]
        assert set(result) == {"boxes", "labels", "scores"} and result["labels"].dtype == torch.int64
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
        assert set(result["labels"].tolist()) <= {1, 2}


@pytest.mark.parametrize("arch", [*fd.FAMILIES, "ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn", "yolov3"])
def test_one_cut_off_for_all_detectors(arch):
    """Scores from 0.05 on and 100 boxes an image, whatever the detector's own limits are; RetinaNet's are sigmoids."""
    torch.manual_seed(0)
    plain = arch in fd.TORCHVISION
    model, _ = detector(arch, None if plain else "mobilenet_v3_small", image_size=None if plain else 64)
    chooser = getattr(model, "roi_heads", model)
    assert (chooser.score_thresh, chooser.detections_per_img) == (0.05, 100)


def heads_dtypes(model):
    """The dtypes that the convolutions and linear layers outside of the backbone return, in `seen`."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and not name.startswith("backbone."):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    return seen


@pytest.mark.parametrize("arch", [*fd.FAMILIES, "yolov3"])
def test_bfloat16_in_the_backbone_only(arch):
    """As on CUDA, but here on the CPU."""
    torch.manual_seed(0)
    model, args = detector(arch, image_size=128)
    images, boxes = [torch.rand(3, 128, 128)], torch.tensor([[20.0, 20.0, 80.0, 80.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([2]), "proposals": boxes + 3}]
    norms = fd.freeze(model, [name for name in model.state_dict() if name.startswith("backbone.")], args)
    seen, inside, sums = heads_dtypes(model), [], []
    convolution = next(module for module in model.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    for amp in (False, True):
        if amp:
            fd.autocast_backbone(model, "cpu")
        torch.manual_seed(0)
        model.train()
        [module.eval() for module in norms]
        sums.append(sum(model(images, targets).values()))
    sums[1].backward()
    assert inside == [torch.float32, torch.bfloat16] and seen == {torch.float32}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    assert sums[1].dtype == torch.float32 and sums[1].item() == pytest.approx(sums[0].item(), rel=0.1)
    model.eval()
    with torch.no_grad():
        model(images, targets)
    assert inside[2] == torch.float32  # evaluation


@pytest.mark.parametrize("arch", ["fasterrcnn", "retinanet", "fcos", "ssd"])
def test_anchors_at_800_pixels_are_exact(arch):
    """bfloat16 has 8 bits: an anchor at 613.6 would be at 612 or 616. At 128 pixels nothing is seen of it."""
    model, _ = detector(arch, image_size=64)
    fd.autocast_backbone(model.train(), "cpu")
    model.transform.min_size, model.transform.max_size = (64,), 1000  # a strip, for speed
    model.transform.fixed_size = (800, 64) if arch == "ssd" else None
    images, targets = model.transform([torch.rand(3, 64, 800)], [{"boxes": torch.tensor([[613.6, 3.2, 713.3, 37.7]])}])
    assert images.tensors.shape[-1] == 800 and targets[0]["boxes"][0, 0].item() == pytest.approx(613.6, rel=1e-6)
    with torch.no_grad():
        maps = list(model.backbone(images.tensors).values())
    (anchors,) = getattr(model, "rpn", model).anchor_generator(images, maps)
    (exact,) = getattr(model, "rpn", model).anchor_generator(images, [values.double() for values in maps])
    assert anchors.dtype == torch.float32 and torch.allclose(anchors, exact.float(), atol=1e-3)


@pytest.mark.parametrize("arch", ["ssd", "retinanet", "yolov3"])
def test_backbones_of_finetune_classify_fit(arch, tmp_path):
    """A checkpoint of finetune_classify.py and torchvision's file give the backbone its tensors; the rest is new."""
    source = models.mobilenet_v3_small(weights=None).state_dict()
    torch.save(source, tmp_path / "bare.pth")
    trunk = {f"trunk.{name}": value for name, value in source.items() if not name.startswith("classifier.3")}
    torch.save({"model": trunk | {"heads.0.weight": torch.zeros(2, 9)}, "classes": {}}, tmp_path / "classify.pt")
    for path, flag in ((tmp_path / "bare.pth", "weights"), (tmp_path / "classify.pt", "pretrained")):
        model, args = detector(arch)
        args.weights = None
        setattr(args, flag, str(path))
        loaded = fd.load_weights(args, model)
        own = model.state_dict()
        assert len(loaded) == sum(name.startswith("features.") for name in source)
        assert torch.equal(own["backbone.body.0.0.weight"], source["features.0.0.weight"])
        assert all(torch.equal(own[name], source[name.replace("backbone.body.", "features.")]) for name in loaded)
    args.strategy = "off-the-shelf"
    fd.freeze(model, loaded, args)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {name for name, _ in model.named_parameters() if name.startswith("backbone.body.")}


def test_backbones_of_torchvision_s_detectors_fit():
    state = {name: value for name, value in models.resnet50(weights=None).state_dict().items()}
    model = fd.make_detector(fd.Args(arch="fasterrcnn_resnet50_fpn"), 3)
    loaded = fd.load_into(model, state, "a file")
    where = "backbone.body.layer4.2.conv3.weight"
    assert torch.equal(model.state_dict()[where], state["layer4.2.conv3.weight"]) and where in loaded
    with pytest.raises(SystemExit, match="a file is of another architecture: .* tensors do not fit"):
        fd.load_into(model, models.mobilenet_v3_small(weights=None).state_dict(), "a file")


@pytest.mark.parametrize("arch", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large",
                                  "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])  # fmt: skip
def test_a_detector_of_torchvision_gets_a_new_head(arch):
    """COCO's weights (here random ones of that form) go everywhere but into the head."""
    torch.manual_seed(0)
    coco = models.get_model(arch, weights=None, weights_backbone=None, num_classes=91).state_dict()
    torch.manual_seed(1)
    model = fd.make_detector(fd.Args(arch=arch), 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = fd.load_into(model, coco, "coco")
    after = model.state_dict()
    new = set(after) - set(loaded)
    assert new and all(fd.HEAD.search(name) and torch.equal(after[name], before[name]) for name in new)
    assert all(torch.equal(after[name], coco[name]) for name in loaded)
    same = models.get_model(arch, weights=None, weights_backbone=None, num_classes=4).state_dict()
    assert {name: value.shape for name, value in same.items()} == {name: value.shape for name, value in after.items()}


def test_frozen_stays_frozen():
    torch.manual_seed(0)
    model, args = detector("ssd", strategy="fine-tune", unfreeze_from="body.4")
    norms = fd.freeze(model, [name for name in model.state_dict() if name.startswith("backbone.body.")], args)
    model.train()
    [module.eval() for module in norms]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [2.0, 2.0, 60.0, 60.0], [20.0, 20.0, 64.0, 64.0]])
    target = {"boxes": boxes, "labels": torch.tensor([2, 1, 1])}
    for _ in range(2):
        optimizer.zero_grad()
        sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    body = {name for name in changed if name.startswith("backbone.body.")}
    assert {int(name.split(".")[2]) for name in body} == set(range(4, 13))
    assert not any("running" in name for name in body)
    with pytest.raises(SystemExit, match="--unfreeze-from layer9: no module has that name"):
        fd.freeze(model, [], fd.Args(unfreeze_from="layer9"))


def test_batch_normalisation_from_scratch():
    model, args = detector("ssd", strategy="scratch")
    assert fd.freeze(model, [], args) == []
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_external_proposals_are_scaled_with_the_image():
    model, _ = detector("fastrcnn", image_size=64)
    model.eval()
    seen = []
    model.roi_heads.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    image = torch.rand(3, 32, 48)
    with torch.no_grad():
        model([image], [{"proposals": torch.tensor([[0.0, 8.0, 24.0, 16.0]])}])
    assert torch.allclose(seen[0][0], torch.tensor([[0.0, 16.0, 48.0, 32.0], [0.0, 0.0, 96.0, 64.0]]), atol=0.1)


# --------------------------------------------------------------------------------------------------------- whole runs
TIMES = ("charts/seconds_per_update", "charts/seconds_waiting_for_data")


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A finished run from scratch: (its folder, what it printed)."""
    cwd = tmp_path_factory.mktemp("trained")
    more = ["--strategy", "scratch", "--epochs", 9, "--learning-rate", 0.01, "--backbone", "resnet18"]
    out = run("finetune_detect.py", *flags(shapes, *more), cwd=cwd).stdout
    return only_run(cwd / "runs"), out


def test_a_run_learns_and_leaves_what_it_should(trained, shapes):
    folder, out = trained
    logged = scalars(folder, TIMES)
    assert len(logged["train/loss"]) == 9 and {"losses/classification", "val/AP", "test/AP@0.1"} <= set(logged)
    losses = [value for _, value in logged["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]
    assert logged["test/AP@0.5"][0][1] > 0.5, logged["test/AP@0.5"]
    checkpoint = torch.load(folder / "finetune_detect.pt")
    assert checkpoint["classes"] == ["disc", "square"]
    assert checkpoint["best"] == pytest.approx(max(value for _, value in logged["val/AP@0.5"]))
    rates = [value for _, value in logged["charts/learning_rate"]]
    assert rates == pytest.approx([0.01] * 6 + [0.001] * 2 + [0.0001])
    with open(folder / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["disc", "square"]
    assert np.mean([float(row["AP@0.5"]) for row in rows]) == pytest.approx(logged["test/AP@0.5"][0][1], abs=1e-4)
    with open(folder / "split.csv") as file:
        splits = [row["split"] for row in csv.DictReader(file)]
    assert [splits.count(split) for split in fd.SPLITS] == [32, 8, 8]
    assert Image.open(folder / "curves.png").size[0] > 500
    images = [(path, shapes / "images" / path.name) for path in sorted((folder / "detections/test").iterdir())]
    drawn = [(np.asarray(Image.open(one)) != np.asarray(Image.open(other))).any() for one, other in images]
    assert len(drawn) == 8 and sum(drawn) >= 4  # one has no object
    # the first progress line, after one of eight updates in the first of nine epochs, has the time left of all of them
    found = re.search(r"epoch 1/9 12.5% .* ([\d.]+) s/update.*ETA (\d+):(\d+):(\d+)", out)
    hours, minutes, seconds = map(int, found.groups()[1:])
    assert hours * 3600 + minutes * 60 + seconds > (float(found[1]) - 0.006) * (8 * 9 - 1) - 1
    assert "s/update" in out and "waiting for data" in out and "the momentum of the others 0.1" in out
    assert not list(folder.glob("*.tmp"))


def test_evaluate_and_predict(trained, shapes, tmp_path):
    folder, _ = trained
    out = run("finetune_detect.py", "--evaluate", folder, cwd=tmp_path).stdout
    logged = scalars(folder)
    assert f"on 8 test images: AP {logged['test/AP'][0][1]:.4f}, AP50 {logged['test/AP50'][0][1]:.4f}" in out
    other = ["--evaluate", folder / "finetune_detect.pt", "--annotations", shapes / "val.json"]
    out = run("finetune_detect.py", *other, cwd=tmp_path).stdout
    epoch = torch.load(folder / "finetune_detect.pt")["epoch"]
    assert f"on 8 test images: AP {dict(logged['val/AP'])[epoch]:.4f}" in out
    (tmp_path / "new").mkdir()
    image, boxes, _ = canvas(np.random.default_rng(5), 2)
    image.save(tmp_path / "new/one.png")
    (tmp_path / "new/bad.jpg").write_bytes(b"nothing")
    (tmp_path / "new" / os.fsdecode(b"\xff.png")).write_bytes((tmp_path / "new/one.png").read_bytes())
    out = run("finetune_detect.py", "--evaluate", folder, "--predict", "new", cwd=tmp_path).stdout
    assert "bad.jpg cannot be read" in out
    results = json.loads((folder / "predictions.json").read_text())
    assert {row["file_name"] for row in results} == {"one.png", os.fsdecode(b"\xff.png")}
    best = max(results, key=lambda row: row["score"])
    x, y, w, h = best["bbox"]
    overlap = fd.box_iou(torch.tensor([[x, y, x + w, y + h]]), torch.tensor(boxes, dtype=torch.float32)).max()
    assert overlap > 0.5 and best["category"] == ["disc", "square"][best["category_id"] - 1]
    assert (np.asarray(Image.open(folder / "pictures/one.png")) != np.asarray(image)).any()
    done = run("finetune_detect.py", "--evaluate", folder, "--image-size", 64, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "is of a run with image_size 96, not 64" in done.stderr


def test_evaluation_of_a_run_without_test_images_is_of_its_validation_images(shapes, tmp_path):
    command = flags(shapes, "--strategy", "scratch", "--epochs", 1)
    at = command.index("--test-annotations")
    run("finetune_detect.py", *command[:at], *command[at + 2 :], cwd=tmp_path)
    folder = only_run(tmp_path / "runs")
    out = run("finetune_detect.py", "--evaluate", folder, cwd=tmp_path).stdout
    assert f"on 8 val images: AP {scalars(folder)['val/AP'][0][1]:.4f}" in out
    assert not any(tag.startswith("test/") for tag in scalars(folder))


def start(command, cwd, **options):
    words = [sys.executable, str(ROOT / "finetune_detect.py"), *map(str, command), "--no-cuda"]
    return subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(pattern, cwd, process):
    while not list(cwd.glob(pattern)) and process.poll() is None:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_process_group_leaves_a_run_that_resumes(number, shapes, tmp_path):
    """As `timeout` and schedulers send it: the workers get it, too. The resumed run is the straight one, bit by bit."""
    more = ["--strategy", "scratch", "--epochs", 3, "--batch-size", 2, "--exp-name", "detector", "--workers", 2]
    run("finetune_detect.py", *flags(shapes, *more, "--logdir", "whole"), cwd=tmp_path)
    process = start(flags(shapes, *more, "--logdir", "parts"), tmp_path, start_new_session=True)
    wait_for("parts/*/detector.pt", tmp_path, process)  # the first epoch is over
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, (out, err)
    folder = only_run(tmp_path / "parts")
    assert f"--resume {folder.relative_to(tmp_path)} goes on" in err
    assert torch.load(folder / "detector_last.pt")["epoch"] < 3 and not list(folder.glob("*.tmp"))
    run("finetune_detect.py", "--resume", folder, cwd=tmp_path)
    whole, parts = (torch.load(only_run(tmp_path / name) / "detector_last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    logged = scalars(folder, TIMES)
    assert logged == scalars(only_run(tmp_path / "whole"), TIMES)
    # a finished run that is resumed writes no point again
    out = run("finetune_detect.py", "--resume", folder, cwd=tmp_path).stdout
    assert "the run is finished and tested" in out and scalars(folder, TIMES) == logged
    done = run("finetune_detect.py", "--resume", folder, "--seed", 9, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "is of a run with seed 1, not 9" in done.stderr


def test_a_run_whose_reader_or_worker_goes_away(shapes, tmp_path):
    """`| head`, and a worker that the kernel kills: one line and a checkpoint."""
    more = ["--strategy", "scratch", "--epochs", 50, "--workers", 2]
    process = start(flags(shapes, *more), tmp_path)
    wait_for("runs/*/finetune_detect.pt", tmp_path, process)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 130 and "goes on" in err and "Traceback" not in err, err
    shutil.rmtree(tmp_path / "runs")
    process = start(flags(shapes, *more), tmp_path)
    wait_for("runs/*/finetune_detect.pt", tmp_path, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on" in err and "Traceback" not in err, err
    assert "optimizer" in torch.load(only_run(tmp_path / "runs") / "finetune_detect_last.pt")


def test_a_full_disk_ends_the_run_with_one_line(shapes, tmp_path):
    """A limit on the size of files stands for it: no file of a temporary name is left."""
    limit = (1_000_000, 1_000_000)
    process = start(flags(shapes, "--strategy", "scratch"), tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "_last.pt cannot be written: " in err and err.strip().count("\n") == 0, err
    assert not list(tmp_path.glob("runs/*/*.tmp")) and not list(tmp_path.glob("runs/*/*.pt"))


def test_results_do_not_depend_on_workers(shapes, tmp_path):
    """Regions of Faster R-CNN are drawn by the generator of the training process, which workers do not touch."""
    for workers in (0, 2):
        more = ["--arch", "fasterrcnn", "--strategy", "scratch", "--epochs", 1, "--logdir", workers]
        run("finetune_detect.py", *flags(shapes, *more, "--workers", workers), cwd=tmp_path)
    one, other = (scalars(only_run(tmp_path / name), TIMES) for name in ("0", "2"))
    assert one == other and "losses/rpn_box_reg" in one


def test_training_images_that_cannot_be_read_end_the_run(shapes, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(shapes / "images", images)
    for path in images.glob("train_*.png"):
        Image.open(path).save(path, "jpeg")
        path.write_bytes(path.read_bytes()[:-200])  # the header is there, the end is not
    command = [*flags(shapes, "--strategy", "scratch"), "--data-dir", images]
    ended = run("finetune_detect.py", *command, cwd=tmp_path, check=False)
    assert ended.returncode == 1 and "none of the training images could be read" in ended.stderr


def test_one_file_is_split_and_the_split_kept(shapes, tmp_path):
    more = ["--strategy", "off-the-shelf", "--epochs", 1, "--warmup-iterations", 0]
    torch.save(models.mobilenet_v3_small(weights=None).state_dict(), tmp_path / "w.pth")
    command = ["--data-dir", shapes / "images", "--annotations", shapes / "train.json", *SMALL[:-2]]
    out = run("finetune_detect.py", *command, "--weights", "w.pth", *more, cwd=tmp_path).stdout
    assert "16 (" in out and "8 (" in out and "frozen" in out
    folder = only_run(tmp_path / "runs")
    assert scalars(folder)["charts/learning_rate"][0][1] == pytest.approx(0.0000625 * 4)  # without warm-up
    again = run("finetune_detect.py", "--evaluate", folder, cwd=tmp_path).stdout
    assert f"on 8 test images: AP {scalars(folder)['test/AP'][0][1]:.4f}" in again
    chain = ["--pretrained", folder, "--single-class", "--epochs", 1, "--logdir", "next", "--seed", 2]
    chain += ["--split-file", folder / "split.csv"]
    out = run("finetune_detect.py", *command, *chain, cwd=tmp_path).stdout  # another number of classes
    assert "1 classes: object" in out
    assert (only_run(tmp_path / "next") / "split.csv").read_text() == (folder / "split.csv").read_text()


def test_the_head_of_a_chain_is_not_the_one_that_its_source_began_with(shapes, tmp_path):
    more = ["--strategy", "scratch", "--epochs", 1, "--learning-rate", 0]
    run("finetune_detect.py", *flags(shapes, *more), cwd=tmp_path)
    source = only_run(tmp_path / "runs")
    more = ["--pretrained", source, "--epochs", 1, "--learning-rate", 0, "--logdir", "next"]
    run("finetune_detect.py", *flags(shapes, *more), cwd=tmp_path)
    one, other = (torch.load(f / "finetune_detect_last.pt")["model"] for f in (source, only_run(tmp_path / "next")))
    heads = [name for name in one if fd.HEAD.search(name) and name.endswith("weight")]
    assert heads and not any(torch.equal(one[name], other[name]) for name in heads)
    assert all(torch.equal(one[name], other[name]) for name in one if "body" in name and name.endswith("weight"))


def test_fast_rcnn_on_a_file_of_proposals(shapes, tmp_path):
    pictures = [fd.read_annotations(str(shapes / f"{split}.json"), fd.Args()) for split in fd.SPLITS]
    boxes = {picture.path: [*picture.boxes, [3, 3, 40, 40]] for each in pictures for picture in each}
    (tmp_path / "proposals.json").write_text(json.dumps(boxes))
    more = ["--arch", "fastrcnn", "--proposals", "proposals.json", "--epochs", 1, "--strategy", "scratch"]
    run("finetune_detect.py", *flags(shapes, *more), cwd=tmp_path)
    logged = scalars(only_run(tmp_path / "runs"))
    assert {"losses/box_reg", "losses/classifier", "train/loss"} <= set(logged) and "losses/rpn_box_reg" not in logged


def test_a_checkpoint_writes_nothing_outside_of_its_folder(trained, tmp_path):
    """Names in a file that somebody else made: the run's name and folder come from the command line and its place."""
    checkpoint = torch.load(trained[0] / "finetune_detect_last.pt")
    checkpoint["args"] |= {"exp_name": "../escaped", "logdir": str(tmp_path / "elsewhere"), "epochs": 10}
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run/evil_last.pt")
    done = run("finetune_detect.py", "--resume", tmp_path / "run", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "--exp-name ../escaped is not the name of a file" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil_last.pt", "run"]


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "--data-dir: the images' folder is needed"),
        ("--data-dir nowhere", "--data-dir nowhere: there is no such folder"),
        ("--data-dir {images}", "--annotations: a file or folder with boxes is needed"),
        ("{data} no.json", "no.json: no annotations in a known format (FileNotFoundError"),
        ("{data} empty.json", "empty.json: no annotations in a known format"),
        ("{data} {train} --arch yolov5", "--arch yolov5: there are fasterrcnn, fastrcnn"),
        ("{data} {train} --arch ssd --backbone resnet19", "--backbone resnet19: torchvision has"),
        ("{data} {train} --arch ssd --backbone vit_b_16", "no feature maps at strides 8"),
        ("{data} {train} --arch fcos_resnet50_fpn --backbone resnet18", "has its own"),
        ("{data} {train} --arch yolov3", "--weights yolov3.weights or darknet53.conv.74"),
        ("{data} {train} --arch yolov3 --weights empty.json", "empty.json"),
        ("{data} {train} --arch yolov3 --image-size 100 --weights none", "yolov3 needs a multiple of 32"),
        ("{data} {train} --arch ssd --weights x.pth", "--weights x.pth: neither a file nor one"),
        ("{data} {train} --arch fastrcnn", "--arch fastrcnn needs --proposals"),
        ("{data} {train} --unfreeze-from layer3 --strategy scratch", "--unfreeze-from is for --strategy fine-tune"),
        ("{data} {train} --strategy off-the-shelf --weights none", "needs trained layers"),
        ("{data} {train} --strategy scratch --pretrained x.pt", "no --pretrained"),
        ("{data} {train} --pretrained x.pt", "no file at x.pt"),
        ("{data} {train} --seed -1", "--seed must be between 0 and"),
        ("{data} {train} --workers -1", "--workers must be between 0 and"),
        ("{data} {train} --learning-rate -1", "--learning-rate must be between 0 and"),
        ("{data} {train} --weights none --logdir empty.json", "empty.json/train__"),
        ("{data} {train} --exp-name a/b", "--exp-name a/b is not the name of a file"),
        ("--evaluate empty.json", "empty.json cannot be loaded"),
        ("--evaluate .", "no file at ./(0 checkpoints)"),
        ("--predict {images}", "--predict needs a trained detector"),
    ],
)
def test_bad_input_gets_one_line(words, says, shapes, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    data = f"--data-dir {shapes / 'images'} --annotations"
    words = words.format(images=shapes / "images", train=shapes / "train.json", data=data).split()
    done = run("finetune_detect.py", *words, cwd=tmp_path, check=False)
    assert done.returncode == 1 and says in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    assert "weights_only" not in done.stderr
