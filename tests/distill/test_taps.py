"""Where features of a UNet are taken, and what names them."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from recast.distill.taps import FeatureTap, block_names, pool
from recast.errors import NotFinite, Refused
from recast.objective import EPS, FLOW


def unet(widths: tuple[int, ...] = (8, 16), seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", *("DownBlock2D",) * (len(widths) - 1)),
        up_block_types=(*("UpBlock2D",) * (len(widths) - 1), "CrossAttnUpBlock2D"),
        attention_head_dim=4, cross_attention_dim=8, norm_num_groups=4,
    ).eval().requires_grad_(False)  # fmt: skip


def ask(net: UNet2DConditionModel, x: torch.Tensor) -> torch.Tensor:
    context = torch.zeros(len(x), 3, 8, dtype=x.dtype)
    return net(x, torch.full((len(x),), 500.0), context, return_dict=False)[0]


def test_blocks_are_read_off_the_network() -> None:
    assert block_names(unet()) == ("down_0", "down_1", "mid", "up_0", "up_1")


@pytest.mark.parametrize(("where", "sides"), [("pre_resample", (8, 4, 4, 4, 8)),
                                              ("post_block", (4, 4, 4, 8, 8))])  # fmt: skip
def test_features_are_taken_before_or_after_the_resampler(
    where: str, sides: tuple[int, ...]
) -> None:
    net = unet()
    with FeatureTap(net, where=where) as tap:
        ask(net, torch.randn(2, 4, 8, 8))
        taken = tap.taken()
    assert list(taken) == list(block_names(net))
    assert [f.shape[-1] for f in taken.values()] == list(sides)
    assert [f.shape[1] for f in taken.values()] == [8, 16, 16, 16, 8]


def test_features_feed_what_comes_next() -> None:
    net = unet()
    with FeatureTap(net, ("down_0", "up_1")) as tap:
        answer = ask(net, torch.randn(2, 4, 8, 8))
        last = tap.taken()["up_1"]
    found = net.conv_out(net.conv_act(net.conv_norm_out(last)))
    torch.testing.assert_close(found, answer)


def test_features_keep_their_graph_and_are_forgotten_once_taken() -> None:
    net = unet()
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with FeatureTap(net, ("mid",)) as tap:
        ask(net, x)
        tap.taken()["mid"].sum().backward()
        assert x.grad is not None
        assert x.grad.any()
        with pytest.raises(Refused, match="no features came from block mid"):
            tap.taken()
    ask(net, x)
    with pytest.raises(Refused, match="mid"):
        tap.taken()


def test_unknown_blocks_and_places_are_refused() -> None:
    with pytest.raises(Refused, match="no block up_7"):
        FeatureTap(unet(), ("mid", "up_7"))
    with pytest.raises(Refused, match="'before'"):
        FeatureTap(unet(), where="before")


def test_fingerprints_differ_wherever_features_would() -> None:
    net = unet()
    one = FeatureTap(net).fingerprint(EPS)
    assert one == FeatureTap(unet(seed=1)).fingerprint(EPS)
    others = [
        FeatureTap(net).fingerprint(FLOW),
        FeatureTap(net).fingerprint(EPS, "mean_std"),
        FeatureTap(net, ("mid",)).fingerprint(EPS),
        FeatureTap(net, where="post_block").fingerprint(EPS),
        FeatureTap(unet((8, 16, 16))).fingerprint(EPS),
    ]
    assert all(other != one for other in others)


def test_pooling_takes_mean_and_spread_in_fp32() -> None:
    feature = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    found = pool({"mid": feature}, "mean_std")["mid"]
    flat = feature.float().flatten(2)
    torch.testing.assert_close(
        found, torch.cat([flat.mean(2), flat.var(2, correction=0).sqrt()], 1)
    )
    torch.testing.assert_close(pool({"mid": feature})["mid"], found[:, :3])


def test_overflow_is_named_with_its_block() -> None:
    fine, broken = torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), torch.inf)
    with pytest.raises(Refused, match=r"block mid overflow in fp16: run the network in bf16"):
        pool({"down_0": fine.half(), "mid": broken.half()})
    with pytest.raises(NotFinite, match="mid"):
        pool({"down_0": fine, "mid": broken})
