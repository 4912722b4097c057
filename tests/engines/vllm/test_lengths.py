"""The batch that vLLM's own kernel is shown beside answers."""

from __future__ import annotations

import torch

from dyrate_kernels.engines.vllm.steps import Others


def test_lengths_are_the_devices_where_the_host_counts_drafts_that_were_refused():
    """With asynchronous scheduling vLLM's host takes all drafts of the step before for accepted; the device knows better."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from dyrate_kernels.engines.vllm.attention import _only

    starts = torch.tensor([0, 1, 5, 12], dtype=torch.int32)  # an answer row, four of a text request, seven of which three answer
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor([40, 21, 33], dtype=torch.int32), num_reqs=3,
        num_actual_tokens=12, max_query_len=7, max_seq_len=40, block_table_tensor=torch.arange(6).view(3, 2).int(),
        slot_mapping=torch.arange(12),
    )  # fmt: skip
    rows = torch.arange(1, 9)
    part = _only(common, Others(rows, [1, 2], [4, 4], [0, 3], [24, 30]))
    assert part.seq_lens.tolist() == [21, 30] and part.seq_lens.dtype == torch.int32
    assert part.seq_lens_cpu_upper_bound.tolist() == [24, 30] and part.max_seq_len == 30
    assert part.query_start_loc.tolist() == [0, 4, 8] and part.block_table_tensor.tolist() == [[2, 3], [4, 5]]
    assert part.slot_mapping.tolist() == rows.tolist()
