"""Checkpoints: read safely, known by their architecture, converted, and written with the plan inside."""

from revwire.checkpoint.conversion import Conversion, Savings, convert, load_plain
from revwire.checkpoint.load_save import load, save
from revwire.checkpoint.original import Restored, to_original

__all__ = ["Conversion", "Restored", "Savings", "convert", "load", "load_plain", "save", "to_original"]
