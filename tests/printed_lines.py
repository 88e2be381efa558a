"""Collects the lines that the project prints for its readers to paste, from all that it writes."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

TOP = Path(__file__).resolve().parent.parent
TEXTS = [TOP / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
FORMS = [*sorted((TOP / ".github").rglob("*.md")), *sorted((TOP / ".github").rglob("*.yml"))]
DOCUMENTS = [*TEXTS, *FORMS, *sorted((TOP / "docs").rglob("*.md"))]
ERRORS = ("KitError", "RecipeError", "RunError", "StoppedError", "FidelityError", "Problem", "DamagedFileError")

# What stands in a message for a value: the source of the expression -> such a value. A new one is added by its source.
SAMPLES = {
    "path": "export.gptq.gptq_4bit.group_size",
    "check_data.py:path": "data.sources.chat",
    "check_exported.py:path": "revision",
    "budget.path": "export.bits_budget",
    "where": "export.bits_budget",
    "setting": "data.train_file",
    "key": "lora.r",
    "near": "adamw",
    "run": "latest",
    "base": "models/my_base",
    "name": "latest",
    "least": "4.5",
    "most": "8",
    "longest": "96",
    "room": "64",
    "share": "0.125",
    "check.py:name": "recompute",
    "inspect.py:DEFAULT_ROWS": "3",
    "recipes.py:near[0]": "experiment/qwen3_4b_chat_12gb",
    "lengths.py:int(rows.lengths.max())": "96",
    "paths.py:setting.removesuffix('path')": "data.sources.chat.",
    "paths.py:splits[0]": "train",
    "split.py:name": "chat",
    "split.py:available[name]": "40",
    "load.py:'nf4_double' if stored is QuantKind.nf4 else stored.name": "nf4_double",
    "budget.py:mixing[0]": "export.gptq.gptq_4bit",
    "budget.py:export.bits_budget": "4.5",
    "check_data.py:SHORTEST_ROW": "16",
    "compose.py:common_option('model')": "demo",
    "named_base.py:near[0]": "qwen3_4b",
}
# The same for a whole text, where one value depends on another.
WHOLE = {
    "export.py:f'{where}=bfloat16'": "export.merged.merged_16bit.dtype=bfloat16",
    "export.py:f'{where}=true'": "export.gguf.gguf_q4_k_m.imatrix=true",
    "directory.py:f'{key}=latest'": "run=latest",
    "checks.py:f'{path}.imatrix=true'": "export.gguf.gguf_q4_k_m.imatrix=true",
    "checks.py:f'{path}.bits_budget=null'": "export.gguf.gguf_q4_k_m.bits_budget=null",
    "compose.py:f'{key}={EXAMPLES.get(key, '<value>')}'": "data.max_tokens=auto",
    "compose.py:f\"{key}={EXAMPLES.get(key, '<value>')}\"": "data.max_tokens=auto",
    "compose.py:f'{group}={common_option(group)}'": "optim=adamw",
    "line_problems.py:f'{group}={right[0]}'": "optim=adamw",
    "line_problems.py:f\"{group}=[{','.join(dict.fromkeys(right))}]\"": "export=[gguf_q4_k_m]",
    "value_problems.py:f'{word.mapping}.{near}.{field}={hydra_value(value)}'": "export.gptq.gptq_4bit.group_size=64",
}


@dataclass(frozen=True)
class Printed:
    """A line, and the file and place that print it."""

    where: str
    text: str


def of_documents() -> Iterator[Printed]:
    """Lines of fenced blocks without a language, and spans that begin as a command or an override does."""
    for path in DOCUMENTS:
        yield from _of_markdown(str(path.relative_to(TOP)), path.read_text(encoding="utf-8"))


def _of_markdown(name: str, text: str) -> Iterator[Printed]:
    fence = None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fence = line.strip()[3:] if fence is None else None
            continue
        if fence is not None:
            if fence in ("", "bash", "sh", "console") and begins_as_a_line(line):
                yield Printed(f"{name}:{number}", re.sub(r"\s+#\s.*$", "", line).removeprefix("$ ").strip())
            continue
        for span in re.findall(r"`([^`]+)`", line):
            if begins_as_a_line(span):
                yield Printed(f"{name}:{number}", span)


def begins_as_a_line(text: str) -> bool:
    """Whether a text of a document is meant as a command, or as an override of one."""
    command = r"(\$ )?(qlora-kit( |$)|pip |python |python3 |scripts/\w|\.venv/|hf |ollama |vllm |llama-|lms |git )"
    return bool(re.match(command, text) or re.match(r"\$?'?[a-z_]+(\.[\w*<>]+)*=", text))


def of_card(where: str, text: str) -> Iterator[Printed]:
    """Lines of a card as CommonMark shows them: its blocks, its spans and what it says to install."""
    for token in MarkdownIt("commonmark").parse(text.removeprefix("---\n").partition("\n---\n")[2]):
        if token.type == "fence":
            yield from of_block(where, token.content)
        for part in token.children or ():
            if part.type == "code_inline" and begins_as_a_line(part.content):
                yield Printed(where, part.content)
            elif part.type == "text":
                yield from (Printed(where, line) for line in re.findall(r"\((pip install [^)]+)\)", part.content))


def of_block(where: str, text: str) -> Iterator[Printed]:
    """Lines of a block, of which what a program reads from the block itself is one with the line that starts it."""
    lines = text.rstrip("\n").split("\n")
    while lines:
        line = lines.pop(0)
        while line.startswith("python - <<'EOF'") and lines and not line.endswith("\nEOF"):
            line += "\n" + lines.pop(0)
        if begins_as_a_line(line):
            yield Printed(where, line)


class _Page(HTMLParser):
    """The texts of `pre` and `code` as a browser gives them to who copies them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[int] = []
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("pre", "code", "p"):
            self.open.append(len(self.found))
            self.found.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.found[self.open[-1]][0] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            tag, text = self.found[self.open[-1]]
            self.found[self.open[-1]] = tag, text + data


