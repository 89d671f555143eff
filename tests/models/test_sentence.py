"""A sentence encoder's own settings count as they do in `SentenceTransformer.encode`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeModel, build_tokenizer
from flashsvd import CompressConfig, EvalConfig, run_compress, run_eval
from flashsvd.data.tasks import TASKS
from flashsvd.data.tokenize import Tokenize
from flashsvd.errors import FlashSVDError, ModelError
from flashsvd.models.found import find_model
from flashsvd.models.loading import load_model, load_tokenizer
from flashsvd.models.pooling import POOLING_MODES
from flashsvd.models.sentence import encoder_length, read_sentence_encoder

PAIRS = [("A man eats", "a dog runs in the film ."), ("good", "a BAD movie"), ("the woman", "not very good . good")]
PROMPT = {"prompts": {"sts": "the film : "}, "default_prompt_name": "sts"}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def make_encoder(
    directory: Path,
    pooling: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    modules: tuple[str, ...] = (),
) -> Path:
    """A sentence encoder's files beside a model."""
    kinds = ("Transformer", "Pooling", *modules)
    folders = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    entries = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, folder) in enumerate(zip(kinds, folders, strict=True))
    ]
    write(directory / "modules.json", entries)
    write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 32} | (pooling or {}))
    write(directory / "sentence_bert_config.json", transformer or {})
    write(directory / "config_sentence_transformers.json", settings or {})
    return directory


def similarities(source: Path) -> torch.Tensor:
    """As `flashsvd eval --task similarity` takes them."""
    found = find_model(str(source))
    tokenizer = load_tokenizer(str(source))
    encoder = read_sentence_encoder(str(source), found.config).adapted(tokenizer)
    tokenize = Tokenize.of(
        TASKS["similarity"], tokenizer, encoder_length(str(source), found.config), prompt=encoder.prompt
    )
    model = load_model(str(source), found.config, found.own_class).model
    with torch.inference_mode():
        embeddings = [
            encoder.embed(model(**part).last_hidden_state, part["attention_mask"]) for part in tokenize.batch(PAIRS)
        ]
    return encoder.compare(*embeddings)


def expected(source: Path) -> torch.Tensor:
    library = pytest.importorskip("sentence_transformers", reason="the dev extra installs it")
    encoder = library.SentenceTransformer(str(source), device="cpu")
    first, second = (encoder.encode([pair[i] for pair in PAIRS], convert_to_tensor=True) for i in (0, 1))
    return encoder.similarity_pairwise(first, second)


SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a prompt": {"settings": PROMPT},
    "a prompt that is not pooled": {"settings": PROMPT, "pooling": {"include_prompt": False}},
    "a prompt that none asks for": {"settings": {"prompts": {"sts": "the film : "}}},
    "one of the library's own prompts": {"settings": {"default_prompt_name": "query"}},
    "short texts": {"transformer": {"max_seq_length": 5}},
    "lower case": {"transformer": {"do_lower_case": True}},
    "fewer channels": {"settings": {"truncate_dim": 7}},
    "normalized, fewer channels": {
        "settings": {"truncate_dim": 7, "similarity_fn_name": "dot"},
        "modules": ("Normalize",),
    },
    "dropout": {"modules": ("Dropout", "Normalize")},
    **{name: {"settings": {"similarity_fn_name": name}} for name in ("cosine", "dot", "euclidean", "manhattan")},
    **{f"{mode} pooling": {"pooling": {"pooling_mode": mode}} for mode in POOLING_MODES},
    **{
        f"{mode} pooling without the prompt": {
            "pooling": {"pooling_mode": mode, "include_prompt": False},
            "settings": PROMPT,
        }
        for mode in POOLING_MODES
    },
    "several poolings": {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
    "what a current version writes": {
        "transformer": {
            "transformer_task": "feature-extraction",
            "module_output_name": "token_embeddings",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "unpad_inputs": None,
        },
        "settings": PROMPT | {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    },
}  # fmt: skip


# The last one by its length alone, which cosines do not see.
WITHOUT_EFFECT = (
    "a prompt that none asks for",
    "one of the library's own prompts",
    "mean pooling",
    "mean_sqrt_len_tokens pooling",
)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_pairs_are_as_alike_as_sentence_transformers_finds_them(
    make_model: MakeModel, settings: str, side: str
) -> None:
    source = make_encoder(make_model("bert", "base"), **SETTINGS[settings])
    build_tokenizer(padding_side=side, do_lower_case=False).save_pretrained(source)
    torch.testing.assert_close(similarities(source), expected(source), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [name for name in SETTINGS if name not in ("nothing", "cosine", "dropout")])
def test_each_setting_matters(make_model: MakeModel, settings: str) -> None:
    """Else a test against the library would pass whether it is obeyed or not."""
    source = make_model("bert", "base")
    build_tokenizer(do_lower_case=False).save_pretrained(source)
    plain = similarities(make_encoder(source))
    same = torch.allclose(similarities(make_encoder(source, **SETTINGS[settings])), plain)
    assert same == (settings in WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": ("LSTM",)}, "has a LSTM module, which task similarity does not support"),
        ({"settings": {"default_prompt_name": "gone"}}, "has no prompt 'gone'; correct default_prompt_name"),
        ({"settings": {"default_prompt_name": "a", "prompts": {"a": 5}}}, "the prompt 5, which is no text"),
        ({"settings": {"truncate_dim": 0}}, "truncate_dim 0, which is no whole number of at least 1"),
        ({"settings": {"truncate_dim": "8"}}, "truncate_dim '8', which is no whole number"),
        ({"settings": {"model_type": "SparseEncoder"}}, "is a SparseEncoder by config_sentence_transformers.json"),
        ({"settings": ["a"]}, "holds no settings"),
        ({"transformer": {"max_seq_length": -1}}, "max_seq_length -1, which is no whole number"),
        ({"transformer": {"transformer_task": "text-generation"}}, "has transformer_task 'text-generation'"),
        ({"transformer": {"module_output_name": "x"}}, "has module_output_name 'x'"),
        ({"transformer": {"modality_config": {"message": {}}}}, "reads texts by"),
        ({"pooling": {"pooling_mode": "median"}}, "asks for median pooling; known are cls, max, mean"),
        ({"pooling": {"pooling_mode_of_tomorrow": True}}, "asks for pooling_mode_of_tomorrow pooling"),
    ],
)
def test_what_is_not_supported_is_refused(make_model: MakeModel, files: dict[str, Any], message: str) -> None:
    source = make_encoder(make_model("bert", "base"), **files)
    with pytest.raises(ModelError) as refusal:
        read_sentence_encoder(str(source), find_model(str(source)).config)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"transformer": {"processing_kwargs": {"text": {"padding": True}}}}, "has processing_kwargs"),
        ({"transformer": {"query_expansion": {"length": 32}}}, "has query_expansion"),
        ({"transformer": {"tokenizer_name_or_path": "elsewhere"}}, "has tokenizer_name_or_path 'elsewhere'"),
        ({"settings": {"similarity_fn_name": "maxsim"}}, "asks for the similarity 'maxsim'"),
    ],
)
def test_what_is_left_out_is_said(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, files: dict[str, Any], message: str
) -> None:
    source = make_encoder(make_model("bert", "base"), **files)
    read_sentence_encoder(str(source), find_model(str(source)).config)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "flashsvd" and r.levelno == logging.WARNING]
    assert message in warning


