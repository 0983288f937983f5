"""What a run puts into which layers: the recipe's section [network], and the file a LoRA becomes.

principal   the principal factors of every layer, of rank train.rank
lora        factors from zero, scaled by alpha / dim
full        every number of a layer, norms and biases too
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recast import processes
from recast.adapter import Adapter, Attached, attach
from recast.adapter.decompose import is_matrix, matrices
from recast.adapter.layers import Dropouts
from recast.adapter.lora import Dims, from_zero, write_lora
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Layout, Site
from recast.recipe import Recipe

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.convert.start import Start
    from recast.model import Model
    from recast.train import Draw

LORA = "lora.safetensors"
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def kind_of(recipe: Recipe) -> str:
    """principal, lora or full."""
    kind = recipe.network.kind
    if kind == "auto":
        return "principal" if recipe.train.rank else "full"
    return kind


def dims_of(recipe: Recipe) -> Dims:
    """Ranks and alphas of a LoRA."""
    how = recipe.network
    return Dims(how.dim, how.alpha, how.conv_dim, how.conv_alpha)


def dropouts_of(recipe: Recipe) -> Dropouts:
    """The dropouts of what is learned."""
    how = recipe.network
    return Dropouts(how.dropout, how.rank_dropout, how.module_dropout)


def sites_of(layout: Layout, recipe: Recipe) -> list[Site]:
    """The parameters that are trained sooner or later, without those that nothing reads.

    Of the blocks that a LoRA is given it takes the matrices, which alone have factors.
    """
    sites = [site for site in layout.sites(recipe.train.places) if not unread(layout, site)]
    if kind_of(recipe) != "lora":
        return sites
    dims = dims_of(recipe)
    return [site for site in sites if is_matrix(site) and dims.rank(site)]


def unread(layout: Layout, site: Site) -> bool:
    """Whether a parameter has no part in any picture: SDXL reads its first text encoder early.

    That is before the last layer; of the second one the pooled output comes from there.
    """
    te1 = layout.plan.te1
    if layout.family != "sdxl" or site.part != "te1" or te1 is None:
        return False
    return site.block in (f"TE1.L{te1.layers - 1:02}", "TE1.NORM")


def parts_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """The parts of the model that the sites lie in, the UNet first."""
    return tuple(sorted({site.part for site in sites}, key=("unet", "te1", "te2").index))


def trains_text(layout: Layout, recipe: Recipe) -> bool:
    """Whether text encoders are trained."""
    return any(site.part != "unet" for site in sites_of(layout, recipe))


def text_parts(layout: Layout, recipe: Recipe) -> tuple[str, ...]:
    """The text encoders that training needs: all, where one of them is trained."""
    return layout.text_parts if trains_text(layout, recipe) else ()


def text_end(recipe: Recipe) -> int:
    """The number of steps after which text encoders stay as they are."""
    how, limit = recipe.network, recipe.train.limit
    return min(how.text_stop or limit, max(1, round(how.text_share * limit)))


def check(layout: Layout, recipe: Recipe) -> None:
    """Refuse a network that cannot be put into the layers that the recipe names."""
    kind, sites = kind_of(recipe), sites_of(layout, recipe)
    if not sites:
        raise Refused(
            f"train.profile {recipe.train.places!r} names no layer that is read, of those that "
            f"a network of kind {kind} can have: name others."
        )
    if kind == "principal" and not recipe.train.rank:
        raise Refused("network.kind is principal and train.rank is 0: give a rank, or kind full.")
    if kind != "full":
        matrices(sites)
    elif dropouts_of(recipe):
        raise Refused(
            "network.dropout and its kin act on low-rank changes, and layers are trained whole "
            "here: set them to 0, or network.kind to lora or principal."
        )


def trained_numbers(layout: Layout, recipe: Recipe) -> int:
    """How many numbers are trained."""
    kind, dims, count = kind_of(recipe), dims_of(recipe), 0
    for site in sites_of(layout, recipe):
        rows = site.shape[0]
        wide = 1
        for side in site.shape[1:]:
            wide *= side
        rank = {"principal": recipe.train.rank, "lora": dims.rank(site), "full": 0}[kind]
        count += rank * (rows + wide) if rank else rows * wide
    return count


def lora(checkpoint: Checkpoint, sites: Iterable[Site], recipe: Recipe) -> Adapter:
    """The recipe's LoRA before training: a pure function of its seed."""
    from recast.train import seeded

    seed = recipe.train.seed
    return from_zero(checkpoint, sites, dims_of(recipe), lambda name: seeded(seed, "lora", name))


