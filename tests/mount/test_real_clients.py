"""Programs of other people, unmodified, on a real mount: what they print is what they print on the plain directory.

Each program runs twice as a process of its own, once in the directory that holds the source files and once in the mounted
input, and knows of neither: it opens relative paths. Whatever it prints includes a digest of all that it read.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import client_data
from support.mounts import MountedSandbox, MountInputs, run_program

pytestmark = pytest.mark.clients

PROGRAMS = {
    "pandas_csv": """
import hashlib, pandas
frame = pandas.read_csv("table/rows.csv")
print(frame.shape, hashlib.sha256(pandas.util.hash_pandas_object(frame).values).hexdigest())
""",
    "pandas_parquet": """
import hashlib, pandas
frame = pandas.read_parquet("table/wide.parquet")
print(frame.shape, hashlib.sha256(pandas.util.hash_pandas_object(frame).values).hexdigest())
""",
    "pyarrow_dataset": """
import pyarrow.dataset, hashlib, pandas
data = pyarrow.dataset.dataset("dataset", format="parquet", partitioning="hive")
table = data.to_table(filter=pyarrow.dataset.field("value") > 0).to_pandas()
table = table.sort_values(["year", "id"], ignore_index=True)
print(sorted(data.files), hashlib.sha256(pandas.util.hash_pandas_object(table).values).hexdigest())
""",
    "zipfile": """
import hashlib, random, zipfile
with zipfile.ZipFile("archive/big.zip") as archive:
    names = archive.namelist()
    random.Random(1).shuffle(names)
    print(len(names), [hashlib.sha256(archive.read(name)).hexdigest() for name in names[:20]], archive.testzip())
""",
    "tarfile": """
import hashlib, tarfile
with tarfile.open("archive/images.tar") as archive:
    for member in archive.getmembers():
        file = archive.extractfile(member)
        print(member.name, member.size, file and hashlib.sha256(file.read()).hexdigest())
""",
    "numpy_memmap": """
import hashlib, numpy
matrix = numpy.load("arrays/matrix.npy", mmap_mode="r")
rows = numpy.random.default_rng(3).integers(0, len(matrix), 50)
print(matrix.shape, matrix[rows].sum(), matrix[:, 17].sum(), hashlib.sha256(matrix).hexdigest())
""",
    "h5py": """
import hashlib, h5py
with h5py.File("arrays/cube.h5", "r") as file:
    cube = file["cube"]
    print(cube.shape, cube[5:9, 3].sum(), hashlib.sha256(cube[:]).hexdigest(), file["labels"][:].sum())
""",
    "pillow": """
import glob, hashlib
from PIL import Image
for path in sorted(glob.glob("images/**/*.*", recursive=True)):
    with Image.open(path) as image:
        print(path, image.format, image.size, hashlib.sha256(image.tobytes()).hexdigest())
""",
    "safetensors": """
import hashlib
from safetensors import safe_open
with safe_open("model/model.safetensors", framework="np") as file:
    for name in sorted(file.keys()):
        print(name, file.get_slice(name)[3:5].sum(), hashlib.sha256(file.get_tensor(name)).hexdigest())
""",
    "safetensors_into_torch": """
import hashlib
from safetensors.torch import load_file
for name, tensor in sorted(load_file("model/model.safetensors").items()):
    print(name, hashlib.sha256(tensor.numpy()).hexdigest())
""",
    "sqlite_immutable": """
import sqlite3
connection = sqlite3.connect("file:db/catalogue.sqlite?immutable=1", uri=True)
print(connection.execute("pragma integrity_check").fetchall())
print(connection.execute("select count(*), sum(bytes), max(name) from datums where bytes between 200 and 300").fetchall())
print(connection.execute("select * from datums where id in (1, 5000, 99999)").fetchall())
""",
    "torch_data_loader": """
import glob, hashlib, torch, numpy
from PIL import Image
class Images(torch.utils.data.Dataset):
    def __init__(self): self.paths = sorted(glob.glob("images/**/*.*", recursive=True))
    def __len__(self): return len(self.paths)
    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return index, torch.from_numpy(numpy.array(image))
