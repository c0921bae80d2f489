"""The gradient between backward pass and step: clipped, guarded against NaN, or used up during the pass."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from training_utils.torch_backend import optimizers, sharding
from training_utils.torch_backend.deepspeed import PartitionedParameters


def clip_gradient(accelerator: Accelerator, parameters: Any, max_norm: float) -> torch.Tensor:
    """The norm of the gradient, a scalar tensor, which is then clipped to `max_norm`; 0 means no clipping."""
    if isinstance(parameters, PartitionedParameters):
        return parameters.optimizer.clip_gradient(max_norm)
    if max_norm:
        norm = accelerator.clip_grad_norm_(parameters, max_norm)
    else:
        accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return sharding.gather_full_tensor(norm)


class Gradient:
    """What stands between backward pass and step: the gradient is guarded against NaN, and clipped.

    With `during_backward` each weight is stepped during the backward pass, by a FusedBackward, and nothing is clipped.
    `skipped` is a scalar tensor on the device, 1 where the last step was left out; None under fp16 loss scaling, where
    accelerate sees to it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,
        parameters: Any,
        *,
        max_norm: float,
        stop_on_nan: bool,
        during_backward: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.parameters = parameters
        self.max_norm = max_norm
        self.guard = FiniteGuard(accelerator, optimizer, stop_on_nan)
        self.fused = FusedBackward(optimizer, self.guard) if during_backward else None

    @property
    def skipped(self) -> torch.Tensor | None:
        """Whether the last step was left out: 1 or 0, on the device."""
        return self.guard.skipped

    def begin(self, loss: torch.Tensor) -> None:
        """To be called with the loss before its backward pass."""
        if self.fused is not None:
            self.fused.begin(loss)

    def clip_and_check(self) -> torch.Tensor:
        """The norm of the whole gradient before it is clipped, a scalar tensor. A step whose norm is not finite is
        left out."""
        if self.fused is not None:
            norm = self.fused.gradient_norm()
        else:
            norm = clip_gradient(self.accelerator, self.parameters, self.max_norm)
        self.guard.check(norm)
        return norm


class FiniteGuard:
    """Keeps a step whose gradient is not finite from reaching the weights.

    `check` is called between the backward pass and the step. With the fused AdamW it never waits for the device: the
    kernel itself leaves out a step whose `found_inf` is set, as it does for torch's loss scaling. Other optimizers
    have no such switch, so for them the norm is fetched. Under fp16 loss scaling accelerate sees to it.

    When to `stop`, one such step also leaves out all that follow, so that the weights stay in the last good state
    until it is noticed, when the losses are fetched. Else the run goes on with the next step.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, stop: bool) -> None:
        self.stop = stop
        self.optimizer = optimizer.optimizer  # the one inside accelerate's wrapper
        self.on_device = all(group.get("fused") for group in self.optimizer.param_groups)
        self.skipped: torch.Tensor | None = None
        if accelerator.scaler is None:
            self.skipped = torch.zeros((), device=accelerator.device)

    def check(self, norm: torch.Tensor, part: bool = False) -> None:
        """Leave out the coming step if this norm, of all processes' gradient, is not finite.

        With `part` the norm is of a part of the gradient, and a step that is left out already stays so.
        """
        if self.skipped is None:
            return
        bad = (~norm.isfinite()).float()
        self.skipped = torch.maximum(self.skipped, bad) if self.stop or part else bad
        if self.on_device:
            self.optimizer.found_inf = self.skipped
        elif self.skipped.item():
            self.optimizer.zero_grad(set_to_none=True)


class FusedBackward:
    """Steps each weight as soon as the backward pass has its gradient, and frees the gradient at once.

    So the gradients, as large as the weights, are never all in memory (Lv et al. 2023, "Full parameter fine-tuning for
    large language models with limited resources", arXiv 2306.09782). The step of a weight is the optimizer's own, on
    that weight alone: with AdamW the same to the bit as after the backward pass. Nothing can be clipped, since weights
    have moved before the whole norm is known. Of a network that torch.compile made one graph of, the gradients come
    all at once, and nothing is saved.

    The `guard` is shown the loss before the backward pass and then each gradient. From the first one on that is not
    finite no weight moves; those that moved before it in the same backward pass, with finite gradients, cannot be
    taken back. A loss that is not finite moves none.
    """

    def __init__(self, optimizer: Any, guard: FiniteGuard) -> None:
        self.optimizer = optimizer.optimizer  # the one inside accelerate's wrapper
        self.guard = guard
        self.norms: list[torch.Tensor] = []
        for parameter in self.optimizer.param_groups[0]["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._step_weight)

    def begin(self, loss: torch.Tensor) -> None:
        """To be called with the loss before its backward pass."""
        self.norms = [loss.detach() * 0]  # not finite where the loss is not
        self.guard.check(self.norms[0])

    def _step_weight(self, parameter: torch.nn.Parameter) -> None:
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.norms.append(norm)
        with optimizers.only_parameter(self.optimizer, parameter):
            self.guard.check(norm, part=True)
            self.optimizer.step()
        parameter.grad = None

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the whole gradient of the last backward pass, a scalar tensor."""
        return torch.linalg.vector_norm(torch.stack(self.norms))


def prepare_network(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> tuple[Any, Any, Any]:
    """What the loop calls of a model, its optimizer, and the parameters that this one steps from now on, which are
    others where the processes share them out."""
    network, optimizer = sharding.prepare_model(accelerator, model, optimizer)
    parameters = sharding.trained_parameters(optimizer)
    if accelerator.gradient_accumulation_steps > 1 and _replays_graphs(accelerator.state.dynamo_plugin):
        own_gradients(parameters)
    return network, optimizer, parameters


def _replays_graphs(plugin: Any) -> bool:
    """Whether a launch with this TorchDynamoPlugin has the network replayed as CUDA graphs."""
    if plugin.backend == DynamoBackend.INDUCTOR:
        return plugin.mode in ("reduce-overhead", "max-autotune")
    return plugin.backend == DynamoBackend.CUDAGRAPHS


def own_gradients(parameters: Any) -> None:
    """Have gradients add up in memory of their own from now on.

    Autograd takes the first gradient of a window as it is, and a CUDA graph writes the next one to the same place.
    """
    own = {}

    def move_to_own_memory(parameter: torch.nn.Parameter) -> None:
        if parameter not in own:
            own[parameter] = torch.empty_like(parameter)
        if parameter.grad is not own[parameter]:
            parameter.grad = own[parameter].copy_(parameter.grad)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(move_to_own_memory)
