"""The report as Chromium draws it: on a screen, on a phone, on paper."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lab.test_report import make_analysis, make_evaluation, render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium; other tests check the page without one")


def test_a_browser_draws_it(tmp_path: Path) -> None:
    page, image = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(render([make_evaluation()], [make_analysis()]), encoding="utf-8")
    done = browse(tmp_path, f"--screenshot={image}", page)
    assert "Refused to" not in done.stderr, "the page breaks its own content security policy"
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert image.stat().st_size > 30_000, "an empty page is smaller"


FRAMES = """
<iframe src="phone.html" style="width: 400px"></iframe>
<iframe src="paper.html" style="width: 700px"></iframe>
<iframe src="cut.html" style="width: 700px"></iframe>
<script>
onload = () => {
  for (const {contentDocument: page} of document.querySelectorAll("iframe")) {
    const width = page.documentElement.clientWidth + 1;
    const wide = [...page.querySelectorAll("html, .scroll, pre, figure, table, svg")].filter(
      part => part.getBoundingClientRect().right > width || part.scrollWidth > part.clientWidth + 1);
    document.body.append(`[${wide.map(part => part.tagName).join()}]`);
  }
};
</script>
"""


def test_nothing_is_wider_than_a_phone_or_paper(tmp_path: Path) -> None:
    """On paper nobody scrolls. The last frame is the control: the page as a screen shows it, on a sheet's width."""
    page = render([make_evaluation()], [make_analysis()])
    for name, text in (("phone", page), ("paper", page.replace("@media print", "@media all")), ("cut", page)):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    (tmp_path / "frames.html").write_text(FRAMES)
    shown = browse(tmp_path, "--dump-dom", tmp_path / "frames.html").stdout
    phone, paper, cut = re.findall(r"\[([^]\[]*)\]", shown.partition("</script>")[2])
    assert "HTML" not in phone
    assert paper == ""
    assert "TABLE" in cut


def browse(folder: Path, action: str, page: Path) -> subprocess.CompletedProcess[str]:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1600"]
    return subprocess.run([*command, action, page.as_uri()], check=True, capture_output=True, text=True, timeout=120)
