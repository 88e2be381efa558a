"""Faults of a recipe file are told all at once, each with its line; what could do more than set values is refused."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.compose import compose_recipe, compose_unchecked, load_recipe
from qlora_kit.schema.folders import packaged_recipes
from qlora_kit.schema.recipe_file import check_recipe_file
from qlora_kit.schema.recipe_text import MOST_BYTES, read_recipe_text

LINE = ("model=demo", "data=rows", "data.train_file=rows.jsonl", "data.max_tokens=64")
GLOBAL = "# @package _global_\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(here, text, place="experiment/x"):
    file = here / "recipes" / f"{place}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def told(*words, line=LINE):
    with pytest.raises(RecipeError) as caught:
        compose_recipe("train", [*line, *words])
    return [(problem.what, problem.where, problem.fix) for problem in caught.value.problems]


def of_experiment(here, text, *words):
    write(here, text)
    return told(*words, "experiment=x")


def test_every_fault_of_a_file_with_its_line_and_the_line_that_mends_it(here):
    text = GLOBAL + "lr: 1e-3\ntrainer:\n  max_steps: twenty\n  early_stopping: 3\nlora:\n  r: 0\n  alpa: 8\nzzz: 1\n"
    assert of_experiment(here, text) == [
        (
            "recipes/experiment/x.yaml holds the unknown key 'lr'; did you mean 'optim.learning_rate'?",
            "recipes/experiment/x.yaml:2",
            "optim: {learning_rate: 0.001}",
        ),
        (
            "trainer.max_steps cannot be 'twenty': it is int or null",
            "recipes/experiment/x.yaml:4",
            "max_steps: null",
        ),
        (
            "recipes/experiment/x.yaml holds the unknown key 'early_stopping'; training does not stop early; "
            "trainer.eval_every_steps shows the held-out loss on the way",
            "recipes/experiment/x.yaml:5",
            "",
        ),
        ("lora.r must be at least 1, got 0", "recipes/experiment/x.yaml:7", "r: 1"),
        (
            "recipes/experiment/x.yaml holds the unknown key 'alpa'; did you mean 'alpha'?",
            "recipes/experiment/x.yaml:8",
            "alpha: 8",
        ),
        ("recipes/experiment/x.yaml holds the unknown key 'zzz'", "recipes/experiment/x.yaml:9", ""),
    ]


def test_the_line_that_mends_a_file_mends_it(here):
    of_experiment(here, GLOBAL + "lr: 1e-3\nlora:\n  alpa: 8\n")
    write(here, GLOBAL + "optim: {learning_rate: 0.001}\nlora:\n  alpha: 8\n")
    recipe = compose_recipe("train", [*LINE, "experiment=x"]).recipe
    assert (recipe.optim.learning_rate, recipe.lora.alpha) == (0.001, 8)


def test_faults_of_a_file_and_of_the_line_are_told_together(here):
    assert len(of_experiment(here, GLOBAL + "lora: {r: 0}\n", "lora.rr=3")) == 2


@pytest.mark.parametrize(
    "text", ["lora:\n  r: 4\n", "learning_rate: 1\n", "# mine\n# @package _global_\nlora: {r: 4}\n", ""]
)
def test_a_forgotten_first_line_is_recognized(here, text):
    ((what, where, fix),) = of_experiment(here, text)
    assert what.startswith("recipes/experiment/x.yaml does not begin with the line '# @package _global_'")
    assert (where, fix) == ("recipes/experiment/x.yaml:1", "# @package _global_")


def test_an_option_that_is_none_is_told_with_the_known_ones(here):
    ((what, where, fix),) = of_experiment(here, GLOBAL + "defaults:\n  - override /model: qwen9\n")
    first, known = what.split("\n")
    assert first.endswith("x.yaml chooses the model 'qwen9', which there is none of; did you mean 'qwen3_5_9b'?")
    assert known.startswith("  known    demo, ")
    assert (where, fix) == ("recipes/experiment/x.yaml:3", "- override /model: qwen3_5_9b")
    ((what, where, fix),) = of_experiment(here, GLOBAL + "defaults:\n  - override /model: zzz\n")
    assert "which there is none of\n  known" in what and fix == ""


@pytest.mark.parametrize("choice", ["/model: demo", "model: demo", "override model: demo"])
def test_the_way_to_choose_an_option_in_an_experiment_is_told(here, choice):
    ((what, where, fix),) = of_experiment(here, GLOBAL + f"defaults:\n  - {choice}\n")
    assert (where, fix) == ("recipes/experiment/x.yaml:3", "- override /model: demo")
    assert what.endswith("in a file of experiment it is 'override /model'")


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("a: [1\nb: 2\n", "is no YAML", 2),
        ("a: 1\n\tb: 2\n", "is no YAML", 2),
        ("lora:\n  r: 1\n  r: 2\n", "has the key 'r' twice, in lines 2 and 3", 3),
        ("- 1\n", "holds no keys and values", None),
        ("5\n", "holds no keys and values", None),
        ("lora: 5\n", "lora cannot be 5: it is", 2),
        ("? [a]\n: 1\n", "has a key that is no name", 1),
        ("name: !!python/object/apply:os.system [x]\n", "asks for a value of type tag:yaml.org,2002:python", 1),
        ("name: !!binary aGk=\n", "asks for a value of type", 1),
    ],
)
def test_bad_yaml_is_told_with_its_line(here, text, what, line):
    if what.startswith("lora cannot"):
        text = GLOBAL + text
    (problem,) = of_experiment(here, text)
    assert what in problem[0]
    assert problem[1] == "recipes/experiment/x.yaml" + (f":{line}" if line else "")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (BOMB, "holds more than 20,000 values, aliases written out"),
        ("a: [" + "1," * 21_000 + "}\n", "holds more than 20,000 values"),  # and then a wrong bracket
        ("a: &a [*a]\n", "an alias holds itself"),
        ("a: " + "[" * 50 + "]" * 50 + "\n", "nests deeper than 30 levels"),
        ("a: " + "x" * MOST_BYTES + "\n", "has more than 1,000,000 bytes"),
    ],
    ids=["aliases", "many", "itself", "deep", "large"],
)
def test_bombs_are_refused_before_anything_expands_them(here, text, what):
    assert what in of_experiment(here, text)[0][0]
    (here / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=what.split(",")[0]):
        load_recipe("train", here / "recipe.yaml")


CODE = "_target_: distutils.spawn.spawn, cmd: [sh, -c, 'touch owned']"
HOSTILE = {
    "callbacks": f"hydra: {{callbacks: {{x: {{{CODE}}}}}}}",
    "callbacks by a dotted key": f"hydra.callbacks: {{x: {{{CODE}}}}}",
    "launcher": "hydra: {launcher: {_target_: qlora_kit.core.files.write_text}}",
    "launcher's shell": "hydra: {launcher: {setup: ['touch owned']}}",
    "launcher's flags": "hydra: {launcher: {additional_parameters: {wrap: touch owned}}}",
    "launcher's line feed": 'hydra: {launcher: {partition: "a\\ntouch owned"}}',
    "sweeper": "hydra: {sweeper: {_target_: torch.load}}",
    "sweeper's function": "hydra: {sweeper: {custom_search_space: os.system}}",
    "sweeper's parameters": "hydra: {sweeper: {params: {+hydra.callbacks.x._target_: 'a,b'}}}",
    "sampler": "hydra: {sweeper: {sampler: {_target_: torch.load}}}",
    "logging": "hydra: {job_logging: {handlers: {x: {(): os.system}}}}",
    "hydra's logging": "hydra: {hydra_logging: {handlers: {x: {class: os.system}}}}",
    "environment": "hydra: {job: {env_set: {LD_PRELOAD: ./x.so}}}",
    "search path": "hydra: {searchpath: ['file:///tmp']}",
    "packages": "hydra: {searchpath: ['pkg://os']}",
    "subdirectory": "hydra: {output_subdir: /tmp/x}",
    "folder": "hydra: {run: {dir: /tmp/x}}",
    "sweep folder": "hydra: {sweep: {dir: /tmp/x}}",
    "chdir": "hydra: {job: {chdir: true}}",
    "target in a group": f"lora: {{{CODE}}}",
    "target in a mapping": f"data: {{columns: {{{CODE}}}}}",
    "target in a list": f"lora: {{targets: [{{{CODE}}}]}}",
    "merged": f"x: &x {{callbacks: {{y: {{{CODE}}}}}}}\nhydra:\n  <<: *x",
    "environment variable": "data: {columns: {prompt: '${oc.env:SECRET}'}}",
    "decode": "name: ${oc.decode:x}",
    "create": "data: ${oc.create:{a:1}}",
    "now": "name: ${now:%Y}",
    "hydra's values": "name: ${hydra:runtime.cwd}",
    "hydra's section": "name: ${hydra.runtime.cwd}",
    "nested": "name: ${${lora.r}}",
    "relative": "lora: {r: '${.alpha}'}",
    "in a key": "lora: {rank_pattern: {'${oc.env:HOME}': 3}}",
    "behind backslashes": "name: 'a\\\\${oc.env:HOME}'",
    "in an option": "defaults: [{override /model: '${oc.env:HOME}'}]",
    "option elsewhere": "defaults: [{override /model: ../../../tmp/x}]",
    "into hydra": "defaults: [{/trainer@hydra.callbacks: default}]",
    "hydra's logging option": "defaults: [{override /hydra/job_logging: default}]",
    "hydra's output": "defaults: [{override /hydra/launcher: mine}]",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "place"),
    [
        *((case, "experiment/x") for case in HOSTILE),
        *((case, place) for case in ("callbacks", "environment variable") for place in ("trainer/default", "train")),
    ],
)
def test_a_file_that_could_do_more_than_set_values_is_refused_by_name(here, monkeypatch, case, place):
    monkeypatch.setenv("SECRET", "hidden")
    write(here, GLOBAL + HOSTILE[case] + "\n", place)
    problems = told(*(["experiment=x"] if place == "experiment/x" else []))
    assert problems[0][1].startswith(f"recipes/{place}.yaml:"), problems
    assert f"recipes/{place}.yaml" in problems[0][0]
    assert "hidden" not in str(problems)
    assert not (here / "owned").exists()


@pytest.mark.parametrize(
    "package", ["hydra", "hydra.callbacks", "_global_.hydra", "hydra.callbacks.x", "_group_", "nothing"]
)
def test_a_package_that_is_no_part_of_a_recipe(here, package):
    write(here, f"# @package {package}\nx: 1\n")
    assert told("experiment=x")[0][1] == "recipes/experiment/x.yaml:1"


@pytest.mark.parametrize("place", ["hydra/config", "hydra/launcher/basic"])
def test_a_folder_of_recipes_holds_no_settings_of_hydra(here, place):
    write(here, "a: 1\n", place)
    assert "Hydra" in told()[0][0]


def test_a_run_folder_of_a_stranger(here):
    for text in (f"hydra: {{callbacks: {{x: {{{CODE}}}}}}}", f"lora: {{{CODE}}}", "name: ${oc.env:HOME}"):
        (here / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe("train", here / "recipe.yaml")
        assert caught.value.problems[0].where == "recipe.yaml:1"


def test_what_recipes_may_do_they_can(here):
    text = GLOBAL + (
        "defaults:\n  - override /lora: attention\n"
        "hydra:\n  sweeper: {params: {lora.r: '4,8'}}\n"
        "name: rank_${lora.r}\nlora:\n  r: 8\n  alpha: ${lora.r}\n  rank_pattern: {'*.q_proj': 4}\n"
    )
    write(here, text)
    recipe = compose_unchecked("train", [*LINE, "experiment=x"])
    assert (recipe.name, recipe.lora.alpha, recipe.lora.targets) == ("rank_8", 8, ["attention"])


@pytest.mark.parametrize(
    "file", sorted(packaged_recipes().rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_every_packaged_recipe_passes(file):
    from hydra.plugins.config_source import ConfigSource

    found = read_recipe_text(file)
    group = "" if file.parent == packaged_recipes() else file.parent.name
    check_recipe_file(found, group, ConfigSource._get_header_dict(found.text[:512])["package"])


@pytest.mark.slow
def test_references_that_double_or_lead_back_are_refused(here):
    doubling = "".join(f"    k{n}: '${{data.columns.k{n + 1}}}${{data.columns.k{n + 1}}}'\n" for n in range(60))
    write(here, GLOBAL + f"data:\n  columns:\n{doubling}    k60: xx\n")
    assert "references write out to more than 100,000 characters" in told("experiment=x")[0][0]
    write(here, GLOBAL + "name: ${lora.r}\nlora:\n  r: ${lora.alpha}\n  alpha: ${lora.r}\n")
    assert "leads back to itself" in told("experiment=x")[0][0]
    write(here, GLOBAL + "data:\n  columns: {prompt: '${data.columns}'}\n")
    assert "leads back to itself" in told("experiment=x")[0][0]
    (here / "recipe.yaml").write_text(f"data:\n  columns:\n{doubling}    k60: xx\n")
    with pytest.raises(RecipeError, match="more than 100,000"):
        load_recipe("train", here / "recipe.yaml")
