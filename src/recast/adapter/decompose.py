"""The initial adapter of a training run: principal factors, or zeros of full size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from recast.adapter.file import Adapter
from recast.adapter.places import entry_name, read_site, refuse_residual, widened
from recast.adapter.ranks import Ranks, ranks
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Site, detect
from recast.lowrank import Full, LowRank, factorize, squared_norm
from recast.markers import read_objective

MATRICES = ("linear", "conv")


def decompose(
    checkpoint: Checkpoint,
    sites: Iterable[Site],
    rank: int | Sequence[str] | Ranks,
    *,
    method: str = "exact",
) -> Adapter:
    """Principal rank-r factors of every site's weight (role `pissa-init`), in fp32.

    rank: a number, or rules as `ranks` has them. The metadata states the share of squared norm that
    the factors hold over all sites.
    """
    refuse_residual(checkpoint)
    rules, chosen = ranks(rank), matrices(sites)
    rules.check(chosen)
    entries: dict[str, LowRank | Full] = {}
    held = whole = 0.0
    for site in chosen:
        weight = widened(read_site(checkpoint, site))
        factors = factorize(weight, rules.wanted(site), method=method, name=site.key)
        entries[entry_name(site)] = factors
        # The product is a projection of the weight, so its own norm is the energy it holds.
        held += squared_norm(factors)
        whole += weight.double().square().sum().item()
    share = held / whole if whole else 1.0
    about = initial_metadata(checkpoint, "pissa-init", rules, method)
    return Adapter(entries, {**about, "recast.energy": f"{share:.6f}"})


def zeros_full(checkpoint: Checkpoint, sites: Iterable[Site]) -> Adapter:
    """A zero change of every entry of every site's parameter (role `full`), in fp32."""
    refuse_residual(checkpoint)
    entries: dict[str, LowRank | Full] = {
        entry_name(site): Full(torch.zeros(site.shape)) for site in sites
    }
    if not entries:
        raise Refused("no part of the model was chosen for training; name a profile or blocks.")
    return Adapter(entries, initial_metadata(checkpoint, "full", None, None))


def initial_metadata(
    checkpoint: Checkpoint, role: str, rules: Ranks | None, method: str | None
) -> dict[str, str]:
    """What every adapter made from a checkpoint says about its making."""
    evidence = read_objective(checkpoint.specs, checkpoint.metadata)
    about: Mapping[str, str | None] = {
        "recast.role": role,
        "recast.base_sha256": checkpoint.sha256(),
        "recast.family": detect(checkpoint).family,
        "recast.objective": evidence.objective,
        "recast.rank": rules.text if rules and rules.fixed else None,
        "recast.rank_rule": None if rules is None else "fixed" if rules.fixed else rules.text,
        "recast.method": method,
    }
    return {key: value for key, value in about.items() if value is not None}


def is_matrix(site: Site) -> bool:
    """Whether a parameter is the weight of a linear or convolution layer."""
    return site.kind in MATRICES and site.param == "weight"


def matrices(sites: Iterable[Site]) -> list[Site]:
    """The sites as a list, refused where one has no low-rank factors or there is none."""
    listed = list(sites)
    odd = [site.lora for site in listed if not is_matrix(site)]
    if odd or not listed:
        raise Refused(
            f"{len(odd)} of {len(listed)} chosen sites are norms or biases, first "
            f"{', '.join(odd[:5]) or 'none at all'}; choose a profile of linear and "
            "convolution layers, such as principal."
        )
    return listed
