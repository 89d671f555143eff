"""The steps of a training: prepare what can be refused, then load, train, save."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from flashsvd.common.device import describe_device, resolve_device, resolve_dtype
from flashsvd.common.provenance import library_versions, timestamp
from flashsvd.data.rows import listed
from flashsvd.data.tasks import Task
from flashsvd.errors import ConfigError, DataError, ModelError, first_line
from flashsvd.models.found import find_model
from flashsvd.models.loading import check_tokenizer, check_tokens, load_tokenizer, sequence_length
from flashsvd.models.precision import cast as cast_to
from flashsvd.models.precision import check_finite
from flashsvd.models.sentence import encoder_length
from flashsvd.storage.atomic import check_target
from flashsvd.storage.companions import Companions
from flashsvd.storage.training_file import TrainingRecord
from flashsvd.training.config import SEQ_LEN, FinetuneConfig
from flashsvd.training.curve import curve, write_curve
from flashsvd.training.data import Material, fit_to_data, prepare_material, task_of
from flashsvd.training.distill import TeacherPlan
from flashsvd.training.model import HeadedModel, LoadedModel, Mode, freeze, resize_output, start_at
from flashsvd.training.result import FinetuneResult
from flashsvd.training.resume import (
    Workplace,
    check_checkpoint,
    check_resumable,
    finished,
    keep_best_here,
    take_weights,
)
from flashsvd.training.rows import Collate
from flashsvd.training.save import (
    RandomParameters,
    companions_of,
    output_marker,
    past_trainings,
    save_trained,
)

log = logging.getLogger("flashsvd")


@dataclass(frozen=True)
class TrainingJob:
    """A training before its weights are loaded: nothing that could be refused is left open."""

    config: FinetuneConfig
    task: Task | None
    device: torch.device
    dtype: torch.dtype | None
    output: Path
    workplace: Workplace
    model: HeadedModel
    tokenizer: Any
    material: Material
    teacher: TeacherPlan | None
    companions: Companions
    trainings: Sequence[Mapping[str, Any]]

    @classmethod
    def prepare(cls, config: FinetuneConfig) -> TrainingJob:
        """Resolve a config; nothing is written.

        Raises:
            FlashSVDError: the config, the model, the data, the teacher or the output cannot be used.
        """
        mode, task = cast(Mode, config.mode), task_of(config)
        found = find_model(config.model)
        task = fit_to_data(config, task, found)
        device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
        output = config.output_directory()
        workplace = Workplace.find(output, config)
        model = HeadedModel.of(found, mode, task, config.new_head)
        if model.foreign_classes and task is not None:
            log.info("the classes %s become %s", ", ".join(model.foreign_classes), ", ".join(task.labels))
        check_target(output, config.overwrite, output_marker(model))
        tokenizer = load_tokenizer(model.source)
        check_tokenizer(tokenizer, config.model, masks=mode == "mlm")
        seq_len = _seq_len(config, task, model, tokenizer)
        teacher = TeacherPlan.find(config, mode, task, model, tokenizer, seq_len)
        material = prepare_material(config, task, model, tokenizer, seq_len)
        if teacher is not None:
            check_tokens(material.train.largest, teacher.source.config, teacher.source.name)
        workplace.check_data(material.train.digest)
        if task is not None and task.own_classes:
            log.info("the classes are %s", listed(task.labels))
        companions = companions_of(model, mode)
        trainings = past_trainings(model)
        return cls(
            config, task, device, dtype, output, workplace, model, tokenizer, material, teacher, companions, trainings
        )

    def run(self) -> FinetuneResult:
        """Do it and save the model, all of it or nothing; the checkpoints on the way go when it is saved.

        Raises:
            FlashSVDError: the loss or the weights are not finite, there is too little memory, or the model cannot be
                written. The checkpoints stay, to be resumed from.
        """
        arguments = self._arguments()
        loaded = self._load()
        with self._at_work(arguments):
            return self._run(loaded, arguments)

    def _run(self, loaded: LoadedModel, arguments: Any) -> FinetuneResult:
        objective = self.material.objective
        random = RandomParameters.of(loaded.model, self._untrained(loaded))
        with _unchanged_cache(loaded.model.config):
            trainer = self._trainer(loaded.model, arguments)
            start = time.perf_counter()
            self._train(trainer)
            seconds = time.perf_counter() - start

        random_still = random.left(loaded.model)
        resize_output(loaded.model, self.material.scale)
        metrics = self._metrics(trainer.state)
        record = self._record(trainer.state, arguments, metrics)
        points = curve(trainer.state.log_history, objective.metrics)
        trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
        if arguments.should_save:
            log.info("saving to %s", self.output)
            with self.workplace.writing():
                files = write_curve(points, objective.metrics, self.workplace.directory)
                self._save(loaded, record, files, random_still)
            self.workplace.remove()
        arguments.distributed_state.wait_for_everyone()
        return FinetuneResult(
            output=self.output,
            record=record,
            metrics=metrics,
            curve=points,
            parameters=sum(p.numel() for p in loaded.model.parameters()),
            trainable=trainable,
            train_samples=len(self.material.train),
            eval_samples=len(self.material.evaluation or ()),
            seconds=seconds,
            device=describe_device(arguments.device),
        )

    @property
    def _metric(self) -> str | None:
        """The metric that weights are chosen by."""
        return self.material.objective.metrics[0] if self.material.evaluation is not None else None

    def _arguments(self) -> Any:
        """The Trainer's arguments; making them sets up the processes."""
        from flashsvd.training.trainer import training_arguments

        directory, objective = self.workplace.directory, self.material.objective
        on_cpu = self.device.type == "cpu"
        arguments = training_arguments(self.config, directory, on_cpu, self._metric, objective.greater_is_better)
        # Every process has looked at the output by now, and only the first one writes.
        arguments.distributed_state.wait_for_everyone()
        return arguments

    def _load(self) -> LoadedModel:
        log.info("loading %s", self.config.model)
        loaded = self.model.load(self.config.seed)
        if self.task is not None and self.task.head == "classifier" and not self.task.labels:
            if self.model.has_head:
                resize_output(loaded.model, 1 / self.material.scale)
            start_at(loaded.model, self._untrained(loaded), self.material.train.mean_label)
        freeze(loaded.model, self.config.frozen())
        return loaded

    def _untrained(self, loaded: LoadedModel) -> set[str]:
        """Parameters that were random when the model was loaded, or when it was compressed, and are so still."""
        return {*loaded.untrained, *(self.model.info.untrained if self.model.info else ())}

    @contextlib.contextmanager
    def _at_work(self, arguments: Any) -> Iterator[None]:
        """The workplace open; where a training ends in an error before its first checkpoint, it is gone again."""
        with contextlib.ExitStack() as stack:
            if arguments.should_save:
                stack.enter_context(self.workplace.opened(self.config, self.material.train.digest))
            arguments.distributed_state.wait_for_everyone()
            try:
                yield
            except BaseException:
                if arguments.should_save and self.workplace.last_checkpoint() is None:
                    self.workplace.remove()
                raise

    def _trainer(self, model: Any, arguments: Any) -> Any:
        from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

        from flashsvd.training.callbacks import Checkpoints, EarlyStopping, LastEvaluation, Progress, StopWhenLost
        from flashsvd.training.trainer import ObjectiveTrainer

        config, material = self.config, self.material
        callbacks = [StopWhenLost(), LastEvaluation(), Checkpoints(config.save_steps)]
        if config.early_stopping:
            callbacks.append(EarlyStopping(config.early_stopping))
        trainer = ObjectiveTrainer(
            objective=material.objective,
            teacher=self.teacher.load(self.task, self.tokenizer, material.scale) if self.teacher else None,
            model=model,
            args=arguments,
            data_collator=Collate(self.tokenizer),
            train_dataset=material.train,
            eval_dataset=material.evaluation,
            callbacks=callbacks,
        )
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        trainer.add_callback(Progress(material.objective.metrics))
        return trainer

    def _train(self, trainer: Any) -> None:
        checkpoint = self.workplace.last_checkpoint() if self.workplace.resumes else None
        if checkpoint is not None:
            log.info("going on from %s", checkpoint)
            check_checkpoint(trainer.model, checkpoint)
            keep_best_here(checkpoint)
            if (state := finished(checkpoint, self.config.early_stopping)) is not None:
                log.info("it has been trained to its end")
                take_weights(trainer.model, Path(state.best_model_checkpoint or checkpoint))
                trainer.state = state
                return
            check_resumable(checkpoint, trainer.args.process_index, trainer.args.world_size)
        elif self.workplace.resumes:
            log.info("%s holds no checkpoint yet; starting anew", self.workplace.directory)
        try:
            with self.workplace.writing():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            last = self.workplace.last_checkpoint()
            how = f"a run that resumes goes on from {last}" if last else "there is no checkpoint yet"
            log.warning("interrupted at step %d; %s", trainer.state.global_step, how)
            raise
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"there is too little memory ({first_line(error)}); lower --batch-size and raise --accumulation, or "
                "lower --seq-len"
            ) from error

    def _metrics(self, state: Any) -> dict[str, float | None]:
        """The metrics of the weights that the model has in the end: those of the best evaluation, or of the last."""
        if self._metric is None:
            return {}
        evaluations = [entry for entry in state.log_history if f"eval_{self._metric}" in entry]
        best = [entry for entry in evaluations if entry["step"] == state.best_global_step]
        entry = (best or evaluations)[-1]
        values = {name: float(entry[f"eval_{name}"]) for name in self.material.objective.metrics}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def _record(self, state: Any, arguments: Any, metrics: Mapping[str, float | None]) -> TrainingRecord:
        config = self.config
        return TrainingRecord(
            mode=config.mode,
            task=self.task.name if self.task else None,
            model=config.model,
            data=self.material.about,
            epochs=round(state.epoch, 4),
            steps=state.global_step,
            batch_size=config.batch_size * config.accumulation * arguments.world_size,
            learning_rate=config.learning_rate,
            frozen=config.frozen(),
            teacher=config.teacher,
            metric=self._metric,
            score=metrics[self._metric] if self._metric else None,
            seed=config.seed,
            processes=arguments.world_size,
            versions=library_versions(),
            timestamp=timestamp(),
        )

    def _save(
        self, loaded: LoadedModel, record: TrainingRecord, files: Mapping[str, Path], untrained: tuple[str, ...]
    ) -> None:
        model = loaded.model.to("cpu")
        try:
            check_finite(model)
        except ModelError as error:
            raise DataError(f"{first_line(error).partition(';')[0]} after training; lower --learning-rate") from error
        cast_to(model, self.dtype or loaded.dtype)
        model.eval().requires_grad_(True)
        trainings = (*self.trainings, record.to_json())
        companions = Companions({**self.companions.files, **files})
        scratch, overwrite = self.workplace.directory, self.config.overwrite
        save_trained(model, self.model, self.output, trainings, companions, untrained, overwrite, scratch)


def _seq_len(config: FinetuneConfig, task: Task | None, model: HeadedModel, tokenizer: Any) -> int:
    is_encoder = task is not None and task.head == "encoder"
    default = encoder_length(model.source, model.config) if is_encoder else SEQ_LEN
    seq_len = sequence_length(model.config, config.model, config.seq_len, default)
    is_pair = task is not None and task.head == "classifier" and len(task.columns) > 1
    shortest = 1 + tokenizer.num_special_tokens_to_add(pair=is_pair)
    if seq_len < shortest:
        raise ConfigError(f"--seq-len {seq_len} is below {shortest}, the shortest that holds anything to learn from")
    return seq_len


@contextlib.contextmanager
def _unchanged_cache(config: Any) -> Iterator[None]:
    """The Trainer turns a model's cache of keys and values off, which the saved config must not say."""
    own = {name: value for name, value in vars(config).items() if name == "use_cache"}
    yield
    vars(config).pop("use_cache", None)
    vars(config).update(own)
