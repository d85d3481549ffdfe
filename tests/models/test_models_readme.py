"""The Python example of models/README.md runs as it stands."""

import re
from pathlib import Path

from dmtd_models.reference.testing import write_tiny_checkpoint

README = Path(__file__).parents[2] / "models" / "README.md"


def test_example(tmp_path, monkeypatch, capsys):
    write_tiny_checkpoint(tmp_path / "model", family="llama", layers=10)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(code, {})
    assert len(eval(capsys.readouterr().out)) == 16
