"""report.html in headless Chromium: what a person does with it, and screenshots to look at in build/screenshots.

Skipped, and said so, where there is no Chromium on the PATH and CHROMIUM names none.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from parity import embedded
from parity.inputs import tokenized
from parity.report.folder import write
from parity.runner import run
from parity.selftest.faults import FAULTS
from parity.selftest.planting import planted
from tests.parity.report.results import RESULTS

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = Path(__file__).resolve().parents[3] / "build" / "screenshots"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="report.html was not opened: no Chromium here; install one, or name it in CHROMIUM"
)

LABELS = """
(name) => {
    const [trace] = document.getElementById(name).data;
    return [trace.y, trace.x];
}
"""

PATIENCE_MS = 300_000
"""A machine that is busy with other tests takes its time to draw five megabytes of script."""

COLOURS = """
async (name) => {
    const image = new Image();
    image.src = document.querySelector(`#${name} .heatmaplayer image`).getAttribute("href");
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.width, image.height];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const [trace] = document.getElementById(name).data;
    const [height, width] = [image.height / trace.y.length, image.width / trace.x.length];
    return trace.y.map((_, row) => trace.x.map((_, column) => Array.from(
        context.getImageData((column + 0.25) * width, (row + 0.25) * height, 1, 1).data.slice(0, 3))));
}
"""
"""The colour of each cell, as drawn: [rows, columns, 3]. A quarter in: the middle may hold a mark."""


WORST = """
() => {
    const hex = getComputedStyle(document.documentElement).getPropertyValue("--cell-worst").trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}
"""
"""The reddest colour that the page has."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No sandbox: a container, and CI that runs as root, has none to give.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, folder: Path, complaints: list[str], **context: Any) -> Page:
    """Open a report; what it says to the console or asks of the network is added to the complaints."""
    address = (folder / "report.html").as_uri()

    def asked(url: str) -> None:
        if not url.startswith("data:") and url != address:
            complaints.append(f"request: {url[:80]}")

    page = browser.new_context(**context).new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("request", lambda request: asked(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-drawn]")
    return page


def labels(page: Page, name: str) -> tuple[list[str], list[str]]:
    """Give the names of a heat map's rows and columns."""
    blocks, points = page.evaluate(LABELS, name)
    return blocks, points


def hovered(page: Page, name: str, block: str, point: str) -> str:
    """Point at a cell of a heat map, and give what it answers."""
    area = page.locator(f"#{name} .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    blocks, points = labels(page, name)
    across, down = (points.index(point) + 0.5) / len(points), (blocks.index(block) + 0.5) / len(blocks)
    page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    answer = page.locator(f"#{name} .hoverlayer .hovertext").first
    answer.wait_for()
    return answer.text_content() or ""


def photographed(browser: Browser, folder: Path, name: str, scheme: str, width: int) -> Page:
    """Open a report quietly, see that it fits, and keep a screenshot of all of it."""
    complaints: list[str] = []
    context = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = opened(browser, folder, complaints, **context)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}-{width}-top.png")  # docs/images has two of these
    page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}-{width}.png", full_page=True)
    assert complaints == []
    return page


@pytest.mark.parametrize(
    ("kind", "scheme", "width"), [("fail", "light", 1280), pytest.param("pass", "dark", 390, marks=pytest.mark.slow)]
)
def test_a_page_draws_and_answers(browser: Browser, tmp_path: Path, kind: str, scheme: str, width: int) -> None:
    write(RESULTS[kind], tmp_path)
    page = photographed(browser, tmp_path, kind, scheme, width)
    answer = hovered(page, "margins-float32-local", "layer 1", "attn_context")
    assert answer.startswith(f"layer 1, attn_context: {kind}margin")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unchecked", "crash"])
def test_a_page_without_a_verdict_opens(browser: Browser, tmp_path: Path, kind: str) -> None:
    write(RESULTS[kind], tmp_path)
    page = photographed(browser, tmp_path, kind, "light", 1280)
    assert page.locator(".verdict").inner_text().lower() == "unchecked"


@pytest.mark.slow
def test_it_is_read_without_a_mouse(browser: Browser, tmp_path: Path) -> None:
    write(RESULTS["fail"], tmp_path)
    page = opened(browser, tmp_path, [])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the findings"
    summary = page.locator("#margins-float32-local ~ details summary")
    summary.focus()
    page.keyboard.press("Enter")
    row = page.locator("#margins-float32-local ~ details tbody tr", has_text="attn_context").last
    assert row.is_visible()
    assert "fail" in row.inner_text()
    assert page.locator("[role=img]:not([aria-labelledby])").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_it_can_be_read_by_all(browser: Browser, tmp_path: Path, scheme: str, width: int) -> None:
    """By axe's rules of contrast, names and structure, with every table open; a picture without a text breaks them."""
    write(RESULTS["fail"], tmp_path)
    context = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = opened(browser, tmp_path, [], **context)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert Axe().run(page).response["violations"] == []
    page.evaluate("document.querySelector('main').append(new Image())")
    assert [each["id"] for each in Axe().run(page).response["violations"]] == ["image-alt"]


def test_complaints_are_heard(browser: Browser, tmp_path: Path) -> None:
    write(RESULTS["pass"], tmp_path)
    page = tmp_path / "report.html"
    script = "console.error('planted'); fetch('http://127.0.0.1:9/planted').catch(() => 0);"
    page.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    complaints: list[str] = []
    opened(browser, tmp_path, complaints)
    assert "console: planted" in complaints
    assert any(complaint.startswith("request: http://127.0.0.1:9/") for complaint in complaints)


@pytest.fixture(scope="module")
def planted_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the reports of a fault planted in layer 2 of the trained model."""
    fault = next(fault for fault in FAULTS if fault.slug == "attention-scale")
    inputs = tokenized(embedded.path(), embedded.held_out_text()[:300])
    folder = tmp_path_factory.mktemp("planted")
    write(run(embedded.path(), inputs=inputs, dtype="bfloat16", change=planted(fault, 2)), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_planted_faults_cell_is_the_reddest(
    browser: Browser, planted_report: Path, scheme: str, width: int
) -> None:
    """Of the operations run alone, where nothing is inherited, the planted one is the farthest from the truth."""
    page = photographed(browser, planted_report, "planted", scheme, width)
    name = "margins-bfloat16-operation"
    blocks, points = labels(page, name)
    worst = page.evaluate(WORST)
    distance_LP = np.abs(np.array(page.evaluate(COLOURS, name)) - worst).sum(axis=2)
    row, column = np.unravel_index(distance_LP.argmin(), distance_LP.shape)
    assert (blocks[row], points[column]) == ("layer 2", "attn_scores")
    assert (distance_LP == distance_LP.min()).sum() == 1
    assert hovered(page, name, "layer 2", "attn_scores").startswith("layer 2, attn_scores: fail")
