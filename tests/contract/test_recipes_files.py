"""What every file under recipes/ must keep to."""

import re
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from transformers import AutoModelForCausalLM

from qlora_kit.memory.shapes import frozen_linears, other_parameters
from qlora_kit.model.structure import kept_whole, weights_of
from qlora_kit.pipelines.plan import known_base
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.folders import packaged_recipes
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.forecast import forecast
from tests.published import PUBLISHED_CONFIGS

RECIPES = packaged_recipes()
FILES = sorted(RECIPES.rglob("*.yaml"))
EXPERIMENTS = sorted((RECIPES / "experiment").glob("*.yaml"))
MODELS = sorted((RECIPES / "model").glob("*.yaml"))
GROUPS = {
    *("model", "quant", "lora", "data", "optim", "trainer", "engine"),
    *("tracker", "export", "eval", "sweep", "launcher", "experiment"),
}

# Parameters of each published checkpoint, as its hub page counts them; Gemma 3 from 4B on with its picture encoder.
PUBLISHED = {
    "demo": 134_515_008,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "llama3_3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "mistral_7b": 7_248_023_552,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472,
    "gemma3_12b": 12_187_325_040,
    "gemma3_27b": 27_432_406_640,
    "phi4_14b": 14_659_507_200,
    "phi4_mini": 3_836_021_760,
}
LEFT_OPEN = {"lfm2_2_6b"}  # no public source shows a commit of it
PICTURE_ENCODER = 416_866_032  # SigLIP So400m at 896 pixels; a projection to the hidden size comes on top


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_every_group_has_a_folder_with_recipes():
    assert {path.parent.name for path in FILES if path.parent != RECIPES} == GROUPS
    assert {path.name for path in FILES if path.parent == RECIPES} == {"train.yaml", "export.yaml", "eval.yaml"}


def test_recipes_are_yaml_only():
    assert [path for path in RECIPES.rglob("*") if path.is_file() and path.suffix != ".yaml"] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_is_a_mapping_with_a_comment_and_no_import_path(path):
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    comments = [line for line in header(path).splitlines() if not line.startswith("# @package")]
    assert comments and len(comments[0]) > 10
    assert "_target_" not in text
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 120


def test_every_model_is_in_one_of_the_tables():
    assert {path.stem for path in MODELS} == set(PUBLISHED) | set(PUBLISHED_CONFIGS)
    assert not set(PUBLISHED) & set(PUBLISHED_CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED_CONFIGS)
def test_its_weights_are_those_that_transformers_builds(model):
    values = yaml.safe_load((RECIPES / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    shape = ModelShape(**values["shape"])
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(PUBLISHED_CONFIGS[model]())
    count = sum(parameter.numel() for parameter in built.parameters())
    if shape.linear_weights:
        whole = {*kept_whole(built)}  # what is never quantized counts among the others
        mapped = (part for part in weights_of(built) if part.kind in ("linear", "experts") and part.name not in whole)
        assert shape.linear_weights == sum(part.count for part in mapped)
        assert shape.linear_weights + shape.other_weights == count
    else:  # but for norms of heads, and others beside the two of a layer
        assert _parameters(model, shape) == pytest.approx(count, rel=1e-4)


@pytest.mark.parametrize("path", [path for path in MODELS if path.stem in PUBLISHED], ids=lambda path: path.stem)
def test_its_sizes_give_the_published_number_of_parameters(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    shape = ModelShape(**values["shape"])
    assert _parameters(path.stem, shape) == PUBLISHED[path.stem]


@pytest.mark.parametrize("path", [path for path in MODELS if path.stem != "demo"], ids=lambda path: path.stem)
def test_a_hub_model_is_pinned_to_a_commit(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", values["source"])
    if path.stem not in LEFT_OPEN:
        assert re.fullmatch(r"[0-9a-f]{40}", values["revision"])
    else:
        assert "revision" not in values


def test_no_two_models_share_a_commit():
    commits = [yaml.safe_load(path.read_text(encoding="utf-8")).get("revision", path.stem) for path in MODELS]
    assert len(set(commits)) == len(commits)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_for_how_much_memory_and_how_to_launch(path):
    text = header(path)
    assert text.startswith("# @package _global_\n# For: ")
    assert f"# launch: qlora-kit train experiment={path.stem}" in text
    assert "(an estimate" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_composes_and_needs_the_memory_it_says(path, tmp_path):
    recipe = _compose(path, tmp_path)
    assert recipe.model.shape is not None
    assert isinstance(recipe.data.max_tokens, int)
    tokens = recipe.trainer.batch_size * recipe.data.max_tokens
    gigabytes = forecast(recipe, known_base(recipe), tokens).memory.total / 1e9
    stated = re.search(r"# memory: about ([\d.]+) GB", header(path))
    assert stated
    assert float(stated[1]) == pytest.approx(gigabytes, abs=0.051)
    budget = re.search(r"_(\d+)gb$", path.stem)
    if budget:
        assert gigabytes < 0.8 * int(budget[1])  # room for CUDA's context and the allocator


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_named_after_its_model_and_data(path, tmp_path):
    defaults = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"]
    chosen = {key: value for entry in defaults for key, value in entry.items()}
    model = "smollm2_135m" if chosen["override /model"] == "demo" else chosen["override /model"]
    data = {"messages": "chat"}.get(chosen["override /data"], chosen["override /data"])
    assert path.stem.startswith(f"{model}_{data}_")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_holds_out_a_few_dozen_rows_at_most(path):
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    if own["defaults"][1] != {"override /data": "home_commands"}:  # which names a file of held-out rows
        assert (own["data"]["eval_share"], own["data"]["eval_rows"]) == (0.02, 48)


def _compose(path: Path, folder: Path) -> TrainRecipe:
    rows = folder / "rows.jsonl"
    rows.write_text('{"messages": []}\n', encoding="utf-8")
    lines = [f"experiment={path.stem}", f"data.train_file={rows}", f"data.eval_file={rows}"]
    recipe = compose_recipe("train", lines).recipe
    assert isinstance(recipe, TrainRecipe)
    return recipe


def _parameters(model: str, shape: ModelShape) -> int:
    total = sum(linear.weights for linear in frozen_linears(shape)) + other_parameters(shape)
    if model.startswith(("qwen3", "gemma3")):
        total += shape.num_layers * 2 * shape.head_dim  # a norm on queries and one on keys
    if model.startswith("gemma3"):
        total += shape.num_layers * 2 * shape.hidden_size  # norms after attention and after the MLP
        if model != "gemma3_1b":
            total += PICTURE_ENCODER + 1152 * shape.hidden_size + 1152
    return total
