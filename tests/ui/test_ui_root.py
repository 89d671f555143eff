"""What the page lets visitors name: nothing outside of its root, whatever way it is put."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from conftest import MakeModel
from flashsvd import CompressConfig, EvalConfig, FinetuneConfig, ProfileConfig, run_compress
from flashsvd.common.options import named_paths
from flashsvd.errors import ConfigError
from flashsvd.ui.jobs import Job, run_job
from flashsvd.ui.root import Root

CONFIGS = (CompressConfig, EvalConfig, FinetuneConfig, ProfileConfig)
# Text that names no file. A new option is on this list, has choices, or says in its own field what path it is.
NO_PATHS = {"method", "task", "adasvd_base", "device", "freeze", "variants", "kv_cache"}
OUTSIDE = r"lies outside of .*, the directory that this page may use; name one inside of it"
LEADS_OUT = r"holds the link .*, which leads out of"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """With a model in it, and a directory `outside` beside it."""
    (tmp_path / "root" / "model").mkdir(parents=True)
    (tmp_path / "root" / "model" / "config.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.tsv").write_text("secret")
    return Root.of(str(tmp_path / "root"))


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_text_option_says_whether_it_is_a_path(config_class: type) -> None:
    types_by_name = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        is_text = str in (types_by_name[field.name], *typing.get_args(types_by_name[field.name]))
        is_no_path = bool(field.metadata["choices"]) or field.name in NO_PATHS
        assert (field.metadata["path"] is not None) + is_no_path == is_text, field.name


def test_paths_that_are_written_by_default_count_too() -> None:
    config = CompressConfig(model="org/model", rank=8)
    assert [(path.field, path.text, path.use) for path in named_paths(config)] == [
        ("model", "org/model", "model"),
        ("output", "compressed_models", "write"),
    ]


@pytest.mark.parametrize("name", ["model", "./model", "model/../model", "bert-base-uncased", "org/model", "new/dir"])
def test_what_lies_inside_may_be_named_and_so_may_the_hub(root: Root, name: str) -> None:
    root.check_path("--model", name, "model")
    root.check_path("--model", str(root.directory / name), "model")


@pytest.mark.parametrize("use", ["model", "read", "write"])
@pytest.mark.parametrize("name", ["..", "../outside", "model/../../outside/secret.tsv", "/etc/passwd", "/", "~", "~/x"])
def test_what_lies_outside_may_not(root: Root, name: str, use: typing.Any) -> None:
    with pytest.raises(ConfigError, match=OUTSIDE):
        root.check_path("--data", name, use)


@pytest.mark.parametrize("name", ["a\0b", "~nobody-of-that-name/x", "\ud800", "x" * 300, "a/" * 100_000])
def test_what_cannot_be_a_path_is_one_line(root: Root, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a path") as refusal:
        root.check_path("--data", name, "read")
    assert len(str(refusal.value)) < 400


def test_a_link_is_what_it_leads_to(root: Root, tmp_path: Path) -> None:
    (root.directory / "out").symlink_to(tmp_path / "outside")
    (root.directory / "in").symlink_to("model")
    root.check_path("--data", "in/config.json", "read")
    for name in ("out", "out/secret.tsv", "out/new", "in/../../outside"):
        with pytest.raises(ConfigError, match=OUTSIDE):
            root.check_path("--data", name, "read")


def test_a_link_counts_from_the_moment_it_is_there(root: Root, tmp_path: Path) -> None:
    root.check_path("--output", "later", "write")
    (root.directory / "later").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match=OUTSIDE):
        root.check_path("--output", "later", "write")


@pytest.mark.parametrize("target", ["outside/secret.tsv", "outside"])
def test_a_directory_with_a_link_that_leads_out_may_not_be_read(root: Root, tmp_path: Path, target: str) -> None:
    (root.directory / "data" / "deep").mkdir(parents=True)
    (root.directory / "data" / "deep" / "dev.tsv").symlink_to(tmp_path / target)
    # Nor by another link to it.
    (root.directory / "other").mkdir()
    (root.directory / "other" / "data").symlink_to("../data")
    for name in ("data", "other"):
        with pytest.raises(ConfigError, match=LEADS_OUT):
            root.check_path("--data", name, "read")


def test_a_link_to_itself_ends(root: Root) -> None:
    (root.directory / "model" / "loop").symlink_to("loop")
    (root.directory / "model" / "up").symlink_to("..")
    root.check_path("--model", "model", "model")


def test_the_root_itself_is_not_written(root: Root) -> None:
    # Its temporary copy would lie beside it.
    root.check_path("--model", ".", "model")
    for name in (".", "model/..", str(root.directory)):
        with pytest.raises(ConfigError, match=OUTSIDE):
            root.check_path("--output", name, "write")


def test_a_default_output_that_leads_out_is_refused(root: Root, tmp_path: Path) -> None:
    config = CompressConfig(model="model", rank=8)
    root.check(config)
    (root.directory / "compressed_models").mkdir()
    (root.directory / "compressed_models" / "model_standard_r8").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match=LEADS_OUT):
        root.check(config)


@pytest.mark.parametrize("link", ["new.partial", "new.partial/checkpoint-1"])
def test_a_training_does_not_go_on_outside(root: Root, tmp_path: Path, link: str) -> None:
    config = FinetuneConfig(model="model", task="sst2", output="new", resume=True)
    root.check(config)
    (root.directory / link).parent.mkdir(exist_ok=True)
    (root.directory / link).symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match=LEADS_OUT):
        root.check(config)


def test_a_job_looks_at_its_paths_again_when_it_begins(root: Root, tmp_path: Path) -> None:
    config = EvalConfig(checkpoint="model", task="sst2", output="results/x.json")
    root.check(config)
    (root.directory / "results").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match=f"output results/x.json {OUTSIDE}"):
        run_job(Job("eval", (config,), root))


@pytest.mark.parametrize("option", ["data", "output", "dense", "checkpoint"])
def test_every_path_of_a_config_is_checked(root: Root, option: str) -> None:
    options = {"checkpoint": "model", option: "../outside"}
    with pytest.raises(ConfigError, match=f"{option} ../outside {OUTSIDE}"):
        root.check(ProfileConfig(**options))


def test_a_checkpoint_does_not_lead_a_profile_to_a_model_outside(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root.of(str(tmp_path))
    run_compress(CompressConfig(model=str(make_model()), rank=4, task="sst2", output=str(tmp_path / "small")))
    info = json.loads((tmp_path / "small" / "compression_info.json").read_text())
    (tmp_path / "small" / "compression_info.json").write_text(json.dumps(info | {"base_model": "/etc"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"small was compressed from /etc {OUTSIDE}"):
        run_job(Job("profile", (ProfileConfig(checkpoint="small"),), root))


def test_a_root_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory; give an existing one"):
        Root.of(str(tmp_path / "none"))
