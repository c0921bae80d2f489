"""A run is one file: what --config takes, what it refuses and why, and that run.yaml repeats its run to the bit."""

import importlib

import pytest
import yaml
from conftest import ROOT, reset_accelerate, result_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_command_line import SCRIPTS, flags_of

import train_text_to_image
import train_text_to_image_sdxl
from training_utils.cli import paths, run_file, table
from training_utils.cli.flag import Flag
from training_utils.run import output_folder

MODEL = f"pretrained_model_name_or_path: model\ntrain_data_dir: {ROOT}\n"


def parsed(tmp_path, text, *words, script=train_text_to_image):
    """What a script makes of a config, whose text or bytes these are, and the words beside it."""
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return script.parse_args(["--config", str(path), *words])


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_config_stands_for_the_command_line(tmp_path):
    """Required flags too; and what is given counts as given, what is null or false does not."""
    text = "learning-rate: 1e-5\nmixed_precision: no\nuse_ema: true\ncenter_crop: false\nsnr_gamma: null\nseed: 0x\n"
    args = parsed(tmp_path, MODEL + text.replace("0x", "08") + "validation_prompts: [--a, 'null', é ü]\n")
    assert (args.pretrained_model_name_or_path, args.learning_rate, args.mixed_precision) == ("model", 1e-5, "no")
    assert args.use_ema is True and args.center_crop is False and args.snr_gamma is None and args.seed == 8
    assert args.validation_prompts == ["--a", "null", "é ü"]
    words = (
        "pretrained_model_name_or_path train_data_dir learning_rate mixed_precision use_ema seed validation_prompts"
    )
    assert args.given == {*words.split(), "config"}


def test_a_file_of_another_script_is_named(tmp_path, capsys):
    lora = importlib.import_module("train_text_to_image_lora")
    args = lora.parse_args(["--pretrained_model_name_or_path", "model", "--train_data_dir", str(ROOT / "tests")])
    with pytest.raises(SystemExit):
        parsed(tmp_path, run_file.as_file(args, 7))
    said = capsys.readouterr().err
    assert "there is no flag rank here, only in others of these scripts; the file was written by" in said
    assert "written by train_text_to_image_lora.py" in said


def test_the_command_line_wins(tmp_path):
    text = MODEL + "learning_rate: 1\nuse_ema: true\nvalidation_prompts: [a, b]\n"
    words = ["--learning_rate", "2", "--no_use_ema", "--validation_prompts", "c"]
    args = parsed(tmp_path, text, *words)
    assert (args.learning_rate, args.use_ema, args.validation_prompts) == (2, False, ["c"])
    assert "use_ema" not in args.given


def test_one_value_of_a_list_needs_no_brackets(tmp_path):
    assert parsed(tmp_path, MODEL + "validation_prompts: a cat\n").validation_prompts == ["a cat"]


@pytest.mark.parametrize("name", ["caption_dropout", "proportion_empty_prompts"])
@pytest.mark.parametrize("value", [0, 0.25])
def test_either_name_of_the_dropout_wins_over_both_of_the_file(tmp_path, name, value):
    text = f"{MODEL}caption_dropout: 0.5\nproportion_empty_prompts: 0.5\n"
    assert parsed(tmp_path, text, f"--{name}", str(value), script=train_text_to_image_sdxl).caption_dropout == value


def test_epochs_on_the_command_line_win_over_steps_of_the_file(tmp_path):
    text = f"{MODEL}max_train_steps: 6\nvalidation_steps: 3\n"
    args = parsed(tmp_path, text, "--num_train_epochs", "50", "--validation_epochs", "2")
    assert args.max_train_steps is None and args.validation_steps is None
    assert parsed(tmp_path, text).max_train_steps == 6
    assert parsed(tmp_path, text, "--num_train_epochs", "50", "--max_train_steps", "9").max_train_steps == 9


def test_a_config_can_ask_for_a_check_of_the_data(tmp_path):
    assert parsed(tmp_path, f"train_data_dir: {ROOT}\ncheck_data: true\n").check_data


