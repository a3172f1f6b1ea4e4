"""``gpupool smi``"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from .command import Command

#: Inner widths of the columns: GPU and server, name, memory granted and used, busy.
_GPU = (5, 38, 31, 8)
#: GPU, lease, owner and label, memory used of granted.
_SLICE = (5, 38, 25, 14)


class SmiApp(Command):
    name = "smi"
    description = (
        "Show every GPU of the pool as nvidia-smi does: memory granted and used, utilization, and the holders of its\n"
        "slices. Emulated GPUs are marked."
    )
    lists = True

    def act(self) -> int:
        client, pool = self.pool()
        if self.args.json:
            self.print_json(pool)
        else:
            print(
                "\n".join(picture(pool, urlsplit(client.url).netloc, time.strftime("%a %b %d %H:%M:%S %Y")))
            )
        return 0


def picture(pool: dict[str, Any], where: str, when: str) -> Iterator[str]:
    """Yield the table's lines for an answer of ``GET pool``."""
    gpus = [(server, gpu) for server in pool["servers"] for gpu in server["gpus"]]
    emulated = sum(gpu["emulated"] for _, gpu in gpus)
    real = len(gpus) - emulated
    kinds = ", ".join(f"{n} {kind}" for n, kind in ((real, "real"), (emulated, "emulated")) if n) or "none"
    yield when
    yield _rule(_GPU, "-")
    yield _across(
        f"gpupool {pool['version']}   Pool: {where}   GPUs: {kinds}   Waiting: {len(pool['queue'])}", _GPU
    )
    yield _rule(_GPU, "-")
    yield _cells(["GPU", "Name", "Memory granted / used / total", "Busy"], _GPU, ">< >>")
    yield _rule(_GPU, "=")
    for server, gpu in gpus:
        memory = f"{gpu['granted_mib']} / {gpu['used_mib']} / {gpu['memory_mib']} MiB"
        yield _cells([str(gpu["index"]), gpu["name"], memory, f"{gpu['busy']:.0%}"], _GPU, "><>>")
        notes = [server["name"]]
        if gpu["emulated"]:
            notes.append("EMULATED: the CPU does its work")
        if not gpu.get("healthy", True):
            notes.append(f"NOT HEALTHY: {gpu.get('trouble') or 'no new slices'}")
        yield _cells(["", notes[0], "; ".join(notes[1:]), ""], _GPU, "><<>")
        yield _rule(_GPU, "-")
    yield ""
    yield _rule(_SLICE, "-")
    yield _cells(["GPU", "Lease", "Holder", "Used / MiB"], _SLICE, "><<>")
    yield _rule(_SLICE, "=")
    slices = [(gpu, piece) for _, gpu in gpus for piece in gpu["slices"]]
    for gpu, piece in slices:
        holder = " ".join(x for x in (piece["owner"] or "somebody else", piece.get("label") or "") if x)
        if piece.get("frameworks"):
            holder = f"{holder} ({', '.join(piece['frameworks'])})"
        used = f"{piece.get('used_mib', 0)} / {piece['memory_mib']}"
        yield _cells([str(gpu["index"]), piece["lease"] or "", holder, used], _SLICE, "><<>")
        if piece.get("overhead_mib"):
            yield _cells(["", "", "of it for CUDA itself", str(piece["overhead_mib"])], _SLICE, "><<>")
    if not slices:
        yield _across("No slices are granted", _SLICE)
    yield _rule(_SLICE, "-")


def _rule(widths: Sequence[int], line: str) -> str:
    return "+" + "+".join(line * (width + 2) for width in widths) + "+"


def _cells(texts: Sequence[str], widths: Sequence[int], sides: str) -> str:
    sides = sides.replace(" ", "")
    cells = (f" {_fit(text, width):{side}{width}} " for text, width, side in zip(texts, widths, sides))
    return "|" + "|".join(cells) + "|"


def _across(text: str, widths: Sequence[int]) -> str:
    width = sum(widths) + 3 * (len(widths) - 1)
    return f"| {_fit(text, width):<{width}} |"


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
