"""Triton kernels for every op, installed as rst_fused.kernels: the GPU backend that needs no C++ or CUDA compiler.

The functions take the arguments given in rst_fused._schemas. Nothing here depends on the rest of the package.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "rst_fused.kernels needs Triton, which is not installed: pip install triton, or choose another backend "
        "(backend='auto' does)"
    ) from error

from .adam_step import restore_adam_step_
from .autotune import autotune
from .grad_norm import finish_norm, grad_norm
from .lion_step import restore_lion_step_
from .perturb import perturb_
from .restore import restore_
from .sgd_step import restore_sgd_step_

__all__ = [
    "autotune", "finish_norm", "grad_norm", "perturb_", "restore_", "restore_adam_step_", "restore_lion_step_",
    "restore_sgd_step_",
]  # fmt: skip
