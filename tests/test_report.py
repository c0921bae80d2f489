"""See the run: metrics.jsonl holds what trackers get, the summaries name it, and the page shows it all."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT, logged

from tools.charts import drawing, series
from tools.charts.axis import round_ticks
from tools.charts.drawing import draw_chart
from tools.charts.series import Line, smoothed, thinned
from tools.report import command
from tools.report.folder import read_run_folder
from tools.report.images import MOST_GRIDS
from tools.report.page import TEMPLATES, render_page
from training_utils.base import formats
from training_utils.base.errors import UserError
from training_utils.run import metrics, summary
from training_utils.run.facts import RECORDED
from training_utils.run.metrics import Log, Metrics
from training_utils.torch_backend import loader, processes

HOSTILE = 'a <script>alert("one")</script> & </style><img src=http://example.com/x.png>'
VALIDATION_FLAGS = [
    *("--validation_prompts", "a handwritten one", HOSTILE, "--validation_num_inference_steps", "2"),
    *("--validation_steps", "2", "--validation_split", "0.2"),
]


class Page(HTMLParser):
    """What is on a page: its text, the tags with their attributes, and the data of its curves."""

    def __init__(self, html):
        super().__init__()
        self.html, self.text, self.tags, self.scripts = html, "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and self.lasttag == self.tags[-1][0]:
            self.scripts[-1] += data
        self.text += data

    def all(self, tag, **wanted):
        return [
            found for name, found in self.tags if name == tag and all(found.get(k) == v for k, v in wanted.items())
        ]

    def curves(self):
        """{name of a line: {step: value}} over all charts of a single run."""
        data = json.loads(re.search(r'id="data">(.*?)</script>', self.html, re.S)[1])
        return {line["name"]: dict(line["points"]) for chart in data for line in chart["lines"]}


def written(*words):
    """The Page that the command writes, in a process of its own as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.report", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with open(done.stdout.strip(), encoding="utf-8") as file:
        return Page(file.read())


def refusal(capsys, *words):
    """The sentence and the exit code of a command that fails."""
    with pytest.raises((SystemExit, UserError)) as caught:
        command.main([*map(str, words)])
    if isinstance(caught.value, UserError):
        return str(caught.value), caught.value.exit_code
    return capsys.readouterr().err, caught.value.code


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """(the folder of a run of 24 steps that has everything a page shows, what it said)."""
    import contextlib
    import io

    out, said = tmp_path_factory.mktemp("report") / "a run", io.StringIO()
    with contextlib.redirect_stderr(said):
        flags = ["--max_train_steps", "24", "--validation_steps", "8", "--checkpointing_steps", "12"]
        run(out, *VALIDATION_FLAGS, *flags, "--report_to", "tensorboard")
    return out, said.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl
# ---------------------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_the_trackers_get(finished):
    out, _ = finished
    log, steps = Log(out), list(range(1, 25))
    names = ["train_loss", "lr", "grad_norm", "samples_per_second", "memory_resident_gib"]
    assert {*log.curves} == {*names, "val_loss"}
    for name in log.curves:
        assert list(log.curves[name]) == ([8, 16, 24] if name == "val_loss" else steps)
        assert log.curves[name] == pytest.approx(logged(out, name), rel=1e-6), name
    assert 0.05 < min(log.curves["memory_resident_gib"].values()) < 50
    (start,) = log.runs
    assert (start["script"], start["pictures"], start["held_out"], start["updates"]) == (
        *("train_text_to_image.py", 8, 2, 24),
    )
    for line in (out / metrics.NAME).read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_it_is_written_without_trackers_and_not_in_a_dry_run(run, tmp_path):
    run(tmp_path / "out", "--max_train_steps", "2")
    assert list(Log(tmp_path / "out").curves["train_loss"]) == [1, 2]
    page = render_page([read_run_folder(tmp_path / "out")])
    assert page.count("<svg") == 5 and "There is no validation loss" in page and "<h2>Images" not in page
    assert run(tmp_path / "dry", "--dry_run") == 0 and not (tmp_path / "dry").exists()


