"""Everything that cannot work is refused with one line, and leaves nothing half-written behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from conftest import MakeModel
from flashsvd import CompressConfig, EvalConfig, FlashSVDError, load_compressed, run_compress, run_eval
from flashsvd.cli import main
from flashsvd.errors import CheckpointError, ConfigError, ModelError
from processes import running, until


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flashsvd", *map(str, arguments)]


def rewrite_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by name; None removes one."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


FACTOR = "bert.encoder.layer.0.attention.self.query.u.weight"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "0"], "--rank must be at least 1"),
        (["--rank", "-5"], "--rank must be at least 1"),
        (["--rank", "abc"], "'abc' is not a whole number"),
        (["--rank", "1.5"], "'1.5' is not a whole number"),
        (["--rank", "5000"], "full rank of bert.encoder.layer.0.attention.self.query"),
        (["--rank-attn", "8", "--rank-ffn", "99", "--rank-wo", "8"], "lower --rank-ffn"),
        (["--ratio", "0"], "--ratio must lie strictly between 0 and 1"),
        (["--ratio", "1.5"], "--ratio must lie strictly between 0 and 1"),
        (["--ratio", "nan"], "--ratio must be a number"),
        (["--ratio", "half"], "'half' is not a number"),
        (["--ratio", "0.5", "--rank", "8"], "leave out --rank"),
        ([], "no ranks given"),
        (["--rank-attn", "8"], "--rank-ffn and --rank-wo missing"),
        (["--ratio", "0.5", "--method", "magic"], "--method 'magic' is not known"),
        (["--ratio", "0.5", "--task", "sst3"], "--task 'sst3' is not known"),
        (["--ratio", "0.5", "--task", "mnli"], "mnli needs 3 classes"),
        (["--ratio", "0.5", "--qkv", "both"], "invalid choice: 'both'"),
        (["--ratio", "0.5", "--device", "tpu"], "--device 'tpu' is not"),
        (["--ratio", "0.5", "--frobnicate"], "--frobnicate"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    full = ["compress", "--model", str(make_model()), "--output", str(tmp_path / "out"), *arguments]
    try:
        code: object = main(full)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device; use device cpu"):
        run_compress(CompressConfig(model=str(make_model()), ratio=0.5, device="cuda"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/dir", "there is no directory './no/such/dir'"),
        ("nobody/no-such-model", "cannot get 'nobody/no-such-model' from the hub"),
        ("", "model must be a name"),
    ],
)
def test_an_unknown_model_is_named(name: str, says: str) -> None:
    with pytest.raises(FlashSVDError, match=says):
        run_compress(CompressConfig(model=name, ratio=0.5))


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        run_compress(CompressConfig(model=str(tmp_path), ratio=0.5))


@pytest.mark.parametrize("model_type", ["t5", "no-such-architecture"])
def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=f"'{model_type}' is not supported; supported are bert, roberta"):
        run_compress(CompressConfig(model=str(tmp_path), ratio=0.5))


def test_nan_weights_are_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    name = "bert.encoder.layer.1.output.dense.weight"
    rewrite_weights(source, **{name: torch.full((32, 48), float("nan"))})
    with pytest.raises(ModelError, match=f"{name} holds NaN"):
        run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_dense_model_that_lacks_encoder_weights_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    rewrite_weights(source, **{"bert.encoder.layer.1.output.dense.weight": None})
    with pytest.raises(ModelError, match=r"lacks the weights of bert\.encoder.layer.1.output.dense.weight"):
        run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))


def test_a_compressed_model_is_not_compressed_again(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is compressed already"):
        run_compress(CompressConfig(model=str(checkpoint), ratio=0.5, output=str(tmp_path / "twice")))


def test_an_existing_output_is_kept_unless_told(make_model: MakeModel, checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    config = {"model": str(checkpoint.parent / "dense"), "rank": 4, "output": str(checkpoint)}
    with pytest.raises(CheckpointError, match="exists; pass overwrite=True"):
        run_compress(CompressConfig(**config))
    assert (checkpoint / "model.safetensors").read_bytes() == before
    run_compress(CompressConfig(**config, overwrite=True))
    assert (checkpoint / "model.safetensors").read_bytes() != before


def test_overwrite_never_replaces_what_is_no_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds nothing that flashsvd wrote, which overwrite=True will not"):
        run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(precious), overwrite=True))
    assert (precious / "letters.txt").read_text() == "dear"


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(checkpoint: Path) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    # A limit on file size fails the write itself, as a full disk does.
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "from flashsvd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [
        "compress",
        "--model",
        checkpoint.parent / "dense",
        "--rank",
        "4",
        "--output",
        checkpoint,
        "--overwrite",
    ]
    # Without coverage's own data file, which would meet the limit too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    result = subprocess.run(
        [sys.executable, "-c", limited, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2, result.stderr
    assert f"cannot write {checkpoint}" in result.stderr.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["dense", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_saving_leaves_the_old_checkpoint(checkpoint: Path, kill: signal.Signals) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    # Stops in the middle of saving: weights written, metadata not.
    stalled = (
        "import sys, time, flashsvd.storage.metadata as m; m.CompressionInfo.write = lambda *_: time.sleep(120); "
        "from flashsvd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [
        "compress",
        "--model",
        checkpoint.parent / "dense",
        "--rank",
        "4",
        "--output",
        checkpoint,
        "--overwrite",
    ]
    with running([sys.executable, "-c", stalled, *arguments], stderr=subprocess.PIPE) as process:
        until(lambda: list(checkpoint.parent.glob(".out.writing-*/tokenizer.json")), process)
        process.send_signal(kill)
        process.communicate(timeout=60)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    leftovers = list(checkpoint.parent.glob(".out.*"))
    assert leftovers == [] or kill is signal.SIGKILL
    load_compressed(checkpoint)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read .* truncated or damaged"):
        load_compressed(checkpoint)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({FACTOR: None}, f"lacks the tensor {FACTOR}"),
        ({FACTOR: torch.zeros(3, 32)}, rf"tensor {FACTOR} is \[3, 32\]"),
        ({"classifier.weight": None}, "lacks the tensor classifier.weight"),
        ({"classifier.weight": torch.zeros(5, 32)}, "classifier.weight"),
        ({"bert.extra.weight": torch.zeros(2)}, "holds the tensor bert.extra.weight, which the model has no place for"),
        (
            {FACTOR.replace(".u.", "."): torch.zeros(32, 32)},
            r"query\.weight is \[32, 32\], the dense weight of a layer",
        ),
    ],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(
    checkpoint: Path, changes: dict[str, torch.Tensor | None], says: str
) -> None:
    rewrite_weights(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=says):
        load_compressed(checkpoint)


@pytest.mark.parametrize("tensor", [None, torch.zeros(3, 32)])
def test_plain_from_pretrained_refuses_a_bad_factor_too(checkpoint: Path, tensor: torch.Tensor | None) -> None:
    rewrite_weights(checkpoint, **{FACTOR: tensor})
    with pytest.raises(CheckpointError, match=FACTOR):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)


def test_an_index_that_points_outside_is_refused(checkpoint: Path) -> None:
    outside = checkpoint.parent / "elsewhere.safetensors"
    shutil.move(checkpoint / "model.safetensors", outside)
    names = load_file(outside)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lies outside"):
        load_compressed(checkpoint)
    with pytest.raises(CheckpointError, match="lies outside"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks the shard model-00001-of-00002"):
        load_compressed(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_unreadable_metadata_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "compression_info.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"compression_info\.json"):
        load_compressed(checkpoint)


def test_a_dense_directory_is_no_checkpoint(make_model: MakeModel) -> None:
    with pytest.raises(CheckpointError, match="holds a dense model; give a directory that `flashsvd compress` wrote"):
        load_compressed(make_model())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "nope"}, "task 'nope' is not known"),
        ({"task": "sst2", "data": "/no/such/file.tsv"}, "there is no file or directory /no/such/file.tsv"),
        ({"task": "rte"}, "lacks the columns sentence1, sentence2"),
        ({"task": "sst2", "seq_len": 4096}, "seq_len 4096 is above 40"),
        ({"task": "sst2", "batch_size": 0}, "batch_size must be at least 1"),
        ({"task": "sst2", "checkpoint": "/no/where"}, "there is no directory '/no/where'"),
    ],
)
def test_eval_refuses_in_one_line(checkpoint: Path, tmp_path: Path, options: dict[str, object], says: str) -> None:
    data = tmp_path / "x.tsv"
    data.write_text("sentence\tlabel\na good movie\t1\n")
    with pytest.raises(FlashSVDError, match=says):
        run_eval(EvalConfig(**({"checkpoint": str(checkpoint), "data": str(data), "seq_len": 16} | options)))


def test_eval_refuses_labels_the_model_has_no_class_for(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "x.tsv"
    data.write_text("premise\thypothesis\tlabel\na\tb\t2\n")
    with pytest.raises(FlashSVDError, match="head for 2 labels, but mnli needs 3 classes"):
        run_eval(EvalConfig(checkpoint=str(checkpoint), task="mnli", data=str(data), seq_len=16))


def test_eval_refuses_a_model_whose_outputs_are_not_finite(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    rewrite_weights(source, **{"classifier.weight": torch.full((2, 32), float("inf"))})
    data = tmp_path / "x.tsv"
    data.write_text("sentence\tlabel\na good movie\t1\n")
    with pytest.raises(FlashSVDError, match="outputs are NaN or infinite"):
        run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=str(data), seq_len=16))


def test_a_place_that_cannot_be_written_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; choose another output"):
        run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(tmp_path / "file" / "out")))
