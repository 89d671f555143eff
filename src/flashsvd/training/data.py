"""What a mode trains and evaluates on: its task, the rows of its data, and what they are trained towards."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from typing import Any

from flashsvd.common.paths import expand
from flashsvd.data.own_task import fit_task
from flashsvd.data.rows import SUFFIXES, Examples, Split, UnknownClassError, files_of, load_examples
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import TASKS, Task, get_task
from flashsvd.data.text import TEXT_SUFFIXES, lines_of, load_text
from flashsvd.data.tokenize import Tokenize
from flashsvd.errors import ConfigError, DataError
from flashsvd.models.found import Found
from flashsvd.models.heads import head_classes
from flashsvd.models.loading import check_tokens
from flashsvd.models.sentence import read_sentence_encoder
from flashsvd.training.config import CLASSIFIER_TASKS, FinetuneConfig
from flashsvd.training.model import HeadedModel
from flashsvd.training.objectives import (
    Classification,
    MaskedLM,
    Objective,
    PairSimilarity,
    balanced_weights,
    masked_rows,
)
from flashsvd.training.rows import Row, Rows

log = logging.getLogger("flashsvd")

# What is evaluated on, masks too, is the same whatever a training's seed is, so that trainings can be compared.
EVALUATION_SEED = 0


@dataclass(frozen=True)
class Material:
    """Tokenised data and the objective of the model that trains on it.

    Attributes:
        evaluation: None where there is no data to evaluate on.
        about: where the data came from, for people.
        scale: what the labels in the rows are multiples of: the standard deviation of the training labels of a
            regression whose scores may lie anywhere, else 1.
    """

    train: Rows
    evaluation: Rows | None
    objective: Objective
    about: str
    scale: float = 1.0


def task_of(config: FinetuneConfig) -> Task | None:
    """The task of a mode; None for running text.

    Raises:
        ConfigError: the task is missing, unknown, or another mode's.
    """
    task: Task | None = None
    if config.mode == "mlm":
        if config.task is not None:
            raise ConfigError(f"--mode mlm reads running text and no task; leave out --task {config.task}")
    elif config.mode == "similarity":
        task = get_task(config.task or "similarity")
        if task.head != "encoder":
            raise ConfigError(f"--task {task.name} is not one of --mode similarity; leave it out")
    else:
        names = ", ".join(CLASSIFIER_TASKS)
        if config.task is None and config.data is None:
            raise ConfigError(f"--mode cls needs a --task ({names}), or --data of your own")
        task = TASKS.get(config.task or "classification")
        if task is None or task.head != "classifier":
            raise ConfigError(f"--task {config.task!r} is not one of --mode cls; choose from {names}")
    if config.class_weights and not (task and (task.labels or task.own_classes)):
        raise ConfigError(f"--class-weights weighs classes, and {task.name if task else 'mlm'} has none; leave it out")
    return task


def fit_to_data(config: FinetuneConfig, task: Task | None, found: Found) -> Task | None:
    """A task of the user's own with the columns of the training data, and with the classes that the model has or gets.

    Raises:
        FlashSVDError: the data or the model cannot be read, or the data does not fit such a task.
    """
    if task is None or task.is_fitted:
        return task
    classes = None if config.new_head else head_classes(found.config)
    return fit_task(task, "train", config.data, classes, "--data")


def prepare_material(
    config: FinetuneConfig, task: Task | None, model: HeadedModel, tokenizer: Any, seq_len: int
) -> Material:
    """Read and tokenise the data to train and to evaluate on.

    Raises:
        FlashSVDError: the data cannot be had, or does not fit the task, the tokenizer or the model.
    """
    splits = [_Source("train", config.data, "--data"), _evaluation_source(config, task)]
    if task is None:
        train, evaluation = (_text_rows(source, config, tokenizer, seq_len) for source in splits)
        weights, scale = None, 1.0
    else:
        examples = [_examples(source, config, task) for source in splits]
        scale = _scale(task, examples[0])
        prompt = _prompt(task, model, tokenizer)
        tokenize = Tokenize.of(task, tokenizer, seq_len, prompt=prompt)
        train, evaluation = (_example_rows(part, tokenize, scale) for part in examples)
        weights = _class_weights(config, task, examples[0])
    assert train is not None, "there is always something to train on"
    for rows in (train, evaluation):
        if rows is not None:
            check_tokens(rows.largest, model.config, model.name)
    objective = make_objective(task, model, tokenizer, weights)
    about = config.data or f"hub:{(task or TASKS['wikitext2']).hub_config}"
    return Material(train, evaluation, objective, about, scale)


def make_objective(task: Task | None, model: HeadedModel, tokenizer: Any, class_weights: Any = None) -> Objective:
    """The objective of a task for a model; of running text for None."""
    if task is None:
        return MaskedLM(tokenizer, model.config.vocab_size)
    if task.head == "encoder":
        return PairSimilarity(task, read_sentence_encoder(model.source, model.config).adapted(tokenizer))
    return Classification(task, model.config, class_weights)


@dataclass(frozen=True)
class _Source:
    """Where the data of a split lies, None for the hub, and the option that says so."""

    split: Split
    data: str | None
    option: str


def _evaluation_source(config: FinetuneConfig, task: Task | None) -> _Source | None:
    """Where to find what is evaluated on; None where nothing is.

    Raises:
        ConfigError: an option asks for evaluations, and there is nothing to evaluate on.
    """
    if config.eval_data:
        return _Source("validation", config.eval_data, "--eval-data")
    path = expand(config.data) if config.data else None
    # Where there is nothing at all, whoever reads it says so.
    suffixes = SUFFIXES if task else TEXT_SUFFIXES
    if path is None or not path.exists() or files_of(path, "validation", task or TASKS["wikitext2"], suffixes):
        return _Source("validation", config.data, "--data")
    for name in ("early_stopping", "eval_steps", "max_eval_samples"):
        if getattr(config, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} needs something to evaluate on, and there is no validation file in "
                f"{path}; give one with --eval-data"
            )
    log.warning("%s holds no validation data and no other data to evaluate on are given: nothing is evaluated", path)
    return None


def _examples(source: _Source | None, config: FinetuneConfig, task: Task) -> Examples | None:
    if source is None:
        return None
    if source.split == "validation":
        return load_examples(task, "validation", source.data, _evaluated(config), source.option)
    try:
        examples = load_examples(task, "train", source.data, option=source.option)
    except UnknownClassError as error:
        raise DataError(f"{error.message} of {config.model}; --new-head trains a head for other classes") from error
    chosen = _drawn(len(examples), config)
    return Examples([examples.texts[i] for i in chosen], [examples.labels[i] for i in chosen])


def _scale(task: Task, train: Examples | None) -> float:
    """Without it, scores of tens or thousands lie further from a new head than any training takes it."""
    if train is None or task.head != "classifier" or task.labels or task.scores:
        return 1.0
    return statistics.pstdev(train.labels) or 1.0


def _prompt(task: Task, model: HeadedModel, tokenizer: Any) -> str:
    """What is put before each text; the tokenizer is then as the model's sentence encoder wants it."""
    if task.head != "encoder":
        return ""
    encoder = read_sentence_encoder(model.source, model.config).adapted(tokenizer)
    if encoder.similarity != "cosine":
        log.warning("%s compares embeddings by %s; trained and scored is their cosine", model.name, encoder.similarity)
    return encoder.prompt


