"""Every method through `run_compress`, on encoders and decoders: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import EVERY_DECODER, WORDS, MakeModel, build_decoder, build_model, build_tokenizer
from flashsvd import CompressConfig, FlashSVDError, load_compressed, read_info, run_compress
from flashsvd.errors import ConfigError, DataError, ModelError
from flashsvd.methods import adasvd
from flashsvd.methods.adasvd import BASES
from flashsvd.methods.method import Method, Statistics
from flashsvd.methods.registry import METHODS, get_method
from flashsvd.storage.metadata import CompressionInfo
from pairs import pairwise


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """Labelled training sentences, in a directory as GLUE has them."""
    generator = torch.Generator().manual_seed(0)
    rows = ["sentence\tlabel"]
    for _ in range(24):
        length = int(torch.randint(1, 9, (1,), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator)]
        rows.append(f"{' '.join(words)}\t{int('good' in words)}")
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path / "sst2"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[int(i)] for i in torch.randint(0, 15, (12,), generator=generator)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "text.txt"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    build_decoder("llama").save_pretrained(tmp_path / "decoder")
    build_tokenizer().save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.fixture
def learns_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of adasvd where it is one method of all; how well it learns is tested by itself."""
    monkeypatch.setattr(adasvd, "STEPS", 4)


def compress(source: Path, output: Path, **options: Any) -> CompressionInfo:
    defaults = {"ratio": 0.5, "device": "cpu", "calib_batch_size": 4}
    return run_compress(CompressConfig(model=str(source), output=str(output), **(defaults | options))).info


@pytest.mark.usefixtures("learns_little")
@pytest.mark.parametrize(
    ("name", "method", "qkv"), pairwise(["bert", "modernbert"], sorted(METHODS), ["joint", "per-head"])
)
def test_every_method_compresses_a_classifier(
    make_model: MakeModel, sentences: Path, tmp_path: Path, name: str, method: str, qkv: str
) -> None:
    info = compress(make_model(name), tmp_path / "out", method=method, qkv=qkv, task="sst2", calib_data=str(sentences))
    assert info.method == method
    assert info.parameters["target_compressed"] <= 0.5 * info.parameters["target_dense"]
    load_compressed(tmp_path / "out")
    if method == "standard":
        assert info.calibration is None
    else:
        assert info.calibration is not None
        assert info.calibration["kind"] == "classifier"
        assert info.calibration["samples"] == 24


@pytest.mark.usefixtures("learns_little")
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", EVERY_DECODER)
def test_every_method_compresses_every_decoder(tmp_path: Path, text: Path, name: str, method: str) -> None:
    build_decoder(name).save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    options = {"calib_data": str(text), "calib_samples": 8, "calib_seq_len": 16}
    info = compress(tmp_path / "dense", tmp_path / "out", method=method, **options)
    assert method == "standard" or (info.calibration is not None and info.calibration["kind"] == "causal-lm")
    with torch.inference_mode():
        logits = load_compressed(tmp_path / "out")(torch.arange(5, 20)[None]).logits
    assert logits.isfinite().all()


@pytest.mark.slow
def test_methods_give_different_factors(make_model: MakeModel, sentences: Path, tmp_path: Path) -> None:
    source, weights = make_model(), {}
    for method in ("standard", "fwsvd", "drone", "asvd"):
        compress(source, tmp_path / method, method=method, task="sst2", calib_data=str(sentences))
        weights[method] = load_compressed(tmp_path / method).bert.encoder.layer[0].output.dense.matrix()
    products = list(weights.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(products) for b in products[:i])


