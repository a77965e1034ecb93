"""Folders of Fashion-MNIST's classes, from Debian's dataset-fashion-mnist.

    python make_data.py /usr/share/datasets/fashion-mnist

clothes: 600 images of each of six classes (a source); shoes-and-bags: 100 of each of the other four (a natural
target). The first images of each class in the training set, in their order.
"""

import gzip
import os
import sys

import numpy as np
from PIL import Image

names = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read(name, offset):
    with gzip.open(os.path.join(sys.argv[1], name)) as file:
        return np.frombuffer(file.read(), np.uint8, offset=offset)


labels = read("train-labels-idx1-ubyte.gz", 8)
images = read("train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
for label, name in enumerate(names):
    folder, count = ("shoes-and-bags", 100) if name in ("sandal", "sneaker", "bag", "ankle boot") else ("clothes", 600)
    os.makedirs(os.path.join(folder, name))
    for i in np.flatnonzero(labels == label)[:count]:
        Image.fromarray(images[i]).save(os.path.join(folder, name, f"{i:05d}.png"))
