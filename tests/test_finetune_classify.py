"""Classification: data and its defects, networks, strategies, metrics, and whole runs on pictures made here."""

import csv
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import finetune_classify as fc
import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, run, scalars
from PIL import Image
from torch import nn
from torchvision import models

SMALL = ["--arch", "resnet18", "--image-size", 32, "--workers", 0, "--batch-size", 16]


def picture(kind, rng, side=40):
    """A bright disc, square or cross of any colour and place on dark noise."""
    y, x = np.mgrid[:side, :side]
    cy, cx, r = rng.integers(14, side - 14), rng.integers(14, side - 14), rng.integers(7, 12)
    dy, dx = abs(y - cy), abs(x - cx)
    mask = {
        "disc": dy**2 + dx**2 < r**2,
        "square": (dy < r) & (dx < r),
        "cross": (dy < r) & (dx < r) & ((dy < 3) | (dx < 3)),
    }[kind]
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


def defaults(**flags):
    args = fc.Args(**flags)
    args.optimizer, args.learning_rate = args.optimizer or "sgd", args.learning_rate or 1e-3
    return args


# --------------------------------------------------------------------------------------------------------------- data


def test_a_class_of_three_images_has_one_in_each_split():
    labels = ["many"] * 50 + ["three"] * 3 + ["two"] * 2
    data = fc.Data([f"{i}.jpg" for i in range(55)], {"class": labels}, [""] * 55)
    data, classes = fc.split_data(fc.Args(), data)
    assert classes == {"class": ["many", "three"]} and len(data.paths) == 53
    by_split = {
        split: [label for label, s in zip(data.labels["class"], data.splits) if s == split] for split in fc.SPLITS
    }
    assert {split: (found.count("many"), found.count("three")) for split, found in by_split.items()} == {
        "train": (40, 1), "val": (5, 1), "test": (5, 1),
    }  # fmt: skip


def test_the_split_is_the_seed_s_and_can_be_used_again(folder, tmp_path):
    splits = []
    for seed in (1, 1, 2):
        data, _ = fc.split_data(fc.Args(seed=seed), fc.read_data(fc.Args(data_dir=str(folder))))
        splits.append(data.splits)
    assert splits[0] == splits[1] != splits[2]
    with open(tmp_path / "split.csv", "w") as file:
        csv.writer(file).writerows([["path", "split"], *zip(data.paths, data.splits)])
    again, _ = fc.split_data(
        fc.Args(split_file=str(tmp_path / "split.csv")), fc.read_data(fc.Args(data_dir=str(folder)))
    )
    assert again.splits == splits[2]


