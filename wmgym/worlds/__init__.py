"""World models: what `WorldModel-LIBERO-v0` runs, and how the small one is trained."""
