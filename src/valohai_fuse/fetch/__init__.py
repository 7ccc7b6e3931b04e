"""Moves bytes: worker processes on libcurl behind `ports.Fetcher`."""
