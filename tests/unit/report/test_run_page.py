"""The page of a run: what it says, what it says is missing, and that no text of a run acts as HTML."""

import dataclasses
import json
import math
import re

import pytest

from qlora_kit.report.page import Number
from qlora_kit.report.run_page import headline, run_page, seconds_in_steps, verdict
from qlora_kit.report.run_page_facts import Artifact, Environment, Missing
from qlora_kit.report.run_page_fidelity import Cell, fidelity, remarks, size_against_kl
from qlora_kit.report.run_page_read import read_run
from qlora_kit.report.run_page_record import hardware_of
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import compose_unchecked, recipe_yaml
from tests.html_reader import read

pytestmark = pytest.mark.slow

NASTY = '</style><script>alert("x")</script>&\x00<img src=//evil.example/x onerror=1>'
SPLIT = {"rows": 100, "tokens": 5000, "trained_tokens": 1250, "longest_row": 71, "max_tokens": 256}
SOURCE = {
    "name": "chats",
    "rows": 100,
    "bad_rows": 3,
    "tokens": 5000,
    "trained_tokens": 1250,
    "sha256": {"a.jsonl": "ab12"},
}
FIT = {"loss": 0.5, "mean_kl": 0.0125, "p99_kl": 0.25, "same_top": 0.97, "positions": 390}


def text_of(html):
    return " ".join(" ".join(read(html.partition("<body>")[2].partition("</body>")[0]).texts).split())


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.fixture
def killed(tmp_path):
    """A run that was stopped after three steps."""
    run = RunDirectory(tmp_path / "outputs" / "mine" / "2026-01-31_12-30-00")
    recipe = compose_unchecked(
        "train", ["model=demo", "data=messages", "data.train_file=a.jsonl", "data.max_tokens=256", "name=mine"]
    )
    put(run.recipe, recipe_yaml(recipe))
    put(run.overrides, "model=demo\ndata.train_file=my file.jsonl\n")
    put(run.environment, {"python": "3.11.7", "cpu_count": 2, "gpus": [], "packages": {"torch": "2.13.0"}})
    put(run.data, {"train": {**SPLIT, "sources": [SOURCE]}, "held_out": {**SPLIT, "rows": 20, "sources": []}})
    steps = [
        {"step": step, "loss": 4.0 / step, "learning_rate": 0.002, "grad_norm": 1.0, "tokens": 100.0 * step}
        | {"seconds": seconds, "tokens_per_second": 50.0 * step, "peak_memory_bytes": 2.5e9}
        for step, seconds in ((1, 2.0), (2, 3.0), (3, 3.67))
    ]
    put(run.metrics, "".join(json.dumps(step) + "\n" for step in steps) + '{"step": 4, "lo')
    return run


@pytest.fixture
def finished(killed):
    """The same run, ended, with two files of which one is rejected, and scores."""
    with killed.metrics.open("a") as stream:
        stream.write('\n{"step": 3, "eval_loss": 1.25}\n')
    put(killed.result, {"steps": 3.0, "trainable_parameters": 4884480.0})
    killed.adapter.mkdir()
    rows = []
    for name, kind, kl in (("gguf_q8_0", "gguf", 0.0125), ("gguf_q2_k", "gguf", 0.3)):
        fit = {**FIT, "mean_kl": kl}
        serve = [{"server": "llama.cpp", "install": "", "lines": [f"llama-server -m {name}.gguf", "curl :8080"]}]
        manifest = {"name": name, "format": kind, "file": "x.gguf", "fidelity": fit, "max_mean_kl": 0.05}
        put(
            killed.exports / name / "manifest.json", {**manifest, "rejected": kl > 0.05, "seconds": 2.0, "serve": serve}
        )
        rows.append({"name": name, "size_bytes": 9, "fidelity": fit, "exact_match": 0.5, "stops": 0.75, "answered": 4})
    trained = {"fidelity": {**FIT, "mean_kl": 0.0}, "exact_match": 0.75, "answered": 4, "tokens_per_second": 20.0}
    rows += [{"name": "base", "size_bytes": 272e6, **trained}, {"name": "adapter", "size_bytes": 23e6, **trained}]
    answers = {"base": "Sure, I can", "adapter": "lamp", "gguf_q8_0": "lamp"}
    samples = [{"prompt": "turn on", "expected": "lamp", "answers": answers}]
    put(killed.evaluation, {"rows": rows, "samples": samples})
    return killed


