"""What [network] puts into which layers: LoRAs, text encoders, dropouts, going on from files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapter import loaders
from tests.convert import command, small
from tests.convert.test_convert_resume import Stop
from tests.convert.test_convert_training import Memory, conditions
from tests.convert.test_convert_training import recipe as short

from recast.adapter import (
    Adapter,
    attach,
    entry_name,
    export,
    patch_from,
    read_adapter,
    rebuild,
    write_adapter,
)
from recast.adapter.decompose import decompose, zeros_full
from recast.checkpoint import Checkpoint
from recast.convert import Job, run
from recast.convert.folder import Folder
from recast.convert.groups import groups
from recast.convert.networks import kind_of, lora, put_in, shaken, sites_of, text_end
from recast.convert.proceed import check as check_start
from recast.convert.proceed import proceed
from recast.convert.start import Start
from recast.convert.texts import Told, current, now
from recast.convert.training import learn, student
from recast.errors import Refused, Stopped
from recast.layout import detect
from recast.model import Model, open_model
from recast.objective import OBJECTIVES
from recast.optim import OPTIMIZERS, build
from recast.recipe import Recipe, load, override
from recast.train.loop import set_rate

torch.set_num_threads(1)
EPS = OBJECTIVES["eps"]
LORA = {"kind": "lora", "dim": 4, "alpha": 2, "conv_dim": 6, "conv_alpha": 2}


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return open_model(home / "sdxl.safetensors", parts=("unet", "te1", "te2"), objective="eps")


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a LoRA of a few layers and both text encoders, which stop after step 2 of 3."""
    out = tmp_path_factory.mktemp("lora")
    network = {**LORA, "merge": True, "text_stop": 2, "dropout": 0.1}
    how = override(
        load("train"), network=network, data={"caption_dropout": 0.5, "null": "both"},
        train={"profile": "OUT08,te", "steps": 3, "batch": 2, "lr": 1e-2, "checkpoint_every": 1,
               "rates": {"te": 0.5}},
        watch={"validate_every": 3, "validate_on": 1},
    )  # fmt: skip
    source = home / "sdxl.safetensors"
    for _ in run(Job(source, out, how, images=home / "images", measure=False)):
        pass
    return out


def test_a_run_leaves_a_lora_and_the_model_with_it(home: Path, finished: Path) -> None:
    files = {path.name for path in finished.glob("*.safetensors")}
    assert files == {"adapter.safetensors", "lora.safetensors", "model.safetensors"}
    masters = read_adapter(finished / "adapter.safetensors")
    written = read_adapter(finished / "lora.safetensors")
    assert masters.entries.keys() == written.entries.keys()
    for name, entry in masters.entries.items():
        torch.testing.assert_close(
            written.entries[name].dense(), entry.dense(), atol=1e-5, rtol=3e-3
        )
    with (
        Checkpoint(home / "sdxl.safetensors") as before,
        Checkpoint(finished / "model.safetensors") as after,
    ):
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        sites = {entry_name(s): s for s in detect(before).sites("every")}
    assert changed == {sites[name].key for name in masters.entries}
    with Checkpoint(finished / "lora.safetensors") as file:
        told = file.metadata
    assert told["ss_text_encoder_lr"] == "0.005"
    assert told["ss_unet_lr"] == "0.01"
    assert load_recipe(told, finished) == load(finished / "recipe.toml")


def load_recipe(told: dict[str, str], folder: Path) -> Recipe:
    """The recipe of a header, whose saving is not part of it."""
    (folder / "again.toml").write_text(told["recast.recipe"], encoding="utf-8")
    return override(load(folder / "again.toml"), checkpoint_every=1)


def test_what_reads_the_captions_is_trained_and_nothing_else(model: Model, finished: Path) -> None:
    """Of SDXL's first text encoder the last layer reaches no picture; all others have moved."""
    found = read_adapter(finished / "adapter.safetensors").entries
    texts = [s for s in model.layout.sites("te") if s.block != "TE1.L01"]
    inner = [s for s in model.layout.sites("OUT08") if s.param == "weight" and len(s.shape) > 1]
    assert found.keys() == {entry_name(site) for site in texts + inner}
    assert all(entry.up.any() for entry in found.values())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("tool", ["lycoris", "diffusers", "peft"])
