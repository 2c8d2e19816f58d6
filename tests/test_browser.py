"""What a reader sees: the notebook in JupyterLab and its HTML report, in a real browser, used with mouse and keys."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_corpora import hostile_notebook

from machinery.notebook import NOTEBOOK
from tools.execute import report_page

nbformat = pytest.importorskip("nbformat")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r tools/requirements.txt")

QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
MINUTE = 60_000  # in milliseconds, as playwright counts
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},  # all cells in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
CELLS, OUTPUT = ".jp-Notebook .jp-Cell", ".jp-OutputArea-output"
SCROLLED = ".jp-WindowedPanel-outer"  # what scrolls in JupyterLab; in the report, the page does
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.innerText)"
BEGUN = f"() => {PROMPTS}.some(text => /[*\\d]/.test(text))"
AT_REST = f"""() => document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')
    && !{PROMPTS}.some(text => text.includes('*'))"""  # the circle above is 'idle' before there is a kernel

# What is wrong with the looks of the element that scrolls, as sentences. Contrast is WCAG's, without the editors' text.
FAULTS = """area => {
    const faults = [], page = document.documentElement;
    if (page.scrollWidth > innerWidth) faults.push(`the page is ${page.scrollWidth} px in a window of ${innerWidth}`);
    if (area.scrollWidth > area.clientWidth) faults.push(`${area.scrollWidth} px in an area of ${area.clientWidth}`);
    for (const image of area.querySelectorAll('img')) {
        const over = image.getBoundingClientRect().right - image.closest('.jp-Cell').getBoundingClientRect().right;
        if (!image.naturalWidth) faults.push('an image that did not load');
        if (over > 1) faults.push(`an image ${over} px over the edge of its cell`);
    }
    for (const part of area.querySelectorAll('.jp-OutputArea-output, .jp-RenderedMarkdown')) {
        const over = part.scrollWidth - part.clientWidth;
        if (over > 1) faults.push(`${over} px out of sight: ${part.textContent.slice(0, 60)}`);
    }
    const numbers = colour => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    const light = colour => numbers(colour).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    for (const element of area.querySelectorAll('.jp-RenderedMarkdown *, .jp-OutputArea-output *')) {
        if (![...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())) continue;
        if (!element.checkVisibility() || element.closest('svg, mjx-container, code span')) continue;
        let ground = element;
        while (ground && numbers(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
        const [dark, bright] = [light(getComputedStyle(element).color),
            ground ? light(getComputedStyle(ground).backgroundColor) : 1].sort((a, b) => a - b);
        const contrast = (bright + 0.05) / (dark + 0.05);
        if (contrast < 3) faults.push(`contrast ${contrast.toFixed(1)}: ${element.textContent.slice(0, 60)}`);
    }
    return faults;
}"""


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium: the system's, or the one that `playwright install chromium` brought."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=QUIET.split())
        except sync_api.Error as error:
            if path:
                raise
            pytest.skip(f"no browser: install chromium, or run `playwright install chromium` ({error.message[:60]}…)")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(folder, address) of a JupyterLab that serves an empty folder and knows nothing of this user's settings."""
    folder, own = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("jupyter")
    for name, values in SETTINGS.items():
        file = own / f"config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": "config/lab/user-settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    places |= {"IPYTHONDIR": "ipython"}
    environment = os.environ | {name: str(own / place) for name, place in places.items()}
    del environment["PYTHONPATH"]  # a copy of the project has to do without the original
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token="]
    address = f"http://127.0.0.1:{port}"
    with (own / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or answers(address), 60)
        assert process.poll() is None, (own / "log").read_text()
        yield folder, address
    finally:
        process.terminate()
        process.wait(60)


def answers(address):
    try:
        return urllib.request.urlopen(f"{address}/api/status").status == 200
    except OSError:
        return False


def wait_until(condition, seconds):
    """The first true value of `condition()`, which is asked twice a second."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited for {seconds} seconds in vain"
        time.sleep(0.5)
    return value


def open_notebook(chromium, server, name, overrides):
    """A page with a fresh copy of the project, knobs set to `smoke` and `overrides`; returns it and the notebook."""
    folder, address = server[0] / name, server[1]
    shutil.copytree(
        NOTEBOOK.parent, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "wandb")
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = f'preset = "smoke"\noverrides = {overrides!r}'
    nbformat.write(notebook, folder / NOTEBOOK.name)
    page = chromium.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(2 * MINUTE)  # of a busy machine, on which the kernel takes its time
    page.goto(f"{address}/lab/tree/{name}/{NOTEBOOK.name}?reset")
    page.wait_for_function(f"document.querySelectorAll('{CELLS}').length == {len(notebook.cells)}")
    page.wait_for_function(AT_REST)
    return page, folder / NOTEBOOK.name


def choose(page, *names):
    """Go through a menu: choose(page, "File", "Save Notebook")."""
    for name in names:
        page.locator(".lm-MenuBar-itemLabel, .lm-Menu-itemLabel").get_by_text(name, exact=True).click()


def run(page, item):
    """Choose an item of the menu Run, for the first time, and wait until all that it asks for has been executed."""
    choose(page, "Run", item)
    page.wait_for_function(BEGUN)
    page.wait_for_function(AT_REST, timeout=10 * MINUTE)


def position(sources, beginning):
    """Which cell begins so."""
    return next(i for i, source in enumerate(sources) if source.startswith(beginning))


def errors(page):
    return page.locator(f'{OUTPUT}[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()


@pytest.fixture(scope="module")
def executed(chromium, server):
    """A page with the notebook after Run All Cells, and the notebook's file, saved."""
    page, path = open_notebook(chromium, server, "executed", {})
    run(page, "Run All Cells")
    choose(page, "File", "Save Notebook")
    page.wait_for_selector(".jp-mod-dirty", state="detached")
    yield page, path
    page.close()


@pytest.fixture
def pictures(tmp_path):
    """The folder for pictures of the window: $SCREENSHOTS if set."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scroll_through(page, selector, folder, name):
    """Pictures of what scrolls, one window at a time."""
    area = page.locator(selector)
    for i in range(area.evaluate("e => Math.ceil(e.scrollHeight / e.clientHeight)")):
        area.evaluate("(e, i) => e.scrollTo(0, i * e.clientHeight)", i)
        page.screenshot(path=folder / f"{name}-{i + 1:02}.png")


@pytest.mark.long
def test_run_all_cells_to_the_last_line(executed):
    page, path = executed
    assert errors(page) == []
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    pictures = page.locator(CELLS).nth(position(sources, "summary = train(")).locator(f"{OUTPUT} img")
    assert pictures.count() == 1  # JupyterLab leaves its text out
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert all(prompt in ("", f"[{i + 1}]:") for i, prompt in enumerate(prompts))  # a folded cell shows none
    assert prompts.count("") == 3
    last = page.locator(".jp-CodeCell").last.locator(OUTPUT)
    last.scroll_into_view_if_needed()
    sync_api.expect(last).to_contain_text(re.compile(r"everything about this run is in runs/smoke-\w+/\s*$"))
    sync_api.expect(last).to_be_in_viewport()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The HTML page that nbconvert makes of the notebook as it is committed, with its outputs."""
    path = tmp_path_factory.mktemp("report") / "LMHarness.html"
    path.write_text(report_page(nbformat.read(NOTEBOOK, as_version=4)), encoding="utf-8")
    return path


def test_report_describes_its_pictures(chromium, report):
    page = chromium.new_page()
    page.route(re.compile("^https?:"), lambda route: route.abort())
    page.goto(report.as_uri())
    texts = page.locator("main img").evaluate_all("images => images.map(image => image.alt)")
    assert len(texts) >= 6
    assert [text for text in texts if not text or text.startswith("No description has been provided")] == []
    page.close()


def test_no_script_of_a_text_runs_in_the_report(chromium, tmp_path):
    (tmp_path / "report.html").write_text(report_page(hostile_notebook()), encoding="utf-8")
    page = chromium.new_page()
    page.route(re.compile("^https?:"), lambda route: route.abort())
    page.goto((tmp_path / "report.html").as_uri(), wait_until="load")
    assert page.evaluate("window.ran") is None and "window.ran='it'" in page.locator("main").inner_text()
    page.close()


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (700, "dark")])
def test_report(chromium, report, pictures, width, scheme):
    """Offline: what MathJax and others would bring from the net is refused, and complaints about that do not count."""
    page = chromium.new_page(viewport={"width": width, "height": 1500}, color_scheme=scheme)
    complaints = []
    page.route(re.compile("^https?:"), lambda route: route.abort())
    page.on("console", lambda message: complaints.append(message) if message.type == "error" else None)
    page.goto(report.as_uri(), wait_until="load")
    scroll_through(page, "html", pictures, f"report-{scheme}-{width}")
    assert [m.text for m in complaints if not m.location["url"].startswith("http")] == []
    faults = page.locator("html").evaluate(FAULTS)
    assert not faults, faults
    fonts = page.locator("main pre").evaluate_all("parts => parts.map(part => getComputedStyle(part).fontFamily)")
    assert fonts and all("monospace" in font for font in fonts)
    page.close()


