"""What kernels are tested in. Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds."""

import torch

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def assert_close_to(actual: torch.Tensor, expected: torch.Tensor, ulps: int) -> None:
    """Both in the same dtype, and apart by a few of its rounding steps at most; below 1, by those of 1."""
    tolerance = ulps * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
