"""How fast a run is and what memory it takes: facts of the machine, no part of its result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

UNIT = 1024  # Linux tells a process' peak in KiB


@dataclass
class Speed:
    """Steps a second since the step before, and the peak of memory since the start, in bytes."""

    device: torch.device
    since: float = field(default_factory=time.monotonic)

    def lap(self) -> dict[str, float]:
        """The figures of the step that has just ended."""
        now = time.monotonic()
        taken, self.since = now - self.since, now
        found = {"it_s": float(f"{1 / max(taken, 1e-9):.4g}")}
        peak = self.memory()
        return found | ({} if peak is None else {"memory": float(peak)})

    def memory(self) -> int | None:
        """Of the GPU where there is one, else of the process; None where nobody tells."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
