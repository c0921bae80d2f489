"""A flag that a script does not have gets its name here, what there is instead, or the spelling that was meant."""

import re

import pytest
from conftest import ROOT

from training_utils.cli import table
from training_utils.cli.flag import Flag
from training_utils.cli.scripts import SCRIPTS
from training_utils.cli.suggestion import closest
from training_utils.cli.table import absent
from training_utils.cli.unknown import advice


def known(script):
    """The flags that a script takes, as they are written."""
    flags = table.flags_of(script)
    return {f"--{name}" for name in flags} | {f"--no_{name}" for name, flag in flags.items() if flag.type is bool}


ADVICE = {
    "train_text_to_image_lora": {
        "--lora_rank": "; here it is --rank",
        "--lr": "; here it is --learning_rate",
        "--model": "; here it is --pretrained_model_name_or_path",
        "--network_dim": "; here it is --rank",
        "--v_parameterization": "; here it is --prediction_type v_prediction",
        "--ip_noise_gamma": "; here it is --input_perturbation",
        "--fp16": "; here it is --mixed_precision fp16",
        "--batch-size": "; here it is --train_batch_size",
        "--sample_prompts": "; here it is --validation_prompt",
        "--dataset_config": "; here it is --train_data_config with a YAML file",
        "--sdpa": " here: the scripts for PyTorch use its own attention",
        "--text_encoder_lr": " here: --learning_rate is that of all weights that are trained",
        "--clip_skip": " here: captions are read from the layer",
        "--reg_data_dir": " here: there are no regularisation images",
        "--lowram": " here: docs/memory.md lists what saves memory",
        "--min_timestep": " here: every timestep may be drawn",
        "--num_processes": " here: what accelerate launch is told stands before the name of the script",
        "--random_crop": " here, only in others of these scripts: Stable Diffusion and SDXL train on drawn crops",
        "--offload_ema": " here, only in others of these scripts",
        "--fuse_optimizer": " here; in others of these scripts it is --fused_backward_pass",
    },
    "train_text_to_image": {
        "--lora_rank": " here; in others of these scripts it is --rank",
        "--sample_prompts": "; here it is --validation_prompts",
        "--validation_prompt": " here, only in others of these scripts; did you mean --validation_prompts?",
    },
    "train_text_to_image_decoder": {
        "--center_crop": " here, only in others of these scripts: the middle of an image is taken without it",
        "--v_pred": " here; in others of these scripts it is --prediction_type v_prediction",
    },
    "train_text_to_image_flax": {"--xformers": " here; in others of these scripts it is --enable_xformers"},
}


@pytest.mark.parametrize("script, word", [(script, word) for script, words in ADVICE.items() for word in words])
def test_a_flag_of_another_trainer_gets_its_advice(script, word):
    assert advice(word, known(script)).startswith(ADVICE[script][word])


TYPOS = {
    "--learning_rat": "--learning_rate",
    "--lerning_rate": "--learning_rate",
    "--learning-rate": "--learning_rate",
    "--LEARNING_RATE": "--learning_rate",
    "-rank": "--rank",
    "--trainbatchsize": "--train_batch_size",
    "--max_train_step_count": "--max_train_steps",
    "--max_train": None,  # steps, or samples
    "--gradiant_acumulation_steps": "--gradient_accumulation_steps",
    "--gradient_accumulation": "--gradient_accumulation_steps",
    "--seeed": "--seed",
    "--sede": "--seed",
    "--output": "--output_dir",
    "--no_use_emma": "--no_use_ema",
    "--hub_tok": "--hub_token",
    # What the nearest spelling would have got wrong.
    "--sdpa": None,
    "--lora_rank": None,
    "--lowram": None,
    "--model": None,
    "--color_aug": None,
    "--unet_lr": None,
    "--no_half_vae": None,
    "--caption_extension": None,
    "--bucket_no_upscale": None,
    "--adam_beta3": None,
    "--use_4bit_adam": None,
    "--use_lora": None,
    "--loss_type": None,
    "--all": None,
    "--x": None,
    "--": None,
}


