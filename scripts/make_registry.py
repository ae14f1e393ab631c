#!/usr/bin/env python
"""Writes a registry: seeded networks of mixed size as checkpoints and programs, and a job file over them.

    python scripts/make_registry.py OUT --models 40 [--seed 0] [--mix small|mixed|large | --size-mib 2,20]
        [--sources pt2,safetensors] [--families resnet,vgg] [--plan '{name: r4, method: rtn, bits: 4}'] …
    python scripts/make_registry.py OUT --small        # 1,000 networks of about 2 MiB each
    dfmpc run OUT/job.yaml --allow-code OUT/code

OUT gets ``models/`` (a .safetensors or .pt2 file a network), ``code/registry_networks.py`` (the factories),
``job.yaml`` and ``registry.json`` (family, width, bytes and sha256 of every file). It appears whole or not at all.
The same arguments and version of torch give the same bytes, and a longer registry begins with the networks of a
shorter one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import random
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from dfmpc.errors import DfmpcError, JobFileError, StorageError, UsageError
from dfmpc.job.loader import load_job
from registry_networks import FAMILIES, fill
from safetensors.torch import save
from torch import nn
from torch.export import ExportedProgram

MIXES = {"small": (2.0,), "mixed": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), "large": (128.0, 256.0, 512.0)}
"""Sizes in MiB; of several a network's is drawn with probability 1 / size, as registries have few large ones."""
SOURCES = ("pt2", "safetensors")
PLAN = "{name: mp2-6, method: dfmpc, low: 2, high: 6, recipe: published}"
SMALL = 1000
"""Networks of ``--small``."""
_MIB = 2**20
_CODE = "registry_networks"
_WIDEST = 4096


@dataclass(frozen=True)
class Network:
    """One network to write. ``seed`` is that of its tensors."""

    name: str
    family: str
    width: int
    source: str
    seed: int

    @property
    def file(self) -> str:
        """Its file below the registry's folder."""
        return f"models/{self.name}.{self.source}"


@dataclass(frozen=True)
class Wishes:
    """What a registry should hold. ``sizes`` in MiB of checkpoint, ``side`` of the square images in pixels."""

    models: int
    seed: int
    sizes: tuple[float, ...]
    sources: tuple[str, ...]
    families: tuple[str, ...]
    plans: tuple[str, ...]
    side: int


@cache
def checkpoint_bytes(family: str, width: int) -> int:
    """Return the bytes of all tensors of a network; nothing is allocated."""
    with torch.device("meta"):
        state = FAMILIES[family](width).state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@cache
def width_for(family: str, size: int) -> int:
    """Return the even width whose checkpoint is nearest to ``size`` bytes."""
    low, high = 2, _WIDEST
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (middle, high) if checkpoint_bytes(family, middle) <= size else (low, middle)
    return min((low, high), key=lambda width: abs(checkpoint_bytes(family, width) - size))


def networks_of(wishes: Wishes) -> list[Network]:
    """Return the networks; each follows from the seed and its own number alone."""
    return [_network(wishes, index) for index in range(wishes.models)]


