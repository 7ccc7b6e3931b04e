"""Who may mount and who may read, on machines that lack something: other users, no root, no /dev/fuse, a read-only root.

Machines are made of mount namespaces, so that nothing outside of the test changes. These tests need root.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

import valohai_fuse
from support.mounts import MountedSandbox, MountInputs
from support.processes import record
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile
from valohai_fuse.sandbox.valohai import Sandbox

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="makes mount namespaces and becomes other users"
)

NOBODY = 65534
HEAD = "hello from the store\n"
BECOME = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --"


@pytest.fixture
def shared(own_directories: Path) -> Iterator[Path]:
    """The test's directory, which other users may enter."""
    above = own_directories.parent
    above.chmod(0o711)
    own_directories.chmod(0o755)
    yield own_directories
    above.chmod(0o700)


@pytest.fixture
def sandbox(shared: Path) -> Iterator[Sandbox]:
    """Configuration that everybody may read, in a directory that everybody may write."""
    inputs = {"data": [SandboxFile("a.txt", HEAD.encode()), SandboxFile("d/b.bin", ramp(3_000_000))]}
    with Sandbox(inputs, root=shared / "valohai") as made:
        os.chmod(made.root, 0o777)
        os.chmod(made.inputs_dir, 0o777)
        yield made


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    """A command as another user."""
    return subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, timeout=30, check=False
    )


def elsewhere(script: str, sandbox: Sandbox) -> subprocess.CompletedProcess[str]:
    """A shell script in a mount namespace of its own. `vf VERB ...` is our command with the sandbox's places, `vf_as_nobody`
    the same as another user; $ROOT, $INPUTS and $CACHE are its directories, $OWN a tmpfs that only exists there."""
    places = MountedSandbox(sandbox).places
    prelude = (
        'vf() { verb=$1; shift; "$PYTHON" -m valohai_fuse "$verb" "$@"; }\n'
        f'vf_as_nobody() {{ verb=$1; shift; {BECOME} $OTHERS_PYTHON -m valohai_fuse "$verb" "$@"; }}\n'
        'mkdir -p "$OWN"; mount -t tmpfs -o mode=777 tmpfs "$OWN"\n'
    )
    environment = {
        "PYTHON": sys.executable,
        "OTHERS_PYTHON": python_of_others() if "vf_as_nobody" in script else "",
        "ROOT": sandbox.root,
        "INPUTS": sandbox.inputs_dir,
        "CACHE": f"{sandbox.root}/cache",
        "OWN": f"{sandbox.root}/own",
        "VH_CONFIG_DIR": sandbox.config_dir,
        "VH_INPUTS_DIR": sandbox.inputs_dir,
        "VALOHAI_FUSE_CACHE_DIR": f"{sandbox.root}/cache",
        "VALOHAI_FUSE_RUNTIME_DIR": f"{sandbox.root}/run",
    }
    assert len(places) == 4, "the four places above"
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", prelude + script],
        env=dict(os.environ) | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


ANYONES_FUSE = 'mknod -m 666 "$OWN/fuse" c 10 229; mount --bind "$OWN/fuse" /dev/fuse\n'


def python_of_others() -> str:
    """A Python with our packages that another user can run, as `env` and its arguments: this very one, unless it lies in
    somebody's home; else the system's of the same version. Skips where there is none."""
    path = os.pathsep.join([str(Path(valohai_fuse.__file__).parents[1]), str(Path(pyfuse3.__file__).parents[1])])
    for program in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = ["/usr/bin/env", f"PYTHONPATH={path}", program]
        if as_nobody(*command, "-c", "import valohai_fuse.cli.main, pyfuse3").returncode == 0:
            return " ".join(command)
    pytest.skip(f"another user cannot run {sys.executable}")


# --- other users ------------------------------------------------------------------------------------------------------


def test_other_users_read_what_root_has_mounted(shared: Path, mount_inputs: MountInputs) -> None:
    """As root `--allow-other` is the default: any user reads; owner and group are those of --uid and --gid."""
    mounted = mount_inputs({"data": {"a.txt": HEAD.encode()}}, options=("--uid=1234", "--gid=4321"))
    os.chmod(mounted.sandbox.root, 0o755)
    outcome = as_nobody("cat", str(mounted.path("data", "a.txt")))
    assert (outcome.returncode, outcome.stdout) == (0, HEAD)
    for path in (mounted.path("data"), mounted.path("data", "a.txt")):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (1234, 4321)
        assert not found.st_mode & 0o222


