"""An adapter for another model, or of another kind, is refused with what is needed to mend it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter import (
    Adapter,
    apply_patch,
    attach,
    decompose,
    export,
    extract_trained,
    rebuild,
    verify_rebuilt,
    write_adapter,
)
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import detect
from recast.lowrank import Full, LowRank

Use = Callable[[Checkpoint, Adapter], object]
USES: dict[str, Use] = {
    "rebuild": lambda checkpoint, adapter: list(rebuild(checkpoint, None, adapter)),
    "patch": lambda checkpoint, adapter: list(apply_patch(checkpoint, adapter)),
    "extract": lambda checkpoint, adapter: extract_trained(checkpoint, None, adapter),
    "verify": lambda checkpoint, adapter: verify_rebuilt(checkpoint, checkpoint, None, adapter),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Checkpoint]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    files = {f: Checkpoint(tiny.checkpoint(folder / f, f)) for f in ("sdxl", "sd15")}
    files["other"] = Checkpoint(tiny.checkpoint(folder / "other", "sdxl", seed=7))
    yield files
    for file in files.values():
        file.close()


def delta(checkpoint: Checkpoint, **metadata: str) -> Adapter:
    entries: dict[str, LowRank | Full] = {
        f"{site.lora}.weight": LowRank(torch.ones(site.shape[0], 1), torch.ones(1, *site.shape[1:]))
        for site in [s for s in detect(checkpoint).sites("principal") if "attn2.to_k" in s.module][
            :7
        ]
    }
    return Adapter(entries, {"recast.role": "delta", **metadata})


@pytest.mark.parametrize("use", USES)
def test_another_architecture_names_five_keys_and_their_count(
    originals: dict[str, Checkpoint], use: str
) -> None:
    with pytest.raises(Refused, match=r"7 of 7 .*first (lora_unet_\S+, ){4}lora_unet_\S+[^,]*[;:]"):
        USES[use](originals["sd15"], delta(originals["sdxl"]))


def test_export_and_attach_name_them_too(originals: dict[str, Checkpoint], tmp_path: Path) -> None:
    adapter, layout = delta(originals["sdxl"]), detect(originals["sd15"])
    write_adapter(tmp_path / "a.safetensors", adapter)
    # ldm's names are read for SD 1.5 too, so the shapes must tell
    with pytest.raises(Refused, match=r"\d of 7 .*other shapes .*, first lora_unet_\S+"):
        export(tmp_path / "a.safetensors", tmp_path / "out", "comfy", layout=layout)
    with pytest.raises(Refused, match=r"7 .*first (lora_unet_\S+, ){4}lora_unet_\S+;"):
        attach({}, adapter, layout.sites("every"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", USES)
def test_another_base_names_both_hashes(originals: dict[str, Checkpoint], use: str) -> None:
    made_for, given = originals["other"], originals["sdxl"]
    adapter = delta(made_for, **{"recast.base_sha256": made_for.sha256()})
    with pytest.raises(Refused) as refusal:
        USES[use](given, adapter)
    for file in (made_for, given):
        assert file.sha256()[:12] in str(refusal.value)
        assert file.sha256() not in str(refusal.value)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("role", ["pissa-init", "pissa-trained"])
def test_a_principal_adapter_where_a_change_is_needed_offers_extract(
    originals: dict[str, Checkpoint], use: str, role: str
) -> None:
    checkpoint = originals["sdxl"]
    start = decompose(checkpoint, detect(checkpoint).sites("principal")[:2], 1)
    adapter = Adapter(start.entries, {**start.metadata, "recast.role": role})
    with pytest.raises(Refused, match=r"recast extract MODEL --initial … --trained …"):
        USES[use](checkpoint, adapter)
