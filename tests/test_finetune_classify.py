"""Classification: data and its defects, networks, strategies, metrics, and whole runs on pictures made here."""

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import finetune_classify as fc
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, only_run, run, scalars
from PIL import Image
from torch import nn
from torchvision import models

SCRIPT = "finetune_classify.py"
SMALL = "--arch resnet18 --image-size 32 --workers 0 --batch-size 16".split()
TIME = ("charts/images_per_second",)


def picture(kind, rng, side=40):
    """A bright disc, square or cross of any colour and place on dark noise."""
    y, x = np.mgrid[:side, :side]
    cy, cx, r = rng.integers(14, side - 14), rng.integers(14, side - 14), rng.integers(7, 12)
    dy, dx = abs(y - cy), abs(x - cx)
    square = (dy < r) & (dx < r)
    mask = {"disc": dy**2 + dx**2 < r**2, "square": square, "cross": square & ((dy < 3) | (dx < 3))}[kind]
    image = rng.integers(0, 80, size=(side, side, 3))
    image[mask] = rng.integers(120, 256, size=3)
    return Image.fromarray(image.astype(np.uint8))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder per class: 3 classes of 40 pictures."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for kind in ("cross", "disc", "square"):
        (root / kind).mkdir()
        for i in range(40):
            picture(kind, rng).save(root / kind / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A ResNet-18 with random weights, in the file format of torchvision's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.resnet18(weights=None).state_dict(), path)
    return path


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def build(arch, classes=("x", "y"), random=True, **flags):
    trunk = fc.make_trunk(fc.Args(arch=arch, **{"weights": "none"} | flags), random=random)
    return fc.Classifier(*trunk, {"a": list(classes)})


# --------------------------------------------------------------------------------------------------------------- data


def test_a_class_of_three_images_has_one_in_each_split():
    labels = ["many"] * 50 + ["three"] * 3 + ["two"] * 2
    rows = [{"path": f"{i}.jpg", "split": "", "class": label} for i, label in enumerate(labels)]
    rows, classes = fc.split_data(fc.Args(), rows)
    found = [(row["split"], row["class"]) for row in rows]
    assert classes == {"class": ["many", "three"]} and len(rows) == 53
    assert [found.count((split, "many")) for split in fc.SPLITS] == [40, 5, 5]
    assert [found.count((split, "three")) for split in fc.SPLITS] == [1, 1, 1]


def test_the_split_is_the_seed_s_and_can_be_used_again(folder, tmp_path):
    one, two, three = (fc.split_data(fc.Args(seed=seed), fc.read_folders(str(folder)))[0] for seed in (1, 1, 2))
    assert one == two != three
    fc.write_csv(str(tmp_path / "split.csv"), three)
    again, _ = fc.split_data(fc.Args(split_file=str(tmp_path / "split.csv")), fc.read_folders(str(folder)))
    assert again == three


def test_folders_of_splits(folder, tmp_path):
    for split, numbers in (("train", range(30)), ("valid", range(30, 35)), ("test", range(35, 40))):
        for kind in ("disc", "square"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in numbers:
                (tmp_path / split / kind / f"{i}.png").symlink_to(folder / kind / f"{i:02d}.png")
    rows, classes = fc.split_data(fc.Args(), fc.read_folders(str(tmp_path)))
    assert classes == {"class": ["disc", "square"]}
    assert [[row["split"] for row in rows].count(split) for split in fc.SPLITS] == [60, 10, 10]
    (tmp_path / "valid").rename(tmp_path / "elsewhere")  # no validation images: a tenth of each class in train
    rows, _ = fc.split_data(fc.Args(), fc.read_folders(str(tmp_path)))
    assert [[row["split"] for row in rows].count(split) for split in fc.SPLITS] == [54, 6, 10]
    assert all(row["path"].startswith("test") == (row["split"] == "test") for row in rows)


def test_links_do_not_put_an_image_into_two_splits(folder, tmp_path, monkeypatch, capsys):
    for kind in ("disc", "square"):
        (tmp_path / kind).symlink_to(folder / kind)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/up").symlink_to(tmp_path)
    (tmp_path / "more/up again").symlink_to(tmp_path)  # two of these make 2^40 folders for a walk that follows them
    (tmp_path / "more/same.png").symlink_to(folder / "disc/00.png")
    assert len(fc.find_images(str(tmp_path))) == 80 and "links to what is there already" in capsys.readouterr().out
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("square"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(fc.find_images(str(tmp_path))) == 40
    assert "left out: [Errno 13] Permission denied" in capsys.readouterr().out


RIJKS = """,ImageId,dc_creator,dc_materiaal,dc_type
0,SK-A-1,Rembrandt,olieverf,schilderij
1,SK-A-2.jpg,  anoniem,olieverf,schilderij
2,RP-P-3,Rembrandt,papier,prent
3,absent,Rembrandt,papier,prent
4,RP-P-4, ,"papier, karton",
5,SK-A-1,Vermeer,olieverf,schilderij
6,twice,Rembrandt,papier,prent
7,b/twice,Rembrandt
"""


def test_the_rijksmuseum_s_table(tmp_path, capsys):
    for name in ("SK-A-1", "SK-A-2", "RP-P-3", "RP-P-4", "a/twice", "b/twice"):
        (tmp_path / "jpg" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "jpg" / f"{name}.jpg")
    (tmp_path / "rijks.csv").write_text(RIJKS)
    columns = ["dc_creator", "dc_materiaal", "dc_type"]
    args = fc.Args(data_dir=str(tmp_path / "jpg"), metadata=str(tmp_path / "rijks.csv"), label_column=columns)
    assert [tuple(row.values()) for row in fc.read_table(args)] == [
        ("SK-A-1.jpg", "", "Rembrandt", "olieverf", "schilderij"),
        ("SK-A-2.jpg", "", "", "olieverf", "schilderij"),
        ("RP-P-3.jpg", "", "Rembrandt", "papier", "prent"),
        ("RP-P-4.jpg", "", "", "papier, karton", ""),
        ("b/twice.jpg", "", "Rembrandt", "", ""),
    ]
    assert "3 of 8 rows" in capsys.readouterr().out  # absent, an image again, a name of two images


RECORD = """<?xml version="1.0" encoding="utf-8"?>
<record><header><identifier>oai:rijksmuseum.nl:SK-A-4878</identifier></header><metadata><oai_dc:dc>
<dc:title>Gezicht op een dorp</dc:title>{}<dc:format>drager: h 10 cm</dc:format>
<dc:format>materiaal: olieverf</dc:format><dc:format>materiaal: doek</dc:format><dc:type>schilderij</dc:type>
</oai_dc:dc></metadata></record>"""


def test_the_readme_s_table_from_the_museum_s_records(tmp_path, monkeypatch):
    (tmp_path / "xml").mkdir()
    makers = ["<dc:creator>schilder: Bo\u00ebtius &amp; Zn</dc:creator><dc:creator>anoniem</dc:creator>",
              "<dc:creator>prentmaker: anoniem</dc:creator>",
              "<dc:creator> Maris, Matthijs</dc:creator>", ""]  # fmt: skip
    for i, maker in enumerate(makers):
        (tmp_path / f"xml/{i:07d}_SK-A-{i}.xml").write_text(RECORD.format(maker), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec((ROOT / "results/classify/README.md").read_text().split("```python\n")[1].split("```")[0], {})
    rows = table("rijks.csv")
    assert [row["ImageId"] for row in rows] == [f"{i:07d}_SK-A-{i}" for i in range(4)]
    assert [row["dc_creator"] for row in rows] == ["Bo\u00ebtius & Zn", "anoniem", "Maris, Matthijs", ""]
    assert {(row["dc_materiaal"], row["dc_type"]) for row in rows} == {("olieverf", "schilderij")}


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "give --data-dir DIR or --dataset NAME"),
        ("--data-dir missing", "missing: there is no such folder"),
        ("--data-dir empty", "empty: no images in this folder"),
        ("--data-dir flat", "a folder per class is expected there, or --metadata"),
        ("--data-dir {folder} --metadata nothing.csv", "--metadata nothing.csv: [Errno 2]"),
        ("--data-dir {folder} --metadata table.csv", "no column 'ImageId' in it, but ['a', 'b']"),
        ("--dataset Flower", "torchvision has none of that name, but "),
        ("--dataset Flowers102", "--dataset Flowers102: Dataset not found or corrupted"),
        ("--data-dir {folder} --arch resnet19", "--arch resnet19: torchvision has alexnet"),
        ("--data-dir {folder} --weights no.pth", "--weights no.pth: neither a file nor one of IMAGENET1K_V1"),
        ("--data-dir {folder} --weights table.csv", "table.csv is no file of tensors"),
        ("--data-dir {folder} --arch resnet34 --weights {weights}", "another architecture"),
        ("--data-dir {folder} --weights none --arch resnet18 --unfreeze-from layer9", "no such layers, but conv1, bn1"),
        ("--data-dir {folder} --strategy off-the-shelf --unfreeze-from layer4", "needs --strategy fine-tune"),
        ("--data-dir {folder} --pretrained missing.pt", "no file at missing.pt"),
        ("--evaluate {weights}", "is not a checkpoint of this script"),
        ("--data-dir {folder} --saliency 3", "need a trained network"),
        ("--data-dir {folder} --epochs 0", "--epochs 0 must be at least 1"),
        ("--data-dir {folder} --learning-rate nan", "--learning-rate nan must be at least 0"),
        ("--data-dir {folder} --seed -1", "--seed -1 must be at least 0"),
        ("--data-dir {folder} --workers -1", "--workers -1 must be at least 0"),
        ("--data-dir {folder} --exp-name ../x", "becomes a file's name"),
        (
            "--data-dir {folder} --arch resnet18 --weights none --image-size 32 --logdir table.csv",
            "--logdir table.csv: ",
        ),
        ("--data-dir {folder} --split-file table.csv", "--split-file table.csv: no column 'path'"),
    ],
)
def test_bad_input_gets_one_line(flags, says, folder, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "flat/a.png")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    done = run(SCRIPT, *flags.format(folder=folder, weights=weights).split(), cwd=tmp_path, check=False)
    assert done.returncode == 1 and says in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr


def test_odd_images_become_rgb(tmp_path):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    Image.fromarray(grey).save(tmp_path / "L.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "P.png")
    Image.fromarray(np.stack([grey, 255 - grey * 0], 2), "LA").save(tmp_path / "LA.png")
    Image.fromarray(np.zeros((48, 64, 4), np.uint8)).save(tmp_path / "clear.png")
    Image.merge("CMYK", [Image.fromarray(255 - grey)] * 3 + [Image.new("L", (64, 48))]).save(tmp_path / "CMYK.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    Image.fromarray(grey).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    images = {path.stem: fc.open_image(str(path), 32) for path in tmp_path.iterdir()}
    assert all(image.mode == "RGB" for image in images.values())
    assert images["turned"].size == (48, 64) and images["L"].size == (64, 48)
    for name, tolerance in (("16", 1), ("P", 8), ("LA", 1), ("CMYK", 8)):
        difference = np.abs(np.asarray(images[name], int) - np.asarray(images["L"], int))
        assert difference.max() <= tolerance, name
    assert (np.asarray(images["clear"]) == 255).all()  # paper shows through, not black


def test_large_images(tmp_path):
    Image.new("RGB", (4_000, 3_000), "red").save(tmp_path / "scan.jpg")  # decoded at a fraction
    assert fc.open_image(str(tmp_path / "scan.jpg"), 256).size == (1_000, 750)
    assert fc.open_image(str(tmp_path / "scan.jpg"), 2_000).size == (4_000, 3_000)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("L", (1, 60_000)).save(tmp_path / "strip.png")
    for name in ("bomb", "strip"):
        with pytest.raises(ValueError, match="too many"):
            fc.open_image(str(tmp_path / f"{name}.png"), 256)


@pytest.mark.parametrize("more", ["--strategy off-the-shelf", "", "--cache-gb 0"])
def test_unreadable_images_are_named_counted_and_left_out(more, folder, weights, tmp_path):
    data = tmp_path / "data"
    for kind in ("disc", "square"):
        (data / kind).mkdir(parents=True)
        for i in range(20):
            (data / kind / f"{i}.png").write_bytes((folder / kind / f"{i:02d}.png").read_bytes())
    whole = (data / "disc/3.png").read_bytes()
    (data / "disc/3.png").write_bytes(whole[: len(whole) // 2])
    (data / "square/4.png").unlink()
    (data / "square/4.png").symlink_to("nowhere")
    (data / "square/odd\udcff.png").write_bytes(whole)  # a name that is not UTF-8
    flags = ["--data-dir", data, "--weights", weights, "--epochs", 2, *more.split()]
    out = run(SCRIPT, *SMALL, *flags, cwd=tmp_path).stdout
    assert out.count("disc/3.png cannot be read") == 1 and out.count("square/4.png cannot be read, FileNotFound") == 1
    assert "2 images could not be read and were left out" in out


def test_a_data_set_of_torchvision(folder, weights, tmp_path, monkeypatch):
    class Toy:
        classes = ["cross", "disc", "square"]

        def __init__(self, root, split="train", download=False):
            if split not in ("train", "test") or not download:
                raise ValueError("unknown split") if download else RuntimeError("Dataset not found")
            numbers = range(30) if split == "train" else range(30, 40)
            self.images = [(folder / name / f"{i:02d}.png", k) for k, name in enumerate(self.classes) for i in numbers]

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return Image.open(self.images[i][0]), self.images[i][1]

    monkeypatch.setattr(torchvision.datasets, "Toy", Toy, raising=False)
    flags = ["--dataset", "Toy", "--weights", weights, "--strategy", "off-the-shelf", "--epochs", 1]
    assert "Dataset not found" in run(SCRIPT, *SMALL, *flags, cwd=tmp_path, check=False).stderr
    out = run(SCRIPT, *SMALL, *flags, "--download", cwd=tmp_path).stdout
    assert "81 train, 9 val, 30 test, class: 3 classes" in out
    rows = table(only_run(tmp_path / "runs") / "split.csv")
    assert {(row["path"].split("/")[0] == "test") == (row["split"] == "test") for row in rows} == {True}
    assert "on 30 test images" in run(SCRIPT, "--evaluate", only_run(tmp_path / "runs"), cwd=tmp_path).stdout


# ----------------------------------------------------------------------------------------------------------- networks

ARCHS = {  # size of the features
    "resnet18": 512, "vgg11": 512, "alexnet": 4096, "squeezenet1_1": 512, "densenet121": 1024, "googlenet": 1024,
    "mobilenet_v2": 1280, "mobilenet_v3_small": 1024, "efficientnet_b0": 1280, "shufflenet_v2_x0_5": 1024,
    "mnasnet0_5": 1280, "regnet_y_400mf": 440, "convnext_tiny": 768, "swin_t": 768, "vit_b_16": 768,
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_architectures_of_torchvision(arch):
    model = build(arch, "xyz", image_size=64 if arch == "vit_b_16" else None)
    assert model.heads[0].in_features == ARCHS[arch] and model.preprocessing["size"] in (64, 224)
    images = torch.randint(256, (2, 3, model.preprocessing["size"], model.preprocessing["size"]), dtype=torch.uint8)
    for mode in (True, False):
        assert model.train(mode)(images)["a"].shape == (2, 3)


def test_inception_scales_its_input_as_its_weights_want(tmp_path):
    theirs = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    model = build("inception_v3", random=False, weights=str(tmp_path / "inception.pth")).eval()
    assert model.preprocessing["size"] == 299 and model.preprocessing["resize"] == 342
    images, theirs.fc = torch.randint(256, (2, 3, 299, 299), dtype=torch.uint8), nn.Identity()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        assert torch.allclose(model.features(images), theirs((images / 255 - mean) / std), atol=1e-4)
    again = fc.restore({"args": {"arch": "inception_v3"}, "classes": {"a": ["x", "y"]}, "model": model.state_dict(),
                        "preprocessing": model.preprocessing}).eval()  # fmt: skip
    with torch.no_grad():
        assert torch.equal(model(images)["a"], again(images)["a"])


def test_preprocessing_is_that_of_the_weights(folder):
    preset, model = models.ResNet18_Weights.IMAGENET1K_V1.transforms(), build("resnet18")
    image, _, error = fc.Pictures(str(folder), ["disc/00.png"], model.preprocessing)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 224, 224) and not error
    ours, theirs = (image.float() - model.mean) / model.std, preset(Image.open(folder / "disc/00.png").convert("RGB"))
    assert (ours - theirs).abs().max() < 0.05  # one grey level is 0.02
    small = build("resnet18", image_size=112).preprocessing
    assert (small["size"], small["resize"]) == (112, 128)


@pytest.mark.parametrize("until", [None, "layer4"])
def test_frozen_means_frozen(until):
    """No parameter, no statistic of batch normalisation and no dropout of what is frozen is at work."""
    torch.manual_seed(0)
    model = build("resnet18")
    model.freeze(until)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = fc.make_optimizer(fc.Args(momentum=0.0, learning_rate=0.1), model)
    batches = [(torch.randint(256, (4, 3, 32, 32)), torch.arange(4))] * 2
    fc.train_epoch(model, optimizer, batches, {"a": torch.tensor([0, 1, 0, 1])}, fc.Progress(8), "")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    tops = {name.split(".")[1] if name.startswith("trunk") else "heads" for name in changed}
    assert tops == {"heads", until} - {None} and ("trunk.layer4.0.bn1.running_mean" in changed) == bool(until)


def test_missing_labels_do_not_count():
    logits = {"a": torch.tensor([[2.0, 0.0], [0.0, 3.0]]), "b": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 5.0]])}
    targets = {"a": torch.tensor([0, fc.MISSING]), "b": torch.tensor([fc.MISSING, fc.MISSING])}
    expected = nn.functional.cross_entropy(logits["a"][:1], torch.tensor([0]))
    assert torch.allclose(fc.total_loss(logits, targets), expected)


def test_the_papers_optimizers():
    model = build("resnet18")
    sgd = fc.make_optimizer(fc.Args(weight_decay=0.5), model)
    assert [(group["weight_decay"], {p.ndim > 1 for p in group["params"]}) for group in sgd.param_groups] == [
        (0.5, {True}), (0.0, {False})]  # fmt: skip
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (1e-3, 0.9, True)
    rms = fc.make_optimizer(fc.Args(strategy="off-the-shelf"), model)
    assert (rms.defaults["lr"], rms.defaults["alpha"], rms.defaults["eps"]) == (1e-3, 0.9, 1e-8)


def test_metrics_by_hand():
    targets = torch.tensor([0, 1, 1, 2, 0, fc.MISSING])
    logits = torch.full((6, 7), -1.0)
    logits[range(6), [0, 0, 1, 2, 2, 1]] = 1.0
    logits[1, 6] = 0.5  # the first six of the row: 0, 6, then ties
    m = fc.measure(logits, targets)
    assert m["top1"] == 3 / 5
    # precision and recall: class 0: 1/2, 1/2; class 1: 1, 1/2; class 2: 1/2, 1; others have no images
    assert m["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    assert m["confusion"][:3, :3].tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]] and m["confusion"].sum() == 5
    assert m["support"].tolist() == [2, 2, 1, 0, 0, 0, 0]
    ranked = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    assert fc.measure(ranked, torch.tensor([4, 5]))["top5"] == 0.5
    assert fc.measure(ranked[:, :3], torch.tensor([2, 1]))["top5"] == 1.0  # three classes


def test_order_of_images():
    indices, args = torch.arange(100, 133), fc.Args(batch_size=16, seed=3)
    one, again, other = (torch.cat(fc.shuffled(indices, args, epoch, None)).tolist() for epoch in (0, 0, 1))
    assert one == again != other and len(one) == len(set(one)) == 32  # 33 = 16 + 16 + 1: one alone is no batch
    weights = torch.tensor([1 / 90] * 90 + [1 / 10] * 10)
    drawn = torch.cat([torch.cat(fc.shuffled(torch.arange(100), args, epoch, weights)) for epoch in range(20)])
    assert 0.45 < (drawn >= 90).float().mean() < 0.55


@pytest.mark.parametrize("channels_last", [False, True])
def test_visual_back_prop_finds_the_only_thing_there_is(channels_last):
    """Identity layers: the product of the maps is the picture itself."""

    class Permuted(nn.Module):  # as in ConvNeXt and Swin
        def __init__(self):
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x):
            return self.act(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    trunk = nn.Sequential()
    for _ in range(2):
        trunk.extend([nn.Identity(), Permuted() if channels_last else nn.ReLU(), nn.MaxPool2d(2)])
    preprocessing = {"size": 32, "resize": 32, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    model = fc.Classifier(trunk.append(nn.Flatten()), 3 * 64, preprocessing, {"class": ["a", "b"]}).eval()
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, :, 4:12, 8:16] = images[1, :, 20:24, 20:30] = 255
    grad_cam, masks = fc.saliency_maps(model, images)
    assert masks.shape == grad_cam.shape == (2, 32, 32) and masks.min() >= 0 and masks.max() == 1
    for image, mask in zip(images, masks):
        inside = image[0] > 0
        assert mask[inside].mean() > 0.8 and mask[~inside].mean() < 0.1


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def trained(folder, weights, tmp_path_factory):
    """Finished runs of the three strategies: {strategy: (folder of the run, what it printed)}."""
    runs, cwd = {}, tmp_path_factory.mktemp("trained")
    for strategy, more in (("off-the-shelf", "20"), ("fine-tune", "4 --learning-rate 0.01"), ("scratch", "2")):
        flags = f"--data-dir {folder} --weights {weights} --strategy {strategy} --exp-name {strategy} --epochs {more}"
        out = run(SCRIPT, *SMALL, *flags.split(), cwd=cwd).stdout
        runs[strategy] = next((cwd / "runs").glob(f"*__{strategy}__*")), out
    return runs


@pytest.mark.parametrize("strategy", ["off-the-shelf", "fine-tune", "scratch"])
def test_a_run_leaves_what_it_should(trained, strategy, weights):
    folder, out = trained[strategy]
    logged = scalars(folder, TIME)
    names = {f"{split}/{name}" for split in ("val", "test") for name in ("loss", "top1", "top5", "macro_f1")}
    assert set(logged) == {"train/loss"} | names
    checkpoint, last = torch.load(folder / f"{strategy}.pt"), torch.load(folder / f"{strategy}_last.pt")
    assert checkpoint["best"] == pytest.approx(min(value for _, value in logged["val/loss"]))
    assert last["epoch"] == len(logged["train/loss"]) == len(last["history"]) and last["optimizer"]["state"]
    state = torch.load(weights)
    same = [torch.equal(checkpoint["model"][f"trunk.{name}"], state[name]) for name in state if name[:2] != "fc"]
    assert all(same) if strategy == "off-the-shelf" else not any(same[:1])
    splits = [row["split"] for row in table(folder / "split.csv")]
    assert [splits.count(name) for name in fc.SPLITS] == [96, 12, 12]
    rows = table(folder / "per_class.csv")
    assert [row["class"] for row in rows] == ["cross", "disc", "square"]
    recalls = [float(row["recall"]) * float(row["support"]) for row in rows]
    assert sum(recalls) / 12 == pytest.approx(logged["test/top1"][0][1], abs=1e-6)
    parameters = "1,539 of 11,178,051" if strategy == "off-the-shelf" else "11,178,051 of 11,178,051"
    assert f"{parameters} parameters are trained, images of 32 pixels" in out
    for name in ("curves.png", "confusion.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 200 and np.asarray(image).std() > 5
    if strategy != "scratch":  # two epochs from random weights may learn nothing
        assert logged["train/loss"][-1][1] < 0.9 * logged["train/loss"][0][1]
    assert not list(folder.glob("*.tmp"))


def test_the_confusion_matrix_has_names_and_counts():
    figure = fc.draw_confusion(torch.tensor([[3, 1], [0, 17]]), ["cat", "dog"], "title")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "3"),
        ((1, 0), "1"),
        ((1, 1), "17"),
    }


def test_early_stopping_and_the_best_weights(folder, weights, tmp_path):
    flags = f"--data-dir {folder} --weights {weights} --strategy off-the-shelf --learning-rate 3 --patience 2"
    run(SCRIPT, *SMALL, *flags.split(), cwd=tmp_path)
    losses = [value for _, value in scalars(only_run(tmp_path / "runs"))["val/loss"]]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 100
    checkpoint = torch.load(only_run(tmp_path / "runs") / "finetune_classify.pt")
    assert checkpoint["epoch"] == best + 1 and checkpoint["best"] == pytest.approx(losses[best], rel=1e-6)


def start(cwd, *flags, **more):
    command = [sys.executable, str(ROOT / SCRIPT), *map(str, flags), "--no-cuda"]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True} | more
    return subprocess.Popen(command, cwd=cwd, **more)


def test_neither_workers_nor_the_cache_nor_a_signal_change_the_result(folder, tmp_path):
    """A run with workers, ended by SIGTERM to its process group as by a scheduler, then resumed; and one without."""
    flags = (
        f"--data-dir {folder} --weights none --arch mobilenet_v3_small --image-size 32 --batch-size 16 --patience 99"
    )
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
    process = start(tmp_path / "killed", *flags.split(), "--epochs", 400, "--workers", 2, "--cache-gb", 0)
    while not list(tmp_path.glob("killed/runs/*/*_last.pt")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    killed = only_run(tmp_path / "killed/runs")
    assert process.returncode == 130 and f"--resume runs/{killed.name} goes on" in out and "Traceback" not in out, out
    epochs = torch.load(killed / "finetune_classify_last.pt")["epoch"] + 1
    run(SCRIPT, "--resume", killed, "--epochs", epochs, "--workers", 0, cwd=tmp_path)
    run(SCRIPT, *flags.split(), "--epochs", epochs, "--workers", 0, cwd=tmp_path / "straight")
    straight = only_run(tmp_path / "straight/runs")
    one, two = (torch.load(path / "finetune_classify_last.pt")["model"] for path in (killed, straight))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())  # with dropout
    assert scalars(killed, TIME) == scalars(straight, TIME)  # and no point twice


def test_a_finished_run_is_not_tested_again(trained, folder, weights, tmp_path):
    flags = f"--data-dir {folder} --weights {weights} --strategy off-the-shelf --epochs 2"
    run(SCRIPT, *SMALL, *flags.split(), cwd=tmp_path)
    path = only_run(tmp_path / "runs")
    for more in ([], ["--epochs", 1]):
        assert "has ended" in run(SCRIPT, "--resume", path, *more, cwd=tmp_path, check=False).stderr
    assert len(scalars(path)["test/top1"]) == 1
    before = torch.load(path / "finetune_classify_last.pt")
    refused = run(SCRIPT, "--resume", path, "--arch", "vgg11", "--epochs", 3, cwd=tmp_path, check=False).stderr
    assert "the flags arch are those of" in refused
    # another learning rate is at work: none, so nothing moves
    run(SCRIPT, "--resume", path, "--epochs", 3, "--learning-rate", 0, cwd=tmp_path)
    after = torch.load(path / "finetune_classify_last.pt")
    assert after["epoch"] == 3 and torch.equal(after["model"]["heads.0.weight"], before["model"]["heads.0.weight"])


def test_a_checkpoint_names_no_other_folder(folder, weights, tmp_path):
    flags = f"--data-dir {folder} --weights {weights} --strategy off-the-shelf --epochs 1"
    run(SCRIPT, *SMALL, *flags.split(), cwd=tmp_path)
    path = only_run(tmp_path / "runs") / "finetune_classify_last.pt"
    state = torch.load(path)
    state["args"] |= {"exp_name": "../../escaped", "logdir": str(tmp_path / "elsewhere")}
    torch.save(state, path)
    done = run(SCRIPT, "--resume", path, "--epochs", 2, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "becomes a file's name" in done.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs"} and len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("kind", ["full disk", "closed pipe", "lost worker"])
def test_what_ends_a_run_costs_no_work(kind, folder, tmp_path):
    flags = f"--data-dir {folder} --weights none --arch mobilenet_v3_small --image-size 32 --patience 99 --epochs 400"
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000,) * 2)}
    workers = ["--workers", 1, "--cache-gb", 0] if kind == "lost worker" else ["--workers", 0]
    process = start(tmp_path, *flags.split(), *workers, **limit if kind == "full disk" else {})
    if kind == "closed pipe":
        while "epoch 2:" not in process.stdout.readline():
            pass
        process.stdout.close()
        process.wait(timeout=60)
    elif kind == "lost worker":
        while "epoch 2:" not in process.stdout.readline():
            pass
        worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(worker), signal.SIGKILL)
    out = "" if kind == "closed pipe" else process.communicate(timeout=60)[0]
    (path,) = (tmp_path / "runs").iterdir()
    assert process.returncode == 1 and "Traceback" not in out and not list(path.glob("*.tmp")), out
    if kind == "full disk":
        assert "cannot be written" in out and not list(path.glob("*.pt"))
    else:
        assert torch.load(path / "finetune_classify_last.pt")["epoch"] >= 1


