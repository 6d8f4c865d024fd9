"""The site's pages whose text has another home: README and its like, tutorials, the reference. Called by MkDocs.

The repository's own pages are moved into the site with their links; a notebook becomes a page of prose, code and the text
that its cells printed; the reference has a page for each public package (mkdocstrings fills it from docstrings) and one for
the command line, read off the commands themselves.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.main import get_command

ROOT = Path(__file__).parent.parent
HOMES = {"README.md": "index.md", **{f"{n.upper()}.md": f"{n}.md" for n in ("changelog", "contributing", "security")}}
"""Pages of the repository -> where they are in the site."""

PACKAGES = (
    "altgrad.nn",
    "altgrad.nn.functional",
    "altgrad.quantization",
    "altgrad.optim",
    "altgrad.monitor",
    "altgrad.loop",
    "altgrad.autopsy",
    "altgrad.advise",
    "altgrad.integrations",
    "altgrad.training",
    "altgrad.sweep",
    "altgrad.analysis",
    "altgrad.analysis.plots",
    "altgrad.formats.spectrum",
    "altgrad.records.metrics",
    "altgrad.randomness",
    "altgrad.errors",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    made = {home: moved((ROOT / page).read_text()) for page, home in HOMES.items()}
    made["index.md"] = "---\nhide: [navigation]\n---\n\n" + made["index.md"]  # no list of one page beside it
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        made[notebook.src_uri.replace(".ipynb", ".md")] = page_of_notebook(Path(notebook.abs_src_path))
    for package in PACKAGES:
        made[f"reference/{package}.md"] = f"# {package}\n\n::: {package}\n"
    made["reference/command-line.md"] = command_line()
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def moved(text: str) -> str:
    """A page of the repository's root with its links as they are in the site."""
    for page, home in HOMES.items():
        text = text.replace(f"]({page}", f"]({home}")
    return text.replace("](docs/", "](")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to pages of the repository and to notebooks lead to the site's."""
    for page, home in HOMES.items():
        markdown = re.sub(rf"\]\(((?:\.\./)+){re.escape(page)}", lambda m, home=home: f"]({m[1][3:]}{home}", markdown)
    return re.sub(r"(\]\([^)\s:]+)\.ipynb", r"\1.md", markdown)


def page_of_notebook(path: Path) -> str:
    """Prose, code and printed text of a notebook, and where to get it."""
    parts = ["---\nhide: [toc]\n---"]  # its sections are few; lines of code and of what they print have the room
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        if printed := "".join("".join(o.get("text") or o["data"]["text/plain"]) for o in cell["outputs"]):
            parts.append("``` { .text .output }\n" + printed.rstrip("\n") + "\n```")
    parts.append(f'<a href="{path.name}" download>This page as a notebook</a>')
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """What `altgrad COMMAND --help` says, as one page."""
    from altgrad.cli import app

    parts = ["# Command line", f"{app.info.help} `altgrad COMMAND --help` says the same in a terminal."]
    for name, command in get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## altgrad {name}", command.help, f"```console\n$ altgrad {name} {usage}\n```"]
        rows = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
        parts.append(
            "| | |\n|---|---|\n" + "\n".join(f"| `{left}` | {escape(right, quote=False)} |" for left, right in rows)
        )
    return "\n\n".join(parts).replace("\\[", "[") + "\n"