def test_the_page_is_whole_and_needs_nothing_else(finished):
    html = run_page(read_run(finished))
    reader = read(html)
    tags = [tag for tag, _ in reader.tags]
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not [name for _, given in reader.tags for name in given if name in ("src", "href") or name.startswith("on")]
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_every_section_is_there(finished):
    sections = [given.get("id") for tag, given in read(run_page(read_run(finished))).tags if tag == "section"]
    assert sections == ["setup", "curves", "rows", "fidelity", "samples", "serving", "record"]


def test_the_numbers_at_the_top(finished):
    run = read_run(finished)
    assert seconds_in_steps(run) == 3.67
    assert headline(run) == [
        Number("Held-out loss", "1.2500"),
        Number("Training loss", "1.3333", "last step"),
        Number("Steps", "3"),
        Number("Time in steps", "3.7 s"),
        Number("Training rows", "100"),
        Number("Tokens seen", "300"),
        Number("Throughput", "149", "tokens/s"),
        Number("Peak memory", "2.5 GB", "process"),
    ]
    assert verdict(run) == "Trained; 2 files, of which 1 is rejected."


def test_setup_rows_and_record_say_what_the_files_say(finished):
    said = text_of(run_page(read_run(finished)))
    for part in (
        "LoRA: r 16, alpha 32, on all_linear, 4.9 M trained weights",
        "2 CPU cores",
        "2026-01-31 12:30",
        "training chats 100 5,000 1,250 25.0% 50 71 3",
        "qlora-kit train model=demo 'data.train_file=my file.jsonl'",
        "a.jsonl ab12",
        "torch 2.13.0",
        "train_file: a.jsonl",
    ):
        assert part in said


def test_the_fidelity_table_has_every_file_and_names_the_rejected_one(finished):
    said = text_of(run_page(read_run(finished)))
    assert re.search(r"gguf_q8_0 accepted \d+ B 0\.01250 0\.2500 97\.0% 0\.5000 50\.0% 75\.0% - 2\.0 s", said)
    assert re.search(r"gguf_q2_k rejected \d+ B 0\.30000", said)
    assert "gguf_q2_k is rejected: its mean KL, 0.30000, is above its bound, export.max_mean_kl=0.05." in said
    assert "over 390 trained tokens" in said
    assert "base before 272.0 MB 0 " in said


def test_numbers_are_right_aligned(finished):
    cells = re.findall(r"<td( class=\"number\")?>([^<]+)", run_page(read_run(finished)))
    assert cells
    assert all(align for align, said in cells if re.match(r"[\d-]", said))


def test_samples_join_those_who_said_the_same(finished):
    assert "turn on wanted lamp before Sure, I can after, gguf_q8_0 lamp" in text_of(run_page(read_run(finished)))


def test_commands_to_serve_come_from_the_manifests(finished):
    html = run_page(read_run(finished))
    assert "<p>llama.cpp</p><pre>llama-server -m gguf_q8_0.gguf\ncurl :8080</pre>" in html


def test_a_stopped_run_has_a_page_that_says_so(killed):
    run = read_run(killed)
    said = text_of(run_page(run))
    assert verdict(run) == "Training has not ended."
    assert "3 steps are logged, and there is no adapter" in said
    assert f"qlora-kit train resume={killed.path}" in said
    assert "No held-out loss was measured yet" in said
    assert "Learning rate" in said
    assert "Fidelity" not in said


def test_a_run_without_files_or_scores_says_how_to_make_them(finished):
    for path in finished.exports.rglob("manifest.json"):
        path.unlink()
    finished.evaluation.unlink()
    said = text_of(run_page(read_run(finished)))
    assert f"No file to serve was exported yet. qlora-kit export run={finished.path} export=gguf_q4_k_m" in said
    assert f"cannot be compared. qlora-kit eval run={finished.path}" in said
    assert "Trained; no file to serve yet." in said


def test_a_file_made_after_eval_is_shown_by_its_own_numbers(finished):
    record = json.loads(finished.evaluation.read_text())
    record["rows"] = [row for row in record["rows"] if row["name"] != "gguf_q2_k"]
    put(finished.evaluation, record)
    said = text_of(run_page(read_run(finished)))
    assert "Not scored by eval yet: gguf_q2_k; their numbers are those of the export." in said
    assert "gguf_q2_k rejected" in said


def test_a_run_of_which_only_the_recipe_is_left(killed):
    for path in (killed.overrides, killed.environment, killed.data, killed.metrics):
        path.unlink()
    said = text_of(run_page(read_run(killed)))
    assert "no step is logged" in said
    assert "data.json tells nothing about the rows." in said
    assert "environment.json tells no versions" in said
    assert "Held-out loss -" in said


