"""~ and variables in paths, on the command line, in a file of flags and in one of datasets."""

import importlib
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_command_line import SCRIPTS

from training_utils.base.errors import UserError
from training_utils.cli import paths, table
from training_utils.cli.options import DataOptions
from training_utils.cli.values import PathValue
from training_utils.data import mixture

PATHS = sorted(table.names(lambda flag: isinstance(flag.type, PathValue)))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder with a folder of images, which need not be any here, and variables."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("RUN_2", "second")
    monkeypatch.delenv("UNSET", raising=False)
    for folder in ("home/data", "scratch/data"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path / "home"


def parse(script, *words):
    return importlib.import_module(script.removesuffix(".py")).parse_args([*map(str, words)])


def given_words(script, *words):
    """A command line that has what is required, and these words."""
    kandinsky = "prior" in script or "decoder" in script
    model = [] if kandinsky else ["--pretrained_model_name_or_path", "model"]
    return [*model, "--train_data_dir", ROOT / "tests", *words]


def test_every_flag_that_takes_a_path_is_known_as_one():
    """By its name, or by what the help says."""
    texts = [flag for flag in table.rows() if flag.type in (str,) or isinstance(flag.type, PathValue)]
    words = ("_dir", "_path", "config")
    by_name = {flag.name for flag in texts if any(word in flag.name for word in words)}
    by_help = {flag.name for flag in texts if "folder" in flag.help.split(";")[0] or "local path" in flag.help}
    expected = by_name | by_help | {"resume_from_checkpoint"}
    assert expected - {"dataset_config_name", "hub_model_id"} == set(PATHS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tilde_is_the_home_folder_in_every_path(script, home):
    """As it stands behind an equals sign, where no shell has put the folder in its place."""
    names = [name for name in PATHS if name in table.flags_of(script.removesuffix(".py"))]
    for name in set(names) - {"config", "train_data_config", "single_file_config"}:
        args = parse(script, *given_words(script, f"--{name}=~/data"))
        assert getattr(args, name) == str(home / "data"), name


def test_a_file_of_flags_and_one_of_datasets_in_the_home_folder(home):
    (home / "run.yaml").write_text("learning_rate: 1e-3\n")
    (home / "data.yaml").write_text("- path: data\n")
    script = "train_text_to_image.py"
    args = parse(script, *given_words(script, "--config=~/run.yaml"))
    assert args.learning_rate == 1e-3
    model = ["--pretrained_model_name_or_path", "model"]
    assert parse(script, *model, "--train_data_config=~/data.yaml").train_data_config == str(home / "data.yaml")


UNTOUCHED = {
    "output_dir": ["./~", "a~", "a/~/b", "~~", "~nobody_of_this_name/x", "$HOME/x", "${HOME}"],
    "pretrained_model_name_or_path": ["stabilityai/sdxl", "a~b/c"],
    "dataset_name": ["me/my~data"],
    "validation_prompt": ["~", "~/x", "$HOME", "${UNSET}"],
    "resume_from_checkpoint": ["latest", "checkpoint-5"],
    "hub_model_id": ["~/x"],
    "image_column": ["~"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in UNTOUCHED.items() for text in texts])
def test_what_a_shell_leaves_alone_stays(name, text):
    script = "train_text_to_image_lora.py"
    assert getattr(parse(script, *given_words(script, f"--{name}={text}")), name) == text


FILED = {
    "~/out": "{home}/out",
    "${HOME}/out": "{home}/out",
    "$HOME/out": "{home}/out",
    "${SCRATCH}/a/${RUN_2}": "{scratch}/a/second",
    "$SCRATCH/$RUN_2": "{scratch}/second",
    "out-$$5": "out-$5",
    "out-$5": "out-$5",
    "$${HOME}": "${HOME}",
    "'~/with space'": "{home}/with space",
    "./~": "./~",
    "me/model": "me/model",
}


@pytest.mark.parametrize("text", FILED)
def test_variables_and_tilde_in_a_file_of_flags(tmp_path, home, text):
    script, file = "train_text_to_image_lora.py", tmp_path / "run.yaml"
    lines = [f"output_dir: {text}", f"pretrained_model_name_or_path: {text}", "validation_prompt: ${UNSET} $HOME ~/x"]
    file.write_text("\n".join(lines))
    args = parse(script, "--train_data_dir", ROOT, "--config", file)
    expected = FILED[text].replace("{home}", str(home)).replace("{scratch}", str(tmp_path / "scratch"))
    assert (args.output_dir, args.pretrained_model_name_or_path) == (expected, expected)
    assert args.validation_prompt == "${UNSET} $HOME ~/x"


REFUSED = {
    "${UNSET}/out": "the variable UNSET in ${UNSET}/out is not set",
    "a/$UNSET": "the variable UNSET in a/$UNSET is not set",
    "${HOME:-x}": "${HOME:-x} in ${HOME:-x} is no variable, which is written ${NAME}",
    "${}": "${} in ${} is no variable",
    "${2}": "${2} in ${2} is no variable",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_variable_that_is_not_set_is_named(tmp_path, capsys, text):
    script, file = "train_text_to_image_lora.py", tmp_path / "run.yaml"
    file.write_text(f"learning_rate: 1e-4\noutput_dir: {text!r}\n")
    with pytest.raises(SystemExit) as ended:
        parse(script, "--train_data_dir", ROOT, "--config", file)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert f"--config {file}, line 2, output_dir: {REFUSED[text]}" in said


def test_no_home_folder_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("os.path.expanduser", lambda text: text)  # a container whose user has no name
    script = "train_text_to_image_lora.py"
    with pytest.raises(SystemExit):
        parse(script, *given_words(script, "--output_dir=~/out"))
    assert "--output_dir: no home folder is known for ~/out; set HOME" in capsys.readouterr().err


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("$a{}5_/"), max_size=9))
def test_a_path_is_read_as_it_was_written(path):
    assert paths.expand_variables(paths.without_variables(path)) == path


def test_paths_of_datasets(tmp_path, home):
    file = tmp_path / "data.yaml"
    entries = ["~/data", "${SCRATCH}/data", "$HOME/data", "scratch/data"]
    prefix = "\n  caption_prefix: ~ ${UNSET}"
    file.write_text("".join(f"- path: {entry}{prefix}\n" for entry in entries) + "- dataset_name: ~/data\n")
    found = mixture._entries(file)
    scratch = tmp_path / "scratch" / "data"
    assert [entry["path"] for entry in found[:3]] == [str(home / "data"), str(scratch), str(home / "data")]
    assert found[3]["path"] == "scratch/data" and found[4]["dataset_name"] == str(home / "data")
    assert found[0]["caption_prefix"] == "~ ${UNSET}"
    for key in ("path", "dataset_name"):
        file.write_text(f"- {key}: ${{UNSET}}/data\n")
        with pytest.raises(UserError, match=f"source 1: {key}: the variable UNSET"):
            mixture.load_mixture(DataOptions(config=str(file)))


def test_the_result_is_in_the_home_folder(run_lora, tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in run_lora.argv("x", "--max_train_steps", "1") if word not in ("--output_dir", "x")]
    assert importlib.import_module(run_lora.script).main([*words, "--output_dir=~/out"]) == 0
    assert (home / "out" / "pytorch_lora_weights.safetensors").exists() and not Path("~").exists()
