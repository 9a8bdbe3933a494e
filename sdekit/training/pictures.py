"""Images as one PNG."""

import math
from pathlib import Path

import torch
from torch import Tensor


def save_grid(path: Path | str, images: Tensor, data_range: tuple[float, float] | None) -> None:
    """Write images (N, 1 or 3, H, W) as a near-square grid, small ones enlarged to some 64 pixels.

    ``data_range`` (low, high) goes from black to white, and what is outside is clipped to these; None is [-1, 1].
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'sdekit[train]'") from error
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    low, high = data_range or (-1.0, 1.0)
    n, c, h, w = images.shape
    grey = ((images.detach().float().cpu() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = 1
    sheet = torch.full((c, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(grey):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[:, y : y + h, x : x + w] = image
    scale = max(1, 64 // h)
    big = sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    Image.fromarray(big.expand(3, -1, -1).movedim(0, -1).numpy()).save(path)
