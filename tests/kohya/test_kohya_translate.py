"""From flags to recipes: every row of the table, the published commands, refusals."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from published import FAST, FLOW, FULL_FINETUNE

from recast.errors import Refused
from recast.kohya import TOLD, Translation, begun, localised, scaled, translate
from recast.kohya.flags import FLAGS, LAUNCH, SECTIONS
from recast.kohya.network import NETWORK_ARGS
from recast.kohya.shell import commands
from recast.recipe import SECTIONS as RECIPE
from recast.recipe import differences, dump_short, load

BASE = (
    "--pretrained_model_name_or_path=a.safetensors", "--network_module=networks.lora",
    "--train_data_dir=pics",
)  # fmt: skip


def command(*flags: str, script: str = "sdxl_train_network.py") -> Translation:
    return translate(["accelerate", "launch", script, *BASE, *flags])


def settings(found: Translation) -> dict[str, Any]:
    """The recipe's keys, dotted."""
    return {
        f"{section}.{key}": value
        for section, values in found.recipe.model_dump(exclude={"about"}).items()
        for key, value in values.items()
    }


def test_every_row_names_keys_that_exist() -> None:
    known = {f"{section}.{key}" for section, keys in RECIPE.items() for key in keys}
    known |= {"about", *RECIPE, *TOLD}
    for row in itertools.chain(*SECTIONS.values()):
        assert set(row.turn.becomes) <= known, row.name
        assert row.turn.becomes or row.remark, f"{row.name} says nothing"


def test_no_flag_has_two_rows() -> None:
    rows = [row.name for rows in SECTIONS.values() for row in rows if row not in NETWORK_ARGS]
    assert len(rows) == len(FLAGS) + len(LAUNCH)
    names = [row.name for row in NETWORK_ARGS]
    assert len(names) == len(set(names))


