"""The two ends of a compile helper, each where the other one says anything."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

torch = pytest.importorskip("torch", reason="graphs are PyTorch's")

from jupyter_gpupool.pytorch.torch_internals import worker  # noqa: E402
from jupyter_gpupool.pytorch.worker import compile_messages as messages  # noqa: E402
from jupyter_gpupool.pytorch.worker import compile_server, graph_fusion  # noqa: E402
from jupyter_gpupool.pytorch.worker.compile_helper import CompileHelper, NotCompiled  # noqa: E402
from jupyter_gpupool.pytorch.worker.graph_module import module_of  # noqa: E402
from jupyter_gpupool.pytorch.worker.graph_steps import GraphSteps  # noqa: E402

LAYOUT = [[4], [1], 0, "float32", 0]


def definition(operator: str = "aten::add.Tensor", **changes: Any) -> dict[str, Any]:
    """A graph that adds its two inputs, or that writes to the first one."""
    steps = [[[operator, [["n", 0], ["n", 1]], {}], ["r", 2, LAYOUT]]]
    returned = [[2, LAYOUT, 16]]
    return {
        **{"inputs": [LAYOUT, LAYOUT], "held": 2, "steps": steps, "returned": returned, "inductor": True},
        **changes,
    }


def graph(operator: str = "aten::add.Tensor") -> GraphSteps:
    return GraphSteps(compile_server.TargetScope(torch.device("cpu")), definition(operator))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def packed(message: Any) -> bytes:
    body: bytes = msgpack.packb(message)
    return struct.pack("!Q", len(body)) + body


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (packed({"files": {"graph.so": b"x", "../../x.so": b"x"}}), "a file '../../x.so'"),
        (packed({"files": {"graph.so": b"x", "a/b.so": b"x"}}), "a file 'a/b.so'"),
        (packed({"files": {"graph.so": b"x", ".so": b"x"}}), "a file '.so'"),
        (packed({"files": {"graph.so": b"x", "x.py": b"x"}}), "a file 'x.py'"),
        (packed({"files": {"graph.so": 7}}), "a file 'graph.so'"),
        (packed({"files": {"x.so": b"x"}}), "without a compiled graph"),
        (packed({"files": [1]}), "without a compiled graph"),
        (packed({}), "without a compiled graph"),
        (packed({"failed": "no\x1b[31m compiler\n here"}), r"no\[31m compiler here"),
        (packed([1]), "no message"),
        (struct.pack("!Q", 1 << 40), "a message of 1099511627776 bytes"),
        (struct.pack("!Q", 1) + b"\xc1", "no msgpack"),
        (struct.pack("!Q", 9) + b"\x80", "it has ended"),
        (b"", "it has ended"),
        (packed({"files": {"graph.so": b"no shared object"}}), "graph.so"),
    ],
)
def test_a_helper_that_says_anything_is_not_believed(
    answer: bytes, why: str, pair: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pair
    (inside := tmp_path / "own").mkdir()
    helper = CompileHelper(ours, inside / "compiled")
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(NotCompiled, match=why):
        helper.compiled(graph(), contextlib.nullcontext())
    with pytest.raises(NotCompiled):
        helper.compiled(graph(), contextlib.nullcontext())
    assert capfd.readouterr().err.count("one by one") == 1
    assert list(tmp_path.iterdir()) == [inside]


def test_a_helper_is_not_asked_for_what_it_could_not_compile(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair
    with pytest.raises(NotCompiled, match="aten::from_file"):
        CompileHelper(ours, tmp_path).compiled(graph("aten::from_file"), contextlib.nullcontext())
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


@contextlib.contextmanager
def served(theirs: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A helper in a thread, which has no alarm."""
    monkeypatch.setattr(signal, "alarm", lambda s: None)
    thread = threading.Thread(target=compile_server.serve, args=(theirs,))
    thread.start()
    try:
        yield
    finally:
        theirs.shutdown(socket.SHUT_RD)
        thread.join()


