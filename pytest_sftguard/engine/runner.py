"""Running one cell: build the Trainer, train, save and reload the adapter, ask it questions, and return a RunRecord."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from pytest_sftguard.engine import replicas, variants
from pytest_sftguard.engine.adapter import adapters
from pytest_sftguard.engine.adapter.foundation import Loads
from pytest_sftguard.engine.adapter.redrawing import Redrawn, other_factors, redrawn
from pytest_sftguard.engine.adapter.round_trip import round_trip
from pytest_sftguard.engine.after import finiteness, generation, parsing
from pytest_sftguard.engine.building import quantised
from pytest_sftguard.engine.building.targets import TargetError, resolve
from pytest_sftguard.engine.looks import Looks
from pytest_sftguard.engine.machine.profiles import choose_device, device_profile, versions
from pytest_sftguard.engine.memory.prediction import Forecast, free_bytes
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.watching import Watch
from pytest_sftguard.engine.stages import Asked, Built, Rebuilt, Reloaded, Started, Trained
from pytest_sftguard.engine.surroundings import devices, float32
from pytest_sftguard.engine.surroundings.errors import own_work, raised
from pytest_sftguard.engine.surroundings.frames import with_room
from pytest_sftguard.engine.surroundings.garbage import set_aside
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.engine.surroundings.threads import shared_cores
from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.precision import mode_named
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.sizes import DEFAULT_MARGIN, shortage

_log = logging.getLogger(__name__)


def run(config: RunConfig, progress: Callable[[int], None] | None = None) -> RunRecord:
    """Train the cell of `config` and return everything that was seen.

    `progress` is called with the number of each optimizer step when it is done. An exception of the training becomes
    the record's `error`. Raises TargetError where the target breaks its contract, ValueError for an unknown device, and
    KeyboardInterrupt. Global state (random generators, environment, torch's switches) is restored.
    """
    with shared_cores():
        return with_room(_run, config, progress)


def _run(config: RunConfig, progress: Callable[[int], None] | None) -> RunRecord:
    mode = mode_named(config.cell.precision)
    device_type, unavailable = choose_device(config.device)
    profile = HardwareProfile(device_type=device_type, name=device_type) if unavailable else device_profile(device_type)
    record = RunRecord(
        cell=str(config.cell),
        **dataclasses.asdict(config.cell),
        max_steps=config.steps,
        seed=config.seed,
        target=config.target,
        model=config.model,
        device=profile,
        variant=config.variant,
        versions=versions(),
        not_run=unavailable or profile.lacks(mode) or quantised.lacks_library(mode),
    )
    if record.not_run is not None:
        return record
    # a failure, not a skip: the cell that broke the device may have passed
    if not devices.answers(device_type):
        return dataclasses.replace(record, error=raised(devices.LostError(), "build"))
    target = resolve(config.target)
    record = _foreseen(record, config, device_type)
    if record.not_run is not None:
        return record
    started = time.perf_counter()
    if config.variant == "replicas" and not replicas.is_one():
        return dataclasses.replace(replicas.run(config, record), seconds=time.perf_counter() - started)
    with isolated(), set_aside(device_type), tempfile.TemporaryDirectory(prefix="sftguard-") as folder:
        asked = Asked(config=config, mode=mode, device_type=device_type, target=target, folder=Path(folder))
        seen = _Cell(asked, progress).run()
    return dataclasses.replace(record, **seen, seconds=time.perf_counter() - started)


_forecast = Forecast()
"""One for the process: a rehearsal that also tells what another cell needs is not repeated for that cell."""


def _foreseen(record: RunRecord, config: RunConfig, device_type: str) -> RunRecord:
    """Return the record with the memory that the cell will need, and with `not_run` where that does not fit."""
    margin = config.fit_margin
    if margin == "auto":
        margin = DEFAULT_MARGIN if device_type == "cuda" else "off"
    if not isinstance(margin, float) or (free := free_bytes(device_type)) is None:
        return record
    need = _forecast.need(config, record.device, free * (1 - margin))
    if need is None:
        return record
    return dataclasses.replace(record, predicted_memory_bytes=need, not_run=shortage(need, free, margin))


class _Cell:
    """One run in progress: what it has seen so far survives an exception of a later stage."""

    def __init__(self, asked: Asked, progress: Callable[[int], None] | None) -> None:
        self.asked, self.progress = asked, progress
        self.reached = asked
        self.seen: dict[str, Any] = {}
        self.looks = Looks(asked.config.looks)

    def run(self) -> dict[str, Any]:
        """Go through the stages, and return the fields of a RunRecord that they filled."""
        try:
            self._stages()
        except TargetError:
            raise
        except variants.InapplicableError as reason:
            self.seen["not_run"] = str(reason)
        # whatever the code under test raises is evidence, not a crash of the guard
        except Exception as error:
            _log.debug("cell %s ended in %s", self.asked.config.cell, self.reached.doing, exc_info=True)
            lost = not devices.answers(self.asked.device_type)
            self.seen["error"] = raised(error, self.reached.doing, lost=lost)
            if isinstance(self.reached, Started) and lost:
                self.reached.watch.give_up_device()
        self.seen.update(self.looks.conclude(self.reached))
        return self.seen

    def _stages(self) -> None:
        config, loads = self.asked.config, Loads()
        with loads.watched():
            trainer = self.asked.build("training")
        built = self.asked.then(Built, trainer=variants.prepared(trainer, config), loads=loads)
        self.looks.prepare(built)
        started = self._train(built)
        if config.variant == "resumed":
            self._resume(started)
        # a reference is trained, and that is all
        if config.variant:
            return
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        quantised.keep_layout(model)
        self.reached = trained = started.then(Trained, trained_model=model)
        reloaded = self._round_trip(trained)
        tokenizer = trainer.processing_class
        pairs = reloaded.target.pairs(config.questions, tokenizer)
        self.seen["questions"] = len(pairs)
        budget = generation.budget(reloaded.batches)
        asked = generation.ask(reloaded.reloaded_model, tokenizer, reloaded.target, pairs, budget, reloaded.answered)
        self.seen["answers"], self.seen["generation"] = asked
        self.seen["parser"] = parsing.tried(reloaded.target, tokenizer, pairs, reloaded.batches)

    def _resume(self, first: Started) -> None:
        """Train on as another process would: with a second Trainer, from what the first one saved."""
        checkpoint = variants.checkpoint_of(first.trainer)
        before = self.seen["steps"], {name: self.seen[name] for name in ("first_step", "entropies")}
        self.reached = self.asked
        built = self.asked.then(Built, trainer=self.asked.build("resuming"), loads=first.loads)
        try:
            self._train(built, checkpoint, first)
        finally:
            self.seen.update(steps=variants.joined(before[0], self.seen["steps"]), **before[1])

    def _train(self, built: Built, checkpoint: str = "", interrupted: Started | None = None) -> Started:
        self.reached = built
        recorder = Recorder(built.trainer.model)
        watch = Watch(built.trainer, recorder, self.progress)
        self.reached = started = built.then(Started, recorder=recorder, watch=watch)
        self.looks.attach(started)
        try:
            if interrupted is None:
                built.trainer.train()
            else:
                other = interrupted.trainer

                def begin() -> None:
                    self.seen["not_restored"] = variants.not_restored(other, built.trainer)
                    recorder.begin_from_here()

                variants.resume(built.trainer, checkpoint, begin)
        finally:
            watch.detach()
            self._note(started)
        return started

    @own_work
    def _note(self, started: Started) -> None:
        """Note what was seen of the training, also of one that raised: all of it only while the device answers."""
        trainer, recorder, watch = started.trainer, started.recorder, started.watch
        self.seen.update(
            compute_dtypes=watch.layers.compute_dtypes,
            adapter_type=adapters.adapter_type(recorder.model),
            weights_dtypes=adapters.weights_dtypes(recorder.model),
            autocast_dtype=watch.layers.autocast_dtype,
            loss_scaling=watch.scaler is not None,
            tf32=float32.products_in_tf32() if started.device_type == "cuda" else None,
            max_grad_norm=trainer.args.max_grad_norm,
            log=watch.log(),
            global_step=trainer.state.global_step,
            stopped=_stopped_early(trainer),
            restored=bool(trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint),
            micro_batches_per_epoch=watch.micro_batches_per_epoch,
            schedule=watch.schedule.record(started.config.steps) if watch.schedule else None,
        )
        whole = devices.answers(started.device_type)
        self.seen.update(recorder.fields(watch.optimizer, whole=whole))
        if whole:
            self.seen["first_step"] = watch.first_step.record()
            self.seen["entropies"] = watch.entropies.records()
            watch.settle()

    def _round_trip(self, trained: Trained) -> Reloaded:
        model, saved = trained.trained_model, trained.folder / "adapter"
        # `state_dict` spoils what bitsandbytes rearranged, and that is after the training
        with quantised.kept(model):
            trained.trainer.save_model(str(saved))
        rebuilt, compared, other_seed = _rebuilt(trained)
        self.looks.rebuilt(rebuilt)
        probe = finiteness.probe_of(trained.given, model)
        record, reloaded = round_trip(model, saved, rebuilt.fresh_trainer.model, probe, trained.recorder.unused)
        digest, drawn = compared.without(model, saved)
        parts = "parts of the base are drawn under each seed, and come with the adapter's file" if compared.rows else ""
        differs = record.base_differs or parts
        self.seen["round_trip"] = dataclasses.replace(
            record, fresh_base_digest=digest, other_seed=other_seed, drawn=Names.of(drawn), base_differs=differs
        )
        self.reached = ready = rebuilt.then(Reloaded, reloaded_model=reloaded)
        return ready


def _stopped_early(trainer: Any) -> bool:
    """Whether early stopping ended the training, rather than another callback, which need not be meant to."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in found)


def _rebuilt(trained: Trained) -> tuple[Rebuilt, Redrawn, int | None]:
    """Build the target again: the stage, its base compared with the training's, and the other seed of that build.

    Whoever loads the adapter builds the base without knowing the seed. Two targets are built under the training's own
    seed: those whose whole base is drawn from it, as a toy's is, and those whose factors were taken out of the base.
    """
    recorder, seed = trained.recorder, int(trained.trainer.args.seed) + 1
    unlike: set[str] | None = None
    if not adapters.takes_from_the_base(trained.trained_model):
        fresh = trained.build("reloading", seed=seed)
        unlike = other_factors(recorder.initial, fresh.model)
        found = redrawn(recorder.base_before, trained.trained_model, fresh.model)
        if not found.whole:
            return trained.then(Rebuilt, fresh_trainer=fresh, redrawn=unlike), found, seed
    fresh = trained.build("rebuilding")
    found = redrawn(recorder.base_before, trained.trained_model, fresh.model)
    return trained.then(Rebuilt, fresh_trainer=fresh, redrawn=unlike), found, None
