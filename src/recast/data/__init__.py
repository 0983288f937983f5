"""Pictures and captions, their sizes, their latents on disk, and the order they are drawn in."""
