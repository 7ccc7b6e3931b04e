"""nginx as the object store, at a chosen distance, and a Valohai that signs for it.

One nginx serves the data directory once per profile, each on a port of its own: `/signed/...` wants an unexpired
`secure_link` signature (ours), `/data/...` the same bytes without one and with a listing (peers that cannot do query
strings), and every input is a public S3 bucket as well (peers that speak S3 only). This kernel has no netem, so distance is a
delay before the first byte of each response: one delay for the request and, on a new connection, one more for TCP and one
more again for TLS, less the time that it has been open. Refusals and listings are as far away as data.

The access log is the meter for requests and bytes; it never holds a query string.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import http.server
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.dataset import DataFile

_SECRET = "bench"
"""Signs for this loopback store only."""
_MODULES = "/usr/lib/nginx/modules"
"""Debian's place; absolute, for nginx looks below its prefix otherwise."""
_URL_LIFETIME_S = 24 * 3600
_QUIET_WITHIN_S = 5.0
_KEYS_PER_PAGE = 1000
"""What S3 gives at the most."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How far away the store is and how it answers."""

    name: str
    delay_ms: int
    rate_mb_s: int = 0
    """Per connection; 0: uncapped."""
    tls: bool = False

    @property
    def text(self) -> str:
        """For the report."""
        parts = [f"{self.delay_ms} ms"]
        if self.rate_mb_s:
            parts.append(f"{self.rate_mb_s} MB/s per connection")
        if self.tls:
            parts.append("TLS")
        return ", ".join(parts)


NEAR = Profile("near", 0)
REGION = Profile("region", 20)
FAR = Profile("far", 100)
CAPPED = Profile("capped", 20, rate_mb_s=80)
TLS = Profile("tls", 20, tls=True)
PROFILES = (NEAR, REGION, FAR, CAPPED, TLS)

_LUA = """
            access_by_lua_block {
                local delay_s = tonumber(ngx.var.delay_s)
                local wait_s = delay_s
                if ngx.var.connection_requests == "1" then
                    local connect_s = delay_s * tonumber(ngx.var.connect_delays)
                    wait_s = wait_s + math.max(0, connect_s - tonumber(ngx.var.connection_time))
                end
                if wait_s > 0 then ngx.sleep(wait_s) end
                local verdict = ngx.var.secure_link
                if ngx.var.signed == "1" and (verdict == nil or verdict == "" or verdict == "0") then
                    return ngx.exit(403)
                end
            }"""


def signature(path: str, expires_at_s: int) -> str:
    """What `secure_link` expects for the URL path `path`: base64url of MD5, without padding."""
    digest = hashlib.md5(f"{expires_at_s}{path} {_SECRET}".encode()).digest()  # noqa: S324 - nginx's format, not our choice
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def configuration(root: Path, data: Path, ports: dict[str, int], control_port: int) -> str:
    """nginx.conf for all profiles; `root` takes its log, its pid and its temporary files."""
    servers = "".join(_server(profile, ports[profile.name], root, data) for profile in PROFILES)
    return f"""
daemon off;
worker_processes 2;
pid {root}/nginx.pid;
error_log {root}/error.log warn;
load_module {_MODULES}/ndk_http_module.so;
load_module {_MODULES}/ngx_http_lua_module.so;
events {{ worker_connections 4096; }}
http {{
    log_format bench '$server_port $connection $connection_requests $status $body_bytes_sent "$http_range" $request_method';
    access_log {root}/access.log bench;
    client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
    default_type application/octet-stream;
    sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 1000000; keepalive_timeout 300s; server_tokens off;
    server {{ listen 127.0.0.1:{control_port}; access_log off; location = /status {{ stub_status; }} }}
{servers}
}}
"""


