"""The gradient between backward pass and step: clipped, guarded against NaN, or used up during the pass."""

import torch
import torch.utils.checkpoint
from accelerate.utils import DynamoBackend

from training_utils.run import progress
from training_utils.torch_backend import optimizers, processes, sharding
from training_utils.torch_backend.deepspeed import PartitionedParameters


def clip_gradient(accelerator, parameters, max_norm):
    """The norm of the gradient, a scalar tensor, which is then clipped to `max_norm`; 0 means no clipping."""
    if isinstance(parameters, PartitionedParameters):
        return parameters.optimizer.clip_gradient(max_norm)
    if max_norm:
        norm = accelerator.clip_grad_norm_(parameters, max_norm)
    else:
        accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return sharding.gather_full_tensor(norm)


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
            processes.end_training(self.accelerator)
            return folder

        progress.report_not_finite(step, loss, self.names(before), self.stop, keep)


class FusedBackward:
    """BatchPlan each weight as soon as the backward pass has its gradient, and frees the gradient at once.

    So the gradients, as large as the weights, are never all in memory (Lv et al. 2023, "Full parameter fine-tuning for
    large language models with limited resources", arXiv 2306.09782). The step of a weight is the optimizer's own, on
    that weight alone: with AdamW the same to the bit as after the backward pass. Nothing can be clipped, since weights
    have moved before the whole norm is known. Of a network that torch.compile made one graph of, the gradients come
    all at once, and nothing is saved.

    `guard`, an engine.FiniteGuard, is shown the loss before the backward pass and then each gradient. From the first
    one on that is not finite no weight moves; those that moved before it in the same backward pass, with finite
    gradients, cannot be taken back. A loss that is not finite moves none.
    """

    def __init__(self, optimizer, guard):
        self.optimizer = optimizer.optimizer  # the one inside accelerate's wrapper
        self.guard, self.norms = guard, []
        for parameter in self.optimizer.param_groups[0]["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._update)

    def begin(self, loss):
        """To be called with the loss before its backward pass."""
        self.norms = [loss.detach() * 0]  # not finite where the loss is not
        self.guard.look_at(self.norms[0])

    def _update(self, parameter):
        self.norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        with optimizers.only_parameter(self.optimizer, parameter):
            self.guard.look_at(self.norms[-1], more=True)
            self.optimizer.step()
        parameter.grad = None

    def gradient_norm(self):
        """The norm of the whole gradient of the last backward pass, a scalar tensor."""
        return torch.linalg.vector_norm(torch.stack(self.norms))


def prepare_network(accelerator, model, optimizer):
    """What the loop calls of a model, its optimizer, and the parameters that this one steps from now on, which are
    others where the processes share them out."""
    network, optimizer = sharding.prepare_model(accelerator, model, optimizer)
    parameters = sharding.trained_parameters(optimizer)
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
