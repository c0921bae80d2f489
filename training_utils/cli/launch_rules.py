"""What is wrong with how accelerate launched a run: FSDP, DeepSpeed, compiling by regions. None, or a sentence."""

import json
import os
from typing import Any

from training_utils.base import launch
from training_utils.cli import packages
from training_utils.cli.arguments import Arguments
from training_utils.cli.optimizers import OPTIMIZERS

PRECISIONS = ("no", "fp16", "bf16")
NOT_SUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Of what accelerate calls the backends of torch.compile, those that compile a training.
DYNAMO_BACKENDS = ("no", "eager", "aot_eager", "inductor", "cudagraphs", "hpu_backend")
DYNAMO_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def launch_problem(args: Arguments) -> str | None:
    """The first thing about the launch that does not go with the flags, or with this suite, or None."""
    script = args.script
    if script.backend == "torch":
        problem = _not_supported(args)
        if problem is not None:
            return problem
    # diffusers' UNets ask their blocks for attributes that a compiled block does not have.
    if launch.compiles_by_regions() and script.backend == "torch" and script.network == "unet":
        return "accelerate cannot compile this network by regions; launch without --dynamo_use_regional_compilation"
    if launch.uses_deepspeed():
        return _sharding_problem(args, "DeepSpeed") or _deepspeed_problem(args)
    if launch.uses_fsdp():
        return _sharding_problem(args, "FSDP") or _fsdp_problem()
    return None


def _not_supported(args: Arguments) -> str | None:
    """The first thing that accelerate was configured for and that these scripts do not do."""
    precision = _precision(args).lower()
    if precision not in PRECISIONS and not args.get("full_bf16"):
        return (
            f"accelerate is configured for mixed precision {precision}, in which these scripts do not train; give "
            "--mixed_precision bf16, fp16 or no"
        )
    for variable, what in NOT_SUPPORTED.items():
        if launch.is_on(variable):
            return f"accelerate is configured for {what}, which these scripts do not use; launch with --multi_gpu"
    if launch.uses_sagemaker():
        return (
            "accelerate is configured for SageMaker's distributed library, which these scripts do not use; set "
            "distributed_type to NO in its configuration"
        )
    backend = launch.dynamo_backend()
    if backend not in DYNAMO_BACKENDS:
        return (
            f"accelerate is configured to compile with --dynamo_backend {backend}, which does not train here; use "
            "inductor, or no"
        )
    mode = launch.dynamo_mode()
    if backend != "no" and mode not in DYNAMO_MODES:
        return f"accelerate is configured for --dynamo_mode {mode}; torch knows {', '.join(DYNAMO_MODES)}"
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto").lower()
    if not launch.uses_deepspeed() and accumulation not in ("auto", str(args.gradient_accumulation_steps)):
        return (
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS {accumulation} in the environment contradicts "
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}; unset it"
        )
    return None


def _precision(args: Arguments) -> str:
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _sharding_problem(args: Arguments, engine: str) -> str | None:
    """The first thing that does not go with weights that the processes share out among themselves."""
    if args.script.backend == "jax":
        return f"the JAX script is not launched with {engine}; start it with python"
    if args.script.trains == "adapters":
        return f"adapters are too few weights to share out with {engine}; launch with --multi_gpu"
    if launch.dynamo_backend() != "no":
        return f"a network whose weights {engine} shares out is not compiled; launch without --dynamo_backend"
    if _precision(args) == "fp16":
        return f"weights that {engine} shares out are trained in bf16 or without --mixed_precision, not in fp16"
    if args.use_8bit_adam or not OPTIMIZERS[args.optimizer].can_be_sharded:
        able = " or ".join(name for name, row in OPTIMIZERS.items() if row.can_be_sharded)
        return f"weights that {engine} shares out are updated by --optimizer {able} alone"
    for name in ("full_bf16", "fused_backward_pass"):
        if args.get(name):
            return f"--{name} updates weights one by one, and {engine} shares each of them out; leave one of them out"
    return None


