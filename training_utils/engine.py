"""What the eight torch scripts set up alike: the accelerator, models' folders, optimizer, batches, saved state."""

import datetime
import inspect
import json
import os
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.utils.checkpoint
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DynamoBackend, ProjectConfiguration, broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from . import checkpoints, data, dry_run, hub, metrics, optimizers, sharding, single_file, zero
from .data import collate
from .interruption import SIGNALS
from .reporting import Progress, UserError, cut_short, not_finite, reason_of, tell_trackers, warn

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# Accelerator and processes
# ---------------------------------------------------------------------------------------------------------------------


def make_accelerator(
    output_dir,
    logging_dir,
    accumulation,
    mixed_precision,
    report_to,
    timeout,
    allow_tf32,
    fused_backward=False,
    **ddp,
):
    """The Accelerator of a run. `timeout` in seconds; `ddp` are options of DistributedDataParallel.

    Raises UserError where the device cannot do the precision, or the launch does not go with `fused_backward`, steps
    during the backward pass.
    """
    project = ProjectConfiguration(project_dir=output_dir, logging_dir=os.path.join(output_dir, logging_dir))
    try:
        with zero.hidden():
            accelerator = Accelerator(
                gradient_accumulation_steps=accumulation,
                mixed_precision=mixed_precision,
                cpu=not torch.accelerator.is_available(),  # else two processes without a GPU would not see each other
                log_with=None if report_to == "none" else report_to,
                project_config=project,
                kwargs_handlers=[
                    InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout)),
                    DistributedDataParallelKwargs(**ddp),
                ],
            )
    except ValueError as error:
        if "mixed precision" in str(error):
            raise UserError(f"--mixed_precision {mixed_precision} does not run on this device: {error}") from None
        raise
    if accelerator.distributed_type == "MEGATRON_LM":
        raise UserError("Megatron-LM is not supported; launch with --multi_gpu")
    sharding.begin(accelerator, PRECISIONS.get(accelerator.mixed_precision))
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not run on this device, a CPU; bf16 and no do")
    if fused_backward and accelerator.num_processes > 1:
        raise UserError(
            "--fused_backward_pass updates each weight before processes have exchanged their gradients; leave it out, "
            "or start one process"
        )
    if fused_backward and accelerator.scaler is not None:
        raise UserError("--fused_backward_pass frees gradients that fp16 would scale back first; use bf16 or no")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        import torch._dynamo as dynamo

        # Each size of a batch is compiled by itself, and buckets have more than the eight that torch would compile.
        dynamo.config.recompile_limit = max(64, dynamo.config.recompile_limit)
    if allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def device_name(accelerator):
    """What a person calls the device of this process."""
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def memory(accelerator):
    """The memory that this process has in use, as values to log: of a GPU the peak of what tensors took since the
    start, and what is reserved for them now; else the host's. In GiB. Does not wait for the device."""
    if accelerator.device.type != "cuda":
        return metrics.resident()
    stats = torch.cuda.memory_stats(accelerator.device)
    peak, reserved = stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.current"]
    return {"memory_peak_gib": peak / 2**30, "memory_reserved_gib": reserved / 2**30}


def frozen_type(accelerator):
    """The torch.dtype of the networks that are not trained."""
    return PRECISIONS.get(accelerator.mixed_precision, torch.float32)


def from_main(accelerator, make):
    """`make()` as the main process evaluates it, on every process. A UserError in it is raised on all of them."""
    result = None
    if accelerator.is_main_process:
        try:
            result = make()
        except UserError as error:
            result = error
    if accelerator.num_processes > 1:
        result = broadcast_object_list([result])[0]
    if isinstance(result, UserError):
        result.everywhere = True
        raise result
    return result


def largest_of_processes(accelerator, timeout):
    """A function from an int to the largest that any process passed; a collective call among the hosts alone.

    It has a process group of its own, on the CPU, so that asking never waits for a GPU.
    """
    if accelerator.num_processes == 1:
        return lambda number: number
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def largest(number):
        value = torch.tensor([number])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
        return int(value)

    return largest


