"""Recast changes what a Stable Diffusion checkpoint predicts, without losing what it knows."""

__version__ = "0.1.0"
