"""The training loop.

Everything random in a step follows from (seed, step, process): the order of the videos, the windows, the pictures'
augmentation, drop path. So a run that was killed and goes on from its last checkpoint computes what it would have
computed, and its log is that of a run that was never stopped.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch.utils.data import DataLoader

from examples.re2tal.data.dataset import collate
from examples.re2tal.detector import AMP
from examples.re2tal.distributed.parallel import spread
from examples.re2tal.errors import Re2TALError
from examples.re2tal.evaluation.inference import detect, video_scores
from examples.re2tal.evaluation.metrics import evaluate
from examples.re2tal.sections import thresholds
from examples.re2tal.training import checkpoints
from examples.re2tal.training.logs import Log, peak_gib
from examples.re2tal.training.optim import Average, optimizer_of, saved_buffers, schedule
from examples.re2tal.training.setup import annotations_of, clips_of, detector_of, resolved
from revwire.checkpoint.disk import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from examples.re2tal.config import Config
    from examples.re2tal.data.annotations import Annotations
    from examples.re2tal.data.dataset import Batch, Clips
    from examples.re2tal.distributed.world import World
    from examples.re2tal.evaluation.metrics import Evaluation
    from examples.re2tal.evaluation.postprocess import Detections

_SETTINGS = "config.yaml"

# settings that may differ when a run goes on: they change where it writes and how fast it is, not what it computes
_FREE = ("output", "loader", "checkpoint_every", "keep")


@dataclass(frozen=True)
class Outcome:
    """What a model finds in the evaluated subset.

    Attributes:
        results: Detections by video.
        evaluation: How good they are.
        skipped: Reasons, by the path of files that could not be read.
    """

    results: Mapping[str, Detections]
    evaluation: Evaluation
    skipped: Mapping[str, str]


def outcome_of(
    model: torch.nn.Module,
    clips: Clips,
    config: Config,
    annotations: Annotations,
    world: World,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Detect in the evaluated subset, and evaluate; arguments are those of `detect`."""
    results, skipped = detect(model, clips, config, annotations.classes, world, progress)
    evaluation = evaluate(
        annotations,
        results,
        subset=config.data.evaluate,
        tiou=thresholds(config.evaluation.tiou),
        drop_duplicates=config.evaluation.drop_duplicates,
    )
    return Outcome(results, evaluation, skipped)