@pytest.mark.usefixtures("learns_little")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_same_seed_gives_the_same_factors(
    make_model: MakeModel, sentences: Path, tmp_path: Path, method: str
) -> None:
    source, states = make_model(), []
    for name, seed in (("a", 0), ("b", 0)):
        torch.manual_seed(int(name == "b"))
        options = {"method": method, "task": "sst2", "calib_data": str(sentences), "calib_samples": 8, "seed": seed}
        compress(source, tmp_path / name, **options)
        states.append(load_compressed(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_another_seed_draws_other_samples_unless_the_first_are_asked_for(
    make_model: MakeModel, sentences: Path, tmp_path: Path
) -> None:
    source = make_model()

    def factor(name: str, **options: Any) -> torch.Tensor:
        common = {"method": "drone", "task": "sst2", "calib_data": str(sentences), "calib_samples": 8}
        compress(source, tmp_path / name, **(common | options))
        return load_compressed(tmp_path / name).bert.encoder.layer[0].output.dense.matrix()

    assert not torch.allclose(factor("a", seed=0), factor("b", seed=1))
    assert torch.equal(factor("c", seed=0, calib_order="first"), factor("d", seed=1, calib_order="first"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fwsvd", "drone", "asvd"])
def test_saved_statistics_give_the_same_factors_without_data(
    make_model: MakeModel, sentences: Path, tmp_path: Path, method: str
) -> None:
    source, stats = make_model(), str(tmp_path / "stats")
    common = {"method": method, "task": "sst2", "qkv": "per-head"}
    compress(source, tmp_path / "plain", calib_data=str(sentences), **common)
    compress(source, tmp_path / "saved", calib_data=str(sentences), save_stats=stats, **common)
    reused = compress(source, tmp_path / "reused", stats=stats, **common)
    assert reused.calibration is not None
    assert reused.calibration["samples"] == 24
    states = [load_compressed(tmp_path / name).state_dict() for name in ("plain", "saved", "reused")]
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:] for name in states[0])
    # One method's statistics serve the others and the other layout as well, and no other model.
    for other_method in ("fwsvd", "drone", "asvd"):
        own = common | {"qkv": "joint", "method": other_method}
        compress(source, tmp_path / other_method, stats=stats, **own)
    other = make_model(name="other", hidden_size=16)
    with pytest.raises(ConfigError, match="are of another model"):
        compress(other, tmp_path / "x", stats=stats, **common)


@pytest.mark.slow
@pytest.mark.parametrize("base", sorted(BASES))
def test_adasvd_meets_its_budget_and_its_ranks_can_be_used_again(
    make_model: MakeModel, sentences: Path, tmp_path: Path, base: str
) -> None:
    source = make_model(hidden_size=64, intermediate_size=128)
    common = {"task": "sst2", "calib_data": str(sentences), "seed": 3}
    info = compress(source, tmp_path / "ada", method="ada", adasvd_base=base, **common)
    assert info.method == "adasvd"
    assert info.method_options == {"adasvd_base": base}
    p = info.parameters
    assert 0.49 * p["target_dense"] <= p["target_compressed"] <= 0.5 * p["target_dense"]
    written = json.loads((tmp_path / "ada" / "ranks.json").read_text())
    assert written["ranks"] == info.module_ranks
    # On this random model learning beats uniform ranks for this base; where it does not, uniform ones are kept.
    if base == "drone":
        assert info.module_ranks != compress(source, tmp_path / "uniform", method=base, **common).module_ranks
    assert info.ranks_json is None
    options = common | {"method": base, "ratio": None, "ranks_json": str(tmp_path / "ada" / "ranks.json")}
    again = compress(source, tmp_path / "again", **options)
    assert again.module_ranks == info.module_ranks
    states = [load_compressed(tmp_path / name).state_dict() for name in ("ada", "again")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_adasvd_learns_without_labels_from_the_dense_models_outputs(
    make_model: MakeModel, text: Path, tmp_path: Path
) -> None:
    info = compress(
        make_model("bert", "base"), tmp_path / "out", method="adasvd", calib_data=str(text), calib_samples=8
    )
    assert info.calibration is not None
    assert info.calibration["kind"] == "text"


def test_asvd_search_spends_the_budget_where_the_loss_asks_for_it(decoder: Path, text: Path, tmp_path: Path) -> None:
    options = {"calib_data": str(text), "calib_samples": 8, "calib_seq_len": 16, "ratio": 0.6}
    info = compress(decoder, tmp_path / "out", method="asvd", asvd_search=True, alpha=0.7, **options)
    p = info.parameters
    assert 0.97 * 0.6 <= p["target_compressed"] / p["target_dense"] <= 0.6
    assert info.method_options == {"alpha": 0.7, "asvd_search": True}
    assert (tmp_path / "out" / "ranks.json").is_file()
    uniform = compress(decoder, tmp_path / "uniform", method="asvd", **options)
    assert uniform.module_ranks != info.module_ranks


def test_info_says_how_a_checkpoint_was_made(decoder: Path, text: Path, tmp_path: Path) -> None:
    options = {"calib_data": str(text), "calib_samples": 8, "calib_seq_len": 16}
    compress(decoder, tmp_path / "out", method="asvd", alpha=0.7, **options)
    shown = str(read_info(tmp_path / "out"))
    assert "asvd, alpha 0.7, Q/K/V joint" in shown
    assert f"8 samples, 128 tokens of {text}, seed 0" in shown


def test_half_precision_models_are_calibrated_and_stored_in_their_dtype(
    make_model: MakeModel, sentences: Path, tmp_path: Path
) -> None:
    build_model().half().save_pretrained(tmp_path / "half")
    build_tokenizer().save_pretrained(tmp_path / "half")
    for method in ("fwsvd", "drone"):
        compress(tmp_path / "half", tmp_path / method, method=method, task="sst2", calib_data=str(sentences))
        assert {p.dtype for p in load_compressed(tmp_path / method).parameters()} == {torch.float16}


def test_one_sample_is_enough_and_the_report_says_what_it_leaves_open(
    make_model: MakeModel, sentences: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="flashsvd"):
        report = run_compress(
            CompressConfig(
                model=str(make_model()),
                method="drone",
                ratio=0.75,
                task="sst2",
                calib_data=str(sentences),
                calib_samples=1,
                device="cpu",
                output=str(tmp_path / "out"),
            )
        )
    noted = [matrix for matrix in report.matrices if matrix.note]
    assert noted
    assert any("standard SVD the others" in message for message in caplog.messages)
    assert "degenerate statistics" in "\n".join(report.summary())


def test_zero_gradients_are_reported(make_model: MakeModel, sentences: Path, tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        model.classifier.weight.zero_()
    model.save_pretrained(tmp_path / "deaf")
    build_tokenizer().save_pretrained(tmp_path / "deaf")
    common = {"task": "sst2", "calib_data": str(sentences), "device": "cpu", "ratio": 0.5}
    report = run_compress(
        CompressConfig(model=str(tmp_path / "deaf"), method="fwsvd", output=str(tmp_path / "a"), **common)
    )
    assert all(matrix.note for matrix in report.matrices if matrix.rank is not None)
    compress(tmp_path / "deaf", tmp_path / "b", method="standard")
    for ours, standard in zip(
        load_compressed(tmp_path / "a").parameters(), load_compressed(tmp_path / "b").parameters(), strict=True
    ):
        torch.testing.assert_close(ours, standard)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "standard", "alpha": 0.5}, "alpha is an option of method asvd, not of standard"),
        ({"method": "drone", "asvd_search": True}, "asvd_search is an option of method asvd, not of drone"),
        ({"method": "fwsvd", "adasvd_base": "drone"}, "adasvd_base is an option of method adasvd"),
        ({"method": "asvd", "alpha": -1.0}, "alpha must be a number from 0 to 2, got -1.0"),
        ({"method": "asvd", "alpha": float("nan")}, "alpha must be a number from 0 to 2"),
        ({"method": "adasvd", "adasvd_base": "asvd"}, "adasvd_base 'asvd' is not known"),
        ({"method": "drone", "calib_samples": 0}, "calib_samples must be at least 1"),
        ({"method": "drone", "calib_batch_size": 0}, "calib_batch_size must be at least 1"),
        ({"method": "drone", "calib_seq_len": 4096}, "calib_seq_len 4096 is above 40"),
        (
            {"method": "drone", "calib_data": "/no/where"},
            "there is no file or directory /no/where; give one with calib_data",
        ),
        ({"method": "drone", "stats": "a", "save_stats": "b"}, "leave out one of them"),
        ({"method": "standard", "stats": "a"}, "stats is not used: standard needs no statistics"),
        ({"method": "standard", "save_stats": "a"}, "save_stats is not used: standard needs no statistics"),
        ({"method": "asvd", "asvd_search": True, "ratio": None, "ranks_json": "a"}, "leave out one of them"),
        (
            {"method": "drone", "rank_steps": "fine", "ratio": None, "rank": 4},
            "rank_steps fine is for ranks that are",
        ),
        ({"method": "drone", "calib_seq_len": 2}, "calib_seq_len 2 is below 3"),
        ({"method": "drone", "stats": "/no/where"}, r"holds no statistics\.json"),
        ({"method": "drone", "ranks_json": "/no/where"}, "ranks_json gives the rank of each matrix; leave out"),
        ({"method": "drone", "ranks_json": "/no/where", "ratio": None}, "there is no file /no/where"),
    ],
)
def test_what_cannot_be_done_is_refused(
    make_model: MakeModel, sentences: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FlashSVDError, match=says):
        compress(make_model(), tmp_path / "out", **({"task": "sst2", "calib_data": str(sentences)} | options))
    assert not (tmp_path / "out").exists()