def _fsdp_problem() -> str | None:
    """The first thing that FSDP was told and that is not supported."""

    def told(name: str, default: str) -> str:
        return os.environ.get(f"FSDP_{name}", default).lower()

    if told("VERSION", "1") != "2":
        return "of FSDP's two versions only the second is supported; launch with --fsdp_version 2"
    if told("OFFLOAD_PARAMS", "false") == "true":
        return "fsdp_offload_params in accelerate's configuration is not supported; use more GPUs instead"
    if told("ACTIVATION_CHECKPOINTING", "false") == "true":
        return (
            "fsdp_activation_checkpointing in accelerate's configuration is not supported; use "
            "--gradient_checkpointing instead"
        )
    if told("RESHARD_AFTER_FORWARD", "true") == "false":
        return (
            "weights that stay gathered after a forward pass would hide an average; leave fsdp_reshard_after_forward "
            "out"
        )
    return None


def _deepspeed_problem(args: Arguments) -> str | None:
    """The first thing that DeepSpeed was told and that is not supported, or contradicts the flags."""
    try:
        settings = launch.deepspeed_settings()
    except (OSError, ValueError) as error:
        return f"DeepSpeed's configuration {launch.deepspeed_file()} cannot be read: {error}"
    if settings[launch.STAGE] not in (1, 2):
        return (
            "of DeepSpeed's ZeRO only stages 1 and 2 are supported; to share weights out too, launch with --use_fsdp "
            "--fsdp_version 2"
        )
    for what in ("optimizer", "param"):
        if f"zero_optimization.offload_{what}.device" in settings:
            return f"DeepSpeed's offload_{what}_device is not supported; use more GPUs instead"
    if any(name.startswith("scheduler.") for name in settings):
        return "the learning rate follows --lr_scheduler; leave the scheduler out of DeepSpeed's configuration"
    for name, (value, flag) in _as_deepspeed_says(args).items():
        if settings.get(name, value) != value:
            return (
                f"{name} {json.dumps(settings[name])} in the configuration of DeepSpeed contradicts {flag}; write "
                '"auto" there, or the same in both'
            )
    if packages.is_missing("deepspeed"):
        return "DeepSpeed is not installed: pip install deepspeed==0.19.8"
    return None


def _as_deepspeed_says(args: Arguments) -> dict[str, tuple[Any, str]]:
    """What the flags say of what DeepSpeed's file may say too, {its name there: (value, the words for the flag)}."""
    batch = args.train_batch_size
    accumulation = args.gradient_accumulation_steps
    samples_per_step = batch * accumulation * int(os.environ.get("WORLD_SIZE", 1))
    optimizer = args.optimization
    precision = _precision(args)
    first, second = optimizer.betas
    return {
        "optimizer.type": ("AdamW", "--optimizer adamw"),
        "optimizer.params.lr": (optimizer.learning_rate, f"--learning_rate {optimizer.learning_rate:g}"),
        "optimizer.params.betas": ([first, second], f"--adam_beta1 {first:g} --adam_beta2 {second:g}"),
        "optimizer.params.eps": (optimizer.epsilon, f"--adam_epsilon {optimizer.epsilon:g}"),
        "optimizer.params.weight_decay": (
            optimizer.weight_decay,
            f"--adam_weight_decay {optimizer.weight_decay:g}",
        ),
        "gradient_clipping": (optimizer.max_grad_norm, f"--max_grad_norm {optimizer.max_grad_norm:g}"),
        "gradient_accumulation_steps": (accumulation, f"--gradient_accumulation_steps {accumulation}"),
        "train_micro_batch_size_per_gpu": (batch, f"--train_batch_size {batch}"),
        "train_batch_size": (samples_per_step, f"{samples_per_step} images in a step"),
        "bf16.enabled": (precision == "bf16", f"--mixed_precision {precision}"),
        "fp16.enabled": (False, f"--mixed_precision {precision}"),
    }
