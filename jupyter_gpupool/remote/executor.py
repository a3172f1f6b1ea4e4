"""The worker's side of a session: a table of storages, a table of templates, and a loop over records."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import handles
from . import records as codes
from .graph_calls import Graphs
from .memory import host_bytes, rounded
from .program import BadRecord, Geometry, Template, dtype_named, nbytes_of, numel, pair
from .reports import report_call, report_of
from .slices import Device, with_generator
from .storages import Poisoned, Slot, Stray, within


class Session:
    """Executes one client's records. ``answer(header, payload)`` and ``complain(report)`` reach the client."""

    def __init__(
        self,
        devices: Sequence[Device],
        answer: Callable[[Any, memoryview | None], None],
        complain: Callable[[dict], None],
    ) -> None:
        self._devices = devices
        self._numbered = {d.spec.index: d for d in devices}
        self.home = devices[0]
        self._answer = answer
        self._complain = complain
        self.storages: dict[int, Slot] = {}
        self._templates: dict[int, Template] = {}
        self._previous: dict[int, Template] = {}
        self._geometries: dict[tuple, Geometry] = {}
        self._handles = handles.Handles(self.device)
        self.generator = self._handles.generator
        self._graphs = Graphs(self, complain)

    def close(self) -> None:
        for id in list(self.storages):
            self._free(id)

    # -- decoding

    def device(self, index: Any) -> Device:
        found = self._numbered.get(index) if isinstance(index, int) else None
        if found is None:
            raise BadRecord(f"device {index!r} of {len(self._devices)}")
        return found

    def geometry(self, wire: Any) -> Geometry:
        try:
            size, stride, offset, dtype, index = wire
            geom = (tuple(size), tuple(stride), int(offset), dtype_named(dtype), index)
            if len(geom[0]) != len(geom[1]) or min((*geom[0], *geom[1], geom[2]), default=0) < 0:
                raise ValueError("negative")
        except (TypeError, ValueError) as e:
            raise BadRecord(f"a geometry of {wire!r}: {e}") from None
        self.device(index)
        return self._geometries.setdefault(geom, geom)

    def _slot(self, id: Any) -> Slot:
        if not isinstance(id, int):
            raise BadRecord(f"a storage numbered {id!r}")
        try:
            return self.storages[id]
        except KeyError:
            raise Stray() from None

    # -- the loop

    def run(self, records: Any) -> None:
        """Execute a RECORDS frame. Raises :class:`BadRecord`; operators' own errors go to the client."""
        if not isinstance(records, list):
            raise BadRecord("records that are no list")
        i, n = 0, len(records)
        while i < n:
            code = records[i]
            i += 1
            if not isinstance(code, int):
                raise BadRecord(f"a record that starts with {code!r}")
            if code >= 0:
                template = self._templates.get(code) or self._previous.get(code)
                if template is None:
                    raise BadRecord(f"template {code} is not defined")
                end = i + template.size
                if end > n:
                    raise BadRecord("a record that is cut off")
                self._call(template, records[i:end])
                i = end
            else:
                width = codes.FIELDS.get(code)
                if width is None or i + width > n:
                    raise BadRecord(f"record code {code}")
                self._control(code, records[i : i + width])
                i += width

    def _control(self, code: int, fields: list) -> None:
        if code == codes.FREE:
            self._free(fields[0])
        elif code == codes.DEFINE:
            self._define(fields[0], fields[1])
        elif code == codes.ALLOCATE:
            self._allocate(*fields)
        elif code == codes.WRITE:
            self.write(fields[0], fields[1], memoryview(fields[2]))
        elif code == codes.READ:
            self._reply(self._read, *fields)
        elif code == codes.RUN:
            self._reply(self._run_now, *fields)
        elif code == codes.WAIT:
            self._reply(self._wait, fields[0])
        elif code == codes.SEED:
            for d in self._devices if fields[1] == -1 else [self.device(fields[1])]:
                d.generator.manual_seed(fields[0])
        elif code == codes.RESET:
            self._previous, self._templates = self._templates, {}
            self._geometries.clear()
            for slot in self.storages.values():
                slot.views.clear()
        elif code in self._graphs.records:
            self._graphs.records[code](*fields)
        elif code in handles.ANSWERS:
            self._reply(handles.ANSWERS[code], self._handles, *fields)
        else:
            self._guarded(handles.ACTS[code].__name__, handles.ACTS[code], self._handles, *fields)

    # -- storages

    def add(self, id: int, slot: Slot) -> None:
        if id in self.storages:
            raise BadRecord(f"storage {id} exists")
        self.storages[id] = slot

    def _free(self, id: int) -> None:
        slot = self.storages.pop(id, None)
        if slot is not None:
            slot.device.give(rounded(slot.nbytes))
        else:
            self._handles.free(id)

    def _allocate(self, id: int, nbytes: int, index: int) -> None:
        device = self.device(index)
        if not isinstance(nbytes, int) or nbytes < 0:
            raise BadRecord(f"an allocation of {nbytes!r} bytes")

        def allocate() -> Slot:
            device.take(rounded(nbytes))
            try:
                return Slot(
                    torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device), device, nbytes
                )
            except BaseException:
                device.give(rounded(nbytes))
                raise

        slot = self._guarded("empty", allocate)
        self.add(id, slot if isinstance(slot, Slot) else Slot(None, device, 0, slot))

    def target(self, id: int, wire: Any) -> torch.Tensor:
        """The tensor that a host-to-device copy fills. Raises :class:`Poisoned`."""
        geom = self.geometry(wire)
        slot = self._slot(id)
        within(slot, geom)
        return slot.view(geom)

    def upload(self, id: int, wire: Any, length: int, receive: Callable[[memoryview], None]) -> None:
        """A large host-to-device copy: straight into the tensor where its memory is the host's."""
        geom = self.geometry(wire)
        if length != numel(geom) * geom[3].itemsize:
            raise BadRecord("a copy whose size is not its tensor's")
        try:
            target: torch.Tensor | None = self.target(id, wire)
        except Poisoned:
            target = None
        if target is not None and target.device.type == "cpu" and target.is_contiguous():
            receive(host_bytes(target))
            return
        staging = torch.empty(geom[0], dtype=geom[3])
        receive(host_bytes(staging))
        if target is not None:
            self._guarded("copy_", target.copy_, staging)

    def write(self, id: int, wire: Any, elements: memoryview) -> None:
        geom = self.geometry(wire)
        if elements.nbytes != numel(geom) * geom[3].itemsize:
            raise BadRecord("a copy whose size is not its tensor's")
        try:
            target = self.target(id, wire)
        except Poisoned:
            return
        if elements.nbytes:
            source = torch.frombuffer(bytearray(elements), dtype=geom[3]).view(geom[0])
            self._guarded("copy_", target.copy_, source)

    def _read(self, id: int, wire: Any) -> tuple[Any, memoryview | None]:
        geom = self.geometry(wire)
        slot = self._slot(id)
        within(slot, geom)
        t = slot.view(geom).contiguous().cpu()
        data = host_bytes(t)
        self._keep = t  # until the answer is out
        return None, data if data.nbytes else None

    # -- operators

    def _define(self, id: int, definition: Any) -> None:
        if not isinstance(id, int) or id < 0 or id in self._templates:
            raise BadRecord(f"template number {id!r}")
        self._templates[id] = self._template(definition)

    def _template(self, definition: Any) -> Template:
        try:
            return Template(self, definition)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise BadRecord(f"a definition that makes no sense: {e}") from None

    def _call(self, t: Template, fields: list) -> None:
        n, m = t.n_tensors, t.n_tensors + t.n_scalars
        device = t.device
        started = time.perf_counter()
        taken = 0
        try:
            tensors = [self.input(fields[k], t.geometries[k]) for k in range(n)]
            args, kwargs = t.fill(tensors, fields[n:m])
            for geom in t.new:
                nbytes = rounded(nbytes_of(geom))
                device.take(nbytes)
                taken += nbytes
            if t.random and device.spec.emulated:
                got = with_generator(device, t.op, args, kwargs)
            else:
                got = t.op(*args, **kwargs)
            self._keep_results(t, fields[m:], got, tensors)
        except BadRecord:
            device.give(taken)
            raise
        except Exception as e:
            device.give(taken)
            report = e.report if isinstance(e, Poisoned) else report_call(t, fields, e)
            for id, geom in zip(fields[m:], t.new):
                self.storages.pop(id, None)
                self.add(id, Slot(None, self.device(geom[4]), 0, report))
            if not isinstance(e, Poisoned):
                self._complain(report)
        finally:
            device.busy_s += time.perf_counter() - started

    def input(self, id: Any, geom: Geometry) -> torch.Tensor:
        slot = self._slot(id)
        found = slot.views.get(geom)
        if found is None:
            within(slot, geom)
            found = slot.view(geom)
        return found

    def _keep_results(self, t: Template, ids: list, got: Any, inputs: list[torch.Tensor]) -> None:
        if not t.new:
            return
        pairs = [(t.results, got)] if isinstance(t.results, tuple) else pair(t.results, got)
        for id, (geom, value) in zip(ids, pairs):
            self.add(id, self._as_predicted(t, geom, value, inputs))

    def _as_predicted(
        self, t: Template, geom: Geometry, value: torch.Tensor, inputs: list[torch.Tensor]
    ) -> Slot:
        """The prediction is a contract: the client reads memory as it was predicted."""
        size, stride, _, dtype, index = geom
        device = self.device(index)
        if value.shape != size or value.dtype != dtype:
            # Often a result that nobody reads; if somebody does, it must not be wrong in silence.
            message = f"gives {tuple(value.shape)} {value.dtype} where {size} {dtype} was predicted; please report this"
            poison = {"operator": t.name, "type": "RuntimeError", "message": message}
            return Slot(None, device, nbytes_of(geom), poison)
        if (
            value.stride() != stride
            or value.storage_offset()
            or value.is_conj()
            or value.is_neg()
            or any(value is x or value.untyped_storage()._cdata == x.untyped_storage()._cdata for x in inputs)
        ):
            value = torch.empty_strided(size, stride, dtype=dtype, device=value.device).copy_(value)
        slot = Slot(value, device, nbytes_of(geom))
        slot.views[geom] = value
        return slot

    def _run_now(self, definition: Any, ids: Any, scalars: Any, number: Any) -> tuple[Any, None]:
        """Run an operator whose results the client could not predict, and describe them:
        None, ["value", scalar], ["same", input], ["view", input, geometry], ["new", id, geometry,
        bytes] or ["list", [descriptions]]."""
        t = self._template(definition)
        if len(ids) != t.n_tensors or len(scalars) != t.n_scalars:
            raise BadRecord("a call with too few or too many inputs")
        tensors = [self.input(id, t.geometries[k]) for k, id in enumerate(ids)]
        args, kwargs = t.fill(tensors, scalars)
        if t.random and t.device.spec.emulated:
            got = with_generator(t.device, t.op, args, kwargs)
        else:
            got = t.op(*args, **kwargs)
        return {"results": self._describe(got, t, tensors, itertools.count(4096 * number))}, None

    def _describe(self, value: Any, t: Template, inputs: list[torch.Tensor], numbers: Iterator[int]) -> Any:
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            return ["list", [self._describe(v, t, inputs, numbers) for v in value]]
        if not isinstance(value, torch.Tensor):
            return ["value", value]
        index = t.device.spec.index
        for k, x in enumerate(inputs):
            if value is x:
                return ["same", k]
            if value.untyped_storage()._cdata == x.untyped_storage()._cdata and value.numel():
                return ["view", k, _wire(value, index)]
        value = value.resolve_conj().resolve_neg()
        if value.storage_offset() or value.untyped_storage().nbytes() > value.numel() * value.itemsize:
            value = value.clone(memory_format=torch.contiguous_format)
        nbytes = value.untyped_storage().nbytes()
        t.device.take(rounded(nbytes))
        id = -next(numbers)
        self.add(id, Slot(value, t.device, nbytes))
        return ["new", id, _wire(value, index), nbytes]

    def _wait(self, index: int) -> tuple[None, None]:
        for d in self._devices:
            if not d.spec.emulated and index in (-1, d.spec.index):
                torch.cuda.synchronize(d.torch_device)
        return None, None

    # -- errors

    def _reply(self, function: Callable, *args: Any) -> None:
        try:
            header, payload = function(*args)
        except BadRecord:
            raise
        except Poisoned as e:
            header, payload = {"failed": e.report}, None
        except Exception as e:
            header, payload = (
                {"failed": report_of(args[0].get("op") if isinstance(args[0], dict) else None, e)},
                None,
            )
        self._answer(header, payload)

    def _guarded(self, name: str, function: Callable, *args: Any) -> Any:
        """The function's value, or the report of its failure, which the client gets as well."""
        try:
            return function(*args)
        except BadRecord:
            raise
        except Exception as e:
            report = report_of(f"aten::{name}", e)
            self._complain(report)
            return report


def _wire(t: torch.Tensor, index: int) -> list:
    return [list(t.shape), list(t.stride()), t.storage_offset(), str(t.dtype)[6:], index]
