"""What may have befallen a checkpoint's files, drawn from a seed: damage of text, of JSON, of weights, of the files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
SPARSE = 6 * 2**30
# What JSON can say and no file of a model holds. Written as they stand here, since json.dumps would not write them all.
NONSENSE = {
    "null": "null", "true": "true", "negative": "-1", "a billion": "1000000000", "beyond floats": "1" + "0" * 400,
    "beyond digits": "9" * 5000, "infinite": "1e999", "NaN": "NaN", "Infinity": "-Infinity", "text": '"nonsense"',
    "empty text": '""', "endless text": f'"{"x" * 2_000_000}"', "escape codes": r'"\u001b[2J\u202e\u0007\n\u0085"',
    "half a character": r'"\ud800"', "list": "[]", "list of a number": "[1]", "object": "{}",
    "nested": "[" * 100_000 + "]" * 100_000, "nested a little": '{"a":' * 90 + "1" + "}" * 90,
}  # fmt: skip
COUNTS = (
    "num_hidden_layers", "num_labels", "vocab_size", "hidden_size", "intermediate_size", "type_vocab_size",
    "max_position_embeddings", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
# Of these no file says by itself whether they are what they were, and any number of the kind makes another model.
FREE = ("layer_norm_eps", "hidden_act", "num_attention_heads")


@dataclass(frozen=True)
class Damage:
    """What is done to a directory, and its name in a report."""

    name: str
    do: Callable[[Path], object]


def draw(seed: int, checkpoint: Path) -> Damage:
    """One damage of a checkpoint, the same for a seed."""
    rng = random.Random(seed)
    files = sorted(str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file())
    kind = rng.choice((json_value, json_value, json_value, json_lost, text, file_kind, file_kind, weights, count))
    return kind(rng, checkpoint, files)


def json_value(rng: random.Random, checkpoint: Path, files: list[str]) -> Damage:
    """Nonsense in the place of one value of a JSON file."""
    name = rng.choice([f for f in files if f.endswith(".json")])
    content = json.loads((checkpoint / name).read_text())
    path, (what, nonsense) = rng.choice(_paths(content)), rng.choice(list(NONSENSE.items()))
    return Damage(f"{name} {list(path)}: {what}", lambda directory: _set(directory / name, path, nonsense))


def count(rng: random.Random, checkpoint: Path, files: list[str]) -> Damage:
    """More layers, labels or channels than there are, whether config.json had such an entry or not."""
    name, number = rng.choice(COUNTS), rng.choice((3, 100_000, 10**9, 10**15))

    def change(directory: Path) -> None:
        content = json.loads((directory / "config.json").read_text()) | {name: number}
        (directory / "config.json").write_text(json.dumps(content))

    return Damage(f"config.json {name}: {number:,}", change)


def json_lost(rng: random.Random, checkpoint: Path, files: list[str]) -> Damage:
    """A key of a JSON file that is gone."""
    name = rng.choice([f for f in files if f.endswith(".json")])
    path = rng.choice([p for p in _paths(json.loads((checkpoint / name).read_text())) if p] or [()])
    return Damage(f"{name} {list(path)}: lost", lambda directory: _set(directory / name, path, None))


def text(rng: random.Random, checkpoint: Path, files: list[str]) -> Damage:
    """A text file that is cut off, or that holds something else from the start."""
    name = rng.choice([f for f in files if f.endswith((".json", ".txt"))])
    size = (checkpoint / name).stat().st_size
    cut, other = rng.randrange(size), rng.choice([b"", b"5", b"[]", b"\xff\xfe", b"{}", b"\0" * 50, b'"x"'])
    if rng.random() < 0.5:
        return Damage(f"{name} cut to {cut} bytes", lambda directory: os.truncate(directory / name, cut))
    return Damage(f"{name} holds {other[:9]!r}", lambda directory: (directory / name).write_bytes(other))


def file_kind(rng: random.Random, checkpoint: Path, files: list[str]) -> Damage:
    """Something else in the place of a file."""
    name = rng.choice(files)
    kind = rng.choice(sorted(KINDS))
    return Damage(f"{name}: {kind}", lambda directory: replace(directory / name, kind))


KINDS: dict[str, Callable[[Path], object]] = {
    "gone": lambda file: None,
    "empty": lambda file: file.touch(),
    "a directory": lambda file: file.mkdir(),
    "a dead link": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a FIFO": lambda file: os.mkfifo(file),
    "6 GiB of nothing": lambda file: (file.touch(), os.truncate(file, SPARSE)),
}


def replace(file: Path, kind: str) -> None:
    """Put one of the `KINDS` in the place of a file."""
    file.unlink()
    KINDS[kind](file)


def weights(rng: random.Random, checkpoint: Path, files: list[str]) -> Damage:
    """Damage of one tensor, or of the file that it lies in."""
    tensors = load_file(checkpoint / WEIGHTS)
    name = rng.choice(sorted(n for n, t in tensors.items() if t.numel()))
    what = rng.choice(["nan", "inf", "-inf", "lost", "longer", "integers", "one more", "huge", "cut", "header"])
    place = rng.randrange(tensors[name].numel())
    return Damage(f"{WEIGHTS} {name}: {what}", lambda directory: hurt(directory / WEIGHTS, name, what, place))


def hurt(file: Path, name: str, what: str, place: int) -> None:
    tensors = load_file(file)
    tensor = tensors[name].clone()
    if what in ("nan", "inf", "-inf"):
        tensor.view(-1)[place] = float(what)
        tensors[name] = tensor
    elif what == "lost":
        del tensors[name]
    elif what == "longer":
        tensors[name] = torch.cat([tensor, tensor])
    elif what == "integers":
        tensors[name] = tensor.int()
    elif what == "one more":
        tensors[f"{name}.more"] = tensor
    if what == "huge":
        enlarge(file, name)
    elif what == "cut":
        os.truncate(file, place)
    elif what == "header":
        content = bytearray(file.read_bytes())
        content[8 + place % 200] ^= 0x15
        file.write_bytes(content)
    else:
        save_file(tensors, file, metadata={"format": "pt"})


def enlarge(file: Path, name: str) -> None:
    """A tensor of 8 TiB, none of which lies on the disk."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    rows = 2**31
    header[name] |= {"shape": [rows, 1024], "data_offsets": [end, end + rows * 1024 * 4]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    os.truncate(file, 8 + len(text) + end + rows * 1024 * 4)


def _paths(content: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value, but to those below a vocabulary, of which there are too many alike."""
    if above and (above[-1] in ("vocab", "added_tokens") or above[-1] in FREE):
        return [above] if above[-1] not in FREE else []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [above, *(path for key, value in items for path in _paths(value, (*above, key)))]


def _set(file: Path, path: tuple[Any, ...], nonsense: str | None) -> None:
    """Put JSON into a place of a JSON file; None takes away what is there."""
    content = {"": json.loads(file.read_text())}
    parent: Any = content
    *way, last = ("", *path)
    for key in way:
        parent = parent[key]
    if nonsense is None:
        del parent[last]
    else:
        parent[last] = "@@@"
    file.write_text(json.dumps(content.get(""), indent=1).replace('"@@@"', nonsense or ""))
