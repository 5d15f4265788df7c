"""Define a run by one frozen, flat dataclass that validates itself. Nothing here imports torch."""

import dataclasses
import math
import os
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from fashion_ddp.config.names import (
    architectures,
    check_dataset,
    check_metrics,
    check_model,
    check_model_args,
    dataset_name,
    in_library,
    may_have_validation,
    weights_name,
)
from fashion_ddp.errors import UserError, nearest


@dataclass(frozen=True)
class Config:
    """One training run. The same names, with underscores, are the keys of a recipe and of config.yaml.

    The text below a field is its help on the command line; a comment above one begins a group of the help.
    """

    # What is trained
    model: str = "cnn"
    """Architecture: linear, relu, mlp, cnn, deep_mlp, small_resnet, airbench, wide_resnet; a library's as
    torchvision:NAME or timm:NAME; or your own as package.module:Name."""
    recipe: str = "blog"
    """Set of training settings: blog, lab, fast, five_minutes, small, best, or the path of a YAML file."""
    seed: int = 42
    """Seeds the initial weights, the order of the images and the augmentation."""

    # How it is trained
    epochs: int = 3
    """Passes over the training set."""
    batch_size: int = 128
    """Images per optimizer update, over all ranks together: it does not grow with the machine."""
    shuffle: bool = True
    """Draw a new order of the images for each epoch."""
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "muon"] = "sgd"
    """`momentum` is SGD with momentum; muon trains matrices and convolutions, and Adam (see --adam-lr) the rest. Choose
    --lr with it."""
    momentum: float | None = None
    """Share of the gradients before that an update keeps: by default 0.9 for momentum, 0.95 for muon."""
    nesterov: bool = False
    """momentum: look ahead along the momentum, as Nesterov's method does (muon always does)."""
    lr: float = 0.1
    """Learning rate at the reference batch size (see --lr-scaling); the peak where a schedule moves it."""
    adam_lr: float = 0.004
    """muon: the learning rate of biases, norms and the last layer; it moves and scales as lr does."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How lr follows batch_size / reference_batch."""
    reference_batch: int = 128
    """Batch size that lr was chosen for: by default the recipe's."""
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "constant"
    """How lr moves over the run: linear and cosine fall to 0; one_cycle rises for 30 % of the steps, then falls."""
    warmup_epochs: float = 0.0
    """Epochs over which lr first rises linearly from 0 (may be a fraction)."""
    weight_decay: float = 0.0
    """L2 penalty (sgd, momentum, adam) or decoupled decay (adamw, muon)."""
    decay_biases: bool = True
    """Apply weight_decay to biases and norms, too (all parameters of one dimension), not to weights alone."""
    ema: float = 0.0
    """Evaluate and keep an exponential moving average of the weights, which keeps this share of itself at each update,
    as 0.999 (less at first); 0 keeps none."""
    class_weights: str | None = None
    """How much an image counts in the loss, by its class: `balanced` (the rarer, the more), or a number for each class
    in their order, as 1,2.5,1. The mean is over the weights of the global batch."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over all classes, in [0, 1)."""
    clip_norm: float = 0.0
    """Largest L2 norm of the gradient; 0 does not clip."""
    normalize: bool = False
    """Let the model see pixels less the training set's mean, divided by its deviation, by channel."""
    random_resized_crop: float = 0.0
    """Augmentation: see a random rectangle of each image, scaled to its size, of at least this share of its area, as
    0.08, and sides from 3:4 to 4:3."""
    shift: int = 0
    """Augmentation: move each image by up to so many pixels, zeros coming in."""
    flip: float = 0.0
    """Augmentation: probability of mirroring an image left to right."""
    alternating_flip: bool = False
    """Augmentation: mirror each image in every second epoch; chance decides only in which of them."""
    erase: float = 0.0
    """Augmentation: probability of blanking a random rectangle (2 to 33 % of the image)."""
    cutout: int = 0
    """Augmentation: blank a square of so many pixels around a random one."""
    mixup: float = 0.0
    """Augmentation: blend each image, and its label, with another of its batch; shares are drawn from Beta(a, a)."""
    cutmix: float = 0.0
    """Augmentation: paste a rectangle of another image of the batch, and mix labels by area, drawn from Beta(a, a);
    with --mixup, each batch takes one of the two."""
    precision: Literal["fp32", "tf32", "fp16", "bf16", "fp64"] = "fp32"
    """fp32 is IEEE on every device; tf32 multiplies with 11 bits (cards from Ampere on); fp16 (with loss scaling) and
    bf16 are mixed precision; fp64 is for proofs on CPU."""
    validation: int = 0
    """Hold out so many training images, drawn by seed, and report val/* on them."""
    keep: Literal["last", "best"] = "last"
    """Which weights a run keeps: those after its last epoch, or after the one that was best on the validation set
    (--validation, or the val/ of a folder of pictures)."""
    patience: int | None = None
    """Stop when so many epochs in a row were no better on the validation set than the best before; the schedule stays
    that of --epochs. By default all epochs are trained."""
    test_at: Literal["auto", "epoch", "end"] = "auto"
    """When the test set is evaluated: after each epoch, or once, after the last: then nothing can be chosen by it.
    `auto` is epoch; for a folder of pictures with val/ and test/ it is end."""
    tta: Literal["none", "flip", "shift", "flip+shift"] = "none"
    """Test-time augmentation: after the last epoch also take the mean answer to an image and to it mirrored (flip),
    moved by a pixel either way (shift), or both. Recorded beside the plain figures."""
    metrics: str | None = None
    """Your own figures of each evaluation, as package.module:function: it returns a torchmetrics MetricCollection for a
    number of classes. Recorded beside accuracy, top5, macro_f1 and calibration_error."""

    # The model
    hidden_units: int | None = None
    """Width: of the hidden layers (linear, relu, mlp, deep_mlp), of every convolution (cnn), or of the first ones
    (small_resnet, airbench, wide_resnet). By default the model's own."""
    depth: int | None = None
    """deep_mlp: hidden layers. wide_resnet: layers, 6 n + 4. By default the model's own."""
    dropout: float = 0.0
    """deep_mlp, wide_resnet: probability of dropping a unit while training; which, depends on the image and not on
    the rank."""
    conv_blocks: int | None = None
    """cnn: how many blocks of two convolutions and a pooling; by default 2."""
    batch_norm: bool = False
    """cnn: batch normalisation after each convolution, over the global batch."""
    model_args: tuple[str, ...] = ()
    """Arguments of a library's model or your own, as dropout=0.2 depth=3."""
    keep_batch_norm: bool = False
    """For a library's model: leave its batch norm as it is, over each rank's rows alone; the result then depends on
    the number of ranks."""
    init_from: str | None = None
    """Weights to start from: pretrained (a library's model), a file (.safetensors, .pth), or another run's folder."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that are not trained, by the beginnings of their parameters' names, as conv1 layer1."""

    # The data
    dataset: str = "fashion_mnist"
    """fashion_mnist, mnist, kmnist, synthetic (built in, for checking a machine), or your own: a folder with a / in
    its name (./mine), an .npz file, or package.module:function."""
    image_size: int = 0
    """For a folder of pictures: bring them to squares of so many pixels; the shorter side is scaled, and the centre
    kept. 0: they are of one size, and stay as they are."""
    skip_broken: bool = False
    """For a folder of pictures: leave out those that cannot be decoded, instead of naming them and stopping."""
    cache_dir: Path | None = None
    """Where pictures are kept decoded; else the user's cache."""
    data_on: Literal["auto", "device", "host"] = "auto"
    """Where the decoded images lie while a run trains: all in the memory of each rank's device, or in their file or the
    host's memory, from which the next steps' are read ahead; auto reads ahead where they do not fit. Changes no
    result."""
    data_dir: Path | None = None
    """Where the four files of a published set are; else $FASHION_DDP_DATA_DIR, ./data, the user's cache."""

    # The machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the NVIDIA cards where there are any."""
    threads: int = 0
    """CPU threads per rank; 0 shares the usable cores among the ranks of a machine; a small step takes fewer."""
    micro_batch: int = 0
    """Rows per forward pass, to save memory or fit a cache; 0 takes a rank's whole share. Changes no result."""
    reduction_shards: int = 0
    """Cut each batch into so many parts whose gradients are added in a fixed order: the same bits on any number of
    ranks that divides it (CPU, equal threads). 0 leaves the sum to DDP."""
    cuda_graph: bool = True
    """On an NVIDIA card, launch each step as one CUDA graph where its model allows it. Changes no result."""
    compile: bool = False
    """On a CPU, compile the forward and backward pass (needs g++; takes seconds at each start), which makes the steps
    of small models up to twice as fast. Equal to an ordinary step within rounding."""

    # While it trains
    checkpoint_every: float = 30.0
    """Seconds between checkpoints; a run that is stopped, or trains all its epochs, leaves one in any case."""
    timeout: float = 600.0
    """Seconds that ranks wait for one that hangs before they give up."""
    trace: bool = False
    """Write a trace of a few steps of each rank into the run's logs/."""

    # Where results go
    runs_dir: Path = Path("runs")
    """Folder that run folders are made in ($FASHION_DDP_RUNS_DIR)."""
    run_dir: Path | None = None
    """This run's folder outright; by default a name made of what distinguishes the run, below runs_dir."""
    tracker: Literal["auto", "wandb", "none"] = "auto"
    """Mirror to Weights & Biases; `auto` does so where it is installed (offline without an account)."""
    wandb_project: str | None = None
    """W&B: project. Without this flag $WANDB_PROJECT, W&B's own settings files, then fashion_ddp."""
    wandb_entity: str | None = None
    """W&B: user or team that the project is of."""
    wandb_group: str | None = None
    """W&B: runs of one group are shown together; the launchers give all runs of a comparison one."""
    wandb_tags: str | None = None
    """W&B: tags, as first,second."""
    wandb_notes: str | None = None
    """W&B: notes to the run."""
    wandb_weights: bool = False
    """W&B: upload the weights, too, as an artifact, when the run is finished."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = convert(field.name, getattr(self, field.name), field_types()[field.name])
            if isinstance(value, tuple):
                value = tuple(sorted(set(value)))  # the same run, in whatever order they are given
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name} must be a finite number, got {value!r}")
            object.__setattr__(self, field.name, value)
        not_negative = "at least 0", lambda v: v >= 0
        positive = "greater than 0", lambda v: v > 0
        probability = "from 0 to 1", lambda v: 0 <= v <= 1
        rules: dict[str, tuple[str, typing.Callable[[Any], bool]]] = {
            "seed": ("from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63),
            "epochs": positive,
            "warmup_epochs": ("from 0 to epochs", lambda v: 0 <= v <= self.epochs),
        }
        below_one = "at least 0 and less than 1", lambda v: 0 <= v < 1
        rules |= dict.fromkeys(("label_smoothing", "dropout", "ema"), below_one)
        rules["momentum"] = "greater than 0 and less than 1", lambda v: 0 < v < 1
        rules |= dict.fromkeys(("batch_size", "reference_batch", "lr", "adam_lr", "timeout"), positive)
        rules |= dict.fromkeys(("hidden_units", "depth", "conv_blocks", "patience"), positive)
        rules |= dict.fromkeys(("weight_decay", "clip_norm", "shift", "validation", "checkpoint_every"), not_negative)
        rules |= dict.fromkeys(("cutout", "mixup", "cutmix", "image_size"), not_negative)
        rules |= dict.fromkeys(("threads", "micro_batch", "reduction_shards"), not_negative)
        rules |= dict.fromkeys(("random_resized_crop", "flip", "erase"), probability)
        for name, (must_be, holds) in rules.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"{name} must be {must_be}, got {value!r}")
        if self.class_weights not in (None, "balanced"):
            self.class_weight_list()
        self._check_model()
        self._check_together()

    def _check_model(self) -> None:
        check_model(self.model)
        check_dataset(self.dataset)
        check_metrics(self.metrics)
        takes = () if in_library(self.model) else architectures().get(self.model)
        for name, value in self.model_settings().items():
            if takes is not None and name not in takes:
                users = [m for m, arguments in architectures().items() if name in arguments]
                raise UserError(
                    f"{name}={value!r} does nothing for model {self.model!r}, only for {', '.join(users)}: leave it out"
                )
        check_model_args(self.model, self.model_args, self.model_settings())

    def _check_together(self) -> None:
        """Raise UserError for settings that exclude each other."""
        if self.run_dir is not None and self.run_dir.name in ("", ".."):  # it must have a name to be moved aside
            raise UserError(f"run_dir must name a folder, got {str(self.run_dir)!r}")
        if self.momentum is not None and self.optimizer not in ("momentum", "muon"):
            raise UserError(f"momentum: optimizer {self.optimizer!r} has none: choose --optimizer momentum")
        if self.nesterov and self.optimizer != "momentum":
            raise UserError(f"nesterov does nothing for optimizer {self.optimizer!r}: choose --optimizer momentum")
        if self.adam_lr != Config.adam_lr and self.optimizer != "muon":
            raise UserError(f"adam_lr does nothing for optimizer {self.optimizer!r}, only for muon: give --lr")
        if self.precision == "fp16" and self.optimizer == "muon":
            raise UserError("precision fp16 scales gradients, which muon cannot undo: choose bf16, tf32 or fp32")
        if self.normalize and in_library(self.model):
            raise UserError(f"normalize: {self.model} normalizes its input itself, as its weights expect: leave it out")
        if self.keep_batch_norm and not in_library(self.model):
            raise UserError(f"keep_batch_norm is for a model of torchvision or timm, not {self.model!r}: leave it out")
        if self.flip and self.alternating_flip:
            raise UserError("flip and alternating_flip both mirror images: leave one out")
        if self.class_weights and (self.mixup or self.cutmix):
            raise UserError("class_weights: images that are mixed have no one class: leave mixup and cutmix out")
        if self.erase and self.cutout:
            raise UserError("erase and cutout both blank a part of the image: leave one out")
        if self.schedule == "one_cycle" and self.warmup_epochs:
            raise UserError("warmup_epochs: one_cycle has its own warm-up; set it to 0 or choose another schedule")
        if self.precision == "fp64" and self.device == "cuda":
            raise UserError("precision fp64 is for proofs on CPU: add --device cpu, or choose fp32, tf32, fp16 or bf16")
        if self.precision in ("fp16", "tf32") and self.device == "cpu":
            raise UserError(f"precision {self.precision} needs an NVIDIA card: choose fp32 or bf16, or --device cuda")
        if self.init_from == "pretrained" and not in_library(self.model):
            raise UserError(
                f"init_from pretrained is for a model of torchvision or timm, not {self.model!r}: name a file or a "
                "run's folder"
            )
        if self.micro_batch and self.reduction_shards:
            raise UserError("micro_batch and reduction_shards both cut the batch: choose one")
        if self.chooses and not self.validation and not may_have_validation(self.dataset):
            raise UserError(f"{self.chooses} needs a validation set: hold training images out, as by --validation 5000")
        if self.precision == "fp16" and self.reduction_shards:
            raise UserError("reduction_shards adds gradients itself and cannot scale them: choose bf16, fp32 or fp64")

    @property
    def chooses(self) -> str:
        """Return the setting by which the validation set decides what is kept, or when training ends; "" for none."""
        return "keep best" if self.keep == "best" else f"patience {self.patience}" if self.patience else ""

    def class_weight_list(self) -> list[float]:
        """Return the numbers of class_weights. Raises UserError where it holds anything else."""
        text = self.class_weights or ""
        try:
            numbers = [float(one) for one in text.split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < one < math.inf for one in numbers):
            raise UserError(f"class_weights must be balanced, or numbers greater than 0, as 1,2.5,1, got {text!r}")
        return numbers

    def model_settings(self) -> dict[str, Any]:
        """Return the settings that are given to the architecture, except model_args."""
        names = "hidden_units", "depth", "dropout", "conv_blocks", "batch_norm"
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value}

    def scaled_lr(self) -> float:
        """Return lr at this batch size: lr * (batch_size / reference_batch) ** (1 for linear, 0.5 for sqrt)."""
        growth = self.batch_size / self.reference_batch
        return self.lr * {"none": 1.0, "linear": growth, "sqrt": math.sqrt(growth)}[self.lr_scaling]

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change what is computed, except model, recipe and seed."""
        settings = {name: value for name, value in vars(self).items() if name not in _no_result_settings()}
        settings["dataset"] = dataset_name(self.dataset)
        # Only those that are given, one by one: folders of runs made before these settings existed keep their names.
        del settings["model_args"], settings["init_from"], settings["freeze"]
        if self.init_from is not None:
            settings["init_from"] = weights_name(self.init_from)
        if self.freeze:
            settings["freeze"] = "+".join(self.freeze)
        for name, _, value in (text.partition("=") for text in self.model_args):
            # depth and dropout became settings of ours later: runs made before keep their names.
            given = f"model.{name}" if hasattr(self, name) and name not in ("depth", "dropout") else name
            settings.pop(given, None)
            settings[given] = value
        return settings

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML; --config on this text gives an equal Config."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}
        return yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)