def test_fixed_splits(folder, tmp_path):
    for split, numbers in (("train", range(30)), ("val", range(30, 35)), ("test", range(35, 40))):
        for kind in ("disc", "square"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in numbers:
                (tmp_path / split / kind / f"{i}.png").symlink_to(folder / kind / f"{i:02d}.png")
    data, classes = fc.split_data(fc.Args(), fc.read_data(fc.Args(data_dir=str(tmp_path))))
    assert classes == {"class": ["disc", "square"]} and [data.splits.count(s) for s in fc.SPLITS] == [60, 10, 10]


RIJKS = """,ImageId,dc_creator,dc_materiaal,dc_type
0,SK-A-1,Rembrandt,olieverf,schilderij
1,SK-A-2.jpg,  anoniem,olieverf,schilderij
2,RP-P-3,Rembrandt,papier,prent
3,absent,Rembrandt,papier,prent
4,RP-P-4, ,"papier, karton",
"""


@pytest.fixture
def rijks(tmp_path):
    (tmp_path / "jpg").mkdir()
    for name in ("SK-A-1", "SK-A-2", "RP-P-3", "RP-P-4"):
        Image.new("RGB", (60, 40)).save(tmp_path / "jpg" / f"{name}.jpg")
    (tmp_path / "rijks.csv").write_text(RIJKS)
    return tmp_path


def test_the_rijksmuseum_s_table(rijks, capsys):
    columns = ["dc_creator", "dc_materiaal", "dc_type"]
    args = fc.Args(data_dir=str(rijks / "jpg"), metadata=str(rijks / "rijks.csv"), label_column=columns)
    data = fc.read_data(args)
    assert data.paths == ["SK-A-1.jpg", "SK-A-2.jpg", "RP-P-3.jpg", "RP-P-4.jpg"]
    assert data.labels == {
        "dc_creator": ["Rembrandt", None, "Rembrandt", None],
        "dc_materiaal": ["olieverf", "olieverf", "papier", "papier, karton"],
        "dc_type": ["schilderij", "schilderij", "prent", None],
    }
    assert "1 of 5 rows" in capsys.readouterr().out


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
    exec((ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    with open("rijks.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ImageId"] for row in rows] == [f"{i:07d}_SK-A-{i}" for i in range(4)]
    assert [row["dc_creator"] for row in rows] == ["Bo\u00ebtius & Zn", "anoniem", "Maris, Matthijs", ""]
    assert {(row["dc_materiaal"], row["dc_type"]) for row in rows} == {("olieverf", "schilderij")}
    (tmp_path / "jpg").mkdir()
    for row in rows:
        Image.new("RGB", (60, 40)).save(tmp_path / f"jpg/{row['ImageId']}.jpg")
    data = fc.read_data(fc.Args(data_dir="jpg", metadata="rijks.csv", label_column=["dc_creator", "dc_type"]))
    assert len(data.paths) == 4 and data.labels["dc_creator"] == ["Bo\u00ebtius & Zn", None, "Maris, Matthijs", None]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "--data-dir None: there is no such folder"),
        ("--data-dir missing", "--data-dir missing: there is no such folder"),
        ("--data-dir empty", "--data-dir empty: no images in it"),
        ("--data-dir flat", "a folder per class is expected there, or --metadata"),
        ("--data-dir {folder} --metadata nothing.csv", "--metadata nothing.csv: [Errno 2]"),
        ("--data-dir {folder} --metadata table.csv", "--image-column ImageId: table.csv has the columns 'a', 'b'"),
        ("--data-dir {folder} --arch resnet19", "did you mean resnet18"),
        (
            "--data-dir {folder} --weights no.pth",
            "--weights no.pth: neither a file nor one of resnet50's weights, IMAGENET1K_V1",
        ),
        ("--data-dir {folder} --weights table.csv", "--weights table.csv is no state dict"),
        ("--data-dir {folder} --arch resnet34 --weights {weights}", "another architecture"),
        ("--data-dir {folder} --weights none --arch resnet18 --unfreeze-from layer9", "consists of conv1, bn1"),
        ("--data-dir {folder} --strategy off-the-shelf --unfreeze-from layer4", "use it with --strategy fine-tune"),
        ("--data-dir {folder} --strategy scratch --pretrained x.pt", "no --pretrained"),
        ("--data-dir {folder} --pretrained missing.pt", "no checkpoint file at missing.pt"),
        ("--evaluate table.csv", "table.csv is not a checkpoint"),
        ("--data-dir {folder} --saliency 3", "--saliency needs the checkpoint"),
        ("--data-dir {folder} --epochs 0", "--epochs must be at least 1"),
        ("--data-dir {folder} --split-file table.csv", "--split-file table.csv"),
    ],
)
def test_bad_input_gets_one_line(flags, says, folder, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "flat/a.png")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    done = run("finetune_classify.py", *flags.format(folder=folder, weights=weights).split(), cwd=tmp_path, check=False)
    assert done.returncode == 1 and says in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr


