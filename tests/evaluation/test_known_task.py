"""`flashsvd eval` and what else it knows of a checkpoint: its task, and the types of its tokens."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeModel, build_tokenizer
from flashsvd import CompressConfig, EvalConfig, FinetuneConfig, read_info, run_compress, run_eval, run_finetune
from flashsvd.cli import main
from flashsvd.data.tasks import TASKS
from flashsvd.errors import ConfigError, FlashSVDError, ModelError
from training_data import SIGNS, write_task_data

SST2 = TASKS["sst2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_task_data(tmp_path / "task's data", SST2)


def compress(source: Path, output: Path, **options: Any) -> Path:
    run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(output), device="cpu", **options))
    return output


def test_the_task_of_a_compressed_checkpoint_is_its_own(make_model: MakeModel, tmp_path: Path, data: Path) -> None:
    small = compress(make_model(), tmp_path / "small", task="sst2")
    assert run_eval(EvalConfig(checkpoint=str(small), data=str(data), device="cpu")).task == "sst2"
    assert main(["eval", "--checkpoint", str(small), "--data", str(data), "--device", "cpu"]) == 0


@pytest.mark.slow
def test_the_task_of_a_trained_dense_model_is_its_last(make_model: MakeModel, tmp_path: Path, data: Path) -> None:
    output = tmp_path / "trained"
    config = FinetuneConfig(model=str(make_model()), task="sst2", data=str(data), output=str(output), epochs=0.1)
    trained = run_finetune(config)
    result = run_eval(EvalConfig(checkpoint=str(output), data=str(data), device="cpu"))
    assert result.task == "sst2"
    assert result.metrics == pytest.approx(trained.metrics)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_checkpoint_that_does_not_say_is_asked_for_its_task(
    make_model: MakeModel, tmp_path: Path, data: Path, compressed: bool
) -> None:
    source = make_model()
    checkpoint = compress(source, tmp_path / "small") if compressed else source
    with pytest.raises(ConfigError, match="which task it is for; name one that it fits with task: cola, sst2, mrpc,"):
        run_eval(EvalConfig(checkpoint=str(checkpoint), data=str(data)))


def test_drawn_examples_are_the_same_for_each_model(make_model: MakeModel, tmp_path: Path, data: Path) -> None:
    source = make_model()
    checkpoints = (source, compress(source, tmp_path / "small"))
    results = [
        run_eval(EvalConfig(checkpoint=str(c), task="sst2", data=str(data), max_eval_samples=6, seed=3, device="cpu"))
        for c in checkpoints
    ]
    assert [(result.num_eval_samples, result.seed) for result in results] == [(6, 3)] * 2
    assert "on 6 examples, drawn by seed 3" in str(results[0])
    all_of_them = run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=str(data), device="cpu"))
    assert (all_of_them.seed, "drawn" in str(all_of_them)) == (None, False)


@pytest.mark.parametrize("directory", ["plain", "with space", "it's", "$HOME"])
def test_printed_commands_can_be_pasted(
    make_model: MakeModel, tmp_path: Path, data: Path, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / directory
    arguments = ["compress", "--model", str(make_model()), "--ratio", "0.5", "--output", str(small), "--device", "cpu"]
    assert main([*arguments, "--task", "sst2", "--method", "drone", "--calib-data", str(data)]) == 0
    following = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(following) == ["flashsvd", "info", str(small)]
    command = shlex.split(str(read_info(small)).splitlines()[-1])
    # The directory that it was calibrated on has validation data too.
    assert command[1:] == ["eval", "--checkpoint", str(small), "--task", "sst2", "--data", str(data)]
    assert main(command[1:]) == 0


def test_what_was_calibrated_on_alone_is_not_to_be_scored_on(make_model: MakeModel, tmp_path: Path, data: Path) -> None:
    train = str(data / "train.tsv")
    small = compress(make_model(), tmp_path / "small", task="sst2", method="drone", calib_data=train)
    assert str(read_info(small)).endswith("--task sst2 --data VALIDATION_DATA")


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    ("steps", "reason"), [("fine", "ranks go in steps of 8 from 64 on"), ("fast", "no ranks that kernels run as fast")]
)
def test_a_ratio_that_is_not_reached_is_explained(
    make_model: MakeModel, tmp_path: Path, ratio: float, steps: str, reason: str
) -> None:
    config = CompressConfig(model=str(make_model()), ratio=ratio, rank_steps=steps, output=str(tmp_path / "out"))
    report = run_compress(config)
    kept = report.info.parameters["target_compressed"] / report.info.parameters["target_dense"]
    said = f"asked was {ratio:.1%}: {reason}" in str(report)
    assert said == (kept < ratio - 0.005)
    assert said or ratio < 0.999


@pytest.mark.parametrize("types", [1, 2])
def test_types_of_tokens_that_the_model_does_not_know_are_refused(
    make_model: MakeModel, tmp_path: Path, types: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model("roberta", type_vocab_size=types)
    # This tokenizer gives the second text of a pair a type of its own.
    build_tokenizer().save_pretrained(source)
    pairs = write_task_data(tmp_path / "pairs", TASKS["mrpc"])
    data, out = str(pairs), str(tmp_path / "out")
    doors = (
        lambda: run_eval(EvalConfig(checkpoint=str(source), task="mrpc", data=data)),
        lambda: compress(source, Path(out), task="mrpc", method="drone", calib_data=data),
        lambda: run_finetune(FinetuneConfig(model=str(source), task="mrpc", data=data, output=out, epochs=0.1)),
    )
    for door in doors if types == 1 else doors[:2]:
        if types == 2:
            door()
            continue
        with pytest.raises(ModelError, match="gives token type 1, but the model knows 1; save the model's own"):
            door()
        assert not Path(out).exists()


def test_single_texts_need_no_second_type(make_model: MakeModel, data: Path) -> None:
    source = make_model("roberta", type_vocab_size=1)
    build_tokenizer().save_pretrained(source)
    assert run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=str(data))).num_eval_samples == 16


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (["neg", "pos"], "does not give each class a name by its number"),
        ({"neg": 0, "pos": 1}, "does not give each class a name by its number"),
        ("neg", "does not give each class a name by its number"),
    ],
)
def test_classes_that_are_not_named_by_number_are_refused(
    make_model: MakeModel, data: Path, named: object, says: str
) -> None:
    source = make_model()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"id2label": named}))
    with pytest.raises(FlashSVDError, match=says):
        run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=str(data)))


@pytest.mark.parametrize("name", [None, ""])
def test_a_class_without_a_name_is_called_as_transformers_does(
    make_model: MakeModel, tmp_path: Path, name: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"id2label": {"0": name, "1": name}}))
    (tmp_path / "x.tsv").write_text(f"text\tlabel\na man runs {SIGNS[0]}\t0\na dog runs {SIGNS[1]}\t1\n")
    run_eval(EvalConfig(checkpoint=str(source), task="classification", data=str(tmp_path / "x.tsv")))
    assert "taking 0 as LABEL_0, 1 as LABEL_1" in caplog.text