def test_no_held_out_rows_is_said(killed):
    put(killed.data, {"train": SPLIT, "held_out": None})
    assert "No rows are held out" in text_of(run_page(read_run(killed)))


def test_rows_given_after_training_are_held_out_rows(finished):
    put(finished.data, {"train": SPLIT, "held_out": None})
    finished.metrics.write_text('{"step": 3, "loss": 1.0}\n', encoding="utf-8")
    assert "No rows are held out" not in text_of(run_page(read_run(finished)))


@pytest.mark.parametrize("broken", ["{", "[1]", "null", "\udcff"])
def test_damaged_files_are_named(finished, broken):
    for path in (finished.evaluation, finished.data, finished.exports / "gguf_q2_k" / "manifest.json"):
        path.write_bytes(broken.encode("utf-8", "surrogateescape"))
    said = text_of(run_page(read_run(finished)))
    for name in ("eval.json", "data.json", "exports/gguf_q2_k/manifest.json"):
        assert f"{name} cannot be read: it holds no JSON object" in said
    assert "gguf_q8_0" in said


@pytest.mark.parametrize("recipe", ["model: {wrong: 1}\n", "a: [\n", "- 1\n", "", NASTY])
def test_a_recipe_of_another_version_leaves_the_rest(killed, recipe):
    put(killed.recipe, recipe)
    said = text_of(run_page(read_run(killed)))
    assert "the recipe cannot be read by this version of qlora-kit" in said
    assert "Learning rate" in said


@pytest.mark.parametrize("value", [None, "x", [], {}, True, {"rows": "many"}, {"fidelity": []}])
def test_values_of_the_wrong_kind_count_as_absent(finished, value):
    put(finished.data, {"train": value, "held_out": value})
    put(finished.environment, {"gpus": value, "packages": value, "cpu_count": value, "python": value})
    put(finished.evaluation, {"rows": [value, {"name": "base", "fidelity": value}], "samples": [value]})
    put(finished.exports / "gguf_q8_0" / "manifest.json", {"format": value, "fidelity": value, "serve": value})
    with finished.metrics.open("a") as stream:
        stream.write(json.dumps(value) + "\n" + json.dumps({"step": 9, "loss": value}) + "\n")
    said = text_of(run_page(read_run(finished)))
    assert "Held-out loss 1.2500 Training loss 1.3333 last step" in said
    assert "Training rows - " in said
    assert "gguf_q8_0" in said


def test_no_text_of_a_run_acts_as_html(finished):
    put(finished.overrides, NASTY)
    put(finished.environment, {"python": NASTY, "gpus": [NASTY], "packages": {NASTY: NASTY}, "platform": NASTY})
    source = {**SOURCE, "name": NASTY, "sha256": {NASTY: NASTY}}
    put(finished.data, {"train": {**SPLIT, "sources": [source], "long_rows": {NASTY: 2}}, "held_out": None})
    row = {"name": "base", "fidelity": FIT, "answered": 1, "lm_eval": {NASTY: {NASTY: 0.5}}}
    samples = [{"prompt": NASTY, "expected": NASTY, "answers": {NASTY: NASTY}}]
    put(finished.evaluation, {"rows": [row], "samples": samples})
    serve = [{"server": NASTY, "install": NASTY, "lines": [NASTY]}]
    manifest = {"format": NASTY, "fidelity": FIT, "serve": serve}
    put(finished.exports / NASTY.replace("/", "_").replace("\x00", "") / "manifest.json", manifest)
    html = run_page(read_run(finished))
    tags = {tag for tag, _ in read(html).tags}
    assert {"script", "img"}.isdisjoint(tags)
    assert html.count("</style>") == 1
    assert "\x00" not in html


def test_a_kl_that_is_no_number_is_said_and_not_drawn():
    artifacts = [
        Artifact("a", "gguf", size_bytes=9.0, mean_kl=math.nan),
        Artifact("b", "gptq", size_bytes=8.0, mean_kl=0.1),
    ]
    shown = fidelity(artifacts)
    assert shown is not None
    assert [line.cells[1] for line in shown.table.lines] == [Cell("not a number"), Cell("0.10000")]
    plot = size_against_kl(artifacts)
    assert plot is not None
    assert "Not drawn, for want of a finite KL: a." in plot.caption
    assert [drawn.count("b: 8 B, mean KL 0.1") for drawn in (plot.wide, plot.slim)] == [1, 1]
    assert size_against_kl(artifacts[:1]) is None


