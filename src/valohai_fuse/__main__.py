"""`python -m valohai_fuse` is the command `valohai-fuse`."""

from valohai_fuse.cli.main import main

if __name__ == "__main__":
    main()
