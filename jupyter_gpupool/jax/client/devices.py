"""The client, its devices and their memories, as XLA asks for them."""

from __future__ import annotations

import ctypes
from typing import Any

from jupyter_gpupool.jax.protocol import commands
from jupyter_gpupool.jax.protocol.status import NOT_FOUND, StatusError
from jupyter_gpupool.transport.specs import AttachSpec

from .layouts import STRUCTURES
from .native import Handle, Native
from .session import SliceSession

#: The kind of memory that every slice has.
KIND = "device"

#: What programs may use: StableHLO of JAX 0.6, which every release that is supported reads and writes.
_STABLEHLO = {"stablehlo_current_version": (1, 9, 0), "stablehlo_minimum_version": (0, 9, 0)}
_INT_LIST = 2


class Texts:
    """Texts for XLA, which stay where they are."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[ctypes.Array[ctypes.c_char], int]] = {}

    def get(self, text: str) -> tuple[int, int]:
        """Return the address and the size of a text."""
        if text not in self._kept:
            encoded = text.encode()
            self._kept[text] = (ctypes.create_string_buffer(encoded), len(encoded))
        buffer, size = self._kept[text]
        return ctypes.addressof(buffer), size


def handles(addresses: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    """Return a list of handles as XLA reads it."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Devices:
    """Answers what XLA asks of the client, of devices and of memories. Device ``k`` is the lease's slice ``k``."""

    def __init__(self, spec: AttachSpec, native: Native, texts: Texts, version: str) -> None:
        self._spec = spec
        self._native = native
        self._texts = texts
        self._version = version
        self.session: SliceSession | None = None
        count = len(spec.devices)
        self.client = native.handle(0)
        self._topology = native.handle(0)
        self.device = [native.handle(0) for _ in range(count)]
        self.memory = [native.handle(0) for _ in range(count)]
        self._description = [native.handle(0) for _ in range(count)]
        for address in self.memory:
            kind = Handle.from_address(address)
            kind.dims, kind.rank = texts.get(KIND)
        #: the number of the device of each of these handles
        self.number: dict[int, int] = {}
        for group in (self.device, self.memory, self._description):
            self.number.update((address, k) for k, address in enumerate(group))
        self._all_devices, self._all_memories = handles(self.device), handles(self.memory)
        self._one_device = [handles([address]) for address in self.device]
        self._one_memory = [handles([address]) for address in self.memory]
        self._all_descriptions = handles(self._description)
        self._attributes = self._named_values()

    def _named_values(self) -> Any:
        values = (STRUCTURES["NamedValue"] * len(_STABLEHLO))()
        self._lists = []
        for value, (name, numbers) in zip(values, _STABLEHLO.items()):
            kept = (ctypes.c_int64 * len(numbers))(*numbers)
            self._lists.append(kept)
            value.struct_size = ctypes.sizeof(value)
            value.name, value.name_size = self._texts.get(name)
            value.type, value.value, value.value_size = _INT_LIST, ctypes.addressof(kept), len(numbers)
        return values

    @property
    def platform(self) -> str:
        """The name by which JAX lowers programs: the CPU computes for emulated GPUs."""
        return "cpu" if all(device.emulated for device in self._spec.devices) else "cuda"

    def index(self, handle: int) -> int:
        """Return the lease's number of a device. Raises StatusError."""
        try:
            return self.number[handle]
        except KeyError:
            raise StatusError(NOT_FOUND, "no device of this lease") from None

    # -- the client

    def plugin_attributes(self, a: Any) -> None:
        """Which programs the worker reads."""
        a.attributes, a.num_attributes = ctypes.addressof(self._attributes), len(self._attributes)

    def platform_name(self, a: Any) -> None:
        """What JAX lowers for."""
        a.name, a.name_size = self._texts.get(self.platform)

    def platform_version(self, a: Any) -> None:
        """The version of this package."""
        a.version, a.version_size = self._texts.get(f"jupyter_gpupool {self._version}")

    def process_index(self, a: Any) -> None:
        """There is one process."""
        a.process_index = 0

    def devices(self, a: Any) -> None:
        """All devices."""
        a.devices, a.num_devices = ctypes.addressof(self._all_devices), len(self._all_devices)

    def memories(self, a: Any) -> None:
        """All memories."""
        a.devices, a.num_devices = ctypes.addressof(self._all_memories), len(self._all_memories)

    def look_up(self, a: Any) -> None:
        """The device with an id."""
        if not 0 <= a.id < len(self.device):
            raise StatusError(NOT_FOUND, f"device {a.id} of {len(self.device)}")
        a.device = self.device[a.id]

    def default_assignment(self, a: Any) -> None:
        """The first devices."""
        count = a.num_replicas * a.num_partitions
        if count > min(a.size, len(self.device)):
            raise StatusError(
                NOT_FOUND, f"a program for {count} devices, and the lease has {len(self.device)}"
            )
        numbers = (ctypes.c_int32 * count).from_address(a.assignment)
        numbers[:] = range(count)

    def topology(self, a: Any) -> None:
        """What stands for the devices where there is no client."""
        a.topology = self._topology

    def topology_devices(self, a: Any) -> None:
        """All descriptions."""
        a.descriptions = ctypes.addressof(self._all_descriptions)
        a.num_descriptions = len(self._all_descriptions)

    def topology_attributes(self, a: Any) -> None:
        """There are none."""
        a.attributes, a.num_attributes = None, 0

    # -- devices

    def description(self, a: Any) -> None:
        """The description of a device."""
        a.description = self._description[self.index(a.device)]

    def description_id(self, a: Any) -> None:
        """The number of a device."""
        a.id = self.index(a.description)

    def description_process(self, a: Any) -> None:
        """There is one process."""
        a.process_index = 0

    def description_attributes(self, a: Any) -> None:
        """There are none."""
        a.num_attributes, a.attributes = 0, None

    def description_kind(self, a: Any) -> None:
        """The GPU's name."""
        a.text, a.size = self._texts.get(self._spec.devices[self.index(a.description)].name)

    def description_text(self, a: Any) -> None:
        """What ``str(device)`` returns."""
        a.text, a.size = self._texts.get(f"CudaDevice(id={self.index(a.description)})")

    def device_attributes(self, a: Any) -> None:
        """There are none."""
        a.attributes, a.num_attributes, a.holder = None, 0, None
        a.deleter = self._native.address("nothing")

    def local_id(self, a: Any) -> None:
        """The number of a device on its host."""
        a.id = self.index(a.device)

    def device_memories(self, a: Any) -> None:
        """The memory of a device."""
        a.memories, a.num_memories = ctypes.addressof(self._one_memory[self.index(a.device)]), 1

    def default_memory(self, a: Any) -> None:
        """The memory of a device."""
        a.memory = self.memory[self.index(a.device)]

    def memory_stats(self, a: Any) -> None:
        """What is in use of a slice, by all frameworks and processes of the lease."""
        number = self.index(a.device)
        ctypes.memset(ctypes.addressof(a) + type(a).bytes_in_use.offset, 0, 208 - type(a).bytes_in_use.offset)
        assert self.session is not None, "devices are asked for after the client was made"
        a.bytes_in_use, a.bytes_limit = self.session.answer(commands.MEMORY, number)
        a.bytes_limit_set = True

    # -- memories

    def memory_id(self, a: Any) -> None:
        """The number of a memory."""
        a.id = self.index(a.memory)

    def memory_kind_id(self, a: Any) -> None:
        """The number of its kind."""
        a.id = 0

    def memory_text(self, a: Any) -> None:
        """What ``str(memory)`` returns."""
        a.text, a.size = self._texts.get(f"memory of slice {self.index(a.memory)}")

    def memory_devices(self, a: Any) -> None:
        """The device of a memory."""
        a.devices, a.num_devices = ctypes.addressof(self._one_device[self.index(a.memory)]), 1

    #: What fills which place of the table, with its structure.
    PLACES = {
        "Plugin_Attributes": (plugin_attributes, "Plugin_Attributes"),
        "Client_PlatformName": (platform_name, "Client_PlatformName"),
        "Client_PlatformVersion": (platform_version, "Client_PlatformVersion"),
        "Client_ProcessIndex": (process_index, "Client_ProcessIndex"),
        "Client_Devices": (devices, "Client_Devices"),
        "Client_AddressableDevices": (devices, "Client_Devices"),
        "Client_AddressableMemories": (memories, "Client_Devices"),
        "Client_LookupDevice": (look_up, "Client_LookupDevice"),
        "Client_LookupAddressableDevice": (look_up, "Client_LookupDevice"),
        "Client_DefaultDeviceAssignment": (default_assignment, "Client_DefaultDeviceAssignment"),
        "Client_TopologyDescription": (topology, "Client_TopologyDescription"),
        "TopologyDescription_PlatformName": (platform_name, "Client_PlatformName"),
        "TopologyDescription_PlatformVersion": (platform_version, "Client_PlatformVersion"),
        "TopologyDescription_GetDeviceDescriptions": (
            topology_devices,
            "TopologyDescription_GetDeviceDescriptions",
        ),
        "TopologyDescription_Attributes": (topology_attributes, "TopologyDescription_Attributes"),
        "DeviceDescription_Id": (description_id, "DeviceDescription_Id"),
        "DeviceDescription_ProcessIndex": (description_process, "DeviceDescription_ProcessIndex"),
        "DeviceDescription_Attributes": (description_attributes, "DeviceDescription_Attributes"),
        "DeviceDescription_Kind": (description_kind, "DeviceDescription_Kind"),
        "DeviceDescription_DebugString": (description_text, "DeviceDescription_Kind"),
        "DeviceDescription_ToString": (description_text, "DeviceDescription_Kind"),
        "Device_GetDescription": (description, "Device_GetDescription"),
        "Device_GetAttributes": (device_attributes, "Device_GetAttributes"),
        "Device_LocalHardwareId": (local_id, "Device_LocalHardwareId"),
        "Device_AddressableMemories": (device_memories, "Device_AddressableMemories"),
        "Device_DefaultMemory": (default_memory, "Device_DefaultMemory"),
        "Device_MemoryStats": (memory_stats, "Device_MemoryStats"),
        "Memory_Id": (memory_id, "Memory_Id"),
        "Memory_Kind_Id": (memory_kind_id, "Memory_Id"),
        "Memory_DebugString": (memory_text, "Memory_Kind"),
        "Memory_ToString": (memory_text, "Memory_Kind"),
        "Memory_AddressableByDevices": (memory_devices, "Memory_AddressableByDevices"),
    }
