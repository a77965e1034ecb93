"""Detection: annotations and their defects, detectors, metrics, and whole runs on pictures made here."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import finetune_detect as fd
import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, run, scalars
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import models

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
    """The same two boxes in five formats; pixels of VOC count from 1 with both ends in the box."""
    expected = [([10.0, 20.0, 30.0, 50.0], "harp"), ([0.0, 0.0, 100.0, 80.0], "lute")]
    args = fd.Args()
    voc = tmp_path / "VOC/Annotations"
    voc.mkdir(parents=True)
    objects = ""
    for difficult, ((x1, y1, x2, y2), name) in enumerate(expected):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2))
        box = "".join(f"<{side}>{value:g}</{side}>" for side, value in corners)
        objects += f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
    size = "<size><width>100</width><height>80</height></size>"
    (voc / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{size}{objects}</annotation>")
    (tmp_path / "VOC/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "VOC/ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "dev.txt").write_text(
        ",image_filename,id,bounding_box_coordinates,instrument_name,area_of_bounding_box,lev1\n"
        '0,a.jpg,5,"10,20,30,50",Harp (3285),600,Strings\n1,a.jpg,6,"0,0,100,80",lute,8000,Strings\n'
    )
    (tmp_path / "keras.txt").write_text("/some/where/a.jpg 10,20,30,50,harp\n/some/where/a.jpg 0,0,100,80,lute\n")
    pictures = [("a.jpg", (100, 80), [box for box, _ in expected], [name for _, name in expected])]
    write_coco(tmp_path / "a.json", pictures, ("harp", "lute"), (90, 3))
    for path in (voc, tmp_path / "VOC/ImageSets/Main/train.txt", tmp_path / "dev.txt", tmp_path / "keras.txt",
                 tmp_path / "a.json"):  # fmt: skip
        (picture,) = fd.read_annotations(str(path), args)
        assert picture.path == "a.jpg" and picture.boxes == [box for box, _ in expected], path
        assert [name.lower() for name in picture.labels] == ["harp", "lute"]
        assert picture.crowd == [False, path.name in ("Annotations", "train.txt")]  # VOC's difficult objects
    args.label_column = "lev1"
    assert fd.read_annotations(str(tmp_path / "dev.txt"), args)[0].labels == ["Strings", "Strings"]


def test_errors_in_annotations_are_named(tmp_path, capsys):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGB", (60, 40)).save(tmp_path / "negative.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    boxes = [[1, 1, 20, 20], [5, 5, 5.5, 20], [30, 30, 70, 39], [1, 1, 9, 9], [-0.5, -1, 61, 40]]
    names = ["disc", "disc", "disc", "moon", "square"]
    write_coco(tmp_path / "a.json", [("a.png", (60, 40), boxes, names), ("turned.jpg", (60, 40), [], []),
                                     ("missing.png", (1, 1), [], []), ("broken.png", (60, 40), [], []),
                                     ("negative.png", (60, 40), [], [])])  # fmt: skip
    good, wrong = fd.check(fd.read_annotations(str(tmp_path / "a.json"), fd.Args()), str(tmp_path))
    assert [picture.path for picture in good] == ["a.png", "negative.png"]
    assert good[0].boxes == [[1, 1, 20, 20], [0, 0, 60, 40]] and good[0].labels == ["disc", "square"]
    for text in ("a.png: box 5, 5, 5.5, 20 disc: no wider or no higher than a pixel",
                 "a.png: box 30, 30, 70, 39 disc: outside",
                 "a.png: box 1, 1, 9, 9 (no class): its class is missing or unknown",
                 "turned.jpg: annotated as 60 x 40 pixels, but it has 40 x 60, its boxes are of the image before",
                 "missing.png: there is no such image", "broken.png: cannot be read"):  # fmt: skip
        assert sum(line.startswith(text) for line in wrong) == 1, (text, wrong)
    assert len(wrong) == 6
    command = ["finetune_detect.py", "--data-dir", tmp_path, "--annotations", tmp_path / "a.json", "--weights", "none"]
    done = run(*command, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "6 errors in the annotations" in done.stderr and "--skip-bad" in done.stderr
    done = run(*command, "--check-data", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "2 images with 2 boxes; 6 errors" in done.stdout


def test_a_box_of_a_click_is_an_error_in_every_format(tmp_path, capsys):
    """A mouse click, for VOC a box of one pixel: real ones are in the blood cells of BCCD. All are listed."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "xml").mkdir()
    box = "<xmin>9</xmin><ymin>7</ymin><xmax>9</xmax><ymax>7</ymax>"
    click = f"<object><name>disc</name><bndbox>{box}</bndbox></object>"
    (tmp_path / "xml/a.xml").write_text(f"<annotation><filename>a.png</filename>{click * 101}</annotation>")
    (tmp_path / "lines.txt").write_text("a.png 9,7,9,7,0\n")
    for name, count in (("xml", 101), ("lines.txt", 1)):
        args = fd.Args(data_dir=str(tmp_path), annotations=str(tmp_path / name))
        with pytest.raises(SystemExit, match=f"{count} errors in the annotations, (the first 100 )?listed above"):
            fd.load_pictures(args)
        assert capsys.readouterr().out.count("no wider or no higher than a pixel") == min(count, 100)
        args.check_data = True
        with pytest.raises(SystemExit):
            fd.load_pictures(args)
        assert capsys.readouterr().out.count("no wider or no higher than a pixel") == count


