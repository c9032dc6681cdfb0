"""Collectives of tensor parallelism, as torch operators that name their process group.

`ops.register()` makes `torch.ops.splitpoint.allreduce_rmsnorm` and its kin available: plain
torch over any process group (`reference`) until a workspace is attached to a group
(`workspace`), whose ranks then meet in shared memory instead.
"""
