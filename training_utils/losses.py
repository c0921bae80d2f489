"""Weights of the diffusion loss. Plain arithmetic on arrays, so that torch tensors and JAX arrays both do."""


def signal_to_noise(alphas_cumprod):
    """SNR = a / (1 - a) for the cumulative products a of a noise schedule; any shape."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(snr, gamma, prediction_type):
    """Min-SNR weight of a sample's mean squared error (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    The paper weights the error in x0 by min(SNR, gamma). An error in epsilon is SNR times one in x0, and an error in v
    is SNR + 1 times one in x0, hence the divisions. Written so that SNR = 0 (zero terminal SNR) gives a finite weight.

    Args: snr, the samples' signal-to-noise ratio, shape (B,); gamma > 0, 5 is recommended; prediction_type, "epsilon",
    "v_prediction" or "sample". Returns weights, shape (B,). Raises ValueError for another prediction type.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clip(max=1)
    if prediction_type == "v_prediction":
        return snr.clip(max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clip(max=gamma)
    raise ValueError(f"min-SNR is not defined for prediction type {prediction_type!r}")
