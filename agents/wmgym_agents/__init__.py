"""What learns inside `WorldModel-LIBERO-v0`: policies and the algorithms that train them."""