def test_a_resumed_run_continues_the_curves(run, tmp_path):
    """What was logged beyond the checkpoint that it goes on from is replaced, not shown twice."""
    import shutil

    run(tmp_path, "--checkpointing_steps", "2", "--validation_split", "0.2", "--validation_steps", "3")
    uninterrupted = Log(tmp_path).curves
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / name)
    path = tmp_path / metrics.NAME
    path.write_bytes(path.read_bytes()[:-20])  # cut off by a kill
    run(tmp_path, "--validation_split", "0.2", "--resume_from_checkpoint", "latest", "--max_train_steps", "4")
    log = Log(tmp_path)
    assert list(log.curves["train_loss"]) == [1, 2, 3, 4] and log.step == 4
    assert [run["step"] for run in log.runs] == [0, 2]
    assert log.curves["train_loss"] == {step: uninterrupted["train_loss"][step] for step in range(1, 5)}
    assert 3 not in log.curves["val_loss"]  # this step was made again, without validation
    run(tmp_path, "--max_train_steps", "1")  # a new run
    assert list(Log(tmp_path).curves["train_loss"]) == [1]


def test_what_could_not_be_written_is_written_later(tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    log = Metrics(folder, 0, {"script": "a"})
    (folder / metrics.NAME).rename(tmp_path / "kept")
    folder.rmdir()
    for step in (1, 2):
        log.log({"train_loss": step / 2}, step)
    folder.mkdir()
    (tmp_path / "kept").rename(folder / metrics.NAME)
    log.log({"train_loss": float("nan")}, 3)
    log.finish()
    assert Log(folder).curves == {"train_loss": {1: 0.5, 2: 1.0, 3: None}}
    assert capsys.readouterr().err.count("could not be written") == 1


def test_memory_of_a_gpu(monkeypatch):
    stats = {"allocated_bytes.all.peak": 3 * 2**30, "reserved_bytes.all.current": 2**32}
    monkeypatch.setattr(loader.torch.cuda, "memory_stats", lambda device: stats)
    accelerator = types.SimpleNamespace(device=loader.torch.device("cuda"))
    assert processes.memory_metrics(accelerator) == {"memory_peak_gib": 3.0, "memory_reserved_gib": 4.0}


# ---------------------------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------------------------


def test_the_summaries(finished, sd):
    out, said = finished
    val_samples = Log(out).finite("val_loss")
    best = min(val_samples, key=val_samples.get)
    begin, end = said.split("trained to step 24 in ")
    for words in (
        f"base model    {sd}",
        "images        8, and 2 for validation",
        "24 in 12.0 epochs",
        f"output        {out}",
    ):
        assert words in begin
    assert f"validation loss    {val_samples[best]:.4f} after step {best}" in end
    for name in ("model_index.json", "checkpoint-12 … 24", "metrics.jsonl", "run.yaml", "README.md", "validation"):
        assert name in end
    assert f"python -m tools.report '{out}'" in end and "StableDiffusionPipeline.from_pretrained" in end


def test_an_earlier_validation_loss_was_the_lowest(tmp_path, capsys):
    log = Metrics(tmp_path, 0, {})
    for step, loss in ((10, 0.3), (20, 0.25), (30, 0.28)):
        log.log({"val_loss": loss}, step)
    progress = types.SimpleNamespace(step=30, first_step=10, started=0, last_loss=0.1234, speed=lambda: 12.345)
    summary.print_end_summary(tmp_path, progress, "use()")
    said = capsys.readouterr().err
    assert "0.2500 after step 20 is the lowest, 0.2800 after step 30 the last" in said
    assert "at 12.3 images/s" in said and "0.1234 in the last step" in said


def test_words():
    assert [formats.large_count(n) for n in (64_796, 859_520_964, 2_567_463_684)] == ["64,796", "860 M", "2,567 M"]
    assert [formats.duration(n) for n in (3.9, 126, 5400)] == ["3 s", "2 min 6 s", "1 h 30 min"]


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_run(finished):
    out, _ = finished
    page, log = written(out), Log(out)
    drawn = page.curves()
    assert drawn["loss"] == log.curves["train_loss"]
    assert drawn["validation loss"] == log.curves["val_loss"] and drawn["learning rate"] == log.curves["lr"]
    assert set(drawn) == {"loss", "smoothed", "norm", "validation loss", "learning rate", "images/s", "resident"}
    best = log.lowest("val_loss")
    assert formats.number(best[1]) in page.text and "finished: 24 of 24 steps" in page.text
    grids = page.all("img")
    assert [re.search(r"after (\d+) steps", grid["alt"])[1] for grid in grids] == ["24", "16", "8"]
    assert all(grid["src"].startswith("data:image/jpeg;base64,") for grid in grids)
    assert len(page.all("svg")) == 6
    for words in ("checkpoint-24", "checkpoint-12", "torch 2.", f"--config '{out}/run.yaml'", "learning_rate: 0.001"):
        assert words in page.text, words
    assert len(page.html) < 1_000_000


def test_nothing_is_fetched_and_foreign_text_is_text(finished):
    page = written(finished[0])
    assert HOSTILE in page.text and HOSTILE not in page.html
    assert len(page.all("script")) == 2 and len(page.all("style")) == 1
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import", page.html.split("<body>")[0])
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_a_run_under_way_a_killed_one_and_one_without_anything(finished, tmp_path):
    import shutil

    out = tmp_path / "killed"
    out.mkdir()
    for name in ("run.yaml", "checkpoint-12"):
        source = finished[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, out / name)
    lines = (finished[0] / metrics.NAME).read_bytes().splitlines(keepends=True)
    (out / metrics.NAME).write_bytes(b"".join(lines[:15]) + lines[15][:30])
    page = written(out)
    assert "step 13 of 24" in page.text and "left" in page.text and not page.all("img")
    assert list(page.curves()["loss"]) == list(range(1, 14))
    assert "The command that continues it" in page.text and "--resume_from_checkpoint latest" in page.text
    (out / metrics.NAME).write_bytes(lines[0])  # before its first step
    assert "step 0 of 24" in written(out).text
    (out / metrics.NAME).unlink()  # of a version that wrote none
    page = written(out)
    assert "its curves are not known" in page.text and "checkpoint-12" in page.text and not page.all("svg")


def test_several_runs_side_by_side(run, finished, tmp_path):
    other = tmp_path / "other"
    run(other, *VALIDATION_FLAGS, "--learning_rate", "2e-3", "--validation_steps", "4", "--max_train_steps", "8")
    page = written(finished[0], other, "--output", tmp_path / "both.html")
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', page.html, re.S)[1])
    assert all([line["name"] for line in chart["lines"]] == ["a run", "other"] for chart in drawn) and len(drawn) == 6
    differing = page.html.split("Settings that differ")[1].split("</table>")[0]
    rows = re.findall(r"<tr><th>(\w+)</th><td>(.*?)</td><td>(.*?)</td></tr>", differing)
    assert rows == [("max_train_steps", "24", "8"), ("learning_rate", "0.001", "0.002")]
    assert len(page.all("img")) == 3 + 2 and "The folder other" in page.text
    copy = written(other, other, "--output", tmp_path / "twice.html")
    assert "They agree in every setting" in copy.text and str(other) in copy.text


def test_a_step_that_is_not_finite(tmp_path):
    log = Metrics(tmp_path, 0, {})
    for step in range(1, 41):
        log.log({"train_loss": float("inf") if step == 7 else 1 / step}, step)
    page = Page(render_page([read_run_folder(tmp_path)]))
    assert "not finite at step 7" in page.text and page.curves()["loss"][7] is None


def test_what_is_no_run(tmp_path, capsys):
    assert refusal(capsys, tmp_path / "nowhere") == (f"{tmp_path / 'nowhere'} is not a folder", 2)
    sentence, code = refusal(capsys, tmp_path)
    assert code == 2 and "is not the output folder of a run" in sentence
    said, code = refusal(capsys)
    assert code == 2 and len(said.strip().splitlines()) == 1
    Metrics(tmp_path, 0, {})
    sentence, code = refusal(capsys, tmp_path, "--output", tmp_path / "no" / "page.html")
    assert code == 2 and "cannot be written" in sentence


def test_a_grid_that_is_damaged_and_many_grids(finished, tmp_path):
    import shutil

    Metrics(tmp_path, 0, {}).log({"train_loss": 1.0}, 4000)
    (tmp_path / "validation").mkdir()
    grid = finished[0] / "validation" / "step-000008.png"
    for step in range(100, 4100, 100):
        shutil.copy(grid, tmp_path / "validation" / f"step-{step:06d}.png")
    latest = tmp_path / "validation" / "step-004000.png"
    latest.write_bytes(latest.read_bytes()[:300])
    page = Page(render_page([read_run_folder(tmp_path)]))
    assert f"{latest} cannot be read" in page.text
    assert len(page.all("img")) == MOST_GRIDS - 1 and "Of 40 steps with images 24 are shown" in page.text
    assert "images after 100 steps" in page.all("img")[-1]["alt"]


def test_no_torch_is_imported():
    words = "import sys, tools.report; sys.exit('torch' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT).returncode == 0


def test_own_files_are_filled_in_as_they_are(finished):
    """Style sheet and script hold characters that foreign text has escaped; the policy names the script's digest."""
    page = written(finished[0])
    (style,) = re.findall(r"<style>\n(.*?)</style>", page.html, re.S)
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, re.S)
    assert style == str(drawing.CHART_CSS) + (TEMPLATES / "page.css").read_text() and '"Segoe UI"' in style
    assert script == (TEMPLATES / "page.js").read_text()
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["content"].endswith(f"script-src 'sha256-{digest}'")
    assert all(f".c{colour} {{" in style for colour in range(series.COLOURS))