loader = torch.utils.data.DataLoader(Images(), batch_size=8, shuffle=True, num_workers=4)
for epoch in range(2):
    seen = {int(i): hashlib.sha256(pixels.numpy()).hexdigest() for indices, batch in loader for i, pixels in zip(indices, batch)}
    print(len(seen), sorted(seen.items()))
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_reads_from_the_mount_what_it_reads_from_the_disk(
    name: str, source: Path, mounted: MountedSandbox
) -> None:
    """Unmodified programs read their inputs as regular files; the bytes are exactly the object's."""
    expected = run_program([sys.executable, "-c", PROGRAMS[name]], cwd=source)
    assert len(expected) > 40, "the program printed no digest"
    assert run_program([sys.executable, "-c", PROGRAMS[name]], cwd=mounted.path("data")) == expected


def test_valohai_utils_finds_every_file_and_asks_nobody(
    source: Path, mounted: MountedSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`valohai.inputs(n).paths()` names the files on the mount: no HTTP, and no api.json is needed."""
    monkeypatch.setenv("VH_CONFIG_DIR", mounted.sandbox.config_dir)
    monkeypatch.setenv("VH_INPUTS_DIR", mounted.sandbox.inputs_dir)
    monkeypatch.setenv("VH_JOB_ID", "019a17bd-e035-e6a6-b76e-4f4ea313b46a")
    assert not Path(mounted.sandbox.config_dir, "api.json").exists()
    program = """
import hashlib, json, valohai
found = {path: hashlib.sha256(open(path, "rb").read()).hexdigest() for path in valohai.inputs("data").paths()}
print(json.dumps(found))
"""
    found = json.loads(run_program([sys.executable, "-c", program], cwd=source))
    top = mounted.sandbox.inputs_dir + "/"
    files = [path for path in source.rglob("*") if path.is_file()]
    plain = [path for path in files if path.suffix not in {".zip", ".tar"}]
    assert {path: digest for path, digest in found.items() if path.startswith(top)} == {
        str(mounted.path("data", str(path.relative_to(source)))): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in plain
    }
    # It opens archives in place and unpacks their members elsewhere: those came through the mount as well.
    unpacked = [digest for path, digest in found.items() if not path.startswith(top)]
    assert len(unpacked) == client_data.ZIP_MEMBERS + client_data.IMAGES
    pictures = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (source / "images").rglob("*.*")}
    assert pictures < set(unpacked)
    assert mounted.sandbox.api.exchanges() == []


def test_one_column_of_a_large_parquet_file_fetches_a_fraction(source: Path, mount_inputs: MountInputs) -> None:
    """Only what is read is fetched: one of sixteen columns of a 145 MB file costs less than a third of it."""
    large = source / "table" / "wide.parquet"
    mounted = mount_inputs({"table": {"wide.parquet": large}})
    program = """
import hashlib, pandas
print(hashlib.sha256(pandas.read_parquet("wide.parquet", columns=["column_3"]).values).hexdigest())
"""
    read = run_program([sys.executable, "-c", program], cwd=mounted.path("table"))
    assert read == run_program([sys.executable, "-c", program], cwd=large.parent)
    size = large.stat().st_size
    assert size / 16 < mounted.sent_bytes() < size / 3


def test_the_head_of_a_large_file_fetches_little(source: Path, mount_inputs: MountInputs) -> None:
    """`head -c 4096` of a large file fetches at most 1.25 MiB."""
    mounted = mount_inputs({"archive": {"big.zip": source / "archive" / "big.zip"}})
    head = subprocess.run(
        ["head", "-c", "4096", "big.zip"], cwd=mounted.path("archive"), capture_output=True, check=True, timeout=60
    ).stdout
    assert head == mounted.sandbox.expected_bytes("archive", "big.zip", 0, 4096)
    assert 4096 <= mounted.sent_bytes() <= 1.25 * 1024 * 1024


def test_the_directory_of_a_zip_file_is_read_from_its_tail(source: Path, mount_inputs: MountInputs) -> None:
    """Listing a 100 MB zip file and reading one member fetches a tenth of it at most."""
    mounted = mount_inputs({"archive": {"big.zip": source / "archive" / "big.zip"}})
    program = """
import hashlib, zipfile
with zipfile.ZipFile("big.zip") as archive:
    print(len(archive.infolist()), hashlib.sha256(archive.read("folder/member-050.bin")).hexdigest())
"""
    read = run_program([sys.executable, "-c", program], cwd=mounted.path("archive"))
    assert read == run_program([sys.executable, "-c", program], cwd=source / "archive")
    assert mounted.sent_bytes() < (source / "archive" / "big.zip").stat().st_size / 10
