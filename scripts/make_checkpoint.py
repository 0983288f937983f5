"""Write a checkpoint of real size with seeded random weights, for benchmarks.

python scripts/make_checkpoint.py sdxl big.safetensors          # 6.9 GB
python scripts/make_checkpoint.py sd15 small.safetensors --spectrum steep --dtype bf16 --seed 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recast.layout import SD15, SDXL
from recast.layout.generate import generate
from recast.layout.spectra import SPECTRA

PLANS = {"sdxl": SDXL, "sd15": SD15}
DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp8": "F8_E4M3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=PLANS)
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--spectrum",
        default="half",
        choices=SPECTRA,
        help="singular values of the matrices: half of the squared norm a power law i^-0.5 and "
        "half noise (the default), steep (nine tenths i^-1), flat (nine tenths noise), noise",
    )
    parser.add_argument("--dtype", default="fp16", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    given = parser.parse_args()
    digest = generate(
        given.file,
        PLANS[given.family],
        seed=given.seed,
        dtype=DTYPES[given.dtype],
        spectrum=given.spectrum,
        force=given.force,
    )
    print(f"{given.file}  {given.file.stat().st_size:,} bytes  sha256 {digest}")


if __name__ == "__main__":
    main()
