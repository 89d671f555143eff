"""The tasks that models are evaluated on: their columns, labels, metrics and where their data lies."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal

from flashsvd.errors import ConfigError, DataError

log = logging.getLogger("flashsvd")

GLUE = "nyu-mll/glue"
WIKITEXT = "Salesforce/wikitext"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        columns: the text columns, one or two; empty until `own_task.fit_task` has looked at the user's data.
        metrics: names of the metrics, the one to quote first.
        labels: class names in the order of the data's label ids; empty for a real-valued label, and for classes of
            the user's own until `own_task.fit_task` knows them.
        head: `classifier` scores each text or pair with the model's head; `encoder` compares two texts' embeddings;
            `lm` predicts each token of running text from those before it.
        hub_config: the data set's name inside `hub`.
        validation: name of the validation split.
        hub: the data set's repository on the hub; empty for a task that always needs data of the user's.
        aliases: other names of columns, as GLUE's own files have them, with the name here.
        scores: the least and the greatest real-valued label.
        own_classes: whether the classes are those of the user's data, or of the model's head.
    """

    name: str
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    head: Literal["classifier", "encoder", "lm"] = "classifier"
    hub_config: str = ""
    validation: str = "validation"
    hub: str = GLUE
    aliases: tuple[tuple[str, str], ...] = ()
    scores: tuple[float, float] | None = None
    own_classes: bool = False

    @property
    def is_fitted(self) -> bool:
        """Whether the columns, and the classes if there are any, are known."""
        return bool(self.columns)

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier for this task; one for a real-valued label."""
        return len(self.labels) or 1


# What any causal language model is for.
PERPLEXITY = "perplexity"
_PAIR = ("sentence1", "sentence2")
_SCORE = (("score", "label"),)
_OWN = (("labels", "label"), *_SCORE)
_TASKS = (
    Task("cola", ("sentence",), ("matthews_correlation",), ("unacceptable", "acceptable"), hub_config="cola"),
    Task("sst2", ("sentence",), ("accuracy",), ("negative", "positive"), hub_config="sst2"),
    Task("mrpc", _PAIR, ("f1", "accuracy"), ("not_equivalent", "equivalent"), hub_config="mrpc"),
    Task(
        "qqp",
        ("question1", "question2"),
        ("f1", "accuracy"),
        ("not_duplicate", "duplicate"),
        hub_config="qqp",
        aliases=(("is_duplicate", "label"),),
    ),
    Task("stsb", _PAIR, ("pearson", "spearmanr"), (), hub_config="stsb", aliases=_SCORE, scores=(0, 5)),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        ("accuracy",),
        ("entailment", "neutral", "contradiction"),
        hub_config="mnli",
        validation="validation_matched",
        aliases=(("sentence1", "premise"), ("sentence2", "hypothesis"), ("gold_label", "label")),
    ),
    Task("qnli", ("question", "sentence"), ("accuracy",), ("entailment", "not_entailment"), hub_config="qnli"),
    Task("rte", _PAIR, ("accuracy",), ("entailment", "not_entailment"), hub_config="rte"),
    Task("classification", (), ("accuracy", "f1_macro"), (), hub="", aliases=_OWN, own_classes=True),
    Task("regression", (), ("pearson", "spearmanr"), (), hub="", aliases=_OWN),
    Task("similarity", _PAIR, ("spearmanr", "pearson"), (), head="encoder", hub_config="stsb", aliases=_SCORE),
    Task(PERPLEXITY, ("text",), ("perplexity",), (), head="lm", hub=""),
    Task("wikitext2", ("text",), ("perplexity",), (), head="lm", hub_config="wikitext-2-raw-v1", hub=WIKITEXT),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
# Those that have no data but the user's.
OWN_TASKS = tuple(task.name for task in _TASKS if not task.hub)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: no task has that name.
    """
    if name not in TASKS:
        raise ConfigError(f"--task {name!r} is not known; choose from {', '.join(TASKS)}")
    return TASKS[name]


def check_label_count(task: Task, config: Any, source: str) -> None:
    """Refuse a trained head that has another number of classes than the task has labels.

    Raises:
        DataError: naming both numbers.
    """
    if task.own_classes and not task.is_fitted:
        if config.num_labels == 1:
            raise DataError(f"{source} has a head for one real-valued output and no classes; take --task regression")
        return
    if config.num_labels != task.num_labels:
        wants = f"{len(task.labels)} classes ({', '.join(task.labels)})" if task.labels else "one real-valued output"
        has = f"{config.num_labels} labels" if config.num_labels > 1 else "one real-valued output"
        raise DataError(
            f"{source} has a head for {has}, but {task.name} needs {wants}; choose the task it was trained for"
        )


def check_classifier(config: Any, source: str) -> None:
    """Refuse a classifier that cannot work on a batch of single-label texts.

    Raises:
        DataError: it was trained for another kind of problem, or cannot tell padding from text.
    """
    kinds = ("regression",) if config.num_labels == 1 else ("single_label_classification",)
    if config.problem_type is not None and config.problem_type not in kinds:
        raise DataError(
            f"{source} was trained for {config.problem_type} with {config.num_labels} labels; "
            f"only {kinds[0]} is supported for that many"
        )
    if config.pad_token_id is None:
        raise DataError(
            f"config.json of {source} names no pad_token_id, without which batches cannot be classified; write there "
            "the id of its tokenizer's pad_token, which may be the eos_token, and save the tokenizer with it"
        )


def label_permutation(task: Task, config: Any) -> list[int]:
    """For each label id of the data, the class of the model that means the same.

    Some checkpoints order their classes differently from GLUE and say so in `config.id2label`; where their names are
    not the task's, the order is taken to be GLUE's.
    """
    classes = _classes(task, config)
    if list(task.labels) != class_names(config) and names_classes_of(task, config):
        return [classes.index(_called(task, name)) for name in task.labels]
    if foreign := foreign_classes(task, config):
        _warn_of_names(", ".join(foreign), task.name)
    return list(range(len(task.labels)))


def names_classes_of(task: Task, config: Any) -> bool:
    """Whether a config's classes are called as the task's labels are, in whatever order."""
    return sorted(_classes(task, config)) == sorted(_called(task, name) for name in task.labels)


def foreign_classes(task: Task, config: Any) -> list[str]:
    """What a config calls its classes, where that is neither what the task does nor just `LABEL_0` and so on."""
    names = class_names(config)
    if names_classes_of(task, config) or all(name.lower().startswith("label_") for name in names):
        return []
    return names


def class_names(config: Any) -> list[str]:
    """What a config calls its classes, in their order; as transformers does where it gives one no name."""
    named = sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))
    return [f"LABEL_{number}" if name in (None, "") else str(name) for number, name in named]


def _classes(task: Task, config: Any) -> list[str]:
    return [_called(task, name) for name in class_names(config)]


def _called(task: Task, name: str) -> str:
    """A class's name as it is compared: GLUE's are written in many ways, the user's own in theirs alone."""
    return name if task.own_classes else _plain(name)


@functools.cache
def _warn_of_names(names: str, task: str) -> None:
    """Once for each model and task, however often its classes are looked up."""
    log.warning("class names %s are not %s's; taking them in order", names, task)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")
