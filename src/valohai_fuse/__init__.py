"""Valohai on-demand inputs as ordinary read-only files, fetched when something first reads them."""

__version__ = "0.1.0"
