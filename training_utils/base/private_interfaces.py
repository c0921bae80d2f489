"""Names of libraries that they call private, or do not document, and that this suite uses all the same.

A release may drop them without a word; tests/test_private_interfaces.py finds each in the installed one, and that
nothing else of the kind is used.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateInterface:
    """A name inside a library. `used_in` is a file, `reason` why no public name does, `without` what to do if it is
    gone."""

    library: str
    name: str
    used_in: str
    reason: str
    without: str


PRIVATE_INTERFACES = (
    PrivateInterface(
        library="diffusers",
        name="diffusers.utils.import_utils._scipy_available",
        used_in="training_utils/base/startup.py",
        reason="diffusers imports scipy.stats wherever it is installed: 0.8 s, and random draws at the start",
        without="leave the line out; the start takes longer",
    ),
    PrivateInterface(
        library="diffusers",
        name="diffusers.loaders.lora_base.LoraBaseMixin._save_lora_weights",
        used_in="training_utils/torch_backend/lora.py",
        reason="every pipeline's save_lora_weights calls it, and Kandinsky's pipelines have no such method",
        without="write the adapters with safetensors.torch.save_file, under the same names",
    ),
    PrivateInterface(
        library="accelerate",
        name="accelerate.state.PartialState._shared_state",
        used_in="training_utils/torch_backend/sharding.py",
        reason="accelerate shares weights out on GPUs alone, and processes on CPUs are to do it too",
        without="let FSDP on CPUs go, which only tests use",
    ),
    PrivateInterface(
        library="datasets",
        name="datasets.Dataset()._indices",
        used_in="training_utils/data/arrow_column.py",
        reason="cells are read from the Arrow table, and a selected dataset has all rows there",
        without="call flatten_indices() on such a dataset, which copies it",
    ),
    PrivateInterface(
        library="torch",
        name="torch.optim.lr_scheduler.LambdaLR()._step_count",
        used_in="training_utils/torch_backend/optimizers.py",
        reason="a schedule is put to a step without the warning that it was called before the optimizer",
        without="load it through load_state_dict, whose keys are the same",
    ),
    PrivateInterface(
        library="torch",
        name="torch.optim.lr_scheduler.LambdaLR()._last_lr",
        used_in="training_utils/torch_backend/optimizers.py",
        reason="get_last_lr returns it, and a schedule that is put to a step has to say that step's",
        without="load it through load_state_dict, whose keys are the same",
    ),
    PrivateInterface(
        library="torch",
        name="torch._dynamo.config.recompile_limit",
        used_in="training_utils/torch_backend/processes.py",
        reason="each bucket's size is compiled by itself, and torch stops after eight",
        without="torch.compiler.config has taken over settings of this module, look there first",
    ),
    PrivateInterface(
        library="torch",
        name="torch._foreach_mul_",
        used_in="training_utils/torch_backend/deepspeed.py",
        reason="one kernel scales all slices of the gradient; torch's own clip_grad_norm_ uses it",
        without="multiply one tensor after the other",
    ),
    PrivateInterface(
        library="torch",
        name="torch._foreach_lerp_",
        used_in="training_utils/torch_backend/ema.py",
        reason="one kernel averages all weights, as torch.optim.swa_utils does it",
        without="average one tensor after the other",
    ),
)
