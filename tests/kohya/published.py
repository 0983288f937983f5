"""The three published training commands as their readers hold them: two .bat files and a .sh."""

FULL_FINETUNE = r"""accelerate launch --num_cpu_threads_per_process 8 sdxl_train_network.py ^
 --pretrained_model_name_or_path="C:\models\diff.safetensors" ^
 --network_weights="C:\models\locon.safetensors" ^
 --vae="C:\models\eq_vae.safetensors" ^
 --train_data_dir="C:\training\data" --output_dir="C:\training\out" --output_name="athome" ^
 --logging_dir="C:\training\logs" --log_with=tensorboard ^
 --network_module=lycoris.kohya --network_dim=64 --network_alpha=64 --network_dropout=0.1 ^
 --network_args "algo=locon" "preset=full" "conv_dim=64" "conv_alpha=64" "train_norm=False" ^
 --resolution="1024,1024" --enable_bucket --min_bucket_reso=768 --max_bucket_reso=1280 ^
 --bucket_reso_steps=64 --random_crop --color_aug --flip_aug ^
 --caption_extension=".txt" --shuffle_caption --caption_dropout_rate=0.5 ^
 --lr_scheduler="constant" --learning_rate=1 --unet_lr=1 --text_encoder_lr=1 ^
 --optimizer_type="prodigyplus.ProdigyPlusScheduleFree" ^
 --optimizer_args "prodigy_steps=100" "betas=(0.8,0.8)" "schedulefree_c=10" ^
   "weight_decay_by_lr=False" "d0=1e-5" "use_stableadamw=False" "d_limiter=False" "d_coef=1" ^
   "use_speed=False" ^
 --flow_matching --flow_matching_objective=vector_field --flow_matching_shift=2.5 --loss_type=fft ^
 --train_batch_size=1 --max_train_epochs=10 --mixed_precision=bf16 --full_bf16 ^
 --save_precision=bf16 --save_model_as=safetensors --save_every_n_steps=100 ^
 --save_state_on_train_end --gradient_checkpointing --xformers --sdpa --seed=42
"""

FLOW = r"""accelerate launch --num_cpu_threads_per_process 8 sdxl_train_network.py ^
 --pretrained_model_name_or_path="C:\models\diff.safetensors" ^
 --network_weights="C:\models\locon.safetensors" ^
 --vae="C:\models\eq_vae.safetensors" ^
 --train_data_dir="C:\training\data" --output_dir="C:\training\out" --output_name="flow" ^
 --logging_dir="C:\training\logs" --log_with=tensorboard ^
 --network_module=lycoris.kohya --network_dim=64 --network_alpha=64 --network_train_unet_only ^
 --network_args "algo=locon" "preset=full" "conv_dim=64" "conv_alpha=64" ^
 --resolution="1024,1024" --enable_bucket --min_bucket_reso=768 --max_bucket_reso=1280 ^
 --bucket_reso_steps=64 --caption_extension=".txt" ^
 --lr_scheduler="constant" --learning_rate=1 --unet_lr=1 ^
 --optimizer_type="DAdaptLion" --optimizer_args "betas=(0.9,0.99)" "weight_decay=0" "d0=1e-5" ^
 --flow_matching --flow_matching_objective=vector_field --flow_matching_shift=2.5 --loss_type=fft ^
 --train_batch_size=1 --gradient_accumulation_steps=1 --max_train_epochs=4 ^
 --mixed_precision=bf16 --save_precision=bf16 --save_model_as=safetensors ^
 --save_every_n_epochs=1 --gradient_checkpointing --xformers --sdpa
"""

FAST = r"""#!/usr/bin/env bash
accelerate launch --num_cpu_threads_per_process=2  "./sdxl_train_network.py" \
    --pretrained_model_name_or_path=/models/pony.safetensors \
    --train_data_dir=/training_dir \
    --resolution="1024,1024" \
    --output_dir="/output_dir" \
    --output_name="schnell" \
    --enable_bucket \
    --min_bucket_reso=256 \
    --max_bucket_reso=2048 \
    --bucket_reso_steps=32 \
    --network_dim=8 \
    --network_alpha=4 \
    --save_model_as="safetensors" \
    --network_module="lycoris.kohya" \
    --network_args \
               "preset=full" \
               "conv_dim=256" \
               "conv_alpha=4" \
               "rank_dropout=0" \
               "module_dropout=0" \
               "use_tucker=False" \
               "use_scalar=False" \
               "rank_dropout_scale=False" \
               "algo=locon" \
               "dora_wd=False" \
               "train_norm=False" \
    --network_dropout=0 \
    --lr_scheduler="cosine" \
    --lr_scheduler_args="num_cycles=0.375" \
    --learning_rate=0.0003 \
    --unet_lr=0.0003 \
    --text_encoder_lr=0.0001 \
    --optimizer_type="library.optimizers.saveus.SAVEUS" \
    --max_grad_norm=1 \
    --no_half_vae \
    --flip_aug \
    --shuffle_caption \
    --caption_extension=".txt" \
    --cache_latents \
    --cache_latents_to_disk \
    --multires_noise_iterations=12 \
    --multires_noise_discount=0.4 \
    --mixed_precision="bf16" \
    --save_precision="fp16" \
    --train_batch_size=8 \
    --gradient_accumulation_steps=6 \
    --gradient_checkpointing \
    --max_train_steps=80 \
    --save_every_n_steps=1 \
    --sample_every_n_steps=1 \
    --sample_sampler="euler_a" \
    --sample_prompts="/training_dir/sample-prompts.txt" \
    --log_prefix=xl-locon \
    --log_with=tensorboard \
    --logging_dir=/output_dir/logs \
    --max_data_loader_n_workers=8 \
    --persistent_data_loader_workers \
    --seed=1728871242 \
    --sdpa
"""
