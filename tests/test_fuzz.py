"""Random command lines train or get a sentence; random damage to a checkpoint is never taken for a whole one."""

import shutil

import pytest
from conftest import KANDINSKY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_command_line import flags_of

from training_utils.base.errors import UserError
from training_utils.cli.values import plain_type
from training_utils.run import checkpoints

# --- command lines ---------------------------------------------------------------------------------------------------

NOT_TRIED = set(  # names of things, the network, and what would only make a run long
    "pretrained_model_name_or_path pretrained_vae_model_name_or_path pretrained_prior_model_name_or_path cache_dir"
    " pretrained_decoder_model_name_or_path revision non_ema_revision prior_revision decoder_revision variant"
    " dataset_name dataset_config_name train_data_dir output_dir max_train_steps local_rank report_to logging_dir"
    " push_to_hub hub_token hub_model_id hub_private_repo push_checkpoints tracker_project_name"
    " process_group_timeout check_data compilation_cache_dir encoding_cache_dir config dry_run"
    " train_data_config single_file_config".split()
)
WORDS = {
    "resolution": ["8", "16", "24", "20", "0"],
    "min_bucket_reso": ["8", "16", "40"],
    "max_bucket_reso": ["16", "32", "8"],
    "bucket_reso_steps": ["8", "16", "12"],
    "rank": ["1", "4", "0"],
    "dataloader_num_workers": ["0", "1"],
    "validation_num_inference_steps": ["1", "2"],
    "num_validation_images": ["0", "1"],
    "train_batch_size": ["1", "3", "1000", "0"],
    "gradient_accumulation_steps": ["1", "2", "0"],
    "resume_from_checkpoint": ["latest", "checkpoint-1", "nowhere/checkpoint-2", ""],
    "image_column": ["image", "image"],
    "caption_column": ["text", "caption"],
    "validation_prompt": ["a handwritten one", ""],
    "validation_prompts": ["a handwritten one", ""],
    None: [None],
    int: ["0", "1", "3", "-1", "x"],
    float: ["0", "0.5", "1", "2.5", "-1", "nan", "1e-5"],
}


def command_lines(script, monkeypatch):
    """A strategy for words on a script's command line: up to eight flags, most of their values sensible."""
    flags = {name: flag for name, flag in flags_of(script).items() if name not in NOT_TRIED}

    def words(name):
        kind, choices = plain_type(flags[name].type), flags[name].choices
        if kind is bool:
            return st.just([f"--{name}"])
        values = WORDS.get(name) or ([*choices, "nonsense"] if choices else WORDS[kind])
        return st.sampled_from(values).map(lambda value: [f"--{name}", value])

    names = st.lists(st.sampled_from(sorted(flags)), max_size=8, unique=True)
    return names.flatmap(lambda chosen: st.tuples(*map(words, chosen))).map(
        lambda parts: [w for p in parts for w in p]
    )


def try_command_lines(run, tmp_path, monkeypatch, count):
    with monkeypatch.context() as patch:
        lines = command_lines(f"{run.script}.py", patch)
    seen = {"trained": 0, "refused": 0}

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(lines)
    def check(words):
        out = tmp_path / str(sum(seen.values()))
        try:
            assert run(out, "--max_train_steps", "2", "--encoding_cache_dir", tmp_path / "cache", *words) == 0
            seen["trained"] += 1
        except SystemExit as refused:  # by the command line's parser
            assert refused.code == 2
            seen["refused"] += 1
        except UserError as refused:
            assert "\n" not in str(refused) and refused.exit_code in (1, 2)
            seen["refused"] += 1
        shutil.rmtree(out, ignore_errors=True)

    check()
    assert min(seen.values()) > 0, seen


def test_command_lines(each, tmp_path, monkeypatch):
    try_command_lines(each, tmp_path, monkeypatch, 12)


@pytest.mark.slow
def test_many_command_lines(each, tmp_path, monkeypatch):
    try_command_lines(each, tmp_path, monkeypatch, 150)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["run", "run_lora", *KANDINSKY[:2]])
def complete(request, tmp_path_factory):
    """A checkpoint and the content of its files."""
    out = tmp_path_factory.mktemp("complete")
    request.getfixturevalue(request.param)(out, "--checkpointing_steps", "1", "--max_train_steps", "1", "--use_ema")
    folder = out / "checkpoint-1"
    return folder, {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


HARM = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("zeros"), st.floats(0, 1, exclude_max=True), st.integers(1, 600)),
    st.tuples(st.just("more"), st.just(0.0), st.integers(1, 600)),
    st.tuples(st.just("missing"), st.just(0.0), st.just(0)),
)


def harmed(content, how, place, amount):
    """The content of a file after one kind of damage; None where the file is gone."""
    at = int(place * len(content))
    if how == "flip":
        return content[:at] + bytes([content[at] ^ amount]) + content[at + 1 :]
    if how == "cut":
        return content[:at]
    if how == "zeros":
        return content[:at] + bytes(len(content[at : at + amount])) + content[at + amount :]
    return content + bytes(amount) if how == "more" else None


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damage_never_loads_silently(complete, data):
    """Whatever byte of whatever file: the checkpoint is refused, or nothing that it holds has changed."""
    folder, contents = complete
    path = data.draw(st.sampled_from(list(contents)))
    after = harmed(contents[path], *data.draw(HARM))
    manifest = checkpoints.read_manifest(folder)
    try:
        path.unlink() if after is None else path.write_bytes(after)
        problem = checkpoints.damage_of(folder)
        if path.name != checkpoints.MANIFEST:
            assert problem is not None or after == contents[path]
        elif problem is None and after is not None:
            assert checkpoints.read_manifest(folder) == manifest
    finally:
        path.write_bytes(contents[path])
    assert checkpoints.damage_of(folder) is None
