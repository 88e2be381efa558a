"""Every line of what the product makes works too: cards, pages and what verbs say last, whatever is in a name."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.cli.line import Line, parse_line
from qlora_kit.cli.sweep import line_to_go_on as line_to_go_on_with_sweep
from qlora_kit.cli.verbs import _told
from qlora_kit.core.errors import StoppedError
from qlora_kit.core.overrides import read_overrides, write_overrides
from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.verdict import Verdict
from qlora_kit.data.audit.audit import tell_warnings
from qlora_kit.data.audit.finding import Finding, Level
from qlora_kit.export.serving.adapter_card import adapter_card
from qlora_kit.export.serving.facts import ServingFacts
from qlora_kit.export.serving.model_card import model_card, served_of
from qlora_kit.formats.registry import FORMATS
from qlora_kit.pipelines.report import report, report_base
from qlora_kit.pipelines.train import _line_to_go_on, _tell
from qlora_kit.report.inspect_page import inspect_page
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import compose_unchecked, recipe_yaml
from qlora_kit.schema.quant import QuantKind
from qlora_kit.training.begun import describe
from qlora_kit.training.failures import out_of_memory
from qlora_kit.training.result import TrainResult
from tests.contract.test_printed_lines import judge, shell_words, stand_ins  # noqa: F401  # a fixture
from tests.printed_lines import Printed, of_card, of_page, of_said
from tests.stored_rows import StoredData, stored_rows
from tests.tiny_models import build_tiny_model
from tests.unit.formats.test_serve_lines import FLAGS, fault_of, parts, python_fault_of
from tests.unit.report.test_inspect_page import content  # noqa: F401

pytestmark = pytest.mark.slow

NAMES = (
    "plain",
    "a  b",
    """it's "so\"""",
    "$(touch x)",
    "`touch x`;touch x",
    "é 漢",
    "-x",
    "--help",
    "x,y={z}",
    "[1] (2)",
    "#x",
    "~",
    "b\\",
    "```",
    "<b>&amp;",
    "${oc.env:HOME}",
    "a\nb",
    "a\tb",
    "a\u202eb\u2028c\x9bd",
)
# The same in fewer names, for texts that take longer to make and to judge
MIXED = (
    "plain",
    """a  b's "$(touch x)"`touch x`;#""",
    "-é 漢 {z},[1] ${oc.env:HOME}",
    "--help```<b>&amp;\\",
    "a\n\tb\tc\rd",
    "~\u202eb\u2028c\x9bd",
)
HUB, COMMIT = "owner/Tiny-1B", "0123456789abcdef0123456789abcdef01234567"
PATHS = ("run", "resume", "base", "model.source", "data.train_file", "hydra.sweep.dir", "data.eval_file")


def judged(lines, counts, given=()):
    """What is wrong with lines; each is judged by its program.

    Args:
        given: the paths that lines of the kit may name.
    """
    wrong, others = [], []
    for line in lines:
        shell, python = parts(line.text.split("\n"))
        is_served = shell_words(line.text)[0] in FLAGS if shell else True
        is_own = shell and shell_words(line.text)[:2] == ["python", "-m"] and "sglang" not in line.text
        if not is_served or is_own:
            others.append(line)
            continue
        counts["found"] += 1
        counts["compiled" if python else "looked up"] += 1
        if fault := python_fault_of(python) if python else fault_of(line.text):
            wrong.append(f"{line.where}: {line.text}\n    {fault}")
    wrong += judge(others, counts)
    return wrong + [fault for line in others if (fault := other_path(line, given))]


def other_path(line, given):
    """A path in a line of the kit that is not one of those that were meant."""
    words = shell_words(line.text)
    if words[0] != "qlora-kit":
        return ""
    read = parse_line(words[2:])
    named = {key: read.value(key) for key in PATHS} if read.overrides else {}
    strange = {key: value for key, value in named.items() if value is not None and value not in given}
    return f"{line.where}: {line.text}\n    names {strange}, which is none of {given}" if strange else ""


