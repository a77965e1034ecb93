"""Lottery tickets: data, networks, exact pruning, rewinding, controls, stopping and going on, reports, fake CUDA."""

import csv
import json
import os
import pickle
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_cuda, only_run, refused, run, run_on_cuda, scalars, start
from PIL import Image
from torch import load, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune as torch_prune

import lottery_ticket as lt

SCRIPT = "lottery_ticket.py"
ANY = torch.tensor(True)  # the mask of what is not pruned
# 96 training images: 6 updates an epoch
SMALL = ["--arch", "conv", "--image-size", 16, "--batch-size", 16, "--learning-rate", 0.02]
SHORT = ["--epochs", 3, "--rounds", 3, "--rewind", "1ep2it", "--patience", 0, "--milestones", 2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder per class: 3 classes of 40 pictures of stripes of any colour, under noise."""
    root, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    y, x = np.mgrid[:24, :24]
    for kind, direction in {"level": y, "slanting": (x + y) / 1.4, "upright": x}.items():
        (root / kind).mkdir()
        for i in range(40):
            wave = np.sin(direction * 1.3 + rng.uniform(0, 6))[..., None] * rng.uniform(0.5, 1, size=3)
            pixels = 120 + 60 * wave + rng.normal(0, 25, size=(24, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / kind / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def source(folder, tmp_path_factory):
    """The folder of a finished source run of three rounds."""
    cwd = tmp_path_factory.mktemp("source")
    train(folder, *SMALL, *SHORT, cwd=cwd)
    return only_run(cwd / "runs")


@pytest.fixture(scope="session")
def target(folder, tmp_path_factory):
    """The same pictures as two classes."""
    root = tmp_path_factory.mktemp("targets") / "Human LBA"
    root.mkdir()
    for kind in ("level", "upright"):
        (root / kind).symlink_to(folder / kind)
    return root


def train(data, *flags, cwd):
    """A run of the script on a folder."""
    return run(SCRIPT, "--dataset", f"folder:{data}", *flags, cwd=cwd)


def rows_of(run_dir):
    with open(run_dir / "results.csv") as file:
        return list(csv.DictReader(file))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def data_of(folder, **flags):
    """Classes, {split: (images, labels)} and split.csv of a folder of images of 16 pixels."""
    return lt.load_data(lt.Args(dataset=f"folder:{folder}", image_size=16, **flags))


# ------------------------------------------------------------------------------------------------------------ pruning
SHAPES = {"conv1": (12, 3, 3, 3), "conv2": (40, 12, 3, 3), "linear": (25, 40)}
DENSE = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


def random_weights(seed, levels=None):
    rng = np.random.default_rng(seed)
    values = {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for name, shape in SHAPES.items()}
    return {n: v if levels is None else (v * levels).round() / levels for n, v in values.items()}


def whole_filters(masks):
    return all((m.flatten(1).all(1) | ~m.flatten(1).any(1)).all() for m in masks.values())


@pytest.mark.parametrize("kind", ["global", "channel"])
def test_31_rounds_keep_exact_counts_and_nest(kind):
    """Where there are ties and zeros."""
    masks, per_unit = DENSE, {n: int(np.prod(shape[1:])) if kind == "channel" else 1 for n, shape in SHAPES.items()}
    expected = {name: int(np.prod(shape)) // per_unit[name] for name, shape in SHAPES.items()}
    everything = sum(expected.values())
    for r in range(1, 32):
        new = lt.prune(random_weights(r, levels=4), masks, kind, 0.2)
        assert all((new[name] <= masks[name]).all() for name in SHAPES), "not nested"
        kept = {name: int(mask.sum()) for name, mask in new.items()}
        if kind == "global":
            everything -= int(everything / 5 + 0.5)
            assert sum(kept.values()) == max(everything, 3) and min(kept.values()) >= 1
        else:
            expected = {name: max(n - int(n / 5 + 0.5), 1) for name, n in expected.items()}
            assert kept == {name: n * per_unit[name] for name, n in expected.items()} and whole_filters(new)
        masks = new
    assert kind == "channel" or sum(kept.values()) < 0.002 * sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("kind", ["global", "channel"])
def test_pruning_is_torch_s_where_torch_has_it(kind):
    masks = theirs = DENSE
    for r in range(6):
        weights, module = random_weights(100 + r), nn.Module()
        masks = lt.prune(weights, masks, kind, 0.2)
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight))
            torch_prune.custom_from_mask(module, name, theirs[name].float())
            if kind == "channel":
                torch_prune.ln_structured(module, name, amount=0.2, n=1, dim=0)
        if kind == "global":
            pairs = [(module, name) for name in weights]
            torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=0.2)
        theirs = {name: getattr(module, f"{name}_mask").bool() for name in weights}
        assert same(masks, theirs), r


@pytest.mark.parametrize("kind", ["global", "channel"])
def test_random_masks_are_as_sparse_in_every_layer_and_nested(kind):
    masks, before = DENSE, lt.random_masks(DENSE, kind, 1)
    assert same(before, DENSE)
    for r in range(5):
        masks = lt.prune(random_weights(r), masks, kind, 0.3)
        drawn = lt.random_masks(masks, kind, 1)
        assert {n: int(m.sum()) for n, m in drawn.items()} == {n: int(m.sum()) for n, m in masks.items()}
        assert all((drawn[name] <= before[name]).all() for name in SHAPES)
        before = drawn
    assert not any(torch.equal(drawn[name], masks[name]) for name in SHAPES)
    assert not same(drawn, lt.random_masks(masks, kind, 2)) and (kind == "global" or whole_filters(drawn))


# ----------------------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("arch, size, parameters", [
    ("mlp", 28, 266_610), ("resnet18", 32, 11_173_962), ("resnet50", 224, 23_528_522), ("conv", 32, 391_466),
])  # fmt: skip
def test_networks(arch, size, parameters):
    network = lt.make_network(arch, 10, size, lt.random_stream(0)).eval()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 10) and network.fc.out_features == 10
    assert "resnet" not in arch or isinstance(network.maxpool, nn.Identity) == (size <= 64)
    names = lt.prunable(network)
    others = {name: p for name, p in network.named_parameters() if name not in names}
    assert all(name.endswith("weight") and weight.ndim > 1 for name, weight in names.items())
    assert others.pop("fc.weight").ndim == 2 and all(p.ndim == 1 for p in others.values())
    for weight in [*names.values(), network.fc.weight]:
        receptive = weight[0, 0].numel()
        bound = (6 / (receptive * (weight.shape[0] + weight.shape[1]))) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
    twin, other = (lt.make_network(arch, 10, size, lt.random_stream(seed)) for seed in (0, 1))
    assert same(network.state_dict(), twin.state_dict()) and not torch.equal(network.fc.weight, other.fc.weight)


# --------------------------------------------------------------------------------------------------------------- data
def test_torchvision_s_sets(tmp_path, monkeypatch):
    """CIFAR-10 from its pickles, a tenth of every class for validation."""
    rng, base, pixels = np.random.default_rng(0), tmp_path / "cifar-10-batches-py", {}
    base.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels[name] = rng.integers(0, 256, size=(20, 3, 32, 32), dtype=np.uint8)
        content = {"data": pixels[name].reshape(20, -1), "labels": [i % 10 for i in range(20)]}
        (base / name).write_bytes(pickle.dumps(content))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    args = lt.Args(dataset="cifar10", data_dir=str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    classes, parts, rows = lt.load_data(args)
    assert args.image_size == 32 and classes == [f"c{i}" for i in range(10)] and rows == []
    assert torch.equal(parts["test"][0], torch.from_numpy(pixels["test_batch"]).permute(0, 2, 3, 1))
    assert [parts[split][1].bincount().tolist() for split in lt.SPLITS] == [[9] * 10, [1] * 10, [2] * 10]
    moments = lt.pixel_statistics(parts["train"][0])

    def batch(size):
        return lt.Images(*parts["test"], moments, 32, size, "none").batch(slice(0, 4), torch.arange(20))[0]

    assert batch(32).shape == (4, 3, 32, 32)
    for size in (16, 64):  # --image-size
        expected = F.interpolate(batch(32), (size, size), mode="bilinear", antialias=size < 32)
        assert batch(size).shape == (4, 3, size, size) and torch.allclose(batch(size), expected)


def test_folders_are_split_by_seed_and_within_classes(folder):
    seen = []
    for seed in (1, 1, 2):
        classes, parts, rows = data_of(folder, seed=seed)
        assert [parts[s][1].bincount().tolist() for s in lt.SPLITS] == [[32] * 3, [4] * 3, [4] * 3]
        assert parts["train"][0].shape == (96, 18, 18, 3) and classes == ["level", "slanting", "upright"]
        assert sorted(row["path"] for row in rows) == sorted(str(p.relative_to(folder)) for p in folder.glob("*/*.png"))
        assert all(row["path"].startswith(row["class"]) for row in rows)
        seen.append(parts["test"][0])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    _, part, _ = data_of(folder, train_fraction=0.25)
    assert [part[s][1].bincount().tolist() for s in lt.SPLITS] == [[8] * 3, [4] * 3, [4] * 3]
    assert torch.equal(part["test"][0], seen[0])


def test_folders_that_are_split_already_and_odd_images(folder, tmp_path, capsys):
    for split, numbers in (("train", range(30)), ("val", range(30, 35)), ("test", range(35, 40))):
        for kind in ("level", "upright"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in numbers:
                shutil.copy(folder / kind / f"{i:02d}.png", tmp_path / split / kind)
        shutil.copytree(folder / "slanting", tmp_path / split / "aa")
    odd, ramp = tmp_path / "test/aa", np.tile(np.arange(48, dtype=np.uint8) * 5, (48, 1))
    for path in odd.iterdir():
        path.unlink()
    Image.fromarray(np.dstack([ramp, ramp, ramp, np.zeros_like(ramp)]), "RGBA").save(odd / "a_transparent.png")
    turned = Image.fromarray(ramp.T.copy())
    exif = turned.getexif()
    exif[274] = 6  # turned by 90 degrees to be seen upright
    turned.save(odd / "b_turned.png", exif=exif)
    (odd / "c_broken.png").write_bytes(b"no image")
    Image.new("1", (30_000, 30_000)).save(odd / "d_bomb.png")
    Image.fromarray(np.full((40, 60), 300, np.uint16)).save(odd / "e_deep.png")
    Image.new("L", (201, 2)).save(odd / "f_line.png")
    classes, parts, _ = data_of(tmp_path)
    out = capsys.readouterr().out
    assert "4 images cannot be read and are left out" in out and "decompression bomb" in out and "mode I;16" in out
    assert "f_line.png': mode L, (201, 2): 8 bits a channel and sides to 1:100 are expected" in out
    assert classes == ["aa", "level", "upright"] and [len(parts[split][1]) for split in lt.SPLITS] == [100, 50, 12]
    found = parts["test"][0][parts["test"][1] == 0].float().permute(0, 3, 1, 2)
    expected = F.interpolate(torch.from_numpy(ramp)[None, None].float(), (18, 18), mode="bilinear", antialias=True)[0]
    assert (found[0] == 255).all(), "transparent is white"
    assert (found[1] - expected.flip(2)).abs().max() <= 3, "turned upright"
    wide = Image.new("L", (72, 18))
    wide.paste(255, (26, 0, 46, 18))
    wide.save(tmp_path / "wide.png")
    assert (lt.open_image(str(tmp_path / "wide.png"), 18) == 255).all(), "the middle, not squeezed"
    shutil.rmtree(tmp_path / "test")
    os.rename(tmp_path / "val", tmp_path / "valid")
    os.rename(tmp_path / "train", tmp_path / "Training")
    classes, parts, _ = data_of(tmp_path)  # a tenth of what is to train is for the test
    assert classes == ["aa", "level", "upright"] and [len(parts[split][1]) for split in lt.SPLITS] == [90, 50, 10]


def test_of_a_folder_hidden_images_and_second_paths_are_left_out(folder, tmp_path, monkeypatch):
    for kind in ("level", "upright"):
        (tmp_path / ".data" / kind).mkdir(parents=True)
        for path in (folder / kind).iterdir():
            shutil.copy(path, tmp_path / ".data" / kind)
    data = tmp_path / ".data"
    odd = "odd.png" if sys.platform == "darwin" else "\udcff.png"  # macOS refuses names that are not UTF-8
    (data / "level/39.png").rename(data / "level" / odd)
    (data / ".git").mkdir()
    shutil.copytree(folder / "slanting", data / ".ipynb_checkpoints")
    shutil.copytree(folder / "slanting", data / "upright/.hidden")
    (data / "aa").symlink_to(data / "level")
    (data / "aa_up").symlink_to(data)
    (data / "upright/same.png").symlink_to(data / "level/00.png")
    monkeypatch.chdir(data)
    for root in (data, f"{data}/", "."):
        classes, _, rows = data_of(root)
        assert len(rows) == 80 and {os.path.dirname(row["path"]) for row in rows} == set(classes) and len(classes) == 2
    lt.save_table(str(tmp_path / "split.csv"), rows)
    assert os.fsencode(f"/{odd},") in (tmp_path / "split.csv").read_bytes()


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
@pytest.mark.parametrize("margin", [0, 4])
def test_augmentation_on_the_device(augment, margin):
    """What a loop over images, that pads, cuts, mirrors and normalises each, would make of them."""
    side = 16 + margin
    pixels = torch.randint(0, 256, (20, side, side, 3), generator=lt.random_stream(0), dtype=torch.uint8)
    moments, numbers = lt.pixel_statistics(pixels), pixels.double()
    assert torch.allclose(moments[0].double(), numbers.mean(dim=(0, 1, 2)), atol=1e-4)
    assert torch.allclose(moments[1].double(), numbers.std(dim=(0, 1, 2), correction=0), atol=1e-4)
    split, seen = lt.Images(pixels, torch.arange(20) % 2, moments, 16, 16, augment), []
    assert split.span == (0 if augment == "none" and not margin else 4)
    assert not torch.equal(split.plan_epoch(3, 0)[0], split.plan_epoch(4, 0)[0]), "another seed, the same order"
    for epoch in range(2):
        order, corners, mirrored = plan = split.plan_epoch(3, epoch)
        assert sorted(order.tolist()) == list(range(20))
        for part in (slice(0, 16), slice(16, 32)):
            images, labels = split.batch(part, *plan)
            assert images.is_contiguous(memory_format=torch.channels_last)
            for row, i in enumerate(order[part].tolist()):
                image, (y, x) = pixels[i].permute(2, 0, 1).float(), corners[part][row].tolist()
                if augment == "none":
                    y = x = margin // 2
                elif not margin:
                    image = F.pad(image, (2, 2, 2, 2))
                image = image[:, y : y + 16, x : x + 16]
                if augment == "crop-flip" and mirrored[part][row]:
                    image = image.flip(2)
                expected = (image - moments[0].view(3, 1, 1)) / moments[1].view(3, 1, 1)
                assert torch.equal(images[row], expected) and labels[row] == i % 2
        seen.append(torch.cat([order, corners.flatten(), mirrored]))
    assert not torch.equal(*seen) and {0, 4} <= set(corners.flatten().tolist()) <= set(range(5)) or augment == "none"


# ---------------------------------------------------------------------------------------------------------------- CUDA
def test_weights_are_drawn_on_the_cpu_before_the_network_moves(monkeypatch):
    calls, draw = [], nn.init.xavier_uniform_

    def drawn(tensor, generator):
        calls.append((tensor.device.type, generator.device.type))
        return draw(tensor, generator=generator)

    monkeypatch.setattr(nn.init, "xavier_uniform_", drawn)
    monkeypatch.setattr(nn.Module, "to", lambda self, device, **_: calls.append(str(device)) or self)
    lt.make_network("conv", 3, 16, lt.random_stream(0), lt.random_stream(1), torch.device("cuda"))
    assert calls == [("cpu", "cpu")] * 5 + ["cuda"]


@pytest.mark.parametrize("arch", ["conv", "mlp", "resnet18"])
def test_a_round_on_fake_cuda(arch, monkeypatch):
    """Batches, masks from the CPU, updates and tests on CUDA tensors: wrong devices and hidden `.item()` raise."""
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # fake parameters cannot be moved
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels, labels = (torch.empty(shape, dtype=torch.uint8, device="cuda") for shape in ((20, 18, 18, 3), (20,)))
        moments = lt.pixel_statistics(pixels)
        split, plain = (lt.Images(pixels, labels.long(), moments, 16, 16, kind) for kind in ("crop-flip", "none"))
        with torch.device("cuda"):
            network = lt.make_network(arch, 3, 16, lt.random_stream(0))
        weights = lt.prunable(network)
        masks = {name: torch.ones(weight.shape, dtype=torch.bool, device="cpu") for name, weight in weights.items()}
        sparse = list(weights.values()), [torch.empty_like(w).copy_(masks[name]) for name, w in weights.items()]
        optimizer = lt.make_optimizer(lt.Args(), network)
        for group in optimizer.param_groups:
            group |= {"fused": False, "foreach": True}  # the fused kernel has no fake twin

        def backward(loss):
            assert loss.device.type == "cuda"
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)  # autograd does not run on fake CUDA tensors
        images, labels = split.batch(slice(0, 8), *split.plan_epoch(1, 0))
        assert images.device.type == labels.device.type == "cuda" and images.shape == (8, 3, 16, 16)
        loss = lt.learn(network, optimizer, sparse, images, labels, False)
        assert loss.device.type == "cuda" and lt.evaluate(network, plain).device.type == "cuda"
        assert {state["momentum_buffer"].device.type for state in optimizer.state.values()} == {"cuda"}


# -------------------------------------------------------------------------------------------------------- source runs
def test_a_source_run_leaves_tickets(source, folder):
    rows, logged = rows_of(source), scalars(source, ())
    assert source.name == f"{folder.name}__lottery_ticket__conv__own-global__1"
    names = {path.name for path in source.iterdir() if not path.name.startswith("events")}
    tickets = {"round_00.pt", "round_01.pt", "round_02.pt"}
    assert names == tickets | {".lock", "curves.png", "hyperparameters.json", "last.pt", "results.csv", "split.csv"}
    left = prunable = 3 * 32 * 9 + 32 * 64 * 9 + 64 * 128 * 9 + 128 * 256 * 9
    for r, row in enumerate(rows):
        ticket = load(source / f"round_{r:02d}.pt")
        meta, mask = ticket["meta"], ticket["mask"]
        assert int(row["remaining"]) == left == sum(int(m.sum()) for m in mask.values()) and int(row["round"]) == r
        assert float(row["sparsity"]) == 1 - left / prunable == meta["sparsity"] and int(row["prunable"]) == prunable
        assert int(row["parameters"]) == left + 2 * 480 + 256 * 3 + 3
        for state in (ticket["weights"], ticket["trained"]):
            assert all((state[name][~m] == 0).all() and (state[name][m] != 0).all() for name, m in mask.items())
        expected = {"arch": "conv", "dataset": folder.name, "image_size": 16, "seed": 1, "pruning": "global",
                    "rewind": "1ep2it", "round": r, "classes": ["level", "slanting", "upright"],
                    "test_accuracy": float(row["test_accuracy"])}  # fmt: skip
        assert {name: meta[name] for name in expected} == expected and row["epochs"] == "3"
        left -= round(0.2 * left)
    accuracies = [(r, pytest.approx(float(row["test_accuracy"]))) for r, row in enumerate(rows)]
    assert logged["rounds/test_accuracy"] == accuracies
    assert [step for step, _ in logged["round_00/train_loss"]] == [1, 2, 3]
    with Image.open(source / "curves.png") as image:
        assert len(set(image.convert("L").tobytes())) > 50
    with open(source / "split.csv") as file:
        assert [row["split"] for row in csv.DictReader(file)] == ["train"] * 96 + ["val"] * 12 + ["test"] * 12


def assert_pruned_and_rewound(run_dir, kind, lr_rewinding=False):
    first = load(run_dir / "round_00.pt")
    for r in (1, 2):
        ticket, previous = load(run_dir / f"round_{r:02d}.pt"), load(run_dir / f"round_{r - 1:02d}.pt")
        assert same(ticket["mask"], lt.prune(previous["trained"], previous["mask"], kind, 0.2))
        begun = previous["trained"] if lr_rewinding else first["weights"]
        assert same(ticket["weights"], {n: tensor * ticket["mask"].get(n, ANY) for n, tensor in begun.items()})


def test_rounds_are_rewound_in_every_tensor(source):
    first = load(source / "round_00.pt")
    start = lt.make_network("conv", 3, 16, lt.random_stream(1, "source")).state_dict()
    assert first["weights"]["trunk.1.num_batches_tracked"] == 8  # 1ep2it
    assert not torch.equal(first["weights"]["trunk.0.weight"], start["trunk.0.weight"]), "late rewinding"
    assert_pruned_and_rewound(source, "global")


def test_learning_rate_rewinding_keeps_the_trained_weights(source, folder, tmp_path):
    """Renda et al. (2020), by channels: the same first round; then trained weights and the rewind point's schedule."""
    train(folder, *SMALL, *SHORT, "--pruning", "channel", "--control", "lr-rewinding", cwd=tmp_path)
    other = only_run(tmp_path / "runs")
    assert other.name.split("__")[3] == "own-channel-lr-rewinding"
    assert same(load(other / "round_00.pt")["trained"], load(source / "round_00.pt")["trained"])
    assert_pruned_and_rewound(other, "channel", lr_rewinding=True)
    for r in (1, 2):
        rates = [(2, pytest.approx(0.1 * 0.2)), (3, pytest.approx(0.1 * 0.02))]
        assert scalars(other)[f"round_0{r}/learning_rate"] == rates
        assert load(other / f"round_0{r}.pt")["trained"]["trunk.1.num_batches_tracked"] == 18 + 10 * r


def test_a_round_by_hand(source, folder):
    """From the rewind point on: images and learning rates of their epochs, a new optimizer, masks; then its metrics."""
    ticket, row, (_, parts, _) = load(source / "round_01.pt"), rows_of(source)[1], data_of(folder)
    split = lt.Images(*parts["train"], lt.pixel_statistics(parts["train"][0]), 16, 16, "crop")
    network = lt.make_network("conv", 3, 16, lt.random_stream(9))
    network.load_state_dict(ticket["weights"])
    decayed, rest = ([p for p in network.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": decayed, "weight_decay": 1e-5}, {"params": rest, "weight_decay": 0}]
    optimizer = torch.optim.SGD(groups, 0.02, momentum=0.9, nesterov=True, fused=True)
    for step in range(8, 6 * int(row["best_epoch"])):
        epoch, batch = divmod(step, 6)
        order, corners, _ = split.plan_epoch(1, epoch)
        images, labels = split.batch(slice(batch * 16, batch * 16 + 16), order, corners)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.02 if epoch >= 2 else 0.02
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        for name, weight in lt.prunable(network).items():
            weight.grad *= ticket["mask"][name]
        optimizer.step()
    assert int(row["best_epoch"]) == 3 and same(network.state_dict(), ticket["trained"])
    mean, std = (torch.tensor(ticket["meta"][name]).view(3, 1, 1) for name in ("mean", "std"))
    for name in ("val", "test"):
        pixels, labels = parts[name]
        logits = network.eval()((pixels.permute(0, 3, 1, 2)[:, :, 1:17, 1:17].float() - mean) / std).detach()
        assert float(row[f"{name}_accuracy"]) == (logits.argmax(1) == labels).double().mean().item()
        if name == "val":
            loss = -logits.log_softmax(1)[range(len(logits)), labels].mean().item()
            assert float(row["val_loss"]) == pytest.approx(loss, rel=1e-5)


def test_early_stopping_waits_for_the_rewind_point(folder, tmp_path):
    """And the test is of the best weights."""
    flags = ["--patience", 1, "--epochs", 30, "--rewind", "5ep", "--rounds", 2, "--learning-rate", 3, "--seed", 2]
    initial = train(folder, *SMALL, *flags, cwd=tmp_path).variables["initial"]
    streams = (lt.random_stream(2, purpose) for purpose in ("source", "head"))
    network = lt.make_network("conv", 3, 16, *streams)
    assert same(initial, network.state_dict())
    run_dir, (_, parts, _) = only_run(tmp_path / "runs"), data_of(folder, seed=2)
    rows, logged = rows_of(run_dir), scalars(run_dir)
    test = lt.Images(*parts["test"], lt.pixel_statistics(parts["train"][0]), 16, 16, "none")
    for r, row in enumerate(rows):
        losses = [value for epoch, value in logged[f"round_0{r}/val_loss"] if epoch > 5]
        last = 5 + len(losses)
        assert int(row["epochs"]) == last < 30
        assert int(row["best_epoch"]) == 5 + np.argmin(losses) + 1 < last
        assert float(row["val_loss"]) == pytest.approx(min(losses))
        network.load_state_dict(load(run_dir / f"round_0{r}.pt")["trained"])
        assert float(row["test_accuracy"]) == lt.evaluate(network, test)[1].item()  # with this seed the last has less


def test_small_networks_have_a_short_schedule_and_the_eta_is_that_of_the_run(folder, tmp_path, monkeypatch):
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0 * len(steps))  # an update takes ten seconds
    out = train(folder, *SMALL[:-2], "--rounds", 3, "--prune-fraction", 0.5, cwd=tmp_path).stdout
    settings = json.loads((only_run(tmp_path / "runs") / "hyperparameters.json").read_text())
    row = rows_of(only_run(tmp_path / "runs"))[1]
    assert int(row["remaining"]) == int(row["prunable"]) // 2
    assert settings["epochs"] == 6 and settings["milestones"] == [3, 4, 5] and settings["rewind"] == "2ep"
    # 35 updates of the first round and 24 of each of the others
    assert "round 0 epoch 1/6 17%" in out and "ETA of the run 0:13:50 at most" in out


# --------------------------------------------------------------------------------------------- stopping and going on
def assert_like(again, source):
    """A run that was stopped and went on has the same rounds, tickets and points as one that was not."""
    assert rows_of(again) == rows_of(source)
    assert scalars(again) == scalars(source)
    for r in range(3):
        one, other = load(source / f"round_{r:02d}.pt"), load(again / f"round_{r:02d}.pt")
        assert all(same(one[name], other[name]) for name in ("mask", "weights", "trained"))


def test_a_run_stopped_again_and_again_is_the_same(source, folder, tmp_path, monkeypatch):
    """Stopped before the rewind point, between it and an epoch's end, in tests, in later rounds; by --resume or not."""
    calls, step, cross_entropy, stop = [], torch.optim.SGD.step, F.cross_entropy, ["", 0]

    def count(event):
        calls.append(event)
        if calls.count(event) == stop[1] and event == stop[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    def counted_loss(*args, **kwargs):
        count("test" if kwargs.get("reduction") == "sum" else "batch")
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args, **kwargs: (step(*args, **kwargs), count("update")))
    monkeypatch.setattr(F, "cross_entropy", counted_loss)
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0 * len(calls))
    flags, run_dir = ["--dataset", f"folder:{folder}", *SMALL, *SHORT], tmp_path / "runs" / source.name
    stops = [("update", 3), ("update", 7), ("test", 1), ("update", 8), ("test", 3), ("update", 11)]
    for i, stop[:] in enumerate(stops):
        calls.clear()
        if i % 2:
            flags = ["--resume", run_dir / ("last.pt" if i == 3 else "")]
        done = run(SCRIPT, *flags, cwd=tmp_path, check=False)
        assert done.returncode == 130 and "goes on after the last finished epoch" in done.stderr, done.stderr
    stop[1] = 0
    assert not list(run_dir.glob("*.tmp"))
    for _ in range(2):
        assert "all rounds are done" in run(SCRIPT, *flags, cwd=tmp_path).stdout
        assert_like(only_run(tmp_path / "runs"), source)


def test_a_run_killed_as_a_round_ends(source, folder, tmp_path):
    """Nothing is lost or there twice; while it ran, the same command again was refused."""
    flags = ["--dataset", f"folder:{folder}", *SMALL, *SHORT]
    process = start(SCRIPT, *flags, "--rounds", 30, cwd=tmp_path)  # not over before it is killed
    while not list(tmp_path.glob("runs/*/round_01.pt")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGSTOP)
    assert "cannot be written, or another process does it" in refused(SCRIPT, *flags, cwd=tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=120) == -9
    run_dir = only_run(tmp_path / "runs")
    run(SCRIPT, *flags, cwd=tmp_path)
    assert_like(run_dir, source)


def test_a_full_disk_gets_one_line_and_leaves_nothing_half_written(tmp_path):
    def full(path):
        assert f".{os.getpid()}." in path, "a temporary name without the process"
        (tmp_path / path).write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    checkpoint = str(tmp_path / "last.pt")
    lt.save_atomically(checkpoint, lambda path: torch.save({"rows": [1]}, path))
    with pytest.raises(SystemExit, match=r"error: cannot write .*last.pt: \[Errno 28\] No space left on device$"):
        lt.save_atomically(checkpoint, full)
    assert load(checkpoint) == {"rows": [1]} and os.listdir(tmp_path) == ["last.pt"]


def test_on_resume_the_command_line_wins_but_other_flags_are_no_way_to_go_on(source, folder, tmp_path):
    run_dir = tmp_path / "runs" / source.name
    shutil.copytree(source, run_dir)
    settings = json.loads((run_dir / "hyperparameters.json").read_text())
    settings.pop("built_for")  # an earlier version's has fewer
    (run_dir / "hyperparameters.json").write_text(json.dumps(settings))
    run(SCRIPT, "--resume", run_dir, "--rounds", 4, cwd=tmp_path)
    rows = rows_of(run_dir)
    assert rows[:3] == rows_of(source) and int(rows[3]["remaining"]) == round(0.8 * int(rows[2]["remaining"]))
    flags = ["--dataset", f"folder:{folder}", *SMALL, *SHORT, "--rounds", 5]
    for again in (flags, ["--resume", run_dir]):
        error = refused(SCRIPT, *again, "--learning-rate", 3, cwd=tmp_path)
        assert "made with other flags: learning_rate; another --exp-name" in error
    shutil.copytree(folder, others := tmp_path / "others" / folder.name)
    for path in others.glob("*/*.png"):  # other pictures under the same names
        Image.open(path).convert("L").save(path)
    error = refused(SCRIPT, "--dataset", f"folder:{others}", *flags[2:], cwd=tmp_path)
    assert "made with other flags: moments; another --exp-name" in error
    assert "other flags: epochs" in refused(SCRIPT, "--resume", run_dir, "--epochs", 99, "--patience", 0, cwd=tmp_path)
    assert rows_of(only_run(tmp_path / "runs")) == rows


# ----------------------------------------------------------------------------------------------------------- transfer
def target_network():
    """As the script makes it for a target."""
    return lt.make_network("conv", 2, 16, lt.random_stream(1, "control"), lt.random_stream(1, "new head"))


def test_controls_differ_from_the_ticket_only_in_what_they_claim(source):
    ticket, first, random = load(source / "round_02.pt"), load(source / "round_00.pt"), target_network().state_dict()
    of_source = lt.make_network("conv", 3, 16, lt.random_stream(1, "source")).state_dict()
    assert not any(torch.equal(random[name], of_source[name]) for name in ticket["mask"]), "the source's, again"
    weights = {"none": ticket["weights"], "reinit": random, "trained": ticket["trained"],
               "random-mask": first["weights"]}  # fmt: skip
    for control, expected in weights.items():
        network = target_network()
        masks = lt.start_from_ticket(network, str(source / "round_02.pt"), control, 1)
        assert masks.keys() == ticket["mask"].keys()
        for name, mask in masks.items():
            assert torch.equal(mask, ticket["mask"][name]) == (control != "random-mask")
            assert mask.sum() == ticket["mask"][name].sum()
        expected = {name: tensor * masks.get(name, ANY) for name, tensor in expected.items()}
        last_layer = {name: random[name] for name in ("fc.weight", "fc.bias")}
        assert same(network.state_dict(), expected | last_layer), control
    network = target_network()
    lt.start_from_ticket(network, str(source / "round_00.pt"), "reinit", 1)
    assert same(network.state_dict(), random), "without a mask that is the dense network"


TRANSFER = ["--batch-size", 16, "--learning-rate", 0.02, "--epochs", 2]


def test_all_tickets_of_a_source_on_a_target(source, target, tmp_path):
    name, runs = source.name.split("__")[0], tmp_path / "runs"
    train(target, *TRANSFER, "--tickets", source / "round_01.pt", "--save-networks", cwd=tmp_path)
    run_dir = only_run(runs)
    assert run_dir.name == f"Human LBA__lottery_ticket__conv__{name}-global__1"
    network = load(run_dir / "network_01.pt")
    assert network["trained"]["fc.weight"].shape == (2, 256) and network["meta"]["classes"] == ["level", "upright"]
    assert all((network["trained"][name][~mask] == 0).all() for name, mask in network["mask"].items())
    assert network["trained"]["trunk.1.num_batches_tracked"] == 8 + 4 * int(rows_of(run_dir)[0]["best_epoch"])
    out = train(target, *TRANSFER, "--tickets", source, cwd=tmp_path).stdout
    assert "round 0:" in out and "round 1:" not in out, "done before"
    sparsities = [[(row["round"], row["sparsity"]) for row in rows_of(path)] for path in (run_dir, source)]
    assert sparsities[0] == sparsities[1] and len(sparsities[0]) == 3
    for control in ("reinit", "random-mask", "trained", "dense"):
        train(target, *TRANSFER, "--tickets", source, "--rounds", 2, "--control", control, cwd=tmp_path)
    arms = {path.name.split("__")[3]: rows_of(path) for path in runs.iterdir()}
    assert set(arms) == {"dense", *(f"{name}-global{end}" for end in ("", "-reinit", "-random-mask", "-trained"))}
    assert arms[f"{name}-global-reinit"][0] == arms["dense"][0], "the unpruned random network, twice"
    assert [len(rows) for rows in arms.values()].count(2) == 3
    alone = ["--control", "dense", "--arch", "conv", "--image-size", 16, "--logdir", "alone"]
    train(target, *TRANSFER, *alone, cwd=tmp_path)
    assert rows_of(only_run(tmp_path / "alone")) == arms["dense"], "without a ticket at hand"


def test_tickets_of_another_network_or_run_are_refused_and_variants_are_other_arms(source, folder, target, tmp_path):
    ticket, other = load(source / "round_02.pt"), tmp_path / "another/round_02.pt"
    other.parent.mkdir()
    done = train(target, *TRANSFER, "--tickets", source, "--rounds", 1, cwd=tmp_path)
    first_head = lt.make_network("conv", 2, 16, lt.random_stream(1, "control"), lt.random_stream(1, "head")).fc.weight
    assert not torch.equal(done.variables["initial"]["fc.weight"], first_head), "the source began with these draws"
    torch.save(ticket | {"meta": ticket["meta"] | {"arm": "own-global-lr-rewinding-0.5"}}, other)
    train(target, *TRANSFER, "--tickets", other, cwd=tmp_path)
    for data, meta, flags, says in [
        (target, {}, "--arch resnet18", "--arch resnet18: "),
        (target, {}, "--prune-fraction 0.5", f"--prune-fraction 0.5: {other} has 0.2"),
        (target, {}, "", "made with other flags: source_run"),
        (target, {"learning_rate": 9}, "", "made with other flags: source_learning_rate, source_run"),
        (folder, {}, "--seed 2", "another/split.csv, of --seed 1: the tickets saw test images"),  # there is none
        (target, {}, "--rounds 1 --logdir no", "--rounds 1: the tickets are of rounds 2"),
        (target, {"arch": "mlp"}, "--image-size 8", "--image-size 8: the tickets of this mlp are for 16 pixels"),
        (target, {"control": "lr-rewinding"}, "--control random-mask", "it would change the weights as well"),
    ]:
        torch.save(ticket | {"meta": ticket["meta"] | meta}, other)
        flags = ["--dataset", f"folder:{data}", *TRANSFER, *flags.split(), "--tickets", other]
        assert says in refused(SCRIPT, *flags, cwd=tmp_path)
    name, arms = source.name.split("__")[0], {path.name.split("__")[3] for path in (tmp_path / "runs").iterdir()}
    assert arms == {f"{name}-global", f"{name}-global-of-lr-rewinding-0.5"}


def test_tickets_are_not_tested_on_images_that_they_were_found_on(source, folder, tmp_path):
    data, flags = shutil.copytree(folder, tmp_path / folder.name), [*TRANSFER, "--tickets", source, "--rounds", 1]
    train(data, *flags, cwd=tmp_path)
    says = f"{source}/split.csv, of --seed 1: the tickets saw test images of this run's split"
    assert says in refused(SCRIPT, "--dataset", f"folder:{data}", *flags, "--seed", 2, cwd=tmp_path)
    for i in range(10):
        shutil.copy(data / f"level/{i:02d}.png", data / f"level/more{i}.png")
    assert says in refused(SCRIPT, "--dataset", f"folder:{data}", *flags, cwd=tmp_path)
    train(data, *flags, "--control", "dense", "--arch", "conv", cwd=tmp_path)  # has seen none


# ------------------------------------------------------------------------------------------------------------- reports
def made_up(root, arm, seed, accuracies, **more):
    """A run's folder with a results.csv of these (validation, test) accuracies."""
    folder = root / f"Human LBA__lottery_ticket__conv__{arm}__{seed}"
    folder.mkdir(parents=True)
    settings = {"target": "Human LBA", "arm": arm, "seed": seed, "exp_name": "lottery_ticket", "arch": "conv"}
    (folder / "hyperparameters.json").write_text(json.dumps(settings | {"epochs": 9} | more))
    rows = [f"{r},{1 - 0.8**r},{val},{test}\n" for r, (val, test) in enumerate(accuracies)]
    (folder / "results.csv").write_text("".join(["round,sparsity,val_accuracy,test_accuracy\n", *rows]))


def test_report_of_made_up_runs(tmp_path):
    runs, flags = tmp_path / "runs", ["--report", tmp_path / "runs", "--out", tmp_path / "out"]
    made_up(runs, "dense", 1, [(0.7, 0.7)], control="dense", prune_fraction=0.2)
    made_up(runs, "dense", 2, [(0.72, 0.74)], control="dense", prune_fraction=0.44)  # prunes nothing
    made_up(tmp_path / "runs/other", "dense", 1, [(0.5, 0.5)], target="shoes")
    for seed, shift in ((1, 0.0), (2, 0.02), (3, 0.04)):
        curve = [(0.70, 0.70), (0.80, 0.75), (0.78, 0.79), (0.9, 0.9)][: 3 + (seed == 3)]  # a seed that is further
        made_up(runs, "own-global", seed, [(val + shift, test + shift) for val, test in curve])
    made_up(runs, "cifar10-global", 1, [(0.6, 0.65), (0.5, 0.6)])
    made_up(runs, "cifar10-global-reinit", 1, [(0.5, 0.5)])
    out = run(SCRIPT, *flags, cwd=tmp_path).stdout
    head = "dense, n = 2 | own-global, n = 3 | cifar10-global, n = 1 | cifar10-global-reinit, n = 1"
    assert f"| round | sparsity | {head} |" in out
    # means 72 and, for the own tickets, 72, 77, 81; t(.975, 1) = 12.71, sd of 70 and 74 2.83; t(.975, 2) = 4.303, sd 2
    assert "| 0 | 0.000 | 72.00 ± 25.42 | 72.00 ± 4.97 | 65.00 | 50.00 |" in out
    assert "| 2 | 0.360 | – | 81.00 ± 4.97 | – | – |" in out and "| 3 |" not in out
    assert "| dense | 72.00 ± 25.42 (0.000) | 72.00 ± 25.42 (0.000) | 71.85 ± 1.12 |" in out
    assert "| dense | 50.00 (0.000) | 50.00 (0.000) | – |" in out, "of the other target"
    assert "| own-global | 77.00 ± 4.97 (0.200) | 81.00 ± 4.97 (0.360) | 81.72 ± .39 (.832) |" in out
    assert "| cifar10-global | 65.00 (0.000) | 65.00 (0.000) | 79.17 ± 1.85 (.945) |" in out
    assert "| cifar10-global-reinit | 50.00 (0.000) | 50.00 (0.000) | – |" in out
    with Image.open(tmp_path / "out/lottery_Human_LBA.png") as image:
        assert image.size == (850, 420) and len(set(image.convert("L").tobytes())) > 50
    made_up(tmp_path / "larger", "own-global", 1, [(0.9, 0.9)], arch="resnet18")
    out = run(SCRIPT, *flags, "--report", runs, tmp_path / "larger", cwd=tmp_path).stdout
    assert "| own-global (conv) | 77.00" in out and "| own-global (resnet18) | 90.00 (0.000)" in out
    assert "| dense (conv) | 72.00 ± 25.42 (0.000) | 72.00 ± 25.42 (0.000) | 71.85 ± 1.12 |" in out
    for seed, epochs, says in ((2, 9, "another run of the same arm and seed"), (7, 8, "same arm differ in epochs")):
        made_up(tmp_path / says, "own-global", seed, [(0.5, 0.5)], epochs=epochs)
        assert says in refused(SCRIPT, "--report", runs, tmp_path / says, cwd=tmp_path)


CURVES = {"Human-LBA": "human_lba", "Lung_Tissues": "lung_tissues", "artist-1": "artist_classification_1",
          "type": "type_classification"}  # fmt: skip
ARMS = {"dense": "baseline", "own-global": "winning_ticket", "own-reinit": "random_mask", "cifar10-global": "cifar10",
        "cifar100-global": "cifar100", "fashion-mnist-global": "fahion_mnist"}  # fmt: skip


@pytest.mark.parametrize("target", CURVES)
def test_the_authors_curves_give_the_published_table(target, tmp_path):
    """Written as runs of this script; the two cells that differ do so in the author's own logs."""
    with open(ROOT / "tests" / "data" / f"{CURVES[target]}.txt") as curves:
        rounds = list(csv.DictReader(curves, delimiter="\t"))
    for arm, column in ARMS.items():
        curve = [(0.5, float(row[column]) / 100) for row in (rounds if arm != "dense" else rounds[:1])]
        made_up(tmp_path / "runs", arm, 1, curve, target=target)
    out = run(SCRIPT, "--report", "runs", cwd=tmp_path).stdout
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[2:] for line in out.splitlines()}
    wrong = {("Human-LBA", "cifar100-global"), ("Lung_Tissues", "fashion-mnist-global")}
    assert cells["own-reinit"][1] == "–"
    for arm in ARMS.keys() - {"own-reinit"}:
        ours, published = (re.match(r"([\d.]+)[^(]*\(?([\d.]*)", cell).groups() for cell in cells[arm])
        alike = abs(float(ours[0]) - float(published[0])) < 0.011
        alike &= not published[1] or abs(float(ours[1]) - float(published[1])) < 0.021
        assert alike == ((target, arm) not in wrong), (arm, cells[arm])


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, says", [
    ("--dataset svhn", "--dataset svhn: cifar10, cifar100, fashion-mnist, mnist or folder:DIR is expected"),
    ("--dataset folder:missing", "--dataset folder:missing: [Errno 2] No such file or directory"),
    ("--dataset folder:flat", "--dataset folder:flat: Couldn't find any class folder"),
    ("--dataset folder:few", "two classes or more are needed, each with images in train, val and test"),
    ("--dataset folder:hollow", "two classes or more are needed, each with images in train, val and test"),
    ("--dataset cifar10", "--data-dir data: Dataset not found"),
    ("--dataset folder:{folder} --rewind 9ep --epochs 9", "--rewind 9ep is 18 updates, and a round has 18"),
    ("--dataset folder:{folder} --rewind 1it2ep", "--rewind 1it2ep: epochs (2ep) or updates (500it)"),
    ("--dataset folder:{folder} --arch conv --logdir flat/a.png", "cannot be written"),
    ("--epochs 0", "--epochs must be between 1 and 1000000, not 0"),
    ("--learning-rate nan", "--learning-rate must be between 0 and"),
    ("--exp-name a/b", "--exp-name a/b is not the name of a file"),
    ("--control reinit", "--control reinit is for runs with --tickets"),
    ("--control lr-rewinding --tickets x", "--control lr-rewinding is for runs without --tickets"),
    ("--tickets other.pt", "other.pt is missing, damaged or not a file of this script"),
    ("--report few", "--report few: no runs with results there"),
    ("--resume bad", "bad is not a run of this script"),
])  # fmt: skip
def test_bad_input_gets_one_line(flags, says, folder, tmp_path):
    for name in ("flat", "few/a", "few/b", "hollow/a", "bad"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("flat/a.png", "few/a/1.png", "few/b/1.png", "few/b/2.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "bad/hyperparameters.json").write_text("{}")
    torch.save({"model": {}}, tmp_path / "other.pt")
    assert says in refused(SCRIPT, "--image-size", 16, *flags.format(folder=folder).split(), cwd=tmp_path)
    assert not list(tmp_path.glob("runs/*/*")), "a run's folder is left"


def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path):
    flags = [*SMALL, "--arch", "mlp", "--learning-rate", "1e12", "--epochs", 4]
    assert "try a lower --learning-rate" in refused(SCRIPT, "--dataset", f"folder:{folder}", *flags, cwd=tmp_path)


@needs_cuda
def test_tickets_are_found_and_transferred_on_cuda(folder, target, tmp_path):
    assert "on cuda" in run_on_cuda(SCRIPT, "--dataset", f"folder:{folder}", *SMALL, *SHORT, cwd=tmp_path)
    source = only_run(tmp_path / "runs")
    run_on_cuda(SCRIPT, "--dataset", f"folder:{target}", *TRANSFER, "--tickets", source, "--logdir", "to", cwd=tmp_path)
    assert len((only_run(tmp_path / "to") / "results.csv").read_text().splitlines()) == 4
    ticket = load(source / "round_02.pt")
    assert all((ticket["trained"][name][~mask] == 0).all() and mask.any() for name, mask in ticket["mask"].items())
