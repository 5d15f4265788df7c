"""Find the data, else download it; verify it.

    python -m fashion_ddp.data [--dataset NAME, FOLDER, FILE.npz or package.module:function] [--data-dir DIR]
"""

from pathlib import Path

import tyro

from fashion_ddp.console import broken_pipe_ok, fail
from fashion_ddp.data import PUBLISHED, fetch, load, locate
from fashion_ddp.errors import UserError
from fashion_ddp.redact import restrict_umask


def main(dataset: str = "fashion_mnist", data_dir: Path | None = None) -> None:
    """Find the data, else download it into the user's cache folder; verify it.

    Args:
        dataset: fashion_mnist, mnist or kmnist; or what --dataset of a training takes, to have it checked.
        data_dir: The only folder that a published set is looked for in; else $FASHION_DDP_DATA_DIR, or ./data and the
            user's cache.
    """
    restrict_umask()
    if dataset in PUBLISHED and data_dir is None and locate(dataset, None) is None:
        fetch(dataset)
    data = load(dataset, data_dir)
    shape = "x".join(map(str, data.image_shape))
    print(f"{data.name}: {data.source}")
    print(f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images of {shape}")
    print(f"{len(data.classes)} classes: {', '.join(data.classes)}")
    if dataset in PUBLISHED:
        print("md5 verified")


if __name__ == "__main__":
    try:
        with broken_pipe_ok():
            tyro.cli(main, prog="python -m fashion_ddp.data")
    except UserError as error:
        fail(error, 2)
