"""Adapters cut, shrunk, joined and looked into: pure functions on tensors, verbs on files."""
