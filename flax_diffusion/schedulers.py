"""The samplers DDIM, DDPM and PNDM over the noise schedules of Stable Diffusion, and how one is chosen for a model.

A sampler holds no state. For training it offers `add_noise` and `get_velocity`, pure functions to be used inside jit;
for sampling `plan`, whose rows trajectory.py applies.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from .config import ModelError
from .noise_schedule import NoiseSchedule
from .trajectory import Plan, prediction_coefficients


class Sampler(NoiseSchedule):
    """What the samplers share. A subclass defines `plan`."""

    def plan(self, count: int) -> Plan:
        """The Plan of a trajectory of `count` steps. Raises ModelError."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """The sampler of a scheduler_config.json's dict, of whatever class that is, with `changes` to it."""
        return cls(**(dict(config) | changes))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, subfolder: str = "scheduler", **changes: Any
    ) -> tuple[Self, dict[str, Any]]:
        """The sampler of a pipeline's folder and its state, which is empty: (sampler, {})."""
        return cls.from_config(read_config(folder, subfolder), **changes), {}

    def changed(self, **changes: Any) -> Self:
        """The same sampler with those of `changes` that it has a setting for."""
        known = {name: value for name, value in changes.items() if name in self.config}
        return type(self)(**self.given | known)

    def torch_config(self, **changes: Any) -> dict[str, Any]:
        """The dict of scheduler_config.json with which diffusers samples alike, with those of `changes` that its
        sampler has a setting for.

        A sampler that was made from the settings of another one which is missing here keeps that one's name.
        """
        stored_name = self.given.get("_class_name", "")
        if stored_name == "" or _flax_name(stored_name) in SAMPLERS:
            name = type(self).__name__
            settings: Mapping[str, Any] = self.config
        else:
            name = stored_name
            settings = self.given
        known = {key: value for key, value in changes.items() if key in settings}
        return self.given | known | {"_class_name": name.removeprefix("Flax")}

    def timesteps(self, count: int) -> np.ndarray:
        """The `count` timesteps of a trajectory, descending, int64 (their spacings: arXiv 2305.08891, table 2).

        Raises ModelError where the schedule has no such timesteps.
        """
        total = self.config.num_train_timesteps
        spacing = self.config.timestep_spacing
        offset = self.config.steps_offset
        if not 1 <= count <= total:
            raise ModelError(f"scheduler: {count} steps are asked for; it has from 1 to {total}")
        if spacing == "leading":
            steps = np.arange(count)[::-1] * (total // count) + offset
        elif spacing == "trailing":
            steps = np.round(np.arange(total, 0, -total / count)) - 1
        elif spacing == "linspace":
            steps = np.linspace(0, total - 1, count).round()[::-1]
        else:
            raise ModelError(f"scheduler: the setting timestep_spacing = {spacing!r} is not supported")
        if steps[0] >= total:
            raise ModelError(f"scheduler: with steps_offset = {offset}, {count} steps begin after the last timestep")
        return steps.astype(np.int64)

    def _alphas(self, timesteps: np.ndarray, below_zero: float = 1.0) -> np.ndarray:
        """The cumulative product at each of `timesteps`, float64; `below_zero` at those below 0."""
        products = self.alphas_cumprod.astype(np.float64)
        return np.where(timesteps < 0, below_zero, products[timesteps.clip(min=0)])

    def _alphas_after(self, timesteps: np.ndarray) -> np.ndarray:
        """The cumulative product where a step ends; below timestep 0 it is 1 or that of timestep 0, as set."""
        return self._alphas(timesteps, 1.0 if self.config.set_alpha_to_one else self.alphas_cumprod[0])


class FlaxDDIMScheduler(Sampler):
    """Deterministic sampling of Song et al. 2020, arXiv 2010.02502, eq. 12 with sigma = 0."""

    defaults = {"clip_sample": True, "clip_sample_range": 1.0, "set_alpha_to_one": True, "thresholding": False}

    def plan(self, count: int) -> Plan:
        """The Plan of `count` steps. Raises ModelError."""
        timesteps = self.timesteps(count)
        a = self._alphas(timesteps)
        a_after = self._alphas_after(timesteps - self.config.num_train_timesteps // count)
        next_sample = np.stack([np.sqrt(a_after), np.sqrt(1 - a_after), np.zeros_like(a)], axis=1)
        return self._single_step_plan(timesteps, a, next_sample)

    def _single_step_plan(
        self, timesteps: np.ndarray, a: np.ndarray, next_sample: np.ndarray, sigma: np.ndarray | None = None
    ) -> Plan:
        """The Plan of a sampler that uses each output once."""
        if self.config.thresholding:
            raise ModelError("scheduler: the setting thresholding = True is for pixels and not supported")
        x0, epsilon = prediction_coefficients(self.config.prediction_type, a)
        never: np.ndarray = np.zeros(len(timesteps), bool)
        bound = self.config.clip_sample_range if self.config.clip_sample else np.inf
        return Plan(
            timestep=timesteps.astype(np.int32),
            weights=np.ones((len(timesteps), 1)),
            remember=never,
            use_remembered=never,
            x0=x0,
            epsilon=epsilon,
            next_sample=next_sample,
            clip=np.full(len(timesteps), bound),
            sigma=sigma,
        )


# Two ways to compute one variance.
POSTERIOR_VARIANCES = ("fixed_small", "fixed_small_log")


class FlaxDDPMScheduler(FlaxDDIMScheduler):
    """Ancestral sampling of Ho et al. 2020, arXiv 2006.11239, eq. 7, with the variance of its posterior."""

    defaults = FlaxDDIMScheduler.defaults | {"variance_type": "fixed_small"}

    def plan(self, count: int) -> Plan:
        """The Plan of `count` steps. Raises ModelError."""
        if self.config.variance_type not in POSTERIOR_VARIANCES:
            raise ModelError(f"scheduler: the setting variance_type = {self.config.variance_type!r} is not supported")
        timesteps = self.timesteps(count)
        a = self._alphas(timesteps)
        a_after = self._alphas(np.append(timesteps[1:], -1))
        alpha = a / a_after
        x0 = np.sqrt(a_after) * (1 - alpha) / (1 - a)
        sample = np.sqrt(alpha) * (1 - a_after) / (1 - a)
        sigma = np.sqrt((1 - a_after) / (1 - a) * (1 - alpha))
        return self._single_step_plan(timesteps, a, np.stack([x0, np.zeros_like(a), sample], axis=1), sigma)


RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class _MultistepRow:
    """A step of PNDM: from timestep `start` to `end`, with the network's output at `timestep` as the newest.

    weights: of the last outputs, the newest first. remember, use_remembered: as in Plan.
    """

    timestep: int
    start: int
    end: int
    weights: tuple[float, ...]
    remember: bool = False
    use_remembered: bool = False


class FlaxPNDMScheduler(Sampler):
    """Linear multistep sampling of Liu et al. 2022, arXiv 2202.09778.

    The paper's transfer part is DDIM's step with another slope in place of epsilon: a combination of the last four
    outputs by the linear multistep method of Adams and Bashforth. It starts with three Runge-Kutta steps of four
    outputs each, or, with skip_prk_steps, as in Stable Diffusion, with one step of Heun's method and then shorter
    combinations.
    """

    defaults = {"skip_prk_steps": False, "set_alpha_to_one": False}

    def plan(self, count: int) -> Plan:
        """The Plan of `count` steps: count + 1 outputs of the network, or count + 9 with Runge-Kutta.

        Raises ModelError.
        """
        if self.config.rescale_betas_zero_snr:
            raise ModelError("scheduler: PNDM cannot sample with zero terminal SNR; use DDIM")
        rows = self._heun_start(count) if self.config.skip_prk_steps else self._runge_kutta_start(count)
        a = self._alphas(np.array([row.start for row in rows]))
        a_after = self._alphas_after(np.array([row.end for row in rows]))
        x0, epsilon = prediction_coefficients(self.config.prediction_type, a)
        weights = np.zeros((len(rows), max(len(row.weights) for row in rows)))
        for number, row in enumerate(rows):
            weights[number, : len(row.weights)] = row.weights
        return Plan(
            timestep=np.array([row.timestep for row in rows], np.int32),
            weights=weights,
            remember=np.array([row.remember for row in rows]),
            use_remembered=np.array([row.use_remembered for row in rows]),
            x0=x0,
            epsilon=epsilon,
            next_sample=np.stack([np.sqrt(a_after), np.sqrt(1 - a_after), np.zeros_like(a)], axis=1),
            clip=np.full(len(a), np.inf),
        )

    def _heun_start(self, count: int) -> list[_MultistepRow]:
        """The rows with Heun's method first, and then growing combinations."""
        times = self.timesteps(count).tolist()
        stride = self.config.num_train_timesteps // count
        rows = [_MultistepRow(times[0], times[0], times[0] - stride, (1,), remember=True)]
        if count > 1:
            rows.append(_MultistepRow(times[1], times[1] + stride, times[1], (1 / 2, 1 / 2), use_remembered=True))
        return rows + self._multistep(times[1:], stride, first=len(rows), used=[0])

    def _runge_kutta_start(self, count: int) -> list[_MultistepRow]:
        """The rows with three steps of the Runge-Kutta method of order four first. Raises ModelError."""
        if count < 4:
            raise ModelError(f"scheduler: PNDM needs at least 4 steps, or skip_prk_steps; {count} are asked for")
        times = self.timesteps(count).tolist()
        stride = self.config.num_train_timesteps // count
        half = stride // 2
        rows = []
        for now, later in zip(times[:3], times[1:4]):
            rows += [
                _MultistepRow(now, now, now - half, (1,), remember=True),
                _MultistepRow(later + half, now, later + half, (1,), use_remembered=True),
                _MultistepRow(later + half, now, later, (1,), use_remembered=True),
                _MultistepRow(later, now, later, RUNGE_KUTTA, use_remembered=True),
            ]
        return rows + self._multistep(times[3:], stride, first=len(rows), used=[0, 4, 8])

    @staticmethod
    def _multistep(times: Iterable[int], stride: int, *, first: int, used: list[int]) -> list[_MultistepRow]:
        """The rows of plain steps at `times`.

        first: the number of outputs before these. used: the earlier outputs that are combined, by number.
        """
        rows: list[_MultistepRow] = []
        for time in times:
            used = [*used, first + len(rows)][-4:]
            # How many rows of the plan ago each combined output was computed, the newest first.
            ages = used[-1] - np.array(used[::-1])
            weights = np.zeros(ages[-1] + 1)
            weights[ages] = ADAMS_BASHFORTH[len(used) - 1]
            rows.append(_MultistepRow(time, time, time - stride, tuple(weights)))
        return rows


SAMPLERS = {cls.__name__: cls for cls in (FlaxDDIMScheduler, FlaxDDPMScheduler, FlaxPNDMScheduler)}


def _flax_name(name: str) -> str:
    """The name of our class for a sampler of diffusers, whether or not there is one."""
    return "Flax" + name.removeprefix("Flax")


def read_config(folder: str | Path, subfolder: str = "scheduler") -> dict[str, Any]:
    """The dict of scheduler_config.json in a pipeline's folder. Raises ModelError."""
    path = Path(folder) / subfolder / "scheduler_config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"scheduler: {path} cannot be read: {error}") from error


def for_sampling(config: Mapping[str, Any]) -> Sampler:
    """The sampler for a model with this scheduler_config.json, a dict.

    One that is missing here (Euler, DPM-Solver, ...) is replaced by DDIM over the same noise schedule, with a warning.
    Raises ModelError for one whose noise schedule is of another kind (flow matching).
    """
    name = config.get("_class_name", "").removeprefix("Flax")
    own_class = SAMPLERS.get(_flax_name(name))
    if own_class is None and "beta_schedule" not in config:
        raise ModelError(f"scheduler: {name} has no schedule of betas and is not supported")
    scheduler = (own_class or FlaxDDIMScheduler).from_config(config)
    if own_class is None:
        reason = f"there is no {name} here" if name else "no sampler is named"
    elif own_class is FlaxPNDMScheduler and scheduler.config.rescale_betas_zero_snr:
        reason = "PNDM cannot begin in pure noise"
    elif own_class is FlaxDDPMScheduler and scheduler.config.variance_type not in POSTERIOR_VARIANCES:
        reason = f"DDPM with variance_type = {scheduler.config.variance_type!r} is not supported"
    else:
        return scheduler
    warnings.warn(f"{reason}: images are drawn with DDIM over the same noise schedule", stacklevel=3)
    return FlaxDDIMScheduler.from_config(config)
