"""Frames and commands that no real client sends: a worker refuses them and goes on."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupyter_gpupool.pytorch.protocol import commands
from jupyter_gpupool.pytorch.worker import allowed_operators
from jupyter_gpupool.transport import frames, handshake

from ...conftest import often

NAME = b"0123456789abcdef"

FUZZ = settings(
    max_examples=often(50, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextlib.contextmanager
def connected(spec: object) -> Iterator[socket.socket]:
    sock, _ = handshake.connect(spec, "session", {"torch": torch.__version__, "threads": 1})  # type: ignore[arg-type]
    sock.settimeout(300)
    try:
        yield sock
    finally:
        sock.close()


def still_serves(spec: object) -> None:
    with connected(spec) as sock:
        frames.send(sock, frames.Kind.RECORDS, [commands.WAIT, -1])
        assert frames.receive(sock)[0] is frames.Kind.VALUE


def say(sock: socket.socket, data: bytes) -> None:
    """Send ``data`` and no more, and listen until the worker hangs up, which it may do at any point."""
    sock.settimeout(300)
    with contextlib.suppress(ConnectionError, OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
trees = st.recursive(
    scalars,
    lambda t: st.lists(t, max_size=5) | st.dictionaries(st.text(max_size=6), t, max_size=4),
    max_leaves=12,
)
geometries = st.tuples(
    st.lists(st.integers(-2, 2**33), max_size=3),
    st.lists(st.integers(-2, 2**33), max_size=3),
    st.integers(-1, 2**33),
    st.sampled_from(["float32", "uint8", "load", "nonsense", ""]),
    st.integers(-1, 3),
).map(list)
definitions = st.fixed_dictionaries(
    {
        "op": st.sampled_from(
            ["aten::add.Tensor", "aten::from_file.default", "aten::empty.memory_format", "os::system", ""]
        ),
        "args": st.lists(
            st.tuples(st.sampled_from("tscldDLmzg?"), trees, geometries).map(list) | trees, max_size=3
        ),
        "kwargs": st.dictionaries(st.text(max_size=5), trees, max_size=2),
        "tensors": st.integers(-1, 3),
        "scalars": st.integers(-1, 3),
        "results": st.none() | geometries,
    }
)
references = st.tuples(st.sampled_from("nlfdDLmz?"), trees | st.integers(-1, 4)).map(list)
graphs = st.fixed_dictionaries(
    {
        "inputs": st.lists(geometries, max_size=2),
        "held": st.integers(-1, 3),
        "steps": st.lists(
            st.tuples(
                st.tuples(
                    st.sampled_from(["aten::add.Tensor", "aten::from_file.default", "", "os::system"]),
                    st.lists(references | trees, max_size=3),
                    st.dictionaries(st.text(max_size=5), references | trees, max_size=1),
                ).map(list),
                st.none() | st.tuples(st.just("r"), st.integers(-1, 4), geometries).map(list) | trees,
            ).map(list),
            max_size=3,
        ),
        "returned": st.lists(
            st.tuples(st.integers(-1, 4), geometries, st.integers(-1, 2**40)).map(list), max_size=2
        ),
        "inductor": st.none() | st.booleans(),
        "record": st.none() | st.booleans(),
    }
)
anything = trees | geometries | definitions | graphs | st.integers(1, 3)
hostile_records = st.lists(
    st.tuples(st.sampled_from([*commands.FIELDS, 0, 1, -99]), st.lists(anything, max_size=4)).map(
        lambda t: [t[0], *t[1]]
    ),
    max_size=4,
).map(lambda rs: [x for r in rs for x in r])


@pytest.mark.soak
@FUZZ
@given(st.binary(max_size=200))
def test_noise_before_the_handshake(worker: object, noise: bytes) -> None:
    with socket.create_connection((worker.spec.host, worker.spec.port)) as sock:  # type: ignore[attr-defined]
        say(sock, noise)


def test_after_all_that_the_worker_serves(worker: object) -> None:
    spec = worker.spec  # type: ignore[attr-defined]
    for prefix in (
        struct.pack("!BIQ", 1, 0xFFFFFFFF, 0),
        struct.pack("!BIQ", 1, 10, 1 << 60) + b"0123456789",
        struct.pack("!BIQ", 4, 2, 0) + b"\x91\x01",
    ):
        with socket.create_connection((spec.host, spec.port)) as sock:
            say(sock, prefix)
    still_serves(spec)


@pytest.mark.soak
@FUZZ
@given(hostile_records)
def test_hostile_records_after_the_handshake(worker: object, batch: list) -> None:
    with connected(worker.spec) as sock:  # type: ignore[attr-defined]
        say(sock, frames.pack(frames.Kind.RECORDS, batch))
    assert worker.alive(), "the worker died"  # type: ignore[attr-defined]


@pytest.mark.soak
@FUZZ
@given(st.sampled_from(list(frames.Kind)), trees, st.binary(max_size=40), st.integers(0, 60))
def test_hostile_frames_after_the_handshake(
    worker: object, kind: frames.Kind, header: object, payload: bytes, claimed: int
) -> None:
    with connected(worker.spec) as sock:  # type: ignore[attr-defined]
        body = msgpack.packb(header)
        say(sock, struct.pack("!BIQ", kind, len(body), claimed) + body + payload)
    assert worker.alive(), "the worker died"  # type: ignore[attr-defined]


class TestWhatTheWorkerRefuses:
    def answer(self, spec: object, batch: list) -> tuple[frames.Kind, object]:
        with connected(spec) as sock:
            frames.send(sock, frames.Kind.RECORDS, batch)
            kind, header, _ = frames.receive(sock)
            return kind, header[1] if kind is frames.Kind.VALUE else header

    @pytest.mark.parametrize(
        ("batch", "reason"),
        [
            ([commands.GET_RNG, 7], "there is no generator 7"),
            ([commands.GET_RNG, [1]], "there is no generator [1]"),
            ([commands.GET_RNG, -9], "device 8 of 2"),
            ([commands.GENERATOR, 0, 0, 1], "a handle numbered 0"),
            ([commands.GENERATOR, 5, 0, "seed"], "a seed of 'seed'"),
            ([commands.SET_RNG, -1, 5], "a random state of 5"),
            ([commands.DONE, 3], "there is no event 3"),
            ([commands.EVENT, -3, 0], "a handle numbered -3"),
            ([commands.ELAPSED, 1, 2], "there is no event 1"),
            ([commands.MEMORY, 2], "device 2 of 2"),
        ],
    )
    def test_handles_that_are_none(self, worker: object, batch: list, reason: str) -> None:
        self.refused(worker, batch, reason)

    @pytest.mark.parametrize(
        "numbers",
        [{}, [], {"GPU-9": 0}, {"GPU-0": -1}, {"GPU-0": "0"}, {"GPU-0": 0, "GPU-1": 0}, {"GPU-0": True}],
    )
    def test_numbers_of_devices_that_are_none(self, worker: object, numbers: object) -> None:
        hello = {"torch": torch.__version__, "threads": 1, "devices": numbers}
        sock, _ = handshake.connect(worker.spec, "session", hello)  # type: ignore[attr-defined]
        with sock:
            sock.settimeout(300)
            kind, header, _ = frames.receive(sock)
            assert kind is frames.Kind.BYE
            assert "numbers devices that the lease does not have" in header["message"]
        still_serves(worker.spec)  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("batch", "reason"),
        [
            ([commands.SEND_STORAGE, 1, b"short"], "a shared storage named b'short'"),
            ([commands.SEND_STORAGE, 1, "x" * 16], "a shared storage named"),
            ([commands.SEND_STORAGE, 1, NAME, commands.SEND_STORAGE, 2, NAME], "a name of another"),
            ([commands.SEND_STORAGE, 1, NAME, commands.OPEN_STORAGE, NAME, 2], "a new storage numbered 2"),
            ([commands.OPEN_STORAGE, NAME, None], "a new storage numbered None"),
        ],
    )
    def test_shared_storages_that_are_none(self, worker: object, batch: list, reason: str) -> None:
        with connected(worker.spec) as sock:  # type: ignore[attr-defined]
            allocations = [commands.ALLOCATE, 1, 16, 0, commands.ALLOCATE, 2, 16, 0]
            frames.send(sock, frames.Kind.RECORDS, allocations + batch)
            while (found := frames.receive(sock))[0] is frames.Kind.VALUE:
                pass
            assert reason in found[1]["message"]
        still_serves(worker.spec)  # type: ignore[attr-defined]

    def refused(self, worker: object, batch: list, reason: str) -> None:
        kind, header = self.answer(worker.spec, batch)  # type: ignore[attr-defined]
        assert kind is frames.Kind.BYE
        assert reason in header["message"]  # type: ignore[index]
        still_serves(worker.spec)  # type: ignore[attr-defined]

    def test_a_huge_allocation(self, worker: object) -> None:
        kind, header = self.answer(worker.spec, [commands.ALLOCATE, 1, 1 << 50, 0])  # type: ignore[attr-defined]
        assert kind is frames.Kind.ERROR
        assert header["type"] == "OutOfMemoryError"  # type: ignore[index]

    def test_reading_beyond_a_storage(self, worker: object) -> None:
        big = [[1024], [1], 0, "float32", 0]
        kind, header = self.answer(worker.spec, [commands.ALLOCATE, 1, 16, 0, commands.READ, 1, big])  # type: ignore[attr-defined]
        assert kind is frames.Kind.VALUE
        assert "needs 4096 bytes, but its storage has 16" in header["failed"]["message"]  # type: ignore[index]

    def test_another_sessions_storage(self, worker: object) -> None:
        with connected(worker.spec) as other:  # type: ignore[attr-defined]
            frames.send(other, frames.Kind.RECORDS, [commands.ALLOCATE, 1, 16, 0, commands.WAIT, -1])
            frames.receive(other)
            with connected(worker.spec) as sock:  # type: ignore[attr-defined]
                frames.send(sock, frames.Kind.RECORDS, [commands.READ, 1, [[1], [1], 0, "uint8", 0]])
                kind, header, length = frames.receive(sock)
        assert kind is frames.Kind.VALUE
        assert not length
        assert "a lease that has ended" in header[1]["failed"]["message"]

    def test_a_file_is_not_opened(self, worker: object, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"x" * 64)
        definition = {
            "op": "aten::from_file.default",
            "args": [str(secret), False, 64],
            "kwargs": {"dtype": ["d", "uint8"]},
            "tensors": 0,
            "scalars": 0,
            "results": None,
        }
        kind, header = self.answer(worker.spec, [commands.RUN, definition, [], [], 1])  # type: ignore[attr-defined]
        assert "aten::from_file.default is refused" in header["failed"]["message"]  # type: ignore[index]
        call = [commands.DEFINE, 0, {**definition, "results": [[64], [1], 0, "uint8", 0]}, 0, 1]
        kind, header = self.answer(worker.spec, call)  # type: ignore[attr-defined]
        assert kind is frames.Kind.ERROR
        assert "is refused" in header["message"]  # type: ignore[index]


@pytest.mark.parametrize(
    "name",
    [
        "aten::from_file.default",
        "aten::from_file.out",
        "aten::set_.source_Storage",
        "aten::record_stream.default",
        # Memory that is accounted for grows by allocation alone.
        "aten::resize_as_.default",
        "aten::_resize_output_.default",
        # Their kernels trust indices that a client could make up.
        "aten::_sparse_coo_tensor_unsafe.default",
        "aten::_sparse_csr_tensor_unsafe.default",
        "aten::_convert_indices_from_csr_to_coo.default",
        "aten::_nested_view_from_buffer.default",
        "aten::to_mkldnn.default",
        "aten::quantize_per_tensor.default",
        # The worker's own state.
        "aten::set_grad_enabled.default",
        "prim::Print.default",
        "profiler::_record_function_enter.default",
        "aten::__class__.__init__",
        "aten::add.__class__",
        "aten::add",
        "os.system",
        "",
        None,
    ],
)
def test_operators_that_are_refused_by_name(name: str | None) -> None:
    with pytest.raises(allowed_operators.OperatorRefused):
        allowed_operators.resolve(name)  # type: ignore[arg-type]


#: Arguments that are text choose a mode. Anything else that takes text wants a look before it is allowed.
MODES = frozenset(
    [
        "UPLO",
        "a",
        "activation",
        "algorithm",
        "api_name",
        "approximate",
        "assert_msg",
        "b",
        "driver",
        "equation",
        "indexing",
        "interpolation",
        "mode",
        "norm",
        "ord",
        "p",
        "pad_mode",
        "padding",
        "padding_side",
        "reduce",
        "rounding_mode",
        "side",
    ]
)
#: Older releases have overloads that name dimensions.
DIMENSIONS = frozenset(
    ["dim", "dim0", "dim1", "dim2", "dims", "end_dim", "names", "order", "out_dim", "outdim", "start_dim"]
)
HARMLESS = (
    "Tensor",
    "int",
    "float",
    "bool",
    "number",
    "Device",
    "Layout",
    "MemoryFormat",
    "ScalarType",
    "Generator",
)


def test_no_allowed_operator_takes_a_file_or_a_storage() -> None:
    """Looks at every operator that this PyTorch has, so that a new one cannot slip in unseen."""
    allowed = 0
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::"):
            continue
        try:
            op = allowed_operators.resolve(name if "." in name else f"{name}.default")
        except allowed_operators.OperatorRefused:
            continue
        allowed += 1
        for argument in op._schema.arguments:
            kind = str(argument.type).replace("Optional[", "").replace("List[", "").rstrip("]")
            assert kind in HARMLESS or (kind == "str" and argument.name in MODES | DIMENSIONS), (
                f"{name}: {argument}"
            )
    assert allowed > 2500


def test_a_graph_of_refused_operators(attached: object) -> None:
    """It is told when it is called; what came before it is still there."""
    from jupyter_gpupool.pytorch.client.dispatch import attachment

    x = torch.ones(2, device="cuda")
    stream = attachment.dispatcher().stream
    geom = x._geometry.wire()
    steps = [[["aten::from_file.default", ["/etc/passwd"], {}], ["r", 1, geom]]]
    definition = {
        **{"inputs": [geom], "held": 1, "steps": steps},
        **{"returned": [[1, geom, 8]], "inductor": None},
    }
    stream.push((commands.DEFINE_GRAPH, 1 << 20, definition))
    with pytest.raises(RuntimeError, match="from_file.* is refused"):
        stream.push((commands.CALL_GRAPH, 1 << 20, [x._storage.id], [1 << 30]))
        stream.wait()
    assert x.tolist() == [1.0, 1.0]
