"""Which point is to find which action (ActionFormer, section 3.4, and its code)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from examples.re2tal.heads.points import Points

RADIUS = 1.5
"""How far from an action's centre a point may be that is to find it, in strides of its level."""

_SAME_LENGTH = 1e-3


def assign(
    points: Points, segments: Tensor, labels: Tensor, classes: int, radius: float = RADIUS
) -> tuple[Tensor, Tensor]:
    """What each point of one clip is to predict.

    A point is to find an action if it lies within `radius` strides of the action's centre, inside of the action, and
    the action's farther end is in the range of its level. Of several it takes the shortest; classes of actions that
    are as short (THUMOS-14 has segments of two classes) are asked for together.

    Args:
        points: The points.
        segments: (actions, 2) Starts and ends in positions.
        labels: (actions,) Indices of classes.
        classes: How many there are.
        radius: See above.

    Returns:
        (points, classes) 1 for each class to find, float32; (points, 2) distances to start and end in strides of the
        point's level.
    """
    t = points.position
    if not len(segments):
        return t.new_zeros(len(t), classes), t.new_zeros(len(t), 2)
    start, end = segments[:, 0], segments[:, 1]
    left, right = t[:, None] - start, end - t[:, None]  # (points, actions)
    centre, reach = (start + end) / 2, radius * points.stride[:, None]
    inside = (t[:, None] > torch.maximum(centre - reach, start)) & (
        t[:, None] < torch.minimum(centre + reach, end)
    )
    farther = torch.maximum(left, right)
    in_range = (farther >= points.low[:, None]) & (farther <= points.high[:, None])
    endless = torch.tensor(torch.inf, device=t.device)
    length = torch.where(inside & in_range, end - start, endless)
    shortest, which = length.min(dim=1)
    same = (length <= shortest[:, None] + _SAME_LENGTH) & length.isfinite()
    one_hot = torch.nn.functional.one_hot(labels, classes).to(t.dtype)
    targets = (same.to(t.dtype) @ one_hot).clamp_(max=1)
    distances = torch.stack([left, right], dim=-1)[torch.arange(len(t), device=t.device), which]
    return targets, distances / points.stride[:, None]