@pytest.mark.parametrize("word", TYPOS)
def test_only_the_spelling_that_was_surely_meant_is_suggested(word):
    assert closest(word, known("train_text_to_image_lora")) == TYPOS[word]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_wrong_letter_is_always_forgiven(script):
    """In each flag of each script: the last letter but one is missing, doubled, or exchanged with the last."""
    flags = known(script)
    for flag in flags:
        if len(flag) < 7 or flag[-1].isdigit() or "_" in flag[-3:]:
            continue
        for wrong in (flag[:-2] + flag[-1], flag[:-1] + flag[-2:], flag[:-2] + flag[-1] + flag[-2]):
            if wrong not in flags:
                assert closest(wrong, flags) in {flag, *(other for other in flags if other[:-1] == flag[:-1])}, wrong


def test_a_name_stands_in_one_place():
    """A flag that is added here leaves the table of those that are not, and its name is no other flag's."""
    ours = table.names(lambda flag: True)
    theirs = {}
    for flag in table.rows():
        for entry in flag.other_names:
            theirs.setdefault(entry.partition(" ")[0], []).append(flag)
    missing = [name for row in absent.ABSENT for name in row.names]
    assert len(missing) == len(set(missing)) > 200 and len(theirs) > 150
    assert not ours & theirs.keys() and not ours & set(missing) and not theirs.keys() & set(missing)
    for name, flags in theirs.items():
        for at, flag in enumerate(flags):
            assert not any(flag.scripts & other.scripts for other in flags[at + 1 :]), name


def test_an_added_flag_is_one_row(monkeypatch):
    """Its own name is known, and those of others lead to it."""
    row = Flag("clip_layers", int, 1, "a new flag", other_names=("clip_skip",))
    monkeypatch.setattr(table, "rows", lambda: [row])
    assert advice("--clip_skip", {"--clip_layers"}) == "; here it is --clip_layers"


def rows_of(heading):
    """The lines of the first table below a sentence of docs/from_the_originals.md."""
    text = (ROOT / "docs/from_the_originals.md").read_text().split(heading)[1]
    return re.search(r"^\| their flag.*\n\|---\|---\|\n((?:\|.*\n)+)", text, re.M)[1].splitlines()


def listed(names):
    return ", ".join(f"`--{name}`" for name in names)


def test_the_docs_have_every_name():
    lines = []
    for flag in table.rows():
        told = {}
        for entry in flag.other_names:
            name = entry.partition(" ")[0]
            told.setdefault(flag.called_elsewhere(name), []).append(name)
        for words, names in told.items():
            first, space, rest = words.partition(" ")
            lines.append(f"| {listed(names)} | `{first}`{space}{rest} |")
    assert rows_of("## Flags of other trainers") == lines


def test_the_docs_have_every_flag_that_is_not_here():
    lines = []
    for row in absent.ABSENT:
        instead = re.sub(r"(?<!`)(--\w+)", r"`\1`", row.instead)
        lines.append(f"| {listed(row.names)} | {instead} |")
    assert rows_of("These are not here.") == lines


def test_what_is_said_instead_exists():
    from accelerate.commands.launch import launch_command_parser

    flags = {f"--{name}" for name in table.names(lambda flag: True)} | {"--help"}
    flags |= set(launch_command_parser()._option_string_actions)
    for row in absent.ABSENT:
        assert set(re.findall(r"--\w+", row.instead)) <= flags, row.instead
        for file in re.findall(r"docs/\w+\.md", row.instead):
            assert (ROOT / file).exists()


def test_what_the_page_says_is_not_here_is_said_by_the_scripts():
    page = (ROOT / "docs/from_the_originals.md").read_text().split("| kohya's flag")[1].split("\n\n")[0]
    lines = [line for line in page.splitlines() if "| not here" in line]
    assert len(lines) > 4
    for line in lines:
        for name in re.findall(r"`--(\w+)`", line.split("| not here")[0]):
            assert absent.instead_of(name), name