REFUSED = {
    "learning_rat: 1": "line 1: there is no flag learning_rat; did you mean learning_rate?",
    "xyzzy: 1": "line 1: there is no flag xyzzy (",
    "lr: 1e-4": "line 1: there is no flag lr; here it is --learning_rate",
    "clip_skip: 2": "line 1: there is no flag clip_skip here: captions are read from the layer",
    "hub_token: hf_x": "line 1: hub_token is a secret",
    "config: other.yaml": "line 1: config cannot be set in such a file",
    "seed: 1\nSeed: 1": "line 2: there is no flag Seed; did you mean seed?",
    "seed: 1\n\nseed: 2": "line 3: seed is already in line 1",
    "adam-beta1: 0.9\nadam_beta1: 0.8": "line 2: adam_beta1 is already in line 1",
    "learning_rate: -1": "line 1, learning_rate: must be a number of at least 0.0, not -1",
    "learning_rate: '1e'": "line 1, learning_rate: '1e' is not a number",
    "learning_rate: [1, 2]": "line 1, learning_rate: takes one value",
    "learning_rate: {a: 1}": "line 1, learning_rate: takes one value",
    "validation_prompts: [[a]]": "line 1, validation_prompts: takes a value, or a list of values",
    "use_ema: yes": "line 1, use_ema: must be true or false, not yes",
    "use_ema: [true]": "line 1, use_ema: takes one value",
    "seed: 1.5": "line 1, seed: '1.5' is not a whole number",
    "prediction_type: v": "line 1, prediction_type: invalid choice: 'v'",
    "seed: !!python/object/apply:os.system [ls]": "line 1, seed: takes one value",
    "use_8bit_adam: true\noptimizer: adafactor": "--use_8bit_adam contradicts --optimizer adafactor",
    "? [a]\n: b": "line 1: there is no flag of",
    "<<: {seed: 1}": "line 1: there is no flag <<",
    "seed: 1: 2": "is not YAML: line 1: mapping values are not allowed here",
    "seed: 1\n---\nseed: 2": "is not YAML: line 2",
    "seed: \x01": "is not YAML: unacceptable character",
    "[" * 1100: "is not YAML",
    "learning_rate 1": "must hold a flag and its value on each line, such as learning_rate: 1e-4",
    "": "must hold a flag and its value on each line",
    "- seed": "must hold a flag and its value on each line",
    b"\xff\xfe": "is not UTF-8",
}


def refusal(capsys, action):
    with pytest.raises(SystemExit) as left:
        action()
    said = capsys.readouterr().err.strip()
    assert left.value.code == 2 and len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("text", REFUSED)
def test_a_wrong_config_gets_its_sentence(text, tmp_path, capsys):
    assert REFUSED[text] in refusal(
        capsys,
        lambda: parsed(
            tmp_path, text, "--train_data_dir", str(ROOT), *"--pretrained_model_name_or_path model".split()
        ),
    )


def test_a_config_that_is_not_there(tmp_path, capsys):
    for path, why in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        said = refusal(capsys, lambda path=path: train_text_to_image.parse_args(["--config", str(path)]))
        assert f"--config {path} cannot be read: {why}" in said


def test_what_is_required_may_be_in_neither(tmp_path, capsys):
    said = refusal(capsys, lambda: parsed(tmp_path, f"train_data_dir: {ROOT}\n"))
    assert "required: --pretrained_model_name_or_path" in said


# --- writing ---------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=12)
WORDS = [
    "no",
    "null",
    "~",
    "true",
    "1e-4",
    "0x10",
    "1_000",
    "#",
    "a: b",
    "- a",
    "'",
    '"',
    " a ",
    "a\nb",
    "é",
    "😀",
    "\x85",
    "$",
    "$a",
    "${a}",
    "$$",
    "$$$a",
    "$5${",
]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.one_of(st.sampled_from(WORDS), TEXTS),
    st.floats(0, allow_nan=False, allow_infinity=False),
    st.lists(TEXTS, min_size=1, max_size=3),
)
def test_any_value_is_read_as_it_was_written(text, number, prompts):
    """By this suite, and by every other reader of YAML."""
    words = ["--pretrained_model_name_or_path", "model", "--train_data_dir", str(ROOT), f"--cache_dir={text}"]
    args = train_text_to_image.parse_args([*words, "--learning_rate", repr(number)])
    args.validation_prompts = prompts
    written = run_file.as_file(args, 7)
    known = {name: Flag(name, nargs="+" if name == "validation_prompts" else None) for name in vars(args)}
    known["cache_dir"] = table.flags_of("train_text_to_image")["cache_dir"]
    ours = run_file_values(written, known)
    folder = args.cache_dir  # with the home folder in place of ~
    assert (ours["cache_dir"], float(ours["learning_rate"]), ours["validation_prompts"]) == (folder, number, prompts)
    theirs = yaml.safe_load(written)
    assert (theirs["cache_dir"], float(theirs["learning_rate"]), theirs["validation_prompts"]) == (
        paths.without_variables(folder),
        number,
        prompts,
    )


