"""YOLOv3: Darknet's files by an interpreter of its configuration, the loss by a slow loop, boxes by hand."""

import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune_detect import COCO_ANCHORS, YOLOv3, letterbox, load_darknet, yolo_output

SIZE, REAL = 64, 3  # the models of most tests: 64 x 64 pixels, 3 classes besides background
N = 3 * (8 * 8 + 4 * 4 + 2 * 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return YOLOv3(REAL + 1, size=SIZE)


@pytest.fixture(scope="module")
def coco():
    return YOLOv3(81, size=SIZE)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    return math.log(p / (1 - p))


# Darknet: what yolov3.cfg says, layer by layer, and an interpreter of it ----------------------------------------------
def yolov3_cfg(classes):
    """Layers (kind, arguments) in the numbering of yolov3.cfg; a convolution's: filters, size, stride, normalised."""
    layers = [("conv", 32, 3, 1, True)]
    for filters, blocks in [(64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)]:
        layers.append(("conv", filters, 3, 2, True))
        for _ in range(blocks):
            layers += [("conv", filters // 2, 1, 1, True), ("conv", filters, 3, 1, True), ("shortcut", -3)]
    assert len(layers) == 75
    for filters, joined in [(512, None), (256, 61), (128, 36)]:
        if joined:
            layers += [("route", -4), ("conv", filters, 1, 1, True), ("upsample",), ("route", -1, joined)]
        layers += [("conv", filters, 1, 1, True), ("conv", 2 * filters, 3, 1, True)] * 3
        layers += [("conv", 3 * (5 + classes), 1, 1, False), ("yolo",)]
    assert len(layers) == 107
    return layers


def write_darknet(path, layers):
    """A weights file of random numbers that keep activations of ordinary size."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(5_000_000, dtype=np.float32)
    widths = []

    def draw(n, shift, scale):
        start = rng.integers(len(normal) - n)  # a stretch of the same numbers: 62 million new ones take too long
        (shift + np.float32(scale) * normal[start : start + n]).tofile(file)

    with open(path, "wb") as file:
        np.array([0, 2, 0], dtype="<i4").tofile(file)
        np.array([32_013_312], dtype="<i8").tofile(file)
        for layer in layers:
            channels = widths[-1] if widths else 3
            if layer[0] == "conv":
                _, filters, size, _, normalised = layer
                draw(filters, 0, 1)
                if normalised:
                    draw(filters, 1, 0.1)
                    draw(filters, 0, 0.1)
                    draw(filters, 1, 0.1)
                draw(filters * channels * size * size, 0, (channels * size * size) ** -0.5)
                channels = filters
            elif layer[0] == "route":
                channels = sum(widths[i] for i in layer[1:])
            widths.append(channels)


def run_darknet(path, layers, x, header_bytes=20):
    """The outputs of the [yolo] layers, before their logistic functions, and the output of the layer 74."""
    floats = np.fromfile(path, dtype="<f4", offset=header_bytes)
    at, outputs, yolo = 0, [], []

    def take(*shape):
        nonlocal at
        at += math.prod(shape)
        return torch.from_numpy(floats[at - math.prod(shape) : at].reshape(shape))

    for layer in layers:
        if layer[0] == "conv":
            _, filters, size, stride, normalised = layer
            bias = take(filters)
            scale, mean, variance = (take(filters), take(filters), take(filters)) if normalised else (None,) * 3
            x = F.conv2d(x, take(filters, x.shape[1], size, size), None, stride, size // 2)
            if normalised:
                x = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None] * scale[:, None, None]
            x = x + bias[:, None, None]
            if normalised:
                x = torch.where(x > 0, x, 0.1 * x)
        elif layer[0] == "shortcut":
            x = x + outputs[layer[1]]
        elif layer[0] == "route":
            x = torch.cat([outputs[i] for i in layer[1:]], dim=1)
        elif layer[0] == "upsample":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif layer[0] == "yolo":
            yolo.append(x)
        outputs.append(x)
    assert at == len(floats)
    return yolo, outputs[74]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_darknet(folder / "yolov3.weights", yolov3_cfg(80))
    write_darknet(folder / "darknet53.conv.74", yolov3_cfg(80)[:75])
    yield folder
    for name in os.listdir(folder):  # 410 MB
        os.remove(folder / name)


# The network ---------------------------------------------------------------------------------------------------------
def test_sizes_of_the_published_files(model, coco, files):
    def count(module, running):
        floats = sum(p.numel() for p in module.parameters())
        return floats + running * sum(b.numel() for n, b in module.named_buffers() if "running" in n)

    assert count(model.backbone, True) == 40_620_640  # darknet53.conv.74, 162,482,580 bytes
    assert os.path.getsize(files / "darknet53.conv.74") == 162_482_580
    published = 62_001_757  # yolov3.weights
    assert sum(count(m, True) for m in (coco.backbone, coco.necks, coco.outputs)) == published
    assert os.path.getsize(files / "yolov3.weights") == 248_007_048 == 20 + 4 * published
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.backbone.modules()) == 52
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 75


def test_strides_and_shapes(model):
    model.eval()
    with torch.no_grad():
        maps = model.backbone(torch.rand(2, 3, 64, 96)).values()
        raw = model.predict(torch.rand(2, 3, SIZE, SIZE))
    assert [tuple(m.shape) for m in maps] == [(2, 256, 8, 12), (2, 512, 4, 6), (2, 1024, 2, 3)]
    assert raw.shape == (2, N, 5 + REAL) and raw.dtype == torch.float32
    assert [output.out_channels for output in model.outputs] == [24, 24, 24]


def test_objects_start_out_rare(model):
    with torch.no_grad():
        fresh = yolo_output(256, REAL + 1)(torch.rand(1, 256, 2, 2)).view(3, 5 + REAL, 4).sigmoid()
    assert (fresh[:, 4] < 0.03).all() and (fresh[:, 5:] > 0.3).all()
    raw = torch.zeros(1, N, 5 + REAL)
    raw[..., 4] = model.outputs[0].bias.view(3, -1)[0, 4].item()
    losses = model.losses(raw, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])
    assert losses["loss_objectness"].item() == pytest.approx(-N * math.log(0.99), rel=1e-4)


# Boxes ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("height, width", [(30, 90), (90, 30), (64, 64), (500, 333), (1, 200)])
def test_letterbox(height, width):
    image = torch.rand(3, height, width)
    square, scale, shift = letterbox(image, SIZE)
    assert square.shape == (3, SIZE, SIZE) and 0 <= square.min() and square.max() <= 1
    whole = torch.tensor([0.0, 0.0, width, height]) * scale + shift
    x0, y0, x1, y1 = whole.round().int().tolist()
    assert torch.allclose(whole, whole.round()) and max(x1 - x0, y1 - y0) == SIZE
    assert (x0 + x1 - SIZE) in (0, -1) and (y0 + y1 - SIZE) in (0, -1)  # in the middle
    grey = torch.ones(SIZE, SIZE, dtype=torch.bool)
    grey[y0:y1, x0:x1] = False
    assert (square[:, grey] == 0.5).all()
    assert square[:, y0:y1, x0:x1].mean().item() == pytest.approx(image.mean().item(), abs=0.02)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9]]) * torch.tensor([width, height, width, height])
    assert torch.allclose((boxes * scale + shift - shift) / scale, boxes, atol=1e-4)
    if height == width == SIZE:
        assert torch.equal(square, image)


def place(stride, anchor, row, column, size=SIZE):
    """Where the prediction of an anchor 0..2 at a stride is among all of an image's."""
    start = sum(3 * (size // s) ** 2 for s in (8, 16, 32) if s < stride)
    return start + (anchor * (size // stride) + row) * (size // stride) + column


def test_decodes_by_the_formulas_of_the_paper(model):
    # through the real path from output maps: t = (0.2, -0.4, 0.1, -0.3) for anchor 1 at stride 16, row 2, column 3
    maps = [torch.zeros(1, 24, SIZE // s, SIZE // s) for s in (8, 16, 32)]
    maps[1].view(3, 8, 4, 4)[1, :, 2, 3] = torch.tensor([0.2, -0.4, 0.1, -0.3, 3.0, -2.0, 2.0, -1.0])
    parts = model.backbone, model.necks, model.outputs
    model.backbone = Maps()
    model.necks = torch.nn.ModuleList(Passes() for _ in range(3))
    model.outputs = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    raw = model.predict(maps)
    model.backbone, model.necks, model.outputs = parts
    i = place(16, 1, 2, 3)
    box = model.decode(raw)[0, i]
    x, y = (sigmoid(0.2) + 3) * 16, (sigmoid(-0.4) + 2) * 16
    w, h = 62 * math.exp(0.1), 45 * math.exp(-0.3)
    assert torch.allclose(box, torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2]), atol=1e-4)
    others = torch.arange(N) != i
    corner = model.decode(raw)[0, place(32, 2, 1, 0)]  # t = 0: the middle of the cell, the size of the anchor
    assert torch.allclose(corner, torch.tensor([16 - 373 / 2, 48 - 326 / 2, 16 + 373 / 2, 48 + 326 / 2]))
    assert raw[0, others].abs().max() == 0

    raw[..., 4] = -20.0
    raw[0, i, 4] = 3.0
    found = model.detect(raw[0], torch.ones(4), torch.zeros(4), (SIZE, SIZE))
    scores = [sigmoid(3) * sigmoid(s) for s in (2.0, -1.0, -2.0)]
    assert torch.allclose(found["scores"], torch.tensor(scores)) and found["labels"].tolist() == [2, 3, 1]
    clipped = [max(x - w / 2, 0), max(y - h / 2, 0), min(x + w / 2, 64), min(y + h / 2, 64)]
    assert torch.allclose(found["boxes"], torch.tensor([clipped] * 3), atol=1e-4)
    assert found["labels"].dtype == torch.int64


class Maps(torch.nn.Module):
    def forward(self, maps):
        return dict(enumerate(maps))


class Passes(torch.nn.Module):
    def forward(self, features, coarser):
        return None, features


def raw_of(entries, batch=1):
    """Logits that predict nothing but entries (image, place, t_x, t_y, t_w, t_h, objectness, classes...)."""
    raw = torch.full((batch, N, 5 + REAL), -20.0)
    raw[..., :4] = 0
    for image, i, *values in entries:
        raw[image, i] = torch.tensor(values)
    return raw


def test_suppression_threshold_and_limit(model, monkeypatch):
    monkeypatch.setattr(model, "score_thresh", 0.3)
    a, b, c = place(8, 1, 2, 2), place(8, 1, 2, 3), place(8, 1, 6, 6)
    raw = raw_of(
        [
            (0, a, 5.0, 0, 0, 0, 20, 3, -20, 0),  # at the right edge of its cell, nearly the same box as b
            (0, b, -5.0, 0, 0, 0, 20, 2, -20, 1.5),
            (0, c, 0, 0, 0, 0, 20, 1, -1.0, -20),
        ]
    )
    identity = torch.ones(4), torch.zeros(4), (SIZE, SIZE)
    found = model.detect(raw[0], *identity)
    # of class 1 b goes for a, of class 3 a for b; then c, whose class 2 has 0.27
    assert found["labels"].tolist() == [1, 3, 1]
    assert found["scores"].tolist() == pytest.approx([sigmoid(3), sigmoid(1.5), sigmoid(1)])
    monkeypatch.setattr(model, "score_thresh", 0.25)
    assert model.detect(raw[0], *identity)["labels"].tolist() == [1, 3, 1, 2]
    monkeypatch.setattr(model, "detections_per_img", 2)
    assert model.detect(raw[0], *identity)["labels"].tolist() == [1, 3]
    monkeypatch.setattr(model, "nms_thresh", 0.999)
    assert model.detect(raw[0], *identity)["labels"].tolist() == [1, 1]
    monkeypatch.setattr(model, "score_thresh", 0.99)
    empty = model.detect(raw[0], *identity)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == empty["scores"].shape == (0,)


def test_boxes_end_at_the_edge_of_the_image(model):
    _, scale, shift = letterbox(torch.rand(3, 32, 128), SIZE)
    raw = raw_of([(0, place(8, 0, 0, 4), 0, 0, 0, 0, 9, 9, -9, -9), (0, place(8, 1, 2, 4), 0, 0, 0, 0, 9, 9, -9, -9)])
    found = model.detect(raw[0], scale, shift, (32, 128))
    # the first is in the grey above the image; the second has its centre at (36, 20) and sides 16 x 30 in the square,
    # whose rows 24 to 40 are the image at half its size
    assert torch.allclose(found["boxes"], torch.tensor([[56.0, 0.0, 88.0, 22.0]]), atol=1e-4)


# Losses --------------------------------------------------------------------------------------------------------------
def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def cross_entropy(p, target):
    loss = 0.0
    if target > 0:
        loss -= target * math.log(p)
    if target < 1:
        loss -= (1 - target) * math.log(1 - p)
    return loss


def slow_losses(raw, boxes, labels, size):
    """The losses in loops over truths and over cells, from sections 2.1 and 2.2 of the paper."""
    totals = {"loss_box": 0.0, "loss_objectness": 0.0, "loss_classifier": 0.0}
    for t, truths, names in zip(raw.double().tolist(), boxes, labels):
        truths, owned = truths.double().tolist(), {}
        for truth, name in zip(truths, names.tolist()):
            x, y, w, h = (truth[0] + truth[2]) / 2, (truth[1] + truth[3]) / 2, truth[2] - truth[0], truth[3] - truth[1]
            overlaps = []
            for p_w, p_h in COCO_ANCHORS:
                overlaps.append(iou((-w / 2, -h / 2, w / 2, h / 2), (-p_w / 2, -p_h / 2, p_w / 2, p_h / 2)))
            best = overlaps.index(max(overlaps))
            stride = (8, 16, 32)[best // 3]
            column, row = min(int(x // stride), size // stride - 1), min(int(y // stride), size // stride - 1)
            old = owned.get((best, row, column))
            owned[best, row, column] = (x, y, w, h), (old[1] if old else set()) | {name}
        for best in range(9):
            stride, (p_w, p_h) = (8, 16, 32)[best // 3], COCO_ANCHORS[best]
            for row in range(size // stride):
                for column in range(size // stride):
                    t_x, t_y, t_w, t_h, t_o, *t_c = t[place(stride, best % 3, row, column, size)]
                    b_x, b_y = (sigmoid(t_x) + column) * stride, (sigmoid(t_y) + row) * stride
                    b_w, b_h = p_w * math.exp(t_w), p_h * math.exp(t_h)
                    box = b_x - b_w / 2, b_y - b_h / 2, b_x + b_w / 2, b_y + b_h / 2
                    if (best, row, column) not in owned:
                        if all(iou(box, truth) <= 0.5 for truth in truths):
                            totals["loss_objectness"] += cross_entropy(sigmoid(t_o), 0.0)
                        continue
                    (x, y, w, h), names = owned[best, row, column]
                    totals["loss_objectness"] += cross_entropy(sigmoid(t_o), 1.0)
                    for c, logit_of_class in enumerate(t_c, 1):
                        totals["loss_classifier"] += cross_entropy(sigmoid(logit_of_class), float(c in names))
                    error = 0.0
                    for value, target in ((t_x, x / stride - column), (t_y, y / stride - row)):
                        error += cross_entropy(sigmoid(value), target) - cross_entropy(target, target)
                    error += (t_w - math.log(w / p_w)) ** 2 / 2 + (t_h - math.log(h / p_h)) ** 2 / 2
                    totals["loss_box"] += error * (2 - w * h / size**2)
    return {name: total / len(raw) for name, total in totals.items()}


def random_truths(generator, n, size=SIZE):
    centre = torch.rand(n, 2, generator=generator) * size
    half = torch.exp(torch.randn(n, 2, generator=generator) + 2.3) / 2
    boxes = torch.cat([centre - half, centre + half], dim=1).clamp(0, size)
    return boxes, torch.randint(1, REAL + 1, (n,), generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_losses_equal_a_slow_implementation(model, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(3, N, 5 + REAL, generator=generator) * 0.7
    truths = [random_truths(generator, n) for n in (5, 0, 40)]  # 40: several at the same cell
    boxes, labels = zip(*truths)
    fast = model.losses(raw, list(boxes), list(labels))
    slow = slow_losses(raw, boxes, labels, SIZE)
    for name in slow:
        assert fast[name].item() == pytest.approx(slow[name], rel=2e-5), name
    assert all(value > 0 for value in slow.values())


def test_the_gradient_is_darknets(model):
    # yolo_layer.c: (2 - w h) (target - value) for the logistic value of t_x, t_y and for t_w, t_h themselves
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
    assert gradient[others][:, [0, 1, 2, 3, 5, 6, 7]].abs().max() == 0
    assert (gradient[others][:, 4] >= 0).all()


def test_ignores_what_overlaps_a_truth(model):
    truth = torch.tensor([[12.0, 5.0, 28.0, 35.0]])  # 16 x 30 at (20, 20)
    wide = place(8, 1, 2, 3)  # the neighbour of the responsible cell, which is at row 2, column 2
    for t_x, counts in ((-20.0, False), (20.0, True)):  # shifted by 4 and 12 pixels: IoU 0.6 and 0.14
        losses = []
        for objectness in (-20.0, 20.0):
            raw = raw_of(
                [(0, place(8, 1, 2, 2), 0, 0, 0, 0, 20, 9, 9, 9), (0, wide, t_x, 0, 0, 0, objectness, 0, 0, 0)]
            )
            losses.append(model.losses(raw, [truth], [torch.tensor([1])])["loss_objectness"].item())
        assert losses[1] - losses[0] == pytest.approx(20.0 if counts else 0.0, abs=1e-4)
    # the responsible one counts, however well it overlaps
    raw = raw_of([(0, place(8, 1, 2, 2), 0, 0, 0, 0, -20.0, 9, 9, 9)])
    assert model.losses(raw, [truth], [torch.tensor([1])])["loss_objectness"].item() == pytest.approx(20.0, abs=1e-4)


def test_perfect_predictions_cost_nothing(model):
    truth = torch.tensor([[20.0, 22.0, 34.0, 47.0], [2.0, 3.0, 60.0, 52.0]])
    entries = []
    for (x0, y0, x1, y1), label in zip(truth.tolist(), (2, 3)):
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        stride, anchor, (p_w, p_h) = (8, 1, (16, 30)) if label == 2 else (16, 1, (62, 45))
        t = [logit(x / stride % 1), logit(y / stride % 1), math.log(w / p_w), math.log(h / p_h)]
        t += [20.0] + [20.0 if c == label else -20.0 for c in (1, 2, 3)]
        entries.append((0, place(stride, anchor, int(y // stride), int(x // stride)), *t))
    raw = raw_of(entries)
    losses = model.losses(raw, [truth], [torch.tensor([2, 3])])
    assert all(abs(value.item()) < 1e-5 for value in losses.values())
    found = model.detect(raw[0], torch.ones(4), torch.zeros(4), (SIZE, SIZE))
    assert torch.allclose(found["boxes"].sort(dim=0).values, truth.sort(dim=0).values, atol=1e-3)
    assert sorted(found["labels"].tolist()) == [2, 3]


def test_images_without_boxes_and_bad_boxes(model):
    model.train()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 20)]
    losses = model(images, [none, none])
    assert losses["loss_box"] == losses["loss_classifier"] == 0 and losses["loss_objectness"] > 0
    # no width, outside, beyond the edges, at the far edge: left out or cut, and never infinite
    bad = torch.tensor([[5.0, 5.0, 5.0, 30.0], [70, 10, 90, 30], [-50, -50, 300, 300], [59.5, 39.5, 60, 40]])
    losses = model(images, [{"boxes": bad, "labels": torch.tensor([1, 2, 3, 1])}, none])
    assert all(torch.isfinite(value) for value in losses.values()) and losses["loss_box"] > 0


# Darknet's files -----------------------------------------------------------------------------------------------------
def darknet_maps(model, x):
    """The outputs as Darknet has them, `(B, 3 * (5 + classes), h, w)`, coarse to fine."""
    with torch.no_grad():
        raw = model.eval().predict(x)
    parts = raw.split([3 * (SIZE // s) ** 2 for s in (8, 16, 32)], dim=1)
    maps = [part.unflatten(1, (3, SIZE // s, -1)) for part, s in zip(parts, (8, 16, 32))]
    return [m.permute(0, 1, 4, 2, 3).flatten(1, 2) for m in reversed(maps)]


def test_loads_the_whole_network(coco, files):
    path = files / "yolov3.weights"
    assert set(load_darknet(coco, str(path))) == set(coco.state_dict()) - {"anchors"}
    x = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    wanted, _ = run_darknet(path, yolov3_cfg(80), x)
    for mine, theirs in zip(darknet_maps(coco, x), wanted):
        assert mine.shape == theirs.shape and theirs.std() > 0.1
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_loads_all_but_outputs_of_other_classes(model, coco, files):
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    loaded = load_darknet(model, str(files / "yolov3.weights"))
    assert {name.split(".")[0] for name in loaded} == {"backbone", "necks"}
    load_darknet(coco, str(files / "yolov3.weights"))
    theirs = coco.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("outputs"):
            assert torch.equal(tensor, before[name])
        elif "num_batches" not in name:
            assert torch.equal(tensor, theirs[name]), name


def test_loads_the_backbone_alone(model, files):
    model = copy.deepcopy(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    path = files / "darknet53.conv.74"
    assert {name.split(".")[0] for name in load_darknet(model, str(path))} == {"backbone"}
    x = torch.rand(1, 3, SIZE, SIZE)
    _, wanted = run_darknet(path, yolov3_cfg(80)[:75], x)
    with torch.no_grad():
        assert torch.allclose(model.eval().backbone(x)["2"], wanted, rtol=1e-3, atol=1e-3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("backbone") or "num_batches" in name), name


def test_loads_the_old_header(tmp_path, files, model):
    # images seen as int32 before version 0.2
    path = tmp_path / "old"
    with open(path, "wb") as file:
        np.array([0, 1, 0, 777], dtype="<i4").tofile(file)
        np.fromfile(files / "darknet53.conv.74", dtype="<f4", offset=20).tofile(file)
    model = copy.deepcopy(model)
    load_darknet(model, str(path))
    os.remove(path)
    first = np.fromfile(files / "darknet53.conv.74", dtype="<f4", offset=20, count=32 * 4 + 864)
    assert np.array_equal(model.backbone.stem[1].bias.detach(), first[:32])
    assert np.array_equal(model.backbone.stem[0].weight.detach().flatten(), first[128:])


@pytest.mark.parametrize("size", [0, 8, 20, 1_000, 162_482_576, 162_482_579, 162_482_584, 248_007_044, 248_007_052])
def test_refuses_other_lengths(model, tmp_path, size):
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        np.array([0, 2, 0, 0, 0], dtype="<i4").tofile(file)
    os.truncate(path, size)  # without taking room on the disk
    before = model.backbone.stem[0].weight.clone()
    with pytest.raises(ValueError) as error:
        load_darknet(model, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(model.backbone.stem[0].weight, before)


def test_refuses_other_formats(model, tmp_path):
    texts = [b"[net]\nbatch=64\nsubdivisions=16\n" * 9, b"<!DOCTYPE html>" * 9, b"PK\x03\x04" * 40, b"\xff" * 200]
    for text in texts:
        (tmp_path / "weights").write_bytes(text)
        with pytest.raises(ValueError, match="is not a Darknet weights file"):
            load_darknet(model, str(tmp_path / "weights"))
    with pytest.raises(FileNotFoundError):
        load_darknet(model, str(tmp_path / "none"))


# Learning ------------------------------------------------------------------------------------------------------------
def test_overfits_two_images(model):
    torch.manual_seed(1)
    model = copy.deepcopy(model).train()
    model.anchors.copy_(torch.tensor([(s, s) for s in (8, 10, 14, 18, 22, 28, 36, 44, 56)]))
    images = [torch.full((3, 64, 64), 0.2), torch.full((3, 40, 64), 0.2)]
    boxes = [torch.tensor([[7.0, 14.0, 27.0, 34.0], [40.0, 36.0, 54.0, 50.0]]), torch.tensor([[20.0, 5.0, 50.0, 37.0]])]
    labels = [torch.tensor([1, 2]), torch.tensor([2])]
    for image, box, label in zip(images, boxes, labels):
        for (x0, y0, x1, y1), c in zip(box.int().tolist(), label.tolist()):
            image[c, y0:y1, x0:x1] = 1.0
    targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels)]
    model.backbone.requires_grad_(False)  # for speed; its statistics still follow the images
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5  # Darknet's would need hundreds of steps
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    history = []
    for _ in range(12):
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert all(history[-1][name] < history[0][name] / 5 for name in ("loss_box", "loss_objectness", "loss_classifier"))
    with torch.no_grad():
        found = model.eval()(images)
    for each, box, label in zip(found, boxes, labels):
        sure = each["scores"] > 0.5
        assert sorted(each["labels"][sure].tolist()) == label.tolist()
        for mine, name in zip(each["boxes"][sure].tolist(), each["labels"][sure].tolist()):
            assert iou(mine, box[label.tolist().index(name)].tolist()) > 0.7
