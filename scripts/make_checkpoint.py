"""Write a checkpoint of real size with seeded random weights, for benchmarks.

python scripts/make_checkpoint.py sdxl big.safetensors          # 6.9 GB
python scripts/make_checkpoint.py sd15 small.safetensors --dtype BF16 --seed 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recast.layout import SD15, SDXL
from recast.layout.generate import generate

PLANS = {"sdxl": SDXL, "sd15": SD15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=PLANS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", default="F16", choices=["F16", "BF16", "F32"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    given = parser.parse_args()
    digest = generate(
        given.file, PLANS[given.family], seed=given.seed, dtype=given.dtype, force=given.force
    )
    print(f"{given.file}  {given.file.stat().st_size:,} bytes  sha256 {digest}")


if __name__ == "__main__":
    main()
