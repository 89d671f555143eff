"""Opening models and tokenizers, dense or compressed, from a local directory or the hub, with errors of one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashsvd.errors import FlashSVDError, ModelError, first_line
from flashsvd.models import architecture_of, base_prefix
from flashsvd.verify import INDEX, weight_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)
# What sentence-transformers reads beside the model; `modules.json` names further directories.
SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model.

    Attributes:
        model: on the CPU, in eval mode.
        source: the local directory or hub name it came from.
        untrained: parameters its source had no weights for, so that they are random.
    """

    model: Any
    source: str
    untrained: tuple[str, ...] = ()


def locate(name: str) -> str:
    """The model name as transformers should see it: an existing directory, or a hub name.

    Raises:
        ModelError: it reads like a path, and there is no such directory.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json; give a directory that save_pretrained wrote")
        return str(path)
    if path.exists():
        raise ModelError(f"{name} is a file; give the directory it lies in")
    if not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"there is no directory {name!r}; give an existing directory or a hub name such as org/model")
    return name


def load_config(source: str) -> Any:
    """The config of a supported model.

    Raises:
        ModelError: it cannot be had, or the architecture is not supported.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with _one_line(source):
        as_dict, _ = PreTrainedConfig.get_config_dict(source)
        architecture_of(_ModelType(as_dict.get("model_type")))
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def load_model(
    source: str, config: Any, model_class: Any, dtype: torch.dtype | None = None, **options: Any
) -> Pretrained:
    """Load weights into `model_class`.

    Args:
        dtype: None keeps the checkpoint's own.
        options: set on the config, such as `num_labels`.

    Raises:
        ModelError: the weights cannot be had or read, or lack a part of the base model.
    """
    if Path(source).is_dir() and (Path(source) / INDEX).is_file():
        weight_files(Path(source))
    for name, value in options.items():
        setattr(config, name, value)
    with _one_line(source):
        model, loading = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if mismatched := sorted(str(entry[0]) for entry in loading["mismatched_keys"]):
        raise ModelError(f"{source}: the tensor {mismatched[0]} does not have the shape that its config.json implies")
    untrained = tuple(sorted(loading["missing_keys"]))
    prefix = base_prefix(model)
    for name in untrained:
        # A head or a pooler may be new; the encoder below it may not.
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith("pooler."):
            raise ModelError(f"{source} lacks the weights of {name}, a part of the base model; fetch it again")
    return Pretrained(model.eval(), source, untrained)


def own_class(config: Any) -> Any:
    """The transformers class that saved the checkpoint, by the config's `architectures`; the base class without one.

    Raises:
        ModelError: transformers has no such class.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        return base_class(config)
    found = getattr(transformers, names[0], None)
    if found is None:
        raise ModelError(f"transformers has no class {names[0]}, which config.json names in `architectures`")
    return found


def base_class(config: Any) -> Any:
    """The transformers class of the model without a head."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return MODEL_MAPPING[type(config)]


def classifier_class(config: Any) -> Any:
    """The transformers class of the model with a sequence classification head.

    Raises:
        ModelError: the architecture has none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"{config.model_type} has no sequence classification head; leave out --task")
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    # Without any of its files transformers may build an empty tokenizer that maps every word to [UNK].
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{source} holds no tokenizer; save the base model's tokenizer into it")
    with _one_line(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def copy_companions(source: str, target: Path) -> None:
    """Copy what belongs to a model besides config and weights: tokenizer and sentence-transformers files, verbatim."""
    for name in (*TOKENIZER_FILES, *SENTENCE_FILES):
        _copy(source, name, target)
    for folder in sentence_folders(target / "modules.json"):
        names = [p.name for p in (Path(source) / folder).glob("*") if p.is_file()] if Path(source).is_dir() else []
        for name in names or ("config.json", "model.safetensors"):
            _copy(source, f"{folder}/{name}", target)


def companion_file(source: str, name: str) -> Path | None:
    """A file that lies beside a model, from its directory or the hub; None where there is none."""
    from transformers.utils import cached_file

    with _one_line(source):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def sentence_modules(modules_file: Path) -> list[tuple[str, str]]:
    """The modules of a sentence encoder, from its `modules.json`: class name and directory of each.

    Raises:
        ModelError: the file cannot be read, or names a directory outside the model's own.
    """
    if not modules_file.is_file():
        return []
    try:
        entries = json.loads(modules_file.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{modules_file} cannot be read ({error!r}); fetch the model again") from error
    for _, folder in modules:
        if folder and Path(folder).name != folder:
            raise ModelError(f"{modules_file} names {folder!r}, which lies outside the model; do not trust it")
    return modules


def sentence_folders(modules_file: Path) -> list[str]:
    """The directories of a sentence encoder beside the transformer itself."""
    return [folder for _, folder in sentence_modules(modules_file) if folder]


def _copy(source: str, name: str, target: Path) -> None:
    if found := companion_file(source, name):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(found, target / name)


@dataclass(frozen=True)
class _ModelType:
    model_type: str | None


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn a library's error about a model into a ModelError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except FlashSVDError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if Path(source).is_dir():
            raise ModelError(f"the model in {source} cannot be read: {first_line(error)}") from error
        raise ModelError(
            f"cannot get {source!r} from the hub: {first_line(error)} "
            "(check the name and the network, or give a local directory)"
        ) from error