def test_odd_images_become_rgb(tmp_path):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    Image.fromarray(grey).save(tmp_path / "L.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "P.png")
    Image.fromarray(np.stack([grey, 255 - grey * 0], 2), "LA").save(tmp_path / "LA.png")
    clear = np.zeros((48, 64, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
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


def test_scans_are_decoded_at_a_fraction(tmp_path):
    Image.new("RGB", (4_000, 3_000), "red").save(tmp_path / "scan.jpg")
    assert fc.open_image(str(tmp_path / "scan.jpg"), 256).size == (1_000, 750)
    assert fc.open_image(str(tmp_path / "scan.jpg"), 2_000).size == (4_000, 3_000)


def test_unreadable_images_are_named_counted_and_left_out(folder, weights, tmp_path):
    data = tmp_path / "data"
    for kind in ("disc", "square"):
        (data / kind).mkdir(parents=True)
        for i in range(20):
            (data / kind / f"{i}.png").write_bytes((folder / kind / f"{i:02d}.png").read_bytes())
    whole = (data / "disc/3.png").read_bytes()
    (data / "disc/3.png").write_bytes(whole[: len(whole) // 2])
    (data / "square/4.png").write_bytes(b"no image")
    checked = run("finetune_classify.py", "--data-dir", data, "--check-data", "--workers", 0, cwd=tmp_path, check=False)
    assert checked.returncode == 1 and "40 images, 2 of them cannot be read" in checked.stdout
    assert "disc/3.png cannot be read, OSError" in checked.stdout and "square/4.png cannot be read" in checked.stdout
    for strategy in ("off-the-shelf", "fine-tune"):
        flags = [
            "--data-dir",
            data,
            "--weights",
            weights,
            "--strategy",
            strategy,
            "--epochs",
            2,
            "--exp-name",
            strategy,
        ]
        out = run("finetune_classify.py", *SMALL, *flags, cwd=tmp_path).stdout
        assert out.count("disc/3.png cannot be read") == 1 and out.count("square/4.png cannot be read") == 1
        assert "2 images could not be read and were left out" in out


# ----------------------------------------------------------------------------------------------------------- networks

ARCHS = {  # size of the features
    "resnet18": 512, "vgg11": 512, "alexnet": 4096, "squeezenet1_1": 512, "densenet121": 1024, "googlenet": 1024,
    "mobilenet_v2": 1280, "mobilenet_v3_small": 1024, "efficientnet_b0": 1280, "shufflenet_v2_x0_5": 1024,
    "mnasnet0_5": 1280, "regnet_y_400mf": 440, "convnext_tiny": 768, "swin_t": 768, "vit_b_16": 768,
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_architectures_of_torchvision(arch):
    args = defaults(arch=arch, weights="none", image_size=64 if arch == "vit_b_16" else None)
    model = fc.Classifier(*fc.make_trunk(args, random=True), {"a": ["x", "y", "z"], "b": ["x", "y"]})
    assert model.heads[0].in_features == ARCHS[arch] and model.preprocessing["size"] in (64, 224)
    images = torch.randint(256, (2, 3, model.preprocessing["size"], model.preprocessing["size"])).float()
    for mode in (True, False):
        logits = model.train(mode)(images)
        assert {name: tuple(values.shape) for name, values in logits.items()} == {"a": (2, 3), "b": (2, 2)}
    assert not any(name.startswith(("trunk.fc", "trunk.AuxLogits.fc")) for name in model.state_dict())


def test_inception_s_traps(tmp_path):
    """Two outputs in training, 299 pixels, an input scaled by the network, and no batch of one."""
    model = models.inception_v3(weights=None, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    args = defaults(arch="inception_v3", weights=str(tmp_path / "inception.pth"))
    network = fc.Classifier(*fc.make_trunk(args, random=False), {"a": ["x", "y", "z"]})
    assert network.preprocessing["size"] == 299 and network.preprocessing["resize"] == 342
    assert (
        network.trunk.transform_input
        and not fc.make_trunk(defaults(arch="inception_v3"), random=True)[0].transform_input
    )
    images = torch.zeros(2, 3, 299, 299)
    logits = network.train()(images)
    assert {name: tuple(values.shape) for name, values in logits.items()} == {"a": (2, 3), "aux a": (2, 3)}
    assert list(network.eval()(images[:1])) == ["a"]
    target = torch.tensor([0, 2])
    parts = [nn.functional.cross_entropy(logits[name], target) for name in ("a", "aux a")]
    assert torch.allclose(fc.total_loss(logits, {"a": target}), parts[0] + 0.4 * parts[1])


def test_preprocessing_is_that_of_the_weights(folder):
    args = defaults(arch="resnet18", weights="none")
    preset = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    trunk = fc.make_trunk(args, random=True)
    model, path = fc.Classifier(*trunk, {"a": ["x", "y"]}), folder / "disc/00.png"
    image, _ = fc.Pictures(str(folder), ["disc/00.png"], trunk[3])[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 224, 224)
    ours, theirs = (image.float() - model.mean) / model.std, preset(Image.open(path).convert("RGB"))
    assert (ours - theirs).abs().max() < 0.05  # one grey level is 0.02
    small = fc.make_trunk(defaults(arch="resnet18", weights="none", image_size=112), random=True)[3]
    assert (small["size"], small["resize"]) == (112, 128)


def test_frozen_means_frozen():
    """Off-the-shelf: no parameter, no statistic of batch normalisation and no dropout of the trunk is at work."""
    for until, free in ((None, ()), ("layer4", ("layer4",))):
        torch.manual_seed(0)
        args = defaults(arch="resnet18", weights="none", momentum=0.0, nesterov=False, learning_rate=0.1)
        model = fc.Classifier(*fc.make_trunk(args, random=True), {"a": ["x", "y"]})
        model.freeze(until)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = fc.make_optimizer(args, model)
        for _ in range(2):
            model.train()
            loss = fc.total_loss(model(torch.rand(4, 3, 32, 32) * 255), {"a": torch.tensor([0, 1, 0, 1])})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.split(".")[1] if name.startswith("trunk") else name.split(".")[0] for name in changed} == {
            "heads",
            *free,
        }
        if free:
            assert "trunk.layer4.0.bn1.running_mean" in changed and "trunk.layer4.0.conv1.weight" in changed


def test_missing_labels_do_not_count():
    logits = {"a": torch.tensor([[2.0, 0.0], [0.0, 3.0]]), "b": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 5.0]])}
    targets = {"a": torch.tensor([0, fc.MISSING]), "b": torch.tensor([fc.MISSING, fc.MISSING])}
    expected = nn.functional.cross_entropy(logits["a"][:1], torch.tensor([0]))
    assert torch.allclose(fc.total_loss(logits, targets), expected)


def test_the_papers_optimizers():
    model = fc.Classifier(*fc.make_trunk(defaults(arch="resnet18", weights="none"), random=True), {"a": ["x", "y"]})
    sgd = fc.make_optimizer(defaults(optimizer="sgd", weight_decay=0.5), model)
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.5, 0.0]
    assert all(p.ndim > 1 for p in sgd.param_groups[0]["params"]) and all(
        p.ndim <= 1 for p in sgd.param_groups[1]["params"]
    )
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (1e-3, 0.9, True)
    rms = fc.make_optimizer(defaults(optimizer="rmsprop"), model)
    assert (rms.defaults["lr"], rms.defaults["alpha"], rms.defaults["eps"]) == (1e-3, 0.9, 1e-8)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_by_hand():
    chosen = [0, 0, 1, 2, 2, 1]
    targets = torch.tensor([0, 1, 1, 2, 0, fc.MISSING])
    logits = torch.full((6, 7), -1.0)
    logits[range(6), chosen] = 1.0
    logits[1, 6] = 0.5  # the first six of the row: 0, 6, then ties
    m = fc.measure(logits, targets)
    assert m["top1"] == 3 / 5
    # precision and recall: class 0: 1/2, 1/2; class 1: 1, 1/2; class 2: 1/2, 1; others have no images
    assert m["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    assert m["confusion"][:3, :3].tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]] and m["confusion"].sum() == 5
    assert m["table"]["support"].tolist() == [2, 2, 1, 0, 0, 0, 0]
    ranked = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    assert fc.measure(ranked, torch.tensor([4, 5]))["top5"] == 0.5
    assert fc.measure(ranked[:, :3], torch.tensor([2, 1]))["top5"] == 1.0  # three classes


def test_order_of_images():
    order = fc.Order(list(range(100, 133)), 16, seed=3)
    first = list(order)
    assert [len(batch) for batch in first] == [16, 16] and len(order) == 2  # 33 = 16 + 16 + 1: one alone is no batch
    assert list(order) == first
    order.start = 1
    assert list(order) == first[1:]
    order.epoch, order.start = 1, 0
    assert list(order) != first and set(sum(first, [])) < set(range(100, 133))
    balanced = fc.Order([0] * 90 + [1] * 10, 50, 0, [1 / 90] * 90 + [1 / 10] * 10)
    drawn = [
        i for epoch in range(20) for batch in (setattr(balanced, "epoch", epoch), list(balanced))[1] for i in batch
    ]
    assert 0.45 < np.mean(drawn) < 0.55


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def trained(folder, weights, tmp_path_factory):
    """Finished runs of the three strategies: {strategy: (folder of the run, what it printed)}."""
    runs, cwd = {}, tmp_path_factory.mktemp("trained")
    for strategy, epochs in (("off-the-shelf", 20), ("fine-tune", 4), ("scratch", 2)):
        flags = [
            "--data-dir",
            folder,
            "--weights",
            weights,
            "--strategy",
            strategy,
            "--epochs",
            epochs,
            "--exp-name",
            strategy,
        ]
        flags += ["--learning-rate", 0.01] if strategy == "fine-tune" else []
        out = run("finetune_classify.py", *SMALL, *flags, cwd=cwd).stdout
        runs[strategy] = next((cwd / "runs").glob(f"*__{strategy}__*")), out
    return runs


@pytest.mark.parametrize("strategy", ["off-the-shelf", "fine-tune", "scratch"])
def test_a_run_leaves_what_it_should(trained, strategy, weights):
    folder, out = trained[strategy]
    logged = scalars(folder, leave_out=("charts/images_per_second",))
    epochs = len(logged["train/loss"])
    assert set(logged) == {"train/loss"} | {
        f"{split}/{name}" for split in ("val", "test") for name in ("loss", "top1", "top5", "macro_f1")
    }
    checkpoint = torch.load(folder / f"{strategy}.pt")
    assert checkpoint["best"] == pytest.approx(min(value for _, value in logged["val/loss"]))
    last = torch.load(folder / f"{strategy}_last.pt")
    assert last["epoch"] == epochs and last["step"] == 0 and last["optimizer"]["state"]
    state = torch.load(weights)
    same = [
        torch.equal(checkpoint["model"][f"trunk.{name}"], state[name]) for name in state if not name.startswith("fc")
    ]
    assert all(same) if strategy == "off-the-shelf" else not any(same[:1])
    with open(folder / "split.csv") as file:
        rows = list(csv.DictReader(file))
    assert [sum(row["split"] == name for row in rows) for name in fc.SPLITS] == [96, 12, 12]
    with open(folder / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["cross", "disc", "square"] and sum(
        float(row["support"]) for row in rows
    ) == 12
    recalls = [float(row["recall"]) * float(row["support"]) for row in rows]
    assert sum(recalls) / 12 == pytest.approx(logged["test/top1"][0][1], abs=1e-6)
    trained_parameters = "1,539 of 11,178,051" if strategy == "off-the-shelf" else "11,178,051 of 11,178,051"
    assert f"{trained_parameters} parameters are trained, images of 32 pixels" in out


def test_runs_learn(trained):
    for strategy in ("off-the-shelf", "fine-tune"):
        losses = [value for _, value in scalars(trained[strategy][0])["train/loss"]]
        assert losses[-1] < 0.9 * losses[0], (strategy, losses)


def test_features_are_computed_once(trained, folder, weights, tmp_path):
    cwd = trained["off-the-shelf"][0].parent.parent
    assert "saved the features of 120 images" in trained["off-the-shelf"][1]
    flags = [
        "--data-dir",
        folder,
        "--weights",
        weights,
        "--strategy",
        "off-the-shelf",
        "--epochs",
        20,
        "--logdir",
        tmp_path,
    ]
    out = run("finetune_classify.py", *SMALL, *flags, cwd=cwd).stdout
    assert "features of 120 images from feature_cache/resnet18_" in out
    again, first = scalars(only_run(tmp_path), ()), scalars(trained["off-the-shelf"][0], ())
    assert all(again[tag] == first[tag] for tag in first if tag != "charts/images_per_second")
    out = run("finetune_classify.py", *SMALL, *flags, "--image-size", 40, "--epochs", 1, cwd=cwd).stdout
    assert "saved the features" in out  # other preprocessing, other features


def test_early_stopping_and_the_best_weights(folder, weights, tmp_path):
    flags = [
        "--data-dir",
        folder,
        "--weights",
        weights,
        "--strategy",
        "off-the-shelf",
        "--learning-rate",
        3,
        "--patience",
        2,
    ]
    run("finetune_classify.py", *SMALL, *flags, cwd=tmp_path)
    losses = [value for _, value in scalars(only_run(tmp_path / "runs"))["val/loss"]]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 100
    checkpoint = torch.load(only_run(tmp_path / "runs") / "finetune_classify.pt")
    assert checkpoint["epoch"] == best + 1 and checkpoint["best"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize("strategy", ["off-the-shelf", "fine-tune"])
def test_a_killed_run_resumes_to_the_last_bit(strategy, folder, weights, tmp_path):
    flags = [
        *map(str, SMALL),
        "--data-dir",
        str(folder),
        "--weights",
        str(weights),
        "--strategy",
        strategy,
        "--patience",
        "99",
    ]
    command = [
        sys.executable,
        str(ROOT / "finetune_classify.py"),
        *flags,
        "--epochs",
        "60" if strategy == "off-the-shelf" else "4",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list(tmp_path.glob("runs/*/*_last.pt")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in out, out
    path = only_run(tmp_path / "runs") / "finetune_classify_last.pt"
    run("finetune_classify.py", "--resume", path, cwd=tmp_path)
    other = tmp_path / "straight"
    other.mkdir()
    run("finetune_classify.py", *command[2:], cwd=other)
    resumed, straight = torch.load(path), torch.load(only_run(other / "runs") / "finetune_classify_last.pt")
    assert all(torch.equal(resumed["model"][name], tensor) for name, tensor in straight["model"].items())
    one, two = (scalars(folder, ("charts/images_per_second",)) for folder in (path.parent, only_run(other / "runs")))
    assert one == two


def test_evaluate_predict_and_saliency(trained, folder):
    path = trained["fine-tune"][0] / "fine-tune.pt"
    flags = [
        "--evaluate",
        path,
        "--predict",
        folder / "disc",
        "--saliency",
        2,
        "--compare",
        trained["off-the-shelf"][0] / "off-the-shelf.pt",
    ]
    out = run("finetune_classify.py", *flags, cwd=folder).stdout
    top1 = scalars(path.parent)["test/top1"][0][1]
    assert f"on 12 test images: loss " in out and f"class: top-1 {top1:.4f}" in out
    with open(path.parent / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and {row["class"] for row in rows} <= {"cross", "disc", "square"}
    assert all(1 / 3 <= float(row["class_probability"]) <= 1 for row in rows)
    with Image.open(path.parent / "saliency.png") as image:
        assert image.size == (5 * 32, 2 * 32)
        columns = np.asarray(image).reshape(64, 5, 32, 3).std(axis=(0, 2, 3))
    assert (columns > 1).all()


@pytest.mark.parametrize("arch, size", [("googlenet", 64), ("inception_v3", 96)])
def test_networks_that_rescale_their_input_do_so_again_when_restored(arch, size):
    """Pretrained ones do, random ones do not; a checkpoint has to say which."""
    args = defaults(arch=arch, weights="none", image_size=size)
    for rescales in (True, False):
        model = fc.Classifier(*fc.make_trunk(args, random=True), {"class": ["a", "b"]}).eval()
        model.trunk.transform_input = rescales
        state = {"args": vars(args), "classes": {"class": ["a", "b"]}, "preprocessing": model.preprocessing}
        again = fc.restore(state | {"model": model.state_dict(), "transform_input": rescales}).eval()
        images = torch.randint(0, 256, (2, 3, size, size)).float()
        with torch.no_grad():
            assert torch.equal(model(images)["class"], again(images)["class"])


def test_visual_back_prop_finds_the_only_thing_there_is():
    """Identity layers: the product of the maps is the picture itself."""
    trunk = nn.Sequential()
    for _ in range(2):
        conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        nn.init.dirac_(conv.weight)
        trunk.extend([conv, nn.ReLU(), nn.MaxPool2d(2)])
    preprocessing = {"size": 32, "resize": 32, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
    model = fc.Classifier(trunk.append(nn.Flatten()), 3 * 64, 0, preprocessing, {"class": ["a", "b"]}).eval()
    images = torch.zeros(2, 3, 32, 32)
    images[0, :, 4:12, 8:16] = images[1, :, 20:24, 20:30] = 255.0
    masks = fc.visual_back_prop(model, images)
    assert masks.shape == (2, 32, 32) and masks.min() >= 0 and masks.max() == 1
    for image, mask in zip(images, masks):
        inside = image[0] > 0
        assert mask[inside].mean() > 0.8 and mask[~inside].mean() < 0.1


def test_a_chain_to_other_classes(trained, folder, tmp_path):
    """--pretrained: all but the heads of a network with other classes."""
    for kind in ("disc", "square"):
        (tmp_path / "two" / kind).parent.mkdir(exist_ok=True)
        (tmp_path / "two" / kind).symlink_to(folder / kind)
    path = trained["fine-tune"][0] / "fine-tune.pt"
    flags = ["--data-dir", tmp_path / "two", "--pretrained", path, "--strategy", "off-the-shelf", "--epochs", 1]
    run("finetune_classify.py", *SMALL, *flags, cwd=tmp_path)
    chained, source = torch.load(only_run(tmp_path / "runs") / "finetune_classify.pt"), torch.load(path)
    assert chained["classes"] == {"class": ["disc", "square"]} and chained["model"]["heads.0.weight"].shape == (2, 512)
    trunk = [name for name in source["model"] if name.startswith("trunk")]
    assert all(torch.equal(chained["model"][name], source["model"][name]) for name in trunk)


def test_several_tasks_at_once(folder, weights, tmp_path):
    paths = sorted(path.relative_to(folder) for path in folder.glob("*/*.png"))
    with open(tmp_path / "table.csv", "w") as file:
        table = csv.writer(file)
        table.writerow(["ImageId", "shape", "round"])
        for i, path in enumerate(paths):
            kind = path.parent.name
            table.writerow([path, kind, "" if i % 4 == 0 else "yes" if kind == "disc" else "no"])
    flags = [
        "--data-dir",
        folder,
        "--metadata",
        tmp_path / "table.csv",
        "--label-column",
        "shape",
        "round",
        "--weights",
        weights,
    ]
    out = run("finetune_classify.py", *SMALL, *flags, "--strategy", "off-the-shelf", "--epochs", 3, cwd=tmp_path).stdout
    assert "shape: 3 classes, round: 2 classes" in out
    logged = scalars(only_run(tmp_path / "runs"))
    assert {f"test/{task}/{name}" for task in ("shape", "round") for name in ("top1", "top5", "macro_f1")} <= set(
        logged
    )
    assert len(torch.load(only_run(tmp_path / "runs") / "finetune_classify.pt")["model"]["heads.1.weight"]) == 2


def test_without_network_the_error_says_where_the_file_goes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    done = run("finetune_classify.py", "--data-dir", folder, "--arch", "resnet18", cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "resnet18-f37072fd.pth into" in done.stderr and str(tmp_path / "hub/checkpoints") in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_xception_needs_timm(folder, tmp_path):
    done = run("finetune_classify.py", "--data-dir", folder, "--arch", "xception", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "--arch xception needs timm: pip install timm" in done.stderr
