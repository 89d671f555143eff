"""The page as programs call it: several visitors at once, errors, and what is kept from them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from flashsvd import load_compressed, read_info

pytest_plugins = ["served_page"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return visitor(address)


def visitor(address: str) -> Client:
    return Client(address, verbose=False)


def test_two_visitors_jobs_run_one_after_the_other_and_never_mix(client: Client, address: str, root: Path) -> None:
    jobs = {
        name: who.submit(model="dense", task="sst2", rank=rank, output=name, api_name="/compress")
        for name, who, rank in (("left", client, "4"), ("right", visitor(address), "3"))
    }
    for name, job in jobs.items():
        other = "right" if name == "left" else "left"
        state, log, result, data, _ = job.result(timeout=240)
        assert "Done in" in state
        assert f"saving to {name}" in log.splitlines()
        assert f"saved to {name}" in result
        assert other not in log + result
        assert json.loads(Path(data["value"]).read_text())["output"] == name
        # Nothing of another's, and nothing of itself before its turn.
        assert all(other not in str(view) for view in job.outputs())
        assert read_info(root / name).compression.ranks["attn"] == (4 if name == "left" else 3)
        load_compressed(root / name)
    ends = [read_info(root / name).compression.timestamp for name in jobs]
    assert len(set(ends)) == 2


def test_a_training_can_be_called(client: Client, root: Path) -> None:
    _, log, result, data, info = client.predict(
        model="dense", task="sst2", data="data", epochs="1", output="trained", api_name="/finetune"
    )
    assert "epoch 1.00" in log
    assert "saved to trained" in result
    assert "Plot: Loss and score over the steps" in result
    assert json.loads(Path(data["value"]).read_text())["output"] == "trained"
    assert Path(info["value"]).name == "flashsvd_training.json"
    assert (root / "trained" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("/compress", {"model": "", "rank": "4"}, "--model must be a name, got ''"),
        ("/eval", {"checkpoint": "../x", "task": "sst2"}, "--checkpoint ../x lies outside of"),
        ("/eval", {"checkpoint": "dense", "task": "sst2", "data": "/etc/passwd"}, "--data /etc/passwd lies outside of"),
        ("/finetune", {"model": "dense", "task": "sst2", "output": "~/x"}, "--output ~/x lies outside of"),
        ("/profile", {"checkpoints": "dense\n../../x"}, "--checkpoint ../../x lies outside of"),
        ("/info", {"checkpoint": "/"}, "checkpoint / lies outside of"),
        ("/info", {"checkpoint": "dense"}, "dense holds a dense model"),
        ("/info", {"checkpoint": " "}, "name a checkpoint"),
        ("/info", {"checkpoint": None}, "name a checkpoint"),
        ("/profile", {"checkpoints": None}, "--checkpoint must be a name"),
        (
            "/compress",
            {"model": "dense", "rank": "4", "overwrite": "no"},
            "--overwrite must be True or False, got 'no'",
        ),
    ],
)
def test_a_refusal_is_one_line(client: Client, name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(AppError) as refusal:
        client.predict(**options, api_name=name)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_job_that_is_refused_is_a_view_too(client: Client) -> None:
    job = client.submit(model="../x", rank="4", api_name="/compress")
    with pytest.raises(AppError, match="lies outside of"):
        job.result(timeout=60)
    ((state, *_),) = job.outputs()
    assert "error:</strong> --model ../x lies outside of" in state


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/dense/config.json", "dense/config.json", "../{root}"])
def test_no_file_is_served_but_the_downloads(address: str, root: Path, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{address}/gradio_api/file={path.format(root=root)}")
    assert refusal.value.code in (403, 404)


def test_no_file_is_taken(address: str) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nsome text\r\n--x--\r\n"
    )
    request = urllib.request.Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    assert refusal.value.code == 413
