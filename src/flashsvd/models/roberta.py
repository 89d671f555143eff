"""RoBERTa and XLM-RoBERTa: BERT's encoder under another tokenizer, position offset and head."""

from typing import Any

from flashsvd.errors import ModelError
from flashsvd.models.architecture import Architecture
from flashsvd.models.bert import encoder_targets


def max_length(config: Any) -> int:
    """The longest sequence that RoBERTa reads: it counts positions from pad_token_id + 1 on.

    Raises:
        ModelError: the config has no pad_token_id.
    """
    if config.pad_token_id is None:
        raise ModelError("config.json has no pad_token_id, after which RoBERTa counts its positions; set it (to 1)")
    return int(config.max_position_embeddings - config.pad_token_id - 1)


ROBERTA_LIKE = tuple(Architecture(model_type, encoder_targets, max_length) for model_type in ("roberta", "xlm-roberta"))
