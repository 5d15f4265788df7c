"""Find a dataset or download it, and verify it.

    python -m fashion_ddp.data [--dataset NAME, FOLDER, FILE.npz or package.module:function] [--data-dir DIR]

Exit code 2: the dataset is missing or cannot be used, and the message says why.
"""

from dataclasses import dataclass
from pathlib import Path

from fashion_ddp.config import flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.data import PUBLISHED, fetch, load, locate


@dataclass(frozen=True)
class Arguments:
    """Find a dataset or download it into the user's cache folder, and verify it."""

    dataset: str = "fashion_mnist"
    """fashion_mnist, mnist or kmnist; or anything else that --dataset of a training takes, to check it."""
    data_dir: Path | None = None
    """The only folder to search for a published dataset; by default $FASHION_DDP_DATA_DIR, or else ./data and the
    user's cache folder."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = flags.parse(Arguments, "fashion_ddp.data", argv)
    if arguments.dataset in PUBLISHED and arguments.data_dir is None and locate(arguments.dataset, None) is None:
        fetch(arguments.dataset)
    data = load(arguments.dataset, arguments.data_dir)
    shape = "x".join(map(str, data.image_shape))
    say(f"{data.name}: {data.source}")
    say(f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images of {shape}")
    say(f"{len(data.classes)} classes: {', '.join(data.classes)}")
    if arguments.dataset in PUBLISHED:
        say("md5 verified")


if __name__ == "__main__":
    main()
