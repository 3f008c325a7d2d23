"""Verified rewards: pure functions on tensors."""