def of_page(where: str, html: str) -> Iterator[Printed]:
    """Lines of a page of HTML; white space outside of `pre` is one blank unless its style keeps it."""
    keeps_blanks = re.search(r"^code \{[^}]*white-space: pre", html, re.MULTILINE) is not None
    reader = _Page()
    reader.feed(html)
    reader.close()
    for tag, text in reader.found:
        if tag == "pre":
            yield from of_block(where, text)
        elif tag == "code" and begins_as_a_line(shown := text if keeps_blanks else " ".join(text.split())):
            yield Printed(where, shown)
        elif tag == "p":
            yield from (Printed(where, line) for line in re.findall(r"\((pip install [^)]+)\)", text))


def of_said(where: str, text: str) -> Iterator[Printed]:
    """What is told on the terminal to be pasted next."""
    for line in text.splitlines():
        if found := re.search(r"(?:^|; )\s*(?:fix:?|next:|to go on|try) +(.+)$", line):
            yield Printed(where, found[1])


def of_recipes() -> Iterator[Printed]:
    """Launch lines and commands in the comments of recipes."""
    for path in sorted((TOP / "recipes").rglob("*.yaml")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.lstrip().startswith("#"):
                continue
            where = f"recipes/{path.relative_to(TOP / 'recipes')}:{number}"
            if found := re.search(r"launch:\s*(.+)$", line):
                yield Printed(where, found[1])
            yield from (Printed(where, span) for span in re.findall(r"`([^`]+)`", line) if begins_as_a_line(span))


def of_help(verb: str, page: str) -> Iterator[Printed]:
    """Commands of a help page: whole lines, and those of an epilog."""
    for number, line in enumerate(page.splitlines(), start=1):
        if line.startswith("usage:"):
            continue
        text = re.sub(r"^(examples|More of a verb|First step):", "", line).strip()
        for part in text.split(" | ") if line.startswith("examples:") else [text]:
            if part.strip().startswith("qlora-kit "):
                yield Printed(f"{verb} --help:{number}", part.strip())


@dataclass(frozen=True)
class Fix:
    """What an error of the source says to do.

    Attributes:
        text: with sample values; empty where code that has tests of its own builds it, or passes another's on.
        unknown: expressions that have no sample.
    """

    where: str
    text: str
    unknown: tuple[str, ...] = ()


def of_source() -> Iterator[Fix]:
    """The fixes of every error in the package."""
    for path in sorted((TOP / "qlora_kit").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if (fix := _fix_of(call, path)) is not None:
                inside = [one for one in functions if one.lineno <= call.lineno <= (one.end_lineno or 0)]
                local = _assigned(inside[-1]) if inside else {}
                where = f"{path.relative_to(TOP)}:{fix.lineno}"
                for text, unknown in _texts(fix, local, constants, path.name):
                    yield Fix(where, text, unknown)


def _fix_of(call: ast.Call, path: Path) -> ast.expr | None:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    is_issue = name == "Issue" and "schema" in path.parts
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ERRORS or is_issue:
        return call.args[2] if len(call.args) > 2 else keywords.get("fix")
    return None


def _assigned(function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


def _texts(
    node: ast.expr, local: dict[str, list[ast.expr]], constants: dict[str, ast.expr], file: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(node, ast.Constant):
        yield str(node.value), ()
    elif isinstance(node, ast.JoinedStr) and f"{file}:{ast.unparse(node)}" in WHOLE:
        yield WHOLE[f"{file}:{ast.unparse(node)}"], ()
    elif isinstance(node, ast.JoinedStr):
        unknown = []
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                source = ast.unparse(part.value)
                sample = SAMPLES.get(f"{file}:{source}", SAMPLES.get(source))
                text += "x" if sample is None else sample
                unknown += [] if sample is not None else [f"{file}:{source}"]
        yield text, tuple(unknown)
    elif isinstance(node, ast.IfExp):
        for branch in (node.body, node.orelse):
            yield from _texts(branch, local, constants, file)
    elif isinstance(node, ast.BoolOp):
        for branch in node.values:
            yield from _texts(branch, local, constants, file)
    elif isinstance(node, ast.Name) and node.id in local:
        rest = {name: values for name, values in local.items() if name != node.id}
        for value in local[node.id]:
            yield from _texts(value, rest, constants, file)
    elif isinstance(node, ast.Name) and node.id in constants:
        yield from _texts(constants[node.id], {}, {}, file)
    else:  # a call, an argument or an attribute: built or told elsewhere
        yield "", ()