def concluded(title, counts, wrong, capsys, least):
    """Print what was found, and fail on what is wrong or on too little."""
    with capsys.disabled():
        print(f"\n{title}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    assert not wrong, "\n" + "\n".join(wrong)
    assert {what: count for what, count in least.items() if counts[what] < count} == {}
    assert not list(Path().rglob("x")), "a line was run"


def base_folder(name):
    """The folder of a base that is as good as any for a card."""
    folder = Path("models") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def facts_of(kind, name, base, run=None, **more):
    """Facts of a file of one format that has the name everywhere."""
    is_gguf = "gguf" in kind
    return ServingFacts(
        name=name,
        format=FORMATS[kind],
        file=f"{name.replace('/', '')}.gguf" if is_gguf else ".",
        base=base,
        tokenizer=None,
        settings={"kv_cache_fp8": True, "mix": name},
        run=run,
        directory=run,
        **more,
    )


BOUNDS = (
    {"verdict": Verdict.not_measured},
    {"verdict": Verdict.measured, "fidelity": {"mean_kl": 0.01, "positions": 9}},
    {"verdict": Verdict.accepted, "fidelity": {"mean_kl": 0.01, "positions": 9}},
    {"verdict": Verdict.rejected, "faults": ("mean KL 0.2 is above export.max_mean_kl=0.1",)},
)


def test_lines_of_cards(capsys):
    counts, wrong = Counter(), []
    for number, name in enumerate(NAMES):
        folder = base_folder(name)
        bases = (Base(HUB, folder, COMMIT), Base(str(folder), folder))
        for base in bases:
            wrong += judged(list(of_card("adapter/README.md", adapter_card(name, base))), counts)
            for place, kind in enumerate(FORMATS):
                facts = facts_of(kind, name, base, **BOUNDS[(number + place) % len(BOUNDS)])
                lines = list(of_card(f"{kind}: README.md", model_card(facts)))
                shown = sum(
                    len(parts(list(one.lines))[0]) or 1 for one in facts.format.serve_commands(served_of(facts))
                )
                assert len([line for line in lines if not line.text.startswith("pip ")]) == shown
                wrong += judged(lines, counts)
    least = {"found": 1000, "composed": 38, "looked up": 800, "compiled": 200}
    concluded("lines of cards", counts, wrong, capsys, least)


def trained_run(name, *, finished, exported):
    """A run whose folder, rows and base have a name, as training, export and eval leave it."""
    run = RunDirectory(Path(f"{name}{finished}{exported}") / "run")
    run.path.mkdir(parents=True)
    rows, base = Path("rows") / f"{name}.jsonl", base_folder(name)
    rows.parent.mkdir(exist_ok=True)
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 4)
    words = [override("model.source", base), "data=messages", override("data.train_file", rows)]
    words += ["data.max_tokens=64", "data.eval_share=0.5", override("trainer.max_steps", 3)]
    recipe = compose_unchecked("train", words)
    tokens = [([1, 2, 3], [False, True, True])] * 3
    stored = [stored_rows(run.path / split, tokens) for split in ("train", "held_out")]
    data: Any = StoredData(stored[0], stored[1])
    describe(recipe, run, words, data)
    run.metrics.write_text('{"step": 1, "loss": 4.0, "tokens": 9.0, "tokens_per_second": 5.0}\n')
    if finished:
        run.result.write_text("{}")
        run.adapter.mkdir()
    if finished and exported:
        for kind in FORMATS:
            manifest(run, kind, name, Base(str(base), base))
    return run, recipe, (str(run.path), str(rows), str(base))


def manifest(directory, kind, name, base):
    """A finished file's record, with the lines that serve it from where the page is read."""
    facts = facts_of(kind, f"{name}_{kind}", base)
    serve = [asdict(one) for one in facts.format.serve_commands(served_of(facts, str(directory.exports / facts.name)))]
    place = directory.exports / kind / "manifest.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"format": kind, "file": facts.file, "serve": serve, "verdict": "not measured"}))


def test_lines_of_pages_of_runs(capsys):
    counts, wrong = Counter(), []
    for name in MIXED:
        for finished, exported in ((False, False), (True, False), (True, True)):
            run, _, given = trained_run(name, finished=finished, exported=exported)
            html = report(str(run.path)).read_text(encoding="utf-8")
            lines = list(of_page(f"report.html of {name!r}", html))
            again = [words for line in lines if (words := shell_words(line.text))[:2] == ["qlora-kit", "train"]]
            assert [words[2:] for words in again if len(words) > 3] == [read_overrides(run.overrides)]
            wrong += judged(lines, counts, (*given, "held_out.jsonl"))
    concluded("lines of pages of runs", counts, wrong, capsys, {"found": 250, "composed": 36, "compiled": 36})


