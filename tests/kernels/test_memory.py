import subprocess
import sys

import pytest
import torch

from splitpoint.kernels.memory import CHUNK_BYTES, HUGE_PAGE, Streamed, streamed_bytes


def test_bytes_start_at_a_huge_page_and_are_zeros() -> None:
    made = streamed_bytes(3 * HUGE_PAGE + 5)
    assert made.shape == (3 * HUGE_PAGE + 5,)
    assert made.data_ptr() % HUGE_PAGE == 0
    assert not made.any()
    made.fill_(7)
    assert int(made.sum(dtype=torch.int64)) == 7 * made.numel()


def test_copies_follow_each_other_on_cache_lines() -> None:
    memory = Streamed()
    tensors = [torch.randn(3, 5), torch.randn(64, 7).to(torch.bfloat16), torch.arange(9).char()]
    copies = [memory.placed(each) for each in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
    starts = [copy.data_ptr() for copy in copies]
    assert starts == [starts[0], starts[0] + 64, starts[0] + 64 + 896]


def test_a_tensor_larger_than_a_chunk_has_one_of_its_own() -> None:
    memory = Streamed()
    small = memory.placed(torch.ones(4))
    large = memory.placed(torch.ones(CHUNK_BYTES + 64, dtype=torch.uint8))
    after = memory.placed(torch.ones(4))
    assert bool(large.all())
    assert len({each.untyped_storage().data_ptr() for each in (small, large, after)}) == 3


def test_copies_outlive_the_memory_object() -> None:
    copy = Streamed().placed(torch.arange(1000))
    assert torch.equal(copy, torch.arange(1000))


def test_only_written_pages_take_memory() -> None:
    code = (
        "from splitpoint.kernels.memory import streamed_bytes\n"
        "import resource\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "made = streamed_bytes(1 << 30)\n"
        "made[:10] = 1\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_a_copy_made_in_any_mode_can_be_written_in_any(mode: type) -> None:
    with mode():
        copy = Streamed().placed(torch.ones(3))
    with torch.inference_mode(not torch.is_inference_mode_enabled()):
        copy.copy_(torch.zeros(3))
    copy.copy_(torch.ones(3))
    assert not copy.is_inference()
