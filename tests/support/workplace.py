"""What a worker has around its sessions, in this process: slices, and what sessions share."""

from __future__ import annotations

import io
from typing import Any

import msgpack
import torch

from jupyter_gpupool.pytorch.worker.devices import create_devices
from jupyter_gpupool.pytorch.worker.executor import WorkerSession
from jupyter_gpupool.pytorch.worker.lease_state import BadState, put, take
from jupyter_gpupool.pytorch.worker.shared_storages import SharedStorages
from jupyter_gpupool.pytorch.worker.state_stream import read_state, write_state
from jupyter_gpupool.pytorch.worker.storages import whole
from jupyter_gpupool.transport.specs import DeviceSpec


class Workplace:
    """Two slices and what sessions share, without a process; ``answers`` has everything that clients were sent."""

    def __init__(self, memory_mib: int = 64) -> None:
        specs = [DeviceSpec(k, f"GPU-{k}", "a GPU (emulated)", memory_mib, 64, True) for k in range(2)]
        self.devices = create_devices(specs)
        self.shared = SharedStorages()
        self.sessions: dict[Any, WorkerSession] = {}
        self.answers: list[Any] = []
        self.residence: Any = None

    def new_session(self, identity: Any, numbered: Any = None) -> WorkerSession:
        def answer(header: Any, copy: Any) -> None:
            self.answers.append((identity, header, None if copy is None else bytes(copy.wait())))

        session = self.sessions[identity] = WorkerSession(
            self.devices, answer, self.answers.append, self.shared, numbered, self.residence
        )
        return session

    def run(self, identity: Any, *command: Any) -> None:
        self.execute(identity, msgpack.packb(list(command)))

    def execute(self, identity: Any, packed: bytes) -> None:
        with torch.inference_mode():
            self.sessions[identity].run(msgpack.unpackb(packed))

    def stream(self) -> bytes:
        state, memories = take(self.devices, list(self.sessions.items()), self.shared)
        out = io.BytesIO()
        write_state(self.devices, state, memories, out.write)
        return out.getvalue()

    def content(self) -> Any:
        """All that a client could learn from now on, except for times."""
        with torch.inference_mode():
            storages = {
                (identity, id): (slot.nbytes, slot.poison)
                if slot.memory() is None
                else (
                    slot.base.dtype,
                    slot.base.stride(),
                    whole(slot.base.untyped_storage()).numpy().tobytes(),
                )
                for identity, session in self.sessions.items()
                for id, slot in session.storages.items()
            }
        return (
            storages,
            [(d.allocated, d.generator.get_state().numpy().tobytes()) for d in self.devices],
            {k: sorted(s.handles.named()[1]) for k, s in self.sessions.items()},
        )


def restore(stream: bytes, there: Workplace) -> None:
    source = io.BytesIO(stream)

    def read_into(view: memoryview) -> None:
        if source.readinto(view) != len(view):
            raise BadState("the stream ends too early")

    description, memories = read_state(there.devices, read_into)
    put(description, memories, there.devices, there.shared, there.new_session)
    assert not source.read(), "it is read to its end"
