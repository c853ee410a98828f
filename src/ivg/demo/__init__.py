"""The recipe that makes the embedded models (``ivg.embedded``) from IMDb reviews: ``python -m ivg.demo.recipe``."""
