"""Running one cell: target, Trainer, steps, file, answers; out comes a RunRecord."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_sftguard.engine import replicas, variants
from pytest_sftguard.engine.adapter import adapters
from pytest_sftguard.engine.adapter.redrawing import Redrawn, other_factors, redrawn
from pytest_sftguard.engine.adapter.round_trip import round_trip
from pytest_sftguard.engine.after import finiteness, generation, parsing
from pytest_sftguard.engine.building.bases import Bases
from pytest_sftguard.engine.building.targets import Target, TargetError, resolve
from pytest_sftguard.engine.building.trainers import build
from pytest_sftguard.engine.looks import Looks, Scene
from pytest_sftguard.engine.machine.profiles import choose_device, device_profile, versions
from pytest_sftguard.engine.memory.prediction import Forecast, free_bytes
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.watching import Watch
from pytest_sftguard.engine.surroundings import devices, float32
from pytest_sftguard.engine.surroundings.errors import raised
from pytest_sftguard.engine.surroundings.frames import with_room
from pytest_sftguard.engine.surroundings.garbage import set_aside
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.engine.surroundings.threads import shared_cores
from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.precision import PrecisionMode, mode_named
from pytest_sftguard.records import Names, RunRecord
from pytest_sftguard.sizes import DEFAULT_MARGIN, shortage

if TYPE_CHECKING:
    from transformers import Trainer

_log = logging.getLogger(__name__)


def run(config: RunConfig, progress: Callable[[int], None] | None = None) -> RunRecord:
    """Train the cell of `config` and return everything that was seen.

    `progress` is called with the number of each optimizer step that is done. An exception of the training becomes the
    record's `error`. Raises TargetError where the target breaks its contract, ValueError for an unknown device, and
    lets KeyboardInterrupt through. Global state (random generators, environment, torch's switches) is put back.
    """
    with shared_cores():
        return with_room(_run, config, progress)


def _run(config: RunConfig, progress: Callable[[int], None] | None) -> RunRecord:
    mode = mode_named(config.cell.precision)
    device_type, unavailable = choose_device(config.device)
    profile = HardwareProfile(device_type=device_type, name=device_type) if unavailable else device_profile(device_type)
    record = RunRecord(
        cell=str(config.cell),
        precision=config.cell.precision,
        per_device_train_batch_size=config.cell.per_device_train_batch_size,
        gradient_accumulation_steps=config.cell.gradient_accumulation_steps,
        max_steps=config.steps,
        seed=config.seed,
        target=config.target,
        model=config.model,
        device=profile,
        variant=config.variant,
        versions=versions(),
        not_run=unavailable or profile.lacks(mode),
    )
    if record.not_run is not None:
        return record
    if not devices.answers(device_type):  # a failure, and no cell to be skipped: whatever did it may have passed
        return dataclasses.replace(record, error=raised(devices.LostError(), "build"))
    target = resolve(config.target)
    record = _foreseen(record, config, device_type)
    if record.not_run is not None:
        return record
    started = time.perf_counter()
    if config.variant == "replicas" and not replicas.is_one():
        return dataclasses.replace(replicas.run(config, record), seconds=time.perf_counter() - started)
    with isolated(), set_aside(device_type), tempfile.TemporaryDirectory(prefix="sftguard-") as folder:
        seen = _Cell(config, mode, device_type, target, Path(folder), progress).run()
    return dataclasses.replace(record, **seen, seconds=time.perf_counter() - started)


_bases = Bases()
"""Those of the process: its cells train on the same checkpoint."""
_forecast = Forecast()
"""One for the process, so that what one cell's rehearsal said of another is not rehearsed again."""


def _foreseen(record: RunRecord, config: RunConfig, device_type: str) -> RunRecord:
    """The record with what the cell will need, and `not_run` where that does not fit."""
    margin = config.fit_margin
    if margin == "auto":
        margin = DEFAULT_MARGIN if device_type == "cuda" else "off"
    free = free_bytes(device_type) if isinstance(margin, float) else None
    if free is None or not isinstance(margin, float):
        return record
    need = _forecast.need(config, record.device, free * (1 - margin))
    if need is None:
        return record
    return dataclasses.replace(record, predicted_memory_bytes=need, not_run=shortage(need, free, margin))


class _Cell:
    """One run in progress: what it has seen so far survives an exception of a later stage."""

    def __init__(
        self,
        config: RunConfig,
        mode: PrecisionMode,
        device_type: str,
        target: Target,
        folder: Path,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.config, self.mode, self.device_type = config, mode, device_type
        self.target, self.folder, self.progress = target, folder, progress
        self.seen: dict[str, Any] = {}
        self.unused: set[str] = set()
        self.stage = "build"
        self.looks = Looks(config.looks)
        self.scene = Scene(config, mode, device_type, target, folder, self._build)

    def run(self) -> dict[str, Any]:
        """All stages in order; the fields of a RunRecord that they filled."""
        try:
            self._stages()
        except TargetError:
            raise
        except variants.InapplicableError as reason:
            self.seen["not_run"] = str(reason)
        except Exception as error:  # whatever the code under test raises is evidence, not a crash of the guard
            _log.debug("cell %s ended in %s", self.config.cell, self.stage, exc_info=True)
            self.seen["error"] = raised(error, self.stage)
            if self.scene.watch is not None and not devices.answers(self.device_type):
                self.scene.watch.give_up_device()
        self.seen.update(self.looks.conclude(self.scene))
        return self.seen

    def _stages(self) -> None:
        scene = self.scene
        with scene.loads.watched():
            built = self._build("training")
        scene.trainer = trainer = variants.prepared(built, self.config)
        self.looks.prepare(scene)
        self.stage = "train"
        self._train(trainer, trainer.train)
        if self.config.variant == "resumed":
            self._resume(variants.checkpoint_of(trainer))
        if self.config.variant:
            return  # a reference has been trained, and that is all that it is for
        scene.trained = True
        self.stage = "round_trip"
        scene.reloaded = reloaded = self._round_trip(trainer)
        self.stage = "answers"
        pairs = self.target.pairs(self.config.questions, trainer.processing_class)
        self.seen["questions"] = len(pairs)
        batches = scene.watch.batches if scene.watch is not None else []
        budget = generation.budget(batches)
        asked = generation.ask(reloaded, trainer.processing_class, self.target, pairs, budget)
        self.seen["answers"], self.seen["generation"] = asked
        self.seen["parser"] = parsing.tried(self.target, trainer.processing_class, pairs, batches)

    def _build(self, name: str, **training_arguments: Any) -> Trainer:
        config = dataclasses.replace(
            self.config, training_arguments={**self.config.training_arguments, **training_arguments}
        )
        with _bases.shared():
            return build(self.target, config, self.mode, self.device_type, self.folder / name)

    def _resume(self, checkpoint: str) -> None:
        """Train on as another process would: with a Trainer of its own, from what the first one saved."""
        before = self.seen["steps"], self.seen["first_step"]
        self.stage = "build"
        self.scene.trainer = trainer = self._build("resuming")

        def resume() -> None:
            assert self.scene.recorder is not None  # this part's own, since it began
            variants.resume(trainer, self.scene.recorder, checkpoint)

        self.stage = "train"
        try:
            self._train(trainer, resume)
        finally:
            self.seen.update(steps=variants.joined(before[0], self.seen["steps"]), first_step=before[1])

    def _train(self, trainer: Trainer, train: Callable[[], Any]) -> None:
        self.scene.recorder = recorder = Recorder(trainer.model)
        self.scene.watch = watch = Watch(trainer, recorder, self.progress)
        self.looks.attach(self.scene)
        try:
            train()
        finally:
            watch.detach()
            self._note(trainer, recorder, watch)

    def _note(self, trainer: Trainer, recorder: Recorder, watch: Watch) -> None:
        """What was seen of the training, also of one that broke off: all of it only while the device answers."""
        self.seen.update(
            compute_dtypes=watch.layers.compute_dtypes,
            weights_dtypes=adapters.weights_dtypes(recorder.model),
            autocast_dtype=watch.layers.autocast_dtype,
            loss_scaling=watch.scaler is not None,
            tf32=float32.products_in_tf32() if self.device_type == "cuda" else None,
            max_grad_norm=trainer.args.max_grad_norm,
            log=watch.log(),
            global_step=trainer.state.global_step,
            micro_batches_per_epoch=watch.micro_batches_per_epoch,
            schedule=watch.schedule.record(self.config.steps) if watch.schedule else None,
        )
        whole = devices.answers(self.device_type)
        self.seen.update(recorder.fields(watch.optimizer, whole=whole))
        self.unused = recorder.unused
        if whole:
            self.seen["first_step"] = watch.first_step.record()
            self.scene.initial = recorder.initial
            watch.settle()

    def _round_trip(self, trainer: Trainer) -> torch.nn.Module:
        scene = self.scene
        scene.trained_model = trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        saved = self.folder / "adapter"
        trainer.save_model(str(saved))
        fresh, compared, other_seed = self._rebuilt(trainer, trained)
        scene.fresh_trainer = fresh
        self.looks.rebuilt(scene)
        probe = finiteness.probe_batch(trainer)
        record, reloaded = round_trip(trained, saved, fresh.model, probe, self.unused)
        digest, drawn = compared.without(trained, saved)
        parts = "parts of the base are drawn under each seed, and come with the adapter's file" if compared.rows else ""
        self.seen["round_trip"] = dataclasses.replace(
            record, fresh_base_digest=digest, other_seed=other_seed, drawn=Names.of(drawn),
            base_differs=record.base_differs or parts,
        )  # fmt: skip
        return reloaded

    def _rebuilt(self, trainer: Trainer, trained: torch.nn.Module) -> tuple[Trainer, Redrawn, int | None]:
        """The target built once more, its base held against the training's, and the other seed that it was built under.

        Whoever loads the adapter builds the base with no knowledge of the seed. A toy base that is drawn from it as a
        whole is built under the training's own, and so is one that factors were taken out of.
        """
        assert self.scene.recorder is not None
        recorder, seed = self.scene.recorder, int(trainer.args.seed) + 1
        if not adapters.takes_from_the_base(trained):
            fresh = self._build("reloading", seed=seed)
            self.scene.redrawn = other_factors(recorder.initial, fresh.model)
            found = redrawn(recorder.base_before, trained, fresh.model)
            if not found.whole:
                return fresh, found, seed
        fresh = self._build("rebuilding")
        return fresh, redrawn(recorder.base_before, trained, fresh.model), None
