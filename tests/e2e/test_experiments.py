"""Every shipped experiment through the command line, on a tiny checkpoint of its own architecture.

The model alone is another one, and the steps are few; everything else is as the recipe ships it. One process runs all
lines, so that the libraries are loaded once. Here each experiment trains, and what follows training is spread over
them; the whole matrix is under the mark `walk`.
"""

import itertools
import shutil
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.cli.verbs import main
from qlora_kit.core.files import read_json
from qlora_kit.data.home_commands import write_files
from qlora_kit.schema.folders import groups, recipe_file
from tests.e2e.conftest import write_rows
from tests.published import PUBLISHED_CONFIGS
from tests.twins import build_twin, twin_name


def model_of(experiment):
    """The option of the group `model` that an experiment takes."""
    (chosen,) = (
        entry["override /model"]
        for entry in yaml.safe_load(experiment.read_text("utf-8"))["defaults"]
        if "override /model" in entry
    )
    return chosen


MODELS = {
    name: model_of(recipe_file("experiment", name))
    for name in groups()["experiment"]
    if recipe_file("experiment", name)
}
# Their checkpoints hold a vision tower too.
IMAGE_TEXT = ["gemma3_12b_chat_24gb", "gemma3_27b_chat_48gb", "gemma3_4b_chat_12gb"]
# Of architectures whose files llama.cpp's converter or transformers alone knows: trained and exported.
RECENT = [name for name, model in MODELS.items() if model in PUBLISHED_CONFIGS]
# Of those that share a twin the first is written as GGUF too: the converter's process takes as long as all the rest.
AS_GGUF = {twin_name(MODELS[name]): name for name in reversed(RECENT)}
EXPERIMENTS = [name for name in MODELS if name not in {*IMAGE_TEXT, *RECENT}]
PADDED, PACKED = [], ["data.batching=packed"]
PLAIN, FAST = [], ["engine=fast"]
WAYS = list(itertools.product((PADDED, PACKED), (PLAIN, FAST)))
# Those that are exported, scored and reported in the normal suite; other tests export the other architectures.
FULL = ["gemma3_1b_chat_8gb", "mistral_7b_chat_16gb", "phi4_mini_chat_12gb"]


class Bases(dict):
    """Folders of twins by name, built when they are first asked for."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, name):
        self[name] = build_twin(name, self.folder / name)
        return self[name]

    def of(self, experiment):
        return self[twin_name(MODELS[experiment])]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The tiny bases, and a folder with rows."""
    folder = tmp_path_factory.mktemp("bases")
    write_rows(folder / "chats.jsonl", 100, 1, "turn on")
    return Bases(folder)


def line(experiment, bases, *more):
    words = ["train", f"experiment={experiment}", f"model.source={bases.of(experiment)}"]
    if "home_commands" in experiment:
        write_files(Path("data/home_commands"), seed=0, train_rows=48, held_out_rows=2)
    else:
        words.append(f"data.train_file={bases.folder / 'chats.jsonl'}")
    return [*words, "trainer.max_steps=2", "trainer.save_every_steps=1", *more]


def the_run():
    (recipe,) = Path("outputs").glob("*/*/recipe.yaml")
    return recipe.parent


def as_if_killed(run, step):
    """Take back what a run wrote after a checkpoint; returns the bytes of the adapter that it had come to."""
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    for later in (run / "checkpoints").glob("checkpoint-*"):
        if int(later.name.rpartition("-")[2]) > step:
            shutil.rmtree(later)
    return adapter


def exported(run, exports, score_rows=2):
    """Export and score a run; the line succeeds and leaves what it promises."""
    wanted = f"export=[{','.join(exports)}]"
    assert main(["export", f"run={run}", wanted, f"export.score_rows={score_rows}"]) == 0
    for name in exports:
        manifest = read_json(run / "exports" / name / "manifest.json")
        assert manifest["faults"] == []
        assert manifest["rejected"] is False
        assert manifest["fidelity"]["mean_kl"] < 0.05


def follow(run, exports, score_rows=2):
    """Export, score and report a run; every line succeeds and leaves what it promises."""
    exported(run, exports, score_rows)
    assert main(["eval", f"run={run}", "eval.max_new_tokens=2", f"eval.kl_rows={score_rows}"]) == 0
    assert {row["name"] for row in read_json(run / "eval.json")["rows"]} >= {"adapter", *exports}
    assert main(["report", f"run={run}"]) == 0
    assert (run / "report.html").is_file()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs", "data"}
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_trains_as_shipped_and_goes_on(experiment, bases, here, capfd):
    number = EXPERIMENTS.index(experiment)
    batching, engine = WAYS[number % 4] if experiment not in FULL else WAYS[0]
    assert main(line(experiment, bases, *batching, *engine)) == 0, capfd.readouterr().err
    run = the_run()
    assert read_json(run / "result.json")["steps"] == 2
    assert read_json(run / "data.json")["held_out"]["rows"] > 0
    if experiment in FULL:
        follow(run, ["gguf_q8_0", "merged_16bit"])
    else:
        adapter = as_if_killed(run, 1)
        assert main(["train", "resume=latest"]) == 0, capfd.readouterr().err
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
        exported(run, ["gguf_q8_0"])


@pytest.mark.walk
@pytest.mark.parametrize("way", WAYS, ids=["padded-plain", "padded-fast", "packed-plain", "packed-fast"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_goes_the_whole_way(experiment, way, bases, here, capfd):
    batching, engine = way
    assert main(line(experiment, bases, *batching, *engine)) == 0, capfd.readouterr().err
    run = the_run()
    adapter = as_if_killed(run, 1)
    assert main(["train", "resume=latest"]) == 0, capfd.readouterr().err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    follow(run, ["gguf_q8_0", "merged_16bit"])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", IMAGE_TEXT)
def test_the_language_model_of_an_image_text_checkpoint_is_trained_and_exported(experiment, here, bases, capfd):
    assert main(line(experiment, bases)) == 0, capfd.readouterr().err
    follow(the_run(), ["merged_16bit", "gguf_q8_0"])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", RECENT)
def test_an_experiment_trains_and_is_exported(experiment, here, bases, capfd):
    assert main(line(experiment, bases, "data.max_tokens=128", "trainer.batch_size=2")) == 0, capfd.readouterr().err
    exported(the_run(), ["merged_16bit", *(["gguf_q8_0"] if experiment in AS_GGUF.values() else [])])


def test_every_experiment_has_a_twin_of_its_architecture():
    assert set(IMAGE_TEXT) <= set(MODELS)
    assert set(FULL) <= set(EXPERIMENTS)
    assert all(twin_name(model) for model in MODELS.values())
    assert AS_GGUF.keys() == {twin_name(MODELS[name]) for name in RECENT}
