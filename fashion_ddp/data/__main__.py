"""Find a dataset or download it, verify it, and decode its pictures; list and remove what was decoded.

    python -m fashion_ddp.data [--dataset NAME, FOLDER, FILE.npz or package.module:function] [--image-size 224]
    python -m fashion_ddp.data --caches
    python -m fashion_ddp.data --remove-caches all

Exit code 2: the dataset is missing or cannot be used, and the message says why.
"""

from dataclasses import dataclass
from pathlib import Path

from fashion_ddp.config import flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.data import PUBLISHED, cache, fetch, load, locate
from fashion_ddp.data.cache import PictureSettings
from fashion_ddp.errors import pluralize


@dataclass(frozen=True)
class Arguments:
    """Find a dataset or download it into the user's cache folder, and verify it. Pictures are decoded, for later."""

    dataset: str = "fashion_mnist"
    """fashion_mnist, mnist or kmnist; or anything else that --dataset of a training takes, to check it."""
    data_dir: Path | None = None
    """The only folder to search for a published dataset; by default $FASHION_DDP_DATA_DIR, or else ./data and the
    user's cache folder."""
    image_size: int = 0
    """For a folder of pictures: as in a training."""
    skip_broken: bool = False
    """For a folder of pictures: as in a training."""
    cache_dir: Path | None = None
    """Where pictures are kept decoded; else the user's cache."""

    # What was decoded
    caches: bool = False
    """List it, with sizes and dates."""
    remove_caches: tuple[str, ...] = ()
    """Remove these, by the names that --caches lists, or all."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = flags.parse(Arguments, "fashion_ddp.data", argv)
    settings = PictureSettings(arguments.image_size, arguments.skip_broken, arguments.cache_dir)
    if arguments.remove_caches:
        removed = cache.remove(settings.root, arguments.remove_caches)
        say(f"removed {pluralize(len(removed), 'cache')} of {sum(one.size for one in removed) / 1e9:,.2f} GB")
    if arguments.caches:
        for one in cache.found(settings.root):
            say(one.line)
    if arguments.caches or arguments.remove_caches:
        return
    if arguments.dataset in PUBLISHED and arguments.data_dir is None and locate(arguments.dataset, None) is None:
        fetch(arguments.dataset)
    data = load(arguments.dataset, arguments.data_dir, settings)
    shape = "x".join(map(str, data.image_shape))
    say(f"{data.name}: {data.source}")
    counts = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images of {shape}"
    say(counts if data.val_labels is None else f"{counts}, and {len(data.val_labels):,} to choose settings by")
    if data.left_out:
        say(f"left out {pluralize(len(data.left_out), 'picture')} that cannot be decoded")
    say(f"{len(data.classes)} classes: {', '.join(data.classes)}")
    if arguments.dataset in PUBLISHED:
        say("md5 verified")


if __name__ == "__main__":
    main()
