"""What is proposed in place of a wrong key is what was meant, and composes; where that is a guess, nothing is."""

import shlex

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.meant import HINTS, NAMES_ELSEWHERE, OPTIONS_ELSEWHERE, WORDS_ELSEWHERE
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.walk import find_path

pytestmark = pytest.mark.slow

ROWS = ["data=rows", "data.train_file=rows.jsonl", "data.max_tokens=64"]
LINE = ["model=demo", *ROWS]


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "x.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)


def told(*words, line=LINE):
    with pytest.raises(RecipeError) as caught:
        compose_recipe("train", [*line, *words])
    (problem,) = caught.value.problems
    return problem


MEANT = {
    "lr=1e-3": "optim.learning_rate=0.001",
    "trainer.lr=1e-3": "optim.learning_rate=0.001",
    "lr=fast": "optim.learning_rate=0.0002",
    "seed=3": "trainer.seed=3",
    "lora.seed=3": "trainer.seed=3",
    "per_device_train_batch_size=2": "trainer.batch_size=2",
    "num_train_epochs=3": "trainer.epochs=3",
    "trainer.epoch=3": "trainer.epochs=3",
    "lora_r=8": "lora.r=8",
    "lora.rank=8": "lora.r=8",
    "lora.rr=8": "lora.r=8",
    "lora_alpha=8": "lora.alpha=8",
    "target_modules=[q_proj,v_proj]": "lora.targets=[q_proj,v_proj]",
    "max_seq_length=512": "data.max_tokens=512",
    "load_in_4bit=true": "quant=nf4_double",
    "load_in_4bit=True": "quant=nf4_double",
    "load_in_8bit=true": "quant=int8",
    "bf16=true": "quant.compute_dtype=bfloat16",
    "packing=true": "data.batching=packed",
    "excess_length_strategy=truncate": "data.overflow=truncate_end",
    "truncation_mode=keep_start": "data.overflow=truncate_end",
    "warmup_ratio=0.1": "optim.warmup_fraction=0.1",
    "gradient_accumulation_steps=4": "trainer.gradient_accumulation=4",
    "save_steps=10": "trainer.save_every_steps=10",
    "quant=4bit": "quant=nf4_double",
    "quant=nf5": "quant=nf4",
    "optim.learning_rat=1": "optim.learning_rate=1",
    "learning_rate=1e-3": "optim.learning_rate=0.001",
    "optm.learning_rate=1e-3": "optim.learning_rate=0.001",
    "data.train=last": "data.train_on=last",
    "trainer.sed=true": "trainer.seed=0",
    "engine.cuda_graph=false": "engine.cuda_graphs=false",
    "engine.cuda_graph=3": "engine.cuda_graphs=true",
    "lora.targts=[a,b]": "lora.targets=[a,b]",
    "run_name=mine": "name=mine",
    "report_to=wandb": "tracker=wandb",
    "trainr=smoke_test": "trainer=smoke_test",
}


@pytest.mark.parametrize("wrong", MEANT)
def test_what_is_proposed_is_what_was_meant(wrong):
    assert told(wrong).fix == MEANT[wrong]


def test_a_misspelled_group_is_meant_by_its_option():
    assert told("modle=demo", line=[*ROWS, "model.source=demo"]).fix == "model=demo"
    assert told("data.train=x.jsonl", line=["model=demo", "data=rows", "data.max_tokens=64"]).fix == (
        "data.train_file=x.jsonl"
    )


@pytest.mark.parametrize("wrong", MEANT)
def test_what_is_proposed_composes(wrong):
    words = shlex.split(told(wrong).fix)
    try:
        compose_recipe("train", [*LINE, *words])
    except RecipeError as error:
        # Modules and packages that this machine lacks are another matter.
        assert not any("no field" in str(problem) or "cannot be" in str(problem) for problem in error.problems)


@pytest.mark.parametrize(
    "wrong", ["zzz=1", "trainer.warmup_steps=10", "warmup_steps=10", "trainer.early_stopping=true", "deepspeed=x.json"]
)
def test_a_guess_is_not_made(wrong):
    problem = told(wrong)
    assert problem.fix == "qlora-kit train --help"
    assert "did you mean" not in problem.what


@pytest.mark.parametrize(
    ("wrong", "known"),
    [
        ("lora.rnak=8", "r, alpha, "),
        ("data.sources.a.foo=8", "path, "),
        ("zzz=8", "name, "),
        ("foo.bar=8", "name, "),
    ],
)
def test_where_nothing_is_near_the_fields_of_the_group_are_listed(wrong, known):
    problem = told(wrong)
    what, fields = problem.what.split("\n  known    ")
    assert what == f"there is no field '{wrong.split('=')[0]}'"
    assert fields.startswith(known)
    assert problem.fix == "qlora-kit train --help"


def test_what_has_no_field_is_told_what_there_is_instead():
    assert told("warmup_steps=10").what == (
        "there is no field 'warmup_steps'; warming up is a share of all steps here, optim.warmup_fraction"
    )


def test_the_tables_name_what_exists():
    others = ("export.calibration_rows", "eval.max_new_tokens")
    assert all(find_path(TrainRecipe, field) for field in NAMES_ELSEWHERE if field not in others)
    names = [name for names in NAMES_ELSEWHERE.values() for name in names]
    assert len(names) == len(set(names))
    assert not set(names) & (WORDS_ELSEWHERE.keys() | HINTS.keys())
    for line in [line for lines in WORDS_ELSEWHERE.values() for line in lines.values()]:
        compose_recipe_but_for_packages(line)
    for group, options in OPTIONS_ELSEWHERE.items():
        for option in options.values():
            compose_recipe_but_for_packages(f"{group}={option}")


def compose_recipe_but_for_packages(word):
    try:
        compose_recipe("train", [*LINE, word])
    except RecipeError as error:
        assert all("needs" in str(problem) for problem in error.problems), word
