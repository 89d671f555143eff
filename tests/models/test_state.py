"""A checkpoint's tensors against the state of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import build
from flashsvd.errors import CheckpointError
from flashsvd.models.state import check_base_state, check_state
from flashsvd.storage.verify import TensorShape

TIED = "cls.predictions.decoder.weight"


def shapes(model: Any) -> dict[str, TensorShape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_whole_state_must_be_there_but_for_what_is_tied(device: str) -> None:
    model = build("bert")
    with torch.device(device):
        model = type(model)(model.config)
    found = shapes(model)
    check_state(model, found, "here")
    del found[TIED]
    check_state(model, found, "here")
    name = "bert.embeddings.word_embeddings.weight"
    with pytest.raises(CheckpointError, match=f"here lacks the tensor {name}"):
        check_state(model, {n: shape for n, shape in found.items() if n != name}, "here")
    with pytest.raises(CheckpointError, match=rf"here: tensor {name} is \[3\], \[64, 32\] was expected"):
        check_state(model, found | {name: (3,)}, "here")
    with pytest.raises(CheckpointError, match=r"here holds the tensor more.weight, which the model has no place for"):
        check_state(model, found | {"more.weight": (3,)}, "here")


def test_under_another_class_only_the_base_model_counts() -> None:
    model = build("bert")
    found = {name: shape for name, shape in shapes(model).items() if name.startswith("bert.")}
    check_base_state(model.bert, found, "here")
    model.config.architectures = ["BertForSequenceClassification"]
    check_base_state(model, found, "here")
    check_base_state(model, found | {"classifier.weight": (2, 32)}, "here")
    with pytest.raises(CheckpointError, match="lacks the tensor cls"):
        check_state(model, found, "here")
    for name in ("bert.more", "bert.encoder.layer.9.weight"):
        with pytest.raises(CheckpointError, match=f"holds the tensor {name}"):
            check_base_state(model, found | {name: (1,)}, "here")