def test_other_users_are_kept_out_without_allow_other(shared: Path, mount_inputs: MountInputs) -> None:
    """With --no-allow-other nobody else gets at a name or a byte, cached or not."""
    mounted = mount_inputs({"data": {"a.txt": HEAD.encode()}}, options=("--no-allow-other",))
    os.chmod(mounted.sandbox.root, 0o755)
    assert mounted.path("data", "a.txt").read_text() == HEAD
    for command in (["cat", str(mounted.path("data", "a.txt"))], ["ls", str(mounted.path("data"))]):
        outcome = as_nobody(*command)
        assert outcome.returncode != 0
        assert outcome.stdout == ""
        assert "Permission denied" in outcome.stderr


def test_what_is_beside_the_mount_is_the_owners_alone(shared: Path, mount_inputs: MountInputs) -> None:
    """Cache and runtime directory 0700, and everything in them for the owner only; nobody else talks to the daemon."""
    mounted = mount_inputs({"data": {"a.bin": ramp(2_000_000)}})
    os.chmod(mounted.sandbox.root, 0o755)
    mounted.path("data", "a.bin").read_bytes()
    for top in (mounted.cache_dir, mounted.runtime_dir):
        assert stat.S_IMODE(os.stat(top).st_mode) == 0o700, top
        inside = [path for path in Path(top).rglob("*") if not path.is_symlink()]
        assert inside
        assert [str(path) for path in inside if path.stat().st_mode & 0o077 and not _is_shut_in(path, Path(top))] == []
    control = str(record(mounted, "data")["control_path"])
    assert stat.S_IMODE(os.stat(control).st_mode) == 0o600
    code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    os.chmod(mounted.runtime_dir, 0o755)  # the socket's own mode is a second lock
    refused = as_nobody("/usr/bin/env", "python3", "-I", "-c", code, control)
    os.chmod(mounted.runtime_dir, 0o700)
    assert refused.returncode != 0
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect(control)


def _is_shut_in(path: Path, top: Path) -> bool:
    """Whether a directory between `top` and `path` keeps others out on its own."""
    return any(not parent.stat().st_mode & 0o077 for parent in path.parents if top in parent.parents)


# --- an ordinary user -------------------------------------------------------------------------------------------------


def test_an_ordinary_user_mounts_through_fusermount3(sandbox: Sandbox) -> None:
    """Without root, fusermount3 mounts: read, kept to oneself, mended after a crash, unmounted; `doctor` says how."""
    done = elsewhere(
        ANYONES_FUSE
        + 'vf_as_nobody doctor; echo "doctor $?"\n'
        + 'vf_as_nobody mount; echo "mount $?"\n'
        + f'{BECOME} cat "$INPUTS/data/a.txt"\n'
        + 'cat "$INPUTS/data/a.txt" || echo "root is kept out"\n'
        + f'{BECOME} stat -c "%u:%g %a" "$INPUTS/data/a.txt" "$ROOT/run" "$CACHE"\n'
        + 'kill -KILL $(sed "s/.*\\"pid\\":\\([0-9]*\\).*/\\1/" "$ROOT"/run/*.json)\n'
        + f'while {BECOME} ls "$INPUTS/data" >/dev/null 2>&1; do :; done\n'
        + 'vf_as_nobody mount; echo "mended $?"\n'
        + f'{BECOME} cmp "$INPUTS/data/d/b.bin" "$INPUTS/data/d/b.bin" && echo same\n'
        + 'vf_as_nobody unmount; echo "unmount $?"\n'
        + 'grep -c "$INPUTS.*fuse.valohai" /proc/self/mountinfo\n',
        sandbox,
    )
    lines = done.stdout.splitlines()
    assert any("mounting is permitted through" in line and "fusermount3" in line for line in lines), done
    assert "doctor 0" in lines, done
    assert "mount 0" in lines, done
    assert HEAD.strip() in lines
    assert "root is kept out" in lines
    assert lines.count(f"{NOBODY}:{NOBODY} 444") == 1
    assert lines.count(f"{NOBODY}:{NOBODY} 700") == 2
    assert lines[-4:] == ["mended 0", "same", "unmount 0", "0"], done


