"""A model that is read, factored and written layer by layer becomes what it becomes in memory, to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import DECODERS, EVERY_DECODER, EVERY_ENCODER, build, build_tokenizer
from flashsvd import CompressConfig, CompressReport, load_compressed, read_info, run_compress
from flashsvd.calibration.collect import collect_statistics
from flashsvd.calibration.source import CalibrationRequest, prepare_calibration
from flashsvd.calibration.store import in_memory
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import FactoredMatrix, factor_model, matrix_shapes
from flashsvd.compression.run import division
from flashsvd.compression.walks import states
from flashsvd.data.sampling import Draw
from flashsvd.io import save_compressed
from flashsvd.lowrank.ranks import plan_ranks
from flashsvd.methods.registry import get_method
from flashsvd.models.loading import load_model
from flashsvd.models.precision import cast
from flashsvd.models.registry import find_targets
from flashsvd.storage import shards
from flashsvd.storage.verify import weight_files
from pairs import pairwise
from training_data import write_text

CPU = torch.device("cpu")
EVERY_MODEL = [*EVERY_ENCODER, "xlm-roberta", *EVERY_DECODER]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text") / "train.txt"


def save(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    build_tokenizer().save_pretrained(directory)
    return directory


def compress(source: Path, output: Path, **options: Any) -> CompressReport:
    defaults = {"ratio": 0.5, "device": "cpu", "calib_samples": 12, "calib_batch_size": 4, "calib_seq_len": 16}
    return run_compress(CompressConfig(model=str(source), output=str(output), **(defaults | options)))


def in_one_pass(source: Path, output: Path, config: CompressConfig) -> list[FactoredMatrix]:
    """What the same options make of the model in memory."""
    from flashsvd.models.found import find_model
    from flashsvd.models.heads import own_class

    found = find_model(str(source))
    model = load_model(str(source), found.config, own_class(found.config)).model
    targets, method = find_targets(model), get_method(config.method)
    request = CalibrationRequest(config.calib_data, Draw(config.calib_samples, config.seed), 16, 4)
    calibration = prepare_calibration(request, None, type(model), model.config, str(source), 40)
    parts = collect_statistics(model, targets, calibration.batches, method.needs, calibration.loss, CPU)
    statistics = in_memory(parts if method.needs else (), {})
    qkv = "per-head" if config.qkv == "per-head" else "joint"
    plan = plan_ranks(matrix_shapes(model, targets, qkv), division(config.rank_request(), model.config))
    dtype = getattr(torch, config.dtype) if config.dtype else None
    factoring = Factoring(
        targets, plan, method, qkv, CPU, dtype, config.factor_kind,
        statistics_of=lambda target, blocks: statistics.of(target, method.needs, blocks),
    )  # fmt: skip
    matrices = factor_model(model, factoring)
    if dtype is not None:
        cast(model, dtype)
    save_compressed(model, output, read_info(source.parent / "layers").compression)
    return matrices


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: values for file in weight_files(directory) for name, values in load_file(file).items()}


def assert_same(ours: Path, theirs: Path) -> None:
    one, other = tensors(ours), tensors(theirs)
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype, name
        assert torch.equal(values, other[name]), name


CASES = pairwise(
    ["standard", "drone", "asvd", "fwsvd"], ["joint", "per-head"], ["float", "int8"], [None, "bfloat16"], [False, True]
)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_the_weights_are_those_of_one_pass_over_the_whole_model(tmp_path: Path, text: Path, name: str) -> None:
    model = build(name)
    for number, (method, qkv, factors, dtype, half) in enumerate(CASES):
        place = tmp_path / str(number)
        source = save((model.bfloat16() if half else model.float()), place / "dense")
        options = {"method": method, "qkv": qkv, "factors": factors, "dtype": dtype, "calib_data": str(text)}
        report = compress(source, place / "layers", **options)
        config = CompressConfig(model=str(source), ratio=0.5, calib_samples=12, **options)
        matrices = in_one_pass(source, place / "whole", config)
        assert_same(place / "layers", place / "whole")
        assert list(report.matrices) == matrices
        ours, theirs = (json.loads((place / one / "config.json").read_text()) for one in ("layers", "whole"))
        assert ours == theirs


@pytest.mark.parametrize(
    "options", [{"method": "drone"}, {"method": "drone", "calib_inputs": "compressed", "refine": 2}]
)
@pytest.mark.parametrize("name", ["mpnet", "modernbert", "gpt2", "llama tied"])
def test_it_makes_no_difference_in_what_files_weights_and_states_lie(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    model = build(name)
    options = options | {"calib_data": str(text)}
    compress(save(model, tmp_path / "one"), tmp_path / "plain", **options)
    monkeypatch.setattr(states, "IN_MEMORY", 2000)
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 20_000)
    compress(save(model, tmp_path / "many", max_shard_size="20KB"), tmp_path / "sharded", **options)
    assert len(weight_files(tmp_path / "plain")) == 1
    assert len(weight_files(tmp_path / "sharded")) > 2
    assert_same(tmp_path / "plain", tmp_path / "sharded")
    one, other = (load_compressed(tmp_path / directory, verify=True) for directory in ("plain", "sharded"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_nothing_but_a_layer_and_what_surrounds_the_layers_is_in_memory(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from flashsvd.compression.walks.walk import _Walking

    seen = []
    step = _Walking.step

    def watched(self: _Walking, index: int, **starts: bool) -> Any:
        held = {path for path, parameter in self.model.named_parameters() if not parameter.is_meta}
        seen.append([path for path in held if path.startswith(f"{self.path}.")])
        return step(self, index, **starts)

    monkeypatch.setattr(_Walking, "step", watched)
    source = save(build(name), tmp_path / "dense")
    compress(source, tmp_path / "out", method="drone", calib_data=str(text))
    assert seen == [[], []]


def test_the_state_dict_holds_tied_weights_under_both_names(tmp_path: Path) -> None:
    family, own = DECODERS["llama tied"]
    assert (family, own["tie_word_embeddings"]) == ("llama", True)
    compress(save(build("llama tied"), tmp_path / "dense"), tmp_path / "out", method="standard", state_dict=True)
    state = torch.load(tmp_path / "out" / "flashsvd_state_dict.pt")
    model = load_compressed(tmp_path / "out")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
