"""``nvidia-smi`` of a process with a lease: shows its slices in the form of NVIDIA's own command.

``jupyter_gpupool/bin/nvidia-smi`` runs it. Where there is no lease it runs the machine's own nvidia-smi instead.
What the pool does not know about a GPU is ``N/A``, as NVIDIA's command writes for what a GPU does not support.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core.environment import LEASE
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

#: NVIDIA's exit codes for a wrong argument, and where there is no driver to ask.
_USAGE, _NO_DRIVER = 2, 9
_PATIENCE_S = 2.0

HELP = """\
nvidia-smi of a process with leased GPU slices (gpupool {version})

usage: nvidia-smi [-i ID] [-l SECONDS]
       nvidia-smi -L
       nvidia-smi --query-gpu=FIELD,... --format=csv[,noheader][,nounits]
       nvidia-smi -q [-x]

  -L, --list-gpus           list the slices with their UUIDs
  --query-gpu=FIELD,...     print fields as CSV
  --query-compute-apps=...  print the processes that compute; the pool does not show them, so there are no rows
  --help-query-gpu          list the fields
  --format=csv,...          with noheader: no header; with nounits: no MiB, % and W
  -q, --query               print what is known of each slice
  -x, --xml-format          as XML
  -i, --id=ID,...           only these: an index, or a UUID
  -l, --loop=SECONDS        print again and again
  -lms, --loop-ms=MS        the same, in milliseconds
  -h, --help                print this

Memory is the slice's, not the whole GPU's. CUDA_VISIBLE_DEVICES hides nothing here.
"""


class UsageError(Exception):
    """Arguments that make no sense; the message is one line."""


@dataclass(frozen=True)
class Row:
    """One slice: what the lease's file has, and what the pool measured, or None."""

    device: DeviceSpec
    used_mib: int | None = None
    busy: float | None = None


#: What prints one field, without its unit.
_Field = Callable[[Row], "str | int | None"]


def _used(row: Row) -> int | None:
    return row.used_mib


def _free(row: Row) -> int | None:
    return None if row.used_mib is None else max(0, row.device.limit_mib - row.used_mib)


def _busy(row: Row) -> int | None:
    return None if row.busy is None else round(100 * row.busy)


def _unknown(row: Row) -> None:
    return None


#: Fields by NVIDIA's names: the unit in the header and behind the value, and the value.
FIELDS: dict[str, tuple[str, _Field]] = {
    "timestamp": ("", lambda row: time.strftime("%Y/%m/%d %H:%M:%S.000")),
    "driver_version": ("", _unknown),
    "count": ("", _unknown),  # see _query
    "name": ("", lambda row: row.device.name),
    "serial": ("", _unknown),
    "uuid": ("", lambda row: row.device.uuid),
    "index": ("", lambda row: row.device.index),
    "pci.bus_id": ("", _unknown),
    "pci.bus": ("", _unknown),
    "pci.device": ("", _unknown),
    "pci.domain": ("", _unknown),
    "pci.device_id": ("", _unknown),
    "vbios_version": ("", _unknown),
    "display_mode": ("", lambda row: "Disabled"),
    "display_active": ("", lambda row: "Disabled"),
    "persistence_mode": ("", _unknown),
    "compute_mode": ("", lambda row: "Default"),
    "compute_cap": ("", _unknown),
    "mig.mode.current": ("", _unknown),
    "mig.mode.pending": ("", _unknown),
    "fan.speed": ("%", _unknown),
    "pstate": ("", _unknown),
    "memory.total": ("MiB", lambda row: row.device.limit_mib),
    "memory.reserved": ("MiB", lambda row: 0),
    "memory.used": ("MiB", _used),
    "memory.free": ("MiB", _free),
    "utilization.gpu": ("%", _busy),
    "utilization.memory": ("%", _unknown),
    "temperature.gpu": ("", _unknown),
    "temperature.memory": ("", _unknown),
    "power.management": ("", _unknown),
    "power.draw": ("W", _unknown),
    "power.draw.average": ("W", _unknown),
    "power.draw.instant": ("W", _unknown),
    "power.limit": ("W", _unknown),
    "power.max_limit": ("W", _unknown),
    "enforced.power.limit": ("W", _unknown),
    "clocks.gr": ("MHz", _unknown),
    "clocks.sm": ("MHz", _unknown),
    "clocks.mem": ("MHz", _unknown),
    "clocks.max.sm": ("MHz", _unknown),
    "clocks.max.mem": ("MHz", _unknown),
    "ecc.mode.current": ("", _unknown),
    "pcie.link.gen.current": ("", _unknown),
    "pcie.link.gen.max": ("", _unknown),
    "pcie.link.width.current": ("", _unknown),
    "pcie.link.width.max": ("", _unknown),
}
_ALIASES = {
    "gpu_name": "name",
    "gpu_uuid": "uuid",
    "gpu_serial": "serial",
    "gpu_bus_id": "pci.bus_id",
    "clocks.current.graphics": "clocks.gr",
    "clocks.current.sm": "clocks.sm",
    "clocks.current.memory": "clocks.mem",
    "clocks.max.memory": "clocks.max.mem",
}
#: The header of each field of --query-compute-apps.
_APPS = {
    "timestamp": "timestamp",
    "gpu_name": "gpu_name",
    "gpu_bus_id": "gpu_bus_id",
    "gpu_serial": "gpu_serial",
    "gpu_uuid": "gpu_uuid",
    "pid": "pid",
    "process_name": "process_name",
    "name": "process_name",
    "used_memory": "used_gpu_memory [MiB]",
    "used_gpu_memory": "used_gpu_memory [MiB]",
}


