"""The page in a real browser: no console error, every figure drawn, no sideways scrolling, tables that sort."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import recovery_results

from descentlab.report import Column, Report, TableBlock
from descentlab.report.render import render
from descentlab.studies.recovery.report import build

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,900"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium or chromedriver on the PATH"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = build(recovery_results(cases=6))
    return render(replace(report, pdf=False), tmp_path_factory.mktemp("run"))


def width(browser: Any, pixels: int) -> None:
    size = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": pixels < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def errors(browser: Any) -> list[dict[str, Any]]:
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_the_page_opens_without_console_errors_and_draws_every_figure(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    browser.get(page.as_uri())
    images = browser.execute_script(
        "return Array.from(document.images).map(i => [i.naturalWidth, i.alt, i.clientWidth])"
    )
    assert len(images) == 7
    assert all(natural > 0 and alt and shown > 100 for natural, alt, shown in images)
    assert not errors(browser)


def test_a_console_error_would_be_seen(browser: Any, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace('"use strict";', '"use strict"; nothing.here();'))
    browser.get_log("browser")
    browser.get(broken.as_uri())
    assert errors(browser)


@pytest.mark.parametrize("pixels", [390, 768, 1200])
def test_the_page_never_scrolls_sideways(browser: Any, page: Path, pixels: int) -> None:
    width(browser, pixels)
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    content, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert content <= window == pixels
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


SORTED = """
const table = Array.from(document.querySelectorAll('table.sortable')).find(t => t.tHead.innerText.includes('pair'));
const head = Array.from(table.tHead.rows[0].cells)[arguments[0]];
arguments[1] === 'click' ? head.querySelector('button').click() : null;
return [head.getAttribute('aria-sort'), Array.from(table.tBodies[0].rows).map(r => r.cells[arguments[0]].innerText)];
"""


def test_a_table_sorts_by_number_then_the_other_way_and_by_keyboard(browser: Any, tmp_path: Path) -> None:
    rows = [["b", 10.0], ["a", -2.0], ["d", None], ["c", 9.0], ["e", float("inf")]]
    table = TableBlock([Column("pair"), Column("value", ".1f")], rows)
    report = Report("T", "Q?", [], [], {}, TableBlock([Column("run")], []), {}, "descentlab run x", contrasts=table)
    browser.get(render(report, tmp_path).as_uri())
    assert browser.execute_script(SORTED, 1, "") == ["none", ["10.0", "-2.0", "\u2013", "9.0", "+inf"]]
    assert browser.execute_script(SORTED, 1, "click") == ["ascending", ["-2.0", "9.0", "10.0", "+inf", "\u2013"]]
    assert browser.execute_script(SORTED, 1, "click") == ["descending", ["+inf", "10.0", "9.0", "-2.0", "\u2013"]]
    button = browser.find_element("css selector", "#contrasts th button")
    button.send_keys("\ue007")  # Enter
    assert browser.execute_script(SORTED, 0, "") == ["ascending", ["a", "b", "c", "d", "e"]]
    assert not errors(browser)