def start_trackers(accelerator, project, settings):
    """Open the trackers of the run. Raises UserError that names them when one cannot be opened."""
    try:
        accelerator.init_trackers(project, settings)
    except Exception as error:  # each tracker's own: no account, no network, another version
        names = ", ".join(str(name) for name in accelerator.log_with)
        raise UserError(
            f"the tracker cannot be opened ({names}: {reason_of(error)}); or give --report_to none"
        ) from None


def start_progress(accelerator, guard, updates, state, total, logging_steps):
    """The reporting.Progress of a run of `total` steps, from a RunState on; `guard` is its FiniteGuard."""
    return Progress(
        state,
        total,
        logging_steps,
        updates.samples,
        lambda scalars: fetch_mean(accelerator, scalars),
        lambda values, step: log(accelerator, values, step),
        guard.report,
        partial(memory, accelerator),
    )


def log(accelerator, values, step):
    """Hand a dict of numbers to the trackers, for a step."""
    tell_trackers(accelerator.trackers, lambda tracker: tracker.log(values, step=step))


def finish(accelerator):
    """Close the trackers, let go of the output folder, and leave the process group as it is.

    Destroyed while DDP's reducer still refers to it, gloo's thread and the interpreter's lock can wait for each other
    for ever; `reporting.run` ends the process without either.
    """
    tell_trackers(accelerator.trackers, lambda tracker: tracker.finish())
    checkpoints.let_go()


def fetch_mean(accelerator, scalars):
    """A list of scalar tensors as floats, averaged over the processes: one wait for the device for all of them."""
    return accelerator.reduce(torch.stack([scalar.detach().float() for scalar in scalars]), "mean").tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def model_folder(
    name, pipeline_class, revision=None, variant=None, cache_dir=None, left_out=(), trained=True, config=None
):
    """The local folder of a base model, fetched from the hub where `name` is an id. Raises UserError.

    A model in one file is converted, as single_file.folder_of says, which takes `config`. Parts `left_out` are
    not fetched; of a model that is not `trained`, `variant` is read where there is one.
    """
    if os.path.isdir(name):
        folder = Path(name)
    elif os.path.isfile(name):
        folder = single_file.folder_of(name, pipeline_class, config, cache_dir)
    else:
        try:
            folder = Path(
                pipeline_class.download(
                    name, revision=revision, variant=variant, cache_dir=cache_dir, **dict.fromkeys(left_out)
                )
            )
        except Exception as error:  # the hub client raises a dozen kinds, its transport more
            if variant is not None and "`variant=" in str(error):
                raise UserError(f"base model {name} has no weights of --variant {variant}") from None
            reason = hub.not_found(name, error)
            raise UserError(f"base model {name} is neither a folder nor found on the hub: {reason}") from None
    hub.refuse_another_family(name, folder, pipeline_class.__name__)
    if trained and variant is not None and not any(folder.glob(f"*/*.{variant}*")):
        raise UserError(f"base model {name} has no weights of --variant {variant}")
    return folder


