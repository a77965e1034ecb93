"""YOLOv3: Darknet's files by an interpreter of its configuration, the loss by a slow loop, boxes by hand."""

import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune_detect import COCO_ANCHORS, YOLOv3, letterbox, load_darknet

SIZE, REAL = 64, 3  # the models of most tests: 64 x 64 pixels, 3 classes besides background
N = 3 * (8 * 8 + 4 * 4 + 2 * 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return YOLOv3(REAL + 1, size=SIZE)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Darknet: what yolov3.cfg says, layer by layer, and an interpreter of it ----------------------------------------------
def yolov3_cfg():
    """Layers (kind, arguments) in the numbering of yolov3.cfg; a convolution's: filters, size, stride, normalised."""
    layers = [("conv", 32, 3, 1, True)]
    for filters, blocks in [(64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)]:
        layers.append(("conv", filters, 3, 2, True))
        for _ in range(blocks):
            layers += [("conv", filters // 2, 1, 1, True), ("conv", filters, 3, 1, True), ("shortcut", -3)]
    for filters, joined in [(512, None), (256, 61), (128, 36)]:
        if joined:
            layers += [("route", -4), ("conv", filters, 1, 1, True), ("upsample",), ("route", -1, joined)]
        layers += [("conv", filters, 1, 1, True), ("conv", 2 * filters, 3, 1, True)] * 3
        layers += [("conv", 255, 1, 1, False), ("yolo",)]
    return layers


@pytest.fixture(scope="module")
def darknet(tmp_path_factory):
    """yolov3.weights and darknet53.conv.74 of random numbers, as they are drawn while yolov3.cfg is interpreted.

    The folder, an input, the outputs of the [yolo] layers for it before their logistic functions, and of layer 74.
    """
    folder, rng, outputs, yolo, starts = tmp_path_factory.mktemp("weights"), np.random.default_rng(0), [], [], []
    normal = rng.standard_normal(5_000_000, dtype=np.float32)
    x = first = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))

    def draw(shape, shift, scale):  # such that activations keep their size
        start = rng.integers(len(normal) - math.prod(shape))  # 62 million new numbers would take too long
        values = shift + np.float32(scale) * normal[start : start + math.prod(shape)]
        values.astype("<f4").tofile(file)
        return torch.from_numpy(values.reshape(shape))

    with open(folder / "yolov3.weights", "wb") as file:
        np.array([0, 2, 0, 32_013_312, 0], dtype="<i4").tofile(file)  # version, and number of images seen
        for kind, *values in yolov3_cfg():
            starts.append(file.tell())
            if kind == "conv":
                filters, size, stride, normalised = values
                kernel, each = (filters, x.shape[1], size, size), (filters, 1, 1)
                bias = draw(each, 0, 1)
                if normalised:
                    scale, mean, variance = draw(each, 1, 0.1), draw(each, 0, 0.1), draw(each, 1, 0.1)
                x = F.conv2d(x, draw(kernel, 0, math.prod(kernel[1:]) ** -0.5), None, stride, size // 2)
                x = ((x - mean) / torch.sqrt(variance + 1e-5) * scale if normalised else x) + bias
                x = torch.where(x > 0, x, 0.1 * x) if normalised else x
            elif kind == "shortcut":
                x = x + outputs[values[0]]
            elif kind == "route":
                x = torch.cat([outputs[i] for i in values], dim=1)
            elif kind == "upsample":
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            else:
                yolo.append(x)
            outputs.append(x)
    (folder / "darknet53.conv.74").write_bytes((folder / "yolov3.weights").read_bytes()[: starts[75]])
    yield folder, first, yolo, outputs[74]
    for name in os.listdir(folder):  # 410 MB
        os.remove(folder / name)


def test_files_of_darknet(model, darknet, tmp_path, monkeypatch):
    """Their lengths are the published ones; they give an interpreter's outputs; other classes get other outputs."""
    files, x, wanted, wanted_74 = darknet
    assert os.path.getsize(files / "darknet53.conv.74") == 162_482_580
    assert os.path.getsize(files / "yolov3.weights") == 248_007_048
    coco = YOLOv3(81, size=SIZE).eval()
    outputs = reversed(coco.outputs)  # in the place of the layers in which the file's are forgotten
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn, "Conv2d", lambda *sizes: next(outputs))
        load_darknet(coco, str(files / "yolov3.weights"))
    with torch.no_grad():
        parts = coco.predict(x).split([3 * (SIZE // s) ** 2 for s in (8, 16, 32)], dim=1)
    for part, theirs, side in zip(parts, reversed(wanted), (8, 4, 2)):
        mine = part.unflatten(1, (3, side, side)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        assert mine.shape == theirs.shape and theirs.std() > 0.1
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)
    for name, parts in (("yolov3.weights", {"backbone", "necks"}), ("darknet53.conv.74", {"backbone"})):
        other, theirs = copy.deepcopy(model), coco.state_dict()
        loaded = load_darknet(other, str(files / name))
        assert {tensor.split(".")[0] for tensor in loaded} == parts
        for tensor, value in other.state_dict().items():
            assert torch.equal(value, theirs[tensor] if tensor in loaded else model.state_dict()[tensor]), tensor
    with torch.no_grad():
        assert torch.allclose(other.eval().backbone(x)["2"], wanted_74, rtol=1e-3, atol=1e-3)
    for size in (0, 20, 162_482_576, 162_482_584, 248_007_044, 248_007_052):
        (tmp_path / "weights").write_bytes(b"")
        os.truncate(tmp_path / "weights", size)  # without taking room on the disk
        with pytest.raises(SystemExit, match="weights has another length than Darknet's"):
            load_darknet(other, str(tmp_path / "weights"))


# Boxes ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("height, width", [(30, 90), (90, 30), (64, 64), (500, 333), (1, 200)])
def test_letterbox(height, width):
    image = torch.rand(3, height, width)
    square, scale, shift = letterbox(image, SIZE)
    whole = torch.tensor([0.0, 0.0, width, height]) * scale + shift
    x0, y0, x1, y1 = whole.round().int().tolist()
    assert torch.allclose(whole, whole.round()) and max(x1 - x0, y1 - y0) == SIZE and square.shape == (3, SIZE, SIZE)
    assert (x0 + x1 - SIZE) in (0, -1) and (y0 + y1 - SIZE) in (0, -1)  # in the middle
    grey = torch.ones(SIZE, SIZE, dtype=torch.bool)
    grey[y0:y1, x0:x1] = False
    assert (square[:, grey] == 0.5).all()
    assert square[:, y0:y1, x0:x1].mean().item() == pytest.approx(image.mean().item(), abs=0.02)
    assert torch.equal(square, image) or (height, width) != (SIZE, SIZE)


def place(stride, anchor, row, column, size=SIZE):
    """Where the prediction of an anchor 0..2 at a stride is among all of an image's."""
    start = sum(3 * (size // s) ** 2 for s in (8, 16, 32) if s < stride)
    return start + (anchor * (size // stride) + row) * (size // stride) + column


def raw_of(*entries):
    """Logits that predict nothing but entries (place, t_x, t_y, t_w, t_h, objectness, classes...)."""
    raw = torch.full((1, N, 5 + REAL), -20.0)
    raw[..., :4] = 0
    for i, *values in entries:
        raw[0, i] = torch.tensor(values)
    return raw


def test_decodes_by_the_formulas_of_the_paper(model):
    """Through the real path from output maps, here of fakes before the outputs' places are read."""
    fake = copy.deepcopy(model)
    maps = [torch.zeros(1, 24, SIZE // s, SIZE // s) for s in (8, 16, 32)]
    maps[1].view(3, 8, 4, 4)[1, :, 2, 3] = torch.tensor([0.2, -0.4, 0.1, -0.3, 3.0, -2.0, 2.0, -1.0])
    fake.backbone.forward = lambda squares: dict(zip("012", maps))
    for neck, output in zip(fake.necks, fake.outputs):
        neck.forward, output.forward = lambda features, coarser: (None, features), lambda x: x
    raw, i = fake.predict(torch.zeros(1)), place(16, 1, 2, 3)
    x, y = (sigmoid(0.2) + 3) * 16, (sigmoid(-0.4) + 2) * 16
    w, h = 62 * math.exp(0.1), 45 * math.exp(-0.3)
    boxes = model.decode(raw)[0]
    assert torch.allclose(boxes[i], torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2]), atol=1e-4)
    corner = boxes[place(32, 2, 1, 0)]  # t = 0: the middle of the cell, the size of the anchor
    assert torch.allclose(corner, torch.tensor([16 - 373 / 2, 48 - 326 / 2, 16 + 373 / 2, 48 + 326 / 2]))
    assert raw[0, torch.arange(N) != i].abs().max() == 0
    raw[..., 4] = -20.0
    raw[0, i, 4] = 3.0
    found = model.detect(raw[0], torch.ones(4), torch.zeros(4), (SIZE, SIZE))
    scores = [sigmoid(3) * sigmoid(s) for s in (2.0, -1.0, -2.0)]
    assert torch.allclose(found["scores"], torch.tensor(scores)) and found["labels"].tolist() == [2, 3, 1]
    clipped = [max(x - w / 2, 0), max(y - h / 2, 0), min(x + w / 2, 64), min(y + h / 2, 64)]
    assert torch.allclose(found["boxes"], torch.tensor([clipped] * 3), atol=1e-4)


def test_suppression_threshold_limit_and_edges(model, monkeypatch):
    monkeypatch.setattr(model, "score_thresh", 0.3)
    # a is at the right edge of its cell, nearly the same box as b
    raw = raw_of((place(8, 1, 2, 2), 5.0, 0, 0, 0, 20, 3, -20, 0), (place(8, 1, 2, 3), -5.0, 0, 0, 0, 20, 2, -20, 1.5),
                 (place(8, 1, 6, 6), 0, 0, 0, 0, 20, 1, -1.0, -20))  # fmt: skip
    identity = torch.ones(4), torch.zeros(4), (SIZE, SIZE)
    found = model.detect(raw[0], *identity)
    # of class 1 b goes for a, of class 3 a for b; then c, whose class 2 has 0.27
    assert found["labels"].tolist() == [1, 3, 1]
    assert found["scores"].tolist() == pytest.approx([sigmoid(3), sigmoid(1.5), sigmoid(1)])
    monkeypatch.setattr(model, "score_thresh", 0.25)
    assert model.detect(raw[0], *identity)["labels"].tolist() == [1, 3, 1, 2]
    monkeypatch.setattr(model, "detections_per_img", 2)
    assert model.detect(raw[0], *identity)["labels"].tolist() == [1, 3]
    monkeypatch.setattr(model, "score_thresh", 0.99)
    assert model.detect(raw[0], *identity)["boxes"].shape == (0, 4)
    # a wide image: the first box is in the grey above it; the second has its centre at (36, 20) and sides 16 x 30 in
    # the square, whose rows 24 to 40 are the image at half its size
    _, scale, shift = letterbox(torch.rand(3, 32, 128), SIZE)
    raw = raw_of((place(8, 0, 0, 4), 0, 0, 0, 0, 9, 9, -9, -9), (place(8, 1, 2, 4), 0, 0, 0, 0, 9, 9, -9, -9))
    found = model.detect(raw[0], scale, shift, (32, 128))
    assert torch.allclose(found["boxes"], torch.tensor([[56.0, 0.0, 88.0, 22.0]]), atol=1e-4)


# Losses --------------------------------------------------------------------------------------------------------------
def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def cross_entropy(p, target):
    loss = -target * math.log(p) if target > 0 else 0.0
    return loss - (1 - target) * math.log(1 - p) if target < 1 else loss


def slow_losses(raw, boxes, labels, size):
    """The losses in loops over truths and over cells, from sections 2.1 and 2.2 of the paper."""
    totals = {"loss_box": 0.0, "loss_objectness": 0.0, "loss_classifier": 0.0}
    for t, truths, names in zip(raw.double().tolist(), boxes, labels):
        truths, owned = truths.double().tolist(), {}
        for truth, name in zip(truths, names.tolist()):
            x, y, w, h = (truth[0] + truth[2]) / 2, (truth[1] + truth[3]) / 2, truth[2] - truth[0], truth[3] - truth[1]
            centred = [(-side_w / 2, -side_h / 2, side_w / 2, side_h / 2) for side_w, side_h in [(w, h), *COCO_ANCHORS]]
            overlaps = [iou(centred[0], other) for other in centred[1:]]
            best = overlaps.index(max(overlaps))
            stride = (8, 16, 32)[best // 3]
            column, row = min(int(x // stride), size // stride - 1), min(int(y // stride), size // stride - 1)
            old = owned.get((best, row, column))
            owned[best, row, column] = (x, y, w, h), (old[1] if old else set()) | {name}
        for best, row, column in [(b, r, c) for b in range(9) for r in range(8) for c in range(8)]:
            stride, (p_w, p_h) = (8, 16, 32)[best // 3], COCO_ANCHORS[best]
            if max(row, column) >= size // stride:
                continue
            t_x, t_y, t_w, t_h, t_o, *t_c = t[place(stride, best % 3, row, column, size)]
            if (best, row, column) not in owned:
                b_x, b_y = (sigmoid(t_x) + column) * stride, (sigmoid(t_y) + row) * stride
                b_w, b_h = p_w * math.exp(t_w), p_h * math.exp(t_h)
                box = b_x - b_w / 2, b_y - b_h / 2, b_x + b_w / 2, b_y + b_h / 2
                if all(iou(box, truth) <= 0.5 for truth in truths):
                    totals["loss_objectness"] += cross_entropy(sigmoid(t_o), 0.0)
                continue
            (x, y, w, h), names = owned[best, row, column]
            totals["loss_objectness"] += cross_entropy(sigmoid(t_o), 1.0)
            for c, logit_of_class in enumerate(t_c, 1):
                totals["loss_classifier"] += cross_entropy(sigmoid(logit_of_class), float(c in names))
            error = (t_w - math.log(w / p_w)) ** 2 / 2 + (t_h - math.log(h / p_h)) ** 2 / 2
            for value, target in ((t_x, x / stride - column), (t_y, y / stride - row)):
                error += cross_entropy(sigmoid(value), target) - cross_entropy(target, target)
            totals["loss_box"] += error * (2 - w * h / size**2)
    return {name: total / len(raw) for name, total in totals.items()}


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_a_slow_implementation(model, seed):
    generator, boxes, labels = torch.Generator().manual_seed(seed), [], []
    raw = torch.randn(3, N, 5 + REAL, generator=generator) * 0.7
    for n in (5, 0, 40):  # 40: several at the same cell
        centre = torch.rand(n, 2, generator=generator) * SIZE
        half = torch.exp(torch.randn(n, 2, generator=generator) + 2.3) / 2
        boxes.append(torch.cat([centre - half, centre + half], dim=1).clamp(0, SIZE))
        labels.append(torch.randint(1, REAL + 1, (n,), generator=generator))
    fast, slow = model.losses(raw, boxes, labels), slow_losses(raw, boxes, labels, SIZE)
    for name in slow:
        assert fast[name].item() == pytest.approx(slow[name], rel=2e-5) and fast[name] > 0, name


def test_the_gradient_is_darknets(model):
    """yolo_layer.c: (2 - w h) (target - value) for the logistic value of t_x, t_y and for t_w, t_h themselves."""
    raw = torch.randn(1, N, 5 + REAL, generator=torch.Generator().manual_seed(5)).requires_grad_()
    truth = torch.tensor([[20.0, 22.0, 34.0, 47.0]])  # 14 x 25 at (27, 34.5): the anchor 16 x 30, row 4, column 3
    losses = model.losses(raw, [truth], [torch.tensor([2])])
    gradient = torch.autograd.grad(sum(losses.values()), raw)[0][0]
    i, weight = place(8, 1, 4, 3), 2 - 14 * 25 / SIZE**2
    t = raw[0, i].detach().tolist()
    wanted = [sigmoid(t[0]) - (27 / 8 - 3), sigmoid(t[1]) - (34.5 / 8 - 4), t[2] - math.log(14 / 16)]
    wanted = [weight * value for value in (*wanted, t[3] - math.log(25 / 30))]
    wanted += [sigmoid(t[4]) - 1, sigmoid(t[5]), sigmoid(t[6]) - 1, sigmoid(t[7])]
    assert gradient[i].tolist() == pytest.approx(wanted, rel=1e-4)
    others = torch.arange(N) != i
    assert gradient[others][:, [0, 1, 2, 3, 5, 6, 7]].abs().max() == 0 and (gradient[others][:, 4] >= 0).all()


def test_objects_start_out_rare_and_bad_boxes_are_never_infinite(model):
    raw = torch.zeros(1, N, 5 + REAL)
    raw[..., 4] = model.outputs[0].bias.view(3, -1)[0, 4].item()
    losses = model.losses(raw, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])
    assert losses["loss_objectness"].item() == pytest.approx(-N * math.log(0.99), rel=1e-4)
    assert losses["loss_box"] == losses["loss_classifier"] == 0
    # no width, outside, beyond the edges, at the far edge: left out or cut
    bad = torch.tensor([[5.0, 5.0, 5.0, 30.0], [70, 10, 90, 30], [-50, -50, 300, 300], [59.5, 39.5, 60, 40]])
    targets = [{"boxes": bad, "labels": torch.tensor([1, 2, 3, 1])}]
    losses = model.train()([torch.rand(3, 40, 60)] * 2, targets * 2)
    assert all(torch.isfinite(value) for value in losses.values()) and losses["loss_box"] > 0
