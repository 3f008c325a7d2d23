"""Imagined rollouts as videos and picture strips."""
