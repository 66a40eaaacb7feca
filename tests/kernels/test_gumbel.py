import torch
import triton
import triton.language as tl

from specbackend.kernels import gumbel
from specbackend.sampling.pick import gumbel_noise

EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF]


@triton.jit
def _noise_kernel(seed_ptr, position_ptr, noise_ptr, V: tl.constexpr):
    r, v = tl.program_id(0), tl.arange(0, V)
    noise = gumbel.gumbel_noise(tl.load(seed_ptr + r), tl.load(position_ptr + r), v)
    tl.store(noise_ptr + r * V + v, noise)


def test_noise_is_that_of_the_sampler(device):
    seed_R = torch.tensor(EDGES, device=device)
    position_R = torch.arange(len(EDGES), device=device) * 1000
    noise_RV = torch.empty(len(EDGES), 4096, device=device)
    _noise_kernel[(len(EDGES),)](seed_R, position_R, noise_RV, V=4096)
    token_V = torch.arange(4096, device=device)
    expected_RV = gumbel_noise(seed_R, position_R[:, None], token_V)[:, 0]
    assert torch.equal(gumbel.gumbel_noise_ref(seed_R, position_R, token_V), expected_RV)
    if device == "cuda":
        assert torch.equal(noise_RV, expected_RV)  # both are libdevice's logarithm
    torch.testing.assert_close(noise_RV, expected_RV, rtol=1e-6, atol=1e-6)