@pytest.mark.long
@pytest.mark.parametrize("theme, width", [("Light", 1280), ("Dark", 1280), ("Light", 700)])
def test_looks(executed, pictures, theme, width):
    page, _ = executed
    if width < 1000:
        page.keyboard.press("Control+b")  # closes the list of files, as anybody would
    page.set_viewport_size({"width": width, "height": 1500})
    choose(page, "Settings", "Theme", f"JupyterLab {theme}")
    page.wait_for_selector(f'body[data-jp-theme-name="JupyterLab {theme}"]', state="attached")
    page.wait_for_timeout(2000)  # the theme's colours fade in
    scroll_through(page, SCROLLED, pictures, f"lab-{theme.lower()}-{width}")
    faults = page.locator(SCROLLED).evaluate(FAULTS)
    assert not faults, faults


@pytest.mark.long
def test_training_shows_progress_and_its_curves_stops_and_goes_on(chromium, server, pictures):
    overrides = {"max_steps": 0, "max_hours": 0.03, "eval_every": 200, "sample_every": 1000, "checkpoint_every": 1000}
    page, path = open_notebook(chromium, server, "interrupted", overrides)
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    training = page.locator(CELLS).nth(position(sources, "summary = train("))
    last = page.locator(".jp-CodeCell").last

    def shot(name):
        training.locator(".jp-Cell-outputWrapper").scroll_into_view_if_needed()
        page.screenshot(path=pictures / f"{name}.png")

    def press_run(cell):
        cell.locator(".jp-InputPrompt").click()
        page.keyboard.press("Control+Enter")

    def printed(cell):
        return "\n".join(cell.locator(OUTPUT).all_inner_texts())

    def percent():
        shown = re.findall(r"(\d+\.\d)% \|", printed(training))
        return float(shown[-1]) if shown else 0.0

    def summary():
        (file,) = path.parent.glob("runs/smoke-*/summary.json")
        return json.loads(file.read_text())

    training.locator(".jp-InputPrompt").click()
    run(page, "Run All Above Selected Cell")

    press_run(training)
    seen = [wait_until(percent, 120)]
    while len(seen) < 4:
        seen.append(wait_until(lambda: percent() if percent() != seen[-1] else 0, 30))
    assert seen == sorted(seen) and seen[-1] < 100
    curves = training.locator(f"{OUTPUT} img")
    assert curves.count() == 1
    drawn_first = curves.get_attribute("src")
    wait_until(lambda: curves.get_attribute("src") != drawn_first, 90)  # in the same place
    shot("live-1")
    page.locator('.jp-NotebookPanel-toolbar [data-jp-item-name="interrupt"]').click()
    page.wait_for_function(AT_REST, timeout=MINUTE)
    assert "stopping after this step" in printed(training) and errors(page) == []
    stopped = summary()
    assert stopped["status"] == "interrupted" and stopped["steps"] > 0
    assert curves.count() == 1 and f"sample of step {stopped['steps']:,}" in printed(training)
    press_run(last)
    sync_api.expect(last.locator(OUTPUT)).to_contain_text(f"interrupted: {stopped['tokens']:,} tokens", timeout=MINUTE)

    press_run(training)
    sync_api.expect(training.locator(OUTPUT).first).to_contain_text(f"from step {stopped['steps']:,}", timeout=MINUTE)
    page.wait_for_function(AT_REST, timeout=5 * MINUTE)
    assert percent() == 100 and errors(page) == []
    assert summary()["status"] == "finished" and summary()["steps"] > stopped["steps"]
    assert curves.count() == 1 and f"sample of step {summary()['steps']:,}" in printed(training)
    shot("live-2")

    choose(page, "File", "Save Notebook")
    page.wait_for_selector(".jp-mod-dirty", state="detached")
    last_drawn = curves.get_attribute("src")
    page.reload()
    page.wait_for_function(AT_REST, timeout=2 * MINUTE)
    assert curves.get_attribute("src") == last_drawn and "sample of step" in printed(training)
    page.close()


