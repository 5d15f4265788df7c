"""What we are measured against: the loop that a tutorial writes, and the same with Accelerate's ordinary way.

    python benchmarks/tutorial.py plain|accelerate cpu|cuda linear|relu|cnn blog|lab HIDDEN_UNITS EPOCHS FOLDER

Models, recipes and loop are those of the two tutorials: torchvision's FashionMNIST with ToTensor behind a DataLoader,
one process, the CPU or one card. Prints the seconds of the epochs with a test pass each, and the exact test accuracy,
as JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor


def linear(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.Linear(hidden, 10))


def relu(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10), nn.ReLU())


def cnn(hidden: int) -> nn.Module:
    def block(channels: int) -> list[nn.Module]:
        first, second = nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 3, padding=1)
        return [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1), *block(hidden), nn.Flatten(), nn.Linear(hidden * 49, 10))


def train(way: str, device: str, name: str, recipe: str, hidden: int, epochs: int, root: Path) -> dict[str, float]:
    torch.backends.cudnn.allow_tf32 = False  # fp32 as ours is: else a card would multiply with 11 bits here
    torch.manual_seed(42)
    batch = {"blog": 128, "lab": 32}[recipe]
    loaders: list[Any] = [
        DataLoader(FashionMNIST(root, train=train, transform=ToTensor()), batch, shuffle=train and recipe == "lab")
        for train in (True, False)
    ]
    model: Any = {"linear": linear, "relu": relu, "cnn": cnn}[name](hidden).to(device)
    adam = name == "cnn" and recipe == "blog"
    optimizer: Any = (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), lr=0.02 if adam else 0.1)
    backward: Any = torch.Tensor.backward
    if way == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device == "cpu")
        model, optimizer, *loaders = accelerator.prepare(model, optimizer, *loaders)
        backward = accelerator.backward
    loss_function = nn.CrossEntropyLoss()
    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for images, labels in loaders[0]:
            loss = loss_function(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
        model.eval()
        right = 0
        with torch.inference_mode():
            for images, labels in loaders[1]:
                right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
    return {"train_s": time.perf_counter() - start, "accuracy": right / 10_000}


if __name__ == "__main__":
    way, device, name, recipe, hidden, epochs, root = sys.argv[1:]
    print(json.dumps(train(way, device, name, recipe, int(hidden), int(epochs), Path(root))))
