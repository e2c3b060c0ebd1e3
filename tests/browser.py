"A real browser, chromium, that sees this machine only, and the site on a server of the test's own"
import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from loud import absent, unbuilt
from nbdev.config import get_config

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_docs"
BASE = get_config(path=ROOT).doc_baseurl.rstrip("/")  # where the page for wrong addresses looks for the rest


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "One for all tests; a name that is not this machine's leads nowhere"
    try: from playwright.sync_api import sync_playwright
    except ImportError: absent("the site in a browser: playwright is not installed; it is in the extra `dev`")
    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")): absent("the site in a browser: put chromium on the PATH")
    options = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *["--no-sandbox"] * (os.getuid() == 0)]
    home = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options, env=home)
        yield browser
        browser.close()


class Files(SimpleHTTPRequestHandler):
    "The site below a folder, as its host has it, and nothing else on that host"
    protocol_version = "HTTP/1.1"
    timeout = 60  # a browser keeps its connections

    def translate_path(self, path):
        inside = urlsplit(path).path.startswith(f"{BASE}/")
        return super().translate_path(path.removeprefix(BASE) if inside else "/nothing/of/this/site")

    def do_GET(self):
        if self.path != "/favicon.ico": return super().do_GET()
        self.send_response(204)  # which a browser asks the host for, where a page names no icon of its own
        self.end_headers()

    def log_message(self, *_): "Tests say what was missing"


def stale():
    "What is newer than the site; nothing where the site is what the notebooks make"
    sources = [*(ROOT / "nbs").rglob("*"), *(ROOT / "docs").rglob("*"), ROOT / "settings.ini"]
    built = (SITE / "index.html").stat().st_mtime
    return [path.relative_to(ROOT).as_posix() for path in sources if path.suffix in (".ipynb", ".yml", ".py", ".css", ".js", ".svg", ".ini")
            and not any(part.startswith(".") for part in path.relative_to(ROOT).parts) and path.stat().st_mtime > built]


@pytest.fixture(scope="session")
def site():
    "The address of the built site"
    if not (SITE / "index.html").exists(): unbuilt("the site in a browser: `make docs` builds it")
    if newer := stale(): unbuilt(f"the site in a browser: it is older than {newer[0]}; `make docs` builds it")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{BASE}/"
    server.shutdown()
    server.server_close()


class Heard(list):
    "What a browser's pages say that nobody asked for: messages, errors, requests that fail or would leave the machine"
    def listen(self, page, home):
        def hear(what): self.append((page.url.removeprefix(home), what))
        page.on("console", lambda message: hear(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: hear(f"error: {error}"))
        page.on("requestfailed", lambda request: hear(f"failed: {request.url}"))
        page.on("request", lambda request: request.url.startswith((home, "data:", "blob:")) or hear(f"left the site: {request.url}"))
