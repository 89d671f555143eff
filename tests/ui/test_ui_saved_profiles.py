"""Profiles that were measured before, shown again beside others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashsvd.errors import CheckpointError, ConfigError
from flashsvd.profiling.result import ProfileResult, VariantRow
from flashsvd.ui.jobs import Job, SavedProfile, run_job
from flashsvd.ui.present import present
from flashsvd.ui.root import Root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    monkeypatch.chdir(tmp_path)
    return Root.of(".")


def saved(root: Root, name: str, parameters: int) -> SavedProfile:
    rows = [
        VariantRow(variant, "ok", metrics={"accuracy": 0.5}, latency_ms=2.0, latency_p90_ms=3.0, parameters=count)
        for variant, count in (("dense", 1000), ("low-rank", parameters))
    ]
    result = ProfileResult(
        task="sst2", metric_name="accuracy", checkpoint=name, dense="large", method="drone", ratio=0.5, device="cpu",
        batch_size=4, seq_len=16, padding="longest", micro_batches=2, graph="auto", offload=False, runs=1,
        num_eval_samples=6, data="x.tsv", timestamp="now", git_commit=None, versions={}, rows=tuple(rows),
        definitions={},
    )  # fmt: skip
    (root.directory / f"{name}.json").write_text(json.dumps(result.to_json()))
    return SavedProfile(f"{name}.json")


def test_saved_profiles_are_shown_side_by_side(root: Root) -> None:
    results = run_job(Job("profile", (saved(root, "half", 500), saved(root, "quarter", 250)), root))
    shown = present(results)
    assert [one["checkpoint"] for one in shown.data] == ["half", "quarter"]
    assert shown.pictures[-1].title == "Score against size"
    assert shown.table is not None
    assert shown.table.count("<table>") == 2
    assert all(picture.content.startswith(b"<?xml") for picture in shown.pictures)


def test_what_is_no_profile_is_refused_and_so_is_what_lies_outside(root: Root) -> None:
    (root.directory / "x.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"x\.json is no profile that flashsvd wrote"):
        run_job(Job("profile", (SavedProfile("x.json"),), root))
    with pytest.raises(ConfigError, match=r"file \.\./x\.json lies outside of"):
        run_job(Job("profile", (SavedProfile("../x.json"),), root))
