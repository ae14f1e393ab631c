from __future__ import annotations

import subprocess
import sys

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from dfmpc.kernels import Grid, dequantize, uniform
from dfmpc.kernels._triton import available, interpreted
q = uniform(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), 2, Grid.DOREFA, group_size=4)
print(available(), interpreted(), dequantize(q.format, q.codes, q.scale, None).tolist())
"""


def test_references_work_where_triton_cannot_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False False [[-3.0, -1.0, 1.0, 3.0]]", done.stderr
