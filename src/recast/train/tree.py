"""Nested Python values as JSON plus a flat dict of tensors, and back, without pickle.

JSON knows no tuples, no int keys, no infinities and no tensors: each becomes a one-key object
{"tuple": [...]}, {"dict": [[k, v], ...]}, {"float": "inf"}, {"tensor": name}.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def flatten(value: Any, tensors: dict[str, Tensor], at: str = "o") -> Any:
    """The JSON form of `value`; its tensors go into `tensors`, named by their place in it.

    Raises TypeError for anything else than numbers, text, tensors, dtypes and containers of them.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        tensors[at] = value.detach()
        return {"tensor": at}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [flatten(v, tensors, f"{at}.{i}") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": flatten(list(value), tensors, at)}
    if isinstance(value, dict):
        return {"dict": [[k, flatten(v, tensors, f"{at}.{k}")] for k, v in value.items()]}
    raise TypeError(f"{at} holds a {type(value).__name__}, which a state file cannot keep")


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `flatten` took apart."""
    if isinstance(tree, list):
        return [unflatten(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(unflatten(content, tensors))
    return {k: unflatten(v, tensors) for k, v in content}
