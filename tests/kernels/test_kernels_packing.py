from __future__ import annotations

import pytest
import torch
from dfmpc.kernels import pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st


def plain_pack(codes: list[int], bits: int) -> bytes:
    """The stream as one big integer, least significant bit first."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@st.composite
def coded_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits, rows, length = draw(st.integers(2, 8)), draw(st.integers(0, 4)), draw(st.integers(0, 41))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    return bits, draw(st.lists(row, min_size=rows, max_size=rows))


@given(coded_rows())
@settings(max_examples=300, deadline=None)
def test_unpack_undoes_pack_at_every_width_and_length(drawn: tuple[int, list[list[int]]]) -> None:
    bits, rows = drawn
    codes = torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), len(rows[0]) if rows else 0)
    packed = pack(codes, bits)
    assert [bytes(row.tolist()) for row in packed] == [plain_pack(row, bits) for row in rows]
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_at_every_position_of_a_word(bits: int) -> None:
    codes = torch.zeros((2**bits * 8, 8), dtype=torch.uint8)
    for position in range(8):
        codes[position * 2**bits : (position + 1) * 2**bits, position] = torch.arange(2**bits, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert [bytes(row.tolist()) for row in packed] == [plain_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, 8), codes)


def test_rows_of_a_transposed_tensor_are_packed_in_their_own_order() -> None:
    codes = torch.arange(24, dtype=torch.uint8).reshape(8, 3).T
    assert torch.equal(pack(codes, 5), pack(codes.contiguous(), 5))


def test_a_wrong_number_of_bytes_or_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows have 3 bytes; 9 codes of 3 bits take 4"):
        unpack(torch.zeros((2, 3), dtype=torch.uint8), 3, 9)
    with pytest.raises(ValueError, match=r"bits is 9; use 2 to 8"):
        pack(torch.zeros((2, 3), dtype=torch.uint8), 9)