def load_part(cls, folder, subfolder="", variant=None, **options):
    """`cls.from_pretrained` of one part of a base model. Raises UserError that names the part when it cannot.

    A part that is not stored in this variant (`non_ema` exists for UNets alone) is read without it, as pipelines do.
    """
    part = Path(folder) / subfolder
    if not part.is_dir():
        raise UserError(f"base model {folder} has no part '{subfolder}'; there must be a folder of that name")
    what = f"part '{subfolder}' of base model {folder}" if subfolder else f"model {folder}"
    pickles, weights = sorted(part.glob("*.bin")), sorted(part.glob("*.safetensors"))
    if pickles and not weights:
        raise UserError(
            f"{what} has its weights as a pickle only ({pickles[0].name}), which could run code; where you trust it, "
            "load the model with diffusers and save it again, as safetensors"
        )
    if issubclass(cls, torch.nn.Module):
        for kind, there in (("settings, config.json", (part / "config.json").is_file()), ("weights", weights)):
            if not there:
                raise UserError(f"{what} has no {kind}; {part} must hold config.json and .safetensors files")
    if variant is not None and any(part.glob(f"*.{variant}*")):
        options["variant"] = variant
    try:
        return cls.from_pretrained(folder, subfolder=subfolder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = next(filter(None, map(_damage, weights)), reason_of(error))
        raise UserError(f"{what} cannot be loaded: {reason}") from None


def _damage(path):
    """What is wrong with a .safetensors file as far as its header tells, as a clause, or None."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"{path.name} is damaged or cut off at {path.stat().st_size:,} bytes ({reason_of(error)})"


def load_instead(cls, name, base, subfolder, cache_dir=None, dtype=None):
    """A network in place of a part of a base model. Raises UserError.

    `name` is the network's folder or hub id, that of a whole model with such a part, or a .safetensors file, which is
    read with the settings of the base model's. `dtype` None means that of its weights.
    """
    if os.path.isfile(name):
        options = dict(config=str(base), subfolder=subfolder, local_files_only=True)
        try:
            with safe_open(name, framework="pt") as file:
                stored = file.get_tensor(next(iter(file.keys()))).dtype
            return cls.from_single_file(name, dtype=dtype or stored, **options)
        except Exception as error:  # no .safetensors, or weights of something else: diffusers' own kinds
            raise UserError(f"{name} cannot be loaded as a '{subfolder}': {reason_of(error)}") from None
    folder = folder_of_model(name, cache_dir)
    inner = subfolder if (folder / subfolder).is_dir() and not (folder / "config.json").is_file() else ""
    return load_part(cls, folder, inner, dtype=dtype or stored_type(folder / inner))


def load_sdxl_vae(base, variant, half, other=None, cache_dir=None):
    """SDXL's VAE in float32, since its activations overflow in half precision; the `other` one, which `load_instead`
    finds, in the torch.dtype `half`, unless its configuration says the same of it."""
    from diffusers import AutoencoderKL

    name = "SDXL's own VAE" if other is None else f"the VAE {other}"
    if other is not None:
        vae = load_instead(AutoencoderKL, other, base, "vae", cache_dir, half)
        if half == torch.float32 or not vae.config.force_upcast:
            return vae
    if half != torch.float32:
        warn(
            f"{name} overflows in half precision and runs in float32; --pretrained_vae_model_name_or_path "
            "madebyollin/sdxl-vae-fp16-fix gives one that does not, and is faster"
        )
    if other is not None:
        return load_instead(AutoencoderKL, other, base, "vae", cache_dir, torch.float32)
    return load_part(AutoencoderKL, base, "vae", variant, dtype=torch.float32)


@cache
def folder_of_model(name, cache_dir=None):
    """The local folder of a model that is no part of a pipeline, fetched from the hub where `name` is an id; the same
    one for a whole run, whatever is uploaded there meanwhile."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        reason = hub.not_found(name, error)
        raise UserError(f"model {name} is neither a folder nor found on the hub: {reason}") from None


def stored_type(folder, variant=None):
    """The torch.dtype of the weights in a model folder; float32 where they are not safetensors.

    Of several stored copies it is the one that is read: `variant` where the folder has it, else the plain one, whose
    file names hold one dot.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    chosen = [path for path in files if variant is not None and f".{variant}" in path.name]
    for path in chosen or [path for path in files if path.name.count(".") == 1]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                dtype = file.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def stored_types(folder, variant=None):
    """The torch.dtype of each part of a model folder, {part: dtype}, as pipelines take it."""
    parts = [path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {part.name: stored_type(part, variant) for part in parts} | {"default": torch.float32}


def sampling_scheduler(folder, changes):
    """The base model's own sampler with `changes` to its configuration, so that it samples what was trained.

    A sampler that cannot end in pure noise (zero terminal SNR) is replaced by DDIM. Raises UserError where the
    folder has none.
    """
    import diffusers

    try:
        config = dict(diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler"))
    except OSError as error:
        raise UserError(f"part 'scheduler' of base model {folder} cannot be loaded: {reason_of(error)}") from None
    name = config.get("_class_name", "DDPMScheduler")
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UserError(f"part 'scheduler' of base model {folder} is a {name}, which this diffusers does not have")
    takes = inspect.signature(cls.__init__).parameters
    if name != "UnCLIPScheduler" and "beta_schedule" not in takes:
        raise UserError(
            f"part 'scheduler' of base model {folder} is a {name}, which has no schedule of betas: the model is of a "
            "kind that this script does not train"
        )
    if changes.get("rescale_betas_zero_snr"):
        if "rescale_betas_zero_snr" not in takes:
            cls = diffusers.DDIMScheduler
            changes = changes | {"clip_sample": False}  # DDIM's default is for pixels: it would cut latents at 1
        changes = changes | {"timestep_spacing": "trailing"}  # sampling must begin at the noisy end (2305.08891, 3.3)
    return cls.from_config(config, **changes)


def save_pipeline(pipeline, folder):
    """Write a pipeline as a folder that older libraries read too, without the paths of this machine.

    transformers 5 writes a tokenizer as tokenizer.json alone, a text encoder that it has built itself without the
    level text_model, and, without torchvision, CLIPImageProcessorPil for CLIPImageProcessor; earlier releases read
    none of that.
    """
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer"):
            part.backend_tokenizer.model.save(str(folder / name))  # as vocab.json and merges.txt
    for weights in folder.glob("text_encoder/model.safetensors"):
        with safe_open(weights, framework="pt") as file:
            flat = "final_layer_norm.weight" in file.keys()  # noqa: SIM118 (safe_open is no dict)
        if flat:
            tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
            save_file(tensors, weights, metadata={"format": "pt"})
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        facts = json.loads(path.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
        facts.pop("_name_or_path", None)
        path.write_text(json.dumps(facts, indent=2) + "\n")


def check_channels(unet, autoencoder):
    """Refuse the UNets of other tasks, which are told more than noisy latents. Raises UserError."""
    takes, gives = unet.config.in_channels, autoencoder.config.latent_channels
    if takes != gives:
        raise UserError(
            f"the base model's UNet takes {takes} channels, and its latents have {gives}: it is one for another task, "
            "such as inpainting; name a text-to-image model"
        )


def checkpoint_blocks(blocks):
    """Gradient checkpointing for a network whose library has none: what is computed inside each of these modules is
    computed again in the backward pass instead of kept."""
    for block in blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def enable_xformers(model):
    """Switch a diffusers model to xFormers attention. Raises UserError where the device cannot run it."""
    if not torch.cuda.is_available():
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out on this device")
    try:
        model.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise UserError(f"xFormers does not work here ({reason_of(error)}); leave its flag out") from None


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(
    parameters, name, learning_rate, betas, weight_decay, epsilon, loss_scaling=False, rounding_seed=None
):
    """An optimizer by its name in `--optimizer`; `loss_scaling` says that fp16 gradients will be scaled.

    With `rounding_seed` the weights may be bfloat16, as optimizers.StochasticRounding says.
    """
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adafactor":
        cls = torch.optim.Adafactor
        options["foreach"] = False  # torch's choice on a GPU, which holds several times the weights for a moment
        # The rate as it is: by default torch takes it in proportion to a weight's RMS, which for adapters,
        # zero at first, is a thousandth of it.
        options["eps"] = (None, 1.0)
    else:
        options |= {"betas": betas, "eps": epsilon}
    if name == "adamw":
        cls = torch.optim.AdamW
        # Under loss scaling the fused kernel skips an overflow in itself, and accelerate could not tell that it did.
        options["fused"] = not loss_scaling
    if name in ("adamw8bit", "paged_adamw8bit"):
        from bitsandbytes import optim

        cls = optim.AdamW8bit if name == "adamw8bit" else optim.PagedAdamW8bit
    if name == "prodigy":
        from prodigyopt import Prodigy as cls

        # What diffusers' own scripts set; without the second a warm-up would distort the step size that it finds.
        options |= {"use_bias_correction": True, "safeguard_warmup": True}
    if rounding_seed is not None:
        cls = type(cls.__name__, (optimizers.StochasticRounding, cls), {"rounding_seed": staticmethod(rounding_seed)})
    with redirect_stdout(None):  # Prodigy prints that it decays weights
        return cls(parameters, **options)


def prepare(accelerator, model, optimizer):
    """What the loop calls of a model, its optimizer, and the parameters that this one steps from now on, which are
    others where the processes share them out."""
    network, optimizer = sharding.prepare(accelerator, model, optimizer)
    parameters = sharding.trained(optimizer)
    if accelerator.gradient_accumulation_steps > 1 and _replays_graphs(accelerator.state.dynamo_plugin):
        own_gradients(parameters)
    return network, optimizer, parameters


def _replays_graphs(plugin):
    """Whether a launch with this TorchDynamoPlugin has the network replayed as CUDA graphs."""
    if plugin.backend == DynamoBackend.INDUCTOR:
        return plugin.mode in ("reduce-overhead", "max-autotune")
    return plugin.backend == DynamoBackend.CUDAGRAPHS


def own_gradients(parameters):
    """Have gradients add up in memory of their own from now on.

    Autograd takes the first gradient of a window as it is, and a CUDA graph writes the next one to the same place.
    """
    own = {}

    def keep(parameter):
        if parameter not in own:
            own[parameter] = torch.empty_like(parameter)
        if parameter.grad is not own[parameter]:
            parameter.grad = own[parameter].copy_(parameter.grad)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(keep)


def restart_schedule(optimizer, lr_scheduler, step):
    """Put a LambdaLR at `step` steps: the rate is a function of the step and of this run's flags alone."""
    lr_scheduler.last_epoch, lr_scheduler._step_count = step, step + 1
    rates = [base * curve(step) for base, curve in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates


def clip(accelerator, parameters, max_norm):
    """The norm of the gradient, a scalar tensor, which is then clipped to `max_norm`; 0 means no clipping."""
    if isinstance(parameters, zero.Parameters):
        return parameters.optimizer.clip(max_norm)
    if max_norm:
        norm = accelerator.clip_grad_norm_(parameters, max_norm)
    else:
        accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return sharding.full(norm)


class FiniteGuard:
    """Keeps a step whose gradient is not finite from reaching the weights, and says what became of it.

    `look_at` is called between the backward pass and the step. With the fused AdamW it never waits for the device:
    the kernel itself leaves out a step whose `found_inf` is set, as it does for torch's loss scaling. Other
    optimizers have no such switch, so for them the norm is fetched. Under fp16 loss scaling accelerate sees to it.

    When to `stop`, one such step also holds back all that follow, so that the weights stay in the last good state
    until it is noticed, when the losses are fetched; `keep(state)` then writes it. Else the run goes on with the next
    step. `names(state)` lists the images of the step after a RunState. `held` is a scalar tensor that says
    whether the last step was held back, for an average of the weights; None under loss scaling.
    """

    def __init__(self, accelerator, optimizer, stop, keep, names):
        self.accelerator, self.stop, self.keep, self.names = accelerator, stop, keep, names
        self.optimizer = optimizer.optimizer  # the one inside accelerate's wrapper
        self.on_device = all(group.get("fused") for group in self.optimizer.param_groups)
        self.held = torch.zeros((), device=accelerator.device) if accelerator.scaler is None else None

    def look_at(self, grad_norm, more=False):
        """Hold back the coming step if this norm, of all processes' gradient, is not finite.

        With `more` the norm is of a part of the gradient, and a step that is held back already stays so.
        """
        if self.held is None:
            return
        bad = (~grad_norm.isfinite()).float()
        self.held = torch.maximum(self.held, bad) if self.stop or more else bad
        if self.on_device:
            self.optimizer.found_inf = self.held
        elif self.held.item():
            self.optimizer.zero_grad(set_to_none=True)

    def report(self, step, loss, before):
        """What `reporting.Progress` calls. Raises UserError when the run is to stop."""

        def keep():
            folder = self.keep(before)
            finish(self.accelerator)
            return folder

        not_finite(step, loss, self.names(before), self.stop, keep)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def _as_worker(_):
    # A signal to the process group reaches the workers too, which must go on reading until the run has stopped.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    checkpoints.let_go()


def _collate(samples):
    batch = collate(samples)
    if isinstance(batch, UserError):
        return batch
    return {key: value if key == "skipped" else torch.from_numpy(value) for key, value in batch.items()}


def batches(samples, batch_sampler, device, workers=0):
    """Batches on the device, as dicts of tensors. Raises UserError for an image that cannot be read, unless the
    samples skip it."""
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_as_worker,
        persistent_workers=False,  # the steps have no end, so its workers live as long as the run
    )
    for batch in loader:
        if isinstance(batch, UserError):
            batch.everywhere = False  # the other processes have other images
            raise batch
        data.note_skipped(samples.rows, batch.pop("skipped", []))
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def training_batches(samples, updates, state, accelerator, workers, keep=None):
    """The endless batches of this process, as data.BatchPlan has them from a RunState's position on.

    Before an image that cannot be used ends a run of one process, `keep()` writes the state after the last step;
    several would wait for each other in it.
    """
    sampler = updates.batches(state.position, accelerator.process_index)
    begun, whole = state.step, replace(state)
    try:
        for batch in batches(samples, sampler, accelerator.device, workers):
            yield batch
            if state.position != whole.position:
                whole = replace(state)
    except UserError as error:
        if keep is None or accelerator.num_processes > 1 or state.step == begun:
            raise
        state.micro_step = whole.micro_step
        raise cut_short(error, keep) from None


def say_skipped(skipped):
    """`data.say_skipped` for all processes together; `skipped` is this one's set. A collective call."""
    data.say_skipped(set(gather_object(sorted(skipped))))


def gather_in_order(accelerator, mine):
    """Lists that each process made of its share [rank::world_size], put together again in order on every process."""
    pairs = [(at * accelerator.num_processes + accelerator.process_index, item) for at, item in enumerate(mine)]
    return [item for _, item in sorted(gather_object(pairs), key=lambda pair: pair[0])]


# ---------------------------------------------------------------------------------------------------------------------
# Saved state
# ---------------------------------------------------------------------------------------------------------------------


def save_model(folder, name, model, ema=None):
    """Write a model as the diffusers folder `name`, and its average, where there is one, beside it as <name>_ema.

    Where the processes share its weights out, every one must call it; the first one writes.
    """
    model, ema = whole(model, ema)
    if model is not None:
        model.save_pretrained(folder / name)
    if ema is not None:
        ema.save(folder / f"{name}_ema", model)


def whole(model, ema=None):
    """A model and its average with whole weights: both as they are or, where the processes share them out, plain ones
    in the first process' host memory and (None, None) in the others. A collective call."""
    if not sharding.is_shared(model):
        return model, ema
    plain = sharding.whole_model(model)
    return plain, None if ema is None else ema.whole(plain)


def load_model(folder, name, model, ema=None):
    """Read what `save_model`, or an original script, wrote. Without an average it begins at the model's weights."""
    sharding.load_model(model, sharding.class_of(model).from_pretrained(folder, subfolder=name).state_dict())
    if ema is not None and (folder / f"{name}_ema").is_dir():
        ema.load(folder / f"{name}_ema", model)
    elif ema is not None:
        warn(f"{folder} holds no EMA weights; the average starts from its weights")
        ema.reset()


# What Prodigy finds out during a run and keeps beside its settings.
FOUND = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")


class TrainingState:
    """Writes and reads a checkpoint's weights, optimizer, schedule and loss scale: the same files, however many
    processes there are and whether they share weights out.

    `save_weights(folder)` and `load_weights(folder)` see to the models. The first is called in the main process alone
    or, where weights are shared out, in every one; the second in every one.
    """

    def __init__(self, accelerator, optimizer, lr_scheduler, save_weights, load_weights):
        self.accelerator, self.optimizer, self.lr_scheduler = accelerator, optimizer, lr_scheduler
        self.save_weights, self.load_weights = save_weights, load_weights
        self.options = [
            {k: v for k, v in group.items() if k not in ("params", "lr", *FOUND)} for group in optimizer.param_groups
        ]

    def write(self, folder):
        """Write into `folder`; every process must call it."""
        folder, main = Path(folder), self.accelerator.is_main_process
        try:
            if main or self.accelerator.is_fsdp2:
                self.save_weights(folder)
        finally:  # the other processes are waiting in it, whatever has kept this one from writing
            state = sharding.whole_state(self.optimizer)
        if main:
            torch.save(state, folder / "optimizer.bin")
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.bin")
            if self.accelerator.scaler is not None:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def read(self, folder, step):
        """Read what `write`, or an original script, wrote; learning rate and Adam's settings stay this run's."""
        folder, scaler = Path(folder), self.accelerator.scaler
        checkpoints.require_everywhere(folder, gather_object)
        if scaler is not None and not (folder / "scaler.pt").exists():
            raise UserError(f"{folder} was not trained with --mixed_precision fp16; resume it with what it had")
        try:
            self.load_weights(folder)
            options = {"map_location": "cpu", "weights_only": True, "mmap": sharding.takes_slices(self.optimizer)}
            sharding.load_state(self.optimizer, torch.load(folder / "optimizer.bin", **options))
            if scaler is not None:
                scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        except UserError:
            raise
        except Exception as error:  # another model's shapes, or files that are not what they should be
            reason = reason_of(error)
            raise UserError(f"{folder} cannot be read: {reason}") from None
        self.accelerator.step = 0  # accelerate counts micro-steps; a checkpoint always stands after a whole step
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            group.update(options)
            for parameter in group["params"]:
                moments = self.optimizer.state.get(parameter, {})
                if torch.is_tensor(moments.get("step")):  # the fused kernel wants it on the device, the others do not
                    moments["step"] = moments["step"].to(parameter.device if group.get("fused") else "cpu")
        restart_schedule(self.optimizer, self.lr_scheduler, step)

    def keep(self, root, state, about, limit, ema, held_back):
        """`save_checkpoint` for a run that goes back to an earlier RunState, whose weights it still has.

        `held_back` is the number of steps since.
        """
        if ema is not None:
            ema.optimization_step -= held_back
        restart_schedule(self.optimizer, self.lr_scheduler, state.step)
        return self.save_checkpoint(root, state, about, limit)

    def save_checkpoint(self, root, state, about, limit):
        """One whole checkpoint of a RunState under `root`; None, and a warning, if it failed. See checkpoints.save."""

        def any_of(failed):
            return bool(self.accelerator.reduce(torch.tensor(int(failed), device=self.accelerator.device)).item())

        return checkpoints.save(root, state, self.write, about, limit, self.accelerator.is_main_process, any_of)


# ---------------------------------------------------------------------------------------------------------------------
# Dry runs
# ---------------------------------------------------------------------------------------------------------------------


def begin_dry_run(accelerator, batches, samples, updates):
    """The batches for a dry run, whose use of memory is measured from here on.

    Those of data.Samples that caches stand in for are made now: a run finds them on the disk.
    """
    prepare = samples.prepare
    if prepare.images or getattr(prepare, "captions", None):
        batches = dry_run.ahead(batches, dry_run.STEPS * updates.accumulation)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return batches


def report_dry_run(accelerator, plan, networks, others, optimizer, ema, fused=None):
    """Print what a dry run has found. `plan` is what `dry_run.report` takes first; `networks` are those that are
    trained, {name: module}; of the `others` one may be None. `fused` is a FusedBackward or None."""
    device = accelerator.device
    models = [*networks.values(), *(network for network in others if network is not None)]
    trained = sharding.trained(optimizer)
    ids = {id(parameter) for parameter in trained}
    still = [tensor for model in models for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in ids]
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    gradients = [parameter for parameter in trained if parameter.requires_grad]
    if fused:
        gradients = [max(gradients, key=_bytes)]
    if isinstance(optimizer, zero.Optimizer):
        state.append(optimizer.slice)
        gradients = [optimizer.slice] if optimizer.stage == 2 else gradients
    memory = {
        "weights that are trained": trained,
        "their gradients": gradients,
        "state of the optimizer": state,
        "moving average": ema.shadow_params if ema is not None else [],
        "weights that are frozen": still,
    }
    memory = {what: _bytes_on(device, tensors) for what, tensors in memory.items()}
    name, peak = "this machine", dry_run.resident_peak()
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    dry_run.report(*plan, {name: _modules(network) for name, network in networks.items()}, name, memory, peak)


def _bytes(tensor):
    tensor = sharding.local(tensor)
    return tensor.numel() * tensor.element_size()


def _bytes_on(device, tensors):
    """What tensors take on a device, in bytes; one that is there twice counts once."""
    return sum(_bytes(tensor) for tensor in {id(t): t for t in tensors if t.device.type == device.type}.values())


def _modules(network):
    """The parameters of each top-level module, {name: (how many are trained, how many are not)}."""
    counts = {}
    for name, parameter in network.named_parameters():
        trained, frozen = counts.get(name.split(".")[0], (0, 0))
        more = parameter.numel()
        counts[name.split(".")[0]] = (trained + more, frozen) if parameter.requires_grad else (trained, frozen + more)
    return counts
