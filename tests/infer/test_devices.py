import pytest
import torch

from pixelwise.errors import UsageError
from pixelwise.infer.devices import computes_in_bf16, resolve_device, resolve_precision


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:", "meta", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UsageError, match="device"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="'cuda' cannot be used here"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


def test_precision_is_chosen_by_the_hardware():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == ("bf16" if computes_in_bf16(cpu) else "float32")
    assert resolve_precision("bf16", cpu) == "bf16"
    with pytest.raises(UsageError, match="auto, bf16, float32"):
        resolve_precision("fp8", cpu)
