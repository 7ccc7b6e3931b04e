"""The pure room: no clock, no I/O, no async. Everything here is a function of its arguments."""
