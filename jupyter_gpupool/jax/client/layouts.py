"""The structures of the PJRT C API that the plugin reads and fills, as its public header lays them out.

Each line names a structure, its size in bytes, and its fields after ``struct_size`` and ``extension``; what follows
them is not used here. The API only appends: a newer XLA passes longer structures that begin like these.
"""

from __future__ import annotations

import ctypes
from typing import Any

#: The version of the API whose table this is.
MAJOR, MINOR = 0, 112

_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_size_t,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "b": ctypes.c_bool,
}

_STRUCTURES = """
Plugin_Attributes 32: attributes:p num_attributes:n
Client_Create 88: options:p num_options:n kv_get:p kv_get_arg:p kv_put:p kv_put_arg:p client:p kv_try_get:p \
kv_try_get_arg:p
Client_PlatformName 40: client:p name:p name_size:n
Client_ProcessIndex 32: client:p process_index:i
Client_PlatformVersion 40: client:p version:p version_size:n
Client_Devices 40: client:p devices:p num_devices:n
Client_LookupDevice 40: client:p id:i device:p
Client_Compile 56: client:p program:p options:p options_size:n executable:p
Client_DefaultDeviceAssignment 48: client:p num_replicas:i num_partitions:i size:n assignment:p
Client_BufferFromHostBuffer 120: client:p data:p type:i dims:p num_dims:n byte_strides:p num_byte_strides:n \
semantics:i device:p memory:p layout:p done_with_host_buffer:p buffer:p
Program 48: code:p code_size:n format:p format_size:n
DeviceDescription_Id 32: description:p id:i
DeviceDescription_ProcessIndex 32: description:p process_index:i
DeviceDescription_Attributes 40: description:p num_attributes:n attributes:p
DeviceDescription_Kind 40: description:p text:p size:n
Device_GetDescription 32: device:p description:p
Device_IsAddressable 32: device:p is_addressable:b
Device_LocalHardwareId 32: device:p id:i
Device_AddressableMemories 40: device:p memories:p num_memories:n
Device_DefaultMemory 32: device:p memory:p
Device_GetAttributes 56: device:p attributes:p num_attributes:n holder:p deleter:p
Device_MemoryStats 208: device:p bytes_in_use:l peak:l peak_set:b num_allocs:l num_allocs_set:b largest:l \
largest_set:b bytes_limit:l bytes_limit_set:b reserved:l reserved_set:b peak_reserved:l peak_reserved_set:b \
reservable:l reservable_set:b largest_free:l largest_free_set:b pool:l pool_set:b peak_pool:l peak_pool_set:b \
peak_allocated:l peak_allocated_set:b
Memory_Id 32: memory:p id:i
Memory_Kind 40: memory:p text:p size:n
Memory_AddressableByDevices 40: memory:p devices:p num_devices:n
Executable_Text 40: executable:p text:p size:n
Executable_Number 32: executable:p number:n
Executable_OutputMemoryKinds 48: executable:p num_outputs:n kinds:p kind_sizes:p
Executable_OutputElementTypes 40: executable:p types:p num_outputs:n
Executable_OutputDimensions 48: executable:p num_outputs:n dims:p dim_sizes:p
Executable_GetCompiledMemoryStats 144: executable:p generated_code:l argument:l output:l alias:l temp:l \
host_generated_code:l host_argument:l host_output:l host_alias:l host_temp:l peak:l total:l total_allocation:l \
indefinite_allocations:l peak_unpadded_heap:l
Executable_OptimizedProgram 32: executable:p program:p
Executable_GetCostAnalysis 40: executable:p num_properties:n properties:p
LoadedExecutable_GetExecutable 32: loaded:p executable:p
LoadedExecutable_AddressableDevices 40: executable:p devices:p num_devices:n
LoadedExecutable_GetDeviceAssignment 56: executable:p data:p size:n holder:p deleter:p
LoadedExecutable_AddressableDeviceLogicalIds 40: executable:p ids:p num_ids:n
Executable_GetCompileOptions 56: executable:p data:p size:n holder:p deleter:p
LoadedExecutable_Execute 80: executable:p options:p argument_lists:p num_devices:n num_args:n output_lists:p \
device_complete_events:p execute_device:p
ExecuteOptions 144: send_callbacks:p recv_callbacks:p num_send_ops:n num_recv_ops:n launch_id:i non_donatable:p \
num_non_donatable:n context:p call_location:p num_tasks:n task_ids:p incarnation_ids:p multi_slice_config:p \
use_major_to_minor:b hlo_output_callbacks:p num_hlo_output_callbacks:n
Buffer 24: buffer:p
Buffer_ToHostBuffer 56: buffer:p layout:p destination:p size:n event:p
Buffer_ReadyEvent 32: buffer:p event:p
Buffer_Copy 40: buffer:p target:p copy:p
MemoryLayout 80: inner_size:n inner_extension:p minor_to_major:p minor_to_major_size:n tile_dims:p \
tile_dim_sizes:p num_tiles:n type:i
Client_TopologyDescription 32: client:p topology:p
TopologyDescription_GetDeviceDescriptions 40: topology:p descriptions:p num_descriptions:n
TopologyDescription_Attributes 40: topology:p attributes:p num_attributes:n
ExecuteContext_Create 24: context:p
NamedValue 56: name:p name_size:n type:i value:l value_size:n
"""