def test_a_decoder_that_is_no_sentence_encoder_yet_is_pooled_at_its_last_token(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model("llama", "causal-lm", pad_token_id=0)
    encoder = read_sentence_encoder(str(source), find_model(str(source)).config)
    assert encoder.pooling.modes == ("lasttoken",)
    assert "taking the last of its token states" in caplog.text


def test_texts_are_cut_where_the_encoder_cuts_them(make_model: MakeModel) -> None:
    source = str(make_model("bert", "base"))
    config = find_model(source).config
    assert encoder_length(source, config) == 40
    make_encoder(Path(source), transformer={"max_seq_length": 9})
    assert encoder_length(source, config) == 9
    make_encoder(Path(source), transformer={"max_seq_length": 512})
    assert encoder_length(source, config) == 40


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [f"{a}\t{b}\t{i + 1}" for i, (a, b) in enumerate(PAIRS)]
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
    return file


def test_a_compressed_checkpoint_obeys_the_settings_that_came_along(
    make_model: MakeModel, tmp_path: Path, pairs: Path
) -> None:
    source = make_model("bert", "base")
    scores = []
    for number, files in enumerate(({}, {"settings": PROMPT, "transformer": {"max_seq_length": 12}})):
        make_encoder(source, **files)
        output = tmp_path / str(number)
        run_compress(CompressConfig(model=str(source), ratio=0.9, task="similarity", output=str(output)))
        result = run_eval(EvalConfig(checkpoint=str(output), task="similarity", data=str(pairs), device="cpu"))
        scores.append(result.metrics["pearson"])
        assert result.seq_len == (12 if number else 40)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("method", ["drone", "fwsvd"])
def test_calibration_reads_the_prompt(make_model: MakeModel, tmp_path: Path, pairs: Path, method: str) -> None:
    source = make_model("bert", "base")
    tokens = []
    for number, settings in enumerate(({}, PROMPT)):
        make_encoder(source, settings=settings)
        config = CompressConfig(
            model=str(source), ratio=0.5, task="similarity", method=method, calib_data=str(pairs),
            output=str(tmp_path / str(number)), device="cpu",
        )  # fmt: skip
        calibration = run_compress(config).info.calibration
        assert calibration is not None
        tokens.append(calibration["tokens"])
    # Three tokens before each of six texts.
    assert tokens[1] == tokens[0] + 18


@pytest.mark.slow
def test_a_training_reads_the_prompt_and_scores_as_eval_does(
    make_model: MakeModel, tmp_path: Path, pairs: Path
) -> None:
    from flashsvd import FinetuneConfig, run_finetune

    source = make_encoder(make_model("bert", "base"), settings=PROMPT | {"truncate_dim": 9})
    output = tmp_path / "out"
    config = FinetuneConfig(
        model=str(source), mode="similarity", data=str(pairs), eval_data=str(pairs), output=str(output), device="cpu",
        epochs=1,
    )  # fmt: skip
    result = run_finetune(config)
    again = run_eval(EvalConfig(checkpoint=str(output), task="similarity", data=str(pairs), device="cpu"))
    assert again.metrics == pytest.approx(result.metrics, abs=1e-5)
    (output / "config_sentence_transformers.json").write_text("{}")
    without = run_eval(EvalConfig(checkpoint=str(output), task="similarity", data=str(pairs), device="cpu"))
    assert without.metrics["pearson"] != pytest.approx(again.metrics["pearson"], abs=1e-5)


def test_a_teacher_with_another_prompt_is_refused(make_model: MakeModel, tmp_path: Path, pairs: Path) -> None:
    from flashsvd import FinetuneConfig, run_finetune

    student = make_encoder(make_model("bert", "base"), settings=PROMPT)
    teacher = make_encoder(make_model("bert", "base", name="teacher"))
    config = FinetuneConfig(
        model=str(student), teacher=str(teacher), mode="similarity", data=str(pairs), eval_data=str(pairs),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(FlashSVDError, match="has another prompt or case than"):
        run_finetune(config)
