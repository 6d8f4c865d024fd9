"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `python -m tests.lowest`.

Those of what AltGrad needs and of what its extras need; not of the tools that only its developers use. Triton is left out:
each release of PyTorch takes one release of it.
"""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
promised = project["dependencies"] + [p for name in extras if name not in ("cuda", "docs", "dev") for p in extras[name]]

if __name__ == "__main__":
    print("\n".join(package.replace(">=", "==") for package in promised))
