"""The page in a real browser: what a visitor does with it, and that it is quick, quiet and fit for everyone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ui_server import browser

import flashsvd

pytest_plugins = ["served_page"]
pytestmark = pytest.mark.slow

# Milliseconds to wait for what takes seconds, on a machine that has other things to do.
PATIENCE = 120_000
# Milliseconds that people take from a tab to the first letter in one of its fields.
REACTION = 300


@dataclass
class Visit:
    """A page that is open, and what it asked for and complained of."""

    page: Any
    root: Path
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)

    def open(self, address: str) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.locator("#compress-start").wait_for()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.page.wait_for_timeout(REACTION)

    def fill(self, tab: str, **values: str) -> None:
        for name, value in values.items():
            widget = f"#{tab}-{name.replace('_', '-')}"
            place = self._place(widget)
            place.fill(value)
            if place.get_attribute("role") == "combobox":
                place.press("Enter")
            self.typed[widget] = value

    def start(self, tab: str) -> None:
        """Press the button, before which all that was typed must still be there."""
        mine = {widget: value for widget, value in self.typed.items() if widget.startswith(f"#{tab}-")}
        assert {widget: self._place(widget).input_value() for widget in mine} == mine
        self.page.locator(f"#{tab}-start").click()

    def _place(self, widget: str) -> Any:
        return self.page.locator(widget).locator("input, textarea").first

    def can_start(self, tab: str) -> None:
        """Whether the buttons are as in the beginning; those follow the state, but not at the same moment."""
        from playwright.sync_api import expect

        expect(self.page.locator(f"#{tab}-start")).to_be_enabled(timeout=PATIENCE)
        expect(self.page.locator(f"#{tab}-cancel")).to_be_disabled(timeout=PATIENCE)

    def state(self, tab: str) -> Any:
        return self.page.locator(f"#{tab}-state .job-state")

    def done(self, tab: str) -> None:
        self.state(tab).get_by_text(re.compile(r"Done in \d+ s|error:")).wait_for(timeout=PATIENCE)
        assert "Done" in self.state(tab).inner_text()

    def download(self, selector: str) -> Any:
        with self.page.expect_download() as download:
            self.page.locator(selector).click()
        return json.loads(Path(download.value.path()).read_text())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@pytest.fixture
def visit(chromium: Any, address: str, root: Path, trap: list[bytes]) -> Iterator[Visit]:
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    visit = Visit(page, root)
    visit.open(address)
    yield visit
    page.close()
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert trap == []


def test_it_is_there_in_less_than_three_seconds(chromium: Any, address: str) -> None:
    assert min(seconds_to_load(chromium, address) for _ in range(3)) < 3


def seconds_to_load(chromium: Any, address: str) -> float:
    """From nothing, for a visitor who was never there before."""
    page = chromium.new_context().new_page()
    began = time.monotonic()
    page.goto(address)
    page.locator("#compress-start").wait_for()
    seconds = time.monotonic() - began
    page.close()
    return seconds


def test_a_model_is_compressed_while_one_watches_and_its_files_are_downloaded(visit: Visit) -> None:
    # Of a method that takes a while for each layer, so that there is something to watch.
    visit.fill("compress", model="dense", method="adasvd", task="sst2", rank="4", calib_data="data", output="small")
    visit.start("compress")
    visit.state("compress").get_by_role("progressbar").wait_for(timeout=PATIENCE)
    visit.done("compress")
    assert "saving to small" in visit.page.locator("#compress-log textarea").input_value()
    assert visit.page.get_by_role("img", name="Plot: Rank by layer").is_visible()
    assert visit.page.get_by_role("img", name="Plot: Relative error of the weights by layer").is_visible()
    info = json.loads((visit.root / "small" / "compression_info.json").read_text())
    assert barriers(visit.page) == []
    assert visit.download("#compress-info-file") == info
    assert visit.download("#compress-download")["info"] == info
    flashsvd.load_compressed(visit.root / "small")


def test_a_checkpoint_is_evaluated(visit: Visit) -> None:
    visit.tab("Evaluate")
    visit.fill("eval", checkpoint="ready", task="sst2", data="data")
    visit.start("eval")
    visit.done("eval")
    assert "sst2: accuracy" in visit.page.locator("#eval-result").inner_text()
    assert visit.download("#eval-download")["num_eval_samples"] == 24


def test_info_is_read(visit: Visit) -> None:
    visit.tab("Info")
    visit.fill("info", checkpoint="ready")
    visit.start("info")
    visit.page.get_by_role("img", name="Plot: Rank by layer").wait_for(timeout=PATIENCE)
    assert visit.page.get_by_role("img", name="Plot: Relative error of the weights by layer").is_visible()
    assert "BertForSequenceClassification" in visit.page.locator("#info-result").inner_text()
    assert visit.download("#info-info-file")["method"] == "standard"


def test_checkpoints_are_compared_in_plots(visit: Visit) -> None:
    visit.tab("Compare")
    visit.fill("profile", checkpoints="ready", task="sst2", data="data", variants="dense,low-rank,fused")
    visit.start("profile")
    visit.done("profile")
    pictures = visit.page.locator("#profile-result img")
    titles = [pictures.nth(number).get_attribute("alt") for number in range(pictures.count())]
    assert titles == [
        "Plot: Median latency (line: to the 90th percentile)", "Plot: Peak memory", "Plot: Transient memory",
        "Plot: Score", "Plot: Score against size", "Plot: Rank by layer",
        "Plot: Relative error of the weights by layer",
    ]  # fmt: skip
    # Each is really drawn.
    assert all(pictures.nth(n).evaluate("e => e.naturalWidth") > 0 for n in range(pictures.count()))
    assert visit.page.locator("#profile-result tbody tr").count() == 3
    assert barriers(visit.page) == []
    assert [row["variant"] for row in visit.download("#profile-download")["rows"]] == ["dense", "low-rank", "fused"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": "dense"}, "no ranks given; pass --ratio 0.5"),
        ({"model": "dense", "rank": "0"}, "--rank must be at least 1, got 0"),
        ({"model": "../..", "rank": "4"}, "lies outside of"),
        # What only the job itself can find out.
        ({"model": "data", "rank": "4"}, "data holds no config.json"),
    ],
)
def test_a_mistake_is_answered_with_the_line_of_the_shell(visit: Visit, values: dict[str, str], says: str) -> None:
    visit.fill("compress", **values)
    visit.start("compress")
    alert = visit.state("compress").get_by_role("alert")
    alert.wait_for(timeout=PATIENCE)
    assert says in alert.inner_text()
    visit.can_start("compress")
    assert barriers(visit.page) == []


def test_a_job_is_cancelled_by_its_button_and_by_closing_the_page(visit: Visit, chromium: Any, address: str) -> None:
    endless = {"model": "dense", "task": "sst2", "data": "data", "epochs": "1e6"}
    visit.tab("Fine-tune")
    visit.fill("finetune", **endless, output="first")
    visit.start("finetune")
    visit.state("finetune").get_by_role("progressbar").wait_for(timeout=PATIENCE)
    # However long the word takes to reach the job, nothing that it says meanwhile is the last one.
    visit.page.route("**/cancel", lambda route: (time.sleep(1), route.continue_()))
    visit.page.locator("#finetune-cancel").click()
    visit.state("finetune").get_by_text("Cancelled").wait_for(timeout=PATIENCE)
    visit.can_start("finetune")

    other = Visit(chromium.new_page(), visit.root)
    other.open(address)
    other.tab("Fine-tune")
    other.fill("finetune", **endless, output="second")
    other.start("finetune")
    other.state("finetune").get_by_role("progressbar").wait_for(timeout=PATIENCE)
    other.page.close()

    # Neither runs any more, so this one can.
    visit.tab("Evaluate")
    visit.fill("eval", checkpoint="ready", task="sst2", data="data")
    visit.start("eval")
    visit.done("eval")
    assert not (visit.root / "first").exists()
    assert not (visit.root / "second").exists()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_every_tab_fits_its_window_and_has_no_serious_barrier(
    chromium: Any, address: str, width: int, scheme: str
) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(address)
    page.locator("#compress-start").wait_for()
    for name in ("Compress", "Evaluate", "Fine-tune", "Info", "Compare"):
        page.get_by_role("tab", name=name, exact=True).click()
        if name != "Info":
            page.get_by_role("button", name="More options").locator("visible=true").click()
            page.wait_for_timeout(300)
        assert barriers(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def barriers(page: Any) -> list[tuple[str, str]]:
    """What axe-core finds to be in the way of people, seriously so: the rule, and the first place."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
