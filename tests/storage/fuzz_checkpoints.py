"""Opens damaged checkpoints in five ways, each in a process of its own, and counts what goes wrong.

    python tests/storage/fuzz_checkpoints.py --cases 1000

Right is the same outputs as before, or a refusal of one line. Wrong are other outputs, a traceback, several lines, a
control character on the terminal, more than a minute, and more than 3 GiB of memory. Counted apart are
tokenizer files of which `eval` says that they are others than were saved, and a config.json that fills the memory or
the stack of plain `from_pretrained`, which reads it before it asks flashsvd.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
# Read when tqdm is imported, by torch; and by transformers.
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from damage import Damage, draw
from transformers import AutoModel

from conftest import build_model, build_tokenizer
from flashsvd import CompressConfig, FlashSVDError, export_dense, load_compressed, run_compress
from flashsvd.cli import main as flashsvd

SECONDS, BYTES = 60, 3 * 2**30
PAIRS = ("a man eats.\ta dog runs.\t1.0", "a good movie\ta very good film\t4.5", "the dog\ta dog in the movie\t3.2",
         "not bad\tbad\t0.7", "a woman runs\ta man runs very\t2.9")  # fmt: skip


def make_checkpoint(scratch: Path) -> Path:
    """A compressed sentence encoder with all kinds of files, and `pairs.tsv` beside it."""
    dense, out = scratch / "dense", scratch / "checkpoint"
    build_model(head="base").save_pretrained(dense)
    build_tokenizer().save_pretrained(dense)
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
    (dense / "modules.json").write_text(json.dumps(modules))
    (scratch / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *PAIRS]) + "\n")
    run_compress(CompressConfig(model=str(dense), ratio=0.5, output=str(out)))
    return out


class WrongError(Exception):
    """What nobody should see."""


class ToldError(Exception):
    """Other outputs, of which the command said why: somebody may have wanted them."""


class BeforeUsError(Exception):
    """What transformers does with a file before it asks what flashsvd has to say of it."""


def outputs(model: Any) -> list[float]:
    tokens = torch.arange(5, 17).reshape(2, 6)
    with torch.inference_mode():
        values: list[float] = model.eval()(tokens)[0].flatten().tolist()
    return values


def by_load_compressed(checkpoint: Path) -> Any:
    return outputs(load_compressed(checkpoint))


def by_from_pretrained(checkpoint: Path) -> Any:
    try:
        return outputs(AutoModel.from_pretrained(checkpoint))
    except FlashSVDError:
        raise
    except Exception as error:
        # What transformers reads before it asks us, it refuses in its own words, or does not.
        if isinstance(error, (MemoryError, RecursionError)):
            raise BeforeUsError from error
        raise FlashSVDError(f"{type(error).__name__}: {error}") from error


def by_info(checkpoint: Path) -> Any:
    _command("info", str(checkpoint))
    return _command("info", str(checkpoint), "--json") and None


def by_eval(checkpoint: Path) -> Any:
    data = ["--data", str(checkpoint.parent / "pairs.tsv"), "--seq-len", "16", "--device", "cpu", "--json"]
    return json.loads(_command("eval", "--checkpoint", str(checkpoint), "--task", "similarity", *data))["metrics"]


def by_export_dense(checkpoint: Path) -> Any:
    export_dense(checkpoint, checkpoint.parent / "export")
    return outputs(AutoModel.from_pretrained(checkpoint.parent / "export"))


WAYS: dict[str, Callable[[Path], Any]] = {
    "load_compressed": by_load_compressed,
    "from_pretrained": by_from_pretrained,
    "info": by_info,
    "eval": by_eval,
    "export_dense": by_export_dense,
}


def _command(*arguments: str) -> str:
    """What a command prints."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = flashsvd(arguments)
    printed, said = (_read(stream) for stream in (out, err))
    for text in (printed, said):
        if odd := [c for c in text if c != "\n" and not c.isprintable()]:
            raise WrongError(f"{odd[0]!r} on the terminal")
        # JSON says all that there is.
        if longest := [line for line in text.splitlines() if len(line) > 2000 and "--json" not in arguments]:
            raise WrongError(f"a line of {len(longest[0])} characters")
    if code == 0:
        if "is not the file that was saved" in said:
            raise ToldError(said)
        return printed
    if code != 2 or len(said.splitlines()) != 1 or printed.strip():
        raise WrongError(f"code {code}, {said[-300:]!r}, {printed[-100:]!r}")
    raise FlashSVDError(said)


def _read(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]  # a BytesIO


def verdict(way: Callable[[Path], Any], checkpoint: Path, before: Any) -> str:
    """What came of one way to open it: `same`, `refused: ...`, or what is wrong."""
    try:
        after = way(checkpoint)
    except FlashSVDError as error:
        text = str(error)
        return f"refused: {text}" if text.strip() and "\n" not in text.strip() else f"several lines: {text[:200]!r}"
    except ToldError:
        return "told"
    except BeforeUsError:
        return "before us"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "same" if after == before else "other outputs"


def in_process(work: Callable[[], str]) -> str:
    """What a function returns in a process that may take so much time and memory."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, used + BYTES))
        # Stop every other output here.
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        with contextlib.suppress(BaseException):
            os.write(writer, work().encode("utf-8", "backslashreplace")[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        said = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if code == 0 and said else "a hang" if code == -signal.SIGALRM else f"ended with {code}: {said}"


def open_damaged(original: Path, damage: Damage, before: dict[str, Any]) -> dict[str, str]:
    """What comes of each way to open a copy of a checkpoint after damage."""
    found = {}
    with tempfile.TemporaryDirectory(dir=original.parent) as folder:
        checkpoint = Path(folder) / "checkpoint"
        shutil.copytree(original, checkpoint)
        shutil.copyfile(original.parent / "pairs.tsv", Path(folder) / "pairs.tsv")
        damage.do(checkpoint)
        for name, way in WAYS.items():
            found[name] = in_process(functools.partial(verdict, way, checkpoint, before[name]))
    return found


def before_damage(original: Path) -> dict[str, Any]:
    """The outputs of each way to open a checkpoint."""
    found = {name: way(original) for name, way in WAYS.items()}
    shutil.rmtree(original.parent / "export")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many checkpoints are damaged")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    parser.add_argument("--all", action="store_true", help="print what came of each, not only what is wrong")
    options = parser.parse_args(arguments)
    counts = {"same": 0, "refused": 0, "told": 0, "before us": 0, "wrong": 0}
    with tempfile.TemporaryDirectory() as scratch:
        original = make_checkpoint(Path(scratch))
        before = before_damage(original)
        for seed in range(options.first, options.first + options.cases):
            damage = draw(seed, original)
            for way, said in open_damaged(original, damage, before).items():
                outcome = said.partition(":")[0]
                counts[outcome if outcome in counts else "wrong"] += 1
                if outcome not in counts or options.all:
                    print(f"seed {seed}, {damage.name}, {way}: {said}", flush=True)
    ways = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{options.cases} damaged checkpoints, opened in {len(WAYS)} ways each: {ways}")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