def scales_of(sites: Iterable[Site], adapter: Adapter, recipe: Recipe) -> dict[str, float]:
    """alpha / dim of every low-rank entry of a LoRA, nothing for other networks."""
    from recast.adapter import entry_name
    from recast.lowrank import LowRank

    if kind_of(recipe) != "lora":
        return {}
    dims, found = dims_of(recipe), {}
    for site in sites:
        entry = adapter.entries.get(entry_name(site))
        if isinstance(entry, LowRank):
            found[entry_name(site)] = dims.scale(site, entry.rank)
    return found


def put_in(model: Model, start: Start, recipe: Recipe) -> Attached:
    """Attach a start to the parts of the model that it is for."""
    parts = ("unet", *parts_of(start.sites))
    attached = attach(
        {part: model.part(part) for part in parts}, start.adapter, start.sites,
        initial=start.initial, dropouts=dropouts_of(recipe),
        scales=scales_of(start.sites, start.adapter, recipe),
    )  # fmt: skip
    attached.hold(start.held)
    return attached


def shaken(draws: Iterable[Draw], recipe: Recipe, done: int) -> Iterator[Draw]:
    """Pass draws on; where the recipe has dropouts, those of a draw depend on its number alone."""
    from recast.train import seeded

    how, drops = recipe.train, dropouts_of(recipe)
    start = done * how.accumulate + processes.rank()
    for index, draw in enumerate(draws):
        number = start + index * processes.count()
        seed = seeded(how.seed, "dropout", number).initial_seed() if drops else None
        yield draw if seed is None else replace(draw, shake=seed)


def write_lora_file(
    path: Path, stamp: Mapping[str, str], checkpoint: Checkpoint, job: Job, trained: Adapter
) -> None:
    """Write a LoRA as it is after some steps, with what kohya's trainer and Recast tell of it."""
    from recast.convert import in_header
    from recast.recipe import dump_toml

    recipe = job.recipe
    about = {**stamp, "recast.recipe": dump_toml(in_header(recipe))}
    write_lora(
        path, trained, dims_of(recipe), dtype=DTYPES[recipe.network.save],
        dropouts=dropouts_of(recipe), metadata={**about, **training_fields(checkpoint, job)},
        force=True,
    )  # fmt: skip


def training_fields(checkpoint: Checkpoint, job: Job) -> Mapping[str, str]:
    """The `ss_*` fields in which kohya's trainer tells of a training, and its title."""
    how, recipe = job.recipe.train, job.recipe
    precision = {"auto": "bf16", "fp32": "no"}.get(how.precision, how.precision)
    if how.precision == "auto" and job.device == "cpu":
        precision = "no"
    facts: dict[str, object] = {
        "ss_sd_model_name": checkpoint.path.name,
        "ss_new_sd_model_hash": checkpoint.sha256(),
        "ss_output_name": job.out.name,
        "modelspec.title": job.out.name,
        "ss_v2": False,
        "ss_learning_rate": how.lr,
        "ss_unet_lr": how.lr,
        "ss_text_encoder_lr": how.lr * how.rates.get("te", how.rates.get("te1", 1.0)),
        "ss_optimizer": how.optimizer,
        "ss_lr_scheduler": how.schedule,
        "ss_lr_warmup_steps": how.warmup,
        "ss_max_train_steps": how.limit,
        "ss_batch_size_per_device": how.batch,
        "ss_gradient_accumulation_steps": how.accumulate,
        "ss_max_grad_norm": how.clip,
        "ss_mixed_precision": precision,
        "ss_seed": how.seed,
        "ss_loss_type": how.distance,
        "ss_caption_dropout_rate": recipe.data.caption_dropout,
        "ss_noise_offset": recipe.noise.offset or None,
        "ss_multires_noise_iterations": recipe.noise.multires or None,
        "ss_multires_noise_discount": recipe.noise.multires_discount,
        "ss_training_comment": recipe.about,
    }
    return {key: str(value) for key, value in facts.items()}
