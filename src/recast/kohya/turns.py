"""What flags become that only mean something together: network, rates, schedule, objective."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from recast.errors import Refused
from recast.kohya.flag import Given, Idle, Outcome, Settings, Turn, through

SDXL = "sdxl_train_network.py"
RATE = 2e-6  # sd-scripts' learning rate where none is given
STEPS = 1600
MOST = 10**6  # steps, where epochs alone end a run
WEIGHT_DECAY = 0.01  # torch's, for an AdamW without arguments

# sd-scripts' names in lower case
OPTIMIZERS = {
    **{name: name for name in ("adamw", "lion", "prodigy", "adafactor", "saveus", "adamw8bit")},
    **{name: name for name in ("dadaptlion", "dadaptadam", "dadaptadan", "dadaptadagrad")},
    "dadaptsgd": "dadaptsgd",
    "": "adamw",
    "dadaptation": "dadaptadam",
    "dadaptadampreprint": "dadaptadam",
    "prodigyplus.prodigyplusschedulefree": "prodigyplus",
    "prodigyplusschedulefree": "prodigyplus",
    "library.optimizers.saveus.saveus": "saveus",
}
SCHEDULES = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine-restarts"}
SOLVERS = {  # sd-scripts' samplers
    **{name: name for name in ("ddim", "euler", "heun")},
    "k_euler": "euler",
    "euler_a": "euler_ancestral",
    "k_euler_a": "euler_ancestral",
    "dpmsolver++": "dpmpp_2m",
    "dpmsolver": "dpmpp_2m",
}


def pairs(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """`key=value` texts as Python reads their values; words that are no literals stay words."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, said = text.partition("=")
        if not equals or not name.strip():
            raise Refused(f"--{flag} takes name=value, not {text!r}.")
        try:
            read = ast.literal_eval(said.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            read = {"true": True, "false": False}.get(said.strip().lower(), said.strip())
        found[name.strip()] = list(read) if isinstance(read, tuple) else read
    return found


def parts(given: Given) -> dict[str, float]:
    """The learning rate of each part that is trained: unet, te1 and, in SDXL, te2.

    As in sd-scripts: --unet_lr and --text_encoder_lr before --learning_rate, 0 leaves a part out.
    """
    texts = ("te1", "te2") if given.get("script", SDXL) == SDXL else ("te1",)
    common = given.get("learning_rate", RATE)
    alone = given.get("network_train_text_encoder_only")
    rates = {} if alone else {"unet": given.get("unet_lr", common)}
    if not given.get("network_train_unet_only"):
        said = given.get("text_encoder_lr") or [common]
        each = [*said, *said[-1:] * len(texts)][: len(texts)]
        rates |= dict(zip(texts, each, strict=True))
    return {part: rate for part, rate in rates.items() if rate > 0}


def rates(value: Any, given: Given) -> Outcome:
    """The recipe's one rate and the factors of the parts that have another."""
    found = parts(given)
    if not found:
        raise Refused("{flag}: every learning rate is 0, so nothing would be trained.")
    first = next(iter(found.values()))
    factors = {part: float(f"{rate / first:.9g}") for part, rate in found.items() if rate != first}
    return {"train.lr": first, "train.rates": factors}


def optimizer(value: Any, given: Given) -> Outcome:
    """The optimizer's name and arguments; classes by their dotted path stay as they are.

    Whichever of its flags is met: the old switches count where --optimizer_type is silent.
    """
    old = {"use_8bit_adam": "adamw8bit", "use_lion_optimizer": "lion"}
    switched = next((name for flag, name in old.items() if given.get(flag)), "")
    value = given.get("optimizer_type") or switched
    name = OPTIMIZERS.get(value.lower(), value)
    if name == value and "." not in value and value not in OPTIMIZERS.values():
        raise Refused(
            f"{{flag}} {value} has no equivalent here: {', '.join(filter(None, OPTIMIZERS))} have, "
            "and any class by its dotted path."
        )
    said = pairs(given.get("optimizer_args") or [], "optimizer_args")
    if name == "adamw":
        said = {"weight_decay": WEIGHT_DECAY, **said}
    if name == "saveus":  # sd-scripts runs the published code, see recast.optim.saveus
        said = {"in_place": True, **said}
    first = next(iter(parts(given).values()), RATE)
    return {"train.optimizer": name, "train.lr": first, "train.optimizer_args": said}


def schedule(value: Any, given: Given) -> Outcome:
    """The schedule of the rates with its cycles, whichever of its flags is met."""
    value = given.get("lr_scheduler", "constant")
    said = pairs(given.get("lr_scheduler_args") or [], "lr_scheduler_args")
    if odd := said.keys() - {"num_cycles"}:
        raise Refused(f"--lr_scheduler_args {', '.join(sorted(odd))}: num_cycles alone is known.")
    settings: Settings = {"train.schedule": SCHEDULES.get(value, value)}
    if value == "cosine" and "num_cycles" in said:
        settings["train.cycles"] = float(said["num_cycles"])
    if value == "cosine_with_restarts":
        given = {"lr_scheduler_num_cycles": 1, **given}
        settings["train.cycles"] = float(said.get("num_cycles", given["lr_scheduler_num_cycles"]))
    if value == "polynomial":
        settings["train.power"] = float(given.get("lr_scheduler_power", 1))
    return settings


def steps(value: Any, given: Given) -> Outcome:
    """How long: epochs go before steps."""
    if "max_train_epochs" in given:
        return {"train.max_epochs": given["max_train_epochs"], "train.steps": MOST}
    return {"train.steps": given.get("max_train_steps", STEPS)}


def last_steps(value: Any, given: Given) -> Outcome:
    """Files of so many steps as files: those of the newest steps stay."""
    every = given.get("save_every_n_steps")
    if not every:
        return Idle("it belongs to --save_every_n_steps")
    return {"save.keep_last": max(1, value // every)}


def out(value: Any, given: Given) -> Outcome:
    """The run's folder, and by it the name of its files."""
    return {"OUT": f"{given.get('output_dir', '.')}/{given.get('output_name', 'last')}"}


def sampler(value: str, given: Given) -> Outcome:
    """The sampler of previews; of an ancestral one Euler's, as sd-scripts spells them."""
    if value not in SOLVERS:
        raise Refused(f"{{flag}} {value} is none of the samplers here: {', '.join(SOLVERS)} are.")
    return {"watch.preview_solver": SOLVERS[value]}


def prompts(value: str, given: Given) -> Outcome:
    """A prompts file of lines; those of sd-scripts' other kinds would be read as prompts."""
    if value.lower().endswith((".toml", ".json")):
        raise Refused("{flag} " + value + " is no file of lines: write a prompt a line as .txt.")
    return {"watch.prompts": value}


def samples(name: str) -> Turn:
    """A key of previews, which there are none of without a prompts file."""

    def apply(value: Any, given: Given) -> Outcome:
        if "sample_prompts" not in given:
            return Idle("it needs --sample_prompts, as in sd-scripts")
        return {name: value}

    return through(apply, name)


def clip_skip(value: int, given: Given) -> Outcome:
    """The layer of the text encoder is fixed."""
    if given.get("script", SDXL) == SDXL:
        return Idle("SDXL takes the last layer but one, here and in sd-scripts")
    if value != 1:
        raise Refused("{flag} cannot be honoured: SD 1.5's text encoder is read at its end.")
    return Idle("1 is the end of the text encoder")


def resolution(value: str, given: Given) -> Outcome:
    """The side of a square of the same area, which is all that buckets take from it."""
    try:
        sides = [int(side) for side in value.split(",")]
    except ValueError as error:
        raise Refused(f"{{flag}} takes size, or width,height; not {value!r}.") from error
    width, height = sides * 2 if len(sides) == 1 else sides[:2]
    if width != height and not given.get("enable_bucket"):
        raise Refused(
            "{flag}: one size other than a square needs --enable_bucket, or a --dataset_config."
        )
    return {"data.size": round((width * height) ** 0.5)}


def folder(value: str, given: Given) -> Outcome:
    """The images, unless a dataset file says where they are."""
    if "dataset_config" in given:
        return Idle("--dataset_config goes before it, as in sd-scripts")
    return {"IMAGES": value}


def of_vae(name: str) -> Any:
    """A number that says something of --vae."""

    def apply(value: float, given: Given) -> Outcome:
        if "vae" not in given:
            raise Refused("{flag} says something of a VAE: give --vae too.")
        return {name: value}

    return apply


def warmup(value: float, given: Given) -> Outcome:
    """Steps, from a share of the run's too."""
    if value >= 1 or not value:
        return {"train.warmup": int(value)}
    if "max_train_epochs" in given:
        raise Refused("{flag}: a share needs --max_train_steps: give the number of steps.")
    return {"train.warmup": int(value * given.get("max_train_steps", STEPS))}


def objective(value: Any, given: Given) -> Outcome:
    """What the network learns to predict."""
    if given.get("flow_matching") or given.get("flow_model"):
        if given.get("v_parameterization"):
            raise Refused("{flag}: flow matching and --v_parameterization exclude each other.")
        return {"target.objective": "flow"}
    zero = given.get("zero_terminal_snr")
    if given.get("v_parameterization"):
        return {"target.objective": "v-zsnr" if zero else "v"}
    if zero:
        raise Refused(
            "{flag} needs --v_parameterization: at pure noise eps is the input itself, so nothing "
            "of the picture can be learnt there."
        )
    return Idle("it is off")
