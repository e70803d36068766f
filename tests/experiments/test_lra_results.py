"""What the README says of reduced runs is what results.json has of them."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "lra"


def test_the_readme_quotes_its_results():
    """Every accuracy in its table, in percent, is that of the file which it names."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    files = sorted(FOLDER.glob("results/*/results.json"))
    assert files
    for file in files:
        for result in json.loads(file.read_text()):
            task, model, name = result["run"]
            [line] = [line for line in readme.splitlines() if f"`{model}`, {name}" in line and f"`{task}`" in line]
            assert f"{100 * result['test']['accuracy']:.1f} %" in line
            assert f"{100 * result['best']['value']:.1f} %" in line
            assert f"{result['parameters']:,}" in line
