"""Rows of the flag table: images, captions, buckets, caches."""

from __future__ import annotations

from recast.kohya.flag import Flag, Turn, idle, key, refused, through, told
from recast.kohya.turns import folder, resolution

CACHED = "latents are always kept on disk, keyed by image, VAE and crop"
TOLD = "text embeddings are always kept on disk, also of shuffled and dropped captions"


def same(name: str) -> Turn:
    """The key of section `images` that has the flag's own name."""
    return key(f"images.{name}")


# fmt: off
DATA = (
    Flag("train_data_dir", "word", through(folder, "IMAGES"),
        "with folders such as `10_name` in it, or images"),
    Flag("reg_data_dir", "word",
        refused("name regularisation folders in a --dataset_config, with is_reg = true")),
    Flag("prior_loss_weight", "number", same("prior_loss_weight")),
    Flag("dataset_config", "word", told("IMAGES"), "read by the trainer itself: docs/data.md"),
    Flag("in_json", "word",
        refused("name the metadata file in a --dataset_config, as metadata_file")),
    Flag("dataset_repeats", "whole", idle("it belongs to --in_json")),
    Flag("dataset_class", "word", refused("classes of a dataset's own are not loaded")),
    Flag("debug_dataset", "switch",
        refused("it shows images instead of training: recast data does that")),
    Flag("cache_info", "switch", idle("scanning a folder is quick enough without")),
    Flag("resolution", "word", through(resolution, "data.size"), "`size` or `width,height`"),
    Flag("enable_bucket", "switch", same("enable_bucket")),
    Flag("min_bucket_reso", "whole", same("min_bucket_reso")),
    Flag("max_bucket_reso", "whole", same("max_bucket_reso")),
    Flag("bucket_reso_steps", "whole", same("bucket_reso_steps")),
    Flag("bucket_no_upscale", "switch", same("bucket_no_upscale")),
    Flag("resize_interpolation", "word", refused("pictures are resized by Lanczos' filter",
        "lanczos")),
    Flag("random_crop", "switch", same("random_crop"), "SDXL is told where the crop was taken"),
    Flag("color_aug", "switch", same("color_aug")),
    Flag("flip_aug", "switch", same("flip_aug")),
    Flag("face_crop_aug_range", "word", refused("faces are not looked for")),
    Flag("alpha_mask", "switch", same("alpha_mask")),
    Flag("masked_loss", "switch", idle("a mask counts wherever there is one")),
    Flag("conditioning_data_dir", "word", key("images.masks")),
    Flag("caption_extension", "word", same("caption_extension")),
    Flag("caption_extention", "word", key("images.caption_extension"), "sd-scripts' old spelling"),
    Flag("caption_separator", "word", same("caption_separator")),
    Flag("shuffle_caption", "switch", same("shuffle_caption")),
    Flag("keep_tokens", "whole", same("keep_tokens")),
    Flag("keep_tokens_separator", "word", same("keep_tokens_separator")),
    Flag("secondary_separator", "word", same("secondary_separator")),
    Flag("enable_wildcard", "switch", same("enable_wildcard")),
    Flag("caption_prefix", "word", same("caption_prefix")),
    Flag("caption_suffix", "word", same("caption_suffix")),
    Flag("caption_dropout_rate", "number", key("data.caption_dropout")),
    Flag("caption_dropout_every_n_epochs", "whole", same("caption_dropout_every_n_epochs")),
    Flag("caption_tag_dropout_rate", "number", same("caption_tag_dropout_rate")),
    Flag("token_warmup_min", "whole", refused("captions are whole from the first step on", 1)),
    Flag("token_warmup_step", "number", refused("captions are whole from the first step on", 0.0)),
    Flag("cache_latents", "switch", idle(CACHED)),
    Flag("cache_latents_to_disk", "switch", idle(CACHED)),
    Flag("skip_cache_check", "switch", idle("an entry's key says whether it is right")),
    Flag("vae_batch_size", "whole", idle("images are encoded once, before training")),
    Flag("cache_text_encoder_outputs", "switch", idle(TOLD)),
    Flag("cache_text_encoder_outputs_to_disk", "switch", idle(TOLD)),
    Flag("max_data_loader_n_workers", "whole", idle("cached data is read as it is needed")),
    Flag("persistent_data_loader_workers", "switch", idle("cached data is read as it is needed")),
)
# fmt: on