# a flag as it is written, and what it changes in the recipe of a command without it
EFFECTS: list[tuple[str, dict[str, Any]]] = [
    ("--vae=v.safetensors", {"data.vae": "v.safetensors"}),
    ("--v_parameterization", {"target.objective": "v"}),
    ("--v_parameterization --zero_terminal_snr", {"target.objective": "v-zsnr"}),
    ("--network_dim=32", {"network.dim": 32}),
    ("--network_alpha=16", {"network.alpha": 16.0}),
    ("--network_dropout=0.1", {"network.dropout": 0.1}),
    ("--network_weights=w.safetensors", {"network.weights": "w.safetensors"}),
    ("--network_args dropout=0.2 rank_dropout=0.1 module_dropout=0.3",
     {"network.dropout": 0.2, "network.rank_dropout": 0.1, "network.module_dropout": 0.3}),
    ("--network_args conv_dim=8", {"network.conv_dim": 8, "train.profile": "kohya-conv,te1,te2"}),
    ("--network_args conv_dim=8 conv_alpha=2",
     {"network.conv_dim": 8, "network.conv_alpha": 2.0, "train.profile": "kohya-conv,te1,te2"}),
    ("--network_module=lycoris.kohya --network_args rank_dropout=0.1 rank_dropout_scale=True",
     {"network.conv_dim": 4, "network.rank_dropout": 0.1,
      "train.profile": "lycoris-full,te1,te2"}),
    ("--network_module=lycoris.kohya",
     {"network.conv_dim": 4, "train.profile": "lycoris-full,te1,te2"}),
    ("--network_module=lycoris.kohya --network_args preset=attn-mlp algo=lora",
     {"network.conv_dim": 4}),
    ("--network_train_unet_only", {"train.profile": "kohya"}),
    ("--network_train_text_encoder_only", {"train.profile": "te1,te2"}),
    ("--learning_rate=1e-4", {"train.lr": 1e-4}),
    ("--unet_lr=1e-4 --text_encoder_lr=5e-5",
     {"train.lr": 1e-4, "train.rates": {"te1": 0.5, "te2": 0.5}}),
    ("--unet_lr=1e-4 --text_encoder_lr 5e-5 2.5e-5",
     {"train.lr": 1e-4, "train.rates": {"te1": 0.5, "te2": 0.25}}),
    ("--unet_lr=1e-4 --text_encoder_lr=0", {"train.lr": 1e-4, "train.profile": "kohya"}),
    ("--unet_lr=0 --text_encoder_lr=1e-4", {"train.lr": 1e-4, "train.profile": "te1,te2"}),
    ("--loss_type=l1", {"train.distance": "l1"}),
    ("--loss_type=huber --huber_schedule=exponential --huber_c=0.2",
     {"train.distance": "huber", "train.huber_schedule": "exponential", "train.huber_c": 0.2}),
    ("--min_snr_gamma=7", {"train.weighting": "min-snr", "train.gamma": 7.0}),
    ("--debiased_estimation_loss", {"train.weighting": "debiased-kohya"}),
    ("--scale_v_pred_loss_like_noise_pred", {"train.weighting": "p2", "train.p2_gamma": 0.0}),
    ("--noise_offset=0.05", {"noise.offset": 0.05}),
    ("--multires_noise_iterations=6 --multires_noise_discount=0.4",
     {"noise.multires": 6, "noise.multires_discount": 0.4}),
    ("--ip_noise_gamma=0.1", {"noise.perturbation": 0.1}),
    ("--flow_matching --flow_matching_shift=2.5",
     {"target.objective": "flow", "train.shift": 2.5}),
    ("--flow_model --flow_use_ot --flow_timestep_distribution logit_normal "
     "--flow_logit_mean=-0.2 --flow_logit_std=1.5 --flow_uniform_static_ratio=3",
     {"target.objective": "flow", "noise.pairing": "optimal", "train.times": "logit-normal",
      "train.mean": -0.2, "train.std": 1.5, "train.shift": 3.0}),
    ("--flow_uniform_base_pixels=262144", {"train.shift_side": 512}),
    ("--flow_uniform_shift", {"train.shift_side": 1024}),
    ("--use_zero_cond_dropout=True", {"data.null": "zero"}),
    ("--use_zero_cond_dropout=False", {}),
    ("--vae=v.safetensors --vae_custom_scale=0.14 --vae_custom_shift=-0.5",
     {"data.vae": "v.safetensors", "data.vae_scale": 0.14, "data.vae_shift": -0.5}),
    ("--resolution=768", {"data.size": 768}),
    ("--resolution=1152,896 --enable_bucket", {"data.size": 1016, "images.enable_bucket": True}),
    ("--enable_bucket --min_bucket_reso=320 --max_bucket_reso=1536 --bucket_reso_steps=32 "
     "--bucket_no_upscale",
     {"images.enable_bucket": True, "images.min_bucket_reso": 320, "images.max_bucket_reso": 1536,
      "images.bucket_reso_steps": 32, "images.bucket_no_upscale": True}),
    ("--random_crop --color_aug --flip_aug --alpha_mask",
     {"images.random_crop": True, "images.color_aug": True, "images.flip_aug": True,
      "images.alpha_mask": True}),
    ("--conditioning_data_dir=masks", {"images.masks": "masks"}),
    ("--caption_extension=.caption", {"images.caption_extension": ".caption"}),
    ("--caption_extention=.cap", {"images.caption_extension": ".cap"}),
    ("--shuffle_caption --keep_tokens=2 --caption_separator=;",
     {"images.shuffle_caption": True, "images.keep_tokens": 2, "images.caption_separator": ";"}),
    ("--keep_tokens_separator=||| --secondary_separator=;;; --enable_wildcard",
     {"images.keep_tokens_separator": "|||", "images.secondary_separator": ";;;",
      "images.enable_wildcard": True}),
    ("--caption_prefix=a --caption_suffix=b",
     {"images.caption_prefix": "a", "images.caption_suffix": "b"}),
    ("--caption_dropout_rate=0.5 --caption_dropout_every_n_epochs=3 "
     "--caption_tag_dropout_rate=0.1",
     {"data.caption_dropout": 0.5, "images.caption_dropout_every_n_epochs": 3,
      "images.caption_tag_dropout_rate": 0.1}),
    ("--prior_loss_weight=0.5", {"images.prior_loss_weight": 0.5}),
    ("--optimizer_type=Prodigy --learning_rate=1",
     {"train.optimizer": "prodigy", "train.lr": 1.0, "train.optimizer_args": {}}),
    ("--optimizer_type=DAdaptLion --optimizer_args betas=0.9,0.99 d0=1e-5 --learning_rate=1",
     {"train.optimizer": "dadaptlion", "train.lr": 1.0,
      "train.optimizer_args": {"betas": [0.9, 0.99], "d0": 1e-5}}),
    ("--optimizer_args weight_decay=0.1 betas=(0.9,0.95)",
     {"train.optimizer_args": {"weight_decay": 0.1, "betas": [0.9, 0.95]}}),
    ("--optimizer_type=mine.Optimizer",
     {"train.optimizer": "mine.Optimizer", "train.optimizer_args": {}}),
    ("--use_8bit_adam", {"train.optimizer": "adamw8bit", "train.optimizer_args": {}}),
    ("--use_lion_optimizer", {"train.optimizer": "lion", "train.optimizer_args": {}}),
    ("--max_grad_norm=0", {"train.clip": 0.0}),
    ("--lr_scheduler=cosine", {"train.schedule": "cosine"}),
    ("--lr_scheduler=cosine --lr_scheduler_args num_cycles=0.375",
     {"train.schedule": "cosine", "train.cycles": 0.375}),
    ("--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3",
     {"train.schedule": "cosine-restarts", "train.cycles": 3.0}),
    ("--lr_scheduler=polynomial --lr_scheduler_power=2",
     {"train.schedule": "polynomial", "train.power": 2.0}),
    ("--lr_scheduler=constant_with_warmup --lr_warmup_steps=100", {"train.warmup": 100}),
    ("--lr_warmup_steps=0.1 --max_train_steps=500", {"train.warmup": 50, "train.steps": 500}),
    ("--lr_warmup_steps=5%", {"train.warmup": 80}),
    ("--lr_scheduler_min_lr_ratio=0.1", {"train.floor": 0.1}),
    ("--max_train_steps=700", {"train.steps": 700}),
    ("--train_batch_size=4 --gradient_accumulation_steps=2",
     {"train.batch": 4, "train.accumulate": 2}),
    ("--gradient_checkpointing", {"train.recompute": True}),
    ("--torch_compile", {"train.compile": True}),
    ("--max_train_epochs=3 --max_train_steps=700",
     {"train.max_epochs": 3, "train.steps": 10**6}),
    ("--seed=9", {"train.seed": 9}),
    ("--mixed_precision=bf16", {"train.precision": "bf16"}),
    ("--fp8_base", {"train.base": "8bit"}),
    ("--fp8_base_unet", {"train.base": "8bit"}),
    ("--save_precision=fp16", {"network.save": "fp16"}),
    ("--save_every_n_steps=100 --save_last_n_steps=300",
     {"save.every": 100, "save.keep_last": 3}),
    ("--save_every_n_epochs=2 --save_last_n_epochs=4", {"save.epochs": 2, "save.keep_last": 4}),
    ("--sample_every_n_steps=50 --sample_sampler=euler_a --sample_prompts=p.txt --sample_at_first",
     {"watch.previews_every": 50, "watch.preview_solver": "euler_ancestral",
      "watch.prompts": "p.txt", "watch.previews_first": True}),
    ("--sample_every_n_epochs=1", {}),
    ("--sample_every_n_epochs=1 --sample_prompts=p.txt",
     {"watch.previews_epochs": 1, "watch.prompts": "p.txt"}),
    ("--validation_split=0.1 --validate_every_n_steps=50",
     {"watch.validate_share": 0.1, "watch.validate_every": 50}),
    ("--validate_every_n_epochs=1", {"watch.validate_epochs": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "changed"), EFFECTS, ids=[flags for flags, _ in EFFECTS])
def test_flags_change_the_recipe_as_said(flags: str, changed: dict[str, Any]) -> None:
    plain = settings(command())
    found = settings(command(*flags.split()))
    assert {key: value for key, value in found.items() if value != plain[key]} == changed


def test_every_flag_with_an_effect_is_among_those_tried() -> None:
    tried = {word.partition("=")[0] for flags, _ in EFFECTS for word in flags.split()}
    tried |= {flag.partition("=")[0] for flag in BASE}
    for name, row in FLAGS.items():
        if row.turn.kind == "kept" and not {*row.turn.becomes} & {*TOLD, "about"}:
            assert f"--{name}" in tried or name == "flow_matching_objective", name


def test_paths_are_told_to_the_run() -> None:
    found = command("--output_dir=out", "--output_name=mine")
    assert (found.model, found.images, found.out) == ("a.safetensors", "pics", "out/mine")
    assert command("--training_comment=hello").recipe.about == "hello"
    for flags in (["--dataset_config=d.toml"], ["--dataset_config=d.toml", BASE[-1]]):
        assert command(*flags).images == "d.toml"


def test_what_has_no_effect_says_why() -> None:
    found = {one.flag: one for one in command("--sdpa", "--save_state").told}
    assert not found["sdpa"].settings
    assert "scaled_dot_product_attention" in found["sdpa"].why
    assert found["save_state"].why


def test_sd15_has_one_text_encoder() -> None:
    found = command("--text_encoder_lr=1e-6", script="train_network.py")
    assert found.recipe.train.profile == "kohya,te1"
    assert found.recipe.train.rates == {"te1": 0.5}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--trian_batch_size=2", "--trian_batch_size is no flag that Recast knows; did you mean"),
        ("--train_batch_size=two", "--train_batch_size takes a whole number, not 'two'"),
        ("--train_batch_size=0", "--train_batch_size cannot be honoured: train.batch is 0"),
        ("--train_batch_size", "--train_batch_size takes one value, and nothing follows it"),
        ("--sdpa yes", "--sdpa takes no value"),
        ("--save_model_as=ckpt", "--save_model_as cannot be honoured"),
        ("--loss_type=smooth_l1", "--loss_type smooth_l1 has no equivalent here"),
        ("--network_args algo=loha", "--network_args algo loha has no equivalent here"),
        ("--network_args block_dims=1,2", "--network_args block_dims cannot be honoured"),
        (
            "--network_module=lycoris.kohya --network_args rank_dropout=0.1",
            "--network_args rank_dropout: LyCORIS leaves",
        ),
        ("--network_args conv_dim=a", "--network_args conv_dim takes a number, not 'a'"),
        ("--network_args dropout=(1,2)", "--network_args dropout takes a number, not [1, 2]"),
        ("--network_args conv_dims=4", "did you mean conv_dim?"),
        ("--network_args conv_dim", "--network_args takes name=value"),
        ("--network_module=networks.oft", "--network_module networks.oft is not supported"),
        ("--optimizer_type=Sophia", "--optimizer_type Sophia has no equivalent here"),
        ("--learning_rate=0", "every learning rate is 0"),
        ("--zero_terminal_snr", "--zero_terminal_snr needs --v_parameterization"),
        ("--flow_model --v_parameterization", "exclude each other"),
        ("--vae_custom_scale=1", "--vae_custom_scale says something of a VAE"),
        ("--resolution=512,768", "--resolution: one size other than a square needs"),
        ("--resolution=large", "--resolution takes size"),
        ("--deepspeed", "--deepspeed cannot be honoured"),
        ("--log_with=wandb", "--log_with cannot be honoured"),
        ("--v2", "--v2 cannot be honoured"),
        ("--sample_prompts=p.toml", "--sample_prompts p.toml is no file of lines"),
        ("--sample_sampler=pndm", "--sample_sampler pndm is none of the samplers here"),
        ("--lr_scheduler=piecewise_constant", "train.schedule is 'piecewise_constant'"),
        ("stray", "--train_data_dir takes one value"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(flags: str, said: str) -> None:
    with pytest.raises(Refused) as refusal:
        command(*flags.split())
    assert said in str(refusal.value)
    assert "{" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "flags",
    ["--save_model_as=safetensors", "--min_timestep=0 --max_timestep=1000", "--clip_skip=2",
     "--network_args train_norm=False dora_wd=False use_tucker=False loraplus_lr_ratio=1",
     "--scale_weight_norms=0", "--token_warmup_step=0"],
)  # fmt: skip
def test_refused_flags_may_ask_for_nothing(flags: str) -> None:
    assert settings(command(*flags.split())) == settings(command())


def test_other_scripts_and_missing_flags_are_refused() -> None:
    with pytest.raises(Refused, match=r"flux_train_network\.py is not among"):
        command(script="flux_train_network.py")
    with pytest.raises(Refused, match="--network_module is missing"):
        translate(["train_network.py", "--pretrained_model_name_or_path=a"])
    with pytest.raises(Refused, match=r"SD 1\.5's text encoder"):
        command("--clip_skip=2", script="train_network.py")
    with pytest.raises(Refused, match="--num_processes cannot be honoured"):
        translate(["accelerate", "launch", "--num_processes=2", "train_network.py", *BASE])


def test_flags_may_be_shortened_and_repeated() -> None:
    assert command("--train_batch=3", "--train_batch_size=5").recipe.train.batch == 5
    with pytest.raises(Refused, match="did you mean --save_every_n_epochs or --save_every_n_steps"):
        command("--save_every=3")


def test_a_config_file_holds_where_the_command_is_silent(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        'network_module = "lycoris.kohya"\npretrained_model_name_or_path = "m.safetensors"\n'
        "[training]\ntrain_batch_size = 4\nsdpa = true\nflip_aug = false\nnetwork_dim = 32\n"
        'network_args = ["conv_dim=8", "preset=full"]\ntext_encoder_lr = [1e-5, 2e-5]\n'
        "unet_lr = 1e-4\n"
    )
    found = translate(["train_network.py", f"--config_file={tmp_path / 'c'}", "--network_dim=16"])
    assert found.model == "m.safetensors"
    assert (found.recipe.network.dim, found.recipe.network.conv_dim) == (16, 8)
    assert (found.recipe.train.batch, found.recipe.images.flip_aug) == (4, False)
    (tmp_path / "bad.toml").write_text("train_batchsize = 4\n")
    with pytest.raises(Refused, match="did you mean --train_batch_size"):
        translate(["train_network.py", f"--config_file={tmp_path / 'bad.toml'}"])
    with pytest.raises(Refused, match="cannot be read"):
        translate(["train_network.py", f"--config_file={tmp_path / 'absent.toml'}"])
    (tmp_path / "broken.toml").write_text("a = \n")
    with pytest.raises(Refused, match="not valid TOML"):
        translate(["train_network.py", f"--config_file={tmp_path / 'broken.toml'}"])


def published(text: str) -> Translation:
    (words,) = commands(text)
    return translate(words)


def test_the_published_full_finetune() -> None:
    found = published(FULL_FINETUNE)
    recipe = found.recipe
    assert found.model == "C:\\models\\diff.safetensors"
    assert recipe.network.weights == "C:\\models\\locon.safetensors"
    network, train, images = recipe.network, recipe.train, recipe.images
    assert (network.kind, train.profile) == ("lora", "lycoris-full,te1,te2")
    assert (network.dim, network.alpha, network.conv_dim, network.conv_alpha) == (64, 64, 64, 64)
    assert (network.dropout, network.save) == (0.1, "bf16")
    assert (train.optimizer, train.lr, train.schedule) == ("prodigyplus", 1.0, "constant")
    assert train.optimizer_args == {
        "prodigy_steps": 100, "betas": [0.8, 0.8], "schedulefree_c": 10,
        "weight_decay_by_lr": False, "d0": 1e-5, "use_stableadamw": False, "d_limiter": False,
        "d_coef": 1, "use_speed": False,
    }  # fmt: skip
    assert (recipe.target.objective, train.shift, train.distance) == ("flow", 2.5, "fft")
    assert (train.batch, train.max_epochs, train.precision, train.seed) == (1, 10, "bf16", 42)
    assert (images.enable_bucket, images.min_bucket_reso, images.max_bucket_reso) == (
        True,
        768,
        1280,
    )
    assert (images.random_crop, images.color_aug, images.flip_aug) == (True, True, True)
    assert (images.shuffle_caption, recipe.data.caption_dropout) == (True, 0.5)
    assert (recipe.save.every, recipe.data.size) == (100, 1024)


def test_the_published_flow_conversion() -> None:
    recipe = published(FLOW).recipe
    assert recipe.train.profile == "lycoris-full"
    assert (recipe.train.optimizer, recipe.train.lr) == ("dadaptlion", 1.0)
    assert recipe.train.optimizer_args == {"betas": [0.9, 0.99], "weight_decay": 0, "d0": 1e-5}
    assert (recipe.target.objective, recipe.train.shift, recipe.train.distance) == (
        "flow", 2.5, "fft",
    )  # fmt: skip
    assert (recipe.train.max_epochs, recipe.save.epochs, recipe.train.accumulate) == (4, 1, 1)


def test_the_published_fast_lora_is_the_preset() -> None:
    recipe = published(FAST).recipe
    assert (recipe.network.dim, recipe.network.alpha) == (8, 4.0)
    assert (recipe.network.conv_dim, recipe.network.conv_alpha) == (256, 4.0)
    assert (recipe.train.lr, recipe.train.schedule, recipe.train.cycles) == (3e-4, "cosine", 0.375)
    assert recipe.train.rates == {"te1": pytest.approx(1 / 3), "te2": pytest.approx(1 / 3)}
    assert (recipe.train.optimizer, recipe.train.optimizer_args) == ("saveus", {"in_place": True})
    assert (recipe.train.batch, recipe.train.accumulate, recipe.train.steps) == (8, 6, 80)
    assert (recipe.noise.multires, recipe.noise.multires_discount) == (12, 0.4)
    assert (recipe.watch.previews_every, recipe.watch.preview_solver) == (1, "euler_ancestral")
    assert (recipe.save.every, recipe.network.save, recipe.train.precision) == (1, "fp16", "bf16")
    assert recipe.images.bucket_reso_steps == 32


@pytest.mark.parametrize("text", [FULL_FINETUNE, FLOW, FAST])
def test_a_saved_recipe_reads_back_the_same(text: str, tmp_path: Path) -> None:
    recipe = published(text).recipe
    path = tmp_path / "mine.toml"
    path.write_text(dump_short(recipe), encoding="utf-8")
    assert load(path) == recipe
    assert localised(recipe).network.weights in ("", "C:/models/locon.safetensors")
    assert begun(recipe) == recipe  # the file is not there
    small = scaled(recipe, 64)
    assert (small.data.size, small.images.bucket_reso_steps) == (64, 8)
    assert small.images.max_bucket_reso == recipe.images.max_bucket_reso // 16


def test_the_preset_is_the_published_command_but_for_its_paths_and_seed() -> None:
    apart = differences(published(FAST).recipe, load("fast-80"))
    assert set(apart) <= {
        "train.seed", "train.huber_schedule", "watch.prompts", "watch.previews_every",
        "images.caption_extension",
    }  # fmt: skip


def test_the_other_presets_are_theirs_with_the_adapter_that_the_published_steps_make() -> None:
    apart = differences(published(FULL_FINETUNE).recipe, load("full-finetune-at-home"))
    assert set(apart) <= {
        "train.seed", "train.huber_schedule", "data.vae", "images.caption_extension",
        "train.profile", "train.rank", "network.kind", "network.dim", "network.alpha",
        "network.weights",
        "network.conv_dim", "network.conv_alpha",
    }  # fmt: skip
    flow, reference = published(FLOW).recipe, load("flow-dadaptlion")
    for key in ("optimizer", "lr", "schedule", "distance", "times", "shift", "optimizer_args"):
        assert getattr(flow.train, key) == getattr(reference.train, key), key