def test_an_ordinary_user_needs_leave_to_let_others_in(sandbox: Sandbox) -> None:
    """`--allow-other` without user_allow_other in /etc/fuse.conf: exit code 4 and the line to add; with it, root may read."""
    done = elsewhere(
        ANYONES_FUSE
        + 'echo "# nothing" > "$OWN/none"; mount --bind "$OWN/none" /etc/fuse.conf\n'
        + 'vf_as_nobody doctor --allow-other >/dev/null; echo "doctor $?"\n'
        + 'vf_as_nobody mount --allow-other; echo "mount $?"\n'
        + 'echo user_allow_other > "$OWN/conf"; mount --bind "$OWN/conf" /etc/fuse.conf\n'
        + 'vf_as_nobody doctor --allow-other >/dev/null; echo "doctor $?"\n'
        + 'vf_as_nobody mount --allow-other; echo "mount $?"\n'
        + 'cat "$INPUTS/data/a.txt"\n'
        + "vf_as_nobody unmount\n",
        sandbox,
    )
    assert done.stdout.splitlines() == ["doctor 4", "mount 4", "doctor 0", "mount 0", HEAD.strip()], done
    assert "error: --allow-other is not permitted" in done.stderr
    assert "hint: add user_allow_other to /etc/fuse.conf" in done.stderr


def test_an_ordinary_user_runs_a_command_beside_what_is_roots(sandbox: Sandbox) -> None:
    """`run` through fusermount3 where root has mounted before: root's runtime directory and cache are refused with what to do, and
    stay shut; with directories of one's own CMD reads, its status is kept, and nothing stays mounted."""
    done = elsewhere(
        ANYONES_FUSE
        + 'vf mount; cat "$INPUTS/data/a.txt"; vf unmount\n'
        + 'vf_as_nobody run -- true; echo "in the runtime directory of root $?"\n'
        + 'vf_as_nobody status --json; echo "status $?"\n'
        + 'vf_as_nobody run --runtime-dir "$OWN/run" -- true; echo "over the cache of root $?"\n'
        + 'vf_as_nobody run --runtime-dir "$OWN/run" --cache-dir "$OWN/cache" -- '
        + 'sh -c \'cat "$INPUTS/data/a.txt"; exit 7\'; echo "run $?"\n'
        + 'grep -c "$INPUTS.*fuse.valohai" /proc/self/mountinfo\n'
        + 'stat -c "%u %a" "$CACHE" "$ROOT/run"\n',
        sandbox,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == HEAD.strip()
    assert "in the runtime directory of root 3" in lines, done
    assert "over the cache of root 3" in lines, done
    assert "run 7" in lines, done
    assert lines.count(HEAD.strip()) == 2, done
    assert lines[-3:] == ["0", "0 700", "0 700"], done
    assert "belongs to somebody else" in done.stderr
    assert "hint: name another with --runtime-dir" in done.stderr
    assert "hint: whoever owns it could change what you read; choose a --cache-dir of your own" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_fusermount3_an_ordinary_user_is_told_what_to_install(sandbox: Sandbox) -> None:
    """Exit code 4 from `mount` and `doctor`, naming what is missing; the same when it is there and not setuid."""
    program = shutil.which("fusermount3")
    assert program is not None
    done = elsewhere(
        ANYONES_FUSE
        + f'cp {program} "$OWN/plain"; chmod 755 "$OWN/plain"; mount --bind "$OWN/plain" {program}\n'
        + 'vf_as_nobody mount; echo "mount $?"\n'
        + 'vf_as_nobody doctor; echo "doctor $?"\n'
        + 'chmod 644 "$OWN/plain"; vf_as_nobody mount; echo "mount $?"\n',
        sandbox,
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("mount", "doctor"))] == ["mount 4", "doctor 4", "mount 4"], done
    assert "fusermount3 is not setuid root" in done.stderr
    assert "neither CAP_SYS_ADMIN nor fusermount3" in done.stderr
    assert "hint: install the package fuse3" in done.stderr
    assert "Traceback" not in done.stderr


# --- machines that lack something -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        ('mount --bind /dev/null "$OWN/x" 2>/dev/null || :; mount -t tmpfs none /dev', "/dev/fuse does not exist"),
        ("mount --bind /dev/null /dev/fuse", "/dev/fuse is not the FUSE device"),
        ('touch "$OWN/file"; mount --bind "$OWN/file" /dev/fuse', "/dev/fuse is not the FUSE device"),
    ],
)
def test_without_the_device_it_is_said_and_how_to_get_it(sandbox: Sandbox, arrange: str, said: str) -> None:
    """No /dev/fuse, or something else in its place: exit code 4 of `mount`, `run` and `doctor`, and nothing left behind."""
    done = elsewhere(
        f"{arrange}\n"
        'vf mount; echo "mount $?"\n'
        'vf run -- true; echo "run $?"\n'
        'vf doctor; echo "doctor $?"\n'
        'ls "$INPUTS"',
        sandbox,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith(("mount ", "run ", "doctor "))]
    assert codes == ["mount 4", "run 4", "doctor 4"], done
    assert done.stdout.splitlines()[-1] == "doctor 4", "no mount point is left"
    assert f"error: {said}" in done.stderr
    assert "hint: the container needs the device: docker run --device /dev/fuse" in done.stderr
    assert f"FAIL fuse device: {said}" in done.stdout


