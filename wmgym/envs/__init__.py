"""Environments: imagined by a world model (`world_model`) and simulated by LIBERO (`libero`)."""
