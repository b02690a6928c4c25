"""Where the implementations of ActionFormer differ: at the end of a video that is shorter than its clip.

All of them multiply what a convolution makes by the mask. What the normalization and the ReLU after it make of those
zeros is no longer zero, and the next convolution carries it one position back into the video. So trained weights give
the logits that they were trained for in their own dialect alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from examples.re2tal.errors import Re2TALError


@dataclass(frozen=True)
class Dialect:
    """One of them.

    Attributes:
        zero_features: Features beyond the end are set to zero before anything else.
        mask_activations: The mask is applied again after every ReLU.
        eps: Of the layer norms outside of the transformer blocks; inside of them it is 1e-5 in all dialects.
        start_at_zero: All biases of convolutions start at zero, but for that of the classifier.
    """

    zero_features: bool
    mask_activations: bool
    eps: float
    start_at_zero: bool


DIALECTS = {
    # what lies beyond the end changes nothing, whatever the features there are
    "revwire": Dialect(zero_features=True, mask_activations=True, eps=1e-5, start_at_zero=False),
    # OpenTAD's detectors hand on what the backbone makes of the repeated last picture
    "opentad": Dialect(zero_features=False, mask_activations=True, eps=1e-6, start_at_zero=True),
    # the original is given features of the video alone, padded with zeros
    "actionformer": Dialect(zero_features=False, mask_activations=False, eps=1e-5, start_at_zero=True),
}


def dialect_of(name: str) -> Dialect:
    """The dialect of a name.

    Raises:
        Re2TALError: there is none.
    """
    if name not in DIALECTS:
        raise Re2TALError(f"there is no head.options.dialect {name!r}; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[name]
