"""The sandbox as a process of its own: `python -m valohai_fuse.sandbox.serve [--keep]`, spoken to in lines of JSON.

The first line on standard input says what to serve (`{"demo": true}` or `{"inputs": ..., "options": ...}`, see `remote`);
the answer, one line, has the addresses. Each further line `{"do": NAME, ...}` is a command and gets one line in answer,
`{"error": ...}` where it failed. End of input ends the process, unless `--keep`: then it serves until SIGTERM or SIGINT.
Nothing secret goes through argv; the token stands in api.json only. `remote.RemoteSandbox` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from valohai_fuse.sandbox.faults import FAULTS
from valohai_fuse.sandbox.remote import decode_inputs
from valohai_fuse.sandbox.valohai import Sandbox

_SETTINGS = {
    "first_byte_delay_s": "store",
    "connect_delay_s": "store",
    "rate_bytes_per_s": "store",
    "delay_s": "api",
    "url_lifetime_s": "",
}
"""What the command `set` may change, and which part of the sandbox has it."""


def main(argv: list[str]) -> int:
    """Serves until told to end; the exit status."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    spec = json.loads(sys.stdin.readline() or "{}")
    with Sandbox(decode_inputs(spec), **spec.get("options", {})) as sandbox:
        _say(addresses(sandbox))
        for line in sys.stdin:
            try:
                request = json.loads(line)
                answer = COMMANDS[request.pop("do")](sandbox, **request)
                _say({"answer": answer})
            except (ValueError, KeyError, TypeError, OSError) as error:
                _say({"error": f"{type(error).__name__}: {error}"})
        if "--keep" in argv:
            _let_go_of_terminal()
            while True:
                signal.pause()
    return 0


def addresses(sandbox: Sandbox) -> dict[str, Any]:
    """What whoever started the process must know."""
    return {
        "pid": os.getpid(),
        "root": sandbox.root,
        "config_dir": sandbox.config_dir,
        "inputs_dir": sandbox.inputs_dir,
        "store": sandbox.store.origin,
        "api": sandbox.api.origin,
        "ca_file": sandbox.ca_file,
    }


def _statistics(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "store": asdict(sandbox.store.statistics()),
        "api": asdict(sandbox.api.statistics()),
        "renewals": sandbox.api.renewals(),
    }


def _fault(sandbox: Sandbox, *, server: str, fault: str, arguments: Mapping[str, Any], rule: Mapping[str, Any]) -> None:
    script = sandbox.api.faults if server == "api" else sandbox.store.faults
    script.add(FAULTS[fault](**arguments), **rule)


def _clear_faults(sandbox: Sandbox) -> None:
    sandbox.api.faults.clear()
    sandbox.store.faults.clear()


def _set(sandbox: Sandbox, *, name: str, value: float | None) -> None:
    part = _SETTINGS[name]
    setattr(getattr(sandbox, part) if part else sandbox, name, value)


COMMANDS: dict[str, Callable[..., Any]] = {
    "statistics": _statistics,
    "requests": lambda sandbox: [asdict(exchange) for exchange in sandbox.requests],
    "forget_requests": Sandbox.forget_requests,
    "expire_urls": Sandbox.expire_urls,
    "advance": lambda sandbox, seconds: sandbox.clock.advance(seconds),
    "mint": Sandbox.mint,
    "write_config": Sandbox.write_config,
    "stop_store": Sandbox.stop_store,
    "start_store": Sandbox.start_store,
    "stop_api": Sandbox.stop_api,
    "start_api": Sandbox.start_api,
    "fault": _fault,
    "clear_faults": _clear_faults,
    "set": _set,
}


def _say(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _let_go_of_terminal() -> None:
    """Whoever waits for the end of a pipe that the command wrote to must not wait for us."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _end(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(0)  # unwinds through the context manager, which takes everything down


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
