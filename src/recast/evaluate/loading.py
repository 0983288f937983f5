"""How to use a converted file in ComfyUI and diffusers: one row an objective."""

from __future__ import annotations

from dataclasses import dataclass

from recast.evaluate.values import Howto

PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
LEAST = "Nothing else is needed."
TOLD = "Tell the scheduler what the file predicts; the loader does not read it from the file."
MARKED = "The markers in the file ({}) are recognised, also by Forge and reForge."
FLOW_LINES = (
    "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift:g})",
    "pipe.scheduler.init_noise_sigma = 1.0",
    "pipe.scheduler.scale_model_input = lambda sample, timestep=None: sample",
)
# from 1 to 0 evenly, as recast sample goes
FLOW_GRID = "\n    sigmas=[1 - k / 25 for k in range(25)],"


@dataclass(frozen=True)
class _Way:
    """What ComfyUI and diffusers must be told; `{shift}` is filled in."""

    comfy: str
    chain: str
    scheduler: str
    lines: tuple[str, ...]
    diffusers: str = TOLD
    grid: str = ""


def _ddim(**options: str | bool) -> tuple[str, ...]:
    given = "".join(f"    {key}={value!r},\n" for key, value in options.items())
    return (f"pipe.scheduler = DDIMScheduler.from_config(\n    pipe.scheduler.config,\n{given})",)


PLAIN = "Load Checkpoint → KSampler"
WAYS = {
    "eps": _Way(LEAST, PLAIN, "DDIMScheduler", _ddim(prediction_type="epsilon")),
    "x0": _Way(
        "One node tells the sampler what the file predicts:",
        "Load Checkpoint → ModelSamplingDiscrete (x0) → KSampler",
        "DDIMScheduler",
        _ddim(prediction_type="sample"),
    ),
    "v": _Way(
        MARKED.format("v_pred"), PLAIN, "DDIMScheduler", _ddim(prediction_type="v_prediction")
    ),
    "v-zsnr": _Way(
        MARKED.format("v_pred, ztsnr"),
        PLAIN,
        "DDIMScheduler",
        _ddim(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    ),
    "flow": _Way(
        "This family's file format has no marker for flow, so one node tells the sampler:",
        "Load Checkpoint → ModelSamplingSD3 (shift {shift:g}) → KSampler (euler, simple)",
        "FlowMatchEulerDiscreteScheduler",
        FLOW_LINES,
        "This pipeline is older than flow schedulers; three lines about its scheduler make them "
        "meet, and sigmas are the even steps that recast sample takes.",
        FLOW_GRID,
    ),
}


def how_to_load(
    family: str, objective: str, file: str, *, shift: float = 1.0, config: str | None = None
) -> tuple[Howto, ...]:
    """Say how ComfyUI and diffusers run `file`, a checkpoint of `family` that predicts `objective`.

    `config` is the configuration folder of an architecture of unusual size, which diffusers can
    only open beside that, and ComfyUI not at all.
    """
    way, pipeline = WAYS[objective], PIPELINES[family]
    place = f"Put {file} into models/checkpoints and choose it in Load Checkpoint. {way.comfy}"
    if config is not None:
        place = f"ComfyUI loads only the usual sizes, and this file is smaller. Else: {place}"
    beside = "" if config is None else f', config="{config}"'
    code = [
        "import torch",
        f"from diffusers import {pipeline}, {way.scheduler}",
        "",
        f'pipe = {pipeline}.from_single_file("{file}", torch_dtype=torch.float16{beside})',
        *way.lines,
        "image = pipe(",
        f'    "a prompt", num_inference_steps=25, guidance_scale=3.0,{way.grid}',
        ").images[0]",
    ]
    return (
        Howto("ComfyUI", place, way.chain.format(shift=shift)),
        Howto("diffusers", way.diffusers, "\n".join(code).replace("{shift:g}", f"{shift:g}")),
    )
