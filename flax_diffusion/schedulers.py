"""Noise schedules of Stable Diffusion: what training mixes, and the steps of DDIM, PNDM and DDPM sampling.

A schedule holds no state. For training it offers `add_noise` and `get_velocity`, pure functions to be used inside jit.
For sampling, `plan` works out on the host, in float64, all that a trajectory needs as a table with one row a step;
`step` then applies a row with plain arithmetic, so that one loop in one compilation does for every sampler.

In what follows a is the cumulative product of a timestep: a sample is sqrt(a) x0 + sqrt(1 - a) epsilon.
"""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .networks import Config, ModelError

DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def betas(config):
    """The noise variance that each training timestep adds, float64, shape (T,). Raises ModelError."""
    count, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        return np.array(config["trained_betas"], dtype=np.float64)
    if config["beta_schedule"] == "linear":
        return np.linspace(first, last, count)
    if config["beta_schedule"] == "scaled_linear":  # of latent diffusion: linear in the square root
        return np.linspace(first**0.5, last**0.5, count) ** 2
    if config["beta_schedule"] == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
        products = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - products[1:] / products[:-1], 0.999)
    raise ModelError(f"scheduler: the setting beta_schedule = {config['beta_schedule']!r} is not supported")


def zero_terminal_snr(alphas_cumprod):
    """The schedule shifted and scaled to end in pure noise, its first value kept (arXiv 2305.08891, algorithm 1)."""
    roots = np.sqrt(alphas_cumprod)
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


class Plan(NamedTuple):
    """The rows of a trajectory of N steps; `lax.scan` hands them to `step` one at a time.

    A step takes the network's output at the current sample, combines it with earlier outputs, reads x0 and epsilon
    off the result and mixes those at the next noise level. All float64 where nothing else is said.
    """

    timestep: np.ndarray  # (N,) int32, what the network is told
    weights: np.ndarray  # (N, K), share of each of the last K outputs in the combined one, the newest first
    keep: np.ndarray  # (N,) bool, whether to remember this step's sample
    restart: np.ndarray  # (N,) bool, whether to go on from the remembered sample instead of the current one
    x0: np.ndarray  # (N, 2), x0 from that sample and the combined output
    epsilon: np.ndarray  # (N, 2), likewise
    next: np.ndarray  # (N, 3), the next sample from x0, epsilon and that sample
    clip: np.ndarray  # (N,), bound of x0
    sigma: np.ndarray | None = None  # (N,), standard deviation of added noise, for samplers that add some

    @property
    def memory(self):
        """K, how many outputs are remembered."""
        return self.weights.shape[-1]


def begin(plan, sample):
    """The state of a trajectory that starts at `sample` (B, C, h, w), pure noise of unit variance."""
    return sample, sample, jnp.zeros((plan.memory, *sample.shape), sample.dtype)


def step(row, state, output, noise=None):
    """The state after one step: `row` of a Plan, the network's output (B, C, h, w) at the state's sample, and, for a
    sampler that adds some, standard normal noise of the same shape. The sample is the state's first entry."""
    sample, kept, outputs = state
    kept = jnp.where(row.keep, sample, kept)
    outputs = jnp.concatenate([output[None].astype(outputs.dtype), outputs[:-1]])
    # no matrix product, which TPUs and GPUs compute with fewer bits
    slope = (row.weights.reshape(-1, *[1] * sample.ndim) * outputs).sum(0)
    base = jnp.where(row.restart, kept, sample)
    x0 = (row.x0[0] * base + row.x0[1] * slope).clip(-row.clip, row.clip)
    epsilon = row.epsilon[0] * base + row.epsilon[1] * slope
    sample = row.next[0] * x0 + row.next[1] * epsilon + row.next[2] * base
    if noise is not None:
        sample += row.sigma * noise
    return sample, kept, outputs


