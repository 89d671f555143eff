"""As which class a model is loaded for compression: its own, or the one with the head that a task needs."""

from __future__ import annotations

from typing import Any

from flashsvd.data.tasks import Task, check_label_count, class_names
from flashsvd.errors import ModelError
from flashsvd.pretrained import base_class, causal_lm_class, classifier_class, own_class


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
    if task.head == "encoder":
        return base_class(model_config), {}
    if task.head == "lm":
        return causal_lm_class(model_config), {}
    classifier = classifier_class(model_config)
    if own_class(model_config) is classifier and not new_head:
        check_label_count(task, model_config, name)
        return classifier, {}
    if task.own_classes and not task.is_fitted:
        raise ModelError(f"{name} has no head for classes of your own; train it first with flashsvd finetune")
    options: dict[str, Any] = {"num_labels": task.num_labels}
    if task.labels:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {label: i for i, label in enumerate(task.labels)}
    return classifier, options


def head_classes(model_config: Any) -> tuple[str, ...] | None:
    """What a trained classifier calls its classes, in their order; None for any other model."""
    if own_class(model_config) is not classifier_class(model_config) or model_config.num_labels == 1:
        return None
    return tuple(class_names(model_config))


def refuse_quantized(name: str, model_config: Any) -> None:
    """Refuse a model whose weights are no plain numbers.

    Raises:
        ModelError: it is compressed or quantized already.
    """
    described = getattr(model_config, "quantization_config", None)
    if described is None:
        return
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method == "flashsvd":
        raise ModelError(f"{name} is compressed already; compress the dense model it came from")
    raise ModelError(f"{name} is quantized ({method}); compress the unquantized model it came from")
