"""How fast this machine runs AIPROD, beside `diffusers` on the same weights: `aiprod bench`."""
