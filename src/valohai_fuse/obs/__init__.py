"""Seeing inside: logging with redaction, metrics, the control socket."""
