"""Builds the models in ``src/ivg/embedded`` from IMDb reviews: ``python -m recipes.embedded_models.build``. Not part of the package."""