@cache
def _no_result_settings() -> set[str]:
    """Return the names of settings that leave the result as it is, and of those that name the run."""
    others = {"model", "recipe", "seed", "device", "threads", "micro_batch", "cuda_graph", "compile", "tracker"}
    # The hash of the data tells which pictures are in it.
    others |= {"data_dir", "data_on", "skip_broken", "cache_dir"}
    others |= {"runs_dir", "run_dir", "checkpoint_every", "timeout", "trace"}
    return others | {field.name for field in dataclasses.fields(Config) if field.name.startswith("wandb_")}


@cache
def field_types() -> dict[str, Any]:
    """Return the type of each field of Config."""
    return typing.get_type_hints(Config)


def default_runs_dir() -> Path:
    """Return the folder for run folders where no flag and no file names one: $FASHION_DDP_RUNS_DIR, or runs."""
    return Path(os.environ.get("FASHION_DDP_RUNS_DIR") or Config.runs_dir)


def convert(name: str, value: Any, kind: Any) -> Any:
    """Convert a value to the type `kind` of the setting `name`.

    Raises UserError naming the setting, the value and the type.
    """
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise UserError(f"{name}: unknown {value!r}; {nearest(str(value), options)}")
        return value
    if typing.get_origin(kind) is tuple:
        if isinstance(value, dict):
            value = [f"{key}={one}" for key, one in value.items()]
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or any(isinstance(word, list | dict | None) for word in words):
            raise UserError(f"{name} must be a list of words, got {value!r}")
        return tuple(str(word) if options[0] is str else convert(name, word, options[0]) for word in words)
    if type(None) in options:
        if value is None:
            return None
        kind = options[0]
    try:
        # YAML 1.1 reads 1e-3 as text, and a whole number where a fraction is meant is fine.
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
        if kind is Path and isinstance(value, str | Path):
            return Path(value)
    except ValueError:
        pass  # text that is no number
    if type(value) is kind:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}[kind]
    raise UserError(f"{name} must be {wanted}, got {value!r}")
