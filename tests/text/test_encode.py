"""Conditions against diffusers' own pipelines, and the weights and rows that those do not know."""

import math

import pytest
import torch
from torch import nn

from recast.errors import Refused
from recast.text.chunks import chunks
from recast.text.encode import PADS, Condition, cat, encode_prompts
from recast.text.tokens import merges, vocabulary

PROMPTS = ["a photo of a cat", "", "It's 3 dogs, ﬁne & déjà-vu " * 3]


def encoder(width: int, layers: int, projection: int | None, seed: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=projection or width,
        hidden_act="gelu" if projection else "quick_gelu",
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> list[nn.Module]:
    return [encoder(16, 2, None, 0), encoder(24, 3, 20, 1)]


def clip_tokenizer(pad: str):
    from transformers import CLIPTokenizer

    pairs = merges()
    return CLIPTokenizer(vocabulary(pairs), merges=pairs, model_max_length=77, pad_token=pad)


def test_sdxl_equals_diffusers(pair: list[nn.Module]) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=pair[0],
        text_encoder_2=pair[1],
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        unet=None,
        scheduler=None,
        add_watermarker=False,
    )
    context, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, device=torch.device("cpu"), do_classifier_free_guidance=False
    )
    mine, mine_pooled = encode_prompts(pair, PROMPTS, pads=PADS, penultimate=True)
    assert mine.shape == (3, 77, 40)
    assert mine_pooled is not None
    torch.testing.assert_close(mine, context, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine_pooled, pooled, atol=1e-5, rtol=0)


def test_sd15_equals_diffusers(pair: list[nn.Module]) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=pair[0],
        tokenizer=clip_tokenizer("<|endoftext|>"),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    context, _ = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    mine, pooled = encode_prompts(pair[:1], PROMPTS, pads=PADS[:1], penultimate=False)
    assert pooled is None
    torch.testing.assert_close(mine, context, atol=1e-5, rtol=0)


def test_weights_move_tokens_away_from_the_empty_prompt(pair: list[nn.Module]) -> None:
    def context(prompt: str) -> torch.Tensor:
        return encode_prompts(pair, [prompt], pads=PADS, penultimate=True)[0][0]

    plain, empty, heavy = context("a red cat"), context(""), context("a (red:1.5) cat")
    expected = plain.clone()
    expected[2] = empty[2] + 1.5 * (plain[2] - empty[2])
    torch.testing.assert_close(heavy, expected, atol=1e-5, rtol=0)
    assert torch.equal(context("a (red:1.0) cat"), plain)
    torch.testing.assert_close(context("(a red cat:0)")[1:4], empty[1:4], atol=1e-5, rtol=0)


def test_weights_leave_the_pooled_output(pair: list[nn.Module]) -> None:
    pooled = [
        encode_prompts(pair, [p], pads=PADS, penultimate=True)[1] for p in ("a cat", "a (cat:2)")
    ]
    torch.testing.assert_close(pooled[0], pooled[1])


def test_long_prompts_take_rows_and_short_ones_repeat(pair: list[nn.Module]) -> None:
    long = "a very long prompt, " * 30
    assert len(chunks(long)) == 2
    alone, first = encode_prompts(pair, [long], pads=PADS, penultimate=True)
    short, _ = encode_prompts(pair, ["cat"], pads=PADS, penultimate=True)
    both, pooled = encode_prompts(pair, [long, "cat"], pads=PADS, penultimate=True)
    assert alone.shape[1] == 2 * 77
    torch.testing.assert_close(both[0], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1], short[0].repeat(2, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[:1], first, atol=1e-5, rtol=0)  # type: ignore[index]


def test_a_repeated_context_leaves_attention_as_it_is() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 5, 8), torch.randn(1, 7, 8), torch.randn(1, 7, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    once = attend(query, keys, values)
    thrice = attend(query, keys.repeat(1, 3, 1), values.repeat(1, 3, 1))
    torch.testing.assert_close(once, thrice)


def test_small_vocabulary_is_refused() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=34,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    with pytest.raises(Refused, match="te1 has a vocabulary of 34 tokens, smaller than the ids"):
        encode_prompts([CLIPTextModel(config)], ["cat"], pads=PADS[:1], penultimate=False)


def condition(rows: int, tokens: int, fill: float = 1.0) -> Condition:
    return Condition(
        torch.full((rows, tokens, 4), fill),
        torch.full((rows, 3), fill),
        torch.full((rows, 6), 64.0),
    )


def test_condition_rows_zeros_and_cat() -> None:
    joined = cat([condition(2, 154, 1.0), condition(1, 77, 2.0)])
    assert len(joined) == 3
    assert joined.context.shape == (3, 154, 4)
    assert joined.context[:, 0, 0].tolist() == [1, 1, 2]
    assert len(joined[1]) == len(joined[-1]) == 1
    assert joined[-1].context[0, 0, 0] == 2
    assert len(joined[[0, 2]]) == 2
    blank = joined.zeros()
    assert not blank.context.any()
    assert not blank.pooled.any()
    assert (blank.time_ids == 64).all()
    assert joined.to(torch.float16).context.dtype == torch.float16
    assert joined.to(torch.float16).time_ids.dtype == torch.float32
    chosen = joined.where(torch.tensor([True, False, True]), condition(3, 77, 9.0))
    assert chosen.context[:, -1, 0].tolist() == [1, 9, 2]
    assert chosen.pooled[:, 0].tolist() == [1, 9, 2]
    assert math.prod(condition(1, 77).expand(4).context.shape) == 4 * 77 * 4
    with pytest.raises(Refused, match="2 conditions for 3 samples"):
        condition(2, 77).expand(3)