def test_a_device_that_may_not_be_opened_is_said(sandbox: Sandbox) -> None:
    """/dev/fuse for root only: an ordinary user gets exit code 4."""
    done = elsewhere(
        'mknod -m 600 "$OWN/fuse" c 10 229; mount --bind "$OWN/fuse" /dev/fuse\n'
        'vf_as_nobody mount; echo "mount $?"\n'
        'vf_as_nobody doctor >/dev/null; echo "doctor $?"\n',
        sandbox,
    )
    assert done.stdout.splitlines() == ["mount 4", "doctor 4"], done
    assert "error: /dev/fuse may not be opened by this user: Permission denied" in done.stderr


def test_root_without_the_capability_is_told_what_to_ask_for(sandbox: Sandbox) -> None:
    """Root in a container without CAP_SYS_ADMIN: exit code 4 and what to grant."""
    plain = 'setpriv --bounding-set -sys_admin --inh-caps -sys_admin -- "$PYTHON" -m valohai_fuse'
    done = elsewhere(f'{plain} mount; echo "mount $?"\n{plain} doctor >/dev/null; echo "doctor $?"\n', sandbox)
    assert done.stdout.splitlines() == ["mount 4", "doctor 4"], done
    assert "error: mounting is not permitted: root without CAP_SYS_ADMIN" in done.stderr
    assert "--cap-add SYS_ADMIN" in done.stderr


def test_a_read_only_sys_costs_speed_only(sandbox: Sandbox) -> None:
    """No writable /sys: mounted and read all the same; the log and `doctor` say what it costs."""
    done = elsewhere(
        "mount -o remount,bind,ro /sys\n"
        'vf mount; echo "mount $?"\n'
        'cat "$INPUTS/data/a.txt"\n'
        'cat "$ROOT"/run/*.log >&2\n'
        'vf unmount\nvf doctor; echo "doctor $?"\n',
        sandbox,
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["mount 0", HEAD.strip()], done
    assert lines[-1] == "doctor 0"
    assert any(line.startswith("warn kernel tuning: /sys is read-only") for line in lines)
    assert "the kernel's readahead could not be raised" in done.stderr
    assert " WARNING " not in done.stderr


def test_a_read_only_root_file_system(sandbox: Sandbox) -> None:
    """Nothing writable but one tmpfs: each place that cannot be written is named with the option that moves it; with them
    moved it mounts and reads, and a cache that cannot be written costs speed, never a read."""
    done = elsewhere(
        'mkdir "$OWN/inputs"\n'
        "mount -o remount,bind,ro /\n"
        'vf mount; echo "nothing moved $?"\n'
        'vf mount --runtime-dir "$OWN/run"; echo "runtime moved $?"\n'
        'vf doctor >/dev/null; echo "doctor $?"\n'
        'vf mount --runtime-dir "$OWN/run" --root "$OWN/inputs"; echo "root $?"\n'
        'cat "$OWN/inputs/data/a.txt"; cksum < "$OWN/inputs/data/d/b.bin"\n'
        'cat "$OWN"/run/*.log >&2\n'
        'vf unmount --runtime-dir "$OWN/run" --all; echo "unmount $?"\n'
        'vf run --runtime-dir "$OWN/run" --root "$OWN/inputs" -- cat "$OWN/inputs/data/a.txt"; echo "run $?"\n',
        sandbox,
    )
    data = sandbox.expected_bytes("data", "d/b.bin")
    checksum = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout.decode().strip()
    assert done.stdout.splitlines() == [
        "nothing moved 3",
        "runtime moved 5",
        "doctor 3",
        "root 0",
        HEAD.strip(),
        checksum,
        "unmount 0",
        HEAD.strip(),
        "run 0",
    ], done
    assert "hint: name another with --runtime-dir" in done.stderr
    assert "cannot make the mount point" in done.stderr
    assert "--root DIR shows all inputs in one tree there" in done.stderr
    assert " WARNING " in done.stderr, "the log says that the cache cannot be written"
    assert "Traceback" not in done.stderr
