"""Training recipes as people have them, and what the transfer rules say of them."""