def _network(wishes: Wishes, index: int) -> Network:
    draw = random.Random(f"{wishes.seed}/{index}")
    (size,) = draw.choices(wishes.sizes, [1 / size for size in wishes.sizes])
    families, sources = wishes.families, wishes.sources
    family = families[index % len(families)]
    source = sources[(index + index // len(families)) % len(sources)]
    return Network(f"{family}-{index:04}", family, width_for(family, int(size * _MIB)), source, draw.getrandbits(48))


def job_text(wishes: Wishes, networks: Sequence[Network]) -> str:
    """Return the job file, a network a line."""
    head = ["version: 1", "name: registry", "output: store/registry", "bit_plans:"]
    plans = [f"  - {_flow(yaml.safe_load(plan))}" for plan in wishes.plans]
    models = [f"  - {_flow(_entry(network, wishes.side))}" for network in networks]
    return "\n".join([*head, *plans, "models:", *models]) + "\n"


def _entry(network: Network, side: int) -> dict[str, object]:
    if network.source == "pt2":
        return {"name": network.name, "program": network.file}
    factory = {"factory": f"{_CODE}:{network.family}", "args": [network.width]}
    return {"name": network.name, **factory, "checkpoint": network.file, "input": [1, 3, side, side]}


def _flow(content: object) -> str:
    return yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10**6).strip()


def write_registry(out: Path, wishes: Wishes) -> list[Network]:
    """Write the registry to ``out``, which must be absent or empty, and return its networks.

    Raises UsageError for such a folder or a plan that no job takes, StorageError where the disk refuses.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: name a new folder, or remove this one first")
    networks = networks_of(wishes)
    draft = out.parent / f".{out.name}.{uuid.uuid4().hex}.tmp"
    try:
        for folder in (draft / "models", draft / "code"):
            folder.mkdir(parents=True)
        _check_space(draft, networks)
        shutil.copyfile(Path(__file__).with_name(f"{_CODE}.py"), draft / "code" / f"{_CODE}.py")
        (draft / "job.yaml").write_text(job_text(wishes, networks), encoding="utf-8")
        _check_job(draft / "job.yaml", wishes)
        _write_models(draft, networks, wishes)
        draft.rename(out)
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written ({error.strerror}): choose another folder or free space"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return networks


def _check_space(folder: Path, networks: Sequence[Network]) -> None:
    needed = sum(checkpoint_bytes(network.family, network.width) for network in networks)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(f"{needed / _MIB:.0f} MiB of networks, {free / _MIB:.0f} MiB free: make fewer or smaller ones")


def _check_job(file: Path, wishes: Wishes) -> None:
    """Refuse plans before hours are spent on networks."""
    try:
        load_job(file)
    except JobFileError as error:
        said = "; ".join(f"{one.field}: got {one.value}, expected {one.expected}" for one in error.problems)
        raise UsageError(f"no job takes these arguments ({', '.join(wishes.plans)}): {said}") from error


def _write_models(draft: Path, networks: Sequence[Network], wishes: Wishes) -> None:
    """Write every network and ``registry.json``; networks of one shape share a module, which is filled again."""
    entries = {}
    ordered = sorted(networks, key=lambda network: (network.family, network.width, network.name))
    for (family, width), group in itertools.groupby(ordered, lambda network: (network.family, network.width)):
        for network, content in _contents(family, width, list(group), wishes.side):
            (draft / network.file).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            entries[network.name] = {**asdict(network), "file": network.file, "bytes": len(content), "sha256": digest}
    made = {"arguments": asdict(wishes), "torch": torch.__version__, "models": [entries[one.name] for one in networks]}
    (draft / "registry.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _contents(family: str, width: int, group: Sequence[Network], side: int) -> Iterator[tuple[Network, bytes]]:
    module = FAMILIES[family](width).eval().requires_grad_(False)
    program = _program(module, side) if any(network.source == "pt2" for network in group) else None
    for network in group:
        fill(module, network.seed)  # the program shares the module's tensors
        if network.source == "pt2" and program is not None:
            archive = io.BytesIO()  # torch's own writer aborts the process where the disk is full
            torch.export.save(program, archive)
            yield network, archive.getvalue()
        else:
            yield network, save(module.state_dict())


def _program(module: nn.Module, side: int) -> ExportedProgram:
    program = torch.export.export(module, (torch.zeros(1, 3, side, side),))
    for node in program.graph.nodes:  # these hold paths of this machine, so the bytes would depend on the folder
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(name, None)
    return program


def _listed(known: Sequence[str], text: str) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not asked or set(asked) - set(known):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(known)}, separated by commas")
    return asked


def _sizes(text: str) -> tuple[float, ...]:
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(0.1 <= size <= 4096 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected sizes between 0.1 and 4096 MiB, separated by commas")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 5000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 to 5000 (a job file holds no more)")
    return int(text)


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) % 16 or not 16 <= int(text) <= 512:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a multiple of 16 from 16 to 512")
    return int(text)


def _plan(text: str) -> str:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a mapping such as {PLAN}")
    return text


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, help="folder to write: absent or empty")
    made.add_argument("--models", type=_count, help="how many networks")
    made.add_argument("--small", action="store_true", help=f"{SMALL} networks of 2 MiB: --models {SMALL} --mix small")
    made.add_argument("--seed", type=int, default=0)
    sizes = made.add_mutually_exclusive_group()
    sizes.add_argument("--mix", choices=list(MIXES), help="sizes in MiB: " + str(MIXES).strip("{}"))
    sizes.add_argument("--size-mib", type=_sizes, help="sizes to draw from instead, separated by commas")
    made.add_argument("--sources", type=lambda text: _listed(SOURCES, text), default=SOURCES)
    made.add_argument("--families", type=lambda text: _listed(list(FAMILIES), text), default=tuple(FAMILIES))
    made.add_argument("--side", type=_side, default=32, help="side of the input images in pixels")
    made.add_argument("--plan", type=_plan, action="append", help=f"a bit-plan, may be repeated; default {PLAN}")
    return made


def wishes_of(arguments: argparse.Namespace) -> Wishes:
    """Raises UsageError where neither --models nor --small says how many."""
    if arguments.models is None and not arguments.small:
        raise UsageError("how many networks? give --models N, or --small for 1,000 of 2 MiB")
    sizes = arguments.size_mib or MIXES[arguments.mix or ("small" if arguments.small else "mixed")]
    plans = tuple(arguments.plan or [PLAN])
    models = arguments.models or SMALL
    return Wishes(models, arguments.seed, sizes, arguments.sources, arguments.families, plans, arguments.side)


def main(given: Sequence[str] | None = None) -> int:
    """Write a registry; 2 for arguments that cannot be carried out."""
    arguments = parser().parse_args(given)
    try:
        networks = write_registry(arguments.out, wishes_of(arguments))
    except DfmpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    size = sum((arguments.out / network.file).stat().st_size for network in networks)
    print(f"{len(networks)} networks, {size / _MIB:.1f} MiB: {arguments.out}")
    print(f"dfmpc run {arguments.out / 'job.yaml'} --allow-code {arguments.out / 'code'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
