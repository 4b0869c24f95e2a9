"""A notebook as a user writes it: functions in its cells, a bar while the job runs, the cell's line in an error."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest
from daemons import own_address
from nbclient import NotebookClient

import mrcore

CELLS = [
    """
import re
from collections import namedtuple
from dataclasses import dataclass
import mrcore

WORD = re.compile("[a-z]+")
cluster = mrcore.connect(home=HOME, nodes=2, servers=1, address=ADDRESS).start()
cluster
""",
    """
@dataclass
class Word:
    text: str

    def key(self):
        return (self.text[0], self.text)

SHORT = 3
def words(line):
    return [Word(text) for text in WORD.findall(line.lower())]
""",
    """
def count_words(line, auxiliary_data):
    return [(word.key(), 1) for word in words(line) if len(word.text) > SHORT]

def add_up(group, auxiliary_data):
    return [(group[0][0], sum(count for _, count in group))]
""",
    "job = cluster.submit(map=count_words, reduce=add_up, combine=add_up, inputs=TEXT).wait(120)\njob",
    "import json\nprint(json.dumps([[*key, count] for key, count in job.items()]))",
    """
n = 5
def longer_than(n):
    return lambda line, auxiliary_data: [(len(line) > n, 1)]
print(json.dumps(sorted({key for key, _ in cluster.submit(map=longer_than(n), inputs=TEXT).wait(120).items()})))
""",
    """
def broken(line, auxiliary_data):
    number = 1
    return [(line, number / 0)]
try:
    cluster.submit(map=broken, inputs=TEXT).wait(120)
except mrcore.JobFault as error:
    print(json.dumps([str(error), *error.__notes__]))
""",
    "job.to_polars()",
    "cluster.stop()",
]


@pytest.mark.slow
def test_a_notebook_runs_functions_of_its_cells_on_a_cluster(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("That is the question whether this is nobler\nsomething is rotten: that it was\n" * 300)
    address = own_address()
    own_address()  # of the second node
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    values = f"HOME, ADDRESS, TEXT = {str(home)!r}, {address!r}, {str(text)!r}\n"
    cells = [nbformat.v4.new_code_cell(code.strip("\n")) for code in [values, *CELLS]]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.create_kernel_manager()
    client.km.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.km.ip = "127.0.0.1"
    try:
        client.execute()
    finally:
        mrcore.connect(home=home).stop()
    shown = [cell.outputs for cell in notebook.cells]
    bars = [output for output in shown[4] if "text/html" in output.get("data", {})]
    assert "succeeded" in bars[0]["data"]["text/html"] and "value='1.000'" in bars[0]["data"]["text/html"]
    assert len(bars) == 2, "one that was replaced all the time, and the job itself"
    words = [word for word in re.findall("[a-z]+", text.read_text().lower()) if len(word) > 3]
    oracle = Counter((word[0], word) for word in words)
    assert sorted(_printed(shown[5])) == sorted([*key, count] for key, count in oracle.items())
    assert _printed(shown[6]) == [1]
    message, traceback = _printed(shown[7])
    assert "map function broken failed" in message and "(cell In[8], line 3)" in message
    assert 'File "cell In[8]", line 3, in broken\n    return [(line, number / 0)]' in traceback
    assert "key_1" in shown[8][0]["data"]["text/html"]
    (project,) = [path for path in home.glob("notebooks/*") if "count_words" in (path / "map_functions.py").read_text()]
    assert "# cell In[3], line 1\n@dataclass\nclass Word:" in (project / "map_functions.py").read_text()


def _printed(outputs: list[Any]) -> Any:
    (text,) = [output["text"] for output in outputs if output["output_type"] == "stream" and output["name"] == "stdout"]
    return json.loads(text)