# The names of the functions, in the order of the table.
_SLOTS = """
Error_Destroy Error_Message Error_GetCode Plugin_Initialize Plugin_Attributes
Event_Destroy Event_IsReady Event_Error Event_Await Event_OnReady
Client_Create Client_Destroy Client_PlatformName Client_ProcessIndex Client_PlatformVersion Client_Devices
Client_AddressableDevices Client_LookupDevice Client_LookupAddressableDevice Client_AddressableMemories
Client_Compile Client_DefaultDeviceAssignment Client_BufferFromHostBuffer
DeviceDescription_Id DeviceDescription_ProcessIndex DeviceDescription_Attributes DeviceDescription_Kind
DeviceDescription_DebugString DeviceDescription_ToString
Device_GetDescription Device_IsAddressable Device_LocalHardwareId Device_AddressableMemories Device_DefaultMemory
Device_MemoryStats Memory_Id Memory_Kind Memory_DebugString Memory_ToString Memory_AddressableByDevices
Executable_Destroy Executable_Name Executable_NumReplicas Executable_NumPartitions Executable_NumOutputs
Executable_SizeOfGeneratedCodeInBytes Executable_GetCostAnalysis Executable_OutputMemoryKinds
Executable_OptimizedProgram Executable_Serialize
LoadedExecutable_Destroy LoadedExecutable_GetExecutable LoadedExecutable_AddressableDevices LoadedExecutable_Delete
LoadedExecutable_IsDeleted LoadedExecutable_Execute Executable_DeserializeAndLoad LoadedExecutable_Fingerprint
Buffer_Destroy Buffer_ElementType Buffer_Dimensions Buffer_UnpaddedDimensions Buffer_DynamicDimensionIndices
Buffer_GetMemoryLayout Buffer_OnDeviceSizeInBytes Buffer_Device Buffer_Memory Buffer_Delete Buffer_IsDeleted
Buffer_CopyToDevice Buffer_ToHostBuffer Buffer_IsOnCpu Buffer_ReadyEvent Buffer_UnsafePointer
Buffer_IncreaseExternalReferenceCount Buffer_DecreaseExternalReferenceCount Buffer_OpaqueDeviceMemoryDataPointer
CopyToDeviceStream_Destroy CopyToDeviceStream_AddChunk CopyToDeviceStream_TotalBytes CopyToDeviceStream_GranuleSize
CopyToDeviceStream_CurrentBytes
TopologyDescription_Create TopologyDescription_Destroy TopologyDescription_PlatformName
TopologyDescription_PlatformVersion TopologyDescription_GetDeviceDescriptions TopologyDescription_Serialize
TopologyDescription_Attributes Compile Executable_OutputElementTypes Executable_OutputDimensions Buffer_CopyToMemory
Client_CreateViewOfDeviceBuffer Executable_Fingerprint Client_TopologyDescription Executable_GetCompiledMemoryStats
Memory_Kind_Id ExecuteContext_Create ExecuteContext_Destroy Buffer_CopyRawToHost
AsyncHostToDeviceTransferManager_Destroy AsyncHostToDeviceTransferManager_TransferData
Client_CreateBuffersForAsyncHostToDevice AsyncHostToDeviceTransferManager_RetrieveBuffer
AsyncHostToDeviceTransferManager_Device AsyncHostToDeviceTransferManager_BufferCount
AsyncHostToDeviceTransferManager_BufferSize AsyncHostToDeviceTransferManager_SetBufferError
AsyncHostToDeviceTransferManager_AddMetadata Client_DmaMap Client_DmaUnmap Client_CreateUninitializedBuffer
Client_UpdateGlobalProcessInfo TopologyDescription_Deserialize Client_CreateAliasBuffer Client_FulfillAliasBuffer
LoadedExecutable_GetDeviceAssignment Client_CreateErrorBuffer AsyncHostToDeviceTransferManager_TransferLiteral
Buffer_CopyRawToHostFuture Device_PoisonExecution Device_CreateAsyncTrackingEvent AsyncTrackingEvent_Destroy
Executable_GetCompileOptions Buffer_DonateWithControlDependency Event_Create Event_Set Device_GetAttributes Client_Load
LoadedExecutable_AddressableDeviceLogicalIds Buffer_Bitcast Error_ForEachPayload TopologyDescription_Fingerprint
Executable_ParameterMemoryKinds Device_ClearMemoryStats
"""
SLOTS = tuple(_SLOTS.split())

_HEAD: list[Any] = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]


class Structure(ctypes.Structure):
    """A structure whose fields are those of its layout: a misspelt one is an error."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        super().__setattr__(name, value)


class Api(ctypes.Structure):
    """The table of functions."""

    _fields_ = [
        *_HEAD,
        ("version_size", ctypes.c_size_t),
        ("version_extension", ctypes.c_void_p),
        ("major", ctypes.c_int32),
        ("minor", ctypes.c_int32),
        ("functions", ctypes.c_void_p * len(SLOTS)),
    ]


def _read(text: str) -> dict[str, type[Structure]]:
    found: dict[str, type[Structure]] = {}
    for line in filter(None, text.splitlines()):
        head, _, fields = line.partition(":")
        name, size = head.split()
        named = [(field.split(":")[0], _TYPES[field.split(":")[1]]) for field in fields.split()]
        structure = type(name, (Structure,), {"_fields_": [*_HEAD, *named]})
        if ctypes.sizeof(structure) != int(size):
            raise ImportError(
                f"PJRT_{name} takes {ctypes.sizeof(structure)} bytes here, and {size} in the header"
            )
        found[name] = structure
    return found


#: The structures by name.
STRUCTURES = _read(_STRUCTURES)
