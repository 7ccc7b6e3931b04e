"""Concurrency, trio only: leases, flights, the reader. Knows ports and model, never an adapter."""
