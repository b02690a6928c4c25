"""The memory-free backward. `tape.py` is the heart: read it first.

Nothing here knows how a model was traced or planned. What goes in is a function (a residual branch) and the modules it
calls; what comes out are two streams that look like one tensor.
"""
