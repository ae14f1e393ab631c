"""The functions that ``import dfmpc`` offers: run a job, or compress one network in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .compress.compress import compress_model
from .compress.result import Compressed
from .errors import NonFiniteError, UsageError
from .job.loader import load_job
from .job.plan import plan_from
from .job.sources import ModelSource
from .models.capture import capture_program, export_program
from .models.factory import AllowList
from .models.load import LoadedModel
from .run.begin import RunOptions, RunSummary, run_job


def run(job: str | Path, *, output: str | None = None, **options: Any) -> RunSummary:
    """Run a job file as ``dfmpc run`` does and return its rows, its folder and the exit code the command would have.

    ``output`` replaces the job's; ``options`` are the fields of ``RunOptions``: ``only``, ``retry_failed``,
    ``devices``, ``allow_code``, ``progress``, ``explain``. Signals are caught only in the main thread.

    Raises JobFileError or UsageError where nothing could start.

    Example:
        summary = dfmpc.run("jobs/quickstart.yaml", output="store", only="*/rtn*", progress=False)
        for row in summary.rows:
            print(row.task, row.status, row.ratio)

    """
    known = RunOptions.__dataclass_fields__
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise UsageError(f"run() got {', '.join(unknown)}; the options are output, {', '.join(known)}")
    chosen = RunOptions(**options)
    allow = AllowList.default(chosen.allow_code)
    return run_job(load_job(Path(job), output=output, allows=allow.allows), chosen)


def compress(module: nn.Module, input_shape: Sequence[int], *, device: str = "cpu", **plan: Any) -> Compressed:
    """Compress a network in memory and return its codes, corrected tensors and figures; ``module`` is left as it is.

    ``input_shape`` is that of one example input, batch first; ``plan`` has the fields of a job file's bit-plan
    (``name`` may be left out); ``device`` is where the kernels run, such as ``cpu`` or ``cuda:0``.

    Raises UsageError for a plan that is none, NonFiniteError, and UnsupportedModelError for a network that cannot be
    captured or paired.

    Example:
        compressed = dfmpc.compress(model, [1, 3, 224, 224], method="dfmpc", low=2, high=6)
        for layer in compressed.layers:
            print(layer.layer.name, layer.role, layer.quantized.format.bits, layer.sqnr_db)
        model.load_state_dict(compressed.changed(), strict=False)

    """
    chosen = plan_from(plan)
    model = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise NonFiniteError(f"the module holds NaN or Inf in {', '.join(broken[:8])}: repair or retrain it")
    model.float()  # the state keeps its stored dtypes
    shape = tuple(int(size) for size in input_shape)
    source = ModelSource(name="module", input=list(shape))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    exported = export_program(model, shape)
    loaded = LoadedModel(source, model, capture_program(exported), state, shape, size, exported)
    return compress_model(loaded, chosen, (), device)
