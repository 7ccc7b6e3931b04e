"""A whole local Valohai as a context manager: configuration files, API and object store, on loopback, in this process.

Composition only: it makes the parts, writes `config/` and `inputs/` under one directory and takes everything away again at
the end: no thread, socket or file is left. Plain threads, so that pytest, trio programs and the command line can all use
it; nothing here may be called on a trio thread that must not block for long (stopping joins threads).

    with Sandbox(inputs={"data": {"big.bin": ramp(10**9)}}) as sandbox:
        ...  # point VH_CONFIG_DIR and VH_INPUTS_DIR, or the flags, at sandbox.config_dir and sandbox.inputs_dir
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import tempfile
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import yaml

from valohai_fuse.sandbox import tls as certificates
from valohai_fuse.sandbox.api import ValohaiApi
from valohai_fuse.sandbox.clock import SandboxClock
from valohai_fuse.sandbox.content import as_content
from valohai_fuse.sandbox.dataset import Dataset, Entry, InputSpec, Source, expected_bytes, write_content
from valohai_fuse.sandbox.messages import Exchange
from valohai_fuse.sandbox.signing import Form, Signer
from valohai_fuse.sandbox.store import ObjectStore


class Sandbox:
    """A local Valohai with one execution. Starts on entering, or with `start()`; `close()` is the end.

    `url_lifetime_s` (whole seconds, at least 1) holds for all URLs, those of the manifest having been minted
    `manifest_age_s` ago; `forms` gives the form of signature by input, `form` for the others. `url_for(object_key,
    lifetime_s)` replaces the built-in store by another server's URLs. `clock_skew_s`: how far the sandbox's clock is ahead
    of ours. `yaml_too` writes inputs.yaml as well; `json_too=False` leaves inputs.json out. `root` is kept at the end
    when it was given.
    """

    def __init__(
        self,
        inputs: Mapping[str, InputSpec],
        *,
        root: str | os.PathLike[str] | None = None,
        url_lifetime_s: float = 3600,
        manifest_age_s: float = 0,
        form: Form = "s3-sigv4",
        forms: Mapping[str, Form] | None = None,
        url_for: Callable[[str, float], str] | None = None,
        first_byte_delay_s: float = 0.0,
        clock_skew_s: float = 0.0,
        tls: bool = False,
        json_too: bool = True,
        yaml_too: bool = False,
        api_json: bool = True,
    ) -> None:
        self.dataset = Dataset(inputs)
        self.clock = SandboxClock(clock_skew_s)
        self.url_lifetime_s = url_lifetime_s
        self.execution_id = str(uuid.uuid4())
        self.token = f"vhx-sandbox-{uuid.uuid4().hex}"
        self._root_given = None if root is None else os.path.abspath(os.fspath(root))
        self._form: Form = form
        self._forms = dict(forms or {})
        self._url_for = url_for
        self._manifest_age_s = manifest_age_s
        self._first_byte_delay_s = first_byte_delay_s
        self._tls = tls
        self._writes = {"inputs.json": json_too, "inputs.yaml": yaml_too, "api.json": api_json}
        self._signer = Signer(self.clock)
        self._elsewhere: ObjectStore | None = None
        self._hosts: list[ObjectStore] = []
        self._undo = contextlib.ExitStack()
        self.root = ""
        self.ca_file: str | None = None
        """With `tls`: the certificate authority (PEM) that vouches for store and API."""
        self.store: ObjectStore
        self.api: ValohaiApi

    # --- life -----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Servers up, files written. Whatever it raises (OSError, ConfigurationError): nothing is left then."""
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()

    def _start(self, undo: contextlib.ExitStack) -> None:
        self.root = self._root_given or tempfile.mkdtemp(prefix="valohai-sandbox-")
        if self._root_given is None:
            undo.callback(shutil.rmtree, self.root, ignore_errors=True)
        os.makedirs(self.config_dir, exist_ok=True)
        os.makedirs(self.inputs_dir, exist_ok=True)
        if self._tls:
            self.ca_file = certificates.make_authority(self.root)
        own_tls = certificates.server_context(self.root) if self._tls else None
        self.store = self._make_store("store", own_tls)
        undo.callback(self.store.close)
        self.store.first_byte_delay_s = self._first_byte_delay_s
        self.api = ValohaiApi(
            self.dataset,
            lambda: self._batch(0),
            self.clock,
            execution_id=self.execution_id,
            token=self.token,
            revoke=self._signer.revoke_minted,
            tls=own_tls,
        )
        undo.callback(self.api.close)
        self.store.start()
        self.api.start()
        self.write_config()
        self._download_always()

    def _make_store(self, name: str, tls: ssl.SSLContext | None) -> ObjectStore:
        return ObjectStore(
            self.dataset.by_key,
            self._signer,
            self.clock,
            name=name,
            secrets=(self.token,),
            allow_unsigned="plain" in {self._form, *self._forms.values()},
            tls=tls,
        )

    def close(self) -> None:
        """Everything ends; the directory goes unless `root` was given. Does nothing the second time."""
        self._undo.close()
        self._elsewhere = None
        self._hosts.clear()

    # --- places ---------------------------------------------------------------------------------------------------------

    @property
    def config_dir(self) -> str:
        """What VH_CONFIG_DIR or --config-dir must say."""
        return os.path.join(self.root, "config")

    @property
    def inputs_dir(self) -> str:
        """What VH_INPUTS_DIR or --inputs-dir must say. Holds only the `always` files; the mounts make the rest."""
        return os.path.join(self.root, "inputs")

    @property
    def elsewhere(self) -> ObjectStore:
        """Another host with the same objects and signatures, for redirects; started when first asked for."""
        if self._elsewhere is None:
            self._elsewhere = self.another_host(
                "elsewhere", certificates.server_context(self.root) if self._tls else None
            )
        return self._elsewhere

    def another_host(self, name: str, tls: ssl.SSLContext | None = None) -> ObjectStore:
        """One more host with the same objects and signatures, that runs until the end."""
        host = self._make_store(name, tls)
        self._undo.callback(host.close)
        host.start()
        self._hosts.append(host)
        return host

    # --- files ----------------------------------------------------------------------------------------------------------

    def write_config(self) -> None:
        """Writes inputs.json, inputs.yaml and api.json as configured, with newly minted URLs."""
        manifest = self.dataset.manifest(self.inputs_dir, self._batch(self._manifest_age_s))
        if self._writes["inputs.json"]:
            self._write("inputs.json", json.dumps(manifest, ensure_ascii=False))
        if self._writes["inputs.yaml"]:
            self._write("inputs.yaml", yaml.safe_dump(manifest, allow_unicode=True))
        if self._writes["api.json"]:
            self._write("api.json", json.dumps(self.api.configuration(), indent=2))

    def _write(self, name: str, text: str) -> None:
        with open(os.path.join(self.config_dir, name), "w", encoding="utf-8") as file:
            file.write(text)

    def _download_always(self) -> None:
        """Valohai has downloaded these before the command starts."""
        for entry in self.dataset.entries():
            if entry.file.intent == "always":
                write_content(os.path.join(self.inputs_dir, entry.input_name, entry.file.name), entry.content)

    # --- URLs -----------------------------------------------------------------------------------------------------------

    def _batch(self, age_s: float) -> Callable[[Entry], str]:
        outside = self._url_for
        if outside is not None:
            return lambda entry: outside(entry.object_key, self.url_lifetime_s - age_s)
        signs = {
            form: self._signer.batch(form, self.url_lifetime_s, age_s).sign
            for form in {self._form, *self._forms.values()}
        }

        def url_of(entry: Entry) -> str:
            path = self.store.url_path(entry.object_key)
            return f"{self.store.origin}{path}{signs[self._forms.get(entry.input_name, self._form)](path)}"

        return url_of

    def mint(self, input_name: str, name: str) -> str:
        """A fresh URL of a file. Raises KeyError."""
        return self._batch(0)(self.dataset.entry(input_name, name))

    def expire_urls(self) -> None:
        """The store refuses from now on whatever was minted until now, though the URLs say that they live on."""
        self._signer.revoke_minted()

    # --- what goes wrong ------------------------------------------------------------------------------------------------

    def stop_store(self) -> None:
        """The store is down: connections are cut and refused."""
        self.store.stop()

    def start_store(self) -> None:
        """The store is back, on the same port."""
        self.store.start()

    def stop_api(self) -> None:
        """The API is down."""
        self.api.stop()

    def start_api(self) -> None:
        """The API is back, on the same port."""
        self.api.start()

    def recover(self) -> None:
        """Nothing goes wrong any more, and what was never to be answered is cut."""
        self.store.faults.clear()
        self.api.faults.clear()
        self.store.rate_bytes_per_s = None
        self.api.delay_s = 0.0
        for server in (self.store, self.api):
            server.stop()
            server.start()

    def replace_object(self, input_name: str, name: str, content: Source) -> None:
        """The object is overwritten in the store; the manifest still says what it said. Raises KeyError."""
        self.dataset.entry(input_name, name).content = as_content(content)

    # --- what is asserted -----------------------------------------------------------------------------------------------

    def expected_bytes(self, input_name: str, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """What a read of [start, stop) must give. Raises KeyError."""
        return expected_bytes(self.dataset.entry(input_name, name), start, stop)

    @property
    def requests(self) -> list[Exchange]:
        """Every request to any of the servers, in the order of arrival."""
        servers = [self.store, self.api, *self._hosts]
        return sorted((exchange for server in servers for exchange in server.exchanges()), key=lambda e: e.at_s)

    def forget_requests(self) -> None:
        """Assertions count from here."""
        for server in (self.store, self.api, *self._hosts):
            server.forget_exchanges()

    def assert_token_never_leaked(self) -> None:
        """Raises AssertionError if a store ever saw the execution's token or any Authorization header."""
        leaks = [exchange for exchange in self.requests if exchange.carried_secret]
        if leaks:
            raise AssertionError(f"{len(leaks)} requests carried a secret to a store, the first: {leaks[0]!r}")
