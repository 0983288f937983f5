"""The objective a file states: read, taken out, written, contradictions named."""

import pytest

from recast.errors import Refused
from recast.markers import OBJECTIVES, marker_specs, read_objective, stamp, strip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_written_is_read_back(objective: str) -> None:
    stale = {"modelspec.prediction_type": "epsilon", "recast.objective": "v", "ss_steps": "3",
             "sshs_model_hash": "00", "modelspec.hash_sha256": "0x00"}  # fmt: skip
    metadata = stamp(stale, objective, family="sdxl")
    names = ["a", *marker_specs(objective)]
    found = read_objective(names, metadata)
    assert found.objective == objective
    assert found.contradictions == ()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["ss_steps"] == "3"
    assert not metadata.keys() & {"sshs_model_hash", "modelspec.hash_sha256"}
    stated = {"eps": "epsilon", "v": "v", "v-zsnr": "v"}.get(objective)
    assert metadata.get("modelspec.prediction_type") == stated
    assert metadata.get("modelspec.predict_key") == stated


@pytest.mark.parametrize(
    ("names", "metadata", "objective", "contradiction"),
    [
        ([], {}, "eps", ""),
        (["v_pred"], {}, "v", ""),
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "v"}, "v-zsnr", ""),
        ([], {"modelspec.predict_key": "epsilon"}, "eps", ""),
        ([], {"modelspec.prediction_type": "v"}, "v", "v_pred tensor is absent"),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, "v", "prediction_type says eps"),
        (["v_pred"], {"recast.objective": "flow"}, "flow", "tensor v_pred says v"),
        (["ztsnr"], {}, "eps", "ztsnr is there without v_pred"),
        ([], {"recast.objective": "magic"}, "eps", "magic"),
        ([], {"modelspec.prediction_type": "sample"}, "eps", "sample"),
        (["edm_mean", "edm_std"], {}, None, ""),
    ],
)
def test_statements_are_weighed(
    names: list[str], metadata: dict[str, str], objective: str | None, contradiction: str
) -> None:
    found = read_objective(names, metadata)
    assert found.objective == objective
    assert bool(found.contradictions) == bool(contradiction)
    assert contradiction in " ".join(found.contradictions)
    assert found.reasons


def test_markers_are_empty_and_can_be_taken_out() -> None:
    assert marker_specs("v-zsnr") == {"v_pred": ("F32", (0,)), "ztsnr": ("F32", (0,))}
    assert marker_specs("flow") == marker_specs("eps") == {}
    assert strip(["a", "v_pred", "edm_mean", "b", "ztsnr"]) == ["a", "b"]


def test_unknown_objectives_are_refused() -> None:
    with pytest.raises(Refused, match="choose eps"):
        stamp({}, "epsilon")
    with pytest.raises(Refused, match="choose eps"):
        marker_specs("velocity")
