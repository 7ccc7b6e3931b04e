"""Measures valohai-fuse beside what a user could put in its place; `scripts/bench` is the way in.

`dataset` makes the files, `store` serves them (nginx, at a chosen distance), `peers` mount or download them, `reader` reads
them in a process of its own, `meters` counts what that cost, `workloads` says what is read and which number is promised,
`trial` runs one peer on one workload, `report` writes it all down. Nothing here is imported by the package, and of the
package only the command line is used: every peer is measured from the outside by the same means.
"""
