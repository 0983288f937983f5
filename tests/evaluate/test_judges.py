"""Judges from the user's folders, tiny and random here; likeness of pictures without weights."""

import json
from pathlib import Path

import pytest
import torch
from tests.evaluate.example import picture

from recast.errors import Refused
from recast.evaluate.judges import Clip, Dino, frechet, judge_kind, open_judge, prepared
from recast.evaluate.likeness import likeness

PROMPTS = ("a red kite over dunes", "two boats at noon", "an old lamp")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("judges"))


def make(folder: Path) -> Path:
    """clip/ and dinov2/, random, as transformers saves them."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    clip = CLIPConfig(
        text_config={**small, "vocab_size": 49408, "eos_token_id": 49407},
        vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    dino = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPModel(clip).save_pretrained(folder / "clip")
    Dinov2Model(dino).save_pretrained(folder / "dinov2")
    return folder


def test_the_clip_score_is_the_library_s_cosine(folders: Path) -> None:
    from transformers import CLIPModel

    from recast.text.tokens import END, START, encode

    judge = open_judge(folders / "clip")
    assert isinstance(judge, Clip)
    pictures = [picture(k) for k in range(3)]
    net = CLIPModel.from_pretrained(folders / "clip").eval()
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    scores = []
    for image, prompt in zip(pictures, PROMPTS, strict=True):
        ids = torch.tensor([[START, *encode(prompt), END]])
        pixels = prepared([image], 32, mean, std)
        with torch.no_grad():
            out = net(input_ids=ids, pixel_values=pixels)
        scores.append(100 * max(0.0, (out.image_embeds @ out.text_embeds.T).item()))
    assert judge.score(pictures, PROMPTS) == pytest.approx(sum(scores) / 3, rel=1e-4)


def test_pixels_are_what_the_library_prepares() -> None:
    """Against transformers' own processor, whose resizing rounds to 8 bits in between."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    image = picture(1, side=64)
    bytes_ = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    theirs = CLIPImageProcessorPil(size=size[0], crop_size=size[1])(
        Image.fromarray(bytes_), return_tensors="pt"
    )["pixel_values"]
    from recast.evaluate.judges import CLIP_MEAN, CLIP_STD

    assert (prepared([image], 32, CLIP_MEAN, CLIP_STD) - theirs).abs().max() < 0.05


def test_the_distance_of_dinov2(folders: Path) -> None:
    judge = open_judge(folders / "dinov2")
    assert isinstance(judge, Dino)
    some = [picture(k) for k in range(6)]
    noisy = [picture(k, noise=1.0) for k in range(6)]
    assert judge.distance(some, some) == pytest.approx(0, abs=1e-6)
    assert judge.distance(some, noisy) > 10 * judge.distance(some, some[:5] + noisy[5:]) > 0


def test_the_frechet_distance_is_that_of_the_matrices() -> None:
    """The slow way: eigenvalues of S_a S_b."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 5, generator=g), 2 * torch.randn(30, 5, generator=g) + 1
    s_a, s_b = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(s_a @ s_b).real.clamp(min=0).sqrt().sum()
    slow = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(slow.item(), rel=1e-5)
    with pytest.raises(ValueError, match="two pictures"):
        frechet(a[:1], b)


def test_other_folders_are_refused_by_what_they_are(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no readable config\.json"):
        judge_kind(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(Refused, match="is a bert model"):
        judge_kind(tmp_path)
    (tmp_path / "config.json").write_text(
        (folders / "clip" / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    with pytest.raises(Refused, match="cannot be opened as a clip model"):
        open_judge(tmp_path)


def test_a_judge_with_weights_missing_is_refused(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((folders / "dinov2" / "config.json").read_bytes())
    held = load_file(folders / "dinov2" / "model.safetensors")
    held.pop(next(iter(held)))
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match="lacks 1 of its weights"):
        open_judge(tmp_path)


def test_likeness_of_equal_and_of_spoilt_pictures() -> None:
    some = [picture(k) for k in range(4)]
    same = likeness(some, some)
    assert (same["colours"], same["colour entropy"], same["sharpness"]) == (0, 0, 1)
    grey = likeness(some, [p.mean(0, keepdim=True).expand(3, -1, -1) for p in some])
    assert grey["saturation"] == 0
    assert grey["colours"] > 0.5
    noisy = likeness(some, [picture(k, noise=0.3) for k in range(4)])
    assert noisy["sharpness"] > 2
    assert noisy["spectrum slope"] > 0.3
    blurred = [torch.nn.functional.avg_pool2d(p[None], 5, 1, 2)[0] for p in some]
    assert likeness(some, blurred)["sharpness"] < 0.5
