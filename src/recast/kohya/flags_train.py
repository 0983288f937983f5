"""Rows of the flag table: optimizer, rates, schedule, steps, precision, machines."""

from __future__ import annotations

from recast.kohya.flag import Flag, choice, idle, key, on, refused, through
from recast.kohya.flags_model import ALWAYS
from recast.kohya.turns import optimizer, rates, schedule, steps, warmup

MASTERS = "what is trained is always fp32; the frozen weights follow --mixed_precision"
PROCESSES = "processes are accelerate's: accelerate launch -m recast train …"
DEEPSPEED = "DeepSpeed is not supported"

# fmt: off
TRAIN = (
    Flag("optimizer_type", "word", through(optimizer, "train.optimizer", "train.optimizer_args")),
    Flag("optimizer_args", "words", through(optimizer, "train.optimizer_args")),
    Flag("use_8bit_adam", "switch", through(optimizer, "train.optimizer")),
    Flag("use_lion_optimizer", "switch", through(optimizer, "train.optimizer")),
    Flag("learning_rate", "number", through(rates, "train.lr", "train.rates"),
        "2e-6 where no rate is given, as in sd-scripts"),
    Flag("unet_lr", "number", through(rates, "train.lr", "train.rates"), "0 leaves the UNet out"),
    Flag("text_encoder_lr", "numbers", through(rates, "train.lr", "train.rates"),
        "factors of the UNet's rate; 0 leaves them out"),
    Flag("max_grad_norm", "number", key("train.clip")),
    Flag("fused_backward_pass", "switch", idle("an adapter's gradients are small")),
    Flag("lr_scheduler", "word", through(schedule, "train.schedule")),
    Flag("lr_scheduler_type", "word", refused("schedules are those of train.schedule")),
    Flag("lr_scheduler_args", "words", through(schedule, "train.cycles")),
    Flag("lr_warmup_steps", "share", through(warmup, "train.warmup")),
    Flag("lr_decay_steps", "share", refused("a rate falls until the last step", 0.0)),
    Flag("lr_scheduler_num_cycles", "whole", through(schedule, "train.cycles"),
        "restarts of `cosine_with_restarts`"),
    Flag("lr_scheduler_power", "number", through(schedule, "train.power"), "of `polynomial`"),
    Flag("lr_scheduler_timescale", "whole", refused("there is no inverse square root schedule")),
    Flag("lr_scheduler_min_lr_ratio", "number", key("train.floor")),
    Flag("max_train_steps", "whole", through(steps, "train.steps"),
        "1600 where nothing is given, as in sd-scripts"),
    Flag("max_train_epochs", "whole", through(steps, "train.max_epochs"),
        "goes before `--max_train_steps`"),
    Flag("train_batch_size", "whole", key("train.batch")),
    Flag("gradient_accumulation_steps", "whole", key("train.accumulate")),
    Flag("gradient_checkpointing", "switch", on(train__recompute=True)),
    Flag("cpu_offload_checkpointing", "switch", refused("activations stay on the device")),
    Flag("seed", "whole", key("train.seed"),
        "0 where none is given; order, noise and times depend on nothing else"),
    Flag("mixed_precision", "word", choice("train.precision", {"no": "fp32", "fp16": "fp16",
        "bf16": "bf16"})),
    Flag("full_fp16", "switch", idle(MASTERS)),
    Flag("full_bf16", "switch", idle(MASTERS)),
    Flag("fp8_base", "switch", on(train__base="8bit"), "8-bit integers with a scale per row"),
    Flag("fp8_base_unet", "switch", on(train__base="8bit"), "8-bit integers with a scale per row"),
    Flag("xformers", "switch", idle(ALWAYS)),
    Flag("sdpa", "switch", idle(ALWAYS)),
    Flag("mem_eff_attn", "switch", idle(ALWAYS)),
    Flag("torch_compile", "switch", on(train__compile=True)),
    Flag("dynamo_backend", "word", idle("torch.compile takes its default, inductor")),
    Flag("ddp_timeout", "whole", idle(PROCESSES)),
    Flag("ddp_gradient_as_bucket_view", "switch", idle(PROCESSES)),
    Flag("ddp_static_graph", "switch", idle(PROCESSES)),
    Flag("deepspeed", "switch", refused(DEEPSPEED)),
    Flag("zero_stage", "whole", idle("it belongs to --deepspeed")),
    Flag("offload_optimizer_device", "word", idle("it belongs to --deepspeed")),
    Flag("offload_optimizer_nvme_path", "word", idle("it belongs to --deepspeed")),
    Flag("offload_param_device", "word", idle("it belongs to --deepspeed")),
    Flag("offload_param_nvme_path", "word", idle("it belongs to --deepspeed")),
    Flag("zero3_init_flag", "switch", idle("it belongs to --deepspeed")),
    Flag("zero3_save_16bit_model", "switch", idle("it belongs to --deepspeed")),
    Flag("fp16_master_weights_and_gradients", "switch", idle("it belongs to --deepspeed")),
)
# fmt: on

# of accelerate launch itself
# fmt: off
LAUNCHED = (
    Flag("num_cpu_threads_per_process", "whole",
        idle("torch takes as many threads as OMP_NUM_THREADS says")),
    Flag("mixed_precision", "word", idle("the script's own --mixed_precision counts")),
    Flag("num_processes", "whole", refused(PROCESSES, 1)),
    Flag("num_machines", "whole", refused(PROCESSES, 1)),
    Flag("machine_rank", "whole", refused(PROCESSES, 0)),
    Flag("main_process_ip", "word", refused(PROCESSES)),
    Flag("main_process_port", "whole", idle("there is one process")),
    Flag("multi_gpu", "switch", refused(PROCESSES)),
    Flag("gpu_ids", "word", idle("give recast kohya --device, or CUDA_VISIBLE_DEVICES")),
    Flag("dynamo_backend", "word", idle("train.compile says whether to compile")),
    Flag("config_file", "word",
        idle("accelerate's own settings; --mixed_precision is the script's")),
    Flag("dynamo_mode", "word", idle("train.compile says whether to compile")),
    Flag("enable_cpu_affinity", "switch", idle(PROCESSES)),
    Flag("quiet", "switch", idle("nothing of accelerate is printed")),
    Flag("cpu", "switch", idle("give recast kohya --device cpu")),
    Flag("use_cpu", "switch", idle("give recast kohya --device cpu")),
    Flag("module", "switch", idle("the script is not run")),
)
# fmt: on
