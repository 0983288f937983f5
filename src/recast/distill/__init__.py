"""Distillation with an assessor: taps, probe, signals, fusion, losses, sampler, loop."""
