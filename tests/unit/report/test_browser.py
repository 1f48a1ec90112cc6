"""The page in a real browser: no error, no request, every chart drawn. Skipped where there is no Chromium."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lctrain.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: tools/install_chromium.sh"),
    pytest.mark.timeout(120),
]


def look(page: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """The document after its scripts have run, what the console said, and the addresses that were asked for."""
    log = folder / "net.json"
    command = [
        BROWSER, "--headless=new", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--no-first-run", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        f"--log-net-log={log}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    if os.getuid() == 0:
        command.insert(1, "--no-sandbox")  # chromium refuses to run as root with it
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "</html>" in done.stdout, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = re.findall(r'"url":\s*"(https?://[^"]+)"', log.read_text())
    return done.stdout, said, asked


def test_ten_plots_without_error_or_request(make_run, tmp_path):
    page = write_report(make_run(40))
    dom, said, asked = look(page, tmp_path)
    assert said == []
    assert [url for url in asked if "google" not in url] == []  # the browser's own
    drawn = re.findall(r"<svg .*?</svg>", dom, flags=re.S)
    assert len(drawn) >= 10
    assert all("<path" in chart or "<rect" in chart for chart in drawn)
    assert dom.count('class="pointer"') == dom.count("data-values=")  # the script has run to its end


def test_the_look_would_see_errors_and_requests(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<html><body><img src="http://127.0.0.1:9/x.png"><script>undefined_function()</script></body></html>')
    _, said, asked = look(page, tmp_path)
    assert any("undefined_function" in line for line in said)
    assert "http://127.0.0.1:9/x.png" in asked


def test_what_stands_in_a_run_cannot_make_the_page_load_anything(make_run, tmp_path):
    run = make_run(3)
    page = write_report(run)
    page.write_text(page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    _, said, asked = look(page, tmp_path)
    assert any("Content Security Policy" in line for line in said)
    assert not any("127.0.0.1" in url for url in asked)
