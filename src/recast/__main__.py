"""`python -m recast` (and so `accelerate launch -m recast`) is the command line."""

from recast.cli import main

main()
