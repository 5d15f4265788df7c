"""Settings: where each comes from, and what a user is told who gets one wrong."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKOUT, command

from fashion_ddp import train
from fashion_ddp.config import Config
from fashion_ddp.config.cli import Command, parse
from fashion_ddp.config.layers import USUAL_LR, make_config, recipe_names
from fashion_ddp.config.names import architectures
from fashion_ddp.errors import UserError

pytestmark = pytest.mark.quick

Mistake = Callable[..., str]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder, in a process that is no rank."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "FASHION_DDP_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train, "train", lambda command: pytest.fail("the mistake was not found"))


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Mistake:
    """What `python -m fashion_ddp.train` prints for a command with a mistake: one line, or nothing on other ranks."""

    def told(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            train.main(list(argv))
        printed = "".join(capsys.readouterr())
        assert stop.value.code == 2
        assert (printed.startswith("error: ") and printed.count("\n") == 1) or os.environ.get("RANK") == "1", printed
        return printed

    return told


# --- Where settings come from -----------------------------------------------------------------------------------

BLOG = {"batch_size": 128, "shuffle": False, "optimizer": "sgd", "lr": 0.1}
LAB = {"batch_size": 32, "shuffle": True, "optimizer": "sgd", "lr": 0.1}
TUTORIALS = {  # recipe, model: what /tutorials/ used, beside three epochs, seed 42 and cross entropy as it is
    **{("blog", model): BLOG for model in ("linear", "relu")},
    ("blog", "cnn"): BLOG | {"optimizer": "adam", "lr": 0.02, "hidden_units": 25},
    **{("lab", model): LAB for model in ("linear", "relu")},
    ("lab", "cnn"): LAB | {"hidden_units": 10},
}


@pytest.mark.parametrize(("recipe", "model"), TUTORIALS)
def test_recipes_are_the_tutorials(recipe: str, model: str) -> None:
    plain = {
        "epochs": 3, "seed": 42, "schedule": "constant", "warmup_epochs": 0, "weight_decay": 0, "label_smoothing": 0,
        "clip_norm": 0, "shift": 0, "flip": 0, "erase": 0, "precision": "fp32", "validation": 0, "lr_scaling": "none",
        "conv_blocks": None, "batch_norm": False, "dataset": "fashion_mnist",
    }  # fmt: skip
    cfg = dataclasses.asdict(parse(["--recipe", recipe, "--model", model]).run)
    expected = plain | TUTORIALS[recipe, model]
    assert {name: cfg[name] for name in expected} == expected
    # Where the recipe leaves the width to the model, it is the tutorials' 10: tests/models/test_architectures.py.
    assert cfg["hidden_units"] == expected.get("hidden_units")


def test_blog_is_the_default_recipe() -> None:
    assert parse([]).run == parse(["--recipe", "blog", "--model", "cnn"]).run


def test_later_layers_win() -> None:
    recipe = "all: {epochs: 11, batch_size: 12, shift: 1, flip: 0.1}\n"
    write("mine.yaml", recipe + "models: {mlp: {batch_size: 22, shift: 2, flip: 0.2}}")
    write("file.yaml", "recipe: mine.yaml\nmodel: mlp\nshift: 3\nflip: 0.3\n")
    cfg = parse(["--config", "file.yaml", "--flip", "0.4"]).run
    assert (cfg.weight_decay, cfg.epochs, cfg.batch_size, cfg.shift, cfg.flip) == (0.0, 11, 22, 3, 0.4)


@pytest.mark.parametrize(("model", "epochs"), [("linear", 2), ("cnn", 3), ("my.net:Net", 3)])
def test_other_is_for_models_that_the_recipe_does_not_name(model: str, epochs: int) -> None:
    recipe = write("r.yaml", "all: {epochs: 1}\nmodels: {linear: {epochs: 2}}\nother: {epochs: 3}")
    assert parse(["--recipe", recipe, "--model", model]).run.epochs == epochs


def test_flags_and_file_choose_the_recipe_that_they_stand_on() -> None:
    file = write("file.yaml", "recipe: lab\n")
    assert parse(["--config", file]).run.batch_size == 32
    assert parse(["--config", file, "--recipe", "blog"]).run.batch_size == 128
    assert parse(["--config", file, "--model", "linear"]).run.hidden_units is None


def test_switches_win_over_recipe_and_file_too() -> None:
    file = write("file.yaml", "batch_norm: true\nshuffle: true\n")
    assert parse(["--config", file]).run.batch_norm
    assert not parse(["--config", file, "--no-shuffle"]).run.shuffle
    assert parse(["--shuffle", "--fresh"]) == Command(make_config({"shuffle": True}), fresh=True)


def test_the_runs_folder_of_the_environment_is_the_weakest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION_DDP_RUNS_DIR", "elsewhere")
    assert parse([]).run.runs_dir == Path("elsewhere")
    assert parse(["--config", write("f.yaml", "runs_dir: file")]).run.runs_dir == Path("file")
    assert parse(["--runs-dir", "flag"]).run.runs_dir == Path("flag")


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", "lab", "--model", "linear", "--lr", "1e-05", "--seed", str(2**63 - 1)],
        ["--model", "my.net:Net", "--data-dir", "a: b/#c", "--run-dir", "null", "--shuffle", "--no-shuffle"],
        ["--batch-norm", "--optimizer", "adamw", "--lr", "0.1234567890123456", "--runs-dir", "~/\N{SNOWMAN}"],
    ],
)
def test_config_yaml_loads_back_equal(argv: list[str]) -> None:
    cfg = parse(argv).run
    assert parse(["--config", write("config.yaml", cfg.to_yaml())]).run == cfg
    assert parse(["--config", "config.yaml", "--epochs", "99"]).run == dataclasses.replace(cfg, epochs=99)


def test_yaml_values() -> None:
    # 1e-3 is text in YAML 1.1.
    text = "lr: 1e-3\nclip_norm: 1\nwarmup_epochs: .5\nhidden_units: null\nshuffle: yes\nrun_dir: some/where\n"
    text += "# no line of its own\nseed: 3 # one"
    expected = {"lr": 0.001, "clip_norm": 1.0, "warmup_epochs": 0.5, "hidden_units": None, "shuffle": True, "seed": 3}
    cfg = dataclasses.asdict(parse(["--config", write("file.yaml", text)]).run)
    for name, value in (expected | {"run_dir": Path("some/where")}).items():
        assert cfg[name] == value and type(cfg[name]) is type(value), name


@pytest.mark.parametrize(
    ("flags", "lr"),
    [("--batch-size 512", 1), ("--lr-scaling linear --batch-size 512", 4), ("--lr-scaling sqrt --batch-size 512", 2)]
    + [("--recipe lab --lr-scaling linear --batch-size 16", 0.5)],
)
def test_learning_rate_follows_the_batch_where_asked(flags: str, lr: float) -> None:
    assert parse([*flags.split(), "--lr", "1"]).run.scaled_lr() == pytest.approx(lr, rel=1e-12)


# --- Mistakes ---------------------------------------------------------------------------------------------------

# By field, the ways to get it wrong and what the message must name.
BAD: dict[str, list[tuple[str, str]]] = {
    "model": [("cnnn", "did you mean 'cnn'?"), ("../net:Net", "package.module:Name"), ("", "choices: linear")],
    "recipe": [("labb", "did you mean 'lab'?"), ("blog.txt", ".yaml"), ("no/where.yaml", "No such file")],
    "seed": [("-1", "from 0"), ("1.5", "whole number"), (str(2**63), "2**63"), ("x", "whole number")],
    "epochs": [("0", "greater than 0"), ("-3", "greater than 0"), ("2.5", "whole number"), ("", "whole number")],
    "batch_size": [("0", "greater than 0"), ("many", "whole number")],
    "optimizer": [("admw", "did you mean 'adamw'?"), ("lion", "choices: sgd, momentum, adam, adamw, muon")],
    "momentum": [
        ("1", "less than 1"),
        ("0", "greater than 0"),
        ("0.9", "'adam' has none: choose --optimizer momentum"),
    ],
    "adam_lr": [("0", "greater than 0"), ("0.01", "only for muon: give --lr")],
    "ema": [("1", "less than 1"), ("-0.1", "at least 0"), ("often", "a number")],
    "lr": [("0", "greater than 0"), ("-1", "greater than 0"), ("nan", "finite"), ("inf", "finite"), ("x", "a number")],
    "lr_scaling": [("square", "choices: none, linear, sqrt")],
    "reference_batch": [("0", "greater than 0"), ("1.5", "whole number")],
    "schedule": [("cosin", "did you mean 'cosine'?")],
    "warmup_epochs": [("-1", "from 0 to epochs"), ("4", "from 0 to epochs"), ("soon", "a number")],
    "weight_decay": [("-0.1", "at least 0"), ("inf", "a finite number"), ("x", "a number")],
    "label_smoothing": [("1", "less than 1"), ("-0.1", "at least 0"), ("nan", "a finite number")],
    "class_weights": [("rare", "must be balanced, or numbers"), ("1,-2", "greater than 0"), ("1,,2", "as 1,2.5,1")],
    "clip_norm": [("-1", "at least 0"), ("nan", "a finite number")],
    "random_resized_crop": [("1.1", "from 0 to 1"), ("-0.1", "from 0 to 1"), ("some", "a number")],
    "shift": [("-1", "at least 0"), ("0.5", "whole number")],
    "flip": [("1.1", "from 0 to 1"), ("-0.1", "from 0 to 1"), ("often", "a number")],
    "erase": [("2", "from 0 to 1"), ("nan", "a finite number")],
    "cutout": [("-1", "at least 0"), ("0.5", "whole number")],
    "mixup": [("-0.1", "at least 0"), ("inf", "a finite number"), ("some", "a number")],
    "cutmix": [("-0.1", "at least 0"), ("inf", "a finite number"), ("some", "a number")],
    "test_at": [("never", "choices: auto, epoch, end")],
    "metrics": [("top5", "expected package.module:function, got 'top5'")],
    "tta": [("crop", "choices: none, flip, shift, flip+shift")],
    "depth": [("0", "greater than 0"), ("3", "does nothing for model 'cnn', only for deep_mlp, wide_resnet")],
    "precision": [("fp8", "choices: fp32, tf32, fp16, bf16, fp64"), ("float32", "fp32")],
    "validation": [("-1", "at least 0"), ("0.1", "whole number")],
    "keep": [("first", "choices: last, best"), ("best", "hold training images out, as by --validation 5000")],
    "patience": [("0", "greater than 0"), ("1.5", "whole number"), ("2", "patience 2 needs a validation set")],
    "hidden_units": [("0", "greater than 0"), ("wide", "whole number")],
    "dropout": [("1", "less than 1"), ("-0.1", "at least 0"), ("0.5", "does nothing for model 'cnn'")],
    "conv_blocks": [("0", "greater than 0"), ("x", "whole number")],
    "model_args": [("width=3", "or your own; 'cnn' has flags: --hidden-units, --conv-blocks, --batch-norm")],
    "dataset": [("fashion_mnst", "did you mean 'fashion_mnist'?"), ("letters", "as ./letters"), ("", "choices: fash")],
    "image_size": [("-1", "at least 0"), ("big", "whole number")],
    "data_on": [("disk", "choices: auto, device, host")],
    "device": [("gpu", "choices: auto, cpu, cuda")],
    "threads": [("-1", "at least 0"), ("1.5", "whole number")],
    "micro_batch": [("-1", "at least 0"), ("x", "whole number")],
    "reduction_shards": [("-1", "at least 0"), ("x", "whole number")],
    "checkpoint_every": [("-1", "at least 0"), ("nan", "a finite number"), ("often", "a number")],
    "timeout": [("0", "greater than 0"), ("-1", "greater than 0"), ("inf", "a finite number"), ("x", "a number")],
    "run_dir": [("", "must name a folder"), (".", "must name a folder"), ("a/..", "must name a folder")],
    "tracker": [("wandbb", "did you mean 'wandb'?"), ("tensorboard", "choices: auto, wandb, none")],
}


def test_the_table_of_mistakes_is_whole() -> None:
    any_text = {"data_dir", "cache_dir", "runs_dir", "init_from", "freeze"}
    any_text |= {f"wandb_{name}" for name in ("project", "entity", "group", "tags", "notes")}
    switches = {"nesterov", "decay_biases", "shuffle", "normalize", "alternating_flip", "skip_broken"}
    switches |= {"batch_norm", "keep_batch_norm", "wandb_weights", "trace", "cuda_graph", "compile"}
    assert set(BAD) == {field.name for field in dataclasses.fields(Config)} - any_text - switches


@pytest.mark.parametrize(("name", "value", "said"), [(n, v, said) for n, rows in BAD.items() for v, said in rows])
def test_a_bad_value_is_told_once_in_one_line(name: str, value: str, said: str, mistake: Mistake) -> None:
    told = mistake(f"--{name.replace('_', '-')}={value}")
    assert said in told and (name in told or value in told)


@pytest.mark.parametrize("value", ["[", "{", "a: b: c", "'", "%", "@x", "- 1", "1:30:", "!!int x", "\x07"])
@pytest.mark.parametrize("flag", ["--lr", "--epochs", "--hidden-units"])
def test_no_text_breaks_a_number(flag: str, value: str, mistake: Mistake) -> None:
    assert "number" in mistake(flag, value)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--epohcs", "3"], "unknown flag --epohcs; did you mean --epochs?"),
        (["--no-batch-norms"], "did you mean --no-batch-norm?"),
        (["linear"], "'linear' is no flag, and no flag takes it: a value follows its flag, as --model cnn"),
        (["--shuffle=maybe"], "--shuffle takes no value, got 'maybe': write --shuffle or --no-shuffle"),
        (["--config"], "config needs a value, as in --config=VALUE"),
        (["--seed=-1"], "from 0"),
    ],
)
def test_a_mistake_is_told_by_the_first_rank(
    argv: list[str], said: str, rank: str, mistake: Mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    told = mistake(*argv)
    assert said in told if rank == "0" else told == ""


# Each: the file, the line, and what must be said.
BAD_FILES = {
    "unknown key": ("seed: 1\nlearning_rate: 0.1\n", 2, "unknown key 'learning_rate'"),
    "dashes": ("batch-size: 3\n", 1, "did you mean 'batch_size'?"),
    "duplicate": ("lr: 0.1\nseed: 1\nlr: 0.2\n", 3, "'lr' is set twice"),
    "text for a number": ("\n\nepochs: three\n", 3, "epochs must be a whole number, got 'three'"),
    "number for text": ("model: 3\n", 1, "model must be text, got 3"),
    "quoted number": ("seed: '3'\n", 1, "seed must be a whole number, got '3'"),
    "true for a number": ("epochs: true\n", 1, "epochs must be a whole number, got True"),
    "number for a switch": ("shuffle: 1\n", 1, "shuffle must be true or false, got 1"),
    "a list": ("lr: [0.1, 0.2]\n", 1, "lr must be a number"),
    "a mapping": ("optimizer: {name: sgd}\n", 1, "optimizer: unknown"),
    "null": ("seed: null\n", 1, "seed must be a whole number, got None"),
    "not YAML": ("seed: 1\nlr: [0.1\n", 3, "not valid YAML"),
    "key that YAML reads as true": ("yes: 1\n", 1, "yes"),
    "merge key": ("<<: {lr: 0.1}\n", 1, "<<"),
    "two documents": ("lr: 0.1\n---\nlr: 0.2\n", 2, "not valid YAML"),
    "a recipe as --config": ("all: {lr: 0.1}\n", 1, "unknown key 'all'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_mistake_in_a_file_is_told_with_its_line(case: str, mistake: Mistake) -> None:
    text, line, said = BAD_FILES[case]
    told = mistake("--config", write("mine.yaml", text))
    assert told.startswith(f"error: mine.yaml:{line}: ") and said in told


BAD_RECIPES = {
    "unknown section": ("all: {lr: 0.1}\nmodells: {}\n", 2, "unknown section 'modells'"),
    "unknown key": ("all:\n  seed: 1\n  lrr: 0.1\n", 3, "unknown key 'lrr'"),
    "wrong type, not used": ("models:\n  linear:\n    epochs: x\n", 3, "epochs must be a whole number"),
    "the model": ("all:\n  seed: 1\n  model: linear\n", 3, "cannot choose the model"),
    "another recipe": ("models: {cnn: {recipe: lab}}\n", 1, "cannot choose the recipe"),
    "in other, not used": ("models: {cnn: {}}\nother:\n  shift: x\n", 3, "shift must be a whole number"),
    "duplicate": ("all:\n  lr: 0.1\n  lr: 0.2\n", 3, "'lr' is set twice"),
    "all is a number": ("all: 3\n", 1, "all must hold"),
    "models is a list": ("models: [cnn]\n", 1, "models must hold"),
    "a model's section is text": ("models:\n  cnn: small\n", 2, "models.cnn must hold"),
    "key that YAML reads as true": ("on: {}\n", 1, "on"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_mistake_in_a_recipe_is_told_with_its_line(case: str, mistake: Mistake) -> None:
    text, line, said = BAD_RECIPES[case]
    told = mistake("--recipe", write("mine.yaml", text))
    assert f"mine.yaml:{line}: " in told and said in told


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"just words", b"\xff\xfe\x00", b"lr: \x01"])
@pytest.mark.parametrize("flag", ["--config", "--recipe"])
def test_a_file_that_holds_no_settings(flag: str, content: bytes, mistake: Mistake) -> None:
    Path("mine.yaml").write_bytes(content)
    assert mistake(flag, "mine.yaml").startswith("error: mine.yaml")


@pytest.mark.parametrize("path", ["missing.yaml", "folder.yaml"])
@pytest.mark.parametrize("flag", ["--config", "--recipe"])
def test_a_file_that_cannot_be_read(flag: str, path: str, mistake: Mistake) -> None:
    Path("folder.yaml").mkdir()
    told = mistake(flag, path)
    assert told.startswith(f"error: {path}") and "cannot be read" in told


@pytest.mark.parametrize("optimizer", [name for name in USUAL_LR if name != "sgd"])
@pytest.mark.parametrize("where", ["flag", "file", "flag over a full config.yaml"])
def test_another_optimizer_needs_a_rate_of_its_own(where: str, optimizer: str, mistake: Mistake) -> None:
    full = make_config({"model": "linear", "lr": 0.3}).to_yaml()
    argv, chosen = {
        "flag": (["--model", "linear", "--optimizer", optimizer], 0.1),
        "file": (["--model", "linear", "--config", write("file.yaml", f"optimizer: {optimizer}\n")], 0.1),
        "flag over a full config.yaml": (["--config", write("full.yaml", full), "--optimizer", optimizer], 0.3),
    }[where]
    told = mistake(*argv)
    assert f"lr: {chosen} was chosen for optimizer 'sgd'" in told and f"usual: {USUAL_LR[optimizer]}" in told
    assert parse([*argv, "--lr", "0.5"]).run.lr == 0.5


def test_the_same_optimizer_needs_no_new_rate() -> None:
    assert parse(["--model", "cnn", "--optimizer", "adam"]).run.lr == 0.02


@pytest.mark.parametrize(("model", "flag"), [("linear", "--batch-norm"), ("mlp", "--conv-blocks=3")])
def test_settings_that_do_nothing_for_the_model(model: str, flag: str, mistake: Mistake) -> None:
    told = mistake("--model", model, flag)
    assert "does nothing for model" in told and model in told and "cnn" in told


EXCLUDING = {
    "--schedule one_cycle --warmup-epochs 1": ("warmup_epochs", "one_cycle"),
    "--precision fp64 --device cuda": ("fp64", "--device cpu"),
    "--precision fp16 --device cpu": ("fp16", "fp32"),
    "--precision tf32 --device cpu": ("tf32", "fp32"),
    "--model torchvision:resnet18 --normalize": ("normalize", "leave it out"),
    "--model cnn --keep-batch-norm": ("keep_batch_norm", "'cnn'", "leave it out"),
    "--model cnn --init-from pretrained": ("init_from pretrained", "'cnn'"),
    "--flip 0.5 --alternating-flip": ("flip", "leave one out"),
    "--erase 0.5 --cutout 8": ("cutout", "leave one out"),
    "--micro-batch 8 --reduction-shards 4": ("micro_batch", "reduction_shards"),
    "--nesterov": ("nesterov", "'adam'", "--optimizer momentum"),
    "--optimizer muon --lr 0.02 --nesterov": ("nesterov", "'muon'"),
    "--optimizer muon --lr 0.02 --precision fp16": ("fp16", "muon", "choose bf16"),
    "--optimizer adamw --lr 0.02 --momentum 0.8": ("momentum", "'adamw'"),
    "--class-weights balanced --mixup 0.2": ("class_weights", "leave mixup and cutmix out"),
    "--precision fp16 --reduction-shards 4": ("reduction_shards", "choose bf16"),
}


@pytest.mark.parametrize("flags", EXCLUDING)
def test_settings_that_exclude_each_other(flags: str, mistake: Mistake) -> None:
    told = mistake(*flags.split())
    assert all(name in told for name in EXCLUDING[flags])


def test_the_choices_are_those_that_exist() -> None:
    ours = ["linear", "relu", "mlp", "cnn", "deep_mlp", "small_resnet", "airbench", "wide_resnet"]
    assert list(architectures()) == ours
    assert recipe_names() == ["best", "blog", "fast", "five_minutes", "lab", "small"]
    with pytest.raises(UserError, match=f"choices: {', '.join(ours)}, one of a library as torchvision:resnet18"):
        Config(model="resnet")


# --- Help and start-up ------------------------------------------------------------------------------------------


def test_help_shows_the_defaults_of_the_chosen_model_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    write("mine.yaml", "epochs: 7\n")
    with pytest.raises(SystemExit) as stop:
        parse(["--model", "linear", "--help", "--config", "mine.yaml"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in ("--model TEXT Architecture", "(default: linear)", "Passes over the training set. (default: 7)"):
        assert said in text
    assert "{sgd,momentum,adam,adamw,muon} `momentum` is SGD with momentum; muon trains" in text
    assert "Choose --lr with it. (default: sgd)" in text


@pytest.mark.parametrize(("argv", "code"), [("--help", 0), ("--lr x", 2), ("--epohcs 3", 2)])
def test_help_and_mistakes_do_not_wait_for_heavy_libraries(argv: str, code: int) -> None:
    program = (
        "import atexit, sys; from fashion_ddp import train\n"
        "heavy = {'torch', 'wandb', 'accelerate', 'numpy', 'matplotlib'}\n"
        "atexit.register(lambda: print('imported:', *heavy & set(sys.modules)))\n"
        f"train.main({argv.split()})"
    )
    done = command("python", "-c", program, cwd=Path.cwd(), PYTHONPATH=str(CHECKOUT))
    assert done.returncode == code and done.stdout.endswith("imported:\n")
