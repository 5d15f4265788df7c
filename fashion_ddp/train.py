"""Train one model, on every rank that the launcher started.

    python -m fashion_ddp.train --model linear                        one process: a card, or the CPU
    accelerate launch -m fashion_ddp.train --model cnn                all cards of this machine
    torchrun --standalone --nproc-per-node 2 -m fashion_ddp.train     two ranks; CPU too

In a program or a notebook: from fashion_ddp import fit; run = fit(model="linear").

Exit code 0: finished. 1: failed. 2: nothing was started, because something must be corrected first. 75: stopped, and
the same command continues.
"""

import math
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from fashion_ddp.distributed import signals

if __name__ == "__main__":
    signals.listen()  # before all that takes a while: a signal that comes meanwhile is remembered

from fashion_ddp.config.cli import Command, from_keywords, parse
from fashion_ddp.console import entry_point
from fashion_ddp.distributed import machine, process, tuning
from fashion_ddp.errors import Stopped

if TYPE_CHECKING:
    from fashion_ddp.runs.reading import Run


@entry_point
def main(argv: list[str] | None = None) -> int:
    run(argv)
    return 0


def run(argv: list[str] | None = None) -> None:
    """Train as a command line (None: that of this process) says. Raises UserError, TrainingFailed or Stopped."""
    started = time.time()
    command = parse(argv)
    machine.refuse_launcher_settings(command.run)
    train(command, started)


def fit(**settings: Any) -> "Run":
    """Train as these settings say, and return the finished run, on every rank, as `load_run` does.

    The settings are the flags of `python -m fashion_ddp.train`, with underscores: fit(model="cnn", epochs=10, lr=0.05).
    A run that is finished already is returned as it is. Afterwards the process is as before, and may call again.

    Raises UserError for a mistake, TrainingFailed, and Stopped after Ctrl-C or another signal, when all is saved: the
    same call continues. A second Ctrl-C raises KeyboardInterrupt at once.
    """
    from fashion_ddp.runs import provenance

    started = time.time()
    command = from_keywords(settings)
    machine.refuse_launcher_settings(command.run)
    provenance.refuse_changed_code()
    with process.as_found():
        run = train(command, started, wait_for_run=True)
    assert run is not None
    return run


def train(command: Command, started: float, wait_for_run: bool = False) -> "Run | None":
    """Build, loop, close. Mistakes are found, by all ranks, before anything is trained.

    `started`: time.time() when the command began. `wait_for_run`: return the finished run on every rank; otherwise they
    return None, and the others do not wait until rank 0 has written all.
    """
    # Not at the top: these import torch, and a mistake in the command is answered before that.
    with tuning.gc_paused():
        from fashion_ddp.distributed.world import open_world
        from fashion_ddp.models import architectures, transfer
        from fashion_ddp.models.normalize import set_statistics
        from fashion_ddp.runs.reading import load_run
        from fashion_ddp.training import artifacts, compiled, cuda_graph, images, metrics, optim, startup
        from fashion_ddp.training.batches import Batches, split
        from fashion_ddp.training.checkpoint import Checkpoints
        from fashion_ddp.training.evaluate import Evaluation, evaluate
        from fashion_ddp.training.recorder import open_recorder
        from fashion_ddp.training.state import State
        from fashion_ddp.training.step import Step
        from fashion_ddp.training.sync import StepRecord, SyncPoint
        from fashion_ddp.training.trace import Trace
        from fashion_ddp.training.watchdog import Watchdog

    cfg = command.run
    with open_world(cfg) as world, ExitStack() as scope:
        data = startup.load_data(cfg, world)
        classes = len(data.classes)
        model = architectures.build(cfg, data.image_shape, classes, world.rank, world.device.type)
        prepared = world.raise_together(lambda: transfer.prepare(cfg, model, data.image_shape))
        parts = split(cfg, data)
        place = images.choose_place(cfg, world, parts.values())  # all on the device, or read ahead
        train_part = parts.pop("train")
        if cfg.normalize:
            set_statistics(model, train_part.sums(), math.prod(data.image_shape[1:]))
        batches = Batches(cfg, world, train_part, place)
        startup.settle_threads(cfg, world, model, data.image_shape, batches.rows)
        sets = {name: Evaluation(cfg, world, part, classes, place) for name, part in parts.items()}

        ddp = world.wrap(model, ddp=not cfg.reduction_shards)  # Accelerate: device, precision, DistributedDataParallel
        optimizer = optim.build(cfg, model, world.device)
        rates = optim.schedule(cfg, batches.steps)
        figures = world.raise_together(lambda: metrics.build(cfg.metrics, classes))
        record = StepRecord(batches)
        step = Step(cfg, world, ddp, optimizer, batches, record)
        step.warm_up()
        images.settle(world, place, step.trained, [batches, *sets.values()], scope)

        environment = startup.environment(cfg, world, data, batches)
        folder = startup.claim(command, world, environment["made_by"])
        if folder is None:
            return None
        if folder.finished:
            return world.on_rank_zero(lambda: load_run(folder.path)) if wait_for_run else None
        state = State(cfg, world, model, optimizer, batches.steps, started, step.average)
        checkpoints = Checkpoints(cfg, world, folder, state)  # the newest is loaded into the state
        known = startup.announce(cfg, world, folder, environment, data, batches, state, prepared)
        sync = SyncPoint(cfg, world, record, state, rates)
        scope.enter_context(tuning.gc_frozen())
        scope.enter_context(Watchdog(world, folder, cfg.timeout))  # from here on a rank that hangs is named
        take_step, no_graph = cuda_graph.capture(step, state, rates)  # on a CPU the step itself
        not_compiled = compiled.compile_pass(step) if cfg.compile else None
        known |= startup.announce_step(world, step, no_graph, not_compiled)
        recorder = scope.enter_context(open_recorder(folder, cfg, world, known, state.recorded))
        trace = scope.enter_context(Trace(cfg, world, folder, state.done))

        signals.training_begins()
        for epoch in state.epochs():
            recorder.begin_epoch(epoch, batches.steps)
            with state.timings.measure("train"):
                batches.draw(epoch)
                for window in sync.windows(batches.steps, state.steps_of(epoch)):
                    for k in window:
                        batches.images.bring(k)
                        take_step(k, rates[state.done])
                        state.advance()
                        trace.step()
                    if window.stop == batches.steps and not state.trained_to_the_end:
                        batches.draw_ahead(epoch + 1)  # while a card is at work
                    recorder.steps(sync.read(window))  # the one read from the device, and from other ranks
                    if sync.save_due or sync.stop or state.trained_to_the_end:
                        checkpoints.save(required=bool(sync.stop) or state.trained_to_the_end)
                        sync.saved_now()
                    if sync.stop:
                        raise Stopped(state.position, sync.stop)
            with state.timings.measure("eval"), state.averaged():
                scores = evaluate(cfg, model, sets, figures, last=epoch == cfg.epochs and not cfg.chooses)
                enough = state.choice.judge(epoch, scores)
            recorder.epoch(scores, state.timings.of_epoch(batches.count))
            if enough:
                break

        with state.kept():
            if cfg.chooses:  # only now it is known which weights are kept
                with state.timings.measure("eval"):
                    scores = evaluate(cfg, model, sets, figures, last=True)
                recorder.chosen(state.choice.outcome(epoch), scores)
            world.on_rank_zero(lambda: artifacts.write(folder, model, data, scores))
        recorder.finish(artifacts.figures(world, model, data, batches, state), data.test_images)
        return world.on_rank_zero(lambda: load_run(folder.path)) if wait_for_run else None


if __name__ == "__main__":
    sys.exit(main())
