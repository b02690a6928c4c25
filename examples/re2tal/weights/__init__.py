"""Files of weights as the field has them: what layout a file is of, and where each tensor of ours lies in it.

`reading.py` opens a file; `layouts.py` says what a layout is and fits a file to a network. Each family of networks has
a file with its layouts, and `families.py` names them all.
"""