def test_other_loaders_answer_as_the_model_that_was_written(
    tool: str, home: Path, finished: Path, tmp_path: Path
) -> None:
    """The merged model is fp16, its LoRA was rounded once, so they agree to fp16."""
    file = finished / "lora.safetensors"
    with (
        Checkpoint(home / "sdxl.safetensors") as before,
        Checkpoint(finished / "model.safetensors") as after,
    ):
        layout = detect(before)
        if tool == "peft":
            export(file, tmp_path / "peft", "peft", layout=layout)
        names = read_adapter(file).entries.keys()
        sites = [site for site in layout.sites("every") if entry_name(site) in names]
        for part in ("unet", "te1", "te2"):
            net = loaders.network(before, part)
            untrained = loaders.answer(net, layout, part)
            if tool == "lycoris":
                count = loaders.by_lycoris(net, file, part, sites)
            elif tool == "peft":
                net, count = loaders.by_peft(net, tmp_path / "peft", part)
            else:
                count = loaders.by_diffusers(net, file, part, "sdxl")
            assert count == sum(site.part == part for site in sites)
            wanted = loaders.answer(loaders.network(after, part), layout, part)
            found = loaders.answer(net, layout, part)
            moved = (wanted - untrained).norm()
            assert moved > 1e-3 * wanted.norm(), part
            assert (found - wanted).norm() < 2e-3 * wanted.norm(), part
            assert (found - wanted).norm() < 0.2 * moved, part


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "state" / f"step{step:08d}" / "parameters.safetensors")


def test_text_encoders_stop_where_they_are_told(finished: Path) -> None:
    second, third = state(finished, 2), state(finished, 3)
    moved = {name for name in second if not torch.equal(second[name], third[name])}
    assert moved == {name for name in second if name.startswith("lora_unet")}
    assert any(name.startswith("lora_te2") and t.any() for name, t in second.items())


@pytest.mark.parametrize("profile", ["TE2.L00,TE2.PROJ", "TE1.EMB,TE1.L00", "OUT08,TE2.NORM"])
def test_whole_blocks_are_trained_with_norms_biases_and_embeddings(
    model: Model, profile: str
) -> None:
    how = override(load("train"), network={"kind": "full"}, train={"profile": profile})
    sites = sites_of(model.layout, how)
    attached = put_in(model, Start(zeros_full(model.checkpoint, sites), sites), how)
    try:
        assert len(attached.parameters()) == len(sites)
        found = current(model, Told(("a red kite",), model.condition(["a red kite"])))
        answer = model.net(found)(torch.ones(1, 4, 8, 8), torch.tensor([0.3]))
        answer.square().sum().backward()
        still = {name for name, p in attached.named().items() if p.grad is None or not p.grad.any()}
        assert still <= {name for name in still if "k_proj" in name and name.endswith("diff_b")}
    finally:
        attached.detach()


def test_times_of_text_encoders() -> None:
    how = override(load("train"), steps=1000)
    assert text_end(how) == 1000
    assert text_end(override(how, text_stop=300)) == 300
    assert text_end(override(how, text_share=0.25)) == 250
    assert text_end(override(how, text_share=0.25, text_stop=100)) == 100


def test_parts_have_rates_and_ends_of_their_own(model: Model) -> None:
    how = override(
        load("train"), network={**LORA, "text_share": 0.25},
        train={"profile": "OUT07,OUT08,te", "steps": 100, "lr": 3e-4,
               "rates": {"te": 1 / 3, "TE2.L02": 0.1, "*conv1*": 2.0}},
    )  # fmt: skip
    sites = sites_of(model.layout, how)
    attached = put_in(model, Start(lora(model.checkpoint, sites, how), sites), how)
    try:
        named, made = groups(attached, model.layout, how)
    finally:
        attached.detach()
    found = {(group["name"], round(group["lr"], 9), group.get("until")) for group in made}
    assert found == {
        ("unet", 6e-4, None), ("unet", 3e-4, None),
        ("te1", 1e-4, 25), ("te2", 1e-4, 25), ("te2", 3e-5, 25),
    }  # fmt: skip
    assert made[0]["name"] == "unet"
    listed = [id(p) for group in made for p in group["params"]]
    assert listed == [id(p) for p in named.values()]
    assert len(listed) == 2 * len(sites)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_leaves_a_part_alone_once_it_has_ended(name: str) -> None:
    made = torch.Generator().manual_seed(0)
    lives, ends = (torch.nn.Parameter(torch.randn(4, 3, generator=made)) for _ in range(2))
    try:
        optimizer = build(
            name, [{"params": [lives], "lr": 0.1, "name": "unet"},
                   {"params": [ends], "lr": 0.1, "name": "te1", "until": 2}], lr=0.1,
        )  # fmt: skip
    except Refused as reason:
        pytest.skip(str(reason))
    kept = []
    for done in range(5):
        set_rate(optimizer, 1.0, done)
        optimizer.zero_grad(set_to_none=True)
        loss = (lives + ends - 1).square().sum()
        loss.backward()
        assert (ends.grad is None) == (done >= 2)
        optimizer.step()
        kept.append((lives.detach().clone(), ends.detach().clone()))
    assert all(torch.equal(kept[2][1], later[1]) for later in kept[2:])
    assert not torch.equal(kept[2][0], kept[4][0])
    assert torch.isfinite(lives).all()


