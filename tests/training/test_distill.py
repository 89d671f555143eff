"""A teacher's part in the loss: the formulas, and what it does for a student."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeModel, build_model, build_tokenizer
from flashsvd import EvalConfig, load_compressed, read_info, run_eval
from flashsvd.errors import FlashSVDError, ModelError
from flashsvd.training.distill import Answer, Distillation, Teacher, hidden_loss, soft_loss
from flashsvd.training.objectives import Classification, Question
from training_data import LEARNS, MNLI, SST2, STSB, TASKS, compress, finetune, write_task_data, write_text


def test_the_soft_loss_is_the_divergence_of_softened_classes() -> None:
    """Written out: T^2 sum p log(p / q) with p, q the softmax of logits / T, averaged over examples."""
    student, teacher = (
        torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]]),
        torch.tensor([[2.0, 0.0, -1.0], [1.0, 1.0, 1.0]]),
    )
    for temperature in (1.0, 2.0, 5.0):
        expected = 0.0
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
            p, q = ([math.exp(x / temperature) for x in logits] for logits in (t, s))
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
        assert soft_loss(student, teacher, temperature).item() == pytest.approx(expected * temperature**2, rel=1e-5)
    assert soft_loss(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_the_soft_loss_of_values_is_their_squared_difference(shape: tuple[int, ...]) -> None:
    student, teacher = torch.arange(4.0).view(shape), torch.tensor([0.0, 2.0, 2.0, 1.0]).view(shape)
    assert soft_loss(student, teacher, 3.0).item() == pytest.approx((0 + 1 + 0 + 4) / 4)


def test_the_hidden_loss_reads_real_tokens_only() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    student = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)]
    teacher = [torch.ones(2, 3, 4), torch.full((2, 3, 4), 3.0)]
    assert hidden_loss(student, teacher, mask).item() == pytest.approx((1 + 9) / 2)
    teacher[0][0, 2] = teacher[1][1, 1] = float("nan")
    assert hidden_loss(student, teacher, mask).item() == pytest.approx((1 + 9) / 2)


def test_the_parts_of_the_loss_are_weighed() -> None:
    model = build_model(num_labels=2)
    teacher = Teacher(model, Classification(SST2, model.config), Distillation(0.3, 2.0, 0.1))
    inputs = {"input_ids": torch.tensor([[2, 6, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    question = Question(inputs, torch.tensor([1]))
    answer = teacher.answer(question)
    assert answer.hidden_states is not None
    assert len(answer.hidden_states) == 3
    student = Answer(torch.tensor([[0.5, -0.5]]), [state + 0.5 for state in answer.hidden_states])
    expected = 0.7 * 1.5 + 0.3 * soft_loss(student.scores, answer.scores, 2.0) + 0.1 * 0.25
    assert teacher.blend(torch.tensor(1.5), student, answer, question).item() == pytest.approx(expected.item())


def apart(one: Any, other: Any) -> float:
    """How far the class probabilities, or scores, of two models lie apart on sentences like those of the data."""
    texts = ["a man runs good", "the dog runs bad", "the film runs good"]
    inputs = build_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        answers = [model(**inputs).logits for model in (one, other)]
    if answers[0].shape[1] > 1:
        answers = [logits.softmax(-1) for logits in answers]
    return float((answers[0] - answers[1]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("hidden_weight", [None, 1.0])
@pytest.mark.parametrize("task", [SST2, STSB], ids=lambda task: task.name)
def test_a_student_comes_nearer_to_its_teacher(
    make_model: MakeModel, tmp_path: Path, task: Any, hidden_weight: float | None
) -> None:
    own = {"num_labels": task.num_labels, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    own |= LEARNS
    teacher = make_model(**own)
    student = compress(teacher, tmp_path / "small", task=task.name)
    # No validation data, by whose labels weights would be chosen.
    data = write_task_data(tmp_path / "data", task) / "train.tsv"
    options = {"task": task.name, "data": data, "teacher": teacher, "hidden_weight": hidden_weight}
    finetune(student, tmp_path / "out", **options, distill_weight=1.0, epochs=12, learning_rate=1e-3)
    before, after = (apart(load_compressed(d), build_model(**own)) for d in (student, tmp_path / "out"))
    assert after < 0.9 * before
    assert read_info(tmp_path / "out").compression.trainings[0]["teacher"] == str(teacher)
    assert f"teacher {teacher}" in str(read_info(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mlm", "similarity"])
def test_other_modes_learn_from_a_teacher_too(make_model: MakeModel, tmp_path: Path, mode: str) -> None:
    if mode == "mlm":
        teacher, data = make_model("bert", "masked-lm"), write_text(tmp_path / "data")
    else:
        teacher, data = make_model("bert", "base"), write_task_data(tmp_path / "data", TASKS["similarity"])
    student = compress(teacher, tmp_path / "small")
    options = {"mode": mode, "data": data, "teacher": teacher, "distill_weight": 1.0, "hidden_weight": 0.5}
    result = finetune(student, tmp_path / "out", **options, epochs=6)
    losses = [point.loss for point in result.curve if point.loss is not None]
    assert losses[-1] < losses[0] / 1.5


@pytest.mark.slow
def test_a_teacher_may_have_its_classes_in_another_order(make_model: MakeModel, tmp_path: Path) -> None:
    """A student that learns from the teacher alone gets the right classes, whichever their order in either."""
    order = ["contradiction", "entailment", "neutral"]
    names = {"id2label": dict(enumerate(order)), "label2id": {name: i for i, name in enumerate(order)}}
    data = write_task_data(tmp_path / "data", MNLI)
    source = make_model("bert", "base", **LEARNS)
    taught = finetune(
        make_model(name="ordered", **names, **LEARNS), tmp_path / "teacher", task="mnli", data=data, epochs=10
    )
    assert taught.metrics["accuracy"] == 1.0
    options = {"task": "mnli", "data": data, "teacher": tmp_path / "teacher", "distill_weight": 1.0, "epochs": 12}
    finetune(source, tmp_path / "out", **options)
    assert run_eval(EvalConfig(tmp_path / "out", "mnli", data=data, device="cpu")).metric_value == 1.0


def test_a_teacher_of_masked_tokens_predicts_as_many(make_model: MakeModel, tmp_path: Path) -> None:
    student, other = (make_model("bert", "masked-lm", name=f"of-{n}", vocab_size=n) for n in (64, 72))
    with pytest.raises(ModelError, match=r"of-72 predicts 72 tokens, .*of-64 64; take a model with as many"):
        finetune(student, tmp_path / "out", mode="mlm", data=write_text(tmp_path / "data"), teacher=other)


@pytest.mark.parametrize(
    ("teacher", "options", "says"),
    [
        ({"num_labels": 3}, {}, "teacher cannot be used: .* has a head for 3 labels, but sst2 needs 2 classes"),
        ({"head": "base"}, {}, "has no trained BertForSequenceClassification to imitate"),
        (
            {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}},
            {},
            "has the classes yes, no, which are not the task's",
        ),
        ({"num_hidden_layers": 3}, {"hidden_weight": 1.0}, "has num_hidden_layers 3, .* 2; leave out hidden_weight"),
        ({"vocab_size": 12}, {}, "the tokenizer of .*teacher gives token .*, but the model knows 12"),
        ({"max_position_embeddings": 16}, {}, "reads 16 tokens at most; pass seq_len 16"),
        ({"hidden_size": 48}, {"hidden_weight": 1.0}, "has hidden_size 48, .* 32; leave out hidden_weight"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_loaded(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: dict[str, Any],
    options: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setattr("flashsvd.training.model.HeadedModel.load", None)
    student, other = make_model(name="student"), make_model(name="teacher", **teacher)
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(FlashSVDError, match=says):
        finetune(student, tmp_path / "out", task="sst2", data=data, teacher=other, **options)


def test_a_teacher_of_other_tokens_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    student, other = make_model(name="student"), make_model(name="teacher")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "other")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(other)
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(FlashSVDError, match="has other tokens than"):
        finetune(student, tmp_path / "out", task="sst2", data=data, teacher=other)
