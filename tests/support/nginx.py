"""A real nginx on loopback as the object store: signed URLs by `secure_link`, refused once they have expired.

It proves renewal against a server that nobody here wrote. Needs the nginx command with ngx_http_secure_link_module, and its
Lua module where a delay is wanted; no privileges, everything lies in one directory that is removed at the end. Usable
without pytest. nginx cannot revoke a URL: to see one expire, mint it for a second or two.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import quote

from valohai_fuse.sandbox import tls as certificates

START_TIMEOUT_S = 10.0
START_ATTEMPTS = 5
MODULES_DIRS = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/etc/nginx/modules")


@dataclass(frozen=True, slots=True)
class NginxRequest:
    """A line of nginx's own record, without the query."""

    method: str
    path: str
    """The object key, decoded."""
    status: int
    sent_bytes: int
    """Of the body."""
    range: str
    authorization: bool
    connection_id: int


class Nginx:
    """Serves the files of `directory` as `/data/<path>`. A context manager; `stop` and `start` keep the port.

    `first_byte_delay_ms` comes before each response and `connect_delay_ms` once more before the first of a connection (by
    Lua's `ngx.sleep`); `rate_bytes_per_s` caps each response.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        first_byte_delay_ms: int = 0,
        connect_delay_ms: int = 0,
        rate_bytes_per_s: int | None = None,
        tls: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        self.port = 0
        self.ca_file: str | None = None
        self._delays_ms = (first_byte_delay_ms, connect_delay_ms)
        self._rate_bytes_per_s = rate_bytes_per_s
        self._tls = tls
        self._clock = clock
        self._secret = secrets.token_hex(16)
        self._root = ""
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing() -> str | None:
        """What this machine lacks to run it at all; None when nothing."""
        if shutil.which("nginx") is None:
            return "the nginx command (apt-get install nginx-light libnginx-mod-http-lua)"
        said = subprocess.run(["nginx", "-V"], capture_output=True, text=True, timeout=20, check=False).stderr
        return None if "http_secure_link_module" in said else "nginx with ngx_http_secure_link_module"

    @staticmethod
    def missing_for_delays() -> str | None:
        """What it lacks for delays; None when nothing."""
        return (
            None if _module("ngx_http_lua_module.so") else "nginx's Lua module (apt-get install libnginx-mod-http-lua)"
        )

    def __enter__(self) -> Self:
        self._root = tempfile.mkdtemp(prefix="valohai-nginx-")
        try:
            if self._tls:
                self.ca_file = certificates.make_authority(self._root)
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts it and returns when it accepts connections. Raises RuntimeError with nginx's own words otherwise."""
        for _ in range(START_ATTEMPTS):
            port = self.port or _free_port()  # another process may take it before nginx does: once more then
            if self._started_on(port):
                self.port = port
                return
            if "Address already in use" not in self._errors():
                break
        raise RuntimeError(f"nginx did not start: {self._errors()}")

    def stop(self) -> None:
        """Down at once: connections are cut and refused."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(START_TIMEOUT_S)

    def close(self) -> None:
        """Stops it and removes its directory; the served one stays."""
        self.stop()
        shutil.rmtree(self._root, ignore_errors=True)

    @property
    def origin(self) -> str:
        """scheme://host:port."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def url_for(self, path: str, lifetime_s: float) -> str:
        """A URL for `<directory>/<path>` that nginx honours until `lifetime_s` from now, in whole seconds. Fits Sandbox."""
        expires_s = int(self._clock() + lifetime_s)
        digest = hashlib.md5(f"{expires_s}/data/{path} {self._secret}".encode()).digest()
        signature = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        return f"{self.origin}/data/{quote(path, safe='/~')}?md5={signature}&expires={expires_s}"

    def requests(self) -> list[NginxRequest]:
        """Every finished request so far, in the order of their ends."""
        with open(os.path.join(self._root, "access.log"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        return [
            NginxRequest(
                method=line["method"],
                path=line["uri"].removeprefix("/data/"),
                status=int(line["status"]),
                sent_bytes=int(line["bytes"]),
                range=line["range"],
                authorization=bool(line["authorization"]),
                connection_id=int(line["connection"]),
            )
            for line in lines
        ]

    def sent_bytes(self) -> int:
        """Body bytes of all finished requests that were not refused."""
        return sum(request.sent_bytes for request in self.requests() if request.status < 300)

    def _started_on(self, port: int) -> bool:
        configuration = os.path.join(self._root, "nginx.conf")
        with open(configuration, "w", encoding="utf-8") as file:
            file.write(self._configuration(port))
        with open(os.path.join(self._root, "error.log"), "wb") as errors:
            self._process = subprocess.Popen(
                ["nginx", "-p", self._root, "-e", "stderr", "-c", configuration], stdout=errors, stderr=errors
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if os.path.exists(
                os.path.join(self._root, "nginx.pid")
            ):  # written once it listens, so the listener is ours
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.01)
                break
        self.stop()
        return False

    def _errors(self) -> str:
        with open(os.path.join(self._root, "error.log"), encoding="utf-8", errors="replace") as file:
            return file.read()[-2000:]

    def _configuration(self, port: int) -> str:
        # As root, workers would become nobody and could not read what the tests wrote for themselves.
        user = "user root;" if os.geteuid() == 0 else ""
        modules = [_module("ndk_http_module.so"), _module("ngx_http_lua_module.so")] if any(self._delays_ms) else []
        loads = "\n".join(f"load_module {path};" for path in modules if path)
        temporary = "\n".join(
            f"{kind}_temp_path {self._root}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        tls = f"ssl_certificate {self._root}/tls/server.pem; ssl_certificate_key {self._root}/tls/server.key;"
        return f"""
{user}
{loads}
daemon off;
master_process on;
worker_processes 1;
pid {self._root}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    {temporary}
    log_format record escape=json '{{"method":"$request_method","uri":"$uri","status":"$status","bytes":"$body_bytes_sent",'
        '"range":"$http_range","authorization":"$http_authorization","connection":"$connection"}}';
    access_log {self._root}/access.log record;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 300s;
    keepalive_requests 1000000;
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{port} {"ssl" if self._tls else ""};
        {tls if self._tls else ""}
        location /data/ {{
            secure_link $arg_md5,$arg_expires;
            secure_link_md5 "$secure_link_expires$uri {self._secret}";
            if ($secure_link = "") {{ return 403 "signature does not match\\n"; }}
            if ($secure_link = "0") {{ return 403 "expired\\n"; }}
            if ($request_method != GET) {{ return 403; }}
            {self._delay_lua()}
            {f"limit_rate {self._rate_bytes_per_s};" if self._rate_bytes_per_s else ""}
            alias "{self.directory}/";
        }}
        location / {{ return 404; }}
    }}
}}
"""

    def _delay_lua(self) -> str:
        each_ms, connect_ms = self._delays_ms
        if not any(self._delays_ms):
            return ""
        first = f'(ngx.var.connection_requests == "1" and {connect_ms} or 0)'
        return f"access_by_lua_block {{ ngx.sleep(({each_ms} + {first}) / 1000) }}"


def _module(name: str) -> str | None:
    paths = (os.path.join(folder, name) for folder in MODULES_DIRS)
    return next((path for path in paths if os.path.exists(path)), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
