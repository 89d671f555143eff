"""Which transformers class a model is loaded as: its own, or the one with the head that a task needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flashsvd.data.tasks import TASKS, Task, check_label_count, class_names
from flashsvd.errors import ModelError

# `encoder` is the model without a head; the others predict a text's class, masked tokens, or the next token.
Head = Literal["encoder", "classifier", "masked-lm", "lm"]


@dataclass(frozen=True)
class _Kind:
    """A kind of head: transformers' table of the classes that have it, and what to say of a model that cannot."""

    table: str
    lacking: str


_KINDS: dict[Head, _Kind] = {
    "encoder": _Kind("MODEL_MAPPING", "a {} model has no form without a head; choose another model"),
    "classifier": _Kind(
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "{} has no sequence classification head; leave out --task"
    ),
    "masked-lm": _Kind(
        "MODEL_FOR_MASKED_LM_MAPPING", "a {} model has no head for masked tokens; choose another mode or model"
    ),
    "lm": _Kind("MODEL_FOR_CAUSAL_LM_MAPPING", "a {} model is no causal language model; choose another --task"),
}


def head_class(config: Any, head: Head) -> Any:
    """The transformers class of a config's model under a kind of head.

    Raises:
        ModelError: the architecture has none, or reads text in the other direction.
    """
    kind = _KINDS[head]
    found = _class_in(kind.table, config)
    # transformers can turn a BERT into a decoder, and lists its type as causal whether it was or not.
    if head in ("lm", "masked-lm"):
        masked = _class_in(_KINDS["masked-lm"].table, config)
        reads_both_ways = masked is not None and not getattr(config, "is_decoder", False)
        found = found if reads_both_ways == (head == "masked-lm") else None
    if found is None:
        raise ModelError(kind.lacking.format(config.model_type))
    return found


def head_of(config: Any, model_class: Any) -> Head:
    """The kind of head that one of a config's classes has; `encoder` where it is of none of the other kinds."""
    heads: tuple[Head, ...] = ("lm", "masked-lm", "classifier")
    return next((head for head in heads if _class_in(_KINDS[head].table, config) is model_class), "encoder")


def own_class(config: Any) -> Any:
    """The transformers class that saved the checkpoint, by the config's `architectures`; the base class without one.

    Raises:
        ModelError: transformers has no such class, or it is one of another architecture.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        return head_class(config, "encoder")
    name = names[0] if isinstance(names, (list, tuple)) else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    config_class = getattr(found, "config_class", None)
    if not is_model or not isinstance(config_class, type) or not isinstance(config, config_class):
        raise ModelError(f"config.json names {names!r} in `architectures`, which is no {config.model_type} model")
    return found


def class_for_task(
    name: str, task: Task | None, model_config: Any, new_head: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The class to load the model as, and what to set on its config.

    Args:
        new_head: a classifier gets a head of its own for the task, whatever head it has.

    Raises:
        ModelError: the architecture has no such head.
        DataError: the model has a trained head for another number of labels.
    """
    if task is None:
        return own_class(model_config), {}
    wanted = head_class(model_config, task.head)
    if task.head != "classifier":
        return wanted, {}
    if own_class(model_config) is wanted and not new_head:
        check_label_count(task, model_config, name)
        return wanted, {}
    if task.own_classes and not task.is_fitted:
        raise ModelError(f"{name} has no head for classes of your own; train it first with flashsvd finetune")
    options: dict[str, Any] = {"num_labels": task.num_labels}
    if task.labels:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {label: i for i, label in enumerate(task.labels)}
    return wanted, options


def fitting_tasks(config: Any) -> str:
    """The tasks that a model can be scored on with the head that it has, for people."""
    head = head_of(config, own_class(config))
    wanted = "encoder" if head == "masked-lm" else head
    return ", ".join(task.name for task in TASKS.values() if task.head == wanted and _has_outputs_for(task, config))


def _has_outputs_for(task: Task, config: Any) -> bool:
    if task.head != "classifier":
        return True
    if not task.is_fitted:
        return task.own_classes == bool(config.num_labels > 1)
    return bool(task.num_labels == config.num_labels)


def head_classes(model_config: Any) -> tuple[str, ...] | None:
    """What a trained classifier calls its classes, in their order; None for any other model."""
    if own_class(model_config) is not head_class(model_config, "classifier") or model_config.num_labels == 1:
        return None
    return tuple(class_names(model_config))


def _class_in(table: str, config: Any) -> Any:
    """The class of a config in one of transformers' tables, or None; no other model's file is imported for it."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, table).get(type(config), None)
