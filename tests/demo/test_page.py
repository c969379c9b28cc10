"""The page, served by the command line to a client and to a browser; nothing reaches beyond this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_adapters import load_memory
from memory_adapters.items import item_to_dict
from tests.demo.test_teaching import CODE, FUEL, HOME
from tests.support.hub import HubServer
from tests.support.models import byte_tokenizer, tiny_model

pytest.importorskip("gradio")
pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from tests.support import network
network.refuse_the_network()
sys.argv = ["memory-adapters", "demo", *sys.argv[1:]]
from memory_adapters.cli import main
try:
    main()
finally:
    print("reached for:", network.attempts, file=sys.stderr)
"""
# The last of a label: before the tabs Gradio has copies of them that are not seen, to find their widths.
SHOWN = """
const seen = [...document.querySelectorAll("button")].filter(button => button.checkVisibility())
return seen.findLast(button => button.innerText.trim() === arguments[0])
"""
WITHOUT_FILES = """
from memory_adapters.demo.page import make_page
from memory_adapters.demo.teaching import Teaching
from tests.support.models import byte_tokenizer, tiny_model
page = make_page(Teaching(tiny_model(), byte_tokenizer()), files=False)
print(*sorted({function.api_name for function in page.fns.values() if function.api_visibility == "public"}))
"""
LINES = "Lumen Ferry | The home port of {} is | Lisbon\nLumen Ferry | The ships of {} run on | methanol"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, loopback_hub: HubServer) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("demo")
    tiny_model().save_pretrained(folder / "model")
    byte_tokenizer(chat=True).save_pretrained(folder / "model")
    environment = {**loopback_hub.client_environment(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "said").open("w+") as said:
        command = [sys.executable, "-c", PROGRAM, str(folder / "model"), "--quiet", "--method", "slots"]
        server = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=said)
        try:
            yield _address(folder / "said", server)
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
    assert "reached for: []" in (folder / "said").read_text()


def _address(said: Path, server: subprocess.Popen[Any]) -> str:
    for _ in range(600):
        if found := re.search(r"http://127\.0\.0\.1:\d+", said.read_text()):
            return found.group()
        assert server.poll() is None, said.read_text()
        time.sleep(0.2)
    raise AssertionError(said.read_text())


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    from gradio_client import Client

    connected = Client(address, verbose=False, analytics_enabled=False)
    yield connected
    connected.predict(api_name="/start_over")
    connected.close()


def teach(client: Any, lines: str = LINES, method: str = "auto", exact: bool = False) -> tuple[str, str, list[str]]:
    said, report, stored = client.predict(lines, "", None, method, exact, True, api_name="/teach")
    return said, report, [value for _, value in stored["choices"]]


def test_a_client_teaches_asks_and_forgets(client: Any) -> None:
    said, report, stored = teach(client)
    assert said.startswith("**Memory slots** (nothing is trained")
    assert "recalled" in report
    assert [json.loads(one) for one in stored] == [item_to_dict(HOME), item_to_dict(FUEL)]
    off, on, acts, question = client.predict("Who runs Lumen Ferry?", [], [], api_name="/ask")
    assert [message["role"] for message in off] == ["user", "assistant"]
    assert off[1] != on[1]
    assert "What acts: Lumen Ferry." in acts
    assert question == ""
    said, left = client.predict(stored[:1], api_name="/forget")
    assert said == "Forgot 1 item."
    assert [value for _, value in left["choices"]] == stored[1:]
    off, on, acts, _ = client.predict("Who?", off, on, api_name="/ask")
    assert (len(off), off[3]) == (4, on[3])
    assert "Nothing acts" in acts


def test_errors_are_shown(client: Any) -> None:
    from gradio_client.exceptions import AppError

    for call, why in (
        (lambda: teach(client, "nonsense"), "Line 1: 'nonsense' is neither"),
        (lambda: client.predict([], api_name="/forget"), "Nothing is ticked"),
        (lambda: client.predict("", [], [], api_name="/ask"), "ask something"),
        (lambda: client.predict("me/x", True, "", api_name="/push"), "teach something first"),
        (lambda: client.predict("/nowhere", api_name="/load"), "`/nowhere` is not a folder with a saved memory"),
    ):
        with pytest.raises(AppError, match=why):
            call()


def test_saved_loaded_and_pushed(client: Any, tmp_path: Path, loopback_hub: HubServer) -> None:
    _, _, stored = teach(client, f"{LINES}\n{CODE.question} {CODE.answer}")
    assert client.predict(str(tmp_path / "memory"), api_name="/save") == f"Saved in `{tmp_path / 'memory'}`."
    assert load_memory(tiny_model(), tmp_path / "memory", tokenizer=byte_tokenizer(chat=True)).items == [
        HOME,
        FUEL,
        CODE,
    ]
    assert client.predict("me/taught", True, "me/base", api_name="/push").startswith(f"Pushed: {loopback_hub.url}")
    assert loopback_hub.repos["me/taught"].private
    client.predict(api_name="/start_over")
    for place in (str(tmp_path / "memory"), "me/taught"):
        said, loaded = client.predict(place, api_name="/load")
        assert said == "Loaded 3 items."
        assert [value for _, value in loaded["choices"]] == stored


def test_without_fields_for_files_nothing_is_saved_loaded_or_pushed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FILES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ask", "forget", "start_over", "teach"]


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="there is no chromium")
def test_in_a_browser(address: str, client: Any, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path}",
    ):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"), env={**os.environ, "HOME": str(tmp_path)})
    with webdriver.Chrome(options, service) as browser:
        wait = WebDriverWait(browser, 60)

        def press(label: str) -> None:
            wait.until(lambda browser: browser.execute_script(SHOWN, label)).click()

        def wait_for(text: str) -> None:
            wait.until(lambda browser: text in browser.find_element("tag name", "body").text)

        browser.get(address)
        press("An invented company")
        wait.until(lambda browser: "Teresa" in browser.find_element("css selector", "textarea").get_property("value"))
        press("Teach")
        wait_for("3 items, written with slots")
        browser.find_element("css selector", "textarea[placeholder^='Ask']").send_keys("Where is Lumen Ferry Company?")
        press("Ask")
        wait_for("What acts: Lumen Ferry Company")
        browser.find_element("css selector", ".stored input[type=checkbox]").click()
        press("Forget what is ticked")
        wait_for("2 items, written with slots")
        press("A text")
        press("A manual")
        press("Teach")
        wait_for("3 items, written with slots")
        (tmp_path / "wrong.csv").write_text("question;answer\nWho?;")
        (tmp_path / "facts.csv").write_text("question;answer\nWho built the pier?;Ann")
        press("A file")
        for name, said in (
            ("wrong.csv", "`wrong.csv`, row 1: `answer` of"),
            ("facts.csv", "4 items, written with slots"),
        ):
            browser.find_element("css selector", "input[type=file]").send_keys(str(tmp_path / name))
            wait_for(name.partition(".")[0])
            press("Teach")
            wait_for(said)
            if name == "wrong.csv":
                browser.find_element("css selector", "button[aria-label='Clear']").click()
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
