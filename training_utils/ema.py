"""Exponential moving average of the weights: diffusers' EMAModel with multi-tensor updates and a host-memory mode."""

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel


class EMAWeights(EMAModel):
    """The moving average of a model's parameters, in their own precision.

    The decay after n updates is min(decay, (1 + n) / (10 + n)), diffusers' rule. With `offload` the average lies in
    host memory (pinned where there is a GPU) and visits the device for each update.
    """

    def __init__(self, model, decay, offload=False):
        super().__init__(model.parameters(), decay=decay, foreach=True)
        self.names = [name for name, _ in model.named_parameters()]
        self.offload = offload
        if offload:
            self.to("cpu")
            if torch.cuda.is_available():
                self.pin_memory()

    @torch.no_grad()
    def step(self, parameters):
        """Move the average towards the parameters, once per optimizer update."""
        self.optimization_step += 1
        weight = 1 - self.get_decay(self.optimization_step)
        parameters = [parameter.detach() for parameter in parameters]
        if not self.offload:
            torch._foreach_lerp_(self.shadow_params, parameters, weight)
            return
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            moved = shadow.to(parameter.device, non_blocking=True).lerp_(parameter, weight)
            shadow.copy_(moved, non_blocking=True)  # back into the same pinned memory; the stream keeps the order

    def _settle(self):
        """Wait for copies to the host that are still under way, before the host reads them."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()

    @contextmanager
    def in_place_of(self, model):
        """Within this context `model` holds the averaged weights."""
        self._settle()
        parameters = list(model.parameters())
        self.store(parameters)
        self.copy_to(parameters)
        try:
            yield
        finally:
            self.restore(parameters)

    def reset(self, model):
        """Begin the average anew at the model's weights, which a checkpoint without an average was loaded into."""
        for shadow, parameter in zip(self.shadow_params, model.parameters(), strict=True):
            shadow.copy_(parameter.detach())

    def save(self, folder, model):
        """Write the average as a diffusers model folder, its step and decay in config.json, as EMAModel does."""
        self._settle()
        state = model.state_dict() | dict(zip(self.names, self.shadow_params, strict=True))
        with torch.device("meta"):  # no random initialisation of a model whose weights are at hand
            copy = type(model).from_config(model.config)
        copy.load_state_dict(state, assign=True)
        facts = {key: value for key, value in self.state_dict().items() if key != "shadow_params"}
        copy.register_to_config(**facts)
        copy.save_pretrained(folder)

    def load(self, folder, model):
        """Read what `save`, or EMAModel of the original scripts, wrote."""
        weights = type(model).from_pretrained(folder).state_dict()
        for name, shadow in zip(self.names, self.shadow_params, strict=True):
            shadow.copy_(weights[name])
        config = json.loads((Path(folder) / "config.json").read_text())
        self.optimization_step = config["optimization_step"]


def averaged(ema, model):
    """The context in which `model` holds its averaged weights; `ema` may be None, then it keeps its own."""
    return nullcontext() if ema is None else ema.in_place_of(model)
