"""Bridges from `WorldModel-LIBERO-v0` to other libraries' interfaces."""
