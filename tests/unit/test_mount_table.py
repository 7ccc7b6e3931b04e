"""The kernel's mount table, read without touching what is mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from valohai_fuse.mount import table

TEXT = r"""22 27 0:20 / /proc rw,nosuid - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw
90 27 0:51 / /valohai/inputs/a\040b\134c ro,nosuid,nodev - fuse.valohai-fuse valohai:a\040b ro,user_id=0
91 27 0:52 / /mnt/x rw - tmpfs none rw
92 27 0:53 / /mnt/x ro - fuse.valohai-fuse valohai ro
broken line
"""


def test_names_are_unescaped_and_optional_fields_skipped() -> None:
    found = table.parse(TEXT)
    assert [entry.mountpoint for entry in found] == ["/proc", "/", "/valohai/inputs/a b\\c", "/mnt/x", "/mnt/x"]
    assert found[2].is_ours
    assert found[2].source == "valohai:a b"
    assert (found[1].device, found[1].file_system_type, found[1].mount_id) == ("254:0", "ext4", 27)


def test_the_last_mount_on_a_point_is_the_one_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "entries", lambda: table.parse(TEXT))
    found = table.find("/mnt/x")
    assert found is not None
    assert found.is_ours
    assert table.find("/mnt") is None
    inside = table.containing("/mnt/x/y")
    assert inside is not None
    assert inside.mount_id == 92
    outside = table.containing("/mnt/xy")
    assert outside is not None
    assert outside.mountpoint == "/"


def test_links_are_resolved_but_the_last_component_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "last").symlink_to("nowhere")
    assert table.resolve(str(tmp_path / "link" / "last")) == str(tmp_path / "real" / "last")
    assert table.resolve("/") == "/"


def test_what_is_not_mounted_cannot_be_unmounted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"."):
        table.unmount(str(tmp_path))
    assert table.answers(str(tmp_path)) is True


def test_a_mount_is_not_taken_for_a_later_one_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    first = table.parse(TEXT)[2]
    monkeypatch.setattr(table, "entries", lambda: table.parse(TEXT))
    assert table.is_there(first)
    monkeypatch.setattr(table, "entries", lambda: table.parse(TEXT.replace("a\\040b", "other")))
    assert not table.is_there(first)
