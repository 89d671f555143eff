"""Which transformers class a model is loaded as: its own, or the one with the head that a task needs."""

from __future__ import annotations

from typing import Any

from flashsvd.data.tasks import Task, check_label_count, class_names
from flashsvd.errors import ModelError


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


def own_class(config: Any) -> Any:
    """The transformers class that saved the checkpoint, by the config's `architectures`; the base class without one.

    Raises:
        ModelError: transformers has no such class, or it is one of another architecture.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        return base_class(config)
    name = names[0] if isinstance(names, (list, tuple)) else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    config_class = getattr(found, "config_class", None)
    if not is_model or not isinstance(config_class, type) or not isinstance(config, config_class):
        raise ModelError(f"config.json names {names!r} in `architectures`, which is no {config.model_type} model")
    return found


def base_class(config: Any) -> Any:
    """The transformers class of the model without a head."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return MODEL_MAPPING[type(config)]


def classifier_class(config: Any) -> Any:
    """The transformers class of the model with a sequence classification head.

    Raises:
        ModelError: the architecture has none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"{config.model_type} has no sequence classification head; leave out --task")
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def masked_lm_class(config: Any) -> Any:
    """The transformers class of the model with a head that predicts masked tokens.

    Raises:
        ModelError: the architecture has none, or the model reads text in one direction.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
        raise ModelError(f"a {config.model_type} model has no head for masked tokens; choose another mode or model")
    return MODEL_FOR_MASKED_LM_MAPPING[type(config)]


def causal_lm_class(config: Any) -> Any:
    """The transformers class of the model with a head that predicts the next token.

    Raises:
        ModelError: the architecture has none, or the model reads text in both directions.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    # transformers can turn a BERT into a decoder, and lists its type as causal whether it was or not.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"a {config.model_type} model is no causal language model; choose another --task")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