def test_captions_are_read_by_the_encoders_as_they_are(model: Model) -> None:
    """The cache's condition where nothing is trained; zeros stay zeros; gradients reach both."""
    captions = ("a red kite", "", "two boats")
    with torch.no_grad():
        cached = model.condition(captions, time_ids=[(64, 64, 0, 8, 64, 64)] * 3)
    zeroed = torch.tensor([False, False, True])
    cached = cached.zeros().where(zeroed, cached)
    how = override(load("train"), network=LORA, train={"profile": "te"})
    start = lora(model.checkpoint, sites_of(model.layout, how), how)
    attached = put_in(model, Start(start, sites_of(model.layout, how)), how)
    try:
        found = current(model, Told(captions, cached))
        for name in ("context", "pooled", "time_ids"):
            torch.testing.assert_close(getattr(found, name), getattr(cached, name))
        assert found.context.requires_grad
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        found = current(model, Told(captions, cached))
        assert not torch.allclose(found.context[0], cached.context[0], atol=1e-2)
        assert not torch.allclose(found.context[1], cached.context[1], atol=1e-2)  # the empty one
        assert not found.context[2].any()
        (found.context.square().sum() + found.pooled.square().sum()).backward()
        assert all(p.grad is not None and p.grad.any() for p in attached.parameters())
        with attached.teacher():
            assert torch.equal(now(model, captions, cached).context, cached.context)
        assert current(model, cached) is cached
    finally:
        attached.detach()


def learnt(model: Model, how: Recipe, root: Path, stops: bool = False) -> Adapter:
    """What two steps make of a network, or what is saved when it is stopped after the first."""
    sites = sites_of(model.layout, how)
    if kind_of(how) == "lora":
        start = lora(model.checkpoint, sites, how)
    else:
        start = decompose(model.checkpoint, sites, how.train.rank)
    attached = put_in(model, Start(start, sites), how)
    root.mkdir(exist_ok=True)
    material = Memory(how, EPS)
    events = learn(model, attached, material, how, EPS, root, "run", lambda: 2 * stops)
    try:
        while True:
            next(events)
    except StopIteration as end:
        return end.value
    except Stopped:
        return start
    finally:
        attached.detach()


@pytest.mark.parametrize("kind", ["principal", "lora"])
def test_dropouts_are_drawn_by_seed_and_step(model: Model, kind: str, tmp_path: Path) -> None:
    """Two runs are one, whatever the process drew before, and so is one that was stopped."""
    drops = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}
    how = short("eps", train={"profile": "OUT07,OUT08" if kind == "lora" else "kohya", "rank": 2})
    how = override(how, target={"teacher": "data"}, network={**LORA, "kind": kind})
    shaken = override(how, network=drops)
    whole = learnt(model, shaken, tmp_path / "a")
    torch.manual_seed(99)
    learnt(model, shaken, tmp_path / "b", stops=True)
    resumed = learnt(model, shaken, tmp_path / "b")
    plain = learnt(model, how, tmp_path / "c")
    for name, entry in whole.entries.items():
        assert torch.equal(entry.up, resumed.entries[name].up), name
        assert torch.equal(entry.down, resumed.entries[name].down), name
    assert any(not torch.equal(e.up, plain.entries[n].up) for n, e in whole.entries.items())


