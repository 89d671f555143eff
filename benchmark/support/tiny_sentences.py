"""What a dry run on sentence pairs takes: tiny encoders of random weights, and a dozen pairs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer, MPNetConfig, MPNetModel

from support.classifiers import TINY

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
PAIRS = 12
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
INPUTS = ["input_ids", "attention_mask"]
# Ids 0 and 1 are special in both families, and MPNet's positions begin after its padding id.
FAMILIES = {"tiny-bert": (BertConfig, BertModel, {}), "tiny-mpnet": (MPNetConfig, MPNetModel, {"pad_token_id": 0})}


def write_pairs(directory: Path) -> Path:
    """The first pairs of the examples, as train.tsv and validation.tsv in a directory."""
    directory.mkdir()
    for split, file in {"train": "stsb-train-512.tsv", "validation": "stsb-validation.tsv"}.items():
        lines = (EXAMPLES / file).read_text(encoding="utf-8").splitlines()[: PAIRS + 1]
        (directory / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def write_models(directory: Path, pairs: Path) -> dict[str, Path]:
    """An encoder of each family, whose tokenizer knows the words of the pairs, by name."""
    text = (pairs / "train.tsv").read_text(encoding="utf-8") + (pairs / "validation.tsv").read_text(encoding="utf-8")
    words = SPECIAL + sorted(set(re.findall(r"\w+|[^\w\s]", text.lower())))
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate(words)}, model_max_length=40, model_input_names=INPUTS
    )
    for name, (config, model, own) in FAMILIES.items():
        torch.manual_seed(0)
        sizes = TINY | {"vocab_size": len(words), "initializer_range": 0.3}
        model(config(**sizes | own)).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return {name: directory / name for name in FAMILIES}