def test_each_text_of_a_run_is_escaped(tmp_path):
    """Hostile text wherever a folder can hold any: names, settings, facts, libraries, model card, damaged images."""
    folder = tmp_path / f"run {HOSTILE.replace('/', chr(92))}"
    (folder / "validation").mkdir(parents=True)
    (folder / "validation" / "step-000001.png").write_bytes(b"no image")
    (folder / "README.md").write_text(
        f"---\nlicense: {json.dumps(HOSTILE)}\n---\n# {HOSTILE}\n```python\n{HOSTILE}\n```\n"
    )
    (folder / "run.yaml").write_text(json.dumps({HOSTILE: HOSTILE, "validation_prompts": [HOSTILE]}))
    numbers = ("processes", "parameters", "pictures", "held_out", "pictures_per_update", "updates", "epochs")
    values = {key: 2 if key in numbers else HOSTILE for key in RECORDED.values()}
    values |= {"launcher": [HOSTILE], "flags": {HOSTILE: HOSTILE}, "libraries": {HOSTILE: HOSTILE}}
    log = Metrics(folder, 0, values)
    log.log({"train_loss": 1.0, "val_loss": float("nan")}, 1)
    other = tmp_path / "other"
    other.mkdir()
    Metrics(other, 0, values | {"flags": {HOSTILE: "b"}})
    for folders in ([folder], [folder, other]):
        page = Page(render_page([read_run_folder(one) for one in folders]))
        assert page.text.count("<script>alert") > 12 and "<script>alert" not in page.html
        assert len(page.all("script")) == 2 and not page.all("img") and "src=http" not in str(page.tags)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_in_a_browser(finished, tmp_path):
    out, _ = finished
    written(out, "--output", tmp_path / "page.html")
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html")
        sizes = browser.value("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
        assert len(sizes) == 6 and min(sizes) > 200
        assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        browser("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
        browser.wait_for_frames()
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        browser("Emulation.clearDeviceMetricsOverride")
        assert "Segoe UI" in browser.value("getComputedStyle(document.body).fontFamily")
        browser.wait_for_frames()
        browser.value("document.querySelector('svg').scrollIntoView({block: 'center'}) || 0")
        browser.wait_for_frames()
        box = browser.value("document.querySelector('svg').getBoundingClientRect().toJSON()")
        left, _, right, _ = browser.value("document.querySelector('svg').dataset.frame.split(' ').map(Number)")
        middle = box["x"] + (left + right) / 2 / 460 * box["width"]  # where step 12 is
        before = browser.value("document.querySelector('.read').textContent")
        browser("Input.dispatchMouseEvent", type="mouseMoved", x=middle, y=box["y"] + box["height"] / 2)
        browser.wait_for_frames()
        shown = browser.value("document.querySelector('.read').textContent")
        assert f"loss\u00a0{formats.number(Log(out).curves['train_loss'][12])}" in shown and "step 12 " in shown
        assert browser.value("document.querySelectorAll('.cursor').length") == 6
        browser("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
        browser.wait_for_frames()
        assert browser.value("document.querySelector('.read').textContent") == before
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [f"file://{tmp_path}/page.html"]
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        assert [event for event in browser.events if event["method"] in wrong] == []


# ---------------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------------


def test_ticks_and_numbers():
    assert round_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert round_ticks(0.13, 0.42) == pytest.approx([0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    rng = np.random.default_rng(0)
    for low, width in zip(rng.normal(size=200) * 10.0 ** rng.integers(-8, 8, 200), 10.0 ** rng.uniform(-6, 6, 200)):
        found = round_ticks(low, low + width)
        assert 3 <= len(found) <= 9 and all(low - 1e-6 * width <= tick <= low + 1.000001 * width for tick in found)
    numbers = {0: "0", 0.0123456: "0.01235", 1234.5: "1,234", 1e-5: "1e-5", 2.5e-4: "2.5e-4", 0.5: "0.5", 2e7: "2e7"}
    assert {value: formats.number(value) for value in numbers} == numbers
    assert formats.number(None) == "not finite"


def test_smoothing_and_thinning():
    values = np.random.default_rng(1).normal(size=300)
    points = list(enumerate(values.tolist()))
    weights = (1 - 1 / 15) ** np.arange(300)[::-1]
    assert smoothed(points, 15)[-1][1] == pytest.approx((weights * values).sum() / weights.sum(), abs=1e-3)
    assert smoothed([(0, None), *((x, 2.0) for x in range(1, 9))], 5) == [(x, 2.0) for x in range(1, 9)]
    points = list(enumerate(np.random.default_rng(2).normal(size=100_000).tolist()))
    thin = thinned(points)
    assert len(thin) <= series.MOST_POINTS + 1 and thin[-1] == points[-1] and thin == sorted(thin)
    assert {max(points, key=lambda p: p[1]), min(points, key=lambda p: p[1])} <= set(thin)


@pytest.mark.parametrize("standalone", [True, False])
def test_a_chart_is_xml_and_draws_what_it_is_given(standalone):
    lines = [
        Line("<b> & co", [(0, 1.0), (5, None), (10, 3.0)]),
        Line("two", [(0, 2.0), (10, 2.5)], 1, "dashed"),
        Line("three", [(4, 1.5)], 9, "dotted"),
    ]
    svg = ElementTree.fromstring(draw_chart(lines, "a <title>", from_zero=True, mark=(4, 1.5), standalone=standalone))
    words = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert ("a <title>" in words and "<b> & co" in words) == standalone and "step" in words
    left, top, right, bottom = map(float, svg.get("data-frame").split())
    _, x1, y0, y1 = map(float, svg.get("data-range").split())
    first = next(e for e in svg.iter() if e.tag.endswith("path") and len(e.get("d")) > 9 and "h" not in e.get("d"))
    (x, y), (across, up) = ([*map(float, pair.split())] for pair in first.get("d")[1:].split("M"))
    assert x == left and across == pytest.approx(right) and y0 == 0 and x1 == 10
    assert up == pytest.approx(bottom - 3 / y1 * (bottom - top), abs=0.1)
    assert y == pytest.approx(bottom - 1 / y1 * (bottom - top), abs=0.1)


@pytest.mark.parametrize("values", [[], [None], [0.0], [5.0, 5.0], [-1e-9, 1e9], [1e-300, 1.0], [1, 1, 1, 1e6]])
def test_odd_curves(values):
    lines = [Line("odd", list(enumerate(values)))]
    for from_zero in (True, False):
        svg = ElementTree.fromstring(draw_chart(lines, "odd", from_zero=from_zero))
        assert "nan" not in ElementTree.tostring(svg, "unicode")
