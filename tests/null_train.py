"""train.py on the GPU that is not there, with the kernel that torch lacks on a CPU, whose kernels answer for the GPU's.

The command is that of `soft_train.py`, which belongs to that GPU. A test that trains on it imports this file.
"""

import runpy
from pathlib import Path

import torch


def fused_rms_norm_backward(grad, hidden, shape, scale, weight, wanted):
    """Gradients of hidden · scale · weight, scale (..., 1) being 1 / RMS."""
    hidden, outer = hidden.float() * scale, grad.float() * weight.float()
    inner = scale * (outer - hidden * (outer * hidden).mean(-1, keepdim=True))
    return inner.to(grad.dtype), (grad.float() * hidden).flatten(0, -2).sum(0).to(weight.dtype)


kernels = torch.library.Library("aten", "IMPL")
kernels.impl("_fused_rms_norm_backward", fused_rms_norm_backward, "CPU")

if __name__ == "__main__":
    import softgpu

    runpy.run_path(str(Path(softgpu.__file__).with_name("soft_train.py")), run_name="__main__")