def test_statistics_and_checkpoint_may_not_lie_in_each_other(
    make_model: MakeModel, sentences: Path, tmp_path: Path
) -> None:
    for place in ("out", "out/stats"):
        with pytest.raises(ConfigError, match="lie in each other"):
            compress(
                make_model(), tmp_path / "out", method="drone", task="sst2", calib_data=str(sentences),
                save_stats=str(tmp_path / place),
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"problem_type": "multi_label_classification"}, "was trained for multi_label_classification with 2 labels"),
        ({"pad_token_id": None}, "names no pad_token_id"),
    ],
)
def test_a_classifier_that_cannot_be_calibrated_is_refused(
    make_model: MakeModel, sentences: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    source = make_model()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(DataError, match=says):
        compress(source, tmp_path / "out", method="fwsvd", task="sst2", calib_data=str(sentences))


def test_masking_needs_a_mask_token(make_model: MakeModel, text: Path, tmp_path: Path) -> None:
    source = make_model("bert", "masked-lm")
    build_tokenizer().save_pretrained(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"mask_token": None}))
    with pytest.raises(ModelError, match="has no mask token"):
        compress(source, tmp_path / "out", method="fwsvd", calib_data=str(text))


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_gradients_need_a_loss(make_model: MakeModel, text: Path, tmp_path: Path, name: str) -> None:
    source = make_model(name, "base")
    with pytest.raises(
        ConfigError, match=r"fwsvd differentiates a loss, and .* has none by itself; .* with task: similarity"
    ):
        compress(source, tmp_path / "out", method="fwsvd", calib_data=str(text))
    text.with_suffix(".tsv").write_text("sentence1\tsentence2\tlabel\na man\ta dog\t3\n")
    with pytest.raises(DataError, match=r"lacks the column text; .* name it with task: similarity"):
        compress(source, tmp_path / "out", method="drone", calib_data=str(text.with_suffix(".tsv")))
    info = compress(make_model(name, "masked-lm", name="mlm"), tmp_path / "out", method="fwsvd", calib_data=str(text))
    assert info.calibration is not None
    assert info.calibration["kind"] == "masked-lm"


