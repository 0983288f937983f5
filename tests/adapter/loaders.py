"""Other people's loaders: a network with an adapter file in it, and what it answers."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recast.adapter import Adapter
from recast.checkpoint import Checkpoint
from recast.layout import Layout, Site
from recast.layout.loras import NETWORKS
from recast.lowrank import Full, LowRank
from recast.model import open_model


def change(checkpoint: Checkpoint, sites: Iterable[Site], rank: int = 4) -> Adapter:
    """Random factors whose product is 30 % of each weight, in norm."""
    entries: dict[str, LowRank | Full] = {}
    for seed, site in enumerate(sites):
        made = torch.Generator().manual_seed(seed)
        up = torch.randn(site.shape[0], rank, generator=made)
        down = torch.randn(rank, *site.shape[1:], generator=made)
        factors = LowRank(up, down)
        weight = checkpoint[site.key].float()
        share = 1 / 3 if site.rows else 1  # of a stack of q, k, v
        size = (0.3 * (share**0.5) * weight.norm() / factors.dense().norm()) ** 0.5
        entries[f"{site.lora}.weight"] = LowRank(up * size, down * size)
    return Adapter(entries, {"recast.role": "delta"})


def network(checkpoint: Checkpoint, part: str) -> nn.Module:
    """One part of a checkpoint in fp32."""
    return open_model(checkpoint, parts=(part,)).part(part).eval()


def answer(net: nn.Module, layout: Layout, part: str) -> Tensor:
    """What a network answers to a fixed question."""
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if part != "unet":
            said = net(torch.arange(1, 9)[None])
            pooled = said.text_embeds if part == "te2" else said.pooler_output
            return torch.cat([said.last_hidden_state.flatten(), pooled.flatten()])
        more = {}
        if layout.plan.te2 is not None:
            vector = torch.randn(1, layout.plan.te2.projection, generator=made)
            more = {"added_cond_kwargs": {"text_embeds": vector, "time_ids": torch.ones(1, 6)}}
        context = torch.randn(1, 7, layout.unet["cross_attention_dim"], generator=made)
        x = torch.randn(1, 4, 8, 8, generator=made)
        return net(x, torch.tensor(400.5), context, **more).sample.flatten()


def by_lycoris(net: nn.Module, file: Path, part: str, sites: Iterable[Site]) -> int:
    """Let LyCORIS make its module of every layer; returns the layers, all keys used."""
    from lycoris.modules import get_module, make_module

    tensors = load_file(file)
    mine = [site for site in sites if site.part == part]
    heads = {f"{site.lora}." for site in mine}
    for site in mine:
        kind, parts = get_module(tensors, site.lora)
        module = make_module(kind, parts, site.lora, net.get_submodule(site.module))
        module.apply_to()
    keys = {key for key in tensors if key.startswith(tuple(heads))}
    used = {f"{head}{suffix}" for head in heads for suffix in
            ("lora_up.weight", "lora_down.weight", "alpha")}  # fmt: skip
    assert keys == used
    return len(mine)


def by_peft(net: nn.Module, folder: Path, part: str) -> tuple[nn.Module, int]:
    """Let PEFT load the part's folder; returns the network and how many layers it wrapped."""
    from peft import PeftConfig, PeftModel

    inside = str(folder / NETWORKS[part])
    model = PeftModel(net, PeftConfig.from_pretrained(inside))
    result = model.load_adapter(inside, adapter_name="default")
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "lora" in key]
    return model.base_model.model.eval(), wrapped(model)


def by_diffusers(net: nn.Module, file: Path, part: str, family: str) -> int:
    """Let diffusers load its own or kohya's file; returns how many layers it wrapped."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    loader = StableDiffusionLoraLoaderMixin
    if family == "sdxl":
        loader = StableDiffusionXLLoraLoaderMixin
    config = {"unet_config": net.config} if part == "unet" else {}
    state, alphas, metadata = loader.lora_state_dict(
        str(file.parent), weight_name=file.name, return_lora_metadata=True, **config
    )
    prefix = NETWORKS[part]
    count = sum(key.startswith(f"{prefix}.") for key in state)
    if part == "unet":
        net.load_lora_adapter(state, network_alphas=alphas, prefix=prefix, metadata=metadata)
    else:
        loader.load_lora_into_text_encoder(
            state, alphas, net, prefix=prefix, adapter_name="ours", metadata=metadata
        )
    assert count == 2 * wrapped(net)
    return wrapped(net)


def wrapped(net: nn.Module) -> int:
    """Layers that PEFT has put its own around."""
    return sum(hasattr(module, "lora_A") for module in net.modules())
