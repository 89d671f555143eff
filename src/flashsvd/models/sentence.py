"""What a sentence encoder does around its transformer, as `SentenceTransformer.encode` does: by the files beside it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.data.tokenize import token_ids
from flashsvd.errors import ModelError
from flashsvd.models.loading import load_tokenizer
from flashsvd.models.pooling import Pooling, pool, read_pooling
from flashsvd.models.registry import architecture_of
from flashsvd.storage.companions import (
    MODULE_CONFIG,
    MODULES_FILE,
    SENTENCE_CONFIG,
    TRANSFORMER_CONFIGS,
    sentence_modules,
)
from flashsvd.storage.model_files import HubUnreachableError, companion_file, model_json

log = logging.getLogger("flashsvd")

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# Keys of the transformer's own config that change nothing of what `encode` makes of single texts.
_WITHOUT_EFFECT = {"unpad_inputs", "query_length", "document_length", "model_args", "model_kwargs"}
_AS_USUAL = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
}


@dataclass(frozen=True)
class SentenceEncoder:
    """How texts become embeddings, and how these are compared.

    Attributes:
        prompt: put before every text.
        skipped: tokens at the start of each text that the pooling does not count, those of the prompt.
        max_seq_length: tokens that a text is cut to; None leaves it to the tokenizer.
        lowercase: whether the tokenizer is to see lower case only.
        normalized: whether embeddings have length 1 before they are cut.
        truncate_dim: the leading channels that are kept; None keeps all.
        similarity: of `SIMILARITIES`.
    """

    pooling: Pooling = dataclasses.field(default_factory=Pooling)
    prompt: str = ""
    skipped: int = 0
    max_seq_length: int | None = None
    lowercase: bool = False
    normalized: bool = False
    truncate_dim: int | None = None
    similarity: str = "cosine"

    def embed(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, D] in float32 from token states [B, S, D]."""
        states = states.float()
        parts = [pool(states, attention_mask, mode, self.skipped) for mode in self.pooling.modes]
        embeddings = torch.cat(parts, dim=-1)
        if self.normalized:
            embeddings = F.normalize(embeddings, dim=-1)
        return embeddings[:, : self.truncate_dim]

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """How alike the embeddings of each pair are, [B]; distances count negative."""
        match self.similarity:
            case "dot":
                return (first * second).sum(dim=-1)
            case "euclidean":
                distance: Tensor = torch.linalg.vector_norm(first - second, dim=-1)
                return -distance
            case "manhattan":
                return -(first - second).abs().sum(dim=-1)
        return torch.cosine_similarity(first, second)

    def adapted(self, tokenizer: Any) -> SentenceEncoder:
        """The encoder that knows how long its prompt is; the tokenizer then lowers what it reads, where it is to.

        Raises:
            ModelError: it cannot.
        """
        if self.lowercase:
            _lowercase(tokenizer)
        if self.pooling.include_prompt or not self.prompt:
            return self
        ids = token_ids(tokenizer, self.prompt)
        return dataclasses.replace(self, skipped=len(ids) - (ids[-1] in tokenizer.all_special_ids))


def read_sentence_encoder(source: str, model_config: Any) -> SentenceEncoder:
    """What the files beside a model ask for; what of it is not obeyed is said.

    Raises:
        ModelError: they cannot be read, or ask for something that is not supported.
    """
    pooling, normalized = _modules(source, model_config)
    settings = _json_of(source, SENTENCE_CONFIG) or {}
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise ModelError(f"{source} is a {kind} by {SENTENCE_CONFIG}, not a SentenceTransformer; give another model")
    own = next((found for name in TRANSFORMER_CONFIGS if (found := _json_of(source, name))), {})
    _check_transformer(source, own)
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        _warn(
            f"{SENTENCE_CONFIG} of {source} asks for the similarity {similarity!r}, which is not known; cosine is taken"
        )
        similarity = "cosine"
    return SentenceEncoder(
        pooling=pooling,
        prompt=_prompt(source, settings),
        max_seq_length=_count(source, "max_seq_length", own),
        lowercase=own.get("do_lower_case") is True,
        normalized=normalized,
        truncate_dim=_count(source, "truncate_dim", settings),
        similarity=similarity,
    )


def encoder_length(source: str, model_config: Any) -> int:
    """Tokens that a sentence encoder cuts a text to, as far as the model can read them."""
    longest = architecture_of(model_config).max_length(model_config)
    own = read_sentence_encoder(source, model_config).max_seq_length
    return min(longest, load_tokenizer(source).model_max_length if own is None else own)


