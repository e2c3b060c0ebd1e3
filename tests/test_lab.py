"A reader opens a tutorial in JupyterLab, runs it from the top to the end, and saves it"
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec

import pytest

from browser import ROOT, Heard
from loud import absent

PATIENCE = 120  # seconds


@pytest.fixture
def lab(tmp_path):
    "A server of the test's own, which keeps nothing in the home of who runs the test; its address, and its token"
    if not find_spec("jupyterlab"): absent("a tutorial in JupyterLab: jupyterlab is not installed; it is in the extra `dev`")
    folder, home, token = tmp_path / "work", tmp_path / "home", secrets.token_hex(16)
    for made in (folder, home): made.mkdir()
    shutil.copy(ROOT / "nbs" / "tutorials" / "first_replay.ipynb", folder)
    ours = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                                                        "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR", "MPLCONFIGDIR")}
    python = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", f"--ServerApp.root_dir={folder}",
               f"--IdentityProvider.token={token}", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(tmp_path / "said", "w+") as said:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **ours, "HOME": str(home), "PYTHONPATH": python}, stdout=said, stderr=said,
                                  start_new_session=True)
        try:
            until = time.monotonic() + PATIENCE
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", (tmp_path / "said").read_text())):
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{found[1]}/", token, folder
        finally:
            server.send_signal(signal.SIGTERM)  # it ends its kernels
            try: server.wait(20)
            except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL); server.wait()


def test_a_tutorial_runs_in_jupyterlab(lab, browser):
    address, token, folder = lab
    path = folder / "first_replay.ipynb"
    before = json.loads(path.read_text())
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, heard = context.new_page(), Heard()
    heard.listen(page, address)
    page.goto(f"{address}lab/tree/{path.name}?reset&token={token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=PATIENCE * 1000)
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=PATIENCE * 1000)  # what runs before asks for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("li.lm-Menu-item[data-command='runmenu:run-all']").click()
    runs = [cell["id"] for cell in before["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    until, after = time.monotonic() + PATIENCE, {cell["id"]: cell for cell in before["cells"]}
    while True:  # the notebook on the disk is what JupyterLab saves: what it shows far below the window it does not draw
        page.keyboard.press("Control+s")
        with suppress(json.JSONDecodeError): after = {cell["id"]: cell for cell in json.loads(path.read_text())["cells"]}  # else it is being written
        waiting = [i for i in runs if after[i]["execution_count"] is None]
        wrong = [output for i in runs for output in after[i]["outputs"] if output["output_type"] == "error"]
        if wrong or not waiting: break
        assert time.monotonic() < until, f"{len(waiting)} of {len(runs)} cells still run"
        time.sleep(0.3)
    context.close()
    assert wrong == [] and len(runs) > 5
    assert [after[i]["execution_count"] for i in runs] == list(range(1, len(runs) + 1))
    shows = {cell["id"]: cell.get("outputs") for cell in before["cells"]}
    pictures = [i for i in runs if "image/png" in str(shows[i])]
    assert pictures and all("image/png" in str(after[i]["outputs"]) for i in pictures)
    assert [said for said in heard if "left the site" in said[1]] == []
