"""The version of this package, as pip knows it."""

from importlib.metadata import version

VERSION: str = version("ivg")
