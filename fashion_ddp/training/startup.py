"""What a run finds, records and says before it trains."""

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fashion_ddp import data, user_code
from fashion_ddp.config import Config, layers
from fashion_ddp.config.cli import Command
from fashion_ddp.config.names import is_code
from fashion_ddp.console import say
from fashion_ddp.data import cache, custom
from fashion_ddp.distributed import machine
from fashion_ddp.distributed.world import World
from fashion_ddp.errors import UserError, pluralize
from fashion_ddp.models import describe
from fashion_ddp.redact import redact
from fashion_ddp.runs import claim as claims
from fashion_ddp.runs import provenance
from fashion_ddp.runs.folder import RunFolder
from fashion_ddp.runs.reading import load_run, read_summary
from fashion_ddp.training.batches import Batches
from fashion_ddp.training.compiled import CompiledPass
from fashion_ddp.training.state import State
from fashion_ddp.training.step import Step


def load_data(cfg: Config, world: World) -> data.Dataset:
    """Load the run's data on every rank. Where it is missing, one rank of each machine downloads it."""
    if cfg.dataset in data.PUBLISHED:
        # A rank that sees the files needs no other: only where all agree that something is missing do they wait.
        missing = any(world.all_gather_object(data.locate(cfg.dataset, cfg.data_dir) is None))
        if missing and cfg.data_dir is None:
            world.on_first_rank_of_each_machine(lambda: data.locate(cfg.dataset, None) or data.fetch(cfg.dataset))
    made = None
    if custom.has_pictures(cfg.dataset):
        settings = data.picture_settings(cfg)
        made = world.once_per_machine(lambda between: cache.prepare(Path(cfg.dataset), settings, between))
    dataset = world.raise_together(lambda: data.load_for(cfg, made))
    if len({str(md5) for md5 in world.all_gather_object(dataset.md5)}) > 1:
        raise UserError(
            f"dataset {cfg.dataset}: the ranks found different data: copy the same files to every machine, and let a "
            "function return the same at every call"
        )
    return dataset


def claim(command: Command, world: World, made_by: dict[str, Any]) -> RunFolder | None:
    """Claim the run's folder, on rank 0: its run may be finished. Returns None for a check."""
    cfg = command.run
    if command.check_only:
        state = world.on_rank_zero(lambda: claims.check(cfg, made_by, command.fresh, command.reuse))
        would = {
            "nothing": "train",
            "continue": "continue the run",
            "aside": "keep what is there under another name, and train",
            "finished": "find its run finished",
        }[state]
        _say(world, f"checked: this command would {would} in {claims.folder_of(cfg)}")
        return None
    folder = world.on_rank_zero(lambda: claims.claim(cfg, made_by, command.fresh, command.reuse))
    if folder.finished:
        early = world.on_rank_zero(lambda: read_summary(folder.path).get("stopped_early"))
        finished = f"finished, stopped early {early}" if early else "finished"
        _say(world, f"{folder.path} is {finished}: nothing to do; --fresh keeps it under another name and trains anew")
    return folder


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        say(text)


def settle_threads(cfg: Config, world: World, model: nn.Module, image_shape: describe.Shape, rows: int) -> None:
    """Take fewer CPU threads where a step of `rows` images is too small for all."""
    if world.device.type == "cpu" and world.threads > 1 and not cfg.threads:
        flops = describe.flops_per_image(model, image_shape)
        torch.set_num_threads(machine.threads_for_step(cfg, world.threads, flops, rows))


def environment(cfg: Config, world: World, dataset: data.Dataset, batches: Batches) -> dict[str, Any]:
    """Return this start's entry of environment.json: machines, devices, versions and code. A collective."""
    here = {"host": machine.host_name(), "device": world.device_name, "cpu": machine.cpu_name()}
    ranks = world.all_gather_object(here | {"threads": world.threads})
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "made_by": provenance.made_by(cfg, dataset.md5),
        "git_commit": provenance.git_commit(),
        "cuda": torch.version.cuda,
        "world_size": world.size,
        "backend": world.backend,
        "ranks": ranks,
        # No setting: the run is the same whatever is trained beside it. Its launcher alone knows.
        "side_by_side": int(os.environ.get("FASHION_DDP_SIDE_BY_SIDE", "1")),
        "data_source": dataset.source,
        "data_on": batches.images.lie_on,
        "left_out": list(dataset.left_out),
        "precision": cfg.precision,
    }


