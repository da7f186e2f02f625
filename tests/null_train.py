"""train.py in fp32 on the GPU that is not there, whose kernels are answered by the CPU's. torch lacks one of them on a
CPU: it is added here, so a test that trains on that GPU imports this file.
"""

import sys
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

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from grpo.engine import distributed

    distributed.compute_dtype = lambda device: torch.float32  # before others import it
    import train

    torch.set_num_threads(1)
    with softgpu.SoftGPU():
        code = train.main()
    sys.exit(code)
