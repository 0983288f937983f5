"""Rows of the flag table: model, network, objective, loss and noise."""

from __future__ import annotations

from recast.kohya.flag import Flag, choice, idle, key, on, refused, through, told
from recast.kohya.network import network, network_arguments
from recast.kohya.turns import clip_skip, objective, of_vae, rates

DISTANCES = {"l2": "mse", "l1": "l1", "huber": "huber", "fft": "fft"}
ALWAYS = "attention runs through torch's scaled_dot_product_attention in any case"

# fmt: off
MODEL = (
    Flag("pretrained_model_name_or_path", "word", told("MODEL"),
        "a file or a diffusers folder; nothing is fetched from a hub"),
    Flag("v2", "switch", refused("Stable Diffusion 2 is no family that Recast opens")),
    Flag("v_parameterization", "switch", through(objective, "target.objective"),
        "`v`, or `v-zsnr` with `--zero_terminal_snr`; without it the model's own objective is "
        "kept, whatever it is"),
    Flag("tokenizer_cache_dir", "word", idle("CLIP's vocabulary ships with Recast")),
    Flag("vae", "word", key("data.vae"),
        "what is trained then is the adapter to its latent space"),
    Flag("no_half_vae", "switch", idle("the VAE runs in float32 in any case")),
    Flag("clip_skip", "whole", through(clip_skip),
        "SDXL's layer is fixed in sd-scripts too; for SD 1.5 only 1 is honoured"),
    Flag("max_token_length", "whole",
        idle("captions are read to their end, in chunks of 75 tokens")),
    Flag("weighted_captions", "switch",
        idle("weights in captions are read as in prompts in any case")),
    Flag("disable_mmap_load_safetensors", "switch",
        idle("files are read a tensor at a time, never mapped")),
    Flag("lowram", "switch", idle("one tensor at a time is in memory while the model is opened")),
    Flag("highvram", "switch",
        idle("parts leave the device only where a large picture is decoded")),
)
# fmt: on

# fmt: off
NETWORK = (
    Flag("network_module", "word", through(network, "network.kind", "train.profile"),
        "`networks.lora` or `lycoris.kohya`"),
    Flag("network_args", "words", through(network_arguments, "network"),
        "each argument has a row of its own"),
    Flag("network_dim", "whole", key("network.dim")),
    Flag("network_alpha", "number", key("network.alpha"),
        "1 where it is not given, as in sd-scripts"),
    Flag("network_dropout", "number", key("network.dropout"), "on the learned change only"),
    Flag("network_train_unet_only", "switch", through(rates, "train.lr", "train.rates"),
        "leaves the text encoders out of `train.profile`"),
    Flag("network_train_text_encoder_only", "switch", through(rates, "train.lr", "train.rates"),
        "leaves the UNet out of `train.profile`"),
    Flag("dim_from_weights", "switch", idle("a file that training goes on from brings its ranks")),
    Flag("scale_weight_norms", "number",
        refused("weights are not rescaled while they are trained", 0.0)),
    Flag("base_weights", "words",
        refused("merge those files into the model first, with recast merge")),
    Flag("base_weights_multiplier", "numbers", refused("it belongs to --base_weights")),
)
# fmt: on

# fmt: off
LOSS = (
    Flag("loss_type", "word", choice("train.distance", DISTANCES),
        "`l2` is `mse`; `smooth_l1` is `huber` but for a factor 1/c: refused"),
    Flag("huber_schedule", "word", key("train.huber_schedule")),
    Flag("huber_c", "number", key("train.huber_c")),
    Flag("huber_scale", "number", refused("the loss has no further scale", 1.0)),
    Flag("min_snr_gamma", "number", through(lambda value, given: {"train.weighting": "min-snr",
        "train.gamma": value}, "train.weighting", "train.gamma"),
        "SNR after a zero-terminal rescale, and on every sample"),
    Flag("debiased_estimation_loss", "switch", on(train__weighting="debiased-kohya")),
    Flag("scale_v_pred_loss_like_noise_pred", "switch", on(train__weighting="p2",
        train__p2_gamma=0.0), "weight 1 on the loss of eps"),
    Flag("v_pred_like_loss", "number",
        refused("the sum of two weights is none of Recast's: give a train.curve", 0.0)),
    Flag("noise_offset", "number", key("noise.offset")),
    Flag("noise_offset_random_strength", "switch", refused("the offset's size does not vary")),
    Flag("adaptive_noise_scale", "number", refused("the offset's size does not follow the image",
        0.0)),
    Flag("multires_noise_iterations", "whole", key("noise.multires")),
    Flag("multires_noise_discount", "number", key("noise.multires_discount")),
    Flag("ip_noise_gamma", "number", key("noise.perturbation")),
    Flag("ip_noise_gamma_random_strength", "switch",
        refused("the perturbation's size does not vary")),
    Flag("zero_terminal_snr", "switch", through(objective, "target.objective"),
        "`v-zsnr`; needs `--v_parameterization`"),
    Flag("min_timestep", "whole",
        refused("times are drawn from the whole path: weigh them by train.curve in a recipe", 0)),
    Flag("max_timestep", "whole", refused("times are drawn from the whole path: weigh them by "
        "train.curve in a recipe", 1000)),
)
# fmt: on

# of forks that train flow matching; the guides' own fork is unpublished
# fmt: off
FORKS = (
    Flag("flow_matching", "switch", through(objective, "target.objective"), "`flow`"),
    Flag("flow_matching_objective", "word", choice("target.objective", {"vector_field": "flow"}),
        "eps - x0, which is what `flow` predicts"),
    Flag("flow_matching_shift", "number", key("train.shift"), "of noise and clock together"),
    Flag("flow_model", "switch", through(objective, "target.objective"), "`flow`"),
    Flag("flow_use_ot", "switch", on(noise__pairing="optimal"),
        "by squared distances; nothing to deal at batch 1"),
    Flag("flow_timestep_distribution", "word", choice("train.times", {"uniform": "uniform",
        "logit_normal": "logit-normal"})),
    Flag("flow_logit_mean", "number", key("train.mean")),
    Flag("flow_logit_std", "number", key("train.std")),
    Flag("flow_uniform_static_ratio", "number", key("train.shift")),
    Flag("flow_uniform_shift", "switch", on(train__shift_side=1024)),
    Flag("flow_uniform_base_pixels", "number", key("train.shift_side",
        lambda pixels: round(pixels**0.5))),
    Flag("contrastive_flow_matching", "switch", refused("there is no contrastive loss")),
    Flag("cfm_lambda", "number", idle("it belongs to --contrastive_flow_matching")),
    Flag("use_zero_cond_dropout", "switch", on(data__null="zero")),
    Flag("vae_custom_scale", "number", through(of_vae("data.vae_scale"), "data.vae_scale")),
    Flag("vae_custom_shift", "number", through(of_vae("data.vae_shift"), "data.vae_shift")),
    Flag("vae_reflection_padding", "switch",
        refused("the VAE's padding stays as its weights were trained")),
)
# fmt: on
