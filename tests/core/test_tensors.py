import pytest
import torch

from deltacome_core.errors import InternalError
from deltacome_core.tensors import TORCH_DTYPES, as_float32, dtype_name, tensor_bytes


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_names_and_types_are_one_to_one(name):
    assert dtype_name(TORCH_DTYPES[name]) == name


def test_a_type_safetensors_cannot_hold_is_our_error():
    with pytest.raises(InternalError):
        dtype_name(torch.complex64)


def test_bytes_are_row_major_whatever_the_strides():
    tensor = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert bytes(tensor_bytes(tensor)) == bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])
    assert bytes(tensor_bytes(tensor.T)) == bytes([0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0])


def test_a_single_element_of_a_wide_stride_has_bytes_too():
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3).T[2:, 1:]
    assert bytes(tensor_bytes(tensor)) == bytes([5, 0, 0, 0])


def test_bfloat16_is_widened_without_loss():
    tensor = torch.tensor([1.0, -3.140625, 2.0**-100]).to(torch.bfloat16)
    assert as_float32(tensor).tolist() == tensor.tolist()
    assert as_float32(tensor).dtype == torch.float32