class Trainer:
    """A run: model, data and everything that changes while it is trained.

    Args:
        config: The experiment.
        world: The processes that run it.
        head: Makes another head than the settings name, see `detector_of`.

    Raises:
        Re2TALError: its output folder holds a run of other settings, there are too few clips for a step, or something
            that the evaluation in the end needs is missing.
    """

    def __init__(self, config: Config, world: World, head: Callable[[int, int], Any] | None = None) -> None:
        config = resolved(config)
        self.config, self.world = config, world
        state = checkpoints.latest(self.folder)
        if state is not None:
            _same_run(config)
        self.annotations = annotations_of(config)
        self.clips = clips_of(config, self.annotations, training=True)
        # built now, so that what evaluation lacks is an error now, not after hours of training
        self.held_out = clips_of(config, self.annotations, training=False)
        video_scores(config.evaluation, self.annotations.classes, self.held_out)
        self.detector = detector_of(config, len(self.annotations.classes), weights=state is None, head=head)
        if state is None and config.start_from is not None:
            self.detector.load_state_dict(checkpoints.trained_weights(config.start_from))
        self.detector.to(world.device)
        self.model = spread(self.detector, world, config.parallel)
        self.optimizer = optimizer_of(self.detector, config.optim)
        together = config.optim.batch * config.optim.accumulate * world.size
        self.steps_in_epoch = len(self.clips) // together
        if not self.steps_in_epoch:
            raise Re2TALError(
                f"{len(self.clips)} videos are fewer than one step takes ({together}); lower optim.batch or "
                "optim.accumulate"
            )
        self.total = config.optim.epochs * self.steps_in_epoch
        self.schedule = schedule(
            self.optimizer,
            round(config.optim.warmup * self.steps_in_epoch),
            (config.optim.cosine or config.optim.epochs) * self.steps_in_epoch,
            from_zero=config.optim.warmup_from == "zero",
            least=config.optim.least_lr,
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.optim.amp == "fp16")
        decay, warmup = config.optim.ema, config.optim.ema_warmup
        self.average = None if decay is None else Average(self.detector, decay, warmup=warmup)
        self.step = 0
        self.skipped: dict[str, str] = {}
        if state is not None:
            self._restore(state)
        if world.is_first:
            config.output.mkdir(parents=True, exist_ok=True)
            settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            write_text(config.output / _SETTINGS, settings)

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.config.output / "checkpoints"

    def fit(self, log: Log) -> None:
        """Train from where the run is to its end."""
        loader = self._loader()
        batches = iter(loader)
        self.model.train()
        while self.step < self.total:
            started = time.perf_counter()
            values = self._step(batches)
            self.step += 1
            self.world.agree([buffer for _, buffer in saved_buffers(self.detector)])
            if self.average is not None:
                self.average.update(self.step)
            seconds = time.perf_counter() - started
            values["waiting"] /= seconds
            values["frames_per_second"] = values.pop("frames") / seconds
            values["gib"] = peak_gib(self.world.device)
            log.step(self.step, epoch=self.step / self.steps_in_epoch, **values)
            at_end = self.step % self.steps_in_epoch == 0
            if at_end or self.step % self.config.checkpoint_every == 0:
                self._save()
            if at_end:
                self._end_epoch(self.step // self.steps_in_epoch, log)

    def outcome(self, log: Log | None = None) -> Outcome:
        """Detect in the evaluated subset, with the averaged weights."""
        clips = self.held_out
        averaged = self.average.applied() if self.average is not None else nullcontext()
        if log is not None:
            log.say(f"evaluating {len(clips.videos)} videos in {len(clips)} clips")
        with averaged:
            return outcome_of(self.model, clips, self.config, self.annotations, self.world)

    def backbone_weights(self) -> dict[str, torch.Tensor]:
        """The backbone's tensors, by the names they have in a backbone that was just built."""
        weights = checkpoints.weights_of(self.model)
        return {
            name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")
        }

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One step of the optimizer."""
        settings = self.config.optim
        torch.manual_seed(hash((self.config.seed, self.step, self.world.rank)) % 2**63)
        values = dict.fromkeys(("loss", "classification", "regression", "frames", "waiting"), 0.0)
        for part in range(settings.accumulate):
            started = time.perf_counter()
            batch = next(batches)
            values["waiting"] += time.perf_counter() - started
            self.skipped |= dict(batch.skipped)
            if not len(batch):
                raise Re2TALError(f"no training video can be read: {_told(dict(batch.skipped))}")
            losses = self._backward(batch.to(self.world.device), last=part == settings.accumulate - 1)
            for name in ("classification", "regression"):
                values[name] += float(losses[name]) / settings.accumulate
            values["frames"] += batch.frames.shape[0] * batch.frames.shape[1] * self.world.size
        values["loss"] = values["classification"] + values["regression"]
        if not math.isfinite(values["loss"]):
            raise Re2TALError(
                f"the loss of step {self.step + 1} is {values['loss']}; lower optim.lr and optim.backbone_lr, or "
                "choose another optim.amp; the last checkpoint is from before"
            )
        values["lr"] = self.schedule.get_last_lr()[-1]
        self.scaler.unscale_(self.optimizer)
        if settings.clip is not None:
            norm: Any = torch.nn.utils.clip_grad_norm_(self.detector.parameters(), settings.clip)
            values["gradient_norm"] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return values

    def _backward(self, batch: Batch, *, last: bool) -> dict[str, torch.Tensor]:
        dtype, accumulate = AMP[self.config.optim.amp], self.config.optim.accumulate
        waits = not last and hasattr(self.model, "no_sync")
        with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
                predictions = self.model(batch.frames, batch.mask)
            losses = self.detector.head.loss(predictions, batch.segments, batch.labels)
            self.scaler.scale(losses.total / accumulate).backward()
        return {"classification": losses.classification.detach(), "regression": losses.regression.detach()}

    def _loader(self) -> DataLoader[Any]:
        """The batches from the run's present step to its end, from the same workers."""
        settings = self.config.loader
        workers: dict[str, Any] = {"prefetch_factor": settings.prefetch} if settings.workers else {}
        return DataLoader(
            self.clips,
            batch_sampler=self._order(),  # type: ignore[arg-type]  # an item is (epoch, index)
            num_workers=settings.workers,
            collate_fn=collate,
            pin_memory=self.world.device.type == "cuda",
            **workers,
        )

    def _order(self) -> list[list[tuple[int, int]]]:
        """For each batch still to come, its items; each epoch has an order of its own."""
        batch, size = self.config.optim.batch, self.world.size
        batches = []
        for epoch in range(self.step // self.steps_in_epoch, self.config.optim.epochs):
            generator = torch.Generator().manual_seed(hash((self.config.seed, epoch)) % 2**63)
            order = torch.randperm(len(self.clips), generator=generator).tolist()
            count = self.steps_in_epoch * self.config.optim.accumulate
            first = self.step % self.steps_in_epoch if epoch == self.step // self.steps_in_epoch else 0
            for i in range(first * self.config.optim.accumulate, count):
                start = (i * size + self.world.rank) * batch
                batches.append([(epoch, item) for item in order[start : start + batch]])
        return batches

    def _end_epoch(self, epoch: int, log: Log) -> None:
        for paths in self.world.gathered(self.skipped):
            self.skipped |= paths
        if self.skipped:
            log.say(f"epoch {epoch}: {len(self.skipped)} files cannot be read: {_told(self.skipped)}")
        every = self.config.evaluation.every
        if every and epoch % every == 0 and self.step < self.total:
            evaluation = self.outcome().evaluation
            log.step(self.step, average_mAP=evaluation.average_mAP)
            log.say(f"epoch {epoch}: average mAP {evaluation.average_mAP:.4f}")

    def _save(self) -> None:
        state = checkpoints.state_of(self.model, self.optimizer)
        average = self.average.whole() if self.average is not None else None
        if self.world.is_first:
            state |= {
                "average": average,
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "skipped": self.skipped,
            }
            checkpoints.save(self.folder, self.step, state, self.config.keep)
        self.world.wait()

    def _restore(self, state: dict[str, Any]) -> None:
        checkpoints.restore(state, self.model, self.optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state["average"])
        self.step, self.skipped = state["step"], state["skipped"]


def _same_run(config: Config) -> None:
    """See that the settings are those of the run whose checkpoints are there."""
    path, settings = config.output / _SETTINGS, config.model_dump(mode="json")
    before = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}
    differing = sorted(k for k in settings if k not in _FREE and settings[k] != before.get(k))
    if differing:
        raise Re2TALError(
            f"{config.output} holds a run of other settings ({', '.join(differing)}); give another output=FOLDER, "
            "or remove it"
        )


def _told(skipped: Mapping[str, str]) -> str:
    some = [f"{path} ({reason})" for path, reason in list(skipped.items())[:3]]
    return ", ".join(some) + (", ..." if len(skipped) > len(some) else "")