def test_a_tokenizer_of_another_model_is_refused(make_model: MakeModel, text: Path, tmp_path: Path) -> None:
    source = make_model("bert", "base", vocab_size=18)
    with pytest.raises(ModelError, match="gives token 19, but the model knows 18"):
        compress(source, tmp_path / "out", method="drone", calib_data=str(text))


def test_a_directory_without_training_data_is_refused(make_model: MakeModel, sentences: Path, tmp_path: Path) -> None:
    (sentences / "train.tsv").rename(sentences / "validation.tsv")
    with pytest.raises(DataError, match="holds no train file"):
        compress(make_model(), tmp_path / "out", method="drone", task="sst2", calib_data=str(sentences))


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ({"encoder.layer.0.output.dense": None}, "no rank is given for bert.encoder.layer.0.attention.self.query"),
        ({"nothing": 3}, "ranks are given for nothing"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_refused(
    make_model: MakeModel, tmp_path: Path, ranks: dict[str, int | None], says: str
) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps({"qkv": "joint", "ranks": ranks if "nothing" in ranks else {}}))
    with pytest.raises(ConfigError, match=says):
        compress(make_model(), tmp_path / "out", ratio=None, ranks_json=str(file))
    with pytest.raises(ConfigError, match="holds ranks for qkv joint"):
        compress(make_model(name="b"), tmp_path / "out", ratio=None, ranks_json=str(file), qkv="per-head")


def test_a_sixth_method_is_one_entry(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sixth = dataclasses.replace(get_method("standard"), name="sixth", aliases=("six",))
    monkeypatch.setitem(METHODS, "sixth", sixth)
    assert compress(make_model(), tmp_path / "out", method="six").method == "sixth"


def test_the_former_place_of_the_method_type_still_works_and_says_where_it_went() -> None:
    sys.modules.pop("flashsvd.compression.method", None)
    with pytest.warns(DeprecationWarning, match=r"moved to flashsvd\.methods\.method"):
        former = importlib.import_module("flashsvd.compression.method")
    assert former.Method is Method
    assert former.Statistics is Statistics
