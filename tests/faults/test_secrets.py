"""No token, no query of a URL and no password in anything that the programs write or show.

One story with renewals, refusals, failures and odd files is played at DEBUG; then everything that it left is searched: output,
logs, answers of the control socket, attributes, the cache, the runtime and temporary directories, and what /proc tells of
each process. What is searched for is collected from the configuration files and from every URL that was minted meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from support.mounts import MountedSandbox, read_elsewhere, run_cli, wait_until
from support.processes import children
from valohai_fuse.errors import ConfigurationError
from valohai_fuse.mount import table
from valohai_fuse.obs.runtime_dir import RuntimeDir
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import InputSpec, SandboxFile, SandboxInput
from valohai_fuse.sandbox.signing import Form
from valohai_fuse.sandbox.valohai import Sandbox
from valohai_fuse.sources import api_file, manifest_file

SIZE_BYTES = 200_000
PLANTED = {
    "password": "hunter2secret",
    "query": "plantedquerysecret",
    "environment": "plantedenvironmentsecret",
    "location": "plantedlocationsecret",
    "body": "plantedbodysecret",
}
FORMS: tuple[Form, ...] = ("s3-sigv4", "s3-sts", "s3-sigv2", "gcs-v4", "gcs-v2", "azure-sas", "swift")


@pytest.fixture
def sandbox(own_directories: Path) -> Iterator[Sandbox]:
    """An input in each form of signed URL, and one of odd files."""
    inputs: dict[str, InputSpec] = {
        form: SandboxInput(
            [SandboxFile(f"{n}.bin", ramp(SIZE_BYTES), size="null" if n == 1 else "exact") for n in range(4)]
        )
        for form in FORMS
    }
    inputs["stream"] = SandboxInput([SandboxFile("long.bin", ramp(4_000_000))])
    query = f"?X-Amz-Signature={PLANTED['query']}"
    odd = {
        "password.bin": f"http://user:{PLANTED['password']}@127.0.0.1:1/k{query}",
        "file.bin": f"file:///etc/passwd{query}",
        "s3.bin": f"s3://bucket/key{query}",
        "metadata.bin": f"http://169.254.169.254/latest{query}",
        "broken.bin": f"http://h/ x{query}",
    }
    files = [
        SandboxFile(name, ramp(SIZE_BYTES), overrides={"storage_uri": url, "uri": url, "datum_id": None})
        for name, url in odd.items()
    ]
    inputs["odd"] = SandboxInput(files, input_id=None)
    with Sandbox(
        inputs, root=own_directories / "valohai", forms={form: form for form in FORMS}, url_lifetime_s=600
    ) as made:
        yield made


def test_no_secret_leaves_the_programs(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs at DEBUG, status, info, doctor, error messages, attributes, processes, cache and runtime files: none in any."""
    monkeypatch.setenv("VALOHAI_SECRET", PLANTED["environment"])
    minted = _collect_minted(sandbox, monkeypatch)
    seen: dict[str, str] = {}
    root = Path(sandbox.root, "tree")
    options = [
        f"--root={root}",
        "--log-level=DEBUG",
        "--xattrs",
        "--read-timeout=1",
        "--connect-timeout=1",
        "--stall-timeout=1",
    ]
    with MountedSandbox(sandbox, options=options, expected_warnings=["."]) as mounted:
        _play(sandbox, root)
        seen |= _processes(mounted)
        seen |= _said_by_commands(mounted, root)
        seen |= _said_without_a_mount(mounted)
        seen |= _dumped(mounted)
        seen |= _attributes(root)
        seen |= _answers(mounted)
        seen["mountinfo"] = "\n".join(map(str, table.entries()))
        seen |= _files(Path(sandbox.root), besides=[Path(sandbox.config_dir), root])
        seen |= _files(Path(os.environ["TMPDIR"]), besides=[Path(sandbox.root)])
        gone = mounted.cli("unmount", str(root))
        seen["unmount"] = gone.stdout + gone.stderr
        seen |= {f"after: {name}": text for name, text in _files(Path(mounted.runtime_dir), besides=[]).items()}
    sandbox.assert_token_never_leaked()
    assert any("DEBUG" in text for text in seen.values()), "nothing was logged at DEBUG"
    assert sum("worker" in name for name in seen) >= 2, f"no worker was looked at: {sorted(seen)}"
    for program in ("download", "run --fallback"):
        of_workers = [name for name in seen if name.startswith(f"{program}: valohai_fuse.fetch.worker")]
        assert of_workers, f"no worker of {program} was looked at: {sorted(seen)}"
    assert any("memfd:" in text for text in seen.values()), "no descriptors were looked at"
    secrets = {sandbox.token, *PLANTED.values(), *minted}
    assert len(secrets) > 20
    leaks = [f"{name}: {_around(text, secret)}" for name, text in seen.items() for secret in secrets if secret in text]
    assert not leaks, "\n".join(leaks)


