"""Adapters: low-rank and full changes of a checkpoint, in files and in living modules."""

from recast.adapter.attach import Attached, attach
from recast.adapter.decompose import decompose, zeros_full
from recast.adapter.export import export
from recast.adapter.extract import Extract, extract_difference, extract_trained
from recast.adapter.file import Adapter, write_adapter
from recast.adapter.formats import read_adapter
from recast.adapter.patch import apply_patch, patch_from
from recast.adapter.places import entry_name, refuse_residual
from recast.adapter.rebuild import rebuild, write_rebuilt
from recast.adapter.split import Split, split
from recast.adapter.verify import TensorError, Verdict, verify_rebuilt, verify_split

__all__ = [
    "Adapter",
    "Attached",
    "Extract",
    "Split",
    "TensorError",
    "Verdict",
    "apply_patch",
    "attach",
    "decompose",
    "entry_name",
    "export",
    "extract_difference",
    "extract_trained",
    "patch_from",
    "read_adapter",
    "rebuild",
    "refuse_residual",
    "split",
    "verify_rebuilt",
    "verify_split",
    "write_adapter",
    "write_rebuilt",
    "zeros_full",
]
