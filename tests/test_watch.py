"""Every line of docs/watch.md runs, with a tiny model and few updates in place of a real one and many."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, reset_accelerate
from PIL import Image
from test_readme import SMALLER, bash_commands, on_tiny_models, python_snippets

import train_text_to_image
from training_utils import report
from training_utils.metrics import Log

PAGE = (ROOT / "docs" / "watch.md").read_text()
FEW = (
    "--max_train_steps 4 --validation_steps 2 --resolution 16 --train_batch_size 4 --validation_num_inference_steps 2"
)


@pytest.fixture(scope="module")
def watched(sd, pictures, tmp_path_factory):
    """A folder in which the page's commands that train have run."""
    folder = tmp_path_factory.mktemp("watch")
    first, second = bash_commands(PAGE, "accelerate launch")
    words = on_tiny_models(first, sd, None, None, pictures, folder / "my_model")
    again = second[second.index("--config") :]
    places = {"my_model/run.yaml": folder / "my_model" / "run.yaml", "my_second": folder / "my_second"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in ([*words, *FEW.split(), "--validation_split", "0.2"], [places.get(word, word) for word in again]):
            reset_accelerate()
            assert train_text_to_image.main([*map(str, line)]) == 0
    return folder


def test_the_quickstarts_digits(sd, pictures, tmp_path):
    (command,) = bash_commands(PAGE, "python train")
    words = on_tiny_models(command, sd, None, None, pictures, tmp_path / "out")
    words[words.index("--encoding_cache_dir") + 1] = str(tmp_path / "encodings")
    reset_accelerate()
    assert train_text_to_image.main([*words, *SMALLER, "--validation_split", "0.2"]) == 0


@pytest.mark.parametrize("command", bash_commands(PAGE, "python -m"), ids=lambda command: command[-1])
def test_report(command, watched, monkeypatch, capsys):
    assert command[:3] == ["python", "-m", "training_utils.report"]
    monkeypatch.chdir(watched)
    assert report.main(command[3:]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert page.count("<svg") == 6 and page.count("<img") == 2 * page.count("<h2>The folder")


def test_tensorboard(watched, monkeypatch):
    from tensorboard import default, program

    (command,) = bash_commands(PAGE, "tensorboard")
    monkeypatch.chdir(watched)
    server = program.TensorBoard(plugins=default.get_plugins())
    server.configure(argv=command)
    assert list(Path(server.flags.logdir).rglob("events*"))


@pytest.mark.parametrize("snippet", python_snippets(PAGE))
def test_snippet(snippet, watched, monkeypatch, capsys):
    monkeypatch.chdir(watched)
    exec(snippet, {})
    assert int(capsys.readouterr().out) == Log(watched / "my_model").lowest("val_loss")[0]


def test_what_the_page_names(watched):
    known = {"validation", *Log(watched / "my_model").curves, "memory_peak_gib", "memory_reserved_gib"}
    curves = PAGE.split("| curve |")[1].split("\n\n")[0]
    assert {name for line in curves.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])} == known
    choices = {name for name in train_text_to_image.flags.TRACKERS if name not in ("all", "none")}
    assert all(f"`{name}`" in PAGE or name == "tensorboard" for name in choices)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", PAGE):
        path = ROOT / "docs" / picture
        assert Image.open(path).width > 800 and path.stat().st_size < 300_000