def _server(profile: Profile, port: int, root: Path, data: Path) -> str:
    listen = f"127.0.0.1:{port}" + (" ssl" if profile.tls else "")
    tls = f"ssl_certificate {root}/ca.pem; ssl_certificate_key {root}/ca.key; ssl_session_cache shared:tls:1m;"
    return f"""
    server {{
        listen {listen} backlog=4096;
        {tls if profile.tls else ""}
        {f"limit_rate {profile.rate_mb_s * 1_000_000};" if profile.rate_mb_s else ""}
        set $delay_s {profile.delay_ms / 1000};
        set $connect_delays {2 if profile.tls else 1};
        location /signed/ {{
            set $signed 1;
            secure_link $arg_md5,$arg_expires;
            secure_link_md5 "$secure_link_expires$uri {_SECRET}";
            alias {data}/;{_LUA}
        }}
        location /data/ {{
            set $signed 0;
            autoindex on;
            alias {data}/;{_LUA}
        }}
        location ~ ^/(?<bucket>[a-z]+)/?$ {{
            set $signed 0;
            root {root}/buckets;
            default_type application/xml;
            try_files /$bucket/$arg_marker.xml =404;{_LUA}
        }}
        location / {{
            set $signed 0;
            root {data};{_LUA}
        }}
    }}
"""


def listing_pages(bucket: str, files: list[DataFile]) -> Iterator[tuple[str, str]]:
    """(marker, document) of each page of ListObjects, the first marker empty; `files` in the order of their names.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjects.html
    """
    marker = ""
    for start in range(0, max(1, len(files)), _KEYS_PER_PAGE):
        page = files[start : start + _KEYS_PER_PAGE]
        more = start + _KEYS_PER_PAGE < len(files)
        contents = "".join(
            f"<Contents><Key>{file.name}</Key><Size>{file.size}</Size><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"{file.size:x}"</ETag><StorageClass>STANDARD</StorageClass></Contents>'
            for file in page
        )
        following = f"<NextMarker>{page[-1].name}</NextMarker>" if more else ""
        document = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix></Prefix><Marker>{marker}</Marker><MaxKeys>{_KEYS_PER_PAGE}</MaxKeys>"
            f"<Delimiter>/</Delimiter><IsTruncated>{str(more).lower()}</IsTruncated>{following}{contents}</ListBucketResult>\n"
        )
        yield marker, document
        marker = page[-1].name if page else ""