def run_file_values(text, known):
    return run_file.read_text(text.encode(), known, lambda name, value: value, "the file")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_it_once(script, tmp_path):
    """Except secrets and what is for one run only; and a run of it writes the same again."""
    names = flags_of(script)
    module = importlib.import_module(script.removesuffix(".py"))
    kandinsky = "prior" in script or "decoder" in script
    words = [] if kandinsky else ["--pretrained_model_name_or_path", "model"]
    args = module.parse_args(
        [*words, "--train_data_dir", str(ROOT / "tests"), "--hub_token", "hf_secret", "--random_flip"]
    )
    args.max_train_steps = args.max_train_steps or 800  # as a run does
    written = run_file.as_file(args, 7)
    once = table.names(lambda flag: flag.once or flag.secret)
    for name in names:
        assert written.count(f"\n{name}: ") + written.count(f"\n# {name}: ") == (name not in once), name
    assert "hf_secret" not in written and "\nseed: 7 " in written and "\n# max_train_steps: 800 " in written
    assert all(line.isascii() and line == line.rstrip() for line in written.splitlines())
    again = parsed(tmp_path, written, script=module)
    again.max_train_steps = 800
    assert not again.notices and run_file.as_file(again, 7) == written


def test_bytes_that_are_no_text_cost_the_file_and_not_the_run(tmp_path, capsys):
    output_folder.write_run_file(tmp_path, "output_dir: \udcff\n")
    assert "run.yaml could not be written" in capsys.readouterr().err


# --- repeating -------------------------------------------------------------------------------------------------------

SETTINGS = {
    "run": "--use_ema --random_flip --caption_dropout 0.5 --lr_scheduler cosine --lr_warmup_steps 1 --snr_gamma 5"
    " --validation_prompts one two --validation_num_inference_steps 1 --aspect_ratio_bucketing --bucket_reso_steps 8",
    "run_lora": "--rank 2 --lora_dropout 0.5 --train_text_encoder --use_dora --num_train_epochs 1",
    "run_lora_sdxl": "--timestep_bias_strategy later --proportion_empty_prompts 0.3",
    "run_sdxl": "--full_bf16 --optimizer adafactor",
}


def test_a_run_is_repeated_from_its_file(each, request, tmp_path):
    """Without --seed one is drawn, which the file holds."""
    main = importlib.import_module(each.script).main
    out, again = tmp_path / "out", tmp_path / "again"
    words = each.argv(
        out, "--encoding_cache_dir", tmp_path / "cache", *SETTINGS.get(request.node.callspec.id, "").split()
    )
    del words[words.index("--seed") : words.index("--seed") + 2]
    at = words.index("--max_train_steps")
    words[at : at + 2] = [] if "--num_train_epochs" in words else ["--max_train_steps", "2"]
    reset_accelerate()
    assert main(words) == 0
    reset_accelerate()
    assert main(["--config", str(out / "run.yaml"), "--output_dir", str(again)]) == 0
    assert result_bytes(again) == result_bytes(out)
    first, second = ((folder / "run.yaml").read_text() for folder in (out, again))
    assert second == first.replace(f"output_dir: {out} ", f"output_dir: {again} ")


def test_a_run_is_continued_from_its_file(run, tmp_path):
    """The file in the folder is then that of the run that went on."""
    run(tmp_path / "complete")
    out = tmp_path / "out"
    run(out, "--checkpointing_steps", "2", "--max_train_steps", "3")
    reset_accelerate()
    words = ["--config", str(out / "run.yaml"), "--resume_from_checkpoint", "latest", "--max_train_steps", "6"]
    assert train_text_to_image.main(words) == 0
    assert result_bytes(out) == result_bytes(tmp_path / "complete")
    values = yaml.safe_load((out / "run.yaml").read_text())
    assert values["max_train_steps"] == 6 and "resume_from_checkpoint" not in values
