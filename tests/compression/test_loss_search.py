"""Ranks by the loss: what a direction is said to cost, and the search with every method on small models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import WORDS, MakeModel, build_decoder, build_model, build_tokenizer
from flashsvd import CompressConfig, load_compressed, read_info, run_compress
from flashsvd.compression.loss_search import truncation_losses
from flashsvd.errors import ConfigError, FlashSVDError, ModelError
from flashsvd.lowrank.ranks import RANK_STEPS
from flashsvd.methods import adasvd
from flashsvd.methods.method import Statistics
from flashsvd.methods.rank_search import with_rank_search
from flashsvd.methods.registry import METHODS, get_method
from flashsvd.storage.metadata import CompressionInfo
from training_data import write_text

BY_LOSS = sorted(set(METHODS) - {"adasvd"})


def expected_growth(x: Tensor, g: Tensor, change: Tensor) -> float:
    """E (g . x D)^2 / 2 over every input x [n, in] with every gradient g [m, out], for a change D of the weight."""
    return float((x @ change @ g.T).square().mean() / 2)


def rows(count: int, width: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)


@pytest.mark.parametrize("method", ["standard", "drone"])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 9), (9, 6)])
def test_a_direction_costs_what_the_loss_grows_by_without_it(method: str, inputs: int, outputs: int) -> None:
    x, g, weight = rows(40, inputs, 0), rows(50, outputs, 1), rows(inputs, outputs, 2)
    covariance = x.T @ x / len(x)
    factors = get_method(method).factorize(weight, 6, Statistics(covariance))
    losses = truncation_losses(factors, covariance, g.T @ g / len(g))
    assert len(losses) == 7
    assert losses[6] == 0
    for k in range(6):
        alone = expected_growth(x, g, torch.outer(factors.u[:, k], factors.v[k]))
        torch.testing.assert_close(losses[k] - losses[k + 1], torch.tensor(alone, dtype=torch.float64))


def test_of_drones_directions_the_sum_is_what_leaving_out_all_of_them_costs() -> None:
    """Their inputs x u_k are uncorrelated, so that their cross terms are zero."""
    x, g, weight = rows(40, 7, 0), rows(50, 8, 1), rows(7, 8, 2)
    covariance = x.T @ x / len(x)
    factors = METHODS["drone"].factorize(weight, 7, Statistics(covariance))
    losses = truncation_losses(factors, covariance, g.T @ g / len(g))
    for rank in range(7):
        together = expected_growth(x, g, factors.u[:, rank:] @ factors.v[rank:])
        torch.testing.assert_close(losses[rank], torch.tensor(together, dtype=torch.float64))


def test_heads_that_share_a_rank_lose_together() -> None:
    x, weight = rows(40, 5, 0), torch.stack([rows(5, 4, 2), rows(5, 4, 3)])
    covariance = x.T @ x / len(x)
    gradients = torch.stack([g.T @ g / len(g) for g in (rows(50, 4, 4), rows(50, 4, 5))])
    statistics = Statistics(covariance, output_gradients=gradients)
    together = truncation_losses(METHODS["drone"].factorize(weight, 4, statistics), covariance, gradients)
    apart = [
        truncation_losses(METHODS["drone"].factorize(w, 4, statistics), covariance, s)
        for w, s in zip(weight, gradients, strict=True)
    ]
    torch.testing.assert_close(together, apart[0] + apart[1])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text") / "train.txt"


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """Labelled training sentences."""
    generator = torch.Generator().manual_seed(0)
    lines = ["sentence\tlabel"]
    for _ in range(24):
        words = [WORDS[int(i)] for i in torch.randint(0, len(WORDS), (6,), generator=generator)]
        lines.append(f"{' '.join(words)}\t{int('good' in words)}")
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "train.tsv"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return saved(build_decoder("llama", hidden_size=64, intermediate_size=128), tmp_path / "decoder")


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def compress(source: Path, output: Path, data: Path | None = None, **options: Any) -> CompressionInfo:
    defaults = {"ratio": 0.5, "device": "cpu", "calib_batch_size": 4, "calib_samples": 16}
    given = {} if data is None else {"calib_data": str(data)}
    return run_compress(CompressConfig(model=str(source), output=str(output), **(defaults | given | options))).info


def is_within_budget(info: CompressionInfo, ratio: float = 0.5) -> bool:
    kept = info.parameters["target_compressed"] / info.parameters["target_dense"]
    return 0.99 * ratio <= kept <= ratio


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("method", BY_LOSS)
def test_every_method_takes_ranks_by_the_loss_on_a_decoder(
    decoder: Path, text: Path, tmp_path: Path, method: str, qkv: str
) -> None:
    options = {"method": method, "qkv": qkv, "calib_seq_len": 16}
    info = compress(decoder, tmp_path / "out", text, rank_search="loss", **options)
    assert (info.method, info.rank_search) == (method, "loss")
    assert is_within_budget(info)
    assert info.module_ranks != compress(decoder, tmp_path / "uniform", text, **options).module_ranks
    ids = torch.tensor([[5, 6, 7]])
    assert load_compressed(tmp_path / "out", device="cpu")(ids).logits.isfinite().all()


@pytest.mark.parametrize("steps", RANK_STEPS)
@pytest.mark.parametrize("method", BY_LOSS)
def test_every_method_takes_ranks_by_the_loss_on_a_classifier(
    make_model: MakeModel, sentences: Path, tmp_path: Path, method: str, steps: str
) -> None:
    source = make_model(hidden_size=64, intermediate_size=128)
    info = compress(
        source, tmp_path / "out", sentences, method=method, rank_search="loss", rank_steps=steps, task="sst2"
    )
    assert (info.rank_steps, info.rank_search) == (steps, "loss")
    assert is_within_budget(info)


def test_the_layers_that_the_loss_does_not_feel_give_their_parameters_to_the_others(text: Path, tmp_path: Path) -> None:
    model = build_decoder("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            projection.weight.mul_(1e-3)
    source = saved(model, tmp_path / "decoder")
    info = compress(source, tmp_path / "out", text, method="drone", rank_search="loss", calib_seq_len=16)

    def kept(layer: int) -> float:
        ranks = [r for name, r in info.module_ranks.items() if f"layers.{layer}." in name]
        return sum(64 if rank is None else rank for rank in ranks)

    assert kept(1) < 0.5 * min(kept(0), kept(2))


def test_ranks_given_by_role_say_how_large_the_budget_is(decoder: Path, text: Path, tmp_path: Path) -> None:
    options = {"ratio": None, "rank_attn": 8, "rank_ffn": 16, "rank_wo": 16, "method": "drone", "calib_seq_len": 16}
    given = compress(decoder, tmp_path / "given", text, **options)
    found = compress(decoder, tmp_path / "found", text, rank_search="loss", **options)
    budget = given.parameters["target_compressed"]
    assert 0.99 * budget <= found.parameters["target_compressed"] <= budget
    assert given.rank_search is None
    assert found.rank_search == "loss"


def test_the_ranks_found_are_written_and_serve_again(decoder: Path, text: Path, tmp_path: Path) -> None:
    info = compress(decoder, tmp_path / "out", text, rank_search="loss", calib_seq_len=16)
    ranks = tmp_path / "out" / "ranks.json"
    assert json.loads(ranks.read_text())["ranks"] == info.module_ranks
    again = compress(decoder, tmp_path / "again", ratio=None, ranks_json=str(ranks))
    assert again.module_ranks == info.module_ranks
    assert again.rank_search is None


def test_the_search_reads_its_statistics_again_and_no_data_then(decoder: Path, text: Path, tmp_path: Path) -> None:
    stats = str(tmp_path / "stats")
    options = {"method": "standard", "rank_search": "loss"}
    first = compress(decoder, tmp_path / "out", text, save_stats=stats, calib_seq_len=16, **options)
    text.unlink()
    assert compress(decoder, tmp_path / "again", stats=stats, **options).module_ranks == first.module_ranks


def test_statistics_without_gradients_by_the_outputs_are_refused(decoder: Path, text: Path, tmp_path: Path) -> None:
    stats = str(tmp_path / "stats")
    compress(decoder, tmp_path / "out", text, method="drone", save_stats=stats, calib_seq_len=16)
    with pytest.raises(ConfigError, match=r"holds no output_gradients of .*; calibrate again without stats"):
        compress(decoder, tmp_path / "again", method="drone", stats=stats, rank_search="loss")


@pytest.mark.parametrize(
    ("options", "search"),
    [
        ({"method": "drone"}, "uniform"),
        ({"method": "drone", "rank_search": "uniform"}, "uniform"),
        ({"method": "drone", "rank_search": "loss"}, "loss"),
        ({"method": "standard", "rank_search": "learned"}, "learned"),
        ({"method": "adasvd"}, "learned"),
        ({"method": "adasvd", "rank_search": "learned"}, "learned"),
        ({"method": "asvd", "asvd_search": True}, "sensitivity"),
    ],
)
def test_the_checkpoint_says_which_search_it_was(
    decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], search: str
) -> None:
    monkeypatch.setattr(adasvd, "STEPS", 4)
    data = {"calib_data": str(text), "calib_samples": 16, "calib_seq_len": 16, "device": "cpu"}
    report = run_compress(CompressConfig(str(decoder), ratio=0.5, output=str(tmp_path / "out"), **data, **options))
    assert report.info.rank_search == search
    assert (f"rank search {search}" in str(report)) == (search != "uniform")
    assert f"rank search {search}" in str(read_info(tmp_path / "out"))
    assert f"rank search {search}" in (tmp_path / "out" / "README.md").read_text()
    # What transformers' own save_pretrained keeps is the config, which says so too.
    (tmp_path / "out" / "compression_info.json").unlink()
    assert read_info(tmp_path / "out").compression.rank_search == search


def test_learned_ranks_are_adasvds_over_the_method(
    decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adasvd, "STEPS", 20)
    options = {"calib_seq_len": 16}
    ada = compress(decoder, tmp_path / "ada", text, method="adasvd", adasvd_base="drone", **options)
    learned = compress(decoder, tmp_path / "learned", text, method="drone", rank_search="learned", **options)
    assert learned.module_ranks == ada.module_ranks
    assert learned.method == "drone"


@pytest.mark.parametrize("method", BY_LOSS)
def test_every_methods_ranks_can_be_learned(
    decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(adasvd, "STEPS", 4)
    info = compress(decoder, tmp_path / "out", text, method=method, rank_search="learned", calib_seq_len=16)
    assert is_within_budget(info)


def test_uniform_ranks_are_those_of_no_search(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(hidden_size=64, intermediate_size=128)
    named, silent = (
        compress(source, tmp_path / name, rank_search=search) for name, search in (("a", "uniform"), ("b", None))
    )
    assert named == dataclasses.replace(silent, timestamp=named.timestamp, digests=named.digests)
    assert named.calibration is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"method": "adasvd", "rank_search": "loss"},
            "method adasvd learns the ranks; for loss ones .* method drone rank_search loss",
        ),
        (
            {"method": "ada", "adasvd_base": "fwsvd", "rank_search": "uniform"},
            "for uniform ones .* method fwsvd rank_search uniform",
        ),
        *(
            (
                {"method": "asvd", "asvd_search": True, "rank_search": search},
                "asvd_search=True looks for the ranks, and so does rank_search; leave out one of them",
            )
            for search in ("uniform", "loss", "learned")
        ),
        *(
            (
                {"ranks_json": "ranks.json", "ratio": None, "rank_search": search},
                "ranks_json gives the ranks that rank_search would look for",
            )
            for search in ("uniform", "loss", "learned")
        ),
        ({"method": "adasvd", "ranks_json": "a", "ratio": None, "rank_search": "learned"}, "ranks_json gives the"),
        ({"rank_search": "best"}, "rank_search .best. is not known; choose from uniform, loss, learned"),
        ({"rank_search": "learned", "save_stats": "a"}, "save_stats is not used: standard needs no statistics"),
        ({"rank_search": "loss", "ratio": 1e-4}, "ratio 0.0001 is less than rank 1 everywhere"),
    ],
)
def test_what_does_not_go_together_is_refused(
    make_model: MakeModel, sentences: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(FlashSVDError, match=says):
        compress(make_model(), tmp_path / "out", sentences, task="sst2", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["standard", "drone"])
def test_of_a_model_without_a_loss_the_outputs_say_what_a_rank_is_worth(
    make_model: MakeModel, text: Path, tmp_path: Path, method: str
) -> None:
    info = compress(make_model("bert", "base"), tmp_path / "out", text, method=method, rank_search="loss")
    assert info.rank_search == "loss"
    assert is_within_budget(info)


def test_a_method_that_weighs_by_a_loss_is_refused_without_one(
    make_model: MakeModel, text: Path, tmp_path: Path
) -> None:
    source = make_model("bert", "base")
    with pytest.raises(ConfigError, match=r"fwsvd differentiates a loss, and .* has none by itself; .* task"):
        compress(source, tmp_path / "out", text, method="fwsvd", rank_search="loss")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_loss_does_not_depend_on_its_layers_is_refused(sentences: Path, tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        model.classifier.weight.zero_()
    source = saved(model, tmp_path / "deaf")
    with pytest.raises(ModelError, match="the loss does not depend on what is to be factored"):
        compress(source, tmp_path / "out", sentences, rank_search="loss", task="sst2")
    assert not (tmp_path / "out").exists()


def test_what_is_asked_of_no_method_changes_none() -> None:
    for method in METHODS.values():
        assert with_rank_search(method, None) is method


def test_checkpoints_of_two_searches_have_directories_of_their_own() -> None:
    names = {
        CompressConfig("bert", ratio=0.5, rank_search=search).output_directory("drone").name
        for search in (None, "uniform", "loss", "learned")
    }
    assert names == {"bert_drone_p0.5", "bert_drone_p0.5_loss", "bert_drone_p0.5_learned"}
