"""What files of mmaction2, Re2TAL and OpenTAD have in common: what stands before a backbone's names, and beside it."""

from __future__ import annotations

PREFIXES = ("backbone.model.backbone.", "backbone.", "")
"""In a detector that OpenTAD trained, in a recognizer of mmaction2 or Re2TAL, in a backbone alone."""

HEAD = ("projection.", "neck.", "rpn_head.")
"""The head of a detector that OpenTAD trained."""

OTHERS = (
    "cls_head.",
    "data_preprocessor.",
    "backbone.model.cls_head.",
    "backbone.model.data_preprocessor.",
    *HEAD,
)
"""What lies beside the backbone."""
