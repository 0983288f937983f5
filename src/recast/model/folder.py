"""Writing diffusers folders: the configuration beside a single file, or the whole model.

    pipe = StableDiffusionXLPipeline.from_single_file("model.safetensors", config="diffusers")
    pipe = StableDiffusionXLPipeline.from_pretrained("folder")

diffusers guesses the architecture of a single file by its widths and fetches the configuration from
a hub. Neither works for checkpoints of other sizes or without a network; with the configuration
folder, a megabyte without weights, both do.  A whole folder needs nothing else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write
from recast.commit import commit, commit_folder, require_room, standing
from recast.errors import Refused
from recast.layout import Layout, detect, from_file, keymap, open_checkpoint
from recast.layout.folder import FILE_HASH, FOLDER_HASH, OWN_FILE, STEMS, folder_hash, piece_shape
from recast.layout.pipeline import CLASSES, SUBFOLDERS
from recast.layout.scheduler import SCHEDULERS
from recast.markers import MARKERS, SCHEDULER, marker_specs, read_objective, stamp, strip
from recast.model.load import preferred_size, stated_objective
from recast.model.stores import open_any
from recast.text.tokens import LENGTH, merges, vocabulary

Specs = dict[str, tuple[str, tuple[int, ...]]]

FORMATS = ("diffusers-folder", "single-file")
FOLDER = "diffusers"
PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
PADS = ("<|endoftext|>", "!")  # SDXL's second tokenizer pads with token 0


def write_folder(checkpoint: Checkpoint, out: Path, *, objective: str | None = None) -> str:
    """Write a checkpoint as a diffusers folder that appears whole or not at all; returns its hash.

    The numbers stay as they are. objective None takes what the file states. Raises Refused for what
    is no whole model, and for a folder that exists.
    """
    layout = detect(checkpoint)
    refuse_residual(checkpoint)
    chosen = stated_objective(checkpoint, objective)
    require_room(standing(out), checkpoint.nbytes)
    found: list[str] = []

    def fill(folder: Path) -> None:
        size = preferred_size(checkpoint, layout)
        write_config_folder(layout, folder, objective=chosen, size=size)
        hashes = [write_part(checkpoint, layout, part, folder) for part in parts(layout)]
        found.append(folder_hash(hashes))
        write_rest(checkpoint, chosen, folder / OWN_FILE, found[0])
        with open_checkpoint(folder) as written:
            detect(written)

    commit_folder(out, fill)
    return found[0]


def write_file(
    checkpoint: Checkpoint, out: Path, *, objective: str | None = None, force: bool = False
) -> str:
    """Write a checkpoint as a single file and return its sha256; the way back from a folder."""
    detect(checkpoint)
    refuse_residual(checkpoint)
    specs, metadata = marked(checkpoint, stated_objective(checkpoint, objective))
    tensors = taken(checkpoint, specs)
    return write(out, specs, tensors, metadata, force=force, sources=checkpoint.files)


def export(
    path: Path,
    out: Path,
    to: str,
    *,
    objective: str | None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write the model at `path`, a .ckpt too, as a diffusers folder or single file, as `to` says.

    dtype: what the networks' numbers become; None keeps them.
    """
    with open_any(path, dtype) as checkpoint:
        if to == "diffusers-folder":
            write_folder(checkpoint, out, objective=objective)
        else:
            write_file(checkpoint, out, objective=objective, force=force)


def write_beside(file: Path, out: Path, *, force: bool = False) -> None:
    """Write a file's folder unless it is there already; force replaces one of other weights."""
    with open_checkpoint(file) as checkpoint:
        if (out / OWN_FILE).exists():
            with open_checkpoint(out) as found:
                if found.sha256() == checkpoint.sha256():
                    return
            if force:
                shutil.rmtree(out)
        write_folder(checkpoint, out)


def through_file(write: Callable[[Path], str], out: Path) -> str:
    """Let `write` make a single file, and leave it as the folder `out`; returns the file's hash."""
    refuse_existing(out)
    with tempfile.TemporaryDirectory(dir=standing(out), prefix=".recast-") as scratch:
        digest = write(Path(scratch) / "model.safetensors")
        with open_checkpoint(Path(scratch) / "model.safetensors") as checkpoint:
            write_folder(checkpoint, out)
    return digest


def refuse_existing(out: Path) -> None:
    """Refuse a folder that exists, before any work is done: none is replaced as a whole."""
    if out.exists():
        raise Refused(f"{out} exists: name another folder, or remove it first.")


def parts(layout: Layout) -> list[str]:
    """The parts of a whole model."""
    return ["unet", "vae", *layout.text_parts]


