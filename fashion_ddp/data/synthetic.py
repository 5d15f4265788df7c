"""Make a dataset that needs no file and no network. It is only good for checking a machine."""

import math

import numpy as np

CLASSES = tuple(f"SYNTHETIC {n}" for n in range(10))


def arrays(train: int = 12_000, test: int = 2_000) -> dict[str, np.ndarray]:
    """Return the arrays of a Dataset by name: images uint8 [n, 1, 28, 28], labels int64 [n].

    Each image is its class's coarse pattern and a fainter one as a distraction, both shifted, plus noise. A linear
    model learns most of it, not all. The bits are the same on any machine: NumPy promises never to change the raw
    stream of PCG64 (NEP 19), and all other operations are on whole numbers.
    """
    stream = np.random.PCG64(2017)

    def draw(below: int, *shape: int) -> np.ndarray:
        return (stream.random_raw(math.prod(shape)) % below).astype(np.uint8).reshape(shape)

    blocks = (draw(3, len(CLASSES), 7, 7) == 0).astype(np.uint8)
    patterns = blocks.repeat(4, axis=1).repeat(4, axis=2)  # [10, 28, 28] of 0 and 1
    moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    moved = np.stack([np.roll(patterns, move, axis=(1, 2)) for move in moves])  # [25, 10, 28, 28]

    def images(labels: np.ndarray) -> np.ndarray:
        count = len(labels)
        shown = moved[draw(len(moves), count), labels]
        distraction = moved[draw(len(moves), count), draw(len(CLASSES), count)]
        return (128 * shown + 63 * distraction + draw(64, *shown.shape))[:, None]  # at most 254

    train_labels, test_labels = draw(len(CLASSES), train), draw(len(CLASSES), test)
    return {
        "train_images": images(train_labels),
        "train_labels": train_labels.astype(np.int64),
        "test_images": images(test_labels),
        "test_labels": test_labels.astype(np.int64),
    }
