"""The architecture of a checkpoint: read off its tensors, never from a hub."""

from recast.layout.blueprint import (
    SD15,
    SDXL,
    Plan,
    TextPlan,
    UNetPlan,
    VAEPlan,
    blueprint,
)
from recast.layout.detect import detect
from recast.layout.folder import open_checkpoint
from recast.layout.keymap import Entry, from_file, keymap, to_file
from recast.layout.layout import Layout
from recast.layout.sites import Site

__all__ = [
    "SD15",
    "SDXL",
    "Entry",
    "Layout",
    "Plan",
    "Site",
    "TextPlan",
    "UNetPlan",
    "VAEPlan",
    "blueprint",
    "detect",
    "from_file",
    "keymap",
    "open_checkpoint",
    "to_file",
]
