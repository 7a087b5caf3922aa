"""What torch leaves undone when the capture of a CUDA graph fails, torch 2.11 for one (mended in pytorch#180395).

Its allocator goes on to believe in that capture, and fails an assertion when memory is to be given back, with which
every capture begins: one failure would leave a process without any further graph. Its generator of random numbers
believes so too, and refuses to draw.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch


def end_capture(pool: Any) -> None:
    """End the failed capture on the current device that was given ``pool``, `torch.cuda.graph_pool_handle`'s.

    The current stream is not one that was captured on. Where nothing was left undone, this does nothing.
    """
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # where it has been ended, torch says so
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)  # or what shares it would never be given back
    # One that ends well frees the generator; where that fails, so does the next one, and is reported
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
