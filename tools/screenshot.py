"""Picture a built page for the README: `python tools/screenshot.py [book/intro.html]`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]


def main(page: str) -> None:
    """Show the built page, and store what a laptop's screen holds of it."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
        tab.goto((ROOT / "_build" / "html" / page).as_uri())
        tab.wait_for_timeout(2000)
        tab.screenshot(path=ROOT / "book" / "_static" / "screenshot.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "book/intro.html")
