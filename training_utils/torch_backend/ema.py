"""Exponential moving average of the weights: diffusers' EMAModel with multi-tensor steps and a host-memory mode."""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from training_utils.torch_backend import sharding


class EMAWeights(EMAModel):
    """The moving average of the parameters that are trained in some models, in float32 whatever their precision: half
    precision would round its small moves away.

    The decay of a step that has n before it is min(decay, (1 + n) / (10 + n)), and 0 for the first: diffusers'
    rule. With `offload` the average lies in host memory (pinned where there is a GPU) and visits the device for each
    step. Where the processes share the parameters out, each of them averages its slices.
    """

    def __init__(self, models: Iterable[torch.nn.Module], decay: float, offload: bool = False) -> None:
        self.names = []
        self.parameters = []
        for model in models:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    self.names.append(name)
                    self.parameters.append(parameter)
        super().__init__(self.slices(), decay=decay, foreach=True)
        self.shadow_params: list[torch.Tensor] = [shadow.float() for shadow in self.shadow_params]
        self.all_float32 = all(parameter.dtype == torch.float32 for parameter in self.parameters)
        self.offload = offload
        if offload:
            self.to("cpu")
            if torch.cuda.is_available():
                self.pin_memory()

    def slices(self) -> list[torch.Tensor]:
        """What this process holds of each parameter, plain tensors in the same memory."""
        return [sharding.local_slice(parameter.detach()) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, skipped: torch.Tensor | None = None) -> None:
        """Move the average towards the parameters, once per optimizer step.

        `skipped` is a scalar tensor, 1 where the step was skipped and the average is to stay too, else 0; None where
        no step is skipped.
        """
        self.optimization_step += 1
        weight = 1 - self.get_decay(self.optimization_step)
        parameters = self.slices()
        if skipped is not None:
            weight = weight * (1 - skipped)
        if self.all_float32 and not self.offload:
            weights = weight if skipped is None else [weight] * len(parameters)
            torch._foreach_lerp_(self.shadow_params, parameters, weights)
            return
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            # Copies from and into pinned memory need no wait: the stream keeps their order.
            non_blocking = parameter.is_cuda
            moved = shadow.to(parameter.device, non_blocking=non_blocking).lerp_(parameter.float(), weight)
            if self.offload:
                shadow.copy_(moved, non_blocking=non_blocking)

    def _wait_for_copies(self) -> None:
        """Wait for copies to the host that are still under way, before the host reads them."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the models hold the averaged weights."""
        self._wait_for_copies()
        self.store(self.slices())
        self.copy_to(self.slices())
        try:
            yield
        finally:
            self.restore(self.slices())

    def reset(self) -> None:
        """Start the average again at the models' weights, which a checkpoint without an average was loaded into."""
        for shadow, parameter in zip(self.shadow_params, self.slices(), strict=True):
            shadow.copy_(parameter)

    def gather_full(self, model: torch.nn.Module | None) -> "EMAWeights | None":
        """The average without sharding, for the model that `sharding.gather_full_model` returned; None where that is
        None. A collective call."""
        self._wait_for_copies()
        shadows = []
        # The average lies in no module, so torch's get_model_state_dict cannot gather it.
        for shadow, parameter in zip(self.shadow_params, self.parameters, strict=True):
            shadow = sharding.as_sharded(shadow.to(parameter.device), parameter)
            shadows.append(sharding.gather_full_on_main(shadow))
        if model is None:
            return None
        parameters = dict(model.named_parameters())
        full = copy.copy(self)
        full.shadow_params = shadows
        full.parameters = [parameters[name] for name in self.names]
        return full

    def save(self, folder: Path, model: torch.nn.Module) -> None:
        """Write the average as a diffusers model folder, its step and decay in config.json, as EMAModel does."""
        self._wait_for_copies()
        state = model.state_dict() | dict(zip(self.names, self.shadow_params, strict=True))
        # On the meta device, since a random initialisation would be lost anyway.
        with torch.device("meta"):
            average = type(model).from_config(model.config)
        average.load_state_dict(state, assign=True)
        settings = {name: value for name, value in self.state_dict().items() if name != "shadow_params"}
        average.register_to_config(**settings)
        average.save_pretrained(folder)

    def load(self, folder: Path, model: torch.nn.Module) -> None:
        """Read what `save`, or EMAModel of the original scripts, wrote; no collective call."""
        weights = sharding.model_class(model).from_pretrained(folder).state_dict()
        for name, shadow, parameter in zip(self.names, self.shadow_params, self.parameters, strict=True):
            shadow.copy_(sharding.slice_for(weights[name], parameter))
        config = json.loads((Path(folder) / "config.json").read_text())
        self.optimization_step = config["optimization_step"]

    def write(self, path: Path) -> None:
        """Write the average alone as one file, for models that are trained in part."""
        self._wait_for_copies()
        torch.save(self.state_dict(), path)

    def read(self, path: Path) -> None:
        """Read what `write` wrote."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        for shadow, saved in zip(self.shadow_params, state["shadow_params"], strict=True):
            shadow.copy_(saved)
        self.optimization_step = state["optimization_step"]


def averaged(ema: EMAWeights | None) -> AbstractContextManager[None]:
    """The context in which the models hold their averaged weights; with None they keep their own."""
    return nullcontext() if ema is None else ema.in_place()
