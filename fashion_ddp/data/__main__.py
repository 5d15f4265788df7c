"""Find a dataset or download it, and verify it.

    python -m fashion_ddp.data [--dataset NAME, FOLDER, FILE.npz or package.module:function] [--data-dir DIR]

Exit code 2: the dataset is missing or cannot be used, and the message says why.
"""

from pathlib import Path

import tyro

from fashion_ddp.console import broken_pipe_ok, fail
from fashion_ddp.data import PUBLISHED, fetch, load, locate
from fashion_ddp.errors import UserError
from fashion_ddp.redact import restrict_umask


def main(dataset: str = "fashion_mnist", data_dir: Path | None = None) -> None:
    """Find a dataset or download it into the user's cache folder, and verify it.

    Args:
        dataset: fashion_mnist, mnist or kmnist; or anything else that --dataset of a training takes, to check it.
        data_dir: The only folder to search for a published dataset; by default $FASHION_DDP_DATA_DIR, or else ./data
            and the user's cache folder.
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
