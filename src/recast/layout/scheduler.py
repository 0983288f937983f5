"""What a diffusers scheduler's configuration says about an objective, in both directions.

reads   prediction_type, rescale_betas_zero_snr, use_flow_sigmas, the class FlowMatch…
writes  eps, x0, v   EulerDiscrete, even over the trained times
        v-zsnr       DDIM, which can begin at pure noise: rescaled betas, trailing steps
        flow         UniPC of order 1 without its corrector, which is Euler, on flow sigmas:
                     unlike FlowMatchEuler it runs in Stable Diffusion's pipelines as they are.
                     It tells the network whole thousandths of t, rounded down
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]

BETAS: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
# (prediction_type, rescale_betas_zero_snr): objective
MEANINGS = {
    ("epsilon", False): "eps",
    ("sample", False): "x0",
    ("v_prediction", False): "v",
    ("v_prediction", True): "v-zsnr",
}
EULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    **BETAS,
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}
SCHEDULERS: dict[str, Config] = {
    "eps": {**EULER, "prediction_type": "epsilon"},
    "x0": {**EULER, "prediction_type": "sample"},
    "v": {**EULER, "prediction_type": "v_prediction"},
    "v-zsnr": {
        "_class_name": "DDIMScheduler",
        **BETAS,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
    },
    "flow": {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "solver_order": 1,
        "disable_corrector": list(range(100)),  # steps
        "steps_offset": 1,
    },
}


def stated_by(config: Mapping[str, Any]) -> str:
    """The objective that a scheduler's configuration states, or words for one of another kind."""
    name = str(config.get("_class_name", ""))[:60]
    word = str(config.get("prediction_type", "epsilon"))[:40]
    if name.startswith("FlowMatch"):
        return "flow"
    flows = bool(config.get("use_flow_sigmas", False)), word == "flow_prediction"
    if all(flows):
        return "flow"
    if any(flows) or name.startswith("EDM"):
        return f"{word} of {name}"
    odd = [key for key, value in BETAS.items() if config.get(key, value) != value]
    if config.get("trained_betas") is not None or odd:
        return f"{word} with {', '.join(odd) or 'trained_betas'} of its own"
    rescaled = bool(config.get("rescale_betas_zero_snr", False))
    return MEANINGS.get((word, rescaled), f"{word}{' with rescaled betas' * rescaled}")
