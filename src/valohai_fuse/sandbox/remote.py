"""A sandbox in a process of its own, and the words that it is told in.

For measurements, where the servers must not share our GIL, and for `demo --keep`, where they outlive the command. The
process ends with us unless it is detached. One command at a time, from any thread; the protocol is described in `serve`.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from valohai_fuse import settings
from valohai_fuse.sandbox.content import Content, InMemory, OnDisk, Ramp, as_content
from valohai_fuse.sandbox.dataset import ABSENT, Dataset, InputSpec, SandboxFile, SandboxInput, expected_bytes
from valohai_fuse.sandbox.demo_data import demo_inputs

STOP_TIMEOUT_S = 10.0


class RemoteSandbox:
    """Like `Sandbox`, elsewhere. `inputs=None` serves the demo's data; `options` are Sandbox's keyword arguments, those
    that JSON can carry. `keep`: lives on after `detach()`.
    """

    def __init__(self, inputs: Mapping[str, InputSpec] | None = None, *, keep: bool = False, **options: Any) -> None:
        self._inputs = inputs
        self._keep = keep
        self._options = options
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._addresses: dict[str, Any] = {}
        self.dataset = Dataset(demo_inputs() if inputs is None else inputs)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process and returns when it serves. Raises OSError when it did not come up."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "valohai_fuse.sandbox.serve", *(["--keep"] if self._keep else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=settings.child_environment(),
            start_new_session=True,  # the terminal's Ctrl-C is for the command, which then ends us
        )
        spec: dict[str, Any] = {"demo": True} if self._inputs is None else {"inputs": encode_inputs(self._inputs)}
        try:
            self._addresses = self._exchange(spec | {"options": self._options})
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, also one that was to be kept. Does nothing after `detach()`."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _close_pipes(process)

    def detach(self) -> int:
        """Leaves the process (started with `keep`) to itself; its pid. SIGTERM ends it and removes its files."""
        process, self._process = self._process, None
        assert process is not None
        assert self._keep
        _close_pipes(process)
        process.returncode = 0  # ours no longer: without this Popen warns that it still runs
        return process.pid

    def call(self, command: str, **arguments: Any) -> Any:
        """One of `serve.COMMANDS`. Raises OSError when the process is gone, ValueError when it says that it failed."""
        reply = self._exchange({"do": command, **arguments})
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["answer"]

    def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise ConnectionError("the sandbox's process is not ours (any more)")
        with self._lock:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            raise ConnectionError("the sandbox's process has ended; its traceback is on standard error")
        reply: dict[str, Any] = json.loads(line)
        return reply

    # --- the same words as Sandbox ---------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._addresses["pid"])

    @property
    def config_dir(self) -> str:
        """See Sandbox."""
        return str(self._addresses["config_dir"])

    @property
    def inputs_dir(self) -> str:
        """See Sandbox."""
        return str(self._addresses["inputs_dir"])

    @property
    def ca_file(self) -> str | None:
        """See Sandbox."""
        found: str | None = self._addresses["ca_file"]
        return found

    @property
    def addresses(self) -> dict[str, Any]:
        """The line that the process printed: pid, root, directories, origins."""
        return dict(self._addresses)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The exchanges as dicts."""
        found: list[dict[str, Any]] = self.call("requests")
        return found

    def statistics(self) -> dict[str, Any]:
        """`{"store": {...}, "api": {...}, "renewals": n}` with the fields of ServerStatistics."""
        found: dict[str, Any] = self.call("statistics")
        return found

    def forget_requests(self) -> None:
        """See Sandbox."""
        self.call("forget_requests")

    def expire_urls(self) -> None:
        """See Sandbox."""
        self.call("expire_urls")

    def stop_store(self) -> None:
        """See Sandbox."""
        self.call("stop_store")

    def start_store(self) -> None:
        """See Sandbox."""
        self.call("start_store")

    def stop_api(self) -> None:
        """See Sandbox."""
        self.call("stop_api")

    def start_api(self) -> None:
        """See Sandbox."""
        self.call("start_api")

    def mint(self, input_name: str, name: str) -> str:
        """See Sandbox."""
        return str(self.call("mint", input_name=input_name, name=name))

    def fault(self, server: str, fault: str, *, rule: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        """`faults.FAULTS[fault](**arguments)` at "store" or "api"; `rule`: the keywords of FaultScript.add."""
        self.call("fault", server=server, fault=fault, arguments=arguments, rule=rule or {})

    def set(self, name: str, value: float | None) -> None:
        """One of `serve._SETTINGS`, such as first_byte_delay_s."""
        self.call("set", name=name, value=value)

    def expected_bytes(self, input_name: str, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Sandbox; computed here."""
        return expected_bytes(self.dataset.entry(input_name, name), start, stop)


def encode_inputs(inputs: Mapping[str, InputSpec]) -> dict[str, Any]:
    """Inputs as JSON. Raises TypeError for contents that cannot be carried (generated lines)."""
    return {
        name: {"input_id": input_id, "files": [_encode_file(entry.file) for entry in entries]}
        for name, (input_id, entries) in Dataset(inputs).inputs.items()
    }


def decode_inputs(spec: Mapping[str, Any]) -> Mapping[str, InputSpec]:
    """The inverse, over the first line that `serve` is told; also `{"demo": true}`."""
    if spec.get("demo"):
        return demo_inputs()
    return {
        name: SandboxInput([_decode_file(file) for file in said["files"]], said["input_id"])
        for name, said in spec["inputs"].items()
    }


def _encode_file(file: SandboxFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "content": _encode_content(as_content(file.content)),
        "intent": file.intent,
        "metadata": [dict(item) for item in file.metadata],
        "size": file.size,
        "overrides": {key: value for key, value in file.overrides.items() if value is not ABSENT},
        "absent": [key for key, value in file.overrides.items() if value is ABSENT],
    }


def _decode_file(said: dict[str, Any]) -> SandboxFile:
    content = said.pop("content")
    overrides = said.pop("overrides") | dict.fromkeys(said.pop("absent"), ABSENT)
    return SandboxFile(content=_decode_content(content), overrides=overrides, **said)


def _encode_content(content: Content) -> dict[str, Any]:
    match content:
        case InMemory():
            return {"base64": base64.b64encode(content.data).decode()}
        case OnDisk():
            return {"path": os.path.abspath(content.path)}
        case Ramp():
            return {"ramp": content.size, "shift": content.shift}
    raise TypeError(f"a {type(content).__name__} cannot be sent to another process")


def _decode_content(said: Mapping[str, Any]) -> Content:
    if "ramp" in said:
        return Ramp(said["ramp"], said.get("shift", 0))
    return OnDisk(said["path"]) if "path" in said else InMemory(base64.b64decode(said["base64"]))


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