@dataclass
class Arguments:
    """The parsed command line."""

    listed: bool = False
    fields: str | None = None
    apps: str | None = None
    format: str | None = None
    query: bool = False
    xml: bool = False
    ids: tuple[str, ...] = ()
    loop_s: float | None = None


def parse(argv: Sequence[str]) -> Arguments:
    """Parse NVIDIA's options. Raises UsageError."""
    found = Arguments()
    words = iter(argv)

    def value_of(name: str, value: str | None) -> str:
        value = next(words, None) if value is None else value
        if not value:
            raise UsageError(f"the option {name} needs a value")
        return value

    for word in words:
        name, equals, rest = word.partition("=")
        value = rest if equals else None
        if name in ("-L", "--list-gpus"):
            found.listed = True
        elif name == "--query-gpu":
            found.fields = value_of(name, value)
        elif name == "--query-compute-apps":
            found.apps = value_of(name, value)
        elif name == "--format":
            found.format = value_of(name, value)
        elif name in ("-q", "--query"):
            found.query = True
        elif name in ("-x", "--xml-format"):
            found.xml = True
        elif name in ("-i", "--id"):
            found.ids = tuple(part.strip() for part in value_of(name, value).split(","))
        elif name in ("-l", "--loop", "-lms", "--loop-ms"):
            text = value_of(name, value)
            if not text.isdecimal() or not int(text):
                raise UsageError(f"the option {name} needs a number from 1 up, not {text!r}")
            found.loop_s = int(text) / (1000 if "ms" in name else 1)
        else:
            raise UsageError(
                f"{word!r} is not available for leased GPU slices; nvidia-smi --help lists what is"
            )
    if (found.fields or found.apps) and "csv" not in (found.format or "").split(","):
        raise UsageError("--query-gpu and --query-compute-apps need --format=csv")
    if found.format and not (found.fields or found.apps):
        raise UsageError("--format is for --query-gpu and --query-compute-apps")
    wrong = set((found.format or "").split(",")) - {"", "csv", "noheader", "nounits"}
    if wrong:
        raise UsageError(f"there is no format {sorted(wrong)[0]!r}; use csv, noheader, nounits")
    return found


def _selected(rows: Sequence[Row], ids: Sequence[str]) -> list[Row]:
    if not ids:
        return list(rows)
    chosen = []
    for id in ids:
        row = next((r for r in rows if id in (str(r.device.index), r.device.uuid)), None)
        if row is None:
            raise UsageError(f"No devices were found: this lease has no GPU {id!r}")
        chosen.append(row)
    return chosen


def _text(value: str | int | None, unit: str = "", missing: str = "N/A") -> str:
    return missing if value is None else f"{value} {unit}".rstrip()