def _collect_minted(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every secret value of a query that is in the manifest, and from now on in any answer of the API."""
    secrets: set[str] = set()

    def note(url: str) -> None:
        secrets.update(
            value.rstrip("=")
            for key, value in parse_qsl(urlsplit(url).query)
            if "sig" in key.lower() and len(value) > 20
        )

    for spec in json.loads(Path(sandbox.config_dir, "inputs.json").read_bytes()).values():
        for file in spec["files"]:
            note(file["storage_uri"])
    payload = sandbox.api._payload

    def noted(wanted: tuple[str, ...]) -> list[dict[str, object]]:
        answer = payload(wanted)
        for item in answer:
            for file in item["files"]:
                note(file["url"])
        return answer

    monkeypatch.setattr(sandbox.api, "_payload", noted)
    return secrets


def _play(sandbox: Sandbox, root: Path) -> None:
    """Reads that succeed, renew, are refused and fail, in every way that has words of its own."""

    def read(name: str) -> None:
        with contextlib.suppress(OSError):
            read_elsewhere(root / name)

    secret = PLANTED["location"]
    echo = json.dumps({"detail": f"Execution-Token {sandbox.token} at http://h/x?token={PLANTED['body']}"})
    read("stream/long.bin")
    for form in FORMS:
        read(f"{form}/0.bin")
    sandbox.expire_urls()
    store, api = sandbox.store.faults, sandbox.api.faults
    api.add(faults.status(500, echo, "application/json"))
    for form in FORMS:
        read(f"{form}/1.bin")
    store.add(faults.redirect_to(f"file:///x?sig={secret}"), path="gcs-v4/2.bin", count=None)
    store.add(faults.redirect_to(f"http://u:{secret}@127.0.0.1:1/x?sig={secret}"), path="gcs-v2/2.bin", count=None)
    store.add(faults.redirect_to(f"http://169.254.169.254/?sig={secret}"), path="swift/2.bin", count=None)
    store.add(
        faults.status(500, f"<Code>Oops</Code> http://h/?sig={PLANTED['body']}"), path="azure-sas/2.bin", count=None
    )
    store.add(faults.denied(), path="s3-sigv4/2.bin", count=None)
    store.add(faults.reset_after(1000), path="s3-sts/2.bin", count=3)
    store.add(faults.changed_etag(), path="s3-sigv2/2.bin", covers=SIZE_BYTES - 1)
    for form in FORMS:
        read(f"{form}/2.bin")
    sandbox.expire_urls()
    api.add(faults.redirect_to(f"http://h/?token={secret}"))
    api.add(faults.status(200, f"<html>{PLANTED['body']}", "text/html"))
    api.add(faults.status(401, echo, "application/json"), count=None)
    for form in FORMS[:3]:
        read(f"{form}/3.bin")
    for name in ("password", "file", "s3", "metadata", "broken"):
        read(f"odd/{name}.bin")


def _said_by_commands(mounted: MountedSandbox, root: Path) -> dict[str, str]:
    """What people ask for while it is mounted."""
    asked = {
        "status": ["status"],
        "status --json": ["status", "--json"],
        "info": ["info", str(root), *(str(path) for path in sorted(root.glob("*/*.bin")))],
        "info --json": ["info", "--json", *(str(path) for path in sorted(root.glob("*/*.bin")))],
        "info of nothing": ["info", str(root / "no?sig=such")],
        "doctor": ["doctor"],
        "mount again": ["mount", f"--root={root}"],
        "mount of nothing": ["mount", "no-such-input"],
        "prefetch": ["prefetch", "--json", str(root / "gcs-v4"), str(root / "odd")],
        "cache info": ["cache", "info"],
        "cache info --json": ["cache", "info", "--json"],
        "cache verify": ["cache", "verify"],
        "cache export": ["cache", "export", "--to", f"{root}-exported"],
        "cache prune": ["cache", "prune", "--to=1M", "--json"],
        "run": ["run", "--root", f"{root}-run", "--log-level=DEBUG", "--", "wc", f"{root}-run/s3-sigv4/0.bin"],
    }
    outcomes = {name: mounted.cli(*arguments) for name, arguments in asked.items()}
    return {name: outcome.stdout + outcome.stderr for name, outcome in outcomes.items() if name != "run"} | {
        "run": outcomes["run"].stderr
    }


def _said_without_a_mount(mounted: MountedSandbox) -> dict[str, str]:
    """What `download` and `run --fallback download` say and show while they fetch, from a store that is slow and fails."""
    sandbox = mounted.sandbox
    sandbox.store.faults.clear()
    sandbox.api.faults.clear()
    sandbox.expire_urls()
    sandbox.store.faults.add(faults.status(403, f"<Code>No</Code>?sig={PLANTED['body']}"), path="s3-sigv2/3.bin")
    python = [sys.executable, "-m", "valohai_fuse"]
    places = [*mounted.places[:3], f"--cache-dir={sandbox.root}/cache-2", f"--runtime-dir={sandbox.root}/run-2"]
    more = ["--log-level=DEBUG"]
    fallback = [
        *["setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin", "--"],
        *python,
        "run",
        *places,
        *more,
    ]
    commands = {
        "download": [*python, "download", *places, *more, "--to", f"{sandbox.root}/copies", "s3-sigv2", "odd"],
        "run --fallback": [*fallback, "--fallback=download", f"--root={sandbox.root}/copies-2", "--", "true"],
    }
    seen: dict[str, str] = {}
    for name, command in commands.items():
        if name == "run --fallback" and os.geteuid() != 0:
            pytest.skip("takes a capability away, which takes root")
        sandbox.store.faults.add(faults.drip(10_000, 0.1), count=None)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            wait_until("it fetches", lambda pid=process.pid: b"fetch.worker" in _commands_below(pid), 20)  # type: ignore[misc]  # a default binds it
            seen |= {f"{name}: {what}": text for what, text in _of_processes(_below(process.pid)).items()}
            sandbox.store.faults.clear()
            out, _ = process.communicate(timeout=60)
        seen[name] = out
    return seen


def _below(top: int) -> set[int]:
    """A process and all that it has started."""
    found = [top]
    for pid in found:
        found += [child for child in children(pid) if child not in found]
    return set(found)


def _commands_below(top: int) -> bytes:
    commands = []
    for pid in _below(top):
        with contextlib.suppress(OSError):
            commands.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return b" ".join(commands)


def _dumped(mounted: MountedSandbox) -> dict[str, str]:
    """What SIGUSR1 writes into the log, in the middle of a read."""
    (daemon,) = (record.pid for record in RuntimeDir(mounted.runtime_dir).records())
    os.kill(daemon, signal.SIGUSR1)
    wait_until("the dump is complete", lambda: "state: {" in mounted.log())
    return {"log with a dump": mounted.log()}


def _attributes(root: Path) -> dict[str, str]:
    seen = {}
    for path in root.rglob("*"):
        for name in os.listxattr(path):
            seen[f"{name} of {path}"] = os.getxattr(path, name).decode("utf-8", "replace")
    assert seen
    return seen


def _processes(mounted: MountedSandbox) -> dict[str, str]:
    """What anybody (cmdline, comm) and their owner (environ) can see of the supervisor, the daemon and the workers."""
    return _of_processes(set().union(*map(_below, mounted.daemon_pids())))


def _of_processes(pids: set[int]) -> dict[str, str]:
    seen = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            kind = command.split(" -m ")[-1].split()[0]
            for file in ("cmdline", "comm", "status", "maps", *(["environ"] if _is_ours(command) else [])):
                seen[f"{kind} {pid} {file}"] = Path(f"/proc/{pid}/{file}").read_text(errors="replace")
            threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
            seen[f"{kind} {pid} threads"] = " ".join(threads)
            seen[f"{kind} {pid} descriptors"] = " ".join(map(_target, Path(f"/proc/{pid}/fd").iterdir()))
    return seen


def _is_ours(command: str) -> bool:
    """Whether we start it with an environment of ours: what a user's own shell has given to a command is the user's."""
    return any(module in command for module in ("valohai_fuse.daemon", "valohai_fuse.supervisor", "fetch.worker"))


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def _answers(mounted: MountedSandbox) -> dict[str, str]:
    """What the control socket says, to good questions and to bad ones."""
    seen = {}
    requests = [
        {"op": "status"},
        {"op": "info", "path": "odd/password.bin"},
        {"op": "info", "path": "x?sig=y"},
        {"op": "prefetch", "id": "x", "paths": ["odd"]},
        {"op": "prefetch_progress", "id": "x"},
        {"op": "prefetch_cancel", "id": "x"},
        {"op": "?"},
    ]
    for path in Path(mounted.runtime_dir).glob("*.sock"):
        for number, request in enumerate(requests):
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(10)
                channel.connect(str(path))
                channel.sendall(json.dumps(request).encode() + b"\n")
                seen[f"answer {number}"] = channel.recv(1 << 20).decode()
    assert seen
    return seen


def _files(top: Path, besides: list[Path]) -> dict[str, str]:
    """Names and contents of everything below `top`."""
    seen = {}
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = [name for name in subdirectories if Path(directory, name) not in besides]
        for name in names:
            path = Path(directory, name)
            if path.is_file():
                seen[f"file {path}"] = f"{path}\n" + path.read_bytes().decode("latin-1")
    return seen


def test_no_message_about_a_file_quotes_a_secret(own_directories: Path) -> None:
    """Configuration files that cannot be used, each with a secret at the place of the error: the message itself is without it,
    before anything is cut from it."""
    secret = f"https://h/x?sig={PLANTED['query']}"
    broken = {
        "inputs.json": [
            f'{{"a": {{"files": [{{"name": 1, "storage_uri": "{secret}"}}]}}}}',
            f'{{"a": {{"files": [{{"name": "x", "storage_uri": "{secret}" }}',
            f'{{"a": {{"files": ["{secret}"]}}}}',
            f'"{secret}"',
        ],
        "inputs.yaml": [
            f"a: '{secret}\nb: 1\n",
            f"a: {{files: [{secret}]}}\n",
            f"a: !!python/{secret} x\n",
            f"a: *{PLANTED['query']}\n",
            f"&{PLANTED['query']} a: &{PLANTED['query']} b\n",
            f"%YAML {secret}\n---\n",
        ],
        "api.json": [
            f'{{"input_request": {{"url": "{secret} x", "headers": {{}}}}}}',
            f'{{"input_request": {{"url": "http://h", "headers": {{"Authorization": "{PLANTED["query"]}\\n"}}}}}}',
            f'{{"input_request": "{secret}"}}',
            f'{{"input_request": {secret}',
        ],
    }
    for name, contents in broken.items():
        for number, content in enumerate(contents):
            config = own_directories / f"{name}-{number}"
            config.mkdir()
            (config / name).write_text(content)
            with pytest.raises(ConfigurationError) as caught:
                (api_file if name == "api.json" else manifest_file).load(str(config))
            assert PLANTED["query"] not in caught.value.message + str(caught.value.hint) + repr(caught.value.__cause__)
            said = run_cli("doctor", f"--config-dir={config}") if number == 2 else None
            assert said is None or PLANTED["query"] not in said.stdout + said.stderr


def _around(text: str, secret: str) -> str:
    at = text.index(secret)
    return re.sub(r"\s+", " ", text[max(0, at - 60) : at + 40])