def make(split, *labels, path="x"):
    return fd.Picture(path, [[0, 0, 9, 9]] * len(labels), list(labels), [False] * len(labels), (10, 10), split)


def test_choice_of_classes(capsys):
    def pictures():
        return [make("train", "lute", "lute", "harp"), make("train", "harp"), make("train", "drum"),
                make("val", "lute"), make("train"), make("test", "drum")]  # fmt: skip

    kept, classes = fd.choose_classes(fd.Args(), pictures())
    assert classes == ["drum", "harp", "lute"] and len(kept) == 6
    kept, classes = fd.choose_classes(fd.Args(top_classes=2), pictures())
    assert classes == ["harp", "lute"]
    assert [picture.labels for picture in kept] == [["lute", "lute", "harp"], ["harp"], ["lute"], []]  # negatives stay
    assert "2 boxes of 1 other classes are left out: drum" in capsys.readouterr().out
    kept, classes = fd.choose_classes(fd.Args(single_class=True), pictures())
    assert classes == ["object"] and {label for picture in kept for label in picture.labels} == {"object"}
    with pytest.raises(SystemExit, match="--classes harps: no training image has it, did you mean harp"):
        fd.choose_classes(fd.Args(classes=["harps"]), pictures())


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
    assert fd.paper_ap(pictures, boxes, ["x"], 0.5) == {"x": pytest.approx(1 / 3 + 1 / 3 * 2 / 3)}
    assert fd.paper_ap(pictures, boxes, ["x"], 0.6) == {"x": pytest.approx(1 / 3)}
    # the second of two boxes on the same object is wrong; one below the threshold of 0.05 does not count
    near = [0, 3, 10, 13]  # IoU with a: 70 / 130 < 0.45 would survive suppression only without it
    twice = {0: found((a, 1, 0.9), ([4, 0, 14, 10], 1, 0.8), (b, 1, 0.04)), 1: found((c, 1, 0.7))}
    assert fd.paper_ap(pictures, twice, ["x"], 0.1)["x"] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert fd.paper_ap(pictures, {0: found((a, 1, 0.9), (near, 1, 0.8)), 1: found()}, ["x"], 0.1)["x"] == 1 / 3
    # ties: the order of the images decides
    tied = {0: found(([70, 70, 80, 80], 1, 0.5)), 1: found((c, 1, 0.5))}
    assert fd.paper_ap(pictures, tied, ["x"], 0.5)["x"] == pytest.approx(1 / 3 * 1 / 2)
    assert fd.paper_ap(pictures, {0: found(), 1: found()}, ["x"], 0.5) == {"x": 0.0}
    assert math.isnan(fd.paper_ap(pictures, boxes, ["x", "y"], 0.5)["y"])
    # a crowd is neither expected nor wrong
    crowd = [truth((a, "x", False), (b, "x", True))]
    assert fd.paper_ap(crowd, {0: found((b, 1, 0.9), (a, 1, 0.8))}, ["x"], 0.5) == {"x": 1.0}


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
def test_coco_metrics_against_pycocotools_from_files(seed, tmp_path):
    """Against an evaluation from JSON files that pycocotools reads itself."""
    pictures, boxes = random_case(seed)
    images = [{"id": i} for i in range(len(pictures))]
    annotations, results = [], []
    for i, picture in enumerate(pictures):
        for (x1, y1, x2, y2), name, crowd in zip(picture.boxes, picture.labels, picture.crowd):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": "abc".index(name) + 1}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(crowd)}
            annotations.append(entry)
        for (x1, y1, x2, y2), label, score in zip(*(boxes[i][k].tolist() for k in ("boxes", "labels", "scores"))):
            results.append({"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    categories = [{"id": n, "name": name} for n, name in enumerate("abc", 1)]
    (tmp_path / "gt.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (tmp_path / "dt.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "gt.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "dt.json")), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    metrics = fd.measure(pictures, boxes, list("abc"))
    assert [metrics[name] for name in ("AP", "AP50", "AP75")] == pytest.approx(evaluation.stats[:3].tolist(), abs=1e-12)
    assert np.mean([metrics[f"AP/{name}"] for name in "abc"]) == pytest.approx(metrics["AP"])
    # The paper's AP differs here in the integration only, over all points of the curve and not over 101
    assert metrics["AP@0.5"] == pytest.approx(metrics["AP50"], abs=0.01) and metrics["AP@0.1"] >= metrics["AP@0.5"]


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
    fd.plain_norms(model)
    return model, args


@pytest.mark.parametrize("arch", [*fd.FAMILIES, "yolov3"])
def test_families_train_and_detect(arch):
    """Losses with and without boxes, gradients in all parts, and detections in the pixels of each image."""
    torch.manual_seed(0)
    model, args = detector(arch)
    images = [torch.rand(3, 48, 80), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([2])},
               {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]  # fmt: skip
    for target in targets:
        target["proposals"] = torch.tensor([[8.0, 8.0, 42.0, 42.0], [0.0, 0.0, 20.0, 30.0]])
    frozen = fd.Frozen(model, [], args)
    frozen.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses = model(images, targets)
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, without
    optimizer.step()
    model.eval()
    with torch.no_grad():
        results = model(images, targets)
    for image, result in zip(images, results):
        h, w = image.shape[1:]
        assert set(result) == {"boxes", "labels", "scores"} and result["labels"].dtype == torch.int64
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
        assert set(result["labels"].tolist()) <= {1, 2}


@pytest.mark.parametrize("arch", [*fd.FAMILIES, "yolov3"])
def test_families_train_in_bfloat16(arch):
    """As the script does on CUDA, but here on the CPU: losses and gradients in float32, near those without it."""
    torch.manual_seed(0)
    # not 64 pixels: oneDNN leaves gradients of convolutions over a single pixel undefined in bfloat16
    model, args = detector(arch, image_size=128)
    images = [torch.rand(3, 128, 128)] * 2
    targets = [{"boxes": torch.tensor([[20.0, 20.0, 80.0, 80.0]]), "labels": torch.tensor([2]),
                "proposals": torch.tensor([[16.0, 16.0, 84.0, 84.0]])}] * 2  # fmt: skip
    fd.Frozen(model, [name for name in model.state_dict() if name.startswith("backbone.")], args).train()
    sums, calls = {}, []
    for name, module in model.named_modules():  # bfloat16 is really used
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: calls.append(output.dtype))
    for amp in (False, True):
        torch.manual_seed(0)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses = model(images, targets)
        assert set(calls) == {torch.bfloat16 if amp else torch.float32}
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
        sums[amp] = loss.item()
    assert sums[True] == pytest.approx(sums[False], rel=0.1)


@pytest.mark.parametrize("arch, trained", [("ssd", 14), ("retinanet", 30), ("yolov3", 0)])
def test_backbones_of_finetune_classify_fit(arch, trained, tmp_path):
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
    fd.Frozen(model, loaded, args)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {name for name, _ in model.named_parameters() if name.startswith("backbone.body.")}


def test_backbones_of_torchvision_s_detectors_fit():
    with torch.device("meta"):
        shapes = [
            {k: v.shape for k, v in net(weights=None).state_dict().items()} for net in (models.vgg16, models.resnet50)
        ]
    vgg, resnet = ({k: torch.rand(v) for k, v in each.items() if not k.startswith("classifier")} for each in shapes)
    for arch, state, where, there in (
        ("ssd300_vgg16", vgg, "backbone.features.21.weight", "features.21.weight"),
        ("ssd300_vgg16", vgg, "backbone.extra.0.1.weight", "features.24.weight"),
        ("fasterrcnn_resnet50_fpn", resnet, "backbone.body.layer4.2.conv3.weight", "layer4.2.conv3.weight"),
    ):
        model = fd.make_detector(fd.Args(arch=arch), 3)
        loaded = fd.load_into(model, state, "a file")
        assert torch.equal(model.state_dict()[where], state[there]) and where in loaded
    with pytest.raises(SystemExit, match="a file is of another architecture: .* tensors do not fit"):
        fd.load_into(model, vgg, "a file")


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
    assert new and all(fd.is_head(name) and torch.equal(after[name], before[name]) for name in new)
    assert all(torch.equal(after[name], coco[name]) for name in loaded)
    same = models.get_model(arch, weights=None, weights_backbone=None, num_classes=4).state_dict()
    assert {name: value.shape for name, value in same.items()} == {name: value.shape for name, value in after.items()}


def test_frozen_stays_frozen():
    torch.manual_seed(0)
    model, args = detector("ssd", strategy="fine-tune", trainable_backbone_layers=2)
    loaded = [name for name in model.state_dict() if name.startswith("backbone.body.")]
    frozen = fd.Frozen(model, loaded, args)
    frozen.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [2.0, 2.0, 60.0, 60.0], [20.0, 20.0, 64.0, 64.0]])
    target = {"boxes": boxes, "labels": torch.tensor([2, 1, 1])}
    for _ in range(2):
        optimizer.zero_grad()
        sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # of mobilenet_v3_small: 0 is stride 2, 1 is 4, 2-3 are 8, 4-8 are 16, 9-12 are 32
    body = {int(name.split(".")[2]) for name in changed if name.startswith("backbone.body.")}
    assert body == set(range(4, 13)) and not any(
        "running" in name for name in changed if name.startswith("backbone.body.")
    )
    assert [len(group) for group in fd.stages(model)] == [1, 1, 2, 5, 4]


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


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A finished run from scratch: (its folder, what it printed)."""
    cwd = tmp_path_factory.mktemp("trained")
    more = ["--strategy", "scratch", "--epochs", 9, "--learning-rate", 0.01, "--backbone", "resnet18"]
    out = run("finetune_detect.py", *flags(shapes, *more), cwd=cwd).stdout
    return only_run(cwd / "runs"), out


def test_a_run_learns_and_leaves_what_it_should(trained):
    folder, out = trained
    logged = scalars(folder, ("charts/seconds_per_update", "charts/seconds_waiting_for_data"))
    epochs = len(logged["train/loss"])
    assert epochs == 9 and {"losses/classification", "losses/bbox_regression", "val/AP", "test/AP@0.1"} <= set(logged)
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
    assert "32 (" in out and "s/update" in out and "waiting for data" in out


def test_evaluate_and_predict(trained, shapes, tmp_path):
    folder, _ = trained
    checkpoint = folder / "finetune_detect.pt"
    out = run("finetune_detect.py", "--evaluate", checkpoint, cwd=tmp_path).stdout
    logged = scalars(folder)
    assert f"on 8 images: AP {logged['test/AP'][0][1]:.4f}, AP50 {logged['test/AP50'][0][1]:.4f}" in out
    other = ["--evaluate", checkpoint, "--annotations", shapes / "val.json"]
    out = run("finetune_detect.py", *other, cwd=tmp_path).stdout
    assert f"on 8 images: AP {dict(logged['val/AP'])[torch.load(checkpoint)['epoch']]:.4f}" in out
    (tmp_path / "new").mkdir()
    image, boxes, _ = canvas(np.random.default_rng(5), 2)
    image.save(tmp_path / "new/one.png")
    (tmp_path / "new/bad.jpg").write_bytes(b"nothing")
    out = run("finetune_detect.py", "--evaluate", checkpoint, "--predict", "new", cwd=tmp_path).stdout
    assert "bad.jpg cannot be read" in out
    results = json.loads((folder / "predictions.json").read_text())
    assert results and {row["file_name"] for row in results} == {"one.png"}
    best = max(results, key=lambda row: row["score"])
    x, y, w, h = best["bbox"]
    overlap = fd.box_iou(torch.tensor([[x, y, x + w, y + h]]), torch.tensor(boxes, dtype=torch.float32)).max()
    assert overlap > 0.5 and best["category"] == ["disc", "square"][best["category_id"] - 1]
    drawn = np.asarray(Image.open(folder / "pictures/one.png"))
    assert drawn.shape == (96, 96, 3) and (drawn != np.asarray(image)).any()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of Linux")
def test_freed_memory_is_used_again():
    code = """if True:
        import resource, sys, torch, finetune_detect
        if sys.argv[1] == "keep":
            finetune_detect.keep_freed_memory()
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for i in range(25):
            if i == 5:
                before = faults()
            torch.ones(12_000_000)
        print(faults() - before)"""
    command, pages = [sys.executable, "-c", code], 20 * 48_000_000 / os.sysconf("SC_PAGE_SIZE")
    plain, kept = (int(subprocess.check_output([*command, word], text=True, cwd=ROOT)) for word in ("plain", "keep"))
    if plain < pages / 2:
        pytest.skip("the system gives large pages, or its malloc keeps memory by itself")
    assert kept < pages / 5  # a piece of another size in between may move the block once or twice


def test_a_killed_run_resumes_to_the_last_bit(shapes, tmp_path):
    more = ["--strategy", "scratch", "--epochs", "3", "--batch-size", "2", "--seed", "3", "--exp-name", "detector"]
    command = [*map(str, flags(shapes, *more)), "--no-cuda"]
    run("finetune_detect.py", *flags(shapes, *more, "--logdir", "whole"), cwd=tmp_path)
    process = subprocess.Popen([sys.executable, str(ROOT / "finetune_detect.py"), *command, "--logdir", "parts"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not list(tmp_path.glob("parts/*/events*")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, (out, err)
    last = only_run(tmp_path / "parts") / "detector_last.pt"
    stopped = torch.load(last)
    assert (stopped["epoch"], stopped["step"]) != (3, 0) and f"--resume {last.relative_to(tmp_path)}" in out
    run("finetune_detect.py", "--resume", last, cwd=tmp_path)
    whole, parts = (torch.load(only_run(tmp_path / name) / "detector_last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    left_out = ("charts/seconds_per_update", "charts/seconds_waiting_for_data")
    one, other = (scalars(only_run(tmp_path / name), left_out) for name in ("whole", "parts"))
    assert one == other


def test_a_run_killed_in_validation_resumes(shapes, tmp_path, monkeypatch):
    more = ["--strategy", "scratch", "--epochs", "2", "--batch-size", "4", "--exp-name", "detector"]
    run("finetune_detect.py", *flags(shapes, *more, "--logdir", "whole"), cwd=tmp_path)
    opened, real = [], Image.open

    def stop(path, *rest, **others):
        opened.extend([path] * ("val_03" in str(path)))
        if len(opened) == 2 and "val_03" in str(path):  # the first time it was the check of the annotations
            os.kill(os.getpid(), signal.SIGTERM)
        return real(path, *rest, **others)

    monkeypatch.setattr(Image, "open", stop)
    ended = run("finetune_detect.py", *flags(shapes, *more, "--logdir", "parts"), cwd=tmp_path, check=False)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    last = only_run(tmp_path / "parts") / "detector_last.pt"
    assert (torch.load(last)["epoch"], torch.load(last)["step"]) == (0, 8)
    run("finetune_detect.py", "--resume", last, cwd=tmp_path)
    left_out = ("charts/seconds_per_update", "charts/seconds_waiting_for_data")
    one, other = (scalars(only_run(tmp_path / name), left_out) for name in ("whole", "parts"))
    assert one == other


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
    more = ["--strategy", "off-the-shelf", "--epochs", 1]
    torch.save(models.mobilenet_v3_small(weights=None).state_dict(), tmp_path / "w.pth")
    command = ["--data-dir", shapes / "images", "--annotations", shapes / "train.json", *SMALL[:-2]]
    out = run("finetune_detect.py", *command, "--weights", "w.pth", *more, cwd=tmp_path).stdout
    assert "16 (" in out and "8 (" in out and "frozen" in out
    folder = only_run(tmp_path / "runs")
    splits = torch.load(folder / "finetune_detect.pt")["splits"]
    assert sorted(splits.values()) == ["test"] * 8 + ["train"] * 16 + ["val"] * 8
    again = run("finetune_detect.py", "--evaluate", folder / "finetune_detect.pt", cwd=tmp_path).stdout
    assert f"on 8 images: AP {scalars(folder)['test/AP'][0][1]:.4f}" in again
    chain = ["--pretrained", folder / "finetune_detect.pt", "--single-class", "--epochs", 1, "--logdir", "next"]
    out = run("finetune_detect.py", *command, *chain, cwd=tmp_path).stdout  # another number of classes
    assert "1 classes: object" in out and (only_run(tmp_path / "next") / "finetune_detect.pt").is_file()


def test_fast_rcnn_on_a_file_of_proposals(shapes, tmp_path):
    pictures = [fd.read_annotations(str(shapes / f"{split}.json"), fd.Args()) for split in fd.SPLITS]
    boxes = {picture.path: [*picture.boxes, [3, 3, 40, 40]] for each in pictures for picture in each}
    (tmp_path / "proposals.json").write_text(json.dumps(boxes))
    more = ["--arch", "fastrcnn", "--proposals", "proposals.json", "--epochs", 1, "--strategy", "scratch"]
    run("finetune_detect.py", *flags(shapes, *more), cwd=tmp_path)
    logged = scalars(only_run(tmp_path / "runs"))
    assert {"losses/box_reg", "losses/classifier", "train/loss"} <= set(logged) and "losses/rpn_box_reg" not in logged
    (tmp_path / "wrong.json").write_text('{"train_00.png": [[1, 2, 3]]}')
    more[3] = "wrong.json"
    done = run("finetune_detect.py", *flags(shapes, *more), cwd=tmp_path, check=False)
    assert done.returncode == 1 and "--proposals wrong.json: a box is four numbers" in done.stderr


def test_selective_search(shapes):
    pytest.importorskip("cv2.ximgproc")
    found = fd.selective_search(str(shapes / "images"), ["train_00.png"], lambda: False)
    (truth,) = [p for p in fd.read_annotations(str(shapes / "train.json"), fd.Args()) if p.path == "train_00.png"]
    best = fd.box_iou(torch.tensor(truth.boxes), torch.tensor(found["train_00.png"])).max(dim=1).values
    assert (best > 0.7).all()


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "--data-dir None: there is no such folder"),
        ("--data-dir {images}", "--annotations: a file or folder with the boxes is needed"),
        ("--data-dir {images} --annotations no.json", "no.json: no annotations in a known format (FileNotFoundError"),
        ("--data-dir {images} --annotations empty.json", "empty.json: no annotations in a known format"),
        (
            "--data-dir {images} --annotations {train} --arch yolov5",
            "--arch yolov5: no such detector, did you mean yolov3",
        ),
        (
            "--data-dir {images} --annotations {train} --arch ssd --backbone resnet19",
            "--backbone resnet19: torchvision has",
        ),
        ("--data-dir {images} --annotations {train} --arch ssd --backbone vit_b_16", "no feature maps at strides 8"),
        ("--data-dir {images} --annotations {train} --arch fcos_resnet50_fpn --backbone resnet18", "has its own"),
        ("--data-dir {images} --annotations {train} --arch yolov3", "--weights yolov3.weights or darknet53.conv.74"),
        ("--data-dir {images} --annotations {train} --arch yolov3 --weights empty.json", "empty.json"),
        (
            "--data-dir {images} --annotations {train} --arch ssd --weights x.pth",
            "--weights x.pth: neither a file nor one",
        ),
        ("--data-dir {images} --annotations {train} --arch fastrcnn", "--arch fastrcnn needs --proposals"),
        ("--data-dir {images} --annotations {train} --kmeans-anchors --weights none", "is for --arch yolov3"),
        ("--data-dir {images} --annotations {train} --trainable-backbone-layers 6", "the backbone has 5 stages"),
        ("--data-dir {images} --annotations {train} --strategy off-the-shelf --weights none", "needs trained layers"),
        ("--data-dir {images} --annotations {train} --strategy scratch --pretrained x.pt", "no --pretrained"),
        ("--data-dir {images} --annotations {train} --pretrained x.pt", "no file at x.pt"),
        ("--evaluate empty.json", "empty.json cannot be loaded"),
        ("--predict {images}", "--predict needs the checkpoint"),
    ],
)
def test_bad_input_gets_one_line(words, says, shapes, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    words = words.format(images=shapes / "images", train=shapes / "train.json").split()
    done = run("finetune_detect.py", *words, cwd=tmp_path, check=False)
    assert done.returncode == 1 and says in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