def _from_prediction(kind, a):
    """The coefficients (N, 2) with which a sample and a prediction of this kind give x0, and those for epsilon."""
    signal, noise, zero, one = np.sqrt(a), np.sqrt(1 - a), np.zeros_like(a), np.ones_like(a)
    if kind == "epsilon":
        if not signal.all():
            raise ModelError("scheduler: a schedule that ends in pure noise needs prediction_type = 'v_prediction'")
        x0, epsilon = (one / signal, -noise / signal), (zero, one)
    elif kind == "v_prediction":  # Salimans & Ho 2022, arXiv 2202.00512, appendix D
        x0, epsilon = (signal, -noise), (noise, signal)
    else:
        x0, epsilon = (zero, one), (one / noise, -signal / noise)
    return np.stack(x0, axis=1), np.stack(epsilon, axis=1)


class _Scheduler:
    """What the schedules share. `config` holds the settings over the defaults, `alphas_cumprod` the float32 numpy
    array (T,) of a at each timestep. Raises ModelError for a setting that is not supported."""

    defaults = {}

    def __init__(self, **settings):
        self._given = settings
        self.config = Config(DEFAULTS | self.defaults | settings)
        if (kind := self.config.prediction_type) not in PREDICTIONS:
            raise ModelError(f"scheduler: the setting prediction_type = {kind!r} is not supported")
        products = np.cumprod(1 - betas(self.config))
        if self.config.rescale_betas_zero_snr:
            products = zero_terminal_snr(products)
        self.alphas_cumprod = products.astype(np.float32)

    @classmethod
    def from_config(cls, config, **changes):
        """The schedule of a scheduler_config.json's dict, of whatever class that is, with `changes` to it."""
        return cls(**(dict(config) | changes))

    @classmethod
    def from_pretrained(cls, folder, subfolder="scheduler", **changes):
        """The schedule of a pipeline's folder and its state, which is empty: (schedule, {})."""
        return cls.from_config(read_config(folder, subfolder), **changes), {}

    def changed(self, **changes):
        """The same schedule with those of `changes` that it has a setting for."""
        return type(self)(**self._given | {name: value for name, value in changes.items() if name in self.config})

    def torch_config(self, **changes):
        """The dict of scheduler_config.json with which diffusers samples alike, with those of `changes` that its
        sampler has a setting for. A schedule read from the settings of a sampler that there is none of here keeps that
        sampler's name."""
        stored, own = self._given.get("_class_name", ""), type(self).__name__
        ours = stored == "" or f"Flax{stored.removeprefix('Flax')}" in SAMPLERS
        known = self.config if ours else self._given
        name = (own if ours else stored).removeprefix("Flax")
        return self._given | {key: value for key, value in changes.items() if key in known} | {"_class_name": name}

    def timesteps(self, count):
        """The `count` timesteps of a trajectory, descending, int64 (their spacings: arXiv 2305.08891, table 2).

        Raises ModelError where the schedule has no such timesteps.
        """
        total, spacing, offset = (
            self.config[name] for name in ("num_train_timesteps", "timestep_spacing", "steps_offset")
        )
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

    def _alphas(self, timesteps, before_first=1.0):
        """a at each of `timesteps`, float64; `before_first` at those below 0."""
        products = self.alphas_cumprod.astype(np.float64)
        return np.where(timesteps < 0, before_first, products[timesteps.clip(min=0)])

    def _next_alphas(self, timesteps):
        """a where a step ends; below timestep 0 it is 1 or that of timestep 0, as the configuration says."""
        return self._alphas(timesteps, 1.0 if self.config.set_alpha_to_one else self.alphas_cumprod[0])

    def _mix(self, one, other, timesteps):
        """sqrt(a) * one, sqrt(1 - a) * other for each sample's a; float32."""
        a = jnp.asarray(self.alphas_cumprod)[timesteps]
        a = a.reshape(a.shape + (1,) * (one.ndim - a.ndim))
        return jnp.sqrt(a) * one.astype(jnp.float32), jnp.sqrt(1 - a) * other.astype(jnp.float32)

    def add_noise(self, x0, noise, timesteps):
        """The noisy samples of x0 (B, ...) at timesteps (B,), float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4)."""
        signal, noise = self._mix(x0, noise, timesteps)
        return signal + noise

    def get_velocity(self, x0, noise, timesteps):
        """v = sqrt(a) noise - sqrt(1 - a) x0, float32 (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
        noise, signal = self._mix(noise, x0, timesteps)
        return noise - signal


class FlaxDDIMScheduler(_Scheduler):
    """Deterministic sampling of Song et al. 2020, arXiv 2010.02502, eq. 12 with sigma = 0."""

    defaults = {"clip_sample": True, "clip_sample_range": 1.0, "set_alpha_to_one": True, "thresholding": False}

    def plan(self, count):
        """The Plan of `count` steps. Raises ModelError."""
        now = self.timesteps(count)
        a = self._alphas(now)
        a_next = self._next_alphas(now - self.config.num_train_timesteps // count)
        after = np.stack([np.sqrt(a_next), np.sqrt(1 - a_next), np.zeros_like(a)], axis=1)
        return self._single_step_plan(now, a, after)

    def _single_step_plan(self, now, a, after, sigma=None):
        """The Plan of a sampler that uses each output once."""
        if self.config.thresholding:
            raise ModelError("scheduler: the setting thresholding = True is for pixels and not supported")
        x0, epsilon = _from_prediction(self.config.prediction_type, a)
        never, once = np.zeros(len(now), bool), np.ones((len(now), 1))
        bound = np.full(len(now), self.config.clip_sample_range if self.config.clip_sample else np.inf)
        return Plan(now.astype(np.int32), once, never, never, x0, epsilon, after, bound, sigma)


POSTERIOR = ("fixed_small", "fixed_small_log")  # two ways to compute one variance


class FlaxDDPMScheduler(FlaxDDIMScheduler):
    """Ancestral sampling of Ho et al. 2020, arXiv 2006.11239, eq. 7, with the variance of its posterior."""

    defaults = FlaxDDIMScheduler.defaults | {"variance_type": "fixed_small"}

    def plan(self, count):
        """The Plan of `count` steps. Raises ModelError."""
        if self.config.variance_type not in POSTERIOR:
            raise ModelError(f"scheduler: the setting variance_type = {self.config.variance_type!r} is not supported")
        now = self.timesteps(count)
        a, a_next = self._alphas(now), self._alphas(np.append(now[1:], -1))
        kept = a / a_next  # alpha of this step
        x0, sample = np.sqrt(a_next) * (1 - kept) / (1 - a), np.sqrt(kept) * (1 - a_next) / (1 - a)
        sigma = np.sqrt((1 - a_next) / (1 - a) * (1 - kept))
        return self._single_step_plan(now, a, np.stack([x0, np.zeros_like(a), sample], axis=1), sigma)


RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class FlaxPNDMScheduler(_Scheduler):
    """Linear multistep sampling of Liu et al. 2022, arXiv 2202.09778.

    The paper's transfer part is DDIM's step with another slope in place of epsilon: a combination of the last four
    outputs by the linear multistep method of Adams and Bashforth. It starts with three Runge-Kutta steps of four
    outputs each, or, with skip_prk_steps, as in Stable Diffusion, with one step of Heun's method and then shorter
    combinations.
    """

    defaults = {"skip_prk_steps": False, "set_alpha_to_one": False}

    def plan(self, count):
        """The Plan of `count` steps: count + 1 outputs of the network, or count + 9 with Runge-Kutta. Raises
        ModelError."""
        if self.config.rescale_betas_zero_snr:
            raise ModelError("scheduler: PNDM cannot sample with zero terminal SNR; use DDIM")
        rows = self._heun_start(count) if self.config.skip_prk_steps else self._runge_kutta_start(count)
        told, start, end, weights, keep, restart = zip(*rows)
        longest = max(map(len, weights))
        a, a_end = self._alphas(np.array(start)), self._next_alphas(np.array(end))
        x0, epsilon = _from_prediction(self.config.prediction_type, a)
        return Plan(
            timestep=np.array(told, np.int32),
            weights=np.array([[*row, *[0] * (longest - len(row))] for row in weights], np.float64),
            keep=np.array(keep),
            restart=np.array(restart),
            x0=x0,
            epsilon=epsilon,
            next=np.stack([np.sqrt(a_end), np.sqrt(1 - a_end), np.zeros_like(a)], axis=1),
            clip=np.full(len(a), np.inf),
        )

    def _heun_start(self, count):
        """(told, start, end, weights, keep, restart) of each step: Heun's method, then growing combinations."""
        times, stride = self.timesteps(count), self.config.num_train_timesteps // count
        rows = [(times[0], times[0], times[0] - stride, (1,), True, False)]
        if count > 1:
            rows.append((times[1], times[1] + stride, times[1], (1 / 2, 1 / 2), False, True))
        return rows + self._multistep(times[1:], stride, len(rows), [0])

    def _runge_kutta_start(self, count):
        """The same with three steps of the Runge-Kutta method of order four in place of Heun's."""
        if count < 4:
            raise ModelError(f"scheduler: PNDM needs at least 4 steps, or skip_prk_steps; {count} are asked for")
        times, stride = self.timesteps(count), self.config.num_train_timesteps // count
        half, rows = stride // 2, []
        for now, later in zip(times[:3], times[1:4]):
            rows.append((now, now, now - half, (1,), True, False))
            rows.append((later + half, now, later + half, (1,), False, True))
            rows.append((later + half, now, later, (1,), False, True))
            rows.append((later, now, later, RUNGE_KUTTA, False, True))
        return rows + self._multistep(times[3:], stride, len(rows), [0, 4, 8])

    @staticmethod
    def _multistep(times, stride, first, used):
        """The rows of plain steps at `times`. first: the number of outputs before; used: those that are combined."""
        rows = []
        for time in times:
            used = [*used, first + len(rows)][-4:]
            age = used[-1] - np.array(used[::-1])  # of the combined outputs, in rows of the plan
            weights = np.zeros(age[-1] + 1)
            weights[age] = ADAMS_BASHFORTH[len(used) - 1]
            rows.append((time, time, time - stride, weights, False, False))
        return rows


