"""What is trained at which rate: the recipe's rates by layer, and layers that join late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recast.adapter import entry_name
from recast.convert.networks import text_end, trains_text
from recast.errors import Refused
from recast.layout import Layout
from recast.layout.names import part_of
from recast.optim import ONE_RATE
from recast.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from recast.adapter import Attached


def check(layout: Layout, recipe: Recipe) -> None:
    """Refuse rates of layers that are not trained, and those that an optimizer cannot keep."""
    how = recipe.train
    trained = {entry_name(site) for site in layout.sites(how.places)}
    for names in how.rates:
        if trained.isdisjoint(entry_name(site) for site in layout.sites(names)):
            raise Refused(f"train.rates names {names!r}, which {how.places!r} does not train.")
    if (how.rates or how.widen) and how.optimizer in ONE_RATE:
        raise Refused(
            f"train.optimizer {how.optimizer} finds one rate for all layers: take adamw, or "
            "leave train.rates and train.widen out."
        )


def groups(
    attached: Attached, layout: Layout, recipe: Recipe
) -> tuple[dict[str, nn.Parameter], list[Any]]:
    """(masters by name, what to build the optimizer of), both in the optimizer's order.

    Of several rates for one layer the last holds. Late layers wait behind the key "since", text
    encoders stay from the key "until" on; where there are any, "name" is a group's part.
    """
    how, named = recipe.train, attached.named()
    texts = trains_text(layout, recipe)
    if not how.rates and not how.widen and not texts:
        return named, list(named.values())
    first = {entry_name(site) for site in layout.sites(how.profile)}
    factors = {
        entry_name(site): factor
        for names, factor in how.rates.items()
        for site in layout.sites(names)
    }
    entry_of = {id(p): spot.name for spot in attached.spots for p in spot.layer.parameters()}
    kinds: dict[tuple[bool, str, float], dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        entry = entry_of[id(parameter)]
        late = entry not in first
        factor = factors.get(entry, 1.0) * (how.widen_rate if late else 1.0)
        part = part_of(entry) if texts else ""
        kinds.setdefault((late, part, factor), {})[name] = parameter
    ordered = sorted(kinds.items(), key=lambda kind: kind[0][0])
    made = [
        {"params": list(each.values()), "lr": how.lr * factor, **span(recipe, late, part)}
        for (late, part, factor), each in ordered
    ]
    return {name: p for _, each in ordered for name, p in each.items()}, made


def span(recipe: Recipe, late: bool, part: str) -> dict[str, int | str]:
    """From which step on, and up to which, a group is trained, and what it is called."""
    found: dict[str, int | str] = {"name": part} if part else {}
    if late:
        found["since"] = round(recipe.train.widen_at * recipe.train.limit)
    if part not in ("", "unet") and text_end(recipe) < recipe.train.limit:
        found["until"] = text_end(recipe)
    return found
