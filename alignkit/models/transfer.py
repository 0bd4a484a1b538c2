"""From the host to a device, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``. A copy to a GPU waits its turn there, and nobody waits for it here."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x.to(device)


def listed(values: Sequence[float], device: torch.device) -> Tensor:
    """``values`` as a tensor [n] on ``device``."""
    return send(torch.tensor(values), device)
