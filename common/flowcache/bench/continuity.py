"""What a mean over all frames hides: whether a clip gets worse, and whether its chunks show.

Axes: T frames of a clip, H/W rows/columns of pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowcache.runtime.metrics import psnr
from flowcache.runtime.model import SegmentWork

EDGE_SHARE = 0.15
"""Of a clip, at each end: what drift compares."""


def drift(frames_THW3: Tensor, other_THW3: Tensor) -> float | None:
    """Return by how many dB the last 15 % of a clip are farther from another than the first.

    None where either part is equal. Example: a PSNR of 40 dB in the first frames and of 34 dB in
    the last ones is a drift of 6 dB.
    """
    count = max(round(EDGE_SHARE * len(frames_THW3)), 1)
    ends = [
        psnr(frames_THW3[part], other_THW3[part])
        for part in (slice(None, count), slice(-count, None))
    ]
    return ends[0] - ends[1] if all(math.isfinite(end) for end in ends) else None


def seams(frames_THW3: Tensor, other_THW3: Tensor, *, borders: Sequence[int]) -> float | None:
    """Return how much more a clip changes at borders of chunks than another one does.

    The change from frame to frame at borders over that elsewhere; the ratio of both clips' is 1
    where the borders show as much as in the other one. None where nothing moves.

    Args:
        borders: the first frame of each chunk but the first.
    """

    def share(frames: Tensor) -> float:
        x = frames.float()
        change = (x[1:] - x[:-1]).abs().flatten(1).mean(dim=1)
        is_border = torch.zeros(len(change), dtype=torch.bool)
        is_border[torch.tensor(borders, dtype=torch.int64) - 1] = True
        return float(change[is_border].mean() / change[~is_border].mean())

    if not borders or len(borders) >= len(frames_THW3) - 1:
        return None
    own, wanted = share(frames_THW3), share(other_THW3)
    return own / wanted if math.isfinite(own) and 0 < wanted < math.inf else None


def borders_of(segments: Sequence[SegmentWork]) -> list[int]:
    """Return the first pixel frame of each chunk of a video but the first; see `SegmentWork`."""
    starts = {first for segment in segments for first, stop in segment.frames if first < stop}
    return sorted(starts - {0})
