"""A model of one's own: python -m fashion_ddp.train --model examples.my_model:net --model-args depth=3 dropout=0.2"""

from torch import nn


def net(image_shape: tuple[int, int, int], classes: int, depth: int = 2, width: int = 16, dropout: float = 0.0):
    channels, height, width_in = image_shape
    layers = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * height * width_in, classes))
