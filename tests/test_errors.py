import errno

import pytest
import torch

from weitiao.errors import OutOfMemory, nearest


def refusal_of_torch() -> RuntimeError:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50, dtype=torch.uint8)
    return refused.value


def test_what_torch_says_when_memory_ran_out_is_one_message():
    told = str(OutOfMemory.of(refusal_of_torch()))
    assert told.startswith("This machine ran out of memory: 1.07e+09 MiB more were asked for.\nExpected ") and len(told.splitlines()) == 3
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which 1 GiB is free.")
    assert str(OutOfMemory.of(gpu, "Buy more.")).splitlines() == [
        "The GPU ran out of memory: 2.00 GiB more were asked for.", "Expected as much to be free as this takes; `weitiao plan` tells what a training does.", "Buy more."]
    assert str(OutOfMemory.of(MemoryError())).startswith("This machine ran out of memory.\n") and OutOfMemory.of(MemoryError()).exit_code == 2


@pytest.mark.parametrize("error", [
    RuntimeError("std::bad_alloc"), RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
    RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("unable to mmap 12 bytes: Cannot allocate memory (12)"), OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB.")], ids=str)
def test_others_say_it_in_other_words(error):
    assert "ran out of memory" in str(OutOfMemory.of(error))


@pytest.mark.parametrize("other", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyboardInterrupt(),
                                   OSError(errno.ENOSPC, "No space left on device")])
def test_no_other_error_is_taken_for_it(other):
    assert OutOfMemory.of(other) is None


def test_a_name_that_goes_on_is_nearer_than_one_that_sounds_alike():
    assert nearest("adamw", ["adam", "adamw_torch"]) == "Did you mean 'adamw_torch'?" and nearest("xyz", ["adam"]) == ""
