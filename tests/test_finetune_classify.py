"""Classification: data and its defects, networks, strategies, metrics, and whole runs on pictures made here."""

import os
import re
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, needs_cuda, only_run, refused, run, run_on_cuda, scalars, start
from PIL import Image
from torch import nn
from torchvision import models

import finetune_classify as fc

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
    """A ResNet-18 with random weights, in the format of torchvision's older files, which count no batches."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    state = models.resnet18(weights=None).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, path)
    return path


def build(arch, classes=("x", "y"), weights="none", image_size=None):
    return fc.Classifier(*fc.make_trunk(arch, str(weights), image_size), {"a": list(classes)})


def test_the_split_has_every_class_and_is_the_seed_s_or_that_of_a_file(tmp_path):
    def split(**flags):
        labels = ["many"] * 50 + ["three"] * 3 + ["two"] * 2
        rows = [{"path": f"{i}\udcff.jpg", "split": "", "class": label} for i, label in enumerate(labels)]  # no UTF-8
        return fc.split_data(fc.Args(**flags), rows)

    rows, classes = split(seed=1)
    found = [(row["split"], row["class"]) for row in rows]
    assert classes == {"class": ["many", "three"]} and len(rows) == 53
    assert [found.count((split, "many")) for split in fc.SPLITS] == [40, 5, 5]
    assert [found.count((split, "three")) for split in fc.SPLITS] == [1, 1, 1]
    other, path = split(seed=2)[0], str(tmp_path / "split.csv")
    fc.write_csv(path, other)
    assert split(seed=1)[0] == rows != other == split(seed=1, split_file=path)[0]


TRAIN = {"train/disc": 30, "train/square": 30}


@pytest.mark.parametrize("folders, sizes", [
    (TRAIN | {"valid/disc": 5, "valid/square": 5, "test/disc": 5, "test/square": 5}, [60, 10, 10]),
    (TRAIN | {"test/disc": 5, "test/square": 5}, [54, 6, 10]),  # a tenth of each class in train/ for validation
    ({"Training/disc": 30, "Training/square": 30, "Testing/disc": 5, "Testing/square": 5}, [54, 6, 10]),
    (TRAIN | {"validation/disc": 5, "validation/square": 5, "test": 9}, [54, 10, 6]),  # images without a class
])  # fmt: skip
def test_folders_of_splits(folders, sizes, tmp_path):
    for folder, n in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        for i in range(n):
            (tmp_path / folder / f"{i}.png").touch()
    rows, classes = fc.split_data(fc.Args(), fc.read_folders(str(tmp_path)))
    assert classes == {"class": ["disc", "square"]}
    assert [[row["split"] for row in rows].count(split) for split in fc.SPLITS] == sizes
    assert all(row["path"].lower().startswith(("train", row["split"])) for row in rows)


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
    assert "5 of 8 rows" in capsys.readouterr().out  # not: absent, an image again, a name of two images


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
    rows = fc.read_csv("rijks.csv", [])
    assert [row["ImageId"] for row in rows] == [f"{i:07d}_SK-A-{i}" for i in range(4)]
    assert [row["dc_creator"] for row in rows] == ["Bo\u00ebtius & Zn", "anoniem", "Maris, Matthijs", ""]
    assert {(row["dc_materiaal"], row["dc_type"]) for row in rows} == {("olieverf", "schilderij")}


BAD_FILES = {
    "table.csv": "a,b\n1,2\n", "rows.csv": "ImageId,dc_type\n1,x\n", "latin.csv": "ImageId,dc_type\n1,\u00e9tude\n",
    "gone.csv": "path,split\ndisc/00.png,val\ndisc/99.png,test\n",
}  # fmt: skip


@pytest.mark.parametrize("flags, says", [
    ("", "give --data-dir DIR or --dataset NAME"),
    ("--data-dir empty", "empty: no images in this folder"),
    ("--data-dir flat", "a folder per class is expected there, or --metadata"),
    ("--data-dir {folder} --metadata table.csv", "table.csv: the columns ['ImageId', 'dc_type'] are expected"),
    ("--data-dir {folder} --metadata rows.csv", "--metadata rows.csv: no row has an image in"),
    ("--data-dir {folder} --metadata latin.csv", "latin.csv cannot be read: 'utf-8' codec can't decode"),
    ("--dataset DTD --metadata rows.csv", "--metadata is for images of --data-dir, not of --dataset"),
    ("--data-dir {folder} --split-file gone.csv", "1 of its images are not there, as disc/99.png"),
    ("--dataset Flower", "'torchvision.datasets' has no attribute 'Flower'"),
    ("--data-dir {folder} --arch resnet19", "--arch resnet19: torchvision has alexnet"),
    ("--data-dir {folder} --weights no.pth", "--weights no.pth: neither a file nor one of IMAGENET1K_V1"),
    ("--data-dir {folder} --weights table.csv", "table.csv cannot be loaded: no file of tensors"),
    ("--data-dir {folder} --arch resnet34 --weights {weights}", "another architecture"),
    ("--data-dir {folder} --weights none --arch resnet18 --unfreeze-from layer9", "no such layers, but conv1, bn1"),
    ("--data-dir {folder} --strategy off-the-shelf --unfreeze-from layer4", "needs --strategy fine-tune"),
    ("--data-dir {folder} --pretrained missing.pt", "missing.pt cannot be loaded: there is none"),
    ("--evaluate {weights}", "is not a checkpoint of this script"),
    ("--data-dir {folder} --saliency 3", "need a trained network"),
    ("--data-dir {folder} --epochs 0", "--epochs 0 must be at least 1"),
    ("--data-dir {folder} --learning-rate nan", "--learning-rate nan must be at least 0"),
    ("--data-dir {folder} --seed 17592186044416", "--seed 17592186044416 must be at least 0 and less than 2**44"),
    ("--data-dir {folder} --exp-name a/b", "--exp-name a/b is not the name of a file"),
])  # fmt: skip
def test_bad_input_gets_one_line(flags, says, folder, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.png").touch()
    for name, text in BAD_FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert says in refused(SCRIPT, *flags.format(folder=folder, weights=weights).split(), cwd=tmp_path)


ARCHS = {  # size of the features
    "vgg11": 512, "alexnet": 4096, "squeezenet1_1": 512, "densenet121": 1024, "googlenet": 1024,
    "mobilenet_v3_small": 1024, "convnext_tiny": 768, "swin_t": 768, "vit_b_16": 768,
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_architectures_of_torchvision(arch):
    model = build(arch, "xyz", image_size=64)
    assert model.heads[0].in_features == ARCHS[arch] and model.preprocessing["size"] == 64
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert model.train()(images)["a"].shape == model.eval()(images)["a"].shape == (2, 3)


def test_what_is_frozen_counts_no_batches_even_where_a_normalisation_has_children():
    class NormAct(nn.BatchNorm2d):  # as timm's
        def __init__(self):
            super().__init__(3)
            self.act = nn.ReLU()

    trunk = nn.Sequential(nn.Sequential(NormAct(), NormAct()), nn.Dropout(), NormAct())
    model = fc.Classifier(trunk, 3, {"mean": [0.0] * 3, "std": [1.0] * 3}, {"class": ["a", "b"]})
    model.freeze("0.1")
    assert model.frozen == [trunk[0][0], trunk[0][0].act]
    assert [parameter.requires_grad for parameter in trunk.parameters()] == [False] * 2 + [True] * 4


def test_images_are_turned_laid_on_white_and_have_eight_bits(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    Image.fromarray(np.dstack([ramp, ramp, ramp, np.zeros_like(ramp)]), "RGBA").save(tmp_path / "clear.png")
    Image.fromarray(np.full((64, 64), 300, np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("L", (2, 201)).save(tmp_path / "line.png")
    half, exif = Image.new("CMYK", (64, 64), (0, 0, 0, 255)), Image.Exif()
    half.paste((0, 0, 0, 0), (0, 0, 64, 32))
    exif[0x0112] = 6  # turned to the right: its upper half is its right half
    half.save(tmp_path / "turned.jpg", exif=exif)
    preprocessing = {"size": 32, "resize": 32, "interpolation": "bilinear"}
    names = ["clear.png", "turned.jpg", "deep.png", "bomb.png", "line.png"]
    pictures = fc.Pictures(str(tmp_path), names, preprocessing)
    (clear, turned, *_), _, (*none, deep, bomb, line) = zip(*(pictures[i] for i in range(5)))
    assert (clear == 255).all() and turned[:, :, :14].max() < 20 and turned[:, :, 18:].min() > 235
    assert none == ["", ""] and deep.startswith("ValueError: mode I;16") and "DecompressionBomb" in bomb
    assert line == "ValueError: mode L, (2, 201): 8 bits a channel, sides to 1:100 are expected"


def test_inception_scales_its_input_as_its_weights_want(tmp_path):
    theirs = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    model = build("inception_v3", weights=tmp_path / "inception.pth").eval()
    assert model.preprocessing["size"] == 299 and model.preprocessing["resize"] == 342
    images, theirs.fc = torch.randint(256, (2, 3, 299, 299), dtype=torch.uint8), nn.Identity()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        assert torch.allclose(model.features(images), theirs((images / 255 - mean) / std), atol=1e-4)
    saved = {"args": {"arch": "inception_v3"}, "classes": {"a": ["x", "y"]}, "preprocessing": model.preprocessing}
    again = fc.restore(saved | {"model": model.state_dict()}, "inception_v3", None).eval()
    with torch.no_grad():
        assert torch.equal(model(images)["a"], again(images)["a"])


def test_preprocessing_is_that_of_the_weights(tmp_path):
    wide = picture("disc", np.random.default_rng(0), side=270).crop((0, 70, 270, 190))
    wide.save(tmp_path / "wide.png")
    for arch in ("resnet18", "efficientnet_b0"):  # bilinear, bicubic
        preset, model = models.get_model_weights(arch).IMAGENET1K_V1.transforms(), build(arch)
        image, _, error = fc.Pictures(str(tmp_path), ["wide.png"], model.preprocessing)[0]
        assert image.dtype == torch.uint8 and image.shape == (3, 224, 224) and not error
        ours = (image.float() - model.mean) / model.std
        assert (ours - preset(wide)).abs().max() < 0.05  # one grey level is 0.02
    small = build("resnet18", image_size=112).preprocessing
    assert (small["size"], small["resize"]) == (112, 128)
    assert fc.make_trunk("resnet50", "IMAGENET1K_V2", None, random=True)[2]["resize"] == 232  # from scratch as well


@pytest.mark.parametrize("channels_last", [False, True])
def test_visual_back_prop_finds_the_only_thing_there_is(channels_last):
    """Identity layers: the product of the maps is the picture itself."""

    class Permuted(nn.Module):  # as in ConvNeXt and Swin
        def __init__(self):
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x):
            self.act(torch.ones(1, 3, 5, 5))  # a table of positions, as in Swin V2, and windows, as in MaxViT
            self.act(x.reshape(len(x), 4, -1, 3))
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


@pytest.fixture(scope="session")
def trained(folder, weights, tmp_path_factory):
    """Finished runs of the three strategies: {strategy: (folder of the run, what it printed)}."""
    runs, cwd = {}, tmp_path_factory.mktemp("trained")
    for strategy, more in (("off-the-shelf", "20"), ("fine-tune", "4 --learning-rate 0.01"), ("scratch", "2")):
        flags = f"--data-dir {folder} --weights {weights} --strategy {strategy} --exp-name {strategy} --epochs {more}"
        out = run(SCRIPT, *SMALL, *flags.split(), cwd=cwd).stdout
        runs[strategy] = next((cwd / "runs").glob(f"*__{strategy}__*")), out
    return runs


def test_pictures_have_titles_and_classes(tmp_path):
    figure = fc.draw_confusion(torch.tensor([[3, 1], [0, 17]]), ["a$_$", "dog"], "title")  # no formula
    fc.save_figure(figure, str(tmp_path / "confusion.png"))
    (axes,) = figure.axes
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a$_$", "dog"]
    model, images = build("resnet18"), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    axes = fc.draw_saliency({"other": model, "this": model}, images, ["disc\n-> cross", "square\n-> disc"]).axes
    titles = ["image", "Grad-CAM\nother", "Grad-CAM\nthis", "VisualBackProp\nother", "VisualBackProp\nthis"]
    assert [panel.get_title() for panel in axes] == titles + [""] * 5
    assert [panel.get_ylabel() for panel in axes[::5]] == ["disc\n-> cross", "square\n-> disc"]


def test_metrics_by_hand():
    logits, ranked = torch.full((6, 7), -1.0), torch.tensor([[9.0, 8, 7, 6, 5, 4]] * 6)
    logits[range(6), [0, 0, 1, 2, 2, 1]] = 1.0
    targets = {"a": [0, 1, 1, 2, 0, fc.MISSING], "six": [4, 5] + [fc.MISSING] * 4, "none": [fc.MISSING] * 6}
    targets["three"] = [2, 1, 2, 1, 2, 1]
    targets = {task: torch.tensor(target) for task, target in targets.items()}
    values = {"a": logits, "six": ranked, "none": ranked, "three": ranked[:, :3]}
    shares, confusions = fc.measure(values, torch.arange(6), targets, "val")
    assert shares["val/a/top1"] == 3 / 5 and shares["val/six/top5"] == 0.5 and shares["val/three/top5"] == 1.0
    # precision and recall: class 0: 1/2, 1/2; class 1: 1, 1/2; class 2: 1/2, 1; others have no images
    assert shares["val/a/macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    assert confusions["a"][:3, :3].tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]] and confusions["a"].sum() == 5
    # missing labels do not count
    parts = (nn.functional.cross_entropy(values[task], targets[task]) for task in ("a", "six", "three"))
    assert shares["val/loss"] == pytest.approx(sum(parts).item())


@pytest.mark.parametrize("until", [None, "layer4"])
def test_frozen_means_frozen(until):
    """No parameter, no statistic of batch normalisation and no dropout of what is frozen is at work."""
    torch.manual_seed(0)
    model = build("resnet18")
    model.freeze(until)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = fc.make_optimizer(fc.Args(momentum=0.0, nesterov=False, learning_rate=0.1), model)
    batches = [(torch.randint(256, (4, 3, 32, 32)), torch.arange(4))] * 2
    fc.train_epoch(model, optimizer, batches, {"a": torch.tensor([0, 1, 0, 1])})
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    tops = {name.split(".")[1] if name.startswith("trunk") else "heads" for name in changed}
    assert tops == {"heads", until} - {None} and ("trunk.layer4.0.bn1.running_mean" in changed) == bool(until)


def test_the_papers_optimizers():
    model = build("resnet18")
    sgd = fc.make_optimizer(fc.Args(weight_decay=0.5), model)
    found = [(group["weight_decay"], {p.ndim > 1 for p in group["params"]}) for group in sgd.param_groups]
    assert found == [(0.5, {True}), (0.0, {False})]
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (1e-3, 0.9, True)
    assert not fc.make_optimizer(fc.Args(momentum=0), model).defaults["nesterov"]
    rms = fc.make_optimizer(fc.Args(strategy="off-the-shelf"), model)
    assert isinstance(rms, torch.optim.RMSprop)
    assert (rms.defaults["lr"], rms.defaults["alpha"], rms.defaults["eps"]) == (1e-3, 0.9, 1e-8)
    adam = fc.make_optimizer(fc.Args(strategy="off-the-shelf", optimizer="adam", learning_rate=3e-4), model)
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["lr"] == 3e-4


def test_links_do_not_put_an_image_into_two_splits(folder, tmp_path):
    for kind in ("disc", "square"):
        (tmp_path / kind).symlink_to(folder / kind)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/up").symlink_to(tmp_path)
    (tmp_path / "more/same.png").symlink_to(folder / "disc/00.png")
    found = fc.find_images(str(tmp_path))
    assert len(found) == 80 and {os.path.dirname(path) for path in found} == {"disc", "square"}


@pytest.mark.parametrize("more", ["--strategy off-the-shelf", "--cache-gb 0"])
def test_unreadable_images_are_named_counted_and_left_out(more, folder, tmp_path, monkeypatch):
    """Before they are read it is known that the run can be saved."""
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "disc/03.png").write_bytes((data / "disc/03.png").read_bytes()[:100])
    odd = "odd.png" if sys.platform == "darwin" else "\udcff.png"  # macOS refuses names that are not UTF-8
    (data / "disc/04.png").rename(data / "disc" / odd)
    (data / "disc" / odd).write_bytes(b"")
    (data / "square/04.png").unlink()
    (data / "square/04.png").symlink_to("nowhere")
    flags = f"--data-dir {data} --weights none --epochs 2 {more}"
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: sys.exit("no account")))
    for unsaved, says in (("--logdir data/disc/00.png", "split.csv cannot be written: "), ("--track", "no account")):
        done = run(SCRIPT, *SMALL, *flags.split(), *unsaved.split(), cwd=tmp_path, check=False)
        assert says in done.stderr.splitlines()[0] and "left out" not in done.stdout
    monkeypatch.setattr(time, "time", lambda: 7.0)
    (tmp_path / "again/data__finetune_classify__1__7").mkdir(parents=True)
    done = run(SCRIPT, *SMALL, *flags.split(), "--logdir", "again", cwd=tmp_path)
    out = done.stdout.encode().decode()
    used = sum(len(done.variables["members"](split)) for split in fc.SPLITS)
    assert used == (120 if "--cache-gb" in more else 117)  # without a cache each batch leaves them out
    assert out.count("disc/03.png' cannot be read") == 1 == out.count("square/04.png' cannot be read, FileNotFound")
    assert "3 images could not be read and were left out; saved again/data__finetune_classify__1__7-2" in out


def test_a_data_set_of_torchvision(folder, weights, tmp_path, monkeypatch):
    class Toy:
        classes = ["cross", "disc", "square"]

        def __init__(self, root, split="train", download=False):
            if not download:
                raise RuntimeError("Dataset not found")
            numbers = {"train": range(30), "val": range(30, 34), "test": range(34, 40)}[split]
            self.images = [(folder / name / f"{i:02d}.png", k) for k, name in enumerate(self.classes) for i in numbers]
            self._labels = [label for _, label in self.images]

        def __getitem__(self, i):
            return Image.open(self.images[i][0]), self.images[i][1]

    monkeypatch.setattr(torchvision.datasets, "Toy", Toy, raising=False)
    flags = ["--dataset", "Toy", "--weights", weights, "--strategy", "off-the-shelf", "--epochs", 1]
    assert "Dataset not found" in refused(SCRIPT, *SMALL, *flags, cwd=tmp_path)
    out = run(SCRIPT, *SMALL, *flags, "--download", cwd=tmp_path).stdout
    assert "90 train, 12 val, 18 test, class: 3 classes" in out
    out = run(SCRIPT, "--evaluate", path := only_run(tmp_path / "runs"), "--download", cwd=tmp_path).stdout
    assert "on 18 test images" in out
    # a folder is no place for the data set of the run: neither is that downloaded into it, nor tested in its stead
    assert "Dataset not found" in refused(SCRIPT, "--evaluate", path, "--data-dir", folder, cwd=tmp_path)


@pytest.mark.parametrize("strategy", ["off-the-shelf", "fine-tune", "scratch"])
def test_a_run_leaves_what_it_should(trained, strategy, weights):
    folder, out = trained[strategy]
    logged = scalars(folder, TIME)
    names = {f"{split}/{name}" for split in ("val", "test") for name in ("loss", "top1", "top5", "macro_f1")}
    assert set(logged) == {"train/loss"} | names
    checkpoint, state = torch.load(folder / f"{strategy}.pt"), torch.load(weights)
    assert checkpoint["best"] == pytest.approx(min(value for _, value in logged["val/loss"]))
    assert checkpoint["epoch"] == len(logged["train/loss"]) == len(checkpoint["history"])
    same = [torch.equal(checkpoint["model"][f"trunk.{name}"], state[name]) for name in state if name[:2] != "fc"]
    assert all(same) if strategy == "off-the-shelf" else not any(same[:1])
    splits = [row["split"] for row in fc.read_csv(folder / "split.csv", [])]
    assert [splits.count(name) for name in fc.SPLITS] == [96, 12, 12]
    parameters = "1,539 of 11,178,051" if strategy == "off-the-shelf" else "11,178,051 of 11,178,051"
    assert f"{parameters} parameters are trained, images of 32 pixels" in out
    for name in ("curves.png", "confusion.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 200 and np.asarray(image).std() > 5
    if strategy != "scratch":  # two epochs from random weights may learn nothing
        assert logged["train/loss"][-1][1] < 0.9 * logged["train/loss"][0][1]


def test_early_stopping_and_the_best_weights(folder, weights, tmp_path):
    flags = f"--data-dir {folder} --weights {weights} --strategy off-the-shelf --learning-rate 3 --patience 2"
    variables = run(SCRIPT, *SMALL, *flags.split(), cwd=tmp_path).variables
    tested = variables["model"].heads[0].weight
    path = only_run(tmp_path / "runs")
    losses = [value for _, value in scalars(path)["val/loss"]]
    assert len(losses) == int(np.argmin(losses)) + 3 < 100
    checkpoint = torch.load(path / "finetune_classify.pt")
    assert checkpoint["best"] == pytest.approx(min(losses), rel=1e-6)
    assert [tested.equal(checkpoint[name]["heads.0.weight"]) for name in ("model", "last")] == [True, False]

    def loss(state, split):  # on the features of a split
        chosen = variables["members"](split)
        logits = nn.functional.linear(variables["cache"][chosen], state["heads.0.weight"], state["heads.0.bias"])
        return nn.functional.cross_entropy(logits, variables["targets"]["class"][chosen]).item()

    assert loss(checkpoint["model"], "val") == pytest.approx(min(losses), rel=1e-4)
    torch.save(checkpoint, tmp_path / "copied.pt")  # without its split.csv all images would be tested
    assert "split.csv is not there" in refused(SCRIPT, "--evaluate", tmp_path / "copied.pt", cwd=tmp_path)
    # ended: not tested again, and a checkpoint's flags name no folder to write to
    assert "has ended" in refused(SCRIPT, "--resume", path, cwd=tmp_path)
    checkpoint["args"] |= {"exp_name": "../../escaped", "logdir": str(tmp_path / "elsewhere")}
    torch.save(checkpoint, path / "finetune_classify.pt")
    error = refused(SCRIPT, "--resume", path, "--arch", "vgg11", "--patience", 3, cwd=tmp_path)
    assert "is of --arch resnet18, not vgg11" in error
    for flag, value in (("--optimizer", "adam"), ("--pretrained", "elsewhere")):
        error = refused(SCRIPT, "--resume", path, flag, value, cwd=tmp_path)
        assert f"{flag} {value}: the run has None (None: the default)" in error
    # another learning rate is at work: none, so nothing moves
    flags = "--patience 3 --learning-rate 0 --weight-decay 0.5".split()
    order = run(SCRIPT, "--resume", path, *flags, cwd=tmp_path).variables["order"]
    assert sorted(order.tolist()) == sorted(variables["order"].tolist()) and not order.equal(variables["order"])
    after = torch.load(path / "finetune_classify.pt")
    assert loss(after["last"], "train") == pytest.approx(scalars(path)["train/loss"][-1][1], rel=1e-4)
    assert [group["weight_decay"] for group in after["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert after["epoch"] == len(losses) + 1 == len(scalars(path)["val/loss"])
    assert torch.equal(after["last"]["heads.0.weight"], checkpoint["last"]["heads.0.weight"])
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs", "copied.pt"}
    assert only_run(tmp_path / "runs") == path


def test_another_seed_draws_another_head_and_another_order(trained, folder, weights, tmp_path):
    split = f"{trained['off-the-shelf'][0]}/split.csv"
    flags = f"--data-dir {folder} --weights {weights} --split-file {split} --learning-rate 0 --epochs 1"
    flags = [*SMALL, *flags.split(), "--strategy", "off-the-shelf", "--seed"]
    one, two = (run(SCRIPT, *flags, seed, cwd=tmp_path).variables for seed in (1, 2))
    assert not one["model"].heads[0].weight.equal(two["model"].heads[0].weight)
    assert not one["order"].equal(two["order"]) and one["members"]("train").equal(two["members"]("train"))


def test_neither_workers_nor_a_signal_nor_broken_images_change_the_result(folder, tmp_path):
    """A run with workers, ended by SIGTERM to its process group as by a scheduler, then resumed; and one without."""
    data = shutil.copytree(folder, tmp_path / "data")
    for i in range(1, 4):  # images that cannot be read, of which a resumed run does not know yet
        (data / f"disc/{i:02d}.png").write_bytes(b"")
    flags = f"--data-dir {data} --weights none --arch mobilenet_v3_small --image-size 32 --patience 99 --cache-gb 0"
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
    process = start(SCRIPT, *flags.split(), "--epochs", 400, "--workers", 2, cwd=tmp_path / "killed")
    while "epoch 1:" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    killed = only_run(tmp_path / "killed/runs")
    assert process.returncode == 130 and f"--resume runs/{killed.name} goes on" in out, out
    assert out.count("Traceback") == out.count("Exception ignored in"), out  # torch's, of workers that were killed
    epochs = torch.load(killed / "finetune_classify.pt")["epoch"] + 1
    run(SCRIPT, "--resume", killed, "--epochs", epochs, "--workers", 0, cwd=tmp_path)
    done = run(SCRIPT, *flags.split(), "--epochs", epochs, "--workers", 0, cwd=tmp_path / "straight")
    assert {getattr(module, "momentum", 0.1) for module in done.variables["model"].modules()} == {0.1}  # it has 0.01
    straight = only_run(tmp_path / "straight/runs")
    one, two = (torch.load(path / "finetune_classify.pt")["last"] for path in (killed, straight))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())  # with dropout
    assert scalars(killed, TIME) == scalars(straight, TIME)  # and no point twice


def test_a_full_disk_leaves_no_half_file(folder, tmp_path):
    flags = f"--data-dir {folder} --weights none --arch mobilenet_v3_small --image-size 32 --workers 0"
    limit = resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)
    process = start(SCRIPT, *flags.split(), cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(*limit))
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "cannot be written" in out and "Traceback" not in out, out
    assert not [path for path in only_run(tmp_path / "runs").iterdir() if path.suffix in (".pt", ".tmp")]


def test_evaluate_predict_and_saliency(trained, folder, tmp_path):
    path = trained["fine-tune"][0]
    out = run(SCRIPT, "--evaluate", path, "--saliency", 2, cwd=folder).stdout
    top1 = scalars(path)["test/top1"][0][1]
    assert "on 12 test images: test/loss" in out and f"test/top1 {top1:.4f}" in out
    with Image.open(path / "saliency.png") as image:
        assert np.asarray(image.convert("L")).std() > 20
    shutil.copytree(folder, tmp_path / "moved")  # and one image lost
    lost = next(row["path"] for row in fc.read_csv(f"{path}/split.csv", []) if row["split"] == "train")
    (tmp_path / "moved" / lost).unlink()
    moved = run(SCRIPT, "--evaluate", path, "--data-dir", tmp_path / "moved", cwd=folder).stdout
    assert "on 12 test images: test/loss" in moved and f"test/top1 {top1:.4f}" in moved
    assert "images are there" not in moved
    for i in range(12):
        (tmp_path / f"moved/disc/{i:02d}.png").unlink(missing_ok=True)
    out = run(SCRIPT, "--evaluate", path, "--data-dir", tmp_path / "moved", cwd=folder).stdout
    left = len(list((tmp_path / "moved").glob("*/*")))
    assert f"{left} of the run's 120 images are there: its training images may be tested" in out
    assert f"on {left} test images" in out and left < 109
    (tmp_path / "x.csv").write_text("ImageId,shape\ndisc/00.png,disc\n")
    error = refused(SCRIPT, "--evaluate", path, "--label-column", "shape", "--metadata", tmp_path / "x.csv", cwd=folder)
    assert "the network's labels are class, not shape" in error
    # images that the run has never seen, without the data that it was trained on
    rng = np.random.default_rng(1)
    for kind in ("disc", "unknown"):
        (tmp_path / "new" / kind).mkdir(parents=True)
        picture("disc", rng).save(tmp_path / f"new/{kind}/a.png")
    (tmp_path / "new/broken.png").write_bytes(b"no image")
    out = run(SCRIPT, "--evaluate", path, "--data-dir", tmp_path / "new", "--image-size", 64, cwd=folder).stdout
    assert "on 1 test images" in out and "1 images of classes that are not in the network" in out
    flags = ["--evaluate", path, "--predict", tmp_path / "new", "--data-dir", "gone"]
    out = run(SCRIPT, *flags, cwd=tmp_path).stdout
    rows = fc.read_csv(path / "predictions.csv", [])
    assert [row["path"] for row in rows] == ["disc/a.png", "unknown/a.png"] and "broken.png' cannot be read" in out
    assert all(row["class"] in ("cross", "disc", "square") for row in rows)
    assert all(1 / 3 <= float(row["class_probability"]) <= 1 for row in rows)


def test_a_chain_to_several_tasks(trained, folder, tmp_path):
    """--pretrained takes all but the heads of a network with other classes; labels may be missing."""
    rows = []
    for i, path in enumerate(sorted(folder.glob("*/*.png"))):
        kind, is_round = path.parent.name, "" if i % 4 == 0 else "yes" if path.parent.name == "disc" else "no"
        rows.append({"ImageId": f"{kind}/{path.name}", "round": is_round, "shape": kind})
    fc.write_csv(str(tmp_path / "table.csv"), rows)
    path = trained["fine-tune"][0]
    flags = f"--data-dir {folder} --metadata table.csv --label-column round shape --pretrained {path} --epochs 3"
    assert "of --arch resnet18, not vgg11" in refused(SCRIPT, *SMALL, *flags.split(), "--arch", "vgg11", cwd=tmp_path)
    # by other labels the split is another
    error = refused(SCRIPT, *SMALL, *flags.replace(str(folder), f"{folder}/").split(), cwd=tmp_path)
    assert re.search(rf"has seen \d+ of the test images in training: give --split-file {re.escape(str(path))}", error)
    flags += f" --split-file {path}/split.csv --strategy off-the-shelf"
    out = run(SCRIPT, *SMALL, *flags.split(), cwd=tmp_path).stdout
    assert "round: 2 classes, shape: 3 classes" in out
    chained = torch.load((run_dir := only_run(tmp_path / "runs")) / "finetune_classify.pt")
    source = torch.load(path / "fine-tune.pt")
    assert chained["classes"]["round"] == ["no", "yes"] and chained["model"]["heads.0.weight"].shape == (2, 512)
    trunk = [name for name in source["model"] if name.startswith("trunk")]
    assert all(torch.equal(chained["model"][name], source["model"][name]) for name in trunk)
    names = {f"test/{task}/{name}" for task in ("shape", "round") for name in ("top1", "top5", "macro_f1")}
    assert names <= set(scalars(run_dir)) and (run_dir / "confusion_round.png").exists()
    # no link of a chain has the first head of a link before it
    flags, heads = f"--data-dir {folder} --strategy off-the-shelf --learning-rate 0 --epochs 1".split(), []
    for name in "abc":
        more = ["--pretrained", path, "--split-file", path / "split.csv", "--logdir", name]
        run(SCRIPT, *SMALL, *flags, *more, cwd=tmp_path)
        path = only_run(tmp_path / name)
        heads.append(torch.load(path / "finetune_classify.pt")["model"]["heads.0.weight"])
    assert not any(torch.equal(heads[i], heads[k]) for i, k in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("arch", ["densenet121", "vit_b_16", "mnasnet0_5"])
def test_published_files_have_older_names(arch, tmp_path):
    torch.manual_seed(0)
    state, older = models.get_model(arch, weights=None).state_dict(), {}
    for name, tensor in state.items():
        name = re.sub(r"(denselayer\d+\.\w+)([12])\.", r"\1.\2.", name)
        older[name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")] = tensor
    torch.save(older, tmp_path / "older.pth")
    trunk = fc.make_trunk(arch, str(tmp_path / "older.pth"), None)[0].state_dict()
    assert len(trunk) > 100 and all(torch.equal(tensor, state[name]) for name, tensor in trunk.items())


@needs_cuda
@pytest.mark.parametrize("more", [[], ["--cache-gb", 0, "--workers", 2]])
def test_it_trains_resumes_and_evaluates_on_cuda(more, folder, weights, tmp_path):
    flags = [*SMALL, "--data-dir", folder, "--weights", weights, "--learning-rate", 0.01, "--epochs", 3, *more]
    assert "on cuda" in run_on_cuda(SCRIPT, *flags, cwd=tmp_path)
    run_on_cuda(SCRIPT, "--resume", run_dir := only_run(tmp_path / "runs"), "--epochs", 5, cwd=tmp_path)
    logged = scalars(run_dir)
    assert len(logged["train/loss"]) == 5 and logged["train/loss"][-1][1] < logged["train/loss"][0][1]
    out = run_on_cuda(SCRIPT, "--evaluate", run_dir, cwd=tmp_path)
    assert f"test/top1 {logged['test/top1'][-1][1]:.4f}" in out