def test_evaluate_predict_and_saliency(trained, folder, tmp_path):
    path, other = trained["fine-tune"][0], trained["off-the-shelf"][0]
    out = run(SCRIPT, "--evaluate", path, "--saliency", 2, "--compare", other, cwd=folder).stdout
    top1 = scalars(path)["test/top1"][0][1]
    assert "on 12 test images: test/loss" in out and f"test/top1 {top1:.4f}" in out
    with Image.open(path / "saliency.png") as image:
        assert np.asarray(image.convert("L")).std() > 20
    refused = run(SCRIPT, "--evaluate", path, "--image-size", 64, cwd=folder, check=False).stderr
    assert "the flags image_size are those of" in refused
    # images that the run has never seen, without the data that it was trained on
    rng = np.random.default_rng(1)
    for kind in ("disc", "unknown"):
        (tmp_path / "new" / kind).mkdir(parents=True)
        picture("disc", rng).save(tmp_path / f"new/{kind}/a.png")
    (tmp_path / "new/broken.png").write_bytes(b"no image")
    out = run(SCRIPT, "--evaluate", path, "--data-dir", tmp_path / "new", cwd=folder).stdout
    assert "on 1 test images" in out and "1 classes with 1 images are not in the network" in out
    flags = ["--evaluate", path, "--predict", tmp_path / "new", "--data-dir", "gone"]
    out = run(SCRIPT, *flags, cwd=tmp_path).stdout
    rows = table(path / "predictions.csv")
    assert [row["path"] for row in rows] == ["disc/a.png", "unknown/a.png"] and "1 images could not be read" in out
    assert all(row["class"] in ("cross", "disc", "square") for row in rows)
    assert all(1 / 3 <= float(row["class_probability"]) <= 1 for row in rows)


