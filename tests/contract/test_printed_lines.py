"""Every line that is printed to be pasted works: it is run, or composed, or its files and programs are looked up."""

import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from qlora_kit.cli.verbs import VERBS, main
from qlora_kit.core.errors import KitError
from qlora_kit.core.shell import is_line
from qlora_kit.schema.compose import compose_recipe, compose_unchecked, sweep_jobs
from qlora_kit.schema.root import RECIPE_OF_VERB
from qlora_kit.schema.walk import find_path, schema_paths
from tests import printed_lines
from tests.printed_lines import TOP, Fix, Printed

pytestmark = pytest.mark.slow

# A place to fill in -> what a reader may put there. In documents only; a `fix` has none.
PLACES = {
    "<folder>": "models/my_base",
    "<file>": "chats.jsonl",
    "<commit>": "0123456789abcdef0123456789abcdef01234567",
    "<GB>": "20GB",
    "<name>": "chat",
    "<device>": "gpu",
    "VERB": "train",
    "FILE": "chats.jsonl",
    "TASKS": "hellaswag",
}
# Spans that begin like an override and are none.
NO_LINES = {
    "use_gradient_checkpointing=False": "a setting of another program",
    "revision=<commit>": "export's own word, shown by itself",
    "out=<folder>": "export's own word, shown by itself",
    "scripts/bench/results/<device>/<name>.json": "the names of files",
}
FIELDS = [path for recipe in RECIPE_OF_VERB.values() for path, _, _ in schema_paths(recipe)]
LAST_PARTS = {path.rsplit(".", 1)[-1] for path in FIELDS if "." in path}
TOP_KEYS = {path.split(".")[0] for path in FIELDS}
PROGRAMS = ("pip", "python", "hf", "rm", "jq", "iconv", "cd")
OWN = {
    "inspect": ("rows", "page"),
    "report": ("run", "base", "out", "debug"),
    "train": ("resume", "debug"),
    "plan": ("card",),
}
RECIPE_OF = {"train": "train", "inspect": "train", "plan": "train", "export": "export", "eval": "eval"}
NEEDED = {
    "train": ["model=demo", "data=rows", "data.sources.chat.path=chats.jsonl", "data.max_tokens=64"],
    "export": ["run=latest", "export=[gguf_q4_k_m,gptq_4bit,awq_4bit,w4a16,merged_16bit]"],
    "eval": [],
}