QUESTION = {"definition": definition(), "device": "cpu", "threads": 1}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"definition": None}, "an invalid graph"),
        ({"definition": definition(inputs=7)}, "an invalid graph"),
        ({"definition": definition("aten::from_file")}, "from_file"),
        ({"definition": definition("prim::Print")}, "prim::Print"),
        ({"definition": definition(inputs=[[[-1], [1], 0, "float32", 0]])}, "a geometry"),
        ({"definition": definition(inputs=[[[4], [1], 0, "compile", 0]])}, "is no dtype"),
        ({"definition": definition(returned=[[9, LAYOUT, 16]])}, "returns what it does not have"),
    ],
)
def test_a_definition_that_is_none_is_refused_and_the_next_one_is_answered(
    asked: dict[str, Any], why: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    compiled: list[Any] = []
    monkeypatch.setattr(worker.aot_compile, "get", lambda: compiled.append)
    with served(theirs, monkeypatch):
        for _ in range(2):
            messages.send(ours, {**QUESTION, **asked})
            with pytest.raises(messages.BadMessage, match=why):
                messages.products(messages.receive(ours, 1 << 20))
    assert not compiled


@pytest.mark.parametrize("device", [None, "", "mps", "cuda", "cuda:0:1", "cpu:0\n", 7, b"cpu", ["cpu"]])
@pytest.mark.parametrize("threads", [1, 8])
def test_a_device_has_its_form(device: Any, threads: int) -> None:
    assert messages.question({**QUESTION, "threads": threads})[1:] == ("cpu", threads)
    with pytest.raises(messages.BadMessage, match="a device"):
        messages.question({**QUESTION, "device": device, "threads": threads})


@pytest.mark.parametrize("threads", [None, 0, -1, 4097, True, 1.0, "1", [1]])
def test_threads_have_their_form(threads: Any) -> None:
    with pytest.raises(messages.BadMessage, match="threads"):
        messages.question({**QUESTION, "threads": threads})


def test_a_helper_ends_for_who_asks_what_is_no_question(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    with served(theirs, monkeypatch):
        ours.sendall(packed({**QUESTION, "device": "mps"}))
    assert theirs.fileno() != -1


class Compiled:
    """In place of a helper: what it was asked for, and what its code does."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.calls = run, 0

    def compiled(self, graph: GraphSteps, loading: Any) -> Callable[..., Any]:
        def run(tensors: Any) -> Any:
            self.calls += 1
            return self.run(*tensors)

        return run


def fused(graph: GraphSteps, helper: Any, monkeypatch: pytest.MonkeyPatch) -> graph_fusion.FusedGraph:
    monkeypatch.setattr(graph_fusion, "_helper", helper)
    made = graph_fusion.FusedGraph(graph)
    made._compile([])
    assert made.state == "compiled"
    return made


def test_an_input_that_is_written_to_is_not_on_the_memory_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code reads and writes in any order."""
    helper = Compiled(lambda x, y: [x.add_(y)])
    made = fused(graph("aten::add_.Tensor"), helper, monkeypatch)
    x = torch.ones(8)
    assert made.run([x[:4], torch.ones(4)])[0].tolist() == [2.0] * 4 and helper.calls == 1
    assert made.run([x[:4], x[4:]])[0].tolist() == [3.0] * 4 and helper.calls == 1


def test_compiled_code_that_fails_gives_way_to_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tensors: Any) -> Any:
        raise RuntimeError("run_func_ failed")

    helper = Compiled(fail)
    made = fused(graph(), helper, monkeypatch)
    for _ in range(2):
        assert made.run([torch.ones(4), torch.ones(4)])[0].tolist() == [2.0] * 4
    assert helper.calls == 1 and "run_func_ failed" in made.state


def test_a_graph_that_moved_here_is_compiled_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    may_load = threading.Event()

    def compiled(graph: GraphSteps, loading: Any) -> Any:
        may_load.wait()
        return lambda tensors: [torch.full((4,), 7.0)]

    monkeypatch.setattr(graph_fusion, "_helper", SimpleNamespace(compiled=compiled))
    made = graph_fusion.FusedGraph(graph())
    made.resume(0, compiled=True)
    assert made.run([torch.ones(4), torch.ones(4)])[0].tolist() == [2.0] * 4
    assert made.state == "compiling"
    may_load.set()
    for thread in threading.enumerate():
        if thread.name == "inductor":
            thread.join()
    assert made.run([torch.ones(4), torch.ones(4)])[0].tolist() == [7.0] * 4


@pytest.mark.parametrize("text", ['left"; system("x"); "', "left\\", "left\n", "{left}"])
@pytest.mark.parametrize("place", ["in its place", "by its name"])
def test_text_that_could_be_more_than_a_constant_is_not_compiled(text: str, place: str) -> None:
    """Inductor puts it between quotes as it is."""
    args = [["n", 0], ["n", 1], False, False]

    def searching(side: str) -> GraphSteps:
        given = [*args, side] if place == "in its place" else args
        kwargs = {} if place == "in its place" else {"side": side}
        step = [["aten::searchsorted.Tensor", given, kwargs], ["r", 2, [[4], [1], 0, "int64", 0]]]
        scope = compile_server.TargetScope(torch.device("cpu"))
        return GraphSteps(scope, definition(steps=[step], returned=[[2, [[4], [1], 0, "int64", 0], 32]]))

    with pytest.raises(NotImplementedError, match="searchsorted.* has text that is not compiled"):
        module_of(searching(text))
    if place == "by its name":
        module_of(searching("left"))
