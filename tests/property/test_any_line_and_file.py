"""Whatever is on a command line or in a recipe file: it composes, or the user is told; nothing else comes out."""

import random
from pathlib import Path

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema import store
from qlora_kit.schema.compose import compose_recipe, load_recipe
from qlora_kit.schema.recipe_file import check_recipe_file
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.walk import schema_paths

pytestmark = pytest.mark.slow

LINE = ["model=demo", "data=rows", "data.train_file=rows.jsonl", "data.max_tokens=64"]
KEYS = [
    *(path.replace("*", "a") for path, _, _ in schema_paths(TrainRecipe)),
    *("model", "quant", "data", "experiment", "launcher", "lora", "model.shape", "hydra.launcher", "hydra.sweeper"),
    *("lora.r.x", "x", "", "hydra", "data.sources", "data.sources.a", "model@x", "lr", "data.columns.a.b", "~lora"),
]
VALUES = [
    *(
        "",
        "null",
        "true",
        "3",
        "-1",
        "1e300",
        "nan",
        "-inf",
        "1" + "0" * 400,
        "1_000",
        "0x10",
        "???",
        "a",
        "a,b",
        "'",
        '"',
    ),
    *(
        "[]",
        "[1,[2]]",
        "[a",
        "{}",
        "{a:1}",
        "{a:{b:[1]}}",
        "{1:2}",
        "{",
        "glob(*)",
        "range(1,3)",
        "choice(1,2)",
        "tag(a,b)",
    ),
    *(
        "interval(0,1)",
        "sort(3,1)",
        "shuffle(1,2)",
        "int(a)",
        "${lora.r}",
        "${lora}",
        "${oc.env:HOME}",
        "${x}",
        "${",
        "${a",
    ),
    *(
        "\\",
        "\\${",
        "é",
        "\x1b[2J",
        "a\nb",
        "~",
        "#",
        "a b",
        "=",
        "==",
        "(",
        "cast(1)",
        "json_str({a:1})",
        "extend_list(a)",
    ),
    *("${name}", "${lora.alpha}", "${data.columns}", "demo", "[demo,demo]", "../x", "\udcff"),
]
LEAVES = [
    "3",
    "a",
    "null",
    "[1, 2]",
    "{a: 1}",
    "'x'",
    "${lora.r}",
    "${name}",
    "1e999",
    ".nan",
    "2024-01-01",
    "&a x",
    "*a",
    "!!int 3",
]


def line_of(draw: random.Random) -> list[str]:
    plus = ("", "", "", "+", "++", "~")
    words = [f"{draw.choice(plus)}{draw.choice(KEYS)}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.2:
        words.append("".join(draw.choice("ab=.,'\"[]{}()$:~+@/\\ é\x00") for _ in range(draw.randint(1, 12))))
    return words


def file_of(draw: random.Random) -> str:
    lines = ["# @package _global_"] if draw.random() < 0.9 else []
    for _ in range(draw.randint(1, 4)):
        *groups, last = draw.choice(KEYS).split(".")
        value = draw.choice([*LEAVES, *VALUES])
        lines.append("".join(f"{group}: {{" for group in groups) + f"{last}: {value}" + "}" * len(groups))
    if draw.random() < 0.3:
        lines.append(f"defaults: [{draw.choice(LEAVES)}, {{{draw.choice(KEYS)}: {draw.choice(LEAVES)}}}]")
    return "\n".join(lines) + "\n"


def one(seed: int) -> None:
    draw = random.Random(seed)
    words = line_of(draw)
    try:
        if seed % 2:
            compose_recipe("train", [*LINE, *words])
            return
        with open("recipes/experiment/x.yaml", "w", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
            file.write(file_of(draw))
        compose_recipe("train", [*LINE, "experiment=x"])
        load_recipe("train", Path("recipes/experiment/x.yaml"))
    except RecipeError as error:
        assert error.problems and all(problem.what for problem in error.problems)
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {words}") from error


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipes" / "experiment").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    passed = set()

    def checked_once(found, group, package):  # packaged recipes are the same in every case
        if (found.text, group, package) not in passed:
            check_recipe_file(found, group, package)
            passed.add((found.text, group, package))

    monkeypatch.setattr(store, "check_recipe_file", checked_once)


@pytest.mark.parametrize("seed", range(0, 160, 8))
def test_a_line_or_file_of_any_kind(seed):
    for number in range(seed, seed + 8):
        one(number)


@pytest.mark.parametrize("key", ["optim.beta2", "quant.int8_outlier_threshold"])
@pytest.mark.parametrize("sign", ["", "-"])
def test_a_whole_number_past_every_real_one_is_refused(key, sign):
    huge = sign + "1" + "0" * 400
    group, name = key.split(".")
    Path("recipes/experiment/x.yaml").write_text(f"# @package _global_\n{group}: {{{name}: {huge}}}\n")
    for words in ([f"{key}={huge}"], ["experiment=x"]):
        with pytest.raises(RecipeError, match=name):
            compose_recipe("train", [*LINE, *words])


def test_a_wrong_value_after_a_wrong_reference_is_refused():
    with pytest.raises(RecipeError, match=r"tracker\.mode cannot be 'x'"):
        compose_recipe("train", [*LINE, "++tracker.mode=${name}", "tracker.mode=x"])


@pytest.mark.parametrize("words", [["data.sources=???", "data.sources.a.format=0x10"], ["lora.rank_pattern=???"]])
def test_a_mapping_that_is_to_be_given_is_refused(words):
    with pytest.raises(RecipeError, match=words[0].partition("=")[0]):
        compose_recipe("train", [*LINE, *words])


def test_a_glob_is_refused_as_several_values():
    with pytest.raises(RecipeError, match=r"data\.processes is given several values, and takes one"):
        compose_recipe("train", [*LINE, "data.processes=glob(*)"])


def test_what_follows_a_wrong_group_is_refused_with_it():
    with pytest.raises(RecipeError, match="model"):
        compose_recipe("train", [*LINE, "+model.shape=${", "++data.roles=é", "++model.shape.hidden_size=-inf"])


CONTAINERS = ["lora.rank_pattern", "lora.targets", "export.gptq", "trainer", "data.columns", "data.sources.a"]


@pytest.mark.parametrize("word", ["lora.alpha_pattern={a:{b:[1]}}", "data.columns={a:{b:c}}", "lora.targets=[[a]]"])
def test_an_entry_of_another_kind_is_refused(word):
    with pytest.raises(RecipeError, match=word.partition("=")[0]):
        compose_recipe("train", [*LINE, word])


@pytest.mark.parametrize("key", CONTAINERS)
def test_a_text_that_could_be_a_reference_is_no_list_mapping_or_group(key):
    verb, line = ("export", ["run=x", "export=[gptq_4bit]"]) if key == "export.gptq" else ("train", LINE)
    for text in ("\\${", "\\${x}"):
        Path("recipes/experiment/x.yaml").write_text(
            f"# @package _global_\n{key.replace('.', ': {')}: '{text}'{'}' * key.count('.')}\n"
        )
        with pytest.raises(RecipeError, match=key):
            compose_recipe(verb, [*line, f"{key}={text}"])
        if verb == "train":
            with pytest.raises(RecipeError, match=key):
                compose_recipe(verb, [*line, "experiment=x"])


@pytest.mark.walk
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ["files", "lines"])
def test_twenty_thousand(kind):
    for number in range(20_000):
        one(1_000_000 + 2 * number + (kind == "lines"))
