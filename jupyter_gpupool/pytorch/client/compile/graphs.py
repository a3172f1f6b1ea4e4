"""Calls a graph of operators, as the compiler traced it, by one command.

The graph is walked once on meta tensors for each combination of input layouts and numbers. The result is a
list of steps, which the worker receives once, and a prediction of the results. From then on a call is one
command.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from jupyter_gpupool.pytorch.client.dispatch import attachment, prediction
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.tensor import (
    RemoteTensor,
    Storage,
    TensorLayout,
    geometry,
    make,
    make_view,
)
from jupyter_gpupool.pytorch.protocol.commands import CALL_GRAPH, DEFINE_GRAPH, FREE_GRAPH, GRAPHS
from jupyter_gpupool.pytorch.protocol.sizes import rounded
from jupyter_gpupool.pytorch.torch_internals.client import OpOverload, pytree

#: The most combinations of inputs that a graph keeps; the least recently used is dropped.
MAX_VARIANTS = 32

_numbers = itertools.count()


class NotWhole(Exception):
    """The graph cannot be sent as a whole, so its operators are called one by one."""


def states() -> list[str]:
    """The state of each graph in the workers, see GRAPHS in protocol/commands.py."""
    return [state for stream in attachment.streams() for state in stream.ask((GRAPHS,))]


class Graph:
    """Calls a traced graph, by one command where possible, else operator by operator."""

    def __init__(self, gm: GraphModule, inductor: bool | None, record: bool) -> None:
        self._gm = gm
        #: what the worker is told of it, see DEFINE_GRAPH
        self._wishes = {"inductor": inductor} if record else {"inductor": inductor, "record": False}
        self._variants: OrderedDict[tuple[Any, ...], GraphVariant | None] = OrderedDict()
        self._session: attachment.ClientSession | None = None
        self._renewals = 0

    def __call__(self, *args: Any) -> Any:
        """Call the graph, as the compiler does, and return the list of its results."""
        key = []
        for value in args:
            kind = type(value)
            if kind is RemoteTensor:
                key.append(value._geometry)
            elif kind is int:
                key.append(value)
            elif value is None:
                key.append(None)
            else:
                return self._gm(*args)
        session = attachment.current()
        if session is None:
            return self._gm(*args)
        if session is not self._session or session.renewals != self._renewals:  # not as at the last call
            self._variants.clear()
            self._session, self._renewals = session, session.renewals
        found = tuple(key)
        try:
            concrete = self._variants[found]
            self._variants.move_to_end(found)
        except KeyError:
            concrete = self._make(session, args, found)
        if concrete is None:
            return self._gm(*args)
        return concrete.call(args)

    def _make(
        self, session: attachment.ClientSession, args: tuple[Any, ...], key: tuple[Any, ...]
    ) -> GraphVariant | None:
        concrete: GraphVariant | None
        try:
            concrete = GraphVariant(self._gm, args, session, self._wishes)
        except NotWhole:
            concrete = None
        if len(self._variants) >= MAX_VARIANTS:
            self._variants.popitem(last=False)
        self._variants[key] = concrete
        return concrete


class GraphVariant:
    """A graph for one combination of inputs, defined in the worker."""

    id: int | None = None

    def __init__(
        self,
        gm: GraphModule,
        args: tuple[Any, ...],
        session: attachment.ClientSession,
        wishes: dict[str, bool | None],
    ) -> None:
        walk = _Walk(gm, args, session)
        self._stream = stream = session.dispatcher(walk.index).stream
        self._tensors = walk.positions
        self._new = walk.new
        self._results = walk.results
        self._returned = walk.returned
        self._index = walk.index
        self.peak = walk.peak
        number = next(_numbers)
        stream.push((DEFINE_GRAPH, number, {**walk.wire(), **wishes}))
        self.id = number

    def __del__(self) -> None:
        if self.id is not None:
            self._stream.buffer.extend((FREE_GRAPH, self.id))

    def call(self, args: tuple[Any, ...]) -> list[Any]:
        """Send the call and return the predicted results. Raises torch.OutOfMemoryError."""
        stream = self._stream
        inputs = [args[k] for k in self._tensors]
        stream.memory[self._index].expect(self.peak)
        storages = [stream.new_storage(nbytes, self._index) for nbytes in self._new]
        if storages:
            stream.sites.made(storages[0].id)
        stream.push((CALL_GRAPH, self.id, [t._storage.id for t in inputs], [s.id for s in storages]))
        return [self._returned_as(r, args, storages) for r in self._results]

    def _returned_as(self, result: Any, args: tuple[Any, ...], storages: list[Storage]) -> Any:
        if type(result) is not tuple:
            return result
        which, k, geom = result
        if which == "new":
            return make(storages[k], geom)
        if which == "same":
            return args[k]
        return make_view(args[k], geom)


class _Walk:
    """One pass over the graph: numbers become constants, operators become steps with predicted results."""

    def __init__(self, gm: GraphModule, args: tuple[Any, ...], session: attachment.ClientSession) -> None:
        self._gm = gm
        self._values: dict[Any, Any] = {}
        self._slots: dict[Any, int] = {}
        #: meta storage → number of the storage; those of the inputs come first
        self._storages: dict[int, int] = {}
        self._sizes: list[int] = []
        self._keep: list[torch.Tensor] = []  # so that the address of a storage is not reused
        self.positions = [k for k, a in enumerate(args) if type(a) is RemoteTensor]
        tensors: list[RemoteTensor] = [args[k] for k in self.positions]
        self._inputs = tensors
        if not tensors:
            raise NotWhole("it has no tensors to begin with")
        self.index = tensors[0]._geometry.index
        if any(t._geometry.index != self.index for t in tensors):
            raise NotWhole("its tensors are on several devices")
        self._cuda = any(t._geometry.cuda for t in tensors)
        self._differences = session.dispatcher(self.index).differences
        self._steps: list[list[Any]] = []
        self.new: list[int] = []
        self.results: list[Any] = []
        self.returned: list[list[Any]] = []
        self._run(args)
        self.peak = self._peak()

    def wire(self) -> dict[str, Any]:
        return {
            "inputs": [t._geometry.wire() for t in self._inputs],
            "held": self._held,
            "steps": self._steps,
            "returned": self.returned,
        }

    # -- the pass

    def _run(self, args: tuple[Any, ...]) -> None:
        slots = itertools.count()
        metas: dict[Storage, torch.Tensor] = {}
        waiting = iter(args)
        self._held = 0  # how many storages the inputs are on
        for node in self._gm.graph.nodes:
            if node.op == "placeholder":
                value = next(waiting)
                if type(value) is RemoteTensor:
                    self._slots[node] = next(slots)
                    value = self._input(value, metas)
                    self._held = len(self._sizes)
                self._values[node] = value
            elif node.op == "call_function":
                self._step(node, slots)
            elif node.op == "output":
                self._return(node, args)
            else:
                raise NotWhole(f"{node.op} {node.target}")

    def _input(self, t: RemoteTensor, metas: dict[Storage, torch.Tensor]) -> torch.Tensor:
        """A meta tensor for an input. Meta tensors share storages as their inputs do."""
        geom = t._geometry
        base = metas.get(t._storage)
        if base is None:
            base = metas[t._storage] = torch.empty(t._storage.nbytes, dtype=torch.uint8, device="meta")
            self._keep.append(base)
        value = torch.empty(0, dtype=geom.dtype, device="meta")
        value.set_(base.untyped_storage(), geom.offset, geom.size, geom.stride)
        self._number(value)
        return value

    def _number(self, value: torch.Tensor) -> int:
        storage = value.untyped_storage()
        k = self._storages.get(storage._cdata)
        if k is None:
            k = self._storages[storage._cdata] = len(self._sizes)
            self._sizes.append(storage.nbytes())
            self._keep.append(value)
        return k

    def _step(self, node: Any, slots: Iterator[int]) -> None:
        func: Any = node.target
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        leaves, _ = pytree.tree_flatten((args, kwargs))
        tensors = any(isinstance(v, torch.Tensor) for v in leaves)
        if isinstance(func, OpOverload) and func.namespace == "aten":
            try:
                got = func(*_on_meta(args), **_on_meta(kwargs))
            except Exception as e:
                raise NotWhole(f"{func} cannot be predicted: {e}") from None
        elif tensors or not callable(func):
            if getattr(func, "__name__", "") != "getitem":
                raise NotWhole(f"{func} is not an operator of PyTorch's core")
            got = func(*args, **kwargs)
        else:
            self._values[node] = func(*args, **kwargs)  # arithmetic with sizes
            return
        self._values[node] = got
        if isinstance(got, (int, float, bool)) and not isinstance(got, torch.Tensor):
            return  # a size: a constant from here on
        self._slots[node] = next(slots)
        self._steps.append([self._encode_call(func, node), self._describe(got, node)])

    def _encode_call(self, func: Any, node: Any) -> list[Any]:
        if not isinstance(func, OpOverload):
            return ["", [["n", self._slots[node.args[0]]], node.args[1]], {}]
        name = f"{func._schema.name}.{func._overloadname}"
        args = [self._encode(a, name) for a in node.args]
        kwargs = {k: self._encode(v, name) for k, v in node.kwargs.items()}
        if self._differences is None:
            return [name, args, kwargs]
        try:
            return list(self._differences.translate(func, args, kwargs))
        except prediction.Unsupported as e:
            raise NotWhole(str(e)) from None

    def _encode(self, value: Any, operator: str) -> Any:
        if isinstance(value, Node):
            if value in self._slots:
                return ["n", self._slots[value]]
            value = self._values[value]
        if isinstance(value, (list, tuple)):
            return ["l", [self._encode(v, operator) for v in value]]
        if type(value) is float:
            return ["f", value]
        if isinstance(value, torch.device):
            if device_names.slice_index(value) != self.index:
                raise NotWhole(f"{operator} on {value}")
            return ["D", self.index]
        try:
            return prediction.encode_constant(value)
        except prediction.Unsupported:
            raise NotWhole(f"{operator} takes a {type(value).__name__}") from None

    def _describe(self, got: Any, node: Any) -> Any:
        """The result of a step for the worker: a layout and the number of its storage, or a list of them."""
        if got is None:
            return None
        if isinstance(got, (list, tuple)):
            return ["l", [self._describe(v, node) for v in got]]
        if not isinstance(got, torch.Tensor):
            raise NotWhole(f"{node.target} returns a {type(got).__name__}")
        return ["r", self._number(got), self._geometry(got).wire()]

    def _geometry(self, value: torch.Tensor) -> TensorLayout:
        return geometry(
            value.shape, value.stride(), int(value.storage_offset()), value.dtype, self.index, self._cuda
        )

    # -- the results

    def _return(self, node: Any, args: tuple[Any, ...]) -> None:
        owners: dict[int, int] = {}
        placeholders = self._placeholders()
        for position in self.positions:
            owners.setdefault(self._number(self._values[placeholders[position]]), position)
        new: dict[int, int] = {}
        largest: dict[int, int] = {}
        for out in node.args[0]:
            value = self._values[out] if isinstance(out, Node) else out
            if not isinstance(value, torch.Tensor):
                self.results.append(value)
                continue
            if value.is_conj() or value.is_neg():
                raise NotWhole("it returns a lazy conjugate")
            fake = out.meta.get("val")
            if fake is not None and device_names.slice_index(fake.device) is None:
                raise NotWhole(f"it returns a tensor on {fake.device}")
            number, geom = self._number(value), self._geometry(value)
            if number in owners:
                position = owners[number]
                same = args[position]._geometry is geom
                self.results.append(("same" if same and out.op == "placeholder" else "view", position, geom))
                continue
            if number not in new:
                new[number] = len(self.new)
                self.new.append(self._sizes[number])
                self.returned.append([self._slots[out], geom.wire(), self._sizes[number]])
            elif geom.numel() > largest[number]:  # of several views, the one with the most elements
                self.returned[new[number]][:2] = [self._slots[out], geom.wire()]
            largest[number] = max(geom.numel(), largest.get(number, 0))
            self.results.append(("new", new[number], geom))

    def _peak(self) -> int:
        """The most bytes that the graph has allocated at once while it runs."""
        inputs = {
            self._number(v)
            for v in map(self._values.get, self._placeholders())
            if isinstance(v, torch.Tensor)
        }
        last: dict[int, int] = {}
        first: dict[int, int] = {}
        for moment, node in enumerate(self._gm.graph.nodes):
            for used in (node, *node.all_input_nodes):
                for value in pytree.tree_flatten(self._values.get(used))[0]:
                    if isinstance(value, torch.Tensor):
                        number = self._number(value)
                        first.setdefault(number, moment)
                        last[number] = moment
        changes: dict[int, int] = {}
        for number, moment in first.items():
            if number not in inputs:
                size = rounded(self._sizes[number])
                changes[moment] = changes.get(moment, 0) + size
                changes[last[number] + 1] = changes.get(last[number] + 1, 0) - size
        return max(itertools.accumulate(changes[m] for m in sorted(changes)), default=0)

    def _placeholders(self) -> list[Any]:
        return [n for n in self._gm.graph.nodes if n.op == "placeholder"]


def _on_meta(value: Any) -> Any:
    return pytree.tree_map(lambda v: torch.device("meta") if isinstance(v, torch.device) else v, value)
