"""A checkpoint as networks: the UNet, the text encoders and the VAE."""

from recast.model.load import (
    SIZE_KEY,
    build,
    load_part,
    open_model,
    stated_objective,
    usual_dtype,
)
from recast.model.networks import Model
from recast.model.parts import Parts, beside
from recast.text.encode import Condition, cat

__all__ = [
    "SIZE_KEY",
    "Condition",
    "Model",
    "Parts",
    "beside",
    "build",
    "cat",
    "load_part",
    "open_model",
    "stated_objective",
    "usual_dtype",
]
