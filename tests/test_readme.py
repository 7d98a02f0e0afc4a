import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readme_is_short_and_shows_code_early():
    assert len(README.split()) <= 900
    assert README.splitlines().index("```python") < 40


def test_the_module_of_the_readme_prints_the_receipts_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.strip().splitlines()[-3:]
    shown = re.findall(r"```\n(student.*?)```", README, re.DOTALL)[0].strip().splitlines()
    assert printed == shown
    assert list(tmp_path.iterdir()) == []