def test_each_draw_has_dropouts_of_its_own(model: Model) -> None:
    """Whoever takes it, and whatever came between: another process, another accumulation."""
    how = short(
        "eps", train={"profile": "OUT08", "accumulate": 2}, network={**LORA, "dropout": 0.4}
    )
    draws = list(islice(shaken(Memory(how, EPS).draws(0), how, 0), 4))
    assert len({draw.shake for draw in draws}) == 4
    later = next(iter(shaken(Memory(how, EPS).draws(1), how, 1)))
    assert later.shake == draws[2].shake
    plain = override(how, network={"dropout": 0.0})
    assert next(iter(shaken(Memory(plain, EPS).draws(0), plain, 0))).shake is None
    sites = sites_of(model.layout, how)
    attached = put_in(model, Start(lora(model.checkpoint, sites, how), sites), how)
    try:
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        answer = student(model, EPS)
        first = answer(draws[0]).detach()
        assert not torch.equal(answer(draws[1]).detach(), first)
        assert torch.equal(answer(draws[0]).detach(), first)
        other = answer(replace(draws[0], shake=draws[1].shake)).detach()
        assert not torch.equal(other, first)
    finally:
        attached.detach()


def made_elsewhere(model: Model, folder: Path, profile: str = "OUT08") -> Path:
    """A LoRA of another trainer: its own ranks and alpha, no word of Recast in its header."""
    tensors = {}
    for site in model.layout.sites(profile):
        if site.param != "weight" or len(site.shape) < 2:
            continue
        made = torch.Generator().manual_seed(len(tensors))
        ones = (1,) * (len(site.shape) - 2)
        tensors[f"{site.lora}.lora_up.weight"] = torch.randn(
            site.shape[0], 5, *ones, generator=made
        )
        tensors[f"{site.lora}.lora_down.weight"] = torch.randn(5, *site.shape[1:], generator=made)
        tensors[f"{site.lora}.alpha"] = torch.tensor(2.5)
    save_file(tensors, folder / "theirs.safetensors", {"ss_network_dim": "5"})
    return folder / "theirs.safetensors"


def job_from(model: Model, folder: Path, weights: Path, profile: str, **network: object) -> Job:
    how = override(
        load("train"), train={"profile": profile, "rank": 3},
        network={**LORA, "weights": str(weights), **network},
    )  # fmt: skip
    return Job(model.checkpoint.path, folder, how, images=folder, measure=False)


def began(model: Model, folder: Path, job: Job) -> Start:
    """The start of a job, from its own files the second time."""
    folder.mkdir(exist_ok=True)
    check_start(model.checkpoint, model.layout, job, "eps")
    for _ in range(2):
        events = proceed(model.checkpoint, model.layout, Folder(folder, "run"), job)
        try:
            while True:
                next(events)
        except StopIteration as end:
            found = end.value
    return found


@pytest.mark.parametrize("kind", ["lora", "full", "principal"])
@pytest.mark.parametrize("form", ["kohya", "peft", "diffusers"])
def test_a_run_goes_on_from_any_format(model: Model, kind: str, form: str, tmp_path: Path) -> None:
    """The student is the network with the file in it; what the profile leaves out stays."""
    theirs = made_elsewhere(model, tmp_path, "OUT07,OUT08")
    given = theirs
    if form != "kohya":
        given = tmp_path / ("peft" if form == "peft" else "d.safetensors")
        export(theirs, given, form, layout=model.layout)
    profile = "OUT08" if kind != "principal" else "OUT08,IN01"
    if kind == "principal":
        profile = "*up_blocks.2.resnets.2*conv*.weight,*down_blocks.0.resnets.0.conv*.weight"
    job = job_from(model, tmp_path / "run", given, profile, kind=kind)
    start = began(model, tmp_path / "run", job)
    change = read_adapter(theirs)
    outside = {
        n
        for n in change.entries
        if n not in {entry_name(s) for s in sites_of(model.layout, job.recipe)}
    }
    assert start.held == outside
    assert outside
    attached = put_in(model, start, job.recipe)
    question = small_question(model)
    try:
        with torch.no_grad():
            ours = question()
        assert set(attached.named()) == {
            key
            for site in sites_of(model.layout, job.recipe)
            for key in keys_of(kind, site.lora, site.param)
        }
        patch = patch_from(start.initial, attached.trained())
    finally:
        attached.detach()
    expected = attach({"unet": model.unet}, change, model.layout.sites("unet"))
    with torch.no_grad():
        wanted = question()
    expected.detach()
    assert (ours - wanted).norm() < 1e-5 * wanted.norm()
    for name, entry in change.entries.items():
        torch.testing.assert_close(patch.entries[name].dense(), entry.dense(), atol=1e-5, rtol=1e-4)


def keys_of(kind: str, module: str, param: str) -> tuple[str, ...]:
    if kind == "full":
        return (f"{module}.diff" if param == "weight" else f"{module}.diff_b",)
    return f"{module}.lora_up.weight", f"{module}.lora_down.weight"


