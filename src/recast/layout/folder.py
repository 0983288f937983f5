"""A diffusers folder that presents itself as the single file it would be.

Names and shapes are the blueprint's, of the plan that the configurations describe; the key map says
from which parameters each tensor is put together: q, k and v stacked, a projection transposed, 1x1
kernels added.  Opening checks the number of tensors and of values in each part, without torch; the
first tensor that is read checks every name and shape.

What a folder has no place for lies in `recast.safetensors` beside model_index.json, if Recast wrote
it: markers, tensors that no network reads, the header, and the hash of the file it was made from.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from recast.checkpoint import DTYPES, Checkpoint, Spec
from recast.errors import RecastError, Refused
from recast.header import place
from recast.layout import latents
from recast.layout.blueprint import Shape, blueprint
from recast.layout.configs import SAMPLE
from recast.layout.keymap import Entry, trace
from recast.layout.names import PART_NAMES, TEXTS, UNET, VAE
from recast.layout.pipeline import SUBFOLDERS, read_index, read_plan
from recast.layout.scheduler import stated_by
from recast.layout.weights import Weights, read_json
from recast.markers import OBJECTIVES, OWN, SCHEDULER, marker_specs

OWN_FILE = "recast.safetensors"
FOLDER_HASH, FILE_HASH = "recast.folder.sha256", "recast.folder.file_sha256"
SIZE_KEY = "recast.size"
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
IGNORED = re.compile(r"(text_model\.)?embeddings\.position_ids")  # what no network reads
ALSO_IGNORED = {"te1": re.compile(r"text_projection\.weight")}
# names that diffusers gave the VAE's attention until 0.17: most SD 1.5 folders have them still
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a single file or a diffusers folder; raises Refused for anything else."""
    path = Path(path)
    return Checkpoint(path, store=Folder(path)) if path.is_dir() else Checkpoint(path)


class Folder:
    """The parts of a diffusers folder as one store of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = read_index(path)
        self.plan, size = read_plan(path, index)
        self.objective = _scheduled(path)
        self.parts: dict[str, Weights] = {}
        self._own: Checkpoint | None = None
        try:
            self._shapes = blueprint(self.plan)
            self._open()
            self.metadata = self._metadata(size)
            self.specs = self._specs()
        except RecastError:
            self.close()
            raise

    def _open(self) -> None:
        """Open every part and compare counts."""
        prefixes = {"unet": UNET, "vae": VAE, **TEXTS[self.plan.family]}
        self._keys = {
            part: {k: s for k, s in self._shapes.items() if k.startswith(prefix)}
            for part, prefix in prefixes.items()
        }
        for part in [part for part, keys in self._keys.items() if keys]:
            self.parts[part] = Weights(self.path / SUBFOLDERS[part], STEMS.get(part, "model"))
            if self._counts(part) != expected_counts(self._keys[part]):
                self._refuse_names(part)
        if (self.path / OWN_FILE).exists():
            self._own = Checkpoint(self.path / OWN_FILE)

    def _counts(self, part: str) -> tuple[int, int]:
        found = [self.parts[part].specs[name] for name in self._named(part).values()]
        return len(found), sum(spec.numel for spec in found)

    def _named(self, part: str) -> dict[str, str]:
        """{parameter of the module: its name in the files}."""
        return {
            canonical(part, name): name
            for name in self.parts[part].specs
            if not IGNORED.fullmatch(name)
            and not (part in ALSO_IGNORED and ALSO_IGNORED[part].fullmatch(name))
        }

    @property
    def files(self) -> tuple[Path, ...]:
        own = (self._own.path,) if self._own else ()
        return (*(file for weights in self.parts.values() for file in weights.files), *own)

    @property
    def nbytes(self) -> int:
        return sum(weights.nbytes for weights in self.parts.values())

    def _metadata(self, size: int) -> dict[str, str]:
        said = {} if self.objective is None else {SCHEDULER: self.objective}
        if self.plan.vae is not None:
            config = read_json(self.path / SUBFOLDERS["vae"] / "config.json")
            said |= latents.entries(*latents.of_config(config), self.plan.family)
        if self._own is not None:
            own = {k: v for k, v in self._own.metadata.items() if k not in (FOLDER_HASH, FILE_HASH)}
            return own | said
        if self.objective in OBJECTIVES[1:]:  # eps is what silence means
            said[OWN] = str(self.objective)
        usual = 8 * SAMPLE[self.plan.family]
        return said if size == usual else {**said, SIZE_KEY: str(size)}

    def _specs(self) -> dict[str, Spec]:
        """Markers first, as in files that Recast writes, then the blueprint, then the rest."""
        own = {} if self._own is None else self._own.specs
        extra = {key: (spec.dtype, spec.shape) for key, spec in own.items()}
        first = {key: spec for key, spec in extra.items() if not math.prod(spec[1])}
        if self._own is None and self.objective in OBJECTIVES:
            first = marker_specs(str(self.objective))
        last = {key: spec for key, spec in extra.items() if key not in first}
        body: dict[str, tuple[str, Shape]] = {}
        for part, keys in self._keys.items():
            body |= {key: (self._dtype(part, key), shape) for key, shape in keys.items()}
        return place({**first, **{key: body[key] for key in self._shapes}, **last})

    def _dtype(self, part: str, key: str) -> str:
        weights, named = self.parts[part], self._dtypes[part]
        if len(named) == 1:
            return next(iter(named))
        name = self._sources[key][0][1]
        return weights.specs[name].dtype

    @cached_property
    def _dtypes(self) -> dict[str, set[str]]:
        return {
            part: {weights.specs[name].dtype for name in self._named(part).values()}
            for part, weights in self.parts.items()
        }

    @cached_property
    def _sources(self) -> dict[str, list[tuple[Entry, str]]]:
        """For each key what it is made of, after every name, shape and dtype was checked."""
        found: dict[str, list[tuple[Entry, str]]] = {}
        names = {part: self._named(part) for part in self.parts}
        for part in self.parts:
            self._refuse_names(part)
        for entry in trace(self.plan):
            found.setdefault(entry.key, []).append((entry, names[entry.part][entry.param]))
        for pieces in found.values():
            part = pieces[0][0].part
            if len({self.parts[part].specs[name].dtype for _, name in pieces}) > 1:
                raise Refused(
                    f"{self.path / SUBFOLDERS[part]} stores {pieces[0][1]} and {pieces[1][1]} in "
                    "different number formats: export it in one."
                )
            pieces.sort(key=lambda piece: piece[0].rows or (0, 0))
        return found

    def _refuse_names(self, part: str) -> None:
        """Raise Refused unless a part has every parameter of the plan, in its shape, and no other.

        Counts alone can be wrong here: the key map names what is missing.
        """
        named, specs = self._named(part), self.parts[part].specs
        wanted = {
            entry.param: piece_shape(entry, self._shapes[entry.key])
            for entry in trace(self.plan)
            if entry.part == part
        }
        absent = sorted(wanted.keys() - named.keys())
        strange = sorted(named[param] for param in named.keys() - wanted.keys())
        other = [
            f"{name} {list(specs[name].shape)}"
            for param, name in named.items()
            if param in wanted and _bare(specs[name].shape) != _bare(wanted[param])
        ]
        told = [
            f"{len(names)} tensors {what} ({', '.join(names[:3])})"
            for names, what in (
                (absent, "missing"), (strange, "that belong to no part"), (other, "misshapen"),
            )
            if names
        ]  # fmt: skip
        if told:
            raise Refused(
                f"{self.path / SUBFOLDERS[part]} has {', '.join(told)}: it is incomplete, or not "
                f"the {PART_NAMES[part]} that its config.json describes."
            )

    def raw(self, key: str) -> bytearray:
        spec = self.specs[key]
        if not spec.nbytes:
            return bytearray()
        if key not in self._shapes:
            assert self._own is not None
            return self._own.raw(key)
        pieces = self._sources[key]
        weights = self.parts[pieces[0][0].part]
        if len(pieces) == 1:
            data = weights.raw(pieces[0][1])
            return _turned(data, spec) if pieces[0][0].transpose else data
        joined = bytearray()
        for _, name in pieces:
            joined += weights.raw(name)
        return joined

    def sha256(self) -> str:
        """The file it was made from, where the weights are still that file's; else its own hash."""
        own = folder_hash(
            (f"{SUBFOLDERS[part]}/{name}", digest)
            for part, weights in self.parts.items()
            for name, digest in weights.hashes()
        )
        said = self._own.metadata if self._own else {}
        return said.get(FILE_HASH, own) if said.get(FOLDER_HASH) == own else own

    def close(self) -> None:
        for weights in self.parts.values():
            weights.close()
        if self._own is not None:
            self._own.close()


