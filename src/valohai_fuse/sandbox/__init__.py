"""A local Valohai on loopback: config files, API, an object store whose URLs expire, and scripted faults."""
