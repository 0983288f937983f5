"""The header of a safetensors file, read with more suspicion than the format demands.

    8 bytes  n, little-endian     header length
    n bytes  JSON                 {"__metadata__": {str: str}, name: {dtype, shape, data_offsets}}
    rest     tensor data          every byte belongs to one tensor

On top of the format's own rules (whole cover, no overlap, no hole) it refuses what parsers disagree
on or what serves only to exhaust a reader: names twice, control characters, ranks above 8, headers
above 16 MiB.  No torch here: `recast inspect` needs only this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from recast.errors import Refused

if TYPE_CHECKING:
    import torch

HEADER_LIMIT = 1 << 24
RANK_LIMIT = 8
SIZE_LIMIT = 1 << 62

# safetensors name: (bytes per value, torch name)
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"), "U16": (2, "uint16"),
    "I16": (2, "int16"), "U32": (4, "uint32"), "I32": (4, "int32"), "U64": (8, "uint64"),
    "I64": (8, "int64"), "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
    "F16": (2, "float16"), "BF16": (2, "bfloat16"), "F32": (4, "float32"), "F64": (8, "float64"),
    "C64": (8, "complex64"),
}  # fmt: skip
NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
FLOATS = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")

PICKLE = (
    "is a pickle, which can run code when it is opened: convert it once with "
    'python -c "import torch, safetensors.torch as s; '
    "d = torch.load('IN.ckpt', weights_only=True, map_location='cpu'); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.get('state_dict', d).items() "
    "if hasattr(v, 'dtype')}, 'OUT.safetensors')\" and give Recast the result."
)
# first bytes of what people save under a wrong name
KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run git lfs pull, or "
                                 "download it again from the site."),
    (b"\x1f\x8b", "is gzip-compressed: unpack it first."),
    (b"7z\xbc\xaf", "is a 7-Zip archive: unpack it first."),
    (b"Rar!", "is a RAR archive: unpack it first."),
    (b"GGUF", "is a GGUF file, whose weights are quantised: give the .safetensors original."),
    (b"\x89PNG", "is a PNG picture: give a .safetensors checkpoint."),
    (b"\xff\xd8\xff", "is a JPEG picture: give a .safetensors checkpoint."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a file; start and end count from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, DTYPES[self.dtype][1])


@dataclass(frozen=True)
class Header:
    """What a header says: tensors in the order of their data, metadata, where the data begins."""

    specs: dict[str, Spec]
    metadata: dict[str, str]
    data: int


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return NAMES[str(dtype).removeprefix("torch.")]


def refuse_kind(path: Path, first: bytes) -> None:
    """Raise Refused if the first bytes are those of something people mistake for a checkpoint."""
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise Refused(
            f"{path} is a web page saved under this name: download the file itself, "
            "logged in if the site asks for it."
        )
    if text.startswith(b"{") and first[:1] == b"{":
        raise Refused(f"{path} is a JSON text: give the .safetensors file that belongs to it.")
    if first.startswith(b"PK\x03\x04"):
        pickled = b".pkl" in first or path.suffix in (".ckpt", ".pt", ".pth", ".bin")
        raise Refused(f"{path} {PICKLE if pickled else 'is a zip archive: unpack it first.'}")
    if first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05":
        raise Refused(f"{path} {PICKLE}")
    for start, sentence in KINDS:
        if first.startswith(start):
            raise Refused(f"{path} {sentence}")


def parse_header(path: Path, text: bytes, data: int) -> Header:
    """Check a header and return it.

    text: the JSON bytes. data: bytes that follow them in the file. Raises Refused.
    """
    try:
        found = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = found.pop("__metadata__", {})
    if not _is_metadata(metadata):
        raise _damaged(path, "its metadata is not a table of texts")
    specs = {name: _spec(path, name, entry) for name, entry in found.items()}
    ordered = sorted(specs.items(), key=lambda item: (item[1].start, item[1].end))
    _refuse_gaps(path, ordered, data)
    return Header(dict(ordered), metadata, 8 + len(text))


def header_bytes(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file: length and header, padded so that the data begins at 8 n.

    The same content always gives the same bytes: metadata sorted by name, tensors in the order
    given.
    """
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = {name: metadata[name] for name in sorted(metadata)}
    for name, spec in specs.items():
        offsets = [spec.start, spec.end]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def place(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Spec]:
    """Lay tensors out one after the other, in the order given if that keeps each one aligned.

    A tensor must begin at a multiple of its value size, or torch cannot view the file's bytes;
    where the given order breaks that, larger values come first, as the safetensors library does.
    """
    placed = _consecutive(specs.items())
    if any(spec.start % DTYPES[spec.dtype][0] for spec in placed.values()):
        placed = _consecutive(sorted(specs.items(), key=lambda item: -DTYPES[item[1][0]][0]))
    return placed


def _consecutive(specs: Iterable[tuple[str, tuple[str, tuple[int, ...]]]]) -> dict[str, Spec]:
    placed, at = {}, 0
    for name, (dtype, shape) in specs:
        end = at + math.prod(shape) * DTYPES[dtype][0]
        placed[name] = Spec(dtype, tuple(shape), at, end)
        at = end
    return placed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"{text[:24]} is not a size")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _is_metadata(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(value, str) and _encodes(name + value) for name, value in found.items()
    )


def _encodes(text: str) -> bool:
    """Whether a text is Unicode: JSON can spell half a surrogate pair, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _spec(path: Path, name: str, entry: object) -> Spec:
    if not name or not name.isprintable() or not _encodes(name):
        raise _damaged(path, f"a tensor is called {name[:40]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name[:120]} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name[:120]} has sizes that are not numbers")
    if len(shape) > RANK_LIMIT:
        raise _damaged(path, f"tensor {name[:120]} has {len(shape)} dimensions")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(
            f"{path}: tensor {name[:120]} has the number format {str(dtype)[:20]!r}, "
            "which Recast does not read: give an fp32, fp16, bf16 or fp8."
        )
    start, end = offsets
    span = math.prod(max(size, 1) for size in shape) * DTYPES[dtype][0]
    if span > SIZE_LIMIT or end - start != math.prod(shape) * DTYPES[dtype][0]:
        raise _damaged(path, f"tensor {name[:120]} of shape {shape} does not fit its bytes")
    return Spec(dtype, tuple(shape), start, end)


def _is_sizes(found: object) -> bool:
    return isinstance(found, list) and all(type(size) is int for size in found)


def _refuse_gaps(path: Path, ordered: list[tuple[str, Spec]], data: int) -> None:
    at = 0
    for name, spec in ordered:
        if spec.start != at:
            what = "overlaps the one before it" if spec.start < at else "leaves a hole before it"
            raise _damaged(path, f"tensor {name[:120]} {what}")
        at = spec.end
    if data < at:
        raise Refused(
            f"{path} is truncated ({at - data:,} of {at:,} bytes of tensors are missing)"
            ": download or copy it again."
        )
    if data > at:
        raise _damaged(path, f"{data - at:,} bytes at its end belong to no tensor")


def _damaged(path: Path, what: str) -> Refused:
    return Refused(f"{path} is no valid safetensors file ({what}): download or export it again.")
