import pytest
import torch

from weitiao.errors import OutOfMemory, nearest


def refusal_of_torch() -> RuntimeError:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50, dtype=torch.uint8)
    return refused.value


def test_what_torch_says_when_memory_ran_out_is_one_message():
    told = str(OutOfMemory.of(refusal_of_torch()))
    assert told.startswith("Memory ran out: 1,073,741,824 MiB more were asked for.\nExpected ") and "training.memory=balanced" in told
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which 1 GiB is free.")
    assert str(OutOfMemory.of(gpu, "Buy more.")).splitlines() == [
        "The GPU's memory ran out: 2.00 GiB more were asked for.", "Expected as much to be free as `weitiao plan` tells for the same settings.", "Buy more."]
    assert str(OutOfMemory.of(MemoryError())).startswith("Memory ran out.\n") and OutOfMemory.of(MemoryError()).exit_code == 2


@pytest.mark.parametrize("other", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyboardInterrupt()])
def test_no_other_error_is_taken_for_it(other):
    assert OutOfMemory.of(other) is None


def test_a_name_that_goes_on_is_nearer_than_one_that_sounds_alike():
    assert nearest("adamw", ["adam", "adamw_torch"]) == "Did you mean 'adamw_torch'?" and nearest("xyz", ["adam"]) == ""
