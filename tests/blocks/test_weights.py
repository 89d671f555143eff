"""`optimize` takes plain weights only: what is quantized, of a dtype to store in, or not there is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    float_qparams_weight_only_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
    prepare,
    prepare_qat,
    quantize_dynamic,
)
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationMethod

from conftest import build_model, factor
from flashsvd import optimize, runtime
from flashsvd.errors import BackendError
from flashsvd.integrations.quantizer import FlashSVDConfig

FAMILIES = ["bert", "roberta", "modernbert"]
INSTEAD = "load the model without quantization, or run it as it is"
CPU = torch.device("cpu")


class Int8Weight(torch.Tensor):
    """As libraries make one: it shows the shape and dtype of the weight that it stands for."""


class Packed4Bit(nn.Parameter):
    """As libraries make one: a parameter whose numbers are packed codes."""


def last_weight(model: Any) -> tuple[nn.Module, str]:
    """The last matrix of the encoder, and its name."""
    name = [name for name, parameter in model.named_parameters() if parameter.dim() == 2][-1]
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def put(model: Any, make: Callable[[torch.Tensor], nn.Parameter]) -> None:
    module, name = last_weight(model)
    setattr(module, name, make(getattr(module, name).detach()))


def say_in_config(method: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, "quantization_config", method)


@pytest.mark.parametrize("method", list(QuantizationMethod), ids=lambda method: method.value)
def test_what_a_config_calls_quantized_is_refused_by_its_method(method: QuantizationMethod) -> None:
    for described in ({"quant_method": method.value}, SimpleNamespace(quant_method=method)):
        model = build_model("bert", "base")
        model.config.quantization_config = described
        with pytest.raises(BackendError, match=rf"is quantized \({method.value}\), .*; {INSTEAD}"):
            optimize(model)
        with pytest.raises(BackendError, match=rf"is quantized \({method.value}\)"):
            runtime.check(model.config, "auto", CPU)


def test_a_quantizer_that_transformers_left_at_the_model_counts_too() -> None:
    model = build_model("bert", "base")
    model.hf_quantizer = SimpleNamespace(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(BackendError, match=r"is quantized \(bitsandbytes\)"):
        optimize(model)


def test_our_own_compression_is_no_quantization() -> None:
    model = build_model("bert", "base")
    factor(model, ratio=0.5)
    model.config.quantization_config = FlashSVDConfig.of(model)
    model.hf_quantizer = SimpleNamespace(quantization_config=model.config.quantization_config)
    assert optimize(model) is model


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dtype_that_nothing_computes_in_is_refused(family: str, dtype: torch.dtype) -> None:
    model = build_model(family, "base")
    put(model, lambda weight: nn.Parameter(weight.to(dtype), requires_grad=False))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(BackendError, match=rf"weight is {name}, and fused blocks take fp16, .*; {INSTEAD}"):
        optimize(model)


@pytest.mark.parametrize("make", [Packed4Bit, lambda w: nn.Parameter(w.as_subclass(Int8Weight))], ids=["4bit", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_stands_for_other_numbers_is_refused(family: str, make: Any) -> None:
    model = build_model(family, "base")
    put(model, make)
    with pytest.raises(BackendError, match=rf"weight is a (Packed4Bit|Int8Weight) of test_weights, .*; {INSTEAD}"):
        optimize(model)


@pytest.mark.parametrize("path", ["embeddings", "classifier"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_weights_that_are_not_there_are_refused_wherever_they_belong(family: str, path: str) -> None:
    model = build_model(family)
    (model if path == "classifier" else model.base_model).get_submodule(path).to("meta")
    with pytest.raises(BackendError, match=rf"{path}.*weight is on the meta device, .*; load the whole model"):
        optimize(model)


def test_a_layer_that_torch_has_quantized_is_named_and_the_model_runs_on() -> None:
    model = quantize_dynamic(build_model("bert", "base"), {nn.Linear}, dtype=torch.qint8)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        with pytest.raises(BackendError, match=r"query \(Linear, .* of torch\.ao\.nn\.quantized.*; optimize a model"):
            optimize(model)
        assert torch.equal(model(ids).last_hidden_state, expected)


def prepared(module: Any, config: Any) -> None:
    module.qconfig = config
    (prepare_qat if module.training else prepare)(module, inplace=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("training", [False, True], ids=["after training", "while training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_prepared_for_quantization_is_told_so(family: str, training: bool) -> None:
    model = build_model(family).train(training)
    prepared(model, get_default_qat_qconfig() if training else get_default_qconfig())
    with pytest.raises(
        BackendError, match=r"is prepared for quantization by torch\.ao\..*; optimize the model as it was"
    ):
        optimize(model.eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
def test_embeddings_that_torch_has_quantized_or_prepared_run_as_before(family: str) -> None:
    plain, ids = build_model(family), torch.tensor([[5, 6, 7]])
    quantized = quantize_dynamic(copy.deepcopy(plain), {nn.Embedding: float_qparams_weight_only_qconfig})
    observed = copy.deepcopy(plain)
    prepared(observed.base_model.embeddings, float_qparams_weight_only_qconfig)
    for model in (quantized, observed):
        with torch.inference_mode():
            expected = model(ids).logits
            torch.testing.assert_close(optimize(model)(ids).logits, expected, rtol=1e-4, atol=1e-5)


def meta(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.to("meta"))


@pytest.mark.parametrize(
    "change",
    [
        say_in_config({"quant_method": "gptq"}),
        lambda model: put(model, Packed4Bit),
        lambda model: put(model, lambda weight: nn.Parameter(weight.to(torch.float8_e4m3fn))),
        lambda model: put(model, meta),
    ],
)
def test_what_is_refused_is_left_as_it_was(change: Callable[[Any], None]) -> None:
    model = build_model("bert", "base")
    change(model)
    kinds = [type(module) for module in model.modules()]
    held = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(BackendError):
        optimize(model)
    assert [type(module) for module in model.modules()] == kinds
    for name, parameter in model.named_parameters():
        assert held[name][0] is parameter
        assert held[name][1] == parameter.requires_grad
