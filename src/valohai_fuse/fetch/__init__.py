"""Moves bytes: worker processes, on libcurl and on sockets of their own, behind `ports.Fetcher`."""
