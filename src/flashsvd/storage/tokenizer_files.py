"""Which files a tokenizer or a processor may have, by what transformers writes and reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashsvd.common.json_file import read_json
from flashsvd.storage.verify import is_plain_name

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_SUFFIX = ".jinja"
# Between them these have the names under which vocabularies lie as a rule, whatever class a config names.
_USUAL_CLASSES = ("BertTokenizer", "GPT2Tokenizer", "XLMRobertaTokenizer", "T5Tokenizer", "TokenizersBackend")


def tokenizer_file_names(configs: Mapping[str, Path]) -> tuple[str, ...]:
    """The names of the files, but for named chat templates; most models have few of them.

    Args:
        configs: the model's `config.json` and `tokenizer_config.json`, as far as it has them, by name. They say which
            class the tokenizer is of, and so what its vocabulary may be called.
    """
    from transformers import tokenization_utils_base as base
    from transformers import utils

    names = [
        base.FULL_TOKENIZER_FILE,
        base.TOKENIZER_CONFIG_FILE,
        base.SPECIAL_TOKENS_MAP_FILE,
        base.ADDED_TOKENS_FILE,
        utils.CHAT_TEMPLATE_FILE,
        utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        utils.PROCESSOR_NAME,
        utils.FEATURE_EXTRACTOR_NAME,
        utils.IMAGE_PROCESSOR_NAME,
        utils.VIDEO_PROCESSOR_NAME,
        utils.AUDIO_TOKENIZER_NAME,
    ]
    config = _read(configs.get(TOKENIZER_CONFIG))
    asked = config.get("tokenizer_class")
    for name in (asked, *_classes_of(_read(configs.get("config.json")).get("model_type"))):
        names += _vocabulary_names(name)
    versions = config.get("fast_tokenizer_files")
    names += [name for name in versions if is_plain_name(name)] if isinstance(versions, list) else []
    return tuple(dict.fromkeys(names))


def template_folder() -> str:
    """The directory of the chat templates that have names."""
    from transformers.utils import CHAT_TEMPLATE_DIR

    return str(CHAT_TEMPLATE_DIR)


def template_names(source: str) -> tuple[str, ...]:
    """The named chat templates of a local directory, or of a model on the hub as far as that can be asked."""
    folder = template_folder()
    if Path(source).is_dir():
        return tuple(f"{folder}/{file.name}" for file in sorted((Path(source) / folder).glob(f"*{TEMPLATE_SUFFIX}")))
    from transformers.utils.hub import list_repo_templates

    found = list_repo_templates(source, local_files_only=False)
    # From the cache the names come without their suffix.
    bare = sorted(name.removesuffix(TEMPLATE_SUFFIX) for name in found if is_plain_name(name))
    return tuple(f"{folder}/{name}{TEMPLATE_SUFFIX}" for name in bare)


def _classes_of(model_type: Any) -> tuple[Any, ...]:
    """The names of the tokenizer classes that transformers takes for a type of model."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    found = TOKENIZER_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    return (*(found if isinstance(found, (tuple, list)) else (found,)), *_USUAL_CLASSES)


def _vocabulary_names(class_name: Any) -> list[str]:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(class_name, str):
        return []
    names: list[str] = []
    for name in (class_name, class_name.removesuffix("Fast")):
        names += (getattr(tokenizer_class_from_name(name), "vocab_files_names", None) or {}).values()
    return [name for name in names if is_plain_name(name)]


def _read(file: Path | None) -> dict[str, Any]:
    """What a config holds; nothing where it cannot be read, which whoever loads it says."""
    try:
        content = read_json(file) if file else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