def announce(
    cfg: Config,
    world: World,
    folder: RunFolder,
    env: dict[str, Any],
    dataset: data.Dataset,
    batches: Batches,
    state: State,
    prepared: list[str],
) -> dict[str, Any]:
    """Print and record how the run starts. Returns what its summary says from the start.

    `prepared`: what was done to the new model, in words.
    """
    model, mixed, at_once = state.model, False, env["side_by_side"]
    described = describe.layers_table(model, dataset.image_shape)
    dependent = describe.rank_dependent_layers(model)
    if not dependent and ":" in cfg.model and describe.draws_random_numbers(model, dataset.image_shape):
        dependent = ["dropout that is no layer"]
    if world.rank == 0:
        starts = load_run(folder.path).environment
        went_before = starts if state.done else []  # of others nothing is left
        mixed = any(_conditions(start) != _conditions(env) for start in went_before)
        at_once = max(_at_once(start) for start in [*went_before, env])
        notes = [*_continued(state, mixed), *_notes(cfg, world, dataset, dependent)]
        notes += [f"note: up to {at_once} runs are trained at once on this machine: times are shared"] * (at_once > 1)
        for line in (_facts(cfg, world, env, dataset, batches), described, *prepared, *notes):
            say(line)
        folder.write_json("environment.json", [*starts, env])
        folder.write("model.txt", redact(described) + "\n")
        if is_code(cfg.model) and (source := user_code.source_path(cfg.model)):
            folder.write("model.py", source.read_bytes())
    return {
        "model": cfg.model,
        "recipe": cfg.recipe,
        "changed": layers.recipe_changes(cfg),  # here, because the recipe may be edited later
        "seed": cfg.seed,
        "world_size": world.size,
        "rank_invariant": not dependent,
        "dataset": dataset.name,
        "classes": dataset.classes,
        "image_shape": dataset.image_shape,
        "training_images": batches.count,
        "training_images_by_class": np.bincount(batches.part.labels, minlength=len(dataset.classes)).tolist(),
        "test_images": len(dataset.test_labels),
        "device": world.device_name,
        "threads": world.threads,
        "precision": cfg.precision,
        "batch_size": cfg.batch_size,
        "lr": cfg.scaled_lr(),
        "epochs": cfg.epochs,
        "parameters": describe.count_parameters(model),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "starts": len(starts) + 1 if world.rank == 0 else 1,
        "timings_mixed": mixed,
        "side_by_side": at_once,
    }


def announce_step(world: World, step: Step, no_graph: str | None, not_compiled: str | None) -> dict[str, Any]:
    """Print how a card is given its steps, or that a CPU's are compiled, and return what the summary says of it.

    `no_graph`: why they are not one CUDA graph. `not_compiled`: why a pass is not compiled that was to be.
    """
    compiled = step.take_pass if isinstance(step.take_pass, CompiledPass) else None
    how = None
    if world.device.type == "cuda":
        how = f"launched kernel by kernel: {no_graph}" if no_graph else "launched as one CUDA graph"
    elif compiled:
        how = f"compiled, in {compiled.seconds:.1f} s"
    elif not_compiled:
        how = f"not compiled, and slower: {not_compiled}"
    if how:
        _say(world, f"{'step':<10}{how}")
    return {"cuda_graph": no_graph is None, "compiled": compiled is not None}


def _conditions(env: dict[str, Any]) -> tuple[Any, ...]:
    """Return what times depend on: each rank's device, processor and threads, and how many runs shared the machine."""
    return sorted((rank["device"], rank.get("cpu"), rank["threads"]) for rank in env["ranks"]), _at_once(env)


def _at_once(env: dict[str, Any]) -> int:
    """Return how many runs were trained at once, at most, including this one."""
    return env.get("side_by_side", 1)  # older folders do not say, and their runs were alone


def _continued(state: State, mixed: bool) -> list[str]:
    if not state.done:
        return []
    position = f"continued after step {state.done:,}, in epoch {state.epoch}"
    marked = "; on other hardware or beside other runs than before, so its timings are mixed"
    return [position + (marked if mixed else "")]


def _facts(cfg: Config, world: World, env: dict[str, Any], dataset: data.Dataset, batches: Batches) -> str:
    machines = dict.fromkeys(rank["host"] for rank in env["ranks"])
    devices = dict.fromkeys(rank["device"] for rank in env["ranks"])
    last = batches.count - (batches.steps - 1) * batches.batch
    shape = "x".join(map(str, dataset.image_shape))
    scaled = f" ({cfg.lr:g} scaled, {cfg.lr_scaling})" if cfg.lr_scaling != "none" else ""
    lines = {
        "run": f"{cfg.model}, recipe {cfg.recipe}, seed {cfg.seed}: {claims.folder_of(cfg)}",
        "ranks": f"{world.size} on {', '.join(machines)}; {pluralize(world.threads, 'CPU thread')} each",
        "device": f"{', '.join(devices)}; precision {cfg.precision}",
        "data": f"{dataset.name}, {batches.count:,} training and {len(dataset.test_labels):,} test images of {shape}, "
        f"{len(dataset.classes)} classes; {'read ahead ' * (batches.images.lie_on == 'host')}from {dataset.source}",
        "batch": f"{batches.batch} over all ranks, of which each gets {' '.join(map(str, batches.shares))}; "
        f"{batches.steps} steps an epoch, the last of {last}",
        "optimizer": f"{cfg.optimizer}, lr {cfg.scaled_lr():g}{scaled}, {cfg.schedule}; "
        f"{pluralize(cfg.epochs, 'epoch')}",
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _notes(cfg: Config, world: World, dataset: data.Dataset, dependent: list[str]) -> list[str]:
    notes = []
    if cfg.precision == "bf16" and world.device.type == "cpu" and not machine.cpu_multiplies_bf16():
        notes.append("note: this processor has no instructions for bf16 and emulates them: fp32 is faster on it")
    if not cfg.shuffle and bool((dataset.train_labels[1:] >= dataset.train_labels[:-1]).all()):
        notes.append("note: the training images come class after class, and are not shuffled: add --shuffle")
    if dataset.left_out:
        notes.append(f"note: left out {pluralize(len(dataset.left_out), 'picture')} that cannot be decoded")
    if dataset.synthetic:
        notes.append("SYNTHETIC data: good for checking a machine; its figures mean nothing else")
    if dependent:
        kinds = ", ".join(dependent)
        notes.append(f"note: {kinds} work on each rank's rows alone: the result depends on the number of ranks")
    return notes
