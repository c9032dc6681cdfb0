import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splitpoint.kernels.memory import (
    CHUNK_BYTES,
    HUGE_PAGE,
    Streamed,
    mapped_file,
    streamed_bytes,
)


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


@pytest.mark.parametrize("size", [1, 4096, HUGE_PAGE + 5])
def test_what_is_written_to_a_mapped_file_stays_with_the_process(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * size)
    path.chmod(0o400)
    with open(path, "rb") as file:
        first, second = mapped_file(file.fileno()), mapped_file(file.fileno())
    whole = torch.frombuffer(first, dtype=torch.uint8)
    whole.fill_(7)
    assert first[:] == b"\7" * size
    assert second[:] == path.read_bytes() == b"\1" * size
    path.unlink()
    assert second[size - 1] == 1


def test_an_empty_file_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with open(tmp_path / "file", "rb") as file, pytest.raises(ValueError, match="empty"):
        mapped_file(file.fileno())
