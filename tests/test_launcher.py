"""What a launcher left out, set wrongly, or was configured for gets one sentence; several processes say it once."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import train_text_to_image
import train_text_to_image_flax
import train_text_to_image_sdxl
from training_utils.base import launch
from training_utils.cli.launcher_variables import JAX, TORCH

MINIMUM = ["--pretrained_model_name_or_path", "model", "--train_data_dir", str(ROOT)]
COMPLETE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function from variables of the environment, and flags, to the sentence that refuses them, or None."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def refused(variables, *flags, script=train_text_to_image):
        for name in (*TORCH, "LOCAL_WORLD_SIZE", *JAX):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        try:
            script.parse_args([*MINIMUM, *flags])
        except SystemExit as left:
            assert left.code == 2
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1
            return said
        return None

    return refused


INCOMPLETE = {
    "LOCAL_RANK=0": "LOCAL_RANK is set in the environment, as for one of several processes, but not RANK, WORLD_SIZE, "
    "MASTER_ADDR and MASTER_PORT; start the script with accelerate launch",
    "LOCAL_RANK=3": "LOCAL_RANK is set in the environment",
    "RANK=0": "RANK is set in the environment, as for one of several processes, but not WORLD_SIZE",
    "RANK=1": "RANK is set in the environment, as for one of several processes, but not WORLD_SIZE",
    "WORLD_SIZE=2": "WORLD_SIZE 2 is set in the environment, as for one of several processes, but not RANK",
    "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0": "but not MASTER_ADDR and MASTER_PORT",
    "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_PORT=1": "but not MASTER_ADDR; start",
    "WORLD_SIZE=1 LOCAL_RANK=0": "but not RANK, MASTER_ADDR and MASTER_PORT",
    "LOCAL_RANK=x": "LOCAL_RANK is 'x' in the environment, not a whole number",
    "RANK=": "RANK is '' in the environment, not a whole number",
    "WORLD_SIZE=two": "WORLD_SIZE is 'two' in the environment, not a whole number",
    "WORLD_SIZE=2.0": "WORLD_SIZE is '2.0' in the environment, not a whole number",
    "RANK=-1": "RANK is '-1' in the environment, not a whole number",
    "LOCAL_WORLD_SIZE=all": "LOCAL_WORLD_SIZE is 'all' in the environment",
    "WORLD_SIZE=0": "WORLD_SIZE is 0 in the environment",
    "WORLD_SIZE=1 RANK=1": "RANK 1 in the environment does not go with WORLD_SIZE 1, since ranks count from 0",
}
CONTRADICTORY = {
    "RANK=2": "RANK 2 in the environment does not go with WORLD_SIZE 2",
    "LOCAL_RANK=2": "LOCAL_RANK 2 in the environment does not go with WORLD_SIZE 2",
    "LOCAL_WORLD_SIZE=1": "LOCAL_RANK 1 in the environment does not go with LOCAL_WORLD_SIZE 1",
    "LOCAL_WORLD_SIZE=3": "LOCAL_WORLD_SIZE 3 in the environment is above WORLD_SIZE 2",
    "LOCAL_WORLD_SIZE=all": "LOCAL_WORLD_SIZE is 'all' in the environment",
    "MASTER_PORT=tcp://10.0.0.1:29500": "MASTER_PORT is 'tcp://10.0.0.1:29500' in the environment, not a whole number",
    "MASTER_PORT=0": "MASTER_PORT 0 in the environment is not from 1 to 65535",
    "MASTER_PORT=70000": "MASTER_PORT 70000 in the environment is not from 1 to 65535",
}


def variables_of(text):
    return dict(pair.split("=", 1) for pair in text.split())


@pytest.mark.parametrize("text", INCOMPLETE)
def test_incomplete_variables_get_their_sentence(text, refusal):
    assert INCOMPLETE[text] in refusal(variables_of(text))


@pytest.mark.parametrize("text", CONTRADICTORY)
def test_contradictory_variables_get_their_sentence(text, refusal):
    assert CONTRADICTORY[text] in refusal(COMPLETE | variables_of(text))


@pytest.mark.parametrize("missing", TORCH)
def test_each_missing_variable_is_named(missing, refusal):
    variables = {name: value for name, value in COMPLETE.items() if name != missing}
    if missing == "WORLD_SIZE":
        del variables["RANK"]
    assert missing in refusal(variables).split("but not")[1]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        COMPLETE,
        COMPLETE | {"LOCAL_WORLD_SIZE": "2"},
        COMPLETE | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "tcp://10.0.0.1:80"},  # a service of Kubernetes
    ],
)
def test_complete_variables_are_taken(variables, refusal):
    assert refusal(variables) is None


IN_JAX = {
    "JAX_COORDINATOR_ADDRESS=a:1": "is set in the environment, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    "JAX_PROCESS_ID=0": "JAX_PROCESS_ID is set in the environment, but not JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_ADDRESS=a:1 JAX_PROCESS_ID=0": "are set in the environment, but not JAX_NUM_PROCESSES; set all",
    "LOCAL_RANK=x": "LOCAL_RANK is 'x' in the environment, not a whole number",
    "RANK=1": "the JAX script uses all devices of a machine from one process",
    "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1": "start it with python",
    "JAX_COORDINATOR_ADDRESS=a:1 JAX_PROCESS_ID=0 JAX_NUM_PROCESSES=2": None,
    "JAX_COORDINATOR_ADDRESS=a:1 SLURM_STEP_NUM_TASKS=2": None,
    "WORLD_SIZE=1 RANK=0": None,
    "LOCAL_RANK=0": None,
}


@pytest.mark.parametrize("text", IN_JAX)
def test_variables_for_jax_get_their_sentence(text, refusal):
    said = refusal(variables_of(text), script=train_text_to_image_flax)
    assert said is None if IN_JAX[text] is None else IN_JAX[text] in said


CONFIGURED = {
    "ACCELERATE_MIXED_PRECISION=fp8": "accelerate is configured for mixed precision fp8, in which these scripts",
    "ACCELERATE_MIXED_PRECISION=FP8": "mixed precision fp8",
    "ACCELERATE_USE_MEGATRON_LM=true": "accelerate is configured for Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG=true": "accelerate is configured for a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER=true": "SageMaker's distributed library",
    "ACCELERATE_DYNAMO_BACKEND=TENSORRT": "--dynamo_backend tensorrt, which does not train here; use inductor, or no",
    "ACCELERATE_DYNAMO_BACKEND=nonsense": "--dynamo_backend nonsense",
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR ACCELERATE_DYNAMO_MODE=fast": "--dynamo_mode fast; torch knows default",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4": "contradicts --gradient_accumulation_steps 1; unset it",
    "ACCELERATE_MIXED_PRECISION=bf16": None,
    "ACCELERATE_USE_MEGATRON_LM=false": None,
    "ACCELERATE_USE_SAGEMAKER=true ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE=NO": None,
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR ACCELERATE_DYNAMO_MODE=reduce-overhead": None,
    "ACCELERATE_DYNAMO_BACKEND=NO ACCELERATE_DYNAMO_MODE=default": None,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1": None,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=auto": None,
}


@pytest.mark.parametrize("text", CONFIGURED)
def test_what_accelerate_was_configured_for_gets_its_sentence(text, refusal):
    said = refusal(variables_of(text), script=train_text_to_image_sdxl)
    assert said is None if CONFIGURED[text] is None else CONFIGURED[text] in said
    assert refusal(variables_of(text), script=train_text_to_image_flax) is None  # which accelerate does not concern


def test_the_flag_wins_over_what_accelerate_was_configured_for(refusal):
    assert refusal({"ACCELERATE_MIXED_PRECISION": "fp8"}, "--mixed_precision", "bf16") is None
    assert refusal({"ACCELERATE_MIXED_PRECISION": "fp8"}, "--full_bf16") is None


FIRST = [{}, {"RANK": "0"}, {"RANK": "4", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "x"}, {"SLURM_LOCALID": "0"}]
OTHERS = [{"RANK": "1"}, {"LOCAL_RANK": "1"}, {"RANK": "4", "LOCAL_RANK": "3"}, {"JAX_PROCESS_ID": "1"}]


@pytest.mark.parametrize("variables, first", [(one, True) for one in FIRST] + [(one, False) for one in OTHERS])
def test_the_first_process_of_a_machine_speaks(variables, first, monkeypatch):
    for name in launch.FIRST_HERE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.is_first_here() is first


@pytest.mark.parametrize("words", [["--lora_rnk", "3"], [*MINIMUM, "--resolution", "65"], [*MINIMUM, "--output_dir="]])
def test_of_two_processes_one_says_what_is_wrong(words):
    codes = []
    said = []
    started = []
    for rank in ("0", "1"):
        environment = os.environ | COMPLETE | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "train_text_to_image.py", *words]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in started:
        said.append(process.communicate()[1])
        codes.append(process.returncode)
    assert codes == [2, 2]
    assert len(said[0].splitlines()) == 1 and "error: " in said[0] and said[1] == ""
