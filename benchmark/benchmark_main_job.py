"""Figures of the main job on this machine's CPU: start-up time, factoring and calibrating BERT-base, and its forward
against dense.

    make bench            or            python benchmark/benchmark_main_job.py [--output benchmark/results/x.csv]

BERT-base has random weights here: neither time nor memory depends on their values. Every figure is printed beside
what it is compared with; nothing is asserted.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FACTOR = """
import json, sys, time
import torch
from transformers.models.bert import modeling_bert
import flashsvd.compress, flashsvd.io, flashsvd.compression.result
from flashsvd.evaluation.measure import peak_resident_bytes
imported = peak_resident_bytes()
start = time.perf_counter()
report = flashsvd.run_compress(flashsvd.CompressConfig(
    model=sys.argv[1], ratio=0.5, qkv=sys.argv[3], device="cpu", output=sys.argv[2], overwrite=True))
seconds = time.perf_counter() - start
peak = peak_resident_bytes()
print(json.dumps({"factor": report.seconds, "whole": seconds, "peak": peak, "imported": imported,
                  "model": report.info.dense_bytes}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="CSV file to write as well")
    parser.add_argument("--rounds", type=int, default=15, help="timed forwards of each model (default: 15)")
    options = parser.parse_args()
    rows = [("flashsvd --help, s, median of 9", start_up_seconds())]
    with tempfile.TemporaryDirectory() as scratch:
        dense, compressed = Path(scratch) / "bert-base", Path(scratch) / "compressed"
        make_bert_base(dense)
        for qkv in ("joint", "per-head"):
            rows += [(f"{qkv}: {name}", value) for name, value in factoring(dense, compressed, qkv)]
            rows += [(f"{qkv}: {name}", value) for name, value in forwards(dense, compressed, options.rounds)]
        rows += calibrating(dense)
    device = f"{platform.processor() or platform.machine()}, {torch_threads()} threads"
    print(f"\nBERT-base, random weights, float32, {device}")
    for name, value in rows:
        print(f"{name:<72} {value:>10.3f}")
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        with Path(options.output).open("w", newline="") as file:
            csv.writer(file).writerows([("device", "figure", "value"), *((device, n, f"{v:.4f}") for n, v in rows)])


def start_up_seconds() -> float:
    def run() -> None:
        subprocess.run([sys.executable, "-m", "flashsvd", "--help"], check=True, capture_output=True)

    return statistics.median(seconds(run) for _ in range(9))


def make_bert_base(directory: Path) -> None:
    import torch
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertModel

    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(directory)


def factoring(dense: Path, output: Path, qkv: str) -> list[tuple[str, float]]:
    """In a process of its own, whose peak memory is then its own."""
    command = [sys.executable, "-c", FACTOR, str(dense), str(output), qkv]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    return [
        ("factoring at keep 0.5, s", figures["factor"]),
        ("loading, factoring and saving, s", figures["whole"]),
        ("peak resident memory over model size, libraries included", figures["peak"] / figures["model"]),
        ("the same, libraries not included", (figures["peak"] - figures["imported"]) / figures["model"]),
    ]


def forwards(dense: Path, compressed: Path, rounds: int) -> list[tuple[str, float]]:
    """Dense and compressed in turn, so that a drift of the machine's speed meets both alike."""
    import torch
    from transformers import AutoModel

    import flashsvd

    models = {"dense": AutoModel.from_pretrained(dense), "compressed": flashsvd.load_compressed(compressed)}
    tokens = torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for name in models:
            models[name](tokens)
        for _ in range(rounds):
            for name, model in models.items():
                times[name].append(seconds(lambda model=model: model(tokens)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(d / c for d, c in zip(times["dense"], times["compressed"], strict=True))
    return [
        *((f"{name} forward, batch 8 x 128, s, median of {rounds}", value) for name, value in medians.items()),
        ("dense over compressed, median of the pairs", ratio),
    ]


def calibrating(directory: Path) -> list[tuple[str, float]]:
    """One pass over 128 samples of 128 tokens, none of them padding, for each kind of statistics."""
    import torch
    from transformers.models.bert.modeling_bert import BertForSequenceClassification

    from flashsvd.calibration.collect import collect_statistics
    from flashsvd.calibration.losses import head_loss
    from flashsvd.data.tokenize import Batch
    from flashsvd.models.registry import find_targets

    model = BertForSequenceClassification.from_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(16):
        ids = torch.randint(1000, 20000, (8, 128), generator=generator)
        labels = torch.randint(0, 2, (8,), generator=generator)
        batches.append(Batch(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},), labels))
    rows = []
    for need in ("covariance", "mean_abs", "row_gradients"):

        def run(need: Any = need) -> None:
            list(collect_statistics(model, find_targets(model), batches, [need], head_loss, torch.device("cpu")))

        rows.append((f"calibrating 128 samples of 128 tokens, {need}, s", seconds(run)))
    return rows


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
