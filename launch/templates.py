"""Write the files to start from, each with its explanation: a site file, and one for `accelerate launch`.

    python -m launch.templates [--out FOLDER]

A file that is there is never replaced.
"""

from dataclasses import dataclass
from pathlib import Path

from fashion_ddp.config import flags
from fashion_ddp.console import entry_point, say
from fashion_ddp.errors import UserError

# They lie beside this module. What each is for:
TEMPLATES = {
    "site.yaml": "python -m launch.submit --site",
    "accelerate_config.yaml": "accelerate launch --config_file",
}


@dataclass(frozen=True)
class Arguments:
    """Write the files to start from: a site file of a SLURM cluster, and Accelerate's for four cards."""

    out: Path = Path()
    """Folder to write into; a file that is there stays as it is."""


@entry_point
def main(argv: list[str] | None = None) -> None:
    folder = flags.parse(Arguments, "launch.templates", argv).out
    for name, use in TEMPLATES.items():
        path, text = folder / name, Path(__file__).with_name(name).read_text()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "x") as file:
                file.write(text)
            say(f"{path}: for `{use} {path} ...`")
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"--out {folder}: is no folder: choose another one") from None
            say(f"{path} is there already, and stays as it is")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --out") from None


if __name__ == "__main__":
    main()
