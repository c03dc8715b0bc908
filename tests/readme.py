"""README.md is nbs/index.ipynb, seen from the root of the repository.  python tests/readme.py writes it.

(`nbdev_readme` does the same through Quarto, which not every machine has.)
"""
import base64
import re
from pathlib import PurePosixPath

from house import LINK, NBS, ROOT, Page

HEAD = "<!-- Made from nbs/index.ipynb by `make prepare`. Edit the notebook. -->\n"


def relink(text):
    "Relative links of a page in nbs/, as seen from the folder above it."
    def move(match):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:|#|/", target): return match[0]
        path, hash_, anchor = target.partition("#")
        parts = []
        for part in PurePosixPath("nbs", path).parts: parts.pop() if part == ".." else parts.append(part)
        return match[0].replace(target, "/".join(parts) + hash_ + anchor)
    return LINK.sub(move, text)


def shown(output, images):
    "One output as Markdown; a picture becomes a file beside the notebook."
    if output["output_type"] == "stream": return "".join(output["text"]), "text"
    data = output.get("data", {})
    if "image/png" in data:
        name = f"images/index-{len(images) + 1}.png"
        images[name] = base64.b64decode("".join(data["image/png"]))
        return f"![](nbs/{name})", ""
    if "text/markdown" in data: return relink("".join(data["text/markdown"])), ""
    return "".join(data.get("text/plain", "")), "text"


def render(page):
    "The text of README.md, and the pictures that it shows by their paths below nbs/."
    parts, images = [HEAD], {}
    for cell in page.cells:
        if cell.kind == "markdown": parts.append(relink(cell.source))
        if cell.kind != "code" or {"hide", "default_exp", "include"} & cell.directives.keys(): continue
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if code and cell.directives.get("echo") != "false": parts.append(f"```python\n{code}\n```")
        for text, fence in (shown(output, images) for output in cell.outputs):
            parts.append(f"```{fence}\n{text.rstrip()}\n```" if fence else text)
    return "\n\n".join(part.strip() for part in parts) + "\n", images


if __name__ == "__main__":
    text, images = render(Page(NBS / "index.ipynb"))
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    for old in (NBS / "images").glob("index-*.png"): old.unlink()
    for name, content in images.items():
        (NBS / name).parent.mkdir(exist_ok=True)
        (NBS / name).write_bytes(content)