def _example_rows(examples: Examples | None, tokenize: Tokenize, scale: float) -> Rows | None:
    if examples is None:
        return None
    encoded = tokenize.encode(examples.texts)
    return Rows([Row(parts, label / scale) for parts, label in zip(encoded, examples.labels, strict=True)])


def _class_weights(config: FinetuneConfig, task: Task, train: Examples | None) -> Any:
    return balanced_weights(task, train.labels) if config.class_weights and train else None


def _text_rows(source: _Source | None, config: FinetuneConfig, tokenizer: Any, seq_len: int) -> Rows | None:
    """The lines of a text, a long one in several rows."""
    if source is None:
        return None
    text = load_text(TASKS["wikitext2"], source.split, source.data, source.option)
    special = set(tokenizer.all_special_ids)
    encodings = Tokenize(tokenizer, seq_len).encode_whole(lines_of(text))
    # A line of unknown words, say, leaves nothing to predict.
    encodings = [encoding for encoding in encodings if set(encoding["input_ids"]) - special]
    if not encodings:
        raise DataError(f"the text for {source.split} holds nothing to predict; give another {source.option}")
    if source.split == "validation":
        if (draw := _evaluated(config)) is not None:
            encodings = [encodings[index] for index in sorted(draw.indices(len(encodings)))]
        return Rows(masked_rows(encodings, tokenizer, EVALUATION_SEED))
    return Rows([Row((encodings[i],)) for i in _drawn(len(encodings), config)])


def _evaluated(config: FinetuneConfig) -> Draw | None:
    """Which examples to evaluate on: the same as `flashsvd eval` of as many draws, whatever the training's seed is."""
    return None if config.max_eval_samples is None else Draw(config.max_eval_samples, EVALUATION_SEED)


def _drawn(count: int, config: FinetuneConfig) -> list[int]:
    """The examples to train on, of `count`, in the data's order."""
    if config.max_train_samples is None:
        return list(range(count))
    return sorted(Draw(config.max_train_samples, config.seed).indices(count))
