"""The C++ compiler is the one that Inductor would use; asking imports nothing of Inductor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch._inductor.config as inductor_config

from splitpoint.torch_internals.toolchain import cpp_compiler


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my-g++"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_what_inductor_was_configured_with_is_used(own):
    from torch._inductor.cpp_builder import get_cpp_compiler

    assert cpp_compiler() is not None
    for named in ((None, own), own, (None, "no-such-compiler", own)):
        with inductor_config.patch({"cpp.cxx": named}):
            assert cpp_compiler() == own == get_cpp_compiler()
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert cpp_compiler() is None


@pytest.mark.parametrize("before", ["torch", "torch._inductor.config", "transformers.generation"])
def test_asking_imports_nothing_of_inductor(before, own):
    code = (
        f"import sys, {before}\n"
        "from splitpoint.torch_internals.toolchain import cpp_compiler\n"
        "known = set(sys.modules)\n"
        "found = cpp_compiler()\n"
        "new = set(sys.modules) - known\n"
        "print(found, any(name.startswith('torch._inductor') for name in new))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": own},
        check=True,
    )
    assert done.stdout.split() == [own, "False"]