def _modules(source: str, model_config: Any) -> tuple[Pooling, bool]:
    """The pooling, and whether what it gives is normalized."""
    modules_file = companion_file(source, MODULES_FILE)
    if modules_file is None:
        # What sentence-transformers makes of a model that is none of its own.
        causal = str((getattr(model_config, "architectures", None) or [""])[0]).endswith("ForCausalLM")
        _warn(f"{source} says nothing about pooling; taking the {'last' if causal else 'mean'} of its token states")
        return Pooling(("lasttoken",) if causal else ("mean",)), False
    pooling, normalized = None, False
    for kind, folder in sentence_modules(modules_file):
        file = companion_file(source, f"{folder}/{MODULE_CONFIG}") if folder and kind != "Dropout" else None
        if kind == "Pooling":
            file = file if folder else companion_file(source, MODULE_CONFIG)
            if file is None:
                raise ModelError(f"{source} lacks {folder}/{MODULE_CONFIG}, the pooling that {MODULES_FILE} names")
            pooling = read_pooling(file)
        elif kind == "Normalize":
            normalized = True
        elif kind not in ("Transformer", "Dropout"):
            raise ModelError(f"{source} has a {kind} module, which --task similarity does not support")
    if pooling is None:
        _warn(f"{MODULES_FILE} of {source} names no pooling; taking the mean of its token states")
    return pooling or Pooling(), normalized


def _prompt(source: str, settings: Mapping[str, Any]) -> str:
    """The prompt that is put before texts for which none is named."""
    name = settings.get("default_prompt_name")
    if name is None:
        return ""
    given = settings.get("prompts")
    prompts = {"query": "", "document": ""} | (given if isinstance(given, dict) else {})
    if not isinstance(name, str) or name not in prompts:
        raise ModelError(f"{SENTENCE_CONFIG} of {source} has no prompt {name!r}; correct default_prompt_name there")
    prompt = prompts[name] or ""
    if not isinstance(prompt, str):
        raise ModelError(f"{SENTENCE_CONFIG} of {source} has the prompt {prompt!r}, which is no text; correct it")
    return prompt


def _check_transformer(source: str, own: Mapping[str, Any]) -> None:
    """Say which settings of the transformer module are not obeyed.

    Raises:
        ModelError: one of them makes another model of it.
    """
    for name, usual in _AS_USUAL.items():
        if own.get(name, usual) not in (usual, None):
            raise ModelError(f"{source} has {name} {own[name]!r}, which --task similarity does not support")
    how = own.get("modality_config") or {}
    text = how.get("text", {}) if isinstance(how, dict) else {}
    if how and (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state"):
        raise ModelError(f"{source} reads texts by {how!r:.80}, which --task similarity does not support")
    obeyed = {"max_seq_length", "do_lower_case", "modality_config", *_AS_USUAL, *_WITHOUT_EFFECT}
    for name, value in own.items():
        if name not in obeyed and value:
            _warn(f"{source} has {name} {value!r:.80}, which flashsvd leaves out; its embeddings may differ")


def _count(source: str, name: str, settings: Mapping[str, Any]) -> int | None:
    value = settings.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ModelError(f"{source} has {name} {value!r}, which is no whole number of at least 1; correct it")
    return value


def _json_of(source: str, name: str) -> dict[str, Any] | None:
    """What a config beside the model holds; None where there is no such file."""
    try:
        file = companion_file(source, name)
    except HubUnreachableError:
        if name in (SENTENCE_CONFIG, TRANSFORMER_CONFIGS[0]):
            _warn(f"the hub cannot be asked for {name} of {source}; a prompt or a length in it is left out")
        return None
    if file is None:
        return None
    content = model_json(file)
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no settings; fetch the model again")
    return content


def _lowercase(tokenizer: Any) -> None:
    """Let a tokenizer lower what it reads, as sentence-transformers does: before all else that it normalizes.

    Raises:
        ModelError: it is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError("do_lower_case is for fast tokenizers, and this model has no tokenizer.json; make one")
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    steps = [] if backend.normalizer is None else [backend.normalizer]
    # Lowering twice changes nothing.
    backend.normalizer = Sequence([Lowercase(), *steps])


@functools.cache
def _warn(message: str) -> None:
    """Once for each model, however often its files are read."""
    log.warning("%s", message)
