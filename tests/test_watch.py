"""What docs/watch.md says of reports, trackers and metrics.jsonl, over its own runs with a tiny model; that all of its
commands run is for tests/test_docs.py."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, reset_accelerate
from pages import blocks, commands, on_tiny_models
from PIL import Image

import train_text_to_image
from tools.report import command as report_command
from training_utils.cli import table
from training_utils.run.metrics import Log

PAGE = (ROOT / "docs" / "watch.md").read_text()
FEW = (
    "--max_train_steps 4 --validation_steps 2 --resolution 16 --train_batch_size 4 --validation_num_inference_steps 2"
)


def lines(*start):
    """The page's commands that begin with these words."""
    return [one for one in commands() if one.page == "docs/watch.md" and one.words[: len(start)] == start]


@pytest.fixture(scope="module")
def watched(sd, images, tmp_path_factory):
    """A folder in which the page's commands that train have run."""
    folder = tmp_path_factory.mktemp("watch")
    first, second = lines("accelerate", "launch")
    words = on_tiny_models(first, sd, None, None, images, folder / "my_model")
    again = [
        {"my_model/run.yaml": folder / "my_model/run.yaml", "my_second": folder / "my_second"}.get(word, word)
        for word in second.flags
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in ([*words, *FEW.split(), "--validation_split", "0.2"], again):
            reset_accelerate()
            assert train_text_to_image.main([*map(str, line)]) == 0
    return folder


@pytest.mark.parametrize("command", lines("python", "-m", "tools.report"), ids=lambda one: one.words[-1])
def test_report(command, watched, monkeypatch, capsys):
    monkeypatch.chdir(watched)
    assert report_command.main(list(command.words[3:])) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert page.count("<svg") == 6 and page.count("<img") == 2 * page.count("<h2>The folder")


def test_tensorboard(watched, monkeypatch):
    from tensorboard import default, program

    (command,) = lines("tensorboard")
    monkeypatch.chdir(watched)
    server = program.TensorBoard(plugins=default.get_plugins())
    server.configure(argv=list(command.words))
    assert list(Path(server.flags.logdir).rglob("events*"))


def test_snippet(watched, monkeypatch, capsys):
    (snippet,) = (block.text for block in blocks("python") if block.page == "docs/watch.md")
    monkeypatch.chdir(watched)
    exec(snippet, {})
    assert int(capsys.readouterr().out) == Log(watched / "my_model").lowest("val_loss")[0]


def test_what_the_page_names(watched):
    known = {"validation", *Log(watched / "my_model").curves, "memory_peak_gib", "memory_reserved_gib"}
    curves = PAGE.split("| curve |")[1].split("\n\n")[0]
    assert {name for line in curves.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])} == known
    choices = set(table.flags_of("train_text_to_image")["report_to"].choices) - {"all", "none"}
    assert all(f"`{name}`" in PAGE or name == "tensorboard" for name in choices)
    for image in re.findall(r"!\[.*?\]\((.*?)\)", PAGE):
        path = ROOT / "docs" / image
        assert Image.open(path).width > 800 and path.stat().st_size < 300_000
