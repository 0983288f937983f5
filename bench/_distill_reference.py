"""What the rows of bench/distill are seen beside: the teacher's own figures, and the setting."""

from __future__ import annotations

from typing import Any

import _distill_run as run
import torch
from _distill_measure import held, measure
from _distill_world import RUNS, teacher, visible
from torch import Tensor

from recast.checkpoint import Checkpoint
from recast.objective import EPS, V

Row = dict[str, Any]
SHOWN = ("pictures", "teacher", "A0", "A1-1", "A2-1", "A3-1", "A8-1", "N1-1")


def about(committed: Row) -> Row:
    """The setting and the teacher's figures: those `committed`, if they are of this teacher."""
    unet, found = teacher()
    how = {"steps": run.STEPS, "batch": run.BATCH, "rate": run.RATE, "decay": run.DECAY}
    if committed.get("sha256") == found:
        return committed | {"how": how}
    from _distill_assessor import assessor_of, facts_of

    assessor_of(unet, found)
    it = held(unet)
    return {
        "torch": torch.__version__, "threads": 1, "device": "cpu", "sha256": found,
        "parameters": sum(p.numel() for p in unet.parameters()), "held": len(it.t),
        "teacher": measure(it, unet, 0, EPS), "untrained": it.error(unet, V),
        "assessor": facts_of(found), "refused": refused(), "how": how,
    }  # fmt: skip


def refused() -> str:
    """What the product says of N1's batches."""
    from recast.distill.losses import check_forward
    from recast.errors import Refused

    source = torch.Generator().manual_seed(0)
    x0, eps, x = (torch.randn(16, 3, 8, 8, generator=source) for _ in range(3))
    try:
        check_forward(x, x0, eps, torch.rand(16, generator=source), path=V.path)
    except Refused as error:
        return f'"{error}"'
    raise AssertionError("noise in place of noisy latents was not refused")


def kept_samples() -> dict[str, Tensor]:
    """Pictures (10, 3, 8, 8) of the held-out scenes, the teacher's and seed 0's students'."""
    from _distill_measure import samples

    folder = RUNS / "samples"
    if not folder.exists():
        return {}
    unet, _ = teacher()
    it = held(unet)
    found = {"pictures": it.data.x0[:10], "teacher": samples(it, unet, 0, EPS)[:10]}
    for name in SHOWN[2:]:
        if (file := folder / f"{name}.safetensors").exists():
            with Checkpoint(file) as stored:
                found[name] = stored["x0"]
    return {name: visible(x0) for name, x0 in found.items()}
