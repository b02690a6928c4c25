"""End-to-end temporal action localization on rewired video backbones, after Re2TAL (CVPR 2023, arXiv 2211.14053)."""
