"""End-to-end temporal action localization on rewired video backbones, after Re2TAL (CVPR 2023, arXiv 2211.14053).

The files here are the commands, and what all rooms share; docs/re2tal.md says what is in each room.
"""
