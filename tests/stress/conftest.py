"""The fixtures of real mounts, for load tests."""

from __future__ import annotations

from mount.conftest import fuse_is_usable, mount_inputs

__all__ = ["fuse_is_usable", "mount_inputs"]
