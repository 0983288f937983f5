"""Rebuilding from the original: identity where nothing was trained, one rounding where it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import tiny
from torch import Tensor

from recast.adapter import (
    Adapter,
    apply_patch,
    attach,
    decompose,
    patch_from,
    read_adapter,
    rebuild,
    verify_rebuilt,
    write_adapter,
    write_rebuilt,
    zeros_full,
)
from recast.checkpoint import Checkpoint
from recast.errors import CheckFailed, Refused
from recast.layout import Site, detect, from_file, keymap
from recast.lowrank import Full, LowRank

FAMILIES = ["sdxl", "sd15"]


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    path = tiny.checkpoint(folder / "o.safetensors", request.param, dtype="F16")
    with Checkpoint(path) as checkpoint:
        yield checkpoint


def chosen(checkpoint: Checkpoint, profile: str) -> list[Site]:
    return detect(checkpoint).sites(profile)


def stirred(adapter: Adapter, size: float = 0.02) -> Adapter:
    """An adapter as training leaves it: every number moved."""
    made = torch.Generator().manual_seed(5)

    def moved(tensor: Tensor) -> Tensor:
        return tensor + size * torch.randn(tensor.shape, generator=made)

    entries = {
        name: LowRank(moved(e.up), moved(e.down))
        if isinstance(e, LowRank)
        else Full(moved(e.delta))
        for name, e in adapter.entries.items()
    }
    roles = {"pissa-init": "pissa-trained"}
    role = roles.get(adapter.role, adapter.role)
    return Adapter(entries, {**adapter.metadata, "recast.role": role})


def profile(checkpoint: Checkpoint) -> str:
    """Every matrix and convolution of the UNet and of the text encoders that the file has."""
    return "all,te1,te2" if "te2" in detect(checkpoint).text_parts else "all,te1"


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_untrained_low_rank_gives_every_byte_back(original: Checkpoint) -> None:
    start = decompose(original, chosen(original, profile(original)), 4)
    seen = []
    for key, tensor in rebuild(original, start, start):
        assert as_bytes(tensor) == original.raw(key), key
        seen.append(key)
    assert seen == list(original.specs)


def test_untrained_full_gives_every_byte_back(original: Checkpoint) -> None:
    start = zeros_full(original, chosen(original, "every"))
    assert len(start.entries) == len(chosen(original, "every"))
    for initial in (None, start):
        for key, tensor in rebuild(original, initial, start):
            assert as_bytes(tensor) == original.raw(key), key


@pytest.mark.parametrize("kind", ["low", "full"])
def test_each_module_gets_weight_plus_change_rounded_once(original: Checkpoint, kind: str) -> None:
    if kind == "low":
        sites = chosen(original, profile(original))
        start = decompose(original, sites, 4)
    else:
        sites = chosen(original, "every")
        start = zeros_full(original, sites)
    trained = stirred(start)
    entries = keymap(detect(original))
    rebuilt = dict(rebuild(original, start, trained))
    touched = {(site.part, site.name): f"{site.lora}.{site.param}" for site in sites}
    for part in ("unet", "te1", "te2"):
        after = dict(from_file(entries, rebuilt, part))
        for name, before in from_file(entries, original, part):
            if (part, name) not in touched:
                assert torch.equal(after[name], before)
                continue
            key = touched[part, name]
            delta = trained.entries[key].to(torch.float64).dense()
            delta = delta - start.entries[key].to(torch.float64).dense()
            torch.testing.assert_close(
                after[name].double(), before.double() + delta, atol=1e-5, rtol=6e-4
            )
            assert not torch.equal(after[name], before)
    outside = {key for key in original.specs if key.startswith("first_stage_model.")}
    assert all(as_bytes(rebuilt[key]) == original.raw(key) for key in outside)


def test_what_training_moved_is_what_the_file_holds(original: Checkpoint) -> None:
    """attach, step, trained, rebuild: the rebuilt UNet answers as the student did."""
    from diffusers import UNet2DConditionModel

    layout = detect(original)

    def built(source: dict[str, Tensor] | Checkpoint) -> UNet2DConditionModel:
        unet = UNet2DConditionModel(**layout.unet).eval().requires_grad_(False)
        unet.load_state_dict({k: v.float() for k, v in from_file(keymap(layout), source, "unet")})
        return unet

    unet = built(original)
    context = torch.randn(1, 7, layout.unet["cross_attention_dim"])
    more = {}
    if layout.family == "sdxl":
        pooled = layout.plan.te2.projection
        more = {"added_cond_kwargs": {"text_embeds": torch.randn(1, pooled),
                                      "time_ids": torch.ones(1, 6)}}  # fmt: skip
    x = torch.randn(1, 4, 8, 8)

    def answer(net: UNet2DConditionModel) -> Tensor:
        with torch.no_grad():
            return net(x, torch.tensor(500.5), context, **more).sample

    before = answer(unet)
    for start in (decompose(original, chosen(original, "all"), 4),
                  zeros_full(original, chosen(original, "readout"))):  # fmt: skip
        sites = chosen(original, "every")
        attached = attach({"unet": unet}, start, sites)
        assert torch.equal(answer(unet), before)
        attached.load(stirred(start))
        student, trained = answer(unet), attached.trained()
        with attached.teacher():
            assert torch.equal(answer(unet), before)
        attached.detach()
        assert torch.equal(answer(unet), before)
        after = answer(built(dict(rebuild(original, start, trained))))
        torch.testing.assert_close(after, student, atol=5e-3, rtol=5e-3)
        assert (after - before).norm() > 3 * (after - student).norm()


def test_file_has_markers_metadata_and_repeats(original: Checkpoint, tmp_path: Path) -> None:
    start = zeros_full(original, chosen(original, "readout"))
    trained = stirred(start)
    out = tmp_path / "new.safetensors"
    first = write_rebuilt(original, start, trained, out, objective="v-zsnr",
                          metadata={"recast.recipe": "x"})  # fmt: skip
    with Checkpoint(out) as new:
        assert list(new.specs) == ["v_pred", "ztsnr", *original.specs]
        assert new.metadata["recast.objective"] == "v-zsnr"
        assert new.metadata["modelspec.prediction_type"] == "v"
        assert new.metadata["recast.base_sha256"] == original.sha256()
        assert new.metadata["recast.recipe"] == "x"
        assert new.sha256() == first
        verdict = verify_rebuilt(original, new, start, trained)
        assert verdict.passed
        assert verdict.exact == 1
        assert not verify_rebuilt(original, new).passed
        zero = zeros_full(new, chosen(new, "readout"))
        write_rebuilt(new, None, zero, tmp_path / "flow.safetensors", objective="flow")
        write_rebuilt(new, None, zero, tmp_path / "same.safetensors")
    with Checkpoint(tmp_path / "flow.safetensors") as flow:
        assert not {"v_pred", "ztsnr"} & flow.specs.keys()
        assert "modelspec.prediction_type" not in flow.metadata
    with Checkpoint(tmp_path / "same.safetensors") as same:
        assert {"v_pred", "ztsnr"} < same.specs.keys()
    with pytest.raises(Refused, match="exist"):
        write_rebuilt(original, start, trained, out, objective="v-zsnr")
    again = write_rebuilt(original, start, trained, out, objective="v-zsnr",
                          metadata={"recast.recipe": "x"}, force=True)  # fmt: skip
    assert again == first


def test_a_patch_does_what_the_pair_did(original: Checkpoint, tmp_path: Path) -> None:
    for start in (decompose(original, chosen(original, "all"), 3),
                  zeros_full(original, chosen(original, "readout"))):  # fmt: skip
        trained = stirred(start)
        patch = patch_from(start, trained)
        assert patch.role == ("delta" if start.rank else "full")
        assert patch.rank == (6 if start.rank else None)
        path = tmp_path / f"{patch.role}.safetensors"
        write_adapter(path, patch)
        want = dict(rebuild(original, start, trained))
        for key, tensor in apply_patch(original, read_adapter(path)):
            torch.testing.assert_close(tensor, want[key], atol=1e-6, rtol=1e-3)
    untouched = patch_from(start, start)
    for key, tensor in apply_patch(original, untouched):
        assert as_bytes(tensor) == original.raw(key)


def test_a_patch_goes_onto_a_relative_only_if_asked(original: Checkpoint, tmp_path: Path) -> None:
    family = detect(original).family
    trained = stirred(zeros_full(original, chosen(original, "readout")))
    path = tiny.checkpoint(tmp_path / "other.safetensors", family, seed=9, dtype="F16")
    with Checkpoint(path) as other:
        with pytest.raises(Refused, match="sha256"):
            next(iter(apply_patch(other, trained)))
        changed = dict(apply_patch(other, trained, other_base=True))
        site = chosen(other, "readout")[0]
        delta = trained.entries[f"{site.lora}.{site.param}"].dense()
        want = other[site.key].float() + delta
        torch.testing.assert_close(changed[site.key].float(), want, atol=1e-3, rtol=1e-3)


def test_wrong_combinations_are_refused(original: Checkpoint) -> None:
    sites = chosen(original, "readout")
    start = zeros_full(original, sites)
    low = decompose(original, chosen(original, "principal")[:2], 2)

    def run(initial: Adapter | None, trained: Adapter) -> None:
        list(rebuild(original, initial, trained))

    with pytest.raises(Refused, match="--initial"):
        run(None, stirred(low))
    with pytest.raises(Refused, match="--initial"):
        run(None, low)
    with pytest.raises(Refused, match="no start"):
        run(stirred(low), low)
    with pytest.raises(Refused, match="only one"):
        run(low, start)
    with pytest.raises(Refused, match="sha256"):
        run(None, Adapter(start.entries, {**start.metadata, "recast.base_sha256": "00" * 32}))
    with pytest.raises(Refused, match="another architecture"):
        run(None, Adapter({"lora_unet_nowhere.weight": Full(torch.zeros(3))}))
    name = next(iter(start.entries))
    with pytest.raises(Refused, match="another size"):
        run(None, Adapter({name: Full(torch.zeros(3, 3))}))
    with pytest.raises(Refused, match="no change"):
        list(apply_patch(original, low))
    with pytest.raises(Refused, match="norms or biases"):
        decompose(original, sites, 2)


@pytest.mark.parametrize("field", ["residual_sha256", "method", "base_sha256"])
def test_an_adapter_of_another_start_is_refused(original: Checkpoint, field: str) -> None:
    """Same names, ranks and shapes, another T0: the sum would be another model."""
    start = decompose(original, chosen(original, "principal")[:2], 2)
    start = Adapter(start.entries, {**start.metadata, "recast.residual_sha256": "aa" * 32})
    trained = stirred(start)
    list(rebuild(original, start, trained))
    other = Adapter(trained.entries, {**trained.metadata, f"recast.{field}": "bb" * 32})
    with pytest.raises(Refused, match=f"{field}|sha256"):
        list(rebuild(original, start, other))


def test_overflow_is_named_not_stored(original: Checkpoint) -> None:
    start = zeros_full(original, chosen(original, "readout"))
    name = next(iter(start.entries))
    huge = Adapter({**start.entries, name: Full(torch.full(start.entries[name].shape, 1e6))},
                   start.metadata)  # fmt: skip
    with pytest.raises(CheckFailed, match="leaves the range"):
        list(rebuild(original, None, huge))


def test_overflow_is_named_in_full_precision_too(tmp_path: Path) -> None:
    """fp32 weights are changed in place, so whether they were finite is asked before."""
    with Checkpoint(tiny.checkpoint(tmp_path / "a.safetensors", "sd15", dtype="F32")) as file:
        start = zeros_full(file, chosen(file, "time"))
        name, entry = next(iter(start.entries.items()))
        lost = Adapter({**start.entries, name: Full(torch.full(entry.shape, torch.inf))})
        with pytest.raises(CheckFailed, match="leaves the range"):
            list(rebuild(file, None, lost))