def test_saliency_has_titles_and_classes(trained):
    model = fc.restore(fc.load_checkpoint(str(trained["fine-tune"][0]))[0])
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    figure = fc.draw_saliency({"other": model, "this": model}, images, ["disc\n-> cross", "square\n-> disc"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:5] == ["image", "Grad-CAM\nother", "Grad-CAM\nthis", "VisualBackProp\nother", "VisualBackProp\nthis"]
    assert [axes.get_ylabel() for axes in figure.axes[::5]] == ["disc\n-> cross", "square\n-> disc"]


def test_a_chain_to_other_classes(trained, folder, tmp_path):
    """--pretrained: all but the heads of a network with other classes."""
    for kind in ("disc", "square"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / kind).symlink_to(folder / kind)
    path = trained["fine-tune"][0]
    flags = ["--data-dir", tmp_path / "two", "--pretrained", path, "--strategy", "off-the-shelf", "--epochs", 1]
    for more in (["--arch", "vgg11"], ["--image-size", 64]):
        assert (
            "--pretrained: a resnet18 for 32 pixels"
            in run(SCRIPT, *SMALL, *flags, *more, cwd=tmp_path, check=False).stderr
        )
    run(SCRIPT, *SMALL, *flags, cwd=tmp_path)
    chained, source = (
        torch.load(only_run(tmp_path / "runs") / "finetune_classify.pt"),
        torch.load(path / "fine-tune.pt"),
    )
    assert chained["classes"] == {"class": ["disc", "square"]} and chained["model"]["heads.0.weight"].shape == (2, 512)
    trunk = [name for name in source["model"] if name.startswith("trunk")]
    assert all(torch.equal(chained["model"][name], source["model"][name]) for name in trunk)


def test_several_tasks_at_once_and_balanced(folder, weights, tmp_path):
    """Labels of the first task are missing: they have no class that could be drawn as often as the others."""
    paths = sorted(path.relative_to(folder) for path in folder.glob("*/*.png"))
    with open(tmp_path / "table.csv", "w") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "round", "shape"])
        for i, path in enumerate(paths):
            kind = path.parent.name
            rows.writerow([path, "" if i % 4 == 0 else "yes" if kind == "disc" else "no", kind])
    flags = f"--data-dir {folder} --metadata table.csv --label-column round shape --weights {weights} --epochs 3"
    flags += " --strategy off-the-shelf --balanced-sampling"
    drawn, multinomial = [], torch.multinomial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "multinomial", lambda weights, *a, **k: drawn.append(weights) or multinomial(weights, *a, **k)
        )
        out = run(SCRIPT, *SMALL, *flags.split(), cwd=tmp_path).stdout
    assert "round: 2 classes, shape: 3 classes" in out
    labels = [row["round"] for row in table(only_run(tmp_path / "runs") / "split.csv") if row["split"] == "train"]
    totals = {name: sum(w for w, label in zip(drawn[0].tolist(), labels) if label == name) for name in set(labels)}
    assert totals == pytest.approx({"": 0, "yes": 1, "no": 1})
    names = {f"test/{task}/{name}" for task in ("shape", "round") for name in ("top1", "top5", "macro_f1")}
    assert names <= set(scalars(only_run(tmp_path / "runs")))
    assert (only_run(tmp_path / "runs") / "confusion_round.png").exists()


def test_without_network_the_error_says_where_the_file_goes(folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    done = run(SCRIPT, "--data-dir", folder, "--arch", "resnet18", cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "resnet18-f37072fd.pth into " + str(tmp_path / "hub/checkpoints") in done.stderr


def test_the_eta_is_that_of_the_whole_run(capsys):
    progress = fc.Progress(1_000)
    progress.begun, progress.last = progress.begun - 100, progress.last - 100
    progress.step(100, lambda: "epoch 1/10")
    assert "epoch 1/10, 1 images/s, ETA of the run 0:15:0" in capsys.readouterr().out
