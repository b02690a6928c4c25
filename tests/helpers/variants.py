"""How often the code of a rewired model was traced: once for each way of calling it, in each mode that it asks for."""

from revwire.rewrite.program import Program
from revwire.rewrite.wired import PROGRAM


def variants(model):
    """The number of rewritten forwards of each rewired module."""
    programs = [m.__dict__[PROGRAM] for m in model.modules() if PROGRAM in m.__dict__]
    return [len(program._variants) for program in programs if isinstance(program, Program)]
