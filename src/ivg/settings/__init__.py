"""The settings of every part, and the recipe that holds them all."""