def write_part(checkpoint: Checkpoint, layout: Layout, part: str, folder: Path) -> tuple[str, str]:
    """Write one component's weights; returns its name in the folder, and its sha256."""
    entries = [entry for entry in keymap(layout) if entry.part == part]
    level = "text_model." if part == "te1" else ""  # as in every folder of the hub
    specs: Specs = {}
    for entry in entries:
        spec = checkpoint.specs[entry.key]
        specs[level + entry.param] = (spec.dtype, piece_shape(entry, spec.shape))
    tensors = from_file(tuple(entries), checkpoint, part)
    name = f"{SUBFOLDERS[part]}/{STEMS.get(part, 'model')}.safetensors"
    named = ((level + param, tensor) for param, tensor in tensors)
    return name, write(folder / name, specs, named, {"format": "pt"})


def write_rest(checkpoint: Checkpoint, objective: str, path: Path, digest: str) -> None:
    """Write what a folder has no place for: markers, tensors no network reads, the header."""
    specs, metadata = marked(checkpoint, objective)
    known = {entry.key for entry in keymap(detect(checkpoint))}
    rest = {key: spec for key, spec in specs.items() if key not in known}
    metadata |= {FOLDER_HASH: digest, FILE_HASH: checkpoint.sha256()}
    write(path, rest, taken(checkpoint, rest), metadata)


def marked(checkpoint: Checkpoint, objective: str) -> tuple[Specs, dict[str, str]]:
    """The tensors and header of a file that states an objective; as they are, if they do."""
    specs = {key: (spec.dtype, spec.shape) for key, spec in checkpoint.specs.items()}
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != SCHEDULER}
    said = read_objective(specs, metadata)
    if said.objective == objective and not said.contradictions:
        return specs, metadata
    kept = {key: specs[key] for key in strip(specs)}
    return {**marker_specs(objective), **kept}, stamp(
        metadata, objective, family=detect(checkpoint).family
    )


def taken(checkpoint: Checkpoint, specs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that specs name; markers are empty."""
    for key in specs:
        fresh = key in MARKERS and key not in checkpoint
        yield key, torch.zeros(0) if fresh else checkpoint[key]


def refuse_residual(checkpoint: Checkpoint) -> None:
    """Refuse a residual, which is no model."""
    if checkpoint.metadata.get("recast.role") == "residual":
        raise Refused(f"{checkpoint.path} is a residual, not a model: give the original.")


def write_config_folder(
    layout: Layout, path: Path, *, objective: str = "eps", size: int | None = None
) -> None:
    """Write model_index.json and the configuration of every part below `path`.

    size: side of the pictures that the pipeline shall make, the family's otherwise. Raises Refused
    for a checkpoint without VAE or text encoders: a pipeline has all of them.
    """
    if layout.vae is None or layout.missing:
        raise Refused("a diffusers pipeline needs a VAE and text encoders, and the file lacks one.")
    scheduler, unet, vae = SCHEDULERS[objective], layout.unet, layout.vae
    if size is not None:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        unet, vae = {**unet, "sample_size": size // factor}, {**vae, "sample_size": size}
    files: dict[str, Any] = {
        "model_index.json": index(layout, scheduler["_class_name"]),
        "unet/config.json": {"_class_name": CLASSES["unet"], **unet},
        "vae/config.json": {"_class_name": CLASSES["vae"], **vae},
        "scheduler/scheduler_config.json": scheduler,
    }
    pairs = merges()
    words = vocabulary(pairs)
    lines = "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs), ""])
    for number, (part, config) in enumerate(zip(layout.text_parts, layout.texts, strict=True)):
        tail = "" if number == 0 else f"_{number + 1}"
        text = {"architectures": [CLASSES[part]], "model_type": "clip_text_model", **config}
        files[f"text_encoder{tail}/config.json"] = text
        files[f"tokenizer{tail}/vocab.json"] = words
        files[f"tokenizer{tail}/merges.txt"] = lines
        files[f"tokenizer{tail}/tokenizer_config.json"] = tokenizer(PADS[number])
    for name, content in files.items():
        write_text(path / name, content)


def index(layout: Layout, scheduler: str) -> dict[str, Any]:
    """Which class reads which subfolder."""
    found: dict[str, Any] = {
        "_class_name": PIPELINES[layout.family],
        "unet": ["diffusers", CLASSES["unet"]],
        "vae": ["diffusers", CLASSES["vae"]],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", CLASSES["te1"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if len(layout.texts) > 1:
        found["text_encoder_2"] = ["transformers", CLASSES["te2"]]
        found["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        return {**found, "force_zeros_for_empty_prompt": False}
    return {
        **found,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def tokenizer(pad: str) -> dict[str, Any]:
    """CLIP's tokenizer, padding with `pad`."""
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": pad,
        "do_lower_case": True,
    }


def write_text(path: Path, content: Any) -> None:
    """Write text as it is and everything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2)
    data = text.encode()
    commit(path, lambda file: file.write(data), size=len(data), force=True)