@pytest.fixture(autouse=True)
def stand_ins(tmp_path, monkeypatch):
    """A folder with the files that printed lines name."""
    demo = "data/home_commands"
    for name in ("chats.jsonl", "held_out.jsonl", f"{demo}/train.jsonl", f"{demo}/held_out.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 4)
    (tmp_path / "models/my_base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_kit.schema.check.is_present", lambda module: True)  # a reader installs the extra


def keyed(words):
    return {word.lstrip("+~").split("=", 1)[0] for word in words}


def check_overrides(words, verb=None):
    """Compose overrides of one verb, or of any that takes them; returns what is wrong."""
    told = []
    for one in [verb] if verb else NEEDED:
        needed = [word for word in NEEDED[one] if not keyed([word]) & keyed(words)]
        try:
            compose_unchecked(one, [*needed, *words])
            return ""
        except KitError as error:
            told.append(f"{one}: {error}")
    own = {key for keys in OWN.values() for key in keys}
    return "" if verb is None and keyed(words) <= own else "\n".join(told)


def check_kit(words):
    """Run a cheap line of the kit, compose any other; returns what was done and what is wrong."""
    verb, *rest = words or ["--help"]
    if verb.startswith("-"):
        return "run", "" if main(words) == 0 else "it failed"
    if verb not in VERBS:
        return "", f"there is no verb {verb}"
    if "--help" in rest or (verb in ("recipes", "plan", "doctor") and rest):
        return "run", "" if main(words) == 0 else "it failed"
    if verb == "chat":
        places = [word for word in rest if not word.startswith("-")]
        return "composed", "" if len(places) <= 2 else f"chat takes one place, not {places}"
    overrides = [word for word in rest if not word.startswith("-") and word.split("=")[0] not in OWN.get(verb, ())]
    if verb == "report" or not overrides:
        return "composed", "" if not overrides else f"report takes no {overrides}"
    recipe = RECIPE_OF[verb]
    if recipe == "export" and not keyed(overrides) & {"base", "export"}:
        overrides.append("export=gguf_q4_k_m")  # as the recipe of the run names it
    jobs = sweep_jobs(overrides) if "-m" in rest else [overrides]
    try:
        for job in jobs:
            compose_recipe(recipe, job)
    except KitError as error:
        return "composed", str(error)
    return "composed", ""


def check_shell(words):
    """A program that is known, with files of the checkout that exist and extras that there are."""
    program, *rest = words
    if program.startswith("scripts/"):
        return "" if (TOP / program).exists() else f"no {program}"
    if program == ".venv/bin/pre-commit":
        return "" if rest == ["install"] else "not known"
    if program not in PROGRAMS:
        return f"the program {program} is in no table"
    extras = set(tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for word in rest:
        if found := re.search(r"\[([\w,]+)\]$", word):
            if program == "pip" and not set(found[1].split(",")) <= extras:
                return f"no extra {found[1]}"
        elif word.endswith((".py", "constraints.txt")) and not (TOP / word).is_file():
            return f"no {word}"
    if program == "python" and rest[:1] == ["-m"] and importlib.util.find_spec(rest[1]) is None:
        return f"no module {rest[1]}"
    return ""


def shell_words(text):
    """The words of a line, by bash where they hold escapes of its own; a word that would run something is not one."""
    if "$'" not in text:
        return shlex.split(text)
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True).stdout
    return said.decode(errors="surrogateescape").split("\0")[:-1]


def check_line(text):
    """What was done with a line, and what is wrong with it."""
    words = shell_words(text)
    if words[0] == "qlora-kit":
        return check_kit(words[1:])
    if "=" in words[0]:
        return "composed", check_overrides(words)
    return "looked up", check_shell(words)


def filled(text):
    for place, value in PLACES.items():
        text = re.sub(rf"(?<![A-Za-z_]){re.escape(place)}(?![A-Za-z_])", value, text)
    return text


def is_of_a_file(text):
    """Whether a span is the last part of a field's path, as a recipe file has it: `bits_budget=4.5`."""
    key, _, _ = text.partition("=")
    return re.fullmatch(r"\w+=\S+", text) is not None and key in LAST_PARTS - TOP_KEYS


def judge(lines: list[Printed], counts: Counter) -> list[str]:
    """Check lines of documents; returns what is wrong, and counts what was done."""
    wrong = []
    for line in lines:
        counts["found"] += 1
        if line.text in NO_LINES or is_of_a_file(line.text):
            counts["no line"] += 1
            continue
        text = filled(line.text)
        try:
            done, fault = check_line(text)
        except (KitError, ValueError) as error:
            done, fault = "", str(error)
        counts[done] += not fault
        if fault:
            wrong.append(f"{line.where}: {line.text}\n    {fault}")
    return wrong


def report(title: str, counts: Counter) -> None:
    print(f"{title}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


def test_lines_of_documents(capsys):
    counts: Counter = Counter()
    lines = list(printed_lines.of_documents())
    wrong = judge(lines, counts)
    with capsys.disabled():
        report("\nlines of documents", counts)
    assert not wrong, "\n" + "\n".join(wrong)
    assert counts["found"] > 60
    assert counts["run"] > 3


def test_what_documents_link_to_is_there():
    made = {TOP / "docs" / "reference" / f"{page}.md" for page in ("groups", *RECIPE_OF_VERB)}
    links = [
        (str(path.relative_to(TOP)), (path.parent / target).resolve())
        for path in printed_lines.DOCUMENTS
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    ]
    assert len(links) > 40
    assert [link for link in links if not link[1].exists() and link[1] not in made] == []


def test_files_of_the_project_that_documents_name_are_there():
    of_the_project = r"`((?:docs|qlora_kit|recipes|scripts|tests)/[\w./]+\.\w+)`"
    named = {
        (str(path.relative_to(TOP)), file)
        for path in printed_lines.DOCUMENTS
        for file in re.findall(of_the_project, path.read_text(encoding="utf-8"))
    }
    assert len(named) > 30
    assert [name for name in named if not (TOP / name[1]).exists()] == []


def test_lines_of_recipes(capsys):
    counts: Counter = Counter()
    wrong = judge(list(printed_lines.of_recipes()), counts)
    with capsys.disabled():
        report("\nlines of recipes", counts)
    assert not wrong, "\n" + "\n".join(wrong)
    assert counts["found"] > 20


def test_lines_of_help(capsys):
    lines = []
    for verb in ("", *VERBS):
        try:
            assert main([verb, "--help"] if verb else ["--help"]) == 0
        except SystemExit as left:  # argparse
            assert left.code == 0
        lines += printed_lines.of_help(verb or "qlora-kit", capsys.readouterr().out)
    counts: Counter = Counter()
    wrong = judge(lines, counts)
    with capsys.disabled():
        report("\nlines of help", counts)
    assert not wrong, "\n" + "\n".join(wrong)
    assert counts["found"] > 15


def fault_of(fix: Fix, counts: Counter) -> str:
    if not fix.text:
        counts["built elsewhere"] += 1
        return ""
    # What looks like a line: an unquoted space, list or mapping in it would be no advice but a mistake.
    is_like_one = re.match(r"'?[a-z_]+(\.\w+)*=[^<]*$", fix.text) and not re.search(r" or |, |\.\.\.", fix.text)
    if fix.unknown and (is_line(fix.text) or is_like_one):
        # A value without a sample: its field at least is one.
        key = fix.text.partition("=")[0]
        counts["by their field"] += (is_field := any(find_path(recipe, key) for recipe in RECIPE_OF_VERB.values()))
        return "" if is_field and fix.text == f"{key}=x" else f"no sample for {', '.join(fix.unknown)}"
    if not is_line(fix.text):
        counts["advice"] += 1
        return "it looks like a line and is none" if is_like_one else ""
    done, fault = "", ""
    for part in fix.text.split(" && "):
        done, fault = check_line(part)
        if fault:
            return fault
    counts[done] += 1
    return ""


def test_fixes_of_errors(capsys):
    counts: Counter = Counter()
    wrong = []
    for fix in printed_lines.of_source():
        counts["found"] += 1
        try:
            fault = fault_of(fix, counts)
        except (KitError, ValueError) as error:
            fault = str(error)
        if fault:
            wrong.append(f"{fix.where}: {fix.text}\n    {fault}")
    with capsys.disabled():
        report("\nfixes of errors", counts)
    assert not wrong, "\n" + "\n".join(wrong)
    assert counts["composed"] > 40


@pytest.mark.parametrize(
    "text",
    [
        "qlora-kit trian experiment=x",
        "qlora-kit train lora.rr=8",
        "qlora-kit export run=latest export=gguf_q9",
        "pip install '.[nothing]'",
        "scripts/gone",
        "lora.r=many",
        "wget http://example.org",
        "python scripts/gone.py",
    ],
)
def test_a_wrong_line_is_found(text):
    try:
        _, fault = check_line(text)
    except KitError as error:
        fault = str(error)
    assert fault


def test_an_error_without_a_sample_is_found():
    assert fault_of(Fix("x.py:1", "a=?", ("x.py:y",)), Counter())
    assert fault_of(Fix("x.py:1", "data.columns={prompt: a}"), Counter())


def test_stand_ins_are_all_that_is_written():
    assert {path.name for path in Path().iterdir()} == {"chats.jsonl", "held_out.jsonl", "data", "models"}
