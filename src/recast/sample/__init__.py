"""Sampling: solvers over one denoiser signature, guidance, prompts, text to images."""

from recast.sample.guidance import Denoiser, Met, guided, in_turn, plain
from recast.sample.images import (
    Picture,
    Step,
    sample_images,
    sample_latents,
    sample_prompts,
)
from recast.sample.prompts import Prompt, parse_prompt, parse_prompts, read_prompts
from recast.sample.solvers import SOLVERS, Solver

__all__ = [
    "SOLVERS",
    "Denoiser",
    "Met",
    "Picture",
    "Prompt",
    "Solver",
    "Step",
    "guided",
    "in_turn",
    "parse_prompt",
    "parse_prompts",
    "plain",
    "read_prompts",
    "sample_images",
    "sample_latents",
    "sample_prompts",
]
