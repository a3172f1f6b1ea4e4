"""Executes one client's commands: a table of storages, a table of templates, and a loop over commands."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol import commands as codes
from jupyter_gpupool.pytorch.protocol.recurrent import OPAQUE
from jupyter_gpupool.pytorch.protocol.sizes import host_bytes, rounded
from jupyter_gpupool.pytorch.torch_internals.worker import is_alias_of

from . import handles
from .collectives import Meetings
from .device import Device, HostCopy
from .device_errors import DeviceFailure
from .error_reports import report_call, report_of
from .exchanges import Exchanges
from .far_messages import FarMessages
from .graph_calls import Graphs
from .messages import Messages
from .peer_links import PeerLinks
from .read_ahead import SessionOver
from .recurrent import Saved
from .residence import Residence
from .schemas import differing
from .shared_storages import SharedStorages
from .storages import BeyondStorage, Poisoned, Slot, StaleTensorError, within
from .templates import BadRecord, Geometry, Template, decode_geometry, numel, pair

#: The most calls whose times a session keeps.
MAX_TRACED = 100_000
#: Of so many frames the calls may still be under way when a device fails, and so many of them are reported.
_MAX_UNFINISHED_FRAMES = 8
_MAX_UNDER_WAY = 20


class WorkerSession:
    """Executes one client's commands. ``answer(header, payload)`` and ``complain(report)`` reach the client."""

    def __init__(
        self,
        devices: Sequence[Device],
        answer: Callable[[Any, HostCopy | None], None],
        complain: Callable[[dict[str, Any]], None],
        shared: SharedStorages | None = None,
        numbers: Mapping[int, Device] | None = None,
        residence: Residence | None = None,
        on_failing: Callable[[], None] = lambda: None,
        on_failure: Callable[[DeviceFailure], None] = lambda failure: None,
        meetings: Meetings | None = None,
        messages: Messages | None = None,
        is_over: Callable[[], bool] = lambda: False,
        links: PeerLinks | None = None,
        far: FarMessages | None = None,
    ) -> None:
        self._residence = residence
        #: whether memory of this session has been copied, so that writes are noted
        self.has_copies = False
        self.shared = shared or SharedStorages()
        self._exchanges = Exchanges(
            self, meetings or Meetings(), messages or Messages(self.shared), is_over, links, far
        )
        self._is_due = self._exchanges.is_due
        #: stands for this session where its storages are shared
        self.sender = object()
        self.devices = devices
        #: the devices, by the numbers that the client has for them
        self.numbered = dict(numbers or {d.spec.index: d for d in devices})
        self.number = {d: index for index, d in self.numbered.items()}
        self.home = devices[0]
        self._accounts = {device: device.join() for device in dict.fromkeys(devices)}
        self._answer = answer
        self._send_report = complain
        #: called when a device is lost: before the client hears of it, and afterwards
        self._on_failing = on_failing
        self._on_failure = on_failure
        self._unfinished: deque[list[Any]] = deque(maxlen=_MAX_UNFINISHED_FRAMES)
        self.storages: dict[int, Slot] = {}
        self._templates: dict[int, Template] = {}
        self._previous: dict[int, Template] = {}
        self._geometries: dict[tuple[Any, ...], Geometry] = {}
        self.handles = handles.Handles(self.device)
        self.generator = self.handles.generator
        self.graphs = Graphs(self, self.complain)
        #: the times of calls, while a client's profiler runs
        self._trace: deque[list[Any]] | None = None
        self._began = 0.0
        self._commands = self._control_commands()
        if residence is not None:
            residence.join(self)

    def close(self) -> None:
        """Free every storage of the session."""
        if self._residence is not None:
            self._residence.leave(self)
        try:
            self.graphs.close()
        finally:  # also where a device is lost
            for id in list(self.storages):
                self._free(id)
            self.shared.end(self.sender)
            self._exchanges.leave()
            for device, account in self._accounts.items():
                device.leave(account)

    # -- decoding

    def device(self, index: Any) -> Device:
        """The slice ``index`` of the lease. Raises :class:`BadRecord`."""
        found = self.numbered.get(index) if isinstance(index, int) else None
        if found is None:
            raise BadRecord(f"device {index!r} of {len(self.devices)}")
        return found

    def geometry(self, wire: Any) -> Geometry:
        """The layout that a command carries. Raises :class:`BadRecord`."""
        geom = decode_geometry(wire)
        self.device(geom[4])
        return self._geometries.setdefault(geom, geom)

    def slot(self, id: Any) -> Slot:
        if not isinstance(id, int):
            raise BadRecord(f"a storage numbered {id!r}")
        try:
            return self.storages[id]
        except KeyError:
            raise StaleTensorError() from None

    # -- the loop

    def run(self, records: Any, finish: Callable[[], None] = lambda: None) -> None:
        """Execute the commands of a RECORDS frame. Errors of operators are reported to the client.

        ``finish`` counts the frame as executed, before anybody may find the session between two frames.
        Raises :class:`BadRecord` for what is no command.
        """
        if self._residence is None:
            self._run(records)
            finish()
            return
        gate = self._residence.gate
        gate.enter(records, self._is_due)
        try:
            self._run(records)
            finish()
        finally:
            gate.leave()

    def _run(self, records: Any) -> None:
        if not isinstance(records, list):
            raise BadRecord("commands that are no list")
        self._began = time.perf_counter()
        self._unfinished.append(records)
        try:
            self._run_each(records)
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as e:
            # Not of an operator, which is reported: fields are checked where they are used, and no earlier.
            raise BadRecord(f"a command with fields that it cannot have ({e})") from e
        self._submitted()

    def _run_each(self, records: list[Any]) -> None:
        i, n = 0, len(records)
        while i < n:
            code = records[i]
            i += 1
            if not isinstance(code, int):
                raise BadRecord(f"a command that starts with {code!r}")
            if code >= 0:
                template = self._templates.get(code) or self._previous.get(code)
                if template is None:
                    raise BadRecord(f"template {code} is not defined")
                end = i + template.size
                if end > n:
                    raise BadRecord("a command that is cut off")
                self._call(template, records[i:end])
                i = end
            else:
                width = codes.FIELDS.get(code)
                if width is None or i + width > n:
                    raise BadRecord(f"command code {code}, or its fields are missing")
                self._commands[code](*records[i : i + width])
                i += width

    def _control_commands(self) -> dict[int, Callable[..., Any]]:
        """What executes each control command: code → function of the command's fields."""
        commands: dict[int, Callable[..., Any]] = {
            codes.FREE: self._free,
            codes.DEFINE: self._define,
            codes.ALLOCATE: self._allocate,
            codes.WRITE: self._write,
            codes.READ: functools.partial(self._reply, self._read),
            codes.RUN: functools.partial(self._reply, self._run_now),
            codes.WAIT: functools.partial(self._reply, self._wait),
            codes.TRACE: functools.partial(self._reply, self._trace_calls),
            codes.GRAPHS: functools.partial(self._reply, self.graphs.states),
            codes.SCHEMAS: functools.partial(self._reply, differing),
            codes.SEND_STORAGE: functools.partial(self._reply, self._send_storage),
            codes.OPEN_STORAGE: functools.partial(self._reply, self._open_storage),
            codes.JOIN: functools.partial(self._reply, self._exchanges.join),
            codes.ARRIVED: functools.partial(self._reply, self._exchanges.arrived),
            codes.IS_THERE: functools.partial(self._reply, self._exchanges.is_there),
            codes.LINK: functools.partial(self._reply, self._exchanges.link),
            **self._exchanges.commands,
            codes.SEED: functools.partial(self._guarded, self._seed.__name__, self._seed),
            codes.RESET: self._reset,
            **self.graphs.records,
        }
        for code, answer in handles.ANSWERS.items():
            commands[code] = functools.partial(self._reply, answer, self.handles)
        for code, act in handles.ACTS.items():
            commands[code] = functools.partial(self._guarded, act.__name__, act, self.handles)
        return commands

    def _seed(self, seed: Any, index: Any) -> None:
        if not isinstance(seed, int):
            raise BadRecord(f"a seed of {seed!r:.60}")
        for device in self.devices if index == -1 else [self.device(index)]:
            device.generator.manual_seed(seed)

    def _reset(self) -> None:
        """Forget the templates before the previous reset, and every layout and view that was built."""
        self._previous, self._templates = self._templates, {}
        self._geometries.clear()
        for slot in self.storages.values():
            slot.views.clear()

    # -- storages

    def add(self, id: int, slot: Slot) -> None:
        """Enter a new storage. Raises :class:`BadRecord` if there is one of that id."""
        self.refuse_known(id)
        self.storages[id] = slot

    def refuse_known(self, id: Any) -> None:
        """Raise :class:`BadRecord` for what a new storage cannot be numbered."""
        if type(id) is not int or id in self.storages:
            raise BadRecord(f"a new storage numbered {id!r:.60}")

    def add_all(self, ids: Sequence[int], slots: Sequence[Slot]) -> None:
        """Enter new storages, all of them or none. Raises :class:`BadRecord`."""
        added: list[int] = []
        try:
            for id, slot in zip(ids, slots):
                self.add(id, slot)
                added.append(id)
        except BadRecord:
            for id in added:
                del self.storages[id]
            raise

    def _free(self, id: int) -> None:
        slot = self.storages.pop(id, None)
        if slot is not None:
            slot.copy = None
            if slot.shared is None or self.shared.leave(slot):
                account = self._accounts.get(slot.device)
                if account is not None:
                    account.give(slot.nbytes)
                else:  # another session of the lease, which sees more devices, has sent it
                    slot.device.give_storage(slot.nbytes)
        else:
            self.handles.free(id)

    def _allocate(self, id: int, nbytes: int, index: int) -> None:
        device = self.device(index)
        if not isinstance(nbytes, int) or nbytes < 0:
            raise BadRecord(f"an allocation of {nbytes!r} bytes")
        self.refuse_known(id)

        def allocate() -> Slot:
            device.take(rounded(nbytes))
            blank = functools.partial(torch.empty, nbytes, dtype=torch.uint8, device=device.torch_device)
            try:
                try:
                    memory = blank()
                except torch.OutOfMemoryError as e:
                    memory = device.call_again(e, blank)
                return Slot(memory, device, nbytes)
            except BaseException:
                device.give(rounded(nbytes))
                raise

        slot = self._guarded("empty", allocate)
        self.add(id, slot if isinstance(slot, Slot) else Slot(None, device, 0, slot))

    def target(self, id: int, wire: Any) -> torch.Tensor:
        """The tensor that a host-to-device copy fills.

        Raises :class:`Poisoned`, :class:`BeyondStorage` and :class:`BadRecord`.
        """
        geom = self.geometry(wire)
        slot = self.slot(id)
        within(slot, geom)
        copy = slot.copy  # once, for a move that fails forgets it meanwhile
        if copy is not None:
            copy.valid = False
        return slot.view(geom)

    def note_writes(self, ids: Iterable[int]) -> None:
        """Storages are written to, so that copies of their memory are out of date."""
        for id in ids:
            copy = self.storages[id].copy
            if copy is not None:
                copy.valid = False

    def upload(
        self,
        id: int,
        wire: Any,
        length: int,
        receive: Callable[[memoryview], None],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """Execute an UPLOAD frame of ``length`` bytes; ``receive`` fills a buffer with the next of them.

        ``finish``: as in :meth:`run`.
        """
        if self._residence is None:
            self._upload(id, wire, length, receive)
            finish()
            return
        gate = self._residence.gate
        gate.enter(None, self._is_due)
        try:
            self._upload(id, wire, length, receive)
            finish()
        finally:
            gate.leave()

    def _upload(self, id: int, wire: Any, length: int, receive: Callable[[memoryview], None]) -> None:
        geom = self.geometry(wire)
        if length != numel(geom) * geom[3].itemsize:
            raise BadRecord("a copy whose size is not its tensor's")
        try:
            target = self.target(id, wire)
        except (Poisoned, BeyondStorage) as e:
            receive(host_bytes(torch.empty(length, dtype=torch.uint8)))
            self.complain_of_target(e)
            return
        try:
            self.slot(id).device.upload(target, receive)
        except OSError:
            raise  # the connection has broken
        except Exception as e:
            self.complain(report_of("aten::copy_", e, self.number), e)

    def _write(self, id: int, wire: Any, content: Any) -> None:
        if not isinstance(content, bytes):
            raise BadRecord("elements that are no bytes")
        geom = self.geometry(wire)
        if len(content) != numel(geom) * geom[3].itemsize:
            raise BadRecord("a copy whose size is not its tensor's")
        try:
            target = self.target(id, wire)
        except (Poisoned, BeyondStorage) as e:
            self.complain_of_target(e)
            return
        self._guarded("copy_", self.slot(id).device.copy_from_host, target, memoryview(bytearray(content)))

    def complain_of_target(self, error: Exception) -> None:
        """Report why a copy has no target, unless that was reported before."""
        if isinstance(error, BeyondStorage):
            self.complain(report_of("aten::copy_", error, self.number), error)

    def _read(self, id: int, wire: Any) -> tuple[None, HostCopy | None]:
        geom = self.geometry(wire)
        slot = self.slot(id)
        within(slot, geom)
        copy = slot.device.download(slot.view(geom))
        copy.start()
        self._unfinished.clear()  # it came after everything before
        return None, copy if copy.nbytes else None

    def _send_storage(self, id: int, name: Any) -> tuple[None, None]:
        self.shared.send(self.slot(id), name, self.sender)
        return None, None

    def _open_storage(self, name: Any, id: int) -> tuple[dict[str, int], None]:
        self.refuse_known(id)
        slot = self.shared.open(name)
        self.add(id, slot)
        return {"nbytes": slot.nbytes}, None

    # -- operators

    def _define(self, id: int, definition: Any) -> None:
        if not isinstance(id, int) or id < 0 or id in self._templates:
            raise BadRecord(f"template number {id!r}")
        self._templates[id] = self._template(definition)

    def _template(self, definition: Any) -> Template:
        try:
            template = Template(self, definition)
            template.account = self._accounts[template.device]
            return template
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise BadRecord(f"an invalid definition: {e}") from None

    def _call(self, t: Template, fields: list[Any]) -> None:
        n, m = t.n_tensors, t.n_tensors + t.n_scalars
        device = t.device
        started = time.perf_counter()
        taken = 0
        try:
            storages, tensors = self.storages, []
            for id, geom in zip(fields, t.layouts):
                slot = storages.get(id)
                found = slot.views.get(geom) if slot is not None else None
                tensors.append(self.input(id, geom) if found is None else found)
            if t.writes and self.has_copies:
                self.note_writes([fields[k] for k in t.writes])
            args, kwargs = t.fill(tensors, fields[n:m])
            if t.taken_bytes:
                t.account.take(t.taken_bytes)
                taken = t.taken_bytes
            try:
                got = t.op(*args, **kwargs)
            except torch.OutOfMemoryError as e:
                got = device.call_again(e, t.repeatable, *args, **kwargs)
            if t.new:
                self._keep_results(t, fields[m:], got, tensors)
        except BadRecord:
            t.account.give(taken)
            raise
        except Exception as e:
            t.account.give(taken)
            report = e.report if isinstance(e, Poisoned) else report_call(t, fields, e, self.number)
            for id, geom in zip(fields[m:], t.new):
                self.add(id, Slot(None, self.device(geom[4]), 0, report))
            if not isinstance(e, Poisoned):
                self.complain(report, e)
        finally:
            if self._trace is not None:
                self._wait(-1)
                self._trace.append([t.name, device.spec.index, started, time.perf_counter() - started])
            device.busy_s += time.perf_counter() - started

    def input(self, id: Any, geom: Geometry) -> Any:
        """The tensor of that layout on storage ``id``, or what a forward pass saved there.

        Raises :class:`Poisoned`, :class:`BeyondStorage` and :class:`BadRecord`.
        """
        slot = self.slot(id)
        found = slot.views.get(geom)
        if found is None:
            if slot.saved is not None and geom[3] is OPAQUE:
                return slot.saved
            within(slot, geom)
            found = slot.view(geom)
        return found

    def _keep_results(self, t: Template, ids: list[Any], got: Any, inputs: list[torch.Tensor]) -> None:
        if type(t.results) is tuple:
            self.add(ids[0], self._as_predicted(t, t.results, t.new_bytes[0], got, inputs))
            return
        self.add_all(
            ids,
            [
                self._as_predicted(t, geom, nbytes, value, inputs)
                for nbytes, (geom, value) in zip(t.new_bytes, pair(t.results, got))
            ],
        )

    def _as_predicted(self, t: Template, geom: Geometry, nbytes: int, value: Any, inputs: list[Any]) -> Slot:
        """A result as it was predicted: the client addresses its memory by the predicted layout."""
        size, stride, _, dtype, index = geom
        device = self.numbered[index]
        if value is None or value.shape != size or value.dtype != dtype:
            # Often nothing reads such a result. If something does, it must get an error, not wrong elements.
            given = "missing" if value is None else f"{tuple(value.shape)} {value.dtype}"
            message = f"the result is {given}, but {size} {dtype} was predicted; please report this"
            poison = {"operator": t.name, "type": "RuntimeError", "message": message}
            return Slot(None, device, nbytes, poison)
        if type(value) is Saved:
            return Slot(None, device, nbytes, saved=value)
        is_own = value.stride() == stride and not value.storage_offset()
        if is_own and t.is_complex:
            is_own = not (value.is_conj() or value.is_neg())
        if is_own:
            for x in inputs:
                if type(x) is not Saved and is_alias_of(value, x):
                    is_own = False
                    break
        if not is_own:
            value = torch.empty_strided(size, stride, dtype=dtype, device=value.device).copy_(value)
        slot = Slot(value, device, nbytes)
        slot.views[geom] = value
        return slot

    def _run_now(self, definition: Any, ids: Any, scalars: Any, number: Any) -> tuple[Any, None]:
        """Run an operator whose results the client cannot predict, and describe them:
        None, ["value", scalar], ["same", input], ["view", input, geometry], ["new", id, geometry,
        bytes] or ["list", [descriptions]]."""
        t = self._template(definition)
        if len(ids) != t.n_tensors or len(scalars) != t.n_scalars:
            raise BadRecord("a call with too few or too many inputs")
        if type(number) is not int or number < 0:
            raise BadRecord(f"a call numbered {number!r:.60}")
        tensors = [self.input(id, t.geometries[k]) for k, id in enumerate(ids)]
        self.note_writes([ids[k] for k in t.writes])
        args, kwargs = t.fill(tensors, scalars)
        try:
            got = t.op(*args, **kwargs)
        except torch.OutOfMemoryError as e:
            got = t.device.call_again(e, t.repeatable, *args, **kwargs)
        return {"results": self._describe(got, t, tensors, itertools.count(4096 * number))}, None

    def _describe(self, value: Any, t: Template, inputs: list[torch.Tensor], numbers: Iterator[int]) -> Any:
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            return ["list", [self._describe(v, t, inputs, numbers) for v in value]]
        if isinstance(value, Saved):
            raise BadRecord(f"{t.name}, whose results are to be predicted")
        if not isinstance(value, torch.Tensor):
            return ["value", value]
        index = self.number[t.device]
        for k, x in enumerate(inputs):
            if value is x:
                return ["same", k]
            if value.untyped_storage()._cdata == x.untyped_storage()._cdata and value.numel():
                return ["view", k, _wire(value, index)]
        value = value.resolve_conj().resolve_neg()
        if value.storage_offset() or value.untyped_storage().nbytes() > value.numel() * value.itemsize:
            value = value.clone(memory_format=torch.contiguous_format)
        nbytes = value.untyped_storage().nbytes()
        id = -next(numbers)
        self.refuse_known(id)
        t.device.take(rounded(nbytes))
        self.add(id, Slot(value, t.device, nbytes))
        return ["new", id, _wire(value, index), nbytes]

    def _trace_calls(self, on: Any) -> tuple[dict[str, Any], None]:
        """Answer TRACE. A call then waits until the GPU is done, so that its time is the GPU's."""
        calls, self._trace = self._trace or (), deque(maxlen=MAX_TRACED) if on else None
        return {"now": time.perf_counter(), "calls": list(calls)}, None

    def _wait(self, index: int) -> tuple[None, None]:
        for number, d in self.numbered.items():
            if index in (-1, number):
                d.synchronize()
        return None, None

    # -- its state, see lease_state.py

    def templates(self) -> Iterator[tuple[int, bool, Template]]:
        """Each template: its number, whether it is from before the last RESET, and the template."""
        for id, t in self._previous.items():
            yield id, True, t
        for id, t in self._templates.items():
            yield id, False, t

    def define_again(self, templates: Iterable[tuple[int, bool, Any]]) -> None:
        """Define templates as another session had them. Raises BadRecord."""
        for id, previous, definition in templates:
            (self._previous if previous else self._templates)[id] = self._template(definition)

    def traced(self) -> list[list[Any]] | None:
        """The calls since TRACE was switched on: operator, device's number, start, duration; None while it is off."""
        return None if self._trace is None else list(self._trace)

    def trace_again(self, calls: Iterable[list[Any]]) -> None:
        """Go on with TRACE, from these calls."""
        self._trace = deque(calls, maxlen=MAX_TRACED)

    def _submitted(self) -> None:
        for device in self.devices:
            device.submitted(self._began)

    # -- errors

    def complain(self, report: dict[str, Any], error: BaseException) -> None:
        """Send the client the report of an error that it does not wait for."""
        failure = self._failure(report, error)
        self._send_report(report)
        if failure is not None:
            self._on_failure(failure)

    def _failure(self, report: dict[str, Any], error: BaseException) -> DeviceFailure | None:
        """Why a device is lost, if that is the error. Its report then names the calls that were under way."""
        failure = next(filter(None, (d.failure(error) for d in self.devices)), None)
        if failure is not None:
            self._on_failing()
            first = report["message"].splitlines()[0]
            report["message"] = f"the GPU cannot be used any more, because {failure.reason} ({first})"
            report["under_way"] = self._under_way()
        return failure

    def _under_way(self) -> list[dict[str, Any]]:
        """The last calls, newest first: what a device works at when it fails is known no better."""
        calls: deque[dict[str, Any]] = deque(maxlen=_MAX_UNDER_WAY)
        for records in self._unfinished:
            for code, fields in codes.split(records, lambda id: self._known(id).size):
                if code == codes.RUN:
                    calls.append({"operator": str(fields[0]["op"])})
                elif code >= 0:
                    t = self._known(code)
                    new = t.n_tensors + t.n_scalars
                    made = {"made": fields[new]} if t.new else {"changed": fields[: t.n_tensors]}
                    calls.append({"operator": t.name, **made})
        return list(calls)[::-1]

    def _known(self, id: int) -> Template:
        """A template; one that is defined later in the frame that fails now raises KeyError."""
        return self._templates.get(id) or self._previous[id]

    def _reply(self, function: Callable[..., Any], *args: Any) -> None:
        failure = None
        try:
            header, payload = function(*args)
        except BadRecord:
            raise
        except Poisoned as e:
            header, payload = {"failed": e.report}, None
        except Exception as e:
            operator = args[0].get("op") if args and isinstance(args[0], dict) else None
            report = report_of(operator, e, self.number)
            failure = self._failure(report, e)
            header, payload = {"failed": report}, None
        # What follows waits for the network, not for a device.
        self._submitted()
        try:
            self._answer(header, payload)
        except (SessionOver, OSError):
            raise
        except Exception as e:  # the rest of a copy has not arrived, and the session is over
            self.complain(report_of("aten::copy_", e, self.number), e)
            raise SessionOver from None
        if failure is not None:
            self._on_failure(failure)
        self._began = time.perf_counter()

    def _guarded(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """The function's value. If it fails, the report of that, which is also sent to the client."""
        try:
            return function(*args)
        except BadRecord:
            raise
        except Exception as e:
            report = report_of(f"aten::{name}", e, self.number)
            self.complain(report, e)
            return report


def _wire(t: torch.Tensor, index: int) -> list[Any]:
    return [list(t.shape), list(t.stride()), t.storage_offset(), str(t.dtype)[6:], index]
