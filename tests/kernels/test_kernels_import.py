from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import dfmpc.kernels
import pytest

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from dfmpc.kernels import Grid, dequantize, uniform
from dfmpc.kernels._triton import available, interpreted
q = uniform(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), 2, Grid.DOREFA, group_size=4)
print(available(), interpreted(), dequantize(q.format, q.codes, q.scale, None).tolist())
"""
FORMATS = """
import sys
from dfmpc.kernels import CodeFormat, Grid, Quantized
print(CodeFormat(Grid.TERNARY, 2, 9, 9).row_bytes, sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
MODULE_FIRST = """
import dfmpc.kernels.dequantize
from dfmpc.kernels.ternary import ternary
from dfmpc.kernels import dequantize, ternary as again
print(type(dequantize).__name__, ternary is again, dfmpc.kernels.dequantize is dequantize)
"""


def printed_by(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_references_work_where_triton_cannot_be_imported() -> None:
    assert printed_by(WITHOUT_TRITON) == "False False [[-3.0, -1.0, 1.0, 3.0]]"


def test_formats_need_neither_torch_nor_triton() -> None:
    assert printed_by(FORMATS) == "3 []"


def test_a_name_means_the_operation_also_after_its_module_was_imported() -> None:
    assert printed_by(MODULE_FIRST) == "function True True"


def test_every_operation_is_found_and_others_are_errors() -> None:
    for name in dfmpc.kernels._HOMES:
        assert not isinstance(getattr(dfmpc.kernels, name), ModuleType), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dfmpc.kernels.nothing  # noqa: B018 - the access is what is tested
