"""The stubs in proto/ are what grpc_tools makes of the .proto files beside them."""

from importlib.resources import as_file, files
from pathlib import Path

import pytest
from grpc_tools import protoc

PROTO = Path(__file__).parents[3] / "proto"


@pytest.mark.parametrize("name", sorted(path.stem for path in PROTO.glob("*.proto")))
def test_stubs_match_their_source(name: str, tmp_path: Path) -> None:
    package = tmp_path / "in" / "pomarium" / "proto"  # so that the stubs import pomarium.proto
    package.mkdir(parents=True)
    (package / f"{name}.proto").write_bytes((PROTO / f"{name}.proto").read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    with as_file(files("grpc_tools") / "_proto") as include:
        flags = [f"-I{tmp_path / 'in'}", f"-I{include}"]
        flags += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
        assert protoc.main(["protoc", *flags, f"pomarium/proto/{name}.proto"]) == 0
    made = sorted((out / "pomarium" / "proto").iterdir())
    assert [path.name for path in made] == [f"{name}_pb2.py", f"{name}_pb2.pyi", f"{name}_pb2_grpc.py"]
    for path in made:
        assert path.read_text() == (PROTO / path.name).read_text(), f"{path.name} is stale: run `make proto`"
