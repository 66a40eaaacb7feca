"""The part of flashinfer-python 0.6.3 that the backend calls, in plain torch, for machines without a GPU.

It takes keyword arguments only, of the real names, and asserts what the real one asserts or silently relies on: its
kernels read every index as int32 and look at neither lengths nor types.
"""

import math
import types
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequence:
    """One request of a plan: its rows of q, the slots it attends to, and which of them each row sees."""

    rows: slice
    slot_C: torch.Tensor
    mask_QC: torch.Tensor


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, *, float_workspace_buffer, kv_layout="NHD", backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8 and float_workspace_buffer.numel() >= 128 * 2**20
        assert kv_layout == "NHD"
        assert backend == "fa2", "custom masks need fa2, and the others are not what is tested here"
        self.device = float_workspace_buffer.device
        self.sequences: list[Sequence] | None = None

    def plan(
        self,
        *,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        custom_mask=None,
        causal=False,
        q_data_type="float16",
        kv_data_type=None,
    ):
        first_row = _starts(qo_indptr)
        first_page = _starts(paged_kv_indptr)
        B = len(first_row) - 1
        assert len(first_page) == B + 1
        assert page_size == 1, "the fake knows no longer pages"
        _assert_int32(paged_kv_indices, (first_page[-1],))
        _assert_int32(paged_kv_last_page_len, (B,))
        assert (paged_kv_last_page_len == 1).all(), "a page of one token is full, never empty"
        assert num_qo_heads % num_kv_heads == 0 and head_dim_qk % 64 == 0
        assert q_data_type in (torch.float16, torch.bfloat16) and kv_data_type == q_data_type
        self.num_heads, self.num_kv_heads, self.head_dim, self.dtype = (
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            q_data_type,
        )
        self.sequences, first_bit = [], 0
        for b in range(B):
            rows, pages = slice(first_row[b], first_row[b + 1]), slice(first_page[b], first_page[b + 1])
            Q, C = rows.stop - rows.start, pages.stop - pages.start
            assert Q >= 1 and C >= 1
            if custom_mask is not None:
                mask_QC = custom_mask[first_bit : first_bit + Q * C].view(Q, C).clone()  # packed: a copy
            else:
                mask_QC = torch.ones(Q, C, dtype=torch.bool).tril(C - Q if causal else C)
            first_bit += Q * C
            self.sequences.append(Sequence(rows, paged_kv_indices[pages].clone(), mask_QC))
        if custom_mask is not None:
            assert custom_mask.dtype == torch.bool and custom_mask.shape == (first_bit,) and custom_mask.is_contiguous()
            devices = {t.device for t in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len, custom_mask)}
            assert devices == {self.device}, "segment_packbits takes no host tensors"

    def run(self, *, q, paged_kv_cache):
        assert self.sequences is not None, "plan info is not initialized"
        T = self.sequences[-1].rows.stop
        assert q.dtype == paged_kv_cache.dtype == self.dtype
        assert q.shape == (T, self.num_heads, self.head_dim) and q.stride(-1) == 1
        assert paged_kv_cache.shape[1:] == (2, 1, self.num_kv_heads, self.head_dim) and paged_kv_cache.stride(-1) == 1
        k_S1GD, v_S1GD = paged_kv_cache.unbind(1)
        out_THD = torch.empty_like(q)
        for sequence in self.sequences:
            assert ((sequence.slot_C >= 0) & (sequence.slot_C < len(paged_kv_cache))).all()
            k_CGD, v_CGD = (cache[sequence.slot_C, 0].float() for cache in (k_S1GD, v_S1GD))
            out_THD[sequence.rows] = _attend(q[sequence.rows].float(), k_CGD, v_CGD, sequence.mask_QC).to(q.dtype)
        return out_THD


def _attend(q_QHD, k_CGD, v_CGD, mask_QC):
    group = q_QHD.shape[1] // k_CGD.shape[1]
    k_CHD, v_CHD = k_CGD.repeat_interleave(group, 1), v_CGD.repeat_interleave(group, 1)
    score_HQC = torch.einsum("qhd,chd->hqc", q_QHD, k_CHD) / math.sqrt(q_QHD.shape[2])
    weight_HQC = score_HQC.masked_fill(~mask_QC, -math.inf).softmax(-1)
    return torch.einsum("hqc,chd->qhd", weight_HQC, v_CHD)


def _starts(indptr) -> list[int]:
    _assert_int32(indptr, (len(indptr),))
    starts = indptr.tolist()
    assert starts[0] == 0 and starts == sorted(starts)
    return starts


def _assert_int32(indices, shape) -> None:
    assert indices.dtype == torch.int32 and indices.shape == shape and indices.is_contiguous()


def module() -> types.ModuleType:
    fake = types.ModuleType("flashinfer")
    fake.__version__, fake.__file__ = "fake", __file__
    fake.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    return fake