class Store:
    """A running nginx and a running API. Use as a context manager; everything is on 127.0.0.1."""

    def __init__(self, root: Path, data: Path, *, nginx: str = "nginx") -> None:
        self.root = root
        self.data = data
        self.log_path = root / "access.log"
        self.ca_path = root / "ca.pem"
        self._nginx = nginx
        free = _free_ports(len(PROFILES) + 1)
        self._control_port = free.pop()
        self._ports = dict(zip((p.name for p in PROFILES), free, strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self._api: _Api | None = None

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self._make_certificate()
        self.log_path.unlink(missing_ok=True)
        conf = self.root / "nginx.conf"
        conf.write_text(configuration(self.root, self.data, self._ports, self._control_port))
        with (self.root / "stderr.log").open("wb") as said:
            command = [self._nginx, "-c", str(conf), "-p", str(self.root)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        self._api = _Api(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._api is not None:
            self._api.close()
            self._api = None
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    @property
    def api_url(self) -> str:
        """Where valohai-fuse and valohai-utils ask for signed URLs."""
        if self._api is None:
            raise RuntimeError("the store is not running")
        return self._api.url

    def plain_url(self, profile: Profile, path: str = "") -> str:
        """The unsigned URL of `path`; a directory lists itself."""
        return f"{self._base(profile)}/data/{path}"

    def bucket_url(self, profile: Profile) -> str:
        """Where S3 clients find every input of `list_bucket` as a public bucket, by path."""
        return self._base(profile)

    def list_bucket(self, name: str, files: Iterable[DataFile]) -> None:
        """From now on `GET /name` answers as S3's ListObjects does, `marker` by `marker`."""
        directory = self.root / "buckets" / name
        directory.mkdir(parents=True, exist_ok=True)
        for marker, page in listing_pages(name, sorted(files, key=lambda file: file.name)):
            (directory / f"{marker}.xml").write_text(page)

    def signed_url(self, profile: Profile, path: str, *, lifetime_s: int = _URL_LIFETIME_S) -> str:
        """A URL that nginx serves until `lifetime_s` from now and refuses with 403 after that."""
        expires_at_s = int(time.time()) + lifetime_s
        signed_path = f"/signed/{path}"
        return f"{self._base(profile)}{signed_path}?md5={signature(signed_path, expires_at_s)}&expires={expires_at_s}"

    def sign_for(self, inputs: dict[str, tuple[DataFile, ...]], profile: Profile) -> None:
        """From now on the API answers for these inputs with URLs of this profile."""
        if self._api is not None:
            self._api.inputs = inputs
            self._api.profile = profile

    def warm(self, files: Iterable[DataFile]) -> None:
        """Brings the files into the page cache, so that what is measured is never this machine's disk."""
        buffer = bytearray(1 << 20)
        for file in files:
            if file.phase is None and file.input_name == "names":
                continue
            fd = os.open(self.data / file.path, os.O_RDONLY)
            try:
                offset = 0
                while got := os.preadv(fd, [buffer], offset):
                    offset += got
            finally:
                os.close(fd)

    def wait_quiet(self) -> bool:
        """Waits until no response is being sent (each is in the log then). False after five seconds of traffic."""
        give_up_at_s = time.monotonic() + _QUIET_WITHIN_S
        while time.monotonic() < give_up_at_s:
            if self._writing() <= 1:  # the one that answers this question
                return True
            time.sleep(0.02)
        return False

    def _writing(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._control_port, timeout=5)
        try:
            connection.request("GET", "/status")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        return int(text.split("Writing:")[1].split()[0])

    def _base(self, profile: Profile) -> str:
        return f"{'https' if profile.tls else 'http'}://127.0.0.1:{self._ports[profile.name]}"

    def _wait_ready(self) -> None:
        for _ in range(250):
            try:
                self._writing()
            except OSError:
                if self._process is None or self._process.poll() is not None:
                    break
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"nginx did not start: {(self.root / 'stderr.log').read_text()[-500:]}")

    def _make_certificate(self) -> None:
        if self.ca_path.exists():
            return
        command = (
            "openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=bench -addext subjectAltName=IP:127.0.0.1"
        )
        files = ["-keyout", str(self.root / "ca.key"), "-out", str(self.ca_path)]
        subprocess.run([*command.split(), *files], check=True, capture_output=True)


class _Api:
    """Answers the POST of api.json for whatever `Store.sign_for` said last."""

    def __init__(self, store: Store) -> None:
        self.inputs: dict[str, tuple[DataFile, ...]] = {}
        self.profile = NEAR
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.dumps(api.answer(store)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
                """Silent: the request line may hold what no log should."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/request-input-data/?execution=bench"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def answer(self, store: Store) -> list[dict[str, object]]:
        """The body of `input_request`'s answer."""
        return [
            {"name": name, "files": [_answer_file(store, self.profile, file) for file in files]}
            for name, files in self.inputs.items()
        ]

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _answer_file(store: Store, profile: Profile, file: DataFile) -> dict[str, object]:
    return {
        "filename": file.name,
        "original_uri": f"datum://{file.path}",
        "url": store.signed_url(profile, file.path),
        "input_id": f"id-{file.input_name}",
        "metadata": {},
        "download_intent": "on-demand",
    }


def write_config(
    directory: Path, store: Store, profile: Profile, inputs: dict[str, tuple[DataFile, ...]], inputs_dir: Path
) -> None:
    """inputs.json and api.json as Valohai writes them, for these inputs of the store."""
    store.sign_for(inputs, profile)
    directory.mkdir(parents=True, exist_ok=True)
    document = {
        name: {
            "input_id": f"id-{name}",
            "files": [
                {
                    "name": file.name,
                    "path": str(inputs_dir / file.path),
                    "size": file.size,
                    "uri": f"datum://{file.path}",
                    "datum_id": file.path.replace("/", "-"),
                    "input_id": f"id-{name}",
                    "storage_uri": store.signed_url(profile, file.path),
                    "download_intent": "on-demand",
                    "metadata": [],
                }
                for file in files
            ],
        }
        for name, files in inputs.items()
    }
    (directory / "inputs.json").write_text(json.dumps(document))
    api = {
        "input_request": {"method": "POST", "url": store.api_url, "headers": {"Authorization": "Execution-Token bench"}}
    }
    (directory / "api.json").write_text(json.dumps(api))


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; all are held until the last is known, so that no two are the same."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
