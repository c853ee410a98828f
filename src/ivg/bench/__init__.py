"""``ivg bench``: what a method costs on this machine, beside plain sampling of the base model."""