SAMPLERS = {cls.__name__: cls for cls in (FlaxDDIMScheduler, FlaxDDPMScheduler, FlaxPNDMScheduler)}


def read_config(folder, subfolder="scheduler"):
    """The dict of scheduler_config.json in a pipeline's folder. Raises ModelError."""
    path = Path(folder) / subfolder / "scheduler_config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"scheduler: {path} cannot be read: {error}") from None


def for_sampling(config):
    """The schedule that samples a model with this scheduler_config.json, a dict.

    A sampler that there is none of here (Euler, DPM-Solver, ...) is replaced by DDIM over the same noise schedule,
    with a warning. Raises ModelError for one whose noise schedule is another kind (flow matching).
    """
    name = "Flax" + config.get("_class_name", "").removeprefix("Flax")
    if name not in SAMPLERS and "beta_schedule" not in config:
        raise ModelError(f"scheduler: {name.removeprefix('Flax')} has no schedule of betas and is not supported")
    scheduler = SAMPLERS.get(name, FlaxDDIMScheduler).from_config(config)
    reason = None
    if name not in SAMPLERS:
        reason = f"there is no {name.removeprefix('Flax')} here" if name != "Flax" else "no sampler is named"
    elif name == "FlaxPNDMScheduler" and scheduler.config.rescale_betas_zero_snr:
        reason = "PNDM cannot begin in pure noise"
    elif name == "FlaxDDPMScheduler" and scheduler.config.variance_type not in POSTERIOR:
        reason = f"DDPM with variance_type = {scheduler.config.variance_type!r} is not supported"
    if reason is None:
        return scheduler
    warnings.warn(f"{reason}: images are drawn with DDIM over the same noise schedule", stacklevel=3)
    return FlaxDDIMScheduler.from_config(config)