def test_lines_of_pages_of_bases(capsys):
    counts, wrong = Counter(), []
    for name in MIXED:
        for base in (str(base_folder(name)), *([HUB] if name == MIXED[1] else [])):
            made = RunDirectory(Path(f"{name}{base == HUB}") / "exports of a base")
            words = [override("base", base), "export=[gguf_q4_k_m,awq_4bit]"]
            made.path.mkdir(parents=True)
            made.export_recipe.write_text(recipe_yaml(compose_unchecked("export", words)), encoding="utf-8")
            write_overrides(made.overrides, words)
            for exported in (False, True):
                if exported:
                    for kind in (name for name, one in FORMATS.items() if not one.needs_base):
                        manifest(made, kind, name, Base(base, Path("models") / name))
                html = report_base(str(made.path)).read_text(encoding="utf-8")
                lines = list(of_page(f"report.html of {name!r}", html))
                wrong += judged(lines, counts, (base, str(made.path)))
    concluded("lines of pages of bases", counts, wrong, capsys, {"found": 230, "composed": 24, "compiled": 36})


def test_lines_of_inspections(capsys, content):  # noqa: F811  # the fixture
    counts, wrong = Counter(), []
    for name in MIXED:
        rows = Path(f"{name}  .jsonl")
        rows.write_text("{}\n")
        fix = shell_line([override("data.train_file", rows)])
        found = Finding(Level.warning, "repeats", "rows come twice", (f"{rows}:1",), 2, fix)
        audit = replace(content.audit, findings=(found, *content.audit.findings))
        lines = list(of_page(f"inspect.html of {name!r}", inspect_page(replace(content, name=name, audit=audit))))
        tell_warnings(audit)
        lines += of_said(f"warning on {name!r}", capsys.readouterr().err)
        assert [line.text for line in lines].count(fix) == 2
        wrong += judged(lines, counts)
    concluded("lines of inspections", counts, wrong, capsys, {"found": 12, "composed": 12})


def test_what_verbs_say_last(capsys):
    counts, wrong = Counter(), []
    numbers: dict[str, Any] = dict.fromkeys(("steps", "tokens", "trainable_parameters"), 1)
    numbers |= dict.fromkeys(("seconds", "tokens_per_second", "peak_memory_bytes", "final_loss"), 1.0)
    result = TrainResult(**numbers, optimizer="adamw", eval_loss=None, warnings=["training diverged"])
    base = build_tiny_model("llama", Path("models/tiny"))
    for name in MIXED:
        run, recipe, given = trained_run(name, finished=False, exported=False)
        _tell(result, recipe, run, base)
        _told(StoppedError("stopped", fix=_line_to_go_on(run)), is_stopped=True)
        typed = read_overrides(run.overrides)
        for quant in ("quant=none", "quant.kind=none", "quant=nf4"):
            write_overrides(run.overrides, [*typed, quant])
            recipe = compose_unchecked("train", [*typed, quant])
            _told(out_of_memory(MemoryError(), recipe, run, lambda _: None, 64), is_stopped=False)
        lines = list(of_said(f"after {name!r}", capsys.readouterr().err))
        for line in lines[-6:]:  # what needs less memory
            assert compose_unchecked("train", shell_words(line.text)[2:]).quant.kind is QuantKind.nf4
        assert [line.text.split(" ")[1] for line in lines] == ["export", *["train"] * (len(lines) - 1)]
        assert len(lines) == 9
        words = [
            override("data.train_file", given[1]),
            "lora.r=4,8",
            override("model.source", given[2]),
            "data=messages",
            "data.max_tokens=64",
        ]
        for more in ([], [override("hydra.sweep.dir", run.path)]):
            going_on = line_to_go_on_with_sweep(Line(["-m"], [*words, *more]), run.path)
            lines.append(Printed(f"after a sweep of {name!r}", going_on))
        wrong += judged(lines, counts, given)
    concluded("lines that verbs say last", counts, wrong, capsys, {"found": 60, "composed": 60})