def small_question(model: Model) -> Callable[[], torch.Tensor]:
    """Ask the UNet the same thing again and again."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=made)
    bound = replace(conditions(1, "asked"), context=torch.randn(1, 7, 80, generator=made))
    return lambda: model.net(bound)(x, torch.tensor([0.4]))


def test_a_lora_goes_on_at_its_own_rank_with_the_recipes_alpha(
    model: Model, tmp_path: Path
) -> None:
    """kohya's factors are the masters where alpha is the file's; new layers start from zero."""
    theirs = made_elsewhere(model, tmp_path)
    tensors = load_file(theirs)
    job = job_from(model, tmp_path / "run", theirs, "OUT08,OUT07", alpha=2.5, conv_alpha=2.5)
    start = began(model, tmp_path / "run", job)
    attached = put_in(model, start, job.recipe)
    try:
        for key, master in attached.named().items():
            if key in tensors:
                wanted = tensors[key].flatten(1) if "up" in key else tensors[key]
                torch.testing.assert_close(master.detach(), wanted, rtol=1e-6, atol=0)
            else:
                assert "output_blocks_7" in key
                assert master.any() == ("down" in key)
        assert {spot.layer.scale for spot in attached.spots} == {0.5, 2.5 / 4, 2.5 / 6}
    finally:
        attached.detach()


def test_principal_factors_of_another_run_go_on(model: Model, tmp_path: Path) -> None:
    profile = "*up_blocks.2.resnets.2.conv*.weight"
    sites = model.layout.sites(profile)
    initial = decompose(model.checkpoint, sites, 3)
    attached = attach({"unet": model.unet}, initial, sites)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter += 0.01
    before = attached.trained()
    attached.detach()
    write_adapter(tmp_path / "adapter.safetensors", before)
    job = job_from(
        model, tmp_path / "run", tmp_path / "adapter.safetensors", profile, kind="principal"
    )
    with pytest.raises(Refused, match=r"put that run's initial\.safetensors beside it"):
        check_start(model.checkpoint, model.layout, job, "eps")
    write_adapter(tmp_path / "initial.safetensors", initial)
    start = began(model, tmp_path / "run", job)
    attached = put_in(model, start, job.recipe)
    after = attached.trained()
    attached.detach()
    for name, entry in before.entries.items():
        assert torch.equal(after.entries[name].up, entry.up)
        assert torch.equal(start.initial.entries[name].up, initial.entries[name].up)


REFUSED = {
    "other-hash": (
        lambda m, f: stated(made_elsewhere(m, f), "ss_new_sd_model_hash"),
        "ab12.*--far",
    ),
    "own-hash": (lambda m, f: stated(made_elsewhere(m, f), "recast.base_sha256"), "ab12.*--far"),
    "other-shape": (
        lambda m, f: shrunk(made_elsewhere(m, f)),
        "other shapes .* first lora_unet_out",
    ),
    "other-names": (lambda m, f: strange(made_elsewhere(m, f)), "no place .* lora_unet_nowhere"),
    "other-objective": (
        lambda m, f: stated(made_elsewhere(m, f), "recast.objective", "flow"),
        "predicts flow, and eps is trained here",
    ),
    "principal": (
        lambda m, f: stated(made_elsewhere(m, f), "recast.role", "pissa-init"),
        "initial",
    ),
    "no-file": (lambda m, f: f / "none.safetensors", "none.safetensors"),
}


def stated(path: Path, key: str, value: str = "ab12" * 16) -> Path:
    save_file(load_file(path), path, {key: value})
    return path


def shrunk(path: Path) -> Path:
    save_file({k: t if k.endswith("alpha") else t[:, :-1].contiguous() if "down" in k else t
               for k, t in load_file(path).items()}, path)  # fmt: skip
    return path


def strange(path: Path) -> Path:
    found = load_file(path)
    save_file({f"lora_unet_nowhere.{k.partition('.')[2]}": t for k, t in found.items()}, path)
    return path


@pytest.mark.parametrize("fault", list(REFUSED))
def test_an_adapter_for_another_base_is_refused(model: Model, fault: str, tmp_path: Path) -> None:
    make, words = REFUSED[fault]
    job = job_from(model, tmp_path / "run", make(model, tmp_path), "OUT08")
    with pytest.raises(Refused, match=words) as refusal:
        check_start(model.checkpoint, model.layout, job, "eps")
    assert "\n" not in str(refusal.value)
    if "hash" in fault or fault == "other-objective":
        check_start(model.checkpoint, model.layout, replace(job, far=True), "eps")


COMMANDS = {
    "lr": ("--lr 0", "train.lr is 0"),
    "kind": ("--network loha", "permitted are 'auto', 'principal', 'lora' or 'full'"),
    "alpha": ("--network lora --alpha 0", "network.alpha is 0"),
    "te-dreams": ("--te --recipe DREAMS", "learn from the captions of images"),
    "te-teacher": ("--te --recipe TEACHER", "set target.teacher to data"),
    "dropout": ("--network full --recipe DROPOUT", "act on low-rank changes"),
    "nothing": ("--network lora --conv-dim 0 --recipe CONVS", "names no layer"),
    "rank": ("--network principal --recipe RANKLESS", "train.rank is 0"),
}
RECIPES = {
    "DREAMS": '[data]\nsource = "mix"\nmix_with = "dreams"\n'
    '[target]\nteacher = "data"\nobjective = "same"\n',
    "TEACHER": '[data]\nsource = "images"\n[target]\nobjective = "same"\n',
    "DROPOUT": "[network]\ndropout = 0.1\n",
    "CONVS": '[train]\nprofile = "*conv1.weight"\n',
    "RANKLESS": '[train]\nrank = 0\nprofile = "principal"\n',
}


@pytest.mark.parametrize("fault", list(COMMANDS))
def test_a_network_that_cannot_be_is_one_sentence(
    fault: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, words = COMMANDS[fault]
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        options = options.replace(name, str(tmp_path / f"{name}.toml"))
    line = ["train", str(home / "sdxl.safetensors"), str(home / "images"), "--out"]
    line += [str(tmp_path / "out"), *options.split()]
    command.run(line, code=2)
    said = capsys.readouterr().err
    assert words in " ".join(said.split())
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_lora_of_sd15_that_was_stopped_ends_with_the_same_bytes(
    home: Path, tmp_path: Path
) -> None:
    """Text encoder and dropouts too; both lie in what a run draws anew in every step."""
    network = {**LORA, "dropout": 0.2, "rank_dropout": 0.2, "text_stop": 2}
    how = override(
        load("train"), network=network, data={"caption_dropout": 0.5},
        train={"profile": "OUT08,te", "steps": 3, "batch": 2, "lr": 1e-2, "rates": {"te": 0.3}},
    )  # fmt: skip
    source = home / "sd15.safetensors"
    whole, broken = (
        Job(source, tmp_path / name / "run", how, images=home / "images", measure=False)
        for name in ("whole", "broken")
    )
    small.convert(whole)
    for step in (1, 2):
        with pytest.raises(Stopped, match=f"stopped after step {step};"):
            Stop("train").follow(broken)
    small.convert(broken)
    names = ("adapter.safetensors", "lora.safetensors", "log.jsonl")
    assert small.contents(broken.out, names) == small.contents(whole.out, names)
    found = read_adapter(whole.out / "lora.safetensors").entries
    assert sum(name.startswith("lora_te_") for name in found) == 12
    assert all(entry.up.any() for entry in found.values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_a_lora_learns_on_a_quantised_base(base: str, home: Path, tmp_path: Path) -> None:
    """UNet and text encoders are quantised whole, and a second run goes on from the first."""
    how = override(
        load("train"), network={**LORA, "merge": True}, base=base,
        train={"profile": "lycoris-full,te", "steps": 2, "batch": 1, "lr": 1e-2},
    )  # fmt: skip
    first = Job(
        home / "sdxl.safetensors", tmp_path / "1", how, images=home / "images", measure=False
    )
    small.convert(first)
    again = override(how, network={"weights": str(tmp_path / "1" / "lora.safetensors")})
    small.convert(replace(first, out=tmp_path / "2", recipe=again))
    entries = [read_adapter(tmp_path / n / "lora.safetensors").entries for n in ("1", "2")]
    assert entries[0].keys() == entries[1].keys()
    assert all(entry.up.any() for entry in entries[0].values())
    moved = sum((entries[1][n].dense() - e.dense()).norm() > 1e-4 for n, e in entries[0].items())
    assert moved > 0.9 * len(entries[0])
    with (
        Checkpoint(first.model) as before,
        Checkpoint(tmp_path / "1" / "model.safetensors") as after,
    ):
        trained = read_adapter(tmp_path / "1" / "adapter.safetensors")
        for key, tensor in rebuild(before, None, trained):
            assert after[key].equal(tensor), key
