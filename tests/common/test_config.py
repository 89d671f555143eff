"""What every field of every config takes and refuses, by what it declares: a new field is tested by being there."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsvd import CompressConfig, EvalConfig, FinetuneConfig, ProfileConfig
from flashsvd.common.config import Config, FieldType, config_from, field_types
from flashsvd.common.options import option
from flashsvd.common.ranges import Range
from flashsvd.errors import ConfigError

CONFIGS: tuple[type[Config], ...] = (CompressConfig, EvalConfig, FinetuneConfig, ProfileConfig)


@dataclass(frozen=True)
class Subject:
    """A field of a config."""

    config_class: type[Config]
    field: dataclasses.Field[Any]
    kind: FieldType

    def __str__(self) -> str:
        return f"{self.config_class.__name__}.{self.field.name}"

    @property
    def is_decided_later(self) -> bool:
        """Whether what is not given is decided once other fields are known."""
        return self.field.default is None and not self.kind.optional

    def take(self, value: object) -> Any:
        """Give the field a value, without rules that hold between fields, and say what the config made of it."""

        class Alone(self.config_class):  # type: ignore[name-defined,misc]  # a base known when it runs
            def check(self) -> None:
                pass

        required = {f.name: "x" for f in dataclasses.fields(Alone) if f.default is dataclasses.MISSING}
        return getattr(Alone(**(required | {self.field.name: value})), self.field.name)

    def refuse(self, value: object) -> None:
        with pytest.raises(ConfigError, match=f"^{self.field.name} ") as refusal:
            self.take(value)
        assert "\n" not in str(refusal.value)


SUBJECTS = [
    Subject(config_class, field, field_types(config_class)[field.name])
    for config_class in CONFIGS
    for field in dataclasses.fields(config_class)
]
NUMBERS = [subject for subject in SUBJECTS if subject.kind.plain in (int, float)]
SWITCHES = [subject for subject in SUBJECTS if subject.kind.plain is bool]
TEXTS = [subject for subject in SUBJECTS if subject.kind.plain is str]


def neighbours(end: float, whole: bool) -> tuple[float, float]:
    """The numbers before and after one."""
    return (end - 1, end + 1) if whole else (math.nextafter(end, -math.inf), math.nextafter(end, math.inf))


def test_there_are_fields_of_every_kind() -> None:
    assert all((NUMBERS, SWITCHES, TEXTS))
    assert len(NUMBERS) + len(SWITCHES) + len(TEXTS) == len(SUBJECTS)


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_default_is_taken_and_so_is_none_where_the_type_has_it(subject: Subject) -> None:
    default = subject.field.default
    if subject.is_decided_later:
        assert subject.take(None) is not None
        return
    if default is not dataclasses.MISSING:
        assert subject.take(default) == default
    if subject.kind.optional:
        assert subject.take(None) is None
    else:
        subject.refuse(None)


@pytest.mark.parametrize("subject", NUMBERS, ids=str)
def test_what_is_not_a_number_is_refused(subject: Subject) -> None:
    for value in (math.nan, math.inf, -math.inf, True, False, "1", "", [1], 1j):
        subject.refuse(value)
    if subject.kind.plain is int:
        for value in (1.5, 2.0):
            subject.refuse(value)
    else:
        subject.refuse(10**400)


@pytest.mark.parametrize("subject", NUMBERS, ids=str)
def test_a_range_has_the_ends_that_it_declares(subject: Subject) -> None:
    declared, whole = subject.field.metadata["range"], subject.kind.plain is int
    assert declared != Range(), f"{subject} takes any number; declare which"
    if declared.at_least is not None:
        assert subject.take(declared.at_least) == declared.at_least
        subject.refuse(neighbours(declared.at_least, whole)[0])
    if declared.at_most is not None:
        assert subject.take(declared.at_most) == declared.at_most
        subject.refuse(neighbours(declared.at_most, whole)[1])
    if declared.above is not None:
        subject.refuse(declared.above)
        after = neighbours(declared.above, whole)[1]
        assert subject.take(after) == after
    if declared.below is not None:
        subject.refuse(declared.below)
        before = neighbours(declared.below, whole)[0]
        assert subject.take(before) == before


@pytest.mark.parametrize("subject", SWITCHES, ids=str)
def test_a_switch_is_true_or_false(subject: Subject) -> None:
    assert (subject.take(True), subject.take(False)) == (True, False)
    for value in ("no", "", 0, 1, []):
        subject.refuse(value)


@pytest.mark.parametrize("subject", TEXTS, ids=str)
def test_text_is_text_of_what_it_declares(subject: Subject) -> None:
    for value in ("", 5, True, ["x"]):
        subject.refuse(value)
    choices, several = subject.field.metadata["choices"], subject.field.metadata["several"]
    for known in choices or several or ("a name", *subject.field.metadata["suggestions"]):
        assert subject.take(known) == known
    if choices or several:
        subject.refuse("none of them")
    if several:
        assert subject.take(", ".join(reversed(several)))
        subject.refuse(" , ")


@given(
    subject=st.sampled_from(SUBJECTS),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
)
def test_any_value_is_taken_as_it_is_or_refused_in_one_line(subject: Subject, value: object) -> None:
    try:
        taken = subject.take(value)
    except ConfigError as error:
        says = str(error)
    else:
        assert taken is value or (value is None and subject.is_decided_later)
        return
    assert says.startswith(f"{subject.field.name} ")
    assert len(says.splitlines()) == 1


@dataclass(frozen=True)
class Oven(Config):
    food: str = option(help="what to bake")
    heat: int = option(180, help="degrees", at_least=0, at_most=2**31 - 1)
    hours: float = option(1.0, help="how long", above=0, below=24)
    share: float | None = option(None, help="of the oven", at_least=0, below=1)
    most: float = option(0.5, help="up to what", at_most=1)

    def check(self) -> None:
        if self.heat > 1000 and self.hours > 1:
            raise ConfigError(f"--heat {self.heat} burns in {self.hours:g} hours; lower one of them")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heat": -1}, "heat must be a whole number from 0 to 2**31 - 1, got -1"),
        ({"heat": "hot"}, "heat must be a whole number from 0 to 2**31 - 1, got 'hot'"),
        ({"hours": 24}, "hours must lie strictly between 0 and 24, got 24"),
        ({"hours": "few"}, "hours must be a number, got 'few'"),
        ({"share": 1.0}, "share must be at least 0 and below 1, got 1.0"),
        ({"most": 1.5}, "most must be at most 1, got 1.5"),
        ({"food": ""}, "food must be a name, got ''; what to bake"),
        ({"heat": 2000, "hours": 2}, "heat 2000 burns in 2 hours; lower one of them"),
        # What a field says of itself comes first.
        ({"heat": 2000, "hours": 2, "share": 2.0}, "share must be at least 0 and below 1, got 2.0"),
    ],
)
def test_a_refusal_says_the_rule_and_the_value(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}$"):
        Oven(**({"food": "bread"} | options))


def test_none_stands_for_a_default_and_what_is_required_is_missed() -> None:
    values = {"food": "bread", "heat": None, "share": 0.5, "colour": "red"}
    assert config_from(Oven, values) == Oven("bread", share=0.5)
    for missing in ({}, {"food": None}):
        with pytest.raises(ConfigError, match="food must be a name"):
            config_from(Oven, missing)


def test_a_type_is_known_with_and_without_none() -> None:
    assert field_types(Oven)["hours"] == FieldType(float, optional=False)
    assert field_types(Oven)["share"] == FieldType(float, optional=True)
