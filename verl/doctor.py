"""`verl doctor`: shows installed versions, devices and disk space, and reports problems with their fixes."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl.errors import UserError
from verl.progress import open_console

if TYPE_CHECKING:
    from verl.models.attention.flash import Kernel

MIN_FREE_GIB = 10  # a checkpoint of a 0.5B model with its optimizer takes about 7 GiB

State = Literal["ok", "absent", "warning", "missing"]
COLORS: dict[State, str] = {"ok": "green", "absent": "dim", "warning": "yellow", "missing": "red"}


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        state: "absent" means optional and not installed; "missing" means that runs cannot start.
        advice: what to do; empty if nothing.
    """

    group: str
    name: str
    found: str
    state: State = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Return all findings, in the order of the report."""
    return [*_python(), *_packages(), *_devices(), *_disk()]


def _python() -> Iterator[Finding]:
    yield Finding("system", "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", "machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores")


def _packages() -> Iterator[Finding]:
    """Compare the requirements in pyproject.toml with the installed packages."""
    try:
        yield Finding("needed", "verl", metadata.version("verl"))
        requirements = [Requirement(text) for text in metadata.requires("verl") or []]
    except metadata.PackageNotFoundError:
        yield Finding("needed", "verl", "not installed, imported from its source folder", "warning", "pip install -e .")
        return
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, extra=None)
    for extra in metadata.metadata("verl").get_all("Provides-Extra") or []:
        named = [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})]
        if extra != "dev":
            yield from (_package(requirement, extra) for requirement in named)


def _package(requirement: Requirement, extra: str | None) -> Finding:
    group = "optional" if extra else "needed"
    command = f'pip install "verl[{extra}]"' if extra else f'pip install "{requirement.name}{requirement.specifier}"'
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(group, requirement.name, "not installed", "absent" if extra else "missing", command)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            group, requirement.name, f"{version}, but {requirement.specifier} is needed", "warning" if extra else "missing", command
        )
    return Finding(group, requirement.name, version)


def _devices() -> Iterator[Finding]:
    """Report the GPUs and the attention kernels that a run can use."""
    try:
        import torch

        from verl.engine.decisions import refusals
        from verl.engine.description import describe_attention
        from verl.engine.hardware import measure
        from verl.models.attention.flash import Heads
        from verl.models.attention.packed import AttentionChoice
    except ImportError as error:
        yield Finding("device", "torch", f"cannot be imported: {error}", "missing", "install the missing packages above")
        return
    if not torch.cuda.is_available():
        yield _no_gpu(has_driver=shutil.which("nvidia-smi") is not None, cuda=torch.version.cuda)
        yield Finding("device", "attention", describe_attention(AttentionChoice(), "cpu", torch.float32))
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield _gpu(index, torch.cuda.get_device_name(index), free / 2**30, total / 2**30, torch.cuda.get_device_capability(index))
    yield Finding("device", "CUDA", f"{torch.version.cuda}")
    # Check the kernels with common head sizes; a run checks them with those of its model.
    heads = Heads(query=8, key_value=2, size=128)
    yield from _attention(refusals(measure(torch.device("cuda", 0)), torch.bfloat16, [heads]))


def _attention(refusals: "dict[Kernel, str | None]") -> Iterator[Finding]:
    """Report the attention kernel that a run uses on this GPU, and why it does not use each of the others."""
    from verl.models.attention import flash

    yield Finding("device", "attention", flash.version(next((kernel for kernel, why in refusals.items() if why is None), "fa2")))
    for kernel, refusal in refusals.items():
        package = flash.PACKAGES[kernel]
        if refusal == flash.NOT_INSTALLED:
            yield Finding("device", package.name, refusal, "absent", package.install)
        elif refusal is not None:
            yield Finding("device", package.name, refusal, "warning", f"optional; another release may work: {package.install}")


def _gpu(index: int, name: str, free_gib: float, total_gib: float, capability: tuple[int, int]) -> Finding:
    gpu = Finding("device", f"GPU {index}", f"{name}, {free_gib:.0f} of {total_gib:.0f} GiB free")
    if capability < (8, 0):
        gpu.state, gpu.advice = "warning", "no bfloat16 before Ampere (A100): set model.compute_dtype=float32"
    elif free_gib < total_gib / 2:
        gpu.state, gpu.advice = "warning", "another process uses it: see nvidia-smi"
    return gpu


def _no_gpu(*, has_driver: bool, cuda: str | None) -> Finding:
    if not has_driver:
        return Finding("device", "GPU", "none; runs use the CPU")
    found = (
        "a driver is installed, but this torch is built without CUDA"
        if cuda is None
        else f"a driver is installed, but torch (CUDA {cuda}) cannot use it"
    )
    advice = "install a CUDA build of torch" if cuda is None else "check nvidia-smi; the driver may be too old for this CUDA version"
    return Finding("device", "GPU", found, "warning", advice)


def _disk() -> Iterator[Finding]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    models = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()
    yield _space("current folder", Path.cwd())
    yield _space("tokenized rows", cache / "verl")
    yield _space("downloaded models", models)


def _space(name: str, path: Path) -> Finding:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**30
    found = f"{free:.0f} GiB free in {path}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", name, f"{path} cannot be written", "warning", "change its permissions, or use another folder")
    if free < MIN_FREE_GIB:
        return Finding("disk", name, found, "warning", "free disk space: a checkpoint takes about 14 bytes per parameter")
    return Finding("disk", name, found)


def report(findings: list[Finding], console: Console) -> None:
    """Print the table, then each problem with its fix."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in ("group", "name", "found", "advice"):
        table.add_column(overflow="fold")
    group = ""
    for finding in findings:
        table.add_row(
            "" if finding.group == group else finding.group,
            finding.name,
            Text(finding.found, COLORS[finding.state] if finding.state != "ok" else ""),
            Text(finding.advice),
        )
        group = finding.group
    console.print(table)
    problems = [finding for finding in findings if finding.state in ("warning", "missing")]
    for finding in problems:
        console.print(Text(f"{finding.state}: {finding.name}: {finding.found}\n  fix: {finding.advice}", COLORS[finding.state]))
    if not problems:
        console.print(Text("everything that a run needs is installed", COLORS["ok"]))


def main(argv: list[str]) -> None:
    """Run the command. Raises SystemExit(1) if something that a run needs is missing."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n\nexample: verl doctor")
        return
    if argv:
        raise UserError(f"cannot read {argv[0]!r}", fix="verl doctor takes no arguments")
    findings = examine()
    report(findings, open_console())
    if any(finding.state == "missing" for finding in findings):
        raise SystemExit(1)