def test_intervals_stand_below_their_numbers_and_a_worse_loss_is_said(finished):
    worse = Artifact(
        "a", "gguf", mean_kl=0.01, loss_change=0.02, intervals={"mean_kl": (0.008, 0.012), "loss_change": (0.01, 0.03)}
    )
    chance = Artifact("b", "gguf", mean_kl=0.01, loss_change=0.02, intervals={"loss_change": (-0.01, 0.05)})
    html = run_page(dataclasses.replace(read_run(finished), artifacts=[worse, chance]))
    assert "0.01000<small>0.00800..0.01200</small>" in html
    assert "+0.0200<small>-0.0100..+0.0500</small>" in html
    assert remarks([worse, chance]) == [
        "a: its loss is above the adapter's by 0.0200, by more than the choice of rows explains."
    ]


def test_an_exported_adapter_is_a_file_to_serve(finished):
    put(finished.exports / "lora" / "manifest.json", {"format": "adapter", "file": ".", "rejected": False})
    assert "lora" in [one.name for one in read_run(finished).exports]
    assert "adapter" not in [one.name for one in read_run(finished).exports]


def test_other_scores_have_columns_of_their_own(finished):
    record = json.loads(finished.evaluation.read_text())
    record["rows"][0] |= {"text_perplexity": 12.5, "lm_eval": {"arc": {"acc,none": 0.25, "acc_stderr,none": 0.01}}}
    put(finished.evaluation, record)
    said = text_of(run_page(read_run(finished)))
    assert "text perplexity arc acc" in said
    assert "12.500 0.250" in said


def test_hardware_in_words():
    gpus = ["NVIDIA H100 80GB HBM3"] * 2
    assert hardware_of(Environment(gpus=gpus, cuda="13.0")) == "2 x NVIDIA H100 80GB HBM3, CUDA 13.0"
    assert hardware_of(Environment(cpu_count=1)) == "1 CPU core"


def test_a_rejection_is_told_in_the_manifests_words(finished):
    faults = ["conversation 3: the template gives other tokens", "vLLM: there is no config.json"]
    for found, told in ((faults, faults), ("damaged", ["its mean KL is above its bound."])):
        put(finished.exports / "odd" / "manifest.json", {"format": "awq", "rejected": True, "faults": found})
        said = text_of(run_page(read_run(finished)))
        assert all(f"odd is rejected: {fault}" in said for fault in told)


def test_a_file_that_was_not_measured_is_said_to_be_so(finished):
    put(finished.exports / "odd" / "manifest.json", {"format": "awq", "rejected": False, "fidelity": {}})
    said = text_of(run_page(read_run(finished)))
    assert "odd not measured" in said
    assert "odd is not measured: nothing tells how close it is to the model that was trained" in said


def test_the_optimizer_that_ran_and_the_warnings_of_training_are_shown(finished):
    warning = "training diverged: the loss is 10.80 at the end, and was 2.30 before anything was learned"
    assert "Warnings" not in text_of(run_page(read_run(finished)))
    put(finished.result, {"steps": 3, "optimizer": "adamw", "warnings": [warning, 5]})
    shown = text_of(run_page(read_run(finished)))
    assert "adamw in place of the recipe's paged_adamw_8bit, peak learning rate" in shown
    assert f"Warnings {warning}" in shown
    put(finished.result, {"steps": 3, "optimizer": "paged_adamw_8bit", "warnings": []})
    shown = text_of(run_page(read_run(finished)))
    assert "in place of" not in shown and "paged_adamw_8bit, peak" in shown and "Warnings" not in shown


def test_what_lora_reaches_is_shown_as_training_said_it(finished):
    assert "Reaches" not in text_of(run_page(read_run(finished)))
    put(finished.reach, {"lines": ["LoRA on 8 of 14 linear modules", "warning: 3 of 4 weights are not quantized"]})
    shown = text_of(run_page(read_run(finished)))
    assert "Reaches LoRA on 8 of 14 linear modules; warning: 3 of 4 weights are not quantized" in shown


@pytest.mark.parametrize(
    ("fix", "shown"),
    [
        ("qlora-kit eval 'run=a b'", "<pre>qlora-kit eval &#39;run=a b&#39;</pre>"),
        ("qlora-kit export base=<model>", "<p>Do: qlora-kit export base=&lt;model&gt;</p>"),
    ],
)
def test_only_a_line_is_shown_to_be_pasted(killed, fix, shown):
    assert shown in run_page(dataclasses.replace(read_run(killed), missing=[Missing("It lacks one.", fix)]))
