"""Checkpoints: the store that holds them, and the protocol by which one becomes valid."""