def changes(container):
    """Functions that move the first control of each kind by one: a slider, a choice, a text."""
    slider, choice, text = (container.locator(kind).first for kind in (".noUi-handle", "select", "textarea"))

    def slide():
        at, end = (slider.get_attribute(f"aria-value{name}") for name in ("now", "max"))
        slider.press("ArrowRight" if float(at) < float(end) else "ArrowLeft")

    def choose_next():
        choice.select_option(index=(choice.evaluate("e => e.selectedIndex") + 1) % choice.locator("option").count())

    def write():
        text.fill("for x in range(3):\n    print(x)")
        text.blur()

    kinds = [(slider, slide), (choice, choose_next), (text, write)]
    return [move for control, move in kinds if control.count()]


def drawn(container):
    """What the outputs of a widget show: kind and content of each."""
    return container.locator(OUTPUT).evaluate_all("all => all.map(one => [one.dataset.mimeType, one.innerHTML])")


@pytest.mark.long
def test_widgets_answer(executed):
    """Every cell with something to play with draws something else, of the same kind, when a control is moved."""
    page, path = executed
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    for index in (i for i, source in enumerate(sources) if re.search(r"^\s*play\(", source, re.MULTILINE)):
        container = page.locator(CELLS).nth(index).locator(".jupyter-widgets.widget-vbox").first
        for move in changes(container):
            before = drawn(container)
            move()
            wait_until(lambda container=container, before=before: drawn(container) != before, 30)
            page.wait_for_function(AT_REST, timeout=MINUTE)
            page.wait_for_timeout(1000)  # the second of two pictures
            assert [kind for kind, _ in drawn(container)] == [kind for kind, _ in before] != []
            assert errors(page) == []
