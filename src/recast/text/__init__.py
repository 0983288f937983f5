"""From a prompt to rows of CLIP tokens and their weights: tokens.py, prompt.py, chunks.py."""