def folder_hash(files: Iterable[tuple[str, str]]) -> str:
    """sha256 over the lines "unet/file sha256" of a folder's weight files, sorted."""
    lines = sorted(f"{name} {digest}\n" for name, digest in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def expected_counts(keys: dict[str, Shape]) -> tuple[int, int]:
    """(tensors, values) of a part in a folder, where q, k and v lie apart."""
    tensors = sum(3 if ".in_proj_" in key else 1 for key in keys)
    return tensors, sum(math.prod(shape) for shape in keys.values())


def canonical(part: str, name: str) -> str:
    """The module's parameter that a name in a folder means, whichever version wrote it."""
    if part == "te1":
        return name.removeprefix("text_model.")
    if part == "vae" and ".attentions." in name:
        head, _, leaf = name.rpartition(".")
        path, _, last = head.rpartition(".")
        return f"{path}.{OLD_ATTENTION.get(last, last)}.{leaf}"
    return name


def piece_shape(entry: Entry, shape: Shape) -> Shape:
    """The shape of a parameter that is cut from a tensor of `shape`."""
    if entry.rows is not None:
        shape = (entry.rows[1] - entry.rows[0], *shape[1:])
    if entry.squeeze:
        shape = shape[:2]
    return shape[::-1] if entry.transpose else shape


def _bare(shape: Shape) -> Shape:
    """A shape without a 1x1 kernel."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _turned(data: bytearray, spec: Spec) -> bytearray:
    """The bytes of a matrix of spec's shape, from those of its transpose."""
    import torch

    rows, columns = spec.shape
    values = torch.frombuffer(data, dtype=torch.uint8).reshape(columns, rows, DTYPES[spec.dtype][0])
    return bytearray(values.transpose(0, 1).contiguous().numpy().data.cast("B"))


def _scheduled(path: Path) -> str | None:
    """What the scheduler's configuration says, None where there is none."""
    config = path / "scheduler" / "scheduler_config.json"
    return stated_by(read_json(config)) if config.exists() else None