def picture(arguments: Arguments, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines that the arguments ask for. Raises UsageError."""
    chosen = _selected(rows, arguments.ids)
    if arguments.listed:
        return (f"GPU {r.device.index}: {r.device.name} (UUID: {r.device.uuid})" for r in chosen)
    if arguments.fields:
        return _query(arguments.fields, arguments.format or "", chosen, len(rows))
    if arguments.apps:
        return _processes(arguments.apps, arguments.format or "")
    if arguments.query and arguments.xml:
        return iter([_xml(chosen)])
    if arguments.query:
        return _details(chosen)
    if arguments.xml:
        raise UsageError("-x is for -q: nvidia-smi -q -x")
    return _table(chosen)


def _query(fields: str, format: str, rows: Sequence[Row], count: int) -> Iterator[str]:
    names = [name.strip() for name in fields.split(",")]
    columns = []
    for name in names:
        known = _ALIASES.get(name, name)
        if known not in FIELDS:
            raise UsageError(
                f'Field "{name}" is not a valid field to query; nvidia-smi --help-query-gpu lists them'
            )
        columns.append((known, *FIELDS[known]))
    formats = format.split(",")
    if "noheader" not in formats:
        yield ", ".join(f"{name} [{unit}]" if unit else name for name, unit, _ in columns)
    for row in rows:
        yield ", ".join(
            _text(count if name == "count" else value(row), "" if "nounits" in formats else unit, "[N/A]")
            for name, unit, value in columns
        )


def _processes(fields: str, format: str) -> Iterator[str]:
    names = [name.strip() for name in fields.split(",")]
    for name in names:
        if name not in _APPS:
            raise UsageError(f'Field "{name}" is not a valid field to query; use {", ".join(_APPS)}')
    if "noheader" not in format.split(","):
        yield ", ".join(_APPS[name] for name in names)


def _details(rows: Sequence[Row]) -> Iterator[str]:
    def line(depth: int, name: str, value: str) -> str:
        return f"{'    ' * depth}{name:<{44 - 4 * depth}}: {value}"

    yield "\n==============NVSMI LOG==============\n"
    yield line(0, "Timestamp", time.strftime("%a %b %d %H:%M:%S %Y"))
    yield line(0, "Driver Version", "N/A")
    yield line(0, "CUDA Version", "N/A")
    yield "\n" + line(0, "Attached GPUs", str(len(rows)))
    for row in rows:
        yield f"GPU {row.device.index}"
        yield line(1, "Product Name", row.device.name)
        yield line(1, "GPU UUID", row.device.uuid)
        yield line(1, "Leased Slice Of", f"{row.device.total_mib} MiB")
        yield "    FB Memory Usage"
        yield line(2, "Total", f"{row.device.limit_mib} MiB")
        yield line(2, "Reserved", "0 MiB")
        yield line(2, "Used", _text(_used(row), "MiB"))
        yield line(2, "Free", _text(_free(row), "MiB"))
        yield "    Utilization"
        yield line(2, "Gpu", _text(_busy(row), "%"))
        yield line(2, "Memory", "N/A")
        yield line(1, "Processes", "N/A")


def _xml(rows: Sequence[Row]) -> str:
    log = ElementTree.Element("nvidia_smi_log")

    def add(parent: ElementTree.Element, name: str, text: str = "", **attributes: str) -> ElementTree.Element:
        child = ElementTree.SubElement(parent, name, attributes)
        child.text = text or None
        return child

    add(log, "timestamp", time.strftime("%a %b %d %H:%M:%S %Y"))
    add(log, "driver_version", "N/A")
    add(log, "cuda_version", "N/A")
    add(log, "attached_gpus", str(len(rows)))
    for row in rows:
        gpu = add(log, "gpu", id=row.device.uuid)
        add(gpu, "product_name", row.device.name)
        add(gpu, "uuid", row.device.uuid)
        add(gpu, "minor_number", str(row.device.index))
        memory = add(gpu, "fb_memory_usage")
        add(memory, "total", f"{row.device.limit_mib} MiB")
        add(memory, "reserved", "0 MiB")
        add(memory, "used", _text(_used(row), "MiB"))
        add(memory, "free", _text(_free(row), "MiB"))
        utilization = add(gpu, "utilization")
        add(utilization, "gpu_util", _text(_busy(row), "%"))
        add(utilization, "memory_util", "N/A")
        temperature = add(gpu, "temperature")
        add(temperature, "gpu_temp", "N/A")
        power = add(gpu, "gpu_power_readings")
        add(power, "power_draw", "N/A")
        add(power, "current_power_limit", "N/A")
        add(gpu, "processes")
    ElementTree.indent(log, "\t")
    body = ElementTree.tostring(log, encoding="unicode")
    return f'<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n{body}'


def _table(rows: Sequence[Row]) -> Iterator[str]:
    rule = "+-----------------------------------------+------------------------+----------------------+"
    across = "+" + "-" * (len(rule) - 2) + "+"

    def cells(left: str, middle: str, right: str) -> str:
        return f"|{left[:41]:<41}|{middle[:24]:>24}|{right[:22]:>22}|"

    def wide(text: str) -> str:
        return f"| {text:<{len(rule) - 4}} |"

    yield time.strftime("%a %b %d %H:%M:%S %Y")
    yield across
    name = f"NVIDIA-SMI gpupool {__version__}"
    yield wide(f"{name[:36]:<36}Driver Version: N/A     CUDA Version: N/A")
    yield rule.replace("+", "|", 1)[:-1] + "|"
    yield cells(
        " GPU  Name                 Persistence-M ", " Bus-Id          Disp.A ", " Volatile Uncorr. ECC "
    )
    yield cells(
        " Fan  Temp   Perf          Pwr:Usage/Cap ", "           Memory-Usage ", " GPU-Util  Compute M. "
    )
    yield rule.replace("-", "=").replace("+", "|", 1)[:-1] + "|"
    for row in rows:
        used = _text(_used(row), missing="N/A")
        memory = f"{used}{'MiB' if row.used_mib is not None else ''} / {row.device.limit_mib}MiB "
        busy = _busy(row)
        yield cells(f"{row.device.index:>4}  {row.device.name}", "N/A                Off ", "N/A ")
        yield cells(
            " N/A   N/A  N/A             N/A /  N/A ",
            memory,
            f"{_text(busy)}{'%' if busy is not None else ''}      Default ",
        )
        yield rule
    yield ""
    yield across
    yield wide("Processes:")
    yield wide(" The pool does not show the processes of a lease")
    yield across


# -- the lease, and the machine's own nvidia-smi


def measured(spec: AttachSpec) -> list[Row] | None:
    """Return a row for each slice, with the pool's figures where it answers; None if the lease has ended."""
    unmeasured = [Row(device) for device in spec.devices]
    try:
        from jupyter_gpupool.client.pool_finder import running_pool
        from jupyter_gpupool.core.errors import PoolError
    except ImportError:  # another Python than the pool's client is installed for
        return unmeasured
    try:
        found = running_pool(patience_s=_PATIENCE_S)
    except PoolError:
        return unmeasured
    if found is None:
        return unmeasured
    client, pool = found
    client.close()
    pieces = {
        gpu["uuid"]: piece
        for server in pool["servers"]
        for gpu in server["gpus"]
        for piece in gpu["slices"]
        if piece["lease"] == spec.lease_id
    }
    if not pieces:
        return None
    return [
        Row(device, piece.get("used_mib"), piece.get("busy"))
        for device in spec.devices
        for piece in [pieces.get(device.uuid, {})]
    ]


def _run_own(argv: Sequence[str]) -> NoReturn:
    """Become the machine's own nvidia-smi, or report that there are no GPUs."""
    here = os.path.realpath(Path(__file__).parents[1] / "bin")
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if os.path.realpath(folder) != here)
    own = shutil.which("nvidia-smi", path=path)
    if own is not None:
        os.execv(own, [own, *argv])
    print(
        "nvidia-smi: this process has no leased GPUs (any more), and this machine has no NVIDIA driver; "
        "request GPUs with gpupool run or %gpupool request",
        file=sys.stderr,
    )
    sys.exit(_NO_DRIVER)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    spec = AttachSpec.read(os.environ.get(LEASE))
    rows = measured(spec) if spec is not None and spec.mode != "direct" else None
    if spec is None or rows is None:
        _run_own(argv)
    if {"-h", "--help"} & set(argv):
        print(HELP.format(version=__version__), end="")
        return
    if "--help-query-gpu" in argv:
        print("\n".join(FIELDS))
        return
    try:
        arguments = parse(argv)
        while True:
            for line in picture(arguments, rows):
                print(line)
            sys.stdout.flush()
            if arguments.loop_s is None:
                return
            time.sleep(arguments.loop_s)
            rows = measured(spec)
            if rows is None:
                raise UsageError("the lease has ended")
    except UsageError as e:
        print(f"nvidia-smi: {e}", file=sys.stderr)
        sys.exit(_USAGE)
    except (KeyboardInterrupt, BrokenPipeError):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
