"""A local Valohai on loopback: config files, API, an object store whose URLs expire, and scripted faults.

Start with `Sandbox` (in this process) or `RemoteSandbox` (a process of its own); say what the data is with `SandboxFile`,
`SandboxInput` and `ramp`; what goes wrong with the functions of `faults`.
"""

from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import ABSENT, InputSpec, SandboxFile, SandboxInput
from valohai_fuse.sandbox.remote import RemoteSandbox
from valohai_fuse.sandbox.valohai import Sandbox

__all__ = ["ABSENT", "InputSpec", "RemoteSandbox", "Sandbox", "SandboxFile", "SandboxInput", "ramp"]
